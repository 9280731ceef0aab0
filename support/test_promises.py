"""The ten promises that users rely on, each by tests that carry its number.

 1. Exact: what a run saved has its inverse and density still (all of it: test_farmer.py).
 2. A run that is killed resumes to the bit; ckpt.pt is never half a file; a full disk loses
    nothing that was saved; Ctrl-C saves.
 3. torchrun with two processes is one process, in training and in sampling.
 4. Which image one gets depends on (seed, number) alone.
 5. A checkpoint is data: no code in it runs, its model is the name of a plain module.
 6. A user's mistake is one line and exit code 2, and nothing is written; a bug in a fork shows its
    traceback.
 7. Diverging runs stop and keep the last good checkpoint; outlier steps are skipped and counted.
 8. Samples that are not finite are left out, counted and reported.
 9. fid.py measures these samples (that its numbers are right: test_fid.py).
10. A fork adds one file and edits none (all that it can do: examples/test_examples.py).
"""
import errno
import json
import os
import re
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

import fid
import sample
import train
from results import likelihood
from support import checkpoints, cli
from support.checkpoints import load
from support.conftest import (
    SMALL_FLAGS,
    command,
    fails,
    same_weights,
    succeeds,
    torchrun,
    weights,
)
from support.sampling import sample_images


def drawn(model, labels, seed: int, batch_size: int, start: int = 0) -> np.ndarray:
    options = model.config.sampling
    batches = sample_images(model, labels, options, seed, batch_size, start)
    return np.concatenate([images for _, images, _ in batches])


# ----------------------------------------------------------------------------- 1
def test_promise_1_a_trained_flow_is_inverted_and_its_parts_add_up(digits_run):
    model, _ = load(digits_run)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.3
    X = model.patches(x)
    Z, _ = model.flow(X)
    assert (Z - X).abs().max() > 0.1
    assert (model.flow.inverse(Z) - X).abs().max() < 1e-4
    log_p = model.log_prob(x, torch.arange(4))
    torch.testing.assert_close(log_p.total, log_p.informative + log_p.redundant + log_p.logdet)


# ----------------------------------------------------------------------------- 2
def test_promise_2_a_killed_run_resumes_to_the_bit(tmp_path, tiny_data):
    # a file of images, so that worker processes decode them, and averages, which are saved too
    folder = tmp_path / "data"
    digits = np.load(tiny_data)
    for i, (image, label) in enumerate(zip(digits["images"], digits["labels"], strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / str(label) / f"{i:02d}.png")
    flags = [*SMALL_FLAGS, "--workers", "1", "--ema", "0.9", "--optimizer", "muon", "--steps", "40",
             "--save-every", "7", "--log-every", "1", "--data", str(folder)]
    killed = tmp_path / "killed"
    undisturbed = command("train.py", *flags, "--out", tmp_path / "whole")
    process = command("train.py", *flags, "--out", killed)
    log = killed / "log.jsonl"
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 12):
        time.sleep(0.02)
    process.kill()
    process.wait()
    saved = torch.load(killed / "ckpt.pt", weights_only=True)["extra"]["step"]
    assert 0 < saved < 40 and saved % 7 == 0
    succeeds(command("train.py", *flags, "--resume", "--out", killed))
    succeeds(undisturbed)
    assert same_weights(weights(killed), weights(tmp_path / "whole"))
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 41)), steps


def test_promise_2_a_full_disk_loses_nothing_that_was_saved(small_run, tmp_path, monkeypatch,
                                                            capsys):
    model, extra = load(small_run)
    file = tmp_path / "ckpt.pt"
    checkpoints.save(file, model, **extra)
    before = file.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cli.os, "fsync", full)
    with pytest.raises(cli.UserError, match="No space left"):
        checkpoints.save(file, model, **extra)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["ckpt.pt"]


def test_promise_2_a_disk_that_fills_up_is_said_with_the_step_that_is_there(tmp_path, tiny_data,
                                                                           monkeypatch, capsys):
    real = os.fsync
    calls = []

    def fills_up(descriptor):
        calls.append(1)
        if len(calls) > 4:  # the log, and the checkpoints of steps 0, 4 and 8
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(cli.os, "fsync", fills_up)
    out = tmp_path / "run"
    flags = [*SMALL_FLAGS, "--steps", "20", "--save-every", "4", "--data", tiny_data]
    fails(capsys, train, [*flags, "--out", out], "No space left", "saved at step 8", "--resume")
    assert torch.load(out / "ckpt.pt", weights_only=True)["extra"]["step"] == 8


def test_promise_2_ctrl_c_saves(tmp_path, tiny_data):
    out = tmp_path / "run"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    process = command("train.py", *SMALL_FLAGS, "--steps", "100000", "--log-every", "1",
                      "--data", tiny_data, "--out", out)
    signal.signal(signal.SIGINT, before)
    log = out / "log.jsonl"
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 130, printed
    assert "Traceback" not in printed
    step = int(re.search(r"stopped at step (\d+), saved", printed)[1])
    assert torch.load(out / "ckpt.pt", weights_only=True)["extra"]["step"] == step >= 3


def test_promise_2_data_that_fails_in_the_middle_costs_no_step(tmp_path, tiny_data, monkeypatch,
                                                               capsys):
    real = train.batches

    def failing(*args, **options):
        source = real(*args, **options)
        for _ in range(3):
            yield next(source)
        raise cli.UserError("d/1.png: cannot be read")

    monkeypatch.setattr(train, "batches", failing)
    out = tmp_path / "run"
    fails(capsys, train, [*SMALL_FLAGS, "--data", tiny_data, "--out", out], "d/1.png",
          "saved at step 3", "--resume")
    assert torch.load(out / "ckpt.pt", weights_only=True)["extra"]["step"] == 3


# ----------------------------------------------------------------------------- 3
def test_promise_3_two_processes_train_as_one(tmp_path, tiny_data):
    flags = [*SMALL_FLAGS, "--steps", "4", "--data", tiny_data, "--micro-batch", "2",
             "--holdout", "1", "--log-every", "1", "--ema", "0.9"]
    two = torchrun("train.py", *flags, "--out", tmp_path / "two")
    train.main([str(flag) for flag in [*flags, "--out", tmp_path / "one"]])
    succeeds(two)
    a = weights(tmp_path / "one")
    b = weights(tmp_path / "two")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)
    logs = []
    for run in ("one", "two"):
        lines = (tmp_path / run / "log.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    for one, other in zip(*logs, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"images_per_s", "minutes"}:
            assert one[key] == pytest.approx(other[key], abs=1e-5), key


def test_promise_3_two_processes_sample_and_evaluate_as_one(small_run, tmp_path, capsys):
    two = tmp_path / "two.npz"
    one = tmp_path / "one.npz"
    sampled = torchrun("sample.py", small_run, "-n", "13", "--log-prob", "--out", two)
    sample.main([str(small_run), "--num", "13", "--log-prob", "--out", str(one)])
    succeeds(sampled)
    with np.load(one) as a, np.load(two) as b:
        assert a.files == b.files
        for name in a.files:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5)
    evaluated = torchrun("train.py", "--eval", small_run)
    capsys.readouterr()
    train.main(["--eval", str(small_run)])
    alone = json.loads(capsys.readouterr().out)
    printed = succeeds(evaluated)
    together = json.loads(printed[printed.index("{\n"):printed.index("\n}") + 2])
    assert together.pop("noise") == alone.pop("noise")
    assert together == pytest.approx(alone, rel=1e-5)


# ----------------------------------------------------------------------------- 4
def test_promise_4_an_image_depends_on_seed_and_number_alone(digits_run):
    model, _ = load(digits_run)
    labels = torch.arange(7)
    whole = drawn(model, labels, seed=4, batch_size=7)
    parts = drawn(model, labels, seed=4, batch_size=3)
    tail = drawn(model, labels[5:], seed=4, batch_size=2, start=5)
    assert np.abs(whole.astype(int) - parts).max() <= 1  # rounding of other matrix shapes
    assert np.abs(whole[5:].astype(int) - tail).max() <= 1
    assert (drawn(model, labels, seed=5, batch_size=7) != whole).mean() > 0.5


# ----------------------------------------------------------------------------- 5
class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_promise_5_code_in_a_checkpoint_never_runs(small_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = torch.load(small_run / "ckpt.pt", weights_only=True)
    content["extra"]["code"] = Code()
    torch.save(content, "evil.pt")
    fails(capsys, sample, ["evil.pt"], "evil.pt", "cannot be read")
    assert not os.path.exists("ran")


@pytest.mark.parametrize("name", ["os.path", "../mine", "a b", "nowhere"])
def test_promise_5_its_model_is_a_plain_module_of_ours(small_run, tmp_path, monkeypatch, capsys,
                                                       name):
    monkeypatch.chdir(tmp_path)
    content = torch.load(small_run / "ckpt.pt", weights_only=True)
    content["model"] = name
    torch.save(content, "evil.pt")
    fails(capsys, sample, ["evil.pt"], name)


def test_promise_5_a_damaged_or_foreign_checkpoint_is_one_line(small_run, tmp_path, capsys):
    good = bytearray((small_run / "ckpt.pt").read_bytes())
    file = tmp_path / "ckpt.pt"
    for damaged, word in (
        (good[:-1000], "cannot be read"),
        (b"no checkpoint", "cannot be read"),
        (flipped(good), "damaged"),
    ):
        file.write_bytes(damaged)
        fails(capsys, sample, [file], "ckpt.pt", word)
    content = torch.load(small_run / "ckpt.pt", weights_only=True)
    torch.save(content | {"version": 2}, file)
    fails(capsys, sample, [file], "version 2", "expected 3")
    torch.save(content | {"weights": {}}, file)
    fails(capsys, sample, [file], "cannot be read")


def flipped(good: bytearray) -> bytes:
    """The same with one bit of the weights turned over."""
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 1
    return bytes(bad)


# ----------------------------------------------------------------------------- 6
@pytest.mark.parametrize("argv, words", [
    ("--steps 0", ["steps", "got 0", "expected 1"]),
    ("--lr nan", ["lr", "nan"]),
    ("--batch-size 8 --micro-batch 3", ["batch_size", "got 8", "micro-batch 3"]),
    ("--label-drop 1", ["label_drop", "got 1"]),
    ("--informative-dim 99", ["informative_dim", "got 99", "48"]),
    ("--image-size 15", ["image_size", "got 15", "patch_size 4"]),
    ("--num-classes 3", ["labels go from 0 to 9", "--num-classes"]),
    ("--noise blue", ["--noise", "blue", "gaussian"]),
    ("--data nowhere", ["nowhere"]),
    ("--workers -1", ["--workers", "got -1", "at least 0"]),
    ("--no-such-flag", ["--no-such-flag"]),
    ("--model no.such", ["--model no.such"]),
    ("--eval nowhere", ["nowhere", "no such checkpoint"]),
    ("--eval x --distill y", ["--eval", "--distill"]),
    ("--holdout 7", ["hold out"]),
])
def test_promise_6_train_refuses_in_one_line_and_writes_nothing(tmp_path, tiny_data, monkeypatch,
                                                                capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    data = [] if "--data" in argv or "--eval" in argv else ["--data", str(tiny_data)]
    fails(capsys, train, [*argv.split(), *data], *words)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("argv, words", [
    ("--labels 11", ["--labels", "11", "0 to 9"]),
    ("--guidance -1", ["guidance", "-1"]),
    ("--out x.jpg", ["--out", "x.jpg", ".png"]),
    ("--out no/x.png", ["--out", "create it"]),
    ("--sweep shine=1", ["--sweep", "shine", "guidance"]),
    ("--sweep guidance=a", ["--sweep", "'a'"]),
    ("--inverse student", ["inverse", "--distill"]),
    ("--denoise 0.03 --log-prob", ["--log-prob", "X.npz"]),
])
def test_promise_6_sample_refuses_in_one_line(small_run, tmp_path, monkeypatch, capsys, argv,
                                              words):
    monkeypatch.chdir(tmp_path)
    fails(capsys, sample, [small_run, *argv.split()], *words)
    assert os.listdir(tmp_path) == []


def test_promise_6_resume_refuses_what_would_be_another_run(small_run, tmp_path, capsys):
    other = tmp_path / "other.npz"
    np.savez(other, images=np.zeros((60, 16, 16, 3), np.uint8), labels=np.arange(60) % 10)
    fails(capsys, train, ["--out", small_run], "already holds files of a run", "--resume")
    for flags, words in (
        ("--lr 0.5", ["lr is", "0.5 was asked for"]),
        ("--flow-width 64", ["flow_width is 32", "64"]),
        (f"--steps 20 --data {other}", ["not the images"]),
    ):
        argv = ["--resume", "--out", small_run, *flags.split()]
        fails(capsys, train, argv, *words)


@pytest.mark.parametrize("mistake, error", [
    ("1 / 0", ZeroDivisionError), ("undefined", NameError), ("import nothing_there", ImportError)])
def test_promise_6_a_bug_in_a_fork_shows_its_traceback(tmp_path, monkeypatch, mistake, error):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "buggy.py").write_text(mistake)
    with pytest.raises(error):
        cli.run_script(train.main, ["--model", "buggy"])


# ----------------------------------------------------------------------------- 7
def test_promise_7_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, tiny_data,
                                                                            monkeypatch, capsys):
    real = train.dequantize
    calls = []

    def sometimes(images, *rest):
        calls.append(1)
        factor = float("nan") if len(calls) > 7 else 1  # one call fits the map, then one a step
        return real(images, *rest) * factor

    monkeypatch.setattr(train, "dequantize", sometimes)
    out = tmp_path / "run"
    fails(capsys, train, [*SMALL_FLAGS, "--data", tiny_data, "--out", out, "--save-every", "4"],
          "step 6", "not finite", "holds step 4", "--resume")
    content = torch.load(out / "ckpt.pt", weights_only=True)
    assert content["extra"]["step"] == 4
    assert all(w.isfinite().all() for w in content["weights"].values())


def test_promise_7_outlier_steps_are_skipped_and_counted(tmp_path, tiny_data, monkeypatch, capsys):
    real = torch.nn.utils.clip_grad_norm_
    calls = []

    def spiked(params, limit):
        calls.append(1)
        return real(params, limit) * (1000 if len(calls) in (55, 57) or len(calls) > 60 else 1)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spiked)
    out = tmp_path / "run"
    fails(capsys, train, [*SMALL_FLAGS, "--data", tiny_data, "--out", out, "--steps", "100",
                          "--save-every", "1", "--keep", "50", "--log-every", "1"],
          "20 steps in a row", "--guard 0")

    def kept(step: int) -> dict:
        return torch.load(out / f"ckpt-{step}.pt", weights_only=True)

    assert same_weights(kept(54)["weights"], kept(55)["weights"])  # step 55 was skipped
    assert not same_weights(kept(55)["weights"], kept(56)["weights"])
    assert kept(58)["extra"]["skipped"] == 2
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines[53:58]] == [0, 1, 1, 2, 2]


# ----------------------------------------------------------------------------- 8
def test_promise_8_samples_that_are_not_finite_are_left_out_and_counted(small_run, tmp_path,
                                                                        monkeypatch, capsys):
    model, _ = load(small_run)
    kind = type(model)
    make = kind.sample

    def broken(self, labels, options=None, generators=None):
        x = make(self, labels, options, generators)
        x[2] = float("nan")
        return x

    monkeypatch.setattr(kind, "sample", broken)
    out = tmp_path / "x.npz"
    sample.main([str(small_run), "--num", "10", "--batch-size", "5", "--out", str(out)])
    with np.load(out) as file:
        assert len(file["images"]) == 8
        assert file["labels"].tolist() == [0, 1, 3, 4, 5, 6, 8, 9]
    assert "2 of 10 samples were not finite" in capsys.readouterr().err


# ----------------------------------------------------------------------------- 9
def test_promise_9_samples_are_measured_as_a_set_like_any_other(small_run, tmp_path, capsys):
    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.mean(3).flatten(1)[:, :6]

    torch.jit.script(Mean()).save(tmp_path / "features.pt")
    out = tmp_path / "x.npz"
    sample.main([str(small_run), "--num", "40", "--out", str(out)])
    reports = []
    for samples in ([str(out)], [str(small_run), "--num", "40"]):
        capsys.readouterr()
        fid.main([*samples, str(out), "--features", str(tmp_path / "features.pt"), "--json"])
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0]["fd"] == pytest.approx(0, abs=1e-6)
    assert reports[1]["fd"] == pytest.approx(0, abs=1e-6)


# ----------------------------------------------------------------------------- 10
def test_promise_10_a_fork_reads_a_data_format_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "squares.py").write_text(
        "import numpy as np\n"
        "from examples.minimal_model import PRESETS, TRAINING, Config, Model, Sampling\n"
        "from support.datasets import array_images\n\n"
        "def open_images(source):\n"
        "    if source != 'squares':\n"
        "        return None\n"
        "    array = np.random.default_rng(0).integers(0, 9, (20, 16, 16, 3), np.uint8)\n"
        "    return array_images(source, array, np.arange(20) % 10)\n")
    train.main("--model squares --data squares --steps 2 --workers 0 --out run".split())
    train.main(["--eval", "run"])
    likelihood.main(["posterior", "run"])
    assert "squares" in capsys.readouterr().err
    fails(capsys, train, ["--model", "squares", "--data", "circles"], "circles does not exist")


def test_promise_10_a_fork_beside_its_run_is_found(tmp_path, tiny_data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fork.py").write_text(
        "import farmer\n"
        "from farmer import PRESETS, TRAINING, Config, Sampling\n\n"
        "class Model(farmer.Farmer):\n    pass\n")
    train.main([*SMALL_FLAGS, "--model", "fork", "--steps", "2", "--data", str(tiny_data),
                "--out", "run"])
    (tmp_path / "fork.py").rename(tmp_path / "run" / "fork.py")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    succeeds(command("sample.py", tmp_path / "run", "--num", "2", "--out", elsewhere / "x.png"))
