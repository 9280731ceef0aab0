"""Latents instead of pixels: float arrays of four channels, such as those of an autoencoder.

    python train.py --model examples.latents --out runs/latents
    python sample.py runs/latents --out latents.npz       # arr_0 holds float32 (N, H, W, C)

Floats are trained on in their own units and are never rounded to 8 bits; --noise-start and
--noise-end are in these units. Here the latents are made up, smooth waves; to train on your own,
write an .npz with `latents` (N, C, H, W) and `labels` (N,) and pass it as --data.
"""
from dataclasses import dataclass

import numpy as np

import farmer
from farmer import Sampling, setting
from support.data import Images

Model = farmer.Farmer


@dataclass(frozen=True)
class Config(farmer.Config):
    channels: int = setting(4, "channels of a latent", 1)


def open_images(source):
    """--data waves, or an .npz with `latents`: (training images, test images); else None."""
    if source == "waves":
        return tuple(waves(num, seed) for num, seed in ((2000, 0), (200, 1)))
    if not source.endswith(".npz"):
        return None
    with np.load(source) as arrays:
        if "latents" not in arrays:
            return None
        latents = arrays["latents"].astype(np.float32).transpose(0, 2, 3, 1)
        return Images(source, latents, arrays["labels"])


def waves(num, seed):
    """Two classes of waves, 8 x 8 x 4: their crests run along the rows or the columns."""
    random = np.random.default_rng(seed)
    labels = np.arange(num) % 2
    phase, size = random.uniform(0, 2 * np.pi, (2, num, 1, 1, 4))
    along = np.linspace(0, 2 * np.pi, 8)
    steps = np.where(labels[:, None, None, None], along[:, None, None], along[:, None])
    array = (0.3 + size / 4) * np.sin(steps + phase)
    return Images("waves", array.astype(np.float32), labels)


PRESETS = {"waves": Config(
    image_size=8, patch_size=2, informative_dim=8, num_classes=2, whiten=True,
    sampling=Sampling(guidance=1.0))}
TRAINING = {"waves": dict(farmer.TRAINING["tiny"], data="waves", noise_start=0.1, noise_end=0.02)}
