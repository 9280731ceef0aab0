"""FID, Inception Score, precision and recall of images, or of a model's samples.

    python fid.py samples.npz cifar10:test               # images that you have
    python fid.py runs/cifar cifar10:test --num 10000    # samples of a model
    python fid.py cifar10:train --save-stats real.npz    # statistics, used next:
    python fid.py runs/cifar real.npz --num 10000 --guidance 1.5
    python fid.py runs/tiny digits:test --num 500 --features features.pt
    torchrun --nproc_per_node=8 fid.py runs/cifar real.npz -n 50000

features.pt is a small network of your own, as written by
`python results/classifier.py fit digits features.pt --noise 0`. torchrun takes
--num for a flag of its own: write -n there.

SAMPLES and REFERENCE are what train.py takes as --data (digits, cifar10, a
folder, .zip, .npz, ...; :train and :test name a split), or an .npz of statistics
(`mu` and `sigma`, as pytorch-fid and ADM save them). An .npz that holds both,
like ADM's reference batches, gives its statistics to the FID and its images to
precision and recall, as in ADM's evaluator.

FID is the Fréchet distance between the features of two sets of images: lower is
better. Precision says how many samples look real, recall how much of the
reference the samples cover. The features are those of pytorch-fid: its weight
file, images as uint8 / 255, bilinear resize to 299x299 without antialiasing
(half-pixel centres), [0, 1] -> [-1, 1]. With --features they are those of a
TorchScript file, and the distance is called FD, never FID. Such a file is a
program that runs with your rights: take none from strangers.

What changes the numbers:
- Resize. TensorFlow 1, and so ADM's evaluator and torch-fidelity, has no
  half-pixel centres; clean-fid antialiases. Compare only numbers made with the
  same resize.
- uint8. Samples are rounded to 256 levels first; scoring the floats gives
  another number.
- JPEG. A reference saved as JPEG carries its artefacts into mu and sigma; use
  lossless files.
- Count. FID is biased upwards, less so for more images: never compare 10K with
  50K. Precision, recall and the Inception Score use at most 50,000 images, drawn
  at random, the same every time.
- Order. The Inception Score of files sorted by class would see a few classes in
  each split, so they are shuffled, the same way every time.
"""
import argparse
import dataclasses
import json
import os
import sys
from functools import partial

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from support import cli
from support.checkpoints import load, named_model
from support.cli import UserError
from support.distributed import join, leave, pick_device
from support.fid_features import (
    ScriptFeatures,
    Source,
    Statistics,
    measure,
    open_samples,
    open_source,
    save_statistics,
)
from support.inception import Inception, load_inception
from support.sampling import check_options

# N, M images; D features; C classes; mu (D,) and sigma (D, D) mean and covariance of features.

BLOCK = 256  # rows of distances at a time: 100 MB where there are 50,000 columns


# ----------------------------------------------------------------------------- the four metrics
def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """|mu1 - mu2|^2 + Tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^{1/2}), in float64.

    With sigma_i = A_i A_i^T, Tr (sigma1 sigma2)^{1/2} is the sum of the singular values of
    A_1^T A_2. That is real by construction and exact for singular covariances.
    """
    roots = square_root(sigma1).T @ square_root(sigma2)  # (rank 1, rank 2)
    trace = scipy.linalg.svdvals(roots).sum()
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * trace)


def square_root(sigma: np.ndarray) -> np.ndarray:
    """A (D, rank) with sigma = A A^T: eigenvectors times the roots of the eigenvalues."""
    eigenvalues, vectors = scipy.linalg.eigh(sigma)
    rounding = eigenvalues[-1] * len(eigenvalues) * np.finfo(np.float64).eps
    keep = eigenvalues > rounding
    return vectors[:, keep] * np.sqrt(eigenvalues[keep])


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp E_x KL(p(y|x) || p(y)) = exp(H(y) - E_x H(y|x)), mean and standard deviation over splits.

    logits (N, C), in random order.
    """
    scores = []
    for i in range(splits):
        part = logits[i * len(logits) // splits:(i + 1) * len(logits) // splits]
        p = part.double().softmax(1)  # (N / splits, C)
        entropy = torch.special.entr(p.mean(0)).sum()
        conditional_entropy = torch.special.entr(p).sum(1).mean()
        scores.append(torch.exp(entropy - conditional_entropy).item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(samples: Tensor, reference: Tensor, k: int = 3) -> tuple[float, float]:
    """Kynkäänniemi et al. 2019. samples (N, D), reference (M, D); N, M > k.

    The manifold of a set is the union of balls around its points, each of which reaches to its
    point's k-th nearest neighbour. Precision is the share of samples in the manifold of the
    reference, recall the share of the reference in the manifold of the samples.
    """
    samples = samples.double()
    reference = reference.double()
    precision = share_inside(samples, reference, squared_radii(reference, k))
    recall = share_inside(reference, samples, squared_radii(samples, k))
    return precision, recall


def squared_radii(x: Tensor, k: int) -> Tensor:
    """x (N, D) -> (N,): each point's squared distance to its k-th nearest neighbour."""
    radii = []
    for rows in x.split(BLOCK):
        nearest = squared_distances(rows, x).topk(k + 1, largest=False).values
        radii.append(nearest[:, k])  # column 0 is the point itself, at distance 0
    return torch.cat(radii)


def share_inside(x: Tensor, centres: Tensor, radii: Tensor) -> float:
    """The share of points x (N, D) in balls with these centres (M, D) and squared radii (M,)."""
    inside = [(squared_distances(rows, centres) <= radii).any(1) for rows in x.split(BLOCK)]
    return torch.cat(inside).double().mean().item()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """a (n, D), b (m, D) float64 -> (n, m). Rows that differ by rounding of float32 are equal."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    d2 = torch.addmm(norms, a, b.T, alpha=-2)
    return d2.masked_fill_(d2 < 1e-12 * norms, 0.0)


# ----------------------------------------------------------------------------- the report
def score(network, device, samples: Statistics, reference: Statistics | None = None) -> dict:
    """The metrics, None where these two do not give one, and what they were computed from."""
    is_fid = samples.digest == Inception.digest
    distance = precision = recall = mean = std = None
    pool = samples.pool.to(device)
    if reference:
        distance = frechet_distance(samples.mu, samples.sigma, reference.mu, reference.sigma)
        if len(pool) > 3 and len(reference.pool) > 3:
            precision, recall = precision_recall(pool, reference.pool.to(device))
    if is_fid and len(pool) >= 10:
        mean, std = inception_score(network.logits(pool))
    return {
        "fid" if is_fid else "fd": distance,
        "inception_score": mean,
        "inception_score_std": std,
        "precision": precision,
        "recall": recall,
        "num_samples": samples.num,
        "num_reference": reference.num if reference else None,
        "features": samples.name,
        "features_sha256": samples.digest,
        "dim": len(samples.mu),
        "resize": Inception.resize if is_fid else "none",
    }


def text(report: dict) -> str:
    """The report as lines of a name and a value."""
    lines = []
    for name, value in report.items():
        if isinstance(value, float):
            value = f"{value:z.4f}"  # z: no -0.0000
        if value is not None:
            name = {"fid": "FID", "fd": "FD"}.get(name, name.replace("_", " "))
            lines.append(f"{name:<20} {value}")
    return "\n".join(lines)


def warn_of_bias(sources: list[Source], statistics: list[Statistics]) -> None:
    """Of too few images, and of two sizes."""
    for side in statistics:
        if side.num is not None and side.num < len(side.mu):
            cli.warn(f"{side.path}: {side.num} images are fewer than {len(side.mu)} features: the "
                     "covariance is singular and the distance biased upwards")
    sizes = {f"{source.shape[1]}x{source.shape[0]}" for source in sources if source.num}
    if len(sizes) > 1:
        cli.warn(f"the images are {' and '.join(sorted(sizes))}: the distance includes that")


# ----------------------------------------------------------------------------- the command line
def parse(argv: list[str] | None, sampling: type) -> argparse.Namespace:
    """sampling: the dataclass of the model's sampling settings."""
    parser = cli.Parser(prog="fid.py", description=__doc__,
                        usage="python fid.py SAMPLES [REFERENCE] [options]")
    parser.add_argument("samples", metavar="SAMPLES",
                        help="the images to score, or their statistics; with --num the model to "
                        "draw them from: a run's folder or a .pt file")
    parser.add_argument("reference", metavar="REFERENCE", nargs="?",
                        help="the real images to compare with, or their statistics; optional with "
                        "--save-stats")
    parser.add_argument("--save-stats", metavar="FILE",
                        help="also write the statistics of SAMPLES to this .npz, which can be "
                        "SAMPLES or REFERENCE later")
    parser.add_argument("--json", action="store_true",
                        help="print one JSON object instead of a line per number")

    group = parser.add_argument_group("features (default: those of pytorch-fid)")
    network = group.add_mutually_exclusive_group()
    network.add_argument("--weights", metavar="FILE",
                         help="pytorch-fid's weight file (default: downloaded once and cached)")
    network.add_argument("--features", metavar="FILE",
                         help="another network: a TorchScript module that maps images (N, 3, H, W) "
                         "in [-1, 1] to (N, D); with an attribute channels = 1 it is given "
                         "luminance (N, 1, H, W)")

    how = parser.add_argument_group("how it runs (changes results by rounding at most)")
    how.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                     help="auto = a GPU where there is one (default: auto)")
    how.add_argument("--batch-size", type=cli.at_least(int, 1), default=50, metavar="N",
                     help="images at a time (default: 50)")
    how.add_argument("--workers", type=cli.at_least(int, 0), default=min(8, os.cpu_count() // 2),
                     metavar="N", help="processes that decode images, per device; 0 = none beside "
                     "this one (default: half the CPU cores, at most 8; here %(default)s)")

    group = parser.add_argument_group("samples of a model")
    group.add_argument("-n", "--num", type=cli.at_least(int, 2), metavar="N",
                       help="draw N samples, all classes in turn, from the model SAMPLES "
                       "(default: SAMPLES are images)")
    group.add_argument("--seed", type=cli.at_least(int, 0), default=0, metavar="N",
                       help="random seed; sample i depends on it and on i alone (default: 0)")
    group = parser.add_argument_group("sampling with --num (a checkpoint may hold other defaults)")
    cli.add_fields(group, sampling)
    args = parser.parse_intermixed_args(argv)  # REFERENCE may follow a flag
    settings = cli.given(args, sampling)
    if settings and args.num is None:
        flag = cli.flag_of(next(iter(settings)))
        raise UserError(f"{flag} is a sampling setting; give it together with --num")
    if args.save_stats:
        args.save_stats = cli.check_writable("--save-stats", args.save_stats)
    elif args.reference is None:
        raise UserError("REFERENCE is missing; it is optional only with --save-stats")
    return args


def check_networks(sources: list[Source], network) -> None:
    """Raises UserError where statistics in a file come from another network than the rest."""
    found = {network.digest: network.name} if network else {}
    for source in sources:
        if not source.num:
            found[source.statistics.digest] = source.statistics.name
    if len(found) > 1:
        names = " and ".join(f"{name} (sha256 {digest})" for digest, name in found.items())
        raise UserError(f"SAMPLES and REFERENCE have features of different networks, {names}; "
                        "compute both with the same one, see --features and --save-stats")


def main(argv: list[str] | None = None) -> None:
    _, module = named_model(argv)
    args = parse(argv, module.Sampling)
    device = pick_device(args.device)
    rank, _ = join(device)

    # Open and check everything before the first image: 50,000 of them take long.
    opened = partial(open_source, batch_size=args.batch_size, workers=args.workers,
                     own=getattr(module, "open_images", None))
    options = None
    if args.num:
        model, extra = load(args.samples, device)
        options = dataclasses.replace(model.config.sampling, **cli.given(args, module.Sampling))
        check_options(options, extra)
        samples = open_samples(args.samples, model, options, args.num, args.seed, args.batch_size)
    else:
        shape = None
        if args.reference and args.samples.startswith("digits"):  # drawn at the reference's size
            shape = opened(args.reference).shape
        samples = opened(args.samples, shape)
    sources = [samples]
    if args.reference:
        sources.append(opened(args.reference, samples.shape))
    network = None
    if args.features:
        network = ScriptFeatures(args.features, device)
    elif any(source.num for source in sources):
        network = load_inception(args.weights).to(device)
    check_networks(sources, network)
    if rank == 0:
        for source in sources:
            print(source.summary, file=sys.stderr)

    statistics = [measure(source, network, device) for source in sources]
    leave()
    if rank > 0:
        return
    if args.save_stats:
        save_statistics(args.save_stats, statistics[0])
    warn_of_bias(sources, statistics)
    report = score(network, device, *statistics)
    if options:
        report["sampling"] = dataclasses.asdict(options)
        report["seed"] = args.seed
        report["not_finite"] = args.num - report["num_samples"]
    print(json.dumps(report) if args.json else text(report))


if __name__ == "__main__":
    cli.run_script(main)
