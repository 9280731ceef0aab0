"""Train a model, evaluate its likelihood, or distil it into a student.

    python train.py                                               # the built-in digits, minutes on a CPU: runs/tiny
    python train.py --preset cifar10 --out runs/cifar
    python train.py --resume --out runs/cifar                     # go on exactly where it stopped
    python train.py --eval runs/cifar                             # held-out likelihood
    python train.py --distill runs/cifar                          # one-step student, into runs/cifar-student
    python train.py --model baselines.tarflow                     # another model: the name of its file
    torchrun --nproc_per_node=8 train.py --preset farmer-1.1b-p16 --data imagenet/train
"""
# ruff: noqa: I001  (support.cli comes before torch: Ctrl-C during that import is then no traceback)
from support.cli import Parser, UserError, add_fields, duration, expanded, given, run_script, warn

import dataclasses
import json
import math
import signal
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from support.checkpoint import named_model
from support.data import dequantize, image_generators
from support.distributed import (
    accumulating, join, leave, mean_over_processes, parallel, pick_device, prepare_training,
    training_precision,
)
from support.loader import batches, open_split
from support.log import Clock, Log, Means
from support.optimize import optimizers
from support.run import Average, Diverged, Run, StopSignals, load_run, look, restore, run_directory, saving_on_error
from support.sampling import bits_per_dim, evaluate
from support.start import Start, add_run_flags, build_model, check_processes, check_run_flags, check_terms, compiles
from support.start import dry_run, first_preset, open_data, preset_settings, settings, start_run


# ------------------------------------------------------------------------------------------ settings
def setting(default, text: str, choices: tuple[str, ...] = (), least: float = 0):
    return field(default=default, metadata=dict(help=text, choices=choices, least=least))


@dataclass(frozen=True)
class Train:
    """What a run does besides the model: with the model's Config, all that decides its result."""
    data: str = setting("digits", "digits, fashion-mnist, mnist, cifar10; a folder, .zip, .npz, idx files")
    steps: int = setting(1000, "optimizer steps", least=1)
    batch_size: int = setting(64, "images per step over all devices", least=1)
    lr: float = setting(1e-3, "peak learning rate")
    lr_end: float = setting(0.01, "learning rate at the end, as a part of the peak")
    warmup: int = setting(100, "steps of linear warm-up")
    optimizer: str = setting("adamw", "muon: for the layers' matrices, adamw for the rest", ("adamw", "muon"))
    weight_decay: float = setting(0.03, "on matrices only, tables of embeddings among them")
    clip: float = setting(1.0, "gradient norm above which gradients are scaled down; 0 = off")
    noise: str = setting("gaussian", "of dequantisation: gaussian is annealed, uniform gives bits/dim, rgb is both",
                         ("gaussian", "uniform", "rgb", "none"))
    noise_start: float = setting(0.1, "std of the noise at the first step; rgb: of 255")
    noise_end: float = setting(0.005, "and at the last")
    label_drop: float = setting(0.1, "part of the labels replaced by the null class, for guidance")
    flip: bool = setting(True, "mirror half of the images")
    enlarge: bool = setting(False, "bring smaller images up to image_size, as ADM does, instead of refusing them")
    holdout: int = setting(0, "images per class, the last by name, kept out of training for --eval")
    ema: float = setting(0.0, "decay of the averaged weights that are then kept and sampled from; 0 = off")
    guard: float = setting(10.0, "skip a step whose gradient norm exceeds this many running medians; 0 = off")
    seed: int = setting(0, "of weights, data order, noise and label drop")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, least = getattr(self, f.name), f.metadata["least"]
            if type(value) is not f.type and not (f.type is float and type(value) is int):
                raise UserError(f"{f.name}: got {value!r}, expected a value of type {f.type.__name__}")
            if f.type in (int, float) and not least <= value < (2**63 if f.type is int else math.inf):
                raise UserError(f"{f.name}: got {value}, expected a finite number >= {least}")
            if f.metadata["choices"] and value not in f.metadata["choices"]:
                raise UserError(f"{f.name}: got {value!r}, expected one of {', '.join(f.metadata['choices'])}")
        for name in ("label_drop", "ema"):
            if getattr(self, name) >= 1:
                raise UserError(f"{name}: got {getattr(self, name)}, expected 0 to below 1")


def sigma_at(train: Train, step: int) -> float | None:
    """Std of the dequantisation noise: noise_start to noise_end by cosine over training (3.2); None: no std."""
    if train.noise in ("uniform", "none"):
        return None
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / train.steps)))
    return train.noise_end + (train.noise_start - train.noise_end) * cosine


def lr_at(train: Train, step: int) -> float:
    """Linear warm-up times a cosine from lr to lr * lr_end."""
    warm = min(1.0, (step + 1) / max(1, train.warmup))
    return train.lr * warm * (train.lr_end + (1 - train.lr_end) * 0.5 * (1 + math.cos(math.pi * step / train.steps)))


def dropped(labels: torch.Tensor, uid: torch.Tensor, train: Train, config) -> torch.Tensor:
    """Labels with a part label_drop replaced by the null class, decided by (seed, number of the item) alone."""
    items = uid // getattr(config, "images_per_item", 1)
    drop = [np.random.default_rng([train.seed, int(i), 2]).random() < train.label_drop for i in items]
    return labels.masked_fill(torch.tensor(drop) | (config.num_classes == 0), config.num_classes)


# ------------------------------------------------------------------------------------------ command line
def parse(argv: list[str] | None, name: str, module):
    first = first_preset(module)
    shown = preset_settings(Train, module, first)
    parser = Parser(prog="train.py", description=__doc__)
    parser.add_argument("--model", default=name, metavar="NAME", help="the model's file (default: farmer)")
    parser.add_argument("--preset", choices=module.PRESETS, help=f"model and training settings (default: {first})")
    parser.add_argument("--out", metavar="DIR", help="directory of the run (default: runs/PRESET)")
    parser.add_argument("--resume", action="store_true",
                        help="go on from OUT/ckpt.pt as it was; data (moved), steps, seed and precision may differ")
    add_fields(parser.add_argument_group(f"training (defaults of the preset {first})"), Train, shown)
    add_run_flags(parser)
    model = parser.add_argument_group(f"model (defaults of the preset {first})")
    add_fields(model, module.Config, module.PRESETS[first])
    args = parser.parse_args(argv)
    check_run_flags(args)
    return args


# ------------------------------------------------------------------------------------------ evaluation
def evaluate_run(args, module, device: torch.device) -> None:
    """--eval: of the training data the held-out part, or its test split; of other data its test split, or all of it."""
    free = ("data", "enlarge", "holdout", "noise", "noise_end")
    fixed = sorted(given(args, module.Config)) + sorted(given(args, Train).keys() - set(free))
    if fixed or args.preset:
        raise UserError(f"--eval: got {', '.join(fixed) or 'preset'}; only {', '.join(free)} can be chosen, "
                        "all else is as in its checkpoint")
    model, state = load_run(args.eval, device)
    train = settings(Train, state.training, args.eval)
    other = args.data is not None and expanded(args.data).resolve() != Path(train.data).resolve()
    train = dataclasses.replace(train, **({"holdout": 0} if other else {}), **given(args, Train))
    c = model.config
    size = (c.image_size, c.channels)
    split = open_split(train.data, *size, train.holdout, train.enlarge, args.cache, args.workers, c.num_classes)
    rank, _ = join(device)
    indices = split.val_indices if len(split.val_indices) else split.indices
    result = evaluate(model, split.val, indices, train.noise, train.noise_end, quiet=rank > 0)
    leave()
    if rank == 0:
        if not len(split.val_indices) and not other:
            warn("the run held nothing out (--holdout), so this is the likelihood of its training images")
        print(json.dumps(result, indent=1))


# ------------------------------------------------------------------------------------------ training
def main(argv: list[str] | None = None) -> None:
    name, module = named_model(argv)
    args = parse(argv, name, module)
    device = pick_device(args.device)
    if args.eval is not None:
        return evaluate_run(args, module, device)
    start = start_run(args, name, module, Train, device)
    if args.dry_run:
        return dry_run(args, module, start)
    with run_directory(start.out, resume=args.resume and (start.out / "ckpt.pt").is_file()):
        train_model(args, name, module, device, start)


def train_model(args, name: str, module, device: torch.device, start: Start) -> None:
    """The loop. Everything random in step s depends on (seed, s), so a resumed run is the same run, on any devices."""
    train, state, model, out = start.train, start.state, start.model, start.out

    # Data, before the processes join: one of them may decode for an hour.
    split = open_data(args, start)
    config = start.config
    rank, world = join(device)
    micro_batch = args.micro_batch or train.batch_size // world
    check_processes(args, module, start, world, micro_batch)
    accumulate = train.batch_size // world // micro_batch

    # Model: `net` is what is trained, the model or its student.
    if model is None:
        model = build_model(name, config, split, train, sigma_at(train, 0), device)
    net = model.distiller() if state.distill else model
    prepare_training(model, net, compiles(args, device, net, train), args.checkpointing)
    ddp = parallel(net.train(), device, args.fsdp)
    params = [p for p in net.parameters() if p.requires_grad]
    average = Average(params, train.ema) if train.ema else None
    opts = optimizers(net, train.optimizer, train.lr, train.weight_decay)
    restore(state, model, net, opts, out / "ckpt.pt")

    run = Run(out, model, net, opts, average, state, args.keep, rank)
    if rank == 0:
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{state.preset}: {size:.2f}M parameters, {len(split.indices)} images, steps {state.step} to "
              f"{train.steps}, {world} x {device}, {state.precision}, into {out}", flush=True)
    if state.step == 0:
        run.save()
    log = Log(out, state.step, train.steps, args.tensorboard) if rank == 0 else None
    source = batches(split.data, split.indices, global_batch=train.batch_size, start_step=state.step, seed=train.seed,
                     rank=rank, world=world, workers=args.workers, flip=train.flip,
                     images_per_item=getattr(config, "images_per_item", 1))
    means, norm_sum, outliers, drawn = Means(), 0.0, 0, False
    clock = Clock(state.step)

    with StopSignals() as stop, saving_on_error(run, world):
        while state.step < train.steps and not stop.number:
            step = state.step
            sigma, lr = sigma_at(train, step), lr_at(train, step)
            for group in (group for opt in opts for group in opt.param_groups):
                group["lr"] = lr

            # Gradients of the mean loss over the global batch.
            loss = torch.zeros((), device=device)
            images, labels, uid = next(source)
            for i in range(accumulate):
                part = slice(i * micro_batch, (i + 1) * micro_batch)
                x = images[part].to(device, non_blocking=True)
                y = dropped(labels[part], uid[part], train, config).to(device, non_blocking=True)
                x = dequantize(x, train.noise, sigma, image_generators(train.seed, uid[part].tolist(), device))
                generators = image_generators(train.seed + 1, uid[part].tolist(), device)
                with training_precision(device, state.precision), accumulating(ddp, i + 1 < accumulate):
                    terms = ddp(x, y, generators)
                    check_terms(terms, len(x))
                    mean = terms["loss"].mean() / accumulate
                    mean.backward()
                means.add(terms)
                loss += mean.detach()

            # Every process learns of a loss that is not finite, of a signal, and whether a first picture is due.
            soon = not drawn and args.sample_every > 0 and clock.seconds() > 12
            shared = torch.stack([loss, loss.new_tensor(float(stop.number)), loss.new_tensor(float(soon))])
            loss, number, soon = mean_over_processes(shared).tolist()
            stop.number = stop.number or (signal.SIGTERM if number else 0)
            if not math.isfinite(loss):
                raise Diverged(f"step {step}: the loss is not finite ({loss}); {out / 'ckpt.pt'} holds step "
                               f"{run.saved}; --resume from it with a new --seed, or start again with a lower --lr")
            norm = torch.nn.utils.clip_grad_norm_(params, train.clip or math.inf)
            norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

            # The step, unless the gradient is an outlier.
            usual = statistics.median(state.norms) if len(state.norms) >= 50 else math.inf
            if math.isfinite(norm) and (not train.guard or norm <= train.guard * usual):
                for opt in opts:
                    opt.step()
                state.norms, outliers = (state.norms + [norm])[-100:], 0
                if average:
                    average.update(step + 1)
            else:
                state.skipped, outliers = state.skipped + 1, outliers + 1
                if outliers == 20:
                    raise Diverged(f"step {step}: 20 steps in a row had gradient norms beyond {train.guard:g} x the "
                                   f"usual {usual:.3g} (now {norm:.3g}) and were skipped: start again with a lower "
                                   "--lr, or with --guard 0")
            for opt in opts:
                opt.zero_grad()
            state.step = step = step + 1
            norm_sum += norm

            # Report, save, look.
            final = step == train.steps
            if final or step in (1, 2, 5, 10, 20) or step % args.log_every == 0:
                values = means.take()
                steps, seconds, left = clock.report(step, train.steps)
                if "nats_per_dim" in values and train.noise == "uniform":
                    values |= bits_per_dim(values["nats_per_dim"])
                values |= dict(images_per_s=steps * train.batch_size / seconds, grad_norm=norm_sum / steps)
                values |= dict(lr=lr, sigma=sigma, skipped=state.skipped)
                norm_sum = 0.0
                if log:
                    log.write(step, values, f"{duration(left)} left")
            with clock.paused():
                if final or step % args.save_every == 0:
                    run.save()
                draw = final or soon or (args.sample_every and step % args.sample_every == 0)
                validate = final or (args.val_every and step % args.val_every == 0)
                if draw or validate:
                    look(run, log, split, train, module, draw, validate)
                    drawn = drawn or draw
        if state.step > run.saved:
            run.save()
    leave()
    if stop.number:
        print(f"stopped at step {state.step}, saved; go on with: python train.py --resume --out {out}", file=sys.stderr)
        sys.exit(128 + stop.number)


if __name__ == "__main__":
    run_script(main)
