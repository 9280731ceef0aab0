"""What exact likelihoods are good for.

    python support/likelihood.py posterior runs/fashion                       # argmax_c p(x|c) as a classifier
    python support/likelihood.py ood runs/fashion fashion-mnist:test mnist:test   # can log p tell two data sets apart?
    python support/likelihood.py bound runs/fashion                           # bits/dim of a model of noised images

Images get the last noise of the model's training. Any model with log_prob will do.
"""
# ruff: noqa: E402, I001  (the scripts' folder has to be found first; support.cli comes before torch)
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.cli import Parser, Progress, UserError, at_least, at_most, run_script

import json
import math

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from support.data import dequantize, image_generators
from support.distributed import pick_device
from support.loader import open_split
from support.run import load_run

BATCH = 100


# ------------------------------------------------------------------------------------------ images
def open_images_for(model, data: str, num: int, holdout: int = 0):
    """Up to `num` images, spread, uint8 (n, C, H, W) and labels (n,), of the hold-out, else test split, else all."""
    c = model.config
    split = open_split(data, c.image_size, c.channels, holdout)
    dataset, indices = (split.val, split.val_indices) if len(split.val_indices) else (split.data, split.indices)
    at = np.linspace(0, len(indices) - 1, min(num, len(indices))).astype(np.int64)
    return dataset.batch(indices, at)


def noised(images: Tensor, training: dict, seed: int, start: int, device: torch.device) -> Tensor:
    """uint8 images -> floats with the noise that training ended with; image i has noise of its own, from (seed, i)."""
    generators = image_generators(seed, range(start, start + len(images)), device)
    kind = "uniform" if training["noise"] == "rgb" else training["noise"]
    return dequantize(images.to(device), kind, training["noise_end"], generators)


@torch.no_grad()
def log_probs(model, training: dict, images: Tensor, labels: Tensor | None, seed: int) -> dict[str, Tensor]:
    """The fields of log_prob, each (n,) in nats, of uint8 images (n, C, H, W); labels None: unconditional."""
    device, fields = next(model.parameters()).device, {}
    for i in range(0, len(images), BATCH):
        y = None if labels is None else labels[i:i + BATCH].to(device)
        log_p = model.log_prob(noised(images[i:i + BATCH], training, seed, i, device), y)
        for name, values in log_p._asdict().items():
            fields.setdefault(name, []).append(values.double().cpu())
    return {name: torch.cat(values) for name, values in fields.items()}


# ------------------------------------------------------------------------------------------ posterior
def posterior(model, training: dict, images: Tensor, labels: Tensor, seed: int) -> dict:
    """Bayes' rule, all classes alike likely: argmax_c log p(x|c) as a classifier, the same noise for every class."""
    scores = []
    progress = Progress("classes", model.config.num_classes)
    for c in range(model.config.num_classes):
        scores.append(log_probs(model, training, images, torch.full_like(labels, c), seed)["total"])
        progress(c + 1)
    log_p = torch.stack(scores, 1)  # (n, classes)
    right = (log_p.argmax(1) == labels).double()
    error = math.sqrt(right.mean() * (1 - right.mean()) / len(right))
    confidence = log_p.softmax(1).amax(1).mean()
    return dict(images=len(labels), accuracy=right.mean().item(), standard_error=error, confidence=confidence.item())


# ------------------------------------------------------------------------------------------ ood
def auroc(low: np.ndarray, high: np.ndarray) -> float:
    """P(a value of `high` exceeds one of `low`), ties counting half, from rank sums; 0.5: cannot be told apart."""
    ranks = rankdata(np.concatenate([low, high]))[len(low):]
    return (ranks.sum() - len(high) * (len(high) + 1) / 2) / (len(low) * len(high))


def ood(model, training: dict, inside: Tensor, outside: Tensor, seed: int) -> dict:
    """log p and its parts (no label) of two data sets under one model, per dimension; how well each tells them apart.

    auroc 1: every image of the first set has the higher value. Below 0.5 the foreign set is found *more* likely, which
    flows are known for: smooth, simple images get high densities whatever they show.
    """
    D = inside[0].numel()
    a, b = (log_probs(model, training, images, None, seed) for images in (inside, outside))
    if {"total", "logdet"} <= a.keys():
        for fields in (a, b):
            fields["log p(z)"] = fields["total"] - fields["logdet"]
    result = {}
    for name in a:
        means = dict(inside=a[name].mean().item() / D, outside=b[name].mean().item() / D)
        result[name] = means | dict(auroc=auroc(b[name].numpy(), a[name].numpy()))
    return result


# ------------------------------------------------------------------------------------------ bound
def decoder_log_prob(images: Tensor, y: Tensor, sigma: float) -> Tensor:
    """log P(x_int|y) (n,) in nats: level k of a pixel weighs exp(-(y - x_k)^2 / 2 sigma^2), x_k = (k + 1/2)/128 - 1."""
    levels = (torch.arange(256, device=y.device, dtype=y.dtype) + 0.5) / 128 - 1
    total = 0.0
    for pixel, level in zip(y.flatten(1).split(256, 1), images.flatten(1).split(256, 1), strict=True):
        log_w = -0.5 * ((pixel.unsqueeze(-1) - levels) / sigma).square()  # (n, pixels, 256)
        log_p = log_w.log_softmax(-1).gather(-1, level.long().unsqueeze(-1))
        total = total + log_p.sum((1, 2))
    return total


@torch.no_grad()
def bound(model, training: dict, images: Tensor, labels: Tensor | None, seed: int) -> dict:
    """bits/dim of 8-bit images, bounded from above, for a model q(y) of images with Gaussian noise y = x + sigma eps.

    Such a model's density is not that of the data, but it makes one: draw y from q, then each pixel's level from a
    decoder P(x_int|y), here the posterior of a level under that noise, all levels alike likely before. For P(x_int) =
    integral q(y) P(x_int|y) dy, and any r(y|x_int), Jensen's inequality gives

        log P(x_int) >= E_{y ~ r} [log q(y) + log P(x_int|y) - log r(y|x_int)];

    with r = N(x, sigma^2), the training noise, that is the model's log-likelihood, the decoder's, the noise's entropy.
    """
    sigma, device, values = training["noise_end"], next(model.parameters()).device, []
    if training["noise"] != "gaussian" or sigma <= 0:
        raise UserError(f"bound: this model was trained with {training['noise']} noise of std {sigma:g}; "
                        "for uniform noise train.py --eval gives bits/dim directly")
    progress = Progress("bounded", len(images))
    for i in range(0, len(images), BATCH):
        pixels = images[i:i + BATCH].to(device)
        y = noised(pixels, training, seed, i, device)
        log_q = model.log_prob(y, None if labels is None else labels[i:i + BATCH].to(device)).total.double()
        noise = (y.double() - dequantize(pixels, "none", 0.0, []).double()) / sigma
        log_r = -(0.5 * noise.square() + math.log(sigma) + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)
        values.append((log_r - log_q - decoder_log_prob(pixels, y.double(), sigma)).cpu())
        progress(i + len(pixels))
    bits = torch.cat(values) / images[0].numel() / math.log(2)
    return dict(images=len(images), bits_per_dim_at_most=bits.mean().item(), sigma=sigma,
                standard_error=(bits.std() / math.sqrt(len(bits))).item())


# ------------------------------------------------------------------------------------------ command line
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="likelihood.py", description=__doc__)
    parser.add_argument("action", choices=("posterior", "ood", "bound"))
    parser.add_argument("run", metavar="DIR_OR_CKPT", help="a trained model")
    parser.add_argument("data", nargs="*", help="data (default: the run's hold-out or test split); ood: two")
    parser.add_argument("--num", type=int, default=1000, help="images, spread over the set (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the images' noise (default: 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    at_least(args, num=2, seed=0)
    at_most(args, seed=2**63 - 1)
    if args.action == "ood" and len(args.data) != 2:
        raise UserError(f"ood: got {len(args.data)} data sets, expected 2: the model's own and a foreign one")
    if args.action != "ood" and len(args.data) > 1:
        raise UserError(f"{args.action}: got {len(args.data)} data sets, expected at most 1")
    model, state = load_run(args.run, pick_device(args.device))
    if not hasattr(model, "log_prob"):
        raise UserError(f"{model.model_name} has no likelihood (no log_prob)")
    training = state.training
    if args.action == "ood":
        (inside, _), (outside, _) = (open_images_for(model, data, args.num) for data in args.data)
        result = ood(model, training, inside, outside, args.seed)
    else:
        own = not args.data
        data = training["data"] if own else args.data[0]
        images, labels = open_images_for(model, data, args.num, training["holdout"] if own else 0)
        labels = labels if model.config.num_classes else None
        if args.action == "posterior" and labels is None:
            raise UserError("posterior: this model is unconditional; it needs classes")
        result = (posterior if args.action == "posterior" else bound)(model, training, images, labels, args.seed)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    run_script(main)
