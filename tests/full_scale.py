"""Give every command of a full-scale run, from photographs to scores, at sizes for two CPU cores.

    python tests/full_scale.py FOLDER               16 images of FOLDER/class/*.JPEG, some minutes
    python tests/full_scale.py FOLDER --images 100

No pretrained weights are needed: autoencoders, DINOv2 and Inception get filled weights, so the
numbers mean nothing, but the commands, the files between them and their sizes are those of
ImageNet. Training is killed once on the way.
"""
import argparse
import json
import shlex
import time
from pathlib import Path

import numpy as np
import torch

from conftest import rows_of  # it adds the root and golden/
from fill import fill_state_dict
from processes import finish, kill_all, start, torchrun, wait_for_step

import fid
import teacher
import vae


def weights(folder):
    """Write files of filled weights, laid out like the published ones; return {name: path}."""
    folder.mkdir(parents=True)
    files = {}
    for name, net in (("sd", vae.AutoencoderKL((1, 2, 4, 4), 4)),
                      ("kl16", vae.AutoencoderKL((1, 1, 2, 2, 4), 16, True)),
                      ("dinov2_vitb14", teacher.DINOv2()), ("inception", fid.Inception())):
        files[name] = folder / f"{name}.pt"
        torch.save(fill_state_dict(net.state_dict()), files[name])
    return files


def call(words, log, kill_after=None):
    """Run a program on two processes; return the seconds that it took.

    With `kill_after`, kill it and its workers once its log has so many steps.
    """
    words = [str(word) for word in words]
    print("torchrun --nproc_per_node=2 " + shlex.join(words), flush=True)
    begun = time.time()
    process = start([*torchrun(2), *words], log)
    if kill_after is None:
        finish(process, timeout=3600)
    else:
        out = words[words.index("--out") + 1]
        wait_for_step(process, out, kill_after, timeout=3600)
        kill_all(process)
    return time.time() - begun


def run_all(folder, images, samples, out):
    """Give every command; return the seconds that each took."""
    w = weights(out / "weights")
    log = out / "log.txt"
    few = ["--device", "cpu", "--batch-size", "4"]
    limit = ["--limit", images]
    short = ["--steps", "10", "--log-every", "1", "--eval-every", "0"]
    sd = ["prepare.py", folder, out / "sd", "--vae", w["sd"], *limit, *few]
    kl16 = ["prepare.py", folder, out / "kl16", "--vae", w["kl16"], "--mirror", *limit, *few]
    haste = ["haste_train.py", "--preset", "imagenet256-xl", "--model", "SiT-S/2",
             "--data", out / "sd", "--teacher-weights", w["dinov2_vitb14"], "--stop", "5",
             "--save-every", "2", *short, *few, "--out", out / "haste"]
    sit_samples = ["sample.py", "--ckpt", out / "haste" / "ckpt.pt", "--samples", samples,
                   "--steps", "10", "--cfg", "1.8", "--interval", "0", "0.7", *few,
                   "--out", out / "sit.npz"]
    score = ["fid.py", out / "sit.npz", folder, "--crop", "256", "--weights", w["inception"],
             "--json", *few]
    xar = ["xar_train.py", "--preset", "imagenet256-b", "--model", "xAR-Ti", "--data", out / "kl16",
           *short, *few, "--out", out / "xar"]
    xar_samples = ["sample.py", "--ckpt", out / "xar" / "ckpt.pt", "--samples", "2", "--steps", "4",
                   "--cfg", "2.7", *few, "--out", out / "xar.npz"]

    times = {}
    times["prepare, SD"] = call(sd, log)
    times["prepare, KL-16, mirror images too"] = call(kl16, log)
    times["HASTE, killed in step 4"] = call(haste, log, kill_after=3)
    times["HASTE, the rest of 10 steps"] = call(haste, log)
    times["SiT samples"] = call(sit_samples, log)
    times["FID"] = call(score, out / "fid.json")
    times["xAR, 10 steps"] = call(xar, log)
    times["xAR samples"] = call(xar_samples, log)
    return times


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", help="class folders of photographs")
    add("--images", type=int, default=16, help="how many of them")
    add("--samples", type=int, default=8, help="images to sample")
    add("--out", default="out/full_scale", help="folder, new for each use")
    args = parser.parse_args(argv)
    out = Path(args.out).resolve()
    if out.exists():
        raise SystemExit(f"--out {args.out} exists: name a new folder, or delete it")
    times = run_all(Path(args.folder).resolve(), args.images, args.samples, out)

    rows = rows_of(out / "haste")
    guided = [r["step"] for r in rows if "feature_loss" in r]
    assert [r["step"] for r in rows] == list(range(1, 11)), "a step is missing, or there twice"
    assert guided == [1, 2, 3, 4, 5], "the guidance did not end at step 5"
    for name, count in (("sit", args.samples), ("xar", 2)):
        with np.load(out / f"{name}.npz") as f:
            assert f["arr_0"].shape == (count, 256, 256, 3) and f["arr_0"].dtype == np.uint8
    scores = json.loads((out / "fid.json").read_text().strip().splitlines()[-1])
    assert np.isfinite(scores["fid"])
    print("\n| what | s |\n|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
