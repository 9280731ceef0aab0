"""The ten promises that users rely on, each by tests that carry its number.

 1. Exact: what a run saved has its inverse and density still (all of it: test_farmer.py).
 2. A run that is killed resumes to the bit; ckpt.pt is never half a file; a full disk loses
    nothing that was saved; Ctrl-C saves; files of others are left alone.
 3. Several processes are one process, in training and in sampling, with whatever share each has;
    when one of them fails, or sees other files, all end and say so.
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
import importlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import fid
import sample
import train
from results import likelihood
from support import checkpoints, cli, sampling
from support.checkpoints import load
from support.conftest import (
    REPOSITORY,
    SMALL_FLAGS,
    Started,
    checkpoint,
    extra,
    fails,
    logged,
    run,
    same_weights,
    weights,
)


def drawn(model, labels, seed: int, batch_size: int, start: int = 0) -> np.ndarray:
    options = model.config.sampling
    batches = sampling.sample_images(model, labels, options, seed, batch_size, start)
    return np.concatenate([images for _, images, _ in batches]).astype(int)


# ----------------------------------------------------------------------------- 1
def test_promise_1_a_trained_flow_is_inverted_and_its_parts_add_up(small_run):
    model, _ = load(small_run)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.3
    X = model.patches(x)
    Z, _ = model.flow(X)
    assert (Z - X).abs().max() > 0.1
    assert (model.flow.inverse(Z) - X).abs().max() < 1e-4
    log_p = model.log_prob(x, torch.arange(4))
    torch.testing.assert_close(log_p.total, log_p.informative + log_p.redundant + log_p.logdet)


# ----------------------------------------------------------------------------- 2
def count_lines(file: Path) -> int:
    return file.read_text().count("\n") if file.exists() else 0


def started_until(lines: int, folder: Path, *argv) -> Started:
    """train.py with these flags, which has logged so many lines."""
    started = Started(folder.with_name(f"{folder.name}-output"), "train.py", *argv,
                      "--out", folder, "--log-every", "1")
    while started.processes[0].is_alive() and count_lines(folder / "log.jsonl") < lines:
        time.sleep(0.01)
    return started


def test_promise_2_a_killed_run_resumes_to_the_bit(tmp_path, flags):
    flags = [*flags, *"--ema 0.9 --optimizer muon --steps 40 --save-every 7".split()]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = started_until(0, whole, *flags)
    process = started_until(12, killed, *flags)
    process.processes[0].kill()
    process.end(-9)
    (killed / ".ckpt.pt.abc.unfinished").write_text("of a save that was killed")
    (killed / "notes.tmp").write_text("mine")
    assert extra(killed)["step"] in (7, 14, 21, 28, 35)
    started_until(0, killed, *flags, "--resume").end()
    undisturbed.end()
    assert same_weights(weights(killed), weights(whole))
    assert logged(killed, "step") == list(range(1, 41))
    assert sorted(os.listdir(killed)) == sorted([*os.listdir(whole), "notes.tmp"])


def limit_files(size: int) -> None:
    """No file may grow beyond this, as on a disk that is full."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size < 0 else size, hard))


def test_promise_2_a_full_disk_loses_nothing_that_was_saved(small_run, tmp_path):
    model, extra = load(small_run)
    file = tmp_path / "ckpt.pt"
    checkpoints.save(file, model, **extra)
    before = file.read_bytes()
    for size in range(0, 100_000, 4096):  # torch reports it in one way or in another
        limit_files(size)
        try:
            with pytest.raises(cli.UserError, match="ckpt.pt: cannot be written"):
                checkpoints.save(file, model, **extra)
        finally:
            limit_files(-1)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["ckpt.pt"]
    umask = os.umask(0o027)
    try:
        checkpoints.save(file, model, **extra)
    finally:
        os.umask(umask)
    assert file.stat().st_mode & 0o777 == 0o640


def test_promise_2_a_disk_that_fills_up_is_said_with_the_step_that_is_there(
        tmp_path, flags, monkeypatch, capsys):
    real = os.fsync
    calls = []

    def fills_up(descriptor):
        calls.append(1)
        if len(calls) > 5:  # data.png, the log, and the checkpoints of steps 0, 4 and 8
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(cli.os, "fsync", fills_up)
    out = tmp_path / "run"
    fails(capsys, train, [*flags, "--steps", 20, "--save-every", 4, "--out", out],
          "No space left", "saved at step 8")
    assert extra(out)["step"] == 8


def test_promise_2_ctrl_c_saves_and_two_runs_do_not_share_a_folder(tmp_path, flags, capsys):
    out = tmp_path / "run"
    flags = [*flags, "--steps", "100000"]
    started = started_until(3, out, *flags)
    fails(capsys, train, [*flags, "--out", out, "--resume"], "another process")
    os.kill(started.processes[0].pid, signal.SIGINT)
    (printed,) = started.end(130)
    assert "Traceback" not in printed
    step = int(re.search(r"stopped at step (\d+), saved", printed)[1])
    assert extra(out)["step"] == step >= 3


# ----------------------------------------------------------------------------- 3
def test_promise_3_two_processes_train_as_one(tmp_path, flags):
    flags = [*flags, *"--steps 4 --micro-batch 2 --holdout 1 --log-every 1 --ema 0.9".split()]
    one, two = tmp_path / "one", tmp_path / "two"
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--local-addr=127.0.0.1",
                "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    ended = subprocess.run([sys.executable, *torchrun, "train.py", *flags, "--out", two],
                           cwd=REPOSITORY, capture_output=True, text=True, timeout=300,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    run(train, *flags, "--out", one)
    a, b = weights(one), weights(two)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)
    for key in ("step", "loss", "grad_norm", "lr", "sigma", "skipped", "val_nats_per_dim",
                "val_images", "val_standard_error"):
        assert logged(one, key) == pytest.approx(logged(two, key), abs=1e-5), key


@pytest.mark.parametrize("num", ["13", "2"])
def test_promise_3_three_processes_sample_and_evaluate_as_one(small_run, tmp_path, capsys, num):
    three, one = tmp_path / "three.npz", tmp_path / "one.npz"
    argv = [small_run, "--num", num, "--log-prob", "--batch-size", "3", "--out"]
    sampled = Started(tmp_path / "o1", "sample.py", *argv, three, ranks=3)
    evaluated = Started(tmp_path / "o2", "train.py", "--eval", small_run, ranks=3)
    run(sample, *argv, one)
    capsys.readouterr()
    run(train, "--eval", small_run)
    alone = json.loads(capsys.readouterr().out)
    sampled.end()
    with np.load(one) as a, np.load(three) as b:
        assert a.files == b.files
        for name in a.files:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5)
    printed = evaluated.end()[0]
    together = json.loads(printed[printed.index("{\n"):printed.index("\n}") + 2])
    assert together.pop("noise") == alone.pop("noise")
    assert together == pytest.approx(alone, rel=1e-5)


def test_promise_3_fewer_held_out_images_than_processes_are_enough(tmp_path, capsys):
    np.savez(tmp_path / "d.npz", images=np.zeros((9, 16, 16, 3), np.uint8))
    out = tmp_path / "run"
    Started(tmp_path, "train.py", *SMALL_FLAGS, "--batch-size", 6, "--steps", 1, "--holdout", 1,
            "--data", tmp_path / "d.npz", "--out", out, ranks=3).end()
    assert logged(out, "val_images") == [1] and (out / "samples.png").exists()
    assert checkpoint(out)["config"]["sampling"]["guidance"] == 0  # there are no classes
    run(train, "--eval", out)
    alone = json.loads(capsys.readouterr().out)["nats_per_dim"]
    assert logged(out, "val_nats_per_dim") == pytest.approx([alone], rel=1e-5)


def own_folder(path: Path, rank: int) -> None:
    """Each process works in a folder of its own, as on machines without a common disk."""
    (path / f"n{rank}").mkdir(exist_ok=True)
    os.chdir(path / f"n{rank}")


def test_promise_3_processes_that_see_other_files_say_so(tmp_path, flags):
    def together(*more, codes=(2, 2)) -> str:
        """What process 0 says; the other one says nothing."""
        started = Started(tmp_path / "o", "train.py", *flags, "--steps", "2", *more, ranks=2,
                          before=partial(own_folder, tmp_path))
        first, second = started.end(*codes)
        assert "error" not in second and first.count("error") == sum(codes) / 4, (first, second)
        return first

    together("--out", "run", codes=(0, 0))
    assert extra(tmp_path / "n0/run")["step"] == 2
    assert not (tmp_path / "n1/run").exists()
    printed = together("--out", "run", "--resume", "--steps", "4")
    assert "process 1: step is 0, but 2 in process 0" in printed
    other = ["--data", "d.npz", "--out", "other"]
    np.savez(tmp_path / "n0/d.npz", images=np.zeros((9, 16, 16, 3), np.uint8))
    printed = together(*other)
    assert "process 1: " in printed and "d.npz" in printed
    assert not (tmp_path / "n0/other").exists()
    np.savez(tmp_path / "n1/d.npz", images=np.ones((9, 16, 16, 3), np.uint8))
    assert "process 1: data is " in together(*other)


def fail() -> None:
    raise ValueError("this one fails")


def second(module: str, name: str, when: int, action, rank: int) -> None:
    """Process 1 does `action` where a function's second argument is, or begins with, `when`."""
    module = importlib.import_module(module)
    real = getattr(module, name)

    def called(*args):
        if rank == 1 and np.ravel(args[1])[0] == when:
            action()
        return real(*args)

    setattr(module, name, called)


def test_promise_3_when_one_process_fails_the_others_end(tmp_path, flags):
    out = tmp_path / "run"
    started = Started(tmp_path, "train.py", *flags, "--batch-size", 6, "--steps", 100,
                      "--save-every", 2, "--out", out, ranks=3,
                      before=partial(second, "train", "lr_at", 2, fail))
    printed = started.end(2, 2, 2)
    assert "error: this one fails" in printed[1]
    for text in printed[::2]:
        assert "another process has ended" in text and "Traceback" not in text
    assert extra(out)["step"] == 2


def test_promise_3_what_others_drew_is_kept_when_one_process_fails(small_run, tmp_path):
    out = tmp_path / "x.npz"
    started = Started(tmp_path, "sample.py", small_run, "--num", 60, "--batch-size", 2, "--out",
                      out, ranks=2,
                      before=partial(second, "support.sampling", "image_generators", 34, fail))
    printed = started.end(130, 2)
    assert "x.npz holds 8 of 60 images" in printed[0] and "this one fails" in printed[1]
    assert np.load(out)["numbers"].tolist() == [0, 1, 2, 3, 30, 31, 32, 33]


def test_promise_3_a_stop_signal_to_one_process_stops_all_and_saves(tmp_path, flags):
    out = tmp_path / "run"
    stop = partial(signal.raise_signal, signal.SIGTERM)
    started = Started(tmp_path, "train.py", *flags, "--steps", 100, "--out", out, ranks=2,
                      before=partial(second, "train", "lr_at", 2, stop))
    printed = started.end(143, 143)
    assert "stopped at step 3, saved" in printed[0] and "saved" not in printed[1]
    assert extra(out)["step"] == 3


def test_promise_3_more_processes_than_gpus_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    fails(capsys, train, [], "more processes than the 1 GPUs")


# ----------------------------------------------------------------------------- 4
def test_promise_4_an_image_depends_on_seed_and_number_alone(small_run):
    state = torch.get_rng_state()
    model, _ = load(small_run)
    assert torch.equal(state, torch.get_rng_state())  # loading draws nothing from the caller's
    labels = torch.arange(7)
    whole = drawn(model, labels, seed=4, batch_size=7)
    parts = drawn(model, labels, seed=4, batch_size=3)
    tail = drawn(model, labels[5:], seed=4, batch_size=2, start=5)
    assert np.abs(whole - parts).max() <= 1  # rounding of other matrix shapes
    assert np.abs(whole[5:] - tail).max() <= 1
    assert (drawn(model, labels, seed=5, batch_size=7) != whole).mean() > 0.5


# ----------------------------------------------------------------------------- 5
class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_promise_5_code_in_a_checkpoint_never_runs(small_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint(small_run) | {"extra": {"code": Code()}}, "evil.pt")
    fails(capsys, sample, ["evil.pt"], "evil.pt", "cannot be read")
    assert not os.path.exists("ran")


def test_promise_5_a_damaged_or_foreign_checkpoint_is_one_line(small_run, tmp_path, capsys):
    good = bytearray((small_run / "ckpt.pt").read_bytes())
    file = tmp_path / "ckpt.pt"
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1  # one bit of the weights
    for damaged, word in (
        (good[:-1000], "cannot be read"),
        (b"no checkpoint", "cannot be read"),
        (flipped, "damaged"),
    ):
        file.write_bytes(damaged)
        fails(capsys, sample, [file], "ckpt.pt", word)
    content = checkpoint(small_run)
    for change, words in (
        ({"version": 3}, ["version 3", "expected 4", "6f2226f", "train again"]),
        ({"weights": {}}, ["cannot be read"]),
        *[({"model": name}, [f"--model: got '{name}'"])
          for name in ("os.path", "../mine", "a b", "nowhere", "", 3)],
    ):
        torch.save(content | change, file)
        fails(capsys, sample, [file], *words)
    torch.save(content | {"extra": {}}, file)
    fails(capsys, train, ["--resume", "--out", tmp_path], "no training run")


# ----------------------------------------------------------------------------- 6
@pytest.mark.parametrize("argv, words", [
    ("--steps 0", ["steps", "got 0", "least 1"]),
    ("--lr nan", ["lr", "nan"]),
    ("--batch-size 8 --micro-batch 3", ["batch_size", "got 8", "multiple of 3", "--micro-batch"]),
    ("--label-drop 1", ["label_drop", "got 1"]),
    ("--informative-dim 99", ["informative_dim", "got 99", "48"]),
    ("--image-size 15", ["image_size", "got 15", "patch_size 4"]),
    ("--num-classes 3", ["classes that the model does not have", "3, 4"]),
    ("--noise blue", ["--noise", "blue", "gaussian"]),
    ("--data nowhere", ["nowhere"]),
    ("--data=", ["--data"]),
    ("--micro-batch -1", ["micro_batch", "got -1", "least 0"]),
    ("--no-such-flag", ["--no-such-flag"]),
    ("--model no.such", ["--model", "'no.such'"]),
    ("--preset none", ["--preset", "none", "tiny"]),
    ("--eval nowhere", ["nowhere", "no such checkpoint"]),
    ("--eval x --distill y", ["--eval", "--distill"]),
    ("--holdout 7", ["hold out"]),
])
def test_promise_6_train_refuses_in_one_line_and_writes_nothing(tmp_path, tiny_data, monkeypatch,
                                                                capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    data = [] if "--data" in argv or "--eval" in argv else ["--data", tiny_data]
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


def test_promise_6_a_run_is_not_continued_or_measured_as_another(small_run, tmp_path, capsys):
    other = tmp_path / "other.npz"
    np.savez(other, images=np.zeros((60, 16, 16, 3), np.uint8), labels=np.arange(60) % 10)
    fails(capsys, train, ["--out", small_run], "already holds files of a run", "--resume")
    for flags, words in (
        ("--lr 0.5", ["lr is", "0.5 was asked for"]),
        ("--flow-width 64", ["flow_width is 32", "64"]),
        ("--precision bfloat16", ["precision is float32", "bfloat16"]),
        ("--preset fashion", ["preset is tiny", "fashion"]),
        ("--model baselines.tarflow", ["--model", "baselines.tarflow", "farmer"]),
        (f"--steps 20 --data {other}", ["not the images"]),
    ):
        fails(capsys, train, ["--resume", "--out", small_run, *flags.split()], *words)
    fails(capsys, train, ["--eval", small_run, "--lr", "1"], "lr is 0.003", "1.0 was asked for")


def test_promise_6_eval_scores_held_out_images_of_this_set_and_all_of_another(
        small_run, tiny_data, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(train, *flags, "--steps", 1, "--out", "run", "--holdout", 1)
    (tmp_path / "moved.npz").write_bytes(tiny_data.read_bytes())
    with np.load(tiny_data) as digits:
        np.savez("other.npz", images=digits["images"][:30], labels=digits["labels"][:30])
    for argv, count in (
        ("run", 10),
        ("run --data moved.npz", 10),
        ("run --data other.npz", 30),
        ("run --data other.npz --holdout 2", 20),
        (str(small_run), 60),
    ):
        capsys.readouterr()
        run(train, "--eval", *argv.split())
        printed = capsys.readouterr()
        assert json.loads(printed.out)["images"] == count
        assert ("the likelihood of its training images" in printed.err) == (count == 60)


@pytest.mark.parametrize("mistake, error", [
    ("1 / 0", ZeroDivisionError), ("undefined", NameError), ("import nothing_there", ImportError)])
def test_promise_6_a_bug_in_a_fork_shows_its_traceback(tmp_path, monkeypatch, mistake, error):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "buggy.py").write_text(mistake)
    with pytest.raises(error):
        cli.run_script(train.main, ["--model", "buggy"])
    monkeypatch.setenv("FARMER_DEBUG", "1")  # shows every other one too
    with pytest.raises(ValueError, match="steps"):
        cli.run_script(train.main, ["--steps", "0"])


def test_promise_6_names_are_escaped_and_a_reader_may_leave():
    code = ("from support import cli\n"
            "def main(argv):\n"
            "    while True:\n"
            "        print('caf\\udce9')\n"
            "cli.run_script(main)\n")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "caf\\udce9\n"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 1


def test_promise_6_the_time_left_is_told(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    progress = cli.Progress("sampled", 100)
    for now[0], done in ((0.5, 10), (2.0, 20), (3.0, 30), (12.0, 50), (20.0, 100)):
        progress(done)
    assert capsys.readouterr().err.splitlines() == [
        "sampled 20/100, 0:00:08 left", "sampled 50/100, 0:00:12 left",
        "sampled 100/100, 0:00:00 left"]


# ----------------------------------------------------------------------------- 7
def test_promise_7_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, flags,
                                                                            monkeypatch, capsys):
    real = train.dequantize
    calls = []

    def sometimes(images, *rest):
        calls.append(1)
        factor = float("nan") if len(calls) > 7 else 1  # one call fits the map, then one a step
        return real(images, *rest) * factor

    monkeypatch.setattr(train, "dequantize", sometimes)
    out = tmp_path / "run"
    fails(capsys, train, [*flags, "--out", out, "--save-every", "4"],
          "step 6", "not finite", "saved at step 4", "--resume")
    assert extra(out)["step"] == 4
    assert all(w.isfinite().all() for w in weights(out).values())


def test_promise_7_outlier_steps_are_skipped_and_counted(tmp_path, flags, monkeypatch, capsys):
    norm, save = torch.nn.utils.clip_grad_norm_, train.save
    calls = []
    kept = []

    def spiked(params, limit):
        calls.append(1)
        return norm(params, limit) * (1000 if len(calls) in (55, 57) or len(calls) > 60 else 1)

    def keep(path, model, **extra):
        kept.append({name: w.clone() for name, w in model.state_dict().items()})
        save(path, model, **extra)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spiked)
    monkeypatch.setattr(train, "save", keep)
    out = tmp_path / "run"
    fails(capsys, train, [*flags, *"--steps 100 --save-every 1 --log-every 1 --out".split(), out],
          "20 steps in a row", "--guard 0")
    assert same_weights(kept[54], kept[55])  # step 55 was skipped
    assert not same_weights(kept[55], kept[56])
    assert extra(out)["skipped"] == 21  # ckpt.pt holds step 79, the last one that was whole
    assert logged(out, "skipped")[53:58] == [0, 1, 1, 2, 2]


# ----------------------------------------------------------------------------- 8
def test_promise_8_samples_that_are_not_finite_are_left_out_and_counted(small_run, tmp_path,
                                                                        monkeypatch, capsys):
    kind = type(load(small_run)[0])
    make = kind.sample

    def broken(*args):
        x = make(*args)
        x[2] = float("nan")
        return x

    monkeypatch.setattr(kind, "sample", broken)
    out = tmp_path / "x.npz"
    run(sample, small_run, "--num", 10, "--batch-size", 5, "--out", out)
    with np.load(out) as file:
        assert len(file["arr_0"]) == 8
        assert file["arr_1"].tolist() == [0, 1, 3, 4, 5, 6, 8, 9] == file["numbers"].tolist()
    assert "2 of 10 samples were not finite" in capsys.readouterr().err


# ----------------------------------------------------------------------------- 9
def test_promise_9_samples_are_measured_as_a_set_like_any_other(small_run, tmp_path, capsys):
    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.mean(3).flatten(1)[:, :6]

    features, out, dark = (tmp_path / name for name in ("features.pt", "x.npz", "dark.npz"))
    torch.jit.script(Mean()).save(features)
    run(sample, small_run, "--num", 40, "--out", out)
    np.savez(dark, images=np.load(out)["arr_0"] // 2)
    found = []
    for samples in ([out], [small_run, "--num", 40], [dark]):
        capsys.readouterr()
        run(fid, *samples, out, "--features", features, "--json")
        found.append(json.loads(capsys.readouterr().out)["fd"])
    assert found[:2] == pytest.approx([0, 0], abs=1e-6) and found[2] > 0.01


# ----------------------------------------------------------------------------- 10
def test_promise_10_a_fork_reads_a_data_format_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "squares.py").write_text(
        "import numpy as np\n"
        "from examples.minimal_model import PRESETS, TRAINING, Config, Model, Sampling\n"
        "from support.data import Images\n\n"
        "def open_images(source):\n"
        "    if source != 'squares':\n"
        "        return None\n"
        "    array = np.random.default_rng(0).integers(0, 9, (20, 16, 16, 3), np.uint8)\n"
        "    return Images(source, array, np.arange(20) % 10)\n")
    run(train, *"--model squares --data squares --steps 2 --out run".split())
    run(train, "--eval", "run")
    run(likelihood, "posterior", "run")
    assert "squares" in capsys.readouterr().err
    fails(capsys, train, ["--model", "squares", "--data", "circles"], "circles")


def test_promise_10_a_fork_beside_its_run_is_found_and_all_that_it_made_lives(
        tmp_path, flags, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fork = tmp_path / "fork.py"
    fork.write_text(
        "import farmer\n"
        "import numpy as np\n"
        "import torch\n"
        "from farmer import Sampling\n"
        "from farmer import Config\n\n"
        "PRESETS = {'small': Config(informative_dim=np.int64(24))}\n"
        "TRAINING = {'small': dict(lr=np.float32(0.5), steps=np.int64(4))}\n\n"
        "class Model(farmer.Farmer):\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        self.plain = torch.linspace(0.5, 1, 3).view(3, 1, 1)\n"
        "        self.listed = [torch.full((1,), 0.9)]\n"
        "        self.register_buffer('unsaved', torch.full((1,), 1.1), persistent=False)\n\n"
        "    def patches(self, images):\n"
        "        return super().patches(images * self.plain * self.listed[0] * self.unsaved)\n")
    run(train, *flags, "--holdout", 1, "--model", "fork", "--out", "run", "--save-every", 2)
    scored = logged("run", "val_nats_per_dim")
    out, student, elsewhere = (tmp_path / name for name in ("run", "student", "elsewhere"))
    fork.rename(out / "fork.py")
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    sys.modules.pop("fork")
    capsys.readouterr()
    run(train, "--eval", out)
    found = json.loads(capsys.readouterr().out)
    assert [found["nats_per_dim"]] == pytest.approx(scored, rel=1e-6)
    run(train, "--resume", "--out", out, "--steps", 6)
    run(train, "--distill", out, "--out", student)
    (student / "fork.py").write_text((out / "fork.py").read_text())
    for folder in (out, student):
        model, _ = load(folder)
        assert model.plain.tolist() == [[[0.5]], [[0.75]], [[1.0]]] and model.unsaved == 1.1
        run(sample, folder, "--num", 2, "--out", "x.npz")
