"""Many processes as one: torchrun's ranks, collective operations, signals that stop all together.

With one GPU you may skip this file: for one process it only chooses the device, and lets Ctrl-C end
the run after a step.

    processes = ddp.Processes("auto")        # rank, world, device, from torchrun's environment
    net = processes.wrap(model)              # DistributedDataParallel if they are several
    with ddp.StopSignal(processes) as stop:
        ...
        if stop.agreed(): break              # the same answer on every process, in the same step
"""
import os
import re
import signal
import socket
import time
from datetime import timedelta
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


class Processes:
    """The processes of a run: rank, world (how many), main (is this the first?), device.

    `hours` is how long a process may wait for the others. `restarted` is true if a worker has died
    before and torchrun has started this run again. Raises ValueError for an impossible device.
    """

    def __init__(self, device="auto", hours=0.5):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        self.restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        self.device = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)), self.world)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")                      # TF32, as the official code does
        if self.world > 1 and not dist.is_initialized():
            self._join(hours)

    def _join(self, hours):
        store = None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            host = os.environ["MASTER_ADDR"]
            port = int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(minutes=30))
            # Each start meets under its own name: no worker reads what a dead one has left.
            number = start_number(store, self.rank, self.world)
            store = dist.PrefixStore(f"start {number}", store)
            self.restarted = number > 1
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        # Else NCCL would guess each rank's card, and might only find out in the first collective.
        device_id = self.device if backend == "nccl" else None
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world,
                                timeout=timedelta(hours=hours), device_id=device_id)

    def wrap(self, model):
        """Return what the training loop calls: the model, in DistributedDataParallel if needed.

        An earlier wrapper's hooks must be gone: drop it, and collect garbage.
        """
        if self.world == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        # the only buffers are tables that never change
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True,
                                       broadcast_buffers=False)

    def mean(self, values):
        """Return the mean of a tensor over the processes, on its device."""
        if self.world > 1:
            dist.all_reduce(values)
            values = values / self.world
        return values

    def max(self, values):
        """Return the elementwise maximum of a tensor over the processes, on its device."""
        if self.world > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def gather(self, tensor):
        """Return the concatenation, in the order of the ranks, of equally shaped tensors."""
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def main_first(self, make):
        """Call make() on each machine's first process, then on the others, for its downloads."""
        made = None
        first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        try:
            if first:
                made = make()
        finally:                                                            # if it fails, the others fail alike
            self.barrier()
        return made if first else make()

    def from_main(self, make):
        """Return what make() returns on the first process, or raise its ValueError or OSError."""
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

    def alike(self, make, describe, remedy):
        """Call make() on every process, and return its result if describe(result) is equal on all.

        describe returns a list of words. Raises ValueError on all processes if one has others: the
        line names its rank and host, what it has, and `remedy`. If make() fails on some processes,
        with ValueError or OSError, a line names the first that did; if it fails alike on all, the
        error is raised as it is.
        """
        if self.world == 1:
            return make()
        made = error = None
        words = []
        try:
            made = make()
            words = describe(made)
        except (ValueError, OSError) as e:
            error = e
        found = [None] * self.world
        dist.all_gather_object(found, (socket.gethostname(), words, error and str(error)))
        first_host, first, first_error = found[0]
        for rank, (host, other, problem) in enumerate(found):
            if problem != first_error:
                failed = [f"rank {r} (host {h}): {p}" for r, (h, _, p) in enumerate(found) if p]
                raise ValueError(f"{failed[0]}; not all processes have this problem: {remedy}")
            for a, b in zip_longest(first, other, fillvalue="nothing"):
                if a != b:
                    raise ValueError(f"rank {rank} (host {host}) has {b}, but rank 0 (host "
                                     f"{first_host}) has {a}: {remedy}")
        if error:
            raise error
        return made

    def on_main(self, make):
        """Return make() on the first process and None on the others; all raise its error."""
        made = []
        self.from_main(lambda: made.append(make()))
        return made[0] if made else None

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def print(self, *words):
        if self.main:
            print(*words, flush=True)

    def close(self):
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def choose_device(device, local_rank, world=1):
    """Return the torch.device that --device means for a process. Raises ValueError, one line."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise ValueError(f"--device {device} is not a device: use auto, cpu, cuda, cuda:N or mps")
    if device == "mps":
        check_mps(world)
    if device in ("cpu", "mps"):
        return torch.device(device)
    if world > 1 and device != "cuda":
        raise ValueError(f"--device {device} would put all {world} processes on one card: give "
                         f"--device cuda, and choose cards with CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this torch finds no CUDA device; use --device cpu, "
                         f"or install a CUDA build of torch and a driver")
    chosen = torch.device("cuda", local_rank) if device == "cuda" else torch.device(device)
    if chosen.index >= torch.cuda.device_count():
        raise ValueError(f"--device {chosen}: this machine has {torch.cuda.device_count()} CUDA "
                         f"device(s)")
    return chosen


def check_mps(world):
    """Raise ValueError if the GPU of a Mac cannot be used."""
    if not torch.backends.mps.is_available():
        raise ValueError("--device mps: this torch finds no Apple GPU; use --device cpu")
    if world > 1:
        raise ValueError("--device mps is for one process: leave out torchrun")
    if os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK") != "1":
        raise ValueError("--device mps lacks a few operations: run PYTORCH_ENABLE_MPS_FALLBACK=1 "
                         "python ..., and the CPU does those")


# ---- stopping together

class StopSignal:
    """Turn SIGTERM or SIGINT into an end of all processes after the same step.

    A signal reaches the processes at different steps, so they agree by a maximum. It goes over gloo
    and is read one step late, so that the host never waits for the GPU. A cluster may send several
    signals at once, so repeated ones count for nothing; but a Ctrl-C five seconds later kills.
    """

    def __init__(self, processes):
        self.asked = False                                                  # has this process had a signal?
        self.first = 0.0                                                    # when the first one came
        self.world = processes.world
        self.pending = None                                                 # the agreement under way
        self.group = dist.new_group(backend="gloo") if self.world > 1 else None
        self.before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, number, _):
        now = time.monotonic()
        if not self.asked:
            self.asked = True
            self.first = now
        elif number == signal.SIGINT and now - self.first > 5:
            self.restore()
            os.kill(os.getpid(), number)

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        self.restore()
        if error is None and self.pending:                                  # no process leaves while it is under way
            self.pending[0].wait()

    def restore(self):
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def agreed(self):
        """Return True if all processes are to stop now. Every process calls it once a step."""
        if self.world == 1:
            return self.asked
        last = self.pending
        asked = torch.tensor([int(self.asked)])
        work = dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.group, async_op=True)
        self.pending = (work, asked)
        if last is None:
            return False
        last[0].wait()
        return bool(last[1].item())


# ---- torchrun's restarts

def start_number(store, rank, world):
    """Return the number of this start of the job, 1 at first; every process returns the same one.

    torchrun's store outlives the workers, so a restarted worker could read what a dead one has left
    there, and on several machines the agents' own restart counts disagree. Therefore
        1. rank 0 counts the starts in the store;
        2. every other rank posts a question under an id that is never used again, and waits for its
           answer;
        3. rank 0 answers until every rank has confirmed. What a dead worker has asked is answered
           too, and nobody reads that.
    """
    if rank == 0:
        number = store.add("starts", 1)
        for r in range(1, world):
            confirmed = False
            while not confirmed:
                if store.check([f"question {r}"]):
                    question = store.get(f"question {r}").decode()
                    store.set(f"answer {question}", str(number))
                    confirmed = store.check([f"{number} confirmed by {question}"])
                time.sleep(0.02)
        return number
    question = f"{rank} {os.getpid()} {time.time_ns()}"
    store.set(f"question {rank}", question)
    number = int(store.get(f"answer {question}"))                           # waits for it
    store.set(f"{number} confirmed by {question}", "")
    return number
