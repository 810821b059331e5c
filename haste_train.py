"""Train SiT plainly, with REPA, or with HASTE: guided by a frozen teacher first, set free by early termination.

    python haste_train.py                                   HASTE on digits, under four minutes on two CPU cores
    torchrun --nproc_per_node=8 haste_train.py --preset imagenet256-xl --data PACKED        one process a GPU

Papers: HASTE (Wang et al. 2025, arXiv 2505.16792), REPA (Yu et al. 2025, 2410.06940), SiT (Ma et al. 2024, 2401.08740).
Time runs from t = 0 (data) to t = 1 (noise). Step n = 0, 1, ... minimises
    n <  tau    E|v(x_t, t, y) - v|^2  +  w_f E[-cos(projector(h), y_teacher)]  +  w_a E[CE(A_teacher, A_student)]
    n >= tau    E|v(x_t, t, y) - v|^2            teacher and projector are gone

Everything random in step n is drawn for the whole batch from one generator seeded by (seed, n) and then sliced: results
do not depend on the number of processes, and a resume needs only the step. The same command resumes.

Letters: B batch, C channels, h w height and width, N tokens, D width, H heads, d = D/H.
"""
import math
import re
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal, Optional

import torch
import torch.nn.functional as F

import data as data_module
import evaluate
import run
import sit
import teacher as teacher_module
from data import to_latents, to_pixels, to_rgb, to_uint8


@dataclass
class Config:
    # what to train on
    data: str = "digits"  # digits, cifar10, mnist, fashionmnist, a folder of class folders, or of data.py prepare
    image_size: Optional[int] = None  # side to which a folder's images are cropped; needed for photographs
    data_root: str = "out/data"  # where torchvision's sets are kept once downloaded
    mirror: bool = False  # mirror half of the images at random
    latent_channels: Optional[int] = None  # channels that packed latents must have: 4 of SD, 16 of KL-16; None is any
    vae: Optional[str] = None  # decoder of packed data's samples, sd-ema, sd-mse or a file; None is the data's own
    # the model
    model: str = "SiT-Ti/2"  # a size of sit.SIT_CONFIGS: SiT-Ti, S, B, L or XL, with patch 1, 2, 4 or 8
    depth: Optional[int] = None  # number of blocks, where it is not the size's own
    hidden_size: Optional[int] = None  # width, where it is not the size's own
    num_heads: Optional[int] = None  # attention heads, where they are not the size's own
    qk_norm: bool = False  # normalise queries and keys
    # the guidance
    align: Literal["none", "repa", "haste"] = "haste"  # plain, feature alignment, feature and attention alignment
    stop: str = "500"  # guidance ends at this step, at a step found by gradient angle (auto), or never
    stop_interval: int = 50  # with --stop auto: steps between two looks at the angle
    stop_warmup: int = 100  # with --stop auto: steps before the first look
    stop_threshold: float = -0.05  # with --stop auto: guidance ends when the mean cosine falls below this
    teacher: str = "small"  # small (trained here, cached), or dinov2_vits14, vitb14, vitl14, vitg14, each also _reg
    teacher_weights: Optional[str] = None  # file with the teacher's weights; fetched when not given
    teacher_steps: int = 300  # training steps of the small teacher
    cache: str = "out/cache"  # where small teachers are kept
    feature_weight: float = 1.0  # weight of feature alignment; the papers' is 0.5
    attention_weight: float = 1.0  # weight of attention alignment; the papers' is 0.5
    feature_depth: Optional[int] = None  # blocks before the projector, where it is not the table's
    pairs: Optional[str] = None  # blocks student:teacher whose attention is aligned, as 4:8,5:9, where not the table's
    projector_dim: int = 256  # width of the projector
    # the flow
    path: Literal["linear", "cosine"] = "linear"  # path from data to noise
    time: Literal["uniform", "lognormal"] = "uniform"  # distribution of training times
    label_drop: float = 0.1  # share of samples trained without label, for guidance
    # optimisation
    steps: int = 1000  # optimizer steps
    batch_size: int = 64  # images a step, over all processes
    accumulate: int = 1  # parts into which a process cuts its batch
    lr: float = 4e-3  # learning rate of AdamW
    warmup: int = 100  # steps of linear warm-up
    beta2: float = 0.999  # second-moment decay of AdamW
    weight_decay: float = 0.0  # weight decay of AdamW
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.98  # decay of the averaged weights, the ones that are sampled
    # the machine
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto is bf16 on CUDA, fp32 on CPU
    compile: bool = False  # torch.compile the model
    # the run
    seed: int = 0  # of everything random
    out: str = "out"  # folder for log.jsonl, ckpt.pt, samples.png, curves.png
    resume: str = "auto"  # auto (go on from OUT/ckpt.pt), never (start anew), or a checkpoint's path
    log_every: int = 20  # steps between two lines of the log
    save_every: int = 250  # steps between two checkpoints; 0 saves at the end only
    eval_every: int = 250  # steps between two evaluations; 0 evaluates never
    eval_samples: int = 500  # images drawn for an evaluation
    eval_steps: int = 20  # sampling steps of an evaluation (Euler)
    eval_cfg: float = 1.0  # guidance scale of an evaluation


FREE = ("steps", "out", "device", "resume", "log_every", "save_every", "eval_every", "cache", "data_root", "accumulate",
        "vae")
# ImageNet, packed: the papers' settings, which are the same for all sizes
IMAGENET = dict(data="out/imagenet256", image_size=256, latent_channels=4, teacher="dinov2_vitb14", feature_weight=0.5,
                attention_weight=0.5, projector_dim=2048, batch_size=256, lr=1e-4, warmup=0, ema=0.9999, log_every=100,
                save_every=10_000, eval_every=50_000, eval_samples=1000, eval_steps=50)
PRESETS = {
    "digits": dict(),
    # CIFAR-10 at 32 x 32 pixels, 256 tokens, for one GPU
    "cifar10": dict(data="cifar10", mirror=True, model="SiT-S/2", teacher_steps=3000, feature_weight=0.5,
                    attention_weight=0.5, projector_dim=2048, stop="20000", steps=50_000, batch_size=256, lr=3e-4,
                    warmup=1000, ema=0.9995, log_every=100, save_every=5000, eval_every=5000, eval_samples=2000,
                    eval_steps=50),
    "imagenet256-b": dict(IMAGENET, model="SiT-B/2", stop="100000", steps=400_000),
    "imagenet256-l": dict(IMAGENET, model="SiT-L/2", stop="250000", steps=400_000),
    "imagenet256-xl": dict(IMAGENET, model="SiT-XL/2", stop="250000", steps=500_000),       # 100 epochs: FID 5.3
    "imagenet256-xl-repa": dict(IMAGENET, model="SiT-XL/2", align="repa", stop="never", steps=4_000_000),       # 5.9
    "imagenet256-xl-plain": dict(IMAGENET, model="SiT-XL/2", align="none", steps=7_000_000),                    # 8.3
    "imagenet512-xl": dict(IMAGENET, data="out/imagenet512", image_size=512, model="SiT-XL/2", stop="300000",
                           steps=500_000),                                  # 1,024 tokens, teacher at 448 pixels
}

# HASTE's layer map: feature depth, feature depth of REPA alone, and student <- teacher pairs,
# all for a teacher of 12 blocks; other depths are mapped in proportion. S and Ti are ours.
ALIGNMENT = {
    "SiT-Ti": (3, 3, ((0, 7), (1, 9), (2, 11))),
    "SiT-S": (5, 4, ((2, 7), (3, 9), (4, 11))),
    "SiT-B": (5, 4, ((2, 7), (3, 9), (4, 11))),
    "SiT-L": (8, 8, ((4, 8), (5, 9), (6, 10), (7, 11))),
    "SiT-XL": (8, 8, ((4, 8), (5, 9), (6, 10), (7, 11))),
}
TABLE_DEPTH = 12


# ---- losses

def feature_alignment(z, target):
    """REPA's loss: minus the mean cosine of projected student tokens z and teacher tokens, both [B,N,D]; in [-1, 1]."""
    z, target = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (z, target))
    return -F.cosine_similarity(z, target, dim=-1).mean()


def attention_alignment(q_s, k_s, q_t, k_t):
    """HASTE's attention loss: cross-entropy of the student's attention under the teacher's, in float32.

    -sum_j softmax_j(q_t k_t^T / sqrt(d_t)) log softmax_j(q_s k_s^T / sqrt(d_s)), mean over batch, heads and queries.
    One layer pair: q, k [B,H,N,d]; head numbers and widths may differ, the first min(H_s, H_t) heads are paired.
    True value and exact gradient, without an N x N matrix.
    """
    with torch.autocast(q_s.device.type, enabled=False):
        qk = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q_s, k_s, q_t, k_t)]
        surrogate = attention_alignment_grad(*qk)
        return surrogate + (_attention_value(*qk) - surrogate).detach()


def attention_alignment_grad(q_s, k_s, q_t, k_t):
    """A scalar with the gradient of `attention_alignment`, for two attention calls. Its value means nothing.

    The best idea in this file. With c = d^-1/2, P = softmax(c q k^T) for student (s) and teacher (t), query i costs
        L_i = lse_j(c q_i.k_j) - c q_i . (P_t k_s)_i,
    and its gradient is that of c q_i . (P_s k_s - P_t k_s)_i where P_s and P_t are held constant: d lse/dq = c P_s k_s,
    and each k_j gets c (P_s - P_t)_ij q_i. But P k_s is what fused attention computes when the student's keys stand in
    for the values; so neither attention map is ever written down, and memory grows with N, not with N^2.
    """
    H = min(q_s.shape[1], q_t.shape[1])
    q_s, k_s, q_t, k_t = (x[:, :H] for x in (q_s, k_s, q_t, k_t))
    difference = attend(q_s.detach(), k_s.detach(), k_s) - attend(q_t.detach(), k_t.detach(), k_s)      # [B,H,N,d_s]
    dot = (q_s * difference).sum(-1, dtype=torch.promote_types(q_s.dtype, torch.float32))               # [B,H,N]
    return dot.mean() * q_s.shape[-1] ** -0.5


@torch.no_grad()
def _attention_value(q_s, k_s, q_t, k_t, chunk=128):
    """The loss's value; the log-sum-exp goes over chunks of queries, so that nothing of size N x N is stored."""
    H, c = min(q_s.shape[1], q_t.shape[1]), q_s.shape[-1] ** -0.5
    q_s, k_s, q_t, k_t = (x[:, :H] for x in (q_s, k_s, q_t, k_t))
    lse = torch.cat([(c * q @ k_s.mT).logsumexp(-1) for q in q_s.split(chunk, dim=2)], dim=2)           # [B,H,N]
    return (lse - c * (q_s * attend(q_t, k_t, k_s)).sum(-1)).mean()


def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v by fused attention, whose kernels want one head width: zeros change no dot product."""
    d, dv, width = q.shape[-1], v.shape[-1], max(q.shape[-1], v.shape[-1])
    pad = lambda x: x.to(v.dtype) if x.shape[-1] == width else F.pad(x.to(v.dtype), (0, width - x.shape[-1]))
    return F.scaled_dot_product_attention(pad(q), pad(k), pad(v), scale=d ** -0.5)[..., :dv]


def losses(model, x, eps, t, y, targets, pairs, cfg, exact=False):
    """Total loss of a batch, and its terms. x [B,C,h,w], eps like x, t [B], y [B]; targets = teacher's output, or None.

    `exact` asks for the true value of the attention term, which costs a log-sum-exp: wanted when it is logged. It
    changes nothing in the gradient.
    """
    x_t, v = sit.interpolant(x, eps, t, cfg.path)
    if targets is None:
        flow = (model(x_t, t, y).float() - v).square().mean()
        return flow, {"loss": flow}
    tokens, taps_t = targets
    v_hat, z, taps_s = model(x_t, t, y, tap_layers=[s for s, _ in pairs])
    terms = {"loss": (v_hat.float() - v).square().mean(), "feature_loss": feature_alignment(z, tokens)}
    total = terms["loss"] + cfg.feature_weight * terms["feature_loss"]
    if pairs:
        mean = lambda form: sum(form(*s, *t) for s, t in zip(taps_s, taps_t)) / len(pairs)
        surrogate = mean(attention_alignment_grad)                          # right gradient, meaningless value
        total = total + cfg.attention_weight * surrogate
        with torch.no_grad():
            terms["attention_loss"] = mean(attention_alignment) if exact else surrogate
    return total, terms


# ---- what the configuration means

def check(cfg, world):
    """Refuse impossible values, with flag and remedy, before anything is loaded; fill in the model's own sizes."""
    run.check(cfg, world, ("stop_interval", "teacher_steps", "projector_dim"),
              ("stop_warmup", "feature_weight", "attention_weight"))
    need = partial(run.need, cfg)
    need(cfg.model in sit.SIT_CONFIGS, "model", f"is none of {', '.join(sit.SIT_CONFIGS)}")
    need(cfg.stop in ("auto", "never") or cfg.stop.isdecimal(), "stop", "must be a number of steps, auto or never")
    need(cfg.feature_depth is None or cfg.feature_depth >= 1, "feature_depth", "must be 1 or more")
    for name in ("depth", "hidden_size", "num_heads"):                      # the table fills what no flag has set
        setattr(cfg, name, getattr(cfg, name) or sit.SIT_CONFIGS[cfg.model][name])
    need(cfg.hidden_size % cfg.num_heads == 0 and cfg.hidden_size % 4 == 0, "hidden_size",
         f"must be a multiple of 4 and of --num-heads {cfg.num_heads}")
    if cfg.align != "none":
        layer_map(cfg)


def layer_map(cfg, teacher_depth=None):
    """(feature depth, pairs [(student block, teacher block), ...]) from the table and the flags that override it.

    Without `teacher_depth` it only checks what can be checked before there is a teacher.
    """
    haste_depth, repa_depth, pairs = ALIGNMENT[cfg.model.split("/")[0]]
    feature_depth = cfg.feature_depth or (haste_depth if cfg.align == "haste" else repa_depth)
    pairs = [(s, round((t + 1) * (teacher_depth or TABLE_DEPTH) / TABLE_DEPTH) - 1) for s, t in pairs]
    if cfg.pairs:
        found = re.findall(r"(\d+):(\d+)", cfg.pairs)
        if ",".join(map(":".join, found)) != cfg.pairs:
            raise ValueError(f"--pairs {cfg.pairs} must look like 4:8,5:9 (student block:teacher block)")
        pairs = [(int(s), int(t)) for s, t in found]
    if not 1 <= feature_depth <= cfg.depth:
        raise ValueError(f"--feature-depth {feature_depth} must lie in 1 ... {cfg.depth}, the depth of the model")
    bad = [f"{s}:{t}" for s, t in pairs if s >= cfg.depth or t >= (teacher_depth or math.inf)]
    if bad:
        raise ValueError(f"--pairs {','.join(bad)}: student blocks are 0 ... {cfg.depth - 1}"
                         + (f", teacher blocks 0 ... {teacher_depth - 1}" if teacher_depth else ""))
    return feature_depth, pairs if cfg.align == "haste" else []


def make_teacher(cfg, images, grid, processes):
    """The frozen teacher, with its position embedding on the student's token grid."""
    def trained(most=2 ** 31):
        share = min(len(images.train), 50_000, most // (3 * images.size ** 2))              # all of a small set
        rows = torch.arange(0, len(images.train), -(-len(images.train) // share))
        pixels, labels = images.train.read(rows)
        return teacher_module.train_small(to_rgb(pixels), labels, grid, steps=cfg.teacher_steps, cache=cfg.cache,
                                          device=processes.device).cpu()
    if cfg.teacher != "small":
        net = processes.first(lambda: teacher_module.load_dinov2(cfg.teacher, cfg.teacher_weights))
    else:
        net = teacher_module.load_small(cfg.teacher_weights) if cfg.teacher_weights else processes.share(trained)
    return net.resize_pos_embed(grid).requires_grad_(False).eval().to(processes.device)


def draw(cfg, step, shape, device, packed=False):
    """All that is random in a step, for the global batch [B,C,h,w]: eps like it, t [B], dropped [B], mirrored [B].

    And the noise of the autoencoder's posterior, where the data is packed: like eps, else empty.
    """
    g, B = run.seeded(device, cfg.seed, 0, step), shape[0]
    eps = torch.randn(shape, generator=g, device=device)
    u = torch.rand(B, generator=g, device=device)
    if cfg.time == "lognormal":                                             # REPA: sigma/alpha = exp(N(0, 1))
        s = torch.randn(B, generator=g, device=device).exp()
        u = s / (1 + s) if cfg.path == "linear" else 2 / math.pi * torch.atan(s)
    dropped, mirrored = torch.rand(2, B, generator=g, device=device)
    posterior = torch.randn(shape if packed else (B, 0), generator=g, device=device)
    return eps, u, dropped < cfg.label_drop, mirrored < (0.5 if cfg.mirror else 0), posterior


# ---- the automatic end of the guidance

STOP_TIMES = (0.02, 0.1, 0.5, 0.8)                                          # HASTE's, for the automatic trigger


def gradient_cosine(model, x, eps, y, targets, pairs, cfg):
    """Mean over times of the cosine between flow and weighted alignment gradients, in the block below the projector."""
    params, cosines = list(model.blocks[model.encoder_depth - 1].parameters()), []
    for time_ in STOP_TIMES:
        t = torch.full((len(x),), time_, device=x.device)
        total, terms = losses(model.forward, x, eps, t, y, targets, pairs, cfg)     # forward: not through torch.compile
        flow = torch.autograd.grad(terms["loss"], params, retain_graph=True)
        align = torch.autograd.grad(total - terms["loss"], params)
        del total, terms                                                    # one graph at a time
        flow, align = (torch.cat([g.flatten() for g in grads]) for grads in (flow, align))
        cosines.append(F.cosine_similarity(flow, align, dim=0))
    return torch.stack(cosines).mean()


def held_cosine(model, images, targets_of, pairs, cfg, processes, autocast):
    """gradient_cosine on a batch and noise that stay the same all through the run; the same number on every process."""
    g = run.seeded("cpu", cfg.seed, 1)
    rows = torch.randperm(len(images.train), generator=g)[:64]
    pixels, y = (b.to(processes.device) for b in images.train.read(rows))
    eps, targets = torch.randn(len(rows), *images.shape, generator=g).to(processes.device), targets_of(pixels)
    x = to_pixels(pixels)
    if images.packed:
        posterior, mirrored = torch.randn(eps.shape, generator=g), torch.zeros(len(rows), dtype=torch.bool)
        x = to_latents(images.train.moments(rows), mirrored, posterior, images.packed["scale"]).to(processes.device)
    with autocast:
        cosine = gradient_cosine(model, x, eps, y, targets, pairs, cfg)
    return processes.mean(cosine).item()


# ---- the program

def prepare(cfg, saved, processes):
    """Data, teacher and student, fresh or from a checkpoint: all that can fail because of the user fails here.

    Returns images, teacher (None without guidance), pairs, student, arch (SiT's arguments) and tau.
    """
    images = processes.first(lambda: data_module.open_data(cfg.data, cfg.image_size, cfg.data_root))
    (channels, side, _), patch = images.shape, sit.SIT_CONFIGS[cfg.model]["patch_size"]
    if len(images.train) < 2:
        raise ValueError(f"--data {cfg.data} holds fewer than two training images")
    if side % patch:
        raise ValueError(f"--image-size {images.size} must be a multiple of {images.size // side * patch} "
                         f"({'VAE ' + str(images.size // side) + ' x ' if images.packed else ''}patch {patch} of "
                         f"--model {cfg.model})")
    run.check_data(cfg, images, saved, input_size=side, in_channels=channels)
    if saved:
        start, tau, arch = saved["steps"], saved["tau"], saved["arch"]
    else:
        start, tau = 0, 0 if cfg.align == "none" else math.inf if cfg.stop in ("auto", "never") else int(cfg.stop)
        arch = dict(input_size=side, patch_size=patch, in_channels=channels, depth=cfg.depth,
                    hidden_size=cfg.hidden_size, num_heads=cfg.num_heads, num_classes=len(images.classes),
                    qk_norm=cfg.qk_norm, projector_dim=cfg.projector_dim)
    teacher, pairs = None, []
    if start < tau:
        teacher = make_teacher(cfg, images, side // patch, processes)
        feature_depth, pairs = layer_map(cfg, teacher.depth)
        arch |= dict(z_dim=teacher.embed_dim, encoder_depth=feature_depth)
    torch.manual_seed(cfg.seed)
    student = run.Student(sit.SiT(**arch), cfg, processes, guide="projectors.")
    if saved:
        student.load(saved)
    return images, teacher, pairs, student, arch, tau


def train(cfg, processes, stop):
    with run.one_line("haste_train.py"):
        check(cfg, processes.world)
        modules = (sit, teacher_module, data_module, run, sys.modules[__name__])
        saved, code = run.resume_point(cfg, FREE, modules, processes), run.code_hash(*modules)
        if saved and saved["steps"] >= cfg.steps:
            return
        images, teacher, pairs, student, arch, tau = prepare(cfg, saved, processes)
        sets = evaluate.reference(images) if cfg.eval_every and processes.main else None
        decode = cfg.eval_every and processes.first(lambda: evaluate.decoder(images.packed, cfg.vae, images.shape[0],
                                                                             processes.device))
    device, world, autocast = processes.device, processes.world, run.autocast(cfg.precision, processes.device)
    book = run.Book(cfg, saved, student, processes, stop, arch=arch, tau=tau, code=code, packed_from=images.packed)
    del saved
    share, part = cfg.batch_size // world, cfg.batch_size // world // cfg.accumulate
    mine = slice(processes.rank * share, (processes.rank + 1) * share)      # this process's rows of a global batch
    shape, packed = (cfg.batch_size, *images.shape), images.packed
    grid, null = student.model.grid, student.model.num_classes
    feed = data_module.batches(images.train, cfg.seed, book.start, cfg.batch_size, mine, pin=device.type == "cuda",
                               wanted=lambda step: step < book.content["tau"])              # the teacher looks at them
    size = sum(p.numel() for p in student.model.parameters()) / 1e6
    processes.print(f"{cfg.model}, {size:.1f} M parameters, {grid} x {grid} tokens; align {cfg.align}; "
                    f"{world} process(es) on {device.type}, {run.precision(cfg.precision, device)}")

    def targets_of(pixels):                                                 # uint8 [b,C,H,W] -> tokens and taps
        with torch.no_grad(), autocast:
            return teacher(teacher_module.preprocess(to_rgb(pixels), grid), [t for _, t in pairs])

    def look():                                                             # an evaluation's numbers for the log
        def sampled(rows):
            with autocast:
                return to_uint8(decode(evaluate.sample_sit(student.ema, rows, cfg.eval_steps, cfg.eval_cfg, cfg.seed)))
        samples = evaluate.draw_samples(cfg.eval_samples, sampled, processes)
        if not processes.main:
            return {}
        evaluate.sample_sheet(samples, null, book.out / "samples.png")
        return evaluate.scores(samples, sets, null)

    for step in range(book.start, cfg.steps):
        # learning rate, and the end of the guidance
        lr, extra = cfg.lr * min(1, (step + 1) / max(1, cfg.warmup)), {}
        if teacher is not None and cfg.stop == "auto" and step >= cfg.stop_warmup and step % cfg.stop_interval == 0:
            cosine = held_cosine(student.model, images, targets_of, pairs, cfg, processes, autocast)
            extra, book.content["tau"] = {"grad_cosine": cosine}, step if cosine < cfg.stop_threshold else tau
        if student.model.projectors is not None and step >= book.content["tau"]:
            teacher = None                                                  # never run again, its memory is free
            student.drop_guide()
            processes.print(f"step {step}: the guidance ends")

        # batch: everything random is drawn for the global batch, and sliced
        with run.one_line("haste_train.py"):
            pixels, moments, y = book.batch(feed, step)
        eps, t, dropped, mirrored, posterior = (r[mine] for r in draw(cfg, step, shape, device, packed))
        pixels, y = data_module.mirror(pixels, mirrored), torch.where(dropped, null, y)
        x = to_latents(moments, mirrored, posterior, packed["scale"]) if packed else to_pixels(pixels)

        # forward and backward, in `accumulate` parts
        sums, exact = {}, book.logging(step) or bool(extra)
        for i in range(0, share, part):
            rows = slice(i, i + part)
            targets = None if teacher is None else targets_of(pixels[rows])
            batch = x[rows], eps[rows], t[rows], y[rows], targets
            with student.net.no_sync() if world > 1 and i + part < share else nullcontext():
                with autocast:
                    total, terms = losses(student.net, *batch, pairs, cfg, exact)
                (total / cfg.accumulate).backward()
            sums = {k: sums.get(k, 0) + v.detach() / cfg.accumulate for k, v in terms.items()}

        # step and average; log, sample, save
        norm = student.step(lr, cfg.clip)
        if book.close_step(step, lr, norm, sums, look, extra):
            break
    feed.close()
    if processes.main:
        rows = run.read_log(book.out / "log.jsonl")
        if rows:
            tau = book.content["tau"] if cfg.align != "none" else math.inf
            evaluate.plot_curves(rows, book.out / "curves.png", tau)
            evaluate.tell(rows, book.out)


def main(argv=None):
    cfg = run.parse(Config, argv, "haste_train.py", "Train SiT plainly, with REPA, or with HASTE.", PRESETS)
    with run.one_line("haste_train.py"):
        processes = run.Processes(cfg.device)
    try:
        with run.StopSignal(processes) as stop, run.one_line("haste_train.py", OSError):    # a full disk, in mid-run
            train(cfg, processes, stop)
    finally:
        processes.close()


if __name__ == "__main__":
    main()
