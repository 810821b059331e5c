"""What a training run aligns: its teacher, on the student's grid of tokens, and which layers.

    teacher = align.make_teacher(cfg, images, grid, processes)
    feature_depth, pairs = align.choose_layers(cfg, depth, depth, teacher.depth)
    tokens, taps = align.teacher_targets(teacher, pixels, pairs, autocast)

cfg is a training program's configuration, images a data.Data. The networks are in teacher.py, the
table of layers in haste.py.
"""
import math
import re

import torch

import data
import haste
import run
import scenes
import teacher as teachers
import xar


def check(cfg):
    """Refuse impossible values of the flags of the alignment. Raises ValueError."""
    run.require(cfg, cfg.stop in ("auto", "never") or cfg.stop.isdecimal(), "stop",
                "must be a number of steps, auto or never")
    run.require(cfg, math.isfinite(cfg.stop_threshold), "stop_threshold", "must be a number")
    run.require(cfg, cfg.feature_depth is None or cfg.feature_depth >= 1, "feature_depth",
                "must be 1 or more")


def first_free_step(cfg):
    """Return tau, the first step without alignment; with --stop auto the loop lowers it."""
    if cfg.align == "none":
        return 0
    return math.inf if cfg.stop in ("auto", "never") else int(cfg.stop)


def choose_layers(cfg, depth, deepest, teacher_depth=None, features_only=False):
    """Return the feature depth and the pairs: the table's (haste.ALIGNMENT), or those of the flags.

    The student has `depth` blocks, and the projector may stand behind the first `deepest`. Without
    `teacher_depth`, check only what can be checked before there is a teacher. With --align repa, or
    `features_only`, there are no pairs.
    """
    size = cfg.model.split("/")[0]
    features_only = features_only or cfg.align == "repa"
    feature_depth, pairs = haste.layer_map(size, teacher_depth or haste.TABLE_DEPTH, features_only)
    feature_depth = cfg.feature_depth or feature_depth
    if not 1 <= feature_depth <= deepest:
        part = "model" if deepest == depth else "encoder"
        raise ValueError(f"--feature-depth {feature_depth} must lie in 1 ... {deepest}, the depth "
                         f"of the {part}")
    if cfg.pairs is not None:
        found = re.findall(r"(\d+):(\d+)", cfg.pairs)
        if not found or ",".join(map(":".join, found)) != cfg.pairs:
            raise ValueError(f"--pairs {cfg.pairs} must look like 4:8,5:9 (student block:teacher "
                             f"block)")
        if not features_only:
            pairs = [(int(s), int(t)) for s, t in found]
    bad = [f"{s}:{t}" for s, t in pairs if s >= depth or t >= (teacher_depth or math.inf)]
    if bad:
        known = f"student blocks are 0 ... {depth - 1}"
        if teacher_depth:
            known += f", teacher blocks 0 ... {teacher_depth - 1}"
        raise ValueError(f"--pairs {','.join(bad)}: {known}")
    return feature_depth, pairs


SMALL_TEACHER_BYTES = 2 ** 31                                               # images that it holds in memory, at most
SMALL_TEACHER_IMAGES = 50_000


def make_teacher(cfg, images, grid, processes):
    """Return the frozen teacher, with its position embedding on the student's token grid."""
    def trained():
        print(f"preparing the small teacher (trained once, then kept in {cfg.cache})", flush=True)
        # all images of a small set, evenly spaced ones of a large set
        fit = SMALL_TEACHER_BYTES // (3 * images.size ** 2)
        count = min(len(images.train), SMALL_TEACHER_IMAGES, fit)
        stride = math.ceil(len(images.train) / count)
        pixels, labels = images.train.read(torch.arange(0, len(images.train), stride))
        if isinstance(images.train, scenes.SceneSet):
            labels = scenes.digits_in(labels)
        elif images.text is not None:                                       # no classes: as SimCLR
            labels = None
        net = teachers.train_small(data.to_rgb(pixels), labels, grid, steps=cfg.teacher_steps,
                                   cache=cfg.cache, device=processes.device)
        return net.cpu()                                                    # to be sent to the other processes

    if cfg.teacher != "small":
        net = processes.main_first(lambda: teachers.load_teacher(cfg.teacher, cfg.teacher_weights))
    elif cfg.teacher_weights:
        net = teachers.load_small(cfg.teacher_weights)
    else:
        net = processes.from_main(trained)
    net = net.resize_pos_embed(grid)
    if run.precision(cfg.precision, processes.device) == "bf16":
        round_matrices(net)
    return net.to(processes.device)


def announce(cfg, teacher, tau, feature_depth, pairs, processes):
    """Print what is aligned with which teacher, and until when."""
    until = f"--stop {cfg.stop}" if tau == math.inf else f"until step {tau}"
    shown = " ".join(f"{i}:{j}" for i, j in pairs) or "none"
    processes.print(f"teacher {cfg.teacher}, {teacher.depth} blocks; {until}: features after "
                    f"{feature_depth} blocks, attention of blocks {shown}")
    if cfg.align == "haste" and not pairs:
        processes.print("note: with --entity scale only features are aligned: its coarse tokens "
                        "have no counterpart in the teacher")


def teacher_targets(teacher, pixels, pairs, autocast):
    """Return the teacher's tokens [b,N,D] and taps [(q, k), ...] for uint8 images [b,C,H,W]."""
    with torch.no_grad(), autocast:
        images = teacher.preprocess(data.to_rgb(pixels), teacher.grid)
        return teacher(images, [j for _, j in pairs])


def in_entity_order(model, targets, clean):
    """Return a teacher's tokens [B,L,D] and taps in an xAR's entity order, and who may see whom.

    The mask [L,L] is None if all see all. With a clean context the student's sequence stands twice
    in its taps, and so do the teacher's queries and keys: [B,H,2L,d], [2L,2L].
    """
    tokens, taps = targets                                                  # of the grid, in raster order
    tokens = model.to_tokens(tokens.mT.unflatten(2, (model.grid, -1)))
    copies = 1 if clean is None else 2
    order = model.order.repeat(copies)
    taps = [(q[:, :, order], k[:, :, order]) for q, k in taps]
    mask = None
    if len(model.sizes) > 1:
        mask = xar.visible(model.entity_of, copies)
    return tokens, taps, mask


HELD_BATCH = 64                                                             # images of the held batch


def held_batch(cfg, images, shape, device):
    """Return the batch of --stop auto: the same all through a run, and on every process.

    These are uint8 pixels, clean images or latents x, labels or captions y, and noise [b,*shape].
    """
    g = run.seeded("cpu", cfg.seed, 1)
    rows = torch.randperm(len(images.train), generator=g)[:HELD_BATCH]
    pixels, y = images.train.read(rows)
    if images.text is not None:
        y = images.train.captions(rows, torch.zeros(len(rows)))
    eps = torch.randn(len(rows), *shape, generator=g)
    x = data.to_pixels(pixels)
    if images.packed:
        posterior = torch.randn(len(rows), *images.shape, generator=g)
        mirrored = torch.zeros(len(rows), dtype=torch.bool)
        moments = images.train.moments(rows)
        x = data.to_latents(moments, mirrored, posterior, images.packed["scale"])
    return [tensor.to(device) for tensor in (pixels, x, y, eps)]


def round_matrices(net):
    """Round the weights of Linear layers to bfloat16, as autocast would in every step."""
    for layer in net.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.bfloat16()
