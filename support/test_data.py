"""Data: sources, splits, downloads, crops, batches, the cache: each claim as a test on small files made here. Offline.

    pytest -q support/test_data.py
"""
import gzip
import hashlib
import http.server
import io
import itertools
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import socket
import struct
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from support import crops, data, datasets, loader, processes
from support.cli import UserError
from support.crops import cache_images, fingerprint, fingerprint_difference
from support.data import Images, center_crop, dequantize, digits, image_generators, open_images, quantize
from support.loader import ImageDataset, batches, check_images, hold_out, open_split


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    """No test sees the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache home"))


# ------------------------------------------------------------------------------------------ images
def picture(seed, w=10, h=8, mode="RGB"):
    """A smooth picture, different for each seed."""
    y, x = np.mgrid[:h, :w]
    red, green = 128 + 100 * np.sin(seed + x / 3), 128 + 100 * np.cos(seed * 2 + y / 4)
    rgb = np.stack([red, green, 20 * (seed % 12) + x + y], -1)
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """Two classes of 6 and 5 images 8 x 8, one of them a level deeper, with files to ignore."""
    root = tmp_path / "set"
    for i in range(11):
        path = root / ("ape" if i < 6 else "bee") / ("deep" if i == 3 else "") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, 8, 8).save(path)
    (root / "ape" / ".hidden.png").write_bytes(b"no image")
    (root / "__MACOSX").mkdir()
    (root / "__MACOSX" / "x.png").write_bytes(b"no image")
    (root / "ape" / "notes.txt").write_text("no image")
    return root


def zip_of(root, path, prefix=""):
    with zipfile.ZipFile(path, "w") as file:
        for name in sorted(root.rglob("*"), reverse=True):  # the order in the file must not matter
            if name.is_file():
                file.write(name, prefix + name.relative_to(root).as_posix())
    return path


def pixels(images, size=8, channels=3):
    return ImageDataset(images, size, channels).batch(range(len(images)))[0].numpy()


def message(call, *args, **kwargs):
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_folder_zip_npz_hold_the_same(folder, tmp_path, monkeypatch):
    images = open_images(str(folder))
    assert images.names[:4] == ["ape/00.png", "ape/01.png", "ape/02.png", "ape/04.png"]
    assert images.names[5] == "ape/deep/03.png" and images.classes == ["ape", "bee"]
    assert images.labels.tolist() == [0] * 6 + [1] * 5 and images.labels.dtype == np.int64
    expected = np.stack([np.asarray(Image.open(folder / name)) for name in images.names])
    for prefix in ("", "train/"):
        zipped = open_images(str(zip_of(folder, tmp_path / "set.zip", prefix)))
        assert [prefix + name for name in images.names] == zipped.names and zipped.classes == images.classes
        np.testing.assert_array_equal(zipped.labels, images.labels)
        np.testing.assert_array_equal(pixels(zipped), expected.transpose(0, 3, 1, 2))
    np.savez(tmp_path / "set.npz", images=expected, labels=images.labels.astype(np.uint8))
    np.savez(tmp_path / "adm.npz", expected, images.labels)
    for name in ("set.npz", "adm.npz"):
        packed = open_images(str(tmp_path / name))
        np.testing.assert_array_equal(packed.labels, images.labels)
        np.testing.assert_array_equal(pixels(packed), pixels(images))
    monkeypatch.setattr(data, "MAP_FROM", 1)  # large and not compressed: stays on disk, in a worker too
    np.savez_compressed(tmp_path / "small.npz", images=expected, labels=images.labels)
    np.savez(tmp_path / "turned.npz", images=np.asfortranarray(expected), labels=images.labels)
    for name, mapped in (("set.npz", True), ("adm.npz", True), ("small.npz", False), ("turned.npz", False)):
        for packed in (opened := open_images(str(tmp_path / name)), pickle.loads(pickle.dumps(opened))):
            assert isinstance(packed.array, np.memmap) == mapped, name
            np.testing.assert_array_equal(pixels(packed), pixels(images))
    np.testing.assert_array_equal(images[2], expected[2])
    item, label = ImageDataset(images, 8, 3)[7]
    np.testing.assert_array_equal(item, expected[7].transpose(2, 0, 1))
    assert label == 1


def test_flat_sets_have_no_labels(folder, tmp_path):
    flat = open_images(str(folder / "bee"))
    assert len(flat) == 5 and flat.labels is None and flat.classes is None and ImageDataset(flat, 8, 3)[0][1] == 0
    for prefix in ("", "bee/"):
        zipped = open_images(str(zip_of(folder / "bee", tmp_path / "flat.zip", prefix)))
        assert zipped.labels is None and len(zipped) == 5
    picture(0).save(folder / "stray.png")
    assert "stray.png" in message(open_images, str(folder))


def test_modes_become_right_rgb(tmp_path):
    def read(image, name, **options):
        image.save(tmp_path / name, **options)
        return Images(str(tmp_path), [name]).read(0).astype(int)

    rgb, grey = np.asarray(picture(3)).astype(int), np.asarray(picture(3, mode="L")).astype(int)
    np.testing.assert_array_equal(read(picture(3), "rgb.png"), rgb)
    np.testing.assert_array_equal(read(picture(3, mode="L"), "grey.png"), grey[..., None].repeat(3, -1))
    palette = picture(3).quantize(16)
    np.testing.assert_array_equal(read(palette, "palette.png"), np.asarray(palette.convert("RGB")))
    index = np.asarray(palette)
    seen = np.where((index == 5)[..., None], 255, np.asarray(palette.convert("RGB")))
    assert (index == 5).any()
    np.testing.assert_array_equal(read(palette, "holes.png", transparency=5), seen)
    clear = picture(3).convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(np.arange(10) < 5, 0, 255).astype(np.uint8)[None].repeat(8, 0)))
    np.testing.assert_array_equal(read(clear, "rgba.png"), np.where((np.arange(10) < 5)[None, :, None], 255, rgb))
    np.testing.assert_array_equal(read(clear.convert("LA"), "la.png")[:, :5], 255)
    wide = (np.arange(80).reshape(8, 10) * 800).astype(np.uint16)  # to 63,200
    for name in ("wide.png", "wide.tif", "wide.pgm"):
        np.testing.assert_array_equal(read(Image.fromarray(wide), name), (wide // 256)[..., None].repeat(3, -1))
    bits = picture(3, mode="1")
    np.testing.assert_array_equal(read(bits, "bits.png")[..., 1], np.asarray(bits) * 255)
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert abs(read(red, "cmyk.jpg", quality=95) - [255, 0, 0]).max() < 12
    turned = Image.Exif()
    turned[274] = 6  # the camera was held on its side
    np.testing.assert_array_equal(read(picture(3), "turned.png", exif=turned), np.rot90(rgb, -1))
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "float.tif")
    assert "float.tif" in message(Images(str(tmp_path), ["float.tif"]).read, 0)
    np.testing.assert_array_equal(Images(str(tmp_path), ["grey.png"]).read(0, 8, 1)[..., 0], grey[:, 1:9])


def bicubic_weights(n_in, n_out):
    """(n_out, n_in) matrix of an antialiased bicubic (a = -1/2) reduction, written from the kernel's formula."""
    scale = n_in / n_out
    x = np.abs((np.arange(n_in)[None] + 0.5 - (np.arange(n_out)[:, None] + 0.5) * scale) / scale)
    w = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
    return w / w.sum(1, keepdims=True)


@pytest.mark.parametrize("w, h", [(100, 72), (70, 150), (41, 33), (64, 64), (32, 90)])
def test_crop_is_adms(w, h):
    noise = np.random.default_rng(0).integers(0, 60, (h, w))  # so that the filters differ
    image = Image.fromarray((60 + np.arange(w) + 0.3 * np.arange(h)[:, None] + noise).clip(0, 210).astype(np.uint8))
    a = np.asarray(image).astype(float)
    while min(a.shape) >= 64:  # halve with a 2 x 2 mean
        a = a[: a.shape[0] // 2 * 2, : a.shape[1] // 2 * 2]
        a = (a[::2, ::2] + a[1::2, ::2] + a[::2, 1::2] + a[1::2, 1::2]) / 4
    rows, columns = (round(n * 32 / min(a.shape)) for n in a.shape)
    a = bicubic_weights(a.shape[0], rows) @ a @ bicubic_weights(a.shape[1], columns).T
    top, left = (rows - 32) // 2, (columns - 32) // 2
    crop = center_crop(image, 32)
    assert crop.size == (32, 32)
    assert np.abs(np.asarray(crop) - a[top : top + 32, left : left + 32].clip(0, 255)).max() <= 2


def test_crop_small_images(tmp_path):
    exact = picture(0, 16, 16)
    assert center_crop(exact, 16) is exact
    assert center_crop(picture(0, 10, 8), 16, enlarge=True).size == (16, 16)
    picture(0, 30, 12).save(tmp_path / "small.png")
    text = message(open_images(str(tmp_path)).read, 0, 16)
    assert "small.png" in text and "30x12" in text and "16" in text
    assert open_images(str(tmp_path), enlarge=True).read(0, 16).shape == (16, 16, 3)
    np.savez(tmp_path / "small.npz", images=np.zeros((3, 8, 8), np.uint8))
    assert "8x8" in message(ImageDataset, open_images(str(tmp_path / "small.npz")), 16, 3)


def test_jpeg_draft_is_close_and_used(tmp_path, monkeypatch):
    picture(2, 640, 400).save(tmp_path / "a.jpg", quality=95)
    images = open_images(str(tmp_path))
    sizes = []
    monkeypatch.setattr(data, "to_rgb", lambda image, to_rgb=data.to_rgb: sizes.append(image.size) or to_rgb(image))
    fast = images.read(0, 32).astype(int)
    whole = np.asarray(center_crop(Image.open(tmp_path / "a.jpg"), 32)).astype(int)
    assert sizes == [(160, 100)]  # 1/4: at 1/8 the short side, 50, would be below 2 * 32
    assert abs(fast - whole).max() <= 6 and abs(fast - whole).mean() < 1


def spoil(folder):
    """Break 3 of the 11 images in 3 ways."""
    path = folder / "ape" / "01.png"
    path.write_bytes(path.read_bytes()[:-60])
    (folder / "ape" / "04.png").write_bytes(b"")
    (folder / "bee" / "08.png").unlink()


def test_broken_images_are_named_and_replaced(folder, capfd):
    for i in range(200):
        picture(i, 8, 8).save(folder / "bee" / f"more{i:03}.png")
    images = open_images(str(folder))
    good = pixels(images)
    (folder / "ape" / "02.png").write_bytes(b"")
    (folder / "bee" / "more199.png").write_bytes((folder / "bee" / "more199.png").read_bytes()[:80])
    dataset = ImageDataset(images, 8, 3)
    for _ in range(2):
        np.testing.assert_array_equal(dataset[2][0], good[3])
        np.testing.assert_array_equal(dataset[210][0], good[0])
    np.testing.assert_array_equal(dataset.batch([1, 2, 9])[0], good[[1, 9, 9]])  # the stand-in is one of the indices
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and "ape/02.png" in lines[0] and "(1 of 211)" in lines[0] and "more199.png" in lines[1]
    (folder / "ape" / "00.png").unlink()
    text = message(dataset.batch, range(10))  # a third: 1.4%
    assert "ape/00.png" in text and "3 of 211" in text and "1%" in text


def test_one_broken_image_is_always_allowed(folder):
    (folder / "ape" / "04.png").write_bytes(b"")
    assert len(pixels(open_images(str(folder)))) == 11
    spoil(folder)
    assert "2 of 10" in message(pixels, open_images(str(folder)))
    (folder / "bee" / "08.png").write_bytes(b"")
    text = message(ImageDataset(open_images(str(folder)), 8, 3).batch, [8])
    assert "none of 1" in text


def test_check_looks_ahead(folder, capfd):
    images = open_images(str(folder))
    assert check_images(images, 8) == []
    (folder / "bee" / "08.png").unlink()
    assert len(check_images(images, 8)) == 1 and "bee/08.png" in capfd.readouterr().err
    assert check_images(images, 8, limit=2) == []
    picture(8, 8, 8).save(folder / "bee" / "08.png")
    raw = bytearray((folder / "bee" / "08.png").read_bytes())
    raw[60] ^= 1  # the header is whole, a checksum is not
    (folder / "bee" / "08.png").write_bytes(raw)
    assert len(check_images(images, 8)) == 1
    assert "2 of 11" in message(check_images, images, 16)  # all are 8 x 8


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".tif"])
def test_random_bytes_are_one_line(tmp_path, suffix):
    rng = np.random.default_rng(0)
    picture(1, 24, 20).save(tmp_path / f"a{suffix}")
    whole = (tmp_path / f"a{suffix}").read_bytes()
    images = open_images(str(tmp_path))
    for _ in range(40):
        raw = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for k in rng.integers(0, len(raw), 3):
            raw[k] = rng.integers(256)
        (tmp_path / f"a{suffix}").write_bytes(raw)
        try:
            assert images.read(0, 16).shape == (16, 16, 3)
        except UserError as error:
            assert f"a{suffix}" in str(error) and "\n" not in str(error)


def test_names_of_any_kind(tmp_path):
    (tmp_path / "two\nlines.png").write_bytes(b"")
    picture(1).save(os.fsencode(tmp_path) + b"/latin\xe4.png")
    images = open_images(str(tmp_path))
    assert images.read(0).shape == (8, 10, 3) and "two lines.png" in message(images.read, 1)


def test_zip_handle_is_of_one_process(folder, tmp_path, monkeypatch):
    images = open_images(str(zip_of(folder, tmp_path / "set.zip")))
    images.read(0)
    parent = images.archive[1]
    images.read(1)
    assert images.archive[1] is parent and pickle.loads(pickle.dumps(images)).archive is None
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as after a fork
    images.read(0)
    assert images.archive[1] is not parent


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    picture(0, 100, 100).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    assert "a.png" in message(open_images(str(tmp_path)).read, 0, 16)


def test_bad_sources(tmp_path):
    def npz(**arrays):
        np.savez(tmp_path / "bad.npz", **arrays)
        return message(open_images, str(tmp_path / "bad.npz"))

    good = np.zeros((4, 8, 8, 3), np.uint8)
    assert "does not exist" in message(open_images, str(tmp_path / "nowhere"))
    assert "no images" in message(open_images, str(tmp_path))
    (tmp_path / "not.zip").write_bytes(b"PK nothing")
    (tmp_path / "not.npz").write_bytes(b"nothing")
    (tmp_path / "not.tar").write_bytes(b"nothing")
    for name in ("not.zip", "not.npz", "not.tar"):
        assert name in message(open_images, str(tmp_path / name))
    assert "expected" in npz(pictures=good)
    nan = np.full((4, 8, 8, 3), np.nan, np.float32)
    assert "float32 (4, 8, 8, 3) with 768 values that are not finite" in npz(images=nan)
    assert "finite" not in npz(images=np.zeros((4, 8, 8, 3), np.float32))
    for shape in ((8, 8), (4, 8, 8, 4), (0, 8, 8, 3), (4, 3, 8, 8, 1)):
        assert str(shape) in npz(images=np.zeros(shape, np.uint8))

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "code has run"),)

    npz(images=np.array([Code(), None], dtype=object))
    assert not (tmp_path / "code has run").exists()
    for labels in (np.zeros(3, int), np.array([0, 1, -1, 2]), np.zeros(4), np.zeros((4, 1), int)):
        assert "labels" in npz(images=good, labels=labels)
    np.savez(tmp_path / "grey.npz", images=good[..., 0])
    assert pixels(open_images(str(tmp_path / "grey.npz"))).shape == (4, 3, 8, 8)


def test_index_of_large_folders(folder, tmp_path, monkeypatch):
    def listed():
        return len(open_images(str(folder)))

    monkeypatch.setattr(data, "INDEX_FROM", 5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert listed() == 11 and not (tmp_path / "cache").exists()  # changed a moment ago, it may change again unseen
    old = time.time() - 100
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (old, old))
    assert listed() == 11
    (index,) = (tmp_path / "cache" / "farmer").iterdir()
    known = json.loads(index.read_text())
    index.write_text(json.dumps(known | {"names": known["names"][:-1]}))
    assert listed() == 10  # it is what is read
    picture(5).save(folder / "ape" / "deep" / "new.png")
    assert listed() == 12  # stale
    for junk in ("", "[1]", '{"root": 3}', json.dumps({"root": str(folder), "folders": [], "names": 4})):
        index.write_text(junk)
        assert listed() == 12
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "ape" / "00.png"))  # cannot be written
    os.utime(folder / "ape" / "deep", (old, old))
    assert listed() == 12


def test_hold_out():
    labels = np.array([1, 0, 1, 0, 1, 0, 3, 1, 3])
    images = Images("x", [str(i) for i in range(9)], labels)
    train, val = hold_out(images, 1)
    assert val.tolist() == [5, 7, 8] and train.tolist() == [0, 1, 2, 3, 4, 6]
    assert [part.tolist() for part in hold_out(images, 0)] == [list(range(9)), []]
    assert hold_out(Images("x", list("abcdef")), 2)[1].tolist() == [4, 5]
    assert "class 3 has 2" in message(hold_out, images, 2)
    message(hold_out, images, -1)
    message(hold_out, Images("x", ["a"]), 1)


def take(dataset, indices, n, **options):
    defaults = {"global_batch": 8, "start_step": 0, "seed": 3, "workers": 0, "flip": True}
    stream = batches(dataset, indices, **(defaults | options))
    got = list(itertools.islice(stream, n))
    stream.close()
    return [[t.numpy() for t in batch] for batch in got]


def column(got, k):
    return np.concatenate([batch[k] for batch in got])


def same(a, b):
    for batch_a, batch_b in zip(a, b, strict=True):
        for x, y in zip(batch_a, batch_b, strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


def test_batches_depend_on_the_step_alone(folder, tmp_path):
    dataset = ImageDataset(open_images(str(zip_of(folder, tmp_path / "set.zip"))), 8, 3)
    indices = np.array([0, 1, 2, 3, 4, 6, 7, 8, 9, 10])
    whole = take(dataset, indices, 7)
    assert whole[0][0].shape == (8, 3, 8, 8)
    assert [t.dtype for t in whole[0]] == [np.uint8, np.int64, np.int64]
    same(take(dataset, indices, 7, workers=2), whole)
    same(take(dataset, indices, 4, workers=1, start_step=3), whole[3:])
    for world in (2, 4):
        parts = [take(dataset, indices, 7, rank=r, world=world) for r in range(world)]
        joined = [[np.concatenate(x) for x in zip(*ranks, strict=True)] for ranks in zip(*parts, strict=True)]
        same(joined, whole)
    np.testing.assert_array_equal(column(whole, 2), np.arange(56))
    # epoch by epoch each image once, in another order each time, other for another seed
    plain, labels = column(take(dataset, indices, 7, flip=False), 0), column(whole, 1)
    images, truth = dataset.batch(indices)
    key = {images[i].numpy().tobytes(): i for i in range(10)}
    order = [key[x.tobytes()] for x in plain]
    assert all(sorted(order[e : e + 10]) == list(range(10)) for e in range(0, 50, 10)) and order[:10] != order[10:20]
    np.testing.assert_array_equal(labels, truth[order])
    assert not np.array_equal(plain, column(take(dataset, indices, 7, flip=False, seed=4), 0))
    assert "batch" in message(take, dataset, indices, 1, world=3)
    assert "no images" in message(take, dataset, [], 1)


def test_flips_half_of_the_samples_by_seed_and_number(folder):
    dataset = ImageDataset(open_images(str(folder)), 8, 3)

    def flipped(n=40, **options):
        plain, maybe = (column(take(dataset, np.arange(11), n, flip=flip, **options), 0) for flip in (False, True))
        mirrored = [np.array_equal(a[..., ::-1], b) for a, b in zip(plain, maybe, strict=True)]
        assert all(m or np.array_equal(a, b) for m, a, b in zip(mirrored, plain, maybe, strict=True))
        return mirrored

    coins = flipped()
    assert 120 < sum(coins) < 200 and coins == flipped() == flipped(80, global_batch=4)
    assert coins != flipped(seed=4) and coins[:11] != coins[11:22]


def test_array_path_equals_file_path(folder, tmp_path, monkeypatch):
    files = ImageDataset(open_images(str(folder)), 8, 3)
    array = files.batch(range(11))[0].permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "a.npz", images=array, labels=files.images.labels)
    arrays = ImageDataset(open_images(str(tmp_path / "a.npz")), 8, 3)
    assert arrays.ready
    same(take(arrays, np.arange(11), 5), take(files, np.arange(11), 5))
    same(take(pickle.loads(pickle.dumps(files)), np.arange(11), 5), take(files, np.arange(11), 5))
    monkeypatch.setattr(loader, "in_workers", lambda work, todo, workers: iter([UserError(f"workers {workers}")]))
    assert "workers 0" in message(take, arrays, np.arange(11), 1, workers=2)
    assert "workers 2" in message(take, files, np.arange(11), 1, workers=2)


def test_batches_leave_the_array_as_it_is(folder, tmp_path):
    np.savez(tmp_path / "a.npz", images=np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), np.uint8))
    arrays = ImageDataset(open_images(str(tmp_path / "a.npz")), 8, 3)
    before = arrays.images.array.copy()
    take(arrays, np.arange(11), 5)
    np.testing.assert_array_equal(arrays.images.array, before)


def test_a_dead_or_failing_worker_is_one_line(folder):
    dataset = ImageDataset(open_images(str(folder)), 8, 3)
    stream = batches(dataset, np.arange(11), global_batch=4, start_step=0, seed=0, workers=2)
    next(stream), next(stream)  # one of each worker: both are up
    worker = multiprocessing.active_children()[0]
    os.kill(worker.pid, signal.SIGINT)
    os.kill(worker.pid, signal.SIGTERM)  # as a whole process group gets them: workers stay
    for _ in range(8):
        next(stream)
    assert worker.is_alive()
    os.kill(worker.pid, signal.SIGKILL)
    start = time.monotonic()
    assert "worker" in message(lambda: [next(stream) for _ in range(100)]) and time.monotonic() - start < 12
    assert not multiprocessing.active_children()
    spoil(folder)
    stream = batches(dataset, np.arange(11), global_batch=11, start_step=0, seed=0, workers=1)
    assert "more than 1%" in message(next, stream)


def test_cache(folder, tmp_path, capfd, monkeypatch):
    images, where = open_images(str(folder)), str(tmp_path / "cache")
    (folder / "ape" / "04.png").write_bytes(b"")
    keep = [i for i in range(11) if images.names[i] != "ape/04.png"]
    expected = np.stack([images.read(i, 8, 1) for i in keep])
    cached = cache_images(images, 8, 1, where, workers=1)
    assert "ape/04.png" in capfd.readouterr().err
    for copy in (cached, pickle.loads(pickle.dumps(cached))):
        assert os.path.dirname(copy.array.filename) == where  # mapped, not copied
        np.testing.assert_array_equal(copy.array, expected)
        np.testing.assert_array_equal(copy.labels, images.labels[keep])
    assert cached.classes == images.classes
    assert ImageDataset(cached, 8, 1).ready
    assert sorted(name[:6] for name in os.listdir(where)) == ["images", "labels", "meta.j"]
    with monkeypatch.context() as patch:
        patch.setattr(crops, "in_workers", None)  # used again, not built
        np.testing.assert_array_equal(cache_images(images, 8, 1, where).array, expected)
    assert "image_size 8 instead of 4" in message(cache_images, images, 4, 1, where)
    assert "channels" in message(cache_images, images, 8, 3, where)
    other = shutil.copytree(folder, tmp_path / "other")
    picture(99, 8, 8).save(other / "bee" / "07.png")
    assert "the pixels of those" in message(cache_images, open_images(str(other)), 8, 1, where)
    (other / "bee" / "07.png").rename(other / "bee" / "7.png")
    assert "their names differ" in message(cache_images, open_images(str(other)), 8, 1, where)
    zipped = open_images(str(zip_of(folder, tmp_path / "set.zip")))
    np.testing.assert_array_equal(cache_images(zipped, 8, 1, where).array, expected)  # they are the same images
    (pixels_file,) = Path(where).glob("images-*.npy")
    whole = pixels_file.read_bytes()
    pixels_file.write_bytes(whole[:-9])
    assert "damaged" in message(cache_images, images, 8, 1, where)
    pixels_file.write_bytes(whole[:-9] + bytes(9))
    assert "checksum" in message(cache_images, images, 8, 1, where)
    np.save(pixels_file, expected[:-1])
    assert "9 images instead of 10" in message(cache_images, images, 8, 1, where)
    pixels_file.unlink()
    assert "cannot be written or read" in message(cache_images, images, 8, 1, where)
    shutil.copytree(where, tmp_path / "damaged")
    shutil.rmtree(tmp_path / "damaged")  # as advised
    np.testing.assert_array_equal(cache_images(images, 8, 1, str(tmp_path / "damaged")).array, expected)
    (tmp_path / "cache" / "meta.json").write_text("{")
    assert "damaged" in message(cache_images, images, 8, 1, where)
    (tmp_path / "cache" / "meta.json").write_text('{"source": "/of/an/older/version"}')
    assert "another program or version" in message(cache_images, images, 8, 1, where)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in message(cache_images, images, 8, 1, str(tmp_path / "file"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))  # as a full disk: writes fail half-way
    try:
        assert "cannot be written" in message(cache_images, images, 8, 1, str(tmp_path / "full"), workers=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "full").exists()


def test_a_killed_cache_build_is_done_again(folder, tmp_path, monkeypatch):
    images, where = open_images(str(folder)), str(tmp_path / "cache")

    def killed(*args):
        raise KeyboardInterrupt

    for name in ("write_json", "report_broken"):
        with monkeypatch.context() as patch:
            patch.setattr(crops, name, killed)
            if name == "report_broken":
                (folder / "bee" / "08.png").unlink()
            with pytest.raises(KeyboardInterrupt):
                cache_images(images, 8, 3, where, workers=0)
        assert not os.path.exists(where + "/meta.json")
    assert len(cache_images(images, 8, 3, where, workers=0)) == 10
    (folder / "bee" / "09.png").unlink()
    assert "more than 1%" in message(cache_images, images, 8, 3, str(tmp_path / "other"), workers=0)
    assert len(cache_images(images, 8, 3, where, workers=0)) == 10


def test_of_several_builders_one_builds_and_the_others_wait(folder, tmp_path, capfd):
    images, where = open_images(str(folder)), str(tmp_path / "cache")
    fork, built = multiprocessing.get_context("fork"), tmp_path / "built"
    write = crops._write_crops

    def slow(*args):
        with open(built, "a") as file:
            file.write("x")
        time.sleep(0.4)
        args[-1].told = -9.0
        args[-1].report(3, 11)  # what the others show
        time.sleep(0.6)
        return write(*args)

    def run():
        crops._write_crops = slow
        processes.Progress = lambda what, total: lambda done: print(f"{what} {done}/{total}", file=sys.stderr)
        crop = cache_images(open_images(str(folder)), 8, 3, where, workers=0)
        os._exit(len(crop) != 11 or not np.array_equal(crop.array[3], images.read(3, 8)))

    ranks = [fork.Process(target=run) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(20)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0] and built.read_text() == "x"
    assert f"another process fills {where}, images 3/11" in capfd.readouterr().err
    assert sorted(name[:6] for name in os.listdir(where)) == ["images", "labels", "meta.j"]


def test_a_builder_that_is_killed_leaves_nothing_behind_for_long(folder, tmp_path):
    images, where = open_images(str(folder)), tmp_path / "cache"

    def run():
        crops.report_broken = lambda *args: time.sleep(60)
        (folder / "ape" / "00.png").write_bytes(b"")
        cache_images(images, 8, 3, str(where), workers=0)

    builder = multiprocessing.get_context("fork").Process(target=run)
    builder.start()
    while not list(where.glob("images-*.npy*")):
        time.sleep(0.05)
    builder.kill()
    builder.join()
    picture(0, 8, 8).save(folder / "ape" / "00.png")
    (where / "images-mine.npy").write_text("of the user")
    assert len(cache_images(images, 8, 3, str(where), workers=0)) == 11
    assert sorted(name[:6] for name in os.listdir(where)) == ["images", "images", "labels", "meta.j"]
    assert (where / "images-mine.npy").exists() and not list(where.glob("*.tmp"))


def test_a_lock_survives_its_removal_by_the_last_holder(tmp_path):
    path, inside, worst = str(tmp_path / "lock"), [], []

    def work():
        for _ in range(5):
            with processes.one_at_a_time(path, "x"):
                inside.append(1)
                worst.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "PAUSE", 0.001)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert worst == [1] * 15 and not os.path.exists(path)


def test_without_locks_and_child_signals_as_on_windows(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "fcntl", None)
    monkeypatch.delattr(signal, "SIGCHLD")
    images = open_images(str(folder))
    assert len(cache_images(images, 8, 3, str(tmp_path / "cache"), workers=1)) == 11


# ------------------------------------------------------------------------------------------ fingerprints
def test_a_fingerprint_sees_content_not_place(folder, tmp_path):
    def of(path):
        return fingerprint(open_images(str(path)))

    first = of(folder)
    assert json.loads(json.dumps(first)) == first
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "set")
    assert of(moved) == first == of(zip_of(folder, tmp_path / "set.zip"))
    assert fingerprint_difference(first, of(moved)) == ""
    (moved / "ape" / "02.png").write_bytes(b"damaged")
    damaged = of(moved)
    assert damaged != first and fingerprint_difference(damaged, first) == "" == fingerprint_difference(first, damaged)
    picture(50, 8, 8).save(moved / "ape" / "02.png")
    assert "pixels" in fingerprint_difference(first, of(moved))
    assert "pixels" in fingerprint_difference(first, first | {"content": []})
    (moved / "ape" / "02.png").rename(moved / "bee" / "02.png")
    assert "labels" in fingerprint_difference(first, of(moved))
    (moved / "bee" / "02.png").unlink()
    assert fingerprint_difference(first, of(moved)) == "images was 11 and is 10"

    rng = np.random.default_rng(0)
    array, labels = rng.integers(0, 256, (40, 8, 8, 3), np.uint8), np.arange(40) % 4
    np.savez(tmp_path / "a.npz", images=array, labels=labels)
    np.savez_compressed(tmp_path / "b.npz", images=array, labels=labels.astype(np.uint8))
    assert of(tmp_path / "a.npz") == of(tmp_path / "b.npz")
    array[-1, 3, 3, 1] ^= 1
    np.savez(tmp_path / "c.npz", images=array, labels=labels)
    assert "pixels" in fingerprint_difference(of(tmp_path / "a.npz"), of(tmp_path / "c.npz"))
    np.savez(tmp_path / "c.npz", images=array.reshape(40, 4, 16, 3), labels=labels)
    text = fingerprint_difference(of(tmp_path / "a.npz"), of(tmp_path / "c.npz"))
    assert text == "shape was [8, 8, 3] and is [4, 16, 3]"


# ------------------------------------------------------------------------------------------ known formats
def idx(array) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def small_mnist(seed=0):
    """{file name: content} of a set of 12 and 5 images 6 x 5, and its arrays."""
    rng, files, arrays = np.random.default_rng(seed), {}, {}
    for split, prefix, n in (("train", "train", 12), ("test", "t10k", 5)):
        images, labels = rng.integers(0, 256, (n, 6, 5), np.uint8), (np.arange(n) % 4).astype(np.uint8)
        files[f"{prefix}-images-idx3-ubyte"] = idx(images)
        files[f"{prefix}-labels-idx1-ubyte"] = idx(labels)
        arrays[split] = images, labels
    return files, arrays


def write_files(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def packed(files):
    return {name + ".gz": gzip.compress(content) for name, content in files.items()}


def same_images(images, arrays):
    np.testing.assert_array_equal(images.array.reshape(arrays[0].shape), arrays[0])
    np.testing.assert_array_equal(images.labels, arrays[1])


def test_idx_files_in_every_wrapping(tmp_path):
    files, arrays = small_mnist()
    dotted = {name.replace("-idx", ".idx"): content for name, content in files.items()}
    unpacked_by_a_browser = {name + ".gz": content for name, content in files.items()}
    layouts = {"plain": files, "gz": packed(files), "dot": dotted, "odd": unpacked_by_a_browser,
               "root/MNIST/raw": files, "both": files | packed(small_mnist(1)[0])}
    for place, content in layouts.items():
        write_files(tmp_path / place, content)
    for place in [*layouts, "root", "root/MNIST"]:
        source = str(tmp_path / place)
        same_images(open_images(source), arrays["train"])
        same_images(open_images(source + ":train"), arrays["train"])
        same_images(open_images(source + ":test"), arrays["test"])
        assert open_images(source).test == source + ":test" and open_images(source + ":train").test is None
    write_files(tmp_path / "root" / "FashionMNIST" / "raw", files)
    assert "more than one" in message(open_images, str(tmp_path / "root"))
    same_images(open_images(str(tmp_path / "root" / "FashionMNIST")), arrays["train"])


def test_idx_files_that_are_not_right(tmp_path):
    files, arrays = small_mnist()
    root, images, labels = tmp_path / "set", "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
    test_only = {name: content for name, content in files.items() if name.startswith("t10k")}
    text = message(open_images, str(write_files(root, test_only)))
    assert f"write {root}:test" in text
    same_images(open_images(text.split("write ")[1].split(" to use")[0]), arrays["test"])
    write_files(root, files)
    (root / labels).unlink()
    assert f"put {root / labels}.gz there" in message(open_images, str(root))
    good = files[images]
    for content, word in ((b"", "starts with"), (good[:7], "error"), (good + b"x", "more instead of"),
                          (good[:-1], "359 bytes instead of 360"), (b"\0\0\x0d\x03" + good[4:], "starts with 00000d03"),
                          (good[:4] + b"\xff" * 12, "more than 4 GiB"), (gzip.compress(good)[:-20], "EOFError"),
                          (gzip.compress(good)[:12] + b"nonsense" * 9, "replace it")):
        write_files(root, files | {images: content})
        assert word in message(open_images, str(root)), word
    write_files(root, files | {labels: idx(np.zeros(11, np.uint8))})
    assert "labels" in message(open_images, str(root))


def small_cifar():
    """{stem: (images (N, 32, 32, 3), labels)}, and the arrays of the splits."""
    rng, batches = np.random.default_rng(0), {}
    for stem in (*datasets.CIFAR_SPLITS["train"], "test_batch"):
        batches[stem] = rng.integers(0, 256, (3, 32, 32, 3), np.uint8), rng.integers(0, 10, 3).astype(np.uint8)
    parts = [batches[stem] for stem in datasets.CIFAR_SPLITS["train"]]
    train = np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])
    return batches, {"train": train, "test": batches["test_batch"]}


def planes(images):
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


def binary(batch):
    images, labels = batch
    return np.concatenate([labels[:, None], planes(images)], 1).tobytes()


def tar_of(files, path, mode="w:gz", folder="cifar-10-batches-bin/"):
    with tarfile.open(path, mode) as archive:
        for name, content in reversed(files.items()):  # the order in the file must not matter
            info = tarfile.TarInfo(folder + name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_cifar_in_every_wrapping(tmp_path):
    batches, arrays = small_cifar()
    files = {stem + ".bin": binary(batch) for stem, batch in batches.items()} | {"batches.meta.txt": b"airplane\n"}
    pickles = {stem: {b"data": planes(batch[0]), b"labels": batch[1].tolist(), b"batch_label": b"x"}
               for stem, batch in batches.items()}
    by_python2 = {stem: pickle.dumps(batch, 2) for stem, batch in pickles.items()}
    by_python3 = {stem: pickle.dumps({k.decode(): v for k, v in batch.items()}, 4) for stem, batch in pickles.items()}
    write_files(tmp_path / "bin", files)
    write_files(tmp_path / "root" / "cifar-10-batches-bin", files)
    write_files(tmp_path / "py", by_python2)
    write_files(tmp_path / "root3" / "cifar-10-batches-py", by_python3)
    tar_of(files, tmp_path / "a.tar.gz")
    tar_of(files, tmp_path / "a.tar", "w", "")
    tar_of(by_python2, tmp_path / "py.tgz")
    (tmp_path / "packed").mkdir()
    shutil.copy(tmp_path / "py.tgz", tmp_path / "packed" / "cifar-10-python.tar.gz")
    for place in ("bin", "root", "py", "root3", "a.tar.gz", "a.tar", "py.tgz", "packed"):
        source = str(tmp_path / place)
        same_images(open_images(source), arrays["train"])
        same_images(open_images(source + ":test"), arrays["test"])
        assert open_images(source).test == source + ":test" and open_images(source).classes[3] == "cat"
    same_images(open_images(str(tmp_path / "bin" / "test_batch.bin")), arrays["test"])
    same_images(open_images(str(tmp_path / "bin" / "data_batch_4.bin")), batches["data_batch_4"])
    np.testing.assert_array_equal(open_images(str(tmp_path / "bin")).read(4), arrays["train"][0][4])


def test_cifar_that_is_not_right(tmp_path):
    batches, _ = small_cifar()
    good = binary(batches["test_batch"])
    path = tmp_path / "data_batch_1.bin"
    for content, word in ((b"", "0 bytes"), (good[:-1], "records of 3073"), (b"\x0b" + good[1:], "labels up to 11")):
        path.write_bytes(content)
        assert word in message(open_images, str(path))
    tar_of({"cat.png": b"x", "dog.png": b"y"}, tmp_path / "pictures.tar.gz", folder="")
    assert "holds dog.png, cat.png; expected" in message(open_images, str(tmp_path / "pictures.tar.gz"))
    tar_of({"test_batch.bin": good}, tmp_path / "part.tar.gz")
    assert "holds only its test split" in message(open_images, f"{tmp_path / 'part.tar.gz'}:train")
    assert len(open_split(str(tmp_path / "part.tar.gz"), 32, 3).indices) == 3
    with tarfile.open(tmp_path / "links.tar", "w") as archive:
        link = tarfile.TarInfo("data_batch_1.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert "data_batch_1.bin; expected" in message(open_images, str(tmp_path / "links.tar"))


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_pickle_runs_code(tmp_path):
    mark, root = tmp_path / "code has run", tmp_path / "py"
    data = np.zeros((2, 3072), np.uint8)
    by_name = b"cnumpy\n_reconstruct\n(cnumpy\nndarray\ntR."
    for content in (pickle.dumps({b"data": Code(mark), b"labels": [1, 2]}, 2), pickle.dumps(Code(mark)), by_name,
                    pickle.dumps({b"data": np.array([Code(mark), None]), b"labels": [1, 2]}, 2), b"", b"\x80\x04.",
                    pickle.dumps({b"data": data, b"labels": [1, 2, 3]}, 2), pickle.dumps({b"data": data}),
                    pickle.dumps({b"data": data[:, 1:], b"labels": [1, 2]}, 2), pickle.dumps([data]),
                    b"cnumpy.f2py\nrun_main\n(tR.", pickle.dumps({b"data": data.astype(float), b"labels": [1, 2]})):
        write_files(root, {"data_batch_1": content, "test_batch": content})
        assert "binary version" in message(open_images, str(root))
        assert not mark.exists()


def test_npz_of_others(tmp_path, capfd):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (6, 8, 8, 3), np.uint8), np.array([1, 4, 2, 3, 2, 1])
    path = str(tmp_path / "a.npz")
    np.savez(path, pictures=images, y=labels)
    assert f"{path} holds pictures, y; expected" in message(open_images, path)
    np.savez(path)
    assert "holds nothing" in message(open_images, path)
    np.savez(path, data=planes(images), labels=labels, mean=np.zeros(192))  # as ImageNet-64 is published
    opened = open_images(path)
    np.testing.assert_array_equal(opened.array, images)
    np.testing.assert_array_equal(opened.labels, labels - 1)
    assert "labels start at 1" in capfd.readouterr().err
    for bad in (planes(images)[:, :-1], planes(images)[0], np.zeros((2, 0), np.uint8)):
        np.savez(path, data=bad)
        message(open_images, path)
    np.savez(path, images=images, labels=labels.astype(np.uint64) + 2**63)
    assert "uint64 (6,) from 9223372036854775809" in message(open_images, path)
    assert "has no splits" in message(open_images, path + ":test")


def test_grey_and_colour_serve_either_model(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (4, 8, 8), np.uint8)
    np.savez(tmp_path / "grey.npz", images=grey)
    images = open_images(str(tmp_path / "grey.npz"))
    np.testing.assert_array_equal(pixels(images, 8, 1)[:, 0], grey)
    np.testing.assert_array_equal(pixels(images, 8, 3), grey[:, None].repeat(3, 1))
    assert ImageDataset(images, 8, 1).ready and not ImageDataset(images, 8, 3).ready
    colour = grey[..., None] * np.array([1, 0, 1], np.uint8)
    np.savez(tmp_path / "colour.npz", images=colour)
    luminance = pixels(open_images(str(tmp_path / "colour.npz")), 8, 1)[:, 0]
    assert np.abs(luminance - colour @ [0.299, 0.587, 0.114]).max() <= 1


# ------------------------------------------------------------------------------------------ data by name
class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`; `mode` is how it misbehaves. Keeps the ranges it was asked for."""

    files, mode, asked = {}, "good", []

    def do_GET(self):
        content, wanted = self.files[self.path[1:]], self.headers.get("Range")
        Server.asked.append(wanted)
        if self.mode == "404":
            return self.send_error(404)
        start = int(wanted[6:-1]) if wanted and self.mode != "no ranges" else 0
        if self.mode == "wrong":
            content = bytes(len(content))
        if self.mode == "page":
            content = b"<html>Sign in to this network</html>"
        self.send_response(206 if start else 200)
        if self.mode != "no length":
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        rest = content[start:]
        self.wfile.write(rest[:len(rest) // 2] if self.mode == "cut" else rest)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A local server with a small Fashion-MNIST and a small CIFAR-10, known as if they were the real ones."""
    address = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=address.serve_forever, args=(0.01,), daemon=True).start()
    batches, _ = small_cifar()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for stem, batch in batches.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{stem}.bin")
            info.size = len(binary(batch))
            tar.addfile(info, io.BytesIO(binary(batch)))
    sets = {"fashion-mnist": packed(small_mnist()[0]), "cifar10": {"cifar-10-binary.tar.gz": archive.getvalue()}}
    Server.files, Server.mode, Server.asked = {}, "good", []
    base = f"http://127.0.0.1:{address.server_port}/"
    for name, files in sets.items():
        sums = {file: (len(content), hashlib.sha256(content).hexdigest()) for file, content in files.items()}
        known = datasets.Known((base,), sums, datasets.KNOWN[name].classes)
        monkeypatch.setitem(datasets.KNOWN, name, known)
        Server.files |= files
    yield Server
    address.shutdown()
    address.server_close()


def cached_file(tmp_path, name):
    return tmp_path / "cache home" / "farmer" / name


def test_data_by_name_is_downloaded_once(server, tmp_path):
    _, arrays = small_mnist()
    same_images(open_images("fashion-mnist"), arrays["train"])
    assert len(server.asked) == 4
    same_images(open_images("fashion-mnist:test"), arrays["test"])
    assert len(server.asked) == 4 and open_images("fashion-mnist").classes[9] == "ankle boot"
    assert open_images("fashion-mnist").test == "fashion-mnist:test"
    assert sorted(os.listdir(cached_file(tmp_path, "fashion-mnist"))) == sorted(packed(small_mnist()[0]))
    same_images(open_images("cifar10"), small_cifar()[1]["train"])
    same_images(open_images("cifar10:test"), small_cifar()[1]["test"])
    assert len(server.asked) == 5


def test_a_download_that_is_cut_is_gone_on_with(server, tmp_path):
    size = len(server.files["cifar-10-binary.tar.gz"])
    server.mode = "cut"
    text = message(open_images, "cifar10")
    assert f"ended after {size // 2:,} of {size:,} bytes" in text and "Try again" in text
    message(open_images, "cifar10")
    server.mode = "good"
    same_images(open_images("cifar10"), small_cifar()[1]["train"])
    assert server.asked == [None, f"bytes={size // 2}-", f"bytes={size // 2 + (size - size // 2) // 2}-"]
    assert os.listdir(cached_file(tmp_path, "cifar10")) == ["cifar-10-binary.tar.gz"]


def test_a_part_is_no_use_to_a_server_without_ranges(server, tmp_path):
    part = cached_file(tmp_path, "cifar10") / "cifar-10-binary.tar.gz.part"
    for mode in ("no ranges", "no length"):
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(server.files[part.stem][:100] if mode == "no length" else b"x" * 100)
        server.mode = mode
        same_images(open_images("cifar10"), small_cifar()[1]["train"])
        shutil.rmtree(part.parent)


def test_a_wrong_download_is_removed_and_named(server, tmp_path):
    folder = cached_file(tmp_path, "cifar10")
    server.mode = "wrong"
    assert "sha256" in message(open_images, "cifar10") and os.listdir(folder) == []
    server.mode = "page"
    assert "it is 36 bytes there, not" in message(open_images, "cifar10")
    server.mode = "good"
    (folder / "cifar-10-binary.tar.gz.part").write_bytes(b"x" * 10)  # half of another file
    assert "sha256" in message(open_images, "cifar10")
    same_images(open_images("cifar10"), small_cifar()[1]["train"])  # the advice: try again


def test_offline_one_line_says_which_files_go_where(server, tmp_path, monkeypatch):
    server.mode = "404"
    text = message(open_images, "fashion-mnist")
    assert "404" in text
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        bases = tuple(f"http://127.0.0.1:{closed.getsockname()[1]}/{i}/" for i in range(2))
    known = datasets.KNOWN["fashion-mnist"]
    monkeypatch.setitem(datasets.KNOWN, "fashion-mnist", datasets.Known(bases, known.files, known.classes))
    text = message(open_images, "fashion-mnist")
    assert "refused" in text and bases[0] in text and bases[1] in text
    folder = text.split(" into ")[1]
    assert folder == str(cached_file(tmp_path, "fashion-mnist")) and all(file in text for file in known.files)
    write_files(Path(folder), small_mnist(7)[0])  # as advised; unpacked, and of another origin
    same_images(open_images("fashion-mnist"), small_mnist(7)[1]["train"])


def test_the_second_place_helps_when_the_first_fails(server, monkeypatch):
    known = datasets.KNOWN["cifar10"]
    bases = ("http://127.0.0.1:1/", *known.bases)
    monkeypatch.setitem(datasets.KNOWN, "cifar10", datasets.Known(bases, known.files, known.classes))
    same_images(open_images("cifar10"), small_cifar()[1]["train"])


def test_a_cache_that_cannot_be_written_is_one_line(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "XDG_CACHE_HOME" in message(open_images, "cifar10")


def test_the_real_places_are_well_formed():
    sizes = {"fashion-mnist": 4, "mnist": 4, "cifar10": 1}
    for name, known in datasets.KNOWN.items():
        assert len(known.files) == sizes[name] and len(known.classes) == 10
        assert all(base.startswith("http") and base.endswith("/") for base in known.bases)
        assert all(len(digest) == 64 and size > 4000 for size, digest in known.files.values())


# ------------------------------------------------------------------------------------------ splits
def test_folders_train_and_test_are_splits(folder, tmp_path):
    root = tmp_path / "both"
    for split, of in (("train", "ape"), ("train", "bee"), ("val", "bee")):
        shutil.copytree(folder / of, root / split / of)
    for source in (root, zip_of(root, tmp_path / "both.zip"), zip_of(root, tmp_path / "top.zip", "top/")):
        train, test = open_images(str(source)), open_images(f"{source}:test")
        assert train.classes == test.classes == ["ape", "bee"] and train.test == f"{source}:test"
        assert train.labels.tolist() == [0] * 6 + [1] * 5 and test.labels.tolist() == [1] * 5  # class bee in both
        np.testing.assert_array_equal(pixels(train)[6:], pixels(test))
    assert "no folders train and test" in message(open_images, f"{folder}:test")
    assert len(open_images(f"{folder}/bee")) == 5
    (root / "train" / "stray.png").write_bytes(b"")
    assert "stray.png" in message(open_images, str(root))


@pytest.fixture
def few_digits(monkeypatch):
    monkeypatch.setattr(data, "digits", lambda n, *rest: digits(n // 10, *rest))


def test_names_of_sources(folder, tmp_path, monkeypatch, capfd, few_digits):
    assert "empty" in message(open_images, "") and "empty" in message(open_images, ":test")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_images("~/set")) == 11
    monkeypatch.chdir(tmp_path)
    odd = shutil.copytree(folder, tmp_path / "set:test")
    assert len(open_images("set:test")) == 11 and open_images("set:test").path == str(odd)
    assert "digits" in message(open_images, "nothing:test") and "does not exist" in message(open_images, "mnist:val")
    shutil.copytree(folder, tmp_path / "digits")
    assert len(open_images("digits:test", size=8)) == 50 and "./digits" not in capfd.readouterr().err
    monkeypatch.setattr(datasets, "fetch", lambda name: str(write_files(tmp_path / "idx", small_mnist()[0])))
    shutil.copytree(folder, tmp_path / "mnist")
    open_images("mnist")
    assert "write ./mnist" in capfd.readouterr().err and len(open_images("./mnist")) == 11


def test_open_split_gives_evaluation_what_there_is(folder, tmp_path, few_digits):
    files, arrays = small_mnist()
    root = str(write_files(tmp_path / "mnist set", files))
    split = open_split(root, 5, 1)
    assert len(split.indices) == 12 and len(split.val_indices) == 5 and split.num_classes == 4
    assert split.val.images.labels.tolist() == arrays["test"][1].tolist() and split.val is not split.data
    split = open_split(root, 5, 1, holdout=1)
    assert len(split.indices) == 8 and split.val_indices.tolist() == [8, 9, 10, 11] and split.val is split.data
    shutil.copytree(folder / "ape", tmp_path / "both" / "test" / "ape")
    shutil.copytree(folder, tmp_path / "both" / "train", ignore=shutil.ignore_patterns("__MACOSX"))
    assert open_split(f"{tmp_path / 'both'}:test", 8, 3).num_classes == 2  # though only class ape is in it
    split = open_split(root + ":test", 5, 1)
    assert len(split.indices) == 5 and not len(split.val_indices)
    split = open_split(str(folder), 8, 3)
    assert len(split.indices) == 11 and not len(split.val_indices) and split.num_classes == 2
    assert split.fingerprint["training"] == 11
    split = open_split(str(folder), 8, 3, holdout=2, cache=str(tmp_path / "crops"), workers=0)
    assert split.val_indices.tolist() == [4, 5, 9, 10] and split.data.ready
    assert open_split(str(folder / "bee"), 8, 3).num_classes == 0
    split = open_split("digits", 8, 1)
    assert len(split.indices) == 400 and len(split.val_indices) == 50 and split.num_classes == 10
    np.testing.assert_array_equal(split.val.images.array, digits(50, 8, 1, 1).array)
    assert len(open_split("digits", 8, 1, holdout=3).val_indices) == 30 and digits(400, 8, 1, 0).test is None
    assert len(open_split("digits:test", 8, 1).indices) == 50


def test_both_splits_of_folders_are_cached(folder, tmp_path):
    for split in ("train", "test"):
        shutil.copytree(folder, tmp_path / "both" / split)
    split = open_split(str(tmp_path / "both"), 8, 3, cache=str(tmp_path / "crops"), workers=0)
    assert split.data.ready and split.val.ready and len(split.val_indices) == 11
    again = open_split(str(tmp_path / "both"), 8, 3, cache=str(tmp_path / "crops"), workers=0)
    assert again.fingerprint == split.fingerprint


def test_labels_follow_the_data(folder, tmp_path, capfd):
    def split(labels, **options):
        np.savez(tmp_path / "a.npz", images=np.zeros((len(labels), 8, 8, 3), np.uint8), labels=np.array(labels))
        found = open_split(str(tmp_path / "a.npz"), 8, 3, **options)
        return found.data.labels.tolist(), found.num_classes, capfd.readouterr().err

    assert split([0, 1, 2, 1]) == ([0, 1, 2, 1], 3, "")
    labels, classes, said = split([3, 1, 2, 1])
    assert labels == [2, 0, 1, 0] and classes == 3 and "labels go from 1 to 3; label 1 is class 0" in said
    labels, classes, said = split([0, 3, 3])
    assert classes == 4 and "2 of the classes 0 to 3 have no images, as class 1" in said
    labels, classes, said = split([2, 3, 3])
    assert labels == [2, 3, 3] and classes == 4 and "as class 0" in said
    # a checkpoint or a flag says how many there are
    assert split([2, 1, 2], num_classes=4) == ([2, 1, 2], 4, "")
    assert split([2, 1, 4], num_classes=4)[:2] == ([1, 0, 3], 4)
    assert split([5, 7], num_classes=0)[1:] == (0, "")
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8, 3), np.uint8), labels=np.array([0, 5]))
    assert "pass --num-classes 6" in message(open_split, str(tmp_path / "a.npz"), 8, 3, num_classes=4)
    assert "no labels" in message(open_split, str(folder / "bee"), 8, 3, num_classes=4)


# ------------------------------------------------------------------------------------------ what is no file
def test_pipes_and_devices_do_not_hang(folder, tmp_path, capfd):
    os.mkfifo(folder / "ape" / "pipe.png")
    (folder / "ape" / "null.png").symlink_to("/dev/zero")
    (folder / "ape" / "lost.png").symlink_to(folder / "nowhere.png")
    images = open_images(str(folder))
    assert len(images) == 12 and "ape/lost.png" in images.names
    text = capfd.readouterr().err
    assert "2 of the names are no regular files" in text and "ape/null.png" in text
    assert len(pixels(images)) == 12 and "ape/lost.png" in capfd.readouterr().err
    os.mkfifo(tmp_path / "pipe.npz")
    assert "regular file" in message(open_images, str(tmp_path / "pipe.npz"))
    assert "regular file" in message(open_images, "/dev/zero")


def test_links_in_circles_end(folder):
    (folder / "ape" / "again").symlink_to(folder)
    (folder / "bee" / "again").symlink_to(folder / "bee")
    names = open_images(str(folder / "bee")).names
    assert len(names) == 5
    assert len(open_images(str(folder)).names) < 30


def test_zip_bombs_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LARGEST_FILE", 1000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.png", bytes(1001))
    assert "unpacks to more than" in message(open_images(str(tmp_path / "a.zip")).read, 0)


# ------------------------------------------------------------------------------------------ items of several images
def test_items_of_several_images(folder, tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(30) % 3
    array = rng.integers(0, 256, (30, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=array, labels=labels)
    dataset, indices, S = ImageDataset(open_images(str(tmp_path / "a.npz")), 4, 3), np.arange(3, 30), 3
    options = {"global_batch": 12, "images_per_item": S}
    whole = take(dataset, indices, 9, flip=False, **options)
    same([[np.concatenate(x) for x in zip(*ranks, strict=True)] for ranks in zip(
        *[take(dataset, indices, 9, flip=False, rank=r, world=2, **options) for r in range(2)], strict=True)], whole)
    same(take(dataset, indices, 4, flip=False, start_step=5, **options), whole[5:])
    np.testing.assert_array_equal(column(whole, 2), np.arange(9 * 12))
    key = {image.transpose(2, 0, 1).tobytes(): i for i, image in enumerate(array)}
    items = np.array([key[x.tobytes()] for x in column(whole, 0)]).reshape(-1, S)
    np.testing.assert_array_equal(labels[items].ravel(), column(whole, 1))
    assert items.min() >= 3 and all(len(set(item)) == S and len(set(labels[item])) == 1 for item in items)
    assert sorted(items[:27, 0]) == list(range(3, 30)) and items[:27, 0].tolist() != items[27:54, 0].tolist()
    assert len({tuple(sorted(item)) for item in items}) > 30  # other company each time
    first = [tuple(item) for item in items[:8]]
    other = take(dataset, indices, 2, flip=False, global_batch=12, images_per_item=3, seed=4)
    assert first != [tuple(key[x.tobytes()] for x in item) for item in column(other, 0).reshape(8, 3, 3, 4, 4)]
    # each is mirrored on its own
    mirrored = column(take(dataset, indices, 9, flip=True, **options), 0) != column(whole, 0)
    coins = mirrored.any((1, 2, 3)).reshape(-1, S)
    assert not np.array_equal(coins[:9], coins[27:])  # nor as in the epoch before
    assert 30 < coins.sum() < 78 and 8 < (coins.any(1) & ~coins.all(1)).sum()
    text = message(take, dataset, indices, 1, global_batch=12, world=3, images_per_item=3)
    assert "the 3 processes x 3 images per item" in text
    text = message(take, dataset, indices, 1, global_batch=12, images_per_item=12)
    assert "a class has 9 images to train on; this model takes 12 of one class" in text
    take(dataset, indices, 1, global_batch=9, images_per_item=9)


def test_items_stay_of_one_class_when_files_are_broken(folder):
    for i in range(200):
        picture(i, 8, 8).save(folder / "bee" / f"more{i:03}.png")
    dataset = ImageDataset(open_images(str(folder)), 8, 3)
    (folder / "ape" / "02.png").write_bytes(b"")
    files = take(dataset, np.arange(6), 3, global_batch=10, images_per_item=5)
    for images, labels, _ in files:
        assert not labels.any() and len({image.tobytes() for image in images[:5]}) == 5
    assert "too many" in message(take, dataset, np.arange(6), 3, global_batch=6, images_per_item=6)


# ------------------------------------------------------------------------------------------ pixels to floats
def test_noise_is_each_images_own_and_of_its_kind():
    x = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    device = torch.device("cpu")

    def made(kind, sigma=0.0, indices=(0, 1, 2, 3), images=x):
        return dequantize(images, kind, sigma, image_generators(5, indices, device))

    for kind in ("gaussian", "uniform", "rgb"):
        np.testing.assert_array_equal(made(kind, 2.0)[2:3], made(kind, 2.0, (2,), x[2:3]))
    centre = (x.double() + 0.5) / 128 - 1
    np.testing.assert_array_equal(dequantize(x, "none", 9.0, None), centre.float())
    many = torch.full((400, 1, 8, 8), 100, dtype=torch.uint8)
    indices = range(400)
    eps = ((made("gaussian", 0.3, indices, many) + 1) * 128 - 100.5) / 128 / 0.3
    assert stats.kstest(eps.flatten(), "norm").pvalue > 1e-3
    u = (made("uniform", 7.0, indices, many) + 1) * 128 - 100
    assert stats.kstest(u.flatten(), "uniform").pvalue > 1e-3
    steps = (made("rgb", 3.0, indices, many) + 1) * 128 - 100
    whole = steps.floor()
    assert stats.kstest((steps - whole).flatten(), "uniform").pvalue > 1e-3
    assert abs(whole.mean()) < 0.1 and abs(whole.var() - 9 - 1 / 12) < 0.3  # rounding adds 1/12
    g = image_generators(5, [7], device)[0]
    eps, u = torch.randn(1, 8, 8, generator=g), torch.rand(1, 8, 8, generator=g)
    np.testing.assert_array_equal(made("rgb", 3.0, indices, many)[7], (100 + (3 * eps).round() + u) / 128 - 1)
    low = torch.zeros(400, 1, 8, 8, dtype=torch.uint8)
    assert made("rgb", 3.0, indices, low).min() < -1  # not clipped
    for kind, sigma in (("none", 0.0), ("uniform", 0.0), ("gaussian", 0.0), ("rgb", 0.0)):
        np.testing.assert_array_equal(quantize(made(kind, sigma)), x)
    assert "gaussian, uniform, rgb or none" in message(made, "gauss")


def test_digits_depend_on_seed_and_number(monkeypatch, capfd):
    whole = digits(20, 16, 3, 0)
    np.testing.assert_array_equal(digits(5, 16, 3, 0).array, whole.array[:5])
    assert whole.labels.tolist() == [*range(10), *range(10)] and whole.array.shape == (20, 16, 16, 3)
    assert not np.array_equal(digits(20, 16, 3, 1).array, whole.array)
    assert digits(3, 8, 1, 0).array.shape == (3, 8, 8, 1)
    assert "GiB" in message(digits, 4000, 2**20, 3, 0)
    monkeypatch.setattr(data, "Progress", lambda what, total: lambda done: print(what, done, total))
    digits(3, 17, 1, 0)
    assert "drawing digits of 17x17 3 3" in capfd.readouterr().out


# ------------------------------------------------------------------------------------------ fuzz
def mutated(content: bytes, rng) -> bytes:
    """Cut, with bytes changed, a part removed, doubled or zeroed."""
    raw = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        a, b = sorted(rng.integers(0, len(raw) + 1, 2))
        kind = rng.integers(6)
        if kind == 0:
            raw = raw[:b] or raw
        elif kind == 1:
            del raw[a:min(b, a + 40)]
        elif kind == 2:
            raw[a:a] = raw[a:min(b, a + 100)]
        elif kind == 3:
            raw[a:b] = bytes(b - a)
        for place in rng.integers(0, max(1, len(raw)), 6 if kind > 3 else 1):
            if len(raw):
                raw[place] = rng.integers(256)
    return bytes(raw)


def test_mutated_files_are_read_or_one_line(folder, tmp_path, capfd):
    rng = np.random.default_rng(0)
    batches, _ = small_cifar()
    one = {"data_batch_1.bin": binary(batches["data_batch_1"])}
    python = {b"data": planes(batches["data_batch_1"][0]), b"labels": [1, 2, 3]}
    array = rng.integers(0, 256, (4, 8, 8, 3), np.uint8)
    for name, save in (("a.npz", np.savez), ("packed.npz", np.savez_compressed)):
        save(tmp_path / name, images=array, labels=np.arange(4))
    np.savez(tmp_path / "flat.npz", data=planes(array), labels=np.arange(4))
    zip_of(folder, tmp_path / "set.zip")
    tar_of(one, tmp_path / "a.tar.gz")
    tar_of(one, tmp_path / "a.tar", "w")
    write_files(tmp_path / "idx", small_mnist()[0])
    write_files(tmp_path / "idxgz", packed(small_mnist()[0]))
    write_files(tmp_path / "py", {"data_batch_1": pickle.dumps(python, 2)})
    files = ["a.npz", "packed.npz", "flat.npz", "set.zip", "a.tar.gz", "a.tar", "idx/train-images-idx3-ubyte",
             "idx/train-labels-idx1-ubyte", "idxgz/train-images-idx3-ubyte.gz", "py/data_batch_1"]
    read = refused = 0
    for name in files:
        path = tmp_path / name
        whole = path.read_bytes()
        source = str(path.parent if path.parent != tmp_path else path)
        for _ in range(60):
            path.write_bytes(mutated(whole, rng))
            try:
                split = open_split(source, 4, 3, enlarge=True)
                take(split.data, split.indices, 1)
                read += 1
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 800
        path.write_bytes(whole)
        open_split(source, 4, 3)
    assert read > 50 and refused > 200
