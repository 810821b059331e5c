"""Train SiT, DiT or MM-DiT: alone, with REPA, or with HASTE, aligned with a teacher first.

    python haste_train.py                       HASTE on digits, minutes on two CPU cores
    python haste_train.py --preset scenes       text to image: MM-DiT on scenes of digits
    torchrun --nproc_per_node=8 haste_train.py --preset imagenet256-xl --data PACKED

Papers: HASTE (Wang et al. 2025, arXiv 2505.16792), REPA (Yu et al. 2025, 2410.06940), SiT (Ma et
al. 2024, 2401.08740), DiT (Peebles & Xie 2023, 2212.09748). Time runs from t = 0 (data) to t = 1
(noise). Step n = 0, 1, ... minimises

    n <  tau    E|v(x_t, t, y) - v|^2  +  w_f feature alignment  +  w_a attention alignment
    n >= tau    E|v(x_t, t, y) - v|^2                       teacher and projector are gone

With --objective ddpm the first term is DiT's loss (dit.py), and t is a step of 0 ... 999.

Everything random in step n is drawn for the whole batch from one generator seeded by (seed, n), and
then sliced. So results do not depend on the number of processes, up to rounding, and a resumed run
continues as if nothing had happened.

Read `losses`, then the loop in `train`. The alignment losses are in haste.py. The alignment ends in
phase 1 of the loop: `align.first_free_step` says when, or `held_cosine` with --stop auto, and
`drop_projector` how.
Letters: B batch (b of one process), C channels, h w height and width, N tokens, D width.
"""
import copy
import dataclasses
import gc
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import torch

import align
import clutter
import data
import ddp
import dit
import evaluate
import haste
import mmdit
import models
import packed as packed_folders
import run
import scenes
import sit
import teacher as teachers
import text
import vae
from haste import (attention_alignment, attention_alignment_grad, contrastive_term,
                   feature_alignment, gradient_cosine, mean_over_pairs, spatial_normalise)
from models import PROJECTOR

PROGRAM = "haste_train.py"
ALIGNMENT = haste.ALIGNMENT                                                 # all of HASTE's names are reachable here
layer_map = haste.layer_map


@dataclass
class Config:
    # what to train on
    data: str = "digits"  # digits, scenes, clutter, cifar10, mnist, fashionmnist, class folders, or one of prepare.py
    image_size: Optional[int] = None  # side to which a folder's images are cropped; photographs need it
    data_root: str = "out/data"  # where torchvision's sets are kept once downloaded
    mirror: bool = False  # mirror half of the images at random
    latent_channels: Optional[int] = None  # channels that packed latents must have: 4 of SD, 16 of KL-16; None is any
    vae: Optional[str] = None  # decoder for samples of packed data: sd-ema, sd-mse or a file; None is the data's own
    # the model
    model: str = "SiT-Ti/2"  # SiT-Ti, S, B, L, XL with patch 1, 2, 4, 8; for captions MMDiT-Ti/4, MMDiT-24/2
    depth: Optional[int] = None  # number of blocks, if not the size's own
    hidden_size: Optional[int] = None  # width, if not the size's own
    num_heads: Optional[int] = None  # attention heads, if not the size's own
    qk_norm: bool = False  # normalise queries and keys
    zero_init: bool = False  # MMDiT: start its blocks as the identity, as every SiT does (adaLN-Zero)
    text: Optional[str] = None  # file with CLIP's weights, for packed captions; if not given, they are fetched
    init: Optional[str] = None  # start from the weights of this checkpoint (a file, or repa-xl) with a fresh optimizer
    # the alignment with a teacher
    align: Literal["none", "repa", "haste"] = "haste"  # no alignment, of features, of features and attention
    stop: str = "500"  # alignment ends at this step, at a step found by the angle between gradients (auto), or never
    stop_interval: int = 50  # with --stop auto: steps between two measurements of the angle
    stop_warmup: int = 100  # with --stop auto: steps before the first measurement
    stop_threshold: float = -0.05  # with --stop auto: alignment ends once the mean cosine falls below this
    teacher: str = "small"  # small (trained here, cached), dinov2_vitb14, or another name of teacher.py's TEACHERS
    teacher_weights: Optional[str] = None  # file with the teacher's weights; if not given, they are fetched
    teacher_steps: int = 300  # training steps of the small teacher
    cache: str = "out/cache"  # where small teachers and clutter's classifier are kept
    feature_weight: float = 1.0  # weight of feature alignment; the papers' is 0.5
    attention_weight: float = 1.0  # weight of attention alignment; the papers' is 0.5
    feature_depth: Optional[int] = None  # blocks below the projector, if not the table's
    pairs: Optional[str] = None  # blocks student:teacher whose attention is aligned, as 4:8,5:9, if not the table's
    projector: Literal["mlp", "conv"] = "mlp"  # REPA's, or iREPA's convolution
    projector_dim: int = 256  # width of REPA's projector
    projector_kernel: int = 3  # side of iREPA's convolution, in tokens
    spatial_norm: Optional[float] = None  # iREPA: share of their mean that tokens lose before they are scaled; 0.6
    # the objective
    objective: Literal["flow", "ddpm"] = "flow"  # what to predict: SiT's velocity, or DiT's noise and its variance
    path: Literal["linear", "cosine"] = "linear"  # path from data to noise
    time: Literal["uniform", "lognormal"] = "uniform"  # distribution of training times
    contrastive: float = 0.0  # weight of contrastive flow matching; 0.05 in its paper
    label_drop: float = 0.1  # share of samples trained without their label, for classifier-free guidance
    # optimisation
    steps: int = 1000  # optimizer steps
    batch_size: int = 64  # images a step, over all processes
    accumulate: int = 1  # parts into which a process cuts its batch, to save memory
    lr: float = 4e-3  # learning rate of AdamW
    warmup: int = 100  # steps of linear warm-up
    beta2: float = 0.999  # second-moment decay of AdamW
    weight_decay: float = 0.0  # weight decay of AdamW
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.98  # decay of the averaged weights, the ones that are sampled
    # the machine
    device: str = "auto"  # auto, cpu, cuda, cuda:N, or mps of a Mac
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on CUDA, else fp32; on CUDA, fp32 means TF32
    compile: Optional[bool] = False  # torch.compile the blocks; None (the presets for GPUs) means: on CUDA
    # the run
    seed: int = 0  # of everything random
    out: str = "out"  # folder for log.jsonl, ckpt.pt, samples.png and, in the end, curves.png
    resume: str = "auto"  # auto (resume from OUT/ckpt.pt if it exists), never (start over), or a checkpoint's path
    track: Literal["none", "tensorboard", "wandb"] = "none"  # where else to send the log and the sample sheet
    log_every: int = 20  # steps between two lines of the log
    save_every: int = 250  # steps between two checkpoints; 0 saves at the end only
    eval_every: int = 250  # steps between two evaluations; 0 never evaluates
    eval_samples: int = 500  # images drawn for an evaluation
    eval_steps: int = 20  # sampling steps of an evaluation (Euler; ancestral with --objective ddpm)
    eval_cfg: float = 1.0  # classifier-free guidance scale of an evaluation; 1 is none
    eval_features: Literal["pixels", "inception"] = "pixels"  # inception: also FID of the samples, on photographs
    eval_weights: Optional[str] = None  # file with Inception's weights; if not given, they are fetched


MAY_CHANGE_ON_RESUME = ("steps", "out", "device", "resume", "track", "log_every", "save_every",
                        "eval_every", "cache", "data_root", "accumulate", "compile", "vae",
                        "text", "eval_features", "eval_weights")

# ImageNet, packed: the papers' settings, which are the same for all sizes.
IMAGENET = dict(data="out/imagenet256", image_size=256, latent_channels=4, teacher="dinov2_vitb14",
                feature_weight=0.5, attention_weight=0.5, projector_dim=2048, batch_size=256,
                lr=1e-4, warmup=0, ema=0.9999, compile=None, log_every=100, save_every=10_000,
                eval_every=50_000, eval_samples=1000, eval_steps=50)
PRESETS = {
    "digits": dict(),
    # digits with captions; a teacher does not help there
    "scenes": dict(data="scenes", model="MMDiT-Ti/4", align="none", stop="250"),
    # a digit among fragments of others: what the images mean counts more than their pixels
    "clutter": dict(data="clutter", model="SiT-Ti/4", teacher_steps=900, feature_weight=2.0,
                    stop="750", steps=1500),
    # CIFAR-10 at 32 x 32 pixels, 256 tokens, for one GPU
    "cifar10": dict(data="cifar10", mirror=True, model="SiT-S/2", teacher_steps=3000,
                    feature_weight=0.5, attention_weight=0.5, projector_dim=2048, stop="20000",
                    steps=50_000, batch_size=256, lr=3e-4, warmup=1000, ema=0.9995, compile=None,
                    log_every=100, save_every=5000, eval_every=5000, eval_samples=2000,
                    eval_steps=50),
    "imagenet256-b": dict(IMAGENET, model="SiT-B/2", stop="100000", steps=400_000),
    "imagenet256-l": dict(IMAGENET, model="SiT-L/2", stop="250000", steps=400_000),
    "imagenet256-xl": dict(IMAGENET, model="SiT-XL/2", stop="250000", steps=500_000),       # 100 epochs: FID 5.3
    "imagenet256-xl-repa": dict(IMAGENET, model="SiT-XL/2", align="repa", stop="never",
                                steps=4_000_000),                                           # 800 epochs: FID 5.9
    "imagenet256-xl-plain": dict(IMAGENET, model="SiT-XL/2", align="none",
                                 steps=7_000_000),                                          # 1,400 epochs: FID 8.3
    "imagenet256-dit-xl": dict(IMAGENET, objective="ddpm", model="SiT-XL/2", stop="250000",
                               steps=400_000),                                              # 80 epochs: FID 9.33
    # MS-COCO: FID 4.06 with classifier-free guidance
    "coco256": dict(IMAGENET, data="out/coco256", model="MMDiT-24/2", stop="200000",
                    steps=250_000),
    "imagenet512-xl": dict(IMAGENET, data="out/imagenet512", image_size=512, model="SiT-XL/2",
                           stop="300000", steps=500_000, accumulate=2),     # 1,024 tokens, teacher at 448 pixels
}


# ---- the loss of a step

def losses(model, x, y, t, eps, targets, pairs, cfg, exact=False, negatives=None):
    """Return the total loss of a batch, and its terms for the log ("loss" is the objective alone).

    x [B,C,h,w] clean; y [B], or features of captions [B,L,C]; t [B]; eps like x; targets: what the
    teacher returns, or None if the alignment has ended. negatives, with --contrastive: the
    velocities [M,C,h,w] of the global batch, and which of them [B] each sample is kept away from.
    With `exact`, the terms include the true value of the attention loss: it costs a log-sum-exp, so
    only logged steps ask for it.
    """
    if cfg.objective == "flow" and targets is None and negatives is None:
        flow = sit.flow_loss(model, x, y, t, eps, cfg.path)                 # from tau on: nothing else
        return flow, {"loss": flow}

    tapped = []
    if targets is not None:
        tapped = [i for i, _ in pairs]
    if cfg.objective == "ddpm":
        out, z, taps_s = model(dit.noised(x, eps, t.long()), t, y, tap_layers=tapped)
        mse, vb = dit.ddpm_terms(out, x, eps, t.long())
        loss = (mse + vb).mean()
        terms = {"loss": loss, "vb": vb.mean()}
    else:
        x_t, v = sit.interpolant(x, eps, t, cfg.path)
        v_hat, z, taps_s = model(x_t, t, y, tap_layers=tapped)
        loss = (v_hat.float() - v).square().mean()
        terms = {"loss": loss}

    total = loss
    if negatives is not None:
        terms["contrastive_term"] = contrastive_term(v_hat, *negatives).mean()
        total = total - cfg.contrastive * terms["contrastive_term"]
    if targets is None:
        return total, terms

    tokens, taps_t = targets
    if cfg.spatial_norm is not None:
        tokens = spatial_normalise(tokens, cfg.spatial_norm)
    terms["feature_loss"] = feature_alignment(z, tokens)
    total = total + cfg.feature_weight * terms["feature_loss"]
    if pairs:
        attention = mean_over_pairs(attention_alignment_grad, taps_s, taps_t)
        total = total + cfg.attention_weight * attention
    if pairs and exact:
        with torch.no_grad():
            terms["attention_loss"] = mean_over_pairs(attention_alignment, taps_s, taps_t)
    return total, terms


def random_numbers(cfg, step, shape, packed):
    """Draw every random number of a step, for the whole global batch, shape = (B, C, h, w).

    Returns eps [B,C,h,w], t [B], dropped [B], mirrored [B], the noise of the autoencoder's
    posterior [B,C,h,w], which is empty if the data is not packed, and for each image another one of
    the batch [B]. All are drawn on the CPU, since a GPU's numbers depend on its model.
    """
    g = run.seeded("cpu", cfg.seed, 0, step)
    B = shape[0]
    eps = torch.randn(shape, generator=g)
    t = torch.rand(B, generator=g)
    if cfg.time == "lognormal":                                             # REPA: sigma/alpha = exp(N(0, 1))
        s = torch.randn(B, generator=g).exp()
        t = s / (1 + s) if cfg.path == "linear" else 2 / math.pi * torch.atan(s)
    if cfg.objective == "ddpm":
        t = (dit.NUM_STEPS * t).floor()                                     # 0 ... 999
    dropped, mirrored = torch.rand(2, B, generator=g)
    mirror_share = 0.5 if cfg.mirror else 0
    posterior_shape = shape if packed else (B, 0)
    posterior = torch.randn(posterior_shape, generator=g)
    offset = torch.randint(1, max(2, B), (), generator=g)
    other = (torch.arange(B) + offset) % B
    return eps, t, dropped < cfg.label_drop, mirrored < mirror_share, posterior, other


# ---- termination

def drop_projector(model, ema, opt):
    """Remove the projector from model, EMA, optimizer and device; return its last weights.

    The weights, {"model": ..., "ema": ...} on the CPU, go into later checkpoints: REPA's strict
    loader expects them. The optimizer state of all other parameters stays as it is, bit for bit.
    """
    opt.zero_grad()
    for p in opt.param_groups.pop()["params"]:                              # the projector's group is the second one
        opt.state.pop(p, None)
    kept = {}
    for name, net in (("model", model), ("ema", ema)):
        kept[name] = {k: w.cpu() for k, w in net.state_dict().items() if k.startswith(PROJECTOR)}
        net.projectors = None
    return kept


def held_cosine(model, teacher, images, condition, pairs, cfg, processes, autocast):
    """Return haste.gradient_cosine on a batch and noise that stay the same all through the run.

    Every process returns the same number.
    """
    device = processes.device
    pixels, x, y, eps = align.held_batch(cfg, images, images.shape, device)

    def losses_at(time):
        if cfg.objective == "ddpm":
            time = round(dit.NUM_STEPS * time) - 1
        t = torch.full((len(x),), float(time), device=device)
        total, terms = losses(model, x, y, t, eps, targets, pairs, cfg)
        return terms["loss"], total - terms["loss"]

    block = model.blocks[model.encoder_depth - 1]                           # the one below the projector
    with torch.compiler.set_stance("force_eager"):                          # a batch of another size: not compiled
        targets = align.teacher_targets(teacher, pixels, pairs, autocast)
        y = condition(y)
        with autocast:
            cosine = gradient_cosine(losses_at, block.parameters())
    return processes.mean(cosine).item()                                    # so that all processes decide alike


# ---- from flags to objects: bad input is refused here, with one line

def check(cfg, world):
    """Refuse impossible values before anything is loaded, and fill in the model's own sizes."""
    run.check(cfg, world, ("stop_interval", "teacher_steps", "projector_dim", "projector_kernel"),
              ("stop_warmup", "feature_weight", "attention_weight"))
    run.require(cfg, cfg.model in models.CONFIGS, "model",
                "must be SiT-Ti, S, B, L or XL, with patch /1, /2, /4 or /8, as SiT-B/2; or "
                "MMDiT-Ti/4, MMDiT-24/2")
    align.check(cfg)
    if cfg.model in mmdit.MMDIT_CONFIGS:
        run.refuse_changed(cfg, ("objective", "projector"), "is for a SiT: leave it out")
        run.refuse_changed(cfg, ("mirror",), "would swap left and right, which captions name")
    else:
        run.refuse_changed(cfg, ("zero_init", "text"), "is for an MM-DiT: leave it out")
    if cfg.data in ("scenes", "clutter"):
        run.refuse_changed(cfg, ("eval_features",), "is for photographs: leave it out")
    if cfg.objective == "ddpm":
        run.refuse_changed(cfg, ("path", "time", "contrastive"),
                           "is for --objective flow: leave it out")
        run.require(cfg, cfg.eval_steps <= dit.NUM_STEPS, "eval_steps",
                    f"must lie in 1 ... {dit.NUM_STEPS}")
    if cfg.align == "none":
        run.refuse_changed(cfg, ("projector", "spatial_norm"),
                           "is for an alignment: leave it out")
    if cfg.contrastive:
        run.require(cfg, 0 < cfg.contrastive < 1, "contrastive", "must lie in [0, 1)")
        run.require(cfg, cfg.path == "linear", "contrastive", "is for --path linear")
        run.require(cfg, cfg.batch_size > 1, "contrastive", "needs a --batch-size of 2 or more")
    run.require(cfg, cfg.spatial_norm is None or 0 <= cfg.spatial_norm <= 1, "spatial_norm",
                "must lie in [0, 1]")
    run.require(cfg, cfg.projector_kernel % 2 == 1, "projector_kernel", "must be odd, as 3")
    if cfg.projector == "mlp":
        run.refuse_changed(cfg, ("projector_kernel",), "is for --projector conv")
    for name in ("depth", "hidden_size", "num_heads"):                      # the table fills what no flag has set
        if getattr(cfg, name) is None:
            setattr(cfg, name, models.CONFIGS[cfg.model][name])
    fits = cfg.hidden_size % cfg.num_heads == 0 and cfg.hidden_size % 4 == 0
    run.require(cfg, fits, "hidden_size",
                f"must be a multiple of 4 and of --num-heads {cfg.num_heads}")
    if cfg.align != "none":
        align.choose_layers(cfg, cfg.depth, cfg.depth)                      # raises if the flags are impossible


def build(cfg, saved, aligned, processes):
    """Return the data, the condition, the teacher and its layer pairs, the model, its arguments.

    There is no teacher and there are no pairs unless `aligned`.
    """
    images = data.open_alike(cfg, processes)
    if len(images.train) < 2:
        raise ValueError(f"--data {cfg.data} holds fewer than two training images")
    arch = models.arch_of(cfg, images)
    side = arch["input_size"]
    images.check(cfg, saved, input_size=side, in_channels=arch["in_channels"])
    grid = side // arch["patch_size"]
    if cfg.spatial_norm is not None and grid == 1:
        raise ValueError(f"--spatial-norm {cfg.spatial_norm} needs more than one token: choose a "
                         f"--model with a smaller patch")
    if images.text is None:
        condition = models.condition_of_classes(len(images.classes), processes)
    else:
        condition = models.condition_of_captions(images.train.null, images.text, cfg.text,
                                                 processes)

    teacher = None
    pairs = []
    initial = None
    if saved:
        arch = saved["arch"]
    elif cfg.init:
        file = processes.main_first(lambda: run.checkpoint_file(cfg.init, "init"))
        initial = models.load(file, cfg.num_heads, cfg.objective)
        if isinstance(initial, sit.SiT) and images.text is None:
            arch.update(learn_sigma=initial.learn_sigma, flip_time=initial.flip_time)
    if aligned:
        teacher = align.make_teacher(cfg, images, grid, processes)
        feature_depth, pairs = align.choose_layers(cfg, cfg.depth, cfg.depth, teacher.depth)
        arch.update(z_dim=teacher.embed_dim, encoder_depth=feature_depth)
        if cfg.projector == "conv":
            arch.update(projector_kernel=cfg.projector_kernel)

    torch.manual_seed(cfg.seed)
    model = models.create(arch)
    if initial is not None:
        models.load_initial(model, initial, cfg)
    return images, condition, teacher, pairs, model.to(processes.device), arch


def training_state(cfg, model, saved):
    """Return the model's average (EMA), its optimizer, and a dropped projector's last weights.

    The projector is a parameter group of its own, which `drop_projector` can take away. With
    `saved`, a checkpoint's content, all are as they were.
    """
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    body = [p for name, p in model.named_parameters()
            if p.requires_grad and not name.startswith(PROJECTOR)]
    groups = [dict(params=body)]
    if model.projectors is not None:
        groups.append(dict(params=list(model.projectors.parameters())))
    opt = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2),
                            weight_decay=cfg.weight_decay, fused=True)
    kept = {"model": {}, "ema": {}}
    if saved:
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        if len(saved["opt"]["param_groups"]) < len(groups):                 # saved after the alignment had ended
            kept = drop_projector(model, ema, opt)
        opt.load_state_dict(saved["opt"])
    return ema, opt, kept


# ---- the program

# changes of their code are reported on resume
MODULES = (haste, sit, dit, mmdit, text, models, teachers, align, data, packed_folders, scenes,
           clutter, run, sys.modules[__name__])


def train(cfg, processes, stop):
    """Train until --steps or a signal, from scratch or from where the last run stopped."""
    with run.one_line_errors(PROGRAM):
        check(cfg, processes.world)
        saved, last_good = run.resume_point(cfg, MAY_CHANGE_ON_RESUME, MODULES, processes)
        if saved and saved["steps"] >= cfg.steps:
            return
        run.make_folder(cfg.out, cfg.out)
        inception = processes.on_main(lambda: evaluate.load_inception(cfg, processes.device))
        start = saved["steps"] if saved else 0
        tau = saved["tau"] if saved else align.first_free_step(cfg)
        images, condition, teacher, pairs, model, arch = build(cfg, saved, start < tau,
                                                               processes)
        ema, opt, kept = training_state(cfg, model, saved)
        contrast = saved.get("contrast") if saved else None                 # what guided sampling needs
        if cfg.contrastive and saved is None:
            processes.print("taking the mean of the training images, for --contrastive")
            contrast = cfg.contrastive, processes.from_main(lambda: images.mean(cfg.mirror))
        packed = images.packed                                              # None, or what data.json says
        decode = reference = prompts = None
        if cfg.eval_every:
            decode = processes.main_first(
                lambda: vae.load_decoder(packed, cfg.vae, model.in_channels, processes.device))
            reference = processes.on_main(lambda: evaluate.reference(images, inception, cfg.cache))
            prompts = evaluate.prompts_of(images, cfg.eval_samples)
        log = run.Log(cfg, start, processes)

    device = processes.device
    world = processes.world
    autocast = run.autocast(cfg.precision, device)
    seconds = saved["seconds"] if saved else 0.0
    clock = run.Clock(cfg, start, seconds)
    code = run.code_hash(*MODULES)
    checkpoint = Path(cfg.out, "ckpt.pt")
    if processes.main and saved is None:
        checkpoint.unlink(missing_ok=True)                                  # an earlier run's: this run replaces it
    del saved
    if run.compiling(cfg, device):
        run.compile_blocks(model.blocks)
        if teacher is not None:
            run.compile_blocks(teacher.blocks)
    net = processes.wrap(model)                                             # what the loop calls

    # this process's rows of every global batch
    per_process = cfg.batch_size // world
    part = per_process // cfg.accumulate
    mine = slice(processes.rank * per_process, (processes.rank + 1) * per_process)
    shape = (cfg.batch_size, *images.shape)
    feed = data.batches(images.train, cfg.seed, start, cfg.batch_size, mine, device,
                        wanted=lambda step: step < tau,                     # only the teacher looks at packed images
                        draw=lambda step: random_numbers(cfg, step, shape, packed))

    bad = torch.full((), -1, device=device)                                 # the first step that was not finite
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    processes.print(f"{cfg.model}, {millions:.1f} M parameters, {model.grid} x {model.grid} "
                    f"tokens; align {cfg.align}; {world} process(es) on {device.type}, "
                    f"{run.precision(cfg.precision, device)}")
    if teacher is not None:
        align.announce(cfg, teacher, tau, model.encoder_depth, pairs, processes)

    for step in range(start, cfg.steps):
        done = step + 1
        evaluating = run.due(done, cfg.eval_every, cfg.steps)
        logging = evaluating or run.due(done, cfg.log_every, cfg.steps)
        extra = {}                                                          # numbers that make any step a logged one

        # 1. learning rate, and termination: from step tau on, teacher and projector are gone
        lr = cfg.lr * min(1, done / max(1, cfg.warmup))
        if (teacher is not None and cfg.stop == "auto" and step >= cfg.stop_warmup
                and step % cfg.stop_interval == 0):
            cosine = held_cosine(model, teacher, images, condition, pairs, cfg, processes,
                                 autocast)
            extra["grad_cosine"] = cosine
            logging = True
            if cosine < cfg.stop_threshold:
                tau = step
        if model.projectors is not None and step >= tau:                    # also on a resume from exactly tau
            # the last references to teacher and projector: their memory is free
            teacher = targets = total = terms = value = group = weights = net = None
            kept = drop_projector(model, ema, opt)
            gc.collect()                                                    # compiled modules and DDP form cycles
            if device.type == "cuda":
                torch.cuda.empty_cache()
            net = processes.wrap(model)
            processes.print(f"step {step}: alignment ends, teacher and projector are gone")

        # 2. batch: drawn for all processes together, then sliced: their number does not matter
        with run.one_line_errors(PROGRAM):                                  # reading may fail: a damaged image
            pixels, moments, y, numbers = next(feed)
        eps, t, dropped, mirrored, posterior, other = numbers
        pixels = data.mirror(pixels, mirrored)                              # [b,C,H,W] uint8, or None
        y = condition(y, dropped)                                           # dropped: for classifier-free guidance
        if packed:
            x = data.to_latents(moments, mirrored, posterior, packed["scale"])              # [b,C,h,w]
        else:
            x = data.to_pixels(pixels)
        velocities = None
        if cfg.contrastive:
            velocities = processes.gather(sit.interpolant(x, eps, t)[1])    # [B,C,h,w]

        # 3. forward and backward, in `accumulate` parts
        sums = {}
        for i in range(0, per_process, part):
            rows = slice(i, i + part)
            targets = negatives = None
            if teacher is not None:
                targets = align.teacher_targets(teacher, pixels[rows], pairs, autocast)
            if cfg.contrastive:
                negatives = velocities, other[rows]
            last_part = i + part == per_process
            sync = nullcontext() if world == 1 or last_part else net.no_sync()              # once a step is enough
            with sync:
                with autocast:
                    total, terms = losses(net, x[rows], y[rows], t[rows], eps[rows], targets,
                                          pairs, cfg, logging, negatives)
                (total / cfg.accumulate).backward()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.detach() / cfg.accumulate

        # 4. optimizer and moving average
        for group in opt.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        opt.step()
        opt.zero_grad()
        weights = [p.detach() for p in model.parameters()]
        torch._foreach_lerp_(list(ema.parameters()), weights, 1 - cfg.ema)

        # 5. log, sample, save: the host waits for the device here only. The first step that is not
        # finite is noted on the device, so that looking for it costs nothing.
        bad = torch.where((bad < 0) & ~(norm + sums["loss"]).isfinite(), step, bad)
        stopping = stop.agreed()
        evaluating = evaluating and (done == cfg.steps or not stopping)     # who stops a run may not wait for long
        saving = stopping or done == cfg.steps or run.due(done, cfg.save_every, cfg.steps)
        if not (logging or saving):
            continue
        run.refuse_nonfinite(processes.max(bad), last_good)                 # no checkpoint is written after one
        means = processes.mean(torch.stack([*sums.values(), norm])).tolist()
        row = {"step": done, **dict(zip([*sums, "grad_norm"], means)), "lr": lr, **clock.read(done),
               **extra}
        if evaluating:
            row.update(evaluate.evaluate_sit(ema, condition, prompts, contrast, decode, reference,
                                             cfg, processes, autocast))
        if logging:
            picture = Path(cfg.out, "samples.png") if evaluating else None
            log.write(row, clock.left(done), picture)
        if saving and processes.main:
            run.save_checkpoint(checkpoint, {
                "model": {**model.state_dict(), **kept["model"]},
                "ema": {**ema.state_dict(), **kept["ema"]}, "opt": opt.state_dict(),
                "args": dataclasses.asdict(cfg), "arch": arch, "steps": done, "tau": tau,
                "seconds": clock.seconds, "code": code, "packed_from": packed,
                "text": images.text, "contrast": contrast})
        if saving:
            last_good = checkpoint
        if stopping:
            processes.print(f"stopped by a signal after step {done}, saved {checkpoint}: the same "
                            f"command resumes")
            break
        clock.restart(done)

    feed.close()
    if processes.main:
        rows = run.read_log(log.path)
        if rows:                                                            # none if a signal came very early
            advice = f"python sample.py --ckpt {checkpoint} --cfg 1.5   draws more samples"
            if cfg.align != "none":
                advice += f"; with --align none --out {cfg.out}/plain it has no teacher"
            evaluate.plot_curves(rows, Path(cfg.out, "curves.png"), tau)
            evaluate.print_summary(rows, cfg.out, advice)


def main(argv=None):
    cfg = run.parse(Config, argv, PROGRAM, "Train SiT, DiT or MM-DiT: alone, REPA, or HASTE.",
                    PRESETS)
    with run.one_line_errors(PROGRAM):
        processes = ddp.Processes(cfg.device)
    try:
        # OSError: a disk may be full in mid-run
        with (ddp.StopSignal(processes) as stop, run.one_line_errors(PROGRAM, OSError),
              run.one_line_out_of_memory(PROGRAM, run.memory_remedy(cfg, processes.world))):
            train(cfg, processes, stop)
    finally:
        processes.close()


if __name__ == "__main__":
    main()
