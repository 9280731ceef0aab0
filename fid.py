"""FID, Inception Score, precision and recall of images, or of a model's samples.

    python fid.py SAMPLES REFERENCE                                  images or saved statistics against each other
    python fid.py cifar10:train cifar10:test                         the distance between two sets that are alike
    python fid.py runs/tiny REFERENCE --num 50000 --guidance 1.5     samples straight from a model, keeping no files
    python fid.py REFERENCE --save-stats reference.npz               statistics to compare with later
    torchrun --nproc_per_node=8 fid.py runs/tiny REFERENCE -n 50000  the work shared (torchrun stumbles over --num)

SAMPLES and REFERENCE are what train.py takes as --data (digits, cifar10, a folder, .zip, .npz, ...; :train and :test
name a split), or an .npz of statistics (`mu`, `sigma`: pytorch-fid's and ADM's). An .npz that holds both, like ADM's
reference batches, gives its statistics to the FID and its images to precision and recall, as ADM's evaluator does.

The features are those of pytorch-fid: its weight file, the image as uint8 / 255, bilinear resize to 299x299 without
antialiasing (half-pixel centres), [0, 1] -> [-1, 1]. With --features they are those of a TorchScript file, and the
distance is called FD, never FID. Such a file is a program that runs with your rights: take none from strangers.
Traps that change the numbers:
- Resize. TensorFlow 1, and so ADM's evaluator and torch-fidelity, samples at x * in/out without half-pixel centres;
  clean-fid antialiases. Compare only numbers made with one resize.
- uint8. Samples are rounded to 256 levels first; scoring the float images gives another number.
- JPEG. A reference saved as JPEG carries its artefacts into mu and sigma; use lossless files on both sides.
- Count. FID is biased upwards by an amount that falls with the number of images: 10K and 50K do not compare.
  Precision, recall and the Inception Score use 50,000 images at most, chosen at random and always alike.
- Order. The Inception Score of class-sorted files would see a few classes per split; we shuffle, always alike.
"""
# ruff: noqa: I001  (support.cli comes before torch: Ctrl-C during that import is then no traceback)
from support import cli
from support.cli import UserError

import argparse
import dataclasses
import json
import os

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from support.checkpoint import load, named_model
from support.distributed import join, leave, pick_device
from support.features import (
    Opened, ScriptFeatures, Side, measure, measure_side, open_side, sample_batches, save_statistics,
)
from support.inception import Inception, load_inception

# Legend: N, M images; D features; C classes; mu (D,) and sigma (D, D) mean and covariance of the features.


# --------------------------------------------------------------------------------------------------- the four metrics
def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + Tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^{1/2}) in float64.

    With sigma_i = A_i A_i^T, Tr (sigma1 sigma2)^{1/2} is the sum of the singular values of A_1^T A_2: real by
    construction, exact for singular covariances, without the halved precision of square roots of eigenvalues near 0.
    """
    roots = square_root(sigma1).T @ square_root(sigma2)  # (rank 1, rank 2)
    trace = scipy.linalg.svdvals(roots).sum()
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * trace)


def square_root(sigma: np.ndarray) -> np.ndarray:
    """A (D, rank) with sigma = A A^T: eigenvectors times root eigenvalues. UserError where sigma is no covariance."""
    eigenvalues, vectors = scipy.linalg.eigh(np.asarray(sigma, np.float64))
    smallest, largest = eigenvalues[0], eigenvalues[-1]
    if smallest < -1e-3 * largest:
        raise UserError(f"sigma has eigenvalues from {smallest:.3g} to {largest:.3g}, a covariance has none below 0")
    keep = eigenvalues > largest * len(eigenvalues) * np.finfo(np.float64).eps
    return vectors[:, keep] * np.sqrt(eigenvalues[keep])


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp E_x KL(p(y|x) || p(y)) = exp(H(y) - E_x H(y|x)): its mean and standard deviation over `splits` parts.

    logits (N, C), shuffled.
    """
    scores = []
    for i in range(splits):
        part = logits[i * len(logits) // splits:(i + 1) * len(logits) // splits]
        p = part.double().softmax(1)  # (N / splits, C)
        entropy = torch.special.entr(p.mean(0)).sum()
        conditional_entropy = torch.special.entr(p).sum(1).mean()
        scores.append(torch.exp(entropy - conditional_entropy).item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(samples: Tensor, reference: Tensor, k: int = 3, block: int = 1024) -> tuple[float, float]:
    """Kynkäänniemi et al. 2019. samples (N, D), reference (M, D); N, M > k. In blocks of block^2 distances.

    A set's manifold is the union of the balls around its points that reach to their k-th nearest neighbour.
    precision = share of samples in the reference's manifold, recall = share of the reference in the samples'.
    """
    samples_radii, reference_radii = squared_radii(samples, k, block), squared_radii(reference, k, block)
    sample_inside = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    reference_inside = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    for i in slices(len(samples), block):
        for j in slices(len(reference), block):
            d2 = squared_distances(samples[i], reference[j])
            sample_inside[i] |= (d2 <= reference_radii[j]).any(1)
            reference_inside[j] |= (d2 <= samples_radii[i, None]).any(0)
    return sample_inside.double().mean().item(), reference_inside.double().mean().item()


def squared_radii(x: Tensor, k: int, block: int) -> Tensor:
    """x (N, D) -> (N,) float64: each point's squared distance to its k-th nearest neighbour, itself left out."""
    nearest = x.new_full((len(x), k), torch.inf, dtype=torch.float64)

    def update(rows: slice, d2: Tensor) -> None:
        nearest[rows] = torch.cat([nearest[rows], d2], 1).topk(k, largest=False).values

    parts = slices(len(x), block)
    for first, i in enumerate(parts):
        for j in parts[first:]:
            d2 = squared_distances(x[i], x[j])
            if i == j:
                update(i, d2.fill_diagonal_(torch.inf))
            else:  # one block of distances serves the rows i, and its transpose the rows j
                update(i, d2)
                update(j, d2.T)
    return nearest.amax(1)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """a (n, D), b (m, D) -> (n, m) float64. Rows that differ by rounding only (one image in two batches) are equal."""
    a, b = a.double(), b.double()
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    d2 = torch.addmm(norms, a, b.T, alpha=-2)
    return d2.masked_fill_(d2 < 1e-12 * norms, 0.0)


def slices(n: int, block: int) -> list[slice]:
    return [slice(i, i + block) for i in range(0, n, block)]


# --------------------------------------------------------------------------------------------------- the report
@torch.inference_mode()
def score(samples: Side, reference: Side | None = None, network=None, device: str | torch.device = "cpu") -> dict:
    """Counts, features, and each metric, or None where these two sides do not give it."""
    check_sides(*[side for side in (samples, reference) if side])
    distance = precision = recall = mean = std = None
    if reference:
        distance = frechet_distance(samples.mu, samples.sigma, reference.mu, reference.sigma)
        pools = samples.pool, reference.pool
        if all(pool is not None and len(pool) > 3 for pool in pools):
            precision, recall = precision_recall(pools[0].to(device), pools[1].to(device))
    is_fid = samples.matches(Inception.name, Inception.digest)
    if is_fid and samples.pool is not None and len(samples.pool) >= 10:
        mean, std = inception_score(network.logits(samples.pool.to(device)))
    report = {"fid" if is_fid else "fd": distance}
    report |= dict(inception_score=mean, inception_score_std=std, precision=precision, recall=recall)
    report |= dict(num_samples=samples.num, num_reference=reference.num if reference else None)
    report |= dict(features=samples.features, features_sha256=samples.digest, dim=len(samples.mu))
    return report | dict(resize=Inception.resize if is_fid else "none")


def check_sides(*sides: Side) -> None:
    """Raises UserError for two kinds of features, and warns of what spoils a distance."""
    first, last = sides[0], sides[-1]
    if not first.matches(last.features, last.digest) or len(first.mu) != len(last.mu):
        raise UserError(f"{first.source} has {first.described()}; {last.source} has {last.described()}: "
                        "compute both with the same features")
    for side in sides:
        if side.num is not None and side.num < len(side.mu):
            cli.warn(f"{side.source}: {side.num} images for {len(side.mu)} features: the covariance is singular and "
                     "the distance biased upwards")
    if first.size and last.size and first.size != last.size:
        cli.warn(f"{first.source} is {first.size}, {last.source} {last.size}: the distance includes that of the sizes")


def text(report: dict, options=None) -> str:
    """The report as lines of a metric and its value. options: the Sampling with which the samples were drawn."""
    name = "FID" if "fid" in report else f"FD ({report['features']})"
    samples, reference = number(report["num_samples"], ",.0f"), number(report["num_reference"], ",.0f")
    rows = {name: number(report.get("fid", report.get("fd")))}
    rows["IS"] = number(report["inception_score"])
    if report["inception_score"]:
        rows["IS"] += f" ± {number(report['inception_score_std'])} (10 splits)"
    rows["precision"] = number(report["precision"])
    rows["recall"] = number(report["recall"])
    rows["images"] = f"{samples} samples, {reference} reference"
    if options:
        settings = [f"seed {report['seed']}"]
        for field in dataclasses.fields(options):
            value = getattr(options, field.name)
            if value != field.default:
                settings.append(f"{field.name} {value}")
        rows["samples"] = f"drawn with {', '.join(settings)}; {report['not_finite']} not finite and left out"
    rows["features"] = f"{report['features']} ({report['dim']}), resize {report['resize']}"
    width = max(len(name) for name in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def number(value: float | None, form: str = ".4f") -> str:
    return "n/a" if value is None else f"{round(value, 4) + 0.0:{form}}"  # + 0.0: no "-0.0000"


# --------------------------------------------------------------------------------------------------- the command line
def parse(argv: list[str] | None, sampling: type) -> argparse.Namespace:
    """sampling: the dataclass of the model's sampling settings. Raises UserError for values out of range."""
    workers = min(8, (os.cpu_count() or 2) // 2)
    p = cli.Parser(prog="fid.py", description=__doc__)
    p.add_argument("samples", metavar="SAMPLES", help="images or statistics; with --num a run's directory or file")
    p.add_argument("reference", metavar="REFERENCE", nargs="?", help="likewise; may be left out with --save-stats")
    p.add_argument("-n", "--num", type=int, help="draw so many samples from the model in SAMPLES, all classes in turn")
    p.add_argument("--seed", type=int, default=0, help="of the samples; all else is fixed (default: %(default)s)")
    p.add_argument("--features", metavar="FILE.pt", help="a TorchScript module (N, 3 or 1, H, W) in [-1, 1] -> (N, D), "
                   "run as the program that it is; 1 channel is luminance (default: the FID's Inception)")
    p.add_argument("--weights", metavar="PATH", help="pytorch-fid's weight file (default: downloaded once and cached)")
    p.add_argument("--save-stats", metavar="X.npz", help="write mu and sigma of SAMPLES")
    p.add_argument("--batch-size", type=int, default=50, help="images at a time (default: %(default)s)")
    p.add_argument("--workers", type=int, default=workers, help="processes that decode images (default: %(default)s)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    p.add_argument("--json", action="store_true", help="one JSON object instead of text")
    cli.add_fields(p.add_argument_group("sampling, with --num (unless given: as the checkpoint has it)"), sampling)
    args = p.parse_intermixed_args(argv)  # REFERENCE may follow a flag
    cli.at_least(args, num=2, batch_size=1, workers=0, seed=0)
    cli.at_most(args, workers=1000, seed=2**63 - 1)
    settings = cli.given(args, sampling)
    if settings and args.num is None:
        raise UserError(f"{cli.flag_of(next(iter(settings)))} is a setting of sampling: give it together with --num")
    if args.reference is None and not args.save_stats:
        raise UserError("REFERENCE is missing: it may be left out only with --save-stats")
    if args.weights and args.features:
        raise UserError("--weights is for the Inception and --features replaces it: give one of them")
    if args.save_stats:
        args.save_stats = cli.check_writable("--save-stats", args.save_stats)
        if args.save_stats.suffix != ".npz":
            raise UserError(f"--save-stats: got {args.save_stats}, expected a file name that ends in .npz")
    return args


def open_network(args: argparse.Namespace, opened: list[Opened], device: torch.device):
    """The network that gives the features. UserError for statistics of others, be they of a file of the same name."""
    network = ScriptFeatures(args.features, device) if args.features else Inception
    for side in opened:
        if side.images is None and not side.statistics.matches(network.name, network.digest):
            raise UserError(f"{side.path}: holds statistics of {side.statistics.described()}, expected those of "
                            f"{network.name} (sha256 {network.digest[:12]}): compute them again with --save-stats")
    return network if args.features else load_inception(args.weights).to(device)


def main(argv: list[str] | None = None) -> None:
    _, module = named_model(argv)
    args = parse(argv, module.Sampling)
    device = pick_device(args.device)
    rank, _ = join(device)

    # Everything is opened and checked before the first image, for 50,000 of them take long.
    model, options, opened, network = None, None, [], None
    if args.num:
        cli.check_memory(32 * args.num, f"--num {args.num}")
        model, _ = load(args.samples, device)
        config = model.config
        options = dataclasses.replace(config.sampling, **cli.given(args, module.Sampling))
        size, channels = config.image_size, config.channels
    else:
        opened.append(open_side(args.samples))
        size, channels = opened[0].size_and_channels()
    if args.reference is not None:
        opened.append(open_side(args.reference, size, channels))
    if model or args.features or args.weights or any(side.images for side in opened):
        network = open_network(args, opened, device)

    # The features.
    sides = []
    if model:
        batches = sample_batches(model, options, args.num, args.seed, args.batch_size)
        sides.append(measure(batches, args.num, network, args.samples, device, f"{size}x{size}"))
    for side in opened:
        sides.append(measure_side(side, network, args.batch_size, args.workers, device))
    leave()
    if rank > 0:
        return

    if args.save_stats:
        save_statistics(args.save_stats, sides[0])
    report = score(*sides, network=network, device=device)
    if model:
        report |= dict(sampling=dataclasses.asdict(options), seed=args.seed, not_finite=args.num - sides[0].num)
    print(json.dumps(report) if args.json else text(report, options))


if __name__ == "__main__":
    cli.run_script(main)
