"""What a stranger's hour of hostile inputs found: each is one line and exit code 2, and nothing is left behind."""
import dataclasses

import pytest

import farmer
import sample
import train
from support import classifier, tables
from support.cli import UserError
from support.conftest import fails

MODEL = '''
from dataclasses import dataclass
import torch
@dataclass(frozen=True)
class Sampling:
    pass
@dataclass(frozen=True)
class Config:
    image_size: int = 16
    channels: int = 3
    num_classes: int = 10
    sampling: Sampling = Sampling()
PRESETS = {"default": Config()}
TRAINING = {"default": dict(steps=2)}
class Model(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.w = config, torch.nn.Parameter(torch.zeros(()))
    def forward(self, x, labels, generators=None):
        return dict(loss=x.flatten(1).mean(1) * self.w)
    def sample(self, labels, options=None, generators=None):
        return torch.zeros(len(labels), 3, 16, 16)
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("old, new, words", [
    ('PRESETS = {"default": Config()}', "PRESETS = {}", "PRESETS"),
    ('PRESETS = {"default": Config()}', "PRESETS = [Config()]", "PRESETS"),
    ('TRAINING = {"default"', 'TRAINING = {"defalt"', "TRAINING"),
    ("dict(steps=2)", "dict(stepz=2)", "stepz"),
    ("    num_classes: int = 10\n", "", "num_classes"),
    ("@dataclass(frozen=True)\nclass Config", "class Config", "dataclasses"),
    ("import torch", "import torch, sys; sys.exit(0)", "SystemExit"),
    ("dict(loss=", "dict(lost=", "'loss'"),
    (".mean(1)", ".mean()", "(8,)"),
], ids=range(9))
def test_a_models_file_that_breaks_the_seam(here, tiny_data, capsys, old, new, words):
    assert old in MODEL
    (here / "odd.py").write_text(MODEL.replace(old, new, 1))
    flags = ["--workers", "0", "--batch-size", "8", "--sample-every", "0", "--steps", "1", "--device", "cpu"]
    fails(capsys, train, ["--model", "odd", "--data", tiny_data, *flags], words)


def test_a_models_file_with_annotations_as_strings(here, tiny_data):
    (here / "later.py").write_text("from __future__ import annotations\n" + MODEL)
    train.main(["--model", "later", "--data", str(tiny_data), "--workers", "0", "--batch-size", "8", "--out", "run"])
    sample.main(["run", "--num", "2", "--out", "x.npz"])


@pytest.mark.parametrize("name", ["random", "os", "json.decoder", "train", "support.cli", "a b", "", "../farmer"])
def test_names_that_are_no_models(here, capsys, name):
    (here / "random.py").write_text(MODEL)
    fails(capsys, train, ["--model", name], "--model")


@pytest.mark.parametrize("flags", ["--out ~nosuchuser/x --data nowhere", "--data ~nosuchuser/x", "--eval ~nosuchuser/x",
                                   "--flow-width " + "9" * 400, "--seed " + "9" * 30, "--workers 100000000",
                                   "--distill ", "--eval ", "--model ", "--flow-blocks 1000 --flow-layers 1000"])
def test_train_py_refuses_in_one_line(here, capsys, flags):
    fails(capsys, train, flags.split(" "))
    assert not list(here.iterdir())


def test_a_long_list_of_labels_may_come_first(small_run, tmp_path):
    labels = ",".join(str(i % 10) for i in range(200))
    sample.main(["--labels", labels, str(small_run), "--num", "2", "--out", str(tmp_path / "x.npz")])


@pytest.mark.parametrize("num", ["1" + "0" * 400, "1" + "0" * 20])
def test_numbers_that_fit_no_machine(small_run, capsys, num):
    fails(capsys, sample, [small_run, "-n", num, "--out", "x.npz"])


def test_seeds_have_a_bound(small_run, capsys):
    fails(capsys, sample, [small_run, "--seed", 10**30], "--seed")
    fails(capsys, classifier, ["fit", "digits", "x.pt", "--seed", 10**30], "--seed")


@pytest.mark.parametrize("line", ["[]", "", "{", '{"row": "a"}', '{"row": "a", "seed": 0, "minutes": 1, "fd": "x"}'])
def test_results_that_are_not_ours_are_named(tmp_path, monkeypatch, line):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "table3.jsonl").write_text('{"row": "a", "seed": 0, "minutes": 1, "fd": 2.5}\n' + line + "\n")
    with pytest.raises(UserError, match="table3.jsonl:2"):
        tables.markdown("table3")


def test_a_table_is_the_mean_and_the_spread_of_its_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    lines = [f'{{"row": "a", "seed": {seed}, "minutes": 1, "fd": {fd}}}\n' for seed, fd in ((0, 1.0), (1, 2.0))]
    (tmp_path / "table3.jsonl").write_text("".join(lines))
    assert "| a |  | 0, 1 | 1.50 ± 0.50 |" in tables.markdown("table3")


@pytest.mark.parametrize("argv, word", [("table3 --rows nosuch", "--rows"), ("table3 --first-core 999", "--first-core"),
                                        ("table3 --seeds a", "--seeds"), ("table9", "table9")])
def test_tables_py_refuses(tmp_path, monkeypatch, capsys, argv, word):
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(tables, "RUNS", tmp_path / "runs")
    fails(capsys, tables, argv.split(), word)


def test_rows_of_tables_are_flags_that_exist():
    """Every row's training flags and sampling flags are fields of what they are given to."""
    known = {f.name for c in (farmer.Config, farmer.Sampling, train.Train) for f in dataclasses.fields(c)}
    for rows in tables.TABLES.values():
        for row in rows:
            for word in " ".join([row.train, *(flags for _, flags in row.samples)]).split():
                name = word.lstrip("-").replace("-", "_").removeprefix("no_")
                assert not word.startswith("--") or name in known | {"preset", "model"}, word
