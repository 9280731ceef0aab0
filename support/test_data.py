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
from scipy import stats

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
    return tmp_path / "here"


def picture(seed, width=10, height=8, mode="RGB"):
    """A smooth picture, different for each seed."""
    y, x = np.mgrid[:height, :width]
    red, green = 128 + 100 * np.sin(seed + x / 3), 128 + 100 * np.cos(seed * 2 + y / 4)
    rgb = np.stack([red, green, 20 * (seed % 12) + x + y], -1)
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).convert(mode)


def write(*names):
    """A picture, or some text, under each name; the picture depends on the base name alone."""
    for name in names:
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        if name.lower().endswith((".png", ".jfif", ".avif", ".jp2")):
            picture(zlib.crc32(os.path.basename(name).encode()) % 1000).save(name)
        else:
            Path(name).write_text("x")


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
def read(image, name, *args, **options):
    image.save(name, **options)
    os.makedirs("alone", exist_ok=True)
    shutil.move(name, f"alone/{name}")
    try:
        return first("alone", *args).array[0].astype(int)
    finally:
        shutil.rmtree("alone")


def test_every_mode_becomes_right_rgb():
    rgb, grey = np.asarray(picture(3)).astype(int), np.asarray(picture(3, mode="L")).astype(int)
    np.testing.assert_array_equal(read(picture(3), "rgb.png"), rgb)
    grey_rgb = read(picture(3, mode="L"), "grey.png")
    np.testing.assert_array_equal(grey_rgb, grey[..., None].repeat(3, 2))
    luminance = read(picture(3), "rgb.png", 8, 1)
    np.testing.assert_array_equal(luminance, grey[:, 1:9, None])
    palette = picture(3).quantize(16)
    holes = np.where(np.asarray(palette)[..., None] == 5, 255, np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(read(palette, "holes.png", transparency=5), holes)
    clear = picture(3).convert("RGBA")
    left = np.arange(10) < 5
    clear.putalpha(Image.fromarray(np.where(left, 0, 255).astype(np.uint8)[None].repeat(8, 0)))
    np.testing.assert_array_equal(read(clear, "clear.png"), np.where(left[:, None], 255, rgb))
    bits = picture(3, mode="1")
    np.testing.assert_array_equal(read(bits, "bits.png")[..., 1], np.asarray(bits) * 255)
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert abs(read(red, "cmyk.jpg", quality=95) - [255, 0, 0]).max() < 12
    turned = Image.Exif()
    turned[274] = 6  # the camera was held on its side
    np.testing.assert_array_equal(read(picture(3), "turned.png", exif=turned), np.rot90(rgb, -1))
    large = read(picture(3), "icc.png", icc_profile=bytes(2_000_000))
    np.testing.assert_array_equal(large, rgb)


def png16(kind, channels):
    """A PNG with 16-bit channels, which Pillow cuts to 8 for some kinds of colour."""
    rows = zlib.compress(b"".join(b"\0" + bytes([9, 90] * channels * 8) for _ in range(8)))
    header = struct.pack(">IIBBBBB", 8, 8, 16, kind, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for part in (b"IHDR" + header, b"IDAT" + rows, b"IEND"):
        content += struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
    return content


def test_more_than_8_bits_are_refused_by_name():
    tiff = io.BytesIO()
    picture(1).save(tiff, "TIFF")
    wide = Image.fromarray((np.arange(64) * 60).reshape(8, 8).astype(np.uint16))  # 12 bits in 16
    grey = io.BytesIO()
    wide.save(grey, "TIFF")
    photometric, planar = (struct.pack("<HHI", tag, 3, 1) for tag in (262, 284))
    write_files("deep", {
        "grey.png": png16(0, 1), "rgb.png": png16(2, 3), "clear.png": png16(6, 4),
        "planes.tif": tiff.getvalue().replace(bytes([8, 0] * 3), bytes([16, 0] * 3)).replace(
            planar + bytes([1]), planar + bytes([2])),
        "white.tif": grey.getvalue().replace(photometric + bytes([1]), photometric + bytes([0])),
        "grey.pgm": b"P5 8 8 4095\n" + bytes([1, 9] * 64),
        "rgb.ppm": b"P6 8 8 65535\n" + bytes([9, 9] * 192),
    })
    wide.save("deep/twelve.png")
    for ending in ("tif", "pfm"):
        Image.fromarray(np.ones((8, 8), np.float32)).save(f"deep/float.{ending}")
    text = refused(open_images, "deep", 8)
    assert "10 of 10 images cannot be used" in text and text.count("8 bits") == 16, text
    assert all(name in text for name in sorted(os.listdir("deep"))[:8])
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


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_the_crop_is_adms_of_jpegs_too(name):
    for width, height in ((100, 72), (41, 33), (32, 90), (64, 64), (275, 348), (500, 375)):
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(noise).save(name, quality=95)
        expected = adm(Image.open(name).convert("RGB"), 32)
        np.testing.assert_array_equal(first("./", 32).array[0], expected)
    np.savez("arrays.npz", images=noise[None])
    np.testing.assert_array_equal(first("arrays.npz", 32).array[0], adm(Image.fromarray(noise), 32))


def test_broken_and_small_images_are_all_named_before_the_first_step():
    write(*(f"d/{k}/{i}.png" for k in "ab" for i in range(20)))
    for name in ("a/3.png", "b/7.png"):
        Path("d", name).write_bytes(b"no image")
    picture(1, 20, 6).save("d/b/9.png")
    text = refused(open_images, "d", 8)
    assert "3 of 40 images" in text and "9.png (20x6 pixels, smaller" in text and "enlarge" in text
    assert all(name in text for name in ("a/3.png (cannot identify", "b/7.png", os.getcwd()))
    assert "a/3.png" in refused(open_images, "d", 8, enlarge=True)
    picture(1, 1, 8).save("d/b/9.png")
    assert "9.png" in refused(open_images, "d")  # as they are: of one size
    for name in ("a/3.png", "b/7.png"):
        os.remove(f"d/{name}")
    write("d/a/9.png")
    picture(1, 20, 6).save("d/b/9.png")
    enlarged = first("d", 8, enlarge=True).array[37]
    np.testing.assert_array_equal(enlarged, adm(picture(1, 20, 6), 8))
    write(*(f"many/{i}.png" for i in range(30)))
    for i in range(30):
        Path(f"many/{i}.png").write_bytes(b"")
    assert "30 of 30" in (text := refused(open_images, "many", 8)) and len(text) < 1500


def test_the_first_words_come_before_any_decoding(capsys, monkeypatch):
    write("d/1.png", "d/2.png")
    seen = []
    monkeypatch.setattr(data, "to_rgb", lambda image: seen.append(capsys.readouterr().err) or 1 / 0)
    refused(open_images, "d", 8)
    assert seen[0].startswith("data: reading d")
    monkeypatch.setenv("RANK", "1")
    refused(open_images, "d", 8)
    assert len(seen) == 4 and not any(seen[2:])


def test_a_set_too_large_for_memory_is_the_command_that_prepares_it(monkeypatch):
    write("my set/a/1.png", "my set/b/1.png")
    monkeypatch.setattr(data.os, "sysconf", lambda name: 60)  # 3,600 bytes
    assert len(first("my set", 8)) == 2
    write("my set/b/2.png", "my set/b/3.png", "my set/b/4.png")
    text = refused(open_images, "my set", 8, enlarge=True)
    assert "prepare 'my set' OUT --image-size 8 --channels 3 --enlarge" in text and "GiB" in text
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # processes share the memory
    shutil.rmtree("my set/b")
    assert "5 GiB" not in refused(open_images, "my set", 12, enlarge=True)


# ----------------------------------------------------------------------------- layouts
def test_folder_zip_and_npz_hold_the_same():
    write("d/ape/1.png", "d/ape/2.png", "d/bee/1.png", "d/bee/x.jfif", "d/ape/notes.txt")
    shutil.make_archive("z", "zip", "d")
    folder, archive = first("d"), first("z.zip")
    assert folder.classes == archive.classes == ["ape", "bee"]
    assert folder.labels.tolist() == archive.labels.tolist() == [0, 0, 1, 1]
    assert folder.labels.dtype == np.int64
    np.testing.assert_array_equal(folder.array, archive.array)
    np.testing.assert_array_equal(folder.array[0], Image.open("d/ape/1.png"))
    assert folder.digest() == archive.digest()
    np.savez("adm.npz", folder.array, folder.labels)
    np.savez_compressed("named.npz", images=folder.array, labels=folder.labels.astype(np.uint8))
    for name in ("adm.npz", "named.npz"):
        packed = first(name)
        np.testing.assert_array_equal(packed.array, folder.array)
        assert packed.labels.tolist() == [0, 0, 1, 1] and packed.classes is None
    assert folder.summary() == (f"4 images 10x8 in 2 classes (ape 2, bee 2), from {os.getcwd()}/d; "
                                "ignored: 1 .txt")


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
      "prepared/train/images.npy"], {"a": 1, "b": 1}),  # folders without images are no classes
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
    (["a/1.png", "b/deep/1.png"], "a/ (1), b/deep/ (1)"),
    (["a/1.png", "b/1.png", "stray.png"], "./ (1)"),
    (["00000/00000.png", "00000/00001.png", "01000/01000.png"], "mkdir OUT && find"),
    (["000/img0.png", "001/img1.png"], "parts of one set"),
    (["notes.txt", "a/table.csv"], "1 .csv, 1 .txt"),
    (["a/1.heic", "b/2.heic"], "format"),
    (["runs/a/log.jsonl", "runs/a/1.png"], "in runs/a"),
    (["t10k-images-idx3-ubyte", "a/1.png"], "a/ (1)"),
    (["data_batch_1.bin", "1.png"], "holds images or tables"),
    # a test split with other classes than the training images, or without
    (["train/a/1.png", "train/b/1.png", "test/1.png"], "holds a, b, but"),
    (["train/a/1.png", "train/b/1.png", "test/images/1.png"], "holds images; expected the same"),
    (["train/train/1.png", "test/test/1.png"], "holds train, but"),
    (["train/cat/1.png", "train/dog/1.png", "val/Cat/1.png"], "holds Cat"),
    (["train/1.png", "test/a/1.png", "test/b/1.png"], "no classes, but"),
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
    os.mkdir("b.zip")  # a folder
    write("b.zip/1.png")
    assert found("b.zip") == 1


def test_what_systems_and_runs_leave_behind_is_no_data():
    write("a/1.png", "a/Thumbs.db", "b/1.png", "b/.x.png", "b/_DSC1.png", "@eaDir/t.png",
          "__MACOSX/a/1.png", "$RECYCLE.BIN/1.png", ".git/x.png", "runs/tiny/ckpt.pt",
          "runs/tiny/samples.png", "runs/tiny/deep/2.png", "empty/readme.md", "a/LICENSE")
    images = first(".")
    assert found(".") == {"a": 1, "b": 1}
    for word in ("1 in @eaDir", "1 in $RECYCLE.BIN", "3 in runs/tiny", "1 .md", "2 hidden .png"):
        assert word in images.summary().replace("...", ""), images.summary()
    before = images.digest()
    write("runs/second/log.jsonl", "runs/second/samples.png")
    assert first(".").digest() == before
    assert "in ." in refused(open_images, "runs/tiny")


def test_of_test_and_val_the_one_with_the_training_classes_is_used():
    write(*(f"d/{split}/{k}/1.png" for split in ("train", "test", "val") for k in "ab"))
    images, test = open_images("d")
    assert test.path.endswith("d/test") and "ignored" in images.summary() and "val" in str(
        images.notes)
    os.renames("d/test/a/1.png", "d/test/images/1.png")
    images, test = open_images("d")  # test/images is no class
    assert test.path.endswith("d/val") and len(test) == 2 and images.classes == ["a", "b"]
    assert first("d:test").path.endswith("d/val") and open_images("d:train")[1] is None
    assert "write d" in refused(open_images, "d/train:test")
    shutil.rmtree("d/val")
    assert "other" not in (text := refused(open_images, "d")) and ":train" in text
    assert found("d:train") == {"a": 1, "b": 1}


def test_names_that_cannot_be_printed_are_escaped_and_one_name_is_one_class(capsys):
    name = os.fsdecode(b"caf\xe9")
    two = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    write(f"d/train/{name}/1.png", f"d/train/{two[0]}/1.png", f"d/test/{two[1]}/1.png")
    images, test = open_images("d")
    assert images.classes == ["caf\\xe9", "é"] and test.labels.tolist() == [1]
    images.summary().encode()
    Path(f"d/train/{name}/2.png").write_bytes(b"")
    refused(open_images, "d").encode()
    refused(open_images, f"d/train/{name}").encode()
    write(f"{name}/a/b/1.png", f"{name}/c/1.png")
    refused(open_images, name).encode()


def test_links_are_followed_but_not_in_circles():
    write("real/1.png", "real/2.png")
    os.mkdir("d")
    for name in ("a", "b"):
        os.symlink(os.path.abspath("real"), f"d/{name}")
    assert found("d") == {"a": 2, "b": 2}
    os.symlink(os.path.abspath("real"), "real/again")
    assert found("real") == 2


# ----------------------------------------------------------------------------- labels
def test_labels_of_a_trained_model_go_by_name():
    write("all/x/1.png", "all/y/1.png", "all/z/1.png", "part/z/1.png", "part/y/1.png",
          "one/z/1.png", "other/z/1.png", "other/w/1.png", "int/1/1.png", "int/3/1.png")
    classes = ["x", "y", "z"]

    def labels(source, *model):
        return labels_for(first(source), *model).labels.tolist()

    assert labels("all", classes, 3) == [0, 1, 2] and labels("part", classes, 3) == [1, 2]
    assert labels("one", classes, 3) == [2]
    assert labels("part", ["z", "y"], 2) == [1, 0]
    assert "w" in refused(labels, "other", classes, 3)
    assert labels("int", [], 4) == [1, 3]  # a model of numbered labels
    assert "y, z" in refused(labels, "part", [], 3) and "y, z" in refused(labels, "part", None, 3)
    assert "no labels" in refused(labels, "all/x", classes, 3)
    none = labels_for(first("all"), classes, 0)
    assert none.labels is None and none.classes is None
    os.remove("all/y/1.png")  # an emptied class folder takes no number away
    assert labels("all", classes, 3) == [0, 2]


def numbered(labels, name="a.npz"):
    np.savez(name, images=np.zeros((len(labels), 8, 8, 3), np.uint8), labels=np.array(labels))
    return name


def test_numbered_labels_are_never_shifted():
    images = first(numbered([1, 3, 2]))
    assert images.labels.tolist() == [1, 3, 2]
    for classes in (None, list("abcde")):
        assert labels_for(images, classes, 5).labels.tolist() == [1, 3, 2]
    assert "model does not have: 3" in refused(labels_for, images, None, 3)


def test_a_new_model_has_the_classes_of_the_data_and_an_image_of_each():
    write("d/ape/1.png", "d/ape/2.png", "d/bee/1.png")
    split = open_split("d", 8, 3)
    assert split.num_classes == 2 and split.classes == ["ape", "bee"]
    flat = open_split("d/ape", 8, 3)
    assert flat.num_classes == 0 and flat.classes == [] and not flat.train.batch([0, 1])[1].any()
    assert "no labels" in refused(open_split, "d/ape", 8, 3, num_classes=4)
    assert "2 classes (ape, bee)" in refused(open_split, "d", 8, 3, num_classes=5)
    os.rename("d/bee", "elsewhere")  # a single folder may be a wrapper
    assert open_split("d", 8, 3).num_classes == 0


@pytest.mark.parametrize("labels, flag, expected", [
    ([0, 2, 1], None, 3), ([0, 2, 2], 3, 3), ([0, 1], 5, 5), ([1, 2], 4, 4), ([5, 7], 0, 0),
    ([0, 217, 491], None, "--num-classes 492"), ([0, 2, 2], None, "without gaps"),
    ([1, 2, 3], None, "subtract 1"), ([0, 5], 4, "expected 0, 1, 2, 3;"),
])
def test_each_numbered_class_has_an_image_unless_a_flag_says_how_many_there_are(
        labels, flag, expected):
    source = numbered(labels)
    if isinstance(expected, str):
        assert expected in refused(open_split, source, 8, 3, num_classes=flag)
        return
    split = open_split(source, 8, 3, num_classes=flag)
    assert split.num_classes == expected and split.classes == []
    assert split.train.batch(range(2))[1].tolist() == (labels[:2] if expected else [0, 0])


def test_a_class_that_only_the_test_split_has_is_an_error():
    for part, labels in (("train", [0, 1]), ("test", [0, 4])):
        os.makedirs(f"both/{part}")
        np.save(f"both/{part}/images.npy", np.zeros((2, 8, 8, 3), np.uint8))
        np.save(f"both/{part}/labels.npy", labels)
    text = refused(open_split, "both", 8, 3)
    assert "holds 0, 1, but" in text and "holds 0, 4;" in text
    np.save("both/test/labels.npy", [1, 1])
    assert open_split("both", 8, 3).held_out.labels.tolist() == [1, 1]
    Path("both/train/classes.json").write_text('["a", "b", "c"]')  # c has no image any more
    Path("both/test/classes.json").write_text('["a", "b", "c"]')
    assert "classes (a, b), expected 3" in refused(open_split, "both", 8, 3)


@pytest.mark.parametrize("name", ["y", "label", "targets", "arr_0"])
def test_an_array_that_may_be_labels_is_not_dropped(name):
    pixels, y = np.zeros((4, 8, 8), np.uint8), np.arange(4)
    np.savez("a.npz", images=pixels, **{name: y})
    assert f"array {name}" in refused(open_images, "a.npz")
    np.savez("a.npz", images=pixels, **{name: y + 0.0})
    assert f"array {name}" in refused(open_images, "a.npz")
    np.savez("a.npz", images=pixels, labels=y, **{name: y + 0.5}, mu=np.zeros(7))  # scores
    assert set(first("a.npz").notes) == {f"ignored: array {name}", "ignored: array mu"}
    np.savez("a.npz", pixels, labels=y)
    assert first("a.npz").labels.tolist() == [0, 1, 2, 3]
    os.mkdir("d")
    np.save("d/images.npy", pixels)
    np.save(f"d/{name}.npy", y)
    assert f"array {name}" in refused(open_images, "d")


def test_files_of_other_content_are_refused():
    write("a.png", "a.txt")
    for name in ("a.png", "a.txt"):
        assert "is no folder" in refused(open_images, name)
    for arrays, words in (({"pictures": np.zeros(3)}, "holds pictures"),
                          ({"images": np.array([print, None], dtype=object)}, "a.npz"),
                          ({"images": np.zeros((4, 8, 8, 3), np.float32)}, "float32 (4, 8, 8, 3)")):
        np.savez("a.npz", **arrays)
        assert words in refused(open_images, "a.npz")


def test_dataset_json_gives_the_labels():
    names = [f"{i // 2:05d}/img{i:08d}.png" for i in range(4)]
    write(*(f"w/wrapped/{name}" for name in names))
    pairs = [list(pair) for pair in zip(names, [3, 0, 1, 3], strict=True)]

    def packed(pairs):
        Path("w/wrapped/dataset.json").write_text(json.dumps({"labels": pairs}))
        shutil.make_archive("z", "zip", "w/wrapped")
        return "w", "z.zip"

    for source in packed(pairs[::-1]):
        images = first(source)
        assert images.labels.tolist() == [3, 0, 1, 3] and images.classes is None
    for source in packed(None):
        assert found(source) == 4
    for wrong in (pairs[1:], 5, [[name, [0.5]] for name in names]):
        assert "dataset.json" in refused(open_images, packed(wrong)[0])
    shutil.rmtree("w/wrapped/00001")
    Path("w/wrapped/dataset.json").write_text(json.dumps({"labels": pairs}))
    assert first("w").labels.tolist() == [3, 0]  # a single shard


# ----------------------------------------------------------------------------- other formats
def shell(text):
    """Runs the command that an error gives in round brackets."""
    command = re.search(r"\(((mkdir|python|find) .*)\)", text)[1]
    subprocess.run(command, shell=True, check=True)


def test_the_command_of_an_error_brings_known_formats_over():
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (6, 8, 8, 3), np.uint8), np.arange(6) % 3
    parts = [("train", pixels, labels), ("test", pixels[:3], labels[:3])]
    keras = {f"{k}_{s}": a for s, x, y in parts for k, a in (("x", x), ("y", y[:, None]))}
    medmnist = {f"{s}_{k}": a for s, x, y in parts for k, a in (("images", x), ("labels", y))}
    imagenet = {"data": pixels.transpose(0, 3, 1, 2).reshape(6, -1), "labels": labels + 1,
                "mean": np.zeros(192)}
    for name, arrays in (("k", keras), ("m", medmnist), ("train_data_batch_1", imagenet)):
        shutil.rmtree("OUT", ignore_errors=True)
        np.savez(f"{name}.npz", **arrays)
        shell(refused(open_images, f"{name}.npz"))
        images, test = open_images("OUT")
        np.testing.assert_array_equal(images.array, pixels)
        assert images.labels.tolist() == labels.tolist()
        assert name.startswith("train") or test.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "shards", "tars"])
def test_the_command_of_an_error_unpacks(name):
    write("shards/00000/00000.png", "shards/00000/00001.png", "shards/00001/00002.png")
    os.mkdir("tars")
    for path in ("x.tar", "x.tar.gz", "tars/0.tar"):
        with tarfile.open(path, "w:gz" if path.endswith("gz") else "w") as archive:
            archive.add("shards/00000")
    shell(refused(open_images, name))
    assert found("OUT") == (3 if name == "shards" else 2)
    shutil.make_archive("z", "zip", "shards")
    assert "(unzip -j" in refused(open_images, "z.zip")
    write_files("p", {"train-0.parquet": b"PAR1"})
    assert "pandas" in refused(open_images, "p")


# ----------------------------------------------------------------------------- named sets
def idx(array):
    shape = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


def small_mnist():
    """{file: content} of 12 and 5 images of 6x5, and {split: (images, labels)}."""
    rng, files, arrays = np.random.default_rng(0), {}, {}
    for split, prefix, n in (("train", "train", 12), ("test", "t10k", 5)):
        arrays[split] = rng.integers(0, 256, (n, 6, 5), np.uint8), np.arange(n, dtype=np.uint8) % 4
        files[f"{prefix}-images-idx3-ubyte"] = idx(arrays[split][0])
        files[f"{prefix}-labels-idx1-ubyte"] = idx(arrays[split][1])
    return files, arrays


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
        pickler = Python2(file, 2) if kind == "Python 2" else pickle.Pickler(file, kind)
        pickler.dump({b"labels": records[:, 0].tolist(), b"data": records[:, 1:]})
        files[name] = file.getvalue()
    return files


def write_files(folder, files):
    os.makedirs(folder, exist_ok=True)
    for name, content in files.items():
        Path(folder, name).write_bytes(content)
    return str(folder)


def tar_of(files):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in reversed(files.items()):  # the order in the file must not matter
            info = tarfile.TarInfo(f"cifar-10-batches/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def packed_mnist():
    return {name + ".gz": gzip.compress(content) for name, content in small_mnist()[0].items()}


def test_idx_files_in_every_wrapping():
    files, arrays = small_mnist()
    write_files("plain", files)
    write_files("both", packed_mnist() | files)
    write_files("root/MNIST/raw", packed_mnist() | {"old.pt": b"x"})
    write_files("dots", {name.replace("-idx", ".idx"): body for name, body in files.items()})
    write_files("unpacked on the way", {name + ".gz": body for name, body in files.items()})
    shutil.make_archive("z", "zip", "plain")
    for source in ("plain", "both", "root", "root/MNIST", "dots", "z.zip", "unpacked on the way"):
        for split, (images, labels) in arrays.items():
            opened = first(f"{source}:{split}")
            np.testing.assert_array_equal(opened.array[..., 0], images)
            np.testing.assert_array_equal(opened.labels, labels)
        assert len(open_images(source)[1]) == 5
    write_files("root/FashionMNIST/raw", files)
    assert "FashionMNIST/" in refused(open_images, "root")
    good = files["train-images-idx3-ubyte"]
    for content in (b"", good[:7], good + b"x", good[:-1], b"\0\0\x0d" + good[3:],
                    gzip.compress(good)[:-20]):
        bad = write_files("bad", files | {"train-images-idx3-ubyte": content})
        assert "train-images-idx3-ubyte" in refused(open_images, bad)
    write_files("test only", {name: body for name, body in files.items() if "t10k" in name})
    assert "write test only:test" in refused(open_images, "test only")
    assert len(first("test only:test")) == 5
    os.remove("plain/train-labels-idx1-ubyte")
    assert "train-labels" in refused(open_images, "plain")


@pytest.mark.parametrize("kind", ["binary", "Python 2", 2, 5])
def test_both_of_cifars_archives_in_every_wrapping_and_all_of_them(kind):
    files = small_cifar(kind)
    write_files("plain", files)
    write_files("root/cifar-10-batches", files | {"readme.html": b"x", "batches.meta": b"x"})
    write_files(".", {"a.tar.gz": tar_of(files)})
    for source in ("plain", "root", "a.tar.gz"):
        images, test = open_images(source)
        assert len(images) == 15 and len(test) == 3
        pixels = RECORDS[:5, :, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(images.array, pixels)
        assert images.labels.tolist() == RECORDS[:5, :, 0].flatten().tolist()
        assert images.classes[3] == "cat"
    write_files("part", dict(list(files.items())[2:]))
    assert "3 of CIFAR-10's 5" in refused(open_images, "part")
    write_files("bad", dict.fromkeys(files, b"x" * 3000))
    assert "bad" in refused(open_images, "bad")


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
    archive = {"cifar-10-binary.tar.gz": tar_of(small_cifar())}
    for name, files in {"mnist": packed_mnist(), "cifar10": archive}.items():
        write_files(tmp_path / "remote", files)
        sums = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
        known = data.Known(f"file://{tmp_path}/remote/", sums, data.KNOWN[name].classes)
        monkeypatch.setitem(data.KNOWN, name, known)
    return tmp_path / "remote"


def test_sets_by_name_are_downloaded_once(remote, tmp_path):
    images, test = open_images("mnist")
    assert images.path == "mnist" and images.classes[3] == "3"
    np.testing.assert_array_equal(test.array[..., 0], small_mnist()[1]["test"][0])
    assert sorted(os.listdir(tmp_path / "cache/farmer/mnist")) == sorted(packed_mnist())
    assert len(first("cifar10")) == 15
    shutil.rmtree(remote)
    assert len(first("mnist")) == 12 and first("cifar10:test").classes[3] == "cat"


def test_a_bad_download_leaves_nothing_and_the_users_own_files_are_taken(remote, tmp_path):
    write_files(remote, {"cifar-10-binary.tar.gz": tar_of(small_cifar())[:-9]})
    text = refused(open_images, "cifar10")
    assert "sha256" in text and f"put cifar-10-binary.tar.gz into {tmp_path}/cache" in text
    assert os.listdir(tmp_path / "cache/farmer/cifar10") == []
    shutil.rmtree(remote)
    write_files(tmp_path / "cache/farmer/mnist", small_mnist()[0])
    assert len(first("mnist")) == 12


def test_without_a_home_folder_only_named_sets_are_out_of_reach(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    write("d/1.png")
    assert found("d") == 1
    assert "XDG_CACHE_HOME" in refused(open_images, "mnist")


def test_a_known_name_is_the_named_set_and_a_path_has_a_separator(monkeypatch, capsys, remote):
    draw = data.digits
    monkeypatch.setattr(data, "digits", lambda n, *rest: draw(n // 100, *rest))
    write("digits/a/1.png", "digits/b/1.png", "mnist/1.png", "d/1.png", "set:test/1.png")
    images, test = open_images("digits", 8)
    assert len(images) == 40 and len(test) == 5 and images.classes[3] == "3"
    assert "write ./digits" in capsys.readouterr().err
    assert len(first("digits:test", 8)) == 5 and len(first("mnist")) == 12
    assert found("./digits") == {"a": 1, "b": 1} and found("d") == 1 and found("./mnist") == 1
    assert found("set:test") == 1  # a folder of that name
    for name in ("", "nothing", "mnist:val", ":test"):
        assert "expected digits" in refused(open_images, name)
    assert "size" in refused(open_images, "digits")


def test_a_source_is_kept_as_an_absolute_path():
    write("d/train/1.png", "d/test/1.png")
    for source in ("d", "d:train", "./d:test"):
        kept = data.absolute(source)
        assert os.path.isabs(kept) and kept == f"{os.path.realpath('d')}{source.strip('./')[1:]}"
        assert len(first(kept)) == 1
    for source in ("digits", "mnist:test", "", "x.own"):
        assert data.absolute(source) == source


def test_digits_depend_on_seed_and_number():
    whole = data.digits(20, 16, 3, 0).array
    np.testing.assert_array_equal(data.digits(5, 16, 3, 0).array, whole[:5])
    assert not np.array_equal(data.digits(20, 16, 3, 1).array, whole)


# ----------------------------------------------------------------------------- own formats
def latents(k=3):
    """12 images of 4 channels in floats, with vectors of k numbers as labels."""
    rng = np.random.default_rng(0)
    array = rng.standard_normal((12, 8, 8, 4)).astype(np.float32)
    return Images("own", array, rng.standard_normal((12, k)).astype(np.float32))


def test_a_models_own_format_comes_first_and_may_hold_floats_and_vectors():
    write("d/1.png")
    assert len(first("d", own=lambda source: None)) == 1
    whole = latents()
    asked = []

    def own(source):
        asked.append(source)
        return whole, hold_out(whole, 2)[1]

    split = open_split("x.own", 8, 4, own=own)
    assert asked == ["x.own"] and split.is_test and len(split.held_out) == 2
    assert split.classes == [] and split.num_classes == 0
    images, labels, _ = take(split.train, 1, flip=False)[0]
    assert images.dtype == labels.dtype == np.float32 and images.shape == (8, 4, 8, 8)
    order = np.random.default_rng([3, 0]).permutation(12)[:8]
    np.testing.assert_array_equal(images, whole.array[order].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(labels, whole.labels[order])
    assert "12 images 8x8 with vectors" in split.summary and "2 test images" in split.summary
    held = open_split("x.own", 8, 4, holdout=3, own=own)
    assert held.held_out.numbers.tolist() == [9, 10, 11] and held.digest == split.digest
    resumed = open_split("x.own", 8, 4, classes=[], num_classes=0, own=own)
    assert resumed.train.labels.shape == (12, 3)
    assert "(16, 16, 4)" in refused(open_split, "x.own", 16, 4, own=own)
    small = Images("own", np.full((1, 9, 9, 3), 7, np.uint8))
    assert first("x", 8, own=lambda source: small).array.shape == (1, 8, 8, 3)


@pytest.mark.parametrize("array, labels", [
    (np.zeros((2, 3, 8, 8), np.uint8), None), (np.zeros((2, 8, 8, 4)), None),
    (np.zeros((2, 8, 8), np.float32), None), (np.zeros((0, 8, 8, 3), np.uint8), None),
    *((np.zeros((3, 8, 8, 1), np.uint8), labels) for labels in (
        [0, 1], [0, 1, -1], [0.0, 1.0, 2.0], [[0], [1], [2]], [0, 1, 2**40], [0, 1, 5],
        np.zeros((2, 4), np.float32), np.zeros((3, 4)), np.zeros(3, np.float32))),
])
def test_arrays_that_do_not_fit_are_refused(array, labels):
    text = refused(Images, "own", array, labels, list("abc"))
    assert text.startswith("own: ") and "expected" in text


# ----------------------------------------------------------------------------- which set it is
def test_the_digest_sees_classes_labels_and_pixels_but_not_the_place():
    write("d/a/1.png", "d/a/2.png", "d/b/3.png")
    digest = first("d").digest()
    shutil.copytree("d", "elsewhere/deep/d")
    assert first("elsewhere").digest() == digest
    os.rename("elsewhere/deep/d/a", "elsewhere/deep/d/aa")
    assert first("elsewhere").digest() != digest
    picture(5).save("d/b/3.png")
    assert first("d").digest() != digest
    pixels = np.zeros((3, 8, 8, 1), np.uint8)
    seen = set()
    for array, labels in ((pixels, [0, 1, 0]), (pixels + 1, [0, 1, 0]), (pixels, [0, 1, 1]),
                          (pixels.reshape(3, 4, 16, 1), [0, 1, 0]), (pixels, None)):
        seen.add(Images("x", array, labels).digest())
    floats = latents()
    for changed in (0, 1):
        seen.add(floats.digest())
        (floats.array, floats.labels)[changed][7] += 1
    assert len(seen | {floats.digest()}) == 8
    many = np.zeros((1000, 2, 2, 1), np.uint8)
    many[[0, -1]] = 1
    assert Images("x", many).digest() != Images("x", many[::2].repeat(2, 0)).digest()


# ----------------------------------------------------------------------------- what a run uses
def test_the_hold_out_is_the_last_of_each_class():
    labels = np.array([1, 0, 1, 0, 1, 0, 3, 1, 3])
    array = np.arange(9, dtype=np.uint8).reshape(9, 1, 1, 1)
    images = Images("x", array, labels)
    train, held = hold_out(images, 1)
    assert held.numbers.tolist() == [5, 7, 8] and train.numbers.tolist() == [0, 1, 2, 3, 4, 6]
    assert held.batch([1, 0])[0].flatten().tolist() == [7, 5] and held.labels.tolist() == [0, 1, 3]
    assert held.array is array  # no pixels are copied
    assert [len(part) for part in hold_out(images, 0)] == [9, 0]
    assert hold_out(Images("x", array), 2)[1].numbers.tolist() == [7, 8]
    some = Images("x", array, numbers=np.array([1, 5, 7]))
    assert [part.numbers.tolist() for part in hold_out(some, 1)] == [[1, 5], [7]]
    assert "2 of class 3" in refused(hold_out, images, 2)


def test_evaluation_gets_the_hold_out_or_else_the_test_split():
    write(*(f"both/train/ape/{i}.png" for i in range(5)), "both/test/ape/9.png",
          *(f"both/train/bee/{i}.png" for i in range(4)), "both/test/bee/8.png")
    split = open_split("both", 8, 3)
    assert len(split.train) == 9 and split.held_out.labels.tolist() == [0, 1] and split.is_test
    assert "9 images 8x8 in 2 classes (ape 5, bee 4), 2 test images, from" in split.summary
    held = open_split("both", 8, 3, holdout=1)
    assert len(held.train) == 7 and not held.is_test and held.digest == split.digest
    assert held.held_out.numbers.tolist() == [4, 8] and held.held_out.labels.tolist() == [0, 1]
    assert "7 images" in held.summary and "2 held-out images" in held.summary
    alone = open_split("both:train", 8, 3)
    assert alone.held_out is None and not alone.is_test
    assert "9 of 9" in refused(open_split, "both", 16, 3)


def test_the_summary_tells_that_transparency_was_put_on_white():
    write("d/1.png", "d/2.png")
    Image.new("RGBA", (9, 9), (1, 2, 3, 255)).save("d/3.png")
    assert "transparency" not in open_split("d", 8, 3).summary
    Image.new("RGBA", (9, 9), (1, 2, 3, 40)).save("d/4.png")
    assert "transparency put on white in 1 images" in open_split("d", 8, 3).summary


def test_a_trained_model_keeps_its_classes():
    write("d/ape/1.png", "d/bee/2.png")
    model = {"classes": ["bee", "cow", "ape"], "num_classes": 3}
    split = open_split("d", 8, 3, **model)
    assert split.train.labels.tolist() == [2, 0] and split.classes == model["classes"]
    assert split.digest == open_split("d", 8, 3).digest  # it is that of the data alone
    assert "bee" in refused(open_split, "d", 8, 3, classes=["ape"], num_classes=1)
    assert "ape, bee" in refused(open_split, "d", 8, 3, classes=[], num_classes=5)
    trained = open_split(numbered([1, 3]), 8, 3, classes=[], num_classes=5)
    assert trained.train.labels.tolist() == [1, 3]


# ----------------------------------------------------------------------------- batches
@pytest.fixture
def eleven():
    """Two classes with 6 and 5 images of 8x8."""
    pixels = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), np.uint8)
    return Images("x", pixels, np.arange(11) // 6)


def take(images, n, **options):
    """The first n batches, as arrays (images, labels, uid)."""
    defaults = {"batch_size": 8, "start_step": 0, "seed": 3, "flip": True}
    with contextlib.closing(batches(images, **(defaults | options))) as stream:
        return [[t.numpy() for t in batch] for batch in itertools.islice(stream, n)]


def joined(found, k):
    return np.concatenate([batch[k] for batch in found])


def same(a, b):
    for x, y in zip(itertools.chain(*a), itertools.chain(*b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_batches_depend_on_seed_and_step_alone(eleven):
    whole = take(eleven, 7)
    assert whole[0][0].shape == (8, 3, 8, 8)
    assert [array.dtype for array in whole[0]] == [np.uint8, np.int64, np.int64]
    same(take(eleven, 4, start_step=3), whole[3:])
    for world in (2, 4):
        parts = [take(eleven, 7, rank=rank, world=world) for rank in range(world)]
        steps = zip(*parts, strict=True)
        same([[np.concatenate(x) for x in zip(*ranks, strict=True)] for ranks in steps], whole)
    np.testing.assert_array_equal(joined(whole, 2), np.arange(56))
    assert "--batch-size" in refused(take, eleven, 1, world=3)


def test_order_and_mirroring_are_those_of_the_rule(eleven):
    images, labels = eleven.batch(range(11))
    found = take(eleven, 7)
    for g, image, label in zip(range(56), joined(found, 0), joined(found, 1), strict=True):
        epoch, place = divmod(g, 11)
        i = np.random.default_rng([3, epoch]).permutation(11)[place]
        mirrored = np.random.default_rng([3, epoch, 1]).random(11)[place] < 0.5
        expected = images[i].numpy()
        np.testing.assert_array_equal(image, expected[..., ::-1] if mirrored else expected)
        assert label == labels[i]
    plain = joined(take(eleven, 7, flip=False), 0)
    assert {x.tobytes() for x in plain[:11]} == {x.tobytes() for x in images.numpy()}


def by_class(labels, generator):
    """An epoch of 4: both images of a class, then both of the other."""
    chosen = torch.randperm(2, generator=generator).tolist()
    return torch.cat([torch.where(labels == k)[0][:2] for k in chosen])


def test_a_models_epoch_order_replaces_the_permutation(eleven):
    options = {"epoch_order": by_class, "flip": False, "batch_size": 3}
    found = take(eleven, 16, **options)
    labels = joined(found, 1).reshape(12, 4)
    assert ((labels[:, 0] == labels[:, 1]) & (labels[:, 2] == labels[:, 3])).all()
    assert len({tuple(epoch) for epoch in labels.tolist()}) == 2  # epochs differ
    same(take(eleven, 4, start_step=12, **options), found[12:])
    assert (labels != joined(take(eleven, 16, seed=4, **options), 1).reshape(12, 4)).any()


def test_a_thread_reads_one_step_ahead_and_ends_with_the_batches(eleven, monkeypatch):
    before = threading.active_count()
    read = []
    batch = Images.batch
    monkeypatch.setattr(Images, "batch", lambda images, places: (
        read.append(threading.current_thread()), batch(images, places))[1])
    stream = batches(eleven, batch_size=4, start_step=0, seed=0)
    next(stream)
    assert threading.active_count() == before + 1
    next(stream)
    stream.close()
    assert threading.active_count() == before and len(read) == 3
    assert threading.main_thread() not in read


# ----------------------------------------------------------------------------- floats
def test_noise_is_each_images_own_and_of_its_kind():
    x = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    many = torch.full((400, 1, 8, 8), 100, dtype=torch.uint8)

    def noisy(kind, sigma=0.0, numbers=range(4), images=x):
        generators = image_generators(5, numbers, torch.device("cpu"))
        return dequantize(images, kind, sigma, generators)

    for kind in ("gaussian", "uniform", "rgb"):
        assert torch.equal(noisy(kind, 2.0)[2:3], noisy(kind, 2.0, [2], x[2:3]))
        assert torch.equal(quantize(noisy(kind)), x)
    assert torch.equal(dequantize(x, "none", 9.0, None), ((x.double() + 0.5) / 128 - 1).float())
    eps = ((noisy("gaussian", 0.3, range(400), many) + 1) * 128 - 100.5) / 128 / 0.3
    assert stats.kstest(eps.flatten(), "norm").pvalue > 1e-3
    u = (noisy("uniform", 7.0, range(400), many) + 1) * 128 - 100
    assert stats.kstest(u.flatten(), "uniform").pvalue > 1e-3
    steps = (noisy("rgb", 3.0, range(400), many) + 1) * 128 - 100
    assert stats.kstest((steps - steps.floor()).flatten(), "uniform").pvalue > 1e-3
    assert abs(steps.floor().var() - 9 - 1 / 12) < 0.3  # rounding adds 1/12
    moved = quantize(noisy("rgb", 0.2, range(400), many)) != many
    assert moved.double().mean() < 0.03  # whole levels: 1.2% are beyond half a level
    assert noisy("rgb", 3.0, range(400), 0 * many).min() < -1  # not clipped
    assert "gaussian, uniform, rgb, none" in refused(noisy, "gauss")
    z = torch.randn(4, 4, 8, 8)  # latents stay in their own units
    assert torch.equal(noisy("none", images=z), z)
    added = noisy("gaussian", 0.5, range(4), z) - z
    assert stats.kstest(added.flatten() / 0.5, "norm").pvalue > 1e-3
    for kind in ("uniform", "rgb"):
        assert "floats" in refused(noisy, kind, 0.1, range(4), z)


# ----------------------------------------------------------------------------- prepare
def prepare(*argv):
    data.main(["prepare", *map(str, argv)])


@pytest.mark.parametrize("channels", [1, 3])
def test_prepare_gives_the_crops_of_training(channels, capsys):
    write(*(f"d/{k}/{i}.png" for k in ("ape", "bee") for i in range(5)))
    prepare("d", "d/out", "--image-size", 4, "--channels", channels)
    assert "data: 10 images 4x4 in 2 classes" in capsys.readouterr().out
    files, made = (open_split(source, 4, channels) for source in ("d", "d/out"))
    assert isinstance(made.train.array, np.memmap) and len(files.train) == 10
    assert made.classes == files.classes and made.digest == files.digest
    same(take(made.train, 5), take(files.train, 5))
    assert type(open_split("d/out", 4, channels, holdout=1).train.array) is np.memmap
    assert "out exists" in refused(prepare, "d", "d/out", "--image-size", 4)
    assert first("d/out", 2, channels).array.shape == (10, 2, 2, channels)


def test_prepare_keeps_splits_and_numbers():
    write(*(f"both/Train/{k}/{i}.png" for k in ("ape", "bee") for i in range(3)),
          "both/val/bee/8.png")
    prepare("both", "out", "--image-size", 8)
    made, files = open_split("out", 8, 3), open_split("both", 8, 3)
    assert made.is_test and made.held_out.labels.tolist() == [1] and len(made.train) == 6
    assert torch.equal(made.held_out.batch([0])[0], files.held_out.batch([0])[0])
    prepare(numbered([1, 0, 1]), "deep/plain", "--image-size", 8)
    assert sorted(os.listdir("deep/plain")) == ["images.npy", "labels.npy"]
    assert open_split("deep/plain", 8, 3).train.labels.tolist() == [1, 0, 1]
    prepare("both/val", "flat", "--image-size", 8)
    assert os.listdir("flat") == ["images.npy"]
    shutil.make_archive("z", "zip", "flat")
    assert "unpack" in refused(open_images, "z.zip")


def test_prepare_names_all_broken_images_and_leaves_nothing():
    write(*(f"both/{split}/{i}.png" for split in ("train", "test") for i in range(5)))
    for name in ("2.png", "4.png"):
        Path("both/test", name).write_bytes(b"no image")
    text = refused(prepare, "both", "out", "--image-size", 8)
    assert "2 of 5" in text and "2.png" in text and "4.png" in text
    assert os.listdir() == ["both"]
