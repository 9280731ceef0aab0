"""Drawing images and measuring likelihood with any model.

- A picture has a row for each class that was asked for, by name or number, whatever the count.
- A sweep has a column per value and the same noise in all of them, at guidance 0 too.
- --log-prob writes what the model says of the images that it drew.
- Held-out likelihood is the mean over all images, with its standard error, parts and bits/dim.
- --denoise is compared with the noise that training ended with.
"""
import math

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from support import sampling
from support.batches import ImageDataset, dequantize, image_generators, open_split
from support.checkpoints import load
from support.cli import UserError


def test_a_picture_has_a_row_for_each_class_that_was_asked_for(small_run, tmp_path):
    out = tmp_path / "x.png"
    for argv, rows, columns in (
        ("--num 12 --labels 0,1,2,3,4", 5, 3),
        ("--labels 7,3 --num 4", 2, 2),
        ("--labels 10 --num 3", 1, 3),  # the null class
        ("", 10, 10),
    ):
        sample.main([str(small_run), "--out", str(out), *argv.split()])
        with Image.open(out) as picture:
            assert picture.height == rows * 50
            assert (picture.width - columns * 50) in range(8, 60)


def test_classes_are_chosen_by_name_or_number():
    names = ["cat", "dog", "7"]
    assert sample.chosen_classes("dog,0,7", names, 3) == [1, 0, 2]
    assert sample.chosen_classes("2,3", None, 3) == [2, 3]
    for text, known, classes in (("cow", names, 3), ("4", None, 3), ("0", None, 0)):
        with pytest.raises(UserError, match="--labels"):
            sample.chosen_classes(text, known, classes)


def test_a_sweep_shares_its_noise_at_guidance_0_too(small_run, tmp_path, monkeypatch):
    seen = []
    model, _ = load(small_run)
    make = type(model).sample

    def spy(self, labels, options=None, generators=None):
        seen.append((options.guidance, make(self, labels, options, generators)))
        return seen[-1][1]

    monkeypatch.setattr(type(model), "sample", spy)
    out = tmp_path / "x.png"
    sample.main([str(small_run), "--num", "6", "--sweep", "guidance=0,0.00001,3",
                 "--out", str(out)])
    (zero, a), (_, b), (three, c) = seen
    assert zero < 1e-5 and three == 3
    assert (a - b).abs().max() < 1e-3 < (a - c).abs().max()
    with Image.open(out) as picture:
        assert picture.height == 6 * 50 + 14


def test_log_prob_is_that_of_the_images_it_drew(small_run, tmp_path):
    out = tmp_path / "x.npz"
    argv = ["--num", "5", "--labels", "1,4", "--log-prob", "--out", str(out)]
    sample.main([str(small_run), *argv])
    with np.load(out) as file:
        assert file["labels"].tolist() == [1, 4, 1, 4, 1]
        parts = file["informative"] + file["redundant"] + file["logdet"]
        np.testing.assert_allclose(file["total"], parts, rtol=1e-5)
    model, _ = load(small_run)
    labels = torch.tensor([1, 4, 1, 4, 1])
    options = model.config.sampling
    ((_, _, x),) = sampling.sample_images(model, labels, options, seed=0, batch_size=5)
    with np.load(out) as file, torch.no_grad():
        np.testing.assert_allclose(file["total"], model.log_prob(x, labels).total, rtol=1e-5)
    assert out.with_suffix(".png").exists()


@pytest.mark.parametrize("noise", ["gaussian", "uniform", "rgb"])
def test_held_out_likelihood_by_hand(small_run, tiny_data, noise):
    model, _ = load(small_run)
    split = open_split(str(tiny_data), 16, 3, holdout=2)
    values = []
    for place, number in enumerate(split.held_out.indices):
        pixels, label = split.held_out.batch([place])
        generators = image_generators(1, [number], torch.device("cpu"))
        law = "gaussian" if noise == "gaussian" else "uniform"
        x = dequantize(pixels, law, 0.2, generators)
        with torch.no_grad():
            values.append(-model.log_prob(x, label).total.item() / 768)
    result = sampling.evaluate(model, split.held_out, noise, 0.2)
    assert result["images"] == 20
    assert result["nats_per_dim"] == pytest.approx(np.mean(values), rel=1e-5)
    assert result["standard_error"] == pytest.approx(np.std(values) / math.sqrt(19), rel=1e-3)
    parts = result["informative"] + result["redundant"] - result["logdet"]
    assert parts == pytest.approx(result["nats_per_dim"], rel=1e-5)
    if noise != "gaussian":
        bits = np.mean(values) / math.log(2) + 7
        assert result["bits_per_dim"] == pytest.approx(bits, rel=1e-5)
    assert ("bits_per_dim" in result) == (noise != "gaussian")
    some = sampling.evaluate(model, split.held_out, noise, 0.2, num=7)
    assert some["images"] == 7 and isinstance(split.held_out, ImageDataset)


def test_denoise_is_compared_with_the_noise_of_training(small_run, capsys):
    model, extra = load(small_run)
    options = type(model.config.sampling)(denoise=0.5)
    sampling.check_options(options, extra)
    assert "--denoise: got 0.5, but training ended with noise of std" in capsys.readouterr().err
    extra["training"]["noise"] = "uniform"
    with pytest.raises(UserError, match="uniform noise"):
        sampling.check_options(options, extra)
