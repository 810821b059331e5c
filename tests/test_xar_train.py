"""xAR's training program: every flag acts, a resumed run is the straight run, bad input is one line."""
import dataclasses
import json
import math
import os
import signal
import weakref

import numpy as np
import pytest
import torch
from conftest import GUIDED_XAR, ROOT, TINY_XAR, rows_of, same_weights
from PIL import Image

import align
import data
import fid
import haste
import run
import sample
import teacher
import test_packed
import xar
import xar_train
from test_train import FewFeatures

OLD = ROOT / "tests" / "old"
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
GUIDED = {  # flags of the alignment, on top of GUIDED_XAR
    "align": ["--align", "repa"], "stop": ["--stop", "2"], "feature_weight": ["--feature-weight", "2"],
    "attention_weight": ["--attention-weight", "2"], "feature_depth": ["--feature-depth", "1"],
    "pairs": ["--pairs", "1:0"], "projector_dim": ["--projector-dim", "24"],
}
LOOKING = ("log_every", "eval_every", "eval_samples", "eval_steps", "eval_cfg")
ELSEWHERE = {  # flags whose effect is no number of the run, and the test that shows it
    "data": "test_folders_train", "image_size": "test_folders_train", "data_root": "test_data_root_flag",
    "model": "test_model_flag", "device": "test_bad_flags", "compile": "test_compile_flag",
    "out": "test_run_leaves_its_files", "resume": "test_stopped_run_goes_on_bit_for_bit",
    "save_every": "test_checkpoints_are_written_when_asked", "latent_channels": "test_xar_trains_on_packed_latents",
    "vae": "test_xar_decodes_with_the_named_file", "init": "test_init_starts_from_other_weights",
    "track": "test_track_makes_no_other_run", "eval_features": "test_inception_scores_samples",
    "eval_weights": "test_inception_scores_samples", "teacher": "test_teacher_flags",
    "teacher_weights": "test_teacher_flags", "teacher_steps": "test_teacher_flags", "cache": "test_teacher_flags",
    "stop_interval": "test_automatic_stop", "stop_warmup": "test_automatic_stop", "stop_threshold": "test_automatic_stop",
}


@pytest.fixture(scope="module")
def base_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("base")
    xar_train.main([*TINY_XAR, "--out", str(out)])
    return rows_of(out), torch.load(out / "ckpt.pt", weights_only=True)


@pytest.fixture(scope="module")
def guided_run(tmp_path_factory, small_teacher):
    out = tmp_path_factory.mktemp("guided")
    xar_train.main([*TINY_XAR, *GUIDED_XAR, "--out", str(out), "--teacher-weights", str(small_teacher)])
    return rows_of(out), torch.load(out / "ckpt.pt", weights_only=True)


def test_every_field_is_covered_commented_and_shown(capsys):
    fields = {f.name for f in dataclasses.fields(xar_train.Config)}
    tables = [*ALTERNATIVES, *GUIDED, *ELSEWHERE]
    assert fields == set(tables) and len(fields) == len(tables)
    assert all(name in globals() or hasattr(test_packed, name) for name in ELSEWHERE.values())
    with pytest.raises(SystemExit):
        xar_train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(run.flag(name) in text for name in fields) and text.count("default: ") >= len(fields)


@pytest.mark.parametrize("field", ALTERNATIVES)
def test_every_flag_changes_something(field, base_run, tiny_xar):
    rows, saved = tiny_xar(*ALTERNATIVES[field])
    assert rows != base_run[0] or not same_weights(saved["ema"], base_run[1]["ema"])
    assert same_weights(saved["ema"], base_run[1]["ema"]) == (field in LOOKING)             # looking must not touch


@pytest.mark.parametrize("field", GUIDED)
def test_every_flag_of_the_alignment_changes_something(field, guided_run, tiny_xar):
    rows, saved = tiny_xar(*GUIDED_XAR, *GUIDED[field])
    assert rows != guided_run[0] and not same_weights(saved["ema"], guided_run[1]["ema"])


def test_model_flag(tiny_xar, monkeypatch):
    monkeypatch.setitem(xar.XAR_CONFIGS, "xAR-B", dict(dim=32, encoder_depth=2, decoder_depth=1, num_heads=2))
    assert TINY_XAR[:6:2] == ["--depth", "--hidden-size", "--num-heads"]   # which win over the size's own
    arch = tiny_xar("--model", "xAR-B", base=TINY_XAR[6:])[1]["arch"]
    assert (arch["dim"], arch["encoder_depth"], arch["decoder_depth"], arch["num_heads"]) == (32, 2, 1, 2)


def test_compile_flag(tiny_xar, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self)))
    tiny_xar("--compile")
    tiny_xar("--no-compile")
    assert compiled == [xar.Block] * 2
    tiny_xar("--compile", *GUIDED_XAR)
    assert compiled[2:] == [xar.Block] * 4 + [teacher.Block] * 4
    for name, preset in xar_train.PRESETS.items():                          # presets for GPUs compile there
        cfg = xar_train.Config(**preset)
        assert run.compiling(cfg, torch.device("cuda")) == (name != "digits")


def test_inception_scores_samples(tiny_xar, base_run, monkeypatch):
    asked = []
    monkeypatch.setattr(fid, "load_inception", lambda weights: asked.append(weights) or FewFeatures())
    rows, _ = tiny_xar("--eval-features", "inception", "--eval-weights", "inception.pt")
    assert asked == ["inception.pt"] and all(r["fid"] > 0 for r in rows if "fd" in r)
    assert [{k: v for k, v in r.items() if k != "fid"} for r in rows] == base_run[0]


def test_a_longer_run_says_what_becomes_of_its_learning_rate(tiny_xar, capsys):
    """Warm-up and decay are shares of --steps: with more steps the rate rises again, and a line says so."""
    tiny_xar("--steps", "4", "--decay", "0.25")
    assert "note: --steps was" not in capsys.readouterr().out
    rows, _ = tiny_xar("--steps", "8", "--decay", "0.25", "--resume", "auto")
    assert rows[3]["lr"] < rows[4]["lr"] == 0.02
    assert "note: --steps was 4; " in (text := capsys.readouterr().out) and "continues at 0.02" in text


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
    monkeypatch.setattr(xar_train, "train", lambda cfg, processes, stop: seen.append(cfg))
    xar_train.main(["--preset", "cifar10", "--lr", "0.5", "--device", "cpu"])
    assert seen[0].data == "cifar10" and seen[0].mirror and seen[0].lr == 0.5
    fields = {f.name for f in dataclasses.fields(xar_train.Config)}
    assert all(preset.keys() <= fields for preset in xar_train.PRESETS.values())


def test_run_leaves_its_files(tmp_path, tiny_xar, capsys):
    rows, saved = tiny_xar(out="here")
    here = tmp_path / "here"
    assert {p.name for p in here.iterdir()} == {"log.jsonl", "ckpt.pt", "samples.png", "growth.png", "curves.png"}
    assert [r["step"] for r in rows] == [1, 2, 3, 4] and [r["step"] for r in rows if "fd" in r] == [2, 4]
    assert rows[3].keys() >= {"loss", "grad_norm", "lr", "fd", "fd_held", "accuracy", "nearest", "nearest_held"}
    assert saved["steps"] == 4 and saved["args"]["hidden_size"] == 16
    lines = capsys.readouterr().out.splitlines()
    assert "4 entities (cell:4) of 64 tokens" in lines[0] and lines[-1].startswith("next: python sample.py --ckpt ")
    assert Image.open(here / "growth.png").size == ((4 * 9 - 1) * 8, (8 * 9 - 1) * 8)       # a row a sample
    model = xar.load_xar(here / "ckpt.pt")
    assert model.entity == "cell:4" and model.encoder_blocks[0].attn.num_heads == 2
    assert same_weights(dict(model.state_dict()), dict(saved["ema"]), keys=("no",))


def test_checkpoints_are_written_when_asked(tiny_xar, monkeypatch):
    written, save = [], run.save_checkpoint
    monkeypatch.setattr(run, "save_checkpoint",
                        lambda path, content: (written.append(content["steps"]), save(path, content)))
    tiny_xar("--save-every", "0")
    tiny_xar("--save-every", "3")
    assert written == [4, 3, 4]


def test_learning_rate_rises_stays_and_falls_by_shares_of_the_run():
    for steps in (800, 80):
        cfg = xar_train.Config(steps=steps, lr=4e-4, lr_end=1e-5, warmup=0.125, decay=0.25)
        lr = np.array([xar_train.learning_rate(cfg, step) for step in range(steps)])
        rise, fall = steps // 8, 3 * steps // 4
        assert np.allclose(lr[:rise], 4e-4 * np.arange(1, rise + 1) / rise) and np.allclose(lr[rise:fall], 4e-4)
        assert abs(lr[-1] - 1e-5) < 1e-9 and abs(lr[(fall + steps) // 2 - 1] - (4e-4 + 1e-5) / 2) < 1e-9
    cfg = xar_train.Config(steps=10, warmup=0.0, decay=0.0)
    assert {xar_train.learning_rate(cfg, step) for step in range(10)} == {cfg.lr}


def test_only_matrices_decay():
    model = xar.XAR(4, 1, 16, 1, 1, 2, 10, "image")
    _, opt, _ = xar_train.training_state(xar_train.Config(), model, None)
    decayed = {id(p): g["weight_decay"] for g in opt.param_groups for p in g["params"]}
    assert all(decayed[id(p)] == (0.02 if p.ndim >= 2 else 0) for p in model.parameters())


def test_init_starts_from_other_weights(tiny_xar, tmp_path, capsys):
    """A fresh optimizer and step 0, but the averaged weights of another run."""
    flags = ["--ema", "0", "--lr", "1e-12", "--lr-end", "0"]                # the weights stay where they start
    _, first = tiny_xar("--steps", "2", out="first")
    file = str(tmp_path / "first" / "ckpt.pt")
    _, saved = tiny_xar(*flags, "--init", file, out="second")
    assert all(torch.allclose(w, first["ema"][k], atol=1e-8) for k, w in saved["ema"].items())
    assert saved["steps"] == 4 and not same_weights(saved["ema"], tiny_xar(*flags)[1]["ema"])
    bare = {k: v for k, v in first.items() if k in ("ema", "arch")}         # as others write it
    bare["arch"] = {**bare["arch"], "quantize_t": True}
    torch.save(bare, tmp_path / "bare.pt")
    assert tiny_xar("--init", str(tmp_path / "bare.pt"), out="third")[1]["arch"]["quantize_t"]
    for change, message in ((["--hidden-size", "32"], f"--init {file} does not fit --model xAR-Ti and --data digits"),
                            (["--entity", "cell:2"], "was trained with --entity cell:4: give the same"),
                            (["--init", "none.pt"], "--init none.pt does not exist")):
        with pytest.raises(SystemExit, match=message) as e:
            tiny_xar("--init", file, *change, out="fourth")
        assert "\n" not in str(e.value)


def test_older_checkpoints_continue(tmp_path):
    """tests/old/xar_4.pt was written before the files were rearranged; rows.json is its run's log."""
    (tmp_path / "ckpt.pt").write_bytes((OLD / "xar_4.pt").read_bytes())
    xar_train.main(["--depth", "2", "--hidden-size", "8", "--num-heads", "2", "--entity", "cell:4",
                    "--batch-size", "8", "--lr", "0.02", "--ema", "0.5", "--log-every", "1", "--eval-every", "0",
                    "--device", "cpu", "--steps", "8", "--out", str(tmp_path)])
    known = [r for r in json.loads((OLD / "rows.json").read_text())["xar"] if r["step"] > 4]
    found = rows_of(tmp_path)
    assert [r["step"] for r in found] == [5, 6, 7, 8]
    for a, b in zip(found, known):                                          # processors differ in the last digits
        assert a.keys() == b.keys() and all(abs(a[k] - b[k]) < 1e-3 * max(1, abs(b[k])) for k in a)


# ---- the alignment and its end

class Watch:
    """Counts the teacher's calls, and keeps the names of the terms of every loss."""

    def __init__(self, monkeypatch):
        self.calls, self.terms = 0, []
        make, losses = align.make_teacher, xar_train.losses

        def make_watched(*args):
            net = make(*args)
            self.teacher = weakref.ref(net)
            net.register_forward_hook(lambda *_: setattr(self, "calls", self.calls + 1))
            return net

        def watched(*args, **kw):
            total, terms = losses(*args, **kw)
            self.terms.append(set(terms))
            return total, terms
        monkeypatch.setattr(align, "make_teacher", make_watched)
        monkeypatch.setattr(xar_train, "losses", watched)


def test_the_teacher_guides_before_tau_and_is_gone_after(tiny_xar, monkeypatch, capsys):
    watch = Watch(monkeypatch)
    rows, _ = tiny_xar(*GUIDED_XAR, "--steps", "6")
    assert watch.calls == 3 and watch.teacher() is None                     # never called again, and its memory is free
    assert watch.terms == [{"loss", "feature_loss", "attention_loss"}] * 3 + [{"loss"}] * 3
    assert [("feature_loss" in r, "attention_loss" in r) for r in rows] == [(True, True)] * 3 + [(False, False)] * 3
    printed = capsys.readouterr().out
    assert "teacher small, 4 blocks; until step 3: features after 2 blocks, attention of blocks 0:1 2:3" in printed
    assert "step 3: alignment ends, teacher and projector are gone" in printed
    watch.calls = 0
    tiny_xar(*GUIDED_XAR, "--stop", "never")
    assert watch.calls == 4 and "--stop never: features after" in capsys.readouterr().out


def test_teacher_and_projector_are_freed_at_the_end_of_the_alignment(tiny_xar, monkeypatch):
    """Also compiled, where counting references does not free them, and although every step was saved."""
    seen, alive = [], []
    make, losses, drop = align.make_teacher, xar_train.losses, xar_train.drop_projector
    compile_block = torch.nn.Module.compile

    def watched_make(*args):
        net = make(*args)
        seen.append(weakref.ref(net.blocks[0].attn.qkv.weight))
        return net

    def watched_drop(model, opt):
        seen.append(weakref.ref(model.projector[0].weight.untyped_storage()))
        drop(model, opt)
        return {}                                                           # on a CPU, what is kept is no copy

    def watched_losses(*args):
        alive.append([reference() is not None for reference in seen])
        return losses(*args)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_block(self, backend="eager"))
    monkeypatch.setattr(align, "make_teacher", watched_make)
    monkeypatch.setattr(xar_train, "drop_projector", watched_drop)
    monkeypatch.setattr(xar_train, "losses", watched_losses)
    tiny_xar(*GUIDED_XAR, "--compile", "--eval-every", "0", "--save-every", "1", "--steps", "5")
    torch._dynamo.reset()
    assert alive == [[True]] * 3 + [[False, False]] * 2


def test_an_alignment_that_never_begins_is_none(tiny_xar, monkeypatch):
    watch = Watch(monkeypatch)
    flags = ["--dropout", "0.2", "--steps", "6", "--depth", "4"]
    rows, saved = tiny_xar(*flags)
    guided_rows, guided = tiny_xar(*flags, *GUIDED_XAR, "--stop", "0")
    assert same_weights(saved, guided) and rows == guided_rows and watch.calls == 0
    assert guided["tau"] == saved["tau"] == 0 and not saved["projector"] and "z_dim" not in saved["arch"]


def test_losses_are_weighted_as_stated():
    torch.manual_seed(0)
    for entity, context, alone in (("cell:4", "random", False), ("subsample:2", "clean", False), ("image", "random", True)):
        model = xar.XAR(8, 1, 32, 2, 1, 2, 10, entity, z_dim=6, projector_dim=8, feature_depth=1)
        x, eps, t = torch.randn(2, 1, 8, 8), torch.randn(2, 64, 1), torch.rand(2, len(model.sizes))
        y, pairs = torch.arange(2), [(0, 1), (2, 2)]
        targets = torch.randn(2, 64, 6), [(torch.randn(2, 3, 64, 4), torch.randn(2, 3, 64, 4)) for _ in pairs]
        cfg = xar_train.Config(feature_weight=0.3, attention_weight=0.7, context=context)
        total, terms = xar_train.losses(model, model, x, y, t, eps, targets, pairs, cfg, exact=True)
        assert torch.equal(terms["loss"], model.loss(x, y, t, eps, context=context))
        x_t, _, _, clean = model.noised(x, t, eps, context)
        _, z, taps = model(x_t, t, y, clean, tap_layers=[0, 2])
        tokens, taps_t, mask = align.in_entity_order(model, targets, clean)
        assert (mask is None) == alone
        attention = sum(haste.attention_alignment(*s, *k, mask) for s, k in zip(taps, taps_t)) / 2
        assert torch.allclose(terms["attention_loss"], attention)
        expected = terms["loss"] + 0.3 * haste.feature_alignment(z, tokens) + 0.7 * attention
        cheap, _ = xar_train.losses(model, model, x, y, t, eps, targets, pairs, cfg)
        grads = [torch.autograd.grad(l, list(model.parameters()), retain_graph=True) for l in (total, cheap, expected)]
        assert all(torch.equal(a, b) and torch.allclose(a, c, atol=1e-6) for a, b, c in zip(*grads))
        free, terms = xar_train.losses(model, model, x, y, t, eps, None, [], cfg)
        assert terms.keys() == {"loss"} and torch.equal(free, model.loss(x, y, t, eps, context=context))


def test_optimizer_state_of_the_rest_survives_bit_for_bit(tiny_xar, monkeypatch):
    seen, drop = [], xar_train.drop_projector

    def watched(model, opt):
        def snapshot():
            return {n: {k: v.clone() for k, v in opt.state[p].items()}
                    for n, p in model.named_parameters() if p in opt.state}
        before = snapshot()
        kept = drop(model, opt)
        after = snapshot()
        seen.append(kept.keys())
        assert before.keys() - after.keys() == kept.keys() and len(kept) == 6
        assert all(torch.equal(v, after[n][k]) for n in after for k, v in before[n].items())
        assert len(opt.state) == len(after) and len(opt.param_groups) == 2
        return kept
    monkeypatch.setattr(xar_train, "drop_projector", watched)
    _, saved = tiny_xar(*GUIDED_XAR, "--stop", "2")
    assert len(seen) == 1 and len(saved["opt"]["param_groups"]) == 2 and saved["projector"].keys() == seen[0]


@pytest.mark.parametrize("stop", ["2", "never"])
def test_the_projector_lies_beside_the_official_layout(stop, tiny_xar, tmp_path):
    _, plain = tiny_xar("--depth", "4", out="plain")
    _, saved = tiny_xar(*GUIDED_XAR, "--stop", stop)
    for name in ("model", "ema"):
        assert saved[name].keys() == plain[name].keys()
    assert len(saved["projector"]) == 6 and all(k.startswith("projector.") for k in saved["projector"])
    path = tmp_path / "run" / "ckpt.pt"
    model = xar.load_xar(path)
    assert model.projector is None and same_weights(dict(model.state_dict()), dict(saved["ema"]), keys=("no",))
    sample.main(["--ckpt", str(path), "--samples", "2", "--steps", "1", "--device", "cpu"])
    assert (tmp_path / "run" / "grid.png").exists()
    slow = ["--ema", "0", "--lr", "1e-12", "--lr-end", "0"]                 # the weights stay where they start
    _, on = tiny_xar(*GUIDED_XAR, *slow, "--init", str(path), out="on")     # with a projector of its own
    assert all(torch.allclose(w, saved["ema"][k], atol=1e-8) for k, w in on["ema"].items())


def test_a_pyramid_has_feature_alignment_only(tiny_xar, capsys):
    flags = ["--align", "haste", "--stop", "3", "--depth", "4", "--entity", "scale"]
    rows, saved = tiny_xar(*flags)
    printed = capsys.readouterr().out
    assert "note: with --entity scale only features are aligned: its coarse tokens have no counterpart" in printed
    assert "features after 2 blocks, attention of blocks none" in printed and "attention_loss" not in rows[0]
    assert "feature_loss" in rows[0] and rows == tiny_xar(*flags, "--align", "repa")[0]
    assert "note: --entity" not in capsys.readouterr().out


def test_automatic_stop(tiny_xar, monkeypatch):
    angles = iter([0.5, -0.01, -0.2])
    monkeypatch.setattr(xar_train, "gradient_cosine", lambda *a: torch.tensor(next(angles)))
    flags = [*GUIDED_XAR, "--stop", "auto", "--steps", "12", "--stop-warmup", "3", "--stop-interval", "3",
             "--log-every", "5", "--eval-every", "0"]
    rows, saved = tiny_xar(*flags)
    assert {r["step"]: round(r["grad_cosine"], 3) for r in rows if "grad_cosine" in r} == {4: 0.5, 7: -0.01, 10: -0.2}
    assert saved["tau"] == 9 and ["feature_loss" in r for r in rows] == [r["step"] <= 9 for r in rows]
    for change, tau in ((["--stop-warmup", "6"], 12), (["--stop-interval", "2", "--stop-warmup", "4"], 8),
                        (["--stop-threshold", "0"], 6)):
        angles = iter([0.5, -0.01, -0.2])
        assert tiny_xar(*flags, "--steps", "14", *change)[1]["tau"] == tau


def test_the_angle_is_that_of_the_block_below_the_projector_without_dropout(tiny_xar, monkeypatch):
    seen, real = [], haste.gradient_cosine

    def watched(losses_at, parameters):
        parameters = list(parameters)
        found = real(losses_at, parameters)
        assert torch.equal(found, real(losses_at, parameters))              # always the same batch, and no dropout
        seen.append(len(parameters))
        return found
    monkeypatch.setattr(xar_train, "gradient_cosine", watched)
    flags = [*GUIDED_XAR, "--stop", "auto", "--steps", "3", "--stop-warmup", "1", "--stop-interval", "1",
             "--eval-every", "0", "--dropout", "0.5", "--stop-threshold", "-1"]
    rows, _ = tiny_xar(*flags)
    looked = {r["step"]: r["grad_cosine"] for r in rows if "grad_cosine" in r}
    assert looked.keys() == {2, 3} and all(-1 < c < 1 for c in looked.values()) and len(set(seen)) == 1
    again, _ = tiny_xar(*GUIDED_XAR, "--stop", "never", *flags[len(GUIDED_XAR) + 2:])       # looking changes nothing
    assert [r["loss"] for r in again] == [r["loss"] for r in rows]


def test_teacher_flags(tiny_xar, guided_run, small_teacher, monkeypatch, tmp_path):
    net = teacher.load_small(small_teacher)
    with torch.no_grad():
        net.norm.weight.mul_(torch.linspace(0.5, 2, 16))
    torch.save({"config": net.config, "model": net.state_dict()}, tmp_path / "other.pt")
    assert tiny_xar(*GUIDED_XAR, "--teacher-weights", str(tmp_path / "other.pt"))[0] != guided_run[0]
    asked = []
    monkeypatch.setattr(teacher, "load_teacher", lambda name, weights: (
        asked.append((name, weights)), teacher.DINOv2(embed_dim=8, depth=12, num_heads=2))[1])
    _, saved = tiny_xar(*GUIDED_XAR, "--teacher", "dinov2_vits14", "--teacher-weights", "w.pth")
    assert asked == [("dinov2_vits14", "w.pth")] and saved["arch"]["z_dim"] == 8
    monkeypatch.undo()
    trained, original = [], teacher.train_small
    monkeypatch.setattr(teacher, "train_small",
                        lambda *args, **kw: (trained.append((kw["cache"], kw["steps"])), original(*args, **kw))[1])
    xar_train.main([*TINY_XAR, *GUIDED_XAR, "--out", str(tmp_path / "c"), "--cache", str(tmp_path / "kept"),
                    "--teacher-steps", "1"])
    assert trained == [(str(tmp_path / "kept"), 1)] and len(list((tmp_path / "kept").glob("teacher-*.pt"))) == 1


@pytest.mark.parametrize("flags", [["--stop", "2"], ["--stop", "3"], ["--stop", "4"], ["--context", "clean"],
                                   ["--stop", "never", "--precision", "bf16"], ["--entity", "subsample:2"],
                                   ["--stop", "auto", "--stop-warmup", "2", "--stop-interval", "3",
                                    "--stop-threshold", "1", "--dropout", "0.2"]])
def test_resumed_aligned_run_is_the_straight_run_bit_for_bit(tiny_xar, flags):
    """Before, at and after the end of the alignment; warm-up and decay are shares of --steps, so they are off."""
    flags = [*GUIDED_XAR, *flags, "--resume", "auto", "--eval-every", "0", "--warmup", "0", "--decay", "0"]
    rows, saved = tiny_xar(*flags, "--steps", "6", out="straight")
    for steps in ("2", "3", "6"):
        rows_2, saved_2 = tiny_xar(*flags, "--steps", steps, out="parts")
    assert same_weights(saved, saved_2, ("model", "ema", "opt", "projector")) and saved["tau"] == saved_2["tau"]
    assert len(saved["projector"]) == 6 and rows_2 == rows


def test_track_makes_no_other_run(tiny_xar, monkeypatch, base_run):
    seen = []
    monkeypatch.setattr(run, "tracker", lambda cfg, start: lambda row, picture: seen.append((row["step"], picture)))
    rows, saved = tiny_xar("--track", "wandb")
    assert rows == base_run[0] and same_weights(saved["ema"], base_run[1]["ema"])
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert [picture and picture.name for _, picture in seen] == [None, "samples.png"] * 2


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
    assert "resuming from step 3" in capsys.readouterr().out
    tiny_xar(*flags)
    assert "holds a finished run of 6 steps" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"xar_train.py: .*other flags: --entity patch \(was cell:4\)"):
        tiny_xar(*flags, "--entity", "patch")


def test_accumulation_is_the_whole_batch(tiny_xar):
    whole, parts = (tiny_xar("--steps", "10", "--eval-every", "0", *flags)[0] for flags in ([], ["--accumulate", "2"]))
    assert all(abs(a["loss"] - b["loss"]) < 1e-5 for a, b in zip(whole, parts))
    flags = [*GUIDED_XAR, "--stop", "6", "--steps", "10", "--eval-every", "0", "--lr", "0.005"]
    whole, parts = (tiny_xar(*flags, *more)[0] for more in ([], ["--accumulate", "2"]))
    for a, b in zip(whole, parts):
        assert all(abs(a[k] - b[k]) < 1e-5 * max(1, abs(a[k])) for k in a if k.endswith("loss"))


def test_evaluation_is_of_the_average_in_eval_mode(tiny_xar, monkeypatch):
    seen, network = [], xar.XAR.network

    def watched(model, *args, **kw):
        seen.append((model.training, {k: w.clone() for k, w in model.state_dict().items()}))
        return network(model, *args, **kw)
    monkeypatch.setattr(xar.XAR, "network", watched)
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
    (["--data", "nowhere"], "--data nowhere is not a folder"),
    (["--image-size", "16"], "--image-size 16 does not fit --data digits"),
    (["--stop", "soon"], "--stop soon must be a number of steps, auto or never"),
    (["--align", "haste"], "--feature-depth 2 must lie in 1 ... 1, the depth of the encoder"),
    (["--align", "repa", "--feature-depth", "2"], "--feature-depth 2 must lie in 1 ... 1, the depth of the encoder"),
    (["--align", "haste", "--feature-depth", "1"], "--pairs 2:11: student blocks are 0 ... 1"),
    ([*GUIDED_XAR, "--pairs", "0:4"], "--pairs 0:4: student blocks are 0 ... 3, teacher blocks 0 ... 3"),
    ([*GUIDED_XAR, "--pairs", "0-4"], "--pairs 0-4 must look like 4:8,5:9"),
    ([*GUIDED_XAR, "--entity", "scale"], "--pairs 0:1,2:3 is not for --entity scale: leave it out"),
    (["--projector-dim", "0"], "--projector-dim 0 must be 1 or more"),
    (["--feature-weight", "-1"], "--feature-weight -1.0 must be 0 or more"),
    (["--device", "gpu"], "--device gpu is not a device"),
    (["--entty", "patch"], "--entty is not a flag; did you mean --entity"),
])
def test_bad_flags(tiny_xar, flags, message):
    with pytest.raises(SystemExit, match=message) as e:
        tiny_xar(*flags)
    assert "\n" not in str(e.value) and str(e.value).startswith("xar_train.py: ")
