"""TarFlow (arXiv 2412.06329), a Transformer autoregressive flow with a Gaussian prior.

    python train.py --model baselines.tarflow

    B  batch              d  channels of a token = C p^2    T      blocks, of K layers each
    C  image channels     D  values of an image = N d       W      Transformer width
    p  patch size         X  tokens of an image (B, N, d)   mu     shift of a block
    N  tokens             Z  the flow of X      (B, N, d)   alpha  its log-scale, without a bound

Compared with FARMER there is no AR prior and no split. Attention has biases, each block adds a
class vector to every token, guidance extrapolates alpha and mu, and a denoising step follows
sampling. Log-probabilities are in nats.

Training differs from the authors' in three ways. They use weight decay on all parameters; our loop
only on matrices. Our loop skips steps with an outlier gradient (--guard 0 turns that off). The
output of a block is computed in float32.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import farmer
from farmer import (
    Farmer,
    Generators,
    KVCache,
    check_multiple,
    check_settings,
    full_precision,
    random,
    setting,
)


# ----------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class Sampling:
    """How to sample. The paper's figures use annealed guidance and denoising."""

    guidance: float = setting(
        0.0, "w: alpha and mu become cond + w (cond - null); 0 = off", 0)
    anneal: bool = setting(True, "let guidance grow from 0 to w over the tokens of a block")
    temperature: float = setting(
        1.0, "divides the attention logits in the null pass of guidance", 1e-6)
    denoise: float = setting(
        0.0, "sigma, the noise of training that a last step x + sigma^2 grad log p(x|c) removes; "
        "0 = off", 0)

    def __post_init__(self):
        check_settings(self)


@dataclass(frozen=True)
class Config:
    """Every hyperparameter of the model. Sizes are in pixels, tokens or channels."""

    image_size: int = setting(16, "height and width of an image in pixels", 1)
    channels: int = setting(3, "1 (grey) or 3 (RGB)", choices=(1, 3))
    patch_size: int = setting(4, "p; a token is a patch of p x p pixels", 1)
    num_classes: int = setting(10, "0 = unconditional; label num_classes is the null class", 0)
    flow_blocks: int = setting(8, "T; every other block reads the tokens in reverse", 1)
    flow_layers: int = setting(8, "K, Transformer layers in each block", 1)
    flow_width: int = setting(768, "W, Transformer width", 1)
    head_dim: int = setting(64, "channels of an attention head; divides the width", 1)
    sampling: Sampling = Sampling()
    num_tokens = farmer.Config.num_tokens
    token_dim = farmer.Config.token_dim

    def __post_init__(self):
        check_settings(self)
        check_multiple(self, "image_size", of="patch_size")
        check_multiple(self, "flow_width", of="head_dim")


# ----------------------------------------------------------------------------- the flow
class Layer(farmer.Layer):
    """FARMER's layer, with biases in attention too and torch's own initialisation."""

    def __init__(self, W: int, head_dim: int):
        super().__init__(W, head_dim)
        self.qkv = nn.Linear(W, 3 * W)
        self.out = nn.Linear(W, W)


class TemperedCache(KVCache):
    """A cache that divides the attention logits by a temperature, through the keys."""

    def __init__(self, T: int, temperature: Tensor):
        super().__init__(T)
        self.temperature = temperature  # (B, 1, 1, 1)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return super().append(k / self.temperature, v)


class Block(nn.Module):
    """z_i = (x_i - mu_i) exp(-alpha_i), with alpha_i and mu_i from the tokens before i.

    A causal Transformer computes them. The first token is left unchanged.
    """

    def __init__(self, config: Config, flip: bool):
        super().__init__()
        W = config.flow_width
        self.flip = flip  # whether this block reads the tokens in reverse
        self.null = config.num_classes
        self.embed = nn.Linear(config.token_dim, W)
        self.pos = nn.Parameter(0.01 * torch.randn(config.num_tokens, W))  # in raster order
        self.classes = None
        if config.num_classes:
            self.classes = nn.Parameter(0.01 * torch.randn(config.num_classes, W))
        self.layers = nn.ModuleList(Layer(W, config.head_dim) for _ in range(config.flow_layers))
        self.to_alpha_mu = nn.Linear(W, 2 * config.token_dim)
        # The bias is not zeroed: the flow starts near the identity, not at it.
        nn.init.zeros_(self.to_alpha_mu.weight)

    def order(self, x: Tensor) -> Tensor:
        """Raster order to this block's order, and back: (B, N, ...) -> the same shape."""
        return x.flip(1) if self.flip else x

    def context(self, labels: Tensor | None) -> Tensor:
        """What is added to each token's embedding: its position and the class vector.

        labels (B,), or None for the null class -> (1 or B, N, W) in this block's order.
        """
        pos = self.order(self.pos.unsqueeze(0))
        if self.classes is None:
            return pos
        null = self.classes.mean(0, keepdim=True)  # the null class is the mean of all classes
        if labels is None:
            return pos + null
        table = torch.cat([self.classes, null])
        return pos + F.embedding(labels, table).unsqueeze(1)

    def alpha_mu(self, x: Tensor, context: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """[alpha, mu] (B, t, 2d) of the tokens that follow x (B, t, d), with context (..., t, W).
        """
        h = self.embed(x) + context
        for i, layer in enumerate(self.layers):
            h = layer(h, None if caches is None else caches[i])
        with full_precision(h):
            return self.to_alpha_mu(h.to(x.dtype))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, N, d), labels (B,) -> z (B, N, d), logdet (B,) in nats."""
        x = self.order(x)
        alpha, mu = self.alpha_mu(x[:, :-1], self.context(labels)[:, :-1]).chunk(2, -1)
        z = torch.cat([x[:, :1], (x[:, 1:] - mu) * torch.exp(-alpha)], 1)
        return self.order(z), -alpha.sum((1, 2))

    def inverse(self, z: Tensor, labels: Tensor, options: Sampling) -> Tensor:
        """z (B, N, d), labels (B,) -> x (B, N, d), one token after another with a KV cache.

        With guidance, the passes for the class and for the null class run as one doubled batch.
        """
        z = self.order(z)
        B, N, _ = z.shape
        guided = options.guidance > 0
        temperature = z.new_ones(B)
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, self.null)])
            temperature = torch.cat([temperature, options.temperature * temperature])
        context = self.context(labels)
        caches = [TemperedCache(N, temperature.view(-1, 1, 1, 1)) for _ in self.layers]
        block = farmer.lean(self)
        x = z.clone()  # the first token is unchanged; the others are overwritten one by one
        for i in range(N - 1):
            token = x[:, i:i + 1]
            if guided:
                token = torch.cat([token, token])
            alpha_mu = block.alpha_mu(token, context[:, i:i + 1], caches)
            if guided:
                w = options.guidance
                if options.anneal:
                    w = w * (i + 1) / (N - 1)
                cond, null = alpha_mu.chunk(2)
                alpha_mu = cond + w * (cond - null)
            alpha, mu = alpha_mu.chunk(2, -1)
            x[:, i + 1:i + 2] = z[:, i + 1:i + 2] * torch.exp(alpha) + mu
        return self.order(x)


class Flow(nn.Module):
    """T blocks; every other one reads the tokens in reverse."""

    def __init__(self, config: Config):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(config, flip=t % 2 == 1) for t in range(config.flow_blocks))

    def forward(self, X: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """X (B, N, d), labels (B,) or None for the null class -> Z (B, N, d), logdet (B,) in nats.
        """
        logdet = X.new_zeros(len(X))
        for block in self.blocks:
            X, logdet_t = block(X, labels)
            logdet = logdet + logdet_t
        return X, logdet

    @torch.no_grad()
    def inverse(self, Z: Tensor, labels: Tensor | None = None,
                options: Sampling | None = None) -> Tensor:
        """Z (B, N, d), labels (B,) -> X (B, N, d); the inverse of `forward` only without guidance.
        """
        options = options or Sampling()
        for block in reversed(self.blocks):
            Z = block.inverse(Z, labels, options)
        return Z


# ----------------------------------------------------------------------------- the model
class LogProb(NamedTuple):
    """log p(x|c) and its parts, each (B,) in nats: total = prior + logdet."""

    total: Tensor
    prior: Tensor
    logdet: Tensor


class Model(nn.Module):
    """The model: `flow` maps patches to N(0, I).

    Labels are (B,) int64 with num_classes as the null label.
    """

    # As in FARMER: the list of layers, the check of labels, images (B, C, H, W) -> X (B, N, d) and
    # back, and x + sigma^2 grad log p(x|c).
    layers = Farmer.layers
    check_labels = Farmer.check_labels
    patches = Farmer.patches
    images = Farmer.images
    denoise = Farmer.denoise

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.flow = Flow(config)

    def forward(self, x: Tensor, labels: Tensor | None = None,
                generators: Generators = None) -> dict[str, Tensor]:
        """The loss and its parts, each (B,) in nats per dimension; nothing is random here.

        The loss is the authors', mean z^2 / 2 - logdet / D, which leaves out a constant.
        """
        D = x[0].numel()
        log_p = self.log_prob(x, labels)
        nats_per_dim = -log_p.total / D
        return dict(
            loss=nats_per_dim - 0.5 * math.log(2 * math.pi),
            nats_per_dim=nats_per_dim,
            logdet=log_p.logdet / D,
        )

    def log_prob(self, images: Tensor, labels: Tensor | None = None) -> LogProb:
        """log p(images|labels) of dequantised images (B, C, H, W); labels (B,) or None for null."""
        labels = self.check_labels(labels, len(images))
        Z, logdet = self.flow(self.patches(images), labels)
        prior = -0.5 * (Z.square() + math.log(2 * math.pi)).sum((1, 2))
        return LogProb(prior + logdet, prior, logdet)

    @torch.no_grad()
    def sample(self, labels: Tensor, options: Sampling | None = None,
               generators: Generators = None) -> Tensor:
        """Draws images: labels (B,) -> (B, C, H, W), not clamped. options None: the config's.

        With a list of generators, one per image, an image does not depend on the rest of its batch.
        """
        c = self.config
        options = options or c.sampling
        labels = self.check_labels(labels, len(labels))
        if options.guidance > 0 and c.num_classes == 0 and options.temperature == 1:
            raise ValueError("guidance: got an unconditional model at --temperature 1; expected "
                             "another temperature, or --guidance 0")
        like = self.flow.blocks[0].pos
        Z = random(torch.randn, len(labels), (c.num_tokens, c.token_dim), generators, like)
        X = self.flow.inverse(Z, labels, options)
        images = self.images(X)
        if options.denoise > 0:
            images = self.denoise(images, labels, options.denoise)
        return images


# ----------------------------------------------------------------------------- presets
_small = dict(flow_width=128, sampling=Sampling(guidance=1.0, denoise=0.1))
_imagenet64 = dict(image_size=64, patch_size=2)
# The large presets and their training follow the authors' README.
PRESETS = {
    "digits": Config(**_small, flow_blocks=6, flow_layers=1),
    "fashion": Config(**_small, image_size=28, channels=1, flow_blocks=4, flow_layers=2),
    "cifar10": Config(image_size=32, flow_blocks=4, flow_layers=2, flow_width=128),
    "imagenet64-bits": Config(**_imagenet64, num_classes=0),
    "imagenet64-free": Config(**_imagenet64, num_classes=0, sampling=Sampling(denoise=0.05)),
    "imagenet64": Config(
        **_imagenet64, num_classes=1000, sampling=Sampling(guidance=2.3, denoise=0.05)),
    "imagenet128": Config(
        image_size=128, num_classes=1000, flow_width=1024, sampling=Sampling(denoise=0.15)),
    "afhq256": Config(image_size=256, patch_size=8, num_classes=3, sampling=Sampling(denoise=0.07)),
}

_short = dict(steps=3500, lr=4e-3, noise_end=0.1, weight_decay=1e-4, flip=False)
_long = dict(
    data="imagenet/train", enlarge=True, batch_size=256, warmup=5000, lr=1e-4, weight_decay=1e-4,
    clip=0.0)
_constant_noise = dict(_long, noise_start=0.05, noise_end=0.05)
TRAINING = {
    "digits": _short,
    "fashion": dict(_short, optimizer="muon", lr=1e-2, data="fashion-mnist"),
    "cifar10": dict(
        steps=2800, lr=4e-3, noise="uniform", weight_decay=1e-4, holdout=500, data="cifar10"),
    # The authors train this one in float32, here --precision float32.
    "imagenet64-bits": dict(_long, steps=500_000, noise="uniform", flip=False),
    "imagenet64-free": dict(_constant_noise, steps=1_000_000),
    "imagenet64": dict(_constant_noise, steps=1_000_000),
    "imagenet128": dict(
        _long, steps=534_000, batch_size=768, warmup=1700, noise_start=0.15, noise_end=0.15),
    "afhq256": dict(
        _long, steps=229_000, warmup=57, data="afhq/train", noise_start=0.07, noise_end=0.07),
}
