"""What fid.py compares: features of images, their mean and covariance, and files of these.

A feature network maps images (N, 3, H, W) uint8 to features (N, D) float32. It has a `name` and a
`digest`, the SHA-256 of its file. There are two: FID's own, `support.inception.Inception`, and the
user's, `ScriptFeatures`.
"""
import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from support.batches import image_batches
from support.checkpoints import is_checkpoint
from support.cli import Progress, UserError, expanded, reading, write_file
from support.datasets import open_images
from support.distributed import gather, rank_and_world, share
from support.inception import WEIGHTS_SHA256, Inception
from support.sampling import default_labels, sample_images

KEPT = 50_000  # precision, recall and the Inception Score use at most this many of a source


# ----------------------------------------------------------------------------- feature networks
class ScriptFeatures:
    """A TorchScript module that maps images (N, channels, H, W) float in [-1, 1] to (N, D).

    The module's attribute `channels` says what it reads: 3 for RGB, the default, or 1 for
    luminance. The file is a program, which runs when it is opened.
    """

    def __init__(self, path: str, device: torch.device):
        self.path = expanded(path)
        self.name = self.path.name
        with reading(path, "expected a file written by torch.jit.script(module).save(FILE.pt)"):
            content = self.path.read_bytes()
            self.module = torch.jit.load(io.BytesIO(content), map_location=device).eval()
        self.digest = hashlib.sha256(content).hexdigest()
        self.channels = getattr(self.module, "channels", 3)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) uint8 -> (N, D) float32. Raises UserError if the module cannot."""
        if self.channels == 1:
            images = luminance(images)
        advice = (f"its module was given {tuple(images.shape)} and must return (N, D) features; "
                  "a module for luminance needs an attribute channels = 1")
        with reading(self.path, advice):
            try:
                features = self.module((images.float() / 127.5 - 1).contiguous())
            except RuntimeError as error:  # the last line of a module's traceback has the reason
                raise ValueError(str(error).splitlines()[-1]) from None
            if features.ndim != 2 or len(features) != len(images):
                raise ValueError(f"it returned {tuple(features.shape)}")
        return features.float()


def luminance(images: Tensor) -> Tensor:
    """RGB (N, 3, H, W) uint8 -> (N, 1, H, W) uint8, exactly as Pillow's convert("L") does it."""
    r, g, b = images.int().unbind(1)
    return ((19595 * r + 38470 * g + 7471 * b + 32768) >> 16).to(torch.uint8)[:, None]


# ----------------------------------------------------------------------------- statistics
@dataclass
class Statistics:
    """Mean and covariance of features and, if they come from images, the features themselves."""
    path: str
    name: str  # of the feature network
    digest: str | None  # of its file; None: unknown
    mu: np.ndarray  # (D,)
    sigma: np.ndarray  # (D, D)
    num: int | None = None  # how many images; None: unknown
    pool: Tensor = torch.empty(0)  # (min(N, KEPT), D), in a random order, the same every time


def read_statistics(path: str, arrays) -> Statistics:
    """The statistics in an npz file of our own, pytorch-fid's or ADM's."""
    mu = arrays["mu"].astype(np.float64)
    sigma = arrays["sigma"].astype(np.float64)
    if sigma.shape != (len(mu), len(mu)) or not np.isfinite([mu.sum(), sigma.sum()]).all():
        raise ValueError(f"got mu {mu.shape}, sigma {sigma.shape}, expected finite (D,), (D, D)")
    statistics = Statistics(path, "unknown features", None, mu, sigma)
    if len(mu) == 2048:  # the files of pytorch-fid and ADM do not say that they are Inception's
        statistics.name = Inception.name
        statistics.digest = WEIGHTS_SHA256
    if "features_sha256" in arrays:
        statistics.name = str(arrays["features"])
        statistics.digest = str(arrays["features_sha256"])
    if "num" in arrays:
        statistics.num = int(arrays["num"])
    return statistics


def save_statistics(path: str | Path, statistics: Statistics) -> None:
    """mu and sigma as pytorch-fid saves them, the number of images, and the feature network."""
    arrays = dict(mu=statistics.mu, sigma=statistics.sigma, features=statistics.name)
    if statistics.digest is not None:
        arrays["features_sha256"] = statistics.digest
    if statistics.num is not None:
        arrays["num"] = statistics.num
    write_file(path, lambda file: np.savez(file, **arrays))


# ----------------------------------------------------------------------------- sources of images
@dataclass
class Source:
    """SAMPLES or REFERENCE: images still to be read or drawn, statistics, or both."""
    path: str
    summary: str  # what was found
    statistics: Statistics | None = None
    num: int = 0  # how many images
    shape: tuple[int, ...] | None = None  # of an image: (H, W, C)
    batches: Iterable | None = None  # of this process: numbers (b,), uint8 images (b, H, W, C)


def open_source(path: str, shape=None, batch_size=50, workers=0, own=None) -> Source:
    """Opens a data set or an npz file of statistics.

    The built-in digits are drawn at `shape` (H, W, C). own: `open_images` of a model's file.
    """
    statistics = None
    file = expanded(path)
    if file.suffix == ".npz" and file.is_file():
        with reading(path, "expected images, or statistics mu and sigma"), np.load(file) as arrays:
            if "mu" in arrays:
                statistics = read_statistics(path, arrays)
            if statistics and "images" not in arrays and "arr_0" not in arrays:
                return Source(path, f"statistics of {statistics.name}, from {path}", statistics)
    if is_checkpoint(path):
        raise UserError(f"{path}: is a checkpoint; give --num to draw samples from its model")
    size, channels = (shape[0], shape[2]) if shape else (None, 3)
    images = open_images(path, size=size, channels=channels, own=own)
    if images.array is None:
        shape = images.read(0).shape
    else:
        shape = images.array.shape[1:]
    num = len(images)
    batches = image_batches(images, np.array(share(num)), batch_size, workers)
    return Source(path, images.summary(), statistics, num, shape, batches)


def open_samples(path: str, model, options, num: int, seed: int, batch_size: int) -> Source:
    """`num` samples of a model, all classes in turn: the images of sample.py for this seed."""
    config = model.config
    shape = (config.image_size, config.image_size, config.channels)
    part = share(num)
    labels = default_labels(num, config.num_classes)[part.start:part.stop]
    batches = sample_images(model, labels, options, seed, batch_size, part.start)
    return Source(path, f"{num} samples of {path}", None, num, shape, batches)


# ----------------------------------------------------------------------------- measuring
def measure(source: Source, network, device: torch.device) -> Statistics | None:
    """The statistics of a source, on the first process; None on the others.

    If an npz file has some that `network` made, these are used, as in ADM's evaluator.
    """
    known = source.statistics
    if source.batches is None:
        return known
    features = gather(features_of(source, network, device), device)
    if rank_and_world()[0] > 0:
        return None
    features = np.concatenate(features)  # (num, D), in the order of the images
    # The Inception Score needs its images in random order; this order is torch-fidelity's.
    order = np.random.RandomState(2020).permutation(source.num)
    pool = torch.from_numpy(without_nan(features[order[:KEPT]]))
    if known and known.digest == network.digest:
        known.pool = pool
        return known
    features = without_nan(features)
    num = len(features)
    if num < 2:
        raise UserError(f"{source.path}: got {num} images, expected at least 2")
    mu = features.mean(0, dtype=np.float64)
    sigma = np.cov(features, rowvar=False)  # in float64 too
    return Statistics(source.path, network.name, network.digest, mu, sigma, num, pool)


def features_of(source: Source, network, device: torch.device) -> np.ndarray:
    """The features (n, D) float32 of this process's images; NaN where a sample was left out."""
    part = share(source.num)
    progress = Progress(f"{source.path}: image", len(part), quiet=rank_and_world()[0] > 0)
    blank = torch.zeros(1, 3, *source.shape[:2], dtype=torch.uint8, device=device)
    D = network(blank).shape[1]
    features = np.full((len(part), D), np.nan, np.float32)
    for numbers, images, *_ in source.batches:
        if len(numbers) == 0:  # none of these samples was finite
            continue
        if images.shape[1:3] != source.shape[:2]:
            raise UserError(f"{source.path} holds images of different sizes (H, W): "
                            f"{source.shape[:2]}, {images.shape[1:3]}; resize them to one size")
        images = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).to(device)
        h = network(images.expand(-1, 3, -1, -1)).cpu().numpy()  # grey becomes RGB
        finite = np.isfinite(h).all(1)
        if not finite.all():
            raise UserError(f"{source.path}: {network.name} gives image {numbers[~finite][0]} "
                            "features that are not finite; remove the image or use other features")
        features[numbers - part.start] = h
        progress(int(numbers[-1]) + 1 - part.start)
    return features


def without_nan(rows: np.ndarray) -> np.ndarray:
    return rows[~np.isnan(rows[:, 0])]
