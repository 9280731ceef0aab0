"""The network whose features FID compares: Inception-v3 as of 2015-12-05, with its weights."""
import hashlib
import io
import sys
import urllib.request
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.cli import cache_directory, expanded, reading, write_file

WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


# ----------------------------------------------------------------------------- layers
class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU: (N, C_in, H, W) -> (N, C_out, H', W').

    kernel: height and width, "3" or "1x7", padded so that H and W stay. "3v" (valid) is not
    padded; "3v2" is not padded and has stride 2.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: str):
        super().__init__()
        size, valid, stride = kernel.partition("v")
        height, _, width = size.partition("x")
        size = (int(height), int(width or height))
        padding = 0 if valid else (size[0] // 2, size[1] // 2)
        stride = int(stride or 1)
        self.conv = nn.Conv2d(in_channels, out_channels, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, h: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(h)), inplace=True)


POOLS = {
    # As in TensorFlow, the padding does not count in the average.
    "avg": lambda h: F.avg_pool2d(h, 3, 1, 1, count_include_pad=False),
    "max": lambda h: F.max_pool2d(h, 3, 1, 1),
    "max2": lambda h: F.max_pool2d(h, 3, 2),
}


class Branches(nn.Module):
    """Branches on the same input, their outputs concatenated along the channels.

    A branch is a string of steps that run in order. A step is the name of a pool, or
    `name:channels:kernel` for a Conv of that name, or `a|b` for two Convs on the same input whose
    outputs are concatenated.
    """

    def __init__(self, in_channels: int, *branches: str):
        super().__init__()
        self.branches = [branch.split() for branch in branches]
        self.out_channels = sum(self.add_branch(in_channels, steps) for steps in self.branches)

    def add_branch(self, channels: int, steps: list[str]) -> int:
        """Makes the Convs of a branch. Returns the number of its output channels."""
        for step in steps:
            if step in POOLS:
                continue
            total = 0
            for part in step.split("|"):
                name, width, kernel = part.split(":")
                self.add_module(name, Conv(channels, int(width), kernel))
                total += int(width)
            channels = total
        return channels

    def run_branch(self, h: Tensor, steps: list[str]) -> Tensor:
        for step in steps:
            if step in POOLS:
                h = POOLS[step](h)
            else:
                names = [part.partition(":")[0] for part in step.split("|")]
                h = torch.cat([self.get_submodule(name)(h) for name in names], 1)
        return h

    def forward(self, h: Tensor) -> Tensor:
        return torch.cat([self.run_branch(h, steps) for steps in self.branches], 1)


# ----------------------------------------------------------------------------- the network
STEM = """
    Conv2d_1a_3x3:32:3v2 Conv2d_2a_3x3:32:3v Conv2d_2b_3x3:64:3 max2
    Conv2d_3b_1x1:80:1 Conv2d_4a_3x3:192:3v max2
"""


def mixed_5(pool: int) -> list[str]:
    return [
        "branch1x1:64:1",
        "branch5x5_1:48:1 branch5x5_2:64:5",
        "branch3x3dbl_1:64:1 branch3x3dbl_2:96:3 branch3x3dbl_3:96:3",
        f"avg branch_pool:{pool}:1",
    ]


def mixed_6(c: int) -> list[str]:
    return [
        "branch1x1:192:1",
        f"branch7x7_1:{c}:1 branch7x7_2:{c}:1x7 branch7x7_3:192:7x1",
        f"""branch7x7dbl_1:{c}:1 branch7x7dbl_2:{c}:7x1 branch7x7dbl_3:{c}:1x7
            branch7x7dbl_4:{c}:7x1 branch7x7dbl_5:192:1x7""",
        "avg branch_pool:192:1",
    ]


def mixed_7(pool: str) -> list[str]:
    return [
        "branch1x1:320:1",
        "branch3x3_1:384:1 branch3x3_2a:384:1x3|branch3x3_2b:384:3x1",
        """branch3x3dbl_1:448:1 branch3x3dbl_2:384:3
           branch3x3dbl_3a:384:1x3|branch3x3dbl_3b:384:3x1""",
        f"{pool} branch_pool:192:1",
    ]


MIXED = {  # (N, 192, 35, 35) -> 5d (N, 288, 35, 35) -> 6e (N, 768, 17, 17) -> 7c (N, 2048, 8, 8)
    "Mixed_5b": mixed_5(32),
    "Mixed_5c": mixed_5(64),
    "Mixed_5d": mixed_5(64),
    "Mixed_6a": [
        "branch3x3:384:3v2",
        "branch3x3dbl_1:64:1 branch3x3dbl_2:96:3 branch3x3dbl_3:96:3v2",
        "max2",
    ],
    "Mixed_6b": mixed_6(128),
    "Mixed_6c": mixed_6(160),
    "Mixed_6d": mixed_6(160),
    "Mixed_6e": mixed_6(192),
    "Mixed_7a": [
        "branch3x3_1:192:1 branch3x3_2:320:3v2",
        """branch7x7x3_1:192:1 branch7x7x3_2:192:1x7 branch7x7x3_3:192:7x1
           branch7x7x3_4:192:3v2""",
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
        download_weights(file)
    with reading(file, f"expected the file from {WEIGHTS_URL}"):
        content = file.read_bytes()
        check_weights(content)
        model = Inception()
        model.load_state_dict(torch.load(io.BytesIO(content), weights_only=True))
    return model.eval()


def check_weights(content: bytes) -> None:
    digest = hashlib.sha256(content).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise ValueError(f"its sha256 is {digest}, expected {WEIGHTS_SHA256}")


def download_weights(file: Path) -> None:
    print("downloading the weights of FID's Inception, 91 MiB", file=sys.stderr, flush=True)
    with reading(WEIGHTS_URL, "download it in another way and pass it with --weights PATH"):
        with urllib.request.urlopen(WEIGHTS_URL, timeout=30) as response:
            content = response.read()
        check_weights(content)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, lambda out: out.write(content))
