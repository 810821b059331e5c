"""Train xAR: next-X prediction with noisy context, alone or with a teacher first.

    python xar_train.py                                 next-cell on digits, two minutes on a CPU
    python xar_train.py --entity scale --out out/scale  coarse to fine
    python xar_train.py --align haste --out out/guided  a teacher guides 500 steps
    torchrun --nproc_per_node=8 xar_train.py --preset imagenet256-b --data PACKED

Papers: xAR (Ren et al. 2025, arXiv 2502.20388), HASTE (Wang et al. 2025, 2505.16792); aligning xAR
is ours. Time runs from t = 0 (data) to t = 1 (noise), for each entity its own. Step n = 0, 1, ...
minimises, over all entities X with their noise,

    n <  tau    E|v - (eps - X)|^2  +  w_f feature alignment  +  w_a attention alignment
    n >= tau    E|v - (eps - X)|^2      XAR.loss: teacher and projector are gone

Attention is compared over the keys that the student may see: its own and earlier entities'.

What is random in step n is drawn for the whole batch from (seed, n), then sliced. So results do not
depend on the number of processes, up to rounding, and a resumed run is the straight one.
Dropout is each process's own, seeded by (seed, n, rank).

Read `losses`, then the loop in `train`; it is haste_train.py's. The alignment ends in its phase 1.
Letters: B batch (b of one process), C channels, h w height and width, L tokens, M entities.
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
import data
import ddp
import evaluate
import haste
import models
import run
import teacher as teachers
import vae
import xar
from haste import (attention_alignment, attention_alignment_grad, feature_alignment,
                   gradient_cosine, mean_over_pairs)
from models import PROJECTOR

PROGRAM = "xar_train.py"


@dataclass
class Config:
    # what to train on
    data: str = "digits"  # digits, clutter, cifar10, mnist, fashionmnist, class folders, or one of prepare.py
    image_size: Optional[int] = None  # side to which a folder's images are cropped; photographs need it
    data_root: str = "out/data"  # where torchvision's sets are kept once downloaded
    mirror: bool = False  # mirror half of the images at random
    latent_channels: Optional[int] = None  # channels that packed latents must have: 16 of KL-16; None is any
    vae: Optional[str] = None  # decoder for samples of packed data: sd-ema, sd-mse or a file; None is the data's own
    # the model
    model: str = "xAR-Ti"  # a size of xar.XAR_CONFIGS: xAR-Ti, B, L or H
    depth: Optional[int] = None  # number of blocks, half encoder and half decoder, if not the size's own
    hidden_size: Optional[int] = None  # width, if not the size's own
    num_heads: Optional[int] = None  # attention heads, if not the size's own
    init: Optional[str] = None  # start from the weights of this checkpoint (a file, or xar-b, -l, -h), fresh optimizer
    entity: str = "cell:4"  # what X is: patch, cell:k, subsample:s, scale or image
    context: Literal["random", "increasing", "decreasing", "clean"] = "random"  # noise of the entities along the order
    dropout: float = 0.0  # dropout after attention and MLP; the paper's is 0.1
    attn_dropout: float = 0.0  # dropout of attention; the paper's is 0.1
    label_drop: float = 0.1  # share of samples trained without their label, for classifier-free guidance
    # the alignment with a teacher
    align: Literal["none", "repa", "haste"] = "none"  # no alignment, of features, of features and attention
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
    feature_depth: Optional[int] = None  # encoder blocks below the projector, if not the table's
    pairs: Optional[str] = None  # blocks student:teacher whose attention is aligned, as 4:8,5:9, if not the table's
    projector_dim: int = 256  # width of the projector
    # optimisation
    steps: int = 1000  # optimizer steps
    batch_size: int = 32  # images a step, over all processes
    accumulate: int = 1  # parts into which a process cuts its batch, to save memory
    lr: float = 4e-3  # learning rate of AdamW
    warmup: float = 0.125  # share of the steps in which the learning rate rises
    decay: float = 0.25  # share of the steps, the last ones, in which it falls along a cosine
    lr_end: float = 1e-4  # where it ends; the paper's goes from 4e-4 to 1e-5
    beta2: float = 0.96  # second-moment decay of AdamW
    weight_decay: float = 0.02  # weight decay of AdamW, on tensors of two or more dimensions
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.98  # decay of the averaged weights, the ones that are sampled
    # the machine
    device: str = "auto"  # auto, cpu, cuda, cuda:N, or mps of a Mac
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on CUDA, else fp32; on CUDA, fp32 means TF32
    compile: Optional[bool] = False  # torch.compile the blocks; None (the presets for GPUs) means: on CUDA
    # the run
    seed: int = 0  # of everything random
    out: str = "out/xar"  # folder for log.jsonl, ckpt.pt, samples.png, growth.png and, in the end, curves.png
    resume: str = "auto"  # auto (resume from OUT/ckpt.pt if it exists), never (start over), or a checkpoint's path
    track: Literal["none", "tensorboard", "wandb"] = "none"  # where else to send the log and the sample sheet
    log_every: int = 20  # steps between two lines of the log
    save_every: int = 500  # steps between two checkpoints; 0 saves at the end only
    eval_every: int = 500  # steps between two evaluations; 0 never evaluates
    eval_samples: int = 500  # images drawn for an evaluation
    eval_steps: int = 20  # sampling steps of each entity in an evaluation
    eval_cfg: float = 1.0  # classifier-free guidance scale of an evaluation; 1 is none
    eval_features: Literal["pixels", "inception"] = "pixels"  # inception: also FID of the samples, on photographs
    eval_weights: Optional[str] = None  # file with Inception's weights; if not given, they are fetched


MAY_CHANGE_ON_RESUME = ("steps", "out", "device", "resume", "track", "log_every", "save_every",
                        "eval_every", "cache", "data_root", "accumulate", "compile", "vae",
                        "eval_features", "eval_weights")

# ImageNet, packed with KL-16 and mirror images: the paper's 800 epochs of 1,281,167 images.
IMAGENET = dict(data="out/imagenet256-kl16", image_size=256, latent_channels=16, mirror=True,
                entity="cell:8", dropout=0.1, attn_dropout=0.1, steps=500_456, batch_size=2048,
                lr=4e-4, lr_end=1e-5, ema=0.9999, compile=None, log_every=100, save_every=5000,
                eval_every=25_000, eval_samples=1000, eval_steps=40)
PRESETS = {
    "digits": dict(),
    # CIFAR-10 at 32 x 32 pixels, 1,024 tokens in 16 cells, for one GPU
    "cifar10": dict(data="cifar10", mirror=True, hidden_size=384, depth=12, num_heads=6,
                    entity="cell:8", dropout=0.1, attn_dropout=0.1, steps=50_000, batch_size=256,
                    accumulate=8, lr=4e-4, lr_end=1e-5, ema=0.9995, compile=None, log_every=100,
                    save_every=5000, eval_every=5000, eval_samples=2000, eval_steps=40),
    "imagenet256-b": dict(IMAGENET, model="xAR-B"),  # FID 1.72 with 40 steps, guidance 2.7
    # ours: a quarter is aligned, as SiT-B
    "imagenet256-b-haste": dict(IMAGENET, model="xAR-B", align="haste", teacher="dinov2_vitb14",
                                feature_weight=0.5, attention_weight=0.5, projector_dim=2048,
                                stop="125114"),
    "imagenet256-l": dict(IMAGENET, model="xAR-L", accumulate=4),  # 1.28 with 50 steps, 2.3
    "imagenet256-h": dict(IMAGENET, model="xAR-H", accumulate=8),  # 1.24 with 50 steps, 2.2
}


# ---- the loss of a step

def losses(model, net, x, y, t, eps, targets, pairs, cfg, exact=False):
    """Return the total loss of a batch, and its terms for the log ("loss" is the flow loss alone).

    x [B,C,h,w] clean, y [B], t [B,M], eps [B,L,C]; targets: what the teacher returns, None from tau
    on. `net` is the model, or DDP's wrapper. With `exact`, the terms include the true value of the
    attention loss.
    """
    if targets is None:
        flow = model.loss(x, y, t, eps, context=cfg.context, net=net)  # from tau on: nothing else
        return flow, {"loss": flow}

    x_t, t, v, clean = model.noised(x, t, eps, cfg.context)
    v_hat, z, taps_s = net(x_t, t, y, clean, [i for i, _ in pairs])
    loss = (v_hat - v).square().mean()
    tokens, taps_t, mask = align.in_entity_order(model, targets, clean)
    terms = {"loss": loss, "feature_loss": feature_alignment(z, tokens)}
    total = loss + cfg.feature_weight * terms["feature_loss"]
    if pairs:
        attention = mean_over_pairs(attention_alignment_grad, taps_s, taps_t, mask=mask)
        total = total + cfg.attention_weight * attention
    if pairs and exact:
        with torch.no_grad():
            terms["attention_loss"] = mean_over_pairs(attention_alignment, taps_s, taps_t,
                                                      mask=mask)
    return total, terms


# ---- what else a step needs

def learning_rate(cfg, step):
    """Return the learning rate of a step; warm-up and decay are shares of --steps."""
    done = (step + 1) / cfg.steps  # share of the run, in (0, 1]
    if done < cfg.warmup:  # 1) linear warm-up
        return done / cfg.warmup * cfg.lr
    if done <= 1 - cfg.decay:  # 2) constant
        return cfg.lr
    falling = (done - (1 - cfg.decay)) / cfg.decay  # 3) cosine, 0 ... 1
    return cfg.lr_end + (cfg.lr - cfg.lr_end) * (1 + math.cos(math.pi * falling)) / 2


def random_numbers(cfg, step, model, packed):
    """Draw every random number of a step but dropout, for the whole global batch, on the CPU.

    Returns eps [B,L,C], t [B,M], dropped [B], mirrored [B], and the noise of the autoencoder's
    posterior [B,C,h,w], which is empty if the data is not packed.
    """
    g = run.seeded("cpu", cfg.seed, 0, step)
    B = cfg.batch_size
    eps = torch.randn(B, sum(model.sizes), model.channels, generator=g)
    t = torch.randn(B, len(model.sizes), generator=g).sigmoid()
    dropped, mirrored = torch.rand(2, B, generator=g)
    mirror_share = 0.5 if cfg.mirror else 0
    posterior_shape = (model.channels, model.grid, model.grid) if packed else (0,)
    posterior = torch.randn(B, *posterior_shape, generator=g)
    return eps, t, dropped < cfg.label_drop, mirrored < mirror_share, posterior


# ---- termination

def drop_projector(model, opt):
    """Remove the projector from model, optimizer and device; return its last weights, on the CPU.

    The optimizer state of all other parameters stays as it is, bit for bit.
    """
    opt.zero_grad()
    for group in opt.param_groups[2:]:  # the projector's
        for p in group["params"]:
            opt.state.pop(p, None)
    del opt.param_groups[2:]
    kept = {name: w.cpu() for name, w in weights_of(model)["projector"].items()}
    model.projector = None
    return kept


def weights_of(model, kept=None):
    """Return a checkpoint's "model", in the official layout, and its "projector"."""
    weights = model.state_dict()
    projector = {name: weights.pop(name) for name in list(weights) if name.startswith(PROJECTOR)}
    return {"model": weights, "projector": projector or kept}


def held_cosine(model, teacher, images, pairs, cfg, processes, autocast):
    """Return haste.gradient_cosine on the held batch, with one t for all entities."""
    shape = (sum(model.sizes), model.channels)
    pixels, x, y, eps = align.held_batch(cfg, images, shape, processes.device)

    def losses_at(time):
        t = torch.full((len(x), len(model.sizes)), time, device=x.device)
        total, terms = losses(model, model, x, y, t, eps, targets, pairs, cfg)
        return terms["loss"], total - terms["loss"]

    block = model.encoder_blocks[model.feature_depth - 1]  # the one below the projector
    model.eval()  # no dropout
    with torch.compiler.set_stance("force_eager"):  # a batch of another size: not compiled
        targets = align.teacher_targets(teacher, pixels, pairs, autocast)
        with autocast:
            cosine = gradient_cosine(losses_at, block.parameters())
    model.train()
    return processes.mean(cosine).item()  # so that all processes decide alike


# ---- from flags to objects: bad input is refused here, with one line

def check(cfg, world):
    """Refuse impossible values before anything is loaded; return the sizes, as XAR's arguments."""
    run.check(cfg, world, ("stop_interval", "teacher_steps", "projector_dim"),
              ("stop_warmup", "feature_weight", "attention_weight", "lr_end"))
    align.check(cfg)
    for name in ("dropout", "attn_dropout", "warmup", "decay"):
        run.require(cfg, 0 <= getattr(cfg, name) < 1, name, "must lie in [0, 1)")
    run.require(cfg, cfg.warmup + cfg.decay <= 1, "warmup",
                f"must leave room for --decay {cfg.decay}: both are shares of --steps")
    run.require(cfg, cfg.model in xar.XAR_CONFIGS, "model",
                f"is none of {', '.join(xar.XAR_CONFIGS)}")
    run.require(cfg, cfg.depth is None or cfg.depth % 2 == 0, "depth",
                "must be even: half encoder, half decoder")
    sizes = dict(xar.XAR_CONFIGS[cfg.model])
    if cfg.depth:
        sizes.update(encoder_depth=cfg.depth // 2, decoder_depth=cfg.depth // 2)
    sizes.update(dim=cfg.hidden_size or sizes["dim"],
                 num_heads=cfg.num_heads or sizes["num_heads"])
    if sizes["dim"] % (4 * sizes["num_heads"]):
        raise ValueError(f"--hidden-size {sizes['dim']} must be a multiple of 4 x --num-heads "
                         f"{sizes['num_heads']}")
    if cfg.entity == "scale":
        run.refuse_changed(cfg, ("pairs",), "is not for --entity scale: leave it out")
    if cfg.align != "none":
        choose_layers(cfg, sizes)  # raises if the flags are impossible
    return sizes


def choose_layers(cfg, sizes, teacher_depth=None):
    """Return the feature depth and the pairs: none for a pyramid."""
    encoder = sizes["encoder_depth"]
    depth = encoder + sizes["decoder_depth"]
    return align.choose_layers(cfg, depth, encoder, teacher_depth, cfg.entity == "scale")


def build(cfg, sizes, saved, aligned, processes):
    """Return the data, teacher and layer pairs (if `aligned`), the model, and its arguments."""
    images = data.open_alike(cfg, processes)
    channels, side, _ = images.shape
    run.require(cfg, images.text is None, "data",
                "has captions, and xAR takes class labels: choose another")
    images.check(cfg, saved, grid=side, channels=channels)
    try:
        xar.entities(cfg.entity, side)
    except ValueError as e:  # "entity cell:3 does not divide ..."
        raise ValueError(f"--{e}") from None
    initial = None
    arch = dict(sizes, grid=side, channels=channels, entity=cfg.entity,
                num_classes=len(images.classes), dropout=cfg.dropout, attn_dropout=cfg.attn_dropout)
    if saved:
        arch = saved["arch"]
    elif cfg.init:
        initial = processes.main_first(lambda: xar.load_xar(run.checkpoint_file(cfg.init, "init"),
                                                            cfg.num_heads))
        run.require(cfg, initial.entity == cfg.entity, "init",
                    f"was trained with --entity {initial.entity}: give the same")
        arch.update(quantize_t=initial.time_embed.quantize)
    teacher = None
    pairs = []
    if aligned:
        teacher = align.make_teacher(cfg, images, side, processes)
        feature_depth, pairs = choose_layers(cfg, sizes, teacher.depth)
        arch.update(z_dim=teacher.embed_dim, projector_dim=cfg.projector_dim,
                    feature_depth=feature_depth)

    torch.manual_seed(cfg.seed)
    model = xar.XAR(**arch)
    if initial is not None:
        models.load_initial(model, initial, cfg)
    return images, teacher, pairs, model.to(processes.device), arch


def training_state(cfg, model, saved):
    """Return the model's average (EMA), its optimizer, and a dropped projector's last weights.

    The average has no projector; the optimizer has its two groups at the end, for `drop_projector`.
    With `saved`, a checkpoint's content, all are as they were.
    """
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    ema.projector = None
    parts = [[p for name, p in model.named_parameters() if not name.startswith(PROJECTOR)]]
    if model.projector is not None:
        parts.append(list(model.projector.parameters()))
    groups = []
    for part in parts:
        matrices = [p for p in part if p.ndim >= 2]
        vectors = [p for p in part if p.ndim < 2]
        groups += [dict(params=matrices, weight_decay=cfg.weight_decay),
                   dict(params=vectors, weight_decay=0.0)]
    opt = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    kept = {}
    if saved:
        model.load_state_dict({**saved["model"], **saved.get("projector", {})})
        ema.load_state_dict(saved["ema"])
        if len(saved["opt"]["param_groups"]) < len(groups):  # saved after the alignment had ended
            kept = drop_projector(model, opt)
        opt.load_state_dict(saved["opt"])
    return ema, opt, kept


# ---- the program

# changes of their code are reported on resume
MODULES = (sys.modules[__name__], xar, haste, teachers, align, data, data.clutter, run)


def train(cfg, processes, stop):
    """Train until --steps or a signal, from scratch or from where the last run stopped."""
    with run.one_line_errors(PROGRAM):
        sizes = check(cfg, processes.world)
        saved, last_good = run.resume_point(cfg, MAY_CHANGE_ON_RESUME, MODULES, processes)
        if saved and saved["steps"] >= cfg.steps:
            return
        run.make_folder(cfg.out, cfg.out)
        inception = processes.on_main(lambda: evaluate.load_inception(cfg, processes.device))
        start = saved["steps"] if saved else 0
        tau = saved.get("tau", 0) if saved else align.first_free_step(cfg)  # older ones had no teacher
        images, teacher, pairs, model, arch = build(cfg, sizes, saved, start < tau, processes)
        ema, opt, kept = training_state(cfg, model, saved)
        packed = images.packed  # None, or what data.json says
        decode = reference = None
        if cfg.eval_every:
            decode = processes.main_first(
                lambda: vae.load_decoder(packed, cfg.vae, model.channels, processes.device))
            reference = processes.on_main(lambda: evaluate.reference(images, inception, cfg.cache))
        log = run.Log(cfg, start, processes)
    if saved and saved["args"]["steps"] != cfg.steps:
        processes.print(f"note: --steps was {saved['args']['steps']}; warm-up and decay are shares "
                        f"of it, so the learning rate continues at "
                        f"{learning_rate(cfg, start):.3g}")

    device = processes.device
    world = processes.world
    autocast = run.autocast(cfg.precision, device)
    seconds = saved["seconds"] if saved else 0.0
    clock = run.Clock(cfg, start, seconds)
    code = run.code_hash(*MODULES)
    checkpoint = Path(cfg.out, "ckpt.pt")
    if processes.main and saved is None:
        checkpoint.unlink(missing_ok=True)  # an earlier run's: this run replaces it
    del saved
    if run.compiling(cfg, device):
        run.compile_blocks([*model.encoder_blocks, *model.decoder_blocks])
        if teacher is not None:
            run.compile_blocks(teacher.blocks)
    M = len(model.sizes)
    guided = cfg.align == "haste" and M > 1  # also after tau: a resumed run is the same
    if guided or cfg.context == "clean" or xar.needs_mask(M, sum(model.sizes)):
        # with a mask, cuDNN's attention may have gradients that are not finite (pytorch#196678)
        torch.backends.cuda.enable_cudnn_sdp(False)
    net = processes.wrap(model)  # what the loss calls

    # this process's rows of every global batch
    per_process = cfg.batch_size // world
    part = per_process // cfg.accumulate
    mine = slice(processes.rank * per_process, (processes.rank + 1) * per_process)
    feed = data.batches(images.train, cfg.seed, start, cfg.batch_size, mine, device,
                        wanted=lambda step: step < tau,  # only the teacher looks at packed images
                        draw=lambda step: random_numbers(cfg, step, model, packed))

    bad = torch.full((), -1, device=device)  # the first step that was not finite
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    processes.print(f"{cfg.model}, {millions:.1f} M parameters; {M} entities ({model.entity}) of "
                    f"{sum(model.sizes)} tokens, {cfg.context} context; align {cfg.align}; "
                    f"{world} process(es) on {device.type}, {run.precision(cfg.precision, device)}")
    if teacher is not None:
        align.announce(cfg, teacher, tau, model.feature_depth, pairs, processes)

    for step in range(start, cfg.steps):
        done = step + 1
        evaluating = run.due(done, cfg.eval_every, cfg.steps)
        logging = evaluating or run.due(done, cfg.log_every, cfg.steps)
        extra = {}  # numbers that make any step a logged one

        # 1. learning rate, and termination: from step tau on, teacher and projector are gone
        lr = learning_rate(cfg, step)
        if (teacher is not None and cfg.stop == "auto" and step >= cfg.stop_warmup
                and step % cfg.stop_interval == 0):
            cosine = held_cosine(model, teacher, images, pairs, cfg, processes, autocast)
            extra["grad_cosine"] = cosine
            logging = True
            if cosine < cfg.stop_threshold:
                tau = step
        if model.projector is not None and step >= tau:  # also on a resume from exactly tau
            # the last references to teacher and projector: their memory is free
            teacher = targets = total = terms = value = group = weights = net = None
            kept = drop_projector(model, opt)
            gc.collect()  # compiled modules and DDP form cycles
            if device.type == "cuda":
                torch.cuda.empty_cache()
            net = processes.wrap(model)
            processes.print(f"step {step}: alignment ends, teacher and projector are gone")

        # 2. batch: drawn for all processes together, then sliced: their number does not matter
        with run.one_line_errors(PROGRAM):  # reading may fail: a damaged image
            pixels, moments, y, numbers = next(feed)
        eps, t, dropped, mirrored, posterior = numbers
        y = torch.where(dropped, model.num_classes, y)  # no label: for classifier-free guidance
        pixels = data.mirror(pixels, mirrored)  # [b,C,H,W] uint8, or None
        if packed:
            x = data.to_latents(moments, mirrored, posterior, packed["scale"])  # [b,C,h,w]
        else:
            x = data.to_pixels(pixels)

        # 3. forward and backward, in `accumulate` parts
        torch.manual_seed(run.seeded("cpu", cfg.seed, 1, step, processes.rank).initial_seed())  # dropout's
        sums = {}
        for i in range(0, per_process, part):
            rows = slice(i, i + part)
            targets = None
            if teacher is not None:
                targets = align.teacher_targets(teacher, pixels[rows], pairs, autocast)
            last_part = i + part == per_process
            sync = nullcontext() if world == 1 or last_part else net.no_sync()  # once a step is enough
            with sync:
                with autocast:
                    total, terms = losses(model, net, x[rows], y[rows], t[rows], eps[rows],
                                          targets, pairs, cfg, logging)
                (total / cfg.accumulate).backward()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.detach() / cfg.accumulate

        # 4. optimizer and moving average
        for group in opt.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        opt.step()
        opt.zero_grad()
        averages = list(ema.parameters())
        weights = [p.detach() for p in model.parameters()][:len(averages)]  # without the projector's
        torch._foreach_lerp_(averages, weights, 1 - cfg.ema)

        # 5. log, sample, save: the host waits for the device here only. The first step that is not
        # finite is noted on the device, so that looking for it costs nothing.
        bad = torch.where((bad < 0) & ~(norm + sums["loss"]).isfinite(), step, bad)
        stopping = stop.agreed()
        evaluating = evaluating and (done == cfg.steps or not stopping)  # who stops a run may not wait for long
        saving = stopping or done == cfg.steps or run.due(done, cfg.save_every, cfg.steps)
        if not (logging or saving):
            continue
        run.refuse_nonfinite(processes.max(bad), last_good)  # no checkpoint is written after one
        means = processes.mean(torch.stack([*sums.values(), norm])).tolist()
        row = {"step": done, **dict(zip([*sums, "grad_norm"], means)), "lr": lr, **clock.read(done),
               **extra}
        if evaluating:
            row.update(evaluate.evaluate_xar(ema, decode, reference, cfg, processes, autocast))
        if logging:
            picture = Path(cfg.out, "samples.png") if evaluating else None
            log.write(row, clock.left(done), picture)
        if saving and processes.main:
            run.save_checkpoint(checkpoint, {
                **weights_of(model, kept), "ema": ema.state_dict(), "opt": opt.state_dict(),
                "args": dataclasses.asdict(cfg), "arch": arch, "steps": done, "tau": tau,
                "seconds": clock.seconds, "code": code, "packed_from": packed})
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
        if rows:  # none if a signal came very early
            advice = f"python sample.py --ckpt {checkpoint} --cfg 1.5   draws more samples"
            evaluate.plot_curves(rows, Path(cfg.out, "curves.png"), tau)
            evaluate.print_summary(rows, cfg.out, advice)


def main(argv=None):
    cfg = run.parse(Config, argv, PROGRAM, "Train xAR, alone or with a teacher.", PRESETS)
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
