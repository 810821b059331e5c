"""Crop and encode photographs, once: class folders or captioned images become a packed folder.

    python prepare.py imagenet/train out/imagenet256 --size 256 --vae sd-ema
    python prepare.py coco/train2014 out/coco256 --captions captions_train2014.json \
        --crop square-lanczos --text ViT-L-14.pt
    torchrun --nproc_per_node=8 prepare.py ...      one process a GPU; the same command resumes

OUT holds plain arrays, and what they are:
    data.json      what it is: size, autoencoder, classes in the order of the labels, text encoder,
                   skipped and uncaptioned files, and whether it is complete
    files.json     the file of each row, relative to the folder of the classes or captioned images
    images.npy     uint8 [N,3,S,S], cropped as ADM does, or as --crop says
    moments.npy    float16 [N,V,2C,h,w], mean and standard deviation of the unscaled latent; with
                   --mirror V = 2, and the second is of the mirror image
    labels.npy     int64 [N]; -1 marks a row whose file was skipped; 0 with --captions
    done.npy       uint8 [N]; 1 marks a finished row, and that is all that a resume needs
and with --captions:
    captions.npy   uint16 [M,L], token ids; with --text-features float16 [M,L,D], what the text
                   encoder makes of them. Entry 0 is the null caption, "".
    first_caption.npy  int64 [N+1]; first[n] ... first[n+1] - 1 are row n's entries of captions.npy
    captions.json  the captions themselves, a list for each row
np.load(..., mmap_mode="r") opens any of the arrays; packed.PackedSet reads them for training. At
256 pixels and with SD's autoencoder, a row has 192 KiB of image and 16 KiB of moments.

Letters: N rows, b rows of a batch, S side in pixels, V views, C latent channels, h w latent's side,
M captions, L tokens of one, D width of the text encoder.
"""
import hashlib
import json
import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Optional

import numpy as np
import torch

import data
import ddp
import packed
import run
import text
import vae


# ---- what is to be made

@dataclass
class Captions:
    """The captions of all rows, as text and as tokens."""
    texts: list         # N lists of captions
    first: np.ndarray   # [N+1] int64, their entries in ids
    ids: np.ndarray     # [M,L] uint16; entry 0 is the null caption
    cut: int            # how many were longer than L tokens

    def entries(self, rows):
        """Return the entries of the captions of some rows; the null caption counts as row 0's."""
        starts = np.where(rows > 0, self.first[rows], 0)
        return np.concatenate(list(map(np.arange, starts, self.first[rows + 1])))

    def fingerprint(self):
        words = json.dumps(self.texts).encode() + self.ids.tobytes()
        return hashlib.sha256(words).hexdigest()[:16]


@dataclass
class Plan:
    """What is to be made."""
    top: Path                       # the folder of the files
    names: list                     # of the files below it, one a row
    labels: list
    captions: Optional[Captions]
    about: dict                     # the content of data.json


@dataclass
class Files:
    """The images of FOLDER."""
    top: Path
    names: list         # of all images below it
    labels: list
    classes: list
    texts: Optional[list] = None        # with --captions: a list of captions for each image
    uncaptioned: Optional[list] = None  # and the images that have none


def find_files(args):
    """Return the Files of FOLDER and --captions. Raises ValueError or OSError, one line."""
    top = Path(args.folder)
    if args.captions:
        names, texts, uncaptioned = captioned_files(top, args.captions)
        return Files(top, names, [0] * len(names), [], texts, uncaptioned)
    top, classes = data.class_folders(top, "FOLDER")
    files, labels = data.class_files(top, classes, "FOLDER")
    return Files(top, [f.relative_to(top).as_posix() for f in files], labels, classes)


def make_plan(args, files, net, encoder):
    """Return the Plan of files and flags. Raises ValueError if they do not fit."""
    if args.size % net.factor:
        raise ValueError(f"--size {args.size} must be a multiple of {net.factor}, by which "
                         f"--vae {args.vae} shrinks")
    names = files.names
    keep = range(len(names))
    if args.limit and args.limit < len(names):
        # spread over the folder, so that every class has its share
        keep = [i * len(names) // args.limit for i in range(args.limit)]

    about = dict(complete=False, rows=len(keep), size=args.size, mirror=args.mirror, crop=args.crop,
                 vae=args.vae, fingerprint=vae.fingerprint(net), precision=args.precision,
                 channels=net.z_channels, latent_size=args.size // net.factor, scale=net.scale,
                 classes=files.classes, text=None, skipped=[])
    captions = None
    if args.captions:
        about_text = text.describe(encoder or open_encoder(args))
        captions = tokenize([files.texts[i] for i in keep], about_text, args.merges)
        about["text"] = {**about_text, "features": args.text_features,
                         "captions": len(captions.ids), "cut": captions.cut,
                         "captions_fingerprint": captions.fingerprint()}
        about["uncaptioned"] = files.uncaptioned
    return Plan(files.top, [names[i] for i in keep], [files.labels[i] for i in keep], captions,
                about)


def captioned_files(folder, path):
    """Return the names of FOLDER's images that have captions, the captions, and the other names.

    path: the file of --captions. Raises ValueError if it is of another folder.
    """
    images = read_captions(path)
    if not folder.is_dir():
        raise ValueError(f"FOLDER {folder} is not a folder")
    there = {file.name for file in folder.iterdir()}
    names = [name for name, texts in images if texts]
    missing = [name for name in names if name not in there]
    if missing:
        raise ValueError(f"FOLDER {folder} lacks {missing[0]}, the first of {len(missing):,} "
                         f"images with captions that are not there: is --captions {path} of "
                         f"another set?")
    known = {name for name in there if Path(name).suffix.lower() in data.IMAGE_SUFFIXES}
    known.update(name for name, _ in images)
    return names, [texts for _, texts in images if texts], sorted(known.difference(names))


def read_captions(path):
    """Return [(file name, captions), ...] of a JSON file like MS-COCO's, sorted by the images' ids.

    Raises ValueError if it is another kind of file, or if a caption is blank.
    """
    blank = []
    try:
        content = json.loads(Path(path).read_bytes())
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        captions = {i: [] for i in sorted(names)}
        for annotation in content["annotations"]:
            if annotation["image_id"] not in captions:
                raise ValueError(f"a caption of image {annotation['image_id']}, but no such image")
            captions[annotation["image_id"]].append(annotation["caption"])
            if not annotation["caption"].strip():
                blank.append(names[annotation["image_id"]])
    except OSError as e:
        raise OSError(f"--captions {path} cannot be read ({e.strerror})") from None
    except Exception as e:
        why = " ".join(str(e).split())
        if isinstance(e, KeyError):
            why = f"no {why}"
        raise ValueError(f"--captions {path} is not a file of captions like MS-COCO's ({why}): "
                         f"give captions_train2014.json, for example") from None

    if blank:
        raise ValueError(f"--captions {path} has a blank caption of {blank[0]}: remove it, or "
                         f"write one")
    if not any(captions.values()):
        raise ValueError(f"--captions {path} holds no captions")
    return [(names[i], texts) for i, texts in captions.items()]


def open_encoder(args):
    return text.open_encoder({"encoder": "clip"}, args.text)


def tokenize(texts, about_text, merges):
    """Return the Captions of lists of captions."""
    tokenizer = text.open_tokenizer(about_text, merges)
    ids = tokenizer(["", *chain.from_iterable(texts)]).numpy().astype(np.uint16)
    return Captions(texts, np.cumsum([1, *map(len, texts)]), ids, tokenizer.cut)


def begin(out, plan):
    """Create the arrays in full size, unfinished. A disk that is too small stops it here.

    The order makes a kill harmless: files.json marks the arrays as ours, so that the next start may
    replace them, and data.json, which comes last, says that everything is there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OSError(f"OUT {out} cannot be made ({e.strerror}): choose another place") from None
    arrays = {out / f"{name}.npy": layout for name, layout in packed.layouts(plan.about).items()}
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
        f.write(json.dumps(plan.names).encode())
    try:
        for array, (shape, dtype) in arrays.items():
            np.lib.format.open_memmap(array, "w+", dtype, shape).flush()
    except OSError as e:
        raise OSError(f"OUT {out} needs {need / 1e9:.3g} GB and could not be laid out ({e}): "
                      f"choose another disk, or --limit the images") from None

    known = {"labels": np.asarray(plan.labels, np.int64)}
    if plan.captions:
        with run.atomic(out / "captions.json") as f:
            f.write(json.dumps(plan.captions.texts).encode())
        known["first_caption"] = plan.captions.first
        if not plan.about["text"]["features"]:
            known["captions"] = plan.captions.ids
    for name, array in known.items():
        with run.atomic(out / f"{name}.npy") as f:
            np.save(f, array)
    write_about(out, plan.about)


def write_about(out, about):
    with run.atomic(out / "data.json") as f:
        f.write(json.dumps(about, indent=1).encode())


def check_resume(out, plan):
    """Refuse to resume an OUT that was made of other images or with other settings."""
    about = plan.about
    was = packed.read_about(out)
    for name in ("size", "mirror", "crop", "precision", "fingerprint"):
        if was[name] != about[name]:
            # the autoencoder is compared by its weights, not by its name
            shown = "vae" if name == "fingerprint" else name
            raise ValueError(f"OUT {out} was started with --{shown} {was[shown]}, not "
                             f"{about[shown]}: give the same flags to resume, or another OUT")
    try:
        same = json.loads((out / "files.json").read_text()) == plan.names
    except (OSError, ValueError):
        same = False
    if not same or was["classes"] != about["classes"]:
        raise ValueError(f"OUT {out} was started with other images (another FOLDER, --captions or "
                         f"--limit, or files came or went): put them back to resume, or choose "
                         f"another OUT")
    if plan.captions:
        for name, flags in (("fingerprint", "--text"), ("features", "--text-features"),
                            ("captions_fingerprint", "--captions or --merges")):
            before = was["text"][name]
            now = about["text"][name]
            if before != now:
                raise ValueError(f"OUT {out} was started with another {flags} ({before}, not "
                                 f"{now}): give the same to resume, or another OUT")
    for name, layout in packed.layouts(was).items():
        packed.Rows(out / f"{name}.npy", *layout)                 # raises if an array is damaged


# ---- the work

def decode(path, args):
    """Return a file's crop, uint8 [3,S,S], or None if it is bad and --on-bad is skip."""
    try:
        with data.open_image(path) as image:
            return np.array(data.center_crop(image, args.size, args.crop)).transpose(2, 0, 1)
    except ValueError as e:                 # an OSError is the disk's: it always stops the program
        if args.on_bad == "stop":
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


def encode_text(encoder, ids, args, device):
    """Return the features float16 [b,L,D] of token ids [b,L]."""
    ids = torch.from_numpy(ids.astype(np.int64)).to(device)
    with torch.inference_mode(), run.autocast(args.precision, device):
        features = encoder(ids).half().cpu()
    if not features.isfinite().all():
        raise ValueError(f"--text {args.text or text.CLIP_URL} gives features that are not finite: "
                         f"try --precision fp32, or other weights")
    return features.numpy()


@contextmanager
def timed(spent, what):
    """Add the seconds of a `with` block to spent[what]."""
    start = time.perf_counter()
    yield
    spent[what] += time.perf_counter() - start


def pack(args, plan, rows, net, encoder, progress, device):
    """Decode, crop, encode and write the images of some rows, with --text-features captions too.

    Returns the seconds that the loop waited, {"decoding": ..., "encoding": ..., "writing": ...}.
    """
    arrays = {}
    for name, layout in packed.layouts(plan.about).items():
        arrays[name] = packed.Rows(Path(args.out, f"{name}.npy"), *layout, "r+b")
    spent = dict.fromkeys(("decoding", "encoding", "writing"), 0.0)
    pool = ThreadPoolExecutor(args.workers)

    def submit(first):
        batch = rows[first:first + args.batch_size]
        return [pool.submit(decode, plan.top / plan.names[row], args) for row in batch]

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
            with timed(spent, "encoding"):
                if images:
                    moments = encode(net, np.stack(images), args, device)
                if args.text_features:
                    entries = plan.captions.entries(batch)
                    features = encode_text(encoder, plan.captions.ids[entries], args, device)

            with timed(spent, "writing"):
                if args.text_features:
                    arrays["captions"].write(entries, features)
                arrays["images"].write(batch[good], images)
                arrays["moments"].write(batch[good], moments)
                arrays["labels"].write(batch[~good], np.full((~good).sum(), -1))
                # last: when a row is called done, the rest of it is on the disk
                arrays["done"].write(batch, np.ones(len(batch)))
            progress.add(len(batch))
    finally:
        pool.shutdown(cancel_futures=True)
    return spent


def summary(about):
    """Return what a set consists of besides its images, in words."""
    info = about["text"]
    if not info:
        return f"of {len(about['classes'])} classes"
    words = f"with {info['captions'] - 1:,} captions"
    if info["cut"]:
        words += f", {info['cut']:,} of them cut to {info['length']} tokens"
    if about["uncaptioned"]:
        words += f"; {len(about['uncaptioned']):,} without a caption are left out"
    return words


def prepare(args, processes):
    """Make OUT of FOLDER: each process does an equal share of the rows that are not done yet."""
    out = Path(args.out)
    # the cheapest errors come first, before any weights are fetched
    files = processes.on_main(lambda: find_files(args))
    net = processes.main_first(lambda: vae.load_vae(args.vae)).to(processes.device)
    encoder = None
    if args.text_features:
        encoder = processes.main_first(lambda: open_encoder(args)).to(processes.device)

    # one list of files for all processes; without --text-features only the first reads --text
    plan = processes.from_main(lambda: make_plan(args, files, net, encoder))
    names = plan.names

    def rows_to_do():
        if (out / "data.json").exists():
            check_resume(out, plan)
        else:
            begin(out, plan)
        return np.flatnonzero(np.load(out / "done.npy") == 0)

    todo = processes.from_main(rows_to_do)
    processes.print(f"{len(names):,} images {summary(plan.about)}; "
                    f"{len(names) - len(todo):,} are done")

    if not len(todo) and packed.read_about(out)["complete"]:
        processes.print(f"{out} is complete already")
        return

    # neighbours stay together: they lie together on the disk, too
    mine = np.array_split(todo, processes.world)[processes.rank]
    progress = run.Progress(len(todo), processes)
    spent = pack(args, plan, mine, net, encoder, progress, processes.device)
    processes.barrier()
    if not processes.main:
        return

    left = int((np.load(out / "done.npy") == 0).sum())
    if left:
        raise ValueError(f"OUT {out} lacks {left} rows that were written: give the same command "
                         f"again, and check the disk")
    skipped = np.flatnonzero(np.load(out / "labels.npy") < 0)
    write_about(out, {**plan.about, "complete": True, "skipped": [names[i] for i in skipped]})
    waited = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in spent.items())
    print(f"{out}: {len(names) - len(skipped):,} images are packed, {len(skipped)} skipped; "
          f"{progress}; waited for {waited}", flush=True)


def main(argv=None):
    parser = run.Parser("prepare.py", description="Crop and encode photographs, once.")
    parser.add_argument("folder", help="folder of class folders (or of train/ with class "
                                       "folders); with --captions, of images")
    parser.add_argument("out", help="folder for the arrays; if it holds a part of them, resume")
    parser.add_argument("--size", type=int, default=256, help="side of the cropped images")
    parser.add_argument("--crop", choices=data.CROPS, default="adm",
                        help="shrink, then cut (ADM's), or cut, then shrink (U-ViT's for MS-COCO)")
    parser.add_argument("--vae", default="sd-ema",
                        help="sd-ema, sd-mse, or a file (KL-16: kl16.ckpt)")
    parser.add_argument("--limit", type=int,
                        help="prepare only so many images, spread over the folder")
    parser.add_argument("--mirror", action="store_true",
                        help="also encode the mirror images, for training with --mirror")
    parser.add_argument("--captions", help="file like MS-COCO's captions_train2014.json; FOLDER "
                                           "then holds its images")
    parser.add_argument("--text", help="file of CLIP's text encoder; fetched if not given")
    parser.add_argument("--merges", help="file of its tokenizer; fetched if not given")
    parser.add_argument("--text-features", action="store_true",
                        help="also encode the captions: 49 GB for MS-COCO, and training needs no "
                             "encoder")
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
        for name in ("text", "merges", "text_features"):
            run.require(args, args.captions or not getattr(args, name), name, "needs --captions")
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
