"""The tools that make the results, and the pages that show them.

tables.py: a table trains its rows once, scores them and prints yours below the published values;
rows are exact names; every command in TABLES is one that the scripts take.
The pages: each table is what tables.py prints, and each headline number is that of its row.
classifier.py: it learns; labels are compared by name; held-out images are the unseen ones.
likelihood.py: bound, Bayes' rule and AUROC are right where the answer is known.
benchmark.py: calls alternate and the median counts; FLOPs are those of the products; each part of
sampling and a step of training are timed; all parts of `gpu` run on a CPU, and rows are kept.
figures.py: a curve's minutes are those of training; a missing matplotlib is one line.
"""
import contextlib
import importlib
import io
import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image

import train
from results import benchmark, classifier, figures, likelihood, tables
from support.checkpoints import first_preset, load, model_file, save
from support.cli import Parser, given
from support.conftest import SMALL_FLAGS, fails, small_run, tiny_data  # noqa: F401  (fixtures)

MINIMAL = ("--model examples.minimal_model --channels 1 --image-size 8 --batch-size 4 "
           "--noise-end 0.1 --device cpu")


# ----------------------------------------------------------------------------- tables.py
@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """tables.py in folders of its own, on forty images, with the scripts run in this process."""
    labels = np.arange(40) % 10
    noise = np.random.default_rng(0).integers(0, 40, (2, 40, 8, 8, 1))
    for split, images in zip(("train", "test"), labels[:, None, None, None] * 20 + noise,
                             strict=True):
        (tmp_path / split).mkdir()
        np.save(tmp_path / split / "images.npy", images.astype(np.uint8))
        np.save(tmp_path / split / "labels.npy", labels)
    network = tmp_path / "net.pt"
    classifier.main(["fit", str(tmp_path), str(network), "--noise", "0", "--steps", "3"])
    scripts = []

    def run(script, *argv, show=False):
        scripts.append(script)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            module = importlib.import_module(script[:-3].replace("/", "."))
            module.main([str(word) for word in argv])
        return out.getvalue()

    rows = [tables.Row("one", MINIMAL, {"t = 1": "--temperature 1", "t = 2": "--temperature 2"}, 3),
            tables.REAL, tables.Row("likelihood", MINIMAL, tables.LIKELIHOOD, 3)]
    changes = dict(
        TABLES={"t": rows}, PAPER={("one", "t = 1"): 5.5}, DATA=str(tmp_path), run=run,
        OWN=tmp_path / "own", PUBLISHED=tmp_path, CLASSIFIER=network, NUM_SAMPLES=40)
    for name, value in changes.items():
        monkeypatch.setattr(tables, name, value)
    return scripts


def cells(text: str) -> dict[tuple, dict]:
    """The cells of a Markdown table by (row, sampling)."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    head, _, *rows = lines
    return {tuple(row[:2]): dict(zip(head, row, strict=True)) for row in rows}


def test_a_table_is_trained_once_scored_and_printed(workshop, capsys):
    tables.main(["t", "--seeds", "0,1"])
    printed = cells(capsys.readouterr().out.partition("Yours:")[2])
    row, real = printed["one", "t = 1"], printed["real images", "–"]
    assert (row["seeds"], row["steps"], row["paper's FID"]) == ("0, 1", "3", "5.5")
    assert real["steps"] == "–" and float(real["FD"]) < float(row["FD"].split(" ± ")[0])
    assert float(printed["likelihood", "–"]["nats/dim"].split(" ± ")[0]) > -9
    assert len(list(tables.OWN.glob("*/ckpt.pt"))) == 2  # one for each seed, not for each row
    assert len((tables.OWN / "t.jsonl").read_text().splitlines()) == 7  # real images count once
    workshop.clear()
    tables.main(["t", "--seeds", "0,1", "--rows", "one", "real images"])
    assert "Nothing was trained" in capsys.readouterr().err
    (tables.OWN / "t.jsonl").rename(tables.PUBLISHED / "t.jsonl")
    tables.main(["t", "--print"])
    output = capsys.readouterr().out
    assert workshop == [] and cells(output) == printed and "Yours" not in output
    fails(capsys, tables, ["t", "--rows", "on"], "'on'", "one; real images")


def test_of_two_results_of_a_run_the_later_one_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "TABLES", {"t": [tables.Row("a", "", {"w": ""})]})
    lines = [dict(row="a", sampling="w", fd=fd, seed=seed, steps=steps)
             for fd, seed, steps in ((9, 0, 9), (1, 0, 9), (3, 1, 9), (8, 0, 5))]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert tables.markdown(tmp_path, "t").splitlines() == [
        "| row | sampling | steps | seeds | FD |", "| --- | --- | --- | --- | --- |",
        "| a | w | 9 | 0, 1 | 2.00 ± 1.00 |", "| a | w | 5 | 0 | 8.00 |"]


def test_a_turned_row_learns_turned_images_and_turns_its_samples_back(workshop, monkeypatch):
    images = tables.open_images(f"{tables.DATA}:train")[0].array
    train = tables.run
    scored = []

    def run(script, *argv, show=False):
        """The workshop's run, but sample.py knows the images that were learnt by heart."""
        if script != "sample.py":
            return train(script, *argv, show=show)
        with np.load(load(argv[0])[1]["training"]["data"]) as learnt:
            assert (learnt["images"] == np.rot90(images, 2, axes=(1, 2))).all()
            np.savez(argv[argv.index("--out") + 1], **learnt)

    monkeypatch.setattr(tables, "run", run)
    monkeypatch.setattr(tables, "scores", lambda file: scored.append(dict(np.load(file))) or {})
    tables.OWN.mkdir()
    tables.result_of(tables.Row("turned", MINIMAL, {"": ""}, 3, turned=True), "", seed=0)
    assert (scored[0]["images"] == images).all() and len(scored[0]["labels"]) == 40


def test_a_student_row_is_distilled_and_a_script_that_fails_is_one_line(monkeypatch):
    commands = []
    monkeypatch.setattr(tables, "run", lambda *command, show: commands.append(command))
    row = next(row for row in tables.TABLES["table4"] if row.student)
    student = tables.trained(row, 1)
    assert [command[1] for command in commands] == ["--preset", "--distill"]
    assert commands[1][2] == commands[0][commands[0].index("--out") + 1] != student
    monkeypatch.undo()
    finished = tables.Row("finished", "assets/fashion.pt", {})
    assert tables.trained(finished, 0) == tables.REPOSITORY / "assets/fashion.pt"
    with pytest.raises(tables.UserError, match="figures.py none ended with exit code 2"):
        tables.run("results/figures.py", "none", show=True)
    assert "d_I" in tables.run("results/figures.py", "--help")


@pytest.mark.parametrize("table", tables.TABLES)
def test_the_scripts_take_every_command(table):
    for row in tables.TABLES[table]:
        words = row.weights.split()
        module = model_file(words[1] if words[:1] == ["--model"] else "farmer")
        if row.steps:
            parser = Parser()
            for flag in ("--model", "--preset"):
                parser.add_argument(flag)
            parser.add_settings("", train.Train())
            parser.add_settings("", module.PRESETS[first_preset(module)])
            args = parser.parse_args(words)
            train.new_run(args, module, "float32")
        for flags in row.ways.values():
            if flags not in ("", "--eval"):
                parser = Parser()
                parser.add_settings("", module.Sampling())
                module.Sampling(**given(parser.parse_args(flags.split()), module.Sampling))


# ----------------------------------------------------------------------------- the pages
SECTIONS = {  # of results/README.md
    "table3": "Table 3 in miniature", "table4": "Table 4 in miniature", "flip": "The final flip",
    "fig6": "Figure 6 in miniature", "guidance": "Guidance", "denoise": "Denoising",
    "student": "The preset", "peers": "The peers at equal training time",
    "likelihood": "Likelihood at equal training time",
}
RESULTS = (tables.PUBLISHED / "README.md").read_text()
README = (tables.REPOSITORY / "README.md").read_text()


@pytest.mark.parametrize("table", tables.TABLES)
def test_each_table_of_the_page_is_what_tables_py_prints(table):
    section = re.search(rf"^### {SECTIONS[table]}\n(.*?)^##", RESULTS, re.M | re.S)[1]
    on_the_page = [line for line in section.splitlines() if line.startswith("|")]
    printed = tables.markdown(tables.PUBLISHED, table).splitlines()
    assert on_the_page[:len(printed)] == printed


NO_SPLIT, SPLIT = "table3: no split: w = 0", "table3: + split: w = 0"
TOKENS, ALL_0 = "table3: + split + class tokens: w = 0", "table3: all: w = 0"
N01, K64 = "table3: all, N(0, I) for Z_R: w = 1", "table3: all, K_R = 64: w = 1"
RESAMPLING, NAIVE = "table3: all + resampling CFG: w = 1", "table3: all + naive CFG: w = 1"
FINISHED = "guidance: finished preset, resampling: w = 1"
FINISHED_NAIVE, NAIVE_2 = [f"guidance: finished preset, naive: w = {w}" for w in (1, 2)]
BEST, BEST_MIXING = [f"guidance: finished {name}, resampling: w = 0.75"
                     for name in ("preset", "channel mixing")]
D_I = [f"fig6: {row}: w = 1" for row in ("d_I = 2", "d_I = 4", "K_I = 8, d_I = 8", "d_I = 12")]
K_I = [f"fig6: {row}: w = 1" for row in ("K_I = 1", "K_I = 4", "K_I = 8, d_I = 8", "K_I = 32")]
AF, JET = "table4: AF, no map, K_R = 64: w = 1", "table4: Jet, no map, K_R = 64: w = 1"
STUDENT_AF = "table4: AF + student, no map, K_R = 64: w = 1"
OUR_AF, OUR_JET = "table4: AF: w = 1", "table4: Jet: w = 1"
EXACT, STUDENT = [f"student: assets/fashion.pt: {way}, denoise 0.06"
                  for way in ("exact", "student")]
FARMER, TARFLOW, JETFORMER, SIT, MIXING = [
    f"peers: {row}: w = 1"
    for row in ("FARMER", "TarFlow", "JetFormer", "SiT", "FARMER + channel mixing")]

HEADLINES = [  # page, words that only this row of a table has, the results behind its FDs in order
    (README, "FARMER: FD", [FINISHED, BEST_MIXING]),
    (README, "the channel split improves", [NO_SPLIT, SPLIT]),
    (README, "guidance by resampling beats", [RESAMPLING, NAIVE, FINISHED, FINISHED_NAIVE,
                                              NAIVE_2]),
    (README, "more class tokens help", [SPLIT, TOKENS]),
    (README, "a learnt mixture is better", [N01, RESAMPLING, K64]),
    (README, "the *final flip*, helps", [TOKENS, ALL_0]),
    (README, "the best number of informative", D_I),
    (README, "the AF works where Jet", [AF, JET]),
    (README, "FARMER beats JetFormer and", [FARMER, JETFORMER, TARFLOW, SIT]),
    (README, "a one-step student costs", [EXACT, STUDENT, (min, STUDENT_AF, AF),
                                          (max, STUDENT_AF, AF)]),
    (README, "*not in the paper:* [channel", [FARMER, MIXING, FINISHED, BEST_MIXING]),
    (README, "[channel_mixing.py](examples", [FINISHED, BEST_MIXING]),
    (RESULTS, "The channel split improves", [NO_SPLIT, SPLIT]),
    (RESULTS, "Resampling CFG beats", [NAIVE, RESAMPLING, FINISHED_NAIVE, FINISHED]),
    (RESULTS, "Class tokens help (", [SPLIT, TOKENS]),
    (RESULTS, "A learnt mixture for Z^R", [N01, RESAMPLING, N01, K64]),
    (RESULTS, "The final flip helps (", [TOKENS, ALL_0, "flip: no final flip: w = 1",
                                        "flip: final flip: w = 1"]),
    (RESULTS, "The best d_I and K_I", D_I + K_I),
    (RESULTS, "The AF works where Jet", [AF, JET, OUR_AF, OUR_JET]),
    (RESULTS, "A one-step student costs", [EXACT, STUDENT, AF, STUDENT_AF]),
    (RESULTS, "FARMER beats JetFormer and", [FARMER, TARFLOW, JETFORMER, SIT]),
    (RESULTS, "Not in the paper: couplings", [FARMER, MIXING, BEST, BEST_MIXING]),
    (RESULTS, "| FARMER, with the paper's parts alone", [FARMER, RESAMPLING]),
    (RESULTS, "| the paper's settings |", [RESAMPLING]),
    (RESULTS, "| more components |", [K_I[-1]]),
    (RESULTS, "| N(0, I) | 8 |", [N01]),
    (RESULTS, "| no final flip | 8 |", ["flip: no final flip: w = 1"]),
    (RESULTS, "more noise: the preset |", [FARMER]),
    (RESULTS, "| the best samples |", [BEST, BEST_MIXING]),
]


def distances(name: str | tuple) -> list[float]:
    """The FDs of all seeds; of (min, a, b) or (max, a, b) the least or largest of a - b."""
    if isinstance(name, tuple):
        best, *two = name
        return [best(a - b for a, b in zip(*map(distances, two), strict=True))]
    table, row, way = name.split(": ")
    results = tables.read_results(tables.PUBLISHED, table).items()
    return [result["fd"] for key, result in results if key[:2] == (row, way)]


@pytest.mark.parametrize("page, words, behind", HEADLINES)
def test_headline_numbers_are_those_of_their_rows(page, words, behind):
    (line,) = [line for line in page.splitlines() if line.startswith("|") and words in line]
    line = line.partition("; CIFAR: ")[0]  # those runs are no rows of tables.py
    line = re.sub(r"(w =|Section) [\d.]+", "", line)
    found = re.findall(r"(\d+\.\d+)(?: ± (\d+\.\d+))?", line)
    ours, others = found[:len(behind)], found[len(behind):]
    for (number, spread), name in zip(ours, behind, strict=True):
        values = distances(name)
        mean = statistics.mean(values)
        digits = len(number.partition(".")[2])
        assert number == f"{mean:.{digits}f}", name
        furthest = max(abs(value - mean) for value in values)
        assert spread in ("", f"{furthest:.{digits}f}"), name
    places = [tuple(name.split(": ")[1:]) for name in behind if isinstance(name, str)]
    papers = dict.fromkeys(tables.PAPER[place] for place in places if place in tables.PAPER)
    assert [float(number) for number, _ in others] in ([], list(papers))  # FIDs, in the next cell


# ----------------------------------------------------------------------------- classifier.py
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
    classifier.main(["fit", str(folder / "all"), str(folder / "net.pt"), "--steps", "40",
                     "--noise", "0"])
    return folder


def test_labels_are_compared_by_name(reader, tmp_path, capsys):
    """In `some`, dark is class 0; the network knows it as class 1."""
    classifier.main(["read", str(reader / "net.pt"), str(reader / "some")])
    assert "100.0% of 40 images" in capsys.readouterr().out
    (tmp_path / "red").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red" / "0.png")
    fails(capsys, classifier, ["read", reader / "net.pt", tmp_path], "red", "bright")
    fails(capsys, classifier, ["read", tmp_path / "red" / "0.png", reader / "some"], "0.png", "fit")
    network = torch.jit.load(reader / "net.pt")
    assert network.classes == ["bright", "dark", "grey"]
    assert network(torch.zeros(5, 3, 8, 8)).shape == (5, 128)  # what fid.py --features takes
    dark = np.full((2, 8, 8, 1), 50, np.uint8)  # grey values, given to a network of colours
    images = classifier.Images("dark", dark, np.array([1, 0]))
    assert classifier.read_right(network, images) == 50


def test_a_network_is_fitted_with_noise_unless_that_is_0_and_not_on_held_out_images(
        reader, tmp_path, capsys):
    out = str(tmp_path / "n.pt")
    weights = []
    for noise in ("0", "0.1", "0.1"):
        classifier.main(["fit", str(reader / "all"), out, "--holdout", "4", "--steps", "3",
                         "--image-size", "4", "--noise", noise])
        weights.append(torch.jit.load(out).head.weight)
    assert not torch.equal(*weights[:2]) and torch.equal(*weights[1:])
    assert capsys.readouterr().out.count("of 12 held-out images") == 3
    heldout = ["heldout", str(reader / "all"), str(tmp_path / "h.npz")]
    classifier.main([*heldout, "--holdout", "4"])
    with np.load(tmp_path / "h.npz") as f:
        assert f["images"].shape == (12, 8, 8, 3) and (np.bincount(f["labels"]) == 4).all()
    fails(capsys, classifier, heldout, "--holdout")
    np.savez(tmp_path / "flat.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    fails(capsys, classifier, ["fit", tmp_path / "flat.npz", out], "no labels")


# ----------------------------------------------------------------------------- likelihood.py
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


def test_bayes_rule_and_the_auroc_are_right_for_separate_and_for_equal_images():
    labels = torch.arange(240) % 3  # more than a batch
    x = (labels / 10).view(-1, 1, 1, 1) + 0.03 * torch.randn(240, 1, 4, 4)
    found = likelihood.posterior(ByClass(), x, labels)
    right = found["accuracy"]
    assert right > 0.9 and 0.8 < found["confidence"] < 1
    assert found["standard_error"] == pytest.approx((right * (1 - right) / 240) ** 0.5)
    assert likelihood.posterior(ByClass(), x, labels.roll(1))["accuracy"] < 0.1
    assert likelihood.log_probs(ByClass(), x, labels)["total"].min() > -4

    inside = x[labels == 0]
    result = likelihood.ood(ByClass(), inside, inside + 0.5)
    assert result["total"]["outside"] < -10 < result["total"]["inside"]
    assert result["total"]["auroc"] == 1 and result["logdet"]["auroc"] == 0.5  # ties count half
    assert likelihood.ood(ByClass(), inside + 0.5, inside)["total"]["auroc"] == 0


def test_every_use_of_a_run(small_run, tiny_data, tmp_path, capsys):  # noqa: F811
    split = likelihood.open_split(str(tiny_data), 16, 3)
    args = SimpleNamespace(num=30, device=torch.device("cpu"))
    pixels, labels = split.train.batch(np.linspace(0, 59, 30).astype(int))
    x, found = likelihood.noised_images(split, TRAINING, args)
    assert torch.equal(found, labels)
    assert (x - (pixels + 0.5) / 128 + 1).std().item() == pytest.approx(0.03, rel=0.02)

    def printed(*argv):
        capsys.readouterr()
        likelihood.main([str(word) for word in argv])
        return json.loads(capsys.readouterr().out)

    for action, *data in (["posterior"], ["ood", tiny_data, tiny_data], ["bound", tiny_data]):
        assert len(printed(action, small_run, *data, "--num", 20)) > 3
    run, unread = tmp_path / "run", tmp_path / "model.pt"
    train.main([*MINIMAL.split(), "--num-classes", "0", "--out", str(run), "--data",
                str(tiny_data), "--steps", "1", "--holdout", "5"])
    assert printed("bound", run)["images"] == 5  # the hold-out, or all images of a set
    assert printed("bound", run, tiny_data)["images"] == 60
    save(unread, load(small_run)[0])
    for *argv, words in (["ood", small_run, tiny_data, "expected two"],
                         ["bound", unread, "a trained model"], ["posterior", run, "no classes"]):
        fails(capsys, likelihood, argv, words)


# ----------------------------------------------------------------------------- benchmark.py
SMALL = [*SMALL_FLAGS[:10], "--preset", "tiny", "--device", "cpu", "--rounds", "1"]


def rows_of(*argv) -> list[dict]:
    """The rows that benchmark.py keeps, in the current folder."""
    benchmark.main([*argv, "--out", "rows.jsonl"])
    with open("rows.jsonl") as file:
        return [json.loads(line) for line in file]


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


def test_every_part_of_sampling_is_timed_beside_another_models_and_compared(
        tmp_path, monkeypatch):
    """Here a model that is replayed has other weights, so its images differ."""
    @contextlib.contextmanager
    def replaying(model, on):
        for weight in model.parameters():
            weight += 1e-3
        yield

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "replaying", replaying)
    monkeypatch.setattr(benchmark, "medians", lambda work, *_: dict.fromkeys(work, 0.5))
    seen, parts_of = [], benchmark.parts_of
    monkeypatch.setattr(benchmark, "parts_of", lambda model, options, *args:
                        seen.append((model.config.image_size, options)) or parts_of(
                            model, options, *args))
    rows = rows_of("sample", *SMALL, "--batch-sizes", "2", "--guidance", "0.5", "--image-size", "8",
                   "--against", "examples.minimal_model", "--graphs")
    assert [(size, getattr(options, "guidance", None)) for size, options in seen] == [
        (8, 0.5), (8, None)]
    ours = [("farmer:tiny", part) for part in ("whole", "prior", "exact", "student")]
    parts = [*ours, ("examples.minimal_model", "whole")]
    parts += [(label, f"{part}, by graphs") for label, part in parts]
    assert [(row["model"], row["part"]) for row in rows] == parts
    assert {row["ms/image"] for row in rows} == {250} and not any(row["equal"] for row in rows[5:])


def test_a_step_of_training_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "hardware", lambda device: "NVIDIA H200")
    training_step = benchmark.training_step
    models, weights = [], []

    def remembered(model, *args):
        models.append(model)
        weights.extend(weight.clone() for weight in model.parameters())
        return training_step(model, *args)

    monkeypatch.setattr(benchmark, "training_step", remembered)
    (row,) = rows_of("train", *SMALL, "--batch-sizes", "2")
    moved = [not torch.equal(p, q) for p, q in zip(models[0].parameters(), weights, strict=True)]
    assert all(moved) and not any(weight.eq(0).all() for weight in weights)
    flops = 3 * benchmark.counted("farmer", models[0].config)[1]
    assert row["TFLOP/s"] == pytest.approx(flops * row["images/s"] / 1e12)
    assert row["MFU"] == row["TFLOP/s"] / 989


def test_sizes_are_those_of_every_preset(capsys):
    benchmark.main(["sizes", "--model", "examples.minimal_model", "--image-size", "8"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == ["| preset | all, M | GFLOP/image, forward |", "| --- | --- | --- |",
                          f"| default | {12 * 192 / 1e6:.4g} | 0 |"]


def test_every_part_of_gpu_runs_on_a_cpu_and_keeps_its_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = []

    def run(command):
        commands.append(command[2:])
        if "cpu" in command:
            benchmark.main(command[2:])
        return SimpleNamespace(returncode=len(commands) % 2)  # a part that fails costs no other

    monkeypatch.setattr(subprocess, "run", run)
    benchmark.main(["gpu", *SMALL])
    rows = [json.loads(line) for line in open("gpu.jsonl")]
    assert rows[3]["part"] == "whole, by graphs" and rows[3]["equal"] and "MFU" in rows[6]
    assert len({row["command"] for row in rows}) == len(benchmark.PARTS) - 1  # nothing is compiled
    assert {row["model"] for row in rows} == {"farmer:tiny"}
    fails(capsys, benchmark, ["gpu"], "no CUDA GPU")
    assert len(commands) == len(benchmark.PARTS)
    monkeypatch.setattr(benchmark, "pick_device", torch.device)
    benchmark.main(["gpu"])
    assert "--compile" in commands[-1] and "farmer-1.1b-p16" in commands[-1]
    fails(capsys, benchmark, ["train", *SMALL, "--against", "farmer:none"], "none", "fashion")
    fails(capsys, benchmark, [], "COMMAND")


# ----------------------------------------------------------------------------- figures.py
@pytest.fixture
def plots(monkeypatch) -> Callable:
    """What is drawn: names of the axes, of the curves, and their points."""
    figure = MagicMock()
    figure.savefig = lambda file, **options: file.write(b"a picture")
    axes = figure.add_subplot.return_value
    axes.get_legend_handles_labels.return_value = [], []
    monkeypatch.setitem(sys.modules, "matplotlib", MagicMock(rcParams={}))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", MagicMock(Figure=lambda **_: figure))

    def drawn():
        curves = {call.kwargs["label"]: list(zip(*call.args[:2], strict=True))
                  for call in axes.plot.call_args_list}
        return [call.kwargs["xlabel"] for call in figure.add_subplot.call_args_list], curves
    return drawn


def test_a_curves_minutes_are_those_of_training(plots, tmp_path, capsys, monkeypatch):
    run, kept, out = tmp_path / "run", tmp_path / "kept.jsonl", tmp_path / "x.png"
    run.mkdir()
    lines = [dict(step=10, loss=-10, minutes=1), dict(step=20, loss=-20, minutes=5),
             dict(step=20, val_loss=3)]
    for file in (run / "log.jsonl", kept):
        file.write_text("\n".join(map(json.dumps, lines)))
    figures.main(["curve", str(run), str(kept), "--out", str(out)])
    points = [(1, -10), (5, -20)]
    assert plots() == (["minutes of training"], {"run": points, "kept": points})
    assert out.read_bytes() == b"a picture" and capsys.readouterr().out == f"{out}\n"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for *argv, words in (["curve", "folders of runs"], ["fig6", run, "folders of runs"],
                         ["curve", tmp_path, "log.jsonl"], ["fig6", "pip install matplotlib"],
                         ["curve", run, "--field", "val_loss", "it has none"]):
        fails(capsys, figures, [*argv, "--out", out], words)


def test_points_are_means_over_seeds(plots, tmp_path):
    figures.main(["guidance", "--out", str(tmp_path / "x.png")])
    assert plots()[0] == 3 * ["guidance weight w"] and len(plots()[1]) == 5
    figures.main(["fig6", "--out", str(tmp_path / "x.png")])
    assert plots()[0][3:] == ["K_I", "d_I"]
    assert plots()[1]["w = 1"] == [(d, pytest.approx(statistics.mean(distances(name))))
                                   for d, name in zip((2, 4, 8, 12), D_I, strict=True)]
