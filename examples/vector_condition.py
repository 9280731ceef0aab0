"""A vector instead of a class: discs whose place and size are given, with guidance.

    python train.py --model examples.vector_condition --out runs/discs
    python sample.py runs/discs --out discs.npz       # arr_1 holds the vectors

Labels are (B, condition_dim) float32; a vector of NaN stands for no condition. For data of your
own, let `open_images` return your images and vectors.
"""
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

import farmer
from farmer import Sampling, setting
from support.data import Images


@dataclass(frozen=True)
class Config(farmer.Config):
    num_classes: int = setting(0, "there are no classes", 0, below=1)
    condition_dim: int = setting(3, "length of a condition", 1)


class VectorPrior(farmer.Prior):
    """Reads the condition where FARMER's prior reads the class."""

    def __init__(self, config):
        super().__init__(config)
        W = config.ar_width
        del self.class_embed
        self.read = nn.Sequential(nn.Linear(config.condition_dim, W), nn.GELU(), nn.Linear(W, W))
        self.none = nn.Parameter(0.5 * torch.randn(W))

    def class_tokens(self, labels):
        """labels (B, condition_dim) -> (B, M, W)."""
        without = labels.isnan().any(1, keepdim=True)
        h = torch.where(without, self.none, self.read(labels.nan_to_num(0.0)))
        return h.unsqueeze(1) + self.class_pos

    def null_labels(self, labels):
        return torch.full_like(labels, torch.nan)


class Model(farmer.Farmer):
    def __init__(self, config):
        super().__init__(config)
        self.prior = VectorPrior(config)

    def check_labels(self, labels, B):
        """labels (B, condition_dim), or None for no condition."""
        like = self.prior.none
        shape = (B, self.config.condition_dim)
        if labels is None:
            return like.new_full(shape, torch.nan)
        if labels.shape != shape or not labels.is_floating_point():
            raise ValueError(f"labels: got {labels.dtype} {tuple(labels.shape)}, expected floats "
                             f"{shape}; is --condition-dim right?")
        return labels.to(like)

    def drop_labels(self, labels, mask):
        """What training does to the labels (B, condition_dim) where mask (B,) is True."""
        return labels.masked_fill(mask.unsqueeze(1), torch.nan)


def open_images(source):
    """--data discs: (training images, test images); None for any other source."""
    if source != "discs":
        return None
    return tuple(discs(num, seed) for num, seed in ((2000, 0), (200, 1)))


def discs(num, seed):
    """Light discs on dark ground, 16 x 16, with (row, column, radius) in [-1, 1]."""
    places = np.random.default_rng(seed).uniform(-1, 1, (num, 3)).astype(np.float32)
    images = np.empty((num, 16, 16, 1), np.uint8)
    for i, (row, column, size) in enumerate(places):
        picture = Image.new("L", (64, 64), 40)
        radius = 10 + 4 * size
        x, y = 32 + 16 * column, 32 + 16 * row
        ImageDraw.Draw(picture).ellipse((x - radius, y - radius, x + radius, y + radius), fill=220)
        images[i, :, :, 0] = picture.resize((16, 16), Image.Resampling.BOX)
    return Images("discs", images, places)


PRESETS = {"discs": Config(
    channels=1, whiten=True, informative_dim=8, sampling=Sampling(guidance=1.0, denoise=0.05))}
TRAINING = {"discs": dict(farmer.TRAINING["tiny"], data="discs")}
