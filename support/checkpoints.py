"""A model is one Python file, a trained model one checkpoint, a run one folder.

A checkpoint is data: torch.load unpickles tensors and plain containers only, and the model's file
that it names must be a plain module of this repository, of the current folder, or beside the run.
It holds

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
VERSION = 3
REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_MODEL = "farmer"
SEAM = ("Config", "Sampling", "PRESETS", "TRAINING", "Model")  # what a model's file defines
RUN_FILES = ("ckpt.pt", "log.jsonl", "samples.png")


# ----------------------------------------------------------------------------- a model's file
def model_file(name: str, beside: Path | None = None) -> ModuleType:
    """The module of `--model NAME`: of the repository, the current folder, or the folder `beside`.

    Raises UserError where there is no such file or it lacks a part of SEAM. What the file itself
    raises stays as it is.
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
        raise UserError(f"--model {name}: there is no {files[0]} and no {files[1]}")
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(found[0]):
        return known
    for folder in folders:  # so that the file can import farmer and its own neighbours
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    spec = importlib.util.spec_from_file_location(name, found[0])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    missing = [part for part in SEAM if not hasattr(module, part)]
    if missing:
        raise UserError(f"--model {name}: {found[0]} does not define {', '.join(missing)}; "
                        f"a model's file defines {', '.join(SEAM)}")
    return module


def own_data(model: nn.Module):
    """`open_images` of a loaded model's file, for data formats of its own, or None."""
    return getattr(sys.modules[model.model_name], "open_images", None)


def first_preset(module: ModuleType) -> str:
    """The default preset of a model's file."""
    return next(iter(module.PRESETS))


def named_model(argv: list[str] | None) -> tuple[str, ModuleType]:
    """The model a command line is about, before its flags are known: (name, module).

    --model NAME, else the model of the first checkpoint in the line, else farmer.
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
        except UserError:  # another kind of .pt file; what opens it says what is wrong
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
    """A checkpoint, or a run's folder that holds ckpt.pt -> the file."""
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
    except (OSError, ValueError):  # too long for a name, or no name at all: some flag's value
        return False


def save(path: str | Path, model: nn.Module, **extra) -> None:
    """Writes model, config, weights and `extra` (tensors and plain containers) to one file.

    The file is complete or not there: when it cannot be written, an older one stays untouched.
    """
    write_checkpoint(path, model, model.state_dict(), extra)


def write_checkpoint(path: str | Path, model: nn.Module, weights: dict[str, Tensor],
                     extra: dict) -> None:
    """`save` with weights of one's choice, such as averages."""
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
    with reading(file, "use the code that wrote it, or a copy of it that is not damaged"):
        model = from_weights(module, content["config"], content["weights"])
    model.model_name = content["model"]
    return model.to(device).eval(), content["extra"]


def read_checkpoint(file: Path) -> dict:
    """The content of a checkpoint. Raises UserError for a file that is damaged or not ours."""
    with reading(file, "expected a checkpoint that train.py wrote"):
        with zipfile.ZipFile(file) as parts:
            damaged = parts.testzip()  # torch stores checksums but does not look at them
        if damaged:
            raise UserError(f"{file}: {damaged} in it is damaged; use another copy")
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if content["format"] != FORMAT:
            raise ValueError("another format")
        if content["version"] != VERSION:
            raise UserError(f"{file}: checkpoint version {content['version']}, expected {VERSION}; "
                            "use the code that wrote it, or train again")
        return content


def from_weights(module: ModuleType, config: dict, weights: dict[str, Tensor]) -> nn.Module:
    """A model that holds these tensors. Weights in half precision become float32."""
    config = dict(config)
    config["sampling"] = module.Sampling(**config["sampling"])
    with torch.device("meta"):  # no initialisation that would be overwritten
        model = module.Model(module.Config(**config))
    full = {}
    for name, weight in weights.items():
        half = weight.dtype in (torch.bfloat16, torch.float16)
        full[name] = weight.float() if half else weight.clone()  # no longer part of the file
    model.load_state_dict(full, assign=True)
    return model


# ----------------------------------------------------------------------------- runs
@dataclass
class RunState:
    """What a run's checkpoint holds beside the model: all that --resume needs, to the bit."""

    preset: str  # name in the model's PRESETS
    training: dict  # train.py's settings
    distill: bool  # the weights in training are those of `model.distiller()`
    precision: str  # float32 or bfloat16, decided when the run began
    classes: list | None = None  # names of the classes; None: numbers
    digest: str = ""  # which images these are, wherever they lie
    step: int = 0  # optimizer steps done; with the seed it fixes order, noise and label drops
    skipped: int = 0  # steps skipped because their gradient norm was an outlier
    outliers: int = 0  # of them, the last ones in a row
    norms: list = field(default_factory=list)  # gradient norms of the last 100 steps taken
    optimizer: list | None = None  # the state of each optimizer
    raw_weights: dict | None = None  # with averaging: as trained; `weights` are the averages


def load_run(path: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, RunState]:
    """`load` for a checkpoint of train.py: the model and the state of its run."""
    model, extra = load(path, device)
    try:
        return model, RunState(**extra)
    except TypeError:
        raise UserError(f"{path}: holds a model but no training run; expected a checkpoint that "
                        "train.py wrote") from None


class Diverged(UserError):
    """Training diverged: its weights are not worth saving."""


class Checkpoint:
    """ckpt.pt of a run in training: model, optimizers, averages and state, saved by rank 0."""

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
        """Puts the optimizers' state and, with averaging, the raw weights back."""
        state = self.state
        with reading(self.file, "use an older checkpoint"):
            if self.ema is not None and state.raw_weights is not None:
                self.model.load_state_dict(state.raw_weights)
            for optimizer, values in zip(self.optimizers, state.optimizer or [], strict=False):
                optimizer.load_state_dict(values)
        state.optimizer = None
        state.raw_weights = None

    def save(self) -> None:
        """Writes ckpt.pt, and ckpt-STEP.pt where some are kept."""
        if self.rank == 0:
            self.write()
        self.saved = self.state.step

    def write(self) -> None:
        """What rank 0 does to save."""
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
        """ckpt-STEP.pt beside ckpt.pt, and only the last `keep` of them."""
        copy = self.file.with_name(f"ckpt-{self.state.step}.pt")
        copy.unlink(missing_ok=True)
        os.link(self.file, copy)  # the next save replaces ckpt.pt, not this one
        numbered = [p for p in copy.parent.glob("ckpt-*.pt") if re.fullmatch(r"ckpt-\d+", p.stem)]
        numbered.sort(key=lambda p: int(p.stem[5:]))
        for old in numbered[:-self.keep]:
            old.unlink()

    @contextlib.contextmanager
    def saving_on_error(self) -> Iterator[None]:
        """When data or disk fail, what was trained is saved before the error is reported."""
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
    """Makes and locks a run's folder; takes an empty one away again when the start fails.

    Raises UserError when it cannot be written, another process trains in it, or it holds another
    run's files.
    """
    if int(os.environ.get("RANK", 0)):  # rank 0 does it
        yield
        return
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "a")
        if fcntl is not None:  # ends with this process, even where its workers live on for a while
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{out}: another process is training there; wait for it, or pass another "
                        "--out") from None
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); pass another --out"
                        ) from error
    try:
        there = [name for name in RUN_FILES if (out / name).exists()]
        if there and not resume:
            raise UserError(f"{out} already holds files of a run ({', '.join(there)}); pass "
                            "--resume to go on with it, or another --out")
        for stale in out.glob("*.tmp"):  # of a save that was killed
            stale.unlink()
        yield
    finally:
        lock.close()
        if not any((out / name).exists() for name in RUN_FILES):
            (out / ".lock").unlink()
            with contextlib.suppress(OSError):  # somebody else's files are in it
                for folder in made:
                    folder.rmdir()
