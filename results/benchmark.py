"""How fast a model is on this machine, whichever model it is.

    python results/benchmark.py sample --preset fashion --against baselines.tarflow
    python results/benchmark.py train --preset cifar10 --precision bfloat16
    python results/benchmark.py sizes --model baselines.jetformer
    python results/benchmark.py gpu | tee table.md          # 8 minutes of a GPU
    python results/benchmark.py gpu --device cpu --tiny     # all of it, on a CPU

--model, --preset and the model's own flags are those of train.py; the weights
are random, which changes no time. Times are medians over rounds in each of which
everything runs once, so that a busy machine is unfair to nobody. FLOPs count
matrix products, those of attention among them.
"""
# ruff: noqa: E402  (the repository's folder has to be found first)
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import contextlib
import dataclasses
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from support.batches import dequantize, image_generators
from support.checkpoints import build, first_preset, model_file, named_model, named_preset
from support.cli import Parser, UserError, add_fields, at_least, given, run_script
from support.distributed import pick_device, pick_precision, training_precision
from support.sampling import default_labels
from support.training import optimizers, prepare_layers

MINUTES = 8  # of a GPU


# ----------------------------------------------------------------------------- models
def new_models(args, name: str, module: ModuleType) -> dict[str, nn.Module]:
    """The model that the command line describes, and the one of --against, by their names."""
    config = dataclasses.replace(module.PRESETS[args.preset], **given(args, module.Config))
    models = {f"{name}:{args.preset}": new_model(args, name, config)}
    if args.against:
        name, _, preset = args.against.partition(":")
        models[args.against] = new_model(args, name, equal_config(name, preset, config))
    return models


def new_model(args, name: str, config) -> nn.Module:
    """A model with random weights, ready to be timed; for sampling also with a student."""
    torch.manual_seed(0)
    sampling = args.command == "sample"
    with args.device:
        model = build(name, config)
        if sampling and hasattr(model, "distiller"):
            with contextlib.suppress(ValueError):  # this one has no student
                model.distiller()
    prepare_layers(model.train(not sampling), args.compile, not sampling and args.checkpointing)
    return model


def equal_config(name: str, preset: str, config):
    """A model's preset, or its first, but all numbers that `config` has too are as there."""
    module = model_file(name)
    preset = preset or first_preset(module)
    if preset not in module.PRESETS:
        raise UserError(f"--against: {name} has no preset {preset!r}; expected one of "
                        f"{', '.join(module.PRESETS)}")
    numbers = [field.name for field in dataclasses.fields(module.Config) if field.type is int]
    shared = {field: getattr(config, field) for field in numbers if hasattr(config, field)}
    return dataclasses.replace(module.PRESETS[preset], **shared)


def counted(name: str, config) -> tuple[nn.Module, float]:
    """A model without memory, and the FLOPs of one image's forward pass."""
    n = getattr(config, "images_per_item", 1)  # where images do not come alone
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model = build(name, config)
        x = torch.zeros(n, config.channels, config.image_size, config.image_size)
        with torch.no_grad():
            model(x, torch.tensor([0] * n), None)
    return model, counter.get_total_flops() / n


# ----------------------------------------------------------------------------- time
def timed(call: Callable, device: torch.device) -> float:
    """Seconds that a call takes, with the GPU's queue empty before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else int
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def medians(work: dict[object, Callable], rounds: int, device: torch.device) -> dict[object, float]:
    """Seconds of each call: the median over rounds in each of which all run once."""
    times = [{name: timed(call, device) for name, call in work.items()} for _ in range(rounds)]
    return {name: statistics.median(seconds[name] for seconds in times) for name in work}


# ----------------------------------------------------------------------------- sample
@torch.no_grad()
def sample(args, models: dict[str, nn.Module], changes: dict) -> Iterator[dict]:
    """Rows of the table: each part of sampling, at each batch size, in each model.

    changes: settings of Sampling, for the models that have them.
    """
    for batch_size in args.batch_sizes:
        work = {}
        for label, model in models.items():
            options = model.config.sampling
            shared = {name: value for name, value in changes.items() if hasattr(options, name)}
            options = dataclasses.replace(options, **shared)
            for stage, call in stages(model, options, batch_size, args.device).items():
                work[label, stage] = call
                call()  # warms up
        seconds = medians(work, args.rounds, args.device)
        for (label, stage), t in seconds.items():
            yield {"model": label, "batch": batch_size, "part": stage,
                   "ms/image": 1000 * t / batch_size}


def stages(model: nn.Module, options, batch_size: int, device: torch.device) -> dict[str, Callable]:
    """`whole` is model.sample; the others are the parts of it that the model has by these names."""
    labels = default_labels(batch_size, model.config.num_classes).to(device)
    generators = image_generators(0, range(batch_size), device)
    calls = {"whole": partial(model.sample, labels, options, generators)}
    if hasattr(model, "sample_latents"):
        calls["prior"] = partial(model.sample_latents, labels, options, generators)
    if hasattr(model, "flow"):
        Z, _ = model.flow(model.patches(calls["whole"]()), labels)
        calls["exact"] = partial(model.flow.inverse, Z, labels=labels)
        if getattr(model, "student", None) is not None:
            calls["student"] = partial(model.flow.inverse, Z, "student", model.student, labels)
    return calls


# ----------------------------------------------------------------------------- train
def train(args, models: dict[str, nn.Module]) -> Iterator[dict]:
    """Rows of the table: the first step, in which layers are compiled, and the speed after it."""
    precision = pick_precision(args.precision, args.device)
    cuda = args.device.type == "cuda"
    work = {}
    rows = {}
    for label, model in models.items():
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        work[label] = training_step(args, model, precision)
        rows[label] = {"model": label, "precision": precision,
                       "first step, s": timed(work[label], args.device)}
        work[label]()  # now with the optimizer's state
        if cuda:
            rows[label]["GiB"] = torch.cuda.max_memory_allocated() / 2**30
    seconds = medians(work, args.rounds, args.device)
    for label, row in rows.items():
        row["images/s"] = args.batch_size / seconds[label]
        _, forward = counted(models[label].model_name, models[label].config)
        row["TFLOP/s"] = 3 * forward * row["images/s"] / 1e12  # a backward costs two
        yield row


def training_step(args, model: nn.Module, precision: str) -> Callable[[], None]:
    """A step of train.py without the reading of data: noise, forward, backward, clip, update."""
    c = model.config
    device = args.device
    size = (args.batch_size, c.channels, c.image_size, c.image_size)
    images = torch.randint(256, size, dtype=torch.uint8, device=device)
    labels = default_labels(args.batch_size, c.num_classes).to(device)
    params = list(model.parameters())
    opts = optimizers(model, args.optimizer, lr=1e-5, weight_decay=0.03)

    def step() -> None:
        generators = image_generators(0, range(args.batch_size), device)
        x = dequantize(images, "gaussian", 0.1, generators)
        with training_precision(device, precision):
            model(x, labels, generators)["loss"].mean().backward()
        float(nn.utils.clip_grad_norm_(params, 1.0))
        for opt in opts:
            opt.step()
            opt.zero_grad()

    return step


# ----------------------------------------------------------------------------- sizes, gpu
def sizes(name: str, module: ModuleType) -> Iterator[dict]:
    """Rows of the table: the parameters of each part of a preset, and its arithmetic."""
    for preset, config in module.PRESETS.items():
        model, flops = counted(name, config)
        parts = {"all": model, **dict(model.named_children())}
        row = {"preset": preset}
        for part, child in parts.items():
            row[f"{part}, M"] = sum(p.numel() for p in child.parameters()) / 1e6
        yield row | {"GFLOP/image, forward": flops / 1e9}


def gpu(args, name: str) -> Iterator[dict]:
    """Rows of the table: what was run and how it ended. The parts print tables of their own.

    The part that is worth most comes first. Each is a process, so that whatever happens to it, the
    GPU's own errors among them, costs no other part.
    """
    compiled = " --compile" if args.device.type == "cuda" else ""  # a CPU takes a minute for it
    parts = (
        f"train --batch-size 32{compiled}",
        "sample --batch-sizes 64,1",
        "train --batch-size 32",
        f"train --batch-size 128 --checkpointing{compiled}",
        "sample --batch-sizes 16",
        f"sample --batch-sizes 64,1{compiled}",
    )
    end = time.monotonic() + 60 * MINUTES
    for part in parts:
        part = f"{part} --model {name} --preset {args.preset} --device {args.device.type}"
        print(f"\n`results/benchmark.py {part}`\n", flush=True)
        start = time.monotonic()
        try:
            command = [sys.executable, __file__, *part.split(), "--rounds", "3"]
            result = subprocess.run(command, timeout=end - start).returncode
        except subprocess.TimeoutExpired:
            result = "the time was over"
        yield {"part": part, "s": time.monotonic() - start, "exit code": result}


# ----------------------------------------------------------------------------- command line
def integers(text: str) -> list[int]:
    """1,16 -> [1, 16]."""
    return [int(part) for part in text.split(",")]


def parse(argv: list[str] | None, name: str, module: ModuleType) -> argparse.Namespace:
    """The command line, with the flags of this model; its device is a torch.device."""
    first = first_preset(module)
    shown = named_preset(argv, module)  # --help shows its values as defaults
    parser = Parser(prog="benchmark.py", description=__doc__,
                    usage="python results/benchmark.py COMMAND [options]")
    commands = parser.add_subparsers(
        title="commands (COMMAND --help explains more)", dest="command", metavar="COMMAND",
        required=True, prog="benchmark.py")
    parsers = []
    for command, text in (
        ("sample", "Times sampling, as a whole and part by part, in ms per image."),
        ("train", "Times a training step and, on a GPU, measures its memory."),
        ("sizes", "Counts the parameters and FLOPs of every preset."),
        ("gpu", f"Runs `train` and `sample` in several ways, within {MINUTES} minutes."),
    ):
        p = commands.add_parser(command, help=text, description=text,
                                usage=f"python results/benchmark.py {command} [options]")
        p.add_argument("--model", default=name, metavar="NAME",
                       help="the model's file (default: farmer)")
        parsers.append(p)
    of_sample, of_train, of_sizes, of_gpu = parsers
    preset = dict(choices=module.PRESETS, metavar="NAME", help="settings of the model: "
                  f"{', '.join(module.PRESETS)} (default: %(default)s)")
    device = dict(choices=("auto", "cpu", "cuda"), help="auto = a GPU where there is one "
                  "(default: %(default)s)")

    for p in (of_sample, of_train):
        p.add_argument("--preset", default=first, **preset)
        p.add_argument("--against", metavar="MODEL[:PRESET]",
                       help="time this model too, given the same sizes as far as it has them")
    of_sample.add_argument("--batch-sizes", type=integers, default=[1, 16, 64], metavar="N1,N2",
                           help="images drawn at a time (default: 1,16,64)")
    group = of_train.add_argument_group("training step")
    group.add_argument("--batch-size", type=at_least(int, 1), default=32, metavar="N",
                       help="images per step (default: 32)")
    group.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw",
                       help="muon: for the layers' matrices, with adamw for the rest (default: "
                       "adamw)")
    group.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
                       help="of matrix products; auto = bfloat16 where this machine is fast in it "
                       "(default: auto)")
    group.add_argument("--checkpointing", action="store_true", help="recompute activations "
                       "instead of keeping them: less memory, slower")
    for p in (of_sample, of_train):
        how = p.add_argument_group("how it runs")
        how.add_argument("--device", default="auto", **device)
        how.add_argument("--compile", action="store_true",
                         help="compile the layers, which takes a minute (default: do not)")
        how.add_argument("--rounds", type=at_least(int, 1), default=5, metavar="N",
                         help="time everything N times and show the medians (default: 5)")
        group = p.add_argument_group(f"model (defaults of the preset {shown})")
        add_fields(group, module.Config, module.PRESETS[shown])
    group = of_sample.add_argument_group(f"sampling (defaults of the preset {shown})")
    add_fields(group, module.Sampling, module.PRESETS[shown].sampling)

    of_sizes.set_defaults(device="cpu")  # where nothing is computed
    of_gpu.add_argument("--preset", default="farmer-1.1b-p16", **preset)
    of_gpu.add_argument("--tiny", action="store_const", dest="preset", const=first,
                        help=f"the same as --preset {first}, for trying everything on a CPU")
    of_gpu.add_argument("--device", default="cuda", **device)
    args = parser.parse_args(argv)
    args.device = pick_device(args.device)
    return args


def print_table(rows: list[dict]) -> None:
    """Rows as Markdown; a column for each name that one of them has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row in rows:
        cells = [row.get(name, "") for name in columns]
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        print(f"| {' | '.join(cells)} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Prints the table that the command line asks for."""
    name, module = named_model(argv)
    args = parse(argv, name, module)
    if args.command == "sizes":
        rows = sizes(name, module)
    elif args.command == "gpu":
        rows = gpu(args, name)
    else:
        cuda = args.device.type == "cuda"
        where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
        print(f"{where}, torch {torch.__version__}")
        models = new_models(args, name, module)
        if args.command == "train":
            rows = train(args, models)
        else:
            rows = sample(args, models, given(args, module.Sampling))
    print_table(list(rows))


if __name__ == "__main__":
    run_script(main)
