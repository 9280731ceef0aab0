"""The claims of farmer.py, by the paper's equations and sections. Weights are random, since a new
flow is the identity and proves nothing.

Flow (3.2, Eq. 8-10): inverse and determinant are exact with every switch and in any order of the
    tokens; the density integrates to one; blocks alternate and, flipped, the prior reads against
    the last one; whitening whitens; bf16 attention is attention, scales are never in bf16.
Prior (Eq. 11-14): densities are torch's and draws follow them; log p has three parts, told by
    token, and the loss is their mean.
Guidance (3.4, Eq. 15, Algorithm 1, Table 6): draws follow the guided density, and with all
    temperatures are what a hand computes; redundant_scale moves Z_R alone, T_sigma both parts;
    guidance reads the class and the null class, and raises their ratio; naive guidance follows the
    law of rejection (4.3).
Student (3.5, Algorithm 2): attention is bidirectional, the loss Algorithm 2's, the teacher frozen.
Presets and ablations (Tables 1, 3, 6): the paper's sizes and temperatures; every switch works.
Use: an image depends on its own generator alone; bfloat16 acts on prior and student alone;
    denoising steps along the exact score; wrong values are refused by name; forks assign mixture,
    Transformers, blocks and orders, and override draws; labels reach each row; compiled and
    recomputed layers are the same.
"""
import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.nn import Parameter

import farmer
from farmer import GMM, PRESETS, Config, Farmer, Noise, Sampling, patchify
from support.sampling import prepare_layers

SMALL = Config(
    image_size=8, patch_size=2, num_classes=3, flow_blocks=3, flow_width=32, ar_layers=1,
    ar_width=32, head_dim=16, informative_dim=5, informative_mixtures=3, redundant_mixtures=2,
    class_tokens=2)
LABELS = torch.tensor([0, 1, 2])
NULL = torch.tensor([3, 3, 3])


IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5)).double()


def small(**changes) -> Config:
    return dataclasses.replace(SMALL, **changes)


def normal(*shape) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def each(n: int) -> list[torch.Generator]:
    """A generator for each of n images."""
    return [torch.Generator().manual_seed(i) for i in range(n)]


def randomised(config: Config = SMALL, dtype=torch.float64) -> Farmer:
    """A model with every parameter moved away from its initial value."""
    torch.manual_seed(0)
    model = Farmer(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    d = config.token_dim
    model.flow.fit(normal(50, config.num_tokens, d) @ normal(d, d))
    return model.requires_grad_(False)


class Columns(farmer.FlowBlock):
    """Reads column by column, an order that is not its own inverse after two rolls."""

    def order(self, x):
        return x.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2).roll(1, 1)

    def unorder(self, x):
        return x.roll(-1, 1).unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)


def in_columns(config: Config) -> Farmer:
    """A randomised model whose blocks all read in this order."""
    model = randomised(config)
    for block in model.flow.blocks:
        block.__class__ = Columns
    return model


# ----------------------------------------------------------------------------- flow (3.2)
def test_patches_keep_their_pixels():
    X = patchify(IMAGES, 4)
    assert torch.equal(X[0, 1].view(4, 4, 3), IMAGES[0, :, 0:4, 4:8].permute(1, 2, 0))
    assert torch.equal(farmer.unpatchify(X, 4, 3), IMAGES)


@pytest.mark.parametrize("make, switches", [
    (randomised, dict()), (randomised, dict(flow_blocks=0, whiten=True)),
    (randomised, dict(flow_blocks=2, flow_layers=2, whiten=True, final_flip=False)),
    (in_columns, dict())])
def test_the_inverse_and_the_determinant_are_exact(make, switches):
    """The determinant against that of autograd's Jacobian."""
    flow = make(small(**switches)).flow
    X = normal(2, 16, 12)
    Z, logdet = flow(X)
    assert (Z - X).abs().max() > 0.5  # not the identity
    assert (flow.inverse(Z) - X).abs().max() < 1e-9
    J = torch.autograd.functional.jacobian(lambda x: flow(x[None])[0][0], X[1])
    assert abs(torch.linalg.slogdet(J.view(192, 192))[1] - logdet[1]) < 1e-8


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_density_integrates_to_one(tokens):
    """Of one token of two channels, with a split, and of two tokens of one channel."""
    config = small(image_size=1, patch_size=1, flow_blocks=2, informative_dim=1, whiten=True)
    object.__setattr__(config, "channels", 2 // tokens)
    model = randomised(config)
    for part in (*model.flow.blocks, model.prior):
        part.pos.row = Parameter(normal(tokens, 32), requires_grad=False)
    model.patches = lambda images: images.view(-1, tokens, 2 // tokens)
    t = torch.linspace(-5, 5, 161, dtype=torch.float64)
    grid = torch.cartesian_prod(t.sinh(), t.sinh())
    p = model.log_prob(grid, torch.ones(len(grid), dtype=torch.long)).total.exp()
    volume = torch.outer(t.cosh(), t.cosh()).flatten() * (t[1] - t[0]) ** 2
    assert abs((p * volume).sum() - 1) < 2e-3


def test_blocks_alternate_and_the_prior_reads_against_the_last():
    """A block copies the first token of its order: that shows the order."""
    x = normal(1, 16, 12)
    blocks = randomised(small(flow_blocks=4)).flow.blocks
    copied = [(block(x)[0] == x).all(-1).nonzero()[0, 1].item() for block in blocks]
    assert copied == [15, 0, 15, 0]  # the last in raster order
    # In a flipped block, a token keeps the position that it has.
    assert torch.equal(blocks[0].context(None)[0].flip(0), blocks[0].pos())
    for final_flip, place in ((True, 15), (False, 0)):
        Z, _ = randomised(small(flow_blocks=1, final_flip=final_flip)).flow(x)
        assert torch.equal(Z[0, place], x[0, 0])  # flipped, the copied token comes last


@pytest.mark.parametrize("causal", [False, True])
def test_attention_on_a_cpu_is_attention_in_bfloat16_too(causal):
    """Values and gradients against the formula in float64, within rounding."""
    torch.manual_seed(0)
    qkv = normal(3, 2, 2, 40, 16)
    mask = torch.full((40, 40), -math.inf).triu(1) if causal else 0

    def results(attention, dtype):
        leaves = qkv.to(dtype).requires_grad_()
        out = attention(*leaves, causal)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    exact = results(lambda q, k, v, _: (q @ k.mT / 4 + mask).softmax(-1) @ v, torch.float64)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        for a, b in zip(results(farmer.attention, dtype), exact, strict=True):
            assert a.dtype == dtype and (a - b).abs().max() < tolerance * b.abs().max()


def test_whitening_whitens():
    torch.manual_seed(0)
    X = torch.randn(500, 16, 12) @ torch.randn(12, 12) + 3
    flow = Farmer(small(whiten=True, flow_blocks=0, final_flip=False)).flow
    flow.fit(X)
    Z, _ = flow(X)
    assert Z.mean((0, 1)).abs().max() < 1e-3
    assert torch.allclose(torch.cov(Z.flatten(0, 1).T), torch.eye(12), atol=1e-3)
    assert (flow.map.norm(dim=0).diff() > 0).all()  # the largest variance first
    new = Farmer(SMALL).flow
    new.fit(X)
    assert torch.equal(new(X)[0], X.flip(1))  # without it, a new flow is the identity


def test_scales_and_mixtures_are_bounded_and_never_in_bfloat16():
    """Under autocast, each of them gives what it gives without."""
    model = randomised(dtype=torch.float32)
    bare = randomised(small(whiten=True, flow_blocks=0), torch.float32)
    h = 100 * torch.randn(2, 16, 32)
    Z = torch.randn(2, 16, 12)

    def results():
        return [
            *model.flow.blocks[0].mu_a(h), *model.prior.informative(h), *bare.flow(Z),
            model.prior.redundant(h[:, 0]).shared_log_prob(Z[..., 5:]), bare.flow.inverse(Z)]

    new = Farmer(SMALL).prior.informative(torch.zeros(32))
    assert new.mu.std(0).min() > 0 and not new.log_sigma.any()  # components start apart
    exact = results()
    assert 2.9 < exact[1].abs().max() <= 3 and 6.9 < exact[4].abs().max() <= 7
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(exact, results(), strict=True))


# ----------------------------------------------------------------------------- prior (Eq. 11-14)
def torch_mixture(p: GMM) -> MixtureSameFamily:
    return MixtureSameFamily(
        Categorical(logits=p.logits), Independent(Normal(p.mu, p.log_sigma.exp()), 1))


def test_mixture_densities_are_torchs_and_draws_follow_them():
    torch.manual_seed(0)
    for spread, log_sigma in ((1, 0), (100, -5), (1000, -3)):  # an expanded square may cancel
        mu = spread * torch.randn(5, 4, 3)
        p = GMM(torch.randn(5, 4), mu, log_sigma + 0.5 * torch.randn(5, 4, 3))
        z = p.sample(torch.rand(5, 9), torch.randn(5, 9, 3))
        of_each = GMM(*(part.unsqueeze(1) for part in p))
        exact = torch_mixture(GMM(*(part.double() for part in of_each))).log_prob(z.double())
        for got in (p.shared_log_prob(z), of_each.log_prob(z)):
            assert torch.allclose(got.double(), exact, atol=1e-3, rtol=1e-4)
    z = P_C.sample(torch.rand(20_000), torch.randn(20_000, 1))[:, 0]
    assert stats.kstest(z.numpy(), guided_cdf(0)).pvalue > 0.01
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0])
    drawn = farmer.categorical(logits, torch.tensor([0.0, 0.49, 0.51, 0.999]))
    assert drawn.tolist() == [1, 1, 3, 3]


def test_log_prob_has_three_parts_by_token_and_the_loss_is_their_mean():
    """In raster order: the AR reads against it, and the one block in an order of its own."""
    model = in_columns(small(flow_blocks=1))
    X = model.patches(IMAGES)
    Z_I, Z_R = model.flow(X)[0].split([5, 7], -1)
    p_I, p_R = model.prior(Z_I, LABELS)
    informative = torch_mixture(p_I).log_prob(Z_I).flip(1)
    of_each = torch_mixture(GMM(*(part.unsqueeze(1) for part in p_R)))
    redundant = of_each.log_prob(Z_R).flip(1)
    block = model.flow.blocks[0]
    _, a = block.mu_a(block.hidden(block.order(X), block.context(None)))
    logdet = block.unorder(a.sum(2).roll(1, 1).index_fill(1, torch.tensor(0), 0.0))
    expected = torch.stack([informative + redundant + logdet, informative, redundant, logdet])
    assert torch.allclose(torch.stack(model.token_log_prob(IMAGES, LABELS)), expected)
    log_p = model.log_prob(IMAGES, LABELS)
    assert torch.allclose(torch.stack(log_p), expected.sum(2))
    terms = model(IMAGES, LABELS)
    assert list(terms) == ["loss", "nats_per_dim", "informative", "redundant", "logdet"]
    total, informative, redundant, logdet = log_p
    expected = torch.stack([-total, -total, -informative, -redundant, logdet]) / 192  # Eq. 13
    assert torch.allclose(torch.stack(list(terms.values())), expected)
    null = model.log_prob(IMAGES, NULL).total
    assert torch.equal(model.log_prob(IMAGES).total, null) and (null != total).all()


# ----------------------------------------------------------------------------- guidance (3.4)
P_C = GMM(torch.tensor([0.3, 0.0]), torch.tensor([[-1.0], [1.5]]), torch.tensor([[-0.4], [-0.2]]))
P_U = GMM(torch.tensor([0.0, 0.4]), torch.tensor([[-0.5], [0.8]]), torch.tensor([[0.1], [0.3]]))


def doubled(B: int) -> GMM:
    """[P_C, P_U] for a batch of B."""
    both = zip(P_C, P_U, strict=True)
    return GMM(*(torch.stack(parts).repeat_interleave(B, 0) for parts in both))


def guided_cdf(w: float):
    """Of p_c^{1+w} p_u^{-w}, normalised on a grid."""
    grid = torch.linspace(-8, 8, 8001)
    log_p_c, log_p_u = (torch_mixture(p).log_prob(grid[:, None]) for p in (P_C, P_U))
    cdf = ((1 + w) * log_p_c - w * log_p_u).double().softmax(0).cumsum(0)
    return lambda x: np.interp(x, grid.numpy(), cdf.numpy())


@pytest.mark.parametrize("w, s_c, s_u", [(1.0, 64, 16), (0.5, 16, 64)])
def test_guided_latents_follow_the_guided_density(w, s_c, s_u):
    """Z_I and Z_R, through the prior's own sampling, with heads that always give P_C and P_U."""
    prior = randomised(small(image_size=4, channels=1, informative_dim=1)).prior
    prior.d_R = 1
    prior.informative.forward = prior.redundant.forward = lambda h: doubled(len(h) // 2)
    options = Sampling(guidance=w, s_c=s_c, s_u=s_u)
    Z = prior.sample(torch.zeros(2500, dtype=torch.long), options, each(1)[0])
    for z in (Z[:, 0, 0], Z[:, 3, 0], Z[:, 0, 1], Z[:, 3, 1]):
        assert stats.kstest(z.numpy(), guided_cdf(w)).pvalue > 0.01
    assert np.mean([len(set(image)) for image in Z[..., 1].tolist()]) > 3.5  # from a large pool


def test_the_draw_with_all_temperatures_is_what_a_hand_computes():
    """T_pi, T_sigma and the scale move candidates; the others change the weights alone."""
    u = torch.tensor([0.2, 0.65, 0.45])
    eps = torch.tensor([[0.3], [-1.2], [0.5]])
    pick = ((torch.arange(20_000) + 0.5) / 20_000)[None]
    prior = Farmer(SMALL).prior

    def tempered(T_pi, T_sigma):
        return [GMM(T_pi * p.logits, p.mu, (T_sigma * p.log_sigma.exp()).log()) for p in (P_C, P_U)]

    for scale, change in (
            (1.0, dict()), (1.0, dict(T_pi=3.0)), (1.0, dict(T_sigma=0.5)), (1.0, dict(T_pi_v=0.2)),
            (1.0, dict(T_sigma_v=0.6)), (1.0, dict(T_s=2.5)), (0.4, dict(T_sigma=0.5))):
        # Two candidates of P_C and one of P_U.
        o = Sampling(guidance=1.5, s_c=2, s_u=1, **change)
        p_c, p_u = tempered(o.T_pi, o.T_sigma * scale)
        z = torch.cat([p_c.sample(u[:2], eps[:2]), p_u.sample(u[2:], eps[2:])])
        log_p_c, log_p_u = (
            torch_mixture(p).log_prob(z) for p in tempered(o.T_pi_v, o.T_sigma_v))
        log_weight = torch.tensor([1.5, 1.5, 2.5]) * (log_p_c - log_p_u)
        got = prior.draw(doubled(1), o, Noise(u[None], eps[None], pick), scale)
        shares = (got[0] - z.T).abs().lt(1e-5).double().mean(0)
        assert torch.allclose(shares, (o.T_s * log_weight).softmax(0).double(), atol=2e-4), change
        plain = dataclasses.replace(o, guidance=0.0)
        p_c, _ = doubled(1).halves()
        got = prior.draw(p_c, plain, Noise(u[None, :2], eps[None, :2], pick), scale)
        assert torch.allclose(got[0], z[:2], atol=1e-5), change


@pytest.mark.parametrize("w", [0.0, 1.0])
def test_t_sigma_scales_both_parts_and_redundant_scale_the_redundant_one(w):
    model = randomised(dtype=torch.float32)

    def latents(**options):
        Z = model.sample_latents(LABELS, Sampling(guidance=w, **options), each(3))
        return Z.split([5, 7], -1)

    plain_I, plain_R = latents()
    for field in ("redundant_scale", "T_sigma"):
        Z_I, Z_R = latents(**{field: 0.0})
        assert torch.equal(Z_I, plain_I) == (field == "redundant_scale")
        assert len(Z_R[0].unique(dim=0)) <= 4 < len(plain_R[0].unique(dim=0))  # only the means
    assert latents(redundant_scale=4.0)[1].std() > 2 * plain_R.std()


def test_guidance_reads_class_and_null_and_raises_their_ratio():
    model = randomised(dtype=torch.float32)
    labels = torch.zeros(100, dtype=torch.long)

    def latents(w):
        return model.sample_latents(labels, Sampling(guidance=w), each(100))[..., :5]

    def ratio(Z_I):
        p_c, p_u = (model.prior(Z_I, y)[0] for y in (labels, labels + 3))
        return (p_c.log_prob(Z_I) - p_u.log_prob(Z_I)).mean()

    assert ratio(latents(0.0)) < ratio(latents(1.0)) < ratio(latents(4.0))
    for row in range(4):
        before = latents(1.0)
        model.prior.class_embed.weight[row] += 1
        assert torch.equal(before, latents(1.0)) == (row in (1, 2)), row  # neither 0 nor null


def by_rejection(mu_c, sigma_c, mu_u, sigma_u, w, num):
    """Draws of N_c^{1+w} N_u^{-w} as GIVT makes them: proposals from a wide Gaussian, thinned out.
    """
    x = mu_c + 2 * max(sigma_c, sigma_u) * torch.randn(num).double()
    log_target = (1 + w) * Normal(mu_c, sigma_c).log_prob(x) - w * Normal(mu_u, sigma_u).log_prob(x)
    log_ratio = log_target - Normal(mu_c, 2 * max(sigma_c, sigma_u)).log_prob(x)
    return x[torch.rand(num).log() < log_ratio - log_ratio.max()]


@pytest.mark.parametrize("w", [0.5, 1.5])
def test_naive_guidance_follows_the_law_of_rejection_sampling(w):
    """Of the component that u picks in p_c; T_pi, T_sigma and the scale come before."""
    torch.manual_seed(0)
    prior = Farmer(SMALL).prior
    u = torch.rand(4000, 1)
    naive = Sampling(guidance=w, guidance_method="naive", T_sigma=0.8, T_pi=2.0)
    z = prior.draw(doubled(4000), naive, Noise(u, torch.randn(4000, 1, 1), u), 0.5).flatten()
    first = u[:, 0] < 1 / (1 + math.exp(-2 * 0.3))
    for k, drawn in enumerate((z[first], z[~first])):
        of_k = [(p.mu[k].item(), 0.4 * p.log_sigma[k].exp().item()) for p in (P_C, P_U)]
        rejected = by_rejection(*of_k[0], *of_k[1], w, 100_000)
        assert len(rejected) > 2000
        assert stats.ks_2samp(drawn.numpy(), rejected.numpy()).pvalue > 0.01
    # Where the null class is so narrow that there is no such Gaussian: draws of the class.
    p = GMM(torch.zeros(2, 1), torch.zeros(2, 1, 1), torch.tensor([0.1, 0.01]).log().view(2, 1, 1))
    eps = torch.tensor([[[0.5]]])
    z = prior.draw(p, Sampling(guidance=w, guidance_method="naive"), Noise(u[:1], eps, u[:1]))
    assert torch.allclose(z, 0.1 * eps)


# ----------------------------------------------------------------------------- student (3.5)
def test_distillation_is_algorithm_2():
    """By hand, with attention in both directions."""
    model = in_columns(small(whiten=True))
    distiller = model.distiller()
    with torch.no_grad():
        for p in distiller.parameters():
            p.add_(0.1 * torch.randn_like(p))
    Z, _ = model.flow.states(model.patches(IMAGES))
    assert torch.equal(Z[3].flip(1), model.flow(model.patches(IMAGES))[0])
    z = Z[3].clone()
    for row, g in zip(z, each(3), strict=True):
        s = 0.3 * torch.rand(1, 1, generator=g, dtype=torch.float64)
        row += s * torch.randn(16, 12, generator=g, dtype=torch.float64)
    expected = 0
    for block, target in zip(reversed(model.student), Z[2::-1], strict=True):
        z = block.order(z)
        mu, a = block.mu_a(block.hidden(z, block.context(None), causal=False))
        z = block.unorder(torch.cat([z[:, :1], z[:, 1:] / a[:, :-1].exp() + mu[:, :-1]], 1))
        expected = expected + (z - target).square().mean((1, 2)) / 3
        other = block.order(z)
        other[:, 15] += 1  # the last one that the block reads changes all but the first
        changed = block.one_step(block.unorder(other)) != block.one_step(z)
        assert changed.all(-1).sum(1).tolist() == [15, 15, 15]
    assert torch.allclose(distiller(IMAGES, None, each(3))["loss"], expected)


def test_a_distiller_trains_the_student_alone_and_it_travels():
    model = randomised().requires_grad_(True)
    distiller = model.distiller()
    student = set(model.student.parameters())
    assert {p.dtype for p in student} == {torch.float64}
    assert student == set(distiller.parameters()) and not student & set(model.flow.parameters())
    assert student == {p for p in model.parameters() if p.requires_grad}
    assert len(distiller.layers()) == 3 and len(model.layers()) == 7
    Z = normal(3, 16, 12)
    images = model.decode(Z, Sampling(inverse="student"))
    copy = Farmer(SMALL).double()
    with pytest.raises(ValueError, match="inverse: this model has no student.*--distill"):
        copy.decode(Z, Sampling(inverse="student"))
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy.decode(Z, Sampling()), images)  # auto is the student
    assert not torch.equal(copy.decode(Z, Sampling(inverse="exact")), images)


# ----------------------------------------------------------------------------- ablations, presets
def test_the_standard_gaussian_of_the_redundant_part():
    """JetFormer's N(0, I): in the density and in samples, guided or not, without parameters."""
    model = randomised(small(redundant_mixtures=0), torch.float32)
    assert model.prior.redundant is None
    Z = torch.randn(2, 16, 12)
    expected = stats.norm.logpdf(Z[..., 5:].numpy()).sum(2)
    assert np.allclose(model.prior(Z[..., :5], LABELS[:2])[1].shared_log_prob(Z[..., 5:]), expected)
    for w in (0.0, 2.0):
        options = Sampling(guidance=w, T_sigma=0.5)
        Z = model.sample_latents(torch.zeros(60, dtype=torch.long), options, each(60))
        assert stats.kstest(Z[..., 5:].flatten().numpy(), stats.norm.cdf).pvalue > 0.01


@pytest.mark.parametrize("switch", [
    dict(), dict(informative_dim=12), dict(class_tokens=1), dict(final_flip=False),
    dict(redundant_mixtures=0), dict(num_classes=0), dict(flow_blocks=0)], ids=str)
def test_every_switch_trains_and_samples(switch):
    """Every parameter gets a gradient in a call, as DDP needs."""
    model = Farmer(small(**switch))
    labels = LABELS.clamp(max=model.config.num_classes)
    model(torch.randn(3, 3, 8, 8), labels, each(3))["loss"].mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    w = 1.0 if model.config.num_classes else 0.0
    images = model.sample(labels, Sampling(guidance=w), each(3))
    assert images.shape == (3, 3, 8, 8) and images.dtype == torch.float32
    assert images.isfinite().all()


PARAMETERS = {  # of flow and prior; Table 1 says 828 and 295 million, 1.4 billion and 498 million
    "tiny": (870_784, 503_056), "fashion": (1_615_488, 866_336),
    "cifar10": (25_574_144, 6_730_768), "imagenet64": (152_317_056, 39_184_465),
    "farmer-1.1b-p16": (843_838_464, 295_627_016), "farmer-1.1b-p8": (807_335_424, 138_480_392),
    "farmer-1.9b-p16": (1_417_814_016, 498_899_144), "farmer-1.9b-p8": (1_376_096_256, 352_414_408)}
TABLE_6 = {  # w, s_c, s_u, T_pi, T_sigma, T_pi_v, T_sigma_v, T_s
    "farmer-1.1b-p16": (2.5, 5, 5, 1.0, 0.9, 0.2, 0.9, 1.1),
    "farmer-1.1b-p8": (2.0, 5, 5, 1.0, 1.0, 0.2, 0.9, 1.1),
    "farmer-1.9b-p16": (3.5, 5, 5, 1.0, 0.9, 0.2, 0.9, 1.1),
    "farmer-1.9b-p8": (1.5, 5, 5, 1.0, 1.0, 0.1, 1.0, 1.1)}


def test_presets_have_the_sizes_of_table_1_and_the_rows_of_table_6():
    for name, config in PRESETS.items():
        with torch.device("meta"):
            model = Farmer(config)
        sizes = [sum(p.numel() for p in part.parameters()) for part in (model.flow, model.prior)]
        assert tuple(sizes) == PARAMETERS[name], name
        if name in TABLE_6:
            w, s_c, s_u, *T = TABLE_6[name]
            assert config.sampling == Sampling(w, "resample", s_c, s_u, *T)
            assert config.num_tokens == (256 if name.endswith("p16") else 1024)
    assert PARAMETERS.keys() == PRESETS.keys() == farmer.TRAINING.keys()


# ----------------------------------------------------------------------------- use
def test_an_image_depends_on_its_own_generator_alone():
    model = randomised(small(image_size=4))
    options = Sampling(guidance=1.5)
    together = model.sample(LABELS, options, each(3))
    for i in (0, 2):
        alone = model.sample(LABELS[i:i + 1], options, each(3)[i:i + 1])
        assert (alone[0] - together[i]).abs().max() < 1e-6
    for generators in (lambda: each(1)[0], lambda: torch.manual_seed(7) and None):
        a, b = (model.sample(LABELS, options, generators()) for _ in range(2))
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="generators: got 3.*2 images"):
        model.sample(LABELS[:2], options, each(3))


def test_precision_bfloat16_acts_on_the_prior_and_the_student_alone():
    """Most first tokens stay; where a draw picks another component, its image follows it."""
    model = randomised(dtype=torch.float32)
    model.new_student()
    exact, fast = (Sampling(guidance=1.0, precision=name) for name in ("float32", "bfloat16"))
    Z, Z_fast = (model.sample_latents(torch.arange(60) % 3, o, each(60)) for o in (exact, fast))
    off = (Z - Z_fast)[:, 0, :5].abs().amax(1)
    assert (off > 0).all() and (off < 0.2).float().mean() > 0.8 and Z_fast.dtype == torch.float32
    off = (model.decode(Z, exact) - model.decode(Z, fast)).abs()
    assert 0 < off.max() and off.mean() < 0.1
    exact, fast = (dataclasses.replace(o, inverse="exact") for o in (exact, fast))
    assert torch.equal(model.decode(Z, exact), model.decode(Z, fast))


def test_denoising_is_a_step_along_the_exact_score():
    """x + sigma^2 grad log p(x|c), the gradient against finite differences in float64."""
    model = randomised(small(whiten=True, sampling=Sampling(guidance=1.0)))
    score = (model.denoise(IMAGES, LABELS, 0.3) - IMAGES) / 0.3**2
    step = 1e-6 * normal(3, 3, 8, 8)
    ahead, behind = (model.log_prob(IMAGES + s * step, LABELS).total for s in (1, -1))
    slope = (score * step).sum((1, 2, 3))
    assert torch.allclose((ahead - behind) / 2, slope, rtol=1e-4, atol=1e-9)
    raw = model.sample(LABELS, None, each(3))  # with the config's options
    clean = model.sample(LABELS, Sampling(guidance=1.0, denoise=0.05), each(3))
    assert torch.allclose(clean, model.denoise(raw, LABELS, 0.05))  # the last step of sampling


def test_an_error_names_what_is_wrong():
    for wrong in (
            dict(image_size=15), dict(informative_dim=49), dict(flow_width=100), dict(ar_width=100),
            dict(channels=2), dict(num_classes=-1), dict(patch_size=2.0), dict(class_tokens=True),
            dict(whiten="pca"), dict(T_s=math.inf), dict(T_pi=math.nan), dict(inverse="fast"),
            dict(denoise="a"), dict(patch_size=None), dict(T_sigma=True)):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"^{name}: got {value!r}, expected "):
            (Config if hasattr(SMALL, name) else Sampling)(**wrong)
    model = randomised()
    for wrong in (normal(2, 1, 8, 8), normal(2, 3, 16, 16), normal(3, 8, 8)):
        with pytest.raises(ValueError, match="images: got .*expected a batch of .3, 8, 8."):
            model.log_prob(wrong)
    for wrong in ([0, 4], [-1, 0], [0], [[0], [1]], [0.0, 1.0], [False, True]):
        with pytest.raises(ValueError, match="labels: got .*expected 2 integers from 0 to 3"):
            model.log_prob(normal(2, 3, 8, 8), torch.tensor(wrong))
    with pytest.raises(ValueError, match="inverse: got 'jacobi', expected exact or student"):
        model.flow.inverse(normal(2, 16, 12), "jacobi")


def test_a_twin_for_decoding_computes_the_same_whatever_its_parts():
    """Parts that are used twice, hooked or of another class, weights that a forward reads."""
    torch.manual_seed(0)
    act = torch.nn.GELU()
    stack = torch.nn.Sequential(torch.nn.Linear(4, 4), act, torch.nn.Linear(4, 4), act)
    stack.append(torch.nn.LayerNorm(4)).append(torch.nn.RMSNorm(4))
    stack[0].register_forward_hook(lambda module, args, out: out + 1)
    h = torch.randn(3, 1, 4)
    assert torch.allclose(farmer.lean(stack)(h), stack(h), atol=1e-6)
    lean = farmer.lean(torch.nn.ModuleDict(dict(a=stack[2], b=stack[4])))
    assert torch.equal(lean.a.weight, stack[2].weight) and lean.b.bias is stack[4].bias
    with torch.autocast("cpu", torch.bfloat16):
        twin = farmer.lean(stack)
        assert torch.allclose(twin(h), stack(h), atol=0.05)
        with farmer.full_precision(h):  # where heads and scales are computed
            assert torch.allclose(farmer.lean(stack)(h), stack(h), atol=1e-6)


# ----------------------------------------------------------------------------- forks
class Centred(GMM):
    """A mixture without noise, so that every draw is a mean."""

    def sample(self, u, eps):
        return super().sample(u, 0 * eps)


@pytest.mark.parametrize("d_I", [5, 12])
def test_a_fork_assigns_the_mixture_and_naive_guidance_refuses_it(d_I):
    """Drawn token by token with a cache, they are the mixtures that the prior predicts at once."""
    model = randomised(small(informative_dim=d_I))
    for head in (model.prior.informative, model.prior.redundant):
        if head is not None:
            head.mixture = Centred
    Z_I, Z_R = model.sample_latents(LABELS, Sampling(), each(3)).split([d_I, 12 - d_I], -1)
    p_I, p_R = model.prior(Z_I, LABELS)
    assert torch.cdist(Z_I.unsqueeze(2), p_I.mu).amin(-1).max() < 1e-6
    assert torch.cdist(Z_R, p_R.mu).amin(-1).max() < 1e-6
    with pytest.raises(ValueError, match="guidance_method.*not Gaussian"):
        model.sample(LABELS, Sampling(guidance=1.0, guidance_method="naive"))


def test_a_fork_overrides_draw(monkeypatch):
    """The draws are here the mean of the first component, one more for a scale of 3."""
    def draw(self, p, options, noise, scale=1.0):
        return p.halves()[0].mu[:, :1].expand(-1, noise.pick.shape[1], -1) + (scale == 3)

    monkeypatch.setattr(farmer.Prior, "draw", draw)
    model = randomised()
    Z = model.sample_latents(LABELS, Sampling(guidance=1.0, redundant_scale=3.0), each(3))
    p_I, p_R = model.prior(Z[..., :5], LABELS)
    means = torch.cat([p_I.mu[:, :, 0], p_R.mu[:, :1].expand(-1, 16, -1) + 1], 2)
    assert torch.allclose(Z, means, atol=1e-5)


def test_without_classes_a_fork_can_guide_by_a_pair_of_its_own():
    """Autoguidance: the other half of the doubled batch is no null class."""
    model = randomised(small(num_classes=0))
    labels = torch.tensor([0, 0, 0])
    total = model.log_prob(IMAGES, labels).total
    assert torch.equal(model.log_prob(IMAGES).total, total)
    guided = Sampling(guidance=2.0)
    with pytest.raises(ValueError, match="guidance: .*expected 0 for a model without classes"):
        model.sample(labels, guided)
    model.prior.null_labels = lambda labels: labels
    assert model.sample(labels, guided, each(3)).isfinite().all()


def test_settings_see_through_postponed_annotations_and_numpys_numbers():
    """farmer.py postpones its annotations, so that all of its types are strings here."""
    assert {type(f.type) for f in dataclasses.fields(Config)} == {str}
    config = Config(
        image_size=np.int64(16), whiten=np.bool_(True),
        sampling=Sampling(guidance=np.float32(1.5), T_s=2, denoise=np.array(0.25)))
    assert type(config.image_size) is int and config.whiten is True
    assert config.sampling == Sampling(guidance=1.5, T_s=2.0, denoise=0.25)
    assert {type(config.sampling.T_s), type(config.sampling.denoise)} == {float}

    @dataclasses.dataclass(frozen=True)
    class Mine:
        share: float = farmer.setting(0.5, "a share", 0, below=1)
        free: float = farmer.setting(-3.0, "any number")
        name: str = farmer.setting("a", "text")

        def __post_init__(self):
            farmer.check_settings(self)

    assert Mine(free=-1e30).share == 0.5
    for field, wrong, expected in (
            ("share", 1.0, "a finite number of at least 0 and below 1"), ("name", 3, "text"),
            ("share", -0.1, "a finite number of at least 0 and below 1"),
            ("free", -math.inf, "a finite number"), ("free", np.zeros(2), "a finite number")):
        with pytest.raises(ValueError, match=f"{field}: got .*, expected {expected}$"):
            Mine(**{field: wrong})


def test_labels_reach_each_row_of_flow_inverse_and_student(monkeypatch):
    """By a context that adds the class to each token, and notes what it is told."""
    told = []
    classes = normal(4, 32)
    plain = farmer.FlowBlock.context

    def context(self, labels):
        told.append(labels.tolist())
        return plain(self, labels) + classes[labels].unsqueeze(1)

    monkeypatch.setattr(farmer.FlowBlock, "context", context)
    model = randomised()
    distiller = model.distiller()
    exact = Sampling(inverse="exact")
    Z, _ = model.flow(model.patches(IMAGES), LABELS)
    model.log_prob(IMAGES, LABELS)
    distiller(IMAGES, LABELS, each(3))
    model.decode(Z, Sampling(), LABELS)
    images = model.decode(Z, exact, LABELS)
    assert (images - IMAGES).abs().max() < 1e-9
    model.sample(LABELS, Sampling(guidance=1.0, inverse="exact"), each(3))  # one label an image
    model.decode(Z, exact)  # null
    assert told == 21 * [[0, 1, 2]] + 3 * [[3, 3, 3]]  # of three blocks, eight times


def test_compiled_and_recomputed_layers_are_the_same(monkeypatch):
    """All of compiling but the kernels, which cost a C++ compiler a minute; each layer is whole."""
    whole = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", whole)
    results = []
    for compiling, checkpointing in itertools.product((False, True), (False, True)):
        model = randomised(small(flow_blocks=2), torch.float32).requires_grad_(True)
        prepare_layers(model, compiling, checkpointing)
        loss = model(torch.linspace(-1, 1, 576).view(3, 3, 8, 8), LABELS)["loss"].mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        samples = model.sample(LABELS, Sampling(guidance=1.0), each(3))
        results.append([loss.detach(), samples, *gradients])
    for a, *others in zip(*results, strict=True):
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for b in others)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
