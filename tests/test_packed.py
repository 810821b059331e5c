"""Packed data: prepared whole or in pieces, read as it was written, trained on; bad input is one line."""
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GUIDED_XAR, ROOT, distance, photographs, same_weights, tiny_vae
from PIL import Image

import align
import data
import haste_train
import packed
import prepare as prepare_program
import run
import vae
import xar
import xar_train

ARRAYS = ("images", "moments", "labels", "done")


def arrays(folder):
    return {name: np.load(folder / f"{name}.npy") for name in ARRAYS}


@pytest.fixture
def prepare(tmp_path, capsys):
    """Call prepare.py with --size 16 and a tiny autoencoder; returns OUT."""
    net = tiny_vae(tmp_path / "vae.pt")

    def call(folder, *flags, out="set"):
        prepare_program.main([str(folder), str(tmp_path / out), "--size", "16", "--vae", str(net), "--device", "cpu",
                              "--batch-size", "4", *flags])
        return tmp_path / out
    return call


# ---- what is written

def test_arrays_are_crops_and_their_moments(packed_folder):
    photos, net = packed_folder.parent / "photos", vae.load_vae(packed_folder.parent / "vae.pt")
    about, found = packed.read_about(packed_folder), arrays(packed_folder)
    files = json.loads((packed_folder / "files.json").read_text())
    assert about["classes"] == ["a", "b", "c"] and about["complete"] and about["rows"] == len(files) == 12
    assert files == [f"{c}/{i}.png" for c in "abc" for i in range(4)]
    assert found["labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4 and found["done"].all()
    for i, file in enumerate(files):
        crop = np.array(data.center_crop(Image.open(photos / file), 16)).transpose(2, 0, 1)
        assert np.array_equal(found["images"][i], crop)
        for view, x in zip(found["moments"][i], (crop, crop[:, :, ::-1].copy())):           # mirror images second
            mean, std = net.encode(data.to_pixels(torch.from_numpy(x)[None]))
            assert distance(torch.from_numpy(view)[None].float(), torch.cat([mean, std], 1)) < 1e-3         # float16


def test_moments_are_made_in_full_float32(prepare, tmp_path, monkeypatch):
    """Not in TF32, which has fewer digits than the float16 that is stored; also if a program before asked for it."""
    def settings():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    seen, encode, before = [], vae.AutoencoderKL.encode, settings()
    monkeypatch.setattr(vae.AutoencoderKL, "encode", lambda *args: seen.append(settings()) or encode(*args))
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        prepare(photographs(tmp_path / "photos", "a"))
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    assert seen and set(seen) == {("highest", False)}


def test_copies_have_the_same_fingerprint_and_other_sets_another(prepare, tmp_path):
    """Processes compare it before they train."""
    photos = photographs(tmp_path / "photos")
    sets = [prepare(photos, out="a"), shutil.copytree(tmp_path / "a", tmp_path / "copy"),
            prepare(photographs(tmp_path / "others", seed=1), out="b"), prepare(photos, "--limit", "9", out="c")]
    found = [data.open_data(str(folder)).fingerprint() for folder in sets]
    assert found[0] == found[1] and len(set(found)) == 3
    labels = np.load(sets[1] / "labels.npy")
    np.save(sets[1] / "labels.npy", labels[::-1])
    assert data.open_data(str(sets[1])).fingerprint() != found[0]
    digits = data.open_data("digits")
    was = digits.fingerprint()
    digits.train.images = digits.train.images.flip(0)
    assert digits.fingerprint() != was == data.open_data("digits").fingerprint()


def test_latents_are_draws_from_the_posterior(packed_folder):
    s = data.open_data(str(packed_folder))
    assert s.shape == (4, 8, 8) and s.size == 16 and len(s.train) == 12 and s.held is None
    rows, mirrored, noise = torch.tensor([5, 0, 5]), torch.tensor([True, False, False]), torch.randn(3, 4, 8, 8)
    x = data.to_latents(s.train.moments(rows), mirrored, noise, s.packed["scale"])
    for i, (row, view) in enumerate(((5, 1), (0, 0), (5, 0))):
        mean, std = torch.from_numpy(arrays(packed_folder)["moments"])[row, view].float().chunk(2)
        assert torch.allclose(x[i], 0.18215 * (mean + std * noise[i]))
    pixels, labels = s.train.read(rows)
    assert torch.equal(pixels, torch.from_numpy(arrays(packed_folder)["images"])[rows]) and labels.tolist() == [1, 0, 1]
    assert s.train.read(rows[:1])[0].shape == (1, 3, 16, 16) and s.train.moments(rows[:1]).shape == (1, 2, 8, 8, 8)


def test_interrupted_preparation_resumes(prepare, tmp_path, monkeypatch, capsys):
    photos = photographs(tmp_path / "photos")
    whole, encode, calls = arrays(prepare(photos, out="whole")), vae.AutoencoderKL.encode, []

    def interrupted(self, x):
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, x)
    monkeypatch.setattr(vae.AutoencoderKL, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(photos)
    assert not packed.read_about(tmp_path / "set")["complete"]
    with pytest.raises(ValueError, match="set is not finished: run prepare.py once more"):
        data.open_data(str(tmp_path / "set"))
    out = prepare(photos)
    assert calls == [4, 4, 4, 4] and all(np.array_equal(a, whole[k]) for k, a in arrays(out).items())
    prepare(photos)                                                         # once more: nothing left to do
    assert len(calls) == 4 and "12 are done" in capsys.readouterr().out


def test_a_start_that_was_killed_leaves_room_for_the_next(prepare, tmp_path, monkeypatch):
    """Arrays without data.json go before the disk is asked for room."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "images.npy").write_bytes(b"left over")
    with pytest.raises(SystemExit, match="OUT .*set holds images.npy from elsewhere: name an empty folder"):
        prepare(photographs(tmp_path / "photos"))                           # not ours to delete
    (tmp_path / "set" / "files.json").write_text("[]")                      # the mark of a start
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda p: (list(p.glob("*.npy")) and 1 / 0, usage(p))[1])
    assert arrays(prepare(tmp_path / "photos"))["done"].all()


def test_a_row_that_was_lost_is_not_called_complete(prepare, tmp_path, monkeypatch):
    photos, write = photographs(tmp_path / "photos"), packed.Rows.write
    monkeypatch.setattr(packed.Rows, "write", lambda self, rows, values: write(
        self, rows[:-1] if "done" in self.file.name else rows, values))
    with pytest.raises(SystemExit, match="lacks 3 rows that were written: give the same command again"):
        prepare(photos)
    monkeypatch.undo()
    prepare(photos)
    assert packed.read_about(tmp_path / "set")["complete"]


def test_a_disk_error_is_not_a_bad_image(prepare, tmp_path, monkeypatch):
    """What may pass by the next try stops the run, also with --on-bad skip."""
    photos, open_ = photographs(tmp_path / "photos"), Image.open

    def broken(path, *args):
        if str(path).endswith("b/1.png"):
            raise OSError(5, "Input/output error", str(path))
        return open_(path, *args)
    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(SystemExit, match="prepare.py: .*Input/output error: .*b/1.png"):
        prepare(photos, "--on-bad", "skip")
    monkeypatch.undo()
    assert (arrays(prepare(photos, "--on-bad", "skip"))["labels"] >= 0).all()


def test_limit_is_spread_over_the_classes(prepare, tmp_path):
    out = prepare(photographs(tmp_path / "photos"), "--limit", "6")
    assert arrays(out)["labels"].tolist() == [0, 0, 1, 1, 2, 2] and len(arrays(out)["images"]) == 6
    assert len(arrays(prepare(tmp_path / "photos", "--limit", "99", out="all"))["images"]) == 12


# ---- images of all sorts

@pytest.fixture
def odd_photos(tmp_path):
    """Good: CMYK, grey, 1 x 1, a panorama, capitals. Bad: cut short, empty, 16 bits, a text, far too long."""
    folder = tmp_path / "odd"
    (folder / "good").mkdir(parents=True)
    (folder / "bad").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (30, 30, 4), dtype=np.uint8)
    Image.fromarray(noise, "CMYK").save(folder / "good" / "cmyk.jpg")
    Image.fromarray(noise[:, :, 0]).save(folder / "good" / "GREY.JPEG")
    Image.fromarray(noise[:1, :1, :3]).save(folder / "good" / "one.png")
    Image.fromarray(np.tile(noise[:, :, :3], (1, 20, 1))).save(folder / "good" / "wide.bmp")
    raw = (folder / "good" / "cmyk.jpg").read_bytes()
    (folder / "bad" / "cut.jpg").write_bytes(raw[:len(raw) // 2])
    (folder / "bad" / "empty.png").write_bytes(b"")
    (folder / "bad" / "text.png").write_text("no image")
    Image.fromarray(noise[:, :, 0].astype(np.uint16) * 200).save(folder / "bad" / "deep.png")
    Image.fromarray(np.zeros((2, 500), np.uint8)).save(folder / "bad" / "long.png")
    return folder


def test_bad_images_stop_or_are_skipped(odd_photos, prepare, capsys):
    bad = r"prepare.py: .*bad/(cut|deep|empty|long|text)\.\w+ .*; or give --on-bad skip, and"
    with pytest.raises(SystemExit, match=bad):
        prepare(odd_photos)
    out = prepare(odd_photos, "--on-bad", "skip")                           # resumes where it stopped
    text = capsys.readouterr().out
    assert text.count("skipped: ") == 5 and "4 images are packed, 5 skipped" in text
    assert packed.read_about(out)["skipped"] == [f"bad/{n}" for n in ("cut.jpg", "deep.png", "empty.png", "long.png",
                                                                       "text.png")]
    s = data.open_data(str(out))
    assert len(s.train) == 4 and s.train.labels.tolist() == [1] * 4 and s.classes == ["bad", "good"]
    files = ["GREY.JPEG", "cmyk.jpg", "one.png", "wide.bmp"]
    for image, name in zip(s.train.read(torch.arange(4))[0], files):
        crop = data.center_crop(Image.open(odd_photos / "good" / name), 16)
        assert np.array_equal(image.permute(1, 2, 0), np.array(crop))


# ---- bad flags, damaged sets

@pytest.mark.parametrize("flags,message", [
    (["--size", "15"], r"--size 15 must be a multiple of 2, by which --vae \S+ shrinks"),
    (["--size", "0"], "--size 0 must be 1 or more"), (["--limit", "-1"], "--limit -1 must be 1 or more"),
    (["--vae", "nowhere.pt"], "--vae nowhere.pt does not exist"), (["--on-bad", "ignore"], "--on-bad"),
    (["--sise", "16"], "--sise is not a flag; did you mean --size"),
])
def test_bad_flags(flags, message, prepare, tmp_path):
    with pytest.raises(SystemExit, match=message):
        prepare(photographs(tmp_path / "photos"), *flags)
    assert not (tmp_path / "set").exists()


def test_folders_without_classes_or_images(prepare, tmp_path):
    with pytest.raises(SystemExit, match="prepare.py: FOLDER .*nowhere is not a folder$"):
        prepare(tmp_path / "nowhere")
    (tmp_path / "flat").mkdir()
    with pytest.raises(SystemExit, match="FOLDER .*flat has no class folders"):
        prepare(tmp_path / "flat")
    (tmp_path / "flat" / "class").mkdir()
    with pytest.raises(SystemExit, match="flat: no images"):
        prepare(tmp_path / "flat")
    with pytest.raises(SystemExit, match="prepare.py: the following arguments are required: folder, out"):
        prepare_program.main([])


def test_another_set_in_the_same_folder_is_refused(prepare, tmp_path):
    photos = photographs(tmp_path / "photos")
    before = arrays(prepare(photos))
    other = tiny_vae(tmp_path / "other.pt", seed=1)
    for flags, message in ((["--size", "32"], "was started with --size 16, not 32"), (["--mirror"], "--mirror False"),
                           (["--precision", "bf16"], "--precision fp32, not bf16"),
                           (["--vae", str(other)], "was started with --vae"), (["--limit", "5"], "with other images")):
        with pytest.raises(SystemExit, match=message):
            prepare(photos, *flags)
    (photos / "a" / "0.png").unlink()
    with pytest.raises(SystemExit, match="files came or went"):
        prepare(photos)
    assert all(np.array_equal(a, before[k]) for k, a in arrays(tmp_path / "set").items())


def test_full_disk_is_reported_before_the_work(prepare, tmp_path, monkeypatch):
    photos = photographs(tmp_path / "photos")
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(SystemExit, match="needs .* GB, and its disk has 1e-09 GB free: make room"):
        prepare(photos)
    assert not list((tmp_path / "set").iterdir())
    monkeypatch.undo()
    open_memmap = np.lib.format.open_memmap

    def full(file, *args):
        if "moments" in str(file):
            raise OSError(28, "No space left on device")
        return open_memmap(file, *args)
    monkeypatch.setattr(np.lib.format, "open_memmap", full)
    with pytest.raises(SystemExit, match="could not be laid out .*No space left on device"):
        prepare(photos)
    monkeypatch.undo()
    assert arrays(prepare(photos))["done"].all()                            # room again
    with pytest.raises(SystemExit, match="OUT .*vae.pt/x cannot be made .Not a directory.: choose another place"):
        prepare(photos, out="vae.pt/x")


@pytest.mark.parametrize("name", ("images", "moments", "done"))
def test_disk_that_fills_during_the_work_loses_nothing(prepare, tmp_path, monkeypatch, name):
    """The program ends with one line, and with room again the same command finishes the same arrays."""
    photos = photographs(tmp_path / "photos")
    whole, pwrite, calls = arrays(prepare(photos, out="whole")), os.pwrite, []

    def full(descriptor, raw, at):
        if os.fstat(descriptor).st_ino == (tmp_path / "set" / f"{name}.npy").stat().st_ino:
            calls.append(at)
            if len(calls) == 7:                                             # in the midst of the second batch
                raise OSError(28, "No space left on device")
        return pwrite(descriptor, raw, at)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(SystemExit) as e:
        prepare(photos)
    assert f"set/{name}.npy could not be written (No space left on device): make room" in str(e.value)
    assert "\n" not in str(e.value) and not packed.read_about(tmp_path / "set")["complete"]
    monkeypatch.undo()
    assert all(np.array_equal(a, whole[k]) for k, a in arrays(prepare(photos)).items())


@pytest.mark.parametrize("name", ARRAYS[:3])
def test_damaged_arrays_are_named(packed_folder, tmp_path, name):
    shutil.copytree(packed_folder, tmp_path / "set")
    file = tmp_path / "set" / f"{name}.npy"
    raw = file.read_bytes()
    for content, message in ((raw[:-1], "cut short"), (raw[:50], "damaged"), (b"", "damaged"), (b"text", "damaged")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.npy .*{message}.*copy it again"):
            data.open_data(str(tmp_path / "set"))
    np.save(file, np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match=rf"{name}\.npy holds float32 \[3, 4\], but data.json says"):
        data.open_data(str(tmp_path / "set"))
    file.unlink()
    with pytest.raises(ValueError, match=rf"{name}\.npy is missing"):
        data.open_data(str(tmp_path / "set"))
    (tmp_path / "set" / "data.json").write_text("{")
    with pytest.raises(ValueError, match="data.json cannot be read"):
        data.open_data(str(tmp_path / "set"))


# ---- folders that the program wrote before its files were moved

OLD = Path(__file__).with_name("old") / "packed"
# Made with commit 0e59121, of tiny_vae("vae.pt") and photographs("photos", "ab", 3) in conftest.py:
#   python data.py prepare photos packed --size 16 --mirror --vae vae.pt --device cpu --batch-size 2
OLD_SHA256 = {"images": "72a2e4429ee17609", "moments": "8162c21a8f3c72f1", "labels": "0020bd656ca1c80c",
              "done": "dfea2964b5deedea"}


def sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def test_old_folder_is_read_as_it_was(tmp_path):
    assert {name: sha256(a) for name, a in arrays(OLD).items()} == OLD_SHA256
    s = data.open_data(str(OLD))
    assert s.shape == (4, 8, 8) and s.size == 16 and s.classes == ["a", "b"] and len(s.train) == 6 and s.held is None
    assert s.packed == dict(complete=True, rows=6, size=16, mirror=True, vae="vae.pt", fingerprint="b4a501d5e90d3883",
                            precision="fp32", channels=4, latent_size=8, scale=0.18215, classes=["a", "b"], skipped=[],
                            crop="adm", text=None)                          # as if it said so
    assert vae.fingerprint(vae.load_vae(tiny_vae(tmp_path / "vae.pt"))) == s.packed["fingerprint"]
    images, labels = s.train.read(torch.arange(6))
    assert sha256(images) == OLD_SHA256["images"] and labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert sha256(s.train.moments(torch.arange(6))) == OLD_SHA256["moments"]
    rows = data.global_rows(6, 3, 1, 4)                                     # the order is what it was, too
    assert rows.tolist() == [3, 0, 1, 2]
    feed = data.batches(s.train, 3, 1, 4)
    images, moments, labels, _ = next(feed)
    feed.close()
    found = arrays(OLD)
    for batch, name in ((images, "images"), (moments, "moments"), (labels, "labels")):
        assert np.array_equal(batch, found[name][rows])


def test_old_folder_that_was_interrupted_is_finished(prepare, tmp_path, capsys):
    """As a kill after four of six rows left it: the others zero and not done, data.json not complete."""
    shutil.copytree(OLD, tmp_path / "set")
    whole = arrays(OLD)
    for name in ("images", "moments", "done"):
        rows = whole[name].copy()
        rows[4:] = 0
        np.save(tmp_path / "set" / f"{name}.npy", rows)
    about = (OLD / "data.json").read_text()
    (tmp_path / "set" / "data.json").write_text(about.replace('"complete": true', '"complete": false'))
    photos = photographs(tmp_path / "photos", "ab", 3)
    with pytest.raises(SystemExit, match="was started with --mirror True, not False"):
        prepare(photos)
    out = prepare(photos, "--mirror")
    assert "6 images of 2 classes; 4 are done" in capsys.readouterr().out
    found = arrays(out)
    assert all(np.array_equal(found[name], whole[name]) for name in ("images", "labels", "done"))
    assert np.array_equal(found["moments"][:4], whole["moments"][:4])
    assert np.allclose(found["moments"].astype(float), whole["moments"].astype(float), atol=1e-2)   # another machine's
    done = json.loads((out / "data.json").read_text())
    assert done.pop("vae").endswith("vae.pt")
    assert done.items() <= {**json.loads(about), "crop": "adm", "text": None}.items()


# ---- training

@pytest.fixture
def packed_haste(packed_folder, tiny_run):
    return lambda *flags, **kw: tiny_run("--data", str(packed_folder), *flags, **kw)


def test_training_on_packed_latents(packed_haste, packed_folder, tmp_path):
    rows, saved = packed_haste("--eval-cfg", "1.5")
    assert saved["arch"]["in_channels"] == 4 and saved["arch"]["input_size"] == 8 and rows[-1]["fd"] > 0
    assert saved["packed_from"]["vae"] == str(packed_folder.parent / "vae.pt") and "feature_loss" in rows[0]
    assert Image.open(tmp_path / "run" / "samples.png").size == (4 * (6 * 17 - 1), 4 * (3 * 17 - 1))        # decoded
    parts, _ = packed_haste("--accumulate", "2", out="parts")
    assert all(abs(a["loss"] - b["loss"]) < 1e-5 for a, b in zip(rows, parts))
    straight = packed_haste("--steps", "6", out="straight")
    packed_haste("--steps", "2", out="halves")
    resumed = packed_haste("--steps", "6", "--resume", "auto", out="halves")
    assert same_weights(straight[1], resumed[1]) and straight[0][-1] == resumed[0][-1]


def test_no_image_is_read_once_the_guidance_has_ended(packed_haste, monkeypatch):
    read, opened = packed.Rows.read, []
    monkeypatch.setattr(packed.Rows, "read", lambda self, rows: (opened.append(self.file.name[-11:]),
                                                                 read(self, rows))[1])
    for flags, most in ((["--stop", "3"], 3), (["--stop", "never"], 7), (["--align", "none"], 0)):
        opened.clear()
        packed_haste("--steps", "6", "--eval-every", "0", *flags)
        assert opened.count("/images.npy") == most                          # one batch more is read ahead
        assert opened.count("moments.npy") == 7


def test_packed_flags(packed_haste, packed_folder, tiny_run, tmp_path):
    for flags, message in ((["--latent-channels", "16"], "--latent-channels 16 is not what --data .* has, 4 .--vae"),
                           (["--image-size", "32"], "--image-size 32 does not fit .* 16 pixels wide.* prepare"),
                           (["--vae", "nowhere.pt"], "--vae nowhere.pt does not exist"),
                           (["--vae", str(tiny_vae(tmp_path / "b.pt", 1))], "is not the autoencoder that the training"),
                           (["--vae", str(tiny_vae(tmp_path / "c.pt", 1, channels=3))], "latents of 3 channels"),
                           (["--model", "SiT-Ti/8", "--patch", "3"], "not a flag")):
        with pytest.raises(SystemExit, match=message):
            packed_haste(*flags)
    with pytest.raises(SystemExit, match="--latent-channels 4 is for packed data, and --data digits is not"):
        tiny_run("--latent-channels", "4")
    assert packed_haste("--latent-channels", "4", "--vae", str(packed_folder.parent / "vae.pt"))[0]


def test_mirroring_needs_mirrored_latents(prepare, tiny_run, tmp_path):
    plain = prepare(photographs(tmp_path / "photos"))
    with pytest.raises(SystemExit, match="--mirror True needs the mirror images' latents"):
        tiny_run("--data", str(plain), "--mirror")
    assert tiny_run("--data", str(plain), "--mirror", "--no-mirror")[0]


def test_other_data_below_a_checkpoint_is_refused(packed_folder, prepare, tiny_run, tiny_xar, tmp_path):
    shutil.copytree(packed_folder, tmp_path / "data")
    for call, flags in ((tiny_run, []), (tiny_xar, [])):
        shutil.rmtree(tmp_path / "data")
        shutil.copytree(packed_folder, tmp_path / "data")
        call("--data", str(tmp_path / "data"), *flags)
        resume = ["--data", str(tmp_path / "data"), "--resume", "auto", "--steps", "6", "--eval-every", "0"]
        shutil.rmtree(tmp_path / "data")
        two = photographs(tmp_path / "two", classes="ab") if not (tmp_path / "two").exists() else tmp_path / "two"
        prepare(two, out="data")
        with pytest.raises(SystemExit, match=r"not what the checkpoint was trained on: num_classes 2 \(was 3\)"):
            call(*resume, *flags)
        shutil.rmtree(tmp_path / "data")
        prepare(packed_folder.parent / "photos", "--vae", str(tiny_vae(tmp_path / "b.pt", 1)), out="data")
        with pytest.raises(SystemExit, match="trained on: another autoencoder"):
            call(*resume, *flags)
        shutil.rmtree(tmp_path / "run")


def test_xar_trains_on_packed_latents(tiny_xar, packed_folder, tmp_path):
    flags = ["--data", str(packed_folder), "--mirror", "--latent-channels", "4"]
    rows, saved = tiny_xar(*flags)
    assert saved["arch"]["grid"] == 8 and saved["arch"]["channels"] == 4 and rows[-1]["fd"] > 0
    again, _ = tiny_xar(*flags, "--accumulate", "2", out="again")
    assert all(abs(a["loss"] - b["loss"]) < 1e-5 for a, b in zip(rows, again))
    assert tiny_xar(*flags[:2], out="other")[0] != rows                     # --mirror matters
    with pytest.raises(SystemExit, match="--latent-channels 16 is not what"):
        tiny_xar(*flags[:3], "--latent-channels", "16", out="bad")


def test_xar_with_a_teacher_reads_packed_images_until_tau(tiny_xar, packed_folder, monkeypatch):
    """The teacher sees the photographs, mirrored as the latents are; from tau on nobody reads them."""
    read, seen, original, targets = [], [], data.PackedSet.read, align.teacher_targets
    monkeypatch.setattr(data.PackedSet, "read", lambda self, rows: (read.append(len(rows)), original(self, rows))[1])
    monkeypatch.setattr(align, "teacher_targets", lambda net, pixels, *more: (
        seen.append(pixels), targets(net, pixels, *more))[1])
    flags = ["--data", str(packed_folder), "--mirror", "--eval-every", "0", "--log-every", "1", *GUIDED_XAR]
    rows, saved = tiny_xar(*flags, "--steps", "7")
    assert read == [8] * 3 and len(seen) == 3 and saved["arch"]["channels"] == 4
    assert ["attention_loss" in r for r in rows] == [True] * 3 + [False] * 4
    images, cfg = data.open_data(str(packed_folder)), xar_train.Config(mirror=True, batch_size=8)
    model = xar.load_xar(Path(saved["args"]["out"], "ckpt.pt"))
    for step, pixels in enumerate(seen):
        chosen = torch.from_numpy(data.global_rows(len(images.train), 0, step, 8))
        mirrored = xar_train.random_numbers(cfg, step, model, True)[3]
        assert torch.equal(pixels, data.mirror(images.train.read(chosen)[0], mirrored))
    auto = ["--stop", "auto", "--stop-warmup", "1", "--stop-interval", "1", "--stop-threshold", "1"]
    assert tiny_xar(*flags, *auto, out="auto")[1]["tau"] == 1               # the held batch is of latents, too


def test_xar_decodes_with_the_named_file(tiny_xar, packed_folder, tmp_path):
    flags = ["--data", str(packed_folder), "--vae"]
    assert tiny_xar(*flags, str(packed_folder.parent / "vae.pt"))[0][-1]["fd"] > 0
    with pytest.raises(SystemExit, match="is not the autoencoder that the training data was prepared with"):
        tiny_xar(*flags, str(tiny_vae(tmp_path / "b.pt", 1)))


def test_presets_are_the_papers_settings(tmp_path):
    for module, names in ((haste_train, ("b", "l", "xl", "dit-xl", "xl-repa", "xl-plain")), (xar_train, ("b", "l", "h", "b-haste"))):
        fields = {f.name for f in dataclasses.fields(module.Config)}
        for name in [f"imagenet256-{n}" for n in names] + (["imagenet512-xl"] if module is haste_train else []):
            assert module.PRESETS[name].keys() <= fields
            cfg = run.parse(module.Config, ["--preset", name], "x", presets=module.PRESETS)
            module.check(cfg, 8)
            assert cfg.latent_channels == (4 if module is haste_train else 16)
    cfg = run.parse(haste_train.Config, ["--preset", "imagenet512-xl"], "x", presets=haste_train.PRESETS)
    assert (cfg.image_size, cfg.stop, cfg.batch_size, cfg.lr, cfg.ema) == (512, "300000", 256, 1e-4, 0.9999)
    cfg = run.parse(haste_train.Config, ["--preset", "imagenet256-dit-xl"], "x", presets=haste_train.PRESETS)
    assert (cfg.objective, cfg.model, cfg.stop, cfg.feature_weight, cfg.lr) == ("ddpm", "SiT-XL/2", "250000", 0.5, 1e-4)
    with pytest.raises(SystemExit, match="--data out/imagenet256 is not a folder .*prepare.py"):
        haste_train.main(["--preset", "imagenet256-b", "--device", "cpu", "--out", str(tmp_path)])


def test_mean_of_packed_latents(packed_folder):
    images = data.open_data(str(packed_folder))
    moments = images.train.moments(torch.arange(len(images.train))).double()            # [M,2,2C,h,w]
    own, mirrored = images.packed["scale"] * moments[:, :, :images.packed["channels"]].mean(0)
    assert torch.allclose(images.mean(False), own.float()) and not torch.allclose(own, mirrored)
    assert torch.allclose(images.mean(True), ((own + mirrored) / 2).float())


# ---- a full disk

FULL = """
import resource, sys
sys.path.insert(0, {root!r})
import {module}
import torch._dynamo                                                        # older torch writes files as it loads
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))              # no file may grow beyond: as on a full disk
{module}.main({argv!r})
"""


def on_a_full_disk(limit, module, argv):
    code = FULL.format(limit=limit, root=str(ROOT), module=module, argv=[str(a) for a in argv])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.slow
def test_full_disk_while_saving_keeps_the_last_checkpoint(tiny_run, small_teacher, tmp_path):
    from conftest import TINY
    flags = ["--align", "none", "--eval-every", "0"]
    _, saved = tiny_run(*flags, "--steps", "2")
    command = [*TINY, *flags, "--out", tmp_path / "run", "--steps", "8", "--resume", "auto",
               "--teacher-weights", small_teacher]
    done = on_a_full_disk(100_000, "haste_train", command)
    assert done.returncode == 1 and done.stderr.strip().count("\n") == 0, done.stderr
    assert "ckpt.pt could not be written (File too large): an earlier file, if any, is kept; make room" in done.stderr
    assert same_weights(saved, torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True))
    assert not list((tmp_path / "run").glob("*.partial"))
    rows, _ = tiny_run(*flags, "--steps", "8", "--resume", "auto")          # room again
    assert rows == tiny_run(*flags, "--steps", "8", out="straight")[0]
    limit = (tmp_path / "run" / "log.jsonl").stat().st_size + 20
    done = on_a_full_disk(limit, "haste_train", [*command, "--steps", "12"])
    assert done.returncode == 1 and "log.jsonl could not be written (File too large): make room" in done.stderr
