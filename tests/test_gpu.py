"""On a CUDA device: `python -m pytest -m gpu`. Golden files, runs that are the CPU's, memory, no synchronisation.

TF32 is off, except inside programs, which turn it on for themselves; where a program is compared with itself on the
CPU, `float32` keeps it off there too. What a test sets is put back.
"""
import os
import signal

import numpy as np
import pytest
import torch
from conftest import GUIDED_XAR, Golden, distance
from test_alignment import plain_form
from test_dit import golden_dit
from test_mmdit import golden_mmdit
from test_sit import haste_golden
from test_text import official as official_clip
from test_xar import official, recorded, small

import align
import data
import dit
import fid
import haste
import haste_train
import prepare
import run
import sample
import sit
import teacher
import text
import vae
import xar_train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
FP32, BF16 = 0.02, 0.1                                                      # largest distance of losses from the CPU's
SCENES = ["--data", "scenes", "--model", "MMDiT-Ti/4"]


@pytest.fixture(autouse=True)
def settings():
    """Full float32, and the same random numbers in each test."""
    torch.manual_seed(0)
    before = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32,
              torch.backends.cuda.cudnn_sdp_enabled())
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch._dynamo.reset()                                                   # it counts the recompilations of all tests
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]
    torch.backends.cuda.enable_cudnn_sdp(before[2])


@pytest.fixture
def float32(monkeypatch):
    """Programs cannot turn TF32 on for matrix products."""
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda level: None)


def cuda(*tensors):
    return [x.cuda() for x in tensors]


# ---- golden files

def test_golden_sit():
    g, model, x = haste_golden()
    with torch.no_grad():
        v, z, taps = model.cuda()(*cuda(x, g["t"], g["y"]), tap_layers=range(g.config["encoder_depth"]))
    logits = torch.stack([q @ k.mT * q.shape[-1] ** -0.5 for q, k in taps])
    for found, key in ((v, "velocity"), (z, "z"), (logits, "attn_logits")):
        assert distance(found.cpu(), g[key]) < 1e-4, key


def test_golden_mmdit():
    g, model, x, context = golden_mmdit()
    with torch.no_grad():
        v, z, taps = model.cuda()(*cuda(x, g["t"], context), tap_layers=range(len(g["attn_logits"])))
    logits = torch.stack([q @ k.mT * q.shape[-1] ** -0.5 for q, k in taps])
    for found, key in ((v, "velocity"), (z, "z"), (logits, "attn_logits")):
        assert distance(found.cpu(), g[key]) < 1e-4, key


def test_golden_text_tower():
    g, sd = official_clip()
    hidden = text.clip_text_from_state_dict(sd).cuda()(g["ids"].cuda())
    assert distance(hidden.cpu(), g["text_hidden"]) < 1e-4


@pytest.mark.parametrize("name", ["dinov2_reg0", "dinov2_reg4"])
def test_golden_dinov2(name):
    g = Golden(name)
    c = g.config
    net = g.fill(teacher.DINOv2(c["img_size"], c["patch_size"], c["embed_dim"], c["depth"], c["num_heads"], c["ffn"],
                                c["registers"]))
    net.resize_pos_embed(c["grid"]).cuda()
    with torch.no_grad():
        tokens, taps = net(g.draw("image", 2, 3, 14 * c["grid"], 14 * c["grid"]).cuda(), range(c["depth"]))
    logits = torch.stack([q @ k.mT * q.shape[-1] ** -0.5 for q, k in taps])
    assert distance(tokens.cpu(), g["patch_tokens"]) < 1e-4 and distance(logits.cpu(), g["attn_logits"]) < 1e-4


def test_golden_dit():
    g, model, shape = golden_dit()
    x, eps, t, y = cuda(g.draw("x", *shape), g.draw("eps", *shape), g["t"], g["y"])
    x_t = dit.noised(x, eps, t)
    with torch.no_grad():
        out = model.cuda()(x_t, t.float(), y)
    mse, vb = dit.ddpm_terms(out, x, eps, t)
    for found, key, tolerance in ((x_t, "x_t", 1e-4), (out, "out", 1e-4), (mse, "mse", 1e-4), (vb, "vb", 1e-3)):
        assert distance(found.cpu(), g[key]) < tolerance, key


def test_golden_preprocessing():
    g = Golden("dinov2_preprocess")
    images = (60 * g.draw("img", 1, 3, 256, 256) + 128).clamp(0, 255).byte()
    x = teacher.preprocess(images.cuda())
    assert x.shape == (1, 3, 224, 224) and distance(x[:, :, :8, :8].cpu(), g["corner"]) < 1e-4


def test_golden_inception():
    g = Golden("inception")
    images = g.draw("img", g.config["n"], 3, g.config["size"], g.config["size"])
    images = (60 * images + 128).clamp(0, 255).byte().cuda()
    for resize, key in (("tf1", "pool_tf_resize"), ("pytorch", "pool_pytorch_resize")):
        assert distance(g.fill(fid.Inception(resize)).cuda()(images)["pool"].cpu(), g[key]) < 1e-4


def test_golden_alignment():
    g = Golden("haste_loss")
    c = g.config
    loss = 0
    for s, t in zip(c["student_layers"], c["teacher_layers"]):
        student = [g.draw(f"{n}s{s}", c["batch"], c["student_heads"], c["tokens"], c["student_head_dim"]).cuda()
                   for n in "qk"]
        guiding = [g.draw(f"{n}t{t}", c["batch"], c["teacher_heads"], c["tokens"] + 1,
                          c["teacher_head_dim"])[:, :, 1:].cuda() for n in "qk"]
        loss = loss + haste.attention_alignment(*student, *guiding) / len(c["student_layers"])
    assert abs(loss.item() / g["attn_loss"].item() - 1) < 1e-4


def test_golden_xar():
    g, model, _ = official()
    c, t = g.config, g["t"].T
    B, M, n = c["batch"], c["cells"], c["tokens_per_cell"]
    latent, eps = g.draw("latent", B, 16, 16, 16), g.draw("eps", B, M, n, 16).flatten(1, 2)
    t_ = t.repeat_interleave(n, dim=1)[..., None]
    x_t = (1 - t_) * model.to_tokens(latent) + t_ * eps
    first, noise = g.draw("init", M, B, n, 16), g.draw("noise", M, c["num_steps"] - 1, B, n, 16)
    draws = iter([z for i in range(M) for z in (first[i], *noise[i])])
    model.cuda()
    with torch.no_grad():
        assert distance(model(*cuda(x_t, t, g["y"])).cpu(), g["velocity"]) < 1e-4
        assert abs(model.loss(*cuda(latent, g["y"], t, eps)).item() / g["loss"].item() - 1) < 1e-4
    out = model.sample(torch.arange(B) + 3, c["num_steps"], c["cfg"], lambda like: next(draws).to(like))
    assert distance(out.cpu(), g["sample"]) < 1e-3


@pytest.mark.parametrize("entity,grid", [("cell:8", 16), ("cell:4", 8), ("scale", 8), ("image", 8)])
@pytest.mark.parametrize("clean", [False, True])
def test_xar_attention_is_the_cpus(entity, grid, clean):
    """Dense calls and masks, forward and backward."""
    model = small(entity, grid=grid)
    x, y, t = torch.randn(2, 1, grid, grid), torch.arange(2), torch.rand(2, len(model.sizes))
    eps, context = torch.randn(2, sum(model.sizes), 1), "clean" if clean else "random"

    def outcome(*inputs):
        loss = model.loss(*inputs, context=context)
        weights = [b.attn.qkv.weight for b in [*model.encoder_blocks, *model.decoder_blocks]]
        return [x.cpu() for x in (loss, *torch.autograd.grad(loss, weights))]
    expected = outcome(x, y, t, eps)
    model.cuda()
    assert all(distance(a, b) < 1e-3 for a, b in zip(outcome(*cuda(x, y, t, eps)), expected))
    with torch.autocast("cuda", torch.bfloat16):
        assert all(distance(a, b) < 0.05 for a, b in zip(outcome(*cuda(x, y, t, eps)), expected))


@pytest.mark.parametrize("entity", ["cell:4", "scale"])
def test_cached_sampling_is_the_cpus(entity):
    model, y = small(entity), torch.arange(3)
    randn, drawn = recorded()
    expected, draws = model.sample(y, 4, 2.0, randn), iter(drawn)
    found = model.cuda().sample(y.cuda(), 4, 2.0, lambda like: next(draws).to(like))
    assert distance(found.cpu(), expected) < 1e-3


def test_metrics_on_the_device_equal_those_on_the_cpu():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2000, 300, generator=generator) for _ in range(2))
    gaussians = [x for f in (a, b) for x in (f.double().mean(0), torch.cov(f.double().T))]
    for metric, inputs in ((fid.frechet_distance, gaussians), (fid.precision_recall, (a, b)), (fid.kid, (a, b)),
                           (fid.inception_score, (a,))):
        assert metric(*cuda(*inputs)) == pytest.approx(metric(*inputs), rel=1e-8)


# ---- runs

def gap(found, expected, name):
    """The largest relative difference of a logged number; absolute for numbers below 1."""
    assert [r["step"] for r in found] == [r["step"] for r in expected]
    assert [name in r for r in found] == [name in r for r in expected]
    return max(abs(a[name] - b[name]) / max(1, abs(b[name])) for a, b in zip(found, expected) if name in b)


@pytest.fixture
def train(tiny_run, tiny_xar, packed_folder):
    """Call a program by its name; returns the rows of its log. `packed` among the flags is the packed folder."""
    def call(program, *flags, out="run"):
        flags = [str(packed_folder) if word == "packed" else word for word in flags]
        return {"haste": tiny_run, "xar": tiny_xar}[program]("--eval-every", "0", *flags, out=out)[0]
    return call


@pytest.fixture
def numbers(monkeypatch):
    """What the losses of both programs are given as labels, times and noise, step by step."""
    seen, losses, xar_losses = [], haste_train.losses, xar_train.losses

    def watched_losses(model, x, y, t, eps, *args, **kwargs):
        seen.append([n.cpu() for n in (y, t, eps)])
        return losses(model, x, y, t, eps, *args, **kwargs)

    def watched_xar_losses(model, net, x, y, t, eps, *args):
        seen.append([n.cpu() for n in (y, t, eps)])
        return xar_losses(model, net, x, y, t, eps, *args)
    monkeypatch.setattr(haste_train, "losses", watched_losses)
    monkeypatch.setattr(xar_train, "losses", watched_xar_losses)
    return seen


@pytest.mark.parametrize("precision,bound", [("fp32", FP32), ("bf16", BF16)])
@pytest.mark.parametrize("program,flags", [
    ("haste", ["--stop", "6"]), ("haste", ["--stop", "6", "--time", "lognormal", "--data", "packed", "--mirror"]),
    ("haste", ["--stop", "6", *SCENES, "--zero-init", "--lr", "0.005"]),      # at 0.02 rounding errors grow
    ("xar", []), ("xar", ["--entity", "image"]), ("xar", ["--context", "clean"]), ("xar", GUIDED_XAR),
    ("xar", [*GUIDED_XAR, "--entity", "image"]), ("xar", [*GUIDED_XAR, "--context", "clean"]),
    ("xar", ["--data", "packed", "--mirror"]),
])
def test_a_run_is_the_cpus(program, flags, precision, bound, train, numbers, float32):
    """The same random numbers, bit for bit, and losses within 2 %, from which a network that does not learn is far."""
    if program == "xar":
        flags = [*flags, "--lr", "0.005"]                                   # at 0.02 rounding errors grow
    flags = [*flags, "--steps", "10"]
    expected, drawn = train(program, *flags), numbers[:]
    numbers.clear()
    found = train(program, *flags, "--device", "cuda", "--precision", precision)
    assert len(numbers) == 10 and all(torch.equal(a, b) for x, y in zip(numbers, drawn) for a, b in zip(x, y))
    names = [name for name in ("loss", "feature_loss", "attention_loss") if name in expected[0]]
    assert {name: gap(found, expected, name) < bound for name in names} == dict.fromkeys(names, True)
    assert gap(found, expected, "grad_norm") < 5 * bound

    still = ["--lr", "1e-12", *(["--lr-end", "1e-12"] if program == "xar" else [])]
    assert gap(train(program, *flags, *still), expected, "loss") > 2 * bound


def test_a_run_of_one_card_by_its_number(train, float32):
    flags = ["--precision", "fp32", "--device"]
    assert gap(train("haste", *flags, "cuda:0"), train("haste", *flags, "cuda"), "loss") < 1e-3
    with pytest.raises(SystemExit, match=r"--device cuda:99: this machine has \d+ CUDA device"):
        train("haste", *flags, "cuda:99")


@pytest.mark.parametrize("program", ["haste", "xar"])
def test_evaluation_is_the_cpus(program, train, float32, tmp_path):
    """Samples of the average, decoded, and their Frechet distance."""
    flags = ["--data", "packed", "--eval-every", "4", "--precision", "fp32"]
    expected, found = train(program, *flags), train(program, *flags, "--device", "cuda")
    assert expected[-1]["fd"] > 0 and found[-1]["fd"] == pytest.approx(expected[-1]["fd"], rel=0.05)
    assert (tmp_path / "run" / "samples.png").exists()


@pytest.mark.parametrize("program", ["haste", "xar"])
def test_stopped_run_goes_on(program, train, float32, monkeypatch, tmp_path):
    """On CUDA up to the rounding of its kernels; the CPU then goes on from its checkpoint, as CUDA itself does."""
    flags = ["--resume", "auto", "--precision", "fp32", "--steps", "6"]
    if program == "haste":
        flags += ["--stop", "5"]
    straight = train(program, *flags, "--device", "cuda", out="straight")
    real = data.batches

    def interrupted(*args, **kwargs):
        for i, batch in enumerate(real(*args, **kwargs)):
            if i == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch
    monkeypatch.setattr(data, "batches", interrupted)
    assert [r["step"] for r in train(program, *flags, "--device", "cuda")] == [1, 2, 3]
    monkeypatch.setattr(data, "batches", real)
    checkpoint = (tmp_path / "run" / "ckpt.pt").read_bytes()
    resumed = train(program, *flags, "--device", "cuda")
    assert len(resumed) == 6 and gap(resumed, straight, "loss") < 1e-3 and gap(resumed, straight, "grad_norm") < 1e-2

    (tmp_path / "run" / "ckpt.pt").write_bytes(checkpoint)
    assert gap(train(program, *flags, "--device", "cpu"), straight, "loss") < FP32


@pytest.mark.parametrize("program,flags", [("haste", ["--stop", "3"]), ("xar", []), ("xar", ["--entity", "image"]),
                                           ("xar", GUIDED_XAR)])
def test_compiled_blocks_on_packed_data(program, flags, train, float32):
    """Also across the end of the alignment, where the taps end."""
    flags = [*flags, "--data", "packed", "--mirror", "--device", "cuda", "--precision", "fp32", "--steps", "6"]
    eager, compiled = train(program, *flags), train(program, *flags, "--compile")
    assert len(compiled) == 6 and gap(compiled, eager, "loss") < FP32 and gap(compiled, eager, "grad_norm") < 5 * FP32


SYNCHRONISING = [("haste", []), ("haste", ["--accumulate", "2"]), ("haste", ["--data", "packed", "--mirror"]),
                 ("haste", SCENES),
                 ("haste", ["--compile"]), ("haste", ["--align", "none"]), ("xar", []), ("xar", ["--accumulate", "2"]),
                 ("xar", ["--data", "packed", "--mirror"]), ("xar", ["--compile"]), ("xar", ["--entity", "image"]),
                 ("xar", ["--context", "clean", "--dropout", "0.1", "--attn-dropout", "0.1"]),
                 ("xar", [*GUIDED_XAR, "--stop", "never"]), ("xar", [*GUIDED_XAR, "--stop", "never", "--compile"])]


@pytest.mark.parametrize("program,flags", SYNCHRONISING, ids=[" ".join([p, *flags]) for p, flags in SYNCHRONISING])
def test_steps_that_do_not_log_do_not_synchronise(program, flags, train, monkeypatch):
    """From the end of the second step on, when all is compiled and cached, to the log of the last."""
    steps, zero_grad, refuse = [], torch.optim.AdamW.zero_grad, run.refuse_nonfinite

    def watched_zero_grad(self, *args, **kwargs):
        zero_grad(self, *args, **kwargs)
        steps.append(1)
        if len(steps) >= 2:
            torch.cuda.set_sync_debug_mode("error")

    def watched_refuse(*args):
        torch.cuda.set_sync_debug_mode("default")                           # the host may wait when it logs
        refuse(*args)
    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", watched_zero_grad)
    monkeypatch.setattr(run, "refuse_nonfinite", watched_refuse)
    stop = ["--stop", "never"] if program == "haste" else []
    try:
        train(program, "--device", "cuda", "--steps", "8", "--log-every", "100", *stop, *flags)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == 8


def test_synchronisation_would_be_seen():
    """The proof that the test above can fail."""
    x = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            x.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- alignment at full widths, and memory

def taps_of_the_networks(offset):
    """Queries and keys of SiT-XL's and DINOv2-B's heads, views of their packed projections: 16 of 72, and 12 of 64.

    The student's keys have a mean of about `offset` deviations.
    """
    student = sit.SiT(32, 2, 4, 1152, 1, 16, 10).cuda()
    vit = teacher.DINOv2(img_size=224, embed_dim=768, depth=1, num_heads=12).eval().cuda()
    x, images = torch.randn(2, 4, 32, 32), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    x, images, t, y = cuda(x, images, torch.rand(2), torch.arange(2))
    with torch.no_grad():
        student.blocks[0].attn.qkv.bias[1152:2304] = 0.7 * offset           # without bias the deviation is 0.7
    with torch.autocast("cuda", torch.bfloat16):
        _, _, [(q, k)] = student(x, t, y, tap_layers=[0])
        with torch.no_grad():
            _, [(q_t, k_t)] = vit(teacher.preprocess(images, 16), [0])
    assert q.shape == k.shape == (2, 16, 256, 72) and q_t.shape == k_t.shape == (2, 12, 256, 64)
    assert q.dtype == q_t.dtype == torch.bfloat16 and not q.is_contiguous() and not k_t.is_contiguous()
    return q, k, q_t, k_t


@pytest.mark.parametrize("offset", [0, 10])
def test_bfloat16_gradient_is_within_three_percent(offset):
    q, k, q_t, k_t = taps_of_the_networks(offset)
    assert not offset or k.float().mean(2).abs().mean() > 8 * k.float().std(2).mean()
    found = torch.autograd.grad(haste.attention_alignment_grad(q, k, q_t, k_t), (q, k))
    exact = [x.detach().float().requires_grad_() for x in (q, k)]
    expected = torch.autograd.grad(plain_form(*exact, q_t.float(), k_t.float()), exact)
    for a, b in zip(found, expected):
        assert distance(a, b) < 0.03
        assert b[:, :12].any() and not a[:, 12:].any()                      # the heads that have no partner


def peak(function):
    """Bytes that a call needs beyond what lay in memory before; it is called once before, for workspaces and plans."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def test_alignment_stores_no_map():
    def bytes_at(N):
        q, k, q_t, k_t = (torch.randn(1, 12, N, d, device="cuda", dtype=torch.bfloat16) for d in (72, 72, 64, 64))
        q.requires_grad_()
        k.requires_grad_()
        return peak(lambda: torch.autograd.grad(haste.attention_alignment_grad(q, k, q_t, k_t), (q, k)))
    few, many = bytes_at(1024), bytes_at(4096)
    assert many < 6 * few                                                   # four times the tokens; a map is 16 times
    assert many < 12 * 4096 ** 2 * 2                                        # below one map in bfloat16


def test_a_guided_step_needs_far_less_memory_than_the_plain_form(monkeypatch):
    """1,024 tokens, three pairs of blocks: at most 0.6 of a step that stores the maps."""
    model = sit.SiT(64, 2, 4, 128, 3, 8, 10, z_dim=64, projector_dim=64, encoder_depth=3).cuda()
    x, eps = torch.randn(2, 8, 4, 64, 64, device="cuda")
    t, y = torch.rand(8, device="cuda"), torch.zeros(8, dtype=torch.long, device="cuda")
    taps = [tuple(torch.randn(2, 8, 8, 1024, 16, device="cuda", dtype=torch.bfloat16)) for _ in range(3)]
    targets = torch.randn(8, 1024, 64, device="cuda"), taps

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            total, _ = haste_train.losses(model, x, y, t, eps, targets, [(0, 0), (1, 1), (2, 2)], haste_train.Config())
        total.backward()
        model.zero_grad()
    ours = peak(step)
    monkeypatch.setattr(haste_train, "attention_alignment_grad", plain_form)
    assert ours < 0.6 * peak(step)


@pytest.mark.parametrize("flags", [[], ["--compile"]])
def test_teacher_and_projector_leave_the_memory(flags, train, monkeypatch, tmp_path):
    """A teacher of 28 M parameters, and a projector of 6 M with average and optimizer state, beside a tiny student."""
    vit = teacher.DINOv2(img_size=56, embed_dim=768, depth=4, num_heads=12)
    torch.save({"config": vit.config, "model": vit.state_dict()}, tmp_path / "teacher.pt")
    sizes, allocated = {}, []
    make, drop, losses = align.make_teacher, haste_train.drop_projector, haste_train.losses

    def size(tensors):
        return sum(x.numel() * x.element_size() for x in tensors)

    def watched_make(*args):
        net = make(*args)
        sizes["teacher"] = size(net.parameters())
        return net

    def watched_drop(model, ema, opt):
        sizes["projector"] = 4 * size(model.projectors.parameters())        # weights, average, two moments
        return drop(model, ema, opt)

    def watched_losses(*args, **kwargs):
        allocated.append(torch.cuda.memory_allocated())
        return losses(*args, **kwargs)
    monkeypatch.setattr(align, "make_teacher", watched_make)
    monkeypatch.setattr(haste_train, "drop_projector", watched_drop)
    monkeypatch.setattr(haste_train, "losses", watched_losses)
    train("haste", "--device", "cuda", "--teacher-weights", str(tmp_path / "teacher.pt"), "--projector-dim", "2048",
          "--steps", "6", "--stop", "3", "--log-every", "100", *flags)
    assert len(allocated) == 6 and sizes["teacher"] > 5e7 and sizes["projector"] > 5e7
    freed = [allocated[2] - later for later in allocated[3:]]               # in the first step without them, and later
    assert min(freed) > sizes["teacher"] + sizes["projector"] - 2 ** 22     # of more than 100 MB, 4 MB may come and go


# ---- the other programs

def test_packed_moments_are_the_cpus(packed_folder, tmp_path):
    """They are float16; with TF32, 4e-4 of them would be wrong."""
    photos, weights = packed_folder.parent / "photos", packed_folder.parent / "vae.pt"
    prepare.main([str(photos), str(tmp_path / "set"), "--size", "16", "--mirror", "--vae", str(weights),
                  "--device", "cuda"])
    found, expected = (torch.from_numpy(np.load(f / "moments.npy")).float() for f in (tmp_path / "set", packed_folder))
    assert distance(found, expected) < 2e-4
    assert np.array_equal(np.load(tmp_path / "set" / "images.npy"), np.load(packed_folder / "images.npy"))


def test_decoder_is_the_cpus(packed_folder):
    net, z = vae.load_vae(packed_folder.parent / "vae.pt"), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = net.decode(z)
        assert distance(net.cuda().decode(z.cuda()).cpu(), expected) < 2e-4


@pytest.mark.parametrize("program,flags", [("haste", ["--sampler", "sde"]), ("haste", ["--sampler", "heun"]),
                                           ("haste", ["--packed"]), ("xar", []), ("xar", ["--packed"])])
def test_samples_are_the_cpus(program, flags, train, float32, tmp_path):
    """Of a checkpoint that the CPU has trained; `--packed` stands for latents, which are decoded."""
    source = ["--data", "packed"] if "--packed" in flags else []
    train(program, *source, "--ema", "0")

    def images(device, precision, seed="0"):
        out = tmp_path / f"{device}-{precision}-{seed}.npz"
        sample.main(["--ckpt", str(tmp_path / "run" / "ckpt.pt"), "--samples", "20", "--steps", "5", "--cfg", "1.5",
                     "--out", str(out), "--device", device, "--precision", precision, "--seed", seed,
                     *(word for word in flags if word != "--packed")])
        with np.load(out) as f:
            return f["arr_0"].astype(int)
    expected = images("cpu", "fp32")
    other = abs(images("cpu", "fp32", seed="1") - expected).mean()
    assert other > 5                                                        # of 255: other noise, other images
    assert abs(images("cuda", "fp32") - expected).mean() < 0.01 * other
    assert abs(images("cuda", "bf16") - expected).mean() < 0.2 * other
