"""Checks a variant of FARMER where variants go wrong: a line each, right or wrong, with the number.

    python examples/check.py mine
    pytest -q examples --model mine      # the same, as a test

The model is the first preset of mine.py made small, with weights moved away from where they start.
Of a model that is not a variant of FARMER only what the scripts rely on is checked. Labels are
class numbers, or vectors (B, condition_dim) if its Config has a field of that name.
"""
# ruff: noqa: E402  (the repository's folder has to be found first)
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dataclasses
import math
import tempfile
import traceback

import torch

from farmer import Farmer
from support.checkpoints import build, load, model_file, save
from support.cli import Parser, run_script

SMALL = dict(
    image_size=8, patch_size=2, num_classes=3, flow_blocks=3, flow_layers=1, flow_width=32,
    ar_layers=1, ar_width=32, head_dim=16, ar_head_dim=16, informative_dim=3, class_tokens=2,
    images_per_item=3)


# ----------------------------------------------------------------------------- what is checked
def small_config(module):
    """The first preset, with the sizes of SMALL where it has these fields."""
    config = next(iter(module.PRESETS.values()))
    changes = {name: value for name, value in SMALL.items() if hasattr(config, name)}
    if config.num_classes == 0:
        changes.pop("num_classes")
    try:
        return dataclasses.replace(config, **changes)
    except ValueError:  # the variant needs other sizes
        return config


def small_model(name):
    """A fitted model with random weights."""
    torch.manual_seed(0)
    model = build(name, small_config(model_file(name)))
    if hasattr(model, "fit"):
        model.fit(images_of(model, 50))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


def images_of(model, B=3):
    c = model.config
    return torch.randn(B, c.channels, c.image_size, c.image_size,
                       generator=torch.Generator().manual_seed(1))


def labels_of(model, B=3):
    """Labels, all of them different where there are enough classes."""
    if hasattr(model.config, "condition_dim"):
        return torch.linspace(0, 1, B * model.config.condition_dim).view(B, -1)
    return torch.arange(B) % max(model.config.num_classes, 1)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def largest(a, b):
    """The largest difference between two tensors; not a number is as far as can be."""
    return (a - b).abs().nan_to_num(math.inf).max().item()


def scores(model):
    """What the model computes of some images: log p, or else the loss, (B,)."""
    x, y = images_of(model), labels_of(model)
    if hasattr(model, "log_prob"):
        return model.log_prob(x, y).total
    return model(x, y, generators(0, 1, 2))["loss"]


# A check returns whether the model is right, what was seen and, if that can help, what to do.
# ----------------------------------------------------------------------------- any model
def check_saving(model):
    """A checkpoint holds all that the model computes with."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.pt")
        save(file, model)
        torch.manual_seed(1)  # loading builds the model from other random numbers
        loaded, _ = load(file)
    before, after = scores(model), scores(loaded)
    error = largest(before, after)
    return error <= 1e-5 * before.abs().max(), (
        f"saving and loading changes what the model computes by {error:.2g}"), (
        "make every tensor that does not follow from the Config a parameter or a buffer")


def check_gradients(model):
    """DDP needs a gradient for every parameter in every call."""
    model.zero_grad()
    model(images_of(model), labels_of(model), generators(0, 1, 2))["loss"].mean().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    return not without, f"{len(without)} parameters get no gradient", ", ".join(without[:3])


def check_samples(model):
    """Resuming and torchrun need images that depend on their own generator alone."""
    y = labels_of(model)
    together = model.sample(y, None, generators(0, 1, 2))
    error = largest(together[1:2], model.sample(y[1:2], None, generators(1)))
    return error < 1e-3 * together.abs().max(), (
        f"an image drawn alone and in a batch differs by {error:.2g}"), (
        "take random numbers only from the generator of each image, and let nothing depend on the "
        "size of a batch")


def check_labels(model):
    """Half of a class number must not become a class in silence, nor a vector a class."""
    x, y = images_of(model), labels_of(model)
    if y.is_floating_point():
        error = largest(model.log_prob(x, y).total, model.log_prob(x, y * 0.9).total)
        return error > 0, f"a tenth less of a condition changes log p by {error:.2g} nats"
    if model.config.num_classes == 0 or not hasattr(model, "log_prob"):
        return True, "there are none, or no log_prob to pass them to"
    try:
        model.log_prob(x, y + 0.5)
    except (ValueError, TypeError, RuntimeError, IndexError):
        return True, "a label of 0.5 is refused"
    return False, "a label of 0.5 is taken for a class", "raise a ValueError"


# ----------------------------------------------------------------------------- variants of FARMER
def check_order(model):
    """Each block's unorder undoes its order."""
    X = model.patches(images_of(model))
    ordered = [block for block in model.flow.blocks if callable(getattr(block, "order", None))]
    wrong = sum(not torch.equal(block.unorder(block.order(X)), X) for block in ordered)
    return not wrong, (
        f"{wrong} of {len(ordered)} blocks return tokens to other places than they had"), (
        "override unorder beside order")


def check_patches(model):
    x = images_of(model)
    error = largest(model.images(model.patches(x)), x)
    return error == 0, f"images(patches(x)) differs from x by {error:.2g}"


def check_inverse(model):
    X = model.patches(images_of(model))
    y = model.check_labels(labels_of(model), len(X))
    Z, _ = model.flow(X, y)
    error = largest(model.flow.inverse(Z, labels=y), X)
    return error < 1e-3 * X.abs().max(), f"the largest error of the exact inverse is {error:.2g}"


def check_determinant(model):
    """The flow's log-determinant against that of autograd's Jacobian."""
    X = model.patches(images_of(model, 1))
    y = model.check_labels(labels_of(model, 1), 1)
    J = torch.autograd.functional.jacobian(lambda x: model.flow(x, y)[0], X)
    exact = torch.linalg.slogdet(J.view(X.numel(), -1).double()).logabsdet
    got = model.flow(X, y)[1][0]
    return largest(exact, got) < 1e-3 * X.numel(), (
        f"log|det| is {got:.2f} nats, that of autograd's Jacobian {exact:.2f}")


def check_tokens(model):
    """log p by token adds up, and each block tells the log-determinant at a token's own place."""
    x, y = images_of(model), labels_of(model)
    tokens = model.token_log_prob(x, y).total
    total = model.log_prob(x, y).total
    error = largest(tokens.sum(1), total)
    fits = tokens.shape == (len(x), model.config.num_tokens) and error < 1e-4 * total.abs().max()
    X = model.patches(x[:1])
    misplaced = 0.0
    for block in model.flow.blocks:
        label = model.check_labels(y[:1], 1)
        J = torch.autograd.functional.jacobian(lambda z: block(z, label)[0], X)  # noqa: B023
        own = torch.stack([J[0, i, :, 0, i] for i in range(X.shape[1])])  # dz_i / dx_i, (N, d, d)
        exact = torch.linalg.slogdet(own.double()).logabsdet
        misplaced = max(misplaced, largest(exact, block(X, label)[1][0]))
    return fits and misplaced < 1e-2, (
        f"log p by token adds up to log p within {error:.2g}; a block's log-determinant at a token "
        f"is off by up to {misplaced:.2g} nats"), "unorder the log-determinant like the tokens"


def check_cache(model):
    """Token by token with a cache, the prior predicts what it predicts for all at once.

    So no mixture depends on its own token or on later ones.
    """
    prior = model.prior
    y = model.check_labels(labels_of(model), 3)
    Z_I = torch.randn(3, prior.N, prior.d_I)
    expected = prior(Z_I, y)[0].log_prob(Z_I)
    cache = prior.transformer.new_cache(prior.M + prior.N)
    h = prior.transformer(prior.class_tokens(y), cache)[:, -1]
    got = []
    for i in range(prior.N):
        got.append(prior.informative(h).log_prob(Z_I[:, i]))
        token = prior.embed(Z_I[:, i:i + 1]) + prior.pos()[i]
        h = prior.transformer(token, cache)[:, -1]
    error = largest(torch.stack(got, 1), expected)
    return error < 1e-3 * expected.abs().max(), (
        f"with and without the cache, log p of a token differs by {error:.2g} nats"), (
        "a token may read earlier ones alone, in both ways of computing")


def check_layers(model):
    """--compile, --checkpointing and Muon act on what layers() lists."""
    inside = {p for layer in model.layers() for p in layer.parameters()}
    transformers = [block.transformer for block in model.flow.blocks
                    if hasattr(block, "transformer")]
    matrices = [p for part in (*transformers, model.prior.transformer) for p in part.parameters()
                if p.dim() == 2]
    missed = sum(p not in inside for p in matrices)
    return not missed, (
        f"layers() lists {len(model.layers())} layers; {missed} of the {len(matrices)} matrices in "
        "the Transformers are in none"), "keep a Transformer's layers in a ModuleList `layers`"


def check_student(model):
    """A student starts with a finite loss, trains as a whole, and reads labels if the flow does."""
    x, y = images_of(model), labels_of(model)
    try:
        distiller = model.distiller()
    except ValueError as error:
        return True, f"none: {error}"
    loss = distiller(x, y, generators(0, 1, 2))["loss"]
    loss.mean().backward()
    without = [n for n, p in distiller.named_parameters() if p.grad is None]
    other = y.flip(0)
    Z = model.teach(x, y)[0][-1]
    reads = largest(Z, model.teach(x, other)[0][-1]) > 1e-6
    asked, ignored = [], []
    for label in (model.check_labels(y, 3), model.check_labels(other, 3)):
        asked.append(model.flow.inverse(Z, "student", model.student, label))
    told = largest(*asked) > 1e-6
    if reads and not told:
        ignored.append("it ignores the labels that the flow reads")
    if without:
        ignored.append(f"{len(without)} of its parameters get no gradient")
    return loss.isfinite().all() and not ignored, "; ".join(
        [f"its first loss is {loss.mean():.3g}", *ignored])


ANY = dict(
    saving=check_saving, gradients=check_gradients, samples=check_samples, labels=check_labels)
FARMERS = dict(
    order=check_order, patches=check_patches, inverse=check_inverse, determinant=check_determinant,
    tokens=check_tokens, cache=check_cache, layers=check_layers, student=check_student)


def checked(name):
    """Yields (what was checked, whether it is right, a sentence) for the model called `name`."""
    checks = dict(ANY)
    if isinstance(small_model(name), Farmer):
        checks |= FARMERS
    for what, check in checks.items():
        model = small_model(name)  # each check may change its own
        try:
            right, *text = check(model)
        except Exception:
            right, text = False, [traceback.format_exc()]
        yield what, bool(right), text[0] if right else "; ".join(text)


def main(argv=None):
    parser = Parser(prog="check.py", description=__doc__,
                    usage="python examples/check.py MODEL")
    parser.add_argument("model", metavar="MODEL", help="name of the model's file, such as mine")
    args = parser.parse_args(argv)
    wrong = 0
    for what, right, text in checked(args.model):
        print(f"{'right' if right else 'WRONG':6} {what:12} {text}")
        wrong += not right
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
