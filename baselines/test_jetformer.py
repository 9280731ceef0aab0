"""Claims about baselines/jetformer.py, on randomised weights, as Jet starts at the identity:

- the inverse is exact, the log-determinant is autograd's, the couplings are Jet's
- the AR is the same with a cache; class tokens, rotary positions and the head are JetFormer's
- noise and dropout of training come from the images' generators, in the size that they say
- guided samples decode exactly, Z_R is N(0, I)
- the presets have the papers' sizes, and `table4` is FARMER on Jet; a bad setting is a ValueError
  that names it

Its guidance is tested in test_farmer.py. examples/test_examples.py runs examples/check.py on it:
gradients, saving, labels, batches.
"""
import math

import pytest
import torch

import farmer
from baselines.jetformer import PRESETS, TRAINING, Config, Model, Sampling, rotate

SMALL = dict(
    image_size=8, flow_blocks=4, flow_layers=1, flow_width=32, head_dim=16, ar_layers=2,
    ar_width=64, informative_dim=20, informative_mixtures=3, class_tokens=2, num_classes=3)
LABELS = torch.tensor([0, 2, 3])  # 3 is the null class


def randomised(config, dtype=torch.float64):
    torch.manual_seed(0)
    model = Model(config).to(dtype)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def small(dtype=torch.float64, **fields):
    return randomised(Config(**SMALL | fields), dtype)


def images(model, B=3):
    c = model.config
    shape = (B, c.channels, c.image_size, c.image_size)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (2 * x - 1).to(model.flow.mean.dtype)


def generators(B, seed=0):
    return [torch.Generator().manual_seed(100 * seed + i) for i in range(B)]


def test_the_flow_is_exact_and_its_determinant_never_in_bfloat16():
    model = small(torch.float32, whiten=True)
    model.fit(images(model, 50))
    X = model.patches(images(model))
    Z, logdet = model.flow(X)
    assert (Z - X).abs().max() > 0.1
    assert (model.flow.inverse(Z) - X).abs().max() < 1e-4
    J = torch.autograd.functional.jacobian(lambda x: model.flow(x)[0], X[:1])
    assert torch.linalg.slogdet(J.view(192, 192))[1].item() == pytest.approx(logdet[0].item())
    with torch.autocast("cpu", torch.bfloat16):
        assert model.flow(X)[1].dtype == torch.float32


def test_a_coupling_shifts_half_of_the_channels_before_a_bounded_scale():
    model = Model(Config(**SMALL)).double()
    X = model.patches(images(model))
    coupling = model.flow.blocks[0]
    assert torch.equal(coupling(X)[0], X)  # at the start
    coupling.to_b_s.bias.data[:24] = 0.5  # b
    coupling.to_b_s.bias.data[24:] = 50.0  # s
    y, logdet = coupling(X)
    x1, x2 = coupling.order.chunk(2)
    assert torch.equal(y[..., x1], X[..., x1])
    torch.testing.assert_close(y[..., x2], 2 * (X[..., x2] + 0.5))
    torch.testing.assert_close(logdet, torch.full((3, 4), 24 * math.log(2)).double())
    assert len({tuple(block.order.tolist()) for block in model.flow.blocks}) == 4


def test_a_layer_of_jet_is_torchs():
    layer = small().flow.blocks[0].layers[0]
    plain = torch.nn.TransformerEncoderLayer(
        32, 2, 128, dropout=0.0, activation=torch.nn.GELU("tanh"), layer_norm_eps=1e-6,
        batch_first=True, norm_first=True).double()
    names = dict(norm_attention="norm1.", norm_mlp="norm2.", qkv="self_attn.in_proj_",
                 out="self_attn.out_proj.", up="linear1.", down="linear2.")
    weights = {}
    for name, value in layer.state_dict().items():
        part, kind = name.split(".")
        weights[names[part] + kind] = value
    plain.load_state_dict(weights)
    h = torch.randn(3, 4, 32, dtype=torch.float64)
    torch.testing.assert_close(layer(h), plain(h))


def test_the_loss_has_noise_and_dropout_from_the_images_generators():
    quiet = small(latent_noise=0.0, dropout=0.0)
    x = images(quiet)
    parts = quiet(x, LABELS, generators(3))
    torch.testing.assert_close(parts["loss"], -quiet.log_prob(x, LABELS).total / 192)
    torch.testing.assert_close(
        parts["loss"], parts["informative"] + parts["redundant"] - parts["logdet"])
    model = small()
    noisy = model(x, LABELS, generators(3))["loss"]
    alone = model(x[2:], LABELS[2:], generators(3)[2:])["loss"]
    torch.testing.assert_close(alone[0], noisy[2])
    assert not torch.allclose(model(x, LABELS, generators(3, seed=1))["loss"], noisy)


def test_noise_and_dropout_are_of_the_size_that_they_say():
    model = Model(Config(**SMALL | dict(dropout=0.25, latent_noise=0.5)))  # Jet is the identity
    x = images(model, 64)
    seen = {}
    model.prior.register_forward_pre_hook(lambda _, args: seen.update(Z_I=args[0]))
    layer = model.prior.transformer.layers[1]
    layer.register_forward_pre_hook(lambda _, args: seen.update(keep=args[3]))
    model(x, torch.zeros(64, dtype=torch.long), generators(64))
    std = (seen["Z_I"] - model.patches(x)[..., :20]).std((1, 2))
    assert std.min() < 0.05 and 0.4 < std.max() < 0.55 and 0.2 < std.mean() < 0.3  # U[0, 0.5]
    assert seen["keep"].unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert abs(seen["keep"].mean() - 1) < 0.02


def test_the_ar_is_the_same_with_a_cache():
    prior = small().prior
    Z_I = torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mu = prior(Z_I, LABELS)[0].mu
    cache = prior.transformer.new_cache(8)
    h = prior.transformer(prior.class_tokens(LABELS), cache)[:, -1]
    for i in range(4):
        torch.testing.assert_close(prior.informative(h).mu, mu[:, i])
        h = prior.transformer(prior.embed(Z_I[:, i:i + 1]), cache)[:, -1]


def test_class_tokens_rotary_positions_and_head_are_jetformers():
    prior = small().prior
    tokens = prior.class_tokens(torch.arange(4))  # BOS, two class tokens, BOI
    assert tokens.shape == (4, 4, 64)
    assert (tokens[:, 0] == tokens[0, 0]).all() and (tokens[:, 3] == tokens[0, 3]).all()
    assert len(tokens.flatten(0, 1).unique(dim=0)) == 1 + 4 + 4 + 1
    x = torch.zeros(1, 1, 1, 8)
    x[..., 1] = 1
    turned = rotate(x, torch.tensor([3.0])).flatten()  # the pair (1, 5), frequency 1e4^(-1/4)
    expected = torch.zeros(8)
    expected[[1, 5]] = torch.tensor([math.cos(0.3), math.sin(0.3)])
    torch.testing.assert_close(turned, expected)
    layer = prior.transformer.layers[0]
    h = torch.randn(1, 4, 64, dtype=torch.float64)
    at = torch.arange(4)
    assert torch.allclose(layer(h, at), layer(h, at + 9), atol=1e-5)  # positions are relative
    assert not torch.allclose(layer(h, at), layer(h, 2 * at), atol=1e-3)
    head = Model(Config(**SMALL)).prior.informative
    gmm = head(torch.randn(5, 64))
    assert not gmm.logits.any() and not gmm.log_sigma.any() and 0.01 < gmm.mu.std() < 0.03
    r = torch.linspace(-3, 3, 60)
    head.linear.bias.data[63:] = r
    sigma = head(torch.zeros(64)).log_sigma.exp().flatten()
    torch.testing.assert_close(sigma, (r + (r**2 + 4).sqrt()) / 2)


def test_guided_samples_decode_exactly_and_the_redundant_part_is_normal():
    model = small()
    options = Sampling(guidance=2.0)
    Z = model.sample_latents(LABELS, options, generators(3))
    made = model.sample(LABELS, options, generators(3))
    torch.testing.assert_close(model.flow(model.patches(made))[0], Z)
    for other in (torch.full((3,), 3), Sampling()), (LABELS, Sampling()):
        assert not torch.allclose(model.sample_latents(*other, generators(3)), Z)
    many = model.sample_latents(torch.zeros(50, dtype=torch.long), options)[..., 20:]
    assert abs(many.mean()) < 0.06 and abs(many.std() - 1) < 0.06


def test_presets_have_the_papers_sizes_and_table4_is_farmer_on_jet():
    """1.07 and 2.66 billion by papers and code alike; CIFAR-10's is a port's 42 million."""
    sizes = {}
    for name, config in PRESETS.items():
        with torch.device("meta"):
            model = Model(config)
        sizes[name] = [sum(p.numel() for p in part.parameters())
                       for part in (model.flow, model.prior)]
    assert sizes["cifar10"] == [15_091_200, 27_130_880]
    assert sizes["imagenet256-350m"] == [426_647_552, 641_829_888]
    assert sizes["imagenet256-1.3b"] == [628_400_128, 2_029_088_768]
    assert sizes.keys() == TRAINING.keys()
    fashion = farmer.Farmer(farmer.PRESETS["fashion"])
    own = [sum(p.numel() for p in part.parameters()) for part in (fashion.flow, fashion.prior)]
    assert abs(sizes["table4"][0] / own[0] - 1) < 0.05 and sizes["table4"][1] == own[1]
    model = small(prior="farmer", redundant_mixtures=1)
    x = images(model)
    torch.testing.assert_close(
        model(x, LABELS)["loss"], -model.log_prob(x, LABELS).total / 192)
    assert model.sample(LABELS, Sampling(guidance=1.0), generators(3)).isfinite().all()


def test_a_bad_setting_is_named():
    for fields in (dict(prior="gemma"), dict(ar_head_dim=12), dict(ar_head_dim=1),
                   dict(dropout=1.0), dict(latent_noise=math.nan), dict(redundant_mixtures=4),
                   dict(dropout=0.2, prior="farmer"),
                   dict(patch_size=1, channels=1, informative_dim=1)):
        with pytest.raises(ValueError, match=next(iter(fields))):
            Config(**SMALL | fields)
    Config(**SMALL | dict(prior="farmer", ar_width=48))  # JetFormer's heads are not read
    with pytest.raises(ValueError, match="inverse"):
        Sampling(inverse="student")
    model = small(prior="farmer")
    with pytest.raises(ValueError, match="--distill"):
        model.distiller()
