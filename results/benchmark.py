"""How fast a model is on this machine, whichever model it is.

    python results/benchmark.py sample --preset fashion --against baselines.tarflow
    python results/benchmark.py train --preset cifar10 --precision bfloat16
    python results/benchmark.py sizes --model baselines.jetformer
    python results/benchmark.py gpu | tee table.md          # 8 minutes of a GPU
    python results/benchmark.py gpu --device cpu --preset tiny     # all of it, on a CPU

--model, --preset and the model's own flags are those of train.py; the weights
are random, which changes no time. Times are medians over rounds in each of which
everything runs once, so that a busy machine is unfair to nobody. FLOPs count
matrix products, those of attention among them.
"""
# ruff: noqa: E402  (the repository's folder has to be found first)
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import contextlib
import dataclasses
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from support.checkpoints import DEFAULT_MODEL, build, first_preset, model_file
from support.cli import Parser, UserError, at_least, given, run_script
from support.data import dequantize, image_generators
from support.distributed import pick_device, pick_precision, training_precision
from support.sampling import default_labels, prepare_layers

MINUTES = 8  # of a GPU


# ----------------------------------------------------------------------------- models
def preset_of(name: str, preset: str | None):
    """A preset of a model, or its first: its name and its config."""
    module = model_file(name)
    preset = preset or first_preset(module)
    if preset not in module.PRESETS:
        raise UserError(f"{name} has no preset {preset!r}; expected one of "
                        f"{', '.join(module.PRESETS)}")
    return preset, module.PRESETS[preset]


def new_models(args, config) -> dict[str, nn.Module]:
    """The model that the command line describes, and the one of --against, by their names.

    In the other one's preset, all numbers that `config` has too are as there.
    """
    models = {f"{args.model}:{args.preset}": new_model(args, args.model, config)}
    if args.against:
        name, _, preset = args.against.partition(":")
        _, other = preset_of(name, preset)
        shared = {field: getattr(config, field) for field, value in vars(other).items()
                  if type(value) is int and hasattr(config, field)}
        models[args.against] = new_model(args, name, dataclasses.replace(other, **shared))
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
    batch_size = args.batch_sizes[0]
    work = {}
    rows = {}
    for label, model in models.items():
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        work[label] = training_step(model, batch_size, precision, args.device)
        rows[label] = {"model": label, "precision": precision,
                       "first step, s": timed(work[label], args.device)}
        work[label]()  # now with the optimizer's state
        if cuda:
            rows[label]["GiB"] = torch.cuda.max_memory_allocated() / 2**30
    seconds = medians(work, args.rounds, args.device)
    for label, row in rows.items():
        row["images/s"] = batch_size / seconds[label]
        _, forward = counted(models[label].model_name, models[label].config)
        row["TFLOP/s"] = 3 * forward * row["images/s"] / 1e12  # a backward costs two
        yield row


def training_step(model: nn.Module, batch_size: int, precision: str,
                  device: torch.device) -> Callable[[], None]:
    """A step of train.py with AdamW and without reading data: noise, forward, backward, update."""
    c = model.config
    size = (batch_size, c.channels, c.image_size, c.image_size)
    images = torch.randint(256, size, dtype=torch.uint8, device=device)
    labels = default_labels(batch_size, c.num_classes).to(device)
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=1e-5, betas=(0.9, 0.95), fused=True)

    def step() -> None:
        generators = image_generators(0, range(batch_size), device)
        x = dequantize(images, "gaussian", 0.1, generators)
        with training_precision(device, precision):
            model(x, labels, generators)["loss"].mean().backward()
        float(nn.utils.clip_grad_norm_(params, 1.0))
        optimizer.step()
        optimizer.zero_grad()

    return step


# ----------------------------------------------------------------------------- sizes, gpu
def sizes(name: str, configs: dict) -> Iterator[dict]:
    """Rows of the table: the parameters of each part of a preset, and its arithmetic."""
    for preset, config in configs.items():
        model, flops = counted(name, config)
        row = {"preset": preset}
        for part, child in [("all", model), *model.named_children()]:
            row[f"{part}, M"] = sum(p.numel() for p in child.parameters()) / 1e6
        yield row | {"GFLOP/image, forward": flops / 1e9}


def gpu(shared: list[str], compiled: str) -> Iterator[dict]:
    """Rows of the table: what was run and how it ended. The parts print tables of their own.

    The part that is worth most comes first. Each is a process, so that whatever happens to it, the
    GPU's own errors among them, costs no other part. `shared` are flags for all of them, `compiled`
    are more for some.
    """
    parts = (
        f"train --batch-sizes 32 {compiled}",
        "sample --batch-sizes 64,1",
        "train --batch-sizes 32",
        f"train --batch-sizes 128 --checkpointing {compiled}",
        "sample --batch-sizes 16",
        f"sample --batch-sizes 64,1 {compiled}",
    )
    end = time.monotonic() + 60 * MINUTES
    for part in parts:
        command = [*part.split(), *shared, "--rounds", "3"]
        print(f"\n`results/benchmark.py {' '.join(command)}`\n", flush=True)
        start = time.monotonic()
        try:
            command = [sys.executable, __file__, *command]
            result = subprocess.run(command, timeout=end - start).returncode
        except subprocess.TimeoutExpired:
            result = "the time was over"
        yield {"part": part.strip(), "s": time.monotonic() - start, "exit code": result}


# ----------------------------------------------------------------------------- command line
def integers(text: str) -> list[int]:
    """1,16 -> [1, 16]."""
    return [int(part) for part in text.split(",")]


def parse(argv: list[str] | None):
    """The command line, with the flags of the model that it names, and the config of its preset."""
    first = Parser(add_help=False)
    first.add_argument("command", choices=("sample", "train", "sizes", "gpu"), metavar="COMMAND",
                       nargs="?", help="sample: time sampling, as a whole and part by part; train: "
                       "time a training step and, on a GPU, measure its memory; sizes: count "
                       "parameters and FLOPs of every preset; gpu: train and sample in several "
                       f"ways, within {MINUTES} minutes")
    first.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME",
                       help="the model's file (default: farmer)")
    first.add_argument("--preset", metavar="NAME", help="settings of the model (default: its first "
                       "preset; for gpu farmer-1.1b-p16)")
    known, _ = first.parse_known_args(argv)
    preset, config = preset_of(known.model, known.preset)
    parser = Parser(prog="benchmark.py", description=__doc__, parents=[first],
                    usage="python results/benchmark.py COMMAND [options]",
                    epilog="COMMAND --help shows the flags of sampling or of a training step too")
    parser.add_argument("--against", metavar="MODEL[:PRESET]",
                        help="time this model too, given the same sizes as far as it has them")
    parser.add_argument("--batch-sizes", type=integers, metavar="N1,N2",
                        help="images at a time (default: 32 for train, 1,16,64 for sample)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"),
                        help="auto = a GPU where there is one (default: auto; for gpu cuda)")
    parser.add_argument("--compile", action="store_true",
                        help="compile the layers, which takes a minute (default: do not)")
    parser.add_argument("--rounds", type=at_least(int, 1), default=5, metavar="N",
                        help="time everything N times and show the medians (default: 5)")
    parser.add_settings(f"model (defaults of the preset {preset})", config)
    if known.command == "sample":
        parser.add_settings(f"sampling (defaults of the preset {preset})", config.sampling)
    elif known.command == "train":
        group = parser.add_argument_group("training step")
        group.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
                           help="of matrix products; auto = bfloat16 where this machine is fast in "
                           "it (default: auto)")
        group.add_argument("--checkpointing", action="store_true", help="recompute activations "
                           "instead of keeping them: less memory, slower")
    args = parser.parse_args(argv)
    if args.command is None:
        parser.error("COMMAND is missing; expected sample, train, sizes or gpu")
    args.device = pick_device(args.device or ("cuda" if args.command == "gpu" else "auto"))
    args.preset = preset
    args.batch_sizes = args.batch_sizes or ([32] if args.command == "train" else [1, 16, 64])
    return args, config


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
    argv = sys.argv[1:] if argv is None else argv
    args, config = parse(argv)
    settings = given(args, type(config))
    if args.command == "sizes":
        presets = model_file(args.model).PRESETS.items()
        rows = sizes(args.model, {name: dataclasses.replace(c, **settings) for name, c in presets})
    elif args.command == "gpu":
        shared = [word for word in argv if word != "gpu"]
        for flag, value in ("--preset", "farmer-1.1b-p16"), ("--device", "cuda"):
            shared += [] if flag in shared else [flag, value]
        compiled = "--compile" if args.device.type == "cuda" else ""  # a CPU takes a minute for it
        rows = gpu(shared, compiled)
    else:
        cuda = args.device.type == "cuda"
        where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
        print(f"{where}, torch {torch.__version__}")
        models = new_models(args, dataclasses.replace(config, **settings))
        if args.command == "train":
            rows = train(args, models)
        else:
            rows = sample(args, models, given(args, type(config.sampling)))
    print_table(list(rows))


if __name__ == "__main__":
    run_script(main)
