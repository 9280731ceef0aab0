"""What a run says of itself: lines on stdout and in log.jsonl, means between two of them, and the clock."""
import contextlib
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from support.cli import UserError, write_file
from support.distributed import max_over_processes, mean_over_processes

HEADLINES = ("loss", "nats_per_dim", "bits_per_dim", "val_nats_per_dim", "val_bits_per_dim", "val_standard_error",
             "images_per_s", "grad_norm", "lr", "sigma")  # first on stdout


class Log:
    """A line per report: everything in log.jsonl, what fits 100 columns on stdout.

    A resumed run first takes off the lines after its checkpoint.
    """

    def __init__(self, out: Path, start: int, steps: int, tensorboard: bool = False):
        self.path, self.steps = out / "log.jsonl", steps
        lines = self.path.read_text(errors="replace").splitlines() if start and self.path.exists() else []
        kept = [line + "\n" for line in lines if step_of(line) <= start]
        write_file(self.path, lambda f: f.write("".join(kept).encode()))
        self.board = summary_writer(out) if tensorboard else None

    def write(self, step: int, values: dict, note: str = "") -> None:
        """values: floats, ints, strings or None. NAME_min and NAME_max go to the file only."""
        with self.path.open("a") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")
        short = {name: v for name, v in values.items() if v is not None and not name.endswith(("_min", "_max"))}
        if "nats_per_dim" in short:
            short.pop("loss", None)  # the same number under its better name
        headlines = {name: short[name] for name in HEADLINES if name in short}
        short = headlines | short
        parts = [f"{name} {v:.4g}" if isinstance(v, float) else f"{name} {v}" for name, v in short.items()]
        line = f"step {step}/{self.steps}"
        while parts and len(line) + len(parts[0]) + len(note) <= 96:
            line += f"  {parts.pop(0)}"
        print(f"{line}  {note}".rstrip(), flush=True)
        for name, v in values.items() if self.board else ():
            if isinstance(v, (int, float)):
                self.board.add_scalar(name, v, step)


def step_of(line: str) -> float:
    """The step of a line of log.jsonl; infinity for a torn one."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def summary_writer(out: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise UserError("--tensorboard: not installed; pip install tensorboard, or leave the flag out") from e
    return SummaryWriter(str(out))


class Means:
    """Means, minima and maxima of named (B,) tensors over the steps between two reports, without a wait for the GPU."""

    def __init__(self):
        self.parts: dict[str, list[Tensor]] = {}

    def add(self, terms: dict[str, Tensor]) -> None:
        for name, values in terms.items():
            self.parts.setdefault(name, []).append(values.detach().float())

    def take(self) -> dict[str, float]:
        """Over all processes since the last call: every mean first, then NAME_min and NAME_max. All must call it."""
        names = list(self.parts)
        joined = [torch.cat(self.parts[name]) for name in names]
        self.parts = {}
        mean = mean_over_processes(torch.stack([v.mean() for v in joined]))
        low = -max_over_processes(torch.stack([-v.min() for v in joined]))
        high = max_over_processes(torch.stack([v.max() for v in joined]))
        result = dict(zip(names, mean.tolist(), strict=True))
        for name, a, b in zip(names, low.tolist(), high.tolist(), strict=True):
            result |= {f"{name}_min": a, f"{name}_max": b}
        return result


class Clock:
    """Seconds of training, pauses for saving and drawing left out."""

    def __init__(self, step: int):
        self.first = self.last = step
        self.began = self.reported = time.monotonic()
        self.pauses = self.pauses_reported = 0.0

    def seconds(self) -> float:
        return time.monotonic() - self.began

    @contextlib.contextmanager
    def paused(self):
        start = time.monotonic()
        yield
        self.pauses += time.monotonic() - start

    def report(self, step: int, steps: int) -> tuple[int, float, float]:
        """(steps, seconds of training) since the last report, and the seconds left, pauses included."""
        now = time.monotonic()
        done, seconds = step - self.last, now - self.reported - (self.pauses - self.pauses_reported)
        left = (now - self.began) / (step - self.first) * (steps - step)
        self.last, self.reported, self.pauses_reported = step, now, self.pauses
        return done, max(seconds, 1e-9), left
