"""The paper's tables in miniature, on Fashion-MNIST: trains the rows of a table, scores them, prints the table.

    python support/tables.py table3                        # every row, seed 0; goes on where it stopped
    python support/tables.py peers --seeds 0,1,2 --jobs 2  # two runs at a time, each pinned to a core of its own
    python support/tables.py table3 --print                # only the Markdown of what is in results/table3.jsonl

A row is a training run (or reuses one) and one or more ways to sample from it. It trains for the number of steps that
--minutes of one core hold; these are measured once, as processor time, and kept in results/steps.json, so that a row
that is run again is the same run. Each result is one JSON object, a line of results/TABLE.jsonl: row, seed, settings,
machine, times, scores of 2,000 samples against the test split. FD, precision and recall are in the features of a
classifier that is fitted on the training split without noise; it also reads the samples' labels.
"""
# ruff: noqa: E402  (the scripts' folder has to be found first)
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Queue

from support.cli import Parser, UserError, at_least, run_script, write_json

RESULTS, RUNS = REPOSITORY / "results", REPOSITORY / "runs" / "tables"
DATA, TEST = "fashion-mnist", "fashion-mnist:test"
SAMPLES = 2000


# ------------------------------------------------------------------------------------------ the tables
@dataclass(frozen=True)
class Row:
    """A training run, by its flags, or by the row or the checkpoint that it shares; and the ways to sample from it."""
    name: str
    train: str = ""
    checkpoint: str = ""
    same_as: str = ""
    samples: tuple[tuple[str, str], ...] = (("", ""),)  # (name, flags of sample.py)
    distill: str = ""  # a row whose student this is


PLAIN, GUIDED = ("w = 0", "--guidance 0"), ("w = 1", "--guidance 1")
EULER = tuple((f"{name}, 20 Euler steps", f"{flags} --steps 20") for name, flags in (PLAIN, GUIDED))
OURS, EXACT = "--preset fashion", "--inverse exact"
TABLES = {
    "table3": [
        Row("no split", f"{OURS} --informative-dim 16 --class-tokens 1 --no-final-flip", samples=(PLAIN,)),
        Row("+ split", f"{OURS} --class-tokens 1 --no-final-flip", samples=(PLAIN,)),
        Row("+ split + class tokens", f"{OURS} --no-final-flip", samples=(PLAIN,)),
        Row("+ split + final flip", f"{OURS} --class-tokens 1", samples=(PLAIN,)),
        Row("all", OURS, samples=(PLAIN,)),
        Row("all, N(0, I) for Z_R", f"{OURS} --redundant-prior gaussian", samples=(PLAIN, GUIDED)),
        Row("all + naive CFG", same_as="all", samples=(("w = 1", "--guidance 1 --guidance-method reject"),)),
        Row("all + resampling CFG", same_as="all", samples=(GUIDED,)),
    ],
    "flip": [  # table3's flip gains nothing: because the AR sees the row above in either order?
        Row("no look_above", f"{OURS} --no-look-above --no-final-flip", samples=(PLAIN, GUIDED)),
        Row("no look_above + final flip", f"{OURS} --no-look-above", samples=(PLAIN, GUIDED)),
    ],
    "table4": [
        Row("Jet", "--model baselines.jetformer --preset table4", samples=(GUIDED,)),
        Row("AF", OURS, samples=(GUIDED,)),
        Row("AF + one-step student", distill="AF", samples=(GUIDED,)),
    ],
    "fig6": [
        *(Row(f"K_I = {K}", f"{OURS} --informative-mixtures {K}", samples=(PLAIN, GUIDED)) for K in (1, 4, 32)),
        Row("K_I = 8, d_I = 8", OURS, samples=(PLAIN, GUIDED)),
        *(Row(f"d_I = {d}", f"{OURS} --informative-dim {d}", samples=(PLAIN, GUIDED)) for d in (2, 4, 12)),
    ],
    "guidance": [
        Row("assets/fashion.pt", checkpoint="assets/fashion.pt",
            samples=tuple((f"w = {w}", f"--guidance {w}") for w in (0, 0.5, 1, 1.5, 2, 3, 4))),
    ],
    "denoise": [
        Row("assets/fashion.pt", checkpoint="assets/fashion.pt", samples=(
            ("w = 0, off", f"{EXACT} --guidance 0 --denoise 0"), ("w = 0, on", f"{EXACT} --guidance 0 --denoise 0.03"),
            ("w = 1, off", f"{EXACT} --guidance 1 --denoise 0"), ("w = 1, on", f"{EXACT} --guidance 1 --denoise 0.03"),
        )),
    ],
    "pool": [
        Row("assets/fashion.pt", checkpoint="assets/fashion.pt", samples=(
            ("shared", f"{EXACT} --guidance 1 --redundant-pool shared"),
            ("per token", f"{EXACT} --guidance 1 --redundant-pool per_token"))),
    ],
    "student": [  # which assets/fashion.pt has
        Row("assets/fashion.pt", checkpoint="assets/fashion.pt",
            samples=tuple((f"{inverse}, denoise {sigma}", f"--guidance 1 --inverse {inverse} --denoise {sigma}")
                          for inverse in ("exact", "student") for sigma in (0, 0.03))),
    ],
    "precision": [
        Row("assets/fashion.pt", checkpoint="assets/fashion.pt",
            samples=tuple((p, f"{EXACT} --guidance 1 --precision {p}") for p in ("float32", "bfloat16"))),
    ],
    "peers": [
        Row("FARMER", OURS, samples=(PLAIN, GUIDED)),
        Row("TarFlow", "--model baselines.tarflow --preset fashion", samples=(PLAIN, GUIDED)),
        Row("JetFormer", "--model baselines.jetformer --preset fashion", samples=(PLAIN, GUIDED)),
        Row("SiT", "--model baselines.arflow --preset sit-fashion", samples=EULER),
        Row("ARFlow, S = 1", "--model baselines.arflow --preset arflow1-fashion", samples=EULER),
        Row("ARFlow, S = 5", "--model baselines.arflow --preset fashion", samples=EULER),
    ],
    "likelihood": [
        Row("FARMER", f"{OURS} --noise uniform", samples=()),
        # Muon at its preset's rate gets stuck here; gradients grow tenfold, which the guard would take for divergence
        Row("TarFlow", "--model baselines.tarflow --preset fashion --noise uniform "
            "--guard 0 --optimizer adamw --lr 3e-3", samples=()),
        Row("JetFormer", "--model baselines.jetformer --preset fashion --noise uniform", samples=()),
    ],
}


# ------------------------------------------------------------------------------------------ running commands
def run(command: list[str], core: int) -> tuple[str, float, float]:
    """Runs a script on one core with one thread -> (stdout, seconds, processor seconds).

    Raises UserError with the last line of its stderr when it fails.
    """
    pin = ["taskset", "-c", str(core)] if sys.platform == "linux" else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    start = time.time()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        command = [*pin, sys.executable, *command]
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            last = (err.read().strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{' '.join(command)} ended with {process.returncode}: {last}")
        return out.read(), time.time() - start, usage.ru_utime


def machine() -> str:
    """The processor and its fast formats, for the record."""
    flags = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text()
        name = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "")
        flags = f"{name}, " + " ".join(flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in text)
    return f"{platform.machine()} {flags}".strip()


def steps_for(row: Row, minutes: float, core: int) -> int:
    """Steps that `minutes` of one core hold, from results/steps.json, else from a probe that is then kept there."""
    file = RESULTS / "steps.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    key = f"{row.train} | {minutes:g} min"
    if key not in known:
        seconds = [probe(row, steps, core) for steps in (20, 80)]
        steps = max(100, round(60 * minutes * 60 / max(seconds[1] - seconds[0], 1e-3), -2))
        known = json.loads(file.read_text()) if file.exists() else {}
        known[key] = dict(steps=int(steps), machine=machine())
        write_json(file, known)
    return known[key]["steps"]


def probe(row: Row, steps: int, core: int) -> float:
    """Processor seconds of a run of that many steps that draws and measures nothing on the way."""
    out = RUNS / f"probe-{os.getpid()}-{core}"
    flags = ["--data", DATA, "--steps", str(steps), "--out", str(out), "--sample-every", "0", "--val-every", "0"]
    seconds = run(["train.py", *row.train.split(), *flags, "--workers", "0"], core)[2]
    shutil.rmtree(out)
    return seconds


# ------------------------------------------------------------------------------------------ scores
def classifier(core: int) -> str:
    """The small CNN of support/classifier.py, fitted once on the training split; without noise: an FD has to see it."""
    file = RUNS / "classifier.pt"
    if not file.exists():
        out, _, _ = run(["support/classifier.py", "fit", DATA, str(file), "--noise", "0"], core)
        print(out.strip(), flush=True)
    return str(file)


def scores(samples: str, core: int) -> dict:
    """FD, precision, recall of an .npz (or any data) against the test split, and the part that is read as its label."""
    report = run(["fid.py", samples, TEST, "--features", classifier(core), "--json", "--workers", "0"], core)[0]
    report = json.loads(report)
    result = dict(fd=report["fd"], precision=report["precision"], recall=report["recall"], images=report["num_samples"])
    if samples.endswith(".npz"):
        read = run(["support/classifier.py", "read", classifier(core), samples], core)[0]
        result["read_right"] = float(read.split(":")[1].split("%")[0])
    return result


# ------------------------------------------------------------------------------------------ one row
def trained(table: str, row: Row, seed: int, minutes: float, core: int) -> Path:
    """The run directory of a row, trained, resumed or found finished."""
    rows = {r.name: r for r in TABLES[table]}
    if row.checkpoint:
        return REPOSITORY / row.checkpoint
    if row.same_as:
        return trained(table, rows[row.same_as], seed, minutes, core)
    flags = ["--resume", "--sample-every", "0", "--workers", "0"]
    if row.distill:
        teacher = trained(table, rows[row.distill], seed, minutes, core)
        out = teacher.with_name(f"{teacher.name}-student")
        flags += ["--distill", str(teacher)]
    else:
        steps = steps_for(row, minutes, core)
        name = "_".join(f"{row.train} {steps} {seed}".replace("--", "").replace("/", "-").split())
        out = RUNS / name
        flags += [*row.train.split(), "--data", DATA, "--steps", str(steps), "--seed", str(seed)]
    done = out / "done.json"
    if not done.exists():
        printed, seconds, _ = run(["train.py", *flags, "--out", str(out)], core)
        write_json(done, dict(seconds=seconds, parameters=float(printed.split("M parameters")[0].split()[-1])))
    return out


def score_row(table: str, row: Row, seed: int, minutes: float, core: int) -> list[dict]:
    """The result objects of a row and seed: one for each way to sample, or one with the likelihood."""
    out = trained(table, row, seed, minutes, core)
    how = row.train or row.same_as or row.checkpoint or f"--distill {row.distill}"
    base = dict(row=row.name, seed=seed, train=how, minutes=minutes, machine=machine())
    if not row.checkpoint:
        last = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        base["steps"] = max((line["step"] for line in last), default=0)
        base |= {f"train_{name}": value for name, value in json.loads((out / "done.json").read_text()).items()}
    if not row.samples:
        report = json.loads(run(["train.py", "--eval", str(out), "--data", TEST], core)[0])
        return [base | {k: report[k] for k in ("nats_per_dim", "bits_per_dim", "bits_standard_error") if k in report}]
    results = []
    for name, flags in row.samples:
        file = RUNS / f"samples-{os.getpid()}-{core}.npz"
        _, seconds, _ = run(["sample.py", str(out), "--num", str(SAMPLES), "--seed", "1", "--out", str(file),
                             *flags.split()], core)
        made = base | dict(sampling=name, flags=flags, samples_per_s=SAMPLES / seconds)
        results.append(made | scores(str(file), core))
        file.unlink()
    return results


# ------------------------------------------------------------------------------------------ the table
def read_results(table: str) -> list[dict]:
    """The objects of results/TABLE.jsonl. Raises UserError for a line that is none of ours."""
    file = RESULTS / f"{table}.jsonl"
    results = []
    for number, line in enumerate(file.read_text().splitlines() if file.exists() else [], 1):
        try:
            result = json.loads(line)
            right = {"row", "seed", "minutes"} <= result.keys()
            right = right and all(isinstance(result.get(c) or 0, int | float) for c in COLUMNS)
        except (ValueError, AttributeError):
            right = False
        if not right:
            raise UserError(f"{file}:{number}: not a result of this script; remove that line")
        results.append(result)
    return results


COLUMNS = {"fd": ("FD", ".2f"), "precision": ("precision", ".2f"), "recall": ("recall", ".2f"),
           "read_right": ("read right, %", ".1f"), "samples_per_s": ("samples/s", ".0f"),
           "nats_per_dim": ("nats/dim", ".3f"), "bits_per_dim": ("bits/dim", ".3f"),
           "steps": ("steps", ".0f"), "train_parameters": ("parameters, M", ".2f")}


def markdown(table: str) -> str:
    """Means over seeds, ± the largest distance of a seed from the mean where there are several."""
    results = read_results(table)
    columns = [c for c in COLUMNS if any(c in r for r in results)]
    lines = ["| row | sampling | seeds | " + " | ".join(COLUMNS[c][0] for c in columns) + " |",
             "|" + "---|" * (3 + len(columns))]
    groups: dict[tuple, list[dict]] = {}
    for r in results:
        groups.setdefault((r["row"], r.get("sampling", "")), []).append(r)
    for (row, sampling), found in groups.items():
        cells = [row, sampling, ", ".join(str(r["seed"]) for r in found)]
        for c in columns:
            values = [r[c] for r in found if r.get(c) is not None]
            cells.append(cell(values, COLUMNS[c][1]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(values: list[float], form: str) -> str:
    if not values:
        return "–"
    mean = statistics.mean(values)
    spread = max(abs(v - mean) for v in values)
    return f"{mean:{form}}" + (f" ± {spread:{form}}" if spread else "")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="tables.py", description=__doc__)
    parser.add_argument("table", choices=[*TABLES, "floor"])
    parser.add_argument("--seeds", default="0", help="(default: 0)")
    parser.add_argument("--rows", help="only rows whose name has this text")
    parser.add_argument("--minutes", type=float, default=5.0, help="of one core, for a training run (default: 5)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on a core of its own (default: 1)")
    parser.add_argument("--first-core", type=int, default=0, help="number of the first of these cores (default: 0)")
    parser.add_argument("--print", action="store_true", help="print the table and stop")
    args = parser.parse_args(argv)
    at_least(args, minutes=0.01, jobs=1, first_core=0)
    try:
        seeds = [int(s) for s in args.seeds.split(",")]
    except ValueError:
        raise UserError(f"--seeds: got {args.seeds!r}, expected integers such as 0,1,2") from None
    RUNS.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(exist_ok=True)
    if args.table == "floor":
        print(json.dumps(floor(args.first_core)))
        return
    if not args.print:
        run_table(args, seeds)
    print(markdown(args.table))


def floor(core: int) -> dict:
    """The scores of 2,000 training images: what a perfect model could reach."""
    script = ("import numpy as np, sys; from support.data import open_images; d = open_images('fashion-mnist:train'); "
              "i = np.arange(2000) * 30; np.savez(sys.argv[1], images=d.array[i], labels=d.labels[i])")
    file = RUNS / "floor.npz"
    run(["-c", script, str(file)], core)
    return scores(str(file), core)


def run_table(args, seeds: list[int]) -> None:
    """Runs what is not in results/TABLE.jsonl yet; rows that share a training run after those that make one."""
    have = {(r["row"], r["seed"], r["minutes"]) for r in read_results(args.table)}
    rows = [row for row in TABLES[args.table] if not args.rows or args.rows in row.name]
    if not rows:
        names = ", ".join(row.name for row in TABLES[args.table])
        raise UserError(f"--rows: got {args.rows!r}, expected a part of one of: {names}")
    wanted = set(range(args.first_core, args.first_core + args.jobs))
    if sys.platform == "linux" and wanted - os.sched_getaffinity(0):
        raise UserError(f"--first-core, --jobs: cores {sorted(wanted)} are asked for, and this process may use "
                        f"{sorted(os.sched_getaffinity(0))}")
    classifier(args.first_core)  # before two jobs both want it
    failed: list[str] = []
    cores: Queue[int] = Queue()
    for job in range(args.jobs):
        cores.put(args.first_core + job)

    def work(row: Row, seed: int) -> None:
        core = cores.get()
        try:
            results = score_row(args.table, row, seed, args.minutes, core)
        except UserError as e:  # the other rows go on
            failed.append(f"{row.name}, seed {seed}: {e}")
            return
        finally:
            cores.put(core)
        with (RESULTS / f"{args.table}.jsonl").open("a") as file:
            file.writelines(json.dumps(r) + "\n" for r in results)
        print(f"{args.table}: {row.name}, seed {seed}: {results[-1]}", flush=True)

    for own_run in (True, False):  # then the rows that reuse a run, distil one, or train nothing
        todo = [(row, seed) for seed in seeds for row in rows if bool(row.train) == own_run]
        todo = [(row, seed) for row, seed in todo if (row.name, seed, args.minutes) not in have]
        with ThreadPoolExecutor(args.jobs) as pool:
            for future in [pool.submit(work, *item) for item in todo]:
                future.result()
    if failed:
        raise UserError(f"{len(failed)} rows failed, the rest is kept: {'; '.join(failed)}")


if __name__ == "__main__":
    run_script(main)
