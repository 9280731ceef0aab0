"""What scripts do with a model, whichever it is: draw images, put them in a grid, measure held-out likelihood."""
import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from support.cli import Progress, UserError, value_types, warn
from support.data import dequantize, image_generators, quantize
from support.distributed import gather, prepare_layers, share, sum_over_processes

COMPILE_FROM = 1000  # images for one GPU: fewer are done before compiling is


# ------------------------------------------------------------------------------------------ drawing images
def sample_images(model: nn.Module, labels: Tensor, options, seed: int, batch_size: int, start: int = 0,
                  progress: Progress | None = None) -> Iterator[tuple[np.ndarray, np.ndarray, Tensor]]:
    """Yields (indices (b,) int64, uint8 images (b, H, W, C), the floats (b, C, H, W)) for labels (num,), in order.

    options: the model's Sampling. Image i depends on (seed, start + i) and its label, not on batch_size. Images that
    are not finite are left out; their number is said at the end.
    """
    device, lost = device_of(model), 0
    if len(labels) >= COMPILE_FROM and device.type == "cuda":
        prepare_layers(model, compiling=True, checkpointing=False)
    for i in range(0, len(labels), batch_size):
        y = labels[i:i + batch_size].to(device)
        indices = np.arange(start + i, start + i + len(y))
        with torch.no_grad():
            x = model.sample(y, options, image_generators(seed, indices, device))
        finite = x.isfinite().flatten(1).all(1)
        lost += int((~finite).sum())
        x = x[finite]
        yield indices[finite.cpu().numpy()], quantize(x).permute(0, 2, 3, 1).cpu().numpy(), x
        if progress:
            progress(i + len(y))
    if lost:
        warn(f"{lost} of {len(labels)} samples were not finite and are left out: has the model diverged?")


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def default_labels(num: int, num_classes: int) -> Tensor:
    """num labels, all classes in turn; zeros, the null label, for an unconditional model."""
    return torch.arange(num) % max(num_classes, 1)


def chosen_classes(text: str | None, num_classes: int, picture: bool) -> list[int]:
    """The classes of --labels, or all; of more than 20, ten for a picture. Without classes [0], the null label.

    Raises UserError for what is not a class.
    """
    if text is None:
        classes = list(range(max(num_classes, 1)))
        return classes if not picture or len(classes) <= 20 else [i * num_classes // 10 for i in range(10)]
    if num_classes == 0:
        raise UserError(f"--labels: got {text!r} for an unconditional model; leave it out")
    try:
        classes = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--labels: got {text!r}, expected integers such as 0,3,7") from None
    for y in classes:
        if not 0 <= y <= num_classes:
            raise UserError(f"--labels: got {y}, expected 0 to {num_classes - 1}, or {num_classes} for the null class")
    return classes


def parse_sweep(text: str, options) -> dict[str, object]:
    """"redundant-scale=0,1,2" -> {"0": options with that redundant_scale, ...}. Raises UserError for a wrong field."""
    name, equals, values = text.partition("=")
    name = name.replace("-", "_")
    fields = {f.name: f for f in dataclasses.fields(options)}
    if not equals or not values or name not in fields:
        raise UserError(f"--sweep: got {text!r}, expected FIELD=V1,V2,... with a field of {', '.join(fields)}")
    kind = value_types(type(options))[name]
    try:
        read = {value: kind(value) for value in values.split(",")}
    except ValueError:
        raise UserError(f"--sweep: got {text!r}, expected values of type {kind.__name__}") from None
    return {value: dataclasses.replace(options, **{name: number}) for value, number in read.items()}


def check_options(options, extra: dict) -> None:
    """Raises UserError for sampling settings that the training run of a checkpoint's `extra` makes no sense of."""
    training = extra.get("training")
    noise = training.get("noise", "gaussian") if isinstance(training, dict) else "gaussian"
    if getattr(options, "denoise", 0) and noise != "gaussian":
        raise UserError(f"--denoise: got {options.denoise}, but this model was trained with {noise} noise: there is no "
                        "gaussian noise of known std to take off; pass --denoise 0")


# ------------------------------------------------------------------------------------------ pictures
def grid(images: np.ndarray, columns: int, row_labels: list[str] | None = None,
         column_labels: list[str] | None = None) -> Image.Image:
    """uint8 images (n, H, W, C) as one picture, row by row, small ones enlarged, with labels left of and above them."""
    n, H, W, C = images.shape
    scale = math.ceil(48 / H)
    width, height = W * scale + 2, H * scale + 2
    images = np.repeat(images, 3, -1) if C == 1 else images
    left = 8 + 7 * max(len(label) for label in row_labels) if row_labels else 0
    top = 14 if column_labels else 0
    picture = Image.new("RGB", (left + columns * width, top + math.ceil(n / columns) * height), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        tile = Image.fromarray(image).resize((W * scale, H * scale), Image.Resampling.NEAREST)
        picture.paste(tile, (left + column * width, top + row * height))
    write = ImageDraw.Draw(picture).text
    for row, label in enumerate(row_labels or []):
        write((4, top + (row + 0.5) * height), label, fill="black", anchor="lm")
    for column, label in enumerate(column_labels or []):
        write((left + (column + 0.5) * width, top / 2), label, fill="black", anchor="mm")
    return picture


def extremes(images: np.ndarray, log_p: dict[str, np.ndarray], columns: int = 10) -> Image.Image:
    """The images (n, H, W, C) with the lowest and the highest log-det (without one: log p), under its value per dim.

    The paper finds images with an abnormal log-det to be blurred (Fig. 8).
    """
    values = log_p.get("logdet", log_p["total"]) / images[0].size
    order = np.argsort(values)
    rows = [order[:columns], order[-columns:]]
    parts = [grid(images[row], columns, None, [f"{v:.2f}" for v in values[row]]) for row in rows]
    picture = Image.new("RGB", (parts[0].width, sum(part.height for part in parts)), "white")
    for i, part in enumerate(parts):
        picture.paste(part, (0, i * parts[0].height))
    return picture


def sample_grid(model: nn.Module, seed: int, rows: int = 10, columns: int = 10) -> Image.Image | None:
    """A picture with one row per class (evenly spaced classes where there are more than `rows`), as its config samples.

    Under torchrun every process makes its share and rank 0 gets the picture. An image that is not finite stays black.
    """
    config = model.config
    C = config.num_classes
    classes = [i * C // min(rows, C) for i in range(min(rows, C))] if C else [0] * 5
    labels = torch.tensor([y for y in classes for _ in range(columns)])
    mine = share(len(labels))
    images = np.zeros((len(mine), config.image_size, config.image_size, config.channels), np.uint8)
    part = labels[mine.start:mine.stop]
    for indices, made, _ in sample_images(model, part, config.sampling, seed, 100, mine.start):
        images[indices - mine.start] = made
    everyone = list(gather(images, device_of(model)))
    if not everyone:
        return None
    return grid(np.concatenate(everyone), columns, [str(y) for y in classes] if C else None)


# ------------------------------------------------------------------------------------------ held-out likelihood
@torch.no_grad()
def evaluate(model: nn.Module, dataset, indices: np.ndarray, noise: str, sigma: float, quiet: bool = True) -> dict:
    """Held-out likelihood in float32, over all processes: nats/dim and its parts, the standard error, bits/dim.

    nats_per_dim and the parts of `model.log_prob` are negative log-likelihoods, logdet is log|det|, all divided by the
    D numbers of an image. Image i has fixed noise. bits/dim = NLL / (D ln 2) + 7 is given for uniform noise (and rgb,
    which ends as uniform) only: there it bounds that of the 8-bit data.

    Raises UserError for a model without log_prob, or noise "none", which leaves a density of discrete values.
    """
    if not hasattr(model, "log_prob"):
        raise UserError(f"{model.model_name} has no likelihood (no log_prob): score its samples with fid.py instead")
    if noise == "none":
        raise UserError("--noise: got none; expected gaussian or uniform, since 8-bit values alone have no density")
    noise = "uniform" if noise == "rgb" else noise
    config, device = model.config, device_of(model)
    D = config.channels * config.image_size**2
    mine = share(len(indices))
    mine = indices[mine.start:mine.stop]
    progress = Progress("evaluated", len(mine), quiet)
    names, sums = None, None
    for i in range(0, len(mine), 50):
        part = mine[i:i + 50]
        images, labels = (t.to(device) for t in dataset.batch(part))
        x = dequantize(images, noise, sigma, image_generators(1, part, device))
        log_p = model.log_prob(x, labels if config.num_classes else None)
        names = log_p._fields
        values = torch.stack(list(log_p)).double() / D  # (parts, b)
        both = torch.stack([values.sum(1), values.square().sum(1)], 1)
        sums = both if sums is None else sums + both
        progress(i + len(part))
    if names is None:
        raise UserError(f"{len(indices)} held-out images are fewer than the processes; start fewer")
    n = len(indices)
    mean, square = (sum_over_processes(sums).cpu() / n).unbind(1)
    total = names.index("total")
    error = ((square[total] - mean[total]**2).clamp(min=0) / max(n - 1, 1)).sqrt().item()
    result = dict(nats_per_dim=-mean[total].item(), standard_error=error, images=n)
    for name, value in zip(names, mean.tolist(), strict=True):
        if name != "total":
            result[name] = value if name == "logdet" else 0.0 - value  # no -0.0
    result["noise"] = noise if noise == "uniform" else f"gaussian, sigma {sigma:g}"
    if noise == "uniform":
        result |= bits_per_dim(result["nats_per_dim"])
        result["bits_standard_error"] = error / math.log(2)
    return result


def bits_per_dim(nats_per_dim: float) -> dict:
    """Of the 8-bit data, from the density of x = (x_int + u)/128 - 1: log2(128) = 7 bits for the change of scale."""
    return dict(bits_per_dim=nats_per_dim / math.log(2) + 7)
