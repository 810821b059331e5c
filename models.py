"""Which network a run trains or a checkpoint holds, and what it is told of an image.

    arch = models.arch_of(cfg, images)              # the arguments of the class, as a dict
    model = models.create(arch)
    model = models.load("out/ckpt.pt")              # SiT, DiT, MM-DiT or xAR, by its tensors
    condition = models.condition_of_captions(...)   # what the model is called with, beside x and t

cfg is haste_train.py's configuration, images a data.Data. The networks are in sit.py, mmdit.py,
xar.py; text.py has the encoders of captions.
"""
import torch

import mmdit
import sit
import text
import xar

CONFIGS = {**sit.SIT_CONFIGS, **mmdit.MMDIT_CONFIGS}                        # what --model accepts
PROJECTOR = "projector"                                                     # first letters of its parameters' names


class Condition:
    """Turn labels y [B], or captions, into what a model is called with.

    Class ids stay as they are. The token ids [B,L] of captions become features [B,L,C] by a frozen
    encoder; packed features only become float32. `null` is the same of no label, for guidance.
    """

    def __init__(self, null, encoder=None):
        self.no_label = null                                                # a class id, ids [L], or features [L,C]
        self.encoder = encoder
        self.null = self(null[None])[0]

    @torch.no_grad()
    def __call__(self, y, dropped=None):
        """Return the condition of y; where dropped [B] is true, that of no label."""
        if dropped is not None:
            y = torch.where(dropped.view(-1, *[1] * (y.ndim - 1)), self.no_label, y)
        if self.encoder is None:
            return y if y.ndim == 1 else y.float()
        with torch.autocast(y.device.type, enabled=False):                  # in full precision, as packed features
            return self.encoder(y)


def condition_of_classes(count, processes):
    """Return the Condition of class ids 0 ... count - 1."""
    return Condition(torch.tensor(count, device=processes.device))


def condition_of_captions(null, about_text, weights, processes):
    """Return the Condition of captions, which `about_text` describes (text.py).

    null: the empty one, as the others are: token ids [L], or packed features [L,C]. weights: the
    file that --text names, or None. Raises ValueError or OSError, one line.
    """
    null = null.to(processes.device)
    if null.ndim == 2:
        if weights:
            raise ValueError(f"--text {weights} is not needed: the captions are packed as "
                             f"features; leave it out")
        return Condition(null)
    encoder = processes.main_first(lambda: text.open_encoder(about_text, weights))
    return Condition(null, encoder.to(processes.device))


# ---- to be trained

def arch_of(cfg, images):
    """Return the arguments of the network that --model names, for these images.

    Raises ValueError, one line, if flags and data do not fit each other.
    """
    channels, side, _ = images.shape
    patch = CONFIGS[cfg.model]["patch_size"]
    if (images.text is None) == (cfg.model in mmdit.MMDIT_CONFIGS):
        has = "class labels" if images.text is None else "captions"
        wanted = sit.SIT_CONFIGS if images.text is None else mmdit.MMDIT_CONFIGS
        raise ValueError(f"--data {cfg.data} has {has}, which --model {cfg.model} does not take: "
                         f"give another, as {next(iter(wanted))}")
    if side % patch:
        factor = images.size // side
        vae_factor = f"VAE {factor} x " if images.packed else ""
        raise ValueError(f"--image-size {images.size} must be a multiple of {factor * patch} "
                         f"({vae_factor}patch {patch} of --model {cfg.model})")
    arch = dict(input_size=side, patch_size=patch, in_channels=channels, depth=cfg.depth,
                hidden_size=cfg.hidden_size, num_heads=cfg.num_heads, qk_norm=cfg.qk_norm,
                projector_dim=cfg.projector_dim)
    if images.text is not None:
        grid = max(mmdit.TABLE_GRID, side // patch)                         # of the position table
        arch.update(context_dim=images.text["width"], table_grid=grid, zero_init=cfg.zero_init)
        return arch
    arch.update(num_classes=len(images.classes))
    if cfg.objective == "ddpm":
        arch.update(learn_sigma=True, keep_sigma=True)
    return arch


def create(arch):
    """Return the network with these arguments."""
    network = mmdit.MMDiT if "context_dim" in arch else sit.SiT
    return network(**arch)


def load_initial(model, initial, cfg):
    """Copy the weights of --init, its projector only if it has the same place and sizes.

    An xAR's is never copied: its files keep it beside the model.

    Raises ValueError, one line, if they do not fit.
    """
    weights = initial.state_dict()
    fresh = {k: w for k, w in model.state_dict().items() if k.startswith(PROJECTOR)}
    same_shapes = all(k in weights and weights[k].shape == w.shape for k, w in fresh.items())
    if not (fresh and same_shapes and initial.encoder_depth == model.encoder_depth):
        weights = {k: w for k, w in weights.items() if not k.startswith(PROJECTOR)}
        weights.update(fresh)
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        reason = " ".join(str(e).split())[:300]
        raise ValueError(f"--init {cfg.init} does not fit --model {cfg.model} and --data "
                         f"{cfg.data}: {reason}") from None


# ---- from a checkpoint

def load(path, num_heads=None, objective=None):
    """Load the model of a checkpoint, in eval mode; the names of its tensors say which one.

    `objective` is for a SiT or DiT whose file does not say which of them it is.
    """
    content = sit.read_checkpoint(path)
    content = content if isinstance(content, dict) else {}
    weights = content.get("model_ema", content.get("ema", content))
    if "z_proj.weight" in weights:
        return xar.load_xar(path, num_heads)
    if "context_embedder.weight" in weights:
        return mmdit.load_mmdit(path, num_heads)
    if "x_embedder.proj.weight" in weights:
        return sit.load_sit(path, num_heads, objective)
    raise ValueError(f"{path}: holds neither a SiT, nor an MM-DiT, nor an xAR")
