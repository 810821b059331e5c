"""Packed data: photographs cropped and encoded once, as plain arrays on the disk. `data.py prepare` is this program.

    python data.py prepare imagenet/train out/imagenet256 --size 256 --vae sd-ema
    torchrun --nproc_per_node=8 data.py prepare ...      one process a GPU; after a crash the same command goes on

OUT holds
    data.json      what it is: size, autoencoder, classes in the order of the labels, skipped files, whether complete
    files.json     the file of each row, below the folder
    images.npy     uint8 [N,3,S,S], cropped as ADM does
    moments.npy    float16 [N,V,2C,h,w], mean and standard deviation of the unscaled latent; V = 2 with --mirror: the
                   mirror image's too
    labels.npy     int64 [N]; -1 marks a row whose file was skipped
    done.npy       uint8 [N]; 1 where a row is finished, which is all that a resume needs
np.load(..., mmap_mode="r") opens any of the arrays. Training reads rows of them, no more than it needs: no images once
the guidance has ended. A sample of 256 pixels has 192 KiB of image and 16 KiB of moments.
"""
import json
import math
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

ARRAYS = ("images", "moments", "labels", "done")
ABOUT = ("complete", "rows", "size", "mirror", "vae", "fingerprint", "precision", "channels", "latent_size", "scale",
         "classes", "skipped")                                              # what data.json says
READERS = 8                                                                 # threads that wait for the disk


# ---- reading

class Rows:
    """Rows of an .npy file, read and written rather than mapped.

    Mapped pages would count as the process's own memory, and two machines that write to one page of a network disk
    would undo each other's rows. Raises ValueError where the file is not what data.json says.
    """

    def __init__(self, path, shape, dtype, mode="rb"):
        path, dtype = Path(path), np.dtype(dtype)
        remedy = "copy it again, or run data.py prepare into an empty folder"
        try:
            self.file = open(path, mode)
            version = np.lib.format.read_magic(self.file)
            header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")(self.file)
        except (OSError, ValueError, AttributeError) as e:
            raise ValueError(f"{path} is missing or damaged ({e}): {remedy}") from None
        if header != (tuple(shape), False, dtype):
            raise ValueError(f"{path} holds {header[2]} {list(header[0])}, where data.json says {dtype} {list(shape)}: "
                             f"{remedy}")
        self.shape, self.dtype, self.start = tuple(shape), dtype, self.file.tell()
        self.row_bytes = math.prod(shape[1:]) * dtype.itemsize
        whole, there = self.start + shape[0] * self.row_bytes, path.stat().st_size
        if there != whole:
            raise ValueError(f"{path} has {there:,} bytes of {whole:,}: cut short; {remedy}")
        self.pool = ThreadPoolExecutor(READERS)

    def read(self, rows):
        """int array [b] -> tensor [b,...]. Several threads, since each waits for the disk; none holds Python's lock."""
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)

        def some(i):
            for j in range(i, len(rows), READERS):
                raw = os.pread(self.file.fileno(), self.row_bytes, self.start + int(rows[j]) * self.row_bytes)
                if len(raw) != self.row_bytes:
                    raise OSError(f"{self.file.name} ends in the midst of row {int(rows[j])}: copy it again")
                out[j] = np.frombuffer(raw, self.dtype).reshape(out.shape[1:])
        list(self.pool.map(some, range(min(READERS, len(rows)))))
        return torch.from_numpy(out)

    def write(self, rows, values):
        """values [b,...] to the rows [b], and on the disk when this returns."""
        for row, value in zip(rows, np.asarray(values, self.dtype)):
            raw = value.tobytes()
            if os.pwrite(self.file.fileno(), raw, self.start + int(row) * self.row_bytes) != len(raw):
                raise OSError(f"{self.file.name} could not be written: is the disk full?")
        if len(rows):
            os.fsync(self.file.fileno())


class PackedSet:
    """Images and moments of a packed folder; rows whose file was skipped do not count."""

    def __init__(self, folder):
        self.about = about = read_about(folder)
        if not about["complete"]:
            raise ValueError(f"--data {folder} is not finished: run data.py prepare once more with the same flags")
        self.images, self.latents, _, _ = (Rows(Path(folder, f"{name}.npy"), *layout)
                                           for name, layout in layouts(about).items())
        labels = np.load(Path(folder, "labels.npy"))
        self.rows = np.flatnonzero(labels >= 0)
        self.labels = torch.from_numpy(labels[self.rows])

    def __len__(self):
        return len(self.rows)

    def read(self, rows):
        """rows [b] -> images uint8 [b,3,S,S], labels [b]."""
        return self.images.read(self.rows[np.asarray(rows)]), self.labels[rows]

    def moments(self, rows):
        """rows [b] -> float16 [b,V,2C,h,w]."""
        return self.latents.read(self.rows[np.asarray(rows)])


def read_about(folder):
    path = Path(folder, "data.json")
    try:
        about = json.loads(path.read_text())
        return {name: about[name] for name in ABOUT}
    except (OSError, ValueError, KeyError, TypeError) as e:
        why = f"it lacks {e}" if isinstance(e, KeyError) else e
        raise ValueError(f"{path} cannot be read ({why}): is {folder} a folder made by data.py prepare?") from None


def layouts(about):
    """{array: (shape, dtype)} of a packed folder."""
    N, S, V, side = about["rows"], about["size"], 1 + about["mirror"], about["latent_size"]
    return {"images": ((N, 3, S, S), "uint8"), "moments": ((N, V, 2 * about["channels"], side, side), "float16"),
            "labels": ((N,), "int64"), "done": ((N,), "uint8")}


def open_packed(folder, image_size=None):
    """data.Data of a packed folder. Raises ValueError with one line."""
    import data
    packed = PackedSet(folder)
    about = packed.about
    if image_size not in (None, about["size"]):
        raise ValueError(f"--image-size {image_size} does not fit --data {folder}, which was prepared with --size "
                         f"{about['size']}: leave it out, or prepare the images anew")
    return data.Data(packed, None, about["size"], 3, about["classes"], about)


def fingerprint(vae):
    """Of an autoencoder's encoder: sd-ema and sd-mse share theirs, and so their latents."""
    import run
    return run.weights_hash(vae, r"encoder\.|quant_conv\.")


# ---- writing

def begin(out, about, files, labels):
    """Create the arrays, whole from the start: a disk that is too small says so now, not after a day."""
    out.mkdir(parents=True, exist_ok=True)
    arrays = [out / f"{name}.npy" for name in ARRAYS]
    there = [a.name for a in arrays if a.exists()]
    if there and not (out / "files.json").exists():
        raise ValueError(f"OUT {out} holds {', '.join(there)} from elsewhere: name an empty folder")
    for array in arrays:                                                    # ours, of a start that was killed
        array.unlink(missing_ok=True)
    need = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in layouts(about).values())
    free = shutil.disk_usage(out).free
    if need > free:
        raise OSError(f"OUT {out} needs {need / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free: make room, "
                      f"choose another disk, or --limit the images")
    (out / "files.json").write_text(json.dumps(files))
    try:
        for name, (shape, dtype) in layouts(about).items():
            np.lib.format.open_memmap(out / f"{name}.npy", "w+", dtype, shape).flush()
            if hasattr(os, "posix_fallocate"):                              # else the disk may still run full
                with open(out / f"{name}.npy", "r+b") as f:
                    os.posix_fallocate(f.fileno(), 0, os.fstat(f.fileno()).st_size)
    except OSError as e:
        for file in (*arrays, out / "files.json"):
            file.unlink(missing_ok=True)
        raise OSError(f"OUT {out} needs {need / 1e9:.1f} GB and could not be laid out ({e}): choose another disk, or "
                      f"--limit the images") from None
    array = np.load(out / "labels.npy", mmap_mode="r+")
    array[:] = labels
    array.flush()
    write_about(out, about)                                                 # last: it says that the rest is there


def write_about(out, about):
    import run
    with run.atomic(out / "data.json") as f:
        f.write(json.dumps(about, indent=1).encode())


def resume(out, about, files):
    """Check that what OUT holds is of the same images and settings."""
    was = read_about(out)
    for name in ("size", "mirror", "precision", "fingerprint"):
        if was[name] != about[name]:
            shown = "vae" if name == "fingerprint" else name                # by its weights, not by its name
            raise ValueError(f"OUT {out} was begun with --{shown} {was[shown]}, not {about[shown]}: give the same "
                             f"flags to go on, or another OUT")
    try:
        same = json.loads((out / "files.json").read_text()) == files and was["classes"] == about["classes"]
    except (OSError, ValueError):
        same = False
    if not same:
        raise ValueError(f"OUT {out} was begun with other images (another FOLDER or --limit, or files came or went): "
                         f"put them back to go on, or choose another OUT")
    for name, layout in layouts(was).items():
        Rows(out / f"{name}.npy", *layout)                                  # complains where an array is damaged


def plan(args, net):
    """Folder of the classes, names of the files below it, their labels, and the description of the set."""
    import data
    top, classes = data.class_folders(Path(args.folder), "FOLDER")
    files, labels = data.class_files(top, classes, "FOLDER")
    if args.limit and args.limit < len(files):                              # spread over the classes
        keep = [i * len(files) // args.limit for i in range(args.limit)]
        files, labels = [files[i] for i in keep], [labels[i] for i in keep]
    if args.size % net.factor:
        raise ValueError(f"--size {args.size} must be a multiple of {net.factor}, by which --vae {args.vae} shrinks")
    names = [f.relative_to(top).as_posix() for f in files]
    about = dict(complete=False, rows=len(files), size=args.size, mirror=args.mirror, vae=args.vae,
                 fingerprint=fingerprint(net), precision=args.precision, channels=net.z_channels,
                 latent_size=args.size // net.factor, scale=net.scale, classes=classes, skipped=[])
    return top, names, labels, about


def pack(args, net, files, about, progress, device):
    """Decode, crop, encode and write `files` {row: path}. Returns {what: seconds that the loop waited for it}."""
    import data
    import run
    arrays = {name: Rows(Path(args.out, f"{name}.npy"), *layout, "r+b") for name, layout in layouts(about).items()}

    def decode(row):                                                        # [3,S,S], or None where it is skipped
        try:
            with data.open_image(files[row]) as image:
                return np.array(data.center_crop(image, args.size)).transpose(2, 0, 1)
        except ValueError as e:                                             # an OSError is the disk's, and stops it all
            if args.on_bad == "stop":
                raise ValueError(f"{e}; or --on-bad skip, and the same command goes on") from None
            print(f"skipped: {e}", flush=True)

    def encode(pixels):                                                     # [b,3,S,S] -> float16 [b,V,2C,h,w]
        x = data.to_pixels(torch.from_numpy(pixels).to(device))
        with torch.inference_mode(), run.autocast(args.precision, device):
            views = [torch.cat(net.encode(v), dim=1) for v in ([x, x.flip(-1)] if args.mirror else [x])]
        found = torch.stack(views, dim=1).half().cpu()
        if not found.isfinite().all():
            raise ValueError(f"--vae {args.vae} gives latents that are not finite: try --precision fp32, or other "
                             f"weights")
        return found.numpy()

    spent = dict.fromkeys(("decoding", "encoding", "writing"), 0.0)
    rows = np.array(list(files), np.int64)
    batches = [rows[i:i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
    pool = ThreadPoolExecutor(args.workers)
    submit = lambda i: [pool.submit(decode, int(r)) for r in (batches[i] if i < len(batches) else [])]
    try:
        coming = submit(0)
        for i, batch in enumerate(batches):                                 # the next one is decoded meanwhile
            now, coming, marks = coming, submit(i + 1), [time.perf_counter()]
            pixels = [f.result() for f in now]
            good = np.array([p is not None for p in pixels], bool)
            marks.append(time.perf_counter())
            pixels = [p for p in pixels if p is not None]
            moments = encode(np.stack(pixels)) if pixels else []
            marks.append(time.perf_counter())
            arrays["images"].write(batch[good], pixels)
            arrays["moments"].write(batch[good], moments)
            arrays["labels"].write(batch[~good], np.full((~good).sum(), -1))
            arrays["done"].write(batch, np.ones(len(batch)))                # last: the rest is on the disk
            marks.append(time.perf_counter())
            for what, begun, ended in zip(spent, marks, marks[1:]):
                spent[what] += ended - begun
            progress.add(len(batch))
    finally:
        pool.shutdown(cancel_futures=True)
    return spent


def prepare(args, processes):
    """FOLDER -> OUT, each process an equal share of the rows that are to be done, neighbours together."""
    import run
    import vae
    out = Path(args.out)
    net = processes.first(lambda: vae.load_vae(args.vae)).to(processes.device)
    top, names, labels, about = processes.share(lambda: plan(args, net))   # one list for all processes

    def to_do():
        if (out / "data.json").exists():
            resume(out, about, names)
        else:
            begin(out, about, names, labels)
        return np.flatnonzero(np.load(out / "done.npy") == 0)
    todo = processes.share(to_do)
    processes.print(f"{len(names):,} images of {len(about['classes'])} classes; {len(names) - len(todo):,} are done")
    progress, mine = run.Progress(len(todo), processes), np.array_split(todo, processes.world)[processes.rank]
    spent = pack(args, net, {row: top / names[row] for row in mine}, about, progress, processes.device)
    if processes.world > 1:
        torch.distributed.barrier()
    if processes.main:
        left = int((np.load(out / "done.npy") == 0).sum())
        if left:
            raise ValueError(f"OUT {out} lacks {left} rows that were written: give the same command again, and watch "
                             f"the disk")
        skipped = np.flatnonzero(np.load(out / "labels.npy") < 0)
        write_about(out, {**about, "complete": True, "skipped": [names[i] for i in skipped]})
        where = ", ".join(f"{k} {s:.0f} s" for k, s in spent.items())
        print(f"{out}: {len(names) - len(skipped):,} images are packed, {len(skipped)} skipped; {progress}; "
              f"waited for {where}", flush=True)


def main(argv):
    import run
    parser = run.Parser("data.py prepare", description="Crop and encode a folder of class folders, once.")
    parser.add_argument("folder", help="folder of class folders (or of train/ with class folders)")
    parser.add_argument("out", help="folder for the arrays; where it holds a part of them, the rest is made")
    parser.add_argument("--size", type=int, default=256, help="side of the cropped images")
    parser.add_argument("--vae", default="sd-ema", help="sd-ema, sd-mse, or a file (KL-16: kl16.ckpt)")
    parser.add_argument("--limit", type=int, help="so many images only, spread over the folder")
    parser.add_argument("--mirror", action="store_true", help="encode mirror images too, for training with --mirror")
    parser.add_argument("--on-bad", choices=("stop", "skip"), default="stop", help="what to do with unreadable images")
    parser.add_argument("--batch-size", type=int, default=16, help="images that a process encodes at a time")
    parser.add_argument("--workers", type=int, default=8, help="threads of a process that decode images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32",
                        help="of the encoder; what is made once is worth fp32")
    args = parser.parse_args(argv)
    with run.one_line("data.py"):
        for name in ("size", "limit", "batch_size", "workers"):
            run.need(args, getattr(args, name) is None or getattr(args, name) >= 1, name, "must be 1 or more")
        processes = run.Processes(args.device, hours=48)                    # some may be done long before others
    try:
        with run.one_line("data.py"):
            prepare(args, processes)
    finally:
        processes.close()
