"""Scores and pictures of a training run, cheap enough for every few hundred steps.

    fd, fd_held            Frechet distance on pixels to training and to held-out images
    accuracy               share of samples whose nearest training image has the label that the
                           sample was made for
    nearest, nearest_held  mean distance to the nearest training image, of samples and of held-out
                           images: far smaller for samples means memorised
    fid                    with --eval-features inception: FID to training images. Of so few samples
                           it is too high, and to be compared within a run only
Only the last one needs a pretrained network; on photographs only the last one means something.
Scenes have captions instead of classes, and these scores (scenes.py):
    fd             Frechet distance on pixels to scenes of held-out digits
    text_accuracy  share of samples with every named digit right, in its place
    place          share of the ink inside the named boxes; large digits do not count
    ..._unseen     the same for the pairs of digits that never occur in training
Clutter has a small classifier of its own (clutter.py):
    accuracy       share of samples that it takes for the digit they were made for
    fd, fd_pixels  Frechet distance to training images, on its features and on pixels

Samples carry the labels 0, 1, 2, ... in turn, or captions of the set. Each one's noise depends on
its index alone.
"""
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import clutter
import dit
import fid
import run
import scenes
import sit
from data import to_rgb, to_uint8

REFERENCE_IMAGES = 10_000                                                   # compared with, at most
BATCH = 256
SHEET = 30                                                                  # samples with captions on a picture
CAPTION_COLUMNS = 6
CAPTION_SIDE = 144                                                          # pixels: wide enough for a caption
CAPTION_HEIGHT = 16
LETTER = 6                                                                  # pixels of a letter, about
INCEPTION_BATCH = 64


def load_inception(cfg, device):
    """Return the network that --eval-features asks for, or None. Raises ValueError or OSError."""
    if cfg.eval_features == "pixels" or not cfg.eval_every:
        return None
    try:
        return fid.load_inception(cfg.eval_weights).to(device)
    except ValueError:
        raise ValueError(f"--eval-weights {cfg.eval_weights} is not there, is cut short, or does "
                         f"not hold the Inception of FID: leave the flag out to fetch it") from None
    except OSError:
        raise OSError(f"--eval-features inception could not be fetched: download "
                      f"{fid.INCEPTION_URL} and name the file with --eval-weights") from None


def inception_gaussian(inception, batches):
    """Return mean and covariance of the features of batches of uint8 images [b,C,H,W]."""
    device = inception.fc.weight.device
    moments = fid.Moments()
    with torch.backends.cudnn.flags(allow_tf32=False):                      # TF32 moves the third decimal
        for pixels in batches:
            moments.add(inception(pixels.to(device))["pool"].cpu())
    return moments.gaussian()


def reference(images, inception=None, cache="out/cache"):
    """Return what samples are compared with: {"train": (features, labels), "held": ...}.

    images: data.Data. Without held-out images there is no "held". With `inception` there is also
    "inception": this network, with mean and covariance of its features of the training images.
    Scenes are compared with {"digits": (images, labels), "held": features of held-out scenes},
    clutter with {"judge": its classifier, kept in the folder `cache`, "features": the judge's of
    training images, "pixels": the same images'}.
    """
    if isinstance(images.train, scenes.SceneSet):
        held = fid.pixel_features(images.held.scenes)
        return {"digits": images.train.digits, "held": held}
    if isinstance(images.train, clutter.ClutterSet):
        real, _ = images.train.read(_some_rows(images.train))
        judge = clutter.make_judge(images.train, cache)
        features = torch.cat([judge(x)[0] for x in real.split(BATCH)])
        return {"judge": judge, "features": features.double(), "pixels": fid.pixel_features(real)}
    sets = {}
    if inception is not None:
        rows = _some_rows(images.train)
        batches = (images.train.read(part)[0] for part in rows.split(INCEPTION_BATCH))
        sets["inception"] = inception, inception_gaussian(inception, batches)
    for name, split in (("train", images.train), ("held", images.held)):
        if split is None or len(split) < 2:                                 # a covariance needs two
            continue
        features = []
        labels = []
        for rows in _some_rows(split).split(BATCH):
            pixels, y = split.read(rows)
            features.append(fid.pixel_features(pixels))
            labels.append(y)
        sets[name] = (torch.cat(features), torch.cat(labels))
    return sets


@dataclass
class Prompts:
    """What the samples of an evaluation are made for."""

    y: torch.Tensor                             # class ids [M], or captions as the set has them
    texts: Optional[list] = None                # the captions as strings, if known
    meanings: Optional[torch.Tensor] = None     # of scenes: what they show, [M]
    num_seen: int = 0                           # of the first ones, which occur in training


def prompts_of(images, count):
    """Return the Prompts of `count` samples: classes or captions in turn. images: data.Data."""
    if images.text is None:
        return Prompts(torch.arange(count) % len(images.classes))
    if isinstance(images.train, scenes.SceneSet):
        meanings = torch.cat(scenes.meanings_to_draw(images.held, count))
        ids = images.held.ids[meanings, torch.arange(len(meanings)) % 2]
        return Prompts(ids, scenes.captions_of(meanings), meanings, count)
    rows = torch.arange(count) * len(images.train) // count
    return Prompts(images.train.captions(rows, torch.zeros(count)))


def _some_rows(split):
    return torch.randperm(len(split), generator=run.seeded("cpu", 0))[:REFERENCE_IMAGES]


def draw_samples(count, draw, processes, batch=BATCH):
    """Return uint8 samples [count,C,H,W] on the CPU, drawn by all processes together.

    draw(rows [b]) returns the samples of these indices, uint8 [b,C,H,W].
    """
    share = -(-count // processes.world)
    rows = torch.arange(processes.rank * share, (processes.rank + 1) * share)
    mine = torch.cat([draw(part) for part in rows.split(batch)])
    return processes.gather(mine)[:count].cpu()


def frechet(a, b):
    return fid.frechet_distance(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))


def scores(samples, sets, num_classes=None):
    """Return {name: number}, named as above, for uint8 samples [B,C,H,W] and `reference`'s sets.

    Samples that were made for captions have no classes, and no accuracy.
    """
    if "judge" in sets:
        return clutter_scores(samples, sets)
    fake = torch.cat([fid.pixel_features(x) for x in samples.split(BATCH)])
    real, labels = sets["train"]
    distance, neighbour = torch.cdist(fake, real).min(dim=1)
    row = {"fd": frechet(fake, real), "nearest": distance.mean().item()}
    if num_classes is not None:
        right = labels[neighbour] == torch.arange(len(fake)) % num_classes
        row["accuracy"] = right.double().mean().item()
    if "inception" in sets:
        inception, expected = sets["inception"]
        found = inception_gaussian(inception, samples.split(INCEPTION_BATCH))
        row["fid"] = fid.frechet_distance(*found, *expected)
    if "held" in sets:
        held, _ = sets["held"]
        row["fd_held"] = frechet(fake, held)
        row["nearest_held"] = torch.cdist(held, real).min(dim=1)[0].mean().item()
    return row


def clutter_scores(samples, reference):
    """Return {name: number} for uint8 samples [B,1,H,W], made for the digits 0 ... 9 in turn."""
    features, logits = reference["judge"](samples)
    right = logits.argmax(1) == torch.arange(len(samples)) % logits.shape[1]
    return {"fd": frechet(features.double(), reference["features"]),
            "fd_pixels": frechet(fid.pixel_features(samples), reference["pixels"]),
            "accuracy": right.double().mean().item()}


def scene_scores(samples, prompts, reference):
    """Return {name: number} for samples uint8 [M,1,H,W] of scenes, made for these Prompts."""
    right, place = scenes.judge(samples, prompts.meanings, *reference["digits"])
    n = prompts.num_seen
    fake = fid.pixel_features(samples[:n])
    return {"fd": frechet(fake, reference["held"]),
            "text_accuracy": right[:n].double().mean().item(),
            "text_accuracy_unseen": right[n:].double().mean().item(),
            "place": place[:n].nanmean().item(),
            "place_unseen": place[n:].nanmean().item()}


def evaluate_sit(ema, condition, prompts, contrast, decode, reference, cfg, processes, autocast):
    """Sample from a run's averaged weights, draw OUT/samples.png, and return the scores.

    cfg is haste_train.py's configuration; prompts: what the samples are made for, which condition
    (models.Condition) turns into what the model takes; contrast is for sit.sample_ode, or None;
    decode maps latents to pixels, see vae.load_decoder. Only the first process has scores, the
    others return {}.
    """
    shape = (ema.in_channels, ema.input_size, ema.input_size)

    def draw(rows):                                                         # indices [b] -> uint8 [b,C,H,W]
        y = condition(prompts.y[rows % len(prompts.y)].to(processes.device))
        randn = run.indexed_randn(cfg.seed, rows)
        noise = randn(torch.empty(len(rows), *shape, device=processes.device))
        with autocast:
            if cfg.objective == "ddpm":
                x = dit.sample_ddpm(ema, noise, y, cfg.eval_steps, cfg.eval_cfg,
                                    null_label=condition.null, randn=randn)
            else:
                x = sit.sample_ode(ema, noise, y, cfg.eval_steps, cfg.eval_cfg,
                                   null_label=condition.null, contrast=contrast)
            return to_uint8(decode(x))

    samples = draw_samples(len(prompts.y), draw, processes)
    if not processes.main:
        return {}
    picture = Path(cfg.out, "samples.png")
    if prompts.meanings is not None:
        save_grid(samples[:SHEET], picture, CAPTION_COLUMNS, CAPTION_SIDE, prompts.texts[:SHEET])
        return scene_scores(samples, prompts, reference)
    if prompts.y.ndim > 1:                                                  # captions
        save_grid(samples[:SHEET], picture, CAPTION_COLUMNS)
        return scores(samples, reference)
    sample_sheet(samples, ema.num_classes, picture)
    return scores(samples, reference, ema.num_classes)


def evaluate_xar(ema, decode, reference, cfg, processes, autocast):
    """Sample from an xAR's averaged weights, draw OUT/samples.png, and return the scores.

    OUT/growth.png shows eight samples entity by entity. The rest is as in `evaluate_sit`.
    """
    def tokens_of(rows):                                                    # indices [b] -> [b,L,C]
        labels = rows % ema.num_classes
        randn = run.indexed_randn(cfg.seed, rows)
        return ema.sample_tokens(labels, cfg.eval_steps, cfg.eval_cfg, randn)

    def draw(rows):                                                         # indices [b] -> uint8 [b,C,H,W]
        with autocast:
            return to_uint8(decode(ema.to_latent(tokens_of(rows))))

    samples = draw_samples(cfg.eval_samples, draw, processes)
    if not processes.main:
        return {}
    sample_sheet(samples, ema.num_classes, Path(cfg.out, "samples.png"))

    with autocast:
        frames = growth(ema, tokens_of(torch.arange(8)))                    # [8,frames,C,h,w]
        pixels = to_uint8(decode(frames.flatten(0, 1)))
    save_grid(pixels, Path(cfg.out, "growth.png"), columns=frames.shape[1])
    return scores(samples, reference, ema.num_classes)


def print_summary(rows, out, advice):
    """Print the last lines of a run: the scores it reached, its pictures, and what to try next."""
    scored = [row for row in rows if "fd" in row]
    if scored:
        last = scored[-1]
        words = [f"Frechet distance {last['fd']:.3f} on pixels"]
        if "fd_pixels" in last:                                             # clutter
            words = [f"Frechet distance {last['fd']:.2f} on the features of its classifier, which "
                     f"takes {100 * last['accuracy']:.1f} % of the samples for what they should be"]
        elif "accuracy" in last:
            words.append(f"{100 * last['accuracy']:.1f} % of the samples look like their class")
        if "text_accuracy" in last:
            words.append(f"{100 * last['text_accuracy']:.1f} % of the samples show what their "
                         f"caption says, {100 * last['text_accuracy_unseen']:.1f} % of the pairs "
                         f"that were never seen")
        print(f"after {last['step']} steps and {rows[-1]['seconds']:.0f} s of training: "
              f"{', '.join(words)}")
        pictures = [Path(out, name) for name in ("samples.png", "growth.png", "curves.png")]
        print("pictures: " + ", ".join(str(path) for path in pictures if path.exists()))
    print(f"next: {advice}")


# ---- pictures

def image_grid(images, columns, side=64, captions=None):
    """Return uint8 images [B,C,H,W] as one PIL image, row by row, on grey, with gaps of a pixel.

    Images smaller than `side` pixels are enlarged to about that. `captions`, a string for each
    image, stand below them.
    """
    B, _, H, W = images.shape
    columns = min(columns, B)
    zoom = max(1, side // H)
    if captions is not None:
        return _with_captions(images, columns, side, captions)
    rows = math.ceil(B / columns)
    canvas = np.full((rows * (H + 1) - 1, columns * (W + 1) - 1, 3), 128, np.uint8)
    for i, image in enumerate(to_rgb(images).permute(0, 2, 3, 1).cpu().numpy()):
        top = i // columns * (H + 1)
        left = i % columns * (W + 1)
        canvas[top:top + H, left:left + W] = image
    size = (canvas.shape[1] * zoom, canvas.shape[0] * zoom)
    return Image.fromarray(canvas).resize(size, Image.NEAREST)


def _with_captions(images, columns, side, captions):
    """Return the grid with a white line below each row, for the captions of its images."""
    rows = [image_grid(part, columns, side) for part in images.split(columns)]
    zoom = max(1, side // images.shape[2])
    step = rows[0].height + CAPTION_HEIGHT
    canvas = Image.new("RGB", (rows[0].width, step * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, row in enumerate(rows):
        canvas.paste(row, (0, step * i))
    width = (images.shape[3] + 1) * zoom
    for i, caption in enumerate(captions):
        # a caption that stands for a whole row may be as long as the row
        alone = not any(captions[i + 1:(i // columns + 1) * columns])
        room = (columns - i % columns if alone else 1) * width // LETTER
        caption = " ".join(caption.split())[:room]
        left = i % columns * width
        top = step * (i // columns) + rows[0].height
        draw.text((left, top), caption, "black", ImageFont.load_default(12))
    return canvas


def save_grid(images, path, columns, side=64, captions=None):
    """Save uint8 images [B,C,H,W] as one picture, a PNG for example; see `image_grid`."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image_grid(images, columns, side, captions).save(path)


def sample_sheet(samples, num_classes, path, columns=10):
    """Draw a row for each of the first ten classes, with at most `columns` samples of it.

    If there are fewer than two samples a class, draw up to ten rows of evenly spaced ones.
    """
    if len(samples) < 2 * num_classes:
        stride = -(-len(samples) // (10 * columns))
        return save_grid(samples[::stride], path, columns)
    rows = [samples[c::num_classes][:columns] for c in range(min(num_classes, 10))]
    width = min(len(r) for r in rows)
    if width:
        save_grid(torch.cat([r[:width] for r in rows]), path, width)


def growth(model, tokens, most=16):
    """Return xAR's tokens [B,L,C] as latents [B,frames,C,h,w], frame after frame an entity more.

    There are at most `most` frames, evenly spread; the last is always there.
    """
    shown = np.linspace(len(model.sizes) - 1, 0, most).round().astype(int)
    ends = np.cumsum(model.sizes)[np.unique(shown)]
    return torch.stack([model.to_latent(tokens[:, :end]) for end in ends], dim=1)


PANELS = {
    "loss": "loss of the objective", "feature_loss": "feature loss",
    "attention_loss": "attention loss",
    "grad_cosine": "cosine of gradients", "fd": "Frechet distance", "fid": "FID",
    "accuracy": "accuracy", "text_accuracy": "captions obeyed",
    "text_accuracy_unseen": "pairs never seen",
}


def plot_curves(rows, path, tau=0):
    """Draw losses and scores of a log, with a dotted line where the alignment ended, at step tau.

    Without matplotlib there is no picture, and no error.
    """
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [name for name in PANELS if any(name in row for row in rows)]
    fig, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 2.8), squeeze=False)
    for ax, name in zip(axes[0], panels):
        steps = [row["step"] for row in rows if name in row]
        values = [row[name] for row in rows if name in row]
        style = ".-" if len(steps) < 20 else "-"
        ax.plot(steps, values, style)
        if 0 < tau < rows[-1]["step"]:
            ax.axvline(tau, color="gray", linestyle=":")
        ax.set(title=PANELS[name], xlabel="step", xlim=(0, rows[-1]["step"]))
        if name == "fd":
            ax.set_yscale("log")
    fig.tight_layout()
    fig.savefig(path, dpi=100)
    plt.close(fig)
