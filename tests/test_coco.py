"""Photographs with captions, all the way: prepared, trained on two processes, killed, resumed, sampled and scored."""
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
import sample as program
import teacher
import text

PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "imagenet_sample.tar"
MERGES = ["a t</w>", "c at</w>", "d o", "do g</w>", "o n</w>", "m at</w>"]
CAPTIONS = ["a cat on a mat", "a dog", "a dog on a mat", "on a mat: a cat", "a cat, a dog"]
FEW = ["--depth", "4", "--hidden-size", "32", "--num-heads", "2", "--projector-dim", "16", "--batch-size", "4",
       "--lr", "0.002", "--ema", "0.5", "--log-every", "1", "--eval-every", "0", "--device", "cpu",
       "--feature-depth", "2", "--pairs", "1:1", "--no-compile", "--stop", "3"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Twelve photographs with hand-written captions; an autoencoder, a text tower and a teacher of filled weights."""
    if not PHOTOGRAPHS.exists():
        pytest.skip(f"{PHOTOGRAPHS.name} is not at hand: the sample of ImageNet's photographs")
    folder = tmp_path_factory.mktemp("coco")
    photos = folder / "photos"
    photos.mkdir()
    content = {"images": [], "annotations": []}
    with tarfile.open(PHOTOGRAPHS) as tar:
        files = [m for m in tar if m.isfile() and m.name.lower().endswith((".jpg", ".jpeg", ".png"))][:12]
        for i, member in enumerate(files):
            name = f"photo_{i:02d}.{member.name.rsplit('.', 1)[1]}"
            (photos / name).write_bytes(tar.extractfile(member).read())
            content["images"].append({"id": 100 - i, "file_name": name})
            for j in range(1 + i % 3):
                content["annotations"].append({"image_id": 100 - i, "caption": CAPTIONS[(i + j) % len(CAPTIONS)]})
    (folder / "captions.json").write_text(json.dumps(content))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]))
    net = text.ClipText(512 + len(MERGES) + 2, 16, 64, 2, 1)
    torch.save(fill_state_dict(net.state_dict(), 0), folder / "clip.pt")
    tiny_vae(folder / "vae.pt")
    vit = teacher.DINOv2(56, embed_dim=16, depth=2, num_heads=2)
    vit.load_state_dict(fill_state_dict(vit.state_dict(), 0))
    config = dict(img_size=56, embed_dim=16, depth=2, num_heads=2)
    torch.save({"config": config, "model": vit.state_dict()}, folder / "teacher.pt")
    return folder


@pytest.fixture
def call(tmp_path):
    """Start a program on two processes."""
    return lambda *words: start([*torchrun(2), *words], tmp_path / "process.log")


def training(world, packed, out, *flags):
    return ["haste_train.py", "--preset", "coco256", "--data", packed, "--image-size", "32", "--teacher", "small",
            "--teacher-weights", world / "teacher.pt", "--vae", world / "vae.pt", "--out", out, *FEW, *flags]


@pytest.mark.slow
@pytest.mark.parametrize("features", [False, True])
def test_the_whole_chain_on_photographs(world, tmp_path, call, features):
    packed, out = tmp_path / "packed", tmp_path / "run"
    kind, tower = (["--text-features"], []) if features else ([], ["--text", str(world / "clip.pt")])
    finish(call("prepare.py", world / "photos", packed, "--captions", world / "captions.json", "--crop",
                "square-lanczos", "--size", "32", "--vae", world / "vae.pt", "--text", world / "clip.pt", "--merges",
                world / "merges.txt", "--device", "cpu", *kind))
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
