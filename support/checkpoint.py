"""A model is one Python file, a trained model one checkpoint: find the first, save and load the second.

A checkpoint is data: torch.load unpickles tensors and plain containers only, and the model's file that it names must
be a plain module of this repository or of the current folder. It holds

    format, version  what file this is               model    name of the model's file: farmer, baselines.tarflow, mine
    config           fields of its Config            weights  its state_dict
    extra            what the caller of `save` adds; train.py adds the fields of `support.run.RunState`
"""
import argparse
import contextlib
import dataclasses
import importlib.util
import re
import sys
import warnings
import zipfile
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from support.cli import UserError, check_memory, expanded, first_line, write_file

FORMAT, VERSION = "farmer-checkpoint", 2
REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_MODEL = "farmer"
NOT_MODELS = ("train", "sample", "fid", "support")
SEAM = ("Config", "Sampling", "PRESETS", "TRAINING", "Model")
CONFIG = ("image_size", "channels", "num_classes", "sampling")  # fields that every Config has


# ------------------------------------------------------------------------------------------ a model's file
def model_file(name: str) -> ModuleType:
    """The module of `--model NAME`, from this repository or the current folder: it defines all of SEAM.

    Raises UserError where there is no such file, or it fails, or lacks one of these.
    """
    parts = name.split(".") if isinstance(name, str) else []
    plain = bool(parts) and all(re.fullmatch(r"[A-Za-z_]\w*", part) for part in parts)
    if not plain or parts[0] in NOT_MODELS or parts[0] in sys.stdlib_module_names:
        raise UserError(f"--model: got {name!r}, expected the name of a model's file: farmer, baselines.tarflow, ...")
    tried = [folder.joinpath(*parts).with_suffix(".py") for folder in (REPOSITORY, Path.cwd())]
    file = next((f for f in tried if f.is_file()), None)
    if file is None:
        raise UserError(f"--model {name}: there is no {tried[0]} and no {tried[1]}")
    known = sys.modules.get(name)
    if known and Path(getattr(known, "__file__", None) or "").resolve() == file.resolve():
        return known
    module = import_file(name, file)
    missing = [part for part in SEAM if not hasattr(module, part)]
    if missing:
        raise UserError(f"--model {name}: {file} defines no {', '.join(missing)}; it needs {', '.join(SEAM)}")
    check_seam(module, f"--model {name}")
    return module


def check_seam(module: ModuleType, who: str) -> None:
    """Raises UserError where what a model's file defines is not what the scripts expect."""
    Config, Sampling, presets, training = module.Config, module.Sampling, module.PRESETS, module.TRAINING
    if not dataclasses.is_dataclass(Config) or not dataclasses.is_dataclass(Sampling):
        raise UserError(f"{who}: Config and Sampling must be dataclasses")
    missing = set(CONFIG) - {f.name for f in dataclasses.fields(Config)}
    if missing:
        raise UserError(f"{who}: Config has no field {', '.join(sorted(missing))}; it needs {', '.join(CONFIG)}")
    if not isinstance(presets, dict) or not presets or not all(isinstance(c, Config) for c in presets.values()):
        raise UserError(f"{who}: PRESETS must be a dict of names and Configs, the first being the default")
    if not isinstance(training, dict) or not training.keys() <= presets.keys():
        raise UserError(f"{who}: TRAINING must be a dict whose names are those of PRESETS ({', '.join(presets)})")


def import_file(name: str, file: Path) -> ModuleType:
    """Runs the file as module `name`; it may import farmer and its own neighbours."""
    for folder in (str(REPOSITORY), str(Path.cwd())):
        if folder not in sys.path:
            sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        del sys.modules[name]
        raise UserError(f"--model {name}: {file} fails ({type(e).__name__}: {first_line(e)})") from e
    return module


def named_model(argv: list[str] | None) -> tuple[str, ModuleType]:
    """The model that a command line is about, before its flags are known: (name, module).

    --model NAME, else what the first checkpoint in the line holds, else farmer.
    """
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--model")
    try:
        name = parser.parse_known_args(arguments)[0].model
    except argparse.ArgumentError as e:
        raise UserError(str(e)) from None
    for path in arguments if name is None else []:
        if is_checkpoint(path):
            # another kind of file, or a broken one: loading it will say so
            with contextlib.suppress(UserError), warnings.catch_warnings(action="ignore"):
                name = read_checkpoint(checkpoint_path(path), mmap=True)["model"]
                break
    name = DEFAULT_MODEL if name is None else name
    return name, model_file(name)


def build(name: str, config) -> nn.Module:
    """A new model, initialised from torch's global generator, after a look that training it fits into memory."""
    module = model_file(name)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in module.Model(config).parameters())
    check_memory(16 * parameters, f"training {parameters / 1e6:,.0f}M parameters (weights, gradients, two moments)")
    model = module.Model(config)
    model.model_name = name
    return model


# ------------------------------------------------------------------------------------------ checkpoints
def checkpoint_path(path: str | Path) -> Path:
    """A checkpoint file, or a run's directory that holds ckpt.pt -> the file. Raises UserError when there is none."""
    path = expanded(path)
    file = path / "ckpt.pt" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file}: no such checkpoint; expected a run's directory or a .pt file written by train.py")
    return file


def is_checkpoint(path: str) -> bool:
    """A run's directory, or a file that looks like a checkpoint by its name."""
    path = expanded(path)
    try:
        return (path / "ckpt.pt").is_file() or (path.suffix == ".pt" and path.is_file())
    except (OSError, ValueError):  # too long for a name, or no name at all: some flag's value
        return False


def save(path: str | Path, model: nn.Module, **extra) -> None:
    """Writes model, config, weights and `extra` (tensors and plain containers) to one file, atomically.

    Raises UserError when it cannot be written; the old file is then untouched.
    """
    write_checkpoint(path, model, model.state_dict(), extra)


def write_checkpoint(path: str | Path, model: nn.Module, weights: dict[str, Tensor], extra: dict) -> None:
    """`save` for weights that were gathered elsewhere (sharded training, averaged weights)."""
    name = getattr(model, "model_name", type(model).__module__)
    content = dict(format=FORMAT, version=VERSION, model=name, config=dataclasses.asdict(model.config), weights=weights,
                   extra=extra)

    def write(file):
        try:
            torch.save(content, file)
        except RuntimeError as e:  # how torch reports a full disk
            raise OSError(0, "writing failed, is the disk full?") from e
    try:
        write_file(path, write)
    except UserError as e:
        raise UserError(f"checkpoint not saved: {e}; an older one is untouched") from e


def load(path: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, dict]:
    """Reads a file or run directory written by `save` -> the model in eval mode on device, and extra.

    Raises UserError for a file that is missing, damaged, not ours, of another version, or whose weights do not fit.
    """
    file = checkpoint_path(path)
    check_sums(file)
    content = read_checkpoint(file, device)
    module = model_file(content["model"])
    try:
        model = from_weights(module, content["config"], content["weights"])
    except (KeyError, TypeError, RuntimeError, ValueError, AttributeError) as e:
        reason = " ".join(str(e).split())[:300]
        raise UserError(f"{file}: its weights do not fit its config ({reason})") from e
    model.model_name = content["model"]
    return model.eval(), content["extra"]


def read_checkpoint(file: Path, device: str | torch.device = "cpu", mmap: bool = False) -> dict:
    """The content of a checkpoint, its outer fields checked. mmap leaves the tensors on disk."""
    try:
        content = torch.load(file, map_location=device, weights_only=True, mmap=mmap)
    except Exception as e:  # truncation, foreign formats and refused pickles raise a dozen types
        raise UserError(f"{file}: not a readable checkpoint ({type(e).__name__}): truncated, not written by train.py, "
                        "or a pickle with code in it") from e
    written = {name: content.get(name) for name in ("format", "version")} if isinstance(content, dict) else {}
    if not isinstance(written.get("format"), str) or written["format"] != FORMAT:
        raise UserError(f"{file}: not a FARMER checkpoint; expected a file written by train.py")
    if not isinstance(written["version"], int) or written["version"] != VERSION:
        raise UserError(f"{file}: checkpoint version {written['version']}, expected {VERSION}; "
                        "use the code that wrote it, or train again")
    for name, kind in dict(model=str, config=dict, weights=dict, extra=dict).items():
        if not isinstance(content.get(name), kind):
            raise UserError(f"{file}: its {name} is a {type(content.get(name)).__name__}, expected a {kind.__name__}")
    return content


def check_sums(file: Path) -> None:
    """Compares each part of the file with its CRC-32, which torch.save stores and torch.load does not look at."""
    try:
        with zipfile.ZipFile(file) as parts:
            damaged = parts.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as e:
        raise UserError(f"{file}: not a readable checkpoint ({first_line(e)}): truncated, or not train.py's") from e
    if damaged:
        raise UserError(f"{file}: damaged: the checksum of {damaged} is wrong; use a copy or an older checkpoint")


def from_weights(module: ModuleType, config: dict, weights: dict[str, Tensor]) -> nn.Module:
    """A model that holds these very tensors (no copy, no initialisation). Weights in half precision become float32."""
    values = dict(config)
    values["sampling"] = module.Sampling(**values["sampling"])
    with torch.device("meta"):
        model = module.Model(module.Config(**values))
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"weight {name!r} is a {type(tensor).__name__}, expected a tensor under a name")
    halves = (torch.bfloat16, torch.float16)
    weights = {name: w.float() if w.dtype in halves else w for name, w in weights.items()}
    floats = {name for name, w in model.state_dict().items() if w.is_floating_point()}
    model.load_state_dict(weights, assign=True)
    kinds = {w.dtype for name, w in model.state_dict().items() if name in floats or w.is_floating_point()}
    if len(kinds) > 1 or not all(kind.is_floating_point for kind in kinds):
        raise TypeError(f"its weights are {', '.join(sorted(map(str, kinds)))}, expected one floating-point type")
    return model


