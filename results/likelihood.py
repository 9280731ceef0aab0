"""What exact likelihoods are good for.

    python results/likelihood.py posterior runs/fashion    # argmax_c p(x|c) as a classifier
    python results/likelihood.py ood runs/fashion fashion-mnist:test mnist:test
    python results/likelihood.py bound runs/fashion        # bits/dim of a model of noised images

`ood` asks whether log p(x) can tell two sets of images apart. Images get the last noise of the
model's training. Any model with log_prob will do.
"""
# ruff: noqa: E402  (the repository's folder has to be found first)
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor, nn

from support.batches import Split, dequantize, image_generators, open_split
from support.checkpoints import load_run
from support.cli import Parser, Progress, UserError, at_least, run_script
from support.distributed import pick_device

BATCH = 100


# ----------------------------------------------------------------------------- images
def some_images(split: Split, num: int) -> tuple[Tensor, Tensor]:
    """Up to `num` images (n, C, H, W) uint8, spread over the set, and their labels (n,).

    They are of the hold-out, else of the test split, else of all the data.
    """
    print(f"data: {split.summary}", file=sys.stderr)
    dataset = split.held_out or split.train
    return dataset.batch(np.linspace(0, len(dataset) - 1, min(num, len(dataset))).astype(np.int64))


def noised(images: Tensor, training: dict, seed: int) -> Iterator[Tensor]:
    """uint8 images -> batches of floats with the noise that training ended with, from the seed."""
    kind = "uniform" if training["noise"] == "rgb" else training["noise"]  # as rgb ends
    progress = Progress("images", len(images))
    for i in range(0, len(images), BATCH):
        part = images[i:i + BATCH]
        generators = image_generators(seed, range(i, i + len(part)), part.device)
        yield dequantize(part, kind, training["noise_end"], generators)
        progress(i + len(part))


@torch.no_grad()
def log_probs(model: nn.Module, training: dict, images: Tensor, labels: Tensor | None,
              seed: int) -> dict[str, Tensor]:
    """The fields of log_prob, each (n,) float64 in nats. labels None: unconditional."""
    parts = []
    for i, x in enumerate(noised(images, training, seed)):
        y = None if labels is None else labels[i * BATCH:(i + 1) * BATCH]
        parts.append(model.log_prob(x, y))
    names = parts[0]._fields
    return {name: torch.cat([getattr(part, name) for part in parts]).double() for name in names}


# ----------------------------------------------------------------------------- posterior
def posterior(model: nn.Module, training: dict, images: Tensor, labels: Tensor, seed: int) -> dict:
    """Bayes' rule with equally likely classes: argmax_c log p(x|c) as a classifier.

    An image has the same noise under every class.
    """
    scores = []
    for c in range(model.config.num_classes):
        of_class = torch.full_like(labels, c)
        scores.append(log_probs(model, training, images, of_class, seed)["total"])
    log_p = torch.stack(scores, 1)  # (n, classes)
    accuracy = (log_p.argmax(1) == labels).double().mean().item()
    return dict(
        images=len(labels),
        accuracy=accuracy,
        standard_error=math.sqrt(accuracy * (1 - accuracy) / len(labels)),
        confidence=log_p.softmax(1).amax(1).mean().item(),
    )


# ----------------------------------------------------------------------------- ood
def auroc(low: Tensor, high: Tensor) -> float:
    """The chance that a value of `high` exceeds one of `low`, ties counting half.

    At 0.5 the two cannot be told apart.
    """
    pairs = mannwhitneyu(high.cpu(), low.cpu()).statistic
    return float(pairs) / (len(low) * len(high))


def ood(model: nn.Module, training: dict, inside: Tensor, outside: Tensor, seed: int) -> dict:
    """log p(x) and its parts, without a label, of two sets of images: nats/dim, and the AUROC.

    At an AUROC of 1 every image of the first set has the higher value. Below 0.5 the foreign set
    is *more* likely, for which flows are known: smooth, simple images have high densities.
    """
    D = inside[0].numel()
    a = log_probs(model, training, inside, None, seed)
    b = log_probs(model, training, outside, None, seed)
    if "logdet" in a:
        a["log p(z)"] = a["total"] - a["logdet"]
        b["log p(z)"] = b["total"] - b["logdet"]
    result = {}
    for name in a:
        means = dict(inside=a[name].mean().item() / D, outside=b[name].mean().item() / D)
        result[name] = dict(means, auroc=auroc(b[name], a[name]))
    return result


# ----------------------------------------------------------------------------- bound
def log_sum_of_levels(y: Tensor, sigma: float) -> Tensor:
    """y (n, C, H, W) -> (n,): sum over pixels of log sum_k N(y; x_k, sigma^2).

    x_k = (k + 1/2) / 128 - 1 is the value of level k of the 8 bits.
    """
    levels = (torch.arange(256, device=y.device) + 0.5) / 128 - 1
    total = torch.zeros(len(y), device=y.device, dtype=torch.float64)
    for pixels in y.double().flatten(1).split(256, 1):  # in blocks, to bound the memory
        e = (pixels.unsqueeze(-1) - levels) / sigma  # (n, pixels, 256)
        log_n = -0.5 * e.square() - math.log(sigma * math.sqrt(2 * math.pi))
        total += log_n.logsumexp(-1).sum(1)
    return total


def bound(model: nn.Module, training: dict, images: Tensor, labels: Tensor | None,
          seed: int) -> dict:
    """An upper bound on the bits/dim of 8-bit images under a model q(y) of y = x + sigma eps.

    Such a model's density is not that of the data, but it makes one: draw y from q, then each
    pixel's level from a decoder P(x_int|y). Then P(x_int) = integral q(y) P(x_int|y) dy, and for
    any r(y|x_int) Jensen's inequality gives

        log P(x_int) >= E_{y ~ r} [log q(y) + log P(x_int|y) - log r(y|x_int)].

    r is the training noise, N(x, sigma^2), and the decoder the posterior of a level under it when
    all levels are equally likely: P(k|y) = N(y; x_k, sigma^2) / sum_j N(y; x_j, sigma^2). Their
    quotient leaves 1 / sum_j N(y; x_j, sigma^2) for each pixel.
    """
    sigma = training["noise_end"]
    if training["noise"] != "gaussian" or sigma <= 0:
        raise UserError(f"bound: this model was trained with {training['noise']} noise of std "
                        f"{sigma:g}; for uniform noise train.py --eval gives bits/dim directly")
    log_q = log_probs(model, training, images, labels, seed)["total"]
    others = [log_sum_of_levels(y, sigma) for y in noised(images, training, seed)]
    bits = (torch.cat(others) - log_q) / images[0].numel() / math.log(2)
    return dict(
        images=len(images),
        bits_per_dim_at_most=bits.mean().item(),
        standard_error=(bits.std() / math.sqrt(len(bits))).item(),
        sigma=sigma,
    )


# ----------------------------------------------------------------------------- command line
def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="likelihood.py", description=__doc__)
    parser.add_argument("action", choices=("posterior", "ood", "bound"))
    parser.add_argument("run", metavar="DIR_OR_CKPT", help="a trained model")
    parser.add_argument("data", nargs="*", help="ood: two sets of images; else one (default: the "
                        "run's hold-out or test split)")
    parser.add_argument("--num", type=at_least(int, 2), default=1000,
                        help="images, spread over the set (default: 1000)")
    parser.add_argument("--seed", type=at_least(int, 0), default=0,
                        help="of the images' noise (default: 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    if args.action == "ood" and len(args.data) != 2:
        parser.error(f"ood: got {len(args.data)} sets of images, expected 2: the model's own and "
                     "a foreign one")
    if args.action != "ood" and len(args.data) > 1:
        parser.error(f"{args.action}: got {len(args.data)} sets of images, expected at most 1")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = pick_device(args.device)
    model, state = load_run(args.run, device)
    if not hasattr(model, "log_prob"):
        raise UserError(f"{args.run}: {model.model_name} has no likelihood (no log_prob)")
    c = model.config
    training = state.training
    if args.action == "ood":
        sets = []
        for data in args.data:
            split = open_split(data, c.image_size, c.channels)
            sets.append(some_images(split, args.num)[0].to(device))
        result = ood(model, training, *sets, args.seed)
    else:
        data = args.data[0] if args.data else training["data"]
        holdout = 0 if args.data else training["holdout"]
        split = open_split(data, c.image_size, c.channels, holdout, training["enlarge"],
                           state.classes or [], c.num_classes)
        images, labels = [t.to(device) for t in some_images(split, args.num)]
        if args.action == "bound":
            labels = labels if c.num_classes else None
            result = bound(model, training, images, labels, args.seed)
        elif c.num_classes == 0:
            raise UserError(f"posterior: {args.run} knows no classes")
        else:
            result = posterior(model, training, images, labels, args.seed)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    run_script(main)
