"""Models, checkpoints and runs on disk.

A model is one Python file, a trained model one checkpoint, a run one folder. A checkpoint is data,
not code: torch.load reads only tensors and plain containers from it, and the model's file that it
names must be a module in this repository, in the current folder or beside the checkpoint. It holds

    format, version  what file this is         model    the model's file: farmer, baselines.tarflow
    config           fields of its Config      weights  its state_dict
    floats           whether its images are arrays of floats, such as latents, instead of pixels
    extra            what the caller of `save` adds; train.py adds the fields of its Run
"""
import contextlib
import dataclasses
import importlib.util
import sys
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from support.cli import UNFINISHED, UserError, expanded, reading, write_file

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder are not noticed
    fcntl = None

FORMAT = "farmer-checkpoint"
VERSION = 4
REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_MODEL = "farmer"
SEAM = ("Config", "Sampling", "PRESETS", "TRAINING", "Model")  # what a model's file defines
RUN_FILES = ("ckpt.pt", "log.jsonl", "data.png", "samples.png")


# ----------------------------------------------------------------------------- a model's file
def model_file(name: str, beside: Path | None = None) -> ModuleType:
    """Imports `--model NAME` from the repository, the current folder, or the folder `beside`.

    Raises UserError if there is no such file or it lacks a part of SEAM. Errors that the file
    itself raises are passed on.
    """
    parts = name.removesuffix(".py").split(".")
    folders = [REPOSITORY, Path.cwd()]
    if beside is not None:
        folders.append(beside.resolve())
    files = [folder.joinpath(*parts).with_suffix(".py") for folder in dict.fromkeys(folders)]
    found = [file for file in files if file.is_file()]
    if not found or not all(part.isidentifier() for part in parts):
        raise UserError(f"--model: got {name!r}, but there is no {' and no '.join(map(str, files))}"
                        "; expected the name of a model's file, such as farmer or "
                        "baselines.tarflow")
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


def build(name: str, config) -> nn.Module:
    """A new model, initialised from torch's global generator."""
    model = model_file(name).Model(config)
    model.model_name = name
    return model


def own_data(model: nn.Module):
    """`open_images` of a loaded model's file, for its own data format, or None if it has none."""
    return getattr(sys.modules[model.model_name], "open_images", None)


def first_preset(module: ModuleType) -> str:
    """The default preset of a model's file."""
    return next(iter(module.PRESETS))


# ----------------------------------------------------------------------------- checkpoints
@dataclass
class Saved:
    """What a checkpoint holds, see above, with the module of its model's file."""

    file: Path
    module: ModuleType
    config: dict
    weights: dict[str, Tensor]
    floats: bool
    extra: dict


def save(path: str | Path, model: nn.Module, **extra) -> None:
    """Writes model, config, weights and `extra` (tensors and plain containers) to one file.

    The file is never half-written: if writing fails, an older one stays untouched.
    """
    content = dict(
        format=FORMAT,
        version=VERSION,
        model=getattr(model, "model_name", type(model).__module__),
        config=dataclasses.asdict(model.config),
        weights=model.state_dict(),
        floats=getattr(model, "floats", False),
        extra=extra,
    )

    def write(file) -> None:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # how torch reports a full disk
            raise OSError(0, "writing failed, is the disk full?") from error

    write_file(path, write)


def read(path: str | Path) -> Saved:
    """Reads a run's folder or a .pt file that `save` wrote. Its tensors stay on disk until used.

    Raises UserError if there is no such file, or it is damaged or not a checkpoint.
    """
    file = checkpoint_path(path)
    with reading(file, "expected a checkpoint that train.py wrote"):
        with zipfile.ZipFile(file) as parts:
            damaged = parts.testzip()  # torch stores checksums but does not look at them
            compressed = any(part.compress_type for part in parts.infolist())  # cannot be mapped
        if damaged:
            raise UserError(f"{file}: its part {damaged} is damaged; use another copy")
        with warnings.catch_warnings(action="ignore"):  # of files that torch.jit wrote
            content = torch.load(file, map_location="cpu", weights_only=True,
                                 mmap=not compressed)
        if content["format"] != FORMAT:
            raise ValueError("it has another format")
        version = content["version"]
        if version != VERSION:
            raise UserError(f"{file}: checkpoint version {version}, expected {VERSION}; use the "
                            "code that wrote it (commit 6f2226f reads version 3), or train again")
        name = str(content["model"])
        parts = [content["config"], content["weights"], content.get("floats", False)]
        parts.append(content["extra"])
    return Saved(file, model_file(name, beside=file.parent), *parts)


def load(path: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, dict]:
    """Reads what `save` wrote: the model in eval mode on the device, and extra."""
    saved = read(path)
    return restore(saved, device), saved.extra


def restore(saved: Saved, device: str | torch.device = "cpu") -> nn.Module:
    """The model of a checkpoint, in eval mode on the device.

    It is built as a new one is, so what its constructor makes beside the weights is there too.
    """
    with reading(saved.file, "use the code that wrote it, or an undamaged copy"):
        sampling = saved.module.Sampling(**saved.config["sampling"])
        config = saved.module.Config(**saved.config | {"sampling": sampling})
        with torch.random.fork_rng(devices=[]):  # loading changes no random number of the caller
            model = saved.module.Model(config)
        model.load_state_dict(saved.weights)
    model.model_name = saved.module.__name__
    model.floats = saved.floats
    return model.to(device).eval()


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


def first_checkpoint(arguments: Iterable[str]) -> Saved | None:
    """The first checkpoint on a command line; its model decides which flags there are."""
    for argument in arguments:
        if is_checkpoint(argument):
            with contextlib.suppress(UserError):  # another kind of .pt file
                return read(argument)
    return None


# ----------------------------------------------------------------------------- a run's folder
def check_folder(out: Path, resuming: bool) -> None:
    """Raises UserError if a new run would meet the files of another one that made a step."""
    there = [name for name in RUN_FILES if (out / name).exists()]
    log = out / "log.jsonl"
    failed = log.exists() and not log.stat().st_size  # before its first step
    if there and not resuming and not failed:
        raise UserError(f"{out} already holds files of a run ({', '.join(there)}); pass "
                        "--resume to continue it, or another --out")


def lock_folder(out: Path, resuming: bool):
    """Makes a run's folder and locks it until the file that this returns is closed.

    Raises UserError if the folder cannot be written to, another process is training in it, or it
    holds another run's files.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "a")
        if fcntl is not None:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{out}: another process is training in it; wait for it, or pass another "
                        "--out") from None
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); pass another --out"
                        ) from error
    check_folder(out, resuming)
    for name in RUN_FILES:
        for stale in out.glob(UNFINISHED.format(name=name)):  # left by a save that was killed
            stale.unlink()
    return lock
