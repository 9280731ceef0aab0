"""A small network that reads images: do samples show what their labels say?

    python results/classifier.py fit digits reader.pt          # and its accuracy
    python sample.py runs/tiny --out samples.npz
    python results/classifier.py read reader.pt samples.npz    # % read as labelled
    python results/classifier.py swap reader.pt runs/tiny

`swap` asks what the two parts of the latents, informative Z^I and redundant Z^R,
carry. Where exchanging Z^R changes the images, drawing it independently for each
token throws structure away.

fid.py can compare images in the features of such a network. Train it without
noise for that, else it does not see the noise of samples:

    python results/classifier.py fit digits features.pt --noise 0
    python results/classifier.py heldout digits real.npz       # the unseen images
    python fid.py runs/tiny real.npz --num 500 --features features.pt

The network's file is TorchScript, a program that runs when it is loaded: take
none from strangers.
"""
# ruff: noqa: E402  (the repository's folder has to be found first)
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.batches import ImageDataset, Split, dequantize, image_generators, open_split, quantize
from support.checkpoints import load_run, own_data
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
from support.datasets import labels_for, open_images

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


def load_classifier(path: str) -> nn.Module:
    """A network that `fit` wrote."""
    with reading(path, f"fit a network: python results/classifier.py fit DATA {path}"):
        return torch.jit.load(expanded(path)).eval()


def to_float(images: Tensor) -> Tensor:
    """uint8 -> [-1, 1], as fid.py gives images to a network; channels last is faster on a CPU."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def read_right(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The percentage of uint8 images (B, C, H, W) that the network reads as their label.

    A network of colours reads grey images too.
    """
    images = images.expand(-1, network.channels, -1, -1)
    read = torch.cat([network.classify(to_float(x)).argmax(1) for x in images.split(BATCH)])
    return 100 * (read == labels).float().mean().item()


# ----------------------------------------------------------------------------- fit, heldout, read
def open_data(args) -> Split:
    """The data, in their own size unless --image-size says otherwise; files are read as RGB."""
    images = open_images(args.data, size=16)  # the size at which digits are drawn
    if images.labels is None:
        raise UserError(f"{args.data} has no labels; expected class folders, or labels in a file")
    size = args.image_size or min(images.read(0).shape[:2])
    channels = 3 if images.array is None else images.array.shape[-1]
    split = open_split(args.data, size, channels, args.holdout)
    print(f"data: {split.summary}", file=sys.stderr)
    return split


def everything(dataset: ImageDataset) -> tuple[Tensor, Tensor]:
    """All images (n, C, H, W) uint8 and labels (n,)."""
    return dataset.batch(np.arange(len(dataset)))


def fit(args) -> None:
    """Trains a network on DATA, writes it to FILE and prints its held-out accuracy."""
    out = check_writable("FILE", args.file)
    split = open_data(args)
    torch.manual_seed(args.seed)
    images, labels = everything(split.train)
    network = Classifier(images.shape[1], split.num_classes, split.classes)
    network = network.to(memory_format=torch.channels_last)
    steps = max(3, args.epochs * len(images) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    progress = Progress("steps", steps)
    for step in range(steps):
        i = torch.randint(len(images), (BATCH,))
        x = to_float(images[i])
        x += args.noise * torch.rand(BATCH, 1, 1, 1) * torch.randn_like(x)
        optimizer.zero_grad()
        F.cross_entropy(network.classify(x), labels[i]).backward()
        optimizer.step()
        schedule.step()
        progress(step + 1)
    write_file(out, lambda f: torch.jit.save(torch.jit.script(network.eval()), f))

    kind = "held-out" if split.held_out else "training"
    images, labels = everything(split.held_out or split.train)
    right = read_right(network, images, labels)
    print(f"{out}: reads {right:.1f}% of {len(labels)} {kind} images right")


def heldout(args) -> None:
    """Writes the held-out images of DATA, which `fit` does not see, to FILE."""
    out = check_writable("FILE", args.file)
    split = open_data(args)
    if split.held_out is None:
        raise UserError(f"{args.data}: nothing is held out; pass --holdout")
    images, labels = everything(split.held_out)
    images = images.permute(0, 2, 3, 1)
    write_file(out, lambda f: np.savez(f, images=images.numpy(), labels=labels.numpy()))


def read(args) -> None:
    """Prints the share of the images SAMPLES that a network reads as their label."""
    network = load_classifier(args.network)
    samples = open_images(args.samples)
    samples = labels_for(samples, network.classes, network.num_classes)
    size = min(samples.read(0).shape[:2])
    dataset = ImageDataset(samples, np.arange(len(samples)), size, network.channels)
    right = read_right(network, *everything(dataset))
    print(f"{args.samples}: {right:.1f}% of {len(samples)} images read as their label")


# ----------------------------------------------------------------------------- swap
@torch.no_grad()
def exchanged(model: nn.Module, x: Tensor, labels: Tensor, part: str, images: Tensor,
              tokens: Tensor) -> Tensor:
    """Images x (B, C, H, W) after a part of their latents has been exchanged.

    The part, Z_I or Z_R, of token i of image b comes from token tokens[i] of image images[b].
    """
    Z, _ = model.flow(model.patches(x), labels)  # (B, N, d)
    informative = torch.arange(Z.shape[2]) < model.config.informative_dim
    taken = informative if part == "Z_I" else ~informative
    Z = torch.where(taken, Z[images][:, tokens], Z)
    exact = dataclasses.replace(model.config.sampling, inverse="exact")
    return model.decode(Z, exact, labels)


def swap(args) -> None:
    """Exchanges Z^I or Z^R between images or tokens and prints how much that changes."""
    network = load_classifier(args.network)
    model, state = load_run(args.run)
    c = model.config
    if not hasattr(c, "informative_dim"):
        raise UserError(f"{args.run}: {model.model_name} has no latents Z_I and Z_R")
    run = state.training
    split = open_split(run["data"], c.image_size, c.channels, run["holdout"], run["enlarge"],
                       state.classes, c.num_classes, own_data(model))
    print(f"data: {split.summary}", file=sys.stderr)
    dataset = split.held_out or split.train
    some = np.arange(min(args.num, len(dataset)))
    pixels, labels = dataset.batch(some)
    generators = image_generators(args.seed, some, pixels.device)
    x = dequantize(pixels, run["noise"], run["noise_end"], generators)

    images = torch.arange(len(x))
    tokens = torch.arange(c.num_tokens)
    shuffled = torch.randperm(c.num_tokens, generator=torch.Generator().manual_seed(args.seed))
    ways = {"left alone": (images, tokens), "exchanged between tokens": (images, shuffled),
            "exchanged between images": (images.roll(1), tokens)}
    for part in ("Z_I", "Z_R"):
        for name, sources in ways.items():
            y = exchanged(model, x, labels, part, *sources)
            error = (y - x).clamp(-2, 2).square().mean()
            right = read_right(network, quantize(y), labels)
            print(f"{part}, {name}: MSE {error:.3f}, {right:.1f}% read right")


# ----------------------------------------------------------------------------- command line
def main(argv: list[str] | None = None) -> None:
    """Runs the action that the command line names."""
    parser = Parser(prog="classifier.py", description=__doc__,
                    usage="python results/classifier.py ACTION ...")
    actions = parser.add_subparsers(
        title="actions (ACTION --help explains more)", metavar="ACTION", required=True,
        prog="classifier.py")
    parsers = []
    for function, arguments in (
        (fit, "DATA FILE [options]"),
        (heldout, "DATA FILE [options]"),
        (read, "NET SAMPLES"),
        (swap, "NET DIR_OR_CKPT [options]"),
    ):
        name = function.__name__
        action = actions.add_parser(
            name, help=function.__doc__, description=function.__doc__,
            usage=f"python results/classifier.py {name} {arguments}")
        action.set_defaults(function=function)
        parsers.append(action)
    of_fit, of_heldout, of_read, of_swap = parsers

    for action, kind in ((of_fit, "the network (.pt)"), (of_heldout, "the images (.npz)")):
        action.add_argument("data", metavar="DATA",
                            help="images with labels: what train.py takes as --data")
        action.add_argument("file", metavar="FILE", help=f"where to write {kind}")
        group = action.add_argument_group("data")
        group.add_argument("--holdout", type=at_least(int, 0), default=0, metavar="N",
                           help="hold out the last N images of each class (default: the test "
                           "split, where there is one)")
        group.add_argument("--image-size", type=at_least(int, 1), metavar="N",
                           help="crop and resize the images to N x N pixels (default: the size "
                           "that the first one has)")
    group = of_fit.add_argument_group("training")
    group.add_argument("--epochs", type=at_least(int, 1), default=3, metavar="N",
                       help="passes over the images (default: 3)")
    group.add_argument("--noise", type=at_least(float, 0), default=0.1, metavar="STD",
                       help="add noise of a random std up to this one, for pixels in [-1, 1]; 0 "
                       "for the features of fid.py (default: 0.1)")
    group.add_argument("--seed", type=at_least(int, 0), default=0, metavar="N",
                       help="random seed of weights, data order and noise (default: 0)")

    for action in (of_read, of_swap):
        action.add_argument("network", metavar="NET", help="a network that `fit` wrote")
    of_read.add_argument("samples", metavar="SAMPLES",
                         help="images with labels, such as the .npz of sample.py")
    of_swap.add_argument("run", metavar="DIR_OR_CKPT",
                         help="a trained model: a run's folder or a .pt file")
    group = of_swap.add_argument_group("images (the held-out ones of the model's data, if any)")
    group.add_argument("--num", type=at_least(int, 1), default=200, metavar="N",
                       help="exchange between the first N images (default: 200)")
    group.add_argument("--seed", type=at_least(int, 0), default=0, metavar="N",
                       help="random seed of their noise and of the order in which tokens are "
                       "exchanged (default: 0)")
    args = parser.parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    run_script(main)
