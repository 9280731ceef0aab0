"""A model of your own: a Gaussian for each class, with everything the scripts ask of a model.

    python train.py --model examples.minimal_model --out runs/minimal
    python sample.py runs/minimal --temperature 0.8 --out samples.png

Settings become flags of the scripts. `log_prob` is optional: `train.py --eval` needs it.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from farmer import random, setting


@dataclass(frozen=True)
class Sampling:
    temperature: float = setting(1.0, "multiplies the standard deviations")


@dataclass(frozen=True)
class Config:
    image_size: int = setting(16, "height and width of an image in pixels")
    channels: int = setting(3, "1 (grey) or 3 (RGB)")
    num_classes: int = setting(10, "0 = unconditional; label num_classes means no class")
    sampling: Sampling = Sampling()


class LogProb(NamedTuple):
    total: torch.Tensor  # (B,) in nats


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.shape = (config.channels, config.image_size, config.image_size)
        self.mean = nn.Parameter(torch.zeros(config.num_classes + 1, *self.shape))
        self.log_sigma = nn.Parameter(torch.zeros(self.shape))

    def log_prob(self, x, labels=None):
        """log p(x|c) of images x (B, C, H, W) with labels (B,)."""
        if labels is None:
            labels = torch.full((len(x),), self.config.num_classes, device=x.device)
        e = (x - self.mean[labels]) * torch.exp(-self.log_sigma)
        log_normal = -0.5 * e.square() - self.log_sigma - 0.5 * math.log(2 * math.pi)
        return LogProb(log_normal.sum((1, 2, 3)))

    def forward(self, x, labels, generators=None):
        """The values to log, each (B,); training minimises "loss"."""
        nats_per_dim = -self.log_prob(x, labels).total / x[0].numel()
        return dict(loss=nats_per_dim, nats_per_dim=nats_per_dim)

    def sample(self, labels, options=None, generators=None):
        """labels (B,) -> images (B, C, H, W), drawn with one generator for each image."""
        options = options or self.config.sampling
        eps = random(torch.randn, len(labels), self.shape, generators, self.mean)
        return self.mean[labels] + options.temperature * self.log_sigma.exp() * eps


PRESETS = {"default": Config()}
TRAINING = {"default": dict(steps=500, lr=0.01, noise_end=0.05, flip=False)}
