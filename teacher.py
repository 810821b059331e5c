"""Vision transformers that teach: seven published families, and a small one trained in seconds.

    net = load_teacher("dinov2_vitb14").resize_pos_embed(16)  # student's token grid
    with torch.no_grad():
        tokens, [(q, k)] = net(net.preprocess(images_uint8, 16), tap_layers=(11,))

Papers: DINOv2 (arXiv 2304.07193), registers (2309.16588), DINOv3 (2508.10104), MAE (2111.06377),
MoCo v3 (2104.02057), CLIP (2103.00020), I-JEPA (2301.08243), DINO (2104.14294).
Letters: B batch, N patch tokens, D width, H heads, d = D/H, p patch size. Images are uint8 RGB
[B,3,H,W] until `preprocess`.
"""
import hashlib
import math
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

PATCH_SIZE = 14  # of every DINOv2
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation
META = "https://dl.fbaipublicfiles.com/"
DINOV3_FORM = "https://github.com/facebookresearch/dinov3 (by mail)"


# ---- the families

def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


class Family(NamedTuple):
    """What sets a family apart from a plain vision transformer, and its files from ours."""
    url: str = None
    mean_std: tuple = IMAGENET
    eps: float = 1e-6
    act: Callable = F.gelu
    cls_token: bool = True
    layer_scale: bool = False
    rotary: bool = False  # positions rotate queries and keys; no table is added
    pre_norm: bool = False  # a norm before the blocks, and a patch convolution without bias
    final_norm: bool = True  # REPA takes the tokens of MAE and CLIP before it
    inside: str = None  # where the weights are in the official file
    dropped: tuple = ()  # beginnings of official names of no use here
    renamed: dict = {}  # parts of official names: ours, which are DINOv2's


FAMILIES = {
    "dinov2": Family(META + "dinov2/{}_pretrain.pth", layer_scale=True),
    "dinov3": Family(eps=1e-5, layer_scale=True, rotary=True,
                     dropped=("mask_token", "local_cls_norm"),
                     renamed={"storage_tokens": "register_tokens", "rope_embed.": ""}),
    "mae": Family(META + "mae/pretrain/mae_pretrain_vit_{}.pth", final_norm=False, inside="model"),
    "mocov3": Family(
        META + "moco-v3/{0}/{0}.pth.tar", inside="state_dict", dropped=("head", "fc"),
        renamed={"13.norm13": "13.norm1", "13.mlp.fc13": "13.mlp.fc1",  # misspelt in ViT-L's file
                 "14.norm14": "14.norm2", "14.mlp.fc14": "14.mlp.fc2"}),
    "clip": Family(
        "https://openaipublic.azureedge.net/clip/models/{}.pt",
        ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        eps=1e-5, act=quick_gelu, pre_norm=True, final_norm=False, dropped=("proj",),
        renamed={"conv1": "patch_embed.proj", "class_embedding": "cls_token",
                 "positional_embedding": "pos_embed", "transformer.resblocks": "blocks",
                 "ln_pre": "norm_pre", "ln_post": "norm", "ln_": "norm", "in_proj_": "qkv.",
                 "out_proj": "proj", "c_fc": "fc1", "c_proj": "fc2"}),
    # the encoder that I-JEPA evaluates; REPA's script reads the other one, "encoder"
    "ijepa": Family(META + "ijepa/{}.pth.tar", cls_token=False, inside="target_encoder"),
    "dino": Family(META + "dino/dino_{0}_pretrain/dino_{0}_pretrain.pth"),
}

DINOV2_CONFIGS = {
    "vits14": dict(embed_dim=384, depth=12, num_heads=6),
    "vitb14": dict(embed_dim=768, depth=12, num_heads=12),
    "vitl14": dict(embed_dim=1024, depth=24, num_heads=16),
    "vitg14": dict(embed_dim=1536, depth=40, num_heads=24, ffn="swiglu"),
}
SMALL = dict(img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6)
BASE = dict(SMALL, embed_dim=768, num_heads=12)
LARGE = dict(SMALL, embed_dim=1024, depth=24, num_heads=16)
HUGE = dict(SMALL, embed_dim=1280, depth=32, num_heads=16)
DINOV3_CONFIGS = {
    "vits16": SMALL,
    "vits16plus": dict(SMALL, ffn="swiglu", hidden=1536),
    "vitb16": BASE,
    "vitl16": LARGE,
    "vitl16plus": dict(LARGE, ffn="swiglu", hidden=4096),
    "vith16plus": dict(HUGE, num_heads=20, ffn="swiglu", hidden=5120),
    "vit7b16": dict(SMALL, embed_dim=4096, depth=40, num_heads=32, ffn="swiglu", hidden=8192,
                    qkv_bias=False),
}
TEACHERS = {}  # name: configuration, and what completes the address
for _size, _config in DINOV2_CONFIGS.items():
    _name = f"dinov2_{_size}"
    _file = f"{_name}/{_name}"
    TEACHERS[_name] = _config, _file
    TEACHERS[f"{_name}_reg"] = dict(_config, num_register_tokens=4), f"{_file}_reg4"
for _size, _config in DINOV3_CONFIGS.items():
    TEACHERS[f"dinov3_{_size}"] = dict(_config, num_register_tokens=4), DINOV3_FORM
TEACHERS |= {
    "mae_vitb16": (BASE, "base"),
    "mae_vitl16": (LARGE, "large"),
    "mae_vith14": (dict(HUGE, patch_size=14), "huge"),
    "mocov3_vits16": (dict(SMALL, num_heads=12), "vit-s-300ep"),
    "mocov3_vitb16": (BASE, "vit-b-300ep"),
    "mocov3_vitl16": (LARGE, "https://drive.google.com/file/d/1Foa2-FqhwIFYjcAAbY9sXyO-1Vwwx-_9"),
    "clip_vitb32": (
        dict(BASE, patch_size=32),
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32"),
    "clip_vitb16": (
        BASE, "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16"),
    "clip_vitl14": (
        dict(LARGE, patch_size=14),
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14"),
    "clip_vitl14_336": (
        dict(LARGE, patch_size=14, img_size=336),
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px"),
    "ijepa_vith14": (dict(HUGE, patch_size=14), "IN1K-vit.h.14-300e"),
    "ijepa_vith16_448": (dict(HUGE, img_size=448), "IN1K-vit.h.16-448px-300e"),
    "ijepa_vitg16": (dict(HUGE, embed_dim=1408, depth=40, hidden=6144), "IN22K-vit.g.16-600e"),
    "dino_vits16": (SMALL, "deitsmall16"),
    "dino_vits8": (dict(SMALL, patch_size=8), "deitsmall8"),
    "dino_vitb16": (BASE, "vitbase16"),
    "dino_vitb8": (dict(BASE, patch_size=8), "vitbase8"),
}


# ---- the network

def rotate(x, rope):
    """Rotate queries or keys x [B,H,N,d] in float32; rope [2,N,d] holds cosines and sines."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, dim, num_heads, qkv_bias):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, rope):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # three of [B,H,N,d]
        if rope is not None:
            q = rotate(q, rope)
            k = rotate(k, rope)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(B, N, D)), q, k


class Mlp(nn.Module):
    def __init__(self, dim, hidden, act):
        super().__init__()
        hidden = hidden or 4 * dim
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.act = act

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class SwiGLU(nn.Module):
    """w3(silu(a) * b), with a and b the halves of w12(x)."""

    def __init__(self, dim, hidden, act):
        super().__init__()
        # two thirds of the usual 4D, since there are three matrices
        hidden = hidden or (int(8 * dim / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, dim, num_heads, ffn, hidden, qkv_bias, family):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, family.eps)
        self.norm2 = nn.LayerNorm(dim, family.eps)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.mlp = {"mlp": Mlp, "swiglu": SwiGLU}[ffn](dim, hidden, family.act)
        scale = LayerScale if family.layer_scale else nn.Identity
        self.ls1 = scale(dim)
        self.ls2 = scale(dim)

    def forward(self, x, rope=None):
        out, q, k = self.attn(self.norm1(x), rope)
        x = x + self.ls1(out)
        x = x + self.ls2(self.mlp(self.norm2(x)))
        return x, q, k


class ViT(nn.Module):
    """The vision transformer of a family, with DINOv2's parameter names.

    `teacher(images, tap_layers=())` returns tokens [B,N,D] as REPA aligns with them, and [(q, k),
    ...] of the tapped 0-based blocks, each [B,H,N,d] and unscaled; both of patches only, class and
    register tokens are removed before any softmax.
    `features(images)` returns the class token [B,D], None for I-JEPA, and the tokens.
    images [B,3,H,W] come from `preprocess`, on the grid last given to `resize_pos_embed`.
    """

    def __init__(self, img_size=518, patch_size=PATCH_SIZE, embed_dim=768, depth=12, num_heads=12,
                 ffn="mlp", num_register_tokens=0, family="dinov2", hidden=None, qkv_bias=True):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.family = FAMILIES[family]
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.depth = depth
        self.num_heads = num_heads
        self.num_cls = int(self.family.cls_token)
        self.num_extra = self.num_cls + num_register_tokens  # tokens in front of the patches
        self.grid = (img_size // patch_size,) * 2  # rows, columns

        def table(rows):
            return nn.Parameter(torch.zeros(1, rows, embed_dim)) if rows else None

        self.cls_token = table(self.num_cls)
        self.pos_embed = table(self.num_cls + self.grid[0] * self.grid[1])
        self.register_tokens = table(num_register_tokens)
        if self.family.rotary:
            self.pos_embed = None
            periods = 100 ** torch.linspace(0, 1, embed_dim // num_heads // 4 + 1)[:-1]
            self.register_buffer("periods", periods)
        if family == "dinov2":
            self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))  # never used here
        conv = nn.Conv2d(3, embed_dim, patch_size, patch_size, bias=not self.family.pre_norm)
        self.patch_embed = nn.ModuleDict({"proj": conv})
        norm_pre = nn.LayerNorm if self.family.pre_norm else nn.Identity
        self.norm_pre = norm_pre(embed_dim, self.family.eps)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, ffn, hidden, qkv_bias, self.family) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, self.family.eps)

        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def forward(self, images, tap_layers=()):
        return self._run(images, tap_layers)[1:]

    def features(self, images):
        return self._run(images)[:2]

    def preprocess(self, images_uint8, grid=None):
        return preprocess(images_uint8, grid, self.patch_size, self.family.mean_std)

    def _run(self, images, tap_layers=()):
        if any(not 0 <= i < self.depth for i in tap_layers):
            raise ValueError(f"tap_layers {list(tap_layers)} must lie in 0 ... {self.depth - 1}")
        taps = {}
        x = self._embed(images)
        rope = self._rope(images)
        for i, block in enumerate(self.blocks):
            x, q, k = block(x, rope)
            if i in tap_layers:
                taps[i] = (q[:, :, self.num_extra:], k[:, :, self.num_extra:])  # [B,H,N,d]
        if self.family.final_norm:
            x = self.norm(x)
        cls = x[:, 0] if self.num_cls else None
        return cls, x[:, self.num_extra:], [taps[i] for i in tap_layers]

    def _embed(self, images):
        x = self.patch_embed.proj(images)
        if self.pos_embed is not None and x.shape[2:] != self.grid:
            raise ValueError(f"{tuple(x.shape[2:])} patches do not fit positions of {self.grid}: "
                             f"call resize_pos_embed first")
        x = x.flatten(2).transpose(1, 2)  # [B,N,D]
        if self.num_cls:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        if self.register_tokens is not None:
            # registers have no position: they enter after the positions were added
            registers = self.register_tokens.expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        return self.norm_pre(x)

    def _rope(self, images):
        """Return cosines and sines [2,tokens,d] of DINOv3's rotation, or None."""
        if not self.family.rotary:
            return None
        counts = [side // self.patch_size for side in images.shape[2:]]
        sides = [torch.arange(1, 2 * n, 2, device=images.device) / n - 1 for n in counts]
        places = torch.cartesian_prod(*sides)  # [N,2] in -1 ... 1
        angles = (2 * math.pi * places[:, :, None] / self.periods).flatten(1)  # [N,d/2]
        # an angle of 0: class and register tokens have no place
        angles = F.pad(angles, (0, 0, self.num_extra, 0)).repeat(1, 2)
        return torch.stack([angles.cos(), angles.sin()])

    @torch.no_grad()
    def resize_pos_embed(self, grid):
        """Resample the position embedding to `grid` patches, an int or (rows, columns).

        Returns the network itself. Call it once: resampling twice blurs twice.
        """
        grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
        if grid != self.grid and self.pos_embed is not None:
            cls = self.pos_embed[:, :self.num_cls]
            pos = self.pos_embed[:, self.num_cls:].float()
            pos = pos.reshape(1, *self.grid, -1).permute(0, 3, 1, 2)  # [1,D,rows,columns]
            pos = F.interpolate(pos, size=grid, mode="bicubic", antialias=True)
            pos = pos.flatten(2).transpose(1, 2).to(cls)  # [1,N,D]
            self.pos_embed = nn.Parameter(torch.cat([cls, pos], 1), self.pos_embed.requires_grad)
        self.grid = grid
        return self


DINOv2 = ViT  # its defaults are DINOv2-B's


# ---- images

@lru_cache
def _mean_std(mean_std, device):
    # cached, since a copy in every step would make the host wait for the GPU
    return [torch.tensor(v, device=device).view(3, 1, 1) for v in mean_std]


def normalise(images_uint8, mean_std=IMAGENET):
    """Return float32 images with the mean subtracted, divided by the deviation."""
    mean, std = _mean_std(mean_std, images_uint8.device)
    return (images_uint8.float() / 255).sub_(mean).div_(std)


def resize(x, grid, patch_size=PATCH_SIZE):
    """Resize [B,3,H,W] to [B,3,p*rows,p*columns]; `grid` is an int or (rows, columns)."""
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    # no antialias: REPA resizes its teachers' images like this
    return F.interpolate(x, size=(patch_size * rows, patch_size * columns), mode="bicubic")


def preprocess(images_uint8, grid=None, patch_size=PATCH_SIZE, mean_std=IMAGENET):
    """Normalise images and resize them to a teacher's patches, by default DINOv2's.

    uint8 [B,3,H,W] -> float32 [B,3,p*rows,p*columns]. `grid` is the student's token grid, an int
    or (rows, columns), so that both have the same tokens; by default REPA's, H/16 by W/16.
    """
    if grid is None:
        grid = [max(1, side // 16) for side in images_uint8.shape[2:]]
    return resize(normalise(images_uint8, mean_std), grid, patch_size)


# ---- loading

def load_teacher(name="dinov2_vitb14", weights=None):
    """Load a teacher from its official file `weights`, or fetch that: frozen, in eval mode.

    `name` is one of TEACHERS, or small for a file of `train_small`. Raises ValueError or OSError.
    """
    if name == "small":
        if weights is None:
            raise ValueError("teacher small needs --teacher-weights, a file of train_small")
        return load_small(weights)
    if name not in TEACHERS:
        raise ValueError(f"--teacher {name} is neither small nor one of {', '.join(TEACHERS)}")
    config, file = TEACHERS[name]
    config = dict(config, family=name.split("_")[0])
    family = FAMILIES[config["family"]]
    url = file if file.startswith("https") else family.url.format(file)
    path = weights or Path(torch.hub.get_dir(), "checkpoints", url.split("/")[-1])
    if weights is None and not path.exists():
        try:
            if url == file:
                raise OSError("only by hand")
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path))
        except Exception as e:
            raise OSError(f"{name} could not be fetched ({e}): download {url} and name the file "
                          f"with --teacher-weights (fid.py: --weights)") from None
    return _build(_read(path), f"{path} is not a {name}", config, family.inside)


load_dinov2 = load_teacher


def load_small(path):
    """Load a teacher that `train_small` has cached: frozen, in eval mode."""
    return _build(_read(path), f"{path} is not a small teacher", inside="model")


def teacher_from_state_dict(family, sd, num_heads=None):
    """Return the network of a state dict with a family's official names: frozen, in eval mode.

    Wrappers' prefixes and other towers may be in it. Shapes say all but the number of heads, by
    default the published one of this width. Raises ValueError.
    """
    config = dict(family=family, num_heads=num_heads)
    return _build(sd, f"this is not a state dict of {family}", config)


def _read(path):
    if not Path(path).is_file():
        raise FileNotFoundError(f"teacher weights {path} do not exist or are not a file")
    try:
        if not zipfile.is_zipfile(path):
            return torch.load(path, map_location="cpu", weights_only=True)
        # torch's own reader: others may see other files in these bytes
        archive = torch._C.PyTorchFileReader(str(path))
        files = archive.get_all_records()
        if "constants.pkl" in files and not any(
                b"__setstate__" in archive.get_record(file) for file in files):
            # CLIP's TorchScript: loading it runs a __setstate__, nothing else
            return torch.jit.load(path, map_location="cpu").state_dict()
        # mapped: of many gigabytes of training, only the teacher is read
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:
        raise ValueError(f"teacher weights {path} cannot be read: cut short, or another format "
                         f"({type(e).__name__})") from None


def _our_names(family, sd):
    """Return an official state dict with our names."""
    # wrappers of training, and CLIP's tower for images
    for prefix in ("module.", "base_encoder.", "visual."):
        inner = {name.removeprefix(prefix): w for name, w in sd.items() if name.startswith(prefix)}
        sd = inner or sd
    found = {}
    for name, w in sd.items():
        for official, ours in FAMILIES[family].renamed.items():
            name = name.replace(official, ours)
        if not name.startswith(FAMILIES[family].dropped):
            found[name] = w

    if family == "clip":
        found["cls_token"] = found["cls_token"][None, None]  # [D] -> [1,1,D]
        found["pos_embed"] = found["pos_embed"][None]  # [1+N,D] -> [1,1+N,D]
    if family == "dinov3":
        for name in [n for n in found if n.endswith("qkv.bias")]:
            found[name] = found[name] * found.pop(f"{name}_mask")  # keys have no bias
        for name in [n for n in found if ".w1." in n]:
            halves = [found.pop(name), found.pop(name.replace("w1", "w2"))]
            found[name.replace("w1", "w12")] = torch.cat(halves)
    return found


def _config_of(sd, family, num_heads):
    """Return the configuration that the shapes in a state dict say."""
    D, _, p, _ = sd["patch_embed.proj.weight"].shape
    heads = {c["embed_dim"]: c["num_heads"] for n, (c, _) in TEACHERS.items() if f"{family}_" in n}
    num_heads = num_heads or heads.get(D) or family == "clip" and D // 64
    if not num_heads or D % num_heads:
        raise ValueError(f"give num_heads, a divisor of the width {D}")

    columns = {name: w.shape[1] for name, w in sd.items() if w.ndim > 1}
    w3 = columns.get("blocks.0.mlp.w3.weight")
    ffn = "swiglu" if w3 else "mlp"
    side = math.isqrt(columns.get("pos_embed", 196))  # a row for the class does not change the root
    return dict(
        img_size=p * side, patch_size=p, embed_dim=D, num_heads=num_heads, ffn=ffn, family=family,
        depth=len({name.split(".")[1] for name in sd if name.startswith("blocks.")}),
        num_register_tokens=columns.get("register_tokens", 0),
        hidden=w3 or columns["blocks.0.mlp.fc2.weight"], qkv_bias="blocks.0.attn.qkv.bias" in sd)


def _build(state, wrong, config=None, inside=None):
    """Return the network of a state dict with official names; errors begin with `wrong`."""
    try:
        config = config or state["config"]  # a small teacher's
        if inside is not None:
            state = state[inside]
        state = _our_names(config.get("family", "dinov2"), state)
        if "embed_dim" not in config:
            config = _config_of(state, **config)
        # meta, since an initialisation would be overwritten
        with torch.device("meta"):
            net = ViT(**config)
        net.to_empty(device="cpu").load_state_dict(state)  # a copy, in float32
    except KeyError as e:
        raise ValueError(f"{wrong}: no {e} in it") from None
    except Exception as e:
        # torch lists all keys: the beginning says enough
        raise ValueError(f"{wrong}: {' '.join(str(e).split())[:300]}") from None
    return net.eval().requires_grad_(False)


# ---- the small teacher

def augment(x, g, degrees=8, stretch=0.1, shift=0.1):
    """Apply a random small rotation, stretch, shear and shift to each image, and add noise.

    x [B,3,H,W] normalised -> the same shape. `shift` is in halves of an image.
    """
    u = torch.rand(7, len(x), generator=g, device=x.device) * 2 - 1  # in [-1, 1]
    angle = u[0] * math.radians(degrees)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1)
    linear = (rotation + stretch * u[3:].T).view(-1, 2, 2)  # [B,2,2]
    matrix = torch.cat([linear, shift * u[1:3].T[:, :, None]], dim=2)  # [B,2,3]
    positions = F.affine_grid(matrix, x.shape, align_corners=False)
    x = F.grid_sample(x, positions, padding_mode="border", align_corners=False)
    return x + 0.1 * torch.randn(x.shape, generator=g, device=x.device)


def contrast(z, ids, temperature=0.1):
    """Return the contrastive loss of z [B,F]: rows with the same id attract one another.

    With ids of images it is SimCLR's (2002.05709), with those of classes that of 2004.11362.
    """
    z = F.normalize(z, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_p = (z @ z.T / temperature).masked_fill(itself, -math.inf).log_softmax(1)  # [B,B]
    same = (ids[:, None] == ids) & ~itself
    return -(log_p.masked_fill(~same, 0).sum(1) / same.sum(1)).mean()


def _cache_file(cache, settings, images, labels):
    key = repr(settings).encode() + images.cpu().numpy().tobytes()
    if labels is not None:
        key += labels.cpu().numpy().tobytes()
    return Path(cache) / f"teacher-{hashlib.sha256(key).hexdigest()[:12]}.pt"


def _new_small(config, seed):
    """Return an untrained small teacher, and a head from its mean token to 128 features."""
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay
        torch.manual_seed(seed)
        net = DINOv2(**config)
        head = nn.Sequential(nn.Linear(net.embed_dim, 256), nn.BatchNorm1d(256), nn.ReLU(),
                             nn.Linear(256, 128))
        # DINOv2's std of 0.02 is too small for a network this narrow
        for m in net.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
        nn.init.normal_(net.pos_embed, std=0.5)
    return net, head


@torch.no_grad()
def centre_tokens(net, images, grid, batch_size=256):
    """Let every channel of `images`' tokens have mean 0 and deviation 1, by the last norm.

    What they share is 0.68 of their norm on the digits: cosines would begin at 0.7.
    """
    count = 0
    mean = square = 0.0
    for part in images.split(batch_size):
        tokens = net(resize(normalise(part), grid))[0].flatten(0, 1).double()  # [b*N,D]
        count += len(tokens)
        mean = mean + tokens.sum(0)
        square = square + tokens.square().sum(0)
    mean = mean / count
    std = (square / count - mean.square()).clamp(min=1e-12).sqrt()
    net.norm.bias.sub_(mean).div_(std)
    net.norm.weight.div_(std)


@torch.enable_grad()
def train_small(images, labels=None, grid=None, embed_dim=64, depth=4, num_heads=4, steps=300,
                batch_size=64, lr=3e-3, seed=0, cache=None, device="cpu"):
    """Train a small ViT with DINOv2's interface on a small set, and return it in eval mode.

    images uint8 [M,3,H,W], labels [M] or None. Two augmented views of each image attract one
    another; with labels, all views of a class do. `grid` is the number of patches along a side, by
    default one for every 2 pixels. `cache` is a folder in which the result is kept and looked up.
    The same seed gives the same teacher on one kind of machine.
    """
    grid = grid or max(1, images.shape[-1] // 2)
    config = dict(img_size=PATCH_SIZE * grid, embed_dim=embed_dim, depth=depth,
                  num_heads=num_heads)
    if cache is not None:
        # their order is part of the file's name, which finds old caches
        settings = (config, steps, batch_size, lr, seed, "centred")
        path = _cache_file(cache, settings, images, labels)
        if path.exists():
            return load_small(path).to(device)

    net, head = _new_small(config, seed)
    net.to(device)
    head.to(device)
    images = images.to(device)
    if labels is not None:
        labels = labels.to(device)
    g = torch.Generator(device).manual_seed(seed)
    opt = torch.optim.AdamW([*net.parameters(), *head.parameters()], lr=lr, weight_decay=0.05)

    for step in range(steps):
        # 20 steps of warm-up, constant to the end of the first third, then linearly to zero
        for group in opt.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20, 1.5 * (1 - step / steps))

        rows = torch.randperm(len(images), generator=g, device=device)[:batch_size]
        ids = rows if labels is None else labels[rows]  # who attracts whom
        x = normalise(images[rows])
        views = torch.cat([augment(x, g), augment(x, g)])  # [2B,3,H,W]
        tokens, _ = net(resize(views, grid))
        loss = contrast(head(tokens.mean(1)), ids.repeat(2))
        loss.backward()
        opt.step()
        opt.zero_grad()

    net.eval().requires_grad_(False)
    centre_tokens(net.cpu(), images.cpu(), grid)  # it needs float64
    if cache is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save({"config": config, "model": net.state_dict()}, partial)
        partial.replace(path)  # whole or not at all
    return net.to(device)
