"""One process: every flag acts, guidance ends cleanly, a resumed run is the straight run, bad input is one line."""
import dataclasses
import json
import math
import os
import re
import signal
import sys
import threading
import types
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, photographs, rows_of, same_weights
from PIL import Image
from test_teacher import FAMILIES, heads, official

import align
import data
import ddp
import dit
import evaluate
import fid
import haste
import haste_train
import run
import sit
import teacher
import test_coco
import test_packed
import test_scenes
import xar


# ---- every flag changes something

ALTERNATIVES = {
    "mirror": ["--mirror"], "model": ["--model", "SiT-Ti/4"], "depth": ["--depth", "5"],
    "hidden_size": ["--hidden-size", "48"], "num_heads": ["--num-heads", "4"], "qk_norm": ["--qk-norm"],
    "align": ["--align", "repa"], "stop": ["--stop", "2"], "feature_weight": ["--feature-weight", "2"],
    "attention_weight": ["--attention-weight", "2"], "feature_depth": ["--feature-depth", "1"],
    "pairs": ["--pairs", "1:0"], "projector_dim": ["--projector-dim", "24"], "path": ["--path", "cosine"],
    "time": ["--time", "lognormal"], "label_drop": ["--label-drop", "0.9"], "steps": ["--steps", "5"],
    "batch_size": ["--batch-size", "4"], "lr": ["--lr", "0.01"], "warmup": ["--warmup", "0"],
    "beta2": ["--beta2", "0.5"], "weight_decay": ["--weight-decay", "1"], "clip": ["--clip", "0.01"],
    "ema": ["--ema", "0.9"], "seed": ["--seed", "1"], "log_every": ["--log-every", "2"],
    "eval_every": ["--eval-every", "1"], "eval_samples": ["--eval-samples", "30"], "eval_steps": ["--eval-steps", "3"],
    "objective": ["--objective", "ddpm"], "projector": ["--projector", "conv"],
    "spatial_norm": ["--spatial-norm", "0.6"], "contrastive": ["--contrastive", "0.05"],
    "eval_cfg": ["--eval-cfg", "2"], "precision": ["--precision", "bf16"], "accumulate": ["--accumulate", "4"],
}
ELSEWHERE = {  # flags whose effect is no number of the run, and the test that shows it
    "data": "test_folders_train", "image_size": "test_folders_train", "data_root": "test_torchvision_sets",
    "device": "test_bad_flags", "teacher": "test_teacher_flags", "teacher_weights": "test_teacher_flags",
    "teacher_steps": "test_teacher_flags", "cache": "test_teacher_flags", "out": "test_run_leaves_its_files",
    "resume": "test_resume_flag", "save_every": "test_checkpoints_are_written_when_asked",
    "compile": "test_compile_flag", "stop_interval": "test_automatic_stop", "stop_warmup": "test_automatic_stop",
    "stop_threshold": "test_automatic_stop", "latent_channels": "test_packed_flags", "vae": "test_packed_flags",
    "init": "test_init_starts_from_other_weights", "track": "test_track_sends_the_log_elsewhere",
    "projector_kernel": "test_irepa_flags",
    "eval_features": "test_inception_scores_samples", "eval_weights": "test_inception_scores_samples",
    "zero_init": "test_zero_init_flag", "text": "test_text_flag",           # of MM-DiT
}


@pytest.fixture(scope="module")
def base_run(tmp_path_factory, small_teacher):
    out = tmp_path_factory.mktemp("base")
    haste_train.main([*TINY, "--out", str(out), "--teacher-weights", str(small_teacher)])
    return rows_of(out), torch.load(out / "ckpt.pt", weights_only=True)


def test_every_field_is_covered_commented_and_shown(capsys):
    fields = {f.name for f in dataclasses.fields(haste_train.Config)}
    assert fields == ALTERNATIVES.keys() | ELSEWHERE.keys() and not ALTERNATIVES.keys() & ELSEWHERE.keys()
    known = [*globals(), *dir(test_packed), *dir(test_scenes), *dir(test_coco)]
    assert set(ELSEWHERE.values()) <= set(known)
    with pytest.raises(SystemExit):
        haste_train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for f in dataclasses.fields(haste_train.Config):
        assert run.flag(f.name) in text
    assert text.count("default: ") >= len(fields) and "default: 0.004" in text


@pytest.mark.parametrize("field", ALTERNATIVES)
def test_every_flag_changes_something(field, base_run, tiny_run):
    rows, saved = tiny_run(*ALTERNATIVES[field])
    assert rows != base_run[0] or not same_weights(saved["ema"], base_run[1]["ema"])
    if field not in ("eval_every", "eval_samples", "eval_steps", "eval_cfg", "log_every"):      # looking must not touch
        assert not same_weights(saved["ema"], base_run[1]["ema"])
    else:
        assert same_weights(saved["ema"], base_run[1]["ema"])


def test_the_same_flags_give_the_same_run(base_run, tiny_run):
    rows, saved = tiny_run()
    assert rows == base_run[0] and same_weights(saved, base_run[1])


def test_rows_do_not_depend_on_when_one_looks(tiny_run):
    """Also in bf16, where the logged value is computed apart from the training form."""
    flags = ["--precision", "bf16", "--stop", "never", "--steps", "6"]
    often, seldom = tiny_run(*flags, "--eval-every", "3"), tiny_run(*flags, "--log-every", "4", "--eval-every", "3")
    assert same_weights(often[1], seldom[1])
    assert [r for r in often[0] if r["step"] in (3, 4, 6)] == seldom[0]


def test_presets_set_what_flags_do_not(monkeypatch):
    seen = []
    monkeypatch.setattr(haste_train, "train", lambda cfg, processes, stop: seen.append(cfg))
    haste_train.main(["--preset", "cifar10", "--lr", "0.5", "--device", "cpu"])
    cfg = seen[0]
    assert cfg.data == "cifar10" and cfg.model == "SiT-S/2" and cfg.mirror and cfg.lr == 0.5
    fields = {f.name for f in dataclasses.fields(haste_train.Config)}
    for preset in haste_train.PRESETS.values():
        assert preset.keys() <= fields
        haste_train.check(haste_train.Config(**preset), world=1)


def test_run_leaves_its_files(tmp_path, tiny_run, capsys):
    rows, saved = tiny_run(out="here")
    assert {p.name for p in (tmp_path / "here").iterdir()} == {"log.jsonl", "ckpt.pt", "samples.png", "curves.png"}
    assert [r["step"] for r in rows] == [1, 2, 3, 4] and [r["step"] for r in rows if "fd" in r] == [2, 4]
    assert all(r.keys() >= {"loss", "grad_norm", "lr"} for r in rows)
    assert [("feature_loss" in r, "attention_loss" in r) for r in rows] == [(True, True)] * 3 + [(False, False)]
    assert rows[3].keys() >= {"fd", "fd_held", "accuracy", "nearest", "nearest_held"}
    assert saved["steps"] == 4 and saved["args"]["hidden_size"] == 32 and isinstance(saved["args"], dict)
    lines = capsys.readouterr().out.splitlines()
    assert "Frechet distance" in lines[-3] and "samples.png" in lines[-2] and lines[-1].startswith("next: ")
    assert Image.open(tmp_path / "here" / "samples.png").size == ((2 * 9 - 1) * 8, (10 * 9 - 1) * 8)     # a row a class
    model = sit.load_sit(tmp_path / "here" / "ckpt.pt")                     # own heads, 2 at width 32, from the file
    assert model.blocks[0].attn.num_heads == 2 and model.projectors is not None and model.encoder_depth == 3
    assert same_weights(dict(model.state_dict()), dict(saved["ema"]), keys=("no",))


def test_checkpoints_are_written_when_asked(tiny_run, monkeypatch):
    written = []
    save = run.save_checkpoint
    monkeypatch.setattr(run, "save_checkpoint",
                        lambda path, content: (written.append(content["steps"]), save(path, content)))
    for every, steps in (("0", [4]), ("3", [3, 4])):
        written.clear()
        tiny_run("--save-every", every)
        assert written == steps


def test_compile_flag(tiny_run, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self)))
    tiny_run("--compile")
    assert compiled == [sit.Block] * 4 + [teacher.Block] * 4                # each of both networks' blocks, nothing else
    tiny_run("--no-compile")
    tiny_run("--no-compile", "--resume", "auto", "--steps", "5")
    assert len(compiled) == 8
    tiny_run("--compile", "--resume", "auto", "--steps", "6")               # it may come and go; the teacher is gone
    assert len(compiled) == 12


def test_presets_for_gpus_compile_there_and_on_a_cpu_only_if_asked():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for name, preset in haste_train.PRESETS.items():
        cfg = haste_train.Config(**preset)
        assert run.compiling(cfg, cuda) == (name not in ("digits", "scenes", "clutter")) and not run.compiling(cfg, cpu)
    for asked in (True, False):
        cfg = haste_train.Config(compile=asked)
        assert run.compiling(cfg, cuda) == run.compiling(cfg, cpu) == asked


def test_teacher_flags(tiny_run, tmp_path, small_teacher, monkeypatch, base_run):
    net = teacher.load_small(small_teacher)
    with torch.no_grad():
        net.norm.weight.mul_(torch.linspace(0.5, 2, 16))
    torch.save({"config": net.config, "model": net.state_dict()}, tmp_path / "other.pt")
    assert tiny_run("--teacher-weights", str(tmp_path / "other.pt"))[0] != base_run[0]
    asked = []
    monkeypatch.setattr(teacher, "load_teacher",
                        lambda name, weights: (asked.append((name, weights)),
                                               teacher.DINOv2(embed_dim=8, depth=12, num_heads=2))[1])
    rows, saved = tiny_run("--teacher", "dinov2_vits14", "--teacher-weights", "w.pth")
    assert asked == [("dinov2_vits14", "w.pth")] and saved["arch"]["z_dim"] == 8
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="dinov3_vitb16.*--teacher-weights") as e:          # a form stands before it
        haste_train.main([*TINY, "--out", str(tmp_path / "gated"), "--teacher", "dinov3_vitb16"])
    assert "\n" not in str(e.value)
    trained, original = [], teacher.train_small
    monkeypatch.setattr(teacher, "train_small",
                        lambda *args, **kw: (trained.append((kw["cache"], kw["steps"])), original(*args, **kw))[1])
    haste_train.main([*TINY, "--out", str(tmp_path / "c"), "--cache", str(tmp_path / "kept"), "--teacher-steps", "1"])
    assert set(trained) == {(str(tmp_path / "kept"), 1)} and len(list((tmp_path / "kept").glob("teacher-*.pt"))) == 1


# ---- guidance and its end

class Watch:
    """Counts the teacher's calls and keeps what the loop hands to the losses."""

    def __init__(self, monkeypatch):
        self.calls, self.terms, self.teacher = 0, [], None
        make, losses = align.make_teacher, haste_train.losses

        def make_watched(*args):
            net = make(*args)
            self.teacher = weakref.ref(net)
            net.register_forward_hook(lambda *_: setattr(self, "calls", self.calls + 1))
            return net

        def watched(model, *args, **kw):
            total, terms = losses(model, *args, **kw)
            parts = {k: v for k, v in terms.items() if k != "attention_loss"}               # logged, not trained
            if "attention_loss" in terms:
                parts["attention_loss"] = total - parts["loss"] - parts["feature_loss"]     # both weights are 1
            params = [p for p in (model if isinstance(model, torch.nn.Module) else model.__self__).parameters()
                      if p.requires_grad]
            reach = {k: sum(g is not None and bool(g.any())
                            for g in torch.autograd.grad(v, params, retain_graph=True, allow_unused=True))
                     for k, v in parts.items()}
            self.terms.append(reach)
            return total, terms
        monkeypatch.setattr(align, "make_teacher", make_watched)
        monkeypatch.setattr(haste_train, "losses", watched)


def test_guidance_acts_before_its_end_and_is_absent_after(tiny_run, monkeypatch):
    watch = Watch(monkeypatch)
    tiny_run("--steps", "6", "--stop", "3")
    assert watch.calls == 3 and watch.teacher() is None                     # never called again, and its memory is free
    assert [set(t) for t in watch.terms] == [{"loss", "feature_loss", "attention_loss"}] * 3 + [{"loss"}] * 3
    assert all(n > 0 for terms in watch.terms[1:3] for n in terms.values())
    for flags, calls in ((["--stop", "never"], 6), (["--stop", "0"], 0), (["--align", "none"], 0)):
        watch.calls = 0
        tiny_run("--steps", "6", *flags)
        assert watch.calls == calls


@pytest.mark.parametrize("grid", [4, *(pytest.param(grid, marks=pytest.mark.slow) for grid in (7, 16))])
@pytest.mark.parametrize("family", [*FAMILIES, "dinov2_reg4"])
def test_every_family_teaches_on_any_grid(family, grid, tiny_run, tmp_path, monkeypatch):
    """Both losses are finite and reach the student, the tokens are the student's, and a resumed run is exact."""
    g, sd = official(family)
    monkeypatch.setattr(teacher, "load_teacher", lambda name, weights: teacher.teacher_from_state_dict(
        family.split("_")[0], sd, heads(g)))
    watch, shapes = Watch(monkeypatch), []
    loss = haste.attention_alignment_grad
    monkeypatch.setattr(haste_train, "attention_alignment_grad",
                        lambda *qk: (shapes.append([(len(x), x.shape[2]) for x in qk]), loss(*qk))[1])
    flags = ["--data", str(photographs(tmp_path / "photos")), "--image-size", str(2 * grid), "--teacher", "one",
             "--stop", "never", "--eval-every", "0", "--resume", "auto"]
    rows, saved = tiny_run(*flags, "--steps", "3")
    assert len(rows) == 3 and watch.calls == 3
    assert all(math.isfinite(row[key]) for row in rows for key in ("loss", "feature_loss", "attention_loss", "grad_norm"))
    assert all(n > 0 for terms in watch.terms[1:] for n in terms.values())  # at first the gates of the blocks are 0
    assert shapes and all(pair == (8, grid ** 2) for four in shapes for pair in four)
    if grid == 4:
        tiny_run(*flags, "--steps", "1", out="parts")
        again, saved_again = tiny_run(*flags, "--steps", "3", out="parts")
        assert again == rows and same_weights(saved, saved_again)


def test_losses_are_weighted_as_stated():
    torch.manual_seed(0)
    model = sit.SiT(8, 2, 1, 32, 3, 2, 10, z_dim=6, projector_dim=8, encoder_depth=2)
    x, eps, t, y = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.rand(2), torch.arange(2)
    targets = torch.randn(2, 16, 6), [(torch.randn(2, 3, 16, 4), torch.randn(2, 3, 16, 4)) for _ in range(2)]
    cfg = haste_train.Config(feature_weight=0.3, attention_weight=0.7)
    total, terms = haste_train.losses(model, x, y, t, eps, targets, [(0, 1), (2, 2)], cfg, exact=True)
    assert torch.allclose(terms["loss"], sit.flow_loss(model, x, y, t, eps))
    _, _, taps = model(sit.interpolant(x, eps, t)[0], t, y, tap_layers=(0, 2))
    assert torch.allclose(terms["attention_loss"],
                          sum(haste_train.attention_alignment(*s, *k) for s, k in zip(taps, targets[1])) / 2)
    weighted = (terms["loss"] + 0.3 * terms["feature_loss"]
                + 0.7 * sum(haste_train.attention_alignment(*s, *k) for s, k in zip(taps, targets[1])) / 2)
    cheap, _ = haste_train.losses(model, x, y, t, eps, targets, [(0, 1), (2, 2)], cfg)
    params = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(l, params, retain_graph=True) for l in (total, cheap, weighted)]
    for a, b, c in zip(*gradients):
        assert torch.equal(a, b)                                            # looking at the value changes nothing
        assert torch.allclose(a, c, atol=1e-6)
    repa, terms = haste_train.losses(model, x, y, t, eps, (targets[0], []), [], cfg)
    assert terms.keys() == {"loss", "feature_loss"}
    plain, terms = haste_train.losses(model, x, y, t, eps, None, [], cfg)
    assert terms.keys() == {"loss"} and torch.equal(plain, terms["loss"])


def test_irepa_flags(tiny_run, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(haste_train, "feature_alignment",
                        lambda z, target: (seen.append(target), haste.feature_alignment(z, target))[1])
    flags = ["--projector", "conv", "--spatial-norm", "1", "--attention-weight", "0"]
    for kernel in ("1", "3"):
        rows, saved = tiny_run(*flags, "--projector-kernel", kernel, out="conv")
        assert saved["ema"]["projectors.0.projection_layer.weight"].shape == (16, 32, int(kernel), int(kernel))
        loaded = sit.load_sit(tmp_path / "conv" / "ckpt.pt")                # kept after the end of the alignment
        assert isinstance(loaded.projectors[0], sit.ConvProjector)
        assert same_weights(dict(loaded.state_dict()), dict(saved["ema"]), keys=("no",))
    assert seen and all(target.mean(1).abs().max() < 1e-5 for target in seen)               # of every image and channel


def test_ddpm_trains_with_the_same_alignment(tiny_run, tmp_path, monkeypatch):
    """DiT's loss in place of the flow loss; taps, projector, teacher, termination and trigger are the same."""
    asked, original = [], dit.ddpm_terms
    monkeypatch.setattr(dit, "ddpm_terms", lambda out, x, eps, t: (asked.append(t), original(out, x, eps, t))[1])
    rows, saved = tiny_run("--objective", "ddpm", "--stop", "3")
    assert [r.keys() >= {"loss", "vb", "feature_loss", "attention_loss"} for r in rows] == [True] * 3 + [False]
    assert rows[3].keys() >= {"loss", "vb", "fd"} and saved["ema"]["final_layer.linear.weight"].shape == (8, 32)
    steps = torch.cat(asked)
    assert steps.dtype == torch.int64 and 0 <= steps.min() and steps.max() < 1000 and len(set(steps.tolist())) > 20
    model = sit.load_sit(tmp_path / "run" / "ckpt.pt")                      # the file itself says that it is a DiT
    assert model.keep_sigma and model.objective == "ddpm"
    # the angle is measured at the steps round(1000 t) - 1
    asked.clear()
    flags = ["--stop", "auto", "--stop-warmup", "0", "--stop-interval", "9", "--stop-threshold", "-1", "--steps", "1"]
    rows, _ = tiny_run("--objective", "ddpm", *flags)
    assert -1 <= rows[0]["grad_cosine"] <= 1
    assert [t.unique().tolist() for t in asked[:4]] == [[19], [99], [499], [799]]
    # and a DiT is a place to start from
    start = str(tmp_path / "run" / "ckpt.pt")
    flags = ["--objective", "ddpm", "--steps", "1", "--eval-every", "0"]
    assert tiny_run(*flags, "--init", start, out="on")[0] != tiny_run(*flags, out="new")[0]
    with pytest.raises(SystemExit, match="was trained with --objective ddpm: give the same"):
        tiny_run("--init", start, out="wrong")


def test_ddpm_is_dits_loss_and_evaluation_is_guided(tiny_run):
    torch.manual_seed(0)
    model = sit.SiT(8, 2, 1, 32, 3, 2, 10, z_dim=6, projector_dim=8, encoder_depth=2, learn_sigma=True, keep_sigma=True)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    x, eps, t, y = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.tensor([0, 9, 500, 999]), torch.arange(4)
    cfg = haste_train.Config(objective="ddpm")
    total, terms = haste_train.losses(model, x, y, t.float(), eps, None, [], cfg)
    expected = dit.ddpm_loss(model, x, y, t, eps)
    assert torch.allclose(total, expected) and torch.allclose(terms["loss"], expected) and 0 < terms["vb"] < total
    weights = list(model.final_layer.parameters())
    for a, b in zip(torch.autograd.grad(total, weights), torch.autograd.grad(expected, weights)):
        assert torch.allclose(a, b, atol=1e-6)
    tokens = torch.randn(4, 16, 6)
    guided, terms = haste_train.losses(model, x, y, t.float(), eps, (tokens, []), [], cfg)
    assert torch.allclose(guided, expected + terms["feature_loss"])
    plain, strong = (tiny_run("--objective", "ddpm", "--eval-cfg", w)[0] for w in ("1", "4"))
    assert [r["fd"] for r in plain if "fd" in r] != [r["fd"] for r in strong if "fd" in r]


def test_ddpm_steps_are_uniform():
    cfg = haste_train.Config(objective="ddpm")
    steps = torch.cat([haste_train.random_numbers(cfg, step, (5000, 1, 1, 1), False)[1] for step in range(20)])
    assert torch.equal(steps, steps.round()) and steps.min() == 0 and steps.max() == 999
    assert np.bincount(steps.long() // 100).tolist() == pytest.approx([10_000] * 10, rel=0.05)


def test_contrastive_negatives_are_other_images_of_the_global_batch(tiny_run, tmp_path, monkeypatch):
    seen, original = [], haste.contrastive_term
    monkeypatch.setattr(haste_train, "contrastive_term", lambda *args: (seen.append(args), original(*args))[1])
    rows, saved = tiny_run("--contrastive", "0.05", "--accumulate", "2", "--align", "none")
    assert len(seen) == 8                                                   # four steps of two parts
    offsets = []
    for i, (v_hat, v, negatives) in enumerate(seen):
        own = torch.arange(4) + 4 * (i % 2)
        assert len(v_hat) == 4 and len(v) == 8 and (negatives != own).all()
        offsets += ((negatives - own) % 8).tolist()
    assert len(set(offsets[0:4])) == 1 and offsets[0:4] == offsets[4:8] and len(set(offsets)) > 1       # one for a step
    # the total is the flow loss minus the weighted term, and the checkpoint has what guided sampling needs
    weight, mean = saved["contrast"]
    train = data.open_data("digits").train
    assert weight == 0.05 and torch.allclose(mean, data.to_pixels(train.images).mean(0), atol=1e-6)
    assert torch.equal(sit.load_sit(tmp_path / "run" / "ckpt.pt").contrast[1], mean)
    flags = ["--contrastive", "0.05", "--mirror", "--eval-cfg", "2"]
    seen_by_samplers, sample = [], sit.sample_ode
    monkeypatch.setattr(sit, "sample_ode", lambda *args, **kw: (seen_by_samplers.append(kw["contrast"]), sample(*args, **kw))[1])
    for steps in ("2", "4"):
        _, saved = tiny_run(*flags, "--steps", steps, "--resume", "auto", out="mirrored")   # kept by a resumed run
    assert saved["contrast"][0] == 0.05 and torch.equal(saved["contrast"][1], data.open_data("digits").mean(True))
    assert len(seen_by_samplers) >= 2 and all(torch.equal(m, saved["contrast"][1]) for _, m in seen_by_samplers)
    assert tiny_run()[1]["contrast"] is None
    mirrored = data.open_data("digits").mean(True)
    assert torch.allclose(mirrored, mirrored.flip(-1)) and not torch.allclose(mirrored, mean, atol=1e-3)
    few = data.open_data("digits").mean(False, most=10)
    assert torch.allclose(few, data.to_pixels(train.images[::150]).mean(0), atol=1e-6)


def test_contrastive_loss_is_the_flow_loss_minus_the_term():
    torch.manual_seed(0)
    model = sit.SiT(8, 2, 1, 32, 3, 2, 10)
    x, eps, t, y = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4)
    x_t, v = sit.interpolant(x, eps, t)
    others = torch.tensor([2, 3, 0, 1])
    cfg = haste_train.Config(contrastive=0.05)
    total, terms = haste_train.losses(model, x, y, t, eps, None, [], cfg, negatives=(v, others))
    v_hat = model(x_t, t, y)
    expected = (v_hat - v).square().mean() - 0.05 * (v_hat - v[others]).square().mean()
    assert torch.allclose(total, expected) and torch.allclose(terms["loss"], sit.flow_loss(model, x, y, t, eps))


def test_optimizer_state_of_the_rest_survives_bit_for_bit(tiny_run, monkeypatch):
    seen, drop = [], haste_train.drop_projector

    def watched(model, ema, opt):
        def snapshot():
            return {n: {k: v.clone() for k, v in opt.state[p].items()}
                    for n, p in model.named_parameters() if p in opt.state}
        before = snapshot()
        kept = drop(model, ema, opt)
        after = snapshot()
        seen.append(after.keys())
        assert before.keys() - after.keys() == {n for n in before if n.startswith("projectors.")} != set()
        assert all(torch.equal(v, after[n][k]) for n in after for k, v in before[n].items())
        assert len(opt.state) == len(after) and len(opt.param_groups) == 1
        return kept
    monkeypatch.setattr(haste_train, "drop_projector", watched)
    rows, saved = tiny_run("--stop", "2")
    assert len(seen) == 1 and len(saved["opt"]["param_groups"]) == 1
    for name in ("model", "ema"):                                           # REPA's strict loader finds its projector
        assert sum(k.startswith("projectors.0.") for k in saved[name]) == 6


def test_automatic_stop(tiny_run, monkeypatch):
    angles = iter([0.5, -0.01, -0.2])
    monkeypatch.setattr(haste_train, "gradient_cosine", lambda *a: torch.tensor(next(angles)))
    flags = ["--stop", "auto", "--steps", "12", "--stop-warmup", "3", "--stop-interval", "3",
             "--log-every", "5", "--eval-every", "0"]
    rows, saved = tiny_run(*flags)
    assert {r["step"]: round(r["grad_cosine"], 3) for r in rows if "grad_cosine" in r} == {4: 0.5, 7: -0.01, 10: -0.2}
    assert saved["tau"] == 9 and ["feature_loss" in r for r in rows] == [r["step"] <= 9 for r in rows]
    for change, tau in ((["--stop-warmup", "6"], 12), (["--stop-interval", "2", "--stop-warmup", "4"], 8),
                        (["--stop-threshold", "0"], 6)):
        angles = iter([0.5, -0.01, -0.2])
        assert tiny_run(*flags, "--steps", "14", *change)[1]["tau"] == tau


def test_the_angle_leaves_autocast_as_it_was(tiny_run):
    flags = ["--stop", "auto", "--steps", "3", "--stop-warmup", "1", "--stop-interval", "1", "--eval-every", "0"]
    rows, _ = tiny_run(*flags, "--precision", "bf16")
    assert len([r for r in rows if "grad_cosine" in r]) == 2 and not torch.is_autocast_enabled("cpu")


def test_gradient_cosine_is_the_angle_of_the_two_gradients():
    torch.manual_seed(0)
    model = sit.SiT(8, 2, 1, 32, 3, 2, 10, z_dim=6, projector_dim=8, encoder_depth=2)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    x, eps, y = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.arange(4)
    targets, cfg, cosines = (torch.randn(4, 16, 6), []), haste_train.Config(), []
    params = list(model.blocks[1].parameters())
    for t in (0.02, 0.1, 0.5, 0.8):
        t = torch.full((4,), t)
        flow = torch.autograd.grad(sit.flow_loss(model, x, y, t, eps), params)
        z = model(sit.interpolant(x, eps, t)[0], t, y, tap_layers=())[1]
        align = torch.autograd.grad(0.5 * haste_train.feature_alignment(z, targets[0]), params)
        a, b = (torch.cat([g.flatten() for g in grads]) for grads in (flow, align))
        cosines.append((a @ b / a.norm() / b.norm()).item())

    def losses_at(time):
        total, terms = haste_train.losses(model, x, y, torch.full((4,), time), eps, targets, [], cfg)
        return terms["loss"], total - terms["loss"]
    found = haste.gradient_cosine(losses_at, params).item()
    assert abs(found - np.mean(cosines)) < 1e-4


# ---- resume

@pytest.mark.parametrize("flags", [["--stop", "2"], ["--stop", "3"], ["--stop", "4"],
                                   ["--stop", "never", "--precision", "bf16", "--log-every", "100"],
                                   ["--stop", "never", "--precision", "bf16"], ["--align", "none"],
                                   ["--stop", "auto", "--stop-warmup", "2", "--stop-interval", "3",
                                    "--stop-threshold", "1"],
                                   ["--objective", "ddpm"],
                                   ["--contrastive", "0.05", "--projector", "conv", "--spatial-norm", "0.6"]])
def test_resumed_run_is_the_straight_run_bit_for_bit(tiny_run, flags):
    flags = [*flags, "--resume", "auto", "--eval-every", "0"]
    rows, saved = tiny_run(*flags, "--steps", "6", out="straight")
    for steps in ("2", "3", "6"):
        rows_2, saved_2 = tiny_run(*flags, "--steps", steps, out="parts")
    assert same_weights(saved, saved_2) and saved["tau"] == saved_2["tau"]
    logged = {r["step"] for r in rows}                                      # each part logs its last step too
    assert [r for r in rows_2 if r["step"] in logged] == rows


def test_accumulation_is_the_whole_batch(tiny_run):
    # a larger learning rate amplifies rounding
    flags = ["--steps", "20", "--stop", "10", "--eval-every", "0", "--batch-size", "8", "--lr", "0.002",
             "--contrastive", "0.05"]
    whole, parts = tiny_run(*flags)[0], tiny_run(*flags, "--accumulate", "2")[0]
    for a, b in zip(whole, parts):
        assert all(abs(a[k] - b[k]) < 1e-5 * max(1, abs(a[k]))
                   for k in ("loss", "feature_loss", "attention_loss", "contrastive_term") if k in a)


def test_resume_flag(tiny_run, tmp_path, capsys):
    rows, saved = tiny_run("--resume", "auto")
    capsys.readouterr()
    tiny_run("--resume", "auto")
    out = capsys.readouterr().out
    assert ("holds a finished run of 4 steps" in out and "--steps" in out
            and "--resume never" in out and out.count("\n") == 1)
    with pytest.raises(SystemExit, match=r"other flags: --lr 0.5 \(was 0.02\), --ema 0.1 \(was 0.5\)") as e:
        tiny_run("--resume", "auto", "--lr", "0.5", "--ema", "0.1", "--steps", "9")
    assert "\n" not in str(e.value) and "--resume never" in str(e.value)
    ckpt = tmp_path / "run" / "ckpt.pt"
    assert same_weights(torch.load(ckpt, weights_only=True), saved)         # nothing was lost
    # these may differ
    tiny_run("--resume", "auto", "--steps", "5", "--log-every", "2", "--eval-every", "3", "--save-every", "9")
    assert torch.load(ckpt, weights_only=True)["steps"] == 5
    tiny_run("--resume", str(ckpt), "--steps", "6", out="other")
    assert torch.load(tmp_path / "other" / "ckpt.pt", weights_only=True)["steps"] == 6
    assert tiny_run("--resume", str(ckpt.parent), "--steps", "6", out="third")[1]["steps"] == 6       # a folder
    assert same_weights(tiny_run("--resume", "never")[1], saved)
    content = torch.load(ckpt, weights_only=True)
    torch.save({**content, "code": "older"}, ckpt)
    tiny_run("--resume", "auto", "--steps", "5")
    assert "code of model or training has changed" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--resume nowhere.pt does not exist"):
        tiny_run("--resume", "nowhere.pt")
    for content in (ckpt.read_bytes()[:5000], b""):
        ckpt.write_bytes(content)
        with pytest.raises(SystemExit, match="ckpt.pt cannot be read.*--resume never"):
            tiny_run("--resume", "auto")
        assert ckpt.read_bytes() == content
    torch.save({"ema": {}}, ckpt)
    with pytest.raises(SystemExit, match="is not a checkpoint of this program"):
        tiny_run("--resume", "auto")


def test_a_run_that_starts_anew_forgets_the_old_checkpoint(tiny_run, tmp_path, monkeypatch):
    tiny_run()
    losses = haste_train.losses
    monkeypatch.setattr(haste_train, "losses", lambda *a, **kw: (losses(*a, **kw)[0] * math.nan, losses(*a, **kw)[1]))
    with pytest.raises(SystemExit, match="not finite in step 1; no checkpoint was written before"):
        tiny_run("--resume", "never")
    assert not (tmp_path / "run" / "ckpt.pt").exists()


def test_a_restarted_worker_goes_on_even_with_resume_never(tiny_run, tmp_path, monkeypatch, capsys):
    tiny_run("--steps", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    tiny_run("--steps", "4", "--resume", "never")
    assert "resuming from step 2" in capsys.readouterr().out


def test_a_named_checkpoint_counts_until_this_run_has_saved(tiny_run, tmp_path, monkeypatch, capsys):
    """--resume FILE into a folder with an older run: that run's checkpoint is neither resumed from nor named."""
    tiny_run("--steps", "1", out="other")
    tiny_run("--steps", "3")                                                # the older run
    flags = ["--resume", str(tmp_path / "other" / "ckpt.pt")]
    losses, bad = haste_train.losses, lambda *a, **kw: [x * math.nan for x in losses(*a, **kw)[:1]] + [losses(*a, **kw)[1]]
    with monkeypatch.context() as patched:
        patched.setattr(haste_train, "losses", bad)
        with pytest.raises(SystemExit, match="not finite in step 2; the last good checkpoint is .*other/ckpt.pt"):
            tiny_run("--steps", "6", *flags)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")                   # a worker died before the first save
    capsys.readouterr()
    tiny_run("--steps", "6", *flags)
    assert "resuming from step 1 of" in capsys.readouterr().out
    tiny_run("--steps", "7", *flags)                                        # and now after it
    assert "resuming from step 6 of" in capsys.readouterr().out


def test_a_run_that_starts_over_and_dies_is_not_the_old_one(tiny_run, tmp_path, monkeypatch, capsys):
    """--resume never: a worker that dies before the first step does not continue the older run. Bad input loses nothing."""
    old = tiny_run("--steps", "3", "--resume", "auto")[1]
    with pytest.raises(SystemExit, match="nowhere is not a folder"):
        tiny_run("--resume", "never", "--data", "nowhere")
    assert same_weights(torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True), old)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    capsys.readouterr()
    rows, _ = tiny_run("--resume", "never", "--steps", "5")
    assert "resuming" not in capsys.readouterr().out and len(rows) == 5


def test_out_of_memory_ends_with_one_line(tiny_run, tiny_xar, monkeypatch):
    def full(*args, **kw):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    monkeypatch.setattr(haste_train, "losses", full)
    for flags, message in (([], r"give --accumulate 2 \(was 1\), .* keeps its result"),
                           (["--batch-size", "12", "--accumulate", "4"], r"--accumulate 6 \(was 4\)"),
                           (["--batch-size", "4", "--accumulate", "4"], "one image already: use more processes")):
        with pytest.raises(SystemExit, match=f"memory of the GPU does not suffice: .*{message}") as e:
            tiny_run(*flags)
        assert "\n" not in str(e.value)
    monkeypatch.setattr(xar.XAR, "loss", full)
    with pytest.raises(SystemExit, match="xar_train.py: the memory of the GPU does not suffice: give --accumulate 2"):
        tiny_xar()


def test_devices(monkeypatch):
    """What --device means for a process, with a machine of two cards pretended, and a Mac."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ddp.choose_device("auto", 1, 2) == ddp.choose_device("cuda", 1, 2) == torch.device("cuda", 1)
    assert ddp.choose_device("cuda:1", 0) == torch.device("cuda", 1) and ddp.choose_device("cpu", 1, 2).type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for words, message in ((("cuda:1", 0, 2), "--device cuda:1 would put all 2 processes on one card"),
                           (("cuda:2", 0), "this machine has 2 CUDA"), (("mps", 0, 2), "mps is for one process"),
                           (("mps", 0), "PYTORCH_ENABLE_MPS_FALLBACK=1"), (("tpu", 0), "tpu is not a device")):
        with pytest.raises(ValueError, match=message):
            ddp.choose_device(*words)
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    assert ddp.choose_device("mps", 0).type == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no Apple GPU"):
        ddp.choose_device("mps", 0)


def test_restarted_processes_agree_on_their_start():
    """The first counts; what dead ones have left in the store is read by nobody."""
    from torch.distributed import HashStore
    store = HashStore()
    store.set("question 1", "of one that died before it was answered")
    for number in (1, 2, 3):
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda rank: ddp.start_number(store, rank, 3), (2, 0, 1)))
        assert found == [number] * 3


def test_errors_inside_the_loop_keep_their_traceback(tiny_run, monkeypatch):
    def broken(*args, **kw):
        raise ValueError("a bug")
    monkeypatch.setattr(haste_train, "losses", broken)
    with pytest.raises(ValueError, match="a bug"):
        tiny_run()


def test_saving_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    run.save_checkpoint(path, {"steps": 1})

    def full(content, f):
        f.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        run.save_checkpoint(path, {"steps": 2})
    assert torch.load(path, weights_only=True) == {"steps": 1} and list(tmp_path.iterdir()) == [path]


def test_signal_finishes_the_step_and_saves(tiny_run, tmp_path, monkeypatch, capsys):
    rows, straight = tiny_run("--steps", "6", out="straight")
    real = data.batches

    def interrupted(*args, **kw):
        for i, batch in enumerate(real(*args, **kw)):
            if i == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)                        # clusters may send several
            yield batch
    monkeypatch.setattr(data, "batches", interrupted)
    rows, saved = tiny_run("--steps", "6", "--resume", "auto", "--eval-every", "3")         # main returns: status 0
    assert [r["step"] for r in rows] == [1, 2, 3] and "fd" not in rows[2]   # it does not wait for an evaluation
    assert saved["steps"] == 3 and "stopped by a signal after step 3" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.setattr(data, "batches", real)
    assert same_weights(tiny_run("--steps", "6", "--resume", "auto")[1], straight)


def test_a_late_second_ctrl_c_kills(monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)                # a shell's background job ignores it
    clock = [100.0]
    monkeypatch.setattr(ddp.time, "monotonic", lambda: clock[0])

    class One:
        world = 1
    with ddp.StopSignal(One()) as stop:
        assert not stop.agreed()
        for clock[0] in (100.0, 104.0):
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.agreed()
        clock[0] = 106.0
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()


def test_nothing_is_saved_after_a_value_that_is_not_finite(tiny_run, tmp_path, monkeypatch):
    losses, calls = haste_train.losses, []

    def breaking(*args, **kw):
        calls.append(1)
        total, terms = losses(*args, **kw)
        return (total * math.nan, terms) if len(calls) == 5 else (total, terms)
    monkeypatch.setattr(haste_train, "losses", breaking)
    with pytest.raises(SystemExit, match="not finite in step 5; the last good checkpoint is .*ckpt.pt") as e:
        tiny_run("--steps", "9", "--save-every", "3", "--log-every", "8")
    assert "--lr" in str(e.value)
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["steps"] == 3
    calls.clear()
    with pytest.raises(SystemExit, match="no checkpoint was written before"):
        tiny_run("--steps", "9", "--save-every", "0", "--log-every", "8", out="second")


# ---- other starts, other logs

def test_init_starts_from_other_weights(tiny_run, tmp_path):
    """A fresh optimizer and step 0, but the averaged weights of another run, or published ones."""
    slow = ["--ema", "0", "--lr", "1e-12"]                                  # the weights stay where they start

    def same(found, expected):
        return all(torch.allclose(w, expected[k], atol=1e-8) for k, w in found.items())
    _, first = tiny_run("--steps", "2", out="first")
    file = str(tmp_path / "first" / "ckpt.pt")
    rows, saved = tiny_run(*slow, "--init", file, out="second")
    assert saved["steps"] == 4 and [r["step"] for r in rows] == [1, 2, 3, 4]
    assert same(saved["ema"], first["ema"])                                 # the projector too
    _, plain = tiny_run(*slow, "--init", file, "--align", "none", out="plain")
    assert same(plain["ema"], first["ema"]) and "z_dim" not in plain["arch"]
    _, other = tiny_run(*slow, "--init", file, "--projector-dim", "24", out="other")
    assert other["ema"]["projectors.0.0.weight"].shape[0] == 24             # a fresh projector, the rest as it was
    assert same({k: w for k, w in other["ema"].items() if not k.startswith("projectors.")}, first["ema"])

    torch.manual_seed(0)
    original = sit.SiT(8, 2, 1, 32, 4, 2, 10, learn_sigma=True)             # as the original SiT is saved
    torch.nn.init.normal_(original.final_layer.linear.weight)
    torch.save(original.state_dict(), tmp_path / "original.pt")
    _, turned = tiny_run(*slow, "--init", str(tmp_path / "original.pt"), "--steps", "1", out="original")
    assert turned["arch"]["learn_sigma"] and turned["arch"]["flip_time"]
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 0.6]), torch.arange(2)
    again = sit.load_sit(tmp_path / "original" / "ckpt.pt")
    assert torch.allclose(again(x, t, y), -original.eval()(x, 1 - t, y), atol=1e-5)

    for change, message in ((["--hidden-size", "48"], f"--init {file} does not fit --model SiT-Ti/2 and --data digits"),
                            (["--num-heads", "4"], "first/ckpt.pt: has 2 attention heads, not 4"),
                            (["--init", "none.pt"], "--init none.pt does not exist .*or one of repa-xl")):
        with pytest.raises(SystemExit, match=message) as e:
            tiny_run("--init", file, *change, out="refused")
        assert "\n" not in str(e.value)


def test_published_checkpoints_are_fetched_once(tiny_run, tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file",
                        lambda url, path: (fetched.append(url), torch.save({}, path)))
    assert all(url.startswith("https://") for url in run.CHECKPOINTS.values())
    for _ in range(2):
        assert run.checkpoint_file("xar-b", "ckpt") == tmp_path / "hub" / "checkpoints" / "xar-b.pt"
    assert fetched == [run.CHECKPOINTS["xar-b"]] and run.checkpoint_file(str(tmp_path / "hub/checkpoints/xar-b.pt"), "ckpt").name == "xar-b.pt"

    def dead(url, path):
        raise OSError("HTTP Error 404:\nNot Found")
    monkeypatch.setattr(torch.hub, "download_url_to_file", dead)
    with pytest.raises(SystemExit, match="--init repa-xl could not be fetched .HTTP Error 404: Not Found.*give --init FILE") as e:
        tiny_run("--init", "repa-xl")
    assert run.CHECKPOINTS["repa-xl"] in str(e.value) and "\n" not in str(e.value)


def test_track_sends_the_log_elsewhere(tiny_run, base_run, tmp_path, monkeypatch):
    """Through packages that are imported only if they are asked for; the run itself is the same."""
    sent = []

    class Writer:
        def __init__(self, folder, purge_step):
            sent.append(("folder", folder, purge_step))

        def add_scalar(self, name, value, step):
            sent.append((name, value, step))

        def add_image(self, name, image, step, dataformats):
            sent.append((name, image.shape[2], step, dataformats))

        def flush(self):
            pass
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    rows, saved = tiny_run("--track", "tensorboard")
    assert rows == base_run[0] and same_weights(saved["ema"], base_run[1]["ema"])
    assert sent[0] == ("folder", str(tmp_path / "run"), 1)
    assert [s[1:] for s in sent if s[0] == "loss"] == [(r["loss"], r["step"]) for r in rows]
    assert [s for s in sent if s[0] == "samples"] == [("samples", 3, 2, "HWC"), ("samples", 3, 4, "HWC")]

    wandb = types.SimpleNamespace(init=lambda **kw: sent.append(kw), Image=lambda path: path,
                                  log=lambda row, step: sent.append((row, step)))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    sent.clear()
    tiny_run("--track", "wandb")
    assert sent[0]["config"]["lr"] == 0.02 and sent[0]["resume"] == "allow"
    assert [step for _, step in sent[1:]] == [1, 2, 3, 4] and sent[2][0]["samples"].endswith("samples.png")

    monkeypatch.setitem(sys.modules, "wandb", None)                         # not installed
    with pytest.raises(SystemExit, match="--track wandb needs a package: pip install wandb") as e:
        tiny_run("--track", "wandb")
    assert "\n" not in str(e.value)


def test_log_says_how_much_time_is_left(tiny_run, capsys):
    tiny_run()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ") and "loss" in line]
    assert all(re.search(r"  \d+ s left$", line) for line in lines[:3]) and "left" not in lines[3]
    assert [run.duration(s) for s in (3, 119, 121, 7199, 7300)] == ["3 s", "119 s", "2 min", "120 min", "2.0 h"]


def test_a_place_that_cannot_be_made_names_out(tmp_path, small_teacher):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="--out .*file/run cannot be made .*: choose another place") as e:
        haste_train.main([*TINY, "--teacher-weights", str(small_teacher), "--out", str(tmp_path / "file" / "run")])
    assert "\n" not in str(e.value)


# ---- what was written before the files were rearranged: tests/old

OLD = ROOT / "tests" / "old"
OLD_FLAGS = ["--depth", "3", "--hidden-size", "8", "--num-heads", "2", "--projector-dim", "8", "--batch-size", "8",
             "--stop", "3", "--warmup", "2", "--lr", "0.02", "--ema", "0.5", "--log-every", "1", "--eval-every", "0",
             "--device", "cpu", "--teacher-weights", "tests/old/teacher.pt", "--steps", "6"]


@pytest.mark.parametrize("steps", [2, 4])
def test_older_checkpoints_continue(steps, tmp_path, monkeypatch):
    """From before and after the end of the guidance; rows.json is the log of that run, undisturbed."""
    monkeypatch.chdir(ROOT)                                                 # the teacher's path is one of the flags
    (tmp_path / "ckpt.pt").write_bytes((OLD / f"haste_{steps}.pt").read_bytes())
    haste_train.main([*OLD_FLAGS, "--out", str(tmp_path)])
    known = [r for r in json.loads((OLD / "rows.json").read_text())["haste"] if r["step"] > steps]
    found = rows_of(tmp_path)
    assert [r.keys() for r in found] == [r.keys() for r in known]
    for a, b in zip(found, known):                                          # processors differ in the last digits
        assert all(abs(a[k] - b[k]) < 1e-3 * max(1, abs(b[k])) for k in a)


# ---- data

def test_digits_are_split_for_good():
    digits = data.open_data("digits")
    assert len(digits.train) == 1500 and len(digits.held) == 297 and digits.train.images.shape == (1500, 1, 8, 8)
    assert digits.train.images.max() == 255 and digits.train.images.dtype == torch.uint8
    rows = {x.numpy().tobytes() for x in digits.train.images} & {x.numpy().tobytes() for x in digits.held.images}
    assert not rows and torch.bincount(digits.held.labels).min() > 20
    assert digits.train.labels[:8].tolist() == data.open_data("digits").train.labels[:8].tolist()


def test_order_is_a_function_of_seed_and_step_alone():
    rows = np.concatenate([data.global_rows(10, 3, s, 4) for s in range(10)])
    assert all(sorted(rows[i:i + 10]) == list(range(10)) for i in range(0, 40, 10))      # epochs without a gap
    assert not np.array_equal(rows[:10], rows[10:20]) and np.array_equal(rows[8:12], data.global_rows(10, 3, 2, 4))
    assert sorted(data.global_rows(3, 0, 0, 7)[:6]) == [0, 0, 1, 1, 2, 2]                # a batch larger than the set
    for length, step, size in ((10, 7, 4), (3, 2, 7), (5, 1, 5), (1000, 3, 64)):         # one number at a time
        at = range(step * size, (step + 1) * size)
        expected = [np.random.default_rng([3, i // length]).permutation(length)[i % length] for i in at]
        assert data.global_rows(length, 3, step, size).tolist() == expected
    digits = data.open_data("digits").train
    whole, parts = (data.batches(digits, 0, 5, 8, m) for m in (slice(None), slice(4, 8)))
    next(whole), next(parts)
    assert torch.equal(next(whole)[0][4:8], next(parts)[0])


def test_numbers_are_those_of_the_step_and_drawn_ahead():
    """They come with the batch, of the rows asked for, and are drawn on the CPU in another thread."""
    cfg = haste_train.Config(batch_size=6)
    threads = []

    def draw(step):
        threads.append(threading.current_thread())
        return haste_train.random_numbers(cfg, step, (6, 1, 8, 8), packed=True)
    feed = data.batches(data.open_data("digits").train, 0, 5, 6, slice(2, 4), draw=draw)
    for step in (5, 6):
        _, _, _, numbers = next(feed)
        expected = haste_train.random_numbers(cfg, step, (6, 1, 8, 8), packed=True)
        assert len(numbers) == 6
        assert all(torch.equal(a, b[2:4]) and b.device.type == "cpu" for a, b in zip(numbers, expected))
    assert threading.current_thread() not in threads


def test_center_crop_is_the_official_one():
    from conftest import Golden
    g = Golden("center_crop")
    image = np.clip(60 * np.kron(g.draw("img", 40, 25, 3).numpy(), np.ones((16, 16, 1))) + 128, 0, 255).astype(np.uint8)
    assert np.array_equal(np.array(data.center_crop(Image.fromarray(image), 64)), g.arrays["crop"])


def test_folders_train(tiny_run, photo_folder):
    rows, saved = tiny_run("--data", str(photo_folder), "--image-size", "16", "--eval-samples", "9")
    assert saved["arch"]["num_classes"] == 3 and saved["arch"]["in_channels"] == 3 and saved["arch"]["input_size"] == 16
    assert "fd" in rows[-1] and "fd_held" not in rows[-1]
    other = tiny_run("--data", str(photo_folder), "--image-size", "24", "--eval-samples", "9", out="b")[0]
    assert other != rows
    photo_folder.rename(photo_folder.with_name("train"))
    (photo_folder.parent / "test").symlink_to(photo_folder.with_name("train"))
    split = data.open_data(str(photo_folder.parent), 16)
    assert split.classes == ["a", "b", "c"] and len(split.train) == len(split.held) == 12


def test_torchvision_sets(monkeypatch, tmp_path, tiny_run):
    import torchvision

    class Fake:
        def __init__(self, root, train, download):
            self.data, self.targets = np.zeros((20, 32, 32, 3), np.uint8), list(range(10)) * 2
            self.classes, roots[len(roots):] = list("abcdefghij"), [root]
    roots = []
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    cifar = data.open_data("cifar10", root="there")
    assert roots == ["there"] * 2 and cifar.train.images.shape == (20, 3, 32, 32) and cifar.size == 32
    with pytest.raises(SystemExit, match="--image-size 16 does not fit"):
        tiny_run("--data", "cifar10", "--image-size", "16")

    def offline(*args, **kwargs):
        raise RuntimeError("no route\nsecond line")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(SystemExit, match="--data cifar10 could not be downloaded to there .*--data digits") as e:
        tiny_run("--data", "cifar10", "--data-root", "there")
    assert "\n" not in str(e.value)


# ---- evaluation

def test_scores_of_real_and_of_memorised_digits():
    digits = data.open_data("digits")
    sets = evaluate.reference(digits)
    by_class = [digits.held.images[digits.held.labels == c][:20] for c in range(10)]
    scores = evaluate.scores(torch.stack([by_class[i % 10][i // 10] for i in range(200)]), sets, 10)
    assert scores["accuracy"] > 0.97 and scores["fd"] < 0.5 and abs(scores["nearest"] - scores["nearest_held"]) < 0.1
    copies = evaluate.scores(digits.train.images[:200], sets, 10)
    assert copies["nearest"] < 1e-6 and copies["nearest_held"] > 0.9          # memorising shows
    noise = torch.randint(0, 256, (200, 1, 8, 8)).byte()
    assert evaluate.scores(noise, sets, 10)["fd"] > 2


class FewFeatures(torch.nn.Module):
    """What evaluate.py needs of fid.Inception, at a millionth of the price."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(1, 1)

    def forward(self, images):
        return {"pool": images.float()[:, 0, ::3, 2].sin()}


def test_inception_scores_samples(tiny_run, monkeypatch):
    """--eval-features inception adds FID to the scores and changes no other number; its file may be named."""
    plain, asked, drawn = tiny_run(), [], []
    monkeypatch.setattr(fid, "load_inception", lambda weights: asked.append(weights) or FewFeatures())
    monkeypatch.setattr(evaluate, "sample_sheet", lambda samples, *args: drawn.append(samples))
    rows, saved = tiny_run("--eval-features", "inception", "--eval-weights", "inception.pt")
    assert asked == ["inception.pt"] and same_weights(saved, plain[1])
    assert [{k: v for k, v in r.items() if k != "fid"} for r in rows] == plain[0]
    train = data.open_data("digits").train.images
    for row, samples in zip([r for r in rows if "fd" in r], drawn, strict=True):
        fake, real = (FewFeatures()(images)["pool"].double() for images in (samples, train))
        assert row["fid"] == pytest.approx(evaluate.frechet(fake, real), rel=1e-9) and row["fid"] > 0
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="--eval-weights nowhere.pt is not there"):
        tiny_run("--eval-features", "inception", "--eval-weights", "nowhere.pt")


def test_sample_sheet_has_rows_of_classes_or_all_there_is(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluate, "save_grid", lambda images, path, columns: drawn.append((images, columns)))
    samples = torch.arange(500).view(-1, 1, 1, 1)
    evaluate.sample_sheet(samples, 10, "x.png")
    assert drawn[0][1] == 10 and drawn[0][0].flatten()[:12].tolist() == [*range(0, 100, 10), 1, 11]
    evaluate.sample_sheet(samples, 1000, "x.png")                           # fewer than two a class
    assert drawn[1][1] == 10 and drawn[1][0].flatten().tolist() == [*range(0, 500, 5)]


def test_evaluation_is_of_the_average_in_eval_mode_without_side_effect(tiny_run, monkeypatch):
    seen, draw = [], sit.sample_ode

    def watched(model, *args, **kw):
        seen.append((model, model.training, [p.clone() for p in model.parameters()]))
        return draw(model, *args, **kw)
    monkeypatch.setattr(sit, "sample_ode", watched)
    rows, saved = tiny_run()
    model, training, weights = seen[-1]
    assert not training and all(torch.equal(w, saved["ema"][k]) for w, (k, _) in zip(weights, model.named_parameters()))
    assert not same_weights(saved["ema"], saved["model"])


# ---- bad input: one line that names the flag or file, and the remedy

@pytest.mark.parametrize("flags,message", [
    (["--num-heads", "3"], "--hidden-size 32 must be a multiple of 4 and of --num-heads 3"),
    (["--pairs", "1-2"], "--pairs 1-2 must look like 4:8,5:9"),
    (["--pairs", "1:99"], "teacher blocks 0 ... 3"),
    (["--seed", str(2 ** 64)], "--seed 18446744073709551616 must be 0 or more, and finite"),
    (["--feature-weight", "inf"], "--feature-weight inf must be 0 or more, and finite"),
    (["--stop", "²"], "--stop ² must be"),
    (["--device", "meta"], "--device meta is not a device"),
    (["--eval-samples", "1"], "--eval-samples 1 must be 2 or more"),
    (["--lrr", "1"], "--lrr is not a flag; did you mean --lr"),
    (["--model", "SiT-M/2"], "--model SiT-M/2 must be SiT-Ti, S, B, L or XL, with patch /1"),
    (["--model", "SiT-Ti/3"], "--model SiT-Ti/3 must be SiT-Ti, S"),
    (["--align", "both"], "--align: invalid choice: 'both'"),
    (["--preset", "big"], "--preset: invalid choice: 'big'"),
    (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
    (["--lr", "-1"], "--lr -1.0 must be a positive number"),
    (["--stop", "soon"], "--stop soon must be a number of steps, auto or never"),
    (["--steps", "0"], "--steps 0 must be 1 or more"),
    (["--ema", "1"], r"--ema 1.0 must lie in \[0, 1\)"),
    (["--batch-size", "9", "--accumulate", "2"], "--batch-size 9 must be a multiple of 2"),
    (["--hidden-size", "30", "--num-heads", "4"], "--hidden-size 30 must be a multiple of 4 and of --num-heads 4"),
    (["--image-size", "16"], "--image-size 16 does not fit --data digits"),
    (["--data", "nowhere"], "--data nowhere is not a folder of images or of prepare.py, nor one of digits,"),
    (["--feature-depth", "9"], "--feature-depth 9 must lie in 1 ... 4"),
    (["--pairs", "9:1"], "--pairs 9:1: student blocks are 0 ... 3"),
    (["--teacher", "dino", "--teacher-weights", "x"], "--teacher dino is neither small nor one of dinov2_vits14"),
    (["--teacher-weights", "none.pt"], "none.pt do not exist"),
    (["--teacher", "dinov3_vitb16"], "is not a dinov3_vitb16: "),
    (["--objective", "ddpm", "--path", "cosine"], "--path cosine is for --objective flow: leave it out"),
    (["--objective", "ddpm", "--time", "lognormal"], "--time lognormal is for --objective flow: leave it out"),
    (["--objective", "ddpm", "--contrastive", "0.05"], "--contrastive 0.05 is for --objective flow: leave it out"),
    (["--objective", "ddpm", "--eval-steps", "1001"], "--eval-steps 1001 must lie in 1 ... 1000"),
    (["--contrastive", "1"], r"--contrastive 1.0 must lie in \[0, 1\)"),
    (["--contrastive", "0.05", "--path", "cosine"], "--contrastive 0.05 is for --path linear"),
    (["--contrastive", "0.05", "--batch-size", "1"], "--contrastive 0.05 needs a --batch-size of 2 or more"),
    (["--spatial-norm", "2"], r"--spatial-norm 2.0 must lie in \[0, 1\]"),
    (["--spatial-norm", "nan"], r"--spatial-norm nan must lie in \[0, 1\]"),
    (["--spatial-norm", "0.6", "--model", "SiT-Ti/8"], "--spatial-norm 0.6 needs more than one token"),
    (["--spatial-norm", "0.6", "--align", "none"], "--spatial-norm 0.6 is for an alignment: leave it out"),
    (["--projector", "conv", "--align", "none"], "--projector conv is for an alignment: leave it out"),
    (["--projector", "conv", "--projector-kernel", "2"], "--projector-kernel 2 must be odd, as 3"),
    (["--projector", "conv", "--projector-kernel", "-1"], "--projector-kernel -1 must be 1 or more"),
    (["--projector-kernel", "5"], "--projector-kernel 5 is for --projector conv"),
    (["--device", "gpu"], "--device gpu is not a device: use auto, cpu, cuda"),
    pytest.param(["--device", "cuda"], "--device cuda: this torch finds no CUDA device; use --device cpu",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")),
])
def test_bad_flags(tiny_run, flags, message):
    with pytest.raises(SystemExit, match=message) as e:
        tiny_run(*flags)
    assert "\n" not in str(e.value) and str(e.value).startswith("haste_train.py: ")


def test_bad_folders(tiny_run, tmp_path, photo_folder):
    def line(folder, *flags):
        with pytest.raises(SystemExit) as e:
            tiny_run("--data", str(folder), *flags)
        assert "\n" not in str(e.value)
        return str(e.value)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no class folders" in line(empty)
    (empty / ".cache").mkdir()
    assert "has no class folders" in line(empty)
    (empty / "cats").mkdir()
    assert "no images" in line(empty)
    assert "needs --image-size: 0.png is 40 x 48" in line(photo_folder)
    assert "--image-size 15 must be a multiple of 2" in line(photo_folder, "--image-size", "15")
    bad = photo_folder / "a" / "9.jpg"
    bad.write_text("this is no image")
    assert f"{bad} is not an image" in line(photo_folder, "--image-size", "16")
    whole = (photo_folder / "a" / "0.png").read_bytes()
    bad.unlink()
    (photo_folder / "a" / "8.png").write_bytes(whole[:len(whole) // 2])     # the header is fine, the rest is missing
    assert "8.png cannot be decoded" in line(photo_folder, "--image-size", "16", "--batch-size", "16")
    assert "8.png cannot be decoded" in line(photo_folder, "--image-size", "16", "--batch-size", "2",
                                             "--steps", "9", "--eval-every", "0")
