"""Images as arrays: where they come from, what a run uses of them, and the batch of a step.

    python support/data.py prepare DATA OUT --image-size 64

decodes and crops a set once. Training on OUT then reads its pixels from OUT/images.npy.

Every source becomes an array before the first step. Nothing is guessed: one line says what was
read (`Images.summary`), and any other layout is an error that shows what was found.

    folder or .zip   images alone (no labels) or class folders; either may lie under train/ and
                     test/ or val/. A dataset.json (StyleGAN's and EDM's format) gives the labels
    .npz             `images` (N, H, W) or (N, H, W, C) uint8 and `labels` (N,); or arr_0 and arr_1
    folder of .npy   images.npy, labels.npy and classes.json, as `prepare` writes them
    folder or .zip   with MNIST's idx files, .gz or not, or CIFAR-10's batches; CIFAR-10's .tar.gz

The classes are the folders right under the training root that hold images. Outer folders that hold
nothing else are stepped into.
"""
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import struct
import sys
import tarfile
import unicodedata
import urllib.request
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.cli import (
    Parser,
    Progress,
    UserError,
    cache_directory,
    expanded,
    reading,
    run_script,
    warn,
    write_file,
)

IDX = re.compile(r"(train|t10k)-(images|labels)[-.]idx[13]-ubyte(\.gz)?")
CIFAR = re.compile(r"(data_batch_[1-5]|test_batch)(\.bin)?")
CIFAR_ARCHIVE = re.compile(r"cifar-10-(binary|python)\.tar\.gz")
LAYOUT = ("expected images alone, or class folders that hold nothing but images, or one of these "
          "under train/ and under test/ or val/; move everything else away")
# Formats that Pillow knows by name, but that hold no pixels, or need another program to draw them.
NOT_DECODED = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
CHUNK = 32  # images that a thread decodes at a time

# About damaged EXIF and the like; an image that cannot be read raises an error instead.
warnings.filterwarnings("ignore", module="PIL")
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # colour profiles may exceed Pillow's limit of 1 MiB


# ----------------------------------------------------------------------------- images
@dataclass(eq=False)
class Images:
    """Images in a fixed order: those of `array` that `numbers` counts, all of them by default.

    Taking some of them (a hold-out) copies no pixels, so a memory-mapped array stays on disk. Use
    `batch`, or `array` alone where nothing was held out. Raises UserError for arrays that do not
    fit each other.
    """

    path: str  # what was opened: digits, or an absolute path; used in messages
    array: "np.ndarray | Files"  # (M, H, W, C) uint8 with C 1 or 3, or float32; maybe on disk.
    # Within this file it may be files that are still to be decoded.
    labels: np.ndarray | None = None  # (N,) int64, or float32 (N, k); None: no labels
    classes: list[str] | None = None  # the name of each label; None: labels are numbers
    numbers: np.ndarray | None = None  # (N,) int64: the place of each image in `array`
    notes: list[str] = field(default_factory=list)  # what else the summary says

    def __post_init__(self):
        if self.numbers is None:
            self.numbers = np.arange(len(self.array))
        if isinstance(self.array, np.ndarray):
            shape, dtype = self.array.shape, self.array.dtype
            pixels = dtype == np.uint8 and shape[3:] in ((1,), (3,))
            if len(shape) != 4 or 0 in shape or not (pixels or dtype == np.float32):
                raise UserError(f"{self.path}: images are {dtype} {shape}; expected uint8 "
                                "(N, H, W, C) with C 1 or 3; convert them")
        if self.labels is not None and not self.has_vectors():
            self.labels = check_labels(self.path, self.labels, len(self))

    def __len__(self):
        return len(self.numbers)

    def has_vectors(self) -> bool:
        """Whether the labels are vectors (N, k) float32, which belong to no class."""
        labels = self.labels
        return (labels is not None and labels.dtype == np.float32 and labels.ndim == 2
                and len(labels) == len(self))

    def batch(self, places) -> tuple[Tensor, Tensor]:
        """Images (b, C, H, W) and labels (b,) or (b, k) at these places; zeros without labels."""
        places = np.asarray(places, np.int64)
        pixels = self.array[self.numbers[places]].transpose(0, 3, 1, 2)
        labels = np.zeros(len(places), np.int64) if self.labels is None else self.labels[places]
        return torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(labels)

    def part(self, places: np.ndarray) -> "Images":
        """Some of the images; their pixels are not copied."""
        labels = None if self.labels is None else self.labels[places]
        return replace(self, labels=labels, numbers=self.numbers[places])

    def digest(self) -> str:
        """A hash of shape, labels, classes and a sample of the images: which set this is.

        The sample is spread evenly over the set; a set of up to 512 images is hashed as a whole.
        """
        about = [len(self), self.array.shape[1:], self.names()]
        state = hashlib.sha256(json.dumps(about).encode())
        if self.labels is not None:
            state.update(np.ascontiguousarray(self.labels))
        for k in np.linspace(0, len(self) - 1, min(len(self), 512)).astype(np.int64):
            state.update(np.ascontiguousarray(self.array[self.numbers[k]]))
        return state.hexdigest()

    def names(self) -> list[str]:
        """The classes that these images have, numbers as text; [] if there are none."""
        if self.labels is None:
            return self.classes or []
        if self.has_vectors():
            return []
        return [self.classes[k] if self.classes else str(k) for k in np.unique(self.labels)]

    def summary(self, held_out: "Images | None" = None, is_test: bool = False) -> str:
        """What was read, in one line: the images, their classes, and what was ignored.

        held_out: the images that evaluation uses; is_test says that they are the test split.
        """
        height, width = self.array.shape[1:3]
        text = f"{counted(len(self), 'image')} {width}x{height} {self.classes_text()}"
        if held_out is not None:
            text += f", {len(held_out):,} {'test' if is_test else 'held-out'} images"
        text += f", from {self.path}"
        if held_out is not None and held_out.path != self.path:
            text += f" and {held_out.path}"
        return "; ".join([text, *self.notes])

    def classes_text(self) -> str:
        if self.labels is None:
            return "without labels"
        if self.has_vectors():
            return f"with vectors of {self.labels.shape[1]} numbers"
        counts = np.unique(self.labels, return_counts=True)[1]
        prefix = "" if self.classes else "class "
        each = [f"{prefix}{name} {n}" for name, n in zip(self.names(), counts, strict=True)]
        return f"in {len(each)} class{'es' * (len(each) > 1)} ({shortened(each, 12)})"


def shortened(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)


def counted(n: int, name: str) -> str:
    """2 -> "2 images"."""
    return f"{n:,} {name}" + "s" * (n != 1)


def printable(text: str) -> str:
    """A name whose bytes are not UTF-8 with these bytes escaped, and é written in one way."""
    return unicodedata.normalize("NFC", os.fsencode(text).decode("utf-8", "backslashreplace"))


def main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"  # as torchrun sets it


# ----------------------------------------------------------------------------- one image
def is_deep(image: Image.Image) -> bool:
    """Whether an image, just opened, has more than 8 bits in a channel; Pillow may cut these."""
    args = image.tile[0][3] if getattr(image, "tile", None) else ""
    packed = str(args)
    if image.format == "PPM" and isinstance(args, tuple):
        return args[1] > 255  # the largest value
    bits = getattr(image, "tag_v2", {}).get(258, 8)  # of a TIFF
    return (image.mode[0] in "IF" or np.max(bits) > 8
            or ";16" in packed and "BGR;16" not in packed)  # BGR;16 is 5 + 6 + 5 bits


def to_rgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """An image just opened as RGB, upright, on white; and whether some of it was transparent.

    Raises ValueError for pixels of more than 8 bits: nothing says which values are white.
    """
    if is_deep(image):
        raise ValueError("more than 8 bits in a channel; convert it to 8 bits")
    ImageOps.exif_transpose(image, in_place=True)
    clear = False
    if image.has_transparency_data:  # convert("RGB") would show the colours of clear pixels
        image = image.convert("RGBA")
        clear = image.getextrema()[3][0] < 255
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB"), clear


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Resizes an image and cuts out the central size x size pixels, as ADM does.

    Box filters halve it while its shorter side is at least 2 size; a bicubic filter does the rest.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_image(images: Images, i: int, size: int | None, channels: int,
               enlarge: bool) -> tuple[np.ndarray, bool]:
    """Image i as (H, W, channels) uint8, with `size` its centre crop; whether it was transparent.

    A single channel is luminance.
    """
    k = images.numbers[i]
    if isinstance(images.array, Files):
        image = Image.open(io.BytesIO(images.array.read(images.array.names[k])))
    else:
        pixels = images.array[k]
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    image, clear = to_rgb(image)
    if size and min(image.size) < size and not enlarge:
        raise ValueError(f"{image.width}x{image.height} pixels, smaller than image_size {size}")
    if size:
        image = center_crop(image, size)
    pixels = np.asarray(image.convert("L") if channels == 1 else image)
    return pixels.reshape(image.height, image.width, channels), clear


# ----------------------------------------------------------------------------- decoding
def in_threads(work: Callable, todo, count: int) -> Iterator:
    """work(x) for x in `todo`, in order, by `count` threads, which are a few results ahead."""
    pool = ThreadPoolExecutor(count)
    ahead = deque()
    try:
        for x in todo:
            ahead.append(pool.submit(work, x))
            if len(ahead) > 2 * count:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def decoded_chunks(images: Images, shape: tuple, size: int | None,
                   enlarge: bool) -> Iterator[np.ndarray]:
    """The images in order, as arrays (b, *shape) uint8. Pillow decodes and resizes without the GIL.

    Raises one UserError at the end that names all images that cannot be used.
    """

    def work(start: int) -> tuple[np.ndarray, list[str], int]:
        places = range(start, min(start + CHUNK, len(images)))
        chunk = np.zeros((len(places), *shape), np.uint8)
        errors = []
        clear = 0
        for row, i in zip(chunk, places, strict=True):
            try:
                pixels, transparent = read_image(images, i, size, shape[2], enlarge)
                if pixels.shape != shape:
                    raise ValueError(f"{pixels.shape[1]}x{pixels.shape[0]} pixels, but others "
                                     f"{shape[1]}x{shape[0]}")
                row[:] = pixels
                clear += transparent
            except Exception as error:
                errors.append(f"{name_of(images, i)} ({cause(error)})")
        return chunk, errors, clear

    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    threads = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    progress = Progress(f"decoding {images.path}", len(images), quiet=not main_process())
    broken = []
    clear = done = 0
    for chunk, errors, transparent in in_threads(work, range(0, len(images), CHUNK), threads):
        broken += errors
        clear += transparent
        done += len(chunk)
        progress(done)
        yield chunk
    if broken:
        advice = "; remove them, lower the image size or pass --enlarge"
        if "smaller than" not in str(broken):
            advice = "; replace or remove them"
        raise UserError(f"{images.path}: {len(broken):,} of {len(images):,} images cannot be used: "
                        f"{shortened(broken)}{advice}")
    if clear:
        images.notes.append(f"transparency put on white in {counted(clear, 'image')}")


def name_of(images: Images, i: int) -> str:
    k = images.numbers[i]
    return printable(images.array.names[k]) if isinstance(images.array, Files) else f"image {k}"


def cause(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no image that Pillow reads"
    return " ".join(str(error).split())[:150] or type(error).__name__


def shape_of(images: Images, size: int | None, channels: int) -> tuple:
    """(H, W, C) of the decoded images, by the first of them where no size is asked for."""
    if size:
        return size, size, channels
    if isinstance(images.array, np.ndarray):
        return images.array.shape[1:]
    with reading(os.path.join(images.path, name_of(images, 0)), "replace or remove it"):
        return read_image(images, 0, size, channels, False)[0].shape


def decoded(images: Images, size: int | None, channels: int, enlarge: bool) -> Images:
    """The same images as an array of this size; an array that has it already stays where it is."""
    shape = shape_of(images, size, channels)
    is_array = isinstance(images.array, np.ndarray)
    if is_array and images.array.shape[1:] == shape:
        return images
    if is_array and images.array.dtype != np.uint8:
        raise UserError(f"{images.path}: floats of the shape {images.array.shape[1:]} cannot be "
                        f"cropped; expected {shape} (H, W, C); set image_size and channels")
    array = np.empty((len(images), *shape), np.uint8)
    done = 0
    for chunk in decoded_chunks(images, shape, size, enlarge):
        array[done:done + len(chunk)] = chunk
        done += len(chunk)
    return replace(images, array=array, numbers=None)


def check_memory(source: str, parts: list[Images], size: int | None, channels: int,
                 enlarge: bool) -> None:
    """Raises UserError if the files, decoded, would take more than a quarter of the memory."""
    needed = 0
    for images in parts:
        shape = shape_of(images, size, channels)
        if isinstance(images.array, Files) or images.array.shape[1:] != shape:
            needed += len(images) * math.prod(shape)
    limit = memory() // 4
    if needed > limit:
        command = f"python support/data.py prepare {shlex.quote(source)} OUT --image-size "
        command += f"{size or min(shape[:2])}" + " --channels 1" * (channels == 1)
        command += " --enlarge" * enlarge
        raise UserError(f"{source}: {sum(map(len, parts)):,} images of {shape[1]}x{shape[0]} are "
                        f"{needed / 2**30:.1f} GiB decoded, more than a quarter of the memory "
                        f"({limit / 2**30:.1f} GiB); decode them into a file once ({command}) and "
                        "pass --data OUT")


def memory() -> int:
    """Bytes of memory for this process: a container's limit counts, other processes share it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else ""
    if text.isdecimal():
        total = min(total, int(text))
    return total // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


# ----------------------------------------------------------------------------- labels
def check_labels(path: str, labels, num: int, num_classes: int = 2**31) -> np.ndarray:
    """Checks that labels are `num` whole numbers from 0 to num_classes - 1 -> (num,) int64."""
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.shape != (num,):
        raise UserError(f"{path}: labels are {labels.dtype} {labels.shape}; expected {num} whole "
                        "numbers, one for each image")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        advice = "correct them, or pass a larger --num-classes"
        if low == 1:
            advice = "subtract 1 from each, or pass --num-classes if there is a class 0 too"
        raise UserError(f"{path}: labels go from {low} to {high}, expected 0 to {num_classes - 1}; "
                        f"{advice}")
    return labels.astype(np.int64)


def labels_for(images: Images, classes: list[str] | None, num_classes: int) -> Images:
    """The same images, labelled as a model with these classes numbers them.

    Classes are matched by name where both have names; numbers stay as they are and are never
    shifted. classes None or []: the model's classes are numbers. num_classes 0: class labels are
    dropped; vectors stay. Raises UserError if the labels do not fit the model.
    """
    if images.has_vectors():
        return images
    labels = images.labels
    if num_classes == 0:
        return replace(images, labels=None, classes=None)
    if labels is None and images.classes and classes:  # all images lie in one folder, their class
        labels = np.zeros(len(images), np.int64)
    if labels is None:
        raise UserError(f"{images.path} has no labels, but num_classes is {num_classes}; expected "
                        "class folders, or an array `labels`")
    if images.classes:
        names = [images.classes[label] for label in np.unique(labels)]
        if classes:
            number = {name: k for k, name in enumerate(classes)}
        else:  # folders called 0, 1, ... are numbers too
            number = {name: int(name) for name in names if name.isdecimal()}
        unknown = [name for name in names if name not in number]
        if unknown:
            known = shortened(classes or [str(k) for k in range(num_classes)])
            raise UserError(f"{images.path} has classes that the model does not have: "
                            f"{shortened(unknown)}; expected {known}; rename or remove them")
        labels = np.array([number.get(name, -1) for name in images.classes])[labels]
    labels = check_labels(images.path, labels, len(images), num_classes)
    return replace(images, labels=labels, classes=classes or None)


def count_classes(images: Images, num_classes: int | None) -> int:
    """How many classes a new model has: those of its data, each with an image, or num_classes."""
    if images.labels is None or images.has_vectors():
        return num_classes or 0
    found = np.unique(images.labels)
    named = len(images.classes or [])
    if num_classes and named not in (0, num_classes):
        raise UserError(f"--num-classes: got {num_classes}, but {images.path} has {named} classes "
                        f"with names ({shortened(images.classes)}); leave the flag out")
    if num_classes:
        check_labels(images.path, images.labels, len(images), num_classes)
        return num_classes
    expected = named or int(found[-1]) + 1
    if len(found) < expected:
        renumber = f"renumber them from 0 to {len(found) - 1}"
        if found[0] == 1 and len(found) == expected - 1:
            renumber = "subtract 1 from each"
        raise UserError(f"{images.path}: {expected - len(found)} of the classes 0 to {expected - 1} "
                        f"have no images (labels are {shortened(list(map(str, found)))}); "
                        f"{renumber}, or pass --num-classes {expected} if they are right")
    return expected


def fits(images: Images, test: Images) -> bool:
    """Whether a test split brings the classes of the training images, or fewer."""
    if images.has_vectors() or test.has_vectors():
        return images.has_vectors() == test.has_vectors()
    if images.labels is None and test.labels is None and not (images.classes and test.classes):
        return True
    brought = set(test.names())
    return brought <= set(images.names()) and bool(brought or images.labels is None)


def misfit(images: Images, test: Images) -> UserError:
    """The error for a test split of other classes, with both lists."""
    lists = [shortened(part.names()) or "no classes" for part in (images, test)]
    return UserError(f"{images.path} holds {lists[0]}, but the test split {test.path} holds "
                     f"{lists[1]}; expected the same classes or fewer; rename or remove folders, "
                     "or write :train behind the data to leave the test split out")


# ----------------------------------------------------------------------------- sources
def split_of(source: str) -> tuple[str, str]:
    """d:train -> ("d", "train"); ("d", "") without a split. A folder may have such a name."""
    if source.endswith((":train", ":test")) and not os.path.exists(expanded(source)):
        name, _, split = source.rpartition(":")
        return name, split
    return source, ""


def absolute(source: str) -> str:
    """A source as a checkpoint keeps it: names stay, d:train becomes /path/to/d:train."""
    name, split = split_of(source)
    path = expanded(name)
    if not name or name in ("digits", *KNOWN) or not path.exists():
        return source
    return f"{path.resolve()}:{split}" if split else str(path.resolve())


def open_images(
    source: str,
    image_size: int | None = None,
    channels: int = 3,
    enlarge: bool = False,
    own: Callable | None = None,
) -> tuple[Images, Images | None]:
    """Opens and decodes `source`: its images, and its test split if it has one beside them.

    image_size None: images as they are, all of one size. source may end in :train or :test. A
    known name is always the set of that name; ./digits is a folder. own: `open_images` of a
    model's file, for its own data format. Raises UserError.
    """
    parts = listed(source, image_size, channels, own)
    check_memory(source, parts, image_size, channels, enlarge)
    images, test, *_ = *(decoded(part, image_size, channels, enlarge) for part in parts), None
    return images, test


def listed(source: str, size: int | None, channels: int, own: Callable | None) -> list[Images]:
    """[images] or [images, test split] of a source; files are not yet decoded."""
    if main_process():  # before anything that may take long
        print(f"data: reading {printable(source)}", file=sys.stderr, flush=True)
    found = own(source) if own else None
    if found is not None:
        parts = list(found) if isinstance(found, tuple) else [found]
    else:
        name, split = split_of(source)
        there = named_parts(name, size, channels)
        if split in there:
            parts = [there[split]]
        elif "train" in there and not split:
            parts = list(there.values())
        else:
            names = " or ".join(f"{name}:{part}" if part else name for part in there)
            raise UserError(f"{source}: no training split, or no split of that name; write {names}")
        if split == "test" and "train" in there:  # its classes are numbered as those of training
            parts = [there["train"], there["test"]]
    if len(parts) == 2:
        images, test = parts
        if not fits(images, test):
            raise misfit(images, test)
        if images.labels is not None and images.classes:
            parts = [images, labels_for(test, images.classes, len(images.classes))]
    if found is None and split == "test":
        return parts[-1:]
    return parts


def named_parts(name: str, size: int | None, channels: int) -> dict[str, Images]:
    """The splits of a source: train and test, or a single one without a name."""
    expected = f"{', '.join(['digits', *KNOWN])}, or a folder, .zip or .npz of images"
    path = str(expanded(name).absolute())
    if name in ("digits", *KNOWN):
        if os.path.exists(name):
            warn(f"{name} is read as the data set of that name; write ./{name} for the local files")
    elif not name or not os.path.exists(path):
        raise UserError(f"--data: {name or 'an empty name'} does not exist; expected {expected}")
    if name == "digits":
        return {"train": digits(4000, size, channels, 0), "test": digits(500, size, channels, 1)}
    if name in KNOWN:
        parts = read_files(list_folder(str(fetch(name))))
        classes = KNOWN[name].classes
        return {k: replace(part, path=name, classes=classes) for k, part in parts.items()}
    with reading(printable(path), f"expected {expected}"):
        return read_path(path, expected)


def read_path(path: str, expected: str) -> dict[str, Images]:
    """The splits of a file or folder."""
    if os.path.isdir(path):
        return read_files(list_folder(path))
    if path.lower().endswith(".zip"):
        return read_files(list_zip(path))
    if path.lower().endswith(".npz"):
        with np.load(path, allow_pickle=False) as arrays:
            hint = npz_hint(path, arrays)
            if hint:
                raise UserError(f"{path} holds {', '.join(arrays)}; expected `images` and `labels`; "
                                f"{hint}")
            return {"": read_arrays(path, dict(arrays))}
    if tarfile.is_tarfile(path):
        batches = list_tar(path)
        if batches.names:
            return read_cifar(batches)
    hint = ending_hint(path, [path])
    raise UserError(f"{path}: is no folder, .zip or .npz; {hint or f'expected {expected}'}")


def read_arrays(path: str, arrays: dict, classes: list[str] | None = None) -> Images:
    """Images from named arrays, those of an .npz or of .npy files."""
    path = printable(path)
    pixels = "images" if "images" in arrays else "arr_0"
    labels = "labels" if "labels" in arrays or pixels == "images" else "arr_1"
    if pixels not in arrays:
        raise UserError(f"{path} holds {', '.join(arrays) or 'nothing'}; expected `images` (uint8) "
                        "and `labels`; rename its arrays")
    array = arrays.pop(pixels)
    images = from_arrays(path, array, arrays.pop(labels, None), classes)
    arrays.pop("numbers", None)  # sample.py's own
    for name, other in arrays.items():
        scores = other.dtype.kind == "f" and (other % 1).any()
        if other.shape[:1] == (len(images),) and not scores:
            raise UserError(f"{path}: its array {name} has an entry for each image, but is not "
                            "read; call it labels if it holds the labels, or else remove it")
    if arrays:
        images.notes.append("ignored: " + ", ".join(f"array {name}" for name in arrays))
    return images


def from_arrays(path: str, array: np.ndarray, labels=None, classes=None) -> Images:
    """Images from an array (N, H, W) or (N, H, W, C) uint8 with labels (N,) or None."""
    if array.ndim == 3:
        array = array[..., None]
    if array.dtype != np.uint8:
        raise UserError(f"{path}: images are {array.dtype} {array.shape}; expected uint8 (N, H, W) "
                        "or (N, H, W, C) with C 1 or 3; convert them")
    if labels is not None:
        labels = check_labels(path, labels, len(array), len(classes or []) or 2**31)
    return Images(path, array, labels, classes)


# ----------------------------------------------------------------------------- files
@dataclass(eq=False)
class Files:
    """Files of a folder or of an archive; their names are sorted and go from `path`, with /."""

    path: str
    names: list[str]
    read: Callable[[str], bytes]

    def __len__(self):
        return len(self.names)

    def inside(self, folder: str) -> "Files":
        """Those in a folder, with names that go from there."""
        if not folder:
            return self
        start = f"{folder}/"
        names = [name.removeprefix(start) for name in self.names if name.startswith(start)]
        return Files(f"{self.path}/{folder}", names, lambda name: self.read(start + name))

    def folders(self) -> list[str]:
        """The folders right here."""
        return list(dict.fromkeys(name.partition("/")[0] for name in self.names if "/" in name))

    def unexpected(self, reason: str = "") -> UserError:
        """The error for a layout that is not one of ours: it shows what is there."""
        found = [name for name in self.names if "/" not in name][:2]
        for folder in self.folders()[:8]:
            inner = self.inside(folder)
            deeper = len(inner.folders())
            text = counted(sum(map(is_image, inner.names)), "image")
            text += f" in {counted(deeper, 'folder')}" * (deeper > 0)
            found.append(f"{folder}/ ({text})")
        if len(self.folders()) > 8:
            found.append("...")
        return UserError(f"{printable(self.path)} holds {printable(', '.join(found))}; "
                         f"{reason or LAYOUT}")


def list_folder(path: str) -> Files:
    """Lists a folder on disk; hidden folders in it are named, but not entered."""
    names = sorted(walk(path))
    return Files(path, names, lambda name: Path(path, name).read_bytes())


def walk(path: str, place: str = "", above: tuple = ()) -> Iterator[str]:
    """The names of all files below. A link to one of the folders around it is not followed."""
    real = os.path.realpath(path)
    if real in above:
        return
    for entry in os.scandir(path):
        if not entry.is_dir():
            yield place + entry.name
        elif is_hidden(entry.name):
            yield f"{place}{entry.name}/"
        else:
            yield from walk(entry.path, f"{place}{entry.name}/", (*above, real))


def list_zip(path: str) -> Files:
    """Lists a zip. \\ in its names is read as /; empty parts, . and a leading / are left out."""
    archive = zipfile.ZipFile(path)
    stored = {}
    for name in archive.namelist():
        *folders, base = name.replace("\\", "/").split("/")
        folders = [folder for folder in folders if folder not in ("", ".")]
        stored["/".join([*folders, base])] = name
    return Files(path, sorted(stored), lambda name: archive.read(stored[name]))


def list_tar(path: str | io.BytesIO) -> Files:
    """CIFAR-10's batches in a tar file; they are among its first members."""
    contents = {}
    place = dict(fileobj=path) if isinstance(path, io.BytesIO) else dict(name=path)
    with tarfile.open(**place) as archive:
        for member in itertools.islice(archive, 20):
            name = os.path.basename(member.name)
            if member.isfile() and CIFAR.fullmatch(name):
                contents[name] = archive.extractfile(member).read()
    return Files(str(path), sorted(contents), contents.__getitem__)


@functools.cache
def endings() -> set[str]:
    """The endings of the files that Pillow decodes here: .png, .jpg, ..."""
    known = Image.registered_extensions()
    return {e for e, kind in known.items() if kind in set(Image.OPEN) - NOT_DECODED}


def ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def is_image(name: str) -> bool:
    return ending(name) in endings()


def is_table(name: str) -> bool:
    """Whether a file holds many images, or their labels."""
    base = os.path.basename(name)
    return bool(IDX.fullmatch(base) or CIFAR.fullmatch(base) or CIFAR_ARCHIVE.fullmatch(base)
                or base in ("images.npy", "dataset.json"))


def is_hidden(name: str) -> bool:
    """Whether systems, NAS boxes or archivers leave files of such names behind: .git, @eaDir."""
    return name.startswith((".", "_", "@", "$")) or name in ("Thumbs.db", "lost+found")


def sift(files: Files) -> tuple[Files, list[str]]:
    """The files that are data, and in words what is left out.

    Left out are hidden names, runs of train.py (folders with ckpt.pt or log.jsonl), and files of
    other kinds.
    """
    runs = {os.path.dirname(n) for n in files.names
            if os.path.basename(n) in ("ckpt.pt", "log.jsonl")}
    arrays = {os.path.dirname(n) for n in files.names if os.path.basename(n) == "images.npy"}

    @functools.cache
    def left_out(folder: str) -> str:
        """In words why nothing in a folder is read, or nothing."""
        for place in ["", *itertools.accumulate(folder.split("/"), "{}/{}".format)]:
            if place in runs:
                return f"run {place or '.'}"
            if is_hidden(os.path.basename(place)):
                return f"folder {place}"
        return ""

    data, others, folders = [], [], {}
    for name in files.names:
        folder, base = os.path.split(name)
        if left_out(folder):
            folders[left_out(folder)] = None
        elif (is_image(base) or is_table(base)) and not is_hidden(base):
            data.append(name)
        elif base and folder not in arrays:
            others.append(base)
    words = list(folders)
    others = [name for name in others if is_image(name) or not is_hidden(name)]
    if others:
        kinds = sorted({ending(name) or name for name in others})
        hidden = " with hidden names" * any(map(is_image, others))
        words.insert(0, f"{counted(len(others), 'file')} ({shortened(kinds)}){hidden}")
    return replace(files, names=data), [printable(word) for word in words]


# ----------------------------------------------------------------------------- layouts
def read_files(everything: Files) -> dict[str, Images]:
    """The splits in a folder or an archive: train and test, or a single one without a name."""
    files, ignored = sift(everything)
    files, _ = stepped_into(files)
    if not files.names:
        hint = ending_hint(files.path, everything.names) or LAYOUT
        raise UserError(f"{printable(files.path)} holds no images of a kind that Pillow reads here; "
                        f"found: {', '.join(ignored) or 'nothing'}; {hint}")
    tables = [name for name in files.names if "/" not in name and not is_image(name)]
    if any(CIFAR_ARCHIVE.fullmatch(name) for name in tables):
        parts = read_cifar(list_tar(io.BytesIO(files.read(tables[0]))))
    elif any(map(IDX.fullmatch, tables)):
        parts = read_idx(files)
    elif any(map(CIFAR.fullmatch, tables)):
        parts = read_cifar(files)
    elif tables:
        parts = {"": read_part(files)}
    else:
        parts = read_splits(files, ignored)
    if tables not in ([], ["dataset.json"]) and files.folders():
        raise files.unexpected()
    for part in parts.values():
        part.notes[:0] = ["ignored: " + ", ".join(ignored)] if ignored else []
    return parts


def stepped_into(files: Files) -> tuple[Files, str]:
    """The files in the folder that all data are in, and the name of that folder, if it is another.

    Tables without images beside or below them are no data where there are images.
    """
    images = list(filter(is_image, files.names))
    data = images or [name for name in files.names if os.path.basename(name) != "dataset.json"]
    if not data:
        return replace(files, names=[]), ""
    root = os.path.commonprefix([data[0], data[-1]]).rpartition("/")[0]  # they are sorted
    for name in files.names:
        folder = os.path.dirname(name)
        if not is_image(name) and (not folder or f"{root}/".startswith(f"{folder}/")):
            root = folder  # a table for all of them
    inner = files.inside(root)
    names = inner.names
    if images:
        names = [name for name in names if is_image(name) or "/" not in name]
    return replace(inner, names=names), os.path.basename(root)


def read_splits(files: Files, ignored: list[str]) -> dict[str, Images]:
    """{"train": images, "test": images} where there are such folders, else {"": images}.

    Of test and val the one is used that has the classes of the training images.
    """
    names = files.folders()
    train = [name for name in names if name.lower() == "train"]
    tests = [name for word in ("test", "val") for name in names if name.lower() == word]
    flat = any("/" not in name for name in files.names)
    if len(train) != 1 or not tests or flat or len(train + tests) < len(names):
        like_splits = [name for name in names if re.search("train|test|val|dev", name, re.I)]
        if train and tests or len(like_splits) == len(names) > 1:
            raise files.unexpected()
        return {"": read_part(files)}
    images = read_part(files.inside(train[0]))
    found = {name: read_part(files.inside(name)) for name in tests}
    used = next((name for name in tests if fits(images, found[name])), tests[0])
    ignored.extend(f"folder {name}" for name in tests if name != used)
    return {"train": images, "test": found[used]}


def read_part(files: Files) -> Images:
    """The images of one split."""
    files, folder = stepped_into(files)
    path = printable(files.path)
    if "images.npy" in files.names:
        if files.folders() or len(files.names) > 1:
            raise files.unexpected()
        with reading(path, "expected images.npy, labels.npy and classes.json; unpack them"):
            arrays = {file.stem: np.load(file, mmap_mode="r")
                      for file in sorted(Path(files.path).glob("*.npy"))}
        names = Path(files.path, "classes.json")
        return read_arrays(path, arrays, json.loads(names.read_text()) if names.exists() else None)
    if "dataset.json" in files.names:
        pictures = replace(files, names=[n for n in files.names if is_image(n)])
        return Images(path, pictures, json_labels(files, pictures.names))
    folders = [name.rpartition("/")[0] for name in files.names]
    if not any(folders):  # the name of a single folder may mean nothing: it is no label
        return Images(path, files, classes=[printable(folder)] if folder else None)
    if not all(folders) or any("/" in place for place in set(folders)):
        raise files.unexpected()
    if are_shards(files.names):
        everything = shlex.quote(files.path)
        command = f"unzip -j {everything} -d OUT"
        if os.path.isdir(files.path):
            command = f"mkdir OUT && find {everything} -type f -exec cp {{}} OUT \\;"
        raise files.unexpected(
            "its folders look like numbered parts of one set, not like classes; bring the images "
            f"into one folder ({command}), or, if they are classes, give them names")
    number = {place: printable(place) for place in set(folders)}
    classes = in_order(set(number.values()))
    number = {place: classes.index(name) for place, name in number.items()}
    return Images(path, files, np.array([number[place] for place in folders]), classes)


def in_order(names) -> list[str]:
    """The names sorted, as numbers if all of them are numbers."""
    return sorted(names, key=int if all(name.isdecimal() for name in names) else None)


def are_shards(names: list[str]) -> bool:
    """Whether folders are parts of one set, not classes: 00000/00999.png, then 01000/01000.png."""
    found = [re.fullmatch(r"\d{3,}/.*?(\d+)\.\w+", name) for name in names]
    if not all(found):
        return False
    numbers = [int(match[1]) for match in found]
    return all(first < second for first, second in itertools.pairwise(numbers))


def json_labels(files: Files, names: list[str]) -> np.ndarray | None:
    """The labels in dataset.json, {"labels": [[name, label], ...]}; None if it says null."""
    path = f"{printable(files.path)}/dataset.json"
    with reading(path, 'expected {"labels": [[name, label], ...]} with all images; correct it'):
        pairs = json.loads(files.read("dataset.json"))["labels"]
        if pairs is None:
            return None
        table = dict(pairs)
        return check_labels(path, [table[name] for name in names], len(names))


# ----------------------------------------------------------------------------- idx and CIFAR-10
def read_idx(files: Files) -> dict[str, Images]:
    """The splits in idx files, MNIST's format."""
    parts = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        if any(name.startswith(prefix) for name in files.names):
            pixels, labels = (idx_array(files, f"{prefix}-{kind}") for kind in ("images", "labels"))
            parts[split] = from_arrays(printable(files.path), pixels, labels)
    return parts


def idx_array(files: Files, stem: str) -> np.ndarray:
    """The array in the file whose name begins with `stem`, unpacked if there is also a .gz."""
    names = [name for name in files.names if name.startswith(stem)]
    path = printable(files.path)
    if not names:
        raise UserError(f"{path} has no {stem}-idx file beside the others; add it")
    with reading(f"{path}/{names[0]}", "expected an idx file of 8-bit numbers; replace it"):
        content = files.read(names[0])
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        if content[:3] != b"\0\0\x08":  # two zeros and the code of uint8, then the number of axes
            raise ValueError(f"it begins with {content[:4].hex()}")
        axes = content[3]
        shape = struct.unpack_from(f">{axes}I", content, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def read_cifar(files: Files) -> dict[str, Images]:
    """The splits in CIFAR-10's batches: labels, and the three planes of each image."""
    stems = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    path = printable(files.path)
    parts = {}
    for split, names in stems.items():
        found = [n for stem in names for n in [f"{stem}.bin", stem] if n in files.names][:len(names)]
        if not found:
            continue
        if len(found) < len(names):
            raise UserError(f"{path} holds {len(found)} of CIFAR-10's {len(names)} training "
                            "batches; put the others beside them")
        with reading(path, "expected CIFAR-10's batches, binary or Python's; replace them"):
            batches = [cifar_batch(name, files.read(name)) for name in found]
            planes, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
            array = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        array = np.ascontiguousarray(array)
        parts[split] = from_arrays(path, array, labels, KNOWN["cifar10"].classes)
    return parts


def cifar_batch(name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(planes (n, 3072) uint8, labels (n,)) in a batch of either kind."""
    if name.endswith(".bin"):
        records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
        return records[:, 1:], records[:, 0]
    table = Unpickler(io.BytesIO(content), encoding="bytes").load()
    table = {key.decode() if isinstance(key, bytes) else key: part for key, part in table.items()}
    return np.asarray(table["data"]), np.asarray(table["labels"])


class Unpickler(pickle.Unpickler):
    """Reads arrays, and runs no code: a pickle that asks for anything else is refused."""

    def find_class(self, module, name):
        rebuild = np.zeros(0).__reduce__()[0]
        allowed = {"_reconstruct": rebuild, "ndarray": np.ndarray, "dtype": np.dtype,
                   "encode": lambda text, coding: text.encode("latin1")}  # how Python 3 keeps bytes
        if module.partition(".")[0] not in ("numpy", "_codecs") or name not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        return allowed[name]


# ----------------------------------------------------------------------------- other formats
def ending_hint(path: str, names: list[str]) -> str:
    """The command that brings files of another kind over, by the endings of their names; or ""."""
    kinds = {ending(name) for name in names}
    quoted = shlex.quote(path)
    if kinds & {".tar", ".tgz", ".gz", ".tbz2", ".bz2", ".xz", ".zst"}:
        return (f"unpack it (mkdir OUT && find {quoted} -name '*.t*' -exec tar -xf {{}} -C OUT \\;) "
                "and pass --data OUT")
    if ".zip" in kinds:
        return f"unpack it (find {quoted} -name '*.zip' -exec unzip {{}} -d OUT \\;), pass --data OUT"
    if ".npz" in kinds:
        return "pass one of the .npz files itself"
    if ".parquet" in kinds:
        pattern = os.path.join(path, "**", "train*.parquet") if os.path.isdir(path) else path
        code = (
            f"import glob, os, pandas as p; "
            f"t = p.concat(map(p.read_parquet, sorted(glob.glob({json.dumps(pattern)}, "
            f"recursive=True)))); "
            f"x = next(c for c in t if isinstance(t[c].iloc[0], dict)); "
            f"y = next(c for c in t if t[c].dtype.kind in \"iu\"); "
            f"[(os.makedirs(f\"OUT/{{k}}\", exist_ok=True), open(f\"OUT/{{k}}/{{i:08}}.png\", "
            f"\"wb\").write(v[\"bytes\"])) for i, (v, k) in enumerate(zip(t[x], t[y]))]")
        return f"write its images into class folders ({python(code)}) and pass --data OUT"
    return ""


def npz_hint(path: str, arrays) -> str:
    """The command that brings an .npz of MedMNIST, Keras or ImageNet-64 over; or ""."""
    keys = {"x_train": ('"x_" + s', '"y_" + s'),
            "train_images": ('s + "_images"', 's + "_labels"')}
    for key, (images, labels) in keys.items():
        if key in arrays:
            code = (f"import os, numpy as n; a = n.load({json.dumps(path)}); "
                    f"[(os.makedirs(\"OUT/\" + s), n.save(f\"OUT/{{s}}/images.npy\", a[{images}]), "
                    f"n.save(f\"OUT/{{s}}/labels.npy\", a[{labels}].ravel())) "
                    f"for s in (\"train\", \"test\")]")
            return f"write them as this reads them ({python(code)}) and pass --data OUT"
    if "data" in arrays and "images" not in arrays:
        side = math.isqrt(arrays["data"].shape[-1] // 3)
        pattern = re.sub(r"\d+(?=\.npz$)", "*", path)
        code = (f"import glob, os, numpy as n; "
                f"a = [n.load(f) for f in sorted(glob.glob({json.dumps(pattern)}))]; "
                f"os.makedirs(\"OUT\"); n.save(\"OUT/images.npy\", n.concatenate([b[\"data\"]"
                f".reshape(-1, 3, {side}, {side}).transpose(0, 2, 3, 1) for b in a])); "
                f"n.save(\"OUT/labels.npy\", n.concatenate([b[\"labels\"] for b in a]) - 1)")
        return f"write them as this reads them ({python(code)}) and pass --data OUT"
    return ""


def python(code: str) -> str:
    return f"python -c {shlex.quote(code)}"


# ----------------------------------------------------------------------------- sets by name
@dataclass(frozen=True)
class Known:
    """A data set that has a name: where to download it, and its classes."""

    address: str
    files: dict[str, str]  # {file: its sha256}
    classes: list[str]


KNOWN = {
    "fashion-mnist": Known(
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        {
            "train-images-idx3-ubyte.gz":
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte.gz":
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte.gz":
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte.gz":
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
        ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
         "ankle boot"],
    ),
    "mnist": Known(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz":
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte.gz":
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte.gz":
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte.gz":
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
        [str(digit) for digit in range(10)],
    ),
    "cifar10": Known(
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-binary.tar.gz":
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
        ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    ),
}


def fetch(name: str) -> Path:
    """The folder with the data set `name`; missing files are downloaded and checked."""
    folder = cache_directory() / name
    with reading(folder, "set XDG_CACHE_HOME to a folder that can be written to"):
        folder.mkdir(parents=True, exist_ok=True)
    there = [file for file in os.listdir(folder) if not file.endswith(".tmp")]
    for file, sha256 in KNOWN[name].files.items():
        stem = re.split("-idx|-binary", file)[0]  # the user's own file may have another ending
        if not any(found.startswith(stem) for found in there):
            receive = functools.partial(download, KNOWN[name].address + file, sha256, folder)
            write_file(folder / file, receive)
    return folder


def download(url: str, sha256: str, folder: Path, file) -> None:
    """Downloads `url` into the open file. Raises UserError if its sha256 is another."""
    digest = hashlib.sha256()
    advice = f"try again, or put {url.rpartition('/')[2]} into {folder}"
    with reading(url, advice), urllib.request.urlopen(url, timeout=30) as reply:
        total = int(reply.headers.get("Content-Length") or 0)
        progress = Progress(f"downloading {url}, MiB", total >> 20, quiet=not total)
        while block := reply.read(2**16):
            digest.update(block)
            file.write(block)
            progress(file.tell() >> 20)
        if digest.hexdigest() != sha256:
            raise ValueError(f"got {file.tell():,} bytes with the sha256 {digest.hexdigest()}, "
                             f"expected the sha256 {sha256}")


# ----------------------------------------------------------------------------- built-in digits
def draw_digit(label: int, size: int, channels: int, rng: np.random.Generator) -> np.ndarray:
    """Draws a light digit on a dark background, with random colours, size, place and slant.

    Returns (size, size, channels) uint8.
    """
    big = 4 * size
    ink = tuple(rng.integers(150, 256, 3).tolist())
    ground = tuple(rng.integers(0, 90, 3).tolist())
    picture = Image.new("RGB", (big, big), ground)
    font = ImageFont.load_default(int(big * rng.uniform(0.8, 1.0)))
    place = tuple(big / 2 + big * rng.uniform(-0.06, 0.06, 2))
    draw = ImageDraw.Draw(picture)
    width = big // 32
    draw.text(place, str(label), ink, font, anchor="mm", stroke_width=width, stroke_fill=ink)
    picture = picture.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC, fillcolor=ground)
    picture = picture.resize((size, size), Image.Resampling.BOX)
    if channels == 1:
        picture = picture.convert("L")
    return np.asarray(picture).reshape(size, size, channels)


@functools.lru_cache(maxsize=4)
def digits(num: int, size: int | None, channels: int, seed: int) -> Images:
    """Draws `num` digits, all classes in turn; image i depends on (seed, i) alone."""
    if size is None:
        raise UserError("the digits are drawn at a model's size, which is not known here; pass "
                        "other images instead")
    labels = np.arange(num) % 10
    progress = Progress(f"drawing digits of {size}x{size}", num, quiet=not main_process())
    array = np.empty((num, size, size, channels), np.uint8)
    for i, label in enumerate(labels):
        array[i] = draw_digit(int(label), size, channels, np.random.default_rng([seed, i]))
        progress(i + 1)
    return Images("digits", array, labels, [str(label) for label in range(10)])


# ----------------------------------------------------------------------------- what a run uses
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
    images, test = open_images(source, image_size, channels, enlarge, own)
    digest = images.digest()
    if classes is None:
        classes = images.classes if images.labels is not None else None
        if num_classes != 0:
            num_classes = count_classes(images, num_classes)
    images = labels_for(images, classes, num_classes)
    classes = images.classes or []
    train, held_out = images, None
    if holdout:
        train, held_out = hold_out(images, holdout)
    elif test is not None:
        held_out = labels_for(test, classes, num_classes)
    is_test = held_out is not None and not holdout
    summary = train.summary(held_out, is_test)
    return Split(train, held_out, is_test, classes, num_classes, digest, summary)


def hold_out(images: Images, per_class: int) -> tuple[Images, Images]:
    """(train, held out): held out are the last `per_class` of each class, or of all."""
    labels = images.labels
    if labels is None or images.has_vectors():
        labels = np.zeros(len(images), np.int64)
    held = np.zeros(len(images), bool)
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        if not 0 <= per_class < count:
            raise UserError(f"--holdout: cannot hold out {per_class} images of each class: "
                            f"{images.path} has {count} of class {label}; lower it")
        held[np.flatnonzero(labels == label)[count - per_class:]] = True
    return images.part(np.flatnonzero(~held)), images.part(np.flatnonzero(held))


# ----------------------------------------------------------------------------- batches
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
    """Endless, from `start_step` on: images (b, C, H, W), labels (b,) or (b, k), uid int64 (b,).

    b = batch_size / world. Sample g = step * batch_size + j is number g % m in the order of epoch
    g // m; process `rank` takes j in [rank b, (rank + 1) b); uid is g. With `flip` half of the
    samples are mirrored. All this depends on seed and g alone, whatever the start and the world.
    epoch_order(labels (n,), generator) -> places (m,), of the same length for every epoch,
    replaces the permutation. A thread reads one step ahead; closing the iterator ends it.
    """
    if batch_size < 1 or batch_size % world:
        raise UserError(f"--batch-size: got {batch_size}, expected a multiple of the {world} "
                        "processes")

    @functools.lru_cache(2)  # a step may end one epoch and begin the next
    def epoch(number: int) -> tuple[np.ndarray, np.ndarray]:
        """The places (m,) in the order of an epoch, and which of them (m,) are mirrored."""
        if epoch_order:
            generator = image_generators(seed, [number], torch.device("cpu"))[0]
            labels = torch.zeros(len(images), dtype=torch.int64)
            if images.labels is not None:
                labels = torch.from_numpy(images.labels)
            order = epoch_order(labels, generator).numpy()
        else:
            order = np.random.default_rng([seed, number]).permutation(len(images))
        return order, np.random.default_rng([seed, number, 1]).random(len(order)) < 0.5

    length = len(epoch(0)[0])
    share = batch_size // world

    def make(step: int) -> tuple[Tensor, Tensor, Tensor]:
        uid = step * batch_size + rank * share + np.arange(share)
        found = [[part[g % length] for part in epoch(g // length)] for g in uid.tolist()]
        places, mirrored = map(np.array, zip(*found, strict=True))
        pixels, labels = images.batch(places)
        if flip:
            mirrored = torch.from_numpy(mirrored)
            pixels[mirrored] = pixels[mirrored].flip(3)
        return pixels, labels, torch.from_numpy(uid)

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(make, start_step)
        for step in itertools.count(start_step + 1):
            batch = ahead.result()
            ahead = pool.submit(make, step)
            yield batch


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

    Images that are floats already keep their own units: they get sigma eps or nothing.
    """

    def draw(law: Callable) -> Tensor:
        shape = images.shape[1:]
        return torch.stack([law(shape, generator=g, device=images.device) for g in generators])

    kinds = ("gaussian", "uniform", "rgb", "none")
    if images.is_floating_point():
        kinds = ("gaussian", "none")
    if kind not in kinds:
        raise UserError(f"noise: got {kind}, expected {', '.join(kinds[:-1])} or none for "
                        f"{'these images' if len(kinds) == 4 else 'images that are floats'}")
    x = images.float()
    if kind == "uniform":
        return (x + draw(torch.rand)) / 128 - 1
    if kind == "rgb":
        steps = (sigma * draw(torch.randn)).round()
        return (x + steps + draw(torch.rand)) / 128 - 1
    if not images.is_floating_point():
        x = (x + 0.5) / 128 - 1
    return x + sigma * draw(torch.randn) if kind == "gaussian" else x


def quantize(images: Tensor) -> Tensor:
    """Floats about [-1, 1] (B, C, H, W) to uint8, the inverse of `dequantize`; clamps."""
    return ((images + 1) * 128).floor().clamp(0, 255).to(torch.uint8)


# ----------------------------------------------------------------------------- prepare
def prepare(images: Images, out: Path, size: int, channels: int, enlarge: bool) -> Images:
    """Writes images.npy, labels.npy and classes.json -> the images, now mapped from there."""
    out.mkdir(parents=True)
    if images.labels is not None:
        np.save(out / "labels.npy", images.labels)
        if images.classes:
            (out / "classes.json").write_text(json.dumps(images.classes))
    shape = (size, size, channels)

    def write(file) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in decoded_chunks(images, shape, size, enlarge):
            file.write(chunk)

    write_file(out / "images.npy", write)
    return replace(images, array=np.load(out / "images.npy", mmap_mode="r"), numbers=None)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="data.py",
        usage="python support/data.py prepare DATA OUT --image-size N [options]",
        description="""Decode and crop a set of images once, so that training does not have to.

    python support/data.py prepare path/to/images prepared --image-size 64
    python train.py --preset imagenet64 --data prepared

A test split beside the training images is prepared too, into OUT/train and
OUT/test. Where images cannot be read, all of them are named, and OUT is not
made.""")
    parser.add_argument("command", choices=["prepare"], metavar="prepare",
                        help="the only command")
    parser.add_argument("data", metavar="DATA", help="the images: what train.py takes as --data")
    parser.add_argument("out", metavar="OUT",
                        help="a new folder for images.npy, labels.npy and classes.json")
    group = parser.add_argument_group("images")
    group.add_argument("--image-size", type=int, required=True, metavar="N",
                       help="crop to the centre square and resize to N x N pixels (required)")
    group.add_argument("--channels", type=int, choices=(1, 3), default=3,
                       help="1 (grey) or 3 (RGB) (default: 3)")
    group.add_argument("--enlarge", action="store_true",
                       help="enlarge images smaller than --image-size instead of refusing")
    args = parser.parse_args(argv)
    if args.image_size < 1:
        raise UserError(f"--image-size: got {args.image_size}, expected at least 1")
    out = expanded(args.out).absolute()
    if out.exists():
        raise UserError(f"{out} exists; choose a new folder")
    parts = listed(args.data, args.image_size, args.channels, None)
    folders = ["train", "test"] if len(parts) == 2 else [""]
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.tmp")  # hidden: it may lie in the data
    try:
        made = [prepare(part, unfinished / folder, args.image_size, args.channels, args.enlarge)
                for folder, part in zip(folders, parts, strict=True)]
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"data: {made[0].summary(*made[1:], is_test=len(made) == 2)}")
    print(f"saved in {out}: train on it with --data {args.out}")


if __name__ == "__main__":
    run_script(main)
