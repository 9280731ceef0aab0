"""Sample from a trained FARMER: a grid picture or an .npz, or with --benchmark the time that each part of sampling takes.

    python sample.py runs/tiny --labels 3,7 --guidance 2 --out threes_and_sevens.png
    python sample.py runs/tiny --num 50000 --out samples.npz
    torchrun --nproc_per_node=8 sample.py runs/tiny -n 50000 --out samples.npz   # -n: torchrun's parser stumbles over --num
"""
import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw

from farmer import Config, Farmer, Layer, Sampling, UserError, load, quantize

COMPILE_FROM = 1000  # images for one GPU: fewer are done before compiling is


# ---------------------------------------------------------------------------------------------------------------------- shared by the scripts
def add_fields(parser: argparse.ArgumentParser, cls: type, skip: tuple[str, ...] = ()) -> None:
    """One flag for each field of a dataclass, --field-name or --field_name, with the help text of the field. No flag = None."""
    for f in dataclasses.fields(cls):
        if f.name not in skip and f.type is not Sampling:
            names = sorted({f"--{f.name.replace('_', '-')}", f"--{f.name}"}, reverse=True)
            kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type, metavar=f.type.__name__.upper())
            parser.add_argument(*sorted(names), dest=f.name, default=None, help=f.metadata.get("help"), **kind)


def given(args: argparse.Namespace, cls: type) -> dict:
    """The fields of a dataclass that the command line sets."""
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(cls) if getattr(args, f.name, None) is not None}


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line and no abbreviated flags."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        print(f"{self.prog}: error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def run(main, argv: list[str] | None = None) -> None:
    """Runs a script: errors that the user can mend are one line on stderr and exit code 2."""
    try:
        main(argv)
        leave_distributed()
    except UserError as e:
        print(f"{Path(sys.argv[0]).name}: error: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:  # a disk that fills, a file that vanishes
        print(f"{Path(sys.argv[0]).name}: error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def pick_device(name: str) -> torch.device:
    """auto = a CUDA GPU when there is one; under torchrun each process takes its own."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: got cuda, but this PyTorch sees no CUDA GPU; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cuda.matmul.allow_tf32 = False  # exact means exact
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def init_distributed(device: torch.device) -> tuple[int, int]:
    """(rank, world size); joins the process group when torchrun started this process."""
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def leave_distributed() -> None:
    """Ends the process group when there is one. A process that just exits while another still talks to it may abort."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def compile_layers(model: torch.nn.Module, device: torch.device, **options) -> None:
    """torch.compile for the Transformer layers on a GPU: one graph serves them all, so start-up stays short. No gain on a CPU (measured)."""
    for layer in model.modules():
        if isinstance(layer, Layer) and device.type == "cuda":
            layer.compile(**options)


def image_generators(seed: int, indices, device: torch.device) -> list[torch.Generator]:
    """One generator per image, seeded by (seed, index) alone."""
    states = [int(np.random.SeedSequence([seed, int(i)]).generate_state(1, np.uint64)[0]) >> 1 for i in indices]
    return [torch.Generator(device).manual_seed(s) for s in states]


class Progress:
    """One line on stderr, rewritten in a terminal, with the time left."""

    def __init__(self, what: str, total: int, quiet: bool = False):
        self.what, self.total, self.quiet, self.start, self.last = what, total, quiet, time.time(), 0.0

    def __call__(self, done: int) -> None:
        now = time.time()
        terminal = sys.stderr.isatty()
        if self.quiet or (now - self.last < (0.5 if terminal else 30) and done < self.total) or now - self.start < 2:
            return
        self.last = now
        left = (now - self.start) / max(done, 1) * (self.total - done)
        print(f"{self.what} {done}/{self.total}, {duration(left)} left", end="\r" if terminal and done < self.total else "\n", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """3700 -> 1:01:40."""
    s = int(seconds)
    return (f"{s // 3600}:{s // 60 % 60:02d}" if s >= 3600 else f"{s // 60}") + f":{s % 60:02d}"


def grid(images: np.ndarray, columns: int, row_labels: list[str] | None = None, scale: int | None = None) -> Image.Image:
    """uint8 images (n, H, W, C) as one picture, row by row, small ones enlarged, with a label left of each row."""
    n, H, W, C = images.shape
    scale = scale or max(1, 48 // H)
    images = np.repeat(images, 3, -1) if C == 1 else images
    margin = 8 + 7 * max(map(len, row_labels)) if row_labels else 0
    rows = -(-n // columns)
    picture = Image.new("RGB", (margin + columns * (W * scale + 2), rows * (H * scale + 2)), "white")
    for i, image in enumerate(images):
        tile = Image.fromarray(image).resize((W * scale, H * scale), Image.Resampling.NEAREST)
        picture.paste(tile, (margin + i % columns * (W * scale + 2), i // columns * (H * scale + 2)))
    for r, label in enumerate(row_labels or []):
        ImageDraw.Draw(picture).text((4, (r + 0.5) * (H * scale + 2)), label, fill="black", anchor="lm")
    return picture


def write_file(path: Path, write) -> None:
    """write(file object) into a temporary file that then takes the name `path`: never a half-written result."""
    try:
        handle, temporary = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror}); choose another place") from e
    try:
        with os.fdopen(handle, "wb") as f:
            write(f)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror}); free some space or choose another place") from e
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


# ---------------------------------------------------------------------------------------------------------------------- sampling
def sample_images(model: Farmer, labels: torch.Tensor, *, seed: int, batch_size: int, guidance: float, start: int = 0,
                  progress: Progress | None = None, options: Sampling | None = None, **inverse) -> Iterator[np.ndarray]:
    """Yields uint8 arrays (b, H, W, C) for labels (num,) in order. Image i depends on (seed, start + i) and its label, not on batch_size.

    options: the other sampling settings; inverse: method, tol, max_steps of `Farmer.decode`. Raises UserError on non-finite pixels.
    """
    device = model.flow.mean.device
    if len(labels) >= COMPILE_FROM:
        compile_layers(model, device)
    for i in range(0, len(labels), batch_size):
        y = labels[i:i + batch_size]
        x = model.sample(y, guidance, image_generators(seed, range(start + i, start + i + len(y)), device), options, **inverse)
        if not x.isfinite().all():
            bad = (start + i + (~x.isfinite().flatten(1).all(1)).nonzero()[:, 0]).tolist()
            raise UserError(f"samples {bad[:8]} are not finite; the model has diverged, or use a lower --guidance or --T-sigma")
        yield quantize(x).permute(0, 2, 3, 1).cpu().numpy()
        if progress:
            progress(i + len(y))


def default_labels(num: int, config: Config) -> torch.Tensor:
    """num labels, all classes in turn; the null label for an unconditional model."""
    return torch.arange(num) % max(config.num_classes, 1)


def parse_labels(text: str, config: Config) -> list[int]:
    try:
        labels = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--labels: got {text!r}, expected integers such as 0,3,7") from None
    if config.num_classes == 0:
        raise UserError(f"--labels: got {text!r} for an unconditional model; leave it out")
    wrong = [y for y in labels if not 0 <= y <= config.num_classes]
    if wrong:
        raise UserError(f"--labels: got {wrong[0]}, expected 0 to {config.num_classes - 1}, or {config.num_classes} for the null class")
    return labels


def sample_grid(model: Farmer, options: Sampling, seed: int, rows: int = 10, columns: int = 10) -> Image.Image:
    """A picture with one row per class (evenly spaced classes where there are more than `rows`)."""
    C = model.config.num_classes
    classes = [i * C // min(rows, C) for i in range(min(rows, C))] if C else [0] * 5
    labels = torch.tensor([y for y in classes for _ in range(columns)])
    images = np.concatenate(list(sample_images(model, labels, seed=seed, batch_size=100, guidance=options.guidance, options=options)))
    return grid(images, columns, [str(y) for y in classes] if C else None)


# ---------------------------------------------------------------------------------------------------------------------- benchmark
def benchmark(model: Farmer, options: Sampling, seed: int, batch_sizes: tuple[int, ...] = (1, 16, 64), repeats: int = 3) -> None:
    """Prints the time of the AR and of each way to invert the flow, medians over interleaved repeats, with each way's error."""
    device, c = model.flow.mean.device, model.config
    n = 512 if device.type == "cuda" else 128
    a, b = torch.randn(2, n, n, device=device)
    gflops = max(2 * n**3 * 20 / timed(lambda: [a @ b for _ in range(20)], device) / 1e9 for _ in range(5))
    print(f"{device}, {torch.get_num_threads()} threads, fp32 matrix products {gflops:.0f} GFLOP/s, {c.num_tokens} tokens x {c.token_dim}, "
          f"guidance {options.guidance:g}, median of {repeats}")
    ways = [("exact", None), *(("parallel", k) for k in (None, 1, 2, 4, 8, 16))]
    if model.student:
        ways += [("student", None), *(("refined", k) for k in (None, 1, 2, 4, 8))]
    for B in batch_sizes:
        labels, generators = default_labels(B, c).to(device), image_generators(seed, range(B), device)
        Z = model.sample_latents(labels, options, generators)
        exact = model.decode(Z, "exact")
        errors = [(model.decode(Z, m, max_steps=k) - exact).abs() for m, k in ways]  # these calls warm up, too
        times = [[timed(lambda m=m, k=k, Z=Z: model.decode(Z, m, max_steps=k), device) for m, k in ways] +
                 [timed(lambda y=labels, g=generators: model.sample_latents(y, options, g), device)] for _ in range(repeats)]
        *flow, prior = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"batch {B}: AR {1000 * prior / B:.2f} ms/image")
        for (m, k), t, error in zip(ways, flow, errors, strict=True):
            print(f"  {m + (f', {k} passes' if k else ''):20s} flow {1000 * t / B:8.2f} ms/image, {flow[0] / t:5.2f}x exact; AR + flow "
                  f"{B / (prior + t):7.1f} images/s, {(prior + flow[0]) / (prior + t):5.2f}x; off exact by max {error.max():.1e}, mean {error.mean():.1e}")


def timed(f, device: torch.device) -> float:
    """Seconds that f takes, with the GPU's queue empty before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="sample.py", description=__doc__)
    parser.add_argument("checkpoint", metavar="DIR_OR_CKPT", help="a run's directory or a .pt file")
    parser.add_argument("-n", "--num", type=int, help="images (default: 10 per label for a picture, else 1000)")
    parser.add_argument("--labels", help="classes to make, in turn, e.g. 0,3,7 (default: all)")
    parser.add_argument("--out", default="samples.png", help="X.png: a grid, one row per label; X.npz: images uint8 (N, H, W, C) and labels")
    parser.add_argument("--batch-size", type=int, default=100, help="images per batch; does not change them")
    parser.add_argument("--inverse", choices=("exact", "parallel", "student", "refined"), help="of the flow (default: student if there is one)")
    parser.add_argument("--tol", type=float, default=1e-4, help="parallel, refined: largest error aimed at")
    parser.add_argument("--max-passes", type=int, help="parallel, refined: stop after so many passes in a block")
    parser.add_argument("--benchmark", action="store_true", help="time the parts of sampling instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add_fields(parser.add_argument_group("sampling (Table 6; default: as in the checkpoint)"), Sampling)
    args = parser.parse_args(argv)
    if args.num is not None and args.num < 1 or args.batch_size < 1 or not 0 <= args.seed < 2**63:
        raise UserError(f"--num, --batch-size, --seed: got {args.num}, {args.batch_size}, {args.seed}; expected at least 1, 1 and 0 (below 2^63)")
    if not args.tol >= 0 or (args.max_passes is not None and args.max_passes < 0):
        raise UserError(f"--tol, --max-passes: got {args.tol}, {args.max_passes}; expected numbers >= 0")
    out = Path(args.out)
    if out.suffix not in (".png", ".npz"):
        raise UserError(f"--out: got {args.out}, expected a name that ends in .png or .npz")
    if not args.benchmark and not out.parent.is_dir():
        raise UserError(f"--out: {out.parent} is not a directory; create it first")
    device = pick_device(args.device)
    rank, world = init_distributed(device)
    model, _ = load(args.checkpoint, device)
    options = dataclasses.replace(model.config.sampling, **given(args, Sampling))
    if args.benchmark:
        compile_layers(model, device)
        return benchmark(model, options, args.seed)
    classes = parse_labels(args.labels, model.config) if args.labels is not None else list(range(max(model.config.num_classes, 1)))
    picture = out.suffix == ".png"
    if picture and len(classes) > 20:
        classes = [classes[i * len(classes) // 10] for i in range(10)]
    num = args.num or (10 * len(classes) if picture else 1000)
    columns = -(-num // len(classes))
    labels = torch.tensor([classes[i // columns] if picture else classes[i % len(classes)] for i in range(num)])
    first, last = rank * num // world, (rank + 1) * num // world  # this process's images
    mine = labels[first:last]
    progress = Progress("sampled", len(mine), quiet=rank > 0)
    start = time.time()
    batches = sample_images(model, mine, seed=args.seed, batch_size=args.batch_size, guidance=options.guidance, start=first, progress=progress,
                            options=options, method=args.inverse, tol=args.tol, max_steps=args.max_passes)
    c = model.config
    images = np.concatenate([np.empty((0, c.image_size, c.image_size, c.channels), np.uint8), *batches])
    if world > 1:
        images = gather_images(images, out, rank, world)
    if rank == 0:
        if picture:
            write_file(out, lambda f: grid(images, columns, [str(y) for y in classes] if c.num_classes else None).save(f, "PNG"))
        else:
            write_file(out, lambda f: np.savez(f, images=images, labels=labels.numpy()))
        print(f"{out}: {num} images in {duration(time.time() - start)}, guidance {options.guidance:g}")


def gather_images(images: np.ndarray, out: Path, rank: int, world: int) -> np.ndarray:
    """Every process's images, in order, on rank 0: they travel as files beside `out`, since 50,000 images do not fit in a message."""
    part = out.with_name(f".{out.name}.part{rank}.npy")
    np.save(part, images)
    dist.barrier()
    if rank == 0:
        parts = [out.with_name(f".{out.name}.part{r}.npy") for r in range(world)]
        images = np.concatenate([np.load(p) for p in parts])
        for p in parts:
            p.unlink()
    dist.barrier()
    return images


if __name__ == "__main__":
    run(main)
