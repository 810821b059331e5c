"""xAR: next-X prediction with noisy context. Entities, network, loss, cached sampler, checkpoints.

    model = xar.XAR(grid=16, channels=16, entity="cell:8", **xar.XAR_CONFIGS["xAR-B"])
    loss = model.loss(x, y, label_drop=0.1)             # training: x [B,C,h,w], y [B] class ids
    x = model.sample(y, num_steps=40, cfg_scale=2.7)
    model = xar.load_xar("xAR-B.pth")                   # the official checkpoints, and ours

Papers: xAR (Ren et al. 2025, arXiv 2502.20388); SiT's sampler (Ma et al. 2024, 2401.08740).

An image's tokens form an ordered list of entities X_0 ... X_{M-1}: single tokens, cells,
interleaved sets, or scales. Time runs from t = 0 (data) to t = 1 (noise), for each entity its own:
    x_n = (1 - t_n) X_n + t_n eps_n        v_n = eps_n - X_n
One forward pass predicts all v_n. Entity n sees itself and the earlier entities, which are noisy
too: the model never learns to rely on a perfect context, which it will not have when it samples.
Sampling makes one entity after another by flow matching; a finished one enters a cache of keys and
values, once, at t = 0.

Letters: B batch, C channels, h w height and width of the latent, G = h = w grid, g grid of a level,
M entities, L tokens in all, N in a call, m in an entity, D width, H heads, d = D/H.
"""
import argparse
import math
import re
import zipfile
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# The paper's sizes: 172.6, 608.4 and 1,186 M parameters. Ti (ours) is the one that a laptop trains.
PUBLISHED = {
    "xAR-B": dict(dim=768, encoder_depth=8, decoder_depth=8, num_heads=12),
    "xAR-L": dict(dim=1024, encoder_depth=16, decoder_depth=16, num_heads=16),
    "xAR-H": dict(dim=1280, encoder_depth=20, decoder_depth=20, num_heads=16),
}
XAR_CONFIGS = {"xAR-Ti": dict(dim=64, encoder_depth=3, decoder_depth=3, num_heads=4), **PUBLISHED}
CONTEXTS = ("random", "increasing", "decreasing", "clean")
EPS = 1e-6  # of all norms
LAST_STEP = 0.04  # the sampler's last noisy time, SiT's
# up to so many entities, of so many tokens or more on average, get a call of attention each
MOST_CALLS = 16
TOKENS_A_CALL = 32


# ---- entities: lists of (g, raster indices into the g x g grid); all else derives from them

def cells(G, k):
    """Return the cells of k x k neighbouring tokens, in raster order."""
    index = np.arange(G * G).reshape(G // k, k, G // k, k)  # row of cells, row in cell, columns alike
    return [(G, i) for i in index.transpose(0, 2, 1, 3).reshape(-1, k * k)]


def subsamples(G, s):
    """Return s x s interleaved sets, each of every s-th token in both directions."""
    index = np.arange(G * G).reshape(G // s, s, G // s, s)  # axes 1 and 3 choose the set
    return [(G, i) for i in index.transpose(1, 3, 0, 2).reshape(s * s, -1)]


def scales(G):
    """Return a pyramid, coarse to fine: the grid halved while even; the last level is the image."""
    coarser = scales(G // 2) if G % 2 == 0 else []
    return [*coarser, (G, np.arange(G * G))]


def entities(name, G):
    """Return the entities of a G x G grid, in their order.

    `name` is patch, cell:k, subsample:s, scale or image. Raises ValueError for any other.
    """
    if name == "patch":
        return cells(G, 1)
    if name == "scale":
        return scales(G)
    if name == "image":
        return cells(G, G)
    found = re.fullmatch(r"(cell|subsample):(\d+)", name, re.ASCII)
    if not found:
        raise ValueError(f"entity {name} is none of patch, cell:k, subsample:s, scale, image")
    side = int(found[2])
    if side < 1 or G % side:
        raise ValueError(f"entity {name} does not divide the grid: "
                         f"{G} must be a multiple of its number")
    return cells(G, side) if found[1] == "cell" else subsamples(G, side)


# ---- attention

def visible(entity_of, copies=1):
    """Return which token (row) may see which, a boolean [N,N]; entity_of [N].

    With two copies [2N,2N], the second one is noisy (teacher forcing). It sees itself and the clean
    entities before it, but not its own clean original.
    """
    own = entity_of[:, None] == entity_of
    sees = entity_of[:, None] >= entity_of
    if copies == 1:
        return sees
    first = torch.cat([sees, torch.zeros_like(own)], dim=1)
    second = torch.cat([sees & ~own, own], dim=1)
    return torch.cat([first, second])


def needs_mask(M, N):
    """Return whether attention among M entities of N tokens in all uses a mask."""
    return M > 1 and (M > MOST_CALLS or N < TOKENS_A_CALL * M)


def attention(q, k, v, sizes, mask, dropout):
    """Return softmax(q k^T / sqrt(d)) v, where q [B,H,N,d] are of the last tokens in k and v.

    Entities of `sizes` see themselves and all before, unless a mask [N,N] says who sees whom.
    """
    if mask is not None:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout)
    before = k.shape[2] - q.shape[2]
    outs = []
    for q_n, end in zip(q.split(sizes, dim=2), accumulate(sizes)):
        k_n = k[:, :, :before + end]  # the keys up to the entity's end
        v_n = v[:, :, :before + end]
        outs.append(F.scaled_dot_product_attention(q_n, k_n, v_n, None, dropout))
    return torch.cat(outs, dim=2)


def rope_angles(rows, cols, d):
    """Return the rotary angles [L,d/2] of tokens at rows and cols [L]: one half for each axis."""
    freqs = 10000.0 ** (-np.arange(d // 4) / (d / 4))
    return np.concatenate([np.outer(rows, freqs), np.outer(cols, freqs)], axis=1)


def rotate(x, cos, sin):
    """Apply the rotary embedding to x [...,N,d] with interleaved pairs; cos and sin [N,d/2]."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


class Attention(nn.Module):
    def __init__(self, dim, num_heads, dropout, attn_dropout):
        super().__init__()
        self.num_heads = num_heads
        self.attn_dropout = attn_dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, sizes, rope, mask, past):
        """Return (output, (q, k)) for x [B,groups,m,D]; past: (kv_cache [2,B,H,L,d], begin)."""
        head_width = x.shape[-1] // self.num_heads
        qkv = self.qkv(x).view(len(x), -1, 3, self.num_heads, head_width)
        qk, v = qkv.permute(2, 0, 3, 1, 4).split([2, 1])  # [2,B,H,N,d], [1,B,H,N,d]
        q, k = rotate(qk, *rope).type_as(v)
        v = v[0]
        if past is not None:
            kv_cache, begin = past
            known = kv_cache[:, :len(x), :, :begin + sum(sizes)]
            known[0, :, :, begin:] = k
            known[1, :, :, begin:] = v
            k, v = known

        dropout = self.attn_dropout if self.training else 0.0
        out = attention(q, k, v, sizes, mask, dropout)  # [B,H,N,d]
        return self.drop(self.proj(out.transpose(1, 2).reshape(x.shape))), (q, k)


# ---- modules

# Modulation is one vector an entity, broadcast over the tokens of a group. Entities of equal size
# are a group each: x [B,M,m,D], modulation [B,M,1,D], nothing is copied. A pyramid's levels differ
# in size, so all tokens are one group: x [B,1,N,D], modulation the same.

def count_groups(sizes):
    return len(sizes) if len(set(sizes)) == 1 else 1


def per_token(c, sizes):
    """Return c [B,M,D] as what broadcasts over the grouped tokens: [B,M,1,D] or [B,1,N,D]."""
    if count_groups(sizes) == len(sizes):
        return c[:, :, None]
    repeated = [one.expand(-1, n, -1) for one, n in zip(c.split(1, dim=1), sizes)]
    return torch.cat(repeated, dim=1)[:, None]


def modulate(x, shift, scale):
    """Return x (1 + scale) + shift, in x's dtype."""
    scale = scale.to(torch.promote_types(scale.dtype, torch.float32))  # in bfloat16, 1 + 0.001 is 1
    return (x * (1 + scale) + shift).to(x.dtype)


class TimeEmbedder(nn.Module):
    """Embed t [B,M] in [0, 1] as [B,M,D]. The official one rounds t to 1/1000."""

    def __init__(self, dim, quantize, frequencies=128):
        super().__init__()
        self.quantize = quantize
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        t = 1000 * t.to(torch.promote_types(t.dtype, torch.float32))  # bfloat16 would blur t
        if self.quantize:
            t = t.floor()
        half = self.mlp[0].in_features // 2
        i = torch.arange(half, device=t.device, dtype=t.dtype)
        args = t[..., None] * torch.exp(-math.log(10000) / half * i)  # [B,M,128]
        waves = torch.cat([args.cos(), args.sin()], dim=-1)  # [B,M,256]
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class Mlp(nn.Module):
    def __init__(self, dim, dropout):
        super().__init__()
        hidden = int(4 * dim * 2 / 3)  # three matrices, together as large as the usual two
        self.fc1_g = nn.Linear(dim, hidden)
        self.fc1_x = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return self.drop(self.fc2(F.gelu(self.fc1_g(x)) * self.fc1_x(x)))


class Block(nn.Module):
    def __init__(self, dim, num_heads, dropout, attn_dropout):
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=EPS, elementwise_affine=False)  # sums in float32
        self.attn = Attention(dim, num_heads, dropout, attn_dropout)
        self.mlp = Mlp(dim, dropout)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, sizes, rope, mask, past, tap=False):  # x [B,groups,m,D], c [B,M,D]
        mod = per_token(self.ada_lin(c), sizes)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = mod.chunk(6, dim=-1)
        out, qk = self.attn(modulate(self.norm(x), shift1, scale1), sizes, rope, mask, past)
        x = x + gamma1 * out
        x = x + gamma2 * self.mlp(modulate(self.norm(x), shift2, scale2))
        if tap:  # elsewhere their memory is free at once
            return x, qk
        return x, None


def initialize(net):
    for m in net.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)


# ---- model

class XAR(nn.Module):
    """Velocities of an image's entities, each given the earlier ones.

    `model(tokens, t, y)` -> v [B,L,C]: tokens [B,L,C] in entity order, t [B,M] in [0, 1], y [B]
    class ids (num_classes, or None, is no label). Later entities may be missing. `clean`
    [B,L,C] is the context of teacher forcing: entity n sees the clean ones before it, and itself.
    Parameter names and `quantize_t` are the official checkpoints'.

    For an alignment, `model(..., tap_layers=[i, ...])` -> v, z, taps: z [B,L,z_dim], the projected
    output of block feature_depth - 1, or None; taps, (q, k) [B,H,L,d] of each block, encoder then
    decoder, after the rotation, unscaled; with `clean` [B,H,2L,d].
    """

    def __init__(self, grid=16, channels=16, dim=768, encoder_depth=8, decoder_depth=8,
                 num_heads=12, num_classes=1000, entity="cell:8", dropout=0.0, attn_dropout=0.0,
                 quantize_t=False, z_dim=None, projector_dim=2048, feature_depth=None):
        super().__init__()
        if dim % (4 * num_heads):
            raise ValueError(f"width {dim} must be a multiple of 4 times the {num_heads} heads")
        self.grid = grid
        self.channels = channels
        self.num_classes = num_classes
        self.entity = entity
        self.feature_depth = feature_depth or encoder_depth

        # Of each token: its level's grid g, its raster index there, and its place on the finest
        # grid. A coarse token sits at the centre of what it averages.
        parts = entities(entity, grid)
        self.sizes = [len(index) for _, index in parts]
        self.levels = sorted({g for g, _ in parts})
        g = np.repeat([g for g, _ in parts], self.sizes)
        index = np.concatenate([index for _, index in parts])
        rows = (index // g + 0.5) * grid / g - 0.5
        cols = (index % g + 0.5) * grid / g - 0.5
        order = index + self._tokens_before(g)  # into the tokens of all levels, laid end to end
        entity_of = np.repeat(np.arange(len(parts)), self.sizes)
        angles = rope_angles(rows, cols, dim // num_heads)

        tables = dict(order=order, entity_of=entity_of,  # [L] each
                      rope_cos=np.cos(angles).astype(np.float32),  # [L,d/2]
                      rope_sin=np.sin(angles).astype(np.float32))
        for name, table in tables.items():
            self.register_buffer(name, torch.tensor(table), persistent=False)

        def blocks(depth):
            return nn.ModuleList(Block(dim, num_heads, dropout, attn_dropout) for _ in range(depth))

        L = sum(self.sizes)
        self.class_emb = nn.Embedding(num_classes + 1, dim)  # the last row is no label
        self.time_embed = TimeEmbedder(dim, quantize_t)
        self.z_proj = nn.Linear(channels, dim)
        self.z_proj_ln = nn.RMSNorm(dim, eps=EPS)
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, L, dim))
        self.encoder_blocks = blocks(encoder_depth)
        self.encoder_norm = nn.RMSNorm(dim, eps=EPS)
        self.decoder_embed = nn.Linear(dim, dim)
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, L, dim))
        self.decoder_blocks = blocks(decoder_depth)
        self.decoder_norm = nn.RMSNorm(dim, eps=EPS)
        self.pred = nn.Linear(dim, channels)

        initialize(self)
        nn.init.normal_(self.class_emb.weight, std=0.02)
        nn.init.normal_(self.encoder_pos_embed_learned, std=0.02)
        nn.init.normal_(self.decoder_pos_embed_learned, std=0.02)
        self.projector = None
        if z_dim is not None:  # last: all other weights of a seed are the same without it
            P = projector_dim
            self.projector = nn.Sequential(nn.Linear(dim, P), nn.SiLU(), nn.Linear(P, P),
                                           nn.SiLU(), nn.Linear(P, z_dim))
            initialize(self.projector)

    # -- tokens

    def _tokens_before(self, g):
        """Return how many tokens the levels coarser than g have; g is an int or an array."""
        return sum((k < g) * k * k for k in self.levels)

    def to_tokens(self, latent):
        """Return a latent, or any map [B,C,G,G] of the grid, as tokens [B,L,C] in entity order."""
        G = self.grid
        if latent.shape[2:] != (G, G):
            raise ValueError(f"map {list(latent.shape)} must be [B,C,{G},{G}]")
        levels = [F.adaptive_avg_pool2d(latent, g).flatten(2) for g in self.levels]  # [B,C,g*g]
        return torch.cat(levels, dim=2)[:, :, self.order].mT

    def to_latent(self, tokens):
        """Return tokens [B,N,C] as a latent [B,C,h,w]; of the first entities, the image so far.

        That is zero where nothing is known. Of a pyramid it is the last level begun, enlarged.
        """
        B, N, C = tokens.shape
        flat = tokens.new_zeros(B, C, sum(g * g for g in self.levels))
        flat[:, :, self.order[:N]] = tokens.mT
        g = max(g for g in self.levels if self._tokens_before(g) < N)
        begin = self._tokens_before(g)
        level = flat[:, :, begin:begin + g * g].view(B, C, g, g)
        return F.interpolate(level, self.grid)

    # -- network

    def forward(self, tokens, t, y=None, clean=None, tap_layers=None):
        N = tokens.shape[1]
        M = t.shape[1]
        sizes = self.sizes[:M]
        if N != sum(sizes):
            raise ValueError(f"{N} tokens do not fit the {M} times: entities have {sizes} tokens")
        copies = 1
        if clean is not None:
            # teacher forcing: a clean copy of the sequence goes first, at t = 0
            copies = 2
            tokens = torch.cat([clean, tokens], dim=1)  # [B,2N,C]
            t = torch.cat([torch.zeros_like(t), t], dim=1)  # [B,2M]
        rows = torch.arange(N, device=tokens.device).repeat(copies)
        mask = None
        if copies == 2 or needs_mask(M, N):
            mask = visible(self.entity_of[:N], copies)
        v, h, qk = self.network(tokens, t, y, copies * sizes, rows, mask, tapped=tap_layers or ())
        v = v[:, -N:]
        if tap_layers is None:
            return v
        z = None
        if self.projector is not None:
            z = self.projector(h[:, -N:])  # [B,N,z_dim]
        return v, z, [qk[i] for i in tap_layers]

    def network(self, tokens, t, y, sizes, rows, mask=None, kv_cache=None, begin=0, tapped=()):
        """Return v [B,N,C] of tokens [B,N,C]: entities of `sizes`, at the places `rows` [N].

        `kv_cache` [blocks,2,B,H,L,d]: the tokens see its keys and values before `begin`, and write
        their own behind them. Also return what the projector gets, [B,N,D], and {i: (q, k)}.
        """
        if y is None:
            y = torch.full((len(t),), self.num_classes, device=t.device)
        c = self.class_emb(y)[:, None] + self.time_embed(t)  # [B,M,D]
        groups = count_groups(sizes)
        rope = self.rope_cos[rows], self.rope_sin[rows]

        x = self.z_proj_ln(self.z_proj(tokens) + self.encoder_pos_embed_learned[:, rows])
        x = x.unflatten(1, (groups, -1))  # [B,groups,m,D]
        h = None
        qk = {}
        for i, block in enumerate([*self.encoder_blocks, *self.decoder_blocks]):
            if i == len(self.encoder_blocks):
                position = self.decoder_pos_embed_learned[:, rows].unflatten(1, (groups, -1))
                x = self.decoder_embed(self.encoder_norm(x)) + position
            past = None
            if kv_cache is not None:
                past = kv_cache[i], begin
            x, qk[i] = block(x, c, sizes, rope, mask, past, tap=i in tapped)
            if i + 1 == self.feature_depth:
                h = x.flatten(1, 2)
        kind = "cpu" if x.is_meta else x.device.type  # meta has no autocast
        with torch.autocast(kind, enabled=False):  # a sampler adds up what is rounded here
            v = self.pred(self.decoder_norm(x)).flatten(1, 2)
        return v, h, qk

    # -- loss

    def loss(self, latent, y=None, t=None, noise=None, label_drop=0.0, context="random", net=None):
        """Return the flow-matching loss E |v_n - (eps_n - X_n)|^2, a scalar in float32 or better.

        latent [B,C,h,w], y [B] or None (no label). t [B,M] and noise [B,L,C], in entity order, are
        drawn if not given. `context`: independent times, times sorted along the order, or clean
        earlier entities (teacher forcing, ours). `net`: DDP's wrapper, to be called instead.
        """
        x_t, t, v, clean = self.noised(latent, t, noise, context)
        if label_drop > 0 and y is not None:
            dropped = torch.rand(len(y), device=y.device) < label_drop
            y = torch.where(dropped, self.num_classes, y)
        error = (net or self)(x_t, t, y, clean) - v
        return error.square().mean()

    def noised(self, latent, t=None, noise=None, context="random"):
        """Return x_t [B,L,C], times t, velocity v, and the clean context or None."""
        if context not in CONTEXTS:
            raise ValueError(f"context {context} is none of {', '.join(CONTEXTS)}")
        assert latent.shape[1] == self.channels, f"a latent has {self.channels} channels"
        x = self.to_tokens(latent)  # [B,L,C]
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # never a bfloat16 target
        if t is None:
            t = torch.randn(len(x), len(self.sizes), device=x.device).sigmoid()  # logit-normal
        if context in ("increasing", "decreasing"):
            t = t.sort(dim=1, descending=context == "decreasing")[0]
        eps = torch.randn_like(x) if noise is None else noise
        t_ = t[:, self.entity_of, None]  # [B,L,1]
        x_t = (1 - t_) * x + t_ * eps  # straight path
        v = eps - x  # its velocity dx_t/dt
        clean = None
        if context == "clean" and len(self.sizes) > 1:  # the first has no context
            clean = x.to(latent.dtype)
        return x_t.to(latent.dtype), t, v, clean

    # -- sampling

    def sample(self, y, num_steps=40, cfg_scale=1.0, randn=torch.randn_like):
        """Return latents [B,C,h,w] for class ids y [B], or for an int: that many without label."""
        return self.to_latent(self.sample_tokens(y, num_steps, cfg_scale, randn))

    @torch.no_grad()
    def sample_tokens(self, y, num_steps=40, cfg_scale=1.0, randn=torch.randn_like):
        """Return tokens [B,L,C], made one entity after another by `reverse_sde`, without dropout.

        Guidance grows along the order: u + w_n (c - u), w_n = 1 + (w - 1) n / (M - 1), w if M = 1.
        randn(like) is called on [B,m,C] in float64, for an entity's first noise, then for each of
        its noisy steps. Raises ValueError for a label out of range.
        """
        M = len(self.sizes)
        weight = self.pred.weight
        if isinstance(y, (int, np.integer)):
            y = torch.full((max(0, int(y)),), self.num_classes)
            cfg_scale = 1.0  # c = u, there is nothing to guide
        y = self._class_ids(y).to(weight.device)
        labels = y  # [B], with guidance [2B]
        if cfg_scale != 1:
            labels = torch.cat([y, torch.full_like(y, self.num_classes)])

        training = self.training
        self.eval()
        try:
            kv_cache = self._kv_cache(len(labels))
            done = []  # finished entities, [B,m,C] each
            begin = 0  # the next one's first token
            for n, size in enumerate(self.sizes):
                w = cfg_scale if M == 1 else 1 + (cfg_scale - 1) * n / (M - 1)
                guided = cfg_scale != 1 and (n > 0 or M == 1)  # the first of several has w = 1

                def velocity(x, t):
                    if not guided:
                        return _as_state(self._evaluate(x, t, y, kv_cache, begin))
                    c, u = _as_state(self._evaluate(x, t, labels, kv_cache, begin)).chunk(2)
                    return u + w * (c - u)

                x = _as_state(weight.new_empty(len(y), size, self.channels))
                x = reverse_sde(velocity, randn(x), num_steps, randn).to(weight.dtype)
                done.append(x)
                if n < M - 1:  # it enters the cache, once, at t = 0
                    self._evaluate(x, 0.0, labels, kv_cache, begin)
                begin += size
            return torch.cat(done, dim=1)
        finally:
            self.train(training)

    def _kv_cache(self, B):
        """Return room for the keys and values of all tokens, [blocks,2,B,H,L,d]."""
        like = self.pred.weight
        dtype = like.dtype
        if torch.is_autocast_enabled(like.device.type):
            dtype = torch.get_autocast_dtype(like.device.type)
        depth = len(self.encoder_blocks) + len(self.decoder_blocks)
        H = self.encoder_blocks[0].attn.num_heads
        d = like.shape[1] // H
        return like.new_empty(depth, 2, B, H, len(self.order), d, dtype=dtype)

    def _class_ids(self, y):
        y = torch.as_tensor(y).long()
        null = self.num_classes
        if y.ndim != 1 or not len(y):
            raise ValueError("y must be class ids [B], or a number of images, 1 or more")
        if not 0 <= y.min() <= y.max() <= null:
            raise ValueError(f"labels {y.min()} ... {y.max()} must lie in 0 ... {null - 1}; "
                             f"{null} is no label")
        return y

    def _evaluate(self, x, t, labels, kv_cache, begin):
        """Return v of the entity x [B,m,C] at `begin`; labels [B], or [2B] if guided."""
        x = x.to(self.pred.weight.dtype).repeat(len(labels) // len(x), 1, 1)
        m = x.shape[1]
        t = x.new_full((len(labels), 1), t, dtype=torch.promote_types(x.dtype, torch.float32))
        rows = torch.arange(begin, begin + m, device=x.device)
        return self.network(x, t, labels, [m], rows, kv_cache=kv_cache, begin=begin)[0]


# ---- sampling

def _as_state(x):
    """Return x in float64, or in float32 on Apple's GPUs, which have nothing wider."""
    return x.float() if x.device.type == "mps" else x.double()


def reverse_sde(velocity, x, num_steps, randn, start=1.0):
    """Return x at t = 0, from x at t = `start`; velocity(x, t) -> v, like x.

    Euler-Maruyama on SiT's reverse SDE (eq. 4) with w_t = 2t and the score s:
        dx = (v - t s) dt + sqrt(2t) dW,   s = -((1 - t) v + x) / t,   so v - t s = (2 - t) v + x
    num_steps - 1 noisy steps reach t = LAST_STEP, and one without noise reaches 0.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps {num_steps} must be 1 or more")
    # The last step, without noise, begins before the score's 1 / t grows without bound.
    ts = [*np.linspace(start, LAST_STEP, num_steps).tolist(), 0.0]
    for t, t_next in zip(ts, ts[1:]):
        x = x + ((2 - t) * velocity(x, t) + x) * (t_next - t)
        if t_next > 0:
            x = x + math.sqrt(2 * t * (t - t_next)) * randn(x)
    return x


# ---- checkpoints

OFFICIAL_ENTITY = "cell:8"


def load_xar(path, num_heads=None):
    """Load an XAR from a checkpoint, ours or the official one, in eval mode.

    Sizes come from the tensors, the rest from "arch" in ours. Without it, cells are of 8 x 8; files
    with `rope.*` are official, and have times in whole thousandths. `model.packed_from` describes
    the latents' autoencoder, if the file does. Raises FileNotFoundError or ValueError, one line.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file: give a checkpoint's path")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # official: data, not code
            # mapped, since of a training checkpoint only the averaged weights are read
            content = torch.load(path, map_location="cpu", weights_only=True,
                                 mmap=zipfile.is_zipfile(path))
    except Exception as e:
        raise ValueError(f"{path} cannot be read: it is not a checkpoint, or was cut short "
                         f"({type(e).__name__})") from None
    try:
        return _from_content(content, num_heads).eval()
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def _from_content(content, num_heads):
    if not isinstance(content, dict):
        content = {}
    config = content.get("arch") or {}
    sd = content.get("model_ema", content.get("ema", content))
    for name in ("z_proj.weight", "encoder_pos_embed_learned", "class_emb.weight"):
        if not isinstance(sd, dict) or name not in sd:
            raise ValueError(f"holds no xAR: there is no tensor {name}")
    table = sd.get("encoder_blocks.0.attn.rope.freqs_cos")  # [L,d], official files only
    sd = {name: w for name, w in sd.items() if ".rope." not in name and name != "mask"}

    D, C = sd["z_proj.weight"].shape
    L = sd["encoder_pos_embed_learned"].shape[1]
    heads = num_heads or config.get("num_heads")
    if not heads and table is not None:
        heads = D // table.shape[1]
    if not heads:
        heads = {c["dim"]: c["num_heads"] for c in PUBLISHED.values()}.get(D)
    if not heads:
        raise ValueError(f"its width {D} is not a published size: pass num_heads (--num-heads)")

    def depth(part):
        return len({name.split(".")[1] for name in sd if name.startswith(f"{part}_blocks.")})

    model = XAR(config.get("grid") or math.isqrt(L), C, D,
                depth("encoder"), depth("decoder"), heads,
                num_classes=len(sd["class_emb.weight"]) - 1,
                entity=config.get("entity", OFFICIAL_ENTITY),
                quantize_t=table is not None or bool(config.get("quantize_t")))
    try:
        model.load_state_dict(sd)
    except RuntimeError as e:
        raise ValueError(f"does not fit the model: {' '.join(str(e).split())[:300]}") from None
    model.packed_from = content.get("packed_from")
    return model
