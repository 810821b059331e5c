"""Kill a run at random moments, again and again: it must end with the undisturbed run's weights.

    python tests/kills.py                   20 kills, ten of one process and ten of two: minutes
    python tests/kills.py --kills 4         fewer

A run is haste_train.py on the digits, small, across the end of its guidance, saving every 20 steps.
One process is killed with SIGKILL and started again with the same command. Of two, under torchrun
--max-restarts, a worker is killed (torchrun starts both again) or everything is (the command is
given again). After every kill, the checkpoint must be readable.
"""
import argparse
import random
import time
from pathlib import Path

from conftest import rows_of, same_weights
from processes import (checkpoint, finish, kill, kill_all, start, steps_in, torchrun,
                       wait_for_step, workers_of)

FLAGS = ["--depth", "4", "--hidden-size", "32", "--num-heads", "2", "--projector-dim", "16",
         "--batch-size", "8", "--teacher-steps", "2", "--log-every", "1", "--save-every", "20",
         "--eval-every", "0", "--device", "cpu"]


def disturbed(processes, kills, steps, out, rng):
    """Train, with so many kills on the way; return what was killed, as text."""
    command = [*torchrun(processes, f"--max-restarts={kills}"), "haste_train.py", *FLAGS,
               "--steps", steps, "--stop", steps // 3, "--cache", out.parent / "cache",
               "--out", out]
    process = start(command, f"{out}.txt")
    killed = []
    for _ in range(kills):
        wait_for_step(process, out, steps_in(out) + 2)                      # it has come up, and moves
        time.sleep(rng.random())
        if process.poll() is not None:
            raise SystemExit(f"the run ended before kill {len(killed) + 1}: give more --steps (see "
                             f"{out}.txt)")
        workers = workers_of(process) if processes > 1 else []
        if workers and rng.random() < 0.5:
            kill(rng.choice(workers))                                       # torchrun starts both again
            killed.append("worker")
        else:
            kill_all(process)
            killed.append("job")
            readable(out)
            process = start(command, f"{out}.txt")
        readable(out)
    finish(process, timeout=600)
    return f"{killed.count('worker')} workers, {killed.count('job')} jobs"


def readable(out):
    """Raise what torch raises if there is a checkpoint that it cannot read."""
    if (out / "ckpt.pt").exists():
        checkpoint(out)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kills", type=int, default=20, help="half of them for each number of processes")
    add("--steps", type=int, default=6000, help="of the run that is killed")
    add("--out", default="out/kills", help="folder, new for each use")
    args = parser.parse_args(argv)
    out = Path(args.out).resolve()
    if out.exists():
        raise SystemExit(f"--out {args.out} exists: name a new folder, or delete it")
    out.mkdir(parents=True)

    failed = False
    print("| processes | killed | weights, optimizer and log |\n|---|---|---|")
    for processes in (1, 2):
        straight = out / f"straight{processes}"
        broken = out / f"killed{processes}"
        disturbed(processes, 0, args.steps, straight, None)
        hit = disturbed(processes, args.kills // 2, args.steps, broken, random.Random(processes))
        equal = (same_weights(checkpoint(straight), checkpoint(broken))
                 and rows_of(straight) == rows_of(broken))
        clean = not list(out.rglob("*.partial"))
        verdict = "identical" if equal else "DIFFERENT"
        if not clean:
            verdict += ", and files were left half-written"
        failed = failed or not (equal and clean)
        print(f"| {processes} | {hit} | {verdict} |", flush=True)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
