"""Command line, checkpoints, runs, processes: each claim, each error and each advice in it, followed. Offline.

    pytest -q support/test_support.py
"""
import copy
import dataclasses
import itertools
import json
import math
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import farmer
import fid
import sample
import train
from support import cli, distributed, run, start
from support.checkpoint import load, save
from support.cli import UserError, check_writable, run_script, write_file, write_json
from support.conftest import REPOSITORY, SMALL_FLAGS, command, fails, same_weights, weights
from support.data import digits
from support.loader import batches
from support.run import RunState, StopSignals, load_run, run_directory

CPU = torch.device("cpu")
TINY = farmer.Config(image_size=4, patch_size=2, num_classes=2, flow_blocks=1, flow_width=16, ar_layers=1, ar_width=16,
                     head_dim=16, informative_dim=5, informative_mixtures=2, class_tokens=1)


def tiny_model() -> farmer.Farmer:
    torch.manual_seed(0)
    return farmer.Farmer(TINY)


def small(out: Path, data: Path, *flags) -> list[str]:
    """Flags of a run of a very small model."""
    return [str(a) for a in ("--out", out, "--data", data, *SMALL_FLAGS, *flags)]


def resume(out: Path, *flags) -> RunState:
    train.main(["--resume", "--out", str(out), "--log-every", "5", "--sample-every", "0", *map(str, flags)])
    return load_run(out, CPU)[1]


@pytest.fixture
def copied(small_run, tmp_path) -> Path:
    """A run of one's own to resume, at step 12."""
    return Path(shutil.copytree(small_run, tmp_path / "run"))


# ------------------------------------------------------------------------------------------ command line
@dataclasses.dataclass(frozen=True)
class Settings:
    size: int = dataclasses.field(default=3, metadata=dict(help="of it, in %"))
    at_most: int | None = None
    kind: str = dataclasses.field(default="a", metadata=dict(choices=("a", "b")))
    fast: bool = True
    rate: float = 0.5


def test_flags_are_the_fields_of_a_dataclass(capsys):
    def parsed(*argv):
        parser = cli.Parser(prog="x")
        cli.add_fields(parser, Settings)
        return cli.given(parser.parse_args(argv), Settings)
    assert parsed() == {}
    assert parsed("--size", "4", "--no-fast", "--at_most=7", "--rate=1e-3") == dict(
        size=4, at_most=7, fast=False, rate=1e-3)
    for argv in (["--size", "x"], ["--kind", "c"], ["--siz", "3"], ["--nonsense"], ["4"]):
        with pytest.raises(SystemExit) as e:
            parsed(*argv)
        err = capsys.readouterr().err
        assert e.value.code == 2 and len(err.splitlines()) == 1 and "--help" in err
    parser = cli.Parser(prog="x")
    parser.add_argument("--rate")
    with pytest.raises(UserError, match="rate.*rename"):
        cli.add_fields(parser, Settings)
    parser = cli.Parser(prog="x")
    cli.add_fields(parser, Settings, Settings(size=9))
    assert "of it, in % (default: 9)" in parser.format_help()


def test_errors_are_one_line_and_a_debug_variable_shows_more(capsys, monkeypatch):
    def ends(error, code):
        def main(argv):
            raise error
        with pytest.raises(SystemExit) as e:
            run_script(main)
        assert e.value.code == code
        return capsys.readouterr().err
    assert ends(UserError("two\n  lines"), 2).endswith("error: two lines\n")
    assert ends(FileNotFoundError(2, "No such file", "/x"), 2).count("\n") == 1
    assert ends(MemoryError(), 2).endswith("MemoryError\n")
    assert ends(KeyboardInterrupt(), 130) == ""
    monkeypatch.setenv("FARMER_DEBUG", "1")
    with pytest.raises(UserError):
        run_script(lambda argv: (_ for _ in ()).throw(UserError("x")))
    monkeypatch.delenv("FARMER_DEBUG")
    with pytest.raises(RuntimeError):  # a bug of ours shows itself
        run_script(lambda argv: (_ for _ in ()).throw(RuntimeError("x")))


def test_a_reader_that_leaves_is_no_error():
    done = subprocess.run(f"{sys.executable} sample.py --help | head -n 1", shell=True, cwd=REPOSITORY, text=True,
                          capture_output=True)
    assert done.stdout.startswith("usage") and done.stderr == ""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ctrl_c_while_torch_is_imported():
    process = command("train.py", "--dry-run")
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch_cpu" not in maps.read_text():
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode in (-signal.SIGINT, 130) and output == ""


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def half(f):
        f.write(b"{")
        raise OSError(28, "No space left on device")
    with pytest.raises(UserError, match="x.json.*No space left.*free some space"):
        write_file(path, half)
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["x.json"]
    with pytest.raises(KeyboardInterrupt):
        write_file(path, lambda f: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_is_respected(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_json(tmp_path / "x", 1)
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~mask


def test_results_are_checked_before_the_work(tmp_path, small_run, tiny_data, capsys, monkeypatch):
    """The model is not even loaded when its samples could not be written; ~ is the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_writable("--out", "~/x.png") == tmp_path / "x.png"
    sample.main([str(small_run), "--num", "2", "--out", "~/home.npz"])
    assert (tmp_path / "home.npz").exists()

    def never(*_):
        raise AssertionError("worked before it looked")
    monkeypatch.setattr(sample, "load", never)
    monkeypatch.setattr(fid, "load", never)
    (tmp_path / "folder.npz").mkdir()
    for place, words in (("/proc/x.npz", "cannot be written"), (tmp_path / "none" / "x.npz", "create it"),
                         (tmp_path / "folder.npz", "is a directory")):
        fails(capsys, sample, [small_run, "--out", place], words)
        fails(capsys, fid, [small_run, tiny_data, "--num", "5", "--save-stats", place], words)


def test_progress_is_rare_and_tells_the_time_left(capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = cli.Progress("sampled", 1000)
    for done in range(1, 1001):
        now[0] += 0.1
        progress(done)
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 6 and lines[-1] == "sampled 1000/1000, 0:00 left"
    done, left = lines[1].split()[1].split("/")[0], lines[1].split()[2]
    assert left == cli.duration((1000 - int(done)) * 0.1)
    quick = cli.Progress("sampled", 2)
    quick(1), quick(2)
    cli.Progress("sampled", 100, quiet=True)(100)
    assert capsys.readouterr().err == ""
    assert [cli.duration(s) for s in (3700, 100, 9.9)] == ["1:01:40", "1:40", "0:09"]


@pytest.mark.parametrize("script, flags, words", [
    (train, "--batch-size 99999999999999", ["batch"]), (train, "--flow-width 1048576", ["flow_width"]),
    (train, "--num-classes 999999999999", ["num_classes"]), (train, "--image-size 16000000", ["image_size"]),
    (train, "--informative-mixtures 99999999999", ["informative_mixtures"]),
    (train, "--flow-width 16384 --flow-layers 20 --flow-blocks 20", ["memory", "GiB"]),
    (train, "--informative-mixtures 100000 --ar-width 16384", ["memory", "GiB"]),
    (train, "--steps 99999999999999999999", ["steps"]),
    (sample, "RUN --out OUT --s-c 100000000", ["s_c"]), (sample, "RUN --out OUT -n 999999999999", ["images", "memory"]),
    (fid, "RUN DATA --num 999999999999", ["num"])])
def test_huge_sizes_are_refused_before_anything_is_allocated(tmp_path, small_run, tiny_data, capsys, script, flags,
                                                             words):
    places = {"RUN": small_run, "OUT": tmp_path / "x.npz", "DATA": tiny_data}
    argv = [places.get(word, word) for word in flags.split()]
    if script is train:
        argv = [*small(tmp_path / "run", tiny_data), *argv]
    began = time.process_time()
    fails(capsys, script, argv, *words)
    assert time.process_time() - began < 5 and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ checkpoints
def test_a_checkpoint_brings_model_config_and_extra_back(tmp_path):
    model = tiny_model()
    model.new_student()
    save(tmp_path / "x.pt", model, step=7, note="a")
    got, extra = load(tmp_path / "x.pt")
    assert extra == dict(step=7, note="a") and got.config == TINY and got.model_name == "farmer" and not got.training
    assert same_weights(model.state_dict(), got.state_dict()) and got.student is not None
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    content["weights"] = {name: w.bfloat16() for name, w in content["weights"].items()}
    torch.save(content, tmp_path / "half.pt")
    assert {p.dtype for p in load(tmp_path / "half.pt")[0].parameters()} == {torch.float32}


def test_checkpoints_that_are_not(tmp_path, small_run, capsys):
    good = (small_run / "ckpt.pt").read_bytes()
    content = torch.load(small_run / "ckpt.pt", weights_only=True)
    bad = tmp_path / "bad.pt"

    class Code:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "executed"),)

    def edited(**parts):
        return lambda: torch.save({**content, **parts}, bad)

    def config(**fields):
        return edited(config={**content["config"], **fields})
    name, buffer = "prior.embed.linear.weight", "flow.mean"
    tensor, mean = content["weights"][name], content["weights"][buffer]
    for write in (
            lambda: bad.write_bytes(good[:len(good) // 2]), lambda: bad.write_bytes(b""),
            lambda: bad.write_bytes(os.urandom(1000)), lambda: torch.save({"a": 1}, bad),
            lambda: torch.save(Code(), bad), lambda: bad.write_bytes(pickle.dumps(content["config"])),
            edited(version=99), edited(version="2"), edited(format=None), edited(model="os.path"),
            edited(model="../farmer"), edited(model=None), edited(model="support.run"), edited(model="train"),
            edited(config=[]), edited(weights=[1, 2]), edited(weights={}), edited(weights={1: tensor}),
            edited(weights={name: 3}),
            edited(weights={**content["weights"], name: tensor.long()}),
            edited(weights={**content["weights"], name: tensor.to(torch.complex64)}),
            edited(weights={**content["weights"], buffer: mean.long()}),
            edited(weights={**content["weights"], buffer: mean.to(torch.complex64)}),
            edited(weights={**content["weights"], name: tensor[:1]}),
            edited(weights={k: w.double() if k == name else w for k, w in content["weights"].items()}),
            edited(extra=None), config(flow_blocks=9), config(nonsense=9), config(flow_blocks=10**9),
            config(flow_blocks=2.0), config(sampling=None), config(sampling={"s_c": 10**8}), config(image_size="16"),
            config(**{"sampling": {1: 2}}), edited(config={1: 2})):
        write()
        with pytest.raises(UserError, match="bad.pt|--model"):
            load(bad)
        fails(capsys, sample, [bad, "--out", tmp_path / "x.png"])
    assert not (tmp_path / "executed").exists()
    save(bad, tiny_model(), note="no run")
    fails(capsys, train, ["--eval", bad], "no training run")
    with pytest.raises(UserError, match="no such checkpoint"):
        load(tmp_path)


STATES = [dict(step=-1), dict(step=1.5), dict(step=True), dict(step="12"), dict(norms=3), dict(norms=["a"]),
          dict(norms=[1]), dict(training=[]), dict(training={"lr": 1}), dict(training={}), dict(precision=16),
          dict(fingerprint=None), dict(optimizer=3), dict(optimizer={"a": 1}), dict(optimizer={"state": {}}),
          dict(raw_weights={"a": 1}), dict(preset=None), dict(distill=0), dict(surplus=1), dict(skipped=0.5)]


@pytest.mark.parametrize("change", STATES, ids=str)
def test_an_edited_run_is_refused_in_one_line(copied, capsys, change):
    content = torch.load(copied / "ckpt.pt", weights_only=True)
    if isinstance(change.get("training"), dict) and change["training"]:
        change = dict(training={**content["extra"]["training"], "lr": "high", "data": 5})
    content["extra"] |= change
    torch.save(content, copied / "ckpt.pt")
    fails(capsys, train, ["--resume", "--out", copied, "--steps", "14", "--sample-every", "0"], copied)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(RunState)])
def test_a_run_without_a_field_is_refused_or_has_its_default(copied, capsys, field):
    content = torch.load(copied / "ckpt.pt", weights_only=True)
    del content["extra"][field]
    torch.save(content, copied / "ckpt.pt")
    default = RunState.__dataclass_fields__[field]
    required = default.default is dataclasses.MISSING and default.default_factory is dataclasses.MISSING
    if required:
        fails(capsys, train, ["--resume", "--out", copied], copied, field)
    else:
        assert resume(copied, "--steps", "13").step in (12, 13)


def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path):
    path = tmp_path / "x.pt"
    save(path, tiny_model())
    good = path.read_bytes()
    expected, rng = load(path)[0].state_dict(), random.Random(0)
    refused = 0
    for _ in range(60):
        at = rng.randrange(len(good))
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1:])
        try:
            got = load(path)[0].state_dict()
        except UserError as e:
            refused += 1
            assert "x.pt" in str(e) and "\n" not in str(e)
        else:
            assert same_weights(expected, got)  # in the padding, or a time stamp
    assert refused > 20
    middle = good.index(struct.pack("f", float(expected["prior.class_pos"][0, 0])))
    path.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1:])
    with pytest.raises(UserError, match="damaged.*checksum.*older checkpoint"):
        load(path)


def test_mutated_checkpoints_raise_nothing_but_one_line(tmp_path):
    """Values exchanged, removed and doubled anywhere in its content."""
    path = tmp_path / "x.pt"
    save(path, tiny_model(), **RunState("tiny", dataclasses.asdict(train.Train()), False, "float32", {}).to_dict())
    content = torch.load(path, weights_only=True)
    rng = random.Random(0)
    values = [None, 0, -1, 1.5, math.nan, "", "x", [], {}, [{}], True, 2**70, b"x", torch.zeros(2), torch.arange(2)]

    def mutate(node: dict) -> None:
        key = rng.choice(list(node))
        if isinstance(node[key], dict) and node[key] and rng.random() < 0.8:
            mutate(node[key])
        elif rng.random() < 0.2:
            del node[key]
        elif rng.random() < 0.2:
            node[rng.choice([3, "new", None])] = node[key]
        else:
            node[key] = rng.choice(values)
    refused = 0
    for _ in range(150):
        mutant = copy.deepcopy(content)
        mutate(mutant)
        torch.save(mutant, path)
        try:
            load_run(path, CPU)
        except UserError as e:
            refused += 1
            assert "x.pt" in str(e) or "--model" in str(e)
    assert refused > 75


def test_a_save_that_fails_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    model = tiny_model()
    path = tmp_path / "ckpt.pt"
    save(path, model, step=1)
    for error in (OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")):
        def full(content, f, error=error):
            f.write(b"half of it")
            raise error
        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(UserError, match="not saved"):
            save(path, model, step=2)
        assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"] and load(path)[1]["step"] == 1


# ------------------------------------------------------------------------------------------ resuming, and its advice
def test_resume_where_nothing_is(tmp_path, tiny_data, capsys):
    """An error that says what to do; with --data or --preset it starts anew, as it says."""
    new = tmp_path / "new"
    fails(capsys, train, ["--resume", "--out", new], "no checkpoint", "--preset", "--data")
    assert not new.exists()
    train.main([*small(new, tiny_data, "--steps", "3"), "--resume"])
    assert "step 0" in capsys.readouterr().err and load_run(new, CPU)[1].step == 3


def test_files_of_others_are_left_alone(tmp_path, tiny_data, capsys):
    """Only what this program writes is touched, and no run that is not resumed is written over."""
    out = tmp_path / "out"
    out.mkdir()
    others = {"notes.tmp": "mine", "ckpt.tmp": "mine", "log.txt": "mine", "x.pt.1.tmp": "mine"}
    for name, text in others.items():
        (out / name).write_text(text)
    (out / "log.jsonl").write_text("of another program")
    fails(capsys, train, small(out, tiny_data, "--steps", "3"), "already holds", "log.jsonl", "another --out")
    fails(capsys, train, [*small(out, tiny_data, "--steps", "3"), "--resume"], "log.jsonl", "another --out")
    assert (out / "log.jsonl").read_text() == "of another program"
    (out / "log.jsonl").unlink()
    (out / "ckpt.pt.abc.tmp").write_bytes(b"of a save that was killed")
    train.main(small(out, tiny_data, "--steps", "3"))
    assert {name: (out / name).read_text() for name in others} == others
    assert not (out / "ckpt.pt.abc.tmp").exists()


def test_two_runs_in_one_directory(copied, tmp_path, capsys, monkeypatch):
    """The second is refused while the first lives; what a dead one left is no lock."""
    with run_directory(copied, resume=True):
        fails(capsys, train, ["--resume", "--out", copied], "another process", "wait for it", "--out")
    (copied / ".lock").touch()
    assert resume(copied, "--steps", "13").step == 13
    with pytest.raises(UserError, match="stop"):
        with run_directory(tmp_path / "new", resume=False):
            raise UserError("stop")
    assert not (tmp_path / "new").exists()  # a failed start leaves nothing
    monkeypatch.setattr(run, "fcntl", None)  # Windows
    with run_directory(copied, resume=True):
        assert (copied / "ckpt.pt").exists()


def test_more_steps_on_resume(copied, capsys):
    """Allowed, and said, since the schedule stretches; fewer than are done are refused."""
    assert resume(copied, "--steps", "16").step == 16
    assert "steps was 12 and is 16" in capsys.readouterr().err
    assert resume(copied).training["steps"] == 16  # from now on
    fails(capsys, train, ["--resume", "--out", copied, "--steps", "5"], "holds step 16", "more")


def test_a_diverged_run_says_what_works(tmp_path, tiny_data, capsys, monkeypatch):
    out, forward = tmp_path / "run", farmer.Farmer.forward
    calls = itertools.count()

    def diverging(self, *args):
        terms = forward(self, *args)
        return {**terms, "loss": terms["loss"] * (math.nan if next(calls) == 8 else 1)}
    monkeypatch.setattr(farmer.Farmer, "forward", diverging)
    err = fails(capsys, train, small(out, tiny_data, "--steps", "12", "--save-every", "5"), "not finite", "step 5",
                "--resume", "--seed")
    assert "step 8" in err and load_run(out, CPU)[1].step == 5
    assert resume(out, "--seed", "1").step == 12  # as it says
    assert "seed was 0 and is 1" in capsys.readouterr().err
    assert load_run(out, CPU)[1].training["seed"] == 1


def test_the_guards_advice(tmp_path, tiny_data, capsys):
    flags = small(tmp_path / "a", tiny_data, "--steps", "75", "--guard", "1e-6")
    err = fails(capsys, train, flags, "20 steps in a row", "--guard 0", "lower --lr")
    assert "--resume" not in err
    train.main(small(tmp_path / "b", tiny_data, "--steps", "75", "--guard", "0"))
    assert load_run(tmp_path / "b", CPU)[1].step == 75


def picture_folder(root: Path, n: int = 20) -> Path:
    for i, pixels in enumerate(digits(n, 16, 3, 3).array):
        folder = root / f"class {i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return root


def test_broken_images_can_be_replaced_before_a_resume(tmp_path, capsys):
    """A run that met broken images, in the middle: it says what to do, and that works."""
    data, out = picture_folder(tmp_path / "data"), tmp_path / "run"
    good = {path: path.read_bytes() for path in data.rglob("*.png")}

    def breaking(*args, **kwargs):
        for step, batch in enumerate(batches(*args, **kwargs)):
            if step == 4:
                for path in itertools.islice(good, 15):
                    path.write_bytes(b"broken")
            yield batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "batches", breaking)
        with pytest.raises(SystemExit):
            run_script(train.main, small(out, data, "--steps", "12", "--save-every", "100"))
    err = capsys.readouterr().err.splitlines()[-1]
    assert "replace it" in err and "--resume" in err and ".png" in err
    step = load_run(out, CPU)[1].step
    assert f"holds step {step}:" in err and 4 <= step < 12
    for path, content in good.items():
        path.write_bytes(content)
    assert resume(out).step == 12


def test_moved_data_is_found_again_and_other_data_refused(tmp_path, tiny_data, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_data, "here.npz")
    train.main(["--out", "run", "--data", "here.npz", "--steps", "3", *SMALL_FLAGS])
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    run = tmp_path / "run"
    assert resume(run, "--steps", "4").step == 4  # a relative path means where the run began
    (tmp_path / "here.npz").rename(tmp_path / "there.npz")
    fails(capsys, train, ["--resume", "--out", run, "--steps", "5"], "here.npz", "check")
    assert resume(run, "--steps", "5", "--data", "../there.npz").step == 5
    with np.load(tiny_data) as f:
        images, labels = f["images"], f["labels"]
    np.savez("same count.npz", images=images[::-1], labels=labels)
    fails(capsys, train, ["--resume", "--out", run, "--steps", "6", "--data", "same count.npz"], "not the images")
    before = load_run(run, CPU)[1]
    assert before.step == 5 and before.training["data"] == str(tmp_path / "there.npz")


def test_num_classes_follows_the_data(tmp_path, tiny_data, capsys):
    with np.load(tiny_data) as f:
        images, labels = f["images"], f["labels"]
    np.savez(tmp_path / "three.npz", images=images[labels < 3], labels=labels[labels < 3])
    train.main(small(tmp_path / "a", tmp_path / "three.npz", "--steps", "2"))
    assert load(tmp_path / "a")[0].config.num_classes == 3
    train.main(small(tmp_path / "b", tmp_path / "three.npz", "--steps", "2", "--num-classes", "7"))
    assert load(tmp_path / "b")[0].config.num_classes == 7
    np.savez(tmp_path / "none.npz", images=images)
    train.main(small(tmp_path / "c", tmp_path / "none.npz", "--steps", "2"))
    model, _ = load(tmp_path / "c")
    assert model.config.num_classes == 0 and model.config.sampling.guidance == 0
    fails(capsys, train, small(tmp_path / "d", tmp_path / "none.npz", "--num-classes", "3"), "no labels",
          "--num-classes 0")
    for argv in (["--data", ""], ["--data", " "]):
        fails(capsys, train, ["--out", tmp_path / "d", *argv], "--data", "empty")


# ------------------------------------------------------------------------------------------ signals and platforms
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, tiny_data, capsys, monkeypatch, name):
    number = getattr(signal, name)

    def signalled(*args, **kwargs):
        for step, batch in enumerate(batches(*args, **kwargs)):
            if step == 3:
                os.kill(os.getpid(), number)
            yield batch
    out, before = tmp_path / "run", signal.getsignal(number)
    monkeypatch.setattr(train, "batches", signalled)
    with pytest.raises(SystemExit) as e:
        train.main(small(out, tiny_data, "--steps", "9"))
    err = capsys.readouterr().err
    assert e.value.code == 128 + number and f"python train.py --resume --out {out}" in err
    assert load_run(out, CPU)[1].step == 4 and signal.getsignal(number) == before
    monkeypatch.undo()
    assert resume(out).step == 9


def test_a_second_signal_leaves_at_once():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)


def test_without_what_windows_lacks(monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP")
    with StopSignals() as stop:
        assert len(stop.handlers) == 2
    monkeypatch.delattr(os, "sysconf")
    cli.check_memory(1e30, "anything")


def test_precision_is_decided_once(tmp_path, tiny_data, copied, capsys, monkeypatch):
    for fast, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(distributed, "bf16_is_fast", lambda device, fast=fast: fast)
        assert distributed.pick_precision("auto", CPU) == expected
        assert distributed.pick_precision("float32", CPU) == "float32"
    monkeypatch.setattr(distributed, "bf16_is_fast", lambda device: True)
    assert resume(copied, "--steps", "13").precision == "float32"  # as it began
    flags = small(tmp_path / "b", tiny_data, "--steps", "3", "--precision", "auto")
    train.main(flags)
    state = load_run(tmp_path / "b", CPU)[1]
    assert state.precision == "bfloat16"
    assert {w.dtype for w in weights(tmp_path / "b").values()} == {torch.float32}
    monkeypatch.setattr(distributed, "bf16_is_fast", lambda device: False)
    fails(capsys, train, ["--resume", "--out", tmp_path / "b", "--steps", "4"], "bfloat16", "--precision")
    assert resume(tmp_path / "b", "--steps", "4", "--precision", "float32").precision == "float32"


def test_bf16_is_recognised(monkeypatch):
    for amx, avx, expected in ((True, False, True), (False, True, True), (False, False, False)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx, raising=False)
        assert distributed.bf16_is_fast(CPU) == expected
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert not distributed.bf16_is_fast(CPU)  # a PyTorch that has renamed them


# ------------------------------------------------------------------------------------------ processes
@pytest.mark.parametrize("num, world", [(10, 1), (10, 3), (2, 5), (0, 2), (50_000, 8)])
def test_work_is_shared_without_gap_or_overlap(monkeypatch, num, world):
    parts = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank_and_world", lambda rank=rank: (rank, world))
        parts.append(distributed.share(num))
    assert list(itertools.chain(*parts)) == list(range(num))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_half_of_torchruns_environment(tmp_path, small_run, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    fails(capsys, sample, [small_run, "--out", tmp_path / "x.png"], "WORLD_SIZE", "torchrun")
    fails(capsys, train, ["--resume", "--out", small_run, "--steps", "13"], "WORLD_SIZE", "torchrun")


# ------------------------------------------------------------------------------------------ what a run says
def test_lines_fit_a_terminal_and_the_file_has_everything(tmp_path, tiny_data, capsys):
    train.main(small(tmp_path / "a", tiny_data, "--steps", "26", "--holdout", "1", "--val-every", "10", "--log-every",
                     "25", "--ema", "0.9"))
    out = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in out if line.startswith("step")) <= 100
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").open()]
    reports = [line for line in lines if "loss" in line]
    assert [line["step"] for line in reports] == [1, 2, 5, 10, 20, 25, 26]
    names = {"step", "loss", "nats_per_dim", "informative", "redundant", "logdet", "grad_norm", "lr", "sigma",
             "skipped", "images_per_s", "loss_min", "loss_max", "logdet_min", "logdet_max"}
    assert names <= reports[0].keys()
    checks = [line for line in lines if "val_nats_per_dim" in line]
    assert [line["step"] for line in checks] == [10, 20, 26]
    said = [line for line in out if "val_nats_per_dim" in line]
    assert all("last noise" in line for line in said)  # its noise is another than training's, and is said


def test_options_for_models_that_lack_what_they_need(tmp_path, tiny_data, capsys, monkeypatch):
    monkeypatch.delattr(farmer.Farmer, "layers")
    fails(capsys, train, small(tmp_path / "a", tiny_data, "--steps", "2", "--optimizer", "muon"), "muon", "layers")
    monkeypatch.delattr(farmer.Farmer, "log_prob")
    monkeypatch.setattr(farmer.Farmer, "forward", lambda self, *args: {"loss": sum(
        p.sum() for p in self.parameters()) * torch.ones(8)})
    train.main(small(tmp_path / "a", tiny_data, "--steps", "2", "--holdout", "1"))
    fails(capsys, train, ["--eval", tmp_path / "a"], "no likelihood")
    assert start.first_preset(farmer) == "tiny"


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_tf32_is_for_training_passes_alone(precision):
    """And only where that is in bfloat16; also after an error."""
    assert not torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(ZeroDivisionError), distributed.training_precision(CPU, precision):
        assert torch.backends.cuda.matmul.allow_tf32 == (precision == "bfloat16")
        assert torch.is_autocast_enabled("cpu") == (precision == "bfloat16")
        raise ZeroDivisionError
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.is_autocast_enabled("cpu")
