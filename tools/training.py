"""Compare training steps: ours against the straightforward ones, HASTE's before and after tau.

All contenders train the same weights on one batch that already lies on the device. Read `Step`,
then `haste_steps` and `xar_steps`. tools/straightforward.py has the baselines.
"""
import argparse
import copy
import statistics
from contextlib import nullcontext
from typing import NamedTuple

import torch

import align
import clutter
import data
import ddp
import haste_train
import mmdit
import models
import run
import scenes
import teacher as teachers
import xar
import xar_train
from tools import measure, straightforward

PROGRAM = "python -m tools.bench train"
CLASSES = 1000                                                              # of ImageNet
XAR = "xar-"                                                                # first letters of xar_train.py's presets
# channels and side of images that need no autoencoder
PIXELS = {"digits": (1, 8), "scenes": (1, scenes.CANVAS),
          "clutter": (1, clutter.CANVAS), "cifar10": (3, 32)}
LATENTS = {4: 8, 16: 16}                                                    # an autoencoder's channels: its factor
# the text tower of ViT-L/14
CLIP = dict(vocabulary=49_408, length=77, width=768, depth=12, num_heads=12)


def presets():
    """Return {name: preset} of both training programs."""
    xars = {XAR + name: preset for name, preset in xar_train.PRESETS.items()}
    return {**haste_train.PRESETS, **xars}


def config(name, **changes):
    """Return the configuration of a preset."""
    preset = {**presets()[name], **changes}
    if name.startswith(XAR):
        return xar_train.Config(**preset)
    return haste_train.Config(**preset)


def geometry(cfg):
    """Return channels and side of what the model of a preset sees, and the side of the images."""
    if cfg.latent_channels is None:
        channels, side = PIXELS[cfg.data]
        return channels, side, side
    return cfg.latent_channels, cfg.image_size // LATENTS[cfg.latent_channels], cfg.image_size


def text_of(cfg):
    """Return length and width of the captions that a model reads, in a dict; None for a SiT."""
    if cfg.model not in mmdit.MMDIT_CONFIGS:
        return None
    return scenes.TEXT if cfg.data == "scenes" else CLIP


def arch_of(cfg, channels, side, pixels):
    """Return the arguments of a model of haste_train.py, for data of these sizes."""
    packed = dict(channels=channels, latent_size=side)
    images = data.Data(None, None, pixels, channels, range(CLASSES), packed, text_of(cfg))
    return models.arch_of(cfg, images)


def condition(cfg, B, device=None):
    """Return what a model is told of B images: class ids [B], or the features of captions."""
    text = text_of(cfg)
    if text is not None:
        return torch.randn(B, text["length"], text["width"], device=device)
    return torch.arange(B, device=device) % CLASSES


# ---- a step

class State(NamedTuple):
    model: torch.nn.Module
    ema: torch.nn.Module
    opt: torch.optim.Optimizer


class Step:
    """A training step on a fixed batch: gradients of `loss(rows)` by parts, then `update()`."""

    def __init__(self, model, loss, update, parts, autocast, log=False):
        self.model = model
        self.teacher = None                                                 # where there is one
        self.loss = loss
        self.update = update
        self.parts = parts
        self.autocast = autocast
        self.log = log

    def gradients(self):
        for rows in self.parts:
            with self.autocast:
                loss = self.loss(rows)
            (loss / len(self.parts)).backward()
            if self.log:
                loss.item()                                                 # the host waits for the device

    def __call__(self):
        self.gradients()
        self.update()


def our_step(args, cfg, autocast, state, loss):
    """Return a Step that ends with phase 4 of the loops in haste_train.py and xar_train.py."""
    model, ema, opt = state

    def update():
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        opt.step()
        opt.zero_grad()
        weights = [p.detach() for p in model.parameters()]
        torch._foreach_lerp_(list(ema.parameters()), weights, 1 - cfg.ema)
    return Step(model, loss, update, parts_of(args), autocast)


def straightforward_step(args, cfg, autocast, state, loss):
    """Return a Step with torch's default AdamW and a loss that is read each time."""
    def update():
        straightforward.update(*state, cfg)
    return Step(state.model, loss, update, parts_of(args), autocast, log=True)


def parts_of(args):
    """Return the rows of each part into which --accumulate cuts the batch."""
    part = args.batch_size // args.accumulate
    return [slice(i, i + part) for i in range(0, args.batch_size, part)]


def with_default_adamw(state):
    """Return the same model and average with the AdamW that torch gives without being asked."""
    keep = ("params", "lr", "betas", "weight_decay")
    groups = [{key: group[key] for key in keep} for group in state.opt.param_groups]
    return state._replace(opt=torch.optim.AdamW(groups))


def in_mid_training(model):
    """Return the model with all weights away from zero, so that every gradient is."""
    for p in model.parameters():
        if p.requires_grad and not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return model


# ---- HASTE, ours and straightforward, and what is left of both after the alignment

def haste_states(cfg, arch, device):
    """Return four States: guided, after its end, of a model that never had a teacher; theirs.

    They share weights, average and moments: then all contenders fit into one GPU.
    """
    torch.manual_seed(0)
    model = in_mid_training(models.create(arch)).to(device)
    guided = State(model, *haste_train.training_state(cfg, model, None)[:2])

    def sharing(arch):
        twins = []
        for net in (guided.model, guided.ema):
            with torch.device("meta"):
                twin = models.create(arch)
            weights = net.state_dict(keep_vars=True)
            kept = {name: weights[name] for name in twin.state_dict()}
            twin.load_state_dict(kept, assign=True)                         # the very same parameters
            twins.append(twin)
        twins[1].eval().requires_grad_(False)
        return State(*twins, haste_train.training_state(cfg, twins[0], None)[1])

    free = sharing(arch)
    haste_train.drop_projector(*free)
    plain = sharing(dict(arch, z_dim=None))
    free.opt.state = plain.opt.state = guided.opt.state
    theirs = with_default_adamw(sharing(arch))
    straightforward.with_tokens_transposed(theirs.model)
    return guided, free, plain, theirs


def haste_steps(args, cfg, teacher, device, autocast):
    """Return {name: Step} of HASTE before and after its end, and of a plain model.

    Captions are encoded already, as prepare.py can do it.
    """
    feature_depth, pairs = align.choose_layers(cfg, cfg.depth, cfg.depth, teacher.depth)
    arch = arch_of(cfg, args.channels, args.size, args.pixels)
    arch.update(z_dim=teacher.embed_dim, encoder_depth=feature_depth)
    guided, free, plain, theirs = haste_states(cfg, arch, device)
    B = args.batch_size
    x, eps = torch.randn(2, B, args.channels, args.size, args.size, device=device)
    t = torch.rand(B, device=device)
    y = condition(cfg, B, device)
    pixels = torch.randint(0, 256, (B, 3, args.pixels, args.pixels), dtype=torch.uint8,
                           device=device)

    def ours(state):
        def loss(rows):
            targets = None
            if state.model.projectors is not None:                          # autocast is on already
                targets = align.teacher_targets(teacher, pixels[rows], pairs, nullcontext())
            total, _ = haste_train.losses(state.model, x[rows], y[rows], t[rows], eps[rows],
                                          targets, pairs, cfg)
            return total
        return our_step(args, cfg, autocast, state, loss)

    whole_teacher = copy.deepcopy(teacher)                                  # ours may be rounded to bfloat16

    def straightforwardly(aligned):
        def loss(rows):
            targets = straightforward.haste_targets(whole_teacher, pixels[rows])
            return straightforward.haste_loss(theirs.model, x[rows], y[rows], t[rows], eps[rows],
                                              targets, pairs, cfg, aligned)
        return straightforward_step(args, cfg, autocast, theirs, loss)

    steps = {"HASTE, ours": ours(guided), "HASTE, straightforward": straightforwardly(True),
             "after its end, ours": ours(free),
             "after its end, straightforward": straightforwardly(False),
             f"plain {cfg.model.split('-')[0]}": ours(plain)}
    steps["HASTE, ours"].teacher = teacher
    return steps


# ---- xAR

def xar_steps(args, cfg, device, autocast):
    """Return {name: Step} of xAR, ours and straightforward."""
    torch.manual_seed(0)
    model = xar.XAR(grid=args.size, channels=args.channels, num_classes=CLASSES, entity=cfg.entity,
                    dropout=cfg.dropout, attn_dropout=cfg.attn_dropout, **xar_train.check(cfg, 1))
    model = in_mid_training(model).to(device)
    ours = State(model, *xar_train.training_state(cfg, model, None)[:2])
    B = args.batch_size
    x = torch.randn(B, args.channels, args.size, args.size, device=device)
    eps = torch.randn(B, sum(model.sizes), args.channels, device=device)
    t = torch.randn(B, len(model.sizes), device=device).sigmoid()
    y = torch.arange(B, device=device) % CLASSES

    def loss(rows):
        return model.loss(x[rows], y[rows], t[rows], eps[rows], context=cfg.context)

    def straightforward_loss(rows):
        return straightforward.xar_loss(model, x[rows], y[rows], t[rows], eps[rows])

    theirs = with_default_adamw(ours)
    return {"xAR, ours": our_step(args, cfg, autocast, ours, loss),
            "xAR, straightforward": straightforward_step(args, cfg, autocast, theirs,
                                                         straightforward_loss)}


# ---- that both compute the same

def gradient_difference(first, second):
    """Return how far the gradients of two Steps lie apart, relative to their norm, in float32.

    Both belong to one model.
    """
    model = first.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    model.eval()                                                            # no dropout
    difference = 0
    norm = 0
    rows = slice(0, 2)                                                      # two images suffice
    ours = torch.autograd.grad(first.loss(rows), parameters)
    theirs = torch.autograd.grad(second.loss(rows), parameters)
    for a, b in zip(ours, theirs):
        difference += (a - b).double().square().sum()
        norm += b.double().square().sum()
    model.train()
    torch.set_float32_matmul_precision(precision)
    return (difference / norm).sqrt().item()


# ---- the program

def flags(argv):
    # the straightforward step is that of flow matching
    names = [name for name, p in presets().items()
             if p.get("align", "haste") == "haste" and p.get("objective") != "ddpm"]
    parser = run.Parser(PROGRAM, description="Compare training steps with straightforward ones.")
    add = parser.add_argument
    add("--preset", choices=names,
        help=f"of haste_train.py, or after {XAR} of xar_train.py: model, sizes, weights of losses")
    add("--model", choices=[*models.CONFIGS, *xar.XAR_CONFIGS],
        help="size, if not the preset's; SiT-B/2 without one")
    add("--size", type=int, help="side of the latent, if not the preset's")
    add("--channels", type=int, help="channels of the latent, if not the preset's")
    add("--teacher", choices=list(teachers.DINOV2_CONFIGS), default="vitb14",
        help="DINOv2 of this size, with random weights")
    add("--batch-size", type=int, default=4, help="images a step")
    add("--accumulate", type=int,
        help="parts into which a step cuts its batch; if not given, the preset's, or 1")
    add("--repeats", type=int, default=3, help="timed steps of each contender")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="auto is bf16 on CUDA")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="compile the blocks of our models; if not given, as the preset does, on CUDA")
    add("--profile", action="store_true", help="also print where the time of a step goes")
    return parser.parse_args(argv)


def usual_preset(model):
    """Return the preset of a model of this size on ImageNet, or of B if there is none.

    That of an MM-DiT is COCO's.
    """
    family, size = model.split("/")[0].lower().split("-")
    if family == "mmdit":
        return "coco256"
    prefix = XAR if family == "xar" else ""
    name = f"{prefix}imagenet256-{size}"
    return name if name in presets() else f"{prefix}imagenet256-b"


def settle(args):
    """Fill in what no flag has set, and return the configuration. Raises ValueError."""
    if args.accumulate is None:
        args.accumulate = presets()[args.preset].get("accumulate", 1) if args.preset else 1
    for name in ("batch_size", "accumulate", "repeats"):
        run.require(args, getattr(args, name) >= 1, name, "must be 1 or more")
    run.require(args, args.batch_size % args.accumulate == 0, "batch_size",
                f"must be a multiple of --accumulate {args.accumulate}")
    is_xar = (args.model or args.preset or "").lower().startswith("xar")
    changes = {}
    if args.model:
        changes["model"] = args.model
        run.require(args, not args.preset or args.preset.startswith(XAR) == is_xar, "model",
                    f"is no model of --preset {args.preset}")
    if is_xar and not args.preset:
        changes.update(dropout=0.0, attn_dropout=0.0)                       # on a CPU, attention's writes down the map
    cfg = config(args.preset or usual_preset(args.model or "SiT-B/2"), **changes)
    channels, side, pixels = geometry(cfg)
    args.pixels = pixels if args.size is None else args.size * pixels // side
    args.size = args.size or side
    args.channels = args.channels or channels
    run.require(args, args.size >= 1, "size", "must be 1 or more")
    run.require(args, args.channels >= 1, "channels", "must be 1 or more")
    if not is_xar:
        haste_train.check(cfg, 1)
        patch = models.CONFIGS[cfg.model]["patch_size"]
        run.require(args, args.size % patch == 0, "size", f"must be a multiple of patch {patch}")
    return cfg


def make_steps(args, cfg, device, autocast):
    """Return {name: Step}."""
    if isinstance(cfg, xar_train.Config):
        return xar_steps(args, cfg, device, autocast)
    torch.manual_seed(1)
    teacher = teachers.DINOv2(**teachers.DINOV2_CONFIGS[args.teacher])
    grid = args.size // models.CONFIGS[cfg.model]["patch_size"]
    teacher = teacher.resize_pos_embed(grid).requires_grad_(False).eval().to(device)
    return haste_steps(args, cfg, teacher, device, autocast)


def count_operations(steps):
    """Return {name: floating-point operations} of eager steps; who does not fit is left out."""
    found = {}
    for name in list(steps):
        try:
            found[name] = sum(measure.arithmetic(steps[name]).values())
        except torch.OutOfMemoryError:
            pass                                                            # its traceback still holds tensors
        if name not in found:
            print(f"{name} does not fit into the memory of this GPU: fewer images a step?")
            steps.pop(name).model.zero_grad()
            torch.cuda.empty_cache()
    if not found:
        raise SystemExit(f"{PROGRAM}: no step fits: give a smaller --batch-size")
    return found


def print_table(B, seconds, flops, peaks, rate, against):
    """Print a row for each contender, relative to the one named `against`; B images a step."""
    print(f"| step | ms | relative to {against} | images/s | its own memory, GiB | TFLOP/s | "
          f"of {rate / 1e12:.3g} TFLOP/s |\n|---|---|---|---|---|---|---|")
    for name, s in seconds.items():
        done = flops[name] / s                                              # operations a second
        print(f"| {name} | {1000 * s:,.0f} | {s / seconds[against]:.2f} | {B / s:.3g} "
              f"| {peaks[name] / measure.GIB:.2f} | {done / 1e12:.3g} | {done / rate:.0%} |")


RATIOS = [("HASTE, ours", "HASTE, straightforward"), ("after its end, ours", "plain SiT"),
          ("after its end, ours", "plain MMDiT"),
          ("after its end, ours", "after its end, straightforward"),
          ("xAR, ours", "xAR, straightforward")]


def print_ratios(seconds, peaks):
    """Print how pairs of contenders compare, in time and in memory."""
    print()
    for ours, theirs in RATIOS:
        if ours in seconds and theirs in seconds:
            print(f"{ours} / {theirs}: {seconds[ours] / seconds[theirs]:.3f} of the time, "
                  f"{peaks[ours] / peaks[theirs]:.2f} of the memory")


def print_whole_run(seconds, cfg):
    """Print how long HASTE's whole run takes, as its preset ends the alignment."""
    if len(seconds) < 5 or not cfg.stop.isdecimal():
        return
    share = int(cfg.stop) / cfg.steps
    whole = {who: share * seconds[f"HASTE, {who}"] + (1 - share) * seconds[f"after its end, {who}"]
             for who in ("ours", "straightforward")}
    print(f"whole run, aligned for {share:.0%} of {cfg.steps:,} steps, ours / straightforward: "
          f"{whole['ours'] / whole['straightforward']:.3f} of the time")


def as_in_training(steps, args, device):
    """Do to our steps what the programs do: round the teacher's matrices, compile blocks."""
    ours = [step for name, step in steps.items() if "straightforward" not in name]
    teacher = ours[0].teacher
    if teacher is not None and run.precision(args.precision, device) == "bf16":
        align.round_matrices(teacher)
    if args.compile:
        for net in {step.model for step in ours} | ({teacher} - {None}):
            if isinstance(net, xar.XAR):
                run.compile_blocks([*net.encoder_blocks, *net.decoder_blocks])
            else:
                run.compile_blocks(net.blocks)


def count_tokens(model):
    return sum(model.sizes) if isinstance(model, xar.XAR) else model.grid ** 2


def bench_train(argv):
    args = flags(argv)
    with run.one_line_errors(PROGRAM):
        cfg = settle(args)
        device = ddp.Processes(args.device).device
        if args.compile is None:
            args.compile = run.compiling(cfg, device)
        autocast = run.autocast(args.precision, device)
        steps = make_steps(args, cfg, device, autocast)
    first, second = list(steps.values())[:2]
    difference = gradient_difference(first, second)
    print(f"gradients, ours and straightforward, differ by {difference:.0e} of the norm")
    if not difference < 1e-3:
        raise SystemExit(f"{PROGRAM}: the contenders do not compute the same")

    print(f"{cfg.model}, {count_tokens(first.model)} tokens, batch {args.batch_size} in "
          f"{args.accumulate} part(s), {measure.machine(device)}, "
          f"{run.precision(args.precision, device)}{', ours compiled' * args.compile}; median of "
          f"{args.repeats}. Memory: the step's own, above weights, average and moments\n")
    flops = count_operations(steps)
    against = list(steps)[-1]                                               # the plain model, or their xAR
    rate = measure.matrix_rate(device, autocast)
    shown = [name for name in steps if args.profile and name.endswith("ours")]
    expected = {name: expect(steps[name], rate, device) for name in shown}
    as_in_training(steps, args, device)                                # after all that counts operations
    seconds = measure.alternate(steps, args.repeats, device)
    peaks = {name: measure.peak_bytes(step, device) for name, step in steps.items()}
    print_table(args.batch_size, seconds, flops, peaks, rate, against)
    print_ratios(seconds, peaks)
    if isinstance(cfg, haste_train.Config):
        print_whole_run(seconds, cfg)
    for name in shown:
        print_profile(name, steps[name], expected[name], device)
    if shown:
        print(f"\nthese steps wait for no data; {PROGRAM.replace('train', 'program')} does")


# ---- where the time goes, beside what the sizes say

UPDATE_BYTES = 12 + 28 + 12                                                 # of a parameter: clip, AdamW, average
PARTS = {"matrix": "matrix products", "attention": "attention",
         "elementwise": "elementwise and norms", "update": "clip, AdamW, average",
         "other": "waiting, Python"}


def expect(step, rate, device):
    """Return {part: seconds} of a step from its sizes: operations and bytes at this machine's best.

    Attention is taken to be as fast as a large matrix product, which it never is.
    """
    copying = measure.copy_rate(device)
    flops = measure.arithmetic(step.gradients)
    moved = measure.traffic(step.gradients)
    step.update()
    parameters = sum(p.numel() for p in step.model.parameters() if p.requires_grad)
    return {"matrix": flops["matrix"] / rate, "attention": flops["attention"] / rate,
            "elementwise": moved / copying, "update": UPDATE_BYTES * parameters / copying,
            "other": 0.0}


def time_of_parts(step, device, repeats=3):
    """Return {part: seconds} of a step, as torch.profiler finds them."""
    updates = []
    for _ in range(repeats):
        step.gradients()
        updates.append(measure.seconds_of(step.update, device))
    found = measure.time_by_kind(step.gradients, device)
    step.update()
    return {**found, "update": statistics.median(updates)}


def print_profile(name, step, expected, device):
    found = time_of_parts(step, device)
    total = sum(found.values())
    print(f"\n{name}: {1000 * total:,.0f} ms; from its sizes {1000 * sum(expected.values()):,.0f}"
          f"\n\n| part | ms | share | ms from the sizes |\n|---|---|---|---|")
    for part, words in PARTS.items():
        print(f"| {words} | {1000 * found[part]:,.1f} | {found[part] / total:.0%} | "
              f"{1000 * expected[part]:,.1f} |")
