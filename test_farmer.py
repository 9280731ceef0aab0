"""The claims of README.md, each as a test on random or trained weights (a zero-initialised flow is the identity and proves nothing). Offline, CPU.

    pytest -q
"""
import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import farmer
import sample
import train
from farmer import GMM, PRESETS, Config, Farmer, Sampling, UserError, categorical, gmm_log_prob, gmm_sample, patchify, resample_cfg, shared_gmm_log_prob

HERE = Path(__file__).parent
SMALL = Config(image_size=8, patch_size=2, num_classes=3, flow_blocks=3, flow_layers=1, flow_width=32, ar_layers=1, ar_width=32, head_dim=16,
               informative_dim=5, informative_mixtures=3, redundant_mixtures=2, class_tokens=2)
SMALL_FLAGS = ["--flow-blocks", "2", "--flow-width", "32", "--ar-layers", "1", "--ar-width", "32", "--head-dim", "16", "--batch-size", "8",
               "--informative-mixtures", "2", "--log-every", "5", "--sample-every", "0", "--val-every", "0", "--workers", "0"]


def randomised(config: Config = SMALL, seed: int = 0, dtype=torch.float64) -> Farmer:
    """A model with every parameter moved away from its initial value."""
    torch.manual_seed(seed)
    model = Farmer(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.flow.fit_linear_map(torch.randn(50, config.num_tokens, config.token_dim, dtype=dtype) @ torch.randn(config.token_dim, config.token_dim, dtype=dtype))
    return model.requires_grad_(False)


def random_gmm(*shape, K=4, d=3, spread=1.0, log_sigma=0.0) -> GMM:
    return GMM(torch.randn(*shape, K), spread * torch.randn(*shape, K, d), log_sigma + 0.5 * torch.randn(*shape, K, d))


def fails(capsys, script, argv: list[str], *words: str) -> None:
    """The script ends with exit code 2 and one line on stderr that has all of words."""
    with pytest.raises(SystemExit) as e:
        sample.run(script.main, argv)
    err = capsys.readouterr().err.strip()
    assert e.value.code == 2
    assert len(err.splitlines()) == 1 and all(w in err for w in words), err


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory) -> Path:
    """A short run of the default preset on the digits, uniform noise so that bits/dim is there too."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    train.main(["--out", str(out), "--steps", "120", "--warmup", "10", "--flow-blocks", "2", "--batch-size", "32", "--noise-end", "0.1", "--log-every", "20",
                "--save-every", "60", "--sample-every", "0", "--val-every", "0"])
    return out


# ---------------------------------------------------------------------------------------------------------------------- exactness
OPTIONS = [dict(final_flip=f, linear_map=m, informative_dim=d, informative_mixtures=k) for f, m, d, k in
           itertools.product((True, False), ("none", "rotate", "whiten"), (5, 12), (1, 3))]


@pytest.mark.parametrize("options", OPTIONS[::5] + OPTIONS[1::7], ids=str)
def test_flow_is_invertible_and_its_logdet_exact(options):
    model = randomised(dataclasses.replace(SMALL, **options))
    X = torch.randn(2, 16, 12, dtype=torch.float64)
    Z, logdet = model.flow(X)
    assert (Z - X).abs().max() > 0.5  # not the identity
    for method in ("exact", "parallel"):
        assert (model.flow.inverse(Z, method, tol=0) - X).abs().max() < 1e-9
    for b in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda x: model.flow(x.view(1, 16, 12))[0].flatten(), X[b].flatten())
        assert abs(torch.linalg.slogdet(jacobian)[1] - logdet[b]) < 1e-8


def test_round_trip_of_a_trained_model_in_float32(digits_run):
    model, extra = farmer.load(digits_run)
    data = train.digits(200, 16, 3, seed=1).array
    X = patchify(train.dequantized(torch.from_numpy(data).permute(0, 3, 1, 2), torch.arange(200), 0, 0.05), 4)
    with torch.no_grad():
        Z, _ = model.flow(X)
        for method in ("exact", "parallel"):
            assert (model.flow.inverse(Z, method) - X).abs().max() < 1e-3


def test_density_integrates_to_one():
    """A model of one token and two channels (a 1 x 2 patch cannot be square, so p = 1 and C = 2 by hand), on a grid."""
    config = dataclasses.replace(SMALL, image_size=1, patch_size=1, channels=3, informative_dim=2, flow_blocks=2)
    object.__setattr__(config, "channels", 2)
    for d_I in (1, 2):
        object.__setattr__(config, "informative_dim", d_I)
        model = randomised(config)
        g = torch.linspace(-20, 20, 201, dtype=torch.float64)
        images = torch.stack(torch.meshgrid(g, g, indexing="ij"), -1).view(-1, 2, 1, 1)
        p = sum(model.log_prob(x, torch.zeros(len(x), dtype=torch.long)).total.exp().sum() for x in images.split(20_000))
        assert abs(float(p) * float(g[1] - g[0]) ** 2 - 1) < 0.01


def test_patches_keep_their_pixels_and_quantize_inverts_dequantize():
    images = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8).float()
    X = patchify(images, 4)
    assert X.shape == (2, 4, 48) and torch.equal(X[0, 1].view(4, 4, 3), images[0, :, 0:4, 4:8].permute(1, 2, 0))
    assert torch.equal(farmer.unpatchify(X, 4, 3), images)
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for u in (0.0, 0.5, 0.999):
        assert torch.equal(farmer.quantize(farmer.dequantize(levels, torch.full((1, 1, 16, 16), u), None)), levels)
    x = farmer.dequantize(levels, torch.ones(1, 1, 16, 16), 0.25)
    assert torch.allclose(x, (levels + 0.5) / 128 - 1 + 0.25)


# ---------------------------------------------------------------------------------------------------------------------- causality and caches
def test_changing_a_token_never_changes_parameters_at_or_before_it():
    model = randomised()
    x, labels = torch.randn(1, 16, 12, dtype=torch.float64), torch.tensor([1])
    block = model.flow.blocks[1]
    for j in (0, 7, 15):
        y = x.clone()
        y[:, j] += 1
        change = (block.mu_a(x, block.pos(False))[0] - block.mu_a(y, block.pos(False))[0]).abs().amax((0, 2))  # row i: parameters of token i + 1
        assert (change[:j] == 0).all() and (change[j:] > 0).all()
        (a, r_a), (b, r_b) = (model.prior(t[..., :5], labels) for t in (x, y))
        change = (a.mu - b.mu).abs().amax((0, 2, 3))  # row i: parameters of token i
        assert (change[:j + 1] == 0).all() and (change[j + 1:] > 0).all() and (r_a.mu != r_b.mu).all()


def test_cached_steps_equal_the_teacher_forced_parameters():
    model = randomised()
    Z, labels = torch.randn(2, 16, 5, dtype=torch.float64), torch.tensor([0, 2])
    prior, pos = model.prior, model.prior.pos(flip=False)
    expected, shared = prior(Z, labels)
    cache = prior.transformer.new_cache(2, 18, Z)
    h = prior.class_tokens(labels)
    for i in range(16):
        got = prior.informative(prior.transformer(h, cache)[:, -1])
        for a, b in zip(got, expected, strict=True):
            assert torch.allclose(a, b[:, i], atol=1e-10)
        h = prior.embed(Z[:, i:i + 1]) + pos[i]
    assert torch.allclose(prior.redundant(prior.transformer(h, cache)[:, -1]).mu, shared.mu, atol=1e-10)


def test_one_component_without_split_is_one_more_flow_block():
    """A.1: the prior's mu and sigma used as an affine step z -> u, then log N(u; 0, 1), and its sampling as the inverse step."""
    config = dataclasses.replace(SMALL, informative_dim=12, informative_mixtures=1)
    model = randomised(config)
    images, labels = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    Z, logdet = model.flow(patchify(images, 2))
    gmm, _ = model.prior(Z, labels)
    mu, a = gmm.mu[:, :, 0], -gmm.log_sigma[:, :, 0]
    u = farmer.affine(Z, mu, a)
    expected = (-0.5 * u.square() - 0.5 * math.log(2 * math.pi)).sum((1, 2)) + logdet + a.sum((1, 2))
    assert (model.log_prob(images, labels).total - expected).abs().max() < 1e-6
    noise = farmer.Noise.new(4, config, Sampling(), torch.Generator().manual_seed(0), Z)._replace(eps=u.unsqueeze(2))
    assert (model.prior.sample(labels, 3, Sampling(), noise) - Z).abs().max() < 1e-6


def test_an_image_does_not_depend_on_its_batch(digits_run):
    model, _ = farmer.load(digits_run)
    labels = torch.arange(12) % 10
    for guidance in (0.0, 1.5):
        one, many = (np.concatenate(list(sample.sample_images(model, labels, seed=3, batch_size=b, guidance=guidance))) for b in (5, 12))
        assert np.abs(one.astype(int) - many).mean() < 0.05  # rounding may move a level, or very rarely a choice of component
    other = np.concatenate(list(sample.sample_images(model, labels, seed=4, batch_size=12, guidance=0.0)))
    assert np.abs(other.astype(int) - many).mean() > 5


# ---------------------------------------------------------------------------------------------------------------------- mixtures
def torch_mixture(gmm: GMM):
    from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
    return MixtureSameFamily(Categorical(logits=gmm.logits), Independent(Normal(gmm.mu, gmm.log_sigma.exp()), 1))


def test_mixture_densities_against_torch_distributions():
    torch.manual_seed(0)
    gmm = random_gmm(5, 7)
    z = torch.randn(5, 7, 3)
    assert torch.allclose(gmm_log_prob(z, *gmm), torch_mixture(gmm).log_prob(z), atol=1e-4)
    for spread, log_sigma in ((1, 0), (100, -5), (1000, -3)):  # far-out means, small stds: where an expanded square cancels
        gmm = random_gmm(5, spread=spread, log_sigma=log_sigma)
        z = gmm_sample(gmm, torch.rand(5, 9), torch.randn(5, 9, 3))
        exact = torch_mixture(GMM(*(t.double().unsqueeze(1) for t in gmm))).log_prob(z.double())
        assert torch.allclose(shared_gmm_log_prob(z, *gmm).double(), exact, atol=1e-3, rtol=1e-4)
        assert torch.allclose(gmm_log_prob(z, *(t.unsqueeze(1) for t in gmm)).double(), exact, atol=1e-3, rtol=1e-4)


def test_mixture_draws_follow_the_mixture():
    torch.manual_seed(0)
    gmm = GMM(torch.tensor([0.5, -0.3]), torch.tensor([[-1.0], [2.0]]), torch.tensor([[-0.5], [0.2]]))
    z = gmm_sample(gmm, torch.rand(20_000), torch.randn(20_000, 1))[:, 0].numpy()
    assert stats.kstest(z, mixture_cdf(gmm)).pvalue > 0.01
    assert torch.equal(categorical(torch.tensor([0.0, -math.inf, 0.0]), torch.tensor([0.0, 0.49, 0.51, 0.999])), torch.tensor([0, 0, 2, 2]))


def mixture_cdf(gmm: GMM):
    pi, mu, sigma = gmm.logits.softmax(-1).numpy(), gmm.mu[:, 0].numpy(), gmm.log_sigma[:, 0].exp().numpy()
    return lambda x: (pi * stats.norm.cdf(np.asarray(x)[..., None], mu, sigma)).sum(-1)


# ---------------------------------------------------------------------------------------------------------------------- guidance
P_C = GMM(torch.tensor([0.3, 0.0]), torch.tensor([[-1.0], [1.5]]), torch.tensor([[-0.4], [-0.2]]))
P_U = GMM(torch.tensor([0.0, 0.4]), torch.tensor([[-0.5], [0.8]]), torch.tensor([[0.1], [0.3]]))


def resampled(n: int, **options) -> np.ndarray:
    options = Sampling(**{"s_c": 256, "s_u": 256, **options})
    S, B = options.s_c + options.s_u, 500
    out = []
    for _ in range(n // B):
        p_c, p_u = (GMM(*(t.expand(B, *t.shape) for t in p)) for p in (P_C, P_U))
        out.append(resample_cfg(p_c, p_u, options, torch.rand(B, S), torch.randn(B, S, 1), torch.rand(B, 1)).flatten())
    return torch.cat(out).numpy()


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
def test_resampling_draws_from_the_guided_density(w):
    torch.manual_seed(0)
    z = resampled(5000, guidance=w)
    grid = torch.linspace(-8, 8, 8001, dtype=torch.float64)
    log_p = [gmm_log_prob(grid[:, None], *(t.double() for t in p)) for p in (P_C, P_U)]
    target = ((1 + w) * log_p[0] - w * log_p[1]).exp()
    cdf = (target.cumsum(0) / target.sum()).numpy()
    assert stats.kstest(z, lambda x: np.interp(x, grid.numpy(), cdf)).pvalue > 0.01
    if w == 0:
        assert stats.kstest(z, mixture_cdf(P_C)).pvalue > 0.01
    else:  # the test can tell: unguided draws do not pass
        assert stats.kstest(resampled(5000, guidance=0.0), lambda x: np.interp(x, grid.numpy(), cdf)).pvalue < 1e-6


def test_temperatures_do_what_table_6_says():
    gmm = GMM(torch.tensor([1.0, 0.0]), torch.zeros(2, 1), torch.zeros(2, 1)).tempered(0.2, 0.9)
    assert torch.allclose(gmm.logits, torch.tensor([0.2, 0.0])) and torch.allclose(gmm.log_sigma.exp(), torch.full((2, 1), 0.9))
    torch.manual_seed(0)
    narrow, wide = resampled(2000, guidance=0.0, T_sigma=1e-6, s_c=1, s_u=0), resampled(2000, guidance=0.0, s_c=1, s_u=0)
    assert set(np.round(narrow, 3)) == {-1.0, 1.5} and len(set(np.round(wide, 3))) > 500  # T_sigma: only the means are left
    sharp = resampled(2000, guidance=0.0, T_pi=50.0, T_sigma=1e-6, s_c=1, s_u=0)
    assert set(np.round(sharp, 3)) == {-1.0}  # T_pi: only the likelier component
    log_p = [gmm_log_prob(torch.tensor(resampled(4000, guidance=2.0, T_s=t))[:, None], *P_C).mean() - gmm_log_prob(
        torch.tensor(resampled(4000, guidance=2.0, T_s=t))[:, None], *P_U).mean() for t in (0.0, 1.0, 4.0)]
    assert log_p[0] < log_p[1] < log_p[2]  # T_s: 0 ignores the weights, more sharpens them
    flat, plain = (resampled(4000, guidance=2.0, T_pi_v=t, T_sigma_v=v) for t, v in ((0.2, 3.0), (1.0, 1.0)))
    assert stats.ks_2samp(flat, plain).pvalue < 1e-3  # the weighing temperatures are read


def test_redundant_scale_changes_only_the_redundant_part():
    model = randomised(dtype=torch.float32)
    labels = torch.tensor([0, 1])
    Z = [model.sample_latents(labels, Sampling(redundant_scale=s), torch.Generator().manual_seed(0)) for s in (0.0, 1.0, 4.0)]
    assert torch.equal(Z[0][..., :5], Z[2][..., :5])
    gmm = model.prior(Z[0][..., :5], labels)[1]
    nearest = (Z[0][..., None, 5:] - gmm.mu[:, None]).abs().amax(-1).amin(-1)
    assert nearest.max() < 1e-5  # scale 0: exactly a mean
    assert Z[2][..., 5:].std() > Z[1][..., 5:].std()


def test_guided_sampling_of_the_whole_model():
    """Guidance raises log p(x|c) - log p(x); where class and null agree, guided sampling leaves the distribution alone."""
    model = randomised(dtype=torch.float32)
    labels = torch.arange(300) % 3

    def gain(w):
        Z = model.sample_latents(labels, Sampling(guidance=w), torch.Generator().manual_seed(0))
        return float(sum((gmm_log_prob(Z[..., :5], *model.prior(Z[..., :5], y)[0]) for y in (labels,))).mean()
                     - gmm_log_prob(Z[..., :5], *model.prior(Z[..., :5], torch.full_like(labels, 3))[0]).mean())
    assert gain(0.0) < gain(1.0) < gain(4.0)
    images = model.sample(labels[:4], guidance=1.0)
    assert images.shape == (4, 3, 8, 8) and images.dtype == torch.float32 and images.isfinite().all()


def test_unconditional_model():
    model = randomised(dataclasses.replace(SMALL, num_classes=0))
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(model.log_prob(images).total, model.log_prob(images, torch.tensor([0, 0])).total)
    assert model.sample(torch.zeros(2, dtype=torch.long)).shape == (2, 3, 8, 8)
    with pytest.raises(UserError, match="unconditional"):
        model.sample(torch.zeros(2, dtype=torch.long), guidance=1.0)
    with pytest.raises(UserError, match="labels"):
        model.log_prob(images, torch.tensor([0, 1]))


def test_log_prob_has_its_parts_and_counts_the_linear_map():
    model = randomised(dataclasses.replace(SMALL, linear_map="whiten"))
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    parts = model.log_prob(images, torch.tensor([0, 1]))
    assert torch.allclose(parts.total, parts.informative + parts.redundant + parts.logdet)
    assert abs(model.flow.map_logdet - torch.linalg.slogdet(model.flow.map)[1]) < 1e-9 and abs(model.flow.map_logdet) > 0.1
    assert torch.equal(model.log_prob(images).total, model.log_prob(images, torch.tensor([3, 3])).total)  # None = the null label


def test_samples_are_typical(digits_run):
    """-log p of the model's own samples against -log p of held-out digits with the same noise."""
    model, extra = farmer.load(digits_run)
    labels = torch.arange(200) % 10
    with torch.no_grad():
        own = -model.log_prob(model.sample(labels, generator=torch.Generator().manual_seed(0)), labels).total.mean() / 768
    _, _, val, indices = train.training_data(train.Train(**extra["train"]), model.config)
    held_out = train.evaluate(model, val, indices, train.Train(**extra["train"]))["nats_per_dim"]
    assert abs(own - held_out) < 0.05 * abs(held_out), (float(own), held_out)


# ---------------------------------------------------------------------------------------------------------------------- presets and config
def test_presets_have_the_sizes_of_table_1():
    def count(name):
        with torch.device("meta"):
            model = Farmer(PRESETS[name])
        return tuple(sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.flow, model.prior))
    flow, prior = count("farmer-1.1b-p16")
    assert abs(flow / 828 - 1) < 0.02 and abs(prior / 295 - 1) < 0.02
    flow, prior = count("farmer-1.9b-p16")
    assert abs((flow + prior) / 1900 - 1) < 0.05 and abs(prior / 498 - 1) < 0.02
    assert {p.num_tokens for n, p in PRESETS.items() if n.endswith("p8")} == {1024}
    s = PRESETS["farmer-1.9b-p8"].sampling
    assert (s.T_pi, s.T_sigma, s.s_c, s.s_u, s.T_pi_v, s.T_sigma_v, s.T_s, s.guidance) == (1.0, 1.0, 5, 5, 0.1, 1.0, 1.1, 1.5)
    assert all(count(name) for name in PRESETS)


@pytest.mark.parametrize("field, value", [("image_size", 15), ("informative_dim", 49), ("informative_dim", 0), ("linear_map", "pca"), ("flow_width", 100),
                                          ("channels", 2), ("num_classes", -1), ("ar_layers", 0), ("patch_size", 2.0), ("class_tokens", True)])
def test_config_names_the_field_that_is_wrong(field, value):
    with pytest.raises(ValueError, match=field):
        Config(**{field: value})


def test_sampling_refuses_what_is_not_a_number():
    for values in (dict(guidance=-1.0), dict(guidance=math.nan), dict(T_s=math.inf), dict(s_c=0), dict(T_sigma_v=0.0)):
        with pytest.raises(UserError, match=next(iter(values))):
            Sampling(**values)
