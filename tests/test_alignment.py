"""Both alignment losses are the official ones, and attention alignment needs no attention map."""
import pytest
import torch
import torch.nn.functional as F
from conftest import Golden, distance
from fill import fill_state_dict

import align
import haste
import haste_train
import sit
import xar
from haste_train import attention_alignment, attention_alignment_grad, feature_alignment


def plain_form(q_s, k_s, q_t, k_t, mask=None):
    """The definition, with both N x N matrices."""
    H = min(q_s.shape[1], q_t.shape[1])
    hidden = torch.zeros(q_s.shape[2], k_s.shape[2], dtype=torch.bool) if mask is None else ~mask
    logits = lambda q, k: (q[:, :H] @ k[:, :H].mT * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
    log_p = logits(q_s, k_s).log_softmax(-1).masked_fill(hidden, 0)         # 0 log 0 is 0
    return -(logits(q_t, k_t).softmax(-1) * log_p).sum(-1).mean()


def inputs(student=(2, 4, 20, 8), teacher=(2, 3, 20, 6), seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    make = lambda shape: 2 * torch.randn(shape, generator=g, dtype=dtype)
    return make(student).requires_grad_(), make(student).requires_grad_(), make(teacher), make(teacher)


def test_official_losses_and_gradients():
    g = Golden("haste_loss")
    c = g.config
    B, N, L = c["batch"], c["tokens"], len(c["student_layers"])
    student = [[g.draw(f"{n}s{i}", B, c["student_heads"], N, c["student_head_dim"]).requires_grad_() for n in "qk"]
               for i in c["student_layers"]]
    teacher = [[g.draw(f"{n}t{i}", B, c["teacher_heads"], N + 1, c["teacher_head_dim"])[:, :, 1:] for n in "qk"]
               for i in c["teacher_layers"]]
    loss = sum(attention_alignment(*s, *t) for s, t in zip(student, teacher)) / L
    loss.backward()
    assert abs(loss.item() / g["attn_loss"].item() - 1) < 1e-5
    for i, (q, k) in enumerate(student):
        assert distance(q.grad[:, :, :2], g["grad_q"][i]) < 1e-5 and distance(k.grad[:, :, :2], g["grad_k"][i]) < 1e-5
    z, target = g.draw("proj_s", B, N, c["z_dim"]).requires_grad_(), g.draw("proj_t", B, N, c["z_dim"])
    loss = feature_alignment(z, target)
    loss.backward()
    assert abs(loss.item() - g["proj_loss"].item()) < 1e-5 and distance(z.grad[:, :2], g["grad_proj"]) < 1e-5


@pytest.mark.parametrize("student,teacher", [
    ((2, 4, 20, 8), (2, 4, 20, 8)),         # alike
    ((2, 4, 20, 8), (2, 3, 20, 6)),         # narrower teacher with fewer heads
    ((1, 2, 300, 4), (1, 5, 300, 16)),      # wider teacher with more heads, more queries than a chunk
    ((1, 1, 1, 4), (1, 1, 1, 4)),           # one token
])
@pytest.mark.parametrize("form", [attention_alignment, attention_alignment_grad])
def test_value_and_gradient_equal_the_plain_form(student, teacher, form):
    q, k, q_t, k_t = inputs(student, teacher)
    expected, found = plain_form(q, k, q_t, k_t), form(q, k, q_t, k_t)
    if form is attention_alignment:
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(found, (q, k)), torch.autograd.grad(expected, (q, k))):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6


@pytest.mark.parametrize("form", [attention_alignment, attention_alignment_grad])
def test_float64_proof_of_the_gradient(form):
    """In float64 the gradient is the plain form's to 1e-12: an identity, no approximation."""
    q, k, q_t, k_t = inputs(dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(form(q, k, q_t, k_t), (q, k)),
                    torch.autograd.grad(plain_form(q, k, q_t, k_t), (q, k))):
        assert distance(a, b) < 1e-12


def test_nothing_of_size_n_by_n_is_stored():
    N = 512
    q, k, q_t, k_t = inputs((1, 2, N, 16), (1, 2, N, 12))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        loss = attention_alignment(q, k, q_t, k_t)
    assert sizes and max(sizes) < N * N
    loss.backward()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        plain_form(q, k, q_t, k_t)
    assert max(sizes) >= N * N                                              # the plain form does store them


MASKS = {"none": None, "few": torch.arange(64)[:, None] % 3 >= torch.arange(64) % 3}
for entity in ("patch", "cell:4", "cell:2", "subsample:2", "image"):
    model = xar.XAR(8, 1, 8, 1, 1, 1, 1, entity)
    MASKS |= {entity: xar.visible(model.entity_of), f"{entity}, clean": xar.visible(model.entity_of, 2)}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("heads,width", [(4, 8), (3, 6), (5, 12)])
def test_masked_alignment_is_the_plain_form_over_the_visible_keys(name, heads, width):
    """Both softmaxes run over what the student's token may see. In float64, to 1e-10."""
    mask = MASKS[name]
    N = 64 if mask is None else len(mask)
    q, k, q_t, k_t = inputs((2, 4, N, 8), (2, heads, N, width), dtype=torch.float64)
    expected = plain_form(q, k, q_t, k_t, mask)
    found = attention_alignment(q, k, q_t, k_t, mask)
    assert abs(found - expected) < 1e-10
    assert abs(haste._attention_value(q, k, q_t, k_t, mask, chunk=7) - expected) < 1e-10
    wanted = torch.autograd.grad(expected, (q, k))
    for form in (found, attention_alignment_grad(q, k, q_t, k_t, mask=mask)):
        assert all(distance(a, b) < 1e-10 for a, b in zip(torch.autograd.grad(form, (q, k)), wanted))
    taps = [(q, k), (k, q)], [(q_t, k_t), (k_t, q_t)]
    both = haste.mean_over_pairs(attention_alignment, *taps, mask=mask)
    assert abs(both - (expected + plain_form(k, q, k_t, q_t, mask)) / 2) < 1e-10


def test_of_a_mask_nothing_larger_than_itself_is_stored():
    """Neither a batch nor heads multiply N x N: not in what is kept for the backward, with 8 images of 4 heads."""
    N, sizes = 256, []
    q, k, q_t, k_t = inputs((8, 4, N, 8), (8, 4, N, 6))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        attention_alignment_grad(q, k, q_t, k_t, torch.ones(N, N, dtype=torch.bool).tril())
    assert sizes and max(sizes) <= N * N


@pytest.mark.parametrize("mean, masked", [(0, False), (3, False), (10, False), (30, False), (0, True), (10, True)])
def test_bfloat16_gradient_is_within_one_percent(mean, masked):
    """Also of keys that have a mean of so many deviations, as those of large networks do, and of cells in order."""
    mask = xar.visible(xar.XAR(16, 1, 16, 1, 1, 2, entity="cell:8").entity_of) if masked else None
    q, k, q_t, k_t = inputs((2, 4, 256, 72), (2, 4, 256, 64))
    offset = 2 * mean * torch.randn(2, 4, 1, 72, generator=torch.Generator().manual_seed(1))
    half = [x.detach().bfloat16().requires_grad_(x.requires_grad) for x in (q, k + offset, q_t, k_t)]
    whole = [x.detach().float().requires_grad_(x.requires_grad) for x in half]      # the same numbers
    exact = torch.autograd.grad(plain_form(*whole, mask), whole[:2])
    for a, b in zip(torch.autograd.grad(attention_alignment_grad(*half, mask), half[:2]), exact):
        assert distance(a, b) < 0.01


def test_aligned_student_has_no_gradient_and_pays_the_teachers_entropy():
    q, k, _, _ = inputs()
    loss = attention_alignment(q, k, q.detach(), k.detach())
    P = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    assert torch.allclose(loss, -(P * P.log()).sum(-1).mean(), rtol=1e-5)
    assert all(g.abs().max() < 1e-7 for g in torch.autograd.grad(loss, (q, k)))


def test_losses_are_float32_under_autocast():
    q, k, q_t, k_t = (x.detach().bfloat16() for x in inputs())
    z = torch.randn(2, 20, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_alignment(q, k, q_t, k_t).dtype == feature_alignment(z, z).dtype == torch.float32
    assert (torch.allclose(feature_alignment(z, 3 * z), torch.tensor(-1.0))
            and torch.allclose(feature_alignment(z, -z), torch.tensor(1.0)))
    with torch.autocast("cpu", torch.bfloat16):                             # nor may autocast reach the float32 form
        found = attention_alignment(*(x.detach() for x in inputs()))
    assert torch.allclose(found, plain_form(*(x.detach() for x in inputs())), rtol=1e-5)


def test_names_of_haste_are_reachable_from_its_program():
    for name in ("feature_alignment", "attention_alignment", "attention_alignment_grad", "ALIGNMENT", "layer_map",
                 "gradient_cosine"):
        assert getattr(haste_train, name) is getattr(haste, name)


def test_layer_table():
    chosen = lambda cfg, teacher_depth: align.choose_layers(cfg, cfg.depth, cfg.depth, teacher_depth)
    config = lambda model, align, **kw: haste_train.Config(model=model, align=align,
                                                           depth=haste_train.sit.SIT_CONFIGS[model]["depth"], **kw)
    assert chosen(config("SiT-XL/2", "haste"), 12) == (8, [(4, 8), (5, 9), (6, 10), (7, 11)])
    assert chosen(config("SiT-L/2", "repa"), 12) == (8, [])
    assert chosen(config("SiT-B/2", "haste"), 12) == (5, [(2, 7), (3, 9), (4, 11)])
    assert chosen(config("SiT-B/2", "repa"), 12) == (4, [])
    assert chosen(config("SiT-S/2", "haste"), 24) == (5, [(2, 15), (3, 19), (4, 23)])    # teacher ViT-L
    assert (chosen(config("SiT-XL/2", "haste", pairs="0:3,27:11", feature_depth=2), 12)
            == (2, [(0, 3), (27, 11)]))
    for name, repa, depth, pairs in (                                       # in proportion of depth to SiT's
            ("xAR-B", 5, 7, [(3, 7), (4, 9), (6, 11)]), ("xAR-L", 11, 11, [(6, 8), (7, 9), (8, 10), (10, 11)]),
            ("xAR-H", 11, 11, [(6, 8), (8, 9), (9, 10), (10, 11)])):
        assert haste.layer_map(name) == (depth, pairs) and haste.layer_map(name, 12, True) == (repa, [])
        size, other = xar.XAR_CONFIGS[name], name.replace("xAR", "SiT").replace("H", "XL")
        ratio = (size["encoder_depth"] + size["decoder_depth"]) / haste_train.sit.SIT_CONFIGS[f"{other}/2"]["depth"]
        sit_depth, sit_pairs = haste.layer_map(other)
        assert round(sit_depth * ratio) == depth and round(haste.layer_map(other, 12, True)[0] * ratio) == repa
        assert [(round((i + 1) * ratio) - 1, j) for i, j in sit_pairs] == pairs
    assert haste.layer_map("xAR-Ti", 4) == (2, [(1, 2), (2, 3)])
    for flags, message in ((dict(pairs="0-3"), "--pairs 0-3 must look like"), (dict(pairs="0:12"), "--pairs 0:12"),
                           (dict(pairs="28:3"), "--pairs 28:3"), (dict(feature_depth=29), "--feature-depth 29")):
        with pytest.raises(ValueError, match=message):
            chosen(config("SiT-XL/2", "haste", **flags), 12)


def test_shapes_that_would_align_the_wrong_things_are_refused():
    q, k = torch.randn(2, 2, 3, 16, 8)
    with_class = torch.randn(2, 3, 17, 8)
    for qk in ((q, k, with_class, with_class), (q, k, q, with_class), (q, k, q[:1], k[:1])):
        for loss in (attention_alignment, attention_alignment_grad):
            with pytest.raises(ValueError, match="must be .B,H,N,d. with one B and one N: cut off class"):
                loss(*qk)
    for target in (torch.randn(2, 17, 5), torch.randn(2, 1, 5), torch.randn(2, 16, 6)):
        with pytest.raises(ValueError, match="must be equal: project to the teacher's width"):
            feature_alignment(torch.randn(2, 16, 5), target)
    with pytest.raises(ValueError, match="SiT-M is not in ALIGNMENT, which has SiT-Ti, .*: add a row"):
        haste.layer_map("SiT-M")
    with pytest.raises(ValueError):
        haste.mean_over_pairs(attention_alignment, [(q, k)], [(q, k), (q, k)])


def test_the_teacher_gets_no_gradient():
    z, target = torch.randn(2, 2, 16, 5, requires_grad=True)
    student, teacher = (torch.randn(2, 2, 3, 16, 8, requires_grad=True) for _ in range(2))
    (feature_alignment(z, target) + attention_alignment(*student, *teacher)).backward()
    assert student.grad.any() and teacher.grad is None


def test_feature_alignment_is_the_mean_cosine():
    z, target = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    expected = -torch.stack([F.normalize(a, dim=0) @ F.normalize(b, dim=0)
                             for a, b in zip(z.view(-1, 3), target.view(-1, 3))]).mean()
    assert torch.allclose(feature_alignment(z, target), expected)


# ---- two later methods

def test_irepa_is_the_official_one():
    g = Golden("irepa")
    c = g.config
    target = haste.spatial_normalise(2 * g.draw("teacher", 2, c["tokens"], c["z_dim"]) + 1, c["gamma"])
    assert distance(target, g["target"]) < 1e-5 and haste_train.spatial_normalise is haste.spatial_normalise
    h = g.draw("h", 2, c["tokens"], c["hidden_size"])
    for kernel in (1, 3):
        projector = sit.ConvProjector(c["hidden_size"], c["z_dim"], kernel)
        projector.load_state_dict(fill_state_dict(projector.state_dict(), c["seed"]))
        with torch.no_grad():
            z = projector(h)
        assert distance(z, g[f"z{kernel}"]) < 1e-5
        assert abs(feature_alignment(z, target) - g[f"loss{kernel}"]) < 1e-5
    half = haste.spatial_normalise(torch.randn(2, 5, 3).bfloat16(), 1.0)
    assert half.dtype == torch.float32 and half.mean(1).abs().max() < 1e-5


def test_contrastive_flow_matching_is_the_official_one():
    g = Golden("deltafm")
    c = g.config
    v_hat, v = g.draw("pred", c["batch"], 4, 8, 8), g.draw("target", c["batch"], 4, 8, 8)
    term = haste.contrastive_term(v_hat, v, g["negatives"])
    flow = (v_hat - v).square().flatten(1).mean(1)
    assert term.shape == (c["batch"],) and (term > 0).all() and distance(term, g["contrast"]) < 1e-5
    assert distance(flow - c["weight"] * term, g["loss"]) < 1e-5
    # a part of the batch, against velocities of all of it; bfloat16 is compared in float32
    assert torch.equal(haste.contrastive_term(v_hat[2:4], v, g["negatives"][2:4]), term[2:4])
    assert haste_train.contrastive_term(v_hat.bfloat16(), v.bfloat16(), g["negatives"]).dtype == torch.float32


def test_guided_sampling_puts_contrastive_velocities_right():
    """Of Gaussian data the minimiser is known: with guidance 1 + 1e-9 both samplers are the plain ones again."""
    mean, weight = torch.tensor([1.0, -2.0]).view(2, 1, 1), 0.05
    y, noise = torch.zeros(64, dtype=torch.long), torch.randn(64, 2, 2, 2, generator=torch.Generator().manual_seed(0))

    def right(x, t, y):                                                     # E[v | x_t] of data N(mean, 0.5^2)
        t = t.view(-1, 1, 1, 1)
        variance = (0.5 * (1 - t)) ** 2 + t ** 2
        return -mean + (t - 0.25 * (1 - t)) / variance * (x - (1 - t) * mean)

    def contrastive(x, t, y):                                               # its minimiser: E[v] is -mean
        return (right(x, t, y) + weight * mean) / (1 - weight)
    for sample in (sit.sample_ode, sit.sample_sde):
        def draw(velocity, **more):
            torch.manual_seed(0)
            return sample(velocity, noise, y, 20, cfg_scale=1 + 1e-9, null_label=1, **more)
        assert distance(draw(contrastive, contrast=(weight, mean)), draw(right)) < 1e-5
        assert distance(draw(contrastive), draw(right)) > 1e-3
        torch.manual_seed(0)
        unguided = sample(contrastive, noise, y, 20, contrast=(weight, mean))
        torch.manual_seed(0)
        assert torch.equal(unguided, sample(contrastive, noise, y, 20))     # without guidance nothing is corrected
