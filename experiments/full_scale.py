"""From a folder of photographs to scored samples: every command of a full-scale run, at sizes for two CPU cores.

    python experiments/full_scale.py FOLDER                    16 images of FOLDER/class/*.JPEG, some minutes
    python experiments/full_scale.py FOLDER --images 100

No pretrained weights are needed: autoencoders, DINOv2 and Inception get filled weights, so the numbers mean nothing,
but the commands, the files between them and their sizes are those of ImageNet. Training is killed once on the way.
"""
import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "golden"), str(ROOT / "experiments")]

import fid  # noqa: E402
import run  # noqa: E402
import teacher  # noqa: E402
import vae  # noqa: E402
from fill import fill_state_dict  # noqa: E402
from kills import kill, start, steps_in, workers_of  # noqa: E402

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]


def weights(folder):
    """Files of filled weights, in the layouts of the published ones."""
    folder.mkdir(parents=True)
    for name, net in (("sd", vae.AutoencoderKL((1, 2, 4, 4), 4)),
                      ("kl16", vae.AutoencoderKL((1, 1, 2, 2, 4), 16, True)),
                      ("dinov2_vitb14", teacher.DINOv2()), ("inception", fid.Inception())):
        torch.save(fill_state_dict(net.state_dict()), folder / f"{name}.pt")
    return folder


def call(command, log, times, name, kill_after=None):
    """Run it to the end; with `kill_after`, kill it and its workers once its log has so many steps."""
    print("python " + shlex.join(command), flush=True)
    begun, process = time.time(), start(command, log)
    if kill_after is not None:
        out = Path(command[command.index("--out") + 1])
        while steps_in(out) < kill_after and process.poll() is None:
            time.sleep(0.1)
        if process.poll() is not None:
            raise SystemExit(f"it ended before it was killed:\n{Path(log).read_text()[-3000:]}")
        kill([process.pid, *workers_of(process.pid)])
        process.wait()
    elif process.wait() != 0:
        raise SystemExit(Path(log).read_text()[-3000:])
    times[name] = time.time() - begun


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="class folders of photographs")
    parser.add_argument("--images", type=int, default=16, help="how many of them")
    parser.add_argument("--samples", type=int, default=8, help="images to sample")
    parser.add_argument("--out", default="out/full_scale", help="folder, new for each use")
    args = parser.parse_args(argv)
    out, times = Path(args.out).resolve(), {}
    if out.exists():
        raise SystemExit(f"--out {args.out} exists: name a new folder, or delete it")
    w, log = weights(out / "weights"), out / "log.txt"
    folder, few = str(Path(args.folder).resolve()), ["--device", "cpu", "--batch-size", "4"]
    limit = ["--limit", str(args.images)]
    haste = [*TORCHRUN, "haste_train.py", "--preset", "imagenet256-xl", "--model", "SiT-S/2", "--data", f"{out}/sd",
             "--teacher-weights", f"{w}/dinov2_vitb14.pt", "--steps", "10", "--stop", "5", "--save-every", "2",
             "--log-every", "1", "--eval-every", "0", *few, "--out", f"{out}/haste"]

    call([*TORCHRUN, "data.py", "prepare", folder, f"{out}/sd", "--vae", f"{w}/sd.pt", *limit, *few], log, times,
         "prepare, SD")
    call([*TORCHRUN, "data.py", "prepare", folder, f"{out}/kl16", "--vae", f"{w}/kl16.pt", "--mirror", *limit, *few],
         log, times, "prepare, KL-16, mirror images too")
    call(haste, log, times, "HASTE, killed in step 4", kill_after=3)
    call(haste, log, times, "HASTE, the rest of 10 steps")
    call([*TORCHRUN, "sit.py", "--ckpt", f"{out}/haste/ckpt.pt", "--num", str(args.samples), "--steps", "10", "--cfg",
          "1.8", "--interval", "0", "0.7", *few, "--out", f"{out}/sit.npz"], log, times, "SiT samples")
    call([*TORCHRUN, "fid.py", f"{out}/sit.npz", folder, "--crop", "256", "--weights", f"{w}/inception.pt", "--json",
          *few], out / "fid.json", times, "FID")
    call([*TORCHRUN, "xar.py", "train", "--preset", "imagenet256-b", "--model", "xAR-Ti", "--data", f"{out}/kl16",
          "--steps", "10", "--log-every", "1", "--eval-every", "0", *few, "--out", f"{out}/xar"], log, times,
         "xAR, 10 steps")
    call([*TORCHRUN, "xar.py", "sample", "--ckpt", f"{out}/xar/ckpt.pt", "--num", "2", "--steps", "4", "--cfg", "2.7",
          *few, "--out", f"{out}/xar.npz"], log, times, "xAR samples")

    rows = run.read_log(out / "haste" / "log.jsonl")
    assert [r["step"] for r in rows] == list(range(1, 11)), "a step is missing from the log, or there twice"
    assert [r["step"] for r in rows if "feature_loss" in r] == [1, 2, 3, 4, 5], "the guidance did not end at step 5"
    for name, count in (("sit", args.samples), ("xar", 2)):
        with np.load(out / f"{name}.npz") as f:
            assert f["arr_0"].shape == (count, 256, 256, 3) and f["arr_0"].dtype == np.uint8
    scores = json.loads((out / "fid.json").read_text().strip().splitlines()[-1])
    assert np.isfinite(scores["fid"])
    print("\n| what | s |\n|---|---|\n" + "\n".join(f"| {k} | {s:.0f} |" for k, s in times.items()))
    return scores


if __name__ == "__main__":
    main()
