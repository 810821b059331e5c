"""xAR's two programs: every flag acts, a resumed run is the straight run, samples depend on their index alone."""
import dataclasses
import math
import os
import signal

import numpy as np
import pytest
import torch
from conftest import TINY_XAR, rows_of, same_weights
from PIL import Image

import bench
import data
import run
import test_packed
import xar

ALTERNATIVES = {
    "mirror": ["--mirror"], "depth": ["--depth", "4"], "hidden_size": ["--hidden-size", "32"],
    "num_heads": ["--num-heads", "1"], "entity": ["--entity", "scale"], "context": ["--context", "clean"],
    "dropout": ["--dropout", "0.5"], "attn_dropout": ["--attn-dropout", "0.5"], "label_drop": ["--label-drop", "0.9"],
    "steps": ["--steps", "5"], "batch_size": ["--batch-size", "4"], "accumulate": ["--accumulate", "4"],
    "lr": ["--lr", "0.01"], "warmup": ["--warmup", "0.5"], "decay": ["--decay", "0.5"], "lr_end": ["--lr-end", "0.01"],
    "beta2": ["--beta2", "0.5"], "weight_decay": ["--weight-decay", "1"], "clip": ["--clip", "0.01"],
    "ema": ["--ema", "0.9"], "precision": ["--precision", "bf16"], "seed": ["--seed", "1"],
    "log_every": ["--log-every", "2"], "eval_every": ["--eval-every", "1"], "eval_samples": ["--eval-samples", "30"],
    "eval_steps": ["--eval-steps", "3"], "eval_cfg": ["--eval-cfg", "2"],
}
LOOKING = ("log_every", "eval_every", "eval_samples", "eval_steps", "eval_cfg")
ELSEWHERE = {  # flags whose effect is no number of the run, and the test that shows it
    "data": "test_folders_train", "image_size": "test_folders_train", "data_root": "test_data_root_flag",
    "model": "test_model_flag", "device": "test_bad_flags", "compile": "test_compile_flag",
    "out": "test_run_leaves_its_files", "resume": "test_stopped_run_goes_on_bit_for_bit",
    "save_every": "test_checkpoints_are_written_when_asked", "latent_channels": "test_xar_trains_on_packed_latents",
    "vae": "test_xar_decodes_with_the_named_file",
}


@pytest.fixture(scope="module")
def base_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("base")
    xar.main([*TINY_XAR, "--out", str(out)])
    return rows_of(out), torch.load(out / "ckpt.pt", weights_only=True)


def test_every_field_is_covered_commented_and_shown(capsys):
    fields = {f.name for f in dataclasses.fields(xar.Config)}
    assert fields == ALTERNATIVES.keys() | ELSEWHERE.keys() and not ALTERNATIVES.keys() & ELSEWHERE.keys()
    assert all(name in globals() or hasattr(test_packed, name) for name in ELSEWHERE.values())
    with pytest.raises(SystemExit):
        xar.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(run.flag(name) in text for name in fields) and text.count("default: ") >= len(fields)


@pytest.mark.parametrize("field", ALTERNATIVES)
def test_every_flag_changes_something(field, base_run, tiny_xar):
    rows, saved = tiny_xar(*ALTERNATIVES[field])
    assert rows != base_run[0] or not same_weights(saved["ema"], base_run[1]["ema"])
    assert same_weights(saved["ema"], base_run[1]["ema"]) == (field in LOOKING)             # looking must not touch


def test_model_flag(tiny_xar, monkeypatch):
    monkeypatch.setitem(xar.XAR_CONFIGS, "xAR-B", dict(dim=32, encoder_depth=2, decoder_depth=1, num_heads=2))
    assert TINY_XAR[1:7:2] == ["--depth", "--hidden-size", "--num-heads"]   # which win over the size's own
    arch = tiny_xar("--model", "xAR-B", base=["train", *TINY_XAR[7:]])[1]["arch"]
    assert (arch["dim"], arch["encoder_depth"], arch["decoder_depth"], arch["num_heads"]) == (32, 2, 1, 2)


def test_compile_flag(tiny_xar, monkeypatch):
    compiled = []
    monkeypatch.setattr(xar.XAR, "compile", lambda self: compiled.append(self))
    tiny_xar("--compile")
    tiny_xar("--no-compile")
    assert len(compiled) == 1


def test_data_root_flag(tiny_xar, monkeypatch):
    asked, real = [], data.open_data
    monkeypatch.setattr(data, "open_data", lambda *args: (asked.append(args), real("digits"))[1])
    tiny_xar("--data", "cifar10", "--data-root", "there")
    assert asked == [("cifar10", None, "there")]


def test_folders_train(tiny_xar, photo_folder):
    rows, saved = tiny_xar("--data", str(photo_folder), "--image-size", "16", "--eval-samples", "9")
    assert (saved["arch"]["grid"], saved["arch"]["channels"], saved["arch"]["num_classes"]) == (16, 3, 3)
    assert tiny_xar("--data", str(photo_folder), "--image-size", "12", "--eval-samples", "9")[0] != rows


def test_presets_set_what_flags_do_not(monkeypatch):
    seen = []
    monkeypatch.setattr(xar, "train", lambda cfg, processes, stop: seen.append(cfg))
    xar.main(["train", "--preset", "cifar10", "--lr", "0.5", "--device", "cpu"])
    assert seen[0].data == "cifar10" and seen[0].mirror and seen[0].lr == 0.5
    fields = {f.name for f in dataclasses.fields(xar.Config)}
    assert all(preset.keys() <= fields for preset in xar.PRESETS.values())


def test_run_leaves_its_files(tmp_path, tiny_xar, capsys):
    rows, saved = tiny_xar(out="here")
    here = tmp_path / "here"
    assert {p.name for p in here.iterdir()} == {"log.jsonl", "ckpt.pt", "samples.png", "growth.png", "curves.png"}
    assert [r["step"] for r in rows] == [1, 2, 3, 4] and [r["step"] for r in rows if "fd" in r] == [2, 4]
    assert rows[3].keys() >= {"loss", "grad_norm", "lr", "fd", "fd_held", "accuracy", "nearest", "nearest_held"}
    assert saved["steps"] == 4 and saved["args"]["hidden_size"] == 16
    lines = capsys.readouterr().out.splitlines()
    assert "4 entities (cell:4) of 64 tokens" in lines[0] and lines[-1].startswith("next: python xar.py sample")
    assert Image.open(here / "growth.png").size == ((4 * 9 - 1) * 8, (8 * 9 - 1) * 8)       # a row a sample
    model = xar.load_xar(here / "ckpt.pt")
    assert model.entity == "cell:4" and model.encoder_blocks[0].attn.num_heads == 2
    assert same_weights(dict(model.state_dict()), dict(saved["ema"]), keys=("no",))


def test_growth_shows_the_sample_entity_by_entity():
    for entity, columns in (("cell:4", 4), ("scale", 4), ("patch", 16), ("image", 1)):
        model = xar.XAR(8, 1, 16, 1, 1, 2, 10, entity).eval()
        frames, found = xar.growth(model, 2, 1.0, seed=0, num=2)
        assert found == columns and len(frames) == 2 * columns
        whole = xar.indexed_sample(model, torch.arange(2), 2, 1.0, 0)
        assert torch.equal(frames[columns - 1::columns], whole)             # the last frame is the image
        if entity == "cell:4":
            assert torch.equal(frames[0, :, :4, :4], whole[0, :, :4, :4]) and not frames[0, :, 4:].any()


def test_checkpoints_are_written_when_asked(tiny_xar, monkeypatch):
    written, save = [], run.save_checkpoint
    monkeypatch.setattr(run, "save_checkpoint",
                        lambda path, content: (written.append(content["steps"]), save(path, content)))
    tiny_xar("--save-every", "0")
    tiny_xar("--save-every", "3")
    assert written == [4, 3, 4]


def test_learning_rate_rises_stays_and_falls_by_shares_of_the_run():
    for steps in (800, 80):
        cfg = xar.Config(steps=steps, lr=4e-4, lr_end=1e-5, warmup=0.125, decay=0.25)
        lr = np.array([xar.learning_rate(cfg, step) for step in range(steps)])
        rise, fall = steps // 8, 3 * steps // 4
        assert np.allclose(lr[:rise], 4e-4 * np.arange(1, rise + 1) / rise) and np.allclose(lr[rise:fall], 4e-4)
        assert abs(lr[-1] - 1e-5) < 1e-9 and abs(lr[(fall + steps) // 2 - 1] - (4e-4 + 1e-5) / 2) < 1e-9
    cfg = xar.Config(steps=10, warmup=0.0, decay=0.0)
    assert {xar.learning_rate(cfg, step) for step in range(10)} == {cfg.lr}


def test_only_matrices_decay():
    class One:
        world, device = 1, torch.device("cpu")
    model = xar.XAR(4, 1, 16, 1, 1, 2, 10, "image")
    groups = run.Student(model, xar.Config(), One(), decay_vectors=False).opt.param_groups
    decayed = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert all(decayed[id(p)] == (0.02 if p.ndim >= 2 else 0) for p in model.parameters())


@pytest.mark.parametrize("flags", [[], ["--dropout", "0.3", "--attn-dropout", "0.3"], ["--context", "clean"],
                                   ["--precision", "bf16", "--log-every", "100"]])
def test_stopped_run_goes_on_bit_for_bit(tiny_xar, monkeypatch, capsys, flags):
    flags = [*flags, "--steps", "6", "--eval-every", "0", "--resume", "auto"]
    rows, straight = tiny_xar(*flags, out="straight")
    real = data.batches

    def interrupted(*args, **kw):
        for i, batch in enumerate(real(*args, **kw)):
            if i == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch
    monkeypatch.setattr(data, "batches", interrupted)
    assert tiny_xar(*flags)[1]["steps"] == 3 and "stopped by a signal after step 3" in capsys.readouterr().out
    monkeypatch.setattr(data, "batches", real)
    rows_2, saved = tiny_xar(*flags)
    assert same_weights(saved, straight) and [r for r in rows_2 if r in rows] == rows
    assert "going on from step 3" in capsys.readouterr().out
    tiny_xar(*flags)
    assert "holds a finished run of 6 steps" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"xar.py: .*other flags: --entity patch \(was cell:4\)"):
        tiny_xar(*flags, "--entity", "patch")


def test_accumulation_is_the_whole_batch(tiny_xar):
    whole, parts = (tiny_xar("--steps", "10", "--eval-every", "0", *flags)[0] for flags in ([], ["--accumulate", "2"]))
    assert all(abs(a["loss"] - b["loss"]) < 1e-5 for a, b in zip(whole, parts))


def test_evaluation_is_of_the_average_in_eval_mode(tiny_xar, monkeypatch):
    seen, draw = [], xar.indexed_sample

    def watched(model, *args, **kw):
        seen.append((model.training, {k: w.clone() for k, w in model.state_dict().items()}))
        return draw(model, *args, **kw)
    monkeypatch.setattr(xar, "indexed_sample", watched)
    rows, saved = tiny_xar("--dropout", "0.5")
    assert not seen[-1][0] and same_weights(seen[-1][1], dict(saved["ema"]), keys=("no",))
    assert not same_weights(saved["ema"], saved["model"])


def test_a_loss_that_is_not_finite_ends_the_run(tiny_xar, monkeypatch):
    loss = xar.XAR.loss
    monkeypatch.setattr(xar.XAR, "loss", lambda *args, **kw: loss(*args, **kw) * math.nan)
    with pytest.raises(SystemExit, match="not finite in step 1; no checkpoint was written before"):
        tiny_xar()


@pytest.mark.parametrize("flags,message", [
    (["--entity", "cell:3"], "--entity cell:3 does not divide the grid: 8 must be a multiple of its"),
    (["--entity", "row"], "--entity row is none of patch, cell:k, subsample:s, scale, image"),
    (["--context", "dirty"], "--context: invalid choice: 'dirty'"),
    (["--model", "xAR-M"], "--model xAR-M is none of xAR-Ti, xAR-B"),
    (["--hidden-size", "20"], "--hidden-size 20 must be a multiple of 4 x --num-heads 2"),
    (["--depth", "3"], "--depth 3 must be even"),
    (["--dropout", "1"], r"--dropout 1.0 must lie in \[0, 1\)"),
    (["--warmup", "100"], r"--warmup 100.0 must lie in \[0, 1\)"),
    (["--warmup", "0.8"], "--warmup 0.8 must leave room for --decay 0.25"),
    (["--lr", "-1"], "--lr -1.0 must be a positive number"),
    (["--batch-size", "9", "--accumulate", "2"], "--batch-size 9 must be a multiple of 2"),
    (["--data", "nowhere"], "--data nowhere is no folder"),
    (["--image-size", "16"], "--image-size 16 does not fit --data digits"),
    (["--device", "gpu"], "--device gpu is no device"),
    (["--entty", "patch"], "--entty is no flag; did you mean --entity"),
])
def test_bad_flags(tiny_xar, flags, message):
    with pytest.raises(SystemExit, match=message) as e:
        tiny_xar(*flags)
    assert "\n" not in str(e.value) and str(e.value).startswith("xar.py")


# ---- sampling

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    xar.main([*TINY_XAR, "--out", str(out), "--eval-every", "0", "--ema", "0"])
    return out / "ckpt.pt"


def test_samples_depend_on_their_index_alone(trained, tmp_path):
    def draw(name, *flags):
        xar.main(["sample", "--ckpt", str(trained), "--num", "12", "--steps", "3", "--device", "cpu",
                  "--out", str(tmp_path / name), *flags])
        return np.load(tmp_path / name)["arr_0"].astype(int) if name.endswith("npz") else Image.open(tmp_path / name)
    whole = draw("a.npz")
    assert whole.shape == (12, 8, 8, 3) and (whole == whole[..., :1]).all()
    assert abs(draw("b.npz", "--batch-size", "5") - whole).max() <= 1       # the batch size changes only rounding
    assert np.array_equal(draw("c.npz", "--num", "9"), whole[:9])
    for flags in (["--cfg", "3"], ["--seed", "1"], ["--steps", "4"], ["--label", "3"], ["--precision", "bf16"]):
        other = draw("d.npz", *flags)
        assert not np.array_equal(other, whole)
        assert flags[0] != "--label" or np.array_equal(other[3], whole[3])  # sample 3 had that label before
    grid = draw("e.png")
    assert grid.size == ((10 * 9 - 1) * 8, (2 * 9 - 1) * 8)
    assert np.array_equal(np.array(grid)[::8, ::8][:8, :8], whole[0])


def test_bad_sampling(trained, tmp_path):
    torch.save({"ema": xar.XAR(8, 16, 16, 1, 1, 2, 10, "image").state_dict(),
                "arch": dict(grid=8, num_heads=2, entity="image")}, tmp_path / "latent.pt")
    content = torch.load(trained, weights_only=True)
    torch.save({**content, "arch": {**content["arch"], "grid": 16}}, tmp_path / "other.pt")
    for flags, message in ((["--ckpt", "none.pt"], "none.pt does not exist"),
                           (["--ckpt", str(tmp_path / "latent.pt")], "--vae must name .* latents of 16 channels"),
                           (["--ckpt", str(tmp_path / "other.pt")],
                            r"does not fit the model: of another shape .*\[1, 64, 16\] instead of \[1, 256, 16\]"),
                           (["--label", "10"], "--label 10 must lie in 0 ... 9"),
                           (["--num", "0"], "--num 0 must be 1"), (["--out", "x.gif"], "--out x.gif must end in .png"),
                           (["--cgf", "2"], "did you mean --cfg")):
        with pytest.raises(SystemExit, match=message) as e:
            xar.main(["sample", "--ckpt", str(trained), "--device", "cpu", "--out", str(tmp_path / "x.png"), *flags])
        assert "\n" not in str(e.value) and str(e.value).startswith("xar.py")
    for argv in ([], ["smaple"], ["--help"]):
        with pytest.raises(SystemExit, match="python xar.py train, or python xar.py sample"):
            xar.main(argv)


# ---- bench.py

def test_bench_compares_samplers_that_draw_the_same(capsys):
    flags = ["--hidden-size", "16", "--depth", "2", "--num-heads", "2", "--repeats", "1", "--device", "cpu"]
    bench.main(["sample", *flags, "--grid", "4", "--entity", "cell:2", "--steps", "4", "--sit-steps", "25"])
    text = capsys.readouterr().out
    assert float(text.split("differ by ")[1].split(" of")[0]) < 1e-5
    rows = [line.split("|") for line in text.splitlines() if line.startswith(("| xAR", "| SiT"))]
    counts = {row[1].strip(): int(row[4].replace(",", "")) for row in rows}
    cached = 4 * 4 * (1 + 3 * 2) + 3 * 4 * 2                                # entity 0 is not guided
    assert counts == {"xAR, cached": cached, "xAR, prefix recomputed": 4 * 4 * (1 + 2 * (2 + 3 + 4)),
                      "SiT": 25 * 16 * 2}
    for argv, message in ((["sampel"], "python bench.py sample"), (["sample", "--steps", "0"], "--steps 0 must be 1")):
        with pytest.raises(SystemExit, match=message):
            bench.main(argv)
