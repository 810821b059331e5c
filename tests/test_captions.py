"""Images with captions: packed in the order of their ids, one caption drawn for each visit; bad input is one line."""
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import photographs, tiny_vae
from fill import fill_state_dict
from PIL import Image
from processes import finish, start, torchrun

import data
import packed
import prepare as prepare_program
import text
import vae

MERGES = ["a t</w>", "c at</w>", "m at</w>", "o n</w>"]
VOCABULARY = 512 + len(MERGES) + 2
LENGTH = 11
WIDTH = 16

# as in MS-COCO's file, whose ids follow neither its own order nor that of the names
IMAGES = {30: "a.png", 9: "f.png", 12: "b.png", 7: "nobody.png", 100: "d.png", 11: "e.png", 45: "c.png"}
CAPTIONS = [(12, "a mat"), (30, "a cat"), (9, "cat on mat"), (45, "on"), (9, "A cat on a mat."), (100, "mat on cat"),
            (30, "cat"), (11, "a cat on the mat on a mat"), (9, " on a mat\n"), (100, "cat cat")]
ROWS = ["f.png", "e.png", "b.png", "a.png", "c.png", "d.png"]
TEXTS = [["cat on mat", "A cat on a mat.", " on a mat\n"], ["a cat on the mat on a mat"], ["a mat"], ["a cat", "cat"],
         ["on"], ["mat on cat", "cat cat"]]
FIRST = [1, 4, 5, 6, 8, 9, 11]
ARRAYS = ("images", "moments", "labels", "done", "captions", "first_caption")


def content(images=IMAGES, captions=CAPTIONS):
    return {"info": {}, "images": [{"file_name": name, "id": i, "height": 9} for i, name in images.items()],
            "annotations": [{"image_id": i, "id": n, "caption": words} for n, (i, words) in enumerate(captions)]}


def arrays(folder):
    return {name: np.load(folder / f"{name}.npy") for name in ARRAYS}


def same(a, b):
    return all(np.array_equal(a[name], b[name]) for name in ARRAYS)


def tiny_clip(path, seed=0):
    """File of a small text tower of filled weights."""
    torch.save(fill_state_dict(text.ClipText(VOCABULARY, LENGTH, WIDTH, 2, 1).state_dict(), seed), path)
    return path


def square_lanczos(image, size):
    """U-ViT's center_crop, on an array [h,w,3]."""
    h, w, _ = image.shape
    crop = min(h, w)
    image = image[(h - crop) // 2:(h + crop) // 2, (w - crop) // 2:(w + crop) // 2]
    return np.array(Image.fromarray(image).resize((size, size), Image.LANCZOS))


@pytest.fixture
def coco(tmp_path):
    """A flat folder with an image of each name, and one that nobody knows; the captions beside it."""
    photos = photographs(tmp_path / "photos", "x", 8)
    (tmp_path / "coco").mkdir()
    for i, name in enumerate([*ROWS, "nobody.png", "unknown.png"]):
        shutil.move(photos / "x" / f"{i}.png", tmp_path / "coco" / name)
    (tmp_path / "coco" / "list.txt").write_text("no image")
    (tmp_path / "captions.json").write_text(json.dumps(content()))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]))
    return tmp_path / "coco"


@pytest.fixture
def words(coco, tmp_path):
    """The words after `python prepare.py FOLDER OUT`."""
    return ["--captions", tmp_path / "captions.json", "--merges", tmp_path / "merges.txt",
            "--text", tiny_clip(tmp_path / "clip.pt"), "--vae", tiny_vae(tmp_path / "vae.pt"), "--size", "16",
            "--crop", "square-lanczos", "--batch-size", "2", "--device", "cpu"]


@pytest.fixture
def pack(coco, words, tmp_path):
    """Call prepare.py on the folder; returns OUT."""
    def call(*flags, out="set"):
        prepare_program.main([str(w) for w in (coco, tmp_path / out, *words, *flags)])
        return tmp_path / out
    return call


@pytest.fixture
def refused(pack):
    """Assert that prepare.py ends with one line, which a pattern describes."""
    def call(message, *flags, **kw):
        with pytest.raises(SystemExit, match=f"^prepare.py: .*{message}") as e:
            pack(*flags, **kw)
        assert "\n" not in str(e.value)
    return call


# ---- the crop

@pytest.mark.parametrize("width, height", [(61, 40), (40, 61), (60, 40), (40, 41), (50, 50), (16, 16), (9, 30)])
def test_square_lanczos_is_that_of_u_vit(width, height):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = np.array(data.center_crop(Image.fromarray(image), 16, "square-lanczos"))
    assert np.array_equal(found, square_lanczos(image, 16))
    assert (width, height) == (16, 16) or not np.array_equal(found, data.center_crop(Image.fromarray(image), 16))


# ---- what is written, and read

def test_rows_are_images_in_the_order_of_their_ids(pack, coco, tmp_path, capsys):
    out = pack()
    said = capsys.readouterr().out
    assert "6 images with 10 captions, 1 of them cut to 11 tokens; 2 without a caption are left out; 0 are done" in said
    assert json.loads((out / "files.json").read_text()) == ROWS
    assert json.loads((out / "captions.json").read_text()) == TEXTS
    found = arrays(out)
    for name, image in zip(ROWS, found["images"]):
        with Image.open(coco / name) as photo:
            assert np.array_equal(image.transpose(1, 2, 0), square_lanczos(np.array(photo), 16))
    assert found["labels"].tolist() == [0] * 6 and found["done"].all() and found["first_caption"].tolist() == FIRST
    ids = text.Tokenizer(tmp_path / "merges.txt", LENGTH)(["", *sum(TEXTS, [])])
    assert found["captions"].dtype == np.uint16 and np.array_equal(found["captions"], ids)

    about = packed.read_about(out)
    assert about["complete"] and about["crop"] == "square-lanczos" and about["classes"] == []
    expected = {**text.describe(text.load_clip_text(tmp_path / "clip.pt")), "captions": 11, "features": False, "cut": 1}
    assert len(about["text"].pop("captions_fingerprint")) == 16 and about["text"] == expected
    assert "uncaptioned" not in about                                       # which goes into every checkpoint
    assert json.loads((out / "data.json").read_text())["uncaptioned"] == ["nobody.png", "unknown.png"]


def test_captions_of_rows(pack):
    out = pack()
    train = data.open_data(str(out)).train
    ids = torch.from_numpy(arrays(out)["captions"].astype(np.int64))
    assert len(train) == 6 and train.labels.tolist() == [0] * 6 and torch.equal(train.null, ids[0])
    found = train.captions(torch.tensor([5, 0, 0, 0, 1]), torch.tensor([0.5, 0.99, 0, 0.34, 0.99]))
    assert found.dtype == torch.int64 and torch.equal(found, ids[[10, 3, 1, 2, 4]])


def test_every_caption_of_a_row_is_equally_likely(pack):
    out = pack()
    train = data.open_data(str(out)).train
    ids = torch.from_numpy(arrays(out)["captions"].astype(np.int64))
    u = (torch.arange(60) + 0.5) / 60
    for row, count in enumerate(map(len, TEXTS)):
        found = train.captions(torch.full((60,), row), u)
        assert torch.equal(found, ids[FIRST[row]:FIRST[row + 1]].repeat_interleave(60 // count, 0))
    last = torch.full((6,), 1 - 2 ** -24)                                   # the largest that torch.rand draws
    assert torch.equal(train.captions(torch.arange(6), last), ids[torch.tensor(FIRST[1:]) - 1])


def test_features_are_what_the_encoder_makes_of_the_ids(pack, tmp_path):
    ids, features = pack(), pack("--text-features", out="features")
    assert packed.read_about(features)["text"]["features"]
    found, encoder = arrays(features)["captions"], text.load_clip_text(tmp_path / "clip.pt")
    expected = encoder(torch.from_numpy(arrays(ids)["captions"].astype(np.int64))).numpy()
    assert found.shape == (11, LENGTH, WIDTH) and found.dtype == np.float16
    assert np.allclose(found.astype(np.float32), expected, rtol=2 ** -10, atol=1e-6)
    a, b = (data.open_data(str(folder)).train for folder in (ids, features))
    rows, u = torch.tensor([0, 3, 5]), torch.tensor([0.4, 0.9, 0.1])
    assert b.captions(rows, u).dtype == b.null.dtype == torch.float16 and b.null.shape == (LENGTH, WIDTH)
    assert torch.allclose(b.captions(rows, u).float(), encoder(a.captions(rows, u)), rtol=2 ** -10, atol=1e-6)
    assert torch.allclose(b.null.float(), encoder(a.null[None])[0], rtol=2 ** -10, atol=1e-6)


@pytest.mark.parametrize("flags", [[], ["--text-features"]], ids=["ids", "features"])
def test_batches_are_a_function_of_seed_and_step(pack, flags):
    out = pack(*flags)
    train, found = data.open_data(str(out)).train, arrays(out)

    def batch(seed, step, mine=slice(None), ahead=0):
        feed = data.batches(train, seed, step - ahead, 4, mine)
        images, moments, captions, _ = [next(feed) for _ in range(1 + ahead)][-1]
        feed.close()
        return images, moments, captions
    whole = batch(0, 3)
    assert whole[2].dtype == (torch.float16 if flags else torch.int64) and len(whole[2]) == 4
    for same_ones in (batch(0, 3, ahead=2), map(torch.cat, zip(batch(0, 3, slice(3)), batch(0, 3, slice(3, 4))))):
        assert all(map(torch.equal, whole, same_ones))
    assert not torch.equal(whole[2], batch(1, 3)[2]) and not torch.equal(whole[2], batch(0, 4)[2])
    for row, caption in zip(data.global_rows(6, 0, 3, 4), whole[2].numpy()):
        assert (found["captions"][FIRST[row]:FIRST[row + 1]] == caption).reshape(-1, caption.size).all(1).any()


def test_sets_of_classes_have_no_captions(packed_folder):
    train = data.open_data(str(packed_folder)).train
    assert not hasattr(train, "captions") and not hasattr(train, "null")
    assert train.about["text"] is None and train.about["crop"] == "adm"


def test_the_fingerprint_of_the_data_covers_the_captions(pack, tmp_path):
    before = data.open_data(str(pack())).fingerprint()
    assert data.open_data(str(pack(out="again"))).fingerprint() == before
    captions = [(i, "a mat on a mat" if words == "cat cat" else words) for i, words in CAPTIONS]
    (tmp_path / "captions.json").write_text(json.dumps(content(captions=captions)))
    assert data.open_data(str(pack(out="other"))).fingerprint() != before


def test_limit_takes_the_captions_of_its_rows(pack):
    out = pack("--limit", "3")
    assert json.loads((out / "files.json").read_text()) == ROWS[::2]
    assert json.loads((out / "captions.json").read_text()) == TEXTS[::2]
    assert arrays(out)["first_caption"].tolist() == [1, 4, 5, 6] and len(arrays(out)["captions"]) == 6


@pytest.mark.parametrize("flags", [[], ["--text-features"]], ids=["ids", "features"])
def test_rows_that_are_skipped_leave_the_others_their_captions(pack, coco, flags):
    whole = arrays(pack(*flags, out="whole"))
    (coco / ROWS[0]).write_bytes(b"")
    (coco / ROWS[3]).write_bytes(b"")
    out = pack("--on-bad", "skip", *flags)
    train = data.open_data(str(out)).train
    assert len(train) == 4 and packed.read_about(out)["skipped"] == [ROWS[0], ROWS[3]]
    captions = torch.from_numpy(whole["captions"].astype(np.float64))
    found = train.captions(torch.arange(4), torch.full((4,), 0.9))
    assert torch.equal(found.double(), captions[[4, 5, 8, 10]]) and torch.equal(train.null.double(), captions[0])


# ---- stopped and resumed

@pytest.mark.parametrize("flags", [[], ["--text-features"]], ids=["ids", "features"])
def test_interrupted_preparation_resumes(pack, flags, monkeypatch):
    whole, encode, calls = arrays(pack(*flags, out="whole")), vae.AutoencoderKL.encode, []

    def interrupted(self, x):
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, x)
    monkeypatch.setattr(vae.AutoencoderKL, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(*flags)
    out = pack(*flags)
    assert calls == [2, 2, 2, 2] and same(arrays(out), whole)
    assert packed.read_about(out) == packed.read_about(out.with_name("whole"))
    pack(*flags)                                                            # nothing left to do
    assert len(calls) == 4


def test_captions_are_on_the_disk_before_their_row_is_done(pack, tmp_path, monkeypatch):
    write, written = packed.Rows.write, []
    monkeypatch.setattr(packed.Rows, "write", lambda self, rows, values: (
        written.append((self.file.name.rsplit("/")[-1], [int(row) for row in rows])), write(self, rows, values))[1])
    pack("--text-features")
    entries = [rows for name, rows in written if name == "captions.npy"]
    assert entries == [[0, 1, 2, 3, 4], [5, 6, 7], [8, 9, 10]]              # with the first row, the null caption
    names = [name for name, _ in written]
    assert names.index("captions.npy") < names.index("done.npy") and len(names) == 3 * 5


@pytest.mark.parametrize("why", ("No space left on device", "only in part"))
def test_disk_that_fills_with_features_loses_nothing(why, pack, refused, tmp_path, monkeypatch):
    whole, pwrite, calls = arrays(pack("--text-features", out="whole")), os.pwrite, []

    def full(descriptor, raw, at):
        if os.fstat(descriptor).st_ino == (tmp_path / "set" / "captions.npy").stat().st_ino:
            calls.append(at)
            if len(calls) == 7:                                             # in the midst of the second batch
                if why == "only in part":
                    return pwrite(descriptor, raw[:9], at)
                raise OSError(28, why)
        return pwrite(descriptor, raw, at)
    monkeypatch.setattr(os, "pwrite", full)
    refused(rf"set/captions.npy could not be written \({why}\): make room, and the same command", "--text-features")
    assert np.load(tmp_path / "set" / "done.npy").tolist() == [1, 1, 0, 0, 0, 0]
    monkeypatch.undo()
    assert same(arrays(pack("--text-features")), whole)


def test_a_start_that_was_killed_can_be_made_with_other_captions(pack, tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(prepare_program, "write_about", killed)
    with pytest.raises(KeyboardInterrupt):
        pack()
    assert (tmp_path / "set" / "captions.json").exists() and not (tmp_path / "set" / "data.json").exists()
    monkeypatch.undo()
    (tmp_path / "captions.json").write_text(json.dumps(content(captions=[*CAPTIONS, (12, "cat")])))
    out = pack()
    assert json.loads((out / "captions.json").read_text()) == [*TEXTS[:2], ["a mat", "cat"], *TEXTS[3:]]
    assert np.load(out / "first_caption.npy").tolist() == [1, 4, 5, 7, 9, 10, 12] and len(arrays(out)["captions"]) == 12


@pytest.mark.parametrize("flags, message", [
    (["--crop", "adm"], "was started with --crop square-lanczos, not adm: give the same flags to resume"),
    (["--text-features"], "was started with another --text-features .False, not True.: give the same to resume"),
    (["--limit", "3"], "with other images .another FOLDER, --captions or --limit, or files came or went."),
])
def test_other_flags_do_not_resume(flags, message, pack, refused):
    before = arrays(pack())
    refused(message, *flags)
    assert same(arrays(pack()), before)


def test_other_files_do_not_resume(pack, refused, tmp_path):
    before = arrays(pack())
    refused(r"was started with another --text \(\w{16}, not \w{16}\)", "--text", tiny_clip(tmp_path / "other.pt", 1))
    (tmp_path / "swapped.txt").write_text("\n".join(["#version: 0.2", *MERGES[::-1]]))
    refused("was started with another --captions or --merges", "--merges", tmp_path / "swapped.txt")
    (tmp_path / "captions.json").write_text(json.dumps(content(captions=CAPTIONS[::-1])))
    refused("was started with another --captions or --merges")
    (tmp_path / "captions.json").write_text(json.dumps(content(captions=CAPTIONS[1:])))
    refused("was started with other images")
    (tmp_path / "captions.json").write_text(json.dumps(content()))
    assert same(arrays(pack()), before)


def test_classes_and_captions_do_not_resume_each_other(pack, refused, coco, words, tmp_path):
    photographs(coco)                                                       # class folders beside the images
    classes = [str(w) for w in (coco, tmp_path / "classes", *words[6:])]
    prepare_program.main(classes)
    refused("was started with other images", out="classes")
    with pytest.raises(SystemExit, match="was started with other images"):
        prepare_program.main([classes[0], str(pack()), *classes[2:]])


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--text-features"]], ids=["ids", "features"])
def test_two_processes_pack_what_one_packs(pack, coco, words, tmp_path, flags):
    whole = arrays(pack(*flags, out="whole"))
    finish(start([*torchrun(2), "prepare.py", coco, tmp_path / "set", *words, *flags], tmp_path / "log.txt"))
    found = arrays(tmp_path / "set")
    for name in ARRAYS:
        assert np.allclose(found[name].astype(float), whole[name].astype(float), atol=1e-2), name   # a batch's rounding
    assert packed.read_about(tmp_path / "set") == packed.read_about(tmp_path / "whole")


# ---- bad input

@pytest.mark.parametrize("raw, message", [
    ("{", r"is not a file of captions like MS-COCO's \(Expecting property name"),
    ("", r"is not a file of captions like MS-COCO's \(Expecting value: line 1"),
    ("\xff\x00", "is not a file of captions like MS-COCO's"),
    ("[]", r"is not a file of captions like MS-COCO's \(list indices"),
    ("{}", r"is not a file of captions like MS-COCO's \(no 'images'\): give captions_train2014.json, for example"),
    (json.dumps({"images": [{"id": 1}], "annotations": []}), "no 'file_name'"),
    (json.dumps(content(captions=[(30, None)])), "is not a file of captions like MS-COCO's"),
    (json.dumps(content(images={"x": "a.png"})).replace('"x"', "[1]"), "is not a file of captions like MS-COCO's"),
    (json.dumps(content()).replace('"caption"', '"bbox"'), "no 'caption'"),                  # instances_train2014.json
    (json.dumps(content(captions=[(77, "a cat")])), "a caption of image 77, but no such image"),
    (json.dumps(content(captions=[])), "holds no captions"),
    (json.dumps(content(captions=[*CAPTIONS, (45, " \n")])), "captions.json has a blank caption of c.png: remove it"),
    (json.dumps(content(images={**IMAGES, 1: "z.png", 2: "y.png"}, captions=[(2, "a"), (2, "b"), (1, "c"), (9, "d")])),
     "lacks z.png, the first of 2 images with captions that are not there: is --captions .*captions.json of another"),
])
def test_bad_captions(raw, message, refused, tmp_path):
    (tmp_path / "captions.json").write_bytes(raw.encode("latin-1"))
    refused(message, "--vae", "nowhere.pt", "--text", "nowhere.pt")         # before weights are read or fetched
    assert not (tmp_path / "set").exists()


def test_bad_flags(refused, coco, words, tmp_path):
    refused("--captions .*nowhere.json cannot be read .No such file", "--captions", tmp_path / "nowhere.json")
    refused("--text .*nowhere.pt does not exist", "--text", "nowhere.pt")
    refused("--merges .*nowhere.txt does not exist", "--merges", "nowhere.txt")
    (tmp_path / "few.txt").write_text("\n".join(["#version: 0.2", *MERGES[:3]]))
    refused("--merges .*few.txt makes a vocabulary of 517, but the text encoder's has 518", "--merges",
            tmp_path / "few.txt")
    refused("invalid choice: 'centre'", "--crop", "centre")
    for flags in (["--text", "clip.pt"], ["--merges", "merges.txt"], ["--text-features"]):
        with pytest.raises(SystemExit, match=f"prepare.py: {flags[0]} .* needs --captions$"):
            prepare_program.main([str(coco), str(tmp_path / "set"), *flags])
    with pytest.raises(SystemExit, match="FOLDER .*nowhere is not a folder$"):
        prepare_program.main(list(map(str, [tmp_path / "nowhere", tmp_path / "set", *words, "--vae", "no.pt"])))
    assert not (tmp_path / "set").exists()


def test_features_that_are_not_finite(refused, coco, words, tmp_path, monkeypatch):
    weights = torch.load(tiny_clip(tmp_path / "bad.pt"), weights_only=True)
    torch.save({**weights, "ln_final.bias": torch.full((WIDTH,), 1e6)}, tmp_path / "bad.pt")
    refused("--text .*bad.pt gives features that are not finite", "--text", tmp_path / "bad.pt", "--text-features")
    monkeypatch.setattr(text, "fetch", lambda *args: tmp_path / "bad.pt")
    with pytest.raises(SystemExit, match="--text https://.*ViT-L-14.pt gives features that are not finite"):
        prepare_program.main([str(w) for w in (coco, tmp_path / "set", *words[:4], *words[6:], "--text-features")])


@pytest.mark.parametrize("name", ("captions", "first_caption"))
def test_damaged_arrays_are_named(pack, name):
    file = pack() / f"{name}.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{name}\.npy .*cut short.*copy it again"):
        data.open_data(str(file.parent))
    np.save(file, np.zeros(3, np.int32))
    with pytest.raises(ValueError, match=rf"{name}\.npy holds int32 \[3\], but data.json says"):
        data.open_data(str(file.parent))


def test_a_damaged_list_of_captions_is_named(pack):
    out = pack()
    train, rows, u = data.open_data(str(out)).train, torch.tensor([5, 0]), torch.tensor([0.5, 0.5])
    assert train.strings(rows, u) == ["cat cat", "A cat on a mat."]
    for raw in ("", "[[", "[[]]", "7"):
        (out / "captions.json").write_text(raw)
        with pytest.raises(ValueError, match=r"captions\.json is missing or damaged \(.*\): copy it again"):
            train.strings(rows, u)
    (out / "captions.json").unlink()
    with pytest.raises(ValueError, match=r"captions\.json is missing or damaged \(.*No such file.*\): copy it again"):
        train.strings(rows, u)


@pytest.mark.parametrize("name", packed.ABOUT_TEXT)
def test_what_is_said_of_captions_must_be_complete(pack, refused, name):
    out = pack()
    about = json.loads((out / "data.json").read_text())
    del about["text"][name]
    (out / "data.json").write_text(json.dumps(about))
    message = f"data.json cannot be read .it lacks '{name}'.: is .* a folder made by prepare.py"
    with pytest.raises(ValueError, match=message):
        data.open_data(str(out))
    refused(message)                                                        # to resume
