"""Train a model, continue a run, distil a student, or measure the likelihood of held-out images.

    python train.py                                 # digits, minutes on a CPU, into runs/tiny
    python train.py --preset cifar10 --out runs/cifar
    python train.py --resume --out runs/cifar       # continue exactly where it stopped
    python train.py --eval runs/cifar               # likelihood of held-out images
    python train.py --distill runs/cifar            # one-step student, into runs/cifar-student
    python train.py --model baselines.tarflow       # another model, by the name of its file
    torchrun --nproc_per_node=8 train.py --preset farmer-1.1b-p16 --data imagenet/train
"""
import argparse
import contextlib
import dataclasses
import json
import math
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from support.batches import batches, dequantize, image_generators, open_split
from support.checkpoints import (
    DEFAULT_MODEL,
    Checkpoint,
    Diverged,
    RunState,
    build,
    checkpoint_path,
    first_preset,
    load_run,
    named_model,
    named_preset,
    run_directory,
)
from support.cli import (
    Parser,
    UserError,
    add_fields,
    at_least,
    expanded,
    given,
    run_script,
    warn,
    write_file,
)
from support.datasets import KNOWN
from support.distributed import (
    accumulating,
    join,
    leave,
    mean_over_processes,
    parallel,
    pick_device,
    pick_precision,
    training_precision,
)
from support.sampling import bits_per_dim, evaluate, sample_grid
from support.training import EMA, Log, StopSignals, optimizers, prepare_layers


# ----------------------------------------------------------------------------- settings
def setting(default, help: str, least: float = 0, below: float = math.inf, choices: tuple = ()):
    return field(default=default, metadata=dict(
        help=help, least=least, below=below, choices=choices))


@dataclass(frozen=True)
class Train:
    """Settings of training: what determines a run's result besides the model's Config."""

    data: str = setting(
        "digits", "digits, fashion-mnist, mnist or cifar10; or a folder, .zip, .npz or idx files")
    steps: int = setting(1000, "optimizer steps", least=1)
    batch_size: int = setting(64, "images per step, over all devices", least=1)
    lr: float = setting(1e-3, "peak learning rate")
    lr_end: float = setting(0.01, "learning rate at the end, as a fraction of the peak")
    warmup: int = setting(100, "steps of linear warm-up")
    optimizer: str = setting(
        "adamw", "muon: Muon for the matrices of the layers, AdamW for the rest",
        choices=("adamw", "muon"))
    weight_decay: float = setting(0.03, "weight decay, on matrices only (embeddings included)")
    clip: float = setting(1.0, "gradient norm above which gradients are scaled down; 0 = off")
    noise: str = setting(
        "gaussian", "noise added to the 8-bit pixels: gaussian, with a std that falls during "
        "training; uniform, one level wide, for bits/dim; rgb, gaussian rounded to whole levels, "
        "with a std that falls too, plus uniform; or none",
        choices=("gaussian", "uniform", "rgb", "none"))
    noise_start: float = setting(
        0.1, "std of the noise at the first step, for pixels in [-1, 1]; for rgb in 8-bit levels")
    noise_end: float = setting(0.005, "std of the noise at the end, in the same units")
    label_drop: float = setting(
        0.1, "fraction of labels replaced by the null class; guidance needs some", below=1)
    flip: bool = setting(True, "mirror each image with probability 1/2")
    enlarge: bool = setting(False, "enlarge images smaller than image_size (otherwise an error)")
    holdout: int = setting(0, "images of each class, the last by name, to keep for --eval")
    ema: float = setting(
        0.0, "decay of the moving average of the weights (EMA), which is then saved and used; "
        "0 = off", below=1)
    guard: float = setting(
        10.0, "skip a step whose gradient norm exceeds its running median by this factor; 0 = off")
    seed: int = setting(
        0, "seed of the weights, the data order, the noise and the dropped labels", below=2**63)

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            limits = f.metadata
            if limits["choices"] and value not in limits["choices"]:
                raise UserError(f"{f.name}: got {value!r}, expected one of "
                                f"{', '.join(limits['choices'])}")
            if f.type in (int, float) and not limits["least"] <= value < limits["below"]:
                expected = f"{limits['least']} or more"
                if limits["below"] < math.inf:
                    expected += f" and less than {limits['below']}"
                raise UserError(f"{f.name}: got {value}, expected {expected}")


def noise_at(train: Train, step: int) -> float | None:
    """Std of the dequantisation noise at a step: a cosine from noise_start to noise_end (3.2)."""
    if train.noise in ("uniform", "none"):
        return None  # these kinds have no std to set
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / train.steps)))
    return train.noise_end + (train.noise_start - train.noise_end) * cosine


def lr_at(train: Train, step: int) -> float:
    """Learning rate at a step: linear warm-up times a cosine from lr to lr * lr_end.

    The cosine runs over all steps, including the warm-up.
    """
    warm = min(1.0, (step + 1) / max(1, train.warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * step / train.steps))
    return train.lr * warm * (train.lr_end + (1 - train.lr_end) * cosine)


def drop_labels(labels: torch.Tensor, numbers: torch.Tensor, train: Train,
                null: int) -> torch.Tensor:
    """Replaces a fraction of the labels (b,) by the null class.

    The seed and the number of an image alone decide whether its label is dropped.
    """
    random = [np.random.default_rng([train.seed, int(n), 2]).random() for n in numbers]
    return labels.masked_fill(torch.tensor(random) < train.label_drop, null)


# ----------------------------------------------------------------------------- command line
def parse(argv: list[str] | None, name: str, module):
    first = first_preset(module)
    shown = named_preset(argv, module)  # --help shows its values as defaults
    parser = Parser(prog="train.py", description=__doc__, usage="python train.py [options]")
    parser.add_argument("--model", default=name, metavar="NAME",
                        help="name of the model's file (default: farmer)")
    parser.add_argument("--preset", choices=module.PRESETS, metavar="NAME",
                        help=f"model and training settings: {', '.join(module.PRESETS)} "
                        f"(default: {first})")
    parser.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/PRESET)")
    parser.add_argument("--resume", action="store_true",
                        help="continue from OUT/ckpt.pt; only --steps, --seed and, if the data "
                        "has moved, --data may change")

    other = parser.add_argument_group("other tasks")
    other.add_argument("--eval", metavar="DIR_OR_CKPT",
                       help="print the held-out likelihood of a trained model")
    other.add_argument("--distill", metavar="DIR_OR_CKPT",
                       help="train the one-step student of a trained model")

    # One flag for each setting; its value is None if it is not given.
    group = parser.add_argument_group(f"training (defaults of the preset {shown})")
    add_fields(group, Train, preset_settings(module, shown))
    group = parser.add_argument_group(f"model (defaults of the preset {shown})")
    add_fields(group, module.Config, module.PRESETS[shown])

    how = parser.add_argument_group("how it runs (changes results by rounding at most)")
    how.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    how.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
                     help="precision of matrix products; auto = bfloat16 if it is fast here")
    how.add_argument("--compile", action=argparse.BooleanOptionalAction,
                     help="compile the layers, which takes a minute (default: only on a GPU)")
    how.add_argument("--workers", type=at_least(int, 0), default=2, metavar="N",
                     help="processes that decode images, per device (default: 2)")
    how.add_argument("--micro-batch", type=at_least(int, 1), metavar="N",
                     help="images per device and pass; gradients are accumulated over batch_size")
    how.add_argument("--checkpointing", action="store_true",
                     help="recompute activations instead of keeping them: less memory, slower")
    for flag, least, default, text in (
        ("--log-every", 1, 50, "steps between lines of the log"),
        ("--save-every", 1, 500, "steps between checkpoints"),
        ("--sample-every", 0, 500, "steps between updates of samples.png; 0 = only at the end"),
        ("--val-every", 0, 500, "steps between held-out likelihoods; 0 = only at the end"),
        ("--keep", 0, 0, "also keep the last N checkpoints, as ckpt-STEP.pt"),
    ):
        how.add_argument(flag, type=at_least(int, least), default=default, metavar="N",
                         help=f"{text} (default: {default})")
    how.add_argument("--tensorboard", action="store_true",
                     help="also write TensorBoard events (needs tensorboard)")
    args = parser.parse_args(argv)
    if args.eval is not None and args.distill is not None:
        raise UserError("--eval, --distill: got both, expected only one of them")
    return args


def preset_settings(module, preset: str) -> Train:
    return Train(**module.TRAINING.get(preset, {}))


# ----------------------------------------------------------------------------- how a run begins
@dataclass
class Start:
    """What a run begins with, whether it is new, resumed or a distillation."""

    config: object  # the model's Config
    train: Train
    state: RunState
    model: torch.nn.Module | None = None  # None: still to be built


def fresh(args, module, device: torch.device) -> Start:
    """A new run: the preset's settings, overridden by the flags."""
    preset = args.preset or first_preset(module)
    config = dataclasses.replace(module.PRESETS[preset], **given(args, module.Config))
    train = dataclasses.replace(preset_settings(module, preset), **given(args, Train))
    if getattr(config.sampling, "denoise", 0):
        # Denoising removes the noise that training ends with, so it follows --noise-end.
        sigma = train.noise_end if train.noise == "gaussian" else 0.0
        sampling = dataclasses.replace(config.sampling, denoise=sigma)
        config = dataclasses.replace(config, sampling=sampling)
    precision = pick_precision(args.precision, device)
    return Start(config, train, RunState(preset, {}, distill=False, precision=precision))


def distilled(args, module, device: torch.device) -> Start:
    """A student's run: the teacher's settings, but a fifth of its steps and only its last noise."""
    model, teacher = load_run(args.distill, device)
    if not hasattr(model, "distiller"):
        raise UserError(f"--distill: {model.model_name} has no student; expected a run of farmer "
                        "or of a variant of it")
    if given(args, module.Config):
        raise UserError(f"--distill: got {', '.join(given(args, module.Config))}, but a student "
                        "keeps its teacher's config; leave the model's flags out")
    if teacher.distill:
        raise UserError(f"--distill: {args.distill} has a student already; pass the run that it "
                        "was distilled from")
    train = Train(**teacher.training)
    train = dataclasses.replace(
        train, steps=max(1, train.steps // 5), noise_start=train.noise_end)
    train = dataclasses.replace(train, **given(args, Train))
    precision = pick_precision(args.precision, device)
    state = RunState(
        teacher.preset, {}, distill=True, precision=precision, classes=teacher.classes)
    return Start(model.config, train, state, model)


def resumed(args, module, device: torch.device, out: Path) -> Start:
    """The run in `out`, as it was saved. Only the data's path, steps and seed may change."""
    model, state = load_run(out, device)
    train = Train(**state.training)
    asked = given(args, Train) | given(args, module.Config)
    asked["model"] = args.model
    asked["preset"] = args.preset or state.preset
    have = dataclasses.asdict(model.config) | state.training
    have["model"] = model.model_name
    have["preset"] = state.preset
    for name, value in asked.items():
        if value != have[name] and name not in ("data", "steps", "seed"):
            raise UserError(f"--resume: {name} is {have[name]} in {out / 'ckpt.pt'}, but {value} "
                            "was asked for; leave the flag out, or start a new run with "
                            "another --out")
    for name in ("steps", "seed"):
        if name in asked and asked[name] != have[name]:
            warn(f"{name} was {have[name]} and is {asked[name]} from step {state.step} on")
    if args.precision not in ("auto", state.precision):
        raise UserError(f"--precision: got {args.precision}, but the run began in "
                        f"{state.precision}; leave the flag out")
    return Start(model.config, dataclasses.replace(train, **given(args, Train)), state, model)


def output_directory(args, name: str, module) -> Path:
    """--out, or by default runs/PRESET, runs/MODEL-PRESET, or the teacher's folder and -student."""
    if args.out is not None:
        return expanded(args.out)
    if args.distill is not None:
        teacher = checkpoint_path(args.distill).resolve()
        teacher = teacher.parent if teacher.name == "ckpt.pt" else teacher.with_suffix("")
        return teacher.with_name(f"{teacher.name}-student")
    preset = args.preset or first_preset(module)
    if name == DEFAULT_MODEL:
        return Path("runs", preset)
    return Path("runs", f"{name.rpartition('.')[2]}-{preset}")


def main(argv: list[str] | None = None) -> None:
    name, module = named_model(argv)
    args = parse(argv, name, module)
    device = pick_device(args.device)
    if args.eval is not None:
        evaluate_run(args, module, device)
        return
    out = output_directory(args, name, module)
    resuming = args.resume and (out / "ckpt.pt").is_file()
    if resuming:
        start = resumed(args, module, device, out)
    elif args.distill is not None:
        start = distilled(args, module, device)
    else:
        start = fresh(args, module, device)
    if args.resume and not resuming:
        warn(f"{out} holds no ckpt.pt yet: starting at step 0")
    if start.state.step >= start.train.steps:
        print(f"{out}: finished at step {start.state.step}; to continue, pass a larger --steps")
        return
    with run_directory(out, resuming):
        train_model(args, name, module, device, start, out)


# ----------------------------------------------------------------------------- training
def train_model(args, name: str, module, device: torch.device, start: Start, out: Path) -> None:
    """Trains from `start` to the last step, saving into `out`.

    Everything random in step s depends on (seed, s) alone, so a resumed run is the same run.
    """
    state = start.state
    model = start.model
    c = start.config
    train = dataclasses.replace(start.train, data=absolute(start.train.data))
    state.training = dataclasses.asdict(train)

    # Data. A new model gets as many classes as the data has, or --num-classes.
    num_classes = args.num_classes if model is None else c.num_classes
    split = open_split(
        train.data, c.image_size, c.channels, train.holdout, train.enlarge,
        classes=state.classes, num_classes=num_classes,
        own=getattr(module, "open_images", None))
    if state.step and split.digest != state.digest:
        raise UserError("--resume: these are not the images that the run began with; pass the "
                        "right --data, or start a new run with another --out")
    state.digest = split.digest
    state.classes = split.classes
    rank, world = join(device)
    micro_batch = args.micro_batch or max(1, train.batch_size // world)
    if train.batch_size % (world * micro_batch):
        raise UserError(f"batch_size: got {train.batch_size}, expected a multiple of {world} "
                        f"(processes) x micro-batch {micro_batch}; change one of these")
    passes = train.batch_size // (world * micro_batch)

    # Model. `net` computes the loss and is trained: the model itself, or the distiller of its
    # student. `ddp` is `net` over all processes.
    if model is None:
        config = dataclasses.replace(c, num_classes=split.num_classes)
        model = new_model(name, config, split.train, train, device)
    null = model.config.num_classes
    net = model.distiller() if state.distill else model
    compiling = device.type == "cuda" if args.compile is None else args.compile
    prepare_layers(net, compiling, args.checkpointing)
    params = [p for p in net.parameters() if p.requires_grad]
    ddp = parallel(net.train(), device)

    # What the loop uses.
    opts = optimizers(net, train.optimizer, train.lr, train.weight_decay)
    ema = EMA(params, train.ema) if train.ema else None
    checkpoint = Checkpoint(out, model, opts, ema, state, args.keep, rank)
    if state.step == 0:
        checkpoint.save()  # a run that diverges early leaves something to look at
    else:
        checkpoint.restore()  # optimizers and averages; load_run has read the model
    log = Log(out, state.step, train.steps, rank, args.tensorboard)
    order = getattr(model, "epoch_order", getattr(module, "epoch_order", None))
    source = batches(
        split.train, batch_size=train.batch_size, start_step=state.step, seed=train.seed,
        rank=rank, world=world, workers=args.workers, flip=train.flip, epoch_order=order)
    if rank == 0:
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"data: {split.summary}")
        print(f"{name} {state.preset}: {size:.2f}M parameters, steps {state.step} to "
              f"{train.steps}, {world} x {device}, {state.precision}, into {out}", flush=True)
        if compiling:
            print("compiling the layers (about a minute)", flush=True)

    with StopSignals() as stop, checkpoint.saving_on_error():
        while state.step < train.steps and not stop.asked(device):
            # 1. Learning rate and noise of this step.
            sigma = noise_at(train, state.step)
            lr = lr_at(train, state.step)
            for opt in opts:
                for group in opt.param_groups:
                    group["lr"] = lr

            # 2. Gradients of the mean loss over the global batch. `numbers` counts the images of
            # the whole run: image j of step s has number s * batch_size + j.
            images, labels, numbers = next(source)
            loss = torch.zeros((), device=device)
            for i in range(passes):
                part = slice(i * micro_batch, (i + 1) * micro_batch)
                n = numbers[part]
                pixels = images[part].to(device, non_blocking=True)
                x = dequantize(pixels, train.noise, sigma, image_generators(train.seed, n, device))
                y = drop_labels(labels[part], n, train, null).to(device, non_blocking=True)
                generators = image_generators(train.seed + 1, n, device)  # not those of the noise
                with training_precision(device, state.precision):
                    with accumulating(ddp, more=i + 1 < passes):
                        terms = ddp(x, y, generators)
                        part_loss = terms["loss"].mean() / passes
                        part_loss.backward()
                loss += part_loss.detach()
                if train.noise == "uniform" and "nats_per_dim" in terms:
                    terms["bits_per_dim"] = bits_per_dim(terms["nats_per_dim"])
                log.add(terms)
            loss = float(mean_over_processes(loss))
            if not math.isfinite(loss):
                raise Diverged(f"step {state.step}: the loss is not finite ({loss}); "
                               f"{checkpoint.file} still holds step {checkpoint.saved}: continue "
                               "from it with --resume and a new --seed, or start again with a "
                               "lower --lr")
            norm = float(torch.nn.utils.clip_grad_norm_(params, train.clip or math.inf))

            # 3. The update, unless the gradient is an outlier.
            limit = math.inf
            if train.guard and len(state.norms) >= 50:
                limit = train.guard * statistics.median(state.norms)
            if math.isfinite(norm) and norm <= limit:
                for opt in opts:
                    opt.step()
                state.norms = (state.norms + [norm])[-100:]
                state.outliers = 0
                if ema is not None:
                    ema.update(state.step + 1)
            else:
                state.skipped += 1
                state.outliers += 1
                if state.outliers == 20:
                    raise Diverged(f"step {state.step}: 20 steps in a row were skipped, because "
                                   f"their gradient norms (now {norm:.3g}) were not finite or "
                                   f"above the limit of {limit:.3g}; start again with a lower "
                                   "--lr, or with --guard 0")
            for opt in opts:
                opt.zero_grad()
            state.step += 1

            # 4. Log, save, draw.
            step = state.step
            last = step == train.steps
            log.add({"grad_norm": torch.tensor(norm, device=device)})
            if last or step in (1, 2, 5, 10, 20) or step % args.log_every == 0:
                log.report(step, train.batch_size, dict(lr=lr, sigma=sigma, skipped=state.skipped))
            with log.paused():
                if last or step % args.save_every == 0:
                    checkpoint.save()
                draw = last or (args.sample_every and step % args.sample_every == 0)
                validate = last or (args.val_every and step % args.val_every == 0)
                if draw or validate:
                    validate_and_draw(model, split, train, state, ema, log, out, draw, validate)
                    net.train()
        if state.step > checkpoint.saved:
            checkpoint.save()
    leave()
    if stop.number:
        if rank == 0:
            print(f"stopped at step {state.step}, saved; continue with: python train.py --resume "
                  f"--out {out}", file=sys.stderr)
        sys.exit(128 + stop.number)
    if rank == 0:
        print(f"done: see {out / 'samples.png'}; more samples with: python sample.py {out}")


def absolute(data: str) -> str:
    """The path of the data made absolute, so that a run can be resumed from any folder."""
    if data.partition(":")[0] in ("digits", *KNOWN):
        return data
    path = expanded(data)
    return str(path.resolve()) if path.exists() else data


def new_model(name: str, config, dataset, train: Train, device: torch.device) -> torch.nn.Module:
    """A new model from the seed; its fit() sees up to 4,000 images with the noise of step 0."""
    torch.manual_seed(train.seed)
    model = build(name, config)
    if hasattr(model, "fit"):
        places = np.linspace(0, len(dataset) - 1, min(len(dataset), 4000)).astype(np.int64)
        images, _ = dataset.batch(places)
        generators = image_generators(train.seed, places, torch.device("cpu"))
        model.fit(dequantize(images, train.noise, noise_at(train, 0), generators))
    return model.to(device)


def validate_and_draw(model, split, train: Train, state: RunState, ema: EMA | None, log: Log,
                      out: Path, draw: bool, validate: bool) -> None:
    """Logs the held-out likelihood and draws samples.png, with the averaged weights if --ema is on.

    All processes share the work. The likelihood is of up to 500 held-out images with the noise of
    the end of training, so it lies below the training loss as long as training uses more noise.
    """
    model.eval()
    likelihood = hasattr(model, "log_prob") and train.noise != "none" and not state.distill
    with ema.applied() if ema is not None else contextlib.nullcontext():
        if validate and likelihood and split.held_out is not None:
            values = evaluate(model, split.held_out, train.noise, train.noise_end, num=500)
            log.write(state.step, {f"val_{key}": value for key, value in values.items()})
        if draw:
            picture = sample_grid(model, train.seed, state.classes)
            if picture is not None:
                write_file(out / "samples.png", lambda file: picture.save(file, "PNG"))


# ----------------------------------------------------------------------------- evaluation
def evaluate_run(args, module, device: torch.device) -> None:
    """--eval: prints the likelihood of the run's held-out images, its test split, or other data."""
    free = ("data", "enlarge", "holdout", "noise", "noise_end")
    fixed = [*given(args, module.Config), *(set(given(args, Train)) - set(free))]
    if fixed or args.preset:
        raise UserError(f"--eval: got {', '.join(sorted(fixed)) or 'preset'}; only "
                        f"{', '.join(free)} may be set; the checkpoint determines the rest")
    model, state = load_run(args.eval, device)
    train = dataclasses.replace(Train(**state.training), **given(args, Train))

    def split_of(holdout: int):
        c = model.config
        return open_split(
            train.data, c.image_size, c.channels, holdout, train.enlarge, classes=state.classes,
            num_classes=c.num_classes, own=getattr(module, "open_images", None))

    holdout = train.holdout
    if args.data is not None and args.holdout is None:
        if split_of(0).digest != state.digest:  # these are not the images of the run
            holdout = 0
    split = split_of(holdout)
    dataset = split.train if split.held_out is None else split.held_out
    rank, _ = join(device)
    if rank == 0:
        print(f"data: {split.summary}; evaluated: {len(dataset)} images", file=sys.stderr)
    result = evaluate(model, dataset, train.noise, train.noise_end, quiet=rank > 0)
    leave()
    if rank == 0:
        if split.held_out is None and split.digest == state.digest:
            warn("the run held out no images (--holdout), so this is the likelihood of its "
                 "training images")
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    run_script(main)
