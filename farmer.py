"""FARMER: Flow AutoRegressive Transformer over Pixels (arXiv 2510.23588, CVPR 2026), a reference implementation.

The file reads like the paper: configuration, mixtures, Transformer, autoregressive flow (3.2), AR prior with the channel split (3.3, 3.4),
resampling guidance (3.6), one-step student (3.5), the whole model, checkpoints. Equations, tables and algorithms are cited by the paper's numbers.

    B  batch            d    channels of a token = C p^2       K    mixture components     X  tokens of an image, (B, N, d)
    C  image channels   d_I  informative channels              M    class tokens           Z  latents F(X), (B, N, d) = [Z_I, Z_R]
    p  patch size       d_R  redundant channels = d - d_I      S    candidates             h  hidden features, (B, T, W)
    N  tokens           W    Transformer width                 T    sequence length        a  log-scale of the flow, log sigma
Everything random is drawn from a torch.Generator; log-probabilities are in nats.
"""
import contextlib
import dataclasses
import math
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOW_LOG_SCALE_BOUND = 3.0  # an unbounded log sigma diverges in training and gives non-finite samples
MIXTURE_LOG_SCALE_BOUND = 7.0
CHECKPOINT_FORMAT, CHECKPOINT_VERSION = "farmer-checkpoint", 1


class UserError(ValueError):
    """Something the user can mend. The message says what was got, what was expected and what to do; scripts print it and exit with 2."""


# ---------------------------------------------------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class Sampling:
    """How to sample: the columns of Table 6. The temperatures act on guided sampling and, T_pi and T_sigma, on plain sampling too."""
    guidance: float = field(default=0.0, metadata={"help": "CFG weight w of Eq. 15; 0 = off"})
    s_c: int = field(default=5, metadata={"help": "candidates proposed from p(z|c)"})
    s_u: int = field(default=5, metadata={"help": "candidates proposed from p(z), the null class"})
    T_pi: float = field(default=1.0, metadata={"help": "multiplies the mixture logits when proposing"})
    T_sigma: float = field(default=1.0, metadata={"help": "multiplies the component stds when proposing"})
    T_pi_v: float = field(default=1.0, metadata={"help": "multiplies the mixture logits when weighing"})
    T_sigma_v: float = field(default=1.0, metadata={"help": "multiplies the component stds when weighing"})
    T_s: float = field(default=1.0, metadata={"help": "multiplies the log-weights before the softmax"})
    redundant_scale: float = field(default=1.0, metadata={"help": "multiplies the stds of the redundant mixture once more (Fig. 7)"})

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not math.isfinite(value) or value < 0:
                raise UserError(f"{name}: got {value}, expected a finite number >= 0")
        if self.s_c < 1 or self.s_u < 0:
            raise UserError(f"s_c, s_u: got {self.s_c}, {self.s_u}, expected at least 1 and 0 candidates")
        if self.T_sigma_v == 0:
            raise UserError("T_sigma_v: got 0, expected a number > 0: a density needs a width")


@dataclass(frozen=True)
class Config:
    """Every hyperparameter of the model. Sizes are in pixels, tokens or channels."""
    image_size: int = field(default=16, metadata={"help": "height and width of an image in pixels"})
    channels: int = field(default=3, metadata={"help": "1 (grey) or 3 (RGB)"})
    patch_size: int = field(default=4, metadata={"help": "p; a token is a p x p patch"})
    num_classes: int = field(default=10, metadata={"help": "0 = unconditional; label num_classes is the null class"})
    flow_blocks: int = field(default=4, metadata={"help": "n, blocks of the autoregressive flow"})
    flow_layers: int = field(default=1, metadata={"help": "Transformer layers in each flow block"})
    flow_width: int = field(default=128, metadata={"help": "Transformer width in the flow"})
    ar_layers: int = field(default=2, metadata={"help": "layers of the AR Transformer"})
    ar_width: int = field(default=128, metadata={"help": "width of the AR Transformer"})
    head_dim: int = field(default=64, metadata={"help": "channels of an attention head; divides both widths"})
    informative_dim: int = field(default=48, metadata={"help": "d_I, channels of Z the AR models token by token; d = no split"})
    informative_mixtures: int = field(default=16, metadata={"help": "K_I, components of a token's mixture"})
    redundant_mixtures: int = field(default=1, metadata={"help": "K_R, components of the one mixture shared by all redundant parts"})
    class_tokens: int = field(default=4, metadata={"help": "M, times the class embedding is repeated"})
    final_flip: bool = field(default=True, metadata={"help": "the AR reads tokens against the last flow block's order"})
    look_above: bool = field(default=False, metadata={"help": "the Transformers read each token beside the one above the token it predicts"})
    linear_map: str = field(default="none", metadata={"help": "fixed map of the patch channels, fitted on data: none, rotate (PCA) or whiten"})
    sampling: Sampling = Sampling()

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, low = getattr(self, f.name), 0 if f.name in ("num_classes", "flow_blocks") else 1
            if f.type is int and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise UserError(f"{f.name}: got {value!r}, expected an integer >= {low}")
            if f.type is bool and not isinstance(value, bool):
                raise UserError(f"{f.name}: got {value!r}, expected True or False")
        if self.image_size % self.patch_size:
            raise UserError(f"image_size: got {self.image_size}, expected a multiple of patch_size {self.patch_size}")
        if self.channels not in (1, 3):
            raise UserError(f"channels: got {self.channels}, expected 1 (grey) or 3 (RGB)")
        if self.informative_dim > self.token_dim:
            raise UserError(f"informative_dim: got {self.informative_dim}, expected 1 to token_dim = {self.token_dim}")
        for name in ("flow_width", "ar_width"):
            if getattr(self, name) % self.head_dim:
                raise UserError(f"{name}: got {getattr(self, name)}, expected a multiple of head_dim {self.head_dim}")
        if self.linear_map not in ("none", "rotate", "whiten"):
            raise UserError(f"linear_map: got {self.linear_map!r}, expected none, rotate or whiten")
        if self.num_classes == 0 and self.sampling.guidance:  # there is nothing to guide towards
            object.__setattr__(self, "sampling", dataclasses.replace(self.sampling, guidance=0.0))

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def token_dim(self) -> int:
        return self.channels * self.patch_size**2

    @property
    def redundant_dim(self) -> int:
        return self.token_dim - self.informative_dim

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict) -> "Config":
        return Config(**{**values, "sampling": Sampling(**values["sampling"])})


_table6 = dict(T_pi=1.0, T_sigma=0.9, s_c=5, s_u=5, T_pi_v=0.2, T_sigma_v=0.9, T_s=1.1)
_p16 = dict(image_size=256, patch_size=16, num_classes=1000, informative_dim=128, informative_mixtures=64, class_tokens=64)
_p8 = {**_p16, "patch_size": 8, "informative_dim": 32}  # d_I of p8 is open: as many informative numbers per image as p16
_1b = dict(flow_blocks=28, flow_layers=4, flow_width=768, ar_layers=12, ar_width=768, redundant_mixtures=200)
_2b = dict(flow_blocks=32, flow_layers=6, flow_width=768, ar_layers=24, ar_width=1024, redundant_mixtures=136)  # K_R: see README
PRESETS = {
    "tiny": Config(flow_blocks=4, informative_dim=24, linear_map="whiten", look_above=True, sampling=Sampling(guidance=2.0)),
    "cifar10": Config(image_size=32, flow_blocks=8, flow_layers=4, flow_width=256, ar_layers=8, ar_width=256, informative_mixtures=16,
                      class_tokens=8, linear_map="whiten", look_above=True,
                      sampling=Sampling(guidance=1.0)),
    "imagenet64": Config(image_size=64, num_classes=1000, flow_blocks=12, flow_layers=4, flow_width=512, ar_layers=12, ar_width=512,
                         informative_dim=24, informative_mixtures=32, redundant_mixtures=1, class_tokens=16, linear_map="whiten", look_above=True,
                         sampling=Sampling(guidance=1.0)),
    "farmer-1.1b-p16": Config(**_p16, **_1b, sampling=Sampling(**_table6, guidance=2.5)),
    "farmer-1.1b-p8": Config(**_p8, **_1b, sampling=Sampling(**{**_table6, "T_sigma": 1.0}, guidance=2.0)),
    "farmer-1.9b-p16": Config(**_p16, **_2b, sampling=Sampling(**_table6, guidance=3.5)),
    "farmer-1.9b-p8": Config(**_p8, **_2b, sampling=Sampling(**{**_table6, "T_sigma": 1.0, "T_pi_v": 0.1, "T_sigma_v": 1.0}, guidance=1.5)),
}


# ---------------------------------------------------------------------------------------------------------------------- pixels and patches
def dequantize(images: Tensor, noise: Tensor, sigma: float | None) -> Tensor:
    """uint8 images (B, C, H, W) to floats about [-1, 1] (section 3.2).

    sigma None: uniform dequantisation, x = (x_int + u)/128 - 1 with noise u ~ U[0, 1); this density bounds that of the 8-bit data.
    sigma >= 0: x = (x_int + 1/2)/128 - 1 + sigma eps with noise eps ~ N(0, 1).
    """
    if sigma is None:
        return (images.float() + noise) / 128 - 1
    return (images.float() + 0.5) / 128 - 1 + sigma * noise


def quantize(images: Tensor) -> Tensor:
    """Floats about [-1, 1] (B, C, H, W) to uint8, the inverse of `dequantize`; clamps."""
    return ((images + 1) * 128).floor().clamp(0, 255).to(torch.uint8)


def patchify(images: Tensor, p: int) -> Tensor:
    """(B, C, H, W) -> (B, N, d), tokens in raster order, d = (row, column, channel) of the pixel in its patch."""
    B, C, H, W = images.shape
    return images.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1).reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(X: Tensor, p: int, channels: int) -> Tensor:
    """(B, N, d) -> (B, C, H, W), the inverse of `patchify` for square images."""
    B, N, _ = X.shape
    n = math.isqrt(N)
    return X.view(B, n, n, p, p, channels).permute(0, 5, 1, 3, 2, 4).reshape(B, channels, n * p, n * p)


# ---------------------------------------------------------------------------------------------------------------------- mixtures
class GMM(NamedTuple):
    """A batch of diagonal Gaussian mixtures: logits (..., K), mu (..., K, d), log_sigma (..., K, d)."""
    logits: Tensor
    mu: Tensor
    log_sigma: Tensor

    def tempered(self, T_pi: float, T_sigma: float) -> "GMM":
        """Logits times T_pi, stds times T_sigma (Table 6). T_sigma = 0 leaves the means: its log is kept finite."""
        return GMM(self.logits * T_pi, self.mu, self.log_sigma + math.log(max(T_sigma, 1e-38)))

    def halves(self) -> tuple["GMM", "GMM"]:
        """Split a doubled batch, [class, null], in two."""
        return tuple(GMM(*parts) for parts in zip(*(t.chunk(2) for t in self), strict=True))


def soft_bound(a: Tensor, bound: float) -> Tensor:
    """bound * tanh(a / bound): the identity near 0, inside (-bound, bound) everywhere, with a gradient everywhere."""
    return bound * torch.tanh(a / bound)


def gmm_log_prob(z: Tensor, logits: Tensor, mu: Tensor, log_sigma: Tensor) -> Tensor:
    """log sum_k pi_k N(z; mu_k, diag sigma_k^2) (Eq. 12): z (..., d), logits (..., K), mu and log_sigma (..., K, d) -> (...) in nats."""
    e = (z.unsqueeze(-2) - mu) * torch.exp(-log_sigma)  # (..., K, d)
    log_p = -(0.5 * e.square() + log_sigma).sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)  # (..., K)
    return torch.logsumexp(log_p + logits.log_softmax(-1), -1)


def shared_gmm_log_prob(z: Tensor, logits: Tensor, mu: Tensor, log_sigma: Tensor) -> Tensor:
    """`gmm_log_prob` of T vectors under one mixture: z (B, T, d), logits (B, K), mu and log_sigma (B, K, d) -> (B, T) in nats.

    Expanding the square gives matrix products instead of a (B, T, K, d) tensor. The products cancel where |mu| >> sigma, so they run in
    float64; at d_R = 640, K_R = 200 that is below 0.1% of the model's arithmetic.
    """
    with full_precision(z):
        z64, mu64, ls64 = z.double(), mu.double(), log_sigma.double()
        precision = torch.exp(-2 * ls64)  # (B, K, d)
        e2 = z64.square() @ precision.mT - 2 * z64 @ (mu64 * precision).mT + (mu64.square() * precision).sum(-1).unsqueeze(1)  # (B, T, K)
        log_p = -0.5 * e2 + (logits.double().log_softmax(-1) - ls64.sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)).unsqueeze(1)
        return torch.logsumexp(log_p, -1).to(z.dtype)


def gmm_sample(gmm: GMM, u: Tensor, eps: Tensor) -> Tensor:
    """S draws of each mixture: u (..., S) uniform picks the component, eps (..., S, d) normal -> z (..., S, d)."""
    k = categorical(gmm.logits, u).unsqueeze(-1).expand(eps.shape)  # (..., S, d)
    return gmm.mu.gather(-2, k) + gmm.log_sigma.gather(-2, k).exp() * eps


def categorical(logits: Tensor, u: Tensor) -> Tensor:
    """Draws from softmax(logits) by the inverse CDF: logits (..., K), u (..., S) uniform in [0, 1) -> int64 (..., S)."""
    cdf = logits.double().softmax(-1).cumsum(-1)  # double: with 50,000 candidates float32 sums drift
    return torch.searchsorted(cdf, u.double() * cdf[..., -1:], right=True).clamp(max=logits.shape[-1] - 1)


def full_precision(x: Tensor):
    """Context in which autocast is off: scales, determinants and mixtures are never computed in bf16."""
    on = torch.is_autocast_enabled(x.device.type)  # entering a context costs as much as five small kernels
    return torch.autocast(x.device.type, enabled=False) if on else contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------------------------------- Transformer
class KVCache:
    """Keys and values of one layer, preallocated: k, v (B, heads, T, head_dim); `length` tokens are filled.

    On a GPU the cache is static: length is a tensor and attention masks the part not filled yet, so that every step of a sequence launches the
    same kernels on the same memory and can be replayed as a CUDA graph. On a CPU slices save the arithmetic instead.
    """

    def __init__(self, B: int, heads: int, T: int, head_dim: int, like: Tensor, static: bool):
        new = like.new_zeros if static else like.new_empty  # a mask would not hide a NaN
        self.k, self.v = (new(B, heads, T, head_dim) for _ in range(2))
        self.length = torch.zeros((), dtype=torch.long, device=like.device) if static else 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Adds (B, heads, t, head_dim) -> keys and values to attend to, and a mask (t, T) for a static cache."""
        if isinstance(self.length, int):
            past, self.length = self.length, self.length + k.shape[2]
            self.k[:, :, past:self.length], self.v[:, :, past:self.length] = k, v
            return self.k[:, :, :self.length], self.v[:, :, :self.length], None
        at = self.length + torch.arange(k.shape[2], device=k.device)
        self.k.index_copy_(2, at, k.to(self.k.dtype))
        self.v.index_copy_(2, at, v.to(self.v.dtype))
        self.length += k.shape[2]
        return self.k, self.v, torch.arange(self.k.shape[2], device=k.device) <= at.unsqueeze(1)


def repeat(step, times: int, device: torch.device) -> None:
    """Calls step() `times` times; on a GPU the first call warms up, the second is captured as a CUDA graph, and that is replayed.

    step must work in place on tensors that outlive it, without looking at a value from Python.
    """
    if device.type != "cuda" or times < 4:
        with torch.inference_mode():  # 5 to 10% faster than no_grad in steps of small kernels
            for _ in range(times):
                step()
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(times - 1):
        graph.replay()


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v: q (B, heads, t, head_dim), k and v (B, heads, T, head_dim), mask bool (t, T); causal needs t = T."""
    T = q.shape[2]
    if q.dtype == torch.bfloat16 and not q.is_cuda and mask is None and T <= 256:  # the fused kernel's bf16 backward is slow on a CPU
        scores = (q @ k.mT).float() * q.shape[3]**-0.5
        if causal:
            scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
        return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)


class Layer(nn.Module):
    """Pre-norm Transformer layer: attention, then a GELU MLP of width 4W."""

    def __init__(self, W: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.norm_attention, self.norm_mlp = nn.LayerNorm(W), nn.LayerNorm(W)
        self.qkv, self.out = nn.Linear(W, 3 * W, bias=False), nn.Linear(W, W, bias=False)
        self.up, self.down = nn.Linear(W, 4 * W), nn.Linear(4 * W, W)

    def forward(self, h: Tensor, cache: KVCache | None = None, causal: bool = True) -> Tensor:
        """h (B, T, W) -> (B, T, W). With a cache, h follows the tokens in it, and T > 1 is allowed on an empty cache only."""
        B, T, W = h.shape
        q, k, v = self.qkv(self.norm_attention(h)).view(B, T, 3, W // self.head_dim, self.head_dim).permute(2, 0, 3, 1, 4)
        mask = None
        if cache is not None:
            k, v, mask = cache.append(k, v)
        h = h + self.out(attention(q, k, v, mask, causal and T > 1 and mask is None).transpose(1, 2).reshape(B, T, W))
        return h + self.down(F.gelu(self.up(self.norm_mlp(h))))


class Transformer(nn.Module):
    """L layers and a last norm."""

    def __init__(self, W: int, layers: int, head_dim: int):
        super().__init__()
        self.W, self.head_dim = W, head_dim
        self.layers = nn.ModuleList(Layer(W, head_dim) for _ in range(layers))
        self.norm = nn.LayerNorm(W)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = W**-0.5 * (0.5 if name.endswith(("qkv.weight", "up.weight")) else 0.5 / math.sqrt(2 * layers))
                nn.init.normal_(p, std=std)

    def new_cache(self, B: int, T: int, like: Tensor, static: bool | None = None) -> list[KVCache]:
        """Empty caches for B sequences of up to T tokens."""
        static = like.is_cuda if static is None else static
        return [KVCache(B, self.W // self.head_dim, T, self.head_dim, like, static) for _ in self.layers]

    def forward(self, h: Tensor, cache: list[KVCache] | None = None, causal: bool = True) -> Tensor:
        for i, layer in enumerate(self.layers):
            h = layer(h, cache and cache[i], causal)
        return self.norm(h)


class TokenEmbedding(nn.Module):
    """Tokens (B, N, d) -> h (B, T, W). With look_above, token t also carries token t + 1 - w, the one above token t + 1 that it predicts.

    A short cut of ours for small budgets: attention finds the neighbour above by itself, but only after many steps.
    """

    def __init__(self, config: Config, d: int, W: int):
        super().__init__()
        self.lag = math.isqrt(config.num_tokens) - 1 if config.look_above else None
        self.linear = nn.Linear(d if self.lag is None else 2 * d, W)
        nn.init.uniform_(self.linear.weight, -(d**-0.5), d**-0.5)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        """Embeds the tokens at positions `at` (T,) of x; only tokens up to them are read."""
        token = x.index_select(1, at)
        if self.lag is None:
            return self.linear(token)
        above = x.index_select(1, (at - self.lag).clamp(min=0)) * (at >= self.lag).unsqueeze(-1)  # nothing is above the first row
        return self.linear(torch.cat([token, above], -1))


class Positions(nn.Module):
    """Learned embedding of a token's row plus one of its column -> (N, W), in raster order or, flipped, in reverse."""

    def __init__(self, num_tokens: int, W: int):
        super().__init__()
        n = math.isqrt(num_tokens)
        self.row, self.column = (nn.Parameter(0.5 * torch.randn(n, W)) for _ in range(2))

    def forward(self, flip: bool) -> Tensor:
        pos = (self.row[:, None] + self.column[None]).flatten(0, 1)
        return pos.flip(0) if flip else pos


# ---------------------------------------------------------------------------------------------------------------------- autoregressive flow
def affine(x: Tensor, mu: Tensor, a: Tensor) -> Tensor:
    """z = (x - mu) exp(a) (Eq. 8), log|dz/dx| = sum a."""
    return (x - mu) * torch.exp(a)


def affine_inverse(z: Tensor, mu: Tensor, a: Tensor) -> Tensor:
    """x = z exp(-a) + mu (Eq. 10)."""
    return z * torch.exp(-a) + mu


class FlowBlock(nn.Module):
    """f_t: token i is shifted and scaled by what a causal Transformer reads in the tokens before it; the first token stays."""

    def __init__(self, config: Config, flip: bool):
        super().__init__()
        W = config.flow_width
        self.flip = flip
        self.embed, self.pos = TokenEmbedding(config, config.token_dim, W), Positions(config.num_tokens, W)
        self.transformer = Transformer(W, config.flow_layers, config.head_dim)
        self.to_mu_a = nn.Linear(W, 2 * config.token_dim)
        nn.init.zeros_(self.to_mu_a.weight)  # the flow starts as the identity
        nn.init.zeros_(self.to_mu_a.bias)

    def order(self, x: Tensor) -> Tensor:
        """Raster order to this block's order and back: (B, N, d)."""
        return x.flip(1) if self.flip else x

    def mu_a(self, x: Tensor, at: Tensor, pos: Tensor, cache: list[KVCache] | None = None, causal: bool = True) -> tuple[Tensor, Tensor]:
        """mu and a of the tokens after positions `at` (T,) of x (B, N, d) in this block's order, pos (N, W) -> two of (B, T, d).

        Every direction goes through here: forward, inverse, Jacobi iteration and student.
        """
        h = self.transformer(self.embed(x, at) + pos.index_select(0, at), cache, causal)
        with full_precision(h):
            mu, a = self.to_mu_a(h.to(x.dtype)).chunk(2, dim=-1)
            return mu, soft_bound(a, FLOW_LOG_SCALE_BOUND)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, N, d) -> z (B, N, d), logdet (B,) in nats."""
        x = self.order(x)
        mu, a = self.mu_a(x, torch.arange(x.shape[1] - 1, device=x.device), self.pos(self.flip))
        z = torch.cat([x[:, :1], affine(x[:, 1:], mu, a)], 1)
        return self.order(z), a.sum((1, 2))

    def inverse(self, z: Tensor) -> Tensor:
        """z (B, N, d) -> x (B, N, d), one token after another with a KV cache: the arithmetic of one forward in N steps."""
        z, pos = self.order(z), self.pos(self.flip)
        B, N, _ = z.shape
        cache = self.transformer.new_cache(B, N, z)
        x, at = torch.zeros_like(z), torch.zeros(1, dtype=torch.long, device=z.device)
        x[:, 0] = z[:, 0]
        x_after, z_after = x[:, 1:], z[:, 1:]

        def step():
            mu, a = self.mu_a(x, at, pos, cache)
            x_after.index_copy_(1, at, affine_inverse(z_after.index_select(1, at), mu, a))
            at.add_(1)
        repeat(step, N - 1, z.device)
        return self.order(x)

    def inverse_jacobi(self, z: Tensor, x: Tensor, tol: float, max_steps: int | None = None) -> tuple[Tensor, Tensor]:
        """The fixed point of x = z exp(-a(x)) + mu(x) by parallel passes over all tokens, from the guess x (B, N, d).

        The map is triangular: after k passes the first k + 1 tokens are exact, so N - 1 passes always suffice. An image stops, and leaves the
        batch, when no value moved by more than tol / 4. Values beyond 1e6 are cut off. Returns x (B, N, d) and the passes that each image took (B,).
        """
        z, x, pos = self.order(z), self.order(x).clone(), self.pos(self.flip)
        x = x.nan_to_num(0.0).clamp(-1e6, 1e6)
        x[:, 0] = z[:, 0]
        steps = torch.zeros(len(z), dtype=torch.long, device=z.device)
        active, at = torch.arange(len(z), device=z.device), torch.arange(z.shape[1] - 1, device=z.device)
        for _ in range(z.shape[1] - 1 if max_steps is None else max_steps):
            z_t, x_t = z[active, 1:], x[active]
            # before the tokens that it reads have settled, one may overflow, and its NaN would reach all others through masked attention (0 NaN)
            new = affine_inverse(z_t, *self.mu_a(x_t, at, pos)).nan_to_num(0.0).clamp(-1e6, 1e6)
            moved = (new - x_t[:, 1:]).abs().amax((1, 2)) > tol / 4  # a quarter: what is left to move adds up over blocks
            x[active, 1:] = new
            steps[active] += 1
            active = active[moved]
            if not len(active):
                break
        return self.order(x), steps

    def one_step(self, z: Tensor) -> Tensor:
        """The student's inverse (Algorithm 2): mu and a read from all of z (B, N, d) at once by bidirectional attention -> x (B, N, d)."""
        z = self.order(z)
        mu, a = self.mu_a(z, torch.arange(z.shape[1], device=z.device), self.pos(self.flip), causal=False)
        return self.order(torch.cat([z[:, :1], affine_inverse(z[:, 1:], mu[:, :-1], a[:, :-1])], 1))


def flow_blocks(config: Config) -> nn.ModuleList:
    """f_1 ... f_n in alternating order; the last reads in raster order, so that the final flip turns the AR against it."""
    n = config.flow_blocks
    return nn.ModuleList(FlowBlock(config, flip=(n - 1 - t) % 2 == 1) for t in range(n))


class Flow(nn.Module):
    """F = f_n o ... o f_1 (Eq. 8-10), an optional fixed linear map of the channels before it and the final flip after it."""

    def __init__(self, config: Config):
        super().__init__()
        d = config.token_dim
        self.final_flip = config.final_flip
        self.blocks = flow_blocks(config)
        self.linear_map = config.linear_map
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("map", torch.eye(d))  # X -> (X - mean) map
        self.register_buffer("inverse_map", torch.eye(d))
        self.register_buffer("map_logdet", torch.zeros(()))  # log|det map| of one token, nats

    @torch.no_grad()
    def fit_linear_map(self, X: Tensor) -> None:
        """PCA of patches X (B, N, d): rotate turns to the principal axes, largest variance first; whiten also scales them to unit variance.

        The map stays fixed, so that the model remains an exact flow; its log-determinant counts.
        """
        if self.linear_map == "none":
            return
        X = X.flatten(0, 1).double()
        variance, axes = torch.linalg.eigh(torch.cov(X.T))
        variance, axes = variance.flip(0).clamp(min=1e-8), axes.flip(1)
        scale = variance.rsqrt() if self.linear_map == "whiten" else torch.ones_like(variance)
        self.mean.copy_(X.mean(0))
        self.map.copy_(axes * scale)
        self.inverse_map.copy_((axes / scale).T)
        self.map_logdet.copy_(scale.log().sum())

    def forward(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """X (B, N, d) -> Z (B, N, d) in the order that the AR reads, logdet (B,) in nats."""
        states, logdet = self.states(X)
        Z = states[-1]
        return Z.flip(1) if self.final_flip else Z, logdet

    def states(self, X: Tensor) -> tuple[list[Tensor], Tensor]:
        """Z_0, ..., Z_n of Algorithm 2, each (B, N, d) in raster order (Z_0 is X after the linear map), and logdet (B,)."""
        with full_precision(X):
            states = [(X - self.mean) @ self.map]
        logdet = X.new_zeros(len(X)) + X.shape[1] * self.map_logdet
        for block in self.blocks:
            z, logdet_t = block(states[-1])
            states.append(z)
            logdet = logdet + logdet_t
        return states, logdet

    @torch.no_grad()
    def inverse(self, Z: Tensor, method: str = "exact", student: "Student | None" = None, tol: float = 1e-4,
                max_steps: int | None = None) -> Tensor:
        """Z (B, N, d) -> X (B, N, d).

        exact:    token by token, to rounding.
        parallel: Jacobi iteration in each block, from z.
        refined:  Jacobi iteration in each block, from the student's output. max_steps = 0 is the student, N - 1 is exact.
        student:  one parallel pass in each block, an approximation (3.5).
        tol is the largest error aimed at: a block stops when no value moves by more than tol / 4; max_steps bounds its passes.
        """
        if method in ("student", "refined") and student is None:
            raise UserError(f"inverse: got {method!r}, but this model has no student; distil one: python train.py --distill DIR")
        with torch.inference_mode():  # faster than no_grad; the product below makes an ordinary tensor again
            z = Z.flip(1) if self.final_flip else Z
            for t in reversed(range(len(self.blocks))):
                if method == "exact":
                    z = self.blocks[t].inverse(z)
                elif method == "parallel":
                    z, _ = self.blocks[t].inverse_jacobi(z, z, tol, max_steps)
                elif method == "refined":
                    z, _ = self.blocks[t].inverse_jacobi(z, student.blocks[t].one_step(z), tol, max_steps)
                elif method == "student":
                    z = student.blocks[t].one_step(z)
                else:
                    raise UserError(f"inverse: got {method!r}, expected exact, parallel, refined or student")
        with full_precision(z):
            return z @ self.inverse_map + self.mean


# ---------------------------------------------------------------------------------------------------------------------- one-step student
class Student(nn.Module):
    """Inverts the flow in one pass per block (3.5): the teacher's blocks, read with bidirectional attention."""

    def __init__(self, config: Config):
        super().__init__()
        self.blocks = flow_blocks(config)

    def forward(self, states: list[Tensor], noise: Tensor) -> Tensor:
        """Algorithm 2: states Z_0 ... Z_n of the frozen teacher (`Flow.states`), noise (B, N, d) = s eps with s ~ U[0, 0.3] -> scalar loss.

        Each block receives the student's own previous output: mean over blocks of MSE(Z~_{t-1}, Z_{t-1}).
        """
        z, losses = states[-1] + noise, []
        for t in reversed(range(len(self.blocks))):
            z = self.blocks[t].one_step(z)
            losses.append(F.mse_loss(z, states[t]))
        return torch.stack(losses).mean()


# ---------------------------------------------------------------------------------------------------------------------- AR prior
class MixtureHead(nn.Module):
    """h (..., W) -> a GMM of K components over R^d (Eq. 12)."""

    def __init__(self, W: int, K: int, d: int):
        super().__init__()
        self.K, self.d = K, d
        self.linear = nn.Linear(W, K * (1 + 2 * d))
        nn.init.normal_(self.linear.weight, std=0.1 * W**-0.5)
        nn.init.zeros_(self.linear.bias)
        if K > 1:  # components that start equal stay equal
            nn.init.normal_(self.linear.bias[K:K + K * d], std=0.5)

    def forward(self, h: Tensor) -> GMM:
        with full_precision(h):
            logits, mu, log_sigma = self.linear(h.to(self.linear.weight.dtype)).split([self.K, self.K * self.d, self.K * self.d], -1)
            log_sigma = soft_bound(log_sigma, MIXTURE_LOG_SCALE_BOUND)
            return GMM(logits, mu.unflatten(-1, (self.K, self.d)), log_sigma.unflatten(-1, (self.K, self.d)))


class Prior(nn.Module):
    """P(Z|c) = prod_i P(Z^I_i | Z^I_<i, c) prod_i P(Z^R_i | Z^I, c) (Eq. 11-14): an AR Transformer over [c x M, Z^I_1 ... Z^I_N].

    The output at the last class token is the mixture of Z^I_1, at Z^I_i that of Z^I_{i+1}, and at Z^I_N the one shared by all Z^R.
    """

    def __init__(self, config: Config):
        super().__init__()
        W = config.ar_width
        self.d_I, self.d_R, self.M = config.informative_dim, config.redundant_dim, config.class_tokens
        self.class_embed = nn.Embedding(config.num_classes + 1, W)  # the last row is the null class
        nn.init.normal_(self.class_embed.weight, std=0.5)
        self.class_pos = nn.Parameter(0.1 * torch.randn(self.M, W))
        self.embed, self.pos = TokenEmbedding(config, self.d_I, W), Positions(config.num_tokens, W)
        self.transformer = Transformer(W, config.ar_layers, config.head_dim)
        self.informative = MixtureHead(W, config.informative_mixtures, self.d_I)
        self.redundant = MixtureHead(W, config.redundant_mixtures, self.d_R) if self.d_R else None

    def class_tokens(self, labels: Tensor) -> Tensor:
        """labels (B,) -> (B, M, W)."""
        return self.class_embed(labels).unsqueeze(1) + self.class_pos

    def forward(self, Z_I: Tensor, labels: Tensor) -> tuple[GMM, GMM | None]:
        """Z_I (B, N, d_I), labels (B,) -> mixtures of the N informative tokens (B, N, K_I, ...) and the shared one (B, K_R, ...) or None."""
        at = torch.arange(Z_I.shape[1], device=Z_I.device)
        h = torch.cat([self.class_tokens(labels), self.embed(Z_I, at) + self.pos(flip=False)], 1)
        h = self.transformer(h)[:, self.M - 1:]  # (B, N + 1, W)
        return self.informative(h[:, :-1]), self.redundant(h[:, -1]) if self.d_R else None

    @torch.no_grad()
    def sample(self, labels: Tensor, null: int, options: Sampling, noise: "Noise") -> Tensor:
        """labels (B,) -> Z (B, N, d). With guidance both passes, c and null, run as one doubled batch."""
        B, N, guided = len(labels), noise.eps.shape[1], options.guidance > 0
        pos, at = self.pos(flip=False), torch.zeros(1, dtype=torch.long, device=labels.device)
        h = self.class_tokens(torch.cat([labels, torch.full_like(labels, null)]) if guided else labels)
        cache = self.transformer.new_cache(len(h), self.M + N, h)
        Z_I, last = h.new_zeros(B, N, self.d_I), self.transformer(h, cache)[:, -1].contiguous()

        def step():
            u, eps, pick = (t.index_select(1, at).squeeze(1) for t in (noise.u, noise.eps, noise.pick))
            Z_I.index_copy_(1, at, draw(self.informative(last), options, u, eps, pick))
            h = self.embed(Z_I, at) + pos[at]
            last.copy_(self.transformer(torch.cat([h, h]) if guided else h, cache)[:, -1])
            at.add_(1)
        repeat(step, N, labels.device)
        if not self.d_R:
            return Z_I
        shared = self.redundant(last)
        return torch.cat([Z_I, draw(shared, options, noise.u_R, noise.eps_R, noise.pick_R, options.redundant_scale)], -1)


# ---------------------------------------------------------------------------------------------------------------------- resampling guidance
class Noise(NamedTuple):
    """Everything random in a batch of samples, drawn before the first step, so that the steps themselves are deterministic.

    S = s_c + s_u candidates for each informative token, N S for the redundant pool (1 and N without guidance). u and pick are U[0, 1).
    """
    u: Tensor  # (B, N, S)
    eps: Tensor  # (B, N, S, d_I)
    pick: Tensor  # (B, N, 1)
    u_R: Tensor  # (B, N S)
    eps_R: Tensor  # (B, N S, d_R)
    pick_R: Tensor  # (B, N)

    @staticmethod
    def new(B: int, config: Config, options: Sampling, generator: torch.Generator | list[torch.Generator] | None, like: Tensor) -> "Noise":
        """One generator for the batch, or a list of one per image: image i then does not depend on the batch it is made in."""
        N, S = config.num_tokens, options.s_c + options.s_u if options.guidance > 0 else 1

        def one(b: int, g: torch.Generator | None) -> list[Tensor]:
            kw = dict(generator=g, device=g.device if g else like.device, dtype=like.dtype)
            return [torch.rand(b, N, S, **kw), torch.randn(b, N, S, config.informative_dim, **kw), torch.rand(b, N, 1, **kw),
                    torch.rand(b, N * S, **kw), torch.randn(b, N * S, config.redundant_dim, **kw), torch.rand(b, N, **kw)]
        if not isinstance(generator, list):
            return Noise(*(t.to(like.device) for t in one(B, generator)))
        return Noise(*(torch.cat(parts).to(like.device) for parts in zip(*(one(1, g) for g in generator), strict=True)))


def draw(gmm: GMM, options: Sampling, u: Tensor, eps: Tensor, pick: Tensor, scale: float = 1.0) -> Tensor:
    """Draws from one mixture per image (B, K, ...), or with guidance from a doubled batch (2B, K, ...): u (B, S) -> (B, S or picks, d)."""
    if options.guidance > 0:
        return resample_cfg(gmm, options, u, eps, pick, scale)
    return gmm_sample(gmm.tempered(options.T_pi, options.T_sigma * scale), u, eps)


def resample_cfg(p: GMM, options: Sampling, u: Tensor, eps: Tensor, pick: Tensor, scale: float = 1.0) -> Tensor:
    """Draws, the better the more candidates, from p'(z) ~ p_c(z)^{1+w} p_u(z)^{-w} (Eq. 15, Algorithm 1) by importance resampling.

    The first s_c : s_u share of the S candidates is proposed from p_c and weighed with (p_c/p_u)^w, the rest from p_u with (p_c/p_u)^{w+1}.
    p is the doubled batch [p_c, p_u]: logits (2B, K), mu and log_sigma (2B, K, d); u (B, S), eps (B, S, d) make the candidates, pick (B, n)
    chooses -> (B, n, d).
    """
    w, S = options.guidance, u.shape[1]
    S_c = S * options.s_c // (options.s_c + options.s_u)
    p_c, p_u = p.tempered(options.T_pi, options.T_sigma * scale).halves()
    z = torch.cat([gmm_sample(p_c, u[:, :S_c], eps[:, :S_c]), gmm_sample(p_u, u[:, S_c:], eps[:, S_c:])], 1)  # (B, S, d)
    log_p_c, log_p_u = shared_gmm_log_prob(z.repeat(2, 1, 1), *p.tempered(options.T_pi_v, options.T_sigma_v)).chunk(2)  # (B, S)
    delta = log_p_c - log_p_u
    log_weight = options.T_s * torch.cat([w * delta[:, :S_c], (w + 1) * delta[:, S_c:]], 1)
    chosen = categorical(log_weight, pick)  # (B, n)
    return z.gather(1, chosen.unsqueeze(-1).expand(-1, -1, z.shape[-1]))


# ---------------------------------------------------------------------------------------------------------------------- the model
class LogProb(NamedTuple):
    """log p(x|c) and its parts, each (B,) in nats: total = informative + redundant + logdet."""
    total: Tensor
    informative: Tensor
    redundant: Tensor
    logdet: Tensor


class Farmer(nn.Module):
    """The model: `flow` maps patches to latents, `prior` models them. Labels (B,) int64; `num_classes` is the null label."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.flow = Flow(config)
        self.prior = Prior(config)
        self.student: Student | None = None

    def new_student(self) -> Student:
        """Attaches a student that starts as a copy of the flow's blocks (Algorithm 2)."""
        self.student = Student(self.config).to(self.flow.mean.device)
        self.student.blocks.load_state_dict(self.flow.blocks.state_dict())
        return self.student

    def labels(self, labels: Tensor | None, B: int) -> Tensor:
        """Checked labels on the model's device; None = all null."""
        device, null = self.flow.mean.device, self.config.num_classes
        if labels is None:
            return torch.full((B,), null, device=device)
        labels = labels.to(device)
        if labels.shape != (B,) or ((labels < 0) | (labels > null)).any():
            raise UserError(f"labels: got {labels.tolist()[:8]}, expected {B} integers from 0 to {null} ({null} = the null class)")
        return labels

    def log_prob(self, images: Tensor, labels: Tensor | None = None) -> LogProb:
        """log p(images|labels) (section 3.3): images (B, C, H, W) float, dequantised, about [-1, 1] -> LogProb of (B,) in nats.

        Raises UserError when the images are not (B, C, image_size, image_size) or a label is out of range.
        """
        c = self.config
        if images.dim() != 4 or images.shape[1:] != (c.channels, c.image_size, c.image_size):
            raise UserError(f"images: got {tuple(images.shape)}, expected (B, {c.channels}, {c.image_size}, {c.image_size})")
        Z, logdet = self.flow(patchify(images, c.patch_size))
        Z_I, Z_R = Z.split([c.informative_dim, c.redundant_dim], -1)
        informative, redundant = self.prior(Z_I, self.labels(labels, len(images)))
        log_p_I = gmm_log_prob(Z_I, *informative).sum(1)
        log_p_R = shared_gmm_log_prob(Z_R, *redundant).sum(1) if redundant else torch.zeros_like(log_p_I)
        return LogProb(log_p_I + log_p_R + logdet, log_p_I, log_p_R, logdet)

    forward = log_prob

    @torch.no_grad()
    def sample(self, labels: Tensor, guidance: float = 0.0, generator: torch.Generator | list[torch.Generator] | None = None,
               options: Sampling | None = None, **inverse) -> Tensor:
        """labels (B,) -> images (B, C, H, W) float32, not clamped.

        guidance is the paper's w, 0 = off. options holds the other settings (default: the config's, Table 6); its guidance is not read.
        A list of B generators, one per image, makes image i independent of the batch. inverse: the arguments of `decode`.
        """
        options = dataclasses.replace(options or self.config.sampling, guidance=guidance)
        return self.decode(self.sample_latents(labels, options, generator), **inverse)

    @torch.no_grad()
    def sample_latents(self, labels: Tensor, options: Sampling, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """labels (B,) -> Z (B, N, d) drawn from the prior, guided where options.guidance > 0."""
        labels, c = self.labels(labels, len(labels)), self.config
        if options.guidance > 0 and c.num_classes == 0:
            raise UserError(f"guidance: got {options.guidance} for an unconditional model, expected 0")
        return self.prior.sample(labels, c.num_classes, options, Noise.new(len(labels), c, options, generator, self.flow.mean))

    @torch.no_grad()
    def decode(self, Z: Tensor, method: str | None = None, tol: float = 1e-4, max_steps: int | None = None) -> Tensor:
        """Z (B, N, d) -> images (B, C, H, W). method as in `Flow.inverse`; None: the student when there is one, else exact."""
        method = method or ("student" if self.student else "exact")
        X = self.flow.inverse(Z, method, self.student, tol, max_steps)
        return unpatchify(X, self.config.patch_size, self.config.channels)


# ---------------------------------------------------------------------------------------------------------------------- checkpoints
def checkpoint_path(path: str | Path) -> Path:
    """A checkpoint file, or a run's directory that holds ckpt.pt -> the file. Raises UserError when there is none."""
    file = Path(path) / "ckpt.pt" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"{file}: no such checkpoint; expected a run's directory or a .pt file written by train.py")
    return file


def save(path: str | Path, model: Farmer, **extra) -> None:
    """Writes config, weights and extra (tensors, numbers, strings and containers of them) to one file, atomically.

    Raises UserError when it cannot be written; the old file is then untouched.
    """
    write_checkpoint(path, model.config, model.state_dict(), extra)


def write_checkpoint(path: str | Path, config: Config, weights: dict[str, Tensor], extra: dict) -> None:
    """`save` for weights that were gathered elsewhere (sharded training, averaged weights)."""
    content = dict(format=CHECKPOINT_FORMAT, version=CHECKPOINT_VERSION, config=config.to_dict(), weights=weights, extra=extra)
    path, temporary = Path(path), None
    try:
        handle, temporary = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as a RuntimeError
        why = e.strerror if isinstance(e, OSError) else "writing failed, is the disk full?"
        raise UserError(f"{path}: checkpoint not saved ({why}); an older one is untouched; free some space or pass another --out") from e
    finally:
        if temporary and os.path.exists(temporary):
            os.remove(temporary)


def from_weights(config: Config, weights: dict[str, Tensor]) -> Farmer:
    """A model that holds these very tensors (no copy, no initialisation), with a student when they have one."""
    with torch.device("meta"):
        model = Farmer(config)
        if any(name.startswith("student.") for name in weights):
            model.student = Student(config)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def load(path: str | Path, device: str | torch.device = "cpu") -> tuple[Farmer, dict]:
    """Reads a file or run directory written by `save` -> the model in eval mode on device, and extra.

    Only tensors and plain containers are unpickled. Raises UserError for a file that is missing, truncated, not ours, of another version,
    or whose weights (a student's too) do not fit its config.
    """
    file = checkpoint_path(path)
    try:
        content = torch.load(file, map_location=device, weights_only=True)
    except Exception as e:  # truncation, foreign formats and refused pickles raise a dozen types
        raise UserError(f"{file}: not a readable checkpoint ({type(e).__name__}): truncated, not written by train.py, or a pickle with code in it") from e
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{file}: not a FARMER checkpoint; expected a file written by train.py")
    if content.get("version") != CHECKPOINT_VERSION:
        raise UserError(f"{file}: checkpoint version {content.get('version')}, expected {CHECKPOINT_VERSION}; use the code that wrote it")
    try:
        model, extra = from_weights(Config.from_dict(content["config"]), content["weights"]), content["extra"]
    except (KeyError, TypeError, RuntimeError, ValueError) as e:
        reason = " ".join(str(e).split())[:300]
        raise UserError(f"{file}: its weights do not fit its config ({reason}); a student needs a teacher of the same config") from e
    return model, extra
