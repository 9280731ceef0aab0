"""FID, Inception Score, precision and recall of FARMER's samples.

    python fid.py SAMPLES REFERENCE                                  images or saved statistics against each other
    python fid.py runs/tiny REFERENCE --num 50000 --guidance 1.5     samples straight from a model, keeping no files
    python fid.py REFERENCE --save-stats reference.npz               statistics to compare with later
    torchrun --nproc_per_node=8 fid.py runs/tiny REFERENCE -n 50000  the same numbers, the work shared (-n: torchrun stumbles over --num)

SAMPLES and REFERENCE are folders of any depth, .zip files, .npz files of images (`images`, or ADM's `arr_0`), or
.npz files of statistics (`mu`, `sigma`: pytorch-fid's and ADM's). An .npz that holds both, like ADM's reference
batches, gives its statistics to the FID and its images to precision and recall, as ADM's evaluator does.

The features are those of pytorch-fid: its weight file, the image as uint8 / 255, bilinear resize to 299x299 without
antialiasing (half-pixel centres), [0, 1] -> [-1, 1]. Traps that change the numbers:
- Resize. TensorFlow 1, and so ADM's evaluator and torch-fidelity, samples at x * in/out without half-pixel centres;
  clean-fid antialiases. Compare only numbers made with one resize.
- uint8. Samples are rounded to 256 levels first; scoring the float images gives another number.
- JPEG. A reference saved as JPEG carries its artefacts into mu and sigma; use lossless files on both sides.
- Count. FID is biased upwards by an amount that falls with the number of images: 10K and 50K do not compare.
  Precision, recall and the Inception Score use 50,000 images at most, chosen at random and always alike.
- Order. The Inception Score of class-sorted files would see a few classes per split; we shuffle, always alike.
"""

import argparse
import hashlib
import http.client
import json
import os
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from farmer import UserError, checkpoint_path, load
from sample import Parser, Progress, default_labels, init_distributed, leave_distributed, pick_device, sample_images, write_file
from support.images import open_images

# Legend: N, M images; D features; C classes; mu (D,) and sigma (D, D) mean and covariance of the features.

# ---------------------------------------------------------------------------------------------------------- the FID Inception-v3 of 2015-12-05
WEIGHTS_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU. `kernel`: "3" (3x3, same size), "1x7", "3v" (no padding), "3v2" (and stride 2)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: str):
        super().__init__()
        size, valid, stride = kernel.partition("v")
        h, w = (int(n) for n in (size.split("x") if "x" in size else (size, size)))
        padding = (0, 0) if valid else (h // 2, w // 2)
        self.conv = nn.Conv2d(in_channels, out_channels, (h, w), int(stride or 1), padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(h)), inplace=True)


POOLS = {
    "avg": lambda h: F.avg_pool2d(h, 3, 1, 1, count_include_pad=False),  # TensorFlow's: the padding does not count
    "max": lambda h: F.max_pool2d(h, 3, 1, 1),
    "max2": lambda h: F.max_pool2d(h, 3, 2),
}


class Branches(nn.Module):
    """Parallel branches, concatenated. A branch is written `name:channels:kernel`s and pools in order; `a|b` runs both on the same input."""

    def __init__(self, in_channels: int, *branches: str):
        super().__init__()
        self.branches = [[step.split("|") for step in branch.split()] for branch in branches]
        self.out_channels = 0
        for branch in self.branches:
            channels = in_channels
            for step in branch:
                convs = [part.split(":") for part in step if part not in POOLS]
                for name, out, kernel in convs:
                    self.add_module(name, Conv(channels, int(out), kernel))
                channels = sum(int(out) for _, out, _ in convs) or channels
            self.out_channels += channels

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.branch(steps, h) for steps in self.branches], 1)

    def branch(self, steps: list[list[str]], h: torch.Tensor) -> torch.Tensor:
        for step in steps:
            h = torch.cat([POOLS[part](h) if part in POOLS else self.get_submodule(part.split(":")[0])(h) for part in step], 1)
        return h


STEM = "Conv2d_1a_3x3:32:3v2 Conv2d_2a_3x3:32:3v Conv2d_2b_3x3:64:3 max2 Conv2d_3b_1x1:80:1 Conv2d_4a_3x3:192:3v max2"


def mixed_5(pool: int) -> list[str]:
    return ["branch1x1:64:1", "branch5x5_1:48:1 branch5x5_2:64:5", "branch3x3dbl_1:64:1 branch3x3dbl_2:96:3 branch3x3dbl_3:96:3",
            f"avg branch_pool:{pool}:1"]


def mixed_6(c: int) -> list[str]:
    return ["branch1x1:192:1", f"branch7x7_1:{c}:1 branch7x7_2:{c}:1x7 branch7x7_3:192:7x1",
            f"branch7x7dbl_1:{c}:1 branch7x7dbl_2:{c}:7x1 branch7x7dbl_3:{c}:1x7 branch7x7dbl_4:{c}:7x1 branch7x7dbl_5:192:1x7",
            "avg branch_pool:192:1"]


def mixed_7(pool: str) -> list[str]:
    return ["branch1x1:320:1", "branch3x3_1:384:1 branch3x3_2a:384:1x3|branch3x3_2b:384:3x1",
            "branch3x3dbl_1:448:1 branch3x3dbl_2:384:3 branch3x3dbl_3a:384:1x3|branch3x3dbl_3b:384:3x1", f"{pool} branch_pool:192:1"]


MIXED = {  # (N, 192, 35, 35) -> 5d (N, 288, 35, 35) -> 6e (N, 768, 17, 17) -> 7c (N, 2048, 8, 8)
    "Mixed_5b": mixed_5(32), "Mixed_5c": mixed_5(64), "Mixed_5d": mixed_5(64),
    "Mixed_6a": ["branch3x3:384:3v2", "branch3x3dbl_1:64:1 branch3x3dbl_2:96:3 branch3x3dbl_3:96:3v2", "max2"],
    "Mixed_6b": mixed_6(128), "Mixed_6c": mixed_6(160), "Mixed_6d": mixed_6(160), "Mixed_6e": mixed_6(192),
    "Mixed_7a": ["branch3x3_1:192:1 branch3x3_2:320:3v2",
                 "branch7x7x3_1:192:1 branch7x7x3_2:192:1x7 branch7x7x3_3:192:7x1 branch7x7x3_4:192:3v2", "max2"],
    "Mixed_7b": mixed_7("avg"), "Mixed_7c": mixed_7("max"),  # max, where Inception-v3 averages: a quirk of the 2015-12-05 graph
}


class Inception(Branches):
    """Inception-v3 as the FID defines it; parameters named as in the weight file. Pool features and bias-free logits of [-1, 1] images."""

    name = "inception-2015-12-05"
    resize = "bilinear to 299x299, no antialiasing (pytorch-fid)"

    def __init__(self):
        super().__init__(3, STEM)  # (N, 3, 299, 299) -> (N, 192, 35, 35)
        channels = self.out_channels
        for name, branches in MIXED.items():
            self.add_module(name, Branches(channels, *branches))
            channels = self.get_submodule(name).out_channels
        self.fc = nn.Linear(channels, 1008)
        self.to(memory_format=torch.channels_last)  # twice as fast on a CPU

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images (N, 3, H, W) uint8 -> pool features (N, 2048) float32."""
        h = F.interpolate(images.float() / 255, size=(299, 299), mode="bilinear", align_corners=False)
        h = super().forward(2 * h - 1)
        for name in MIXED:
            h = self.get_submodule(name)(h)
        return h.mean((2, 3))

    def logits(self, pool: torch.Tensor) -> torch.Tensor:
        """pool (N, 2048) -> (N, 1008) without the last layer's bias, as the TensorFlow reference does for the Inception Score."""
        return F.linear(pool, self.fc.weight)


def load_inception(path: str | None) -> Inception:
    """The Inception with pytorch-fid's weights from `path`, else from the cache, else downloaded. Raises UserError when it is another file."""
    file = Path(path or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "farmer" / WEIGHTS_URL.rpartition("/")[2])
    if not path and not file.exists():
        download_weights(file)
    check_weights(file)
    model = Inception()
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))  # strict: every name and shape
    return model.eval()


def check_weights(file: Path) -> None:
    try:
        with open(file, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; --weights expects the file from {WEIGHTS_URL}") from None
    if digest != WEIGHTS_SHA256:
        raise UserError(f"{file}: not the FID Inception: its sha256 is {digest}, expected {WEIGHTS_SHA256}; get it from {WEIGHTS_URL}")


def download_weights(file: Path) -> None:
    """WEIGHTS_URL -> `file`, by way of a temporary file beside it that takes the name once its hash is right."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(WEIGHTS_URL, timeout=30) as response, open(part, "wb") as out:
            progress = Progress("downloading the Inception's weights, MiB", int(response.headers.get("Content-Length") or 0) >> 20)
            while chunk := response.read(2**20):
                out.write(chunk)
                progress(out.tell() >> 20)
        check_weights(part)
        os.replace(part, file)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"the Inception's weights could not be downloaded ({error}); get {WEIGHTS_URL} and pass it with --weights PATH") from None
    finally:
        part.unlink(missing_ok=True)


class CustomFeatures:
    """A TorchScript or torch.export (.pt2) module from `path` that maps (N, 3, H, W) in [-1, 1] at native size to (N, D)."""

    resize = "none"

    def __init__(self, path: str, device: torch.device):
        self.name = Path(path).name
        try:
            if path.endswith(".pt2"):
                self.module = torch.export.load(path).module().to(device)
            else:
                self.module = torch.jit.load(path, map_location=device).eval()
        except Exception as error:  # zip, JSON and operator errors of several types
            how = "torch.jit.script(module).save(FILE.pt) or torch.export.save(program, FILE.pt2)"
            raise UserError(f"--features {path}: not a TorchScript or exported module ({first_line(error)}); write it with {how}") from None

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        try:
            features = self.module((images.float() / 127.5 - 1).contiguous())
        except Exception as error:  # a module of the user's may raise anything
            raise UserError(f"--features {self.name}: failed on images {tuple(images.shape)}: {first_line(error)}") from None
        if not torch.is_tensor(features) or features.ndim != 2 or len(features) != len(images):
            got = tuple(features.shape) if torch.is_tensor(features) else type(features).__name__
            raise UserError(f"--features {self.name}: expected ({len(images)}, D) from images {tuple(images.shape)}, got {got}")
        return features.float()


# ---------------------------------------------------------------------------------------------------------------------------- the four metrics
class Moments:
    """Mean and covariance of rows that arrive in pieces, in float64 and one pass. Merges (Chan et al. 1983, eq. 2.1)

        mean = mean_a + delta n_b/n,   S = S_a + S_b + delta delta^T n_a n_b/n,   delta = mean_b - mean_a,

    with S = sum (x - mean)(x - mean)^T, block by block of 512 rows whatever the pieces, so that these do not change a bit of the result.
    """

    def __init__(self, dim: int):
        self.n, self.mu, self.scatter = 0, np.zeros(dim), np.zeros((dim, dim))
        self.block, self.fill = np.empty((512, dim)), 0

    def add(self, rows: np.ndarray) -> None:
        """rows (n, D)."""
        while len(rows):
            take = min(len(rows), len(self.block) - self.fill)
            self.block[self.fill:self.fill + take] = rows[:take]
            self.fill, rows = self.fill + take, rows[take:]
            if self.fill == len(self.block):
                self.merge()

    def merge(self) -> None:
        block, n_b = self.block[:self.fill], self.fill
        mean_b = block.mean(0)
        delta, n = mean_b - self.mu, self.n + n_b
        self.scatter += (block - mean_b).T @ (block - mean_b) + np.outer(delta, delta) * (self.n * n_b / n)
        self.mu = self.mu + delta * (n_b / n)
        self.n, self.fill = n, 0

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """mu (D,) and the unbiased sigma (D, D), as numpy.cov."""
        if self.fill:
            self.merge()
        return self.mu, self.scatter / (self.n - 1)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + Tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^{1/2}) in float64.

    With sigma_i = A_i A_i^T, Tr (sigma1 sigma2)^{1/2} is the sum of the singular values of A_1^T A_2: real by construction, exact for singular
    covariances, and without the halved precision of square roots of eigenvalues near 0. A_i holds eigenvectors times root eigenvalues.
    """
    factors = []
    for sigma in (sigma1, sigma2):
        eigenvalues, vectors = scipy.linalg.eigh(np.asarray(sigma, np.float64))
        if eigenvalues[0] < -1e-3 * eigenvalues[-1]:
            raise UserError(f"sigma has eigenvalues from {eigenvalues[0]:.3g} to {eigenvalues[-1]:.3g}, a covariance has none below 0")
        keep = eigenvalues > eigenvalues[-1] * len(eigenvalues) * np.finfo(np.float64).eps
        factors.append(vectors[:, keep] * np.sqrt(eigenvalues[keep]))  # (D, rank)
    trace = scipy.linalg.svdvals(factors[0].T @ factors[1]).sum()  # of (rank1, rank2)
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * trace)


def inception_score(logits: torch.Tensor, splits: int = 10) -> tuple[float, float]:
    """logits (N, C), shuffled -> mean and standard deviation over `splits` parts of exp E_x KL(p(y|x) || p(y)) = exp(H(y) - E_x H(y|x))."""
    scores = []
    for i in range(splits):
        p = logits[i * len(logits) // splits:(i + 1) * len(logits) // splits].double().softmax(1)  # (N / splits, C)
        scores.append(float(torch.exp(torch.special.entr(p.mean(0)).sum() - torch.special.entr(p).sum(1).mean())))
    return float(np.mean(scores)), float(np.std(scores))


def squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (n, D), b (m, D) -> (n, m) float64. Rows that differ by rounding only (the same image in two batches) count as equal."""
    a, b = a.double(), b.double()
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    d2 = norms - 2 * a @ b.T
    return torch.where(d2 < 1e-12 * norms, 0.0, d2)


def precision_recall(samples: torch.Tensor, reference: torch.Tensor, k: int = 3, block: int = 4096) -> tuple[float, float]:
    """Kynkäänniemi et al. 2019. samples (N, D), reference (M, D); N, M > k.

    A set's manifold is the union of the balls around its points that reach to their k-th nearest neighbour, the point itself left out.
    precision = share of samples in the reference's manifold, recall = share of the reference in the samples'. In blocks of block^2 distances.
    """
    def blocks(x: torch.Tensor) -> list[slice]:
        return [slice(i, i + block) for i in range(0, len(x), block)]

    def radii(x: torch.Tensor) -> torch.Tensor:  # (N, D) -> (N,) squared
        nearest = x.new_full((len(x), k), torch.inf, dtype=torch.float64)
        for n, i in enumerate(blocks(x)):
            for j in blocks(x)[n:]:  # d2 serves the rows i, and its transpose the rows j
                d2 = squared_distances(x[i], x[j])
                if i == j:
                    d2.fill_diagonal_(torch.inf)
                for rows, distances in ((i, d2), (j, d2.T))[:1 + (i != j)]:
                    nearest[rows] = torch.cat([nearest[rows], distances], 1).topk(k, largest=False).values
        return nearest.amax(1)

    samples_radii, reference_radii = radii(samples), radii(reference)
    sample_inside, reference_inside = (torch.zeros(len(x), dtype=torch.bool, device=x.device) for x in (samples, reference))
    for i in blocks(samples):
        for j in blocks(reference):
            d2 = squared_distances(samples[i], reference[j])
            sample_inside[i] |= (d2 <= reference_radii[j]).any(1)
            reference_inside[j] |= (d2 <= samples_radii[i, None]).any(0)
    return sample_inside.double().mean().item(), reference_inside.double().mean().item()


# ------------------------------------------------------------------------------------------------------------------ one side of the comparison
KEPT = 50_000  # images of a larger set, chosen at random, whose features stay in memory for precision, recall and IS: 400 MB of (50000, 2048)


@dataclass
class Side:
    """SAMPLES or REFERENCE: statistics, and the features they came from where there are images."""
    source: str
    features: str  # their name
    mu: np.ndarray
    sigma: np.ndarray
    num: int | None = None  # images behind mu and sigma; None: the file does not say
    pool: torch.Tensor | None = None  # (min(N, KEPT), D) float32, in a random order that is always the same
    size: str | None = None  # "64x64"


def read_statistics(path: str) -> tuple[Side | None, bool]:
    """The statistics in `path`, None when it is not an .npz that has them, and whether it has images (too)."""
    if not (path.lower().endswith(".npz") and os.path.isfile(path)):
        return None, True
    try:
        with np.load(path, allow_pickle=False) as file:
            if not {"mu", "sigma"} & set(file.files):
                return None, True
            mu, sigma = (np.asarray(file[name], np.float64) for name in ("mu", "sigma"))
            num = int(file["num"]) if "num" in file.files else None
            name = str(file["features"]) if "features" in file.files else Inception.name if mu.shape == (2048,) else "unnamed"
            has_images = bool({"images", "arr_0"} & set(file.files))
    except Exception as error:  # zipfile, zlib and numpy each have errors of their own for a damaged file
        raise UserError(f"{path}: not an .npz with mu and sigma: {first_line(error)}") from None
    if mu.ndim != 1 or sigma.shape != mu.shape * 2:
        raise UserError(f"{path}: mu is {mu.shape} and sigma {sigma.shape}, expected (D,) and (D, D)")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all() and np.allclose(sigma, sigma.T, rtol=1e-3, atol=1e-6)):
        raise UserError(f"{path}: mu and sigma must be finite and sigma symmetric: compute the statistics again")
    return Side(path, name, mu, sigma, num), has_images


def decoded_batches(images, part: range, source: str, batch_size: int, workers: int):
    """Batches (b, 3, H, W) uint8 of images `part`, in order. UserError names a broken image, and one whose size is not the first one's."""
    loader = iter(torch.utils.data.DataLoader(torch.utils.data.Subset(images, part), batch_size, num_workers=workers, collate_fn=list))
    first = None
    for start in range(part.start, part.stop, batch_size):
        try:
            batch = next(loader)  # of (H, W, 3)
        except UserError as error:  # a worker's arrives with its traceback before the message
            raise UserError(str(error).strip().splitlines()[-1].removeprefix("farmer.UserError: ")) from None
        except RuntimeError as error:
            raise UserError(f"{source}: a decoding process died ({first_line(error)}): try --workers 0") from None
        first = batch[0] if first is None else first
        for name, image in zip(images.names[start:min(start + batch_size, part.stop)], batch, strict=True):
            if image.shape != first.shape:
                sizes = [f"{n} is {w}x{h}" for n, (h, w, _) in ((images.names[part.start], first.shape), (name, image.shape))]
                raise UserError(f"{source}: mixed sizes: {', '.join(sizes)}: give all images one size")
        yield torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)


def sampled_batches(model, part: range, guidance: float, seed: int, batch_size: int):
    """Batches (b, 3, H, W) uint8 of samples `part`, all classes in turn: those that sample.py gives for the same seed."""
    labels = default_labels(part.stop, model.config)[part.start:]
    for images in sample_images(model, labels, seed=seed, batch_size=batch_size, guidance=guidance, start=part.start):
        yield torch.from_numpy(images).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)  # grey models give one channel


def share(num: int) -> range:
    """The images of this process: all of them, or under torchrun its part of 0 to num - 1."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return range(rank * num // world, (rank + 1) * num // world)


def gathered(rows, num: int, device: torch.device):
    """Pieces (b, D) of all processes' rows, in the order of the images, on process 0; there as they come when it is the only one."""
    if not dist.is_initialized():
        yield from rows
        return
    mine = torch.cat(list(rows)).to(device)
    longest = -(-num // dist.get_world_size())
    everyone = [mine.new_empty(longest, mine.shape[1]) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, F.pad(mine, (0, 0, 0, longest - len(mine))))
    for rank, part in enumerate(everyone):
        yield part[:(rank + 1) * num // len(everyone) - rank * num // len(everyone)].cpu()


@torch.inference_mode()
def extract(batches, num: int, features, source: str, device: torch.device) -> Side:
    """Batches (b, 3, H, W) uint8 of `num` images -> their Side. Kept features stand in torch-fidelity's order for the Inception Score."""
    place = torch.from_numpy(np.argsort(np.random.RandomState(2020).permutation(num)))  # image i -> its place
    moments, done, progress = None, 0, Progress(f"{source}: image", num)
    size = None

    def rows():
        nonlocal size
        for batch in batches:
            size = f"{batch.shape[3]}x{batch.shape[2]}"
            yield features(batch.to(device)).cpu()  # (b, D)
    for h in gathered(rows(), num, device):
        if moments is None:
            moments, pool = Moments(h.shape[1]), torch.empty(min(num, KEPT), h.shape[1])
        finite = h.isfinite().all(1)
        if not finite.all():
            raise UserError(f"{source}: {features.name} gives features that are not finite for image {done + int(finite.int().argmin())}")
        at = place[done:done + len(h)]
        pool[at[at < KEPT]] = h[at < KEPT]
        moments.add(h.numpy())
        done += len(h)
        progress(done)
    return Side(source, features.name, *moments.result(), num, pool, size)


def save_statistics(path: Path, side: Side) -> None:
    """mu and sigma, as pytorch-fid has them, with `num` and the name of the features: the whole file or nothing."""
    arrays = dict(mu=side.mu, sigma=side.sigma, features=side.features) | ({} if side.num is None else dict(num=side.num))
    write_file(path, lambda file: np.savez(file, **arrays))


# ---------------------------------------------------------------------------------------------------------------------------- the command line
def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def warn(message: str) -> None:
    print(f"fid.py: warning: {message}", file=sys.stderr)


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(prog="fid.py", description=__doc__)
    p.add_argument("samples", metavar="SAMPLES", help="folder, .zip or .npz; with --num a training directory or checkpoint")
    p.add_argument("reference", metavar="REFERENCE", nargs="?", help="folder, .zip or .npz; may be left out with --save-stats")
    p.add_argument("-n", "--num", type=int, help="draw this many samples from the model in SAMPLES, as many of each class")
    p.add_argument("--guidance", type=float, help="the paper's w for these samples, 0 = off (default: the checkpoint's)")
    p.add_argument("--seed", type=int, default=0, help="of these samples; nothing else is random (default %(default)s)")
    p.add_argument("--features", metavar="FILE.pt", help="TorchScript (.pt2: torch.export) module (N, 3, H, W) in [-1, 1] -> (N, D) as features")
    p.add_argument("--weights", metavar="PATH", help="pytorch-fid's weight file (default: downloaded once, into ~/.cache/farmer)")
    p.add_argument("--save-stats", metavar="X.npz", help="write mu and sigma of SAMPLES")
    p.add_argument("--batch-size", type=int, default=50, help="images at a time (default %(default)s)")
    p.add_argument("--workers", type=int, default=min(8, (os.cpu_count() or 2) // 2), help="processes that decode images (default %(default)s)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--json", action="store_true", help="one JSON object instead of text")
    args = p.parse_args(argv)
    for name, least in (("num", 2), ("batch_size", 1), ("workers", 0), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            p.error(f"--{name.replace('_', '-')}: got {value}, expected {least} or more")
    if args.guidance is not None and not (args.num and 0 <= args.guidance < float("inf")):
        p.error(f"--guidance: got {args.guidance}, expected a finite w >= 0, together with --num")
    if args.reference is None and not args.save_stats:
        p.error("REFERENCE is missing: it may be left out only with --save-stats")
    if args.weights and args.features:
        p.error("--weights is for the Inception and --features replaces it: give one of them")
    path = Path(args.save_stats or "x.npz").absolute()
    if path.suffix != ".npz" or path.is_dir() or not path.parent.is_dir():
        p.error(f"--save-stats: got {path}, expected a file name that ends in .npz, in a directory that exists")
    return args


def run(args: argparse.Namespace) -> dict:
    """The report. Everything is opened and checked before the first image, for 50,000 of them take long."""
    device = pick_device(args.device)
    rank, _ = init_distributed(device)
    torch.backends.cudnn.allow_tf32 = False  # features in float32
    model = load(checkpoint_path(args.samples), device)[0] if args.num else None
    inputs = [] if model else [(args.samples, *read_statistics(args.samples))]
    inputs += [(args.reference, *read_statistics(args.reference))] if args.reference else []
    inputs = [(path, stats, open_images(path) if has_images else None) for path, stats, has_images in inputs]
    for path, _, images in inputs:
        if images is not None and len(images) < 2:
            hint = ": to sample from the checkpoint in it, give --num" if os.path.exists(os.path.join(path, "ckpt.pt")) else ""
            raise UserError(f"{path}: got {len(images)} image, expected at least 2, better 50,000{hint}")

    features, sides = None, []
    if model or any(images for _, _, images in inputs):
        name = Path(args.features).name if args.features else Inception.name
        for path, stats, images in inputs:
            if stats and stats.features != name and not images:
                raise UserError(f"{path}: holds statistics of {len(stats.mu)} {stats.features} features, expected those of {name}: "
                                "compute them again with --save-stats")
        features = CustomFeatures(args.features, device) if args.features else load_inception(args.weights).to(device)
    if model:
        guidance = model.config.sampling.guidance if args.guidance is None else args.guidance
        batches = sampled_batches(model, share(args.num), guidance, args.seed, args.batch_size)
        sides.append(extract(batches, args.num, features, args.samples, device))
    for path, stats, images in inputs:
        side = stats
        if images:
            side = extract(decoded_batches(images, share(len(images)), path, args.batch_size, args.workers), len(images), features, path, device)
            if stats and stats.features == features.name:  # as ADM's evaluator: the file's own statistics come first
                side.mu, side.sigma, side.num = stats.mu, stats.sigma, stats.num
        sides.append(side)
    leave_distributed()
    if rank:
        sys.exit(0)  # process 0 has all features and writes the report
    report = score(*sides, features=features, device=device) | ({"guidance": guidance, "seed": args.seed} if model else {})
    if args.save_stats:
        save_statistics(Path(args.save_stats), sides[0])
    return report


@torch.inference_mode()
def score(samples: Side, reference: Side | None = None, features=None, device: str | torch.device = "cpu") -> dict:
    """Counts, features, and each metric, or None where these two sides do not give it."""
    for side in filter(None, (samples, reference)):
        if side.num is not None and side.num < len(side.mu):
            warn(f"{side.source}: {side.num} images for {len(side.mu)} features: the covariance is singular and the distance biased upwards")
    distance = precision = recall = None
    if reference:
        if (samples.features, len(samples.mu)) != (reference.features, len(reference.mu)):
            raise UserError("; ".join(f"{side.source} has {len(side.mu)} {side.features} features" for side in (samples, reference))
                            + ": compute both with the same features")
        if samples.size and reference.size and samples.size != reference.size:
            warn(f"{samples.source} is {samples.size}, {reference.source} {reference.size}: the distance includes that of the resolutions")
        distance = frechet_distance(samples.mu, samples.sigma, reference.mu, reference.sigma)
        if samples.pool is not None and reference.pool is not None and min(len(samples.pool), len(reference.pool)) > 3:
            precision, recall = precision_recall(samples.pool.to(device), reference.pool.to(device))
    is_fid = samples.features == Inception.name
    mean = std = None
    if is_fid and samples.pool is not None and len(samples.pool) >= 10:
        mean, std = inception_score(features.logits(samples.pool.to(device)))
    return {"fid" if is_fid else "fd": distance, "inception_score": mean, "inception_score_std": std, "precision": precision, "recall": recall,
            "num_samples": samples.num, "num_reference": reference and reference.num, "features": samples.features, "dim": len(samples.mu),
            "resize": Inception.resize if is_fid else CustomFeatures.resize}


def text(report: dict) -> str:
    """The report as lines of a metric and its value."""
    def number(name: str, spec: str = ".4f") -> str:
        return "n/a" if report[name] is None else f"{round(report[name], 4) + 0.0:{spec}}"  # + 0.0: no "-0.0000"

    rows = {"FID": number("fid")} if "fid" in report else {f"FD ({report['features']})": number("fd")}
    rows["IS"] = number("inception_score") + (f" ± {number('inception_score_std')} (10 splits)" if report["inception_score"] else "")
    rows |= {"precision": number("precision"), "recall": number("recall")}
    drawn = f" drawn with guidance {report['guidance']:g}, seed {report['seed']}" if "seed" in report else ""
    rows["images"] = f"{number('num_samples', ',.0f')} samples{drawn}, {number('num_reference', ',.0f')} reference"
    rows["features"] = f"{report['features']} ({report['dim']}), resize {report['resize']}"
    return "\n".join(f"{name:<{max(map(len, rows))}}  {value}" for name, value in rows.items())


def main(argv: list[str] | None = None) -> None:
    try:
        args = parse(argv)
        report = run(args)
    except UserError as error:
        print(f"fid.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    print(json.dumps(report) if args.json else text(report))


if __name__ == "__main__":
    main()
