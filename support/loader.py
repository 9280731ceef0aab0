"""Serving images in batches: what a run trains on and is tested with, and batches that depend on the step alone."""
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from support.cli import Progress, UserError, warn
from support.crops import cache_images, fingerprint
from support.data import Images, open_images, report_broken, spread
from support.processes import in_workers


# ------------------------------------------------------------------------------------------ what a run trains on
@dataclass
class Split:
    """What a run trains on and what its evaluation uses: the hold-out, else the set's test split, else nothing."""

    data: "ImageDataset"
    indices: np.ndarray  # (n,) int64, of `data`
    val: "ImageDataset"
    val_indices: np.ndarray  # (m,) int64, of `val`
    num_classes: int  # 0: no labels
    fingerprint: dict  # of the content, wherever it lies: see `fingerprint`


def open_split(
    data: str,
    image_size: int,
    channels: int,
    holdout: int = 0,
    enlarge: bool = False,
    cache: str | None = None,
    workers: int = 2,
    num_classes: int | None = None,
) -> Split:
    """Opens `data` for training and evaluation, with crops from the folder `cache` when that is given.

    A split that is named (`D:train`, `D:test`) stands alone. num_classes None follows the data; with a number, labels
    must be below it (0: they are not used). Labels from 1 to C become 0 to C - 1, which is said on stderr.
    Needs no process group: under torchrun every rank calls this before it joins, and one of them builds the cache.
    """
    images = open_images(data, enlarge, image_size, channels)
    test = open_images(images.test, enlarge, image_size, channels) if images.test and not holdout else None
    images, test = _labels_from_zero(images, test, num_classes)
    classes = _count_classes(images, test, num_classes)
    identity = fingerprint(images)
    dataset = _dataset(images, image_size, channels, cache, workers)
    indices, val_indices = hold_out(dataset.images, holdout)
    val = dataset
    if test is not None:
        val = _dataset(test, image_size, channels, os.path.join(cache, "test") if cache else None, workers)
        val_indices = np.arange(len(val))
    return Split(dataset, indices, val, val_indices, classes, identity | {"training": len(indices)})


def _dataset(images: Images, image_size: int, channels: int, cache: str | None, workers: int) -> "ImageDataset":
    if cache and images.path != "digits":
        images = cache_images(images, image_size, channels, cache, workers)
    elif images.array is None:
        check_images(images, image_size)
    return ImageDataset(images, image_size, channels)


def _found_labels(images: Images, test: Images | None) -> np.ndarray:
    """The labels of both, each once, ascending; none where the training images have none."""
    if images.labels is None:
        return np.zeros(0, np.int64)
    if test is None or test.labels is None:
        return np.unique(images.labels)
    return np.union1d(images.labels, test.labels)


def _labels_from_zero(images: Images, test: Images | None, num_classes: int | None):
    """Both with labels 1 to C as 0 to C - 1. With num_classes known, C must be that: a part of the classes stays."""
    found = _found_labels(images, test)
    top = num_classes or len(found)
    if images.classes or len(found) < 2 or found[0] != 1 or found[-1] != top:
        return images, test
    warn(f"{images.path}: labels go from 1 to {top}; label 1 is class 0 here")
    images = replace(images, labels=images.labels - 1)
    if test is not None and test.labels is not None:
        test = replace(test, labels=test.labels - 1)
    return images, test


def _count_classes(images: Images, test: Images | None, num_classes: int | None) -> int:
    """The number of classes, checked against `num_classes` where that is given."""
    found = _found_labels(images, test)
    if num_classes == 0:
        return 0
    if not len(found):
        if num_classes:
            raise UserError(f"{images.path} has no labels, but num_classes is {num_classes}; "
                            "use class folders or --num-classes 0")
        return 0
    held = max(int(found[-1]) + 1, len(images.classes or []))
    if num_classes and found[-1] >= num_classes:
        raise UserError(f"{images.path} has labels up to {found[-1]}, but num_classes is {num_classes}; "
                        f"pass --num-classes {held}")
    if not num_classes and len(found) < held:
        missing = np.setdiff1d(np.arange(len(found) + 1), found)[0]
        warn(f"{images.path}: {held - len(found)} of the classes 0 to {held - 1} have no images, as class {missing}")
    return num_classes or held


def hold_out(images: Images, per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, validation), ascending.

    Validation is the last `per_class` images of each class, or of the whole set when it has no labels.
    """
    labels = np.zeros(len(images), np.int64) if images.labels is None else images.labels
    found, counts = np.unique(labels, return_counts=True)
    if not 0 <= per_class < counts.min():
        few = found[counts.argmin()]
        who = "the set"
        if images.labels is not None:
            who = f"class {images.classes[few] if images.classes else few}"
        raise UserError(f"cannot hold out {per_class} images per class: {who} has {counts.min()}; "
                        f"expected 0 to {counts.min() - 1}")
    held = np.zeros(len(images), bool)
    for group in _by_label(labels):
        held[group[len(group) - per_class:]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def _by_label(labels: np.ndarray) -> list[np.ndarray]:
    """The places of each label, in the order of the labels."""
    counts = np.unique(labels, return_counts=True)[1]
    return np.split(np.argsort(labels, kind="stable"), counts.cumsum()[:-1])


# ------------------------------------------------------------------------------------------ images that cannot be used
def check_images(images: Images, image_size: int, limit: int = 10_000) -> list[str]:
    """A look before a run at the headers of up to `limit` images spread over the set: returns the errors it found.

    It names them on stderr; more than 1% of those looked at is a UserError.
    What only decoding shows, such as a truncated JPEG, ImageDataset meets later.
    """
    errors, look_at = [], spread(len(images), limit)
    progress = Progress("looking at images", len(look_at))
    for done, i in enumerate(look_at):
        try:
            images.read(i, image_size, decode=False)
        except UserError as error:
            errors.append(str(error))
            report_broken(error, len(errors), len(look_at))
        progress(done + 1)
    return errors


class ImageDataset(torch.utils.data.Dataset):
    """Item i: (uint8 (C, H, W), int label, 0 in a set without labels).

    An image that cannot be used is named once on stderr and the next one stands in for it; more than 1% of them (one
    is always allowed) is a UserError. Each worker process counts those it has met. The stand-in depends on the files
    alone, so batches are the same for any number of workers.
    """

    def __init__(self, images: Images, image_size: int, channels: int):
        if channels not in (1, 3):
            raise UserError(f"channels is {channels}; expected 1 (grey) or 3 (RGB)")
        self.images, self.image_size, self.channels = images, image_size, channels
        self.labels = np.zeros(len(images), np.int64) if images.labels is None else images.labels
        shape = (image_size, image_size, channels)
        self.ready = images.array is not None and images.array.shape[1:] == shape
        self.broken: set[int] = set()
        if images.array is not None:
            images.read(0, image_size)  # one size for all: if this is too small, so are they

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.usable(range(len(self)), i)

    def item(self, i: int) -> tuple[Tensor, int] | None:
        """Item i; None when it cannot be used."""
        if i in self.broken:
            return None
        try:
            pixels = self.images.read(i, self.image_size, self.channels)
        except UserError as error:
            self.broken.add(i)
            report_broken(error, len(self.broken), len(self))
            return None
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), int(self.labels[i])

    def usable(self, indices, k: int) -> tuple[Tensor, int]:
        """Item indices[k], or the first usable one after it.

        It is one of `indices`, so that no held-out image stands in for a training image.
        """
        for step in range(len(indices)):
            item = self.item(int(indices[(k + step) % len(indices)]))
            if item is not None:
                return item
        raise UserError(f"{self.images.path}: none of {len(indices)} images can be used: check --data")

    def batch(self, indices, k=None) -> tuple[Tensor, Tensor]:
        """Items indices[k], all for k None: images uint8 (b, C, H, W), labels int64 (b,)."""
        indices = np.asarray(indices)
        k = np.arange(len(indices)) if k is None else k
        if self.ready:
            # In numpy: torch would wake its threads for each little copy, 30 times slower when the cores are busy.
            i = indices[k]
            return torch.from_numpy(self.images.array[i].transpose(0, 3, 1, 2).copy()), torch.from_numpy(self.labels[i])
        return stacked([self.usable(indices, int(j)) for j in k])


def stacked(items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Images (b, C, H, W) and labels (b,) of b items."""
    images = torch.stack([image for image, _ in items])
    return images, torch.tensor([label for _, label in items])


# ------------------------------------------------------------------------------------------ batches
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order (n,) int64 of epoch `epoch`: a permutation that depends on nothing but the arguments."""
    return np.random.default_rng([seed, epoch]).permutation(n)


@lru_cache(maxsize=2)
def _epoch(n: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Order (n,) and coins (n,) bool for the mirroring, by place in the epoch."""
    return epoch_order(n, seed, epoch), np.random.default_rng([seed, epoch, 1]).random(n) < 0.5


@dataclass
class _Batches:
    """Makes the batch of a step: see `batches` for the rules. Picklable, for workers that are not forked."""

    dataset: ImageDataset
    indices: np.ndarray
    seed: int
    flip: bool
    global_batch: int
    rank: int
    share: int  # images of this process in a batch
    images_per_item: int

    def __post_init__(self):
        if self.images_per_item > 1:
            self.groups = _by_label(self.dataset.labels[self.indices])  # of each class, places in `indices`
            self.group_of = np.empty(len(self.indices), np.int64)
            for number, group in enumerate(self.groups):
                self.group_of[group] = number

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        uid = step * self.global_batch + self.rank * self.share + np.arange(self.share)
        images, labels, heads = self.single(uid) if self.images_per_item == 1 else self.grouped(uid)
        if self.flip:
            images.numpy()[heads] = images.numpy()[heads, ..., ::-1]
        return images, labels, torch.from_numpy(uid)

    def single(self, uid: np.ndarray) -> tuple[Tensor, Tensor, np.ndarray]:
        """Images, labels and coins (b,) bool of samples `uid`."""
        n = len(self.indices)
        epoch, place = np.divmod(uid, n)
        k, heads = [], []
        for e in np.unique(epoch):
            order, coins = _epoch(n, self.seed, int(e))
            k.append(order[place[epoch == e]])
            heads.append(coins[place[epoch == e]])
        images, labels = self.dataset.batch(self.indices, np.concatenate(k))
        return images, labels, np.concatenate(heads)

    def grouped(self, uid: np.ndarray) -> tuple[Tensor, Tensor, np.ndarray]:
        """The same for items of images_per_item images: samples `uid` are those of whole items."""
        items = [self.item(int(first) // self.images_per_item) for first in uid[::self.images_per_item]]
        images = torch.cat([images for images, _, _ in items])
        labels = torch.cat([labels for _, labels, _ in items])
        return images, labels, np.concatenate([heads for _, _, heads in items])

    def item(self, number: int) -> tuple[Tensor, Tensor, np.ndarray]:
        """Item `number`: the image whose turn it is in the epoch, then others of its class, drawn without repeats."""
        n, S = len(self.indices), self.images_per_item
        epoch, place = divmod(number, n)
        first = _epoch(n, self.seed, epoch)[0][place]
        group = self.groups[self.group_of[first]]
        others = group[group != first]
        rng = np.random.default_rng([self.seed, number, 3])
        heads = rng.random(S) < 0.5
        drawn = rng.choice(len(others), min(len(others), S + 7), replace=False)  # a few to stand in for broken files
        k = np.array([first, *others[drawn]])
        if self.dataset.ready:
            return *self.dataset.batch(self.indices, k[:S]), heads
        found = (self.dataset.item(int(i)) for i in self.indices[k])
        good = list(itertools.islice((item for item in found if item is not None), S))
        if len(good) < S:
            raise UserError(f"{self.dataset.images.path}: too many images of one class cannot be used: check --data")
        return *stacked(good), heads


def batches(
    dataset: ImageDataset,
    indices: np.ndarray,
    *,
    global_batch: int,
    start_step: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 2,
    flip: bool = False,
    images_per_item: int = 1,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless, from `start_step` on: images uint8 (b, C, H, W), labels int64 (b,), uid int64 (b,), b being
    global_batch / world.

    Sample g = step * global_batch + j is number g % n in the order of epoch g // n, so no epoch's end is dropped;
    rank r takes j in [r b, (r+1) b); uid is g. Images, order and mirroring (`flip`: half of the samples) depend on
    seed and g alone, whatever the start, workers and world.

    images_per_item S > 1: item i is the S samples from i S on, different images of one class, each mirrored on its own;
    the first is number i % n in the order of epoch i // n, the others are drawn by (seed, i).
    UserError: the batch is no multiple of world * S, there are no images, or a class has fewer than S.
    """
    if global_batch < 1 or global_batch % (world * images_per_item):
        items = f" x {images_per_item} images per item" if images_per_item > 1 else ""
        raise UserError(f"global batch is {global_batch}; expected a positive multiple of the {world} processes{items}"
                        ": change --batch-size")
    if not len(indices):
        raise UserError(f"{dataset.images.path}: no images to train on; expected at least 1")
    indices = np.asarray(indices)
    smallest = np.unique(dataset.labels[indices], return_counts=True)[1].min()
    if smallest < images_per_item:
        raise UserError(f"{dataset.images.path}: a class has {smallest} images to train on; this model takes "
                        f"{images_per_item} of one class at a time: add images or lower --images-per-item")
    array = dataset.images.array
    if dataset.ready and (not isinstance(array, np.memmap) or array.nbytes < 2**30):
        workers = 0  # indexing an array beats another process; a large mapped file may wait for the disk: read ahead
    make = _Batches(dataset, indices, seed, flip, global_batch, rank, global_batch // world, images_per_item)
    for batch in in_workers(make, itertools.count(start_step), workers):
        if isinstance(batch, UserError):
            raise batch
        yield tuple(batch)
