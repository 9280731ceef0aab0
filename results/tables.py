"""The paper's tables in miniature, on Fashion-MNIST: trains the rows of a table and scores them.

    python results/tables.py table3                      # every row, seed 0
    python results/tables.py peers --seeds 0,1,2         # with the spread over three seeds
    python results/tables.py table4 --rows "AF" "Jet"    # these rows alone
    python results/tables.py table3 --print              # the table as it is; trains nothing

A row is one training run, sampled from in one way. It trains for the number of steps that
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
import platform
import re
import resource
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass

import numpy as np
import torch

from support.checkpoints import load
from support.cli import Parser, UserError, at_least, reading, run_script, warn, write_file
from support.datasets import open_images

PUBLISHED = REPOSITORY / "results"
OWN = REPOSITORY / "runs" / "tables"
CLASSIFIER = REPOSITORY / "assets" / "fashion-classifier.pt"
DATA = "fashion-mnist"
NUM_SAMPLES = 2000
QUIET = ["--workers", "0", "--sample-every", "0", "--val-every", "0"]


# ----------------------------------------------------------------------------- the tables
@dataclass(frozen=True)
class Row:
    """A line of a table."""

    name: str
    weights: str  # flags of train.py, or a checkpoint; empty for real images
    sampling: str = ""  # what the table says of the flags
    flags: str | None = None  # of sample.py; None: the held-out likelihood instead of samples
    student: bool = False  # distil the trained model first


def guided(name: str, weights: str, *ws: float, more: str = "", student: bool = False) -> list[Row]:
    """A line for each guidance weight w; `more` are further flags of sample.py."""
    flags = [f"--guidance {w} {more}".strip() for w in ws]
    return [Row(name, weights, f"w = {w}", f, student) for w, f in zip(ws, flags, strict=True)]


def swept(weights: str, ways: dict[str, str]) -> list[Row]:
    """A line for each name and flags of sample.py, from the same weights."""
    return [Row(weights, weights, name, flags) for name, flags in ways.items()]


OURS = "--preset fashion"
FINISHED = "assets/fashion.pt"
MIXING = "--model examples.channel_mixing --preset fashion"
JET = "--model baselines.jetformer --preset table4"
THEIRS = "--no-whiten --redundant-mixtures 64"  # the paper's setting in miniature
EXACT = "--inverse exact --guidance 1"
EULER = "--steps 20"
NAIVE = "--guidance-method reject"
WS = (0, 0.5, 0.75, 1, 1.5, 2)

TABLES: dict[str, list[Row]] = {
    "table3": [
        *guided("no split", f"{OURS} --informative-dim 16 --class-tokens 1 --no-final-flip", 0),
        *guided("+ split", f"{OURS} --class-tokens 1 --no-final-flip", 0),
        *guided("+ split + class tokens", f"{OURS} --no-final-flip", 0),
        *guided("+ split + final flip", f"{OURS} --class-tokens 1", 0),
        *guided("all", OURS, 0),
        *guided("all, N(0, I) for Z_R", f"{OURS} --redundant-prior gaussian", 0, 1),
        *guided("all + naive CFG", OURS, 1, more=NAIVE),
        *guided("all + resampling CFG", OURS, 1),
    ],
    "table4": [
        *guided("Jet, no map, K_R = 64", f"{JET} {THEIRS}", 1),
        *guided("AF, no map, K_R = 64", f"{OURS} {THEIRS}", 1),
        *guided("AF + student, no map, K_R = 64", f"{OURS} {THEIRS}", 1, student=True),
        *guided("Jet", JET, 1),
        *guided("AF", OURS, 1),
        *guided("AF, 8 blocks x 1 layer", f"{OURS} --flow-blocks 8 --flow-layers 1", 1),
        *guided("AF + 1 coupling", f"{MIXING} --couplings 1", 1),
        *guided("AF + 2 couplings", f"{MIXING} --couplings 2", 1),
    ],
    "flip": [
        *guided("final flip", OURS, 0, 1),
        *guided("no final flip", f"{OURS} --no-final-flip", 0, 1),
    ],
    "fig6": [
        *guided("K_I = 1", f"{OURS} --informative-mixtures 1", 0, 1),
        *guided("K_I = 4", f"{OURS} --informative-mixtures 4", 0, 1),
        *guided("K_I = 8, d_I = 8", OURS, 0, 1),
        *guided("K_I = 32", f"{OURS} --informative-mixtures 32", 0, 1),
        *guided("d_I = 2", f"{OURS} --informative-dim 2", 0, 1),
        *guided("d_I = 4", f"{OURS} --informative-dim 4", 0, 1),
        *guided("d_I = 12", f"{OURS} --informative-dim 12", 0, 1),
    ],
    "guidance": [
        *guided("finished preset, resampling", FINISHED, *WS),
        *guided("finished preset, naive", FINISHED, *WS[1:], more=NAIVE),
        *guided("young model, resampling", OURS, *WS),
        *guided("young model, naive", OURS, *WS[1:], more=NAIVE),
    ],
    "denoise": swept(FINISHED, {
        "w = 0, off": "--inverse exact --guidance 0 --denoise 0",
        "w = 0, on": "--inverse exact --guidance 0 --denoise 0.03",
        "w = 1, off": f"{EXACT} --denoise 0",
        "w = 1, on": f"{EXACT} --denoise 0.03",
    }),
    "student": swept(FINISHED, {
        "exact, denoise 0": f"{EXACT} --denoise 0",
        "exact, denoise 0.03": f"{EXACT} --denoise 0.03",
        "student, denoise 0": "--inverse student --guidance 1 --denoise 0",
        "student, denoise 0.03": "--inverse student --guidance 1 --denoise 0.03",
    }),
    "precision": swept(FINISHED, {
        "float32": f"{EXACT} --precision float32",
        "bfloat16": f"{EXACT} --precision bfloat16",
    }),
    "peers": [
        *guided("FARMER", OURS, 0, 1),
        *guided("FARMER + channel mixing", f"{MIXING} --couplings 2", 0, 1),
        *guided("TarFlow", "--model baselines.tarflow --preset fashion", 0, 1),
        *guided("JetFormer", "--model baselines.jetformer --preset fashion", 0, 1),
        *guided("SiT", "--model baselines.arflow --preset sit-fashion", 0, 1, more=EULER),
        *guided("ARFlow, S = 1", "--model baselines.arflow --preset arflow1-fashion", 0, 1,
                more=EULER),
        *guided("ARFlow, S = 5", "--model baselines.arflow --preset fashion", 0, 1, more=EULER),
    ],
    "likelihood": [
        Row("FARMER", f"{OURS} --noise uniform"),
        Row("FARMER + channel mixing", f"{MIXING} --couplings 2 --noise uniform"),
        # With Muon TarFlow gets stuck under this noise, and the guard skips its growing gradients.
        Row("TarFlow", "--model baselines.tarflow --preset fashion --noise uniform --guard 0 "
            "--optimizer adamw --lr 3e-3"),
        Row("JetFormer", "--model baselines.jetformer --preset fashion --noise uniform"),
    ],
}
for name in TABLES:
    if name != "likelihood":
        TABLES[name].append(Row("real images", "", "", ""))

PAPER = {  # FID on ImageNet 256
    ("no split", "w = 0"): 61.17, ("+ split", "w = 0"): 49.29,
    ("+ split + class tokens", "w = 0"): 45.34, ("+ split + final flip", "w = 0"): 45.69,
    ("all", "w = 0"): 44.56, ("all, N(0, I) for Z_R", "w = 1"): 7.81,
    ("all + naive CFG", "w = 1"): 8.66, ("all + resampling CFG", "w = 1"): 5.67,
    ("Jet, no map, K_R = 64", "w = 1"): 106.23, ("AF, no map, K_R = 64", "w = 1"): 5.55,
    ("AF + student, no map, K_R = 64", "w = 1"): 5.63,
    ("FARMER", "w = 1"): 3.60, ("TarFlow", "w = 1"): 5.56, ("JetFormer", "w = 1"): 6.64,
}


# ----------------------------------------------------------------------------- running commands
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
    return done.stdout or ""


def machine() -> str:
    """The processor, for the record."""
    return f"{platform.processor()} {torch.backends.cpu.get_cpu_capability()}"


# ----------------------------------------------------------------------------- training
def training(weights: str, steps: int, seed: int, out: Path) -> list:
    """The command that trains a row."""
    return ["train.py", *weights.split(), "--data", DATA, "--steps", steps, "--seed", seed,
            "--out", out, *QUIET]


def steps_for(weights: str, minutes: float) -> int:
    """Steps of training that `minutes` of one core hold: from steps.json, or measured here."""
    name = f"{weights} | {minutes:g} min"
    known = read_steps(OWN) | read_steps(PUBLISHED)
    if name not in known:
        print(f"Measuring how many steps fit into {name}", file=sys.stderr)
        seconds = processor_seconds(weights, 80) - processor_seconds(weights, 20)
        steps = max(100, int(round(60 * minutes * 60 / max(seconds, 1e-3), -2)))
        known[name] = dict(steps=steps, machine=machine())
        write_text(OWN / "steps.json", json.dumps(read_steps(OWN) | {name: known[name]}))
    return known[name]["steps"]


def read_steps(folder: Path) -> dict:
    file = folder / "steps.json"
    with reading(file, "mend or remove it"):
        return json.loads(file.read_text()) if file.exists() else {}


def processor_seconds(weights: str, steps: int) -> float:
    """What a run of so many steps takes."""
    out = OWN / f"probe-{os.getpid()}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    run(*training(weights, steps, 0, out), show=True)
    shutil.rmtree(out)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def trained(row: Row, seed: int, steps: int | None) -> Path:
    """The run of a row, trained, resumed or found finished; or the checkpoint that it names."""
    if steps is None:
        return REPOSITORY / row.weights
    name = "_".join(f"{row.weights} {steps} {seed}".replace("--", "").replace("/", "-").split())
    out = OWN / name
    run(*training(row.weights, steps, seed, out), "--resume", show=True)
    if row.student:
        teacher, out = out, OWN / f"{name}-student"
        run("train.py", "--distill", teacher, "--out", out, *QUIET, "--resume", show=True)
    return out


# ----------------------------------------------------------------------------- scores
def classifier() -> Path:
    """The network whose features are used; fitted without noise, since an FD has to see noise."""
    own = OWN / "classifier.pt"
    if not CLASSIFIER.exists() and not own.exists():
        print(f"{CLASSIFIER} is missing, so a classifier is fitted into {own}: FDs in its features "
              "differ a little from the published ones", file=sys.stderr)
        run("results/classifier.py", "fit", DATA, own, "--noise", 0, show=True)
    return CLASSIFIER if CLASSIFIER.exists() else own


def real_images(file: Path) -> None:
    """Writes training images, spread over the set: what a perfect model would reach."""
    images = open_images(f"{DATA}:train")
    some = np.linspace(0, len(images) - 1, min(NUM_SAMPLES, len(images))).astype(np.int64)
    write_file(file, lambda f: np.savez(f, images=images.array[some], labels=images.labels[some]))


def scores(samples: Path) -> dict:
    """FD, precision and recall against the test split, and the part read as its label."""
    network = classifier()
    report = json.loads(run("fid.py", samples, f"{DATA}:test", "--features", network, "--json"))
    read = run("results/classifier.py", "read", network, samples)
    names = ("fd", "precision", "recall", "num_samples", "features", "features_sha256")
    return {name: report[name] for name in names} | {
        "read_right": float(re.search(r"([0-9.]+)%", read)[1])}


def result_of(row: Row, seed: int, minutes: float, steps: int | None) -> dict:
    """Trains a row, unless that is done, and scores it -> a line of TABLE.jsonl."""
    result = dict(row=row.name, sampling=row.sampling, seed=seed, minutes=minutes, steps=steps,
                  weights=row.weights, flags=row.flags, machine=machine())
    file = OWN / f"samples-{os.getpid()}.npz"
    if row.weights:
        out = trained(row, seed, steps)
        model, _ = load(out)
        result["parameters"] = sum(p.numel() for p in model.parameters()) / 1e6
        if row.flags is None:
            return result | json.loads(run("train.py", "--eval", out, "--data", f"{DATA}:test"))
        start = time.time()
        run("sample.py", out, "--num", NUM_SAMPLES, "--seed", 1, "--out", file, *row.flags.split())
        result["samples_per_s"] = NUM_SAMPLES / (time.time() - start)
    else:
        real_images(file)
    result |= scores(file)
    file.unlink()
    return result


# ----------------------------------------------------------------------------- results
def key(result: dict) -> tuple:
    """(row, sampling, minutes, steps, seed): results with one key are of the same run."""
    steps = result.get("steps")
    minutes = result["minutes"] if steps else None  # nothing was trained
    return result["row"], result.get("sampling", ""), minutes, steps, result["seed"]


def read_results(folder: Path, table: str) -> dict[tuple, dict]:
    """The results in a folder's TABLE.jsonl, by their keys."""
    file = folder / f"{table}.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    with reading(file, "every line has to be a result that tables.py wrote"):
        return {key(result): result for result in map(json.loads, lines)}


def write_text(file: Path, text: str) -> None:
    write_file(file, lambda f: f.write(text.encode()))


def publish(table: str, yours: dict[tuple, dict]) -> None:
    """Puts your results, and the numbers of steps behind them, among the published ones."""
    results = read_results(PUBLISHED, table) | yours
    lines = "".join(json.dumps(result) + "\n" for result in results.values())
    write_text(PUBLISHED / f"{table}.jsonl", lines)
    write_text(PUBLISHED / "steps.json", json.dumps(read_steps(OWN) | read_steps(PUBLISHED)))


def run_rows(table: str, rows: list[Row], seeds: list[int], minutes: float) -> dict[tuple, dict]:
    """Runs what runs/tables/TABLE.jsonl lacks -> your results of all these rows."""
    wanted = {}
    for row in rows:
        if row.weights.startswith("--"):
            steps = steps_for(row.weights, minutes)
            wanted |= {(row.name, row.sampling, minutes, steps, seed): row for seed in seeds}
        else:
            wanted[row.name, row.sampling, None, None, 0] = row
    todo = [k for k in wanted if k not in read_results(OWN, table)]
    file = OWN / f"{table}.jsonl"
    if not todo:
        print(f"Nothing was trained: {file} has all of these results.", file=sys.stderr)
    failed = 0
    for i, k in enumerate(todo, 1):
        name, sampling, _, steps, seed = k
        print(f"{table} {i}/{len(todo)}: {name} {sampling}, seed {seed}", file=sys.stderr)
        try:
            result = result_of(wanted[k], seed, minutes, steps)
        except UserError as error:  # the other rows go on
            warn(f"{name} failed: {error}")
            failed += 1
            continue
        with file.open("a") as f:
            f.write(json.dumps(result) + "\n")
    if failed:
        raise UserError(f"{failed} of {len(todo)} results are missing: see above; rerun for them")
    have = read_results(OWN, table)
    return {k: have[k] for k in wanted}


# ----------------------------------------------------------------------------- printing
COLUMNS = {  # of a result: name and format in the table
    "seed": ("seeds", ""),
    "fd": ("FD in the classifier's features", ".2f"),
    "precision": ("precision", ".2f"),
    "recall": ("recall", ".2f"),
    "read_right": ("read right, %", ".1f"),
    "samples_per_s": ("samples/s", ".0f"),
    "nats_per_dim": ("nats/dim", ".3f"),
    "bits_per_dim": ("bits/dim", ".3f"),
    "parameters": ("parameters, M", ".2f"),
}


def markdown(table: str) -> str:
    """A line for each row, sampling, minutes and steps: the published value, then yours.

    Values are means over seeds, ± the largest distance of a seed from the mean.
    """
    published = read_results(PUBLISHED, table)
    yours = read_results(OWN, table)
    yours = {k: result for k, result in yours.items() if published.get(k) != result}
    sides = [published, yours] if yours else [published]
    everything = [*published.values(), *yours.values()]
    columns = [column for column in COLUMNS if any(column in result for result in everything)]
    names = [COLUMNS[column][0] for column in columns]
    table_rows = [["row", "sampling", "minutes", "steps", *names, "paper's FID"]]
    table_rows.append(["---"] * len(table_rows[0]))
    for row in TABLES[table]:
        place = (row.name, row.sampling)
        for line in dict.fromkeys(k[:4] for k in [*published, *yours] if k[:2] == place):
            cells = ["–" if value is None else str(value) for value in line]
            for column in columns:
                cells.append(" / ".join(cell(results, line, column) for results in sides))
            table_rows.append([*cells, str(PAPER.get(place, "–"))])
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in table_rows)
    networks = {r["features_sha256"][:12] for r in everything if "features_sha256" in r}
    text += f"\n\nClassifier: sha256 {', '.join(sorted(networks))}" if networks else ""
    return ("Published / yours:\n\n" if yours else "") + text


def cell(results: dict[tuple, dict], line: tuple, column: str) -> str:
    """What the table says of a column's values, one for each seed."""
    values = [result.get(column) for k, result in results.items() if k[:4] == line]
    if None in values or not values:
        return "–"
    if column == "seed":
        return ", ".join(map(str, values))
    form = COLUMNS[column][1]
    mean = statistics.mean(values)
    spread = max(abs(value - mean) for value in values)
    return f"{mean:{form}} ± {spread:{form}}" if spread else f"{mean:{form}}"


# ----------------------------------------------------------------------------- command line
def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="tables.py", description=__doc__)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--seeds", type=integers, default=[0], metavar="S1,S2",
                        help="of training (default: 0)")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="these rows only, by exact names")
    parser.add_argument("--minutes", type=at_least(float, 0.01),
                        help="of one core, for a training run (default: as published, or 5)")
    parser.add_argument("--print", action="store_true", help="print the table; train nothing")
    parser.add_argument("--publish", action="store_true",
                        help="put your results of these rows into results/TABLE.jsonl")
    args = parser.parse_args(argv)
    names = list(dict.fromkeys(row.name for row in TABLES[args.table]))
    args.rows = args.rows or names
    for name in args.rows:
        if name not in names:
            parser.error(f"--rows: got {name!r}, expected some of: {'; '.join(names)}")
    if args.minutes is None:
        minutes = [k[2] for k in read_results(PUBLISHED, args.table) if k[2]]
        args.minutes = statistics.mode(minutes or [5.0])
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not args.print:
        OWN.mkdir(parents=True, exist_ok=True)
        rows = [row for row in TABLES[args.table] if row.name in args.rows]
        yours = run_rows(args.table, rows, args.seeds, args.minutes)
        if args.publish:
            publish(args.table, yours)
    print(markdown(args.table))


if __name__ == "__main__":
    run_script(main)
