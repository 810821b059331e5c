"""Kill a run again and again, workers and whole jobs, at random moments: it must end with the undisturbed weights.

    python experiments/kills.py                   20 kills, ten of a run of one process and ten of two: minutes
    python experiments/kills.py --kills 4         fewer

A run is haste_train.py on the digits, small, across the end of its guidance, saving every 20 steps. One process is
killed with SIGKILL and started again with the same command. Of two, under torchrun --max-restarts, a worker is killed
(torchrun starts both again) or everything is (the command is given again). After every kill all files must be readable.
"""
import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import run  # noqa: E402

FLAGS = ["--depth", "4", "--hidden-size", "32", "--num-heads", "2", "--projector-dim", "16", "--batch-size", "8",
         "--teacher-steps", "2", "--log-every", "1", "--save-every", "20", "--eval-every", "0", "--device", "cpu"]


def workers_of(pid):
    """Process ids of the children of a process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, parent = int(stat.parent.name), int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        found += [name] if parent == pid else []
    return sorted(found)


def start(command, log):
    with open(log, "a") as f:
        return subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=f, stderr=f, start_new_session=True,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})


def kill(pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def steps_in(out):
    return len(run.read_log(out / "log.jsonl"))


def saved_in(out):
    """The checkpoint; raises what torch raises where it is not readable."""
    path = out / "ckpt.pt"
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    return all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


def disturbed(processes, kills, steps, out, rng):
    """Run until `kills` kills have hit, then to the end. Returns what was killed, as text."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
              f"--max-restarts={kills}"] if processes > 1 else []
    command = [*launch, "haste_train.py", *FLAGS, "--steps", str(steps), "--stop", str(steps // 3), "--cache",
               str(out.parent / "cache"), "--out", str(out)]
    told, process = [], start(command, f"{out}.txt")
    for i in range(kills):
        begun = steps_in(out)
        until = time.time() + 120
        while steps_in(out) < begun + 2 and time.time() < until and process.poll() is None:
            time.sleep(0.05)                                                # it has come up, and moves
        time.sleep(rng.random())
        if process.poll() is not None:
            raise SystemExit(f"the run ended before its kill {i + 1}: give more --steps (see {out}.txt)")
        if time.time() > until:
            kill([*workers_of(process.pid), process.pid])
            raise SystemExit(f"the run did not come up again after kill {i} (see {out}.txt)")
        workers = workers_of(process.pid) if processes > 1 else []
        if workers and rng.random() < 0.5:
            kill([rng.choice(workers)])                                     # torchrun starts both again
            told.append("worker")
        else:
            kill([process.pid, *workers])
            process.wait()
            told.append("job")
            saved_in(out)
            process = start(command, f"{out}.txt")
        saved_in(out)
    try:
        failed = process.wait(600) != 0
    except subprocess.TimeoutExpired:
        failed = True
        kill([*workers_of(process.pid), process.pid])
    if failed:
        raise SystemExit(f"the run failed: see {out}.txt")
    return f"{told.count('worker')} workers, {told.count('job')} jobs"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="half of them for each number of processes")
    parser.add_argument("--steps", type=int, default=6000, help="of the run that is killed")
    parser.add_argument("--out", default="out/kills", help="folder, new for each use")
    args = parser.parse_args(argv)
    out, failed = Path(args.out).resolve(), False
    if out.exists():
        raise SystemExit(f"--out {args.out} exists: name a new folder, or delete it")
    out.mkdir(parents=True)
    print("| processes | killed | weights, optimizer and log |\n|---|---|---|")
    for processes in (1, 2):
        disturbed(processes, 0, args.steps, out / f"straight{processes}", None)
        hit = disturbed(processes, args.kills // 2, args.steps, out / f"killed{processes}", random.Random(processes))
        a, b = (saved_in(out / f"{name}{processes}") for name in ("straight", "killed"))
        logs = [[{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")}
                 for row in run.read_log(out / f"{name}{processes}" / "log.jsonl")] for name in ("straight", "killed")]
        equal = all(same(a[k], b[k]) for k in ("model", "ema", "opt", "steps")) and logs[0] == logs[1]
        clean = not list(out.rglob("*.partial"))
        failed |= not (equal and clean)
        print(f"| {processes} | {hit} | {'identical' if equal else 'DIFFERENT'}"
              f"{'' if clean else ', and files were left half-written'} |", flush=True)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
