"""xAR: next-X prediction with noisy context. Entities, model, loss, cached sampler and the two programs, in one file.

    python xar.py train                                          next-cell on digits, minutes on two CPU cores: out/xar
    python xar.py sample --ckpt out/xar/ckpt.pt --cfg 1.5        draws a grid of samples: out/xar/grid.png
    torchrun --nproc_per_node=8 xar.py train --preset imagenet256-b --data PACKED        one process a GPU

Paper: xAR, "Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation" (Ren et al. 2025, arXiv
2502.20388); its stochastic sampler is SiT's (Ma et al. 2024, 2401.08740).

An image's tokens fall into an ordered list of entities X_0 ... X_{M-1}: single tokens, cells, interleaved sets, scales.
Time runs from t = 0 (data) to t = 1 (noise), and every entity n has its own t_n:
    x_n = (1 - t_n) X_n + t_n eps_n        v_n = eps_n - X_n
One forward predicts all v_n; entity n sees itself and the earlier entities, which are noisy too. So training never
relies on perfect context (teacher forcing), which sampling does not have. Sampling makes one entity after another by
flow matching; a finished one enters a cache of keys and values, once, at t = 0.

Letters: B batch, C channels, h w height and width of the latent, G = h = w grid, g grid of a level, M entities,
L tokens, D width, H heads, d = D/H.
"""
import argparse
import math
import pickle
import re
import struct
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# the published sizes; Ti (ours) is the one that a laptop trains on the digits
XAR_CONFIGS = {
    "xAR-Ti": dict(dim=64, encoder_depth=3, decoder_depth=3, num_heads=4),
    "xAR-B": dict(dim=768, encoder_depth=8, decoder_depth=8, num_heads=12),
    "xAR-L": dict(dim=1024, encoder_depth=16, decoder_depth=16, num_heads=16),
    "xAR-H": dict(dim=1280, encoder_depth=20, decoder_depth=20, num_heads=16),
}
CONTEXTS = ("random", "increasing", "decreasing", "clean")
EPS, LAST_STEP = 1e-6, 0.04                                                 # of norms; SiT's last noisy time
FLEX_TOKENS, FLEX_WIDTH = 1024, 16                                          # where FlexAttention pays; narrowest head


# ---- entities: an ordered list of (g, raster indices into the g x g grid); all the rest derives from this list

def cells(G, k):
    """k x k neighbours, cells in raster order."""
    return [(G, i) for i in np.arange(G * G).reshape(G // k, k, G // k, k).transpose(0, 2, 1, 3).reshape(-1, k * k)]


def subsamples(G, s):
    """Every s-th token in both directions: s x s interleaved sets."""
    return [(G, i) for i in np.arange(G * G).reshape(G // s, s, G // s, s).transpose(1, 3, 0, 2).reshape(s * s, -1)]


def scales(G):
    """Coarse to fine: the average-pooled latent, its grid halved while even; the last level is the image."""
    coarser = scales(G // 2) if G % 2 == 0 else []
    return [*coarser, (G, np.arange(G * G))]


def entities(name, G):
    """The list for `patch`, `cell:k`, `subsample:s`, `scale` or `image` on a G x G grid. Raises ValueError."""
    whole = {"patch": lambda: cells(G, 1), "scale": lambda: scales(G), "image": lambda: cells(G, G)}
    if name in whole:
        return whole[name]()
    found = re.fullmatch(r"(cell|subsample):(\d+)", name, re.ASCII)
    if not found:
        raise ValueError(f"entity {name} is none of patch, cell:k, subsample:s, scale, image")
    side = int(found[2])
    if side < 1 or G % side:
        raise ValueError(f"entity {name} does not divide the grid: {G} must be a multiple of its number")
    return (cells if found[1] == "cell" else subsamples)(G, side)


def per_token(c, sizes):
    """[B,M,D] -> what broadcasts over tokens: [B,M,1,D] over entities of equal size [B,M,n,D]; else [B,1,L,D]."""
    if len(set(sizes)) == 1:
        return c[:, :, None]                                                # [B,M,1,D]
    return torch.cat([row.expand(-1, n, -1) for row, n in zip(c.split(1, dim=1), sizes)], dim=1)[:, None]   # [B,1,L,D]


# ---- block-causal attention

def visible(entity_of, q, k):
    """May token q see token k? entity_of [L]; positions L ... 2L - 1 are the noisy copy of teacher forcing.

    Positions below L see their own and earlier entities. A noisy copy sees itself and the clean entities before it.
    """
    L = len(entity_of)
    e_q, e_k = entity_of[q % L], entity_of[k % L]
    return torch.where(q < L, (k < L) & (e_q >= e_k), torch.where(k < L, e_q > e_k, e_q == e_k))


@lru_cache(maxsize=8)
def flex_mask(entity, G, M, length, device):
    """FlexAttention's form of `visible`, for the first M entities."""
    from torch.nn.attention.flex_attention import create_block_mask
    sizes = [len(i) for _, i in entities(entity, G)[:M]]
    with torch.inference_mode(False):                                       # it is kept: training may want it as well
        entity_of = torch.repeat_interleave(torch.arange(M), torch.tensor(sizes)).to(device)
        return create_block_mask(lambda b, h, q, k: visible(entity_of, q, k), None, None, length, length, device=device)


@lru_cache(maxsize=1)
def compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention)                                    # without it, it would write down the map


def turn(x, cos, sin):
    """Rotary embedding of x [...,N,d], pairs interleaved; cos and sin [N,d/2]."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


class Attention(nn.Module):
    def __init__(self, dim, num_heads, dropout, attn_dropout):
        super().__init__()
        self.num_heads, self.attn_dropout = num_heads, attn_dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, rope, mask, past):
        """x [B,...,D]; past: keys and values of finished entities or None. Returns the output and past with x's own."""
        qkv = self.qkv(x).view(len(x), -1, 3, self.num_heads, x.shape[-1] // self.num_heads)
        qk, v = qkv.permute(2, 0, 3, 1, 4).split([2, 1])                    # [2,B,H,N,d], [1,B,H,N,d]
        (q, k), v = turn(qk, *rope).type_as(v), v[0]                        # three of [B,H,N,d]
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        if mask is None or isinstance(mask, torch.Tensor):
            dropout = self.attn_dropout if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout)    # [B,H,N,d]
        else:
            out = compiled_flex_attention()(q, k, v, block_mask=mask)
        return self.drop(self.proj(out.transpose(1, 2).reshape(x.shape))), (k, v)


# ---- small modules

class TimeEmbedder(nn.Module):
    """t [B,M] in [0, 1] -> [B,M,D]. The official network knows whole thousandths only (`quantize`)."""

    def __init__(self, dim, quantize, frequencies=128):
        super().__init__()
        self.quantize, self.frequencies = quantize, frequencies
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        t = 1000 * t.to(torch.promote_types(t.dtype, torch.float32))        # 8 bits of mantissa would blur t
        t = t.floor() if self.quantize else t
        i = torch.arange(self.frequencies, device=t.device, dtype=t.dtype)
        args = t[..., None] * torch.exp(-math.log(10000) / self.frequencies * i)            # [B,M,128]
        return self.mlp(torch.cat([args.cos(), args.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class Mlp(nn.Module):
    def __init__(self, dim, dropout):
        super().__init__()
        hidden = int(4 * dim * 2 / 3)
        self.fc1_g = nn.Linear(dim, hidden)
        self.fc1_x = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return self.drop(self.fc2(F.gelu(self.fc1_g(x)) * self.fc1_x(x)))


class Block(nn.Module):
    def __init__(self, dim, num_heads, dropout, attn_dropout):
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=EPS, elementwise_affine=False)      # sums in float32 whatever its input
        self.attn = Attention(dim, num_heads, dropout, attn_dropout)
        self.mlp = Mlp(dim, dropout)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, sizes, rope, mask, past):                       # x [B,M,n,D], c [B,M,D]
        gamma1, gamma2, scale1, scale2, shift1, shift2 = per_token(self.ada_lin(c), sizes).chunk(6, dim=-1)
        out, present = self.attn(self.norm(x) * (1 + scale1) + shift1, rope, mask, past)
        x = x + gamma1 * out
        return x + gamma2 * self.mlp(self.norm(x) * (1 + scale2) + shift2), present


# ---- the model

class XAR(nn.Module):
    """Velocities of an image's entities, each given the earlier ones.

    `model(tokens, t, y)`: tokens [B,L,C] in entity order, t [B,M] in [0, 1], y [B] class ids (num_classes, or None, is
    no label) -> v [B,L,C]. The first entities alone may be given, with as many columns of t: later ones change nothing.
    `clean` like tokens is the context of teacher forcing: entity n then sees the clean entities before it, and itself.
    Parameter names are those of the official checkpoints; `quantize_t` is theirs too.
    """

    def __init__(self, grid=16, channels=16, dim=768, encoder_depth=8, decoder_depth=8, num_heads=12, num_classes=1000,
                 entity="cell:8", dropout=0.0, attn_dropout=0.0, quantize_t=False):
        super().__init__()
        if dim % (4 * num_heads):
            raise ValueError(f"width {dim} must be a multiple of 4 times the {num_heads} heads, for rotary embedding")
        self.grid, self.channels, self.num_classes = grid, channels, num_classes
        self.entity, self.attn_dropout = entity, attn_dropout
        parts = entities(entity, grid)
        self.sizes, self.levels = [len(i) for _, i in parts], sorted({g for g, _ in parts})
        place = dict(zip(self.levels, np.cumsum([0, *[g * g for g in self.levels]])))       # of a level in `order`
        row, col = np.concatenate([(np.stack(np.divmod(i, g)) + 0.5) * grid / g - 0.5 for g, i in parts], axis=1)
        d = dim // num_heads
        freqs = 10000.0 ** (-np.arange(d // 4) / (d / 4))
        angles = np.concatenate([np.outer(axis, freqs) for axis in (row, col)], axis=1)    # [L,d/2]
        constant = lambda name, value: self.register_buffer(name, torch.tensor(value), persistent=False)
        constant("order", np.concatenate([place[g] + i for g, i in parts]))                 # [L]
        constant("entity_of", np.repeat(np.arange(len(parts)), self.sizes))                 # [L]
        constant("rope_cos", np.cos(angles).astype(np.float32))
        constant("rope_sin", np.sin(angles).astype(np.float32))

        L = sum(self.sizes)
        self.class_emb = nn.Embedding(num_classes + 1, dim)                 # the last row is the null label of guidance
        self.time_embed = TimeEmbedder(dim, quantize_t)
        self.z_proj = nn.Linear(channels, dim)
        self.z_proj_ln = nn.RMSNorm(dim, eps=EPS)
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, L, dim))               # by place in the sequence
        self.encoder_blocks = nn.ModuleList(Block(dim, num_heads, dropout, attn_dropout) for _ in range(encoder_depth))
        self.encoder_norm = nn.RMSNorm(dim, eps=EPS)
        self.decoder_embed = nn.Linear(dim, dim)
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, L, dim))
        self.decoder_blocks = nn.ModuleList(Block(dim, num_heads, dropout, attn_dropout) for _ in range(decoder_depth))
        self.decoder_norm = nn.RMSNorm(dim, eps=EPS)
        self.pred = nn.Linear(dim, channels)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        for table in (self.class_emb.weight, self.encoder_pos_embed_learned, self.decoder_pos_embed_learned):
            nn.init.normal_(table, std=0.02)

    # -- images and token sequences

    def to_tokens(self, latent):
        """[B,C,h,w] -> [B,L,C] in entity order."""
        if latent.shape[1:] != (self.channels, self.grid, self.grid):
            raise ValueError(f"latent {list(latent.shape)} must be [B,{self.channels},{self.grid},{self.grid}]")
        levels = [latent if g == self.grid else F.adaptive_avg_pool2d(latent, g) for g in self.levels]
        return torch.cat([level.flatten(2) for level in levels], dim=2)[:, :, self.order].mT

    def to_latent(self, tokens):
        """[B,L,C] -> [B,C,h,w]; of the first entities alone, the image so far: zero where nothing is known.

        Of a pyramid it is the last level, enlarged to the grid where the sequence ends earlier.
        """
        B, N, C = tokens.shape
        flat = tokens.new_zeros(B, C, sum(g * g for g in self.levels))
        flat[:, :, self.order[:N]] = tokens.mT
        last = max(i for i in range(len(self.levels)) if sum(g * g for g in self.levels[:i]) < N)
        begin, g = sum(g * g for g in self.levels[:last]), self.levels[last]
        level, repeat = flat[:, :, begin:begin + g * g].view(B, C, g, g), self.grid // g
        return level.repeat_interleave(repeat, dim=2).repeat_interleave(repeat, dim=3)

    # -- network

    def forward(self, tokens, t, y=None, clean=None):
        M, N = t.shape[1], tokens.shape[1]
        sizes, rows = self.sizes[:M], torch.arange(N, device=tokens.device)
        if N != sum(sizes):
            raise ValueError(f"{N} tokens do not fit the {M} times: entities have {sizes} tokens")
        if clean is not None:
            tokens, t = torch.cat([clean, tokens], dim=1), torch.cat([torch.zeros_like(t), t], dim=1)
            sizes, rows = 2 * sizes, rows.repeat(2)
        if M == 1 and clean is None:
            mask = None
        elif (tokens.is_cuda and len(rows) >= FLEX_TOKENS and 2 * self.rope_cos.shape[1] >= FLEX_WIDTH
              and not (self.training and self.attn_dropout)):
            mask = flex_mask(self.entity, self.grid, M, len(rows), tokens.device)           # FlexAttention: no dropout
        else:
            i = torch.arange(len(rows), device=tokens.device)
            mask = visible(self.entity_of[:N], i[:, None], i)               # [L,L] or [2L,2L]
        return self.network(tokens, t, y, sizes, rows, mask)[0][:, -N:]

    def network(self, tokens, t, y, sizes, rows, mask=None, past=None):
        """tokens at the places `rows` of the sequence -> v, and the cache: keys and values [B,H,N,d] of each block.

        `past` is the cache of the finished entities, seen by all tokens.
        """
        y = torch.full((len(t),), self.num_classes, device=t.device) if y is None else y
        c = self.class_emb(y)[:, None] + self.time_embed(t)                 # [B,M,D]
        rope, cache = (self.rope_cos[rows], self.rope_sin[rows]), []
        by_entity = lambda x: x.unflatten(1, (len(sizes) if len(set(sizes)) == 1 else 1, -1))
        x = by_entity(self.z_proj_ln(self.z_proj(tokens) + self.encoder_pos_embed_learned[:, rows]))    # [B,M,n,D]
        for i, block in enumerate([*self.encoder_blocks, *self.decoder_blocks]):
            if i == len(self.encoder_blocks):
                x = self.decoder_embed(self.encoder_norm(x)) + by_entity(self.decoder_pos_embed_learned[:, rows])
            x, present = block(x, c, sizes, rope, mask, past and past[i])
            cache.append(present)
        return self.pred(self.decoder_norm(x)).flatten(1, 2), cache

    # -- loss

    def loss(self, latent, y=None, t=None, noise=None, label_drop=0.0, context="random", net=None):
        """Flow-matching loss E |v_n - (eps_n - X_n)|^2 over all entities, a scalar in float32 or better.

        latent [B,C,h,w], y [B] or None (no label); t [B,M] and noise [B,L,C] in entity order are drawn (logit-normal,
        normal) where None. `context`: times that are independent, sorted along the order, or clean earlier entities
        (teacher forcing; ours: the paper does not say how). `net` is called in the model's place: DDP's wrapper.
        """
        if context not in CONTEXTS:
            raise ValueError(f"context {context} is none of {', '.join(CONTEXTS)}")
        x, null = self.to_tokens(latent), self.num_classes                  # [B,L,C]
        x = x.to(torch.promote_types(x.dtype, torch.float32))               # the target is never bfloat16
        t = torch.randn(len(x), len(self.sizes), device=x.device).sigmoid() if t is None else t
        t = t.sort(dim=1, descending=context == "decreasing")[0] if context in ("increasing", "decreasing") else t
        eps = torch.randn_like(x) if noise is None else noise
        y = torch.full((len(x),), null, device=x.device) if y is None else y
        if label_drop > 0:
            y = torch.where(torch.rand(len(y), device=y.device) < label_drop, null, y)
        t_ = t[:, self.entity_of, None]                                     # [B,L,1]
        x_t, v = (1 - t_) * x + t_ * eps, eps - x                           # straight path, and its velocity
        clean = x.to(latent.dtype) if context == "clean" and len(self.sizes) > 1 else None
        error = (self if net is None else net)(x_t.to(latent.dtype), t, y, clean) - v
        return error.square().mean()

    # -- sampling

    @torch.no_grad()
    def sample(self, y, num_steps=40, cfg_scale=1.0, randn=torch.randn_like):
        """Latents [B,C,h,w] for class ids y [B], or for an int: that many without label. See `sample_tokens`."""
        return self.to_latent(self.sample_tokens(y, num_steps, cfg_scale, randn))

    @torch.no_grad()
    def sample_tokens(self, y, num_steps=40, cfg_scale=1.0, randn=torch.randn_like):
        """All entities [B,L,C], one after another, each by `reverse_sde`; finished ones are seen through the cache.

        Guidance grows along the order: entity n has u + w_n (c - u), w_n = 1 + (w - 1) n / (M - 1), w where M = 1.
        randn(like) is called on [B,tokens,C] in float64: an entity's first noise, then its num_steps - 1 noisy steps.
        Dropout is off. Raises ValueError for a label out of range.
        """
        device, dtype, null, M = self.pred.weight.device, self.pred.weight.dtype, self.num_classes, len(self.sizes)
        if isinstance(y, (int, np.integer)):
            y, cfg_scale = torch.full((max(0, int(y)),), null), 1.0         # c = u: nothing to guide
        y = torch.as_tensor(y).long()
        if y.ndim != 1 or not len(y):
            raise ValueError("y must be class ids [B], or a number of images, 1 or more")
        if not 0 <= y.min() <= y.max() <= null:
            raise ValueError(f"labels {y.min()} ... {y.max()} must lie in 0 ... {null - 1}; {null} is no label")
        y, B, done, cache, begin = y.to(device), len(y), [], None, 0
        both = y if cfg_scale == 1 else torch.cat([y, torch.full_like(y, null)])
        times = lambda t, labels: torch.full((len(labels), 1), t, device=device,
                                             dtype=torch.promote_types(dtype, torch.float32))
        with eval_mode(self):
            for n, size in enumerate(self.sizes):
                w = cfg_scale if M == 1 else 1 + (cfg_scale - 1) * n / (M - 1)
                rows = torch.arange(begin, begin + size, device=device)
                guided = len(both) > B and (n > 0 or M == 1)                # no evaluation without label where w = 1
                labels = both if guided else y

                def velocity(x, t):
                    x = x.to(dtype).repeat(len(labels) // B, 1, 1)
                    v = self.network(x, times(t, labels), labels, [size], rows, past=cache)[0].double()
                    return v[B:] + w * (v[:B] - v[B:]) if guided else v
                x = randn(torch.empty(B, size, self.channels, dtype=torch.float64, device=device))
                x = reverse_sde(velocity, x, num_steps, randn).to(dtype)
                if n < M - 1:                                               # it enters the cache once, at t = 0
                    twice = x.repeat(len(both) // B, 1, 1)
                    cache = self.network(twice, times(0.0, both), both, [size], rows, past=cache)[1]
                done.append(x)
                begin += size
        return torch.cat(done, dim=1)


@contextmanager
def eval_mode(model):
    """Without dropout; afterwards as it was, also after an error."""
    training = model.training
    try:
        yield model.eval()
    finally:
        model.train(training)


def reverse_sde(velocity, x, num_steps, randn, start=1.0):
    """Euler-Maruyama on SiT's reverse SDE (its eq. 4, w_t = 2t), x in float64 from t = `start` to 0.

        dx = (v - t s) dt + sqrt(2t) dW,  and with the score s = -((1 - t) v + x) / t,  v - t s = (2 - t) v + x
    num_steps - 1 noisy steps reach t = LAST_STEP, one without noise reaches 0. velocity(x, t) -> v.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps {num_steps} must be 1 or more")
    ts = torch.linspace(start, LAST_STEP, num_steps, dtype=torch.float64).tolist() + [0.0]
    for i, (t, t_next) in enumerate(zip(ts[:-1], ts[1:])):
        x = x + ((2 - t) * velocity(x, t) + x) * (t_next - t)
        if i < num_steps - 1:
            x = x + math.sqrt(2 * t * (t - t_next)) * randn(x)
    return x


def indexed_randn(seed, indices):
    """randn-like function in which sample i's numbers depend on (seed, i) alone, not on batch or process."""
    rngs = [np.random.default_rng([seed, int(i)]) for i in indices]

    def randn(like):
        noise = np.stack([r.standard_normal(like.shape[1:], dtype=np.float32) for r in rngs])
        return torch.from_numpy(noise).to(like.device, like.dtype)
    return randn


# ---- checkpoints

# what torch.load raises for files that are cut short, of another format, or hold code
UNREADABLE = (RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, struct.error,
              pickle.UnpicklingError)
OFFICIAL_ENTITY = "cell:8"


def load_xar(path, num_heads=None):
    """XAR from a checkpoint, ours or the official one; eval mode. Raises FileNotFoundError or ValueError, one line.

    Sizes come from the tensors. Files with `rope.*` are official: their tables tell the heads, cells are 8 x 8, times
    whole thousandths. Ours say the rest in "arch"; a bare state dict is taken for cells of 8 and a published width.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist or is no file: give the path of a checkpoint")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):        # theirs carry one: data, not code
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as e:
        raise ValueError(f"{path} is not a readable checkpoint: cut short, or another format "
                         f"({type(e).__name__})") from None
    try:
        content = content if isinstance(content, dict) else {}
        model = _from_content(content, num_heads).eval()
        model.packed_from = content.get("packed_from")                      # ours: the autoencoder of the latents
        return model
    except KeyError as e:
        raise ValueError(f"{path}: the xAR in it has no tensor {e}") from None
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def _from_content(content, num_heads):
    sd, told = content.get("model_ema", content.get("ema", content)), content.get("arch") or {}
    if not isinstance(sd, dict) or "z_proj.weight" not in sd:
        raise ValueError("holds no xAR (no tensor named z_proj.weight)")
    table = sd.get("encoder_blocks.0.attn.rope.freqs_cos")                  # [L,d], official files only
    sd = {k: w for k, w in sd.items() if ".rope." not in k and k != "mask"}
    (D, C), L = sd["z_proj.weight"].shape, sd["encoder_pos_embed_learned"].shape[1]
    published = {c["dim"]: c["num_heads"] for name, c in XAR_CONFIGS.items() if name != "xAR-Ti"}
    heads = num_heads or (D // table.shape[1] if table is not None else told.get("num_heads") or published.get(D))
    if not heads:
        raise ValueError(f"has width {D}, which is no published size: pass num_heads (--num-heads)")
    depth = lambda part: len({k.split(".")[1] for k in sd if k.startswith(f"{part}_blocks.")})
    model = XAR(told.get("grid") or math.isqrt(L), C, D, depth("encoder"), depth("decoder"), heads,
                len(sd["class_emb.weight"]) - 1, told.get("entity", OFFICIAL_ENTITY),
                quantize_t=table is not None or bool(told.get("quantize_t")))
    own = model.state_dict()
    shapes = [f"{k} {list(sd[k].shape)} instead of {list(w.shape)}"
              for k, w in own.items() if k in sd and sd[k].shape != w.shape]
    wrong = {"missing": own.keys() - sd.keys(), "unexpected": sd.keys() - own.keys(), "of another shape": shapes}
    if any(wrong.values()):
        short = lambda s: ", ".join(sorted(s)[:4]) + (f" and {len(s) - 4} more" if len(s) > 4 else "")
        raise ValueError("does not fit the model: " + "; ".join(f"{k} {short(v)}" for k, v in wrong.items() if v))
    model.load_state_dict(sd)
    return model


# ---- the training program

@dataclass
class Config:
    # what to train on
    data: str = "digits"  # digits, cifar10, mnist, fashionmnist, a folder of class folders, or of data.py prepare
    image_size: Optional[int] = None  # side to which a folder's images are cropped; needed for photographs
    data_root: str = "out/data"  # where torchvision's sets are kept once downloaded
    mirror: bool = False  # mirror half of the images at random
    latent_channels: Optional[int] = None  # channels that packed latents must have: 16 of KL-16; None is any
    vae: Optional[str] = None  # decoder of packed data's samples, sd-ema, sd-mse or a file; None is the data's own
    # the model
    model: str = "xAR-Ti"  # a size of xar.XAR_CONFIGS: xAR-Ti, B, L or H
    depth: Optional[int] = None  # number of blocks, half encoder and half decoder, where it is not the size's own
    hidden_size: Optional[int] = None  # width, where it is not the size's own
    num_heads: Optional[int] = None  # attention heads, where they are not the size's own
    entity: str = "cell:4"  # what X is: patch, cell:k, subsample:s, scale or image
    context: Literal["random", "increasing", "decreasing", "clean"] = "random"  # noise of the entities along the order
    dropout: float = 0.0  # dropout after attention and MLP; the paper's is 0.1
    attn_dropout: float = 0.0  # dropout of attention; the paper's is 0.1
    label_drop: float = 0.1  # share of samples trained without label, for guidance
    # optimisation
    steps: int = 1000  # optimizer steps
    batch_size: int = 32  # images a step, over all processes
    accumulate: int = 1  # parts into which a process cuts its batch
    lr: float = 4e-3  # learning rate of AdamW
    warmup: float = 0.125  # share of the steps in which the learning rate rises
    decay: float = 0.25  # share of the steps, the last ones, in which it falls along a cosine
    lr_end: float = 1e-4  # where it ends; the paper's goes from 4e-4 to 1e-5
    beta2: float = 0.96  # second-moment decay of AdamW
    weight_decay: float = 0.02  # weight decay of AdamW, on tensors of two or more dimensions
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.98  # decay of the averaged weights, the ones that are sampled
    # the machine
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto is bf16 on CUDA, fp32 on CPU
    compile: bool = False  # torch.compile the model
    # the run
    seed: int = 0  # of everything random
    out: str = "out/xar"  # folder for log.jsonl, ckpt.pt, samples.png, growth.png, curves.png
    resume: str = "auto"  # auto (go on from OUT/ckpt.pt), never (start anew), or a checkpoint's path
    log_every: int = 20  # steps between two lines of the log
    save_every: int = 500  # steps between two checkpoints; 0 saves at the end only
    eval_every: int = 500  # steps between two evaluations; 0 evaluates never
    eval_samples: int = 500  # images drawn for an evaluation
    eval_steps: int = 20  # sampling steps of each entity in an evaluation
    eval_cfg: float = 1.0  # guidance scale of an evaluation


FREE = ("steps", "out", "device", "resume", "log_every", "save_every", "eval_every", "data_root", "accumulate",
        "vae")
# ImageNet, packed with KL-16 and mirror images: the paper's 800 epochs of 1,281,167 images
IMAGENET = dict(data="out/imagenet256-kl16", image_size=256, latent_channels=16, mirror=True, entity="cell:8",
                dropout=0.1, attn_dropout=0.1, steps=500_456, batch_size=2048, lr=4e-4, lr_end=1e-5, ema=0.9999,
                log_every=100, save_every=5000, eval_every=25_000, eval_samples=1000, eval_steps=40)
PRESETS = {
    "digits": dict(),
    # CIFAR-10 at 32 x 32 pixels, 1,024 tokens in 16 cells, for one GPU
    "cifar10": dict(data="cifar10", mirror=True, hidden_size=384, depth=12, num_heads=6, entity="cell:8", dropout=0.1,
                    attn_dropout=0.1, steps=50_000, batch_size=256, lr=4e-4, lr_end=1e-5, ema=0.9995, log_every=100,
                    save_every=5000, eval_every=5000, eval_samples=2000, eval_steps=40),
    "imagenet256-b": dict(IMAGENET, model="xAR-B"),                         # FID 1.72 with 40 steps, guidance 2.7
    "imagenet256-l": dict(IMAGENET, model="xAR-L"),                         # 1.28 with 50 steps, 2.3
    "imagenet256-h": dict(IMAGENET, model="xAR-H"),                         # 1.24 with 50 steps, 2.2
}


def check(cfg, world):
    """Refuse impossible values, with flag and remedy, before anything is loaded. Returns the model's size."""
    import run
    run.check(cfg, world, least_zero=("lr_end",))
    for name in ("dropout", "attn_dropout", "warmup", "decay"):
        run.need(cfg, 0 <= getattr(cfg, name) < 1, name, "must lie in [0, 1)")
    run.need(cfg, cfg.warmup + cfg.decay <= 1, "warmup", f"must leave room for --decay {cfg.decay}: shares of --steps")
    run.need(cfg, cfg.model in XAR_CONFIGS, "model", f"is none of {', '.join(XAR_CONFIGS)}")
    run.need(cfg, (cfg.depth or 2) % 2 == 0, "depth", "must be even: half encoder, half decoder")
    size = XAR_CONFIGS[cfg.model]
    half, dim, heads = cfg.depth and cfg.depth // 2, cfg.hidden_size or size["dim"], cfg.num_heads or size["num_heads"]
    if dim % (4 * heads):
        raise ValueError(f"--hidden-size {dim} must be a multiple of 4 x --num-heads {heads}")
    return dict(dim=dim, num_heads=heads, encoder_depth=half or size["encoder_depth"],
                decoder_depth=half or size["decoder_depth"])


def prepare(cfg, size, saved, processes):
    """Data and student, fresh or from a checkpoint: all that can fail because of the user fails here."""
    import data
    import run
    images = processes.first(lambda: data.open_data(cfg.data, cfg.image_size, cfg.data_root))
    run.check_data(cfg, images, saved, grid=images.shape[1], channels=images.shape[0])
    arch = saved["arch"] if saved else dict(size, grid=images.shape[1], channels=images.shape[0], entity=cfg.entity,
                                            num_classes=len(images.classes), dropout=cfg.dropout,
                                            attn_dropout=cfg.attn_dropout)
    torch.manual_seed(cfg.seed)
    try:
        model = XAR(**arch)
    except ValueError as e:
        raise ValueError(f"--{e}") from None                                # "--entity cell:3 does not divide ..."
    student = run.Student(model, cfg, processes, decay_vectors=False)
    if saved:
        student.load(saved)
    return images, student, arch


def learning_rate(cfg, step):
    """Linear warm-up, constant, cosine; the times are shares of --steps."""
    done = (step + 1) / cfg.steps
    falling = max(0.0, done - (1 - cfg.decay)) / cfg.decay if cfg.decay else 0.0            # 0 ... 1
    return (min(1, done / cfg.warmup) if cfg.warmup else 1) * (
        cfg.lr_end + (cfg.lr - cfg.lr_end) * (1 + math.cos(math.pi * falling)) / 2)


def draw(cfg, step, model, device, packed=False):
    """All that is random in a step but dropout, for the global batch: eps [B,L,C], t [B,M], dropped, mirrored [B].

    And the noise of the autoencoder's posterior [B,C,h,w], where the data is packed, else empty.
    """
    import run
    g, B = run.seeded(device, cfg.seed, 0, step), cfg.batch_size
    eps = torch.randn(B, sum(model.sizes), model.channels, generator=g, device=device)
    t = torch.randn(B, len(model.sizes), generator=g, device=device).sigmoid()
    dropped, mirrored = torch.rand(2, B, generator=g, device=device)
    shape = (model.channels, model.grid, model.grid) if packed else (0,)
    posterior = torch.randn(B, *shape, generator=g, device=device)
    return eps, t, dropped < cfg.label_drop, mirrored < (0.5 if cfg.mirror else 0), posterior


def indexed_sample(model, rows, num_steps, cfg_scale, seed, y=None):
    """Latents [b,C,h,w] of the indices `rows`: each one's noise depends on (seed, index) alone; y [b], or in turn."""
    y = rows % model.num_classes if y is None else y
    return model.sample(y, num_steps, cfg_scale, indexed_randn(seed, rows))


def growth(model, num_steps, cfg_scale, seed, num=8, columns=16):
    """[frames,C,h,w] and frames a row: `num` samples, each after its first entity, its second, ... (at most 16)."""
    rows = torch.arange(num)
    tokens = model.sample_tokens(rows % model.num_classes, num_steps, cfg_scale, indexed_randn(seed, rows))
    ends = np.cumsum(model.sizes)[np.unique(np.linspace(0, len(model.sizes) - 1, columns).round().astype(int))]
    return torch.stack([model.to_latent(tokens[:, :end]) for end in ends], dim=1).flatten(0, 1), len(ends)


def train(cfg, processes, stop):
    import data
    import evaluate
    import run
    with run.one_line("xar.py"):
        size, modules = check(cfg, processes.world), (sys.modules[__name__], data, run)
        saved, code = run.resume_point(cfg, FREE, modules, processes), run.code_hash(*modules)
        if saved and saved["steps"] >= cfg.steps:
            return
        images, student, arch = prepare(cfg, size, saved, processes)
        sets = evaluate.reference(images) if cfg.eval_every and processes.main else None
        decode = cfg.eval_every and processes.first(lambda: evaluate.decoder(images.packed, cfg.vae, images.shape[0],
                                                                             processes.device))
    device, world, autocast = processes.device, processes.world, run.autocast(cfg.precision, processes.device)
    book, packed = run.Book(cfg, saved, student, processes, stop, arch=arch, code=code,
                            packed_from=images.packed), images.packed
    del saved
    share, part = cfg.batch_size // world, cfg.batch_size // world // cfg.accumulate
    mine = slice(processes.rank * share, (processes.rank + 1) * share)      # this process's rows of a global batch
    feed = data.batches(images.train, cfg.seed, book.start, cfg.batch_size, mine, pin=device.type == "cuda",
                        wanted=lambda step: False)                          # of packed data the moments alone
    model, null = student.model, student.model.num_classes
    processes.print(f"{cfg.model}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; "
                    f"{len(model.sizes)} entities ({cfg.entity}) of {sum(model.sizes)} tokens, {cfg.context} context; "
                    f"{world} process(es) on {device.type}, {run.precision(cfg.precision, device)}")

    def look():                                                             # an evaluation's numbers for the log
        how = cfg.eval_steps, cfg.eval_cfg, cfg.seed

        def sampled(rows):
            with autocast:
                return data.to_uint8(decode(indexed_sample(student.ema, rows, *how)))
        samples = evaluate.draw_samples(cfg.eval_samples, sampled, processes)
        if not processes.main:
            return {}
        evaluate.sample_sheet(samples, null, book.out / "samples.png")
        with autocast:
            frames, columns = growth(student.ema, *how)
        data.save_grid(data.to_uint8(decode(frames)), book.out / "growth.png", columns)
        return evaluate.scores(samples, sets, null)

    for step in range(book.start, cfg.steps):
        # learning rate
        lr = learning_rate(cfg, step)

        # batch: everything random is drawn for the global batch, and sliced; but dropout is each process's own
        with run.one_line("xar.py"):
            pixels, moments, y = book.batch(feed, step)
        eps, t, dropped, mirrored, posterior = (r[mine] for r in draw(cfg, step, model, device, packed))
        pixels, y = data.mirror(pixels, mirrored), torch.where(dropped, null, y)
        x = data.to_latents(moments, mirrored, posterior, packed["scale"]) if packed else data.to_pixels(pixels)
        torch.manual_seed(run.seeded("cpu", cfg.seed, 1, step, processes.rank).initial_seed())

        # forward and backward, in `accumulate` parts
        total = 0
        for i in range(0, share, part):
            rows = slice(i, i + part)
            with student.net.no_sync() if world > 1 and i + part < share else nullcontext():
                with autocast:
                    loss = model.loss(x[rows], y[rows], t[rows], eps[rows], context=cfg.context, net=student.net)
                (loss / cfg.accumulate).backward()
            total = total + loss.detach() / cfg.accumulate

        # step and average; log, sample, save
        norm = student.step(lr, cfg.clip)
        if book.close_step(step, lr, norm, {"loss": total}, look):
            break
    feed.close()
    rows = run.read_log(book.out / "log.jsonl")
    if processes.main and rows:
        evaluate.plot_curves(rows, book.out / "curves.png", math.inf)
        evaluate.tell(rows, book.out, f"python xar.py sample --ckpt {book.out}/ckpt.pt --cfg 1.5   draws more; "
                                      f"python xar.py train --entity scale --out out/scale   grows coarse to fine")


# ---- the sampling program

def sample_images(argv):
    import run
    parser = run.Parser("xar.py sample", description="Sample images from a checkpoint.")
    parser.add_argument("--ckpt", default="out/xar/ckpt.pt", help="checkpoint of xar.py train")
    parser.add_argument("--num", type=int, default=100, help="number of images")
    parser.add_argument("--label", type=int, help="class of all images")
    parser.add_argument("--labels", choices=("balanced", "random"), default="balanced", help="in turn, or by index")
    parser.add_argument("--to-uint8", choices=("round", "truncate"), default="round", help="from [-1, 1] to 0 ... 255")
    parser.add_argument("--cfg", type=float, default=1.0, help="guidance scale of the last entity; 1 is none")
    parser.add_argument("--steps", type=int, default=40, help="sampling steps of each entity")
    parser.add_argument("--seed", type=int, default=0, help="sample i depends on (seed, i) alone")
    parser.add_argument("--batch-size", type=int, default=100, help="images at a time")
    parser.add_argument("--num-heads", type=int, help="attention heads, where the checkpoint cannot tell")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto is bf16 on CUDA")
    parser.add_argument("--vae", help="decoder of latents: sd-ema, sd-mse or a file; else what the checkpoint says")
    parser.add_argument("--out", default="out/xar/grid.png", help="a picture (.png), or all images for fid.py (.npz)")
    args = parser.parse_args(argv)
    with run.one_line("xar.py"):
        if Path(args.out).suffix.lower() not in (".png", ".npz"):
            raise ValueError(f"--out {args.out} must end in .png or .npz")
        for name, least in (("num", 1), ("steps", 1), ("batch_size", 1), ("seed", 0), ("num_heads", 1)):
            value = getattr(args, name)
            run.need(args, value is None or value >= least, name, f"must be {least} or more")
        processes = run.Processes(args.device, hours=48)                    # some may be done long before others
    try:
        with run.one_line("xar.py"):
            draw_images(args, processes)
    finally:
        processes.close()


def draw_images(args, processes):
    import evaluate
    import run
    device = processes.device
    model = load_xar(args.ckpt, args.num_heads).to(device)
    if args.label is not None and not 0 <= args.label < model.num_classes:
        raise ValueError(f"--label {args.label} must lie in 0 ... {model.num_classes - 1}, the model's classes")
    decode = processes.first(lambda: evaluate.decoder(model.packed_from, args.vae, model.channels, device))
    autocast = run.autocast(args.precision, device)

    def labels_of(rows):
        if args.label is not None:
            return torch.full_like(rows, args.label)
        if args.labels == "balanced":
            return rows % model.num_classes
        return torch.tensor([np.random.default_rng([args.seed, int(i), 1]).integers(model.num_classes) for i in rows])

    def draw(rows):
        with autocast:
            x = indexed_sample(model, rows, args.steps, args.cfg, args.seed, labels_of(rows))
        return evaluate.to_bytes(decode(x), args.to_uint8)
    free = ("ckpt", "num", "batch_size", "device", "out")                   # the rest says what the samples are
    settings = {**{k: v for k, v in vars(args).items() if k not in free},
                "precision": run.precision(args.precision, device)}
    columns = 10 if args.label is not None or args.labels == "random" else min(10, model.num_classes)
    evaluate.write_samples(args.out, args.num, draw, labels_of, args.batch_size, processes, model, settings, columns)


def main(argv=None):
    import run
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["sample"]:
        return sample_images(argv[1:])
    if argv[:1] != ["train"]:
        raise SystemExit("xar.py: say what to do, python xar.py train, or python xar.py sample (--help lists flags)")
    cfg = run.parse(Config, argv[1:], "xar.py train", "Train xAR.", PRESETS)
    with run.one_line("xar.py"):
        processes = run.Processes(cfg.device)
    try:
        with run.StopSignal(processes) as stop, run.one_line("xar.py", OSError):            # a full disk, in mid-run
            train(cfg, processes, stop)
    finally:
        processes.close()


if __name__ == "__main__":
    main()
