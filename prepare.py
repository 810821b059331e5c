"""Crop and encode photographs, once: a folder of class folders becomes a packed folder.

    python prepare.py imagenet/train out/imagenet256 --size 256 --vae sd-ema
    torchrun --nproc_per_node=8 prepare.py ...      one process a GPU; the same command resumes

OUT holds plain arrays, and what they are:
    data.json      what it is: size, autoencoder, classes in the order of the labels, skipped files,
                   and whether it is complete
    files.json     the file of each row, relative to the folder of the classes
    images.npy     uint8 [N,3,S,S], cropped as ADM does
    moments.npy    float16 [N,V,2C,h,w], mean and standard deviation of the unscaled latent; with
                   --mirror V = 2, and the second is of the mirror image
    labels.npy     int64 [N]; -1 marks a row whose file was skipped
    done.npy       uint8 [N]; 1 marks a finished row, and that is all that a resume needs
np.load(..., mmap_mode="r") opens any of the arrays; data.PackedSet reads them for training. At 256
pixels and with SD's autoencoder, a row has 192 KiB of image and 16 KiB of moments.

Letters: N rows, b rows of a batch, S side in pixels, V views, C latent channels, h w latent's side.
"""
import json
import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import data
import ddp
import run
import vae


# ---- what is to be made

def plan(args, net):
    """Return the folder of the classes, the names of the files below it, their labels, and `about`.

    `about` is the content of data.json. Raises ValueError if folder or flags do not fit.
    """
    top, classes = data.class_folders(Path(args.folder), "FOLDER")
    files, labels = data.class_files(top, classes, "FOLDER")
    if args.limit and args.limit < len(files):
        # spread over the folder, so that every class has its share
        keep = [i * len(files) // args.limit for i in range(args.limit)]
        files = [files[i] for i in keep]
        labels = [labels[i] for i in keep]
    if args.size % net.factor:
        raise ValueError(f"--size {args.size} must be a multiple of {net.factor}, by which "
                         f"--vae {args.vae} shrinks")

    names = [f.relative_to(top).as_posix() for f in files]
    about = dict(complete=False, rows=len(files), size=args.size, mirror=args.mirror, vae=args.vae,
                 fingerprint=vae.fingerprint(net), precision=args.precision,
                 channels=net.z_channels, latent_size=args.size // net.factor, scale=net.scale,
                 classes=classes, skipped=[])
    return top, names, labels, about


def begin(out, about, files, labels):
    """Create the arrays in full size, unfinished. A disk that is too small stops it here.

    The order makes a kill harmless: files.json marks the arrays as ours, so that the next start may
    replace them, and data.json, which comes last, says that everything is there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OSError(f"OUT {out} cannot be made ({e.strerror}): choose another place") from None
    arrays = {out / f"{name}.npy": layout for name, layout in data.layouts(about).items()}
    there = [array.name for array in arrays if array.exists()]
    if there and not (out / "files.json").exists():
        raise ValueError(f"OUT {out} holds {', '.join(there)} from elsewhere: name an empty folder")
    for array in arrays:
        array.unlink(missing_ok=True)

    need = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays.values())
    free = shutil.disk_usage(out).free
    if need > free:
        raise OSError(f"OUT {out} needs {need / 1e9:.3g} GB, and its disk has {free / 1e9:.3g} GB "
                      f"free: make room, choose another disk, or --limit the images")
    with run.atomic(out / "files.json") as f:
        f.write(json.dumps(files).encode())
    try:
        for array, (shape, dtype) in arrays.items():
            np.lib.format.open_memmap(array, "w+", dtype, shape).flush()
    except OSError as e:
        raise OSError(f"OUT {out} needs {need / 1e9:.3g} GB and could not be laid out ({e}): "
                      f"choose another disk, or --limit the images") from None
    with run.atomic(out / "labels.npy") as f:
        np.save(f, np.asarray(labels, np.int64))
    write_about(out, about)


def write_about(out, about):
    with run.atomic(out / "data.json") as f:
        f.write(json.dumps(about, indent=1).encode())


def check_resume(out, about, files):
    """Refuse to resume an OUT that was made of other images or with other settings."""
    was = data.read_about(out)
    for name in ("size", "mirror", "precision", "fingerprint"):
        if was[name] != about[name]:
            # the autoencoder is compared by its weights, not by its name
            shown = "vae" if name == "fingerprint" else name
            raise ValueError(f"OUT {out} was started with --{shown} {was[shown]}, not "
                             f"{about[shown]}: give the same flags to resume, or another OUT")
    try:
        same = json.loads((out / "files.json").read_text()) == files
    except (OSError, ValueError):
        same = False
    if not same or was["classes"] != about["classes"]:
        raise ValueError(f"OUT {out} was started with other images (another FOLDER or --limit, or "
                         f"files came or went): put them back to resume, or choose another OUT")
    for name, layout in data.layouts(was).items():
        data.Rows(out / f"{name}.npy", *layout)                 # raises if an array is damaged


# ---- the work

def decode(path, size, on_bad):
    """Return a file's crop, uint8 [3,S,S], or None if it is bad and --on-bad is skip."""
    try:
        with data.open_image(path) as image:
            return np.array(data.center_crop(image, size)).transpose(2, 0, 1)
    except ValueError as e:                 # an OSError is the disk's: it always stops the program
        if on_bad == "stop":
            raise ValueError(f"{e}; or give --on-bad skip, and the same command resumes") from None
        print(f"skipped: {e}", flush=True)
        return None


def encode(net, images, args, device):
    """Return the moments float16 [b,V,2C,h,w] of images uint8 [b,3,S,S]."""
    x = data.to_pixels(torch.from_numpy(images).to(device))
    views = [x, x.flip(-1)] if args.mirror else [x]
    with torch.inference_mode(), run.autocast(args.precision, device):
        moments = [torch.cat(net.encode(view), dim=1) for view in views]        # V of [b,2C,h,w]
    moments = torch.stack(moments, dim=1).half().cpu()
    if not moments.isfinite().all():
        raise ValueError(f"--vae {args.vae} gives latents that are not finite: try --precision "
                         f"fp32, or other weights")
    return moments.numpy()


@contextmanager
def timed(spent, what):
    """Add the seconds of a `with` block to spent[what]."""
    start = time.perf_counter()
    yield
    spent[what] += time.perf_counter() - start


def pack(args, net, files, about, progress, device):
    """Decode, crop, encode and write the images of `files` {row: path}.

    Returns the seconds that the loop waited, {"decoding": ..., "encoding": ..., "writing": ...}.
    """
    arrays = {}
    for name, layout in data.layouts(about).items():
        arrays[name] = data.Rows(Path(args.out, f"{name}.npy"), *layout, "r+b")
    rows = np.array(list(files), np.int64)
    spent = dict.fromkeys(("decoding", "encoding", "writing"), 0.0)
    pool = ThreadPoolExecutor(args.workers)

    def submit(first):
        batch = rows[first:first + args.batch_size]
        return [pool.submit(decode, files[int(row)], args.size, args.on_bad) for row in batch]

    try:
        coming = submit(0)
        for first in range(0, len(rows), args.batch_size):
            decoding = coming
            coming = submit(first + args.batch_size)    # decoded while this batch is encoded
            with timed(spent, "decoding"):
                images = [job.result() for job in decoding]

            batch = rows[first:first + args.batch_size]
            good = np.array([image is not None for image in images])
            images = [image for image in images if image is not None]
            moments = []
            if images:
                with timed(spent, "encoding"):
                    moments = encode(net, np.stack(images), args, device)

            with timed(spent, "writing"):
                arrays["images"].write(batch[good], images)
                arrays["moments"].write(batch[good], moments)
                arrays["labels"].write(batch[~good], np.full((~good).sum(), -1))
                # last: when a row is called done, the rest of it is on the disk
                arrays["done"].write(batch, np.ones(len(batch)))
            progress.add(len(batch))
    finally:
        pool.shutdown(cancel_futures=True)
    return spent


def prepare(args, processes):
    """Make OUT of FOLDER: each process does an equal share of the rows that are not done yet."""
    out = Path(args.out)
    net = processes.main_first(lambda: vae.load_vae(args.vae)).to(processes.device)

    # one list of files for all processes
    top, names, labels, about = processes.from_main(lambda: plan(args, net))

    def rows_to_do():
        if (out / "data.json").exists():
            check_resume(out, about, names)
        else:
            begin(out, about, names, labels)
        return np.flatnonzero(np.load(out / "done.npy") == 0)

    todo = processes.from_main(rows_to_do)
    processes.print(f"{len(names):,} images of {len(about['classes'])} classes; "
                    f"{len(names) - len(todo):,} are done")

    if not len(todo) and data.read_about(out)["complete"]:
        processes.print(f"{out} is complete already")
        return

    # neighbours stay together: they lie together on the disk, too
    mine = np.array_split(todo, processes.world)[processes.rank]
    progress = run.Progress(len(todo), processes)
    files = {row: top / names[row] for row in mine}
    spent = pack(args, net, files, about, progress, processes.device)
    processes.barrier()
    if not processes.main:
        return

    left = int((np.load(out / "done.npy") == 0).sum())
    if left:
        raise ValueError(f"OUT {out} lacks {left} rows that were written: give the same command "
                         f"again, and check the disk")
    skipped = np.flatnonzero(np.load(out / "labels.npy") < 0)
    write_about(out, {**about, "complete": True, "skipped": [names[i] for i in skipped]})
    waited = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in spent.items())
    print(f"{out}: {len(names) - len(skipped):,} images are packed, {len(skipped)} skipped; "
          f"{progress}; waited for {waited}", flush=True)


def main(argv=None):
    parser = run.Parser("prepare.py", description="Crop and encode photographs, once.")
    parser.add_argument("folder", help="folder of class folders (or of train/ with class folders)")
    parser.add_argument("out", help="folder for the arrays; if it holds a part of them, resume")
    parser.add_argument("--size", type=int, default=256, help="side of the cropped images")
    parser.add_argument("--vae", default="sd-ema",
                        help="sd-ema, sd-mse, or a file (KL-16: kl16.ckpt)")
    parser.add_argument("--limit", type=int,
                        help="prepare only so many images, spread over the folder")
    parser.add_argument("--mirror", action="store_true",
                        help="also encode the mirror images, for training with --mirror")
    parser.add_argument("--on-bad", choices=("stop", "skip"), default="stop",
                        help="what to do with images that cannot be read")
    parser.add_argument("--batch-size", type=int, default=16,
                        help="images that a process encodes at a time")
    parser.add_argument("--workers", type=int, default=8,
                        help="threads of a process that decode images")
    parser.add_argument("--device", default="auto",
                        help="auto, cpu, cuda, cuda:N, or mps of a Mac")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32",
                        help="of the encoder; what is made once is worth fp32")
    args = parser.parse_args(argv)
    with run.one_line_errors("prepare.py"):
        for name in ("size", "limit", "batch_size", "workers"):
            value = getattr(args, name)
            run.require(args, value is None or value >= 1, name, "must be 1 or more")
        run.check_precision(args)
        processes = ddp.Processes(args.device, hours=48)        # some may finish long before others
    # Full float32, not TF32, which has fewer digits than the float16 that is stored.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    memory = run.one_line_out_of_memory("prepare.py", "give a smaller --batch-size, which changes "
                                                      "nothing else; the same command resumes")
    try:
        with run.one_line_errors("prepare.py"), memory:
            prepare(args, processes)
    finally:
        processes.close()


if __name__ == "__main__":
    main()
