"""MM-DiT: equality with the official network, its geometry, its initialisations, its checkpoints."""
import argparse

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Golden, distance
from fill import fill_state_dict

import haste
import mmdit
import models
import sit


def golden_mmdit():
    g = Golden("mmdit")
    c = g.config
    model = mmdit.MMDiT(32, 2, 4, 32 * c["depth"], c["depth"], c["depth"], 768, z_dim=c["z_dims"][0],
                        projector_dim=c["projector_dim"], encoder_depth=c["encoder_depth"])
    g.fill(model, skip=("pos_embed",))
    S = c["latent"]
    return g, model, g.draw("x", c["batch"], 4, S, S), g.draw("context", c["batch"], c["context_tokens"], 768)


def tiny(**kwargs):
    """A model of filled weights: nothing of it is zero."""
    model = mmdit.MMDiT(**{**dict(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=3, num_heads=2,
                                  context_dim=12, encoder_depth=2, projector_dim=8), **kwargs})
    model.load_state_dict(fill_state_dict(model.state_dict(), 0, ("pos_embed",)))
    return model.eval()


def inputs(B=2, side=8, L=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(B, 4, side, side, generator=g), torch.rand(B, generator=g),
            torch.randn(B, L, 12, generator=g))


# ---- the official network

def test_velocity_projection_and_attention_are_the_official_ones():
    g, model, x, context = golden_mmdit()
    with torch.no_grad():
        v, z, taps = model(x, g["t"], context, tap_layers=range(len(g["attn_logits"])))
        logits = torch.stack([q @ k.mT * q.shape[-1] ** -0.5 for q, k in taps])
        assert (distance(v, g["velocity"]) < 1e-5 and distance(z, g["z"]) < 1e-5
                and distance(logits, g["attn_logits"]) < 1e-5)
        assert torch.equal(model(x, g["t"], context), v)                    # taps and projector change nothing


def test_papers_size_has_the_counted_number_of_parameters():
    with torch.device("meta"):
        model = mmdit.MMDiT(32, in_channels=4, context_dim=768, z_dim=768, **mmdit.MMDIT_CONFIGS["MMDiT-24/2"])
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(count, 1) == 512.4
    assert round(count - sum(p.numel() for p in model.projectors.parameters()) / 1e6, 1) == 505.1


# ---- geometry

@pytest.mark.parametrize("h,w", [(8, 8), (4, 12), (6, 2), (32, 32)])
def test_any_latent_takes_the_middle_of_the_table(h, w):
    model = tiny()
    table = model.pos_embed.view(16, 16, 32)
    rows, columns = h // 2, w // 2
    found = model.positions(rows, columns).view(rows, columns, 32)
    for i in range(rows):
        for j in range(columns):
            assert torch.equal(found[i, j], table[(16 - rows) // 2 + i, (16 - columns) // 2 + j])
    assert model(torch.randn(2, 4, h, w), torch.rand(2), torch.randn(2, 3, 12)).shape == (2, 4, h, w)


def test_tokens_and_pixels_are_where_they_were():
    """A patch of the input changes its own place first: with attention and text silenced, only that place."""
    model = tiny(depth=1, encoder_depth=1)
    with torch.no_grad():
        for p in model.joint_blocks.parameters():
            p.zero_()
        x, t, context = inputs(1)
        moved = x.clone()
        moved[:, :, 2:4, 6:8] += 1
        changed = (model(moved, t, context) - model(x, t, context)).abs().amax((0, 1)) > 1e-6
    assert changed[2:4, 6:8].all() and changed.sum() == 4


@pytest.mark.parametrize("kwargs,message", [
    (dict(input_size=9), "must be a multiple of the patch size"),
    (dict(hidden_size=30), "multiple of 4"),
    (dict(input_size=34), r"17 x 17 tokens are more than the position table has, 16 x 16.*table_grid=17"),
    (dict(z_dim=4, encoder_depth=4), r"must lie in 1 \.\.\. 3")])
def test_sizes_that_do_not_fit(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny(**kwargs)


def test_latents_of_other_sizes():
    with pytest.raises(ValueError, match=r"latent \[9, 8\] must be a multiple of the patch size 2"):
        tiny()(torch.randn(1, 4, 9, 8), torch.rand(1), torch.randn(1, 3, 12))
    with pytest.raises(ValueError, match=r"tap_layers \[3\] must lie in 0 \.\.\. 2"):
        tiny()(*inputs(), tap_layers=[3])


def test_a_larger_table():
    assert tiny(input_size=34, table_grid=17)(torch.randn(1, 4, 34, 34), torch.rand(1), torch.randn(1, 3, 12)).isfinite().all()
    with pytest.raises(ValueError, match="position table"):
        tiny()(torch.randn(1, 4, 34, 34), torch.rand(1), torch.randn(1, 3, 12))


# ---- attention

def test_joint_attention_is_softmax_over_text_and_image():
    """One block, written out with the whole attention matrix."""
    block = tiny().joint_blocks[0]
    a, x, c = torch.randn(2, 5, 32), torch.randn(2, 16, 32), torch.randn(2, 32)
    with torch.no_grad():
        found_a, found_x, (q_x, k_x) = block(a, x, c, tap=True)
        parts = []
        for stream, tokens in ((block.context_block, a), (block.x_block, x)):
            mods = F.linear(F.silu(c), *stream.adaLN_modulation[1].parameters())[:, None].chunk(6, 2)
            h = F.layer_norm(tokens, (32,), eps=1e-6) * (1 + mods[1]) + mods[0]
            parts.append((stream, tokens, mods, stream.attn.qkv(h).view(2, -1, 3, 2, 16).permute(2, 0, 3, 1, 4)))
        q, k, v = torch.cat([parts[0][3], parts[1][3]], dim=3)
        out = ((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).reshape(2, 21, 32).split((5, 16), 1)
        for (stream, tokens, mods, _), attended, found in zip(parts, out, (found_a, found_x)):
            y = tokens + mods[2] * stream.attn.proj(attended)
            y = y + mods[5] * stream.mlp(F.layer_norm(y, (32,), eps=1e-6) * (1 + mods[4]) + mods[3])
            assert distance(found, y) < 1e-5
    assert torch.equal(q_x, parts[1][3][0]) and torch.equal(k_x, parts[1][3][1])


def test_image_attention_is_aligned_over_image_keys_alone():
    """Value and gradient are those of the form with N x N maps of image queries by image keys."""
    model = tiny().double()
    x, t, context = (tensor.double() for tensor in inputs())
    q_t, k_t = torch.randn(2, 2, 3, 16, 20, dtype=torch.float64)
    _, _, taps = model(x, t, context, tap_layers=(1,))
    (q, k), = taps

    wanted = (q_t[:, :2] @ k_t[:, :2].mT / 20 ** 0.5).softmax(-1)           # the first heads are paired
    naive = -(wanted * (q @ k.mT / 16 ** 0.5).log_softmax(-1)).sum(-1).mean()
    assert abs(haste.attention_alignment(q, k, q_t, k_t).item() - naive.item()) < 1e-6
    weight = model.joint_blocks[0].x_block.attn.qkv.weight
    expected, = torch.autograd.grad(naive, weight, retain_graph=True)
    found, = torch.autograd.grad(haste.attention_alignment_grad(q, k, q_t, k_t), weight)
    assert distance(found, expected) < 1e-6


def test_text_matters_in_every_place_and_padding_is_seen():
    model = tiny()
    x, t, context = inputs()
    v = model(x, t, context)
    for place in range(context.shape[1]):
        other = context.clone()
        other[:, place] += 1
        assert (model(x, t, other) - v).abs().max() > 1e-4
    assert (model(x, t, torch.cat([context, context[:, -1:]], 1)) - v).abs().max() > 1e-4   # no mask


def test_bfloat16_is_close_and_both_streams_add_up_in_float32():
    model, seen = tiny(), []
    for block in model.joint_blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append([tensor.dtype for tensor in args]))
    with torch.no_grad():
        expected = model(*inputs())
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            found = model(*inputs())
    assert found.dtype == torch.float32 and 1e-5 < distance(found, expected) < 0.02
    assert seen == [[torch.float32] * 3] * 3
    half = tiny().bfloat16()                                                # without autocast, all of it
    assert half(*(tensor.bfloat16() for tensor in inputs())).dtype == torch.bfloat16


def test_blocks_hand_out_taps_only_if_asked():
    model, handed = tiny(), []
    for block in model.joint_blocks:
        block.register_forward_hook(lambda module, args, found: handed.append(found[2] is not None))
    model(*inputs(), tap_layers=(1,))
    model(*inputs())
    assert handed == [False, True, False] + [False] * 3


@pytest.mark.slow
def test_blocks_compile_to_two_graphs():
    """The last block differs from the others; nothing recompiles when taps go."""
    torch._dynamo.reset()
    model, graphs = tiny(depth=4), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    expected = tiny(depth=4)(*inputs())
    assert distance(model(*inputs(), tap_layers=(1, 2))[0], expected) < 1e-6
    first = len(graphs)
    assert distance(model(*inputs()), expected) < 1e-6
    torch._dynamo.reset()
    assert first <= 3 and len(graphs) == first                              # with a tap, without, and the last


# ---- training

def test_every_parameter_has_a_gradient():
    """DDP waits for all of them; the last block's text makes keys and values only."""
    for qk_norm in (False, True):
        model = tiny(z_dim=6, qk_norm=qk_norm)
        v, z, taps = model(*inputs(), tap_layers=(0, 1))
        (v.sum() + z.sum()).backward()
        assert all(p.grad is not None for p in model.parameters())
        last = model.joint_blocks[-1].context_block
        assert {name.split(".")[0] for name, _ in last.named_parameters()} == {"attn", "adaLN_modulation"}


def test_both_initialisations():
    x, t, context = inputs()
    sizes = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=3, num_heads=2, context_dim=12)
    plain = mmdit.MMDiT(**sizes)
    assert plain(x, t, context).abs().max() > 0                             # the official code zeroes nothing
    gate = plain.joint_blocks[0].x_block.adaLN_modulation[1]
    assert 0.5 < gate.weight.abs().max() * 32 ** 0.5 <= 1 and gate.bias.abs().max() > 0     # PyTorch's own

    zero = mmdit.MMDiT(**sizes, zero_init=True)
    assert (zero(x, t, context) == 0).all()
    a, h, c = torch.randn(2, 5, 32), torch.randn(2, 16, 32), torch.randn(2, 32)
    for block in zero.joint_blocks:
        after_a, after_h, _ = block(a, h, c)
        assert torch.equal(after_a, a) and torch.equal(after_h, h)
    assert zero.x_embedder.proj.weight.abs().max() > 0


def test_loss_and_samplers_of_sit_serve_captions():
    model = tiny()
    x, t, context = inputs(3)
    loss = sit.flow_loss(model, x, context, t, eps=torch.zeros_like(x))
    x_t, v = sit.interpolant(x, torch.zeros_like(x), t)
    assert torch.equal(loss, (model(x_t, t, context) - v).square().mean())

    null = torch.randn(5, 12)
    for sampler in (sit.sample_ode, sit.sample_sde):
        torch.manual_seed(0)
        guided = sampler(model, x, context, num_steps=3, cfg_scale=2.0, null_label=null)
        torch.manual_seed(0)
        by_hand = sampler(lambda x, t, y: 2 * model(x, t, y) - model(x, t, null.expand_as(y)), x, context, num_steps=3)
        assert distance(guided, by_hand) < 1e-5
    with pytest.raises(ValueError, match="guidance needs the null label"):
        sit.sample_ode(model, x, context, num_steps=3, cfg_scale=2.0)


def test_condition_of_labels_and_captions():
    dropped = torch.tensor([False, True, False])
    labels = models.Condition(torch.tensor(10))
    assert labels(torch.tensor([1, 2, 3]), dropped).tolist() == [1, 10, 3] and labels.null == 10
    codes = torch.nn.Embedding(7, 4)
    words = models.Condition(torch.tensor([0, 0]), codes)
    ids = torch.tensor([[1, 2], [3, 4], [5, 6]])
    found = words(ids, dropped)
    assert torch.equal(found, codes(torch.tensor([[1, 2], [0, 0], [5, 6]]))) and not found.requires_grad
    assert torch.equal(words.null, codes.weight[[0, 0]])
    packed = models.Condition(torch.ones(2, 4).half())
    features = torch.randn(3, 2, 4).half()
    assert packed(features).dtype == torch.float32 and torch.equal(packed(features, dropped)[1], torch.ones(2, 4))


# ---- checkpoints

def test_official_checkpoint_loads(tmp_path):
    g, model, x, context = golden_mmdit()
    file = tmp_path / "0150000.pt"
    args = argparse.Namespace(path_type="linear", model="MMDiT", encoder_depth=2)
    torch.save({"model": {}, "ema": model.state_dict(), "opt": {}, "args": args, "steps": 150_000}, file)
    loaded = models.load(file)
    assert isinstance(loaded, mmdit.MMDiT) and not loaded.training
    assert (loaded.path, loaded.text, loaded.packed_from, loaded.encoder_depth) == ("linear", None, None, 2)
    assert (loaded.input_size, loaded.context_dim) == (32, 768)
    with torch.no_grad():
        assert distance(loaded(x, g["t"], context), g["velocity"]) < 1e-5


def test_heads_come_from_argument_configuration_or_depth(tmp_path):
    file, model = tmp_path / "x.pt", tiny()
    torch.save(model.state_dict(), file)
    heads = [m.joint_blocks[0].x_block.attn.num_heads for m in (mmdit.load_mmdit(file, 4), mmdit.load_mmdit(file, 2))]
    assert heads == [4, 2]
    torch.save({"ema": model.state_dict(), "arch": dict(num_heads=2, input_size=8)}, file)
    loaded = mmdit.load_mmdit(file)
    assert loaded.joint_blocks[0].x_block.attn.num_heads == 2 and loaded.input_size == 8
    with pytest.raises(ValueError, match=r"has 2 attention heads, not 4 \(--num-heads\)"):
        mmdit.load_mmdit(file, 4)
    deep = tiny(depth=4, num_heads=4)
    torch.save(deep.state_dict(), file)
    assert mmdit.load_mmdit(file).joint_blocks[0].x_block.attn.num_heads == 4
    normed = tiny(qk_norm=True)
    torch.save(normed.state_dict(), file)
    x, t, context = inputs()
    assert torch.equal(mmdit.load_mmdit(file)(x, t, context), normed(x, t, context))


def test_files_that_hold_no_mmdit(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pt does not exist"):
        mmdit.load_mmdit(tmp_path / "nothing.pt")
    file = tmp_path / "x.pt"
    file.write_bytes(b"no")
    with pytest.raises(ValueError, match="x.pt is not a readable checkpoint"):
        mmdit.load_mmdit(file)
    torch.save({"a": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="holds no MM-DiT"):
        mmdit.load_mmdit(file)
    sd = tiny().state_dict()
    torch.save({k: w for k, w in sd.items() if not k.startswith("t_embedder")}, file)
    with pytest.raises(ValueError, match="x.pt: .*Missing key") as error:
        mmdit.load_mmdit(file, 2)
    assert "\n" not in str(error.value)
    del sd["pos_embed"]
    torch.save(sd, file)
    with pytest.raises(ValueError, match="has no tensor 'pos_embed'"):
        mmdit.load_mmdit(file, 2)
    np.savez(tmp_path / "x.npz", a=np.ones(1))
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        mmdit.load_mmdit(tmp_path / "x.npz")
