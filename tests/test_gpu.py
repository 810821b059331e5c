"""On a CUDA device: `python -m pytest -m gpu`. Golden files, short runs, no synchronisation, no attention map."""
import numpy as np
import pytest
import torch
from conftest import Golden, distance, rows_of
from test_sit import haste_golden
from test_xar import official, recorded, small

import fid
import haste_train
import prepare
import run
import vae
import xar

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_golden_sit():
    g, model, x = haste_golden()
    with torch.no_grad():
        v, z, _ = model.cuda()(x.cuda(), g["t"].cuda(), g["y"].cuda(), tap_layers=(0,))
    assert distance(v.cpu(), g["velocity"]) < 1e-4 and distance(z.cpu(), g["z"]) < 1e-4


def test_golden_inception():
    g = Golden("inception")
    images = g.draw("img", g.config["n"], 3, g.config["size"], g.config["size"])
    images = (60 * images + 128).clamp(0, 255).byte().cuda()
    torch.backends.cudnn.allow_tf32 = False                                 # as the program does
    for resize, key in (("tf1", "pool_tf_resize"), ("pytorch", "pool_pytorch_resize")):
        assert distance(g.fill(fid.Inception(resize)).cuda()(images)["pool"].cpu(), g[key]) < 1e-4


def test_metrics_on_the_device_equal_those_on_the_cpu():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2000, 300, generator=generator) for _ in range(2))
    gaussians = [x for f in (a, b) for x in (f.double().mean(0), torch.cov(f.double().T))]
    for metric, inputs in ((fid.frechet_distance, gaussians), (fid.precision_recall, (a, b)), (fid.kid, (a, b)),
                           (fid.inception_score, (a,))):
        assert metric(*[x.cuda() for x in inputs]) == pytest.approx(metric(*inputs), rel=1e-9)


def test_golden_alignment():
    g = Golden("haste_loss")
    c = g.config
    loss = 0
    for s, t in zip(c["student_layers"], c["teacher_layers"]):
        student = [g.draw(f"{n}s{s}", c["batch"], c["student_heads"], c["tokens"], c["student_head_dim"]).cuda()
                   for n in "qk"]
        teacher = [g.draw(f"{n}t{t}", c["batch"], c["teacher_heads"], c["tokens"] + 1,
                          c["teacher_head_dim"])[:, :, 1:].cuda() for n in "qk"]
        loss = loss + haste_train.attention_alignment(*student, *teacher) / len(c["student_layers"])
    assert abs(loss.item() / g["attn_loss"].item() - 1) < 1e-4


def test_alignment_in_bfloat16_stores_no_map():
    q, k, q_t, k_t = (torch.randn(4, 16, 1024, d, device="cuda", dtype=torch.bfloat16) for d in (72, 72, 64, 64))
    q, k = q.requires_grad_(), k.requires_grad_()
    exact = torch.autograd.grad(haste_train.attention_alignment(q, k, q_t, k_t), (q, k))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = torch.autograd.grad(haste_train.attention_alignment_grad(q, k, q_t, k_t), (q, k))
    assert torch.cuda.max_memory_allocated() - before < 4 * 16 * 1024 * 1024 * 2        # less than one map in bfloat16
    assert all(distance(a, b) < 0.03 for a, b in zip(found, exact))


@pytest.mark.parametrize("flags", [[], ["--precision", "fp32"], ["--compile"]])
def test_run_is_close_to_the_cpus(tiny_run, tmp_path, flags):
    """Random numbers differ between CPU and CUDA, so only the losses' size is compared."""
    rows, _ = tiny_run("--device", "cuda", "--steps", "10", "--stop", "5", *flags)
    assert (len(rows) == 10 and all(0.5 < r["loss"] < 3 for r in rows)
            and "feature_loss" not in rows_of(tmp_path / "run")[-1])


def test_steps_that_do_not_log_do_not_synchronise(tiny_run, monkeypatch):
    zero_grad, refuse = torch.optim.AdamW.zero_grad, run.refuse_nonfinite

    def watched_zero_grad(self, *args, **kw):
        zero_grad(self, *args, **kw)
        torch.cuda.set_sync_debug_mode("error")                             # from the end of the first step on

    def watched_refuse(*args):
        torch.cuda.set_sync_debug_mode("default")                           # the host may wait when it logs
        refuse(*args)
    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", watched_zero_grad)
    monkeypatch.setattr(run, "refuse_nonfinite", watched_refuse)
    try:
        tiny_run("--device", "cuda", "--steps", "8", "--stop", "never", "--log-every", "100", "--eval-every", "0")
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- xAR

def test_golden_xar():
    g, model, _ = official()
    B, M, n = (g.config[k] for k in ("batch", "cells", "tokens_per_cell"))
    eps = g.draw("eps", B, M, n, 16).flatten(1, 2).cuda()
    loss = model.cuda().loss(g.draw("latent", B, 16, 16, 16).cuda(), g["y"].cuda(), g["t"].T.cuda(), eps)
    assert abs(loss.item() / g["loss"].item() - 1) < 1e-3                   # TF32 may be on


@pytest.mark.parametrize("entity", ["cell:8", "scale"])
@pytest.mark.parametrize("clean", [False, True])
def test_flex_attention_is_the_mask(entity, clean, monkeypatch):
    """A 32 x 32 grid is long enough for FlexAttention: values and gradients of both ways, then bfloat16."""
    model = small(entity, grid=32).cuda()
    tokens, t = torch.randn(2, sum(model.sizes), 1, device="cuda"), torch.rand(2, len(model.sizes), device="cuda")
    context = torch.randn_like(tokens) if clean else None
    outs, grads = [], []
    for least in (1, 10 ** 9):                                              # FlexAttention, then the mask
        monkeypatch.setattr(xar, "FLEX_TOKENS", least)
        outs.append(model(tokens, t, clean=context))
        grads.append(torch.autograd.grad(outs[-1].square().mean(), model.encoder_blocks[0].attn.qkv.weight)[0])
    assert distance(outs[0], outs[1]) < 1e-2 and distance(grads[0], grads[1]) < 1e-2        # TF32 may be on
    monkeypatch.setattr(xar, "FLEX_TOKENS", 1)
    with torch.autocast("cuda", torch.bfloat16):
        assert distance(model(tokens, t, clean=context), outs[1]) < 0.05


def test_cached_sampling_on_cuda_is_the_cpus():
    model, y = small("cell:4"), torch.arange(3)
    randn, drawn = recorded()
    expected, draws = model.sample(y, 4, 2.0, randn), iter(drawn)
    found = model.cuda().sample(y.cuda(), 4, 2.0, lambda like: next(draws).to(like))
    assert distance(found.cpu(), expected) < 1e-2                           # TF32 may be on


@pytest.mark.parametrize("flags", [[], ["--precision", "fp32"], ["--compile"], ["--context", "clean"]])
def test_xar_trains(tiny_xar, flags):
    rows, _ = tiny_xar("--device", "cuda", "--steps", "10", *flags)
    assert len(rows) == 10 and all(0.3 < r["loss"] < 30 for r in rows)


# ---- packed data

def test_packed_data_is_prepared_and_trained_on(tiny_run, tiny_xar, packed_folder, tmp_path):
    """Moments of the GPU's encoder are the CPU's but for TF32; both programs train on them and draw decoded samples."""
    photos, weights = packed_folder.parent / "photos", packed_folder.parent / "vae.pt"
    prepare.main([str(photos), str(tmp_path / "set"), "--size", "16", "--mirror", "--vae", str(weights),
                  "--device", "cuda"])
    found, expected = (torch.from_numpy(np.load(f / "moments.npy")).float() for f in (tmp_path / "set", packed_folder))
    assert distance(found, expected) < 1e-2
    flags = ["--data", str(tmp_path / "set"), "--mirror", "--device", "cuda"]
    assert tiny_run(*flags, out="sit")[0][-1]["fd"] > 0 and tiny_xar(*flags, out="xar")[0][-1]["fd"] > 0
    with torch.no_grad():
        net, z = vae.load_vae(weights), torch.randn(2, 4, 8, 8)
        assert distance(net.cuda().decode(z.cuda()).cpu(), net.cpu().decode(z)) < 1e-2
