"""What fid.py compares: features of images, their mean and covariance, and files of these.

A feature network maps images (N, 3, H, W) uint8 to features (N, D) float32. It has a `name`, a
`digest` (the SHA-256 of its file) and a `resize`. There are two: `Inception`, Inception-v3 as of
2015-12-05, which defines FID, and the user's own, `ScriptFeatures`.
"""
import hashlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.cli import Progress, UserError, cache_directory, expanded, reading, write_file
from support.data import download
from support.distributed import gather, share

WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
KEPT = 50_000  # precision, recall and the Inception Score use at most this many images


# ----------------------------------------------------------------------------- layers
class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU: (N, C_in, H, W) -> (N, C_out, H', W').

    kernel: height and width, such as 1x7, padded so that H and W stay. 3x3v (valid) is not padded;
    3x3v2 is not padded and has stride 2.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: str):
        super().__init__()
        size, valid, stride = kernel.partition("v")
        height, width = size.split("x")
        self.conv = nn.Conv2d(
            in_channels, out_channels, (int(height), int(width)), int(stride or 1),
            "valid" if valid else "same", bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, h: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(h)), inplace=True)


POOLS = {
    # As in TensorFlow, the padding does not count in the average.
    "avg": nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "max": nn.MaxPool2d(3, 1, 1),
    "max2": nn.MaxPool2d(3, 2),
}


class Branches(nn.Module):
    """Branches on the same input, their outputs concatenated along the channels.

    A branch is a string of steps that run in order. A step is the name of a pool, or
    `name:channels:kernel` for a Conv of that name, or `a|b` for two Convs on the same input whose
    outputs are concatenated.
    """

    def __init__(self, in_channels: int, *branches: str):
        super().__init__()
        self.branches = []  # a branch is a list of steps, a step a list of layers
        self.out_channels = 0
        for branch in branches:
            channels = in_channels
            steps = []
            for step in branch.split():
                layers = []
                if step in POOLS:
                    layers.append(POOLS[step])
                else:
                    before = channels
                    channels = 0
                    for part in step.split("|"):
                        name, width, kernel = part.split(":")
                        self.add_module(name, Conv(before, int(width), kernel))
                        layers.append(self.get_submodule(name))
                        channels += int(width)
                steps.append(layers)
            self.branches.append(steps)
            self.out_channels += channels

    def forward(self, h: Tensor) -> Tensor:
        outputs = []
        for steps in self.branches:
            x = h
            for layers in steps:
                x = torch.cat([layer(x) for layer in layers], 1)
            outputs.append(x)
        return torch.cat(outputs, 1)


# ----------------------------------------------------------------------------- the network
STEM = """
    Conv2d_1a_3x3:32:3x3v2 Conv2d_2a_3x3:32:3x3v Conv2d_2b_3x3:64:3x3 max2
    Conv2d_3b_1x1:80:1x1 Conv2d_4a_3x3:192:3x3v max2
"""


def mixed_5(pool: int) -> list[str]:
    return [
        "branch1x1:64:1x1",
        "branch5x5_1:48:1x1 branch5x5_2:64:5x5",
        "branch3x3dbl_1:64:1x1 branch3x3dbl_2:96:3x3 branch3x3dbl_3:96:3x3",
        f"avg branch_pool:{pool}:1x1",
    ]


def mixed_6(c: int) -> list[str]:
    return [
        "branch1x1:192:1x1",
        f"branch7x7_1:{c}:1x1 branch7x7_2:{c}:1x7 branch7x7_3:192:7x1",
        f"""branch7x7dbl_1:{c}:1x1 branch7x7dbl_2:{c}:7x1 branch7x7dbl_3:{c}:1x7
            branch7x7dbl_4:{c}:7x1 branch7x7dbl_5:192:1x7""",
        "avg branch_pool:192:1x1",
    ]


def mixed_7(pool: str) -> list[str]:
    return [
        "branch1x1:320:1x1",
        "branch3x3_1:384:1x1 branch3x3_2a:384:1x3|branch3x3_2b:384:3x1",
        """branch3x3dbl_1:448:1x1 branch3x3dbl_2:384:3x3
           branch3x3dbl_3a:384:1x3|branch3x3dbl_3b:384:3x1""",
        f"{pool} branch_pool:192:1x1",
    ]


MIXED = {  # (N, 192, 35, 35) -> 5d (N, 288, 35, 35) -> 6e (N, 768, 17, 17) -> 7c (N, 2048, 8, 8)
    "Mixed_5b": mixed_5(32),
    "Mixed_5c": mixed_5(64),
    "Mixed_5d": mixed_5(64),
    "Mixed_6a": [
        "branch3x3:384:3x3v2",
        "branch3x3dbl_1:64:1x1 branch3x3dbl_2:96:3x3 branch3x3dbl_3:96:3x3v2",
        "max2",
    ],
    "Mixed_6b": mixed_6(128),
    "Mixed_6c": mixed_6(160),
    "Mixed_6d": mixed_6(160),
    "Mixed_6e": mixed_6(192),
    "Mixed_7a": [
        "branch3x3_1:192:1x1 branch3x3_2:320:3x3v2",
        """branch7x7x3_1:192:1x1 branch7x7x3_2:192:1x7 branch7x7x3_3:192:7x1
           branch7x7x3_4:192:3x3v2""",
        "max2",
    ],
    "Mixed_7b": mixed_7("avg"),
    "Mixed_7c": mixed_7("max"),  # Inception-v3 averages here; the graph of 2015-12-05 does not
}


class Inception(Branches):
    """Inception-v3 as FID defines it: images (N, 3, H, W) uint8 -> (N, 2048) float32.

    Parameters have the names in the weight file, where those of the stem are at the top level; so
    the stem is this module's own, single branch.
    """

    name = "inception-2015-12-05"
    digest = WEIGHTS_SHA256
    resize = "bilinear to 299x299, no antialiasing (pytorch-fid)"

    def __init__(self):
        super().__init__(3, STEM)  # (N, 3, 299, 299) -> (N, 192, 35, 35)
        channels = self.out_channels
        for name, branches in MIXED.items():
            block = Branches(channels, *branches)
            self.add_module(name, block)
            channels = block.out_channels
        self.fc = nn.Linear(channels, 1008)
        self.to(memory_format=torch.channels_last)  # twice as fast on a CPU

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        if images.is_floating_point():
            raise UserError("FID's Inception reads 8-bit images, these are floats; pass another "
                            "network with --features")
        x = images.float() / 255
        x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
        h = super().forward(2 * x - 1)
        for name in MIXED:
            h = self.get_submodule(name)(h)
        return h.mean((2, 3))

    @torch.inference_mode()
    def logits(self, pool: Tensor) -> Tensor:
        """pool (N, 2048) -> (N, 1008), without the bias, as in the reference Inception Score."""
        return F.linear(pool, self.fc.weight)


# ----------------------------------------------------------------------------- its weights
def load_inception(path: str | None = None) -> Inception:
    """The Inception network with pytorch-fid's weights, from `path` or downloaded once."""
    file = expanded(path) if path else cache_directory() / WEIGHTS_URL.rpartition("/")[2]
    if not path and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, partial(download, WEIGHTS_URL, WEIGHTS_SHA256, file.parent))
    with reading(file, f"expected the file from {WEIGHTS_URL}"):
        digest = sha256(file)
        if digest != WEIGHTS_SHA256:
            raise ValueError(f"its sha256 is {digest}, expected {WEIGHTS_SHA256}")
        model = Inception()
        model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# ----------------------------------------------------------------------------- any other network
class ScriptFeatures:
    """A TorchScript module that maps images (N, channels, H, W) float in [-1, 1] to (N, D).

    The module's attribute `channels` says what it reads: 3 for RGB, the default, or 1 for
    luminance. Images that are floats themselves, such as latents, are given to it as they are. The
    file is a program, which runs when it is opened.
    """

    resize = "none"

    def __init__(self, path: str, device: torch.device):
        self.path = expanded(path)
        self.name = self.path.name
        with reading(path, "expected a file written by torch.jit.script(module).save(FILE.pt)"):
            self.digest = sha256(self.path)
            with warnings.catch_warnings(action="ignore"):  # torch 2.14 calls TorchScript old
                self.module = torch.jit.load(self.path, map_location=device).eval()
        self.channels = getattr(self.module, "channels", 3)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """images (N, C, H, W) -> (N, D) float32. Raises UserError if the module cannot."""
        if not images.is_floating_point():
            images = as_floats(images, self.channels)
        advice = (f"its module was given {tuple(images.shape)} and must return (N, D) features; "
                  "a module for luminance needs an attribute channels = 1")
        with reading(self.path, advice):
            try:
                features = self.module(images.contiguous())
            except RuntimeError as error:  # the last line of a module's traceback has the reason
                raise ValueError(str(error).splitlines()[-1]) from None
            if features.shape[:-1] != images.shape[:1]:
                raise ValueError(f"it returned {tuple(features.shape)}")
        return features.float()


def as_floats(images: Tensor, channels: int) -> Tensor:
    """Images (N, C, H, W) uint8, C 1 or 3 -> (N, channels, H, W) float in [-1, 1].

    Grey becomes RGB; RGB becomes luminance exactly as with Pillow's convert("L").
    """
    if channels == 1 and images.shape[1] == 3:
        r, g, b = images.int().split(1, 1)
        images = (19595 * r + 38470 * g + 7471 * b + 32768) >> 16
    return images.expand(-1, channels, -1, -1).float() / 127.5 - 1


# ----------------------------------------------------------------------------- statistics
@dataclass
class Statistics:
    """Mean and covariance of features and, if they come from images, the features themselves."""

    path: str
    mu: np.ndarray  # (D,)
    sigma: np.ndarray  # (D, D)
    features: str  # the name of the network
    features_sha256: str | None = None  # of its file; None: unknown, as is what follows
    resize: str = "unknown"  # what is done to images before the network
    num: int | None = None  # how many images
    pool: Tensor = torch.empty(0)  # (min(N, KEPT), D), in a random order, the same every time
    kind: str = ""  # of its images: their size, and whether all are grey


FACTS = ("features", "features_sha256", "resize", "num")  # in a file, beside mu and sigma


def read_statistics(path: str, arrays) -> Statistics:
    """The statistics in an npz file of our own, pytorch-fid's or ADM's."""
    mu = arrays["mu"].astype(np.float64)
    sigma = arrays["sigma"].astype(np.float64)
    if sigma.shape != (len(mu), len(mu)) or not np.isfinite(mu.sum() + sigma.sum()):
        raise ValueError(f"got mu {mu.shape}, sigma {sigma.shape}, expected finite (D,), (D, D)")
    facts = dict(features=f"unknown features ({len(mu)} values)")
    if len(mu) == 2048:  # the files of pytorch-fid and ADM do not say that they are Inception's
        facts = dict(features=Inception.name, features_sha256=Inception.digest)
    facts |= {name: arrays[name].item() for name in FACTS if name in arrays}
    return Statistics(path, mu, sigma, **facts)


def save_statistics(path: str | Path, statistics: Statistics) -> None:
    """mu and sigma as pytorch-fid saves them, and what else is known of them."""
    facts = {name: getattr(statistics, name) for name in FACTS}
    facts = {name: value for name, value in facts.items() if value is not None}
    write_file(path, lambda file: np.savez(
        file, mu=statistics.mu, sigma=statistics.sigma, **facts))


# ----------------------------------------------------------------------------- measuring
@dataclass
class Side:
    """What is compared: images still to be measured or drawn, the statistics in a file, or both."""

    path: str
    known: Statistics | None = None  # those in its file
    num: int = 0  # how many images
    shape: tuple[int, ...] = ()  # of an image: (H, W, C)
    batches: Iterable = ()  # of this process: numbers (b,), images (b, H, W, C) uint8 or float32


def measure(side: Side, network, device: torch.device) -> Statistics | None:
    """The statistics of a side, on the first process; None on the others.

    Those in its file are used if `network` made them, as in ADM's evaluator.
    """
    if not side.num:
        return side.known
    everyone = gather(list(features_of(side, network, device)))
    if not everyone:
        return None
    batches = sum(everyone, [])
    num = sum(len(h) for h, _ in batches)
    if num < 2:
        raise UserError(f"{side.path}: got {num} images, expected at least 2")
    features = np.concatenate([h for h, _ in batches])
    statistics = side.known
    if not statistics or statistics.features_sha256 != network.digest:
        mu = features.mean(0, dtype=np.float64)
        sigma = np.cov(features, rowvar=False)  # in float64 too
        statistics = Statistics(
            side.path, mu, sigma, network.name, network.digest, network.resize, num)
    # The Inception Score needs its images in random order; this order is torch-fidelity's.
    order = np.random.RandomState(2020).permutation(num)
    statistics.pool = torch.from_numpy(features[order[:KEPT]])
    height, width, _ = side.shape
    colours = "grey" if all(grey for _, grey in batches) else "coloured"
    statistics.kind = f"{width}x{height} pixels, {colours}"
    return statistics


def features_of(side: Side, network, device: torch.device) -> Iterator[tuple[np.ndarray, bool]]:
    """For each batch of this process: features (b, D) float32, and whether all images are grey."""
    progress = Progress(f"{side.path}: image", len(share(side.num)))
    done = 0
    for numbers, images, *_ in side.batches:
        if len(numbers) == 0:  # none of these samples was finite
            continue
        pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).to(device)
        if not pixels.is_floating_point():
            pixels = pixels.expand(-1, 3, -1, -1)  # grey becomes RGB
        h = network(pixels).cpu().numpy()
        finite = np.isfinite(h).all(1)
        if not finite.all():
            raise UserError(f"{side.path}: {network.name} gives image {numbers[finite.argmin()]} "
                            "features that are not finite; remove the image or use other features")
        done += len(numbers)
        progress(done)
        yield h, (images == images[..., :1]).all()
