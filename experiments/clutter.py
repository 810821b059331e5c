"""What a teacher is worth where meaning counts: SiT on clutter, at equal steps, three seeds.

    python -m experiments.clutter               plain, REPA, HASTE and its parts: 21 runs, two
                                                at a time on one thread each; 18 if no trigger fires
    python -m experiments.clutter settings      how plain training was tuned: one seed
    python -m experiments.clutter cost          how long a step takes, relative to plain training's

Every run is `python haste_train.py FLAGS` with the flags printed here; the same command resumes,
and reads only the log of a run that is finished. Levels of quality are those of plain training of
the same seed: same order, same noise of the evaluation.
"""
import math
import shutil

import torch

import align
import data
import ddp
import evaluate
import haste_train
import models
import run
import sit
from experiments import study
from haste_train import Config
from tools import measure

STEPS = 1500
EVERY = 250                                                                 # steps between evaluations
SHOWN = range(2 * EVERY, STEPS + 1, 2 * EVERY)                              # of the table over steps
MARKS = (2 * STEPS // 3, STEPS)                                             # where plain training sets the levels
CLUTTER = ["--preset", "clutter"]
PLAIN = [*CLUTTER, "--align", "none"]
GROUPS = {  # {group: {name in the tables: flags}}; the first method sets the levels
    "methods": {
        "plain": PLAIN,
        "REPA": [*CLUTTER, "--align", "repa", "--stop", "never"],
        "attention only": [*CLUTTER, "--feature-weight", "0", "--stop", "never"],
        "HASTE, until a quarter": [*CLUTTER, "--stop", str(STEPS // 4)],
        "HASTE, until half": [*CLUTTER, "--stop", str(STEPS // 2)],
        "HASTE, automatic": [*CLUTTER, "--stop", "auto", "--stop-interval", "100"],
        "HASTE, never stopped": [*CLUTTER, "--stop", "never"],
    },
    "cost": {},
    "settings": {
        "plain": PLAIN,
        "learning rate 0.002": [*PLAIN, "--lr", "0.002"],
        "EMA 0.995": [*PLAIN, "--ema", "0.995"],
        "EMA 0.995, learning rate 0.008": [*PLAIN, "--ema", "0.995", "--lr", "0.008"],
    },
}
SCORES = {  # column of the log: title, digits, unit
    "accuracy": ("accuracy %", 1, 100),
    "fd": ("Fréchet distance", 2, 1),
    "fd_pixels": ("on pixels", 3, 1),
}
OVER_STEPS = {key: SCORES[key] for key in ("accuracy", "fd")}
PANELS = {"accuracy": ("accuracy", "linear"),
          "fd": ("Fréchet distance on the classifier's features", "linear")}
OVER_TITLE = ", ".join(title for title, _, _ in OVER_STEPS.values())
SAMPLED = ("plain", "REPA", "HASTE, until half")                            # once more, with guidance
SCALES = (1, 2, 4)


def print_real(images):
    """Print the scores of as many real images, of held-out digits: no sample can do better."""
    held = images.held
    count = Config.eval_samples
    of_class = [(held.labels == c).nonzero()[:count // 10, 0] for c in range(10)]
    pixels, _ = held.read(torch.stack(of_class, dim=1).flatten())           # classes in turn, as samples
    row = evaluate.scores(pixels, evaluate.reference(images))
    print(f"{count} real images of held-out digits: accuracy {100 * row['accuracy']:.1f} %, "
          f"Fréchet distance {row['fd']:.2f}, on pixels {row['fd_pixels']:.3f}\n")


# ---- the trigger

def print_trigger(out, seeds):
    """Print when the automatic trigger has ended the alignment of each seed.

    A run in which it has not is bit for bit the one that is never stopped, and serves as that.
    """
    for seed in range(seeds):
        automatic = study.folder_of("HASTE, automatic", seed, out)
        never = study.folder_of("HASTE, never stopped", seed, out)
        tau = torch.load(automatic / "ckpt.pt", weights_only=True)["tau"]
        if tau < math.inf:
            print(f"seed {seed}: the trigger has ended the alignment at step {tau}")
            continue
        print(f"seed {seed}: the trigger has not fired")
        if not never.exists():
            partial = never.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(automatic, partial)
            partial.rename(never)                                           # whole or not at all
    print()


def draw_cosines(out, seeds, path):
    """Draw the cosine of both gradients over the runs with the automatic trigger."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(6, 3))
    for seed in range(seeds):
        log = study.folder_of("HASTE, automatic", seed, out) / "log.jsonl"
        rows = [row for row in run.read_log(log) if "grad_cosine" in row]
        ax.plot([row["step"] for row in rows], [row["grad_cosine"] for row in rows],
                label=f"seed {seed}", linewidth=1)
    ax.axhline(Config.stop_threshold, color="gray", linestyle=":", label="threshold")
    ax.set(title="cosine between the gradients of flow and alignment", xlabel="step")
    ax.legend(fontsize="small")
    fig.tight_layout()
    fig.savefig(path, dpi=100)
    plt.close(fig)


# ---- the cost of a step

def step_of(flags):
    """Return a function that does forward and backward of one batch, as these flags say."""
    cfg = run.parse(Config, flags, haste_train.PROGRAM, presets=haste_train.PRESETS)
    haste_train.check(cfg, 1)
    torch.manual_seed(cfg.seed)
    images, _, teacher, pairs, model, _ = haste_train.build(cfg, None, cfg.align != "none",
                                                            ddp.Processes("cpu"))
    pixels, y = images.train.read(torch.arange(cfg.batch_size))
    x = data.to_pixels(pixels)
    eps = torch.randn_like(x)
    t = torch.rand(len(x))
    no_autocast = torch.autocast("cpu", enabled=False)

    def step():
        targets = None
        if teacher is not None:
            targets = align.teacher_targets(teacher, pixels, pairs, no_autocast)
        total, _ = haste_train.losses(model, x, y, t, eps, targets, pairs, cfg)
        total.backward()
        model.zero_grad()
    return step


def print_costs(repeats=20):
    """Print the time of a step of each method, without the optimizer, relative to the first."""
    torch.set_num_threads(1)
    names = ("plain", "REPA", "attention only", "HASTE, never stopped")
    steps = {name: step_of(GROUPS["methods"][name]) for name in names}
    seconds = measure.alternate(steps, repeats, torch.device("cpu"))
    study.print_head("forward and backward of a step", "time")
    for name in names:
        study.print_row(name, f"{seconds[name] / seconds['plain']:.2f}")


# ---- samples of the last weights, with classifier-free guidance

@torch.no_grad()
def sample(method, seed, y, scale, out):
    """Return uint8 samples [b,1,16,16] of a run's average for class ids y [b]."""
    ema = models.load(study.folder_of(method, seed, out) / "ckpt.pt")
    randn = run.indexed_randn(seed, range(len(y)))                          # anew: the same for each method
    noise = randn(torch.empty(len(y), ema.in_channels, ema.input_size, ema.input_size))
    return data.to_uint8(sit.sample_ode(ema, noise, y, Config.eval_steps, scale))


def print_guidance(out, seeds):
    """Print the scores at each scale of guidance; a scale of 1 gives those of the runs' logs."""
    reference = evaluate.reference(data.open_data("clutter"))
    y = torch.arange(Config.eval_samples) % 10
    study.print_head("method", *(f"guidance {scale}: {OVER_TITLE}" for scale in SCALES))
    for method in SAMPLED:
        cells = []
        for scale in SCALES:
            rows = [evaluate.scores(sample(method, seed, y, scale, out), reference, 10)
                    for seed in range(seeds)]
            cells.append(", ".join(study.plus_minus([row[key] for row in rows], digits, unit)
                                   for key, (_, digits, unit) in OVER_STEPS.items()))
        study.print_row(method, *cells)
    print()


def draw_samples(out, path):
    """Draw samples of each method's first seed: same noise, same labels, same guidance."""
    y = torch.arange(10)
    scale = SCALES[-1]
    images = torch.cat([sample(method, 0, y, scale, out) for method in SAMPLED])
    captions = []
    for method in SAMPLED:
        captions += [f"{method}: 0 1 2 3 4 5 6 7 8 9, {STEPS} steps, guidance {scale}", *[""] * 9]
    evaluate.save_grid(images, path, len(y), captions=captions)


def main():
    args = study.arguments(__doc__.splitlines()[0], "out/clutter", GROUPS)
    if args.group == "cost":
        return print_costs()
    methods = GROUPS[args.group]
    seeds = args.seeds if args.group == "methods" else 1

    def train(names):
        return study.train_all({name: methods[name] for name in names}, EVERY, args.out, seeds,
                               args.jobs, STEPS, ("step", *SCORES))

    if args.group == "methods":
        train([name for name in methods if name != "HASTE, never stopped"])
        print_trigger(args.out, seeds)
    curves = train(methods)
    study.print_last(curves, SCORES)
    print_real(data.open_data("clutter"))
    study.print_over_steps(curves, SHOWN, OVER_STEPS)
    study.print_steps_to_levels(curves, "accuracy", "accuracy", -1, MARKS)
    study.print_steps_to_levels(curves, "fd", "Fréchet distance", 1, MARKS)
    picture = args.picture or args.out / f"{args.group}.png"
    study.draw(curves, picture, PANELS, width=10, legend=0)
    if args.group == "methods":
        print_guidance(args.out, seeds)
        draw_cosines(args.out, seeds, picture.with_name(f"{picture.stem}_cosine.png"))
        draw_samples(args.out, picture.with_name(f"{picture.stem}_samples.png"))


if __name__ == "__main__":
    main()
