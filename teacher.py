"""DINOv2 with tapped queries and keys, and a small teacher like it that trains in seconds.

    net = load_dinov2("dinov2_vitb14").resize_pos_embed(16)                 # student's token grid
    with torch.no_grad():
        tokens, [(q, k)] = net(preprocess(images_uint8, 16), tap_layers=(11,))  # patch tokens only

In this repository, `python -m tools.look photo.jpg` draws what a teacher sees.

Papers: DINOv2 (Oquab et al. 2023, arXiv 2304.07193), registers (Darcet et al. 2023, 2309.16588).
Letters: B batch, N patch tokens, D width, H heads, d = D/H; in image shapes H, W are height and
width. Images are uint8 RGB [B,3,H,W] until `preprocess`.
"""
import hashlib
import math
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

PATCH_SIZE = 14                                                             # of every DINOv2
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# `base` is dinov2_vits14 and so on; `name` is the same, with _reg4 appended if it has registers
DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/{base}/{name}_pretrain.pth"
DINOV2_CONFIGS = {
    "vits14": dict(embed_dim=384, depth=12, num_heads=6),
    "vitb14": dict(embed_dim=768, depth=12, num_heads=12),
    "vitl14": dict(embed_dim=1024, depth=24, num_heads=16),
    "vitg14": dict(embed_dim=1536, depth=40, num_heads=24, ffn="swiglu"),
}


# ---- the network

class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # three of [B,H,N,d]
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(B, N, D)), q, k


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """w3(silu(a) * b), with a and b the halves of w12(x).

    Three matrices instead of two, so the hidden width is two thirds of the usual 4D, rounded up to
    a multiple of 8.
    """

    def __init__(self, dim):
        super().__init__()
        hidden = (int(8 * dim / 3) + 7) // 8 * 8
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
    def __init__(self, dim, num_heads, ffn):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.mlp = {"mlp": Mlp, "swiglu": SwiGLU}[ffn](dim)
        self.ls1 = LayerScale(dim)
        self.ls2 = LayerScale(dim)

    def forward(self, x):
        out, q, k = self.attn(self.norm1(x))
        x = x + self.ls1(out)
        x = x + self.ls2(self.mlp(self.norm2(x)))
        return x, q, k


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)                      # [B,3,H,W] -> [B,N,D]


class DINOv2(nn.Module):
    """DINOv2's vision transformer, with the official parameter names.

    `teacher(images, tap_layers=())` returns tokens [B,N,D] after the last norm, and [(q, k), ...]
    of the tapped 0-based blocks, each [B,H,N,d] and unscaled. Both hold patch tokens only: class
    and register tokens are removed before any softmax.
    `features(images)` returns the class token [B,D] and tokens [B,N,D].
    images [B,3,H,W] come from `preprocess`, on the grid last given to `resize_pos_embed`.
    """

    def __init__(self, img_size=518, patch_size=PATCH_SIZE, embed_dim=768, depth=12, num_heads=12,
                 ffn="mlp", num_register_tokens=0):
        super().__init__()
        self.config = dict(img_size=img_size, patch_size=patch_size, embed_dim=embed_dim,
                           depth=depth, num_heads=num_heads, ffn=ffn,
                           num_register_tokens=num_register_tokens)
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.depth = depth
        self.num_heads = num_heads
        self.num_extra = 1 + num_register_tokens                            # tokens in front of the patches
        self.grid = (img_size // patch_size, img_size // patch_size)        # rows, columns

        N = self.grid[0] * self.grid[1]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + N, embed_dim))
        self.register_tokens = None
        if num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, num_register_tokens, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))           # in every official file, unused here
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, ffn) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)

    def forward(self, images, tap_layers=()):
        if any(not 0 <= i < self.depth for i in tap_layers):
            raise ValueError(f"tap_layers {list(tap_layers)} must lie in 0 ... {self.depth - 1}")
        taps = {}
        x = self._embed(images)
        for i, block in enumerate(self.blocks):
            x, q, k = block(x)
            if i in tap_layers:
                taps[i] = (q[:, :, self.num_extra:], k[:, :, self.num_extra:])  # patches only: [B,H,N,d]
        return self.norm(x)[:, self.num_extra:], [taps[i] for i in tap_layers]

    def features(self, images):
        x = self._embed(images)
        for block in self.blocks:
            x, _, _ = block(x)
        x = self.norm(x)
        return x[:, 0], x[:, self.num_extra:]

    def _embed(self, images):
        grid = (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        if grid != self.grid:
            raise ValueError(f"images of {grid[0]} x {grid[1]} patches do not fit a position "
                             f"embedding of {self.grid[0]} x {self.grid[1]}: call "
                             f"resize_pos_embed first")
        cls = self.cls_token.expand(len(images), -1, -1)
        x = torch.cat([cls, self.patch_embed(images)], dim=1) + self.pos_embed  # [B,1+N,D]
        if self.register_tokens is None:
            return x

        # registers have no position: they enter after the positions were added
        registers = self.register_tokens.expand(len(images), -1, -1)
        return torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)            # class, registers, patches

    @torch.no_grad()
    def resize_pos_embed(self, grid):
        """Resample the position embedding to `grid` patches, an int or (rows, columns).

        Returns the network itself. Call it once: resampling twice blurs twice.
        """
        grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
        if grid != self.grid:
            cls = self.pos_embed[:, :1]                                     # not a place: kept as it is
            pos = self.pos_embed[:, 1:].float()
            pos = pos.reshape(1, *self.grid, -1).permute(0, 3, 1, 2)        # [1,D,rows,columns]
            pos = F.interpolate(pos, size=grid, mode="bicubic", antialias=True)
            pos = pos.flatten(2).transpose(1, 2).to(cls)                    # [1,N,D]
            self.pos_embed = nn.Parameter(torch.cat([cls, pos], dim=1),
                                          self.pos_embed.requires_grad)
            self.grid = grid
        return self


# ---- from images to what the network takes

@lru_cache
def _mean_std(device):
    """Return ImageNet's mean and deviation [3,1,1] on a device.

    Cached, since a copy in every step would make the host wait for the GPU.
    """
    return [torch.tensor(v, device=device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD)]


def normalise(images_uint8):
    """Return float32 images with ImageNet's mean subtracted, divided by its deviation."""
    mean, std = _mean_std(images_uint8.device)
    return (images_uint8.float() / 255).sub_(mean).div_(std)                # in place: photographs are large


def resize(x, grid):
    """Resize [B,3,H,W] to [B,3,14*rows,14*columns]; `grid` is an int or (rows, columns)."""
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    # no antialias: REPA resizes its teacher's images like this
    return F.interpolate(x, size=(PATCH_SIZE * rows, PATCH_SIZE * columns), mode="bicubic")


def preprocess(images_uint8, grid=None):
    """Normalise images and resize them to the teacher's patches.

    uint8 [B,3,H,W] -> float32 [B,3,14*rows,14*columns]. `grid` is the student's token grid, an int
    or (rows, columns): student and teacher then have the same tokens, and DINOv2 can teach small
    images, too. The default is REPA's choice, H/16 by W/16: 224 pixels for images of 256.
    """
    if grid is None:
        grid = [max(1, side // 16) for side in images_uint8.shape[2:]]
    return resize(normalise(images_uint8), grid)


# ---- loading

def load_dinov2(name="dinov2_vitb14", weights=None):
    """Load a pretrained DINOv2 from the file `weights`, or fetch it: frozen, in eval mode.

    Names: dinov2_vits14, dinov2_vitb14, dinov2_vitl14, dinov2_vitg14; each also with `_reg`.
    Raises ValueError if the name is unknown or the file does not fit, OSError without a network.
    """
    base = name.removesuffix("_reg")
    size = base.removeprefix("dinov2_")
    if size not in DINOV2_CONFIGS or not base.startswith("dinov2_"):
        known = ", ".join("dinov2_" + k for k in DINOV2_CONFIGS)
        raise ValueError(f"teacher {name!r} is neither small nor one of {known} "
                         f"(each also with _reg)")
    registers = 4 if name.endswith("_reg") else 0
    full_name = f"{base}_reg4" if registers else base
    url = DINOV2_URL.format(base=base, name=full_name)

    if weights is not None:
        state = _read(weights)
    else:
        try:
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        except OSError as e:
            raise OSError(f"the weights of {name} could not be fetched ({e}): download {url} and "
                          f"name the file with --teacher-weights (fid.py: --weights), or use "
                          f"--teacher small (fid.py: other --features)") from None
    config = dict(DINOV2_CONFIGS[size], num_register_tokens=registers)
    return _build(config, state, f"{weights or url} is not a {name}").requires_grad_(False)


def load_small(path):
    """Load a teacher that `train_small` has cached, in eval mode.

    Raises FileNotFoundError or ValueError if there is none in the file.
    """
    saved = _read(path)
    wrong = f"{path} is not a small teacher"
    if not isinstance(saved, dict) or saved.keys() != {"config", "model"}:
        raise ValueError(f"{wrong}: name a file that training has cached, teacher-*.pt")
    return _build(saved["config"], saved["model"], wrong).requires_grad_(False)


def _read(path):
    """Read a file of weights. Raises FileNotFoundError or ValueError with one line."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"teacher weights {path} do not exist or are not a file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise ValueError(f"teacher weights {path} cannot be read: cut short, or another format "
                         f"({type(e).__name__})") from None


def _build(config, state, wrong):
    """Return the network of `config` with the weights `state`; errors begin with `wrong`."""
    try:
        # on the meta device no time is spent on an initialisation that is overwritten
        with torch.device("meta"):
            net = DINOv2(**config)
        net.load_state_dict(state, assign=True)
    except Exception as e:
        # torch lists every missing key, line by line: the beginning says enough
        raise ValueError(f"{wrong}: {' '.join(str(e).split())[:300]}") from None
    return net.eval()


# ---- the small teacher

def augment(x, g, degrees=8, stretch=0.1, shift=0.1):
    """Apply a random small rotation, stretch, shear and shift to each image, and add noise.

    x [B,3,H,W] normalised -> the same shape. `shift` is a share of half the image.
    """
    u = torch.rand(7, len(x), generator=g, device=x.device) * 2 - 1         # in [-1, 1]
    angle = u[0] * math.radians(degrees)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1)
    linear = (rotation + stretch * u[3:].T).view(-1, 2, 2)                  # [B,2,2]
    matrix = torch.cat([linear, shift * u[1:3].T[:, :, None]], dim=2)       # [B,2,3]
    positions = F.affine_grid(matrix, x.shape, align_corners=False)
    x = F.grid_sample(x, positions, padding_mode="border", align_corners=False)
    return x + 0.1 * torch.randn(x.shape, generator=g, device=x.device)


def contrast(z, ids, temperature=0.1):
    """Return the contrastive loss of z [B,F], in which rows with the same id attract one another.

    If ids stand for images it is SimCLR's (2002.05709), if they are classes it is that of
    supervised contrastive learning (2004.11362).
    """
    z = F.normalize(z, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_p = (z @ z.T / temperature).masked_fill(itself, -math.inf).log_softmax(1)   # [B,B]
    same = (ids[:, None] == ids) & ~itself
    return -(log_p.masked_fill(~same, 0).sum(1) / same.sum(1)).mean()


def _cache_file(cache, settings, images, labels):
    """Return the file that a small teacher is kept in, named after all that it depends on."""
    key = repr(settings).encode() + images.cpu().numpy().tobytes()
    if labels is not None:
        key += labels.cpu().numpy().tobytes()
    return Path(cache) / f"teacher-{hashlib.sha256(key).hexdigest()[:12]}.pt"


def _new_small(config, seed):
    """Return an untrained small teacher, and the head that maps its mean token to 128 features."""
    D = config["embed_dim"]
    with torch.random.fork_rng(devices=[]):                                 # the caller's random numbers stay
        torch.manual_seed(seed)
        net = DINOv2(**config)
        head = nn.Sequential(nn.Linear(D, 256), nn.BatchNorm1d(256), nn.ReLU(),
                             nn.Linear(256, 128))
        # DINOv2's std of 0.02 is too small for a network this narrow
        for m in net.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
        nn.init.normal_(net.pos_embed, std=0.5)
    return net, head


@torch.no_grad()
def centre_tokens(net, images, grid, batch_size=256):
    """Let every channel of the tokens of `images` have mean 0 and deviation 1, by the last norm.

    What all tokens have in common is 0.68 of their norm on the digits: a student that has learned
    nothing but that would reach a cosine of 0.7.
    """
    count = 0
    mean = square = 0.0
    for part in images.split(batch_size):
        tokens = net(resize(normalise(part), grid))[0].flatten(0, 1).double()               # [b*N,D]
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
    another; with labels, all views of a class do. The tokens are centred, see `centre_tokens`.
    `grid` is the number of patches along a side, by default one for every 2 pixels. `cache` is a
    folder in which the result is kept and looked up. The same seed gives the same teacher on one
    kind of machine.
    """
    grid = grid or max(1, images.shape[-1] // 2)
    config = dict(img_size=PATCH_SIZE * grid, embed_dim=embed_dim, depth=depth,
                  num_heads=num_heads)
    if cache is not None:
        # the order of the settings is part of the file's name: changed, it would lose old caches
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
        ids = rows if labels is None else labels[rows]                      # who attracts whom
        x = normalise(images[rows])
        views = torch.cat([augment(x, g), augment(x, g)])                   # [2B,3,H,W]
        tokens, _ = net(resize(views, grid))
        loss = contrast(head(tokens.mean(1)), ids.repeat(2))
        loss.backward()
        opt.step()
        opt.zero_grad()

    # the head is thrown away: what the student sees are the tokens
    net.eval().requires_grad_(False)
    centre_tokens(net, images, grid)
    if cache is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".partial")
        torch.save({"config": net.config, "model": net.state_dict()}, unfinished)
        unfinished.replace(path)                                            # whole or not at all
    return net
