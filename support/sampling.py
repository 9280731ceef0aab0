"""What scripts do with any model: draw images, put them in a grid, measure held-out likelihood."""
import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from support.cli import Progress, UserError, warn, write_file
from support.data import Images, dequantize, image_generators, quantize
from support.distributed import gather, rank_and_world, share, sum_over_processes


# ----------------------------------------------------------------------------- layers
def layers_of(model: nn.Module) -> list[nn.Module]:
    """The repeated layers that a model lists in layers(), or [] if it has no such method."""
    return model.layers() if hasattr(model, "layers") else []


def prepare_layers(model: nn.Module, compiling: bool, checkpointing: bool = False) -> None:
    """Makes a model's layers compile, recompute activations instead of keeping them, or both.

    The checkpoint wraps the compiled layer; the other way round, the compiler would leave it alone.
    """
    if compiling:  # layers share a graph, but each width and mode counts towards this limit
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for layer in layers_of(model):
        if compiling:
            layer.forward = torch.compile(layer.forward)
        if checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


# ----------------------------------------------------------------------------- CUDA graphs
class Replayed:
    """A function of tensors that a GPU records as one CUDA graph and then replays.

    The first call runs as it is and warms up what it uses, the second is recorded, and later ones
    with arguments of the same shapes are replayed. All others run as they are. A recording holds
    addresses: the function must not wait for the GPU, nor read what changes elsewhere but weights.
    """

    def __init__(self, function: Callable):
        self.function = function
        self.kind = None  # of the arguments of the first call
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *args):
        values, structure = tree_flatten(args)
        kind = [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in values] + [structure]
        if self.kind is None:
            self.kind = kind
            return self.function(*args)
        if kind != self.kind:
            return self.function(*args)
        if self.graph is None:
            self.record(args)
        for mine, new in zip(tensors(self.inputs), tensors(args), strict=True):
            mine.copy_(new)
        self.graph.replay()
        return tree_map_only(Tensor, Tensor.clone, self.outputs)

    def record(self, args: tuple) -> None:
        self.inputs = tree_map_only(Tensor, Tensor.clone, args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.outputs = self.function(*self.inputs)
        self.graph = graph


def tensors(value) -> list[Tensor]:
    """The tensors in a value, which may be a tuple, named or not, of such values."""
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


@contextlib.contextmanager
def replaying(model: nn.Module, on: bool) -> Iterator[None]:
    """Context in which a GPU replays the loops that a model lists in replayable(), if `on`.

    It is for many small kernels in a row, where the time is that of starting them.
    """
    loops = model.replayable() if on and hasattr(model, "replayable") else []
    for part, name in loops:
        vars(part)[name] = Replayed(getattr(part, name))
    try:
        yield
    finally:
        for part, name in loops:
            del vars(part)[name]


# ----------------------------------------------------------------------------- drawing images
def sample_images(
    model: nn.Module, labels: Tensor, options, seed: int, batch_size: int, start: int = 0,
    progress: Progress | None = None, log_prob: bool = False, graphs: bool = True,
) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
    """Draws an image for each label; options is an instance of the model's Sampling.

    Yields batches: numbers (b,) int64, images (b, H, W, C), and with log_prob the fields of
    model.log_prob, each (b,) in nats. Images are uint8, or float32 where the model was trained on
    floats. Image i depends on (seed, start + i) and its label alone, not on batch_size. Images that
    are not finite are left out; a warning at the end counts them. With graphs a GPU replays what it
    can, see `Replayed`.
    """
    device = device_of(model)
    lost = 0
    with replaying(model, graphs and device.type == "cuda"):
        for i in range(0, len(labels), batch_size):
            y = labels[i:i + batch_size].to(device)
            numbers = np.arange(start + i, start + i + len(y))
            with torch.no_grad():
                x = model.sample(y, options, image_generators(seed, numbers, device))
                finite = x.isfinite().flatten(1).all(1)
                lost += int((~finite).sum())
                x = x[finite]
                log_p = model.log_prob(x, y[finite])._asdict() if log_prob else {}
            images = (x if has_floats(model) else quantize(x)).permute(0, 2, 3, 1).cpu().numpy()
            log_p = {name: values.cpu().numpy() for name, values in log_p.items()}
            yield numbers[finite.cpu().numpy()], images, log_p
            if progress is not None:
                progress(i + len(y))
    if lost:
        warn(f"{lost} of {len(labels)} samples were not finite and are left out; has the model "
             "diverged?", everywhere=True)


def draw_together(
    model: nn.Module, labels: Tensor, options, seed: int, batch_size: int, log_prob: bool = False,
    graphs: bool = True, quiet: bool = True,
) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
    """sample_images with all processes, each its share: rank 0 gets the batches of all of them.

    Every process must go through the whole iterator.
    """
    _, world = rank_and_world()
    mine = share(len(labels))
    made = sample_images(
        model, labels[mine.start:mine.stop], options, seed, batch_size, mine.start,
        Progress("sampled", len(mine), quiet), log_prob, graphs)
    rounds = math.ceil(math.ceil(len(labels) / world) / batch_size)
    for _ in range(rounds + 1):  # the last one is empty: it ends `made`
        for batch in gather(next(made, None)):
            if batch is not None:
                yield batch


def has_floats(model: nn.Module) -> bool:
    """Whether a model was trained on floats, such as latents, which are not rounded to pixels."""
    return getattr(model, "floats", False)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def default_labels(num: int, num_classes: int, conditions: Tensor | None = None) -> Tensor:
    """All classes in turn -> (num,) int64; the null label 0 for an unconditional model.

    With conditions (m, k), a model's vectors instead of classes, all of these in turn: (num, k).
    """
    numbers = torch.arange(num)
    if conditions is not None:
        return conditions[numbers % len(conditions)]
    return numbers % max(num_classes, 1)


def picture_classes(num_classes: int) -> list[int]:
    """The classes to show in a picture: all, or ten if there are more than 20; [0] without any."""
    if num_classes > 20:
        return [i * num_classes // 10 for i in range(10)]
    return list(range(max(num_classes, 1)))


def class_names(classes: list[int], names: list[str] | None, num_classes: int) -> list[str] | None:
    """What to write beside the rows of these classes; None for a model without classes."""
    if num_classes == 0:
        return None
    names = names or []
    known = [*names, *map(str, range(len(names), num_classes)), "null"]
    return [known[c] for c in classes]


def check_options(options, extra: dict) -> None:
    """Checks --denoise against the noise that training ended with, which `extra` records."""
    sigma = getattr(options, "denoise", 0)
    training = extra.get("training")
    if not sigma or not training:
        return
    if training["noise"] != "gaussian":
        raise UserError(f"--denoise: got {sigma}, but this model was trained with "
                        f"{training['noise']} noise; expected 0, since only gaussian noise of a "
                        "known std can be removed")
    if sigma != training["noise_end"]:
        warn(f"--denoise: got {sigma}, but training ended with noise of std "
             f"{training['noise_end']}; expected that value")


def in_use(model: nn.Module, options) -> str:
    """The settings of sampling that matter most, as far as the model has them."""
    names = [name for name in ("guidance", "denoise", "inverse") if hasattr(options, name)]
    values = {name: getattr(options, name) for name in names}
    if values.get("inverse") == "auto":
        values["inverse"] = "exact" if getattr(model, "student", None) is None else "student"
    return ", ".join(f"{name} {value}" for name, value in values.items())


# ----------------------------------------------------------------------------- pictures
def can_be_shown(model: nn.Module) -> bool:
    """Whether the model's images are pictures, not latents."""
    return model.config.channels in (1, 3)


def shown(images: np.ndarray) -> np.ndarray:
    """The images as uint8: floats about [-1, 1] are quantised."""
    return images if images.dtype == np.uint8 else quantize(torch.from_numpy(images)).numpy()


def placed(batches: Iterable[tuple], num: int, config) -> np.ndarray:
    """Batches of draw_together as `num` pictures in order, black where a sample is missing."""
    size = config.image_size
    pictures = np.zeros((num, size, size, config.channels), np.uint8)
    for numbers, images, _ in batches:
        pictures[numbers] = shown(images)
    return pictures


def grid(rows: Sequence[np.ndarray], row_labels: list[str] | None = None,
         column_labels: list[str] | None = None, corner: str = "") -> Image.Image:
    """Rows of uint8 images, each (n, H, W, C) with its own n, as one picture; enlarged if small.

    Row labels stand on the left, column labels on top, and `corner` where they meet.
    """
    _, H, W, C = rows[0].shape
    scale = math.ceil(48 / H)
    width = W * scale + 2
    height = H * scale + 2
    columns = max(len(row) for row in [*rows, column_labels or []])
    left = 0
    if row_labels or corner:
        left = 8 + 7 * max(len(label) for label in [corner, *(row_labels or [])])
    top = 14 if column_labels else 0
    picture = Image.new("RGB", (left + columns * width, top + len(rows) * height), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            tile = Image.fromarray(image[..., 0] if C == 1 else image)
            tile = tile.resize((W * scale, H * scale), Image.Resampling.NEAREST)
            picture.paste(tile, (left + x * width, top + y * height))
    write = ImageDraw.Draw(picture).text
    write((4, top / 2), corner, fill="black", anchor="lm")
    for y, label in enumerate(row_labels or []):
        write((4, top + (y + 0.5) * height), label, fill="black", anchor="lm")
    for x, label in enumerate(column_labels or []):
        write((left + (x + 0.5) * width, top / 2), label, fill="black", anchor="mm")
    return picture


def sample_grid(model: nn.Module, seed: int, names: list[str] | None = None,
                conditions: Tensor | None = None) -> Image.Image:
    """A picture of samples, a row of ten for each class, drawn as the model's config says.

    Every process draws its share, and rank 0 gets them all. An image that is not finite is black.
    """
    c = model.config
    classes = picture_classes(c.num_classes)
    labels = torch.tensor(classes) if c.num_classes else default_labels(5, 0, conditions)
    labels = labels.repeat_interleave(10, 0)
    pictures = placed(draw_together(model, labels, c.sampling, seed, 100), len(labels), c)
    rows = np.split(pictures, len(labels) // 10)
    return grid(rows, class_names(classes, names, c.num_classes))


def data_sheet(images: Images, names: list[str] | None, num_classes: int) -> Image.Image:
    """A picture of training images (uint8), a row of ten for each class that sample_grid shows."""
    classes = picture_classes(num_classes)
    places = np.array_split(np.arange(len(images)), 5)
    if num_classes:
        places = [np.flatnonzero(images.labels == c) for c in classes]
    rows = []
    for row in places:
        some = row[np.linspace(0, len(row) - 1, min(len(row), 10)).astype(int)]
        rows.append(images.batch(some)[0].permute(0, 2, 3, 1).numpy())
    return grid(rows, class_names(classes, names, num_classes))


def write_picture(path: str | Path, picture: Image.Image) -> None:
    """Writes a picture as a PNG."""
    write_file(path, lambda file: picture.save(file, "PNG"))


# ----------------------------------------------------------------------------- likelihood
@torch.no_grad()
def evaluate(model: nn.Module, images: Images, noise: str, sigma: float,
             num: int | None = None, quiet: bool = True) -> dict:
    """Likelihood of images, or of `num` of them spread evenly, in float32, over all processes.

    nats_per_dim and the parts of `model.log_prob` are negative log-likelihoods, logdet is
    log|det|; all are divided by D, the number of values of an image. Each image has its own fixed
    noise. bits_per_dim is given only for uniform noise (rgb ends as that), where it is an upper
    bound for the 8-bit data. Raises UserError for a model without log_prob, or without noise.
    """
    if not hasattr(model, "log_prob"):
        raise UserError(f"{model.model_name} has no likelihood; score its samples with fid.py")
    if noise == "none" and not has_floats(model):
        raise UserError("--noise: got none, expected gaussian or uniform, since 8-bit values "
                        "without noise have no density")
    if noise == "rgb":
        noise = "uniform"
    device = device_of(model)
    places = np.arange(len(images))
    if num is not None:
        places = places[::max(1, math.ceil(len(places) / num))]
    n = len(places)
    part = share(n)
    mine = places[part.start:part.stop] if part else places[:1]  # one at least, to know the parts
    progress = Progress("evaluated", len(mine), quiet)
    sums = 0
    for i in range(0, len(mine), 50):
        some = mine[i:i + 50]
        pixels, labels = images.batch(some)
        generators = image_generators(1, images.numbers[some], device)
        x = dequantize(pixels.to(device), noise, sigma, generators)
        conditional = model.config.num_classes or labels.is_floating_point()
        log_p = model.log_prob(x, labels.to(device) if conditional else None)
        values = torch.stack(list(log_p)).double() / x[0].numel()  # (parts, b)
        sums = sums + torch.stack([values.sum(1), values.square().sum(1)])  # (2, parts)
        progress(i + len(some))
    sums = sum_over_processes(sums if part else torch.zeros_like(sums))
    mean, square = (sums / n).tolist()
    total = log_p._fields.index("total")
    error = math.sqrt(max(square[total] - mean[total] ** 2, 0) / max(n - 1, 1))
    parts = {name: value if name == "logdet" else 0.0 - value  # no -0.0
             for name, value in zip(log_p._fields, mean, strict=True)}
    result = dict(nats_per_dim=parts.pop("total"), standard_error=error, images=n, **parts)
    result["noise"] = noise if noise != "gaussian" else f"gaussian, sigma {sigma:g}"
    if noise == "uniform":
        result["bits_per_dim"] = bits_per_dim(result["nats_per_dim"])
        result["bits_standard_error"] = error / math.log(2)
    return result


def bits_per_dim(nats_per_dim):
    """Bits for the 8-bit data from nats for x = (x_int + u)/128 - 1: log2(128) = 7 bits more."""
    return nats_per_dim / math.log(2) + 7
