"""A small network that reads images: are samples what their labels say? What do Z^I and Z^R carry?

    python results/classifier.py fit digits reader.pt           # and its accuracy on unseen images
    python results/classifier.py read reader.pt samples.npz     # how many are read as their label
    python results/classifier.py swap reader.pt runs/tiny       # exchange Z^R, or Z^I, and read
    python results/classifier.py fit digits f.pt --noise 0      # features for fid.py --features
    python results/classifier.py heldout digits heldout.npz     # the unseen images, for fid.py

A network that was trained with noise does not see the noise of samples, so features for a Fréchet
distance need --noise 0. The file is TorchScript, a program that runs when it is loaded.
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
    images = open_images(args.first, size=16)  # the size at which digits are drawn
    if images.labels is None:
        raise UserError(f"{args.first} has no labels; expected class folders, or labels in a file")
    size = args.image_size or min(images.read(0).shape[:2])
    channels = 3 if images.array is None else images.array.shape[-1]
    split = open_split(args.first, size, channels, args.holdout)
    print(f"data: {split.summary}", file=sys.stderr)
    return split


def everything(dataset: ImageDataset) -> tuple[Tensor, Tensor]:
    """All images (n, C, H, W) uint8 and labels (n,)."""
    return dataset.batch(np.arange(len(dataset)))


def fit(args) -> None:
    """Trains a network, writes it and prints its accuracy on images that it has not seen."""
    out = check_writable("the file to write", args.second)
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
    """Writes the images that `fit` does not see."""
    out = check_writable("the file to write", args.second)
    split = open_data(args)
    if split.held_out is None:
        raise UserError(f"{args.first}: nothing is held out; pass --holdout")
    images, labels = everything(split.held_out)
    images = images.permute(0, 2, 3, 1)
    write_file(out, lambda f: np.savez(f, images=images.numpy(), labels=labels.numpy()))


def read(args) -> None:
    """Prints how many labelled images a network reads as their label."""
    network = load_classifier(args.first)
    samples = open_images(args.second)
    samples = labels_for(samples, network.classes, network.num_classes)
    size = min(samples.read(0).shape[:2])
    dataset = ImageDataset(samples, np.arange(len(samples)), size, network.channels)
    right = read_right(network, *everything(dataset))
    print(f"{args.second}: {right:.1f}% of {len(samples)} images read as their label")


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
    """What an i.i.d. draw of Z_R throws away shows in how much exchanging it changes."""
    network = load_classifier(args.first)
    model, state = load_run(args.second)
    c = model.config
    if not hasattr(c, "informative_dim"):
        raise UserError(f"{args.second}: {model.model_name} has no latents Z_I and Z_R")
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
    parser = Parser(prog="classifier.py", description=__doc__)
    actions = dict(fit=fit, heldout=heldout, read=read, swap=swap)
    parser.add_argument("action", choices=actions)
    parser.add_argument("first", help="fit, heldout: data, as train.py takes them; else a network")
    parser.add_argument("second", help="fit, heldout: the file to write; read: images with labels; "
                        "swap: a run")
    parser.add_argument("--noise", type=at_least(float, 0), default=0.1,
                        help="fit: largest std of noise on the images (default: 0.1)")
    parser.add_argument("--epochs", type=at_least(int, 1), default=3, help="fit (default: 3)")
    parser.add_argument("--holdout", type=at_least(int, 0), default=0,
                        help="fit, heldout: images per class (default: the test split)")
    parser.add_argument("--image-size", type=at_least(int, 1),
                        help="fit, heldout (default: the data's)")
    parser.add_argument("--num", type=at_least(int, 1), default=200,
                        help="swap: images (default: 200)")
    parser.add_argument("--seed", type=at_least(int, 0), default=0, help="(default: 0)")
    args = parser.parse_args(argv)
    actions[args.action](args)


if __name__ == "__main__":
    run_script(main)
