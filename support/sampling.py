"""What scripts do with any model: draw images, put them in a grid, measure held-out likelihood."""
import math
import sys
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from support.batches import ImageDataset, dequantize, image_generators, quantize
from support.cli import Progress, UserError, warn
from support.distributed import gather, share, sum_over_processes
from support.training import prepare_layers

COMPILE_FROM = 1000  # images per GPU: drawing fewer takes less time than compiling


# ----------------------------------------------------------------------------- drawing images
def sample_images(
    model: nn.Module, labels: Tensor, options, seed: int, batch_size: int, start: int = 0,
    progress: Progress | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray, Tensor]]:
    """Draws an image for each label; options is an instance of the model's Sampling.

    Yields batches: numbers (b,) int64, images (b, H, W, C) uint8, and the same images as floats
    (b, C, H, W). Image i depends on (seed, start + i) and its label alone, not on batch_size.
    Images that are not finite are left out; a warning at the end counts them.
    """
    device = device_of(model)
    lost = 0
    if len(labels) >= COMPILE_FROM and device.type == "cuda":
        print("compiling the layers (about a minute)", file=sys.stderr, flush=True)
        prepare_layers(model, compiling=True)
    for i in range(0, len(labels), batch_size):
        y = labels[i:i + batch_size].to(device)
        numbers = np.arange(start + i, start + i + len(y))
        with torch.no_grad():
            x = model.sample(y, options, image_generators(seed, numbers, device))
        finite = x.isfinite().flatten(1).all(1)
        lost += int((~finite).sum())
        x = x[finite]
        images = quantize(x).permute(0, 2, 3, 1).cpu().numpy()
        yield numbers[finite.cpu().numpy()], images, x
        if progress is not None:
            progress(i + len(y))
    if lost:
        warn(f"{lost} of {len(labels)} samples were not finite and are left out; has the model "
             "diverged?")


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def default_labels(num: int, num_classes: int) -> Tensor:
    """All classes in turn -> (num,) int64; the null label 0 for an unconditional model."""
    return torch.arange(num) % max(num_classes, 1)


def picture_classes(num_classes: int) -> list[int]:
    """The classes to show in a picture: all, or ten if there are more than 20; [0] without any."""
    if num_classes > 20:
        return [i * num_classes // 10 for i in range(10)]
    return list(range(max(num_classes, 1)))


def class_names(classes: list[int], names: list[str] | None, num_classes: int) -> list[str] | None:
    """What to write beside the rows of these classes; None for an unconditional model."""
    if num_classes == 0:
        return None
    labels = []
    for c in classes:
        if c == num_classes:
            labels.append("null")
        else:
            labels.append(names[c] if names else str(c))
    return labels


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


# ----------------------------------------------------------------------------- pictures
def grid(images: np.ndarray, columns: int, row_labels: list[str] | None = None,
         column_labels: list[str] | None = None, corner: str = "") -> Image.Image:
    """uint8 images (n, H, W, C) as one picture, row by row, small ones enlarged.

    Row labels stand on the left, column labels on top, and `corner` where they meet.
    """
    n, H, W, C = images.shape
    scale = math.ceil(48 / H)
    width = W * scale + 2
    height = H * scale + 2
    if C == 1:
        images = np.repeat(images, 3, -1)
    left = 0
    if row_labels or corner:
        left = 8 + 7 * max(len(label) for label in [corner, *(row_labels or [])])
    top = 14 if column_labels else 0
    rows = math.ceil(n / columns)
    picture = Image.new("RGB", (left + columns * width, top + rows * height), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        tile = Image.fromarray(image).resize((W * scale, H * scale), Image.Resampling.NEAREST)
        picture.paste(tile, (left + column * width, top + row * height))
    write = ImageDraw.Draw(picture).text
    write((4, top / 2), corner, fill="black", anchor="lm")
    for row, label in enumerate(row_labels or []):
        write((4, top + (row + 0.5) * height), label, fill="black", anchor="lm")
    for column, label in enumerate(column_labels or []):
        write((left + (column + 0.5) * width, top / 2), label, fill="black", anchor="mm")
    return picture


def sample_grid(model: nn.Module, seed: int, names: list[str] | None = None) -> Image.Image | None:
    """A picture of samples, a row of ten for each class, drawn as the model's config says.

    Under torchrun every process draws its share; rank 0 gets the picture and the others None. An
    image that is not finite stays black.
    """
    c = model.config
    classes = picture_classes(c.num_classes)
    if c.num_classes == 0:
        classes = classes * 5
    labels = torch.tensor([y for y in classes for _ in range(10)])
    mine = share(len(labels))
    images = np.zeros((len(mine), c.image_size, c.image_size, c.channels), np.uint8)
    part = labels[mine.start:mine.stop]
    for numbers, made, _ in sample_images(model, part, c.sampling, seed, 100, mine.start):
        images[numbers - mine.start] = made
    everyone = gather(images, device_of(model))
    if not everyone:
        return None
    return grid(np.concatenate(everyone), 10, class_names(classes, names, c.num_classes))


# ----------------------------------------------------------------------------- likelihood
@torch.no_grad()
def evaluate(model: nn.Module, dataset: ImageDataset, noise: str, sigma: float,
             num: int | None = None, quiet: bool = True) -> dict:
    """Likelihood of a data set, or of `num` images spread over it, in float32, over all processes.

    nats_per_dim and the parts of `model.log_prob` are negative log-likelihoods, logdet is
    log|det|; all are divided by D, the number of values of an image. Each image has its own fixed
    noise. bits_per_dim is given only for uniform noise (rgb ends as that), where it is an upper
    bound for the 8-bit data. Raises UserError for a model without log_prob, or without noise.
    """
    if not hasattr(model, "log_prob"):
        raise UserError(f"{model.model_name} has no likelihood; score its samples with fid.py")
    if noise == "none":
        raise UserError("--noise: got none, expected gaussian or uniform, since 8-bit values "
                        "without noise have no density")
    if noise == "rgb":
        noise = "uniform"
    device = device_of(model)
    places = np.arange(len(dataset))
    if num is not None:
        places = places[::max(1, math.ceil(len(places) / num))]
    mine = share(len(places))
    mine = places[mine.start:mine.stop]
    progress = Progress("evaluated", len(mine), quiet)
    sums = torch.zeros(0)
    for i in range(0, len(mine), 50):
        part = mine[i:i + 50]
        images, labels = dataset.batch(part)
        generators = image_generators(1, dataset.indices[part], device)
        x = dequantize(images.to(device), noise, sigma, generators)
        y = labels.to(device) if model.config.num_classes else None
        log_p = model.log_prob(x, y)
        values = torch.stack(list(log_p)).double() / x[0].numel()  # (parts, b)
        both = torch.stack([values.sum(1), values.square().sum(1)])  # (2, parts)
        sums = both if i == 0 else sums + both
        progress(i + len(part))
    if not len(mine):
        raise UserError(f"got {len(places)} images, expected one for each process or more; start "
                        "fewer processes")
    n = len(places)
    mean, square = (sum_over_processes(sums).cpu() / n).unbind()
    total = log_p._fields.index("total")
    variance = (square[total] - mean[total] ** 2).clamp(min=0)
    error = (variance / max(n - 1, 1)).sqrt().item()
    result = dict(nats_per_dim=-mean[total].item(), standard_error=error, images=n)
    for name, value in zip(log_p._fields, mean.tolist(), strict=True):
        if name != "total":
            result[name] = value if name == "logdet" else 0.0 - value  # no -0.0
    result["noise"] = "uniform" if noise == "uniform" else f"gaussian, sigma {sigma:g}"
    if noise == "uniform":
        result["bits_per_dim"] = bits_per_dim(result["nats_per_dim"])
        result["bits_standard_error"] = error / math.log(2)
    return result


def bits_per_dim(nats_per_dim):
    """Bits for the 8-bit data from nats for x = (x_int + u)/128 - 1: log2(128) = 7 bits more."""
    return nats_per_dim / math.log(2) + 7
