"""ARFlow (arXiv 2501.16085) and SiT (arXiv 2401.08740) in pixels: flow matching, no likelihood.

    python train.py --model baselines.arflow --preset digits          # ARFlow, items of 5 images
    python train.py --model baselines.arflow --preset arflow1-digits  # the same on single images
    python train.py --model baselines.arflow --preset sit-digits      # SiT

x_t = t x + (1 - t) eps goes from noise (t = 0) to an image (t = 1); a Transformer predicts its
velocity x - eps. ARFlow trains on items: S images of one class with times t_1 <= ... <= t_S. Each
image attends to itself by softmax attention and to the images before it, which have more noise, by
linear attention with a state M of constant size. Sampling makes one image: its earlier steps take
the place of the images before it, and M is carried from step to step.

    I  items of a batch     d  C p^2, values of a token     h  hidden features (I, S, N, W)
    S  images of an item    W  Transformer width            c  time and class (I, S, W)
    N  tokens of an image   H  attention heads, W / e       M  state (I, H, e, e)
    C  channels             e  head size                    a  log of a token's decay (I, S, H, N)

What differs from the papers: pixels instead of an autoencoder's latents; all channels are guided
(theirs: 3 of 4); the norm of the gradient is clipped, not its values, and steps with an outlier
gradient are skipped; the average of the weights starts with a short memory; the Euler sampler of
the ODE is ours; an epoch visits every image once, instead of drawing classes with equal
probability. SiT's authors train with Adam's betas (.9, .999); our loop uses (.9, .95) throughout.
"""
import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farmer import (
    Generators,
    attention,
    check_multiple,
    check_settings,
    full_precision,
    patchify,
    random,
    setting,
    unpatchify,
)

EPS = 1e-6  # the epsilon of every norm
LAST_STEP = 0.04  # the SDE's score is singular at t = 1, so its last step, from 0.96, has no noise
DECAY = 16  # divides the log of the decay, so that M starts as a memory of about 24 images

State = list[Tensor | None]  # M of every layer; None on single images


# ----------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class Sampling:
    """How to sample. ARFlow's authors use sampler sde, steps 250, guidance 0.5 (they write 1.5)."""

    guidance: float = setting(
        0.0, "w: the velocity is (1 + w) conditional - w unconditional; 0 = off", 0)
    sampler: str = setting(
        "ode", "Euler steps of the ODE or Euler-Maruyama steps of the SDE", choices=("ode", "sde"))
    steps: int = setting(50, "network calls per image; with guidance on a doubled batch", 2)

    def __post_init__(self):
        check_settings(self)


@dataclass(frozen=True)
class Config:
    """Every hyperparameter of the model. Sizes are in pixels, tokens or channels."""

    image_size: int = setting(16, "height and width of an image in pixels", 1)
    channels: int = setting(3, "1 (grey) or 3 (RGB); the papers' latents have 4", 1)
    patch_size: int = setting(4, "p; a token is a patch of p x p pixels", 1)
    num_classes: int = setting(10, "0 = unconditional; label num_classes is the null class", 0)
    attention: str = setting("arflow", "ARFlow's attention or SiT's", choices=("arflow", "sit"))
    images_per_item: int = setting(5, "S, images of one class in an item; 1 = no state", 1)
    item_drop: float = setting(0.1, "fraction of items trained with the null class", 0)
    layers: int = setting(6, "Transformer layers", 1)
    width: int = setting(128, "W, Transformer width, a multiple of 4", 4)
    head_dim: int = setting(32, "e, channels of an attention head; divides the width", 1)
    sampling: Sampling = Sampling()

    def __post_init__(self):
        check_settings(self)
        check_multiple(self, "image_size", of="patch_size")
        check_multiple(self, "width", of="head_dim")
        if self.width % 4:
            raise ValueError(f"width: got {self.width}, expected a multiple of 4")
        if self.attention == "sit" and self.images_per_item > 1:
            raise ValueError(f"images_per_item: got {self.images_per_item}, expected 1, as SiT "
                             "has no state")


# ----------------------------------------------------------------------------- items
def epoch_order(labels: Tensor, generator: torch.Generator, S: int = 5) -> Tensor:
    """The order of an epoch in items: S images of one class in a row, all different.

    labels (n,) int64 -> the places (m,) int64 of the images, with the same m in every epoch. Every
    image comes once; but where S does not divide the size of a class, some of its images come twice
    to fill the last item. With S = 1 this is a random permutation.
    """
    items = []
    for label in labels.unique().tolist():
        places = (labels == label).nonzero().flatten()
        n = len(places)
        if n < S:
            raise ValueError(f"class {label}: got {n} images to train on, expected at least {S} "
                             "for an item; add images or lower --images-per-item")
        places = places[torch.randperm(n, generator=generator)]
        places = torch.cat([places, places[:-n % S]])
        items.append(places.view(-1, S))
    items = torch.cat(items)
    return items[torch.randperm(len(items), generator=generator)].flatten()


# ----------------------------------------------------------------------------- functions
def rms_norm(x: Tensor) -> Tensor:
    """x divided by the root mean square of its last axis."""
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights, then an image's scale and shift.

    h (..., N, W), shift and scale (..., 1, W) -> (..., N, W).
    """
    return F.layer_norm(h, h.shape[-1:], eps=EPS) * (1 + scale) + shift


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(I, S, N, W) -> (I, S, H, N, e)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(-3, -2)


def join_heads(x: Tensor) -> Tensor:
    """(I, S, H, N, e) -> (I, S, N, W)."""
    return x.transpose(-3, -2).flatten(-2)


def within_images(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of each image to itself alone: q, k, v (I, S, H, N, e) -> the same shape.
    """
    read = attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), causal=False)
    return read.view_as(q)


def across_images(q: Tensor, k: Tensor, v: Tensor, a: Tensor,
                  M: Tensor | None) -> tuple[Tensor, Tensor]:
    """Linear attention to the earlier images: q, k, v (I, S, H, N, e), a (I, S, H, N).

    Token n of image s reads exp(a_1 + ... + a_n) q_n M_s / sqrt(e), and
    M_{s+1} = exp(mean_n a_n) M_s + sum_n k_n v_n^T. M is None before the first image.
    Returns what is read (I, S, H, N, e) and M after the last image.
    """
    kv = k.mT @ v * q.shape[-1]**-0.5  # (I, S, H, e, e)
    gamma = a.mean(-1).exp()[..., None, None]  # (I, S, H, 1, 1)
    if M is None:
        M = torch.zeros_like(kv[:, 0])
    before = []
    for s in range(q.shape[1]):
        before.append(M)
        M = gamma[:, s] * M + kv[:, s]
    decay = a.cumsum(-1).exp().unsqueeze(-1)  # (I, S, H, N, 1)
    return decay * (q @ torch.stack(before, 1)), M


def time_features(t: Tensor, size: int = 256) -> Tensor:
    """Cosines and sines of t (...) in [0, 1], not scaled up, at frequencies from 1 to 1/10000.

    Returns (..., size).
    """
    half = size // 2
    frequency = 10000.0 ** (-torch.arange(half, device=t.device, dtype=t.dtype) / half)
    angle = t.unsqueeze(-1) * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


def positions(side: int, W: int) -> Tensor:
    """Sines and cosines of a token's column and row -> (side^2, W), in raster order."""
    frequency = 10000.0 ** (-torch.arange(W // 4, dtype=torch.float64) / (W // 4))
    angle = torch.arange(side).unsqueeze(-1) * frequency  # (side, W/4)
    line = torch.cat([angle.sin(), angle.cos()], -1).float()  # (side, W/2)
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, 0)], -1)


# ----------------------------------------------------------------------------- samplers
# velocity(x, t, state) -> v, state: one call of the network at time t, a number. The state is
# passed from call to call; it is None at first.
Velocity = Callable[[Tensor, float, State | None], tuple[Tensor, State | None]]


def euler(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """dx = v dt from t = 0 to 1: noise x (B, ...) -> images."""
    state = None
    for i in range(steps):
        v, state = velocity(x, i / steps, state)
        x = x + v / steps
    return x


def euler_maruyama(velocity: Velocity, x: Tensor, steps: int,
                   generators: Generators = None) -> Tensor:
    """The SDE with the same marginals, diffusion 1 - t and score (t v - x) / (1 - t).

    dx = [(1 + t) v - x] dt + sqrt(2 (1 - t)) dW in `steps` - 1 equal steps to t = 0.96, then one
    step without the noise: noise x (B, ...) -> images.
    """
    state = None
    dt = (1 - LAST_STEP) / (steps - 1)
    for i in range(steps - 1):
        t = i * dt
        v, state = velocity(x, t, state)
        eps = random(torch.randn, len(x), x.shape[1:], generators, x)
        x = x + ((1 + t) * v - x) * dt + math.sqrt(2 * (1 - t) * dt) * eps
    t = 1 - LAST_STEP
    v, _ = velocity(x, t, state)
    return x + ((1 + t) * v - x) * LAST_STEP


# ----------------------------------------------------------------------------- Transformer
class ARFlowAttention(nn.Module):
    """Softmax attention in an image plus, for items, linear attention to the images before it."""

    def __init__(self, W: int, head_dim: int, with_state: bool):
        super().__init__()
        self.head_dim = head_dim
        self.q = nn.Linear(W, W, bias=False)
        self.k = nn.Linear(W, W, bias=False)
        self.v = nn.Linear(W, W, bias=False)
        self.gate = nn.Linear(W, W, bias=False)
        self.out = nn.Linear(W, W, bias=False)
        self.decay = None
        if with_state:  # without a state, nothing would depend on it
            self.decay = nn.Linear(W, W // head_dim, bias=False)

    def forward(self, x: Tensor, c: Tensor, M: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x (I, S, N, W), c (I, S, W), M (I, H, e, e) or None -> out (I, S, N, W), M after them."""
        q = split_heads(rms_norm(self.q(x)), self.head_dim)  # normed over W, before the split
        k = split_heads(rms_norm(self.k(x)), self.head_dim)
        v = split_heads(rms_norm(self.v(x)), self.head_dim)
        out = within_images(q, k, v)
        if self.decay is not None:
            with full_precision(x):  # M sums over hundreds of steps
                weight = self.decay.weight
                a = F.logsigmoid(self.decay((x + c.unsqueeze(-2)).to(weight))).mT / DECAY
                read, M = across_images(q.to(weight), k.to(weight), v.to(weight), a, M)
            out = out + read
        out = join_heads(rms_norm(out))  # normed over e
        return self.out(F.silu(self.gate(x)) * out), M


class SiTAttention(nn.Module):
    """Plain softmax attention in an image, with biases. It has no state."""

    def __init__(self, W: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(W, 3 * W)
        self.out = nn.Linear(W, W)

    def forward(self, x: Tensor, c: Tensor, M: None) -> tuple[Tensor, None]:
        """x (I, S, N, W) -> (I, S, N, W), None."""
        q, k, v = split_heads(self.qkv(x), self.head_dim).chunk(3, 2)
        return self.out(join_heads(within_images(q, k, v))), None


class Block(nn.Module):
    """Attention and MLP, each with shift, scale and gate from the image's time and class."""

    def __init__(self, config: Config):
        super().__init__()
        W = config.width
        if config.attention == "sit":
            self.attention = SiTAttention(W, config.head_dim)
        else:
            with_state = config.images_per_item > 1
            self.attention = ARFlowAttention(W, config.head_dim, with_state)
        self.up = nn.Linear(W, 4 * W)
        self.down = nn.Linear(4 * W, W)
        self.modulation = nn.Linear(W, 6 * W)

    def forward(self, h: Tensor, c: Tensor,
                M: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """h (I, S, N, W), c (I, S, W), M (I, H, e, e) or None -> h, and M after these images."""
        modulation = self.modulation(F.silu(c)).unsqueeze(-2)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.chunk(6, -1)
        out, M = self.attention(modulate(h, shift_1, scale_1), c, M)
        h = h + gate_1 * out
        x = self.up(modulate(h, shift_2, scale_2))
        return h + gate_2 * self.down(F.gelu(x, approximate="tanh")), M


# ----------------------------------------------------------------------------- the model
class Model(nn.Module):
    """The velocity network, its training loss and its sampler; SiT if config.attention says so."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        # What train.py asks for: the order of an epoch in this model's items.
        self.epoch_order = functools.partial(epoch_order, S=config.images_per_item)
        p = config.patch_size
        W = config.width
        d = config.channels * p**2
        self.embed = nn.Linear(d, W)
        self.time = nn.Sequential(nn.Linear(256, W), nn.SiLU(), nn.Linear(W, W))
        self.classes = nn.Embedding(config.num_classes + 1, W)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.modulation = nn.Linear(W, 2 * W)
        self.to_velocity = nn.Linear(W, d)
        self.register_buffer("pos", positions(config.image_size // p, W))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for table in (self.time[0], self.time[2], self.classes):
            nn.init.normal_(table.weight, std=0.02)
        # Every block starts as the identity, and the velocity as 0.
        for linear in (self.modulation, self.to_velocity):
            nn.init.zeros_(linear.weight)
        for block in self.blocks:
            nn.init.zeros_(block.modulation.weight)

    def velocity(self, x: Tensor, t: Tensor, labels: Tensor,
                 state: State | None = None) -> tuple[Tensor, State]:
        """The velocity v(x, t, y) of images that follow one another, and the state after them.

        x (I, S, C, height, width), t and labels (I, S) -> v of x's shape. `state` is the one after
        the images before these, None at the start of an item.
        """
        p = self.config.patch_size
        if self.config.num_classes == 0:
            labels = torch.zeros_like(labels)
        c = self.time(time_features(t)) + self.classes(labels)  # (I, S, W)
        X = patchify(x.flatten(0, 1), p).unflatten(0, x.shape[:2])  # (I, S, N, d)
        h = self.embed(X) + self.pos
        after = []
        for i, block in enumerate(self.blocks):
            h, M = block(h, c, None if state is None else state[i])
            after.append(M)
        shift, scale = self.modulation(F.silu(c)).unsqueeze(-2).chunk(2, -1)
        v = self.to_velocity(modulate(h, shift, scale)).to(x.dtype)
        return unpatchify(v.flatten(0, 1), p, self.config.channels).view_as(x), after

    def forward(self, x: Tensor, labels: Tensor, generators: Generators) -> dict[str, Tensor]:
        """{"loss": (B,)}: the mean square error of each image's velocity.

        x (B, C, height, width) with the S images of an item in a row, labels (B,). Times and noise
        come from the images' generators; then the times of an item are sorted. The first image's
        generator decides whether its item is trained with the null class.
        """
        B = len(x)
        S = self.config.images_per_item
        if B % S:
            raise ValueError(f"batch_size: got {B} images in one pass of one process, expected a "
                             f"multiple of images_per_item {S}")
        t = random(torch.rand, B, (), generators, x)
        eps = random(torch.randn, B, x.shape[1:], generators, x)
        coin = random(torch.rand, B, (), generators, x)
        x = x.unflatten(0, (-1, S))  # (I, S, C, height, width)
        eps = eps.view_as(x)
        t = t.view(-1, S).sort(1).values
        dropped = coin.view(-1, S)[:, :1] < self.config.item_drop  # (I, 1)
        labels = labels.view(-1, S).masked_fill(dropped, self.config.num_classes)
        part = t[..., None, None, None]
        v, _ = self.velocity(part * x + (1 - part) * eps, t, labels)
        return {"loss": (v - (x - eps)).square().mean((2, 3, 4)).flatten()}

    @torch.no_grad()
    def sample(self, labels: Tensor, options: Sampling | None = None,
               generators: Generators = None) -> Tensor:
        """labels (B,) -> images (B, C, image_size, image_size) float32, not clamped.

        With guidance, the two velocities, each with a state of its own, come from a doubled batch.
        With a list of generators, one per image, image i does not depend on its batch.
        """
        c = self.config
        options = options or c.sampling
        w = options.guidance
        if w > 0 and c.num_classes == 0:
            raise ValueError(f"guidance: got {w}, expected 0 for a model without classes")
        shape = (c.channels, c.image_size, c.image_size)
        x = random(torch.randn, len(labels), shape, generators, self.pos)
        if w > 0:
            labels = torch.cat([labels, torch.full_like(labels, c.num_classes)])
        labels = labels.unsqueeze(1)  # an item is one image

        def velocity(x: Tensor, t: float, state: State | None) -> tuple[Tensor, State]:
            if w > 0:
                x = torch.cat([x, x])
            v, state = self.velocity(x.unsqueeze(1), x.new_full(labels.shape, t), labels, state)
            v = v.squeeze(1)
            if w > 0:
                cond, null = v.chunk(2)
                v = (1 + w) * cond - w * null
            return v, state

        if options.sampler == "ode":
            return euler(velocity, x, options.steps).float()
        return euler_maruyama(velocity, x, options.steps, generators).float()

    def layers(self) -> list[Block]:
        return list(self.blocks)


# ----------------------------------------------------------------------------- presets
_small = dict(
    noise="none", label_drop=0.0, ema=0.9999, optimizer="muon", lr=1e-2, batch_size=40, steps=2000,
    flip=False)
# 40 images are eight items, the default of the authors' script.
_arflow = dict(
    noise="none", label_drop=0.0, ema=0.9999, lr=1e-4, lr_end=1.0, warmup=0, weight_decay=0.02,
    clip=3.0, batch_size=40, data="imagenet/train", enlarge=True, steps=400_000)
_sit = dict(_arflow, weight_decay=0.0, clip=0.0, batch_size=256)
# 256 tokens, as many as the latents of 256 x 256 images have in the papers.
_paper = dict(
    image_size=32, patch_size=2, num_classes=1000, head_dim=64,
    sampling=Sampling(guidance=0.5, sampler="sde", steps=250))
PRESETS = {}
TRAINING = {}


def add_rows(name: str, arflow: dict, sit: dict, sit_head_dim: int | None = None, **sizes) -> None:
    """Adds the three rows of one size: ARFlow, ARFlow on single images, and SiT.

    arflow and sit are their training settings.
    """
    config = Config(**sizes)
    single = dataclasses.replace(config, images_per_item=1)
    PRESETS[name] = config
    PRESETS[f"arflow1-{name}"] = single
    PRESETS[f"sit-{name}"] = dataclasses.replace(
        single, attention="sit", head_dim=sit_head_dim or config.head_dim)
    TRAINING[name] = arflow
    TRAINING[f"arflow1-{name}"] = arflow
    TRAINING[f"sit-{name}"] = sit


_fashion = dict(_small, data="fashion-mnist", steps=3500)
_cifar10 = dict(_small, data="cifar10", steps=20_000, flip=True)
add_rows("digits", _small, _small, sampling=Sampling(guidance=0.5))
add_rows(
    "fashion", _fashion, _fashion, image_size=28, channels=1, sampling=Sampling(guidance=1.0))
add_rows(
    "cifar10", _cifar10, _cifar10, image_size=32, layers=8, width=256, head_dim=64,
    sampling=Sampling(guidance=1.0))
add_rows("S", _arflow, _sit, **_paper, layers=12, width=384)
add_rows("B", _arflow, _sit, **_paper, layers=12, width=768)
add_rows("L", _arflow, _sit, **_paper, layers=24, width=1024)
# 18 heads in ARFlow, 16 in SiT.
add_rows("XL", _arflow, _sit, sit_head_dim=72, **_paper, layers=28, width=1152)
