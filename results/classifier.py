"""A small network that reads images: do samples show what their labels say?

    python results/classifier.py fit digits reader.pt          # and its accuracy
    python sample.py runs/tiny --out samples.npz
    python results/classifier.py read reader.pt samples.npz    # % read as labelled

fid.py can compare images in the features of such a network. Train it without
noise for that, else it does not see the noise of samples:

    python results/classifier.py fit digits features.pt --noise 0
    python fid.py runs/tiny digits:test --num 500 --features features.pt

Where there is no test split, `heldout` writes the images that `fit` with the same
--holdout does not see:

    python results/classifier.py heldout DATA real.npz --holdout 500

The network's file is TorchScript, a program that runs when it is loaded: take
none from strangers.
"""
# ruff: noqa: E402  (the repository's folder has to be found first)
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.cli import (
    Parser,
    Progress,
    UserError,
    at_least,
    check_writable,
    expanded,
    reading,
    run_script,
    write_file,
)
from support.data import Images, hold_out, labels_for, open_images
from support.inception import as_floats

BATCH = 100


# ----------------------------------------------------------------------------- the network
class Classifier(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> features (B, 128); `classify` -> logits (B, classes)."""

    classes: list[str]

    def __init__(self, channels: int, num_classes: int, classes: list[str]):
        super().__init__()
        self.channels = channels
        self.num_classes = num_classes
        self.classes = classes  # their names; [] where they are numbers
        layers = []
        for before, after, stride in ((channels, 32, 2), (32, 64, 1), (64, 128, 2), (128, 128, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 128, 128), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """The features, which are all that fid.py uses."""
        return self.body(x)

    @torch.jit.export
    def classify(self, x: Tensor) -> Tensor:
        """The logits of the classes."""
        return self.head(self.forward(x))


def to_float(images: Tensor, channels: int) -> Tensor:
    """As fid.py gives images to a network, but channels last, which is faster on a CPU."""
    return as_floats(images, channels).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def read_right(network: nn.Module, images: Images) -> float:
    """The percentage of images that the network reads as their label."""
    x, labels = everything(images)
    read = [network.classify(to_float(part, network.channels)).argmax(1) for part in x.split(BATCH)]
    return 100 * (torch.cat(read) == labels).float().mean().item()


# ----------------------------------------------------------------------------- actions
def open_data(args) -> tuple[Images, Images | None]:
    """The images to train on, and the held-out ones: by --holdout, else the test split."""
    size = args.image_size or (16 if args.data == "digits" else None)
    images, held = open_images(args.data, size, enlarge=args.enlarge)
    if images.labels is None or images.labels.ndim > 1:
        raise UserError(f"{args.data} has no labels; expected class folders, or labels in a file")
    if args.holdout:
        images, held = hold_out(images, args.holdout)
    print(f"data: {images.summary(held, not args.holdout)}", file=sys.stderr)
    return images, held


def everything(images: Images) -> tuple[Tensor, Tensor]:
    """All images (n, C, H, W) uint8 and labels (n,)."""
    return images.batch(np.arange(len(images)))


def fit(args) -> None:
    """Trains a network on DATA, writes it to FILE and prints its held-out accuracy."""
    out = check_writable("FILE", args.file)
    train, held = open_data(args)
    torch.manual_seed(0)
    images, labels = everything(train)
    classes = train.classes or []
    network = Classifier(images.shape[1], len(classes) or int(labels.max()) + 1, classes)
    network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=args.steps)
    progress = Progress("steps", args.steps)
    for step in range(args.steps):
        i = torch.randint(len(images), (BATCH,))
        x = to_float(images[i], network.channels)
        x += args.noise * torch.rand(BATCH, 1, 1, 1) * torch.randn_like(x)
        optimizer.zero_grad()
        F.cross_entropy(network.classify(x), labels[i]).backward()
        optimizer.step()
        schedule.step()
        progress(step + 1)
    with warnings.catch_warnings(action="ignore"):  # torch 2.14 and later call TorchScript old
        script = torch.jit.script(network.eval())
        write_file(out, lambda f: torch.jit.save(script, f))
    if held:
        held = labels_for(held, train.classes, network.num_classes)
    right = read_right(network, held or train)
    kind = "held-out" if held else "training"
    print(f"{out}: reads {right:.1f}% of {len(held or train)} {kind} images right")


def heldout(args) -> None:
    """Writes the held-out images of DATA, which `fit` does not see, to FILE."""
    out = check_writable("FILE", args.file)
    _, held = open_data(args)
    if held is None:
        raise UserError(f"{args.data}: nothing is held out; pass --holdout")
    images, labels = everything(held)
    images = images.permute(0, 2, 3, 1)
    write_file(out, lambda f: np.savez(f, images=images.numpy(), labels=labels.numpy()))


def read(args) -> None:
    """Prints the share of the images DATA that the network FILE reads as their label."""
    advice = f"fit a network: python results/classifier.py fit DATA {args.file}"
    with reading(args.file, advice), warnings.catch_warnings(action="ignore"):
        network = torch.jit.load(expanded(args.file)).eval()
    images, _ = open_images(args.data)
    images = labels_for(images, network.classes, network.num_classes)
    right = read_right(network, images)
    print(f"{args.data}: {right:.1f}% of {len(images)} images read as their label")


# ----------------------------------------------------------------------------- command line
def main(argv: list[str] | None = None) -> None:
    """Runs the action that the command line names."""
    parser = Parser(prog="classifier.py", description=__doc__,
                    usage="python results/classifier.py ACTION ...")
    actions = parser.add_subparsers(
        title="actions (ACTION --help explains more)", metavar="ACTION", required=True,
        prog="classifier.py")
    for function, arguments in ((fit, ("data", "file")), (heldout, ("data", "file")),
                                (read, ("file", "data"))):
        action = actions.add_parser(function.__name__, help=function.__doc__,
                                    description=function.__doc__)
        action.set_defaults(function=function)
        for argument in arguments:
            action.add_argument(argument, metavar=argument.upper(), help={
                "data": "images with labels: what train.py takes as --data",
                "file": "the network (.pt); for heldout the images (.npz)"}[argument])
        if function is read:
            continue
        action.add_argument("--holdout", type=at_least(int, 0), default=0, metavar="N",
                            help="hold out the last N images of each class (default: the test "
                            "split, where there is one)")
        action.add_argument("--image-size", type=at_least(int, 1), metavar="N",
                            help="crop and resize the images to N x N pixels (default: the size "
                            "that they have; digits: 16)")
        action.add_argument("--enlarge", action="store_true",
                            help="enlarge images that are smaller instead of refusing them")
        if function is fit:
            action.add_argument("--steps", type=at_least(int, 3), default=500, metavar="N",
                                help="of training, with 100 images each (default: 500)")
            action.add_argument("--noise", type=at_least(float, 0), default=0.1, metavar="STD",
                                help="add noise of a random std up to this one, for pixels in "
                                "[-1, 1]; 0 for the features of fid.py (default: 0.1)")
    args = parser.parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    run_script(main)
