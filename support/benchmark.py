"""How fast a model is on this machine, whichever model it is.

    python support/benchmark.py sample runs/tiny                         ms per image of each stage of sampling
    python support/benchmark.py sample --preset cifar10 --against baselines.tarflow       beside another model's
    python support/benchmark.py train --preset cifar10 --precision bfloat16 --compile on  a step of training
    python support/benchmark.py gpu | tee table.md                       all of it on a GPU, in 8 minutes
    python support/benchmark.py gpu --device cpu --tiny                  every line of that on a CPU, in one

Without a checkpoint the weights are random: --model, --preset and the model's own flags, as in train.py. Matrices that
start as zeros are filled, since one parallel pass would invert a flow that is the identity, and a student is attached
where the model has one; still, `parallel` takes another number of passes than in a trained model.
Times are medians over rounds in each of which everything runs once, so that a busy machine is unfair to nobody.
"""
# ruff: noqa: E402, I001  (support.cli comes before torch: Ctrl-C during that import is then no traceback)
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from support.cli import Parser, UserError, add_fields, at_least, given, run_script

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn

from support.checkpoint import build, load, model_file, named_model
from support.data import dequantize, image_generators
from support.distributed import pick_device, pick_precision, prepare_layers, prepare_training
from support.lent import check_device, lent_gpu
from support.measure import in_words, machine, medians, peak_memory, product_peak, shown, timed
from support.optimize import optimizers
from support.sampling import default_labels
from support.start import first_preset

COLUMNS = {
    "sample": ("model", "batch", "stage", "ms/image", "images/s", "x first", "max off", "mean off", "x other"),
    "train": ("model", "precision", "compiled", "batch", "images/s", "ms/step", "TFLOP/s", "MFU", "of nominal", "GiB",
              "compile s", "x other"),
    "gpu": ("part", "result", "s"),
}


# ------------------------------------------------------------------------------------------ models
@dataclasses.dataclass
class Subject:
    """A model to be timed, and how the table calls it."""
    label: str
    model: nn.Module
    options: object  # its Sampling


def subjects(args, name: str, module: ModuleType, device: torch.device) -> list[Subject]:
    """The model that the command line names, and that of --against."""
    if args.checkpoint and (args.preset or given(args, module.Config)):
        raise UserError(f"{args.checkpoint} has a config already; leave --preset and the model's flags out")
    preset = args.preset or first_preset(module)
    torch.manual_seed(args.seed)
    if args.checkpoint:
        model, _ = load(args.checkpoint, device)
    else:
        config = dataclasses.replace(module.PRESETS[preset], **given(args, module.Config))
        model = random_model(name, config, device)
    options = model.config.sampling
    if args.command == "sample":
        options = dataclasses.replace(options, **given(args, module.Sampling))
    first = Subject(args.checkpoint or f"{name}:{preset}", model, options)
    return [first, opponent(args.against, first, device)] if args.against else [first]


def random_model(name: str, config, device: torch.device) -> nn.Module:
    """A model with random weights: 0.1 is the std of a filled matrix's outputs for inputs of unit variance."""
    with device:
        model = build(name, config)
        for p in model.parameters():
            if p.dim() > 1 and not p.any():
                nn.init.normal_(p, std=0.1 * p[0].numel() ** -0.5)
    return model


def opponent(against: str, first: Subject, device: torch.device) -> Subject:
    """MODEL: all numbers that its Config shares with the first model's are as there; MODEL:PRESET: those of the images.

    Guidance, which doubles the work, is as there too.
    """
    name, _, preset = against.partition(":")
    module, config = model_file(name), first.model.config
    if preset and preset not in module.PRESETS:
        raise UserError(f"--against: {name} has no preset {preset!r}; expected {', '.join(module.PRESETS)}")
    other = module.PRESETS[preset or first_preset(module)]
    same = [f.name for f in dataclasses.fields(other) if f.type is int and hasattr(config, f.name)]
    if preset:
        same = [field for field in same if field in ("image_size", "channels", "num_classes", "patch_size")]
    other = dataclasses.replace(other, **{field: getattr(config, field) for field in same})
    options = other.sampling
    if hasattr(options, "guidance") and hasattr(first.options, "guidance"):
        options = dataclasses.replace(options, guidance=first.options.guidance)
    label = f"{against} (again)" if against == first.label else against
    return Subject(label, random_model(name, other, device), options)


# ------------------------------------------------------------------------------------------ sample
@torch.no_grad()
def sample(args, made: list[Subject], device: torch.device) -> Iterator[dict]:
    """Rows of the table: `whole` is model.sample, the others are its stages, at each batch size.

    x first: as many times as fast as the first stage that gives images; max off, mean off: how far from its images.
    x other: as many times as fast as the same stage of the other model.
    """
    for subject in made:
        if not args.checkpoint and hasattr(subject.model, "distiller"):
            with contextlib.suppress(ValueError):  # this one has no student
                subject.model.distiller()
        prepare_layers(subject.model.eval(), args.compiling, checkpointing=False)
    for batch in args.batch_sizes:
        yield from sample_batch(args, made, batch, device)


def sample_batch(args, made: list[Subject], batch: int, device: torch.device) -> Iterator[dict]:
    work = {}
    for subject in made:
        stages = stages_of(subject, batch, args.seed, device)
        work |= {(subject.label, stage): call for stage, call in stages.items()}
    names = list(dict.fromkeys(stage for _, stage in work))
    for stage in args.only or ():
        if stage not in names:
            raise UserError(f"--only: got {stage!r}, expected some of {', '.join(names)}")
    work = {key: call for key, call in work.items() if key[1] in (args.only or names)}
    results = {key: call() for key, call in work.items()}  # this warms up, too
    seconds, first = medians(work, args.repeats, device), {}
    for (label, stage), t in seconds.items():
        row = {"model": label, "batch": batch, "stage": stage, "ms/image": 1000 * t / batch, "images/s": batch / t}
        images = results[label, stage]
        if stage != "whole" and isinstance(images, Tensor) and images.dim() == 4:
            exact, t_exact = first.setdefault(label, (images, t))
            off = (images - exact).abs()
            row |= {"x first": t_exact / t, "max off": off.max().item(), "mean off": off.mean().item()}
        if label != made[0].label and (made[0].label, stage) in seconds:
            row["x other"] = seconds[made[0].label, stage] / t
        yield row


def stages_of(subject: Subject, batch: int, seed: int, device: torch.device) -> dict[str, Callable]:
    """whole, and what model.stages gives."""
    model, options = subject.model, subject.options
    labels = default_labels(batch, model.config.num_classes).to(device)
    generators = image_generators(seed, range(batch), device)
    stages = model.stages(labels, options, generators) if hasattr(model, "stages") else {}
    return {"whole": partial(model.sample, labels, options, generators), **stages}


# ------------------------------------------------------------------------------------------ train
def train(args, made: list[Subject], device: torch.device) -> Iterator[dict]:
    """Rows of the table. MFU counts three forwards in a step, since a backward costs two.

    GiB: weights, gradients, optimizer state and activations at their peak; on a CPU of the first model alone, since
    freed memory stays with the process.
    """
    precision = pick_precision(args.precision, device)
    peak, work, rows = product_peak(device, precision), {}, {}
    for subject in made:
        label, model = subject.label, subject.model
        prepare_training(model, model, args.compiling, checkpointing=False)
        batch = largest_batch(args, model, precision, device)
        weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
        before = peak_memory(device, reset=True)
        step = work[label] = training_step(model, precision, batch, device, args.optimizer)
        start = timed(step, device)
        step()  # the first that has the optimizer's state from its start
        memory = weights + peak_memory(device) - before if device.type == "cuda" or not rows else None
        rows[label] = {"model": label, "precision": precision, "compiled": args.compiling, "batch": batch,
                       "GiB": memory, "compile s": start}
    for subject, seconds in zip(made, medians(work, args.repeats, device).values(), strict=True):
        row = rows[subject.label]
        row |= {"images/s": row["batch"] / seconds, "ms/step": 1000 * seconds}
        row["compile s"] = row["compile s"] - seconds if args.compiling else None
        if hasattr(subject.model, "flops"):
            speed = 3 * subject.model.flops() * row["images/s"]
            row |= {"TFLOP/s": speed / 1e12, "MFU": speed / peak}
            row["of nominal"] = speed / 1e12 / args.nominal if args.nominal else None
        if subject is not made[0]:
            row["x other"] = row["images/s"] / rows[made[0].label]["images/s"]
        yield row


def training_step(model: nn.Module, precision: str, batch: int, device: torch.device,
                  optimizer: str) -> Callable[[], None]:
    """A step of train.py, the reading of data aside: noise, forward, backward, clip, step."""
    c = model.config
    images = torch.randint(256, (batch, c.channels, c.image_size, c.image_size), dtype=torch.uint8, device=device)
    labels = default_labels(batch, c.num_classes).to(device)
    params = [p for p in model.parameters() if p.requires_grad]
    opts = optimizers(model, optimizer, lr=1e-5, weight_decay=0.03)

    def step() -> None:
        x = dequantize(images, "gaussian", 0.1, image_generators(0, range(batch), device))
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            model(x, labels, image_generators(1, range(batch), device))["loss"].mean().backward()
        float(nn.utils.clip_grad_norm_(params, 1.0))
        for opt in opts:
            opt.step()
            opt.zero_grad()
    return step


def largest_batch(args, model: nn.Module, precision: str, device: torch.device) -> int:
    """--batch-size, doubled up to --largest for as long as two steps fit into the GPU's memory."""
    batch = args.batch_size
    while 2 * batch <= args.largest:
        try:
            step = training_step(model, precision, 2 * batch, device, args.optimizer)
            step()
            step()  # now with the optimizer's state
        except torch.OutOfMemoryError:
            break
        batch *= 2
    model.zero_grad()
    return batch


# ------------------------------------------------------------------------------------------ command line
def parse(argv: list[str] | None, name: str, module: ModuleType):
    parser = Parser(prog="benchmark.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    sampling = commands.add_parser("sample", help="ms per image of each stage of sampling")
    training = commands.add_parser("train", help="a step of training")
    lent = commands.add_parser("gpu", help="everything, on a GPU lent for minutes")
    for p in (sampling, training):
        p.add_argument("checkpoint", nargs="?", metavar="DIR_OR_CKPT", help="a trained model (default: random weights)")
        p.add_argument("--preset", choices=module.PRESETS, help=f"(default: {first_preset(module)})")
        p.add_argument("--against", metavar="MODEL[:PRESET]", help="time another model of equal shape beside it")
        p.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="auto = on a GPU")
        p.add_argument("--repeats", type=int, default=5, help="rounds, of which the median counts (default: 5)")
        p.add_argument("--seed", type=int, default=0, help="of weights and samples (default: 0)")
        p.add_argument("--json", action="store_true", help="a line of JSON for each row instead of a table")
        add_fields(p.add_argument_group("model"), module.Config)
    sampling.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16, 64], help="(default: 1 16 64)")
    sampling.add_argument("--only", nargs="+", metavar="STAGE", help="time these stages (default: all)")
    add_fields(sampling.add_argument_group("how it samples (default: as its config says)"), module.Sampling)
    training.add_argument("--batch-size", type=int, default=32, help="images per step (default: 32)")
    training.add_argument("--largest", type=int, default=0, help="double the batch size up to this while memory lasts")
    training.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="as in train.py")
    training.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="(default: adamw)")
    training.add_argument("--nominal", type=float, metavar="TFLOP/S", help="the data sheet's peak, for another MFU")
    lent.add_argument("--preset", default="farmer-1.1b-p16", help="timed with random weights (default: %(default)s)")
    lent.add_argument("--trained", default="cifar10", metavar="PRESET", help="trained for 3 minutes (default: cifar10)")
    lent.add_argument("--data", default="cifar10", help="to train that on, as in train.py (default: cifar10)")
    lent.add_argument("--minutes", type=float, default=8, help="(default: 8)")
    lent.add_argument("--tiny", action="store_true", help="the first preset in place of both, on its own data")
    for p in (sampling, training, lent):
        p.add_argument("--model", default=name, metavar="NAME", help="the model's file (default: farmer)")
        p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    if args.command != "gpu":
        at_least(args, repeats=1, seed=0)
        if min(args.batch_sizes if args.command == "sample" else [args.batch_size]) < 1:
            raise UserError("--batch-size, --batch-sizes: expected at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    name, module = named_model(argv)
    args = parse(argv, name, module)
    if args.command == "gpu":
        check_device(args.device)
        rows, as_json = lent_gpu(args, name, module), False
    else:
        device, as_json = pick_device(args.device), args.json
        args.compiling = args.compile == "on" or (args.compile == "auto" and device.type == "cuda")
        made, head = subjects(args, name, module, device), machine(device)
        print(json.dumps(head) if as_json else f"{in_words(head)}\n", flush=True)
        rows = {"sample": sample, "train": train}[args.command](args, made, device)
    columns = COLUMNS[args.command]
    if not as_json:
        print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
    for row in rows:
        cells = " | ".join(shown(row.get(column)) for column in columns)
        print(json.dumps(row) if as_json else f"| {cells} |", flush=True)


if __name__ == "__main__":
    run_script(main)
