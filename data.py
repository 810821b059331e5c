"""Training images: the embedded digits, torchvision's small sets, folders of class folders; and the order they come in.

    open_data("digits" | "cifar10" | "mnist" | "fashionmnist" | FOLDER) -> Data

A set answers `read(rows) -> images uint8 [b,C,H,W], labels int64 [b]`. Everything about the order is a pure function of
(seed, step): nothing depends on the number of processes, and a resumed run needs only its step.

digits.npz holds the 1,797 handwritten digits, 8 x 8 pixels with values 0 ... 16, of the test set of "Optical
Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, CC BY 4.0), the same as
scikit-learn's load_digits.
"""
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from PIL import Image

DIGITS_FILE, DIGITS_MAX, DIGITS_TRAIN = Path(__file__).with_name("digits.npz"), 16, 1500
TORCHVISION_SETS = {"cifar10": "CIFAR10", "mnist": "MNIST", "fashionmnist": "FashionMNIST"}
NO_IMAGE = (OSError, SyntaxError, Image.DecompressionBombError)            # what PIL raises for files it cannot read
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


class ArraySet:
    """Images that fit in memory: uint8 [M,C,H,W] with labels [M]."""

    def __init__(self, images, labels):
        self.images, self.labels = torch.as_tensor(images), torch.as_tensor(labels).long()

    def __len__(self):
        return len(self.labels)

    def read(self, rows):
        return self.images[rows], self.labels[rows]


class FolderSet:
    """Photographs in class folders, decoded and cropped when they are asked for."""

    def __init__(self, files, labels, size):
        self.files, self.labels, self.size = files, torch.as_tensor(labels).long(), size
        self.pool = ThreadPoolExecutor(8)                                   # PIL decodes outside the interpreter's lock

    def __len__(self):
        return len(self.files)

    def read_one(self, row):
        with open_image(self.files[row]) as image:
            return torch.from_numpy(np.array(center_crop(image, self.size))).permute(2, 0, 1)      # [3,H,W]

    def read(self, rows):
        return torch.stack(list(self.pool.map(self.read_one, rows))), self.labels[rows]


@dataclass
class Data:
    train: object      # ArraySet or FolderSet
    held: object       # the same, or None where the source holds nothing out
    size: int          # side of an image in pixels
    channels: int      # 1 grey, 3 RGB
    classes: list      # names, in the order of the labels


# ---- sources

def open_data(source, image_size=None, root="out/data"):
    """Open a data set by name or folder. Raises ValueError or OSError with one line that says what to do.

    `image_size` is for folders, whose photographs are cropped to it; the other sets have their own size.
    `root` is where torchvision's sets are kept once downloaded.
    """
    if source != "digits" and source not in TORCHVISION_SETS:
        return _folders(Path(source), image_size)
    data = _digits() if source == "digits" else _torchvision(source, root)
    if image_size not in (None, data.size):
        raise ValueError(f"--image-size {image_size} does not fit --data {source}, whose images are {data.size} pixels "
                         f"wide: leave it out")
    return data


def _digits():
    with np.load(DIGITS_FILE) as f:
        images, labels = f["images"], f["labels"]                           # [1797,8,8] values 0 ... 16
    images = np.round(images * (255 / DIGITS_MAX)).astype(np.uint8)[:, None]
    order = np.random.RandomState(0).permutation(len(images))               # the fixed split; RandomState never changes
    train, held = (ArraySet(images[rows], labels[rows]) for rows in (order[:DIGITS_TRAIN], order[DIGITS_TRAIN:]))
    return Data(train, held, images.shape[-1], 1, [str(i) for i in range(10)])


def _torchvision(name, root):
    import torchvision
    make = getattr(torchvision.datasets, TORCHVISION_SETS[name])
    try:
        sets = [make(root, train=train, download=True) for train in (True, False)]
    except (RuntimeError, OSError, HTTPException) as e:
        raise OSError(f"--data {name} could not be downloaded to {root} ({' '.join(str(e).split())}): connect once, "
                      f"or copy torchvision's files there, or use --data digits") from None
    arrays = []
    for s in sets:
        images = torch.as_tensor(s.data)                                    # [M,H,W] grey or [M,H,W,3]
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        arrays.append(ArraySet(images.contiguous(), s.targets))
    return Data(*arrays, arrays[0].images.shape[-1], arrays[0].images.shape[1], list(sets[0].classes))


def _folders(folder, size):
    """FOLDER/class/*.jpg, or FOLDER/train/class/... with FOLDER/test or FOLDER/val held out."""
    if not folder.is_dir():
        raise ValueError(f"--data {folder} is no folder, and none of digits, {', '.join(TORCHVISION_SETS)}")
    train = folder / "train" if (folder / "train").is_dir() else folder
    held = next((folder / n for n in ("test", "val") if train != folder and (folder / n).is_dir()), None)
    classes = sorted(d.name for d in train.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not classes:
        raise ValueError(f"--data {folder} has no class folders: put each class's images into a folder of their own")
    size = size or _common_size(train)

    def scan(top):
        found = [(f, i) for i, c in enumerate(classes) for f in sorted((top / c).rglob("*"))
                 if f.suffix.lower() in IMAGE_SUFFIXES]
        if not found:
            raise ValueError(f"--data {folder}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}) below {top}")
        files, labels = zip(*found)
        with ThreadPoolExecutor(8) as pool:                                 # headers: a bad file stops the run now
            list(pool.map(lambda f: open_image(f).close(), files))
        return FolderSet(files, labels, size)
    return Data(scan(train), scan(held) if held else None, size, 3, classes)


def _common_size(folder):
    """The side of the first image, where it is square and small; photographs need --image-size."""
    first = next((f for f in sorted(folder.rglob("*")) if f.suffix.lower() in IMAGE_SUFFIXES), None)
    if first is None:
        raise ValueError(f"--data {folder} has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    with open_image(first) as image:
        if image.width == image.height <= 64:
            return image.width
        raise ValueError(f"--data {folder} needs --image-size: {first.name} is {image.width} x {image.height} pixels")


def open_image(path):
    """PIL image, header read. Raises ValueError naming the file when it is none."""
    try:
        return Image.open(path)
    except NO_IMAGE as e:
        raise ValueError(f"{path} is no image that PIL reads ({type(e).__name__}): repair or remove it") from None


def center_crop(image, size):
    """ADM's crop to RGB size x size (Dhariwal & Nichol 2021): halve while large, resize the short side, cut out."""
    try:
        image = image.convert("RGB")                                        # decodes; grey, palette, CMYK and alpha too
    except NO_IMAGE as e:
        name = getattr(image, "filename", "image")
        raise ValueError(f"{name} cannot be decoded ({e}): repair or remove it") from None
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


# ---- order

@lru_cache(maxsize=2)
def _epoch(length, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(length)


def global_rows(length, seed, step, batch_size):
    """Rows of global batch `step`: a pure function of its arguments. Epochs follow one another without a gap."""
    at = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([_epoch(length, seed, int(e))[i] for e, i in zip(at // length, at % length)])


def batches(dataset, seed, start, batch_size, mine=slice(None), pin=False):
    """Endless (images, labels): the rows `mine` of global batches start, start + 1, ...; one batch is read ahead."""
    def read(step):
        batch = dataset.read(torch.from_numpy(global_rows(len(dataset), seed, step, batch_size)[mine]))
        return [b.pin_memory() for b in batch] if pin else batch
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(read, start)
        while True:
            start += 1
            batch, coming = coming.result(), ahead.submit(read, start)
            yield batch


def to_rgb(images):
    """[B,C,H,W] grey or RGB -> [B,3,H,W]."""
    return images.expand(-1, 3, -1, -1)


def to_pixels(images):
    """uint8 [B,C,H,W] -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(pixels, how="round"):
    """[-1, 1] -> uint8, by "round" or "truncate": the papers differ, and FID notices."""
    values = (pixels.float() + 1) * 127.5
    return (values.round() if how == "round" else values).clamp(0, 255).byte()


def save_grid(images, path, columns, zoom=None):
    """uint8 [B,C,H,W] -> one PNG, row by row, small images enlarged to about 64 pixels."""
    B, _, H, W = images.shape
    zoom, rows = zoom or max(1, 64 // H), -(-B // columns)
    canvas = np.full((rows * (H + 1) - 1, columns * (W + 1) - 1, 3), 128, np.uint8)
    for i, image in enumerate(to_rgb(images).permute(0, 2, 3, 1).cpu().numpy()):
        r, c = i // columns * (H + 1), i % columns * (W + 1)
        canvas[r:r + H, c:c + W] = image
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas).resize((canvas.shape[1] * zoom, canvas.shape[0] * zoom), Image.NEAREST).save(path)
