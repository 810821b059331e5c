"""DINOv2 with tapped queries and keys, and a small teacher of the same interface that is trained in seconds.

    python teacher.py photo.jpg                     what DINOv2 sees: patch features as colours, attention of patches
    python teacher.py photo.jpg --teacher small     the same with the small teacher of the digits; needs no download

Papers: DINOv2 (Oquab et al. 2023, arXiv 2304.07193), registers (Darcet et al. 2023, 2309.16588).
Letters: B batch, N patch tokens, D width, H heads, d = D/H. Images are uint8 RGB [B,3,H,W] until `preprocess`.
"""
import copy
import hashlib
import math
import pickle
import struct
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

PATCH_SIZE = 14                                                             # of every DINOv2
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/{base}/{name}_pretrain.pth"    # name is base, or base + _reg4
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
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)   # three of [B,H,N,d]
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
    """w3(silu(a) * b) with a, b the halves of w12; two thirds of the usual 4D, rounded up to a multiple of 8."""

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
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, num_heads), {"mlp": Mlp, "swiglu": SwiGLU}[ffn](dim)
        self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)

    def forward(self, x):
        out, q, k = self.attn(self.norm1(x))
        x = x + self.ls1(out)
        return x + self.ls2(self.mlp(self.norm2(x))), q, k


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)                      # [B,3,H,W] -> [B,N,D]


class DINOv2(nn.Module):
    """DINOv2's vision transformer, with the official parameter names.

    `teacher(images, tap_layers=())` -> tokens [B,N,D] after the last norm, and [(q, k), ...] of the tapped 0-based
    blocks, each [B,H,N,d] and unscaled. Both hold patch tokens only: class and register tokens go before any softmax.
    `features(images)` -> class token [B,D], tokens [B,N,D]. images [B,3,H,W] come from `preprocess`, on the grid that
    `resize_pos_embed` was last given.
    """

    def __init__(self, img_size=518, patch_size=PATCH_SIZE, embed_dim=768, depth=12, num_heads=12, ffn="mlp",
                 num_register_tokens=0):
        super().__init__()
        self.config = dict(img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, depth=depth,
                           num_heads=num_heads, ffn=ffn, num_register_tokens=num_register_tokens)
        self.patch_size, self.embed_dim, self.depth, self.num_heads = patch_size, embed_dim, depth, num_heads
        self.num_extra = 1 + num_register_tokens                            # tokens in front of the patches
        self.grid = (img_size // patch_size, img_size // patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], embed_dim))
        registers = nn.Parameter(torch.zeros(1, num_register_tokens, embed_dim)) if num_register_tokens else None
        self.register_parameter("register_tokens", registers)
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
                taps[i] = (q[:, :, self.num_extra:], k[:, :, self.num_extra:])              # [B,H,N,d], patches only
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
            raise ValueError(f"images of {grid[0]} x {grid[1]} patches meet a position embedding of "
                             f"{self.grid[0]} x {self.grid[1]}: call resize_pos_embed first")
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), self.patch_embed(images)], dim=1) + self.pos_embed
        if self.register_tokens is None:                                    # registers enter after the positions
            return x
        return torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)

    @torch.no_grad()
    def resize_pos_embed(self, grid):
        """Resample the position embedding, once, to `grid` patches (an int, or rows and columns); returns self."""
        grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
        if grid != self.grid:
            cls, pos = self.pos_embed[:, :1], self.pos_embed[:, 1:]
            pos = pos.float().reshape(1, *self.grid, -1).permute(0, 3, 1, 2)                # [1,D,rows,columns]
            pos = F.interpolate(pos, size=grid, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
            self.pos_embed = nn.Parameter(torch.cat([cls, pos.to(cls)], dim=1), self.pos_embed.requires_grad)
            self.grid = grid
        return self


@lru_cache
def _mean_std(device):
    """ImageNet's mean and deviation on a device, once: a copy at each step would make the host wait for the GPU."""
    return [torch.tensor(v, device=device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD)]


def normalise(images_uint8):
    mean, std = _mean_std(images_uint8.device)
    return (images_uint8.float() / 255 - mean) / std


def resize(x, grid):
    """[B,3,H,W] -> [B,3,14*rows,14*columns], bicubic without antialias; grid is an int or (rows, columns)."""
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    return F.interpolate(x, size=(PATCH_SIZE * rows, PATCH_SIZE * columns), mode="bicubic")


def preprocess(images_uint8, grid=None):
    """uint8 [B,3,H,W] -> float32 [B,3,14*grid,14*grid], normalised like ImageNet, then resized.

    `grid` is the student's token grid, an int or (rows, columns), so that student and teacher have the same tokens,
    and DINOv2 can teach small images too; by default H/16 (224 pixels for images of 256), which is REPA's choice.
    """
    grid = [max(1, side // 16) for side in images_uint8.shape[2:]] if grid is None else grid
    return resize(normalise(images_uint8), grid)


# ---- DINOv2's weights

def load_dinov2(name="dinov2_vitb14", weights=None):
    """Pretrained DINOv2 (dinov2_vits14, vitb14, vitl14, vitg14; each also with `_reg`) from a file, or fetched.

    Eval mode. Raises ValueError for a name or file that does not fit, OSError without a network.
    """
    base, registers = name.removesuffix("_reg"), 4 if name.endswith("_reg") else 0
    if base.removeprefix("dinov2_") not in DINOV2_CONFIGS or not base.startswith("dinov2_"):
        known = ", ".join("dinov2_" + k for k in DINOV2_CONFIGS)
        raise ValueError(f"teacher {name!r} is neither small nor one of {known} (each also with _reg)")
    url = DINOV2_URL.format(base=base, name=base + ("_reg4" if registers else ""))
    if weights is None:
        try:
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        except OSError as e:
            raise OSError(f"the weights of {name} could not be fetched ({e}): download {url} and name the file with "
                          f"--teacher-weights (fid.py: --weights), or use --teacher small (fid.py: other --features)"
                          ) from None
    else:
        state = _read(weights)
    with torch.device("meta"):                                              # no time lost on an initialisation
        net = DINOv2(**DINOV2_CONFIGS[base.removeprefix("dinov2_")], num_register_tokens=registers)
    own = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    if not isinstance(state, dict) or own != {k: tuple(getattr(v, "shape", ())) for k, v in state.items()}:
        found = state if isinstance(state, dict) else {}
        wrong = sorted(k for k in own.keys() | found.keys() if own.get(k) != tuple(getattr(found.get(k), "shape", ())))
        raise ValueError(f"{weights or url} holds no {name}: {len(wrong)} tensors are missing, unexpected or of "
                         f"another shape, among them {', '.join(wrong[:3])}")
    net.load_state_dict(state, assign=True)
    return net.eval()


def _read(path):
    """torch.load that ends with one clear line: FileNotFoundError or ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"teacher weights {path} do not exist or are no file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, LookupError, struct.error, ValueError) as e:
        raise ValueError(f"teacher weights {path} cannot be read: cut short, or another format "
                         f"({type(e).__name__})") from None


# ---- the small teacher

def augment(x, g, degrees=8, stretch=0.1, shift=0.1):
    """Random small rotation, shear, scale, shift (as a share of half the image) and noise; x [B,3,H,W] normalised."""
    u = torch.rand(7, len(x), generator=g, device=x.device) * 2 - 1
    a = u[0] * math.radians(degrees)
    linear = torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()], 1) + stretch * u[3:].T      # [B,4]
    matrix = torch.cat([linear.view(-1, 2, 2), shift * u[1:3].T[:, :, None]], dim=2)         # [B,2,3]
    where = F.affine_grid(matrix, x.shape, align_corners=False)
    x = F.grid_sample(x, where, padding_mode="border", align_corners=False)
    return x + 0.1 * torch.randn(x.shape, generator=g, device=x.device)


def contrast(z, ids, temperature=0.1):
    """Contrastive loss of z [B,F] in which rows with the same id attract: SimCLR (2002.05709) where ids are images,
    supervised contrastive (2004.11362) where they are classes."""
    z = F.normalize(z, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_p = (z @ z.T / temperature).masked_fill(itself, -math.inf).log_softmax(1)
    same = (ids[:, None] == ids) & ~itself
    return -(log_p.masked_fill(~same, 0).sum(1) / same.sum(1)).mean()


@torch.enable_grad()
def train_small(images, labels=None, grid=None, embed_dim=64, depth=4, num_heads=4, steps=300, batch_size=64, lr=3e-3,
                seed=0, cache=None, device="cpu"):
    """A small ViT teacher of DINOv2's interface for a small set: uint8 images [M,3,H,W], labels [M] or None.

    Two augmented views of each image attract one another, with labels all views of a class do. `grid` is the number
    of patches along a side, by default one for every 2 pixels. `cache` names a folder in which the result is kept and
    looked up. Eval mode; deterministic for a seed on one kind of machine.
    """
    grid = grid or max(1, images.shape[-1] // 2)
    config = dict(img_size=PATCH_SIZE * grid, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
    if cache is not None:
        key = repr((config, steps, batch_size, lr, seed)).encode() + images.cpu().numpy().tobytes()
        key += b"" if labels is None else labels.cpu().numpy().tobytes()
        path = Path(cache) / f"teacher-{hashlib.sha256(key).hexdigest()[:12]}.pt"
        if path.exists():
            return load_small(path).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DINOv2(**config)
        head = nn.Sequential(nn.Linear(embed_dim, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 128))
        for m in net.modules():                                             # DINOv2's 0.02 is too small if narrow
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
        nn.init.normal_(net.pos_embed, std=0.5)
    net.to(device), head.to(device)
    images, labels = images.to(device), None if labels is None else labels.to(device)
    g = torch.Generator(device).manual_seed(seed)
    opt = torch.optim.AdamW([*net.parameters(), *head.parameters()], lr=lr, weight_decay=0.05)
    for step in range(steps):
        for group in opt.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20, 1.5 * (1 - step / steps))
        rows = torch.randperm(len(images), generator=g, device=device)[:batch_size]
        ids = rows if labels is None else labels[rows]
        x = normalise(images[rows])
        tokens, _ = net(resize(torch.cat([augment(x, g), augment(x, g)]), grid))
        loss = contrast(head(tokens.mean(1)), ids.repeat(2))
        loss.backward()
        opt.step()
        opt.zero_grad()
    net.eval().requires_grad_(False)
    if cache is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save({"config": net.config, "model": net.state_dict()}, partial)
        partial.replace(path)                                               # whole or not at all
    return net


def load_small(path):
    """A teacher that `train_small` has cached."""
    saved = _read(path)
    if not isinstance(saved, dict) or saved.keys() != {"config", "model"}:
        raise ValueError(f"{path} holds no small teacher")
    net = DINOv2(**saved["config"])
    net.load_state_dict(saved["model"])
    return net.eval().requires_grad_(False)


# ---- the pictures

def pca_colours(tokens):
    """First three principal components of tokens [M,D], each stretched to [0, 1] from its 2nd to 98th percentile."""
    x = tokens.float() - tokens.float().mean(0)
    _, _, v = torch.linalg.svd(x, full_matrices=False)                      # rows of v: directions
    x = F.pad(x @ v[:3].T, (0, max(0, 3 - len(v))))                         # [M,3]
    low, high = x.quantile(0.02, dim=0), x.quantile(0.98, dim=0)
    return ((x - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)


@torch.no_grad()
def look(net, image, grid):
    """Patch tokens [N,D] of a uint8 image [3,H,W] on a (rows, columns) grid; the last block's mean attention [N,N]."""
    net = copy.deepcopy(net).resize_pos_embed(grid)                         # each image's grid from the original table
    tokens, [(q, k)] = net(preprocess(image[None], grid), (net.depth - 1,))
    return tokens[0], (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(1)[0]


def panels(image, colours, attention, grid, patches, side=256):
    """One row of the picture, float [3,side,...]: the image, its patch features as colours, attention of `patches`.

    image uint8 [3,H,W]; colours [N,3]; attention [N,N]; patches: indices in raster order, outlined in red.
    """
    rows, columns = grid
    size = (side, round(side * columns / rows))
    parts = [image.float() / 255, colours.T.view(3, rows, columns)]
    parts += [(attention[p] / attention[p].max()).view(1, rows, columns).expand(3, -1, -1) for p in patches]
    parts = [F.interpolate(p[None], size=size)[0] for p in parts]           # nearest: patches stay visible
    for part, p in zip(parts[2:], patches):
        (top, bottom), (left, right) = ([round((i + e) * s / n) for e in (0, 1)] for i, s, n in
                                        ((p // columns, size[0], rows), (p % columns, size[1], columns)))
        inside = part[:, top + 2:bottom - 2, left + 2:right - 2].clone()
        part[:, top:bottom, left:right] = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
        part[:, top + 2:bottom - 2, left + 2:right - 2] = inside
    gap = torch.ones(3, side, 4)
    return torch.cat([x for p in parts for x in (p, gap)][:-1], dim=2)


def main(argv=None):
    import run
    parser = run.Parser("teacher.py", description="Draw what a teacher sees in images.")
    parser.add_argument("images", nargs="*", help="image files; without any, four of the embedded digits")
    parser.add_argument("--teacher", default="dinov2_vitb14", help="small, or dinov2_vits14, ..b14, ..l14, ..g14[_reg]")
    parser.add_argument("--teacher-weights", help="file with the weights; else they are fetched, or small is trained")
    parser.add_argument("--cache", default="out/cache", help="where small teachers are kept")
    parser.add_argument("--grid", type=int, help="patches along the short side; else 24, fewer for tiny images")
    parser.add_argument("--patches", help="patches whose attention is drawn, as 3:4,10:2 (row:column); else three")
    parser.add_argument("--out", default="out/teacher.png", help="the picture")
    args = parser.parse_args(argv)
    with run.one_line("teacher.py"):
        draw_pictures(args)


def draw_pictures(args):
    import numpy as np
    from PIL import Image
    if args.grid is not None and args.grid < 1:
        raise ValueError(f"--grid {args.grid} must be 1 or more")
    images = []
    for path in args.images:
        try:
            images.append(torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1))
        except (OSError, SyntaxError, Image.DecompressionBombError) as e:
            raise ValueError(f"{path} is no image that can be read ({type(e).__name__})") from None
    if not images or (args.teacher == "small" and not args.teacher_weights):
        import data
        digits = data.open_data("digits")
    if args.teacher == "small" and not args.teacher_weights:
        net = train_small(data.to_rgb(digits.train.images), digits.train.labels, cache=args.cache)
    else:
        load = load_small if args.teacher == "small" else partial(load_dinov2, args.teacher)
        net = load(args.teacher_weights)
    images = images or list(data.to_rgb(digits.held.images[:4]))
    seen = []                                                               # (image, grid, patches, tokens, attention)
    for image in images:
        short = min(image.shape[1:])
        grid = args.grid or min(24, max(1, short // 2))
        grid = tuple(max(1, round(grid * s / short)) for s in image.shape[1:])
        patches = [(grid[0] // 2, grid[1] // 2), (grid[0] // 4, grid[1] // 4), (3 * grid[0] // 4, 3 * grid[1] // 4)]
        if args.patches:
            patches = [tuple(int(i) if i.isdigit() else -1 for i in p.split(":")) for p in args.patches.split(",")]
            if any(len(p) != 2 or min(p) < 0 for p in patches):
                raise ValueError(f"--patches {args.patches} must look like 3:4,10:2 (row:column)")
        if any(not (0 <= r < grid[0] and 0 <= c < grid[1]) for r, c in patches):
            raise ValueError(f"--patches {args.patches}: rows are 0 ... {grid[0] - 1}, columns 0 ... {grid[1] - 1}")
        seen.append((image, grid, [r * grid[1] + c for r, c in patches], *look(net, image, grid)))
    colours = pca_colours(torch.cat([tokens for *_, tokens, _ in seen]))    # together: a colour means one thing
    colours = colours.split([len(tokens) for *_, tokens, _ in seen])
    rows = [panels(image, c, attention, grid, patches)
            for (image, grid, patches, _, attention), c in zip(seen, colours)]
    width = max(r.shape[2] for r in rows)
    sheet = torch.cat([F.pad(r, (0, width - r.shape[2], 0, 4), value=1.0) for r in rows], dim=1)[:, :-4]
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((sheet * 255).round().byte().permute(1, 2, 0).numpy()).save(args.out)
    print(f"{args.out}: image, patch features as colours, the last block's attention of {len(patches)} patches")


if __name__ == "__main__":
    main()
