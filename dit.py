"""DiT's diffusion: predict the noise and its variance; schedule, loss and sampler, in one file.

    model = sit.SiT(input_size=32, in_channels=4, num_classes=1000, learn_sigma=True,
                    keep_sigma=True, **sit.SIT_CONFIGS["SiT-XL/2"])     # DiT-XL/2 is this network
    loss = dit.ddpm_loss(model, x, y, label_drop=0.1)           # training: x [B,C,h,w], y [B]
    x = dit.sample_ddpm(model, noise, y, cfg_scale=1.5)
    model = sit.load_sit("DiT-XL-2-256x256.pt", objective="ddpm")       # a published checkpoint

Papers: DDPM (Ho et al. 2020, arXiv 2006.11239), improved DDPM (Nichol & Dhariwal 2021,
2102.09672), DiT (Peebles & Xie 2023, 2212.09748).

Time is a step i, from data at i = 0 to noise at i = 999.
    x_i = sqrt(a_i) x + sqrt(1 - a_i) eps       a_i = product of 1 - beta_j over j <= i, a_{-1} = 1
    q(x_{i-1} | x_i, x) has the variance        bt_i = beta_i (1 - a_{i-1}) / (1 - a_i)
The network learns to predict eps and v from x_i. They make the Gaussian of a step back, from which
sampling draws x_{i-1}:
    mean            (x_i - beta_i / sqrt(1 - a_i) eps) / sqrt(1 - beta_i)
    log variance    f log beta_i + (1 - f) log bt_i,  f = (v + 1) / 2

Any model(x, t, y) will do that returns [B,2C,h,w], eps and then v; t [B] is the step as a float.
Letters: B batch, C channels, h w height and width of the latent.
"""
import math
from functools import lru_cache

import numpy as np
import torch

NUM_STEPS = 1000                                                            # of training
ALPHA_BAR = np.cumprod(1 - np.linspace(0.0001, 0.02, NUM_STEPS))            # a_i; beta_i is linear


# ---- schedule

def _schedule(steps):
    """Return a, beta and log bt, each [n] in float64, of a process that visits only these steps.

    They increase; all of them are range(NUM_STEPS) (improved DDPM eq. 19).
    """
    a = ALPHA_BAR[list(steps)]
    before = np.append(1.0, a[:-1])                                         # a of the step visited before
    beta = 1 - a / before
    bt = beta * (1 - before) / (1 - a)                                      # DDPM eq. 7
    bt = np.append(bt[1:2], bt[1:])                                         # the first is 0: the second replaces it
    return a, beta, np.log(bt)


@lru_cache
def _tables(device):
    """Return sqrt(a), sqrt(1 - a), the gain of `ddpm_terms`, log bt and log(beta / bt): [5,1000].

    Cached, since a copy in every step would make the host wait for the GPU.
    """
    a, beta, log_bt = _schedule(range(NUM_STEPS))
    gain = beta / np.sqrt((1 - a) * (1 - beta))
    rows = [np.sqrt(a), np.sqrt(1 - a), gain, log_bt, np.log(beta) - log_bt]
    return torch.tensor(np.stack(rows).astype(np.float32), device=device)


def _at(t, x):
    """Return the five tables at the steps t [B] in float32, each [B,1,1,1] if x is [B,C,h,w]."""
    return _tables(x.device)[:, t].view(5, -1, *[1] * (x.ndim - 1))


def noised(x, eps, t):
    """Return x_t = sqrt(a_t) x + sqrt(1 - a_t) eps (DDPM eq. 4), in float32 or better.

    x [B,...] clean, eps like x, t int64 [B] in 0 ... 999.
    """
    signal, noise, *_ = _at(t, x)
    return signal * x + noise * eps


# ---- loss

def _halves(out, x):
    """Return the two halves of a network's output for x [B,C,...]: the noise, and v."""
    C = x.shape[1]
    if out.shape[1] != 2 * C:
        raise ValueError(f"the network returned {out.shape[1]} channels for {C}: it must return "
                         f"noise and variance, {2 * C} (sit.SiT with learn_sigma and keep_sigma)")
    return out.split(C, dim=1)


def _normal_cdf(u):                                                         # the approximation that GELU-tanh uses
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))


def _pixel_nll(x, shift, log_var):
    """Return -log of the probability of x - 1/255 ... x + 1/255 under the mean x - shift.

    This takes x for 8-bit pixels in [-1, 1], with open bins at both ends (DDPM eq. 13). Latents are
    not pixels; it is kept for parity with DiT.
    """
    scale = torch.exp(-0.5 * log_var)
    upper = _normal_cdf(scale * (shift + 1 / 255))
    lower = _normal_cdf(scale * (shift - 1 / 255))
    p = torch.where(x > 0.999, 1 - lower, upper - lower)
    return -torch.where(x < -0.999, upper, p).clamp(min=1e-12).log()


def ddpm_terms(out, x, eps, t):
    """Return mse [B] of the noise, and vb [B], this step's part of the variational bound in bits.

    out [B,2C,h,w] is what the network returned for noised(x, eps, t); x and eps [B,C,h,w], t int64
    [B]. Both are means over an image's elements. vb trains only the variance: it takes the
    predicted noise as a constant. Raises ValueError if out does not have 2C channels.
    """
    eps_hat, v = _halves(out.to(torch.promote_types(out.dtype, torch.float32)), x)
    _, _, gain, log_bt, log_range = _at(t, x)
    error = eps_hat - eps
    mse = error.square().flatten(1).mean(1)                                 # DDPM eq. 14

    # With the true noise, the model's mean is that of q(x_{i-1} | x_i, x) (DDPM eq. 11), so the two
    # differ by gain * error. At i = 0 the mean of q is x itself.
    shift = gain * error.detach()
    log_ratio = (v + 1) / 2 * log_range                                     # of the model's variance to q's
    log_var = log_bt + log_ratio                                            # improved DDPM eq. 15
    kl = 0.5 * (log_ratio + torch.expm1(-log_ratio) + shift ** 2 * torch.exp(-log_var))
    vb = torch.where((t == 0).view(gain.shape), _pixel_nll(x, shift, log_var), kl)
    return mse, vb.flatten(1).mean(1) / math.log(2)


def ddpm_loss(model, x, y, t=None, eps=None, label_drop=0.0):
    """Return the mean of mse + vb, in float32 or better (improved DDPM eq. 16).

    x [B,C,h,w] clean, y [B]. If None, t [B] is drawn uniformly from 0 ... 999, and eps, like x,
    normally. `label_drop` is the probability of replacing a label by the null label,
    `model.num_classes`. The paper's weight 0.001 is for the sum of vb over 1000 steps, so it is 1
    for the one step that is drawn.
    """
    if t is None:
        t = torch.randint(NUM_STEPS, (len(x),), device=x.device)            # [B]  0 data, 999 noise
    if eps is None:
        eps = torch.randn_like(x)
    if label_drop > 0:
        null = getattr(model, "module", model).num_classes                  # DDP hides attributes behind `module`
        y = torch.where(torch.rand(len(y), device=y.device) < label_drop, null, y)
    step = t.to(torch.promote_types(x.dtype, torch.float32))                # bfloat16 has no 999
    mse, vb = ddpm_terms(model(noised(x, eps, t).to(x.dtype), step, y), x, eps, t)
    return (mse + vb).mean()


# ---- sampling: state in float64, network in the latent's own dtype

def timesteps(num_steps):
    """Return the steps that sampling visits: an increasing list of ints from 0 to 999; 0 if one.

    Raises ValueError unless num_steps lies in 1 ... 1000.
    """
    if not 1 <= num_steps <= NUM_STEPS:
        raise ValueError(f"num_steps {num_steps} must lie in 1 ... {NUM_STEPS}, the number of "
                         f"steps of training")
    stride = (NUM_STEPS - 1) / max(1, num_steps - 1)
    kept = []
    i = 0.0
    for _ in range(num_steps):
        kept.append(round(i))
        i += stride                                                         # DiT's sum: k * stride rounds otherwise
    return kept


def _as_state(x):
    """Return x in float64, or in float32 on Apple's GPUs, which have nothing wider."""
    return x.float() if x.device.type == "mps" else x.double()


def _guided(model, y, dtype, cfg_scale, null_label, channels):
    """Return f(x, i) -> eps, v in the state's dtype.

    If cfg_scale is not 1, the first `channels` of eps are u + w (c - u), from evaluations with
    label (c) and without (u). The other channels, and v, are those with label.
    """
    null = null_label
    if null is None:
        null = getattr(model, "num_classes", None)
    if cfg_scale != 1 and null is None:
        raise ValueError("guidance needs the null label: pass null_label, or a model with the "
                         "attribute num_classes")
    if null is not None:
        null = torch.as_tensor(null).to(y)
    t_dtype = torch.promote_types(dtype, torch.float32)                     # t is never bfloat16

    def f(x, i):
        x = x.to(dtype)
        t = torch.full((len(x),), i, device=x.device, dtype=t_dtype)        # [B]
        if cfg_scale == 1:
            return _halves(_as_state(model(x, t, y)), x)
        labels = torch.cat([y, null.expand_as(y)])                          # [2B]: with label, then without
        c, u = _as_state(model(torch.cat([x, x]), torch.cat([t, t]), labels)).chunk(2)
        eps = u[:, :channels] + cfg_scale * (c - u)[:, :channels]
        return _halves(torch.cat([eps, c[:, channels:]], dim=1), x)
    return f


@torch.no_grad()
def sample_ddpm(model, x, y, num_steps=250, cfg_scale=1.0, null_label=None, guided_channels=None,
                randn=torch.randn_like):
    """Draw x_{i-1} given x_i (DDPM algorithm 2) in num_steps steps, from noise down to data.

    x [B,C,h,w] is noise, y [B] class ids; the result is like x. model(x, t [B], y [B]) is given the
    original step, out of 0 ... 999. Guidance, if cfg_scale != 1, acts on the first guided_channels
    of the noise, None is all; 3 is how DiT's published figures were made. randn(like) draws each
    step's noise; the last step has none.
    Raises ValueError if num_steps does not lie in 1 ... 1000, or guidance lacks the null label.
    """
    C = x.shape[1]
    channels = C if guided_channels is None else guided_channels
    if not 1 <= channels <= C:
        raise ValueError(f"guided_channels {channels} must lie in 1 ... {C}, the channels of x")
    kept = timesteps(num_steps)
    a, beta, log_bt = (table.tolist() for table in _schedule(kept))
    f = _guided(model, y, x.dtype, cfg_scale, null_label, channels)
    state = _as_state(x)
    for k in reversed(range(num_steps)):
        eps, v = f(state, kept[k])
        state = (state - beta[k] / math.sqrt(1 - a[k]) * eps) / math.sqrt(1 - beta[k])
        if k > 0:
            share = (v + 1) / 2
            log_var = share * math.log(beta[k]) + (1 - share) * log_bt[k]
            state = state + torch.exp(0.5 * log_var) * randn(state)
    return state.to(x.dtype)
