"""Models, checkpoints and runs on disk.

A model is one Python file, a trained model one checkpoint, a run one folder. A checkpoint is data,
not code: torch.load reads only tensors and plain containers from it, and the model's file that it
names must be a module in this repository, in the current folder or beside the checkpoint. It holds

    format, version  what file this is         model    the model's file: farmer, baselines.tarflow
    config           fields of its Config      weights  its state_dict
    extra            what the caller of `save` adds; train.py adds the fields of RunState
"""
import argparse
import contextlib
import dataclasses
import importlib.util
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from support.cli import UserError, expanded, reading, write_file

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder are not noticed
    fcntl = None

FORMAT = "farmer-checkpoint"
VERSION = 4
REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_MODEL = "farmer"
SEAM = ("Config", "Sampling", "PRESETS", "TRAINING", "Model")  # what a model's file defines
RUN_FILES = ("ckpt.pt", "log.jsonl", "samples.png")


# ----------------------------------------------------------------------------- a model's file
def model_file(name: str, beside: Path | None = None) -> ModuleType:
    """Imports `--model NAME` from the repository, the current folder, or the folder `beside`.

    Raises UserError if there is no such file or it lacks a part of SEAM. Errors that the file
    itself raises are passed on.
    """
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        raise UserError(f"--model: got {name!r}, expected the name of a model's file, such as "
                        "farmer or baselines.tarflow")
    folders = [REPOSITORY, Path.cwd()]
    if beside is not None:
        folders.append(beside.resolve())
    files = [folder.joinpath(*parts).with_suffix(".py") for folder in folders]
    found = [file for file in files if file.is_file()]
    if not found:
        raise UserError(f"--model {name}: there is no {files[0]} and no {files[1]}; expected the "
                        "name of a model's file, such as farmer or baselines.tarflow")
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(found[0]):
        return known
    for folder in folders:  # so that the file can import farmer and its own neighbours
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    spec = importlib.util.spec_from_file_location(name, found[0])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module here
    spec.loader.exec_module(module)
    missing = [part for part in SEAM if not hasattr(module, part)]
    if missing:
        raise UserError(f"--model {name}: {found[0]} does not define {', '.join(missing)}; "
                        f"a model's file defines {', '.join(SEAM)}")
    return module


def own_data(model: nn.Module):
    """`open_images` of a loaded model's file, for its own data format, or None if it has none."""
    return getattr(sys.modules[model.model_name], "open_images", None)


def first_preset(module: ModuleType) -> str:
    """The default preset of a model's file."""
    return next(iter(module.PRESETS))


def named_preset(argv: list[str] | None, module: ModuleType) -> str:
    """The preset of a command line, found before its flags are known, else the default one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    preset = parser.parse_known_args(argv)[0].preset
    return preset if preset in module.PRESETS else first_preset(module)


def named_model(argv: list[str] | None) -> tuple[str, ModuleType]:
    """Which model a command line uses, found before its flags are known: (name, module).

    It is --model NAME, else the model of the first checkpoint on the line, else farmer.
    """
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--model")
    try:
        name = parser.parse_known_args(arguments)[0].model
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    if name is not None:
        return name, model_file(name)
    for argument in arguments:
        if not is_checkpoint(argument):
            continue
        file = checkpoint_path(argument)
        try:
            with warnings.catch_warnings(action="ignore"):
                name = read_checkpoint(file)["model"]
        except UserError:  # another kind of .pt file; the code that uses it reports errors
            continue
        return name, model_file(name, beside=file.parent)
    return DEFAULT_MODEL, model_file(DEFAULT_MODEL)


def build(name: str, config) -> nn.Module:
    """A new model, initialised from torch's global generator."""
    model = model_file(name).Model(config)
    model.model_name = name
    return model


# ----------------------------------------------------------------------------- checkpoints
def checkpoint_path(path: str | Path) -> Path:
    """The file of a checkpoint, given as that file or as the folder of its run."""
    path = expanded(path)
    file = path / "ckpt.pt" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file}: no such checkpoint; expected a run's folder or a .pt file "
                        "written by train.py")
    return file


def is_checkpoint(path: str) -> bool:
    """Whether this looks like a checkpoint: a run's folder or the name of a .pt file."""
    path = expanded(path)
    try:
        return (path / "ckpt.pt").is_file() or (path.suffix == ".pt" and path.is_file())
    except (OSError, ValueError):  # too long for a path, or not a path: the value of some flag
        return False


def save(path: str | Path, model: nn.Module, **extra) -> None:
    """Writes model, config, weights and `extra` (tensors and plain containers) to one file.

    The file is never half-written: if writing fails, an older one stays untouched.
    """
    write_checkpoint(path, model, model.state_dict(), extra)


def write_checkpoint(path: str | Path, model: nn.Module, weights: dict[str, Tensor],
                     extra: dict) -> None:
    """`save` with these weights instead of the model's, such as averages."""
    content = dict(
        format=FORMAT,
        version=VERSION,
        model=getattr(model, "model_name", type(model).__module__),
        config=dataclasses.asdict(model.config),
        weights=weights,
        extra=extra,
    )

    def write(file) -> None:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # how torch reports a full disk
            raise OSError(0, "writing failed, is the disk full?") from error

    write_file(path, write)


def load(path: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, dict]:
    """Reads what `save` wrote: the model in eval mode on the device, and extra."""
    file = checkpoint_path(path)
    content = read_checkpoint(file)
    module = model_file(content["model"], beside=file.parent)
    with reading(file, "use the code that wrote it, or an undamaged copy"):
        model = from_weights(module, content["config"], content["weights"])
    model.model_name = content["model"]
    return model.to(device).eval(), content["extra"]


def read_checkpoint(file: Path) -> dict:
    """Reads a checkpoint's content. Raises UserError if the file is damaged or not a checkpoint."""
    with reading(file, "expected a checkpoint that train.py wrote"):
        with zipfile.ZipFile(file) as parts:
            damaged = parts.testzip()  # torch stores checksums but does not look at them
        if damaged:
            raise UserError(f"{file}: its part {damaged} is damaged; use another copy")
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if content["format"] != FORMAT:
            raise ValueError("it has another format")
        if content["version"] != VERSION:
            raise UserError(f"{file}: checkpoint version {content['version']}, expected {VERSION}; "
                            "use the code that wrote it (for version 3: git checkout 6f2226f), or "
                            "train again")
        return content


def from_weights(module: ModuleType, config: dict, weights: dict[str, Tensor]) -> nn.Module:
    """A model with these weights. Those in half precision become float32."""
    config = dict(config)
    config["sampling"] = module.Sampling(**config["sampling"])
    model = module.Model(module.Config(**config))
    model.load_state_dict(weights)  # which makes float32 of half precision
    return model


# ----------------------------------------------------------------------------- runs
@dataclass
class RunState:
    """What a run's checkpoint holds besides the model, for --resume to be bit-identical."""

    preset: str  # name in the model's PRESETS
    training: dict  # train.py's settings
    distill: bool  # the weights in training are those of `model.distiller()`
    precision: str  # float32 or bfloat16, decided when the run began
    classes: list | None = None  # names of the classes; None: they are numbers
    digest: str = ""  # identifies the images, wherever they are stored
    step: int = 0  # optimizer steps done; with the seed it fixes order, noise and label drops
    skipped: int = 0  # steps skipped because their gradient norm was an outlier
    outliers: int = 0  # how many steps in a row have been skipped just now
    norms: list = field(default_factory=list)  # gradient norms of the last 100 steps taken
    optimizer: list | None = None  # the state of each optimizer
    raw_weights: dict | None = None  # with EMA: the trained weights; `weights` are the averages


def load_run(path: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, RunState]:
    """`load` for a checkpoint of train.py: the model and the state of its run."""
    model, extra = load(path, device)
    try:
        return model, RunState(**extra)
    except TypeError:
        raise UserError(f"{path}: holds a model but no training run; expected a checkpoint that "
                        "train.py wrote") from None


class Diverged(UserError):
    """Raised when training diverges: its weights are then not worth saving."""


class Checkpoint:
    """Saves a run in training to ckpt.pt, on rank 0: model, optimizers, averages and state."""

    def __init__(self, out: Path, model: nn.Module, optimizers: list, ema, state: RunState,
                 keep: int, rank: int):
        self.file = out / "ckpt.pt"
        self.model = model
        self.optimizers = optimizers
        self.ema = ema
        self.state = state
        self.keep = keep
        self.rank = rank
        self.saved = state.step  # the step that the file holds

    def restore(self) -> None:
        """Restores the optimizers' state and, with EMA, the trained weights."""
        state = self.state
        with reading(self.file, "use an older checkpoint"):
            if self.ema is not None and state.raw_weights is not None:
                self.model.load_state_dict(state.raw_weights)
            for optimizer, values in zip(self.optimizers, state.optimizer or [], strict=False):
                optimizer.load_state_dict(values)
        state.optimizer = None
        state.raw_weights = None

    def save(self) -> None:
        """Writes ckpt.pt and, with --keep, ckpt-STEP.pt."""
        if self.rank == 0:
            self.write()
        self.saved = self.state.step

    def write(self) -> None:
        """The part of `save` that only rank 0 does."""
        weights = self.model.state_dict()
        extra = dict(vars(self.state))
        extra["optimizer"] = [optimizer.state_dict() for optimizer in self.optimizers]
        if self.ema is not None:
            extra["raw_weights"] = weights
            weights = self.ema.weights(self.model)
        write_checkpoint(self.file, self.model, weights, extra)
        if self.keep:
            self.keep_copy()

    def keep_copy(self) -> None:
        """Keeps ckpt.pt as ckpt-STEP.pt too, and deletes all but the last `keep` of these."""
        copy = self.file.with_name(f"ckpt-{self.state.step}.pt")
        copy.unlink(missing_ok=True)
        os.link(self.file, copy)  # the next save replaces ckpt.pt, not this one
        numbered = [p for p in copy.parent.glob("ckpt-*.pt") if re.fullmatch(r"ckpt-\d+", p.stem)]
        numbered.sort(key=lambda p: int(p.stem[5:]))
        for old in numbered[:-self.keep]:
            old.unlink()

    @contextlib.contextmanager
    def saving_on_error(self) -> Iterator[None]:
        """Context that saves what was trained if data or disk fail, and then reports the error."""
        try:
            yield
        except Diverged:
            raise
        except (UserError, OSError) as error:
            if self.state.step > self.saved:
                with contextlib.suppress(UserError):  # the disk may be what failed
                    self.save()
            raise UserError(f"{error}; saved at step {self.saved}: fix the problem and rerun with "
                            "--resume") from error


@contextlib.contextmanager
def run_directory(out: Path, resume: bool) -> Iterator[None]:
    """Context that makes and locks a run's folder, and removes it if the run leaves no files.

    Raises UserError if the folder cannot be written to, another process is training in it, or it
    holds another run's files.
    """
    if int(os.environ.get("RANK", 0)):  # only rank 0 does this
        yield
        return
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "a")
        if fcntl is not None:  # released when this process ends, even if its workers live longer
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{out}: another process is training in it; wait for it, or pass another "
                        "--out") from None
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); pass another --out"
                        ) from error
    try:
        there = [name for name in RUN_FILES if (out / name).exists()]
        if there and not resume:
            raise UserError(f"{out} already holds files of a run ({', '.join(there)}); pass "
                            "--resume to continue it, or another --out")
        for stale in out.glob("*.tmp"):  # left by a save that was killed
            stale.unlink()
        yield
    finally:
        lock.close()
        if not any((out / name).exists() for name in RUN_FILES):
            (out / ".lock").unlink()
            with contextlib.suppress(OSError):  # a folder with other files in it stays
                for folder in made:
                    folder.rmdir()
