"""Claims about baselines/tarflow.py, on weights that are not those of the start: an identity flow proves nothing."""
import copy
import dataclasses
import math

import pytest
import torch

from baselines.tarflow import PRESETS, TRAINING, Block, Config, Model, Sampling

SMALL = Config(image_size=8, channels=3, patch_size=4, num_classes=3, flow_blocks=3, flow_layers=2, flow_width=16,
               head_dim=8)
GREY = Config(image_size=4, channels=1, patch_size=2, num_classes=2, flow_blocks=2, flow_layers=1, flow_width=8,
              head_dim=8)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randomised(module, seed=0):
    """In float64, every parameter a normal number. Without a last norm alpha grows with x: wider weights overflow."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.double().named_parameters():
        std = 0.05 if "embed" in name or "to_alpha_mu" in name else 0.3
        p.data = std * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return module


def images_and_labels(config, n=4, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, config.channels, config.image_size, config.image_size, generator=g, dtype=torch.float64)
    return x, torch.arange(n) % (config.num_classes + 1)


# ------------------------------------------------------------------------------------------ an exact flow
def test_the_inverse_is_exact():
    model = randomised(Model(SMALL))
    x, labels = torch.randn(4, 4, 48, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    Z, _ = model.flow(x, labels)
    assert (Z - x).abs().mean() > 0.1
    assert (model.inverse(Z, labels) - x).abs().max() < 1e-9


@pytest.mark.parametrize("label", [1, 2])
def test_the_log_determinant_is_autograds(label):
    model = randomised(Model(GREY))
    x, labels = torch.randn(1, 4, 4, dtype=torch.float64), torch.tensor([label])
    _, logdet = model.flow(x, labels)
    jacobian = torch.autograd.functional.jacobian(lambda x: model.flow(x, labels)[0], x).view(16, 16)
    assert abs(logdet.item() - torch.linalg.slogdet(jacobian).logabsdet.item()) < 1e-9
    assert abs(logdet.item()) > 0.01


def test_a_density_in_two_dimensions_integrates_to_one():
    model = Model(GREY)
    model.blocks = torch.nn.ModuleList(Block(2, 1, 8, 1, 8, 2, flip) for flip in (False, True))  # 2 tokens of 1 number
    randomised(model, seed=3)
    axis = torch.linspace(-12, 12, 481, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis).unsqueeze(-1)
    Z, logdet = model.flow(grid, torch.ones(len(grid), dtype=torch.long))
    density = torch.exp(-0.5 * (Z.square() + math.log(2 * math.pi)).sum((1, 2)) + logdet)
    assert abs(density.sum().item() * 0.05**2 - 1) < 1e-6
    assert logdet.std() > 0.05


def test_log_prob_is_the_gaussian_of_z_and_the_loss_the_authors():
    model = randomised(Model(SMALL))
    x, labels = images_and_labels(SMALL)
    tokens = torch.nn.functional.unfold(x, 4, stride=4).mT  # the authors' order of channels, which is no other density
    tokens = tokens.view(4, 4, 3, 16).mT.reshape(4, 4, 48)
    Z, logdet = model.flow(tokens, labels)
    log_p, out = model.log_prob(x, labels), model(x, labels, None)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(Z).sum((1, 2))
    torch.testing.assert_close(log_p.total, normal + logdet)
    torch.testing.assert_close(log_p.prior + log_p.logdet, log_p.total)
    torch.testing.assert_close(out["loss"], 0.5 * Z.square().mean((1, 2)) - logdet / 192)
    torch.testing.assert_close(out["nats_per_dim"], -log_p.total / 192)
    torch.testing.assert_close(out["logdet"], logdet / 192)


# ------------------------------------------------------------------------------------------ the block
def plain_block(block, x, label):
    """One image's block in the authors' terms and plain loops: x (N, d) -> z (N, d), logdet per dimension."""
    def norm(h, m):
        return (h - h.mean()) / (h.var(unbiased=False) + 1e-5).sqrt() * m.weight + m.bias

    def linear(h, m):
        return m.weight @ h + m.bias
    pos = block.pos
    if block.flip:
        x, pos = x.flip(0), pos.flip(0)
    vector = block.classes[label] if label < len(block.classes) else block.classes.mean(0)
    h = [linear(x[i], block.embed) + pos[i] + vector for i in range(len(x))]
    for layer in block.layers:
        W, e = len(h[0]), layer.head_dim
        qkv = [linear(norm(token, layer.norm_attention), layer.qkv) for token in h]
        new = []
        for i, token in enumerate(h):
            heads = []
            for a in range(0, W, e):
                logits = torch.stack([qkv[i][a:a + e] @ qkv[j][W + a:W + a + e] / e**0.5 for j in range(i + 1)])
                weights = logits.softmax(0)
                heads.append(sum(weights[j] * qkv[j][2 * W + a:2 * W + a + e] for j in range(i + 1)))
            token = token + linear(torch.cat(heads), layer.out)
            up = linear(norm(token, layer.norm_mlp), layer.up)
            gelu = 0.5 * up * (1 + torch.erf(up / 2**0.5))
            new.append(token + linear(gelu, layer.down))
        h = new
    out = [torch.zeros(2 * x.shape[1], dtype=x.dtype)] + [linear(token, block.to_alpha_mu) for token in h[:-1]]
    alpha, mu = torch.stack(out).chunk(2, dim=1)
    z = (x - mu) * torch.exp(-alpha)
    return z.flip(0) if block.flip else z, -alpha.mean()


@pytest.mark.parametrize("flip", [False, True])
def test_a_block_is_the_plain_reference(flip):
    block = randomised(Block(N=5, d=3, W=16, K=2, head_dim=8, num_classes=3, flip=flip))
    x, labels = torch.randn(4, 5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    z, logdet = block(x, labels)
    for b in range(4):
        z_b, logdet_b = plain_block(block, x[b], labels[b])
        assert (z[b] - z_b).abs().max() < 1e-6
        assert abs(logdet[b] / 15 - logdet_b) < 1e-6


def test_blocks_alternate_and_start_near_the_identity_but_not_at_it():
    model = Model(SMALL)
    assert [block.flip for block in model.blocks] == [False, True, False]
    for block in model.blocks:
        assert block.to_alpha_mu.weight.abs().max() == 0
        assert 0 < block.to_alpha_mu.bias.abs().max() <= 16**-0.5
        assert 0.005 < block.pos.std() < 0.015 and 0.005 < block.classes.std() < 0.015


def test_the_null_class_is_the_mean_of_the_class_vectors():
    block = randomised(Block(N=4, d=3, W=16, K=1, head_dim=8, num_classes=3, flip=False))
    context = block.context(torch.tensor([0, 1, 2, 3]))
    torch.testing.assert_close(context[3], context[:3].mean(0))
    torch.testing.assert_close(context[1], block.pos + block.classes[1])
    assert not torch.allclose(context[0], context[1])


def test_every_parameter_gets_a_gradient_even_when_all_labels_are_dropped():
    for config in (SMALL, dataclasses.replace(SMALL, num_classes=0)):
        model = randomised(Model(config))
        x, _ = images_and_labels(config)
        model(x, torch.full((4,), config.num_classes), None)["loss"].mean().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_scales_stay_float32_under_autocast():
    block = randomised(Block(N=4, d=3, W=16, K=1, head_dim=8, num_classes=3, flip=False)).float()
    labels = torch.tensor([3])
    x = torch.randn(1, 4, 3)
    exact = block.alpha_mu(x, block.context(labels))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = block.alpha_mu(x, block.context(labels))
    assert rough.dtype == torch.float32 and 0 < (rough - exact).abs().max() < 0.02


def test_an_image_that_overflows_leaves_the_others_alone():
    model, labels = randomised(Model(SMALL)), torch.tensor([0, 1])
    Z = torch.randn(2, 4, 48, dtype=torch.float64)
    alone = model.inverse(Z[1:], labels[1:], Sampling(guidance=0.5))
    Z[0] *= 1e300  # there is no bound on alpha
    both = model.inverse(Z, labels, Sampling(guidance=0.5))
    assert not both[0].isfinite().all() and (both[1] - alone[0]).abs().max() < 1e-9


# ------------------------------------------------------------------------------------------ sampling
def tempered(block, tau):
    """The block with all attention logits divided by tau: its keys are."""
    block = copy.deepcopy(block)
    for layer in block.layers:
        W = layer.out.in_features
        layer.qkv.weight.data[W:2 * W] /= tau
        layer.qkv.bias.data[W:2 * W] /= tau
    return block


def by_hand(model, Z, labels, options):
    """The inverse without cache, doubled batch or `inverse`: every token by two full forward passes of a block."""
    null = torch.full_like(labels, model.config.num_classes)
    for block in reversed(model.blocks):
        z, other = block.order(Z), tempered(block, options.temperature)
        x, N = z.clone(), z.shape[1]
        for i in range(N - 1):
            alpha, mu = block.alpha_mu(x, block.context(labels)).chunk(2, -1)
            alpha_u, mu_u = other.alpha_mu(x, block.context(null)).chunk(2, -1)
            g = options.guidance * (i + 1) / (N - 1) if options.anneal else options.guidance
            alpha, mu = alpha + g * (alpha - alpha_u), mu + g * (mu - mu_u)
            x[:, i + 1] = z[:, i + 1] * torch.exp(alpha[:, i]) + mu[:, i]
        Z = block.order(x)
    return Z


@pytest.mark.parametrize("options", [Sampling(), Sampling(guidance=0.7), Sampling(guidance=0.7, anneal=False),
                                     Sampling(guidance=0.7, temperature=1.5)])
@torch.no_grad()
def test_cached_sampling_is_the_same_by_full_passes(options):
    model, labels = randomised(Model(SMALL)), torch.tensor([0, 2, 3])
    Z = torch.randn(3, 4, 48, dtype=torch.float64)
    x = model.inverse(Z, labels, options)
    assert (x - by_hand(model, Z, labels, options)).abs().max() < 1e-9
    assert options.guidance == 0 or (x - model.inverse(Z, labels)).abs().max() > 1e-2


def test_guidance_and_its_anneal_by_hand():
    block = Block(N=3, d=1, W=8, K=1, head_dim=8, num_classes=2, flip=False).double()
    read = [[[0.5, 2.0], [0.1, 1.0]], [[-0.2, 1.0], [0.2, 3.0]]]  # of the 2nd and 3rd token: cond and null [alpha, mu]

    def alpha_mu(x, context, caches):
        return torch.tensor(read.pop(0), dtype=torch.float64).view(2, 1, 2)
    block.alpha_mu = alpha_mu
    z = torch.tensor([[[1.0], [2.0], [3.0]]], dtype=torch.float64)
    x = block.inverse(z, torch.tensor([0]), Sampling(guidance=2.0)).flatten().tolist()
    assert x[0] == 1.0
    assert math.isclose(x[1], 2 * math.exp(0.5 + 1 * 0.4) + 2 + 1 * 1, rel_tol=1e-6)  # g = 2 * 1 / 2
    assert math.isclose(x[2], 3 * math.exp(-0.2 - 2 * 0.4) + 1 - 2 * 2, rel_tol=1e-6)  # g = 2 * 2 / 2


def test_the_temperature_divides_the_null_passes_logits_only():
    model, labels = randomised(Model(SMALL)), torch.tensor([3, 3])  # cond = null: only the temperature differs
    Z = torch.randn(2, 4, 48, dtype=torch.float64)
    plain = model.inverse(Z, labels)
    assert (model.inverse(Z, labels, Sampling(guidance=1.0)) - plain).abs().max() < 1e-9
    assert (model.inverse(Z, labels, Sampling(guidance=1.0, temperature=2.0)) - plain).abs().max() > 1e-3


def test_denoising_is_a_gradient_step_of_the_likelihood():
    model, sigma = randomised(Model(GREY)), 0.3
    x, labels = images_and_labels(GREY, n=2)
    step = (model.denoise(x, labels, sigma) - x) / sigma**2
    for pixel in [(0, 0, 0, 0), (0, 0, 3, 1), (1, 0, 2, 2)]:
        move = torch.zeros_like(x)
        move[pixel] = 1e-5
        slope = (model.log_prob(x + move, labels).total - model.log_prob(x - move, labels).total).sum() / 2e-5
        assert abs(step[pixel] - slope) < 1e-6 * max(1, abs(slope))


def generators(seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


def test_an_image_does_not_depend_on_its_batch():
    model, labels = randomised(Model(SMALL)), torch.tensor([0, 1, 2, 3])
    options = Sampling(guidance=0.5, denoise=0.1)
    together = model.sample(labels, options, generators(range(4)))
    for b in range(4):
        alone = model.sample(labels[b:b + 1], options, generators([b]))
        assert (alone[0] - together[b]).abs().max() < 1e-9
    assert together.shape == (4, 3, 8, 8) and not together.requires_grad


def test_sample_is_the_inverse_of_its_noise_and_one_generator_serves_a_batch():
    model, labels = Model(SMALL).double(), torch.tensor([0, 3])
    once, again = (model.sample(labels, Sampling(), torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(once, again)
    log_p = model.log_prob(once, labels)
    Z = torch.randn(2, 4, 48, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    torch.testing.assert_close(log_p.prior, torch.distributions.Normal(0.0, 1.0).log_prob(Z).sum((1, 2)))


# ------------------------------------------------------------------------------------------ the file's other promises
def test_presets_have_the_published_sizes():
    sizes = {"imagenet64-bits": 460, "imagenet64-free": 460, "imagenet64": 466, "imagenet128": 824, "afhq256": 463}
    for name, millions in sizes.items():
        with torch.device("meta"):
            model = Model(PRESETS[name])
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    assert next(iter(PRESETS)) == "digits" and set(TRAINING) == set(PRESETS)


def test_flops_are_two_per_weight_and_token_and_attention():
    model = Model(SMALL)
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert model.flops() == 4 * 2 * matrices + 6 * 4 * (4 * 4 * 16)


def test_stages_are_callables():
    model = Model(SMALL)
    labels = torch.tensor([0, 1])
    stages = model.stages(labels, Sampling(guidance=1.0, denoise=0.1), generators([0, 1]))
    assert all(stage() is not None for stage in stages.values())


@pytest.mark.parametrize("wrong", [dict(patch_size=3), dict(patch_size=8), dict(channels=2), dict(flow_width=12),
                                   dict(flow_layers=0), dict(num_classes=-1), dict(flow_blocks=True),
                                   dict(image_size=10**9)])
def test_a_config_that_cannot_be_names_its_field(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(SMALL, **wrong)


@pytest.mark.parametrize("wrong", [dict(guidance=-1.0), dict(guidance=math.nan), dict(temperature=0.0),
                                   dict(denoise=math.inf)])
def test_sampling_that_cannot_be_names_its_field(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_bad_images_labels_and_guidance_are_value_errors():
    model = Model(dataclasses.replace(SMALL, num_classes=0))
    with pytest.raises(ValueError, match="images"):
        model.log_prob(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="labels"):
        model.log_prob(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="guidance"):
        model.sample(torch.zeros(1, dtype=torch.long), Sampling(guidance=1.0))
    assert model.sample(torch.zeros(1, dtype=torch.long), Sampling(guidance=1.0, temperature=0.5)).shape == (1, 3, 8, 8)
