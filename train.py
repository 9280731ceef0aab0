"""Train FARMER, evaluate its likelihood, or distil its flow into a one-step student.

    python train.py                                                        # the built-in digits, a few minutes on a CPU
    python train.py --preset cifar10 --data cifar10.zip --out runs/cifar   # a .zip or folder of class folders, or an .npz
    python train.py --resume --out runs/cifar                              # go on exactly where it stopped
    python train.py --eval runs/cifar --data cifar10.zip                   # held-out likelihood
    python train.py --distill runs/cifar                                   # one-step student, into runs/cifar-student
    torchrun --nproc_per_node=8 train.py --preset farmer-1.1b-p16 --data imagenet/train
"""
import contextlib
import dataclasses
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from farmer import PRESETS, Config, Farmer, Layer, UserError, checkpoint_path, dequantize, from_weights, load, patchify, write_checkpoint
from sample import (
    Parser,
    Progress,
    add_fields,
    compile_layers,
    duration,
    given,
    image_generators,
    init_distributed,
    leave_distributed,
    pick_device,
    run,
    sample_grid,
    write_file,
)
from support.images import ImageDataset, batches, cache_images, check_images, digits, hold_out, open_images


# ---------------------------------------------------------------------------------------------------------------------- training settings
@dataclass(frozen=True)
class Train:
    """What a run does besides the model: with Config, all that decides its result. Kept in the checkpoint."""
    data: str = field(default="digits", metadata={"help": "digits (built in), a folder, a .zip or an .npz"})
    steps: int = field(default=1000, metadata={"help": "optimizer steps"})
    batch_size: int = field(default=64, metadata={"help": "images per step over all devices"})
    noise: str = field(default="gaussian", metadata={"help": "gaussian (annealed, section 3.2) or uniform (for bits/dim)"})
    noise_start: float = field(default=0.1, metadata={"help": "std of the gaussian noise at the first step"})
    noise_end: float = field(default=0.005, metadata={"help": "and at the last"})
    lr: float = field(default=1e-3, metadata={"help": "peak learning rate"})
    lr_end: float = field(default=0.01, metadata={"help": "learning rate at the end, as a part of the peak"})
    warmup: int = field(default=100, metadata={"help": "steps of linear warm-up"})
    weight_decay: float = field(default=0.03, metadata={"help": "on matrices only"})
    clip: float = field(default=1.0, metadata={"help": "gradient norm above which gradients are scaled down; 0 = off"})
    label_drop: float = field(default=0.1, metadata={"help": "part of the labels replaced by the null class, for guidance"})
    flip: bool = field(default=True, metadata={"help": "mirror half of the images"})
    enlarge: bool = field(default=False, metadata={"help": "bring images smaller than image_size up to it, as ADM does, instead of refusing them"})
    holdout: int = field(default=0, metadata={"help": "images per class, the last by name, kept out of training for --eval"})
    ema: float = field(default=0.0, metadata={"help": "decay of the averaged weights that are then used for sampling; 0 = off"})
    guard: float = field(default=10.0, metadata={"help": "skip a step whose gradient norm exceeds this many running medians; 0 = off"})
    distill_noise: float = field(default=0.3, metadata={"help": "student: largest std of the noise on its input (3.5)"})
    seed: int = field(default=0, metadata={"help": "of weights, data order, noise and label drop"})

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.type in (int, float) and (not math.isfinite(value) or value < (1 if f.name in ("steps", "batch_size") else 0)):
                raise UserError(f"{f.name}: got {value}, expected a finite number >= {1 if f.name in ('steps', 'batch_size') else 0}")
        if self.noise not in ("gaussian", "uniform"):
            raise UserError(f"noise: got {self.noise!r}, expected gaussian or uniform")
        if self.seed >= 2**63:
            raise UserError(f"seed: got {self.seed}, expected an integer below 2^63")
        for name in ("label_drop", "ema"):
            if getattr(self, name) >= 1:
                raise UserError(f"{name}: got {getattr(self, name)}, expected 0 to below 1")


_paper = Train(steps=200_200, batch_size=2048, lr=1e-4, warmup=5000, data="imagenet/train", enlarge=True)  # 320 epochs of ImageNet
RUNS = {
    "tiny": Train(steps=2500, batch_size=32, lr=3e-3, noise_end=0.05, flip=False),
    "cifar10": Train(steps=100_000, batch_size=128, lr=1e-3, warmup=1000, noise="uniform", holdout=500, data="cifar10_train.zip"),
    "imagenet64": Train(steps=300_000, batch_size=256, lr=3e-4, warmup=2000, noise="uniform", data="imagenet/train", enlarge=True),
    **{name: _paper for name in PRESETS if name.startswith("farmer-")},
}


def sigma_at(train: Train, step: int) -> float | None:
    """Std of the dequantisation noise: noise_start to noise_end by cosine over training (3.2); None = uniform."""
    if train.noise == "uniform":
        return None
    return train.noise_end + (train.noise_start - train.noise_end) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / train.steps)))


def lr_at(train: Train, step: int) -> float:
    """Linear warm-up times a cosine from lr to lr lr_end."""
    warm = min(1.0, (step + 1) / max(1, train.warmup))
    return train.lr * warm * (train.lr_end + (1 - train.lr_end) * 0.5 * (1 + math.cos(math.pi * step / train.steps)))


def dequantized(images: torch.Tensor, uid: torch.Tensor, seed: int, sigma: float | None) -> torch.Tensor:
    """uint8 (b, C, H, W) -> floats; the noise of a sample depends on (seed, uid) alone, whatever the batch, device count and resume."""
    draw = torch.rand if sigma is None else torch.randn
    noise = torch.stack([draw(images.shape[1:], generator=g, device=images.device) for g in image_generators(seed, uid.tolist(), images.device)])
    return dequantize(images, noise, sigma)


def dropped(labels: torch.Tensor, uid: torch.Tensor, train: Train, null: int) -> torch.Tensor:
    """Labels with a part label_drop replaced by the null class, decided by (seed, uid)."""
    drop = [np.random.default_rng([train.seed, int(g), 2]).random() < train.label_drop for g in uid]
    return torch.where(torch.tensor(drop, device=labels.device), null, labels)


def bf16_is_fast(device: torch.device) -> bool:
    """CUDA GPUs from Ampere on, and CPUs with AMX; elsewhere bf16 is emulated, up to 100 times slower."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


# ---------------------------------------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(model: Farmer, dataset: ImageDataset, indices: np.ndarray, train: Train, rank: int = 0, world: int = 1, quiet: bool = True) -> dict:
    """Held-out likelihood in float32: nats/dim = informative + redundant - logdet, the standard error over images, bits/dim.

    nats_per_dim, informative and redundant are negative log-likelihoods, logdet is log|det|; all are divided by the D numbers of an image.
    Image i has fixed noise. bits/dim = NLL / (D ln 2) + 7 is given for uniform noise only: it bounds that of the 8-bit data (section 9).
    """
    c, device = model.config, model.flow.mean.device
    D = c.num_tokens * c.token_dim
    mine, sums = indices[rank::world], torch.zeros(5, 2, dtype=torch.float64)
    progress = Progress("evaluated", len(mine), quiet)
    for i in range(0, len(mine), 50):
        images, labels = (t.to(device) for t in dataset.batch(mine[i:i + 50]))
        x = dequantized(images, torch.from_numpy(mine[i:i + 50]), 1, sigma_at(train, train.steps))
        parts = -torch.stack(model.log_prob(x, labels if c.num_classes else None)).double().cpu() / D  # (4, b)
        sums[:4] += torch.stack([parts.sum(1), parts.square().sum(1)], 1)
        sums[4] += parts.shape[1]
        progress(i + parts.shape[1])
    if world > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
        sums = sums.cpu()
    n = sums[4, 0].item()
    mean, square = (sums[:4] / n).unbind(1)
    error = ((square[0] - mean[0] ** 2).clamp(min=0) / max(n - 1, 1)).sqrt().item()
    result = dict(images=int(n), nats_per_dim=mean[0].item(), standard_error=error, informative=mean[1].item(), redundant=mean[2].item(),
                  logdet=-mean[3].item(), noise=train.noise if train.noise == "uniform" else f"gaussian, sigma {train.noise_end:g}")
    if train.noise == "uniform":
        result |= dict(bits_per_dim=mean[0].item() / math.log(2) + 7, bits_standard_error=error / math.log(2))
    return result


# ---------------------------------------------------------------------------------------------------------------------- one run
def parameter_groups(module: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on matrices only (tables of embeddings among them), not on biases and norms."""
    params = [p for p in module.parameters() if p.requires_grad]
    return [dict(params=[p for p in params if p.dim() >= 2], weight_decay=weight_decay), dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]


def prepare(module: torch.nn.Module, device: torch.device, checkpointing: bool) -> None:
    """Per-layer options that change no result: activation checkpointing, and torch.compile on a GPU."""
    for layer in (m for m in module.modules() if checkpointing and isinstance(m, Layer)):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    compile_layers(module, device)


def flops_per_image(c: Config) -> float:
    """Floating point operations of one forward pass: 2 per weight and token, and 4 T W per token and layer for attention."""
    def layers(T: int, W: int, n: int) -> int:
        return n * T * (24 * W**2 + 4 * T * W)
    N, K_I, K_R = c.num_tokens, c.informative_mixtures, c.redundant_mixtures
    flow = c.flow_blocks * (layers(N, c.flow_width, c.flow_layers) + 6 * N * c.token_dim * c.flow_width)
    heads = 2 * c.ar_width * (N * K_I * (1 + 2 * c.informative_dim) + K_R * (1 + 2 * c.redundant_dim) * (c.redundant_dim > 0))
    return flow + layers(N + c.class_tokens, c.ar_width, c.ar_layers) + heads


def dry_run(c: Config, train: Train, micro_batch: int, world: int, checkpointing: bool, fsdp: bool) -> None:
    """Prints what a run would be: config, parameters, memory, arithmetic, steps per epoch."""
    with torch.device("meta"):
        model = Farmer(c)
    flow, prior = (sum(p.numel() for p in m.parameters()) for m in (model.flow, model.prior))
    print(json.dumps({"config": c.to_dict(), "train": dataclasses.asdict(train)}, indent=1))
    print(f"parameters: flow {flow / 1e6:.1f}M, prior {prior / 1e6:.1f}M, total {(flow + prior) / 1e6:.1f}M")
    hidden = c.num_tokens * c.flow_blocks * c.flow_layers * c.flow_width + (c.num_tokens + c.class_tokens) * c.ar_layers * c.ar_width
    state = 16 * (flow + prior) / (world if fsdp else 1) / 2**30  # weight, gradient, two moments in float32
    activations = micro_batch * hidden * (2 if checkpointing else 40) / 2**30  # about 20 bf16 tensors of width W in a layer
    print(f"at {micro_batch} images per device and pass (--micro-batch lowers that)")
    print(f"memory per device, a rough estimate: weights and optimizer {state:.2f} GiB, activations {activations:.2f} GiB")
    print(f"tokens: {c.num_tokens} of {c.token_dim} channels; {flops_per_image(c) / 1e9:.2f} GFLOP per image forward, three times that in training")
    try:
        n = len(training_data(train, c)[1])
        print(f"steps: {train.steps}, {n / train.batch_size:.1f} per epoch of {n} images")
    except UserError as e:
        print(f"steps: {train.steps}, per epoch unknown: {e}")


def training_data(train: Train, c: Config, cache: str | None = None, workers: int = 2) -> tuple[ImageDataset, np.ndarray, ImageDataset, np.ndarray]:
    """(dataset, training indices, dataset, validation indices). The digits have a validation set of their own; elsewhere it is the hold-out."""
    images = digits(4000, c.image_size, c.channels, 0) if train.data == "digits" else open_images(train.data, train.enlarge)
    if c.num_classes:
        if images.labels is None:
            raise UserError(f"{train.data} has no labels, but num_classes is {c.num_classes}; use class folders or --num-classes 0")
        if images.labels.max() >= c.num_classes:
            top = images.labels.max()
            raise UserError(f"{train.data} has labels up to {top}, but num_classes is {c.num_classes}; pass --num-classes {top + 1}")
    if train.data == "digits":
        data, val = (ImageDataset(d, c.image_size, c.channels) for d in (images, digits(500, c.image_size, c.channels, 1)))
        return data, np.arange(len(data)), val, np.arange(len(val))
    if cache:
        first = not dist.is_initialized() or dist.get_rank() == 0
        for build in (True, False) if dist.is_initialized() else (True,):  # process 0 builds while the others wait
            if build == first:
                cached = cache_images(images, c.image_size, c.channels, cache, workers)
            if dist.is_initialized():
                dist.barrier()
        images = cached
    elif images.array is None:
        check_images(images, c.image_size)
    data = ImageDataset(images, c.image_size, c.channels)
    return (data, *(part for i in hold_out(images, train.holdout) for part in (i, data)))[:4]


def full_state(module: torch.nn.Module, optimizer=None) -> tuple[dict, dict]:
    """Weights and optimizer state, gathered from all processes onto rank 0 when they are sharded."""
    options = StateDictOptions(full_state_dict=dist.is_initialized(), cpu_offload=dist.is_initialized())
    return get_model_state_dict(module, options=options), get_optimizer_state_dict(module, optimizer, options=options) if optimizer else {}


class Average:
    """Exponential moving average of the weights; `swap` exchanges it with the weights in the model."""

    def __init__(self, params: list[torch.Tensor], decay: float):
        self.params, self.decay, self.values = params, decay, [p.detach().clone() for p in params]

    @torch.no_grad()
    def update(self):
        for v, p in zip(self.values, self.params, strict=True):
            v.lerp_(p, 1 - self.decay)

    @torch.no_grad()
    def swap(self):
        for v, p in zip(self.values, self.params, strict=True):
            v_old = v.clone()
            v.copy_(p)
            p.copy_(v_old)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="train.py", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, help="model and training settings (default: tiny)")
    parser.add_argument("--out", help="directory of the run (default: runs/PRESET)")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/ckpt.pt; its settings hold, a flag that differs is an error")
    parser.add_argument("--eval", metavar="DIR_OR_CKPT", help="print the held-out likelihood of a trained model")
    parser.add_argument("--distill", metavar="DIR_OR_CKPT", help="train the one-step student of a trained model")
    parser.add_argument("--dry-run", action="store_true", help="print the settings, sizes and memory, and stop")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode images, per device")
    parser.add_argument("--cache", metavar="DIR", help="store the cropped images there once, as one memory-mapped array")
    parser.add_argument("--micro-batch", type=int, help="images per device and pass; gradients accumulate up to batch_size")
    parser.add_argument("--fsdp", action="store_true", help="shard weights and optimizer over the processes (FSDP2)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations instead of keeping them")
    parser.add_argument("--log-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--save-every", type=int, default=500, metavar="STEPS")
    parser.add_argument("--sample-every", type=int, default=500, metavar="STEPS", help="redraw samples.png; 0 = at the end only")
    parser.add_argument("--val-every", type=int, default=500, metavar="STEPS", help="likelihood of up to 500 held-out images; 0 = at the end only")
    parser.add_argument("--keep", type=int, default=0, metavar="N", help="also keep the last N checkpoints as ckpt-STEP.pt")
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events (needs tensorboard)")
    add_fields(parser.add_argument_group("training (default: the preset's)"), Train)
    add_fields(parser.add_argument_group("model (default: the preset's)"), Config)
    args = parser.parse_args(argv)
    for name, least in dict(log_every=1, save_every=1, micro_batch=1, sample_every=0, val_every=0, keep=0, workers=0).items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected at least {least}")
    if sum(map(bool, (args.eval, args.distill, args.dry_run))) > 1:
        raise UserError("--eval, --distill, --dry-run: got more than one, expected one")
    device = pick_device(args.device)
    rank, world = init_distributed(device)
    if args.eval:
        return eval_main(args, device, rank, world)
    out = Path(args.out or (f"{checkpoint_path(args.distill).resolve().parent}-student" if args.distill else f"runs/{args.preset or 'tiny'}"))
    preset, config, train, model, extra = resolve(args, out, device)
    if args.dry_run:
        return dry_run(config, train, args.micro_batch or train.batch_size // world, world, args.checkpointing, args.fsdp)
    train_main(args, out, preset, config, train, model, extra, device, rank, world)


def load_run(path, device: torch.device) -> tuple[Farmer, dict, Train]:
    """`load` for a checkpoint of train.py: it also holds the settings and the state of the run."""
    model, extra = load(path, device)
    if not {"preset", "train", "step", "optimizer", "distill", "fingerprint"} <= extra.keys():
        raise UserError(f"{path}: holds a model but no training run; expected a checkpoint that train.py wrote")
    try:
        return model, extra, Train(**extra["train"])
    except TypeError as e:
        raise UserError(f"{path}: its training settings are of another version ({e}); use the code that wrote it") from e


def resolve(args, out: Path, device: torch.device) -> tuple[str, Config, Train, Farmer | None, dict | None]:
    """The run's settings: preset and flags, or those of the checkpoint that --resume or --distill goes on from."""
    if args.resume and (out / "ckpt.pt").is_file():
        model, extra, train = load_run(out, device)
        preset, config = extra["preset"], model.config
        asked = {**given(args, Config), **given(args, Train), "preset": args.preset or preset, "distill": bool(args.distill or extra["distill"])}
        have = {**config.to_dict(), **dataclasses.asdict(train), "preset": preset, "distill": extra["distill"]}
        for name, value in asked.items():
            if value != have[name]:
                raise UserError(f"--resume: {name} is {have[name]} in {out / 'ckpt.pt'}, but {value} was asked for; leave the flag out or start another --out")
        return preset, config, train, model, extra
    if args.resume:
        print(f"{out} holds no ckpt.pt yet: starting at step 0", file=sys.stderr)
    elif not args.dry_run and (out / "ckpt.pt").exists():
        raise UserError(f"{out} already holds a run; pass --resume to go on with it, or another --out")
    if args.distill:
        model, teacher, base = load_run(args.distill, device)
        if given(args, Config):
            raise UserError(f"--distill: got {', '.join(given(args, Config))}, but a student has its teacher's config; leave the model flags out")
        if model.student:
            raise UserError(f"--distill: {args.distill} has a student already; pass the run that it was distilled from")
        # a fifth of the teacher's steps (the paper: 60 epochs after 280), with the noise that it ended with
        defaults = dataclasses.replace(base, steps=max(1, base.steps // 5), noise_start=base.noise_end)
        return teacher["preset"], model.config, dataclasses.replace(defaults, **given(args, Train)), model, None
    preset = args.preset or "tiny"
    return preset, dataclasses.replace(PRESETS[preset], **given(args, Config)), dataclasses.replace(RUNS[preset], **given(args, Train)), None, None


def eval_main(args, device: torch.device, rank: int, world: int) -> None:
    """--eval: of the training data the held-out part (or the digits' validation set), of other data all of it."""
    fixed = ["preset"] * bool(args.preset) + [*given(args, Config), *sorted(given(args, Train).keys() - {"data", "enlarge", "holdout", "noise", "noise_end"})]
    if fixed:
        raise UserError(f"--eval: got {', '.join(fixed)}; only data, enlarge, holdout, noise and noise_end can be chosen, all else is as in its checkpoint")
    model, _, base = load_run(args.eval, device)
    other = args.data is not None and Path(args.data).resolve() != Path(base.data).resolve()
    train = dataclasses.replace(base, **{**({"holdout": 0} if other else {}), **given(args, Train)})
    data, everything, val, held_out = training_data(train, model.config, args.cache, args.workers)
    result = evaluate(model, val, held_out if len(held_out) else everything, train, rank, world, quiet=rank > 0)
    if rank == 0:
        if not len(held_out) and not other:
            print("warning: the run held nothing out (--holdout), so this is the likelihood of its training images", file=sys.stderr)
        print(json.dumps(result, indent=1))


def make_output(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as e:
        raise UserError(f"{out}: cannot be written ({e.strerror}); pass another --out") from e


def train_main(args, out: Path, preset: str, config: Config, train: Train, model: Farmer | None, extra: dict | None,
               device: torch.device, rank: int, world: int) -> None:
    """The loop. Everything random in step s depends on (seed, s), so a resumed run is the same run, on any number of devices."""
    if train.batch_size % world or (args.micro_batch and train.batch_size // world % args.micro_batch):
        raise UserError(f"batch_size: got {train.batch_size}, expected a multiple of {world} processes x micro-batch {args.micro_batch or 1}")
    if rank == 0:
        make_output(out)
    if args.fsdp and world == 1:
        raise UserError("--fsdp: needs several processes; start with torchrun --nproc_per_node=N train.py ...")
    accumulate = train.batch_size // world // (args.micro_batch or train.batch_size // world)
    data, indices, val, val_indices = training_data(train, config, args.cache, args.workers)
    fingerprint = {"images": len(indices), "first": data.images.names[int(indices[0])], "last": data.images.names[int(indices[-1])]}
    if extra and extra["fingerprint"] != fingerprint:
        raise UserError(f"--resume: the data was {extra['fingerprint']} and is {fingerprint}; restore it, or start another --out")
    distill = bool(args.distill or (extra and extra["distill"]))
    if model is None:
        torch.manual_seed(train.seed)
        model = Farmer(config).to(device)
        if config.linear_map != "none":
            n = np.linspace(0, len(indices) - 1, min(len(indices), 4000)).astype(np.int64)
            x = dequantized(data.batch(indices, n)[0], torch.from_numpy(n), train.seed, sigma_at(train, 0))  # with the starting noise
            model.flow.fit_linear_map(patchify(x, config.patch_size).to(device))
    if distill:
        model.requires_grad_(False)
        net = (model.student or model.new_student()).requires_grad_(True)
    else:
        model.student, net = None, model
    D = config.num_tokens * config.token_dim
    prepare(model, device, args.checkpointing)
    if args.fsdp:
        for layer in (m for m in net.modules() if isinstance(m, Layer)):
            fully_shard(layer)
        fully_shard(net)
    params = [p for p in net.parameters() if p.requires_grad]
    average = Average(params, train.ema) if train.ema else None
    optimizer = torch.optim.AdamW(parameter_groups(net, train.weight_decay), lr=train.lr, betas=(0.9, 0.95), fused=not args.fsdp)
    start, norms, skipped = 0, [], 0
    if extra:
        start, norms, skipped = extra["step"], extra["norms"], extra["skipped"]
        if average:  # the file's weights are the averaged ones
            set_model_state_dict(net, extra["raw_weights"], options=StateDictOptions(full_state_dict=True))
        set_optimizer_state_dict(net, optimizer, extra["optimizer"], options=StateDictOptions(full_state_dict=True))
    ddp = DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None) if world > 1 and not args.fsdp else net
    log = Log(out, start, args.tensorboard) if rank == 0 else None
    if rank == 0:
        for stale in out.glob("*.tmp"):  # of a save that was killed
            stale.unlink()
        print(f"{preset}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {len(indices)} images, steps {start} to {train.steps}, "
              f"{world} x {device}, into {out}", flush=True)

    def weights_to_keep() -> dict:
        """What a checkpoint of now holds: the averaged weights where they are kept, gathered on rank 0; a student's beside its teacher's."""
        if average:
            average.swap()
        weights = {k: v.clone() if average else v for k, v in full_state(net)[0].items()}
        if average:
            average.swap()
        return {**model.state_dict(), **{f"student.{k}": v for k, v in weights.items()}} if distill else weights

    def save_checkpoint(step: int) -> None:
        weights, (raw, state) = weights_to_keep(), full_state(net, optimizer)
        if rank == 0:
            content = dict(preset=preset, train=dataclasses.asdict(train), step=step, optimizer=state, norms=norms, skipped=skipped, distill=distill,
                           fingerprint=fingerprint, **({"raw_weights": raw} if average else {}))
            write_checkpoint(out / "ckpt.pt", config, weights, content)
            if args.keep:
                (out / f"ckpt-{step}.pt").unlink(missing_ok=True)
                try:
                    os.link(out / "ckpt.pt", out / f"ckpt-{step}.pt")  # the next save replaces ckpt.pt, not this one
                except OSError:  # a file system without hard links
                    write_checkpoint(out / f"ckpt-{step}.pt", config, weights, content)
                for old in sorted((p for p in out.glob("ckpt-*.pt") if p.stem[5:].isdigit()), key=lambda p: int(p.stem[5:]))[:-args.keep]:
                    old.unlink()

    def look(step: int, draw: bool, validate: bool) -> None:
        """Redraws samples.png and measures held-out likelihood, with the weights that a checkpoint of now would hold."""
        weights = weights_to_keep()
        if rank == 0:
            kept = from_weights(config, weights)
            if validate and len(val_indices) and not distill:
                log.write(step, {f"val_{k}": v for k, v in evaluate(kept, val, val_indices[::-(-len(val_indices) // 500)], train).items()})
            if draw:
                try:
                    write_file(out / "samples.png", lambda f: sample_grid(kept, config.sampling, train.seed).save(f, "PNG"))
                except UserError as e:
                    print(f"samples.png not drawn at step {step}: {e}", file=sys.stderr)

    stop: list[int] = []

    def on_signal(number, _):
        if stop:
            raise KeyboardInterrupt
        stop.append(number)
        print(f"{signal.Signals(number).name}: saving after this step; once more to leave at once", file=sys.stderr)

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    bf16 = bf16_is_fast(device)
    source = batches(data, indices, global_batch=train.batch_size, start_step=start, seed=train.seed, rank=rank, world=world, workers=args.workers,
                     flip=train.flip)
    if start == 0:
        save_checkpoint(0)
    step, saved, report, logdets, outliers = start, start, [], [], 0
    began = last = time.time()
    try:
        while step < train.steps and not stop:
            sigma, lr = sigma_at(train, step), lr_at(train, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            parts = torch.zeros(4, device=device)  # this step's loss and its parts, over all images of this process
            chunks = list(zip(*(t.chunk(accumulate) for t in next(source)), strict=True))
            for m, (images, labels, uid) in enumerate(chunks):
                images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                x = dequantized(images, uid, train.seed, sigma)
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16), no_sync(ddp, m + 1 < len(chunks), args.fsdp):
                    if distill:
                        with torch.no_grad():
                            states, _ = model.flow.states(patchify(x, config.patch_size))
                        loss = ddp(states, distill_noise(states[-1], uid, train))
                        parts[0] += loss.detach() / accumulate
                    else:
                        y = dropped(labels, uid, train, config.num_classes) if config.num_classes else None
                        log_p = ddp(x, y)
                        loss = -log_p.total.mean() / D
                        parts += torch.stack([-t.detach().mean() for t in log_p]) / (D * accumulate)
                        logdets.append(log_p.logdet.detach() / D)
                    (loss / accumulate).backward()
            status = torch.cat([parts, parts.new_tensor([len(stop)])])
            if world > 1:
                dist.all_reduce(status)
                status /= world
                if status[4] > 0 and not stop:  # a signal that reached another process: all leave after the same step
                    stop.append(signal.SIGTERM)
            values = status[:4].tolist()
            if not math.isfinite(values[0]):
                names = ("loss",) if distill else ("loss", "informative", "redundant", "logdet")
                raise Diverged(f"step {step}: the loss is not finite ({', '.join(f'{n} {v:.4g}' for n, v in zip(names, values, strict=False))}); "
                                f"{out / 'ckpt.pt'} holds step {saved}; resume from it with a new --seed, or start again with a lower --lr or --clip")
            norm = torch.nn.utils.clip_grad_norm_(params, train.clip or math.inf)
            norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
            usual = statistics.median(norms) if len(norms) >= 50 else math.inf
            if math.isfinite(norm) and (not train.guard or norm <= train.guard * usual):
                optimizer.step()
                norms, outliers = (norms + [norm])[-100:], 0
                if average:
                    average.update()
            else:
                skipped, outliers = skipped + 1, outliers + 1
                if outliers == 20:
                    raise Diverged(f"step {step}: 20 steps in a row had gradient norms beyond {train.guard:g} x the usual {usual:.3g} (now {norm:.3g}) "
                                    f"and were skipped; the run has left its good region: start again with a lower --lr, or --guard 0 to go on regardless")
            optimizer.zero_grad()
            step += 1
            report.append((*values, norm))
            if rank == 0 and (step % args.log_every == 0 or step == train.steps):
                now = time.time()
                mean = [sum(column) / len(report) for column in zip(*report, strict=True)]
                line = dict(loss=mean[0]) if distill else dict(nats_per_dim=mean[0], informative=mean[1], redundant=mean[2], logdet=-mean[3])
                if not distill and train.noise == "uniform":
                    line["bits_per_dim"] = mean[0] / math.log(2) + 7
                if logdets:  # Fig. 8: an image with an abnormal log-det is a blurred one
                    line |= dict(logdet_min=torch.cat(logdets).min().item(), logdet_max=torch.cat(logdets).max().item())
                line |= dict(grad_norm=mean[4], lr=lr, sigma=sigma, images_per_s=len(report) * train.batch_size / (now - last), skipped=skipped)
                log.write(step, line, train.steps, (now - began) / (step - start) * (train.steps - step))
                last, report, logdets = now, [], []
            final = step == train.steps
            if final or step % args.save_every == 0:
                save_checkpoint(step)
                saved = step
            draw, validate = ((every and step % every == 0) or final for every in (args.sample_every, args.val_every))
            if draw or validate:
                look(step, draw, validate)
        if step > saved:
            save_checkpoint(step)
    except Diverged:
        raise
    except (UserError, OSError) as e:  # the data or the disk failed, not the weights
        if world == 1 and step > saved:
            save_checkpoint(step)
            saved = step
        raise UserError(f"{e}; {out / 'ckpt.pt'} holds step {saved}: mend that and --resume") from e
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    leave_distributed()
    if stop:
        print(f"stopped at step {step}, saved; go on with: python train.py --resume --out {out}", file=sys.stderr)
        sys.exit(128 + stop[0])


def no_sync(ddp, more: bool, fsdp: bool):
    """While more passes follow, gradients accumulate without being exchanged."""
    if fsdp:
        ddp.set_requires_gradient_sync(not more)
    return ddp.no_sync() if more and isinstance(ddp, DistributedDataParallel) else contextlib.nullcontext()


def distill_noise(Z: torch.Tensor, uid: torch.Tensor, train: Train) -> torch.Tensor:
    """s eps for each image, s ~ U[0, distill_noise], eps ~ N(0, 1) (Algorithm 2); depends on (seed, uid) alone."""
    noise = []
    for g in image_generators(train.seed + 1, uid.tolist(), Z.device):
        s = train.distill_noise * torch.rand((), generator=g, device=Z.device)
        noise.append(s * torch.randn(Z.shape[1:], generator=g, device=Z.device))
    return torch.stack(noise)


class Diverged(UserError):
    """The weights are not worth saving."""


class Log:
    """One line per report on stdout and in log.jsonl. A resumed run first takes off the lines after its checkpoint."""

    def __init__(self, out: Path, start: int, tensorboard: bool):
        self.path = out / "log.jsonl"
        keep = []
        for line in self.path.read_text(errors="replace").splitlines() if start and self.path.exists() else []:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a torn line
                if json.loads(line)["step"] <= start:
                    keep.append(line)
        write_file(self.path, lambda f: f.write("".join(line + "\n" for line in keep).encode()))
        self.board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as e:
                raise UserError("--tensorboard: the package is not installed; pip install tensorboard, or leave the flag out") from e
            self.board = SummaryWriter(str(out))

    def write(self, step: int, values: dict, steps: int | None = None, left: float = 0.0) -> None:
        with self.path.open("a") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")
        short = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items() if v is not None)
        print(f"step {step}{f'/{steps}' if steps else ''}  {short}{f'  {duration(left)} left' if steps else ''}", flush=True)
        for k, v in values.items() if self.board else ():
            if isinstance(v, (int, float)):
                self.board.add_scalar(k, v, step)


if __name__ == "__main__":
    run(main)
