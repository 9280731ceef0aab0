"""What scripts do with any model: draw, sweep a setting, leave out what is not finite, weigh what was drawn."""
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from support.checkpoint import load
from support.cli import UserError
from support.conftest import fails
from support.sampling import check_options, chosen_classes, grid, parse_sweep, sample_images


def made(path) -> dict:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def test_log_prob_is_that_of_the_images_drawn(small_run, tmp_path):
    """In nats, with its parts, of the floats behind the pixels; and the picture of the extremes beside it."""
    sample.main([str(small_run), "--num", "12", "--log-prob", "--out", str(tmp_path / "x.npz"), "--batch-size", "5"])
    found = made(tmp_path / "x.npz")
    model, _ = load(small_run)
    labels = torch.from_numpy(found["labels"])
    (_, pixels, x), = sample_images(model, labels, model.config.sampling, 0, 12)
    assert (pixels == found["images"]).all()
    with torch.no_grad():
        expected = model.log_prob(x, labels)
    for name, values in expected._asdict().items():
        assert np.allclose(found[name], values, rtol=1e-4, atol=1e-2), name
    assert Image.open(tmp_path / "x.png").size[0] > 0


def test_a_sweep_has_a_column_for_each_value_and_the_same_noise(small_run, tmp_path):
    """The middle column is what the setting gives alone."""
    argv = [str(small_run), "--labels", "1,2", "--seed", "3", "--guidance", "0"]
    sample.main([*argv, "--sweep", "T-sigma=0,1,1.5", "--out", str(tmp_path / "s.png")])
    sample.main([*argv, "--num", "2", "--T-sigma", "1", "--out", str(tmp_path / "one.npz")])
    picture = np.asarray(Image.open(tmp_path / "s.png"))
    one = made(tmp_path / "one.npz")["images"]
    scale = 48 // 16
    left, top, size = 8 + 7, 14, 16 * scale
    for row in range(2):
        y, x = top + row * (size + 2), left + size + 2
        tile = picture[y:y + size:scale, x:x + size:scale]
        assert (tile == one[row]).all()
        assert (picture[y:y + size, left:left + size] != picture[y:y + size, x:x + size]).any()


@pytest.mark.parametrize("sweep", ["T_sigma", "T_sigma=", "nothing=1", "T_sigma=a", "T_sigma=-1"])
def test_a_sweep_that_makes_no_sense_is_refused(small_run, tmp_path, capsys, sweep):
    fails(capsys, sample, [small_run, "--sweep", sweep, "--out", tmp_path / "s.png"], "T_sigma")
    assert not (tmp_path / "s.png").exists()


@pytest.mark.parametrize("flags, word", [("--sweep guidance=0,1 --out x.npz", "--out X.png"),
                                         ("--log-prob --out x.png", "--out X.npz"), ("-n 999999999999", "GiB")])
def test_sample_py_refuses_before_the_work(small_run, tmp_path, monkeypatch, capsys, flags, word):
    monkeypatch.chdir(tmp_path)
    fails(capsys, sample, [small_run, *flags.split()], word)
    assert not list(tmp_path.iterdir())


class Half(torch.nn.Module):
    """Every second image is not finite."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def sample(self, labels, options=None, generators=None):
        x = torch.rand(len(labels), 1, 2, 2)
        x[::2, 0, 0, 0] = torch.nan
        return x


def test_what_is_not_finite_is_left_out_and_counted(capsys):
    drawn = list(sample_images(Half(), torch.zeros(10, dtype=torch.long), None, 0, 4, start=20))
    assert np.concatenate([indices for indices, _, _ in drawn]).tolist() == [21, 23, 25, 27, 29]
    assert "5 of 10 samples" in capsys.readouterr().err


def test_denoising_is_refused_where_there_is_no_gaussian_noise(small_run):
    options = dataclasses.replace(load(small_run)[0].config.sampling, denoise=0.1)
    check_options(options, dict(training=dict(noise="gaussian")))
    with pytest.raises(UserError, match="uniform"):
        check_options(options, dict(training=dict(noise="uniform")))


def test_classes_of_a_picture_and_of_an_array():
    assert chosen_classes(None, 3, True) == [0, 1, 2] and chosen_classes("2,3", 3, False) == [2, 3]
    assert chosen_classes(None, 1000, True) == [100 * i for i in range(10)]
    assert chosen_classes(None, 0, True) == [0]


def test_grid_places_images_in_rows():
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1).repeat(48, 1).repeat(48, 2)
    picture = np.asarray(grid(images, 3))
    assert picture.shape == (100, 150, 3)
    assert [picture[0, 50 * i, 0] for i in range(3)] + [picture[50, 50 * i, 0] for i in range(3)] == list(range(6))


def test_parse_sweep_reads_values_of_the_fields_type(small_run):
    options = load(small_run)[0].config.sampling
    assert [o.s_c for o in parse_sweep("s-c=1,7", options).values()] == [1, 7]
