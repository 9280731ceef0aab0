"""A small CNN that reads images: are samples what their labels say, and what do Z_I and Z_R carry?

    python support/classifier.py fit digits digits.pt             # or a folder, .zip, .npz with labels; also the features for fid.py --features
    python support/classifier.py read digits.pt samples.npz       # how many samples are read as their label
    python support/classifier.py heldout digits heldout.npz       # the held-out images as a reference for fid.py --features digits.pt
    python support/classifier.py swap digits.pt runs/tiny         # permute Z_R, or Z_I, over the tokens, invert, and read again
"""
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from farmer import Config, UserError, patchify, quantize, unpatchify  # noqa: E402
from sample import Parser, run, write_file  # noqa: E402
from support.images import open_images  # noqa: E402
from train import Train, dequantized, load_run, sigma_at, training_data  # noqa: E402


class Classifier(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> features (B, 128); `classify` -> logits (B, classes)."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.body = nn.Sequential(*(layer for a, b, stride in ((channels, 32, 1), (32, 64, 2), (64, 128, 2), (128, 128, 1))
                                    for layer in (nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.ReLU())))
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))

    @torch.jit.export
    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.forward(x))


def to_float(images: Tensor) -> Tensor:
    """uint8 -> [-1, 1]."""
    return images.float() / 127.5 - 1


def held_out_data(data: str, holdout: int, size: int):
    """(dataset, indices, dataset, indices) of training and held-out images of `data` ("digits": the built-in ones)."""
    config = Config(image_size=size, num_classes=10 if data == "digits" else 10**6)
    return training_data(Train(data=data, holdout=0 if data == "digits" else holdout), config)


def fit(data: str, out: str, holdout: int, epochs: int, size: int, seed: int) -> None:
    """Trains on `data` and writes a TorchScript file; prints the accuracy on images that it has not seen."""
    torch.manual_seed(seed)
    dataset, indices, val, val_indices = held_out_data(data, holdout, size)
    images, labels = dataset.batch(indices)
    model = Classifier(images.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    steps = epochs * len(images) // 100
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        i = torch.randint(len(images), (100,))
        x = to_float(images[i])
        x = x + 0.1 * torch.rand(len(i), 1, 1, 1) * torch.randn_like(x)  # samples carry the model's noise
        shift = torch.randint(-1, 2, (2,)).tolist()
        loss = F.cross_entropy(model.classify(x.roll(shift, (2, 3))), labels[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    write_file(Path(out), lambda f: torch.jit.save(torch.jit.script(model), f))
    x, y = val.batch(val_indices)
    with torch.no_grad():
        right = (torch.cat([model.classify(to_float(part)) for part in x.split(500)]).argmax(1) == y).float().mean().item()
    print(f"{out}: reads {100 * right:.1f}% of {len(y)} held-out images right")


@torch.no_grad()
def read(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Part of uint8 images (B, C, H, W) that are read as their label."""
    return float((torch.cat([model.classify(to_float(x)) for x in images.split(500)]).argmax(1) == labels).float().mean())


@torch.no_grad()
def swap(classifier: nn.Module, run_dir: str, num: int, seed: int) -> None:
    """The swap test: what an i.i.d. draw of Z_R would throw away shows in how much permuting it over the tokens changes the picture."""
    farmer, _, train = load_run(run_dir, torch.device("cpu"))
    c = farmer.config
    _, _, val, indices = training_data(train, c)
    images, labels = val.batch(indices[:num])
    X = patchify(dequantized(images, torch.from_numpy(indices[:num]), seed, sigma_at(train, train.steps)), c.patch_size)
    Z, _ = farmer.flow(X)
    perm = torch.randperm(c.num_tokens, generator=torch.Generator().manual_seed(seed))
    for name, part in (("nothing", slice(0, 0)), ("Z_R", slice(c.informative_dim, None)), ("Z_I", slice(0, c.informative_dim))):
        swapped = Z.clone()
        swapped[..., part] = Z[:, perm][..., part]
        x = farmer.flow.inverse(swapped)
        accuracy = read(classifier, quantize(unpatchify(x, c.patch_size, c.channels)), labels)
        print(f"{name:8s} permuted: MSE {float((x - X).clamp(-2, 2).square().mean()):.3f}, {100 * accuracy:.1f}% read right")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="classifier.py", description=__doc__)
    parser.add_argument("action", choices=("fit", "heldout", "read", "swap"))
    parser.add_argument("first", help="fit, heldout: data; read, swap: a fitted classifier")
    parser.add_argument("second", help="fit, heldout: the file to write; read: samples (.npz with labels); swap: a run")
    parser.add_argument("--holdout", type=int, default=500, help="fit: images per class kept out of training")
    parser.add_argument("--image-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--num", type=int, default=200, help="swap: images")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if min(args.epochs, args.num, args.image_size) < 1 or args.holdout < 0 or args.seed < 0:
        raise UserError("--epochs, --num, --image-size, --holdout, --seed: expected at least 1, 1, 1, 0 and 0")
    if args.action in ("fit", "heldout") and not Path(args.second).resolve().parent.is_dir():
        raise UserError(f"{args.second}: its directory does not exist; create it first")
    if args.action == "heldout":
        _, _, dataset, indices = held_out_data(args.first, args.holdout, args.image_size)
        images, labels = dataset.batch(indices)
        return write_file(Path(args.second), lambda f: np.savez(f, images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy()))
    if args.action == "fit":
        return fit(args.first, args.second, args.holdout, args.epochs, args.image_size, args.seed)
    try:
        classifier = torch.jit.load(args.first).eval()
    except (RuntimeError, ValueError) as e:
        raise UserError(f"{args.first}: not a classifier ({str(e).splitlines()[0]}); make one with: classifier.py fit DATA {args.first}") from e
    if args.action == "swap":
        return swap(classifier, args.second, args.num, args.seed)
    samples = open_images(args.second)
    if samples.array is None or samples.labels is None:
        raise UserError(f"{args.second}: expected an .npz with images and labels, as sample.py writes")
    images, labels = torch.from_numpy(samples.array).permute(0, 3, 1, 2), torch.from_numpy(samples.labels)
    print(f"{args.second}: {100 * read(classifier, images, labels):.1f}% of {len(labels)} images read as their label")


if __name__ == "__main__":
    run(main)
