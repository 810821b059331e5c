"""The tables and curves of a teacher's help on the digits, at equal steps, three seeds.

    python -m experiments.digits            SiT plain, with REPA, with HASTE: twelve runs,
                                            two at a time on one thread each
    python -m experiments.digits dit        the same for DiT
    python -m experiments.digits irepa      iREPA, and contrastive flow matching

Every run is `python haste_train.py FLAGS` with the flags printed here; if a run is already
finished, only its log is read. Levels of quality are those that plain training of the same seed
(same order, same noise of the evaluation) has half-way, at three quarters and at the end. A run
reaches a level when its curve, a straight line between two evaluations, first gets there.
"""
from experiments import study

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


SCORES = {  # column of the log: title, digits, unit
    "fd": ("Fréchet distance", 3, 1),
    "fd_held": ("to held-out digits", 3, 1),
    "accuracy": ("accuracy %", 1, 100),
    "nearest": ("nearest training digit", 3, 1),
}
OVER_STEPS = {key: SCORES[key] for key in ("fd", "accuracy")}
COLUMNS = ("step", *SCORES, "nearest_held")
PANELS = {"fd": ("Fréchet distance on pixels", "log"), "accuracy": ("accuracy", "linear")}


def main():
    args = study.arguments(__doc__.splitlines()[0], "out/digits", GROUPS)
    curves = study.train_all(GROUPS[args.group], EVERY[args.group], args.out, args.seeds, args.jobs,
                             STEPS, COLUMNS)
    study.print_last(curves, SCORES)
    held = next(iter(curves.values()))[0]["nearest_held"][-1]
    print(f"held-out digits lie {held:.3f} from the nearest training digit\n")
    study.print_over_steps(curves, SHOWN, OVER_STEPS)
    study.print_steps_to_levels(curves, "fd", "Fréchet distance", 1, MARKS)
    study.print_steps_to_levels(curves, "accuracy", "accuracy", -1, MARKS)
    study.draw(curves, args.picture or args.out / f"{args.group}.png", PANELS)


if __name__ == "__main__":
    main()
