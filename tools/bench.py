"""Compare speed and memory with straightforward versions of the same, on this machine, in one run.

    python -m tools.bench train       HASTE's training step, before and after its end, against the
                                      straightforward one and a plain model; --model xAR-B: xAR's,
                                      --preset coco256: MM-DiT's
    python -m tools.bench growth      the attention alignment alone, from 256 to 4,096 tokens
    python -m tools.bench memory      what each preset needs on a GPU, counted without one
    python -m tools.bench sample      xAR's cached sampling, against straightforward ones and SiT;
                                      a small width by default, minutes on two CPU cores
    python -m tools.bench fid         fid.py against pytorch-fid and torch-fidelity (pip install
                                      them) and scipy's matrix root
    python -m tools.bench loader      packed data in sampler order, against mapped arrays; memory
                                      over an epoch
    python -m tools.bench program     haste_train.py itself on packed random data: speed before and
                                      after tau, waiting for data, checkpoints

Each sub-command lists its flags with --help. Contenders take turns, every figure is a median, and
ratios are taken within one run: never compare figures of two runs. docs/speed.md has results.
tools/straightforward.py has the versions that ours are compared with.
"""
import os
import resource
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import data
import ddp
import fid
import haste_train
import packed
import prepare
import run
import sit
import teacher
import xar
from tools import measure, memory, straightforward, training

PROGRAM = "python -m tools.bench"
CLASSES = 1000                                                              # of ImageNet
LATENT_CHANNELS = 16                                                        # of xAR's latents of ImageNet


def require_one_or_more(args, *names):
    """Refuse flags whose value is 0 or less."""
    for name in names:
        run.require(args, getattr(args, name) >= 1, name, "must be 1 or more")


# ---- sample: xAR's cache against a straightforward one, the prefix recomputed, and SiT

def tokens_evaluated(model, args):
    """Return {sampler: tokens that its network evaluates for one image}."""
    sizes = model.sizes
    M = len(sizes)
    both = 1 if args.cfg == 1 else 2                                        # with label and without
    cached = 0
    recomputed = 0
    for n, size in enumerate(sizes):
        # the first of several entities is not guided: its guidance scale is 1
        ways = both if n > 0 or M == 1 else 1
        cached += args.steps * size * ways
        recomputed += args.steps * sum(sizes[:n + 1]) * ways
    # each entity but the last enters the cache, with label and without
    cached += sum(sizes[:-1]) * both
    # twice the steps for each entity, and one to enter the cache, also for the last
    straight = 2 * sum(sizes) * (args.steps + 1)
    return {"xAR, cached": cached, "xAR, straightforward cache": straight,
            "xAR, prefix recomputed": recomputed, "SiT": args.sit_steps * sum(sizes) * both}


def sample_flags(argv):
    parser = run.Parser(f"{PROGRAM} sample",
                        description="Compare xAR's cached sampling with recomputing and with SiT.")
    add = parser.add_argument
    add("--model", choices=list(xar.XAR_CONFIGS), help="published size, instead of the next three")
    add("--hidden-size", type=int, default=512, help="width of both models")
    add("--depth", type=int, default=4, help="blocks of both models")
    add("--num-heads", type=int, default=8, help="attention heads of both models")
    add("--entity", default="cell:8", help="xAR's entity")
    add("--grid", type=int, default=16, help="tokens a side")
    add("--steps", type=int, default=40, help="xAR's sampling steps for each entity")
    add("--sit-steps", type=int, default=250, help="SiT's sampling steps")
    add("--cfg", type=float, default=2.7, help="guidance scale of both")
    add("--batch-size", type=int, default=1, help="images at a time")
    add("--repeats", type=int, default=3, help="timed calls of each contender")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="auto is bf16 on CUDA")
    return parser.parse_args(argv)


def models_of(args, device):
    """Return an xAR and a SiT of random weights, of equal width, depth and heads, in eval mode."""
    size = dict(dim=args.hidden_size, encoder_depth=args.depth // 2,
                decoder_depth=args.depth - args.depth // 2, num_heads=args.num_heads)
    if args.model:
        size = xar.XAR_CONFIGS[args.model]
    depth = size["encoder_depth"] + size["decoder_depth"]
    torch.manual_seed(0)
    ours = xar.XAR(args.grid, LATENT_CHANNELS, num_classes=CLASSES, entity=args.entity, **size)
    other = sit.SiT(args.grid, 1, LATENT_CHANNELS, size["dim"], depth, size["num_heads"], CLASSES)
    return ours.to(device).eval(), other.to(device).eval()


def bench_sample(argv):
    args = sample_flags(argv)
    with run.one_line_errors(f"{PROGRAM} sample"):
        require_one_or_more(args, "hidden_size", "depth", "num_heads", "grid", "steps", "sit_steps",
                            "batch_size", "repeats")
        device = ddp.Processes(args.device).device
        model, other = models_of(args, device)
    B = args.batch_size
    y = torch.arange(B, device=device) % CLASSES

    def sample_sit():
        noise = torch.randn(B, LATENT_CHANNELS, args.grid, args.grid, device=device)
        return sit.sample_sde(other, noise, y, args.sit_steps, args.cfg)

    # a comparison of speed means something only if both ways draw the same images
    samplers = {
        "xAR, cached": model.sample,
        "xAR, straightforward cache": partial(straightforward.sample_by_growing_cache, model),
        "xAR, prefix recomputed": partial(straightforward.sample_without_cache, model)}
    drawn = {}
    for name, sample in samplers.items():
        torch.manual_seed(1)
        drawn[name] = sample(y, 3, args.cfg)
    ours = drawn.pop("xAR, cached")
    for name, theirs in drawn.items():
        difference = (ours - theirs).norm() / theirs.norm()
        print(f"samples of {name} differ by {difference:.0e} of the norm from the cached ones")

    contenders = {name: partial(sample, y, args.steps, args.cfg)
                  for name, sample in samplers.items()}
    contenders["SiT"] = sample_sit
    with run.autocast(args.precision, device):
        seconds = measure.alternate(contenders, args.repeats, device)

    name = args.model or f"width {args.hidden_size}, {args.depth} blocks"
    print(f"{name}, {sum(model.sizes)} tokens ({args.entity}), guidance {args.cfg:g}, batch {B}, "
          f"{measure.machine(device)}, {run.precision(args.precision, device)}; "
          f"{args.steps} steps an entity, SiT {args.sit_steps}; median of {args.repeats}\n")
    print("| sampler | s per image | relative | tokens evaluated per image | relative |\n"
          "|---|---|---|---|---|")
    tokens = tokens_evaluated(model, args)
    first = "xAR, cached"
    for name, s in seconds.items():
        print(f"| {name} | {s / B:.3f} | {s / seconds[first]:.2f} | {tokens[name]:,} | "
              f"{tokens[name] / tokens[first]:.2f} |")
    relative = {name: seconds[first] / s for name, s in seconds.items()}
    print(f"\ncached takes {relative['xAR, straightforward cache']:.3f} of the time of the "
          f"straightforward cache, {relative['xAR, prefix recomputed']:.2f} of recomputing, "
          f"{relative['SiT']:.2f} of SiT")


# ---- fid: features, the distance, precision and recall

FEATURES = 2048                                                             # of Inception's pool layer


def bench_fid(argv):
    parser = run.Parser(f"{PROGRAM} fid",
                        description="Compare fid.py with pytorch-fid, torch-fidelity and scipy.")
    parser.add_argument("--batch-size", type=int, default=32, help="images at a time")
    parser.add_argument("--image-size", type=int, default=256, help="their side in pixels")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each contender")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    with run.one_line_errors(f"{PROGRAM} fid"):
        require_one_or_more(args, "batch_size", "image_size", "repeats")
        device = ddp.Processes(args.device).device

    # full float32 for all: the other packages do not ask for less
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} thread(s); "
          f"median of {args.repeats}\n")
    g = torch.Generator().manual_seed(0)
    compare_features(args, device, g)
    compare_distances(args.repeats, g)
    measure_precision_recall(device, g)


def compare_features(args, device, g):
    """Print the speed of Inception as fid.py and other packages run it, on the same weights."""
    net = fid.Inception()
    # random weights, but scaled such that activations neither vanish nor explode
    for p in net.parameters():
        if p.ndim > 1:
            torch.nn.init.kaiming_normal_(p, generator=g)
    shape = (args.batch_size, 3, args.image_size, args.image_size)
    batch = torch.randint(0, 256, shape, dtype=torch.uint8, generator=g).to(device)

    with tempfile.TemporaryDirectory() as home:
        weights = Path(home, "hub", "checkpoints", fid.INCEPTION_URL.rsplit("/", 1)[1])
        weights.parent.mkdir(parents=True)
        torch.save(net.state_dict(), weights)
        contenders = other_packages(home, weights, batch, device)
    net = net.to(device, memory_format=torch.channels_last)
    contenders = {"fid.py": lambda: net(batch), **contenders}
    with torch.inference_mode():
        seconds = measure.alternate(contenders, args.repeats, device)
    print("| features | images/s | time relative to fid.py |\n|---|---|---|")
    for name, s in seconds.items():
        print(f"| {name} | {len(batch) / s:.1f} | {s / seconds['fid.py']:.2f} |")


def other_packages(home, weights, batch, device):
    """Return {package: function} that run the same network, for the packages that are installed."""
    functions = {}
    try:
        os.environ["TORCH_HOME"] = home                                     # pytorch-fid reads torch's cache only
        from pytorch_fid.inception import InceptionV3
        theirs = InceptionV3([3]).to(device).eval()

        def on_floats():
            theirs(batch.float() / 255)                                     # it takes images in [0, 1]
        functions["pytorch-fid"] = on_floats
    except ImportError:
        print("pytorch-fid is not installed: pip install pytorch-fid")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        its = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"],
                                          feature_extractor_weights_path=str(weights))
        its = its.to(device).eval()
        functions["torch-fidelity"] = partial(its, batch)
    except ImportError:
        print("torch-fidelity is not installed: pip install torch-fidelity")
    return functions


def compare_distances(repeats, g):
    """Print the time of the Frechet distance by eigenvalues (fid.py) and by scipy's matrix root."""
    def gaussian():
        a = torch.randn(3 * FEATURES, FEATURES, generator=g, dtype=torch.float64)
        x = a @ torch.randn(FEATURES, FEATURES, generator=g, dtype=torch.float64)
        return x.mean(0), torch.cov(x.T)

    mu1, s1 = gaussian()
    mu2, s2 = gaussian()
    values = {}

    def by_root():
        from scipy.linalg import sqrtm
        rest = (mu1 - mu2).square().sum() + s1.trace() + s2.trace()
        values["scipy's sqrtm"] = rest.item() - 2 * np.trace(sqrtm((s1 @ s2).numpy())).real

    def by_eigenvalues():
        values["fid.py"] = fid.frechet_distance(mu1, s1, mu2, s2)

    contenders = {"fid.py": by_eigenvalues, "scipy's sqrtm": by_root}
    seconds = measure.alternate(contenders, repeats, torch.device("cpu"))
    print(f"\n| distance at {FEATURES} dimensions | s | relative |\n|---|---|---|")
    for name, s in seconds.items():
        print(f"| {name} | {s:.2f} | {s / seconds['fid.py']:.1f} |")
    difference = abs(values["fid.py"] / values["scipy's sqrtm"] - 1)
    print(f"\nthe two distances agree to {difference:.0e}")


def measure_precision_recall(device, g, count=10_000):
    """Print time and memory of precision and recall of `count` images against as many."""
    def peak():                                                             # GiB, of the whole process
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20

    real = torch.randn(count, FEATURES, generator=g)
    fake = torch.randn(count, FEATURES, generator=g)
    before = peak()
    start = time.perf_counter()
    fid.precision_recall(real.to(device), fake.to(device))
    print(f"precision and recall of {count} x {count} images: {time.perf_counter() - start:.1f} s; "
          f"the process's peak memory went from {before:.2f} to {peak():.2f} GiB")


# ---- loader and program: packed data

def random_set(folder, count, size, channels=4, factor=8):
    """Make a packed folder of random numbers, as large as a real one of `count` images."""
    folder = Path(folder)
    rng = np.random.default_rng(0)
    about = dict(complete=True, rows=count, size=size, mirror=False, vae="none",
                 fingerprint="none", precision="none", channels=channels,
                 latent_size=size // factor, scale=1.0,
                 classes=[str(c) for c in range(CLASSES)], skipped=[], crop="adm", text=None)
    labels = rng.integers(0, CLASSES, count)
    prepare.begin(folder, prepare.Plan(folder, [], labels, None, about))
    images = np.load(folder / "images.npy", mmap_mode="r+")
    moments = np.load(folder / "moments.npy", mmap_mode="r+")
    for i in range(0, count, 1000):                                         # in parts: a set may be huge
        part = slice(i, i + 1000)
        images[part] = rng.integers(0, 256, images[part].shape, dtype=np.uint8)
        moments[part] = rng.random(moments[part].shape, dtype=np.float32)
    images.flush()
    moments.flush()


class MappedSet:
    """The straightforward reader of a packed folder: its arrays, memory-mapped."""

    def __init__(self, folder):
        self.images = np.load(Path(folder, "images.npy"), mmap_mode="r")
        self.latents = np.load(Path(folder, "moments.npy"), mmap_mode="r")
        self.labels = torch.from_numpy(np.load(Path(folder, "labels.npy")))

    def __len__(self):
        return len(self.labels)

    def read(self, rows):
        return torch.from_numpy(self.images[np.asarray(rows)]), self.labels[rows]

    def moments(self, rows):
        return torch.from_numpy(self.latents[np.asarray(rows)])


def resident():
    """Return MiB of this process's memory, nan if the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    sizes = [line.split()[1] for line in lines if line.startswith("VmRSS")]
    return int(sizes[0]) / 1024 if sizes else float("nan")


def read_epoch(dataset, batches, batch_size, images):
    """Read an epoch; return its seconds, bytes, and MiB of memory at 0, 25, 50, 75, 100 % of it."""
    feed = data.batches(dataset, 0, 0, batch_size, wanted=lambda step: images)
    memory = [resident()]
    size = 0
    start = time.perf_counter()
    for i in range(batches):
        *batch, _ = next(feed)                                              # no random numbers here
        size += sum(b.numel() * b.element_size() for b in batch if b is not None)
        if (i + 1) * 4 // batches > i * 4 // batches:                       # another quarter is done
            memory.append(resident())
    seconds = time.perf_counter() - start
    feed.close()
    return seconds, size, memory


def bench_loader(argv):
    parser = run.Parser(f"{PROGRAM} loader",
                        description="Read packed data from the page cache, in sampler order.")
    parser.add_argument("--count", type=int, default=20_000, help="samples of the set")
    parser.add_argument("--size", type=int, default=256, help="side of the images")
    parser.add_argument("--batch-size", type=int, default=256, help="samples of a batch")
    parser.add_argument("--repeats", type=int, default=3, help="timed epochs of each reader")
    parser.add_argument("--out", default="out/bench",
                        help="folder for the set, which is deleted at the end")
    args = parser.parse_args(argv)

    Path(args.out).mkdir(parents=True, exist_ok=True)
    batches = max(1, args.count // args.batch_size)
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        random_set(folder, args.count, args.size)
        print(f"{args.count} samples of {args.size} pixels, batches of {args.batch_size}, from the "
              f"page cache; medians of {args.repeats} epochs\n")
        print("| reader | what | samples/s | MiB/s | resident MiB at 0, 25, 50, 75, 100 % "
              "of an epoch |\n|---|---|---|---|---|")
        for images, what in ((False, "moments"), (True, "images and moments")):
            readers = {"packed.py": packed.PackedSet, "mapped": MappedSet}
            epochs = {name: [] for name in readers}
            for _ in range(args.repeats + 1):
                for name, reader in readers.items():
                    # a new reader for each epoch: mapped pages stay with the old one
                    found = read_epoch(reader(folder), batches, args.batch_size, images)
                    epochs[name].append(found)

            for name, found in epochs.items():
                seconds = statistics.median(e[0] for e in found[1:])        # the first epoch is untimed
                _, size, memory = found[-1]
                print(f"| {name} | {what} | {batches * args.batch_size / seconds:,.0f} | "
                      f"{size / seconds / 2 ** 20:,.0f} | "
                      f"{', '.join(f'{m:.0f}' for m in memory)} |", flush=True)


def timed_batches(waited):
    """Return `data.batches`, changed to append the seconds of each wait to the list `waited`."""
    original = data.batches

    def batches(*args, **kwargs):
        feed = original(*args, **kwargs)
        try:
            while True:
                start = time.perf_counter()
                batch = next(feed)
                waited.append(time.perf_counter() - start)
                yield batch
        finally:
            feed.close()
    return batches


def copy_checkpoint(path, copy):
    """Load a checkpoint and save it again; return both times in seconds, and its gigabytes."""
    start = time.perf_counter()
    saved = torch.load(path, map_location="cpu", weights_only=True)
    loaded = time.perf_counter()
    run.save_checkpoint(copy, saved)
    return loaded - start, time.perf_counter() - loaded, copy.stat().st_size / 1e9


def noting_peak(peaks):
    """Return `haste_train.drop_projector`, changed to note the peak of the memory so far."""
    original = haste_train.drop_projector

    def drop_projector(*args):
        if torch.cuda.is_available():
            peaks.append(torch.cuda.max_memory_allocated())
        kept = original(*args)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return kept
    return drop_projector


def bench_program(argv):
    parser = run.Parser(f"{PROGRAM} program",
                        description="Run haste_train.py on packed random data; flags that are not "
                                    "listed here are passed on to it.")
    # with a teacher: after its end, training is as without one
    presets = [name for name, preset in haste_train.PRESETS.items()
               if name.startswith("imagenet") and preset.get("align") != "none"]
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--preset", choices=presets, default="imagenet256-b",
                        help="of haste_train.py")
    parser.add_argument("--steps", type=int, default=200,
                        help="optimizer steps; the alignment ends half-way")
    parser.add_argument("--count", type=int, default=4000, help="images of the set")
    parser.add_argument("--out", default="out/bench",
                        help="folder for set and run, which are deleted at the end")
    args, more = parser.parse_known_args(argv)

    # below --out rather than in /tmp, which may be too small for set and checkpoints
    Path(args.out).mkdir(parents=True, exist_ok=True)
    waited = []
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        folder = Path(folder)
        random_set(folder / "set", args.count, haste_train.PRESETS[args.preset]["image_size"])
        torch.save(teacher.DINOv2().state_dict(), folder / "teacher.pt")    # the presets' ViT-B, random
        # no evaluation, no checkpoint before the end: only the training is timed
        flags = ["--preset", args.preset, "--device", args.device, "--data", f"{folder}/set",
                 "--steps", str(args.steps), "--stop", str(args.steps // 2),
                 "--teacher-weights", f"{folder}/teacher.pt", "--out", f"{folder}/run",
                 "--eval-every", "0", "--save-every", "0",
                 "--log-every", str(max(1, args.steps // 20))]
        peaks = []
        with (mock.patch.object(data, "batches", timed_batches(waited)),
              mock.patch.object(haste_train, "drop_projector", noting_peak(peaks))):
            haste_train.main([*flags, *more])
        rows = run.read_log(folder / "run" / "log.jsonl")
        load, save, gigabytes = copy_checkpoint(folder / "run" / "ckpt.pt", folder / "again.pt")

    def speed(rows):                                                        # without the first, which starts up
        return statistics.median(row["images_per_s"] for row in rows[1:] or rows)

    # losses of the alignment are in the log only as long as it lasts
    guided = speed([row for row in rows if "feature_loss" in row])
    free = speed([row for row in rows if "feature_loss" not in row])
    print(f"guided {guided:.1f} images/s, free {free:.1f} ({free / guided:.2f} times); "
          f"waited for data {1000 * statistics.median(waited):.2f} ms a step (median), "
          f"at most {max(waited[1:]):.3f} s; "
          f"checkpoint of {gigabytes:.2f} GB: saved in {save:.1f} s, loaded in {load:.1f} s")
    if torch.cuda.is_available():
        peaks.append(torch.cuda.max_memory_allocated())
        gib = [peak / measure.GIB for peak in peaks]
        print(f"peak memory {gib[0]:.1f} GiB guided, {gib[-1]:.1f} GiB free")


COMMANDS = {"train": training.bench_train, "growth": memory.bench_growth,
            "memory": memory.bench_memory, "sample": bench_sample, "fid": bench_fid,
            "loader": bench_loader, "program": bench_program}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__.strip())
    elif argv and argv[0] in COMMANDS:
        COMMANDS[argv[0]](argv[1:])
    else:
        commands = ", ".join(f"{PROGRAM} {name}" for name in COMMANDS)
        raise SystemExit(f"{PROGRAM}: name what to measure: {commands} (--help says more)")


if __name__ == "__main__":
    main()
