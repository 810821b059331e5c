"""Scenes: captions say what is there, the judge sees it, and the unseen pairs are never seen."""
import re

import numpy as np
import pytest
import torch
from conftest import TINY, rows_of

import data
import evaluate
import haste_train
import sample as program
import scenes
import text


@pytest.fixture(scope="module")
def images():
    return data.open_data("scenes")


def by_hand(caption):
    """[(digit, top, left, side)] of a caption, read independently of the tables."""
    words = caption.split()
    named = [scenes.DIGITS.index(w) for w in words if w in scenes.DIGITS]
    if "large" in words:
        return [(named[0], 0, 0, 16)]
    if len(named) == 1:
        return [(named[0], 8 * ("lower" in words), 8 * ("right" in words), 8)]
    first, second = named
    if "right" in words or "below" in words:
        first, second = second, first
    if "left" in words or "right" in words:
        return [(first, 4, 0, 8), (second, 4, 8, 8)]
    return [(first, 0, 4, 8), (second, 8, 4, 8)]


def test_vocabulary_and_meanings():
    assert len(scenes.WORDS) == 21 == len(set(scenes.WORDS)) and len(scenes.MEANINGS) == 250
    texts = [caption for meaning in scenes.MEANINGS for caption in meaning.captions]
    assert len(set(texts)) == 500 and {w for t in texts for w in t.split()} == set(scenes.WORDS)
    assert max(len(t.split()) for t in texts) == scenes.LONGEST
    for meaning in scenes.MEANINGS:
        for caption in meaning.captions:
            boxes = [(d, *box) for d, box in zip(meaning.digits, meaning.boxes)]
            assert by_hand(caption) == boxes, caption
    unseen = {tuple(scenes.MEANINGS[m].digits) for m in scenes.UNSEEN}
    assert len(unseen) == 20 and len(scenes.UNSEEN) == 40
    assert all(sum(pair[side] == digit for pair in unseen) == 2 for digit in range(10) for side in (0, 1))


def test_training_never_shows_the_unseen_pairs_and_shows_all_else(images):
    shown = set(images.train.labels.tolist())
    assert shown == set(range(250)) - set(scenes.UNSEEN) == set(images.held.labels.tolist())
    kinds = [scenes.MEANINGS[m].kind for m in images.train.labels]
    for kind, share in scenes.SHARES.items():
        assert abs(kinds.count(kind) / len(kinds) - share) < 0.02


def test_scenes_show_real_digits_where_the_caption_says(images):
    rows = torch.arange(200)
    pixels, meanings = images.train.read(rows)
    real = {bytes(image.numpy().tobytes()): int(label) for image, label in
            zip(*images.train.digits)}
    ids = images.train.captions(rows, torch.zeros(200))
    for canvas, words in zip(pixels, ids):
        rest = canvas.clone()
        for digit, top, left, side in by_hand(" ".join(scenes.WORDS[i - 1] for i in words if i)):
            box = canvas[:, top:top + side, left:left + side]
            assert torch.equal(box, box[:, ::side // 8, ::side // 8].repeat_interleave(side // 8, 1)
                               .repeat_interleave(side // 8, 2))
            assert real[box[:, ::side // 8, ::side // 8].contiguous().numpy().tobytes()] == digit
            rest[:, top:top + side, left:left + side] = 0
        assert not rest.any()


def test_scenes_depend_on_their_index_alone(images):
    again = data.open_data("scenes").train
    rows = torch.tensor([5, 29_999, 17])
    assert torch.equal(again.read(rows)[0], images.train.read(rows)[0])
    assert torch.equal(again.read(rows[1:2])[0][0], images.train.read(rows)[0][1])
    assert images.fingerprint() == data.open_data("scenes").fingerprint()
    few = scenes.SceneSet(*images.train.digits, 7, seed=3)
    assert torch.equal(few.read(torch.arange(7))[0], scenes.SceneSet(*images.train.digits, 7, seed=3).scenes)
    # numpy's RandomState never changes: a scene of this index is the same everywhere
    assert [scenes.MEANINGS[m].captions[0] for m in images.train.labels[:3]] == FIRST


FIRST = ["a one left of a nine", "a eight left of a six", "a four left of a zero"]


def test_both_captions_of_a_scene_are_equally_likely_and_depend_on_seed_and_step(images):
    def captions(step, mine=slice(None), seed=0):
        feed = data.batches(images.train, seed, step, 64, mine)
        _, moments, ids, _ = next(feed)
        feed.close()
        assert moments is None
        return ids

    rows = torch.from_numpy(data.global_rows(len(images.train), 0, 3, 64))
    first, second = (images.train.captions(rows, torch.full((64,), u)) for u in (0.49, 0.51))
    drawn = captions(3)
    is_first = (drawn == first).all(1)
    assert ((drawn == second).all(1) | is_first).all() and 15 < is_first.sum() < 49
    assert torch.equal(captions(3, slice(32, 64)), drawn[32:]) and not torch.equal(captions(3, seed=1), drawn)
    later = torch.stack([(captions(step) == images.train.captions(torch.from_numpy(
        data.global_rows(30_000, 0, step, 64)), torch.zeros(64))).all(1) for step in range(4)])
    assert len({tuple(row.tolist()) for row in later}) == 4                 # another choice in every step


# ---- the judge

def test_judge_agrees_with_held_out_digits_and_not_with_other_captions(images):
    pixels, meanings = images.held.read(torch.arange(600))
    digits = images.train.digits
    right, place = scenes.judge(pixels, meanings, *digits)
    assert right.float().mean() > 0.95 and place.nanmean() == 1
    large = torch.tensor([scenes.MEANINGS[m].kind == "large" for m in meanings])
    assert torch.equal(place.isnan(), large)
    right, place = scenes.judge(pixels, meanings.roll(1), *digits)
    assert right.float().mean() < 0.1 and 0.4 < place.nanmean() < 0.7
    # one wrong digit of two is wrong
    swapped = pixels.flip(-1)
    pair = torch.tensor([scenes.MEANINGS[m].kind == "pair" for m in meanings])
    assert scenes.judge(swapped[pair], meanings[pair], *digits)[0].float().mean() < 0.5


def test_ink_outside_the_boxes_counts(images):
    canvas = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    canvas[..., 0:8, 0:8] = 30
    canvas[..., 8:16, 8:16] = 10
    upper_left = next(i for i, m in enumerate(scenes.MEANINGS) if m.captions[0] == "a two in the upper left")
    _, place = scenes.judge(canvas, torch.tensor([upper_left]), *images.train.digits)
    assert place.item() == 0.75
    _, place = scenes.judge(canvas * 0, torch.tensor([upper_left]), *images.train.digits)
    assert place.item() == 0                                                # an empty canvas is in no place


def test_scores_of_real_scenes(images):
    wanted = evaluate.prompts_of(images, 200)
    assert len(wanted.y) == 300 and wanted.num_seen == 200
    assert not set(wanted.meanings[:200].tolist()) & set(scenes.UNSEEN)
    assert set(wanted.meanings[200:].tolist()) == set(scenes.UNSEEN)
    tokenizer = text.open_tokenizer(scenes.TEXT)
    assert torch.equal(tokenizer(wanted.texts), wanted.y)
    reference = evaluate.reference(images)
    pixels = scenes.compose(wanted.meanings, torch.rand(300, 2), *images.held.digits)
    row = evaluate.scene_scores(pixels, wanted, reference)
    assert row["text_accuracy"] > 0.9 and row["text_accuracy_unseen"] > 0.9
    assert min(row["place"], row["place_unseen"]) > 0.999 and row["fd"] < 0.5
    noise = torch.randint(0, 256, pixels.shape, dtype=torch.uint8)
    assert evaluate.scene_scores(noise, wanted, reference)["fd"] > 5


# ---- the program

SCENES = [*TINY, "--data", "scenes", "--model", "MMDiT-Ti/4", "--pairs", "0:1", "--feature-depth", "1"]


@pytest.fixture
def train(tmp_path, small_teacher):
    def call(*flags, out="run"):
        haste_train.main([*SCENES, "--teacher-weights", str(small_teacher), "--out", str(tmp_path / out), *flags])
        return rows_of(tmp_path / out), torch.load(tmp_path / out / "ckpt.pt", weights_only=True)
    return call


def test_attention_has_a_gradient_before_tau_and_none_after(train, monkeypatch):
    """The official script never trains the attention term."""
    seen = []
    grad = haste_train.attention_alignment_grad

    def watched(q_s, k_s, q_t, k_t):
        loss = grad(q_s, k_s, q_t, k_t)
        seen.append(torch.autograd.grad(loss, q_s, retain_graph=True)[0].norm().item())
        return loss

    monkeypatch.setattr(haste_train, "attention_alignment_grad", watched)
    rows, saved = train("--eval-every", "0")
    assert len(seen) == 3 and all(norm > 0 for norm in seen)                # three steps of one pair, then none
    assert [("attention_loss" in r, "feature_loss" in r) for r in rows] == [(True, True)] * 3 + [(False, False)]
    assert saved["text"] == scenes.TEXT and saved["arch"]["context_dim"] == 64


def test_attention_weight_changes_the_weights(train):
    _, a = train("--eval-every", "0", "--align", "haste")
    _, b = train("--eval-every", "0", "--align", "haste", "--attention-weight", "0", out="b")
    name = "joint_blocks.0.x_block.attn.qkv.weight"
    assert not torch.equal(a["model"][name], b["model"][name])


def test_scores_pictures_and_resume(train, tmp_path, capsys):
    rows, straight = train()
    scored = [r for r in rows if "fd" in r]
    assert [r["step"] for r in scored] == [2, 4]
    assert scored[0].keys() >= {"fd", "text_accuracy", "text_accuracy_unseen", "place", "place_unseen"}
    assert "accuracy" not in scored[0] and (tmp_path / "run" / "samples.png").exists()
    assert "show what their caption says" in capsys.readouterr().out

    train("--steps", "2", out="again")
    again, resumed = train("--resume", "auto", out="again")
    assert all(torch.equal(w, resumed["ema"][k]) for k, w in straight["ema"].items())
    without = [{k: v for k, v in r.items() if k not in ("seconds", "images_per_s")} for r in again]
    assert without[-1] == {k: v for k, v in rows[-1].items() if k not in ("seconds", "images_per_s")}


@pytest.mark.parametrize("flags", [["--zero-init"], ["--stop", "auto", "--stop-interval", "1", "--stop-warmup", "1"],
                                   ["--qk-norm"], ["--contrastive", "0.05"], ["--precision", "bf16"]])
def test_flags_that_work_with_captions(train, flags):
    rows, _ = train(*flags)
    assert len(rows) == 4 and all(np.isfinite(r["loss"]) for r in rows) and rows[-1]["fd"] > 0


def test_zero_init_flag(train):
    _, saved = train("--zero-init", "--eval-every", "0", "--lr", "1e-9", "--steps", "1")
    assert saved["arch"]["zero_init"] and saved["model"]["final_layer.linear.weight"].abs().max() < 1e-8
    _, saved = train("--eval-every", "0", "--lr", "1e-9", "--steps", "1", out="default")
    assert saved["model"]["final_layer.linear.weight"].abs().max() > 0.01


def test_accumulation_changes_rounding_only(train):
    _, whole = train("--eval-every", "0", "--lr", "0.002")
    _, parts = train("--eval-every", "0", "--lr", "0.002", "--accumulate", "4", out="parts")
    assert all(torch.allclose(w, parts["model"][k], atol=1e-5) for k, w in whole["model"].items())


def test_init_takes_the_weights(train, tiny_run, tmp_path):
    _, first = train("--eval-every", "0")
    _, then = train("--eval-every", "0", "--init", str(tmp_path / "run" / "ckpt.pt"), "--lr", "1e-9", "--align", "none",
                    "--stop", "500", "--steps", "1", out="then")
    assert all(torch.allclose(w, first["ema"][k], atol=1e-6) for k, w in then["model"].items())
    tiny_run("--eval-every", "0", "--align", "none", "--stop", "500", out="sit")
    with pytest.raises(SystemExit, match="does not fit --model MMDiT-Ti/4 and --data scenes"):
        train("--init", str(tmp_path / "sit" / "ckpt.pt"), out="other")
    with pytest.raises(SystemExit, match="does not fit --model SiT-Ti/2 and --data digits"):
        tiny_run("--init", str(tmp_path / "run" / "ckpt.pt"), out="third")


@pytest.mark.parametrize("flags,message", [
    (["--model", "SiT-Ti/2"], "--data scenes has captions, which --model SiT-Ti/2 does not take: give another, as MMDiT-Ti/4"),
    (["--data", "digits"], "--data digits has class labels, which --model MMDiT-Ti/4 does not take: give another, as SiT-Ti/1"),
    (["--objective", "ddpm"], "--objective ddpm is for a SiT"),
    (["--projector", "conv"], "--projector conv is for a SiT"),
    (["--text", "clip.pt"], "--text clip.pt is for CLIP's captions"),
    (["--model", "SiT-Ti/2", "--zero-init"], "--zero-init True is for an MM-DiT"),
    (["--mirror"], "--mirror True would swap left and right"),
    (["--eval-features", "inception"], "--eval-features inception is for photographs"),
    (["--model", "MMDiT-9"], "must be SiT-Ti, S, B, L or XL.*MMDiT-Ti/4")])
def test_bad_flags(train, tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message) as error:
        train(*flags)
    assert "\n" not in str(error.value) and not (tmp_path / "run" / "ckpt.pt").exists()


def test_samples_with_captions(train, tmp_path):
    train("--eval-every", "0", "--align", "none", "--stop", "500")
    ckpt = ["--ckpt", str(tmp_path / "run" / "ckpt.pt"), "--steps", "2"]
    from PIL import Image

    def draw(*flags):
        program.main([*ckpt, *flags])

    draw("--out", str(tmp_path / "a.png"), "a seven left of a three", "a large four")
    picture = Image.open(tmp_path / "a.png")
    assert picture.height == 2 * (64 + evaluate.CAPTION_HEIGHT) and picture.width == 20 * 64 + 19 * 4
    draw()                                                                  # a few examples
    assert (tmp_path / "run" / "grid.png").exists()
    draw("--out", str(tmp_path / "a.gif"), "a large four", "--samples", "4")

    lines = tmp_path / "lines.txt"
    lines.write_text("a large four\n\na seven left of a three\n")
    draw("--out", str(tmp_path / "a.npz"), "--captions", str(lines), "--samples", "6", "--cfg", "2")
    draw("--out", str(tmp_path / "b.npz"), "a large four", "a seven left of a three", "--samples", "4", "--cfg", "2",
         "--batch-size", "3")
    assert Image.open(tmp_path / "a_grid.png").width == 2 * 64 + 4         # captions stand in columns here
    a, b = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert a["arr_1"].tolist() == [0, 1] * 3 and a["arr_0"].shape == (6, 16, 16, 3)
    assert np.abs(a["arr_0"][:4].astype(int) - b["arr_0"]).max() <= 1       # sample i depends on (seed, i) alone
    assert np.abs(a["arr_0"][0].astype(int) - a["arr_0"][2]).max() > 1


@pytest.mark.parametrize("flags,message", [
    (["a dragon"], r"dragon.*zero, one, two"),
    (["a four left of a seven above a nine"], "has 9 words, but at most 6"),
    (["a four", "--captions", "x.txt"], "--captions x.txt: captions are given as words, too"),
    (["--captions", "nothing.txt"], "--captions nothing.txt is neither a folder of prepare.py nor a text file"),
    (["a four", "--label", "3"], "--label 3 is for SiT and DiT and xAR, and .* holds an MM-DiT"),
    (["a four", "--text", "x.pt"], "--text x.pt is for CLIP's captions"),
    (["a four", "--merges", "x.txt"], "--merges x.txt is for CLIP's captions")])
def test_bad_captions(train, tmp_path, flags, message):
    train("--eval-every", "0", "--align", "none", "--stop", "500", "--steps", "1")
    with pytest.raises(SystemExit, match=message) as error:
        program.main(["--ckpt", str(tmp_path / "run" / "ckpt.pt"), "--steps", "2", *flags])
    assert "\n" not in str(error.value)


def test_captions_for_a_model_of_classes(tmp_path, tiny_run):
    tiny_run("--eval-every", "0", "--align", "none", "--stop", "500")
    with pytest.raises(SystemExit, match="'a four' is a caption, and .* holds a SiT, which takes none"):
        program.main(["--ckpt", str(tmp_path / "run" / "ckpt.pt"), "a four"])


def test_readme_says_that_words_are_not_language():
    from conftest import ROOT
    assert re.search(r"wenty-one words are not\s+language", (ROOT / "README.md").read_text())
