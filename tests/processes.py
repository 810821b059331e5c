"""Start, watch and kill programs: what test_processes.py, kills.py and full_scale.py share.

The output of a program that was started is appended to a file, `process.log`. Nothing survives a
failure: what still runs is killed before the error is raised.
"""
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def torchrun(processes, *flags):
    """Return what stands before a program's name: torchrun if there are several processes."""
    if processes == 1:
        return []
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *flags]


def start(words, log, env=()):
    """Start `python WORDS` from the root, in a session of its own."""
    with open(log, "a") as f:
        process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=f, stderr=f,
                                   env={**ENV, **dict(env)}, start_new_session=True)
    process.log = Path(log)
    return process


def finish(process, code=0, timeout=300):
    """Wait for the end, which must come with this exit code; return all output."""
    try:
        found = process.wait(timeout)
    except subprocess.TimeoutExpired:
        found = f"none after {timeout} s"
    finally:
        kill_all(process)
    if found != code:
        raise RuntimeError(f"exit code {found}, not {code}:\n{end_of(process)}")
    return process.log.read_text()


def end_of(process):
    return process.log.read_text()[-3000:]


# ---- watching

def workers_of(process):
    """Return the process ids of a process's children: torchrun's workers."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):                     # it has just ended
            continue
        if parent == process.pid:
            found.append(int(stat.parent.name))
    return sorted(found)


def wait_until(ready, process, timeout=120):
    """Wait until ready() is true, which must come before the process ends."""
    until = time.time() + timeout
    while not ready():
        if process.poll() is not None:
            raise RuntimeError(f"it ended too early:\n{end_of(process)}")
        if time.time() > until:
            kill_all(process)
            raise RuntimeError(f"still waiting after {timeout} s:\n{end_of(process)}")
        time.sleep(0.01)


def steps_in(out):
    """Return the number of steps in OUT/log.jsonl of a run with --log-every 1."""
    log = Path(out, "log.jsonl")                                            # its last line may be half-written
    return log.read_text().count("\n") if log.exists() else 0


def wait_for_step(process, out, step, timeout=120):
    wait_until(lambda: steps_in(out) >= step, process, timeout)


def checkpoint(out):
    """Return the content of OUT/ckpt.pt; raises what torch raises if it is not readable."""
    return torch.load(Path(out, "ckpt.pt"), map_location="cpu", weights_only=True)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ---- killing

def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:                                              # it has just ended
        pass


def kill_all(process):
    """Kill a process and its workers, which have sessions of their own."""
    if process.poll() is None:
        for pid in [*workers_of(process), process.pid]:
            kill(pid)
        process.wait()
