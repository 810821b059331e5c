"""The KL autoencoder of latent diffusion, in both usual kinds: SD's (1/8 the side, 4 channels)
and KL-16 (1/16 the side, 16 channels).

    net = load_vae("sd-ema")    # fetched once; or "sd-mse", or a file in any of 3 naming schemes
    mean, std = net.encode(x)   # x [B,3,H,W] in [-1, 1] -> [B,C,h,w] each
    x = net.decode(z)           # z = mean + std eps -> [B,3,H,W]

Models learn net.scale * z, so their samples need net.decode(sample / net.scale).

Paper: "High-Resolution Image Synthesis with Latent Diffusion Models" (Rombach et al. 2022,
arXiv 2112.10752); KL-16 is MAR's (Li et al. 2024, 2406.11838). Parameters have LDM's names; files
with the names of diffusers, new or old, are renamed.

Letters: B batch, C latent channels, H W side in pixels, h w side of the latent, D channels inside.
"""
import hashlib
import json
import re
import struct
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

VAE_URL = ("https://huggingface.co/stabilityai/sd-vae-ft-{}/resolve/main/"
           "diffusion_pytorch_model.safetensors")

# LDM's network, the same in all published files
WIDTH = 128
BLOCKS = 2
GROUPS = 32
EPS = 1e-6

SCALES = {4: 0.18215, 16: 0.2325}   # C: factor that gives the latents about unit variance
USUAL = {4: "sd-ema"}               # C: decoder to use if nothing is known about the latents
PIXELS_AT_ONCE = 2 ** 21            # decoded together: 32 images of 256 x 256


def norm(channels):
    return nn.GroupNorm(GROUPS, channels, eps=EPS)


def conv(cin, cout, kernel=3, **kwargs):
    return nn.Conv2d(cin, cout, kernel, padding=kwargs.pop("padding", kernel // 2), **kwargs)


class ResnetBlock(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.norm1 = norm(cin)
        self.conv1 = conv(cin, cout)
        self.norm2 = norm(cout)
        self.conv2 = conv(cout, cout)
        if cin != cout:
            self.nin_shortcut = conv(cin, cout, 1)

    def forward(self, x):                                               # [B,cin,h,w] -> [B,cout,h,w]
        out = self.conv1(F.silu(self.norm1(x)))
        out = self.conv2(F.silu(self.norm2(out)))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        return x + out


class AttnBlock(nn.Module):
    """Self-attention over all places, with one head as wide as the feature map is deep."""

    def __init__(self, D):
        super().__init__()
        self.norm = norm(D)
        self.q, self.k, self.v, self.proj_out = (conv(D, D, 1) for _ in range(4))

    def forward(self, x):
        out = self.norm(x)
        # contiguous, else no fused kernel takes them, and the h*w x h*w map is stored
        q, k, v = (f(out).flatten(2).mT[:, None].contiguous() for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)[:, 0].mT                          # [B,D,h*w]
        return x + self.proj_out(out.reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, D):
        super().__init__()
        self.conv = conv(D, D, stride=2, padding=0)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))        # padded on the right and below only


class Upsample(nn.Module):
    def __init__(self, D):
        super().__init__()
        self.conv = conv(D, D)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention if `attn`.

    The encoder adds `downsample` to a level and the decoder `upsample`, as LDM names them.
    """

    def __init__(self, cin, cout, blocks, attn=False):
        super().__init__()
        widths = [cin] + [cout] * blocks
        self.block = nn.ModuleList(ResnetBlock(widths[i], cout) for i in range(blocks))
        self.attn = nn.ModuleList()
        if attn:
            self.attn.extend(AttnBlock(cout) for _ in range(blocks))

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class Middle(nn.Module):
    def __init__(self, D):
        super().__init__()
        self.block_1 = ResnetBlock(D, D)
        self.attn_1 = AttnBlock(D)
        self.block_2 = ResnetBlock(D, D)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """With `attn`, the coarsest level has attention: KL-16's has, SD's has not."""

    def __init__(self, ch_mult, z_channels, attn):
        super().__init__()
        widths = [WIDTH * m for m in (1, *ch_mult)]
        last = len(ch_mult) - 1
        self.conv_in = conv(3, WIDTH)
        self.down = nn.ModuleList()
        for i in range(len(ch_mult)):
            level = Level(widths[i], widths[i + 1], BLOCKS, attn and i == last)
            if i < last:
                level.downsample = Downsample(widths[i + 1])
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = conv(widths[-1], 2 * z_channels)

    def forward(self, x):                                               # [B,3,H,W] -> [B,2C,h,w]
        x = self.conv_in(x)
        for i, level in enumerate(self.down):
            x = level(x)
            if i < len(self.down) - 1:
                x = level.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """up[0] is the finest level, in LDM's order: the forward runs from the last to the first."""

    def __init__(self, ch_mult, z_channels):
        super().__init__()
        widths = [WIDTH * m for m in (*ch_mult, ch_mult[-1])]
        self.conv_in = conv(z_channels, widths[-1])
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for i in range(len(ch_mult)):
            level = Level(widths[i + 1], widths[i], BLOCKS + 1)
            if i > 0:
                level.upsample = Upsample(widths[i])
            self.up.append(level)
        self.norm_out = norm(widths[0])
        self.conv_out = conv(widths[0], 3)

    def forward(self, z):                                               # [B,C,h,w] -> [B,3,H,W]
        x = self.mid(self.conv_in(z))
        for i in reversed(range(len(self.up))):
            x = self.up[i](x)
            if i > 0:
                x = self.up[i].upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoencoderKL(nn.Module):
    """ch_mult: widths of the levels in units of 128, finest first; z_channels: C.

    SD's is AutoencoderKL((1, 2, 4, 4), 4), KL-16 AutoencoderKL((1, 1, 2, 2, 4), 16, True).
    """

    def __init__(self, ch_mult, z_channels, encoder_attn=False):
        super().__init__()
        self.z_channels = z_channels
        self.factor = 2 ** (len(ch_mult) - 1)                           # H / h
        self.scale = SCALES.get(z_channels, 1.0)
        self.encoder = Encoder(ch_mult, z_channels, encoder_attn)
        self.decoder = Decoder(ch_mult, z_channels)
        self.quant_conv = conv(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = conv(z_channels, z_channels, 1)

    def encode(self, x):
        """Return mean and standard deviation of the latent, unscaled, [B,C,h,w] each.

        x [B,3,H,W] in [-1, 1]; H and W must be multiples of `factor`, else ValueError.
        """
        if any(side % self.factor for side in x.shape[2:]):
            raise ValueError(f"images of {x.shape[3]} x {x.shape[2]} do not fit this autoencoder: "
                             f"sides must be multiples of {self.factor}")
        mean, log_var = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, (0.5 * log_var.clamp(-30, 20)).exp()

    def decode(self, z):
        """Return images [B,3,H,W], about in [-1, 1], of unscaled latents z [B,C,h,w].

        Works in parts that fit a card of 24 GB, whatever B is.
        """
        pixels = z.shape[2] * z.shape[3] * self.factor ** 2             # of one image
        parts = z.split(max(1, PIXELS_AT_ONCE // pixels))
        return torch.cat([self.decoder(self.post_quant_conv(part)) for part in parts])

    @staticmethod
    def from_state_dict(sd):
        """Return the autoencoder, in eval mode, of a state dict in any of the three naming schemes.

        Raises ValueError, one line, if the tensors are not those of such an autoencoder.
        """
        try:
            sd = ldm_state_dict(sd)
            # the shapes say which network it is
            z_channels = sd["post_quant_conv.weight"].shape[0]
            count = len({k.split(".")[2] for k in sd if k.startswith("encoder.down.")})
            ch_mult = []
            for i in range(count):
                ch_mult.append(len(sd[f"encoder.down.{i}.block.0.conv2.bias"]) // WIDTH)
            encoder_attn = any(k.startswith(f"encoder.down.{count - 1}.attn.") for k in sd)

            with torch.device("meta"):                  # no time lost on an initialisation
                vae = AutoencoderKL(ch_mult, z_channels, encoder_attn)
            vae.load_state_dict({k: w.float() for k, w in sd.items()}, assign=True)
        except Exception as e:
            why = " ".join(str(e).split())[:300]
            raise ValueError(f"is not a KL autoencoder of latent diffusion "
                             f"({type(e).__name__}: {why})") from None
        return vae.eval().requires_grad_(False)


# ---- the three naming schemes

RENAMED = [  # names of diffusers, new and old -> LDM's
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d+)\.attentions", r"down.\1.attn"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
    (r"group_norm", "norm"),
    (r"\.(to_q|query)\.", ".q."),
    (r"\.(to_k|key)\.", ".k."),
    (r"\.(to_v|value)\.", ".v."),
    (r"\.(to_out\.0|proj_attn)\.", ".proj_out."),
]


def ldm_name(name, levels):
    """Return LDM's name of a tensor; `levels` is the number of the decoder's levels."""
    up = re.search(r"up_blocks\.(\d+)\.(resnets|upsamplers\.0)", name)
    if up:
        # diffusers counts levels from the coarsest, LDM from the finest
        kind = {"resnets": "block", "upsamplers.0": "upsample"}[up[2]]
        name = name.replace(up[0], f"up.{levels - 1 - int(up[1])}.{kind}")
    for pattern, ldm in RENAMED:
        name = re.sub(pattern, ldm, name)
    return name


def ldm_state_dict(sd):
    """Return the tensors of the autoencoder in `sd` under LDM's names, without what wraps them."""
    for wrapper in ("state_dict", "model"):
        if isinstance(sd.get(wrapper), dict):
            sd = sd[wrapper]
    ours = r"(encoder|decoder|quant_conv|post_quant_conv)\."
    sd = {k: w for k, w in sd.items() if re.match(ours, k) and isinstance(w, torch.Tensor)}

    found = [re.match(r"decoder\.up_blocks\.(\d+)", k) for k in sd]
    levels = 1 + max([int(m[1]) for m in found if m], default=-1)
    renamed = {}
    for k, w in sd.items():
        k = ldm_name(k, levels)
        # older files of diffusers have 1 x 1 convolutions as matrices
        if re.search(r"attn.*\.(q|k|v|proj_out)\.weight", k) and w.ndim == 2:
            w = w[:, :, None, None]
        renamed[k] = w
    return renamed


# ---- files

def load_vae(source):
    """Return the AutoencoderKL "sd-ema" or "sd-mse" (fetched once), or that of a file.

    Files are .safetensors, or torch's. Raises ValueError or OSError, one line.
    """
    path = Path(source)
    if source in ("sd-ema", "sd-mse"):
        url = VAE_URL.format(str(source)[3:])
        path = Path(torch.hub.get_dir(), "checkpoints", f"{source}.safetensors")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(url, str(path))
            except Exception as e:
                why = " ".join(str(e).split())
                raise OSError(f"--vae {source} could not be fetched ({why}): download {url} and "
                              f"name the file") from None
    if not path.is_file():
        raise FileNotFoundError(f"--vae {path} does not exist: give sd-ema, sd-mse, or a file")

    try:
        if path.suffix == ".safetensors":
            sd = read_safetensors(path)
        else:
            sd = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise ValueError(f"--vae {path} cannot be read: cut short, or of another format "
                         f"({type(e).__name__})") from None
    try:
        net = AutoencoderKL.from_state_dict(sd)
        return net.to(memory_format=torch.channels_last)                    # what GPUs' convolutions work in
    except ValueError as e:
        raise ValueError(f"--vae {path} {e}") from None


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64}


def read_safetensors(path):
    """Return {name: tensor} of a .safetensors file.

    The format: 8 bytes of length, a JSON header {name: {dtype, shape, data_offsets}}, raw data.
    """
    try:
        from safetensors.torch import load_file
        return load_file(path)
    except ImportError:                                 # the format is simple enough
        raw = bytearray(Path(path).read_bytes())
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:start])
    tensors = {}
    for name, about in header.items():
        if name != "__metadata__":
            a, b = about["data_offsets"]
            flat = torch.frombuffer(raw[start + a:start + b], dtype=DTYPES[about["dtype"]])
            tensors[name] = flat.view(about["shape"])
    return tensors


# ---- which autoencoder made the latents, and the one that decodes samples

def fingerprint(vae):
    """Return a hash of the encoder's weights, 16 hexadecimal digits.

    It identifies the latents: sd-ema and sd-mse have the same encoder, so their latents are
    interchangeable.
    """
    digest = hashlib.sha256()
    for name, w in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(name.encode() + w.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_decoder(packed_from, source, channels, device):
    """Return the function that turns a model's samples [B,C,h,w] into pixels in [-1, 1].

    source: the value of --vae, or None. packed_from: what is known about the autoencoder that made
    the training latents, a dict with "vae" and "fingerprint", or None. For models of pixels it is
    the identity. Raises ValueError or OSError, one line.
    """
    if not packed_from and source is None and channels in (1, 3):
        return lambda x: x
    name = source or (packed_from or {}).get("vae") or USUAL.get(channels)
    if name is None:
        raise ValueError(f"--vae must name the autoencoder's file, for latents of {channels} "
                         f"channels")

    vae = load_vae(name).to(device)
    if vae.z_channels != channels:
        raise ValueError(f"--vae {name} has latents of {vae.z_channels} channels, but the model's "
                         f"have {channels}: name the autoencoder of the training data")
    if packed_from and fingerprint(vae) != packed_from["fingerprint"]:
        raise ValueError(f"--vae {name} is not the autoencoder that the training data was prepared "
                         f"with ({packed_from['vae']}): name that one")

    def decode(z):
        # in float32, even if the caller is inside an autocast
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            return vae.decode(z.float() / vae.scale)
    return decode
