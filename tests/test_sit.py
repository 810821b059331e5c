"""SiT is the official network, its samplers are the official samplers, and both are right where the answer is known."""
import argparse
import math

import pytest
import torch
from conftest import Golden, distance
from fill import fill_state_dict

import run
import sit


def golden_sit(name, **kwargs):
    g = Golden(name)
    c = g.config
    model = sit.SiT(c["input_size"], c["patch_size"], 4, c["hidden_size"], c["depth"], c["num_heads"],
                    c["num_classes"], **kwargs)
    return g, g.fill(model, skip=("pos_embed",)), g.draw("x", c["batch"], 4, c["input_size"], c["input_size"])


def haste_golden():
    c = Golden("sit_haste").config
    return golden_sit("sit_haste", z_dim=c["z_dims"][0], projector_dim=c["projector_dim"],
                      encoder_depth=c["encoder_depth"])


# ---- the network

def test_velocity_projection_and_attention_are_the_official_ones():
    g, model, x = haste_golden()
    with torch.no_grad():
        v, z, taps = model(x, g["t"], g["y"], tap_layers=range(g.config["encoder_depth"]))
        logits = torch.stack([q @ k.mT * q.shape[-1] ** -0.5 for q, k in taps])
        assert (distance(v, g["velocity"]) < 1e-5 and distance(z, g["z"]) < 1e-5
                and distance(logits, g["attn_logits"]) < 1e-5)
        assert torch.equal(model(x, g["t"], g["y"]), v)                     # taps and projector change nothing


def test_original_sit_runs_in_our_time_direction():
    g, model, x = golden_sit("sit_original", learn_sigma=True, flip_time=True)
    with torch.no_grad():
        assert distance(-model(x, 1 - g["t"], g["y"]), g["velocity"]) < 1e-5


@pytest.mark.parametrize("name,millions", [("SiT-S", 33.0), ("SiT-B", 130.5), ("SiT-L", 458.1), ("SiT-XL", 675.1)])
def test_every_size_has_the_published_number_of_parameters(name, millions):
    for patch in (1, 2, 4, 8):
        config = sit.SIT_CONFIGS[f"{name}/{patch}"]
        assert config["patch_size"] == patch
        with torch.device("meta"):
            model = sit.SiT(32, **config, in_channels=4, num_classes=1000)
        if patch == 2:
            assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("bf16", [False, True])
def test_tokens_lie_behind_one_another_in_every_block(bf16):
    """A residual stream of another layout costs a copy in every norm, in both directions."""
    model, seen = sit.SiT(8, 2, 4, 32, 3, 2, 5), []
    for m in [*model.blocks, model.final_layer]:
        m.register_forward_pre_hook(lambda module, args: seen.append(args[0].is_contiguous()))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 1]))
    assert seen == [True] * 4


def test_small_scales_exist_in_bfloat16():
    """In bfloat16, 1 + 0.001 would be 1: the scale is added in float32, alone and within a model."""
    x, shift = torch.randn(2, 5, 8), torch.zeros(2, 8).bfloat16()
    scale = torch.full((2, 8), 1e-3).bfloat16()
    assert distance(sit.modulate(x, shift, scale) - x, x * scale.float()[:, None]) < 1e-3
    assert sit.modulate(x.bfloat16(), shift, scale).dtype == torch.bfloat16
    assert sit.modulate(x.double(), shift.double(), scale.double()).dtype == torch.float64
    block = sit.Block(32, 2, False)
    with torch.no_grad():
        block.adaLN_modulation[1].weight.zero_()
        block.adaLN_modulation[1].bias.zero_().view(6, 32)[1] = 1e-3        # scale1
    inner = []
    block.attn.register_forward_pre_hook(lambda module, args: inner.append(args[0]))
    x = torch.randn(2, 5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        block(x, torch.randn(2, 32))
    assert distance((inner[0] - block.norm1(x)).detach(), 1e-3 * block.norm1(x)) < 0.01


def test_velocity_leaves_bfloat16_before_the_last_layer():
    """A sampler adds up 250 velocities: under autocast the last layer stays in the weights' float32."""
    model = sit.SiT(8, 2, 4, 32, 2, 2, 5)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    inner = []
    model.final_layer.register_forward_pre_hook(lambda module, args: inner.extend(args))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        v = model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 1]))
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(v, model.unpatchify(model.final_layer(*inner[:2])))
    assert v.dtype == torch.float32 and not torch.equal(v, v.bfloat16().float())


@pytest.mark.parametrize("size,patch,channels,classes,batch",
                         [(8, 2, 1, 3, 1), (12, 4, 3, 10, 2), (9, 1, 4, 1, 3), (16, 8, 16, 3, 1)])
def test_odd_geometries(size, patch, channels, classes, batch):
    model = sit.SiT(size, patch, channels, 32, 3, 2, classes, qk_norm=True, z_dim=5, projector_dim=8, encoder_depth=2)
    x, y, N = torch.randn(batch, channels, size, size), torch.full((batch,), classes), (size // patch) ** 2
    v, z, taps = model(x, torch.rand(batch), y, tap_layers=[2, 0])          # in the order asked for
    assert v.shape == x.shape and z.shape == (batch, N, 5) and [q.shape for q, _ in taps] == [(batch, 2, N, 16)] * 2
    again = model(x, torch.rand(batch), y, tap_layers=(0,))[2]
    assert again[0][0].shape == taps[1][0].shape
    assert model(x, torch.rand(batch), y, tap_layers=())[2] == []
    sit.flow_loss(model, x, y, label_drop=0.5).backward()
    assert sit.sample_ode(model, x, y * 0, num_steps=2, cfg_scale=2.0).shape == x.shape


def test_taps_come_in_the_order_of_the_list_and_nothing_else_leaves():
    model = sit.SiT(8, 2, 1, 32, 3, 2, 10).eval()
    torch.nn.init.normal_(model.blocks[0].adaLN_modulation[1].weight, std=0.1)
    x, t, y = torch.randn(2, 1, 8, 8), torch.rand(2), torch.arange(2)
    returned = []
    hooks = [b.register_forward_hook(lambda m, a, out, i=i: returned.append((i, out[1])))
             for i, b in enumerate(model.blocks)]
    v, z, (two, zero) = model(x, t, y, tap_layers=(2, 0))
    assert z is None and [i for i, qk in returned if qk is not None] == [0, 2]
    assert two[0] is returned[2][1][0] and zero[0] is returned[0][1][0]
    returned.clear()
    model(x, t, y)
    assert all(qk is None for _, qk in returned)
    [h.remove() for h in hooks]


def test_new_network_is_zero_and_learns_from_its_first_step():
    model = sit.SiT(8, 2, 1, 32, 2, 2, 10)
    assert not model(torch.randn(2, 1, 8, 8), torch.rand(2), torch.arange(2)).any()     # adaLN-Zero
    sit.flow_loss(model, torch.randn(2, 1, 8, 8), torch.arange(2)).backward()
    assert model.final_layer.linear.weight.grad.any()


def test_time_is_never_bfloat16():
    model = sit.SiT(8, 2, 1, 32, 2, 2, 10).bfloat16()
    seen = []

    def velocity(x, t, y):
        seen.append((x.dtype, t.dtype))
        return model(x, t, y)
    x = sit.sample_ode(velocity, torch.randn(1, 1, 8, 8).bfloat16(), torch.zeros(1, dtype=torch.long), num_steps=2)
    assert x.dtype == torch.bfloat16 and set(seen) == {(torch.bfloat16, torch.float32)}
    torch.manual_seed(0)                                                    # some weights round the difference away
    embed = sit.TimestepEmbedder(32).eval()
    with torch.autocast("cpu", torch.bfloat16):                             # 0.5 and 0.501 are one number in bfloat16
        assert not torch.equal(*embed(torch.tensor([0.5, 0.501])))


# ---- the samplers

def golden_velocity(x, t, y):
    label = torch.where(y == 1000, 0.0, 0.1 * (y + 1)).to(x.dtype).view(-1, 1, 1, 1)
    return 0.7 * x - 0.2 * t.view(-1, 1, 1, 1) + label + 0.1 * torch.sin(3 * x)


@pytest.mark.parametrize("cfg", [1.0, 1.8])
def test_samplers_are_the_official_ones(cfg):
    g = Golden("samplers")
    c = g.config
    assert cfg in (1.0, c["cfg_scale"])
    x, y, noise = (g.draw("latents", c["batch"], 4, 4, 4), torch.arange(c["batch"]),
                   g.draw("noise", c["num_steps"], c["batch"], 4, 4, 4))
    kwargs = dict(num_steps=c["num_steps"], cfg_scale=cfg, cfg_interval=(c["guidance_low"], c["guidance_high"]),
                  null_label=1000)
    name = f"{cfg:.1f}".replace(".", "_")
    assert distance(sit.sample_ode(golden_velocity, x, y, **kwargs), g[f"ode_{name}"]) < 1e-6
    assert distance(sit.sample_ode(golden_velocity, x, y, heun=True, **kwargs), g[f"heun_{name}"]) < 1e-6
    for path, key in (("linear", "sde"), ("cosine", "sde_cosine")):
        draws = iter(noise)
        out = sit.sample_sde(golden_velocity, x, y, path=path, randn=lambda like: next(draws).to(like), **kwargs)
        assert distance(out, g[f"{key}_{name}"]) < 1e-6
        assert len(list(draws)) == 1                                        # num_steps - 1 draws


def test_evaluations_are_counted_and_guided_inside_the_interval_only():
    calls = []

    def velocity(x, t, y):
        calls.append((t[0].item(), len(x)))
        return torch.zeros_like(x)
    velocity.num_classes = 10
    x, y = torch.randn(2, 1, 4, 4), torch.zeros(2, dtype=torch.long)
    sit.sample_ode(velocity, x, y, num_steps=4, cfg_scale=2.0, cfg_interval=(0.25, 0.5))
    assert calls == [(1.0, 2), (0.75, 2), (0.5, 4), (0.25, 4)]              # both ends of the interval are guided
    for sampler, kwargs, count in ((sit.sample_ode, dict(heun=True), 7), (sit.sample_sde, {}, 4)):
        calls.clear()
        sampler(velocity, x, y, num_steps=4, **kwargs)
        assert len(calls) == count and all(n == 2 for _, n in calls)
    del velocity.num_classes
    with pytest.raises(ValueError, match="null_label"):
        sit.sample_ode(velocity, x, y, cfg_scale=2.0)


# ---- a Gaussian mixture, whose velocity is known in closed form

MEANS, WEIGHTS, SPREAD = (torch.tensor([[-1.5, 0.5], [1.0, 1.0], [0.5, -1.5]], dtype=torch.float64),
                          torch.tensor([0.5, 0.3, 0.2]).double(), 0.4)


def mixture_velocity(path="linear"):
    """v(x, t) = E[alpha' x_0 + sigma' eps | x_t = x] for data from the mixture; x [B,2,1,1]."""
    def velocity(x, t, y):
        x = x.flatten(1)[:, None].double()                                  # [B,1,2]
        alpha, sigma, d_alpha, d_sigma = sit._path(t.double().view(-1, 1, 1), path)
        var = alpha ** 2 * SPREAD ** 2 + sigma ** 2
        away = x - alpha * MEANS                                            # [B,3,2]
        share = (WEIGHTS.log() - away.square().sum(-1) / (2 * var[..., 0])).softmax(-1)[..., None]  # equal variances
        x0, eps = MEANS + alpha * SPREAD ** 2 / var * away, sigma / var * away
        return (share * (d_alpha * x0 + d_sigma * eps)).sum(1).view(-1, 2, 1, 1)
    return velocity


def mixture_sample(n, g):
    which = torch.multinomial(WEIGHTS, n, replacement=True, generator=g)
    return (MEANS[which] + SPREAD * torch.randn(n, 2, generator=g, dtype=torch.float64)).view(-1, 2, 1, 1)


@pytest.mark.parametrize("heun,order", [(False, 1), (True, 2)])
def test_ode_has_its_order(heun, order):
    x, y = (torch.randn(200, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
            torch.zeros(200, dtype=torch.long))
    run = lambda n, heun: sit.sample_ode(mixture_velocity(), x, y, num_steps=n, heun=heun)
    exact = run(3000, True)
    errors = [(run(n, heun) - exact).norm().item() for n in (50, 100, 200)]
    measured = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(abs(m - order) < 0.2 for m in measured), measured


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde", "sde cosine"])
def test_samplers_reach_the_mixture(sampler):
    g, n = torch.Generator().manual_seed(0), 20_000
    x, y = torch.randn(n, 2, 1, 1, generator=g, dtype=torch.float64), torch.zeros(n, dtype=torch.long)
    if sampler.startswith("sde"):
        path = "cosine" if "cosine" in sampler else "linear"
        out = sit.sample_sde(mixture_velocity(path), x, y, num_steps=250, path=path,
                             randn=lambda like: torch.randn(like.shape, generator=g, dtype=like.dtype))
    else:
        out = sit.sample_ode(mixture_velocity(), x, y, num_steps=250, heun=sampler == "heun")
    for direction in torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], dtype=torch.float64):
        # Kolmogorov-Smirnov against the exact distribution
        at = (out.flatten(1) @ direction).sort().values
        exact = (WEIGHTS * torch.special.ndtr((at[:, None] - MEANS @ direction) / SPREAD)).sum(1)
        ks = (exact - torch.arange(1, n + 1) / n).abs().max().item()
        assert ks < 0.02, ks                                                # 1 % level of sampling noise alone: 0.0115


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_known_velocity_minimises_the_flow_loss(path):
    g, n = torch.Generator().manual_seed(0), 200_000
    x, eps, t = (mixture_sample(n, g), torch.randn(n, 2, 1, 1, generator=g, dtype=torch.float64),
                 torch.rand(n, generator=g))
    exact, y = mixture_velocity(path), torch.zeros(n, dtype=torch.long)
    loss = lambda f: sit.flow_loss(f, x, y, t.double(), eps, path=path).item()
    best = loss(exact)
    for change in (lambda x, t: 0.3 * torch.sin(2 * x), lambda x, t: 0.2 * t.view(-1, 1, 1, 1) * x,
                   lambda x, t: torch.full_like(x, -0.25)):
        x_t = sit.interpolant(x, eps, t.double(), path)[0]
        excess = loss(lambda x, t, y: exact(x, t, y) + change(x, t)) - best
        assert abs(excess / change(x_t, t).square().mean().item() - 1) < 0.1    # the error is orthogonal to each change


def test_interpolant_and_its_derivative():
    x, eps, t = (torch.randn(3, 2, 2, 2).double(), torch.randn(3, 2, 2, 2).double(),
                 torch.tensor([0.0, 0.4, 1.0]).double())
    for path in ("linear", "cosine"):
        x_t, v = sit.interpolant(x, eps, t, path)
        assert torch.allclose(x_t[0], x[0]) and torch.allclose(x_t[2], eps[2])      # t = 0 data, t = 1 noise
        ahead, behind = (sit.interpolant(x, eps, t + h, path)[0] for h in (1e-5, -1e-5))
        assert torch.allclose((ahead - behind) / 2e-5, v, atol=1e-6)
    with pytest.raises(ValueError, match="linear"):
        sit.interpolant(x, eps, t, "gvp")


def test_label_dropout_is_in_the_loss():
    seen = []

    class Model(torch.nn.Module):
        num_classes = 7

        def forward(self, x, t, y):
            seen.append(y)
            return x
    x, y = torch.randn(4000, 1, 1, 1), torch.zeros(4000, dtype=torch.long)
    for drop in (0.0, 0.3, 1.0):
        sit.flow_loss(Model(), x, y, label_drop=drop)
        assert abs((seen[-1] == 7).float().mean() - drop) < 0.03
    assert not y.any()


def test_noise_depends_on_the_index_alone():
    def draw(rows):
        randn = run.indexed_randn(3, rows)
        return [randn(torch.empty(len(rows), 2, 2)) for _ in range(3)]
    whole, parts = draw(range(6)), [draw([4, 2]), draw([5])]
    for w, a, b in zip(whole, *parts):
        assert torch.equal(w[[4, 2]], a) and torch.equal(w[5:], b)
    assert not torch.equal(whole[0], whole[1]) and whole[0].dtype == torch.float32 and not torch.equal(whole[0], draw(range(6, 12))[0])


# ---- checkpoints

def test_every_checkpoint_layout_loads(tmp_path):
    g, model, x = haste_golden()
    sd, c = model.state_dict(), g.config
    plain = {k: v for k, v in sd.items() if not k.startswith("projectors.")}
    old = {}
    for k, v in sd.items():                                                 # REPA's older names: encoder, decoder apart
        i = int(k.split(".")[1]) if k.startswith("blocks.") else 0
        old[k.replace(f"blocks.{i}.", f"decoder_blocks.{i - c['encoder_depth']}.")
            if i >= c["encoder_depth"] else k] = v
    namespace = argparse.Namespace(model="SiT-XL/2", encoder_depth=c["encoder_depth"])
    layouts = {
        "bare": (sd, 4), "plain": (plain, 4), "old": (old, 4), "old in ema": ({"ema": old, "args": namespace}, 4),
        "repa": ({"model": {}, "ema": sd, "opt": {}, "args": namespace, "steps": 7}, 4),
        "ours": ({"model": {}, "ema": sd, "args": {"num_heads": 4, "encoder_depth": c["encoder_depth"]}, "steps": 7},
                 None),
    }
    for name, (content, heads) in layouts.items():
        torch.save(content, tmp_path / "x.pt")
        loaded = sit.load_sit(tmp_path / "x.pt", num_heads=heads)
        with torch.no_grad():
            assert not loaded.training and distance(loaded(x, g["t"], g["y"]), g["velocity"]) < 1e-5, name
            if name != "plain":
                assert loaded.encoder_depth == (c["encoder_depth"] if name != "bare" else 3), name
    g, model, x = golden_sit("sit_original", learn_sigma=True, flip_time=True)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    loaded = sit.load_sit(tmp_path / "x.pt", num_heads=4)
    with torch.no_grad():
        assert loaded.flip_time and distance(-loaded(x, 1 - g["t"], g["y"]), g["velocity"]) < 1e-5


def test_heads_come_from_the_width_of_a_published_size(tmp_path):
    model = sit.SiT(8, 2, 4, 384, 1, 6, 10, qk_norm=True)
    torch.save(fill_state_dict(model.state_dict(), skip=("pos_embed",)), tmp_path / "x.pt")
    loaded = sit.load_sit(tmp_path / "x.pt")
    assert loaded.blocks[0].attn.num_heads == 6 and isinstance(loaded.blocks[0].attn.q_norm, torch.nn.LayerNorm)


def test_unfit_checkpoints_say_why(tmp_path):
    path, model = tmp_path / "x.pt", sit.SiT(8, 2, 4, 48, 2, 4, 10)
    cases = []
    sd = model.state_dict()
    torch.save(sd, path)
    cases.append((path.read_bytes(), "--num-heads"))                        # 48 is not a published width
    torch.save({**sd, "blocks.1.mlp.fc1.bias": torch.zeros(3), "extra": torch.zeros(1)}, path)
    cases.append((path.read_bytes(),
                  r"Unexpected key.*extra.*size mismatch for blocks.1.mlp.fc1.bias.*\[3\].*\[192\]"))
    torch.save({k: v for k, v in sd.items() if k != "blocks.0.attn.proj.bias"}, path)
    cases.append((path.read_bytes(), "Missing key.*blocks.0.attn.proj.bias"))
    torch.save({k: v for k, v in sd.items() if k != "final_layer.linear.weight"}, path)
    cases.append((path.read_bytes(), "no tensor 'final_layer.linear.weight'"))
    torch.save({"weights": 1}, path)
    cases.append((path.read_bytes(), "holds no SiT"))
    torch.save(sd, path)
    cases += [(path.read_bytes()[:-2000], "not a readable checkpoint"), (b"hello", "not a readable checkpoint"),
              (b"", "not a readable checkpoint")]
    for content, message in cases:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as e:
            sit.load_sit(path, num_heads=None if message == "--num-heads" else 4)
        assert str(path) in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        sit.load_sit(tmp_path / "none.pt")


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))
    torch.save({"ema": Evil()}, tmp_path / "x.pt")
    with pytest.raises(ValueError):
        sit.load_sit(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()
