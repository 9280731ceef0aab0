"""Images as arrays: where they come from, what a run uses of them, and the batch of a step.

    python support/data.py prepare DATA OUT --image-size 64

decodes and crops a set once. Training on OUT then reads its pixels from OUT/images.npy.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(eq=False)
class Images:
    """Images in a fixed order: those of `array` that `numbers` counts, all of them by default.

    Taking some of them (a hold-out) copies no pixels, so a memory-mapped array stays on disk. Use
    `batch`, or `array` only where nothing was held out.
    """

    path: str  # what was opened: digits, or an absolute path; used in messages
    array: np.ndarray  # (M, H, W, C) uint8 with C 1 or 3, or float32; maybe memory-mapped
    labels: np.ndarray | None = None  # (N,) int64, or float32 (N, k); None: no labels
    classes: list[str] | None = None  # the name of each label; None: labels are numbers
    numbers: np.ndarray | None = None  # (N,) int64: the place of each image in `array`
    notes: list[str] = field(default_factory=list)  # what else the summary says

    def __len__(self):
        return len(self.numbers)

    def batch(self, places) -> tuple[Tensor, Tensor]:
        """Images (b, C, H, W) and labels (b,) or (b, k) at these places; zeros without labels."""
        raise NotImplementedError

    def digest(self) -> str:
        """A hash of shape, labels, classes and a sample of the images: which set this is."""
        raise NotImplementedError

    def summary(self, held_out: "Images | None" = None, is_test: bool = False) -> str:
        """What was read, in one line."""
        raise NotImplementedError


@dataclass
class Split:
    """What a run trains on, and what its evaluation uses."""

    train: Images
    held_out: Images | None  # the hold-out, else the set's test split, else nothing
    is_test: bool  # held_out is the test split
    classes: list[str]  # the name of each label; [] where labels are numbers or there are none
    num_classes: int  # 0: no labels, or vectors
    digest: str  # which set it is
    summary: str  # what was read


def open_images(
    source: str,
    image_size: int | None = None,
    channels: int = 3,
    enlarge: bool = False,
    own: Callable | None = None,
) -> tuple[Images, Images | None]:
    """Opens and decodes `source`: its images, and its test split if it has one beside them.

    image_size None: images as they are, all of one size. own: `open_images` of a model's file.
    """
    raise NotImplementedError


def absolute(source: str) -> str:
    """A source as a checkpoint keeps it: names stay, d:train becomes /path/to/d:train."""
    raise NotImplementedError


def labels_for(images: Images, classes: list[str] | None, num_classes: int) -> Images:
    """The same images, labelled as a model with these classes numbers them."""
    raise NotImplementedError


def open_split(
    source: str,
    image_size: int,
    channels: int,
    holdout: int = 0,
    enlarge: bool = False,
    classes: list[str] | None = None,
    num_classes: int | None = None,
    own: Callable | None = None,
) -> Split:
    """Opens `source` for training and evaluation.

    classes: those of a trained model ([]: it knows them as numbers), whose labels the data then
    gets. None: the labels follow the data; num_classes is what a flag asks for, if anything.
    """
    raise NotImplementedError


def hold_out(images: Images, per_class: int) -> tuple[Images, Images]:
    """(train, held out): held out are the last `per_class` of each class, or of all."""
    raise NotImplementedError


def batches(
    images: Images,
    *,
    batch_size: int,
    start_step: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    flip: bool = False,
    epoch_order: Callable | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless, from `start_step` on: images (b, C, H, W), labels (b,) or (b, k), uid int64 (b,)."""
    raise NotImplementedError


def image_generators(seed: int, numbers, device: torch.device) -> list[torch.Generator]:
    """One generator for each image, seeded by (seed, number) alone."""
    raise NotImplementedError


def dequantize(images: Tensor, kind: str, sigma: float, generators: list | None) -> Tensor:
    """uint8 images (B, C, H, W) to floats about [-1, 1]; floats get gaussian noise or none."""
    raise NotImplementedError


def quantize(images: Tensor) -> Tensor:
    """Floats about [-1, 1] (B, C, H, W) to uint8, the inverse of `dequantize`; clamps."""
    raise NotImplementedError


KNOWN = {}  # name of a data set -> where it is downloaded from, and its classes
