"""HASTE: a frozen teacher guides the early training of a diffusion transformer, then sets it free.

The file to copy into another code base: it needs torch and nothing else. There, a training step is

    if step < tau:                                      # phase I: aligned with the teacher
        v_hat, z, taps = student(x_t, t, y, tap_layers=[i for i, _ in pairs])
        with torch.no_grad():
            tokens, teacher_taps = teacher(images, [j for _, j in pairs])
        loss = (v_hat - v).square().mean() + 0.5 * feature_alignment(z, tokens)
        loss = loss + 0.5 * mean_over_pairs(attention_alignment_grad, taps, teacher_taps)
    else:                                               # phase II: teacher and projector are gone
        loss = (student(x_t, t, y) - v).square().mean()

with `feature_depth, pairs = layer_map("SiT-XL")`, and
    x_t, v          the noisy image at time t (0 is data, 1 is noise) and its velocity
    z [B,N,D]       the student's tokens after `feature_depth` blocks and a projector to the
                    teacher's width: Linear-SiLU-Linear-SiLU-Linear, 2,048 wide in the papers
    tokens [B,N,D]  the teacher's patch tokens of the clean image: same crop, same mirroring
    taps            (q, k) [B,H,N,d] of each paired block, just as scaled_dot_product_attention gets
                    them: after qk-norm and rotation, not yet multiplied by d^-1/2
Both networks have the same N patch tokens in the same order; class and register tokens are cut off,
so that the softmax runs over patches only. flash-attn's [B,N,H,d] needs a transpose. If the
student's tokens do not see all others (xAR), both losses of attention take its `mask`.

At step tau, remove the projector from the model, its average and the optimizer, and wrap the model
in DDP again, which would wait for its gradients: haste_train.drop_projector shows how. The value of
attention_alignment_grad means nothing: log attention_alignment, under no_grad, once in a while.

Papers: HASTE (Wang et al. 2025, arXiv 2505.16792), REPA (Yu et al. 2025, arXiv 2410.06940).
Letters: B batch, N tokens, D width, H heads, d head width; s student, t teacher.
"""
import torch
import torch.nn.functional as F

# Where to align, for a teacher of 12 blocks such as DINOv2-B; other depths map in proportion.
#   feature_depth   number of student blocks below the projector; feature_depth_repa with REPA alone
#   pairs           (student block, teacher block) whose attention is aligned, 0-based
# The rows of S, Ti and xAR are ours, the others the papers'. With a teacher of 4 blocks, SiT-Ti's
# pairs become (0, 2), (1, 2), (2, 3), MMDiT-Ti's (0, 2), (1, 3), xAR-Ti's (1, 2), (2, 3).
# xAR-B, L, H have SiT-B's, L's, XL's blocks in proportion of depth, encoder and decoder together:
# number i of SiT-B's 12, counted from 1, becomes round(i 16/12) of 16. xAR-Ti's row is chosen by
# hand, as its encoder has three blocks. Rows are for the size's own depth: --depth moves none.
TABLE_DEPTH = 12
_BASE = dict(feature_depth=5, feature_depth_repa=4, pairs=((2, 7), (3, 9), (4, 11)))
_LARGE = dict(feature_depth=8, feature_depth_repa=8, pairs=((4, 8), (5, 9), (6, 10), (7, 11)))
_LARGE_XAR = dict(feature_depth=11, feature_depth_repa=11)
ALIGNMENT = {
    "SiT-Ti": dict(feature_depth=3, feature_depth_repa=3, pairs=((0, 7), (1, 9), (2, 11))),
    "SiT-S": _BASE,
    "SiT-B": _BASE,
    "SiT-L": _LARGE,
    "SiT-XL": _LARGE,
    "MMDiT-Ti": dict(feature_depth=3, feature_depth_repa=3, pairs=((0, 8), (1, 11))),
    "MMDiT-24": _LARGE,
    "xAR-Ti": dict(feature_depth=2, feature_depth_repa=2, pairs=((1, 8), (2, 11))),
    "xAR-B": dict(feature_depth=7, feature_depth_repa=5, pairs=((3, 7), (4, 9), (6, 11))),
    "xAR-L": dict(_LARGE_XAR, pairs=((6, 8), (7, 9), (8, 10), (10, 11))),
    "xAR-H": dict(_LARGE_XAR, pairs=((6, 8), (8, 9), (9, 10), (10, 11))),
}


def layer_map(name, teacher_depth=TABLE_DEPTH, features_only=False):
    """Return the feature depth, a number of blocks, and the pairs [(student, teacher block), ...].

    `name` is a key of ALIGNMENT: add a row for a model of your own. With `features_only` (REPA)
    there are no pairs. For a teacher of T blocks, the table's teacher block j becomes
    round((j + 1) T / 12) - 1 (ours); if T is small, several pairs share a block.
    """
    if name not in ALIGNMENT:
        raise ValueError(f"{name} is not in ALIGNMENT, which has {', '.join(ALIGNMENT)}: add a row")
    row = ALIGNMENT[name]
    if features_only:
        return row["feature_depth_repa"], []
    pairs = [(i, round((j + 1) * teacher_depth / TABLE_DEPTH) - 1) for i, j in row["pairs"]]
    return row["feature_depth"], pairs


# ---- the two losses

def feature_alignment(z, target):
    """Return REPA's loss, minus the mean cosine of student and teacher tokens: a scalar in [-1, 1].

    z, target [B,N,D]: projected student tokens, teacher tokens (detached); in float32 or better.
    """
    if z.shape != target.shape:
        raise ValueError(f"student {list(z.shape)} and teacher {list(target.shape)} must be equal: "
                         f"project to the teacher's width, and cut off its class token")
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    target = target.detach().to(torch.promote_types(target.dtype, torch.float32))
    return -F.cosine_similarity(z, target, dim=-1).mean()


def attention_alignment(q_s, k_s, q_t, k_t, mask=None):
    """Return HASTE's attention loss: cross-entropy of the student's attention under the teacher's.

    q, k [B,H,N,d] of one layer pair. Head numbers and widths may differ: the first min(H_s, H_t)
    heads are paired. True value and exact gradient in float32, without an N x N matrix:

        -sum_j softmax_j(q_t k_t^T / sqrt(d_t)) log softmax_j(q_s k_s^T / sqrt(d_s)),

    averaged over batch, heads and queries. With a boolean mask [N,N], true if the query (row) may
    see the key, both softmaxes run over the visible keys alone: teacher and student are compared on
    equal terms. Training needs the gradient only and calls `attention_alignment_grad`, which costs
    less.
    """
    kind = "cpu" if q_s.is_meta else q_s.device.type                        # meta has no autocast
    with torch.autocast(kind, enabled=False):
        qk = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q_s, k_s, q_t, k_t)]
        surrogate = attention_alignment_grad(*qk, mask)
        return surrogate + (_attention_value(*qk, mask) - surrogate).detach()


def attention_alignment_grad(q_s, k_s, q_t, k_t, mask=None):
    """Return a scalar whose *gradient* is that of `attention_alignment`; its value is meaningless.

    It costs two calls of fused attention. With c = d^-1/2 and P = softmax(c q k^T), for student (s)
    and teacher (t), the loss of query i is

        L_i = lse_j(c q_i.k_j) - c q_i.(P_t k_s)_i        lse: log of the sum of exponentials

    and its gradient is that of c q_i.(P_s k_s - P_t k_s)_i with P_s and P_t held constant, since
    d lse_i / d q_i = c (P_s k_s)_i, and k_j receives c sum_i (P_s - P_t)_ij q_i. But P k_s is what
    fused attention returns if the student's keys are passed as its values. So neither map is ever
    stored, and memory grows with N instead of N^2. A mask goes to both calls and changes nothing
    else: over the visible keys, all of this holds.

    It runs in the dtype of q and k, also bfloat16 under autocast. For full precision, turn autocast
    off and pass float32.
    """
    q_s, k_s, q_t, k_t = common_heads(q_s, k_s, q_t, k_t)
    # What all keys have in common drops out of the difference, as rows of P_s - P_t sum to 0. In
    # bfloat16 its rounding errors would stay, 15 % of the gradient if it is ten times the rest.
    centred = k_s - k_s.detach().mean(2, keepdim=True)
    own = attend(q_s.detach(), k_s.detach(), centred, mask)                 # P_s k_s  [B,H,N,d_s]
    wanted = attend(q_t.detach(), k_t.detach(), centred, mask)              # P_t k_s  [B,H,N,d_s]
    dtype = torch.promote_types(q_s.dtype, torch.float32)
    dot = (q_s * (own - wanted)).sum(-1, dtype=dtype)                       # [B,H,N]
    return dot.mean() * q_s.shape[-1] ** -0.5


@torch.no_grad()
def _attention_value(q_s, k_s, q_t, k_t, mask=None, chunk=128):
    """Return the value of `attention_alignment`: the log-sum-exp goes over chunks of queries."""
    q_s, k_s, q_t, k_t = common_heads(q_s, k_s, q_t, k_t)
    c = q_s.shape[-1] ** -0.5
    lse = []
    for i in range(0, q_s.shape[2], chunk):
        logits = c * q_s[:, :, i:i + chunk] @ k_s.mT                        # [B,H,chunk,N]
        if mask is not None:
            logits = logits.masked_fill(~mask[i:i + chunk], -torch.inf)
        lse.append(logits.logsumexp(-1))
    wanted = attend(q_t, k_t, k_s, mask)                                    # [B,H,N,d_s]
    return (torch.cat(lse, dim=2) - c * (q_s * wanted).sum(-1)).mean()


def common_heads(q_s, k_s, q_t, k_t):
    """Return the four tensors [B,H,N,d] with the first min(H_s, H_t) heads only."""
    if len({(len(x), x.shape[2]) for x in (q_s, k_s, q_t, k_t)}) > 1:
        shapes = ", ".join(str(list(x.shape)) for x in (q_s, k_s, q_t, k_t))
        raise ValueError(f"queries and keys {shapes} must be [B,H,N,d] with one B and one N: cut "
                         f"off class and register tokens")
    H = min(q_s.shape[1], q_t.shape[1])
    return q_s[:, :H], k_s[:, :H], q_t[:, :H], k_t[:, :H]


def attend(q, k, v, mask=None):
    """Return softmax(q k^T / sqrt(d)) v by fused attention; q, k [B,H,N,d], v [B,H,N,d_v].

    The fused kernels require one head width, so the narrower tensors are padded with zeros, which
    change no dot product.
    """
    d = q.shape[-1]
    width = max(d, v.shape[-1])
    q, k, padded_v = (pad_to(x.to(v.dtype), width) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, padded_v, mask, scale=d ** -0.5)
    return out[..., :v.shape[-1]]


def pad_to(x, width):
    if x.shape[-1] == width:
        return x
    return F.pad(x, (0, width - x.shape[-1]))


def mean_over_pairs(loss, taps_s, taps_t, **options):
    """Return the mean of `loss(q_s, k_s, q_t, k_t, **options)` over layer pairs.

    Taps are lists of (q, k); an option is the `mask` of both attention losses.
    """
    total = sum(loss(*s, *t, **options) for s, t in zip(taps_s, taps_t, strict=True))
    return total / len(taps_s)


# ---- two later methods

def spatial_normalise(y, gamma=0.6):
    """Return teacher tokens with contrast between places instead of what a whole image shares.

    y [B,N,D] -> (y - gamma mean) / deviation, over the N > 1 tokens of each image and channel, for
    `feature_alignment`. This is half of iREPA (Singh et al. 2025, 2512.10794); the other half is a
    projector that is a 3 x 3 convolution on the grid of tokens, sit.ConvProjector.
    """
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    return (y - gamma * y.mean(1, keepdim=True)) / (y.std(1, keepdim=True) + 1e-6)


def contrastive_term(v_hat, v, negatives):
    """Return the mean squared distance of v_hat [b,...] to the velocities of other images: [b].

    v [M,...] are target velocities, of the whole batch; negatives [b] says which one each sample is
    to be kept away from. Contrastive flow matching (Stoica et al. 2025, 2506.05350) subtracts 0.05
    of it from the flow loss.
    """
    error = v_hat - v[negatives]
    error = error.to(torch.promote_types(error.dtype, torch.float32))
    return error.square().flatten(1).mean(1)


# ---- when to stop: the automatic trigger

STOP_TIMES = (0.02, 0.1, 0.5, 0.8)                                          # the paper's; t = 0 is data


def gradient_cosine(losses_at, parameters):
    """Return the cosine between the gradients of flow and alignment, averaged over STOP_TIMES.

    `losses_at(t)` returns (flow loss, weighted alignment loss) at time t, both from one graph:
    always of the same held batch and noise, without dropout. `parameters` are those of the block
    below the projector. HASTE ends the alignment once this falls below a threshold (-0.05 in the
    paper): the teacher then holds the student back. Call it on the model, not on DDP's wrapper, and
    average the result over the processes, so that all stop at the same step.
    """
    parameters = [p for p in parameters if p.requires_grad]
    cosines = []
    for t in STOP_TIMES:
        flow, alignment = losses_at(t)
        flow = torch.autograd.grad(flow, parameters, retain_graph=True)
        alignment = torch.autograd.grad(alignment, parameters)
        flow = torch.cat([g.flatten() for g in flow])
        alignment = torch.cat([g.flatten() for g in alignment])
        cosines.append(F.cosine_similarity(flow, alignment, dim=0))
    return torch.stack(cosines).mean()
