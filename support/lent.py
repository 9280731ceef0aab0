"""What `support/benchmark.py gpu` runs on a GPU that is lent for minutes, in order of worth.

Each part is a process of its own, so that what fails, the GPU's errors too, costs no other part.
"""
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn

from support.checkpoint import REPOSITORY
from support.cli import UserError
from support.data import digits
from support.measure import in_words
from support.start import first_preset

PAPER = {"prior": 50.0, "exact": 168.9, "student": 7.6, "forward": 6.6}  # ms per image (Table 4)
H100 = 989  # TFLOP/s in bf16 by its data sheet
BENCHMARK = "support/benchmark.py"


class Lent:
    """The machine until its time is over. Rows of the table collect what its parts print."""

    def __init__(self, device: str, minutes: float):
        self.device, self.end = device, time.monotonic() + 60 * minutes

    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self, part: str, script: str, *arguments, limit: float = 150) -> tuple[list[dict], list[dict]]:
        """Runs a script -> the lines of JSON that it printed, and rows of the table: one for each, or its last line."""
        start, limit = time.monotonic(), min(limit, self.left())
        if limit < 1:
            return [{}], [{"part": part, "result": "not run: the time is over"}]
        command = [sys.executable, REPOSITORY / script, *map(str, arguments), "--device", self.device]
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            try:
                code = subprocess.run(command, stdout=out, stderr=err, timeout=limit).returncode
                failure = f"FAILED with exit code {code}" if code else None
            except subprocess.TimeoutExpired:
                failure = f"FAILED: stopped after {limit:.0f} s"
            out.seek(0)
            err.seek(0)
            lines, errors = out.read().splitlines(), err.read().splitlines()
        values = [json.loads(line) for line in lines if line.startswith('{"')]
        results = [in_words(beside_the_paper(value)) for value in values]
        if failure:
            print(f"{part}: {failure}", *errors[-30:], sep="\n", file=sys.stderr, flush=True)
            results.append(f"{failure}: {' '.join(errors[-1:])}")
        elif not values:
            results = [" ".join(" ".join(lines).split()[-20:])]
        seconds = round(time.monotonic() - start)
        return values or [{}], [{"part": part, "result": result, "s": seconds} for result in results]


def beside_the_paper(row: dict) -> dict:
    return row | {"paper's ms/image": PAPER[row["stage"]]} if row.get("stage") in PAPER else row


def smoke(model: tuple[str, ...], config, folder: Path, compiled: str) -> list[list[tuple]]:
    """Each path of the scripts once. The commands of a wave run side by side and need the files of the wave before."""
    data, features = folder / "digits.npz", folder / "features.pt"
    drawn = digits(100, config.image_size, config.channels, seed=0)
    np.savez(data, images=drawn.array, labels=drawn.labels)
    torch.jit.script(nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())).save(features)
    run, other, student, exact, parallel = (folder / n for n in ("run", "other", "run-student", "exact.npz", "p.npz"))
    short = ("--sample-every", 0, "--steps", 2)
    new = ("train.py", *model, "--data", data, "--batch-size", 8, *short)
    return [
        [("train", *new, "--compile", "off", "--out", run),
         ("train, checkpointing", *new, "--compile", compiled, "--checkpointing", "--out", other)],
        [("resume", *new, "--steps", 4, "--compile", "off", "--resume", "--out", other),
         ("distill", "train.py", "--distill", run, *short, "--compile", "off"),
         ("likelihood", "train.py", "--eval", run),
         ("sample, exact", "sample.py", run, "-n", 20, "--inverse", "exact", "--out", exact),
         ("sample, parallel", "sample.py", run, "-n", 20, "--inverse", "parallel", "--out", parallel)],
        [("sample, student", "sample.py", student, "-n", 20, "--inverse", "student", "--out", folder / "student.png"),
         ("fid, exact and parallel", "fid.py", exact, parallel, "--features", features)],
    ]


def check_device(device: str) -> None:
    if device != "cpu" and not torch.cuda.is_available():
        raise UserError("gpu: this PyTorch sees no CUDA GPU; --device cpu --tiny runs the same lines on a CPU")


def lent_gpu(args, name: str, module: ModuleType) -> Iterator[dict]:
    """Rows of the table. This process itself takes no memory of the GPU's."""
    lent, tiny, first = Lent("cpu" if args.device == "cpu" else "cuda", args.minutes), args.tiny, first_preset(module)
    large, small = (first, first) if tiny else (args.preset, args.trained)
    model, compiled = ("--model", name, "--preset"), "off" if tiny else "on"
    with tempfile.TemporaryDirectory() as folder:
        # Every path.
        for wave in smoke((*model, first), module.PRESETS[first], Path(folder), compiled):
            with ThreadPoolExecutor() as pool:
                for _, rows in pool.map(lambda part: lent.run(*part), wave):
                    yield from rows

        # Sampling.
        stages = ("--only", "prior", "exact", "parallel", "student", "forward")
        sampling = (BENCHMARK, "sample", *model, large, "--json", "--repeats", 1 if tiny else 2, *stages)
        batches = (2, 1) if tiny else (64, 1, 16)
        yield from lent.run(f"sample {large}", *sampling, "--compile", "off", "--batch-sizes", *batches)[1]

        # A step of training: the largest batch, eager and compiled.
        step = (BENCHMARK, "train", "--json", "--repeats", 3, "--nominal", H100, *model)
        size = ("--batch-size", 2, "--largest", 4) if tiny else ("--batch-size", 8, "--largest", 512)
        values, rows = lent.run(f"train {large}, eager", *step, large, "--compile", "off", *size)
        yield from rows
        batch = values[-1].get("batch", 8)
        yield from lent.run(f"train {large}", *step, large, "--compile", compiled, "--batch-size", batch)[1]

        # A short run: as many steps as its time allows, so that the schedule ends with it.
        batch = module.TRAINING.get(small, {}).get("batch_size", 64)
        values, rows = lent.run(f"train {small}", *step, small, "--compile", compiled, "--batch-size", batch)
        yield from rows
        seconds = 2 if tiny else min(180, lent.left() - 60)
        steps = max(2, int(seconds * values[-1].get("images/s", 0) / batch))
        out = Path(folder, "trained")
        run = ("train.py", *model, small, "--steps", steps, "--compile", compiled, "--out", out)
        run += () if tiny else ("--data", args.data)
        yield from lent.run(f"{seconds:.0f} s of {small}", *run, "--sample-every", 0, "--val-every", 0, limit=400)[1]
        yield {"part": f"{small}, held out", "result": in_words(held_out(out / "log.jsonl"))}

        # Where time is left.
        yield from lent.run(f"sample {large}", *sampling, "--compile", compiled, "--batch-sizes", *batches[:1])[1]


def held_out(log: Path) -> dict:
    """The last likelihood in a run's log, and its speed."""
    lines = log.read_text().splitlines() if log.exists() else []
    names = ("val_bits_per_dim", "val_nats_per_dim", "val_standard_error", "images_per_s")
    values = {name: value for line in lines for name, value in json.loads(line).items() if name in names}
    return values or {"result": "none"}
