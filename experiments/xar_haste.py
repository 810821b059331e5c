"""What a teacher is worth for xAR: plain, REPA, HASTE on the digits, and on clutter.

    python -m experiments.xar_haste             digits: nine runs, three seeds, two at a time
    python -m experiments.xar_haste clutter     clutter: three runs, one seed

Every run is `python xar_train.py FLAGS` with the flags printed here; the same command resumes, and
reads only the log of a run that is finished. Neither paper has this: see docs/differences.md.
"""
from experiments import study
from experiments.clutter import SCORES as CLUTTER_SCORES

STEPS = {"digits": 500, "clutter": 250}
EVERY = 125                                                                 # steps between evaluations
# cells of half the side, the paper's best; four times as many tokens as the digits have
CLUTTER = ["--data", "clutter", "--entity", "cell:8", "--batch-size", "16"]


def methods(group, flags=()):
    """Return {name in the tables: flags}; the first one sets the levels, HASTE stops at half."""
    return {"plain": [*flags, "--align", "none"],
            "REPA": [*flags, "--align", "repa", "--stop", "never"],
            "HASTE": [*flags, "--align", "haste", "--stop", str(STEPS[group] // 2)]}


GROUPS = {"digits": methods("digits"), "clutter": methods("clutter", CLUTTER)}
DIGIT_SCORES = {  # column of the log: title, digits, unit
    "accuracy": ("accuracy %", 1, 100),
    "fd": ("Fréchet distance", 3, 1),
    "fd_held": ("to held-out digits", 3, 1),
}
SCORES = {"digits": DIGIT_SCORES, "clutter": CLUTTER_SCORES}
PANELS = {"accuracy": ("accuracy", "linear"), "fd": ("Fréchet distance", "log")}


def main():
    args = study.arguments(__doc__.splitlines()[0], "out/xar_haste", GROUPS)
    scores = SCORES[args.group]
    steps = STEPS[args.group]
    marks = (steps // 2, steps)                                             # where plain training sets the levels
    seeds = 1 if args.group == "clutter" else args.seeds
    curves = study.train_all(GROUPS[args.group], EVERY, args.out / args.group, seeds, args.jobs,
                             steps, ("step", *scores), program="xar_train.py")
    study.print_last(curves, scores)
    shown = range(EVERY, steps + 1, EVERY)
    study.print_over_steps(curves, shown, {key: scores[key] for key in ("accuracy", "fd")})
    study.print_steps_to_levels(curves, "accuracy", "accuracy", -1, marks)
    study.print_steps_to_levels(curves, "fd", "Fréchet distance", 1, marks)
    study.draw(curves, args.picture or args.out / f"{args.group}.png", PANELS)


if __name__ == "__main__":
    main()
