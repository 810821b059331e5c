"""Draw what a teacher sees: patch features as colours, and where a few patches look.

    python -m tools.look photo.jpg                      DINOv2, which is fetched once
    python -m tools.look photo.jpg --teacher mae_vitb16 another one, --help lists them
    python -m tools.look photo.jpg --teacher small      the small teacher of the digits, no download
    python -m tools.look --teacher small                the same for four of the digits

Each image gives one row of the picture: the image; its patches, similar ones in similar colours
(first three principal components); and for each of a few patches, framed in red, its attention to
all patches in the last block (mean over heads).
Letters: N patch tokens, D width, H heads; in image shapes H, W are height and width. A grid is
(rows, columns), and patches are counted in raster order.
"""
import copy
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
import run
import teacher

PROGRAM = "python -m tools.look"
USUAL_GRID = 24                                                             # patches along the short side
SHOWN_DIGITS = 4
HEIGHT = 256                                                                # of a row of the picture, in pixels
GAP = 4                                                                     # white pixels between its parts
FRAME = 2                                                                   # width of a red frame


class View(NamedTuple):
    """An image and what the teacher sees in it."""
    image: torch.Tensor         # uint8 [3,H,W]
    grid: tuple                 # rows and columns of patches
    patches: list               # indices of those whose attention is drawn
    tokens: torch.Tensor        # [N,D]
    attention: torch.Tensor     # [N,N], each row sums to 1


# ---- what the teacher sees

@torch.no_grad()
def features_and_attention(net, image, grid):
    """Return a uint8 image's patch tokens [N,D] and the last block's mean attention [N,N]."""
    net = copy.deepcopy(net).resize_pos_embed(grid)                         # always from the original table
    last = net.depth - 1
    tokens, [(q, k)] = net(net.preprocess(image[None], grid), (last,))
    attention = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)                # [1,H,N,N]
    return tokens[0], attention.mean(1)[0]


def pca_colours(tokens):
    """Return the first three principal components of tokens [M,D] as colours [M,3].

    Each is stretched to [0, 1] from its 2nd to its 98th percentile.
    """
    x = tokens.float() - tokens.float().mean(0)
    _, _, v = torch.linalg.svd(x, full_matrices=False)                      # rows of v: directions
    missing = max(0, 3 - len(v))                                            # fewer than three patches
    x = F.pad(x @ v[:3].T, (0, missing))                                    # [M,3]
    low = x.quantile(0.02, dim=0)
    high = x.quantile(0.98, dim=0)
    return ((x - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)


# ---- the picture

def edges(i, count, length):
    """Return where part `i` of `count` equal parts of `length` pixels begins and ends."""
    return round(i * length / count), round((i + 1) * length / count)


def panels(view, colours):
    """Return one row of the picture, float [3,HEIGHT,width], values in [0, 1]. colours [N,3]."""
    rows, columns = view.grid
    width = round(HEIGHT * columns / rows)
    parts = [view.image.float() / 255, colours.T.view(3, rows, columns)]
    for p in view.patches:
        brightness = view.attention[p] / view.attention[p].max()
        parts.append(brightness.view(1, rows, columns).expand(3, -1, -1))
    # nearest, the default: patches stay visible as squares
    parts = [F.interpolate(part[None], size=(HEIGHT, width))[0] for part in parts]

    # frame the patch that looks: paint it red, and put its inside back
    red = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    for part, p in zip(parts[2:], view.patches):
        top, bottom = edges(p // columns, rows, HEIGHT)
        left, right = edges(p % columns, columns, width)
        inside = part[:, top + FRAME:bottom - FRAME, left + FRAME:right - FRAME].clone()
        part[:, top:bottom, left:right] = red
        part[:, top + FRAME:bottom - FRAME, left + FRAME:right - FRAME] = inside

    row = [parts[0]]
    for part in parts[1:]:
        row += [torch.ones(3, HEIGHT, GAP), part]
    return torch.cat(row, dim=2)


def save_picture(views, path):
    """Save a PNG with one row for each view."""
    # components of all images together: the same colour means the same feature everywhere
    colours = pca_colours(torch.cat([v.tokens for v in views]))
    colours = colours.split([len(v.tokens) for v in views])
    rows = [panels(v, c) for v, c in zip(views, colours)]

    width = max(row.shape[2] for row in rows)
    rows = [F.pad(row, (0, width - row.shape[2], 0, GAP), value=1.0) for row in rows]
    sheet = torch.cat(rows, dim=1)[:, :-GAP]                                # no gap below the last row
    pixels = (sheet * 255).round().byte().permute(1, 2, 0)                  # [height,width,3]
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)
    except Exception as e:
        raise ValueError(f"--out {path} cannot be written: {e}") from None


# ---- the program

def read_image(path):
    """Return the uint8 image [3,H,W] of a file. Raises ValueError with one line."""
    try:
        pixels = np.array(Image.open(path).convert("RGB"))
    except Exception as e:
        raise ValueError(f"{path} is not an image that can be read "
                         f"({type(e).__name__})") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def load_teacher(args):
    """Return the teacher that the flags name; small is trained, or found in --cache."""
    if args.teacher != "small" or args.teacher_weights:
        return teacher.load_teacher(args.teacher, args.teacher_weights)
    digits = data.open_data("digits").train
    return teacher.train_small(data.to_rgb(digits.images), digits.labels, cache=args.cache)


def grid_of(image, along_short_side=None):
    """Return (rows, columns) for a uint8 image [3,H,W], such that its patches are about square."""
    short = min(image.shape[1:])
    if along_short_side is None:
        # a patch for every two pixels at most: more would show nothing but the enlargement
        along_short_side = min(USUAL_GRID, max(1, short // 2))
    return tuple(max(1, round(along_short_side * side / short)) for side in image.shape[1:])


def chosen_patches(text, grid):
    """Return the indices of patches given as row:column,row:column,... or of three usual ones."""
    rows, columns = grid
    places = [(rows // 2, columns // 2), (rows // 4, columns // 4),
              (3 * rows // 4, 3 * columns // 4)]
    if text:
        if not re.fullmatch(r"[0-9]+:[0-9]+(,[0-9]+:[0-9]+)*", text):
            raise ValueError(f"--patches {text} must look like 3:4,10:2 (row:column)")
        places = [[int(i) for i in place.split(":")] for place in text.split(",")]
    if any(r >= rows or c >= columns for r, c in places):
        raise ValueError(f"--patches {text}: rows are 0 ... {rows - 1}, columns are "
                         f"0 ... {columns - 1}")
    return [r * columns + c for r, c in places]


def look(args):
    """Draw the picture that the flags ask for."""
    if args.grid is not None and args.grid < 1:
        raise ValueError(f"--grid {args.grid} must be 1 or more")
    if args.images:
        images = [read_image(path) for path in args.images]
    else:
        images = data.to_rgb(data.open_data("digits").held.images[:SHOWN_DIGITS])
    net = load_teacher(args)

    views = []
    for image in images:
        grid = grid_of(image, args.grid)
        patches = chosen_patches(args.patches, grid)
        views.append(View(image, grid, patches, *features_and_attention(net, image, grid)))
    save_picture(views, args.out)
    print(f"{args.out}: image, patch features as colours, the last block's attention of "
          f"{len(patches)} patches")


def main(argv=None):
    parser = run.Parser(PROGRAM, description="Draw what a teacher sees in images.")
    parser.add_argument("images", nargs="*",
                        help="image files; if none is given, four of the embedded digits")
    parser.add_argument("--teacher", default="dinov2_vitb14",
                        help=f"small, {', '.join(teacher.TEACHERS)}")
    parser.add_argument("--teacher-weights",
                        help="official file; otherwise it is fetched, or small is trained")
    parser.add_argument("--cache", default="out/cache", help="folder that keeps small teachers")
    parser.add_argument("--grid", type=int,
                        help="patches along the short side; otherwise 24, fewer for tiny images")
    parser.add_argument("--patches",
                        help="patches whose attention is drawn, as 3:4,10:2 (row:column); "
                             "otherwise three")
    parser.add_argument("--out", default="out/teacher.png", help="file of the picture, a PNG")
    args = parser.parse_args(argv)
    with run.one_line_errors(PROGRAM):
        look(args)


if __name__ == "__main__":
    main()
