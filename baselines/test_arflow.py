"""Claims about baselines/arflow.py, on randomised weights, as the velocity starts at 0:

- ARFlow's attention is a plain reference's, SiT's is torch's; the velocity depends on place, time
  and class
- the images of an item at once are the same one by one with the state; none sees a later one
- the loss is that of the velocity at sorted times; labels are dropped item by item; an image
  depends on its own generators alone
- an epoch consists of items of one class; every image comes, all epochs have the same length
- samplers agree with closed forms, call the network once a step and pass the state on; guidance
  keeps two states, as computed by hand
- the presets have the papers' sizes; a bad setting or batch is a ValueError that names it

examples/test_examples.py runs examples/check.py on it: gradients, saving, labels.
"""
import dataclasses
import math

import pytest
import torch

from baselines import arflow
from baselines.arflow import PRESETS, TRAINING, Config, Model, Sampling

SMALL = Config(
    image_size=8, patch_size=2, num_classes=3, layers=2, width=32, head_dim=8, images_per_item=4,
    item_drop=0.0)
SINGLE = dataclasses.replace(SMALL, images_per_item=1)
SIT = dataclasses.replace(SINGLE, attention="sit")
CONFIGS = pytest.mark.parametrize("config", [SMALL, SINGLE, SIT], ids=["arflow", "arflow1", "sit"])


def randomised(config, dtype=torch.float64):
    """A model with every parameter so far from its initial value that the state matters."""
    torch.manual_seed(0)
    model = Model(config).to(dtype)
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model.requires_grad_(False)


def generators(numbers):
    return [torch.Generator().manual_seed(i) for i in numbers]


def two_items(S):
    """x (2, S, 3, 8, 8), sorted t (2, S), labels (2, S); the second item is unconditional."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, S, 3, 8, 8, generator=g, dtype=torch.float64)
    t = torch.rand(2, S, generator=g, dtype=torch.float64).sort(1).values
    return x, t, torch.tensor([[1], [3]]).expand(2, S)


def norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def reference(w, x, c, e=8):
    """ARFlow's attention of one item, its weights by name: x (S, N, W), c (S, W) -> (S, N, W)."""
    S, N, W = x.shape
    out = torch.zeros_like(x)
    M = torch.zeros(W // e, e, e, dtype=x.dtype)
    for s in range(S):
        q, k, v = (norm(x[s] @ w[f"{name}.weight"].T) for name in "qkv")
        k = k / math.sqrt(e)
        for j in range(W // e):
            head = slice(j * e, (j + 1) * e)
            read = torch.softmax(q[:, head] @ k[:, head].T, -1) @ v[:, head]
            if "decay.weight" in w:
                a = torch.sigmoid((x[s] + c[s]) @ w["decay.weight"][j]).log() / 16
                for n in range(N):
                    read[n] += math.exp(a[:n + 1].sum()) * q[n, head] @ M[j]
                M[j] = math.exp(a.mean()) * M[j] + k[:, head].T @ v[:, head]
            out[s, :, head] = norm(read)
    gate = x @ w["gate.weight"].T
    return (gate * torch.sigmoid(gate) * out) @ w["out.weight"].T


@pytest.mark.parametrize("config", [SMALL, SINGLE], ids=["arflow", "arflow1"])
def test_arflows_attention_is_the_plain_reference(config):
    layer = randomised(config).blocks[0].attention
    S = config.images_per_item
    x = torch.randn(2, S, 16, 32, dtype=torch.float64)
    c = torch.randn(2, S, 32, dtype=torch.float64)
    out, _ = layer(x, c, None)
    for item in range(2):
        expected = reference(layer.state_dict(), x[item], c[item])
        torch.testing.assert_close(out[item], expected, rtol=1e-9, atol=1e-9)


def test_sits_attention_is_torchs():
    layer = randomised(SIT).blocks[0].attention
    plain = torch.nn.MultiheadAttention(32, 4, batch_first=True).double()
    names = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
    plain.load_state_dict(dict(zip(names, layer.state_dict().values(), strict=True)))
    x = torch.randn(2, 16, 32, dtype=torch.float64)
    torch.testing.assert_close(layer(x[:, None], None, None)[0][:, 0], plain(x, x, x)[0])


def test_the_velocity_depends_on_place_time_and_class():
    model = randomised(SINGLE)
    x, t, labels = two_items(1)
    v, _ = model.velocity(x, t, labels)
    for other in (model.velocity(x, t + 0.1, labels), model.velocity(x, t, labels - 1)):
        assert (other[0] - v).abs().mean() > 0.01
    for axis in (3, 4):  # without positions, moved patches would have moved velocities
        moved, _ = model.velocity(x.roll(2, axis), t, labels)
        assert (moved.roll(-2, axis) - v).abs().mean() > 0.01


def test_images_at_once_equal_one_by_one_with_the_state():
    model = randomised(SMALL)
    x, t, labels = two_items(4)
    at_once, last = model.velocity(x, t, labels)
    state = None
    for s in range(4):
        one = slice(s, s + 1)
        alone, _ = model.velocity(x[:, one], t[:, one], labels[:, one])
        assert s == 0 or (alone - at_once[:, one]).abs().mean() > 0.01  # the state matters
        v, state = model.velocity(x[:, one], t[:, one], labels[:, one], state)
        torch.testing.assert_close(v, at_once[:, one], rtol=1e-10, atol=1e-10)
        changed = x.clone()
        changed[:, s] += 1
        difference = (model.velocity(changed, t, labels)[0] - at_once).abs().amax((0, 2, 3, 4))
        assert (difference[:s] == 0).all() and (difference[s:] > 1e-6).all()
    torch.testing.assert_close(state, last)
    assert [M.shape for M in state] == [(2, 4, 8, 8)] * 2


@CONFIGS
def test_the_loss_is_that_of_sorted_times_with_labels_dropped_item_by_item(config):
    """A generator gives time, noise and coin of its image; an item's first coin counts."""
    model = randomised(dataclasses.replace(config, item_drop=0.5))
    x = torch.randn(24, 3, 8, 8, dtype=torch.float64)
    labels = torch.arange(3).repeat_interleave(8)
    loss = model(x, labels, generators(range(24)))["loss"]
    own = generators(range(24))
    t = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in own])
    eps = torch.stack([torch.randn(3, 8, 8, generator=g, dtype=torch.float64) for g in own])
    coins = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in own])
    S = config.images_per_item
    assert 0 < (coins[::S] < 0.5).sum() < len(coins[::S])
    for i in range(0, 24, S):
        item = slice(i, i + S)
        times = t[item].sort().values
        part = times.view(-1, 1, 1, 1)
        x_t = part * x[item] + (1 - part) * eps[item]
        y = torch.full((1, S), 3) if coins[i] < 0.5 else labels[None, item]
        v, _ = model.velocity(x_t[None], times[None], y)
        error = v[0] - (x[item] - eps[item])
        torch.testing.assert_close(loss[item], error.square().mean((1, 2, 3)))


def test_an_epoch_consists_of_items_of_one_class():
    labels = torch.tensor([0] * 92 + [1] * 51 + [2] * 57)  # none a multiple of 5
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        places = arflow.epoch_order(labels, generator)
        assert places.unique().tolist() == list(range(200))
        assert len(places) == 95 + 55 + 60
        for item in places.view(-1, 5):
            assert len(item.unique()) == 5 and len(labels[item].unique()) == 1
    first = labels[places.view(-1, 5)[:, 0]]
    assert not torch.equal(first, first.sort().values)  # classes are mixed
    places = places[labels[places] == 0]
    assert not torch.equal(places, places.sort().values)  # and so are the images of a class
    with pytest.raises(ValueError, match="class 7: got 4 images"):
        arflow.epoch_order(torch.tensor([2] * 5 + [7] * 4), torch.Generator())
    items = Model(SMALL).epoch_order(labels, torch.Generator()).view(-1, 4)
    assert (labels[items] == labels[items[:, :1]]).all()
    single = Model(SINGLE).epoch_order(labels, torch.Generator())
    assert single.sort().values.tolist() == list(range(200))


class KnownVelocity:
    """E[x_1 - eps | x_t] for data from N(.4, .3^2); counts its calls by the state."""

    def __init__(self):
        self.times = []

    def __call__(self, x, t, state):
        assert (state or 0) == len(self.times)
        self.times.append(t)
        variance = (0.3 * t) ** 2 + (1 - t) ** 2
        v = 0.4 + (0.09 * t - (1 - t)) / variance * (x - 0.4 * t)
        return v, len(self.times)


def test_the_ode_sampler_follows_a_known_flow_with_an_error_of_first_order():
    x = torch.randn(100, 1, dtype=torch.float64)
    errors = []
    for steps in (50, 100):
        velocity = KnownVelocity()
        made = arflow.euler(velocity, x, steps)
        assert velocity.times == [i / steps for i in range(steps)]
        errors.append((made - (0.4 + 0.3 * x)).abs().max().item())
    assert errors[0] < 0.05
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.2)


def test_the_sde_sampler_has_the_moments_of_a_known_gaussian():
    x = torch.randn(50_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    velocity = KnownVelocity()
    made = arflow.euler_maruyama(velocity, x, 50, torch.Generator().manual_seed(1))
    assert velocity.times == pytest.approx([i * 0.96 / 49 for i in range(50)])
    assert (made.mean().item(), made.std().item()) == pytest.approx((0.4, 0.3), abs=0.02)
    velocity = KnownVelocity()
    made = arflow.euler_maruyama(velocity, x, 2, torch.Generator().manual_seed(1))
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    x = x + 0.96 * (0.4 - 2 * x) + math.sqrt(2 * 0.96) * eps  # v = 0.4 - x at t = 0
    velocity.times.clear()
    torch.testing.assert_close(made, x + 0.04 * (1.96 * velocity(x, 0.96, 0)[0] - x))


def test_the_halves_of_guidance_keep_their_own_states():
    model = randomised(SMALL, torch.float32)
    labels = torch.tensor([0, 2])
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    states = [None, None]
    for i in range(6):
        t = torch.full((2, 1), i / 6)
        cond, states[0] = model.velocity(x[:, None], t, labels[:, None], states[0])
        null, states[1] = model.velocity(x[:, None], t, torch.full((2, 1), 3), states[1])
        x = x + (2.5 * cond - 1.5 * null)[:, 0] / 6

    def made(**options):
        return model.sample(labels, Sampling(steps=6, **options), torch.Generator().manual_seed(1))

    torch.testing.assert_close(made(guidance=1.5), x, rtol=1e-4, atol=1e-4)
    for other in (dict(), dict(guidance=1.5, sampler="sde")):
        assert (made(**other) - x).abs().max() > 0.01


@CONFIGS
def test_an_image_does_not_depend_on_its_batch(config):
    model = randomised(config)
    options = Sampling(guidance=1.0, sampler="sde", steps=5)
    together = model.sample(torch.arange(4), options, generators(range(4)))
    assert together.shape == (4, 3, 8, 8) and together.dtype == torch.float32
    alone = model.sample(torch.tensor([3]), options, generators([3]))
    torch.testing.assert_close(alone[0], together[3])


def test_presets_have_the_papers_sizes():
    """In millions, with the papers' four latent channels."""
    sizes = {"S": 35, "sit-S": 33, "B": 137, "sit-B": 130, "L": 483, "sit-L": 458, "XL": 712,
             "sit-XL": 675}
    for name, millions in sizes.items():
        with torch.device("meta"):
            model = Model(dataclasses.replace(PRESETS[name], channels=4))
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    assert PRESETS.keys() == TRAINING.keys()
    for name, config in PRESETS.items():
        assert TRAINING[name]["label_drop"] == 0
        assert TRAINING[name]["batch_size"] % config.images_per_item == 0


def test_a_bad_setting_or_batch_is_named():
    for field, value in (("image_size", 15), ("width", 104), ("width", 30), ("item_drop", -0.1)):
        with pytest.raises(ValueError, match=field):
            Config(**{"head_dim": 10, field: value})
    with pytest.raises(ValueError, match="images_per_item.*SiT"):
        Config(attention="sit")
    labels = torch.zeros(6, dtype=torch.long)
    with pytest.raises(ValueError, match="batch_size: got 6"):
        Model(SMALL)(torch.zeros(6, 3, 8, 8), labels, generators(range(6)))
    unconditional = Config(num_classes=0, width=32)
    with pytest.raises(ValueError, match="guidance"):
        Model(unconditional).sample(labels, Sampling(guidance=1.0))
