"""How a run of train.py begins: from a preset and flags, from a checkpoint, or as the student of a trained model.

`Train` is train.py's dataclass of settings, passed in, since nothing here imports a script.
"""
import argparse
import dataclasses
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn

from support.checkpoint import DEFAULT_MODEL, build, checkpoint_path
from support.cli import Parser, UserError, at_least, at_most, check_memory, expanded, given, warn
from support.crops import fingerprint_difference
from support.data import dequantize, image_generators
from support.distributed import pick_precision, rank_and_world, resumed_precision
from support.loader import Split, open_split
from support.run import RunState, load_run

WORTH_COMPILING = 2e14  # floating point operations of a run, about 25 minutes of one core
RESUMABLE = ("data", "steps", "seed")  # settings that --resume may change: moved data, a longer run, another stream


@dataclass
class Start:
    """What a run begins with."""
    out: Path
    config: object  # of the model
    train: object  # settings
    state: RunState
    model: nn.Module | None = None  # None: to be built


def add_run_flags(parser: Parser) -> None:
    """train.py's flags beside settings and model: other tasks, and what changes no result."""
    other = parser.add_argument_group("other tasks")
    other.add_argument("--eval", metavar="DIR_OR_CKPT", help="print the held-out likelihood of a trained model")
    other.add_argument("--distill", metavar="DIR_OR_CKPT", help="train the student of a trained model")
    other.add_argument("--dry-run", action="store_true", help="print settings, sizes and memory, and stop")
    how = parser.add_argument_group("how it runs (changes no result)")
    how.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    how.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
                     help="of matrix products in training; auto = bfloat16 where this machine is fast in it")
    how.add_argument("--compile", choices=("auto", "on", "off"), default="auto",
                     help="torch.compile; auto = on a GPU, and on a CPU for long runs in one process")
    how.add_argument("--workers", type=int, default=2, help="processes that decode images, per device (default: 2)")
    how.add_argument("--cache", metavar="DIR", help="store the cropped images there once, as one memory-mapped array")
    how.add_argument("--micro-batch", type=int, help="images per device and pass; gradients add up to batch_size")
    how.add_argument("--fsdp", action="store_true", help="shard weights and optimizer over the processes (FSDP2)")
    how.add_argument("--checkpointing", action="store_true", help="recompute activations instead of keeping them")
    how.add_argument("--log-every", type=int, default=50, metavar="STEPS", help="(default: 50)")
    how.add_argument("--save-every", type=int, default=500, metavar="STEPS", help="(default: 500)")
    how.add_argument("--sample-every", type=int, default=500, metavar="STEPS", help="redraw samples.png; 0: at the end")
    how.add_argument("--val-every", type=int, default=500, metavar="STEPS",
                     help="likelihood of up to 500 held-out images, with the final noise; 0: at the end")
    how.add_argument("--keep", type=int, default=0, metavar="N", help="keep the last N checkpoints as ckpt-STEP.pt too")
    how.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events (needs tensorboard)")


def check_run_flags(args: argparse.Namespace) -> None:
    at_most(args, workers=1000)
    at_least(args, log_every=1, save_every=1, micro_batch=1, sample_every=0, val_every=0, keep=0, workers=0)
    if (args.eval is not None) + (args.distill is not None) + args.dry_run > 1:
        raise UserError("--eval, --distill, --dry-run: got more than one, expected one")


def output_directory(args: argparse.Namespace, name: str, module: ModuleType) -> Path:
    """--out, else runs/PRESET (other models: runs/MODEL-PRESET), or the teacher's name and -student."""
    if args.out is not None:
        if not args.out:
            raise UserError("--out: got an empty name; expected a directory")
        return expanded(args.out)
    if args.distill is not None:
        teacher = checkpoint_path(args.distill).resolve()
        return Path(f"{teacher.parent if teacher.name == 'ckpt.pt' else teacher.with_suffix('')}-student")
    preset = args.preset or first_preset(module)
    return Path("runs", preset if name == DEFAULT_MODEL else f"{name.rpartition('.')[2]}-{preset}")


def first_preset(module: ModuleType) -> str:
    return next(iter(module.PRESETS))


def start_run(args: argparse.Namespace, name: str, module: ModuleType, Train: type, device: torch.device) -> Start:
    """Settings, and the model where there is one already. Raises UserError where flags contradict each other."""
    out = output_directory(args, name, module)
    if args.data == "":
        raise UserError("--data: got an empty name; expected digits, a folder, a file, ...")
    if args.resume and (out / "ckpt.pt").is_file():
        return resumed(args, module, Train, device, out)
    if args.resume and args.preset is None and args.data is None and args.distill is None:
        raise UserError(f"--resume: there is no checkpoint in {out}; check --out, or name a --preset or --data "
                        "to start anew")
    if args.resume:
        warn(f"{out} holds no ckpt.pt yet: starting at step 0")
    start = (fresh if args.distill is None else distilled)(args, module, Train, device, out)
    start.train = absolute_data(start.train)
    start.state.training = dataclasses.asdict(start.train)
    return start


def fresh(args: argparse.Namespace, module: ModuleType, Train: type, device: torch.device, out: Path) -> Start:
    """A new run: the preset's values under the flags'."""
    preset = args.preset or first_preset(module)
    config = dataclasses.replace(module.PRESETS[preset], **given(args, module.Config))
    train = dataclasses.replace(preset_settings(Train, module, preset), **given(args, Train))
    if getattr(config.sampling, "denoise", 0):  # it takes off the noise that training ends with
        sigma = train.noise_end if train.noise == "gaussian" else 0.0
        config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, denoise=sigma))
    state = RunState(preset, {}, False, pick_precision(args.precision, device), {})
    return Start(out, config, train, state)


def preset_settings(Train: type, module: ModuleType, preset: str):
    """train.py's settings of a preset: its defaults under those of the model's TRAINING."""
    try:
        return Train(**module.TRAINING.get(preset, {}))
    except TypeError as e:
        raise UserError(f"{module.__file__}: TRAINING of {preset} is not of train.py's settings ({e})") from None


def check_terms(terms: dict, images: int) -> None:
    """Raises UserError where a model's forward gives something else than a dict of (B,) tensors with a `loss`."""
    if not isinstance(terms, dict) or "loss" not in terms:
        raise UserError(f"the model's forward gave {type(terms).__name__}, expected a dict of tensors with a 'loss'")
    for name, value in terms.items():
        if not isinstance(value, torch.Tensor) or value.shape != (images,):
            got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise UserError(f"the model's forward gave {name} as {got}, expected ({images},): one number an image")


def distilled(args: argparse.Namespace, module: ModuleType, Train: type, device: torch.device, out: Path) -> Start:
    """A student's run: its teacher's settings, a fifth of the steps (the paper: 60 epochs of 320), its last noise."""
    model, teacher = load_run(args.distill, device)
    if not hasattr(model, "distiller"):
        raise UserError(f"--distill: {model.model_name} has no student; only a model with a distiller() has one")
    if given(args, module.Config):
        flags = ", ".join(given(args, module.Config))
        raise UserError(f"--distill: got {flags}, but a student has its teacher's config; leave the model flags out")
    if teacher.distill:
        raise UserError(f"--distill: {args.distill} has a student already; pass the run that it was distilled from")
    base = settings(Train, teacher.training, args.distill)
    base = dataclasses.replace(base, steps=max(1, base.steps // 5), noise_start=base.noise_end)
    train = dataclasses.replace(base, **given(args, Train))
    state = RunState(teacher.preset, {}, True, pick_precision(args.precision, device), {})
    return Start(out, model.config, train, state, model)


def resumed(args: argparse.Namespace, module: ModuleType, Train: type, device: torch.device, out: Path) -> Start:
    """The run in `out`. Its settings hold: a flag that differs is refused, but for those of RESUMABLE."""
    file = out / "ckpt.pt"
    model, state = load_run(out, device)
    train = settings(Train, state.training, file)
    have = {**dataclasses.asdict(model.config), **state.training, "preset": state.preset, "distill": state.distill}
    have["model"] = model.model_name
    asked = {**given(args, module.Config), **given(args, Train), "model": args.model}
    asked["preset"] = args.preset or state.preset
    asked["distill"] = args.distill is not None or state.distill
    for name, value in asked.items():
        if value != have[name] and name not in RESUMABLE:
            raise UserError(f"--resume: {name} is {have[name]} in {file}, but {value} was asked for; "
                            "leave the flag out, or start another --out")
    if asked.get("steps", state.step) < state.step:
        raise UserError(f"--steps: got {asked['steps']}, but {file} holds step {state.step}; ask for more")
    for name in ("steps", "seed"):
        if name in asked and asked[name] != have[name]:
            warn(f"{name} was {have[name]} and is {asked[name]} from step {state.step} on")
    state.precision = resumed_precision(args.precision, state.precision, device)
    changed = {name: asked[name] for name in RESUMABLE if name in asked}
    train = absolute_data(dataclasses.replace(train, **changed))
    state.training = dataclasses.asdict(train)
    return Start(out, model.config, train, state, model)


def settings(Train: type, values: dict, path: str | Path):
    """Train(**values) of a checkpoint. Raises UserError for those of another version, or that make no sense."""
    differ = values.keys() ^ {f.name for f in dataclasses.fields(Train)}
    if differ:
        names = ", ".join(sorted(map(str, differ)))
        raise UserError(f"{path}: settings of another version (they differ in {names}); use the code that wrote it")
    try:
        return Train(**values)
    except UserError as e:
        raise UserError(f"{path}: its settings make no sense ({e}); use an older checkpoint") from e


def absolute_data(train):
    """With the data's path made absolute, so that the run can be resumed from another folder."""
    path = expanded(train.data)
    return dataclasses.replace(train, data=str(path.resolve())) if path.exists() else train


# ------------------------------------------------------------------------------------------ data and model
def open_data(args: argparse.Namespace, start: Start) -> Split:
    """The data of a run, compared with what its checkpoint saw. A new model gets as many classes as the data has.

    Raises UserError where labels and num_classes disagree, or the data is not what the run began with.
    """
    train, config, state = start.train, start.config, start.state
    known = args.num_classes if start.model is None else config.num_classes
    split = open_split(train.data, config.image_size, config.channels, train.holdout, train.enlarge, args.cache,
                       args.workers, known)
    start.config = dataclasses.replace(config, num_classes=split.num_classes)
    difference = fingerprint_difference(state.fingerprint, split.fingerprint) if state.fingerprint else ""
    if difference:
        raise UserError(f"--resume: these are not the images that the run began with ({difference}); "
                        "name the right --data, or start another --out")
    state.fingerprint = split.fingerprint
    return split


def build_model(name: str, config, split: Split, train, sigma: float | None, device: torch.device) -> nn.Module:
    """A new model from (seed), its data-dependent start from up to 4,000 training images with the first noise."""
    torch.manual_seed(train.seed)
    model = build(name, config).to(device)
    if hasattr(model, "fit"):
        at = np.linspace(0, len(split.indices) - 1, min(len(split.indices), 4000)).astype(np.int64)
        images, _ = split.data.batch(split.indices, at)
        generators = image_generators(train.seed, at.tolist(), torch.device("cpu"))
        model.fit(dequantize(images, train.noise, sigma, generators).to(device))
    return model


def check_processes(args: argparse.Namespace, module: ModuleType, start: Start, world: int, micro_batch: int) -> None:
    """Raises UserError where a step's images do not divide into processes, passes and items, or do not fit."""
    train, config = start.train, start.config
    items = getattr(config, "images_per_item", 1)
    if args.fsdp and world == 1:
        raise UserError("--fsdp: needs several processes; start with torchrun --nproc_per_node=N train.py ...")
    if args.fsdp and train.optimizer == "muon":
        raise UserError("--fsdp: muon needs whole matrices, and here they are sharded; pass --optimizer adamw")
    if micro_batch < 1 or train.batch_size % (world * micro_batch):
        raise UserError(f"batch_size: got {train.batch_size}, expected a multiple of {world} processes x "
                        f"micro-batch {micro_batch}")
    if micro_batch % items:
        raise UserError(f"batch_size: got {micro_batch} images per pass, expected a multiple of the {items} of an item")
    with torch.device("meta"):
        model = module.Model(config)
    needed = config.channels * config.image_size**2 * 16
    if hasattr(model, "activations") and not args.checkpointing and not torch.cuda.is_available():
        needed += model.activations()
    check_memory(micro_batch * needed, f"a pass of {micro_batch} images (see --batch-size, --micro-batch)")


def compiles(args: argparse.Namespace, device: torch.device, net: nn.Module, train) -> bool:
    """--compile. auto: on a GPU; on a CPU where the whole run has arithmetic enough to win back a minute of compiling.

    That is a property of the run, not of this part of it: a run that is resumed goes on as it began, to the bit.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if args.compile == "on" and device.type == "cpu" and not compiler:
        raise UserError("--compile: got on, but there is no g++ here, which it needs on a CPU; leave it out")
    if args.compile != "auto" or device.type == "cuda":
        return args.compile != "off"
    arithmetic = 3 * net.flops() * train.batch_size * train.steps if hasattr(net, "flops") else 0
    alone = rank_and_world()[1] == 1 and not args.checkpointing  # which works layer by layer
    return arithmetic > WORTH_COMPILING and compiler is not None and alone


# ------------------------------------------------------------------------------------------ --dry-run
def dry_run(args: argparse.Namespace, module: ModuleType, start: Start) -> None:
    """Prints what a run would be: settings, parameters, memory, arithmetic, steps per epoch."""
    config, train = start.config, start.train
    try:
        split = open_data(args, start)
        config = start.config
        epochs = f"{len(split.indices) / train.batch_size:.1f} per epoch of {len(split.indices)} images"
    except UserError as e:
        epochs = f"per epoch unknown: {e}"
    with torch.device("meta"):
        model = module.Model(config)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    total = sum(p.numel() for p in model.parameters())
    micro_batch = args.micro_batch or train.batch_size
    json.dump({"config": dataclasses.asdict(config), "train": dataclasses.asdict(train)}, sys.stdout, indent=1)
    listed = "".join(f"{name} {n / 1e6:.1f}M, " for name, n in parts.items() if n)
    print(f"\nparameters: {listed}total {total / 1e6:.1f}M")
    print(f"memory, a rough estimate: weights and optimizer {16 * total / 2**30:.2f} GiB (less under --fsdp)", end="")
    if hasattr(model, "activations"):
        kept = model.activations() * micro_batch * (0.05 if args.checkpointing else 1) / 2**30
        print(f", activations {kept:.2f} GiB at {micro_batch} images per pass (--micro-batch lowers that)", end="")
    print()
    if hasattr(model, "flops"):
        print(f"arithmetic: {model.flops() / 1e9:.2f} GFLOP per image forward, three times that in training")
    print(f"steps: {train.steps}, {epochs}")
