"""Training images: digits, torchvision's small sets, folders of photographs, and packed folders.

    data = open_data("digits" | "scenes" | "clutter" | "cifar10" | "mnist" | ... | FOLDER | PACKED)
    images, labels = data.train.read(rows)                      # uint8 [b,C,H,W], int64 [b]
    for images, moments, labels, _ in batches(data.train, seed=0, start=0, batch_size=256): ...

PACKED is what prepare.py makes of FOLDER (packed.py). The order of the images is a pure function of
(seed, step): nothing depends on the number of processes, and a resumed run needs only its step.

digits.npz holds the 1,797 handwritten digits, 8 x 8 pixels with values 0 ... 16, of the test set of
"Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository, CC BY 4.0), the same as scikit-learn's load_digits.

Letters: N rows of a set, b rows read, C channels, H W (or S) side in pixels, h w side of a latent.
"""
import hashlib
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from PIL import Image

import clutter
import scenes
from packed import CaptionedSet, PackedSet, line_of, read_about

DIGITS_FILE = Path(__file__).with_name("digits.npz")
DIGITS_MAX = 16         # the brightest value
DIGITS_TRAIN = 1500     # the others are held out
TORCHVISION_SETS = {"cifar10": "CIFAR10", "mnist": "MNIST", "fashionmnist": "FashionMNIST"}
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
CROPS = ("adm", "square-lanczos")       # kinds of center_crop
MAX_ASPECT = 100        # a longer panorama would fill the memory when its short side is enlarged
READERS = 8             # threads that wait for the disk, or decode: PIL works outside Python's lock


class ArraySet:
    """Images that fit in memory: uint8 [N,C,H,W] with labels [N]."""

    def __init__(self, images, labels):
        self.images = torch.as_tensor(images)
        self.labels = torch.as_tensor(labels).long()

    def __len__(self):
        return len(self.labels)

    def read(self, rows):
        return self.images[rows], self.labels[rows]


class FolderSet:
    """Photographs in class folders, decoded and cropped when they are read."""

    def __init__(self, files, labels, size):
        self.files = files
        self.labels = torch.as_tensor(labels).long()
        self.size = size
        self.pool = ThreadPoolExecutor(READERS)

    def __len__(self):
        return len(self.files)

    def read_one(self, row):
        with open_image(self.files[row]) as image:
            pixels = np.array(center_crop(image, self.size))            # [S,S,3]
        return torch.from_numpy(pixels).permute(2, 0, 1)                # [3,S,S]

    def read(self, rows):
        return torch.stack(list(self.pool.map(self.read_one, rows))), self.labels[rows]


@dataclass
class Data:
    """A data set, and what it requires of a model."""

    train: object      # ArraySet, FolderSet, PackedSet, CaptionedSet, SceneSet or ClutterSet
    held: object       # the same, or None if nothing is held out
    size: int          # side of an image in pixels
    channels: int      # 1 grey, 3 RGB
    classes: list      # names, in the order of the labels
    packed: Optional[dict] = None  # of packed sets: what data.json says (packed.py)
    text: Optional[dict] = None  # of sets with captions: what encodes them, see text.py

    @property
    def shape(self):
        """Return [C,h,w] of what a model learns: latents if the set is packed, else pixels."""
        if self.packed:
            side = self.packed["latent_size"]
            return self.packed["channels"], side, side
        return self.channels, self.size, self.size

    def fingerprint(self):
        """Return a hash that copies of a set share, of its labels and a few of its samples."""
        rows = torch.arange(0, len(self.train), max(1, len(self.train) // 16))
        if self.packed:
            samples = self.train.moments(rows)
        else:
            samples, _ = self.train.read(rows)
        words = repr((self.shape, self.classes, self.packed)).encode()
        for tensor in (self.train.labels, samples):
            words += tensor.numpy().tobytes()
        return hashlib.sha256(words).hexdigest()[:16]

    def mean(self, mirrored, most=50_000):
        """Return the mean [C,h,w] of what a model is trained on: images in [-1, 1], or latents.

        It is taken over all training images, or over `most` evenly spaced ones; each counts with
        its mirror image if `mirrored`.
        """
        total = 0
        rows = torch.arange(0, len(self.train), math.ceil(len(self.train) / most))
        for part in rows.split(256):
            if self.packed:
                views, _ = self.train.moments(part).double().chunk(2, dim=2)                # [b,V,C,h,w]
                x = self.packed["scale"] * views[:, :1 + mirrored].mean(1)
            else:
                x = to_pixels(self.train.read(part)[0]).double()
                if mirrored:
                    x = (x + x.flip(-1)) / 2
            total = total + x.sum(0)
        return (total / len(rows)).float()

    def check(self, cfg, saved, **arch):
        """Refuse data that does not fit the flags, or the checkpoint to resume from.

        cfg: a training program's configuration. saved: the checkpoint, or None. `arch` is what the
        data requires of the model, under the names of the checkpoint's "arch". Raises ValueError.
        """
        packed = self.packed
        if isinstance(self.train, clutter.ClutterSet) and cfg.eval_features != "pixels":
            raise ValueError(f"--eval-features {cfg.eval_features} is for photographs: leave it "
                             f"out, --data {cfg.data} has a classifier of its own")
        if cfg.latent_channels is not None and not packed:
            raise ValueError(f"--latent-channels {cfg.latent_channels} is for packed data, and "
                             f"--data {cfg.data} is not: run prepare.py on the photographs and "
                             f"name its folder")
        if packed and cfg.latent_channels not in (None, packed["channels"]):
            raise ValueError(f"--latent-channels {cfg.latent_channels} is not what --data "
                             f"{cfg.data} has, {packed['channels']} (--vae {packed['vae']}): "
                             f"prepare it with the other autoencoder")
        if packed and cfg.mirror and not packed["mirror"]:
            raise ValueError(f"--mirror {cfg.mirror} needs the mirror images' latents, and --data "
                             f"{cfg.data} has none: give --no-mirror, or prepare it with --mirror")
        if not saved:
            return

        was = saved["arch"]
        now = {**arch, "num_classes": len(self.classes)}
        if self.text is not None:
            now = {**arch, "context_dim": self.text["width"]}
        wrong = ", ".join(f"{k} {v} (was {was[k]})" for k, v in now.items() if was[k] != v)
        before = saved.get("packed_from")
        if packed and before and packed["fingerprint"] != before["fingerprint"]:
            wrong = wrong or f"another autoencoder, {packed['vae']} (was {before['vae']})"
        encoders = [text.get("fingerprint") for text in (self.text, saved.get("text")) if text]
        if len(set(encoders)) > 1:
            wrong = wrong or "another text encoder"
        if wrong:
            raise ValueError(f"--data {cfg.data} is not what the checkpoint was trained on: "
                             f"{wrong}. Put that data back, or start over with another --out")


# ---- sources

def open_data(source, image_size=None, root="out/data"):
    """Return the Data of a set's name or of a folder. Raises ValueError or OSError, one line.

    `image_size` is for folders of photographs, which are cropped to it; the other sets have a size
    of their own. `root` is where torchvision keeps the sets that it has downloaded.
    """
    if source == "digits":
        data = _digits()
    elif source == "scenes":
        data = _scenes()
    elif source == "clutter":
        data = _clutter()
    elif source in TORCHVISION_SETS:
        data = _torchvision(source, root)
    elif Path(source, "data.json").is_file():
        about = read_about(source)
        kind = CaptionedSet if about["text"] else PackedSet
        data = Data(kind(source), None, about["size"], 3, about["classes"], about, about["text"])
    else:
        return _folders(Path(source), image_size)

    if image_size not in (None, data.size):
        remedy = "leave it out"
        if data.packed:
            remedy += ", or prepare the images again"
        raise ValueError(f"--image-size {image_size} does not fit --data {source}, whose images "
                         f"are {data.size} pixels wide: {remedy}")
    return data


def open_alike(cfg, processes):
    """Return the Data of --data, if all processes have the same. Raises ValueError or OSError."""
    def open_it():
        return processes.main_first(lambda: open_data(cfg.data, cfg.image_size, cfg.data_root))

    def describe(images):
        return [f"--data {cfg.data} with the fingerprint {images.fingerprint()}"]

    return processes.alike(open_it, describe, "copy the data from one machine to the others")


def _digits():
    with np.load(DIGITS_FILE) as f:
        images = f["images"]                                            # [1797,8,8] values 0 ... 16
        labels = f["labels"]
    images = np.round(images * (255 / DIGITS_MAX)).astype(np.uint8)[:, None]    # [1797,1,8,8]

    # the fixed split; numpy promises that RandomState never changes
    order = np.random.RandomState(0).permutation(len(images))
    train = order[:DIGITS_TRAIN]
    held = order[DIGITS_TRAIN:]
    return Data(ArraySet(images[train], labels[train]), ArraySet(images[held], labels[held]),
                images.shape[-1], 1, [str(i) for i in range(10)])


def _scenes():
    digits = _digits()
    train = scenes.SceneSet(digits.train.images, digits.train.labels, scenes.SCENES, seed=0)
    held = scenes.SceneSet(digits.held.images, digits.held.labels, scenes.HELD_SCENES, seed=1)
    return Data(train, held, scenes.CANVAS, 1, [], text=scenes.TEXT)


def _clutter():
    digits = _digits()
    train = clutter.ClutterSet(digits.train.images, digits.train.labels, clutter.IMAGES, seed=0)
    held = clutter.ClutterSet(digits.held.images, digits.held.labels, clutter.HELD_IMAGES, seed=1)
    return Data(train, held, clutter.CANVAS, 1, digits.classes)


def _torchvision(name, root):
    import torchvision
    make = getattr(torchvision.datasets, TORCHVISION_SETS[name])
    try:
        sets = [make(root, train=train, download=True) for train in (True, False)]
    except Exception as e:
        raise OSError(f"--data {name} could not be downloaded to {root} ({line_of(e)}): connect "
                      f"once, or copy torchvision's files there, or use --data digits") from None
    arrays = []
    for s in sets:
        images = torch.as_tensor(s.data)                                # [N,H,W] grey or [N,H,W,3]
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        arrays.append(ArraySet(images.contiguous(), s.targets))
    train, held = arrays
    return Data(train, held, train.images.shape[-1], train.images.shape[1], list(sets[0].classes))


def class_folders(folder, flag="--data"):
    """Return the folder that holds the class folders, and the names of the classes, sorted.

    It is FOLDER/train if that exists, else FOLDER. `flag` is what error messages call the folder.
    """
    if not folder.is_dir():
        problem = f"{flag} {folder} is not a folder"
        if flag == "--data":
            problem += (f" of images or of prepare.py, nor one of digits, scenes, clutter, "
                        f"{', '.join(TORCHVISION_SETS)}")
        raise ValueError(problem)
    top = folder / "train" if (folder / "train").is_dir() else folder
    classes = sorted(d.name for d in top.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not classes:
        raise ValueError(f"{flag} {folder} has no class folders: put the images of each class into "
                         f"a folder of their own")
    return top, classes


def class_files(top, classes, flag="--data"):
    """Return files and labels of all images below the class folders, in a fixed order."""
    files = []
    labels = []
    for label, name in enumerate(classes):
        found = [f for f in sorted((top / name).rglob("*")) if f.suffix.lower() in IMAGE_SUFFIXES]
        files += found
        labels += [label] * len(found)
    if not files:
        raise ValueError(f"{flag} {top}: no images ({', '.join(IMAGE_SUFFIXES)}) in its class "
                         f"folders")
    return files, labels


def _folders(folder, size):
    """Open FOLDER/class/*.jpg, or FOLDER/train/class/* with FOLDER/test or FOLDER/val held out."""
    top, classes = class_folders(folder)
    size = size or _common_size(top, class_files(top, classes)[0][0])

    def scan(top):
        files, labels = class_files(top, classes)
        with ThreadPoolExecutor(READERS) as pool:       # headers only: a bad file stops the run now
            list(pool.map(lambda f: open_image(f).close(), files))
        return FolderSet(files, labels, size)

    held = None
    if top != folder:
        held = next((folder / n for n in ("test", "val") if (folder / n).is_dir()), None)
    train = scan(top)
    return Data(train, held and scan(held), size, 3, classes)


def _common_size(folder, first):
    """Return the side of the first image if it is square and small; else demand --image-size."""
    with open_image(first) as image:
        if image.width == image.height <= 64:
            return image.width
        raise ValueError(f"--data {folder} needs --image-size: {first.name} is {image.width} x "
                         f"{image.height} pixels")


# ---- photographs

def open_image(path):
    """Return a PIL image of which only the header has been read.

    Raises ValueError naming the file if it is not an image, or deeper than 8 bits a channel, and
    OSError if the disk could not read it.
    """
    try:
        image = Image.open(path)
    except Exception as e:
        if _machines_fault(e):
            raise
        raise ValueError(f"{path} is not an image that PIL reads ({type(e).__name__}): repair or "
                         f"remove it") from None
    # deeper images would be clipped: PIL shows the depth in the mode or in the decoder's arguments
    raw = f"{image.mode} {[tile[3] for tile in image.tile]}"
    if image.mode in ("I", "F") or re.search(r"\b(I|LA?|RGBA?);16", raw):
        raise ValueError(f"{path} has more than 8 bits a channel: convert it to 8 bits first")
    return image


def center_crop(image, size, kind="adm"):
    """Return a PIL image's center, RGB, size x size.

    "adm": halve while large, resize the short side to `size`, cut out the middle (Dhariwal & Nichol
    2021). "square-lanczos": cut out the middle, then resize it (U-ViT's for MS-COCO, Bao et al.
    2023). Raises ValueError naming the file if it cannot be decoded or is far too long, and OSError
    if the disk could not read it.
    """
    name = getattr(image, "filename", "image")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{name} is {image.width} x {image.height} pixels, more than {MAX_ASPECT} "
                         f"times as long as wide: remove it")
    try:
        image = image.convert("RGB")                    # decodes; grey, palette, CMYK and alpha too
    except Exception as e:
        if _machines_fault(e):
            raise
        raise ValueError(f"{name} cannot be decoded ({line_of(e)}): repair or remove it") from None
    if kind == "adm":
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.BOX)
        scale = size / min(image.size)
        shape = (round(image.width * scale), round(image.height * scale))
        image = image.resize(shape, Image.BICUBIC)
    side = min(image.size)
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.LANCZOS)   # ADM's has this size by now: a mere copy


def _machines_fault(error):
    """Return whether an error is the disk's or the memory's: the next try may read the file."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) is not None


# ---- order

@lru_cache(maxsize=2)
def _epoch(length, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(length)


def global_rows(length, seed, step, batch_size):
    """Return the rows of global batch `step`. Epochs follow one another without a gap."""
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), length)
    rows = [_epoch(length, seed, int(e))[places[epochs == e]] for e in np.unique(epochs)]
    return np.concatenate(rows)


def batches(dataset, seed, start, batch_size, mine=slice(None), device="cpu",
            wanted=lambda step: True, draw=lambda step: ()):
    """Yield (images, moments, labels, numbers) on `device`, for one batch after another, endlessly.

    They are the rows `mine` of the global batches `start`, start + 1, ... A set with captions gives
    one of each image's, drawn from (seed, step), in place of the labels. Only packed sets have
    moments, else they are None. The images of packed sets are None in steps for which
    `wanted(step)` is false: nobody looks at them. `draw(step)` returns CPU tensors [B,...] for the
    global batch, a step's random numbers; `numbers` are their rows `mine`. All is read and drawn
    one step ahead, in a thread.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"

    def read(step):
        rows = torch.from_numpy(global_rows(len(dataset), seed, step, batch_size)[mine])
        images = moments = None
        if hasattr(dataset, "moments"):
            moments = dataset.moments(rows)
        if moments is None or wanted(step):
            images, _ = dataset.read(rows)
        labels = dataset.labels[rows]
        if hasattr(dataset, "captions"):
            u = np.random.default_rng([seed, step, 1]).random(batch_size)[mine]
            labels = dataset.captions(rows, u)
        batch = [images, moments, labels, *(r[mine] for r in draw(step))]
        if cuda:                                        # a copy from pinned memory need not wait
            batch = [None if b is None else b.pin_memory() for b in batch]
        return batch

    with ThreadPoolExecutor(1) as ahead:                # one batch is read while another is used
        coming = ahead.submit(read, start)
        while True:
            start += 1
            batch = coming.result()
            coming = ahead.submit(read, start)
            batch = [None if b is None else b.to(device, non_blocking=cuda) for b in batch]
            images, moments, labels, *numbers = batch
            yield images, moments, labels, numbers


# ---- what a batch becomes

def mirror(images, mirrored):
    """Mirror the images [b,C,H,W] (or None) for which mirrored [b] is true."""
    if images is None:
        return None
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


def to_latents(moments, mirrored, noise, scale):
    """Draw scaled latents [b,C,h,w] from the autoencoder's posterior.

    moments [b,V,2C,h,w], mirrored [b] bool, noise [b,C,h,w] standard normal.
    """
    view = mirrored.long()                              # [b] 0 the image, 1 its mirror image
    if moments.shape[1] == 1:
        view = torch.zeros_like(view)
    chosen = moments[torch.arange(len(moments), device=moments.device), view]   # [b,2C,h,w]
    mean, std = chosen.float().chunk(2, dim=1)
    return scale * (mean + std * noise)


def to_rgb(images):
    """Return grey or RGB images [B,C,H,W] as [B,3,H,W]."""
    return images.expand(-1, 3, -1, -1)


def to_pixels(images):
    """Convert uint8 [B,C,H,W] to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(pixels, how="round"):
    """Convert [-1, 1] to uint8, by "round" or "truncate": the papers differ, and FID notices."""
    values = (pixels.float() + 1) * 127.5
    if how == "round":
        values = values.round()
    return values.clamp(0, 255).byte()
