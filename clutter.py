"""Clutter: a handwritten digit somewhere on a canvas of 16 x 16 pixels, among fragments of others.

The class of an image is the digit. It lies at any of 81 places, and with it lie three dimmed pieces
of 4 x 4 pixels, cut out of other digits; where they overlap, the brighter pixel stays (after the
cluttered MNIST of Mnih et al. 2014, arXiv 1406.6247). To draw such an image one has to know which
strokes belong to the digit: here meaning counts, and not only pixels.

No pretrained network judges the samples: a small convolutional classifier is trained once, half a
minute, and kept. It says which digit a sample shows, and gives features for a Frechet distance.

Letters: b images, M digits, N images of a set, F features.
"""
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import run

CANVAS = 16
SIDE = 8                                                                    # of a digit
PIECES = 3
PIECE_SIDE = 4
DIMMED = 0.5                                                                # brightness of the pieces
IMAGES = 30_000                                                             # of the training set
HELD_IMAGES = 2_000


class ClutterSet:
    """Cluttered digits, composed when they are read, from (seed, row) and the digits alone."""

    def __init__(self, images, labels, count, seed):
        """images uint8 [M,1,8,8] and labels [M] of single digits; `count` is N."""
        # A row's random numbers: the digit and its place, then each piece's source, where it is
        # cut out, and where it is put. numpy promises that RandomState never changes.
        u = torch.from_numpy(np.random.RandomState(seed).rand(count, 3 + 5 * PIECES))
        self.images = images[:, 0]                                          # [M,8,8]
        self.digit = whole(u[:, 0], len(images))                            # [N]
        self.place = whole(u[:, 1:3], CANVAS - SIDE + 1)                    # [N,2] top, left
        pieces = u[:, 3:].unflatten(1, (PIECES, 5))                         # [N,P,5]
        other = 1 + whole(pieces[..., 0], len(images) - 1)                  # never the digit itself
        self.source = (self.digit[:, None] + other) % len(images)           # [N,P]
        self.cut = whole(pieces[..., 1:3], SIDE - PIECE_SIDE + 1)           # [N,P,2]
        self.put = whole(pieces[..., 3:5], CANVAS - PIECE_SIDE + 1)         # [N,P,2]
        self.labels = labels[self.digit]

    def __len__(self):
        return len(self.labels)

    def read(self, rows):
        """Return images uint8 [b,1,16,16] and labels [b] of the rows [b]."""
        canvas = torch.zeros(len(rows), CANVAS, CANVAS, dtype=torch.uint8)
        for i in range(PIECES):
            source = self.images[self.source[rows, i]]                      # [b,8,8]
            piece = source[window(self.cut[rows, i], PIECE_SIDE)]           # [b,4,4]
            paste(canvas, (DIMMED * piece).byte(), self.put[rows, i])
        paste(canvas, self.images[self.digit[rows]], self.place[rows])
        return canvas[:, None], self.labels[rows]


def whole(u, n):
    """Return the whole numbers 0 ... n - 1 that u in [0, 1) stands for."""
    return (u * n).long()


def window(corner, side):
    """Return an index of the squares [b,side,side] at the corners [b,2] of images [b,H,W]."""
    b = torch.arange(len(corner))[:, None, None]
    i = torch.arange(side)
    top, left = corner.T[:, :, None, None]
    return b, top + i[:, None], left + i


def paste(canvas, squares, corner):
    """Put squares [b,side,side] onto canvas [b,H,W]; of two pixels the brighter one stays."""
    place = window(corner, squares.shape[-1])
    canvas[place] = torch.maximum(canvas[place], squares)


# ---- the judge

class Judge(nn.Module):
    """A small convolutional classifier: uint8 images [b,1,16,16] -> features [b,F], logits [b,10].

    Over the training images, every feature that responds has about mean 0 and deviation 1.
    """

    def __init__(self, width=32, features=64, classes=10):
        super().__init__()
        layers = []
        channels = 1
        for out, stride in ((width, 1), (width, 2), (2 * width, 1), (2 * width, 2)):
            layers += [nn.Conv2d(channels, out, 3, stride, padding=1, bias=False),
                       nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.body = nn.Sequential(*layers, nn.Conv2d(channels, features, 3), nn.ReLU(),
                                  nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.scale = nn.BatchNorm1d(features, affine=False)
        self.classify = nn.Linear(features, classes)

    def forward(self, images):
        features = self.scale(self.body(images.float() / 127.5 - 1))
        return features, self.classify(features)


def make_judge(train, cache, steps=1000, batch_size=64, lr=3e-3, seed=0):
    """Return a Judge of a ClutterSet, in eval mode on the CPU: trained, or found in `cache`.

    Raises ValueError or OSError, one line, if the file there is damaged or cannot be written.
    """
    g = run.seeded("cpu", seed)
    images, labels = train.read(torch.arange(len(train)))
    key = repr((steps, batch_size, lr, seed)).encode() + images.numpy().tobytes()
    path = Path(cache, f"judge-{hashlib.sha256(key).hexdigest()[:12]}.pt")
    with torch.random.fork_rng(devices=[]):                                 # the caller's random numbers stay
        torch.manual_seed(seed)
        judge = Judge()
    if path.exists():
        try:
            judge.load_state_dict(torch.load(path, weights_only=True))
        except Exception as e:
            raise ValueError(f"{path} is damaged ({type(e).__name__}): delete it, and the "
                             f"classifier is trained again") from None
        return judge.eval().requires_grad_(False)

    print(f"preparing the classifier of clutter (trained once, then kept in {cache})", flush=True)
    opt = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.05)
    for step in range(steps):
        for group in opt.param_groups:
            group["lr"] = lr * (1 - step / steps)
        rows = torch.randint(len(images), (batch_size,), generator=g)
        _, logits = judge(images[rows])
        F.cross_entropy(logits, labels[rows], label_smoothing=0.1).backward()
        opt.step()
        opt.zero_grad()
    judge.eval().requires_grad_(False)
    partial = path.with_suffix(f".{os.getpid()}.partial")                   # two runs may do this at once
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(judge.state_dict(), partial)
        partial.replace(path)                                               # whole or not at all
    except (OSError, RuntimeError) as e:
        raise OSError(f"--cache {cache} cannot be written ({e}): choose another place") from None
    return judge
