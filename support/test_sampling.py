"""Drawing images and measuring likelihood with any model.

- A picture has a row for each class that was asked for, by name or number, whatever the count.
- A sweep has a column per value and the same noise in all of them, at guidance 0 too.
- An .npz has the names of ADM's evaluator, and with --log-prob what the model says of its images.
- Ctrl-C keeps what is there and says how much that is.
- Held-out likelihood is the mean over all images, with its standard error, parts and bits/dim.
- --denoise is compared with the noise that training ended with.
- A GPU's recorded loops (here a stand-in's) give the same images, and are none of a fork's own.
"""
import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image

import farmer
import sample
from examples import jacobi_inverse
from support import sampling
from support.checkpoints import load
from support.cli import UserError, run_script
from support.conftest import run
from support.data import dequantize, image_generators, open_split, quantize


def test_a_picture_has_a_row_for_each_class_that_was_asked_for(small_run, tmp_path, capsys):
    out = tmp_path / "x.png"
    for argv, rows, columns in (
        ("--num 12 --labels 0,1,2,3,4", 5, 3),
        ("--labels 7,3 --num 4", 2, 2),
        ("--labels 7,3 --num 1", 2, 1),
        ("--labels 10 --num 3", 1, 3),  # the null class
        ("--guidance 0.5", 10, 10),
    ):
        run(sample, small_run, "--out", out, *argv.split())
        with Image.open(out) as picture:
            assert picture.height == rows * 50
            assert (picture.width - columns * 50) in range(8, 60)
    said = "drawing 100 images: guidance 0.5, denoise 0.05, inverse exact"
    assert said in capsys.readouterr().err
    parts = tmp_path / "parts.png"
    run(sample, small_run, "--out", parts, "--guidance", 0.5, "--batch-size", 30)
    with Image.open(out) as a, Image.open(parts) as b:
        assert np.abs(np.array(a).astype(int) - np.array(b)).max() <= 1


def test_a_picture_of_many_classes_shows_ten_and_of_no_classes_one():
    assert sampling.picture_classes(1000) == list(range(0, 1000, 100))
    assert sampling.picture_classes(20) == list(range(20)) and sampling.picture_classes(0) == [0]
    assert sampling.class_names([1, 2, 3], ["a", "b"], 3) == ["b", "2", "null"]


def test_classes_are_chosen_by_name_or_number():
    names = ["cat", "Dog", "7", "dog"]
    assert sample.chosen_classes("DOG,Dog,0,7,Cat", names, 4) == [3, 1, 0, 2, 0]
    assert sample.chosen_classes("2,3", None, 3) == [2, 3]
    for text, known, classes in (("cow", names, 4), ("4", None, 3), ("0", None, 0)):
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
    run(sample, small_run, "--num", 6, "--sweep", "guidance=0,0.00001,3", "--out", out)
    (zero, a), (_, b), (three, c) = seen
    assert zero < 1e-5 and three == 3
    assert (a - b).abs().max() < 1e-3 < (a - c).abs().max()
    with Image.open(out) as picture:
        assert picture.height == 6 * 50 + 14


def test_log_prob_is_that_of_the_images_it_drew(small_run, tmp_path):
    out = tmp_path / "x.npz"
    run(sample, small_run, "--num", 5, "--labels", "1,4", "--log-prob", "--out", out)
    model, _ = load(small_run)
    labels = torch.tensor([1, 4, 1, 4, 1])
    with torch.no_grad():
        x = model.sample(labels, None, image_generators(0, range(5), torch.device("cpu")))
        log_p = model.log_prob(x, labels)
    with np.load(out) as file:
        assert file["arr_0"].dtype == np.uint8
        assert np.array_equal(file["arr_0"], quantize(x).permute(0, 2, 3, 1).numpy())
        assert file["arr_1"].tolist() == labels.tolist()
        assert file["numbers"].tolist() == list(range(5))
        for name, values in log_p._asdict().items():
            np.testing.assert_allclose(file[name], values, rtol=1e-5)
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.size == (5 * 50, 2 * 64)  # the lowest and the highest, with their values


@pytest.mark.parametrize("calls, argv, kept", [
    (3, ["--num", "50", "--batch-size", "4", "--out", "x.npz"], "holds 8 of 50 images"),
    (3, ["--num", "4", "--sweep", "guidance=0,1,2", "--out", "x.png"], "holds 8 of 12 images"),
    (1, ["--num", "50", "--out", "x.npz"], "nothing is written"),
])
def test_ctrl_c_keeps_what_is_there_and_says_so(
        small_run, tmp_path, monkeypatch, capsys, calls, argv, kept):
    monkeypatch.chdir(tmp_path)
    kind = type(load(small_run)[0])
    make = kind.sample
    left = [calls]

    def interrupted(*args):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return make(*args)

    monkeypatch.setattr(kind, "sample", interrupted)
    with pytest.raises(SystemExit) as ended:
        run_script(sample.main, [str(small_run), *argv])
    assert ended.value.code == 130 and kept in capsys.readouterr().err
    if calls == 1:
        assert not list(tmp_path.iterdir())
    elif "x.npz" in argv:
        with np.load("x.npz") as file:
            assert file["arr_0"].shape == (8, 16, 16, 3) and file["arr_1"].tolist() == [*range(8)]
    else:
        with Image.open("x.png") as picture:
            assert picture.height == 4 * 50 + 14


@pytest.mark.parametrize("noise", ["gaussian", "uniform", "rgb"])
def test_held_out_likelihood_by_hand(small_run, tiny_data, noise):
    model, _ = load(small_run)
    held_out = open_split(str(tiny_data), 16, 3, holdout=2).held_out
    values = []
    for place, number in enumerate(held_out.numbers):
        pixels, label = held_out.batch([place])
        generators = image_generators(1, [number], torch.device("cpu"))
        law = "gaussian" if noise == "gaussian" else "uniform"
        x = dequantize(pixels, law, 0.2, generators)
        with torch.no_grad():
            values.append(-model.log_prob(x, label).total.item() / 768)
    result = sampling.evaluate(model, held_out, noise, 0.2)
    assert result["images"] == 20
    assert result["nats_per_dim"] == pytest.approx(np.mean(values), rel=1e-5)
    assert result["standard_error"] == pytest.approx(np.std(values) / math.sqrt(19), rel=1e-3)
    parts = result["informative"] + result["redundant"] - result["logdet"]
    assert parts == pytest.approx(result["nats_per_dim"], rel=1e-5)
    if noise != "gaussian":
        bits = np.mean(values) / math.log(2) + 7
        assert result["bits_per_dim"] == pytest.approx(bits, rel=1e-5)
    assert ("bits_per_dim" in result) == (noise != "gaussian")
    some = sampling.evaluate(model, held_out, noise, 0.2, num=7)  # spread evenly
    assert some["images"] == 7
    assert some["nats_per_dim"] == pytest.approx(np.mean(values[::3]), rel=1e-5)


def test_denoise_is_compared_with_the_noise_of_training(small_run, tmp_path, capsys):
    model, extra = load(small_run)
    options = type(model.config.sampling)(denoise=0.5)
    run(sample, small_run, "--num", 1, "--denoise", 0.5, "--out", tmp_path / "x.png")
    assert "--denoise: got 0.5, but training ended with noise of std" in capsys.readouterr().err
    extra["training"]["noise"] = "uniform"
    with pytest.raises(UserError, match="uniform noise"):
        sampling.check_options(options, extra)


# ----------------------------------------------------------------------------- CUDA graphs
class FakeGraph:
    """In place of torch.cuda.CUDAGraph: replaying computes again, in the same memory."""

    def replay(self):
        outputs = sampling.tensors(self.replayed.function(*self.replayed.inputs))
        for old, new in zip(sampling.tensors(self.replayed.outputs), outputs, strict=True):
            old.copy_(new)


def record(self, args):
    self.graph = FakeGraph()
    self.graph.replayed = self
    self.inputs = sampling.tree_map_only(torch.Tensor, torch.Tensor.clone, args)
    self.outputs = self.function(*self.inputs)


def test_a_replayed_model_draws_the_same_images_and_is_itself_again(small_run, monkeypatch):
    """Batches of one size are replayed from the second one on; the last, smaller one is not."""
    monkeypatch.setattr(sampling.Replayed, "record", record)
    replays = []
    replay = FakeGraph.replay
    monkeypatch.setattr(FakeGraph, "replay", lambda self: (replays.append(1), replay(self)))
    model, _ = load(small_run)
    options = dataclasses.replace(model.config.sampling, guidance=1.0, inverse="exact")
    labels = torch.arange(10) % 3

    def images():
        made = sampling.sample_images(model, labels, options, seed=0, batch_size=3)
        return np.concatenate([batch for _, batch, _ in made]).astype(int)

    expected = images()
    assert len(model.replayable()) == 1 + model.config.flow_blocks
    with sampling.replaying(model, on=True):
        again = images()
    assert np.abs(again - expected).max() <= 1 and len(np.unique(expected)) > 50
    assert len(replays) == 2 * len(model.replayable())  # batches 2 and 3 of 3, 3, 3 and 1
    assert not any("inverse" in vars(block) for block in model.flow.blocks)
    assert "sample_informative" not in vars(model.prior)


def test_a_loop_of_a_forks_own_is_not_recorded():
    config = farmer.Config(flow_blocks=2)
    model = farmer.Farmer(config)
    model.flow.blocks[1] = jacobi_inverse.JacobiBlock(config, flip=False)
    assert [part for part, _ in model.replayable()] == [model.flow.blocks[0], model.prior]
    model.prior.__class__ = type("Guided", (farmer.Prior,), dict(draw=lambda *_: None))
    assert [name for _, name in model.replayable()] == ["inverse"]
