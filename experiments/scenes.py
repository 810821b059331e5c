"""Text to image on the scenes: what a teacher, guidance and the teacher's own training are worth.

    python -m experiments.scenes                plain, REPA, HASTE: twelve runs, two at a time; then
                                                guidance, and a control with shuffled captions
    python -m experiments.scenes teachers       HASTE with teachers that were trained differently
    python -m experiments.scenes start          PyTorch's initialisation, and adaLN-Zero

Every run is `python haste_train.py FLAGS` with the flags printed here; if a run is already
finished, only its log is read. Plain training of the same seed sets the level that the others are
to reach: its text accuracy at the end.
"""
from types import SimpleNamespace

import numpy as np
import torch

import data
import ddp
import evaluate
import haste_train
import models
import scenes
from experiments import study
from experiments.digits import SIT
from teacher import train_small

STEPS = 1000
EVERY = 100                                                                 # steps between evaluations
SHOWN = (300, 500, 700, 1000)
# name in the table: flags; the first one sets the levels
METHODS = {name: ["--preset", "scenes", *flags] for name, flags in SIT.items()}
START = {
    "plain": METHODS["plain"],
    "plain, adaLN-Zero": [*METHODS["plain"], "--zero-init"],
}
SCORES = {  # key in the log: title, digits, unit
    "text_accuracy": ("captions obeyed %", 1, 100),
    "text_accuracy_unseen": ("pairs never seen %", 1, 100),
    "place": ("ink in place %", 1, 100),
    "place_unseen": ("of pairs never seen %", 1, 100),
    "fd": ("Fréchet distance", 3, 1),
}
OVER_STEPS = {key: SCORES[key] for key in ("text_accuracy", "text_accuracy_unseen")}
COLUMNS = ("step", *SCORES)
PANELS = {"text_accuracy": ("captions obeyed", "linear"),
          "text_accuracy_unseen": ("pairs never seen", "linear"),
          "fd": ("Fréchet distance on pixels", "log")}
GUIDANCE = (1, 2, 4)


def teachers(out):
    """Train small teachers with other labels; return {method: flags}."""
    images = data.open_data("scenes")
    pixels, meanings = images.train.read(torch.arange(len(images.train)))
    grid = images.size // models.CONFIGS["MMDiT-Ti/4"]["patch_size"]
    methods = {name: METHODS[name] for name in ("plain", "HASTE")}
    for name, labels in (("by scene", meanings), ("without labels", None)):
        folder = out / "teachers" / name.replace(" ", "_")
        train_small(data.to_rgb(pixels), labels, grid, cache=folder)
        file = max(folder.glob("teacher-*.pt"), key=lambda f: f.stat().st_mtime)
        methods[f"HASTE, teacher {name}"] = [*METHODS["HASTE"], "--teacher-weights", str(file)]
    return methods


# ---- tables

def print_steps_to_plain(curves):
    """Print when each method is as good as plain training of the same seed at its end."""
    base = next(iter(curves.values()))
    levels = (("text_accuracy", -1), ("text_accuracy_unseen", -1), ("fd", 1))
    heads = [SCORES[key][0].removesuffix(" %") for key, _ in levels]
    study.print_head("steps to plain's last", *heads)
    for method, runs in curves.items():
        cells = []
        for key, sign in levels:                                            # sign 1: smaller is better
            reached = [study.steps_to(found["step"], sign * found[key], sign * plain[key][-1])
                       for found, plain in zip(runs, base)]
            there = [step for step in reached if not np.isnan(step)]
            cells.append(f"{len(there)} of {len(runs)} seeds")
            if len(there) == len(runs):
                cells[-1] = study.plus_minus(reached, 0)
        study.print_row(method, *cells)
    print()


def print_judge():
    """Print what the judge says of real scenes, of held-out digits, and with other captions."""
    images = data.open_data("scenes")
    held = images.held
    pair = torch.tensor([scenes.MEANINGS[m].kind == "pair" for m in held.labels])
    right, _ = scenes.judge(held.scenes, held.labels, *images.train.digits)
    other, _ = scenes.judge(held.scenes, held.labels.roll(1), *images.train.digits)
    print(f"real scenes: {100 * right.double().mean():.1f} % right, pairs "
          f"{100 * right[pair].double().mean():.1f} %, with captions of others "
          f"{100 * other.double().mean():.1f} %\n")


def score(folder, seed, guidance, shuffled=False):
    """Return the scores of a run's last weights: {name: number}, as in its log."""
    images = data.open_data("scenes")
    ema = models.load(folder / "ckpt.pt")
    processes = ddp.Processes("cpu")
    condition = models.condition_of_captions(images.train.null, images.text, None, processes)
    prompts = evaluate.prompts_of(images, haste_train.Config.eval_samples)
    if shuffled:                                                            # drawn for captions of other scenes
        groups = prompts.y.split([prompts.num_seen, len(prompts.y) - prompts.num_seen])
        prompts.y = torch.cat([ids.roll(len(ids) // 2, 0) for ids in groups])
    cfg = SimpleNamespace(seed=seed, objective="flow", eval_steps=20, eval_cfg=guidance,
                          out=folder / "scored")
    cfg.out.mkdir(exist_ok=True)
    reference = evaluate.reference(images)
    return evaluate.evaluate_sit(ema, condition, prompts, None, lambda x: x, reference, cfg,
                                 processes, torch.autocast("cpu", enabled=False))


def print_guidance(methods, out, seeds):
    """Print what the last weights do at each scale of guidance, and with shuffled captions."""
    heads = [title for title, _, _ in SCORES.values()]
    study.print_head("method", "guidance", *heads)
    for method in methods:
        runs = [(study.folder_of(method, seed, out), seed) for seed in range(seeds)]
        rows = {str(w): [score(*found, w) for found in runs] for w in GUIDANCE}
        rows["1, captions shuffled"] = [score(*found, 1, shuffled=True) for found in runs]
        for name, found in rows.items():
            cells = [study.plus_minus([row[key] for row in found], digits, unit)
                     for key, (_, digits, unit) in SCORES.items()]
            study.print_row(method, name, *cells)
    print()


def main():
    args = study.arguments(__doc__.splitlines()[0], "out/scenes", ("methods", "teachers", "start"))
    methods = {"methods": METHODS, "start": START}.get(args.group) or teachers(args.out)
    curves = study.train_all(methods, EVERY, args.out, args.seeds, args.jobs, STEPS, COLUMNS)
    study.print_last(curves, SCORES)
    study.print_over_steps(curves, SHOWN, OVER_STEPS)
    print_steps_to_plain(curves)
    study.draw(curves, args.picture or args.out / f"{args.group}.png", PANELS, width=12, legend=0)
    if args.group == "methods":
        print_judge()
        print_guidance(methods, args.out, args.seeds)


if __name__ == "__main__":
    main()
