"""The straightforward version of what this library does: what one writes first, after the papers.

The benchmarks compare with it, on the same weights, and say first that both compute the same. Each
function says what the library does instead. Maps, mask and cache are as the official codes of HASTE
and xAR have them.
Letters: those of sit.py and xar.py.
"""
import torch
import torch.nn.functional as F

import data
import haste
import sit
import teacher as teachers
import xar


# ---- HASTE

def attention_logits(q, k):
    """Return the logits [B,H,N,N] of attention, in float32; q, k [B,H,N,d]."""
    return (q * q.shape[-1] ** -0.5 @ k.mT).float()


def cross_entropy(log_map, teacher_map):
    """Return haste.attention_alignment from two written-down maps [B,H,N,N].

    The library needs neither: its gradient is that of two calls of fused attention.
    """
    H = min(log_map.shape[1], teacher_map.shape[1])
    return -(teacher_map[:, :H] * log_map[:, :H]).sum(-1).mean()


@torch.no_grad()
def haste_targets(teacher, pixels):
    """Return the teacher's tokens [B,N,D] and the attention map [B,H,N,N] of each of its blocks.

    The teacher runs in float32. The library's runs under autocast, with fused attention, and keeps
    queries and keys of the three or four blocks that it aligns.
    """
    with torch.autocast(pixels.device.type, enabled=False):
        x = teacher._embed(teachers.preprocess(data.to_rgb(pixels), teacher.grid))
        maps = []
        for block in teacher.blocks:
            B, N, D = x.shape
            qkv = block.attn.qkv(block.norm1(x)).view(B, N, 3, teacher.num_heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            logits = attention_logits(q, k)
            patches = logits[:, :, teacher.num_extra:, teacher.num_extra:]
            maps.append(patches.softmax(-1))
            out = (logits.softmax(-1) @ v).transpose(1, 2).reshape(B, N, D)
            x = x + block.ls1(block.attn.proj(out))
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return teacher.norm(x)[:, teacher.num_extra:], maps


def with_tokens_transposed(model):
    """Return the model with patches that lie in memory as a convolution leaves them, [B,D,N].

    So does the whole residual stream then, and every norm first makes a copy. The library makes one
    copy at the start.
    """
    model.x_embedder.register_forward_hook(lambda module, args, out: out.mT.contiguous().mT)
    return model


def haste_loss(model, x, y, t, eps, targets, pairs, cfg, aligned=True):
    """Return HASTE's loss, or the flow loss alone if the alignment has ended: maps are made anyway.

    After the end, the library's model is a plain one: teacher, projector and maps are gone.
    """
    x_t, v = sit.interpolant(x, eps, t, cfg.path)
    # the maps of all blocks below the projector are an output beside that of fused attention
    v_hat, z, taps = model(x_t, t, y, tap_layers=range(model.encoder_depth))
    log_maps = [attention_logits(q, k).log_softmax(-1) for q, k in taps]
    flow = (v_hat.float() - v).square().mean()
    if not aligned:
        return flow
    tokens, maps = targets
    attention = [cross_entropy(log_maps[i], maps[j]) for i, j in pairs]
    features = haste.feature_alignment(z, tokens)
    return (flow + cfg.feature_weight * features
            + cfg.attention_weight * sum(attention) / len(attention))


def update(model, ema, opt, cfg):
    """Clip, step, average; the library does the last two on lists of tensors, in few kernels."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
    opt.step()
    opt.zero_grad()
    with torch.no_grad():
        for average, weight in zip(ema.parameters(), model.parameters()):
            average.mul_(cfg.ema).add_(weight, alpha=1 - cfg.ema)


# ---- xAR

def xar_network(model, tokens, t, y, first=0, past=None):
    """Return v [B,N,C] of whole entities, and their keys and values in each block.

    tokens [B,N,C], t [B,M]: M entities, of which the first is number `first`. `past` has the keys
    and values of the entities before; then M is 1. The condition is repeated for every token. The
    library computes a modulation once an entity, and broadcasting applies it to all of its tokens.
    """
    M = t.shape[1]
    begin = sum(model.sizes[:first])
    rows = slice(begin, begin + sum(model.sizes[first:first + M]))
    entity_of = model.entity_of[rows]                                       # [N]
    c = model.class_emb(y)[:, None] + model.time_embed(t)                   # [B,M,D]
    c = c[:, entity_of - first]                                             # [B,N,D]
    mask = entity_of[:, None] >= entity_of if M > 1 else None               # [N,N]: who may see whom
    blocks = [*model.encoder_blocks, *model.decoder_blocks]
    past = past or [None] * len(blocks)
    cache = []

    x = model.z_proj_ln(model.z_proj(tokens) + model.encoder_pos_embed_learned[:, rows])
    for i, block in enumerate(blocks):
        if i == len(model.encoder_blocks):
            position = model.decoder_pos_embed_learned[:, rows]
            x = model.decoder_embed(model.encoder_norm(x)) + position
        gamma1, gamma2, scale1, scale2, shift1, shift2 = block.ada_lin(c).chunk(6, dim=-1)
        rope = model.rope_cos[rows], model.rope_sin[rows]
        out, keys_values = xar_attention(block.attn, block.norm(x) * (1 + scale1) + shift1, rope,
                                         mask, past[i])
        cache.append(keys_values)
        x = x + gamma1 * out
        x = x + gamma2 * block.mlp(block.norm(x) * (1 + scale2) + shift2)
    return model.pred(model.decoder_norm(x)), cache


def xar_attention(attn, x, rope, mask, past):
    """Return the output [B,N,D], and keys and values [B,H,N,d] that have grown by x's own.

    The library gives no mask to attention where it can do without, and its cache does not move.
    """
    B, N, D = x.shape
    qkv = attn.qkv(x).view(B, N, 3, attn.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)                                    # three of [B,H,N,d]
    q = xar.rotate(q, *rope).type_as(v)
    k = xar.rotate(k, *rope).type_as(v)
    if past is not None:
        k = torch.cat([past[0], k], dim=2)
        v = torch.cat([past[1], v], dim=2)
    dropout = attn.attn_dropout if attn.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    return attn.drop(attn.proj(out.transpose(1, 2).reshape(B, N, D))), (k, v)


def xar_loss(model, x, y, t, eps):
    """Return XAR.loss, through a mask and one condition a token."""
    def net(tokens, times, labels, clean):
        return xar_network(model, tokens, times, labels)[0]
    return model.loss(x, y, t, eps, net=net)


@torch.no_grad()
def sample_by_growing_cache(model, y, num_steps, cfg_scale, randn=torch.randn_like):
    """Return what `model.sample` returns: y [B] -> latent [B,C,h,w].

    Both halves of guidance are evaluated for every entity. The library leaves out the one without
    label where its weight is 0, in the first of several.
    """
    B = len(y)
    labels = torch.cat([y, torch.full_like(y, model.num_classes)])
    past = None
    done = []                                                               # finished entities [B,m,C]
    for n, size in enumerate(model.sizes):
        w = guidance(model, n, cfg_scale)

        def evaluate(x, t):
            times = torch.full((2 * B, 1), t, device=y.device)
            return xar_network(model, x.float().repeat(2, 1, 1), times, labels, n, past)

        def velocity(x, t):
            with_label, without = evaluate(x, t)[0].double().chunk(2)
            return without + w * (with_label - without)

        start = torch.empty(B, size, model.channels, dtype=torch.float64, device=y.device)
        done.append(xar.reverse_sde(velocity, randn(start), num_steps, randn))
        past = evaluate(done[-1], 0.0)[1]
    return model.to_latent(torch.cat(done, dim=1).float())


def guidance(model, n, cfg_scale):
    """Return the guidance scale of entity n: it grows along the order."""
    M = len(model.sizes)
    return cfg_scale if M == 1 else 1 + (cfg_scale - 1) * n / (M - 1)


@torch.no_grad()
def sample_without_cache(model, y, num_steps, cfg_scale, randn=torch.randn_like):
    """Return what `model.sample` returns, at the price of a forward over all entities so far.

    Each velocity comes from the block-causal forward of training. y [B] -> latent [B,C,h,w].
    """
    B = len(y)
    done = []                                                               # finished entities [B,m,C]
    for n, size in enumerate(model.sizes):
        w = guidance(model, n, cfg_scale)
        labels = y if w == 1 else torch.cat([y, torch.full_like(y, model.num_classes)])

        def velocity(x, t):
            tokens = torch.cat([*done, x.float()], dim=1).repeat(len(labels) // B, 1, 1)
            times = torch.zeros(len(labels), n + 1, device=y.device)        # finished entities are at t = 0
            times[:, n] = t
            v = model(tokens, times, labels)[:, -size:].double()
            if w == 1:
                return v
            with_label, without = v.chunk(2)
            return without + w * (with_label - without)

        start = torch.empty(B, size, model.channels, dtype=torch.float64, device=y.device)
        done.append(xar.reverse_sde(velocity, randn(start), num_steps, randn).float())
    return model.to_latent(torch.cat(done, dim=1))
