"""ARFlow and SiT: the claims of arflow.py, on randomised weights: at its start the velocity is 0 and proves nothing."""
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from baselines.arflow import PRESETS, TRAINING, Config, Model, Sampling, euler, euler_maruyama

SMALL = Config(image_size=8, patch_size=2, num_classes=3, layers=3, width=32, head_dim=8, images_per_item=4)
SINGLE = dataclasses.replace(SMALL, images_per_item=1)
SIT = dataclasses.replace(SINGLE, attention="sit")
CONFIGS = pytest.mark.parametrize("config", [SMALL, SINGLE, SIT], ids=["arflow", "arflow1", "sit"])


def randomised(config: Config, seed: int = 0, dtype=torch.float64) -> Model:
    """A model with every parameter moved away from its initial value, so far that the state matters."""
    torch.manual_seed(seed)
    model = Model(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.requires_grad_(False)


def items(config: Config, num: int = 2, dtype=torch.float64):
    """x (num, S, C, 8, 8), t (num, S) sorted, labels (num, S); the second item is unconditional."""
    S = config.images_per_item
    x = torch.randn(num, S, config.channels, config.image_size, config.image_size, dtype=dtype)
    labels = torch.tensor([1, config.num_classes])[:num, None].expand(num, S)
    return x, torch.rand(num, S, dtype=dtype).sort(1).values, labels


def generators(indices, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + i) for i in indices]


# ---------------------------------------------------------------------------------------------------- a plain reference
def norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def reference_attention(weights: dict, x, c, H: int, S: int):
    """Attention of one item: x (S, N, W), c (S, W) -> (S, N, W); SiT where the weights have a qkv, else ARFlow."""
    W = x.shape[-1]
    e = W // H
    out = torch.zeros_like(x)
    if "qkv.weight" in weights:
        for s in range(S):
            q, k, v = (x[s] @ weights["qkv.weight"].T + weights["qkv.bias"]).split(W, -1)
            for j in range(H):
                part = slice(j * e, (j + 1) * e)
                out[s, :, part] = torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(e), -1) @ v[:, part]
        return out @ weights["out.weight"].T + weights["out.bias"]
    memory = torch.zeros(H, e, e, dtype=x.dtype)
    for s in range(S):
        q, k, v = (norm(x[s] @ weights[f"{name}.weight"].T) for name in "qkv")
        k = k / math.sqrt(e)
        for j in range(H):
            part = slice(j * e, (j + 1) * e)
            inside = torch.softmax(q[:, part] @ k[:, part].T, -1) @ v[:, part]
            across = torch.zeros_like(inside)
            if "decay.weight" in weights:
                g = (x[s] + c[s]) @ weights["decay.weight"][j]
                logs = [float(torch.log(torch.sigmoid(value))) / 16 for value in g]
                for n in range(len(g)):
                    across[n] = math.exp(sum(logs[: n + 1])) * q[n, part] @ memory[j]
                memory[j] = math.exp(sum(logs) / len(logs)) * memory[j]
                for n in range(len(g)):
                    memory[j] += torch.outer(k[n, part], v[n, part])
            out[s, :, part] = norm(inside + across)
        gate = x[s] @ weights["gate.weight"].T
        out[s] = gate * torch.sigmoid(gate) * out[s]
    return out @ weights["out.weight"].T


def reference_velocity(model: Model, x, t, labels):
    """The velocity of one item, image by image and head by head: x (S, C, size, size), t and labels (S,)."""
    c, w = model.config, model.state_dict()
    S, p, side, W = len(x), c.patch_size, c.image_size // c.patch_size, c.width

    def linear(name, value):
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(value):
        return value * torch.sigmoid(value)

    frequency = 10000.0 ** (-torch.arange(128, dtype=x.dtype) / 128)
    angle = t[:, None] * frequency
    features = torch.cat([torch.cos(angle), torch.sin(angle)], 1)
    cond = linear("time.2", silu(linear("time.0", features))) + w["classes.weight"][labels]
    h = torch.zeros(S, side * side, W, dtype=x.dtype)
    line = 10000.0 ** (-torch.arange(W // 4, dtype=x.dtype) / (W // 4))
    for n in range(side * side):
        row, column = divmod(n, side)
        patch = x[:, :, row * p:(row + 1) * p, column * p:(column + 1) * p]
        place = [torch.sin(column * line), torch.cos(column * line), torch.sin(row * line), torch.cos(row * line)]
        h[:, n] = linear("embed", patch.permute(0, 2, 3, 1).reshape(S, -1)) + torch.cat(place).float()
    for i in range(c.layers):
        mods = linear(f"blocks.{i}.modulation", silu(cond)).view(S, 6, 1, W)
        prefix = f"blocks.{i}.attention."
        attention = {key.removeprefix(prefix): value for key, value in w.items() if key.startswith(prefix)}
        read = F.layer_norm(h, (W,), eps=1e-6) * (1 + mods[:, 1]) + mods[:, 0]
        h = h + mods[:, 2] * reference_attention(attention, read, cond, W // c.head_dim, S)
        read = F.layer_norm(h, (W,), eps=1e-6) * (1 + mods[:, 4]) + mods[:, 3]
        z = linear(f"blocks.{i}.up", read)
        gelu = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        h = h + mods[:, 5] * linear(f"blocks.{i}.down", gelu)
    shift, scale = linear("modulation", silu(cond)).view(S, 2, 1, W).unbind(1)
    out = linear("to_velocity", F.layer_norm(h, (W,), eps=1e-6) * (1 + scale) + shift)
    v = torch.zeros_like(x)
    for n in range(side * side):
        row, column = divmod(n, side)
        patch = out[:, n].view(S, p, p, c.channels).permute(0, 3, 1, 2)
        v[:, :, row * p:(row + 1) * p, column * p:(column + 1) * p] = patch
    return v


@CONFIGS
def test_velocity_equals_a_plain_reference(config):
    model = randomised(config)
    x, t, labels = items(config)
    v, _ = model.velocity(x, t, labels)
    for i in range(2):
        expected = reference_velocity(model, x[i], t[i], labels[i])
        assert expected.std() > 0.1
        torch.testing.assert_close(v[i], expected, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ the state
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_at_once_equal_one_by_one_with_the_state(dtype):
    model = randomised(SMALL, dtype=dtype)
    x, t, labels = items(SMALL, dtype=dtype)
    at_once, last = model.velocity(x, t, labels)
    forgetful, _ = model.velocity(x.flatten(0, 1)[:, None], t.view(-1, 1), labels.reshape(-1, 1))
    assert (at_once[:, 1:] - forgetful.view_as(x)[:, 1:]).abs().mean() > 0.01  # the state matters
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    state = None
    for s in range(SMALL.images_per_item):
        v, state = model.velocity(x[:, s:s + 1], t[:, s:s + 1], labels[:, s:s + 1], state)
        for item in range(2):  # conditional, unconditional
            torch.testing.assert_close(v[item, 0], at_once[item, s], rtol=tolerance, atol=tolerance)
    for M, expected in zip(state, last, strict=True):
        assert (M - expected).norm() < tolerance * expected.norm()


def test_an_image_never_sees_a_later_one():
    model = randomised(SMALL)
    x, t, labels = items(SMALL)
    before, _ = model.velocity(x, t, labels)
    for s in range(SMALL.images_per_item):
        changed = x.clone()
        changed[:, s] += 1
        difference = (model.velocity(changed, t, labels)[0] - before).abs().amax((0, 2, 3, 4))
        assert (difference[:s] == 0).all() and (difference[s:] > 1e-6).all()


def test_the_state_neither_grows_nor_mixes_items():
    model = randomised(SMALL, dtype=torch.float32)
    x, t, labels = items(SMALL, dtype=torch.float32)
    state = None
    for _ in range(50):
        _, state = model.velocity(x[:, :1], t[:, :1], labels[:, :1], state)
        assert [M.shape for M in state] == [(2, 4, 8, 8)] * 3
    for i in range(2):
        _, alone = model.velocity(x[i:i + 1], t[i:i + 1], labels[i:i + 1])
        _, together = model.velocity(x, t, labels)
        for M, both in zip(alone, together, strict=True):
            torch.testing.assert_close(M[0], both[i])


def test_the_halves_of_guidance_keep_their_own_state():
    model, w = randomised(SMALL, dtype=torch.float32), 1.5
    labels, noise = torch.tensor([0, 2]), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    x, states, steps = noise, [None, None], 6
    for i in range(steps):
        v = []
        for half, y in enumerate((labels, torch.full((2,), 3))):
            u, states[half] = model.velocity(x[:, None], torch.full((2, 1), i / steps), y[:, None], states[half])
            v.append(u[:, 0])
        x = x + (v[0] + w * (v[0] - v[1])) / steps
    made = model.sample(labels, Sampling(guidance=w, steps=steps), torch.Generator().manual_seed(1))
    torch.testing.assert_close(made, x, rtol=1e-4, atol=1e-4)
    for other in (Sampling(steps=steps), Sampling(w, steps=steps, carry_state=False)):
        assert (made - model.sample(labels, other, torch.Generator().manual_seed(1))).abs().max() > 0.01


def test_single_images_have_no_state():
    for config in (SINGLE, SIT):
        x, t, labels = items(config)
        assert randomised(config).velocity(x, t, labels)[1] == [None] * 3


# ------------------------------------------------------------------------------------------------------------- training
@CONFIGS
def test_loss_is_the_mean_square_of_the_velocity_at_sorted_times(config):
    model, S = randomised(config), config.images_per_item
    x, y = torch.randn(8, 3, 8, 8, dtype=torch.float64), torch.arange(2).repeat_interleave(4)
    loss = model(x, y, generators(range(8)))["loss"]
    times, noise = [], []
    for g in generators(range(8)):
        times.append(float(torch.rand((), generator=g, dtype=torch.float64)))
        noise.append(torch.randn(3, 8, 8, generator=g, dtype=torch.float64))
    for i in range(0, 8, S):
        t = torch.tensor(sorted(times[i:i + S]), dtype=torch.float64)
        eps = torch.stack(noise[i:i + S])
        x_t = t.view(-1, 1, 1, 1) * x[i:i + S] + (1 - t).view(-1, 1, 1, 1) * eps
        v = reference_velocity(model, x_t, t, y[i:i + S])
        torch.testing.assert_close(loss[i:i + S], (v - (x[i:i + S] - eps)).square().mean((1, 2, 3)))


@CONFIGS
def test_every_parameter_gets_a_gradient_in_every_call(config):
    model = randomised(config, dtype=torch.float32).requires_grad_(True)
    model(torch.randn(8, 3, 8, 8), torch.full((8,), 1), generators(range(8)))["loss"].mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@CONFIGS
def test_bf16_autocast_is_close(config):
    model = randomised(config, dtype=torch.float32)
    x, y = torch.randn(8, 3, 8, 8), torch.full((8,), 1)
    exact = model(x, y, generators(range(8)))["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x, y, generators(range(8)))["loss"]
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.05)


def test_it_learns_one_picture_per_class():
    """Two classes of one colour each: after a few steps, guided or not, samples have the colour of their label."""
    torch.manual_seed(0)
    model = Model(Config(image_size=4, patch_size=2, num_classes=2, layers=1, width=32, head_dim=16, images_per_item=4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(100):
        y = torch.randint(2, (8,)).repeat_interleave(4)
        x = (y * 1.0 - 0.5).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
        y = torch.where(torch.rand(8).repeat_interleave(4) < 0.1, 2, y)
        model(x, y, generators(range(32), step))["loss"].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for options in (Sampling(steps=10), Sampling(0.5, "sde", 20)):
        made = model.sample(torch.tensor([0, 1] * 8), options, generators(range(16))).mean((1, 2, 3))
        assert (made[0::2] < -0.2).all() and (made[1::2] > 0.2).all(), made


# ------------------------------------------------------------------------------------------------------------- sampling
MEAN, STD = 0.4, 0.3


def gaussian_velocity(x, t, state):
    """E[x_1 - eps | x_t] where the data are N(MEAN, STD^2); the state counts the calls."""
    variance = (t * STD) ** 2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN), (state or 0) + 1


def test_ode_sampler_follows_a_known_flow_with_an_error_of_first_order():
    x = torch.randn(100, 1, dtype=torch.float64)
    exact = MEAN + STD * x  # x_t = t MEAN + std_t x_0 solves the ODE
    errors = [float((euler(gaussian_velocity, x, steps) - exact).abs().max()) for steps in (50, 100, 200)]
    assert errors[0] < 0.05
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.2) and errors[1] / errors[2] == pytest.approx(2, abs=0.1)


def sde_moments(steps: int, last: float) -> tuple[float, float]:
    """Mean and std of the SDE sampler's results for that velocity: each step is affine, so both are known exactly."""
    times = [i * (1 - last) / (steps - 1) for i in range(steps)]
    sizes = [(1 - last) / (steps - 1)] * (steps - 1) + [last]
    mean, variance = 0.0, 1.0
    for i, (t, dt) in enumerate(zip(times, sizes, strict=True)):
        at_0, at_1 = (z + ((1 + t) * gaussian_velocity(z, t, None)[0] - z) * dt for z in (0.0, 1.0))
        mean = at_0 + (at_1 - at_0) * mean
        variance = (at_1 - at_0) ** 2 * variance + 2 * (1 - t) * dt * (i < steps - 1)
    return mean, variance**0.5


@pytest.mark.parametrize("steps", [50, 250])
def test_sde_sampler_has_the_moments_of_a_known_gaussian(steps):
    x = torch.randn(50_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    made = euler_maruyama(gaussian_velocity, x, steps, torch.Generator().manual_seed(1))
    mean, std = sde_moments(steps, 0.04)
    assert float(made.mean()) == pytest.approx(mean, abs=0.005)
    assert float(made.std()) == pytest.approx(std, rel=0.01)
    assert mean == pytest.approx(MEAN, rel=0.03) and std == pytest.approx(STD, rel=0.03)  # what the last 0.04 costs
    assert sde_moments(4000, 0.0005) == pytest.approx((MEAN, STD), rel=0.001)


@pytest.mark.parametrize("steps", [2, 50, 250])
def test_samplers_call_the_network_once_per_step_and_pass_the_state_on(steps):
    seen = []

    def velocity(x, t, state):
        seen.append((t, state))
        return torch.zeros_like(x), (state or 0) + 1

    for sampler in (euler, euler_maruyama):
        seen.clear()
        sampler(velocity, torch.zeros(1, 1), steps)
        assert [state or 0 for _, state in seen] == list(range(steps))
        last = 1 - 1 / steps if sampler is euler else 0.96
        assert seen[0][0] == 0 and seen[-1][0] == pytest.approx(last)
        assert seen[-1][0] - seen[-2][0] == pytest.approx(last / (steps - 1))


@CONFIGS
@pytest.mark.parametrize("options", [Sampling(steps=5), Sampling(1.0, "sde", 5)], ids=["ode", "sde-guided"])
def test_an_image_does_not_depend_on_its_batch(config, options):
    model, labels = randomised(config, dtype=torch.float32), torch.tensor([0, 1, 2, 3])
    together = model.sample(labels, options, generators(range(4)))
    for i in (0, 3):
        alone = model.sample(labels[i:i + 1], options, generators([i]))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-3, atol=1e-3)
    assert together.shape == (4, 3, 8, 8) and together.dtype == torch.float32
    assert not torch.equal(together, model.sample(labels, options, generators(range(4), seed=1)))


def test_loss_of_an_item_does_not_depend_on_its_batch():
    model, x, y = randomised(SMALL), torch.randn(8, 3, 8, 8, dtype=torch.float64), torch.full((8,), 2)
    together = model(x, y, generators(range(8)))["loss"]
    torch.testing.assert_close(model(x[4:], y[4:], generators(range(4, 8)))["loss"], together[4:])


# -------------------------------------------------------------------------------------------------- sizes and settings
SIZES = [("S", 35, 33), ("B", 137, 130), ("L", 483, 458), ("XL", 712, 675)]


@pytest.mark.parametrize("name, arflow_size, sit_size", SIZES, ids=[name for name, *_ in SIZES])
def test_sizes_are_the_papers(name, arflow_size, sit_size):
    """In millions, with the papers' four latent channels; with our three the first and last matrices are smaller."""
    for preset, size in ((name, arflow_size), (f"sit-{name}", sit_size)):
        config = PRESETS[preset]
        assert (config.patch_size, config.num_tokens, config.num_classes) == (2, 256, 1000)
        with torch.device("meta"):
            models = [Model(dataclasses.replace(config, channels=channels)) for channels in (3, 4)]
        pixels, latents = (sum(p.numel() for p in model.parameters()) for model in models)
        assert round(latents / 1e6) == size
        assert latents - pixels == 4 * 2 * config.width + 4


def test_presets_have_three_rows_each_and_training_settings():
    assert next(iter(PRESETS)) == "digits" and PRESETS["digits"].images_per_item == 5
    assert PRESETS.keys() == TRAINING.keys()
    for name in ("digits", "fashion", "cifar10", "S", "B", "L", "XL"):
        full, single, sit = (PRESETS[prefix + name] for prefix in ("", "arflow1-", "sit-"))
        assert dataclasses.replace(full, images_per_item=1) == single
        assert dataclasses.replace(single, attention="sit", head_dim=sit.head_dim) == sit
        assert TRAINING[name]["noise"] == "none" and TRAINING[name]["batch_size"] % full.images_per_item == 0
    assert [PRESETS[name].width // PRESETS[name].head_dim for name in ("XL", "sit-XL")] == [18, 16]


@pytest.mark.parametrize("field, value", [
    ("image_size", 15), ("width", 100), ("attention", "mamba"), ("images_per_item", 0), ("layers", 1.5),
    ("channels", True), ("num_classes", -1), ("head_dim", 10**6),
])
def test_config_names_the_field_that_is_wrong(field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(Config(), **{field: value})


def test_refusals():
    with pytest.raises(ValueError, match="images_per_item.*sit"):
        Config(attention="sit")
    for values in ({"guidance": math.nan}, {"guidance": -1.0}, {"steps": 1}, {"sampler": "heun"}):
        with pytest.raises(ValueError, match=next(iter(values))):
            Sampling(**values)
    with pytest.raises(ValueError, match="images_per_item"):
        labels = torch.zeros(6, dtype=torch.long)
        randomised(SMALL, dtype=torch.float32)(torch.randn(6, 3, 8, 8), labels, generators(range(6)))
    assert not hasattr(Model, "log_prob")


def test_unconditional_model():
    config = Config(image_size=8, num_classes=0, width=32, layers=1, images_per_item=2, sampling=Sampling(guidance=2.0))
    assert config.sampling.guidance == 0
    model, labels = randomised(config, dtype=torch.float32), torch.zeros(2, dtype=torch.long)
    assert model.sample(labels, Sampling(steps=2)).isfinite().all()
    with pytest.raises(ValueError, match="guidance"):
        model.sample(labels, Sampling(guidance=1.0))


@CONFIGS
def test_flops_against_torchs_count_and_the_stage_runs(config):
    from torch.utils.flop_counter import FlopCounterMode
    model = randomised(config, dtype=torch.float32)
    x, t, labels = items(config, 1, torch.float32)
    with FlopCounterMode(display=False) as counter:
        model.velocity(x, t, labels)
    assert model.flops() * config.images_per_item == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert model.layers() == list(model.blocks)
    stages = model.stages(torch.tensor([0, 1]), Sampling(1.0, steps=2), generators(range(2)))
    assert len(stages["network call"]()) == config.layers


@CONFIGS
def test_activations_are_what_autograd_saves(config):
    config = dataclasses.replace(config, image_size=16, width=64)
    model = randomised(config, dtype=torch.float32).requires_grad_(True)
    x, t, labels = items(config, 1, torch.float32)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        v, _ = model.velocity(x, t, labels)
    total = sum(storage.nbytes() for storage in saved.values()) / config.images_per_item
    assert v.requires_grad and model.activations() == pytest.approx(total, rel=0.25)
