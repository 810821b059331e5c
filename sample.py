"""Draw samples from a checkpoint of any model: a picture, an animation, or tens of thousands.

    python sample.py --ckpt out/ckpt.pt --cfg 1.5               a grid of 100 samples: out/grid.png
    python sample.py --ckpt out/ckpt.pt --out out/noise.gif     the same grid on its way from noise
    python sample.py --ckpt dit-xl-256 --cfg 1.5 --guided-channels 3        a published DiT
    python sample.py --ckpt out/scenes/ckpt.pt "a seven left of a three" "a large four"
    torchrun --nproc_per_node=8 sample.py --ckpt xar-b --samples 50000 --cfg 2.7 --out xar-b.npz

The names of the checkpoint's tensors say which model it holds. Sample i depends on (--seed, i)
alone, not on the batch, the number of processes, or the order. An .npz has ADM's layout, which
fid.py and the papers' evaluators read; if its command is interrupted, the same command resumes.
"""
import hashlib
import json
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch

import data
import ddp
import dit
import evaluate
import fid
import mmdit
import models
import run
import scenes
import sit
import text
import vae
import xar

PROGRAM = "sample.py"
SIT_STEPS = 250                                                             # and DiT's
XAR_STEPS = 40
FRAMES = 20                                                                 # of an animation
FRAME_MS = 100                                                              # each is shown so long, the last one longer
LAST_FRAME_MS = 2000
GIF_SIDE = 32                                                               # pixels of an image, at least


def parse_args(argv):
    parser = run.Parser(PROGRAM, description="Sample images from a checkpoint.")
    add = parser.add_argument
    add("words", nargs="*", metavar="CAPTION", help="captions, for a model that takes them")
    add("--ckpt", default="out/ckpt.pt",
        help=f"checkpoint: a file, or a published one by name ({', '.join(run.CHECKPOINTS)})")
    add("--out", help="a picture (.png), an animation from noise (.gif), or all images for fid.py "
                      "(.npz); if not given, grid.png beside the checkpoint")
    add("--samples", type=int, help="number of images; if not given, 100, in an animation 50")
    add("--cfg", type=float, default=1.0,
        help="classifier-free guidance (xAR: of the last entity); 1 is none")
    add("--interval", type=float, nargs=2, help="times with guidance, low high; SiT and MM-DiT")
    add("--sampler", choices=("sde", "ode", "heun"),
        help="Euler-Maruyama, Euler or Heun; SiT and MM-DiT, sde if not given")
    add("--steps", type=int,
        help=f"sampling steps; if not given, {SIT_STEPS} (xAR: {XAR_STEPS} an entity)")
    add("--path", choices=("linear", "cosine"),
        help="path, if the checkpoint does not say; SiT and MM-DiT")
    add("--objective", choices=("flow", "ddpm"),
        help="flow: SiT, ddpm: DiT; if not given, what the checkpoint says, else flow")
    add("--guided-channels", type=int,
        help="--cfg acts on the first ones of the noise; DiT only, all if not given; 3 made its "
             "published figures")
    add("--captions", help="a file with a caption a line, or a folder of prepare.py --captions, of "
                           "which each image's is taken, in order")
    add("--text", help="file with CLIP's text tower; if not given, it is fetched")
    add("--merges", help="file with its merges (bpe_simple_vocab_16e6.txt.gz, merges.txt); if not "
                         "given, it is fetched")
    add("--label", type=int, help="class of all images")
    add("--labels", choices=("balanced", "random"), default="balanced",
        help="classes in turn, or random ones that depend on the index")
    add("--to-uint8", choices=("round", "truncate"), default="round",
        help="from [-1, 1] to 0 ... 255")
    add("--seed", type=int, default=0, help="of the noise and of random labels")
    add("--batch-size", type=int, default=100, help="images at a time")
    add("--num-heads", type=int, help="attention heads, if the checkpoint does not say")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N, or mps of a Mac")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="auto: bf16 on CUDA, else fp32; on CUDA, fp32 means TF32")
    add("--vae", help="decoder of latents: sd-ema, sd-mse or a file, if not the checkpoint's own")
    args = parser.parse_args(argv)
    with run.one_line_errors(PROGRAM):
        check(args)
    return args


def check(args):
    """Refuse impossible flags; fill in --out and --samples."""
    for name, least in (("samples", 1), ("steps", 1), ("batch_size", 1), ("seed", 0),
                        ("num_heads", 1), ("label", 0), ("guided_channels", 1)):
        value = getattr(args, name)
        run.require(args, value is None or value >= least, name, f"must be {least} or more")
    run.check_precision(args)
    if args.interval and not args.interval[0] <= args.interval[1]:
        raise ValueError(f"--interval {args.interval[0]} {args.interval[1]} must be low, then high")
    if args.out is None:
        folder = "out" if args.ckpt in run.CHECKPOINTS else Path(args.ckpt).parent
        args.out = str(Path(folder, "grid.png"))
    run.require(args, Path(args.out).suffix.lower() in (".png", ".gif", ".npz"), "out",
                "must end in .png, .gif or .npz")
    if args.words and args.captions:
        raise ValueError(f"--captions {args.captions}: captions are given as words, too; choose "
                         f"one of the two")


# ---- models: each has a function that draws latents, and one that also shows the way there

def kind_of(model):
    if isinstance(model, xar.XAR):
        return "xAR"
    if isinstance(model, mmdit.MMDiT):
        return "MM-DiT"
    return "DiT" if model.objective == "ddpm" else "SiT"


def draw_sit(model, args, rows, y, null, watch=None):
    """Return latents [b,C,h,w] of a SiT, DiT or MM-DiT.

    y: class ids [b], or features of captions [b,L,C]; null is the same of no label.
    watch(x), if given, sees the states that lead there.
    """
    shape = (model.in_channels, model.input_size, model.input_size)
    device = model.pos_embed.device
    randn = run.indexed_randn(args.seed, rows)
    noise = randn(torch.empty(len(rows), *shape, device=device))

    def network(x, t, y):
        if watch is not None:
            watch(x[:len(rows)])                                            # with guidance, the rest is a copy
        return model(x, t, y)

    settings = dict(num_steps=args.steps, cfg_scale=args.cfg, null_label=null)
    if kind_of(model) == "DiT":
        return dit.sample_ddpm(network, noise, y, guided_channels=args.guided_channels,
                               randn=randn, **settings)
    settings.update(cfg_interval=args.interval, contrast=model.contrast)
    if args.sampler == "sde":
        return sit.sample_sde(network, noise, y, path=args.path, randn=randn, **settings)
    return sit.sample_ode(network, noise, y, heun=args.sampler == "heun", **settings)


def draw_xar(model, args, rows, y, null):
    """Return latents [b,C,h,w]; y [b] class ids. The model itself knows which is the null label."""
    return model.sample(y, args.steps, args.cfg, run.indexed_randn(args.seed, rows))


def states_of_sit(model, args, rows, y, null):
    """Return at most FRAMES states [b,C,h,w] from noise to samples, which are the last."""
    states = []
    samples = draw_sit(model, args, rows, y, null, watch=states.append)
    stride = -(-len(states) // (FRAMES - 1))                                # rounded up
    return states[::stride] + [samples]


def states_of_xar(model, args, rows, y, null):
    """Return at most FRAMES states [b,C,h,w], each with more entities than the one before."""
    tokens = model.sample_tokens(y, args.steps, args.cfg, run.indexed_randn(args.seed, rows))
    return list(evaluate.growth(model, tokens, FRAMES).unbind(1))


# flags that not every model has
FLOW = ("SiT", "MM-DiT")
FLAGS_OF = {"interval": FLOW, "sampler": FLOW, "path": FLOW, "objective": ("SiT", "DiT"),
            "guided_channels": ("DiT",), "label": ("SiT", "DiT", "xAR"), "captions": ("MM-DiT",),
            "text": ("MM-DiT",), "merges": ("MM-DiT",)}


def fill_in(args, model):
    """Set what --steps and the flags of FLAGS_OF mean for this model. Raises ValueError."""
    kind = kind_of(model)
    article = "a" if kind in ("SiT", "DiT") else "an"
    for name, kinds in FLAGS_OF.items():
        run.require(args, getattr(args, name) is None or kind in kinds, name,
                    f"is for {' and '.join(kinds)}, and {args.ckpt} holds {article} {kind}: leave "
                    f"it out")
    if args.words and kind != "MM-DiT":
        raise ValueError(f"{args.words[0]!r} is a caption, and {args.ckpt} holds {article} {kind}, "
                         f"which takes none: leave it out")
    args.steps = args.steps or (XAR_STEPS if kind == "xAR" else SIT_STEPS)
    if kind in FLOW:
        args.interval = args.interval or [0.0, 1.0]
        args.sampler = args.sampler or "sde"
        args.path = args.path or model.path
    if kind in ("SiT", "DiT"):
        args.objective = model.objective
    if kind != "DiT":
        return
    run.require(args, args.steps <= dit.NUM_STEPS, "steps",
                f"must be at most {dit.NUM_STEPS}, the steps that a DiT was trained with")
    run.require(args, args.guided_channels is None or args.cfg != 1, "guided_channels",
                "is for guidance: give --cfg, too")
    C = model.in_channels
    args.guided_channels = args.guided_channels or C
    run.require(args, args.guided_channels <= C, "guided_channels",
                f"must be at most {C}, the channels of {args.ckpt}")


# ---- what the samples are made for: classes, or captions

@dataclass
class Wanted:
    """Labels of the samples: class ids, or numbers of captions."""

    count: int          # of classes or captions
    read: Callable      # labels [b] -> what `condition` takes
    condition: object   # a models.Condition
    texts: list = None  # the captions


def wanted_of(args, model, processes):
    """Return what the flags ask for. Raises ValueError if it does not fit the model."""
    if not isinstance(model, mmdit.MMDiT):
        if args.label is not None and args.label >= model.num_classes:
            raise ValueError(f"--label {args.label} must lie in 0 ... {model.num_classes - 1}, the "
                             f"model's classes")
        condition = models.condition_of_classes(model.num_classes, processes)
        return Wanted(model.num_classes, torch.as_tensor, condition)

    about = model.text or {"encoder": "clip"}                               # the official files do not say
    if args.captions and Path(args.captions).is_dir():
        run.require(args, not args.merges, "merges", "is not needed: the captions are packed")
        texts, read, null, about = captions_of_folder(args, about)
    else:
        texts = captions_of_words(args, about)
        tokenizer = processes.main_first(lambda: text.open_tokenizer(about, args.merges))
        ids = tokenizer(texts)
        if tokenizer.cut:
            processes.print(f"note: {tokenizer.cut} captions were longer than {tokenizer.length} "
                            f"tokens and are cut")
        read = ids.__getitem__
        null = tokenizer([""])[0]
    condition = models.condition_of_captions(null, about, args.text, processes)
    width = condition.null.shape[-1]
    if width != model.context_dim:
        raise ValueError(f"{args.ckpt} reads features of width {model.context_dim}, and these "
                         f"captions have {width}: name its own text encoder with --text")
    return Wanted(len(texts), read, condition, texts)


def captions_of_words(args, about):
    """Return the captions of the command line, of a file, or of a few scenes."""
    if args.words:
        return args.words
    if args.captions:
        try:
            lines = Path(args.captions).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise ValueError(f"--captions {args.captions} is neither a folder of prepare.py nor a "
                             f"text file ({type(e).__name__})") from None
        lines = [line.strip() for line in lines if line.strip()]
        run.require(args, lines, "captions", "holds no captions: write one a line")
        return lines
    if about["encoder"] == "words":
        return scenes.EXAMPLES
    raise ValueError(f"{args.ckpt} draws what a text says: give captions after the flags, or "
                     f"--captions FILE")


def captions_of_folder(args, about):
    """Return a caption of each image in --captions, how to read them, "", and their encoder."""
    run.require(args, Path(args.captions, "data.json").is_file(), "captions",
                "is not a folder of prepare.py")
    images = data.open_data(args.captions)
    run.require(args, images.text is not None, "captions", "has class labels: prepare it with "
                                                           "--captions")
    same = about["encoder"] == images.text["encoder"]
    if about.get("fingerprint"):
        same = same and about["fingerprint"] == images.text["fingerprint"]
    run.require(args, same, "captions", f"was prepared with another text encoder than that of "
                                        f"{args.ckpt}: prepare it with the same --text")
    # which of an image's captions depends on the seed and the image
    u = [np.random.default_rng([args.seed, i, 2]).random() for i in range(len(images.train))]
    u = np.array(u)
    texts = images.train.strings(np.arange(len(u)), u)
    return texts, lambda rows: images.train.captions(rows, u[rows]), images.train.null, images.text


def labels_of(args, rows, count):
    """Return the labels [b] of the samples `rows` [b]: class ids, or numbers of captions."""
    if args.label is not None:
        return torch.full_like(rows, args.label)
    if args.labels == "balanced":
        return rows % count
    labels = [np.random.default_rng([args.seed, int(i), 1]).integers(count) for i in rows]
    return torch.tensor(labels)


# ---- the program

def sample(args, processes):
    device = processes.device
    path = processes.main_first(lambda: run.checkpoint_file(args.ckpt, "ckpt"))
    objective = args.objective
    if objective is None and args.ckpt in run.DITS:
        objective = "ddpm"
    model = models.load(path, args.num_heads, objective).to(device)
    fill_in(args, model)
    if isinstance(model, xar.XAR):
        channels = model.channels
        draw_latents = draw_xar
        draw_states = states_of_xar
    else:
        channels = model.in_channels
        draw_latents = draw_sit
        draw_states = states_of_sit
    wanted = wanted_of(args, model, processes)
    decode = processes.main_first(
        lambda: vae.load_decoder(model.packed_from, args.vae, channels, device))
    autocast = run.autocast(args.precision, device)
    out = Path(args.out)
    run.make_folder(out.parent, args.out)
    args.samples = args.samples or usual_number(args, wanted)
    labels = labels_of(args, torch.arange(args.samples), wanted.count)

    def to_bytes(latents):                                                  # [b,C,h,w] -> uint8 [b,C,H,W]
        return to_uint8(decode(latents), args.to_uint8)

    def draw(rows, draw_latents=draw_latents):                              # indices [b] -> latents
        y = wanted.condition(wanted.read(labels[rows % len(labels)]).to(device))
        with autocast:
            return draw_latents(model, args, rows, y, wanted.condition.null)

    def draw_images(rows):                                                  # indices [b] -> uint8 [b,C,H,W]
        return to_bytes(draw(rows))

    order, grid = layout(args, wanted, labels)
    if out.suffix.lower() == ".png":
        images = evaluate.draw_samples(args.samples, draw_images, processes, args.batch_size)
        if processes.main:
            evaluate.save_grid(images[order], out, **grid)
    elif out.suffix.lower() == ".gif":
        if processes.main:
            states = draw(torch.arange(args.samples), draw_states)
            save_gif([to_bytes(state)[order].cpu() for state in states], out, **grid)
    else:
        settings = settings_of(args, model, wanted, processes)
        columns = min(10, wanted.count) if wanted.texts else grid["columns"]
        write_npz(out, labels.numpy(), draw_images, settings, columns, args, processes)
        return
    processes.print(f"{out}: {args.samples} samples")


def to_uint8(x, how):
    """Return samples in [-1, 1] as uint8. Raises ValueError if they are not finite."""
    if not x.isfinite().all():                                              # black images would hide it
        raise ValueError("samples are not finite: the checkpoint's weights are not, or --precision "
                         "fp32 is needed")
    return data.to_uint8(x, how)


def usual_number(args, wanted):
    """Return how many samples a picture has, if --samples does not say."""
    if wanted.texts is not None:
        return min(100, max(1, 40 // wanted.count) * wanted.count)
    return 50 if args.out.lower().endswith(".gif") else 100


def layout(args, wanted, labels):
    """Return the order of the samples in a picture, and how evaluate.image_grid arranges them.

    Classes stand in columns. A caption has a row of its own if there are enough samples, and stands
    below it.
    """
    order = torch.arange(args.samples)
    if wanted.texts is None:
        columns = 10
        if args.label is None and args.labels == "balanced":
            columns = min(columns, wanted.count)
        return order, dict(columns=columns)

    each = args.samples // wanted.count
    if each < 2 or args.samples % wanted.count or args.labels == "random":
        captions = [wanted.texts[label] for label in labels]
        return order, dict(columns=evaluate.CAPTION_COLUMNS, captions=captions,
                           side=evaluate.CAPTION_SIDE)
    captions = []
    for caption in wanted.texts:
        captions += [caption, *[""] * (each - 1)]
    return order.view(each, -1).T.flatten(), dict(columns=each, captions=captions)


def save_gif(frames, path, columns, captions=None, side=GIF_SIDE):
    """Write frames, each uint8 [B,C,H,W], as an animation of one grid; see evaluate.image_grid."""
    # few colours and small tiles make a small file; a GIF has at most 256 colours
    colours = 16 if frames[0].shape[1] == 1 else 256
    grids = [evaluate.image_grid(frame, columns, side, captions) for frame in frames]
    images = [grid.quantize(colours) for grid in grids]
    durations = [FRAME_MS] * (len(images) - 1) + [LAST_FRAME_MS]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)


# ---- tens of thousands of samples: drawn in parts, so that a crash costs one part of each process

def settings_of(args, model, wanted, processes):
    """Return a line of JSON that says what the samples are; only the first process needs it."""
    if not processes.main:
        return None
    free = {"ckpt", "samples", "batch_size", "device", "out", "words", "captions", "text", "merges"}
    if kind_of(model) != "DiT":                                             # older files of others know nothing of them
        free |= {"objective", "guided_channels"}
    settings = {name: value for name, value in vars(args).items() if name not in free}
    settings["precision"] = run.precision(args.precision, processes.device)
    settings["weights"] = run.weights_hash(model)
    if wanted.texts is not None:
        settings["captions"] = hashlib.sha256(json.dumps(wanted.texts).encode()).hexdigest()[:16]
    return json.dumps(settings, sort_keys=True)


def write_npz(path, labels, draw, settings, columns, args, processes):
    """Write an .npz of samples with these labels [N], and a grid of the first hundred beside it.

    It has ADM's layout, arr_0 images uint8 [N,H,W,3], arr_1 labels [N], and a line `settings`. The
    parts in PATH.parts are written whole, so the same command resumes, also with another batch or
    number of processes.
    """
    parts = path.with_name(path.name + ".parts")
    count = len(labels)
    plan = processes.from_main(lambda: plan_parts(path, parts, count, args.batch_size, settings))
    if plan is None:
        processes.print(f"{path} holds these {count} samples already: delete it to draw them again")
        return

    missing = [span for span in plan if not is_whole(part_file(parts, span))]
    processes.barrier()                                                     # all have looked before one writes
    progress = run.Progress(sum(end - begin for begin, end in missing), processes)
    for begin, end in missing[processes.rank::processes.world]:
        rows = torch.arange(begin, end)
        images = torch.cat([draw(part) for part in rows.split(args.batch_size)])
        images = data.to_rgb(images).permute(0, 2, 3, 1).cpu().numpy()
        with run.atomic(part_file(parts, (begin, end))) as f:
            np.lib.format.write_array(f, images, allow_pickle=False)
        progress.add(end - begin)
    processes.barrier()
    if processes.main:
        join(path, [part_file(parts, span) for span in plan], labels, settings)
        shutil.rmtree(parts)
        first = fid.ImageArchive(path)[:100]
        evaluate.save_grid(first, path.with_name(f"{path.stem}_grid.png"), columns)
    processes.print(f"{path}: {count} samples; {progress}")


def part_file(parts, span):
    return parts / f"{span[0]:08d}_{span[1]:08d}.npy"


def is_whole(file):
    try:
        np.load(file, mmap_mode="r")
        return True
    except Exception:                                                       # not there, or damaged: draw it again
        return False


def plan_parts(path, parts, count, batch, settings):
    """Return the spans [(begin, end), ...] of all parts; None if PATH holds the samples already.

    The parts keep the size they were begun with. Raises ValueError if they are of other samples.
    """
    if holds(path, count, settings):
        shutil.rmtree(parts, ignore_errors=True)                            # left by a kill while it was deleted
        return None
    about = parts / "settings.json"
    if parts.exists() and not about.exists():                               # the same
        shutil.rmtree(parts)
    begun = {"part": batch, "settings": json.loads(settings)}
    if about.exists():
        now = begun["settings"]
        begun = json.loads(about.read_text())
        if begun.keys() != {"part", "settings"}:
            raise ValueError(f"{parts} was begun by an older version of this program: delete it")
        was = begun["settings"]
        changed = [f"{name} {now[name]} (was {was.get(name)})"
                   for name in now if now[name] != was.get(name)]
        if changed:
            raise ValueError(f"{parts} holds a part of other samples: {', '.join(changed)}. Give "
                             f"the same flags to resume, or delete that folder")
    else:
        parts.mkdir(exist_ok=True)
        with run.atomic(about) as f:
            f.write(json.dumps(begun).encode())
    size = begun["part"]
    return [(begin, min(begin + size, count)) for begin in range(0, count, size)]


def holds(path, count, settings):
    """Return True if PATH is an .npz of so many samples with these settings."""
    if not path.exists():
        return False
    try:
        with np.load(path) as f:
            return str(f["settings"]) == settings and len(f["arr_1"]) == count
    except Exception:                                                       # something else: it will be replaced
        return False


def join(path, files, labels, settings):
    """Write the parts, one after another, as an .npz: never more than one of them is in memory."""
    one = np.load(files[0], mmap_mode="r")
    header = dict(descr="|u1", fortran_order=False, shape=(len(labels), *one.shape[1:]))
    with run.atomic(path) as f, zipfile.ZipFile(f, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for file in files:
                member.write(np.load(file).tobytes())
        for name, array in (("arr_1", labels), ("settings", np.array(settings))):
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def main(argv=None):
    args = parse_args(argv)
    with run.one_line_errors(PROGRAM):
        processes = ddp.Processes(args.device, hours=48)                    # one may finish long before another
    memory = run.one_line_out_of_memory(PROGRAM, "give a smaller --batch-size, which changes "
                                                 "nothing else")
    try:
        with run.one_line_errors(PROGRAM), memory:
            sample(args, processes)
    finally:
        processes.close()


if __name__ == "__main__":
    main()
