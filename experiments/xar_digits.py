"""The README's tables of xAR: entities and contexts on the digits at equal steps, three seeds; and exposure bias.

    python experiments/xar_digits.py        27 runs of at most 90 s, two at a time on one thread each

Every run is `python xar.py train FLAGS` with the flags printed here; a run that is finished already is only read.

Exposure bias: the error of an entity's velocity when the entities before it are not the real ones but the model's own.
They are made from the real ones, noised to level s and brought back by the sampler, one after another, each on the
ones made before: s = 0 is the real context, s = 1 one that is generated from nothing but the label. So the context
stays near the image whose velocity is asked for, and the same images, noise and times serve every model.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import xar  # noqa: E402

SIZE = ["--depth", "4", "--batch-size", "16", "--eval-samples", "400"]     # so that the slowest run stays below 90 s
ENTITIES = ("patch", "cell:2", "cell:4", "subsample:2", "scale", "image")
CONTEXT_ENTITY = "cell:4"
LEVELS, TIMES = (0.0, 0.25, 0.5, 0.75, 1.0), (0.1, 0.3, 0.5, 0.7, 0.9)      # noise of the context; times of the error
HELD = 100                                                                  # images of the error
COLUMNS = (("fd", 3, 1), ("fd_held", 3, 1), ("accuracy", 1, 100), ("nearest", 3, 1))


def train(entity, context, seed, steps, out):
    """Folder and log of one run."""
    folder = out / f"{entity.replace(':', '')}_{context}_{seed}"
    flags = [*SIZE, "--entity", entity, "--context", context, "--seed", str(seed), "--steps", str(steps),
             "--eval-every", str(steps), "--save-every", "0", "--out", str(folder)]
    log = folder / "log.jsonl"
    read = lambda: [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if not read() or read()[-1]["step"] < steps:
        print("python xar.py train", *flags, flush=True)
        subprocess.run([sys.executable, "xar.py", "train", *flags], cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
    rows = read()
    batch = int(SIZE[SIZE.index("--batch-size") + 1])
    return folder, {**rows[-1], "images_per_s": rows[-1]["step"] * batch / rows[-1]["seconds"]}


def images_per_second(folder, num=100, num_steps=20):
    """Of the sampler, on one thread, without guidance."""
    model, start = xar.load_xar(folder / "ckpt.pt"), time.perf_counter()
    model.sample(torch.arange(num) % model.num_classes, num_steps)
    return num / (time.perf_counter() - start)


@torch.no_grad()
def exposure(folder, latent, y, num_steps=10):
    """Squared velocity error of the later entities, a number for each of LEVELS; latent [B,C,h,w] held-out images."""
    model, errors = xar.load_xar(folder / "ckpt.pt"), []
    real, ends = model.to_tokens(latent), np.cumsum(model.sizes)
    for s in LEVELS:
        g = torch.Generator().manual_seed(0)
        randn = lambda like: torch.randn(like.shape, generator=g, dtype=like.dtype)
        context, found = real[:, :0], []
        for n, (end, size) in enumerate(zip(ends, model.sizes)):
            x, eps = real[:, end - size:end], randn(real[:, end - size:end])

            def velocity(noisy, t):
                times = torch.zeros(len(y), n + 1)                          # the context is taken for finished
                times[:, n] = t
                return model(torch.cat([context, noisy.float()], dim=1), times, y)[:, -size:]
            if n > 0:
                found += [(velocity((1 - t) * x + t * eps, t) - (eps - x)).square().mean().item() for t in TIMES]
            own = x if s == 0 else xar.reverse_sde(velocity, ((1 - s) * x + s * randn(x)).double(), num_steps, randn, s)
            context = torch.cat([context, own.float()], dim=1)
        errors.append(np.mean(found))
    return errors


def plus_minus(values, digits=3, unit=1):
    values = unit * np.array(values)
    return f"{values.mean():.{digits}f}" + (f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else "")


def table(title, runs):
    print(f"| {title} | Fréchet distance | to held-out digits | accuracy % | nearest training digit "
          f"| images/s trained | images/s sampled |\n|---|---|---|---|---|---|---|")
    for name, results in runs.items():
        cells = [plus_minus([row[k] for _, row in results], *how) for k, *how in COLUMNS]
        cells.append(plus_minus([row["images_per_s"] for _, row in results], 0))
        cells.append(plus_minus([images_per_second(folder) for folder, _ in results], 1))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print()


def draw(errors, path):
    """errors {context: [seeds, levels]} as a picture, its range over seeds shaded."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(8, 3))
    for ax, values, title in ((axes[0], errors, "squared error of later entities' velocity"),
                              (axes[1], {c: e / e[:, :1] for c, e in errors.items()}, "relative to the real context")):
        for c, e in values.items():
            line, = ax.plot(LEVELS, e.mean(0), marker=".", label=f"trained on {c} context")
            ax.fill_between(LEVELS, e.min(0), e.max(0), alpha=0.15, color=line.get_color())
        ax.set(title=title, xlabel="context: 0 real ... 1 generated")
    axes[1].legend(fontsize="small")
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=80)
    plt.close(fig)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/xar_digits"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--steps", type=int, default=400, help="steps of each run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--picture", type=Path, default=Path("out/xar_digits/exposure.png"), help="exposure bias")
    args = parser.parse_args()
    out, seeds = args.out.resolve(), range(args.seeds)
    torch.set_num_threads(1)
    kinds = [(e, "random") for e in ENTITIES] + [(CONTEXT_ENTITY, c) for c in xar.CONTEXTS if c != "random"]
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {kind: [pool.submit(train, *kind, seed, args.steps, out) for seed in seeds] for kind in kinds}
        results = {kind: [j.result() for j in js] for kind, js in jobs.items()}

    table("entity", {e: results[e, "random"] for e in ENTITIES})
    table(f"context ({CONTEXT_ENTITY})", {c: results[CONTEXT_ENTITY, c] for c in reversed(xar.CONTEXTS)})
    rows = [row for rs in results.values() for _, row in rs]
    print(f"longest run: {max(row['seconds'] for row in rows):.0f} s of training; held-out digits lie "
          f"{rows[0]['nearest_held']:.3f} from the nearest training digit\n")

    held = data.open_data("digits").held
    latent, labels = data.to_pixels(held.images)[:HELD], held.labels[:HELD]
    errors = {c: np.array([exposure(folder, latent, labels) for folder, _ in results[CONTEXT_ENTITY, c]])
              for c in xar.CONTEXTS}                                        # context: [seeds, levels]
    print("| error of later entities, context made again from noise level | " + " | ".join(f"{s:g}" for s in LEVELS)
          + " | s = 1 over s = 0 |\n|---|" + "---|" * (len(LEVELS) + 1))
    for c, e in errors.items():
        cells = [plus_minus(e[:, i]) for i in range(len(LEVELS))] + [plus_minus(e[:, -1] / e[:, 0], 2)]
        print(f"| {c} | " + " | ".join(cells) + " |")
    draw(errors, args.picture)


if __name__ == "__main__":
    main()
