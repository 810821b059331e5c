"""Make the ten pictures of the tour, docs/tour.md, from small runs on the digits.

    python -m experiments.tour                              pictures in out/tour
    python -m experiments.tour --pictures docs/tour         the ones that the page shows

It trains three SiT (HASTE, HASTE that never stops, plain) and six xAR by the programs themselves,
two at a time, one thread each. A finished run is only read again, an interrupted one resumes. Then
each picture is one function, in the order of the page.
Letters: B images, N tokens, D width, H heads; t = 0 is data, t = 1 noise.
"""
import argparse
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import PercentFormatter

import data
import evaluate
import fid
import haste
import haste_train
import models
import run
import sit
import teacher
import xar
from experiments import fid_bias, study, xar_digits
from tools import look

STEPS = 1000                                    # of each SiT
XAR_STEPS = 400                                 # of each xAR
SEED = 0
SHARES = (0.1, 0.3, 1)                          # of a student's steps, after which its weights are kept
COLUMNS = ("step", "fd", "accuracy")            # of the students' logs
ORDERS = ("patch", "cell:4", "subsample:2", "scale", "image")
GUIDANCE = 3.0                                  # of the digits that grow
NOISE = 0.3                                     # time of the images that the students look at
PROBED = 2                                      # block below the projector, whose tokens are drawn; 0-based
PAIR = (2, 3)                                   # student's and teacher's block, whose attention is drawn

WIDTH = 8.5                                     # of a picture, in inches
STYLE = {"font.size": 10, "axes.titlesize": 10, "figure.dpi": 120, "savefig.dpi": 120,
         "figure.constrained_layout.use": True, "axes.spines.top": False,
         "axes.spines.right": False, "legend.frameon": False}
COLOURS = {"plain": "tab:gray", "HASTE": "tab:red", "HASTE, never stopped": "tab:blue"}


class Tour(NamedTuple):
    """What the pictures are made of."""
    images: data.Data
    teacher: teacher.ViT
    sit: Path                                   # folder of the students' runs
    xar: Path                                   # folder of the xARs' runs
    steps: int                                  # of each student


# ---- the runs

def students(out, steps):
    """Return {name: flags of haste_train.py}; the longest run comes first."""
    # half the usual width, so that all takes minutes
    usual = ["--hidden-size", "64", "--eval-samples", "300", "--cache", str(out / "cache")]
    interval = str(max(1, steps // 20))
    # no cosine is below -2: the angle of the gradients is logged all through, and never acts
    watched = ["--stop", "auto", "--stop-threshold", "-2", "--stop-warmup", interval,
               "--stop-interval", interval]
    return {"HASTE, never stopped": [*watched, *usual],
            "HASTE": ["--stop", str(steps // 2), *usual],
            "plain": ["--align", "none", *usual]}


def train_student(name, flags, steps, folder):
    """Train a student in stages, and keep the weights of each: step1.pt, step2.pt, step3.pt."""
    every = max(1, steps // 10)
    for stage, share in enumerate(SHARES, 1):
        kept = study.folder_of(name, SEED, folder) / f"step{stage}.pt"
        if not kept.exists():
            # with a larger --steps the same command resumes, bit for bit
            study.train(name, flags, every, SEED, folder, round(share * steps), COLUMNS)
            shutil.copy(kept.with_name("ckpt.pt"), kept)


def train_all(out, steps, xar_steps, jobs):
    """Train the teacher, then all students and xARs, `jobs` at a time; return a Tour."""
    words = {"teacher": "small", "teacher_weights": None, "cache": out / "cache"}
    net = look.load_teacher(argparse.Namespace(**words))
    sits = out / f"sit_{steps}"
    xars = out / f"xar_{xar_steps}"
    tour = Tour(data.open_data("digits"), net, sits, xars, steps)
    kinds = [(order, "random") for order in ORDERS] + [(xar_digits.CONTEXT_ENTITY, "clean")]
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(train_student, name, flags, steps, sits)
                   for name, flags in students(out, steps).items()]
        waiting += [pool.submit(xar_digits.train, *kind, SEED, xar_steps, xars) for kind in kinds]
        for job in waiting:
            job.result()
    return tour


# ---- what several pictures need

def normal(*shape, seed=SEED):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_of_each(split):
    """Return the rows of the first image of each class."""
    return [(split.labels == c).nonzero()[0, 0].item() for c in range(10)]


def show(ax, image, title="", **style):
    """Draw an image, [h,w] with values in [-1, 1] or colours [h,w,3], without axes."""
    ax.imshow(image, **{"cmap": "gray", "vmin": -1, "vmax": 1, **style})
    ax.set(title=title, xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def frame(ax, token, colour="red"):
    """Draw a frame around one of the 2 x 2 patches of a digit."""
    corner = (token % 4 * 2 - 0.5, token // 4 * 2 - 0.5)
    ax.add_patch(plt.Rectangle(corner, 2, 2, fill=False, edgecolor=colour, linewidth=2))


def mosaic(tiles):
    """Return tiles [B,h,w,3] as one image of two columns, with white gaps."""
    B, h, w, _ = tiles.shape
    sheet = torch.ones(B // 2 * (h + 1) - 1, 2 * w + 1, 3)
    for i, tile in enumerate(tiles):
        top = i // 2 * (h + 1)
        left = i % 2 * (w + 1)
        sheet[top:top + h, left:left + w] = tile
    return sheet


def load_xar(tour, entity, context):
    """Return an xAR with its averaged weights."""
    name = f"{entity.replace(':', '')}_{context}_{SEED}"                    # as xar_digits.train
    return xar.load_xar(tour.xar / name / "ckpt.pt")


def load_student(tour, name, stage):
    """Return a student's averaged weights after a stage; stage 0 is the network before training."""
    folder = study.folder_of(name, SEED, tour.sit)
    if stage > 0:
        return sit.load_sit(folder / f"step{stage}.pt")
    torch.manual_seed(SEED)                     # as haste_train.build
    return models.create(sit.read_checkpoint(folder / "step1.pt")["arch"]).eval()


@torch.no_grad()
def student_sees(model, images, block=PROBED):
    """Return a block's tokens [B,N,D] and its (q, k), for uint8 images with noise.

    There is no label, which would tell the student what it looks at.
    """
    x = data.to_pixels(images)
    t = torch.full((len(x),), NOISE)
    x_t, _ = sit.interpolant(x, normal(*x.shape), t)
    kept = []
    hook = model.blocks[block].register_forward_hook(lambda m, args, out: kept.append(out[0]))
    _, _, taps = model(x_t, t, torch.full((len(x),), model.num_classes), tap_layers=[block])
    hook.remove()
    return kept[0], taps[0]


@torch.no_grad()
def teacher_sees(tour, images, block=PAIR[1]):
    """Return the teacher's tokens [B,N,D] and a block's (q, k), for uint8 images."""
    net = tour.teacher
    tokens, taps = net(net.preprocess(data.to_rgb(images), net.grid), [block])
    return tokens, taps[0]


# ---- 1

def draw_path(tour):
    """One digit on its straight path to noise, the velocity, and the values of some pixels."""
    times = torch.linspace(0, 1, 6)
    row = one_of_each(tour.images.held)[0]
    x = data.to_pixels(tour.images.held.images[row]).expand(6, -1, -1, -1)          # [6,1,8,8]
    eps = normal(1, 1, 8, 8).expand(6, -1, -1, -1)
    x_t, v = sit.interpolant(x, eps, times)

    fig = plt.figure(figsize=(WIDTH, 4))
    grid = fig.add_gridspec(2, 7, height_ratios=(1, 1.6))
    for i, t in enumerate(times):
        show(fig.add_subplot(grid[0, i]), x_t[i, 0], f"t = {t:.1f}")
    strongest = v.abs().max()
    red_and_blue = {"cmap": "coolwarm", "vmin": -strongest, "vmax": strongest}
    show(fig.add_subplot(grid[0, 6]), v[0, 0], "v = eps - x", **red_and_blue)

    ax = fig.add_subplot(grid[1, :])
    for i in range(0, 64, 5):
        slope = v[0].flatten()[i]
        shade = matplotlib.colormaps["coolwarm"](((slope / strongest + 1) / 2).item())
        ax.plot(times, x_t.flatten(1)[:, i], ".-", color=shade)
    ax.set(xlabel="t", ylabel="value", title="every fifth pixel on its way: a straight line, "
                                             "whose slope is v (red up, blue down)")
    return fig


# ---- 2

def draw_way(tour):
    """States of the sampler and, below, the clean image that each velocity points at."""
    model = load_student(tour, "HASTE", len(SHARES))
    states = []

    def velocity(x, t, y):                      # the model, watched
        v = model(x, t, y)
        states.append((t.item(), x, x - t * v))             # x_t - t v is x, if v = eps - x
        return v

    noise = normal(1, 1, 8, 8, seed=3)
    end = sit.sample_ode(velocity, noise, torch.tensor([6]), num_steps=20)
    states.append((0, end, end))
    shown = (0, 2, 4, 6, 8, 11, 14, 17, 20)
    fig, axes = plt.subplots(2, len(shown), figsize=(WIDTH, 2.4))
    for column, i in zip(axes.T, shown):
        t, x, clean = states[i]
        show(column[0], x[0, 0], f"t = {t:.2f}")
        show(column[1], clean[0, 0])
    axes[0, 0].set_ylabel("state $x_t$")
    axes[1, 0].set_ylabel("$x_t - t\\,v$")
    return fig


# ---- 3

def neighbours(tour, train, held, k=100):
    """Return the nearest training rows [B,k] of each held-out row, and whether labels agree."""
    rows = torch.cdist(held, train).topk(k, largest=False)[1]
    agree = tour.images.train.labels[rows] == tour.images.held.labels[:, None]
    return rows, agree


def draw_teacher(tour):
    """The teacher's tokens as colours; nearest training digits by its tokens and by pixels."""
    train = tour.images.train
    held = tour.images.held
    tokens, _ = teacher_sees(tour, held.images)
    train_tokens, _ = teacher_sees(tour, train.images)
    pixels = data.to_pixels(held.images).flatten(1)
    train_pixels = data.to_pixels(train.images).flatten(1)

    fig = plt.figure(figsize=(WIDTH, 5.6))
    top, bottom = fig.subfigures(2, 1, height_ratios=(1, 1.5))
    top.suptitle("Ten held-out digits and the teacher's 4 x 4 tokens: similar tokens, similar "
                 "colours", fontsize=10)
    rows = one_of_each(held)
    colours = look.pca_colours(tokens[rows].flatten(0, 1)).view(10, 4, 4, 3)
    for column, row, colour in zip(top.subplots(2, 10).T, rows, colours):
        show(column[0], data.to_pixels(held.images[row, 0]))
        show(column[1], colour)

    by_tokens, tokens_agree = neighbours(tour, train_tokens.mean(1), tokens.mean(1))
    by_pixels, pixels_agree = neighbours(tour, train_pixels, pixels)
    bottom.suptitle(f"Nearest training digits by the teacher's mean token (of 100, "
                    f"{100 * tokens_agree.double().mean():.0f} % share the label), and by pixels "
                    f"({100 * pixels_agree.double().mean():.0f} %)", fontsize=10)
    hardest = pixels_agree[:, :5].sum(1).argsort(stable=True)[:3]           # for pixels
    axes = bottom.subplots(3, 13, width_ratios=[1, 0.4, *[1] * 5, 0.4, *[1] * 5])
    for ax in axes[:, [1, 7]].flat:
        ax.axis("off")
    for line, row in zip(axes, hardest):
        show(line[0], data.to_pixels(held.images[row, 0]))
        for places, found, agree in ((line[2:7], by_tokens, tokens_agree),
                                     (line[8:], by_pixels, pixels_agree)):
            for ax, other, same in zip(places, found[row], agree[row]):
                show(ax, data.to_pixels(train.images[other, 0]))
                if not same:
                    ax.spines[:].set(visible=True, color="red", linewidth=3)
    return fig


# ---- 4

def turned(colours, target):
    """Return colours [M,3], rotated and mirrored as a whole to be as near to `target` as possible.

    Principal components have no order of their own that two networks would share.
    """
    a = colours - colours.mean(0)
    b = target - target.mean(0)
    u, _, v = torch.linalg.svd(a.T @ b)
    return (a @ u @ v + 0.5).clamp(0, 1)


def explained(train, held, train_target, held_target):
    """Return the share of the teacher's variance that a linear map of the student's explains.

    Tokens [B,N,D]; the map is fitted on training images, and the share is of held-out ones. What
    all images share in a place does not count.
    """
    x, x_held = (tokens - train.mean(0) for tokens in (train, held))
    y, y_held = (tokens - train_target.mean(0) for tokens in (train_target, held_target))
    x, x_held, y, y_held = (z.flatten(0, 1).double() for z in (x, x_held, y, y_held))
    ridge = 1e-3 * x.square().sum() / x.shape[1]
    weight = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1]), x.T @ y)
    rest = (y_held - x_held @ weight).square().sum() / y_held.square().sum()
    return 1 - rest.item()


def draw_students(tour):
    """Tokens of plain and guided students as colours, at four steps, beside the teacher's."""
    train = tour.images.train
    held = tour.images.held
    rows = one_of_each(held)[:6]
    target, _ = teacher_sees(tour, held.images)
    train_target, _ = teacher_sees(tour, train.images)
    wanted = look.pca_colours(target[rows].flatten(0, 1))

    fig, axes = plt.subplots(2, 6, figsize=(WIDTH, 5.6))
    clean = data.to_pixels(held.images[rows])
    noisy, _ = sit.interpolant(data.to_pixels(held.images), normal(len(held), 1, 8, 8),
                               torch.full((len(held),), NOISE))
    for ax, images, title in ((axes[0, 0], clean, "digits"),
                              (axes[1, 0], noisy[rows], f"what a student\ngets: t = {NOISE}")):
        grey = ((images + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)                       # [6,8,8,1]
        show(ax, mosaic(grey.expand(-1, -1, -1, 3)), title)
    for line, name in zip(axes, ("plain", "HASTE")):
        for stage, ax in enumerate(line[1:5]):
            model = load_student(tour, name, stage)
            train_tokens, _ = student_sees(model, train.images)
            tokens, _ = student_sees(model, held.images)
            colours = turned(look.pca_colours(tokens[rows].flatten(0, 1)), wanted)
            step = round([0, *SHARES][stage] * tour.steps)
            show(ax, mosaic(colours.view(6, 4, 4, 3)), f"{name}, step {step}")
            share = explained(train_tokens, tokens, train_target, target)
            _, agree = neighbours(tour, train_tokens.mean(1), tokens.mean(1), 1)
            ax.set_xlabel(f"teacher: {100 * share:.0f} %\n"
                          f"label: {100 * agree.double().mean():.0f} %")
    show(axes[0, 5], mosaic(wanted.view(6, 4, 4, 3)), "teacher")
    _, agree = neighbours(tour, train_target.mean(1), target.mean(1), 1)
    axes[0, 5].set_xlabel(f"label: {100 * agree.double().mean():.0f} %")
    axes[1, 5].axis("off")
    return fig


# ---- 5

def draw_attention(tour):
    """Where one patch looks: teacher, guided student early and late, plain student."""
    held = tour.images.held
    rows = [one_of_each(held)[c] for c in (0, 3, 4)]
    patch = 5                                   # row 1, column 1
    _, wanted = teacher_sees(tour, held.images)
    maps = {"teacher": wanted}
    for name, stage in (("HASTE", 2), ("HASTE", 3), ("plain", 3)):
        model = load_student(tour, name, stage)
        step = round(SHARES[stage - 1] * tour.steps)
        maps[f"{name}, step {step}"] = student_sees(model, held.images, PAIR[0])[1]

    fig, axes = plt.subplots(len(rows), 1 + len(maps), figsize=(7, 4.9))
    for ax, row in zip(axes[:, 0], rows):
        show(ax, data.to_pixels(held.images[row, 0]))
    axes[0, 0].set_title("digit")
    axes[-1, 0].set_xlabel("cross-entropy:")
    for column, (name, (q, k)) in zip(axes[:, 1:].T, maps.items()):
        attention = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(1)                # [B,N,N]
        for ax, row in zip(column, rows):
            show(ax, attention[row, patch].view(4, 4), cmap="viridis", vmin=0, vmax=0.3,
                 extent=(-0.5, 7.5, 7.5, -0.5))
        column[0].set_title(name)
        column[-1].set_xlabel(f"{haste.attention_alignment(q, k, *wanted):.2f} nats")
    for ax in axes.flat:
        frame(ax, patch)
    return fig


# ---- 6

def draw_angle(tour):
    """The cosine of the gradients of flow and alignment over a run, and the paper's threshold."""
    rows = run.read_log(study.folder_of("HASTE, never stopped", SEED, tour.sit) / "log.jsonl")
    steps = [row["step"] for row in rows if "grad_cosine" in row]
    cosines = [row["grad_cosine"] for row in rows if "grad_cosine" in row]
    threshold = haste_train.Config.stop_threshold
    fig, ax = plt.subplots(figsize=(WIDTH, 3))
    ax.plot(steps, cosines, ".-", color=COLOURS["HASTE, never stopped"])
    ax.axhline(0, color="black", linewidth=0.8)
    ax.axhline(threshold, color="tab:red", linestyle="--")
    ax.text(tour.steps, threshold, "below this the alignment ends", color="tab:red",
            ha="right", va="bottom")
    ax.fill_between([0, tour.steps], threshold, threshold - 0.05, color="tab:red", alpha=0.1)
    ax.set(xlabel="step", xlim=(0, tour.steps), ylim=(threshold - 0.05, None),
           title="cosine between the gradients of flow loss and alignment: above 0 they agree")
    return fig


# ---- 7

def draw_quality(tour):
    """Frechet distance and accuracy over the steps, from the students' logs."""
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.4))
    for name, colour in COLOURS.items():
        rows = run.read_log(study.folder_of(name, SEED, tour.sit) / "log.jsonl")
        rows = [row for row in rows if "fd" in row]
        style = "--" if "never" in name else "-"
        for ax, key in zip(axes, ("fd", "accuracy")):
            ax.plot([row["step"] for row in rows], [row[key] for row in rows], marker=".",
                    linestyle=style, color=colour, label=name)
    axes[0].set(title="Fréchet distance on pixels (lower is better)", yscale="log")
    ticks = (0.2, 0.5, 1, 2)
    axes[0].set_yticks(ticks, ticks)
    axes[0].minorticks_off()
    axes[1].set(title="samples that look like their class")
    axes[1].yaxis.set_major_formatter(PercentFormatter(1))
    for ax in axes:
        ax.axvline(tour.steps // 2, color="tab:red", linestyle=":")
        ax.set(xlabel="step", xlim=(0, tour.steps))
    axes[0].text(0.48, 0.05, "tau: HASTE's\nteacher leaves", color="tab:red", ha="right",
                 transform=axes[0].transAxes)
    axes[1].legend(loc="lower right")
    return fig


# ---- 8

def draw_turns(ax, model):
    """Draw which entity each pixel belongs to: the first ones dark, the last ones light."""
    if len(model.levels) > 1:                   # a pixel belongs to an entity of every level
        ax.text(0.5, 0.5, "\n".join(f"{g} x {g}" for g in model.levels), ha="center", va="center",
                transform=ax.transAxes)
        return
    turn = torch.arange(len(model.sizes))[model.entity_of].float()          # [L], in entity order
    turns = model.to_latent(turn[None, :, None])[0, 0]
    show(ax, turns, cmap="viridis", vmin=0, vmax=max(1, len(model.sizes) - 1))


def draw_orders(tour):
    """Digits that grow entity by entity in each of xAR's orders; short rows have several."""
    most = 8
    labels = torch.tensor([0, 6, 3, 2, 4, 5, 7, 9])
    fig, axes = plt.subplots(len(ORDERS), 1 + most, figsize=(WIDTH, 5.2))
    for ax in axes.flat:
        show(ax, np.zeros((8, 8)), alpha=0)
    for line, order in zip(axes, ORDERS):
        model = load_xar(tour, order, "random")
        torch.manual_seed(SEED)
        digits_a_row = most // min(most, len(model.sizes))
        tokens = model.sample_tokens(labels[:digits_a_row], num_steps=20, cfg_scale=GUIDANCE)
        frames = evaluate.growth(model, tokens, most)                       # [digits,frames,1,8,8]
        line[0].set_ylabel(order)
        draw_turns(line[0], model)
        for ax, image in zip(line[1:], frames.flatten(0, 2)):
            show(ax, image)
    axes[0, 0].set_title("first: dark,\nlast: light")
    return fig


# ---- 9

def draw_exposure(tour):
    """Error of the later entities when their context is more and more the model's own."""
    held = tour.images.held
    latent = data.to_pixels(held.images)[:xar_digits.HELD]
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.2))
    for context in ("random", "clean"):
        model = load_xar(tour, xar_digits.CONTEXT_ENTITY, context)
        errors = np.array(xar_digits.exposure(model, latent, held.labels[:len(latent)]))
        for ax, values in zip(axes, (errors, errors / errors[0])):
            ax.plot(xar_digits.LEVELS, values, ".-", label=f"trained on {context} context")
            ax.set(xlabel="context: 0 real ... 1 the model's own")
    axes[0].set_title("squared error of later cells' velocity")
    axes[1].set_title("relative to the real context")
    axes[1].legend()
    return fig


# ---- 10

def draw_bias(tour):
    """Frechet distance between two sets of one Gaussian, whose true distance is 0."""
    sizes = (100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
    fig, ax = plt.subplots(figsize=(WIDTH, 3.6))
    for features in (8, 32, 128):
        distances = []
        for n in sizes:
            x = normal(2 * n, features, seed=n).double()
            one = fid_bias.gaussian(x[:n])
            distances.append(fid.frechet_distance(*one, *fid_bias.gaussian(x[n:])))
        c = np.exp(np.mean(np.log(np.array(distances) * sizes)))
        points, = ax.plot(sizes, distances, "o", label=f"{features} features")
        ax.plot(sizes, c / np.array(sizes), color=points.get_color(),
                label=f"{c:,.0f} / N")
    ax.set(xscale="log", yscale="log", xlabel="images on each side, N",
           title="Fréchet distance between two sets from one Gaussian (true distance: 0)")
    ax.axvline(50_000, color="gray", linestyle=":")
    ax.text(47_000, 100, "the papers' 50,000", color="gray", ha="right", va="top")
    ax.legend(ncols=3)
    return fig


# ---- the program

PICTURES = (draw_path, draw_way, draw_teacher, draw_students, draw_attention, draw_angle,
            draw_quality, draw_orders, draw_exposure, draw_bias)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m experiments.tour",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/tour"), help="folder of the runs")
    parser.add_argument("--pictures", type=Path, help="folder of the pictures; if not given, OUT")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of each SiT")
    parser.add_argument("--xar-steps", type=int, default=XAR_STEPS, help="steps of each xAR")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    torch.set_num_threads(1)
    matplotlib.use("Agg")
    plt.rcParams.update(STYLE)

    tour = train_all(args.out, args.steps, args.xar_steps, args.jobs)
    pictures = args.pictures or args.out
    pictures.mkdir(parents=True, exist_ok=True)
    for number, draw in enumerate(PICTURES, 1):
        path = pictures / f"{number:02d}_{draw.__name__.removeprefix('draw_')}.png"
        draw(tour).savefig(path)
        print(path, flush=True)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
