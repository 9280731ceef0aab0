"""From images to what fid.py compares: features by a network, their mean and covariance, and files that hold these.

A network maps images (N, 3, H, W) uint8 to features (N, D) float32. It has a `name` and the `digest` (SHA-256) of the
file that it came from. There are two: the FID's, `support.inception.Inception`, and the user's own, `ScriptFeatures`.
"""
import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from support.checkpoint import is_checkpoint
from support.cli import Progress, UserError, expanded, first_line, warn, write_file
from support.data import Images, open_images
from support.distributed import gather, max_over_processes, rank_and_world, share
from support.inception import WEIGHTS_SHA256, Inception, file_digest
from support.processes import in_workers
from support.sampling import default_labels, sample_images

KEPT = 50_000  # images of a set whose features are kept for precision, recall and IS: 400 MB of (50000, 2048)


# ------------------------------------------------------------------------------------------ a network of one's own
class ScriptFeatures:
    """A TorchScript module from `path`: (N, channels, H, W) float in [-1, 1] at the images' own size -> (N, D).

    channels is its attribute of that name where it has one, else 3, or 1 where the module fails on 3. A module of 1
    channel is given the luminance. The file is a program: loading it runs what is in it.
    """

    def __init__(self, path: str, device: torch.device):
        file = expanded(path)
        self.name = file.name
        try:
            self.digest = file_digest(file)
            self.module = torch.jit.load(file, map_location=device).eval()
        except Exception as error:  # zip, JSON and operator errors of several types
            raise UserError(f"--features {path}: not a TorchScript module ({reason_of(error)}); "
                            "write it with torch.jit.script(module).save(FILE.pt)") from None
        channels = getattr(self.module, "channels", None)
        self.channels = channels if channels in (1, 3) else None
        self.warned = False

    def __call__(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) uint8 -> (N, D) float32. Raises UserError when the module does not give that."""
        if self.channels is None:
            self.channels = self.find_channels(images)
        if self.channels == 1:
            self.warn_of_colours(images)
            images = luminance(images)
        try:
            features = self.module((images.float() / 127.5 - 1).contiguous())
        except Exception as error:  # a module of the user's may raise anything
            raise UserError(f"--features {self.name}: failed on images {tuple(images.shape)}: "
                            f"{reason_of(error)}") from None
        if not torch.is_tensor(features) or features.ndim != 2 or len(features) != len(images):
            got = tuple(features.shape) if torch.is_tensor(features) else type(features).__name__
            raise UserError(f"--features {self.name}: expected ({len(images)}, D) from images {tuple(images.shape)}, "
                            f"got {got}")
        return features.float()

    def find_channels(self, images: Tensor) -> int:
        """1 for a module that runs on 1 channel and not on 3, else 3."""
        for channels in (3, 1):
            try:
                self.module(torch.zeros_like(images[:, :channels], dtype=torch.float32))
                return channels
            except Exception:  # a module of the user's may raise anything
                pass
        return 3  # both fail: __call__ reports it

    def warn_of_colours(self, images: Tensor) -> None:
        if not self.warned and bool((images != images[:, :1]).any()):
            warn(f"--features {self.name} reads 1 channel: colour images are given to it as their luminance")
            self.warned = True


def luminance(images: Tensor) -> Tensor:
    """RGB (N, 3, H, W) uint8 -> (N, 1, H, W) uint8: ITU-R 601, in the integers of Pillow's convert("L")."""
    r, g, b = images.int().unbind(1)
    return ((19595 * r + 38470 * g + 7471 * b + 32768) >> 16).to(torch.uint8)[:, None]


def reason_of(error: Exception) -> str:
    """The first line of an error; of one in a TorchScript module the last, which has the reason."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = lines[-1] if "TorchScript interpreter" in lines[0] else lines[0]
    return line[:200]


class Moments:
    """Mean and covariance of rows that arrive in pieces, in float64 and one pass. Merges (Chan et al. 1983, eq. 2.1)

        mean = mean_a + delta n_b/n,   S = S_a + S_b + delta delta^T n_a n_b/n,   delta = mean_b - mean_a,

    S = sum (x - mean)(x - mean)^T, in blocks of 512 rows whatever the pieces: these do not change a bit of the result.
    """

    def __init__(self, dim: int):
        self.n, self.mu, self.scatter = 0, np.zeros(dim), np.zeros((dim, dim))
        self.block, self.fill = np.empty((512, dim)), 0

    def add(self, rows: np.ndarray) -> None:
        """rows (n, D)."""
        while len(rows):
            take = min(len(rows), len(self.block) - self.fill)
            self.block[self.fill:self.fill + take] = rows[:take]
            self.fill += take
            rows = rows[take:]
            if self.fill == len(self.block):
                self.merge()

    def merge(self) -> None:
        block, n_b = self.block[:self.fill], self.fill
        n = self.n + n_b
        mean_b = block.mean(0)
        delta = mean_b - self.mu
        scatter_b = (block - mean_b).T @ (block - mean_b)
        self.scatter += scatter_b + np.outer(delta, delta) * (self.n * n_b / n)
        self.mu = self.mu + delta * (n_b / n)
        self.n, self.fill = n, 0

    def count(self) -> int:
        return self.n + self.fill

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """mu (D,) and the unbiased sigma (D, D), as numpy.cov."""
        if self.fill:
            self.merge()
        return self.mu, self.scatter / (self.n - 1)

# ------------------------------------------------------------------------------------------ one side of the comparison
@dataclasses.dataclass
class Side:
    """SAMPLES or REFERENCE: statistics, and the features they came from where there are images."""
    source: str
    features: str  # the network's name
    digest: str | None  # of the network's file; None: unknown
    mu: np.ndarray  # (D,)
    sigma: np.ndarray  # (D, D)
    num: int | None = None  # images behind mu and sigma; None: the file does not say
    pool: Tensor | None = None  # (min(N, KEPT), D) float32, in a random order that is always the same
    size: str | None = None  # "64x64"

    def described(self) -> str:
        file = f"sha256 {self.digest[:12]}" if self.digest else "of an unknown file"
        return f"{len(self.mu)} {self.features} features ({file})"

    def matches(self, name: str, digest: str | None) -> bool:
        """Whether these are that network's features. Its file's content decides, its name where that is unknown."""
        return (self.digest or self.features) == (digest or name)


def read_statistics(path: str) -> tuple[Side | None, bool]:
    """The statistics in `path`, None when it is not an .npz that has them, and whether it has images (too)."""
    file = expanded(path)
    if file.suffix.lower() != ".npz" or not file.is_file():
        return None, True
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if "mu" not in arrays and "sigma" not in arrays:
                return None, True
            mu = arrays["mu"].astype(np.float64, casting="same_kind")
            sigma = arrays["sigma"].astype(np.float64, casting="same_kind")
            num = int(arrays["num"]) if "num" in arrays else None
            name = str(arrays["features"]) if "features" in arrays else None
            digest = str(arrays["features_sha256"]) if "features_sha256" in arrays else None
            has_images = "images" in arrays or "arr_0" in arrays
    except Exception as error:  # zipfile, zlib and numpy each have errors of their own for a damaged file
        raise UserError(f"{path}: not an .npz with mu and sigma: {first_line(error)}") from None
    if mu.ndim != 1 or sigma.shape != mu.shape * 2 or not mu.size:
        raise UserError(f"{path}: mu is {mu.shape} and sigma {sigma.shape}, expected (D,) and (D, D)")
    if num is not None and num < 2:
        raise UserError(f"{path}: says that {num} images are behind it, expected at least 2")
    finite = (np.abs(mu) < 1e150).all() and (np.abs(sigma) < 1e150).all()  # squares are finite too; NaN is not
    if not finite or not np.allclose(sigma, sigma.T, rtol=1e-3, atol=1e-6):
        raise UserError(f"{path}: mu and sigma must be finite and sigma symmetric: compute the statistics again")
    if name is None:  # pytorch-fid's and ADM's files do not name their features
        name = Inception.name if mu.shape == (2048,) else "unnamed"
    if name == Inception.name and digest is None:
        digest = WEIGHTS_SHA256
    return Side(path, name, digest, mu, sigma, num), has_images


@dataclasses.dataclass
class Opened:
    """A side before the work: the statistics or the images that its path holds, or both."""
    path: str
    statistics: Side | None
    images: Images | None
    shape: tuple[int, int, int] | None  # (H, W, 3) of the first image

    def size_and_channels(self) -> tuple[int | None, int]:
        """At which the built-in digits are drawn to stand beside these images. (None, 3): statistics alone."""
        array = self.images.array if self.images else None
        return self.shape[0] if self.shape else None, 3 if array is None else array.shape[-1]


def open_side(path: str, size: int | None = None, channels: int = 3) -> Opened:
    """Opens a D of train.py's --data or an .npz of statistics. UserError: neither, or fewer than two images.

    size and channels are those at which the built-in digits are drawn.
    """
    statistics, has_images = read_statistics(path)
    if not has_images:
        return Opened(path, statistics, None, None)
    hint = "; to sample from the checkpoint in it, give --num" if is_checkpoint(path) else ""
    try:
        images = open_images(path, size=size, channels=channels)
    except UserError as error:
        raise UserError(f"{error}{hint}") from None
    if len(images) < 2:
        raise UserError(f"{path}: got {len(images)} image, expected at least 2, better 50,000{hint}")
    return Opened(path, statistics, images, images.read(0).shape)


def save_statistics(path: str | Path, side: Side) -> None:
    """mu and sigma, as pytorch-fid has them, with `num`, the name of the features and the hash of their file."""
    arrays = dict(mu=side.mu, sigma=side.sigma, features=side.features)
    if side.num is not None:
        arrays["num"] = side.num
    if side.digest is not None:
        arrays["features_sha256"] = side.digest
    write_file(path, lambda file: np.savez(file, **arrays))


# ------------------------------------------------------------------------------------------ images in batches
Batch = tuple[np.ndarray, np.ndarray]  # numbers of images (b,), ascending, and the images (b, H, W, C) uint8, C 1 or 3


def image_batches(images: Images, shape: tuple, batch_size: int, workers: int) -> Iterator[Batch]:
    """This process's share of a set. UserError names an image that is broken, or not of shape (H, W, 3)."""
    part = share(len(images))
    workers = workers if images.array is None else 0
    work = partial(read_batch, images, shape, batch_size, part.stop)
    starts = range(part.start, part.stop, batch_size)
    for start, batch in zip(starts, in_workers(work, starts, workers), strict=True):
        if isinstance(batch, UserError):
            raise batch
        yield np.arange(start, start + len(batch)), np.asarray(batch)


def read_batch(images: Images, shape: tuple[int, int, int], batch_size: int, stop: int, start: int) -> np.ndarray:
    """Images start to start + batch_size, or to stop, (b, H, W, C) uint8. UserError where one is not of `shape`."""
    stop = min(start + batch_size, stop)
    if images.array is not None:
        return images.array[start:stop]
    batch = []
    for i in range(start, stop):
        image = images.read(i)
        if image.shape != shape:
            raise UserError(f"{images.path}: mixed sizes: {images.names[0]} is {size_text(shape)}, "
                            f"{images.names[i]} is {size_text(image.shape)}: give all images one size")
        batch.append(image)
    return np.stack(batch)


def size_text(shape: tuple) -> str:
    """(H, W, ...) -> "WxH"."""
    return f"{shape[1]}x{shape[0]}"


def sample_batches(model, options, num: int, seed: int, batch_size: int) -> Iterator[Batch]:
    """This process's share of `num` samples, classes in turn: those of sample.py for the seed, less non-finite ones."""
    part = share(num)
    labels = default_labels(num, model.config.num_classes)[part.start:part.stop]
    for indices, images, _ in sample_images(model, labels, options, seed, batch_size, part.start):
        yield indices, images


# ------------------------------------------------------------------------------------------ one pass over them
def measure_side(side: Opened, network, batch_size: int, workers: int, device: torch.device) -> Side | None:
    """An opened side's Side, on the first process. As in ADM's evaluator, a file's own statistics come first."""
    if side.images is None:
        return side.statistics
    batches = image_batches(side.images, side.shape, batch_size, workers)
    measured = measure(batches, len(side.images), network, side.path, device, size_text(side.shape))
    known = side.statistics
    if measured and known and known.matches(network.name, network.digest):
        measured.mu, measured.sigma, measured.num = known.mu, known.sigma, known.num
    return measured


def measure(batches: Iterable[Batch], num: int, network, source: str, device: torch.device,
            size: str | None = None) -> Side | None:
    """Batches of at most `num` images, of which some may be missing -> their Side on the first process, None elsewhere.

    Features that are kept stand in torch-fidelity's order for the Inception Score. Raises UserError when an image's are
    not finite, or fewer than two images came.
    """
    place = np.argsort(np.random.RandomState(2020).permutation(num))  # image i -> its place
    found = np.zeros(min(num, KEPT), bool)
    moments = pool = None
    for indices, h in exchanged(feature_rows(batches, num, network, source, device), device):
        if moments is None:
            moments = Moments(h.shape[1])
            pool = np.empty((len(found), h.shape[1]), np.float32)
        at = place[indices]
        kept = at < KEPT
        pool[at[kept]] = h[kept]
        found[at[kept]] = True
        moments.add(h)
    if rank_and_world()[0] > 0:
        return None
    count = moments.count() if moments else 0
    if count < 2:
        raise UserError(f"{source}: {count} of {num} images could be made, expected at least 2")
    mu, sigma = moments.result()
    return Side(source, network.name, network.digest, mu, sigma, count, torch.from_numpy(pool[found]), size)


def feature_rows(batches: Iterable[Batch], num: int, network, source: str, device: torch.device):
    """Yields the numbers (b,) and features (b, D) float32 of this process's images, with progress."""
    part = share(num)
    progress, done = Progress(f"{source}: image", len(part), quiet=rank_and_world()[0] > 0), 0
    for indices, images in batches:
        if not len(indices):
            continue
        x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)  # grey becomes RGB
        with torch.inference_mode():
            h = network(x.to(device)).cpu()
        finite = h.isfinite().all(1)
        if not finite.all():
            bad = indices[int(finite.int().argmin())]
            raise UserError(f"{source}: {network.name} gives features that are not finite for image {bad}")
        yield indices, h.numpy()
        done = int(indices[-1]) + 1 - part.start
        progress(done)
    if done < len(part):  # the last ones are missing
        progress(len(part))


def exchanged(rows, device: torch.device):
    """The rows of all processes, process after process, on the first one; as they come where it is the only one."""
    if rank_and_world()[1] == 1:
        yield from rows
        return
    indices, features = [np.empty(0, np.int64)], []
    for numbers, h in rows:
        indices.append(numbers)
        features.append(h)
    dim = features[0].shape[1] if features else 0  # no images here: fewer of them than processes
    dim = int(max_over_processes(torch.tensor(dim, device=device)))
    features = np.concatenate([np.empty((0, dim), np.float32), *features])
    numbers = list(gather(np.concatenate(indices), device))
    for rank, h in enumerate(gather(features, device)):
        if len(h):
            yield numbers[rank], h
