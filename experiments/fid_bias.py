"""How the number of images biases a Frechet distance: two disjoint halves of CIFAR-10's test images, pixel features.

    python experiments/fid_bias.py FOLDER      FOLDER/class/image files; seconds on two cores

Both halves come from one distribution, so the true distance is 0: what is printed is bias, and falls like 1/N.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import fid  # noqa: E402


def gaussian(x):
    return x.mean(0), torch.cov(x.T)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="class folders of images of one size")
    parser.add_argument("--repeats", type=int, default=3, help="random halves for each number")
    args = parser.parse_args()
    images = data.ImageFiles(args.folder)
    features = torch.cat([fid.pixel_features(images[slice(i, i + 500)]) for i in range(0, len(images), 500)])
    print(f"{len(features)} images, {features.shape[1]} features\n")
    print("| images a side (N) | distance | N x distance |\n|---|---|---|")
    N = [n for n in (100, 200, 500, 1000, 2000, 5000) if 2 * n <= len(features)]
    for n in N:
        values = []
        for seed in range(args.repeats):
            order = np.random.default_rng(seed).permutation(len(features))
            values.append(fid.frechet_distance(*gaussian(features[order[:n]]), *gaussian(features[order[n:2 * n]])))
        print(f"| {n} | {np.mean(values):.4f} ± {np.std(values, ddof=1):.4f} | {n * np.mean(values):.0f} |")


if __name__ == "__main__":
    main()
