"""Uses of exact likelihoods, on cases whose answer is known."""
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from support import likelihood
from support.cli import run_script

TRAINING = dict(noise="gaussian", noise_end=0.03, holdout=0, data="digits")


class Total(NamedTuple):
    total: torch.Tensor
    logdet: torch.Tensor


class Levels(torch.nn.Module):
    """The exact density of independent pixels, levels alike likely, under Gaussian noise of std sigma."""

    def __init__(self, sigma: float, levels: int = 256):
        super().__init__()
        self.sigma, self.levels = sigma, levels
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def log_prob(self, y, labels=None):
        at = (torch.arange(self.levels, dtype=torch.float64) + 0.5) / 128 - 1
        log_n = -0.5 * ((y.double().flatten(1).unsqueeze(-1) - at) / self.sigma).square()
        log_p = (log_n - math.log(self.sigma * math.sqrt(2 * math.pi) * self.levels)).logsumexp(-1).sum(1)
        return Total(log_p, torch.zeros_like(log_p))


def test_the_bound_is_the_entropy_where_model_and_decoder_are_exact():
    images = torch.randint(0, 256, (40, 1, 2, 2), dtype=torch.uint8)
    result = likelihood.bound(Levels(0.03), TRAINING, images, None, seed=0)
    assert result["bits_per_dim_at_most"] == pytest.approx(8.0, abs=1e-4)


def test_the_bound_lies_above_the_truth_elsewhere():
    """Levels 0 to 15 only have 4 bits; the decoder allows 256, which costs something but less than the difference."""
    images = torch.randint(0, 16, (400, 1, 2, 2), dtype=torch.uint8)
    result = likelihood.bound(Levels(0.03, 16), TRAINING, images, None, seed=0)
    assert 4.0 <= result["bits_per_dim_at_most"] < 5.0


class ByClass(torch.nn.Module):
    """Images of class c are normal around c / 10 with std 0.1."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))
        self.config = type("Config", (), dict(num_classes=3))

    def log_prob(self, y, labels=None):
        mean = torch.zeros(len(y)) if labels is None else labels / 10
        log_p = -0.5 * ((y.flatten(1) - mean[:, None]) / 0.1).square().sum(1)
        return Total(log_p, torch.zeros_like(log_p))


def test_posterior_of_separate_classes_is_right_and_of_shuffled_labels_is_not():
    labels = torch.arange(60) % 3
    pixels = ((labels / 10 + 1) * 128).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    right = likelihood.posterior(ByClass(), TRAINING, pixels, labels, seed=0)
    wrong = likelihood.posterior(ByClass(), TRAINING, pixels, labels.roll(1), seed=0)
    assert right["accuracy"] > 0.9 and wrong["accuracy"] < 0.1


def test_auroc_equals_counting_pairs():
    rng = np.random.default_rng(0)
    low, high = rng.integers(0, 5, 30), rng.integers(1, 7, 20)
    pairs = np.mean([(h > a) + 0.5 * (h == a) for a in low for h in high])
    assert likelihood.auroc(low, high) == pytest.approx(pairs)


def test_ood_tells_apart_what_is_far_away():
    inside = torch.full((30, 1, 4, 4), 128, dtype=torch.uint8)
    result = likelihood.ood(ByClass(), TRAINING, inside, inside + 60, seed=0)
    assert result["total"]["auroc"] == 1.0 and result["log p(z)"]["auroc"] == 1.0
    assert result["logdet"]["auroc"] == 0.5


@pytest.mark.parametrize("argv, word", [("ood nowhere digits", "expected 2"), ("bound nowhere a b", "at most 1"),
                                        ("posterior nowhere", "no such checkpoint")])
def test_refusals_are_one_line(capsys, argv, word):
    with pytest.raises(SystemExit) as error:
        run_script(likelihood.main, argv.split())
    message = capsys.readouterr().err.strip()
    assert error.value.code == 2 and word in message and len(message.splitlines()) == 1
