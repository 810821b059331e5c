"""On a CUDA device: `python -m pytest -m gpu`. Golden files, short runs, no synchronisation, no attention map."""
import pytest
import torch
from conftest import Golden, distance, rows_of
from test_sit import haste_golden

import haste_train
import run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_golden_sit():
    g, model, x = haste_golden()
    with torch.no_grad():
        v, z, _ = model.cuda()(x.cuda(), g["t"].cuda(), g["y"].cuda(), tap_layers=(0,))
    assert distance(v.cpu(), g["velocity"]) < 1e-4 and distance(z.cpu(), g["z"]) < 1e-4


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
    step, require = run.Student.step, run.FiniteGuard.require

    def watched_step(self, *args):
        norm = step(self, *args)
        torch.cuda.set_sync_debug_mode("error")                             # from the end of the first step on
        return norm

    def watched_require(self):
        torch.cuda.set_sync_debug_mode("default")                           # the host may wait when it logs
        require(self)
    monkeypatch.setattr(run.Student, "step", watched_step)
    monkeypatch.setattr(run.FiniteGuard, "require", watched_require)
    try:
        tiny_run("--device", "cuda", "--steps", "8", "--stop", "never", "--log-every", "100", "--eval-every", "0")
    finally:
        torch.cuda.set_sync_debug_mode("default")
