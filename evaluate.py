"""Scores and pictures of a training run: cheap enough for every few hundred steps, without any pretrained network.

    fd, fd_held            Frechet distance on pixels to training and to held-out images
    accuracy               share of samples whose nearest training image has the label they were made for
    nearest, nearest_held  mean distance to the nearest training image, of samples and of held-out images:
                           far smaller for samples means memorised

Samples carry the labels 0, 1, 2, ... in turn, and each one's noise depends on its index alone.
"""
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch

import fid
import packed
import run
import sit
from data import NO_ARCHIVE, ImageArchive, save_grid, to_rgb, to_uint8


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


def decoder(packed_from, source, channels, device):
    """The function that turns a model's samples [b,C,h,w] into pixels in [-1, 1]; for models of pixels it does nothing.

    source: --vae, where given; packed_from: what is known of the autoencoder that made the training latents (dict with
    "vae" and "fingerprint", or nothing). Raises ValueError or OSError, one line.
    """
    if not packed_from and source is None and channels in (1, 3):
        return lambda x: x
    import vae
    name = source or (packed_from or {}).get("vae") or vae.USUAL.get(channels)
    if name is None:
        raise ValueError(f"--vae must name the autoencoder's file, for latents of {channels} channels")
    net = vae.load_vae(name).to(device)
    if net.z_channels != channels:
        raise ValueError(f"--vae {name} has latents of {net.z_channels} channels, the model's have {channels}")
    if packed_from and packed.fingerprint(net) != packed_from["fingerprint"]:
        raise ValueError(f"--vae {name} is not the autoencoder that the training data was prepared with "
                         f"({packed_from['vae']}): name that one")

    def decode(z):
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return net.decode(z.float() / net.scale)
    return decode


def draw_samples(num, draw, processes, batch=256):
    """uint8 [num,C,H,W] on the CPU, shared among the processes; draw(rows [b]) -> uint8 [b,C,H,W]."""
    share = -(-num // processes.world)
    index = torch.arange(processes.rank * share, (processes.rank + 1) * share)
    return processes.gather(torch.cat([draw(rows) for rows in index.split(batch)]))[:num].cpu()


def write_samples(path, num, draw, labels_of, batch, processes, model, settings, columns):
    """Samples 0 ... num - 1 to PATH: a grid (.png), or all of them (.npz) and a grid of the first hundred beside it.

    The .npz has ADM's layout: arr_0 images uint8 [N,H,W,3], arr_1 labels [N]; and `settings`, a line that says what
    they are. It is put together from parts in PATH.parts, each written whole: after a crash the same command goes on,
    on any number of processes and with any batch. draw(rows) -> uint8 [b,C,H,W]; labels_of(rows) -> int64 [b].
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".png":
        images = draw_samples(num, draw, processes, batch)
        if processes.main:
            save_grid(images, path, columns)
        return processes.print(f"{path}: {num} samples")
    parts = path.with_name(path.name + ".parts")
    if processes.main:                                                      # who asks for it, and of whose weights
        settings = json.dumps({**settings, "weights": run.weights_hash(model)}, sort_keys=True)
    todo = processes.share(lambda: to_do(path, parts, num, settings))
    if todo is None:
        return processes.print(f"{path} holds these {num} samples already: delete it to draw them anew")
    rows_of_parts = [rows for neighbours in np.split(todo, np.flatnonzero(np.diff(todo) > 1) + 1)
                     for rows in np.split(neighbours, range(batch, len(neighbours), batch)) if len(rows)]
    progress = run.Progress(len(todo), processes)
    for rows in rows_of_parts[processes.rank::processes.world]:
        images = to_rgb(draw(torch.from_numpy(rows))).permute(0, 2, 3, 1).cpu().numpy()
        with run.atomic(parts / f"{rows[0]:08d}.npy") as f:
            np.lib.format.write_array(f, images, allow_pickle=False)
        progress.add(len(rows))
    if processes.world > 1:
        torch.distributed.barrier()
    if processes.main:
        join(path, parts, labels_of(torch.arange(num)).numpy(), settings)
        save_grid(ImageArchive(path)[:100], path.with_name(f"{path.stem}_grid.png"), columns)
    processes.print(f"{path}: {num} samples; {progress}")


def to_do(path, parts, num, settings):
    """Indices that no part holds yet; None where PATH is there already, with the same settings."""
    if path.exists():
        try:
            with np.load(path) as f:
                if "settings" in f.files and str(f["settings"]) == settings and len(f["arr_1"]) == num:
                    shutil.rmtree(parts, ignore_errors=True)                # left by a kill in the midst of tidying up
                    return None
        except (ValueError, *NO_ARCHIVE):
            pass                                                            # something else: it is replaced in the end
    told, done = parts / "settings.json", np.zeros(num, bool)
    if parts.exists() and not told.exists():                                # killed while it was being deleted
        shutil.rmtree(parts)
    if told.exists() and told.read_text() != settings:
        now, was = json.loads(settings), json.loads(told.read_text())
        changed = ", ".join(f"{k} {now.get(k)} (was {was.get(k)})" for k in now if now.get(k) != was.get(k))
        raise ValueError(f"{parts} holds a part of other samples: {changed}. Give the same flags to go on, or delete "
                         f"that folder")
    parts.mkdir(exist_ok=True)
    with run.atomic(told) as f:
        f.write(settings.encode())
    for file in parts.glob("*.npy"):
        try:
            done[int(file.stem):][:len(np.load(file, mmap_mode="r"))] = True
        except (ValueError, EOFError):                                      # a disk's fault: draw it once more
            file.unlink()
    return np.flatnonzero(~done)


def join(path, parts, labels, settings):
    """The parts, one after another, as an .npz: never more than one of them in memory."""
    files = sorted(parts.glob("*.npy"))
    header = dict(descr="|u1", fortran_order=False, shape=(len(labels), *np.load(files[0], mmap_mode="r").shape[1:]))
    with run.atomic(path) as f, zipfile.ZipFile(f, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for file in files:
                member.write(np.load(file)[:max(0, len(labels) - int(file.stem))].tobytes())
        for name, array in (("arr_1", labels), ("settings", np.array(settings))):
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    shutil.rmtree(parts)


def to_bytes(x, how="round"):
    """Samples in [-1, 1] -> uint8. Raises ValueError where they are not finite: black images would hide it."""
    if not x.isfinite().all():
        raise ValueError("samples are not finite: the checkpoint's weights are not, or --precision fp32 is needed")
    return to_uint8(x, how)


def frechet(a, b):
    return fid.frechet_distance(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))


def scores(samples, sets, num_classes):
    """{name: number} for uint8 samples [B,C,H,W] compared with the sets of `reference`; names as at the top."""
    fake, (real, labels) = torch.cat([fid.pixel_features(x) for x in samples.split(256)]), sets["train"]
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
