"""Train a model, continue a run, distil a student, or measure the likelihood of held-out images.

    python train.py                                 # digits, minutes on a CPU, into runs/tiny
    python train.py --preset cifar10 --out runs/cifar
    python train.py --resume --out runs/cifar       # continue exactly where it stopped
    python train.py --eval runs/cifar               # likelihood of held-out images
    python train.py --distill runs/cifar            # one-step student, into runs/cifar-student
    python train.py --model baselines.tarflow       # another model, by the name of its file
    torchrun --nproc_per_node=8 train.py --preset farmer-1.1b-p16 --data imagenet/train
"""
import contextlib
import dataclasses
import json
import math
import signal
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from farmer import check_settings, setting
from support.checkpoints import (
    DEFAULT_MODEL,
    Saved,
    build,
    check_folder,
    checkpoint_path,
    first_preset,
    lock_folder,
    model_file,
    read,
    restore,
    save,
)
from support.cli import (
    Parser,
    UserError,
    duration,
    expanded,
    given,
    is_first,
    reading,
    run_script,
    say,
    warn,
    write_file,
)
from support.data import (
    Split,
    absolute,
    batches,
    dequantize,
    hold_out,
    image_generators,
    open_split,
)
from support.distributed import (
    agreeing,
    bf16_is_fast,
    join,
    leave,
    max_over_processes,
    mean_over_processes,
    pick_device,
    pick_precision,
    rank_and_world,
    training_precision,
)
from support.sampling import (
    bits_per_dim,
    can_be_shown,
    data_sheet,
    evaluate,
    has_floats,
    layers_of,
    prepare_layers,
    sample_grid,
    write_picture,
)


# ----------------------------------------------------------------------------- settings
@dataclass(frozen=True)
class Train:
    """Settings of training: what determines a run's result besides the model's Config."""

    data: str = setting(
        "digits", "digits, fashion-mnist, mnist or cifar10; or a folder, .zip, .npz or idx files")
    steps: int = setting(1000, "optimizer steps", least=1)
    batch_size: int = setting(64, "images per step, over all devices", least=1)
    lr: float = setting(1e-3, "peak learning rate", least=0)
    lr_end: float = setting(0.01, "learning rate at the end, as a fraction of the peak", least=0)
    warmup: int = setting(100, "steps of linear warm-up", least=0)
    optimizer: str = setting(
        "adamw", "muon: Muon for the matrices of the layers, AdamW for the rest",
        choices=("adamw", "muon"))
    weight_decay: float = setting(
        0.03, "weight decay, on matrices only (embeddings included)", least=0)
    clip: float = setting(
        1.0, "gradient norm above which gradients are scaled down; 0 = off", least=0)
    noise: str = setting(
        "gaussian", "noise added to the 8-bit pixels: gaussian, with a std that falls during "
        "training; uniform, one level wide, for bits/dim; rgb, gaussian rounded to whole levels, "
        "with a std that falls too, plus uniform; or none",
        choices=("gaussian", "uniform", "rgb", "none"))
    noise_start: float = setting(
        0.1, "std of the noise at the first step, for pixels in [-1, 1]; for rgb in 8-bit levels",
        least=0)
    noise_end: float = setting(0.005, "std of the noise at the end, in the same units", least=0)
    label_drop: float = setting(
        0.1, "fraction of labels replaced by the null class; guidance needs some", least=0, below=1)
    flip: bool = setting(True, "mirror each image with probability 1/2")
    enlarge: bool = setting(False, "enlarge images smaller than image_size (otherwise an error)")
    holdout: int = setting(
        0, "images of each class, the last by name, to keep for --eval", least=0)
    ema: float = setting(
        0.0, "decay of the moving average of the weights (EMA), which is then saved and used; "
        "0 = off", least=0, below=1)
    guard: float = setting(
        10.0, "skip a step whose gradient norm exceeds its running median by this factor; 0 = off",
        least=0)
    seed: int = setting(
        0, "seed of the weights, the data order, the noise and the dropped labels", least=0,
        below=2**63)

    def __post_init__(self):
        check_settings(self)


@dataclass(frozen=True)
class How:
    """How a run is executed."""

    device: str = setting("auto", "auto = a GPU if there is one", choices=("auto", "cpu", "cuda"))
    precision: str = setting(
        "auto", "precision of matrix products; auto = bfloat16 if it is fast here",
        choices=("auto", "float32", "bfloat16"))
    compile: bool = setting(False, "compile the layers, which takes a minute; on a GPU the default")
    micro_batch: int = setting(
        0, "images per device and pass; gradients are accumulated over batch_size; 0 = no limit",
        least=0)
    checkpointing: bool = setting(
        False, "recompute activations instead of keeping them: less memory, slower")
    log_every: int = setting(50, "steps between lines of the log", least=1)
    save_every: int = setting(500, "steps between checkpoints", least=1)
    sample_every: int = setting(
        500, "steps between updates of samples.png; 0 = only at the end", least=0)
    val_every: int = setting(
        500, "steps between held-out likelihoods; 0 = only at the end", least=0)

    def __post_init__(self):
        check_settings(self)


def cosine(train: Train, step: int) -> float:
    """Falls from 1 at the first step to 0 at the end, over all steps, warm-up included."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, step / train.steps)))


def noise_at(train: Train, step: int) -> float | None:
    """Std of the dequantisation noise at a step: a cosine from noise_start to noise_end (3.2)."""
    if train.noise in ("uniform", "none"):
        return None  # these kinds have no std to set
    return train.noise_end + (train.noise_start - train.noise_end) * cosine(train, step)


def lr_at(train: Train, step: int) -> float:
    """Learning rate at a step: linear warm-up times a cosine from lr to lr * lr_end."""
    warm = min(1.0, (step + 1) / max(1, train.warmup))
    return train.lr * warm * (train.lr_end + (1 - train.lr_end) * cosine(train, step))


def drop_labels(model: nn.Module, labels: Tensor, numbers: Tensor, train: Train) -> Tensor:
    """Replaces a fraction of the labels (b,) or (b, k) by what means no class to the model.

    The seed and the number of an image alone decide whether its label is dropped.
    """
    random = [np.random.default_rng([train.seed, int(n), 2]).random() for n in numbers]
    dropped = torch.tensor(random) < train.label_drop  # (b,)
    if hasattr(model, "drop_labels"):
        return model.drop_labels(labels, dropped)
    return labels.masked_fill(dropped, model.config.num_classes)


# ----------------------------------------------------------------------------- optimizers
def optimizers(net: nn.Module, name: str, lr: float,
               weight_decay: float) -> list[torch.optim.Optimizer]:
    """The optimizers: [AdamW], or for "muon" [AdamW, Muon], Muon for the matrices of the layers.

    Weight decay applies to matrices, including embeddings, but not to biases and norms.
    """
    params = [p for p in net.parameters() if p.requires_grad]
    layers = layers_of(net) if name == "muon" else []
    inside = {p for layer in layers for p in layer.parameters() if p.dim() == 2}
    matrices = [p for p in params if p.dim() >= 2 and p not in inside]
    others = [p for p in params if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=others, weight_decay=0)]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    if name == "adamw":
        return [adamw]
    if not inside:
        raise UserError("--optimizer: got muon, which is for the matrices in a model's layers(), "
                        "but this model has none; use adamw")
    layer_matrices = [p for p in params if p in inside]
    return [adamw, Muon(layer_matrices, lr=lr, weight_decay=weight_decay,
                        adjust_lr_fn="match_rms_adamw")]


class Muon(torch.optim.Muon):
    """torch's Muon orthogonalises in bfloat16; this one in float32 where bfloat16 is emulated.

    On a CPU that has only AVX2, this is 20 times as fast.
    """

    @torch.no_grad()
    def step(self, closure=None):
        if bf16_is_fast(self.param_groups[0]["params"][0].device):
            return super().step(closure)
        with Float32():
            return super().step(closure)


class Float32(TorchFunctionMode):
    """Context in which a copy of a tensor in bfloat16 is a copy in float32 instead."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to = func is Tensor.to and kwargs.get("dtype") is torch.bfloat16  # torch 2.15's form
        if to or func is Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        return func(*args, **kwargs)


class EMA:
    """Exponential moving average of parameters, with decay min(decay, (1 + n) / (10 + n)).

    n counts steps. The second term keeps the start of training from dominating a short run.
    """

    def __init__(self, params: list[Tensor], decay: float):
        """With decay 0 there are no averages, and nothing changes."""
        self.params = params if decay else []
        self.decay = decay
        self.averages = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def update(self, n: int) -> None:
        """Updates the averages after step n, counted from 1."""
        if self.params:
            decay = min(self.decay, (1 + n) / (10 + n))
            torch._foreach_lerp_(self.averages, self.params, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the parameters hold the averages."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        """Exchanges the memory of the parameters and of the averages; nothing is copied."""
        for i, p in enumerate(self.params):
            p.data, self.averages[i] = self.averages[i], p.data


# ----------------------------------------------------------------------------- signals and log
@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Context in which Ctrl-C, SIGTERM and SIGHUP are put on a list, so that the step ends first.

    A second signal interrupts at once. A signal that was ignored when the process started, as
    SIGHUP is under nohup, stays ignored.
    """
    received = []

    def receive(number: int, _) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        with contextlib.suppress(OSError):  # after SIGHUP there may be no terminal
            say(f"{signal.Signals(number).name}: stopping after this step; send it again to quit "
                "now", sys.stderr)

    before = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Log:
    """Writes log.jsonl and lines on stdout, in rank 0; collects means for it in every process."""

    def __init__(self, out: Path, step: int, steps: int):
        """Drops the lines after `step`, where a resumed run goes on."""
        self.file = out / "log.jsonl"
        self.steps = steps
        self.terms: dict[str, list[Tensor]] = {}
        if is_first():
            lines = self.file.read_text().splitlines() if step and self.file.exists() else []
            text = "".join(f"{line}\n" for line in lines if step_of(line) <= step)
            write_file(self.file, lambda f: f.write(text.encode()))

    def add(self, terms: dict[str, Tensor]) -> None:
        """Adds the named values of a pass, tensors of any shape, without waiting for a GPU."""
        for name, values in terms.items():
            self.terms.setdefault(name, []).append(values.detach().float().mean())

    def means(self) -> dict[str, float]:
        """The means of what was added since the last call, over all processes; all call this."""
        means = torch.stack([torch.stack(parts).mean() for parts in self.terms.values()])
        means = dict(zip(self.terms, mean_over_processes(means).tolist(), strict=True))
        self.terms = {}
        return means

    def write(self, step: int, values: dict, note: str = "") -> None:
        """Writes one line to log.jsonl and to stdout."""
        if not is_first():
            return
        with self.file.open("a") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")
        parts = [f"step {step}/{self.steps}"]
        for name, value in values.items():
            if name == "loss" and value == values.get("nats_per_dim"):
                continue  # the same number is printed as nats_per_dim
            parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        print("  ".join([*parts, note]).rstrip(), flush=True)


def step_of(line: str) -> float:
    """The step of a line of log.jsonl; infinity for a line cut short when the run was killed."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf


# ----------------------------------------------------------------------------- how a run begins
@dataclass
class Run:
    """What a run's checkpoint holds besides the model, for --resume to be exact to the bit."""

    preset: str  # name in the model's PRESETS
    training: Train  # in the file a dict
    distill: bool  # the weights in training are those of `model.distiller()`
    precision: str  # float32 or bfloat16, decided when the run began
    classes: list | None = None  # names of the classes; None: they are numbers
    conditions: Tensor | None = None  # (m, k) some of the labels, where these are vectors
    digest: str = ""  # identifies the images, wherever they are stored
    step: int = 0  # optimizer steps done; with the seed it fixes order, noise and label drops
    skipped: int = 0  # steps skipped because their gradient norm was an outlier
    outliers: int = 0  # how many steps in a row have been skipped just now
    minutes: float = 0.0  # of training so far, without saving and drawing
    norms: list = field(default_factory=list)  # gradient norms of the last 100 steps taken
    optimizer: list | None = None  # the state of each optimizer
    raw_weights: dict | None = None  # with EMA: the trained weights; `weights` are the averages


def saved_run(saved: Saved) -> Run:
    """The run that wrote a checkpoint."""
    try:
        run = Run(**saved.extra)
        run.training = Train(**run.training)
    except TypeError:
        raise UserError(f"{saved.file}: holds a model but no training run; expected a checkpoint "
                        "that train.py wrote") from None
    return run


def refuse_changes(args, saved: Saved, run: Run, free: Iterable[str]) -> None:
    """Raises UserError for a flag that differs from a checkpoint, unless it is one of `free`."""
    have = saved.config | vars(run.training) | dict(preset=run.preset, precision=run.precision)
    for name, before in have.items():
        value = getattr(args, name, None)
        if name not in free and value not in (None, "auto", before):
            raise UserError(f"{name} is {before} in {saved.file}, but {value} was asked for; leave "
                            "the flag out, or start a new run with another --out")


def new_run(args, module, precision: str) -> tuple[object, Run]:
    """The preset's settings, overridden by the flags: (the model's Config, Run)."""
    preset = args.preset or first_preset(module)
    config = dataclasses.replace(module.PRESETS[preset], **given(args, module.Config))
    train = Train(**module.TRAINING.get(preset, {}) | given(args, Train))
    if getattr(config.sampling, "denoise", 0):
        # Denoising removes the noise that training ends with, so it follows --noise-end.
        sigma = train.noise_end if train.noise == "gaussian" else 0.0
        sampling = dataclasses.replace(config.sampling, denoise=sigma)
        config = dataclasses.replace(config, sampling=sampling)
    return config, Run(preset, train, distill=False, precision=precision)


def distilled_run(args, saved: Saved, precision: str) -> Run:
    """A student's run: the teacher's settings, but a fifth of its steps and only its last noise."""
    teacher = saved_run(saved)
    train = teacher.training
    refuse_changes(args, saved, teacher, [*vars(train), "precision"])
    if not hasattr(saved.module.Model, "distiller"):
        raise UserError(f"--distill: {saved.module.__name__} has no student; expected a run of "
                        "farmer or of a variant of it")
    if teacher.distill:
        raise UserError(f"--distill: {saved.file} has a student already; pass the run that it was "
                        "distilled from")
    changes = dict(steps=max(1, train.steps // 5), noise_start=train.noise_end)
    train = dataclasses.replace(train, **changes | given(args, Train))
    return Run(teacher.preset, train, distill=True, precision=precision, classes=teacher.classes)


def resumed_run(args, saved: Saved) -> Run:
    """The run as it was saved. Only the data's path, steps and seed may change."""
    run = saved_run(saved)
    refuse_changes(args, saved, run, ("data", "steps", "seed"))
    before = run.training
    train = run.training = dataclasses.replace(before, **given(args, Train))
    if train.seed != before.seed:
        warn(f"seed was {before.seed} and is {train.seed} from step {run.step} on")
    if train.steps != before.steps:
        warn(f"steps was {before.steps} and is {train.steps} from step {run.step} on: as schedules "
             f"run over all steps, lr goes from {lr_at(before, run.step):.3g} to "
             f"{lr_at(train, run.step):.3g} and the std of the noise from "
             f"{noise_at(before, run.step) or 0:.3g} to {noise_at(train, run.step) or 0:.3g}")
    return run


def new_model(module, config, split: Split, run: Run, device: torch.device) -> nn.Module:
    """A new model from the seed, with the classes of the data.

    Without classes there is none to guide towards. The model's fit() sees up to 4,000 images with
    the noise of step 0.
    """
    sampling = config.sampling
    had_classes = module.PRESETS[run.preset].num_classes
    if had_classes and not split.num_classes and getattr(sampling, "guidance", 0):
        warn(f"the images have no classes, so samples are drawn with guidance 0 instead of "
             f"{sampling.guidance:g}")
        sampling = dataclasses.replace(sampling, guidance=0.0)
    config = dataclasses.replace(config, num_classes=split.num_classes, sampling=sampling)
    train = run.training
    torch.manual_seed(train.seed)
    model = build(module.__name__, config)
    if hasattr(model, "fit"):
        images = split.train
        places = np.linspace(0, len(images) - 1, min(len(images), 4000)).astype(np.int64)
        pixels, _ = images.batch(places)
        generators = image_generators(train.seed, places, torch.device("cpu"))
        model.fit(dequantize(pixels, train.noise, noise_at(train, 0), generators))
    return model.to(device)


def begin(args, how: How, module, saved: Saved | None, out: Path, device: torch.device,
          facts: dict):
    """What a run begins with: (Run, Split, model, net, optimizers).

    `net` computes the loss and is trained: the model itself, or the distiller of its student. All
    that a user can do wrong shows here, before the first file is written. `facts` gets what must be
    the same in all processes.
    """
    rank, world = rank_and_world()
    if rank == 0:
        check_folder(out, args.resume)
    precision = pick_precision(how.precision, device)
    num_classes = args.num_classes  # a new model gets as many as this flag says, or the data has
    model = None
    if saved is None:
        config, run = new_run(args, module, precision)
    else:
        run = resumed_run(args, saved) if args.resume else distilled_run(args, saved, precision)
        model = restore(saved, device)
        config = model.config
        num_classes = config.num_classes
    train = dataclasses.replace(run.training, data=absolute(run.training.data))
    run.training = train
    passes = world * (how.micro_batch or 1)
    if train.batch_size % passes:
        raise UserError(f"batch_size: got {train.batch_size}, expected a multiple of {passes}: "
                        "processes times --micro-batch; change one of these")

    split = open_split(
        train.data, config.image_size, config.channels, train.holdout, train.enlarge,
        classes=run.classes, num_classes=num_classes, own=getattr(module, "open_images", None))
    if run.digest not in ("", split.digest):
        raise UserError("--resume: these are not the images that the run began with; pass the "
                        "right --data, or start a new run with another --out")
    run.digest = split.digest
    run.classes = split.classes
    labels = split.train.labels
    if labels is not None and labels.ndim == 2:
        some = np.linspace(0, len(labels) - 1, min(len(labels), 1000)).astype(np.int64)
        run.conditions = torch.from_numpy(labels[some])
    facts |= dict(step=run.step, model=module.__name__, precision=run.precision)
    facts |= vars(train) | dict(data=split.digest)  # which may lie elsewhere on another machine

    if model is None:
        model = new_model(module, config, split, run, device)
    model.floats = split.train.array.dtype != np.uint8
    if run.conditions is not None and train.label_drop and not hasattr(model, "drop_labels"):
        raise UserError(f"label_drop: got {train.label_drop}, but the labels are vectors and the "
                        "model has no drop_labels(labels, mask); expected 0")
    net = model.distiller() if run.distill else model
    if (how.compile or how.checkpointing) and not layers_of(net):
        raise UserError("--compile, --checkpointing: got one of them, but the model lists no "
                        "layers(); leave it out")
    return run, split, model, net, optimizers(net, train.optimizer, train.lr, train.weight_decay)


# ----------------------------------------------------------------------------- training
def train_model(args, how: How, module, saved: Saved | None, out: Path,
                device: torch.device) -> None:
    """Trains to the last step, saving into `out`.

    Everything random in step s depends on (seed, s) alone, so a resumed run is the same run.
    """
    rank, world = rank_and_world()
    file = out / "ckpt.pt"
    facts = {}
    with agreeing(facts):
        run, split, model, net, opts = begin(args, how, module, saved, out, device, facts)
        train = run.training
    with agreeing({}):
        if rank == 0:
            lock = lock_folder(out, args.resume)  # noqa: F841  (held until this function ends)
    micro_batch = how.micro_batch or train.batch_size // world
    passes = train.batch_size // (world * micro_batch)
    compiling = device.type == "cuda" if args.compile is None else args.compile
    prepare_layers(net, compiling, how.checkpointing)
    params = [p for p in net.parameters() if p.requires_grad]
    ddp = net.train()
    if world > 1:  # every process starts from the weights of rank 0
        ddp = DistributedDataParallel(
            net, device_ids=[device.index] if device.type == "cuda" else None,
            forward_sync_buffers=False, gradient_as_bucket_view=True)
    ema = EMA(params, train.ema)
    saved_at = run.step  # the step that ckpt.pt holds

    def save_run() -> None:
        nonlocal saved_at
        if rank == 0:
            extra = vars(run) | dict(
                training=vars(train), optimizer=[opt.state_dict() for opt in opts])
            if train.ema:
                extra["raw_weights"] = model.state_dict()
            with ema.applied():
                save(file, model, **extra)
        saved_at = run.step

    def validate_and_draw(validate: bool, draw: bool) -> None:
        """Likelihood of up to 500 held-out images, with the noise of the end; samples.png."""
        likely = hasattr(model, "log_prob") and train.noise != "none" and not run.distill
        model.eval()
        with ema.applied():
            if validate and likely and split.held_out is not None:
                values = evaluate(model, split.held_out, train.noise, train.noise_end, num=500)
                log.write(run.step, {f"val_{key}": value for key, value in values.items()})
            if draw and can_be_shown(model):
                picture = sample_grid(model, train.seed, run.classes, run.conditions)
                if rank == 0:
                    write_picture(out / "samples.png", picture)
        net.train()

    def due(every: int) -> bool:
        """Whether it is time for what happens at the end and every so many steps (0: not else)."""
        return run.step == train.steps or every > 0 and run.step % every == 0

    if run.step == 0:
        save_run()  # a run that diverges early leaves something to look at
        if rank == 0 and not has_floats(model):
            sheet = data_sheet(split.train, run.classes, model.config.num_classes)
            write_picture(out / "data.png", sheet)
    else:
        with reading(file, "use an older checkpoint"):
            if train.ema:
                model.load_state_dict(run.raw_weights)
            for opt, values in zip(opts, run.optimizer, strict=True):
                opt.load_state_dict(values)
        run.optimizer = run.raw_weights = None
    log = Log(out, run.step, train.steps)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    say(f"data: {split.summary}\n"
        f"{module.__name__} {run.preset}: {size:.2f}M parameters, steps {run.step} to "
        f"{train.steps}, {world} x {device}, {run.precision}, into {out}")
    if compiling:
        say("compiling the layers (about a minute)")

    # The steps.
    order = getattr(model, "epoch_order", getattr(module, "epoch_order", None))
    source = batches(
        split.train, batch_size=train.batch_size, start_step=run.step, seed=train.seed,
        rank=rank, world=world, flip=train.flip, epoch_order=order)
    try:
        with stop_signals() as received, contextlib.closing(source):
            seconds, reported = 0.0, run.step  # of training since the last report, and its step
            while run.step < train.steps:
                start = time.monotonic()
                stopped = max_over_processes(sum(received), device)  # the signal's number
                if stopped:
                    break

                # Learning rate and noise of this step.
                sigma = noise_at(train, run.step)
                lr = lr_at(train, run.step)
                for opt in opts:
                    for group in opt.param_groups:
                        group["lr"] = lr

                # Gradients of the mean loss over the global batch. `numbers` counts the images of
                # the whole run: image j of step s has number s * batch_size + j.
                images, labels, numbers = next(source)
                loss = torch.zeros((), device=device)
                for i in range(passes):
                    part = slice(i * micro_batch, (i + 1) * micro_batch)
                    n = numbers[part]
                    noise = image_generators(train.seed, n, device)
                    x = dequantize(images[part].to(device), train.noise, sigma, noise)
                    y = drop_labels(model, labels[part], n, train).to(device)
                    generators = image_generators(train.seed + 1, n, device)
                    more = world > 1 and i + 1 < passes  # gradients are exchanged in the last pass
                    with training_precision(device, run.precision):
                        with ddp.no_sync() if more else contextlib.nullcontext():
                            terms = ddp(x, y, generators)
                            part_loss = terms["loss"].mean() / passes
                            part_loss.backward()
                    loss += part_loss.detach()
                    if train.noise == "uniform" and "nats_per_dim" in terms:
                        terms["bits_per_dim"] = bits_per_dim(terms["nats_per_dim"])
                    log.add(terms)
                loss = float(mean_over_processes(loss))
                if not math.isfinite(loss):
                    raise UserError(f"step {run.step}: the loss is not finite ({loss}); continue "
                                    "with --resume and a new --seed, or start again with a lower "
                                    "--lr")
                grad_norm = torch.nn.utils.clip_grad_norm_(params, train.clip or math.inf)
                log.add({"grad_norm": grad_norm})
                norm = float(grad_norm)

                # The update, unless the gradient is an outlier.
                limit = math.inf
                if train.guard and len(run.norms) >= 50:
                    limit = train.guard * statistics.median(run.norms)
                if math.isfinite(norm) and norm <= limit:
                    for opt in opts:
                        opt.step()
                    run.norms = (run.norms + [norm])[-100:]
                    run.outliers = 0
                    ema.update(run.step + 1)
                else:
                    run.skipped += 1
                    run.outliers += 1
                    if run.outliers == 20:
                        raise UserError(f"step {run.step}: 20 steps in a row were skipped, because "
                                        f"their gradient norms (now {norm:.3g}) were not finite or "
                                        f"above the limit of {limit:.3g}; start again with a lower "
                                        "--lr, or with --guard 0")
                for opt in opts:
                    opt.zero_grad()
                run.step += 1
                seconds += time.monotonic() - start

                # Log, save, draw.
                step = run.step
                if due(how.log_every) or step in (1, 2, 5, 10, 20):
                    values = log.means() | dict(lr=lr, sigma=sigma, skipped=run.skipped)
                    pace = max(seconds, 1e-9) / (step - reported)  # seconds a step
                    run.minutes += seconds / 60
                    values |= dict(images_per_s=train.batch_size / pace, minutes=run.minutes)
                    log.write(step, values, f"{duration(pace * (train.steps - step))} left")
                    seconds, reported = 0.0, step
                if due(how.save_every):
                    save_run()
                if due(how.val_every) or due(how.sample_every):
                    validate_and_draw(due(how.val_every), due(how.sample_every))
            if run.step > saved_at:
                save_run()
    except (UserError, OSError) as error:
        raise UserError(f"{error}; saved at step {saved_at}, in {file}") from error
    leave()
    if run.step < train.steps:
        say(f"stopped at step {run.step}, saved; continue with: python train.py --resume --out "
            f"{out}", sys.stderr)
        sys.exit(128 + stopped)
    seen = f"see {out / 'samples.png'}; more " if can_be_shown(model) else ""
    say(f"done: {seen}samples with: python sample.py {out}")


# ----------------------------------------------------------------------------- evaluation
def evaluate_run(args, module, saved: Saved, device: torch.device) -> None:
    """--eval: prints the likelihood of the run's held-out images, its test split, or other data."""
    facts = {}
    with agreeing(facts):
        run = saved_run(saved)
        refuse_changes(args, saved, run, ("data", "enlarge", "holdout", "noise", "noise_end",
                                          "precision"))
        train = dataclasses.replace(run.training, **given(args, Train))
        model = restore(saved, device)
        c = model.config
        split = open_split(
            train.data, c.image_size, c.channels, 0, train.enlarge, classes=run.classes,
            num_classes=c.num_classes, own=getattr(module, "open_images", None))
        facts["images"] = split.digest
        own = split.digest == run.digest
        images = split.train if split.held_out is None else split.held_out
        holdout = train.holdout if own else args.holdout
        if holdout:
            _, images = hold_out(split.train, holdout)
    say(f"data: {split.summary}; evaluated: {len(images)} images", sys.stderr)
    result = evaluate(model, images, train.noise, train.noise_end, quiet=False)
    leave()
    if own and images is split.train:
        warn("the run held out no images (--holdout), so this is the likelihood of its training "
             "images")
    say(json.dumps(result, indent=1))


# ----------------------------------------------------------------------------- command line
def output_directory(args) -> Path:
    """--out, or by default runs/PRESET, runs/MODEL-PRESET, or the teacher's folder and -student."""
    if args.out is not None:
        return expanded(args.out)
    if args.distill is not None:
        teacher = checkpoint_path(args.distill).resolve()
        teacher = teacher.parent if teacher.name == "ckpt.pt" else teacher.with_suffix("")
        return teacher.with_name(f"{teacher.name}-student")
    name = args.model or DEFAULT_MODEL
    preset = args.preset or first_preset(model_file(name))
    prefix = "" if name == DEFAULT_MODEL else name.rpartition(".")[2] + "-"
    return Path("runs", prefix + preset)


def main(argv: list[str] | None = None) -> None:
    # First the flags that decide which others there are: those of a model, with a preset's values.
    parser = Parser(prog="train.py", description=__doc__, usage="python train.py [options]",
                    add_help=False)
    parser.add_argument("--model", metavar="NAME",
                        help=f"name of the model's file (default: {DEFAULT_MODEL})")
    parser.add_argument("--preset", metavar="NAME", help="model and training settings, see below")
    parser.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/PRESET or "
                        "runs/MODEL-PRESET)")
    parser.add_argument("--resume", action="store_true",
                        help="continue from OUT/ckpt.pt; only --steps, --seed and, if the data has "
                        "moved, --data may change")
    parser.add_argument("--eval", metavar="DIR_OR_CKPT",
                        help="print the held-out likelihood of a trained model; only --data, "
                        "--enlarge, --holdout, --noise and --noise-end may change")
    parser.add_argument("--distill", metavar="DIR_OR_CKPT",
                        help="train the one-step student of a trained model")
    args, _ = parser.parse_known_args(argv)
    if args.eval is not None and args.distill is not None:
        raise UserError("--eval, --distill: got both, expected only one of them")

    # A checkpoint knows its model.
    saved = resuming = None
    if args.eval is not None:
        saved = read(args.eval)
    else:
        out = output_directory(args)
        resuming = args.resume and (out / "ckpt.pt").is_file()
        if resuming:
            saved = read(out)
        elif args.distill is not None:
            saved = read(args.distill)
        if args.resume and not resuming:
            warn(f"{out} holds no ckpt.pt yet: starting at step 0")
    module = saved.module if saved else model_file(args.model or DEFAULT_MODEL)
    if args.model not in (None, module.__name__):
        raise UserError(f"--model: got {args.model}, but {saved.file} holds a model of "
                        f"{module.__name__}; leave the flag out")
    preset = args.preset or first_preset(module)
    if preset not in module.PRESETS:
        raise UserError(f"--preset: got {preset}, expected {', '.join(module.PRESETS)}")

    # Then all flags. One that is not given is None.
    parser.add_argument("-h", "--help", action="help")
    parser.epilog = f"presets: {', '.join(module.PRESETS)}"
    parser.add_settings(f"training (defaults of the preset {preset})",
                        Train(**module.TRAINING.get(preset, {})))
    parser.add_settings(f"model (defaults of the preset {preset})", module.PRESETS[preset])
    parser.add_settings("how it runs (changes results by rounding at most)", How())
    args = parser.parse_args(argv)
    how = How(**given(args, How))
    device = pick_device(how.device)
    join(device)
    if args.eval is not None:
        evaluate_run(args, module, saved, device)
    else:
        args.resume = resuming
        train_model(args, how, module, saved, out, device)


if __name__ == "__main__":
    run_script(main)
