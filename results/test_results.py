"""The tools that make the results.

tables.py: a table trains its rows, scores them, prints yours beside the published values and
publishes on demand alone; it trains nothing twice and says so; values of other minutes are not
averaged; rows are exact names; every command in TABLES is one that the scripts take.
classifier.py: it learns; labels are compared by name; held-out images are the unseen ones;
exchanged latents are those of the other.
likelihood.py: bound, Bayes' rule and AUROC are right where the answer is known.
benchmark.py: calls alternate and the median counts; FLOPs are those of the products; each part of
sampling and a step of training are timed; what fails on a GPU costs no other part.
figures.py: a curve's minutes are those of training; a missing matplotlib is one line.
"""
import contextlib
import importlib
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import train
from results import benchmark, classifier, figures, likelihood, tables
from support.checkpoints import load, load_run, model_file, named_model
from support.conftest import SMALL_FLAGS, fails, small_run, tiny_data  # noqa: F401  (fixtures)

MINIMAL = ("--model examples.minimal_model --channels 1 --image-size 8 --batch-size 4 "
           "--noise-end 0.1 --device cpu")


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """tables.py in folders of its own, on forty images, with the scripts run in this process."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        labels = np.arange(40) % 10
        images = labels[:, None, None] * 20 + rng.integers(0, 40, (40, 8, 8))
        (tmp_path / split).mkdir()
        np.save(tmp_path / split / "images.npy", images.astype(np.uint8)[..., None])
        np.save(tmp_path / split / "labels.npy", labels)
    network = tmp_path / "net.pt"
    classifier.main(["fit", str(tmp_path), str(network), "--noise", "0"])
    made = SimpleNamespace(own=tmp_path / "own", published=tmp_path / "published", commands=[])
    made.published.mkdir()

    def run(*command, show=False):
        script, *argv = map(str, command)
        made.commands.append(script)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            importlib.import_module(script[:-3].replace("/", ".")).main(argv)
        return out.getvalue()

    rows = [tables.Row("one", MINIMAL, {"t = 1": "--temperature 1", "t = 2": "--temperature 2"}),
            tables.REAL, tables.Row("likelihood", MINIMAL, tables.LIKELIHOOD)]
    made.run = run
    changes = dict(
        TABLES={"t": rows}, PAPER={("one", "t = 1"): 5.5}, DATA=str(tmp_path), OWN=made.own,
        PUBLISHED=made.published, CLASSIFIER=network, NUM_SAMPLES=40, run=run,
        processor_seconds=lambda weights, steps: steps / 10)
    for name, value in changes.items():
        monkeypatch.setattr(tables, name, value)
    steps = {f"{MINIMAL} | 5 min": {"steps": 3}}
    (made.published / "steps.json").write_text(json.dumps(steps))
    return made


def printed_rows(capsys) -> dict[tuple, dict]:
    """The cells of the Markdown table by (row, sampling, minutes)."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    head, _, *rows = [line.strip("| ").split(" | ") for line in lines]
    return {tuple(row[:3]): dict(zip(head, row, strict=True)) for row in rows}


def test_a_table_is_trained_scored_and_printed_and_published_on_demand_alone(workshop, capsys):
    tables.main(["t", "--seeds", "0,1"])
    printed = printed_rows(capsys)
    row, real = printed["one", "t = 1", "5.0"], printed["real images", "", "–"]
    assert row["seeds"] == "– / 0, 1" and row["steps"] == "3" and row["paper's FID"] == "5.5"
    assert real["seeds"] == "– / 0" and "nats/dim" in printed["likelihood", "", "5.0"]
    FD = "FD in the classifier's features"
    assert "±" in row[FD]
    assert float(real[FD].split(" / ")[1]) < float(row[FD].split(" / ")[1].split()[0])
    assert [p.name for p in workshop.published.iterdir()] == ["steps.json"]
    assert len(list(workshop.own.glob("*/ckpt.pt"))) == 2  # one for each seed, not for each row

    tables.main(["t", "--minutes", "0.01", "--rows", "likelihood"])
    workshop.commands.clear()
    capsys.readouterr()
    tables.main(["t", "--seeds", "0,1", "--publish"])
    printed = printed_rows(capsys)
    assert workshop.commands == []
    assert len((workshop.published / "t.jsonl").read_text().splitlines()) == 7
    assert printed["likelihood", "", "0.01"]["seeds"] == "– / 0"
    assert printed["likelihood", "", "5.0"]["seeds"] == "0, 1 / –"

    tables.main(["t", "--minutes", "0.01", "--rows", "likelihood", "--publish"])
    assert len((workshop.published / "t.jsonl").read_text().splitlines()) == 8
    assert "Nothing was trained" in capsys.readouterr().err
    tables.main(["t", "--print"])
    assert printed_rows(capsys)["likelihood", "", "0.01"]["seeds"] == "0"


def test_measured_steps_are_kept_with_your_results_and_rows_are_exact_names(workshop, capsys):
    workshop.own.mkdir()
    assert tables.steps_for("--x", 5) == 3000  # at a tenth of a second each
    assert tables.read_steps(workshop.own)["--x | 5 min"]["steps"] == 3000
    assert tables.read_steps(workshop.published).keys() == {f"{MINIMAL} | 5 min"}
    fails(capsys, tables, ["t", "--rows", "on"], "'on'", "one; real images")


def test_a_turned_row_learns_turned_images_and_turns_its_samples_back(workshop, monkeypatch):
    images = tables.open_images(f"{tables.DATA}:train").array
    row = tables.Row("turned", MINIMAL, {"": ""}, turned=True)
    scored = []

    def run(*command, show=False):
        """The workshop's run, but sample.py knows the images that were learnt by heart."""
        if command[0] != "sample.py":
            return workshop.run(*command, show=show)
        learnt = load(command[1])[1]["training"]["data"]
        assert (np.load(learnt)["images"] == np.rot90(images, 2, axes=(1, 2))).all()
        np.savez(command[command.index("--out") + 1], **np.load(learnt))

    monkeypatch.setattr(tables, "run", run)
    monkeypatch.setattr(tables, "scores", lambda file: scored.append(dict(np.load(file))) or {})
    tables.OWN.mkdir()
    tables.result_of(row, "", seed=0, minutes=5, steps=3)
    assert (scored[0]["images"] == images).all() and len(scored[0]["labels"]) == 40


@pytest.mark.parametrize("table", tables.TABLES)
def test_the_page_shows_the_published_results(table, monkeypatch):
    """Each score is in a cell of a table, alone or between slashes."""
    monkeypatch.setattr(tables, "OWN", Path("none"))
    page = (tables.PUBLISHED / "README.md").read_text()
    on_the_page = {cell.strip() for line in page.splitlines() if line.startswith("|")
                   for cell in re.split(r"[|/]", line)}
    lines = tables.markdown(table).splitlines()
    head, _, *rows = [line.strip("| ").split(" | ") for line in lines]
    scores = [head.index(name) for name in head if "FD" in name or name in ("recall", "nats/dim")]
    assert rows and scores
    for row in rows:
        assert {row[i] for i in scores} - {"–"} <= on_the_page, row


@pytest.mark.parametrize("table", tables.TABLES)
def test_the_scripts_take_every_command(table):
    for row in tables.TABLES[table]:
        name, module = named_model(row.weights.split())
        if row.weights.startswith("--"):
            argv = [str(word) for word in tables.training(row.weights, 9, 0, Path("x"))[1:]]
            train.fresh(train.parse(argv, name, module), module, torch.device("cpu"))
        for flags in row.ways.values():
            if flags not in ("", "--eval"):
                parser = classifier.Parser()
                benchmark.add_fields(parser, module.Sampling)
                args = parser.parse_args(flags.split())
                module.Sampling(**benchmark.given(args, module.Sampling))


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A network for the dark, the grey and the bright, fitted on class folders."""
    folder = tmp_path_factory.mktemp("reader")
    rng = np.random.default_rng(0)
    for place, level in {"all/bright": 200, "all/dark": 40, "all/grey": 120, "some/dark": 40,
                         "some/grey": 120}.items():
        (folder / place).mkdir(parents=True)
        for i in range(20):
            pixels = (level + rng.integers(0, 30, (8, 8, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / place / f"{i}.png")
    classifier.main(["fit", str(folder / "all"), str(folder / "net.pt"), "--epochs", "60",
                     "--noise", "0"])
    return folder


def test_labels_are_compared_by_name(reader, tmp_path, capsys):
    """In `some`, dark is class 0; the network knows it as class 1."""
    classifier.main(["read", str(reader / "net.pt"), str(reader / "some")])
    assert "100.0% of 40 images" in capsys.readouterr().out
    (tmp_path / "red").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red" / "0.png")
    fails(capsys, classifier, ["read", reader / "net.pt", tmp_path], "red", "bright")
    network = classifier.load_classifier(str(reader / "net.pt"))
    assert network.classes == ["bright", "dark", "grey"]
    assert network(torch.zeros(5, 3, 8, 8)).shape == (5, 128)  # what fid.py --features takes
    dark = torch.full((2, 1, 8, 8), 50, dtype=torch.uint8)  # grey values
    assert classifier.read_right(network, dark, torch.tensor([1, 0])) == 50


def test_the_held_out_images_are_the_unseen_ones(reader, tmp_path, capsys):
    heldout = ["heldout", str(reader / "all"), str(tmp_path / "h.npz")]
    classifier.main([*heldout, "--holdout", "4"])
    with np.load(tmp_path / "h.npz") as f:
        assert f["images"].shape == (12, 8, 8, 3) and (np.bincount(f["labels"]) == 4).all()
    fails(capsys, classifier, heldout, "--holdout")
    np.savez(tmp_path / "flat.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    fails(capsys, classifier, ["fit", tmp_path / "flat.npz", tmp_path / "n.pt"], "no labels")
    fails(capsys, classifier, ["read", tmp_path / "flat.npz", reader / "some"], "flat.npz", "fit")


def test_exchanged_latents_are_those_of_the_other_image_or_token(small_run):  # noqa: F811
    model, _ = load_run(small_run)
    x = 0.3 * torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(4, dtype=torch.long)

    def latents(images):
        return model.flow(model.patches(images), labels)[0].split([24, 24], -1)

    images, tokens = torch.arange(4).roll(1), torch.randperm(model.config.num_tokens)
    for taken, part in enumerate(("Z_I", "Z_R")):
        y = latents(classifier.exchanged(model, x, labels, part, images, tokens))
        expected = list(latents(x))
        expected[taken] = expected[taken][images][:, tokens]
        torch.testing.assert_close(y, tuple(expected), atol=1e-4, rtol=0)


TRAINING = dict(noise="gaussian", noise_end=0.03)


class Total(NamedTuple):
    total: torch.Tensor
    logdet: torch.Tensor


class Levels(torch.nn.Module):
    """The exact density of pixels with equally likely levels, under Gaussian noise."""

    def __init__(self, levels: int):
        super().__init__()
        self.levels = levels

    def log_prob(self, y, labels=None):
        x = (torch.arange(self.levels, dtype=torch.float64) + 0.5) / 128 - 1
        log_n = -0.5 * ((y.double().flatten(1).unsqueeze(-1) - x) / 0.03).square()
        constant = math.log(0.03 * math.sqrt(2 * math.pi) * self.levels)
        total = (log_n - constant).logsumexp(-1).sum(1)
        return Total(total, torch.zeros_like(total))


def test_the_bound_is_the_entropy_where_model_and_decoder_are_exact_and_above_it_elsewhere():
    def bound(levels, num):
        images = torch.randint(0, levels, (num, 1, 2, 2), dtype=torch.uint8)
        y = (images + 0.5) / 128 - 1 + 0.03 * torch.randn(images.shape)
        return likelihood.bound(Levels(levels), y, None, TRAINING)["bits_per_dim_at_most"]

    assert bound(256, num=40) == pytest.approx(8.0, abs=1e-4)
    assert 4.0 <= bound(16, num=400) < 5.0
    with pytest.raises(likelihood.UserError, match="uniform"):
        likelihood.bound(None, None, None, dict(noise="uniform", noise_end=0))


class ByClass(torch.nn.Module):
    """Images of class c are normal around c / 10 with std 0.1."""

    config = SimpleNamespace(num_classes=3)

    def log_prob(self, y, labels=None):
        mean = torch.zeros(len(y)) if labels is None else labels / 10
        total = -0.5 * ((y.flatten(1) - mean[:, None]) / 0.1).square().sum(1)
        return Total(total, torch.zeros_like(total))


def test_posterior_of_separate_classes_is_right_and_of_shuffled_labels_is_not():
    labels = torch.arange(240) % 3  # more than a batch
    x = (labels / 10).view(-1, 1, 1, 1) + 0.03 * torch.randn(240, 1, 4, 4)
    assert likelihood.posterior(ByClass(), x, labels)["accuracy"] > 0.9
    assert likelihood.posterior(ByClass(), x, labels.roll(1))["accuracy"] < 0.1
    assert likelihood.log_probs(ByClass(), x, labels)["total"].min() > -4


def test_auroc_counts_pairs_and_tells_apart_what_is_far_away():
    low, high = torch.randint(0, 5, (30,)), torch.randint(1, 7, (20,))
    above = (high[:, None] > low).float() + 0.5 * (high[:, None] == low)
    assert likelihood.auroc(low, high) == pytest.approx(above.mean().item())
    inside = 0.03 * torch.randn(30, 1, 4, 4)
    result = likelihood.ood(ByClass(), inside, inside + 0.5)
    assert result["total"]["auroc"] == result["log p(z)"]["auroc"] == 1
    assert result["logdet"]["auroc"] == 0.5
    assert result["total"]["outside"] < -10 < result["total"]["inside"]


def test_images_have_the_noise_that_training_ended_with(tiny_data):  # noqa: F811
    split = likelihood.open_split(str(tiny_data), 16, 3)
    args = SimpleNamespace(num=30, seed=0, device=torch.device("cpu"))
    pixels, labels = split.train.batch(np.linspace(0, 59, 30).astype(int))
    x, found = likelihood.noised_images(split, TRAINING, args)
    assert torch.equal(found, labels)
    assert (x - (pixels + 0.5) / 128 + 1).std().item() == pytest.approx(0.03, rel=0.02)


def test_every_use_of_a_run(small_run, tiny_data, tmp_path, capsys):  # noqa: F811
    net = str(tmp_path / "net.pt")
    classifier.main(["fit", str(tiny_data), net, "--epochs", "1"])
    capsys.readouterr()
    classifier.main(["swap", net, str(small_run), "--num", "10"])
    errors = [float(e) for e in re.findall(r"MSE ([0-9.]+)", capsys.readouterr().out)]
    assert len(errors) == 6 and errors[0] == errors[3] == 0 and min(errors[1:3]) > 0.01
    for action, data in (("posterior", []), ("ood", [tiny_data, tiny_data]), ("bound", [])):
        likelihood.main([action, str(small_run), *map(str, data), "--num", "20"])
        json.loads(capsys.readouterr().out)
    fails(capsys, likelihood, ["ood", small_run, tiny_data], "required: OUTSIDE")


def test_calls_alternate_and_the_median_counts(monkeypatch):
    order, seconds = [], {"a": iter([1, 1, 7]), "b": iter([2, 9, 3])}
    monkeypatch.setattr(benchmark, "timed", lambda call, device: order.append(call) or
                        next(seconds[call]))
    found = benchmark.medians({"a": "a", "b": "b"}, 3, torch.device("cpu"))
    assert found == {"a": 1, "b": 3} and order == list("ababab")


def test_flops_are_those_of_the_products():
    """2 for each weight and token, and 4 T W for each token in attention; the rest is small."""
    c = model_file("farmer").Config(
        image_size=32, patch_size=2, flow_width=32, ar_width=32, head_dim=32, informative_dim=6,
        informative_mixtures=1)
    layers = c.flow_blocks * [c.num_tokens - 1] + c.ar_layers * [c.num_tokens + c.class_tokens]
    W = c.flow_width  # also of the AR
    expected = sum(T * (24 * W**2 + 4 * T * W) for T in layers)
    assert 1 < benchmark.counted("farmer", c)[1] / expected < 1.1


SMALL = [*SMALL_FLAGS[:10], "--device", "cpu", "--rounds", "1"]


def test_every_part_of_sampling_is_timed_beside_another_models(capsys, monkeypatch):
    seen, stages = [], benchmark.stages
    monkeypatch.setattr(benchmark, "stages", lambda model, options, *args:
                        seen.append(options) or stages(model, options, *args))
    benchmark.main(["sample", *SMALL, "--batch-sizes", "2", "--guidance", "0.5",
                    "--against", "examples.minimal_model"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    parts = [(row[0], row[2]) for row in rows[2:]]
    assert [getattr(options, "guidance", None) for options in seen] == [0.5, None]
    ours = [("farmer:tiny", part) for part in ("whole", "prior", "exact", "student")]
    assert parts == [*ours, ("examples.minimal_model", "whole")]


def test_a_step_of_training_trains(capsys, monkeypatch):
    models = []
    build = benchmark.build
    monkeypatch.setattr(benchmark, "build", lambda *args: models.append(build(*args)) or models[-1])
    benchmark.main(["train", *SMALL, "--batch-size", "2", "--optimizer", "muon"])
    torch.manual_seed(0)
    before = build("farmer", models[0].config).parameters()
    moved = [not torch.equal(p, q) for p, q in zip(models[0].parameters(), before, strict=True)]
    assert sum(moved) > 0.9 * len(moved) and "TFLOP/s" in capsys.readouterr().out


def test_a_part_that_fails_on_a_gpu_costs_no_other(monkeypatch, capsys):
    commands = []

    def run(command, timeout):
        commands.append(command)
        if len(commands) == 2:
            raise subprocess.TimeoutExpired(command, timeout)
        return SimpleNamespace(returncode=int(len(commands) == 4))

    monkeypatch.setattr(subprocess, "run", run)
    benchmark.main(["gpu", "--device", "cpu", "--tiny"])
    out = capsys.readouterr().out
    assert out.count("| the time was over |") == out.count("| 1 |") == 1
    assert out.count("| 0 |") == 4
    benchmark.main(["gpu", "--device", "cpu"])
    assert "tiny" in commands[0] and "farmer-1.1b-p16" in commands[-1]
    for command in commands:
        benchmark.parse(command[2:], "farmer", model_file("farmer"))
    fails(capsys, benchmark, ["train", *SMALL, "--against", "farmer:none"], "none", "fashion")


def test_a_curves_minutes_are_those_of_training_and_values_means_over_seeds(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    lines = [dict(step=s, loss=-s, minutes=m) for s, m in ((10, 1), (20, 5))]
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 20}\n')
    (tmp_path / "kept.jsonl").write_bytes((run / "log.jsonl").read_bytes())
    drawn = []
    monkeypatch.setattr(figures, "draw", lambda panels, out: drawn.extend(panels))
    out = str(tmp_path / "x.png")
    figures.main(["curve", str(run), str(tmp_path / "kept.jsonl"), "--out", out])
    points = [(1, -10), (5, -20)]
    assert drawn == [("minutes of training", "loss", {"run": points, "kept": points})]
    results = [dict(row=row, sampling=f"w = {w}", seed=seed, fd=w + seed)
               for row in "ab" for w in (0.5, 2) for seed in (0, 1)]
    means = [(0.5, 1), (2, 2.5)]
    assert figures.means(results, "w", "fd", "row") == {"a": means, "b": means}


def test_a_missing_matplotlib_is_one_line(small_run, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fails(capsys, figures, ["curve", small_run, "--out", tmp_path / "x.png"], "pip install")
    fails(capsys, figures, ["curve", "--out", tmp_path / "x.png"], "folders of runs")
    fails(capsys, figures, ["curve", tmp_path, "--out", tmp_path / "x.png"], "log.jsonl")


def test_curves_that_cannot_be_drawn_are_one_line(tmp_path, capsys):
    nats, bits, old = [tmp_path / f"{name}.jsonl" for name in ("nats", "bits", "old")]
    nats.write_text('{"step": 1, "loss": 2, "minutes": 1}')
    bits.write_text('{"step": 1, "bits_per_dim": 2, "minutes": 1}')
    old.write_text('{"step": 1, "loss": 2}')
    fails(capsys, figures, ["curve", nats, bits, "--out", tmp_path / "x.png"], "apart")
    fails(capsys, figures, ["curve", old, "--out", tmp_path / "x.png"], "old.jsonl", "minutes")
