"""The README's table and curves: plain, REPA and HASTE on the digits at equal steps, three seeds.

    python experiments/digits.py        twelve runs, two at a time on one thread each: about 40 minutes on two cores

Every run is `python haste_train.py FLAGS` with the flags printed here; a run that is finished already is only read.
Levels of quality are those of plain training of the same seed (same start, same order, same noise of the evaluation)
half-way, at three quarters and at the end; a run reaches a level where its curve, a straight line between two
evaluations, first gets there.
"""
import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
STEPS, EVERY = 1000, 50
METHODS = {  # name in the table: flags
    "plain": ["--align", "none"],
    "REPA": ["--align", "repa", "--stop", "never"],
    "HASTE": ["--align", "haste"],
    "HASTE, never stopped": ["--align", "haste", "--stop", "never"],
}


def run(method, seed, out):
    folder = out / f"{method.replace(', ', '_').replace(' ', '_').lower()}_{seed}"
    flags = [*METHODS[method], "--seed", str(seed), "--steps", str(STEPS), "--eval-every", str(EVERY),
             "--save-every", "0", "--out", str(folder)]
    log = folder / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if not rows or rows[-1]["step"] < STEPS:
        print("python haste_train.py", *flags, flush=True)
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "haste_train.py", *flags], cwd=ROOT, env=env, check=True,
                       stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in log.read_text().splitlines()]
    return {k: np.array([r[k] for r in rows if "fd" in r])
            for k in ("step", "fd", "fd_held", "accuracy", "nearest", "nearest_held")}


def steps_to(steps, values, level):
    """First step at which the straight line between two evaluations comes down to the level; nan if never."""
    for i in range(len(steps)):
        if values[i] <= level:
            if i == 0:
                return steps[0]
            return steps[i - 1] + (steps[i] - steps[i - 1]) * (values[i - 1] - level) / (values[i - 1] - values[i])
    return np.nan


def plus_minus(values, digits=3, unit=1):
    values = unit * np.array(values)
    return "not reached" if np.isnan(values).any() else f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/digits"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--picture", type=Path, default=Path("out/digits/curves.png"), help="picture of the curves")
    args = parser.parse_args()
    out = args.out.resolve()
    with ThreadPoolExecutor(1) as first:                                    # the first run trains the shared teacher
        first.submit(run, "HASTE", 0, out).result()
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {m: [pool.submit(run, m, seed, out) for seed in range(args.seeds)] for m in METHODS}
        curves = {m: [j.result() for j in js] for m, js in jobs.items()}

    steps = curves["plain"][0]["step"]
    print("| method | Fréchet distance | to held-out digits | accuracy % | nearest training digit |")
    print("|---|---|---|---|---|")
    for method, cs in curves.items():
        columns = (("fd", 3, 1), ("fd_held", 3, 1), ("accuracy", 1, 100), ("nearest", 3, 1))
        print(f"| {method} | " + " | ".join(plus_minus([c[k][-1] for c in cs], *how) for k, *how in columns) + " |")
    print(f"\nheld-out digits lie {curves['plain'][0]['nearest_held'][-1]:.3f} from the nearest training digit\n")
    marks = (STEPS // 2, 3 * STEPS // 4, STEPS)
    for key, sign, title in (("fd", 1, "Fréchet distance"), ("accuracy", -1, "accuracy")):
        def reached(cs, mark):
            """Steps that each seed's run needs to get where plain training of the same seed is at step `mark`."""
            at = np.flatnonzero(steps == mark)[0]
            return [steps_to(steps, sign * c[key], sign * p[key][at]) for c, p in zip(cs, curves["plain"])]
        print(f"| steps to plain's {title} | " + " | ".join(f"at step {m}" for m in marks) + " |\n|---|---|---|---|")
        for method, cs in curves.items():
            pairs = [(reached(cs, m), reached(curves["plain"], m)) for m in marks]
            cells = [f"{plus_minus(own, 0)} ({np.mean(own) / np.mean(base):.2f})" for own, base in pairs]
            print(f"| {method} | " + " | ".join(cells) + " |")
        print()

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for ax, key, title in ((axes[0], "fd", "Fréchet distance on pixels"), (axes[1], "accuracy", "accuracy")):
        for method, cs in curves.items():
            values = np.array([c[key] for c in cs])
            line, = ax.plot(steps, values.mean(0), label=method, linestyle="--" if "never" in method else "-")
            ax.fill_between(steps, values.min(0), values.max(0), alpha=0.15, color=line.get_color())
        ax.set(title=title, xlabel="step", yscale="log" if key == "fd" else "linear")
    axes[1].legend()
    fig.tight_layout()
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.picture, dpi=100)


if __name__ == "__main__":
    main()
