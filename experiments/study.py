"""What the studies share: runs of a training program, their curves, tables and pictures.

A study trains several methods, {name in the tables: flags}, with the same seeds and steps. The
first method sets the levels that the others are to reach. Curves are {column: array}, one entry an
evaluation; of several runs, {method: [curves of each seed]}.
"""
import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import run


def arguments(description, out, groups, argv=None):
    """Return the flags of the command line; `groups` are the comparisons of a study."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("group", nargs="?", choices=list(groups), default=next(iter(groups)),
                        help="which comparison")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--picture", type=Path, help="picture of the curves; if not given, "
                                                     "OUT/GROUP.png")
    args = parser.parse_args(argv)
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be 1 or more")
    return args


# ---- the runs

def folder_of(method, seed, out):
    name = method.replace(", ", "_").replace(" ", "_").replace("/", "_").lower()
    return out / f"{name}_{seed}"


def train(method, flags, every, seed, out, steps, columns, program="haste_train.py"):
    """Train, unless that run is finished; return its evaluations as {column: array}.

    `columns` are those of the log that are read; one that an evaluation lacks is nan there.
    """
    folder = folder_of(method, seed, out)
    flags = [*flags, "--seed", str(seed), "--steps", str(steps), "--eval-every",
             str(every), "--save-every", str(every), "--out", str(folder)]
    rows = run.read_log(folder / "log.jsonl")
    if rows and rows[-1]["step"] > steps:
        raise SystemExit(f"{folder} holds a run of {rows[-1]['step']} steps, not {steps}: give "
                         f"another --out")
    if not rows or rows[-1]["step"] < steps:
        print(f"python {program} {' '.join(flags)}", flush=True)
        # one thread a run: two runs side by side are faster than one after the other on two threads
        subprocess.run([sys.executable, program, *flags], check=True,
                       env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        rows = run.read_log(folder / "log.jsonl")
    evaluations = [row for row in rows if "fd" in row]
    return {column: np.array([row.get(column, np.nan) for row in evaluations])
            for column in columns}


def train_all(methods, every, out, seeds, jobs, steps, columns, program="haste_train.py"):
    """Return {method: [curves of each seed]}; methods: {name: flags}."""
    def one(method, seed):
        return train(method, methods[method], every, seed, out, steps, columns, program)

    # one run alone trains what all others find in the cache: a teacher, clutter's classifier
    guided = [name for name, flags in methods.items() if "none" not in flags]
    one((guided or list(methods))[0], 0)
    waiting = {method: [] for method in methods}
    with ThreadPoolExecutor(jobs) as pool:
        for seed in range(seeds):                                           # all methods, then the next seed
            for method in methods:
                waiting[method].append(pool.submit(one, method, seed))
        return {method: [job.result() for job in submitted]
                for method, submitted in waiting.items()}


# ---- tables

def steps_to(steps, values, level):
    """Return the step at which the curve first comes down to the level, nan if it never does."""
    for i in range(len(steps)):
        if values[i] > level:
            continue
        if i == 0:
            return steps[0]
        share = (values[i - 1] - level) / (values[i - 1] - values[i])       # of the way from i - 1 to i
        return steps[i - 1] + (steps[i] - steps[i - 1]) * share
    return np.nan


def plus_minus(values, digits=3, unit=1):
    """Return mean ± deviation over the seeds, as text; of one seed only its value."""
    values = unit * np.array(values)
    text = f"{values.mean():.{digits}f}"
    if len(values) > 1:
        text += f" ± {values.std(ddof=1):.{digits}f}"
    return text


def print_head(*cells):
    print(f"| {' | '.join(cells)} |\n{'|---' * len(cells)}|")


def print_row(*cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def print_last(curves, scores):
    """Print what each method has reached at its last step.

    scores: {column: (title, digits, unit)}.
    """
    print_head("method", *(title for title, _, _ in scores.values()))
    for method, runs in curves.items():
        print_row(method, *(plus_minus([found[key][-1] for found in runs], digits, unit)
                            for key, (_, digits, unit) in scores.items()))
    print()


def print_over_steps(curves, shown, scores):
    """Print a few columns at a few steps, means over the seeds; scores as for `print_last`."""
    titles = ", ".join(title for title, _, _ in scores.values())
    print_head(titles, *(f"step {step}" for step in shown))
    for method, runs in curves.items():
        cells = []
        for step in shown:
            at = np.flatnonzero(runs[0]["step"] == step)[0]
            means = [f"{unit * np.mean([found[key][at] for found in runs]):.{digits}f}"
                     for key, (_, digits, unit) in scores.items()]
            cells.append(", ".join(means))
        print_row(method, *cells)
    print()


def print_steps_to_levels(curves, key, title, sign, marks):
    """Print how many steps each method needs to get where the first one is at the marks.

    `sign` is 1 if smaller values of the column `key` are better, else -1. Levels are those of the
    same seed: the same order, the same noise of the evaluation. In brackets: these steps as a share
    of the first method's own, which may be fewer than the mark.
    """
    base_runs = next(iter(curves.values()))
    steps = base_runs[0]["step"]

    def reached(runs, mark):
        at = np.flatnonzero(steps == mark)[0]
        return [steps_to(steps, sign * found[key], sign * base[key][at])
                for found, base in zip(runs, base_runs)]

    print_head(f"steps to plain's {title}", *(f"at step {mark}" for mark in marks))
    for method, runs in curves.items():
        cells = []
        for mark in marks:
            own = reached(runs, mark)
            if np.isnan(own).any():
                cells.append(f"{np.isfinite(own).sum()} of {len(own)} seeds")
                continue
            ratio = np.mean(own) / np.mean(reached(base_runs, mark))
            cells.append(f"{plus_minus(own, 0)} ({ratio:.2f})")
        print_row(method, *cells)
    print()


# ---- picture

def draw(curves, path, panels, width=9, legend=1):
    """Save a picture of curves: mean over the seeds, and the range between best and worst.

    panels: {column: (title, scale)}; the one of number `legend` has the legend.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, len(panels), figsize=(width, 3.4))
    for ax, (key, (title, scale)) in zip(axes, panels.items()):
        for method, runs in curves.items():
            values = np.array([found[key] for found in runs])
            if np.isnan(values).all():
                continue
            style = "--" if "never" in method else "-"
            line, = ax.plot(runs[0]["step"], values.mean(0), label=method, linestyle=style)
            ax.fill_between(runs[0]["step"], values.min(0), values.max(0), alpha=0.15,
                            color=line.get_color())
        ax.set(title=title, xlabel="step", yscale=scale)
    axes[legend].legend()
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=100)
    plt.close(fig)
