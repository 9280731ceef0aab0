"""Walks one image through a trained model and back: prints and draws each stage.

    python examples/tour.py assets/fashion.pt
    python examples/tour.py runs/tiny --data digits --out tour.png

A is the image and B another one: the first and the last held-out image of --data,
or without it samples of the model. Shapes are those of one image, equations those
of arXiv 2510.23588v2.
"""
# ruff: noqa: E402  (the repository's folder has to be found first)
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from farmer import Farmer
from support.checkpoints import load, own_data
from support.cli import Parser, UserError, check_writable, run_script, write_file
from support.data import dequantize, image_generators, open_split, quantize
from support.sampling import class_names, grid


def two_images(model, extra, data):
    """A and B (2, C, H, W), with the noise that training ended with, and their labels (2,)."""
    c = model.config
    generators = image_generators(0, range(2), torch.device("cpu"))
    if data is None:
        labels = torch.arange(2) % max(c.num_classes, 1)
        return model.sample(labels, replace(c.sampling, denoise=0.0), generators), labels
    split = open_split(
        data, c.image_size, c.channels, classes=extra["classes"], num_classes=c.num_classes,
        own=own_data(model))
    images = split.held_out or split.train
    pixels, labels = images.batch([0, len(images) - 1])
    training = extra["training"]
    return dequantize(pixels, training["noise"], training["noise_end"], generators), labels


def show(title, equation, values, sentence):
    """Prints a stage; values has its shape, after that of the batch."""
    shape = " x ".join(str(size) for size in values.shape[1:]) or "a number"
    print(f"{title:24} {shape:16} {equation}\n    {sentence}")


def heat(values, c):
    """A picture (C, H, W) of a number per token (N,): dark where it is highest, light where lowest.
    """
    low, high = values.min(), values.max()
    light = 2 * (high - values) / (high - low) - 1
    light = light.view(c.image_size // c.patch_size, -1)
    light = light.repeat_interleave(c.patch_size, 0).repeat_interleave(c.patch_size, 1)
    return light.expand(c.channels, -1, -1)


def walk(model, x, labels, names):
    """Prints the stages of image A; returns the rows of the picture, {row: {title: image}}."""
    c = model.config
    D = x[0].numel()  # nats/dim are nats divided by it

    # From the image to the latents, block by block.
    show("Image", "Section 3.2", x, f"A is of class {names[0]}, B of class {names[1]}.")
    X = model.patches(x)
    show("Patches X", "Section 3.2", X, f"The tokens: {c.patch_size} x {c.patch_size} pixels each.")
    states, _ = model.flow.states(X, labels)
    if c.whiten:
        show("Z_0", "not in the paper", states[0], "A fixed linear map whitens the channels: "
             f"log-det {c.num_tokens * model.flow.map_logdet / D:+.3f} nats/dim.")
    stages = {"A": x[0]}
    for t, block in enumerate(model.flow.blocks, 1):
        z, logdet = block(states[t - 1], labels)
        side = "after" if block.flip else "before"
        show(f"Z_{t}, by flow block {t}", "Eq. 8, 10", z, "Shifts and scales each token, given "
             f"those {side} it: log-det {logdet[0].sum() / D:+.3f} nats/dim.")
        scaled = z * states[0].std() / z.std()
        stages[f"block {t}"] = model.images(model.flow.unwhitened(scaled))[0]

    # How likely the latents are, and with that the image.
    Z, _ = model.flow(X, labels)
    Z_I, Z_R = Z.split([c.informative_dim, c.redundant_dim], -1)
    p_I, p_R = model.prior(Z_I, labels)
    log_p = model.log_prob(x, labels)
    show("Z_I, informative part", "Eq. 14", Z_I, "The first channels are to carry the image.")
    show("means of their mixtures", "Eq. 11", p_I.mu, "The AR Transformer predicts each token from "
         f"the class and those before: log p {log_p.informative[0] / D:+.3f} nats/dim.")
    if c.redundant_dim:
        show("Z_R, redundant part", "Eq. 14", Z_R, "The other channels are to hold only noise.")
        show("means of their mixture", "Eq. 11", p_R.mu, "All tokens share it: log p "
             f"{log_p.redundant[0] / D:+.3f} nats/dim.")
    show("log p(A|class)", "Eq. 13", log_p.total, f"The sum: {log_p.total[0] / D:+.3f} nats/dim, "
         f"{log_p.total[0]:.1f} nats. A density may well exceed 1.")
    tokens = model.token_log_prob(x, labels)
    show("... of each token", "Eq. 13", tokens.total, "Which patches are unlikely: from "
         f"{tokens.total[0].min():.1f} to {tokens.total[0].max():.1f} nats.")
    unlikely = {"A": x[0]} | {
        name: heat(part[0], c) for name, part in tokens._asdict().items() if part[0].std() > 0}

    # The way back, and what else can be made of latents.
    inverses = {"exact": "Eq. 9"}
    if model.student is not None:
        inverses["student"] = "Algorithm 2"
    for inverse, equation in inverses.items():
        back = model.decode(Z, replace(c.sampling, inverse=inverse), labels)
        show(f"Back, inverse {inverse}", equation, back,
             f"The largest error is {(back - x)[0].abs().max():.1g}.")
        stages[inverse] = back[0]
    rows = {"blocks": stages, "unlikely": unlikely, "guidance": {}}
    if c.redundant_dim:
        mixed = torch.cat([Z_I, Z_R.flip(0)], -1)
        mixed = model.decode(mixed, replace(c.sampling, inverse="exact"), labels)
        rows["split"] = {"A": x[0], "B": x[1], "A, Z^R of B": mixed[0], "A, Z^I of B": mixed[1]}
    for w in (0.0, 1.0, 2.0, 4.0) if c.num_classes else (0.0,):
        generators = image_generators(0, range(1), x.device)  # the same noise for each w
        drawn = model.sample(labels[:1], replace(c.sampling, guidance=w), generators)
        rows["guidance"][f"w = {w:g}"] = drawn[0]
    show("Sample", "Eq. 15", drawn, f"Drawn from class {names[0]} with guidance w = {w:g}.")
    return rows


def draw(rows):
    """{row: {title: image}} -> one picture."""
    columns = max(len(images) for images in rows.values())
    parts = []
    for name, images in rows.items():
        pixels = quantize(torch.stack(list(images.values()))).permute(0, 2, 3, 1).numpy()
        zoom = 96 // pixels.shape[1] + 1
        pixels = pixels.repeat(zoom, 1).repeat(zoom, 2)
        titles = [*images, *[""] * (columns - len(images))]
        parts.append(np.asarray(grid([pixels], [f"{name:8}"], titles)))
    return Image.fromarray(np.concatenate(parts))


def main(argv=None):
    parser = Parser(prog="tour.py", description=__doc__,
                    usage="python examples/tour.py DIR_OR_CKPT [options]")
    parser.add_argument("checkpoint", metavar="DIR_OR_CKPT",
                        help="a trained model: a run's folder or a .pt file")
    parser.add_argument("--data", metavar="DATA",
                        help="take A and B from here, whatever train.py takes as --data (default: "
                        "draw them from the model)")
    parser.add_argument("--out", metavar="FILE", default="tour.png",
                        help="the picture to write (default: tour.png)")
    args = parser.parse_args(argv)
    out = check_writable("--out", args.out)
    model, extra = load(args.checkpoint)
    if not isinstance(model, Farmer):
        raise UserError(f"{args.checkpoint}: got {model.model_name}, expected FARMER or a fork")
    with torch.no_grad():
        x, labels = two_images(model, extra, args.data)
        names = class_names(labels.tolist(), extra["classes"], model.config.num_classes)
        picture = draw(walk(model, x, labels, names or ["none", "none"]))
    write_file(out, lambda file: picture.save(file, "PNG"))
    print(f"done: see {out}")


if __name__ == "__main__":
    run_script(main)
