"""Every line for CUDA runs without one: fake tensors have a device, and one left on the CPU raises; backward on `meta`."""
import copy
import os
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import GUIDED_XAR, TINY, TINY_XAR, same_weights
from test_teacher import build
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import align
import data
import ddp
import dit
import evaluate
import fid
import haste
import haste_train
import mmdit
import models
import prepare
import run
import sit
import teacher
import text
import vae
import xar
import xar_train

CUDA = torch.device("cuda", 0)
B, N = 2, 16                                                                # images, tokens of `student`
L, WIDTH = 6, 8                                                             # captions
IMAGE, HALF, FLOAT = (B, 1, 8, 8), torch.bfloat16, torch.float32


def settings():
    """What programs change for CUDA in this process, to be put back."""
    return (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32,
            torch.backends.cuda.cudnn_sdp_enabled())


def plain_apply(module, change, recurse=True):
    """Module._apply that replaces parameters: the original swaps fake ones, which fails while anybody refers to them."""
    for child in module.children():
        child._apply(change)
    for name, w in module._parameters.items():
        if w is not None:
            module._parameters[name] = torch.nn.Parameter(change(w), w.requires_grad)
    for name, w in module._buffers.items():
        module._buffers[name] = change(w)
    return module


def plain_deepcopy(tensor, memo):
    """FakeTensor.__deepcopy__ without the storage, which has no bytes: the original spoils the heap."""
    return torch.nn.Parameter(tensor.clone(), tensor.requires_grad)


def can_pretend():
    """Older torch asks for a driver even where all tensors are fake."""
    try:
        a = torch.zeros(2, 2)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            return torch.cat([a.to(CUDA), torch.zeros(2, 2, device=CUDA).to(torch.half)]).is_cuda
    except RuntimeError:
        return False


def forget():
    """Clear the tensors that are kept for each device."""
    teacher._mean_std.cache_clear()
    dit._tables.cache_clear()


@pytest.fixture
def fake(monkeypatch):
    """A pretended GPU: `with fake():` tensors on `CUDA` can be made, moved, and computed with. They have no numbers.

    Make models before, move them inside. Gradients are off: with them, autocast would ask for a real device.
    """
    if not can_pretend():
        pytest.skip("this torch cannot pretend that there is a GPU")

    @contextmanager
    def pretended():
        forget()                                                            # what is kept belongs to one block
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
                yield
        finally:
            forget()
    before = settings()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.nn.Module, "_apply", plain_apply)
    monkeypatch.setattr(FakeTensor, "__deepcopy__", plain_deepcopy)
    yield pretended
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]
    torch.backends.cuda.enable_cudnn_sdp(before[2])


# ---- forward passes

def student():
    return sit.SiT(8, 2, 1, 32, 3, 2, 10, z_dim=16, projector_dim=8, encoder_depth=2)


def irepa_student():
    return sit.SiT(8, 2, 1, 32, 3, 2, 10, z_dim=16, projector_kernel=3, encoder_depth=2)


def small_dit():
    return sit.SiT(8, 2, 1, 32, 3, 2, 10, learn_sigma=True, keep_sigma=True, z_dim=16, projector_dim=8, encoder_depth=2)


def small_mmdit(**kwargs):
    return mmdit.MMDiT(8, 2, 1, 32, 3, 2, WIDTH, z_dim=16, projector_dim=8, encoder_depth=2, **kwargs)


def small_clip():
    return text.ClipText(20, L, WIDTH, 2, 2)


def word_codes():
    return text.WordCodes(19, L, WIDTH)


def small_dinov2():
    return teacher.DINOv2(56, embed_dim=16, depth=2, num_heads=4)


def small_xar(entity="cell:4", grid=8, **kwargs):
    return xar.XAR(grid, 1, 32, 1, 1, 2, 10, entity, **kwargs)


def guided_xar(entity="cell:4"):
    return small_xar(entity, z_dim=16, projector_dim=8, feature_depth=1)


def xar_losses(net, device=None, context="random"):
    """The terms of an aligned step of xAR."""
    q, k = randn(B, 3, 64, 8, device=device), randn(B, 3, 64, 8, device=device)
    targets = randn(B, 64, 16, device=device), [(q, k)] * 2
    t = torch.rand(B, len(net.sizes), device=device or CUDA)
    eps = randn(B, 64, 1, device=device)
    total, terms = xar_train.losses(net, net, randn(B, 1, 8, 8, device=device), classes(device), t, eps, targets,
                                    [(0, 1), (1, 2)], xar_train.Config(context=context), exact=True)
    return total, *terms.values()


def randn(*shape, device=None):
    return torch.randn(shape, device=device or CUDA)


def classes(device=None):
    return torch.zeros(B, dtype=torch.long, device=device or CUDA)


def ids():
    return torch.zeros(B, L, dtype=torch.long, device=CUDA)


def features(device=None):
    return randn(B, L, WIDTH, device=device)


def condition_of(encoder=None):
    """What tells a model of classes, or of captions."""
    null = torch.tensor(10, device=CUDA) if encoder is None else ids()[0]
    return models.Condition(null, encoder)


def times(device=None):
    return torch.rand(B, device=device or CUDA)


def pixels(channels=3, side=8):
    return torch.zeros(B, channels, side, side, dtype=torch.uint8, device=CUDA)


def flat(found):
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(found, torch.Tensor):
        return [found]
    values = found.values() if isinstance(found, dict) else found
    return [tensor for value in values for tensor in flat(value)]


def step_losses(net, device=None, targets=True, contrast=False, y=classes, **settings):
    """haste_train.losses with a teacher of other heads and other widths, (B, 4, N, 4) against (B, 2, N, 16)."""
    taps = [(randn(B, 4, N, 4, device=device), randn(B, 4, N, 4, device=device)) for _ in range(2)]
    x, eps = randn(*IMAGE, device=device), randn(*IMAGE, device=device)
    batch = x, y(device), times(device), eps
    aim = (randn(B, N, 16, device=device), taps) if targets else None
    negatives = (eps, classes(device)) if contrast else None
    return haste_train.losses(net, *batch, aim, [(0, 0), (2, 1)], haste_train.Config(**settings), True, negatives)


def latents(views):
    moments = torch.zeros(B, views, 8, 4, 4, dtype=torch.half, device=CUDA)
    return data.to_latents(moments, torch.ones(B, dtype=torch.bool, device=CUDA), randn(B, 4, 4, 4), 0.18)


def pairs_of(loss, heads, width):
    q, k = randn(B, 3, N, 8), randn(B, 3, N, 8)
    return haste.mean_over_pairs(loss, [(q, k)], [(randn(B, heads, N, width), randn(B, heads, N, width))])


def taught(net):
    """The teacher's tokens and taps, its images of one channel and its Linear layers in bfloat16."""
    net.resize_pos_embed(4)
    for layer in net.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.bfloat16()
    return align.teacher_targets(net, pixels(1), [(0, 1)], run.autocast("auto", CUDA))


# name: (make the network on the CPU, --precision, what happens on CUDA, shapes that come out, their dtype or dtypes)
FORWARDS = {
    "velocity": (student, "auto", lambda net: net(randn(*IMAGE), times(), classes()), [IMAGE], FLOAT),
    "taps": (student, "auto", lambda net: net(randn(*IMAGE), times(), classes(), [2])[1:],
             [(B, N, 16), (B, 2, N, 16), (B, 2, N, 16)], HALF),
    "original SiT": (lambda: sit.SiT(8, 2, 1, 32, 1, 2, 10, qk_norm=True, learn_sigma=True, flip_time=True), "fp32",
                     lambda net: net(randn(*IMAGE), times(), classes()), [IMAGE], FLOAT),
    **{f"flow loss {path}": (student, "auto", lambda net, path=path: sit.flow_loss(
        net, randn(*IMAGE), classes(), path=path, label_drop=0.5), [()], FLOAT) for path in ("linear", "cosine")},
    "aligned step": (student, "auto", step_losses, [()] * 4, FLOAT),
    "free step": (student, "auto", lambda net: step_losses(net, targets=False), [()] * 2, FLOAT),
    **{f"MM-DiT {name}": (lambda kwargs=kwargs: small_mmdit(**kwargs), "auto",
                          lambda net: net(randn(*IMAGE), times(), features(), [2]),
                          [IMAGE, (B, N, 16), (B, 2, N, 16), (B, 2, N, 16)], dtypes)
       for name, kwargs, dtypes in (("plain", {}, [FLOAT, HALF, HALF, HALF]),
                                    ("normed", dict(qk_norm=True, zero_init=True), [FLOAT, HALF, FLOAT, FLOAT]))},
    "MM-DiT's step": (small_mmdit, "auto", lambda net: step_losses(net, y=features), [()] * 4, FLOAT),
    "sample captions": (small_mmdit, "auto", lambda net: sit.sample_ode(
        net, randn(*IMAGE), features(), 2, 2.0, null_label=randn(L, WIDTH)), [IMAGE], FLOAT),
    **{f"captions of {make.__name__}": (make, "auto", lambda net: condition_of(net)(ids(), classes().bool()),
                                        [(B, L, WIDTH)], FLOAT) for make in (small_clip, word_codes)},
    "packed captions": (word_codes, "auto", lambda net: models.Condition(features()[0].half())(
        features().half(), classes().bool()), [(B, L, WIDTH)], FLOAT),
    "DiT's step": (small_dit, "auto", lambda net: step_losses(net, objective="ddpm"), [()] * 5, FLOAT),
    "step of the later methods": (
        irepa_student, "auto", lambda net: step_losses(net, contrast=True, contrastive=0.05, spatial_norm=0.6),
        [()] * 5, FLOAT),
    "teacher's tokens": (small_dinov2, "fp32", lambda net: taught(net)[0], [(B, N, 16)], FLOAT),
    "teacher's taps": (small_dinov2, "fp32", lambda net: taught(net)[1], [(B, 4, N, 4)] * 2, HALF),
    "class token": (small_dinov2, "fp32", lambda net: net.resize_pos_embed(3).features(teacher.preprocess(pixels(), 3)),
                    [(B, 16), (B, 9, 16)], FLOAT),
    **{f"sample {name}": (student, "auto", lambda net, kwargs=kwargs: sit.sample_ode(
        net, randn(*IMAGE), classes(), 2, **kwargs), [IMAGE], FLOAT)
       for name, kwargs in (("euler", {}), ("heun", dict(heun=True, cfg_scale=2.0, cfg_interval=(0.6, 1))))},
    **{f"sample sde {path}": (student, "auto", lambda net, path=path: sit.sample_sde(
        net, randn(*IMAGE), classes(), 2, 2.0, path=path, randn=run.indexed_randn(0, range(B))), [IMAGE], FLOAT)
       for path in ("linear", "cosine")},
    "sample contrastive": (student, "auto", lambda net: sit.sample_ode(
        net, randn(*IMAGE), classes(), 2, 2.0, contrast=(0.05, torch.zeros(1, 8, 8))), [IMAGE], FLOAT),
    **{f"sample ddpm {channels}": (small_dit, "auto", lambda net, channels=channels: dit.sample_ddpm(
        net, randn(*IMAGE), classes(), 3, 2.0, guided_channels=channels, randn=run.indexed_randn(0, range(B))),
        [IMAGE], FLOAT) for channels in (None, 1)},
    **{f"xAR loss {entity} {context}": (
        lambda entity=entity, grid=grid: small_xar(entity, grid, dropout=0.1, attn_dropout=0.1), "auto",
        lambda net, context=context: net.loss(randn(B, 1, net.grid, net.grid), classes(), label_drop=0.5,
                                              context=context),
        [()], FLOAT)
       for entity, grid, context in (("patch", 4, "random"), ("cell:8", 16, "increasing"), ("scale", 8, "decreasing"),
                                     ("subsample:2", 8, "clean"), ("scale", 8, "clean"), ("image", 8, "random"))},
    **{f"xAR sample {entity} {cfg}": (
        lambda entity=entity: small_xar(entity, 4), "auto",
        lambda net, cfg=cfg: net.sample(classes(), 2, cfg, run.indexed_randn(0, range(B))), [(B, 1, 4, 4)], FLOAT)
       for entity, cfg in (("cell:2", 2.0), ("scale", 2.0), ("image", 1.0))},
    **{f"aligned xAR {entity} {context}": (
        lambda entity=entity: guided_xar(entity), "auto", lambda net, context=context: xar_losses(net, context=context),
        [()] * 4, FLOAT) for entity, context in (("cell:4", "random"), ("patch", "clean"), ("image", "random"))},
    "growth": (small_xar, "auto", lambda net: evaluate.growth(net, randn(B, 64, 1)), [(B, 4, 1, 8, 8)], FLOAT),
    "encoder": (lambda: vae.AutoencoderKL((1, 1), 4, True), "fp32", lambda net: net.encode(randn(B, 3, 8, 8)),
                [(B, 4, 4, 4)] * 2, FLOAT),
    "decoder": (lambda: vae.AutoencoderKL((1, 1), 4), "fp32", lambda net: net.decode(randn(B, 4, 4, 4)), [(B, 3, 8, 8)],
                FLOAT),
    **{f"inception {resize}": (lambda resize=resize: fid.Inception(resize), "fp32", lambda net: net(pixels(1, 32)),
                               [(B, 2048), (B, 2023), (B, 1008)], FLOAT) for resize in ("tf1", "pytorch")},
}
DATA = {
    "to pixels": (lambda: data.to_pixels(data.mirror(pixels(), classes().bool())), (B, 3, 8, 8), FLOAT),
    **{f"to latents {views}": (lambda views=views: latents(views), (B, 4, 4, 4), FLOAT) for views in (1, 2)},
    **{f"to uint8 {how}": (lambda how=how: data.to_uint8(randn(*IMAGE), how), IMAGE, torch.uint8)
       for how in ("round", "truncate")},
    **{f"{loss.__name__} {heads} {width}": (lambda loss=loss, taps=(heads, width): pairs_of(loss, *taps), (), FLOAT)
       for loss in (haste.attention_alignment, haste.attention_alignment_grad)
       for heads, width in ((3, 8), (2, 6), (4, 12))},
}


def slow_unless(names, table):
    return [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in table]


@pytest.mark.parametrize("name", slow_unless(
    ["velocity", "taps", "MM-DiT normed", "captions of small_clip", "original SiT", "DiT's step", "sample ddpm None", "sample contrastive", "class token", "sample heun", "sample sde cosine",
     "xAR loss cell:8 increasing", "xAR loss scale clean", "xAR sample cell:2 2.0", "growth", "encoder", "decoder",
     "inception tf1"], FORWARDS))
def test_what_a_network_returns_is_on_the_device(name, fake, monkeypatch):
    monkeypatch.setattr(xar.XAR, "_class_ids", lambda self, y: y)           # its check of the labels looks at numbers
    make, precision, forward, shapes, dtype = FORWARDS[name]
    net = make()
    with fake(), run.autocast(precision, CUDA):                             # auto is bf16 on CUDA
        found = flat(forward(net.to(CUDA)))
    dtypes = dtype if isinstance(dtype, list) else [dtype] * len(shapes)
    assert [(tuple(x.shape), x.dtype, x.device) for x in found] == [(*both, CUDA) for both in zip(shapes, dtypes)]


@pytest.mark.parametrize("name", [name for name, (_, precision, *_) in FORWARDS.items() if precision == "auto"])
def test_dtypes_meet_under_autocast(name, monkeypatch):
    """On the CPU in earnest: fake matrix products take any two dtypes."""
    make, _, forward, _, _ = FORWARDS[name]
    monkeypatch.setitem(globals(), "CUDA", torch.device("cpu"))
    with run.autocast("bf16", CUDA), torch.no_grad():
        forward(make())


@pytest.mark.parametrize("name", DATA)
def test_what_a_function_returns_is_on_the_device(name, fake):
    function, shape, dtype = DATA[name]
    with fake():
        found = function()
    assert (tuple(found.shape), found.dtype, found.device) == (shape, dtype, CUDA)


def test_a_tensor_left_behind_raises(fake):
    """The proof that the tests above can fail."""
    class Forgetful(sit.PatchEmbed):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.table = torch.ones(3)                                      # no buffer: it stays behind

        def forward(self, x):
            return super().forward(x) + self.table.sum(0, keepdim=True)
    net = student()
    net.x_embedder = Forgetful(2, 1, 32)
    with fake(), pytest.raises(RuntimeError, match="same device.*cuda:0 and cpu"):
        FORWARDS["velocity"][2](net.to(CUDA))


# ---- the programs, up to the first line that needs numbers

class NoWait(TorchDispatchMode):
    """Refuses copies between host and device for which one waits for the other, while `on`."""

    on = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if self.on and function is torch.ops.aten._to_copy.default and args[0].device != out.device:
            assert kwargs.get("non_blocking"), f"a copy to {out.device} waits"
        return out


class NeedsNumbers(Exception):
    """The run has come to the end of its last step, where the host waits for the device."""


@pytest.fixture
def pretend(fake, monkeypatch, tmp_path, small_teacher):
    """Run a program on the pretended GPU, without backward and without evaluation, to the end of its last step.

    Returns the number of steps. From the second one on, what would synchronise raises: a number that is asked for, or a
    copy that waits; only the end of the alignment may.
    """
    wait, steps = NoWait(), []
    clip = torch.nn.utils.clip_grad_norm_

    def watched_clip(parameters, largest):
        steps.append(1)
        wait.on = True
        parameters = list(parameters)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        return clip(parameters, largest)

    def watched(drop):
        def watched_drop(*args):
            wait.on = False
            return drop(*args)
        return watched_drop

    def end(*args):
        raise NeedsNumbers
    monkeypatch.setattr(ddp, "choose_device", lambda *args: CUDA)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched_clip)
    for program in (haste_train, xar_train):
        monkeypatch.setattr(program, "drop_projector", watched(program.drop_projector))
    monkeypatch.setattr(run, "refuse_nonfinite", end)

    def call(program, *flags, source="digits"):
        base = [*(TINY if program is haste_train else TINY_XAR), "--teacher-weights", str(small_teacher)]
        images = data.open_data(str(source))                                # real: the reader's thread has no fake ones
        monkeypatch.setattr(data, "open_alike", lambda *args: images)
        steps.clear()
        wait.on = False
        with fake(), wait, pytest.raises(NeedsNumbers):
            program.main([*base, "--data", str(source), "--out", str(tmp_path / "run"), "--device", "cuda",
                          "--eval-every", "0", "--log-every", "100", *flags])
        return len(steps)
    return call


@pytest.mark.parametrize("program,source", [(haste_train, "packed"), (haste_train, "scenes"), (xar_train, "digits"),
                                            (xar_train, "guided"),
                                            pytest.param(haste_train, "digits", marks=pytest.mark.slow),
                                            pytest.param(xar_train, "packed", marks=pytest.mark.slow)])
def test_training_neither_mixes_devices_nor_waits(program, source, pretend, packed_folder, capsys, monkeypatch):
    """As the presets for GPUs have it, compiled; of HASTE across the end of the alignment: step 4 has no teacher."""
    emptied, compiled = [], []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    monkeypatch.setattr(run, "compile_blocks", lambda blocks: compiled.append(len(blocks)))
    monkeypatch.setitem(program.PRESETS, "digits", dict(compile=None))
    if source == "packed":
        steps = pretend(program, "--mirror", "--accumulate", "2", source=packed_folder)
    else:
        flags = {"scenes": ["--model", "MMDiT-Ti/4"], "guided": GUIDED_XAR}.get(source, [])
        steps = pretend(program, *flags, source=source.replace("guided", "digits"))
    printed = capsys.readouterr().out
    assert steps == 4 and "1 process(es) on cuda, bf16" in printed
    if program is haste_train or source == "guided":
        assert compiled == [4, 4] and emptied == [1] and "step 3: alignment ends" in printed    # student, teacher
    else:
        assert compiled == [2]                                              # encoder and decoder


def test_a_step_that_waits_raises(pretend, monkeypatch):
    """The proof that the tests above can fail: a number that is asked for, and a copy to the host and back."""
    loss = xar.XAR.loss

    def asking(model, *args, **kwargs):
        found = loss(model, *args, **kwargs)
        return found * float(found)
    monkeypatch.setattr(xar.XAR, "loss", asking)
    with pytest.raises(DataDependentOutputException):
        pretend(xar_train)
    monkeypatch.setattr(xar.XAR, "loss", lambda model, x, *args, **kw: loss(model, x.cpu().to(CUDA), *args, **kw))
    with pytest.raises(AssertionError, match="a copy to cpu waits"):
        pretend(xar_train)


@pytest.mark.parametrize("flags", [["--entity", "cell:4"], ["--entity", "scale"], ["--entity", "patch"],
                                   ["--entity", "image"], ["--context", "clean"],
                                   GUIDED_XAR, [*GUIDED_XAR, "--entity", "image"]])
def test_cudnn_serves_no_attention_with_a_mask(flags, pretend, monkeypatch):
    """pytorch#196678: with a mask its gradients may be NaN, at 64 tokens, say."""
    masked, dense_or_masked, aligned = [], xar.attention, haste.attend

    def watched(q, k, v, sizes, mask, dropout):
        masked.append(mask is not None)
        return dense_or_masked(q, k, v, sizes, mask, dropout)
    monkeypatch.setattr(xar, "attention", watched)
    monkeypatch.setattr(haste, "attend", lambda *qkv: (masked.append(qkv[3] is not None), aligned(*qkv))[1])
    torch.backends.cuda.enable_cudnn_sdp(True)
    pretend(xar_train, *flags, "--steps", "1")
    assert torch.backends.cuda.cudnn_sdp_enabled() == (not any(masked))


def test_compiled_teacher_and_projector_are_freed_at_the_end_of_the_alignment(tiny_run, monkeypatch):
    """A compiled module refers to itself, so counting references does not free it; and no local variable may hold them."""
    seen, alive = [], []
    make, losses, drop = align.make_teacher, haste_train.losses, haste_train.drop_projector
    compile_block = torch.nn.Module.compile

    def watched_make(*args):
        net = make(*args)
        seen.append(weakref.ref(net.blocks[0].attn.qkv.weight))
        return net

    def watched_drop(model, *args):
        seen.append(weakref.ref(model.projectors[0][0].weight.untyped_storage()))
        drop(model, *args)
        return {"model": {}, "ema": {}}                                     # on a CPU, what is kept is no copy

    def watched_losses(*args, **kwargs):
        alive.append([reference() is not None for reference in seen])
        return losses(*args, **kwargs)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_block(self, backend="eager"))
    monkeypatch.setattr(align, "make_teacher", watched_make)
    monkeypatch.setattr(haste_train, "drop_projector", watched_drop)
    monkeypatch.setattr(haste_train, "losses", watched_losses)
    tiny_run("--compile", "--eval-every", "0", "--steps", "5")
    torch._dynamo.reset()
    assert alive == [[True]] * 3 + [[False, False]] * 2


def test_evaluation_draws_on_the_device(fake, monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluate, "draw_samples", lambda count, draw, processes: drawn.append(draw(torch.arange(B))))
    monkeypatch.setattr(xar.XAR, "_class_ids", lambda self, y: y.long())
    original = run.indexed_randn                                            # the rows are fake and have no numbers
    monkeypatch.setattr(run, "indexed_randn", lambda seed, rows: original(seed, range(len(rows))))
    processes = SimpleNamespace(main=False, device=CUDA)
    few = dict(eval_steps=2, eval_cfg=2.0)
    contrast = 0.05, torch.zeros(1, 8, 8)
    labels, captions = evaluate.Prompts(torch.arange(B)), evaluate.Prompts(torch.zeros(B, L, dtype=torch.long))
    for evaluation, net, encoder, own, cfg in (
            (evaluate.evaluate_sit, student(), None, [labels, None], haste_train.Config(**few)),
            (evaluate.evaluate_sit, student(), None, [labels, contrast], haste_train.Config(**few)),
            (evaluate.evaluate_sit, small_dit(), None, [labels, None], haste_train.Config(objective="ddpm", **few)),
            (evaluate.evaluate_sit, small_mmdit(), small_clip(), [captions, None], haste_train.Config(**few)),
            (evaluate.evaluate_xar, small_xar(), None, [], xar_train.Config(**few))):
        with fake():
            if own:
                own = [condition_of(encoder and encoder.to(CUDA)), *own]
            evaluation(net.to(CUDA), *own, lambda x: x, None, cfg, processes, run.autocast("auto", CUDA))
    assert [(x.device, x.dtype, tuple(x.shape)) for x in drawn] == [(CUDA, torch.uint8, IMAGE)] * 5


@pytest.mark.parametrize("packed,captioned", [(None, False), ({"scale": 0.18}, False), (None, True)])
def test_held_batch_lies_on_the_device(packed, captioned, fake, monkeypatch):
    """The angle of --stop auto: its teacher, losses and random numbers."""
    seen = []
    monkeypatch.setattr(haste_train, "gradient_cosine", lambda losses_at, parameters: seen.append(losses_at(0.5)))
    batch = torch.zeros(64, 1, 8, 8, dtype=torch.uint8), torch.zeros(64, dtype=torch.long)

    class Set:
        __len__ = lambda self: 64
        read = lambda self, rows: batch
        moments = lambda self, rows: torch.zeros(64, 2, 2, 8, 8, dtype=torch.half)
        captions = lambda self, rows, u: torch.zeros(64, L, dtype=torch.long)
    net, encoder = (small_mmdit(), small_clip()) if captioned else (student(), None)
    vit = small_dinov2().resize_pos_embed(4)
    processes = SimpleNamespace(device=CUDA, mean=lambda found: SimpleNamespace(item=lambda: found))
    images = SimpleNamespace(train=Set(), shape=IMAGE[1:], packed=packed, text={} if captioned else None)
    with fake():
        condition = condition_of(encoder and encoder.to(CUDA))
        haste_train.held_cosine(net.to(CUDA), vit.to(CUDA), images, condition, [(0, 1)], haste_train.Config(),
                                processes, run.autocast("auto", CUDA))
    assert [(x.device, x.dtype) for x in seen[0]] == [(CUDA, FLOAT)] * 2


def test_prepare_encodes_on_the_device(fake):
    """Up to its check of the numbers, which asks for them."""
    net, images = vae.AutoencoderKL((1, 1), 4), torch.zeros(B, 3, 8, 8, dtype=torch.uint8).numpy()
    with fake(), pytest.raises(DataDependentOutputException):
        prepare.encode(net.to(CUDA), images, SimpleNamespace(mirror=True, precision="bf16", vae="x"), CUDA)


@pytest.mark.parametrize("name", ["clip", "ijepa", "dinov3"])
def test_blocks_compile_and_networks_run_on_a_pretended_gpu(name, fake):
    _, net, images = build(name)
    tokens, [(q, _)] = net(images, (1,))
    compiled = copy.deepcopy(net)
    for block in compiled.blocks:
        block.compile(backend="eager", fullgraph=True)
    assert torch.equal(compiled(images, (1,))[0], tokens)
    with fake():
        net = net.to(CUDA).resize_pos_embed((2, 3))
        align.round_matrices(net)
        x = net.preprocess(torch.zeros(2, 3, 40, 60, dtype=torch.uint8, device=CUDA), (2, 3))
        with run.autocast("auto", CUDA):
            tokens, [(q, _)] = net(x, (1,))
        assert tokens.device == CUDA and tokens.shape[:2] == (2, 6) and q.dtype == torch.bfloat16
        assert torch.is_floating_point(net.features(x.float())[1])


# ---- backward passes, on the device that has shapes only

def meta(make):
    with torch.device("meta"):
        return make()


BACKWARDS = {
    "SiT": (student, lambda net: sit.flow_loss(net, randn(*IMAGE, device="meta"), classes("meta"), label_drop=0.5)),
    "HASTE": (student, lambda net: step_losses(net, "meta")[0]),
    "MM-DiT": (small_mmdit, lambda net: step_losses(net, "meta", y=features)[0]),
    "DiT": (small_dit, lambda net: step_losses(net, "meta", objective="ddpm")[0]),
    "later methods": (irepa_student, lambda net: step_losses(net, "meta", contrast=True, contrastive=0.05,
                                                             spatial_norm=0.6)[0]),
    **{f"xAR {entity} {context}": (
        lambda entity=entity, grid=grid: small_xar(entity, grid, dropout=0.1, attn_dropout=0.1),
        lambda net, context=context: net.loss(randn(B, 1, net.grid, net.grid, device="meta"), classes("meta"),
                                              context=context))
       for entity, grid in (("cell:4", 8), ("cell:8", 16), ("scale", 8)) for context in ("random", "clean")},
    **{f"aligned xAR {context}": (guided_xar, lambda net, context=context: xar_losses(net, "meta", context)[0])
       for context in ("random", "clean")},
}


@pytest.mark.parametrize("name", slow_unless(["SiT", "HASTE", "MM-DiT", "DiT", "xAR cell:8 random", "xAR scale clean"], BACKWARDS))
def test_every_parameter_gets_a_gradient_of_its_shape(name):
    make, loss = BACKWARDS[name]
    net = meta(make)
    loss(net).backward()
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    without = {name for name, p in trained.items() if p.grad is None}
    assert without == (set() if name != "SiT" else {n for n in trained if n.startswith("projectors.")})


def test_angle_between_gradients():
    net = meta(student)

    def losses_at(t):
        total, terms = step_losses(net, "meta")
        return terms["loss"], total - terms["loss"]
    assert haste.gradient_cosine(losses_at, net.blocks[1].parameters()).shape == ()


# ---- what depends on the device in ordinary Python

def test_devices_that_are_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ddp.choose_device("auto", 0) == ddp.choose_device("cuda", 0) == ddp.choose_device("cuda:0", 0) == CUDA
    assert ddp.choose_device("cuda:1", 0) == ddp.choose_device("auto", 1, 2) == torch.device("cuda", 1)
    assert ddp.choose_device("cpu", 1, 2) == torch.device("cpu")
    for flags, message in ((("cuda:2", 0), "--device cuda:2: this machine has 2 CUDA device"),
                           (("cuda", 2, 3), "--device cuda:2: this machine has 2 CUDA device"),
                           (("cuda:1", 0, 2), "would put all 2 processes on one card"),
                           (("cuda:x", 0), "--device cuda:x is not a device")):
        with pytest.raises(ValueError, match=message):
            ddp.choose_device(*flags)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ddp.choose_device("auto", 0) == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda:0: this torch finds no CUDA device"):
        ddp.choose_device("cuda:0", 0)


def test_apples_gpus_are_chosen(monkeypatch):
    monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK", raising=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device mps: this torch finds no Apple GPU"):
        ddp.choose_device("mps", 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match="--device mps is for one process"):
        ddp.choose_device("mps", 0, 2)
    with pytest.raises(ValueError, match="run PYTORCH_ENABLE_MPS_FALLBACK=1"):
        ddp.choose_device("mps", 0)
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    device = ddp.choose_device("mps", 0)
    assert device == torch.device("mps") and run.precision("auto", device) == "fp32"
    assert not run.compiling(SimpleNamespace(compile=None), device)


def test_processes_of_a_card(monkeypatch, fake):
    """What a process does with its card: NCCL knows it, the wrapper knows it, TF32 is on."""
    calls = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.update(set_device=device))
    monkeypatch.setattr(ddp.dist, "init_process_group", lambda backend, **kw: calls.update(backend=backend, **kw))
    monkeypatch.setattr(ddp, "DistributedDataParallel", lambda model, **kwargs: calls.update(kwargs))
    monkeypatch.setattr(os, "environ", {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"})
    processes = ddp.Processes("cuda")
    processes.wrap(None)
    card = torch.device("cuda", 1)
    assert processes.device == card and calls["set_device"] == card and torch.get_float32_matmul_precision() == "high"
    assert (calls["backend"], calls["device_id"], calls["device_ids"]) == ("nccl", card, [1])


def test_batches_are_pinned_and_moved_without_waiting(monkeypatch, fake):
    pinned, digits = [], data.open_data("digits").train
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(1) or self)
    feed = data.batches(digits, 0, 0, 8, slice(2, 6), "cuda", draw=lambda step: (torch.zeros(8, 3),))
    with fake():
        images, moments, labels, (numbers,) = next(feed)
    assert moments is None and len(pinned) >= 3
    assert [(tuple(x.shape), x.device) for x in (images, labels, numbers)] == [
        ((4, 1, 8, 8), CUDA), ((4,), CUDA), ((4, 3), CUDA)]
    feed.close()


def test_a_checkpoint_is_mapped_on_cuda(base_checkpoint, monkeypatch):
    maps, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: maps.append(kwargs["mmap"]) or load(*args, **kwargs))
    found = [run._read_own(base_checkpoint, "", torch.device(name)) for name in ("cpu", "cuda")]
    assert maps == [False, True] and same_weights(*found)


@pytest.fixture
def base_checkpoint(tiny_xar, tmp_path):
    tiny_xar("--steps", "1", "--eval-every", "0")
    return tmp_path / "run" / "ckpt.pt"


# ---- Apple's GPUs have no float64. Fake ones need a build of torch for Macs, so the CPU stands in

class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            assert getattr(x, "dtype", None) != torch.float64, f"{function} makes float64"
        return out


def test_state_of_the_samplers_is_float32_on_apples_gpus():
    for module in (sit, xar):
        found = [module._as_state(SimpleNamespace(device=torch.device(name), float=lambda: FLOAT,
                                                  double=lambda: torch.float64)) for name in ("mps", "cuda", "cpu")]
        assert found == [FLOAT, torch.float64, torch.float64]


@pytest.mark.parametrize("name", ["velocity", "MM-DiT's step", "aligned step", "flow loss cosine", "sample heun", "sample sde cosine",
                                  "xAR loss scale clean", "xAR sample cell:2 2.0", "class token", "decoder"])
def test_nothing_else_is_float64(name, monkeypatch):
    make, _, forward, _, _ = FORWARDS[name]
    monkeypatch.setitem(globals(), "CUDA", torch.device("cpu"))
    for module in (sit, dit, xar):
        monkeypatch.setattr(module, "_as_state", lambda x: x.float())
    net = make()
    forget()
    with NoFloat64(), torch.no_grad():
        forward(net)
