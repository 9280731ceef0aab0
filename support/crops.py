"""Images known again and decoded once: the fingerprint of their content, and the cache of their centre crops."""
import hashlib
import json
import os
import re
import uuid
from dataclasses import replace
from functools import partial

import numpy as np

from support.cli import Progress, UserError, write_file, write_json
from support.data import Images, array_images, report_broken, spread
from support.processes import Turn, in_workers, one_at_a_time

CHUNK = 64  # images that a worker decodes at a time
SAMPLE_BYTES = 2**26  # of an array that its checksum reads
SAMPLE_FILES = 32  # that a fingerprint reads


# ------------------------------------------------------------------------------------------ fingerprint
def fingerprint(images: Images) -> dict:
    """What tells one set of images from another wherever it lies: number, names, labels and a sample of the content.

    Of files the sample is a list, with None for an image that cannot be read: it may be mended before a resume.
    """
    names = "\n".join(images.names).encode("utf-8", "surrogateescape")
    found = {"images": len(images), "names": _digest(names), "labels": None, "shape": None}
    if images.labels is not None:
        found["labels"] = _digest(np.ascontiguousarray(images.labels))
    if images.array is not None:
        return found | {"shape": list(images.array.shape[1:]), "content": [_array_digest(images.array)]}
    return found | {"content": [_file_digest(images, int(i)) for i in spread(len(images), SAMPLE_FILES)]}


def fingerprint_difference(old: dict, new: dict) -> str:
    """'' when both are fingerprints of the same images, else what differs, for an error message."""
    for key in sorted((old.keys() | new.keys()) - {"content"}):
        a, b = old.get(key), new.get(key)
        if a != b:
            digests = key in ("names", "labels") and a and b
            return f"their {key} differ" if digests else f"{key} was {a} and is {b}"
    before, now = old.get("content", []), new.get("content", [])
    pairs = zip(before, now, strict=False)
    if any(a != b and None not in (a, b) for a, b in pairs) or len(before) != len(now):
        return "the pixels of those that were looked at differ"
    return ""


def _digest(content) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _file_digest(images: Images, i: int) -> str | None:
    try:
        images.read(i)
        return _digest(images.stored(i))[:8]
    except (UserError, OSError):
        return None


def _array_digest(array: np.ndarray) -> str:
    """Of the shape and of up to SAMPLE_BYTES of the images, spread over the array."""
    digest = hashlib.sha256(str(array.shape).encode())
    for i in spread(len(array), max(16, SAMPLE_BYTES // array[0].nbytes)):
        digest.update(np.ascontiguousarray(array[i]))
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------ the cache of crops
def cache_images(images: Images, image_size: int, channels: int, folder: str, workers: int = 2) -> Images:
    """The centre crops of all usable images, stored in `folder` by the first call and memory-mapped from there.

    images-X.npy (N, size, size, C) uint8, labels-X.npy (N,) and meta.json, which names them, says what they were made
    of and holds their checksum. It is written last, so a build that was killed is done again.
    Of several processes one builds and the others wait, without a process group.
    UserError: the folder holds the crops of something else (it says what differs) or is damaged, it cannot be written,
    or more than 1% of the images are unusable.
    """
    folder = os.path.expanduser(folder)
    made_of = {"source": fingerprint(images), "enlarge": images.enlarge, "image_size": image_size, "channels": channels}
    meta = os.path.join(folder, "meta.json")
    try:
        if not os.path.exists(meta):
            os.makedirs(folder, exist_ok=True)
            with one_at_a_time(os.path.join(folder, ".lock"), f"another process fills {folder}, images") as turn:
                if not os.path.exists(meta):
                    _build_cache(folder, images, made_of, workers, turn)
        return _open_cache(folder, images, made_of)
    except OSError as error:
        raise UserError(f"cache {folder} cannot be written or read ({error}): free its disk or choose another --cache"
                        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cache {folder} is damaged ({error}): delete it, it will be built again") from None


def _build_cache(folder: str, images: Images, made_of: dict, workers: int, turn: Turn) -> None:
    """Writes the crops under names of their own, then meta.json; leaves nothing when that fails."""
    if turn.handle is not None:  # the only builder: what lies there is from one that was killed
        _remove_crops(folder, "[0-9a-f]{8}")
    token = uuid.uuid4().hex[:8]
    names = {"pixels": f"images-{token}.npy", "labels": None}
    try:
        path = os.path.join(folder, names["pixels"])
        kept = _write_crops(path, images, made_of["image_size"], made_of["channels"], workers, turn)
        labels = None
        if images.labels is not None:
            labels, names["labels"] = images.labels[kept], f"labels-{token}.npy"
            write_file(os.path.join(folder, names["labels"]), lambda file: np.save(file, labels))
        checksum = _checksum(np.load(path, mmap_mode="r"), labels)
        write_json(os.path.join(folder, "meta.json"), made_of | names | {"count": len(kept), "checksum": checksum})
    except BaseException:
        _remove_crops(folder, token)
        if not os.path.exists(os.path.join(folder, "meta.json")) and os.listdir(folder) == [".lock"]:
            os.remove(os.path.join(folder, ".lock"))
            os.rmdir(folder)
        raise


def _remove_crops(folder: str, token: str) -> None:
    for name in os.listdir(folder):
        if re.match(rf"(images|labels)-{token}\.npy($|\..*\.tmp$)", name):
            os.remove(os.path.join(folder, name))


def _open_cache(folder: str, images: Images, made_of: dict) -> Images:
    with open(os.path.join(folder, "meta.json")) as file:
        meta = json.load(file)
    if not isinstance(meta, dict) or not {*made_of, "pixels", "labels", "count", "checksum"} <= meta.keys():
        raise UserError(f"cache {folder}: its meta.json is of another program or version: choose another --cache")
    differs = [f"{k} {meta[k]!r} instead of {v!r}" for k, v in made_of.items() if k != "source" and meta[k] != v]
    difference = fingerprint_difference(meta["source"], made_of["source"])
    differs += [difference] if difference else []
    if differs:
        raise UserError(f"cache {folder} was built from other images ({'; '.join(differs)}): "
                        "choose another --cache or delete it")
    pixels = np.load(os.path.join(folder, os.path.basename(meta["pixels"])), mmap_mode="r")
    labels = None
    if images.labels is not None:
        labels = np.load(os.path.join(folder, os.path.basename(meta["labels"])))
    if len(pixels) != meta["count"]:
        raise ValueError(f"{len(pixels)} images instead of {meta['count']}")
    if _checksum(pixels, labels) != meta["checksum"]:
        raise ValueError("its checksum differs")
    return replace(array_images(folder, pixels, labels, images.classes), test=images.test)


def _checksum(pixels: np.ndarray, labels: np.ndarray | None) -> str:
    return _array_digest(pixels) + ("" if labels is None else _digest(np.ascontiguousarray(labels)))


def _read_chunk(images: Images, image_size: int, channels: int, start: int):
    """The usable ones of CHUNK images from `start` on: crops (n, size, size, C), their indices; the others' errors."""
    crops, good, errors = [], [], []
    for i in range(start, min(start + CHUNK, len(images))):
        try:
            crops.append(images.read(i, image_size, channels))
            good.append(i)
        except UserError as error:
            errors.append(error)
    return np.stack(crops) if crops else np.zeros(0, np.uint8), good, errors


def _write_crops(path: str, images: Images, image_size: int, channels: int, workers: int, turn: Turn) -> list[int]:
    """Writes the crops of the usable images to `path` (.npy), returns their indices."""
    kept: list[int] = []

    def header(file) -> None:  # numpy leaves room for a longer first axis: it can be written again when N is known
        shape = (len(kept), image_size, image_size, channels)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})

    def write(file) -> None:  # plain writes: a full disk makes them an error, but kills who writes to a mapped file
        header(file)
        broken, total = 0, len(images)
        progress = Progress("caching images", total)
        read = partial(_read_chunk, images, image_size, channels)
        for crops, indices, errors in in_workers(read, range(0, total, CHUNK), workers):
            file.write(np.asarray(crops).tobytes())
            kept.extend(indices)
            for error in errors:
                broken += 1
                report_broken(error, broken, total)
            progress(len(kept) + broken)
            turn.report(len(kept) + broken, total)
        if not kept:
            raise UserError(f"{images.path}: none of {total} images can be used: check --data")
        file.seek(0)
        header(file)

    write_file(path, write)
    return kept
