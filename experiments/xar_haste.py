"""What a teacher is worth for xAR: plain, REPA, HASTE on the digits, and on clutter.

    python -m experiments.xar_haste             digits: nine runs, three seeds, two at a time
    python -m experiments.xar_haste clutter     clutter: three runs, one seed

Every run is `python xar_train.py FLAGS` with the flags printed here; the same command resumes, and
reads only the log of a run that is finished. Neither paper has this: see docs/differences.md.
"""
from experiments import study
from experiments.clutter import SCORES as CLUTTER_SCORES

STEPS = 500
EVERY = 125                                                                 # steps between evaluations
SHOWN = range(EVERY, STEPS + 1, EVERY)                                      # of the table over steps
MARKS = (STEPS // 2, STEPS)                                                 # where plain training sets the levels
METHODS = {  # name in the tables: flags; the first one sets the levels
    "plain": ["--align", "none"],
    "REPA": ["--align", "repa", "--stop", "never"],
    "HASTE": ["--align", "haste", "--stop", str(STEPS // 2)],
}
# cells of half the side, the paper's best; four times as many tokens as the digits have, half a batch
CLUTTER = ["--data", "clutter", "--entity", "cell:8", "--batch-size", "16"]
GROUPS = {
    "digits": METHODS,
    "clutter": {name: [*CLUTTER, *flags] for name, flags in METHODS.items()},
}
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
    seeds = 1 if args.group == "clutter" else args.seeds
    curves = study.train_all(GROUPS[args.group], EVERY, args.out / args.group, seeds, args.jobs,
                             STEPS, ("step", *scores), program="xar_train.py")
    study.print_last(curves, scores)
    study.print_over_steps(curves, SHOWN, {key: scores[key] for key in ("accuracy", "fd")})
    study.print_steps_to_levels(curves, "accuracy", "accuracy", -1, MARKS)
    study.print_steps_to_levels(curves, "fd", "Fréchet distance", 1, MARKS)
    study.draw(curves, args.picture or args.out / f"{args.group}.png", PANELS)


if __name__ == "__main__":
    main()
