"""FID, sFID, Inception Score, precision, recall and KID, as the evaluators behind the papers' tables compute them.

    python fid.py SAMPLES REFERENCE           folders, .npz or .pt files, statistics, or data sets by name (cifar10)
    torchrun --nproc_per_node=8 fid.py SAMPLES REFERENCE       each process reads its share; the result is the same

FID (Heusel et al. 2017, arXiv 1706.08500), sFID (Nash et al. 2021, 2103.03841), Inception Score (Salimans et al. 2016,
1606.03498), improved precision and recall (Kynkaanniemi et al. 2019, 1904.06991), KID (Binkowski et al. 2018,
1801.01401), FD-DINOv2 (Stein et al. 2023, 2306.04675).

Evaluators seldom differ by a formula: they differ by the network, the resize before it, and the number of images. The
network here is the 2015 TensorFlow Inception, and the default resize TensorFlow 1's: the convention of ADM's evaluator
and torch-fidelity, and so of the papers' tables. `--resize pytorch` is pytorch-fid's.

Letters: B batch, N images, F features, H W height and width.
"""
import hashlib
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.models import inception as tv

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA = "6726825d"                                                  # SHA-256 of that file begins so
INCEPTION_SIDE, INCEPTION_CLASSES, SPATIAL_CHANNELS = 299, 1008, 7
DINOV2, DINOV2_SIDE, PIXELS_SIDE = "dinov2_vitl14", 224, 8
FEW_IMAGES, MANY_IMAGES = 10_000, 50_000                                    # FID is biased below; precision slow above


# ---- the 2015 Inception, on torchvision's blocks: only what differs is written here

class Conv(tv.BasicConv2d):
    """Convolution, batch norm, ReLU; the norm, always of running statistics here, is folded into the kernel."""

    def forward(self, x):
        scale = self.bn.weight * (self.bn.running_var + self.bn.eps).rsqrt()
        kernel, bias = self.conv.weight * scale.view(-1, 1, 1, 1), self.bn.bias - self.bn.running_mean * scale
        return F.conv2d(x, kernel, bias, self.conv.stride, self.conv.padding).relu_()


def average(x):
    """TensorFlow's average pool leaves the padding out of the count; torchvision's counts it."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x):
    return F.max_pool2d(x, 3, stride=1, padding=1)


class BlockA(tv.InceptionA):
    def _forward(self, x):
        return [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)),
                self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))), self.branch_pool(average(x))]


class BlockC(tv.InceptionC):
    def _forward(self, x):
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return [self.branch1x1(x), self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
                self.branch7x7dbl_5(self.branch7x7dbl_4(double)), self.branch_pool(average(x))]


class BlockE(tv.InceptionE):
    pool = staticmethod(average)

    def _forward(self, x):
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return [self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single),
                self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(self.pool(x))]


class Inception(tv.Inception3):
    """The network of FID. State-dict keys are those of the published file; built without weights or network.

    resize: "tf1" (ADM's evaluator, torch-fidelity) or "pytorch" (pytorch-fid).
    """

    def __init__(self, resize="tf1"):
        if resize not in RESIZES:
            raise ValueError(f"resize {resize!r} is none of {', '.join(RESIZES)}")
        blocks = (BlockA, tv.InceptionB, BlockC, tv.InceptionD, BlockE)
        super().__init__(INCEPTION_CLASSES, aux_logits=False, init_weights=False, inception_blocks=[
            Conv, *(partial(block, conv_block=Conv) for block in blocks), tv.InceptionAux])
        self.Mixed_7c.pool = max_pool                                       # a slip of 2015, now part of FID
        self.resize = RESIZES[resize]
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, images):
        """uint8 [B,3,H,W] or grey [B,1,H,W] -> {"pool": [B,2048], "spatial": [B,2023], "logits": [B,1008], no bias}."""
        if images.dtype != torch.uint8:
            raise ValueError(f"images are {images.dtype}: this network takes uint8, 0 ... 255")
        x = self.resize(images.expand(-1, 3, -1, -1))                                           # [B,3,299,299]
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.maxpool1(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))        # [B,64,73,73]
        x = self.maxpool2(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))                            # [B,192,35,35]
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))                       # [B,768,17,17]
        x = self.Mixed_6c(self.Mixed_6b(x))
        spatial = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS]                              # sFID's
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))                                      # [B,1280,8,8]
        pool = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))                                     # [B,2048]
        return {"pool": pool, "spatial": spatial.permute(0, 2, 3, 1).flatten(1),                # NHWC, as TensorFlow
                "logits": pool @ self.fc.weight.T}


def resize_tf1(images):
    """TensorFlow 1's bilinear resize: src = dst * in/out, no half-pixel centres, no antialias; then (x - 128) / 128."""
    x = images.float()
    for _ in range(2):                                                      # columns; then, transposed, rows
        size = x.shape[-1]
        src = torch.arange(INCEPTION_SIDE, device=x.device) * (size / INCEPTION_SIDE)
        low = src.long()
        x = torch.lerp(x[..., low], x[..., (low + 1).clamp(max=size - 1)], src - low).mT
    return (x - 128) / 128


def resize_pytorch(images):
    """pytorch-fid's: bilinear with half-pixel centres, no antialias; then to [-1, 1]."""
    x = F.interpolate(images.float() / 255, (INCEPTION_SIDE, INCEPTION_SIDE), mode="bilinear", align_corners=False)
    return 2 * x - 1


RESIZES = {"tf1": resize_tf1, "pytorch": resize_pytorch}


def load_inception(weights=None, resize="tf1"):
    """Inception with the published weights, from a file or fetched once; `.weights_sha` says which.

    Raises OSError without file or network, ValueError for a file that is cut short or holds something else.
    """
    path = Path(weights or Path(torch.hub.get_dir(), "checkpoints", INCEPTION_URL.rsplit("/", 1)[1]))
    if weights is None and not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), INCEPTION_SHA, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as e:
            raise OSError(f"the weights of Inception could not be fetched ({e}): download {INCEPTION_URL} and name "
                          f"the file with --weights, or use --features pixels") from None
    if not path.is_file():
        raise FileNotFoundError(f"--weights {path} does not exist or is no file")
    net = Inception(resize)
    net.weights_sha = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    try:        # as a plain dict, since torch lets only files without its record of versions lack the norms' counters
        net.load_state_dict(dict(torch.load(path, map_location="cpu", weights_only=True)))
    except Exception as e:                                                  # whatever a damaged file makes torch raise
        raise ValueError(f"--weights {path} does not hold the Inception of FID, or is cut short: fetch it again "
                         f"({' '.join(str(e).split())[:100]})") from None
    return net


def pixel_features(images):
    """uint8 [B,C,H,W] -> float64 [B, 64 C]: pixels in [0, 1], averaged to 8 x 8, divided by sqrt(C).

    That division makes a grey image and its RGB copy equally far from others. Needs no network: for small data.
    """
    x = F.adaptive_avg_pool2d(images.double() / 255, PIXELS_SIDE)
    return x.flatten(1) / math.sqrt(images.shape[1])


# ---- the metrics: functions of arrays or tensors

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^1/2): distance of Gaussians, >= 0, in float64 (FID).

    mu [F], sigma [F,F]. The root's trace is the sum of the singular values of A^T B, where sigma1 = A A^T and sigma2 =
    B B^T. With Cholesky factors these are the roots of the eigenvalues of A^T sigma2 A: one symmetric problem, far
    cheaper than a matrix root. Covariances of fewer images than features have no Cholesky factor; theirs come from the
    eigenvectors, without the null space, whose rounding errors would otherwise enter as their square roots.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x, dtype=torch.float64) for x in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != 2 * mu1.shape:
        raise ValueError(f"shapes of the Gaussians differ: means {[*mu1.shape]} and {[*mu2.shape]}, covariances "
                         f"{[*sigma1.shape]} and {[*sigma2.shape]}: were they made with the same features?")
    if not all(x.isfinite().all() for x in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("a mean or covariance is not finite: look for NaN in the features")
    means = (mu1 - mu2).square().sum()
    if torch.equal(sigma1, sigma2):                                         # exactly: the rest is 0
        return means.item()
    (A, failed1), (B, failed2) = (torch.linalg.cholesky_ex(s) for s in (sigma1, sigma2))
    if not failed1 and not failed2:
        root = torch.linalg.eigvalsh(A.T @ sigma2 @ A).clamp(min=0).sqrt().sum()
    else:
        root = torch.linalg.svdvals(_factor(sigma1).T @ _factor(sigma2)).sum()
    return max(0.0, (means + sigma1.trace() + sigma2.trace() - 2 * root).item())


def _factor(sigma):
    """A [F,rank] with sigma = A A^T."""
    w, v = torch.linalg.eigh(sigma)
    kept = w > w[-1] * len(w) * torch.finfo(w.dtype).eps
    return v[:, kept] * w[kept].sqrt()


def inception_score(logits, split_size=5000):
    """exp(mean_x KL(p(y|x) || p(y))), mean over splits of consecutive images, the last maybe shorter. logits [N,K]."""
    scores = []
    for part in torch.as_tensor(logits).split(split_size):
        log_p = part.double().log_softmax(1)                                # log p(y|x)
        marginal = log_p.logsumexp(0) - math.log(len(part))                 # log p(y)
        scores.append((log_p.exp() * (log_p - marginal)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def precision_recall(real, fake, k=3):
    """Precision: share of fake [M,F] inside the manifold of real [N,F]; recall: the other way round. Both in [0, 1].

    A manifold is the union of balls around its points, each out to its k-th neighbour other than itself. In chunks:
    memory grows with N + M, not with N M.
    """
    real, fake = (torch.as_tensor(x).double() for x in (real, fake))
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall with k = {k} need more than {k} images on both sides, "
                         f"not {len(real)} and {len(fake)}")
    radius_real, radius_fake = _radii(real, k), _radii(fake, k)             # [N], [M] squared
    inside, reached = [], torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for part, radius in zip(fake.split(CHUNK), radius_fake.split(CHUNK)):
        d2 = _square_distances(part, real)                                  # [chunk,N]
        inside.append((d2 <= radius_real).any(1))
        reached |= (d2 <= radius[:, None]).any(0)
    return torch.cat(inside).double().mean().item(), reached.double().mean().item()


CHUNK = 1000


def _square_distances(a, b):
    """|a_i - b_j|^2, [len(a),len(b)]. What is 0 up to rounding is 0, so that equal points are equal."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    d2 = torch.addmm(norms, a, b.T, alpha=-2)
    return d2.masked_fill_(d2 < 1e-12 * norms, 0)


def _radii(x, k):
    radii = []
    for i, part in enumerate(x.split(CHUNK)):
        d2 = _square_distances(part, x)
        d2.diagonal(i * CHUNK).fill_(math.inf)                              # itself is no neighbour
        radii.append(d2.topk(k, largest=False).values[:, -1])
    return torch.cat(radii)


def kid(real, fake, subsets=100, subset_size=1000, seed=0):
    """Mean and standard deviation over random subsets of the unbiased MMD^2 with kernel (x.y / F + 1)^3; [N,F], [M,F].

    Subsets are drawn as torch-fidelity draws them. Raises ValueError where a set is smaller than a subset.
    """
    real, fake = (torch.as_tensor(x) for x in (real, fake))
    n = subset_size
    if not 2 <= n <= min(len(real), len(fake)):
        raise ValueError(f"KID's subsets of {n} images must hold 2 or more, and no more than the smaller set, "
                         f"{min(len(real), len(fake))}: set --kid-subset-size")
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3
    off_diagonal = lambda K: (K.sum() - K.trace()) / (n * (n - 1))
    rng, values = np.random.RandomState(seed), []
    for _ in range(subsets):
        f, r = (x[rng.choice(len(x), n, replace=False)].double() for x in (fake, real))
        values.append(off_diagonal(kernel(f, f)) + off_diagonal(kernel(r, r)) - 2 * kernel(f, r).mean())
    values = torch.stack(values)
    return values.mean().item(), values.std(correction=0).item()


# ---- one pass over the images

class Moments:
    """Mean and covariance of what streams by, in float64 (Chan, Golub & LeVeque 1983)."""

    def __init__(self, num=0, mean=0.0, scatter=0.0):
        self.num, self.mean, self.scatter = num, mean, scatter              # [F], sum of (x - mean)(x - mean)^T [F,F]

    def add(self, x):                                                       # [B,F]
        x = x.double()
        mean = x.mean(0)
        self.merge(Moments(len(x), mean, (x - mean).T @ (x - mean)))

    def merge(self, other):
        total, delta = self.num + other.num, other.mean - self.mean
        self.scatter = self.scatter + other.scatter
        if self.num:
            self.scatter = self.scatter + torch.outer(delta, delta) * (self.num * other.num / total)
        self.mean, self.num = self.mean + delta * (other.num / total), total

    def gaussian(self):
        """mu [F], sigma [F,F], divided by N - 1."""
        return self.mean, self.scatter / (self.num - 1)


@dataclass
class Features:
    """What a pass over a set leaves; `gaussians` as {"pool": (mu, sigma), ...}, `kept` as {"pool": [N,F], ...}."""
    num: int = 0                                                            # 0: a statistics file that does not say
    gaussians: dict = field(default_factory=dict)
    kept: dict = field(default_factory=dict)


def extract(images, network, batch_size=64, device="cpu", keep=(), processes=None, progress=iter):
    """One pass over `images` (uint8 [N,C,H,W], or anything with a length and such slices) -> Features.

    network(uint8 [B,C,H,W]) -> {name: [B,F]}. The names in `keep` are kept whole, on the CPU; moments are taken of all
    that are not logits. Under several processes each reads its share; the first one returns what a single process
    would, the others return None. Raises ValueError (on every process, if on any) where there are fewer than two
    images, an image cannot be read, or a feature is not finite.
    """
    num, rank, world = len(images), *((processes.rank, processes.world) if processes else (0, 1))
    if num < 2:
        raise ValueError(f"{num} image(s) have no covariance: two are needed, and 50,000 are usual")
    share = -(-num // world)
    rows, error = range(rank * share, min((rank + 1) * share, num)), None   # this process's, maybe none
    try:
        mine = _pass(images, rows, network, batch_size, device, keep, progress)
    except (ValueError, OSError) as e:
        if world == 1:
            raise
        mine, error = None, e
    if world == 1:
        everyone = [mine]
    else:
        errors = [e for e in processes.gather_objects(error) if e]
        if errors:
            raise errors[0]
        everyone = processes.gather_objects(mine, only_first=True)          # in the order of the rows
    if everyone is None:
        return None
    whole = {}
    for moments, _ in everyone:
        for name, m in moments.items():
            whole.setdefault(name, Moments()).merge(m)
    return Features(num, {name: m.gaussian() for name, m in whole.items()},
                    {name: torch.cat([x for _, kept in everyone for x in kept[name]]) for name in keep})


def _pass(images, rows, network, batch_size, device, keep, progress):
    """{name: Moments}, {name: [tensor, ...]} of images[rows], on the CPU."""
    moments, kept = {}, {name: [] for name in keep}
    parts = [slice(i, min(i + batch_size, rows.stop)) for i in rows[::batch_size]]
    with ThreadPoolExecutor(1) as ahead:                                    # one batch is read ahead
        coming = ahead.submit(images.__getitem__, parts[0]) if parts else None
        for i, part in enumerate(progress(parts)):
            batch = coming.result()
            coming = ahead.submit(images.__getitem__, parts[i + 1]) if i + 1 < len(parts) else None
            for name, x in network(batch.to(device)).items():
                bad = (~x.isfinite().all(1)).nonzero()
                if len(bad):
                    raise ValueError(f"{name} features of image {part.start + bad[0].item()} are not finite: damaged "
                                     f"weights?")
                if name != "logits":
                    moments.setdefault(name, Moments()).add(x)
                if name in kept:
                    kept[name].append(x.cpu())
    return {name: Moments(m.num, m.mean.cpu(), m.scatter.cpu()) for name, m in moments.items()}, kept


METRICS = ("fid", "sfid", "is", "precision", "recall", "kid")


def compare(fake, real, metrics, kid_subsets=100, kid_subset_size=1000, split_size=5000):
    """{metric: value} of two Features, for those of METRICS that are asked for; KID with its deviation as kid_std."""
    row = {}
    if "fid" in metrics:
        row["fid"] = frechet_distance(*fake.gaussians["pool"], *real.gaussians["pool"])
    if "sfid" in metrics:
        row["sfid"] = frechet_distance(*fake.gaussians["spatial"], *real.gaussians["spatial"])
    if "is" in metrics:
        row["is"] = inception_score(fake.kept["logits"], split_size)
    if "precision" in metrics or "recall" in metrics:
        both = zip(("precision", "recall"), precision_recall(real.kept["pool"], fake.kept["pool"]))
        row |= {metric: value for metric, value in both if metric in metrics}
    if "kid" in metrics:
        row["kid"], row["kid_std"] = kid(real.kept["pool"], fake.kept["pool"], kid_subsets, kid_subset_size)
    return row


# ---- statistics on disk

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")                             # ADM's names: of pool and spatial features


def from_statistics(stats, path, made_with):
    """Arrays of a statistics file -> Features. `made_with` says what they must have been made with."""
    theirs = str(stats.get("features", made_with))                          # other people's files do not say
    if theirs != made_with:
        raise ValueError(f"{path} holds statistics of {theirs}, not of {made_with}: make them again, or change "
                         f"--features, --resize or --weights")
    names = ("pool", "spatial") if {*STATISTICS} <= stats.keys() else ("pool",)
    pairs = zip(names, ((stats["mu"], stats["sigma"]), (stats.get("mu_s"), stats.get("sigma_s"))))
    return Features(int(stats.get("num", 0)), dict(pairs))


def save_statistics(path, features, made_with):
    """Written whole or not at all."""
    import run
    arrays = [x.numpy() for name in ("pool", "spatial") for x in features.gaussians.get(name, ())]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with run.atomic(path) as f:
        np.savez(f, **dict(zip(STATISTICS, arrays)), num=features.num, features=made_with)


# ---- the program

def load_network(args, device):
    """--features -> network(images) -> {name: [B,F]}, and the words that tell its statistics from others."""
    if args.features == "pixels":
        network = lambda images: {"pool": pixel_features(images.expand(-1, 3, -1, -1))}     # a grey set as its RGB copy
        return network, f"pixels averaged to {PIXELS_SIDE} x {PIXELS_SIDE}"
    if args.features == "inception":
        net = load_inception(args.weights, args.resize).to(device, memory_format=torch.channels_last)
        return net, f"inception, {args.resize} resize, weights {net.weights_sha}"
    import teacher
    net = teacher.load_dinov2(DINOV2, args.weights).resize_pos_embed(DINOV2_SIDE // teacher.PATCH_SIZE).to(device)

    @torch.inference_mode()
    def dinov2(images):                                                     # Stein et al.: bicubic, antialiased
        x = F.interpolate(images.expand(-1, 3, -1, -1).float(), (DINOV2_SIDE, DINOV2_SIDE), mode="bicubic",
                          antialias=True).clamp(0, 255)
        return {"pool": net.features(teacher.normalise(x))[0]}
    return dinov2, DINOV2


def choose(args, images, stats):
    """Metrics asked for, or all that can be had. images, stats: those of samples and reference, None where missing."""
    inception, both = args.features == "inception", None not in images
    spatial = all({"mu_s", "sigma_s"} <= (s or {}).keys() or i is not None and s is None for i, s in zip(images, stats))
    fewest, most = (min(map(len, images)), max(map(len, images))) if both else (0, 0)
    can = {"fid": args.reference, "sfid": args.reference and inception and spatial,
           "is": inception and images[0] is not None, "precision": fewest > 3, "recall": fewest > 3, "kid": fewest > 1}
    refused = [m for m in args.metrics or () if not can[m]]
    if refused:
        raise ValueError(f"--metrics {' '.join(refused)} cannot be had from these: fid wants a REFERENCE; sfid "
                         f"Inception on images, or statistics with mu_s and sigma_s; is Inception on images; "
                         f"precision, recall (of four or more) and kid images on both sides")
    if args.metrics or not args.reference:
        return args.metrics or []
    if most > MANY_IMAGES:
        say(f"precision, recall and kid of more than {MANY_IMAGES} images are slow: name them in --metrics if wanted")
    return [m for m in METRICS if can[m] and (most <= MANY_IMAGES or m in ("fid", "sfid", "is"))]


def say(words):
    if int(os.environ.get("RANK", 0)) == 0:
        print(words, file=sys.stderr, flush=True)                           # stdout is for the results


def bar(args, processes):
    """A progress bar with images per second where tqdm is installed, else iter."""
    try:
        from tqdm import tqdm
    except ImportError:
        return iter
    return lambda parts: tqdm(parts, unit="images", unit_scale=args.batch_size, disable=not processes.main, leave=False)


def measure(path, images, stats, keep, network, made_with, args, processes):
    """Features of one side: from its statistics where there are some, from its images where they are needed."""
    found = from_statistics(stats, path, made_with) if stats else Features()
    if stats:
        say(f"{path}: statistics of {found.num or 'an untold number of'} images"
            + ("" if "features" in stats else "; the file does not say which network and resize made them"))
    if images is not None and (keep or not stats):
        start = time.perf_counter()
        passed = extract(images, network, args.batch_size, processes.device, keep, processes, bar(args, processes))
        say(f"{path}: {len(images)} images, {len(images) / (time.perf_counter() - start):.1f} images/s; {made_with}")
        if passed:                                                          # on the first process
            kept = {name: x.to(processes.device) for name, x in passed.kept.items()}
            found = Features(found.num if stats else passed.num, found.gaussians or passed.gaussians, kept)
    if 0 < found.num < FEW_IMAGES:
        say(f"warning: {path}: {found.num} images are few, and FID is biased upwards: papers use 50,000; compare only "
            f"with distances of as many")
    return found


def evaluate(args, processes):
    """Measure both sides, compare, and print."""
    import data
    paths = [p for p in (args.samples, args.reference) if p]
    if args.crop and not any(Path(p).is_dir() for p in paths):
        raise ValueError(f"--crop is for folders of images, and {' and '.join(paths)} is none")
    sides = [processes.first(lambda: data.open_images(p, args.crop)) for p in paths] + [(None, None)] * (2 - len(paths))
    if sides[0][0] is not None:
        sides[0] = sides[0][0], None                                        # where a file has both, samples are images
    elif args.save_stats:
        raise ValueError(f"--save-stats wants images, and {args.samples} holds statistics")
    metrics = choose(args, *zip(*sides))
    pool = ["pool"] if {"precision", "recall", "kid"} & {*metrics} else []
    if all(images is None or stats and not pool for images, stats in sides):                # nothing is left to measure
        network, made_with = None, str(sides[0][1].get("features", "a network that the file does not name"))
    else:
        network, made_with = processes.first(lambda: load_network(args, processes.device))
    fake = measure(args.samples, *sides[0], pool + ["logits"] * ("is" in metrics), network, made_with, args, processes)
    if args.save_stats and processes.main:
        save_statistics(args.save_stats, fake, made_with)
    real = measure(args.reference, *sides[1], pool, network, made_with, args, processes) if args.reference else None
    if not processes.main:
        return
    subset = args.kid_subset_size or min([1000, *(len(f.kept["pool"]) for f in (fake, real) if pool)])
    row = compare(fake, real, metrics, args.kid_subsets, subset, args.split_size)
    if args.features != "inception":                                        # the I of FID is Inception's
        row = {"fd" if metric == "fid" else metric: value for metric, value in row.items()}
    if args.json:
        nums = {"num_samples": fake.num or None, "num_reference": real and real.num or None}
        print(json.dumps(row | nums | {"features": made_with}))
    else:
        print("\n".join(f"{name:10}{value:12.5f}" for name, value in row.items()))


KNOWN = {"FID of CIFAR-10's first 5,000 training images to its first 5,000 test images": 10.3233,
         "Inception Score of CIFAR-10's training images, ten splits": 11.2368}


def selfcheck(args, processes):
    """Compare with KNOWN, to 0.01, on torchvision's CIFAR-10."""
    import data
    sets = processes.first(lambda: data.open_data("cifar10", root=args.selfcheck))
    network, _ = processes.first(lambda: load_network(args, processes.device))
    train, test = sets.train.images, sets.held.images                       # uint8 [N,3,32,32]
    order = torch.from_numpy(np.random.RandomState(2020).permutation(len(train)))
    passed = [extract(x, network, args.batch_size, processes.device, keep, processes, bar(args, processes))
              for x, keep in ((train[:5000], ()), (test[:5000], ()), (train[order], ["logits"]))]
    if not processes.main:
        return
    values = (*compare(*passed[:2], ["fid"]).values(), *compare(passed[2], None, ["is"]).values())
    for (name, known), value in zip(KNOWN.items(), values):
        print(f"{name}: {value:.4f}, known {known:.4f}")
    if any(abs(value - known) > 0.01 for value, known in zip(values, KNOWN.values())):
        raise ValueError("--selfcheck: these are not the known values: other weights, resize or images?")


def main(argv=None):
    import run
    parser = run.Parser("fid.py", description="Compare SAMPLES with REFERENCE: FID, sFID, Inception Score, precision, "
                                              "recall, KID.")
    add, source = parser.add_argument, "folder of images, .npz, .pt, or digits, cifar10, mnist, fashionmnist"
    add("samples", nargs="?", help=source)
    add("reference", nargs="?", help=f"{source}; or statistics (.npz). Without it: what the samples alone can tell")
    add("--metrics", nargs="+", choices=METRICS, help=f"all that can be had when not given, but precision, recall and "
                                                      f"kid only up to {MANY_IMAGES} images")
    add("--features", choices=("inception", "dinov2", "pixels"), default="inception", help="what is compared")
    add("--weights", help="file with the network's weights; fetched when not given")
    add("--resize", choices=RESIZES, default="tf1", help="tf1: ADM's evaluator, torch-fidelity; pytorch: pytorch-fid")
    add("--crop", type=int, help="cut a folder's images to squares of this side, as ADM does")
    add("--kid-subsets", type=int, default=100, help="subsets of KID")
    add("--kid-subset-size", type=int, help="images in one of them; 1,000, or the smaller set, when not given")
    add("--split-size", type=int, default=5000, help="images in a split of the Inception Score")
    add("--batch-size", type=int, default=64, help="images at a time")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--save-stats", help="write the statistics of SAMPLES to this .npz, for use as REFERENCE")
    add("--json", action="store_true", help="results as one JSON object instead of a table")
    add("--selfcheck", metavar="ROOT", help="compare with known values on torchvision's CIFAR-10 in ROOT, and end")
    args = parser.parse_args(argv)
    with run.one_line("fid.py"):
        for name, least in (("crop", 1), ("kid_subsets", 1), ("kid_subset_size", 2), ("split_size", 1),
                            ("batch_size", 1)):
            if getattr(args, name) is not None and getattr(args, name) < least:
                raise ValueError(f"{run.flag(name)} {getattr(args, name)} must be {least} or more")
        if not args.selfcheck and not (args.samples and (args.reference or args.save_stats or args.metrics)):
            raise ValueError("give SAMPLES and REFERENCE, or SAMPLES and --save-stats FILE or --metrics is")
        if args.selfcheck and args.features != "inception":
            raise ValueError("--selfcheck knows values of --features inception only")
        if not (args.save_stats or "x.npz").endswith(".npz"):
            raise ValueError(f"--save-stats {args.save_stats} must end in .npz")
        processes = run.Processes(args.device)
        torch.set_float32_matmul_precision("highest")                       # TF32 moves a FID in the third decimal
        torch.backends.cudnn.allow_tf32 = False
        try:
            (selfcheck if args.selfcheck else evaluate)(args, processes)
        finally:
            processes.close()


if __name__ == "__main__":
    main()
