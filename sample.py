"""Sample from a trained model: a grid picture or an .npz.

    python sample.py runs/tiny --labels 3,7 --guidance 2 --out threes_and_sevens.png
    python sample.py runs/tiny --num 50000 --out samples.npz
    python sample.py runs/tiny --sweep guidance=0,1,2,4 --out sweep.png    # a column per value, the same noise
    python sample.py runs/tiny --log-prob --out samples.npz    # log p(x) and its parts beside the images
    torchrun --nproc_per_node=8 sample.py runs/tiny -n 50000 --out samples.npz    # -n: torchrun stumbles over --num
"""
# ruff: noqa: I001  (support.cli comes before torch: Ctrl-C during that import is then no traceback)
from support.cli import Parser, Progress, UserError, add_fields, at_least, at_most, check_memory, check_writable
from support.cli import duration, given, run_script, write_file

import dataclasses
import math
import time

import numpy as np
import torch

from support.checkpoint import load, named_model
from support.distributed import gather, join, leave, pick_device, share
from support.sampling import check_options, chosen_classes, extremes, grid, parse_sweep, sample_images


def parse(argv: list[str] | None):
    name, module = named_model(argv)
    parser = Parser(prog="sample.py", description=__doc__)
    parser.add_argument("checkpoint", metavar="DIR_OR_CKPT", help="a run's directory or a .pt file")
    parser.add_argument("-n", "--num", type=int, help="images (default: 10 per label for a picture, else 1000)")
    parser.add_argument("--labels", help="classes to make, in turn, e.g. 0,3,7 (default: all)")
    parser.add_argument("--out", default="samples.png", metavar="FILE",
                        help="X.png: a grid, one row per label; X.npz: images uint8 (N, H, W, C) and labels")
    parser.add_argument("--sweep", metavar="FIELD=V1,V2", help="X.png: a row per image, a column per value")
    parser.add_argument("--log-prob", action="store_true",
                        help="X.npz: also log p(x) and its parts in nats, and X.png of the lowest and highest")
    parser.add_argument("--batch-size", type=int, default=100, help="images per batch; does not change them")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add_fields(parser.add_argument_group(f"sampling from {name} (default: as in the checkpoint)"), module.Sampling)
    args = parser.parse_args(argv)
    at_least(args, num=1, batch_size=1, seed=0)
    at_most(args, seed=2**63 - 1)
    if not args.out.endswith((".png", ".npz")):
        raise UserError(f"--out: got {args.out}, expected a name that ends in .png or .npz")
    if args.sweep and not args.out.endswith(".png"):
        raise UserError("--sweep: makes a picture; expected --out X.png")
    if args.log_prob and (args.sweep or not args.out.endswith(".npz")):
        raise UserError("--log-prob: expected --out X.npz, without --sweep")
    return args, module


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

    # The same labels in every process: rows of one class for a picture, classes in turn for an .npz.
    picture, num_classes = out.suffix == ".png", model.config.num_classes
    classes = chosen_classes(args.labels, num_classes, picture)
    num = args.num or (len(classes) if args.sweep else 10 * len(classes) if picture else 1000)
    check_memory(num * (model.config.channels * model.config.image_size**2 * 3 + 100), f"{num} images")
    width = math.ceil(num / len(classes))
    labels = [classes[i // width if picture else i % len(classes)] for i in range(num)]
    start = time.time()
    made = [draw(model, labels, choice, args, rank, device) for choice in columns.values()]
    leave()
    if rank:
        return
    indices, images, log_p = made[0]
    if picture:
        tiles = np.zeros((num, len(made), *images.shape[1:]), np.uint8)  # what is not finite stays black
        for column, (some, pixels, _) in enumerate(made):
            tiles[some, column] = pixels
        names = [str(labels[i]) for i in range(0, num, 1 if args.sweep else width)] if num_classes else None
        width = len(made) if args.sweep else width
        drawn = grid(tiles.reshape(-1, *images.shape[1:]), width, names, list(columns) if args.sweep else None)
        write_file(out, lambda f: drawn.save(f, "PNG"))
    else:
        write_file(out, lambda f: np.savez(f, images=images, labels=np.array(labels)[indices], **log_p))
    if args.log_prob and len(images):
        drawn = extremes(images, log_p)
        write_file(out.with_suffix(".png"), lambda f: drawn.save(f, "PNG"))
    guidance = getattr(options, "guidance", 0)
    print(f"{out}: {sum(len(m[0]) for m in made)} images in {duration(time.time() - start)}, guidance {guidance:g}")


def draw(model, labels: list[int], options, args, rank: int, device: torch.device):
    """On rank 0: indices (n,) of the finite images, uint8 images (n, H, W, C), log_prob's fields (n,) where asked."""
    c, mine = model.config, share(len(labels))
    progress = Progress("sampled", len(mine), quiet=rank > 0)
    some = torch.tensor(labels, dtype=torch.long)[mine.start:mine.stop]
    indices, images = [np.empty(0, np.int64)], [np.empty((0, c.image_size, c.image_size, c.channels), np.uint8)]
    fields = {}
    for at, pixels, x in sample_images(model, some, options, args.seed, args.batch_size, mine.start, progress):
        indices.append(at)
        images.append(pixels)
        if args.log_prob:
            with torch.no_grad():
                log_p = model.log_prob(x, torch.tensor(labels, device=device)[torch.from_numpy(at).to(device)])
            for name, values in log_p._asdict().items():
                fields.setdefault(name, []).append(values.cpu().numpy())
    parts = [np.concatenate(indices), np.concatenate(images), *(np.concatenate(v) for v in fields.values())]
    parts = [list(gather(part, device)) for part in parts]
    if rank:
        return None
    indices, images, *values = [np.concatenate(part) for part in parts]
    return indices, images, dict(zip(fields, values, strict=True))


if __name__ == "__main__":
    run_script(main)
