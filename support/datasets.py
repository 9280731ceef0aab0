"""Where images come from: named sets, folders, zips, .npz files, idx files, CIFAR-10's archive.

`open_images` lists a source, `Images.read` decodes and crops one image. Nothing is guessed: one
line says what was read (`Images.summary`), and a layout that is not one of these is an error that
shows what was found.

    folder or .zip   images alone (no labels) or class folders; either may lie under train/ and
                     test/ or val/. A dataset.json (StyleGAN's and EDM's format) gives the labels
    .npz             `images` (N, H, W) or (N, H, W, C) uint8 and `labels` (N,); or arr_0 and arr_1
    folder of .npy   images.npy, labels.npy and classes.json, as `batches.py prepare` writes them
    folder or .zip   with MNIST's idx files, .gz or not, or CIFAR-10's binary batches; its .tar.gz

Outer folders that hold nothing else are stepped into. A folder without images is not a class.
"""
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import struct
import tarfile
import urllib.request
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from support.cli import Progress, UserError, cache_directory, expanded, reading, warn, write_file

IMAGE = re.compile(r"[^/]+\.(jpg|jpeg|jpe|jfif|png|webp|bmp|gif|tif|tiff|p[bgnp]m)", re.I | re.S)
IDX = re.compile(r"(train|t10k)-(images|labels)[-.]idx[13]-ubyte(\.gz)?")
CIFAR = re.compile(r"(data_batch_[1-5]|test_batch)(\.bin)?")
CIFAR_ARCHIVE = "cifar-10-binary.tar.gz"
TABLES = ("images.npy", "dataset.json", CIFAR_ARCHIVE)
LAYOUT = ("expected images alone, or class folders that hold nothing but images, or one of these "
          "under train/ and under test/ or val/; move everything else away")

# About damaged EXIF and the like; an image that cannot be read raises an error instead.
warnings.filterwarnings("ignore", module="PIL")
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # colour profiles may exceed Pillow's limit of 1 MiB


# ----------------------------------------------------------------------------- one image
def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any Pillow image to 8-bit RGB, turned upright by its EXIF data, on white.

    16-bit pixels are divided by 256. Raises ValueError if the range of the pixels is unknown.
    """
    deep = image.mode.startswith("I") or ";16" in str(getattr(image, "tile", ""))
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("floating-point pixels; convert them to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own convert() would clip it at 255
        grey = np.asarray(image).astype(np.int64)
        clear = grey == image.info.get("transparency", -1)
        grey = np.where(clear, 65535, grey.clip(0, 65535))
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    elif image.has_transparency_data:  # convert("RGB") would show the colours of clear pixels
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    rgb = image.convert("RGB")
    if deep and not rgb.getbbox():
        raise ValueError("all of its 16-bit pixels are black, as if their values went from 0 to "
                         "255; convert it to 8 bits")
    return rgb


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


# ----------------------------------------------------------------------------- many images
@dataclass(eq=False)
class Images:
    """The images of one source in a fixed order: by name for files, as stored for arrays."""

    path: str  # the source; for files, the folder that `names` are in
    names: list[str]
    labels: np.ndarray | None = None  # (N,) int64
    classes: list[str] | None = None  # the name of each label; None: labels are numbers
    array: np.ndarray | None = None  # (N, H, W, C) uint8, C 1 or 3, where there are no files
    enlarge: bool = False  # enlarge images that are smaller than the crop
    test: str | None = None  # the source of the test split, if there is one beside this
    ignored: str = ""  # what was found but not read
    files: list | None = None  # where each image is stored; None: in the folder `path`

    def __len__(self):
        return len(self.names)

    def stored(self, i: int) -> bytes:
        """The bytes of image i as it is stored: its pixels or its file."""
        if self.array is not None:
            return self.array[i].tobytes()
        file = self.files[i] if self.files else os.path.join(self.path, self.names[i])
        return read_file(file)

    def read(self, i: int, size: int | None = None, channels: int = 3) -> np.ndarray:
        """Image i as uint8 RGB (H, W, 3), or with `size` its centre crop (size, size, channels).

        A single channel is luminance. Raises UserError for an image that is broken or too small.
        """
        name = os.path.join(self.path, self.names[i])
        with reading(name, "replace or remove it"):
            if self.array is None:
                image = Image.open(io.BytesIO(self.stored(i)))
            else:
                pixels = self.array[i]
                image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            image = to_rgb(image)
        if size and min(image.size) < size and not self.enlarge:
            raise UserError(f"{name} is {image.width}x{image.height} pixels, smaller than "
                            f"image_size {size}; remove it, lower image_size or pass --enlarge")
        if size:
            image = center_crop(image, size)
        if channels == 1:
            return np.array(image.convert("L"))[..., None]
        return np.array(image)

    def summary(self, test: "Images | None" = None) -> str:
        """What was read, in one line: the images, their classes, and what was ignored.

        test: the opened test split, whose number of images is then given too.
        """
        sizes = {self.read(i).shape[:2] for i in spread(len(self), 8)}
        height, width = min(sizes)
        size = f"{width}x{height}" if len(sizes) == 1 else "of several sizes"
        text = f"{counted(self, 'image')} {size} {self.classes_text()}, from {self.path}"
        if self.test:
            text += f"; test split: {self.test}"
        if test:
            text += ", " + counted(test, "image")
        if self.ignored:
            text += f"; ignored: {self.ignored}"
        return text

    def classes_text(self) -> str:
        if self.labels is None:
            return "without labels"
        each = []
        for label, count in zip(*np.unique(self.labels, return_counts=True), strict=True):
            each.append(f"{self.classes[label] if self.classes else f'class {label}'} {count}")
        return f"in {len(each)} class{'es' * (len(each) > 1)} ({shortened(each, 12)})"

    def digest(self) -> str:
        """A hash of names, labels and a sample of the images: which set this is, wherever it lies.

        The sample is spread evenly over the set; a set of up to 512 images is hashed as a whole.
        """
        labels = [] if self.labels is None else self.labels.tolist()
        shape = [] if self.array is None else self.array.shape[1:]
        state = hashlib.sha256(json.dumps([self.names, labels, shape]).encode())
        for i in spread(len(self), 512):
            state.update(self.stored(i))
        return state.hexdigest()


def spread(n: int, count: int) -> np.ndarray:
    """Up to `count` different numbers from 0 to n - 1, evenly spaced, first and last included."""
    return np.linspace(0, n - 1, min(n, count)).astype(np.int64)


def shortened(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)


def counted(things, name: str) -> str:
    """2 things -> "2 images"."""
    return f"{len(things):,} {name}" + "s" * (len(things) != 1)


def array_images(path: str, array, labels=None, classes: list[str] | None = None) -> Images:
    """Images from an array (N, H, W) or (N, H, W, C) uint8 with labels (N,) or None."""
    shape = array.shape
    if array.ndim == 3:
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] not in (1, 3) or 0 in shape:
        raise UserError(f"{path}: images are {array.dtype} {shape}; expected uint8 (N, H, W) or "
                        "(N, H, W, C) with C 1 or 3; convert them")
    names = [f"image {i}" for i in range(len(array))]
    if labels is not None:
        labels = check_labels(path, labels, len(names), len(classes or []))
    return Images(path, names, labels, classes, array)


# ----------------------------------------------------------------------------- labels
def check_labels(path: str, labels, num: int, num_classes: int = 0) -> np.ndarray:
    """Checks that labels are `num` whole numbers from 0 to num_classes - 1 -> (num,) int64.

    Raises UserError otherwise. num_classes 0: any number of classes.
    """
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.shape != (num,):
        raise UserError(f"{path}: labels are {labels.dtype} {labels.shape}; expected {num} whole "
                        "numbers, one for each image")
    low, high = int(labels.min()), int(labels.max())
    top = num_classes or 2**31
    if low < 0 or high >= top:
        advice = "correct them, or pass a larger --num-classes"
        if low == 1:
            advice = "subtract 1 from each, or pass --num-classes if there is a class 0 too"
        raise UserError(f"{path}: labels go from {low} to {high}, expected 0 to {top - 1}; "
                        f"{advice}")
    return labels.astype(np.int64)


def labels_for(images: Images, classes: list[str] | None, num_classes: int) -> Images:
    """The same images, labelled as a model with these classes numbers them.

    Classes are matched by name where both have names; numbers stay as they are and are never
    shifted. classes None or []: the model's classes are numbers. num_classes 0: the labels are
    dropped. Raises UserError if the labels do not fit the model.
    """
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


# ----------------------------------------------------------------------------- sources
def open_images(
    source: str,
    size: int | None = None,
    channels: int = 3,
    enlarge: bool = False,
    own: Callable | None = None,
) -> Images:
    """Opens `source`; if it has two splits, the training split, unless it ends in :test.

    A known name is always the set of that name; ./digits is a folder. Only the digits, which are
    drawn, need size and channels. own: `open_images` of a model's file, for its own data format.
    """
    images = own(source) if own else None
    if images is not None:
        return replace(images, enlarge=images.enlarge or enlarge)
    name, split = source, ""
    if source.endswith((":train", ":test")) and not os.path.exists(source):
        name, _, split = source.rpartition(":")
    known = f"{', '.join(['digits', *KNOWN])}, or a folder, .zip or .npz of images"
    path = str(expanded(name))
    if name in ("digits", *KNOWN):
        if os.path.exists(name) and not split:
            warn(f"{name} is read as the data set of that name; write ./{name} for the local files")
    elif not name or not os.path.exists(path):
        raise UserError(f"--data: {name or 'an empty name'} does not exist; expected {known}")
    if name == "digits":
        images = digits(500 if split == "test" else 4000, size, channels, int(split == "test"))
        return replace(images, test=None if split else "digits:test")
    if name in KNOWN:
        parts = read_folder(list_folder(fetch(name)))
        for part in parts.values():
            part.path = name
            part.classes = KNOWN[name].classes
    else:
        with reading(path, f"expected {known}"):
            parts = read_path(path)
    chosen = split or ("train" if "train" in parts else "")
    if chosen not in parts:
        there = " or ".join(f"{name}:{part}" if part else name for part in parts)
        raise UserError(f"{source}: no training split, or no split of that name; write {there}")
    images = replace(parts[chosen], enlarge=enlarge)
    if len(parts) == 2 and not split:
        images.test = f"{name}:test"
    return images


def read_path(path: str) -> dict[str, Images]:
    """The splits of a file or folder: train and test, or a single one without a name."""
    name = path.lower()
    if os.path.isdir(path):
        return read_folder(list_folder(path))
    if name.endswith(".zip"):
        return read_folder(list_zip(path))
    if name.endswith((".tar.gz", ".tgz", ".tar")):
        return read_cifar(list_tar(path))
    with np.load(path, allow_pickle=False) as arrays:
        return {"": read_arrays(path, dict(arrays))}


def read_arrays(path: str, arrays: dict, classes: list[str] | None = None) -> Images:
    """Images from named arrays, those of an .npz or of .npy files."""
    pixels = "images" if "images" in arrays else "arr_0"
    labels = "labels" if "labels" in arrays or pixels == "images" else "arr_1"
    if pixels not in arrays:
        raise UserError(f"{path} holds {', '.join(arrays) or 'nothing'}; expected `images` (uint8) "
                        "and `labels`; rename its arrays")
    images = array_images(path, arrays.pop(pixels), arrays.pop(labels, None), classes)
    for name, other in arrays.items():
        scores = other.dtype.kind == "f" and (other % 1).any()
        if other.shape[:1] == (len(images),) and not scores:
            raise UserError(f"{path}: its array {name} has an entry for each image, but is not "
                            "read; call it labels if it holds the labels, or else remove it")
    images.ignored = ", ".join(f"array {name}" for name in arrays)
    return images


# ----------------------------------------------------------------------------- files
@dataclass
class Folder:
    """A folder on disk or in an archive. `files` maps names to what `read_file` takes."""

    path: str
    files: dict[str, str | tuple | bytes] = field(default_factory=dict)
    folders: dict[str, "Folder"] = field(default_factory=dict)

    def images(self, prefix: str = "") -> dict:
        """All images in the folder, at any depth, sorted by name: {name: file}."""
        found = {prefix + name: file for name, file in self.files.items() if IMAGE.fullmatch(name)}
        for name, folder in self.folders.items():
            found |= folder.images(f"{prefix}{name}/")
        return dict(sorted(found.items()))

    def unexpected(self) -> UserError:
        """The error for a layout that is not one of ours: it shows what is there."""
        found = list(self.files)[:2]
        for name, folder in self.folders.items():
            inner = " in " + counted(folder.folders, "folder") if folder.folders else ""
            found.append(f"{name}/ ({counted(folder.images(), 'image')}{inner})")
        return UserError(f"{self.path} holds {shortened(found)}; {LAYOUT}")


def read_file(file: str | tuple | bytes) -> bytes:
    """The content of a file, given by its path, by (zip, name in it), or as the content itself."""
    if isinstance(file, bytes):
        return file
    if isinstance(file, tuple):
        return open_zip(file[0], os.getpid()).read(file[1])
    return Path(file).read_bytes()


def list_folder(path: str | Path, above: tuple = ()) -> Folder:
    """Lists a folder on disk. A link to one of the folders around it, `above`, is not followed."""
    folder = Folder(str(path))
    real = os.path.realpath(path)
    if real in above or is_hidden(os.path.basename(path)) and above:
        return folder
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        if entry.is_dir():
            folder.folders[entry.name] = list_folder(entry.path, (*above, real))
        else:
            folder.files[entry.name] = entry.path
    return folder


@functools.lru_cache(maxsize=4)
def open_zip(path: str, process: int) -> zipfile.ZipFile:
    """Opens a zip once per process, as forked processes would share the position in the file."""
    return zipfile.ZipFile(path)


def list_zip(path: str) -> Folder:
    """Lists a zip. \\ in its names is read as /; empty parts, . and a leading / are left out."""
    open_zip.cache_clear()
    root = Folder(path)
    for stored in sorted(open_zip(path, os.getpid()).namelist()):
        *parts, name = stored.replace("\\", "/").split("/")
        folder = root
        for part in parts:
            if part not in ("", "."):
                new = Folder(f"{folder.path}/{part}")
                folder = folder.folders.setdefault(part, new)
        if name:
            folder.files[name] = (path, stored)
    return root


def list_tar(path: str) -> Folder:
    """Reads CIFAR-10's batches from a tar file."""
    folder = Folder(path)
    with tarfile.open(path) as archive:
        for member in archive:
            name = os.path.basename(member.name)
            if member.isfile() and CIFAR.fullmatch(name):
                folder.files[name] = archive.extractfile(member).read()
    return folder


def is_hidden(name: str) -> bool:
    """Whether systems, NAS boxes or archivers leave files of such names behind: .git, @eaDir."""
    return name.startswith((".", "_", "@", "$")) or name in ("Thumbs.db", "lost+found")


def is_data(name: str) -> bool:
    return bool(IMAGE.fullmatch(name) or IDX.fullmatch(name) or CIFAR.fullmatch(name)
                or name in TABLES)


def sift(folder: Folder, left_out: list[str], others: list[str], place: str = "") -> None:
    """Removes what is not data: hidden names, runs of train.py, empty folders and other files.

    left_out collects the folders, others the files. A run is a folder with ckpt.pt or log.jsonl.
    """
    if "ckpt.pt" in folder.files or "log.jsonl" in folder.files:
        left_out.append(f"run {place.rstrip('/') or '.'}")
        folder.files = {}
        folder.folders = {}
    for name, inner in list(folder.folders.items()):
        told = len(left_out)
        if not is_hidden(name):
            sift(inner, left_out, others, f"{place}{name}/")
        if is_hidden(name) or not (inner.files or inner.folders):
            del folder.folders[name]
            if told == len(left_out):
                left_out.append(f"folder {place}{name}")
    for name in list(folder.files):
        if is_hidden(name) or not is_data(name) and "images.npy" not in folder.files:
            del folder.files[name]
            if IMAGE.fullmatch(name) or not is_hidden(name):
                others.append(name)


# ----------------------------------------------------------------------------- layouts
def read_folder(root: Folder) -> dict[str, Images]:
    """The splits in a folder or an archive: train and test, or a single one without a name."""
    left_out = []
    others = []
    sift(root, left_out, others)
    if others:
        endings = {os.path.splitext(name)[1] or name for name in others}
        hidden = " with hidden names" * any(map(IMAGE.fullmatch, others))
        left_out.insert(0, f"{counted(others, 'file')} ({shortened(sorted(endings))}){hidden}")
    if not (root.files or root.folders):
        found = ", ".join(left_out) or "nothing"
        raise UserError(f"{root.path} holds no images; found: {found}; {LAYOUT}")
    folder = stepped_into(root)
    tables = [name for name in folder.files if not IMAGE.fullmatch(name)]
    if tables and folder.folders and tables != ["dataset.json"]:
        raise folder.unexpected()
    if any(map(IDX.fullmatch, tables)):
        parts = read_idx(folder)
    elif any(map(CIFAR.fullmatch, tables)):
        parts = read_cifar(folder)
    elif CIFAR_ARCHIVE in tables:
        parts = read_cifar(list_tar(folder.files[CIFAR_ARCHIVE]))
    else:
        parts = {}
        for split, part in split_folders(folder, left_out).items():
            parts[split] = read_part(stepped_into(part))
        classes = [name for part in parts.values() for name in part.classes or []]
        classes = list(dict.fromkeys(classes))
        if len(classes) > 1:  # give a class the same number in both splits
            parts = {k: labels_for(part, classes, len(classes)) for k, part in parts.items()}
    for part in parts.values():
        part.ignored = ", ".join(filter(None, [*left_out, part.ignored]))
    return parts


def stepped_into(folder: Folder) -> Folder:
    """The folder inside outer folders that hold nothing else; a folder of images is kept as one."""
    while len(folder.folders) == 1 and not folder.files:
        inner = next(iter(folder.folders.values()))
        if all(map(IMAGE.fullmatch, inner.files)) and not inner.folders:
            break
        folder = inner
    return folder


def split_folders(folder: Folder, left_out: list[str]) -> dict[str, Folder]:
    """{"train": folder, "test": folder} where there are such folders, else {"": folder}."""
    names = list(folder.folders)
    train = [name for name in names if name.lower() == "train"]
    val = [name for name in names if name.lower() == "val"]
    test = [name for name in names if name.lower() == "test"] or val
    unread = set(names).difference(train, test)
    if len(train) == len(test) == 1 and unread <= set(val) and not folder.files:
        left_out.extend(f"folder {name}" for name in unread)
        return {"train": folder.folders[train[0]], "test": folder.folders[test[0]]}
    like_splits = [name for name in names if re.search("train|test|val|dev", name, re.I)]
    if train and test or len(like_splits) == len(names) > 1:
        raise folder.unexpected()
    return {"": folder}


def read_part(folder: Folder) -> Images:
    """The images of one split."""
    if "images.npy" in folder.files:
        files = [Path(file) for name, file in folder.files.items() if name.endswith(".npy")]
        arrays = {file.stem: np.load(file, mmap_mode="r") for file in files}
        classes = json.loads(read_file(folder.files.get("classes.json", b"null")))
        return read_arrays(folder.path, arrays, classes)
    found = folder.images()
    images = Images(folder.path, list(found), files=list(found.values()))
    if "dataset.json" in folder.files:
        images.labels = json_labels(folder, images.names)
    elif folder.folders:
        deeper = any(inner.folders for inner in folder.folders.values())
        if deeper or folder.files or are_shards(images.names):
            raise folder.unexpected()
        images.classes = in_order(folder.folders)
        if len(images.classes) > 1:  # the name of a single folder may mean nothing
            number = {name: k for k, name in enumerate(images.classes)}
            images.labels = np.array([number[name.split("/")[0]] for name in images.names])
    return images


def in_order(names) -> list[str]:
    """The names sorted, as numbers if all of them are numbers."""
    if all(name.isdecimal() for name in names):
        return sorted(names, key=int)
    return sorted(names)


def are_shards(names: list[str]) -> bool:
    """Whether folders are parts of one set, not classes: 00000/00999.png, then 01000/01000.png."""
    found = [re.fullmatch(r"\d{3,}/.*?(\d+)\.\w+", name) for name in names]
    if not all(found) or names[0].split("/")[0] == names[-1].split("/")[0]:
        return False
    numbers = [int(match[1]) for match in found]
    return all(first < second for first, second in itertools.pairwise(numbers))


def json_labels(folder: Folder, names: list[str]) -> np.ndarray | None:
    """The labels in dataset.json, {"labels": [[name, label], ...]}; None if it says null."""
    path = f"{folder.path}/dataset.json"
    with reading(path, 'expected {"labels": [[name, label], ...]} with all images; correct it'):
        pairs = json.loads(read_file(folder.files["dataset.json"]))["labels"]
        if pairs is None:
            return None
        table = dict(pairs)
        return check_labels(path, [table[name] for name in names], len(names))


# ----------------------------------------------------------------------------- idx and CIFAR-10
def read_idx(folder: Folder) -> dict[str, Images]:
    """The splits in idx files, MNIST's format."""
    parts = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        if any(name.startswith(prefix) for name in folder.files):
            pixels = idx_array(folder, f"{prefix}-images")
            labels = idx_array(folder, f"{prefix}-labels")
            parts[split] = array_images(folder.path, pixels, labels)
    return parts


def idx_array(folder: Folder, stem: str) -> np.ndarray:
    """The array in the file whose name begins with `stem`, unpacked if there is also a .gz."""
    names = [name for name in folder.files if name.startswith(stem)]
    if not names:
        raise UserError(f"{folder.path} has no {stem}-idx file beside the others; add it")
    with reading(f"{folder.path}/{names[0]}", "expected an idx file of 8-bit numbers; replace it"):
        content = read_file(folder.files[names[0]])
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        if content[:3] != b"\0\0\x08":  # two zeros and the code of uint8, then the number of axes
            raise ValueError(f"it begins with {content[:4].hex()}")
        axes = content[3]
        shape = struct.unpack_from(f">{axes}I", content, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def read_cifar(folder: Folder) -> dict[str, Images]:
    """The splits in CIFAR-10's binary batches: records of a label and an image's three planes."""
    batches = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
    parts = {}
    for split, names in batches.items():
        found = [folder.files[name] for name in names if name in folder.files]
        if not found:
            continue
        if len(found) < len(names):
            raise UserError(f"{folder.path} holds {len(found)} of CIFAR-10's {len(names)} training "
                            "batches; put the others beside them")
        with reading(folder.path, "expected CIFAR-10's binary batches; replace them"):
            content = b"".join(map(read_file, found))
            records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
        planes = records[:, 1:].reshape(-1, 3, 32, 32)
        array = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
        parts[split] = array_images(folder.path, array, records[:, 0], KNOWN["cifar10"].classes)
    if not parts:
        raise UserError(f"{folder.path} holds no binary batches of CIFAR-10; expected those of "
                        f"{CIFAR_ARCHIVE}, not the Python version, which holds code; download it")
    return parts


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
        {CIFAR_ARCHIVE: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
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
        stem = file.partition("-idx")[0]  # the user's own file may have another ending
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
    progress = Progress(f"drawing digits of {size}x{size}", num)
    array = np.empty((num, size, size, channels), np.uint8)
    for i, label in enumerate(labels):
        array[i] = draw_digit(int(label), size, channels, np.random.default_rng([seed, i]))
        progress(i + 1)
    return array_images("digits", array, labels, [str(label) for label in range(10)])
