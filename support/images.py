"""Data: folders, .zip and .npz as RGB images; centre crop; hold-out; a cache of crops; batches that depend on the step alone."""

import atexit
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import signal
import struct
import sys
import threading
import time
import warnings
import zipfile
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from farmer import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
warnings.filterwarnings("ignore", module="PIL")  # damaged EXIF and the like, at every such file; what stops an image from being read raises
warnings.filterwarnings("ignore", message="This DataLoader will create")  # two decoders beside one core are as good as one
INDEX_FROM = 10_000  # files; a smaller folder is listed faster than its index is worth
MAP_FROM = 2**28  # bytes; a smaller array is read, and its checksum with it


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB, upright by its EXIF orientation; 16-bit grey is divided by 256, transparency shows white."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise UserError("holds floating-point pixels of unknown range; expected 8 or 16 bits: convert it first")
    if image.mode.startswith("I"):  # 16-bit grey (in 32-bit integers for .pgm); Pillow's own convert() would clip it at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.has_transparency_data:  # convert("RGB") alone would uncover whatever colours lie under the transparent parts
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int, enlarge: bool = False) -> Image.Image:
    """The central size x size pixels as ADM cuts them: box halvings while the short side is >= 2 size, then bicubic to size.

    ADM enlarges smaller images without a word; here that takes `enlarge`, and without it they are a UserError.
    """
    if image.size == (size, size):
        return image
    if min(image.size) < size and not enlarge:
        raise UserError(f"is {image.width}x{image.height} pixels, smaller than image_size {size}: remove it, lower image_size or pass --enlarge")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


@dataclass(eq=False)
class Images:
    """The images of one source in a fixed order: by name for files, as stored for arrays. Picklable, and safe in forked workers."""

    path: str
    names: list[str]
    labels: np.ndarray | None = None  # (N,) int64
    classes: list[str] | None = None  # label -> folder name
    array: np.ndarray | None = None  # (N, H, W, C) uint8, C 1 or 3, when the pixels are at hand
    enlarge: bool = False  # bring images smaller than the crop up to it
    zip: tuple[int, zipfile.ZipFile] | None = None  # (process, handle): a handle shared over a fork would share its file position

    def __len__(self):
        return len(self.names)

    def __getstate__(self):  # a memory-mapped array travels as its place in its file
        a = self.array
        array = (a.filename, a.dtype, "r", a.offset, a.shape) if isinstance(a, np.memmap) else a
        return self.__dict__ | {"zip": None, "array": array}

    def __setstate__(self, state):
        self.__dict__.update(state)
        if isinstance(self.array, tuple):
            self.array = np.memmap(*self.array)

    def open(self, i: int) -> Image.Image:
        """Image i, its pixels not yet decoded."""
        if self.array is not None:
            pixels = self.array[i]
            return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        if not self.path.lower().endswith(".zip"):
            return Image.open(os.path.join(self.path, self.names[i]))
        if self.zip is None or self.zip[0] != os.getpid():
            self.zip = os.getpid(), zipfile.ZipFile(self.path)
        return Image.open(io.BytesIO(self.zip[1].read(self.names[i])))

    def read(self, i: int, size: int | None = None, channels: int = 3, decode: bool = True) -> np.ndarray | None:
        """Image i as uint8 RGB (H, W, 3), or with `size` its centre crop (size, size, channels), 1 channel being luminance.

        A broken, vanished or too small image is a UserError that names it; decode=False finds only what header and PNG checksums tell.
        """
        try:
            with self.open(i) as image:
                if not decode:
                    center_crop(Image.new("1", image.size), size, self.enlarge)
                    return image.verify()
                if size:  # libjpeg then decodes at 1/2, 1/4 or 1/8 where that leaves both sides >= 2 size: one box halving is still ours
                    image.draft("RGB", (2 * size, 2 * size))
                rgb = to_rgb(image)
            rgb = center_crop(rgb, size, self.enlarge) if size else rgb
            return np.array(rgb) if channels == 3 else np.array(rgb.convert("L"))[..., None]
        except Exception as error:  # Pillow raises nearly every type there is on random bytes
            why = error if isinstance(error, UserError) else f"cannot be read as an image ({type(error).__name__}: {error}): replace or remove it"
            raise UserError(f"{os.path.join(self.path, self.names[i])} {why}".replace("\n", " ")) from None

    __getitem__ = read


def open_images(path: str, enlarge: bool = False) -> Images:
    """The images at `path`; a UserError when there are none, or when they are not as follows.

    A folder: the class of an image is the first-level sub-folder it is in, at any depth; with no images in sub-folders the set is flat (labels None).
    A .zip: the same, after a top folder common to all images is taken off. Hidden files and __MACOSX are ignored in both.
    An .npz: `images` or `arr_0` (N, H, W) or (N, H, W, C) uint8, and optional integer `labels` or `arr_1` (N,).
    """
    path = os.path.abspath(os.path.expanduser(path))
    names, expected = [], "expected a folder or .zip of images (flat or one folder per class) or an .npz with uint8 `images`: check the path"
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist; {expected}")
    try:
        if os.path.isdir(path):
            names = _folder_names(path)
        elif path.lower().endswith(".zip"):
            with zipfile.ZipFile(path) as handle:
                names = [name for name in handle.namelist() if _is_image(name)]
        elif path.lower().endswith(".npz"):
            with np.load(path, allow_pickle=False) as file:
                for images, labels in (("images", "labels"), ("arr_0", "arr_1")):  # ours, and ADM's sample files
                    if images in file:
                        return array_images(path, _npz_array(path, file, images), file[labels] if labels in file else None, enlarge=enlarge)
    except UserError:
        raise
    except Exception as error:  # as many types as there are ways to damage a .zip or .npz
        raise UserError(f"{path} cannot be opened ({type(error).__name__}: {error}); {expected}".replace("\n", " ")) from None
    if not names:
        raise UserError(f"{path} holds no images; {expected}")
    names.sort()
    tops = {name.split("/")[0] if "/" in name else "" for name in names}
    top = int(path.lower().endswith(".zip") and len(tops) == 1 and tops != {""})  # 1: the class is the second part of a name
    folders = [name.split("/")[top] if name.count("/") > top else "" for name in names]
    classes = sorted(set(folders))
    if classes == [""]:
        return Images(path, names, enlarge=enlarge)
    if classes[0] == "":
        raise UserError(f"{path} has {names[folders.index('')]} beside folders of images; expected all images in class folders, or none: move it")
    label = {name: i for i, name in enumerate(classes)}
    return Images(path, names, np.array([label[folder] for folder in folders]), classes, enlarge=enlarge)


def _npz_array(path: str, file: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    """One array of an .npz, memory-mapped when it is large and not compressed: 50,000 images of 256x256 are 9.2 GiB."""
    info = file.zip.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size < MAP_FROM:
        return file[name]
    with open(path, "rb") as raw:
        raw.seek(info.header_offset + 26)  # the lengths of the member's name and extra field, which its data follow
        raw.seek(sum(struct.unpack("<HH", raw.read(4))), os.SEEK_CUR)
        version = np.lib.format.read_magic(raw)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(raw) if version == (1, 0) else (None, True, None)
        return file[name] if fortran else np.memmap(path, dtype, "r", raw.tell(), shape)


def array_images(path: str, array: np.ndarray, labels: np.ndarray | None, classes: list[str] | None = None, enlarge: bool = False) -> Images:
    """Images from an array (N, H, W) or (N, H, W, C) uint8 with labels (N,); UserError when they are anything else. `path` is named in errors."""
    array = array[..., None] if array.ndim == 3 else array
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] not in (1, 3) or 0 in array.shape:
        nan = f" with {(~np.isfinite(array)).sum()} values that are not finite" if array.dtype.kind == "f" and not np.isfinite(array).all() else ""
        raise UserError(f"{path}: images are {array.dtype} {array.shape}{nan}; expected uint8 (N, H, W) or (N, H, W, C), C 1 or 3, N > 0: convert them")
    if labels is not None:
        if labels.dtype.kind not in "iu" or labels.shape != array.shape[:1] or labels.min() < 0:
            raise UserError(f"{path}: labels are {labels.dtype} {labels.shape}; expected {len(array)} integers >= 0, one per image: correct the file")
        labels = labels.astype(np.int64)
    return Images(path, [f"image {i}" for i in range(len(array))], labels, classes, array, enlarge)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _folder_names(root: str) -> list[str]:
    """Relative names of all images under `root`. A long listing is kept in ~/.cache/farmer until the time stamp of any folder in it changes."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    index = os.path.join(cache, "farmer", f"index-{hashlib.sha256(os.fsencode(root)).hexdigest()[:24]}.json")
    try:
        with open(index) as file:
            known = json.load(file)
        if known["root"] == root and all(os.stat(os.path.join(root, f)).st_mtime_ns == t for f, t in known["folders"].items()):
            return [str(name) for name in known["names"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # none, stale or damaged: list anew
    names, folders, todo = [], {}, [""]
    while todo:
        folder = todo.pop()
        folders[folder] = os.stat(os.path.join(root, folder)).st_mtime_ns
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                if entry.is_dir() and not (entry.name.startswith(".") or entry.name == "__MACOSX"):
                    todo.append(f"{folder}{entry.name}/")
                elif _is_image(entry.name):
                    names.append(folder + entry.name)
    if len(names) >= INDEX_FROM and max(folders.values()) < time.time_ns() - 2e9:  # a folder just changed may do so again in the same tick
        try:
            os.makedirs(os.path.dirname(index), exist_ok=True)
            _write_json(index, {"root": root, "folders": folders, "names": names})
        except OSError:
            pass  # an index is a convenience
    return names


def _write_json(path: str, value: dict):
    with open(f"{path}.{os.getpid()}", "w") as file:
        json.dump(value, file)
    os.replace(file.name, path)


def hold_out(images: Images, per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, validation), ascending: validation is the last `per_class` images of each class, or of the whole set when it has no labels."""
    labels = np.zeros(len(images), np.int64) if images.labels is None else images.labels
    found, counts = np.unique(labels, return_counts=True)
    if not 0 <= per_class < counts.min():
        few = found[counts.argmin()]
        few = f"class {images.classes[few] if images.classes else few}" if images.labels is not None else "the set"
        raise UserError(f"cannot hold out {per_class} images per class: {few} has {counts.min()}; expected 0 to {counts.min() - 1}")
    held = np.zeros(len(images), bool)
    for group in np.split(np.argsort(labels, kind="stable"), counts.cumsum()[:-1]):
        held[group[len(group) - per_class :]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def _report_broken(error: UserError, count: int, total: int):
    """Name an unusable image on stderr; a UserError if that makes more than 1% of `total`, one being always allowed."""
    if count > max(1, total // 100):
        raise UserError(f"{count} of {total} images cannot be used, more than 1%; the last: {error}")
    print(f"skipped {error} ({count} of {total})", file=sys.stderr, flush=True)


def check_images(images: Images, image_size: int, limit: int = 10_000) -> list[str]:
    """A look before a run at the headers of up to `limit` images spread over the set: names the unusable on stderr and returns their errors.

    More than 1% of those looked at is a UserError. What only decoding shows, such as a truncated JPEG, ImageDataset meets later.
    """
    errors, look_at = [], np.linspace(0, len(images) - 1, min(limit, len(images))).astype(np.int64)
    for i in look_at:
        try:
            images.read(i, image_size, decode=False)
        except UserError as error:
            errors.append(str(error))
            _report_broken(error, len(errors), len(look_at))
    return errors


class ImageDataset(torch.utils.data.Dataset):
    """Item i: (uint8 (C, H, W), int label, 0 in a set without labels).

    An image that cannot be used is named once on stderr and the next one stands in for it; more than 1% of them (one is always allowed) is a
    UserError. Each worker process counts those it has met. The stand-in depends on the files alone, so batches are the same for any workers.
    """

    def __init__(self, images: Images, image_size: int, channels: int):
        if channels not in (1, 3):
            raise UserError(f"channels is {channels}; expected 1 (grey) or 3 (RGB)")
        self.images, self.image_size, self.channels = images, image_size, channels
        self.labels = np.zeros(len(images), np.int64) if images.labels is None else images.labels
        self.ready = images.array is not None and images.array.shape[1:] == (image_size, image_size, channels)
        self.broken: set[int] = set()
        if images.array is not None:
            images.read(0, image_size)  # one size for all: if this is too small, so are they

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.usable(range(len(self)), i)

    def usable(self, indices, k: int) -> tuple[torch.Tensor, int]:
        """Item indices[k], or the first usable one after it: of `indices`, so that no held-out image stands in for a training image."""
        for step in range(len(indices)):
            i = int(indices[(k + step) % len(indices)])
            if i in self.broken:
                continue
            try:
                pixels = self.images.read(i, self.image_size, self.channels)
                return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), int(self.labels[i])
            except UserError as error:
                self.broken.add(i)
                _report_broken(error, len(self.broken), len(self))
        raise UserError(f"{self.images.path}: none of {len(indices)} images can be used: check --data")

    def batch(self, indices, k=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Items indices[k], all for k None: images uint8 (b, C, H, W), labels int64 (b,)."""
        indices = np.asarray(indices)
        k = np.arange(len(indices)) if k is None else k
        if self.ready:
            i = indices[k]  # in numpy: torch would wake its threads for each little copy, 30 times slower when the cores are busy
            return torch.from_numpy(self.images.array[i].transpose(0, 3, 1, 2).copy()), torch.from_numpy(self.labels[i])
        images, labels = zip(*(self.usable(indices, int(j)) for j in k), strict=True)
        return torch.stack(images), torch.tensor(labels)


class _Calls(torch.utils.data.Dataset):
    """Lets a DataLoader compute work(x). A UserError comes back as a value: raised in a worker, it would bring two tracebacks along."""

    def __init__(self, work):
        self.work = work

    def __getitem__(self, x):
        try:
            return self.work(x)
        except UserError as error:
            return error


def _start_worker(_):
    for number in (signal.SIGINT, signal.SIGTERM):  # both may reach the whole process group: the main process saves, then ends its workers
        signal.signal(number, signal.SIG_IGN)


def in_workers(work, todo, workers: int):
    """work(x), or the UserError it raised, for x in `todo` (maybe endless), in order, made ahead by `workers` processes (0: here, on demand).

    A worker that dies is a UserError within seconds. Workers are forked where that is at home: they start at once and share `work` without
    pickling it. That is safe beside training threads and CUDA because they compute on one thread (DataLoader sees to it) and never touch a GPU.
    """
    if not workers:
        yield from map(_Calls(work).__getitem__, todo)
        return
    how = {"multiprocessing_context": "fork" if sys.platform == "linux" else None, "worker_init_fn": _start_worker}
    others, before = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
    try:
        results = iter(torch.utils.data.DataLoader(_Calls(work), batch_size=None, sampler=todo, num_workers=workers, **how))
        for worker in multiprocessing.active_children():
            if worker not in others:
                atexit.register(worker.kill)  # Python would send SIGTERM and wait for ever
        if threading.current_thread() is threading.main_thread():  # DataLoader's handler would raise wherever training is, even in a save;
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)  # without it, next() finds a dead worker within 5 seconds
        yield from results
    except (RuntimeError, OSError, EOFError) as error:
        why = str(error).split("\n")[0] or type(error).__name__
        if why.startswith("Caught "):
            raise  # a bug in `work`, with its traceback
        advice = "was it killed, or is memory or /dev/shm full? Try fewer --workers, then --resume"
        raise UserError(f"a data worker ended ({why}): {advice}") from None
    finally:
        for worker in multiprocessing.active_children():
            if worker not in others:
                worker.kill()
                worker.join(1)


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order (n,) int64 of epoch `epoch`: a permutation that depends on nothing but the arguments."""
    return np.random.default_rng([seed, epoch]).permutation(n)


@lru_cache(maxsize=2)
def _epoch(n: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Order (n,) and coins (n,) bool for the mirroring, by place in the epoch."""
    return epoch_order(n, seed, epoch), np.random.default_rng([seed, epoch, 1]).random(n) < 0.5


def _step_batch(dataset, indices, seed, flip, global_batch, rank, b, step):
    uid = step * global_batch + rank * b + np.arange(b)
    epoch, place = np.divmod(uid, len(indices))
    drawn = [[values[place[epoch == e]] for values in _epoch(len(indices), seed, int(e))] for e in np.unique(epoch)]
    k, heads = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    images, labels = dataset.batch(indices, k)
    if flip:
        images.numpy()[heads] = images.numpy()[heads, ..., ::-1]
    return images, labels, torch.from_numpy(uid)


def batches(dataset, indices, *, global_batch, start_step, seed, rank=0, world=1, workers=2, flip=False):
    """Endless iterator from `start_step` on over (images uint8 (b, C, H, W), labels int64 (b,), uid int64 (b,)), b = global_batch / world.

    Sample g = step * global_batch + j is number g % n in the order of epoch g // n, so no epoch's end is dropped; rank r takes j in [r b, (r+1) b);
    uid is g. Images, order and mirroring (`flip`: half of the samples) depend on seed and g alone, whatever the start, workers and world.
    """
    if global_batch < 1 or global_batch % world:
        raise UserError(f"global batch is {global_batch}; expected a positive multiple of the {world} processes: change --batch-size")
    if not len(indices):
        raise UserError(f"{dataset.images.path}: no images to train on; expected at least 1")
    array = dataset.images.array
    if dataset.ready and (not isinstance(array, np.memmap) or array.nbytes < 2**30):
        workers = 0  # indexing an array is faster than another process; a large mapped file may wait for the disk, so it is read ahead
    work = partial(_step_batch, dataset, np.asarray(indices), seed, flip, global_batch, rank, global_batch // world)
    for batch in in_workers(work, itertools.count(start_step), workers):
        if isinstance(batch, UserError):
            raise batch
        yield tuple(batch)


def cache_images(images: Images, image_size: int, channels: int, dir: str, workers: int = 2) -> Images:
    """The centre crops of all usable images, stored in `dir` by the first call and memory-mapped from there (one process builds, others wait).

    images.npy (N, size, size, C) uint8, labels.npy (N,), meta.json; the last is written last, so a build that was killed is done again.
    UserError: `dir` holds the crops of something else (it says what differs), cannot be written, is full, or > 1% of the images are unusable.
    """
    key = {"source": images.path, "modified": os.stat(images.path).st_mtime_ns if os.path.isfile(images.path) else 0, "images": len(images)}
    key |= {"names": hashlib.sha256("/".join(images.names).encode("utf-8", "surrogateescape")).hexdigest()[:16], "enlarge": images.enlarge}
    key |= {"image_size": image_size, "channels": channels}
    pixels, labels, meta = (os.path.join(dir, name) for name in ("images.npy", "labels.npy", "meta.json"))
    try:
        if not os.path.exists(meta):
            os.makedirs(dir, exist_ok=True)
            kept = _write_crops(pixels, images, image_size, channels, workers)
            if images.labels is not None:
                np.save(labels, images.labels[kept])
            _write_json(meta, key)
        with open(meta) as file:
            found = json.load(file)
        differs = [f"{name} {found.get(name)!r} instead of {value!r}" for name, value in key.items() if found.get(name) != value]
        if differs:
            raise UserError(f"cache {dir} was built from other images ({'; '.join(differs)}): choose another --cache or delete it")
        return array_images(dir, np.load(pixels, mmap_mode="r"), None if images.labels is None else np.load(labels), images.classes)
    except OSError as error:
        raise UserError(f"cache {dir} cannot be written or read ({error}): free its disk or choose another --cache") from None
    except (ValueError, AttributeError, EOFError) as error:
        raise error if isinstance(error, UserError) else UserError(f"cache {dir} is damaged ({error}): delete it, it will be built again") from None


def _read_chunk(images, image_size, channels, start):
    """The usable ones of 64 images from `start` on: crops (n, size, size, C), their indices; and the errors of the others."""
    indices, read = range(start, min(start + 64, len(images))), _Calls(partial(images.read, size=image_size, channels=channels))
    results = {i: read[i] for i in indices}
    good = [i for i in indices if not isinstance(results[i], UserError)]
    crops = np.stack([results[i] for i in good]) if good else np.zeros(0, np.uint8)
    return crops, good, [results[i] for i in indices if i not in good]


def _write_crops(path, images, image_size, channels, workers) -> list[int]:
    """Write the crops of the usable images to `path` (.npy), return their indices."""
    kept, broken, told = [], 0, time.monotonic()
    try:
        with open(path + ".part", "wb") as file:
            def header():  # numpy leaves room for a longer first axis, so it can be written again when N is known
                shape = (len(kept), image_size, image_size, channels)
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})

            header()  # then plain writes: a full disk makes them an error, but kills a process that writes to a mapped file
            for crops, indices, errors in in_workers(partial(_read_chunk, images, image_size, channels), range(0, len(images), 64), workers):
                kept += indices
                file.write(np.asarray(crops).tobytes())
                for error in errors:
                    broken += 1
                    _report_broken(error, broken, len(images))
                if time.monotonic() > told + 10:
                    told = time.monotonic()
                    print(f"caching images: {len(kept) + broken} of {len(images)}", file=sys.stderr, flush=True)
            if not kept:
                raise UserError(f"{images.path}: none of {len(images)} images can be used: check --data")
            file.seek(0)
            header()
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
        return kept
    finally:
        if os.path.exists(path + ".part"):  # do not leave a full disk full
            os.remove(path + ".part")


# ---------------------------------------------------------------------------------------------------------------------- built-in digits
def draw_digit(label: int, size: int, channels: int, rng: np.random.Generator) -> np.ndarray:
    """A light digit on a dark ground with random colours, height, place and slant -> uint8 (size, size, channels)."""
    big = 4 * size
    ink, ground = (tuple(rng.integers(low, high, 3).tolist()) for low, high in ((150, 256), (0, 90)))
    picture = Image.new("RGB", (big, big), ground)
    font = ImageFont.load_default(int(big * rng.uniform(0.8, 1.0)))
    place = big / 2 + big * rng.uniform(-0.06, 0.06, 2)
    ImageDraw.Draw(picture).text(tuple(place), str(label), font=font, fill=ink, anchor="mm", stroke_width=big // 32, stroke_fill=ink)
    picture = picture.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC, fillcolor=ground).resize((size, size), Image.Resampling.BOX)
    return np.asarray(picture if channels == 3 else picture.convert("L")).reshape(size, size, channels)


@lru_cache(maxsize=4)
def digits(n: int, size: int, channels: int, seed: int) -> Images:
    """n digits, classes in turn; image i depends on (seed, i) alone. Training uses seed 0, validation seed 1."""
    labels = np.arange(n) % 10
    array = np.stack([draw_digit(int(y), size, channels, np.random.default_rng([seed, i])) for i, y in enumerate(labels)])
    return array_images("digits", array, labels, [str(y) for y in range(10)])
