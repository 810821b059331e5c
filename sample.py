"""Draw samples from any checkpoint of SiT, DiT or xAR: a picture, an animation, or thousands.

    python sample.py --ckpt out/ckpt.pt --cfg 1.5               a grid of 100 samples: out/grid.png
    python sample.py --ckpt out/ckpt.pt --out out/noise.gif     the same grid on its way from noise
    python sample.py --ckpt dit-xl-256 --cfg 1.5 --guided-channels 3        a published DiT
    torchrun --nproc_per_node=8 sample.py --ckpt xar-b --samples 50000 --cfg 2.7 --out xar-b.npz

The names of the checkpoint's tensors say which model it holds. Sample i depends on (--seed, i)
alone, not on the batch, the number of processes, or the order. An .npz has ADM's layout, which
fid.py and the papers' evaluators read; if its command is interrupted, the same command resumes.
"""
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch

import data
import ddp
import dit
import evaluate
import fid
import run
import sit
import vae
import xar

PROGRAM = "sample.py"
SIT_STEPS = 250                                                             # and DiT's
XAR_STEPS = 40
FRAMES = 20                                                                 # of an animation
FRAME_MS = 100                                                              # each is shown so long, the last one longer
LAST_FRAME_MS = 2000


def parse_args(argv):
    parser = run.Parser(PROGRAM, description="Sample images from a checkpoint.")
    add = parser.add_argument
    add("--ckpt", default="out/ckpt.pt",
        help=f"checkpoint: a file, or a published one by name ({', '.join(run.CHECKPOINTS)})")
    add("--out", help="a picture (.png), an animation from noise (.gif), or all images for fid.py "
                      "(.npz); if not given, grid.png beside the checkpoint")
    add("--samples", type=int, help="number of images; if not given, 100, in an animation 50")
    add("--cfg", type=float, default=1.0,
        help="classifier-free guidance (xAR: of the last entity); 1 is none")
    add("--interval", type=float, nargs=2, help="times with guidance, low high; SiT only")
    add("--sampler", choices=("sde", "ode", "heun"),
        help="Euler-Maruyama, Euler or Heun; SiT only, sde if not given")
    add("--steps", type=int,
        help=f"sampling steps; if not given, {SIT_STEPS} (xAR: {XAR_STEPS} an entity)")
    add("--path", choices=("linear", "cosine"),
        help="path, if the checkpoint does not say; SiT only")
    add("--objective", choices=("flow", "ddpm"),
        help="flow: SiT, ddpm: DiT; if not given, what the checkpoint says, else flow")
    add("--guided-channels", type=int,
        help="--cfg acts on the first ones of the noise; DiT only, all if not given; 3 made its "
             "published figures")
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
    if args.samples is None:
        args.samples = 50 if args.out.lower().endswith(".gif") else 100


# ---- models: each has a function that draws latents, and one that also shows the way there

def load_model(path, num_heads, objective=None):
    """Load the model of a checkpoint, in eval mode; the names of its tensors say which one.

    `objective` is for a SiT or DiT whose file does not say which of them it is.
    """
    content = sit.read_checkpoint(path)
    content = content if isinstance(content, dict) else {}
    weights = content.get("model_ema", content.get("ema", content))
    if "z_proj.weight" in weights:
        return xar.load_xar(path, num_heads)
    if "x_embedder.proj.weight" in weights:
        return sit.load_sit(path, num_heads, objective)
    raise ValueError(f"{path}: holds neither a SiT nor an xAR")


def kind_of(model):
    if isinstance(model, xar.XAR):
        return "xAR"
    return "DiT" if model.objective == "ddpm" else "SiT"


def draw_sit(model, args, rows, labels, watch=None):
    """Return latents [b,C,h,w] of a SiT or DiT.

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

    labels = labels.to(device)
    settings = dict(num_steps=args.steps, cfg_scale=args.cfg, null_label=model.num_classes)
    if kind_of(model) == "DiT":
        return dit.sample_ddpm(network, noise, labels, guided_channels=args.guided_channels,
                               randn=randn, **settings)
    settings.update(cfg_interval=args.interval, contrast=model.contrast)
    if args.sampler == "sde":
        return sit.sample_sde(network, noise, labels, path=args.path, randn=randn, **settings)
    return sit.sample_ode(network, noise, labels, heun=args.sampler == "heun", **settings)


def draw_xar(model, args, rows, labels):
    """Return latents [b,C,h,w]."""
    return model.sample(labels, args.steps, args.cfg, run.indexed_randn(args.seed, rows))


def states_of_sit(model, args, rows, labels):
    """Return at most FRAMES states [b,C,h,w] from noise to samples, which are the last."""
    states = []
    samples = draw_sit(model, args, rows, labels, watch=states.append)
    stride = -(-len(states) // (FRAMES - 1))                                # rounded up
    return states[::stride] + [samples]


def states_of_xar(model, args, rows, labels):
    """Return at most FRAMES states [b,C,h,w], each with more entities than the one before."""
    tokens = model.sample_tokens(labels, args.steps, args.cfg, run.indexed_randn(args.seed, rows))
    return list(evaluate.growth(model, tokens, FRAMES).unbind(1))


# flags that not every model has
FLAGS_OF = {"interval": "SiT", "sampler": "SiT", "path": "SiT", "objective": "SiT and DiT",
            "guided_channels": "DiT"}


def fill_in(args, model):
    """Set what --steps and the flags of FLAGS_OF mean for this model. Raises ValueError."""
    kind = kind_of(model)
    article = "an" if kind == "xAR" else "a"
    for name, kinds in FLAGS_OF.items():
        run.require(args, getattr(args, name) is None or kind in kinds, name,
                    f"is for {kinds}, and {args.ckpt} holds {article} {kind}: leave it out")
    if kind == "xAR":
        args.steps = args.steps or XAR_STEPS
        return
    args.steps = args.steps or SIT_STEPS
    args.objective = model.objective
    if kind == "SiT":
        args.interval = args.interval or [0.0, 1.0]
        args.sampler = args.sampler or "sde"
        args.path = args.path or model.path
        return
    run.require(args, args.steps <= dit.NUM_STEPS, "steps",
                f"must be at most {dit.NUM_STEPS}, the steps that a DiT was trained with")
    run.require(args, args.guided_channels is None or args.cfg != 1, "guided_channels",
                "is for guidance: give --cfg, too")
    C = model.in_channels
    args.guided_channels = args.guided_channels or C
    run.require(args, args.guided_channels <= C, "guided_channels",
                f"must be at most {C}, the channels of {args.ckpt}")


def labels_of(args, rows, num_classes):
    """Return the class ids [b] of the samples `rows` [b]."""
    if args.label is not None:
        return torch.full_like(rows, args.label)
    if args.labels == "balanced":
        return rows % num_classes
    labels = [np.random.default_rng([args.seed, int(i), 1]).integers(num_classes) for i in rows]
    return torch.tensor(labels)


# ---- the program

def sample(args, processes):
    device = processes.device
    path = processes.main_first(lambda: run.checkpoint_file(args.ckpt, "ckpt"))
    objective = args.objective
    if objective is None and args.ckpt in run.DITS:
        objective = "ddpm"
    model = load_model(path, args.num_heads, objective).to(device)
    fill_in(args, model)
    if isinstance(model, sit.SiT):
        channels = model.in_channels
        draw_latents = draw_sit
        draw_states = states_of_sit
    else:
        channels = model.channels
        draw_latents = draw_xar
        draw_states = states_of_xar
    if args.label is not None and args.label >= model.num_classes:
        raise ValueError(f"--label {args.label} must lie in 0 ... {model.num_classes - 1}, the "
                         f"model's classes")
    decode = processes.main_first(
        lambda: vae.load_decoder(model.packed_from, args.vae, channels, device))
    autocast = run.autocast(args.precision, device)
    out = Path(args.out)
    run.make_folder(out.parent, args.out)
    columns = min(10, model.num_classes)
    if args.label is not None or args.labels == "random":
        columns = 10

    def to_bytes(latents):                                                  # [b,C,h,w] -> uint8 [b,C,H,W]
        return to_uint8(decode(latents), args.to_uint8)

    def draw(rows):                                                         # indices [b] -> uint8 [b,C,H,W]
        labels = labels_of(args, rows, model.num_classes)
        with autocast:
            latents = draw_latents(model, args, rows, labels)
        return to_bytes(latents)

    if out.suffix.lower() == ".png":
        images = evaluate.draw_samples(args.samples, draw, processes, args.batch_size)
        if processes.main:
            data.save_grid(images, out, columns)
    elif out.suffix.lower() == ".gif":
        if processes.main:
            rows = torch.arange(args.samples)
            labels = labels_of(args, rows, model.num_classes)
            with autocast:
                states = draw_states(model, args, rows, labels)
            save_gif([to_bytes(state).cpu() for state in states], out, columns)
    else:
        labels = labels_of(args, torch.arange(args.samples), model.num_classes)
        write_npz(out, labels.numpy(), draw, settings_of(args, model, processes), columns, args,
                  processes)
        return
    processes.print(f"{out}: {args.samples} samples")


def to_uint8(x, how):
    """Return samples in [-1, 1] as uint8. Raises ValueError if they are not finite."""
    if not x.isfinite().all():                                              # black images would hide it
        raise ValueError("samples are not finite: the checkpoint's weights are not, or --precision "
                         "fp32 is needed")
    return data.to_uint8(x, how)


def save_gif(frames, path, columns):
    """Write frames, each uint8 [B,C,H,W], as an animation of one grid."""
    # few colours and small tiles make a small file; a GIF has at most 256 colours
    colours = 16 if frames[0].shape[1] == 1 else 256
    images = [data.image_grid(frame, columns, side=32).quantize(colours) for frame in frames]
    durations = [FRAME_MS] * (len(images) - 1) + [LAST_FRAME_MS]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)


# ---- tens of thousands of samples: drawn in parts, so that a crash costs one part of each process

def settings_of(args, model, processes):
    """Return a line of JSON that says what the samples are; only the first process needs it."""
    if not processes.main:
        return None
    free = {"ckpt", "samples", "batch_size", "device", "out"}
    if kind_of(model) != "DiT":                                             # older files of others know nothing of them
        free |= {"objective", "guided_channels"}
    settings = {name: value for name, value in vars(args).items() if name not in free}
    settings["precision"] = run.precision(args.precision, processes.device)
    settings["weights"] = run.weights_hash(model)
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
        data.save_grid(first, path.with_name(f"{path.stem}_grid.png"), columns)
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
