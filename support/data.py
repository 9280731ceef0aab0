"""Data: a source as images; the centre crop; uint8 to floats and back; the built-in digits.

How an image gets from a .zip into the model: `open_images` lists it, `Images.read` decodes and crops it,
`loader.batches` puts it into a batch of uint8, `dequantize` makes floats of that.
"""
import hashlib
import io
import json
import os
import struct
import sys
import time
import warnings
import zipfile
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from support import datasets
from support.cli import Progress, UserError, cache_directory, check_memory, warn, write_json

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
EXPECTED = (
    f"expected digits, {', '.join(datasets.KNOWN)}, a folder or .zip of images (flat or one folder per class), an .npz "
    "with uint8 `images`, MNIST-style idx files or CIFAR-10's archive: check the path"
)
NPZ_KEYS = (("images", "labels"), ("arr_0", "arr_1"), ("data", "labels"))  # ours, ADM's, ImageNet-64's
TRAIN_FOLDERS, TEST_FOLDERS = ("train",), ("test", "val", "valid", "validation")
INDEX_FROM = 10_000  # files; a smaller folder is listed faster than its index is worth
MAP_FROM = 2**28  # bytes; a smaller array is read, and its checksum with it
LARGEST_FILE = 2**30  # bytes of one packed image, unpacked: more is no image but an attack on the memory

# Damaged EXIF and the like, at every such file; what stops an image from being read raises.
warnings.filterwarnings("ignore", module="PIL")


# ------------------------------------------------------------------------------------------ one image
def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB, upright by its EXIF orientation.

    16-bit grey is divided by 256, transparency shows white; floating-point pixels are a UserError.
    """
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise UserError("holds floating-point pixels of unknown range; expected 8 or 16 bits: convert it first")
    if image.mode.startswith("I"):  # 16-bit grey (in 32-bit integers for .pgm); Pillow's convert() would clip it at 255
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray((wide >> 8).astype(np.uint8))
    elif image.has_transparency_data:  # convert("RGB") alone would uncover the colours under the transparent parts
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def check_size(image: Image.Image, size: int, enlarge: bool) -> None:
    """UserError where an image is too small for a crop and may not be enlarged."""
    if min(image.size) < size and not enlarge:
        raise UserError(f"is {image.width}x{image.height} pixels, smaller than image_size {size}: "
                        "remove it, lower image_size or pass --enlarge")


def center_crop(image: Image.Image, size: int, enlarge: bool = False) -> Image.Image:
    """The central size x size pixels as ADM cuts them: box halvings while the short side is >= 2 size, then bicubic.

    ADM enlarges smaller images without a word; here that takes `enlarge`, and without it they are a UserError.
    """
    if image.size == (size, size):
        return image
    check_size(image, size, enlarge)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


# ------------------------------------------------------------------------------------------ many images
@dataclass(eq=False)
class Images:
    """The images of one source in a fixed order: by name for files, as stored for arrays.

    Picklable, and safe in forked workers.
    """

    path: str
    names: list[str]
    labels: np.ndarray | None = None  # (N,) int64
    classes: list[str] | None = None  # label -> name
    array: np.ndarray | None = None  # (N, H, W, C) uint8, C 1 or 3, when the pixels are at hand
    enlarge: bool = False  # bring images smaller than the crop up to it
    test: str | None = None  # the source of the test split, when these are the training split of a set with both
    archive: tuple[int, zipfile.ZipFile] | None = None  # (process, handle): forks would share a handle's file position

    def __len__(self):
        return len(self.names)

    def __getstate__(self):  # a memory-mapped array travels as its place in its file
        array = self.array
        if isinstance(array, np.memmap):
            array = (array.filename, array.dtype, "r", array.offset, array.shape)
        return self.__dict__ | {"archive": None, "array": array}

    def __setstate__(self, state):
        self.__dict__.update(state)
        if isinstance(self.array, tuple):
            self.array = np.memmap(*self.array)

    def name(self, i: int) -> str:
        return os.path.join(self.path, self.names[i])

    def stored(self, i: int) -> bytes:
        """Image i as it is stored: the bytes of its file, or its pixels."""
        if self.array is not None:
            return self.array[i].tobytes()
        if not self.path.lower().endswith(".zip"):
            with open(self.name(i), "rb") as file:
                return file.read(LARGEST_FILE)
        if self.archive is None or self.archive[0] != os.getpid():
            self.archive = os.getpid(), zipfile.ZipFile(self.path)
        archive = self.archive[1]
        if archive.getinfo(self.names[i]).file_size > LARGEST_FILE:
            raise UserError(f"unpacks to more than {LARGEST_FILE >> 20} MiB: remove it")
        return archive.read(self.names[i])

    def open(self, i: int) -> Image.Image:
        """Image i, its pixels not yet decoded."""
        if self.array is not None:
            pixels = self.array[i]
            return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        if self.path.lower().endswith(".zip"):
            return Image.open(io.BytesIO(self.stored(i)))
        return Image.open(self.name(i))

    def read(self, i: int, size: int | None = None, channels: int = 3, decode: bool = True) -> np.ndarray | None:
        """Image i as uint8 RGB (H, W, 3), or with `size` its centre crop (size, size, channels).

        One channel is luminance; grey images are repeated to three.
        A broken, vanished or too small image is a UserError that names it.
        decode=False returns None and finds only what header and PNG checksums tell.
        """
        try:
            with self.open(i) as image:
                if not decode:
                    check_size(image, size, self.enlarge)
                    return image.verify()
                if size:  # libjpeg then decodes at 1/2, 1/4 or 1/8 where both sides stay >= 2 size: a halving is left
                    image.draft("RGB", (2 * size, 2 * size))
                rgb = to_rgb(image)
            if size:
                rgb = center_crop(rgb, size, self.enlarge)
            if channels == 3:
                return np.array(rgb)
            return np.array(rgb.convert("L"))[..., None]
        except Exception as error:  # Pillow raises nearly every type there is on random bytes
            why = error
            if not isinstance(error, UserError):
                why = f"cannot be read as an image ({type(error).__name__}: {error}): replace it"
            raise UserError(one_line(f"{self.name(i)} {why}")) from None

    __getitem__ = read


def report_broken(error: UserError, count: int, total: int) -> None:
    """Names an unusable image on stderr; a UserError when that makes more than 1% of `total`, one always allowed."""
    if count > max(1, total // 100):
        raise UserError(f"{count} of {total} images cannot be used, more than 1%; the last: {error}")
    print(f"skipped {error} ({count} of {total})", file=sys.stderr, flush=True)


def spread(n: int, count: int) -> np.ndarray:
    """Up to `count` different numbers in [0, n), evenly spaced, the first and the last among them."""
    return np.linspace(0, n - 1, min(n, count)).astype(np.int64)


def one_line(text: str) -> str:
    return " ".join(text.split())


# ------------------------------------------------------------------------------------------ sources
def split_source(source: str) -> tuple[str, str | None]:
    """'cifar10:test' -> ('cifar10', 'test'); without :train or :test the second is None. ~ is expanded."""
    name, colon, split = source.rpartition(":")
    if not colon or split not in ("train", "test") or os.path.exists(source):
        name, split = source, None
    if not name.strip():
        raise UserError(f"--data: got an empty name; {EXPECTED}")
    return os.path.expanduser(name), split


def open_images(source: str, enlarge: bool = False, size: int | None = None, channels: int = 3) -> Images:
    """The images of `source`; of a set with two splits the training split, unless the source ends with :test.

    digits: drawn at `size` with `channels`, which nothing else needs.
    fashion-mnist, mnist, cifar10: downloaded once.
    A folder: the class of an image is the first-level sub-folder it is in, at any depth; with no images in sub-folders
    the set is flat (labels None). Folders train and test (or val) are the two splits.
    A .zip: the same, after a top folder common to all images is taken off.
    Hidden files and __MACOSX are ignored in both.
    An .npz: `images` or `arr_0` (N, H, W) or (N, H, W, C) uint8 and optional integer `labels` or `arr_1` (N,), or
    ImageNet-64's `data` (N, 3 S S) and `labels`.
    MNIST-style idx files and CIFAR-10's archives: see support/datasets.py.
    UserError: there are no images, or they are not as above.
    """
    name, split = split_source(source)
    if name == "digits":
        if size is None:
            raise UserError("the digits are drawn at a model's size and cannot be read here; pass a file of them")
        if split == "test":
            return digits(500, size, channels, 1)
        return replace(digits(4000, size, channels, 0), test=None if split else "digits:test")
    if name in datasets.KNOWN:
        if os.path.exists(name):
            warn(f"--data {name} is the data set of that name; for the local one write ./{name}")
        return _known_images(name, datasets.fetch(name), split, enlarge)
    path = os.path.abspath(name)
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist; {EXPECTED}")
    if not (os.path.isdir(path) or os.path.isfile(path)):
        raise UserError(f"{path} is neither a folder nor a regular file; {EXPECTED}")
    try:
        if datasets.splits(path):
            return _known_images(name, path, split, enlarge)
        if path.lower().endswith(".npz"):
            return _npz_images(path, split, enlarge)
        return _file_images(name, path, split, enlarge)
    except UserError:
        raise
    except Exception as error:  # as many types as there are ways to damage a file
        raise UserError(one_line(f"{path} cannot be opened ({type(error).__name__}: {error}); {EXPECTED}")) from None


def _known_images(name: str, path: str, split: str | None, enlarge: bool) -> Images:
    """Images of one of the sets that support/datasets.py reads, from the files at `path`."""
    found = datasets.splits(path)
    chosen = split or ("train" if "train" in found or os.path.isdir(path) else "test")
    if chosen not in found:
        other = next(iter(found))
        raise UserError(f"{path} holds only its {other} split, not {chosen}: write {name}:{other} to use that")
    array, labels, classes = found[chosen]()
    if name in datasets.KNOWN:
        classes = datasets.KNOWN[name].classes
    images = array_images(path, array, labels, classes, enlarge)
    if split is None and len(found) == 2:
        images.test = f"{name}:test"
    return images


def _npz_images(path: str, split: str | None, enlarge: bool) -> Images:
    if split:
        raise UserError(f"{path} has no splits: leave out :{split}")
    with np.load(path, allow_pickle=False) as file:
        key, label_key = next((keys for keys in NPZ_KEYS if keys[0] in file), (None, None))
        if key is None:
            found = ", ".join(file.files) or "nothing"
            raise UserError(f"{path} holds {found}; expected uint8 `images` and optional `labels`: rename its arrays")
        array = _npz_array(path, file, key)
        labels = file[label_key] if label_key in file else None
    if key == "data":
        array = _unflatten(path, array)
        if labels is not None and labels.size and labels.dtype.kind in "iu" and labels.min() == 1:
            warn(f"{path}: labels start at 1, as ImageNet-64's do; label 1 is class 0 here")
            labels = labels - labels.dtype.type(1)
    return array_images(path, array, labels, enlarge=enlarge)


def _unflatten(path: str, array: np.ndarray) -> np.ndarray:
    """ImageNet-64's (N, 3 S S), plane by plane -> (N, S, S, 3)."""
    size = round((array.shape[-1] / 3) ** 0.5) if array.ndim == 2 else 0
    if array.ndim != 2 or 3 * size**2 != array.shape[1]:
        raise UserError(f"{path}: data is {array.dtype} {array.shape}; expected uint8 (N, 3 S S), as ImageNet-64 has")
    planes = array.reshape(-1, 3, size, size)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1))


def _npz_array(path: str, file: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    """One array of an .npz, memory-mapped when large and not compressed: 50,000 images of 256x256 are 9.2 GiB."""
    info = file.zip.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size < MAP_FROM:
        return file[name]
    with open(path, "rb") as raw:
        raw.seek(info.header_offset + 26)  # the lengths of the member's name and extra field, which its data follow
        name_length, extra_length = struct.unpack("<HH", raw.read(4))
        raw.seek(name_length + extra_length, os.SEEK_CUR)
        if np.lib.format.read_magic(raw) != (1, 0):
            return file[name]
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(raw)
        if fortran or dtype.hasobject:
            return file[name]
        return np.memmap(path, dtype, "r", raw.tell(), shape)


def array_images(path, array, labels=None, classes: list[str] | None = None, enlarge: bool = False) -> Images:
    """Images from an array (N, H, W) or (N, H, W, C) uint8 with labels (N,) or None.

    UserError, naming `path`, when they are anything else.
    """
    array = array[..., None] if array.ndim == 3 else array
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] not in (1, 3) or 0 in array.shape:
        found = f"{array.dtype} {array.shape}"
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            found += f" with {(~np.isfinite(array)).sum()} values that are not finite"
        raise UserError(f"{path}: images are {found}; expected uint8 (N, H, W) or (N, H, W, C), C 1 or 3, N > 0: "
                        "convert them")
    if labels is not None:
        fit = labels.dtype.kind in "iu" and labels.shape == array.shape[:1]
        if not fit or labels.min() < 0 or labels.max() >= 2**31:
            found = f"{labels.dtype} {labels.shape}"
            if fit:
                found += f" from {labels.min()} to {labels.max()}"
            raise UserError(f"{path}: labels are {found}; expected {len(array)} integers >= 0, one per image: "
                            "correct the file")
        labels = labels.astype(np.int64)
        if classes and labels.max() >= len(classes):
            classes = None  # other files under the name of a known set
    names = [f"image {i}" for i in range(len(array))]
    return Images(path, names, labels, classes, array, enlarge)


def _file_images(name: str, path: str, split: str | None, enlarge: bool) -> Images:
    """Images from the files in a folder or .zip, with the classes that the folders make."""
    if os.path.isdir(path):
        names, depth = _folder_names(path), 0
    elif path.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            names = [name for name in set(archive.namelist()) if _is_image(name)]
        depth = int(len(_folders_at(names, 0)) == 1 and _folders_at(names, 0) != {""})  # a folder around everything
    else:
        names = []
    if not names:
        raise UserError(f"{path} holds no images; {EXPECTED}")
    names.sort()
    both = _split_folders(_folders_at(names, depth))
    if split and not both:
        raise UserError(f"{path} has no folders train and test: leave out :{split}")
    classes = sorted(_folders_at(names, depth + bool(both)))
    if classes[0] == "" and len(classes) > 1:
        stray = next(name for name in names if name.count("/") == depth + bool(both))
        raise UserError(f"{path} has {stray} beside folders of images; "
                        "expected all images in class folders, or none: move it")
    if both:
        names = [name for name in names if name.split("/")[depth] == both[split or "train"]]
        depth += 1
    images = Images(path, names, enlarge=enlarge)
    if both and split is None:
        images.test = f"{name}:test"
    if classes != [""]:
        label = {name: i for i, name in enumerate(classes)}
        images.labels = np.array([label[name.split("/")[depth]] for name in names])
        images.classes = classes
    return images


def _folders_at(names: list[str], depth: int) -> set[str]:
    """The folders that names have at `depth`, '' for a name that is a file there."""
    return {name.split("/")[depth] if name.count("/") > depth else "" for name in names}


def _split_folders(folders: set[str]) -> dict[str, str] | None:
    """{'train': folder, 'test': folder} when the folders are splits and nothing else."""
    train = [name for name in TRAIN_FOLDERS if name in folders]
    test = [name for name in TEST_FOLDERS if name in folders]
    if train and test and folders <= {*TRAIN_FOLDERS, *TEST_FOLDERS}:
        return {"train": train[0], "test": test[0]}
    return None


def _is_image(name: str) -> bool:
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    return name.lower().endswith(SUFFIXES) and not hidden


def _folder_names(root: str) -> list[str]:
    """Relative names of all images under `root`; what looks like one but is no file (a pipe, a device) is not listed.

    A long listing is kept in the cache directory until the time stamp of any folder in it changes.
    """
    index = cache_directory() / f"index-{hashlib.sha256(os.fsencode(root)).hexdigest()[:24]}.json"
    known = _read_index(index, root)
    if known is not None:
        return known
    names, folders, odd = [], {}, []
    todo = [("", ())]  # folders to list, each with the identities of those above it
    while todo:
        folder, above = todo.pop()
        state = os.stat(os.path.join(root, folder))
        if (state.st_dev, state.st_ino) in above:
            continue  # a link to a folder that it is in: without end
        above = (*above, (state.st_dev, state.st_ino)) if state.st_ino else above
        folders[folder] = state.st_mtime_ns
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                if entry.is_dir():
                    if not entry.name.startswith(".") and entry.name != "__MACOSX":
                        todo.append((f"{folder}{entry.name}/", above))
                elif _is_image(entry.name):
                    is_file = entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
                    (names if is_file else odd).append(folder + entry.name)
    if odd:
        warn(one_line(f"{root}: {len(odd)} of the names are no regular files and left out, as {sorted(odd)[0]}"))
    settled = max(folders.values()) < time.time_ns() - 2e9  # a folder just changed may do so again in the same tick
    if len(names) >= INDEX_FROM and settled:
        try:
            index.parent.mkdir(parents=True, exist_ok=True)
            write_json(index, {"root": root, "folders": folders, "names": names})
        except (OSError, UserError):
            pass  # an index is a convenience
    return names


def _read_index(index, root: str) -> list[str] | None:
    """The names in an index of `root`; None when there is none or it is stale or damaged."""
    try:
        known = json.loads(index.read_bytes())
        if known["root"] != root:
            return None
        for folder, modified in known["folders"].items():
            if os.stat(os.path.join(root, folder)).st_mtime_ns != modified:
                return None
        return [str(name) for name in known["names"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


# ------------------------------------------------------------------------------------------ uint8 to floats and back
def image_generators(seed: int, indices, device: torch.device) -> list[torch.Generator]:
    """One generator per image, seeded by (seed, index) alone."""
    states = [int(np.random.SeedSequence([seed, int(i)]).generate_state(1, np.uint64)[0]) >> 1 for i in indices]
    return [torch.Generator(device).manual_seed(s) for s in states]


def dequantize(images: Tensor, kind: str, sigma: float, generators: list[torch.Generator] | None) -> Tensor:
    """uint8 images (B, C, H, W) to floats x about [-1, 1] (section 3.2), each with the noise of its own generator.

    gaussian: x = (x_int + 1/2) / 128 - 1 + sigma eps,          eps ~ N(0, 1)
    uniform:  x = (x_int + u) / 128 - 1,                        u ~ U[0, 1); its density bounds that of the 8-bit data
    rgb:      x = (x_int + round(sigma eps) + u) / 128 - 1,     sigma in steps of the 8 bits; not clipped
    none:     x = (x_int + 1/2) / 128 - 1
    """
    def draw(law) -> Tensor:
        shape, device = images.shape[1:], images.device
        return torch.stack([law(shape, generator=g, device=device) for g in generators])

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


# ------------------------------------------------------------------------------------------ built-in digits
def draw_digit(label: int, size: int, channels: int, rng: np.random.Generator) -> np.ndarray:
    """A light digit on a dark ground with random colours, height, place and slant -> uint8 (size, size, channels)."""
    big = 4 * size
    ink = tuple(rng.integers(150, 256, 3).tolist())
    ground = tuple(rng.integers(0, 90, 3).tolist())
    picture = Image.new("RGB", (big, big), ground)
    font = ImageFont.load_default(int(big * rng.uniform(0.8, 1.0)))
    place = tuple(big / 2 + big * rng.uniform(-0.06, 0.06, 2))
    draw = ImageDraw.Draw(picture)
    draw.text(place, str(label), font=font, fill=ink, anchor="mm", stroke_width=big // 32, stroke_fill=ink)
    picture = picture.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC, fillcolor=ground)
    picture = picture.resize((size, size), Image.Resampling.BOX)
    picture = picture if channels == 3 else picture.convert("L")
    return np.asarray(picture).reshape(size, size, channels)


@lru_cache(maxsize=4)
def digits(n: int, size: int, channels: int, seed: int) -> Images:
    """n digits, classes in turn; image i depends on (seed, i) alone. Training uses seed 0, validation seed 1."""
    check_memory(n * size**2 * channels, f"drawing {n} digits of {size}x{size}")
    progress = Progress(f"drawing digits of {size}x{size}", n)
    labels = np.arange(n) % 10
    array = np.empty((n, size, size, channels), np.uint8)
    for i, label in enumerate(labels):
        array[i] = draw_digit(int(label), size, channels, np.random.default_rng([seed, i]))
        progress(i + 1)
    return array_images("digits", array, labels, [str(label) for label in range(10)])
