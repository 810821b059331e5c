"""Compute FID, sFID, Inception Score, precision, recall and KID as the papers' evaluators do.

    python fid.py SAMPLES REFERENCE     folders, .npz or .pt files, statistics, or cifar10
    torchrun --nproc_per_node=8 fid.py SAMPLES REFERENCE     sooner, with the same result

It works alone (`digits` needs digits.npz beside it, and `--features dinov2` teacher.py).

Papers (arXiv): FID 1706.08500, sFID 2103.03841, Inception Score 1606.03498, improved precision and
recall 1904.06991, KID 1801.01401, FD-DINOv2 2306.04675.

Network and resize are TensorFlow's, as in ADM's evaluator and so in papers' tables.

Letters: B batch, N images, F features, C channels, H, W height and width.
"""
import argparse
import difflib
import hashlib
import json
import math
import os
import re
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torchvision import datasets
from torchvision.models import inception as tv

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA = "6726825d"  # its SHA-256 begins so
INCEPTION_SIDE = 299
INCEPTION_CLASSES = 1008
SPATIAL_CHANNELS = 7  # of sFID
DINOV2 = "dinov2_vitl14"
DINOV2_SIDE = 224
DINOV2_GRID = 16  # patches of 14 pixels
PIXELS_SIDE = 8
FEW_IMAGES = 10_000  # the FID of fewer is biased
MANY_IMAGES = 50_000  # precision, recall, KID of more are slow
CHUNK = 1000  # rows of a distance matrix
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
TORCHVISION_SETS = {"cifar10": "CIFAR10", "mnist": "MNIST", "fashionmnist": "FashionMNIST"}


# ---- the 2015 Inception: what differs from torchvision's

class Conv(tv.BasicConv2d):
    """Convolution, batch norm of running statistics folded into the kernel, ReLU."""

    folded = None  # kernel and bias

    def forward(self, x):
        if self.folded is None:
            scale = self.bn.weight * (self.bn.running_var + self.bn.eps).rsqrt()
            kernel = self.conv.weight * scale.view(-1, 1, 1, 1)
            self.folded = kernel, self.bn.bias - self.bn.running_mean * scale
        return F.conv2d(x, *self.folded, self.conv.stride, self.conv.padding).relu_()

    def _load_from_state_dict(self, *args):  # other weights
        self.folded = None
        super()._load_from_state_dict(*args)

    def _apply(self, *args):  # another device
        self.folded = None
        return super()._apply(*args)


# TensorFlow's average does not count the padding; torchvision's does.
average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)


class BlockA(tv.InceptionA):
    def _forward(self, x):
        return [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)),
                self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                self.branch_pool(average(x))]


class BlockC(tv.InceptionC):
    def _forward(self, x):
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return [self.branch1x1(x), self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
                self.branch7x7dbl_5(self.branch7x7dbl_4(double)), self.branch_pool(average(x))]


class BlockE(tv.InceptionE):
    pool = staticmethod(average)

    def _forward(self, x):
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return [self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single),
                self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double),
                self.branch_pool(self.pool(x))]


class Inception(tv.Inception3):
    """The network of FID, without weights; state-dict keys as in the published file."""

    def __init__(self, resize="tf1"):
        if resize not in RESIZES:
            raise ValueError(f"resize {resize!r} is none of {', '.join(RESIZES)}")
        blocks = (BlockA, tv.InceptionB, BlockC, tv.InceptionD, BlockE)
        blocks = [partial(block, conv_block=Conv) for block in blocks]
        super().__init__(INCEPTION_CLASSES, aux_logits=False, init_weights=False,
                         inception_blocks=[Conv, *blocks, tv.InceptionAux])
        # A maximum here is a slip of 2015, now part of FID.
        self.Mixed_7c.pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
        self.resize = RESIZES[resize]
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, images):
        """Return {"pool": [B,2048], "spatial": [B,2023], "logits": [B,1008]} of uint8 [B,3,H,W]."""
        if images.dtype != torch.uint8:
            raise ValueError(f"images are {images.dtype}: this network takes uint8")
        x = self.resize(images.expand(-1, 3, -1, -1))  # [B,3,299,299], also of grey images
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.maxpool1(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))  # [B,64,73,73]
        x = self.maxpool2(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))  # [B,192,35,35]
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))  # [B,768,17,17]
        x = self.Mixed_6c(self.Mixed_6b(x))
        spatial = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS]  # [B,7,17,17]
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))  # [B,1280,8,8]
        pool = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))  # [B,2048]
        spatial = spatial.permute(0, 2, 3, 1).flatten(1)  # NHWC, as TensorFlow
        return {"pool": pool, "spatial": spatial, "logits": pool @ self.fc.weight.T}  # no bias


def resize_tf1(images):
    """Resize as TensorFlow 1: bilinear, src = dst * in/out, no antialias; then (x - 128) / 128."""
    x = images.float()
    for _ in range(2):  # columns; then, transposed, rows
        size = x.shape[-1]
        src = torch.arange(INCEPTION_SIDE, device=x.device) * (size / INCEPTION_SIDE)
        low = src.long()
        x = torch.lerp(x[..., low], x[..., (low + 1).clamp(max=size - 1)], src - low).mT
    return (x - 128) / 128


def resize_pytorch(images):
    """Resize as pytorch-fid: bilinear, half-pixel centres, no antialias; then to [-1, 1]."""
    side = (INCEPTION_SIDE, INCEPTION_SIDE)
    return 2 * F.interpolate(images.float() / 255, side, mode="bilinear", align_corners=False) - 1


RESIZES = {"tf1": resize_tf1, "pytorch": resize_pytorch}


def load_inception(weights=None, resize="tf1"):
    """Load Inception with the published weights, from a file or fetched once."""
    path = Path(weights or Path(torch.hub.get_dir(), "checkpoints", Path(INCEPTION_URL).name))
    if weights is None and not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), INCEPTION_SHA)
        except (OSError, RuntimeError) as e:
            raise OSError(f"Inception could not be fetched ({one_line(e)}): download "
                          f"{INCEPTION_URL} for --weights, or use --features pixels") from None
    net = Inception(resize)
    try:
        net.weights_sha = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        # A plain dict: without torch's record of versions, the norms' counters may be missing.
        net.load_state_dict(dict(torch.load(path, map_location="cpu", weights_only=True)))
    except Exception as e:
        raise ValueError(f"--weights {path} does not hold the Inception of FID, or is cut short "
                         f"({one_line(e)}): fetch it again") from None
    return net


def pixel_features(images):
    """Return pixels in [0, 1], averaged to 8 x 8: uint8 [B,C,H,W] -> float64 [B,64 C].

    Divided by sqrt(C): a grey image and its RGB copy are equally far from others.
    """
    x = F.adaptive_avg_pool2d(images.double() / 255, PIXELS_SIDE)
    return x.flatten(1) / math.sqrt(images.shape[1])


# ---- the metrics: functions of arrays or tensors

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Return the Frechet distance of two Gaussians, >= 0, in float64 (FID); mu [F], sigma [F,F].

    |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^1/2)

    The root's trace is the sum of the singular values of A^T B, if sigma1 = A A^T, sigma2 = B B^T.
    For Cholesky factors these are the roots of the eigenvalues of A^T sigma2 A: one symmetric
    problem, far cheaper than a matrix root. Covariances of fewer images than features have none:
    then take eigenvectors, without the null space, whose rounding errors would enter as roots.
    """
    gaussians = [torch.as_tensor(x).double() for x in (mu1, sigma1, mu2, sigma2)]
    mu1, sigma1, mu2, sigma2 = gaussians
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != 2 * mu1.shape:
        raise ValueError(f"covariances are {[*sigma1.shape]} and {[*sigma2.shape]}: were they made "
                         f"with the same features?")
    if not all(x.isfinite().all() for x in gaussians):
        raise ValueError("a mean or covariance is not finite: look for NaN in the features")
    means = (mu1 - mu2).square().sum()
    if torch.equal(sigma1, sigma2):  # the rest is exactly 0
        return means.item()

    A, failed1 = torch.linalg.cholesky_ex(sigma1)
    _, failed2 = torch.linalg.cholesky_ex(sigma2)
    if not failed1 and not failed2:
        root = torch.linalg.eigvalsh(A.T @ sigma2 @ A).clamp(min=0).sqrt().sum()
    else:
        root = torch.linalg.svdvals(_factor(sigma1).T @ _factor(sigma2)).sum()
    return max(0.0, (means + sigma1.trace() + sigma2.trace() - 2 * root).item())


def _factor(sigma):
    """Return A [F,rank] with sigma = A A^T."""
    w, v = torch.linalg.eigh(sigma)
    kept = w > w[-1] * len(w) * torch.finfo(w.dtype).eps
    return v[:, kept] * w[kept].sqrt()


def inception_score(logits, split_size=5000):
    """Return exp(mean_x KL(p(y|x) || p(y))), averaged over splits of the logits [N,K]."""
    scores = []
    for part in torch.as_tensor(logits).split(split_size):
        log_p = part.double().log_softmax(1)  # log p(y|x)
        marginal = log_p.logsumexp(0) - math.log(len(part))  # log p(y)
        scores.append((log_p.exp() * (log_p - marginal)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def precision_recall(real, fake, k=3):
    """Return precision and recall, both in [0, 1]; real [N,F], fake [M,F].

    Precision is the share of fake inside the manifold of real; recall, of real inside that of fake.
    A manifold is the union of balls around its points, out to each one's k-th neighbour.
    """
    real, fake = (torch.as_tensor(x).double() for x in (real, fake))
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall need more than {k} images on both sides, "
                         f"not {len(real)} and {len(fake)}")
    radius_real = _radii(real, k)  # [N] squared
    radius_fake = _radii(fake, k)  # [M]
    inside = []
    reached = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for part, radius in zip(fake.split(CHUNK), radius_fake.split(CHUNK)):
        d2 = _square_distances(part, real)  # [chunk,N]
        inside.append((d2 <= radius_real).any(1))
        reached |= (d2 <= radius[:, None]).any(0)
    return torch.cat(inside).double().mean().item(), reached.double().mean().item()


def _square_distances(a, b):
    """Return |a_i - b_j|^2; exactly 0 for equal points, whatever the rounding."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    d2 = torch.addmm(norms, a, b.T, alpha=-2)
    return d2.masked_fill_(d2 < 1e-12 * norms, 0)


def _radii(x, k):
    radii = []
    for i, part in enumerate(x.split(CHUNK)):
        d2 = _square_distances(part, x)
        d2.diagonal(i * CHUNK).fill_(math.inf)  # a point is not its own neighbour
        radii.append(d2.topk(k, largest=False).values[:, -1])
    return torch.cat(radii)


def kid(real, fake, subsets=100, subset_size=1000, seed=0):
    """Return mean and deviation of the unbiased MMD^2 over random subsets; real [N,F], fake [M,F].

    The kernel is (x.y / F + 1)^3; subsets are drawn as torch-fidelity draws them.
    """
    real, fake = (torch.as_tensor(x) for x in (real, fake))
    n = subset_size
    most = min(len(real), len(fake))
    if not 2 <= n <= most:
        raise ValueError(f"--kid-subset-size {n} must lie between 2 and the smaller set's {most}")

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def off_diagonal(K):  # mean over pairs of different images: unbiased
        return (K.sum() - K.trace()) / (n * (n - 1))

    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        f = fake[rng.choice(len(fake), n, replace=False)].double()
        r = real[rng.choice(len(real), n, replace=False)].double()
        own = off_diagonal(kernel(f, f)) + off_diagonal(kernel(r, r))
        values.append(own - 2 * kernel(f, r).mean())
    values = torch.stack(values)
    return values.mean().item(), values.std(correction=0).item()


# ---- one pass over the images

class Moments:
    """Mean and covariance of features that stream by, in float64 (Chan, Golub & LeVeque 1983)."""

    def __init__(self, num=0, mean=0.0, scatter=0.0):
        self.num = num
        self.mean = mean  # [F]
        self.scatter = scatter  # [F,F], sum of (x - mean)(x - mean)^T

    def add(self, x):  # [B,F]
        x = x.double()
        mean = x.mean(0)
        self.merge(Moments(len(x), mean, (x - mean).T @ (x - mean)))

    def merge(self, other):
        total = self.num + other.num
        delta = other.mean - self.mean
        between = torch.outer(delta, delta) * (self.num * other.num / total)
        self.scatter = self.scatter + other.scatter + between
        self.mean = self.mean + delta * (other.num / total)
        self.num = total

    def gaussian(self):
        return self.mean, self.scatter / (self.num - 1)  # mu [F], sigma [F,F]


UNNAMED = "a network that the file does not name"
METRICS = ("fid", "sfid", "is", "precision", "recall", "kid")


@dataclass
class Features:
    """What a pass over a set leaves, or its file."""
    num: int = 0  # images; 0 if a file does not say
    gaussians: dict = field(default_factory=dict)  # {"pool": (mu [F], sigma [F,F]), ...}
    kept: dict = field(default_factory=dict)  # {"pool": [N,F], ...}
    made_with: str = UNNAMED


def extract(images, network, batch_size=64, device="cpu", keep=(), progress=None):
    """Pass images, uint8 [N,C,H,W] or what has a length and such slices, through the network, once.

    network(uint8 [B,C,H,W]) -> {name: [B,F]}. Returns Features: moments of all except logits, and
    what is named in `keep`. `progress` is a name to print every ten seconds.

    Under torch.distributed, every process reads its share; the first returns what a single process
    would, the others None. An error is raised by all.
    """
    num = len(images)
    if num < 2:
        raise ValueError(f"{num} image(s) have no covariance: two are needed, 50,000 usual")
    world = dist.get_world_size() if dist.is_initialized() else 1
    share = -(-num // world)
    rows = range(num)[rank() * share:(rank() + 1) * share]
    mine = error = None
    try:
        mine = _pass(images, rows, network, batch_size, device, keep, progress)
    except (ValueError, OSError) as e:
        error = e

    # Errors first: nobody may wait for a process that has given up.
    if world > 1:
        errors = [None] * world
        dist.all_gather_object(errors, error)
        error = next(filter(None, errors), None)
    if error:
        raise error
    everyone = [mine] * world if rank() == 0 else None
    if world > 1:
        dist.gather_object(mine, everyone)  # in order
    if everyone is None:
        return None

    whole = {}
    kept = {name: [] for name in keep}
    for moments, parts in everyone:
        for name, m in moments.items():
            whole.setdefault(name, Moments()).merge(m)
        for name in keep:
            kept[name] += parts[name]
    gaussians = {name: m.gaussian() for name, m in whole.items()}
    return Features(num, gaussians, {name: torch.cat(parts) for name, parts in kept.items()})


def _pass(images, rows, network, batch_size, device, keep, progress):
    """Return {name: Moments} and {name: [tensor, ...]}, on the CPU."""
    moments = {}
    kept = {name: [] for name in keep}
    parts = [slice(i, min(i + batch_size, rows.stop)) for i in rows[::batch_size]]
    printed = time.perf_counter()
    with ThreadPoolExecutor(1) as reader:  # reads a batch while the network works
        coming = reader.submit(images.__getitem__, parts[0]) if parts else None
        for i, part in enumerate(parts):
            batch = coming.result()
            if i + 1 < len(parts):
                coming = reader.submit(images.__getitem__, parts[i + 1])

            for name, x in network(batch.to(device)).items():
                bad = (~x.isfinite().all(1)).nonzero()
                if len(bad):
                    raise ValueError(f"{name} features of image {part.start + bad[0].item()} are "
                                     f"not finite: damaged weights?")
                if name != "logits":
                    moments.setdefault(name, Moments()).add(x)
                if name in keep:
                    kept[name].append(x.cpu())

            if progress and time.perf_counter() - printed > 10:
                printed = time.perf_counter()
                say(f"{progress}: {100 * (i + 1) // len(parts)} % of {len(images)} images")
    for m in moments.values():
        m.mean = m.mean.cpu()
        m.scatter = m.scatter.cpu()
    return moments, kept


def compare(fake, real, metrics, kid_subsets=100, kid_subset_size=None, split_size=5000):
    """Return {metric: value} of two Features."""
    row = {}
    for metric, name in (("fid", "pool"), ("sfid", "spatial")):
        if metric in metrics:
            row[metric] = frechet_distance(*fake.gaussians[name], *real.gaussians[name])
    if "is" in metrics:
        row["is"] = inception_score(fake.kept["logits"], split_size)
    if "precision" in metrics or "recall" in metrics:
        row["precision"], row["recall"] = precision_recall(real.kept["pool"], fake.kept["pool"])
    if "kid" in metrics:
        pools = real.kept["pool"], fake.kept["pool"]
        size = kid_subset_size or min(1000, *map(len, pools))
        row["kid"], row["kid_std"] = kid(*pools, kid_subsets, size)
    return {name: value for name, value in row.items() if name.removesuffix("_std") in metrics}


# ---- statistics on disk

def open_npz(path):
    """Open ADM's kind of .npz -> (ImageArchive or None, Features or None)."""
    stats = None
    with np.load(path) as f:
        images = ImageArchive(path) if "arr_0" in f else None
        if "mu" in f and "sigma" in f:
            stats = Features(gaussians={"pool": (f["mu"], f["sigma"])})
            if "mu_s" in f and "sigma_s" in f:
                stats.gaussians["spatial"] = (f["mu_s"], f["sigma_s"])
            if "num" in f and "features" in f:  # only in ours
                stats.num = int(f["num"])
                stats.made_with = str(f["features"])
        names = ", ".join(f)
    if images is None and stats is None:
        raise ValueError(f"neither images (arr_0) nor statistics (mu, sigma) but {names}")
    return images, stats


def save_statistics(path, features):
    """Write Gaussians to an .npz, whole or not at all."""
    path = Path(path)
    arrays = [*features.gaussians["pool"], *features.gaussians.get("spatial", ())]
    arrays = dict(zip(("mu", "sigma", "mu_s", "sigma_s"), arrays))
    part = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            np.savez(f, **arrays, num=features.num, features=features.made_with)
            os.fsync(f)
        os.replace(part, path)
    except OSError as e:
        raise OSError(f"--save-stats {path} could not be written ({one_line(e)})") from None
    finally:
        if part.is_file():
            part.unlink()


# ---- images on disk: read exactly as they are

def center_crop(image, size, kind="adm"):
    """Cut a PIL image to size x size; ADM's kind shrinks it before that, U-ViT's after."""
    if kind == "adm":
        while min(image.size) >= 2 * size:
            image = image.resize([side // 2 for side in image.size], Image.BOX)
        scale = size / min(image.size)
        image = image.resize([round(side * scale) for side in image.size], Image.BICUBIC)
    side = min(image.size)
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.LANCZOS)  # ADM's has this size by now: a mere copy


def read_image(path, crop=None):
    """Read a file as PIL image in RGB, cut by crop(image) if given.

    Refuse what would be rounded or made opaque.
    """
    try:
        with Image.open(path) as image:
            stored = f"{image.mode} {[tile[3] for tile in image.tile]}"  # PIL clips what is deeper
            image.load()
    except Exception as e:
        raise ValueError(f"{path} cannot be decoded ({one_line(e)}): repair or remove it") from None
    if image.mode in ("I", "F") or re.search(r"\b(I|LA?|RGBA?);16", stored):
        raise ValueError(f"{path} has more than 8 bits a channel: convert it to 8 bits first")
    if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
        raise ValueError(f"{path} is partly transparent: put it on a background first")
    if crop and max(image.size) > 100 * min(image.size):  # resized, it would fill the memory
        raise ValueError(f"{path} is more than 100 times as long as wide: remove it")
    image = image.convert("RGB")
    return crop(image) if crop else image


class ImageFiles:
    """The images of a folder, at any depth: a length, and slices as uint8 [B,3,H,W].

    They are in the order of their paths; those of several folders are mixed, since the Inception
    Score splits them.
    """

    def __init__(self, folder, crop=None):
        files = []
        for top, _, names in os.walk(folder, followlinks=True):
            files += [Path(top, name) for name in names]
        files = sorted(f for f in files if f.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise ValueError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
        if len({f.parent for f in files}) > 1:
            files = [files[i] for i in np.random.RandomState(0).permutation(len(files))]
        self.files = files
        self.read = partial(read_image, crop=crop)
        self.size = self.read(files[0]).size
        self.pool = ThreadPoolExecutor(8)  # PIL frees the interpreter's lock

    def __len__(self):
        return len(self.files)

    def __getitem__(self, rows):
        images = list(self.pool.map(self.read, self.files[rows]))
        for file, image in zip(self.files[rows], images):
            if image.size != self.size:
                words = "images of mixed sizes: {} is {} x {}, {} is {} x {}; --crop SIZE cuts all"
                raise ValueError(words.format(file, *image.size, self.files[0], *self.size))
        return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images])


class ImageArchive:
    """The images of an .npz (`arr_0`, uint8 [N,H,W,3]), read in slices."""

    def __init__(self, path):
        self.path = path
        self.file = zipfile.ZipFile(path).open("arr_0.npy")
        version = np.lib.format.read_magic(self.file)
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
        self.shape, by_columns, dtype = read_header(self.file)
        if dtype != np.uint8 or by_columns or len(self.shape) != 4 or self.shape[3] not in (1, 3):
            raise ValueError("arr_0 is not images, uint8 [N,H,W,3]")
        self.start = self.file.tell()
        self.image_bytes = math.prod(self.shape[1:])

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        first, last, _ = rows.indices(len(self))
        try:
            self.file.seek(self.start + first * self.image_bytes)
            pixels = bytearray(self.file.read((last - first) * self.image_bytes))
            images = np.frombuffer(pixels, np.uint8).reshape(last - first, *self.shape[1:])
        except Exception as e:
            raise ValueError(f"{self.path} is damaged ({one_line(e)}): copy it again") from None
        return torch.from_numpy(images).permute(0, 3, 1, 2)


def open_images(source, crop=None, root="out/data"):
    """Open a folder, an .npz, a .pt with a tensor, or the training images of a set.

    Returns images (a length, and slices uint8 [B,C,H,W]) or None; their statistics, or None.
    """
    path = Path(source)
    if source == "digits":
        return read_digits(), None
    if source in TORCHVISION_SETS:
        return read_torchvision(source, root), None
    if path.is_dir():
        return ImageFiles(path, crop), None
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, and is not one of digits, "
                                f"{', '.join(TORCHVISION_SETS)}")
    try:
        if path.suffix.lower() == ".npz":
            return open_npz(path)
        images = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        tensor = isinstance(images, torch.Tensor) and images.dtype == torch.uint8
        if not tensor or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError("not a tensor of images, uint8 [N,3,H,W]")
        return images, None
    except Exception as e:
        raise ValueError(f"{path} cannot be read: {one_line(e)}") from None


def beside(name, user):
    path = Path(__file__).with_name(name)
    if not path.is_file():
        raise FileNotFoundError(f"{user} needs {name} beside fid.py: copy it there")
    return path


def read_digits():
    """Return the digits that data.py trains on, uint8 [1500,1,8,8]."""
    with np.load(beside("digits.npz", "digits")) as f:
        images = np.round(f["images"] * (255 / 16)).astype(np.uint8)  # of 0 ... 16
    rows = np.random.RandomState(0).permutation(len(images))[:1500]
    return torch.from_numpy(images[rows][:, None])


def read_torchvision(name, root):
    """Return a set's training images, uint8 [N,C,H,W]."""
    try:
        dataset = getattr(datasets, TORCHVISION_SETS[name])(root, train=True, download=True)
    except Exception as e:
        raise OSError(f"{name} could not be downloaded to {root} ({one_line(e)}): connect once, or "
                      f"set --data-root") from None
    images = torch.as_tensor(dataset.data)  # [N,H,W] grey, or [N,H,W,3]
    return images.view(*images.shape[:3], -1).permute(0, 3, 1, 2).contiguous()


def one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


# ---- one process or many

def join_processes(device):
    """Return the device of --device; join torchrun's other processes, if any."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    world = int(os.environ.get("WORLD_SIZE", 1))
    mine = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    cards = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    known = ["cpu", *(card for card in cards if world == 1 or card == mine)]
    if device == "cuda":
        device = mine
    if device not in known:
        raise ValueError(f"--device {device} is not here: use auto or {', '.join(known)}")
    device = torch.device(device)
    options = dict(backend="gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options = dict(backend="nccl", device_id=device)
    if world > 1:
        dist.init_process_group(**options, timeout=timedelta(minutes=30))
    return device


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def main_first(make, *args):
    """Return make(*args), called by the first process first: the others find its downloads."""
    if rank() > 0:
        dist.barrier()
    try:
        return make(*args)
    finally:  # also if it fails: the others will fail alike
        if rank() == 0 and dist.is_initialized():
            dist.barrier()


def say(words):
    if rank() == 0:
        print(words, file=sys.stderr, flush=True)  # stdout is for the results


# ---- the program

@dataclass
class Side:
    """One side of the comparison, maybe empty."""
    path: str = ""
    images: object = None   # with a length and slices
    stats: Features = None  # of a file; they go before the images

    @property
    def has_spatial(self):
        return not self.stats or "spatial" in self.stats.gaussians

    def needs_pass(self, keep):
        """Statistics stand for the images, but not for features that are kept whole."""
        return self.images is not None and (len(keep) > 0 or not self.stats)


def choose(args, samples, reference):
    """Return the metrics to compute: those in --metrics, or all that the inputs allow."""
    inception = args.features == "inception"
    sizes = [0, 0]
    if samples.images is not None and reference.images is not None:
        sizes = [len(samples.images), len(reference.images)]
    possible = {
        "fid": bool(reference.path),
        "sfid": inception and all(side.path and side.has_spatial for side in (samples, reference)),
        "is": inception and samples.images is not None,
        "precision": min(sizes) > 3,
        "recall": min(sizes) > 3,
        "kid": min(sizes) > 1,
    }
    refused = [metric for metric in args.metrics or () if not possible[metric]]
    if refused:
        raise ValueError(f"--metrics {' '.join(refused)} cannot be had: fid needs a REFERENCE; is "
                         f"and sfid Inception and images, or (sfid) statistics with mu_s and "
                         f"sigma_s; the others images on both sides")
    if args.metrics or not reference.path:
        return args.metrics or []
    if max(sizes) > MANY_IMAGES:
        say(f"more than {MANY_IMAGES} images: name precision, recall, kid in --metrics if needed")
        possible |= dict(precision=False, recall=False, kid=False)
    return [metric for metric in METRICS if possible[metric]]


def load_network(args, device):
    """Return the network of --features, and its name."""
    if args.features == "pixels":
        return pixel_network, f"pixels averaged to {PIXELS_SIDE} x {PIXELS_SIDE}"
    if args.features == "dinov2":
        return load_dinov2(args.weights, device), DINOV2
    net = load_inception(args.weights, args.resize).to(device, memory_format=torch.channels_last)
    return net, f"inception, {args.resize} resize, weights {net.weights_sha}"


def pixel_network(images):
    return {"pool": pixel_features(images.expand(-1, 3, -1, -1))}  # a grey set as its RGB copy


def load_dinov2(weights, device):
    """Load DINOv2 as a network with one feature, its class token."""
    beside("teacher.py", "--features dinov2")
    import teacher
    net = teacher.load_dinov2(DINOV2, weights).resize_pos_embed(DINOV2_GRID).to(device)

    @torch.inference_mode()
    def network(images):
        x = F.interpolate(images.expand(-1, 3, -1, -1).float(), (DINOV2_SIDE, DINOV2_SIDE),
                          mode="bicubic", antialias=True).clamp(0, 255)
        return {"pool": net.features(teacher.preprocess(x, DINOV2_GRID))[0]}
    return network


def measure(side, keep, network, made_with, args, device):
    """Return the Features of a side; those in `keep` always come from its images."""
    path = side.path
    found = side.stats or Features()
    if side.stats:
        say(f"{path}: statistics of {found.num or 'unknown numbers of'} images; {found.made_with}")
    if found.made_with not in (UNNAMED, made_with):
        raise ValueError(f"{path} holds statistics of {found.made_with}, not of {made_with}: make "
                         f"them again, or change --features, --resize, --weights")
    if side.needs_pass(keep):
        start = time.perf_counter()
        passed = extract(side.images, network, args.batch_size, device, keep, path)
        speed = len(side.images) / (time.perf_counter() - start)
        say(f"{path}: {len(side.images)} images, {speed:.1f} images/s; {made_with}")
        if passed:  # on the first process
            found = side.stats or passed
            found.kept = {name: x.to(device) for name, x in passed.kept.items()}
            found.made_with = made_with
    if 0 < found.num < FEW_IMAGES:
        say(f"warning: {path}: {found.num} images are few, and FID is biased upwards")
    return found


def evaluate(args, device):
    """Measure, compare, print."""
    paths = filter(None, (args.samples, args.reference))
    crop = args.crop and partial(center_crop, size=args.crop, kind=args.crop_kind or "adm")
    sides = [Side(p, *main_first(open_images, p, crop, args.data_root)) for p in paths]
    samples, reference = [*sides, Side()][:2]
    if samples.images is not None:
        samples.stats = None  # a file with both: its images
    elif args.save_stats:
        raise ValueError(f"--save-stats needs images, and {args.samples} holds statistics")

    metrics = choose(args, samples, reference)
    pool = ["pool"] if {"precision", "recall", "kid"} & {*metrics} else []
    logits = ["logits"] if "is" in metrics else []
    if samples.needs_pass(pool) or reference.needs_pass(pool):
        network, made_with = main_first(load_network, args, device)
    else:
        network = None
        made_with = samples.stats.made_with
    fake = measure(samples, pool + logits, network, made_with, args, device)
    if args.save_stats and rank() == 0:
        save_statistics(args.save_stats, fake)
    real = measure(reference, pool, network, made_with, args, device)
    if rank() > 0:
        return

    row = compare(fake, real, metrics, args.kid_subsets, args.kid_subset_size, args.split_size)
    if "fid" in row and args.features != "inception":
        row = {"fd": row.pop("fid"), **row}  # the I of FID is Inception's
    if args.json:
        numbers = {"num_samples": fake.num or None, "num_reference": real.num or None}
        print(json.dumps(row | numbers | {"features": made_with}))
    else:
        print("\n".join(f"{name:10}{value:12.5f}" for name, value in row.items()))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        word = message.split()[-1]
        for near in difflib.get_close_matches(word, self._option_string_actions, 1):
            message += f"; did you mean {near}?"
        raise SystemExit(f"fid.py: {message} (flags: --help)")


def at_least(smallest):
    def number(word):
        if int(word) < smallest:
            raise argparse.ArgumentTypeError(f"{word} must be {smallest} or more")
        return int(word)
    return number


def parse(argv):
    parser = Parser("fid.py", description="Compare SAMPLES with REFERENCE.", allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    source = "folder, .npz, .pt, or digits, cifar10, mnist, fashionmnist"
    add("samples", nargs="?", help=source)
    add("reference", nargs="?", help=f"{source}; or statistics")
    add("--metrics", nargs="+", choices=METRICS, help="all that are possible if not given")
    add("--features", choices=("inception", "dinov2", "pixels"), default="inception",
        help="network")
    add("--weights", help="its weights; fetched if not given")
    add("--resize", choices=RESIZES, default="tf1", help="tf1: the papers'; pytorch: pytorch-fid's")
    add("--crop", type=at_least(1), help="cut a folder's images to squares of this side")
    add("--crop-kind", choices=("adm", "square-lanczos"), help="adm if not given")
    add("--data-root", default="out/data", help="where torchvision's sets are kept")
    add("--kid-subsets", type=at_least(1), default=100, help="subsets of KID")
    add("--kid-subset-size", type=at_least(2), help="images in each; 1,000 or all if not given")
    add("--split-size", type=at_least(1), default=5000, help="images in a split of Inception Score")
    add("--batch-size", type=at_least(1), default=64, help="images at a time")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--save-stats", help="write statistics of SAMPLES to this .npz, a later REFERENCE")
    add("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)

    if not args.samples or not (args.reference or args.save_stats or args.metrics):
        raise ValueError("give SAMPLES and REFERENCE, or SAMPLES with --save-stats or --metrics "
                         "is")
    if not (args.save_stats or ".npz").endswith(".npz"):
        raise ValueError(f"--save-stats {args.save_stats} must end in .npz")
    if args.crop and not any(Path(p or "x.npz").is_dir() for p in (args.samples, args.reference)):
        raise ValueError("--crop is for folders of images: SAMPLES and REFERENCE are none")
    if args.crop_kind and not args.crop:
        raise ValueError(f"--crop-kind {args.crop_kind} needs --crop SIZE")
    return args


def main(argv=None):
    try:
        args = parse(argv)
        device = join_processes(args.device)
        torch.set_float32_matmul_precision("highest")  # TF32 moves the third decimal
        torch.backends.cudnn.allow_tf32 = False
        evaluate(args, device)
    except (ValueError, OSError) as e:
        raise SystemExit(f"fid.py: {e}") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
