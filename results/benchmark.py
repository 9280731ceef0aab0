"""How fast a model is on this machine, whichever model it is.

    python results/benchmark.py sample --preset fashion --against baselines.tarflow
    python results/benchmark.py train --preset cifar10 --precision bfloat16
    python results/benchmark.py sizes --model baselines.jetformer
    python results/benchmark.py gpu                                # about 8 minutes of a GPU
    python results/benchmark.py gpu --device cpu --preset tiny     # all of it, on a CPU

--model, --preset and the model's own flags are those of train.py; the weights
are random, which changes no time. Times are medians over rounds in each of which
everything runs once, so that a busy machine is unfair to nobody. FLOPs count
matrix products, those of attention among them.

`gpu` trains and samples in several ways, the most important first. Each row is
written to gpu.jsonl, or to --out, as soon as it is there, so a run that is killed
keeps its rows. Another run measures all of them again and adds them below.
"""
# ruff: noqa: E402  (the repository's folder has to be found first)
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import contextlib
import dataclasses
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from support.checkpoints import DEFAULT_MODEL, build, first_preset, model_file
from support.cli import Parser, UserError, at_least, check_writable, given, run_script
from support.data import dequantize, image_generators
from support.distributed import pick_device, pick_precision, training_precision
from support.sampling import default_labels, prepare_layers, replaying

PEAKS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250}  # TFLOP/s in bfloat16, not sparse
PARTS = (  # of `gpu`, in order of worth; each is a process, so that no failure costs another part
    "sample --batch-sizes 16 --no-student --graphs",  # are images by graphs equal to others?
    "train --batch-sizes 32",
    "train --batch-sizes 32 --compile",
    "sample --batch-sizes 64 --no-student --graphs",
    "sample --batch-sizes 1 --no-student --graphs",
    "sample --batch-sizes 64,1",
    "train --batch-sizes 128 --checkpointing --compile",
    "sample --batch-sizes 64 --graphs --precision bfloat16",
    "sample --batch-sizes 64 --compile",
)
GPU_FLAGS = "--preset farmer-1.1b-p16 --device cuda --rounds 3 --out gpu.jsonl".split()


# ----------------------------------------------------------------------------- models
def config_of(name: str, preset: str):
    """The config of a preset of a model, of its first one if that is ""."""
    module = model_file(name)
    preset = preset or first_preset(module)
    if preset not in module.PRESETS:
        raise UserError(f"{name} has no preset {preset!r}; expected one of "
                        f"{', '.join(module.PRESETS)}")
    return module.PRESETS[preset]


def new_models(args, config) -> dict[str, nn.Module]:
    """The model that the command line describes, and the one of --against, by their names.

    In the other one's preset, all numbers that `config` has too are as there.
    """
    label = f"{args.model}:{args.preset}".rstrip(":")
    models = {label: new_model(args, args.model, config)}
    if args.against:
        name, _, preset = args.against.partition(":")
        other = config_of(name, preset)
        shared = {field: getattr(config, field) for field, value in vars(other).items()
                  if type(value) is int and hasattr(config, field)}
        models[args.against] = new_model(args, name, dataclasses.replace(other, **shared))
    return models


def new_model(args, name: str, config) -> nn.Module:
    """A model with random weights, none of them zero, ready to be timed."""
    torch.manual_seed(0)
    training = args.command == "train"
    with args.device, torch.no_grad():
        model = build(name, config)
        if not training and args.student and hasattr(model, "distiller"):
            with contextlib.suppress(ValueError):  # this one has no student
                model.distiller()
        for weight in model.parameters():
            weight += 0.01 * torch.randn_like(weight)
    prepare_layers(model.train(training), args.compile, training and args.checkpointing)
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


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


# ----------------------------------------------------------------------------- sample
@torch.no_grad()
def sample(args, models: dict[str, nn.Module], changes: dict) -> Iterator[dict]:
    """Rows of the table: each part of sampling, at each batch size, in each model.

    changes: settings of Sampling, for the models that have them. With --graphs each part is timed
    again with its loops replayed by the GPU, and compared with what it gives without.
    """
    for batch_size in args.batch_sizes:
        work = {}
        for label, model in models.items():
            options = model.config.sampling
            shared = {name: value for name, value in changes.items() if hasattr(options, name)}
            options = dataclasses.replace(options, **shared)
            for part, call in parts_of(model, options, batch_size, args.device).items():
                work[label, part] = call
        expected = {key: call() for key, call in work.items()}  # warms up, too
        for (label, part), t in medians(work, args.rounds, args.device).items():
            yield {"model": label, "batch": batch_size, "part": part,
                   "ms/image": 1000 * t / batch_size}
        for (label, part), call in work.items() if args.graphs else ():
            with replaying(models[label], args.device.type == "cuda"):
                call()
                call()  # is recorded
                error = (call() - expected[label, part]).abs().max().item()
                t = medians({part: call}, args.rounds, args.device)[part]
            yield {"model": label, "batch": batch_size, "part": f"{part}, by graphs",
                   "ms/image": 1000 * t / batch_size, "difference": error, "equal": error <= 1e-5}


def parts_of(model: nn.Module, options, batch_size: int,
             device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """`whole` is model.sample; the others are the parts of it that the model has by these names.

    A call gives the same every time.
    """
    labels = default_labels(batch_size, model.config.num_classes).to(device)

    def drawn(draw: Callable) -> Tensor:
        return draw(labels, options, image_generators(0, range(batch_size), device))

    calls = {"whole": partial(drawn, model.sample)}
    if hasattr(model, "sample_latents"):
        calls["prior"] = partial(drawn, model.sample_latents)
    if hasattr(model, "flow"):
        Z, _ = model.flow(model.patches(calls["whole"]()), labels)
        calls["exact"] = partial(model.flow.inverse, Z, labels=labels)
        if getattr(model, "student", None) is not None:
            calls["student"] = partial(model.flow.inverse, Z, "student", model.student, labels)
    return calls


# ----------------------------------------------------------------------------- train
def train(args, models: dict[str, nn.Module]) -> Iterator[dict]:
    """Rows of the table: the first step, in which layers are compiled, and the speed after it.

    MFU is the share of what the GPU could do in bfloat16.
    """
    precision = pick_precision(args.precision, args.device)
    batch_size = args.batch_sizes[0]
    work = {}
    first = {}
    for label, model in models.items():
        work[label] = training_step(model, batch_size, precision, args.device)
        first[label] = timed(work[label], args.device)
        work[label]()  # now with the optimizer's state
    peaks = [peak for name, peak in PEAKS.items() if name in hardware(args.device)]
    for label, seconds in medians(work, args.rounds, args.device).items():
        _, forward = counted(models[label].model_name, models[label].config)
        speed = 3 * forward * batch_size / seconds / 1e12  # a backward costs two forward passes
        yield {"model": label, "batch": batch_size, "precision": precision,
               "first step, s": first[label], "images/s": batch_size / seconds, "TFLOP/s": speed,
               "MFU": speed / peaks[0] if peaks else None}


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


def gpu(flags: list[str]) -> None:
    """Runs PARTS, each with these flags too; they print tables of their own."""
    flags = [*GPU_FLAGS, *flags]
    args, _ = parse(["train", *flags])  # a mistake is said once
    for part in PARTS:
        if args.device.type == "cpu":
            part = part.replace(" --compile", "")  # which would take minutes
        start = time.monotonic()
        code = subprocess.run([sys.executable, __file__, *part.split(), *flags]).returncode
        print(f"{part}: exit code {code} after {time.monotonic() - start:.0f} s\n", flush=True)


# ----------------------------------------------------------------------------- command line
def integers(text: str) -> list[int]:
    """1,16 -> [1, 16]."""
    return [int(part) for part in text.split(",")]


def parse(argv: list[str]):
    """The command line, with the flags of the model that it names, and the config of its preset."""
    command = argv[0] if argv else ""
    first = Parser(add_help=False)
    first.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME",
                       help="the model's file (default: farmer)")
    first.add_argument("--preset", metavar="NAME", default="",
                       help="settings of the model (default: its first preset)")
    known, _ = first.parse_known_args(argv)
    config = config_of(known.model, known.preset)
    parser = Parser(prog="benchmark.py", description=__doc__, parents=[first],
                    usage="python results/benchmark.py COMMAND [options]",
                    epilog="COMMAND --help shows the flags of sampling or of a training step too")
    parser.add_argument("command", choices=("sample", "train", "sizes", "gpu"), metavar="COMMAND",
                        help="comes first. sample: time sampling, as a whole and part by part; "
                        "train: time a training step; sizes: count parameters and FLOPs of every "
                        "preset; gpu: both of the first, in several ways, with "
                        f"{' '.join(GPU_FLAGS)} unless you say otherwise")
    parser.add_argument("--against", metavar="MODEL[:PRESET]",
                        help="time this model too, given the same sizes as far as it has them")
    parser.add_argument("--batch-sizes", type=integers, metavar="N1,N2",
                        default=[32] if command == "train" else [1, 16, 64],
                        help="images at a time (default: 32 for train, 1,16,64 for sample)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="auto = a GPU where there is one (default: auto)")
    parser.add_argument("--compile", action="store_true",
                        help="compile the layers, which takes a minute (default: do not)")
    parser.add_argument("--rounds", type=at_least(int, 1), default=5, metavar="N",
                        help="time everything N times and show the medians (default: 5)")
    parser.add_argument("--out", metavar="FILE", help="also add each row to this file, as a line "
                        "of JSON, as soon as it is there")
    parser.add_settings("model (defaults of the preset)", config)
    if command == "sample":
        parser.add_argument("--no-student", dest="student", action="store_false",
                            help="sample with the exact inverse (default: with a student, if the "
                            "model can have one)")
        parser.add_argument("--graphs", action="store_true", help="also let a GPU replay the loops "
                            "over tokens, and compare what they give")
        parser.add_settings("sampling (defaults of the preset)", config.sampling)
    if command == "train":
        parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
                            help="of matrix products; auto = bfloat16 where this machine is fast "
                            "in it (default: auto)")
        parser.add_argument("--checkpointing", action="store_true", help="recompute activations "
                            "instead of keeping them: less memory, slower")
    args = parser.parse_args(argv)
    args.device = pick_device(args.device)
    if args.out:
        args.out = check_writable("--out", args.out)
    return args, config


def show(rows: Iterable[dict], facts: dict, out: Path | None) -> None:
    """Prints rows as Markdown as they come, and adds them, with `facts`, to a file."""
    columns = None
    for row in rows:
        if out:
            with out.open("a") as file:
                file.write(json.dumps(facts | row) + "\n")
        if list(row) != columns:
            columns = list(row)
            print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()]
        print(f"| {' | '.join(cells)} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Prints the table that the command line asks for."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["gpu"]:
        gpu(argv[1:])
        return
    args, config = parse(argv)
    settings = given(args, type(config))
    if args.command == "sizes":
        presets = model_file(args.model).PRESETS.items()
        rows = sizes(args.model, {name: dataclasses.replace(c, **settings) for name, c in presets})
    else:
        models = new_models(args, dataclasses.replace(config, **settings))
        if args.command == "train":
            rows = train(args, models)
        else:
            rows = sample(args, models, given(args, type(config.sampling)))
        rows = (row | {"GiB": torch.cuda.max_memory_allocated() / 2**30} for row in rows)
    facts = {"hardware": hardware(args.device), "torch": torch.__version__,
             "command": " ".join(argv)}
    print(*facts.values(), sep=", ")
    show(rows, facts, args.out)


if __name__ == "__main__":
    run_script(main)
