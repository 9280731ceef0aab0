"""The claims of README.md, each as a test on random or trained weights (a zero-initialised flow is the identity and proves nothing). Offline, CPU.

    pytest -q
"""
import dataclasses
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import farmer
import fid
import sample
import support.images as images_module
import train
from farmer import GMM, PRESETS, Config, Farmer, Sampling, UserError, categorical, gmm_log_prob, gmm_sample, patchify, resample_cfg, shared_gmm_log_prob
from support import classifier
from support.images import ImageDataset, Images, batches, cache_images, center_crop, check_images, digits, hold_out, open_images

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
OPTIONS = [dict(final_flip=f, linear_map=m, informative_dim=d, look_above=a) for f, m, d, a in
           itertools.product((True, False), ("none", "rotate", "whiten"), (5, 12), (False, True))]


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
    data = digits(200, 16, 3, seed=1).array
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
        g = torch.linspace(-24, 24, 385, dtype=torch.float64)
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
@pytest.mark.parametrize("look_above", [False, True])
def test_changing_a_token_never_changes_parameters_at_or_before_it(look_above):
    model = randomised(dataclasses.replace(SMALL, look_above=look_above))
    x, labels = torch.randn(1, 16, 12, dtype=torch.float64), torch.tensor([1])
    block, every = model.flow.blocks[1], torch.arange(16)
    for j in (0, 7, 15):
        y = x.clone()
        y[:, j] += 1
        change = (block.mu_a(x, every, block.pos(False))[0] - block.mu_a(y, every, block.pos(False))[0]).abs().amax((0, 2))  # row i: of token i + 1
        assert (change[:j] == 0).all() and (change[j:] > 0).all()
        (a, r_a), (b, r_b) = (model.prior(t[..., :5], labels) for t in (x, y))
        change = (a.mu - b.mu).abs().amax((0, 2, 3))  # row i: parameters of token i
        assert (change[:j + 1] == 0).all() and (change[j + 1:] > 0).all() and (r_a.mu != r_b.mu).all()


@pytest.mark.parametrize("look_above", [False, True])
@pytest.mark.parametrize("static", [False, True], ids=["sliced", "static"])
def test_cached_steps_equal_the_teacher_forced_parameters(look_above, static):
    """Both kinds of cache; the static one is what CUDA graphs replay."""
    model = randomised(dataclasses.replace(SMALL, look_above=look_above))
    Z, labels = torch.randn(2, 16, 5, dtype=torch.float64), torch.tensor([0, 2])
    prior, pos = model.prior, model.prior.pos(flip=False)
    expected, shared = prior(Z, labels)
    cache = prior.transformer.new_cache(2, 18, Z, static)
    h = prior.class_tokens(labels)
    for i in range(16):
        got = prior.informative(prior.transformer(h, cache)[:, -1])
        for a, b in zip(got, expected, strict=True):
            assert torch.allclose(a, b[:, i], atol=1e-10)
        h = prior.embed(Z, torch.tensor([i])) + pos[i]
    assert torch.allclose(prior.redundant(prior.transformer(h, cache)[:, -1]).mu, shared.mu, atol=1e-10)


def test_compiled_layers_over_static_caches_sample_the_same(monkeypatch):
    """What a GPU runs, but for the kernels and the replay: whole graphs, one for all layers and blocks at each shape."""
    model, compiled = randomised(), randomised()
    for m in (model, compiled):
        m.new_student().double()
    new_cache = farmer.Transformer.new_cache
    monkeypatch.setattr(farmer.Transformer, "new_cache", lambda self, B, T, like: new_cache(self, B, T, like, static=True))
    torch._dynamo.reset()
    sample.compile_layers(compiled, torch.device("cuda"), backend="aot_eager", fullgraph=True)
    labels, options = torch.tensor([0, 1, 2]), Sampling(guidance=1.0)
    for method in ("exact", "parallel", "student"):
        a, b = (m.sample(labels, 1.0, torch.Generator().manual_seed(0), options, method=method) for m in (model, compiled))
        assert (a - b).abs().max() < 1e-9, method
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] < 8  # of 3 + 3 + 1 layers at 3 or 4 shapes
    torch._dynamo.reset()


@pytest.mark.parametrize("causal", [False, True])
def test_bf16_attention_on_a_cpu(causal):
    """Values and gradients against float64, within bf16's rounding; no bit of a later token reaches an earlier one."""
    qkv = torch.randn(3, 2, 2, 40, 16, dtype=torch.float64)

    def results(dtype):
        q, k, v = leaves = [t.to(dtype).requires_grad_() for t in qkv]
        out = farmer.attention(q, k, v, None, causal)
        return [out.double(), *(g.double() for g in torch.autograd.grad(out.square().sum(), leaves))]
    for exact, got in zip(results(torch.float64), results(torch.bfloat16), strict=True):
        assert (got - exact).abs().max() < 0.02 * exact.abs().max()
    q, k, v = qkv.bfloat16()
    before = farmer.attention(q, k, v, None, causal)
    k[:, :, 20:] += 1
    v[:, :, 20:] += 1
    changed = (farmer.attention(q, k, v, None, causal) != before).any((0, 1, 3))
    assert changed[20:].all() and changed[:20].any() != causal


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
        p = GMM(*(torch.stack(both).repeat_interleave(B, 0) for both in zip(P_C, P_U, strict=True)))
        out.append(resample_cfg(p, options, torch.rand(B, S), torch.randn(B, S, 1), torch.rand(B, 1)).flatten())
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
        return float((gmm_log_prob(Z[..., :5], *model.prior(Z[..., :5], labels)[0])
                      - gmm_log_prob(Z[..., :5], *model.prior(Z[..., :5], torch.full_like(labels, 3))[0])).mean())
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
    assert all(count(name) for name in PRESETS if not name.startswith("farmer-1"))


@pytest.mark.parametrize("field, value", [("image_size", 15), ("informative_dim", 49), ("informative_dim", 0), ("linear_map", "pca"), ("flow_width", 100),
                                          ("channels", 2), ("num_classes", -1), ("ar_layers", 0), ("patch_size", 2.0), ("class_tokens", True)])
def test_config_names_the_field_that_is_wrong(field, value):
    with pytest.raises(ValueError, match=field):
        Config(**{field: value})


def test_random_configs_are_refused_in_one_line_or_build():
    rng = np.random.default_rng(0)
    pool = [-1, 0, 1, 2, 3, 4, 8, 16, 32, 1.5, "a", None, True, math.nan, "whiten"]
    built = 0
    for _ in range(400):
        fields = rng.choice([f.name for f in dataclasses.fields(Config) if f.name != "sampling"], 2, replace=False)
        try:
            config = dataclasses.replace(SMALL, **{str(f): pool[rng.integers(len(pool))] for f in fields})
        except UserError as e:
            assert "\n" not in str(e) and any(f in str(e) for f in dataclasses.asdict(SMALL)), e
            continue
        if config.num_tokens <= 64 and config.channels * config.patch_size**2 <= 256:
            built += 1
            images = Farmer(config).sample(torch.zeros(1, dtype=torch.long))
            assert images.shape == (1, config.channels, config.image_size, config.image_size) and images.isfinite().all()
    assert built > 20


def test_sampling_refuses_what_is_not_a_number():
    for values in (dict(guidance=-1.0), dict(guidance=math.nan), dict(T_s=math.inf), dict(s_c=0), dict(T_sigma_v=0.0)):
        with pytest.raises(UserError, match=next(iter(values))):
            Sampling(**values)


# ---------------------------------------------------------------------------------------------------------------------- training
def weights(path: Path) -> dict:
    return torch.load(path / "ckpt.pt", weights_only=True)["weights"]


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def command(*argv, **env) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **env})


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """60 digits as a .npz: quicker to open than the built-in set is to draw."""
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    data = digits(60, 16, 3, seed=5)
    np.savez(path, images=data.array, labels=data.labels)
    return path


def test_resume_after_kill_is_the_same_run_to_the_bit(tmp_path, tiny_data):
    """Two undisturbed runs agree; so does one that is killed with -9 again and again, and one that is interrupted; the log has every line once."""
    flags = [*SMALL_FLAGS, "--data", str(tiny_data), "--steps", "40", "--save-every", "3"]
    undisturbed = command("train.py", "--out", tmp_path / "a", *flags, "--device", "cpu")  # as many threads as the others: rounding depends on it
    deadline, kills = time.time() + 100, 0
    while True:
        process = command("train.py", "--out", tmp_path / "b", "--resume", *flags, "--device", "cpu")
        if kills < 2:
            ready = tmp_path / "b" / "ckpt.pt"
            before = ready.stat().st_mtime_ns if ready.exists() else 0
            while process.poll() is None and (not ready.exists() or ready.stat().st_mtime_ns == before):
                time.sleep(0.01)  # until this process has saved something of its own
            time.sleep(0.03 * kills)
            process.kill()
            kills += 1
            process.wait()
            continue
        assert process.wait() == 0, process.stdout.read()
        break
    assert undisturbed.wait() == 0, undisturbed.stdout.read()
    assert time.time() < deadline and kills == 2
    assert same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))
    logs = [[{k: v for k, v in json.loads(line).items() if k not in ("images_per_s",)} for line in (tmp_path / r / "log.jsonl").open()] for r in "ab"]
    assert [r["step"] for r in logs[0]] == [r["step"] for r in logs[1]] and logs[0][-1]["lr"] == logs[1][-1]["lr"]


def test_a_signal_saves_before_leaving(tmp_path, tiny_data):
    flags = [*SMALL_FLAGS, "--data", str(tiny_data), "--steps", "100000", "--save-every", "100000", "--log-every", "1"]
    process = command("train.py", "--out", tmp_path / "a", *flags)
    while "step 3/" not in (line := process.stdout.readline()):
        assert process.poll() is None, line
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM and "--resume" in output
    assert torch.load(tmp_path / "a" / "ckpt.pt", weights_only=True)["extra"]["step"] >= 3


def test_uniform_run_reports_bits_and_a_non_finite_loss_keeps_the_checkpoint(tmp_path, tiny_data, capsys):
    flags = [*SMALL_FLAGS, "--data", str(tiny_data), "--noise", "uniform", "--save-every", "5", "--holdout", "2"]
    train.main(["--out", str(tmp_path / "a"), "--steps", "10", *flags])
    capsys.readouterr()
    train.main(["--eval", str(tmp_path / "a")])
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 20 and abs(result["bits_per_dim"] - (result["nats_per_dim"] / math.log(2) + 7)) < 1e-9
    diverge = ["--steps", "30", "--lr", "1e30", "--warmup", "0", "--guard", "0"]
    fails(capsys, train, ["--out", str(tmp_path / "b"), *diverge, *flags], "not finite", "informative", "ckpt.pt")
    assert all(w.isfinite().all() for w in weights(tmp_path / "b").values())


def test_data_that_fails_in_the_middle_of_a_run_costs_no_step(tmp_path, tiny_data, capsys, monkeypatch):
    def failing(*args, **kwargs):
        yield from itertools.islice(batches(*args, **kwargs), 7)
        raise UserError("the disk with the images went away")
    monkeypatch.setattr(train, "batches", failing)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "ckpt.pt123.tmp").write_bytes(b"of a killed save")
    with pytest.raises(UserError, match="went away.*holds step 7"):
        train.main(["--out", str(tmp_path / "a"), "--steps", "20", *SMALL_FLAGS, "--data", str(tiny_data)])
    assert farmer.load(tmp_path / "a")[1]["step"] == 7 and not list((tmp_path / "a").glob("*.tmp"))


def test_unconditional_run_from_a_flat_folder(tmp_path, capsys):
    data = digits(20, 16, 3, seed=5)
    (tmp_path / "flat").mkdir()
    for i, pixels_of in enumerate(data.array):
        Image.fromarray(pixels_of).save(tmp_path / "flat" / f"{i}.png")
    run = str(tmp_path / "run")
    train.main(["--out", run, "--steps", "6", *SMALL_FLAGS, "--data", str(tmp_path / "flat"), "--num-classes", "0", "--holdout", "5", "--clip", "0"])
    assert Image.open(tmp_path / "run" / "samples.png").size[0] > 100
    capsys.readouterr()
    train.main(["--eval", run, "--data", str(tmp_path / "run" / ".." / "flat")])  # the same folder by another name: still the held-out part
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 5 and abs(result["nats_per_dim"] - (result["informative"] + result["redundant"] - result["logdet"])) < 1e-6
    sample.main([run, "--num", "3", "--out", str(tmp_path / "x.npz")])
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert line["logdet_min"] <= line["logdet"] <= line["logdet_max"]


def test_the_guard_skips_and_counts_outliers(tmp_path, tiny_data, capsys):
    flags = ["--out", str(tmp_path / "a"), "--steps", "100", "--data", str(tiny_data), *SMALL_FLAGS]
    fails(capsys, train, [*flags, "--guard", "1e-6"], "20 steps in a row", "--lr")
    assert all(w.isfinite().all() for w in weights(tmp_path / "a").values())


def test_averaged_weights_are_what_is_saved_and_resume_exactly(tmp_path, tiny_data, monkeypatch):
    flags = [*SMALL_FLAGS, "--data", str(tiny_data), "--ema", "0.9", "--save-every", "6", "--keep", "2"]
    train.main(["--out", str(tmp_path / "a"), "--steps", "12", *flags])
    content = torch.load(tmp_path / "a" / "ckpt.pt", weights_only=True)
    name = "prior.embed.linear.weight"
    assert not torch.equal(content["weights"][name], content["extra"]["raw_weights"][name])
    assert sorted(p.name for p in (tmp_path / "a").glob("ckpt-*.pt")) == ["ckpt-12.pt", "ckpt-6.pt"]
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "ckpt-6.pt").rename(tmp_path / "b" / "ckpt.pt")
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError()))  # a file system without hard links
    train.main(["--out", str(tmp_path / "b"), "--resume", "--keep", "1"])
    assert same_weights(weights(tmp_path / "a"), weights(tmp_path / "b")) and farmer.load(tmp_path / "b" / "ckpt-12.pt")[1]["step"] == 12


@pytest.mark.parametrize("sharding", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_two_processes_are_the_same_run_as_one(tmp_path, tiny_data, sharding):
    """Same global batch: losses within 1e-5 over 20 steps, also with gradient accumulation; the checkpoint loads in a single process."""
    flags = [*SMALL_FLAGS, "--data", str(tiny_data), "--steps", "20", "--log-every", "1", "--warmup", "5", "--device", "cpu"]
    accumulate = ["--micro-batch", "2"] if not sharding else ["--checkpointing"]
    process = command("-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "train.py",
                      "--out", tmp_path / "two", *flags, *accumulate, *sharding)
    train.main(["--out", str(tmp_path / "one"), *flags])
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    losses = [[json.loads(line)["nats_per_dim"] for line in (tmp_path / r / "log.jsonl").open()] for r in ("one", "two")]
    assert len(losses[0]) == 20 and np.abs(np.subtract(*losses)).max() < 1e-5 and losses[0][0] - losses[0][-1] > 0.01
    one, _ = farmer.load(tmp_path / "one")
    two, _ = farmer.load(tmp_path / "two")
    a, b = (m.sample(torch.arange(4), generator=torch.Generator().manual_seed(0)) for m in (one, two))
    assert torch.allclose(a, b, atol=1e-2)
    train.main(["--out", str(tmp_path / "two"), "--resume"])  # its optimizer state loads, too


# ---------------------------------------------------------------------------------------------------------------------- distillation
def test_student(tmp_path, digits_run, capsys):
    """Distillation lowers the loss of the copy that it starts from; parallel and refined inverses equal the exact one; a foreign student is refused."""
    train.main(["--distill", str(digits_run), "--out", str(tmp_path / "s"), "--steps", "40", "--log-every", "10", "--sample-every", "0"])
    losses = [json.loads(line)["loss"] for line in (tmp_path / "s" / "log.jsonl").open()]
    assert losses[-1] < 0.9 * losses[0]
    model, extra = farmer.load(tmp_path / "s")
    teacher, _ = farmer.load(digits_run)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in teacher.state_dict().items())
    Z = model.sample_latents(torch.arange(40) % 10, Sampling(), torch.Generator().manual_seed(0))
    exact = model.decode(Z, "exact")
    with torch.no_grad():
        states, _ = model.flow.states(patchify(exact, 4))
        assert model.student(states, 0) < teacher.new_student()(states, 0)
    for method, tol in itertools.product(("parallel", "refined"), (1e-2, 1e-3, 1e-4)):
        assert (model.decode(Z, method, tol=tol) - exact).abs().max() < tol
    student = model.decode(Z, "student")
    assert torch.equal(model.decode(Z), student) and torch.equal(model.decode(Z, "refined", max_steps=0), student)  # the default; one end of the dial
    errors = [(model.decode(Z, "refined", tol=0, max_steps=k) - exact).abs().mean() for k in (0, 2, 6, 15)]
    assert errors[0] > errors[1] > errors[2] > errors[3] and errors[3] < 1e-5
    with pytest.raises(UserError, match="no student"):
        teacher.flow.inverse(Z, "student")
    content = torch.load(tmp_path / "s" / "ckpt.pt", weights_only=True)
    content["config"]["flow_layers"] = 2
    torch.save(content, tmp_path / "wrong.pt")
    with pytest.raises(UserError, match="config"):
        farmer.load(tmp_path / "wrong.pt")
    fails(capsys, train, ["--distill", str(tmp_path / "s"), "--out", str(tmp_path / "t")], "student already")
    fails(capsys, train, ["--distill", str(digits_run), "--out", str(tmp_path / "t"), "--flow-layers", "3"], "teacher")


def test_jacobi_survives_non_finite_values_and_stops_per_image():
    block = randomised().flow.blocks[0]
    z = torch.randn(3, 16, 12, dtype=torch.float64)
    exact = block.inverse(z)
    guess = z.clone()
    guess[1, 3:] = math.nan
    guess[2] = 1e200  # its square overflows
    x, steps = block.inverse_jacobi(z, guess, tol=1e-6)
    assert (x - exact).abs().max() < 1e-5 and (steps <= 15).all()
    x, steps = block.inverse_jacobi(z, torch.cat([exact[:1], z[1:]]), tol=1e-4)
    assert steps[0] == 1 and (steps[1:] > 1).all()


# ---------------------------------------------------------------------------------------------------------------------- bad input
def test_checkpoints_that_are_not(tmp_path, digits_run, capsys):
    good = (digits_run / "ckpt.pt").read_bytes()
    bad = tmp_path / "bad.pt"

    class Code:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "executed"),)
    content = torch.load(digits_run / "ckpt.pt", weights_only=True)
    for write in (lambda: bad.write_bytes(good[:len(good) // 2]), lambda: bad.write_bytes(b""), lambda: bad.write_bytes(os.urandom(1000)),
                  lambda: torch.save({"a": 1}, bad), lambda: torch.save(Code(), bad), lambda: torch.save({**content, "version": 99}, bad),
                  lambda: torch.save({**content, "config": {**content["config"], "flow_blocks": 9}}, bad),
                  lambda: torch.save({**content, "config": {**content["config"], "nonsense": 9}}, bad)):
        write()
        with pytest.raises(UserError, match="bad.pt"):
            farmer.load(bad)
    assert not (tmp_path / "executed").exists()
    farmer.save(bad, randomised(dtype=torch.float32), note="no run")
    fails(capsys, train, ["--eval", str(bad)], "no training run")
    with pytest.raises(UserError, match="no such checkpoint"):
        farmer.load(tmp_path)


def test_a_save_that_fails_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    model = randomised()
    path = tmp_path / "ckpt.pt"
    farmer.save(path, model, step=1)
    for error in (OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")):
        def full(content, f, error=error):
            f.write(b"half of it")
            raise error
        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(UserError, match="not saved"):
            farmer.save(path, model, step=2)
        assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"] and farmer.load(path)[1]["step"] == 1


def test_sample_py(tmp_path, digits_run, capsys):
    argv = [str(digits_run), "--out", str(tmp_path / "x.png")]
    sample.main([*argv, "--num", "6", "--labels", "3,7"])
    assert Image.open(tmp_path / "x.png").size[0] > 100
    options = ["--guidance", "1", "--T-sigma", "0.9", "--inverse", "parallel"]
    sample.main([str(digits_run), "--num", "5", "--labels", "3,7", "--out", str(tmp_path / "x.npz"), *options])
    with np.load(tmp_path / "x.npz") as f:
        assert f["images"].shape == (5, 16, 16, 3) and f["images"].dtype == np.uint8 and f["labels"].tolist() == [3, 7, 3, 7, 3]


@pytest.mark.parametrize("extra, word", [("--num 0", "--num"), ("--guidance -1", "guidance"), ("--guidance nan", "guidance"), ("--labels 3,11", "11"),
                                         ("--labels a", "--labels"), ("--out x.gif", "x.gif"), ("--out /nonexistent/x.png", "nonexistent"),
                                         ("--inverse student", "student"), ("--T-sigma-v 0", "T_sigma_v"), ("--nonsense 1", "nonsense"),
                                         ("--guid 1", "guid"), ("--seed -1", "seed"), ("--batch-size 0", "batch-size")])
def test_sample_py_refuses(tmp_path, digits_run, capsys, extra, word):
    fails(capsys, sample, [str(digits_run), "--out", str(tmp_path / "x.png"), *extra.split()], word)
    fails(capsys, sample, [str(tmp_path)], "ckpt.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("extra, words", [
    ("--data /nonexistent", "/nonexistent"), ("--patch-size 5", "patch_size"), ("--informative-dim 99", "informative_dim"), ("--lr nan", "lr"),
    ("--steps 0", "steps"), ("--batch-size 0", "batch_size"), ("--noise pink", "pink"), ("--nonsense 1", "nonsense"), ("--label-drop 1", "label_drop"),
    ("--data DATA --num-classes 5", "num_classes"), ("--data DATA --image-size 32", "16"), ("--fsdp", "torchrun"), ("--micro-batch 7", "batch_size"),
    ("--data DATA --holdout 6", "hold out"), ("--out /proc/x", "/proc/x"), ("--out RUN", "already holds --resume"), ("--seed -1", "seed"),
    ("--out RUN --resume --flow-blocks 3", "flow_blocks 2 3"), ("--out RUN --resume --lr 1", "lr"), ("--eval NEW", "checkpoint"),
    ("--save-every 0", "--save-every"), ("--workers -1", "--workers"), ("--seed 99999999999999999999999", "seed"), ("--num-classes 5", "num_classes"),
    ("--eval RUN --flow-blocks 7", "flow_blocks"), ("--eval RUN --seed 3", "seed"),
    ("--eval RUN --distill x", "one")])
def test_train_py_refuses(tmp_path, digits_run, tiny_data, capsys, extra, words):
    new = tmp_path / "new"
    places = {"DATA": str(tiny_data), "RUN": str(digits_run), "NEW": str(new)}
    before = (digits_run / "ckpt.pt").read_bytes()
    fails(capsys, train, ["--out", str(new), *(places.get(word, word) for word in extra.split())], *words.split())
    assert (not new.exists() or not list(new.iterdir())) and (digits_run / "ckpt.pt").read_bytes() == before


def test_a_set_with_many_broken_images_is_refused(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    for i in range(6):
        Image.new("RGB", (16, 16)).save(tmp_path / "a" / f"{i}.png")
    for i in range(3, 6):
        (tmp_path / "a" / f"{i}.png").write_bytes(b"")
    with pytest.raises(SystemExit):
        sample.run(train.main, ["--out", str(tmp_path / "new"), "--data", str(tmp_path), *SMALL_FLAGS])
    assert "more than 1%" in capsys.readouterr().err


def test_dry_run_prints_sizes_and_stops(tmp_path, capsys):
    train.main(["--preset", "farmer-1.1b-p16", "--dry-run", "--out", str(tmp_path / "x")])
    out = capsys.readouterr().out
    assert "flow 843.8M" in out and "GFLOP" in out and not (tmp_path / "x").exists()


def test_every_script_explains_itself(capsys):
    for script in (train, sample, fid, classifier):
        with pytest.raises(SystemExit) as e:
            script.main(["--help"])
        assert e.value.code == 0 and "--seed" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------- images and batches
def picture(seed, w=10, h=8, mode="RGB"):
    """A smooth picture, different for each seed."""
    y, x = np.mgrid[:h, :w]
    rgb = np.stack([128 + 100 * np.sin(seed + x / 3), 128 + 100 * np.cos(seed * 2 + y / 4), 20 * (seed % 12) + x + y], -1)
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """Two classes of 6 and 5 images 8 x 8, one of them a level deeper, with files to ignore."""
    root = tmp_path / "set"
    for i in range(11):
        path = root / ("ape" if i < 6 else "bee") / ("deep" if i == 3 else "") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, 8, 8).save(path)
    (root / "ape" / ".hidden.png").write_bytes(b"no image")
    (root / "__MACOSX").mkdir()
    (root / "__MACOSX" / "x.png").write_bytes(b"no image")
    (root / "ape" / "notes.txt").write_text("no image")
    return root


def zip_of(root, path, prefix=""):
    with zipfile.ZipFile(path, "w") as file:
        for name in sorted(root.rglob("*"), reverse=True):  # the order in the file must not matter
            if name.is_file():
                file.write(name, prefix + name.relative_to(root).as_posix())
    return path


def pixels(images, size=8, channels=3):
    return ImageDataset(images, size, channels).batch(range(len(images)))[0].numpy()


def message(call, *args, **kwargs):
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_data_folder_zip_npz_hold_the_same(folder, tmp_path, monkeypatch):
    images = open_images(str(folder))
    assert images.names[:4] == ["ape/00.png", "ape/01.png", "ape/02.png", "ape/04.png"] and images.names[5] == "ape/deep/03.png"
    assert images.classes == ["ape", "bee"] and images.labels.tolist() == [0] * 6 + [1] * 5 and images.labels.dtype == np.int64
    expected = np.stack([np.asarray(Image.open(folder / name)) for name in images.names])
    for prefix in ("", "train/"):
        zipped = open_images(str(zip_of(folder, tmp_path / "set.zip", prefix)))
        assert [prefix + name for name in images.names] == zipped.names and zipped.classes == images.classes
        np.testing.assert_array_equal(zipped.labels, images.labels)
        np.testing.assert_array_equal(pixels(zipped), expected.transpose(0, 3, 1, 2))
    np.savez(tmp_path / "set.npz", images=expected, labels=images.labels.astype(np.uint8))
    np.savez(tmp_path / "adm.npz", expected, images.labels)
    for name in ("set.npz", "adm.npz"):
        packed = open_images(str(tmp_path / name))
        np.testing.assert_array_equal(packed.labels, images.labels)
        np.testing.assert_array_equal(pixels(packed), pixels(images))
    monkeypatch.setattr(images_module, "MAP_FROM", 1)  # large and not compressed: stays on disk, in a worker too
    np.savez_compressed(tmp_path / "small.npz", images=expected, labels=images.labels)
    np.savez(tmp_path / "turned.npz", images=np.asfortranarray(expected), labels=images.labels)
    for name, mapped in (("set.npz", True), ("adm.npz", True), ("small.npz", False), ("turned.npz", False)):
        for packed in (opened := open_images(str(tmp_path / name)), pickle.loads(pickle.dumps(opened))):
            assert isinstance(packed.array, np.memmap) == mapped, name
            np.testing.assert_array_equal(pixels(packed), pixels(images))
    np.testing.assert_array_equal(images[2], expected[2])
    item, label = ImageDataset(images, 8, 3)[7]
    np.testing.assert_array_equal(item, expected[7].transpose(2, 0, 1))
    assert label == 1


def test_data_flat_sets_have_no_labels(folder, tmp_path):
    flat = open_images(str(folder / "bee"))
    assert len(flat) == 5 and flat.labels is None and flat.classes is None and ImageDataset(flat, 8, 3)[0][1] == 0
    for prefix in ("", "bee/"):
        zipped = open_images(str(zip_of(folder / "bee", tmp_path / "flat.zip", prefix)))
        assert zipped.labels is None and len(zipped) == 5
    picture(0).save(folder / "stray.png")
    assert "stray.png" in message(open_images, str(folder))


def test_data_modes_become_right_rgb(tmp_path):
    def read(image, name, **options):
        image.save(tmp_path / name, **options)
        return Images(str(tmp_path), [name]).read(0).astype(int)

    rgb, grey = np.asarray(picture(3)).astype(int), np.asarray(picture(3, mode="L")).astype(int)
    np.testing.assert_array_equal(read(picture(3), "rgb.png"), rgb)
    np.testing.assert_array_equal(read(picture(3, mode="L"), "grey.png"), grey[..., None].repeat(3, -1))
    palette = picture(3).quantize(16)
    np.testing.assert_array_equal(read(palette, "palette.png"), np.asarray(palette.convert("RGB")))
    index = np.asarray(palette)
    seen = np.where((index == 5)[..., None], 255, np.asarray(palette.convert("RGB")))
    assert (index == 5).any()
    np.testing.assert_array_equal(read(palette, "holes.png", transparency=5), seen)
    clear = picture(3).convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(np.arange(10) < 5, 0, 255).astype(np.uint8)[None].repeat(8, 0)))
    np.testing.assert_array_equal(read(clear, "rgba.png"), np.where((np.arange(10) < 5)[None, :, None], 255, rgb))
    np.testing.assert_array_equal(read(clear.convert("LA"), "la.png")[:, :5], 255)
    wide = (np.arange(80).reshape(8, 10) * 800).astype(np.uint16)  # to 63,200
    for name in ("wide.png", "wide.tif", "wide.pgm"):
        np.testing.assert_array_equal(read(Image.fromarray(wide), name), (wide // 256)[..., None].repeat(3, -1))
    bits = picture(3, mode="1")
    np.testing.assert_array_equal(read(bits, "bits.png")[..., 1], np.asarray(bits) * 255)
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert abs(read(red, "cmyk.jpg", quality=95) - [255, 0, 0]).max() < 12
    turned = Image.Exif()
    turned[274] = 6  # the camera was held on its side
    np.testing.assert_array_equal(read(picture(3), "turned.png", exif=turned), np.rot90(rgb, -1))
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "float.tif")
    assert "float.tif" in message(Images(str(tmp_path), ["float.tif"]).read, 0)
    np.testing.assert_array_equal(Images(str(tmp_path), ["grey.png"]).read(0, 8, 1)[..., 0], grey[:, 1:9])


def bicubic_weights(n_in, n_out):
    """(n_out, n_in) matrix of an antialiased bicubic (a = -1/2) reduction, written from the kernel's formula."""
    scale = n_in / n_out
    x = np.abs((np.arange(n_in)[None] + 0.5 - (np.arange(n_out)[:, None] + 0.5) * scale) / scale)
    w = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
    return w / w.sum(1, keepdims=True)


@pytest.mark.parametrize("w, h", [(100, 72), (70, 150), (41, 33), (64, 64), (32, 90)])
def test_data_crop_is_adms(w, h):
    noise = np.random.default_rng(0).integers(0, 60, (h, w))  # so that the filters differ
    image = Image.fromarray((60 + np.arange(w) + 0.3 * np.arange(h)[:, None] + noise).clip(0, 210).astype(np.uint8))
    a = np.asarray(image).astype(float)
    while min(a.shape) >= 64:  # halve with a 2 x 2 mean
        a = a[: a.shape[0] // 2 * 2, : a.shape[1] // 2 * 2]
        a = (a[::2, ::2] + a[1::2, ::2] + a[::2, 1::2] + a[1::2, 1::2]) / 4
    rows, columns = (round(n * 32 / min(a.shape)) for n in a.shape)
    a = bicubic_weights(a.shape[0], rows) @ a @ bicubic_weights(a.shape[1], columns).T
    top, left = (rows - 32) // 2, (columns - 32) // 2
    crop = center_crop(image, 32)
    assert crop.size == (32, 32)
    assert np.abs(np.asarray(crop) - a[top : top + 32, left : left + 32].clip(0, 255)).max() <= 2


def test_data_crop_small_images(tmp_path):
    exact = picture(0, 16, 16)
    assert center_crop(exact, 16) is exact
    assert center_crop(picture(0, 10, 8), 16, enlarge=True).size == (16, 16)
    picture(0, 30, 12).save(tmp_path / "small.png")
    text = message(open_images(str(tmp_path)).read, 0, 16)
    assert "small.png" in text and "30x12" in text and "16" in text
    assert open_images(str(tmp_path), enlarge=True).read(0, 16).shape == (16, 16, 3)
    np.savez(tmp_path / "small.npz", images=np.zeros((3, 8, 8), np.uint8))
    assert "8x8" in message(ImageDataset, open_images(str(tmp_path / "small.npz")), 16, 3)


def test_data_jpeg_draft_is_close_and_used(tmp_path, monkeypatch):
    picture(2, 640, 400).save(tmp_path / "a.jpg", quality=95)
    images = open_images(str(tmp_path))
    sizes = []
    monkeypatch.setattr(images_module, "to_rgb", lambda image, to_rgb=images_module.to_rgb: sizes.append(image.size) or to_rgb(image))
    fast = images.read(0, 32).astype(int)
    whole = np.asarray(center_crop(Image.open(tmp_path / "a.jpg"), 32)).astype(int)
    assert sizes == [(160, 100)]  # 1/4: at 1/8 the short side, 50, would be below 2 * 32
    assert abs(fast - whole).max() <= 6 and abs(fast - whole).mean() < 1


def spoil(folder):
    """Break 3 of the 11 images in 3 ways."""
    path = folder / "ape" / "01.png"
    path.write_bytes(path.read_bytes()[:-60])
    (folder / "ape" / "04.png").write_bytes(b"")
    (folder / "bee" / "08.png").unlink()


def test_data_broken_images_are_named_and_replaced(folder, capfd):
    for i in range(200):
        picture(i, 8, 8).save(folder / "bee" / f"more{i:03}.png")
    images = open_images(str(folder))
    good = pixels(images)
    (folder / "ape" / "02.png").write_bytes(b"")
    (folder / "bee" / "more199.png").write_bytes((folder / "bee" / "more199.png").read_bytes()[:80])
    dataset = ImageDataset(images, 8, 3)
    for _ in range(2):
        np.testing.assert_array_equal(dataset[2][0], good[3])
        np.testing.assert_array_equal(dataset[210][0], good[0])
    np.testing.assert_array_equal(dataset.batch([1, 2, 9])[0], good[[1, 9, 9]])  # the stand-in comes from the given indices
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and "ape/02.png" in lines[0] and "(1 of 211)" in lines[0] and "more199.png" in lines[1]
    (folder / "ape" / "00.png").unlink()
    text = message(dataset.batch, range(10))  # a third: 1.4%
    assert "ape/00.png" in text and "3 of 211" in text and "1%" in text


def test_data_one_broken_image_is_always_allowed(folder):
    (folder / "ape" / "04.png").write_bytes(b"")
    assert len(pixels(open_images(str(folder)))) == 11
    spoil(folder)
    assert "2 of 10" in message(pixels, open_images(str(folder)))
    (folder / "bee" / "08.png").write_bytes(b"")
    text = message(ImageDataset(open_images(str(folder)), 8, 3).batch, [8])
    assert "none of 1" in text


def test_data_check_looks_ahead(folder, capfd):
    images = open_images(str(folder))
    assert check_images(images, 8) == []
    (folder / "bee" / "08.png").unlink()
    assert len(check_images(images, 8)) == 1 and "bee/08.png" in capfd.readouterr().err
    assert check_images(images, 8, limit=2) == []
    picture(8, 8, 8).save(folder / "bee" / "08.png")
    raw = bytearray((folder / "bee" / "08.png").read_bytes())
    raw[60] ^= 1  # the header is whole, a checksum is not
    (folder / "bee" / "08.png").write_bytes(raw)
    assert len(check_images(images, 8)) == 1
    assert "2 of 11" in message(check_images, images, 16)  # all are 8 x 8


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".tif"])
def test_data_random_bytes_are_one_line(tmp_path, suffix):
    rng = np.random.default_rng(0)
    picture(1, 24, 20).save(tmp_path / f"a{suffix}")
    whole = (tmp_path / f"a{suffix}").read_bytes()
    images = open_images(str(tmp_path))
    for _ in range(40):
        raw = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for k in rng.integers(0, len(raw), 3):
            raw[k] = rng.integers(256)
        (tmp_path / f"a{suffix}").write_bytes(raw)
        try:
            assert images.read(0, 16).shape == (16, 16, 3)
        except UserError as error:
            assert f"a{suffix}" in str(error) and "\n" not in str(error)


def test_data_names_of_any_kind(tmp_path):
    (tmp_path / "two\nlines.png").write_bytes(b"")
    picture(1).save(os.fsencode(tmp_path) + b"/latin\xe4.png")
    images = open_images(str(tmp_path))
    assert images.read(0).shape == (8, 10, 3) and "two lines.png" in message(images.read, 1)


def test_data_zip_handle_is_of_one_process(folder, tmp_path, monkeypatch):
    images = open_images(str(zip_of(folder, tmp_path / "set.zip")))
    images.read(0)
    parent = images.zip[1]
    images.read(1)
    assert images.zip[1] is parent and pickle.loads(pickle.dumps(images)).zip is None
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as after a fork
    images.read(0)
    assert images.zip[1] is not parent


def test_data_decompression_bomb_is_refused(tmp_path, monkeypatch):
    picture(0, 100, 100).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    assert "a.png" in message(open_images(str(tmp_path)).read, 0, 16)


def test_data_bad_sources(tmp_path):
    def npz(**arrays):
        np.savez(tmp_path / "bad.npz", **arrays)
        return message(open_images, str(tmp_path / "bad.npz"))

    good = np.zeros((4, 8, 8, 3), np.uint8)
    assert "does not exist" in message(open_images, str(tmp_path / "nowhere"))
    assert "no images" in message(open_images, str(tmp_path))
    (tmp_path / "not.zip").write_bytes(b"PK nothing")
    (tmp_path / "not.npz").write_bytes(b"nothing")
    (tmp_path / "not.tar").write_bytes(b"nothing")
    for name in ("not.zip", "not.npz", "not.tar"):
        assert name in message(open_images, str(tmp_path / name))
    assert "expected" in npz(pictures=good)
    assert "float32 (4, 8, 8, 3) with 768 values that are not finite" in npz(images=np.full((4, 8, 8, 3), np.nan, np.float32))
    assert "finite" not in npz(images=np.zeros((4, 8, 8, 3), np.float32))
    for shape in ((8, 8), (4, 8, 8, 4), (0, 8, 8, 3), (4, 3, 8, 8, 1)):
        assert str(shape) in npz(images=np.zeros(shape, np.uint8))

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "code has run"),)

    npz(images=np.array([Code(), None], dtype=object))
    assert not (tmp_path / "code has run").exists()
    for labels in (np.zeros(3, int), np.array([0, 1, -1, 2]), np.zeros(4), np.zeros((4, 1), int)):
        assert "labels" in npz(images=good, labels=labels)
    np.savez(tmp_path / "grey.npz", images=good[..., 0])
    assert pixels(open_images(str(tmp_path / "grey.npz"))).shape == (4, 3, 8, 8)


def test_data_index_of_large_folders(folder, tmp_path, monkeypatch):
    def listed():
        return len(open_images(str(folder)))

    monkeypatch.setattr(images_module, "INDEX_FROM", 5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert listed() == 11 and not (tmp_path / "cache").exists()  # changed a moment ago, it may change again unseen
    old = time.time() - 100
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (old, old))
    assert listed() == 11
    (index,) = (tmp_path / "cache" / "farmer").iterdir()
    known = json.loads(index.read_text())
    index.write_text(json.dumps(known | {"names": known["names"][:-1]}))
    assert listed() == 10  # it is what is read
    picture(5).save(folder / "ape" / "deep" / "new.png")
    assert listed() == 12  # stale
    for junk in ("", "[1]", '{"root": 3}', json.dumps({"root": str(folder), "folders": [], "names": 4})):
        index.write_text(junk)
        assert listed() == 12
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "ape" / "00.png"))  # cannot be written
    os.utime(folder / "ape" / "deep", (old, old))
    assert listed() == 12


def test_data_hold_out():
    labels = np.array([1, 0, 1, 0, 1, 0, 3, 1, 3])
    images = Images("x", [str(i) for i in range(9)], labels)
    train, val = hold_out(images, 1)
    assert val.tolist() == [5, 7, 8] and train.tolist() == [0, 1, 2, 3, 4, 6]
    assert [part.tolist() for part in hold_out(images, 0)] == [list(range(9)), []]
    assert hold_out(Images("x", list("abcdef")), 2)[1].tolist() == [4, 5]
    assert "class 3 has 2" in message(hold_out, images, 2)
    message(hold_out, images, -1)
    message(hold_out, Images("x", ["a"]), 1)


def take(dataset, indices, n, **options):
    stream = batches(dataset, indices, **({"global_batch": 8, "start_step": 0, "seed": 3, "workers": 0, "flip": True} | options))
    got = list(itertools.islice(stream, n))
    stream.close()
    return [[t.numpy() for t in batch] for batch in got]


def same(a, b):
    for batch_a, batch_b in zip(a, b, strict=True):
        for x, y in zip(batch_a, batch_b, strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


def test_data_batches_depend_on_the_step_alone(folder, tmp_path):
    dataset, indices = ImageDataset(open_images(str(zip_of(folder, tmp_path / "set.zip"))), 8, 3), np.array([0, 1, 2, 3, 4, 6, 7, 8, 9, 10])
    whole = take(dataset, indices, 7)
    assert whole[0][0].shape == (8, 3, 8, 8) and whole[0][0].dtype == np.uint8 and whole[0][1].dtype == whole[0][2].dtype == np.int64
    same(take(dataset, indices, 7, workers=2), whole)
    same(take(dataset, indices, 4, workers=1, start_step=3), whole[3:])
    for world in (2, 4):
        parts = [take(dataset, indices, 7, rank=r, world=world) for r in range(world)]
        same([[np.concatenate(x) for x in zip(*ranks, strict=True)] for ranks in zip(*parts, strict=True)], whole)
    np.testing.assert_array_equal(np.concatenate([uid for _, _, uid in whole]), np.arange(56))
    # epoch by epoch each image once, in another order each time, other for another seed
    plain, labels = np.concatenate([x for x, _, _ in take(dataset, indices, 7, flip=False)]), np.concatenate([y for _, y, _ in whole])
    images, truth = dataset.batch(indices)
    key = {images[i].numpy().tobytes(): i for i in range(10)}
    order = [key[x.tobytes()] for x in plain]
    assert all(sorted(order[e : e + 10]) == list(range(10)) for e in range(0, 50, 10)) and order[:10] != order[10:20]
    np.testing.assert_array_equal(labels, truth[order])
    assert not np.array_equal(plain, np.concatenate([x for x, _, _ in take(dataset, indices, 7, flip=False, seed=4)]))
    assert "batch" in message(take, dataset, indices, 1, world=3) and "no images" in message(take, dataset, [], 1)


def test_data_flips_half_of_the_samples_by_seed_and_number(folder):
    dataset = ImageDataset(open_images(str(folder)), 8, 3)

    def flipped(n=40, **options):
        plain, maybe = (np.concatenate([x for x, _, _ in take(dataset, np.arange(11), n, flip=flip, **options)]) for flip in (False, True))
        mirrored = [np.array_equal(a[..., ::-1], b) for a, b in zip(plain, maybe, strict=True)]
        assert all(m or np.array_equal(a, b) for m, a, b in zip(mirrored, plain, maybe, strict=True))
        return mirrored

    coins = flipped()
    assert 120 < sum(coins) < 200 and coins == flipped() == flipped(80, global_batch=4)
    assert coins != flipped(seed=4) and coins[:11] != coins[11:22]


def test_data_array_path_equals_file_path(folder, tmp_path, monkeypatch):
    files = ImageDataset(open_images(str(folder)), 8, 3)
    np.savez(tmp_path / "a.npz", images=files.batch(range(11))[0].permute(0, 2, 3, 1).numpy(), labels=files.images.labels)
    arrays = ImageDataset(open_images(str(tmp_path / "a.npz")), 8, 3)
    assert arrays.ready
    same(take(arrays, np.arange(11), 5), take(files, np.arange(11), 5))
    same(take(pickle.loads(pickle.dumps(files)), np.arange(11), 5), take(files, np.arange(11), 5))
    monkeypatch.setattr(images_module, "in_workers", lambda work, todo, workers: iter([UserError(f"workers {workers}")]))
    assert "workers 0" in message(take, arrays, np.arange(11), 1, workers=2) and "workers 2" in message(take, files, np.arange(11), 1, workers=2)
    monkeypatch.undo()
    before = arrays.images.array.copy()
    take(arrays, np.arange(11), 5)
    np.testing.assert_array_equal(arrays.images.array, before)


def test_data_a_dead_or_failing_worker_is_one_line(folder):
    dataset = ImageDataset(open_images(str(folder)), 8, 3)
    stream = batches(dataset, np.arange(11), global_batch=4, start_step=0, seed=0, workers=2)
    next(stream), next(stream)  # one of each worker: both are up
    worker = multiprocessing.active_children()[0]
    os.kill(worker.pid, signal.SIGINT)
    os.kill(worker.pid, signal.SIGTERM)  # as a whole process group gets them: workers stay
    for _ in range(8):
        next(stream)
    assert worker.is_alive()
    os.kill(worker.pid, signal.SIGKILL)
    start = time.monotonic()
    assert "worker" in message(lambda: [next(stream) for _ in range(100)]) and time.monotonic() - start < 12
    assert not multiprocessing.active_children()
    spoil(folder)
    stream = batches(dataset, np.arange(11), global_batch=11, start_step=0, seed=0, workers=1)
    assert "more than 1%" in message(next, stream)


def test_data_cache(folder, tmp_path, capfd, monkeypatch):
    images, where = open_images(str(folder)), str(tmp_path / "cache")
    (folder / "ape" / "04.png").write_bytes(b"")
    keep = [i for i in range(11) if images.names[i] != "ape/04.png"]
    expected = np.stack([images.read(i, 8, 1) for i in keep])
    cached = cache_images(images, 8, 1, where, workers=1)
    assert "ape/04.png" in capfd.readouterr().err
    for copy in (cached, pickle.loads(pickle.dumps(cached))):
        assert str(copy.array.filename).endswith("images.npy")  # mapped, not copied
        np.testing.assert_array_equal(copy.array, expected)
        np.testing.assert_array_equal(copy.labels, images.labels[keep])
    assert cached.classes == images.classes
    assert ImageDataset(cached, 8, 1).ready
    # used again without a look at the files
    monkeypatch.setattr(Images, "read", None)
    np.testing.assert_array_equal(cache_images(images, 8, 1, where).array, expected)
    monkeypatch.undo()
    assert "image_size 8 instead of 4" in message(cache_images, images, 4, 1, where)
    assert "channels" in message(cache_images, images, 8, 3, where)
    assert "set.zip" in message(cache_images, open_images(str(zip_of(folder, tmp_path / "set.zip"))), 8, 1, where)
    size = os.path.getsize(where + "/images.npy")
    os.truncate(where + "/images.npy", size - 9)
    assert "damaged" in message(cache_images, images, 8, 1, where)
    (tmp_path / "cache" / "meta.json").write_text("{")
    assert "damaged" in message(cache_images, images, 8, 1, where)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in message(cache_images, images, 8, 1, str(tmp_path / "file"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))  # as a full disk: writes fail half-way
    try:
        assert "cannot be written" in message(cache_images, images, 8, 1, str(tmp_path / "full"), workers=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path / "full") == []


def test_data_a_killed_cache_build_is_done_again(folder, tmp_path, monkeypatch):
    images, where = open_images(str(folder)), str(tmp_path / "cache")

    def killed(*args):
        raise KeyboardInterrupt

    for name in ("_write_json", "_report_broken"):
        with monkeypatch.context() as patch:
            patch.setattr(images_module, name, killed)
            if name == "_report_broken":
                (folder / "bee" / "08.png").unlink()
            with pytest.raises(KeyboardInterrupt):
                cache_images(images, 8, 3, where, workers=0)
        assert not os.path.exists(where + "/meta.json")
    assert len(cache_images(images, 8, 3, where, workers=0)) == 10
    (folder / "bee" / "09.png").unlink()
    assert "more than 1%" in message(cache_images, images, 8, 3, str(tmp_path / "other"), workers=0)
    assert len(cache_images(images, 8, 3, where, workers=0)) == 10


# ---------------------------------------------------------------------------------------------------------------------- FID, IS, precision and recall
def fid_images(n, size=4, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (n, size, size, 3)).astype("uint8")


def fid_folder(path, images):
    for i, image in enumerate(images):
        (path / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path / f"{i % 2}" / f"{i:03d}.png")
    return str(path)


def fid_npz(path, images, **arrays):
    np.savez(path, images=images, **arrays)
    return str(path)


class FidPixels(torch.nn.Module):
    """The first 8 pixel values as features: exact, whatever the batch."""

    def forward(self, x: torch.Tensor):
        return x.view(x.size(0), 3 * x.size(2) * x.size(3))[:, :8]


class FidBroken(torch.nn.Module):
    """Not finite where the first pixel is white."""

    def forward(self, x: torch.Tensor):
        return 1 / (1 - x.flatten(1)[:, :8])


def fid_features(tmp_path, module=None):
    torch.jit.trace(module or FidPixels(), torch.zeros(2, 3, 4, 4), check_trace=False).save(str(tmp_path / "f.pt"))
    return ["--features", str(tmp_path / "f.pt"), "--workers", "0"]


def fid_run(capsys, *argv):
    fid.main([str(a) for a in argv])
    return capsys.readouterr()


def fid_fails(capsys, *argv):
    """The one line of an error that leaves with exit code 2 and prints nothing else (but progress, on a machine so slow that it comes up)."""
    with pytest.raises(SystemExit) as leave:
        fid.main([str(a) for a in argv])
    out = capsys.readouterr()
    lines = [line for line in out.err.splitlines() if not line.endswith(" left")]
    assert leave.value.code == 2 and out.out == "" and len(lines) == 1 and lines[0].startswith("fid.py: error: "), out
    return lines[0]


# ---------------------------------------------------------------- the metrics in closed form
def test_fid_closed_form_of_two_gaussians():
    r = np.random.RandomState(0)
    Q, _ = np.linalg.qr(r.standard_normal((64, 64)))
    a, b = r.uniform(0.1, 9, 64), r.uniform(0.1, 9, 64)
    mu = r.standard_normal(64)
    got = fid.frechet_distance(mu, Q * a @ Q.T, 0 * mu, Q * b @ Q.T)  # commuting: sum (sqrt a - sqrt b)^2
    assert abs(got - (mu @ mu + ((a**0.5 - b**0.5) ** 2).sum())) < 1e-6
    S1, S2 = np.array([[2.0, 0.6], [0.6, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])  # 2x2: Tr sqrt(M) = sqrt(Tr M + 2 sqrt(det M))
    M = S1 @ S2
    expected = 25 + np.trace(S1 + S2) - 2 * np.sqrt(np.trace(M) + 2 * np.sqrt(np.linalg.det(M)))
    assert abs(fid.frechet_distance(np.array([3.0, 0]), S1, np.array([0.0, 4]), S2) - expected) < 1e-6


def test_fid_of_identical_and_rank_deficient_sets():
    x = np.random.RandomState(0).standard_normal((20, 300)) * 10  # rank 19 of 300
    mu, sigma = x.mean(0), np.cov(x.T)
    assert abs(fid.frechet_distance(mu, sigma, mu, sigma)) < 1e-6
    left, right = np.diag([4.0, 1, 0, 0]), np.diag([0.0, 0, 9, 1])  # no shared direction: the cross term is 0
    assert abs(fid.frechet_distance(np.zeros(4), left, np.ones(4), right) - (4 + 5 + 10)) < 1e-12
    assert abs(fid.frechet_distance(np.zeros(4), left, np.zeros(4), np.diag([1.0, 0, 0, 0])) - (5 + 1 - 2 * 2)) < 1e-12
    assert abs(fid.frechet_distance(np.zeros(4), left, np.zeros(4), np.zeros((4, 4))) - 5) < 1e-12
    low = np.random.RandomState(1).standard_normal((300, 5))
    assert abs(fid.frechet_distance(mu, low @ low.T, mu, 4 * low @ low.T) - np.trace(low @ low.T)) < 1e-6
    with pytest.raises(UserError, match="eigenvalues from -1 to 2"):
        fid.frechet_distance(np.zeros(2), np.diag([2.0, -1]), np.zeros(2), np.eye(2))


def test_fid_streaming_statistics_equal_numpy_in_any_pieces():
    x = np.random.RandomState(0).standard_normal((1500, 12)).astype("float32") + 1000  # the offset would cost sum(x^2) - n mean^2 its digits
    results = []
    for piece in (1, 7, 512, 1500):
        moments = fid.Moments(12)
        for i in range(0, len(x), piece):
            moments.add(x[i:i + piece])
        results.append(moments.result())
    for mu, sigma in results:
        assert np.abs(mu - x.astype(float).mean(0)).max() < 1e-10 and np.abs(sigma - np.cov(x.T.astype(float))).max() < 1e-10
        assert (mu == results[0][0]).all() and (sigma == results[0][1]).all()


def test_fid_inception_score_of_known_predictions():
    one_hot = 1e4 * torch.eye(7).repeat(30, 1)  # every tenth of the 210 holds each class 3 times
    mean, std = fid.inception_score(one_hot)
    assert abs(mean - 7) < 1e-9 and std < 1e-9
    assert fid.inception_score(torch.zeros(50, 7)) == (1.0, 0.0)
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)  # by the definition
    kl = (p * (p / p.mean(0)).log()).sum(1).mean()
    assert abs(fid.inception_score(p.log().repeat(10, 1))[0] - kl.exp()) < 1e-12
    halves = torch.cat([1e4 * torch.eye(2).repeat(5, 1), torch.zeros(10, 2)])
    assert np.allclose(fid.inception_score(halves, splits=2), (1.5, 0.5))


def test_fid_class_sorted_samples_are_shuffled_for_the_inception_score(monkeypatch):
    class OneHot:
        name = fid.Inception.name

        def __call__(self, images):
            return 1e4 * torch.eye(10)[images[:, 0, 0, 0].long()]

        def logits(self, pool):
            return pool

    labels = torch.arange(10).repeat_interleave(100)  # sorted: any tenth of them is one class
    batches = (part.view(-1, 1, 1, 1) for part in labels.split(33))
    side = fid.extract(batches, 1000, OneHot(), "sorted", torch.device("cpu"))
    expected = labels[np.random.RandomState(2020).permutation(1000)]  # torch-fidelity's order
    assert (side.pool.argmax(1) == expected).all() and side.num == 1000
    assert 8.5 < fid.score(side, features=OneHot())["inception_score"] < 10
    monkeypatch.setattr(fid, "KEPT", 300)  # of a larger set: all of it in the statistics, a random part in the rest
    part = fid.extract((part.view(-1, 1, 1, 1) for part in labels.split(33)), 1000, OneHot(), "sorted", torch.device("cpu"))
    assert (part.pool == side.pool[:300]).all() and (part.sigma == side.sigma).all() and part.num == 1000


def test_fid_precision_and_recall_of_toy_sets():
    line = lambda *x: torch.tensor(x, dtype=torch.float32)[:, None]  # noqa: E731
    reference = line(0, 1, 2, 3)  # third neighbours at 3, 2, 2, 3: the manifold is [-3, 6], ends included
    assert fid.precision_recall(line(-3, 6, 6.5, 100), reference) == (0.5, 1.0)
    assert fid.precision_recall(line(-3.5, 6.5, 7, 8), reference) == (0.0, 1.0)  # 6.5 reaches 10 back
    assert fid.precision_recall(line(10, 11, 12, 13, 1), reference) == (0.2, 1.0)
    assert fid.precision_recall(reference, reference) == (1.0, 1.0)
    assert fid.precision_recall(line(5, 5, 5, 5, 5), line(5, 5, 5, 5, 9)) == (1.0, 0.8)  # radius 0 holds its equals; a 9 is not one
    same = torch.rand(1, 2048) + 1  # radius 0 again, and the last bit of a feature, which a batch may change, must not tell equals apart
    assert fid.precision_recall(same.nextafter(torch.tensor(9.0)).repeat(6, 1), same.repeat(5, 1)) == (1.0, 1.0)
    assert fid.precision_recall(same.repeat(6, 1) * 1.0001, same.repeat(5, 1)) == (0.0, 0.0)


def test_fid_precision_and_recall_equal_brute_force_in_any_blocks():
    r = np.random.RandomState(0)
    a, b = r.randint(0, 6, (41, 3)).astype("float32"), r.randint(3, 9, (29, 3)).astype("float32")  # many ties

    def manifold_share(x, centres):
        radius = [sorted(((centres[i] - np.delete(centres, i, 0)) ** 2).sum(1))[2] for i in range(len(centres))]
        return np.mean([any(((p - c) ** 2).sum() <= radius2 for c, radius2 in zip(centres, radius, strict=True)) for p in x])

    expected = manifold_share(a, b), manifold_share(b, a)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    for block in (1000, 29, 8, 2, 1):
        assert fid.precision_recall(torch.tensor(a), torch.tensor(b), block=block) == expected


# ---------------------------------------------------------------- the Inception
FID_LAYERS = """
- Conv2d_1a_3x3:32x3x3x3 Conv2d_2a_3x3:32x32x3x3 Conv2d_2b_3x3:64x32x3x3 Conv2d_3b_1x1:80x64x1x1 Conv2d_4a_3x3:192x80x3x3
Mixed_5b branch1x1:64x192x1x1 branch5x5_1:48x192x1x1 branch5x5_2:64x48x5x5 branch3x3dbl_1:64x192x1x1 branch3x3dbl_2:96x64x3x3
Mixed_5b branch3x3dbl_3:96x96x3x3 branch_pool:32x192x1x1
Mixed_5c branch1x1:64x256x1x1 branch5x5_1:48x256x1x1 branch5x5_2:64x48x5x5 branch3x3dbl_1:64x256x1x1 branch3x3dbl_2:96x64x3x3
Mixed_5c branch3x3dbl_3:96x96x3x3 branch_pool:64x256x1x1
Mixed_5d branch1x1:64x288x1x1 branch5x5_1:48x288x1x1 branch5x5_2:64x48x5x5 branch3x3dbl_1:64x288x1x1 branch3x3dbl_2:96x64x3x3
Mixed_5d branch3x3dbl_3:96x96x3x3 branch_pool:64x288x1x1
Mixed_6a branch3x3:384x288x3x3 branch3x3dbl_1:64x288x1x1 branch3x3dbl_2:96x64x3x3 branch3x3dbl_3:96x96x3x3
Mixed_6b branch1x1:192x768x1x1 branch7x7_1:128x768x1x1 branch7x7_2:128x128x1x7 branch7x7_3:192x128x7x1 branch7x7dbl_1:128x768x1x1
Mixed_6b branch7x7dbl_2:128x128x7x1 branch7x7dbl_3:128x128x1x7 branch7x7dbl_4:128x128x7x1 branch7x7dbl_5:192x128x1x7 branch_pool:192x768x1x1
Mixed_6c branch1x1:192x768x1x1 branch7x7_1:160x768x1x1 branch7x7_2:160x160x1x7 branch7x7_3:192x160x7x1 branch7x7dbl_1:160x768x1x1
Mixed_6c branch7x7dbl_2:160x160x7x1 branch7x7dbl_3:160x160x1x7 branch7x7dbl_4:160x160x7x1 branch7x7dbl_5:192x160x1x7 branch_pool:192x768x1x1
Mixed_6d branch1x1:192x768x1x1 branch7x7_1:160x768x1x1 branch7x7_2:160x160x1x7 branch7x7_3:192x160x7x1 branch7x7dbl_1:160x768x1x1
Mixed_6d branch7x7dbl_2:160x160x7x1 branch7x7dbl_3:160x160x1x7 branch7x7dbl_4:160x160x7x1 branch7x7dbl_5:192x160x1x7 branch_pool:192x768x1x1
Mixed_6e branch1x1:192x768x1x1 branch7x7_1:192x768x1x1 branch7x7_2:192x192x1x7 branch7x7_3:192x192x7x1 branch7x7dbl_1:192x768x1x1
Mixed_6e branch7x7dbl_2:192x192x7x1 branch7x7dbl_3:192x192x1x7 branch7x7dbl_4:192x192x7x1 branch7x7dbl_5:192x192x1x7 branch_pool:192x768x1x1
Mixed_7a branch3x3_1:192x768x1x1 branch3x3_2:320x192x3x3 branch7x7x3_1:192x768x1x1 branch7x7x3_2:192x192x1x7 branch7x7x3_3:192x192x7x1
Mixed_7a branch7x7x3_4:192x192x3x3
Mixed_7b branch1x1:320x1280x1x1 branch3x3_1:384x1280x1x1 branch3x3_2a:384x384x1x3 branch3x3_2b:384x384x3x1 branch3x3dbl_1:448x1280x1x1
Mixed_7b branch3x3dbl_2:384x448x3x3 branch3x3dbl_3a:384x384x1x3 branch3x3dbl_3b:384x384x3x1 branch_pool:192x1280x1x1
Mixed_7c branch1x1:320x2048x1x1 branch3x3_1:384x2048x1x1 branch3x3_2a:384x384x1x3 branch3x3_2b:384x384x3x1 branch3x3dbl_1:448x2048x1x1
Mixed_7c branch3x3dbl_2:384x448x3x3 branch3x3dbl_3a:384x384x1x3 branch3x3dbl_3b:384x384x3x1 branch_pool:192x2048x1x1
"""


def fid_reference_shapes():
    """Name -> shape of every entry of pt_inception-2015-12-05-6726825d.pth, in its order."""
    shapes = {}
    for line in FID_LAYERS.split("\n")[1:-1]:
        block, *convs = line.split()
        for conv in convs:
            name, shape = conv.split(":")
            name, shape = name if block == "-" else f"{block}.{name}", tuple(map(int, shape.split("x")))
            shapes |= {f"{name}.conv.weight": shape} | {f"{name}.bn.{k}": shape[:1] for k in ("weight", "bias", "running_mean", "running_var")}
            shapes[f"{name}.bn.num_batches_tracked"] = ()
    return shapes | {"fc.weight": (1008, 2048), "fc.bias": (1008,)}


def fid_weights():
    """The same weights anywhere: legacy numpy randomness, by sorted name."""
    r, weights = np.random.RandomState(0), {}
    for name, shape in sorted(fid_reference_shapes().items()):
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(0)
            continue
        a = r.standard_normal(shape)
        if name.endswith(("running_var", "bn.weight")):
            a = np.exp(0.2 * a)
        else:
            a = a * (2 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.1 * a
        weights[name] = torch.from_numpy(a.astype("float32"))
    return weights


def test_fid_inception_has_the_reference_files_names_and_shapes():
    with torch.device("meta"):
        ours = {name: tuple(tensor.shape) for name, tensor in fid.Inception().state_dict().items()}
    assert len(ours) == 94 * 6 + 2 and list(ours.items()) == list(fid_reference_shapes().items())


def test_fid_inception_equals_pytorch_fid_and_runs_from_the_command_line(tmp_path, capsys, monkeypatch):
    weights, path = fid_weights(), tmp_path / "weights.pth"
    torch.save(weights, path)
    monkeypatch.setattr(fid, "WEIGHTS_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    model = fid.load_inception(str(path))
    assert not model.training
    # Made once by pytorch-fid 0.3.0's InceptionV3 (torchvision 0.28) from these weights: features of one random image of each size
    for size, pool, mean, logits in (
            (32, [0.00387, 5.07427, 0.0, 0.01583, 4.06776, 0.0, 0.01729], 1.314622, [-0.33478, 0.90587, 1.09325]),
            (320, [0.00318, 6.06326, 0.0, 0.02668, 4.84089, 0.0, 0.00649], 1.55314, [-0.13469, 0.86871, 1.15209])):
        images = torch.from_numpy(np.random.RandomState(size).randint(0, 256, (1, 3, size, size)).astype("uint8"))
        with torch.inference_mode():
            h = model(images)
            y = model.logits(h)
        assert h.shape == (1, 2048) and y.shape == (1, 1008) and h.dtype == torch.float32
        assert np.allclose(h[0, [0, 320, 704, 1088, 1472, 1856, 2047]], pool, atol=5e-5) and abs(h.mean().item() - mean) < 5e-5
        assert np.allclose(y[0, [0, 500, 1007]], logits, atol=5e-5)
    images = fid_images(10)
    a, x = fid_npz(tmp_path / "a.npz", images), str(tmp_path / "x.npz")
    out = fid_run(capsys, a, "--save-stats", x, "--weights", path, "--workers", 0)
    assert out.out.startswith("FID ") and "inception-2015-12-05 (2048), resize bilinear to 299x299" in out.out and "10 images for 2048" in out.err
    with np.load(x) as file:
        mu, sigma, num = file["mu"], file["sigma"], file["num"]
    with torch.inference_mode():
        h = model(torch.from_numpy(images).permute(0, 3, 1, 2)).double().numpy()
    assert np.allclose(mu, h.mean(0), atol=1e-5) and np.allclose(sigma, np.cov(h.T), atol=1e-5) and num == 10
    assert not torch.backends.cudnn.allow_tf32
    del weights["fc.bias"]  # strict: a file whose hash passed, and yet an entry is missing
    monkeypatch.setattr(fid.torch, "load", lambda *args, **kwargs: weights)
    with pytest.raises(RuntimeError, match="fc.bias"):
        fid.load_inception(str(path))


def test_fid_weight_file_that_is_not_the_one(tmp_path, capsys):
    images = fid_npz(tmp_path / "a.npz", fid_images(4))
    (tmp_path / "w.pth").write_bytes(b"other weights")
    error = fid_fails(capsys, images, images, "--weights", tmp_path / "w.pth")
    assert hashlib.sha256(b"other weights").hexdigest() in error and "6726825d0af5" in error and "w.pth" in error
    assert "No such file" in fid_fails(capsys, images, images, "--weights", tmp_path / "none.pth")


def test_fid_weights_download_checked_and_cached(tmp_path, capsys, monkeypatch):
    images = fid_npz(tmp_path / "a.npz", fid_images(4))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fid, "WEIGHTS_URL", (tmp_path / "nowhere" / "weights.pth").as_uri())  # "offline"
    error = fid_fails(capsys, images, images)
    assert fid.WEIGHTS_URL in error and "--weights PATH" in error
    source, cached = tmp_path / "weights.pth", tmp_path / "cache" / "farmer" / "weights.pth"
    source.write_bytes(b"wrong")
    monkeypatch.setattr(fid, "WEIGHTS_URL", source.as_uri())
    assert hashlib.sha256(b"wrong").hexdigest() in fid_fails(capsys, images, images)
    assert list(cached.parent.iterdir()) == []
    monkeypatch.setattr(fid, "WEIGHTS_SHA256", hashlib.sha256(b"right").hexdigest())
    source.write_bytes(b"right")
    monkeypatch.setattr(fid.torch, "load", lambda file, **kw: {"file": file, **kw})
    monkeypatch.setattr(fid.Inception, "__init__", lambda self: torch.nn.Module.__init__(self))
    loaded = []
    monkeypatch.setattr(fid.Inception, "load_state_dict", lambda self, weights: loaded.append(weights))
    fid.load_inception(None)
    source.unlink()
    fid.load_inception(None)  # from the cache
    assert loaded == [{"file": cached, "map_location": "cpu", "weights_only": True}] * 2 and list(cached.parent.iterdir()) == [cached]


# ---------------------------------------------------------------- inputs
def test_fid_of_folder_zip_and_npz_of_the_same_images_are_identical(tmp_path, capsys):
    images = fid_images(11)
    folder = fid_folder(tmp_path / "images", images)
    names = sorted(os.path.relpath(os.path.join(d, f), folder) for d, _, files in os.walk(folder) for f in files)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        for name in names:
            file.write(os.path.join(folder, name), name)
    npz = fid_npz(tmp_path / "images.npz", images[[int(os.path.basename(name)[:3]) for name in names]])
    adm = tmp_path / "adm.npz"
    np.savez(adm, np.load(npz)["images"])  # arr_0
    stats = []
    for source in (folder, tmp_path / "images.zip", npz, adm):
        fid_run(capsys, source, "--save-stats", tmp_path / "x.npz", *fid_features(tmp_path))
        with np.load(tmp_path / "x.npz") as file:
            stats.append((file["mu"], file["sigma"]))
    x = images.transpose(0, 3, 1, 2).reshape(11, -1)[:, :8].astype("float32") / np.float32(127.5) - 1
    for mu, sigma in stats:
        assert (mu == stats[0][0]).all() and (sigma == stats[0][1]).all()
        assert np.abs(mu - x.astype(float).mean(0)).max() < 1e-7 and np.abs(sigma - np.cov(x.T.astype(float))).max() < 1e-7


def test_fid_same_numbers_for_any_batch_size_and_workers(tmp_path, capsys):
    a, b = fid_folder(tmp_path / "a", fid_images(31)), fid_npz(tmp_path / "b.npz", fid_images(25, seed=1) // 2)
    runs = [fid_run(capsys, a, b, *fid_features(tmp_path), "--json", "--batch-size", size, "--workers", workers).out
            for size, workers in ((1, 0), (7, 2), (50, 0), (50, 1))]
    report = json.loads(runs[0])
    assert runs == runs[:1] * 4 and report["fd"] > 0.1 and 0 <= report["precision"] <= 1
    assert (report["num_samples"], report["num_reference"], report["dim"], report["inception_score"]) == (31, 25, 8, None)


def test_fid_of_other_features_is_an_fd(tmp_path, capsys):
    a, b = fid_npz(tmp_path / "a.npz", fid_images(11)), fid_npz(tmp_path / "b.npz", fid_images(11, seed=1))
    out = fid_run(capsys, a, b, *fid_features(tmp_path))
    assert out.out.startswith("FD (f.pt)  ") and "FID" not in out.out + out.err and "resize none" in out.out and "IS         n/a" in out.out
    report = json.loads(fid_run(capsys, a, b, *fid_features(tmp_path), "--json").out)
    assert "fid" not in report and report["features"] == "f.pt"
    exported = torch.export.export(FidPixels(), (torch.zeros(2, 3, 4, 4),), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(exported, tmp_path / "f.pt2")
    assert json.loads(fid_run(capsys, a, b, "--features", tmp_path / "f.pt2", "--workers", 0, "--json").out)["fd"] == report["fd"]


def test_fid_saved_statistics_stand_for_their_images(tmp_path, capsys):
    a, b, x = fid_npz(tmp_path / "a.npz", fid_images(9)), fid_npz(tmp_path / "b.npz", fid_images(12, seed=1)), tmp_path / "x.npz"
    direct = json.loads(fid_run(capsys, a, b, *fid_features(tmp_path), "--json").out)
    fid_run(capsys, b, "--save-stats", x, *fid_features(tmp_path))
    from_stats = json.loads(fid_run(capsys, a, x, *fid_features(tmp_path), "--json").out)
    assert from_stats == direct | {"precision": None, "recall": None}
    assert json.loads(fid_run(capsys, x, x, "--json").out)["fd"] == pytest.approx(0, abs=1e-6)  # needs no features at all
    with np.load(x) as file:
        both = fid_npz(tmp_path / "both.npz", fid_images(12, seed=1), mu=file["mu"] + 1, sigma=file["sigma"], features="f.pt", num=10_000)
    mixed = json.loads(fid_run(capsys, a, both, *fid_features(tmp_path), "--json").out)  # as ADM's: statistics for the FID, images for the rest
    assert mixed["fd"] != direct["fd"] and (mixed["precision"], mixed["num_reference"]) == (direct["precision"], 10_000)
    foreign = fid_npz(tmp_path / "foreign.npz", fid_images(12, seed=1), mu=np.zeros(2048), sigma=np.eye(2048))  # the images count
    assert json.loads(fid_run(capsys, a, foreign, *fid_features(tmp_path), "--json").out) == direct
    np.savez(tmp_path / "pytorch-fid.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    side, has_images = fid.read_statistics(str(tmp_path / "pytorch-fid.npz"))
    assert (side.features, side.num, has_images) == (fid.Inception.name, None, False)


def test_fid_straight_from_a_model(tmp_path, capsys, monkeypatch):
    images = fid_images(24, seed=2)
    asked = {}

    def sample_images(model, labels, *, seed, batch_size, guidance, start):
        asked.update(model=model, labels=labels, seed=seed, batch_size=batch_size, guidance=guidance)
        for i in range(0, len(labels), batch_size):
            yield images[i:i + batch_size]

    model = types.SimpleNamespace(config=types.SimpleNamespace(num_classes=5, sampling=types.SimpleNamespace(guidance=0.5)))
    monkeypatch.setattr(fid, "checkpoint_path", lambda path: f"{path}/ckpt.pt")
    monkeypatch.setattr(fid, "load", lambda path, device: (model, asked.update(path=path)))
    monkeypatch.setattr(fid, "sample_images", sample_images)
    options = [*fid_features(tmp_path), "--json"]
    b = fid_npz(tmp_path / "b.npz", fid_images(12))
    got = json.loads(fid_run(capsys, "runs/x", b, "--num", 24, "--guidance", 1.5, "--seed", 7, "--batch-size", 10, *options).out)
    assert asked["labels"].tolist() == [i % 5 for i in range(24)]
    assert (asked["path"], asked["model"], asked["seed"], asked["batch_size"], asked["guidance"]) == ("runs/x/ckpt.pt", model, 7, 10, 1.5)
    assert got == json.loads(fid_run(capsys, fid_npz(tmp_path / "a.npz", images), b, *options).out) | {"guidance": 1.5, "seed": 7}
    model.config.num_classes, images = 0, images[..., :1]  # unconditional and grey
    out = fid_run(capsys, "runs/x", b, "--num", 24, *options[:-1]).out
    assert asked["labels"].tolist() == [0] * 24 and asked["guidance"] == 0.5 and "24 samples drawn with guidance 0.5, seed 0" in out


def test_fid_of_two_processes_is_that_of_one(tmp_path, capsys):
    """torchrun shares the images, an odd number of them, and process 0 prints the same report."""
    a, b = fid_npz(tmp_path / "a.npz", fid_images(13)), fid_npz(tmp_path / "b.npz", fid_images(12, seed=1))
    argv = [a, b, *fid_features(tmp_path), "--json", "--device", "cpu", "--batch-size", "3"]
    process = command("-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "fid.py", *argv)
    one = json.loads(fid_run(capsys, *argv).out)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert json.loads(next(line for line in output.splitlines() if line.startswith("{"))) == one


def test_fid_warns_of_few_images_and_of_two_sizes(tmp_path, capsys):
    a, b = fid_npz(tmp_path / "a.npz", fid_images(7)), fid_npz(tmp_path / "b.npz", fid_images(8, size=5))
    lines = [line for line in fid_run(capsys, a, b, *fid_features(tmp_path)).err.splitlines() if "warning" in line]
    assert len(lines) == 2 and "a.npz: 7 images for 8 features" in lines[0] and "biased" in lines[0]
    assert "4x4" in lines[1] and "5x5" in lines[1]


# ---------------------------------------------------------------- bad input
def test_fid_bad_sets_of_images(tmp_path, capsys):
    good, options = fid_npz(tmp_path / "good.npz", fid_images(9)), fid_features(tmp_path)
    one = fid_folder(tmp_path / "one", fid_images(1))
    assert "1 image, expected at least 2" in fid_fails(capsys, one, good, *options)
    (tmp_path / "one" / "ckpt.pt").write_bytes(b"")
    assert "give --num" in fid_fails(capsys, one, good, *options)
    mixed = fid_folder(tmp_path / "mixed", fid_images(6))
    Image.new("RGB", (6, 5)).save(tmp_path / "mixed" / "1" / "003.png")
    broken = fid_folder(tmp_path / "broken", fid_images(6))
    (tmp_path / "broken" / "1" / "003.png").write_bytes(b"not a picture")
    for workers in (0, 1):
        error = fid_fails(capsys, good, mixed, *options[:2], "--workers", workers, "--batch-size", 2, "--save-stats", tmp_path / "x.npz")
        assert "003.png is 6x5" in error and "000.png is 4x4" in error and "mixed sizes" in error
        error = fid_fails(capsys, broken, good, *options[:2], "--workers", workers, "--batch-size", 2, "--save-stats", tmp_path / "x.npz")
        assert "003.png" in error and "Traceback" not in error and len(error) < 400
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 nothing else")
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 nothing else")
    nan = np.full((4, 4, 4, 3), np.nan, "float32")
    for bad in (tmp_path / "none", tmp_path / "bad.npz", tmp_path / "bad.zip", fid_npz(tmp_path / "nan.npz", nan)):
        assert os.path.basename(bad) in fid_fails(capsys, bad, good, *options, "--save-stats", tmp_path / "x.npz")
        assert os.path.basename(bad) in fid_fails(capsys, good, bad, *options, "--save-stats", tmp_path / "x.npz")
    assert "uint8" in fid_fails(capsys, tmp_path / "nan.npz", good, *options)  # pixels that are NaN cannot get in: floats do not
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("x.npz")]  # nothing written, in whole or in part


def test_fid_dying_worker_is_one_line(tmp_path, capsys, monkeypatch):
    class Deadly:
        names = ["a", "b"]

        def __len__(self):
            return 2

        def __getitem__(self, i):
            os._exit(1)

    monkeypatch.setattr(fid, "open_images", lambda path: Deadly())
    assert "decoding process died" in fid_fails(capsys, "a", "b", *fid_features(tmp_path)[:2], "--workers", 1)


def test_fid_bad_statistics(tmp_path, capsys):
    good, options = fid_npz(tmp_path / "good.npz", fid_images(9)), fid_features(tmp_path)
    eye = np.eye(64)

    def stats(**arrays):
        np.savez(tmp_path / "s.npz", **arrays)
        return tmp_path / "s.npz"

    error = fid_fails(capsys, good, stats(mu=np.zeros(64), sigma=eye), "--weights", tmp_path / "unread.pth")
    assert "64 unnamed features, expected those of inception" in error
    assert "64 unnamed features, expected those of f.pt" in fid_fails(capsys, good, stats(mu=np.zeros(64), sigma=eye), *options)
    fid_run(capsys, good, "--save-stats", tmp_path / "x.npz", *options)
    error = fid_fails(capsys, tmp_path / "x.npz", stats(mu=np.zeros(64), sigma=eye))
    assert "8 f.pt features" in error and "64 unnamed features" in error
    error = fid_fails(capsys, tmp_path / "x.npz", stats(mu=np.zeros(64), sigma=eye, features="f.pt"))
    assert "8 f.pt features" in error and "64 f.pt features" in error
    assert "(64,) and sigma (3, 3)" in fid_fails(capsys, good, stats(mu=np.zeros(64), sigma=np.eye(3)), *options)
    assert "sigma" in fid_fails(capsys, good, stats(mu=np.zeros(64)), *options)
    assert "finite" in fid_fails(capsys, good, stats(mu=np.zeros(64), sigma=eye * np.nan), *options)
    assert "symmetric" in fid_fails(capsys, good, stats(mu=np.zeros(64), sigma=np.triu(np.ones((64, 64)))), *options)
    assert "eigenvalues" in fid_fails(capsys, stats(mu=np.zeros(64), sigma=-eye), tmp_path / "s.npz")
    assert "s.npz" in fid_fails(capsys, good, stats(mu=np.array([{}]), sigma=eye), *options)  # a pickle


def test_fid_bad_feature_modules(tmp_path, capsys):
    images = fid_images(9)
    images[5] = 255
    a = fid_npz(tmp_path / "a.npz", images)
    assert "not finite for image 5" in fid_fails(capsys, a, a, *fid_features(tmp_path, FidBroken()), "--batch-size", 2)
    assert "expected (9, D)" in fid_fails(capsys, a, a, *fid_features(tmp_path, torch.nn.Identity()))
    linear = fid_features(tmp_path, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2)))
    b = fid_npz(tmp_path / "b.npz", fid_images(9, size=5))
    assert "failed on images (9, 3, 5, 5)" in fid_fails(capsys, b, b, *linear)
    torch.save({"w": torch.zeros(1)}, tmp_path / "w.pt")
    (tmp_path / "w.pt2").write_bytes(b"x")
    for bad in ("w.pt", "w.pt2", "none.pt"):
        error = fid_fails(capsys, a, a, "--features", tmp_path / bad)
        assert bad in error and "torch.jit.script" in error


def test_fid_bad_command_lines(tmp_path, capsys):
    a = fid_npz(tmp_path / "a.npz", fid_images(4))
    for argv, expected in (
            ([], "SAMPLES"), ([a], "REFERENCE is missing"), ([a, a, "--bogus"], "--bogus"), ([a, a, "--weight", "x"], "--weight"),
            ([a, a, "--num", 1], "2 or more"), ([a, a, "--num", "many"], "many"), ([a, a, "--guidance", 1], "together with --num"),
            ([a, a, "--num", 4, "--guidance", -1], "w >= 0"), ([a, a, "--num", 4, "--guidance", "nan"], "nan"),
            ([a, a, "--batch-size", 0], "1 or more"), ([a, a, "--workers", -1], "0 or more"), ([a, a, "--device", "tpu"], "tpu"),
            ([a, a, "--features", "f", "--weights", "w"], "one of them"), ([a, "--save-stats", tmp_path / "x.txt"], ".npz"),
            ([a, "--save-stats", tmp_path / "no" / "x.npz"], "exists"), ([a, "--save-stats", tmp_path / "dir.npz"], "file name")):
        (tmp_path / "dir.npz").mkdir(exist_ok=True)
        assert expected in fid_fails(capsys, *argv), argv
    if not torch.cuda.is_available():
        assert "no CUDA GPU" in fid_fails(capsys, a, a, "--device", "cuda")
    with pytest.raises(SystemExit) as leave:
        fid.main(["--help"])
    assert leave.value.code == 0 and "half-pixel" in capsys.readouterr().out


def test_fid_statistics_are_written_whole_or_not_at_all(tmp_path, capsys, monkeypatch):
    a, x = fid_npz(tmp_path / "a.npz", fid_images(9)), tmp_path / "x.npz"
    x.write_bytes(b"what was there")

    def full_disk(file, **arrays):
        file.write(b"some of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fid.np, "savez", full_disk)
    assert "No space left" in fid_fails(capsys, a, "--save-stats", x, *fid_features(tmp_path))
    assert x.read_bytes() == b"what was there" and not [p for p in tmp_path.iterdir() if p.name.endswith(".part")]
