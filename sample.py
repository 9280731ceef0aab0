"""Draw samples from a trained model, as a picture or an .npz.

    python sample.py runs/tiny --labels 3,7 --guidance 2 --out threes_and_sevens.png
    python sample.py runs/tiny --num 50000 --out samples.npz
    python sample.py runs/tiny --sweep guidance=0,1,2,4    # a column per value, same noise
    python sample.py runs/tiny --log-prob --out samples.npz    # images and their log p(x)
    torchrun --nproc_per_node=8 sample.py runs/tiny -n 50000 --out samples.npz

An .npz has the names that ADM's evaluator and others expect: arr_0 holds images (N, H, W, C), uint8
or what else the model was trained on, and arr_1 their labels; `numbers` are those of the images.
Ctrl-C writes what is there.
"""
import dataclasses
import sys
import time

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from support.checkpoints import DEFAULT_MODEL, first_checkpoint, model_file, read, restore
from support.cli import (
    Parser,
    UserError,
    at_least,
    check_writable,
    duration,
    given,
    is_lost,
    run_script,
    say,
    write_file,
)
from support.distributed import join, leave, pick_device
from support.sampling import (
    can_be_shown,
    check_options,
    class_names,
    default_labels,
    draw_together,
    grid,
    in_use,
    picture_classes,
    placed,
    shown,
    write_picture,
)


def parse(argv: list[str] | None):
    """The flags, and the checkpoint, whose model has some of them."""
    saved = first_checkpoint(sys.argv[1:] if argv is None else argv)
    defaults = model_file(DEFAULT_MODEL).Sampling()
    if saved is not None:
        defaults = saved.module.Sampling(**saved.config["sampling"])
    parser = Parser(prog="sample.py", description=__doc__,
                    usage="python sample.py DIR_OR_CKPT [options]")
    parser.add_argument("checkpoint", metavar="DIR_OR_CKPT", help="a run's folder or a .pt file")
    parser.add_argument("-n", "--num", type=at_least(int, 1), metavar="N",
                        help="number of images (default: 1000 for X.npz; for a picture 10 per "
                        "class, with --sweep 1)")
    parser.add_argument("--labels", help="classes to draw, by name or number, such as 0,3,7 "
                        "(default: all, or 10 in a picture if there are more than 20)")
    parser.add_argument("--out", metavar="FILE",
                        help="X.png: a picture with a row per class; X.npz: images and labels as "
                        "arrays (default: samples.png, with --sweep sweep.png)")
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
    parser.add_argument("--no-graphs", dest="graphs", action="store_false",
                        help="do not let a GPU record the loops over tokens and replay them from "
                        "the third batch on (default: it does; a CPU never does)")
    parser.add_settings("sampling (defaults of the checkpoint)", defaults)
    args = parser.parse_args(argv)
    saved = saved or read(args.checkpoint)
    if args.out is None:
        args.out = "sweep.png" if args.sweep else "samples.png"
    if not args.out.endswith((".png", ".npz")):
        raise UserError(f"--out: got {args.out}, expected a name that ends in .png or .npz")
    if args.sweep and not args.out.endswith(".png"):
        raise UserError(f"--sweep: got --out {args.out}, expected X.png, as a sweep is a picture")
    if args.log_prob and (args.sweep or not args.out.endswith(".npz")):
        raise UserError("--log-prob: got a picture (--sweep or --out X.png), expected --out X.npz")
    return args, saved


def chosen_classes(text: str, names: list[str] | None, num_classes: int) -> list[int]:
    """Reads --labels: names or numbers, separated by commas; num_classes is the null class."""
    if num_classes == 0:
        raise UserError(f"--labels: got {text!r}, expected none, since the model has no classes")
    known = {str(number): number for number in range(num_classes + 1)}
    known |= {name.casefold(): number for number, name in enumerate(names or [])}
    known |= {name: number for number, name in enumerate(names or [])}
    classes = []
    for part in text.split(","):
        number = known.get(part, known.get(part.casefold()))
        if number is None:
            expected = ", ".join(names) if names else f"numbers from 0 to {num_classes - 1}"
            raise UserError(f"--labels: got {part!r}, expected {expected}")
        classes.append(number)
    return classes


def parse_sweep(text: str, options) -> dict[str, object]:
    """Reads --sweep: "guidance=0,1" -> {"0": options with guidance 0, "1": ...}."""
    name, _, values = text.partition("=")
    name = name.replace("-", "_")
    if not values or name not in vars(options):
        raise UserError(f"--sweep: got {text!r}, expected FIELD=V1,V2,... with a field of "
                        f"{', '.join(vars(options))}")
    kind = type(vars(options)[name])
    columns = {}
    for value in values.split(","):
        try:
            setting = kind(value)
        except ValueError:
            raise UserError(f"--sweep: got {value!r}, expected a value of type "
                            f"{kind.__name__}") from None
        if name == "guidance" and setting == 0:
            setting = 1e-6  # practically 0, but with the same candidates as the other columns
        columns[value] = dataclasses.replace(options, **{name: setting})
    return columns


def draw(model, labels: Tensor, columns: dict, args) -> tuple[dict[str, list], bool]:
    """Draws the images once for each column, whose values are settings of sampling.

    Returns on rank 0 the batches of each column that has some, and whether Ctrl-C or the end of
    another process stopped it.
    """
    drawn = {}
    try:
        for name, options in columns.items():
            say(f"drawing {len(labels)} images: {in_use(model, options)}", sys.stderr)
            for batch in draw_together(model, labels, options, args.seed, args.batch_size,
                                       args.log_prob, args.graphs, quiet=False):
                drawn.setdefault(name, []).append(batch)
        leave()
    except (KeyboardInterrupt, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_lost(error):
            raise
        return drawn, True
    return drawn, False


def extremes(images: np.ndarray, log_p: dict[str, np.ndarray], columns: int = 10) -> Image.Image:
    """A picture of the images with the lowest and the highest log-determinant.

    Above each is its value in nats per dimension. A model without a log-determinant is sorted by
    log p. In the paper, images with an abnormal log-determinant look blurred (Fig. 8).
    """
    values = log_p.get("logdet", log_p["total"]) / images[0].size
    order = np.argsort(values)
    parts = []
    for row in (order[:columns], order[-columns:]):
        parts.append(grid([shown(images[row])], None, [f"{v:.2f}" for v in values[row]]))
    return Image.fromarray(np.concatenate(parts))


def main(argv: list[str] | None = None) -> None:
    args, saved = parse(argv)
    out = check_writable("--out", args.out)
    picture = out.suffix == ".png"
    device = pick_device(args.device)
    rank, _ = join(device)
    model = restore(saved, device)
    c = model.config
    if args.log_prob and not hasattr(model, "log_prob"):
        raise UserError(f"--log-prob: {model.model_name} has no likelihood")
    if picture and not can_be_shown(model):
        raise UserError(f"--out: got {out}, but this model makes arrays of {c.channels} channels, "
                        "which are no pictures; expected X.npz")
    options = dataclasses.replace(c.sampling, **given(args, c.sampling))
    columns = parse_sweep(args.sweep, options) if args.sweep else {"": options}
    for choice in columns.values():
        check_options(choice, saved.extra)

    # The labels, all classes in turn, are the same in every process.
    names = saved.extra.get("classes")
    classes = picture_classes(c.num_classes) if picture else list(range(max(c.num_classes, 1)))
    if args.labels is not None:
        classes = chosen_classes(args.labels, names, c.num_classes)
    choices = torch.tensor(classes)
    if saved.extra.get("conditions") is not None:
        choices = saved.extra["conditions"][:5 if picture else None]
    num = args.num or 1000
    if picture and args.num is None:
        num = len(choices) * (1 if args.sweep else 10)
    rows = default_labels(num, len(choices))
    if picture:
        rows = rows.sort().values  # puts the images of a class side by side
    labels = choices[rows]

    start = time.monotonic()
    drawn, stopped = draw(model, labels, columns, args)
    if rank > 0:
        return
    if not drawn:
        print("stopped before the first images were there: nothing is written", file=sys.stderr)
        sys.exit(130)

    if args.sweep:
        tiles = np.stack([placed(batches, num, c) for batches in drawn.values()], 1)
        write_picture(out, grid(
            tiles, class_names(labels.tolist(), names, c.num_classes), list(drawn),
            args.sweep.partition("=")[0]))
    elif picture:
        images = placed(drawn[""], num, c)
        write_picture(out, grid([images[(rows == row).numpy()] for row in range(len(choices))],
                                class_names(classes, names, c.num_classes)))
    else:
        numbers, images, log_p = zip(*drawn[""], strict=True)
        order = np.concatenate(numbers).argsort()
        numbers = np.concatenate(numbers)[order]
        images = np.concatenate(images)[order]
        log_p = {name: np.concatenate([part[name] for part in log_p])[order] for name in log_p[0]}
        write_file(out, lambda file: np.savez(
            file, arr_0=images, arr_1=labels.numpy()[numbers], numbers=numbers, **log_p))
        if log_p and len(images) and can_be_shown(model):
            write_picture(out.with_suffix(".png"), extremes(images, log_p))
    total = sum(len(numbers) for batches in drawn.values() for numbers, _, _ in batches)
    if stopped:
        print(f"stopped: {out} holds {total} of {num * len(columns)} images", file=sys.stderr)
        sys.exit(130)
    print(f"{out}: {total} images in {duration(time.monotonic() - start)}")


if __name__ == "__main__":
    run_script(main)
