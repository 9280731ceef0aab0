"""Sources of images, and batches of them. Claims:

- Pixels: every mode becomes right RGB; the crop is ADM's, of JPEGs too; more than 8 bits, broken
  and small images are one line that names all of them, before the first step.
- One folder layout, in folders and zips alike; whatever else is there is named or an error, with
  the command that brings it over where the format is known.
- Classes are those of the training images: by name where there are names, numbers never shifted
  and without gaps; a test split brings no others.
- A known name is always the named set; idx files and both of CIFAR-10's archives are read in every
  wrapping, without running their code.
- A model's own format may hold floats and vectors.
- The digest knows a set again wherever it lies.
- A batch, its order and its mirroring depend on (seed, step) alone; noise is each image's own.
- `prepare` gives the crops that training would have made, or nothing.
"""
import contextlib
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import tarfile
import threading
import unicodedata
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support import data
from support.cli import UserError
from support.data import (
    Images,
    batches,
    dequantize,
    hold_out,
    image_generators,
    labels_for,
    open_images,
    open_split,
    quantize,
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Each test runs in a folder of its own and does not see the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def picture(seed, width=10, height=8):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def write(*names):
    """A picture, or some text, under each name; the picture depends on the base name alone."""
    for name in names:
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        if name.lower().endswith((".png", ".jfif", ".avif", ".jp2")):
            picture(zlib.crc32(os.path.basename(name).encode())).save(name)
        else:
            Path(name).write_text("x")


def write_files(folder, files):
    os.makedirs(folder, exist_ok=True)
    for name, content in files.items():
        Path(folder, name).write_bytes(content)
    return str(folder)


def zipped(path, names):
    """A zip with a picture under each name, stored as it stands."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            info = zipfile.ZipInfo("x")
            info.filename = name
            content = io.BytesIO()
            picture(len(name)).save(content, "PNG")
            archive.writestr(info, content.getvalue())
    return path


def refused(call, *args, **kwargs):
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def first(source, *args, **options):
    return open_images(source, *args, **options)[0]


def found(source):
    """What a source holds, shortly: {class: number of images}, or their number without labels."""
    images = first(source)
    if images.labels is None:
        return len(images)
    counts = np.unique(images.labels, return_counts=True)[1].tolist()
    return dict(zip(images.names(), counts, strict=True))


# ----------------------------------------------------------------------------- pixels
def read(image, *args, ending="png", **options):
    os.makedirs(ending, exist_ok=True)
    image.save(f"{ending}/a.{ending}", **options)
    return first(ending, *args).array[0].astype(int)


def test_every_mode_becomes_right_rgb():
    image = picture(3)
    rgb, grey, bits = (np.asarray(image.convert(mode)) for mode in ("RGB", "L", "1"))
    palette = image.quantize(16)
    holes = np.where(np.asarray(palette)[..., None] == 5, 255, palette.convert("RGB"))
    clear = image.convert("RGBA")
    clear.paste((9, 9, 9, 0), (0, 0, 5, 8))
    white = rgb.copy()
    white[:, :5] = 255
    turned = Image.Exif()
    turned[274] = 6  # the camera was held on its side
    for saved, expected, options in (
            (image, rgb, {"icc_profile": bytes(2_000_000)}), (clear, white, {}),
            (image.convert("L"), grey[..., None].repeat(3, 2), {}),
            (image.convert("1"), bits[..., None].repeat(3, 2) * 255, {}),
            (palette, holes, {"transparency": 5}), (image, np.rot90(rgb, -1), {"exif": turned})):
        np.testing.assert_array_equal(read(saved, **options), expected)
    np.testing.assert_array_equal(read(image, 8, 1), grey[:, 1:9, None])  # luminance
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert abs(read(red, ending="jpg", quality=95) - [255, 0, 0]).max() < 12


def png16():
    """A PNG with 16 bits in each of three channels, which Pillow cuts to 8."""
    content = b"\x89PNG\r\n\x1a\n"
    rows = zlib.compress(bytes(49 * 8))
    for part in (b"IHDR" + struct.pack(">IIBB3x", 8, 8, 16, 2), b"IDAT" + rows, b"IEND"):
        content += struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
    return content


def test_more_than_8_bits_are_refused_by_name():
    write_files("deep", {
        "rgb.png": png16(), "grey.pgm": b"P5 8 8 4095\n" + bytes(128),
        "rgb.ppm": b"P6 8 8 65535\n" + bytes(384)})
    Image.fromarray(np.ones((8, 8), np.uint16)).save("deep/twelve.png")  # 12 bits in 16
    Image.fromarray(np.ones((8, 8), np.float32)).save("deep/float.tif")
    planes = io.BytesIO()
    picture(1).save(planes, "TIFF")
    planar = struct.pack("<HHI", 284, 3, 1)
    write_files("deep", {"planes.tif": planes.getvalue().replace(
        bytes([8, 0] * 3), bytes([16, 0] * 3)).replace(planar + b"\1", planar + b"\2")})
    text = refused(open_images, "deep", 8)
    assert "6 of 6 images cannot be used" in text and text.count("convert it to 8 bits") == 6
    assert all(name in text for name in os.listdir("deep"))
    header = struct.pack("<2sIIIIiiHHIIiiIIIII", b"BM", 194, 0, 66, 40, 8, 8, 1, 16, 3, 128, 1, 1,
                         0, 0, 0xF800, 0x7E0, 0x1F)  # 5 + 6 + 5 bits are not deep
    write_files("one", {"packed.bmp": header + struct.pack("<H", 0xF800) * 64})
    assert first("one").array[0, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("ending", ["avif", "jp2"])
def test_what_pillow_reads_is_an_image(ending):
    if f".{ending}" not in data.endings():
        pytest.skip(f"this Pillow does not read {ending}")
    write(f"d/a/1.{ending}", f"d/b/2.{ending.upper()}", "d/b/scan.h5", "d/a/clip.mpg", "d/b/f.eps")
    assert found("d") == {"a": 1, "b": 1}


def adm(image, size):
    """center_crop_arr of guided-diffusion, as it is published."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    arr = np.array(image)
    crop_y = (arr.shape[0] - size) // 2
    crop_x = (arr.shape[1] - size) // 2
    return arr[crop_y: crop_y + size, crop_x: crop_x + size]


@pytest.mark.parametrize("size", [(100, 72), (41, 33), (32, 90), (64, 64), (500, 375)])
def test_the_crop_is_adms_of_jpegs_and_arrays_too(size):
    image = picture(0, *size)
    np.savez("arrays.npz", images=np.asarray(image)[None])
    for source in ("png", "jpg"):
        read(image, ending=source)
        decoded = Image.open(f"{source}/a.{source}")
        np.testing.assert_array_equal(first(source, 32).array[0], adm(decoded, 32))
    np.testing.assert_array_equal(first("arrays.npz", 32).array[0], adm(image, 32))


def test_broken_and_small_images_are_all_named_before_the_first_step():
    write(*(f"d/{k}/{i}.png" for k in "ab" for i in range(20)))
    write_files("d", {"a/3.png": b"no image", "b/7.png": b""})
    small = picture(1, 20, 6)
    small.save("d/b/9.png")
    text = refused(open_images, "d", 8)
    assert "3 of 40 images" in text and "9.png (20x6 pixels, smaller" in text and "enlarge" in text
    assert all(name in text for name in ("a/3.png (cannot identify", "b/7.png", os.getcwd()))
    assert "2 of 40" in refused(open_images, "d", 8, enlarge=True)
    assert "9.png ((6, 20, 3) pixels" in refused(open_images, "d")  # as they are: of one size
    shutil.copy("d/a/1.png", "d/a/3.png")
    shutil.copy("d/a/1.png", "d/b/7.png")
    np.testing.assert_array_equal(first("d", 8, enlarge=True).array[39], adm(small, 8))
    write_files("many", {f"{i}.png": b"" for i in range(30)})
    assert "30 of 30" in (text := refused(open_images, "many", 8)) and len(text) < 1500


def test_the_first_words_come_before_any_decoding(capsys, monkeypatch):
    write("d/1.png", "d/2.png")
    seen = []
    monkeypatch.setattr(data, "to_rgb", lambda image: seen.append(capsys.readouterr().err) or 1 / 0)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        refused(open_images, "d", 8)
    assert seen[0].startswith("data: reading d") and not any(seen[2:]) and len(seen) == 4


def test_a_set_too_large_for_memory_is_the_command_that_prepares_it(monkeypatch):
    write("my set/a/1.png", "my set/b/1.png")
    monkeypatch.setattr(data.os, "sysconf", lambda name: 42)  # 1,764 bytes
    assert len(first("my set", 8)) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # processes share the memory
    text = refused(open_images, "my set", 8, enlarge=True)
    assert "prepare 'my set' OUT --image-size 8 --channels 3 --enlarge" in text and "GiB" in text


# ----------------------------------------------------------------------------- layouts
def test_folder_zip_and_npz_hold_the_same(capsys):
    write("d/ape/1.png", "d/ape/2.png", "d/bee/1.png", "d/bee/x.jfif", "d/ape/notes.txt")
    shutil.make_archive("z", "zip", "d")
    folder, archive = first("d"), first("z.zip")
    np.testing.assert_array_equal(folder.array[0], Image.open("d/ape/1.png"))
    np.savez("adm.npz", folder.array, folder.labels)
    np.savez_compressed("named.npz", images=folder.array, labels=folder.labels.astype(np.uint8))
    for images in (folder, archive, first("adm.npz"), first("named.npz")):
        np.testing.assert_array_equal(images.array, folder.array)
        assert images.labels.tolist() == [0, 0, 1, 1] and images.labels.dtype == np.int64
        assert images.classes == (["ape", "bee"] if images in (folder, archive) else None)
    assert folder.digest() == archive.digest()
    assert folder.summary() == f"4 images 10x8 in 2 classes (ape 2, bee 2), from {os.getcwd()}/d"
    assert capsys.readouterr().err.count("data: ignored: 1 .txt\n") == 2


@pytest.mark.parametrize("names, expected", [
    (["1.png", "2.PNG"], 2),  # flat: no labels
    (["top/in/1.png", "top/in/2.png"], 2),
    (["top/in/a/1.png", "top/in/b/2.png"], {"a": 1, "b": 1}),
    (["Train/a/1.png", "Train/b/1.png", "TEST/b/1.png"], {"a": 1, "b": 1}),
    (["train/1.png", "test/2.png"], 1),
    (["train/images/1.png", "test/images/2.png"], 1),
    (["train/images/1.png", "test/2.png"], 1),
    (["10/1.png", "9/1.png", "1/1.png"], {"1": 1, "9": 1, "10": 1}),
    (["00000/00000_1.png", "00001/00000_1.png"], {"00000": 1, "00001": 1}),  # GTSRB's classes
    (["train/1.png", "bus/1.png"], {"bus": 1, "train": 1}),  # a class called train
    (["a.zip/a/1.png", "a.zip/b/2.png"], {"a": 1, "b": 1}),
    (["a/1.png", "b/1.png", "annotations/dataset.json", "prepared/images.npy", "c/x.heic",
      "b/data_batch_1.bin"], {"a": 1, "b": 1}),  # beside images there are no tables
])
def test_layouts_that_are_read(names, expected):
    write(*(f"d/{name}" for name in names))
    for source in ("d", zipped("d2.zip", names)):
        assert str(found(source)) == str(expected)  # in this order


@pytest.mark.parametrize("names, words", [
    (["training/a/1.png", "training/b/1.png", "testing/a/1.png"], "training/a/ (1)"),
    (["train/1.png", "valid/1.png"], "train/ (1), valid/ (1)"),
    (["train/a/1.png", "train/b/1.png", "dev/a/1.png"], "dev/a/ (1), train/a/ (1)"),
    (["seg_train/seg_train/a/1.png", "seg_test/seg_test/a/1.png"], "seg_train/seg_train/a/ (1)"),
    (["train/1.png", "test/1.png", "assets/1.png"], "assets/ (1), test/"),
    (["train/1.png", "test/1.png", "dataset.json"], "./ (1), test/"),
    (["a/1.png", "b/deep/1.png"], "a/ (1), b/deep/ (1)"),
    (["a/1.png", "b/1.png", "stray.png"], "./ (1)"),
    (["00000/00000.png", "00000/00001.png", "01000/01000.png"], "mkdir OUT && find"),
    (["000/img0.png", "001/img1.png"], "parts of one set"),
    (["notes.txt", "a/table.csv"], "1 .csv, 1 .txt"),
    (["a/1.heic", "b/2.heic"], "format"),
    (["runs/a/log.jsonl", "runs/a/1.png"], "2 in runs of train.py"),
    (["MNIST/t10k-images-idx3-ubyte", "KMNIST/t10k-images-idx3-ubyte"], "KMNIST/ (1), MNIST/"),
    # a test split with other classes than the training images, or without
    (["train/a/1.png", "train/b/1.png", "test/1.png"], "holds a, b, but"),
    (["train/a/1.png", "train/b/1.png", "test/images/1.png"], "holds images; expected the same"),
    (["train/train/1.png", "test/test/1.png"], "holds train, but"),
    (["train/cat/1.png", "train/dog/1.png", "val/Cat/1.png"], "holds Cat"),
    (["train/1.png", "test/a/1.png", "test/b/1.png"], "no classes, but"),
    (["train/0/1.png", "train/1/1.png", "test/0/1.png", "test/4/1.png"], "holds 0, 4;"),
])
def test_layouts_that_are_refused_show_what_was_found(names, words):
    write(*(f"d/{name}" for name in names))
    text = refused(open_images, "d")
    assert words in text and ("expected" in text or "OUT" in text), text


@pytest.mark.parametrize("form", ["{}\\{}.png", "/home/u/data/{}/{}.png", "./{}/{}.png",
                                  "C:\\x\\{}\\{}.png", "images/SET//{}/./{}.png"])
def test_zips_of_any_tool_are_folders(form):
    zipped("a.zip", [form.format(k, i) for k in "ab" for i in range(2)] + ["__MACOSX/._1.png"])
    assert found("a.zip") == {"a": 2, "b": 2} and first("a.zip").array.shape == (4, 8, 10, 3)


def test_what_systems_and_runs_leave_behind_is_no_data(capsys):
    write("a/1.png", "a/Thumbs.db", "b/1.png", "b/.x.png", "b/_DSC1.png", "@eaDir/t.png",
          "__MACOSX/a/1.png", "$RECYCLE.BIN/1.png", ".git/x.png", "runs/tiny/ckpt.pt",
          "runs/tiny/samples.png", "runs/tiny/deep/2.png", "empty/readme.md", "a/LICENSE")
    assert found(".") == {"a": 1, "b": 1}
    said = capsys.readouterr().err
    for words in ("7 hidden", "3 in runs of train.py", "1 .md", "1 without ending"):
        assert words in said
    before = first(".").digest()
    write("runs/second/log.jsonl", "runs/second/samples.png")
    assert first(".").digest() == before
    assert "3 in runs" in refused(open_images, "runs/tiny")


def test_of_test_and_val_the_one_with_the_training_classes_is_used(capsys):
    write(*(f"d/{split}/{k}/1.png" for split in ("train", "test", "val") for k in "ab"))
    assert open_images("d")[1].path.endswith("d/test")
    assert f"test images: {os.getcwd()}/d/test" in capsys.readouterr().err
    os.renames("d/test/a/1.png", "d/test/images/1.png")
    images, test = open_images("d")  # test/images is no class
    assert test.path.endswith("d/val") and len(test) == 2 and images.classes == ["a", "b"]
    assert first("d:test").path.endswith("d/val") and open_images("d:train")[1] is None
    assert "write d/train:train" in refused(open_images, "d/train:test")
    shutil.rmtree("d/val")
    assert ":train" in refused(open_images, "d")
    assert found("d:train") == {"a": 1, "b": 1}


def test_names_that_cannot_be_printed_are_escaped_and_one_name_is_one_class():
    name = os.fsdecode(b"caf\xe9")
    two = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    write(f"d/train/{name}/1.png", f"d/train/{two[0]}/1.png", f"d/test/{two[1]}/1.png",
          f"{name}/a/b/1.png", f"{name}/c/1.png")
    images, test = open_images("d")
    assert images.classes == ["caf\\xe9", "é"] and test.labels.tolist() == [1]
    images.summary().encode()
    Path(f"d/train/{name}/2.png").write_bytes(b"")
    for source in ("d", f"d/train/{name}", name):
        refused(open_images, source).encode()


def test_links_are_followed_but_not_in_circles():
    write("real/1.png", "real/2.png")
    os.mkdir("d")
    for link in ("d/a", "d/b", "real/again"):
        os.symlink(os.path.abspath("real"), link)
    assert found("d") == {"a": 2, "b": 2} and found("real") == 2


# ----------------------------------------------------------------------------- labels
def numbered(labels, name="a.npz"):
    np.savez(name, images=np.zeros((len(labels), 8, 8, 3), np.uint8), labels=np.array(labels))
    return name


@pytest.mark.parametrize("source, classes, num_classes, expected", [
    ("all", ["x", "y", "z"], 3, [0, 2]),
    ("all", ["z", "w", "x"], 3, [2, 0]),
    ("one", ["x", "y", "z"], 3, [2]),  # a single folder is its class
    ("all", ["x", "y"], 2, "model does not have: z; expected x, y;"),
    ("all", [], 3, "x, z; expected 0, 1, 2;"),
    ("all/x", ["x"], 1, "no labels"),
    ("all", ["x"], 0, None),
    ("int", [], 4, [1, 3]),  # folders with numbers are numbers
    ("a.npz", [], 4, [1, 3, 2]),  # which are never shifted
    ("a.npz", ["a", "b", "c", "d"], 4, [1, 3, 2]),
    ("a.npz", None, 3, "model does not have: 3"),
])
def test_labels_of_a_trained_model_go_by_name(source, classes, num_classes, expected):
    write("all/x/1.png", "all/z/1.png", "one/z/1.png", "int/1/1.png", "int/3/1.png")
    numbered([1, 3, 2])
    if isinstance(expected, str):
        assert expected in refused(labels_for, first(source), classes, num_classes)
        return
    images = labels_for(first(source), classes, num_classes)
    assert expected == (None if images.labels is None else images.labels.tolist())
    assert images.classes == (classes if classes and num_classes else None)


@pytest.mark.parametrize("labels, flag, expected", [
    ([0, 2, 1], None, 3), ([0, 2, 2], 3, 3), ([0, 1], 5, 5), ([1, 2], 4, 4), ([5, 7], 0, 0),
    ([0, 217, 491], None, "--num-classes 492"), ([0, 2, 2], None, "without gaps"),
    ([1, 2, 3], None, "subtract 1"), ([0, 5], 4, "expected 0, 1, 2, 3;"),
    ("abb", None, 2), ("ab", 5, "2 classes (a, b), expected 5"), ("aa", None, 0),
    ("aa", 4, "no labels"),
])
def test_each_class_has_an_image_unless_a_flag_says_how_many_there_are(labels, flag, expected):
    names = isinstance(labels, str)
    source = "d" if names else numbered(labels)
    write(*(f"d/{k}/{i}.png" for i, k in enumerate(labels)))
    if isinstance(expected, str):
        assert expected in refused(open_split, source, 8, 3, num_classes=flag)
        return
    split = open_split(source, 8, 3, num_classes=flag)
    assert split.num_classes == expected and split.classes == (["a", "b"] * (labels == "abb"))


def test_a_class_that_has_lost_its_images_is_an_error():
    os.mkdir("d")
    np.save("d/images.npy", np.zeros((2, 8, 8, 3), np.uint8))
    np.save("d/labels.npy", [0, 1])
    Path("d/classes.json").write_text('["a", "b", "c"]')
    assert "classes (a, b), expected 3" in refused(open_split, "d", 8, 3)
    assert open_split("d", 8, 3, num_classes=3).classes == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["y", "arr_0"])
def test_an_array_that_may_be_labels_is_not_dropped(name, capsys):
    pixels, y = np.zeros((4, 8, 8), np.uint8), np.arange(4)
    os.mkdir("d")
    np.save("d/images.npy", pixels)
    for labels in (y, y + 0.0):
        np.savez("a.npz", images=pixels, **{name: labels})
        np.save(f"d/{name}.npy", labels)
        for source in ("a.npz", "d"):
            assert f"array {name}" in refused(open_images, source)
    np.savez("a.npz", images=pixels, labels=y, **{name: y + 0.5}, mu=np.zeros(7))  # scores
    assert first("a.npz").labels.tolist() == [0, 1, 2, 3]
    said = capsys.readouterr().err
    assert f"ignored: array {name}\n" in said and "ignored: array mu\n" in said
    np.savez("a.npz", pixels, labels=y)
    assert first("a.npz").labels.tolist() == [0, 1, 2, 3]


def test_files_of_other_content_are_refused():
    write("a.png", "a.txt")
    for name in ("a.png", "a.txt"):
        assert "is no folder" in refused(open_images, name)
    for arrays, words in (({"pictures": np.zeros(3)}, "holds pictures"),
                          ({"images": np.array([print, None], dtype=object)}, "a.npz"),
                          ({"images": np.zeros((4, 8, 8, 3), np.float32)}, "float32 (4, 8, 8, 3)")):
        np.savez("a.npz", **arrays)
        assert words in refused(open_images, "a.npz")


@pytest.mark.parametrize("labels, expected", [
    ([3, 0, 1, 3], {"0": 1, "1": 1, "3": 2}), (None, 4), ([3, 0, 1], "dataset.json"),
    (5, "dataset.json"), ([[0.5]] * 4, "dataset.json"),
])
def test_dataset_json_gives_the_labels(labels, expected):
    names = [f"{i // 2:05d}/img{i:08d}.png" for i in range(4)]
    write(*(f"w/train/{name}" for name in names))
    pairs = [*zip(names, labels, strict=False)][::-1] if isinstance(labels, list) else labels
    Path("w/train/dataset.json").write_text(json.dumps({"labels": pairs}))
    shutil.make_archive("z", "zip", "w/train")
    shutil.copytree("w", "both")
    shutil.copytree("w/train", "both/test")
    for source in ("w", "z.zip", "both"):
        if isinstance(expected, str):
            assert expected in refused(open_images, source)
        else:
            assert found(source) == expected
    shutil.rmtree("w/train/00001")
    if isinstance(expected, dict):
        images = first("w")  # a single shard
        assert images.labels.tolist() == [3, 0] and images.classes is None


# ----------------------------------------------------------------------------- other formats
def shell(text):
    """Runs the command that an error gives in round brackets."""
    shutil.rmtree("OUT", ignore_errors=True)
    subprocess.run(re.search(r"\(((mkdir|python|find) .*)\)", text)[1], shell=True, check=True)


def test_the_command_of_an_error_brings_known_formats_over():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    y = np.arange(6) % 3
    keras = {"x_train": pixels, "y_train": y[:, None], "x_test": pixels[:3], "y_test": y[:3]}
    medmnist = {"train_images": pixels, "train_labels": y[:, None],
                "test_images": pixels[:3], "test_labels": y[:3]}
    imagenet = {"data": pixels.transpose(0, 3, 1, 2).reshape(6, -1), "labels": y + 1,
                "mean": np.zeros(192)}
    for name, arrays in (("k", keras), ("m", medmnist), ("train_data_batch_1", imagenet)):
        np.savez(f"{name}.npz", **arrays)
        shell(refused(open_images, f"{name}.npz"))
        images, test = open_images("OUT")
        np.testing.assert_array_equal(images.array, pixels)
        assert images.labels.tolist() == y.tolist()
        assert name.startswith("train") or test.labels.tolist() == [0, 1, 2]


def test_the_command_of_an_error_unpacks():
    write("shards/00000/00000.png", "shards/00000/00001.png", "shards/00001/00002.png")
    os.mkdir("tars")
    for path in ("x.tar", "x.tar.gz", "tars/0.tar"):
        with tarfile.open(path, "w:gz" if path.endswith("gz") else "w") as archive:
            archive.add("shards/00000")
    shutil.make_archive("zips/z", "zip", "shards/00000")
    for source, count in (("x.tar", 2), ("x.tar.gz", 2), ("tars", 2), ("zips", 2), ("shards", 3)):
        shell(refused(open_images, source))
        assert found("OUT") == count
    shutil.make_archive("z", "zip", "shards")
    assert "(unzip -j" in refused(open_images, "z.zip")
    assert "pandas" in refused(open_images, write_files("p", {"train-0.parquet": b"PAR1"}))


# ----------------------------------------------------------------------------- named sets
def small_mnist():
    """{file: content} of 12 and 5 images of 6x5, and [(images, labels)] of both splits."""
    rng, files, arrays = np.random.default_rng(0), {}, []
    for prefix, n in (("train", 12), ("t10k", 5)):
        arrays.append((rng.integers(0, 256, (n, 6, 5), np.uint8), np.arange(n, dtype=np.uint8) % 4))
        for kind, array in zip(("images", "labels"), arrays[-1], strict=True):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            files[f"{prefix}-{kind}-idx{array.ndim}-ubyte"] = header + array.tobytes()
    return files, arrays


def packed_mnist():
    return {name + ".gz": gzip.compress(content) for name, content in small_mnist()[0].items()}


NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
RECORDS = np.random.default_rng(0).integers(0, 10, (6, 3, 3073), np.uint8)
RECORDS[5, :, 0] = RECORDS[0, :, 0]


class Python2(pickle._Pickler):
    """Writes bytes as Python 2 did, and so as CIFAR-10's files have them."""

    def save_bytes(self, obj):
        self.write(pickle.BINSTRING + struct.pack("<i", len(obj)) + obj)

    dispatch = pickle._Pickler.dispatch | {bytes: save_bytes}


def small_cifar(kind="binary"):
    """{file: content} of CIFAR-10's batches, 3 images each, binary or pickled."""
    if kind == "binary":
        return {f"{name}.bin": r.tobytes() for name, r in zip(NAMES, RECORDS, strict=True)}
    files = {}
    for name, records in zip(NAMES, RECORDS, strict=True):
        file = io.BytesIO()
        Python2(file, 2).dump({b"labels": records[:, 0].tolist(), b"data": records[:, 1:]})
        files[name] = file.getvalue()
    return files


def tar_of(folder, path):
    with tarfile.open(path, "w:gz") as archive:
        for name in sorted(os.listdir(folder), reverse=True):  # the order must not matter
            archive.add(f"{folder}/{name}")
    return path


def test_idx_files_in_every_wrapping():
    files, arrays = small_mnist()
    wrappings = {
        "plain": files, "root/MNIST/raw": packed_mnist() | files | {"old.pt": b"x"},
        "dots": {name.replace("-idx", ".idx"): body for name, body in files.items()},
        "unpacked on the way": {name + ".gz": body for name, body in files.items()}}
    for folder, contents in wrappings.items():
        write_files(folder, contents)
    shutil.make_archive("z", "zip", "plain")
    for source in (*wrappings, "root", "z.zip"):
        for opened, (images, labels) in zip(open_images(source), arrays, strict=True):
            np.testing.assert_array_equal(opened.array[..., 0], images)
            np.testing.assert_array_equal(opened.labels, labels)
    name = "train-images-idx3-ubyte"
    good = files[name]
    for content in (b"", good + b"x", b"\0\0\x0d" + good[3:], gzip.compress(good)[:-20]):
        assert name in refused(open_images, write_files("bad", files | {name: content}))
    write_files("test only", {name: body for name, body in files.items() if "t10k" in name})
    assert "write test only:test" in refused(open_images, "test only")
    assert len(first("test only:test")) == 5
    os.remove("plain/train-labels-idx1-ubyte")
    assert "train-labels" in refused(open_images, "plain")


@pytest.mark.parametrize("kind", ["binary", "Python"])
def test_both_of_cifars_archives_in_every_wrapping_and_all_of_them(kind):
    files = small_cifar(kind)
    write_files("root/cifar-10-batches", files | {"readme.html": b"x", "batches.meta": b"x"})
    tar_of("root/cifar-10-batches", "a.tar.gz")
    pixels = RECORDS[:, :, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    for source in ("root", "a.tar.gz"):
        images, test = open_images(source)
        np.testing.assert_array_equal(np.concatenate([images.array, test.array]), pixels)
        assert [*images.labels, *test.labels] == RECORDS[:, :, 0].flatten().tolist()
        assert images.classes[3] == "cat"
    part = write_files("part", dict([*files.items()][2:]))
    assert "3 of CIFAR-10's 5" in refused(open_images, part)
    bad = write_files("bad", dict.fromkeys(files, b"x" * 3000))
    assert "bad" in refused(open_images, bad)


class Code:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_a_pickle_that_holds_code_runs_none_of_it():
    for code in (Code(), functools.partial(os.mkdir, "owned")):
        files = dict.fromkeys(NAMES, pickle.dumps({b"labels": [0], b"data": code}))
        assert "no array" in refused(open_images, write_files("py", files))
        assert not os.path.exists("owned")


@pytest.fixture
def remote(monkeypatch, tmp_path):
    """A folder with small sets, known as if it were the place where the real ones are."""
    folder = write_files(tmp_path / "remote", packed_mnist())
    cifar = tar_of(write_files(tmp_path / "cifar", small_cifar()), "cifar-10-binary.tar.gz")
    os.rename(cifar, f"{folder}/{cifar}")
    for name, files in (("mnist", [*packed_mnist()]), ("cifar10", [cifar])):
        sums = {f: hashlib.sha256(Path(folder, f).read_bytes()).hexdigest() for f in files}
        known = data.Known(f"file://{folder}/", sums, data.KNOWN[name].classes)
        monkeypatch.setitem(data.KNOWN, name, known)
    return Path(folder)


def test_sets_by_name_are_downloaded_once(remote, tmp_path):
    images, test = open_images("mnist")
    assert images.path == "mnist" and images.classes[3] == "3"
    np.testing.assert_array_equal(test.array[..., 0], small_mnist()[1][1][0])
    assert sorted(os.listdir(tmp_path / "cache/farmer/mnist")) == sorted(packed_mnist())
    archive = (remote / "cifar-10-binary.tar.gz").read_bytes()
    write_files(remote, {"cifar-10-binary.tar.gz": archive[:-9]})
    text = refused(open_images, "cifar10")
    assert "sha256" in text and f"put cifar-10-binary.tar.gz into {tmp_path}/cache" in text
    assert os.listdir(tmp_path / "cache/farmer/cifar10") == []  # nothing is left
    shutil.rmtree(remote)
    write_files(tmp_path / "cache/farmer/cifar10", {"cifar-10-binary.tar.gz": archive})
    assert len(first("mnist")) == 12 and first("cifar10:test").classes[3] == "cat"


def test_without_a_home_folder_only_named_sets_are_out_of_reach(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    write("d/1.png")
    assert found("d") == 1
    assert "XDG_CACHE_HOME" in refused(open_images, "mnist")


def test_a_known_name_is_the_named_set_and_a_path_has_a_separator(monkeypatch, capsys, remote):
    draw = data.digits
    monkeypatch.setattr(data, "digits", lambda n, *rest, seed: draw(n // 100, *rest, seed))
    write("digits/a/1.png", "digits/b/1.png", "mnist/1.png", "d/1.png", "set:test/1.png")
    images, test = open_images("digits", 8)
    assert len(images) == 40 and images.classes[3] == "3"
    for part, seed in ((images, 0), (test, 1), (first("digits:test", 8), 1)):
        np.testing.assert_array_equal(part.array[:3], draw(3, 8, 3, seed).array)
    assert (draw(3, 8, 3, 0).array != draw(3, 8, 3, 1).array).any()
    assert "write ./digits" in capsys.readouterr().err
    assert len(first("mnist")) == 12
    for source, expected in (("./digits", {"a": 1, "b": 1}), ("./mnist", 1), ("set:test", 1)):
        assert found(source) == expected
    for name in ("", "nothing", "mnist:val", ":test"):
        assert "expected digits" in refused(open_images, name)
    assert "size" in refused(open_images, "digits")


def test_a_source_is_kept_as_an_absolute_path():
    write("d/train/1.png", "d/test/1.png")
    for source in ("d", "d:train", "./d:test"):
        assert data.absolute(source) == os.path.realpath("d") + source.removeprefix("./")[1:]
    for source in ("digits", "mnist:test", "", "x.own"):
        assert data.absolute(source) == source


# ----------------------------------------------------------------------------- own formats
def latents():
    """12 images of 4 channels in floats, with vectors as labels."""
    rng = np.random.default_rng(0)
    array = rng.standard_normal((12, 8, 8, 4)).astype(np.float32)
    return Images("own", array, rng.standard_normal((12, 3)).astype(np.float32))


def test_a_models_own_format_comes_first_and_may_hold_floats_and_vectors():
    whole = latents()
    sources = {"both": hold_out(whole, 2), "alone": whole}
    split = open_split("both", 8, 4, own=sources.get)
    assert split.is_test and split.classes == [] and split.num_classes == 0
    images, labels = split.held_out.batch([1, 0])
    np.testing.assert_array_equal(images, whole.array[[11, 10]].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(labels, whole.labels[[11, 10]])
    assert "10 images 8x8 with vectors" in split.summary and "2 test images" in split.summary
    held = open_split("alone", 8, 4, holdout=3, own=sources.get)
    assert held.held_out.numbers.tolist() == [9, 10, 11] and held.digest == whole.digest()
    resumed = open_split("alone", 8, 4, classes=[], num_classes=0, own=sources.get)
    assert resumed.train.labels.shape == (12, 3)
    assert "(16, 16, 4)" in refused(open_split, "alone", 16, 4, own=sources.get)


@pytest.mark.parametrize("array, labels", [
    (np.zeros((2, 3, 8, 8), np.uint8), None), (np.zeros((2, 8, 8, 4)), None),
    (np.zeros((2, 8, 8), np.float32), None), (np.zeros((0, 8, 8, 3), np.uint8), None),
    *((np.zeros((3, 8, 8, 1), np.uint8), labels) for labels in (
        [0, 1], [0, 1, -1], [0.0, 1.0, 2.0], [[0], [1], [2]], [0, 1, 3], np.zeros((3, 4)),
        np.zeros(3, np.float32))),
])
def test_arrays_that_do_not_fit_are_refused(array, labels):
    text = refused(Images, "own", array, labels, list("abc"))
    assert text.startswith("own: ") and "expected" in text


# ----------------------------------------------------------------------------- which set it is
def test_the_digest_sees_classes_labels_and_pixels_but_not_the_place():
    write("d/a/1.png", "d/a/2.png", "d/b/3.png")
    shutil.copytree("d", "elsewhere/deep/d")
    assert first("elsewhere").digest() == first("d").digest()
    pixels, labels = np.zeros((3, 8, 8, 1), np.uint8), [0, 1, 0]
    many = np.zeros((1000, 2, 2, 1), np.uint8)
    early = many.copy()
    early[:500] = 1
    late = early.copy()
    late[-1] = 1
    whole = latents()
    others = [
        (pixels, labels), (pixels + 1, labels), (pixels, [0, 1, 1]), (pixels, None),
        (pixels, labels, ["a", "b"]), (pixels, labels, ["a", "c"]),
        (pixels.reshape(3, 4, 16, 1), labels), (whole.array, whole.labels),
        (whole.array + 1, whole.labels), (whole.array, whole.labels + 1),
        (many,), (early,), (late,)]
    assert len({Images("x", *other).digest() for other in others}) == len(others)


# ----------------------------------------------------------------------------- what a run uses
def test_the_hold_out_is_the_last_of_each_class():
    array = np.arange(9, dtype=np.uint8).reshape(9, 1, 1, 1)
    images = Images("x", array, np.array([1, 0, 1, 0, 1, 0, 3, 1, 3]))
    train, held = hold_out(images, 1)
    assert held.numbers.tolist() == [5, 7, 8] and train.numbers.tolist() == [0, 1, 2, 3, 4, 6]
    assert held.batch([1, 0])[0].flatten().tolist() == [7, 5] and held.labels.tolist() == [0, 1, 3]
    assert held.array is array  # no pixels are copied
    assert hold_out(train.part([0, 2, 4]), 1)[1].numbers.tolist() == [4]
    assert "2 of class 3" in refused(hold_out, images, 2)


def test_evaluation_gets_the_hold_out_or_else_the_test_split():
    write(*(f"both/train/ape/{i}.png" for i in range(5)), "both/test/ape/9.png",
          *(f"both/train/bee/{i}.png" for i in range(4)), "both/test/bee/8.png")
    split = open_split("both", 8, 3, classes=["bee", "cow", "ape"], num_classes=3)
    assert split.is_test and split.classes == ["bee", "cow", "ape"]
    assert split.train.labels.tolist() == [2] * 5 + [0] * 4  # those of a trained model
    assert split.held_out.labels.tolist() == [2, 0]
    assert "9 images 8x8 in 2 classes (bee 4, ape 5), 2 test images, from" in split.summary
    held = open_split("both", 8, 3, holdout=1)
    assert held.held_out.numbers.tolist() == [4, 8] and held.held_out.labels.tolist() == [0, 1]
    assert "7 images" in held.summary and "2 held-out images" in held.summary
    assert not held.is_test and held.digest == split.digest
    alone = open_split("both:train", 8, 3)
    assert alone.held_out is None and not alone.is_test


# ----------------------------------------------------------------------------- batches
ELEVEN = Images("x", np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), np.uint8),
                np.arange(11) // 6)


def take(images, n, **options):
    """Images, labels and uid of the first n batches, each as one array."""
    defaults = {"batch_size": 8, "start_step": 0, "seed": 3, "flip": True}
    with contextlib.closing(batches(images, **(defaults | options))) as stream:
        found = [[t.numpy() for t in batch] for batch in itertools.islice(stream, n)]
    return [np.concatenate(arrays) for arrays in zip(*found, strict=True)]


def same(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_a_batch_is_that_of_the_rule_whatever_the_start_and_the_world():
    images, labels = (t.numpy() for t in ELEVEN.batch(range(11)))
    order = np.concatenate([np.random.default_rng([3, k]).permutation(11) for k in range(6)])[:56]
    coins = np.concatenate([np.random.default_rng([3, k, 1]).random(11) for k in range(6)])[:56]
    mirrored = np.where(coins[:, None, None, None] < 0.5, images[order, ..., ::-1], images[order])
    whole = take(ELEVEN, 7)
    same(whole, [mirrored, labels[order], np.arange(56)])
    same(take(ELEVEN, 4, start_step=3), [array[24:] for array in whole])
    same(take(ELEVEN, 2, batch_size=28), whole)  # over the ends of several epochs
    for world in (2, 4):
        for rank in range(world):
            mine = [g for g in range(56) if g % 8 * world // 8 == rank]
            same(take(ELEVEN, 7, rank=rank, world=world), [array[mine] for array in whole])
    np.testing.assert_array_equal(take(ELEVEN, 7, flip=False)[0], images[order])
    assert "--batch-size" in refused(take, ELEVEN, 1, world=3)


def test_a_models_epoch_order_replaces_the_permutation():
    def second_class(labels, generator):
        return torch.where(labels == 1)[0][torch.randperm(5, generator=generator)]

    generators = image_generators(3, range(3), torch.device("cpu"))  # of (seed, epoch)
    places = torch.cat([second_class(torch.tensor(ELEVEN.labels), g) for g in generators])
    found = take(ELEVEN, 3, epoch_order=second_class, flip=False, batch_size=5)
    same(found[:2], [part.numpy() for part in ELEVEN.batch(places)])


def test_a_thread_reads_one_step_ahead_and_ends_with_the_batches(monkeypatch):
    before = threading.active_count()
    read = []
    batch = Images.batch
    monkeypatch.setattr(Images, "batch", lambda images, places: (
        read.append(threading.current_thread()), batch(images, places))[1])
    stream = batches(ELEVEN, batch_size=4, start_step=0, seed=0)
    next(stream)
    assert threading.active_count() == before + 1
    next(stream)
    stream.close()
    assert threading.active_count() == before and len(read) == 3
    assert threading.main_thread() not in read


# ----------------------------------------------------------------------------- floats
def drawn(generator, law):
    return law(1, 8, 8, generator=generator)


@pytest.mark.parametrize("kind, by_hand", [
    ("gaussian", lambda x, draw: (x + 0.5) / 128 - 1 + 3 * draw(torch.randn)),
    ("uniform", lambda x, draw: (x + draw(torch.rand)) / 128 - 1),
    ("rgb", lambda x, draw: (x + (3 * draw(torch.randn)).round() + draw(torch.rand)) / 128 - 1),
    ("none", lambda x, draw: (x + 0.5) / 128 - 1),
])
def test_noise_is_each_images_own_and_of_its_kind(kind, by_hand):
    generators = functools.partial(image_generators, 5, [7, 8, 7, 9], torch.device("cpu"))
    x = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    for i, noisy in enumerate(dequantize(x, kind, 3.0, generators())):
        draw = functools.partial(drawn, generators()[i])
        assert torch.equal(by_hand(x[i].float(), draw), noisy)
    assert torch.equal(quantize(dequantize(x, kind, 0.0, generators())), x)


def test_floats_keep_their_units():
    z = torch.randn(1, 4, 8, 8)
    one, again = (image_generators(5, [7], torch.device("cpu")) for _ in range(2))
    added = 3 * torch.randn(4, 8, 8, generator=again[0])
    assert torch.equal(dequantize(z, "gaussian", 3.0, one), z + added)
    assert torch.equal(dequantize(z, "none", 3.0, None), z)
    for kind in ("uniform", "rgb"):
        assert "floats" in refused(dequantize, z, kind, 3.0, one)
    assert "gaussian, uniform, rgb, none" in refused(dequantize, z.byte(), "gauss", 3.0, one)


def test_generators_depend_on_seed_and_number_alone():
    seeds = [g.initial_seed() for seed in (5, 6)
             for g in image_generators(seed, [7, 8, 7], torch.device("cpu"))]
    assert len(set(seeds)) == 4 and seeds[0] == seeds[2]


# ----------------------------------------------------------------------------- prepare
def prepare(*argv):
    data.main(["prepare", *map(str, argv)])


@pytest.mark.parametrize("channels", [1, 3])
def test_prepare_gives_the_crops_of_training(channels, capsys):
    write(*(f"d/Train/{k}/{i}.png" for k in ("ape", "bee") for i in range(5)), "d/val/bee/8.png")
    prepare("d", "d/out", "--image-size", 4, "--channels", channels)
    assert "data: 10 images 4x4 in 2 classes" in capsys.readouterr().out
    files, made = (open_split(source, 4, channels) for source in ("d", "d/out"))
    assert isinstance(made.train.array, np.memmap) and made.is_test
    assert made.classes == files.classes and made.digest == files.digest
    same(take(made.train, 5), take(files.train, 5))
    same(made.held_out.batch([0]), files.held_out.batch([0]))
    assert type(open_split("d/out", 4, channels, holdout=1).train.array) is np.memmap
    assert "out exists" in refused(prepare, "d", "d/out", "--image-size", 4)
    assert first("d/out", 2, channels).array.shape == (10, 2, 2, channels)


def test_prepare_keeps_numbers_and_writes_only_what_there_is():
    prepare(numbered([1, 0, 1]), "deep/plain", "--image-size", 8)
    assert sorted(os.listdir("deep/plain")) == ["images.npy", "labels.npy"]
    assert open_split("deep/plain", 8, 3).train.labels.tolist() == [1, 0, 1]
    write("in/bee/8.png")
    prepare("in", "flat", "--image-size", 8)
    assert os.listdir("flat") == ["images.npy"]
    prepare("in", "large", "--image-size", 99, "--enlarge")
    assert first("large").array.shape == (1, 99, 99, 3)
    shutil.make_archive("z", "zip", "flat")
    assert "unpack" in refused(open_images, "z.zip")


def test_prepare_names_all_broken_images_and_leaves_nothing():
    write(*(f"both/{split}/{i}.png" for split in ("train", "test") for i in range(5)))
    write_files("both/test", {"2.png": b"no image", "4.png": b""})
    assert "2 of 5" in refused(prepare, "both", "out", "--image-size", 8)
    assert os.listdir() == ["both"]
