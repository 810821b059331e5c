"""Training images: the embedded digits, torchvision's small sets, folders of class folders; and the order they come in.

    open_data("digits" | "cifar10" | "mnist" | "fashionmnist" | FOLDER | PACKED) -> Data
    python data.py prepare FOLDER PACKED        crops and encodes a folder of photographs once: packed.py

A set answers `read(rows) -> images uint8 [b,C,H,W], labels int64 [b]`. Everything about the order is a pure function of
(seed, step): nothing depends on the number of processes, and a resumed run needs only its step.

digits.npz holds the 1,797 handwritten digits, 8 x 8 pixels with values 0 ... 16, of the test set of "Optical
Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, CC BY 4.0), the same as
scikit-learn's load_digits.
"""
import math
import os
import pickle
import re
import struct
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from PIL import Image

DIGITS_FILE, DIGITS_MAX, DIGITS_TRAIN = Path(__file__).with_name("digits.npz"), 16, 1500
TORCHVISION_SETS = {"cifar10": "CIFAR10", "mnist": "MNIST", "fashionmnist": "FashionMNIST"}
NO_ARCHIVE = (OSError, KeyError, EOFError, struct.error, zipfile.BadZipFile, zlib.error)     # what zip and numpy raise
NO_IMAGE = (OSError, SyntaxError, Image.DecompressionBombError)            # what PIL raises for files it cannot read
LONGEST = 100                                                               # of panoramas, in short sides
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
    packed: Optional[dict] = None  # packed sets: what data.json says (channels, latent_size, scale, vae, mirror ...)

    @property
    def shape(self):
        """[C,h,w] of what a model learns to make: latents where there are any, else pixels."""
        p = self.packed
        return (p["channels"], p["latent_size"], p["latent_size"]) if p else (self.channels, self.size, self.size)


# ---- sources

def open_data(source, image_size=None, root="out/data"):
    """Open a data set by name or folder. Raises ValueError or OSError with one line that says what to do.

    `image_size` is for folders, whose photographs are cropped to it; the other sets have their own size.
    `root` is where torchvision's sets are kept once downloaded.
    """
    if source != "digits" and source not in TORCHVISION_SETS:
        if Path(source, "data.json").is_file():
            import packed
            return packed.open_packed(source, image_size)
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


def class_folders(folder, flag="--data"):
    """FOLDER/class/..., or FOLDER/train/class/... -> the folder of the classes, and their names, sorted."""
    if not folder.is_dir():
        sets = f" of images or from data.py prepare, and none of digits, {', '.join(TORCHVISION_SETS)}"
        raise ValueError(f"{flag} {folder} is no folder" + (sets if flag == "--data" else ""))
    top = folder / "train" if (folder / "train").is_dir() else folder
    classes = sorted(d.name for d in top.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not classes:
        raise ValueError(f"{flag} {folder} has no class folders: put each class's images into a folder of their own")
    return top, classes


def class_files(top, classes, flag="--data"):
    """Files and labels of all images below the class folders, in a fixed order."""
    found = [(f, i) for i, c in enumerate(classes) for f in sorted((top / c).rglob("*"))
             if f.suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        raise ValueError(f"{flag} {top}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in its class folders")
    return zip(*found)


def _folders(folder, size):
    """FOLDER/class/*.jpg, or FOLDER/train/class/... with FOLDER/test or FOLDER/val held out."""
    top, classes = class_folders(folder)
    held = next((folder / n for n in ("test", "val") if top != folder and (folder / n).is_dir()), None)
    size = size or _common_size(top)

    def scan(top):
        files, labels = class_files(top, classes)
        with ThreadPoolExecutor(8) as pool:                                 # headers: a bad file stops the run now
            list(pool.map(lambda f: open_image(f).close(), files))
        return FolderSet(files, labels, size)
    return Data(scan(top), scan(held) if held else None, size, 3, classes)


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
    """PIL image, header read. Raises ValueError naming the file when it is none, or deeper than 8 bits a channel."""
    try:
        image = Image.open(path)
    except NO_IMAGE as e:
        if getattr(e, "errno", None):                                       # the disk's fault, not the image's
            raise
        raise ValueError(f"{path} is no image that PIL reads ({type(e).__name__}): repair or remove it") from None
    raw = f"{image.mode} {[tile[3] for tile in image.tile]}"                # PIL would clip what is deeper
    if image.mode in ("I", "F") or re.search(r"\b(I|LA?|RGBA?);16", raw):
        raise ValueError(f"{path} has more than 8 bits a channel: convert it to 8 bits first")
    return image


def center_crop(image, size):
    """ADM's crop to RGB size x size (Dhariwal & Nichol 2021): halve while large, resize the short side, cut out."""
    name = getattr(image, "filename", "image")
    if max(image.size) > LONGEST * min(image.size):                         # enlarged, it would fill the memory
        raise ValueError(f"{name} is {image.width} x {image.height} pixels, more than {LONGEST} times as long as wide: "
                         f"remove it")
    try:
        image = image.convert("RGB")                                        # decodes; grey, palette, CMYK and alpha too
    except NO_IMAGE as e:
        if getattr(e, "errno", None):
            raise
        raise ValueError(f"{name} cannot be decoded ({e}): repair or remove it") from None
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


# ---- images to be compared, by fid.py: exactly as they are

class ImageFiles:
    """A folder's images, any depth: a length, and slices as uint8 [B,3,H,W].

    In the order of their paths; those of several folders, which may be classes, in a fixed random order, so that the
    Inception Score's splits of consecutive images have all classes.
    """

    def __init__(self, folder, crop=None):
        found = [Path(top, name) for top, _, names in os.walk(folder, followlinks=True) for name in names]
        self.files = sorted(f for f in found if f.suffix.lower() in IMAGE_SUFFIXES)
        if not self.files:
            raise ValueError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        if len({f.parent for f in self.files}) > 1:
            self.files = [self.files[i] for i in np.random.RandomState(0).permutation(len(self.files))]
        self.crop, self.pool = crop, ThreadPoolExecutor(8)
        self.size = read_image(self.files[0], crop).size

    def __len__(self):
        return len(self.files)

    def __getitem__(self, rows):
        images = list(self.pool.map(lambda f: read_image(f, self.crop), self.files[rows]))
        for file, image in zip(self.files[rows], images):
            if image.size != self.size:
                raise ValueError(f"images of mixed sizes: {file} is {image.width} x {image.height}, {self.files[0]} is "
                                 f"{self.size[0]} x {self.size[1]}; --crop SIZE cuts all to one size")
        return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images])


def read_image(path, crop=None):
    """File -> PIL image in RGB, cropped to a square where asked for; nothing is silently rounded or made opaque."""
    try:
        with open_image(path) as image:
            image.load()
    except NO_IMAGE as e:
        raise ValueError(f"{path} cannot be decoded ({e}): repair or remove it") from None
    if "A" in image.getbands() or "transparency" in image.info:
        if image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
            raise ValueError(f"{path} is partly transparent: put it on a background first")
    return center_crop(image, crop) if crop else image.convert("RGB")


class ImageArchive:
    """Images of an .npz (`arr_0`, uint8 [N,H,W,3], as ADM's), read piece by piece: 50,000 would fill the memory."""

    def __init__(self, path):
        self.path, self.file = path, zipfile.ZipFile(path).open("arr_0.npy")
        header = np.lib.format.read_array_header_1_0 if np.lib.format.read_magic(self.file)[0] == 1 \
            else np.lib.format.read_array_header_2_0
        self.shape, fortran, dtype = header(self.file)
        self.right = dtype == np.uint8 and len(self.shape) == 4 and self.shape[3] in (1, 3) and not fortran
        self.start, self.image_bytes = self.file.tell(), math.prod(self.shape[1:])

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        first, last, _ = rows.indices(len(self))
        try:
            self.file.seek(self.start + first * self.image_bytes)
            pixels = bytearray(self.file.read((last - first) * self.image_bytes))
            images = np.frombuffer(pixels, np.uint8).reshape(last - first, *self.shape[1:])
        except (ValueError, *NO_ARCHIVE) as e:
            raise ValueError(f"{self.path} is damaged at images {first} to {last} ({e}): copy it again") from None
        return torch.from_numpy(images).permute(0, 3, 1, 2)


def open_images(source, crop=None):
    """Images to be compared, or statistics made from them -> (images or None, {"mu": ..., "sigma": ...} or None).

    `source` is a folder, an .npz (`arr_0`, or statistics, or both), a .pt with a tensor uint8 [N,C,H,W], or a set's
    name, which stands for its training images. Images have a length and slices, uint8 [B,C,H,W].
    Raises ValueError or OSError with one line.
    """
    path, stats = Path(source), {}
    if source == "digits" or source in TORCHVISION_SETS:
        return open_data(source).train.images, None
    if path.is_dir():
        return ImageFiles(path, crop), None
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a folder of images, an .npz, a .pt with a tensor, or one "
                                f"of digits, {', '.join(TORCHVISION_SETS)}")
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path) as f:
                names = f.files
                stats = {n: f[n] for n in ("mu", "sigma", "mu_s", "sigma_s", "num", "features") if n in names}
            images = ImageArchive(path) if "arr_0" in names else None
        else:
            images = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (ValueError, RuntimeError, pickle.UnpicklingError, *NO_ARCHIVE) as e:
        raise ValueError(f"{path} cannot be read ({' '.join(str(e).split()) or type(e).__name__}): cut short, or "
                         f"neither .npz nor .pt") from None
    stats = stats if {"mu", "sigma"} <= stats.keys() else None
    if images is None and stats is None:
        raise ValueError(f"{path} holds neither images (arr_0) nor statistics (mu, sigma) but {', '.join(names)}")
    if isinstance(images, ImageArchive) and not images.right:
        raise ValueError(f"{path}: arr_0 is no images, uint8 [N,H,W,3]")
    if not isinstance(images, (ImageArchive, type(None))) and not (
            isinstance(images, torch.Tensor) and images.dtype == torch.uint8 and images.ndim == 4
            and images.shape[1] in (1, 3)):
        raise ValueError(f"{path} holds no tensor of images, uint8 [N,3,H,W]")
    return images, stats


# ---- order

@lru_cache(maxsize=2)
def _epoch(length, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(length)


def global_rows(length, seed, step, batch_size):
    """Rows of global batch `step`: a pure function of its arguments. Epochs follow one another without a gap."""
    at = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([_epoch(length, seed, int(e))[i] for e, i in zip(at // length, at % length)])


def batches(dataset, seed, start, batch_size, mine=slice(None), pin=False, wanted=lambda step: True):
    """Endless (images, moments, labels): the rows `mine` of global batches start, start + 1, ...; one is read ahead.

    Only packed sets have moments; their images are None in steps where `wanted(step)` is false: nobody looks at them.
    """
    def read(step):
        rows = torch.from_numpy(global_rows(len(dataset), seed, step, batch_size)[mine])
        moments = dataset.moments(rows) if hasattr(dataset, "moments") else None
        images = dataset.read(rows)[0] if moments is None or wanted(step) else None
        batch = images, moments, dataset.labels[rows]
        return [b.pin_memory() if pin and b is not None else b for b in batch]
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(read, start)
        while True:
            start += 1
            batch, coming = coming.result(), ahead.submit(read, start)
            yield batch


def mirror(images, mirrored):
    """Mirror the images [b,C,H,W] (or None) for which mirrored [b] is true."""
    return None if images is None else torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


def to_latents(moments, mirrored, noise, scale):
    """A draw from the autoencoder's posterior: moments [b,V,2C,h,w], noise [b,C,h,w] -> scaled latents [b,C,h,w]."""
    views = mirrored.long() if moments.shape[1] == 2 else torch.zeros_like(mirrored, dtype=torch.long)
    mean, std = moments[torch.arange(len(moments), device=moments.device), views].float().chunk(2, dim=1)
    return scale * (mean + std * noise)


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
    (B, _, H, W), columns = images.shape, min(columns, len(images))
    zoom, rows = zoom or max(1, 64 // H), -(-B // columns)
    canvas = np.full((rows * (H + 1) - 1, columns * (W + 1) - 1, 3), 128, np.uint8)
    for i, image in enumerate(to_rgb(images).permute(0, 2, 3, 1).cpu().numpy()):
        r, c = i // columns * (H + 1), i % columns * (W + 1)
        canvas[r:r + H, c:c + W] = image
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas).resize((canvas.shape[1] * zoom, canvas.shape[0] * zoom), Image.NEAREST).save(path)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] != ["prepare"]:
        raise SystemExit("data.py: say what to do: python data.py prepare FOLDER OUT (--help lists the flags)")
    import packed
    packed.main(argv[1:])


if __name__ == "__main__":
    main()
