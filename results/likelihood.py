"""What exact likelihoods are good for.

    python results/likelihood.py posterior assets/fashion.pt
    python results/likelihood.py ood assets/fashion.pt fashion-mnist:test mnist:test
    python results/likelihood.py bound assets/fashion.pt --num 200

`posterior` names the class that makes an image likeliest, argmax_c p(x|c). `ood`
(out of distribution) asks whether log p(x) tells foreign images from the model's
own. `bound` makes the density of noised images comparable with models of 8-bit
images. Without DATA, the images are those that the run held out, or the test
split of its data.

Images get the noise that the model's training ended with. Any model with a
likelihood will do: baselines.tarflow and baselines.jetformer too. The result is
printed as JSON.
"""
# ruff: noqa: E402  (the repository's folder has to be found first)
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json
import math

import numpy as np
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor, nn

from support.checkpoints import load, own_data
from support.cli import Parser, Progress, UserError, at_least, run_script
from support.data import Split, dequantize, image_generators, open_split
from support.distributed import pick_device

BATCH = 100


# ----------------------------------------------------------------------------- densities
def noised_images(split: Split, training: dict, args) -> tuple[Tensor, Tensor]:
    """--num images (n, C, H, W), spread over a set, as floats, and their labels (n,).

    They are of the hold-out, else of the test split, else of all the data. Their noise is what the
    model's training ended with, and depends on the place of an image alone.
    """
    print(f"data: {split.summary}", file=sys.stderr)
    found = split.held_out or split.train
    n = min(args.num, len(found))
    images, labels = found.batch(np.linspace(0, len(found) - 1, n).astype(np.int64))
    noise = "uniform" if training["noise"] == "rgb" else training["noise"]  # as rgb ends
    generators = image_generators(0, range(n), args.device)
    x = dequantize(images.to(args.device), noise, training["noise_end"], generators)
    return x, labels.to(args.device)


@torch.no_grad()
def log_probs(model: nn.Module, x: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """The fields of log_prob, each (n,) float64 in nats. labels None: unconditional."""
    progress = Progress("images", len(x))
    batches = []
    for i in range(0, len(x), BATCH):
        y = None if labels is None else labels[i:i + BATCH]
        batches.append(model.log_prob(x[i:i + BATCH], y)._asdict())
        progress(i)
    return {name: torch.cat([batch[name] for batch in batches]).double() for name in batches[0]}


# ----------------------------------------------------------------------------- posterior
def posterior(model: nn.Module, x: Tensor, labels: Tensor) -> dict:
    """Bayes' rule with equally likely classes: argmax_c log p(x|c) as a classifier."""
    classes = range(model.config.num_classes)
    scores = [log_probs(model, x, torch.full_like(labels, c))["total"] for c in classes]
    log_p = torch.stack(scores, 1)  # (n, classes)
    accuracy = (log_p.argmax(1) == labels).double().mean().item()
    return dict(
        images=len(labels),
        accuracy=accuracy,
        standard_error=math.sqrt(accuracy * (1 - accuracy) / len(labels)),
        confidence=log_p.softmax(1).amax(1).mean().item(),
    )


# ----------------------------------------------------------------------------- ood
def ood(model: nn.Module, inside: Tensor, outside: Tensor) -> dict:
    """log p(x) and its parts, without a label, of two sets of images: nats/dim, and the AUROC.

    The AUROC is the chance that an image of the first set has a higher value than one of the
    second, ties counting half. At 1 they are told apart, at 0.5 they are not. Below that the
    foreign set is *more* likely, for which flows are known: smooth, simple images have high
    densities.
    """
    D = inside[0].numel()
    a = log_probs(model, inside, None)
    b = log_probs(model, outside, None)
    result = {}
    for name in a:
        pairs = mannwhitneyu(a[name].cpu(), b[name].cpu()).statistic
        result[name] = dict(inside=a[name].mean().item() / D, outside=b[name].mean().item() / D,
                            auroc=float(pairs) / (len(inside) * len(outside)))
    return result


# ----------------------------------------------------------------------------- bound
def log_sum_of_levels(y: Tensor, sigma: float) -> Tensor:
    """y (n, C, H, W) -> (n,): sum over pixels of log sum_k N(y; x_k, sigma^2).

    x_k = (k + 1/2) / 128 - 1 is the value of level k of the 8 bits.
    """
    levels = (torch.arange(256, device=y.device) + 0.5) / 128 - 1
    total = 0
    for pixels in y.double().flatten(1).split(256, 1):  # in blocks, to bound the memory
        e = (pixels.unsqueeze(-1) - levels) / sigma  # (n, pixels, 256)
        log_n = -0.5 * e.square() - math.log(sigma * math.sqrt(2 * math.pi))
        total += log_n.logsumexp(-1).sum(1)
    return total


def bound(model: nn.Module, y: Tensor, labels: Tensor | None, training: dict) -> dict:
    """An upper bound on the bits/dim of 8-bit images x under a model q(y) of y = x + sigma eps.

    Such a model's density is not that of the data, but it makes one: draw y from q, then each
    pixel's level from a decoder P(x_int|y). Then P(x_int) = integral q(y) P(x_int|y) dy, and for
    any r(y|x_int) Jensen's inequality gives

        log P(x_int) >= E_{y ~ r} [log q(y) + log P(x_int|y) - log r(y|x_int)].

    r is the training noise, N(x, sigma^2), and the decoder the posterior of a level under it when
    all levels are equally likely: P(k|y) = N(y; x_k, sigma^2) / sum_j N(y; x_j, sigma^2). Their
    quotient leaves 1 / sum_j N(y; x_j, sigma^2) for each pixel.
    """
    if training["noise"] != "gaussian":
        raise UserError(f"bound: this model was trained with {training['noise']} noise; expected "
                        "gaussian: for uniform noise train.py --eval gives bits/dim directly")
    sigma = training["noise_end"]
    log_q = log_probs(model, y, labels)["total"]
    others = torch.cat([log_sum_of_levels(part, sigma) for part in y.split(BATCH)])
    bits = (others - log_q) / y[0].numel() / math.log(2)
    return dict(
        images=len(y),
        bits_per_dim_at_most=bits.mean().item(),
        standard_error=(bits.std() / math.sqrt(len(bits))).item(),
        sigma=sigma,
    )


# ----------------------------------------------------------------------------- command line
def main(argv: list[str] | None = None) -> None:
    """Prints the result of the action that the command line names, as JSON."""
    parser = Parser(prog="likelihood.py", description=__doc__,
                    usage="python results/likelihood.py ACTION DIR_OR_CKPT [DATA ...] [options]")
    parser.add_argument("action", choices=("posterior", "ood", "bound"), metavar="ACTION",
                        help="posterior, ood or bound")
    parser.add_argument("run", metavar="DIR_OR_CKPT",
                        help="a trained model: a run's folder or a .pt file")
    parser.add_argument("data", metavar="DATA", nargs="*",
                        help="images, as train.py takes them as --data; for ood two: such as the "
                        "model was trained on, and others")
    parser.add_argument("--num", type=at_least(int, 2), default=1000, metavar="N",
                        help="use N images, spread evenly over a set (default: 1000)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="auto = a GPU where there is one (default: auto)")
    args = parser.parse_intermixed_args(argv)
    foreign = args.action == "ood"
    if foreign != (len(args.data) == 2) or len(args.data) > 2:
        parser.error(f"DATA: got {len(args.data)}, expected two for ood, at most one otherwise")
    args.device = pick_device(args.device)
    model, extra = load(args.run, args.device)
    if not hasattr(model, "log_prob") or "training" not in extra:
        raise UserError(f"{args.run}: expected a trained model with a likelihood (log_prob)")
    training = extra["training"]
    c = model.config
    classes = (None, 0) if foreign else (extra["classes"], c.num_classes)
    sets = []
    for data in args.data or [training["data"]]:
        holdout = 0 if args.data else training["holdout"]
        split = open_split(data, c.image_size, c.channels, holdout, training["enlarge"], *classes,
                           own_data(model))
        sets.append(noised_images(split, training, args))
    x, labels = sets[0]
    if foreign:
        result = ood(model, x, sets[1][0])
    elif args.action == "bound":
        result = bound(model, x, labels if c.num_classes else None, training)
    elif c.num_classes:
        result = posterior(model, x, labels)
    else:
        raise UserError(f"posterior: {args.run} knows no classes")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    run_script(main)
