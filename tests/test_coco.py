"""Photographs with captions, all the way: prepared, trained on two processes, killed, resumed, sampled and scored."""
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from conftest import ROOT, rows_of, same_weights, tiny_vae
from fill import fill_state_dict
from PIL import Image
from processes import checkpoint, finish, kill_all, start, torchrun, wait_for_step

import data
import evaluate
import haste_train
import prepare
import sample as program
import teacher
import text
import xar_train

PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "imagenet_sample.tar"
MERGES = ["a t</w>", "c at</w>", "d o", "do g</w>", "o n</w>", "m at</w>"]
CAPTIONS = ["a cat on a mat", "a dog", "a dog on a mat", "on a mat: a cat", "a cat, a dog"]
FEW = ["--depth", "4", "--hidden-size", "32", "--num-heads", "2", "--projector-dim", "16", "--batch-size", "4",
       "--lr", "0.002", "--ema", "0.5", "--log-every", "1", "--eval-every", "0", "--device", "cpu",
       "--feature-depth", "2", "--pairs", "1:1", "--no-compile", "--stop", "3"]


def make_world(folder, files):
    """Files {name: bytes} with hand-written captions; an autoencoder, a text tower and a teacher of filled weights."""
    photos = folder / "photos"
    photos.mkdir()
    content = {"images": [], "annotations": []}
    for i, (name, raw) in enumerate(files.items()):
        (photos / name).write_bytes(raw)
        content["images"].append({"id": 100 - i, "file_name": name})
        for j in range(1 + i % 3):
            content["annotations"].append({"image_id": 100 - i, "caption": CAPTIONS[(i + j) % len(CAPTIONS)]})
    (folder / "captions.json").write_text(json.dumps(content))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]))
    for name, width, seed in (("clip", 64, 0), ("other", 64, 1), ("wide", 128, 0)):
        net = text.ClipText(512 + len(MERGES) + 2, 16, width, 2, 1)
        torch.save(fill_state_dict(net.state_dict(), seed), folder / f"{name}.pt")
    tiny_vae(folder / "vae.pt")
    vit = teacher.DINOv2(56, embed_dim=16, depth=2, num_heads=2)
    vit.load_state_dict(fill_state_dict(vit.state_dict(), 0))
    config = dict(img_size=56, embed_dim=16, depth=2, num_heads=2)
    torch.save({"config": config, "model": vit.state_dict()}, folder / "teacher.pt")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Twelve photographs."""
    if not PHOTOGRAPHS.exists():
        pytest.skip(f"{PHOTOGRAPHS.name} is not at hand: the sample of ImageNet's photographs")
    files = {}
    with tarfile.open(PHOTOGRAPHS) as tar:
        members = [m for m in tar if m.isfile() and m.name.lower().endswith((".jpg", ".jpeg", ".png"))][:12]
        for i, member in enumerate(members):
            files[f"photo_{i:02d}.{member.name.rsplit('.', 1)[1]}"] = tar.extractfile(member).read()
    return make_world(tmp_path_factory.mktemp("coco"), files)


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Six pictures of noise, for the tests that need no photographs."""
    files = {}
    for i in range(6):
        raw = io.BytesIO()
        Image.effect_noise((40 + i, 33), 80).convert("RGB").save(raw, "png")
        files[f"{i}.png"] = raw.getvalue()
    return make_world(tmp_path_factory.mktemp("noise"), files)


@pytest.fixture
def call(tmp_path):
    """Start a program on two processes."""
    return lambda *words: start([*torchrun(2), *words], tmp_path / "process.log")


def packing(world, packed, *flags, tower="clip.pt"):
    return ["prepare.py", world / "photos", packed, "--captions", world / "captions.json", "--crop", "square-lanczos",
            "--size", "32", "--vae", world / "vae.pt", "--text", world / tower, "--merges", world / "merges.txt",
            "--device", "cpu", *flags]


def training(world, packed, out, *flags):
    return ["haste_train.py", "--preset", "coco256", "--data", packed, "--image-size", "32", "--teacher", "small",
            "--teacher-weights", world / "teacher.pt", "--vae", world / "vae.pt", "--out", out, *FEW, *flags]


@pytest.mark.slow
@pytest.mark.parametrize("features", [False, True])
def test_the_whole_chain_on_photographs(world, tmp_path, call, features):
    packed, out = tmp_path / "packed", tmp_path / "run"
    kind, tower = (["--text-features"], []) if features else ([], ["--text", str(world / "clip.pt")])
    finish(call(*packing(world, packed, *kind)))
    images = data.open_data(str(packed))
    assert len(images.train) == 12 and images.text["features"] is features and images.classes == []

    # two steps, killed, resumed over the end of the alignment: the same as straight
    finish(call(*training(world, packed, out, "--steps", "2", *tower)))
    killed = call(*training(world, packed, out, "--steps", "100000", "--save-every", "1000000", *tower))
    wait_for_step(killed, out, 4)
    kill_all(killed)
    finish(call(*training(world, packed, out, "--steps", "5", *tower)))
    finish(call(*training(world, packed, tmp_path / "straight", "--steps", "5", *tower)))
    resumed, straight = checkpoint(out), checkpoint(tmp_path / "straight")
    assert resumed["steps"] == 5 and same_weights(resumed["ema"], straight["ema"])
    rows = rows_of(out)
    assert [("attention_loss" in r, "feature_loss" in r) for r in rows] == [(True, True)] * 3 + [(False, False)] * 2

    # samples for the captions of the set itself, and for one's own words
    common = ["--ckpt", str(out / "ckpt.pt"), "--steps", "3", "--cfg", "2", "--vae", str(world / "vae.pt"),
              "--device", "cpu"]
    finish(call("sample.py", *common, *tower, "--captions", packed, "--samples", "12", "--out", tmp_path / "samples.npz"))
    with np.load(tmp_path / "samples.npz") as f:
        assert f["arr_0"].shape == (12, 32, 32, 3) and f["arr_1"].tolist() == list(range(12))
    program.main([*common, "--text", str(world / "clip.pt"), "--merges", str(world / "merges.txt"), "--out", str(tmp_path / "own.png"), "--samples", "6",
                  "a dog on a cat", "a mat"])
    assert Image.open(tmp_path / "own.png").height == 2 * (64 + evaluate.CAPTION_HEIGHT)

    printed = finish(call("fid.py", tmp_path / "samples.npz", world / "photos", "--crop", "32", "--crop-kind",
                          "square-lanczos", "--features", "pixels", "--device", "cpu"))
    assert "precision" in printed


# ---- without photographs: what does not fit

@pytest.fixture
def programs(noise, tmp_path, capsys):
    """Run a program in this process; `refused` returns its one line."""
    mains = {"prepare.py": prepare.main, "haste_train.py": haste_train.main, "sample.py": program.main}

    def run(*words):
        mains[words[0]]([str(word) for word in words[1:]])

    def refused(*words):
        with pytest.raises(SystemExit) as error:
            run(*words)
        assert "\n" not in str(error.value)
        return str(error.value)
    return run, refused


def test_text_flag(noise, tmp_path, programs):
    """The text tower is the one that the captions were prepared with, in training, on resume and when sampling."""
    run, refused = programs
    packed, out = tmp_path / "packed", tmp_path / "run"
    run(*packing(noise, packed))
    train = training(noise, packed, out, "--steps", "1")
    assert "other.pt is not the text encoder" in refused(*train, "--text", noise / "other.pt")
    assert "wide.pt is not the text encoder" in refused(*train, "--text", noise / "wide.pt")
    run(*train, "--text", noise / "clip.pt")
    again = training(noise, packed, out, "--steps", "2", "--text", noise / "clip.pt")

    (tmp_path / "copy.pt").write_bytes((noise / "clip.pt").read_bytes())
    run(*training(noise, packed, out, "--steps", "2", "--text", tmp_path / "copy.pt"))      # its place may change
    packed.rename(tmp_path / "first")
    run(*packing(noise, packed, tower="other.pt"))
    assert "another text encoder" in refused(*again, "--steps", "3")

    draw = ["sample.py", "--ckpt", out / "ckpt.pt", "--steps", "2", "--vae", noise / "vae.pt", "--device", "cpu",
            "--out", tmp_path / "x.png"]
    assert "was prepared with another text encoder" in refused(*draw, "--captions", packed)
    own = [*draw, "--merges", noise / "merges.txt"]
    assert "is not the text encoder" in refused(*own, "--text", noise / "other.pt", "a cat")
    assert "--merges" in refused(*own, "--captions", tmp_path / "first", "--text", noise / "clip.pt")
    assert "give captions after the flags" in refused(*draw)
    run(*own, "--text", noise / "clip.pt", "a cat", "a dog on a mat and a cat and a dog and a cat on a mat")


def test_packed_features_need_no_tower(noise, tmp_path, programs):
    run, refused = programs
    packed, out = tmp_path / "packed", tmp_path / "run"
    run(*packing(noise, packed, "--text-features"))
    train = training(noise, packed, out, "--steps", "1")
    assert "is not needed: the captions are packed as features" in refused(*train, "--text", noise / "clip.pt")
    run(*train)
    draw = ["sample.py", "--ckpt", out / "ckpt.pt", "--steps", "2", "--vae", noise / "vae.pt", "--device", "cpu",
            "--out", tmp_path / "x.png", "--captions", packed, "--cfg", "2"]
    run(*draw)
    assert Image.open(tmp_path / "x.png").height > 32

    # an official checkpoint does not know its tower: the widths must still agree
    saved = torch.load(out / "ckpt.pt", weights_only=True)
    torch.save({"ema": saved["ema"], "arch": {"num_heads": 2, "input_size": 16}}, tmp_path / "official.pt")
    other = tmp_path / "wide"
    run(*packing(noise, other, "--text-features", tower="wide.pt"))
    assert "reads features of width 64, and these captions have 128" in refused(
        *draw, "--ckpt", tmp_path / "official.pt", "--captions", other)


def test_a_model_of_words_draws_no_photographs(noise, tmp_path, programs):
    run, refused = programs
    packed = tmp_path / "packed"
    run(*packing(noise, packed))
    run("haste_train.py", "--preset", "scenes", "--steps", "1", "--eval-every", "0", "--depth", "1", "--hidden-size",
        "16", "--num-heads", "2", "--device", "cpu", "--out", tmp_path / "run")
    assert "was prepared with another text encoder" in refused("sample.py", "--ckpt", tmp_path / "run" / "ckpt.pt",
                                                               "--captions", packed)
    assert "has captions, and xAR takes class labels" in xar_refusal(packed, tmp_path)


def xar_refusal(packed, tmp_path):
    with pytest.raises(SystemExit) as error:
        xar_train.main(["--data", str(packed), "--device", "cpu", "--out", str(tmp_path / "xar")])
    return str(error.value)
