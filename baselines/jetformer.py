"""JetFormer (arXiv 2411.19722), FARMER's closest baseline, on the Jet flow (arXiv 2412.15129).

    python train.py --model baselines.jetformer
    python train.py --model baselines.jetformer --preset table4   # Jet under FARMER's own prior

Written from public facts about both papers and their released configurations; where these differ,
it follows the code. FARMER builds on JetFormer, so the frame is that of farmer.py: patches, flow,
Z = [Z_I, Z_R], an AR Transformer with a mixture head. This file holds the parts that FARMER
replaced: coupling layers, N(0, I) for Z_R, a Transformer with one key-value head, class tokens from
M tables, noise on Z_I in training. Guidance is farmer.py's naive CFG.

The letters are farmer.py's. b and s are shift and raw scale of a coupling, x1 and x2 its halves.

What differs from the papers: the small presets use FARMER's `whiten` and our learning rates and
optimizers, and skip steps with an outlier gradient (their noise ends at 0, as in the paper); pixels
are x/128 - 1; guided draws come from the closed form of the law from which theirs rejects.
"""
import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import farmer
from farmer import (
    GMM,
    Farmer,
    Generators,
    KVCache,
    attention,
    full_precision,
    random,
    setting,
)


# ----------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class Sampling(farmer.Sampling):
    """FARMER's settings, but without a student: the inverse takes only one pass per coupling."""

    guidance_method: str = setting(
        "naive", "naive CFG, or FARMER's resampling", choices=("naive", "resample"))
    inverse: str = setting("auto", "how to invert the flow", choices=("auto", "exact"))


@dataclass(frozen=True)
class Config(farmer.Config):
    """FARMER's fields, where flow_blocks counts the couplings, and JetFormer's own."""

    redundant_mixtures: int = setting(
        0, "K_R of FARMER's prior; 0 = N(0, I), which is JetFormer's", 0)
    final_flip: bool = setting(False, "reverse the tokens before the AR reads them")
    prior: str = setting(
        "jetformer", "prior of the latents, JetFormer's or FARMER's",
        choices=("jetformer", "farmer"))
    ar_head_dim: int = setting(64, "channels of an attention head in JetFormer's prior", 2)
    latent_noise: float = setting(0.3, "largest std of the noise on Z_I in training", 0)
    dropout: float = setting(
        0.1, "fraction of an AR layer's outputs set to 0 in training", 0, below=1)
    sampling: Sampling = Sampling()

    def __post_init__(self):
        super().__post_init__()
        if self.token_dim % 2:
            raise ValueError(f"patch_size: got {self.patch_size}, expected an even number, as "
                             "couplings halve the channels of a token")
        unread = ("ar_head_dim", "latent_noise", "dropout")
        if self.prior == "jetformer":
            unread = ("redundant_mixtures",)
            if self.ar_head_dim % 2 or self.ar_width % self.ar_head_dim:
                raise ValueError(f"ar_head_dim: got {self.ar_head_dim}, expected an even divisor "
                                 f"of ar_width {self.ar_width}")
        for name in unread:
            value = getattr(self, name)
            if value != getattr(Config, name):
                raise ValueError(f"{name}: got {value!r}, but prior {self.prior} does not use it; "
                                 "leave it out")


# ----------------------------------------------------------------------------- Jet: the flow
class JetLayer(farmer.Layer):
    """A layer of a ViT: FARMER's with attention in both directions, biases and a tanh-GELU."""

    def __init__(self, W: int, head_dim: int):
        super().__init__(W, head_dim)
        self.norm_attention = nn.LayerNorm(W, eps=1e-6)
        self.norm_mlp = nn.LayerNorm(W, eps=1e-6)
        self.qkv = nn.Linear(W, 3 * W)
        self.out = nn.Linear(W, W)
        for linear in (self.qkv, self.out, self.up, self.down):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)
        nn.init.xavier_uniform_(self.qkv.weight, gain=2**0.5)  # three square matrices in one

    def forward(self, h: Tensor) -> Tensor:
        """h (B, N, W) -> (B, N, W)."""
        return super().forward(h, causal=False)

    def mlp(self, h: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(h), approximate="tanh"))


class Coupling(nn.Module):
    """A Transformer reads one half of the channels to shift and scale the other.

    y1 = x1, y2 = (x2 + b) 2 sigmoid(s). Which channels form x1 is drawn once for each coupling.
    Labels are not used.
    """

    def __init__(self, config: Config):
        super().__init__()
        d = config.token_dim
        W = config.flow_width
        self.register_buffer("order", torch.randperm(d))  # of the channels, those of x1 first
        self.embed = nn.Linear(d // 2, W)
        self.pos = nn.Parameter(W**-0.5 * torch.randn(config.num_tokens, W))
        self.layers = nn.ModuleList(
            JetLayer(W, config.head_dim) for _ in range(config.flow_layers))
        self.norm = nn.LayerNorm(W, eps=1e-6)
        self.to_b_s = nn.Linear(W, d)
        nn.init.kaiming_normal_(self.embed.weight, nonlinearity="linear")
        for zero in (self.embed.bias, self.to_b_s.weight, self.to_b_s.bias):
            nn.init.zeros_(zero)  # the flow starts as the identity

    def b_s(self, x1: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and raw scale, each (B, N, d/2), from x1 (B, N, d/2); for both directions."""
        h = self.embed(x1) + self.pos
        for layer in self.layers:
            h = layer(h)
        with full_precision(h):  # in bf16, the inverse would be off by 0.025
            return self.to_b_s(self.norm(h.to(x1.dtype))).chunk(2, -1)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, N, d) -> y (B, N, d) and each token's part of logdet (B, N) in nats."""
        x1, x2 = x[..., self.order].chunk(2, -1)
        b, s = self.b_s(x1)
        y2 = (x2 + b) * 2 * torch.sigmoid(s)
        y = torch.cat([x1, y2], -1)[..., self.order.argsort()]
        return y, (F.logsigmoid(s) + math.log(2)).sum(2)

    def inverse(self, y: Tensor, labels: Tensor | None = None) -> Tensor:
        """y (B, N, d) -> x (B, N, d)."""
        x1, y2 = y[..., self.order].chunk(2, -1)
        b, s = self.b_s(x1)
        x2 = y2 / (2 * torch.sigmoid(s)) - b
        return torch.cat([x1, x2], -1)[..., self.order.argsort()]


def jet(config: Config) -> farmer.Flow:
    """FARMER's flow with couplings in place of its blocks; the fixed map of channels stays."""
    flow = farmer.Flow(dataclasses.replace(config, flow_blocks=0))
    flow.blocks.extend(Coupling(config) for _ in range(config.flow_blocks))
    return flow


# ----------------------------------------------------------------------------- the AR prior
def rotate(x: Tensor, at: Tensor) -> Tensor:
    """Applies rotary position embeddings to the whole head, in pairs (j, j + half).

    x (B, heads, T, head_dim) at positions `at` (T,) -> the same shape.
    """
    half = x.shape[-1] // 2
    frequency = 1e4 ** (-torch.arange(half, device=x.device) / half)
    angle = at.unsqueeze(1) * frequency  # (T, half)
    x1, x2 = x.chunk(2, -1)
    rotated = torch.cat([x1 * angle.cos() - x2 * angle.sin(), x2 * angle.cos() + x1 * angle.sin()],
                        -1)
    return rotated.to(x.dtype)


class ARLayer(nn.Module):
    """Gemma's layer: RMSNorm, attention with one key-value head, a gated MLP, no biases."""

    def __init__(self, W: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.norm_attention = nn.RMSNorm(W, eps=1e-6)
        self.norm_mlp = nn.RMSNorm(W, eps=1e-6)
        self.q = nn.Linear(W, W, bias=False)
        self.kv = nn.Linear(W, 2 * head_dim, bias=False)
        self.out = nn.Linear(W, W, bias=False)
        self.gate_up = nn.Linear(W, 8 * W, bias=False)
        self.down = nn.Linear(4 * W, W, bias=False)

    def forward(self, h: Tensor, at: Tensor, cache: KVCache | None = None,
                keep: Tensor | None = None) -> Tensor:
        """h (B, T, W) at positions `at` (T,) -> (B, T, W).

        With a cache, the first call passes the whole prefix and each later call one token. keep
        (B, 2, T, W), the mask of dropout, multiplies the outputs of attention and MLP.
        """
        B, T, W = h.shape
        x = self.norm_attention(h)
        q = self.q(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, heads, T, head_dim)
        k, v = self.kv(x).unsqueeze(1).chunk(2, -1)  # (B, 1, T, head_dim)
        q = rotate(q, at)
        k = rotate(k, at)
        if cache is not None:
            k, v = cache.append(k, v)
        causal = True
        if T == 1:  # `causal=T > 1` would break the graph of a compiled layer, once T varies
            causal = False
        heads = q.shape[1]
        read = attention(q, k.expand(-1, heads, -1, -1), v.expand(-1, heads, -1, -1), causal)
        x = self.out(read.transpose(1, 2).reshape(B, T, W))
        h = h + (x if keep is None else x * keep[:, 0])
        gate, up = self.gate_up(self.norm_mlp(h)).chunk(2, -1)
        x = self.down(F.gelu(gate, approximate="tanh") * up)
        return h + (x if keep is None else x * keep[:, 1])


class ARTransformer(nn.Module):
    """Gemma's layers and a final norm."""

    new_cache = farmer.Transformer.new_cache

    def __init__(self, W: int, layers: int, head_dim: int):
        super().__init__()
        self.layers = nn.ModuleList(ARLayer(W, head_dim) for _ in range(layers))
        self.norm = nn.RMSNorm(W, eps=1e-6)

    def forward(self, h: Tensor, cache: list[KVCache] | None = None,
                keep: Tensor | None = None) -> Tensor:
        """h (B, T, W) -> (B, T, W). keep (B, layers, 2, T, W): the mask of dropout, if any."""
        past = 0 if cache is None else cache[0].length
        at = torch.arange(past, past + h.shape[1], device=h.device)
        for i, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache[i]
            h = layer(h, at, layer_cache, None if keep is None else keep[:, i])
        return self.norm(h)


class Head(farmer.MixtureHead):
    """h (..., W) -> a mixture with sigma = (r + sqrt(r^2 + 4)) / 2 ("squareplus") of a raw r."""

    def __init__(self, W: int, K: int, d: int):
        super().__init__(W, K, d)
        nn.init.zeros_(self.linear.weight)
        nn.init.normal_(self.linear.bias[K:K + K * d], std=0.02)  # equal means would stay equal

    def log_sigma(self, raw: Tensor) -> Tensor:
        return torch.asinh(raw / 2).clamp(min=math.log(1e-6))  # log squareplus(r)


class Prior(farmer.Prior):
    """P(Z_I|c) by a Transformer over [BOS, y_1 ... y_m, BOI, Z_1 ... Z_{N-1}], and N(0, I) for Z_R.

    y_r is the label's embedding in the r-th of m tables. The output at BOI gives the mixture of
    Z_1, that at Z_i the mixture of Z_{i+1}. Sampling is FARMER's.
    """

    def __init__(self, config: Config):
        nn.Module.__init__(self)  # without FARMER's parts
        W = config.ar_width
        self.null = config.num_classes
        self.N = config.num_tokens
        self.M = config.class_tokens + 2  # BOS, the class tokens, BOI
        self.d_I = config.informative_dim
        self.d_R = config.redundant_dim
        self.redundant = None  # None stands for N(0, I)
        self.dropout = config.dropout
        self.rows = config.num_classes + 3  # of a table: the classes, the null class, BOS, BOI
        self.class_pos = nn.Parameter(torch.randn(config.class_tokens * self.rows, W))
        self.embed = nn.Linear(self.d_I, W)
        nn.init.zeros_(self.embed.bias)
        self.transformer = ARTransformer(W, config.ar_layers, config.ar_head_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        self.informative = Head(W, config.informative_mixtures, self.d_I)

    def class_tokens(self, labels: Tensor) -> Tensor:
        """labels (B,) -> [BOS, y_1 ... y_m, BOI], (B, M, W)."""
        table = torch.arange(self.M - 2, device=labels.device)
        y = labels.unsqueeze(1) + self.rows * table  # (B, m): one table follows another
        bos = torch.full_like(y[:, :1], self.rows - 2)
        boi = torch.full_like(y[:, :1], self.rows - 1)
        return F.embedding(torch.cat([bos, y, boi], 1), self.class_pos)

    def pos(self) -> Tensor:
        """Zeros (N, 1): nothing is added to the tokens, since positions are rotary."""
        return self.class_pos.new_zeros(self.N, 1)

    def forward(self, Z_I: Tensor, labels: Tensor,
                generators: Generators = None) -> tuple[GMM, GMM]:
        """Z_I (B, N, d_I), labels (B,) -> the mixtures of Z_I (B, N, K, ...) and that of Z_R.

        With generators, as in training, there is dropout on the outputs of the layers.
        """
        h = torch.cat([self.class_tokens(labels), self.embed(Z_I[:, :-1])], 1)
        keep = None
        if generators and self.dropout > 0:
            shape = (len(self.transformer.layers), 2, *h.shape[1:])
            u = random(torch.rand, len(h), shape, generators, h)
            keep = (u >= self.dropout).to(h.dtype) / (1 - self.dropout)
        h = self.transformer(h, keep=keep)[:, self.M - 1:]  # (B, N, W)
        return self.informative(h), self.shared(h[:, -1])


# ----------------------------------------------------------------------------- the model
class Model(Farmer):
    """Jet under JetFormer's prior or, as in FARMER's Table 4, under FARMER's."""

    def __init__(self, config: Config):
        nn.Module.__init__(self)  # without FARMER's parts
        self.config = config
        self.flow = jet(config)
        self.prior = Prior(config) if config.prior == "jetformer" else farmer.Prior(config)
        self.student = None

    def forward(self, x: Tensor, labels: Tensor,
                generators: Generators = None) -> dict[str, Tensor]:
        """FARMER's loss and its parts, but JetFormer's prior reads Z_I + sigma eps in training.

        sigma ~ U[0, latent_noise] for each image. The noisy Z_I is both input and target of the AR.
        The gradient through it is not stopped, so the flow responds by making Z_I larger.
        """
        c = self.config
        if c.prior == "farmer":
            return super().forward(x, labels, generators)
        B = len(x)
        labels = self.check_labels(labels, B)
        Z, logdet = self.flow(self.patches(x))
        Z_I, Z_R = Z.split([c.informative_dim, c.redundant_dim], -1)
        sigma = c.latent_noise * random(torch.rand, B, (1, 1), generators, Z)
        Z_I = Z_I + sigma * random(torch.randn, B, tuple(Z_I.shape[1:]), generators, Z)
        p_I, p_R = self.prior(Z_I, labels, generators)
        D = x[0].numel()
        informative = -p_I.log_prob(Z_I).sum(1) / D
        redundant = -p_R.shared_log_prob(Z_R).sum(1) / D
        logdet = logdet / D
        loss = informative + redundant - logdet
        return dict(
            loss=loss,
            nats_per_dim=loss,
            informative=informative,
            redundant=redundant,
            logdet=logdet,
        )

    def distiller(self):
        """Raises ValueError: there is nothing to distil."""
        raise ValueError("--distill: got a Jet model, which needs no student, since its inverse "
                         "takes only one pass per coupling")


# ----------------------------------------------------------------------------- presets
def on_jet(preset: farmer.Config) -> Config:
    """A preset of FARMER with Jet as its flow.

    It has a coupling for each block, with the same layers and width, and the same AR.
    """
    fields = vars(preset) | dict(sampling=Sampling(**vars(preset.sampling)))
    return Config(**fields, prior="farmer")


_small = dict(flow_blocks=16, whiten=True)
_imagenet = dict(
    image_size=256, patch_size=16, num_classes=1000, flow_blocks=32, flow_width=512,
    informative_dim=128, informative_mixtures=1024, class_tokens=16)
PRESETS = {
    "digits": Config(**_small, ar_layers=3, informative_dim=24, sampling=Sampling(guidance=1.0)),
    "fashion": Config(
        **_small, image_size=28, channels=1, ar_layers=4, informative_dim=8,
        sampling=Sampling(guidance=1.0)),
    "cifar10": Config(
        image_size=32, flow_blocks=32, flow_width=192, ar_layers=12, ar_width=384,
        informative_dim=8, informative_mixtures=256, class_tokens=16,
        sampling=Sampling(guidance=2.0, T_sigma=0.7)),
    "imagenet256-350m": Config(
        **_imagenet, flow_layers=4, ar_layers=24, ar_width=1024,
        sampling=Sampling(guidance=3.0, T_sigma=0.94)),
    "imagenet256-1.3b": Config(
        **_imagenet, flow_layers=6, ar_layers=48, ar_width=1536, ar_head_dim=96,
        sampling=Sampling(guidance=2.0, T_sigma=0.93)),
    "table4": on_jet(farmer.PRESETS["fashion"]),
    "table4-1.1b": on_jet(farmer.PRESETS["farmer-1.1b-p16"]),
}

_small = dict(
    steps=1600, batch_size=32, lr=2e-3, flip=False, noise="rgb", noise_start=64.0, noise_end=0.0)
# Unlike ours, their weight decay is not scaled by the learning rate, and they skip no steps.
_theirs = dict(lr_end=0.0, weight_decay=0.1, guard=0.0, noise="rgb", noise_end=0.0)
_paper = dict(
    _theirs, steps=62_500, batch_size=2048, lr=1e-3, warmup=6250, noise_start=64.0,
    data="imagenet/train", enlarge=True)
TRAINING = {
    "digits": _small,
    "fashion": dict(_small, steps=2400, optimizer="muon", lr=1e-2, data="fashion-mnist"),
    "cifar10": dict(
        _theirs, steps=39_000, batch_size=128, lr=3e-4, warmup=3900, noise_start=32.0,
        data="cifar10"),
    "imagenet256-350m": _paper,
    "imagenet256-1.3b": _paper,
    "table4": farmer.TRAINING["fashion"],
    "table4-1.1b": farmer.TRAINING["farmer-1.1b-p16"],
}
