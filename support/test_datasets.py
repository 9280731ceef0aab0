"""Sources of images. Claims:

- Pixels: every mode becomes right RGB; the crop is ADM's, of JPEGs too; what cannot be read is one
  line that names the file.
- One folder layout, in folders and zips alike; whatever else is there is named or an error.
- Labels: by name where there are names, numbers never shifted; dataset.json gives them; an array
  that may be labels is never dropped.
- A known name is always the named set; downloads are checked; the user's own files are taken.
- idx files and CIFAR-10's batches are read in every wrapping, and part of them never in silence.
- The digest knows a set again wherever it lies.
"""
import gzip
import hashlib
import http.server
import io
import json
import os
import shutil
import struct
import tarfile
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support import datasets
from support.cli import UserError
from support.datasets import Images, digits, labels_for, open_images


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
        if datasets.IMAGE.fullmatch(os.path.basename(name)):
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


def found(source):
    """What a source holds, shortly: {class: number of images}, or their number without labels."""
    images = open_images(source)
    if images.labels is None:
        return len(images)
    names = images.classes or range(int(images.labels.max()) + 1)
    return {name: int((images.labels == k).sum()) for k, name in enumerate(names)}


# ----------------------------------------------------------------------------- pixels
def read(image, name, **options):
    image.save(name, **options)
    return Images(".", [name]).read(0).astype(int)


def test_every_mode_becomes_right_rgb():
    rgb, grey = np.asarray(picture(3)).astype(int), np.asarray(picture(3, mode="L")).astype(int)
    np.testing.assert_array_equal(read(picture(3), "rgb.png"), rgb)
    grey_rgb = read(picture(3, mode="L"), "grey.png")
    np.testing.assert_array_equal(grey_rgb, grey[..., None].repeat(3, 2))
    np.testing.assert_array_equal(Images(".", ["grey.png"]).read(0, 8, 1)[..., 0], grey[:, 1:9])
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


def test_16_bits_are_divided_by_256_and_values_to_255_are_refused():
    wide = (np.arange(80).reshape(8, 10) * 800).astype(np.uint16)
    for name in ("wide.png", "wide.tif", "wide.pgm"):
        expected = (wide // 256)[..., None].repeat(3, 2)
        np.testing.assert_array_equal(read(Image.fromarray(wide), name), expected)
    clear = read(Image.fromarray(wide), "clear.png", transparency=800)  # a tRNS chunk in 16 bits
    assert clear[0, 1, 0] == 255 and clear[0, 2, 0] == 1600 // 256
    assert "dark.png" in refused(read, Image.fromarray(wide // 256), "dark.png")
    assert "float.tif" in refused(read, Image.fromarray(np.ones((8, 8), np.float32)), "float.tif")
    rows = zlib.compress(b"".join(b"\0" + bytes([0, 90] * 3 * 8) for _ in range(8)))
    content = b"\x89PNG\r\n\x1a\n"  # 16-bit RGB, which Pillow cuts to 8
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    for part in (b"IHDR" + header, b"IDAT" + rows, b"IEND"):
        content += struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
    write_files(".", {"rgb16.png": content})
    assert "rgb16.png" in refused(Images(".", ["rgb16.png"]).read, 0)


def test_a_large_colour_profile_does_no_harm():
    np.testing.assert_array_equal(read(picture(1), "icc.png", icc_profile=bytes(2_000_000)),
                                  np.asarray(picture(1)))


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
        crop = open_images("./").read(0, 32)
        np.testing.assert_array_equal(crop, adm(Image.open(name).convert("RGB"), 32))


def test_a_small_image_is_refused_or_enlarged():
    write("small.png")
    text = refused(open_images("./").read, 0, 16)
    assert "small.png is 10x8" in text and "--enlarge" in text
    enlarged = open_images("./", enlarge=True).read(0, 16)
    np.testing.assert_array_equal(enlarged, adm(Image.open("small.png"), 16))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.tif"])
def test_damaged_images_are_one_line(name):
    rng = np.random.default_rng(0)
    picture(1, 24, 20).save(name)
    whole = Path(name).read_bytes()
    refusals = 0
    for _ in range(30):
        raw = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        raw[rng.integers(len(raw))] = rng.integers(256)
        Path(name).write_bytes(raw)
        try:
            assert open_images("./").read(0, 16).shape == (16, 16, 3)
        except UserError as error:
            refusals += 1
            assert name in str(error) and "\n" not in str(error)
    assert refusals > 3


# ----------------------------------------------------------------------------- layouts
def test_folder_zip_and_npz_hold_the_same():
    write("d/ape/1.png", "d/ape/2.png", "d/bee/1.png", "d/bee/x.jfif", "d/ape/notes.txt")
    shutil.make_archive("z", "zip", "d")
    folder, archive = open_images("d"), open_images("z.zip")
    assert folder.names == archive.names == ["ape/1.png", "ape/2.png", "bee/1.png", "bee/x.jfif"]
    assert folder.classes == archive.classes == ["ape", "bee"]
    assert folder.labels.tolist() == archive.labels.tolist() == [0, 0, 1, 1]
    assert folder.labels.dtype == np.int64
    pixels = np.stack([folder.read(i) for i in range(4)])
    np.testing.assert_array_equal(pixels, [archive.read(i) for i in range(4)])
    np.testing.assert_array_equal(pixels[0], Image.open("d/ape/1.png"))
    assert folder.digest() == archive.digest()
    np.savez("adm.npz", pixels, folder.labels)
    np.savez_compressed("named.npz", images=pixels, labels=folder.labels.astype(np.uint8))
    for name in ("adm.npz", "named.npz"):
        packed = open_images(name)
        np.testing.assert_array_equal([packed.read(i) for i in range(4)], pixels)
        assert packed.labels.tolist() == [0, 0, 1, 1] and packed.classes is None
    assert "4 images 10x8 in 2 classes (ape 2, bee 2), from d; ignored: 1 file (.txt)" == (
        folder.summary())


@pytest.mark.parametrize("names, expected", [
    (["1.png", "2.PNG"], 2),  # flat: no labels
    (["top/in/1.png", "top/in/2.png"], 2),
    (["top/in/a/1.png", "top/in/b/2.png"], {"a": 1, "b": 1}),
    (["Train/a/1.png", "Train/b/1.png", "TEST/b/1.png"], {"a": 1, "b": 1}),
    (["x/train/a/1.png", "x/train/b/1.png", "x/val/c/1.png"], {"a": 1, "b": 1, "c": 0}),
    (["train/1.png", "test/2.png"], 1),
    (["10/1.png", "9/1.png", "1/1.png"], {"1": 1, "9": 1, "10": 1}),
    (["00000/00000_1.png", "00001/00000_1.png"], {"00000": 1, "00001": 1}),  # GTSRB's classes
    (["train/1.png", "bus/1.png"], {"bus": 1, "train": 1}),  # a class called train
    (["a.zip/a/1.png", "a.zip/b/2.png"], {"a": 1, "b": 1}),
])
def test_layouts_that_are_read(names, expected):
    write(*(f"d/{name}" for name in names))
    for source in ("d", zipped("d2.zip", names)):
        assert str(found(source)) == str(expected)  # in this order


@pytest.mark.parametrize("names, words", [
    (["training/a/1.png", "training/b/1.png", "testing/a/1.png"], "training/ (2 images in 2 f"),
    (["train/1.png", "valid/1.png"], "train/ (1 image), valid/ (1 image)"),
    (["train/a/1.png", "train/b/1.png", "dev/a/1.png"], "dev/ (1 image in 1 folder), train/"),
    (["seg_train/seg_train/a/1.png", "seg_test/seg_test/a/1.png"], "seg_train/ (1 image in 1"),
    (["train/1.png", "test/1.png", "assets/1.png"], "assets/ (1 image), test/"),
    (["a/1.png", "b/deep/1.png"], "a/ (1 image), b/ (1 image in 1 folder)"),
    (["a/1.png", "b/1.png", "stray.png"], "stray.png, a/ (1 image)"),
    (["00000/00000.png", "00000/00001.png", "01000/01000.png"], "00000/ (2 images), 01000/"),
    (["000/img0.png", "001/img1.png"], "000/ (1 image), 001/"),
    (["train/a/1.png", "train/b/1.png", "test/1.png"], "no labels"),
    (["notes.txt", "a/table.csv"], "2 files (.csv, .txt)"),
    (["runs/a/log.jsonl", "runs/a/1.png"], "run runs/a"),
    (["t10k-images-idx3-ubyte", "a/1.png"], "t10k-images-idx3-ubyte, a/ (1 image)"),
])
def test_layouts_that_are_refused_show_what_was_found(names, words):
    write(*(f"d/{name}" for name in names))
    text = refused(open_images, "d")
    assert words in text and "expected" in text


@pytest.mark.parametrize("form", ["{}\\{}.png", "/home/u/data/{}/{}.png", "./{}/{}.png",
                                  "C:\\x\\{}\\{}.png", "images/SET//{}/./{}.png"])
def test_zips_of_any_tool_are_folders(form):
    zipped("a.zip", [form.format(k, i) for k in "ab" for i in range(2)] + ["__MACOSX/._1.png"])
    images = open_images("a.zip")
    assert images.names == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]
    assert images.classes == ["a", "b"] and images.read(3).shape == (8, 10, 3)
    os.mkdir("b.zip")  # a folder
    write("b.zip/1.png")
    assert found("b.zip") == 1


def test_what_systems_and_runs_leave_behind_is_no_data():
    write("a/1.png", "a/Thumbs.db", "b/1.png", "b/.x.png", "b/_DSC1.png", "@eaDir/t.png",
          "__MACOSX/a/1.png", "$RECYCLE.BIN/1.png", ".git/x.png", "runs/tiny/ckpt.pt",
          "runs/tiny/samples.png", "runs/tiny/deep/2.png", "empty/readme.md", "a/LICENSE")
    images = open_images(".")
    assert images.names == ["a/1.png", "b/1.png"] and images.classes == ["a", "b"]
    for word in ("folder @eaDir", "folder $RECYCLE.BIN", "run runs/tiny", "folder empty",
                 "4 files (.md, .png, LICENSE) with hidden names"):
        assert word in images.summary()
    before = images.digest()
    write("runs/second/log.jsonl", "runs/second/samples.png")
    assert open_images(".").digest() == before
    assert "run ." in refused(open_images, "runs/tiny")


def test_train_val_and_test_beside_each_other_name_what_is_not_read():
    write(*(f"d/{split}/{k}/1.png" for split in ("train", "test", "val") for k in "ab"))
    images = open_images("d")
    assert images.test == "d:test" and "ignored: folder val" in images.summary()
    test = open_images("d:test")
    assert test.path == "d/test" and test.test is None
    assert open_images("d:train").test is None
    assert "test split: d:test, 2 images" in images.summary(test)
    assert "write d" in refused(open_images, "d/train:test")


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
        return labels_for(open_images(source), *model).labels.tolist()

    assert labels("all", classes, 3) == [0, 1, 2] and labels("part", classes, 3) == [1, 2]
    assert labels("one", classes, 3) == [2]
    assert labels("part", ["z", "y"], 2) == [1, 0]
    assert "w" in refused(labels, "other", classes, 3)
    assert labels("int", [], 4) == [1, 3]  # a model of numbered labels
    assert "y, z" in refused(labels, "part", [], 3) and "y, z" in refused(labels, "part", None, 3)
    assert "no labels" in refused(labels, "all/x", classes, 3)
    none = labels_for(open_images("all"), classes, 0)
    assert none.labels is None and none.classes is None
    os.remove("all/y/1.png")  # an emptied class folder takes no number away
    assert labels("all", classes, 3) == [0, 2]


def test_numbered_labels_are_never_shifted():
    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    np.savez("a.npz", images=pixels, labels=np.array([1, 3, 2]))
    images = open_images("a.npz")
    assert images.labels.tolist() == [1, 3, 2]
    for classes in (None, list("abcde")):
        assert labels_for(images, classes, 5).labels.tolist() == [1, 3, 2]
    assert "subtract 1" in refused(labels_for, images, None, 3)
    for bad in ([0, 1], [0, 1, -1], [0.0, 1.0, 2.0], [[0], [1], [2]], [0, 1, 2**40]):
        np.savez("bad.npz", images=pixels, labels=np.array(bad))
        assert "bad.npz: labels" in refused(open_images, "bad.npz")


@pytest.mark.parametrize("name", ["y", "label", "targets", "arr_0"])
def test_an_array_that_may_be_labels_is_not_dropped(name):
    pixels, y = np.zeros((4, 8, 8), np.uint8), np.arange(4)
    np.savez("a.npz", images=pixels, **{name: y})
    assert f"array {name}" in refused(open_images, "a.npz")
    np.savez("a.npz", images=pixels, **{name: y + 0.0})
    assert f"array {name}" in refused(open_images, "a.npz")
    np.savez("a.npz", images=pixels, labels=y, **{name: y + 0.5}, mu=np.zeros(7))  # scores
    assert open_images("a.npz").ignored == f"array {name}, array mu"
    np.savez("a.npz", pixels, labels=y)
    assert open_images("a.npz").labels.tolist() == [0, 1, 2, 3]
    os.mkdir("d")
    np.save("d/images.npy", pixels)
    np.save(f"d/{name}.npy", y)
    assert f"array {name}" in refused(open_images, "d")


def test_images_that_are_no_uint8_images_are_refused():
    for array in (np.zeros((4, 8, 8, 3), np.float32), np.zeros((4, 3, 8, 8), np.uint8),
                  np.zeros((0, 8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)):
        np.savez("a.npz", images=array)
        assert str(array.shape) in refused(open_images, "a.npz")
    np.savez("a.npz", pictures=array)
    assert "holds pictures" in refused(open_images, "a.npz")
    np.savez("a.npz", images=np.array([print, None], dtype=object))
    assert "a.npz" in refused(open_images, "a.npz")


def test_dataset_json_gives_the_labels():
    names = [f"{i // 2:05d}/img{i:08d}.png" for i in range(4)]
    write(*(f"w/wrapped/{name}" for name in names))
    pairs = [list(pair) for pair in zip(names, [3, 0, 1, 3], strict=True)]

    def packed(pairs):
        Path("w/wrapped/dataset.json").write_text(json.dumps({"labels": pairs}))
        shutil.make_archive("z", "zip", "w/wrapped")
        return "w", "z.zip"

    for source in packed(pairs[::-1]):
        images = open_images(source)
        assert images.names == names and images.classes is None
        assert images.labels.tolist() == [3, 0, 1, 3]
    for source in packed(None):
        assert found(source) == 4
    for wrong in (pairs[1:], 5, [[name, [0.5]] for name in names]):
        assert "dataset.json" in refused(open_images, packed(wrong)[0])


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


def small_cifar():
    """{file: content} of CIFAR-10's batches, 3 images each."""
    rng = np.random.default_rng(0)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    records = {name: rng.integers(0, 10, (3, 3073), np.uint8) for name in names}
    return {name: content.tobytes() for name, content in records.items()}


def write_files(folder, files):
    os.makedirs(folder, exist_ok=True)
    for name, content in files.items():
        Path(folder, name).write_bytes(content)
    return str(folder)


def tar_of(files):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in reversed(files.items()):  # the order in the file must not matter
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
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
            opened = open_images(f"{source}:{split}")
            np.testing.assert_array_equal(opened.array[..., 0], images)
            np.testing.assert_array_equal(opened.labels, labels)
        assert open_images(source).test == f"{source}:test"
    write_files("root/FashionMNIST/raw", files)
    assert "FashionMNIST/" in refused(open_images, "root")
    good = files["train-images-idx3-ubyte"]
    for content in (b"", good[:7], good + b"x", good[:-1], b"\0\0\x0d" + good[3:],
                    gzip.compress(good)[:-20]):
        bad = write_files("bad", files | {"train-images-idx3-ubyte": content})
        assert "train-images-idx3-ubyte" in refused(open_images, bad)
    write_files("test only", {name: body for name, body in files.items() if "t10k" in name})
    assert "write test only:test" in refused(open_images, "test only")
    assert len(open_images("test only:test")) == 5
    os.remove("plain/train-labels-idx1-ubyte")
    assert "train-labels" in refused(open_images, "plain")


def test_cifar_batches_in_every_wrapping_and_all_of_them():
    files = small_cifar()
    write_files("bin", files)
    write_files("root/cifar-10-batches-bin", files | {"readme.html": b"x"})
    write_files(".", {"a.tar.gz": tar_of(files)})
    record = np.frombuffer(files["data_batch_2.bin"], np.uint8)[:3073]  # number 3
    for source in ("bin", "root", "a.tar.gz"):
        images = open_images(source)
        assert len(images) == 15 and len(open_images(source + ":test")) == 3
        pixels = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
        np.testing.assert_array_equal(images.read(3), pixels)
        assert images.labels[3] == record[0] and images.classes[3] == "cat"
    write_files("part", dict(list(files.items())[2:]))
    assert "3 of CIFAR-10's 5" in refused(open_images, "part")
    write_files("py", {"data_batch_1": b"x", "test_batch": b"x"})
    assert "binary" in refused(open_images, "py")
    write_files("bad", {"data_batch_1.bin": b"x" * 3000})
    assert "bad" in refused(open_images, "bad")


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`, cut or with other content in these modes."""

    files, mode, asked = {}, "good", []

    def do_GET(self):
        Server.asked.append(self.path[1:])
        content = self.files[self.path[1:]]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        bad = {"cut": content[:-9], "wrong": bytes(len(content))}
        self.wfile.write(bad.get(self.mode, content))

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A local server with small sets, known as if they were the real ones."""
    address = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=address.serve_forever, args=(0.01,), daemon=True).start()
    sets = {"mnist": packed_mnist(), "cifar10": {datasets.CIFAR_ARCHIVE: tar_of(small_cifar())}}
    Server.files, Server.mode, Server.asked = {}, "good", []
    for name, files in sets.items():
        sums = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
        place = f"http://127.0.0.1:{address.server_port}/"
        known = datasets.Known(place, sums, datasets.KNOWN[name].classes)
        monkeypatch.setitem(datasets.KNOWN, name, known)
        Server.files |= files
    yield Server
    address.shutdown()
    address.server_close()


def test_sets_by_name_are_downloaded_once(server, tmp_path):
    images = open_images("mnist")
    assert images.path == "mnist" and images.test == "mnist:test" and images.classes[3] == "3"
    _, arrays = small_mnist()
    np.testing.assert_array_equal(open_images("mnist:test").array[..., 0], arrays["test"][0])
    assert len(server.asked) == 4
    assert sorted(os.listdir(tmp_path / "cache/farmer/mnist")) == sorted(packed_mnist())
    assert len(open_images("cifar10")) == 15 and open_images("cifar10").classes[3] == "cat"
    assert len(server.asked) == 5


@pytest.mark.parametrize("mode", ["cut", "wrong"])
def test_a_bad_download_leaves_nothing(server, tmp_path, mode):
    server.mode = mode
    text = refused(open_images, "cifar10")
    assert "sha256" in text and f"put {datasets.CIFAR_ARCHIVE} into {tmp_path}/cache" in text
    assert os.listdir(tmp_path / "cache/farmer/cifar10") == []
    server.mode = "good"
    assert len(open_images("cifar10")) == 15


def test_files_that_the_user_put_into_the_cache_are_taken(server, tmp_path):
    write_files(tmp_path / "cache/farmer/mnist", small_mnist()[0])
    assert len(open_images("mnist")) == 12 and server.asked == []


def test_without_a_home_folder_only_named_sets_are_out_of_reach(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    write("d/1.png")
    assert found("d") == 1
    assert "XDG_CACHE_HOME" in refused(open_images, "mnist")


def test_a_known_name_is_the_named_set_and_a_path_has_a_separator(monkeypatch, capsys, server):
    monkeypatch.setattr(datasets, "digits", lambda n, *rest: digits(n // 100, *rest))
    write("digits/a/1.png", "digits/b/1.png", "mnist/1.png", "d/1.png", "set:test/1.png")
    images = open_images("digits", 8)
    assert len(images) == 40 and images.test == "digits:test" and images.classes[3] == "3"
    assert "write ./digits" in capsys.readouterr().err
    assert len(open_images("digits:test", 8)) == 5
    assert len(open_images("mnist")) == 12
    assert found("./digits") == {"a": 1, "b": 1} and found("d") == 1 and found("./mnist") == 1
    assert found("set:test") == 1  # a folder of that name
    for name in ("", "nothing", "mnist:val", ":test"):
        assert "expected digits" in refused(open_images, name)
    assert "size" in refused(open_images, "digits")


def test_digits_depend_on_seed_and_number():
    whole = digits(20, 16, 3, 0).array
    np.testing.assert_array_equal(digits(5, 16, 3, 0).array, whole[:5])
    assert not np.array_equal(digits(20, 16, 3, 1).array, whole)


def test_a_models_own_format_comes_first():
    own = Images("own", ["image 0"], array=np.zeros((1, 8, 8, 3), np.uint8))
    assert open_images("x.own", own=lambda source: own).path == "own"
    write("d/1.png")
    assert len(open_images("d", own=lambda source: None)) == 1


# ----------------------------------------------------------------------------- which set it is
def test_the_digest_sees_names_labels_and_pixels_but_not_the_place():
    write("d/a/1.png", "d/a/2.png", "d/b/3.png")
    first = open_images("d").digest()
    shutil.copytree("d", "elsewhere/deep/d")
    assert open_images("elsewhere").digest() == first
    picture(5).save("d/b/3.png")
    assert open_images("d").digest() != first
    os.rename("elsewhere/deep/d/a/2.png", "elsewhere/deep/d/a/4.png")
    assert open_images("elsewhere").digest() != first
    pixels = np.zeros((3, 8, 8), np.uint8)
    seen = set()
    for array, labels in ((pixels, [0, 1, 0]), (pixels + 1, [0, 1, 0]), (pixels, [0, 1, 1]),
                          (pixels.reshape(3, 4, 16), [0, 1, 0])):
        np.savez("a.npz", images=array, labels=np.array(labels))
        seen.add(open_images("a.npz").digest())
    assert len(seen) == 4
