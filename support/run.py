"""A run: the state that a checkpoint keeps, its directory, averaged weights, and the signals that end it."""
import contextlib
import dataclasses
import math
import os
import signal
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from support.checkpoint import from_weights, load, write_checkpoint
from support.cli import UserError, first_line, warn, write_file
from support.distributed import full_optimizer, full_weights, set_optimizer, set_weights
from support.log import Log
from support.sampling import evaluate, sample_grid

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None

FILES = ("ckpt.pt", "log.jsonl", "samples.png")


class Diverged(UserError):
    """The weights are not worth saving."""


# ------------------------------------------------------------------------------------------ what a checkpoint holds
@dataclass
class RunState:
    """What a checkpoint holds beside the model's file, config and weights: all that --resume needs, to the bit."""
    preset: str  # name in the model's PRESETS
    training: dict  # the settings: fields of train.py's Train
    distill: bool  # the weights trained are those of `model.distiller()`
    precision: str  # float32 or bfloat16, decided when the run began
    fingerprint: dict  # of the training data's content
    step: int = 0  # optimizer steps done: with the seed it fixes data order, noise and label drops
    skipped: int = 0  # of these, steps whose gradient norm was an outlier
    norms: list = field(default_factory=list)  # gradient norms of the last 100 steps that were taken
    optimizer: dict | None = None  # moments, under parameter names
    raw_weights: dict | None = None  # with averaging: as trained; the checkpoint's `weights` are the averages

    @classmethod
    def of(cls, path: str | Path, extra: dict) -> "RunState":
        """From a checkpoint's extra. Raises UserError for fields that are missing, unknown or of another type."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        missing = [n for n, f in known.items() if n not in extra and f.default is dataclasses.MISSING]
        missing = [n for n in missing if known[n].default_factory is dataclasses.MISSING]
        if missing:
            raise UserError(f"{path}: holds a model but no training run (no {', '.join(missing)}); "
                            "expected a checkpoint that train.py wrote")
        for name, value in extra.items():
            kinds = known[name].type if name in known else ()
            kinds = typing.get_args(kinds) if isinstance(kinds, types.UnionType) else kinds
            if not isinstance(value, kinds) or (kinds is int and isinstance(value, bool)):
                expected = known[name].type if name in known else "no such field"
                raise UserError(f"{path}: its field {name!r} is a {type(value).__name__}, expected "
                                f"{getattr(expected, '__name__', expected)}")
        state = cls(**extra)
        if not {"data", "noise", "noise_end", "holdout", "enlarge"} <= state.training.keys():
            raise UserError(f"{path}: its training settings are incomplete; use an older checkpoint")
        if state.step < 0 or not all(isinstance(n, float) for n in state.norms):
            raise UserError(f"{path}: step {state.step} or the gradient norms make no sense; use an older checkpoint")
        return state

    def to_dict(self) -> dict:
        """As plain values, no tensor copied."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def load_run(path: str | Path, device: torch.device) -> tuple[nn.Module, RunState]:
    """`checkpoint.load` for a file of train.py: the model and the state of its run."""
    model, extra = load(path, device)
    return model, RunState.of(path, extra)


# ------------------------------------------------------------------------------------------ the directory
class Run:
    """A run in its directory: saves model and state, keeps the lock, and says what to sample from. Files: FILES."""

    def __init__(self, out: Path, model: nn.Module, net: nn.Module, optimizers: list, average: "Average | None",
                 state: RunState, keep: int, rank: int):
        self.out, self.model, self.net, self.optimizers = out, model, net, optimizers
        self.average, self.state, self.keep, self.rank = average, state, keep, rank
        self.saved = state.step  # the step that ckpt.pt holds

    def weights(self, everywhere: bool = False) -> dict[str, Tensor]:
        """The weights worth keeping, averaged where that is on; complete on rank 0, or on every rank, on its device."""
        if self.average is None:
            return full_weights(self.model, everywhere)
        self.average.swap()
        weights = {name: w.clone() for name, w in full_weights(self.model, everywhere).items()}
        self.average.swap()
        return weights

    def save(self) -> None:
        """Writes ckpt.pt, and ckpt-STEP.pt where some are kept. All processes must call it."""
        state, weights = self.state, self.weights()
        state.optimizer = full_optimizer(self.net, self.optimizers)
        state.raw_weights = full_weights(self.model) if self.average else None
        if self.rank == 0:
            write_checkpoint(self.out / "ckpt.pt", self.model, weights, state.to_dict())
            if self.keep:
                self.keep_copy(weights)
        state.optimizer = state.raw_weights = None
        self.saved = state.step

    def keep_copy(self, weights: dict[str, Tensor]) -> None:
        """ckpt-STEP.pt beside ckpt.pt, and only the last `keep` of them."""
        copy = self.out / f"ckpt-{self.state.step}.pt"
        copy.unlink(missing_ok=True)
        try:
            os.link(self.out / "ckpt.pt", copy)  # the next save replaces ckpt.pt, not this one
        except OSError:  # a file system without hard links
            write_checkpoint(copy, self.model, weights, self.state.to_dict())
        numbered = [p for p in self.out.glob("ckpt-*.pt") if p.stem[5:].isdigit()]
        numbered.sort(key=lambda p: int(p.stem[5:]))
        for old in numbered[:-self.keep]:
            old.unlink()


@contextlib.contextmanager
def run_directory(out: Path, resume: bool):
    """Makes and locks a run's directory on rank 0; an empty one is taken away again when the start fails.

    Raises UserError when it cannot be written, another process trains in it, or it holds another run's files.
    """
    if int(os.environ.get("RANK", 0)):
        yield
        return
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "a")
    except OSError as e:
        raise UserError(f"{out}: cannot be written ({e.strerror}); pass another --out") from e
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        there = [name for name in FILES if (out / name).exists()]
        if not resume and there:
            how = "pass --resume to go on with it" if "ckpt.pt" in there else "there is no checkpoint: remove them"
            raise UserError(f"{out} already holds files of a run ({', '.join(there)}); {how}, or pass another --out")
        for name in FILES:
            for stale in out.glob(f"{name}.*.tmp"):  # of a save that was killed
                stale.unlink()
        yield
    except BlockingIOError:
        made = []
        raise UserError(f"{out}: another process is training there; wait for it, or pass another --out") from None
    finally:
        lock.close()
        if not any((out / name).exists() for name in FILES):
            (out / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                for folder in made:
                    folder.rmdir()


@contextlib.contextmanager
def saving_on_error(run: Run, world: int):
    """Data or disk that fail cost no step: what was trained is saved first. A diverged run is not."""
    try:
        yield
    except Diverged:
        raise
    except (UserError, OSError) as e:
        if world == 1 and run.state.step > run.saved:
            run.save()
        raise UserError(f"{e}; {run.out / 'ckpt.pt'} holds step {run.saved}: mend that and --resume") from e


def restore(state: RunState, model: nn.Module, net: nn.Module, optimizers: list, file: Path) -> None:
    """Puts a checkpoint's optimizer state back, and with averaging its raw weights, once both exist and are sharded."""
    try:
        if state.raw_weights is not None:
            set_weights(model, state.raw_weights)
        if state.optimizer is not None:
            if state.step and not (state.optimizer["state"] and state.optimizer["param_groups"]):
                raise ValueError("the moments are missing")
            set_optimizer(net, optimizers, state.optimizer)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise UserError(f"{file}: its optimizer state or raw weights do not fit the model "
                        f"({first_line(e)}); use an older checkpoint") from e
    state.raw_weights = state.optimizer = None


def look(run: Run, log: Log | None, split, train, module, draw: bool, validate: bool) -> None:
    """Redraws samples.png and measures held-out likelihood, with the weights that a checkpoint of now would hold.

    All processes share the work. The likelihood is of up to 500 held-out images, spread, with the final noise: it falls
    below the training loss of the annealed noise.
    """
    weights = run.weights(everywhere=True)
    kept = from_weights(module, dataclasses.asdict(run.model.config), weights).eval()
    kept.model_name = run.model.model_name
    indices = split.val_indices[::max(1, math.ceil(len(split.val_indices) / 500))]
    if validate and hasattr(kept, "log_prob") and len(indices) and not run.state.distill and train.noise != "none":
        values = evaluate(kept, split.val, indices, train.noise, train.noise_end)
        if log:
            values = {f"val_{name}": value for name, value in values.items()}
            log.write(run.state.step, values, "(with the last noise)")
    if draw:
        try:
            picture = sample_grid(kept, train.seed)
            if picture:
                write_file(run.out / "samples.png", lambda f: picture.save(f, "PNG"))
        except UserError as e:
            warn(f"samples.png not drawn at step {run.state.step}: {e}")


# ------------------------------------------------------------------------------------------ averaged weights
class Average:
    """Exponential moving average of the weights, decay min(decay, (1 + n) / (10 + n)) after n steps.

    The second term keeps a short run from being an average of its start. `swap` exchanges it with the model's weights.
    """

    def __init__(self, params: list[Tensor], decay: float):
        self.params, self.decay = params, decay
        self.values = [p.detach().clone() for p in params]

    @torch.no_grad()
    def update(self, n: int) -> None:
        decay = min(self.decay, (1 + n) / (10 + n))
        for value, p in zip(self.values, self.params, strict=True):
            value.lerp_(p, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        for value, p in zip(self.values, self.params, strict=True):
            trained = p.clone()
            p.copy_(value)
            value.copy_(trained)


# ------------------------------------------------------------------------------------------ signals
class StopSignals:
    """While it is entered, Ctrl-C, SIGTERM and SIGHUP only set `number`; a second one interrupts at once."""

    def __init__(self):
        self.number = 0
        self.handlers = {}

    def __enter__(self) -> "StopSignals":
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name):  # Windows has no SIGHUP
                number = getattr(signal, name)
                self.handlers[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def receive(self, number: int, _) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number
        with contextlib.suppress(OSError):  # after SIGHUP there may be no terminal to write to
            print(f"{signal.Signals(number).name}: saving after this step; once more to leave at once", file=sys.stderr)
