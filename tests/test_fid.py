"""fid.py against the published evaluators' numbers, closed forms, other people's code, and bad input."""
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, Golden, distance
from PIL import Image

import data
import fid


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def features(n, d, seed=0, mix=True):
    """[n,d] float64, correlated."""
    g = generator(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    return x @ (torch.eye(d) + 0.3 * torch.randn(d, d, generator=g)).double() if mix else x


def gaussian(x):
    return x.mean(0), torch.cov(x.T)


# ---- the network

@pytest.fixture(scope="module")
def golden_inception():
    g = Golden("inception")
    n, size = g.config["n"], g.config["size"]
    return g, (60 * g.draw("img", n, 3, size, size) + 128).clamp(0, 255).byte()


def test_inception_equals_the_published_networks(golden_inception):
    g, images = golden_inception
    found = g.fill(fid.Inception())(images)                                 # fill: keys and shapes are the published
    assert distance(found["pool"], g["pool_tf_resize"]) < 1e-5
    assert distance(found["logits"], g["logits_no_bias"]) < 1e-5
    assert distance(found["spatial"], g["spatial_tf_resize"]) < 1e-5
    assert distance(g.fill(fid.Inception("pytorch"))(images)["pool"], g["pool_pytorch_resize"]) < 1e-5


def test_batch_norms_are_folded_once_and_again_with_other_weights():
    """The first call folds; another state dict or another dtype folds again. No key is added."""
    def norms(seed):
        return {"conv.weight": torch.randn(4, 3, 3, 3, generator=generator(seed)), "bn.num_batches_tracked": torch.tensor(0),
                **{f"bn.{k}": torch.rand(4, generator=generator(seed + i)) + 0.5
                   for i, k in enumerate(("weight", "bias", "running_mean", "running_var"))}}

    def plain(sd, x):                                                       # convolution, then batch norm, unfolded
        x = torch.nn.functional.conv2d(x, sd["conv.weight"])
        x = torch.nn.functional.batch_norm(x, *(sd[f"bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias")),
                                           eps=1e-3)
        return x.relu()
    net, x = fid.Conv(3, 4, kernel_size=3).eval().requires_grad_(False), torch.randn(2, 3, 9, 9, generator=generator())
    for seed in (0, 10):
        assert net.load_state_dict(norms(seed)) and distance(net(x), plain(norms(seed), x)) < 1e-6
        assert net.state_dict().keys() == norms(seed).keys()
    kernel = net.folded[0]
    net(x)
    assert net.folded[0] is kernel
    assert distance(net.double()(x.double()), plain(norms(10), x)) < 1e-6 and net.folded[0].dtype == torch.float64
    whole = fid.Inception()
    assert not any("folded" in key for key in whole.state_dict())


def test_inception_takes_grey_bytes_and_knows_no_training_mode(golden_inception):
    g, images = golden_inception
    net = g.fill(fid.Inception())
    grey = images[:1, :1]
    expected = net(grey.expand(-1, 3, -1, -1))["pool"]
    assert torch.equal(net(grey)["pool"], expected) and torch.equal(net.train()(grey)["pool"], expected)
    with pytest.raises(ValueError, match="takes uint8"):
        net(images / 255)
    with pytest.raises(ValueError, match="resize 'tf2' is none of tf1, pytorch"):
        fid.Inception("tf2")


@pytest.mark.parametrize("height, width", [(32, 32), (299, 299), (640, 401)])
def test_tf1_resize_pixel_by_pixel(height, width):
    images = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8, generator=generator())
    found, x = fid.resize_tf1(images)[0], images[0].double()
    for row, column in [(0, 0), (1, 298), (150, 77), (298, 298), (298, 3)]:
        r, c = row * height / 299, column * width / 299
        r0, c0 = math.floor(r), math.floor(c)
        r1, c1 = min(r0 + 1, height - 1), min(c0 + 1, width - 1)
        top = x[:, r0, c0] * (1 - c + c0) + x[:, r0, c1] * (c - c0)
        low = x[:, r1, c0] * (1 - c + c0) + x[:, r1, c1] * (c - c0)
        expected = (top * (1 - r + r0) + low * (r - r0) - 128) / 128
        assert torch.allclose(found[:, row, column].double(), expected, atol=1e-4)      # float32, as TensorFlow
    assert found.shape == (3, 299, 299)


@pytest.fixture(scope="module")
def weights(tmp_path_factory, golden_inception):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(golden_inception[0].fill(fid.Inception()).state_dict(), path)
    return path


def test_weights_from_a_file_and_their_errors(weights, tmp_path, monkeypatch, golden_inception):
    images = golden_inception[1][:1]
    net = fid.load_inception(weights, "pytorch")
    assert torch.equal(net(images)["pool"], golden_inception[0].fill(fid.Inception("pytorch"))(images)["pool"])
    state = torch.load(weights, weights_only=True)
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}     # files older than that counter
    torch.save(old, tmp_path / "old.pth")
    assert torch.equal(fid.load_inception(tmp_path / "old.pth", "pytorch")(images)["pool"], net(images)["pool"])

    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:10_000])
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save([1], tmp_path / "list.pth")
    for name, message in [("cut.pth", "does not hold the Inception of FID, or is cut short"),
                          ("list.pth", "list.pth does not hold"), ("other.pth", "other.pth does not hold"),
                          ("no.pth", "--weights .*no.pth .*No such file")]:
        with pytest.raises((ValueError, OSError), match=message) as e:
            fid.load_inception(tmp_path / name)
        assert "\n" not in str(e.value)

    def offline(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "empty"))
    with pytest.raises(OSError, match="could not be fetched .no network.: download .*https://.* --weights"):
        fid.load_inception()


def test_fetched_weights_are_kept(weights, tmp_path, monkeypatch):
    calls = []

    def fetch(url, path, hash_prefix, **kwargs):
        calls.append((url, hash_prefix))
        torch.save(torch.load(weights, weights_only=True), path)
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert fid.load_inception().weights_sha == fid.load_inception().weights_sha
    assert calls == [(fid.INCEPTION_URL, "6726825d")]


# ---- Frechet distance

def test_metrics_equal_the_published_ones():
    g = Golden("metrics")
    n, d = g.config["n"], g.config["d"]
    a = g.draw("a", n, d).double() @ (torch.eye(d) + 0.3 * g.draw("ma", d, d)).double()
    b = g.draw("b", n, d).double() @ (torch.eye(d) + 0.3 * g.draw("mb", d, d)).double() + 0.2
    assert abs(fid.frechet_distance(*gaussian(a), *gaussian(b)) / float(g["fd"]) - 1) < 1e-6
    few = [gaussian(x[:d // 2]) for x in (a, b)]
    assert abs(fid.frechet_distance(*few[0], *few[1]) / float(g["fd_few"]) - 1) < 1e-6
    assert abs(fid.inception_score(2 * g.draw("logits", n, 30)) / float(g["inception_score"]) - 1) < 1e-6
    precision, recall = fid.precision_recall(real=b.float(), fake=a.float())
    assert (precision, recall) == pytest.approx(g["prc"][:2].tolist(), abs=1e-7)


@pytest.mark.parametrize("d", [1, 3, 64, 300])
def test_frechet_distance_equals_scipys_matrix_root(d):
    from scipy.linalg import sqrtm
    (mu1, s1), (mu2, s2) = gaussian(features(4 * d + 8, d, 1)), gaussian(features(5 * d + 8, d, 2) + 0.1)
    s1, s2 = s1.view(d, d), s2.view(d, d)
    expected = float((mu1 - mu2).square().sum() + s1.trace() + s2.trace()) - 2 * np.trace(sqrtm((s1 @ s2).numpy())).real
    found = fid.frechet_distance(mu1.numpy(), s1.numpy(), mu2, s2)          # arrays or tensors
    assert found == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_in_closed_form():
    x = features(500, 40)
    mu, sigma = gaussian(x)
    assert fid.frechet_distance(mu, sigma, mu, sigma) == 0
    assert fid.frechet_distance(mu, sigma, mu + 2, sigma) == (2 + mu - mu).square().sum()   # exactly |mu1 - mu2|^2
    q = torch.linalg.qr(features(40, 40, 1))[0]                             # covariances that commute: sum (s1 - s2)^2
    s1, s2 = torch.rand(2, 40, generator=generator(), dtype=torch.float64)
    commuting = (q * s1 ** 2) @ q.T, (q * s2 ** 2) @ q.T
    expected = (s1 - s2).square().sum().item()
    assert fid.frechet_distance(mu, commuting[0], mu, commuting[1]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n, m", [(2, 2), (20, 20), (30, 400), (400, 30)])
def test_fewer_images_than_dimensions(n, m):
    d = 200
    a, b = features(n, d, 1), features(m, d, 2) + 0.1
    found = fid.frechet_distance(*gaussian(a), *gaussian(b))
    # tr (S1 S2)^1/2 is the sum of singular values of the centred data's product: no covariance, no root of noise
    A, B = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b))
    expected = (a.mean(0) - b.mean(0)).square().sum() + A.square().sum() + B.square().sum() \
        - 2 * torch.linalg.svdvals(A @ B.T).sum()
    assert found == pytest.approx(expected.item(), rel=1e-9)
    assert found == pytest.approx(fid.frechet_distance(*gaussian(b), *gaussian(a)), rel=1e-9)       # swapped
    nearly = gaussian(a + 1e-9 * features(n, d, 3))
    assert 0 <= fid.frechet_distance(*gaussian(a), *nearly) < 1e-5


def test_frechet_distance_refuses_what_it_cannot_compare():
    mu, sigma = gaussian(features(10, 3))
    with pytest.raises(ValueError, match="made with the same features"):
        fid.frechet_distance(mu, sigma, *gaussian(features(10, 4)))
    with pytest.raises(ValueError, match="not finite"):
        fid.frechet_distance(mu, sigma, mu * math.nan, sigma)


@pytest.mark.parametrize("parts", [[100], [1, 99], [33, 33, 34], [2] * 50])
def test_streamed_moments_equal_those_of_the_whole(parts):
    x = features(100, 7) + 1e4                                              # far from 0: sums of squares would suffer
    streams = [fid.Moments(), fid.Moments()]
    for i, part in enumerate(x.split(parts)):
        streams[i % 2].add(part)
    whole = fid.Moments()
    for s in streams:
        if s.num:
            whole.merge(s)
    order = torch.cat([x.split(parts)[i] for j in (0, 1) for i in range(j, len(parts), 2)])
    assert torch.allclose(whole.gaussian()[0], order.mean(0), rtol=1e-13)
    assert torch.allclose(whole.gaussian()[1], torch.cov(order.T), rtol=1e-8, atol=1e-8)


# ---- the others

def test_inception_score_in_closed_form():
    assert fid.inception_score(torch.zeros(10, 5)) == pytest.approx(1)
    sure = 1000 * torch.eye(5).repeat(4, 1)
    assert fid.inception_score(sure) == pytest.approx(5)                    # five classes, none in doubt
    assert fid.inception_score(sure[:8], split_size=5) == pytest.approx((5 + 3) / 2)        # the last split is shorter
    assert fid.inception_score(sure.numpy(), split_size=1) == pytest.approx(1)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_their_definition(k, monkeypatch):
    monkeypatch.setattr(fid, "CHUNK", 7)                                    # many chunks, the last one shorter
    real, fake = features(50, 4, 1), features(40, 4, 2) * 1.5
    inside = lambda points, others: [any(
        math.dist(p, o) <= sorted(math.dist(o, n) for j, n in enumerate(others) if j != i)[k - 1]
        for i, o in enumerate(others)) for p in points]
    expected = np.mean(inside(fake.tolist(), real.tolist())), np.mean(inside(real.tolist(), fake.tolist()))
    assert fid.precision_recall(real, fake, k) == pytest.approx(expected)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    assert fid.precision_recall(fake, real, k) == pytest.approx(expected[::-1])
    assert fid.precision_recall(real, real, k) == (1, 1)
    assert fid.precision_recall(real, real + 100, k) == (0, 0)


def test_precision_of_equal_points():
    "Balls of radius 0 hold the points that are equal to their centre, whatever the rounding of their distance."
    point = 10 + features(1, 300)
    same = point.repeat(9, 1)
    assert fid.precision_recall(same, same) == (1, 1)
    assert fid.precision_recall(same, same + 1e-3) == (0, 0)
    with pytest.raises(ValueError, match="need more than 3 images on both sides, not 9 and 3"):
        fid.precision_recall(same, same[:3])


def test_kid_equals_its_definition():
    real, fake = features(30, 4, 1), features(20, 4, 2) * 1.2
    k = lambda x, y: (float(x @ y) / 4 + 1) ** 3
    own = lambda x: np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    expected = own(fake) + own(real[:20]) - 2 * np.mean([k(a, b) for a in fake for b in real[:20]])
    assert fid.kid(real[:20], fake, subsets=3, subset_size=20) == pytest.approx((expected, 0), abs=1e-9)
    mean, std = fid.kid(real.numpy(), fake.numpy(), subsets=20, subset_size=10)
    assert std > 0 and fid.kid(real, fake, 20, 10) == (mean, std) != fid.kid(real, fake, 20, 10, seed=1)
    with pytest.raises(ValueError, match="--kid-subset-size"):
        fid.kid(real, fake, subset_size=21)


def test_kid_is_unbiased():
    values = [fid.kid(features(40, 3, 2 * i, mix=False), features(40, 3, 2 * i + 1, mix=False), 1, 40)[0]
              for i in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(len(values)) and np.min(values) < 0


def test_pixel_features_do_not_tell_grey_from_its_rgb_copy(tmp_path, score):
    digits = data.open_data("digits")
    a, b = digits.train.images, digits.held.images
    grey, rgb = ([fid.pixel_features(x.expand(-1, c, -1, -1)) for x in (a, b)] for c in (1, 3))
    assert torch.equal(grey[0], a.double().flatten(1) / 255)                # an 8 x 8 image is its pixels
    expected = fid.frechet_distance(*gaussian(grey[0]), *gaussian(grey[1]))
    assert fid.frechet_distance(*gaussian(rgb[0]), *gaussian(rgb[1])) == pytest.approx(expected, rel=1e-9)
    np.savez(tmp_path / "held.npz", arr_0=data.to_rgb(b).permute(0, 2, 3, 1).numpy())       # as samples are written
    assert score(tmp_path / "held.npz", "digits", *PIXELS)[0]["fd"] == pytest.approx(expected, rel=1e-9)


# ---- one pass

def small_network(images):
    x = fid.pixel_features(images)
    return {"pool": x, "spatial": x[:, :5] + 1, "logits": x[:, :10]}


def test_one_pass_gives_the_same_for_any_batch():
    images = data.open_data("digits").held.images
    whole = fid.extract(images, small_network, batch_size=len(images), keep=["pool", "logits"])
    assert torch.equal(whole.kept["pool"], fid.pixel_features(images)) and whole.num == 297
    assert whole.gaussians.keys() == {"pool", "spatial"}
    parts = fid.extract(images, small_network, batch_size=10, keep=["logits"])
    assert torch.equal(parts.kept["logits"], whole.kept["logits"]) and "pool" not in parts.kept
    for name in whole.gaussians:
        for a, b in zip(whole.gaussians[name], parts.gaussians[name]):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_one_pass_refuses_nan_and_a_single_image():
    images = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8, generator=generator())

    def bad(batch):
        x = fid.pixel_features(batch)
        return {"pool": torch.where((batch == images[6]).flatten(1).all(1)[:, None], math.nan, x)}
    with pytest.raises(ValueError, match="pool features of image 6 are not finite"):
        fid.extract(images, bad, batch_size=4)
    with pytest.raises(ValueError, match="1 image.s. have no covariance"):
        fid.extract(images[:1], small_network)


# ---- the program

@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same 60 pictures as a folder, as .npz plain and compressed, and as a .pt tensor; and 50 others as .npz."""
    top = tmp_path_factory.mktemp("sources")
    images = torch.randint(0, 256, (110, 16, 16, 3), dtype=torch.uint8, generator=generator()).numpy()
    for i, image in enumerate(images[:60]):
        path = top / "folder" / f"{i % 3}" / f"{i:03}{['.png', '.PNG', '.bmp'][i % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (top / "folder" / "notes.txt").write_text("no image")
    order = [int(f.stem) for f in fid.ImageFiles(top / "folder").files]
    np.savez(top / "plain.npz", images[:60][order], np.arange(60))
    np.savez_compressed(top / "compressed.npz", images[:60][order])
    torch.save(torch.from_numpy(images[:60][order]).permute(0, 3, 1, 2).clone(), top / "tensor.pt")
    np.savez(top / "other.npz", images[60:])
    return top


PIXELS = ["--features", "pixels", "--batch-size", "16"]


@pytest.fixture
def score(capsys):
    """Call fid.py with --json; returns its results and what it said."""
    def call(*words):
        capsys.readouterr()
        fid.main([*map(str, words), "--json"])
        out = capsys.readouterr()
        return json.loads(out.out), out.err
    return call


def test_all_sources_of_the_same_images_give_the_same(sources, score):
    found = {name: score(sources / name, sources / "other.npz", *PIXELS)[0]
             for name in ("folder", "plain.npz", "compressed.npz", "tensor.pt")}
    assert all(row == found["folder"] for row in found.values())
    row = found["folder"]
    assert row.keys() == {"fd", "precision", "recall", "kid", "kid_std", "num_samples", "num_reference", "features"}
    assert (row["num_samples"], row["num_reference"]) == (60, 50) and row["fd"] > 0
    real, fake = (fid.pixel_features(fid.open_images(sources / n)[0][:]) for n in ("other.npz", "plain.npz"))
    assert row["fd"] == pytest.approx(fid.frechet_distance(*gaussian(fake), *gaussian(real)), rel=1e-9)
    assert (row["precision"], row["recall"]) == fid.precision_recall(real, fake)
    assert row["kid"] == pytest.approx(fid.kid(real, fake, subset_size=50)[0])


def test_statistics_stand_in_for_their_images(sources, score, tmp_path):
    stats = tmp_path / "new" / "stats.npz"
    fid.main([str(sources / "other.npz"), "--save-stats", str(stats), *PIXELS])
    with np.load(stats) as f:
        assert {*f.files} == {"mu", "sigma", "num", "features"}
    direct, _ = score(sources / "folder", sources / "other.npz", *PIXELS)
    row, said = score(sources / "folder", stats, *PIXELS)
    assert row["fd"] == pytest.approx(direct["fd"], rel=1e-12) and "precision" not in row and row["num_reference"] == 50
    assert "statistics of 50 images" in said
    with np.load(stats) as f, np.load(sources / "other.npz") as images:     # ADM's reference batches hold both
        np.savez(tmp_path / "both.npz", arr_0=images["arr_0"], mu=f["mu"], sigma=f["sigma"])
    row, said = score(sources / "folder", tmp_path / "both.npz", *PIXELS)
    assert row["fd"] == pytest.approx(direct["fd"], rel=1e-12) and row["precision"] == direct["precision"]
    assert "statistics of unknown numbers of images; a network that the file does not name" in said
    assert score(tmp_path / "both.npz", sources / "other.npz", *PIXELS)[0]["fd"] == 0          # samples: its images


@pytest.mark.slow
def test_inception_end_to_end(sources, weights, score, tmp_path):
    fewer = tmp_path / "few.pt"
    torch.save(torch.load(sources / "tensor.pt")[:6], fewer)
    flags = ["--weights", weights, "--batch-size", "4"]
    stats = tmp_path / "stats.npz"
    fid.main([str(fewer), "--save-stats", str(stats), *map(str, flags)])
    row, said = score(fewer, stats, *flags)
    assert row["fid"] == row["sfid"] == 0 and row["is"] >= 1 and "precision" not in row
    assert "6 images are few, and FID is biased upwards" in said and "inception, tf1 resize, weights" in said
    with np.load(stats) as f:
        assert f["mu"].shape == (2048,) and f["mu_s"].shape == (2023,) and f["sigma_s"].shape == (2023, 2023)
    with pytest.raises(SystemExit, match="holds statistics of inception, tf1 resize.* not of .*pytorch resize"):
        fid.main([str(fewer), str(stats), "--resize", "pytorch", *map(str, flags)])
    with pytest.raises(SystemExit, match="holds statistics of inception.* not of pixels"):
        fid.main([str(fewer), str(stats), *PIXELS])
    only, _ = score(fewer, "--metrics", "is", *flags)
    assert only["is"] == pytest.approx(row["is"]) and "fid" not in only


@pytest.mark.parametrize("flags", [["--kid-subsets", "3"], ["--kid-subset-size", "10"],
                                   ["--metrics", "fid", "recall"]])
def test_each_flag_changes_the_result(flags, sources, score):
    a, b = (score(sources / "folder", sources / "other.npz", *PIXELS, *f)[0] for f in ([], flags))
    assert a != b


def test_split_size_and_crop(sources, score, tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "load_network", lambda args, device: (small_network, "small"))
    sizes = [score(sources / "folder", "--metrics", "is", "--split-size", n)[0]["is"] for n in (60, 7)]
    assert sizes[0] != sizes[1]
    Image.new("RGB", (20, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (30, 20), "red").save(tmp_path / "b.JPEG")
    row, _ = score(tmp_path, sources / "folder", "--crop", 16, "--metrics", "fid", "--features", "pixels")
    assert row["num_samples"] == 2
    with pytest.raises(SystemExit, match=r"mixed sizes: .*b.JPEG is 30 x 20, .*a.png is 20 x 30; --crop SIZE"):
        fid.main([str(tmp_path), str(sources / "folder"), "--features", "pixels"])


def test_every_metric_is_made_of_its_own_features(sources, score, monkeypatch):
    monkeypatch.setattr(fid, "load_network", lambda args, device: (small_network, "small"))
    row, _ = score(sources / "folder", sources / "other.npz")
    fake, real = (small_network(fid.open_images(sources / n)[0][:]) for n in ("plain.npz", "other.npz"))
    for metric, name in (("fid", "pool"), ("sfid", "spatial")):
        expected = fid.frechet_distance(*gaussian(fake[name]), *gaussian(real[name]))
        assert row[metric] == pytest.approx(expected, rel=1e-9)
    assert row["is"] == pytest.approx(fid.inception_score(fake["logits"]))


def test_statistics_of_every_origin(sources, score, tmp_path, monkeypatch):
    """ADM's with images but no number, pytorch-fid's without spatial features, two files, and what cannot be had."""
    monkeypatch.setattr(fid, "load_network", lambda args, device: (small_network, "small"))
    stats = [tmp_path / "a.npz", tmp_path / "b.NPZ"]
    fid.main([str(sources / "folder"), "--save-stats", str(stats[0])])
    fid.main([str(sources / "other.npz"), "--save-stats", str(tmp_path / "b.npz")])
    (tmp_path / "b.npz").rename(stats[1])
    images, _ = score(sources / "folder", sources / "other.npz")
    with np.load(stats[1]) as f:
        arrays = {n: f[n] for n in f.files if n not in ("num", "features")}
    with np.load(sources / "other.npz") as f:
        np.savez(tmp_path / "adm.npz", arr_0=f["arr_0"], arr_1=np.array([{}]), **arrays)
    row, said = score(sources / "folder", tmp_path / "adm.npz")
    assert row["num_reference"] is None and "statistics of unknown numbers" in said
    assert "adm.npz: 50 images are few" not in said
    assert row["sfid"] == pytest.approx(images["sfid"], rel=1e-9) and row["recall"] == images["recall"]
    np.savez(tmp_path / "pytorch.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    row, _ = score(sources / "folder", tmp_path / "pytorch.npz")
    assert "sfid" not in row and row["fid"] == pytest.approx(images["fid"], rel=1e-9)
    with pytest.raises(SystemExit, match="--metrics sfid cannot be had: .* statistics with mu_s and sigma_s"):
        fid.main([str(sources / "folder"), str(tmp_path / "pytorch.npz"), "--metrics", "sfid"])
    monkeypatch.setattr(fid, "load_network", None)                          # two files of statistics need no network
    row, _ = score(*stats)
    assert [row["fid"], row["sfid"]] == pytest.approx([images["fid"], images["sfid"]], rel=1e-9)
    with pytest.raises(SystemExit, match="--save-stats needs images, and .*a.npz holds statistics"):
        fid.main([str(stats[0]), "--save-stats", str(tmp_path / "c.npz")])


def test_dinov2_features_are_the_class_token(sources, score, monkeypatch):
    import teacher
    net = teacher.DINOv2(embed_dim=16, depth=2, num_heads=2).eval()
    asked = []
    monkeypatch.setattr(teacher, "load_dinov2", lambda *a: asked.append(a) or net)
    row, said = score(sources / "tensor.pt", sources / "other.npz", "--features", "dinov2", "--weights", "w.pth")
    assert asked == [("dinov2_vitl14", "w.pth")] and net.grid == (16, 16) and "dinov2_vitl14" in said
    images = fid.open_images(sources / "tensor.pt")[0], fid.open_images(sources / "other.npz")[0][:]
    with torch.no_grad():
        fake, real = (net.features(teacher.normalise(torch.nn.functional.interpolate(
            x.float(), (224, 224), mode="bicubic", antialias=True).clamp(0, 255)))[0].double() for x in images)
    assert row["fd"] == pytest.approx(fid.frechet_distance(*gaussian(fake), *gaussian(real)), rel=1e-4)


def test_class_folders_are_mixed_and_links_followed(tmp_path):
    for c in "ab":
        (tmp_path / "real" / c).mkdir(parents=True)
        for i in range(20):
            save_png(tmp_path / "real" / c / f"{i:02}.png", "L")
    (tmp_path / "linked").mkdir()
    for c in "ab":
        (tmp_path / "linked" / c).symlink_to(tmp_path / "real" / c)
    names = [[str(f)[-6:] for f in fid.ImageFiles(tmp_path / n).files] for n in ("real", "linked")]
    assert sorted(names[0]) == sorted(names[1]) and len(names[0]) == 40
    files = [f.parent.name for f in fid.ImageFiles(tmp_path / "linked").files]
    assert 5 <= files[:20].count("a") <= 15
    assert [f.name for f in fid.ImageFiles(tmp_path / "real" / "a").files] == [f"{i:02}.png" for i in range(20)]


def test_precision_is_left_out_of_large_sets_unless_asked_for(sources, score, monkeypatch):
    monkeypatch.setattr(fid, "MANY_IMAGES", 55)
    assert "precision" not in score(sources / "folder", sources / "other.npz", *PIXELS)[0]
    assert "precision" in score(sources / "folder", sources / "other.npz", *PIXELS, "--metrics", "precision")[0]


def test_table_and_named_sets(capsys):
    fid.main(["digits", "digits", "--features", "pixels", "--metrics", "fid", "precision"])
    assert capsys.readouterr().out.split() == ["fd", "0.00000", "precision", "1.00000"]


@pytest.mark.slow
def test_known_values_of_cifar10():
    """FID of CIFAR-10's first 5,000 training to its first 5,000 test images, Inception Score of all for training."""
    weights = Path(torch.hub.get_dir(), "checkpoints", Path(fid.INCEPTION_URL).name)
    if not weights.is_file():
        pytest.skip(f"needs {fid.INCEPTION_URL} as {weights}")
    try:
        sets = [torchvision.datasets.CIFAR10(ROOT / "out" / "data", train=train) for train in (True, False)]
    except RuntimeError:
        pytest.skip("needs torchvision's CIFAR-10 in out/data")
    train, test = (torch.from_numpy(s.data).permute(0, 3, 1, 2) for s in sets)
    net = fid.load_inception(weights)
    assert net.weights_sha == fid.INCEPTION_SHA
    order = np.random.RandomState(2020).permutation(len(train))
    a, b = (fid.extract(x[:5000], net) for x in (train, test))
    assert fid.compare(a, b, ["fid"])["fid"] == pytest.approx(10.3233, abs=0.01)
    everything = fid.extract(train[order], net, keep=["logits"])
    assert fid.compare(everything, None, ["is"])["is"] == pytest.approx(11.2368, abs=0.01)


def save_png(path, mode, **info):
    Image.new(mode, (8, 8)).save(path, **info)


BAD_IMAGES = {
    "deep grey": (lambda p: save_png(p, "I;16"), "more than 8 bits a channel"),
    "float": (lambda p: Image.new("F", (8, 8)).save(p, "TIFF"), "more than 8 bits a channel"),
    "transparent": (lambda p: save_png(p, "RGBA"), "partly transparent"),
    "transparent palette": (lambda p: save_png(p, "P", transparency=0), "partly transparent"),
    "no image": (lambda p: p.write_text("hello"), "cannot be decoded .cannot identify image"),
    "truncated": (lambda p: (Image.effect_noise((64, 64), 50).save(p), p.write_bytes(p.read_bytes()[:900])),
                  "cannot be decoded"),
    "other size": (lambda p: Image.new("RGB", (8, 9)).save(p), "mixed sizes"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_image_is_named_and_nothing_is_written(case, tmp_path):
    make, message = BAD_IMAGES[case]
    for name in ("a.png", "b.png"):
        save_png(tmp_path / name, "RGB")
    make(tmp_path / "c.png")
    with pytest.raises(SystemExit, match=f"fid.py: .*c.png .*{message}|fid.py: images of {message}: .*c.png") as e:
        fid.main([str(tmp_path), "--save-stats", str(tmp_path / "out" / "stats.npz"), *PIXELS])
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_long_panorama_is_refused_where_it_would_be_enlarged(tmp_path):
    Image.new("RGB", (8, 900)).save(tmp_path / "long.png")
    assert fid.read_image(tmp_path / "long.png").size == (8, 900)
    with pytest.raises(ValueError, match="long.png is more than 100 times as long as wide"):
        fid.read_image(tmp_path / "long.png", partial(fid.center_crop, size=256))


@pytest.mark.parametrize("kind", data.CROPS)
def test_crop_is_the_one_of_the_training_data(tmp_path, kind):
    for name, size in (("a.png", (61, 40)), ("b.png", (150, 333)), ("c.png", (16, 17))):
        Image.effect_noise(size, 80).convert("RGB").save(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            expected = data.center_crop(image, 16, kind)
        found = fid.read_image(tmp_path / name, partial(fid.center_crop, size=16, kind=kind))
        assert found.tobytes() == expected.tobytes()


def test_kind_of_the_crop(score, tmp_path):
    """adm if none is named; the other kind gives other features."""
    for i in range(4):
        Image.effect_noise((90, 61), 80).convert("RGB").save(tmp_path / f"{i}.png")
    stats = tmp_path / "stats.npz"
    fid.main([str(tmp_path), "--crop", "16", "--save-stats", str(stats), *PIXELS])
    values = [score(tmp_path, stats, "--crop", 16, *flags, *PIXELS, "--metrics", "fid")[0]["fd"]
              for flags in ([], ["--crop-kind", "adm"], ["--crop-kind", "square-lanczos"])]
    assert values[0] == values[1] == 0 < values[2]


def test_deep_rgb_png_is_refused(tmp_path):
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header, rows = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0), b"".join(b"\0" + bytes(6 * 8) for _ in range(8))
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                                        + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match="deep.png has more than 8 bits"):
        fid.read_image(tmp_path / "deep.png")


def test_grey_palette_and_opaque_images_are_taken_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(np.stack([grey] * 3 + [np.full_like(grey, 255)], -1)).save(tmp_path / "b.png")     # opaque RGBA
    Image.fromarray(grey).convert("P").save(tmp_path / "c.png")
    Image.fromarray(grey > 128).save(tmp_path / "d.png")                    # one bit a pixel
    Image.new("RGB", (72, 56)).save(tmp_path / "e.bmp")                     # rows of 216 bytes are no 16 bits
    assert fid.read_image(tmp_path / "e.bmp").size == (72, 56)
    (tmp_path / "e.bmp").unlink()
    images = fid.ImageFiles(tmp_path)[:]
    assert all(torch.equal(x, torch.from_numpy(grey).expand(3, -1, -1)) for x in images[:3])
    assert torch.equal(images[3, 0], torch.from_numpy((grey > 128) * np.uint8(255)))


def bad_sources(top):
    rng = np.random.default_rng(0)
    np.savez(top / "floats.npz", rng.random((4, 8, 8, 3)))
    np.savez(top / "names.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    np.savez(top / "half.npz", mu=np.zeros(3))
    np.savez(top / "one.npz", np.zeros((1, 8, 8, 3), np.uint8))
    np.savez(top / "nan.npz", mu=np.full(192, np.nan), sigma=np.eye(192))
    np.savez(top / "shape.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(top / "good.npz", rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8))
    (top / "cut.npz").write_bytes((top / "good.npz").read_bytes()[:3000])
    damaged = bytearray((top / "good.npz").read_bytes())
    damaged[3000] ^= 255
    (top / "damaged.npz").write_bytes(damaged)
    (top / "empty").mkdir()
    torch.save({"x": 1}, top / "dict.pt")
    (top / "text.pt").write_text("hello")


BAD_SOURCES = {"floats.npz": "arr_0 is not images, uint8 .N,H,W,3.$",
               "names.npz": "neither images .arr_0. nor statistics .mu, sigma. but images$",
               "half.npz": "neither images .* but mu$", "one.npz": "1 image", "nan.npz": "not finite",
               "shape.npz": "made with the same features", "cut.npz": "cut.npz cannot be read",
               "damaged.npz": "damaged.npz is damaged .*copy it again",
               "empty": "empty holds no images", "dict.pt": "not a tensor of images, uint8 .N,3,H,W.$",
               "text.pt": "cannot be read", "missing": "does not exist"}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_bad_source_ends_with_one_line(name, tmp_path):
    bad_sources(tmp_path)
    with pytest.raises(SystemExit, match=f"fid.py: .*(?:{BAD_SOURCES[name]})") as e:
        fid.main([str(tmp_path / "good.npz"), str(tmp_path / name), *PIXELS])
    assert "\n" not in str(e.value) and (name in str(e.value) or name in ("one.npz", "nan.npz", "shape.npz"))


def test_a_card_of_its_own_for_every_process(monkeypatch):
    """Under torchrun each takes its local rank's card, and --device cuda:N would put all on one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **options: taken.append(options["device_id"]))
    assert fid.join_processes("cuda:1") == torch.device("cuda:1") and fid.join_processes("cuda").index == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    taken.clear()
    assert fid.join_processes("cuda") == torch.device("cuda:1") and taken == [torch.device("cuda:1")] * 2
    with pytest.raises(ValueError, match="--device cuda:0 is not here: use auto or cpu, cuda:1"):
        fid.join_processes("cuda:0")


@pytest.mark.parametrize("words, message", [
    ([], "give SAMPLES and REFERENCE"), (["digits"], "give SAMPLES and REFERENCE, or SAMPLES with --save"),
    (["digits", "digits", "--batch-size", "0"], "--batch-size: 0 must be 1 or more"),
    (["digits", "digits", "--kid-subset-size", "1"], "--kid-subset-size: 1 must be 2 or more"),
    (["digits", "digits", "--features", "pixels", "--kid-subset-size", "1501"],
     "--kid-subset-size 1501 must lie between 2 and the smaller set's 1500"),
    (["digits", "digits", "--crop", "8"], "--crop is for folders of images: SAMPLES and REFERENCE are none"),
    (["digits", "digits", "--crop-kind", "adm"], "--crop-kind adm needs --crop SIZE"),
    (["digits", "--save-stats", "stats.txt"], "must end in .npz"),
    (["digits", "digits", "--features", "pixels", "--metrics", "is"], "--metrics is cannot be had"),
    (["digits", "--features", "pixels", "--metrics", "kid"], "--metrics kid cannot be had"),
    (["digits", "digits", "--metric"], "unrecognized arguments: --metric; did you mean --metrics"),
    (["digits", "digits", "--device", "gpu"], "--device gpu is not here: use auto or cpu"),
    (["digits", "digits", "--features", "pixels", "--data-root", "--json"], "--data-root: expected one argument"),
])
def test_bad_flags_end_with_one_line(words, message):
    with pytest.raises(SystemExit, match=message) as e:
        fid.main(words)
    assert "\n" not in str(e.value)


def test_digits_and_torchvision_sets_by_name(tmp_path):
    assert torch.equal(fid.open_images("digits")[0], data.open_data("digits").train.images)
    raw = tmp_path / "MNIST" / "raw"                                        # as torchvision leaves it
    raw.mkdir(parents=True)
    images = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8, generator=generator())
    for name in ("train", "t10k"):
        header = struct.pack(">IIII", 2051, 5, 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 5) + bytes(5))
    assert torch.equal(fid.open_images("mnist", root=tmp_path)[0], images[:, None])
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="mnist could not be downloaded to .*file .* --data-root") as e:
        fid.open_images("mnist", root=tmp_path / "file")
    assert "\n" not in str(e.value)


def test_statistics_that_cannot_be_written_name_the_flag(sources, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="--save-stats .*file/stats.npz could not be written") as e:
        fid.main([str(sources / "other.npz"), "--save-stats", str(tmp_path / "file" / "stats.npz"), *PIXELS])
    assert "\n" not in str(e.value)


def test_statistics_are_written_whole_or_not_at_all(sources, tmp_path, monkeypatch):
    def full(f, **arrays):
        f.write(b"half of it")
        raise OSError(28, "No space left on device")
    stats = tmp_path / "stats.npz"
    stats.write_text("the one before")
    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(SystemExit, match="--save-stats .*stats.npz could not be written .*No space left"):
        fid.main([str(sources / "other.npz"), "--save-stats", str(stats), *PIXELS])
    assert stats.read_text() == "the one before" and [f.name for f in tmp_path.iterdir()] == ["stats.npz"]


def test_progress_is_printed_while_it_lasts(sources, capsys, monkeypatch):
    clock = iter(range(0, 1000, 7))
    monkeypatch.setattr(fid.time, "perf_counter", lambda: next(clock))
    fid.extract(fid.open_images(sources / "plain.npz")[0], small_network, batch_size=10, progress="plain.npz")
    assert capsys.readouterr().err.splitlines() == [f"plain.npz: {p} % of 60 images" for p in (33, 66, 100)]


# ---- alone: fid.py copied into an empty folder is a whole program

@pytest.fixture
def alone(tmp_path):
    """Call fid.py, copied into an empty folder with the named files beside it; returns what the program left."""
    def call(*words, beside=(), launch=()):
        shutil.rmtree(tmp_path / "alone", ignore_errors=True)
        (tmp_path / "alone").mkdir()
        for name in ("fid.py", *beside):
            shutil.copy(ROOT / name, tmp_path / "alone")
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return subprocess.run([sys.executable, *launch, "fid.py", *map(str, words)], cwd=tmp_path / "alone",
                              env={**env, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    return call


@pytest.mark.slow
def test_alone_with_every_source(alone, sources, tmp_path, score):
    stats = tmp_path / "stats.npz"
    words = [sources / "folder", "digits", *PIXELS]
    done = alone(*words, "--save-stats", stats, beside=["digits.npz"])
    expected, _ = score(*words)
    names = ("fd", "precision", "recall", "kid", "kid_std")
    assert done.stdout == "".join(f"{name:10}{expected[name]:12.5f}\n" for name in names), done.stderr
    for name in ("tensor.pt", "plain.npz"):
        done = alone(sources / name, stats, *PIXELS, "--json")
        assert json.loads(done.stdout) == score(sources / name, stats, *PIXELS)[0], done.stderr
    assert {f.name for f in (tmp_path / "alone").iterdir()} <= {"fid.py", "__pycache__"}


@pytest.mark.slow
@pytest.mark.parametrize("words, missing", [
    (["digits", "digits", *PIXELS], "digits needs digits.npz"),
    (["plain.npz", "other.npz", "--features", "dinov2"], "--features dinov2 needs teacher.py")])
def test_alone_says_what_is_missing(words, missing, alone, sources):
    done = alone(*[sources / word if word.endswith(".npz") else word for word in words])
    assert done.returncode == 1 and done.stderr == f"fid.py: {missing} beside fid.py: copy it there\n"


@pytest.mark.slow
def test_alone_under_torchrun(alone, sources, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [sources / "folder", sources / "other.npz", *PIXELS, "--json"]
    one, two = (json.loads(alone(*words, launch=launch).stdout) for launch in ((), torchrun))
    assert one == {k: v if isinstance(v, str) else pytest.approx(v, rel=1e-9, abs=1e-12) for k, v in two.items()}

    (tmp_path / "mixed").mkdir()
    for i in range(4):                                                      # only the second process finds it
        Image.new("RGB", (8, 8 + i // 3)).save(tmp_path / "mixed" / f"{i}.png")
    for name, message in (("missing", "missing does not exist"), (tmp_path / "mixed", "images of mixed sizes")):
        done = alone(name, sources / "folder", *PIXELS, launch=torchrun)
        assert done.returncode != 0 and not done.stdout
        assert done.stderr.count(f"fid.py: {message}") == 2 and "RuntimeError" not in done.stderr


# ---- against other people's programs

def lively_inception(images):
    """Weights whose features differ from image to image, as trained ones do: norms fitted to images [B,H,W,3]."""
    torch.manual_seed(0)
    net = torchvision.models.Inception3(1008, aux_logits=False, init_weights=True).train()
    for m in net.modules():
        if isinstance(m, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(m.weight)
        if isinstance(m, torch.nn.BatchNorm2d):
            m.momentum = 1                                                  # keep what the last batch had
    torch.nn.init.normal_(net.fc.weight, std=0.1)
    with torch.no_grad():
        net(fid.resize_tf1(images.permute(0, 3, 1, 2)))
    return net.state_dict()


@pytest.mark.slow
def test_agrees_with_pytorch_fid_and_torch_fidelity(tmp_path, score):
    "Through the command lines, on real images: CIFAR-10's where they are at hand, else the digits."
    pytest.importorskip("pytorch_fid", reason="pip install pytorch-fid torch-fidelity")
    pytest.importorskip("torch_fidelity", reason="pip install pytorch-fid torch-fidelity")
    n, folders = 60, [tmp_path / "a", tmp_path / "b"]
    archive = ROOT.parent / "shared" / "data" / "cifar10.tar.xz"
    if archive.exists():
        with tarfile.open(archive) as tar:                                  # the first images in the file
            images = [Image.open(tar.extractfile(m)) for m, _ in zip((m for m in tar if m.isfile()), range(8 * n))]
            for image in images:
                image.load()
    else:
        images = [Image.fromarray(i[0].numpy()).resize((32, 32)) for i in data.open_data("digits").train.images]
    for folder, chosen in zip(folders, (images[::8], images[5::8])):
        folder.mkdir()
        for i, image in enumerate(chosen[:n]):
            image.convert("RGB").save(folder / f"{i:04}.png")
    weights = tmp_path / "inception.pth"
    some = torch.stack([torch.from_numpy(np.array(i.convert("RGB"))) for i in images[:32]])
    torch.save(lively_inception(some), weights)
    hub = tmp_path / "torch" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / fid.INCEPTION_URL.rsplit("/", 1)[1]).symlink_to(weights)         # pytorch-fid has no flag for them

    def run(*words):
        done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=tmp_path,
                              env={**os.environ, "TORCH_HOME": str(tmp_path / "torch")})
        assert done.returncode == 0, done.stderr[-1000:]
        return done.stdout

    flags = ["--weights", weights, "--batch-size", "30"]
    ours, _ = score(*folders, *flags, "--kid-subset-size", n, "--kid-subsets", 2)
    theirs = json.loads(run("-m", "torch_fidelity.fidelity", "--cpu", "--json", "--isc", "--fid", "--kid", "--prc",
                            "--silent", "--no-samples-shuffle", "--isc-splits", 1, "--kid-subset-size", n,
                            "--kid-subsets", 2, "--feature-extractor", "inception-v3-compat",
                            "--feature-layer-prc", 2048, "--input1", folders[0], "--input2", folders[1],
                            "--feature-extractor-weights-path", weights))
    names = {"fid": "frechet_inception_distance", "is": "inception_score_mean", "kid": "kernel_inception_distance_mean",
             "precision": "precision", "recall": "recall"}
    for name, key in names.items():
        print(f"{name}: fid.py {ours[name]:.8f}, torch-fidelity {theirs[key]:.8f}")
        assert ours[name] == pytest.approx(theirs[key], rel=1e-4), name
    pytorch, _ = score(*folders, *flags, "--resize", "pytorch", "--metrics", "fid")
    its = float(run("-m", "pytorch_fid", "--device", "cpu", "--batch-size", 30, *folders).split()[-1])
    print(f"fid: fid.py --resize pytorch {pytorch['fid']:.8f}, pytorch-fid {its:.8f}")
    assert pytorch["fid"] == pytest.approx(its, rel=1e-4)
    assert abs(pytorch["fid"] / ours["fid"] - 1) > 1e-3                     # the resize matters


