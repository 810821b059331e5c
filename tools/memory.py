"""Memory: of the attention alignment as tokens grow, and of every preset on a GPU, without a GPU.

A preset's activations are counted: the unique storages that a forward keeps for its backward, under
bfloat16 autocast, for one and two images and one and two blocks. All else follows, since both
numbers enter linearly. tools/bench.py says how to call it.
"""
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import align
import ddp
import dit
import haste
import haste_train
import models
import run
import teacher as teachers
import text
import xar
import xar_train
from tools import measure, straightforward, training

PROCESSES = 8
PROGRAM = "python -m tools.bench"
STATE_BYTES = 22                                                            # of a parameter: see `preset_memory`
FOR_LAPTOPS = ("digits", "scenes", "clutter", f"{training.XAR}digits")                 # presets that need no GPU


# ---- what a forward keeps for its backward

def saved_bytes(loss, model):
    """Return the bytes that `loss()` keeps for its backward: each storage once, no parameters.

    Weights that autocast has cast are included; they do not depend on the number of images.
    """
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage                                  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16):
            graph = loss()
    del graph
    return sum(storage.nbytes() for storage in kept.values())


def without_numbers(function):
    """Let a function work on tensors that have sizes but no numbers: seconds instead of minutes."""
    def fake(*args, **kwargs):
        try:
            dit._tables.cache_clear()                                       # what it keeps has numbers, or has none
            with FakeTensorMode():
                return function(*args, **kwargs)
        finally:
            dit._tables.cache_clear()
    return fake


def bytes_an_image(model, loss, shape):
    """Return what one image adds to what `loss(x)` keeps: what all images share drops out."""
    def count(B):
        return saved_bytes(lambda: loss(torch.zeros(B, *shape)), model)
    return count(2) - count(1)


@without_numbers
def haste_activations(cfg, depth, guided=False, pairs=0):
    """Return the bytes that one image keeps in a model of `depth` blocks, and in its loss.

    With `guided` there are the projector and feature alignment, and `pairs` aligned layer pairs.
    """
    sizes = training.geometry(cfg)
    arch = dict(training.arch_of(cfg, *sizes), depth=depth)
    D, H = teacher_sizes(cfg)
    if guided:
        arch.update(z_dim=D, encoder_depth=1)
    model = models.create(arch)
    N = model.grid ** 2

    def loss(x):
        B = len(x)
        y = training.condition(cfg, B)
        targets = None
        if guided:
            taps = torch.zeros(pairs, 2, B, H, N, D // H, dtype=torch.bfloat16)
            targets = torch.zeros(B, N, D), [(q.clone(), k.clone()) for q, k in taps]
        return haste_train.losses(model, x, y, torch.zeros(B), x, targets, [(0, 0)] * pairs, cfg)
    channels, side, _ = sizes
    return bytes_an_image(model, loss, (channels, side, side))


@without_numbers
def xar_activations(cfg, depth, guided=False, pairs=0):
    """Return the bytes that one image keeps in an xAR of `depth` blocks, and in its loss.

    `guided` and `pairs` are as above.
    """
    channels, side, _ = training.geometry(cfg)
    sizes = dict(xar_train.check(cfg, 1), encoder_depth=depth - 1, decoder_depth=1)
    D, H = teacher_sizes(cfg)
    if guided:
        sizes.update(z_dim=D, projector_dim=cfg.projector_dim, feature_depth=1)
    # no dropout of attention: on a GPU it is fused, but on a CPU it writes the map down
    model = xar.XAR(side, channels, num_classes=1, entity=cfg.entity, dropout=cfg.dropout, **sizes)
    N = side ** 2

    def loss(x):
        B = len(x)
        y = torch.zeros(B, dtype=torch.long)
        t = torch.zeros(B, len(model.sizes))
        eps = torch.zeros(B, sum(model.sizes), channels)
        targets = None
        if guided:
            taps = torch.zeros(pairs, 2, B, H, N, D // H, dtype=torch.bfloat16)
            targets = torch.zeros(B, N, D), [(q.clone(), k.clone()) for q, k in taps]
        return xar_train.losses(model, model, x, y, t, eps, targets, [(0, 0)] * pairs, cfg)
    return bytes_an_image(model, loss, (channels, side, side))


# ---- presets

def teacher_sizes(cfg):
    """Return width and heads of a preset's teacher."""
    config = dict(embed_dim=64, num_heads=4)                                # what teacher.train_small makes
    if cfg.teacher != "small":
        config, _ = teachers.TEACHERS[cfg.teacher]
    return config["embed_dim"], config["num_heads"]


def haste_memory(cfg):
    """Return a preset's bytes of activations an image, its parameters, and the frozen ones.

    Frozen are its teacher's and, if there are captions, those of CLIP's text tower.
    """
    haste_train.check(cfg, 1)
    arch = training.arch_of(cfg, *training.geometry(cfg))
    one = haste_activations(cfg, 1)
    activations = one + (cfg.depth - 1) * (haste_activations(cfg, 2) - one)
    if cfg.align != "none":
        feature_depth, pairs = align.choose_layers(cfg, cfg.depth, cfg.depth)
        z_dim, _ = teacher_sizes(cfg)
        arch.update(z_dim=z_dim, encoder_depth=feature_depth)
        features = haste_activations(cfg, 1, guided=True)
        activations += features - one
        if pairs:
            activations += len(pairs) * (haste_activations(cfg, 1, True, 1) - features)
    with torch.device("meta"):
        model = models.create(arch)
        frozen = teacher_parameters(cfg)
        if training.text_of(cfg) is training.CLIP:
            frozen += count_parameters(text.ClipText(**training.CLIP))
    return activations, count_parameters(model), frozen


def xar_memory(cfg):
    """Return an xAR preset's bytes of activations an image, its parameters, and its teacher's."""
    channels, side, _ = training.geometry(cfg)
    sizes = xar_train.check(cfg, 1)
    two = xar_activations(cfg, 2)
    blocks = sizes["encoder_depth"] + sizes["decoder_depth"]
    activations = two + (blocks - 2) * (xar_activations(cfg, 3) - two)
    if cfg.align != "none":
        feature_depth, pairs = xar_train.choose_layers(cfg, sizes)
        z_dim, _ = teacher_sizes(cfg)
        sizes.update(z_dim=z_dim, projector_dim=cfg.projector_dim, feature_depth=feature_depth)
        features = xar_activations(cfg, 2, guided=True)
        activations += features - two
        if pairs:
            activations += len(pairs) * (xar_activations(cfg, 2, True, 1) - features)
    with torch.device("meta"):
        model = xar.XAR(side, channels, num_classes=training.CLASSES, entity=cfg.entity, **sizes)
        frozen = teacher_parameters(cfg)
    return activations, count_parameters(model), frozen


def teacher_parameters(cfg):
    """Return the number of parameters of a preset's teacher: 0 if it has none, or the small one."""
    if cfg.align == "none" or cfg.teacher == "small":
        return 0
    config, _ = teachers.TEACHERS[cfg.teacher]
    return count_parameters(teachers.ViT(**config, family=cfg.teacher.split("_")[0]))


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def preset_parts(name, **changes):
    """Return (images at once, gigabytes of their activations, gigabytes of weights and state).

    `changes` are fields of the preset to replace, for instance accumulate=2.
    """
    cfg = training.config(name, **changes)
    count = xar_memory if name.startswith(training.XAR) else haste_memory
    activations, parameters, frozen = count(cfg)
    images = cfg.batch_size // gpus(cfg) // cfg.accumulate
    return images, images * activations / 1e9, (STATE_BYTES * parameters + 4 * frozen) / 1e9


def gpus(cfg):
    """Return the processes that a preset is meant for: one if its data need no autoencoder."""
    return PROCESSES if cfg.latent_channels else 1


def preset_memory(name, **changes):
    """Return the gigabytes that a preset needs on each GPU: xar_train.py's are named xar-...

    Activations of the images at once, and 22 bytes a parameter: weights, gradients, average and two
    moments in float32, and the bfloat16 copies that autocast makes. Then the weights of teacher and
    text tower. Temporary tensors of a step come on top: leave a tenth of a card free.
    """
    _, activations, state = preset_parts(name, **changes)
    return activations + state


def bench_memory(argv):
    parser = run.Parser(f"{PROGRAM} memory",
                        description=f"Count what each preset needs on each of {PROCESSES} GPUs "
                                    f"(small images: on one GPU), without a GPU.")
    parser.parse_args(argv)
    print("| preset | GPUs | accumulate | images at once | activations, GB | weights and state, GB "
          "| sum, GB |\n|---|---|---|---|---|---|---|")
    for name in training.presets():
        if name in FOR_LAPTOPS:
            continue
        cfg = training.config(name)
        images, activations, state = preset_parts(name)
        print(f"| `{name}` | {gpus(cfg)} | {cfg.accumulate} | {images} | {activations:.1f} | "
              f"{state:.1f} | {activations + state:.1f} |", flush=True)


# ---- growth: the attention alignment alone

TOKENS = (256, 1024, 4096)
HEADS = 12                                                                  # of student and teacher, each 64 wide
WIDTH = 64


def alignment_contenders(tokens, batch_size, device):
    """Return {name: function} of one layer pair's gradient, ours and straightforward."""
    g = torch.Generator(device).manual_seed(0)
    shape = (4, batch_size, HEADS, tokens, WIDTH)
    q_s, k_s, q_t, k_t = torch.randn(shape, generator=g, device=device)
    q_s.requires_grad_()
    k_s.requires_grad_()

    def ours():
        loss = haste.attention_alignment_grad(q_s, k_s, q_t, k_t)
        return torch.autograd.grad(loss, (q_s, k_s))

    def straightforwardly():
        log_map = straightforward.attention_logits(q_s, k_s).log_softmax(-1)
        with torch.no_grad():
            teacher_map = straightforward.attention_logits(q_t, k_t).softmax(-1)
        loss = straightforward.cross_entropy(log_map, teacher_map)
        return torch.autograd.grad(loss, (q_s, k_s))
    return {"ours": ours, "straightforward": straightforwardly}


def measure_growth(tokens, batch_size, repeats, device, autocast):
    """Return {name: (seconds, peak bytes)}, and how far the two gradients lie apart."""
    calls = alignment_contenders(tokens, batch_size, device)
    ours, theirs = (torch.cat([g.flatten() for g in call()]) for call in calls.values())
    difference = ((ours - theirs).norm() / theirs.norm()).item()
    with autocast:
        seconds = measure.alternate(calls, repeats, device)
        found = {name: (seconds[name], measure.peak_bytes(call, device))
                 for name, call in calls.items()}
    return found, difference


def bench_growth(argv):
    parser = run.Parser(f"{PROGRAM} growth",
                        description=f"Time and memory of the attention alignment of one layer "
                                    f"pair, {HEADS} heads of {WIDTH}, forward and backward.")
    add = parser.add_argument
    add("--batch-size", type=int, default=1, help="images at a time")
    add("--repeats", type=int, default=5, help="timed calls of each contender")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="auto is bf16 on CUDA")
    add("--out", help="PNG to draw")
    args = parser.parse_args(argv)
    with run.one_line_errors(f"{PROGRAM} growth"):
        for name in ("batch_size", "repeats"):
            run.require(args, getattr(args, name) >= 1, name, "must be 1 or more")
        device = ddp.Processes(args.device).device
    autocast = run.autocast(args.precision, device)
    print(f"batch {args.batch_size}, {measure.machine(device)}, "
          f"{run.precision(args.precision, device)}; median of {args.repeats}\n")
    print("| tokens | ours, ms | MiB | straightforward, ms | MiB | ours / straightforward: time | "
          "memory | gradients differ by |\n|---|---|---|---|---|---|---|---|")
    rows = {"ours": [], "straightforward": []}
    for tokens in TOKENS:
        found, difference = measure_growth(tokens, args.batch_size, args.repeats, device, autocast)
        cells = []
        for name, (seconds, peak) in found.items():
            rows[name].append((tokens, 1000 * seconds, peak / 2 ** 20))
            cells += [f"{1000 * seconds:,.1f}", f"{peak / 2 ** 20:,.1f}"]
        ours, theirs = found.values()
        print(f"| {tokens:,} | {' | '.join(cells)} | {ours[0] / theirs[0]:.2f} | "
              f"{ours[1] / theirs[1]:.3f} | {difference:.0e} |", flush=True)
    if args.out:
        draw_growth(rows, args.out)


def draw_growth(rows, path):
    """Draw rows {name: [(tokens, ms, MiB), ...]} as two panels."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(6.4, 2.8))
    for name, found in rows.items():
        tokens, milliseconds, mebibytes = zip(*found)
        axes[0].loglog(tokens, milliseconds, ".-", label=name)
        axes[1].loglog(tokens, mebibytes, ".-", label=name)
    for ax, title in zip(axes, ("time, ms", "peak memory, MiB")):
        ax.set(title=title, xlabel="tokens", xticks=TOKENS, xticklabels=TOKENS)
        ax.minorticks_off()
    axes[0].legend(frameon=False)
    fig.tight_layout()
    fig.savefig(path, dpi=100)
    plt.close(fig)
