"""The small network: it learns, reads, and says what it cannot read. Offline.

    pytest -q support/test_classifier.py
"""
import re

import numpy as np
import pytest
import torch
from PIL import Image

import farmer
from support import classifier
from support.classifier import augmented, read_right
from support.conftest import fails
from support.data import digits


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A network that reads the built-in digits, its file, and what was said when it was fitted."""
    path = tmp_path_factory.mktemp("reader") / "digits.pt"
    data = digits(600, 16, 3, 0)
    np.savez(path.with_suffix(".npz"), images=data.array, labels=data.labels)
    classifier.main(["fit", str(path.with_suffix(".npz")), str(path), "--epochs", "10"])
    return path


def share(capsys) -> tuple[float, int]:
    """Per cent and number of images in the line that was printed."""
    found = re.search(r"([0-9.]+)% of ([0-9]+)", capsys.readouterr().out)
    return float(found[1]), int(found[2])


def test_fit_and_read(reader, tmp_path, capsys):
    """A fifth of each class is held out and read right; so are digits of another seed, and no shuffled labels."""
    heldout = tmp_path / "heldout.npz"
    data = reader.with_suffix(".npz")
    classifier.main(["heldout", str(data), str(heldout)])
    with np.load(heldout) as f:
        assert f["images"].shape == (120, 16, 16, 3) and (np.bincount(f["labels"]) == 12).all()
        np.savez(tmp_path / "wrong.npz", images=f["images"], labels=(f["labels"] + 1) % 10)
    classifier.main(["read", str(reader), str(heldout)])
    percent, number = share(capsys)
    assert percent > 90 and number == 120
    classifier.main(["read", str(reader), str(tmp_path / "wrong.npz")])
    assert share(capsys)[0] < 10


def test_a_fitted_network_is_a_torchscript_file(reader):
    """What fid.py --features takes: features (N, 128) of images in [-1, 1], and the channels that it reads."""
    model = torch.jit.load(reader)
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    assert model(images).shape == (5, 128) and model.classify(images).shape == (5, 10)
    assert model.channels == 3 and not model.training
    assert torch.allclose(model.classify(images)[2:4], model.classify(images[2:4]), atol=1e-4)  # whatever the batch


def test_grey_images(reader, tmp_path, capsys):
    """Fitted with one channel as they are; a network of three says what to do."""
    data = digits(80, 16, 1, 0)
    np.savez(tmp_path / "grey.npz", images=data.array, labels=data.labels)
    classifier.main(["fit", str(tmp_path / "grey.npz"), str(tmp_path / "grey.pt"), "--epochs", "1"])
    assert torch.jit.load(tmp_path / "grey.pt").channels == 1
    classifier.main(["read", str(tmp_path / "grey.pt"), str(tmp_path / "grey.npz")])
    fails(capsys, classifier, ["read", reader, tmp_path / "grey.npz"], "1 channels", "reads 3", "fit", "--channels 1")
    fails(capsys, classifier, ["read", tmp_path / "grey.pt", reader.with_suffix(".npz")], "3 channels", "--channels 3")
    three = ["fit", str(tmp_path / "grey.npz"), str(tmp_path / "three.pt"), "--epochs", "1", "--channels", "3"]
    classifier.main(three)
    assert torch.jit.load(tmp_path / "three.pt").channels == 3


@pytest.mark.parametrize("count", [10, 37, 99])
def test_fewer_than_a_hundred_images(tmp_path, capsys, count):
    data = digits(count, 16, 3, 0)
    np.savez(tmp_path / "few.npz", images=data.array, labels=data.labels)
    classifier.main(["fit", str(tmp_path / "few.npz"), str(tmp_path / "few.pt"), "--epochs", "1"])
    out = capsys.readouterr().out
    assert ("training images" in out) == (count < 50)  # nothing is held out where a class has fewer than 5


def test_data_by_name_and_split(tmp_path, monkeypatch):
    """A named split stands alone; with two splits the test split is what is held out."""
    sizes = {"train": 30, "t10k": 20}
    for name, n in sizes.items():
        data = digits(n, 16, 1, 0)
        for kind, array in (("images-idx3", data.array[..., 0]), ("labels-idx1", data.labels.astype(np.uint8))):
            shape = b"".join(int(s).to_bytes(4, "big") for s in array.shape)
            head = bytes([0, 0, 8, array.ndim]) + shape
            (tmp_path / f"{name}-{kind}-ubyte").write_bytes(head + array.tobytes())
    for source, number in ((tmp_path, 20), (f"{tmp_path}:test", 10), (f"{tmp_path}:train", 10)):
        holdout = [] if source == tmp_path else ["--holdout", "1"]
        classifier.main(["heldout", str(source), str(tmp_path / "x.npz"), *holdout])
        with np.load(tmp_path / "x.npz") as f:
            assert f["images"].shape == (number, 16, 16, 1)


def test_noise_and_augmentation():
    """--noise 0 adds none, which features for an FD need; the largest std is what is asked for."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (500, 1, 8, 8), dtype=torch.uint8)
    exact = images.float() / 127.5 - 1
    assert torch.equal(augmented(images, "none", 0.0), exact)
    std = (augmented(images, "none", 0.3) - exact).flatten(1).std(1)
    assert 0.25 < std.max() < 0.4 and std.min() < 0.02
    mirrored = augmented(images, "flip", 0.0)
    assert mirrored.shape == images.shape and not torch.equal(mirrored, exact)
    shifts = [exact.roll((dy, dx), (2, 3)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    assert any(torch.equal(augmented(images, "shift", 0.0), s) for s in shifts)
    ways = torch.stack([way for s in shifts for way in (s, s.flip(3))])  # (18, b, 1, 8, 8)
    found = (mirrored == ways).flatten(2).all(2)  # (18, b): the way that each image went
    assert found.any(0).all()
    assert 200 < found[1::2].any(0).sum() < 300  # half of them mirrored


def test_reading_is_the_share_of_right_labels():
    class Brightest(torch.nn.Module):
        def classify(self, x):
            return x[:, 0, 0]
    images = torch.zeros(1200, 1, 1, 4, dtype=torch.uint8)
    labels = torch.arange(1200) % 4
    images[torch.arange(1200), 0, 0, labels] = 255
    labels[:300] = (labels[:300] + 1) % 4
    assert read_right(Brightest(), images, labels) == 0.75


def test_swap(reader, small_run, tmp_path, capsys, monkeypatch):
    """Nothing exchanged changes nothing; parts that are exchanged change the picture."""
    classifier.main(["swap", str(reader), str(small_run), "--num", "20", "--picture", str(tmp_path / "pairs.png")])
    lines = capsys.readouterr().out.splitlines()[-3:]
    errors = [float(re.search(r"MSE ([0-9.]+)", line)[1]) for line in lines]
    assert [line.split()[0] for line in lines] == ["nothing", "Z_R", "Z_I"]
    assert errors[0] < 1e-3 < min(errors[1:]) and Image.open(tmp_path / "pairs.png").size[0] > 100
    fails(capsys, classifier, ["swap", reader, tmp_path], "ckpt.pt")
    fails(capsys, classifier, ["swap", reader, small_run, "--picture", tmp_path / "none" / "x.png"], "create it")
    monkeypatch.delattr(farmer.Farmer, "exchange")
    fails(capsys, classifier, ["swap", reader, small_run], "farmer", "exchange")


def test_what_it_refuses(reader, tmp_path, capsys):
    data, out = reader.with_suffix(".npz"), tmp_path / "x.pt"
    flat = tmp_path / "flat.npz"
    np.savez(flat, images=np.zeros((5, 8, 8, 3), np.uint8))
    (tmp_path / "text.pt").write_text("no network")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "linear.pt")
    for argv, words in (
            (["fit", "/nonexistent", out], ["/nonexistent"]), (["fit", flat, out], ["no labels"]),
            (["fit", data, tmp_path / "none" / "x.pt"], ["create it"]), (["guess", data, out], ["guess"]),
            (["fit", data, out, "--epochs", "0"], ["epochs"]), (["read", tmp_path / "text.pt", data], ["text.pt"]),
            (["fit", data, out, "--noise", "-1"], ["noise"]), (["fit", data, out, "--noise", "nan"], ["noise"]),
            (["fit", data, out, "--noise", "inf"], ["noise"]), (["fit", data, out, "--holdout", "60"], ["hold out"]),
            (["fit", data, out, "--channels", "2"], ["channels"]), (["fit", data, out, "--seed", "-1"], ["seed"]),
            (["fit", data, out, "--image-size", "17"], ["image_size 17"]),
            (["heldout", data, out, "--holdout", "0"], ["--holdout"]),
            (["read", tmp_path / "linear.pt", data], ["linear.pt"]), (["read", reader, flat], ["no labels"]),
            (["read", out, data], ["x.pt"]), (["fit", "", out], ["--data", "empty"])):
        fails(capsys, classifier, argv, *words)
        assert not out.exists()
