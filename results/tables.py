"""The paper's tables in miniature, on Fashion-MNIST: trains the rows of a table and scores them.

    python results/tables.py table3                      # every row, seed 0
    python results/tables.py peers --seeds 0,1,2         # with the spread over three seeds
    python results/tables.py table4 --rows "AF" "Jet"    # these rows alone
    python results/tables.py table3 --print              # the table as it is; trains nothing

A row is one training run, sampled from in one or more ways. It trains for the number of steps that
--minutes of one core hold. These are measured once, as processor time, and kept in steps.json, so
that a row that is run again is the same run. Scores are of 2,000 samples against the test split;
FD, precision and recall are in the features of a small classifier, which also reads the labels.

Your results go to runs/tables/TABLE.jsonl and are printed beside the published ones, which are in
results/TABLE.jsonl; --publish puts yours among those. A stopped command goes on where it stopped.
Everything runs with one thread: for two cores start two commands, say with different --seeds.
"""
# ruff: noqa: E402  (the repository's folder has to be found first)
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import tempfile
from dataclasses import dataclass

import numpy as np

from support.checkpoints import load
from support.cli import Parser, UserError, at_least, run_script, write_file
from support.datasets import open_images

PUBLISHED = REPOSITORY / "results"
OWN = REPOSITORY / "runs" / "tables"
CLASSIFIER = "assets/fashion-classifier.pt"
DATA = "fashion-mnist"
NUM_SAMPLES = 2000
QUIET = ["--workers", "0", "--sample-every", "0", "--val-every", "0"]


# ----------------------------------------------------------------------------- the tables
@dataclass(frozen=True)
class Row:
    """One training run, and a line of the table for each way of sampling from it."""

    name: str
    weights: str  # flags of train.py, or a checkpoint; empty for real images
    ways: dict[str, str]  # what the table says of the sampling: the flags of sample.py
    student: bool = False  # distil the trained model first
    turned: bool = False  # train on images turned by 180 degrees, and turn the samples back


def guidance(*weights: float, more: str = "") -> dict[str, str]:
    """Ways of sampling with these guidance weights w; `more` are further flags of sample.py."""
    return {f"w = {w}": f"--guidance {w} {more}".strip() for w in weights}


FINISHED = "assets/fashion.pt"
MIXED = "assets/fashion-mixing.pt"
MIXING = "--model examples.channel_mixing --preset fashion"
LIKELIHOOD = {"": "--eval"}  # instead of flags of sample.py: the likelihood of the test split
NAIVE = "--guidance-method naive"
W_0 = guidance(0)
W_1 = guidance(1)
BOTH = guidance(0, 1)
EULER = guidance(0, 1, more="--steps 20")
STUDENT = {
    "exact, denoise 0": "--inverse exact --guidance 1 --denoise 0",
    "exact, denoise 0.03": "--inverse exact --guidance 1 --denoise 0.03",
    "student, denoise 0": "--inverse student --guidance 1 --denoise 0",
    "student, denoise 0.03": "--inverse student --guidance 1 --denoise 0.03",
}
REAL = Row("real images", "", {"": ""})

TABLES: dict[str, list[Row]] = {
    "table3": [
        Row("no split", "--preset fashion --informative-dim 16 --class-tokens 1 --no-final-flip",
            W_0),
        Row("+ split", "--preset fashion --class-tokens 1 --no-final-flip", W_0),
        Row("+ split + class tokens", "--preset fashion --no-final-flip", W_0),
        Row("+ split + final flip", "--preset fashion --class-tokens 1", W_0),
        Row("all", "--preset fashion", W_0),
        Row("all, N(0, I) for Z_R", "--preset fashion --redundant-mixtures 0", BOTH),
        Row("all, K_R = 64", "--preset fashion --redundant-mixtures 64", BOTH),
        Row("all + naive CFG", "--preset fashion", guidance(1, more=NAIVE)),
        Row("all + resampling CFG", "--preset fashion", W_1),
        REAL,
    ],
    "table4": [
        Row("Jet, no map, K_R = 64",
            "--model baselines.jetformer --preset table4 --no-whiten --redundant-mixtures 64", W_1),
        Row("AF, no map, K_R = 64", "--preset fashion --no-whiten --redundant-mixtures 64", W_1),
        Row("AF + student, no map, K_R = 64",
            "--preset fashion --no-whiten --redundant-mixtures 64",
            W_1, student=True),
        Row("Jet", "--model baselines.jetformer --preset table4", W_1),
        Row("AF", "--preset fashion", W_1),
        Row("AF, 8 blocks x 1 layer", "--preset fashion --flow-blocks 8 --flow-layers 1", W_1),
        Row("AF + 1 coupling", f"{MIXING} --flow-layers 2 --couplings 1", W_1),
        Row("AF + 2 couplings", f"{MIXING} --flow-layers 2 --couplings 2", W_1),
        REAL,
    ],
    "flip": [
        Row("final flip", "--preset fashion", BOTH),
        Row("no final flip", "--preset fashion --no-final-flip", BOTH),
        # On turned images, the last block and the AR both read the tokens in the other order.
        Row("final flip, turned images", "--preset fashion", BOTH, turned=True),
        Row("no final flip, turned images", "--preset fashion --no-final-flip", BOTH, turned=True),
        REAL,
    ],
    "fig6": [
        Row("K_I = 1", "--preset fashion --informative-mixtures 1", BOTH),
        Row("K_I = 4", "--preset fashion --informative-mixtures 4", BOTH),
        Row("K_I = 8, d_I = 8", "--preset fashion", BOTH),
        Row("K_I = 32", "--preset fashion --informative-mixtures 32", BOTH),
        Row("d_I = 2", "--preset fashion --informative-dim 2", BOTH),
        Row("d_I = 4", "--preset fashion --informative-dim 4", BOTH),
        Row("d_I = 12", "--preset fashion --informative-dim 12", BOTH),
        REAL,
    ],
    "guidance": [
        Row("finished preset, resampling", FINISHED, guidance(0, 0.5, 0.75, 1, 1.5, 2)),
        Row("finished preset, naive", FINISHED, guidance(0.5, 0.75, 1, 1.5, 2, more=NAIVE)),
        Row("finished channel mixing, resampling", MIXED, guidance(0, 0.5, 0.75, 1, 1.5, 2)),
        Row("young model, resampling", "--preset fashion", guidance(0, 0.5, 0.75, 1, 1.5, 2)),
        Row("young model, naive", "--preset fashion", guidance(0.5, 0.75, 1, 1.5, 2, more=NAIVE)),
        REAL,
    ],
    "denoise": [
        Row(FINISHED, FINISHED, {
            "w = 0, off": "--inverse exact --guidance 0 --denoise 0",
            "w = 0, on": "--inverse exact --guidance 0 --denoise 0.03",
            "w = 1, off": "--inverse exact --guidance 1 --denoise 0",
            "w = 1, on": "--inverse exact --guidance 1 --denoise 0.03",
        }),
        REAL,
    ],
    "student": [Row(weights, weights, STUDENT) for weights in (FINISHED, MIXED)] + [REAL],
    "peers": [
        Row("FARMER", "--preset fashion", BOTH),
        Row("FARMER + channel mixing", MIXING, BOTH),
        Row("TarFlow", "--model baselines.tarflow --preset fashion", BOTH),
        Row("JetFormer", "--model baselines.jetformer --preset fashion", BOTH),
        Row("SiT", "--model baselines.arflow --preset sit-fashion", EULER),
        Row("ARFlow, S = 1", "--model baselines.arflow --preset arflow1-fashion", EULER),
        Row("ARFlow, S = 5", "--model baselines.arflow --preset fashion", EULER),
        REAL,
    ],
    "likelihood": [
        Row("FARMER", "--preset fashion --noise uniform", LIKELIHOOD),
        Row("FARMER + channel mixing", f"{MIXING} --noise uniform", LIKELIHOOD),
        # With Muon TarFlow gets stuck under this noise, and the guard skips its growing gradients.
        Row("TarFlow", "--model baselines.tarflow --preset fashion --noise uniform --guard 0 "
            "--optimizer adamw --lr 3e-3", LIKELIHOOD),
        Row("JetFormer", "--model baselines.jetformer --preset fashion --noise uniform",
            LIKELIHOOD),
    ],
}

PAPER = {  # FID on ImageNet 256
    ("no split", "w = 0"): 61.17, ("+ split", "w = 0"): 49.29,
    ("+ split + class tokens", "w = 0"): 45.34, ("+ split + final flip", "w = 0"): 45.69,
    ("all", "w = 0"): 44.56, ("all, N(0, I) for Z_R", "w = 1"): 7.81,
    ("all + naive CFG", "w = 1"): 8.66, ("all + resampling CFG", "w = 1"): 5.67,
    ("Jet, no map, K_R = 64", "w = 1"): 106.23, ("AF, no map, K_R = 64", "w = 1"): 5.55,
    ("AF + student, no map, K_R = 64", "w = 1"): 5.63,
    ("FARMER", "w = 1"): 3.60, ("TarFlow", "w = 1"): 5.56, ("JetFormer", "w = 1"): 6.64,
}


# ----------------------------------------------------------------------------- training
def run(*command, show: bool = False) -> str:
    """Runs a script with one thread -> what it printed; with `show` that goes to stderr instead.

    Its progress and its errors pass through.
    """
    words = [sys.executable, *map(str, command)]
    out = sys.stderr if show else subprocess.PIPE
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=REPOSITORY, env=env, stdout=out, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(words[1:])} ended with exit code {done.returncode}")
    return done.stdout


def training(weights: str, steps: int, seed: int, out: Path) -> list:
    """The command that trains a row."""
    return ["train.py", *weights.split(), "--data", DATA, "--steps", steps, "--seed", seed,
            "--out", out, *QUIET]


def processor_seconds(weights: str, steps: int) -> float:
    """What a training run of so many steps takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with tempfile.TemporaryDirectory() as folder:
        run(*training(weights, steps, 0, Path(folder) / "run"), show=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def read_steps(folder: Path) -> dict:
    """The numbers of steps that were measured, by the flags of train.py and the minutes."""
    file = folder / "steps.json"
    return json.loads(file.read_text()) if file.exists() else {}


def steps_for(weights: str, minutes: float) -> int:
    """Steps of training that `minutes` of one core hold: from steps.json, or measured here."""
    name = f"{weights} | {minutes:g} min"
    known = read_steps(OWN) | read_steps(PUBLISHED)
    if name not in known:
        print(f"Measuring how many steps fit into {name}", file=sys.stderr)
        seconds = processor_seconds(weights, 80) - processor_seconds(weights, 20)
        steps = max(100, int(round(60 * minutes * 60 / seconds, -2)))
        known[name] = dict(steps=steps)
        (OWN / "steps.json").write_text(json.dumps(known))
    return known[name]["steps"]


def trained(row: Row, seed: int, steps: int | None) -> Path:
    """The run of a row, trained, resumed or found finished; or the checkpoint that it names."""
    if steps is None:
        return REPOSITORY / row.weights
    name = "_".join(f"{row.weights} {steps} {seed}".replace("--", "").replace("/", "-").split())
    out = OWN / (f"{name}_turned" if row.turned else name)
    command = training(row.weights, steps, seed, out)
    if row.turned:
        command += ["--data", turned_images()]  # the last --data counts
    run(*command, "--resume", show=True)
    if row.student:
        teacher = out
        out = OWN / f"{name}-student"
        run("train.py", "--distill", teacher, "--out", out, *QUIET, "--resume", show=True)
    return out


def turn(pixels: np.ndarray) -> np.ndarray:
    """Images (N, H, W, C), each turned by 180 degrees."""
    return pixels[:, ::-1, ::-1]


def turned_images() -> Path:
    """The training images, turned: an .npz that train.py reads."""
    file = OWN / "turned.npz"
    if not file.exists():
        images = open_images(f"{DATA}:train")
        write_file(file, lambda f: np.savez(f, images=turn(images.array), labels=images.labels))
    return file


# ----------------------------------------------------------------------------- results
def real_images(file: Path) -> None:
    """Writes training images, spread over the set: what a perfect model would reach."""
    images = open_images(f"{DATA}:train")
    some = np.linspace(0, len(images) - 1, NUM_SAMPLES).astype(np.int64)
    np.savez(file, images=images.array[some], labels=images.labels[some])


def scores(samples: Path) -> dict:
    """FD, precision and recall against the test split, and the part read as its label."""
    report = run("fid.py", samples, f"{DATA}:test", "--features", CLASSIFIER, "--json")
    read = run("results/classifier.py", "read", CLASSIFIER, samples)
    return json.loads(report) | {"read_right": float(re.search(r"([0-9.]+)%", read)[1])}


def result_of(row: Row, sampling: str, seed: int, minutes: float, steps: int | None) -> dict:
    """Trains a row, unless that is done, and scores it -> a line of TABLE.jsonl."""
    flags = row.ways[sampling]
    result = dict(row=row.name, sampling=sampling, seed=seed, minutes=minutes, steps=steps,
                  weights=row.weights, flags=flags)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "samples.npz"
        if not row.weights:
            real_images(file)
            return result | scores(file)
        out = trained(row, seed, steps)
        result["parameters"] = sum(p.numel() for p in load(out)[0].parameters()) / 1e6
        if flags == "--eval":
            return result | json.loads(run("train.py", "--eval", out, "--data", f"{DATA}:test"))
        run("sample.py", out, "--num", NUM_SAMPLES, "--seed", 1, "--out", file, *flags.split())
        if row.turned:
            samples = dict(np.load(file))
            np.savez(file, images=turn(samples["images"]), labels=samples["labels"])
        return result | scores(file)


def read_results(folder: Path, table: str) -> dict[tuple, dict]:
    """The results in a folder's TABLE.jsonl by (row, sampling, minutes, steps, seed).

    Results with one key are of the same run. Minutes are None where nothing was trained.
    """
    file = folder / f"{table}.jsonl"
    results = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        result = json.loads(line)
        steps = result.get("steps")
        minutes = result["minutes"] if steps else None
        key = (result["row"], result.get("sampling", ""), minutes, steps, result["seed"])
        results[key] = result
    return results


def run_rows(table: str, rows: list[Row], seeds: list[int], minutes: float) -> list[tuple]:
    """Runs what runs/tables/TABLE.jsonl lacks -> the keys of all results of these rows."""
    wanted = {}
    for row in rows:
        if row.weights.startswith("--"):
            trainings = [(minutes, steps_for(row.weights, minutes), seed) for seed in seeds]
        else:
            trainings = [(None, None, 0)]
        wanted |= {(row.name, way, *training): row for way in row.ways for training in trainings}
    todo = [key for key in wanted if key not in read_results(OWN, table)]
    file = OWN / f"{table}.jsonl"
    if not todo:
        print(f"Nothing was trained: {file} has all of these results.", file=sys.stderr)
    for i, key in enumerate(todo, 1):
        name, sampling, _, steps, seed = key
        print(f"{table} {i}/{len(todo)}: {name} {sampling}, seed {seed}", file=sys.stderr)
        result = result_of(wanted[key], sampling, seed, minutes, steps)
        with file.open("a") as f:
            f.write(json.dumps(result) + "\n")
    return list(wanted)


def publish(table: str, keys: list[tuple]) -> None:
    """Puts your results, and the numbers of steps behind them, among the published ones."""
    yours = read_results(OWN, table)
    results = read_results(PUBLISHED, table) | {key: yours[key] for key in keys}
    lines = "".join(json.dumps(result) + "\n" for result in results.values())
    (PUBLISHED / f"{table}.jsonl").write_text(lines)
    (PUBLISHED / "steps.json").write_text(json.dumps(read_steps(OWN) | read_steps(PUBLISHED)))


# ----------------------------------------------------------------------------- printing
COLUMNS = {  # of the table: the field of a result, and its format
    "seeds": ("seed", ""),
    "FD in the classifier's features": ("fd", ".2f"),
    "precision": ("precision", ".2f"),
    "recall": ("recall", ".2f"),
    "read right, %": ("read_right", ".1f"),
    "nats/dim": ("nats_per_dim", ".3f"),
    "bits/dim": ("bits_per_dim", ".3f"),
    "parameters, M": ("parameters", ".2f"),
}


def markdown(table: str) -> str:
    """A line for each row, sampling, minutes and steps: the published value, then yours."""
    published = read_results(PUBLISHED, table)
    yours = {k: r for k, r in read_results(OWN, table).items() if published.get(k) != r}
    sides = [published, yours] if yours else [published]
    groups = {}  # (row, sampling, minutes, steps) -> the results of each side, one for each seed
    for side, results in enumerate(sides):
        for key, result in results.items():
            groups.setdefault(key[:4], [[] for _ in sides])[side].append(result)
    fields = {field for results in sides for result in results.values() for field in result}
    columns = {name: column for name, column in COLUMNS.items() if column[0] in fields}
    head = ["row", "sampling", "minutes", "steps", *columns, "paper's FID"]
    lines = [head, ["---"] * len(head)]
    for place in [(row.name, sampling) for row in TABLES[table] for sampling in row.ways]:
        for group in [group for group in groups if group[:2] == place]:
            cells = ["–" if value is None else str(value) for value in group]
            for column in columns.values():
                cells.append(" / ".join(cell(results, *column) for results in groups[group]))
            lines.append([*cells, str(PAPER.get(place, "–"))])
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"Published / yours:\n\n{text}" if yours else text


def cell(results: list[dict], field: str, form: str) -> str:
    """What the table says of some seeds: the mean of a field ± the largest distance from it."""
    values = [result.get(field) for result in results]
    if None in values or not values:
        return "–"
    if field == "seed":
        return ", ".join(map(str, values))
    mean = statistics.mean(values)
    spread = max(abs(value - mean) for value in values)
    return f"{mean:{form}} ± {spread:{form}}" if spread else f"{mean:{form}}"


# ----------------------------------------------------------------------------- command line
def integers(text: str) -> list[int]:
    """0,1,2 -> [0, 1, 2]."""
    return [int(part) for part in text.split(",")]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; its `rows` are those of the table."""
    parser = Parser(prog="tables.py", description=__doc__)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--seeds", type=integers, default=[0], metavar="S1,S2",
                        help="of training (default: 0)")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="these rows only, by exact names")
    parser.add_argument("--minutes", type=at_least(float, 0.01), default=5.0,
                        help="of one core, for a training run (default: 5, as published)")
    parser.add_argument("--print", action="store_true", help="print the table; train nothing")
    parser.add_argument("--publish", action="store_true",
                        help="put your results of these rows into results/TABLE.jsonl")
    args = parser.parse_args(argv)
    rows = {row.name: row for row in TABLES[args.table]}
    unknown = [name for name in args.rows or [] if name not in rows]
    if unknown:
        parser.error(f"--rows: got {unknown[0]!r}, expected some of: {'; '.join(rows)}")
    args.rows = [rows[name] for name in args.rows or rows]
    return args


def main(argv: list[str] | None = None) -> None:
    """Runs the rows and prints the table."""
    args = parse(argv)
    if not args.print:
        OWN.mkdir(parents=True, exist_ok=True)
        keys = run_rows(args.table, args.rows, args.seeds, args.minutes)
        if args.publish:
            publish(args.table, keys)
    print(markdown(args.table))


if __name__ == "__main__":
    run_script(main)
