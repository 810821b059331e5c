"""xAR is the official network; with every entity, cached sampling equals the full forward and nothing looks ahead."""
import argparse
import math

import pytest
import torch
from conftest import Golden, distance
from fill import fill_state_dict

import align
import evaluate
import run
import xar

ENTITIES = ("patch", "cell:2", "cell:4", "subsample:2", "scale", "image")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def official():
    """The golden file, its model, and its filled weights under all official names, tables included."""
    g = Golden("xar")
    c = g.config
    model = xar.XAR(16, 16, c["dim"], c["encoder_depth"], c["decoder_depth"], c["num_heads"], entity="cell:8",
                    quantize_t=True).eval()
    sd = fill_state_dict(model.state_dict(), c["seed"])
    model.load_state_dict(sd)
    tables = {k: torch.zeros(s) for k, s in c["keys"].items() if ".rope." in k or k == "mask"}
    return g, model, {**sd, **tables}


def small(entity, grid=8, channels=1, classes=10, **kwargs):
    """A network whose every part matters: all weights filled."""
    model = xar.XAR(grid, channels, 32, 2, 1, 2, classes, entity, **kwargs)
    model.load_state_dict(fill_state_dict(model.state_dict()))
    return model.eval()


def recorded(seed=0):
    """randn-like function and the list of what it has returned."""
    g, drawn = torch.Generator().manual_seed(seed), []

    def randn(like):
        drawn.append(torch.randn(like.shape, generator=g, dtype=like.dtype))
        return drawn[-1]
    return randn, drawn


# ---- the official network

def test_velocity_loss_and_sample_are_the_official_ones():
    g, model, _ = official()
    c, t = g.config, g["t"].T
    B, M, n = c["batch"], c["cells"], c["tokens_per_cell"]
    latent, eps = g.draw("latent", B, 16, 16, 16), g.draw("eps", B, M, n, 16).flatten(1, 2)
    t_ = t.repeat_interleave(n, dim=1)[..., None]
    with torch.no_grad():
        v = model((1 - t_) * model.to_tokens(latent) + t_ * eps, t, g["y"])
        assert distance(v, g["velocity"]) < 1e-5
        assert abs(model.loss(latent, g["y"], t, eps).item() / g["loss"].item() - 1) < 1e-5
    first, noise = g.draw("init", M, B, n, 16), g.draw("noise", M, c["num_steps"] - 1, B, n, 16)
    draws = iter([z for i in range(M) for z in (first[i], *noise[i])])
    out = model.sample(torch.arange(B) + 3, c["num_steps"], c["cfg"], lambda like: next(draws).to(like))
    assert distance(out, g["sample"]) < 1e-5 and not list(draws)


@pytest.mark.parametrize("name,millions", [("xAR-B", 172.6), ("xAR-L", 608.4), ("xAR-H", 1186.0)])
def test_every_size_has_the_published_number_of_parameters(name, millions):
    with torch.device("meta"):
        model = xar.XAR(**xar.XAR_CONFIGS[name])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_every_checkpoint_layout_loads(tmp_path):
    g, model, sd = official()
    assert {k: list(w.shape) for k, w in sd.items()} == g.config["keys"]
    tokens, t = torch.randn(2, 256, 16), torch.rand(2, 4)
    own = small("subsample:2", classes=3)
    ours = {"arch": dict(grid=8, num_heads=2, entity="subsample:2"), "model": {}, "ema": own.state_dict()}
    for content, expected in (({"model": {}, "model_ema": sd, "args": argparse.Namespace(cfg=2.0), "epoch": 1}, model),
                              (sd, model), (ours, own)):
        torch.save(content, tmp_path / "x.pt")
        loaded = xar.load_xar(tmp_path / "x.pt")
        assert not loaded.training and loaded.entity == expected.entity
        x, times = (tokens, t) if expected is model else (torch.randn(2, 64, 1), t)
        with torch.no_grad():
            assert torch.equal(loaded(x, times, torch.arange(2)), expected(x, times, torch.arange(2)))


def test_unfit_checkpoints_say_why(tmp_path):
    path, sd = tmp_path / "x.pt", official()[2]
    bare = {k: w for k, w in sd.items() if ".rope." not in k}
    cases = [(bare, "its width 48 is not a published size: pass num_heads"),
             ({**sd, "extra": torch.zeros(1)}, 'does not fit the model: .*Unexpected key.*"extra"'),
             ({k: w for k, w in sd.items() if k != "pred.bias"}, 'does not fit the model: .*Missing key.*"pred.bias"'),
             ({**sd, "pred.bias": torch.zeros(3)}, r"size mismatch for pred.bias: .*\[3\].*\[16\]"),
             ({**sd, "encoder_pos_embed_learned": torch.zeros(1, 144, 48)}, "cell:8 does not divide the grid: 12 must"),
             ({**sd, "encoder_pos_embed_learned": torch.zeros(1, 64, 48)}, "size mismatch for decoder_pos_embed_learned"),
             ({k: w for k, w in sd.items() if k != "class_emb.weight"}, "there is no tensor class_emb.weight"),
             ({"weights": 1}, "holds no xAR"), ({"ema": 1}, "holds no xAR"), ([1], "holds no xAR")]
    for content, message in cases:
        torch.save(content, path)
        with pytest.raises(ValueError, match=message) as e:
            xar.load_xar(path)
        assert str(path) in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 500
    for content in (b"hello", b"", path.read_bytes()[:-50]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read: it is not a checkpoint, or was cut short"):
            xar.load_xar(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        xar.load_xar(tmp_path / "none.pt")


# ---- entities

def test_entities_are_the_stated_ones():
    grids = lambda name, G: [(g, i.tolist()) for g, i in xar.entities(name, G)]
    assert grids("cell:2", 4) == [(4, [0, 1, 4, 5]), (4, [2, 3, 6, 7]), (4, [8, 9, 12, 13]), (4, [10, 11, 14, 15])]
    assert grids("subsample:2", 4) == [(4, [0, 2, 8, 10]), (4, [1, 3, 9, 11]), (4, [4, 6, 12, 14]), (4, [5, 7, 13, 15])]
    assert [g for g, _ in grids("scale", 16)] == [1, 2, 4, 8, 16] and [g for g, _ in grids("scale", 12)] == [3, 6, 12]
    assert [g for g, _ in grids("scale", 7)] == [7]
    assert grids("patch", 4) == grids("cell:1", 4) == [(4, [i]) for i in range(16)]
    assert grids("image", 4) == grids("cell:4", 4) == grids("subsample:1", 4) == [(4, list(range(16)))]
    for name in ("patch", "cell:2", "subsample:4", "image"):
        assert sorted(sum((i for _, i in grids(name, 8)), [])) == list(range(64))           # a partition
    for bad, message in (("cell:3", "entity cell:3 does not divide the grid: 8 must be a multiple"),
                         ("cell:0", "does not divide"), ("row", "entity row is none of patch, cell:k, subsample:s"),
                         ("cell", "is none of"), ("patch:2", "is none of")):
        with pytest.raises(ValueError, match=message):
            xar.XAR(8, 1, 32, 1, 1, 2, 10, bad)


@pytest.mark.parametrize("entity", ENTITIES)
def test_tokens_and_image_are_the_same_thing(entity):
    model, latent = small(entity, channels=3), torch.randn(2, 3, 8, 8)
    tokens = model.to_tokens(latent)
    assert torch.equal(model.to_latent(tokens), latent) and tokens.shape == (2, sum(model.sizes), 3)
    so_far = model.to_latent(tokens[:, :model.sizes[0]])                    # of a prefix: what is known, and zero
    if entity == "scale":
        assert torch.allclose(so_far, latent.mean((2, 3), keepdim=True).expand_as(latent), atol=1e-6)
        assert torch.allclose(tokens[:, 1:5], torch.nn.functional.avg_pool2d(latent, 4).flatten(2).mT)
    else:
        known = (so_far != 0)[:, 0]
        assert known.sum() == 2 * model.sizes[0] and torch.equal(so_far[:, :, known[0]], latent[:, :, known[0]])


def test_growth_shows_the_sample_entity_by_entity():
    for entity, columns in (("cell:4", 4), ("scale", 4), ("patch", 16), ("image", 1)):
        model = small(entity, channels=2)
        tokens = model.sample_tokens(torch.arange(3), 2, randn=run.indexed_randn(0, range(3)))
        whole = model.sample(torch.arange(3), 2, randn=run.indexed_randn(0, range(3)))
        frames = evaluate.growth(model, tokens)
        assert frames.shape == (3, columns, 2, 8, 8)
        assert torch.equal(frames[:, -1], whole)                            # the last frame is the image
        assert torch.equal(evaluate.growth(model, tokens, most=1), whole[:, None])    # and it is always there
        assert torch.equal(evaluate.growth(model, tokens, most=2)[:, 0], frames[:, 0])
        if entity == "cell:4":
            assert torch.equal(frames[:, 0, :, :4, :4], whole[:, :, :4, :4]) and not frames[:, 0, :, 4:].any()


def test_a_level_of_a_pyramid_sits_at_the_centres_of_what_it_averages():
    model = xar.XAR(8, 1, 32, 1, 1, 2, 10, "scale")
    places = torch.tensor([[3.5, 3.5], [1.5, 1.5], [1.5, 5.5], [5.5, 1.5], [5.5, 5.5]])     # levels of 1 and 2 x 2 on 8
    assert torch.allclose(model.rope_cos[:5, [0, 4]], places.cos())         # the first frequency of row and column is 1
    assert torch.allclose(model.rope_sin[:5, [0, 4]], places.sin())


# ---- attention

@pytest.mark.parametrize("entity", ENTITIES)
def test_no_velocity_depends_on_later_entities(entity):
    model = small(entity)
    L, M = sum(model.sizes), len(model.sizes)
    tokens, t, y = torch.randn(2, L, 1), torch.rand(2, M), torch.arange(2)
    with torch.no_grad():
        v = model(tokens, t, y)
        for n in range(M):
            begin, end = sum(model.sizes[:n]), sum(model.sizes[:n + 1])
            other, other_t = tokens.clone(), t.clone()
            other[:, begin:end] += 1
            other_t[:, n] = 1 - t[:, n]
            for changed in (model(other, t, y), model(tokens, other_t, y)):
                assert torch.equal(changed[:, :begin], v[:, :begin])        # exactly
                assert (changed[:, begin:] != v[:, begin:]).all()           # and everything from n on does change
            assert distance(model(tokens[:, :end], t[:, :n + 1], y), v[:, :end]) < 1e-5     # a prefix is enough


@pytest.mark.parametrize("entity", ENTITIES)
def test_clean_context_is_what_the_cache_holds(entity):
    """Teacher forcing in one forward = each entity alone, with the true earlier ones as finished."""
    model = small(entity)
    (tokens, clean), t, y = torch.randn(2, 2, sum(model.sizes), 1), torch.rand(2, len(model.sizes)), torch.arange(2)
    with torch.no_grad():
        v = model(tokens, t, y, clean)
        for n in range(len(model.sizes)):
            begin, end = sum(model.sizes[:n]), sum(model.sizes[:n + 1])
            mixed, times = torch.cat([clean[:, :begin], tokens[:, begin:end]], 1), t[:, :n + 1].clone()
            times[:, :n] = 0
            assert distance(v[:, begin:end], model(mixed, times, y)[:, begin:]) < 1e-5


@pytest.mark.parametrize("entity", ENTITIES)
@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
def test_cached_sampling_is_the_full_forward(entity, cfg_scale):
    model, y, S = small(entity, grid=4 if entity == "patch" else 8, channels=2), torch.tensor([3, 0]), 3
    randn, drawn = recorded()
    tokens = model.sample_tokens(y, S, cfg_scale, randn)
    draws, M, null = iter(drawn), len(model.sizes), torch.full_like(y, 10)
    whole, t = torch.randn(tokens.shape), torch.ones(2, M)                  # what comes later is noise, and unseen
    for n, size in enumerate(model.sizes):
        begin, w = sum(model.sizes[:n]), cfg_scale if M == 1 else 1 + (cfg_scale - 1) * n / (M - 1)

        def velocity(x, time):
            whole[:, begin:begin + size], t[:, n] = x.float(), time
            with torch.no_grad():
                c, u = (model(whole, t, labels)[:, begin:begin + size].double() for labels in (y, null))
            return u + w * (c - u)
        whole[:, begin:begin + size] = xar.reverse_sde(velocity, next(draws), S, lambda like: next(draws)).float()
        t[:, n] = 0
        assert distance(tokens[:, begin:begin + size], whole[:, begin:begin + size]) < 1e-5
    assert not list(draws) and len(drawn) == M * S
    assert torch.equal(model.to_latent(tokens), model.sample(y, S, cfg_scale, recorded()[0]))


@pytest.mark.parametrize("entity", ENTITIES)
def test_dense_calls_are_the_mask(entity, monkeypatch):
    """An attention call for each entity, with the keys up to its end, has the values and gradients of one with a mask."""
    model, y = small(entity), torch.arange(3)
    x, eps, t = torch.randn(3, 1, 8, 8), torch.randn(3, sum(model.sizes), 1), torch.rand(3, len(model.sizes))
    masks, real = [], xar.attention
    monkeypatch.setattr(xar, "attention", lambda *args: masks.append(args[4]) or real(*args))
    grads = []
    for few in (0, 10 ** 9):
        monkeypatch.setattr(xar, "MOST_CALLS", few)
        monkeypatch.setattr(xar, "TOKENS_A_CALL", 0)
        grads.append(torch.autograd.grad(model.loss(x, y, t, eps), list(model.parameters())))
    with_mask, dense = masks[:len(masks) // 2], masks[len(masks) // 2:]
    assert all(mask is None for mask in dense) and (entity == "image" or all(mask is not None for mask in with_mask))
    assert all(distance(a, b) < 1e-4 for a, b in zip(*grads) if b.norm() > 1e-6)


@pytest.mark.parametrize("entity, context", [("cell:4", "random"), ("scale", "clean"), ("image", "random")])
def test_all_blocks_are_one_graph(entity, context):
    """Compiled block by block: nothing breaks the graph, and one serves encoder and decoder, with the eager gradients."""
    model, graphs = small(entity), []
    x, y, t = torch.randn(2, 1, 8, 8), torch.arange(2), torch.rand(2, len(model.sizes))
    eps = torch.randn(2, sum(model.sizes), 1)

    def gradient():
        return torch.autograd.grad(model.loss(x, y, t, eps, context=context), model.encoder_blocks[0].attn.qkv.weight)[0]

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    expected = gradient()
    for block in [*model.encoder_blocks, *model.decoder_blocks]:
        block.compile(backend=backend, fullgraph=True)
    try:
        assert distance(gradient(), expected) < 1e-6 and len(graphs) == 1
    finally:
        torch._dynamo.reset()


def test_presets_need_no_mask():
    """Their few long entities take the fast way; single tokens do not."""
    for entity, grid, dense in (("cell:8", 16, True), ("cell:8", 32, True), ("scale", 16, True), ("image", 8, True),
                                ("patch", 16, False), ("cell:2", 8, False)):
        model, masks = small(entity, grid=grid), []
        model.encoder_blocks[0].attn.register_forward_pre_hook(lambda module, args: masks.append(args[3]))
        with torch.no_grad():
            model(torch.zeros(1, sum(model.sizes), 1), torch.zeros(1, len(model.sizes)))
        assert (masks[0] is None) == dense, entity


def test_small_scales_exist_in_bfloat16():
    block = xar.Block(32, 2, 0.0, 0.0)
    with torch.no_grad():
        block.ada_lin[1].weight.zero_()
        block.ada_lin[1].bias.zero_().view(6, 32)[2] = 1e-3                 # scale1
    inner, x = [], torch.randn(2, 1, 5, 32)
    block.attn.register_forward_pre_hook(lambda module, args: inner.append(args[0]))
    rope = torch.ones(5, 8), torch.zeros(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        block(x, torch.randn(2, 1, 32), [5], rope, None, None)
    assert distance((inner[0] - block.norm(x)).detach(), 1e-3 * block.norm(x)) < 0.01


def test_cache_is_one_piece_of_memory(monkeypatch):
    """Keys and values are written into it, never joined: as many bytes as all tokens need, in autocast's dtype."""
    model, made = small("cell:4"), []
    real = model._kv_cache
    monkeypatch.setattr(model, "_kv_cache", lambda B: made.append(real(B)) or made[-1])
    with torch.autocast("cpu", torch.bfloat16):
        v = model.sample(torch.arange(3), 2, 2.0)
    blocks, H, L = len(model.encoder_blocks) + len(model.decoder_blocks), model.encoder_blocks[0].attn.num_heads, 64
    assert [m.shape for m in made] == [(blocks, 2, 6, H, L, model.pred.in_features // H)]
    assert made[0].dtype == torch.bfloat16 and v.dtype == torch.float32


# ---- taps, for an alignment

ALIGNED = dict(z_dim=6, projector_dim=8, feature_depth=2)


@pytest.mark.parametrize("entity", ENTITIES)
@pytest.mark.parametrize("clean", [False, True])
def test_taps_change_nothing_and_see_nothing_later(entity, clean):
    model = small(entity, **ALIGNED)
    L, M = sum(model.sizes), len(model.sizes)
    tokens, t, y = torch.randn(2, L, 1), torch.rand(2, M), torch.arange(2)
    context = torch.randn(2, L, 1) if clean else None
    with torch.no_grad():
        expected = model(tokens, t, y, context)
        v, z, taps = model(tokens, t, y, context, tap_layers=[0, 2])
        assert torch.equal(v, expected) and z.shape == (2, L, 6)
        assert [x.shape for x in sum(taps, ())] == [(2, 2, L * (1 + clean), 16)] * 4
        assert model(tokens, t, y, context, tap_layers=())[2] == []
        assert torch.equal(model(tokens, t, y, context, tap_layers=())[1], z)
        for n in range(M):
            begin = sum(model.sizes[:n])
            other, other_t = tokens.clone(), t.clone()
            other[:, begin:] += 1
            other_t[:, n:] = 1 - t[:, n:]
            _, z_2, taps_2 = model(other, other_t, y, context, tap_layers=[0, 2])
            assert torch.equal(z_2[:, :begin], z[:, :begin]) and (z_2[:, begin:] != z[:, begin:]).any(-1).all()
            for a, b in zip(sum(taps_2, ()), sum(taps, ())):
                a, b = a[:, :, -L:], b[:, :, -L:]                           # with a clean context, the noisy half
                assert torch.equal(a[:, :, :begin], b[:, :, :begin]) and not torch.equal(a[:, :, begin:], b[:, :, begin:])
    plain = small(entity)
    assert plain(tokens, t, y, context, tap_layers=[1])[1] is None and plain.projector is None


@pytest.mark.parametrize("entity", ENTITIES)
def test_taps_are_what_attention_gets_and_z_is_the_block_projected(entity, monkeypatch):
    model, seen, outs, real = small(entity, **ALIGNED), [], [], xar.attention
    monkeypatch.setattr(xar, "attention", lambda q, k, *rest: (seen.append((q, k)), real(q, k, *rest))[1])
    model.encoder_blocks[1].register_forward_hook(lambda m, args, out: outs.append(out[0].flatten(1, 2)))
    tokens, t = torch.randn(2, sum(model.sizes), 1), torch.rand(2, len(model.sizes))
    with torch.no_grad():
        _, z, taps = model(tokens, t, tap_layers=[2, 0])                    # in the order that was asked for
        assert torch.equal(z, model.projector(outs[0]))
    for found, i in zip(taps, (2, 0)):
        assert torch.equal(found[0], seen[i][0]) and torch.equal(found[1], seen[i][1])


@pytest.mark.parametrize("entity", ENTITIES)
@pytest.mark.parametrize("clean", [None, True])
def test_targets_stand_where_the_students_tokens_stand(entity, clean):
    """A teacher whose values are places: token by token, they are the places of the student's rotary embedding."""
    model = small(entity)
    i = torch.arange(64)
    places = torch.stack([i // 8, i % 8], dim=1).float()                    # of the grid, in raster order
    q = places.expand(1, 3, 64, 2)
    taps = [] if entity == "scale" else [(q, q + 1)]                        # a pyramid has no attention alignment
    tokens, taps, mask = align.in_entity_order(model, (places[None], taps), clean)
    d = model.rope_cos.shape[1] // 2                                        # the first frequency of each axis is 1
    assert torch.allclose(tokens[0].cos(), model.rope_cos[:, [0, d]], atol=1e-5)
    assert torch.allclose(tokens[0].sin(), model.rope_sin[:, [0, d]], atol=1e-5)
    copies = 2 if clean else 1
    for q, k in taps:
        assert torch.equal(q[0, 0], tokens[0].repeat(copies, 1)) and torch.equal(k, q + 1)
    if entity == "image":
        assert mask is None
    else:
        assert mask.shape == (copies * sum(model.sizes),) * 2


def test_the_mask_is_who_sees_whom():
    """Of both kinds, by definition: entity n sees itself and the earlier ones, with teacher forcing their clean copies."""
    e = torch.tensor([0, 1, 1, 2])
    assert torch.equal(xar.visible(e), torch.tensor([[e[k] <= e[q] for k in range(4)] for q in range(4)]))
    both = xar.visible(e, 2)
    for q in range(8):
        for k in range(8):
            if q < 4:
                sees = k < 4 and e[k] <= e[q]
            else:
                sees = e[k] < e[q - 4] if k < 4 else e[k - 4] == e[q - 4]
            assert both[q, k] == sees


@pytest.mark.parametrize("entity", ENTITIES)
def test_the_projector_comes_last(entity):
    """All other weights of a seed are the same with and without it."""
    nets = []
    for kwargs in ({}, ALIGNED):
        torch.manual_seed(0)
        nets.append(xar.XAR(8, 1, 32, 2, 1, 2, 10, entity, **kwargs).state_dict())
    plain, guided = nets
    assert all(torch.equal(w, guided[name]) for name, w in plain.items())
    assert list(guided)[-6:] == [n for n in guided if n not in plain] and all(n.startswith("projector.") for n in list(guided)[-6:])


# ---- loss

def test_image_is_plain_flow_matching():
    model, x, y = small("image"), torch.randn(3, 1, 8, 8), torch.arange(3)
    eps, t = torch.randn(3, 64, 1), torch.rand(3, 1)
    latent_eps = model.to_latent(eps)
    x_t = (1 - t.view(-1, 1, 1, 1)) * x + t.view(-1, 1, 1, 1) * latent_eps
    v = model.to_latent(model(model.to_tokens(x_t), t, y))
    expected = (v - (latent_eps - x)).square().mean()
    for context in xar.CONTEXTS:                                            # without context there is nothing to choose
        assert torch.allclose(model.loss(x, y, t, eps, context=context), expected)


def test_equal_entities_are_equal_networks():
    x, y = torch.randn(2, 1, 8, 8), torch.arange(2)
    for a, b in (("patch", "cell:1"), ("image", "cell:8"), ("image", "subsample:1")):
        torch.manual_seed(0)
        loss = small(a).loss(x, y)
        torch.manual_seed(0)
        assert torch.equal(loss, small(b).loss(x, y))


def test_context_orders_the_times(monkeypatch):
    model, seen = small("cell:4"), []
    monkeypatch.setattr(model, "forward", lambda tokens, t, y, clean: (seen.append((t, clean)), tokens)[1])
    x, t = torch.randn(50, 1, 8, 8), torch.rand(50, 4)
    for context in xar.CONTEXTS:
        model.loss(x, t=t, context=context)
    random, increasing, decreasing, clean = (s[0] for s in seen)
    assert torch.equal(random, t) and torch.equal(clean, t) and torch.equal(increasing, t.sort(dim=1)[0])
    assert torch.equal(decreasing, increasing.flip(1))
    assert [s[1] is not None for s in seen] == [False, False, False, True]
    assert torch.equal(seen[3][1], model.to_tokens(x))
    with pytest.raises(ValueError, match="context dirty is none of random, increasing"):
        model.loss(x, context="dirty")
    model.loss(torch.randn(20_000, 1, 8, 8))                                # logit-normal(0, 1), each entity its own
    logits = seen[-1][0].logit()
    assert (abs(logits.mean(0)) < 0.03).all() and (abs(logits.std(0) - 1) < 0.03).all()
    assert abs(torch.corrcoef(logits.T) - torch.eye(4)).max() < 0.03


def test_label_dropout_and_no_label(monkeypatch):
    model, seen = small("image", grid=4), []
    monkeypatch.setattr(model, "forward", lambda tokens, t, y, clean: (seen.append(y), tokens)[1])
    x, y = torch.randn(4000, 1, 4, 4), torch.zeros(4000, dtype=torch.long)
    for drop in (0.0, 0.3, 1.0):
        model.loss(x, y, label_drop=drop)
        assert abs((seen[-1] == 10).float().mean() - drop) < 0.03
    model.loss(x, label_drop=0.5)
    assert seen[-1] is None and not y.any()                                 # None is no label


def test_loss_and_time_are_never_bfloat16():
    model, x = small("cell:4"), torch.randn(2, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.loss(x).dtype == torch.float32
        assert not torch.equal(*model.time_embed(torch.tensor([0.5, 0.501])))
    half, seen = small("cell:4").bfloat16(), []
    one = half.loss(x.bfloat16(), noise=torch.ones(2, 64, 1), t=torch.full((2, 4), 0.5), context="clean")
    noise = torch.ones(2, 64, 1) * 1.001                                    # bfloat16 would not see the difference
    more = half.loss(x.bfloat16(), noise=noise, t=torch.full((2, 4), 0.5), context="clean")
    assert one.dtype == torch.float32 and one != more
    half.time_embed.register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    assert half.sample(torch.arange(2), 2).dtype == torch.bfloat16 and set(seen) == {torch.float32}
    embed = xar.TimeEmbedder(32, quantize=True)
    assert torch.equal(embed(torch.tensor([0.5001])), embed(torch.tensor([0.5009])))        # the official thousandths
    embed.quantize = False
    assert not torch.equal(embed(torch.tensor([0.5001])), embed(torch.tensor([0.5009])))


# ---- sampling

@pytest.mark.parametrize("grid,entity", [(4, "cell:2"), (8, "patch"), (12, "scale"), (12, "cell:4"),
                                         (16, "subsample:2"), (7, "image"),
                                         pytest.param(32, "cell:8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("channels,batch", [(1, 1), (16, 2)])
def test_odd_geometries(grid, entity, channels, batch):
    model = small(entity, grid, channels, classes=3, dropout=0.1, attn_dropout=0.1).train()
    x = torch.randn(batch, channels, grid, grid)
    for context in ("random", "clean"):
        model.loss(x, context=context).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.sample(torch.arange(batch), 2, 1.5).shape == model.sample(batch, 2).shape == x.shape


def test_evaluations_are_counted_and_guided_only_where_guidance_acts():
    model, seen = small("cell:4"), []
    model.class_emb.register_forward_hook(lambda m, args, out: seen.append(args[0].tolist()))
    y = torch.tensor([1, 2])
    model.sample(y, 3)                                                      # guidance 1: no evaluation without label
    assert seen == [[1, 2]] * (4 * 3 + 3)                                   # every entity but the last is cached
    seen.clear()
    model.sample(y, 3, cfg_scale=2.0)
    both = [1, 2, 10, 10]
    assert seen == [[1, 2]] * 3 + [both] * (1 + 3 * 3 + 2)                  # entity 0 has guidance 1
    seen.clear()
    model.sample(2, 3, cfg_scale=2.0)
    assert seen == [[10, 10]] * (4 * 3 + 3)                                 # without label there is nothing to guide
    for labels in ([11], [-1]):
        with pytest.raises(ValueError, match=r"must lie in 0 ... 9; 10 is no label"):
            model.sample(torch.tensor(labels), 2)


def test_sampling_leaves_no_trace():
    model, y = small("cell:4", dropout=0.5, attn_dropout=0.5), torch.arange(2)
    expected = model.sample(y, 2, randn=recorded()[0])
    before = {k: dict(m.__dict__) for k, m in model.named_modules()}
    model.train()
    assert torch.equal(model.sample(y, 2, randn=recorded()[0]), expected)   # dropout is off, no cache is left over
    assert model.training and torch.equal(model.sample(y, 2, randn=recorded()[0]), expected)
    assert {k: m.__dict__.keys() for k, m in model.named_modules()} == {k: d.keys() for k, d in before.items()}
    with pytest.raises(ZeroDivisionError):
        model.sample(y, 2, randn=lambda like: 1 / 0)
    assert model.training                                                   # also after an error
    for w in (math.nextafter(1, 2), 1 + 1e-15):                             # guidance that rounds to none half-way
        assert model.sample(y, 2, cfg_scale=w).isfinite().all()


def test_sampler_reaches_a_gaussian():
    """x_0 ~ N(1, 0.5^2): velocity known in closed form; mean and spread come out."""
    def velocity(x, t):
        var = (1 - t) ** 2 * 0.25 + t ** 2
        away = x - (1 - t)
        return t / var * away - (1 + (1 - t) * 0.25 / var * away)           # E[eps - x_0 | x_t]
    randn = recorded()[0]
    out = xar.reverse_sde(velocity, randn(torch.empty(20_000, 1, 1, dtype=torch.float64)), 250, randn)
    assert abs(out.mean() - 1) < 0.02 and abs(out.std() - 0.5) < 0.02
