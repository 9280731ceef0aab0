"""The algorithm and its scripts: each claim as a test on random or trained weights (a zero-initialised flow is the
identity and proves nothing). Offline, on a CPU.

    pytest -q test_farmer.py
"""
import ast
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import farmer
import fid
import sample
import train
from farmer import (
    GMM,
    INVERSES,
    PRESETS,
    Config,
    Farmer,
    Noise,
    Sampling,
    categorical,
    gmm_log_prob,
    patchify,
    resample_cfg,
)
from support import classifier
from support.checkpoint import load, model_file
from support.cli import UserError, run_script
from support.conftest import (  # noqa: F401  (fixtures among them)
    REPOSITORY,
    SMALL_FLAGS,
    command,
    digits_run,
    fails,
    same_weights,
    small_run,
    succeeds,
    tiny_data,
    torchrun,
    weights,
)
from support.data import dequantize, digits, image_generators, quantize
from support.distributed import prepare_layers, prepare_training
from support.loader import batches, open_split
from support.optimize import Muon
from support.run import Average, load_run
from support.sampling import evaluate, sample_images
from support.start import compiles

SMALL = Config(image_size=8, patch_size=2, num_classes=3, flow_blocks=3, flow_layers=1, flow_width=32, ar_layers=1,
               ar_width=32, head_dim=16, informative_dim=5, informative_mixtures=3, redundant_mixtures=2,
               class_tokens=2)


def randomised(config: Config = SMALL, seed: int = 0, dtype=torch.float64, kind: type = Farmer) -> Farmer:
    """A model with every parameter moved away from its initial value."""
    torch.manual_seed(seed)
    model = kind(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    N, d = config.num_tokens, config.token_dim
    model.flow.fit_linear_map(torch.randn(50, N, d, dtype=dtype) @ torch.randn(d, d, dtype=dtype))
    return model.requires_grad_(False)


def random_gmm(*shape, K=4, d=3, spread=1.0, log_sigma=0.0) -> GMM:
    mu, log_sigma = spread * torch.randn(*shape, K, d), log_sigma + 0.5 * torch.randn(*shape, K, d)
    return GMM(torch.randn(*shape, K), mu, log_sigma)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(model, labels, seed: int, batch_size: int, **options) -> np.ndarray:
    """uint8 images of the scripts' sampling loop."""
    options = dataclasses.replace(model.config.sampling, **options)
    return np.concatenate([images for _, images, _ in sample_images(model, labels, options, seed, batch_size)])


# ------------------------------------------------------------------------------------------ exactness
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
        J = torch.autograd.functional.jacobian(lambda x: model.flow(x.view(1, 16, 12))[0].flatten(), X[b].flatten())
        assert abs(torch.linalg.slogdet(J)[1] - logdet[b]) < 1e-8


def test_round_trip_of_a_trained_model_in_float32(digits_run):
    model, _ = load(digits_run)
    images = torch.from_numpy(digits(200, 16, 3, seed=1).array).permute(0, 3, 1, 2)
    X = patchify(dequantize(images, "gaussian", 0.05, image_generators(0, range(200), torch.device("cpu"))), 4)
    with torch.no_grad():
        Z, _ = model.flow(X)
        for method in ("exact", "parallel"):
            assert (model.flow.inverse(Z, method) - X).abs().max() < 1e-3


@pytest.mark.parametrize("d_I", [1, 2])
def test_density_of_one_token_integrates_to_one(d_I):
    """One token of two channels (a 1 x 2 patch cannot be square, so p = 1 and C = 2 by hand), on a grid."""
    config = dataclasses.replace(SMALL, image_size=1, patch_size=1, channels=3, informative_dim=d_I, flow_blocks=2)
    object.__setattr__(config, "channels", 2)
    model = randomised(config)
    g = torch.linspace(-24, 24, 241, dtype=torch.float64)
    images = torch.stack(torch.meshgrid(g, g, indexing="ij"), -1).view(-1, 2, 1, 1)
    labels = torch.zeros(20_000, dtype=torch.long)
    p = sum(model.log_prob(x, labels[:len(x)]).total.exp().sum() for x in images.split(20_000))
    assert abs(float(p) * float(g[1] - g[0]) ** 2 - 1) < 0.01


class TwoTokens(Farmer):
    """Images of 2 x 1 pixels: two tokens of one channel, so that flow and AR take part and a grid has two axes."""
    def __init__(self, config):
        super().__init__(config)
        for part in (*self.flow.blocks, self.prior):
            for name, length in (("row", 2), ("column", 1)):
                setattr(part.pos, name, nn.Parameter(torch.randn(length, 32)))
        self.prior.N = 2

    def patches(self, images):
        return patchify(images, 1)


def test_density_of_two_tokens_integrates_to_one():
    config = dataclasses.replace(SMALL, image_size=1, patch_size=1, channels=1, informative_dim=1, linear_map="whiten")
    model = randomised(config, kind=TwoTokens)
    g = torch.linspace(-10, 10, 401, dtype=torch.float64)
    images = torch.stack(torch.meshgrid(g, g, indexing="ij"), -1).view(-1, 1, 2, 1)
    p = torch.cat([model.log_prob(x, torch.ones(len(x), dtype=torch.long)).total.exp() for x in images.split(50_000)])
    assert abs(float(p.sum()) * float(g[1] - g[0]) ** 2 - 1) < 0.01
    p = p.view(401, 401) / p.sum()
    assert (p - p.sum(1, keepdim=True) * p.sum(0)).abs().sum() > 0.1  # the tokens are not independent


def test_patches_keep_their_pixels_and_quantize_inverts_dequantize():
    images = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8).float()
    X = patchify(images, 4)
    assert X.shape == (2, 4, 48)
    assert torch.equal(X[0, 1].view(4, 4, 3), images[0, :, 0:4, 4:8].permute(1, 2, 0))
    assert torch.equal(farmer.unpatchify(X, 4, 3), images)
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for kind, sigma in (("uniform", None), ("gaussian", 0.0), ("none", None)):
        assert torch.equal(quantize(dequantize(levels, kind, sigma, [seeded()])), levels)
    x = dequantize(levels, "gaussian", 0.25, [seeded()])
    assert torch.allclose(x, (levels + 0.5) / 128 - 1 + 0.25 * torch.randn(1, 16, 16, generator=seeded()))


# ------------------------------------------------------------------------------------------ causality and caches
@pytest.mark.parametrize("look_above", [False, True])
def test_changing_a_token_never_changes_parameters_at_or_before_it(look_above):
    model = randomised(dataclasses.replace(SMALL, look_above=look_above))
    x, labels = torch.randn(1, 16, 12, dtype=torch.float64), torch.tensor([1])
    block, every = model.flow.blocks[1], torch.arange(16)
    pos = block.pos(block.flip)
    for j in (0, 7, 15):
        y = x.clone()
        y[:, j] += 1
        mu_x, mu_y = block.mu_a(x, every, pos)[0], block.mu_a(y, every, pos)[0]
        change = (mu_x - mu_y).abs().amax((0, 2))  # row i: of token i + 1
        assert (change[:j] == 0).all() and (change[j:] > 0).all()
        (a, r_a), (b, r_b) = (model.prior(t[..., :5], labels) for t in (x, y))
        change = (a.mu - b.mu).abs().amax((0, 2, 3))  # row i: parameters of token i
        assert (change[:j + 1] == 0).all() and (change[j + 1:] > 0).all() and (r_a.mu != r_b.mu).all()


def test_look_above_reads_the_token_above_the_one_that_is_predicted():
    """On a grid of 4 x 4, row i of the embedding predicts token i + 1: it reads token i and the one above i + 1."""
    torch.manual_seed(0)
    embed = farmer.TokenEmbedding(dataclasses.replace(SMALL, look_above=True), 12, 32)
    x, every = torch.randn(1, 16, 12), torch.arange(16)
    for j in range(16):
        y = x.clone()
        y[:, j] += 1
        changed = (embed(x, every) != embed(y, every)).any(-1)[0].nonzero().flatten().tolist()
        assert changed == [i for i in (j, j + 3) if i < 16]


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
    """What a GPU runs, but for the kernels and the replay: whole graphs, one for all layers and blocks at a shape."""
    model, compiled = randomised(), randomised()
    for m in (model, compiled):
        m.new_student()
    new_cache = farmer.Transformer.new_cache
    monkeypatch.setattr(farmer.Transformer, "new_cache",
                        lambda self, B, T, like: new_cache(self, B, T, like, static=True))
    torch._dynamo.reset()
    prepare_layers(compiled, True, False, backend="aot_eager", fullgraph=True)
    labels = torch.tensor([0, 1, 2])
    for method in ("exact", "parallel", "student"):
        options = Sampling(guidance=1.0, inverse=method)
        a, b = (m.sample(labels, options, seeded()) for m in (model, compiled))
        assert (a - b).abs().max() < 1e-9, method
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] < 8  # of 3 + 3 + 1 layers at 3 or 4 shapes
    torch._dynamo.reset()


def test_a_model_compiled_as_a_whole_for_a_cpu_is_one_graph_of_the_same_gradients(monkeypatch):
    compile_whole = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compile_whole)
    images, labels, losses = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]), []
    for compiling in (False, True):
        model = randomised(dtype=torch.float32).requires_grad_(True)
        prepare_training(model, model, compiling, checkpointing=False)
        assert ("forward" in vars(model)) == compiling
        loss = model(images, labels)["loss"].mean()
        losses.append((loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*losses, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_on_a_gpu_compiles_each_kind_of_layer_once_and_what_lies_between(checkpointing, monkeypatch):
    """Eight layers, of two lengths: the flow's and the prior's. The gradients are those of no compiling."""
    graphs, losses = [], []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    torch._dynamo.reset()
    for compiling in (False, True):
        config = dataclasses.replace(SMALL, flow_layers=2, ar_layers=2)
        model = randomised(config, dtype=torch.float32).requires_grad_(True)
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Parameter, "is_cuda", True, raising=False)
            prepare_training(model, model, compiling, checkpointing)
        loss = model(images, labels)["loss"].mean()
        losses.append((loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*losses, strict=True))
    assert sum("attention" in code for code in graphs) == 2 < len(graphs)
    assert any("logsumexp" in code for code in graphs) and any("tanh" in code for code in graphs)
    torch._dynamo.reset()


def test_long_runs_in_one_process_compile_on_a_cpu(monkeypatch):
    """By the whole run, so that what is left of it goes on as it began."""
    args, cpu = train.parse([], "farmer", farmer), torch.device("cpu")
    model, short = Farmer(SMALL), train.Train()
    long = dataclasses.replace(short, steps=math.ceil(3e14 / model.flops() / short.batch_size / 3))

    def chosen(settings, how="auto", compiler="/usr/bin/g++", world=1):
        monkeypatch.setattr(args, "compile", how)
        monkeypatch.setattr("shutil.which", lambda name: compiler)
        monkeypatch.setattr("support.start.rank_and_world", lambda: (0, world))
        return compiles(args, cpu, model, settings)
    assert chosen(long) and not chosen(short) and not chosen(long, compiler=None) and not chosen(long, world=2)
    assert chosen(short, "on") and not chosen(long, "off")
    monkeypatch.setattr(args, "checkpointing", True)
    assert not chosen(long)
    with pytest.raises(UserError, match="g\\+\\+"):
        chosen(long, "on", compiler=None)


@pytest.mark.parametrize("causal", [False, True])
def test_bf16_attention_on_a_cpu(causal):
    """Values and gradients against float64, within bf16's rounding; no bit of a later token reaches an earlier one."""
    torch.manual_seed(0)
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


def test_one_component_without_split_is_one_more_flow_block(monkeypatch):
    """A.1: the prior's mu and sigma as an affine step z -> u, then log N(u; 0, 1); its sampling as the inverse step."""
    config = dataclasses.replace(SMALL, informative_dim=12, informative_mixtures=1)
    model = randomised(config)
    images, labels = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    Z, logdet = model.flow(patchify(images, 2))
    gmm, _ = model.prior(Z, labels)
    mu, a = gmm.mu[:, :, 0], -gmm.log_sigma[:, :, 0]
    u = farmer.affine(Z, mu, a)
    expected = (-0.5 * u.square() - 0.5 * math.log(2 * math.pi)).sum((1, 2)) + logdet + a.sum((1, 2))
    assert (model.log_prob(images, labels).total - expected).abs().max() < 1e-6
    new = Noise.new
    monkeypatch.setattr(Noise, "new", staticmethod(lambda *args: new(*args)._replace(eps=u.unsqueeze(2))))
    assert (model.prior.sample(labels, 3, Sampling()) - Z).abs().max() < 1e-6


def test_blocks_alternate_and_the_prior_reads_against_the_last():
    """A block leaves the first token of its order alone, and each token depends on the earlier ones of that order."""
    model = randomised(dataclasses.replace(SMALL, flow_blocks=4))
    x = torch.randn(1, 16, 12, dtype=torch.float64)
    firsts = []
    for block in model.flow.blocks:
        z, _ = block(x)
        same = (z == x).all(-1)[0]
        assert same.sum() == 1
        firsts.append(int(same.int().argmax()))
    assert firsts == [15, 0, 15, 0]  # the last one reads in raster order
    for flip, last in ((True, 15), (False, 0)):
        flow = randomised(dataclasses.replace(SMALL, flow_blocks=1, final_flip=flip)).flow
        Z, _ = flow(x)
        same = (Z.unsqueeze(2) == x.unsqueeze(1)).all(-1)[0]  # [i, j]: token i of the AR is token j of the image
        assert same.nonzero().tolist() == [[last, 0]]  # with the flip the untouched token comes last


def test_an_image_does_not_depend_on_its_batch(digits_run):
    model, _ = load(digits_run)
    labels = torch.arange(12) % 10
    for guidance in (0.0, 1.5):
        one, many = (drawn(model, labels, 3, size, guidance=guidance) for size in (5, 12))
        assert np.abs(one.astype(int) - many).mean() < 0.05  # rounding may move a level, rarely the choice of component
    other = drawn(model, labels, 4, 12, guidance=0.0)
    assert np.abs(other.astype(int) - many).mean() > 5


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_bfloat16_in_the_prior_and_the_student_alone(digits_run, guidance):
    """Most latents are the same ones: where a draw picks another component, the rest of its image follows it."""
    model, _ = load(digits_run)
    model.new_student()

    def latents(precision, seed=0):
        generators = [seeded(1000 * seed + i) for i in range(40)]
        return model.sample_latents(torch.arange(40) % 10, Sampling(guidance=guidance, precision=precision), generators)

    def same(a, b):
        return ((a - b).abs().amax((1, 2)) < 0.1).float().mean()
    exact, fast = latents("float32"), latents("bfloat16")
    assert fast.dtype == torch.float32 and not torch.equal(exact, fast)
    assert same(exact, fast) > 0.5 and same(exact, latents("float32", seed=1)) == 0
    for inverse in INVERSES[1:]:
        images = [model.decode(exact, Sampling(inverse=inverse, precision=p)) for p in ("float32", "bfloat16")]
        off = (images[0] - images[1]).abs().max()
        assert 0 < off < 0.1 if inverse == "student" else off == 0


# ------------------------------------------------------------------------------------------ mixtures
def torch_mixture(gmm: GMM):
    from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
    return MixtureSameFamily(Categorical(logits=gmm.logits), Independent(Normal(gmm.mu, gmm.log_sigma.exp()), 1))


def test_mixture_densities_against_torch_distributions():
    torch.manual_seed(0)
    gmm = random_gmm(5, 7)
    z = torch.randn(5, 7, 3)
    assert torch.allclose(gmm_log_prob(z, *gmm), torch_mixture(gmm).log_prob(z), atol=1e-4)
    for spread, log_sigma in ((1, 0), (100, -5), (1000, -3)):  # far-out means, small stds: an expanded square cancels
        gmm = random_gmm(5, spread=spread, log_sigma=log_sigma)
        z = gmm.sample(torch.rand(5, 9), torch.randn(5, 9, 3))
        exact = torch_mixture(GMM(*(t.double().unsqueeze(1) for t in gmm))).log_prob(z.double())
        for got in (gmm.shared_log_prob(z), GMM(*(t.unsqueeze(1) for t in gmm)).log_prob(z)):
            assert torch.allclose(got.double(), exact, atol=1e-3, rtol=1e-4)


def test_mixture_draws_follow_the_mixture():
    torch.manual_seed(0)
    gmm = GMM(torch.tensor([0.5, -0.3]), torch.tensor([[-1.0], [2.0]]), torch.tensor([[-0.5], [0.2]]))
    z = gmm.sample(torch.rand(20_000), torch.randn(20_000, 1))[:, 0].numpy()
    assert stats.kstest(z, mixture_cdf(gmm)).pvalue > 0.01
    drawn = categorical(torch.tensor([0.0, -math.inf, 0.0]), torch.tensor([0.0, 0.49, 0.51, 0.999]))
    assert drawn.tolist() == [0, 0, 2, 2]


def mixture_cdf(gmm: GMM):
    pi, mu, sigma = gmm.logits.softmax(-1).numpy(), gmm.mu[:, 0].numpy(), gmm.log_sigma[:, 0].exp().numpy()
    return lambda x: (pi * stats.norm.cdf(np.asarray(x)[..., None], mu, sigma)).sum(-1)


# ------------------------------------------------------------------------------------------ guidance
P_C = GMM(torch.tensor([0.3, 0.0]), torch.tensor([[-1.0], [1.5]]), torch.tensor([[-0.4], [-0.2]]))
P_U = GMM(torch.tensor([0.0, 0.4]), torch.tensor([[-0.5], [0.8]]), torch.tensor([[0.1], [0.3]]))


def doubled(B: int) -> GMM:
    """[P_C, P_U] for a batch of B."""
    return GMM(*(torch.stack(both).repeat_interleave(B, 0) for both in zip(P_C, P_U, strict=True)))


def resampled(n: int, **options) -> np.ndarray:
    options = Sampling(**{"s_c": 256, "s_u": 256, **options})
    S, B = options.s_c + options.s_u, 500
    out = []
    for _ in range(n // B):
        z = resample_cfg(doubled(B), options, torch.rand(B, S), torch.randn(B, S, 1), torch.rand(B, 1))
        out.append(z.flatten())
    return torch.cat(out).numpy()


def guided_cdf(w: float):
    """Of p_c^{1+w} p_u^{-w}, normalised on a grid."""
    grid = torch.linspace(-8, 8, 8001, dtype=torch.float64)
    log_p_c, log_p_u = (gmm_log_prob(grid[:, None], *(t.double() for t in p)) for p in (P_C, P_U))
    target = ((1 + w) * log_p_c - w * log_p_u).exp()
    cdf = (target.cumsum(0) / target.sum()).numpy()
    return lambda x: np.interp(x, grid.numpy(), cdf)


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
def test_resampling_draws_from_the_guided_density(w):
    torch.manual_seed(0)
    z = resampled(5000, guidance=w)
    assert stats.kstest(z, guided_cdf(w)).pvalue > 0.01
    if w == 0:
        assert stats.kstest(z, mixture_cdf(P_C)).pvalue > 0.01
    else:  # the test can tell: unguided draws do not pass
        assert stats.kstest(resampled(5000, guidance=0.0), guided_cdf(w)).pvalue < 1e-6


@pytest.mark.parametrize("pool", ["shared", "per_token"])
def test_guided_redundant_parts_follow_the_guided_density(pool):
    """Through the prior's own sampling, with a head that gives P_C and P_U whatever it reads."""
    class Fixed(nn.Module):
        def forward(self, h):
            return doubled(len(h) // 2)
    config = dataclasses.replace(SMALL, image_size=4, informative_dim=11, redundant_mixtures=2)
    prior = randomised(config, dtype=torch.float32).prior
    prior.redundant = Fixed()
    options = Sampling(guidance=1.0, redundant_pool=pool, s_c=32, s_u=32)
    Z = prior.sample(torch.zeros(2000, dtype=torch.long), 3, options, seeded())
    assert Z.shape == (2000, 4, 12)
    for token in (0, 3):
        z = Z[:, token, -1].numpy()
        assert stats.kstest(z, guided_cdf(1.0)).pvalue > 0.01
        assert stats.kstest(z, mixture_cdf(P_C)).pvalue < 1e-6
    distinct = np.mean([len(set(tokens)) for tokens in Z[:, :, -1].tolist()])
    assert distinct > (3.9 if pool == "shared" else 3.999)


def test_the_draw_follows_temperatures_computed_by_hand():
    """Three candidates with weights written out: T_pi and T_sigma move candidates, the others only weights."""
    p_c = dict(logits=[0.7, -0.2], mu=[-1.0, 1.0], sigma=[0.5, 0.8])
    p_u = dict(logits=[0.1, 0.4], mu=[-0.6, 0.9], sigma=[1.1, 0.9])
    u, eps, n, w = [0.2, 0.9, 0.7], [0.3, -1.2, 0.5], 20_000, 1.5
    gmm = GMM(torch.tensor([p_c["logits"], p_u["logits"]]), torch.tensor([p_c["mu"], p_u["mu"]])[..., None],
              torch.tensor([p_c["sigma"], p_u["sigma"]])[..., None].log())

    def tempered(p, T_pi, T_sigma):
        pi = np.exp(T_pi * np.array(p["logits"]))
        return pi / pi.sum(), np.array(p["mu"]), T_sigma * np.array(p["sigma"])

    def candidate(law, i):
        pi, mu, sigma = law
        k = int(u[i] > pi[0])
        return mu[k] + sigma[k] * eps[i]

    def log_p(z, law):
        pi, mu, sigma = law
        return np.log((pi * stats.norm.pdf(z, mu, sigma)).sum())

    default = dict(T_pi=1.0, T_sigma=1.0, T_pi_v=1.0, T_sigma_v=1.0, T_s=1.0)
    seen = []
    for change in ({}, dict(T_pi=3.0), dict(T_sigma=0.5), dict(T_pi_v=0.2), dict(T_sigma_v=0.6), dict(T_s=2.5)):
        T = default | change
        proposing = [tempered(p, T["T_pi"], T["T_sigma"]) for p in (p_c, p_u)]
        weighing = [tempered(p, T["T_pi_v"], T["T_sigma_v"]) for p in (p_c, p_u)]
        z = [candidate(proposing[0], 0), candidate(proposing[0], 1), candidate(proposing[1], 2)]
        delta = [log_p(x, weighing[0]) - log_p(x, weighing[1]) for x in z]
        log_weight = T["T_s"] * np.array([w * delta[0], w * delta[1], (w + 1) * delta[2]])
        expected = np.exp(log_weight) / np.exp(log_weight).sum()

        pick = ((torch.arange(n) + 0.5) / n)[None]
        options = Sampling(guidance=w, s_c=2, s_u=1, **change)
        got = resample_cfg(gmm, options, torch.tensor([u]), torch.tensor([eps])[..., None], pick)[0, :, 0].numpy()
        shares = [np.isclose(got, x, atol=1e-5).mean() for x in z]
        assert np.allclose(shares, expected, atol=2e-4), change
        seen.append((*np.round(z, 3), *np.round(expected, 2)))
    assert len(set(seen)) == 6  # each of them alone changes the result


def test_temperatures_do_what_table_6_says():
    gmm = GMM(torch.tensor([1.0, 0.0]), torch.zeros(2, 1), torch.zeros(2, 1)).tempered(0.2, 0.9)
    assert torch.allclose(gmm.logits, torch.tensor([0.2, 0.0]))
    assert torch.allclose(gmm.log_sigma.exp(), torch.full((2, 1), 0.9))
    torch.manual_seed(0)
    one = dict(guidance=0.0, s_c=1, s_u=0)
    narrow, wide = resampled(2000, **one, T_sigma=1e-6), resampled(2000, **one)
    assert set(np.round(narrow, 3)) == {-1.0, 1.5} and len(set(np.round(wide, 3))) > 500  # T_sigma: the means are left
    sharp = resampled(2000, **one, T_pi=50.0, T_sigma=1e-6)
    assert set(np.round(sharp, 3)) == {-1.0}  # T_pi: only the likelier component

    def log_ratio(T_s):
        z = torch.tensor(resampled(4000, guidance=2.0, T_s=T_s))[:, None]
        return (gmm_log_prob(z, *P_C) - gmm_log_prob(z, *P_U)).mean()
    assert log_ratio(0.0) < log_ratio(1.0) < log_ratio(4.0)  # T_s: 0 ignores the weights, more sharpens them
    flat, plain = (resampled(4000, guidance=2.0, T_pi_v=t, T_sigma_v=v) for t, v in ((0.2, 3.0), (1.0, 1.0)))
    assert stats.ks_2samp(flat, plain).pvalue < 1e-3  # the weighing temperatures are read


def test_redundant_scale_changes_only_the_redundant_part():
    model = randomised(dtype=torch.float32)
    labels = torch.tensor([0, 1])
    Z = [model.sample_latents(labels, Sampling(redundant_scale=s), seeded()) for s in (0.0, 1.0, 4.0)]
    assert torch.equal(Z[0][..., :5], Z[2][..., :5])
    gmm = model.prior(Z[0][..., :5], labels)[1]
    nearest = (Z[0][..., None, 5:] - gmm.mu[:, None]).abs().amax(-1).amin(-1)
    assert nearest.max() < 1e-5  # scale 0: exactly a mean
    assert Z[2][..., 5:].std() > Z[1][..., 5:].std()


def test_guidance_raises_the_ratio_of_class_and_null():
    model = randomised(dtype=torch.float32)
    labels = torch.arange(300) % 3

    def gain(w):
        Z_I = model.sample_latents(labels, Sampling(guidance=w), seeded())[..., :5]
        of_class, of_null = (model.prior(Z_I, y)[0].log_prob(Z_I) for y in (labels, torch.full_like(labels, 3)))
        return float((of_class - of_null).mean())
    assert gain(0.0) < gain(1.0) < gain(4.0)
    images = model.sample(labels[:4], Sampling(guidance=1.0))
    assert images.shape == (4, 3, 8, 8) and images.dtype == torch.float32 and images.isfinite().all()


def test_where_class_and_null_agree_guidance_changes_nothing():
    """All weights are then equal, so one candidate is chosen whatever w, and it follows the unguided mixture."""
    model = randomised(dtype=torch.float32)
    model.prior.class_embed.weight[:] = model.prior.class_embed.weight[3].clone()
    labels = torch.zeros(4000, dtype=torch.long)
    a, b = (model.sample_latents(labels[:200], Sampling(guidance=w), seeded()) for w in (0.5, 6.0))
    assert (a - b).abs().amax((1, 2)).lt(1e-4).float().mean() > 0.98  # rounding may tip a choice
    Z = model.sample_latents(labels, Sampling(guidance=2.0), seeded())
    first = GMM(*(t[0, 0] for t in model.prior(Z[:1, :, :5], labels[:1])[0]))
    for channel in (0, 4):
        law = GMM(first.logits, first.mu[:, channel:channel + 1], first.log_sigma[:, channel:channel + 1])
        assert stats.kstest(Z[:, 0, channel].numpy(), mixture_cdf(law)).pvalue > 0.01


def one_gaussian(mu: float, sigma: float, B: int) -> GMM:
    return GMM(torch.zeros(B, 1), torch.full((B, 1, 1), mu), torch.full((B, 1, 1), math.log(sigma)))


@pytest.mark.parametrize("c, u, w", [((0.5, 0.8), (-0.3, 1.1), 1.0), ((0.0, 1.0), (0.4, 1.2), 2.0),
                                     ((-1.0, 0.5), (0.0, 2.0), 0.5), ((0.0, 2.0), (1.0, 0.5), 1.0)])
def test_rejection_draws_the_guided_gaussian(c, u, w):
    """Naive CFG against its closed form (where that is near the class: the method is inexact in its tails)."""
    torch.manual_seed(0)
    B = 3000
    p = GMM(*(torch.cat(parts) for parts in zip(one_gaussian(*c, B), one_gaussian(*u, B), strict=True)))
    options = Sampling(guidance=w, guidance_method="reject")
    z = farmer.reject_cfg(p, options, torch.rand(B, 1), torch.randn(B, 1, 1))[:, 0, 0].numpy()
    precision = (1 + w) / c[1]**2 - w / u[1]**2
    expected = c
    if precision > 0:
        law = stats.norm(((1 + w) * c[0] / c[1]**2 - w * u[0] / u[1]**2) / precision, precision**-0.5)
        assert stats.kstest(z, law.cdf).pvalue > 0.01 and stats.kstest(z, stats.norm(*c).cdf).pvalue < 1e-6
        expected = law.mean(), law.std()
    assert np.isfinite(z).all()
    got = farmer.gaussian_guided(*(torch.tensor(v) for v in (*c, *u)), w)
    assert [float(v) for v in got] == pytest.approx(expected, rel=1e-5)


def test_the_standard_gaussian_for_redundant_parts():
    """JetFormer's N(0, I) (4.3): in the density, and in samples, guided or not; it has no parameters."""
    model = randomised(dataclasses.replace(SMALL, redundant_prior="gaussian"), dtype=torch.float32)
    assert not any("redundant" in name for name, _ in model.named_parameters())
    images, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    Z, _ = model.flow(patchify(images, 2))
    expected = stats.norm.logpdf(Z[..., 5:].numpy()).sum((1, 2))
    assert np.allclose(model.log_prob(images, labels).redundant, expected, rtol=1e-4)
    for options in (Sampling(), Sampling(guidance=2.0, T_sigma=0.5)):
        Z_R = model.sample_latents(torch.zeros(60, dtype=torch.long), options, seeded())[..., 5:]
        assert stats.kstest(Z_R.flatten().numpy(), stats.norm.cdf).pvalue > 0.01


SWITCHES = [dict(), dict(informative_dim=12), dict(class_tokens=1), dict(final_flip=False), dict(look_above=True),
            dict(redundant_prior="gaussian"), dict(linear_map="rotate"), dict(num_classes=0), dict(flow_blocks=0)]


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_every_row_of_the_ablations_trains_and_samples(switch):
    """Table 3 and 4.3: every parameter gets a gradient in a call, as DDP needs, and both ways of guidance work."""
    torch.manual_seed(0)
    model = Farmer(dataclasses.replace(SMALL, **switch))
    null = model.config.num_classes
    x, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]).clamp(max=null)
    terms = model(x, labels, [seeded(i) for i in range(4)])
    assert terms.keys() == {"loss", "nats_per_dim", "informative", "redundant", "logdet"}
    terms["loss"].mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    for method in ("resample", "reject"):
        options = Sampling(guidance=1.0 if null else 0.0, guidance_method=method, s_c=2, s_u=2)
        assert model.sample(labels, options, [seeded(i) for i in range(4)]).isfinite().all()


# ------------------------------------------------------------------------------------------ denoising, exchange, stages
def test_denoising_is_a_step_along_the_exact_score():
    """x + sigma^2 grad log p(x|c), against finite differences in float64; batches of any size are the same."""
    model = randomised(dataclasses.replace(SMALL, linear_map="whiten"))
    torch.manual_seed(1)
    x, labels, sigma = torch.randn(5, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0]), 0.3
    got = model.denoise(x, labels, sigma)
    score = (got - x) / sigma**2
    for _ in range(5):
        direction = torch.randn(3, 8, 8, dtype=torch.float64)
        step = 1e-5 * direction / direction.norm()
        ahead, behind = (model.log_prob(x + s * step, labels).total for s in (1, -1))
        slope = (score * step).sum((1, 2, 3))
        assert torch.allclose((ahead - behind) / 2, slope, rtol=1e-4, atol=1e-9)
    assert (model.denoise(x[3:4], labels[3:4], sigma) - got[3:4]).abs().max() < 1e-10
    model.activations = lambda: 2**30  # one image at a time
    assert (model.denoise(x, labels, sigma) - got).abs().max() < 1e-13 * got.abs().max()
    assert not got.requires_grad


@pytest.mark.parametrize("method", ["exact", "parallel", "student", "refined"])
def test_denoising_follows_every_inverse_and_guidance(method):
    model = randomised()
    model.new_student()
    labels = torch.tensor([0, 1, 2])
    for w in (0.0, 1.0):
        noisy, clean = (model.sample(labels, Sampling(guidance=w, inverse=method, denoise=sigma), seeded())
                        for sigma in (0.0, 0.05))
        assert torch.allclose(clean, model.denoise(noisy, labels, 0.05)) and not torch.allclose(clean, noisy)


def test_exchange_moves_one_part_of_the_latents():
    model = randomised()
    images, tokens = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randperm(16)
    partners = torch.tensor([1, 0, 3, 2])
    assert (model.exchange(images) - images).abs().max() < 1e-9

    def latents(x):
        return model.flow(patchify(x, 2))[0]
    Z = latents(images)
    for part, moved in (("redundant", slice(5, None)), ("informative", slice(0, 5))):
        expected = Z.clone()
        expected[..., moved] = Z[partners][:, tokens][..., moved]
        assert (latents(model.exchange(images, part, tokens, partners)) - expected).abs().max() < 1e-8
    with pytest.raises(ValueError, match="part"):
        model.exchange(images, "both")


def test_arithmetic_against_torchs_count():
    from torch.utils.flop_counter import FlopCounterMode
    for change in ({}, dict(redundant_prior="gaussian"), dict(flow_layers=2, ar_layers=3)):
        model = Farmer(dataclasses.replace(SMALL, flow_width=64, ar_width=64, **change))
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))
        assert counter.get_total_flops() / 2 == pytest.approx(model.flops(), rel=0.1)
    few, many = (Farmer(dataclasses.replace(SMALL, redundant_mixtures=k)).activations() for k in (2, 200))
    assert 0 < few < many


def test_stages_decode_the_same_latents():
    model = randomised()
    labels = torch.tensor([0, 1])
    stages = model.stages(labels, None, [seeded(0), seeded(1)])
    assert list(stages)[:2] == ["prior", "exact"] and "forward" in stages
    exact, (Z, logdet) = stages["exact"](), stages["forward"]()
    assert exact.shape == (2, 3, 8, 8) and logdet.shape == (2,) and stages["prior"]().shape == Z.shape
    assert (stages["parallel"]() - exact).abs().max() < 1e-4
    assert (model.decode(Z, Sampling(inverse="exact")) - exact).abs().max() < 1e-8
    with pytest.raises(ValueError, match="generators: got 3.*2 images"):
        model.sample(labels, None, [seeded(i) for i in range(3)])


def test_unconditional_model():
    model = randomised(dataclasses.replace(SMALL, num_classes=0))
    images, labels = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    assert torch.equal(model.log_prob(images).total, model.log_prob(images, labels).total)
    assert model.sample(labels).shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match="unconditional"):
        model.sample(labels, Sampling(guidance=1.0))
    with pytest.raises(ValueError, match="labels"):
        model.log_prob(images, torch.tensor([0, 1]))


def test_log_prob_has_its_parts_and_counts_the_linear_map():
    model = randomised(dataclasses.replace(SMALL, linear_map="whiten"))
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    parts = model.log_prob(images, torch.tensor([0, 1]))
    assert torch.allclose(parts.total, parts.informative + parts.redundant + parts.logdet)
    flow = model.flow
    assert abs(flow.map_logdet - torch.linalg.slogdet(flow.map)[1]) < 1e-9 and abs(flow.map_logdet) > 0.1
    assert torch.equal(model.log_prob(images).total, model.log_prob(images, torch.tensor([3, 3])).total)  # None = null
    terms = model(images, torch.tensor([0, 1]))
    assert all(t.shape == (2,) for t in terms.values())
    assert torch.allclose(terms["loss"], -parts.total / 192) and torch.equal(terms["loss"], terms["nats_per_dim"])
    assert torch.allclose(terms["loss"], terms["informative"] + terms["redundant"] - terms["logdet"])


def test_samples_are_typical(digits_run):
    """-log p of the model's own samples against -log p of held-out digits with the same noise."""
    model, state = load_run(digits_run, torch.device("cpu"))
    labels = torch.arange(200) % 10
    with torch.no_grad():
        images = model.sample(labels, Sampling(), seeded())
        own = float(-model.log_prob(images, labels).total.mean() / 768)
    split = open_split("digits", 16, 3)
    values = evaluate(model, split.val, split.val_indices, "gaussian", state.training["noise_end"])
    assert abs(own - values["nats_per_dim"]) < 0.05 * abs(values["nats_per_dim"]), (own, values)


# ------------------------------------------------------------------------------------------ presets and config
TABLE_1 = {"farmer-1.1b-p16": (828, 295, 1.1e9), "farmer-1.9b-p16": (1400, 498, 1.9e9)}  # AF, AR in millions, total
PARAMETERS = {  # flow and prior, exactly: what a change of the architecture would move
    "tiny": (895_360, 512_449), "fashion": (1_623_680, 816_921), "cifar10": (25_672_448, 6_743_056),
    "imagenet64": (152_611_968, 39_196_753), "farmer-1.1b-p16": (843_838_464, 295_627_016),
    "farmer-1.1b-p8": (807_335_424, 138_480_392), "farmer-1.9b-p16": (1_417_814_016, 498_899_144),
    "farmer-1.9b-p8": (1_376_096_256, 352_414_408)}
TABLE_6 = {  # T_pi, T_sigma, s_c, s_u, T_pi_v, T_sigma_v, T_s, guidance
    "farmer-1.1b-p16": (1.0, 0.9, 5, 5, 0.2, 0.9, 1.1, 2.5), "farmer-1.1b-p8": (1.0, 1.0, 5, 5, 0.2, 0.9, 1.1, 2.0),
    "farmer-1.9b-p16": (1.0, 0.9, 5, 5, 0.2, 0.9, 1.1, 3.5), "farmer-1.9b-p8": (1.0, 1.0, 5, 5, 0.1, 1.0, 1.1, 1.5)}


def test_presets_have_their_sizes():
    for name, config in PRESETS.items():
        with torch.device("meta"):
            model = Farmer(config)
        flow, prior = (sum(p.numel() for p in part.parameters()) for part in (model.flow, model.prior))
        assert (flow, prior) == PARAMETERS[name], name
        if name in TABLE_1:
            AF, AR, total = TABLE_1[name]
            assert abs(flow / AF / 1e6 - 1) < 0.02 and abs(prior / AR / 1e6 - 1) < 0.02
            assert abs((flow + prior) / total - 1) < 0.05
    assert PARAMETERS.keys() == PRESETS.keys() == farmer.TRAINING.keys()
    assert {p.num_tokens for n, p in PRESETS.items() if n.endswith("p8")} == {1024}
    assert {p.num_tokens for n, p in PRESETS.items() if n.endswith("p16")} == {256}


def test_all_rows_of_table_6():
    for name, row in TABLE_6.items():
        s = PRESETS[name].sampling
        assert (s.T_pi, s.T_sigma, s.s_c, s.s_u, s.T_pi_v, s.T_sigma_v, s.T_s, s.guidance) == row, name
        assert (s.denoise, s.redundant_pool, s.guidance_method) == (0, "shared", "resample")  # the paper's


@pytest.mark.parametrize("field, value", [
    ("image_size", 15), ("informative_dim", 49), ("informative_dim", 0), ("linear_map", "pca"), ("flow_width", 100),
    ("channels", 2), ("num_classes", -1), ("ar_layers", 0), ("patch_size", 2.0), ("class_tokens", True),
    ("flow_width", 2**20), ("num_classes", 10**12), ("informative_mixtures", 10**11), ("image_size", 16_000_000),
    ("flow_blocks", 10**9)])
def test_config_names_the_field_that_is_wrong(field, value):
    with pytest.raises(ValueError, match=field):
        Config(**{field: value})


def test_the_number_of_layers_is_bounded():
    """Each number alone is allowed, but nobody waits for a million layers to be built."""
    with pytest.raises(ValueError, match="flow_blocks"):
        Config(flow_blocks=1000, flow_layers=1000)


def test_random_configs_are_refused_in_one_line_or_build():
    rng = np.random.default_rng(0)
    pool = [-1, 0, 1, 2, 3, 4, 8, 16, 32, 1.5, "a", None, True, math.nan, "whiten", "gaussian"]
    names = [f.name for f in dataclasses.fields(Config) if f.name != "sampling"]
    built = 0
    for _ in range(450):
        fields = rng.choice(names, 2, replace=False)
        try:
            config = dataclasses.replace(SMALL, **{str(f): pool[rng.integers(len(pool))] for f in fields})
        except ValueError as e:
            assert "\n" not in str(e) and any(f in str(e) for f in names), e
            continue
        if config.num_tokens <= 64 and config.channels * config.patch_size**2 <= 256:
            built += 1
            images = Farmer(config).sample(torch.zeros(1, dtype=torch.long))
            assert images.shape == (1, config.channels, config.image_size, config.image_size)
            assert images.isfinite().all()
    assert built > 20


def test_sampling_refuses_what_is_not_a_number():
    for values in (dict(guidance=-1.0), dict(guidance=math.nan), dict(T_s=math.inf), dict(s_c=0), dict(T_sigma_v=0.0),
                   dict(s_c=10**8), dict(inverse="fast"), dict(redundant_pool="both"), dict(denoise=-0.1)):
        with pytest.raises(ValueError, match=next(iter(values))):
            Sampling(**values)


# ------------------------------------------------------------------------------------------ the student
def test_a_student_follows_its_models_type():
    model = randomised()
    student = model.new_student()
    assert {p.dtype for p in student.parameters()} == {torch.float64}
    assert all(p.requires_grad for p in student.parameters())
    assert model.sample(torch.tensor([0, 1])).isfinite().all()  # the default inverse is then the student's


def test_the_students_attention_is_bidirectional():
    model = randomised()
    z = torch.randn(1, 16, 12, dtype=torch.float64)
    for block in model.new_student().blocks:
        for j in (0, 15):
            other = z.clone()
            other[:, j] += 1
            change = (block.one_step(other) - block.one_step(z)).abs().amax((0, 2))
            first = 15 if block.flip else 0  # the first token of a block is copied
            assert (change[[i for i in range(16) if i != first]] > 0).all()


def by_hand(student, Z: list, noise: torch.Tensor) -> torch.Tensor:
    """Algorithm 2's loss written out: the student's Z~_{t-1} against the teacher's Z_{t-1}."""
    z, loss = Z[-1] + noise, 0
    for t in (3, 2, 1):
        block = student.blocks[t - 1]
        turned = z.flip(1) if block.flip else z
        mu, a = block.mu_a(turned, torch.arange(16), block.pos(block.flip), causal=False)
        out = torch.cat([turned[:, :1], turned[:, 1:] * torch.exp(-a[:, :-1]) + mu[:, :-1]], 1)
        z = out.flip(1) if block.flip else out
        loss = loss + (z - Z[t - 1]).square().mean((1, 2)) / 3
    return loss


def test_distillation_is_algorithm_2():
    """Its value by hand, its noise, and that a student which inverts each block exactly would have no loss."""
    model = randomised()
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    distiller = model.distiller()
    assert [p.requires_grad for p in model.flow.parameters()].count(True) == 0
    assert {id(p) for p in distiller.parameters()} == {id(p) for p in model.student.parameters()}
    with torch.no_grad():
        for p in distiller.parameters():
            p.add_(0.1 * torch.randn_like(p))
    Z, _ = model.flow.states(patchify(x, 2))
    generators = [seeded(i) for i in range(5)]
    noise = []
    for g in (seeded(i) for i in range(5)):
        s = 0.3 * torch.rand(1, 1, generator=g, dtype=torch.float64)
        noise.append(s * torch.randn(16, 12, generator=g, dtype=torch.float64))
    got = distiller(x, torch.zeros(5, dtype=torch.long), generators)["loss"]
    assert got.shape == (5,) and torch.allclose(got, by_hand(model.student, Z, torch.stack(noise)))
    assert not torch.allclose(got, by_hand(model.student, Z, 0 * Z[-1]))
    distiller.noise = 0.0
    for block, teacher in zip(model.student.blocks, model.flow.blocks, strict=True):
        block.one_step = teacher.inverse
    assert distiller(x, None, [seeded(i) for i in range(5)])["loss"].max() < 1e-20


def test_student(tmp_path, digits_run, capsys):
    """Distillation lowers the loss of the copy that it starts from; parallel and refined inverses equal the exact one;
    a foreign student is refused."""
    train.main(["--distill", str(digits_run), "--out", str(tmp_path / "s"), "--steps", "40", "--log-every", "10",
                "--sample-every", "0"])
    losses = [json.loads(line)["loss"] for line in (tmp_path / "s" / "log.jsonl").open()]
    assert losses[-1] < 0.9 * losses[0]
    model, _ = load(tmp_path / "s")
    teacher, _ = load(digits_run)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in teacher.state_dict().items())
    Z = model.sample_latents(torch.arange(40) % 10, Sampling(), seeded())

    def decode(method, **options):
        return model.decode(Z, Sampling(inverse=method, **options))
    exact = decode("exact")
    with torch.no_grad():
        own, fresh = (m.distiller(noise=0.0)(exact, None, None)["loss"].mean() for m in (model, teacher))
    assert own < fresh
    for method, tol in itertools.product(("parallel", "refined"), (1e-2, 1e-3, 1e-4)):
        assert (decode(method, tol=tol) - exact).abs().max() < tol
    student = decode("student")
    assert torch.equal(model.decode(Z, Sampling()), student)  # the default
    assert torch.equal(decode("refined", max_passes=0), student)  # one end of the dial
    errors = [(decode("refined", tol=0, max_passes=k) - exact).abs().mean() for k in (0, 2, 6, 15)]
    assert errors[0] > errors[1] > errors[2] > errors[3] and errors[3] < 1e-5
    with pytest.raises(ValueError, match="without a student"):
        teacher.flow.inverse(Z, "student")
    content = torch.load(tmp_path / "s" / "ckpt.pt", weights_only=True)
    content["config"]["flow_layers"] = 2
    torch.save(content, tmp_path / "wrong.pt")
    with pytest.raises(UserError, match="config"):
        load(tmp_path / "wrong.pt")
    fails(capsys, train, ["--distill", tmp_path / "s", "--out", tmp_path / "t"], "student already")
    fails(capsys, train, ["--distill", digits_run, "--out", tmp_path / "t", "--flow-layers", "3"], "teacher")


def test_jacobi_survives_non_finite_values_and_stops_per_image():
    block = randomised().flow.blocks[0]
    z = torch.randn(3, 16, 12, dtype=torch.float64)
    exact = block.inverse(z)
    guess = z.clone()
    guess[1, 3:] = math.nan
    guess[2] = 1e200  # its square overflows
    x, passes = block.inverse_jacobi(z, guess, tol=1e-6)
    assert (x - exact).abs().max() < 1e-5 and (passes <= 15).all()
    x, passes = block.inverse_jacobi(z, torch.cat([exact[:1], z[1:]]), tol=1e-4)
    assert passes[0] == 1 and (passes[1:] > 1).all()


# ------------------------------------------------------------------------------------------ training's parts, by value
def test_noise_and_learning_rate_by_value():
    settings = train.Train(steps=1000, noise_start=0.1, noise_end=0.005, lr=2e-3, lr_end=0.01, warmup=100)
    assert [train.sigma_at(settings, s) for s in (0, 1000)] == pytest.approx([0.1, 0.005])
    assert train.sigma_at(settings, 500) == pytest.approx(0.0525)
    assert train.sigma_at(settings, 250) == pytest.approx(0.005 + 0.095 * (1 + math.sqrt(0.5)) / 2)
    assert train.sigma_at(dataclasses.replace(settings, noise="uniform"), 5) is None
    assert train.sigma_at(dataclasses.replace(settings, noise="rgb", noise_start=8.0), 0) == 8.0
    assert train.lr_at(settings, 0) == pytest.approx(2e-3 / 100, rel=1e-4)  # linear warm-up from the first step on
    assert train.lr_at(settings, 49) == pytest.approx(1e-3 * (0.01 + 0.99 * (1 + math.cos(math.pi * 0.049)) / 2))
    assert train.lr_at(settings, 500) == pytest.approx(2e-3 * (0.01 + 0.99 / 2))
    assert train.lr_at(settings, 1000) == pytest.approx(2e-5)


def test_labels_are_dropped_by_seed_and_item_alone():
    settings, config = train.Train(label_drop=0.25, seed=3), dataclasses.replace(SMALL, num_classes=10)
    uid, labels = torch.arange(4000), torch.arange(4000) % 10
    got = train.dropped(labels, uid, settings, config)
    kept = got == labels
    assert (got[~kept] == 10).all() and abs(float(kept.float().mean()) - 0.75) < 0.03
    assert torch.equal(train.dropped(labels[100:200], uid[100:200], settings, config), got[100:200])
    other = train.dropped(labels, uid, dataclasses.replace(settings, seed=4), config)
    assert (other != got).float().mean() > 0.2
    assert torch.equal(train.dropped(labels, uid, dataclasses.replace(settings, label_drop=0.0), config), labels)
    unconditional = dataclasses.replace(config, num_classes=0)
    assert (train.dropped(labels, uid, settings, unconditional) == 0).all()

    @dataclasses.dataclass
    class InItems:
        num_classes: int = 10
        images_per_item: int = 4
    got = train.dropped(labels, uid, settings, InItems())
    drop = (got == 10).view(-1, 4)
    assert torch.equal(drop.all(1), drop.any(1)) and 0.15 < float(drop[:, 0].float().mean()) < 0.35


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_groups(optimizer):
    """Weight decay on matrices, embeddings among them, not on biases and norms; Muon has the layers' matrices."""
    model = Farmer(SMALL)
    names = {id(p): name for name, p in model.named_parameters()}
    opts = train.optimizers(model, optimizer, lr=1e-3, weight_decay=0.03)
    found = {}
    for opt in opts:
        for group in opt.param_groups:
            for p in group["params"]:
                assert id(p) not in found
                found[id(p)] = type(opt).__name__, group["weight_decay"], group["lr"]
    assert found.keys() == names.keys()
    matrices = ("qkv.weight", "out.weight", "up.weight", "down.weight")
    for key, name in names.items():
        flat = name.endswith("bias") or "norm" in name
        in_layer = ".layers." in name and name.endswith(matrices)
        expected = "Muon" if optimizer == "muon" and in_layer else "AdamW"
        assert found[key] == (expected, 0.0 if flat else 0.03, 1e-3), name
    assert opts[0].param_groups[0]["betas"] == (0.9, 0.95)


@pytest.mark.parametrize("fast", [True, False])
def test_muon_is_in_float32_where_bfloat16_is_emulated(fast, monkeypatch):
    """The update is orthogonal, up to the iteration's own spread of singular values."""
    class Dtypes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            seen.add(getattr(result, "dtype", None))
            return result
    seen, parameter = set(), torch.nn.Parameter(torch.zeros(24, 8))
    monkeypatch.setattr("support.optimize.bf16_is_fast", lambda device: fast)
    parameter.grad = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    with Dtypes():
        Muon([parameter], lr=1.0, weight_decay=0.0, adjust_lr_fn="original").step()
    assert (torch.bfloat16 in seen) == fast and parameter.dtype == torch.float32
    values = torch.linalg.svdvals(parameter.detach()) / math.sqrt(3)  # the rate is scaled by sqrt(24 / 8)
    assert 0.5 < float(values.min()) and float(values.max()) < 1.5


# ------------------------------------------------------------------------------------------ training
def logged(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").open()]


def test_resume_after_kill_is_the_same_run_to_the_bit(tmp_path, tiny_data):
    """Two undisturbed runs agree; so does one that is killed with -9 again and again; the log has every line once.

    With Muon, beside which AdamW has the parameters that are not in layers.
    """
    flags = [*SMALL_FLAGS, "--data", tiny_data, "--steps", "40", "--save-every", "3", "--optimizer", "muon"]
    deadline, kills = time.time() + 300, 0
    while kills < 2:
        ready = tmp_path / "b" / "ckpt.pt"
        before = ready.stat().st_mtime_ns if ready.exists() else 0
        process = command("train.py", "--out", tmp_path / "b", "--resume", *flags)
        while process.poll() is None and (not ready.exists() or ready.stat().st_mtime_ns == before):
            time.sleep(0.01)  # until this process has saved something of its own
        time.sleep(0.03 * kills)
        process.kill()
        process.wait()
        kills += 1
    process = command("train.py", "--out", tmp_path / "b", "--resume", *flags)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other processes: rounding depends on it
    train.main(["--out", str(tmp_path / "a"), *map(str, flags)])
    torch.set_num_threads(threads)
    succeeds(process)
    assert time.time() < deadline
    assert same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))
    a, b = logged(tmp_path / "a"), logged(tmp_path / "b")
    assert [line["step"] for line in a] == [line["step"] for line in b] and a[-1]["lr"] == b[-1]["lr"]


def test_uniform_run_reports_bits_and_a_non_finite_loss_keeps_the_checkpoint(tmp_path, tiny_data, capsys):
    flags = [*SMALL_FLAGS, "--data", str(tiny_data), "--noise", "uniform", "--save-every", "5", "--holdout", "2"]
    train.main(["--out", str(tmp_path / "a"), "--steps", "10", *flags])
    bits = [line["bits_per_dim"] for line in logged(tmp_path / "a") if "bits_per_dim" in line]
    nats = [line["nats_per_dim"] for line in logged(tmp_path / "a") if "nats_per_dim" in line]
    assert bits == pytest.approx([n / math.log(2) + 7 for n in nats]) and bits
    capsys.readouterr()
    train.main(["--eval", str(tmp_path / "a")])
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 20
    assert abs(result["bits_per_dim"] - (result["nats_per_dim"] / math.log(2) + 7)) < 1e-9
    diverge = ["--steps", "30", "--lr", "1e30", "--warmup", "0", "--guard", "0"]
    fails(capsys, train, ["--out", tmp_path / "b", *diverge, *flags], "not finite", "ckpt.pt")
    assert all(w.isfinite().all() for w in weights(tmp_path / "b").values())


def test_data_that_fails_in_the_middle_of_a_run_costs_no_step(tmp_path, tiny_data, monkeypatch):
    def failing(*args, **kwargs):
        yield from itertools.islice(batches(*args, **kwargs), 7)
        raise UserError("the disk with the images went away")
    monkeypatch.setattr(train, "batches", failing)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "ckpt.pt.123.tmp").write_bytes(b"of a killed save")
    with pytest.raises(UserError, match="went away.*holds step 7"):
        train.main(["--out", str(tmp_path / "a"), "--steps", "20", *SMALL_FLAGS, "--data", str(tiny_data)])
    assert load(tmp_path / "a")[1]["step"] == 7 and not list((tmp_path / "a").glob("*.tmp"))


def test_unconditional_run_from_a_flat_folder(tmp_path, capsys):
    data = digits(20, 16, 3, seed=5)
    (tmp_path / "flat").mkdir()
    for i, pixels_of in enumerate(data.array):
        Image.fromarray(pixels_of).save(tmp_path / "flat" / f"{i}.png")
    run = str(tmp_path / "run")
    train.main(["--out", run, "--steps", "6", *SMALL_FLAGS, "--data", str(tmp_path / "flat"), "--num-classes", "0",
                "--holdout", "5", "--clip", "0"])
    assert Image.open(tmp_path / "run" / "samples.png").size[0] > 100
    capsys.readouterr()
    train.main(["--eval", run, "--data", str(tmp_path / "run" / ".." / "flat")])  # the same by another name: held out
    result = json.loads(capsys.readouterr().out)
    parts = result["informative"] + result["redundant"] - result["logdet"]
    assert result["images"] == 5 and abs(result["nats_per_dim"] - parts) < 1e-6
    sample.main([run, "--num", "3", "--out", str(tmp_path / "x.npz")])
    line = logged(tmp_path / "run")[0]
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

    def refuse(*_):
        raise PermissionError
    monkeypatch.setattr(os, "link", refuse)  # a file system without hard links
    train.main(["--out", str(tmp_path / "b"), "--resume", "--keep", "1"])
    assert same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert load(tmp_path / "b" / "ckpt-12.pt")[1]["step"] == 12


def test_average_is_the_recursion_by_hand():
    p = nn.Parameter(torch.zeros(3))
    average, expected = Average([p], 0.5), np.zeros(3)
    for n in range(12):
        p.data = torch.tensor([1.0, n, n**2])
        average.update(n)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * np.array([1.0, n, n**2])
    assert average.values[0].numpy() == pytest.approx(expected)
    average.swap()
    assert p.detach().numpy() == pytest.approx(expected) and average.values[0].tolist() == [1, 11, 121]


DRIVER = """
import importlib, json, sys
from support import distributed
leave, distributed.leave = distributed.leave, lambda: None  # one process group for all
for name, argv in json.loads(sys.argv[1]):
    importlib.import_module(name).main(argv)
leave()
"""
SHARDING = {"ddp": ["--micro-batch", "2"], "fsdp": ["--fsdp", "--checkpointing"],  # accumulation, recomputation
            "muon": ["--optimizer", "muon"]}
TWENTY = [*SMALL_FLAGS, "--steps", "20", "--log-every", "1", "--warmup", "5"]
SEVEN = ["-n", "7", "--labels", "1,4", "--batch-size", "3", "--device", "cpu"]


@pytest.fixture(scope="session")
def in_two_processes(tmp_path_factory, tiny_data, digits_run) -> Path:
    """Runs of SHARDING and samples.npz that two processes made, one start of them for all; one*/ by one process."""
    place = tmp_path_factory.mktemp("two")
    jobs = [("train", ["--out", str(place / name), "--data", str(tiny_data), *TWENTY, *flags])
            for name, flags in SHARDING.items()]
    jobs.append(("sample", [str(digits_run), "--out", str(place / "samples.npz"), *SEVEN]))
    (place / "driver.py").write_text(DRIVER)
    process = torchrun(place / "driver.py", json.dumps(jobs), PYTHONPATH=str(REPOSITORY))
    for name, flags in (("one", []), ("one-muon", SHARDING["muon"])):
        train.main(["--out", str(place / name), "--data", str(tiny_data), *TWENTY, *flags])
    succeeds(process)
    return place


@pytest.mark.parametrize("sharding", SHARDING)
def test_two_processes_are_the_same_run_as_one(in_two_processes, sharding):
    """Same global batch: losses within 1e-5 over 20 steps; the checkpoint loads in a single process."""
    runs = [in_two_processes / name for name in ("one-muon" if sharding == "muon" else "one", sharding)]
    losses = [[line["nats_per_dim"] for line in logged(run) if "nats_per_dim" in line] for run in runs]
    assert len(losses[0]) == 20 and np.abs(np.subtract(*losses)).max() < 1e-5 and losses[0][0] - losses[0][-1] > 0.01
    a, b = (load(run)[0].sample(torch.arange(4), Sampling(), seeded()) for run in runs)
    assert torch.allclose(a, b, atol=1e-2)
    train.main(["--out", str(runs[1]), "--resume", "--steps", "21"])  # its optimizer state loads, too


# ------------------------------------------------------------------------------------------ sampling
def npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path) as f:
        return f["images"], f["labels"]


def test_sample_py(tmp_path, digits_run):
    argv = [str(digits_run), "--out", str(tmp_path / "x.png")]
    sample.main([*argv, "--num", "6", "--labels", "3,7"])
    assert Image.open(tmp_path / "x.png").size[0] > 100
    options = ["--guidance", "1", "--T-sigma", "0.9", "--inverse", "parallel"]
    sample.main([str(digits_run), "--num", "5", "--labels", "3,7", "--out", str(tmp_path / "x.npz"), *options])
    images, labels = npz(tmp_path / "x.npz")
    assert images.shape == (5, 16, 16, 3) and images.dtype == np.uint8 and labels.tolist() == [3, 7, 3, 7, 3]


def test_sampling_in_two_processes_is_the_same(tmp_path, digits_run, in_two_processes):
    sample.main([str(digits_run), "--out", str(tmp_path / "one.npz"), *SEVEN])
    (one, labels), (two, other) = npz(tmp_path / "one.npz"), npz(in_two_processes / "samples.npz")
    assert labels.tolist() == other.tolist() == [1, 4, 1, 4, 1, 4, 1]
    assert one.shape == two.shape and np.abs(one.astype(int) - two).mean() < 0.05  # batches differ: rounding


@pytest.mark.parametrize("extra, word", [
    ("--num 0", "--num"), ("--guidance -1", "guidance"), ("--guidance nan", "guidance"), ("--labels 3,11", "11"),
    ("--labels a", "--labels"), ("--out x.gif", "x.gif"), ("--out /nonexistent/x.png", "nonexistent"),
    ("--inverse student", "student"), ("--T-sigma-v 0", "T_sigma_v"), ("--nonsense 1", "nonsense"),
    ("--guid 1", "guid"), ("--seed -1", "seed"), ("--batch-size 0", "batch-size"), ("--s-c 100000000", "s_c")])
def test_sample_py_refuses(tmp_path, digits_run, capsys, extra, word):
    fails(capsys, sample, [digits_run, "--out", tmp_path / "x.png", *extra.split()], word)
    fails(capsys, sample, [tmp_path], "ckpt.pt")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ bad input of train.py
@pytest.mark.parametrize("extra, words", [
    ("--data /nonexistent", "/nonexistent"), ("--patch-size 5", "patch_size"), ("--lr nan", "lr"),
    ("--informative-dim 99", "informative_dim"), ("--steps 0", "steps"), ("--batch-size 0", "batch_size"),
    ("--noise pink", "pink"), ("--nonsense 1", "nonsense"), ("--label-drop 1", "label_drop"), ("--seed -1", "seed"),
    ("--data DATA --num-classes 5", "num_classes"), ("--data DATA --image-size 32", "16"), ("--fsdp", "torchrun"),
    ("--micro-batch 7", "batch_size"), ("--data DATA --holdout 6", "hold out"), ("--out /proc/x", "/proc/x"),
    ("--out RUN", "already holds --resume"), ("--out RUN --resume --flow-blocks 3", "flow_blocks 2 3"),
    ("--out RUN --resume --lr 1", "lr"), ("--eval NEW", "checkpoint"), ("--save-every 0", "--save-every"),
    ("--workers -1", "--workers"), ("--seed 99999999999999999999999", "seed"), ("--num-classes 5", "num_classes"),
    ("--eval RUN --flow-blocks 7", "flow_blocks"), ("--eval RUN --seed 3", "seed"), ("--eval RUN --distill x", "one")])
def test_train_py_refuses(tmp_path, digits_run, tiny_data, capsys, extra, words):
    new = tmp_path / "new"
    places = {"DATA": str(tiny_data), "RUN": str(digits_run), "NEW": str(new)}
    before = (digits_run / "ckpt.pt").read_bytes()
    fails(capsys, train, ["--out", new, *(places.get(word, word) for word in extra.split())], *words.split())
    assert not new.exists() and (digits_run / "ckpt.pt").read_bytes() == before


def test_a_set_with_many_broken_images_is_refused(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    for i in range(6):
        Image.new("RGB", (16, 16)).save(tmp_path / "a" / f"{i}.png")
    for i in range(3, 6):
        (tmp_path / "a" / f"{i}.png").write_bytes(b"")
    with pytest.raises(SystemExit):
        run_script(train.main, ["--out", str(tmp_path / "new"), "--data", str(tmp_path), *SMALL_FLAGS])
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


# ------------------------------------------------------------------------------------------ rooms
def sources(folder: str = ".") -> list[Path]:
    """The project's Python files in a folder, tests left out."""
    return [p for p in sorted((REPOSITORY / folder).glob("*.py")) if not p.name.startswith(("test_", "conftest"))]


MODELS = [REPOSITORY / "farmer.py", *sources("baselines")]
SCRIPTS = [REPOSITORY / f"{name}.py" for name in ("train", "sample", "fid")]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, and what it imports from it: support.data, support.data.digits, ..."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def rooms(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def test_who_imports_whom():
    """Models import nothing from support/, support/ no script and no model, scripts no model."""
    models, scripts = {"farmer", "baselines"}, {"train", "sample", "fid"}
    assert {p.stem for p in sources()} == {"farmer", *scripts}  # a new room needs a rule
    for path in MODELS:
        assert not rooms(path) & ({"support"} | scripts), path
    for path in sources("support"):
        assert not rooms(path) & (models | scripts), path
    for path in SCRIPTS:
        assert not rooms(path) & models and not rooms(path) & (scripts - {path.stem}), path


def test_scripts_know_no_part_of_a_model():
    """No isinstance, no attribute that only FARMER has, no name of one of its classes."""
    parts = {"flow", "prior", "student", "new_student", "informative", "redundant", "sample_latents", "decode"}
    classes = {name for name, value in vars(farmer).items() if isinstance(value, type) and value.__module__ == "farmer"}
    classes -= {"Config", "Sampling"}  # of the seam
    for path in SCRIPTS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name):
                assert node.id != "isinstance" and node.id not in classes, f"{path.name}: {node.id}"
            if isinstance(node, ast.Attribute):
                assert node.attr not in parts | classes, f"{path.name}: .{node.attr}"


def test_files_are_as_short_as_promised():
    limits = {"farmer.py": 900, "train.py": 300, "sample.py": 120, "fid.py": 300}
    for name, limit in limits.items():
        assert len((REPOSITORY / name).read_text().splitlines()) <= limit, name
    for path in REPOSITORY.rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 120, f"{path}:{number}"


@pytest.mark.parametrize("name", ["farmer", "baselines.arflow", "baselines.jetformer", "baselines.tarflow"])
def test_every_preset_has_settings_that_train_py_takes(name):
    module = model_file(name)
    assert module.TRAINING.keys() == module.PRESETS.keys()
    for settings in module.TRAINING.values():
        train.Train(**settings)


# ------------------------------------------------------------------------------------------ the seam, and forks
def python_files(text: str) -> dict[str, str]:
    """The Python blocks of a Markdown text that begin with a file's name, as name -> content."""
    blocks = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", text, re.DOTALL)
    return dict(blocks)


FORKS = python_files((REPOSITORY / "README.md").read_text())
FORKS["mine"] = "".join(line + "\n" for line in FORKS["mine"].splitlines() if line)


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """Writes a fork's file into an empty current folder -> its module."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])

    def write(name: str):
        (tmp_path / f"{name}.py").write_text(FORKS[name])
        return model_file(name)
    return write


def trains_and_samples(name: str, data: Path, *flags: str) -> None:
    """With the scripts alone; the loss falls."""
    train.main(["--model", name, "--out", "run", "--data", str(data), "--steps", "30", "--warmup", "0", *flags])
    losses = [line["loss"] for line in logged(Path("run")) if "loss" in line]
    assert losses[-1] < losses[0]
    sample.main(["run", "--num", "4", "--out", "x.npz"])
    assert npz(Path("x.npz"))[0].shape == (4, 16, 16, 3)


def test_fork_with_another_noise_law(fork, tiny_data):
    module = fork("logistic")
    torch.manual_seed(0)
    gmm = module.Logistics(*random_gmm(6, K=3, d=2))
    z = torch.randn(6, 2)
    parts = stats.logistic.logpdf(z[:, None], gmm.mu, gmm.log_sigma.exp()).sum(-1)  # (6, K)
    exact = np.log((gmm.logits.softmax(-1).numpy() * np.exp(parts)).sum(-1))
    assert np.allclose(gmm.log_prob(z), exact, atol=1e-4)
    assert torch.allclose(gmm.shared_log_prob(z[:, None])[:, 0], gmm.log_prob(z), atol=1e-5)
    one = module.Logistics(*(t[:, :1] for t in doubled(1)))
    drawn = one.sample(torch.rand(2, 20_000), module.Logistics.noise(2, 20_000, 1))[0, :, 0].numpy()
    law = stats.logistic(float(one.mu[0, 0, 0]), float(one.log_sigma[0, 0, 0].exp()))
    assert stats.kstest(drawn, law.cdf).pvalue > 0.01
    model = module.Model(SMALL)
    assert type(model.prior(torch.randn(1, 16, 5), torch.tensor([0]))[0]) is module.Logistics
    trains_and_samples("logistic", tiny_data, *SMALL_FLAGS)


def test_fork_with_a_conditional_flow(fork, tiny_data):
    module = fork("conditional")
    model = randomised(kind=module.Model)
    images, labels = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2])
    model.condition(labels, 3)
    Z, logdet = model.flow(patchify(images, 2))
    assert (model.flow.inverse(Z, tol=0) - patchify(images, 2)).abs().max() < 1e-9
    assert (model.flow.inverse(Z, "parallel", tol=0) - patchify(images, 2)).abs().max() < 1e-9
    J = torch.autograd.functional.jacobian(lambda x: model.flow(x.view(3, 16, 12))[0][1].flatten(),
                                           patchify(images, 2))[:, 1].flatten(1)
    assert abs(torch.linalg.slogdet(J)[1] - logdet[1]) < 1e-8
    other = model.log_prob(images, torch.tensor([1, 1, 1]))
    assert other.logdet[1] == logdet[1] and (other.logdet - logdet).abs()[[0, 2]].min() > 1e-3
    trains_and_samples("conditional", tiny_data, *SMALL_FLAGS)


class FirstPixels(nn.Module):
    """Features for fid.py: twelve numbers of an image."""
    def forward(self, x: torch.Tensor):
        return x[:, :, 5, 4:8].flatten(1)


def test_a_model_of_ones_own_in_one_file(fork, tiny_data, capsys):
    """A file of 40 lines in the current folder: train, resume, sample, fid and --eval know it by its name alone."""
    fork("mine")
    assert len(Path("mine.py").read_text().splitlines()) <= 40
    plain = ["--log-every", "5", "--sample-every", "0", "--val-every", "0", "--batch-size", "8", "--workers", "0",
             "--device", "cpu", "--warmup", "0"]
    trains_and_samples("mine", tiny_data, *plain, "--save-every", "10", "--keep", "3", "--ema", "0.9")
    Path("again").mkdir()
    Path("run/ckpt-10.pt").rename("again/ckpt.pt")
    train.main(["--resume", "--out", "again"])  # the model's name comes from the checkpoint
    assert same_weights(weights(Path("run")), weights(Path("again")))
    sample.main(["run", "--num", "6", "--temperature", "0", "--labels", "2", "--out", "means.npz"])
    images, labels = npz(Path("means.npz"))
    assert (images == images[0]).all() and labels.tolist() == [2] * 6
    torch.jit.script(FirstPixels()).save("features.pt")
    capsys.readouterr()
    fid.main(["run", str(tiny_data), "--num", "40", "--features", "features.pt", "--json", "--workers", "0",
              "--device", "cpu"])
    report = json.loads(capsys.readouterr().out)
    assert report["fd"] > 0 and report["num_samples"] == 40
    train.main(["--eval", "run", "--data", str(tiny_data)])
    assert json.loads(capsys.readouterr().out)["images"] == 60
    fails(capsys, train, ["--distill", "run", "--out", "student"], "mine", "no student")
    fails(capsys, train, ["--model", "mine", "--flow-blocks", "2"], "flow-blocks")
    fails(capsys, sample, ["run", "--out", "x.png", "--guidance", "1"], "guidance")


@pytest.mark.parametrize("code, words", [
    ("", "defines no Config"), ("import nothing_of_that_name", "nothing_of_that_name"), ("x = (", "SyntaxError"),
    ("from farmer import Config, PRESETS, TRAINING, Model", "defines no Sampling")])
def test_a_file_that_is_no_model_is_one_line(fork, tmp_path, capsys, code, words):
    (tmp_path / "mine.py").write_text(code)
    fails(capsys, train, ["--model", "mine", "--out", tmp_path / "run"], "mine.py", words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["train", "support.run", "no_such", "os.path", "../mine", "mine.py", "", "a b"])
def test_a_name_that_is_no_model(tmp_path, capsys, name):
    fails(capsys, train, ["--model", name, "--out", tmp_path / "run", "--dry-run"], "--model")


def test_a_field_with_the_name_of_a_flag_is_refused(fork, tmp_path, capsys):
    code = FORKS["mine"].replace("temperature", "batch_size")
    (tmp_path / "mine.py").write_text(code)
    train.main(["--model", "mine", "--out", "run", "--steps", "1", "--workers", "0", "--sample-every", "0"])
    fails(capsys, sample, ["run", "--out", "x.png"], "batch_size", "rename")


def test_python_in_the_readme_runs(tmp_path, digits_run, monkeypatch):
    """Its blocks that are no files, one after another, where runs/tiny is there."""
    blocks = re.findall(r"```python\n(?!# \w+\.py\n)(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(digits_run)
    monkeypatch.chdir(tmp_path)
    scope = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
