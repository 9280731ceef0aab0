"""Draw samples from a trained model, as a picture or an .npz.

    python sample.py runs/tiny --labels 3,7 --guidance 2 --out threes_and_sevens.png
    python sample.py runs/tiny --num 50000 --out samples.npz
    python sample.py runs/tiny --sweep guidance=0,1,2,4    # a column per value, same noise
    python sample.py runs/tiny --log-prob --out samples.npz    # images and their log p(x)
    torchrun --nproc_per_node=8 sample.py runs/tiny -n 50000 --out samples.npz
"""
import dataclasses
import time

import numpy as np
import torch
from PIL import Image

from support.checkpoints import load, named_model
from support.cli import (
    Parser,
    Progress,
    UserError,
    add_fields,
    at_least,
    check_writable,
    duration,
    given,
    run_script,
    value_types,
    write_file,
)
from support.distributed import gather, join, leave, pick_device, share
from support.sampling import (
    check_options,
    class_names,
    default_labels,
    grid,
    picture_classes,
    sample_images,
)


def parse(argv: list[str] | None):
    name, module = named_model(argv)
    parser = Parser(prog="sample.py", description=__doc__,
                    usage="python sample.py DIR_OR_CKPT [options]")
    parser.add_argument("checkpoint", metavar="DIR_OR_CKPT", help="a run's folder or a .pt file")
    parser.add_argument("-n", "--num", type=at_least(int, 1), metavar="N",
                        help="number of images (default: 1000 for X.npz; for a picture 10 per "
                        "class, with --sweep 1)")
    parser.add_argument("--labels", help="classes to draw, by name or number, such as 0,3,7 "
                        "(default: all, or 10 in a picture if there are more than 20)")
    parser.add_argument("--out", metavar="FILE",
                        help="X.png: a picture with a row per class; X.npz: images, uint8 "
                        "(N, H, W, C), and labels (default: samples.png, with --sweep sweep.png)")
    parser.add_argument("--sweep", metavar="FIELD=V1,V2",
                        help="a picture with a row per image and a column per value of a setting")
    parser.add_argument("--log-prob", action="store_true",
                        help="for X.npz: also save log p(x) and its parts in nats, and X.png, a "
                        "picture of the images with the lowest and the highest log-determinant")
    parser.add_argument("--batch-size", type=at_least(int, 1), default=100, metavar="N",
                        help="images at a time; does not change the images (default: 100)")
    parser.add_argument("--seed", type=at_least(int, 0), default=0, metavar="N",
                        help="seed; the noise of image i depends on it and on i alone (default: 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    group = parser.add_argument_group(
        f"sampling from {name} (a checkpoint may hold other defaults)")
    add_fields(group, module.Sampling)
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = "sweep.png" if args.sweep else "samples.png"
    if not args.out.endswith((".png", ".npz")):
        raise UserError(f"--out: got {args.out}, expected a name that ends in .png or .npz")
    if args.sweep and not args.out.endswith(".png"):
        raise UserError(f"--sweep: got --out {args.out}, expected X.png, as a sweep is a picture")
    if args.log_prob and (args.sweep or not args.out.endswith(".npz")):
        raise UserError("--log-prob: got a picture (--sweep or --out X.png), expected --out X.npz")
    return args, module


def chosen_classes(text: str, names: list[str] | None, num_classes: int) -> list[int]:
    """Reads --labels: names or numbers, separated by commas; num_classes is the null class."""
    classes = []
    for part in text.split(","):
        if names and part in names:
            classes.append(names.index(part))
        elif num_classes and part.isdigit() and int(part) <= num_classes:
            classes.append(int(part))
        else:
            expected = ", ".join(names) if names else f"numbers from 0 to {num_classes - 1}"
            if num_classes == 0:
                expected = "no --labels for an unconditional model"
            raise UserError(f"--labels: got {part!r}, expected {expected}")
    return classes


def parse_sweep(text: str, options) -> dict[str, object]:
    """Reads --sweep: "guidance=0,1" -> {"0": options with guidance 0, "1": ...}."""
    name, _, values = text.partition("=")
    name = name.replace("-", "_")
    kinds = value_types(type(options))
    if not values or name not in kinds:
        raise UserError(f"--sweep: got {text!r}, expected FIELD=V1,V2,... with a field of "
                        f"{', '.join(kinds)}")
    columns = {}
    for value in values.split(","):
        try:
            number = kinds[name](value)
        except ValueError:
            raise UserError(f"--sweep: got {value!r}, expected a value of type "
                            f"{kinds[name].__name__}") from None
        if name == "guidance" and number == 0:
            number = 1e-6  # practically 0, but with the same candidates as the other columns
        columns[value] = dataclasses.replace(options, **{name: number})
    return columns


def main(argv: list[str] | None = None) -> None:
    args, module = parse(argv)
    out = check_writable("--out", args.out)
    device = pick_device(args.device)
    rank, _ = join(device)
    model, extra = load(args.checkpoint, device)
    if args.log_prob and not hasattr(model, "log_prob"):
        raise UserError(f"--log-prob: {model.model_name} has no likelihood")
    options = dataclasses.replace(model.config.sampling, **given(args, module.Sampling))
    columns = parse_sweep(args.sweep, options) if args.sweep else {"": options}
    for choice in columns.values():
        check_options(choice, extra)

    # The labels, all classes in turn, are the same in every process.
    names = extra.get("classes")
    num_classes = model.config.num_classes
    picture = out.suffix == ".png"
    classes = picture_classes(num_classes) if picture else list(range(max(num_classes, 1)))
    if args.labels is not None:
        classes = chosen_classes(args.labels, names, num_classes)
    num = args.num
    if num is None:
        num = 1000
        if picture:
            num = len(classes) if args.sweep else 10 * len(classes)
    rows = default_labels(num, len(classes))
    if picture:
        rows = rows.sort().values  # puts the images of a class side by side
    labels = torch.tensor(classes)[rows]
    start = time.time()
    drawn = [draw(model, labels, choice, args, rank, device) for choice in columns.values()]
    leave()
    if rank > 0:
        return

    total = sum(len(numbers) for numbers, _, _ in drawn)
    numbers, images, log_p = drawn[0]
    if args.sweep:
        names = class_names(labels.tolist(), names, num_classes)
        tiles = np.stack([placed(num, numbers, images) for numbers, images, _ in drawn], 1)
        tiles = tiles.reshape(-1, *images.shape[1:])
        field = args.sweep.partition("=")[0]
        save_picture(out, grid(tiles, len(columns), names, list(columns), field))
    elif picture:
        width = int(rows.bincount().max())
        tiles = np.full((len(classes), width, *images.shape[1:]), 255, np.uint8)
        for row in range(len(classes)):
            mine = placed(num, numbers, images)[rows == row]
            tiles[row, :len(mine)] = mine
        tiles = tiles.reshape(-1, *images.shape[1:])
        save_picture(out, grid(tiles, width, class_names(classes, names, num_classes)))
    else:
        arrays = dict(images=images, labels=labels.numpy()[numbers], **log_p)
        write_file(out, lambda file: np.savez(file, **arrays))
    if args.log_prob and len(images):
        save_picture(out.with_suffix(".png"), extremes(images, log_p))
    print(f"{out}: {total} images in {duration(time.time() - start)}")


def draw(model, labels: torch.Tensor, options, args, rank: int, device: torch.device):
    """Draws the images, each process its share.

    On rank 0 returns the numbers (n,) of the finite images, these images (n, H, W, C) uint8, and
    with --log-prob the fields of log_prob, each (n,) in nats; None on the other processes.
    """
    c = model.config
    mine = share(len(labels))
    progress = Progress("sampled", len(mine), quiet=rank > 0)
    numbers = [np.empty(0, np.int64)]
    images = [np.empty((0, c.image_size, c.image_size, c.channels), np.uint8)]
    fields: dict[str, list[np.ndarray]] = {}
    part = labels[mine.start:mine.stop]
    batches = sample_images(
        model, part, options, args.seed, args.batch_size, mine.start, progress)
    for which, pixels, x in batches:
        numbers.append(which)
        images.append(pixels)
        if args.log_prob:
            with torch.no_grad():
                log_p = model.log_prob(x, labels[torch.from_numpy(which)].to(device))
            for name, values in log_p._asdict().items():
                fields.setdefault(name, []).append(values.cpu().numpy())
    arrays = {"numbers": np.concatenate(numbers), "images": np.concatenate(images)}
    arrays |= {name: np.concatenate(values) for name, values in fields.items()}
    everyone = {name: gather(array, device) for name, array in arrays.items()}
    if rank > 0:
        return None
    everyone = {name: np.concatenate(parts) for name, parts in everyone.items()}
    return everyone.pop("numbers"), everyone.pop("images"), everyone


def placed(num: int, numbers: np.ndarray, images: np.ndarray) -> np.ndarray:
    """All `num` images in order, black where a sample is missing because it was not finite."""
    tiles = np.zeros((num, *images.shape[1:]), np.uint8)
    tiles[numbers] = images
    return tiles


def extremes(images: np.ndarray, log_p: dict[str, np.ndarray], columns: int = 10) -> Image.Image:
    """A picture of the images (n, H, W, C) with the lowest and the highest log-determinant.

    Above each is its value in nats per dimension. A model without a log-determinant is sorted by
    log p. In the paper, images with an abnormal log-determinant look blurred (Fig. 8).
    """
    values = log_p.get("logdet", log_p["total"]) / images[0].size
    order = np.argsort(values)
    parts = []
    for row in (order[:columns], order[-columns:]):
        parts.append(grid(images[row], columns, None, [f"{v:.2f}" for v in values[row]]))
    picture = Image.new("RGB", (parts[0].width, 2 * parts[0].height), "white")
    picture.paste(parts[0], (0, 0))
    picture.paste(parts[1], (0, parts[0].height))
    return picture


def save_picture(path, picture: Image.Image) -> None:
    write_file(path, lambda file: picture.save(file, "PNG"))


if __name__ == "__main__":
    run_script(main)
