"""Make the tables of xAR on the digits: entities and contexts at equal steps, and exposure bias.

    python -m experiments.xar_digits      # 27 runs of at most 90 s, two at a time, one thread each

Each run is `python xar_train.py FLAGS` with the flags that are printed; a run that is finished is
only read.

Exposure bias is the error of an entity's velocity when the entities before it are not the real
ones, but the model's own. They are made from the real ones, noised to level s and brought back by
the sampler, one after another, each given the ones made before: s = 0 is the real context, and
s = 1 is one generated from nothing but the label. So the context stays near the image whose
velocity is measured, and the same images, noise and times serve all models.
"""
import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import data
import run
import xar
from experiments import study

BATCH = 16
SIZE = ["--depth", "4", "--batch-size", str(BATCH), "--eval-samples", "400"]    # at most 90 s a run
ENTITIES = ("patch", "cell:2", "cell:4", "subsample:2", "scale", "image")
CONTEXT_ENTITY = "cell:4"                       # contexts are compared with this one
LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)            # noise from which the context is made again
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)               # times of the velocity errors
HELD = 100                                      # held-out images of the velocity errors
COLUMNS = (("fd", 3, 1), ("fd_held", 3, 1), ("accuracy", 1, 100), ("nearest", 3, 1))


# ---- runs

def train(entity, context, seed, steps, out):
    """Train unless that is done already. Returns the run's folder and the last row of its log."""
    folder = out / f"{entity.replace(':', '')}_{context}_{seed}"
    flags = [*SIZE, "--entity", entity, "--context", context, "--seed", str(seed),
             "--steps", str(steps), "--eval-every", str(steps), "--save-every", "0",
             "--out", str(folder)]
    rows = run.read_log(folder / "log.jsonl")
    if not rows or rows[-1]["step"] < steps:
        print("python xar_train.py", *flags, flush=True)
        subprocess.run([sys.executable, "xar_train.py", *flags], check=True,
                       stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    last = run.read_log(folder / "log.jsonl")[-1]
    return folder, {**last, "images_per_s": last["step"] * BATCH / last["seconds"]}


# ---- measurements

def images_per_second(model, samples=100, num_steps=20):
    """Return the speed of the sampler, without guidance."""
    y = torch.arange(samples) % model.num_classes
    start = time.perf_counter()
    model.sample(y, num_steps)
    return samples / (time.perf_counter() - start)


@torch.no_grad()
def errors_at_level(model, s, latent, y, num_steps):
    """Return the later entities' mean squared velocity error with context made from level s."""
    g = torch.Generator().manual_seed(0)        # the same noise for every model and level

    def randn(like):
        return torch.randn(like.shape, generator=g, dtype=like.dtype)

    real = model.to_tokens(latent)
    context = real[:, :0]                       # what the model has made so far
    errors = []
    for n, x in enumerate(real.split(model.sizes, dim=1)):
        eps = randn(x)

        def velocity(noisy, t):
            times = torch.zeros(len(y), n + 1)  # the context is taken as finished
            times[:, n] = t
            tokens = torch.cat([context, noisy.float()], dim=1)
            return model(tokens, times, y)[:, -x.shape[1]:]

        if n > 0:
            for t in TIMES:
                error = velocity((1 - t) * x + t * eps, t) - (eps - x)
                errors.append(error.square().mean().item())
        own = x
        if s > 0:
            noised = (1 - s) * x + s * randn(x)
            own = xar.reverse_sde(velocity, noised.double(), num_steps, randn, start=s)
        context = torch.cat([context, own.float()], dim=1)
    return np.mean(errors)


def exposure(model, latent, y, num_steps=10):
    """Return the later entities' velocity error at each of LEVELS; latent [B,C,h,w] held out."""
    return [errors_at_level(model, s, latent, y, num_steps) for s in LEVELS]


# ---- tables and picture

def print_row(name, cells):
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def print_table(title, runs):
    """Print the scores of `runs`, {name: [(folder, last row of the log), ...]}."""
    print_row(title, ["Fréchet distance", "to held-out digits", "accuracy %",
                      "nearest training digit", "images/s trained", "images/s sampled"])
    print("|---|---|---|---|---|---|---|")
    for name, results in runs.items():
        cells = []
        for key, digits, unit in COLUMNS:
            cells.append(study.plus_minus([row[key] for _, row in results], digits, unit))
        cells.append(study.plus_minus([row["images_per_s"] for _, row in results], digits=0))
        models = [xar.load_xar(folder / "ckpt.pt") for folder, _ in results]
        cells.append(study.plus_minus([images_per_second(model) for model in models], digits=1))
        print_row(name, cells)
    print()


def print_exposure(errors):
    """Print `errors`, {context: [seeds,levels]}."""
    title = "error of later entities, context made again from noise level"
    print_row(title, [*(f"{s:g}" for s in LEVELS), "s = 1 over s = 0"])
    print("|---|" + "---|" * (len(LEVELS) + 1))
    for context, e in errors.items():
        cells = [study.plus_minus(level) for level in e.T]
        cells.append(study.plus_minus(e[:, -1] / e[:, 0], digits=2))
        print_row(context, cells)


def draw(errors, path):
    """Draw `errors`, {context: [seeds,levels]}, with the range over seeds shaded."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (absolute, relative) = plt.subplots(1, 2, figsize=(8, 3))
    absolute.set_title("squared error of later entities' velocity")
    relative.set_title("relative to the real context")
    for context, e in errors.items():
        for ax, values in ((absolute, e), (relative, e / e[:, :1])):
            label = f"trained on {context} context"
            line, = ax.plot(LEVELS, values.mean(0), marker=".", label=label)
            ax.fill_between(LEVELS, values.min(0), values.max(0), alpha=0.15,
                            color=line.get_color())
    for ax in (absolute, relative):
        ax.set_xlabel("context: 0 real ... 1 generated")
    relative.legend(fontsize="small")
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=80)
    plt.close(fig)


# ---- the program

def train_all(kinds, args):
    """Return {kind: [(folder, last row), one for each seed]} of (entity, context) `kinds`."""
    jobs = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        for kind in kinds:
            jobs[kind] = [pool.submit(train, *kind, seed, args.steps, args.out)
                          for seed in range(args.seeds)]
    return {kind: [job.result() for job in of_kind] for kind, of_kind in jobs.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m experiments.xar_digits",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/xar_digits"),
                        help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--steps", type=int, default=400, help="steps of each run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--picture", type=Path, default=Path("out/xar_digits/exposure.png"),
                        help="where to draw the exposure bias")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)

    # Every entity with random context, and every other context with one entity.
    kinds = [(entity, "random") for entity in ENTITIES]
    kinds += [(CONTEXT_ENTITY, context) for context in xar.CONTEXTS if context != "random"]
    results = train_all(kinds, args)

    print_table("entity", {entity: results[entity, "random"] for entity in ENTITIES})
    by_context = {context: results[CONTEXT_ENTITY, context] for context in xar.CONTEXTS}
    print_table(f"context ({CONTEXT_ENTITY})", dict(reversed(by_context.items())))
    rows = []
    for of_kind in results.values():
        rows += [row for _, row in of_kind]
    print(f"longest run: {max(row['seconds'] for row in rows):.0f} s of training; held-out digits "
          f"are {rows[0]['nearest_held']:.3f} from the nearest training digit\n")

    held = data.open_data("digits").held
    latent = data.to_pixels(held.images)[:HELD]
    labels = held.labels[:HELD]
    errors = {}
    for context, of_context in by_context.items():
        models = [xar.load_xar(folder / "ckpt.pt") for folder, _ in of_context]
        errors[context] = np.array([exposure(model, latent, labels) for model in models])
    print_exposure(errors)
    draw(errors, args.picture)


if __name__ == "__main__":
    main()
