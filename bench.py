"""Speed and memory against straightforward versions of the same, on this machine, in one run.

    python bench.py sample                                                 a small width, minutes on two CPU cores
    python bench.py sample --device cuda --model xAR-B --batch-size 64     published widths
    python bench.py fid             against pytorch-fid and torch-fidelity (pip install them) and scipy's matrix root
    python bench.py loader          packed data in sampler order, against mapped arrays; memory over an epoch
    python bench.py train --device cuda --preset imagenet256-xl         training from packed data, before and after tau

The contenders take turns, every figure is a median, and ratios are within one run: nothing compares two runs.
"""
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import data
import fid as fid_module
import haste_train
import packed
import run
import sit
import teacher
import xar


def alternate(contenders, repeats, device):
    """{name: median seconds} of functions that take turns, after one untimed call of each."""
    times = {name: [] for name in contenders}
    for i in range(repeats + 1):
        for name, call in contenders.items():
            wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
            wait()
            start = time.perf_counter()
            call()
            wait()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


# ---- sampling: xAR's cache against the prefix recomputed at every step, and against SiT of equal width and depth

@torch.no_grad()
def sample_without_cache(model, y, num_steps, cfg_scale, randn=torch.randn_like):
    """What `model.sample` returns, each velocity from a block-causal forward over all entities so far."""
    B, M, device, done = len(y), len(model.sizes), y.device, []
    for n, size in enumerate(model.sizes):
        w = cfg_scale if M == 1 else 1 + (cfg_scale - 1) * n / (M - 1)
        labels = y if w == 1 else torch.cat([y, torch.full_like(y, model.num_classes)])

        def velocity(x, t):
            tokens = torch.cat([*done, x.float()], dim=1).repeat(len(labels) // B, 1, 1)
            times = torch.zeros(len(labels), n + 1, device=device)          # finished entities are at t = 0
            times[:, n] = t
            v = model(tokens, times, labels)[:, -size:].double()
            return v if w == 1 else v[B:] + w * (v[:B] - v[B:])
        x = randn(torch.empty(B, size, model.channels, dtype=torch.float64, device=device))
        done.append(xar.reverse_sde(velocity, x, num_steps, randn).float())
    return model.to_latent(torch.cat(done, dim=1))


def sample(argv):
    parser = run.Parser("bench.py sample", description="xAR's cached sampling against recomputing and against SiT.")
    parser.add_argument("--model", choices=list(xar.XAR_CONFIGS), help="published size; without it, the three below")
    parser.add_argument("--hidden-size", type=int, default=512, help="width of both models")
    parser.add_argument("--depth", type=int, default=4, help="blocks of both models")
    parser.add_argument("--num-heads", type=int, default=8, help="attention heads of both models")
    parser.add_argument("--entity", default="cell:8", help="xAR's entity")
    parser.add_argument("--grid", type=int, default=16, help="tokens a side")
    parser.add_argument("--steps", type=int, default=40, help="xAR's sampling steps of each entity")
    parser.add_argument("--sit-steps", type=int, default=250, help="SiT's sampling steps")
    parser.add_argument("--cfg", type=float, default=2.7, help="guidance scale of both")
    parser.add_argument("--batch-size", type=int, default=1, help="images at a time")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each contender")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto is bf16 on CUDA")
    args = parser.parse_args(argv)
    with run.one_line("bench.py"):
        for name in ("hidden_size", "depth", "num_heads", "grid", "steps", "sit_steps", "batch_size", "repeats"):
            run.need(args, getattr(args, name) >= 1, name, "must be 1 or more")
        device = run.Processes(args.device).device
        D, half, heads = args.hidden_size, args.depth // 2, args.num_heads
        size = dict(dim=D, encoder_depth=half, decoder_depth=args.depth - half, num_heads=heads)
        size = xar.XAR_CONFIGS[args.model] if args.model else size
        depth, channels, classes = size["encoder_depth"] + size["decoder_depth"], 16, 1000  # latents of ImageNet
        torch.manual_seed(0)
        model = xar.XAR(args.grid, channels, num_classes=classes, entity=args.entity, **size).to(device).eval()
        other = sit.SiT(args.grid, 1, channels, size["dim"], depth, size["num_heads"], classes).to(device).eval()
    y, B = torch.arange(args.batch_size, device=device) % classes, args.batch_size
    noise = lambda: torch.randn(B, channels, args.grid, args.grid, device=device)

    def same_noise(sampler, **how):                                         # both ways must draw the same images
        torch.manual_seed(1)
        return sampler(num_steps=3, cfg_scale=args.cfg, **how)
    cached, recomputed = same_noise(model.sample, y=y), same_noise(sample_without_cache, model=model, y=y)
    print(f"cached and recomputed samples differ by {(cached - recomputed).norm() / recomputed.norm():.0e} of the norm")
    with run.autocast(args.precision, device):
        seconds = alternate({
            "xAR, cached": lambda: model.sample(y, args.steps, args.cfg),
            "xAR, prefix recomputed": lambda: sample_without_cache(model, y, args.steps, args.cfg),
            "SiT": lambda: sit.sample_sde(other, noise(), y, args.sit_steps, args.cfg),
        }, args.repeats, device)

    M, L = len(model.sizes), sum(model.sizes)
    twice = [1 + (args.cfg != 1 and (n > 0 or M == 1)) for n in range(M)]   # entity 0 is not guided
    ends = [sum(model.sizes[:n + 1]) for n in range(M)]
    enters = sum(model.sizes[:-1]) * (1 + (args.cfg != 1))                  # into the cache, with label and without
    tokens = {"xAR, cached": args.steps * sum(s * g for s, g in zip(model.sizes, twice)) + enters,
              "xAR, prefix recomputed": args.steps * sum(e * g for e, g in zip(ends, twice)),
              "SiT": args.sit_steps * L * (1 + (args.cfg != 1))}
    print(f"width {size['dim']}, {depth} blocks, {L} tokens ({args.entity}), guidance {args.cfg:g}, batch {B}, "
          f"{device}, {run.precision(args.precision, device)}; {args.steps} steps an entity, SiT {args.sit_steps}; "
          f"median of {args.repeats}\n")
    print("| sampler | s per image | relative | tokens evaluated per image | relative |\n|---|---|---|---|---|")
    first = "xAR, cached"
    for name, s in seconds.items():
        count = f"{tokens[name]:,} | {tokens[name] / tokens[first]:.2f}"
        print(f"| {name} | {s / B:.3f} | {s / seconds[first]:.2f} | {count} |")
    print(f"\ncached takes {seconds[first] / seconds['xAR, prefix recomputed']:.2f} of the recomputing time; "
          f"SiT takes {seconds['SiT'] / seconds[first]:.1f} times as long as xAR")


# ---- fid.py: features, the distance, precision and recall

def fid(argv):
    parser = run.Parser("bench.py fid", description="fid.py against pytorch-fid, torch-fidelity and scipy.")
    parser.add_argument("--batch-size", type=int, default=32, help="images at a time")
    parser.add_argument("--image-size", type=int, default=256, help="their side in pixels")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each contender")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    with run.one_line("bench.py"):
        for name in ("batch_size", "image_size", "repeats"):
            run.need(args, getattr(args, name) >= 1, name, "must be 1 or more")
        device, g = run.Processes(args.device).device, torch.Generator().manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} thread(s); median of {args.repeats}\n")

    net = fid_module.Inception()
    for p in net.parameters():
        if p.ndim > 1:                                                      # random, but such that activations live
            torch.nn.init.kaiming_normal_(p, generator=g)
    shape = args.batch_size, 3, args.image_size, args.image_size
    batch = torch.randint(0, 256, shape, dtype=torch.uint8, generator=g).to(device)
    with tempfile.TemporaryDirectory() as home:
        weights = Path(home, "hub", "checkpoints", fid_module.INCEPTION_URL.rsplit("/", 1)[1])
        weights.parent.mkdir(parents=True)
        torch.save(net.state_dict(), weights)
        net = net.to(device, memory_format=torch.channels_last)
        contenders = {"fid.py": lambda: net(batch), **others(home, weights, batch, device)}
    with torch.inference_mode():
        seconds = alternate(contenders, args.repeats, device)
    print("| features | images/s | time relative to fid.py |\n|---|---|---|")
    for name, s in seconds.items():
        print(f"| {name} | {len(batch) / s:.1f} | {s / seconds['fid.py']:.2f} |")

    width, values = 2048, {}
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    a, b = (normal(3 * width, width) @ normal(width, width) for _ in range(2))
    (mu1, s1), (mu2, s2) = ((x.mean(0), torch.cov(x.T)) for x in (a, b))

    def by_root():
        from scipy.linalg import sqrtm
        rest = (mu1 - mu2).square().sum() + s1.trace() + s2.trace()
        values["scipy's sqrtm"] = rest.item() - 2 * np.trace(sqrtm((s1 @ s2).numpy())).real

    def by_values():
        values["fid.py"] = fid_module.frechet_distance(mu1, s1, mu2, s2)
    seconds = alternate({"fid.py": by_values, "scipy's sqrtm": by_root}, args.repeats, torch.device("cpu"))
    print(f"\n| distance at {width} dimensions | s | relative |\n|---|---|---|")
    for name, s in seconds.items():
        print(f"| {name} | {s:.2f} | {s / seconds['fid.py']:.1f} |")
    one, other = values.values()
    print(f"\nthe two distances agree to {abs(one / other - 1):.0e}")

    N = 10_000
    real, fake = (torch.randn(N, width, generator=g) for _ in range(2))
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20             # GiB, of the whole process
    before, start = peak(), time.perf_counter()
    fid_module.precision_recall(real.to(device), fake.to(device))
    print(f"precision and recall of {N} x {N} images: {time.perf_counter() - start:.1f} s; the process's peak memory "
          f"went from {before:.2f} to {peak():.2f} GiB")


def others(home, weights, batch, device):
    """The same network as pytorch-fid and torch-fidelity run it, where they are installed."""
    functions = {}
    try:
        os.environ["TORCH_HOME"] = home                                     # pytorch-fid reads torch's cache only
        from pytorch_fid.inception import InceptionV3
        theirs = InceptionV3([3]).to(device).eval()
        functions["pytorch-fid"] = lambda: theirs(batch.float() / 255)
    except ImportError:
        print("pytorch-fid is not installed: pip install pytorch-fid")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        its = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"],
                                          feature_extractor_weights_path=str(weights)).to(device).eval()
        functions["torch-fidelity"] = lambda: its(batch)
    except ImportError:
        print("torch-fidelity is not installed: pip install torch-fidelity")
    return functions


# ---- packed data

def random_set(folder, count, size, channels=4, factor=8):
    """A packed folder of random numbers: as large as a real one of so many images."""
    about = dict(complete=True, rows=count, size=size, mirror=False, vae="none", fingerprint="none", precision="none",
                 channels=channels, latent_size=size // factor, scale=1.0, classes=[str(c) for c in range(1000)],
                 skipped=[])
    folder, rng = Path(folder), np.random.default_rng(0)
    packed.begin(folder, about, [], rng.integers(0, 1000, count))
    for name, (shape, dtype) in packed.layouts(about).items():
        array = np.load(folder / f"{name}.npy", mmap_mode="r+")
        for i in range(0, count if name in ("images", "moments") else 0, 1000):
            part = array[i:i + 1000]
            part[:] = (rng.integers(0, 256, part.shape, dtype=np.uint8) if name == "images"
                       else rng.random(part.shape, dtype=np.float32))
        array.flush()
    return folder


def resident():
    """MiB of this process's memory; nan where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), float("nan"))


def loader(argv):
    parser = run.Parser("bench.py loader", description="Read packed data from the page cache, in sampler order.")
    parser.add_argument("--count", type=int, default=20_000, help="samples of the set")
    parser.add_argument("--size", type=int, default=256, help="side of the images")
    parser.add_argument("--batch-size", type=int, default=256, help="samples of a batch")
    parser.add_argument("--repeats", type=int, default=3, help="timed epochs of each")
    parser.add_argument("--out", default="out/bench", help="folder for the set, which is deleted in the end")
    args = parser.parse_args(argv)

    class Mapped(packed.PackedSet):                                         # the straightforward version
        def __init__(self, folder):
            super().__init__(folder)
            self.images = np.load(Path(folder, "images.npy"), mmap_mode="r")
            self.latents = np.load(Path(folder, "moments.npy"), mmap_mode="r")

        def read(self, rows):
            return torch.from_numpy(self.images[self.rows[rows]]), self.labels[rows]

        def moments(self, rows):
            return torch.from_numpy(self.latents[self.rows[rows]])

    def epoch(kind, images):
        """Seconds, bytes read, and the memory at 0, 25, 50, 75, 100 % of it."""
        feed = data.batches(kind(folder), 0, 0, args.batch_size, wanted=lambda step: images)
        memory, size, start = [resident()], 0, time.perf_counter()
        for i in range(batches):
            size += sum(b.numel() * b.element_size() for b in next(feed) if b is not None)
            if (i + 1) * 4 // batches > i * 4 // batches:
                memory.append(resident())
        seconds = time.perf_counter() - start
        feed.close()
        return seconds, size, memory

    Path(args.out).mkdir(parents=True, exist_ok=True)
    batches = max(1, args.count // args.batch_size)
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        random_set(folder, args.count, args.size)
        print(f"{args.count} samples of {args.size} pixels, batches of {args.batch_size}, from the page cache; medians "
              f"of {args.repeats} epochs\n\n| reader | what | samples/s | MiB/s | resident MiB at 0, 25, 50, 75, 100 % "
              f"of an epoch |\n|---|---|---|---|---|")
        for images in (False, True):
            found = {"packed.py": [], "mapped": []}
            for _ in range(args.repeats + 1):
                for name, kind in (("packed.py", packed.PackedSet), ("mapped", Mapped)):
                    found[name].append(epoch(kind, images))
            for name, epochs in found.items():
                seconds, size = statistics.median(e[0] for e in epochs[1:]), epochs[0][1]  # the first one is untimed
                print(f"| {name} | {'images and moments' if images else 'moments'} | "
                      f"{batches * args.batch_size / seconds:,.0f} | {size / seconds / 2 ** 20:,.0f} | "
                      f"{', '.join(f'{m:.0f}' for m in epochs[-1][2])} |", flush=True)


def train(argv):
    parser = run.Parser("bench.py train", description="haste_train.py on packed random data; more flags go to it.")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--preset", choices=[p for p in haste_train.PRESETS if p.startswith("imagenet")],
                        default="imagenet256-b", help="of haste_train.py")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps; the guidance ends half-way")
    parser.add_argument("--count", type=int, default=4000, help="images of the set")
    parser.add_argument("--out", default="out/bench", help="folder for set and run, which are deleted in the end")
    args, more = parser.parse_known_args(argv)                              # the rest goes to haste_train.py

    size = haste_train.PRESETS[args.preset]["image_size"]
    Path(args.out).mkdir(parents=True, exist_ok=True)
    waited, batch = [], run.Book.batch

    def timed(self, feed, step):
        start = time.perf_counter()
        found = batch(self, feed, step)
        waited.append(time.perf_counter() - start)
        return found
    run.Book.batch = timed
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        random_set(Path(folder, "set"), args.count, size)
        torch.save(teacher.DINOv2().state_dict(), Path(folder, "teacher.pt"))              # the presets' ViT-B, random
        haste_train.main(["--preset", args.preset, "--device", args.device, "--data", f"{folder}/set", "--steps",
                          str(args.steps), "--stop", str(args.steps // 2), "--teacher-weights", f"{folder}/teacher.pt",
                          "--out", f"{folder}/run", "--eval-every", "0", "--save-every", "0", "--log-every",
                          str(max(1, args.steps // 20)), *more])
        rows = run.read_log(Path(folder, "run", "log.jsonl"))
        start = time.perf_counter()
        saved = torch.load(Path(folder, "run", "ckpt.pt"), map_location="cpu", weights_only=True)
        load, start = time.perf_counter() - start, time.perf_counter()
        run.save_checkpoint(Path(folder, "again.pt"), saved)
        save, gigabytes = time.perf_counter() - start, Path(folder, "again.pt").stat().st_size / 1e9
    speed = lambda rows: statistics.median(r["images_per_s"] for r in rows[1:] or rows)     # the first one starts up
    guided, free = [[r for r in rows if ("feature_loss" in r) == g] for g in (True, False)]
    ratio = speed(free) / speed(guided)
    print(f"guided {speed(guided):.1f} images/s, free {speed(free):.1f} ({ratio:.2f} times); "
          f"waited for data {1000 * statistics.median(waited):.2f} ms a step (median), at most "
          f"{max(waited[1:]):.3f} s; checkpoint of {gigabytes:.2f} GB: saved in {save:.1f} s, loaded in {load:.1f} s")
    if torch.cuda.is_available():
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB")


COMMANDS = {"sample": sample, "fid": fid, "loader": loader, "train": train}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        raise SystemExit(f"bench.py: say what to measure: {', '.join(f'python bench.py {c}' for c in COMMANDS)}")
    COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    main()
