"""Train xAR: next-X prediction with noisy context, the model of xar.py.

    python xar_train.py                                 next-cell on digits, two minutes on a CPU
    python xar_train.py --entity scale --out out/scale  coarse to fine
    torchrun --nproc_per_node=8 xar_train.py --preset imagenet256-b --data PACKED

Paper: xAR (Ren et al. 2025, arXiv 2502.20388). Time runs from t = 0 (data) to t = 1 (noise). Every
step minimises E |v_n - (eps_n - X_n)|^2 over all entities n, each with its own time: `XAR.loss`.

Everything random in step n except dropout is drawn for the whole batch from one generator seeded by
(seed, n), and then sliced. So results do not depend on the number of processes, up to rounding, and
a resumed run continues as if nothing had happened. Dropout is each process's own, seeded by (seed,
n, rank).

Read the loop in `train`; it is haste_train.py's, without a teacher.
Letters: B batch (b of one process), C channels, h w height and width, L tokens, M entities.
"""
import copy
import dataclasses
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import torch

import data
import ddp
import evaluate
import run
import vae
import xar

PROGRAM = "xar_train.py"


@dataclass
class Config:
    # what to train on
    data: str = "digits"  # digits, cifar10, mnist, fashionmnist, a folder of class folders, or one of prepare.py's
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
                        "eval_every", "data_root", "accumulate", "compile", "vae",
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
    "imagenet256-b": dict(IMAGENET, model="xAR-B"),                         # FID 1.72 with 40 steps, guidance 2.7
    "imagenet256-l": dict(IMAGENET, model="xAR-L", accumulate=4),           # 1.28 with 50 steps, 2.3
    "imagenet256-h": dict(IMAGENET, model="xAR-H", accumulate=8),           # 1.24 with 50 steps, 2.2
}


# ---- what a step needs

def learning_rate(cfg, step):
    """Return the learning rate of a step; warm-up and decay are shares of --steps."""
    done = (step + 1) / cfg.steps                                           # share of the run, in (0, 1]
    if done < cfg.warmup:                                                   # 1) linear warm-up
        return done / cfg.warmup * cfg.lr
    if done <= 1 - cfg.decay:                                               # 2) constant
        return cfg.lr
    falling = (done - (1 - cfg.decay)) / cfg.decay                          # 3) cosine, 0 ... 1
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


# ---- from flags to objects: bad input is refused here, with one line

def check(cfg, world):
    """Refuse impossible values before anything is loaded; return the sizes, as XAR's arguments."""
    run.check(cfg, world, at_least_0=("lr_end",))
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
    if cfg.hidden_size:
        sizes.update(dim=cfg.hidden_size)
    if cfg.num_heads:
        sizes.update(num_heads=cfg.num_heads)
    if sizes["dim"] % (4 * sizes["num_heads"]):
        raise ValueError(f"--hidden-size {sizes['dim']} must be a multiple of 4 x --num-heads "
                         f"{sizes['num_heads']}")
    return sizes


def build(cfg, sizes, saved, processes):
    """Return the data, the model, and the model's arguments."""
    images = data.open_alike(cfg, processes)
    channels, side, _ = images.shape
    run.require(cfg, images.text is None, "data",
                "has captions, and xAR takes class labels: choose another")
    images.check(cfg, saved, grid=side, channels=channels)
    initial = None
    arch = dict(sizes, grid=side, channels=channels, entity=cfg.entity,
                num_classes=len(images.classes), dropout=cfg.dropout, attn_dropout=cfg.attn_dropout)
    if saved:
        arch = saved["arch"]
    elif cfg.init:
        initial = processes.main_first(lambda: xar.load_xar(run.checkpoint_file(cfg.init, "init"),
                                                            cfg.num_heads))
        arch.update(quantize_t=initial.time_embed.quantize)

    torch.manual_seed(cfg.seed)
    try:
        model = xar.XAR(**arch)
    except ValueError as e:                                                 # "entity cell:3 does not divide ..."
        raise ValueError(f"--{e}") from None
    if initial is not None:
        load_initial(model, initial, cfg)
    return images, model.to(processes.device), arch


def load_initial(model, initial, cfg):
    """Copy the weights of --init."""
    try:
        if initial.entity != cfg.entity:
            raise RuntimeError(f"its entity is {initial.entity}, --entity is {cfg.entity}")
        model.load_state_dict(initial.state_dict())
    except RuntimeError as e:
        reason = " ".join(str(e).split())[:300]
        raise ValueError(f"--init {cfg.init} does not fit --model {cfg.model} and --data "
                         f"{cfg.data}: {reason}") from None


def training_state(cfg, model, saved):
    """Return the model's average (EMA) and its optimizer; with `saved`, as they were."""
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    opt = torch.optim.AdamW([dict(params=matrices, weight_decay=cfg.weight_decay),
                             dict(params=vectors, weight_decay=0.0)],
                            lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    if saved:
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        opt.load_state_dict(saved["opt"])
    return ema, opt


# ---- evaluation

def evaluate_ema(ema, decode, reference, cfg, processes, autocast):
    """Sample from the averaged weights, draw samples.png and growth.png; return scores to log."""
    def tokens_of(rows):                                                    # indices [b] -> [b,L,C]
        labels = rows % ema.num_classes
        randn = run.indexed_randn(cfg.seed, rows)
        return ema.sample_tokens(labels, cfg.eval_steps, cfg.eval_cfg, randn)

    def draw(rows):                                                         # indices [b] -> uint8 [b,C,H,W]
        with autocast:
            return data.to_uint8(decode(ema.to_latent(tokens_of(rows))))

    samples = evaluate.draw_samples(cfg.eval_samples, draw, processes)
    if not processes.main:
        return {}
    evaluate.sample_sheet(samples, ema.num_classes, Path(cfg.out, "samples.png"))

    with autocast:
        frames = evaluate.growth(ema, tokens_of(torch.arange(8)))                   # [8,frames,C,h,w]
        pixels = data.to_uint8(decode(frames.flatten(0, 1)))
    evaluate.save_grid(pixels, Path(cfg.out, "growth.png"), columns=frames.shape[1])
    return evaluate.scores(samples, reference, ema.num_classes)


# ---- the program

MODULES = (sys.modules[__name__], xar, data, run)                           # their changes are reported on resume


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
        images, model, arch = build(cfg, sizes, saved, processes)
        ema, opt = training_state(cfg, model, saved)
        packed = images.packed                                              # None, or what data.json says
        decode = reference = None
        if cfg.eval_every:
            decode = processes.main_first(
                lambda: vae.load_decoder(packed, cfg.vae, model.channels, processes.device))
            reference = processes.on_main(lambda: evaluate.reference(images, inception))
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
        checkpoint.unlink(missing_ok=True)                                  # an earlier run's: this run replaces it
    del saved
    if run.compiling(cfg, device):
        run.compile_blocks([*model.encoder_blocks, *model.decoder_blocks])
    if cfg.context == "clean" or xar.needs_mask(len(model.sizes), sum(model.sizes)):
        # with a mask, cuDNN's attention may have gradients that are not finite (pytorch#196678)
        torch.backends.cuda.enable_cudnn_sdp(False)
    net = processes.wrap(model)                                             # what the loss calls

    # this process's rows of every global batch
    per_process = cfg.batch_size // world
    part = per_process // cfg.accumulate
    mine = slice(processes.rank * per_process, (processes.rank + 1) * per_process)
    feed = data.batches(images.train, cfg.seed, start, cfg.batch_size, mine, device,
                        wanted=lambda step: False,                          # of packed data the moments alone
                        draw=lambda step: random_numbers(cfg, step, model, packed))

    bad = torch.full((), -1, device=device)                                 # the first step that was not finite
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    processes.print(f"{cfg.model}, {millions:.1f} M parameters; {len(model.sizes)} entities "
                    f"({model.entity}) of {sum(model.sizes)} tokens, {cfg.context} context; "
                    f"{world} process(es) on {device.type}, {run.precision(cfg.precision, device)}")

    for step in range(start, cfg.steps):
        done = step + 1
        evaluating = run.due(done, cfg.eval_every, cfg.steps)
        logging = evaluating or run.due(done, cfg.log_every, cfg.steps)

        # 1. learning rate
        lr = learning_rate(cfg, step)

        # 2. batch: drawn for all processes together, then sliced: their number does not matter
        with run.one_line_errors(PROGRAM):                                  # reading may fail: a damaged image
            pixels, moments, y, numbers = next(feed)
        eps, t, dropped, mirrored, posterior = numbers
        y = torch.where(dropped, model.num_classes, y)                      # no label: for classifier-free guidance
        if packed:
            x = data.to_latents(moments, mirrored, posterior, packed["scale"])              # [b,C,h,w]
        else:
            x = data.to_pixels(data.mirror(pixels, mirrored))

        # 3. forward and backward, in `accumulate` parts
        torch.manual_seed(run.seeded("cpu", cfg.seed, 1, step, processes.rank).initial_seed())  # dropout's
        total = 0
        for i in range(0, per_process, part):
            rows = slice(i, i + part)
            last_part = i + part == per_process
            sync = nullcontext() if world == 1 or last_part else net.no_sync()              # once a step is enough
            with sync:
                with autocast:
                    loss = model.loss(x[rows], y[rows], t[rows], eps[rows],
                                      context=cfg.context, net=net)
                (loss / cfg.accumulate).backward()
            total = total + loss.detach() / cfg.accumulate

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
        bad = torch.where((bad < 0) & ~(norm + total).isfinite(), step, bad)
        stopping = stop.agreed()
        evaluating = evaluating and (done == cfg.steps or not stopping)     # who stops a run may not wait for long
        saving = stopping or done == cfg.steps or run.due(done, cfg.save_every, cfg.steps)
        if not (logging or saving):
            continue
        run.refuse_nonfinite(processes.max(bad), last_good)                 # no checkpoint is written after one
        loss, grad_norm = processes.mean(torch.stack([total, norm])).tolist()
        row = {"step": done, "loss": loss, "grad_norm": grad_norm, "lr": lr, **clock.read(done)}
        if evaluating:
            row.update(evaluate_ema(ema, decode, reference, cfg, processes, autocast))
        if logging:
            picture = Path(cfg.out, "samples.png") if evaluating else None
            log.write(row, clock.left(done), picture)
        if saving and processes.main:
            run.save_checkpoint(checkpoint, {
                "model": model.state_dict(), "ema": ema.state_dict(), "opt": opt.state_dict(),
                "args": dataclasses.asdict(cfg), "arch": arch, "steps": done,
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
        if rows:                                                            # none if a signal came very early
            advice = f"python sample.py --ckpt {checkpoint} --cfg 1.5   draws more samples"
            evaluate.plot_curves(rows, Path(cfg.out, "curves.png"))
            evaluate.print_summary(rows, cfg.out, advice)


def main(argv=None):
    cfg = run.parse(Config, argv, PROGRAM, "Train xAR.", PRESETS)
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
