"""Clutter: composed from (seed, row) alone, judged by a classifier that is right, trained by both programs."""
import numpy as np
import pytest
import torch
from conftest import TINY, TINY_XAR, rows_of

import clutter
import data
import evaluate
import fid
import haste_train
import xar_train


@pytest.fixture(scope="module")
def images():
    return data.open_data("clutter")


@pytest.fixture(scope="session")
def judge_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("judge")


@pytest.fixture
def quick_judge(monkeypatch, judge_cache):
    """A judge of 60 steps, which is right about as often as not: enough to see that it is asked."""
    make = clutter.make_judge
    monkeypatch.setattr(clutter, "make_judge", lambda train, cache: make(train, cache, steps=60))
    return judge_cache


def composed(digits, labels, u):
    """The image of a row's random numbers u [18], pixel by pixel."""
    M = len(digits)
    canvas = np.zeros((16, 16), np.uint8)

    def put(square, top, left):
        for r, line in enumerate(square):
            for c, value in enumerate(line):
                canvas[top + r, left + c] = max(canvas[top + r, left + c], int(value))

    which = int(u[0] * M)
    for i in range(3):
        source, top, left, to_top, to_left = u[3 + 5 * i:8 + 5 * i]
        other = digits[(which + 1 + int(source * (M - 1))) % M, 0].numpy()
        top, left = int(top * 5), int(left * 5)
        put(other[top:top + 4, left:left + 4] // 2, int(to_top * 13), int(to_left * 13))
    put(digits[which, 0].numpy(), int(u[1] * 9), int(u[2] * 9))
    return canvas, int(labels[which])


def test_images_are_composed_as_told(images):
    digits = data.open_data("digits").train
    u = np.random.RandomState(0).rand(40, 18)
    found, labels = images.train.read(torch.arange(40))
    for i in range(40):
        canvas, label = composed(digits.images, digits.labels, u[i])
        assert np.array_equal(found[i, 0].numpy(), canvas) and labels[i] == label


def test_an_image_depends_on_seed_and_row_alone(images):
    digits = data.open_data("digits").train
    few = clutter.ClutterSet(digits.images, digits.labels, 50, seed=0)
    other = clutter.ClutterSet(digits.images, digits.labels, 50, seed=1)
    rows = torch.tensor([7, 3, 49, 3])
    assert all(torch.equal(a, b) for a, b in zip(few.read(rows), images.train.read(rows)))
    assert not torch.equal(other.read(rows)[0], few.read(rows)[0])


def test_the_set_is_what_it_says(images):
    train, held = images.train, images.held
    assert (len(train), len(held), images.shape, images.classes) == (30_000, 2_000, (1, 16, 16), list("0123456789"))
    assert len(train.place.unique(dim=0)) == 81 and train.put.min() == 0 and train.put.max() == 12
    assert (train.source != train.digit[:, None]).all() and train.labels.bincount().min() > 2_500
    assert not {d.numpy().tobytes() for d in train.images} & {d.numpy().tobytes() for d in held.images}


def test_judge_is_trained_once_and_leaves_random_numbers_alone(images, tmp_path):
    state = torch.get_rng_state()
    first = clutter.make_judge(images.train, tmp_path, steps=3)
    again = clutter.make_judge(images.train, tmp_path, steps=3)
    assert torch.equal(state, torch.get_rng_state()) and len(list(tmp_path.glob("*.pt"))) == 1
    pixels, _ = images.held.read(torch.arange(8))
    assert all(torch.equal(a, b) for a, b in zip(first(pixels), again(pixels)))
    clutter.make_judge(images.train, tmp_path, steps=4)                     # other settings, another file
    assert len(list(tmp_path.glob("*.pt"))) == 2


def test_a_damaged_judge_ends_with_one_line(images, tmp_path):
    for cut in (0, 100, 5_000):
        clutter.make_judge(images.train, tmp_path, steps=1)
        file = next(tmp_path.glob("judge-*.pt"))
        file.write_bytes(file.read_bytes()[:cut])
        with pytest.raises(ValueError, match="is damaged.*: delete it, and the classifier is trained again"):
            clutter.make_judge(images.train, tmp_path, steps=1)
        file.unlink()
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="--cache .*file cannot be written .*: choose another place"):
        clutter.make_judge(images.train, tmp_path / "file", steps=1)


@pytest.mark.slow
def test_judge_is_right_about_digits_it_has_never_seen(images, tmp_path):
    judge = clutter.make_judge(images.train, tmp_path)
    pixels, labels = images.held.read(torch.arange(2_000))
    features, logits = judge(pixels)
    assert (logits.argmax(1) == labels).double().mean() > 0.98
    features, _ = judge(images.train.read(torch.arange(5_000))[0])
    alive = features.std(0) > 0.1                                           # a few never respond
    assert alive.sum() > 50 and features.mean(0).abs().max() < 0.2
    assert (features.std(0)[alive] - 1).abs().max() < 0.3


def test_scores(images, quick_judge):
    """Real images in the order of their classes are right as often as the judge is; others by chance."""
    sets = evaluate.reference(images, cache=quick_judge)
    order = torch.stack([(images.train.labels == c).nonzero()[:40, 0] for c in range(10)], dim=1).flatten()
    pixels, labels = images.train.read(order)
    row = evaluate.scores(pixels, sets, 10)
    features, logits = sets["judge"](pixels)
    assert row.keys() == {"fd", "fd_pixels", "accuracy"}
    assert row["accuracy"] == (logits.argmax(1) == labels).double().mean() > 0.4
    assert evaluate.scores(pixels.roll(1, 0), sets, 10)["accuracy"] < 0.25
    real = sets["features"].numpy()
    fake = features.double().numpy()
    expected = fid.frechet_distance(fake.mean(0), np.cov(fake.T), real.mean(0), np.cov(real.T))
    assert abs(row["fd"] / expected - 1) < 1e-6
    assert row["fd_pixels"] < 0.2                                           # 400 images of the same set
    noise = torch.randint(0, 256, pixels.shape, dtype=torch.uint8)
    assert evaluate.scores(noise, sets, 10)["fd"] > 10 * row["fd"]


@pytest.mark.parametrize("program, flags", [(haste_train, TINY), (xar_train, TINY_XAR)], ids=["haste", "xar"])
def test_both_programs_train_on_it(program, flags, quick_judge, tmp_path, capsys):
    model = ["--model", "SiT-Ti/4", "--align", "none"] if program is haste_train else []
    program.main([*flags, *model, "--data", "clutter", "--cache", str(quick_judge), "--out", str(tmp_path / "run")])
    assert len(list(quick_judge.glob("judge-*.pt"))) == 1
    scored = [row for row in rows_of(tmp_path / "run") if "fd" in row]
    assert [row["step"] for row in scored] == [2, 4]
    assert all(row.keys() >= {"fd", "fd_pixels", "accuracy"} and "nearest" not in row for row in scored)
    assert "on the features of its classifier" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    (["--model", "MMDiT-Ti/4"], "--data clutter has class labels, which --model MMDiT-Ti/4 does not take"),
    (["--image-size", "32"], "--image-size 32 does not fit --data clutter"),
    (["--latent-channels", "4"], "--latent-channels 4 is for packed data"),
    (["--eval-features", "inception"], "--eval-features inception is for photographs: leave it out"),
])
def test_refused(flags, message, tmp_path):
    with pytest.raises(SystemExit, match=message) as e:
        haste_train.main(["--data", "clutter", "--model", "SiT-Ti/4", "--out", str(tmp_path), *flags])
    assert "\n" not in str(e.value)
