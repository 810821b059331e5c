"""What a training run aligns: its teacher, on the student's grid of tokens, and which layers.

    feature_depth, pairs = align.choose_layers(cfg, teacher.depth)
    teacher = align.make_teacher(cfg, images, grid, processes)

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


def choose_layers(cfg, teacher_depth=None):
    """Return the feature depth and the pairs: the table's (haste.ALIGNMENT), or those of the flags.

    Without `teacher_depth`, check only what can be checked before there is a teacher.
    """
    size = cfg.model.split("/")[0]
    features_only = cfg.align == "repa"
    feature_depth, pairs = haste.layer_map(size, teacher_depth or haste.TABLE_DEPTH, features_only)
    feature_depth = cfg.feature_depth or feature_depth
    if not 1 <= feature_depth <= cfg.depth:
        raise ValueError(f"--feature-depth {feature_depth} must lie in 1 ... {cfg.depth}, the "
                         f"depth of the model")
    if cfg.pairs:
        found = re.findall(r"(\d+):(\d+)", cfg.pairs)
        if ",".join(map(":".join, found)) != cfg.pairs:
            raise ValueError(f"--pairs {cfg.pairs} must look like 4:8,5:9 (student block:teacher "
                             f"block)")
        if not features_only:
            pairs = [(int(s), int(t)) for s, t in found]
    bad = [f"{s}:{t}" for s, t in pairs if s >= cfg.depth or t >= (teacher_depth or math.inf)]
    if bad:
        known = f"student blocks are 0 ... {cfg.depth - 1}"
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


def round_matrices(net):
    """Round the weights of Linear layers to bfloat16, as autocast would in every step."""
    for layer in net.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.bfloat16()
