"""The claims of farmer.py, by the paper's equations and sections. Weights are random, since a new
flow is the identity and proves nothing.

Flow (3.2, Eq. 8-10): inverse and determinant are exact with every switch; the density integrates to
    one; flow and prior are causal, cached or not; blocks alternate and, flipped, the prior reads
    against the last one; whitening whitens; bf16 attention is attention, scales are never in bf16.
Prior (Eq. 11-14, A.1): densities are torch's and draws follow them; log p has three parts, the loss
    is their mean; K = 1 without a split is one more flow block.
Guidance (3.4, Eq. 15, Algorithm 1, Table 6): draws follow the guided density, and with all
    temperatures are what a hand computes; redundant_scale moves Z_R alone and does not weigh,
    T_sigma moves both parts; the unguided half reads the null class; guidance raises the ratio of
    class and null, and changes nothing where they agree; naive guidance follows the law of
    rejection (4.3).
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


# ----------------------------------------------------------------------------- flow (3.2)
def test_patches_keep_their_pixels():
    images = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8).float()
    X = patchify(images, 4)
    assert torch.equal(X[0, 1].view(4, 4, 3), images[0, :, 0:4, 4:8].permute(1, 2, 0))
    assert torch.equal(farmer.unpatchify(X, 4, 3), images)


@pytest.mark.parametrize("switches", [
    dict(), dict(final_flip=False), dict(whiten=True), dict(flow_blocks=0, whiten=True),
    dict(flow_blocks=1, flow_layers=2, whiten=True, final_flip=False)], ids=str)
def test_the_inverse_and_the_determinant_are_exact(switches):
    """The determinant against that of autograd's Jacobian."""
    flow = randomised(small(**switches)).flow
    X = normal(2, 16, 12)
    Z, logdet = flow(X)
    assert (Z - X).abs().max() > 0.5  # not the identity
    assert (flow.inverse(Z) - X).abs().max() < 1e-9
    J = torch.autograd.functional.jacobian(
        lambda x: flow(x.view(1, 16, 12))[0].flatten(), X[1].flatten())
    assert abs(torch.linalg.slogdet(J)[1] - logdet[1]) < 1e-8


@pytest.mark.parametrize("tokens, d_I", [(2, 1), (1, 1), (1, 2)])
def test_the_density_integrates_to_one(tokens, d_I):
    """Of two tokens of one channel; of one token of two channels, with and without a split."""
    config = small(image_size=1, patch_size=1, flow_blocks=2, informative_dim=1, whiten=True)
    object.__setattr__(config, "channels", 2 // tokens)
    object.__setattr__(config, "informative_dim", d_I)
    model = randomised(config)
    for part in (*model.flow.blocks, model.prior):
        part.pos.row = Parameter(normal(tokens, 32), requires_grad=False)
    model.patches = lambda images: images.view(-1, tokens, 2 // tokens)
    t = torch.linspace(-5, 5, 161, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(t.sinh(), t.sinh(), indexing="ij"), -1).view(-1, 2)
    p = model.log_prob(grid, torch.ones(len(grid), dtype=torch.long)).total.exp().view(161, 161)
    p = p * torch.outer(t.cosh(), t.cosh()) * (t[1] - t[0]) ** 2
    assert abs(p.sum() - 1) < 2e-3
    assert (p - torch.outer(p.sum(1), p.sum(0))).abs().sum() > 0.1  # the two are not independent


def test_flow_and_prior_are_causal():
    """The one mixture that all Z_R share reads all Z_I (Eq. 14)."""
    model = randomised()
    block = model.flow.blocks[2]  # in raster order
    X = normal(1, 16, 12)
    p_I, p_R = model.prior(X[..., :5], NULL[:1])
    for j in (0, 7, 15):
        other = X.clone()
        other[:, j] += 1
        changed = (block(other)[0] != block(X)[0]).all(-1)[0]
        assert changed.tolist() == [i >= j for i in range(16)]
        q_I, q_R = model.prior(other[..., :5], NULL[:1])
        changed = (q_I.mu != p_I.mu).all(-1).all(-1)[0]
        assert changed.tolist() == [i > j for i in range(16)] and (q_R.mu != p_R.mu).all()


def test_blocks_alternate_and_the_prior_reads_against_the_last():
    """A block copies the first token of its order: that shows the order."""
    x = normal(1, 16, 12)
    copied = [(block(x)[0] == x).all(-1) for block in randomised(small(flow_blocks=4)).flow.blocks]
    assert [int(where.nonzero()[:, 1]) for where in copied] == [15, 0, 15, 0]  # the last in raster
    block = randomised().flow.blocks[1]  # which is flipped: a token keeps the place that it has
    assert torch.equal(block.context(None)[0].flip(0), block.pos())
    assert torch.equal(block.unorder(block.order(x)), x)
    for final_flip, place in ((True, 15), (False, 0)):
        Z, _ = randomised(small(flow_blocks=1, final_flip=final_flip)).flow(x)
        same = (Z.unsqueeze(2) == x.unsqueeze(1)).all(-1)[0]  # (token of the AR, token of x)
        assert same.nonzero().tolist() == [[place, 0]]  # flipped, the copied token comes last


def test_cached_steps_give_the_teacher_forced_mixtures():
    prior = randomised().prior
    Z_I = normal(3, 16, 5)
    p_I, p_R = prior(Z_I, LABELS)
    cache = prior.transformer.new_cache(18)
    h = prior.transformer(prior.class_tokens(LABELS), cache)[:, -1]
    for i in range(16):
        for a, b in zip(prior.informative(h), p_I, strict=True):
            assert torch.allclose(a, b[:, i], atol=1e-10)
        h = prior.transformer(prior.embed(Z_I[:, i:i + 1]) + prior.pos()[i], cache)[:, -1]
    assert torch.allclose(prior.shared(h).mu, p_R.mu, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_on_a_cpu_is_attention_in_bfloat16_too(causal):
    """Values and gradients against the formula in float64, within rounding."""
    torch.manual_seed(0)
    qkv = normal(3, 2, 2, 40, 16)
    mask = torch.full((40, 40), -math.inf).triu(1) if causal else 0

    def results(attention, dtype):
        leaves = [part.to(dtype).requires_grad_() for part in qkv]
        out = attention(*leaves, causal)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    exact = results(lambda q, k, v, _: (q @ k.mT / 4 + mask).softmax(-1) @ v, torch.float64)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        for a, b in zip(results(farmer.attention, dtype), exact, strict=True):
            assert a.dtype == dtype and (a - b).abs().max() < tolerance * b.abs().max()


def test_whitening_whitens_and_its_determinant_counts():
    torch.manual_seed(0)
    X = torch.randn(500, 16, 12) @ torch.randn(12, 12) + 3
    flow = Farmer(small(whiten=True, flow_blocks=0, final_flip=False)).flow
    flow.fit(X)
    Z, logdet = flow(X)
    assert Z.mean((0, 1)).abs().max() < 1e-3
    assert torch.allclose(torch.cov(Z.flatten(0, 1).T), torch.eye(12), atol=1e-3)
    assert (flow.map.norm(dim=0).diff() > 0).all()  # the largest variance first
    assert torch.allclose(logdet, 16 * torch.linalg.slogdet(flow.map)[1].expand(500))
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


def test_log_prob_has_three_parts_and_the_loss_is_their_mean():
    model = randomised(small(whiten=True))
    images = normal(3, 3, 8, 8)
    Z, logdet = model.flow(patchify(images, 2))
    p_I, p_R = model.prior(Z[..., :5], LABELS)
    informative = torch_mixture(p_I).log_prob(Z[..., :5]).sum(1)
    of_each = torch_mixture(GMM(*(part.unsqueeze(1) for part in p_R)))
    redundant = of_each.log_prob(Z[..., 5:]).sum(1)
    total = informative + redundant + logdet
    log_p = model.log_prob(images, LABELS)
    expected = torch.stack([total, informative, redundant, logdet])
    assert torch.allclose(torch.stack(log_p), expected)
    terms = model(images, LABELS)
    assert list(terms) == ["loss", "nats_per_dim", "informative", "redundant", "logdet"]
    expected = torch.stack([-total, -total, -informative, -redundant, logdet]) / 192  # Eq. 13
    assert torch.allclose(torch.stack(list(terms.values())), expected)
    null = model.log_prob(images, NULL).total
    assert torch.equal(model.log_prob(images).total, null) and (null != log_p.total).all()


def test_one_component_without_split_is_one_more_flow_block(monkeypatch):
    """A.1: the prior's mu and sigma as an affine step z -> u, then N(u; 0, 1); sampling inverts it.
    """
    model = randomised(small(informative_dim=12, informative_mixtures=1))
    images = normal(3, 3, 8, 8)
    Z, logdet = model.flow(patchify(images, 2))
    p, p_R = model.prior(Z, LABELS)
    a = -p.log_sigma[:, :, 0]
    u = farmer.affine(Z, p.mu[:, :, 0], a)
    expected = Normal(0, 1).log_prob(u).sum((1, 2)) + logdet + a.sum((1, 2))
    assert (model.log_prob(images, LABELS).total - expected).abs().max() < 1e-6 and p_R is None
    noise = Noise(torch.rand(3, 16, 1), u.unsqueeze(2), torch.rand(3, 16, 1))
    monkeypatch.setattr(farmer, "new_noise", lambda *args: noise)
    assert (model.prior.sample(LABELS, Sampling()) - Z).abs().max() < 1e-6


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


@pytest.mark.parametrize("w, s_c, s_u", [(1.0, 64, 16), (0.5, 16, 64), (2.0, 64, 64)])
def test_guided_latents_follow_the_guided_density(w, s_c, s_u):
    """Z_I and Z_R, through the prior's own sampling, with heads that always give P_C and P_U."""
    prior = randomised(small(image_size=4, channels=1, informative_dim=1)).prior
    prior.d_R = 1
    prior.informative.forward = prior.redundant.forward = lambda h: doubled(len(h) // 2)
    options = Sampling(guidance=w, s_c=s_c, s_u=s_u)
    Z = prior.sample(torch.zeros(2500, dtype=torch.long), options, each(1)[0])
    for z in (Z[:, 0, 0], Z[:, 3, 0], Z[:, 0, 1], Z[:, 3, 1]):
        assert stats.kstest(z.numpy(), guided_cdf(w)).pvalue > 0.01
        assert stats.kstest(z.numpy(), guided_cdf(0)).pvalue < 1e-3  # the test can tell
    assert np.mean([len(set(image)) for image in Z[..., 1].tolist()]) > 3.5  # from a large pool


def test_the_draw_with_all_temperatures_is_what_a_hand_computes():
    """T_pi, T_sigma and the scale move candidates; the others change the weights alone."""
    u = torch.tensor([0.2, 0.65, 0.45])
    eps = torch.tensor([[0.3], [-1.2], [0.5]])
    pick = ((torch.arange(20_000) + 0.5) / 20_000)[None]
    prior = Farmer(SMALL).prior

    def tempered(p, T_pi, T_sigma):
        return GMM(T_pi * p.logits, p.mu, (T_sigma * p.log_sigma.exp()).log())

    def by_hand(T_pi=1.0, T_sigma=1.0, T_pi_v=1.0, T_sigma_v=1.0, T_s=1.0, scale=1.0):
        """Two candidates of P_C, one of P_U, and their probabilities for w = 1.5."""
        p_c, p_u = (tempered(p, T_pi, T_sigma * scale) for p in (P_C, P_U))
        z = torch.cat([p_c.sample(u[:2], eps[:2]), p_u.sample(u[2:], eps[2:])])
        p_c, p_u = (torch_mixture(tempered(p, T_pi_v, T_sigma_v)) for p in (P_C, P_U))
        log_weight = torch.tensor([1.5, 1.5, 2.5]) * (p_c.log_prob(z) - p_u.log_prob(z))
        return z[:, 0], (T_s * log_weight).softmax(0).double()

    seen = set()
    for change in (dict(), dict(T_pi=3.0), dict(T_sigma=0.5), dict(T_pi_v=0.2), dict(T_sigma_v=0.6),
                   dict(T_s=2.5), dict(scale=1.7), dict(scale=0.4, T_sigma=0.5)):
        z, expected = by_hand(**change)
        seen.add((*z.tolist(), *expected.tolist()))
        scale = change.pop("scale", 1.0)
        options = Sampling(guidance=1.5, s_c=2, s_u=1, **change)
        got = prior.draw(doubled(1), options, Noise(u[None], eps[None], pick), scale)
        shares = (got[0] - z).abs().lt(1e-5).double().mean(0)
        assert torch.allclose(shares, expected, atol=2e-4), change
        options = dataclasses.replace(options, guidance=0.0)  # plain draws of P_C
        noise = Noise(u[None, :2], eps[None, :2], pick)
        got = prior.draw(doubled(1).halves()[0], options, noise, scale)
        assert torch.allclose(got.flatten(), z[:2], atol=1e-5), change
    assert len(seen) == 8  # each of them alone changes the result


@pytest.mark.parametrize("w", [0.0, 1.0])
def test_t_sigma_scales_both_parts_and_redundant_scale_the_redundant_one(w):
    model = randomised(dtype=torch.float32)

    def latents(**options):
        Z = model.sample_latents(LABELS, Sampling(guidance=w, **options), each(3))
        return *Z.split([5, 7], -1), len(Z[0, :, 5:].unique(dim=0))  # how many vectors differ

    plain_I, plain_R, distinct = latents()
    assert distinct > 4
    for field in ("redundant_scale", "T_sigma"):
        Z_I, _, distinct = latents(**{field: 0.0})
        assert torch.equal(Z_I, plain_I) == (field == "redundant_scale") and distinct <= 4  # means
    Z_I, Z_R, _ = latents(redundant_scale=4.0)
    assert torch.equal(Z_I, plain_I) and Z_R.std() > 2 * plain_R.std()


def test_guidance_reads_class_and_null_and_raises_their_ratio():
    model = randomised(dtype=torch.float32)
    labels = torch.zeros(400, dtype=torch.long)

    def latents(w, n=400):
        return model.sample_latents(labels[:n], Sampling(guidance=w), each(n))

    ratios = []
    for Z in (latents(0.0), latents(1.0), latents(4.0)):
        p_c, p_u = (model.prior(Z[..., :5], y)[0] for y in (labels, labels + 3))
        ratios.append((p_c.log_prob(Z[..., :5]) - p_u.log_prob(Z[..., :5])).mean())
    assert ratios[0] < ratios[1] < ratios[2]
    table = model.prior.class_embed.weight
    for row in range(4):
        before = latents(1.0, 50)
        table[row] += 1
        assert torch.equal(before, latents(1.0, 50)) == (row in (1, 2)), row  # neither 0 nor null
    # Where class and null agree, all weights are equal: one plain draw is chosen whatever w.
    table[:] = table[3].clone()
    plain, a, b = latents(0.0), latents(0.5), latents(6.0)
    same = (a - b).abs().amax((1, 2)) < 1e-3
    assert same.float().mean() > 0.9  # rounding may tip a choice
    for i, c in ((0, 0), (15, 4), (0, 11)):
        assert stats.ks_2samp(a[:, i, c].numpy(), plain[:, i, c].numpy()).pvalue > 0.01


def by_rejection(mu_c, sigma_c, mu_u, sigma_u, w, num):
    """Draws of N_c^{1+w} N_u^{-w} as GIVT makes them: proposals from a wide Gaussian, thinned out.
    """
    x = mu_c + 2 * max(sigma_c, sigma_u) * torch.randn(num).double()
    log_target = (1 + w) * Normal(mu_c, sigma_c).log_prob(x) - w * Normal(mu_u, sigma_u).log_prob(x)
    log_ratio = log_target - Normal(mu_c, 2 * max(sigma_c, sigma_u)).log_prob(x)
    return x[torch.rand(num).log() < log_ratio - log_ratio.max()]


@pytest.mark.parametrize("c, u, w", [
    ((0.5, 0.8), (-0.3, 1.1), 1.0), ((-1, 0.5), (0, 2.0), 0.5), ((0.5, 1.0), (0.2, 0.9), 1.0)])
def test_naive_guidance_follows_the_law_of_rejection_sampling(c, u, w):
    """Of the component that u picks in p_c; T_pi, T_sigma and the scale come before."""
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0], [5.0, -5.0]])
    mu = torch.tensor([[c[0], c[0] + 50], [u[0], u[0] + 50]])[..., None]
    log_sigma = torch.tensor([[c[1]] * 2, [u[1]] * 2]).log()[..., None]
    p = GMM(*(part.repeat_interleave(2000, 0) for part in (logits, mu, log_sigma)))
    naive = Sampling(guidance=w, guidance_method="naive", T_sigma=0.8, T_pi=2.0)
    noise = Noise(torch.rand(2000, 2), torch.randn(2000, 2, 1), torch.rand(2000, 2))
    prior = Farmer(SMALL).prior
    z = prior.draw(p, naive, noise, 0.5)[..., 0]
    second = z > 25
    assert torch.equal(second, noise.u > 1 / (1 + math.exp(2.0)))
    z = (z - 50 * second).flatten().numpy()
    rejected = by_rejection(c[0], 0.4 * c[1], u[0], 0.4 * u[1], w, 100_000).numpy()
    assert len(rejected) > 2000 and stats.ks_2samp(z, rejected).pvalue > 0.01
    assert stats.kstest(z, stats.norm(c[0], 0.4 * c[1]).cdf).pvalue < 1e-6  # the test can tell
    # Where the null class is so narrow that there is no such Gaussian: draws of the class.
    p = GMM(torch.zeros(2, 1), torch.zeros(2, 1, 1), torch.tensor([0.1, 0.01]).log().view(2, 1, 1))
    noise = Noise(torch.rand(1, 2), torch.tensor([[[0.5], [-2.0]]]), torch.rand(1, 2))
    z = prior.draw(p, Sampling(guidance=w, guidance_method="naive"), noise)
    assert torch.allclose(z, 0.1 * noise.eps)
    means = prior.draw(p, Sampling(guidance=w, guidance_method="naive", T_sigma=0.0), noise)
    assert means.abs().max() < 1e-30


# ----------------------------------------------------------------------------- student (3.5)
def test_distillation_is_algorithm_2():
    """By hand, with attention in both directions; exact inverses of the blocks have no loss."""
    model = randomised(small(whiten=True))
    x = normal(5, 3, 8, 8)
    distiller = model.distiller()
    with torch.no_grad():
        for p in distiller.parameters():
            p.add_(0.1 * torch.randn_like(p))
    Z, _ = model.flow.states(patchify(x, 2))
    assert len(Z) == 4 and torch.equal(Z[3].flip(1), model.flow(patchify(x, 2))[0])
    z = Z[3].clone()
    for row, g in zip(z, each(5), strict=True):
        s = 0.3 * torch.rand(1, 1, generator=g, dtype=torch.float64)
        row += s * torch.randn(16, 12, generator=g, dtype=torch.float64)
    expected = 0
    for t in (3, 2, 1):
        block = model.student[t - 1]
        z = block.order(z)
        mu, a = block.mu_a(block.hidden(z, block.context(None), causal=False))
        z = block.order(torch.cat([z[:, :1], z[:, 1:] / a[:, :-1].exp() + mu[:, :-1]], 1))
        expected = expected + (z - Z[t - 1]).square().mean((1, 2)) / 3
        other = z.clone()
        other[:, 0 if block.flip else 15] += 1  # the last one it reads changes all but the first
        changed = (block.one_step(other) != block.one_step(z)).all(-1)[0]
        assert int(changed.sum()) == 15
    assert torch.allclose(distiller(x, None, each(5))["loss"], expected)
    distiller.noise = 0.0
    for block, teacher in zip(model.student, model.flow.blocks, strict=True):
        block.one_step = teacher.inverse
    assert distiller(x, None, each(5))["loss"].max() < 1e-20


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
    assert not any("redundant" in name for name, _ in model.named_parameters())
    Z, _ = model.flow(torch.randn(2, 16, 12))
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
    """Every parameter gets a gradient in a call, as DDP needs; both ways of guidance work."""
    model = Farmer(small(**switch))
    labels = LABELS.clamp(max=model.config.num_classes)
    model(torch.randn(3, 3, 8, 8), labels, each(3))["loss"].mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    w = 1.0 if model.config.num_classes else 0.0
    for method in ("resample", "naive"):
        images = model.sample(labels, Sampling(guidance=w, guidance_method=method), each(3))
        assert images.shape == (3, 3, 8, 8) and images.dtype == torch.float32
        assert images.isfinite().all()


def test_an_unconditional_model_has_the_null_class_alone():
    model = randomised(small(num_classes=0))
    images = normal(2, 3, 8, 8)
    total = model.log_prob(images, torch.tensor([0, 0])).total
    assert torch.equal(model.log_prob(images).total, total)
    with pytest.raises(ValueError, match="guidance: .*expected 0 for a model without classes"):
        model.sample(torch.tensor([0, 0]), Sampling(guidance=1.0))


PARAMETERS = {  # of flow and prior; Table 1 says 828 and 295 million, 1.4 billion and 498 million
    "tiny": (870_784, 509_377), "fashion": (1_615_488, 815_897),
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
@pytest.mark.parametrize("options", [
    Sampling(), Sampling(guidance=1.5), Sampling(guidance=1.5, guidance_method="naive")], ids=str)
def test_an_image_depends_on_its_own_generator_alone(options):
    model = randomised(small(image_size=4))
    together = model.sample(LABELS, options, each(3))
    for i in (0, 2):
        alone = model.sample(LABELS[i:i + 1], options, each(3)[i:i + 1])
        assert (alone[0] - together[i]).abs().max() < 1e-6
    another = model.sample(LABELS[:1], options, each(3)[2:])
    assert (another[0] - together[0]).abs().max() > 0.1
    for generators in (lambda: each(1)[0], lambda: torch.manual_seed(7) and None):
        a, b = (model.sample(LABELS, options, generators()) for _ in range(2))
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="generators: got 3.*2 images"):
        model.sample(LABELS[:2], options, each(3))


def test_large_redundant_pools_are_drawn_a_few_images_at_a_time():
    prior = randomised(dtype=torch.float32).prior
    h = torch.randn(4, 32)
    options = Sampling(guidance=0.5, s_c=10_000, s_u=10_000)
    together = prior.sample_redundant(h, 2, options, each(2))
    alone = prior.sample_redundant(h[1::2], 1, options, each(2)[1:])
    assert torch.allclose(alone[0], together[1], atol=1e-5)


@pytest.mark.parametrize("w", [0.0, 1.0])
def test_precision_bfloat16_acts_on_the_prior_and_the_student_alone(w):
    """Most first tokens stay; where a draw picks another component, its image follows it."""
    model = randomised(dtype=torch.float32)
    model.new_student()
    exact, fast = (Sampling(guidance=w, precision=name) for name in ("float32", "bfloat16"))
    Z, Z_fast = (model.sample_latents(torch.arange(60) % 3, o, each(60)) for o in (exact, fast))
    off = (Z - Z_fast)[:, 0, :5].abs().amax(1)
    assert (off > 0).all() and (off < 0.2).float().mean() > 0.8 and Z_fast.dtype == torch.float32
    plain = model.images(model.flow.inverse(Z, "student", model.student))
    assert torch.equal(model.decode(Z, exact), plain)
    off = (plain - model.decode(Z, fast)).abs()
    assert 0 < off.max() and off.mean() < 0.1
    exact, fast = (dataclasses.replace(o, inverse="exact") for o in (exact, fast))
    assert torch.equal(model.decode(Z, exact), model.decode(Z, fast))


def test_denoising_is_a_step_along_the_exact_score():
    """x + sigma^2 grad log p(x|c), the gradient against finite differences in float64."""
    model = randomised(small(whiten=True, sampling=Sampling(guidance=1.0)))
    x = normal(3, 3, 8, 8)
    score = (model.denoise(x, LABELS, 0.3) - x) / 0.3**2
    step = 1e-6 * normal(3, 3, 8, 8)
    ahead, behind = (model.log_prob(x + s * step, LABELS).total for s in (1, -1))
    slope = (score * step).sum((1, 2, 3))
    assert torch.allclose((ahead - behind) / 2, slope, rtol=1e-4, atol=1e-9)
    raw = model.sample(LABELS, None, each(3))  # with the config's options
    clean = model.sample(LABELS, Sampling(guidance=1.0, denoise=0.05), each(3))
    assert torch.allclose(clean, model.denoise(raw, LABELS, 0.05))  # the last step of sampling
    assert not torch.allclose(clean, raw)


def test_an_error_names_what_is_wrong():
    for wrong in (
            dict(image_size=15), dict(informative_dim=49), dict(flow_width=100), dict(ar_width=100),
            dict(channels=2), dict(num_classes=-1), dict(patch_size=2.0), dict(class_tokens=True),
            dict(whiten="pca"), dict(guidance=-1.0), dict(T_s=math.inf), dict(T_pi=math.nan),
            dict(s_c=0), dict(T_sigma_v=0.0), dict(denoise="a"), dict(inverse="fast"),
            dict(patch_size=None), dict(T_sigma=True)):
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


def test_a_fork_assigns_the_mixture_and_naive_guidance_refuses_it():
    model = randomised()
    model.prior.informative.mixture = model.prior.redundant.mixture = Centred
    Z_I, Z_R = model.sample_latents(LABELS, Sampling(), each(3)).split([5, 7], -1)
    p_I, p_R = model.prior(Z_I, LABELS)
    assert type(p_I) is type(p_R) is Centred
    assert torch.cdist(Z_I.unsqueeze(2), p_I.mu).amin(-1).max() < 1e-6
    assert torch.cdist(Z_R, p_R.mu).amin(-1).max() < 1e-6
    with pytest.raises(ValueError, match="guidance_method.*not Gaussian"):
        model.sample(LABELS, Sampling(guidance=1.0, guidance_method="naive"))


def test_a_fork_assigns_blocks_and_transformers_and_overrides_draw(monkeypatch):
    """The draws are here the mean of the first component, one more for a scale of 3."""
    def draw(self, p, options, noise, scale=1.0):
        assert noise.u.shape == ((3, 10) if scale == 1 else (3, 160))
        return p.halves()[0].mu[:, :1].expand(-1, noise.pick.shape[1], -1) + (scale == 3)

    class Linears(torch.nn.Module):
        """Layers of another class, which see a token alone."""

        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)])

        def new_cache(self, T):
            return None

        def forward(self, h, cache=None, causal=True):
            return self.layers[1](self.layers[0](h).tanh())

    monkeypatch.setattr(farmer.Prior, "draw", draw)
    model = Farmer(SMALL)
    assert len(model.layers()) == 4
    model.flow.blocks[1].transformer = Linears()
    model.prior.transformer = Linears()
    model.flow.blocks[2] = type("MyBlock", (farmer.FlowBlock,), {})(SMALL, flip=True)
    kinds = [type(layer) for layer in model.layers()]
    assert kinds == [farmer.Layer, *2 * [torch.nn.Linear], farmer.Layer, *2 * [torch.nn.Linear]]
    for p in model.requires_grad_(False).parameters():
        p.add_(0.2 * torch.randn_like(p))
    Z = model.sample_latents(LABELS, Sampling(guidance=1.0, redundant_scale=3.0), each(3))
    p_I, p_R = model.prior(Z[..., :5], LABELS)
    means = torch.cat([p_I.mu[:, :, 0], p_R.mu[:, :1].expand(-1, 16, -1) + 1], 2)
    assert torch.allclose(Z, means, atol=1e-5)


class Columns(farmer.FlowBlock):
    """Reads column by column, an order that is not its own inverse after two rolls."""

    def order(self, x):
        return x.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2).roll(1, 1)

    def unorder(self, x):
        return x.roll(-1, 1).unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)


def test_any_order_of_the_tokens_is_exact_and_log_prob_is_told_by_token():
    model = randomised()
    columns = Columns(SMALL, flip=False).double()
    columns.load_state_dict(model.flow.blocks[1].state_dict())
    model.flow.blocks[1] = columns.requires_grad_(False)
    assert torch.equal(model.images(model.patches(IMAGES)), IMAGES)
    X = model.patches(IMAGES)
    assert (model.flow.inverse(model.flow(X)[0]) - X).abs().max() < 1e-9
    student = model.new_student()
    assert (student[1].order(student[1].unorder(X)) == X).all()
    log_p = model.log_prob(IMAGES, LABELS)
    tokens = model.token_log_prob(IMAGES, LABELS)
    for part, whole in zip(tokens, log_p, strict=True):
        assert part.shape == (3, 16) and torch.allclose(part.sum(1), whole)
    # In raster order: with one block that reads in raster order, and an AR that reads in reverse,
    # the log-determinant and the density of the mixtures at a token are those of its place.
    model = randomised(small(flow_blocks=1))
    X = model.patches(IMAGES)
    block = model.flow.blocks[0]
    mu, a = block.mu_a(block.hidden(X[:, :-1], block.context(None)[:, :-1]))
    tokens = model.token_log_prob(IMAGES, LABELS)
    assert torch.allclose(tokens.logdet[:, 1:], a.sum(2)) and not tokens.logdet[:, 0].any()
    Z, _ = model.flow(X)
    p_I, p_R = model.prior(Z[..., :5], LABELS)
    assert torch.allclose(tokens.informative.flip(1), p_I.log_prob(Z[..., :5]))
    assert torch.allclose(tokens.redundant.flip(1), p_R.shared_log_prob(Z[..., 5:]))


def test_a_fork_brings_its_own_pair_of_distributions_without_classes():
    """Autoguidance: the other half of the doubled batch is no null class."""
    class Guided(farmer.Prior):
        def null_labels(self, labels):
            return labels

    model = randomised(small(num_classes=0))
    model.prior.__class__ = Guided
    images = model.sample(torch.zeros(2, dtype=torch.long), Sampling(guidance=2.0), each(2))
    assert images.isfinite().all()


def test_settings_see_through_postponed_annotations_and_numpys_numbers():
    """farmer.py postpones its annotations, so that all of its types are strings here."""
    assert {type(f.type) for f in dataclasses.fields(Config)} == {str}
    config = Config(
        image_size=np.int64(16), whiten=np.bool_(True),
        sampling=Sampling(guidance=np.float32(1.5), T_s=2, denoise=np.array(0.25)))
    assert type(config.image_size) is int and config.whiten is True
    assert config.sampling == Sampling(guidance=1.5, T_s=2.0, denoise=0.25)
    assert {type(config.sampling.T_s), type(config.sampling.denoise)} == {float}
    with pytest.raises(ValueError, match="T_s: got .*, expected a finite number of at least 0"):
        Sampling(T_s=np.array([1.0, 2.0]))

    @dataclasses.dataclass(frozen=True)
    class Mine:
        share: float = farmer.setting(0.5, "a share", 0, below=1)
        free: float = farmer.setting(-3.0, "any number")
        name: str = farmer.setting("a", "text")

        def __post_init__(self):
            farmer.check_settings(self)

    assert Mine(free=-1e30).share == 0.5
    for wrong, expected in ((dict(share=1.0), "at least 0 and below 1"), (dict(free=math.inf), ""),
                            (dict(name=3), "text")):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: got .*{expected}"):
            Mine(**wrong)


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
    images = normal(3, 3, 8, 8)
    Z, _ = model.flow(patchify(images, 2), LABELS)
    exact = Sampling(inverse="exact")
    assert (model.decode(Z, exact, LABELS) - images).abs().max() < 1e-9

    def results(y):
        told.clear()
        values = [model.log_prob(images, y).logdet, distiller(images, y, each(3))["loss"],
                  model.decode(Z, exact, y), model.decode(Z, Sampling(), y)]
        assert told == 15 * [y.tolist()]  # three blocks, five times
        return values

    for a, b in zip(results(LABELS), results(torch.tensor([3, 1, 2])), strict=True):
        assert (a[0] != b[0]).any() and torch.equal(a[1:], b[1:])
    for inverse, w in itertools.product(("exact", "student"), (0.0, 1.0)):
        told.clear()
        model.sample(LABELS, Sampling(guidance=w, inverse=inverse), each(3))
        assert told == 3 * [[0, 1, 2]]  # one label an image, guided too
    told.clear()
    model.decode(Z, exact)
    assert told == 3 * [[3, 3, 3]]  # null


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
