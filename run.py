"""What a run needs besides its model: flags, random numbers, safe checkpoints, and a log.

    cfg = run.parse(Config, argv, "train.py", "Train it.", PRESETS)     # a flag for every field
    g = run.seeded("cpu", cfg.seed, step)               # the same numbers in every run
    run.save_checkpoint("out/ckpt.pt", {...})           # the old file or the new one, never half
    log = run.Log(cfg, start, processes)                # out/log.jsonl, one object a line

What several processes need is in ddp.py.
"""
import argparse
import dataclasses
import difflib
import hashlib
import inspect
import json
import os
import re
import sys
import time
import typing
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

# Published checkpoints by name: --ckpt and --init accept these, and fetch them once.
CHECKPOINTS = {
    "repa-xl": "https://www.dl.dropboxusercontent.com/scl/fi/cxedbs4da5ugjq5wg3zrg/last.pt"
               "?rlkey=8otgrdkno0nd89po3dpwngwcc&st=apcc645o&dl=0",
    "dit-xl-256": "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt",
    "dit-xl-512": "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-512x512.pt",
    "xar-b": "https://huggingface.co/OliverRen/xAR/resolve/main/xAR-B.pth",
    "xar-l": "https://huggingface.co/OliverRen/xAR/resolve/main/xAR-L.pth",
    "xar-h": "https://huggingface.co/OliverRen/xAR/resolve/main/xAR-H.pth",
}
# Those that predict noise, although their files do not say so: --objective ddpm.
DITS = ("dit-xl-256", "dit-xl-512")


# ---- flags from a dataclass

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and say what to do."""

    def __init__(self, prog, **kwargs):
        super().__init__(prog, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            message = f"{unknown[1]} is not a flag"
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
            if near:
                message += f"; did you mean {near[0]}?"
        raise SystemExit(f"{self.prog}: {message} (--help lists every flag)")


def parse(config, argv=None, prog=None, description=None, presets=None):
    """Return an instance of the dataclass `config` from the command line.

    There is a flag for every field, with the field's comment as its help. A preset is a dict of
    fields; flags that are given win over it. Raises SystemExit with one line.
    """
    comments = dict(re.findall(r"^    (\w+): .*?#\s*(.*)$", inspect.getsource(config), re.M))
    parser = Parser(prog, description=description)
    if presets:
        parser.add_argument("--preset", choices=list(presets), default=next(iter(presets)),
                            help="settings of a known run")
    for f in dataclasses.fields(config):
        options = dict(dest=f.name, default=f.default, help=comments[f.name])
        if typing.get_origin(f.type) is typing.Literal:
            options["choices"] = typing.get_args(f.type)
        elif bool in (f.type, *typing.get_args(f.type)):
            options["action"] = argparse.BooleanOptionalAction
        else:                                                               # of Optional[int], its first argument
            options["type"] = next(iter(typing.get_args(f.type)), f.type)
        parser.add_argument(flag(f.name), **options)

    if presets:                                                             # a preset replaces the defaults
        words = sys.argv[1:] if argv is None else argv
        chosen, _ = parser.parse_known_args([w for w in words if w not in ("-h", "--help")])
        parser.set_defaults(**presets[chosen.preset])
    values = vars(parser.parse_args(argv))
    values.pop("preset", None)
    return config(**values)


@contextmanager
def one_line_errors(program, errors=(ValueError, OSError)):
    """End the program with one line instead of a traceback if bad input raises one of `errors`."""
    try:
        yield
    except errors as e:
        raise SystemExit(f"{program}: {e}") from None


def flag(name):
    return "--" + name.replace("_", "-")


def require(cfg, ok, name, remedy):
    """Raise ValueError, a line with the flag and the remedy, if the value of a field is not ok."""
    if not ok:
        raise ValueError(f"{flag(name)} {getattr(cfg, name)} {remedy}")


def refuse_changed(cfg, names, remedy):
    """Raise ValueError if one of these flags does not have its default."""
    for name in names:
        require(cfg, getattr(cfg, name) == getattr(type(cfg), name), name, remedy)


def check(cfg, world, at_least_1=(), at_least_0=()):
    """Refuse impossible values of the flags that all training programs share.

    `at_least_1` and `at_least_0` name more fields with these lower bounds. Raises ValueError.
    """
    for name in ("steps", "batch_size", "accumulate", "log_every", "eval_steps", *at_least_1):
        require(cfg, getattr(cfg, name) >= 1, name, "must be 1 or more")
    for name in ("warmup", "save_every", "eval_every", "seed", "weight_decay", *at_least_0):
        require(cfg, 0 <= getattr(cfg, name) < 2 ** 63, name, "must be 0 or more, and finite")
    for name in ("lr", "clip"):
        require(cfg, 0 < getattr(cfg, name) < float("inf"), name, "must be a positive number")
    for name in ("ema", "beta2"):
        require(cfg, 0 <= getattr(cfg, name) < 1, name, "must lie in [0, 1)")
    for name in ("depth", "hidden_size", "num_heads", "image_size"):
        value = getattr(cfg, name)
        require(cfg, value is None or value >= 1, name, "must be 1 or more")
    require(cfg, cfg.eval_samples >= 2, "eval_samples", "must be 2 or more, for a covariance")
    check_precision(cfg)
    require(cfg, 0 <= cfg.label_drop <= 1, "label_drop", "must lie in [0, 1]")
    parts = world * cfg.accumulate
    require(cfg, cfg.batch_size % parts == 0, "batch_size",
            f"must be a multiple of {parts} (processes x --accumulate)")


def check_precision(cfg):
    """Refuse bfloat16 where it has never been tried. Raises ValueError."""
    require(cfg, cfg.device != "mps" or cfg.precision != "bf16", "precision",
            "is not for --device mps: leave it out")


def make_folder(folder, out):
    """Create `folder`. Raises ValueError that names --out, whose value is `out`, if that fails."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(f"--out {out} cannot be made ({e.strerror}): choose another "
                         f"place") from None


# ---- memory of a GPU

@contextmanager
def one_line_out_of_memory(program, remedy):
    """End the program with one line instead of a traceback if a GPU's memory does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise SystemExit(f"{program}: the memory of the GPU does not suffice: {remedy}") from None


def memory_remedy(cfg, world):
    """Return what a training program says then: the next --accumulate that divides the batch."""
    per_process = cfg.batch_size // world
    for more in range(cfg.accumulate + 1, per_process + 1):
        if per_process % more == 0:
            return (f"give --accumulate {more} (was {cfg.accumulate}), which cuts the batch into "
                    f"smaller parts and keeps its result, up to rounding; the same command resumes")
    return "a part of the batch is one image already: use more processes, or a smaller --model"


# ---- random numbers and precision

def seeded(device, *words):
    """Return a torch.Generator whose numbers depend on non-negative integers, e.g. (seed, step)."""
    seed = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed))


def indexed_randn(seed, indices):
    """Return randn(like) whose numbers for sample i depend on (seed, indices[i]) alone.

    So an image does not depend on the batch, the process or the order in which it is drawn. These
    are numpy's generators because torch's CPU generator keeps 32 bits of a seed: among 50,000
    samples two would probably share theirs.
    """
    rngs = [np.random.default_rng([seed, int(i)]) for i in indices]

    def randn(like):                                                        # [B,...]
        noise = [rng.standard_normal(like.shape[1:], dtype=np.float32) for rng in rngs]
        noise = torch.from_numpy(np.stack(noise))
        if like.is_cuda:                                                    # a copy from pinned memory need not wait
            return noise.pin_memory().to(like.device, non_blocking=True).to(like.dtype)
        return noise.to(like.device, like.dtype)
    return randn


def precision(wanted, device):
    """Return what --precision means on a device, fp32 or bf16; auto is bf16 on CUDA."""
    if wanted != "auto":
        return wanted
    return "bf16" if device.type == "cuda" else "fp32"


def compiling(cfg, device):
    """Return whether --compile applies; None, of the presets for GPUs, means: on CUDA."""
    if cfg.compile is None:
        return device.type == "cuda"
    return cfg.compile


def compile_blocks(blocks):
    """torch.compile each of a model's blocks: one graph serves all that are alike."""
    torch._dynamo.config.optimize_ddp = False                               # DDP overlaps block by block as it is
    for block in blocks:
        block.compile()                                                     # in place: names stay as they are


def autocast(wanted, device):
    enabled = precision(wanted, device) == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


# ---- files that are old or new, never half

@contextmanager
def atomic(path):
    """Open a binary file that replaces `path` once it is whole: a crash leaves the old or the new.

    Raises OSError that names the file, for instance if the disk is full; the old file stays.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException as e:
        partial.unlink(missing_ok=True)
        cause = e if isinstance(e, OSError) else e.__context__              # torch.save wraps the disk's error
        if isinstance(e, Exception) and isinstance(cause, OSError):
            raise OSError(f"{path} could not be written ({cause.strerror or cause}): an earlier "
                          f"file, if any, is kept; make room, and the same command "
                          f"resumes") from None
        raise


def save_checkpoint(path, content):
    with atomic(path) as f:
        torch.save(content, f)


def code_hash(*modules):
    """Return a fingerprint of the source of modules: a checkpoint remembers its code."""
    source = "".join(inspect.getsource(m) for m in modules)
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def weights_hash(model):
    """Return a fingerprint of a model's weights."""
    h = hashlib.sha256()
    for name, w in sorted(model.state_dict().items()):
        h.update(name.encode() + w.detach().float().cpu().numpy().tobytes())
    return h.hexdigest()[:16]


# ---- where a run starts

# flags in which processes may differ: places of a machine's own
MAY_DIFFER = ("out", "resume", "cache", "data_root")
# what every checkpoint holds
CONTENT = {"model", "ema", "opt", "args", "arch", "steps", "seconds", "code"}


def checkpoint_file(source, name):
    """Return the path that --ckpt or --init (`name`) means: a file, or a key of CHECKPOINTS.

    The latter is fetched once into torch's cache. Raises OSError, one line, if that fails.
    """
    if source not in CHECKPOINTS:
        if not Path(source).is_file():
            raise FileNotFoundError(f"{flag(name)} {source} does not exist or is not a file: give "
                                    f"a checkpoint, or one of {', '.join(CHECKPOINTS)}")
        return Path(source)
    path = Path(torch.hub.get_dir(), "checkpoints", f"{source}.pt")
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(CHECKPOINTS[source], str(path))
        except Exception as e:
            reason = " ".join(str(e).split())
            raise OSError(f"{flag(name)} {source} could not be fetched ({reason}): download "
                          f"{CHECKPOINTS[source]} and give {flag(name)} FILE") from None
    return path


def resume_point(cfg, may_change, modules, processes):
    """Return the checkpoint to resume from and its path, or None twice to start from scratch.

    --resume is `auto` (OUT/ckpt.pt if it exists), `never`, or a path. Prints a note if that run has
    already finished, or if the code of `modules` has changed since. Raises ValueError if flags
    other than those of `may_change` differ from the saved run's, or if the processes differ in
    their flags or in what they have found.
    """
    remedy = ("start over with another --out, or with --resume never (which replaces what --out "
              "holds)")

    def find():
        path = _where_to_resume(cfg, remedy, processes)
        saved = path and _read_own(path, remedy, processes.device)
        return saved, path

    def describe(found):
        saved, _ = found
        words = [f"{flag(name)} {value}" for name, value in dataclasses.asdict(cfg).items()
                 if name not in MAY_DIFFER]
        if saved is None:
            return [*words, "no checkpoint"]
        words.append(f"a checkpoint of step {saved['steps']}, after {saved['seconds']:.6f} s")
        return words + [f"a checkpoint with {flag(k)} {v}" for k, v in saved["args"].items()]

    saved, path = processes.alike(find, describe, f"start all with the same flags, and let --out "
                                                  f"{cfg.out} lie on a disk that all machines see")
    if saved is None:
        return None, None

    # a flag that is newer than the checkpoint had its default
    was = {**{f.name: f.default for f in dataclasses.fields(cfg)}, **saved["args"]}
    changed = [f"{flag(name)} {value} (was {was[name]})"
               for name, value in dataclasses.asdict(cfg).items()
               if name not in may_change and value != was[name]]
    if changed:
        raise ValueError(f"{path} was trained with other flags: {', '.join(changed)}. Give the "
                         f"same ones to resume, or {remedy}")
    if saved["steps"] >= cfg.steps:
        processes.print(f"{path} holds a finished run of {saved['steps']} steps: train on with a "
                        f"larger --steps, or {remedy}")
    else:
        processes.print(f"resuming from step {saved['steps']} of {path}")
        if saved["code"] != code_hash(*modules):
            processes.print("note: the code of model or training has changed since that checkpoint "
                            "was written")
    return saved, path


def _where_to_resume(cfg, remedy, processes):
    """Return the path of the checkpoint that --resume means, or None."""
    own = Path(cfg.out, "ckpt.pt")
    if cfg.resume == "auto":
        return own if own.exists() else None
    # A worker has died: resume what this run has saved, but not an older run's checkpoint.
    if processes.restarted and own.exists():
        if _read_own(own, remedy, processes.device)["args"]["resume"] == cfg.resume:
            return own
    if cfg.resume == "never":
        return None
    path = Path(cfg.resume)
    return path / "ckpt.pt" if path.is_dir() else path


def _read_own(path, remedy, device):
    """Return the content of a training program's checkpoint. Raises ValueError, one line."""
    try:
        # On a GPU the contents are copied there and need not fill every process's memory at once.
        mmap = device.type == "cuda"
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise ValueError(f"--resume {path} does not exist: give auto, never, or the path of a "
                         f"checkpoint") from None
    except Exception as e:
        raise ValueError(f"{path} cannot be read ({type(e).__name__}: cut short, or not a "
                         f"checkpoint): {remedy}") from None
    if not isinstance(saved, dict) or not CONTENT <= saved.keys():
        raise ValueError(f"{path} is not a checkpoint of this program: {remedy}")
    return saved


def refuse_nonfinite(first_bad, last_good):
    """End the run if a step was not finite; here the host waits for the device.

    first_bad: tensor, the first such step or -1. last_good: path of the last checkpoint, or None.
    """
    if first_bad.item() < 0:
        return
    last = "no checkpoint was written before"
    start = ""
    if last_good:
        last = f"the last good checkpoint is {last_good}"
        start = f", in a new run from it: --init {last_good} --out NEW"
    raise SystemExit(f"loss or gradient was not finite in step {first_bad.item() + 1}; {last}. "
                     f"Try a lower --lr, or --precision fp32{start}")


# ---- log and progress

class Log:
    """Keep OUT/log.jsonl, one object a line, print its rows, and send them to --track's service.

    Only the first process does. A resumed run drops the lines that lie beyond its checkpoint.
    Raises ValueError if the package that --track needs is missing.
    """

    NOT_PRINTED = ("step", "lr", "grad_norm", "seconds")

    def __init__(self, cfg, start, processes):
        self.path = Path(cfg.out, "log.jsonl")
        self.main = processes.main
        self.track = None
        if self.main:
            self.track = tracker(cfg, start)
            kept = [row for row in read_log(self.path) if row["step"] <= start]
            with atomic(self.path) as f:
                f.write("".join(json.dumps(row) + "\n" for row in kept if start).encode())

    def write(self, row, seconds_left, picture=None):
        """Append a row {name: number}. `picture`: path of a PNG that belongs to it, or None."""
        if not self.main:
            return
        try:
            with self.path.open("a") as f:
                f.write(json.dumps(row) + "\n")
        except OSError as e:
            raise OSError(f"{self.path} could not be written ({e.strerror}): make room, and the "
                          f"same command resumes from the last checkpoint") from None
        shown = [f"{k} {v:.4g}" for k, v in row.items() if k not in self.NOT_PRINTED]
        if seconds_left > 0:
            shown.append(f"{duration(seconds_left)} left")
        print(f"step {row['step']:6d}  {'  '.join(shown)}", flush=True)
        if self.track:
            self.track(row, picture)


def read_log(path):
    """Return the rows of a log.jsonl; a last line that a crash cut short is dropped."""
    rows = []
    if not Path(path).exists():
        return rows
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def tracker(cfg, start):
    """Return track(row, picture), which sends them to TensorBoard or wandb; None without --track.

    The packages are imported only here. Raises ValueError if the one that is needed is missing.
    """
    if cfg.track == "none":
        return None
    try:
        if cfg.track == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
        else:
            import wandb
    except ImportError:
        raise ValueError(f"--track {cfg.track} needs a package: pip install {cfg.track}") from None

    if cfg.track == "wandb":
        name = re.sub(r"\W+", "-", str(Path(cfg.out).resolve())).strip("-")
        wandb.init(project="nano-haste", name=cfg.out, id=name[-64:], resume="allow", dir=cfg.out,
                   config=dataclasses.asdict(cfg))

        def track(row, picture):
            image = {"samples": wandb.Image(str(picture))} if picture else {}
            wandb.log({**row, **image}, step=row["step"])
        return track

    from PIL import Image
    writer = SummaryWriter(cfg.out, purge_step=start + 1)

    def track(row, picture):
        for name, value in row.items():
            writer.add_scalar(name, value, row["step"])
        if picture:
            image = np.asarray(Image.open(picture).convert("RGB"))
            writer.add_image("samples", image, row["step"], dataformats="HWC")
        writer.flush()
    return track


def due(done, every, steps):
    """Return True if something is due after `done` steps: each `every` and the last; 0 is never."""
    return every > 0 and (done % every == 0 or done == steps)


class Clock:
    """Measure training time and speed, without the time that evaluations and checkpoints take."""

    def __init__(self, cfg, start, seconds):
        self.steps = cfg.steps
        self.batch_size = cfg.batch_size
        self.start = start
        self.seconds = seconds                                              # of training, earlier starts included
        self.began = time.perf_counter()
        self.restart(start)

    def restart(self, done):
        """Begin an interval after `done` steps."""
        self.interval_start = done
        self.interval_began = time.perf_counter()

    def read(self, done):
        """End the interval after `done` steps; return its speed and all training time so far."""
        seconds = time.perf_counter() - self.interval_began
        self.seconds += seconds
        images = (done - self.interval_start) * self.batch_size
        return {"images_per_s": images / seconds, "seconds": self.seconds}

    def left(self, done):
        """Return the seconds to the end of the run, if all goes on as since this start."""
        return (time.perf_counter() - self.began) / (done - self.start) * (self.steps - done)


class Progress:
    """Print a line every ten seconds; assume that the other processes are as fast as this one."""

    def __init__(self, total, processes, every=10):
        self.total = total
        self.processes = processes
        self.every = every
        self.done = 0
        self.start = time.perf_counter()
        self.last_print = self.start

    def add(self, count):
        self.done += count
        now = time.perf_counter()
        if now - self.last_print > self.every:
            self.last_print = now
            self.processes.print(str(self))

    def __str__(self):
        done = min(self.total, self.done * self.processes.world)
        rate = done / (time.perf_counter() - self.start)
        text = f"{done:,} of {self.total:,} images, {rate:.3g} images/s"
        if 0 < done < self.total:
            text += f", {duration((self.total - done) / rate)} left"
        return text


def duration(seconds):
    """Return seconds as words: 40 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
