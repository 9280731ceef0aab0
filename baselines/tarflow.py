"""TarFlow (arXiv 2412.06329), a Transformer autoregressive flow with a Gaussian prior: --model baselines.tarflow

    B  batch            N  tokens of an image, D = N d   alpha  log-scale, unbounded   T  blocks, of K layers each
    C  image channels   d  channels of a token = C p^2   W      Transformer width      p  patch size

Against FARMER: no AR prior, no split, no bound on alpha, biases in attention, a class vector that every block adds to
every token, guidance that extrapolates alpha and mu, a denoising step after sampling. Log-probabilities are in nats.
"""
import math
from collections import namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import farmer
from farmer import Generators, KVCache, check_settings, full_precision, setting, unpatchify

LogProb = namedtuple("LogProb", "total prior logdet")  # log p(x|c) = prior + logdet, each (B,) in nats


# ------------------------------------------------------------------------------ configuration
@dataclass(frozen=True)
class Sampling:
    """How to sample. The paper's figures are with annealed guidance and denoising."""
    guidance: float = setting(0.0, "w: alpha and mu become cond + w (cond - null); 0 = off")
    anneal: bool = setting(True, "let guidance grow from 0 to w over the tokens of a block")
    temperature: float = setting(1.0, "divides the attention logits of guidance's null pass", 1e-6)
    denoise: float = setting(0.0, "sigma of a last step x + sigma^2 grad log p(x|c), training's noise; 0 = off")

    def __post_init__(self):
        check_settings(self)


@dataclass(frozen=True)
class Config:
    """Every hyperparameter of the model. Sizes are in pixels, tokens or channels."""
    image_size: int = setting(16, "height and width of an image in pixels", 1, 4096)
    channels: int = setting(3, "1 (grey) or 3 (RGB)", 1, 3)
    patch_size: int = setting(4, "p; a token is a p x p patch", 1, 256)
    num_classes: int = setting(10, "0 = unconditional; label num_classes is the null class")
    flow_blocks: int = setting(8, "T, blocks; every other one reads the tokens in reverse", 1, 64)
    flow_layers: int = setting(8, "K, Transformer layers in each block", 1, 32)
    flow_width: int = setting(768, "W, Transformer width", 1, 16_384)
    head_dim: int = setting(64, "channels of an attention head; divides the width", 1, 16_384)
    sampling: Sampling = Sampling()

    def __post_init__(self):
        check_settings(self)
        if self.channels == 2:
            raise ValueError(f"channels: got {self.channels}, expected 1 (grey) or 3 (RGB)")
        if self.image_size == self.patch_size or self.image_size % self.patch_size:
            raise ValueError(f"patch_size: got {self.patch_size}, expected to divide {self.image_size} into parts")
        if self.flow_width % self.head_dim:
            raise ValueError(f"flow_width: got {self.flow_width}, expected a multiple of head_dim {self.head_dim}")

    @property
    def tokens(self) -> tuple[int, int]:
        """N and d."""
        return (self.image_size // self.patch_size) ** 2, self.channels * self.patch_size**2


# ------------------------------------------------------------------------------ the flow
class Layer(farmer.Layer):
    """FARMER's layer with biases in attention too, and torch's own initialisation."""

    def __init__(self, W: int, head_dim: int):
        super().__init__(W, head_dim)
        self.qkv, self.out = nn.Linear(W, 3 * W), nn.Linear(W, W)


class TemperedCache(KVCache):
    """Divides the attention logits by temperature, through the keys."""
    temperature: float | Tensor = 1.0  # or (B, 1, 1, 1)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return super().append(k / self.temperature, v)


class Block(nn.Module):
    """z_i = (x_i - mu_i) exp(-alpha_i): a causal Transformer reads alpha and mu in the tokens before i; z_1 = x_1."""

    def __init__(self, N: int, d: int, W: int, K: int, head_dim: int, num_classes: int, flip: bool):
        super().__init__()
        self.num_classes, self.flip = num_classes, flip
        self.embed, self.to_alpha_mu = nn.Linear(d, W), nn.Linear(W, 2 * d)
        self.pos = nn.Parameter(0.01 * torch.randn(N, W))  # in raster order
        self.classes = nn.Parameter(0.01 * torch.randn(num_classes, W)) if num_classes else None
        self.layers = nn.ModuleList(Layer(W, head_dim) for _ in range(K))
        nn.init.zeros_(self.to_alpha_mu.weight)  # not the bias: the flow starts near the identity, not at it

    def order(self, x: Tensor) -> Tensor:
        """Raster order to this block's, and back: (B, N, d)."""
        return x.flip(1) if self.flip else x

    def context(self, labels: Tensor) -> Tensor:
        """Position plus class vector, which tokens are read with: labels (B,) -> (B, N, W) in this block's order."""
        pos = self.order(self.pos.unsqueeze(0)).expand(len(labels), -1, -1)
        if self.classes is None:
            return pos
        table = torch.cat([self.classes, self.classes.mean(0, keepdim=True)])  # the null class is the mean of all
        return pos + F.embedding(labels, table).unsqueeze(1)

    def alpha_mu(self, x: Tensor, context: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """[alpha, mu] (B, t, 2 d) of the tokens that follow x (B, t, d), with context (B, t, W)."""
        h = self.embed(x) + context
        for i, layer in enumerate(self.layers):
            h = layer(h, caches[i] if caches else None)
        with full_precision(h):
            return self.to_alpha_mu(h.to(x.dtype))

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, N, d), labels (B,) -> z (B, N, d), logdet (B,) in nats."""
        x = self.order(x)
        alpha, mu = self.alpha_mu(x[:, :-1], self.context(labels)[:, :-1]).chunk(2, -1)
        z = torch.cat([x[:, :1], (x[:, 1:] - mu) * torch.exp(-alpha)], 1)
        return self.order(z), -alpha.sum((1, 2))

    def inverse(self, z: Tensor, labels: Tensor, options: Sampling = Sampling()) -> Tensor:
        """z (B, N, d), labels (B,) -> x (B, N, d), token by token. Guidance makes one batch of both passes, 2B."""
        x, w = self.order(z).clone(), options.guidance  # a token is z until its turn comes
        B, N, _ = x.shape
        if w > 0:
            labels = torch.cat([labels, torch.full_like(labels, self.num_classes)])
        context, head_dim = self.context(labels), self.layers[0].head_dim
        sizes = (len(labels), context.shape[2] // head_dim, N, head_dim)
        caches = [TemperedCache(*sizes, context, static=x.is_cuda) for _ in self.layers]
        for cache in caches if w > 0 else ():
            cache.temperature = x.new_tensor([1.0, options.temperature]).repeat_interleave(B).view(-1, 1, 1, 1)
        at = torch.zeros(1, dtype=torch.long, device=x.device)

        def step():
            x_at = x.index_select(1, at).repeat(len(labels) // B, 1, 1)
            read = self.alpha_mu(x_at, context.index_select(1, at), caches)
            at.add_(1)
            if w > 0:
                cond, null = read.chunk(2)
                g = w * at.to(x) / (N - 1) if options.anneal else w
                read = cond + g * (cond - null)
            alpha, mu = read.chunk(2, -1)
            x.index_copy_(1, at, x.index_select(1, at) * torch.exp(alpha) + mu)
        farmer.repeat(step, N - 1, x.device)
        return self.order(x)


# ------------------------------------------------------------------------------ the model
class Model(nn.Module):
    """T blocks from patches to N(0, 1). Labels (B,) int64; num_classes is the null label."""
    layers, patches = farmer.Farmer.layers, farmer.Farmer.patches  # all Layers; images (B, C, H, W) -> X, checked

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        sizes = (*c.tokens, c.flow_width, c.flow_layers, c.head_dim, c.num_classes)
        self.blocks = nn.ModuleList(Block(*sizes, flip=t % 2 == 1) for t in range(c.flow_blocks))

    def flow(self, X: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """X (B, N, d), labels (B,) -> Z (B, N, d), logdet (B,) in nats."""
        logdet = X.new_zeros(len(X))
        for block in self.blocks:
            X, logdet_t = block(X, labels)
            logdet = logdet + logdet_t
        return X, logdet

    @torch.no_grad()
    def inverse(self, Z: Tensor, labels: Tensor, options: Sampling = Sampling()) -> Tensor:
        """Z (B, N, d), labels (B,) -> X (B, N, d). Guided, it no longer inverts `flow`."""
        for block in reversed(self.blocks):
            Z = block.inverse(Z, labels, options)
        return Z

    def log_prob(self, images: Tensor, labels: Tensor | None = None) -> LogProb:
        """log p(images|labels): images (B, C, H, W) float, dequantised; labels None = all null."""
        Z, logdet = self.flow(self.patches(images), self.check_labels(labels, len(images)))
        prior = -0.5 * (Z.square() + math.log(2 * math.pi)).sum((1, 2))
        return LogProb(prior + logdet, prior, logdet)

    def forward(self, x: Tensor, labels: Tensor | None = None, generators: Generators = None) -> dict[str, Tensor]:
        """Each (B,) in nats per dimension; loss is the authors', mean z^2 / 2 - logdet / D. Nothing here is random."""
        labels = labels if self.config.num_classes else None
        total, _, logdet = (t / x[0].numel() for t in self.log_prob(x, labels))
        return dict(loss=-total - 0.5 * math.log(2 * math.pi), nats_per_dim=-total, logdet=logdet)

    def check_labels(self, labels: Tensor | None, B: int) -> Tensor:
        """Checked labels on the model's device; None = all null."""
        device, null = self.blocks[0].pos.device, self.config.num_classes
        labels = torch.full((B,), null, device=device) if labels is None else labels
        if labels.shape != (B,) or (not labels.is_cuda and ((labels < 0) | (labels > null)).any()):
            raise ValueError(f"labels: got {labels.tolist()}, expected {B} integers from 0 to {null} (the null class)")
        return labels.to(device)

    def sample(self, labels: Tensor, options: Sampling | None = None, generators: Generators = None) -> Tensor:
        """labels (B,) -> images (B, C, H, W), not clamped. With a generator per image none depends on its batch."""
        c, options, labels = self.config, options or self.config.sampling, self.check_labels(labels, len(labels))
        if options.guidance > 0 and not c.num_classes and options.temperature == 1:
            raise ValueError("guidance: an unconditional model needs a --temperature that is not 1, or --guidance 0")
        Z = farmer.random(torch.randn, len(labels), c.tokens, generators, self.blocks[0].pos.detach())
        images = unpatchify(self.inverse(Z, labels, options), c.patch_size, c.channels)
        return self.denoise(images, labels, options.denoise) if options.denoise else images

    def denoise(self, images: Tensor, labels: Tensor, sigma: float) -> Tensor:
        """x + sigma^2 grad log p(x|c), the mean of the clean image where x has noise of this sigma (Tweedie)."""
        with torch.enable_grad():
            x = images.detach().requires_grad_()
            (score,) = torch.autograd.grad(self.log_prob(x, labels).total.sum(), x)
        return images + sigma**2 * score

    def flops(self) -> float:
        """Floating point operations of one image's forward: 2 per weight and token, 4 N W per token in attention."""
        (N, d), W = self.config.tokens, self.config.flow_width
        return len(self.layers()) * farmer.layer_flops(N, W) + len(self.blocks) * 6 * N * d * W

    def activations(self, checkpointing: bool = False) -> float:
        """Bytes of one image's activations, roughly: 20 bf16 tensors of a layer's width, or its input alone."""
        return len(self.layers()) * self.blocks[0].pos.numel() * (2 if checkpointing else 40)

    def stages(self, labels: Tensor, options: Sampling | None = None, generators: Generators = None) -> dict:
        """The parts of sampling as functions without arguments, to be timed, all about the same images."""
        options, images = options or self.config.sampling, self.sample(labels, Sampling(), generators)
        Z = self.flow(self.patches(images), labels)[0].detach()
        return {"exact": lambda: self.inverse(Z, labels), "exact, guided": lambda: self.inverse(Z, labels, options),
                "denoising": lambda: self.denoise(images, labels, options.denoise).flatten(1),
                "forward": torch.no_grad()(lambda: self.flow(self.patches(images), labels))}


# ------------------------------------------------------------------------------ presets
_small = dict(flow_width=128, sampling=Sampling(guidance=1.0, denoise=0.1))
PRESETS = {  # the large ones, and their training, are the authors' README's
    "digits": Config(**_small, flow_blocks=6, flow_layers=1),
    "fashion": Config(**_small, image_size=28, channels=1, flow_blocks=4, flow_layers=2),
    "cifar10": Config(image_size=32, flow_blocks=4, flow_layers=2, flow_width=128),
    "imagenet64-bits": Config(image_size=64, patch_size=2, num_classes=0),
    "imagenet64-free": Config(image_size=64, patch_size=2, num_classes=0, sampling=Sampling(denoise=0.05)),
    "imagenet64": Config(image_size=64, patch_size=2, num_classes=1000, sampling=Sampling(guidance=2.3, denoise=0.05)),
    "imagenet128": Config(image_size=128, num_classes=1000, flow_width=1024, sampling=Sampling(denoise=0.15)),
    "afhq256": Config(image_size=256, patch_size=8, num_classes=3, sampling=Sampling(denoise=0.07)),
}
_short = dict(steps=3500, lr=4e-3, noise_end=0.1, weight_decay=1e-4, flip=False)
_long = dict(data="imagenet/train", enlarge=True, batch_size=256, warmup=5000, lr=1e-4, weight_decay=1e-4, clip=0.0)
TRAINING = {
    "digits": _short,
    "fashion": dict(_short, optimizer="muon", lr=1e-2, data="fashion-mnist"),
    "cifar10": dict(steps=2800, lr=4e-3, noise="uniform", weight_decay=1e-4, holdout=500, data="cifar10"),
    "imagenet64-bits": dict(_long, steps=500_000, noise="uniform", flip=False),  # theirs in float32: --precision
    "imagenet64-free": dict(_long, steps=1_000_000, noise_start=0.05, noise_end=0.05),
    "imagenet64": dict(_long, steps=1_000_000, noise_start=0.05, noise_end=0.05),
    "imagenet128": dict(_long, steps=534_000, batch_size=768, warmup=1700, noise_start=0.15, noise_end=0.15),
    "afhq256": dict(_long, steps=229_000, warmup=57, data="afhq/train", noise_start=0.07, noise_end=0.07),
}
