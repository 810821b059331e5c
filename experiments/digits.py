"""The tables and curves of a teacher's help on the digits, at equal steps, three seeds.

    python -m experiments.digits            SiT plain, with REPA, with HASTE: twelve runs,
                                            two at a time on one thread each
    python -m experiments.digits dit        the same for DiT
    python -m experiments.digits irepa      iREPA, and contrastive flow matching

Every run is `python haste_train.py FLAGS` with the flags printed here; if a run is already
finished, only its log is read. Levels of quality are those that plain training of the same seed
(same start, same order, same noise of the evaluation) has half-way, at three quarters and at the
end. A run reaches a level when its curve, a straight line between two evaluations, first gets
there.
"""
import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import run

STEPS = 1000
EVERY = {"sit": 50, "dit": 125, "irepa": 50}                                # steps between evaluations
SHOWN = range(STEPS // 4, STEPS + 1, STEPS // 4)                            # of the table over steps
MARKS = (STEPS // 2, 3 * STEPS // 4, STEPS)                                 # where plain training sets the levels
SIT = {  # name in the table: flags
    "plain": ["--align", "none"],
    "REPA": ["--align", "repa", "--stop", "never"],
    "HASTE": ["--align", "haste"],
    "HASTE, never stopped": ["--align", "haste", "--stop", "never"],
}
IREPA = ["--projector", "conv", "--spatial-norm", "0.6"]
CONTRASTIVE = ["--contrastive", "0.05"]
DDPM = ["--objective", "ddpm", "--eval-steps", "50"]
GROUPS = {  # the first method of each sets the levels
    "sit": SIT,
    "dit": {f"DiT, {name}": [*DDPM, *SIT[name]] for name in ("plain", "REPA", "HASTE")},
    "irepa": {
        "plain": SIT["plain"],
        "contrastive": [*SIT["plain"], *CONTRASTIVE],
        "REPA": SIT["REPA"],
        "iREPA": [*SIT["REPA"], *IREPA],
    },
}
CURVES = ("step", "fd", "fd_held", "accuracy", "nearest", "nearest_held")   # columns of a log that are read here


# ---- the runs

def folder_of(method, seed, out):
    name = method.replace(", ", "_").replace(" ", "_").lower()
    return out / f"{name}_{seed}"


def train(method, flags, every, seed, out, steps=STEPS, columns=CURVES):
    """Train, unless that run is finished; return its evaluations as {column: array}."""
    folder = folder_of(method, seed, out)
    flags = [*flags, "--seed", str(seed), "--steps", str(steps), "--eval-every",
             str(every), "--save-every", "0", "--out", str(folder)]
    rows = run.read_log(folder / "log.jsonl")
    if not rows or rows[-1]["step"] < steps:
        print(f"python haste_train.py {' '.join(flags)}", flush=True)
        # one thread a run: two runs side by side are faster than one after the other on two threads
        subprocess.run([sys.executable, "haste_train.py", *flags], check=True,
                       env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        rows = run.read_log(folder / "log.jsonl")
    evaluations = [row for row in rows if "fd" in row]
    return {column: np.array([row[column] for row in evaluations]) for column in columns}


def train_all(methods, every, out, seeds, jobs, steps=STEPS, columns=CURVES):
    """Return {method: [curves of each seed]}; methods: {name: flags}."""
    # one run alone trains the teacher, which all others find in the cache
    guided = [name for name, flags in methods.items() if "none" not in flags]
    for name in guided[:1]:
        train(name, methods[name], every, 0, out, steps, columns)
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {}
        for method, flags in methods.items():
            waiting[method] = [pool.submit(train, method, flags, every, seed, out, steps, columns)
                               for seed in range(seeds)]
        return {method: [job.result() for job in submitted]
                for method, submitted in waiting.items()}


# ---- tables and picture

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
    """Return mean ± deviation over the seeds."""
    values = unit * np.array(values)
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


def print_results(curves):
    """Print what each method has reached at its last step."""
    columns = (("fd", 3, 1), ("fd_held", 3, 1), ("accuracy", 1, 100), ("nearest", 3, 1))
    print("| method | Fréchet distance | to held-out digits | accuracy % "
          "| nearest training digit |")
    print("|---|---|---|---|---|")
    for method, runs in curves.items():
        cells = [plus_minus([run[key][-1] for run in runs], digits, unit)
                 for key, digits, unit in columns]
        print(f"| {method} | {' | '.join(cells)} |")
    held = next(iter(curves.values()))[0]["nearest_held"][-1]
    print(f"\nheld-out digits lie {held:.3f} from the nearest training digit\n")


def print_over_steps(curves):
    """Print Fréchet distance and accuracy of each method, mean over the seeds, at a few steps."""
    heads = [f"step {step}" for step in SHOWN]
    print(f"| Fréchet distance, accuracy % | {' | '.join(heads)} |\n|---|---|---|---|---|")
    for method, runs in curves.items():
        cells = []
        for step in SHOWN:
            at = np.flatnonzero(runs[0]["step"] == step)[0]
            distance = np.mean([run["fd"][at] for run in runs])
            accuracy = np.mean([run["accuracy"][at] for run in runs])
            cells.append(f"{distance:.3f}, {100 * accuracy:.1f}")
        print(f"| {method} | {' | '.join(cells)} |")
    print()


def print_steps_to_levels(curves, key, title, sign):
    """Print how many steps each method needs to get where plain training is at the marks.

    `sign` is 1 if smaller values of the column `key` are better, else -1.
    """
    base_runs = next(iter(curves.values()))
    steps = base_runs[0]["step"]

    def reached(runs, mark):
        """Return for each seed the step at which its run is as good as plain's at step `mark`."""
        at = np.flatnonzero(steps == mark)[0]
        return [steps_to(steps, sign * run[key], sign * plain[key][at])
                for run, plain in zip(runs, base_runs)]

    heads = [f"at step {mark}" for mark in MARKS]
    print(f"| steps to plain's {title} | {' | '.join(heads)} |\n|---|---|---|---|")
    for method, runs in curves.items():
        cells = []
        for mark in MARKS:
            own = reached(runs, mark)
            if np.isnan(own).any():
                cells.append("not by every seed")
                continue
            # plain itself may have been there before: the ratio is to the first time
            base = reached(base_runs, mark)
            cells.append(f"{plus_minus(own, 0)} ({np.mean(own) / np.mean(base):.2f})")
        print(f"| {method} | {' | '.join(cells)} |")
    print()


PANELS = {"fd": ("Fréchet distance on pixels", "log"), "accuracy": ("accuracy", "linear")}


def draw(curves, path, panels=PANELS, width=9, legend=1):
    """Save a picture of curves: mean over the seeds, and the range between best and worst.

    panels: {column: (title, scale)}; the one of number `legend` has the legend.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, len(panels), figsize=(width, 3.4))
    for ax, (key, (title, scale)) in zip(axes, panels.items()):
        for method, runs in curves.items():
            values = np.array([run[key] for run in runs])
            style = "--" if "never" in method else "-"
            line, = ax.plot(runs[0]["step"], values.mean(0), label=method, linestyle=style)
            ax.fill_between(runs[0]["step"], values.min(0), values.max(0), alpha=0.15,
                            color=line.get_color())
        ax.set(title=title, xlabel="step", yscale=scale)
    axes[legend].legend()
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("group", nargs="?", choices=list(GROUPS), default="sit",
                        help="which methods")
    parser.add_argument("--out", type=Path, default=Path("out/digits"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--picture", type=Path, help="picture of the curves; if not given, "
                                                     "OUT/GROUP.png")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds must be 2 or more, for a deviation")
    curves = train_all(GROUPS[args.group], EVERY[args.group], args.out, args.seeds, args.jobs)
    print_results(curves)
    print_over_steps(curves)
    print_steps_to_levels(curves, "fd", "Fréchet distance", 1)
    print_steps_to_levels(curves, "accuracy", "accuracy", -1)
    draw(curves, args.picture or args.out / f"{args.group}.png")


if __name__ == "__main__":
    main()
