"""The KL autoencoder of latent diffusion, both kinds in use: SD's (1/8 the side, 4 channels) and KL-16 (1/16, 16).

    vae = load_vae("sd-ema")                     # fetched once; or "sd-mse", or a file in any of three naming schemes
    mean, std = vae.encode(x)                    # x [B,3,H,W] in [-1, 1] -> [B,C,h,w] each
    x = vae.decode(z)                            # z = (mean + std eps) -> [B,3,H,W]; latents of models are vae.scale z

Paper: "High-Resolution Image Synthesis with Latent Diffusion Models" (Rombach et al. 2022, arXiv 2112.10752); KL-16 is
MAR's (Li et al. 2024, 2406.11838). Parameter names are LDM's; files with diffusers' names, new or old, are renamed.

Letters: B batch, C latent channels, H W side in pixels, h w side of the latent, D channels inside.
"""
import json
import pickle
import re
import struct
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

VAE_URL = "https://huggingface.co/stabilityai/sd-vae-ft-{}/resolve/main/diffusion_pytorch_model.safetensors"
WIDTH, BLOCKS, GROUPS, EPS = 128, 2, 32, 1e-6                               # of LDM's network, in all published files
SCALES = {4: 0.18215, 16: 0.2325}                                           # latents of models have about unit variance
USUAL = {4: "sd-ema"}                                                       # by channels, where nothing else is known
PIXELS_AT_ONCE = 2 ** 21                                                    # decoded together: 32 images of 256 x 256


def norm(channels):
    return nn.GroupNorm(GROUPS, channels, eps=EPS)


def conv(cin, cout, kernel=3, **kwargs):
    return nn.Conv2d(cin, cout, kernel, padding=kwargs.pop("padding", kernel // 2), **kwargs)


class ResnetBlock(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.norm1, self.conv1 = norm(cin), conv(cin, cout)
        self.norm2, self.conv2 = norm(cout), conv(cout, cout)
        if cin != cout:
            self.nin_shortcut = conv(cin, cout, 1)

    def forward(self, x):                                                   # [B,cin,h,w] -> [B,cout,h,w]
        out = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return out + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Self-attention over all places, with one head as wide as the feature map is deep."""

    def __init__(self, D):
        super().__init__()
        self.norm = norm(D)
        self.q, self.k, self.v, self.proj_out = (conv(D, D, 1) for _ in range(4))

    def forward(self, x):
        out = self.norm(x)
        q, k, v = (f(out).flatten(2).mT[:, None] for f in (self.q, self.k, self.v))         # [B,1,h*w,D]
        out = F.scaled_dot_product_attention(q, k, v)[:, 0].mT                              # [B,D,h*w]
        return x + self.proj_out(out.reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, D):
        super().__init__()
        self.conv = conv(D, D, stride=2, padding=0)

    def forward(self, x):                                                   # padded on the right and below only
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, D):
        super().__init__()
        self.conv = conv(D, D)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, attention after each if wanted, then a change of resolution if any."""

    def __init__(self, cin, cout, blocks, attn, **change):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(cin if i == 0 else cout, cout) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(cout) for _ in range(blocks if attn else 0))
        for name, module in change.items():                                 # LDM's names: downsample, upsample
            setattr(self, name, module)

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if self.attn else x
        return x


class Middle(nn.Module):
    def __init__(self, D):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = ResnetBlock(D, D), AttnBlock(D), ResnetBlock(D, D)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, ch_mult, z_channels, attn):
        super().__init__()
        widths, last = [WIDTH * m for m in (1, *ch_mult)], len(ch_mult) - 1
        self.conv_in = conv(3, WIDTH)
        self.down = nn.ModuleList(
            Level(widths[i], widths[i + 1], BLOCKS, attn and i == last,
                  **{} if i == last else dict(downsample=Downsample(widths[i + 1]))) for i in range(len(ch_mult)))
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = norm(widths[-1]), conv(widths[-1], 2 * z_channels)

    def forward(self, x):                                                   # [B,3,H,W] -> [B,2C,h,w]
        x = self.conv_in(x)
        for i, level in enumerate(self.down):
            x = level(x)
            x = level.downsample(x) if i < len(self.down) - 1 else x
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """up[0] is the finest level, LDM's order: it runs from the last to the first."""

    def __init__(self, ch_mult, z_channels):
        super().__init__()
        widths = [WIDTH * m for m in (*ch_mult, ch_mult[-1])]
        self.conv_in = conv(z_channels, widths[-1])
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(
            Level(widths[i + 1], widths[i], BLOCKS + 1, False, **dict(upsample=Upsample(widths[i])) if i else {})
            for i in range(len(ch_mult)))
        self.norm_out, self.conv_out = norm(widths[0]), conv(widths[0], 3)

    def forward(self, z):                                                   # [B,C,h,w] -> [B,3,H,W]
        x = self.mid(self.conv_in(z))
        for i in reversed(range(len(self.up))):
            x = self.up[i](x)
            x = self.up[i].upsample(x) if i else x
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoencoderKL(nn.Module):
    """ch_mult: widths of the levels in units of 128, finest first. SD: (1, 2, 4, 4), 4; KL-16: (1, 1, 2, 2, 4), 16."""

    def __init__(self, ch_mult, z_channels, encoder_attn=False):
        super().__init__()
        self.z_channels, self.factor, self.scale = z_channels, 2 ** (len(ch_mult) - 1), SCALES.get(z_channels, 1.0)
        self.encoder, self.decoder = Encoder(ch_mult, z_channels, encoder_attn), Decoder(ch_mult, z_channels)
        self.quant_conv = conv(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = conv(z_channels, z_channels, 1)

    def encode(self, x):
        """x [B,3,H,W] in [-1, 1], H and W multiples of `factor` -> mean, std [B,C,h,w] of the latent, unscaled."""
        if any(side % self.factor for side in x.shape[2:]):
            raise ValueError(f"images of {x.shape[3]} x {x.shape[2]} do not fit this autoencoder: sides must be "
                             f"multiples of {self.factor}")
        mean, log_var = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, (0.5 * log_var.clamp(-30, 20)).exp()

    def decode(self, z):
        """z [B,C,h,w], unscaled -> [B,3,H,W], about [-1, 1]; in batches that fit a card of 24 GB at any B."""
        part = max(1, PIXELS_AT_ONCE // (z.shape[2] * z.shape[3] * self.factor ** 2))
        return torch.cat([self.decoder(self.post_quant_conv(some)) for some in z.split(part)])

    @staticmethod
    def from_state_dict(sd):
        """The autoencoder that a state dict of any of the three schemes holds; eval mode. Raises ValueError."""
        for wrapper in ("state_dict", "model"):
            sd = sd[wrapper] if isinstance(sd.get(wrapper), dict) else sd
        sd = {k: w for k, w in sd.items() if re.match(r"(encoder|decoder|quant_conv|post_quant_conv)\.", k)}
        levels = 1 + max([int(m[1]) for m in (re.match(r"decoder\.up_blocks\.(\d+)", k) for k in sd) if m], default=-1)
        sd = {ldm_name(k, levels): w for k, w in sd.items()}
        for k, w in sd.items():                                             # diffusers: 1 x 1 convolutions as matrices
            if re.search(r"attn.*\.(q|k|v|proj_out)\.weight", k) and w.ndim == 2:
                sd[k] = w[:, :, None, None]
        try:
            count = len({k.split(".")[2] for k in sd if k.startswith("encoder.down.")})
            ch_mult = [len(sd[f"encoder.down.{i}.block.0.conv2.bias"]) // WIDTH for i in range(count)]
            with torch.device("meta"):                                      # no time lost on an initialisation
                vae = AutoencoderKL(ch_mult, sd["post_quant_conv.weight"].shape[0],
                                    any(k.startswith(f"encoder.down.{count - 1}.attn.") for k in sd))
        except (KeyError, ValueError, IndexError) as e:
            raise ValueError(f"holds no KL autoencoder of latent diffusion ({e} is missing)") from None
        own = {k: tuple(w.shape) for k, w in vae.state_dict().items()}
        wrong = sorted(k for k in own.keys() | sd.keys() if own.get(k) != tuple(getattr(sd.get(k), "shape", ())))
        if wrong:
            raise ValueError(f"holds no KL autoencoder of latent diffusion: {len(wrong)} tensors are missing, "
                             f"unexpected or of another shape, among them {', '.join(wrong[:3])}")
        vae.load_state_dict({k: w.float() for k, w in sd.items()}, assign=True)
        return vae.eval().requires_grad_(False)


# ---- the three naming schemes

RENAMED = [  # diffusers' names, new and old -> LDM's
    (r"mid_block\.attentions\.0", "mid.attn_1"), (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"), (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d+)\.attentions", r"down.\1.attn"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"), (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"), (r"group_norm", "norm"), (r"\.(to_q|query)\.", ".q."), (r"\.(to_k|key)\.", ".k."),
    (r"\.(to_v|value)\.", ".v."), (r"\.(to_out\.0|proj_attn)\.", ".proj_out."),
]


def ldm_name(name, levels):
    """LDM's name of a tensor; diffusers counts the decoder's `levels` from the coarsest, LDM from the finest."""
    finest_first = lambda m: f"up.{levels - 1 - int(m[1])}." + {"resnets": "block", "upsamplers.0": "upsample"}[m[2]]
    name = re.sub(r"up_blocks\.(\d+)\.(resnets|upsamplers\.0)", finest_first, name)
    for pattern, ldm in RENAMED:
        name = re.sub(pattern, ldm, name)
    return name


# ---- files

def load_vae(source):
    """AutoencoderKL from "sd-ema" or "sd-mse" (fetched once), or from a .safetensors or torch file. One-line errors."""
    path = Path(source)
    if source in ("sd-ema", "sd-mse"):
        url = VAE_URL.format(str(source)[3:])
        path = Path(torch.hub.get_dir(), "checkpoints", f"{source}.safetensors")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(url, str(path))
            except (OSError, RuntimeError) as e:
                raise OSError(f"--vae {source} could not be fetched ({e}): download {url} and name the file") from None
    if not path.is_file():
        raise FileNotFoundError(f"--vae {path} does not exist: give sd-ema, sd-mse, or a file")
    try:
        if path.suffix == ".safetensors":
            sd = read_safetensors(path)
        else:
            sd = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, struct.error,
            pickle.UnpicklingError) as e:
        raise ValueError(f"--vae {path} cannot be read: cut short, or another format ({type(e).__name__})") from None
    try:
        return AutoencoderKL.from_state_dict(sd if isinstance(sd, dict) else {})
    except ValueError as e:
        raise ValueError(f"--vae {path} {e}") from None


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64}


def read_safetensors(path):
    """{name: tensor}. The format: 8 bytes of length, a JSON header {name: {dtype, shape, data_offsets}}, raw data."""
    try:
        from safetensors.torch import load_file
        return load_file(path)
    except ImportError:
        raw = bytearray(Path(path).read_bytes())
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header, tensors = json.loads(raw[8:start]), {}
    for name, about in header.items():
        if name != "__metadata__":
            a, b = about["data_offsets"]
            flat = torch.frombuffer(raw[start + a:start + b], dtype=DTYPES[about["dtype"]])
            tensors[name] = flat.view(about["shape"])
    return tensors
