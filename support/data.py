"""Images as arrays: where they come from, what a run uses of them, and the batch of a step.

    python support/data.py prepare DATA OUT --image-size 64

decodes and crops a set once. Training on OUT then reads its pixels from OUT/images.npy.

Every source becomes an array before the first step. Nothing is guessed: one line says what was
read (`Images.summary`), another what was ignored, and any other layout is an error that shows what
was found.

    folder or .zip   images alone (no labels) or class folders; either may lie under train/ and
                     test/ or val/. A dataset.json (StyleGAN's and EDM's format) gives the labels
    .npz             `images` (N, H, W) or (N, H, W, C) uint8 and `labels` (N,); or arr_0 and arr_1
    folder of .npy   images.npy, labels.npy and classes.json, as `prepare` writes them
    folder or .zip   with MNIST's idx files, .gz or not, or CIFAR-10's batches; CIFAR-10's .tar.gz

The classes are the folders right under the training root that hold images. Outer folders that hold
nothing else are stepped into.
"""
import collections
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import operator
import os
import pickle
import re
import shlex
import shutil
import sys
import tarfile
import unicodedata
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.cli import (
    Parser,
    Progress,
    UserError,
    at_least,
    cache_directory,
    expanded,
    reading,
    run_script,
    say,
    warn,
    write_file,
)

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
    # Only within this file it may be files that are still to be decoded.
    labels: np.ndarray | None = None  # (N,) int64, or float32 (N, k); None: no labels
    classes: list[str] | None = None  # the name of each label; None: labels are numbers
    numbers: np.ndarray | None = None  # (N,) int64: the place of each image in `array`

    def __post_init__(self):
        if self.numbers is None:
            self.numbers = np.arange(len(self.array))
        array = self.array
        if isinstance(array, np.ndarray):
            pixels = array.dtype == np.uint8 and array.shape[3:] in ((1,), (3,))
            floats = array.dtype == np.float32 and array.ndim == 4
            if not array.size or not pixels and not floats:
                raise UserError(f"{self.path}: images are {array.dtype} {array.shape}; expected "
                                "uint8 (N, H, W, C) with C 1 or 3; convert them")
        if self.labels is None:
            return
        labels = np.asarray(self.labels)
        top = len(self.classes or []) or 2**31
        vectors = labels.dtype == np.float32 and labels.ndim == 2
        numbers = labels.dtype.kind in "iu" and labels.ndim == 1
        if len(labels) != len(self) or not vectors and not (
                numbers and ((labels >= 0) & (labels < top)).all()):
            raise UserError(f"{self.path}: labels are {labels.dtype} {labels.shape}, "
                            f"{shortened(labels)}; expected {len(self)} whole numbers from 0 to "
                            f"{top - 1}, one for each image; correct them")
        self.labels = labels if vectors else labels.astype(np.int64)

    def __len__(self):
        return len(self.numbers)

    @property
    def has_vectors(self) -> bool:
        """Whether the labels are vectors, which belong to no class."""
        return self.labels is not None and self.labels.ndim == 2

    def batch(self, places) -> tuple[Tensor, Tensor]:
        """Images (b, C, H, W) and labels (b,) or (b, k) at these places; zeros without labels."""
        places = np.asarray(places, np.int64)
        pixels = self.array[self.numbers[places]].transpose(0, 3, 1, 2)
        labels = np.zeros(len(places), np.int64) if self.labels is None else self.labels[places]
        return torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(labels)

    def file(self, i: int) -> tuple[str, Callable[[], Image.Image]]:
        """The name of image i, and what opens it."""
        k = self.numbers[i]
        if isinstance(self.array, Files):
            name = self.array.names[k]
            return printable(name), lambda: Image.open(io.BytesIO(self.array.read(name)))
        pixels = self.array[k]
        pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels
        return f"image {k}", lambda: Image.fromarray(pixels)

    def part(self, kept: np.ndarray) -> "Images":
        """The images at these places; no pixels are copied."""
        labels = None if self.labels is None else self.labels[kept]
        return replace(self, labels=labels, numbers=self.numbers[kept])

    def digest(self) -> str:
        """A hash of shape, labels, classes and a sample of the images: which set this is.

        The sample is spread evenly over the set; a set of up to 512 images is hashed as a whole.
        """
        about = json.dumps([len(self), self.array.shape[1:], self.names()])
        state = hashlib.sha256(about.encode())
        sample = np.linspace(0, len(self) - 1, min(len(self), 512)).astype(np.int64)
        for array in (self.array[self.numbers[sample]], self.labels):
            state.update(b"" if array is None else array.tobytes())
        return state.hexdigest()

    def names(self) -> list[str]:
        """The classes that these images have, numbers as text; [] if there are none."""
        if self.has_vectors:
            return ["vectors"]
        if self.labels is None:
            return self.classes or []
        return [self.classes[k] if self.classes else str(k) for k in np.unique(self.labels)]

    def summary(self, held_out: "Images | None" = None, is_test: bool = False) -> str:
        """What was read, in one line: the images, their classes, and where they are from.

        held_out: the images that evaluation uses; is_test says that they are the test split.
        """
        labels = "without labels" if self.labels is None else "with vectors as labels"
        if self.labels is not None and not self.has_vectors:
            counts = np.unique(self.labels, return_counts=True)[1]
            each = [f"{name} {n}" for name, n in zip(self.names(), counts, strict=True)]
            labels = f"in {len(each)} class{'es' * (len(each) > 1)} ({shortened(each, 12)})"
        height, width = self.array.shape[1:3]
        text = f"{len(self):,} images {width}x{height} {labels}"
        if held_out is not None:
            text += f", {len(held_out):,} {'test' if is_test else 'held-out'} images"
        return f"{text}, from {self.path}"


def shortened(names: Iterable, most: int = 8) -> str:
    names = list(map(str, names))
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)


def printable(text: str) -> str:
    """A name with bytes that are not UTF-8 escaped, and with é written in one way."""
    return unicodedata.normalize("NFC", os.fsencode(text).decode("utf-8", "backslashreplace"))


def note(text: str) -> None:
    """Tells the user on stderr what is being read, in the first process only."""
    say(f"data: {printable(text)}", sys.stderr)


Splits = dict[str, Images]  # train, test and val; a set that is not split is train alone


# ----------------------------------------------------------------------------- one image
@dataclass
class Crop:
    """What becomes of each image."""

    size: int | None  # of the centre crop; None: the image as it is
    channels: int = 3  # a single one is luminance
    enlarge: bool = False  # images that are smaller than the crop, instead of refusing them

    def __call__(self, image: Image.Image) -> np.ndarray:
        """An RGB image as (H, W, C) uint8. Raises ValueError if it is too small."""
        if self.size:
            if min(image.size) < self.size and not self.enlarge:
                raise ValueError(f"{image.width}x{image.height} pixels, smaller than image_size "
                                 f"{self.size}")
            image = center_crop(image, self.size)
        pixels = np.asarray(image.convert("L") if self.channels == 1 else image)
        return pixels.reshape(image.height, image.width, self.channels)


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


def to_rgb(image: Image.Image) -> Image.Image:
    """An image just opened as RGB, upright, on white.

    Raises ValueError for pixels of more than 8 bits: nothing says which of their values is white,
    and of some kinds Pillow makes noise.
    """
    how = image.tile[0][3] if getattr(image, "tile", None) else ""  # how the pixels are stored
    deep = re.search("(?<!BGR);16", str(how)) or image.mode[0] in "IF"  # BGR;16 has 5 to 6 bits
    if image.format == "PPM" and isinstance(how, tuple):
        deep = deep or how[1] > 255  # the largest value
    if deep or np.max(getattr(image, "tag_v2", {}).get(258, 8)) > 8:  # a TIFF's BitsPerSample
        raise ValueError("more than 8 bits in a channel, convert it to 8 bits")
    ImageOps.exif_transpose(image, in_place=True)
    if image.has_transparency_data:  # convert("RGB") would show the colours of clear pixels
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ----------------------------------------------------------------------------- decoding
def in_threads(work: Callable, todo: Iterable, threads: int, ahead: int) -> Iterator:
    """work(x) for x in `todo`, in order; meanwhile threads compute the next `ahead` results."""
    results = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        for x in todo:
            results.append(pool.submit(work, x))
            if len(results) > ahead:
                yield results.popleft().result()
        while results:
            yield results.popleft().result()


def processes() -> int:
    """How many processes share this machine, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def decoded_images(images: Images, crop: Crop, shape: tuple) -> Iterator[np.ndarray]:
    """The images in order, as arrays of this shape, decoded by a thread on each core.

    Raises one UserError at the end that names all images that cannot be used.
    """
    broken = {}

    def work(i: int) -> np.ndarray:
        name, open_image = images.file(i)
        try:
            pixels = crop(to_rgb(open_image()))
            if pixels.shape != shape:
                raise ValueError(f"{pixels.shape} pixels, the first image has {shape}")
            return pixels
        except Exception as error:
            broken[i] = f"{name} ({str(error).partition(' <')[0] or type(error).__name__})"
            return np.zeros(shape, np.uint8)

    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    threads = max(1, cores // processes())  # Pillow decodes and resizes without Python's lock
    n = len(images)
    progress = Progress(f"decoding {images.path}", n)
    eights = [range(i, min(i + 8, n)) for i in range(0, n, 8)]
    results = in_threads(lambda places: [*map(work, places)], eights, threads, 2 * threads)
    for i, pixels in enumerate(itertools.chain.from_iterable(results)):
        progress(i + 1)
        yield pixels
    if broken:
        each = shortened(broken[i] for i in sorted(broken))
        advice = ", lower image_size or pass --enlarge" * ("smaller than" in each)
        raise UserError(f"{images.path}: {len(broken):,} of {n:,} images cannot be used: "
                        f"{' '.join(each.split())}; replace or remove them{advice}")


def decoded(images: Images, crop: Crop, source: str) -> Images:
    """The same images as one array; an array that needs no crop stays where it is.

    Raises UserError if it would take more than a quarter of the memory.
    """
    shape = (crop.size, crop.size, crop.channels)
    if isinstance(images.array, np.ndarray):
        have = images.array.shape[1:]
        if not crop.size or have == shape:
            return images
        if images.array.dtype != np.uint8:
            raise UserError(f"{images.path}: images are floats {have}; expected {shape}; set "
                            "image_size and channels")
    elif not crop.size:
        name, open_image = images.file(0)
        with reading(f"{images.path}/{name}", "replace or remove it"):
            shape = crop(to_rgb(open_image())).shape
    size = len(images) * math.prod(shape)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes()
    if size > memory // 4:
        raise UserError(
            f"{images.path}: its {len(images):,} images take {size / 2**30:.1f} GiB, more than a "
            f"quarter of the memory of {memory / 2**30:.1f} GiB; decode them into a file (python "
            f"support/data.py prepare {shlex.quote(source)} OUT --image-size {min(shape[:2])} "
            f"--channels {crop.channels}{' --enlarge' * crop.enlarge}) and pass --data OUT")
    pixels = np.empty((len(images), *shape), np.uint8)
    for row, image in zip(pixels, decoded_images(images, crop, shape), strict=True):
        row[:] = image
    return replace(images, array=pixels, numbers=None)


# ----------------------------------------------------------------------------- labels
def labels_for(images: Images, classes: list[str] | None, num_classes: int) -> Images:
    """The same images, labelled as a model with these classes numbers them.

    Classes are matched by name where both have names; numbers stay as they are and are never
    shifted. classes None or []: the model's classes are numbers. num_classes 0: class labels are
    dropped; vectors stay. Raises UserError if the labels do not fit the model.
    """
    if images.has_vectors:
        return images
    if num_classes == 0:
        return replace(images, labels=None, classes=None)
    labels = images.labels
    if labels is None and images.classes and classes:  # all images lie in one folder, their class
        labels = np.zeros(len(images), np.int64)
    if labels is None:
        raise UserError(f"{images.path} has no labels, but num_classes is {num_classes}; expected "
                        "class folders, or an array `labels`")
    numbers = [str(k) for k in range(num_classes)]  # folders 0, 1, ... are numbers too
    known = classes or numbers
    table = dict(zip(known if images.classes else numbers, range(num_classes), strict=True))
    names = images.names()
    unknown = [name for name in names if name not in table]
    if unknown:
        raise UserError(f"{images.path} has classes that the model does not have: "
                        f"{shortened(unknown)}; expected {shortened(known)}; rename, renumber or "
                        "remove them")
    _, places = np.unique(labels, return_inverse=True)
    labels = np.array([table[name] for name in names])[places]
    return replace(images, labels=labels, classes=classes or None)


def count_classes(images: Images, num_classes: int | None) -> int:
    """How many classes a new model has: those of its data, each with images, or num_classes."""
    if num_classes == 0 or images.labels is None or images.has_vectors:
        return num_classes or 0
    found = images.names()
    count = len(images.classes or []) or num_classes or int(images.labels.max()) + 1
    if num_classes not in (None, count) or len(found) < count and not num_classes:
        raise UserError(
            f"{images.path} has images of {len(found)} classes ({shortened(found)}), expected "
            f"{num_classes or count} classes; number them from 0 without gaps (subtract 1 from "
            f"each if they begin with 1), or pass --num-classes {count} if that is right")
    return count


def with_test(images: Images, *tests: Images) -> list[Images]:
    """[images, the first test split that has their classes or fewer], labelled as they are."""
    have = images.names()
    for test in tests:
        names = test.names()
        if set(names) <= set(have) and (names or images.labels is None):
            break
    else:
        lists = [shortened(part.names()) or "no classes" for part in (images, *tests)]
        raise UserError(f"{images.path} holds {lists[0]}, but the test split {tests[0].path} holds "
                        f"{lists[1]}; expected the same classes or fewer; rename or remove "
                        "folders, or write :train behind the data to leave the test split out")
    note(f"test images: {test.path}")
    if images.classes and images.labels is not None:
        test = labels_for(test, images.classes, len(images.classes))
    return [images, test]


# ----------------------------------------------------------------------------- sources
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
    crop = Crop(image_size, channels, enlarge)
    parts = [decoded(part, crop, source) for part in listed(source, crop, own)]
    return parts[0], parts[1] if len(parts) > 1 else None


def split_of(source: str) -> tuple[str, str]:
    """d:train -> ("d", "train"); ("d", "") without a split. A folder may have such a name."""
    if source.endswith((":train", ":test")) and not expanded(source).exists():
        return tuple(source.rsplit(":", 1))
    return source, ""


def absolute(source: str) -> str:
    """A source as a checkpoint keeps it: names stay, d:train becomes /path/to/d:train."""
    name, _ = split_of(source)
    if name in ("", "digits", *KNOWN) or not expanded(name).exists():
        return source
    return f"{expanded(name).resolve()}{source[len(name):]}"


def listed(source: str, crop: Crop, own: Callable | None = None) -> list[Images]:
    """[images] or [images, test split] of a source; files are not yet decoded."""
    note(f"reading {source}")  # before anything that may take long
    found = own(source) if own else None
    if found is not None:
        return with_test(*found) if isinstance(found, tuple) else [found]
    name, split = split_of(source)
    parts = splits(name, crop)
    train = parts.get("train")
    tests = [parts[part] for part in ("test", "val") if part in parts]
    if not (tests if split == "test" else train):
        raise UserError(f"{source} has no {split or 'training'} split; write "
                        f"{' or '.join(f'{name}:{part}' for part in parts)}")
    if split == "train" or not tests:
        return [train]
    pair = with_test(train or tests[0], *tests)
    return pair[1:] if split else pair


def splits(name: str, crop: Crop) -> Splits:
    """The splits of a source."""
    expected = f"expected {', '.join(['digits', *KNOWN])}, or a folder, .zip or .npz of images"
    path = os.path.abspath(expanded(name))
    there = name != "" and os.path.exists(path)
    if there and name in ("digits", *KNOWN):
        warn(f"{name} is read as the set of that name; write ./{name} for the local files")
    if name == "digits":
        return {"train": digits(4000, crop.size, crop.channels, seed=0),
                "test": digits(500, crop.size, crop.channels, seed=1)}
    if name in KNOWN:
        parts = read_path(fetch(name))
        return {k: replace(v, path=name, classes=KNOWN[name].classes) for k, v in parts.items()}
    if not there:
        raise UserError(f"--data: {name or 'an empty name'} does not exist; {expected}")
    with reading(printable(path), expected):
        return read_path(path)


def read_path(path: str) -> Splits:
    """The splits of a folder or file."""
    if os.path.isdir(path):
        return read_files(list_folder(path))
    if ending(path) == ".zip":
        return read_files(list_zip(path))
    if ending(path) == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {"train": read_arrays(path, arrays)}
    if tarfile.is_tarfile(path) and (batches := list_tar(path)).names:
        return read_cifar(batches)
    raise UserError(f"{printable(path)} is no folder, .zip or .npz of images; "
                    f"{hint(path, [path])}")


def read_arrays(path: str, arrays, classes: list[str] | None = None) -> Images:
    """Images from named arrays, those of an .npz or of .npy files."""
    pixels = "images" if "images" in arrays else "arr_0"
    labels = "labels" if "labels" in arrays or pixels == "images" else "arr_1"
    if pixels not in arrays:
        raise UserError(f"{printable(path)} holds {shortened(arrays) or 'nothing'}; expected "
                        "`images` (uint8) and `labels`; " + hint(path, arrays, "rename its arrays"))
    array = arrays[pixels]
    if array.dtype != np.uint8:  # only a model's own format says what floats are
        raise UserError(f"{printable(path)}: images are {array.dtype} {array.shape}; expected "
                        "uint8; convert them")
    if array.ndim == 3:
        array = array[..., None]
    images = Images(printable(path), array, arrays[labels] if labels in arrays else None, classes)
    for name in sorted({*arrays} - {pixels, labels, "numbers"}):  # sample.py writes numbers
        other = arrays[name]
        scores = other.dtype.kind == "f" and (other % 1).any()
        if other.shape[:1] == (len(images),) and not scores:
            raise UserError(f"{images.path}: its array {name} has an entry for each image, but is "
                            "not read; call it labels if it holds the labels, or else remove it")
        note(f"ignored: array {name}")
    return images


# ----------------------------------------------------------------------------- files
def folder_of(name: str) -> str:
    """The folder that a file lies in, with / behind it; "" at the top."""
    return name[:name.rfind("/") + 1]


LAYOUT = ("expected images alone, or class folders that hold nothing but images, or one of these "
          "under train/ and under test/ or val/; move everything else away")


@dataclass(eq=False)
class Files:
    """Files of a folder or of an archive; their names are sorted and go from `path`, with /."""

    path: str
    names: list[str]  # once they have been sifted: of images, or else of tables
    read: Callable[[str], bytes]
    labels: Sequence[str] = ()  # dataset.json files, which hold labels

    def __len__(self):
        return len(self.names)

    @property
    def shown(self) -> str:
        """The path for messages."""
        return printable(self.path)

    @property
    def root(self) -> str:
        """The folder that all of them are in, with / behind it."""
        return folder_of(os.path.commonprefix([self.names[0], self.names[-1]]))

    def inside(self, folder: str) -> "Files":
        """Those in a folder, with names that go from there."""
        names, labels = ([n.removeprefix(folder) for n in every if n.startswith(folder)]
                         for every in (self.names, self.labels))
        return Files(os.path.normpath(f"{self.path}/{folder}"), names,
                     lambda name: self.read(folder + name), labels)

    def unexpected(self, reason: str = LAYOUT) -> UserError:
        """The error for a layout that is not one of ours: it shows what is there."""
        folders = collections.Counter(map(folder_of, sorted([*self.names, *self.labels])))
        found = printable(shortened(f"{folder or './'} ({n})" for folder, n in folders.items()))
        return UserError(f"{self.shown} holds images or tables in {found}; {reason}")


# Formats that Pillow knows by name, but that hold no pixels, or need another program to draw them.
NOT_DECODED = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
IDX = re.compile(r"(train|t10k)-(images|labels)[-.]idx[13]-ubyte(\.gz)?")
CIFAR = re.compile(r"(data_batch_[1-5]|test_batch)(\.bin)?")
TABLES = re.compile(rf"{IDX.pattern}|{CIFAR.pattern}|(images|labels)\.npy|classes\.json")
# What systems, NAS boxes and archivers leave behind: .git, @eaDir, __MACOSX.
HIDDEN = re.compile(r"(^|/)([._@$]|Thumbs\.db|lost\+found/)")


def ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


@functools.cache
def endings() -> set[str]:
    """The endings of the files that Pillow decodes here: .png, .jpg, ..."""
    known = Image.registered_extensions()
    return {e for e, kind in known.items() if kind in Image.OPEN and kind not in NOT_DECODED}


def is_image(name: str) -> bool:
    return ending(name) in endings()


def list_folder(path: str) -> Files:
    return Files(path, sorted(walk(path)), lambda name: Path(path, name).read_bytes())


def walk(path: str, place: str = "", above: tuple = ()) -> Iterator[str]:
    """The names of all files below; hidden folders are named, but not entered.

    A link to one of the folders around it is not followed.
    """
    real = os.path.realpath(path)
    for entry in [] if real in above else os.scandir(path):
        name = place + entry.name
        if not entry.is_dir():
            yield name
        elif HIDDEN.match(f"{entry.name}/"):
            yield f"{name}/"
        else:
            yield from walk(entry.path, f"{name}/", (*above, real))


def list_zip(path: str) -> Files:
    """Lists a zip. \\ in its names is read as /; empty parts, . and a leading / are left out."""
    archive = zipfile.ZipFile(path)
    stored = {}
    for name in archive.namelist():
        parts = name.replace("\\", "/").split("/")
        if parts[-1]:  # no folder
            stored["/".join(part for part in parts if part not in ("", "."))] = name
    return Files(path, sorted(stored), lambda name: archive.read(stored[name]))


def list_tar(path: str) -> Files:
    """CIFAR-10's batches in a tar file; they are among its first members."""
    contents = {}
    with tarfile.open(path) as archive:
        for member in itertools.islice(archive, 20):
            name = os.path.basename(member.name)
            if member.isfile() and CIFAR.fullmatch(name):
                contents[name] = archive.extractfile(member).read()
    return Files(path, sorted(contents), contents.__getitem__)


def sift(files: Files) -> Files:
    """The files that are data; says which are ignored. Raises UserError if none are data.

    Data are the images and the dataset.json files; where there are no images, the tables. Ignored
    are all others, hidden ones, and runs of train.py (folders with ckpt.pt or log.jsonl).
    """
    names = collections.defaultdict(list)
    runs = tuple(folder_of(name) for name in files.names
                 if os.path.basename(name) in ("ckpt.pt", "log.jsonl"))
    for name in files.names:
        base = os.path.basename(name)
        if HIDDEN.search(name):
            kind = "hidden"
        elif name.startswith(runs):
            kind = "in runs of train.py"
        elif is_image(base):
            kind = "images"
        elif base == "dataset.json":
            kind = "labels"
        elif TABLES.fullmatch(base):
            kind = "tables"
        else:
            kind = ending(base) or "without ending"
        names[kind].append(name)
    images, labels = names.pop("images", []), names.pop("labels", [])
    data = images or names.pop("tables", [])
    words = [f"{len(those)} {kind}" for kind, those in names.items()]
    ignored = f"ignored: {shortened(words, 12)}" * bool(words)
    if not data:
        raise UserError(f"{files.shown} holds no images of a format that Pillow reads; "
                        f"{printable(ignored)}; {hint(files.path, files.names)}")
    if ignored:
        note(ignored)
    return Files(files.path, data, files.read, labels)


# ----------------------------------------------------------------------------- layouts
def read_files(everything: Files) -> Splits:
    """The splits in a folder or an archive."""
    data = sift(everything)
    files = data.inside(data.root)
    tops = {name[:name.find("/") + 1] for name in files.names}  # "" for files that lie here
    found = {top.lower()[:-1]: top for top in tops if top.lower() in ("train/", "test/", "val/")}
    alike = all(re.search("train|test|val|dev", top, re.I) for top in tops)
    if "train" in found and len(found) == len(tops) > 1 and "dataset.json" not in files.labels:
        return {split: part for split, top in found.items()
                for part in read_part(files.inside(top)).values()}
    if "train" in found and len(found) > 1 or alike and len(tops) > 1:
        raise files.unexpected()
    return read_part(data)


def read_part(files: Files) -> Splits:
    """One split, or those that idx files and CIFAR-10's batches hold."""
    root = files.root
    for name in files.labels:
        if root.startswith(folder_of(name)):
            files = files.inside(folder_of(name))
            return {"train": Images(files.shown, files, json_labels(files))}
    files = files.inside(root)
    names = {folder: printable(folder[:-1]) for folder in set(map(folder_of, files.names))}
    flat = list(names) == [""]
    if not is_image(files.names[0]):
        if not flat:
            raise files.unexpected()
        for pattern, read in ((IDX, read_idx), (CIFAR, read_cifar)):
            if pattern.fullmatch(files.names[0]):
                return read(files)
        return {"train": read_npy(files.path)}
    if flat:  # the name of a single folder may mean nothing: it is no label
        outer = [printable(Path(root).name)] if root else None
        return {"train": Images(files.shown, files, classes=outer)}
    if any(folder.count("/") != 1 for folder in names):
        raise files.unexpected()
    if are_shards(files.names):
        raise files.unexpected(hint(files.path, files.names))
    numeric = all(map(str.isdecimal, names.values()))
    classes = sorted(set(names.values()), key=int if numeric else None)
    number = {folder: classes.index(name) for folder, name in names.items()}
    labels = [number[folder_of(name)] for name in files.names]
    return {"train": Images(files.shown, files, labels, classes)}


def read_npy(path: str) -> Images:
    """What `prepare` wrote into a folder; the images stay on disk."""
    with reading(printable(path), "expected images.npy in a folder on disk; unpack it"):
        arrays = {f.stem: np.load(f, mmap_mode="r") for f in Path(path).iterdir()
                  if f.suffix == ".npy"}
        names = Path(path, "classes.json")
        classes = json.loads(names.read_bytes()) if names.exists() else None
    return read_arrays(path, arrays, classes)


def are_shards(names: list[str]) -> bool:
    """Whether folders are parts of one set, not classes: 00000/00999.png, then 01000/01000.png."""
    found = [re.fullmatch(r"\d{3,}/.*?(\d+)\.\w+", name) for name in names]
    return all(found) and all(int(a[1]) < int(b[1]) for a, b in itertools.pairwise(found))


def json_labels(files: Files) -> list[int] | None:
    """The labels in dataset.json, {"labels": [[name, label], ...]}; None if it says null."""
    path = f"{files.shown}/dataset.json"
    with reading(path, 'expected {"labels": [[name, label], ...]} with all images; correct it'):
        pairs = json.loads(files.read("dataset.json"))["labels"]
        table = dict(pairs or [])
        return None if pairs is None else [operator.index(table[name]) for name in files.names]


# ----------------------------------------------------------------------------- other formats
# What else people have, and the one command that brings it over. The keys are searched for in the
# names of files or of an .npz's arrays; PATH is what was opened.
ARRAYS = ("write them as this reads them (python -c 'import os, numpy as n; a = n.load(\"PATH\"); "
          "[(os.makedirs(\"OUT/\" + s), n.save(f\"OUT/{s}/images.npy\", a[IMAGES]), n.save("
          "f\"OUT/{s}/labels.npy\", a[LABELS].ravel())) for s in (\"train\", \"test\")]') and pass "
          "--data OUT")
HINTS = {
    "^x_train$": ARRAYS.replace("IMAGES", '"x_" + s').replace("LABELS", '"y_" + s'),  # Keras
    "^train_images$":  # MedMNIST
        ARRAYS.replace("IMAGES", 's + "_images"').replace("LABELS", 's + "_labels"'),
    "^data$":
        "if this is ImageNet-64, write it as this reads it (python -c 'import os, glob, numpy as "
        "n; a = [n.load(f) for f in sorted(glob.glob(\"FOLDER/train*.npz\"))]; os.makedirs("
        "\"OUT\"); n.save(\"OUT/images.npy\", n.concatenate([b[\"data\"].reshape(len(b[\"data\"]), "
        "3, -1, round((b[\"data\"].shape[1] / 3) ** .5)).transpose(0, 2, 3, 1) for b in a])); "
        "n.save(\"OUT/labels.npy\", n.concatenate([b[\"labels\"] for b in a]) - 1)') and pass "
        "--data OUT",
    r"\.parquet$":
        "write its images into class folders (python -c 'import os, glob, pandas as p; t = "
        "p.concat(map(p.read_parquet, sorted(glob.glob(\"FOLDER/**/train*.parquet\", "
        "recursive=True)))); x = next(c for c in t if isinstance(t[c].iloc[0], dict)); y = next("
        "c for c in t if t[c].dtype.kind in \"iu\"); [(os.makedirs(f\"OUT/{k}\", exist_ok=True), "
        "open(f\"OUT/{k}/{i:08}.png\", \"wb\").write(v[\"bytes\"])) for i, (v, k) in enumerate("
        "zip(t[x], t[y]))]') and pass --data OUT",
    r"\.(tar(\.\w+)?|tgz)$":
        "unpack it (mkdir OUT && find PATH -type f -exec tar -xf {} -C OUT \\;), pass --data OUT",
    r"\.zip$": "unpack it (find PATH -name '*.zip' -exec unzip {} -d OUT \\;), pass --data OUT",
    r"\.npz$": "pass one of the .npz files",
    r"^\d+/":
        "its folders look like numbered parts of one set, not like classes; bring the images into "
        "one folder (mkdir OUT && find PATH -type f -exec cp {} OUT \\;) and pass --data OUT; or, "
        "if they are classes, give them names",
}


def hint(path: str, found: Iterable[str], otherwise: str = LAYOUT) -> str:
    """What to do about a source in which files, or arrays, of these names were found."""
    path = re.sub(r"(\.zip)/.*", r"\1", path)
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    for pattern, text in HINTS.items():
        if any(re.search(pattern, name) for name in found):
            if path.endswith(".zip"):
                text = re.sub("mkdir.* cp {} OUT .;", "unzip -j PATH -d OUT", text)
            text = text.replace(" PATH ", f" {shlex.quote(path)} ")
            return text.replace("PATH", path).replace("FOLDER", folder)
    return otherwise


# ----------------------------------------------------------------------------- idx and CIFAR-10
def read_idx(files: Files) -> Splits:
    """The splits in idx files, MNIST's format."""
    parts = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        if any(name.startswith(prefix) for name in files.names):
            arrays = {kind: idx_array(files, f"{prefix}-{kind}") for kind in ("images", "labels")}
            parts[split] = read_arrays(files.path, arrays)
    return parts


def idx_array(files: Files, stem: str) -> np.ndarray:
    """The array in the file whose name begins with `stem`, unpacked if there is also a .gz."""
    name = next((name for name in files.names if name.startswith(stem)), None)
    path = files.shown
    if not name:
        raise UserError(f"{path} has no {stem}-idx file beside the others; add it")
    with reading(f"{path}/{name}", "expected an idx file of 8-bit numbers; replace it"):
        content = files.read(name)
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        if content[:3] != b"\0\0\x08":  # two zeros and the code of uint8, then the number of axes
            raise ValueError(f"it begins with {content[:4].hex()}")
        shape = np.frombuffer(content, ">u4", content[3], 4)
        return np.frombuffer(content, np.uint8, offset=4 + shape.nbytes).reshape(shape)


def read_cifar(files: Files) -> Splits:
    """The splits in CIFAR-10's batches, binary or Python's."""
    parts = {}
    for split, stem, count in (("train", "data_batch", 5), ("test", "test_batch", 1)):
        batches = [cifar_batch(files, name) for name in files.names if name.startswith(stem)]
        if len(batches) not in (0, count):
            raise UserError(f"{files.shown} holds {len(batches)} of CIFAR-10's {count} training "
                            "batches; put the others beside them")
        if batches:
            planes, labels = map(np.concatenate, zip(*batches, strict=True))
            array = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            parts[split] = Images(files.shown, array, labels, KNOWN["cifar10"].classes)
    return parts


def cifar_batch(files: Files, name: str) -> tuple[np.ndarray, list[int]]:
    """The planes (n, 3072) and the labels of the images in one batch."""
    with reading(f"{files.shown}/{name}", "expected a batch of CIFAR-10; replace it"):
        content = files.read(name)
        if name.endswith(".bin"):
            records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
            return records[:, 1:], records[:, 0]
        batch = Unpickler(io.BytesIO(content), encoding="latin1").load()  # Python 2's text
        return batch["data"].reshape(-1, 3072), batch["labels"]


class Unpickler(pickle.Unpickler):
    """Reads arrays, and runs no code: a pickle that asks for anything else is refused."""

    allowed = {
        "_reconstruct": np.zeros(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}

    def find_class(self, module, name):
        if module.split(".")[0] == "numpy" and name in self.allowed:
            return self.allowed[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")


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


def fetch(name: str) -> str:
    """The folder or the archive with the data set `name`; missing files are downloaded."""
    folder = cache_directory() / name
    folder.mkdir(parents=True, exist_ok=True)
    known = KNOWN[name]
    for file, sha256 in known.files.items():
        if not (folder / file).exists():
            receive = functools.partial(download, known.address + file, sha256, folder)
            write_file(folder / file, receive)
    return str(folder if len(known.files) > 1 else folder / file)


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
            raise ValueError(f"its sha256 is {digest.hexdigest()}, expected {sha256}")


# ----------------------------------------------------------------------------- built-in digits
def draw_digit(label: int, size: int, rng: np.random.Generator) -> Image.Image:
    """Draws a light digit on a dark background, with random colours, size, place and slant."""
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
    return picture.resize((size, size), Image.Resampling.BOX)


@functools.lru_cache(maxsize=4)
def digits(num: int, size: int | None, channels: int, seed: int) -> Images:
    """Draws `num` digits, all classes in turn; image i depends on (seed, i) alone."""
    if size is None:
        raise UserError("the digits are drawn at a model's size, which is not known here; pass "
                        "other images instead")
    progress = Progress(f"drawing digits of {size}x{size}", num)
    array = np.empty((num, size, size, channels), np.uint8)
    for i in range(num):
        image = draw_digit(i % 10, size, np.random.default_rng([seed, i]))
        array[i] = Crop(None, channels)(image)
        progress(i + 1)
    return Images("digits", array, np.arange(num) % 10, list("0123456789"))


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
        classes = images.classes if images.labels is not None else []
        num_classes = count_classes(images, num_classes)
    train = labels_for(images, classes, num_classes)
    classes = train.classes or []
    if holdout:
        train, test = hold_out(train, holdout)
    elif test is not None:
        test = labels_for(test, classes, num_classes)
    is_test = test is not None and not holdout
    return Split(
        train, test, is_test, classes, num_classes, digest, train.summary(test, is_test))


def hold_out(images: Images, per_class: int) -> tuple[Images, Images]:
    """(train, held out): held out are the last `per_class` of each class, or of all without."""
    by_class = images.labels is not None and not images.has_vectors
    labels = images.labels if by_class else np.zeros(len(images), np.int64)
    held = np.zeros(len(images), bool)
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        if per_class >= len(places):
            raise UserError(f"--holdout: cannot hold out {per_class} images of each class: "
                            f"{images.path} has {len(places)} of class {label}; lower it")
        held[places[len(places) - per_class:]] = True
    return images.part(~held), images.part(held)


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
    share = batch_size // world

    @functools.lru_cache(2)  # a step may end one epoch and begin the next
    def epoch(number: int) -> np.ndarray:
        """(2, m): the places in the order of an epoch, and 1 for those that are mirrored."""
        if epoch_order:
            generator = image_generators(seed, [number], torch.device("cpu"))[0]
            labels = np.zeros(len(images), np.int64) if images.labels is None else images.labels
            order = epoch_order(torch.from_numpy(labels), generator).numpy()
        else:
            order = np.random.default_rng([seed, number]).permutation(len(images))
        mirrored = np.random.default_rng([seed, number, 1]).random(len(order)) < 0.5
        return np.stack([order, mirrored])

    m = epoch(0).shape[1]

    def make(step: int) -> tuple[Tensor, Tensor, Tensor]:
        uid = step * batch_size + rank * share + np.arange(share)
        number, g = np.divmod(uid, m)
        parts = [epoch(k)[:, g[number == k]] for k in range(number[0], number[-1] + 1)]
        places, mirrored = np.concatenate(parts, axis=1)
        pixels, labels = images.batch(places)
        if flip:
            array = pixels.numpy()
            array[mirrored == 1] = array[mirrored == 1, ..., ::-1]
        return pixels, labels, torch.from_numpy(uid)

    yield from in_threads(make, itertools.count(start_step), threads=1, ahead=1)


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

    Images that are floats already keep their units: they get sigma eps or nothing.
    """

    def draw(law: Callable) -> Tensor:
        shape = images.shape[1:]
        return torch.stack([law(shape, generator=g, device=images.device) for g in generators])

    floats = images.is_floating_point()
    kinds = ["gaussian", "none"] if floats else ["gaussian", "uniform", "rgb", "none"]
    if kind not in kinds:
        raise UserError(f"noise: got {kind}, expected {', '.join(kinds)}" +
                        " for images that are floats" * floats)
    x = images.float()
    if kind == "rgb":
        x = x + (sigma * draw(torch.randn)).round()
    if not floats:
        x = (x + (0.5 if kind in ("gaussian", "none") else draw(torch.rand))) / 128 - 1
    return x + sigma * draw(torch.randn) if kind == "gaussian" else x


def quantize(images: Tensor) -> Tensor:
    """Floats about [-1, 1] (B, C, H, W) to uint8, the inverse of `dequantize`; clamps."""
    return ((images + 1) * 128).floor().clamp(0, 255).to(torch.uint8)


# ----------------------------------------------------------------------------- prepare
def prepare(images: Images, crop: Crop, out: Path) -> Images:
    """Writes images.npy, labels.npy and classes.json -> the images, now mapped from there."""
    out.mkdir(parents=True)
    if images.labels is not None:
        np.save(out / "labels.npy", images.labels)
    if images.labels is not None and images.classes:
        (out / "classes.json").write_text(json.dumps(images.classes))
    shape = (crop.size, crop.size, crop.channels)

    def write(file) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        for pixels in decoded_images(images, crop, shape):
            file.write(pixels)

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
    parser.add_argument("command", choices=["prepare"], metavar="prepare", help="the only command")
    parser.add_argument("data", metavar="DATA", help="the images: what train.py takes as --data")
    parser.add_argument("out", metavar="OUT", type=expanded,
                        help="a new folder for images.npy, labels.npy and classes.json")
    parser.add_argument("--image-size", type=at_least(int, 1), required=True, metavar="N",
                        help="crop to the centre square and resize to N x N pixels (required)")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3,
                        help="1 (grey) or 3 (RGB) (default: 3)")
    parser.add_argument("--enlarge", action="store_true",
                        help="enlarge images smaller than --image-size instead of refusing")
    args = parser.parse_args(argv)
    out = args.out
    if out.exists():
        raise UserError(f"{out} exists; choose a new folder")
    crop = Crop(args.image_size, args.channels, args.enlarge)
    parts = listed(args.data, crop)
    folders = ["train", "test"] if len(parts) == 2 else [""]
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.tmp")  # hidden: it may lie in the data
    try:
        made = [prepare(part, crop, unfinished / folder)
                for part, folder in zip(parts, folders, strict=True)]
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"data: {made[0].summary(*made[1:], is_test=True)}")
    print(f"saved in {out}: train on it with --data {out}")


if __name__ == "__main__":
    run_script(main)
