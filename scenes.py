"""Scenes: one or two handwritten digits on a canvas of 16 x 16 pixels, with captions.

    "a large four"                  a digit of twice its size fills the canvas
    "a four in the upper left"      a digit in one of the four corners
    "a four left of a seven"        two digits, also "a seven right of a four"; or above and below

This world is so small that no pretrained network is needed to judge a sample: a caption says which
digits are to be seen, and where. The named boxes are cut out, and each is compared with real
digits. 20 of the 100 ordered pairs never occur in training: how well these are drawn shows whether
a model has learnt words, or only whole sentences. Twenty-one words are not language.

A scene's *meaning* is one of 250 numbers: 10 large digits, 40 in corners, 200 pairs.

Letters: b scenes, M digits, L words of a caption.
"""
import numpy as np
import torch
import torch.nn.functional as F

import text

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = (*DIGITS, "a", "large", "in", "the", "upper", "lower", "left", "right", "of", "above",
         "below")
LONGEST = 6                                                                 # words
TEXT = dict(encoder="words", words=list(WORDS), length=LONGEST, width=64)

CANVAS = 16
SIDE = 8                                                                    # of a digit
CORNERS = {"upper left": (0, 0), "upper right": (0, 8), "lower left": (8, 0), "lower right": (8, 8)}
# where the first and the second digit of a pair are, and the two ways to say it
RELATIONS = ((((4, 0), (4, 8)), "left of", "right of"),
             (((0, 4), (8, 4)), "above", "below"))
UNSEEN_STEPS = (3, 7)   # pairs (a, b) with b - a = 3 or 7, modulo 10, do not occur in training

SCENES = 30_000                                                             # of the training set
HELD_SCENES = 2_000
SHARES = dict(large=0.25, corner=0.25, pair=0.5)


class Meaning:
    """What a scene shows: digits, their boxes (top, left, side), and the captions that say so."""

    def __init__(self, number):
        if number < 10:
            self.kind = "large"
            self.digits = [number]
            self.boxes = [(0, 0, CANVAS)]
            name = DIGITS[number]
            self.captions = [f"a large {name}", f"the large {name}"]
        elif number < 50:
            corner = list(CORNERS)[number // 10 - 1]
            self.kind = "corner"
            self.digits = [number % 10]
            self.boxes = [(*CORNERS[corner], SIDE)]
            name = DIGITS[number % 10]
            self.captions = [f"a {name} in the {corner}", f"in the {corner} a {name}"]
        else:
            places, forth, back = RELATIONS[(number - 50) // 100]
            self.kind = "pair"
            self.digits = [(number - 50) // 10 % 10, number % 10]
            self.boxes = [(*place, SIDE) for place in places]
            first, second = (DIGITS[digit] for digit in self.digits)
            self.captions = [f"a {first} {forth} a {second}", f"a {second} {back} a {first}"]
        self.unseen = self.kind == "pair" and (self.digits[1] - self.digits[0]) % 10 in UNSEEN_STEPS


MEANINGS = [Meaning(number) for number in range(250)]
UNSEEN = [number for number, meaning in enumerate(MEANINGS) if meaning.unseen]


def compose(meanings, choice, images, labels):
    """Return scenes uint8 [b,1,16,16] of these meanings [b].

    choice [b,2] in [0, 1) says which images of a digit are taken: of images uint8 [M,1,8,8] with
    labels [M].
    """
    canvases = torch.zeros(len(meanings), 1, CANVAS, CANVAS, dtype=torch.uint8)
    for number in meanings.unique().tolist():
        rows = (meanings == number).nonzero()[:, 0]
        meaning = MEANINGS[number]
        for digit, (top, left, side), u in zip(meaning.digits, meaning.boxes, choice[rows].T):
            candidates = (labels == digit).nonzero()[:, 0]
            image = images[candidates[(u * len(candidates)).long()]]        # [b,1,8,8]
            zoom = side // SIDE
            image = image.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
            canvases[rows, :, top:top + side, left:left + side] = image
    return canvases


class SceneSet:
    """Scenes, which depend on the seed and the digits alone. Their labels are their meanings."""

    def __init__(self, images, labels, count, seed):
        """images uint8 [M,1,8,8] and labels [M] of single digits."""
        self.digits = images, labels
        # numpy promises that RandomState never changes
        rng = np.random.RandomState(seed)
        seen = [number for number in range(len(MEANINGS)) if number not in UNSEEN]
        kinds = [MEANINGS[number].kind for number in seen]
        shares = [SHARES[kind] / kinds.count(kind) for kind in kinds]
        self.labels = torch.from_numpy(rng.choice(seen, count, p=shares)).long()
        self.scenes = compose(self.labels, torch.from_numpy(rng.rand(count, 2)), images, labels)

        tokenizer = text.WordTokenizer(WORDS, LONGEST)
        self.ids = torch.stack([tokenizer(m.captions) for m in MEANINGS])   # [250,2,L]
        self.null = tokenizer([""])[0]

    def __len__(self):
        return len(self.labels)

    def read(self, rows):
        """Return images uint8 [b,1,16,16] and meanings [b] of the rows [b]."""
        return self.scenes[rows], self.labels[rows]

    def captions(self, rows, u):
        """Return a caption of each row, ids [b,L]: the first or the second, by u [b] in [0, 1)."""
        return self.ids[self.labels[rows], (torch.as_tensor(u) * 2).long()]


def digits_in(meanings):
    """Return a class [b] for each of the meanings [b]: which digits, wherever and however large."""
    classes = {}
    found = [tuple(sorted(MEANINGS[m].digits)) for m in meanings]
    return torch.tensor([classes.setdefault(digits, len(classes)) for digits in found])


EXAMPLES = ["a large four", "a five in the upper left", "in the lower right a two",
            "a seven left of a three", "a three right of a seven", "a six above a nine",
            "a nine below a six", "a one left of a four"]                   # the last one is not in the training set


# ---- scores

def judge(samples, meanings, images, labels):
    """Return for each sample whether all named digits are right, and its share of ink in place.

    samples uint8 [b,1,16,16], meanings [b], images uint8 [M,1,8,8] and labels [M] of real digits.
    A digit is right if the real one nearest to its box has its label. Both results are [b], bool
    and float; the ink of large digits, whose box is the canvas, is nan.
    """
    real = images.float().flatten(1)                                        # [M,64]
    right = torch.ones(len(samples), dtype=torch.bool)
    inside = torch.zeros(len(samples))
    for i, sample in enumerate(samples.float()):
        meaning = MEANINGS[meanings[i]]
        for digit, (top, left, side) in zip(meaning.digits, meaning.boxes):
            box = sample[:, top:top + side, left:left + side]
            inside[i] += box.sum()
            box = F.avg_pool2d(box, side // SIDE).flatten()                 # [64]
            right[i] &= labels[(real - box).square().sum(1).argmin()] == digit
        if meaning.kind == "large":
            inside[i] = torch.nan
    ink = samples.float().sum((1, 2, 3)).clamp(min=1)
    return right, inside / ink


def meanings_to_draw(held, count):
    """Return the meanings of an evaluation's samples: `count` seen ones, and half as many unseen.

    held: the SceneSet of held-out digits, whose first meanings are taken.
    """
    seen = held.labels[torch.arange(count) % len(held)]
    unseen = torch.tensor(UNSEEN)[torch.arange(max(1, count // 2)) % len(UNSEEN)]
    return seen, unseen


def captions_of(meanings):
    """Return a caption of each meaning, a string: the first and the second phrasing in turn."""
    return [MEANINGS[m].captions[i % 2] for i, m in enumerate(meanings)]
