"""The examples do what their first lines say.

- Every fork trains, resumes, is scored, samples and distils through the scripts.
- The conditional flow reads the class; channel mixing mixes the channels inside a token.
- The Jacobi inverse is right for each image by itself, also where guesses overflow.
- minimal_model and logistic_mixture have the densities that they name, and draw from them.
- check.py passes what is included and says what is wrong with a variant, mistake by mistake.
- The tour prints the model's likelihood, part by part, and draws its picture.
"""
import json
import math
import re

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

import farmer
import fid
import sample
import train
from examples import (
    channel_mixing,
    class_conditional_flow,
    jacobi_inverse,
    latents,
    logistic_mixture,
    minimal_model,
    rope,
    tour,
    vector_condition,
)
from examples import check as checks
from results import benchmark
from support.checkpoints import load

FORKS = (logistic_mixture, class_conditional_flow, channel_mixing, jacobi_inverse, rope)
LABELS = torch.tensor([0, 1, 2, 3, 1])
SMALL = dict(image_size=6, patch_size=3, channels=1, num_classes=3, flow_blocks=3, flow_width=16,
             ar_layers=1, ar_width=16, head_dim=8, informative_dim=5, informative_mixtures=2)


def random_model(module, **settings):
    """A small model in float64 whose weights are far from where they start."""
    torch.manual_seed(0)
    model = module.Model(module.Config(**{**SMALL, **settings})).double().requires_grad_(False)
    for weight in model.parameters():
        weight.add_(0.5 * torch.randn_like(weight) * weight.shape[-1] ** -0.5)
    return model


def random_patches(B=5):
    """X (B, N, d) for such a model."""
    return torch.randn(B, 4, 9, generator=torch.Generator().manual_seed(1)).double()


# ----------------------------------------------------------------------------- the scripts
@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 random images of 8 x 8 in 3 classes."""
    path = tmp_path_factory.mktemp("data") / "data.npz"
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), np.uint8)
    np.savez(path, images=images, labels=np.arange(24) % 3)
    return str(path)


def small(model):
    """Flags of a small model."""
    flags = ["--model", model.__name__, "--image-size", "8"]
    if model in FORKS:
        flags += "--flow-blocks 2 --flow-width 64 --ar-width 64 --informative-mixtures 2".split()
    return flags


def train_small(model, data, out):
    """Three steps."""
    flags = "--steps 3 --batch-size 4 --device cpu".split()
    train.main([*small(model), "--data", data, "--out", out, *flags])


@pytest.mark.parametrize("model", (minimal_model, *FORKS), ids=lambda model: model.__name__)
def test_every_fork_trains_resumes_is_scored_samples_and_distils(
        model, data, tmp_path, capsys):
    out = str(tmp_path / "run")
    train_small(model, data, out)
    train.main(["--resume", "--out", out, "--steps", "5"])
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 5]
    capsys.readouterr()
    train.main(["--eval", out])
    assert math.isfinite(json.loads(capsys.readouterr().out)["nats_per_dim"])

    if model in FORKS:
        train.main(["--distill", out, "--steps", "2"])
        out += "-student"
    sample.main([out, "--num", "4", "--out", str(tmp_path / "samples.npz")])
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (4, 8, 8, 3)
    benchmark.main(["sample", *small(model), "--batch-sizes", "1", "--rounds", "1"])
    assert ("student" in capsys.readouterr().out) == (model in FORKS)


class Averages(torch.nn.Module):
    """A network of two features for any number of channels."""

    def forward(self, x):
        return torch.stack([x.mean((1, 2, 3)), x.square().mean((1, 2, 3))], 1)


@pytest.mark.parametrize("model, kind, condition", [
    (latents, np.float32, (6,)), (vector_condition, np.uint8, (6, 3))])
def test_float_arrays_and_vectors_go_through_every_script(
        model, kind, condition, tmp_path, capsys):
    """Floats keep their units; samples come with the vectors that they were drawn for."""
    run, out = str(tmp_path / "run"), str(tmp_path / "samples.npz")
    small = "--flow-blocks 2 --flow-width 64 --ar-width 64 --steps 3 --device cpu".split()
    train.main(["--model", model.__name__, "--out", run, *small])
    train.main(["--resume", "--out", run, "--steps", "5"])
    capsys.readouterr()
    train.main(["--eval", run])
    assert json.loads(capsys.readouterr().out)["images"] == 200
    train.main(["--distill", run, "--steps", "2"])
    for path in (run, run + "-student"):
        sample.main([path, "--num", "6", "--guidance", "1", "--out", out])
        with np.load(out) as arrays:
            made, labels = arrays["arr_0"], arrays["arr_1"]
        c = load(path)[0].config
        assert made.shape == (6, c.image_size, c.image_size, c.channels) and made.dtype == kind
        assert labels.shape == condition
    if kind == np.float32:
        assert made.min() < -0.1 < 0.1 < made.max() and (made % 1).any()
        np.savez(out, latents=made.transpose(0, 3, 1, 2), labels=labels)
        train.main(["--model", model.__name__, "--data", out, "--out", run + "2", *small,
                    "--batch-size", "6"])  # an .npz of the user's own
    features = str(tmp_path / "features.pt")
    torch.jit.script(Averages()).save(features)
    capsys.readouterr()
    fid.main([run, next(iter(model.PRESETS)), "--num", "4", "--features", features, "--json"])
    assert json.loads(capsys.readouterr().out)["fd"] > 0


# ----------------------------------------------------------------------------- the flows
def test_the_conditional_flow_is_told_the_class_of_this_call_and_null_without_one():
    block = random_model(class_conditional_flow).flow.blocks[0]
    X = random_patches()
    null = torch.full_like(LABELS, 3)
    for run in (block, block.one_step):
        without, with_null, with_class = (run(X, labels) for labels in (None, null, LABELS))
        assert torch.equal(without[0], with_null[0]) and (with_class[0] != with_null[0]).any()


@pytest.mark.parametrize("couplings", [0, 2])
def test_channel_mixing_mixes_the_channels_of_every_token(couplings):
    block = random_model(channel_mixing, couplings=couplings).flow.blocks[1]
    J = torch.autograd.functional.jacobian(lambda x: block(x)[0], random_patches(1)).squeeze()
    for i in range(4):  # J (N, d, N, d)
        own = J[i, :, i]
        assert torch.equal(own, own.diag().diag()) == (couplings == 0)


def test_the_jacobi_inverse_serves_each_image_by_itself_and_recovers_from_overflow(monkeypatch):
    monkeypatch.setattr(jacobi_inverse, "TOLERANCE", 0.3)  # so large that one image stops early
    model = random_model(jacobi_inverse)
    X = random_patches()
    Z, _ = model.flow(X)
    Z[4, 1] = torch.nan
    together = model.flow.inverse(Z)
    alone = torch.cat([model.flow.inverse(z.unsqueeze(0)) for z in Z])
    assert together.isfinite().all((1, 2)).tolist() == [True, True, True, True, False]
    assert ((together - X)[:4].abs().amax((1, 2)) > 1e-10).tolist() == [False, True, False, False]
    assert (together - alone)[:4].abs().max() < 1e-12
    monkeypatch.setattr(jacobi_inverse, "TOLERANCE", 0.0)
    monkeypatch.setattr(farmer, "FLOW_LOG_SCALE_BOUND", 600.0)
    model = random_model(jacobi_inverse, flow_blocks=1)
    model.flow.blocks[0].to_mu_a.weight[9:].mul_(1000)  # of the log scales
    Z, _ = model.flow(X)
    assert (model.flow.inverse(Z) - X).abs().max() < 1e-6


# ----------------------------------------------------------------------------- the densities
def test_a_logistic_mixture_has_the_density_of_scipy_and_draws_from_it():
    torch.manual_seed(0)
    parts = torch.randn(2, 3), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    p = logistic_mixture.Logistics(*[part.double() for part in parts])
    z = 2 * torch.randn(2, 1, 4).double()
    one = scipy.stats.logistic(p.mu, p.log_sigma.exp())
    log_p = torch.tensor(one.logpdf(z)).sum(-1)  # (2, 3)
    expected = (log_p + p.logits.log_softmax(-1)).logsumexp(-1)
    torch.testing.assert_close(p.shared_log_prob(z)[:, 0], expected)
    torch.testing.assert_close(p.log_prob(z[:, 0]), expected)
    draws = p.sample(torch.zeros(2, 20_000), torch.randn(2, 20_000, 4))[0, :, 0]
    law = scipy.stats.logistic(p.mu[0, 0, 0], p.log_sigma[0, 0, 0].exp())
    assert scipy.stats.kstest(draws, law.cdf).pvalue > 1e-3


def test_the_minimal_model_has_the_density_of_its_gaussians():
    torch.manual_seed(0)
    model = minimal_model.Model(minimal_model.Config(num_classes=3)).requires_grad_(False)
    for weight in model.parameters():
        weight.normal_()
    x = torch.randn(5, 3, 16, 16)
    for labels, means in ((LABELS, model.mean[LABELS]), (None, model.mean[3])):
        normal = torch.distributions.Normal(means, model.log_sigma.exp())
        log_p = normal.log_prob(x).sum((1, 2, 3))
        torch.testing.assert_close(model.log_prob(x, labels).total, log_p)


# ----------------------------------------------------------------------------- the check
def test_the_model_of_the_command_line_is_right(pytestconfig):
    name = pytestconfig.getoption("--model", default=None)
    if name is None:
        pytest.skip("checks the model that --model names")
    wrong = [f"{what}: {text}" for what, right, text in checks.checked(name) if not right]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name, lines", [
    ("farmer", 12), ("baselines.jetformer", 12), ("baselines.tarflow", 4), ("baselines.arflow", 4),
    ("examples.latents", 12), ("examples.vector_condition", 12), (minimal_model.__name__, 4),
    *((model.__name__, 12) for model in FORKS)])
def test_what_is_included_passes_its_own_check(name, lines, capsys):
    checks.main([name])
    said = capsys.readouterr().out.splitlines()
    assert [line[:6] for line in said] == lines * ["right "]


FORK = """
import torch
import farmer
from farmer import PRESETS, TRAINING, Config, Sampling, affine

class Block(farmer.FlowBlock):
    {block}

class Model(farmer.Farmer):
    def __init__(self, config):
        super().__init__(config)
        for t, block in enumerate(self.flow.blocks):
            self.flow.blocks[t] = Block(config, block.flip)
        {init}
    {model}
"""
MISTAKES = {  # which line says it: what the variant gets wrong
    "order": dict(block="order = lambda self, x: x.roll(1, 1)"),
    "saving": dict(
        init="self.plain = torch.randperm(16)",
        model="patches = lambda self, x: super().patches(x)[:, self.plain]\n"
        "    images = lambda self, X: super().images(X[:, self.plain.argsort()])"),
    "layers": dict(
        init="self.prior.transformer.more = torch.nn.Linear(32, 32)\n"
        "        self.prior.transformer.register_forward_hook(lambda m, x, h: m.more(h))"),
    "determinant": dict(block="""def forward(self, x, labels=None):
        z, logdet = super().forward(x, labels)
        return z, -logdet"""),
    "cache": dict(init="""def new_cache(T):
            caches = [farmer.KVCache(T)]
            plain = caches[0].append
            caches[0].append = lambda k, v: [plain(k, v), (caches[0].k, caches[0].v)][1]
            return caches
        self.prior.transformer.new_cache = new_cache"""),
    "student": dict(block="""def __init__(self, config, flip):
        super().__init__(config, flip)
        self.classes = torch.nn.Embedding(4, 32)
    def context(self, labels):
        return super().context(labels) + self.classes(labels).unsqueeze(1)
    def one_step(self, z, labels=None):
        return super().one_step(z, torch.zeros_like(labels))"""),
    "labels": dict(model="""def check_labels(self, labels, B):
        return super().check_labels(None if labels is None else labels.long(), B)"""),
    "samples": dict(model="""def sample(self, labels, options=None, generators=None):
        return super().sample(labels, options) """),
    "gradients": dict(init="self.unused = torch.nn.Linear(2, 2)"),
    "inverse": dict(block="""def inverse(self, z, labels=None):
        return super().inverse(z.clamp(-1, 1), labels)"""),
    "patches": dict(model="patches = lambda self, x: super().patches(x.flip(3))"),
    "tokens": dict(model="""def token_log_prob(self, images, labels=None):
        log_p = super().token_log_prob(images, labels)
        return log_p._replace(total=log_p.total.sum(1, keepdim=True))"""),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_check_says_what_is_wrong_with_a_variant(mistake, tmp_path, monkeypatch, capsys):
    parts = dict(block="pass", init="pass", model="pass") | MISTAKES[mistake]
    name = f"wrong_{mistake}"
    (tmp_path / f"{name}.py").write_text(FORK.format(**parts))
    monkeypatch.chdir(tmp_path)
    some = {mistake, "gradients" if mistake == "layers" else "layers"}
    for table in (checks.ANY, checks.FARMERS):
        for what in table.keys() - some:
            monkeypatch.delitem(table, what)
    with pytest.raises(SystemExit) as exit:
        checks.main([name])
    said = {line[7:].split()[0]: line[:5] for line in capsys.readouterr().out.splitlines()
            if line[:5] in ("right", "WRONG")}
    assert exit.value.code == 1 and said == dict.fromkeys(some, "right") | {mistake: "WRONG"}


# ----------------------------------------------------------------------------- the tour
@pytest.mark.parametrize("own_data", [True, False])
def test_the_tour_prints_parts_that_add_up_to_the_likelihood_and_draws_its_stages(
        data, own_data, tmp_path, capsys):
    run = str(tmp_path / "run")
    train_small(channel_mixing, data, run)
    train.main(["--distill", run, "--steps", "1"])
    capsys.readouterr()
    out = str(tmp_path / "tour.png")
    tour.main([run + "-student", "--out", out, *(["--data", data] if own_data else [])])
    printed = capsys.readouterr().out
    *parts, total = [float(number) for number in re.findall(r"(\S+) nats/dim", printed)]
    assert len(parts) == 5 and sum(parts) == pytest.approx(total, abs=0.003)
    exact, student = [float(e) for e in re.findall(r"largest error is (\S+)\.\n", printed)]
    assert exact < 1e-4 < student
    with Image.open(out) as picture:
        assert picture.size == (8 + 7 * 8 + 5 * 106, 4 * 120)
