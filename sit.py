"""SiT: a flow-matching diffusion transformer, its loss and its samplers, in one file.

    model = sit.SiT(input_size=32, in_channels=4, num_classes=1000, **sit.SIT_CONFIGS["SiT-XL/2"])
    loss = sit.flow_loss(model, x, y, label_drop=0.1)           # training: x [B,C,h,w], y [B]
    x = sit.sample_sde(model, noise, y, cfg_scale=1.8, cfg_interval=(0, 0.7))
    model = sit.load_sit("SiT-XL-2-256.pt")     # SiT's, REPA's, HASTE's, DiT's checkpoints, ours

Papers: SiT (Ma et al. 2024, arXiv 2401.08740), DiT's adaLN-Zero blocks (Peebles & Xie 2023,
2212.09748), guidance interval (Kynkaanniemi et al. 2024, 2404.07724), the projectors of REPA (Yu et
al. 2025, 2410.06940) and iREPA (Singh et al. 2025, 2512.10794).

Time runs from t = 0 (data) to t = 1 (noise).
    linear path   x_t = (1 - t) x + t eps                   v = dx_t/dt = eps - x
    cosine path   x_t = cos(a) x + sin(a) eps, a = pi t/2   v = pi/2 (cos(a) eps - sin(a) x)
The network learns to predict v; sampling integrates v from noise at t = 1 back to data at t = 0.

Letters: B batch, C channels, h w height and width of the latent, p patch, N tokens, D width,
H heads, d = D/H.
"""
import argparse
import math
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# The published sizes: depth, width, heads. Ti (ours) is the one that a laptop trains on the digits.
PUBLISHED = {"SiT-S": (12, 384, 6), "SiT-B": (12, 768, 12), "SiT-L": (24, 1024, 16),
             "SiT-XL": (28, 1152, 16)}
PATCH_SIZES = (1, 2, 4, 8)
SIT_CONFIGS = {}
for _name, (_depth, _width, _heads) in {"SiT-Ti": (6, 128, 4), **PUBLISHED}.items():
    for _patch in PATCH_SIZES:
        SIT_CONFIGS[f"{_name}/{_patch}"] = dict(depth=_depth, hidden_size=_width, num_heads=_heads,
                                                patch_size=_patch)


# ---- small modules

def pos_embed_2d(D, grid):
    """Return the fixed sine-cosine position table [1,N,D].

    The first half of D encodes a token's column, the second half its row.
    """
    omega = 10000.0 ** (-np.arange(D // 4) / (D / 4))                       # [D/4], float64 like the official table
    row, col = np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")
    by_col = np.outer(col.reshape(-1), omega)                               # [N,D/4]
    by_row = np.outer(row.reshape(-1), omega)
    table = [np.sin(by_col), np.cos(by_col), np.sin(by_row), np.cos(by_row)]
    return torch.from_numpy(np.concatenate(table, axis=1)).float()[None]


def modulate(x, shift, scale):
    """Return x (1 + scale) + shift, in x's dtype: x [B,N,D], shift and scale [B,D]."""
    scale = scale.to(torch.promote_types(scale.dtype, torch.float32))       # in bfloat16, 1 + 0.001 is 1
    return (x * (1 + scale[:, None]) + shift[:, None]).to(x.dtype)


class TimestepEmbedder(nn.Module):
    """Embed times t [B] -> [B,D]: SiT's lie in [0, 1], DiT's are the integer steps 0 ... 999."""

    def __init__(self, hidden_size, frequencies=128):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, hidden_size), nn.SiLU(),
                                 nn.Linear(hidden_size, hidden_size))

    def forward(self, t):
        t = t.to(torch.promote_types(t.dtype, torch.float32))               # in bfloat16, t would be too coarse
        i = torch.arange(self.frequencies, device=t.device, dtype=t.dtype)
        args = t[:, None] * torch.exp(-math.log(10000) / self.frequencies * i)              # [B,128]
        features = torch.cat([args.cos(), args.sin()], dim=1)                               # [B,256]
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Embed class ids [B] -> [B,D]. The last row is the null label of classifier-free guidance."""

    def __init__(self, num_classes, hidden_size):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y):
        return self.embedding_table(y)


class PatchEmbed(nn.Module):
    """Cut the latent into p x p patches, and map each to a token."""

    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x):
        tokens = self.proj(x).flatten(2).transpose(1, 2)                    # [B,C,h,w] -> [B,N,D]
        return tokens.contiguous()                                          # else every sum and norm above it copies


class Attention(nn.Module):
    """Self-attention that also returns its queries and keys, which HASTE aligns."""

    def __init__(self, dim, num_heads, qk_norm):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # three of [B,H,N,d]
        q = self.q_norm(q)
        k = self.k_norm(k)
        out = F.scaled_dot_product_attention(q, k, v)                       # [B,H,N,d]
        return self.proj(out.transpose(1, 2).reshape(B, N, D)), (q, k)


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Transformer block with adaLN-Zero (DiT fig. 3).

    The condition c sets the shift, scale and gate of both branches.
    """

    def __init__(self, dim, num_heads, qk_norm):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads, qk_norm)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, tap=False):                                     # x [B,N,D], c [B,D]
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)

        out, qk = self.attn(modulate(self.norm1(x), shift1, scale1))
        x = x + gate1[:, None] * out
        x = x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))
        if tap:                                                             # elsewhere their memory is free at once
            return x, qk
        return x, None


class FinalLayer(nn.Module):
    def __init__(self, dim, out_features):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class ConvProjector(nn.Module):
    """iREPA's projector: one convolution on the square grid of tokens, [B,N,D] -> [B,N,z_dim]."""

    def __init__(self, hidden_size, z_dim, kernel=3):
        super().__init__()
        self.projection_layer = nn.Conv2d(hidden_size, z_dim, kernel, padding=kernel // 2)

    def forward(self, h):
        B, N, D = h.shape
        g = math.isqrt(N)
        z = self.projection_layer(h.transpose(1, 2).reshape(B, D, g, g))
        return z.flatten(2).transpose(1, 2)                                 # [B,z_dim,g,g] -> [B,N,z_dim]


# ---- the model

class SiT(nn.Module):
    """Velocity network v(x, t, y). Parameter names are those of the official checkpoints.

    x [B,C,h,w] with h = w = input_size, t [B] in [0, 1], y [B] class ids; the null label is
    num_classes.

    `model(x, t, y)` returns v [B,C,h,w]. `model(x, t, y, tap_layers=L)` returns (v, z, taps):
        z      [B,N,z_dim], the projected output of blocks[encoder_depth - 1]; None if there is no
               projector
        taps   [(q, k), ...] of the blocks in L, each [B,H,N,d], after their norms, unscaled

    The projector is REPA's, `projector_dim` wide, or with `projector_kernel` iREPA's convolution.
    `learn_sigma`, `flip_time`: the original SiT predicts 2C channels, and its time runs the other
    way. `keep_sigma`: a DiT (dit.py) returns all 2C, and its t is the integer step. Raises
    ValueError if the sizes do not fit one another.
    """

    def __init__(self, input_size, patch_size, in_channels, hidden_size, depth, num_heads,
                 num_classes, *, qk_norm=False, learn_sigma=False, flip_time=False,
                 keep_sigma=False, z_dim=None, projector_dim=2048, encoder_depth=8,
                 projector_kernel=None):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input size {input_size} must be a multiple of the patch size "
                             f"{patch_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"width {hidden_size} must be a multiple of 4 and of the {num_heads} "
                             f"heads")
        if z_dim is not None and not 1 <= encoder_depth <= depth:
            raise ValueError(f"encoder depth {encoder_depth} must lie in 1 ... {depth}, the depth "
                             f"of the model")
        if keep_sigma and not learn_sigma:
            raise ValueError("keep_sigma needs learn_sigma")
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.grid = input_size // patch_size                                # tokens along a side
        self.num_classes = num_classes
        self.encoder_depth = encoder_depth                                  # blocks below the projector, REPA's name
        self.learn_sigma = learn_sigma
        self.flip_time = flip_time
        self.keep_sigma = keep_sigma
        out_channels = in_channels * (1 + learn_sigma)

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        table = pos_embed_2d(hidden_size, self.grid).to(torch.empty(0).device)               # or torch.device("meta")
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size ** 2 * out_channels)
        self.projectors = None
        if z_dim is not None:
            if projector_kernel is None:
                projector = nn.Sequential(nn.Linear(hidden_size, projector_dim), nn.SiLU(),
                                          nn.Linear(projector_dim, projector_dim), nn.SiLU(),
                                          nn.Linear(projector_dim, z_dim))
            else:
                projector = ConvProjector(hidden_size, z_dim, projector_kernel)
            self.projectors = nn.ModuleList([projector])                    # a list of one: the official names
        self.initialize()

    def initialize(self):
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight.flatten(1))                # a convolution as a matrix
                nn.init.zeros_(m.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)

        # adaLN-Zero: every block starts as the identity, and the network's output as zero
        for m in [*self.blocks, self.final_layer]:
            nn.init.zeros_(m.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x, t, y, tap_layers=None):
        with_taps = tap_layers is not None                                  # are z and taps requested?
        tapped = list(tap_layers) if with_taps else []
        if any(not 0 <= i < len(self.blocks) for i in tapped):
            raise ValueError(f"tap_layers {tapped} must lie in 0 ... {len(self.blocks) - 1}")
        if self.flip_time:
            t = 1 - t

        h = self.x_embedder(x) + self.pos_embed                             # [B,N,D]
        c = self.t_embedder(t) + self.y_embedder(y)                         # [B,D]
        z = None
        qk = {}                                                             # block -> its queries and keys
        for i, block in enumerate(self.blocks):
            h, qk[i] = block(h, c, tap=i in tapped)
            if with_taps and self.projectors is not None and i == self.encoder_depth - 1:
                z = self.projectors[0](h)                                   # [B,N,z_dim]
        kind = "cpu" if h.is_meta else h.device.type                        # meta has no autocast
        with torch.autocast(kind, enabled=False):                           # a sampler adds up what is rounded here
            v = self.unpatchify(self.final_layer(h, c))                     # [B,C,h,w]

        if not with_taps:
            return v
        return v, z, [qk[i] for i in tapped]

    def unpatchify(self, tokens):                                           # [B,N,p*p*C], C fastest -> [B,C,h,w]
        g = self.grid
        p = self.patch_size
        v = tokens.view(-1, g, g, p, p, tokens.shape[2] // p ** 2)
        v = v.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, g * p, g * p)
        if not self.keep_sigma:
            v = v[:, :self.in_channels]                                     # the original SiT's second half is unused
        return -v if self.flip_time else v


# ---- path and loss

def _path(t, path, sin=torch.sin, cos=torch.cos):
    """Return alpha, sigma and their time derivatives of x_t = alpha x + sigma eps (SiT eq. 1).

    t is a tensor, or a number if sin and cos are those of math.
    """
    if path == "linear":
        return 1 - t, t, -1.0, 1.0
    if path == "cosine":
        k = math.pi / 2
        a = t * k
        return cos(a), sin(a), -k * sin(a), k * cos(a)
    raise ValueError(f"path {path!r} must be 'linear' or 'cosine'")


def interpolant(x, eps, t, path="linear"):
    """Return the noisy sample x_t and its velocity v = dx_t/dt (SiT eqs. 1, 5).

    x [B,...] clean, eps like x, t [B] in [0, 1].
    """
    alpha, sigma, d_alpha, d_sigma = _path(t.view(-1, *[1] * (x.ndim - 1)), path)
    x_t = alpha * x + sigma * eps
    v = d_alpha * x + d_sigma * eps
    return x_t, v


def flow_loss(model, x, y, t=None, eps=None, path="linear", label_drop=0.0):
    """Return the flow-matching loss E |model(x_t, t, y) - v|^2 (SiT eq. 5), in float32 or better.

    x [B,C,h,w] clean, y [B]. If None, t [B] is drawn uniformly, and eps, like x, normally.
    `label_drop` is the probability of replacing a label by the null label, `model.num_classes`.
    REPA and HASTE need more of the forward pass than this: haste.py has their step.
    """
    if t is None:
        t = torch.rand(len(x), device=x.device)                             # [B]  t=0 data, t=1 noise
    if eps is None:
        eps = torch.randn_like(x)
    if label_drop > 0:
        null = getattr(model, "module", model).num_classes                  # DDP hides attributes behind `module`
        y = torch.where(torch.rand(len(y), device=y.device) < label_drop, null, y)
    x_t, v = interpolant(x, eps, t, path)
    error = model(x_t.to(x.dtype), t, y) - v
    return error.to(torch.promote_types(error.dtype, torch.float32)).square().mean()


# ---- sampling: state in float64, network in the latent's own dtype

def _as_state(x):
    """Return x in float64, or in float32 on Apple's GPUs, which have nothing wider."""
    return x.float() if x.device.type == "mps" else x.double()


def _guided(velocity, y, dtype, cfg_scale, null_label, contrast):
    """Return f(x, t, guide) -> velocity in the state's dtype.

    With `guide` it is u + w (c - u), from evaluations with label (c) and without (u); else c alone.
    """
    if contrast is not None:
        weight, mean = contrast
        mean = _as_state(mean.to(y.device))
    null = null_label
    if null is None:
        null = getattr(velocity, "num_classes", None)
    if cfg_scale != 1 and null is None:
        raise ValueError("guidance needs the null label: pass null_label, or a velocity with the "
                         "attribute num_classes")
    if null is not None:
        null = torch.as_tensor(null).to(y)                                  # a class id, or a caption's features
    t_dtype = torch.promote_types(dtype, torch.float32)                     # t is never bfloat16

    def f(x, t, guide):
        x = x.to(dtype)
        ts = torch.full((len(x),), t, device=x.device, dtype=t_dtype)       # [B]
        if not guide:
            return _as_state(velocity(x, ts, y))
        labels = torch.cat([y, null.expand_as(y)])                          # [2B,...]: with label, then without
        v = velocity(torch.cat([x, x]), torch.cat([ts, ts]), labels)
        c, u = _as_state(v).chunk(2)
        v = u + cfg_scale * (c - u)
        if contrast is None:
            return v
        return (1 - weight) * v - weight * mean                             # (1 - w) v + w E[v], E[v] = -E[x]
    return f


@torch.no_grad()
def sample_ode(velocity, x, y, num_steps=50, cfg_scale=1.0, cfg_interval=(0.0, 1.0),
               null_label=None, heun=False, contrast=None):
    """Integrate dx = v dt (SiT eq. 2) from t = 1 to t = 0, in uniform steps of Euler or Heun.

    x [B,...] is noise, y class ids [B] or captions [B,L,C], null_label one.
    velocity(x, t [B], y) returns v. Guidance acts if cfg_scale != 1 and low <= t <= high.
    Heun's last step is Euler's, and its second evaluation keeps the guidance decision of the
    step's start. `contrast` is for a model of contrastive flow matching (2506.05350): its weight
    and the mean of its data [C,h,w], with which guided velocities are corrected.
    """
    f = _guided(velocity, y, x.dtype, cfg_scale, null_label, contrast)
    state = _as_state(x)
    times = np.linspace(1, 0, num_steps + 1).tolist()
    for i in range(num_steps):
        t = times[i]
        t_next = times[i + 1]
        guide = cfg_scale != 1 and cfg_interval[0] <= t <= cfg_interval[1]
        v = f(state, t, guide)
        if heun and i < num_steps - 1:
            v = (v + f(state + (t_next - t) * v, t_next, guide)) / 2
        state = state + (t_next - t) * v
    return state.to(x.dtype)


@torch.no_grad()
def sample_sde(velocity, x, y, num_steps=250, cfg_scale=1.0, cfg_interval=(0.0, 1.0),
               null_label=None, path="linear", last_step=0.04, randn=torch.randn_like,
               contrast=None):
    """Integrate the reverse SDE (SiT eq. 4, w_t = 2t) from t = 1 to t = 0.

        dx = (v - w_t s / 2) dt + sqrt(w_t) dW
        s = (r v - x) / (sigma^2 - r sigma' sigma),  r = alpha / alpha'         the score, SiT eq. 9

    num_steps - 1 noisy Euler-Maruyama steps reach t = last_step. The score blows up at 0, so the
    last step has no noise. randn(like) draws each step's noise. The rest is as in
    `sample_ode`.
    """
    f = _guided(velocity, y, x.dtype, cfg_scale, null_label, contrast)
    state = _as_state(x)
    times = [*np.linspace(1, last_step, num_steps).tolist(), 0.0]
    for i in range(num_steps):
        t = times[i]
        dt = times[i + 1] - t                                               # negative
        # Guidance may act on v: the drift is affine in v, and the two weights sum to one.
        v = f(state, t, cfg_scale != 1 and cfg_interval[0] <= t <= cfg_interval[1])

        alpha, sigma, d_alpha, d_sigma = _path(t, path, math.sin, math.cos)
        r = alpha / d_alpha
        w = 2 * t
        score = (r * v - state) / (sigma ** 2 - r * d_sigma * sigma)
        state = state + (v - 0.5 * w * score) * dt
        if i < num_steps - 1:
            state = state + math.sqrt(w * -dt) * randn(state)
    return state.to(x.dtype)


# ---- checkpoints

def read_checkpoint(path):
    """Return the contents of a torch checkpoint; never run code in it.

    Raises FileNotFoundError or ValueError, one line that names the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file: give the path of a "
                                f"checkpoint")
    try:
        # REPA's and HASTE's files carry their argparse.Namespace: it is data, so it may pass.
        # Mapped, since of a training checkpoint only the averaged weights are read.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True,
                              mmap=zipfile.is_zipfile(path))
    except Exception as e:
        raise ValueError(f"{path} is not a readable checkpoint: cut short, or another format "
                         f"({type(e).__name__})") from None


def _as_dict(x):
    if isinstance(x, argparse.Namespace):
        return vars(x)
    return x if isinstance(x, dict) else {}


def _unwrap(content):
    """Return the state dict (with `blocks.i` names) and the configuration of any checkpoint.

    The configuration is a dict of what the file itself says; it is empty for a bare state dict.
    """
    content = _as_dict(content)
    sd = _as_dict(content.get("ema", content))
    config = {**_as_dict(content.get("args")), **_as_dict(content.get("arch"))}
    config["packed_from"] = content.get("packed_from")
    config["contrast"] = content.get("contrast")
    if "x_embedder.proj.weight" not in sd:
        raise ValueError("holds no SiT (no tensor named x_embedder.proj.weight)")
    if not any(name.startswith("decoder_blocks.") for name in sd):
        return sd, config

    # REPA's older names: `decoder_blocks.i` follow the encoder's `blocks.i`
    encoder_depth = _count_blocks(sd)
    config["encoder_depth"] = encoder_depth
    renamed = {}
    for name, w in sd.items():
        if name.startswith("decoder_blocks."):
            _, i, rest = name.split(".", 2)
            name = f"blocks.{int(i) + encoder_depth}.{rest}"
        renamed[name] = w
    return renamed, config


def _count_blocks(sd):
    return len({name.split(".")[1] for name in sd if name.startswith("blocks.")})


def _heads(asked, config, D, q_norm):
    """Return the number of heads: as asked, or from q_norm, our configuration, or the table."""
    known = D // len(q_norm) if q_norm is not None else config.get("num_heads")
    if asked and known and asked != known:
        raise ValueError(f"has {known} attention heads, not {asked} (--num-heads)")
    by_width = {width: heads for _, width, heads in PUBLISHED.values()}
    heads = asked or known or by_width.get(D)
    if heads is None:
        raise ValueError(f"has width {D}, which is not a published size: pass num_heads "
                         f"(--num-heads)")
    return heads


@torch.no_grad()
def _sure_objective(raw):
    """Return the objective of a network of 2C outputs, "flow" or "ddpm", None if that is unclear.

    raw: without flip_time. On pure noise x the original SiT returns about -x at its time 0, a DiT
    about x at step 999. Time 0 counts first: 999 is not a time that a SiT knows.
    """
    shape = (raw.in_channels, raw.input_size, raw.input_size)
    B = -(-1024 // math.prod(shape))                                        # enough numbers for a correlation
    x = torch.randn(B, *shape, generator=torch.Generator().manual_seed(0))
    null = torch.full((B,), raw.num_classes)
    for objective, t, sign in (("flow", 0.0, -1), ("ddpm", 999.0, 1)):
        out = raw(x, torch.full((B,), t), null)[:, :raw.in_channels]
        correlation = torch.stack([x, out]).flatten(1).corrcoef()[0, 1]     # nan for a new network's zeros
        if sign * correlation > 0.5:
            return objective
    return None


def load_sit(path, num_heads=None, objective=None):
    """Load a SiT from any checkpoint: ours, REPA's, HASTE's (old names or new), the original SiT's.

    Eval mode, t = 1 is noise. Geometry comes from the tensors, the number of heads from
    `num_heads`, our configuration, or the table by width. The place of REPA's projector is not in
    the tensors: 8 blocks, unless the file says so. A DiT's file looks like the original SiT's: it
    is loaded with `objective` "ddpm", or if it says so itself. What else the file says becomes
    attributes: `objective` and `path` of its training, `packed_from`, the autoencoder of its
    latents, and `contrast` for the samplers.
    Raises FileNotFoundError or ValueError, one line that names the file.
    """
    if objective not in (None, "flow", "ddpm"):
        raise ValueError(f"objective {objective!r} must be flow or ddpm")
    content = read_checkpoint(path)
    try:
        model = _from_content(content, num_heads, objective)
    except KeyError as e:
        raise ValueError(f"{path}: the SiT in it has no tensor {e}") from None
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    return model.eval()


def _from_content(content, num_heads, objective):
    sd, config = _unwrap(content)
    D, C, p, _ = sd["x_embedder.proj.weight"].shape
    depth = _count_blocks(sd)
    q_norm = sd.get("blocks.0.attn.q_norm.weight")                          # [d]
    doubled = sd["final_layer.linear.weight"].shape[0] == 2 * p * p * C
    said = config.get("objective")                                          # ours says so itself
    if config.get("flip_time") or not doubled:
        said = "flow"
    if said and objective not in (None, said):
        raise ValueError(f"was trained with --objective {said}: give the same")
    objective = said or objective or "flow"
    keep = objective == "ddpm"
    arch = dict(
        input_size=math.isqrt(sd["pos_embed"].shape[1]) * p, patch_size=p, in_channels=C,
        hidden_size=D, depth=depth, num_heads=_heads(num_heads, config, D, q_norm),
        num_classes=len(sd["y_embedder.embedding_table.weight"]) - 1,
        qk_norm=q_norm is not None, learn_sigma=doubled, keep_sigma=keep,
        encoder_depth=config.get("encoder_depth") or min(8, depth))
    if "projectors.0.0.weight" in sd:
        arch["projector_dim"] = len(sd["projectors.0.0.weight"])
        arch["z_dim"] = len(sd["projectors.0.4.weight"])
    if "projectors.0.projection_layer.weight" in sd:
        kernel = sd["projectors.0.projection_layer.weight"]
        arch["projector_kernel"] = kernel.shape[2]
        arch["z_dim"] = len(kernel)

    model = SiT(**arch)
    try:
        model.load_state_dict(sd)
    except RuntimeError as e:                                               # torch lists missing, unexpected, shapes
        raise ValueError(f"does not fit the model: {' '.join(str(e).split())[:300]}") from None
    if said is None and _sure_objective(model.eval()) not in (None, objective):
        found = "the original SiT: leave --objective ddpm out"
        if not keep:
            found = "a DiT: give --objective ddpm"
        raise ValueError(f"holds {found}")
    model.objective = objective
    model.flip_time = doubled and not keep                                  # the original SiT's runs from noise to data
    path = config.get("path_type") or config.get("path")                    # REPA's word and ours
    model.path = "cosine" if str(path).lower() in ("cosine", "gvp") else "linear"
    model.packed_from = config.get("packed_from")
    model.contrast = config.get("contrast")
    return model
