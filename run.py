"""What every training run needs, whatever it trains: flags, processes, randomness, checkpoints, signals and a log.

Started by `torchrun` it is one of many processes, started by `python` the only one; the code is the same.
"""
import argparse
import copy
import dataclasses
import difflib
import errno
import gc
import hashlib
import inspect
import json
import os
import pickle
import re
import signal
import struct
import sys
import time
import typing
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


# ---- flags from a dataclass

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and say what to do."""

    def __init__(self, prog, **kwargs):
        super().__init__(prog, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
            message = f"{unknown[1]} is no flag" + (f"; did you mean {near[0]}?" if near else "")
        raise SystemExit(f"{self.prog}: {message} (--help lists every flag)")


def parse(config, argv=None, prog=None, description=None, presets=None):
    """Command line -> instance of the dataclass `config`, a flag for every field, its comment as help.

    A preset is a dict of fields; flags that are given win over it. Raises SystemExit with one line.
    """
    comments = dict(re.findall(r"^    (\w+): .*?#\s*(.*)$", inspect.getsource(config), re.M))
    parser = Parser(prog, description=description)
    if presets:
        parser.add_argument("--preset", choices=list(presets), default=next(iter(presets)),
                            help="settings of a known run")
    for f in dataclasses.fields(config):
        kind, options = f.type, dict(dest=f.name, default=f.default, help=comments[f.name])
        if typing.get_origin(kind) is typing.Literal:
            options["choices"] = typing.get_args(kind)
        elif kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:                                                               # Optional[int]: its first argument
            options["type"] = next(iter(typing.get_args(kind)), kind)
        parser.add_argument(flag(f.name), **options)
    if presets:
        words = sys.argv[1:] if argv is None else argv
        chosen, _ = parser.parse_known_args([w for w in words if w not in ("-h", "--help")])
        parser.set_defaults(**presets[chosen.preset])
    values = vars(parser.parse_args(argv))
    values.pop("preset", None)
    return config(**values)


@contextmanager
def one_line(program, errors=(ValueError, OSError)):
    """Bad input, which raises ValueError or OSError, ends the program with one line instead of a traceback."""
    try:
        yield
    except errors as e:
        raise SystemExit(f"{program}: {e}") from None


def flag(name):
    return "--" + name.replace("_", "-")


def need(cfg, ok, name, remedy):
    """Refuse the value of a field: one line with its flag and the remedy."""
    if not ok:
        raise ValueError(f"{flag(name)} {getattr(cfg, name)} {remedy}")


def check(cfg, world, least_one=(), least_zero=()):
    """Refuse impossible values of the flags that all training programs share, and of the counts that are named."""
    for name in ("steps", "batch_size", "accumulate", "log_every", "eval_steps", *least_one):
        need(cfg, getattr(cfg, name) >= 1, name, "must be 1 or more")
    for name in ("warmup", "save_every", "eval_every", "seed", "weight_decay", *least_zero):
        need(cfg, 0 <= getattr(cfg, name) < 2 ** 63, name, "must be 0 or more, and finite")
    for name in ("lr", "clip"):
        need(cfg, 0 < getattr(cfg, name) < float("inf"), name, "must be a positive number")
    for name in ("ema", "beta2"):
        need(cfg, 0 <= getattr(cfg, name) < 1, name, "must lie in [0, 1)")
    need(cfg, cfg.eval_samples >= 2, "eval_samples", "must be 2 or more, for a covariance")
    need(cfg, 0 <= cfg.label_drop <= 1, "label_drop", "must lie in [0, 1]")
    parts = world * cfg.accumulate
    need(cfg, cfg.batch_size % parts == 0, "batch_size", f"must be a multiple of {parts} (processes x --accumulate)")
    for name in ("depth", "hidden_size", "num_heads", "image_size"):
        need(cfg, getattr(cfg, name) is None or getattr(cfg, name) >= 1, name, "must be 1 or more")


def check_data(cfg, images, saved, **arch):
    """Refuse a data.Data that does not fit the flags, or the checkpoint that is gone on from (a dict, or None).

    `arch` is what the data says of the model, under the names that the checkpoint's "arch" has for it.
    """
    packed = images.packed
    if packed is None:
        need(cfg, cfg.latent_channels is None, "latent_channels", f"is for packed data, and --data {cfg.data} is not: "
             f"run data.py prepare on the photographs and name its folder")
    else:
        need(cfg, cfg.latent_channels in (None, packed["channels"]), "latent_channels",
             f"is not what --data {cfg.data} has, {packed['channels']} (--vae {packed['vae']}): prepare it with the "
             f"other autoencoder")
        need(cfg, packed["mirror"] or not cfg.mirror, "mirror", f"needs the mirror images' latents, and --data "
             f"{cfg.data} has none: give --no-mirror, or prepare it with --mirror")
    if saved:
        was, now = saved["arch"], {**arch, "num_classes": len(images.classes)}
        wrong = ", ".join(f"{k} {v} (was {was[k]})" for k, v in now.items() if was[k] != v)
        before = saved.get("packed_from")
        if packed and before and packed["fingerprint"] != before["fingerprint"]:
            wrong = wrong or f"another autoencoder, {packed['vae']} (was {before['vae']})"
        if wrong:
            raise ValueError(f"--data {cfg.data} is not what the checkpoint was trained on: {wrong}. Put that data "
                             f"back, or start anew with another --out")


# ---- processes

def agree(store, rank, world):
    """How often torchrun has started this job's workers, a number that all of them agree on; 1 is the first time.

    torchrun's store outlives workers that die, so a restarted worker may read what a dead one has left there; and the
    agents of several machines count restarts differently. So the first process counts, and answers each of the others
    until it has confirmed: what a dead one has asked is answered too, and read by nobody.
    """
    if rank == 0:
        number, waiting = store.add("starts", 1), set(range(1, world))
        while waiting:
            for r in sorted(waiting):
                if store.check([f"question {r}"]):
                    question = store.get(f"question {r}").decode()
                    store.set(f"answer {question}", str(number))
                    waiting -= {r} if store.check([f"{number} confirmed by {question}"]) else set()
            time.sleep(0.02)
        return number
    question = f"{rank} {os.getpid()} {time.time_ns()}"
    store.set(f"question {rank}", question)
    number = int(store.get(f"answer {question}"))                           # waits for it
    store.set(f"{number} confirmed by {question}", "")
    return number


class Processes:
    """The processes of a run: rank, world, device. Nothing here does anything when there is only one.

    `hours` is how long a process may wait for the others. `restarted` tells whether a worker has died before.
    """

    def __init__(self, device="auto", hours=0.5):
        told = os.environ.get                                               # by torchrun
        self.restarted = int(told("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        self.rank, self.world, local = int(told("RANK", 0)), int(told("WORLD_SIZE", 1)), int(told("LOCAL_RANK", 0))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"--device {device}: this torch finds no CUDA device; use --device cpu, or install a CUDA "
                             f"build of torch and a driver")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise ValueError(f"--device {device} is no device; use auto, cpu, cuda or cuda:N")
        self.device = torch.device("cuda", local) if device == "cuda" else torch.device(device)
        if self.device.type == "cuda" and self.device.index >= torch.cuda.device_count():
            raise ValueError(f"--device {self.device}: this machine has {torch.cuda.device_count()} CUDA device(s)")
        self.main = self.rank == 0
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")                      # TF32, as the official code does
        if self.world > 1 and not dist.is_initialized():
            store = None
            if told("TORCHELASTIC_USE_AGENT_STORE", "") == "True":
                store = dist.TCPStore(told("MASTER_ADDR", ""), int(told("MASTER_PORT", 0)), is_master=False,
                                      timeout=timedelta(minutes=30))
                number = agree(store, self.rank, self.world)
                store, self.restarted = dist.PrefixStore(f"start {number}", store), number > 1
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", store=store, rank=self.rank,
                                    world_size=self.world, timeout=timedelta(hours=hours))

    def mean(self, values):
        """Mean of a tensor over the processes (on its device)."""
        if self.world > 1:
            dist.all_reduce(values)
            values = values / self.world
        return values

    def gather(self, tensor):
        """Concatenation, in the order of the ranks, of equally shaped tensors."""
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def gather_objects(self, mine, only_first=False):
        """Every process's object (picklable, tensors on the CPU), in the order of the ranks; None on the others."""
        everyone = [mine] * self.world
        if self.world > 1 and only_first:
            everyone = everyone if self.main else None
            dist.gather_object(mine, everyone)
        elif self.world > 1:
            dist.all_gather_object(everyone, mine)
        return everyone

    def first(self, make):
        """make() on the first process, then on the others, which find what it has downloaded or cached."""
        try:
            made = make() if self.main else None
        finally:                                                            # when it fails the others will fail alike
            if self.world > 1:
                dist.barrier()
        return made if self.main else make()

    def share(self, make):
        """What make() returns on the first process, on every process; its ValueError or OSError too."""
        if self.world == 1:
            return make()
        box = [None]
        if self.main:
            try:
                box = [make()]
            except (ValueError, OSError) as e:
                box = [e]
        dist.broadcast_object_list(box)
        if isinstance(box[0], Exception):
            raise box[0]
        return box[0]

    def close(self):
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def print(self, *words):
        if self.main:
            print(*words, flush=True)


class Progress:
    """A line every ten seconds about how far all processes have come; each is taken to be as fast as the first."""

    def __init__(self, total, processes, every=10):
        self.total, self.processes, self.every = total, processes, every
        self.done, self.start = 0, time.perf_counter()
        self.told = self.start

    def add(self, n):
        self.done, now = self.done + n, time.perf_counter()
        if now - self.told > self.every:
            self.told = now
            self.processes.print(f"{self}")

    def __str__(self):
        done, seconds = min(self.total, self.done * self.processes.world), time.perf_counter() - self.start
        left = (self.total - done) * seconds / max(1, done)
        unit, scale = ("h", 3600) if left > 7200 else ("min", 60) if left > 120 else ("s", 1)
        left = f", {left / scale:.3g} {unit} left" if left else ""
        return f"{done:,} of {self.total:,} images, {done / seconds:.3g} images/s{left}"


class StopSignal:
    """SIGTERM or SIGINT -> every process stops after the same step. A second signal kills at once.

    Signals reach processes at different steps, so the processes agree by a maximum, over gloo and read one step late:
    the host never waits for the GPU.
    """

    def __init__(self, processes):
        self.asked, self.world, self.pending = False, processes.world, None
        self.group = dist.new_group(backend="gloo") if self.world > 1 else None
        self.before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, *_):
        self.asked = True
        self.restore()

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        self.restore()
        if error is None and self.pending:                                  # no process leaves while this is under way
            self.pending[0].wait()

    def restore(self):
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def agreed(self):
        """Called once a step by every process; the answer is the same for all."""
        if self.world == 1:
            return self.asked
        last = self.pending
        asked = torch.tensor([int(self.asked)])
        self.pending = dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.group, async_op=True), asked
        if last is None:
            return False
        last[0].wait()
        return bool(last[1].item())


# ---- what is trained

class Student:
    """A model, its average (EMA) and its optimizer; `net` is what the loop calls, with DDP where there are many.

    Parameters whose names start with `guide` serve the training only: `drop_guide` takes them away in mid-run.
    `decay_vectors` says whether tensors of fewer than two dimensions have weight decay too.
    """

    def __init__(self, model, cfg, processes, guide="-", decay_vectors=True):
        self.processes, self.decay, self.guide = processes, cfg.ema, guide
        self.model = model.to(processes.device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        if cfg.compile:
            self.model.compile()                                            # in place: names stay as they are
        groups = {}                                                         # (guide?, without weight decay?): tensors
        for n, p in self.model.named_parameters():
            if p.requires_grad:
                groups.setdefault((n.startswith(guide), p.ndim < 2 and not decay_vectors), []).append(p)
        self.opt = torch.optim.AdamW([dict(params=groups[k], weight_decay=0.0 if k[1] else cfg.weight_decay)
                                      for k in sorted(groups)], lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
        self.kept = {"model": {}, "ema": {}}                                # the guide's last weights, on the host
        self.wrap()

    def wrap(self):
        self.net = self.model
        if self.processes.world > 1:
            gc.collect()                                                    # an old wrapper's hooks must be gone first
            ids = [self.processes.device.index] if self.processes.device.type == "cuda" else None
            known = inspect.signature(DistributedDataParallel.__init__).parameters          # newer torch renamed it
            sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            self.net = DistributedDataParallel(self.model, device_ids=ids, gradient_as_bucket_view=True,
                                               **{sync: False})             # buffers are constants

    def drop_guide(self):
        """The guide leaves model, EMA, optimizer and device. The rest keeps its state; checkpoints keep the guide."""
        self.opt.zero_grad()
        for p in self.opt.param_groups.pop()["params"]:                     # the guide's group is the last one
            self.opt.state.pop(p, None)
        for name, m in (("model", self.model), ("ema", self.ema)):
            self.kept[name] = {k: w.cpu() for k, w in m.state_dict().items() if k.startswith(self.guide)}
            setattr(m, self.guide.rstrip("."), None)
        self.net = None
        if self.processes.device.type == "cuda":
            torch.cuda.empty_cache()
        self.wrap()

    def step(self, lr, clip):
        """Clip, update, average; returns the gradient's norm before clipping, on the device."""
        for group in self.opt.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.opt.step()
        self.opt.zero_grad()
        torch._foreach_lerp_(list(self.ema.parameters()), [p.detach() for p in self.model.parameters()], 1 - self.decay)
        return norm

    def state(self):
        return {"model": {**self.model.state_dict(), **self.kept["model"]},
                "ema": {**self.ema.state_dict(), **self.kept["ema"]}, "opt": self.opt.state_dict()}

    def load(self, saved):
        self.model.load_state_dict(saved["model"])
        self.ema.load_state_dict(saved["ema"])
        if len(saved["opt"]["param_groups"]) < len(self.opt.param_groups):  # saved after the guide had gone
            self.drop_guide()
        self.opt.load_state_dict(saved["opt"])


# ---- randomness: a pure function of the seed and of what it is for

def seeded(device, *words):
    """torch.Generator on `device` from non-negative integers, e.g. (seed, step)."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]))


# ---- checkpoints

@contextmanager
def atomic(path):
    """A binary file to write to, put in the place of `path` once it is whole: a crash leaves old or new.

    Raises OSError that names the file, where the disk is full, say; what was there before stays.
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
            raise OSError(f"{path} could not be written ({cause.strerror or cause}): the one before, if any, is kept; "
                          f"make room, and the same command goes on") from None
        raise


def save_checkpoint(path, content):
    with atomic(path) as f:
        torch.save(content, f)


def code_hash(*modules):
    """Fingerprint of the source of modules: a checkpoint remembers which code it came from."""
    return hashlib.sha256("".join(inspect.getsource(m) for m in modules).encode()).hexdigest()[:16]


def weights_hash(model, only=""):
    """Fingerprint of the weights whose names match the pattern `only`."""
    h = hashlib.sha256()
    for name, w in sorted(model.state_dict().items()):
        if re.match(only, name):
            h.update(name.encode() + w.detach().float().cpu().numpy().tobytes())
    return h.hexdigest()[:16]


CONTENT = {"model", "ema", "opt", "args", "arch", "steps", "seconds", "code"}              # of a checkpoint, at least


def resume_point(cfg, free, modules, processes):
    """The checkpoint that `cfg.resume` asks for, or None. Raises ValueError where the flags are not those of its run.

    auto: OUT/ckpt.pt where it exists; never: none; else a path. A finished run, and changed code, are told.
    """
    path = Path(cfg.out) / "ckpt.pt" if cfg.resume == "auto" else Path(cfg.resume)
    if processes.restarted and Path(cfg.out, "ckpt.pt").exists():           # whatever --resume says: a worker has died
        path = Path(cfg.out, "ckpt.pt")
    elif cfg.resume == "never" or (cfg.resume == "auto" and not path.exists()):
        return None
    anew = "start anew with another --out, or with --resume never (which replaces what --out holds)"
    try:
        # on a GPU the contents are copied there, and need not be in the memory of every process at once
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=processes.device.type == "cuda")
    except FileNotFoundError:
        raise ValueError(f"--resume {path} does not exist: give auto, never, or the path of a checkpoint") from None
    except (RuntimeError, EOFError, OSError, LookupError, struct.error, ValueError, pickle.UnpicklingError) as e:
        if getattr(e, "errno", None) not in (None, errno.EINVAL, errno.EISDIR):             # the disk's, not the file's
            raise OSError(f"{path} could not be read ({e.strerror}): give the same command once more") from None
        raise ValueError(f"{path} cannot be read ({type(e).__name__}: cut short, or no checkpoint): {anew}") from None
    if not isinstance(saved, dict) or not CONTENT <= saved.keys():
        raise ValueError(f"{path} is no checkpoint of this program: {anew}")
    now, was = dataclasses.asdict(cfg), saved["args"]
    changed = ", ".join(f"{flag(k)} {now[k]} (was {was.get(k)})" for k in now if k not in free and now[k] != was.get(k))
    if changed:
        raise ValueError(f"{path} was trained with other flags: {changed}. Give the same ones to go on, or {anew}")
    if saved["steps"] >= cfg.steps:
        processes.print(f"{path} holds a finished run of {saved['steps']} steps: "
                        f"train on with a larger --steps, or {anew}")
    else:
        processes.print(f"going on from step {saved['steps']} of {path}")
        if saved["code"] != code_hash(*modules):
            processes.print("note: the code of model or training has changed since that checkpoint was written")
    return saved


class FiniteGuard:
    """Remembers on the device the first step that was not finite; the host reads it before it logs or saves."""

    def __init__(self, checkpoint, processes):
        self.checkpoint, self.processes = Path(checkpoint), processes
        self.first = torch.full((), -1, device=processes.device)

    def watch(self, step, value):
        self.first = torch.where((self.first < 0) & ~torch.isfinite(value), step, self.first)

    def require(self):
        if self.processes.world > 1:
            dist.all_reduce(self.first, dist.ReduceOp.MAX)
        if self.first.item() >= 0:
            last = "no checkpoint was written before"
            if self.checkpoint.exists():
                last = f"the last good checkpoint is {self.checkpoint}"
            raise SystemExit(f"loss or gradient was not finite in step {self.first.item() + 1}; {last}. "
                             f"Try a lower --lr, or --precision fp32")


def precision(wanted, device):
    """What --precision auto means here: bf16 on CUDA."""
    return ("bf16" if device.type == "cuda" else "fp32") if wanted == "auto" else wanted


def autocast(wanted, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=precision(wanted, device) == "bf16")


# ---- log, and the end of a step

class Log:
    """log.jsonl, one object a line, by the first process. A resumed run drops lines that lie beyond its checkpoint."""

    NOT_PRINTED = ("step", "lr", "grad_norm", "seconds")

    def __init__(self, path, step, processes):
        self.path, self.main = Path(path), processes.main
        if self.main:
            kept = [r for r in read_log(path) if r["step"] <= step] if step else []
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(self.path) as f:
                f.write("".join(json.dumps(r) + "\n" for r in kept).encode())

    def write(self, row):
        if self.main:
            try:
                with self.path.open("a") as f:
                    f.write(json.dumps(row) + "\n")
            except OSError as e:
                raise OSError(f"{self.path} could not be written ({e.strerror}): make room, and the same command goes "
                              f"on from the last checkpoint") from None
            shown = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if k not in self.NOT_PRINTED)
            print(f"step {row['step']:6d}  {shown}", flush=True)


def read_log(path):
    """Rows of a log.jsonl; a last line cut short by a crash is dropped."""
    rows = []
    for line in Path(path).read_text().splitlines() if Path(path).exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Book:
    """All that a run keeps besides the student: its place, clock, log and checkpoints.

    `content` is what a checkpoint holds besides the student and the place; the loop may change it on the way.
    """

    def __init__(self, cfg, saved, student, processes, stop, **content):
        self.cfg, self.student, self.processes, self.stop, self.content = cfg, student, processes, stop, content
        self.out, self.checkpoint = Path(cfg.out), Path(cfg.out) / "ckpt.pt"
        self.start, self.seconds = (saved["steps"], saved["seconds"]) if saved else (0, 0.0)
        if processes.main and saved is None:
            self.checkpoint.unlink(missing_ok=True)                         # of an earlier run: this one has begun
        self.log = Log(self.out / "log.jsonl", self.start, processes)
        self.finite = FiniteGuard(self.checkpoint if cfg.resume in ("auto", "never") else cfg.resume, processes)
        self.clock, self.clock_step = time.perf_counter(), self.start

    def due(self, step, every):
        """Whether something done every so many steps (0: never) is to be done at the end of this step."""
        return every > 0 and (step + 1) % every == 0

    def evaluating(self, step):
        return self.cfg.eval_every > 0 and (step + 1 == self.cfg.steps or self.due(step, self.cfg.eval_every))

    def logging(self, step):
        return step + 1 == self.cfg.steps or self.evaluating(step) or self.due(step, self.cfg.log_every)

    def save(self, steps):
        save_checkpoint(self.checkpoint, {**self.student.state(), "args": dataclasses.asdict(self.cfg), "steps": steps,
                                          "seconds": self.seconds, **self.content})

    def batch(self, feed, step):
        """The next batch on the device. A bad image (ValueError, OSError) ends the run but loses no step."""
        try:
            return [b if b is None else b.to(self.processes.device, non_blocking=True) for b in next(feed)]
        except (ValueError, OSError):
            if self.processes.world == 1 and step > self.start:
                self.finite.require()
                self.save(step)
            raise

    def close_step(self, step, lr, norm, terms, evaluate, extra=None):
        """Log, evaluate and save what is due after a step. True where a signal ends the run here.

        terms {name: scalar on the device}; evaluate() -> more numbers for the log's line, called by every process;
        `extra` are numbers that are worth a line at any step.
        """
        self.finite.watch(step, norm + terms["loss"])
        done, last, stopping = step + 1, step + 1 == self.cfg.steps, self.stop.agreed()
        logging = self.logging(step) or bool(extra)
        saving = stopping or last or self.due(step, self.cfg.save_every)
        if not (logging or saving):
            return False
        self.finite.require()                                               # the host waits for the device here only
        values = self.processes.mean(torch.stack([*terms.values(), norm])).tolist()
        now = time.perf_counter()
        self.seconds += now - self.clock
        row = {"step": done, **dict(zip([*terms, "grad_norm"], values)), "lr": lr,
               "images_per_s": (done - self.clock_step) * self.cfg.batch_size / (now - self.clock),
               "seconds": self.seconds, **(extra or {})}
        if self.evaluating(step):
            row |= evaluate()
        if logging:
            self.log.write(row)
        if saving and self.processes.main:
            self.save(done)
        if stopping:
            self.processes.print(f"stopped by a signal after step {done}, saved {self.checkpoint}: "
                                 f"the same command goes on")
        self.clock, self.clock_step = time.perf_counter(), done
        return stopping
