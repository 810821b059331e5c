"""Scores and pictures of a training run: cheap enough for every few hundred steps, without any pretrained network.

    fd, fd_held            Frechet distance on pixels to training and to held-out images
    accuracy               share of samples whose nearest training image has the label they were made for
    nearest, nearest_held  mean distance to the nearest training image, of samples and of held-out images:
                           far smaller for samples means memorised

Samples carry the labels 0, 1, 2, ... in turn, and each one's noise depends on its index alone.
"""
import torch

import fid
import run
import sit
from data import save_grid, to_uint8


def reference(images, most=10_000):
    """{"train", "held"}: features and labels of the real images that samples are compared with, at most 10,000 each."""
    sets = {}
    for name, s in (("train", images.train), ("held", images.held)):
        if s is not None and len(s) > 1:                                    # a covariance wants two
            rows = torch.randperm(len(s), generator=run.seeded("cpu", 0))[:most]
            features, labels = zip(*[(fid.pixel_features(x), y) for x, y in map(s.read, rows.split(256))])
            sets[name] = torch.cat(features), torch.cat(labels)
    return sets


def sample_sit(model, rows, num_steps, cfg_scale, seed):
    """Images [b,C,H,W] of the indices `rows`, by Euler steps."""
    device = next(model.parameters()).device
    noise = sit.indexed_noise(seed, rows, (model.in_channels, model.input_size, model.input_size))[1].to(device)
    return sit.sample_ode(model, noise, (rows % model.num_classes).to(device), num_steps, cfg_scale)


def draw_samples(model, num, num_steps, cfg_scale, seed, processes, autocast, batch=256, sample=sample_sit):
    """uint8 [num,C,H,W], shared among the processes."""
    share = -(-num // processes.world)
    index = torch.arange(processes.rank * share, (processes.rank + 1) * share)
    out = []
    for rows in index.split(batch):
        with autocast:
            out.append(to_uint8(sample(model, rows, num_steps, cfg_scale, seed)))
    return processes.gather(torch.cat(out))[:num].cpu()


def frechet(a, b):
    return fid.frechet_distance(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))


def scores(samples, sets, num_classes):
    """{name: number} for uint8 samples [B,C,H,W] compared with the sets of `reference`; names as at the top."""
    fake, (real, labels) = fid.pixel_features(samples), sets["train"]
    distance, neighbour = torch.cdist(fake, real).min(dim=1)
    right = labels[neighbour] == torch.arange(len(fake)) % num_classes
    row = {"fd": frechet(fake, real), "accuracy": right.double().mean().item(), "nearest": distance.mean().item()}
    if "held" in sets:
        held = sets["held"][0]
        row |= {"fd_held": frechet(fake, held), "nearest_held": torch.cdist(held, real).min(dim=1)[0].mean().item()}
    return row


def sample_sheet(samples, num_classes, path, columns=10):
    """A row a class, the first ten classes and at most `columns` samples of each."""
    rows = [samples[c::num_classes][:columns] for c in range(min(num_classes, 10))]
    width = min(len(r) for r in rows)
    if width:
        save_grid(torch.cat([r[:width] for r in rows]), path, width)


def tell(rows, out, advice=None):
    """The last lines of a run: what was reached, and what to try next (`advice`, where it is no SiT)."""
    scored = next((r for r in reversed(rows) if "fd" in r), None)
    if scored:
        print(f"after {scored['step']} steps and {rows[-1]['seconds']:.0f} s of training: Frechet distance "
              f"{scored['fd']:.3f} on pixels, {100 * scored['accuracy']:.1f} % of the samples look like their class")
        print(f"pictures: {out}/samples.png, {out}/curves.png")
    print("next: " + (advice or f"python sit.py --ckpt {out}/ckpt.pt --cfg 1.5   draws more; "
                      f"python haste_train.py --align none --out out/plain   is the same run without guidance"))


def plot_curves(rows, path, tau):
    """Losses and scores of a log as one picture, a dotted line where the guidance ended; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    panels = [("loss", "flow loss"), ("feature_loss", "feature loss"), ("attention_loss", "attention loss"),
              ("grad_cosine", "cosine of gradients"), ("fd", "Frechet distance on pixels"), ("accuracy", "accuracy")]
    panels = [(k, title) for k, title in panels if any(k in r for r in rows)]
    fig, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 2.8), squeeze=False)
    for ax, (key, title) in zip(axes[0], panels):
        steps, values = zip(*[(r["step"], r[key]) for r in rows if key in r])
        ax.plot(steps, values, marker="." if len(steps) < 20 else None)
        if tau < rows[-1]["step"]:
            ax.axvline(tau, color="gray", linestyle=":")
        ax.set(title=title, xlabel="step", xlim=(0, rows[-1]["step"]), yscale="log" if key == "fd" else "linear")
    fig.tight_layout()
    fig.savefig(path, dpi=100)
    plt.close(fig)
