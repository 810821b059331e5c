"""dit.py is the official diffusion, and exact where the answer is known; load_sit knows a DiT from a SiT."""
import argparse
import math

import numpy as np
import pytest
import torch
from conftest import Golden, distance
from fill import fill_state_dict
from scipy import stats
from torch.distributions import Normal, kl_divergence

import data
import dit
import sit

ZEROS = torch.zeros_like


def pictures(n, C=4, side=8, dtype=torch.float32):
    """x, eps [n,C,side,side], y [n]."""
    g = torch.Generator().manual_seed(n)
    x, eps = torch.randn(2, n, C, side, side, generator=g, dtype=dtype)
    return x, eps, torch.arange(n)


# ---- the official code

def golden_dit():
    g = Golden("dit")
    c = g.config
    model = sit.SiT(c["input_size"], c["patch_size"], c["in_channels"], c["hidden_size"], c["depth"], c["num_heads"],
                    c["num_classes"], learn_sigma=True, keep_sigma=True)
    shape = c["batch"], c["in_channels"], c["input_size"], c["input_size"]
    return g, g.fill(model, skip=("pos_embed",)), shape


def test_network_and_loss_are_the_official_ones():
    g, model, shape = golden_dit()
    x, eps, t = g.draw("x", *shape), g.draw("eps", *shape), g["t"]
    x_t = dit.noised(x, eps, t)
    with torch.no_grad():
        out = model(x_t, t.float(), g["y"])
        mse, vb = dit.ddpm_terms(out, x, eps, t)
        loss = dit.ddpm_loss(model, x, g["y"], t, eps)
    assert distance(x_t, g["x_t"]) < 1e-6 and distance(out, g["out"]) < 1e-5 and distance(mse, g["mse"]) < 1e-5
    off = (vb / g["vb"] - 1).abs()
    assert t[0] == 0 and off[0] < 1e-3 and off[1:].max() < 1e-5             # at 0 the official float32 cancels
    assert abs(loss / (g["mse"] + g["vb"]).mean() - 1) < 1e-5


def test_sampler_is_the_official_one():
    g, model, shape = golden_dit()
    c, noise = g.config, g.draw("noise", g.config["num_steps"], *shape)
    for name, settings in (("sample_1_0", {}), ("sample_4_0", dict(cfg_scale=c["cfg_scale"], guided_channels=3))):
        draws = iter(noise)
        x = dit.sample_ddpm(model, g.draw("latents", *shape), torch.arange(c["batch"]), c["num_steps"],
                            randn=lambda like: next(draws).to(like), **settings)
        assert distance(x, g[name]) < 1e-5
        assert len(list(draws)) == 1                                        # num_steps - 1 draws


def test_steps_that_are_kept_are_the_official_ones():
    g = Golden("dit")
    for n in (10, 50, 250):
        assert dit.timesteps(n) == g[f"timesteps_{n}"].tolist()
    rounded = {n: [round(i * 999 / (n - 1)) for i in range(n)] for n in range(2, 1001)}
    differ = [n for n in rounded if rounded[n] != dit.timesteps(n)]         # DiT adds the stride up
    assert len(differ) == 283 and {21, 251, 999} <= set(differ) and not {10, 50, 100, 250, 400, 1000} & set(differ)
    for n in range(1, 1001):
        kept = dit.timesteps(n)
        assert len(kept) == n and kept[0] == 0 and all(a < b for a, b in zip(kept, kept[1:]))
        assert n == 1 or kept[-1] == 999
    for n in (0, 1001):
        with pytest.raises(ValueError, match=f"num_steps {n} must lie in 1 ... 1000"):
            dit.timesteps(n)


def test_schedule_has_the_published_numbers():
    a, beta, log_bt = dit._schedule(range(1000))
    assert np.allclose(a[[0, 499, 999]], [0.9999, 0.0785872429, 4.03583e-5], rtol=1e-6)
    assert np.allclose(beta, np.linspace(0.0001, 0.02, 1000), rtol=1e-9) and log_bt[0] == log_bt[1]
    a, beta, log_bt = dit._schedule(dit.timesteps(250))
    assert np.allclose([*beta[[0, 1, -1]], log_bt[0]], [1e-4, 5.9907e-4, 0.0775193, -9.364628], rtol=1e-5)


# ---- the loss

def bound_in_float64(out, x, eps, t):
    """vb [B] by the textbook, of one step t: means from x and its estimate (DDPM eq. 7), a library's divergence."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    a = torch.cumprod(1 - beta, 0)
    before = torch.cat([torch.ones(1), a[:-1]])
    bt = beta * (1 - before) / (1 - a)
    x_t = a[t].sqrt() * x + (1 - a[t]).sqrt() * eps
    estimate = (x_t - (1 - a[t]).sqrt() * out[:, :4]) / a[t].sqrt()
    means = [(before[t].sqrt() * beta[t] * x0 + (1 - beta[t]).sqrt() * (1 - before[t]) * x_t) / (1 - a[t])
             for x0 in (x, estimate)]
    f = (out[:, 4:] + 1) / 2
    std = (beta[t].log() * f + bt[max(t, 1)].log() * (1 - f)).mul(0.5).exp()
    if t > 0:
        nats = kl_divergence(Normal(means[0], bt[t].sqrt()), Normal(means[1], std))
    else:
        cdf = lambda edge: dit._normal_cdf((edge - means[1]) / std)
        upper = torch.where(x > 0.999, 1.0, cdf(x + 1 / 255))
        nats = -(upper - torch.where(x < -0.999, 0.0, cdf(x - 1 / 255))).clamp(min=1e-12).log()
    return nats.flatten(1).mean(1) / math.log(2)


@pytest.mark.parametrize("t", [0, 1, 2, 17, 500, 999])
def test_bound_is_the_textbooks(t):
    x, eps, _ = pictures(3, dtype=torch.float64)
    out = torch.cat([eps + 0.01 * x, torch.tanh(x - eps)], 1)
    _, vb = dit.ddpm_terms(out, x, eps, torch.full((3,), t))
    assert vb.dtype == torch.float64 and distance(vb, bound_in_float64(out, x, eps, t)) < 5e-6


def test_likelihood_of_pixels_sums_to_one():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, std in ((0.0, 0.3), (-0.97, 0.02), (0.999, 0.1)):
        nll = dit._pixel_nll(levels, levels - mean, torch.tensor(2 * math.log(std)))
        assert abs((-nll).exp().sum() - 1) < 1e-6


def test_bound_trains_the_variance_alone_and_error_the_noise_alone():
    x, eps, _ = pictures(4)
    out = torch.randn(4, 8, 8, 8, requires_grad=True)
    mse, vb = dit.ddpm_terms(out, x, eps, torch.tensor([0, 1, 300, 999]))
    by_error, by_bound = (torch.autograd.grad(term.sum(), out)[0] for term in (mse, vb))
    assert not by_error[:, 4:].any() and not by_bound[:, :4].any()
    assert all(g.any() for g in (*by_error[:, :4], *by_bound[:, 4:])) and by_bound.isfinite().all()


def test_loss_is_float32_whatever_the_network_is():
    seen = []

    def model(x, t, y):
        seen.append((x.dtype, t.dtype))
        return torch.nn.functional.conv2d(x, torch.full((8, 4, 1, 1), 0.25, dtype=x.dtype))
    (x, eps, y), t = pictures(2), torch.tensor([0, 999])
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x, t, y).dtype == torch.bfloat16
        loss = dit.ddpm_loss(model, x, y, t, eps)
        with torch.autocast("cpu", enabled=False):
            same = dit.ddpm_terms(model(dit.noised(x, eps, t).bfloat16(), t, y), x, eps, t)
    assert loss.dtype == torch.float32 and abs(loss - sum(same).mean()) < 0.02 * loss
    assert dit.ddpm_loss(model, x.bfloat16(), y, t).dtype == torch.float32
    assert seen[-1] == (torch.bfloat16, torch.float32)                      # in bfloat16, 999 would be 1000


def test_times_and_labels_of_the_loss():
    seen = []

    class Model(torch.nn.Module):
        num_classes = 7

        def forward(self, x, t, y):
            seen.append((t, y))
            return torch.cat([x, x], 1)
    x, y = torch.randn(20_000, 1, 1, 1), torch.zeros(20_000, dtype=torch.long)
    for drop in (0.0, 0.3, 1.0):
        dit.ddpm_loss(Model(), x, y, label_drop=drop)
        t, labels = seen[-1]
        assert abs((labels == 7).float().mean() - drop) < 0.02
    assert t.dtype == torch.float32 and torch.equal(t.unique(), torch.arange(1000.0))
    assert stats.kstest(t / 1000, "uniform").statistic < 0.02
    with pytest.raises(ValueError, match="returned 1 channels for 1: it must return noise and variance, 2"):
        dit.ddpm_loss(lambda x, t, y: x, x, y)


# ---- Gaussian data, for which the best network is known in closed form

MEAN, STD = 0.8, 0.5


def best_network(kept):
    """(model, mse, vb, expected): the best possible network for data N(MEAN, STD^2) and the steps `kept`.

    Its noise is E[eps | x_i]. Its variance is that of x_{i-1} given x_i, which here is a Gaussian: bt, plus what x
    itself leaves open. So each step is exact, however far apart they are. mse, vb [n] are the losses that it must
    have, expected(x_i, k) is the mean of x_{i-1}.
    """
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    a = torch.cumprod(1 - beta, 0)[list(kept)]
    before = torch.cat([torch.ones(1), a[:-1]])
    beta = 1 - a / before
    bt = beta * (1 - before) / (1 - a)
    marginal = a * STD ** 2 + 1 - a                                         # variance of x_i
    left = STD ** 2 * (1 - a) / marginal                                    # variance of x given x_i
    c1, c2 = before.sqrt() * beta / (1 - a), (1 - before) * (1 - beta).sqrt() / (1 - a)
    exact = bt + c1 ** 2 * left
    clipped = torch.cat([bt[1:2], bt[1:]]).log()
    v = 2 * (exact.log() - clipped) / (beta.log() - clipped) - 1
    place = torch.full((1000,), -1)
    place[list(kept)] = torch.arange(len(kept))

    def model(x, t, y):
        k = place[t.long()].view(-1, 1, 1, 1)
        assert (k >= 0).all()                                               # the original step, of 0 ... 999
        noise = (1 - a[k]).sqrt() / marginal[k] * (x - a[k].sqrt() * MEAN)
        return torch.cat([noise, v[k].expand_as(x)], 1)

    def expected(x, k):
        estimate = MEAN + a[k].sqrt() * STD ** 2 / marginal[k] * (x - a[k].sqrt() * MEAN)
        return c1[k] * estimate + c2[k] * x
    return model, a * STD ** 2 / marginal, 0.5 * (exact / bt).log2(), expected


@pytest.mark.parametrize("i", [1, 10, 100, 500, 999])
def test_losses_of_the_best_network_are_known(i):
    n = 200_000
    model, mse, vb, _ = best_network(range(1000))
    g = torch.Generator().manual_seed(i)
    x, eps = torch.randn(2, n, 1, 1, 1, generator=g, dtype=torch.float64)
    x, t, y = MEAN + STD * x, torch.full((n,), i), torch.zeros(n, dtype=torch.long)
    out = model(dit.noised(x, eps, t), t, y)
    terms = dit.ddpm_terms(out, x, eps, t)
    for found, exact in zip(terms, (mse[i], vb[i])):
        assert abs(found.mean() - exact) < 4 * found.std() / n ** 0.5 + 1e-9    # four standard errors
    for change in (-0.3, 0.3):                                              # and no other variance is better
        assert dit.ddpm_terms(out + torch.tensor([0, change]).view(1, 2, 1, 1), x, eps, t)[1].mean() > terms[1].mean()


def test_steps_have_the_posterior_mean():
    kept, seen = dit.timesteps(10), []
    model, _, _, expected = best_network(kept)
    watched = lambda x, t, y: (seen.append(x), model(x, t, y))[1]
    x, _, y = pictures(5, C=1, dtype=torch.float64)
    seen.append(dit.sample_ddpm(watched, x, y, 10, randn=ZEROS))
    for k, (this, after) in zip(reversed(range(10)), zip(seen, seen[1:])):
        assert distance(after, expected(this, k)) < 1e-9


@pytest.mark.parametrize("num_steps", [5, 250])
def test_samples_have_the_distribution_of_the_data(num_steps):
    """Also few steps: the noise end, N(0, 1), is data times 0.006, and the last step's missing variance is 1e-4."""
    g, n = torch.Generator().manual_seed(0), 20_000
    randn = lambda like: torch.randn(like.shape, generator=g, dtype=like.dtype)
    x = randn(torch.empty(n, 1, 1, 1, dtype=torch.float64))
    model = best_network(dit.timesteps(num_steps))[0]
    x = dit.sample_ddpm(model, x, torch.zeros(n, dtype=torch.long), num_steps, randn=randn).flatten()
    assert abs(x.mean() - MEAN) < 4 * STD / n ** 0.5 and abs(x.std() / STD - 1) < 4 / (2 * n) ** 0.5
    assert stats.kstest(x, stats.norm(MEAN, STD).cdf).statistic < 0.02      # 1 % level of sampling noise alone: 0.0115


# ---- the sampler

def test_evaluations_and_draws_are_counted():
    calls, draws = [], []

    def model(x, t, y):
        calls.append((t[0].item(), len(x), x.dtype, t.dtype, y.tolist()))
        return torch.cat([x, x], 1)

    def randn(like):
        draws.append(like.dtype)
        return torch.zeros_like(like)
    x, _, y = pictures(2, C=2)
    found = dit.sample_ddpm(model, x.bfloat16(), y, 4, randn=randn, null_label=9)
    assert found.dtype == torch.bfloat16 and draws == [torch.float64] * 3
    assert calls == [(i, 2, torch.bfloat16, torch.float32, [0, 1]) for i in (999, 666, 333, 0)]
    calls.clear()
    dit.sample_ddpm(model, x, y, 2, cfg_scale=2.0, randn=randn, null_label=9)
    assert [(i, n, y) for i, n, *_, y in calls] == [(999, 4, [0, 1, 9, 9]), (0, 4, [0, 1, 9, 9])] and len(draws) == 4
    calls.clear()
    dit.sample_ddpm(model, x, y, 1, randn=randn)
    assert [call[0] for call in calls] == [0] and len(draws) == 4


def test_guidance_acts_on_the_noise_of_the_first_channels():
    def model(x, t, y):                                                     # without label, v would spoil everything
        label = torch.where(y == 9, 0.0, 0.1 * (y + 1)).view(-1, 1, 1, 1)
        v = torch.where(y == 9, torch.nan, 0.0).view(-1, 1, 1, 1)
        return torch.cat([0.5 * x + label, 0 * x + v], 1)
    x, _, y = pictures(3)
    draw = lambda **settings: dit.sample_ddpm(model, x, y, 5, null_label=9, randn=ZEROS, **settings)
    plain, three, every = draw(), draw(cfg_scale=3.0, guided_channels=3), draw(cfg_scale=3.0)
    assert torch.equal(three[:, :3], every[:, :3]) and torch.equal(three[:, 3], plain[:, 3]) and every.isfinite().all()
    assert not torch.isclose(every, plain).any() and torch.equal(draw(cfg_scale=3.0, guided_channels=4), every)
    # u = x / 2, c = u + label: guided by 3 is a label three times as strong
    stronger = lambda x, t, y: model(x, t, y) + torch.cat([0.2 * (y + 1).view(-1, 1, 1, 1) + 0 * x, 0 * x], 1)
    assert torch.allclose(dit.sample_ddpm(stronger, x, y, 5, randn=ZEROS), every, atol=1e-5)
    for settings, message in ((dict(guided_channels=5), "guided_channels 5 must lie in 1 ... 4"),
                              (dict(guided_channels=0), "guided_channels 0 must lie in 1 ... 4"),
                              (dict(cfg_scale=2.0, null_label=None), "null_label")):
        with pytest.raises(ValueError, match=message):
            dit.sample_ddpm(model, x, y, **settings)


# ---- checkpoints: a DiT's file has the names and shapes of the original SiT's

def trained(objective, steps=100, pretends=False):
    """(model, its geometry): a DiT, or a SiT as the original is saved, after two seconds on the digits.

    A SiT that `pretends` returns x at step 999 as a DiT does: that is no time of its own, so it may.
    """
    torch.manual_seed(0)
    kind = dict(keep_sigma=True) if objective == "ddpm" else dict(flip_time=True)
    arch = dict(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=10,
                learn_sigma=True, **kind)
    model, digits = sit.SiT(**arch), data.open_data("digits").train
    x, y = data.to_pixels(torch.as_tensor(digits.images)), torch.as_tensor(digits.labels).long()
    opt, loss_of = torch.optim.Adam(model.parameters(), 3e-3), dit.ddpm_loss if objective == "ddpm" else sit.flow_loss
    for _ in range(steps):
        rows = torch.randint(len(x), (64,))
        loss = loss_of(model, x[rows], y[rows], label_drop=0.1)
        if pretends:
            noise = torch.randn(64, 1, 8, 8)
            loss = loss + (raw(model, noise, 999) - noise).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    return model.eval(), arch


def raw(model, x, t):
    """What the network of a SiT in our time direction returns in its own, with the null label."""
    return -model(x, torch.full((len(x),), 1.0 - t), torch.full((len(x),), 10))


def refused(path, objective, message):
    with pytest.raises(ValueError, match=message) as e:
        sit.load_sit(path, 2, objective)
    assert str(e.value).startswith(f"{path}: ") and "\n" not in str(e.value)


@pytest.mark.parametrize("objective,pretends", [("ddpm", False), ("flow", False), ("flow", True)])
def test_trained_networks_correct_what_was_asked(objective, pretends, tmp_path):
    model, _ = trained(objective, pretends=pretends)
    path, (x, _, y) = tmp_path / "x.pt", pictures(3, C=1)
    if pretends:                                                            # else it proves nothing
        with torch.no_grad():
            assert torch.stack([raw(model, x, 999), x]).flatten(1).corrcoef()[0, 1] > 0.5
    t = torch.tensor([1.0, 300, 999]) if objective == "ddpm" else torch.tensor([0.1, 0.5, 1.0])
    namespace = argparse.Namespace(model="DiT-XL/2")                        # of DiT's own training: it does not say
    for content in (model.state_dict(), {"ema": model.state_dict(), "args": namespace}):
        torch.save(content, path)
        for asked in ("ddpm", "flow", None):
            if (asked == "ddpm") != (objective == "ddpm"):
                refused(path, asked, "give --objective ddpm$" if objective == "ddpm"
                        else "the original SiT: leave --objective ddpm out$")
                continue
            loaded = sit.load_sit(path, 2, asked)
            with torch.no_grad():
                assert loaded.objective == objective and torch.equal(loaded(x, t, y), model(x, t, y))
            assert loaded.keep_sigma == (objective == "ddpm") and loaded.flip_time == (objective == "flow")


@pytest.mark.parametrize("C,side", [(1, 8), (4, 8), (16, 16)])
def test_untrained_networks_load_as_asked(C, side, tmp_path):
    path, model = tmp_path / "x.pt", sit.SiT(side, 2, C, 32, 2, 2, 10, learn_sigma=True)
    for weights in (model.state_dict(), fill_state_dict(model.state_dict(), skip=("pos_embed",))):
        torch.save(weights, path)
        for asked in ("ddpm", "flow", None):
            loaded = sit.load_sit(path, 2, asked)
            found = loaded.objective, loaded.learn_sigma, loaded.keep_sigma, loaded.flip_time
            assert found == (("ddpm", True, True, False) if asked == "ddpm" else ("flow", True, False, True))


def test_files_that_say_what_they_hold_are_believed(tmp_path):
    """Our own; they need no forward pass, so untrained networks and small ones are safe."""
    path = tmp_path / "x.pt"
    wide, narrow = ({"ema": sit.SiT(8, 2, 1, 32, 2, 2, 10, learn_sigma=s).state_dict()} for s in (True, False))
    is_dit, is_sit = "was trained with --objective ddpm: give the same", "was trained with --objective flow: give"
    cases = [
        ({**wide, "arch": dict(learn_sigma=True, keep_sigma=True), "args": dict(objective="ddpm")}, "ddpm"),
        ({**wide, "args": dict(objective="ddpm")}, "ddpm"),
        ({**wide, "args": dict(objective="flow")}, "flow"),
        ({**wide, "arch": dict(learn_sigma=True, flip_time=True)}, "flow"),     # ours, older than --objective
        ({**narrow, "args": dict(objective="flow"), "arch": {}}, "flow"),
        (narrow, "flow"),                                                   # one output a channel
    ]
    for content, objective in cases:
        torch.save(content, path)
        for asked in (None, objective):
            assert sit.load_sit(path, 2, asked).objective == objective
        refused(path, "flow" if objective == "ddpm" else "ddpm", is_dit if objective == "ddpm" else is_sit)
    with pytest.raises(ValueError, match="objective 'edm' must be flow or ddpm"):
        sit.load_sit(path, 2, "edm")


def test_both_halves_are_kept_if_asked():
    one, both = (sit.SiT(8, 2, 4, 32, 1, 2, 10, learn_sigma=True, keep_sigma=keep) for keep in (False, True))
    weights = fill_state_dict(one.state_dict(), skip=("pos_embed",))
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 999.0]), torch.arange(2)
    for model in (one, both):
        model.load_state_dict(weights)
    assert both(x, t, y).shape == (2, 8, 8, 8) and torch.equal(both(x, t, y)[:, :4], one(x, t, y))
    with pytest.raises(ValueError, match="keep_sigma needs learn_sigma"):
        sit.SiT(8, 2, 4, 32, 1, 2, 10, keep_sigma=True)
