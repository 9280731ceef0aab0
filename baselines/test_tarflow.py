"""Claims about baselines/tarflow.py, on randomised weights, as a flow near the identity proves
nothing:

- the inverse is exact, the log-determinant is autograd's, and the density integrates to one
- the model is the authors': blocks, null class, where it starts, loss, sizes of the presets
- sampling with a cache, guidance, its annealing and its temperature are as computed by hand with
  full passes; denoising is sigma^2 times the gradient of the likelihood
- an image does not depend on one beside it that overflows
- a bad setting is a ValueError that names it

examples/test_examples.py runs examples/check.py on it: gradients, saving, labels, batches.
"""
import copy
import dataclasses

import pytest
import torch

from baselines.tarflow import PRESETS, TRAINING, Config, Model, Sampling
from farmer import patchify

SMALL = Config(
    image_size=8, num_classes=3, flow_blocks=3, flow_layers=2, flow_width=16, head_dim=8)
GREY = Config(
    image_size=4, channels=1, patch_size=2, num_classes=2, flow_blocks=2, flow_layers=1,
    flow_width=8, head_dim=8)
LABELS = torch.tensor([0, 1, 2, 3])  # 3 is the null class of SMALL


def randomised(module, seed=0):
    """In float64, every parameter a normal number. alpha has no bound: wider ones overflow."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.double().named_parameters():
        std = 0.05 if "embed" in name or "to_alpha_mu" in name else 0.3
        p.data = std * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return module


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_the_inverse_is_exact_and_the_log_determinant_is_autograds():
    flow = randomised(Model(GREY)).flow
    X = normal(3, 4, 4)
    Z, logdet = flow(X, LABELS[:3])
    assert (Z - X).abs().mean() > 0.1
    assert (flow.inverse(Z, LABELS[:3]) - X).abs().max() < 1e-9
    J = torch.autograd.functional.jacobian(lambda x: flow(x, LABELS[1:2])[0], X[1:2])
    assert abs(torch.linalg.slogdet(J.view(16, 16)).logabsdet - logdet[1]) < 1e-9


def test_a_density_in_two_dimensions_integrates_to_one():
    class TwoNumbers(Config):
        num_tokens = 2
        token_dim = 1

    model = randomised(Model(TwoNumbers(**vars(GREY))))
    model.patches = lambda images: images
    axis = torch.linspace(-12, 12, 121, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis).unsqueeze(-1)
    density = model.log_prob(grid, torch.ones(len(grid), dtype=torch.long)).total.exp()
    assert abs(density.sum() * 0.2**2 - 1) < 1e-5


def test_log_prob_is_the_gaussian_of_z_and_the_loss_is_the_authors():
    model = randomised(Model(SMALL))
    x = normal(4, 3, 8, 8)
    Z, logdet = model.flow(patchify(x, 4), LABELS)
    log_p = model.log_prob(x, LABELS)
    out = model(x, LABELS, None)
    gaussian = torch.distributions.Normal(0.0, 1.0).log_prob(Z).sum((1, 2))
    torch.testing.assert_close(log_p.total, gaussian + logdet)
    torch.testing.assert_close(log_p.prior + log_p.logdet, log_p.total)
    torch.testing.assert_close(out["loss"], 0.5 * Z.square().mean((1, 2)) - logdet / 192)
    torch.testing.assert_close(out["nats_per_dim"], -log_p.total / 192)
    torch.testing.assert_close(out["logdet"], logdet / 192)


def test_blocks_are_as_the_authors_have_them():
    """Reversed by turns, near the identity at first, with the mean of the classes as the null."""
    blocks = Model(SMALL).flow.blocks
    assert [block.flip for block in blocks] == [False, True, False]
    for block in blocks:
        assert not block.to_alpha_mu.weight.any() and block.to_alpha_mu.bias.any()
        assert block.layers[0].qkv.bias is not None and block.layers[0].out.bias is not None
        context = block.context(LABELS)
        torch.testing.assert_close(context[1], block.order(block.pos[None])[0] + block.classes[1])
        torch.testing.assert_close(context[3], context[:3].mean(0))
        torch.testing.assert_close(block.context(None)[0], context[3])


def test_presets_have_the_published_sizes():
    sizes = {"imagenet64-bits": 460, "imagenet64": 466, "imagenet128": 824, "afhq256": 463}
    for name, millions in sizes.items():
        with torch.device("meta"):
            model = Model(PRESETS[name])
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    assert set(TRAINING) == set(PRESETS)


def tempered(block, temperature):
    """The block with all attention logits divided by a temperature: its keys are."""
    block = copy.deepcopy(block)
    for layer in block.layers:
        W = layer.out.in_features
        layer.qkv.weight.data[W:2 * W] /= temperature
        layer.qkv.bias.data[W:2 * W] /= temperature
    return block


@pytest.mark.parametrize("options", [
    Sampling(), Sampling(guidance=0.7), Sampling(guidance=0.7, anneal=False),
    Sampling(guidance=0.7, temperature=1.5)])
@torch.no_grad()
def test_cached_and_guided_sampling_is_the_same_by_full_passes(options):
    flow = randomised(Model(SMALL)).flow
    Z = normal(4, 4, 48)
    made = flow.inverse(Z, LABELS, options)
    null = torch.full_like(LABELS, 3)
    X = Z
    for block in reversed(flow.blocks):
        z = block.order(X)
        other = tempered(block, options.temperature)
        x = z.clone()
        for i in range(3):
            alpha, mu = block.alpha_mu(x, block.context(LABELS)).chunk(2, -1)
            alpha_u, mu_u = other.alpha_mu(x, block.context(null)).chunk(2, -1)
            g = options.guidance * (i + 1) / 3 if options.anneal else options.guidance
            alpha = alpha + g * (alpha - alpha_u)
            mu = mu + g * (mu - mu_u)
            x[:, i + 1] = z[:, i + 1] * torch.exp(alpha[:, i]) + mu[:, i]
        X = block.order(x)
    assert (made - X).abs().max() < 1e-9
    if options.guidance > 0:
        assert (made - flow.inverse(Z, LABELS)).abs().max() > 1e-2


def test_an_image_is_denoised_and_does_not_depend_on_one_that_overflows():
    model = randomised(Model(SMALL))
    options = Sampling(guidance=0.5)
    noisy = model.sample(LABELS, options, generators(range(4))).requires_grad_()
    (score,) = torch.autograd.grad(model.log_prob(noisy, LABELS).total.sum(), noisy)
    denoised = dataclasses.replace(options, denoise=0.1)
    clean = model.sample(LABELS, denoised, generators(range(4)))
    torch.testing.assert_close(clean, noisy.detach() + 0.1**2 * score)
    Z = normal(2, 4, 48)
    alone = model.flow.inverse(Z[1:], LABELS[1:2], options)
    Z[0] *= 1e300  # there is no bound on alpha
    both = model.flow.inverse(Z, LABELS[:2], options)
    assert not both[0].isfinite().all() and (both[1] - alone[0]).abs().max() < 1e-9


def test_a_bad_setting_is_named():
    for field, value in (("image_size", 9), ("flow_width", 12)):
        with pytest.raises(ValueError, match=field):
            dataclasses.replace(SMALL, **{field: value})
    with pytest.raises(ValueError, match="temperature"):
        Sampling(temperature=0.0)
    model = Model(dataclasses.replace(SMALL, num_classes=0))
    labels = torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="guidance"):
        model.sample(labels, Sampling(guidance=1.0))
    assert model.sample(labels, Sampling(guidance=1.0, temperature=0.5)).shape == (1, 3, 8, 8)
