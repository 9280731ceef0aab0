"""Tests of baselines/jetformer.py, each on weights that are not the initial ones: there the flow is the identity."""
import dataclasses
import math

import pytest
import torch

import farmer
from baselines import jetformer
from baselines.jetformer import PRESETS, TRAINING, Config, Model, Sampling

SMALL = dict(image_size=8, flow_blocks=4, flow_layers=1, flow_width=32, head_dim=16, ar_layers=2, ar_width=64,
             informative_dim=20, informative_mixtures=3, class_tokens=2, num_classes=3)


def model_of(seed: int = 0, scale: float = 0.1, dtype=torch.float64, **fields):
    """A small model with randomised weights."""
    torch.manual_seed(seed)
    model = Model(Config(**SMALL | fields)).to(dtype).eval()
    for p in model.parameters():
        p.data += scale * torch.randn_like(p)
    return model


def images_of(model, B: int = 3, seed: int = 1):
    c, dtype = model.config, model.flow.mean.dtype
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(B, c.channels, c.image_size, c.image_size, generator=g, dtype=dtype) - 1


def generators(B: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 * seed + i) for i in range(B)]


def ks(samples: torch.Tensor, cdf) -> float:
    """The Kolmogorov-Smirnov distance of samples (n,) from a law, times sqrt(n): below 1.63 in 99 of 100 cases."""
    x, _ = samples.double().sort()
    n, p = len(x), cdf(x)
    steps = torch.arange(n + 1) / n
    return n**0.5 * float(torch.maximum((steps[1:] - p).abs(), (p - steps[:-1]).abs()).max())


def normal_cdf(mu: float, sigma: float):
    return lambda x: 0.5 * (1 + torch.erf((x - mu) / (sigma * 2**0.5)))


# ------------------------------------------------------------------------------------------ the flow
@pytest.mark.parametrize("kind", [dict(), dict(spatial_every=1, flow_blocks=6), dict(spatial_every=2)])
def test_inverse_is_exact_and_the_determinant_is_autograds(kind):
    model = model_of(channels=1, image_size=4, patch_size=2, informative_dim=3, **kind)  # N 4, d 4
    X = farmer.patchify(images_of(model), 2)
    Z, logdet = model.flow(X)
    assert (Z - X).abs().max() > 0.1
    assert (model.flow.inverse(Z) - X).abs().max() < 1e-9
    for x, expected in zip(X, logdet, strict=True):
        J = torch.autograd.functional.jacobian(lambda x: model.flow(x[None])[0][0], x).view(16, 16)
        assert abs(torch.linalg.slogdet(J)[1] - expected) < 1e-9


def test_inverse_in_float32_of_the_digits_preset():
    torch.manual_seed(0)
    model = Model(PRESETS["digits"])
    for p in model.flow.parameters():
        p.data += 0.02 * torch.randn_like(p)
    X = farmer.patchify(images_of(model), 4)
    with torch.autocast("cpu", torch.bfloat16):
        Z, logdet = model.flow(X)
    assert Z.dtype == logdet.dtype == torch.float32  # shift, scale and determinant are outside of autocast
    assert (model.flow.inverse(model.flow(X)[0]) - X).abs().max() < 1e-4


def test_flow_starts_as_the_identity_and_its_scale_is_bounded():
    torch.manual_seed(0)
    model = Model(Config(**SMALL))
    X = farmer.patchify(images_of(model), 4)
    Z, logdet = model.flow(X)
    assert torch.equal(Z, X) and not logdet.any()
    for coupling in model.flow.blocks:
        coupling.to_b_s.bias.data[24:] = 50.0  # s; b comes first
    Z, logdet = model.flow(X)
    assert torch.allclose(logdet, torch.tensor(4 * 4 * 24 * math.log(2)))  # n/2 ln 2 for each of N d numbers at most
    model.flow.blocks[0].to_b_s.bias.data.zero_()[:24] = 0.5
    assert (model.flow.blocks[0](X)[0] - X).abs().max() == 0.5  # a shift of x2 before the scale 2 sigmoid(0) = 1


def test_halves_of_each_kind():
    config = Config(**SMALL | dict(image_size=16, spatial_every=5, flow_blocks=30))
    N, d, half = 16, 48, 16 * 24
    firsts = []
    for t, coupling in enumerate(Model(config).flow.blocks):
        assert coupling.order.sort()[0].tolist() == list(range(N * d))
        x1 = torch.zeros(N * d).index_fill(0, coupling.order[:half], 1).view(N, d)
        if t % 5 < 4:  # four channel couplings: the same half of the channels of each token
            assert x1.sum(1).tolist() == [24] * N and (x1 == x1[0]).all()
        else:  # one spatial coupling: all channels of half of the tokens
            assert (x1 == x1[:, :1]).all()
            firsts.append(x1[:, 0].view(4, 4).tolist())
    board, columns, rows = [[1, 0, 1, 0], [0, 1, 0, 1]] * 2, [[1, 0, 1, 0]] * 4, [[1] * 4, [0] * 4] * 2
    swapped = [[[1 - x for x in row] for row in kind] for kind in (board, columns, rows)]
    assert firsts == [board, swapped[0], columns, swapped[1], rows, swapped[2]]


def test_attention_of_the_flow_sees_all_tokens():
    model = model_of()
    X = farmer.patchify(images_of(model), 4)
    other = X.clone()
    other[:, -1] += 1
    assert (model.flow(other)[0] - model.flow(X)[0])[:, 0].abs().max() > 1e-6


# ------------------------------------------------------------------------------------------ the density
@pytest.mark.parametrize("informative_dim", [1, 2])
def test_density_integrates_to_one(informative_dim):
    """Two pixels, as one token: all of them informative, or one of them normal."""
    class TwoPixels(Config):
        token_dim = property(lambda self: 2)

    torch.manual_seed(0)
    fields = dict(image_size=1, patch_size=1, channels=1, informative_dim=informative_dim)
    model = Model(TwoPixels(**SMALL | fields)).double()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model.patches = lambda images: images.view(-1, 1, 2)
    axis = torch.linspace(-8, 8, 121, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        total, _, _, logdet = model.log_prob(grid, torch.ones(len(grid), dtype=torch.long))
    assert logdet.std() > 0.1
    assert abs(float(total.exp().sum()) * float(axis[1] - axis[0]) ** 2 - 1) < 1e-3


def test_log_prob_is_jetformers_formula():
    """Bits per dimension of published JetFormer, with 256 levels on [-1, 1], are nats_per_dim / ln 2 + 7."""
    model = model_of()
    x, labels = images_of(model), torch.tensor([0, 2, 3])
    p = model.log_prob(x, labels)
    D = x[0].numel()
    Z, logdet = model.flow(farmer.patchify(x, 4))
    gmm, _ = model.prior(Z[..., :20], labels)
    components = torch.distributions.Independent(torch.distributions.Normal(gmm.mu, gmm.log_sigma.exp()), 1)
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=gmm.logits), components)
    nll = -mixture.log_prob(Z[..., :20]).sum(1) - torch.distributions.Normal(0, 1).log_prob(Z[..., 20:]).sum((1, 2))
    bits = nll / (D * math.log(2)) - (logdet / D - math.log(128)) / math.log(2)
    assert torch.allclose(-p.total / D / math.log(2) + 7, bits)
    quiet = model_of(latent_noise=0.0, dropout=0.0)
    terms = quiet(x, labels, generators(3))
    assert torch.allclose(terms["nats_per_dim"], -p.total / D) and torch.equal(terms["loss"], terms["nats_per_dim"])
    assert torch.allclose(terms["loss"], terms["informative"] + terms["redundant"] - terms["logdet"])


def test_noise_of_training_comes_from_the_images_generators_alone():
    model = model_of()
    x, labels = images_of(model), torch.tensor([0, 2, 3])
    loss = model(x, labels, generators(3))["loss"]
    torch.manual_seed(5)
    assert torch.allclose(model.train()(x, labels, generators(3))["loss"], loss)
    for i, g in enumerate(generators(3)):
        assert torch.allclose(model(x[i:i + 1], labels[i:i + 1], [g])["loss"], loss[i])
    assert not torch.allclose(model(x, labels, generators(3, seed=1))["loss"], loss)
    loss.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    still = model.log_prob(x, labels).total
    assert torch.equal(model.log_prob(x, labels).total, still)  # nothing random in evaluation
    assert torch.equal(model_of().log_prob(x).total, model.log_prob(x, torch.full((3,), 3)).total)


def test_latent_noise_and_dropout_are_of_the_size_that_they_say():
    torch.manual_seed(0)
    model = Model(Config(**SMALL | dict(dropout=0.25, latent_noise=0.5))).double()  # the flow is the identity
    seen = []
    model.prior.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    keeps = []
    model.prior.layers[0].register_forward_pre_hook(lambda _, args: keeps.append(args[3]))
    x = images_of(model, 64)
    model(x, torch.zeros(64, dtype=torch.long), generators(64))
    std = (seen[0] - farmer.patchify(x, 4)[..., :20]).std((1, 2))
    assert 0 < std.min() < 0.05 and 0.4 < std.max() < 0.55 and 0.2 < std.mean() < 0.3  # uniform on [0, 0.5]
    assert keeps[0].unique().tolist() == [0.0, 1 / 0.75] and abs(keeps[0].double().mean() - 1) < 0.02


# ------------------------------------------------------------------------------------------ the AR
def test_ar_is_causal_and_sampling_goes_through_the_same_function():
    model = model_of()
    Z_I, labels = torch.randn(2, 4, 20, dtype=torch.float64), torch.tensor([0, 3])
    gmm, _ = model.prior(Z_I, labels)
    for i in range(4):
        other = Z_I.clone()
        other[:, i] += 1
        changed = (model.prior(other, labels)[0].mu - gmm.mu).abs().amax((0, 2, 3)) > 1e-9
        assert changed.tolist() == [j > i for j in range(4)]
    prior, h = model.prior, torch.cat([model.prior.prefix(labels), model.prior.embed(Z_I[:, :-1])], 1)
    cache = [farmer.KVCache(2, 1, 7, 64, h, static=False) for _ in prior.layers]
    steps = [prior.transformer(h[:, :4], 0, cache), *(prior.transformer(h[:, t:t + 1], t, cache) for t in (4, 5, 6))]
    assert torch.allclose(torch.cat(steps, 1), prior.transformer(h), atol=1e-12)


def test_class_tokens_come_from_tables_of_their_own():
    prior = model_of().prior
    labels = torch.arange(4)
    prefix = prior.prefix(labels)  # BOS, two class tokens, BOI
    assert prefix.shape == (4, 4, 64) and (prefix[:, 0] == prefix[0, 0]).all() and (prefix[:, 3] == prefix[0, 3]).all()
    assert len(torch.cat([prefix[:, 1], prefix[:, 2], prefix[:1, 0], prefix[:1, 3]]).unique(dim=0)) == 10


def test_rotary_positions_are_relative_and_pair_the_halves():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    at = torch.tensor([3.0])
    scores = [(jetformer.rotate(q, at + s) * jetformer.rotate(k, at + s + 5)).sum().item() for s in (0, 4, 90)]
    assert max(scores) - min(scores) < 1e-4
    x = torch.zeros(1, 1, 1, 8)
    x[..., 1] = 1
    turned = jetformer.rotate(x, at).flatten()  # the pair (1, 5), of frequency 1e4^(-1/4)
    assert torch.allclose(turned[[1, 5]], torch.tensor([math.cos(0.3), math.sin(0.3)]))
    assert turned.count_nonzero() == 2


def test_head_starts_as_one_normal_of_different_components():
    torch.manual_seed(0)
    prior = Model(Config(**SMALL)).prior
    gmm = prior.head(torch.randn(5, 64))
    assert not gmm.logits.any() and not gmm.log_sigma.any()  # sigma = squareplus(0) = 1
    assert 0.01 < gmm.mu.std() < 0.03 and (gmm.mu[:, 0] != gmm.mu[:, 1]).all()
    prior.head.linear.bias.data[3 + 60:] = torch.linspace(-3, 3, 60)
    r = torch.linspace(-3, 3, 60)
    assert torch.allclose(prior.head(torch.zeros(64)).log_sigma.exp().flatten(), (r + (r**2 + 4).sqrt()) / 2)
    prior.head.linear.bias.data[3 + 60:] = -1e30
    assert torch.allclose(prior.head(torch.zeros(64)).log_sigma.exp(), torch.tensor(1e-6))


# ------------------------------------------------------------------------------------------ guidance
@pytest.mark.parametrize("method", ["reject", "closed"])
@pytest.mark.parametrize("mu_u, sigma_u, w", [(-0.5, 1.2, 1.0), (0.3, 0.9, 3.0), (0.2, 0.6, 1.0)])
def test_guidance_follows_its_one_dimensional_target(method, mu_u, sigma_u, w):
    """N(mu_c, sigma_c)^{1+w} N(mu_u, sigma_u)^{-w} of the component that pi_c chose; the last one has no normal."""
    n, mu_c, sigma_c = 3000, 0.2, 0.7
    precision = (1 + w) / sigma_c**2 - w / sigma_u**2
    target = normal_cdf(mu_c, sigma_c)
    if precision > 0:
        mean = ((1 + w) * mu_c / sigma_c**2 - w * mu_u / sigma_u**2) / precision
        target = normal_cdf(mean, precision**-0.5)
    elif method == "reject":
        pytest.skip("its target is no law there")
    mu = torch.tensor([mu_c, 50.0, mu_u, -50.0]).view(2, 2, 1)  # two components of each, the second far away
    log_sigma = torch.tensor([sigma_c, 1.0, sigma_u, 1.0]).log().view(2, 2, 1)
    logits = torch.tensor([[30.0, 0.0], [0.0, 30.0]])  # pi_u, which prefers the other one, is not used
    p = farmer.GMM(*(t.repeat_interleave(n, 0) for t in (logits, mu, log_sigma)))
    options, g = Sampling(guidance=w, guidance_method=method), torch.Generator().manual_seed(0)
    noise = farmer.Noise.new(n, (1,), 1, (1,), g, mu)
    x = jetformer.draw(p, options, noise, g)
    assert x.shape == (n, 1, 1) and ks(x.flatten(), target) < 1.63
    assert ks(x.flatten(), normal_cdf(mu_c + 0.2, sigma_c)) > 1.63  # the test can tell


def test_without_a_difference_guidance_changes_nothing_and_temperatures_act():
    n, g = 3000, torch.Generator().manual_seed(0)
    one = farmer.GMM(torch.zeros(2 * n, 1), torch.zeros(2 * n, 1, 1), torch.zeros(2 * n, 1, 1))
    for method in ("reject", "closed"):
        options = Sampling(guidance=3.0, guidance_method=method, T_sigma=0.9)
        x = jetformer.draw(one, options, farmer.Noise.new(n, (1,), 1, (1,), g, one.mu), g)
        assert ks(x.flatten(), normal_cdf(0, 0.9)) < 1.63


@pytest.mark.parametrize("method", ["reject", "closed"])
def test_sampling_runs_two_class_halves_and_each_image_by_itself(method):
    model = model_of()
    labels, options = torch.tensor([0, 1, 2]), Sampling(guidance=2.0, guidance_method=method)
    batches = []
    model.prior.head.register_forward_hook(lambda _, args, out: batches.append(len(args[0])))
    Z = model.sample_latents(labels, options, generators(3))
    assert batches == [6] * 4  # c and null as one doubled batch, once for each token
    alone = [model.sample_latents(labels[i:i + 1], options, [generators(3)[i]]) for i in range(3)]
    assert torch.allclose(torch.cat(alone), Z)
    batches.clear()
    assert not torch.allclose(model.sample_latents(labels, Sampling(), generators(3)), Z) and batches == [3] * 4
    images = model.sample(labels, options, generators(3))
    assert torch.allclose(model.flow(model.patches(images))[0], Z)
    assert not torch.equal(images, model.sample(torch.zeros_like(labels), options, generators(3)))


def test_redundant_part_is_normal_and_scales():
    model = model_of(dtype=torch.float32)
    labels = torch.arange(3).repeat(100)
    Z_R = model.sample_latents(labels, Sampling(T_sigma=0.5))[..., 20:]
    assert ks(Z_R.flatten()[:20_000], normal_cdf(0, 1)) < 1.63
    assert abs(model.sample_latents(labels, Sampling(redundant_scale=0.5))[..., 20:].std() - 0.5) < 0.01


# ------------------------------------------------------------------------------------------ presets, FARMER on Jet
def test_sizes():
    """The totals that papers and code agree on: 1.07 and 2.66 billion; CIFAR-10's is a port's 42 million."""
    sizes = {}
    with torch.device("meta"):
        for name, config in PRESETS.items():
            model = Model(config)
            sizes[name] = [sum(p.numel() for p in part.parameters()) for part in (model.flow, model.prior)]
    assert sizes == {
        "digits": [3_359_488, 849_168], "fashion": [3_328_256, 1_027_088], "cifar10": [15_091_200, 27_130_880],
        "imagenet256-350m": [426_647_552, 641_829_888], "imagenet256-1.3b": [628_400_128, 2_029_088_768],
        "table4": [1_625_152, 816_921], "table4-1.1b": [824_205_312, 295_627_016]}
    assert sizes.keys() == TRAINING.keys()


def test_table4_is_farmer_on_jet():
    model = Model(PRESETS["table4"])
    fashion = farmer.PRESETS["fashion"]
    shapes = {name: p.shape for name, p in farmer.Prior(fashion).state_dict().items()}
    assert isinstance(model, farmer.Farmer) and isinstance(model.flow, jetformer.Jet)
    assert {name: p.shape for name, p in model.prior.state_dict().items()} == shapes
    assert len(model.flow.blocks) == fashion.flow_blocks and len(model.flow.blocks[0].layers) == fashion.flow_layers
    af = sum(p.numel() for p in farmer.Flow(fashion).parameters())
    assert abs(sum(p.numel() for p in model.flow.parameters()) / af - 1) < 0.05
    small = dict(image_size=8, flow_width=32, head_dim=16, ar_width=64, num_classes=3, sampling=Sampling())
    model = Model(dataclasses.replace(PRESETS["table4"], **small))
    x, labels = images_of(model), torch.tensor([0, 2, 3])
    terms = model(x, labels, generators(3))
    assert torch.allclose(terms["nats_per_dim"], -model.log_prob(x, labels).total / x[0].numel())
    for method in ("resample", "reject"):
        options = Sampling(guidance=1.0, guidance_method=method)
        assert model.sample(labels, options, generators(3)).isfinite().all()


def test_what_scripts_ask():
    for model in (model_of(dtype=torch.float32), model_of(dtype=torch.float32, prior="farmer", informative_dim=48)):
        assert len(model.layers()) == 4 + 2 and model.flops() > 0 and model.activations() > 0
        stages = model.stages(torch.tensor([0, 1]), None, generators(2))
        assert stages["prior"]().shape == (2, 4, 48) and stages["exact"]().shape == (2, 3, 8, 8)
        assert stages["forward"]()[0].shape == (2, 4, 48)
        with pytest.raises(ValueError, match="--distill"):
            model.distiller()
        copy = Model(model.config)
        copy.load_state_dict(model.state_dict())
        x = images_of(model)
        assert torch.equal(copy.log_prob(x).total, model.log_prob(x).total)  # the permutations are kept too


def test_unconditional_and_without_a_split():
    model = model_of(num_classes=0, informative_dim=48, dtype=torch.float32)
    labels = torch.zeros(2, dtype=torch.long)
    assert model(images_of(model, 2), labels, generators(2))["redundant"].tolist() == [0, 0]
    assert model.sample(labels, Sampling(), generators(2)).isfinite().all()
    with pytest.raises(ValueError, match="guidance"):
        model.sample(labels, Sampling(guidance=1.0))


def test_linear_map_is_fitted_and_counts():
    model = model_of(linear_map="whiten", scale=0.0)
    x = images_of(model, 200)
    model.fit(x)
    Z, logdet = model.flow(model.patches(x))
    assert torch.allclose(torch.cov(Z.flatten(0, 1).T), torch.eye(48, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(logdet, 4 * torch.linalg.slogdet(model.flow.map)[1])


def test_bad_input_names_the_field():
    for fields, name in (
            (dict(patch_size=1, channels=1, informative_dim=1), "patch_size"), (dict(prior="gemma"), "prior"),
            (dict(image_size=12, spatial_every=2), "spatial_every"), (dict(spatial_every=-1), "spatial_every"),
            (dict(ar_head_dim=12), "ar_head_dim"), (dict(ar_head_dim=1), "ar_head_dim"), (dict(dropout=1.0), "dropout"),
            (dict(latent_noise=-0.1), "latent_noise"), (dict(latent_noise=math.nan), "latent_noise"),
            (dict(redundant_mixtures=4), "redundant_mixtures"), (dict(redundant_prior="mixture"), "redundant_prior"),
            (dict(look_above=True), "look_above"), (dict(prior="farmer", dropout=0.2), "dropout"),
            (dict(flow_blocks=-1), "flow_blocks"), (dict(informative_dim=49), "informative_dim")):
        with pytest.raises(ValueError, match=name):
            Config(**SMALL | fields)
    for fields, name in ((dict(guidance_method="naive"), "guidance_method"), (dict(inverse="parallel"), "inverse")):
        with pytest.raises(ValueError, match=name):
            Sampling(**fields)
    model, labels = model_of(dtype=torch.float32), torch.tensor([0])
    on_jet = model_of(dtype=torch.float32, prior="farmer", informative_dim=24)
    for m, fields, name in ((model, dict(s_c=9), "s_c"), (model, dict(T_s=1.1), "T_s"),
                            (model, dict(redundant_pool="per_token"), "redundant_pool"),
                            (model, dict(guidance_method="resample"), "guidance_method"),
                            (on_jet, dict(guidance_method="closed"), "guidance_method")):
        with pytest.raises(ValueError, match=name):
            m.sample(labels, Sampling(guidance=1.0, **fields))
    with pytest.raises(ValueError, match="labels"):
        model.log_prob(images_of(model), torch.tensor([0, 4, 1]))
    with pytest.raises(ValueError, match="images"):
        model.log_prob(torch.zeros(1, 3, 9, 9))
