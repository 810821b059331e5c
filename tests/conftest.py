import json
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")                               # faster, for operations as small as these

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"
sys.path[:0] = [str(ROOT), str(GOLDEN)]

import data  # noqa: E402
import evaluate  # noqa: E402
import haste_train  # noqa: E402
import prepare  # noqa: E402
import teacher  # noqa: E402
import vae  # noqa: E402
import xar_train  # noqa: E402
from fill import draw, fill_state_dict  # noqa: E402


class Golden:
    """A golden file: its arrays as tensors, its configuration, and its weights and inputs made again."""

    def __init__(self, name):
        self.arrays = np.load(GOLDEN / f"{name}.npz")
        self.config = json.loads(str(self.arrays["config"]))

    def __getitem__(self, key):
        return torch.from_numpy(self.arrays[key])

    def draw(self, name, *shape):
        return torch.from_numpy(draw(name, *shape, seed=self.config["seed"]))

    def fill(self, model, skip=()):
        """Load the filled weights; the model's names and shapes must be the official ones, all of them."""
        assert {k: list(v.shape) for k, v in model.state_dict().items()} == self.config["keys"]
        model.load_state_dict(fill_state_dict(model.state_dict(), self.config["seed"], skip))
        return model.eval()


def distance(a, b):
    """Relative distance in norm."""
    return float((a.double() - b.double()).norm() / b.double().norm())


# A run of a fraction of a second: four blocks 32 wide, 8 images a step.
TINY = ["--depth", "4", "--hidden-size", "32", "--num-heads", "2", "--projector-dim", "16", "--batch-size", "8",
        "--steps", "4", "--stop", "3", "--warmup", "2", "--lr", "0.02", "--ema", "0.5", "--log-every", "1",
        "--eval-every", "2", "--eval-samples", "20", "--eval-steps", "2", "--device", "cpu", "--resume", "never"]


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory):
    """File of a small teacher that was trained for two steps: enough to be looked up to."""
    folder, digits = tmp_path_factory.mktemp("teacher"), data.open_data("digits")
    teacher.train_small(data.to_rgb(digits.train.images), digits.train.labels, embed_dim=16, num_heads=2,
                        steps=2, cache=folder)
    return next(folder.glob("teacher-*.pt"))


@pytest.fixture
def tiny_run(tmp_path, small_teacher):
    """Call haste_train with flags on top of TINY; returns (log rows without times, checkpoint)."""
    def call(*flags, out="run"):
        out = tmp_path / out
        haste_train.main([*TINY, "--out", str(out), "--cache", str(tmp_path / "cache"),
                          "--teacher-weights", str(small_teacher), *flags])
        return rows_of(out), torch.load(out / "ckpt.pt", weights_only=True) if (out / "ckpt.pt").exists() else None
    return call


def tiny_vae(path, seed=0, ch_mult=(1, 1), channels=4):
    """File of a small autoencoder of filled weights."""
    net = vae.AutoencoderKL(ch_mult, channels)
    torch.save(fill_state_dict(net.state_dict(), seed), path)
    return path


def photographs(folder, classes="abc", each=4, seed=0):
    """Class folders of small smooth pictures of many shapes."""
    rng = np.random.default_rng(seed)
    for c in classes:
        (folder / c).mkdir(parents=True)
        for i in range(each):
            coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
            coarse.resize((20 + 7 * i, 40 - 5 * i), Image.BICUBIC).save(folder / c / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def packed_folder(tmp_path_factory):
    """12 pictures of 16 x 16 pixels with latents [4,8,8], mirror images too."""
    top = tmp_path_factory.mktemp("packed")
    prepare.main([str(photographs(top / "photos")), str(top / "set"), "--size", "16", "--mirror",
                  "--vae", str(tiny_vae(top / "vae.pt")), "--device", "cpu"])
    return top / "set"


TINY_XAR = ["--depth", "2", "--hidden-size", "16", "--num-heads", "2", "--entity", "cell:4", "--batch-size", "8",
            "--steps", "4", "--lr", "0.02", "--ema", "0.5", "--log-every", "1",
            "--eval-every", "2", "--eval-samples", "20", "--eval-steps", "2", "--device", "cpu", "--resume", "never"]


# with a teacher for three steps, and two encoder blocks
GUIDED_XAR = ["--align", "haste", "--stop", "3", "--depth", "4", "--feature-depth", "2", "--pairs", "0:1,2:3",
              "--projector-dim", "16"]


@pytest.fixture
def tiny_xar(tmp_path, small_teacher):
    """As tiny_run, for xar_train.py."""
    def call(*flags, out="run", base=TINY_XAR):
        xar_train.main([*base, "--out", str(tmp_path / out), "--cache", str(tmp_path / "cache"),
                        "--teacher-weights", str(small_teacher), *flags])
        return rows_of(tmp_path / out), torch.load(tmp_path / out / "ckpt.pt", weights_only=True)
    return call


def rows_of(out):
    rows = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_s")} for r in rows]


def same_weights(a, b, keys=("model", "ema", "opt")):
    """Bit-for-bit equality of nested dicts of tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_weights(a[k], b[k])
                                            for k in (a.keys() if not set(keys) <= a.keys() else keys))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same_weights(x, y) for x, y in zip(a, b))
    return a == b


@pytest.fixture
def photo_folder(tmp_path):
    """Three classes of four 40 x 48 images, one grey, one with transparency, one with a suffix in capitals."""
    rng = np.random.default_rng(0)
    for c in "abc":
        (tmp_path / "photos" / c).mkdir(parents=True)
        for i, mode in enumerate(("RGB", "L", "RGBA", "RGB")):
            shape = (48, 40) + ((len(mode),) if len(mode) > 1 else ())
            image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode)
            image.save(tmp_path / "photos" / c / f"{i}.{'PNG' if i == 3 else 'png'}")
    return tmp_path / "photos"


@pytest.fixture(autouse=True)
def few_curves(request, monkeypatch):
    """Only the tests that look at curves.png draw it: matplotlib would take half of the time."""
    if "leaves_its_files" not in request.node.name:
        monkeypatch.setattr(evaluate, "plot_curves", lambda *args: None)


@pytest.fixture(autouse=True)
def signals_restored():
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)
