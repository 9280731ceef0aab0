"""Batches of images. Claims:

- A batch, its order and its mirroring depend on (seed, step) alone, whatever the workers, the
  start and the world; a model's own epoch order too.
- Worker processes give the same batches, send arrays through a pipe, outlive Ctrl-C and SIGTERM;
  their errors and their death are one line.
- A run trains on the training split and is evaluated on the hold-out, else on the test split.
- Classes follow the data in a new run, and the model in a trained one.
- Noise is each image's own and of its kind; quantize undoes dequantize.
- `prepare` gives the crops that training would have made, or names all broken images.
"""
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from support import batches as module
from support.batches import (
    batches,
    dequantize,
    hold_out,
    image_batches,
    image_generators,
    open_split,
    quantize,
)
from support.cli import UserError
from support.datasets import Images, digits, open_images


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder():
    """Two classes with 6 and 5 images of 8x8."""
    rng = np.random.default_rng(0)
    for i in range(11):
        name = f"set/{'ape' if i < 6 else 'bee'}/{i:02}.png"
        os.makedirs(os.path.dirname(name), exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(name)
    return "set"


def dataset_of(source, **options):
    return open_split(source, 8, 3, **options).train


def take(dataset, n, **options):
    """The first n batches, as arrays (images, labels, uid)."""
    defaults = {"batch_size": 8, "start_step": 0, "seed": 3, "workers": 0, "flip": True}
    stream = batches(dataset, **(defaults | options))
    found = [[t.numpy() for t in batch] for batch in itertools.islice(stream, n)]
    stream.close()
    return found


def joined(found, k):
    return np.concatenate([batch[k] for batch in found])


def same(a, b):
    for x, y in zip(itertools.chain(*a), itertools.chain(*b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def refused(call, *args, **kwargs):
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# ----------------------------------------------------------------------------- order
def test_batches_depend_on_seed_and_step_alone(folder):
    dataset = dataset_of(folder)
    whole = take(dataset, 7)
    assert whole[0][0].shape == (8, 3, 8, 8)
    assert [array.dtype for array in whole[0]] == [np.uint8, np.int64, np.int64]
    same(take(dataset, 7, workers=2), whole)
    same(take(dataset, 4, workers=1, start_step=3), whole[3:])
    for world in (2, 4):
        parts = [take(dataset, 7, rank=rank, world=world) for rank in range(world)]
        steps = zip(*parts, strict=True)
        same([[np.concatenate(x) for x in zip(*ranks, strict=True)] for ranks in steps], whole)
    np.testing.assert_array_equal(joined(whole, 2), np.arange(56))
    assert "--batch-size" in refused(take, dataset, 1, world=3)


def test_order_and_mirroring_are_those_of_the_rule(folder):
    dataset = dataset_of(folder)
    images, labels = dataset.batch(range(11))
    found = take(dataset, 7)
    for g, image, label in zip(range(56), joined(found, 0), joined(found, 1), strict=True):
        epoch, place = divmod(g, 11)
        i = np.random.default_rng([3, epoch]).permutation(11)[place]
        mirrored = np.random.default_rng([3, epoch, 1]).random(11)[place] < 0.5
        expected = images[i].numpy()
        np.testing.assert_array_equal(image, expected[..., ::-1] if mirrored else expected)
        assert label == labels[i]
    plain = joined(take(dataset, 7, flip=False), 0)
    assert {x.tobytes() for x in plain[:11]} == {x.tobytes() for x in images.numpy()}


def by_class(labels, generator):
    """An epoch of 4: both images of a class, then both of the other."""
    first, second = torch.randperm(2, generator=generator).tolist()
    pairs = [torch.where(labels == k)[0][:2] for k in (first, second)]
    return torch.cat(pairs)


def test_a_models_epoch_order_replaces_the_permutation(folder):
    dataset = dataset_of(folder)
    options = {"epoch_order": by_class, "flip": False, "batch_size": 3}
    found = take(dataset, 16, **options)
    labels = joined(found, 1).reshape(12, 4)
    assert ((labels[:, 0] == labels[:, 1]) & (labels[:, 2] == labels[:, 3])).all()
    assert len({tuple(epoch) for epoch in labels.tolist()}) == 2  # epochs differ
    same(take(dataset, 4, start_step=12, workers=1, **options), found[12:])
    assert (labels != joined(take(dataset, 16, seed=4, **options), 1).reshape(12, 4)).any()


def test_arrays_give_the_same_batches_as_files_and_stay_as_they_are(folder):
    files = dataset_of(folder)
    array = files.batch(range(11))[0].permute(0, 2, 3, 1).numpy()
    np.savez("a.npz", images=array, labels=files.labels)
    arrays = dataset_of("a.npz")
    assert arrays.ready and not files.ready
    same(take(arrays, 5), take(files, 5))
    np.testing.assert_array_equal(arrays.images.array, array)


# ----------------------------------------------------------------------------- workers
def test_workers_ignore_signals_and_their_death_is_one_line(folder):
    stream = batches(dataset_of(folder), batch_size=4, start_step=0, seed=0, workers=1)
    next(stream)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)
    os.kill(worker.pid, signal.SIGTERM)  # as a whole process group gets them
    for _ in range(6):
        next(stream)
    assert worker.is_alive()
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL  # no error in the middle of a save
    os.kill(worker.pid, signal.SIGKILL)
    assert "--workers" in refused(lambda: [next(stream) for _ in range(100)])


def test_an_image_that_breaks_is_one_line_from_workers_too(folder):
    dataset = dataset_of(folder)
    Path(folder, "bee/08.png").write_bytes(b"")
    for workers in (0, 2):
        assert "bee/08.png" in refused(take, dataset, 3, workers=workers)


def test_batches_come_through_a_pipe():
    """Tensors would come through /dev/shm, where Docker has 64 MB."""
    work = module.in_workers(np.zeros, [(2, 3), (4,)], 1)
    assert [type(result) for result in work] == [np.ndarray] * 2


def test_a_process_that_leaves_its_workers_ends(folder):
    """Python would send them SIGTERM, which they ignore, and wait."""
    code = ("from support.batches import *; import builtins; "
            "d = open_split('set', 8, 3).train; "
            "builtins.kept = batches(d, batch_size=4, start_step=0, seed=0); next(kept)")
    path = str(Path(module.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": path}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=60).returncode == 0


def test_image_batches_keep_their_numbers(folder):
    images = open_images(folder)
    whole = list(image_batches(images, np.array([1, 4, 7, 9, 10]), 2, workers=2))
    assert [numbers.tolist() for numbers, _ in whole] == [[1, 4], [7, 9], [10]]
    np.testing.assert_array_equal(joined(whole, 1), [images.read(i) for i in (1, 4, 7, 9, 10)])
    small = list(image_batches(images, np.arange(3), 3, size=4, channels=1))
    assert small[0][1].shape == (3, 4, 4, 1)
    Image.new("RGB", (9, 8)).save(f"{folder}/ape/00.png")
    assert "9x8" in refused(list, image_batches(images, np.arange(3), 3))
    drawn = digits(4, 8, 1, 0)
    found = list(image_batches(drawn, np.arange(4), 3))
    np.testing.assert_array_equal(joined(found, 1), drawn.array)


# ----------------------------------------------------------------------------- splits
def test_the_hold_out_is_the_last_of_each_class():
    labels = np.array([1, 0, 1, 0, 1, 0, 3, 1, 3])
    images = Images("x", [str(i) for i in range(9)], labels)
    train, held = hold_out(images, 1)
    assert held.tolist() == [5, 7, 8] and train.tolist() == [0, 1, 2, 3, 4, 6]
    assert [len(part) for part in hold_out(images, 0)] == [9, 0]
    assert hold_out(Images("x", list("abcdef")), 2)[1].tolist() == [4, 5]
    assert "2 of class 3" in refused(hold_out, images, 2)


def test_evaluation_gets_the_hold_out_or_else_the_test_split(folder):
    os.renames(folder, "both/train")
    for name in ("bee/07.png", "ape/02.png"):
        os.renames(f"both/train/{name}", f"both/test/{name}")
    split = open_split("both", 8, 3)
    assert len(split.train) == 9 and split.held_out.labels.tolist() == [0, 1] and split.is_test
    assert "test split: both:test, 2 images" in split.summary
    held = open_split("both", 8, 3, holdout=1)
    assert len(held.train) == 7 and not held.is_test and held.digest == split.digest
    assert held.held_out.indices.tolist() == [4, 8] and held.held_out.labels.tolist() == [0, 1]
    assert open_split("both:train", 8, 3).held_out is None
    assert "smaller than image_size 16" in refused(open_split, "both", 16, 3)


def numbered(labels):
    np.savez("a.npz", images=np.zeros((len(labels), 8, 8, 3), np.uint8), labels=np.array(labels))
    return "a.npz"


def test_a_new_model_has_the_classes_of_the_data(folder):
    split = open_split(folder, 8, 3)
    assert split.num_classes == 2 and split.classes == ["ape", "bee"]
    flat = open_split(f"{folder}/ape", 8, 3)
    assert flat.num_classes == 0 and flat.classes == [] and not flat.train.labels.any()
    os.rename(f"{folder}/bee", "elsewhere")  # a single folder may be a wrapper
    assert open_split(folder, 8, 3).num_classes == 0
    for labels, flag, expected in (([0, 2, 2], None, 3), ([2, 3], None, 4), ([0, 1], 5, 5),
                                   ([1, 2], 4, 4), ([5, 7], 0, 0)):
        split = open_split(numbered(labels), 8, 3, num_classes=flag)
        assert split.num_classes == expected and split.classes == []
        assert split.train.labels.tolist() == (labels if expected else [0, 0])
    for part, labels in (("train", [0, 1]), ("test", [0, 4])):
        os.makedirs(f"both/{part}")
        np.save(f"both/{part}/images.npy", np.zeros((2, 8, 8, 3), np.uint8))
        np.save(f"both/{part}/labels.npy", labels)
    assert open_split("both", 8, 3).num_classes == 5
    assert "subtract 1" in refused(open_split, numbered([1, 3, 2]), 8, 3)
    assert "subtract 1" in refused(open_split, numbered([1, 3, 2]), 8, 3, num_classes=3)
    assert "expected 0 to 3" in refused(open_split, numbered([0, 5]), 8, 3, num_classes=4)
    assert "no labels" in refused(open_split, f"{folder}/ape", 8, 3, num_classes=4)


def test_a_trained_model_keeps_its_classes(folder):
    model = {"classes": ["bee", "cow", "ape"], "num_classes": 3}
    split = open_split(folder, 8, 3, **model)
    assert split.train.labels.tolist() == [2] * 6 + [0] * 5 and split.classes == model["classes"]
    assert split.digest == open_images(folder).digest()  # it is that of the data alone
    assert "bee" in refused(open_split, folder, 8, 3, classes=["ape"], num_classes=1)
    assert "ape, bee" in refused(open_split, folder, 8, 3, classes=[], num_classes=5)
    trained = open_split(numbered([1, 3]), 8, 3, classes=[], num_classes=5)
    assert trained.train.labels.tolist() == [1, 3]


# ----------------------------------------------------------------------------- floats
def test_noise_is_each_images_own_and_of_its_kind():
    x = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    many = torch.full((400, 1, 8, 8), 100, dtype=torch.uint8)
    device = torch.device("cpu")

    def noisy(kind, sigma=0.0, numbers=range(4), images=x):
        return dequantize(images, kind, sigma, image_generators(5, numbers, device))

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
    assert noisy("rgb", 3.0, range(400), 0 * many).min() < -1  # not clipped
    assert "gaussian, uniform, rgb or none" in refused(noisy, "gauss")


# ----------------------------------------------------------------------------- prepare
def prepare(*argv):
    module.main(["prepare", *map(str, argv), "--workers", "1"])


@pytest.mark.parametrize("channels", [1, 3])
def test_prepare_gives_the_crops_of_training(folder, channels, capsys):
    prepare(folder, "out", "--image-size", 4, "--channels", channels)
    assert "11 images 8x8" in capsys.readouterr().out
    files, made = (open_split(source, 4, channels) for source in (folder, "out"))
    assert made.train.ready and isinstance(made.train.images.array, np.memmap)
    assert made.classes == files.classes and made.num_classes == 2
    same(take(made.train, 5), take(files.train, 5))
    assert "out exists" in refused(prepare, folder, "out", "--image-size", 4)


def test_prepare_keeps_splits_and_numbers(folder):
    os.renames(folder, "both/Train")
    os.renames("both/Train/bee/08.png", "both/val/bee/08.png")
    prepare("both", "out", "--image-size", 8)
    made = open_split("out", 8, 3)
    assert made.is_test and made.held_out.labels.tolist() == [1] and len(made.train) == 10
    expected = open_split("both", 8, 3).held_out.batch([0])[0]
    assert torch.equal(made.held_out.batch([0])[0], expected)
    prepare(numbered([1, 0, 1]), "plain", "--image-size", 8)
    assert sorted(os.listdir("plain")) == ["images.npy", "labels.npy"]
    assert open_split("plain", 8, 3).train.labels.tolist() == [1, 0, 1]


def test_prepare_names_all_broken_images(folder):
    for name in ("ape/02.png", "bee/08.png"):
        Path(folder, name).write_bytes(b"no image")
    text = refused(module.prepare, open_images(folder), Path("out"), 8, 3, 1)
    assert "2 of 11" in text and "ape/02.png" in text and "bee/08.png" in text
    assert not Path("out/images.npy").exists()
