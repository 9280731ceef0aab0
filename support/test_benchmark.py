"""support/benchmark.py: what it times, beside which other model, and what a lent GPU would run.

    pytest -q support/test_benchmark.py
"""
import json
import sys
import textwrap
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import fid
import sample
import train
from support import benchmark, lent, measure
from support.checkpoint import model_file
from support.conftest import fails
from support.measure import machine, medians, peak_memory, product_peak, timed

CPU = torch.device("cpu")
SMALL = ["--flow-blocks", "2", "--flow-width", "32", "--ar-layers", "1", "--ar-width", "32", "--head-dim", "16",
         "--informative-mixtures", "2", "--device", "cpu"]
OTHER = textwrap.dedent('''
    """A model of few lines: a linear map of the pixels."""
    from dataclasses import dataclass

    import torch
    from torch import nn

    @dataclass(frozen=True)
    class Sampling:
        guidance: float = 0.0

    @dataclass(frozen=True)
    class Config:
        image_size: int = 4
        channels: int = 1
        num_classes: int = 2
        flow_width: int = 8
        own: int = 3
        sampling: Sampling = Sampling()

    class Model(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config
            self.linear = nn.Linear(config.channels * config.image_size**2, config.flow_width)

        def forward(self, x, labels, generators):
            return {"loss": self.linear(x.flatten(1)).square().mean(1)}

        def sample(self, labels, options=None, generators=None):
            assert options.guidance == 2, options  # the first model's
            c = self.config
            return torch.zeros(len(labels), c.channels, c.image_size, c.image_size)

        def stages(self, labels, options, generators):
            return {"exact": lambda: self.sample(labels, options, generators), "forward": lambda: None}

    PRESETS, TRAINING = {"first": Config(), "wide": Config(flow_width=64)}, {}
''')


@pytest.fixture
def other(tmp_path, monkeypatch):
    """The current folder holds another model, other.py."""
    (tmp_path / "other.py").write_text(OTHER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "other"
    sys.modules.pop("other", None)


def rows_of(capsys, *argv) -> list[dict]:
    """What a command prints with --json; the first line is of the machine."""
    capsys.readouterr()
    benchmark.main([*map(str, argv), "--json"])
    head, *rows = map(json.loads, capsys.readouterr().out.splitlines())
    assert head["TFLOP/s in float32"] > 0 and "CPU" in head["machine"]
    return rows


def by_stage(rows: list[dict], model: str, batch: int) -> dict[str, dict]:
    return {row["stage"]: row for row in rows if row["model"] == model and row["batch"] == batch}


# ------------------------------------------------------------------------------------------ measuring
def test_calls_alternate_and_the_median_counts(monkeypatch):
    order, seconds = [], {"a": iter([1, 1, 7]), "b": iter([2, 9, 3])}

    def call(name: str):
        order.append(name)
        return next(seconds[name])
    monkeypatch.setattr(measure, "timed", lambda work, device: work())
    assert medians({name: partial(call, name) for name in "ab"}, 3, CPU) == {"a": 1, "b": 3}
    assert order == list("ababab")


def test_the_peak_is_that_of_products():
    a, b = torch.randn(2, 256, 256)
    achieved = 2 * 256**3 / min(timed(lambda: a @ b, CPU) for _ in range(5))
    assert 0.05 * achieved < product_peak(CPU, "float32") < 1e13
    assert machine(CPU)["torch"] == torch.__version__


def test_peak_memory_sees_what_is_freed_again():
    before = peak_memory(CPU, reset=True)
    if not before:
        pytest.skip("this system does not count")
    torch.ones(2**26).add_(1)  # a quarter of a GiB
    assert 0.2 < peak_memory(CPU) - before < 0.4
    assert peak_memory(CPU, reset=True) - before < 0.1


# ------------------------------------------------------------------------------------------ sample
def test_sample_times_every_stage(capsys):
    rows = rows_of(capsys, "sample", *SMALL, "--batch-sizes", 1, 3, "--repeats", 1, "--guidance", 1)
    for batch in (1, 3):
        stages = by_stage(rows, "farmer:tiny", batch)
        assert {"whole", "prior", "exact", "parallel", "student", "refined", "forward"} <= stages.keys()
        assert all(row["ms/image"] * row["images/s"] == pytest.approx(1000) for row in stages.values())
        assert stages["exact"]["max off"] == 0 and stages["exact"]["x first"] == 1
        assert stages["parallel"]["max off"] < 1e-3 and stages["student"]["x first"] > 0
        assert stages["student"]["max off"] > 1e-2  # random weights are no identity
        assert "x first" not in stages["whole"].keys() | stages["prior"].keys() | stages["forward"].keys()


def test_sample_of_a_checkpoint_prints_a_table(capsys, small_run):
    only = ["--only", "exact", "whole"]
    benchmark.main(["sample", str(small_run), "--batch-sizes", "2", "--repeats", "1", *only, "--device", "cpu"])
    head, empty, names, rule, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("machine CPU") and not empty and rule.count("---") == names.count("|") - 1
    assert [row.split(" | ")[2] for row in rows] == ["whole", "exact"]
    assert all(row.count("|") == names.count("|") for row in rows)


def test_against_another_model_of_equal_shape(capsys, other):
    flags = ["--guidance", 2, "--batch-sizes", 2, "--repeats", 1, "--only", "whole", "exact", "prior"]
    rows = rows_of(capsys, "sample", *SMALL, *flags, "--against", other)
    first, second = by_stage(rows, "farmer:tiny", 2), by_stage(rows, other, 2)
    assert list(first) == ["whole", "prior", "exact"] and list(second) == ["whole", "exact"]
    for stage in second:
        assert second[stage]["x other"] == pytest.approx(first[stage]["ms/image"] / second[stage]["ms/image"])
    assert not any("x other" in row for row in first.values())


@pytest.mark.parametrize("preset, width", [("", 32), (":wide", 64)])
def test_equal_shape(other, preset, width):
    model = small_model()
    c = benchmark.opponent(other + preset, benchmark.Subject("", model, model.config.sampling), CPU).model.config
    assert (c.image_size, c.channels, c.num_classes, c.own, c.flow_width) == (16, 3, 10, 3, width)


def small_model():
    """A model of the default preset's shape with the widths of SMALL."""
    module = model_file("farmer")
    args = benchmark.parse(["train", *SMALL], "farmer", module)
    return benchmark.subjects(args, "farmer", module, CPU)[0].model


# ------------------------------------------------------------------------------------------ train
def test_train_against_another_model(capsys, other):
    rows = rows_of(capsys, "train", *SMALL, "--batch-size", 4, "--repeats", 2, "--against", other, "--precision",
                   "float32", "--nominal", 2)
    ours, theirs = rows
    assert ours["images/s"] * ours["ms/step"] == pytest.approx(4000) and 0 < ours["MFU"] < 1
    assert ours["of nominal"] == pytest.approx(ours["TFLOP/s"] / 2)
    assert theirs["x other"] == pytest.approx(theirs["images/s"] / ours["images/s"])
    assert "MFU" not in theirs and theirs["compile s"] is None  # that model counts no arithmetic
    assert ours["GiB"] >= 0 and theirs["GiB"] is None


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_trains(optimizer):
    model = small_model()
    before = [p.clone() for p in model.parameters()]
    benchmark.training_step(model, "bfloat16", 2, CPU, optimizer)()
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert sum(moved) > 0.9 * len(moved)


def test_compile_time_is_the_first_step_less_a_usual_one(capsys, monkeypatch):
    compiled = []

    def prepare(model, net, compiling, checkpointing):
        compiled.append(compiling)
    monkeypatch.setattr(benchmark, "prepare_training", prepare)
    monkeypatch.setattr(benchmark, "timed", lambda step, device: step() or 10.0)
    monkeypatch.setattr(benchmark, "medians", lambda work, repeats, device: dict.fromkeys(work, 4.0))
    row, = rows_of(capsys, "train", *SMALL, "--batch-size", 2, "--compile", "on")
    assert compiled == [True] and row["compiled"] and row["compile s"] == 6 and row["images/s"] == 0.5


def test_the_largest_batch_is_the_last_that_fits(monkeypatch):
    tried = []

    def step(model, precision, batch, device, optimizer):
        tried.append(batch)

        def run():
            if batch > 16:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return run
    monkeypatch.setattr(benchmark, "training_step", step)
    model = torch.nn.Linear(1, 1)
    args = SimpleNamespace(batch_size=4, largest=512, optimizer="adamw")
    assert benchmark.largest_batch(args, model, "float32", CPU) == 16 and tried == [8, 16, 32]
    args.largest = 10
    assert benchmark.largest_batch(args, model, "float32", CPU) == 8


# ------------------------------------------------------------------------------------------ errors
def test_errors_are_one_line(capsys, small_run, other):
    fails(capsys, benchmark, ["sample", *SMALL, "--only", "nothing", "--batch-sizes", "1"], "nothing", "prior")
    fails(capsys, benchmark, ["sample", small_run, "--preset", "tiny"], "--preset")
    fails(capsys, benchmark, ["train", *SMALL, "--against", "no_such_model"], "no_such_model")
    fails(capsys, benchmark, ["train", *SMALL, "--against", "other:none"], "none", "wide")
    fails(capsys, benchmark, ["train", *SMALL, "--batch-size", "0"], "--batch-size")
    fails(capsys, benchmark, ["sample", *SMALL, "--repeats", "0"], "--repeats")
    if not torch.cuda.is_available():
        fails(capsys, benchmark, ["gpu"], "CUDA", "--tiny")


# ------------------------------------------------------------------------------------------ gpu
def script(tmp_path, text: str):
    file = tmp_path / "script.py"
    file.write_text(textwrap.dedent(text))
    return file


def test_a_part_that_fails_costs_no_other(tmp_path, capsys):
    machine_lent = lent.Lent("cpu", minutes=1)
    values, rows = machine_lent.run("bad", script(tmp_path, """
        import sys
        print('{"stage": "exact", "ms/image": 2.0}')
        sys.exit("CUDA error: illegal memory access")"""))
    assert values == [{"stage": "exact", "ms/image": 2.0}]
    assert "ms/image 2" in rows[0]["result"] and "168.9" in rows[0]["result"]  # the paper's
    assert "FAILED with exit code 1" in rows[1]["result"] and "illegal memory access" in rows[1]["result"]
    assert "illegal memory access" in capsys.readouterr().err
    values, rows = machine_lent.run("good", script(tmp_path, "import sys; print('saw', sys.argv[1:])"), 3)
    assert values == [{}] and "saw ['3', '--device', 'cpu']" in rows[0]["result"]
    _, rows = machine_lent.run("slow", script(tmp_path, """
        import time
        print('{"a": 1}', flush=True)
        time.sleep(60)"""), limit=3)
    assert [row["result"] for row in rows] == ["a 1", "FAILED: stopped after 3 s: "]
    machine_lent.end = time.monotonic()
    assert "not run" in machine_lent.run("late", "train.py")[1][0]["result"]


@pytest.mark.parametrize("tiny", [True, False])
def test_every_command_of_a_lent_gpu_is_one_that_the_scripts_take(monkeypatch, tmp_path, tiny):
    parts, module = [], model_file("farmer")

    def run(self, part, script, *arguments, limit=0):
        parts.append((part, script, [str(a) for a in arguments]))
        return [{"batch": 4, "images/s": 50.0}], [{"part": part, "result": "", "s": 0}]
    monkeypatch.setattr(lent.Lent, "run", run)
    args = benchmark.parse(["gpu", "--device", "cpu", *(["--tiny"] if tiny else [])], "farmer", module)
    rows = list(lent.lent_gpu(args, "farmer", module))
    assert len(rows) == len(parts) + 1  # and the held-out likelihood
    for _, script_name, arguments in parts:
        if script_name == "train.py":
            train.parse(arguments, "farmer", module)
        elif script_name == "sample.py":
            sample.parse(arguments)
        elif script_name == "fid.py":
            fid.parse(arguments, module.Sampling)
        else:
            benchmark.parse(arguments, "farmer", module)
    scripts = [script_name for _, script_name, _ in parts]
    assert scripts[-1] == scripts[9] == "support/benchmark.py"  # nine smoke tests come first
    steps = next(a for part, _, a in parts if " s of " in part)
    assert int(steps[steps.index("--steps") + 1]) == (3 if tiny else 70)


def test_held_out_is_read_from_the_log(tmp_path):
    log = tmp_path / "log.jsonl"
    assert lent.held_out(log) == {"result": "none"}
    log.write_text('{"step": 1, "images_per_s": 5, "loss": 1}\n{"step": 2, "val_bits_per_dim": 3.5}\n')
    assert lent.held_out(log) == {"images_per_s": 5, "val_bits_per_dim": 3.5}
