"""The paper's tables in miniature, on Fashion-MNIST: trains the rows of a table and scores them.

    python results/tables.py table3                      # every row, seed 0
    python results/tables.py peers --seeds 0,1,2         # with the spread over three seeds
    python results/tables.py table4 --rows "AF" "Jet"    # these rows alone
    python results/tables.py table3 --print              # the published table; trains nothing

A row is one training run, sampled from in one or more ways. Its number of steps is fixed: as many
as five minutes of one core held when they were measured. Scores are of 2,000 samples against the
test split; FD, precision and recall are in the features of a small classifier, which also reads the
labels.

Your results go to runs/tables/TABLE.jsonl, one line each, and are printed below the published ones
of results/TABLE.jsonl. A stopped command goes on where it stopped. To publish, append your lines to
the published ones: of two lines for the same run the later one counts. Everything runs with one
thread: for two cores start two commands, say with different --seeds.
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
import statistics
import subprocess
import tempfile
from dataclasses import dataclass

import numpy as np

from support.checkpoints import load
from support.cli import Parser, UserError, run_script, write_file
from support.data import open_images

PUBLISHED = REPOSITORY / "results"
OWN = REPOSITORY / "runs" / "tables"
CLASSIFIER = "assets/fashion-classifier.pt"
DATA = "fashion-mnist"
NUM_SAMPLES = 2000
SAMPLING_SEEDS = [1, 2, 3, 4, 5]  # of finished weights; a trained row is sampled with seed 1
QUIET = ["--sample-every", "0", "--val-every", "0"]


# ----------------------------------------------------------------------------- the tables
@dataclass(frozen=True)
class Row:
    """One training run, and a line of the table for each way of sampling from it."""

    name: str
    weights: str  # flags of train.py, or a checkpoint; empty for real images
    ways: dict[str, str]  # what the table says of the sampling: the flags of sample.py
    steps: int | None = None  # of training; None for a checkpoint
    student: bool = False  # distil the trained model first
    turned: bool = False  # train on images turned by 180 degrees, and turn the samples back


def guidance(*weights: float, more: str = "") -> dict[str, str]:
    """Ways of sampling with these guidance weights w; `more` are further flags of sample.py."""
    return {f"w = {w}": f"--guidance {w} {more}".strip() for w in weights}


FINISHED = "assets/fashion.pt"
MIXED = "assets/fashion-mixing.pt"
FASHION = "--preset fashion"
MIXING = "--model examples.channel_mixing --preset fashion"
# The paper's settings in miniature. The rows that vary one of them start here, not at our presets.
PAPER_SETTINGS = "--informative-mixtures 8 --redundant-mixtures 1 --final-flip --noise-end 0.03"
AS_PAPER = f"{FASHION} {PAPER_SETTINGS}"
MIXING_AS_PAPER = f"{MIXING} {PAPER_SETTINGS}"
JET = f"--model baselines.jetformer --preset table4 {PAPER_SETTINGS}"
TARFLOW = "--model baselines.tarflow --preset fashion"
JETFORMER = "--model baselines.jetformer --preset fashion"
ARFLOW = "--model baselines.arflow --preset"
NAIVE = "--guidance-method naive"
NO_MAP = "--no-whiten --redundant-mixtures 64"
UNIFORM = "--noise uniform"
LIKELIHOOD = {"": "--eval"}  # instead of flags of sample.py: the likelihood of the test split
DENOISED = "--denoise 0.03"  # the noise that training ended with in the rows as in the paper
W_0 = guidance(0, more=DENOISED)
W_1 = guidance(1, more=DENOISED)
BOTH = guidance(0, 1, more=DENOISED)
EULER = guidance(0, 1, 1.5, more="--steps 20")
STUDENT = {
    f"{inverse}, denoise {sigma}": f"--inverse {inverse} --guidance 1 --denoise {sigma}"
    for inverse in ("exact", "student") for sigma in ("0", "0.06")
}
REAL = Row("real images", "", {"": ""})

TABLES: dict[str, list[Row]] = {
    "table3": [
        Row("no split", f"{AS_PAPER} --informative-dim 16 --class-tokens 1 --no-final-flip", W_0,
            1000),
        Row("+ split", f"{AS_PAPER} --class-tokens 1 --no-final-flip", W_0, 1000),
        Row("+ split + class tokens", f"{AS_PAPER} --no-final-flip", W_0, 1000),
        Row("+ split + final flip", f"{AS_PAPER} --class-tokens 1", W_0, 1000),
        Row("all", AS_PAPER, W_0, 1000),
        Row("all, N(0, I) for Z_R", f"{AS_PAPER} --redundant-mixtures 0", BOTH, 1000),
        Row("all, K_R = 64", f"{AS_PAPER} --redundant-mixtures 64", BOTH, 900),
        Row("all + naive CFG", AS_PAPER, guidance(1, more=f"{NAIVE} {DENOISED}"), 1000),
        Row("all + resampling CFG", AS_PAPER, W_1, 1000),
        REAL,
    ],
    "table4": [
        Row("Jet, no map, K_R = 64", f"{JET} {NO_MAP}", W_1, 900),
        Row("AF, no map, K_R = 64", f"{AS_PAPER} {NO_MAP}", W_1, 900),
        Row("AF + student, no map, K_R = 64", f"{AS_PAPER} {NO_MAP}", W_1, 900, student=True),
        Row("Jet", JET, W_1, 900),
        Row("AF", AS_PAPER, W_1, 1000),
        Row("AF, 8 blocks x 1 layer", f"{AS_PAPER} --flow-blocks 8 --flow-layers 1", W_1, 800),
        Row("AF + 1 coupling", f"{MIXING_AS_PAPER} --flow-layers 2 --couplings 1", W_1, 700),
        Row("AF + 2 couplings", f"{MIXING_AS_PAPER} --flow-layers 2 --couplings 2", W_1, 700),
        REAL,
    ],
    "flip": [
        Row("final flip", AS_PAPER, BOTH, 1000),
        Row("no final flip", f"{AS_PAPER} --no-final-flip", BOTH, 1000),
        # On turned images, the last block and the AR both read the tokens in the other order.
        Row("final flip, turned images", AS_PAPER, BOTH, 1000, turned=True),
        Row("no final flip, turned images", f"{AS_PAPER} --no-final-flip", BOTH, 1000, turned=True),
        REAL,
    ],
    "fig6": [
        Row("K_I = 1", f"{AS_PAPER} --informative-mixtures 1", BOTH, 1000),
        Row("K_I = 4", f"{AS_PAPER} --informative-mixtures 4", BOTH, 1000),
        Row("K_I = 8, d_I = 8", AS_PAPER, BOTH, 1000),
        Row("K_I = 32", f"{AS_PAPER} --informative-mixtures 32", BOTH, 1000),
        Row("d_I = 2", f"{AS_PAPER} --informative-dim 2", BOTH, 1000),
        Row("d_I = 4", f"{AS_PAPER} --informative-dim 4", BOTH, 1000),
        Row("d_I = 12", f"{AS_PAPER} --informative-dim 12", BOTH, 1000),
        REAL,
    ],
    "guidance": [
        Row("finished preset, resampling", FINISHED, guidance(0, 0.5, 0.75, 1, 1.5, 2)),
        Row("finished preset, naive", FINISHED, guidance(0.5, 0.75, 1, 1.5, 2, more=NAIVE)),
        Row("finished channel mixing, resampling", MIXED, guidance(0, 0.5, 0.75, 1, 1.5, 2)),
        Row("young model, resampling", AS_PAPER,
            guidance(0, 0.5, 0.75, 1, 1.5, 2, more=DENOISED), 1000),
        Row("young model, naive", AS_PAPER,
            guidance(0.5, 0.75, 1, 1.5, 2, more=f"{NAIVE} {DENOISED}"), 1000),
        REAL,
    ],
    "denoise": [
        Row(FINISHED, FINISHED, {
            "w = 0, off": "--inverse exact --guidance 0 --denoise 0",
            "w = 0, on": "--inverse exact --guidance 0 --denoise 0.06",
            "w = 1, off": "--inverse exact --guidance 1 --denoise 0",
            "w = 1, on": "--inverse exact --guidance 1 --denoise 0.06",
        }),
        REAL,
    ],
    "student": [Row(FINISHED, FINISHED, STUDENT), Row(MIXED, MIXED, STUDENT), REAL],
    "peers": [
        Row("FARMER", FASHION, guidance(0, 1, 1.5), 1000),
        Row("FARMER, the paper's settings", AS_PAPER, BOTH, 1000),
        Row("FARMER + channel mixing", MIXING, guidance(0, 1), 1000),
        Row("channel mixing, the paper's settings", MIXING_AS_PAPER, BOTH, 1000),
        Row("TarFlow", TARFLOW, guidance(0, 1), 900),
        Row("JetFormer", JETFORMER, guidance(0, 1), 500),
        Row("SiT", f"{ARFLOW} sit-fashion", EULER, 1500),
        Row("ARFlow, S = 1", f"{ARFLOW} arflow1-fashion", EULER, 1100),
        Row("ARFlow, S = 5", f"{ARFLOW} fashion", EULER, 900),
        REAL,
    ],
    "likelihood": [
        Row("FARMER", f"{AS_PAPER} {UNIFORM}", LIKELIHOOD, 1000),
        Row("FARMER + channel mixing", f"{MIXING_AS_PAPER} {UNIFORM}", LIKELIHOOD, 1000),
        # With Muon TarFlow gets stuck under this noise, and the guard skips its growing gradients.
        Row("TarFlow", f"{TARFLOW} {UNIFORM} --guard 0 --optimizer adamw --lr 3e-3", LIKELIHOOD,
            900),
        Row("JetFormer", f"{JETFORMER} {UNIFORM}", LIKELIHOOD, 500),
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


def trained(row: Row, seed: int) -> Path:
    """The run of a row, trained, resumed or found finished; or the checkpoint that it names."""
    if row.steps is None:
        return REPOSITORY / row.weights
    name = "_".join(f"{row.weights} {row.steps} {seed}".replace("--", "").split())
    out = OWN / (f"{name}_turned" if row.turned else name)
    data = turned_images() if row.turned else DATA
    run("train.py", *row.weights.split(), "--data", data, "--steps", row.steps, "--seed", seed,
        "--out", out, *QUIET, "--resume", show=True)
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
        images, _ = open_images(f"{DATA}:train")
        write_file(file, lambda f: np.savez(f, images=turn(images.array), labels=images.labels))
    return file


# ----------------------------------------------------------------------------- results
def result_of(row: Row, sampling: str, seed: int) -> dict:
    """Trains a row, unless that is done, and scores it -> a line of TABLE.jsonl."""
    flags = row.ways[sampling]
    result = dict(row=row.name, sampling=sampling, seed=seed, steps=row.steps,
                  weights=row.weights, flags=flags)
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/samples.npz"
        if row.weights:
            out = trained(row, seed)
            result["parameters"] = sum(p.numel() for p in load(out)[0].parameters()) / 1e6
            if flags == "--eval":
                test = f"{DATA}:test"
                return result | json.loads(run("train.py", "--eval", out, "--data", test))
            drawn = 1 if row.steps else seed
            run("sample.py", out, "--num", NUM_SAMPLES, "--seed", drawn, "--out", file,
                *flags.split())
            if row.turned:
                images, _ = open_images(file)
                np.savez(file, images=turn(images.array), labels=images.labels)
        else:  # training images, spread over the set: what a perfect model would reach
            images, _ = open_images(f"{DATA}:train")
            some = np.linspace(0, len(images) - 1, NUM_SAMPLES).astype(np.int64)
            np.savez(file, images=images.array[some], labels=images.labels[some])
        return result | scores(file)


def scores(samples: str) -> dict:
    """FD, precision and recall against the test split, and the part read as its label."""
    report = run("fid.py", samples, f"{DATA}:test", "--features", CLASSIFIER, "--json")
    read = run("results/classifier.py", "read", CLASSIFIER, samples)
    return json.loads(report) | {"read_right": float(re.search(r"([0-9.]+)%", read)[1])}


def read_results(folder: Path, table: str) -> dict[tuple, dict]:
    """The results in a folder's TABLE.jsonl by (row, sampling, steps, seed): what makes a run."""
    file = folder / f"{table}.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    results = [json.loads(line) for line in lines]
    return {(r["row"], r["sampling"], r["steps"], r["seed"]): r for r in results}


def run_rows(table: str, rows: list[Row], seeds: list[int]) -> None:
    """Runs what runs/tables/TABLE.jsonl lacks."""
    OWN.mkdir(parents=True, exist_ok=True)
    file = OWN / f"{table}.jsonl"
    done = read_results(OWN, table)
    todo = []
    for row in rows:
        for seed in seeds if row.steps else SAMPLING_SEEDS if row.weights else [0]:
            todo += [(row, way, seed) for way in row.ways
                     if (row.name, way, row.steps, seed) not in done]
    if not todo:
        print(f"Nothing was trained: {file} has all of these results.", file=sys.stderr)
    for i, (row, way, seed) in enumerate(todo, 1):
        print(f"{table} {i}/{len(todo)}: {row.name} {way}, seed {seed}", file=sys.stderr)
        result = result_of(row, way, seed)
        with file.open("a") as f:
            f.write(json.dumps(result) + "\n")


# ----------------------------------------------------------------------------- printing
COLUMNS = {  # of the table: the field of a result, and its format
    "FD": ("fd", ".2f"),
    "precision": ("precision", ".2f"),
    "recall": ("recall", ".2f"),
    "read right, %": ("read_right", ".1f"),
    "nats/dim": ("nats_per_dim", ".3f"),
    "bits/dim": ("bits_per_dim", ".3f"),
    "parameters, M": ("parameters", ".2f"),
}


def markdown(folder: Path, table: str) -> str:
    """The table of a folder's results: a line for each row, sampling and number of steps.

    A column without a value is left out.
    """
    groups = {}  # (row, sampling, steps) -> the results of all seeds
    for key, result in read_results(folder, table).items():
        groups.setdefault(key[:3], []).append(result)
    lines = []
    for place in [(row.name, way) for row in TABLES[table] for way in row.ways]:
        for (*found, steps), results in groups.items():
            if tuple(found) == place:
                seeds = ", ".join(str(result["seed"]) for result in results) if steps else None
                cells = {"row": place[0], "sampling": place[1], "steps": steps, "seeds": seeds}
                cells |= {name: mean(results, *column) for name, column in COLUMNS.items()}
                lines.append(cells | {"paper's FID": PAPER.get(place)})
    names = [name for name in lines[0] if any(line[name] for line in lines)] if lines else []
    rows = [[str(line[name] or "–") for name in names] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in [names, ["---"] * len(names), *rows])


def mean(results: list[dict], field: str, form: str) -> str | None:
    """The mean of a field over seeds ± the largest distance from it; None where one lacks it."""
    values = [result.get(field) for result in results]
    if None in values:
        return None
    middle = statistics.mean(values)
    spread = max(abs(value - middle) for value in values)
    return f"{middle:{form}} ± {spread:{form}}" if spread else f"{middle:{form}}"


# ----------------------------------------------------------------------------- command line
def integers(text: str) -> list[int]:
    """0,1,2 -> [0, 1, 2]."""
    return [int(part) for part in text.split(",")]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; its `rows` are those of the table."""
    parser = Parser(prog="tables.py", description=__doc__)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--seeds", type=integers, default=[0], metavar="S1,S2",
                        help="of training (default: 0); finished weights are sampled with five")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="these rows only, by exact names")
    parser.add_argument("--print", action="store_true", help="print the published table alone")
    args = parser.parse_args(argv)
    rows = {row.name: row for row in TABLES[args.table]}
    unknown = [name for name in args.rows or [] if name not in rows]
    if unknown:
        parser.error(f"--rows: got {unknown[0]!r}, expected some of: {'; '.join(rows)}")
    args.rows = [rows[name] for name in args.rows or rows]
    return args


def main(argv: list[str] | None = None) -> None:
    """Runs the rows and prints the published table and yours."""
    args = parse(argv)
    if not args.print:
        run_rows(args.table, args.rows, args.seeds)
    print(markdown(PUBLISHED, args.table))
    if not args.print:
        print(f"\nYours:\n\n{markdown(OWN, args.table)}")


if __name__ == "__main__":
    run_script(main)
