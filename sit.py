"""SiT: a flow-matching diffusion transformer, its loss and its samplers, in one file.

    python sit.py --ckpt out/ckpt.pt --num 100 --cfg 1.5        draws a grid of samples: out/grid.png
    torchrun --nproc_per_node=8 -- sit.py --num 50000 --out out/samples.npz        as many as a FID wants; resumes

Papers: SiT (Ma et al. 2024, arXiv 2401.08740), DiT's adaLN-Zero blocks (Peebles & Xie 2023, 2212.09748),
guidance interval (Kynkaanniemi et al. 2024, 2404.07724), REPA's projector (Yu et al. 2025, 2410.06940).

Time runs from t = 0 (data) to t = 1 (noise).
    linear path   x_t = (1 - t) x + t eps                        v = dx_t/dt = eps - x
    cosine path   x_t = cos(pi t/2) x + sin(pi t/2) eps          v = pi/2 (cos(pi t/2) eps - sin(pi t/2) x)
The network is trained to predict v; sampling integrates it from noise at t = 1 back to t = 0.

Letters: B batch, C channels, h w height and width of the latent, p patch, N tokens, D width, H heads, d = D/H.
Checkpoints of the original SiT, REPA and HASTE load by themselves (`load_sit`), whatever their layout.
"""
import argparse
import math
import pickle
import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# name: depth, width, heads of the published sizes. Ti (ours) is the one that a laptop trains on the digits.
PUBLISHED = {"SiT-S": (12, 384, 6), "SiT-B": (12, 768, 12), "SiT-L": (24, 1024, 16), "SiT-XL": (28, 1152, 16)}
SIT_CONFIGS = {f"{name}/{p}": dict(depth=depth, hidden_size=width, num_heads=heads, patch_size=p)
               for name, (depth, width, heads) in {"SiT-Ti": (6, 128, 4), **PUBLISHED}.items() for p in (1, 2, 4, 8)}


# ---- small modules

def pos_embed_2d(D, grid):
    """Fixed sine-cosine table [1,N,D]: first half of D from a token's column, second half from its row."""
    omega = 10000.0 ** (-np.arange(D // 4) / (D / 4))                       # [D/4], float64 like the official table
    row, col = np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")
    angles = [np.outer(axis.reshape(-1), omega) for axis in (col, row)]     # two of [N,D/4]
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(table).float()[None]


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]                        # [B,N,D] by [B,D]


class TimestepEmbedder(nn.Module):
    """t [B] in [0, 1] -> [B,D]. Note that t is not multiplied by 1000, as it is in DiT."""

    def __init__(self, hidden_size, frequencies=128):
        super().__init__()
        self.frequencies = frequencies
        layers = nn.Linear(2 * frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(*layers)

    def forward(self, t):
        t = t.to(torch.promote_types(t.dtype, torch.float32))               # 8 bits of mantissa would blur t
        i = torch.arange(self.frequencies, device=t.device, dtype=t.dtype)
        args = t[:, None] * torch.exp(-math.log(10000) / self.frequencies * i)              # [B,128]
        return self.mlp(torch.cat([args.cos(), args.sin()], dim=1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class ids [B] -> [B,D]. The last row is the null label of classifier-free guidance."""

    def __init__(self, num_classes, hidden_size):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y):
        return self.embedding_table(y)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)                      # [B,C,h,w] -> [B,N,D]


class Attention(nn.Module):
    """Self-attention that can also hand out its queries and keys, which is all that HASTE needs of it."""

    def __init__(self, dim, num_heads, qk_norm):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)   # three of [B,H,N,d]
        q, k = self.q_norm(q), self.k_norm(k)
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
    """Transformer block with adaLN-Zero: the condition sets shift, scale and gate of both branches (DiT fig. 3)."""

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
        return x, qk if tap else None                                       # queries and keys leave only tapped blocks


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

class SiT(nn.Module):
    """Velocity network v(x, t, y).

    x [B,C,h,w] with h = w = input_size, t [B] in [0, 1], y [B] class ids; num_classes itself is the null label.
    `model(x, t, y)` returns v [B,C,h,w]. `model(x, t, y, tap_layers=L)` returns (v, z, taps): z [B,N,z_dim], the
    projected output of blocks[encoder_depth - 1] (None without projector), and taps [(q, k), ...] of the blocks in L,
    each [B,H,N,d], after their norms, unscaled. Parameter names are those of the official checkpoints.
    `learn_sigma`, `flip_time`: the original SiT predicts 2C channels and runs from noise at 0 to data at 1.
    """

    def __init__(self, input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes, *,
                 qk_norm=False, learn_sigma=False, flip_time=False, z_dim=None, projector_dim=2048, encoder_depth=8):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input size {input_size} must be a multiple of the patch size {patch_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"width {hidden_size} must be a multiple of 4 and of the {num_heads} heads")
        if z_dim is not None and not 1 <= encoder_depth <= depth:
            raise ValueError(f"encoder depth {encoder_depth} must lie in 1 ... {depth}, the depth of the model")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.grid, self.num_classes, self.encoder_depth = input_size // patch_size, num_classes, encoder_depth
        self.learn_sigma, self.flip_time = learn_sigma, flip_time

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        table = pos_embed_2d(hidden_size, self.grid).to(torch.get_default_device())         # the meta device, say
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size ** 2 * in_channels * (2 if learn_sigma else 1))
        self.projectors = None if z_dim is None else nn.ModuleList([        # a list of one, for the official names
            nn.Sequential(nn.Linear(hidden_size, projector_dim), nn.SiLU(), nn.Linear(projector_dim, projector_dim),
                          nn.SiLU(), nn.Linear(projector_dim, z_dim))])
        self.initialize()

    def initialize(self):
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight.flatten(1))                # the patch convolution as a matrix
                nn.init.zeros_(m.bias)
        for w in (self.y_embedder.embedding_table.weight, self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight):
            nn.init.normal_(w, std=0.02)
        # adaLN-Zero: every block starts as the identity, and the network's output as zero
        for m in [*self.blocks, self.final_layer]:
            nn.init.zeros_(m.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x, t, y, tap_layers=None):
        if tap_layers is not None and any(not 0 <= i < len(self.blocks) for i in tap_layers):
            raise ValueError(f"tap_layers {list(tap_layers)} must lie in 0 ... {len(self.blocks) - 1}")
        if self.flip_time:
            t = 1 - t
        h = self.x_embedder(x) + self.pos_embed                             # [B,N,D]
        c = self.t_embedder(t) + self.y_embedder(y)                         # [B,D]
        z, qk = None, {}
        for i, block in enumerate(self.blocks):
            tap = tap_layers is not None and i in tap_layers
            h, qk_i = block(h, c, tap)
            if tap:
                qk[i] = qk_i
            if tap_layers is not None and self.projectors is not None and i == self.encoder_depth - 1:
                z = self.projectors[0](h)                                   # [B,N,z_dim]
        v = self.unpatchify(self.final_layer(h, c))
        return v if tap_layers is None else (v, z, [qk[i] for i in tap_layers])

    def unpatchify(self, tokens):                                           # [B,N,p*p*C], C fastest -> [B,C,h,w]
        B, g, p = len(tokens), self.grid, self.patch_size
        v = tokens.view(B, g, g, p, p, -1).permute(0, 5, 1, 3, 2, 4).reshape(B, -1, g * p, g * p)
        v = v[:, :self.in_channels]                                         # the original SiT's second half is unused
        return -v if self.flip_time else v


# ---- path and loss

def _path(t, path):
    """alpha, sigma and their derivatives at t (a tensor) of x_t = alpha x + sigma eps  (SiT eq. 1)."""
    if path == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    if path == "cosine":
        a, k = t * (math.pi / 2), math.pi / 2
        return a.cos(), a.sin(), -k * a.sin(), k * a.cos()
    raise ValueError(f"path {path!r} must be 'linear' or 'cosine'")


def interpolant(x, eps, t, path="linear"):
    """Noisy sample and its velocity: x [B,...], eps like x, t [B] -> x_t, v = dx_t/dt  (SiT eqs. 1, 5)."""
    alpha, sigma, d_alpha, d_sigma = _path(t.view(-1, *[1] * (x.ndim - 1)), path)
    return alpha * x + sigma * eps, d_alpha * x + d_sigma * eps


def flow_loss(model, x, y, t=None, eps=None, path="linear", label_drop=0.0):
    """Flow-matching loss E |model(x_t, t, y) - v|^2  (SiT eq. 5), a scalar in float32 or better.

    x [B,C,h,w] clean, y [B]; t [B] and eps like x are drawn (uniform, normal) where None.
    `label_drop` is the probability of training a sample without its label: with `model.num_classes`, the null label.
    """
    t = torch.rand(len(x), device=x.device) if t is None else t             # [B]  t=0 data, t=1 noise
    eps = torch.randn_like(x) if eps is None else eps
    if label_drop > 0:
        null = getattr(model, "module", model).num_classes                  # DDP hides attributes behind `module`
        y = torch.where(torch.rand(len(y), device=y.device) < label_drop, null, y)
    x_t, v = interpolant(x, eps, t, path)
    error = model(x_t.to(x.dtype), t, y) - v
    return error.to(torch.promote_types(error.dtype, torch.float32)).square().mean()


# ---- sampling: state in float64, network in the latent's own dtype

def _guided(velocity, y, dtype, cfg_scale, null_label):
    """f(x, t, guide): velocity in float64; u + w (c - u) when `guide`, else one conditional evaluation."""
    t_dtype = torch.promote_types(dtype, torch.float32)                     # t is never bfloat16
    null = getattr(velocity, "num_classes", None) if null_label is None else null_label
    if cfg_scale != 1 and null is None:
        raise ValueError("guidance needs the null label: pass null_label, or a velocity with the attribute num_classes")

    def f(x, t, guide):
        ts = torch.full((len(x),), t, device=x.device, dtype=t_dtype)
        if not guide:
            return velocity(x.to(dtype), ts, y).double()
        twice = x.to(dtype).repeat(2, *[1] * (x.ndim - 1))                  # [2B,...]: with label, and without
        c, u = velocity(twice, ts.repeat(2), torch.cat([y, torch.full_like(y, null)])).double().chunk(2)
        return u + cfg_scale * (c - u)
    return f


@torch.no_grad()
def sample_ode(velocity, x, y, num_steps=50, cfg_scale=1.0, cfg_interval=(0.0, 1.0), null_label=None, heun=False):
    """Integrate dx = v dt (SiT eq. 2) from x [B,...], noise at t = 1, to t = 0 in uniform steps of Euler or Heun.

    velocity(x, t [B], y [B]) -> v. Guidance acts where cfg_scale != 1 and low <= t <= high. Heun's last step is
    Euler's, and its second evaluation keeps the guidance decision of the step's start. Returns x's dtype.
    """
    f, state = _guided(velocity, y, x.dtype, cfg_scale, null_label), x.double()
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).tolist()
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        guide = cfg_scale != 1 and cfg_interval[0] <= t <= cfg_interval[1]
        v = f(state, t, guide)
        if heun and i < num_steps - 1:
            v = (v + f(state + (t_next - t) * v, t_next, guide)) / 2
        state = state + (t_next - t) * v
    return state.to(x.dtype)


@torch.no_grad()
def sample_sde(velocity, x, y, num_steps=250, cfg_scale=1.0, cfg_interval=(0.0, 1.0), null_label=None, path="linear",
               last_step=0.04, randn=torch.randn_like):
    """Euler-Maruyama on the reverse SDE (SiT eq. 4 with w_t = 2t, score by eq. 9), from x [B,...] at t = 1 to t = 0.

        dx = (v - w_t s / 2) dt + sqrt(w_t) dW,    s = (r v - x) / (sigma^2 - r sigma' sigma),  r = alpha / alpha'
    num_steps - 1 noisy steps reach t = last_step, one without noise reaches 0: the score blows up there.
    randn(like) draws each step's noise. Otherwise as `sample_ode`.
    """
    f, state = _guided(velocity, y, x.dtype, cfg_scale, null_label), x.double()
    times = torch.linspace(1, last_step, num_steps, dtype=torch.float64).tolist() + [0.0]
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        # guiding v or guiding the drift is the same: the drift is affine in v, and the weights w and 1 - w sum to one
        v = f(state, t, cfg_scale != 1 and cfg_interval[0] <= t <= cfg_interval[1])
        alpha, sigma, d_alpha, d_sigma = (a.item() for a in _path(torch.tensor(t, dtype=torch.float64), path))
        r, w, dt = alpha / d_alpha, 2 * t, t_next - t
        score = (r * v - state) / (sigma ** 2 - r * d_sigma * sigma)
        state = state + (v - 0.5 * w * score) * dt
        if i < num_steps - 1:
            state = state + math.sqrt(w * -dt) * randn(state)
    return state.to(x.dtype)


def indexed_noise(seed, indices, shape):
    """randn-like function and first noise [B,*shape] in which sample i's numbers depend on (seed, i) alone.

    So an image does not depend on the batch, the process or the order in which it is drawn. numpy's generators,
    because torch's CPU generator keeps 32 bits of a seed: among 50,000 samples two would be likely to share theirs.
    """
    rngs = [np.random.default_rng([seed, int(i)]) for i in indices]

    def randn(like=None):
        noise = torch.from_numpy(np.stack([r.standard_normal(shape, dtype=np.float32) for r in rngs]))
        return noise if like is None else noise.to(like.device, like.dtype)
    return randn, randn()


# ---- checkpoints

# what torch.load raises for files that are cut short, of another format, or hold code
UNREADABLE = (RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, struct.error,
              pickle.UnpicklingError)


def read_checkpoint(path):
    """Contents of a torch checkpoint; never runs code in it. Raises FileNotFoundError or ValueError, one line."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist or is no file: give the path of a checkpoint")
    try:
        # REPA's and HASTE's files carry their argparse.Namespace: data, not code, so it is let through by name
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as e:
        raise ValueError(f"{path} is not a readable checkpoint: cut short, or another format "
                         f"({type(e).__name__})") from None


def _unwrap(content):
    """Any layout -> state dict with `blocks.i` names, and what the file says of its configuration, as a dict."""
    as_dict = lambda x: vars(x) if isinstance(x, argparse.Namespace) else x if isinstance(x, dict) else {}
    content = as_dict(content)
    sd, told = as_dict(content.get("ema", content)), {**as_dict(content.get("args")), **as_dict(content.get("arch"))}
    told["packed_from"] = content.get("packed_from")
    if "x_embedder.proj.weight" not in sd:
        raise ValueError("holds no SiT (no tensor named x_embedder.proj.weight)")
    if any(k.startswith("decoder_blocks.") for k in sd):                    # REPA's older names
        told["encoder_depth"] = len({k.split(".")[1] for k in sd if k.startswith("blocks.")})
        index = lambda k: int(k.split(".")[1]) + told["encoder_depth"]
        sd = {".".join(["blocks", str(index(k)), *k.split(".")[2:]]) if k.startswith("decoder_blocks.") else k: v
              for k, v in sd.items()}
    return sd, told


def load_sit(path, num_heads=None):
    """SiT from any checkpoint: ours, REPA's, HASTE's (old names or new), the original SiT's. Eval mode, t = 1 is noise.

    Geometry comes from the tensors; the number of heads from `num_heads`, our configuration, or the table by width.
    """
    try:
        sd, told = _unwrap(read_checkpoint(path))
        D, C, p, _ = sd["x_embedder.proj.weight"].shape
        depth = len({k.split(".")[1] for k in sd if k.startswith("blocks.")})
        qk_norm = sd.get("blocks.0.attn.q_norm.weight")                     # [d]: its length tells the number of heads
        by_width = {width: heads for _, width, heads in PUBLISHED.values()}
        heads = num_heads or (told.get("num_heads") or by_width.get(D) if qk_norm is None else D // len(qk_norm))
        if heads is None:
            raise ValueError(f"has width {D}, which is no published size: pass num_heads (--num-heads)")
        twice = sd["final_layer.linear.weight"].shape[0] == 2 * p * p * C   # the original SiT, time reversed
        z_dim = sd["projectors.0.4.weight"].shape[0] if "projectors.0.0.weight" in sd else None
        model = SiT(math.isqrt(sd["pos_embed"].shape[1]) * p, p, C, D, depth, heads,
                    sd["y_embedder.embedding_table.weight"].shape[0] - 1, qk_norm=qk_norm is not None,
                    learn_sigma=twice, flip_time=twice, encoder_depth=told.get("encoder_depth") or min(8, depth),
                    z_dim=z_dim, projector_dim=z_dim and sd["projectors.0.0.weight"].shape[0])
        load_strictly(model, sd)
        path_type = str(told.get("path_type") or told.get("path")).lower()
        model.path = "cosine" if path_type in ("cosine", "gvp") else "linear"   # ours and REPA's files say it
        model.packed_from = told.get("packed_from")                         # ours: the autoencoder of the latents
    except KeyError as e:
        raise ValueError(f"{path}: the SiT in it has no tensor {e}") from None
    except ValueError as e:
        raise ValueError(str(e) if str(path) in str(e) else f"{path}: {e}") from None
    return model.eval()


def load_strictly(model, sd):
    """load_state_dict whose error is one line that lists what does not fit: missing, unexpected, shapes."""
    own = model.state_dict()
    shapes = [f"{k} {list(sd[k].shape)} instead of {list(w.shape)}"
              for k, w in own.items() if k in sd and sd[k].shape != w.shape]
    wrong = {"missing": own.keys() - sd.keys(), "unexpected": sd.keys() - own.keys(), "of another shape": shapes}
    if any(wrong.values()):
        short = lambda names: ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        raise ValueError("does not fit the model: " + "; ".join(f"{k} {short(v)}" for k, v in wrong.items() if v))
    model.load_state_dict(sd)


# ---- the program

def main(argv=None):
    import run
    parser = run.Parser("sit.py", description="Sample images from a checkpoint.")
    parser.add_argument("--ckpt", default="out/ckpt.pt", help="checkpoint of haste_train.py, SiT, REPA or HASTE")
    parser.add_argument("--num", type=int, default=100, help="number of images")
    parser.add_argument("--cfg", type=float, default=1.0, help="guidance scale; 1 is none")
    parser.add_argument("--interval", type=float, nargs=2, default=(0.0, 1.0), help="times with guidance: low high")
    parser.add_argument("--sampler", choices=("sde", "ode", "heun"), default="sde", help="Euler-Maruyama, Euler, Heun")
    parser.add_argument("--steps", type=int, default=250, help="sampling steps")
    parser.add_argument("--path", choices=("linear", "cosine"), help="path, where the checkpoint does not know its own")
    parser.add_argument("--labels", choices=("balanced", "random"), default="balanced", help="in turn, or by index")
    parser.add_argument("--to-uint8", choices=("round", "truncate"), default="round", help="from [-1, 1] to 0 ... 255")
    parser.add_argument("--seed", type=int, default=0, help="sample i depends on (seed, i) alone")
    parser.add_argument("--batch-size", type=int, default=100, help="images at a time")
    parser.add_argument("--num-heads", type=int, help="attention heads, where the checkpoint cannot tell")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto is bf16 on CUDA")
    parser.add_argument("--vae", help="decoder of latents: sd-ema, sd-mse or a file; else what the checkpoint says")
    parser.add_argument("--out", default="out/grid.png", help="a picture (.png), or all images for fid.py (.npz)")
    args = parser.parse_args(argv)
    with run.one_line("sit.py"):
        run.need(args, args.out.lower().endswith((".png", ".npz")), "out", "must end in .png or .npz")
        if not args.interval[0] <= args.interval[1]:
            raise ValueError(f"--interval {args.interval[0]} {args.interval[1]} must be low, then high")
        for name, least in (("num", 1), ("steps", 1), ("batch_size", 1), ("seed", 0), ("num_heads", 1)):
            value = getattr(args, name)
            run.need(args, value is None or value >= least, name, f"must be {least} or more")
        processes = run.Processes(args.device, hours=48)                    # some may be done long before others
    try:
        with run.one_line("sit.py"):
            sample_images(args, processes)
    finally:
        processes.close()


def sample_images(args, processes):
    import evaluate
    import run
    device = processes.device
    model = load_sit(args.ckpt, args.num_heads).to(device)
    decode = processes.first(lambda: evaluate.decoder(model.packed_from, args.vae, model.in_channels, device))
    shape, path = (model.in_channels, model.input_size, model.input_size), args.path or model.path
    autocast = run.autocast(args.precision, device)

    def labels_of(rows):
        if args.labels == "balanced":
            return rows % model.num_classes
        return torch.tensor([np.random.default_rng([args.seed, int(i), 1]).integers(model.num_classes) for i in rows])

    def draw(rows):
        randn, x = indexed_noise(args.seed, rows, shape)
        start, kwargs = (x.to(device), labels_of(rows).to(device)), dict(num_steps=args.steps, cfg_scale=args.cfg,
                                                                         cfg_interval=args.interval)
        with autocast:
            if args.sampler == "sde":
                x = sample_sde(model, *start, path=path, randn=randn, **kwargs)
            else:
                x = sample_ode(model, *start, heun=args.sampler == "heun", **kwargs)
        return evaluate.to_bytes(decode(x), args.to_uint8)
    free = ("ckpt", "num", "batch_size", "device", "out")                   # the rest says what the samples are
    settings = {**{k: v for k, v in vars(args).items() if k not in free}, "path": path,
                "precision": run.precision(args.precision, device)}
    columns = 10 if args.labels == "random" else min(10, model.num_classes)
    evaluate.write_samples(args.out, args.num, draw, labels_of, args.batch_size, processes, model, settings, columns)


if __name__ == "__main__":
    main()
