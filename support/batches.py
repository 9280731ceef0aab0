"""Images in batches that depend on the seed and the step alone; hold-out; pixels to floats.

    python support/batches.py prepare DATA OUT --image-size 64

decodes and crops a set once. Training on OUT then reads its pixels from OUT/images.npy.
"""
import atexit
import functools
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.cli import Parser, Progress, UserError, at_least, run_script, write_file
from support.datasets import Images, check_labels, labels_for, open_images


# ----------------------------------------------------------------------------- what a run uses
class ImageDataset:
    """Some of the images of a source, cropped."""

    def __init__(self, images: Images, indices: np.ndarray, image_size: int, channels: int):
        self.images = images
        self.indices = indices  # (n,) int64
        self.shape = (image_size, image_size, channels)
        self.labels = np.zeros(len(indices), np.int64)
        if images.labels is not None:
            self.labels = images.labels[indices]
        self.ready = images.array is not None and images.array.shape[1:] == self.shape

    def __len__(self):
        return len(self.indices)

    def arrays(self, places: np.ndarray) -> np.ndarray:
        """Images (b, C, H, W) uint8 at these places in `indices`."""
        if self.ready:
            pixels = self.images.array[self.indices[places]]
        else:
            size, _, channels = self.shape
            crops = [self.images.read(int(i), size, channels) for i in self.indices[places]]
            pixels = np.stack(crops)
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))

    def batch(self, places) -> tuple[Tensor, Tensor]:
        """Images uint8 (b, C, H, W) and labels int64 (b,) at these places in `indices`."""
        places = np.asarray(places, np.int64)
        return torch.from_numpy(self.arrays(places)), torch.from_numpy(self.labels[places])


@dataclass
class Split:
    """What a run trains on, and what its evaluation uses."""

    train: ImageDataset
    held_out: ImageDataset | None  # the hold-out, else the set's test split, else nothing
    is_test: bool  # held_out is the test split
    classes: list[str]  # the name of each label; [] where labels are numbers or there are none
    num_classes: int  # 0: no labels
    digest: str  # which set it is
    summary: str  # what was read


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
    images = open_images(source, image_size, channels, enlarge, own)
    digest = images.digest()
    test = None
    if images.test and not holdout:
        test = open_images(images.test, image_size, channels, enlarge, own)
    if classes is None:
        classes = images.classes if images.labels is not None else None
        if num_classes != 0:
            num_classes = count_classes(images, test, num_classes)
    images = labels_for(images, classes, num_classes)
    if test:
        test = labels_for(test, classes, num_classes)
    train, held = hold_out(images, holdout)
    dataset = ImageDataset(images, train, image_size, channels)
    dataset.arrays(np.arange(1))  # images that are too small show now
    held_out = None
    if holdout:
        held_out = ImageDataset(images, held, image_size, channels)
    elif test:
        held_out = ImageDataset(test, np.arange(len(test)), image_size, channels)
    classes = images.classes or []
    return Split(dataset, held_out, bool(test), classes, num_classes, digest, images.summary(test))


def count_classes(images: Images, test: Images | None, num_classes: int | None) -> int:
    """How many classes a new model has: num_classes where that is given, else those of the data."""
    if images.labels is None:
        return num_classes or 0
    labels = images.labels
    if test is not None:
        labels = np.concatenate([labels, test.labels])
    found = len(images.classes or [])
    if not images.classes:  # labels from 1 to C would leave class 0 empty: an error
        found = int(labels.max()) + int(labels.min() != 1)
    check_labels(images.path, labels, len(labels), num_classes or found)
    return num_classes or found


def hold_out(images: Images, per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, held out), ascending: held out are the last `per_class` of each class."""
    labels = np.zeros(len(images), np.int64) if images.labels is None else images.labels
    held = np.zeros(len(images), bool)
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        if not 0 <= per_class < count:
            raise UserError(f"--holdout: cannot hold out {per_class} images of each class: "
                            f"{images.path} has {count} of class {label}; lower it")
        held[np.flatnonzero(labels == label)[count - per_class:]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


# ----------------------------------------------------------------------------- worker processes
@dataclass
class Work:
    """Lets a DataLoader compute work(x). A UserError travels as a value, so without a traceback."""

    work: Callable

    def __getitem__(self, x):
        try:
            return self.work(x)
        except UserError as error:
            return error


def start_worker(_) -> None:
    """Ctrl-C and SIGTERM reach all processes, and the main one still needs its workers to save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def unchanged(arrays):
    """Instead of DataLoader's tensors, which would fill /dev/shm: arrays come through a pipe."""
    return arrays


def in_workers(work: Callable, todo, workers: int) -> Iterator:
    """work(x), or the UserError it raised, for x in `todo`, in order.

    Worker processes compute it ahead; with 0 of them it is computed here, on demand.
    """
    if not workers:
        yield from map(Work(work).__getitem__, todo)
        return
    loader = torch.utils.data.DataLoader(
        Work(work), batch_size=None, sampler=todo, num_workers=workers, collate_fn=unchanged,
        worker_init_fn=start_worker,
        multiprocessing_context="fork" if sys.platform == "linux" else None)  # it starts at once
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    others = multiprocessing.active_children()
    processes = []
    try:
        results = iter(loader)
        processes = [p for p in multiprocessing.active_children() if p not in others]
        for process in processes:  # at exit Python would send SIGTERM, which they ignore, and wait
            atexit.register(process.kill)
        if handler is not None and threading.current_thread() is threading.main_thread():
            # DataLoader's handler would raise an error anywhere, even during a save. Without it,
            # `next` finds a dead worker within 5 seconds.
            signal.signal(signal.SIGCHLD, handler)
        yield from results
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise UserError("a worker process that reads images died; was it killed, or is the memory "
                        "full? Try fewer --workers") from None
    finally:
        for process in processes:
            process.kill()


def checked(results: Iterator) -> Iterator:
    """The results, up to the first error."""
    for result in results:
        if isinstance(result, UserError):
            raise result
        yield result


# ----------------------------------------------------------------------------- batches
@dataclass
class Batches:
    """The batch of a step: see `batches`."""

    dataset: ImageDataset
    batch_size: int
    seed: int
    rank: int
    world: int
    flip: bool
    epoch_order: Callable | None

    def __post_init__(self):
        self.known = None  # the epoch that is at hand
        self.length = len(self.epoch(0)[0])

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The places (m,) in the order of an epoch, and which of them (m,) are mirrored."""
        if self.known == epoch:
            return self.order, self.coins
        if self.epoch_order:
            generator = image_generators(self.seed, [epoch], torch.device("cpu"))[0]
            labels = torch.from_numpy(self.dataset.labels)
            self.order = self.epoch_order(labels, generator).numpy()
        else:
            self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
        self.coins = np.random.default_rng([self.seed, epoch, 1]).random(len(self.order)) < 0.5
        self.known = epoch
        return self.order, self.coins

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        share = self.batch_size // self.world
        uid = step * self.batch_size + self.rank * share + np.arange(share)
        places = np.empty(share, np.int64)
        mirrored = np.empty(share, bool)
        for j, g in enumerate(uid.tolist()):
            order, coins = self.epoch(g // self.length)
            places[j] = order[g % self.length]
            mirrored[j] = coins[g % self.length]
        images = self.dataset.arrays(places)
        if self.flip:
            images[mirrored] = images[mirrored, :, :, ::-1]
        return images, self.dataset.labels[places], uid


def batches(
    dataset: ImageDataset,
    *,
    batch_size: int,
    start_step: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 2,
    flip: bool = False,
    epoch_order: Callable | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless, from `start_step` on: images uint8 (b, C, H, W), labels int64 (b,), uid int64 (b,).

    b = batch_size / world. Sample g = step * batch_size + j is number g % m in the order of epoch
    g // m; process `rank` takes j in [rank b, (rank + 1) b); uid is g. With `flip` half of the
    samples are mirrored. All this depends on seed and g alone, whatever the start, the workers and
    the world. epoch_order(labels (n,), generator) -> places (m,), of the same length for every
    epoch, replaces the permutation.
    """
    if batch_size < 1 or batch_size % world:
        raise UserError(f"--batch-size: got {batch_size}, expected a multiple of the {world} "
                        "processes")
    array = dataset.images.array
    if dataset.ready and (not isinstance(array, np.memmap) or array.nbytes < 2**30):
        workers = 0  # an array in memory needs none; a large file may have to be waited for
    make = Batches(dataset, batch_size, seed, rank, world, flip, epoch_order)
    for arrays in checked(in_workers(make, itertools.count(start_step), workers)):
        yield tuple(torch.from_numpy(array) for array in arrays)


def read_batch(images: Images, size: int | None, channels: int, numbers: np.ndarray) -> np.ndarray:
    """Images (b, H, W, C) uint8; UserError where they are not of one size."""
    if size is None and images.array is not None:
        return images.array[numbers]
    batch = [images.read(int(i), size, channels) for i in numbers]
    sizes = {f"{image.shape[1]}x{image.shape[0]}" for image in batch}
    if len(sizes) > 1:
        raise UserError(f"{images.path} holds images of different sizes: {', '.join(sizes)}; bring "
                        "them to one")
    return np.stack(batch)


def image_batches(
    images: Images,
    numbers: np.ndarray,
    batch_size: int,
    workers: int = 0,
    size: int | None = None,
    channels: int = 3,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The numbers (b,) and images (b, H, W, C) uint8 of these images, decoded ahead by workers.

    With `size` they are cropped to (size, size, channels).
    """
    groups = [numbers[i:i + batch_size] for i in range(0, len(numbers), batch_size)]
    if images.array is not None:
        workers = 0
    read = functools.partial(read_batch, images, size, channels)
    yield from zip(groups, checked(in_workers(read, groups, workers)), strict=True)


# ----------------------------------------------------------------------------- uint8 and floats
def image_generators(seed: int, numbers, device: torch.device) -> list[torch.Generator]:
    """One generator for each image, seeded by (seed, number) alone."""
    found = []
    for number in numbers:
        state = np.random.SeedSequence([seed, int(number)]).generate_state(1, np.uint64)[0]
        found.append(torch.Generator(device).manual_seed(int(state) >> 1))
    return found


def dequantize(images: Tensor, kind: str, sigma: float, generators: list | None) -> Tensor:
    """uint8 images (B, C, H, W) to floats x about [-1, 1] (section 3.2).

    Each image takes its noise from its own generator.

    gaussian: x = (x_int + 1/2) / 128 - 1 + sigma eps,        eps ~ N(0, 1)
    uniform:  x = (x_int + u) / 128 - 1,                      u ~ U[0, 1); bounds the 8-bit density
    rgb:      x = (x_int + round(sigma eps) + u) / 128 - 1,   sigma in steps of the 8 bits
    none:     x = (x_int + 1/2) / 128 - 1
    """

    def draw(law: Callable) -> Tensor:
        shape = images.shape[1:]
        return torch.stack([law(shape, generator=g, device=images.device) for g in generators])

    x = images.float()
    if kind == "gaussian":
        return (x + 0.5) / 128 - 1 + sigma * draw(torch.randn)
    if kind == "uniform":
        return (x + draw(torch.rand)) / 128 - 1
    if kind == "rgb":
        steps = (sigma * draw(torch.randn)).round()
        return (x + steps + draw(torch.rand)) / 128 - 1
    if kind == "none":
        return (x + 0.5) / 128 - 1
    raise UserError(f"noise: got {kind}, expected gaussian, uniform, rgb or none")


def quantize(images: Tensor) -> Tensor:
    """Floats about [-1, 1] (B, C, H, W) to uint8, the inverse of `dequantize`; clamps."""
    return ((images + 1) * 128).floor().clamp(0, 255).to(torch.uint8)


# ----------------------------------------------------------------------------- prepare
def prepare(images: Images, out: Path, size: int, channels: int, workers: int) -> None:
    """Writes images.npy, labels.npy and classes.json.

    images.npy comes last and only when all is well. UserError that names all broken images.
    """
    out.mkdir(parents=True)
    if images.labels is not None:
        np.save(out / "labels.npy", images.labels)
        if images.classes:
            (out / "classes.json").write_text(json.dumps(images.classes))

    def write(file) -> None:
        shape = (len(images), size, size, channels)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        progress = Progress(f"preparing {images.path}", len(images))
        broken = []
        read = functools.partial(images.read, size=size, channels=channels)
        for i, image in enumerate(in_workers(read, range(len(images)), workers)):
            if isinstance(image, UserError):
                broken.append(str(image))
            else:
                file.write(image)
            progress(i + 1)
        if broken:
            raise UserError(f"{len(broken)} of {len(images)} images cannot be used: "
                            f"{'; '.join(broken)}")

    write_file(out / "images.npy", write)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="batches.py",
        usage="python support/batches.py prepare DATA OUT --image-size N [options]",
        description="""Decode and crop a set of images once, so that training does not have to.

    python support/batches.py prepare path/to/images prepared --image-size 64
    python train.py --preset imagenet64 --data prepared

A test split beside the training images is prepared too, into OUT/train and
OUT/test. Where images cannot be read, all of them are named, and images.npy is
not written.""")
    parser.add_argument("command", choices=["prepare"], metavar="prepare",
                        help="the only command")
    parser.add_argument("data", metavar="DATA", help="the images: what train.py takes as --data")
    parser.add_argument("out", metavar="OUT", type=Path,
                        help="a new folder for images.npy, labels.npy and classes.json")
    group = parser.add_argument_group("images")
    group.add_argument("--image-size", type=at_least(int, 1), required=True, metavar="N",
                       help="crop to the centre square and resize to N x N pixels (required)")
    group.add_argument("--channels", type=int, choices=(1, 3), default=3,
                       help="1 (grey) or 3 (RGB) (default: 3)")
    group.add_argument("--enlarge", action="store_true",
                       help="enlarge images smaller than --image-size instead of refusing")
    how = parser.add_argument_group("how it runs")
    how.add_argument("--workers", type=at_least(int, 0), default=os.cpu_count(), metavar="N",
                     help="processes that decode images (default: one per CPU core, here "
                     "%(default)s)")
    args = parser.parse_args(argv)
    options = (args.image_size, args.channels, args.enlarge)
    images = open_images(args.data, *options)
    print(f"data: {images.summary()}", flush=True)
    parts = {"": images}
    if images.test:
        parts = {"train": images, "test": open_images(images.test, *options)}
    if args.out.exists():
        raise UserError(f"{args.out} exists; choose a new folder")
    for name, part in parts.items():
        prepare(part, args.out / name, args.image_size, args.channels, args.workers)
    print(f"saved in {args.out}: train on it with --data {args.out}")


if __name__ == "__main__":
    run_script(main)
