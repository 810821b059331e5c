"""Measure how the number of images biases a Frechet distance, on two disjoint halves of one set.

    python -m experiments.fid_bias FOLDER      FOLDER/class/image files; seconds on two cores

Both halves come from one distribution, so their true distance is 0: what this prints is the bias of
the distance on pixel features. It falls like 1/N. Run it from the repository's root.
"""
import argparse

import numpy as np
import torch

import fid

SIZES = (100, 200, 500, 1000, 2000, 5000)


def gaussian(x):
    return x.mean(0), torch.cov(x.T)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="class folders of images of one size")
    parser.add_argument("--repeats", type=int, default=3, help="random halves for each number")
    args = parser.parse_args()

    images = fid.ImageFiles(args.folder)
    starts = range(0, len(images), 500)
    features = torch.cat([fid.pixel_features(images[i:i + 500]) for i in starts])   # [images,F]
    print(f"{len(features)} images, {features.shape[1]} features\n")
    print("| images a side (N) | distance | N x distance |\n|---|---|---|")
    for n in SIZES:
        if 2 * n > len(features):
            break
        values = []
        for seed in range(args.repeats):
            order = np.random.default_rng(seed).permutation(len(features))
            one = gaussian(features[order[:n]])
            other = gaussian(features[order[n:2 * n]])
            values.append(fid.frechet_distance(*one, *other))
        mean = np.mean(values)
        print(f"| {n} | {mean:.4f} ± {np.std(values, ddof=1):.4f} | {n * mean:.0f} |")


if __name__ == "__main__":
    main()
