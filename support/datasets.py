"""Data sets by name (downloaded once, checked by hash) and their file formats: MNIST-style idx and CIFAR-10's archives.

A split is read as (images (N, H, W) or (N, H, W, C) uint8, labels (N,) uint8, class names or None).
No file is unpickled: CIFAR-10's python archive goes through an unpickler that makes plain values alone.
"""
import gzip
import hashlib
import http.client
import io
import math
import os
import pickle
import struct
import tarfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from support.cli import Progress, UserError, cache_directory
from support.processes import Turn, one_at_a_time

LARGEST = 2**32  # bytes of one array: a damaged header must not claim the whole memory
LARGEST_BATCH = 2**30  # bytes of one file in an archive
TIMEOUT = 30  # seconds without a byte
BLOCK = 2**16


@dataclass(frozen=True)
class Known:
    """A data set with a name: where its files are and what they are."""

    bases: tuple[str, ...]  # the same files at each
    files: dict[str, tuple[int, str]]  # file -> (bytes, sha256)
    classes: list[str]


KNOWN = {
    "fashion-mnist": Known(
        bases=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
        files={
            "train-images-idx3-ubyte.gz":
                (26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
            "train-labels-idx1-ubyte.gz":
                (29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
            "t10k-images-idx3-ubyte.gz":
                (4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
            "t10k-labels-idx1-ubyte.gz":
                (5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
        },
        classes=["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"],
    ),
    "mnist": Known(
        bases=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        files={
            "train-images-idx3-ubyte.gz":
                (9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
            "train-labels-idx1-ubyte.gz":
                (28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
            "t10k-images-idx3-ubyte.gz":
                (1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
            "t10k-labels-idx1-ubyte.gz":
                (4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
        },
        classes=[str(digit) for digit in range(10)],
    ),
    "cifar10": Known(
        bases=("https://www.cs.toronto.edu/~kriz/",),
        files={
            "cifar-10-binary.tar.gz":
                (170052171, "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
        },
        classes=["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    ),
}

IDX_SPLITS = {"train": "train", "test": "t10k"}
IDX_FOLDERS = ("", "raw", "MNIST/raw", "FashionMNIST/raw")  # torchvision's root and what is below it
CIFAR_SPLITS = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
CIFAR_FOLDERS = ("", "cifar-10-batches-bin", "cifar-10-batches-py")
CIFAR_RECORD = 1 + 3 * 32 * 32  # a label, then the planes of the image
ARCHIVES = (".tar.gz", ".tgz", ".tar")


def splits(path: str) -> dict[str, Callable]:
    """{'train': read, 'test': read} of the set at `path`, or one of them; {} when there is none.

    A folder with idx files, or torchvision's folder around one; a folder with CIFAR-10's batches, its .tar.gz, or one
    of its .bin files. read() -> (images, labels, class names or None).
    """
    if os.path.isdir(path):
        return _folder_splits(path)
    name = os.path.basename(path).lower()
    if name.endswith(ARCHIVES):
        held = _read_cifar_archive(path, os.stat(path).st_mtime_ns)
        return {split: partial(held.get, split) for split in held}
    if name.endswith(".bin"):
        split = "test" if "test" in name else "train"
        return {split: partial(_read_cifar_files, [path])}
    return {}


def _folder_splits(path: str) -> dict[str, Callable]:
    found = {}
    for folder in IDX_FOLDERS:
        here = _idx_splits(os.path.join(path, folder))
        if here and found:
            raise UserError(f"{path} holds more than one data set: write {path}/MNIST or {path}/FashionMNIST")
        found = found or here
    for folder in CIFAR_FOLDERS:
        found = found or _cifar_splits(os.path.join(path, folder))
    archive = _cifar_archive(path)
    return splits(archive) if archive and not found else found


# ------------------------------------------------------------------------------------------ idx
def _idx_splits(folder: str) -> dict[str, Callable]:
    found = {}
    for split, prefix in IDX_SPLITS.items():
        images = _idx_file(folder, f"{prefix}-images", 3)
        labels = _idx_file(folder, f"{prefix}-labels", 1)
        if images:
            expected = os.path.join(folder, f"{prefix}-labels-idx1-ubyte.gz")
            found[split] = partial(_read_idx_pair, images, labels, expected)
    return found


def _idx_file(folder: str, stem: str, ndim: int) -> str | None:
    """The file of that stem: plain or .gz, with the dot or the hyphen that copies of it have."""
    for name in (f"{stem}-idx{ndim}-ubyte", f"{stem}.idx{ndim}-ubyte"):
        for suffix in ("", ".gz"):
            path = os.path.join(folder, name + suffix)
            if os.path.isfile(path):
                return path
    return None


def _read_idx_pair(images: str, labels: str | None, expected: str):
    if labels is None:
        raise UserError(f"{images} has no labels beside it: put {expected} there")
    return read_idx(images, 3), read_idx(labels, 1), None


def read_idx(path: str, ndim: int) -> np.ndarray:
    """The uint8 array with `ndim` axes in an idx file, plain or gzipped (told by its content, not by its name)."""
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with (gzip.open if packed else open)(path, "rb") as file:
            head = file.read(4)
            if head != bytes([0, 0, 8, ndim]):  # two zeros, 8 for uint8, the number of axes
                raise UserError(f"{path} starts with {head.hex()}; expected an idx file of uint8 with {ndim} axes")
            shape = struct.unpack(f">{ndim}I", file.read(4 * ndim))
            size = math.prod(shape)
            if size > LARGEST:
                raise UserError(f"{path} claims to hold {shape}, more than {LARGEST >> 30} GiB: is it damaged?")
            content = file.read(size + 1)
    except UserError:
        raise
    except Exception as error:  # gzip, zlib and struct have errors of their own
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}): replace it") from None
    if len(content) != size:
        more = "more" if len(content) > size else f"{len(content):,} bytes"
        raise UserError(f"{path} holds {more} instead of {size:,} bytes for {shape}: replace it")
    return np.frombuffer(content, np.uint8).reshape(shape)


# ------------------------------------------------------------------------------------------ CIFAR-10
def _cifar_archive(folder: str) -> str | None:
    """The archive in `folder`, as it is published: binary or python."""
    for version in ("binary", "python"):
        path = os.path.join(folder, f"cifar-10-{version}.tar.gz")
        if os.path.isfile(path):
            return path
    return None


def _cifar_splits(folder: str) -> dict[str, Callable]:
    found = {}
    for split, stems in CIFAR_SPLITS.items():
        for suffix in (".bin", ""):
            paths = [os.path.join(folder, stem + suffix) for stem in stems]
            paths = [path for path in paths if os.path.isfile(path)]
            if paths and split not in found:
                found[split] = partial(_read_cifar_files, paths)
    return found


def _read_cifar_files(paths: list[str]):
    parts = []
    for path in paths:
        with open(path, "rb") as file:
            parts.append(_cifar_batch(path, file.read(LARGEST_BATCH)))
    return _joined(parts)


@lru_cache(maxsize=1)
def _read_cifar_archive(path: str, modified: int) -> dict[str, tuple]:
    """Both splits in CIFAR-10's .tar.gz, as far as they are there: the archive must be unpacked whole to see that.

    `modified`, its time stamp, tells another archive of the same name. Nothing is written to disk.
    """
    found, others = {}, []
    with tarfile.open(path) as archive:
        for member in archive:
            stem, suffix = os.path.splitext(os.path.basename(member.name))
            if member.size > LARGEST_BATCH:
                raise UserError(f"{path}: {member.name} is {member.size:,} bytes; expected CIFAR-10's batches")
            if not (member.isfile() and suffix in ("", ".bin") and any(stem in s for s in CIFAR_SPLITS.values())):
                others.append(member.name)
                continue
            found[stem] = _cifar_batch(f"{path}: {member.name}", archive.extractfile(member).read())
    if not found:
        held = ", ".join(others[:4]) or "nothing"
        raise UserError(f"{path} holds {held}; expected CIFAR-10's data_batch_1: unpack another archive and pass its "
                        "folder")
    batches = {split: [found[stem] for stem in stems if stem in found] for split, stems in CIFAR_SPLITS.items()}
    return {split: _joined(parts) for split, parts in batches.items() if parts}


def _cifar_batch(name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """One batch, binary or pickled -> images (N, 32, 32, 3), labels (N,)."""
    if name.lower().endswith(".bin"):
        if not content or len(content) % CIFAR_RECORD:
            raise UserError(f"{name} is {len(content):,} bytes; expected records of {CIFAR_RECORD} bytes, "
                            "as CIFAR-10's binary version has")
        records = np.frombuffer(content, np.uint8).reshape(-1, CIFAR_RECORD)
        labels, planes = records[:, 0], records[:, 1:]
    else:
        labels, planes = _unpickled_batch(name, content)
    if labels.max(initial=0) > 9:
        raise UserError(f"{name} has labels up to {labels.max()}; expected CIFAR-10's 0 to 9")
    images = planes.reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1)), labels


def _joined(parts: list):
    images = np.concatenate([images for images, _ in parts])
    labels = np.concatenate([labels for _, labels in parts])
    return images, labels, KNOWN["cifar10"].classes


class _Stored:
    """Stands for numpy's array and its type in a pickle: keeps what they would be made of, and makes nothing."""

    def __init__(self, *arguments):
        self.arguments, self.state = arguments, ()

    def __setstate__(self, state):
        self.state = state


class _PlainUnpickler(pickle.Unpickler):
    """Runs no code of the file's choice: of all names that a pickle may call it knows an array's, as `_Stored`."""

    def find_class(self, module, name):
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return _Stored
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in a pickle for Python 2
            return _encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


def _unpickled_batch(name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """A batch of CIFAR-10's python version: a dict with data, an array (N, 3072), and labels, a list."""
    try:
        batch = _PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        version, shape, dtype, fortran, pixels = batch["data"].state
        if dtype.arguments[0] not in (b"u1", "u1") or fortran or shape[1:] != (CIFAR_RECORD - 1,):
            raise ValueError(f"data is {shape}")
        planes = np.frombuffer(pixels, np.uint8).reshape(shape)
        labels = np.array(batch["labels"], np.uint8)
        if labels.shape != shape[:1]:
            raise ValueError(f"{labels.shape} labels for {shape[0]} images")
        return labels, planes
    except Exception as error:  # whatever a damaged or malicious pickle brings about
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{name} is no batch of CIFAR-10's python version that can be read without running its code "
                        f"({why}): take the binary version (cifar-10-binary.tar.gz)") from None


# ------------------------------------------------------------------------------------------ downloads
def fetch(name: str) -> str:
    """The folder with the data set `name`, downloaded first where its files are not there.

    Files that the user put there are taken as they are when they are well-formed; what is downloaded is checked.
    """
    folder, known = str(cache_directory() / name), KNOWN[name]
    if _complete(folder):
        return folder
    try:
        os.makedirs(folder, exist_ok=True)
        with one_at_a_time(os.path.join(folder, ".lock"), f"another process downloads {name}") as turn:
            for file in known.files:
                if not (_complete(folder) or os.path.isfile(os.path.join(folder, file))):
                    _download(known, file, folder, turn)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error}): free some space, or set XDG_CACHE_HOME to another "
                        "place") from None
    return folder


def _complete(folder: str) -> bool:
    """Whether `folder` holds images and labels of both splits."""
    if _cifar_archive(folder) or any(len(_cifar_splits(os.path.join(folder, f))) == 2 for f in CIFAR_FOLDERS):
        return True
    stems = [(f"{prefix}-images", 3) for prefix in IDX_SPLITS.values()]
    stems += [(f"{prefix}-labels", 1) for prefix in IDX_SPLITS.values()]
    return all(_idx_file(folder, stem, ndim) for stem, ndim in stems)


def _download(known: Known, file: str, folder: str, turn: Turn) -> None:
    """One file from the first place that gives the right one; a part that is there already is gone on with."""
    path, reasons = os.path.join(folder, file), []
    for base in known.bases:
        try:
            _receive(base + file, path + ".part", known.files[file][0], turn)
            _check(path + ".part", known.files[file][1])
            os.replace(path + ".part", path)
            return
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, OSError) and error.filename and os.path.dirname(str(error.filename)) == folder:
                raise  # the disk's fault, not the network's
            reasons.append(f"{base}{file}: {error or type(error).__name__}")
    files = ", ".join(known.files)
    raise UserError(f"cannot download {'; '.join(reasons)}. Try again (what has come is kept), or put {files} into "
                    f"{folder}".replace("\n", " "))


def _receive(url: str, part: str, size: int, turn: Turn) -> None:
    """Appends to the file `part` what it lacks of the `size` bytes at `url`."""
    have = os.path.getsize(part) if os.path.exists(part) else 0
    if have >= size:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    what = f"downloading {os.path.basename(url)}, MiB"
    progress = Progress(what, math.ceil(size / 2**20))
    with urllib.request.urlopen(request, timeout=TIMEOUT) as reply, open(part, "ab") as file:
        if reply.status != 206:  # the server begins anew
            have = 0
            file.truncate(0)
        coming = reply.headers.get("Content-Length")
        if coming and have + int(coming) != size:
            raise ValueError(f"it is {have + int(coming):,} bytes there, not {size:,}")
        while have < size:
            block = reply.read(min(BLOCK, size - have))
            if not block:
                raise ValueError(f"the connection ended after {have:,} of {size:,} bytes")
            file.write(block)
            have += len(block)
            progress(have >> 20 if have < size else progress.total)
            turn.report(have >> 20, size >> 20)


def _check(part: str, expected: str) -> None:
    """Removes the file and raises ValueError where its sha256 is another."""
    digest = hashlib.sha256()
    with open(part, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    if digest.hexdigest() != expected:
        os.remove(part)
        raise ValueError(f"its sha256 is {digest.hexdigest()[:16]}..., not {expected[:16]}...; it was removed")
