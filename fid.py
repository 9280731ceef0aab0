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
program that runs with your rights: take none from strangers. It may read images
that are floats, such as latents, too: it is given these as they are.

What changes the numbers:
- Size. REFERENCE's images are cropped and resized to the size of the samples, as
  in training. Beside a model's samples they also get the model's channels;
  otherwise colours stay, and a warning says if only one side is grey.
- Resize to 299x299. TensorFlow 1, and so ADM's evaluator and torch-fidelity, has
  no half-pixel centres; torchmetrics and clean-fid antialias, each with a filter
  of its own. Compare only numbers made with the same resize.
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
import sys

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from support import cli
from support.checkpoints import (
    DEFAULT_MODEL,
    Saved,
    checkpoint_path,
    first_checkpoint,
    is_checkpoint,
    model_file,
    read,
    restore,
)
from support.cli import UserError
from support.data import open_images
from support.distributed import agreeing, join, leave, pick_device, share
from support.inception import (
    Inception,
    ScriptFeatures,
    Side,
    Statistics,
    load_inception,
    measure,
    read_statistics,
    save_statistics,
)
from support.sampling import check_options, default_labels, in_use, sample_images

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
    return share_inside(samples, reference, k), share_inside(reference, samples, k)


def share_inside(x: Tensor, centres: Tensor, k: int) -> float:
    """The share of points x (N, D) in the manifold of `centres` (M, D)."""
    radii = []  # squared
    for rows in centres.split(BLOCK):
        nearest = squared_distances(rows, centres).topk(k + 1, largest=False).values
        radii.append(nearest[:, k])  # column 0 is the point itself, at distance 0
    radii = torch.cat(radii)
    inside = [(squared_distances(rows, centres) <= radii).any(1) for rows in x.split(BLOCK)]
    return torch.cat(inside).double().mean().item()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """a (n, D), b (m, D) float64 -> (n, m). Rows that differ by rounding of float32 are equal."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    d2 = torch.addmm(norms, a, b.T, alpha=-2)
    return d2.masked_fill_(d2 < 1e-12 * norms, 0.0)


# ----------------------------------------------------------------------------- the two sides
def open_side(path: str, args, own, size: int | None = None, channels: int = 3) -> Side:
    """The images of a data set, the statistics in its file, or both.

    With `size` the images become (size, size, channels). own: `open_images` of a model's file.
    """
    side = Side(path)
    if path.endswith(".npz"):
        with cli.reading(path, "expected images, or statistics mu and sigma"):
            with np.load(cli.expanded(path)) as arrays:
                if "mu" in arrays:
                    side.known = read_statistics(path, arrays)
                    if "images" not in arrays and "arr_0" not in arrays:
                        return side
    if is_checkpoint(path):
        raise UserError(f"{path}: is a checkpoint; give --num to draw samples from its model")
    images, _ = open_images(path, size, channels, args.enlarge, own)
    cli.say(f"data: {images.summary()}", sys.stderr)
    side.num, *side.shape = images.array.shape
    mine = share(side.num)
    parts = [mine[i:i + args.batch_size] for i in range(0, len(mine), args.batch_size)]
    side.batches = ((part, images.array[part.start:part.stop]) for part in parts)
    return side


def samples_of(model, options, conditions, args) -> Side:
    """--num samples of a model, all classes in turn: the images of sample.py for this seed."""
    cli.say(f"drawing {args.num} images: {in_use(model, options)}", sys.stderr)
    c = model.config
    part = share(args.num)
    labels = default_labels(args.num, c.num_classes, conditions)[part.start:part.stop]
    batches = sample_images(model, labels, options, args.seed, args.batch_size, part.start)
    shape = (c.image_size, c.image_size, c.channels)
    return Side(args.samples, None, args.num, shape, batches)


def check_networks(sides: list[Side], network) -> None:
    """Raises UserError where statistics in a file come from another network than the rest."""
    found = [(side.known.features, side.known.features_sha256) for side in sides if not side.num]
    if network:
        found.append((network.name, network.digest))
    names = {digest or name: f"{name} (sha256 {digest})" if digest else name
             for name, digest in found}
    if len(names) > 1:
        raise UserError("SAMPLES and REFERENCE have features of different networks, "
                        f"{' and '.join(names.values())}; compute both with the same one, see "
                        "--features and --save-stats")


# ----------------------------------------------------------------------------- the report
def score(network, device, samples: Statistics, reference: Statistics | None = None) -> dict:
    """The metrics, None where these two do not give one, and what they were computed from."""
    is_fid = samples.features_sha256 == Inception.digest
    distance = precision = recall = mean = std = None
    pool = samples.pool.to(device)
    if reference:
        distance = frechet_distance(samples.mu, samples.sigma, reference.mu, reference.sigma)
        if len(pool) > 3 and len(reference.pool) > 3:
            precision, recall = precision_recall(pool, reference.pool.to(device))
    if is_fid and len(pool) >= 10:
        mean, std = inception_score(network.logits(pool))
    resizes = [side.resize for side in (samples, reference) if side]
    return {
        "fid" if is_fid else "fd": distance,
        "inception_score": mean,
        "inception_score_std": std,
        "precision": precision,
        "recall": recall,
        "num_samples": samples.num,
        "num_reference": reference.num if reference else None,
        "features": samples.features,
        "features_sha256": samples.features_sha256,
        "dim": len(samples.mu),
        "resize": " / ".join(dict.fromkeys(resizes)),
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


def warn_of_bias(sides: list[Statistics]) -> None:
    """Of too few images, and of sides that differ in more than what they show."""
    for side in sides:
        if side.num is not None and side.num < len(side.mu):
            cli.warn(f"{side.path}: {side.num} images are fewer than {len(side.mu)} features: the "
                     "covariance is singular and the distance biased upwards")
    kinds = {side.kind: f"{side.kind} in {side.path}" for side in sides if side.kind}
    if len(kinds) > 1:
        cli.warn(f"SAMPLES and REFERENCE are not alike ({'; '.join(kinds.values())}): the distance "
                 "includes that; bring both to one size and, if one is grey, the other to grey, "
                 "with `python support/data.py prepare ... --channels 1`")


# ----------------------------------------------------------------------------- the command line
def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Saved | None]:
    """The command line, and the first checkpoint on it, whose model has some of the flags."""
    saved = first_checkpoint(sys.argv[1:] if argv is None else argv)
    defaults = model_file(DEFAULT_MODEL).Sampling()
    if saved is not None:
        defaults = saved.module.Sampling(**saved.config["sampling"])
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
    parser.add_argument("--enlarge", action="store_true",
                        help="enlarge images of REFERENCE that are smaller than the samples "
                        "instead of refusing them")
    parser.add_argument("--json", action="store_true",
                        help="print one JSON object instead of a line per number")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="auto = a GPU where there is one (default: auto)")
    parser.add_argument("--batch-size", type=cli.at_least(int, 1), default=50, metavar="N",
                        help="images at a time; changes results by rounding at most (default: 50)")

    group = parser.add_argument_group("features (default: those of pytorch-fid)")
    network = group.add_mutually_exclusive_group()
    network.add_argument("--weights", metavar="FILE",
                         help="pytorch-fid's weight file (default: downloaded once and cached)")
    network.add_argument("--features", metavar="FILE",
                         help="another network: a TorchScript module that maps images (N, 3, H, W) "
                         "in [-1, 1] to (N, D); with an attribute channels = 1 it is given "
                         "luminance (N, 1, H, W)")

    group = parser.add_argument_group("samples of a model")
    group.add_argument("-n", "--num", type=cli.at_least(int, 2), metavar="N",
                       help="draw N samples, all classes in turn, from the model SAMPLES "
                       "(default: SAMPLES are images)")
    group.add_argument("--seed", type=cli.at_least(int, 0), default=0, metavar="N",
                       help="random seed; sample i depends on it and on i alone (default: 0)")
    parser.add_settings("sampling with --num (defaults of the checkpoint)", defaults)
    args = parser.parse_intermixed_args(argv)  # REFERENCE may follow a flag
    args.settings = cli.given(args, defaults)
    if args.num is None and args.settings:
        raise UserError(f"{', '.join(args.settings)}: sampling settings; give them together with "
                        "--num")
    if args.num and (saved is None or saved.file != checkpoint_path(args.samples)):
        saved = read(args.samples)
    if args.save_stats:
        args.save_stats = cli.check_writable("--save-stats", args.save_stats)
    elif args.reference is None:
        raise UserError("REFERENCE is missing; it is optional only with --save-stats")
    return args, saved


def main(argv: list[str] | None = None) -> None:
    args, saved = parse(argv)
    own = getattr(saved.module, "open_images", None) if saved else None
    device = pick_device(args.device)
    rank, _ = join(device)

    # Open and check everything before the first image: 50,000 of them take long.
    options = network = size = None
    channels = 3
    facts = {}
    with agreeing(facts):
        if args.num:
            model = restore(saved, device)
            options = dataclasses.replace(model.config.sampling, **args.settings)
            check_options(options, saved.extra)
            samples = samples_of(model, options, saved.extra.get("conditions"), args)
            channels = model.config.channels
        else:
            samples = open_side(args.samples, args, own)
        sides = [samples]
        if samples.num and samples.shape[0] == samples.shape[1]:
            size = samples.shape[0]
        if args.reference:
            sides.append(open_side(args.reference, args, own, size, channels))
        if args.features:
            network = ScriptFeatures(args.features, device)
        elif any(side.num for side in sides):
            network = Inception  # its weights may still have to be downloaded
        check_networks(sides, network)
        if network is Inception:
            network = load_inception(args.weights).to(device)
        facts["images"] = [side.num for side in sides]

    statistics = [measure(side, network, device) for side in sides]
    leave()
    if rank > 0:
        return
    if args.save_stats:
        save_statistics(args.save_stats, statistics[0])
    warn_of_bias(statistics)
    report = score(network, device, *statistics)
    if options:
        report["sampling"] = dataclasses.asdict(options)
        report["seed"] = args.seed
        report["not_finite"] = args.num - report["num_samples"]
    print(json.dumps(report) if args.json else text(report))


if __name__ == "__main__":
    cli.run_script(main)
