"""A small CNN that reads images: are samples what their labels say, and what do Z_I and Z_R carry?

    python support/classifier.py fit fashion-mnist reader.pt        # and say how many test images it reads right
    python support/classifier.py read reader.pt samples.npz         # how many samples are read as their label
    python support/classifier.py swap reader.pt runs/fashion        # permute Z_R, or Z_I, over the tokens; read again
    python support/classifier.py fit fashion-mnist f.pt --noise 0   # features for fid.py --features
    python support/classifier.py heldout digits heldout.npz         # the held-out images as a reference for fid.py

A network trained with noise is blind to that of samples: features for an FD need --noise 0. TorchScript files are
programs: they run when they are loaded.
"""
# ruff: noqa: E402, I001  (support.cli comes before torch: Ctrl-C during that import is then no traceback)
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.cli import Parser, Progress, UserError, at_least, at_most, check_writable, first_line, run_script
from support.cli import expanded, write_file

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from support.data import Images, dequantize, image_generators, open_images, quantize
from support.loader import ImageDataset, Split, open_split
from support.run import load_run
from support.sampling import grid


class Classifier(nn.Module):
    """Images (B, channels, H, W) in [-1, 1] -> features (B, 128); `classify` -> logits (B, classes)."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.channels, layers = channels, []
        for a, b, stride in ((channels, 32, 2), (32, 64, 1), (64, 128, 2), (128, 128, 1)):
            layers += [nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 128, 128), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    @torch.jit.export
    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.forward(x))


def to_float(images: Tensor) -> Tensor:
    """uint8 -> [-1, 1], as fid.py gives them to a network; channels last is faster on a CPU."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def open_data(args) -> Split:
    """Data as it is, unless flags say otherwise. Held out: its test split, or a fifth of each class, at most 500."""
    images = open_images(args.first, size=args.image_size or 16)
    with images.open(0) as image:
        size = args.image_size or min(image.size)
    if images.labels is None:
        raise UserError(f"{args.first} has no labels; expected class folders, or labels in the file")
    channels, holdout = args.channels or channels_of(images) or 3, args.holdout
    if holdout is None:
        smallest = np.unique(images.labels, return_counts=True)[1].min()
        holdout = 0 if images.test else min(500, int(smallest) // 5)
    return open_split(args.first, size, channels, holdout)


def channels_of(images: Images) -> int | None:
    """1 or 3; None for files, which are read as either."""
    return None if images.array is None else images.array.shape[-1]


def augmented(images: Tensor, how: str, noise: float) -> Tensor:
    """uint8 images (b, C, H, W) -> floats, shifted by up to a pixel, mirrored by chance, with noise of a random std."""
    x = to_float(images)
    if how != "none":
        x = x.roll(torch.randint(-1, 2, (2,)).tolist(), (2, 3))
    if how == "flip":
        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
    return x + noise * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x) if noise else x


def fit(args, split: Split, out: Path) -> None:
    """Trains on the data and writes a TorchScript file; prints the accuracy on images that it has not seen."""
    torch.manual_seed(args.seed)
    images, labels = split.data.batch(split.indices)
    model = Classifier(images.shape[1], split.num_classes).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
    batch = 100
    steps = max(3, args.epochs * len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    progress = Progress("steps", steps)
    for step in range(steps):
        i = torch.randint(len(images), (batch,))
        loss = F.cross_entropy(model.classify(augmented(images[i], args.augment, args.noise)), labels[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(step + 1)
    write_file(out, lambda f: torch.jit.save(torch.jit.script(model.eval()), f))
    seen = len(split.val_indices) == 0
    images, labels = (images, labels) if seen else split.val.batch(split.val_indices)
    right = read_right(model, images, labels)
    print(f"{out}: reads {100 * right:.1f}% of {len(labels)} {'training' if seen else 'held-out'} images right")


def load_classifier(path: str, other: str, channels: int | None) -> nn.Module:
    """A network that `fit` wrote. Raises UserError for other files, and where it does not read what `other` holds."""
    try:
        model = torch.jit.load(expanded(path)).eval()
        reads = int(model.channels)
    except (RuntimeError, ValueError, OSError, AttributeError) as e:
        raise UserError(f"{path}: not a classifier ({first_line(e)}); make one: classifier.py fit DATA {path}") from e
    if channels not in (None, reads):
        raise UserError(f"{other}: images of {channels} channels, but {path} reads {reads}; fit a network on data of "
                        f"{channels}, or with --channels {channels}")
    return model


@torch.no_grad()
def read_right(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Part of uint8 images (B, C, H, W) that are read as their label."""
    read = torch.cat([model.classify(to_float(x)).argmax(1) for x in images.split(500)])
    return (read == labels).float().mean().item()


def read(args) -> None:
    samples = open_images(args.second)
    model = load_classifier(args.first, args.second, channels_of(samples))
    if samples.labels is None:
        raise UserError(f"{args.second} has no labels; expected an .npz with images and labels, as sample.py writes")
    with samples.open(0) as image:
        dataset = ImageDataset(samples, min(image.size), int(model.channels))
    images, labels = dataset.batch(np.arange(len(samples)))
    print(f"{args.second}: {100 * read_right(model, images, labels):.1f}% of {len(labels)} images read as their label")


def swap(args) -> None:
    """What an i.i.d. draw of Z_R throws away shows in how much permuting it over the tokens changes the picture."""
    model, state = load_run(args.second, torch.device("cpu"))
    config, train = model.config, state.training
    classifier = load_classifier(args.first, args.second, config.channels)
    path = check_writable("--picture", args.picture) if args.picture else None
    if not hasattr(model, "exchange"):
        raise UserError(f"{args.second}: {model.model_name} has no exchange() of parts of its latents, as farmer has")
    split = open_split(train["data"], config.image_size, config.channels, train["holdout"], train["enlarge"])
    indices = (split.val_indices if len(split.val_indices) else split.indices)[:args.num]
    images, labels = split.val.batch(indices)
    generators = image_generators(args.seed, indices, torch.device("cpu"))
    x = dequantize(images, train["noise"], train["noise_end"], generators)
    tokens = torch.randperm(config.num_tokens, generator=torch.Generator().manual_seed(args.seed))
    parts = dict(nothing=("redundant", None), Z_R=("redundant", tokens), Z_I=("informative", tokens))
    for name, (part, order) in parts.items():
        swapped = model.exchange(x, part, order)
        error, right = (swapped - x).clamp(-2, 2).square().mean(), read_right(classifier, quantize(swapped), labels)
        print(f"{name:8s} permuted: MSE {float(error):.3f}, {100 * right:.1f}% read right")
    if path:
        picture = exchanged_pairs(model, x[:2 * (len(x) // 2)][:20])
        write_file(path, lambda f: picture.save(f, "PNG"))


def exchanged_pairs(model, x: Tensor) -> Image.Image:
    """Rows of real images a and b, a with b's Z_R, b with a's Z_R: what is seen to move is what Z_R carries."""
    partners = torch.arange(len(x)).view(-1, 2).flip(1).flatten()
    mixed = model.exchange(x, "redundant", None, partners)
    rows = torch.cat([x.unflatten(0, (-1, 2)), mixed.unflatten(0, (-1, 2))], 1).flatten(0, 1)
    images = quantize(rows).permute(0, 2, 3, 1).numpy()
    return grid(images, 4, None, ["a", "b", "Z_I a", "Z_I b"])


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="classifier.py", description=__doc__)
    parser.add_argument("action", choices=("fit", "heldout", "read", "swap"))
    parser.add_argument("first", help="fit, heldout: data, as train.py takes it; read, swap: a fitted network")
    parser.add_argument("second", help="fit, heldout: the file to write; read: samples with labels; swap: a run")
    parser.add_argument("--noise", type=float, default=0.1, help="fit: largest std of noise on images (default: 0.1)")
    parser.add_argument("--augment", choices=("none", "shift", "flip"), default="none",
                        help="fit: shift by a pixel; flip: mirror, too (default: none)")
    parser.add_argument("--epochs", type=int, default=3, help="fit: passes over the data (default: 3)")
    parser.add_argument("--holdout", type=int, help="images per class (default: the test split, or a fifth)")
    parser.add_argument("--image-size", type=int, help="fit, heldout: (default: the data's; digits 16)")
    parser.add_argument("--channels", type=int, choices=(1, 3), help="fit, heldout: (default: the data's; digits 3)")
    parser.add_argument("--num", type=int, default=200, help="swap: images (default: 200)")
    parser.add_argument("--picture", metavar="X.png", help="swap: also pairs of real images with Z_R exchanged")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    args = parser.parse_args(argv)
    at_most(args, noise=10)
    at_most(args, seed=2**63 - 1)
    at_least(args, noise=0, epochs=1, holdout=0, image_size=1, num=1, seed=0)
    if args.action in ("read", "swap"):
        return dict(read=read, swap=swap)[args.action](args)
    out = check_writable("the file to write", args.second)
    split = open_data(args)
    if args.action == "fit":
        return fit(args, split, out)
    if not len(split.val_indices):
        raise UserError(f"{args.first} holds nothing out; pass --holdout")
    images, labels = split.val.batch(split.val_indices)
    write_file(out, lambda f: np.savez(f, images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy()))


if __name__ == "__main__":
    run_script(main)
