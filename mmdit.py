"""MM-DiT: a diffusion transformer that draws what a text says, in one file.

    model = mmdit.MMDiT(input_size=32, in_channels=4, context_dim=768,
                        **mmdit.MMDIT_CONFIGS["MMDiT-24/2"])
    v = model(x, t, context)    # x [B,4,32,32], t [B], context [B,77,768]: a text encoder's output
    model = mmdit.load_mmdit("checkpoint.pt")       # REPA's and HASTE's checkpoints, and ours

It is called like a SiT, with features of a caption where SiT has a label, so sit.flow_loss (without
its label_drop) and sit's samplers serve both. For guidance, their null_label is the features [L,C]
of the empty caption.

Text and image are two streams of tokens, each with its own weights, that meet in attention only
(SD3, Esser et al. 2024, arXiv 2403.03206). Size and form are those of REPA (Yu et al. 2025,
2410.06940) and HASTE (Wang et al. 2025, 2505.16792): no pooled text, no mask, and the time alone
modulates the blocks.

Time runs from t = 0 (data) to t = 1 (noise); v = dx_t/dt = eps - x.

Letters: B batch, C channels, h w height and width of the latent, p patch, N image tokens, L text
tokens, D width, H heads, d = D/H.
"""
import argparse
import math
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# Ti (ours) is the one that a laptop trains on the scenes, 24 the papers'.
MMDIT_CONFIGS = {
    "MMDiT-Ti/4": dict(depth=4, hidden_size=128, num_heads=4, patch_size=4),
    "MMDiT-24/2": dict(depth=24, hidden_size=768, num_heads=24, patch_size=2),
}
TABLE_GRID = 16                                                             # tokens along a side of the position table


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
    """Embed times t [B] in [0, 1] -> [B,D]."""

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


class PatchEmbed(nn.Module):
    """Cut the latent into p x p patches, and map each to a token."""

    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x):
        tokens = self.proj(x).flatten(2).transpose(1, 2)                    # [B,C,h,w] -> [B,N,D]
        return tokens.contiguous()                                          # else every sum and norm above it copies


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Attention(nn.Module):
    """One stream's projections into and out of the joint attention."""

    def __init__(self, dim, num_heads, qk_norm, pre_only):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.ln_q = nn.LayerNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.ln_k = nn.LayerNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        if not pre_only:
            self.proj = nn.Linear(dim, dim)

    def forward(self, x):                                                   # [B,L,D] -> three of [B,H,L,d]
        B, L, _ = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.ln_q(q), self.ln_k(k), v


class Stream(nn.Module):
    """One stream's half of a block: what comes before the joint attention, and what after it.

    With `pre_only` there is no second half: nothing reads the last block's text.
    """

    def __init__(self, dim, num_heads, qk_norm, pre_only=False):
        super().__init__()
        self.chunks = 2 if pre_only else 6
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads, qk_norm, pre_only)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, self.chunks * dim))
        if not pre_only:
            self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
            self.mlp = Mlp(dim)

    def before(self, x, c):
        """Return queries, keys, values [B,H,L,d], and the modulation that `after` takes."""
        shift1, scale1, *rest = self.adaLN_modulation(c).chunk(self.chunks, dim=1)
        return self.attn(modulate(self.norm1(x), shift1, scale1)), rest

    def after(self, x, attended, gate1, shift2, scale2, gate2):
        x = x + gate1[:, None] * self.attn.proj(attended)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class JointBlock(nn.Module):
    """Text tokens a [B,L,D] and image tokens x [B,N,D], in one attention over all L + N."""

    def __init__(self, dim, num_heads, qk_norm, last):
        super().__init__()
        self.last = last
        self.context_block = Stream(dim, num_heads, qk_norm, pre_only=last)
        self.x_block = Stream(dim, num_heads, qk_norm)

    def forward(self, a, x, c, tap=False):                                  # c [B,D]
        (q_a, k_a, v_a), rest_a = self.context_block.before(a, c)
        (q_x, k_x, v_x), rest_x = self.x_block.before(x, c)

        q = torch.cat([q_a, q_x], dim=2)                                    # [B,H,L+N,d], text first
        k = torch.cat([k_a, k_x], dim=2)
        v = torch.cat([v_a, v_x], dim=2)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)            # [B,L+N,D]

        if not self.last:
            a = self.context_block.after(a, out[:, :a.shape[1]], *rest_a)
        x = self.x_block.after(x, out[:, -x.shape[1]:], *rest_x)
        if tap:                                                             # elsewhere their memory is free at once
            return a, x, (q_x, k_x)
        return a, x, None


class FinalLayer(nn.Module):
    def __init__(self, dim, out_features):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


# ---- the model

class MMDiT(nn.Module):
    """Velocity network v(x, t, context). Parameter names are those of the official checkpoints.

    x [B,C,h,w], t [B] in [0, 1], context [B,L,context_dim]: the features of a caption. L is free,
    and so are h and w up to `table_grid` patches: a smaller latent takes the middle of the position
    table.

    `model(x, t, context)` returns v [B,C,h,w]. `model(x, t, context, tap_layers=L)` returns
    (v, z, taps), of the image tokens alone:
        z      [B,N,z_dim], the projected output of joint_blocks[encoder_depth - 1]; None if there
               is no projector
        taps   [(q, k), ...] of the blocks in L, each [B,H,N,d], after their norms, unscaled. Their
               softmax is over image keys only, which is what HASTE aligns with a teacher

    With `zero_init`, every block starts as the identity, and the output as zero (adaLN-Zero, DiT);
    the official code leaves all layers as PyTorch makes them. Raises ValueError if the sizes do not
    fit one another.
    """

    def __init__(self, input_size, patch_size, in_channels, hidden_size, depth, num_heads,
                 context_dim, *, table_grid=TABLE_GRID, qk_norm=False, z_dim=None,
                 projector_dim=2048, encoder_depth=8, zero_init=False):
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
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.grid = input_size // patch_size                                # tokens along a side
        self.context_dim = context_dim
        self.table_grid = table_grid
        self.encoder_depth = encoder_depth                                  # blocks below the projector, REPA's name

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.context_embedder = nn.Linear(context_dim, hidden_size)
        table = pos_embed_2d(hidden_size, table_grid).to(torch.empty(0).device)              # or torch.device("meta")
        self.register_buffer("pos_embed", table)
        self.joint_blocks = nn.ModuleList(
            JointBlock(hidden_size, num_heads, qk_norm, last=i == depth - 1) for i in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size ** 2 * in_channels)
        self.projectors = None
        if z_dim is not None:
            projector = nn.Sequential(nn.Linear(hidden_size, projector_dim), nn.SiLU(),
                                      nn.Linear(projector_dim, projector_dim), nn.SiLU(),
                                      nn.Linear(projector_dim, z_dim))
            self.projectors = nn.ModuleList([projector])                    # a list of one: the official names
        self.positions(self.grid, self.grid)                                # raises if the table is too small
        if zero_init:
            self.zero_init()

    @property
    def blocks(self):
        return self.joint_blocks

    def zero_init(self):
        halves = [m for m in self.modules() if isinstance(m, Stream)]
        for m in [*halves, self.final_layer]:
            nn.init.zeros_(m.adaLN_modulation[1].weight)
            nn.init.zeros_(m.adaLN_modulation[1].bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)

    def positions(self, rows, columns):
        """Return the middle rows x columns of the position table, [1,N,D]."""
        side = self.table_grid
        if max(rows, columns) > side:
            raise ValueError(f"{rows} x {columns} tokens are more than the position table has, "
                             f"{side} x {side}: use smaller images or a larger patch, or build the "
                             f"model with table_grid={max(rows, columns)}")
        top = (side - rows) // 2
        left = (side - columns) // 2
        table = self.pos_embed.view(side, side, -1)[top:top + rows, left:left + columns]
        return table.flatten(0, 1)[None]

    def forward(self, x, t, context, tap_layers=None):
        with_taps = tap_layers is not None                                  # are z and taps requested?
        tapped = list(tap_layers) if with_taps else []
        if any(not 0 <= i < len(self.joint_blocks) for i in tapped):
            raise ValueError(f"tap_layers {tapped} must lie in 0 ... {len(self.joint_blocks) - 1}")
        if any(side % self.patch_size for side in x.shape[2:]):
            raise ValueError(f"latent {list(x.shape[2:])} must be a multiple of the patch size "
                             f"{self.patch_size}")
        rows, columns = (side // self.patch_size for side in x.shape[2:])

        h = self.x_embedder(x) + self.positions(rows, columns)              # [B,N,D]
        # in h's dtype, float32 also under autocast: both streams add up many small terms
        a = self.context_embedder(context).to(h.dtype)                      # [B,L,D]
        c = self.t_embedder(t).to(h.dtype)                                  # [B,D]
        z = None
        qk = {}                                                             # block -> its queries and keys
        for i, block in enumerate(self.joint_blocks):
            a, h, qk[i] = block(a, h, c, tap=i in tapped)
            if with_taps and self.projectors is not None and i == self.encoder_depth - 1:
                z = self.projectors[0](h)                                   # [B,N,z_dim]
        kind = "cpu" if h.is_meta else h.device.type                        # meta has no autocast
        with torch.autocast(kind, enabled=False):                           # a sampler adds up what is rounded here
            v = self.unpatchify(self.final_layer(h, c), rows, columns)      # [B,C,h,w]

        if not with_taps:
            return v
        return v, z, [qk[i] for i in tapped]

    def unpatchify(self, tokens, rows, columns):                            # [B,N,p*p*C], C fastest -> [B,C,h,w]
        p = self.patch_size
        v = tokens.view(-1, rows, columns, p, p, self.in_channels)
        return v.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, rows * p, columns * p)


# ---- checkpoints

def load_mmdit(path, num_heads=None):
    """Load an MM-DiT from any checkpoint: ours, REPA's or HASTE's, in eval mode.

    Geometry comes from the tensors, the number of heads from `num_heads`, our configuration, or the
    number of blocks, which it equals in the papers. What else the file says becomes attributes:
    `path` of its training, `packed_from`, the autoencoder of its latents, `text`, the encoder of
    its captions, and `contrast` for the samplers.
    Raises FileNotFoundError or ValueError, one line that names the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file: give the path of a "
                                f"checkpoint")
    try:
        # The official files carry their argparse.Namespace: it is data, so it may pass.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True,
                                 mmap=zipfile.is_zipfile(path))
    except Exception as e:
        raise ValueError(f"{path} is not a readable checkpoint: cut short, or another format "
                         f"({type(e).__name__})") from None
    try:
        return _from_content(content, num_heads).eval()
    except KeyError as e:
        raise ValueError(f"{path}: the MM-DiT in it has no tensor {e}") from None
    except (ValueError, RuntimeError) as e:                                 # torch lists missing, unexpected, shapes
        raise ValueError(f"{path}: {' '.join(str(e).split())[:300]}") from None


def _from_content(content, num_heads):
    content = _as_dict(content)
    sd = _as_dict(content.get("ema", content))
    if "context_embedder.weight" not in sd:
        raise ValueError("holds no MM-DiT (no tensor named context_embedder.weight)")
    config = {**_as_dict(content.get("args")), **_as_dict(content.get("arch"))}
    D, C, p, _ = sd["x_embedder.proj.weight"].shape
    depth = len({name.split(".")[1] for name in sd if name.startswith("joint_blocks.")})
    table_grid = math.isqrt(sd["pos_embed"].shape[1])
    q_norm = sd.get("joint_blocks.0.x_block.attn.ln_q.weight")              # [d]
    known = D // len(q_norm) if q_norm is not None else config.get("num_heads")
    if num_heads and known and num_heads != known:
        raise ValueError(f"has {known} attention heads, not {num_heads} (--num-heads)")
    arch = dict(
        input_size=config.get("input_size") or table_grid * p, patch_size=p, in_channels=C,
        hidden_size=D, depth=depth, num_heads=num_heads or known or depth,
        context_dim=sd["context_embedder.weight"].shape[1], table_grid=table_grid,
        qk_norm=q_norm is not None, encoder_depth=config.get("encoder_depth") or min(8, depth))
    if "projectors.0.0.weight" in sd:
        arch["projector_dim"] = len(sd["projectors.0.0.weight"])
        arch["z_dim"] = len(sd["projectors.0.4.weight"])

    model = MMDiT(**arch)
    model.load_state_dict(sd)
    path = config.get("path_type") or config.get("path")                    # REPA's word and ours
    model.path = "cosine" if str(path).lower() in ("cosine", "gvp") else "linear"
    model.packed_from = content.get("packed_from")
    model.text = content.get("text")
    model.contrast = content.get("contrast")
    return model


def _as_dict(x):
    if isinstance(x, argparse.Namespace):
        return vars(x)
    return x if isinstance(x, dict) else {}
