"""FARMER: Flow AutoRegressive Transformer over Pixels (arXiv 2510.23588, CVPR 2026), a reference implementation.

The file reads like the paper: patches (3.2), mixtures (Eq. 11), Transformer, autoregressive flow (AF, Eq. 8-10), prior
(AR, Eq. 12) with its channel split (3.3), guidance (3.4), one-step student (3.5), the whole and its loss (Eq. 13). What
only makes it fast comes after that, presets last. Numbers of sections, equations and so on are the paper's.

    B  batch            d    channels of a token = C p^2    K  mixture components   X  tokens of an image, (B, N, d)
    C  image channels   d_I  informative channels           M  class tokens         Z  F(X) = [Z_I, Z_R], (B, N, d)
    p  patch size       d_R  redundant channels = d - d_I   S  candidates, a draw   h  hidden features, (B, T, W)
    N  tokens           W    width of a Transformer         T  sequence length      a  log sigma of the flow
c is a class, w the guidance weight. Everything random is drawn from a torch.Generator; log-probabilities are in nats.
"""
import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOW_LOG_SCALE_BOUND = 3.0  # an unbounded log sigma diverges in training and gives non-finite samples
MIXTURE_LOG_SCALE_BOUND = 7.0
INVERSES = ("auto", "exact", "parallel", "student", "refined")
LINEAR_MAPS = ("none", "rotate", "whiten")
Generators = list[torch.Generator] | torch.Generator | None  # one per image, one for the batch, or torch's global one


# ------------------------------------------------------------------------------ configuration
def setting(default, help: str, low: float = 0, high: float = 1e6, choices: tuple[str, ...] | None = None):
    """A field of a configuration: its help text, and the values that it takes."""
    metadata = dict(help=help, choices=choices) if choices else dict(help=help, low=low, high=high)
    return field(default=default, metadata=metadata)

def check_settings(config) -> None:
    """Raises a ValueError that names the first field whose value is of the wrong type or out of bounds."""
    for f in dataclasses.fields(config):
        value, limits = getattr(config, f.name), f.metadata
        if "choices" in limits:
            right, expected = value in limits["choices"], " or ".join(limits["choices"])
        elif f.type is bool:
            right, expected = isinstance(value, bool), "True or False"
        elif "low" not in limits or (value is None and f.default is None):
            continue
        else:
            kind, name = ((int, float), "a number") if f.type is float else (int, "an integer")
            right = isinstance(value, kind) and not isinstance(value, bool) and limits["low"] <= value <= limits["high"]
            expected = f"{name} from {limits['low']:g} to {limits['high']:g}"
        if not right:
            raise ValueError(f"{f.name}: got {value!r}, expected {expected}")

@dataclass(frozen=True)
class Sampling:
    """How to sample: the columns of Table 6, the redundant part, the inverse of the flow."""
    guidance: float = setting(0.0, "CFG weight w of Eq. 15; 0 = off")
    guidance_method: str = setting("resample", "Algorithm 1, or naive CFG by rejection", choices=("resample", "reject"))
    s_c: int = setting(5, "candidates proposed from p(z|c)", 1, 10_000)
    s_u: int = setting(5, "candidates proposed from p(z), the null class", 0, 10_000)
    T_pi: float = setting(1.0, "multiplies the mixture logits when proposing, and in plain sampling")
    T_sigma: float = setting(1.0, "multiplies the component stds when proposing, and in plain sampling")
    T_pi_v: float = setting(1.0, "multiplies the mixture logits when weighing")
    T_sigma_v: float = setting(1.0, "multiplies the component stds when weighing", 1e-6)
    T_s: float = setting(1.0, "multiplies the log-weights before the softmax")
    redundant_scale: float = setting(1.0, "multiplies the stds of the redundant mixture once more (Fig. 7)")
    redundant_pool: str = setting("shared", "of candidates for guided Z_R", choices=("shared", "per_token"))
    inverse: str = setting("auto", "of the flow; auto = the student when there is one, else exact", choices=INVERSES)
    tol: float = setting(1e-4, "parallel, refined: largest error aimed at")
    max_passes: int | None = setting(None, "parallel, refined: stop after so many passes in a block")
    precision: str = setting("float32", "of the prior and the student", choices=("float32", "bfloat16"))
    denoise: float = setting(0.0, "std of the noise that one step along the model's own score takes off; 0 = off")

    def __post_init__(self):
        check_settings(self)

    @property
    def candidates(self) -> int:
        """S of one draw: more than one where candidates are weighed."""
        return self.s_c + self.s_u if self.guidance > 0 and self.guidance_method == "resample" else 1

@dataclass(frozen=True)
class Config:
    """Every hyperparameter of the model. Sizes are in pixels, tokens or channels."""
    image_size: int = setting(16, "height and width of an image in pixels", 1, 4096)
    channels: int = setting(3, "1 (grey) or 3 (RGB)", 1, 3)
    patch_size: int = setting(4, "p; a token is a p x p patch", 1, 256)
    num_classes: int = setting(10, "0 = unconditional; label num_classes is the null class")
    flow_blocks: int = setting(4, "n, blocks of the autoregressive flow", 0, 1000)
    flow_layers: int = setting(1, "Transformer layers in each flow block", 1, 1000)
    flow_width: int = setting(128, "Transformer width in the flow", 1, 16_384)
    ar_layers: int = setting(2, "layers of the AR Transformer", 1, 1000)
    ar_width: int = setting(128, "width of the AR Transformer", 1, 16_384)
    head_dim: int = setting(64, "channels of an attention head; divides both widths", 1, 16_384)
    informative_dim: int = setting(48, "d_I, channels of Z the AR models token by token; d = no split", 1)
    informative_mixtures: int = setting(16, "K_I, components of a token's mixture", 1, 1e5)
    redundant_mixtures: int = setting(1, "K_R, components of the one mixture shared by all redundant parts", 1, 1e5)
    redundant_prior: str = setting("mixture", "that mixture, or JetFormer's N(0, I)", choices=("mixture", "gaussian"))
    class_tokens: int = setting(4, "M, times the class embedding is repeated", 1, 1e5)
    final_flip: bool = setting(True, "the AR reads tokens against the last flow block's order")
    look_above: bool = setting(False, "the Transformers read each token beside the one above the token it predicts")
    linear_map: str = setting("none", "fixed PCA of the patch channels, fitted on data", choices=LINEAR_MAPS)
    sampling: Sampling = Sampling()

    def __post_init__(self):
        check_settings(self)
        for name, unit in (("image_size", "patch_size"), ("flow_width", "head_dim"), ("ar_width", "head_dim")):
            value, factor = getattr(self, name), getattr(self, unit)
            if value % factor:
                raise ValueError(f"{name}: got {value}, expected a multiple of {unit} {factor}")
        if self.channels == 2:
            raise ValueError(f"channels: got {self.channels}, expected 1 (grey) or 3 (RGB)")
        if self.informative_dim > self.token_dim:
            raise ValueError(f"informative_dim: got {self.informative_dim}, expected 1 to token_dim = {self.token_dim}")
        if self.flow_blocks * self.flow_layers + self.ar_layers > 2000:
            raise ValueError(f"flow_blocks, flow_layers: got {self.flow_blocks} x {self.flow_layers}, at most 2000")
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


# ------------------------------------------------------------------------------ patches
def patchify(images: Tensor, p: int) -> Tensor:
    """(B, C, H, W) -> (B, N, d), tokens in raster order, d = (row, column, channel) of the pixel in its patch."""
    B, C, H, W = images.shape
    X = images.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)  # (B, H/p, W/p, p, p, C)
    return X.reshape(B, (H // p) * (W // p), p * p * C)

def unpatchify(X: Tensor, p: int, channels: int) -> Tensor:
    """(B, N, d) -> (B, C, H, W), the inverse of `patchify` for square images."""
    B, n = len(X), math.isqrt(X.shape[1])
    return X.reshape(B, n, n, p, p, channels).permute(0, 5, 1, 3, 2, 4).reshape(B, channels, n * p, n * p)


# ------------------------------------------------------------------------------ mixtures
class GMM(NamedTuple):
    """A batch of diagonal Gaussian mixtures (Eq. 11): logits (..., K), mu (..., K, d), log_sigma (..., K, d).
    A fork with another noise law overrides log_prob, shared_log_prob, sample and noise, which draws sample's eps."""
    logits: Tensor
    mu: Tensor
    log_sigma: Tensor
    noise = staticmethod(torch.randn)

    def log_prob(self, z: Tensor) -> Tensor:
        """z (..., d) -> (...) in nats."""
        return gmm_log_prob(z, *self)

    def shared_log_prob(self, z: Tensor) -> Tensor:
        """`log_prob` of T vectors under each mixture: z (B, T, d), mixtures (B, ...) -> (B, T) in nats.
        Expanding the square gives matrix products instead of a (B, T, K, d) tensor. They cancel where |mu| >> sigma,
        hence float64; at d_R = 640, K_R = 200 that is below 0.1% of the model's arithmetic."""
        with full_precision(z):
            z64, (logits, mu, log_sigma) = z.double(), (t.double() for t in self)
            precision = torch.exp(-2 * log_sigma)  # (B, K, d)
            mu_e2 = (mu.square() * precision).sum(-1).unsqueeze(1)  # (B, 1, K)
            e2 = z64.square() @ precision.mT - 2 * z64 @ (mu * precision).mT + mu_e2  # (B, T, K)
            log_pi = logits.log_softmax(-1) - log_sigma.sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)
            return torch.logsumexp(-0.5 * e2 + log_pi.unsqueeze(1), -1).to(z.dtype)

    def sample(self, u: Tensor, eps: Tensor) -> Tensor:
        """S draws of each mixture: u (..., S) uniform picks the component, eps (..., S, d) normal -> z (..., S, d)."""
        k = categorical(self.logits, u).unsqueeze(-1).expand(eps.shape)  # (..., S, d)
        return self.mu.gather(-2, k) + self.log_sigma.gather(-2, k).exp() * eps

    def tempered(self, T_pi: float, T_sigma: float) -> "GMM":
        """Logits times T_pi, stds times T_sigma (Table 6). T_sigma = 0 leaves the means: its log is kept finite."""
        return self._replace(logits=self.logits * T_pi, log_sigma=self.log_sigma + math.log(max(T_sigma, 1e-38)))

    def halves(self) -> tuple["GMM", "GMM"]:
        """Splits a doubled batch, [class, null], in two."""
        return tuple(self._make(half) for half in zip(*(t.chunk(2) for t in self), strict=True))

def gmm_log_prob(z: Tensor, logits: Tensor, mu: Tensor, log_sigma: Tensor) -> Tensor:
    """log sum_k pi_k N(z; mu_k, diag sigma_k^2) (Eq. 11) in nats.
    z (..., d), logits (..., K), mu and log_sigma (..., K, d) -> (...)."""
    e = (z.unsqueeze(-2) - mu) * torch.exp(-log_sigma)  # (..., K, d)
    log_p = -(0.5 * e.square() + log_sigma).sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)  # (..., K)
    return torch.logsumexp(log_p + logits.log_softmax(-1), -1)

def categorical(logits: Tensor, u: Tensor) -> Tensor:
    """Draws from softmax(logits) by the inverse CDF: logits (..., K), u (..., S) uniform -> int64 (..., S)."""
    cdf = logits.double().softmax(-1).cumsum(-1)  # double: with 50,000 candidates float32 sums drift
    return torch.searchsorted(cdf, u.double() * cdf[..., -1:], right=True).clamp(max=logits.shape[-1] - 1)

def soft_bound(a: Tensor, bound: float) -> Tensor:
    """bound * tanh(a / bound): the identity near 0, inside (-bound, bound) and with a gradient everywhere."""
    return bound * torch.tanh(a / bound)

def full_precision(x: Tensor):
    """Context in which autocast is off: scales, determinants and mixtures are never computed in bf16."""
    on = torch.is_autocast_enabled(x.device.type)  # entering a context costs as much as five small kernels
    return torch.autocast(x.device.type, enabled=False) if on else contextlib.nullcontext()

def random(law: Callable, B: int, shape: tuple[int, ...], generators: Generators, like: Tensor) -> Tensor:
    """(B, *shape) random numbers of a law such as torch.rand, of the type and on the device of `like`.
    With a list of generators, one per image, image i does not depend on the batch that it is made in."""
    if not isinstance(generators, list):
        device = generators.device if generators else like.device
        return law((B, *shape), generator=generators, device=device, dtype=like.dtype).to(like.device)
    if len(generators) != B:
        raise ValueError(f"generators: got {len(generators)}, expected one for each of {B} images")
    return torch.stack([law(shape, generator=g, device=g.device, dtype=like.dtype) for g in generators]).to(like.device)


# ------------------------------------------------------------------------------ Transformer
class Layer(nn.Module):
    """Pre-norm Transformer layer: attention, then a GELU MLP of width 4W."""
    def __init__(self, W: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.norm_attention, self.norm_mlp = nn.LayerNorm(W), nn.LayerNorm(W)
        self.qkv, self.out = nn.Linear(W, 3 * W, bias=False), nn.Linear(W, W, bias=False)
        self.up, self.down = nn.Linear(W, 4 * W), nn.Linear(4 * W, W)

    def forward(self, h: Tensor, cache: "KVCache | None" = None, causal: bool = True) -> Tensor:
        """h (B, T, W) -> (B, T, W). With a cache, h follows the tokens in it; T > 1 then needs an empty one."""
        B, T, W = h.shape
        qkv = self.qkv(self.norm_attention(h)).view(B, T, 3, W // self.head_dim, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, head_dim)
        k, v, mask = (k, v, None) if cache is None else cache.append(k, v)
        read = attention(q, k, v, mask, causal and T > 1 and mask is None)
        h = h + self.out(read.transpose(1, 2).reshape(B, T, W))
        return h + self.down(F.gelu(self.up(self.norm_mlp(h))))

class Transformer(nn.Module):
    """Layers and a last norm."""
    def __init__(self, W: int, layers: int, head_dim: int):
        super().__init__()
        self.W, self.head_dim = W, head_dim
        self.layers = nn.ModuleList(Layer(W, head_dim) for _ in range(layers))
        self.norm = nn.LayerNorm(W)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into = name.endswith(("qkv.weight", "up.weight"))
                nn.init.normal_(p, std=W**-0.5 * (0.5 if into else 0.5 / math.sqrt(2 * layers)))

    def new_cache(self, B: int, T: int, like: Tensor, static: bool | None = None) -> "list[KVCache]":
        """Empty caches for B sequences of up to T tokens, static ones on a GPU."""
        static = like.is_cuda if static is None else static
        return [KVCache(B, self.W // self.head_dim, T, self.head_dim, like, static) for _ in self.layers]

    def forward(self, h: Tensor, cache: "list[KVCache] | None" = None, causal: bool = True) -> Tensor:
        for i, layer in enumerate(self.layers):
            h = layer(h, cache and cache[i], causal)
        return self.norm(h)

class TokenEmbedding(nn.Module):
    """Tokens (B, N, d) -> h (B, T, W). With look_above, token t also carries the one above the token that it predicts.
    A short cut of ours for small budgets: attention finds that one by itself, but only after many steps."""
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
        above = x.index_select(1, (at - self.lag).clamp(min=0)) * (at >= self.lag).unsqueeze(-1)  # 0 above row 1
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


# ------------------------------------------------------------------------------ autoregressive flow
def affine(x: Tensor, mu: Tensor, a: Tensor) -> Tensor:
    """z = (x - mu) exp(a) (Eq. 8), log|det dz/dx| = sum a (Eq. 10)."""
    return (x - mu) * torch.exp(a)

def affine_inverse(z: Tensor, mu: Tensor, a: Tensor) -> Tensor:
    """x = z exp(-a) + mu (Eq. 9)."""
    return z * torch.exp(-a) + mu

class FlowBlock(nn.Module):
    """f_t (Eq. 8): what a causal Transformer reads in the tokens before shifts and scales a token; the first stays."""
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
        """Raster order to this block's order and back, pi_t: (B, N, d)."""
        return x.flip(1) if self.flip else x

    def mu_a(self, x: Tensor, at: Tensor, pos: Tensor, cache: "list[KVCache] | None" = None,
             causal: bool = True) -> tuple[Tensor, Tensor]:
        """mu and a of the tokens after positions `at` (T,) of x (B, N, d) in this block's order -> two of (B, T, d).
        pos (N, W), in a fork also (B, N, W). Forward, inverse, Jacobi iteration and student all go through here."""
        h = self.transformer(self.embed(x, at) + pos.index_select(-2, at), cache, causal)
        with full_precision(h):
            mu, a = self.to_mu_a(h.to(x.dtype)).chunk(2, dim=-1)
            return mu, soft_bound(a, FLOW_LOG_SCALE_BOUND)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, N, d) -> z (B, N, d), logdet (B,) in nats (Eq. 8, 10)."""
        x = self.order(x)
        mu, a = self.mu_a(x, torch.arange(x.shape[1] - 1, device=x.device), self.pos(self.flip))
        z = torch.cat([x[:, :1], affine(x[:, 1:], mu, a)], 1)
        return self.order(z), a.sum((1, 2))

    def inverse(self, z: Tensor) -> Tensor:
        """z (B, N, d) -> x (B, N, d) (Eq. 9), token by token with a KV cache: one forward's arithmetic in N steps."""
        z, pos, N = self.order(z), self.pos(self.flip), z.shape[1]
        cache = self.transformer.new_cache(len(z), N, z)
        x, at = torch.zeros_like(z), torch.zeros(1, dtype=torch.long, device=z.device)
        x[:, 0] = z[:, 0]
        x_after, z_after = x[:, 1:], z[:, 1:]

        def step():
            mu, a = self.mu_a(x, at, pos, cache)
            x_after.index_copy_(1, at, affine_inverse(z_after.index_select(1, at), mu, a))
            at.add_(1)
        repeat(step, N - 1, z.device)
        return self.order(x)

    def inverse_jacobi(self, z: Tensor, x: Tensor, tol: float, max_passes: int | None = None) -> tuple[Tensor, Tensor]:
        """The fixed point of x = z exp(-a(x)) + mu(x) by parallel passes over all tokens, from the guess x (B, N, d).
        The map is triangular: after k passes the first k + 1 tokens are exact, so N - 1 passes always suffice. An image
        stops, and leaves the batch, when no value moved by more than tol / 4. Values beyond 1e6 are cut off.
        Returns x (B, N, d) and the passes that each image took (B,)."""
        z, x, pos, N = self.order(z), self.order(x), self.pos(self.flip), z.shape[1]
        x = x.nan_to_num(0.0).clamp(-1e6, 1e6)  # a copy
        x[:, 0] = z[:, 0]
        passes = torch.zeros(len(z), dtype=torch.long, device=z.device)
        active, at = torch.arange(len(z), device=z.device), torch.arange(N - 1, device=z.device)
        for _ in range(N - 1 if max_passes is None else max_passes):
            z_t, x_t, pos_t = z[active, 1:], x[active], pos[active] if pos.dim() == 3 else pos
            # a token may overflow before those that it reads have settled; its NaN would reach all others (0 NaN = NaN)
            new = affine_inverse(z_t, *self.mu_a(x_t, at, pos_t)).nan_to_num(0.0).clamp(-1e6, 1e6)
            moved = (new - x_t[:, 1:]).abs().amax((1, 2)) > tol / 4  # a quarter: what is left adds up over blocks
            x[active, 1:] = new
            passes[active] += 1
            active = active[moved]
            if not len(active):
                break
        return self.order(x), passes

    def one_step(self, z: Tensor) -> Tensor:
        """The student's inverse (Algorithm 2): bidirectional attention reads z (B, N, d) at once -> x (B, N, d)."""
        z = self.order(z)
        mu, a = self.mu_a(z, torch.arange(z.shape[1], device=z.device), self.pos(self.flip), causal=False)
        return self.order(torch.cat([z[:, :1], affine_inverse(z[:, 1:], mu[:, :-1], a[:, :-1])], 1))

class Flow(nn.Module):
    """F = f_n o ... o f_1 (Eq. 8-10), a fixed linear map of the channels before it and the final flip after it.
    Blocks alternate their order; the last one reads in raster order, so that the final flip turns the AR against it."""
    block = FlowBlock

    def __init__(self, config: Config):
        super().__init__()
        d, n = config.token_dim, config.flow_blocks
        self.final_flip = config.final_flip
        self.blocks = nn.ModuleList(self.block(config, flip=(n - 1 - t) % 2 == 1) for t in range(n))
        self.linear_map = config.linear_map
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("map", torch.eye(d))  # X -> (X - mean) map
        self.register_buffer("inverse_map", torch.eye(d))
        self.register_buffer("map_logdet", torch.zeros(()))  # log|det map| of one token, nats

    @torch.no_grad()
    def fit_linear_map(self, X: Tensor) -> None:
        """PCA of patches X (B, N, d): rotate turns to the principal axes, largest variance first; whiten also scales
        them to unit variance. The map then stays fixed: the model remains an exact flow, and its determinant counts."""
        if self.linear_map == "none":
            return
        X = X.flatten(0, 1).double()
        variance, axes = torch.linalg.eigh(torch.cov(X.T).reshape(X.shape[1], X.shape[1]))
        variance, axes = variance.flip(0).clamp(min=1e-8), axes.flip(1)
        scale = variance.rsqrt() if self.linear_map == "whiten" else torch.ones_like(variance)
        self.mean.copy_(X.mean(0))
        self.map.copy_(axes * scale)
        self.inverse_map.copy_((axes / scale).T)
        self.map_logdet.copy_(scale.log().sum())

    def forward(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """X (B, N, d) -> Z (B, N, d) in the order that the AR reads, logdet (B,) in nats."""
        (*_, Z), logdet = self.states(X)
        return Z.flip(1) if self.final_flip else Z, logdet

    def states(self, X: Tensor) -> tuple[list[Tensor], Tensor]:
        """Z_0 ... Z_n of Algorithm 2, each (B, N, d) in raster order (Z_0: X after the linear map), and logdet (B,)."""
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
                max_passes: int | None = None) -> Tensor:
        """Z (B, N, d) -> X (B, N, d) (Eq. 9). exact: token by token. parallel: Jacobi iteration in each block, from z.
        student: one pass in each block, an approximation (3.5). refined: Jacobi iteration from the student's output;
        max_passes = 0 is the student, N - 1 exact. tol is the largest error aimed at."""
        if method not in INVERSES[1:]:
            raise ValueError(f"inverse: got {method!r}, expected {', '.join(INVERSES[1:])}")
        if method in ("student", "refined") and student is None:
            raise ValueError(f"inverse: got {method!r} without a student; distil one: python train.py --distill DIR")
        with torch.inference_mode():  # faster than no_grad; the product below makes an ordinary tensor again
            z = Z.flip(1) if self.final_flip else Z
            for t in reversed(range(len(self.blocks))):
                if method == "exact":
                    z = self.blocks[t].inverse(z)
                else:
                    x = z if method == "parallel" else student.blocks[t].one_step(z)
                    z = x if method == "student" else self.blocks[t].inverse_jacobi(z, x, tol, max_passes)[0]
        with full_precision(z):
            return z @ self.inverse_map + self.mean


# ------------------------------------------------------------------------------ AR prior
class MixtureHead(nn.Module):
    """h (..., W) -> a mixture of K components over R^d (Eq. 11)."""
    def __init__(self, W: int, K: int, d: int, mixture: type[GMM] = GMM):
        super().__init__()
        self.K, self.d, self.mixture = K, d, mixture
        self.linear = nn.Linear(W, K * (1 + 2 * d))
        nn.init.normal_(self.linear.weight, std=0.1 * W**-0.5)
        nn.init.zeros_(self.linear.bias)
        if K > 1:  # components that start equal stay equal
            nn.init.normal_(self.linear.bias[K:K + K * d], std=0.5)

    def forward(self, h: Tensor) -> GMM:
        K, d = self.K, self.d
        with full_precision(h):
            logits, mu, log_sigma = self.linear(h.to(self.linear.weight.dtype)).split([K, K * d, K * d], -1)
            log_sigma = soft_bound(log_sigma, MIXTURE_LOG_SCALE_BOUND)
            return self.mixture(logits, mu.unflatten(-1, (K, d)), log_sigma.unflatten(-1, (K, d)))

class Prior(nn.Module):
    """P(Z|c) = prod_i P(Z^I_i | Z^I_<i, c) prod_i P(Z^R_i | Z^I, c) (Eq. 14); without a split Z^I is all of Z (Eq. 12).
    A Transformer reads [c x M, Z^I_1 ... Z^I_N]. Its output at the last class token is the mixture of Z^I_1, at Z^I_i
    that of Z^I_{i+1}, and at Z^I_N the one that all Z^R share."""
    def __init__(self, config: Config, mixture: type[GMM] = GMM):
        super().__init__()
        W, self.mixture = config.ar_width, mixture
        self.N, self.M = config.num_tokens, config.class_tokens
        self.d_I, self.d_R = config.informative_dim, config.redundant_dim
        self.class_embed = nn.Embedding(config.num_classes + 1, W)  # the last row is the null class
        nn.init.normal_(self.class_embed.weight, std=0.5)
        self.class_pos = nn.Parameter(0.1 * torch.randn(self.M, W))
        self.embed, self.pos = TokenEmbedding(config, self.d_I, W), Positions(self.N, W)
        self.transformer = Transformer(W, config.ar_layers, config.head_dim)
        self.informative = MixtureHead(W, config.informative_mixtures, self.d_I, mixture)
        learned = self.d_R and config.redundant_prior == "mixture"
        self.redundant = MixtureHead(W, config.redundant_mixtures, self.d_R, mixture) if learned else None

    def class_tokens(self, labels: Tensor) -> Tensor:
        """labels (B,) -> (B, M, W)."""
        return self.class_embed(labels).unsqueeze(1) + self.class_pos

    def shared(self, h: Tensor) -> GMM:
        """h (B, W) -> the mixture that all Z_R share, (B, K_R, ...); JetFormer's N(0, I) (4.3) as one component."""
        if self.redundant:
            return self.redundant(h)
        zeros = torch.zeros(len(h), 1, self.d_R, device=h.device)
        return self.mixture(zeros[..., 0], zeros, zeros)

    def forward(self, Z_I: Tensor, labels: Tensor) -> tuple[GMM, GMM | None]:
        """Z_I (B, N, d_I), labels (B,) -> mixtures of Z_I (B, N, K_I, ...) and the shared one (B, K_R, ...) or None."""
        at = torch.arange(Z_I.shape[1], device=Z_I.device)
        h = torch.cat([self.class_tokens(labels), self.embed(Z_I, at) + self.pos(flip=False)], 1)
        h = self.transformer(h)[:, self.M - 1:]  # (B, N + 1, W)
        return self.informative(h[:, :-1]), self.shared(h[:, -1]) if self.d_R else None

    @torch.no_grad()
    def sample(self, labels: Tensor, null: int, options: Sampling, generators: Generators = None) -> Tensor:
        """labels (B,) -> Z (B, N, d). With guidance both passes, c and null, run as one doubled batch."""
        B, N, guided = len(labels), self.N, options.guidance > 0
        pos, at = self.pos(flip=False), torch.zeros(1, dtype=torch.long, device=labels.device)
        h = self.class_tokens(torch.cat([labels, torch.full_like(labels, null)]) if guided else labels)
        cache = self.transformer.new_cache(len(h), self.M + N, h)
        Z_I, last = h.new_zeros(B, N, self.d_I), self.transformer(h, cache)[:, -1].contiguous()
        noise = Noise.new(B, (N, options.candidates), self.d_I, (N, 1), generators, h, self.mixture.noise)

        def step():
            now = Noise(*(t.index_select(1, at).squeeze(1) for t in noise))
            Z_I.index_copy_(1, at, draw(self.informative(last), options, now, generators))
            h = self.embed(Z_I, at) + pos[at]
            last.copy_(self.transformer(torch.cat([h, h]) if guided else h, cache)[:, -1])
            at.add_(1)
        repeat(step, N, labels.device, replay=options.guidance_method == "resample")  # rejection draws as it goes
        return torch.cat([Z_I, self.sample_redundant(last, B, options, generators)], -1) if self.d_R else Z_I

    def sample_redundant(self, h: Tensor, B: int, options: Sampling, generators: Generators = None) -> Tensor:
        """h (B, W) after the last informative token, doubled with guidance -> Z_R (B, N, d_R), N draws of one mixture.
        Guided draws share a pool of N S candidates, or take S for each token. Images go in blocks, to bound memory."""
        N, scale, h = self.N, options.redundant_scale, h.unflatten(0, (-1, B))
        if not self.redundant:  # N(0, I) knows no class, and JetFormer leaves its width alone
            h, options = h[:1], dataclasses.replace(options, guidance=0.0, T_sigma=1.0)
        S, groups = N * options.candidates, N if options.redundant_pool == "per_token" else 1
        block, Z_R = max(1, 2**22 // (S * self.d_R)), []
        for i in range(0, B, block):
            own = generators[i:i + block] if isinstance(generators, list) else generators
            part = h[:, i:i + block]
            noise = Noise.new(part.shape[1], (S,), self.d_R, (N,), own, h, self.mixture.noise)
            Z_R.append(draw(self.shared(part.flatten(0, 1)), options, noise, own, scale, groups))
        return torch.cat(Z_R)


# ------------------------------------------------------------------------------ guidance
class Noise(NamedTuple):
    """What draws from mixtures use up, drawn before the first step, so that the steps themselves are deterministic."""
    u: Tensor  # (B, ..., S) uniform in [0, 1): picks the component of each candidate
    eps: Tensor  # (B, ..., S, d): the candidate in its component
    pick: Tensor  # (B, ..., n) uniform in [0, 1): picks n of the candidates

    @staticmethod
    def new(B: int, u: tuple[int, ...], d: int, pick: tuple[int, ...], generators: Generators, like: Tensor,
            law: Callable = torch.randn) -> "Noise":
        """u and pick: the shapes of these parts, without B."""
        shapes = ((torch.rand, u), (law, (*u, d)), (torch.rand, pick))
        return Noise(*(random(part, B, shape, generators, like) for part, shape in shapes))

def draw(gmm: GMM, options: Sampling, noise: Noise, generators: Generators = None, scale: float = 1.0,
         groups: int = 1) -> Tensor:
    """Draws from one mixture per image, (B, K, ...) or with guidance a doubled batch (2B, K, ...) -> (B, n, d)."""
    if options.guidance == 0:
        return gmm.tempered(options.T_pi, options.T_sigma * scale).sample(noise.u, noise.eps)
    if options.guidance_method == "reject":
        return reject_cfg(gmm, options, noise.u, noise.eps, generators, scale)
    return resample_cfg(gmm, options, *noise, scale, groups)

def resample_cfg(p: GMM, options: Sampling, u: Tensor, eps: Tensor, pick: Tensor, scale: float = 1.0,
                 groups: int = 1) -> Tensor:
    """Draws, the better the more candidates, from p'(z) ~ p_c(z)^{1+w} p_u(z)^{-w} (Eq. 15, Algorithm 1).
    The first s_c : s_u share of the S candidates is proposed from p_c and weighed with (p_c/p_u)^w, the rest from p_u
    with (p_c/p_u)^{w+1}. p is the doubled batch [p_c, p_u], (2B, K, ...); u (B, S) and eps (B, S, d) make candidates,
    pick (B, n) chooses, with replacement -> (B, n, d). With groups, candidates and choices are split among them."""
    w, G = options.guidance, groups
    u, eps, pick = (t.unflatten(1, (G, t.shape[1] // G)) for t in (u, eps, pick))  # S and n are now those of a group
    B, _, S, d = eps.shape
    S_c = S * options.s_c // (options.s_c + options.s_u)
    p_c, p_u = p.tempered(options.T_pi, options.T_sigma * scale).halves()
    z_c = p_c.sample(u[:, :, :S_c].flatten(1), eps[:, :, :S_c].flatten(1, 2)).view(B, G, S_c, d)
    z_u = p_u.sample(u[:, :, S_c:].flatten(1), eps[:, :, S_c:].flatten(1, 2)).view(B, G, S - S_c, d)
    z = torch.cat([z_c, z_u], 2)  # (B, G, S, d)
    weighing = p.tempered(options.T_pi_v, options.T_sigma_v)
    log_p_c, log_p_u = weighing.shared_log_prob(z.flatten(1, 2).repeat(2, 1, 1)).view(2, B, G, S)
    delta = log_p_c - log_p_u
    log_weight = options.T_s * torch.cat([w * delta[..., :S_c], (w + 1) * delta[..., S_c:]], -1)
    chosen = categorical(log_weight, pick)  # (B, G, n)
    return z.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, d)).flatten(1, 2)

def gaussian_guided(mu_c: Tensor, sigma_c: Tensor, mu_u: Tensor, sigma_u: Tensor, w: float) -> tuple[Tensor, Tensor]:
    """mu and sigma of the Gaussian N(x; mu_c, sigma_c)^{1+w} N(x; mu_u, sigma_u)^{-w}; mu_c, sigma_c if it is none."""
    precision = (1 + w) / sigma_c**2 - w / sigma_u**2
    mu = ((1 + w) * mu_c / sigma_c**2 - w * mu_u / sigma_u**2) / precision
    return torch.where(precision > 0, mu, mu_c), torch.where(precision > 0, precision.rsqrt(), sigma_c)

def reject_cfg(p: GMM, options: Sampling, u: Tensor, eps: Tensor, generators: Generators = None,
               scale: float = 1.0) -> Tensor:
    """The ablation's naive CFG (4.3), rejection sampling as GIVT and JetFormer do it: p (2B, K, ...) -> (B, n, d).
    u (B, n) picks a component of p_c, and the same one of p_u. Each channel then follows N_c^{1+w} N_u^{-w}: of 1,000
    proposals from N(mu_c, 2 max sigma) the first accepted one. Where none is, eps (B, n, d) draws from N_c."""
    w, B = options.guidance, len(u)
    p_c, p_u = p.tempered(options.T_pi, options.T_sigma * scale).halves()
    k = categorical(p_c.logits, u).unsqueeze(-1).expand(eps.shape)  # (B, n, d)
    mu_c, mu_u, sigma_c, sigma_u = p_c.mu, p_u.mu, p_c.log_sigma.exp(), p_u.log_sigma.exp()
    mu_c, mu_u, sigma_c, sigma_u = (t.gather(1, k) for t in (mu_c, mu_u, sigma_c, sigma_u))

    def log_p(x: Tensor, at: slice) -> Tensor:  # up to a constant, for the draws `at`
        e_c, e_u = (x - mu_c[:, at]) / sigma_c[:, at], (x - mu_u[:, at]) / sigma_u[:, at]
        return 0.5 * (w * e_u.square() - (1 + w) * e_c.square())
    mode = gaussian_guided(mu_c, sigma_c, mu_u, sigma_u, w)[0].clamp(mu_c - 10, mu_c + 10)
    log_max = torch.stack([log_p(x, slice(None)) for x in (mode, mu_c - 10, mu_c + 10)]).amax(0)  # as far as they look
    width, z = 2 * torch.maximum(sigma_c, sigma_u), []
    for at in (slice(i, i + 1) for i in range(eps.shape[1])):  # one after another bounds the memory
        e, v = (random(law, B, (1000, eps.shape[2]), generators, eps) for law in (torch.randn, torch.rand))
        x = mu_c[:, at] + width[:, at] * e  # (B, 1000, d)
        accepted = v.log() + log_max[:, at] - 0.5 * e.square() < log_p(x, at)  # v max(p) q(x) / q(mu_c) < p(x)
        first = x.gather(1, accepted.int().argmax(1, keepdim=True))
        z.append(torch.where(accepted.any(1, keepdim=True), first, mu_c[:, at] + sigma_c[:, at] * eps[:, at]))
    return torch.cat(z, 1)


# ------------------------------------------------------------------------------ one-step student
class Student(nn.Module):
    """Inverts the flow in one pass per block (3.5): blocks like the teacher's, whose `one_step` is used."""
    def __init__(self, blocks: nn.ModuleList):
        super().__init__()
        self.blocks = blocks

class Distiller(nn.Module):
    """What is trained in distillation (Algorithm 2). It is called as the model is; its parameters are the student's."""
    def __init__(self, model: "Farmer", noise: float = 0.3):
        super().__init__()
        self.student = model.student
        self.noise = noise  # the largest std of the noise on the student's input
        object.__setattr__(self, "teacher", model)  # not a submodule: not trained, not sharded, not saved

    def forward(self, x: Tensor, labels: Tensor | None = None, generators: Generators = None) -> dict[str, Tensor]:
        """x (B, C, H, W) real images -> {"loss": (B,)}: mean over blocks of MSE(Z~_{t-1}, Z_{t-1}).
        The first block receives Z_n + s eps, s ~ U[0, 0.3] for each image, the others the student's previous output."""
        self.teacher.check_labels(labels, len(x))  # not read here: this flow knows no classes
        with torch.no_grad():
            Z, _ = self.teacher.flow.states(self.teacher.patches(x))  # Z_0 ... Z_n
        s = self.noise * random(torch.rand, len(x), (1, 1), generators, Z[-1])
        z, losses = Z[-1] + s * random(torch.randn, len(x), tuple(Z[-1].shape[1:]), generators, Z[-1]), []
        for t in reversed(range(1, len(Z))):
            z = self.student.blocks[t - 1].one_step(z)
            losses.append((z - Z[t - 1]).square().mean((1, 2)))
        return {"loss": torch.stack(losses).mean(0)}

    def layers(self) -> list[Layer]:
        return [m for m in self.student.modules() if isinstance(m, Layer)]


# ------------------------------------------------------------------------------ the model
class LogProb(NamedTuple):
    """log p(x|c) and its parts, each (B,) in nats: total = informative + redundant + logdet."""
    total: Tensor
    informative: Tensor
    redundant: Tensor
    logdet: Tensor

class Farmer(nn.Module):
    """The model: `flow` maps patches to latents, `prior` models them. Labels are (B,) int64, num_classes the null one.
    A fork replaces a part after super().__init__, or the class of the mixtures."""
    mixture = GMM

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.flow = Flow(config)
        self.prior = Prior(config, self.mixture)
        self.student: Student | None = None

    def forward(self, x: Tensor, labels: Tensor, generators: Generators = None) -> dict[str, Tensor]:
        """The loss (Eq. 13) and its parts, each (B,) in nats per dimension; nothing here is random.
        informative and redundant are negative log-likelihoods: loss = informative + redundant - logdet."""
        log_p = self.log_prob(x, labels if self.config.num_classes else None)
        total, informative, redundant, logdet = (t / x[0].numel() for t in log_p)
        return dict(loss=-total, nats_per_dim=-total, informative=-informative, redundant=-redundant, logdet=logdet)

    def log_prob(self, images: Tensor, labels: Tensor | None = None) -> LogProb:
        """log p(images|labels): images (B, C, H, W) float, dequantised, about [-1, 1] -> LogProb of (B,) in nats.
        labels None: all null. Raises ValueError when an image has not the model's size or a label is out of range."""
        Z, logdet = self.flow(self.patches(images))
        Z_I, Z_R = Z.split([self.config.informative_dim, self.config.redundant_dim], -1)
        informative, redundant = self.prior(Z_I, self.check_labels(labels, len(Z)))
        log_p_I = informative.log_prob(Z_I).sum(1)
        log_p_R = redundant.shared_log_prob(Z_R).sum(1) if redundant else torch.zeros_like(log_p_I)
        return LogProb(log_p_I + log_p_R + logdet, log_p_I, log_p_R, logdet)

    @torch.no_grad()
    def sample(self, labels: Tensor, options: Sampling | None = None, generators: Generators = None) -> Tensor:
        """labels (B,) -> images (B, C, H, W) float32, not clamped. options: the config's by default.
        With a list of generators, one per image, image i does not depend on its batch."""
        options = options or self.config.sampling
        images = self.decode(self.sample_latents(labels, options, generators), options)
        return self.denoise(images, labels, options.denoise) if options.denoise else images

    def denoise(self, images: Tensor, labels: Tensor, sigma: float) -> Tensor:
        """x + sigma^2 grad_x log p(x|c), the expected x before noise of std sigma (Tweedie's formula); as TarFlow does.
        Images go in blocks of about 1 GiB of activations."""
        block, clean = max(1, 2**30 // int(self.activations())), []
        for x, c in zip(images.split(block), labels.split(block), strict=True):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                (score,) = torch.autograd.grad(self.log_prob(x, c).total.sum(), x)
            clean.append(x.detach() + sigma**2 * score)
        return torch.cat(clean)

    @torch.no_grad()
    def sample_latents(self, labels: Tensor, options: Sampling | None = None, generators: Generators = None) -> Tensor:
        """labels (B,) -> Z (B, N, d) drawn from the prior, guided where options.guidance > 0."""
        options, null = options or self.config.sampling, self.config.num_classes
        if options.guidance > 0 and null == 0:
            raise ValueError(f"guidance: got {options.guidance} for an unconditional model, expected 0")
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=options.precision == "bfloat16"):
            return self.prior.sample(self.check_labels(labels, len(labels)), null, options, generators)

    @torch.no_grad()
    def decode(self, Z: Tensor, options: Sampling | None = None) -> Tensor:
        """Z (B, N, d) -> images (B, C, H, W), by the inverse that options names."""
        options = options or self.config.sampling
        method = options.inverse if options.inverse != "auto" else "student" if self.student else "exact"
        with torch.autocast(Z.device.type, torch.bfloat16, options.precision == "bfloat16" and method == "student"):
            X = self.flow.inverse(Z, method, self.student, options.tol, options.max_passes)
        return unpatchify(X, self.config.patch_size, self.config.channels)

    @torch.no_grad()
    def exchange(self, images: Tensor, part: str = "redundant", tokens: Tensor | None = None,
                 partners: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) with one part of their latents exchanged: what do Z_I and Z_R carry?
        part, "informative" or "redundant", of token i comes from token tokens[i] (N,) of image partners[b] (B,)."""
        if part not in ("informative", "redundant"):
            raise ValueError(f"part: got {part!r}, expected informative or redundant")
        Z, _ = self.flow(self.patches(images))
        other = Z[slice(None) if partners is None else partners][:, slice(None) if tokens is None else tokens]
        informative = torch.arange(Z.shape[2], device=Z.device) < self.config.informative_dim
        Z = torch.where(informative == (part == "informative"), other, Z)
        return self.decode(Z, Sampling(inverse="exact"))

    def fit(self, images: Tensor) -> None:
        """Fits the linear map on dequantised images (B, C, H, W)."""
        self.flow.fit_linear_map(self.patches(images))

    def patches(self, images: Tensor) -> Tensor:
        """Checked images (B, C, H, W) -> X (B, N, d)."""
        size = (self.config.channels, self.config.image_size, self.config.image_size)
        if images.dim() != 4 or images.shape[1:] != size:
            raise ValueError(f"images: got {tuple(images.shape)}, expected a batch of {size}")
        return patchify(images, self.config.patch_size)

    def check_labels(self, labels: Tensor | None, B: int) -> Tensor:
        """Checked labels on the model's device; None = all null. On a GPU, and compiled, their values go unseen."""
        device, null = self.prior.class_pos.device, self.config.num_classes
        if labels is None:
            return torch.full((B,), null, device=device)
        in_range = labels.is_cuda or torch.compiler.is_compiling() or bool(((labels >= 0) & (labels <= null)).all())
        if labels.shape != (B,) or not in_range:
            raise ValueError(f"labels: got {str(labels.tolist())[:40]}, expected {B} integers from 0 to {null} (null)")
        return labels.to(device)

    def new_student(self) -> Student:
        """Attaches a student that starts as a copy of the flow's blocks (3.5), on their device and of their type."""
        self.student = Student(copy.deepcopy(self.flow.blocks).requires_grad_(True))
        return self.student

    def distiller(self, noise: float = 0.3) -> Distiller:
        """The module that trains this model's student; attaches one where there is none. The model itself is frozen."""
        self.requires_grad_(False)
        (self.student or self.new_student()).requires_grad_(True)
        return Distiller(self, noise)

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False):
        """As torch's; weights that have a student's attach one first."""
        if self.student is None and any(name.startswith("student.") for name in state_dict):
            self.new_student()
        return super().load_state_dict(state_dict, strict, assign)

    def layers(self) -> list[Layer]:
        """The Transformer layers of all parts: unit of compiling, recomputing and sharding."""
        return [m for m in self.modules() if isinstance(m, Layer)]

    def flops(self) -> float:
        """Floating point operations of one image's forward: 2 per weight and token, 4 T W per token in attention."""
        c, N = self.config, self.config.num_tokens
        flow = c.flow_blocks * (c.flow_layers * layer_flops(N, c.flow_width) + 6 * N * c.token_dim * c.flow_width)
        heads = N * c.informative_mixtures * (1 + 2 * c.informative_dim)
        if c.redundant_dim and c.redundant_prior == "mixture":
            heads += c.redundant_mixtures * (1 + 2 * c.redundant_dim)
        return flow + c.ar_layers * layer_flops(N + c.class_tokens, c.ar_width) + 2 * c.ar_width * heads

    def activations(self) -> float:
        """Bytes of one image's activations in training, roughly: a layer keeps 20 bf16 tensors of its width, a token's
        mixture four float32 ones of (K, d), the shared one float64 ones of (N, d), (N, K) and (K, d)."""
        c, N, K, d = self.config, self.config.num_tokens, self.config.redundant_mixtures, self.config.redundant_dim
        hidden = N * c.flow_blocks * c.flow_layers * c.flow_width + (N + c.class_tokens) * c.ar_layers * c.ar_width
        informative, redundant = N * c.informative_mixtures * c.informative_dim, N * d + (N * K + 3 * K * d) * (d > 0)
        return 40 * hidden + 16 * (informative + redundant)

    def stages(self, labels: Tensor, options: Sampling | None = None,
               generators: Generators = None) -> dict[str, Callable]:
        """The parts of sampling as functions without arguments, to be timed; every inverse decodes the same latents.
        prior gives Z (B, N, d); forward gives Z and logdet; the others images (B, C, H, W), the exact ones first."""
        options = options or self.config.sampling
        Z = self.sample_latents(labels, options, generators)
        stages = {"prior": functools.partial(self.sample_latents, labels, options, generators)}
        for method in INVERSES[1:] if self.student else ("exact", "parallel"):
            for k in (None, 1, 2, 4, 8, 16) if method in ("parallel", "refined") else (None,):
                way = dataclasses.replace(options, inverse=method, max_passes=k)
                stages[f"{method}, passes {k}" if k else method] = functools.partial(self.decode, Z, way)
        X = self.patches(stages["exact"]())
        return stages | {"forward": torch.no_grad()(functools.partial(self.flow, X))}

def layer_flops(T: int, W: int) -> int:
    """Of one Transformer layer's forward on a sequence."""
    return T * (24 * W**2 + 4 * T * W)


# ------------------------------------------------------------------------------ what makes it fast
class KVCache:
    """Keys and values of one layer, preallocated: k, v (B, heads, T, head_dim); `length` tokens are filled.
    On a GPU the cache is static: length is a tensor and attention masks the part not filled yet, so that every step
    launches the same kernels on the same memory: a CUDA graph can be replayed. On a CPU slices save arithmetic."""
    def __init__(self, B: int, heads: int, T: int, head_dim: int, like: Tensor, static: bool):
        T = -(-T // 16) * 16 if static else T  # fast attention kernels want aligned masks
        like = like.bfloat16() if torch.is_autocast_enabled(like.device.type) else like  # as autocast's keys are
        new = like.new_zeros if static else like.new_empty  # a mask would not hide a NaN
        self.k, self.v = new(B, heads, T, head_dim), new(B, heads, T, head_dim)
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

def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v: q (B, heads, t, head_dim), k, v (B, heads, T, head_dim), mask bool (t, T)."""
    T = q.shape[2]
    if q.dtype == torch.bfloat16 and not q.is_cuda and mask is None and T <= 256:  # the fused backward is slow there
        if T == 1:  # a step of sampling: with k first the products are twice as fast
            return ((k @ q.mT).float() * q.shape[3]**-0.5).softmax(2).to(v.dtype).mT @ v
        scores = (q @ k.mT).float() * q.shape[3]**-0.5
        if causal:
            scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
        return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)

capture_stream = functools.cache(torch.cuda.Stream)  # one a device for all graphs: each new one takes 32 MiB

def repeat(step: Callable[[], None], times: int, device: torch.device, replay: bool = True) -> None:
    """Calls step() `times` times; on a GPU one call warms up, one is captured as a CUDA graph, and that is replayed.
    step must work in place on tensors that outlive it, without looking at a value from Python."""
    if device.type != "cuda" or times < 4 or not replay:
        with torch.inference_mode():  # 5 to 10% faster than no_grad in steps of small kernels
            for _ in range(times):
                step()
        return
    with torch.cuda.device(device):  # a capture on any other device than the current one records nothing
        stream = capture_stream(device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
        for _ in range(times - 1):
            graph.replay()


# ------------------------------------------------------------------------------ presets
Model = Farmer
_table6 = functools.partial(Sampling, T_pi=1.0, T_sigma=0.9, s_c=5, s_u=5, T_pi_v=0.2, T_sigma_v=0.9, T_s=1.1)
_p16 = dict(
    image_size=256, patch_size=16, num_classes=1000, informative_dim=128, informative_mixtures=64, class_tokens=64)
_p8 = {**_p16, "patch_size": 8, "informative_dim": 32}  # d_I is open: as many informative numbers per image as p16
_1b = dict(flow_blocks=28, flow_layers=4, flow_width=768, ar_layers=12, ar_width=768, redundant_mixtures=200)
_2b = dict(flow_blocks=32, flow_layers=6, flow_width=768, ar_layers=24, ar_width=1024, redundant_mixtures=136)
_ours = dict(linear_map="whiten", look_above=True)  # not in the paper
PRESETS = {
    "tiny": Config(**_ours, informative_dim=24, sampling=Sampling(guidance=2.0)),
    "fashion": Config(
        **_ours, image_size=28, channels=1, flow_layers=2, ar_layers=4, informative_dim=8, informative_mixtures=8,
        sampling=Sampling(guidance=1.0, denoise=0.03)),  # that lowers FD: results/
    "cifar10": Config(
        **_ours, image_size=32, flow_blocks=8, flow_layers=4, flow_width=256, ar_layers=8, ar_width=256, class_tokens=8,
        sampling=Sampling(guidance=1.0)),
    "imagenet64": Config(
        **_ours, image_size=64, num_classes=1000, flow_blocks=12, flow_layers=4, flow_width=512, ar_layers=12,
        ar_width=512, informative_dim=24, informative_mixtures=32, class_tokens=16, sampling=Sampling(guidance=1.0)),
    "farmer-1.1b-p16": Config(**_p16, **_1b, sampling=_table6(guidance=2.5)),
    "farmer-1.1b-p8": Config(**_p8, **_1b, sampling=_table6(guidance=2.0, T_sigma=1.0)),
    "farmer-1.9b-p16": Config(**_p16, **_2b, sampling=_table6(guidance=3.5)),
    "farmer-1.9b-p8": Config(**_p8, **_2b, sampling=_table6(guidance=1.5, T_sigma=1.0, T_pi_v=0.1, T_sigma_v=1.0)),
}
# settings of train.py that differ from its defaults; the paper's 320 epochs of ImageNet, batch size ours
_paper = dict(steps=200_200, batch_size=2048, lr=1e-4, warmup=5000, data="imagenet/train", enlarge=True)
TRAINING = {
    "tiny": dict(steps=2500, batch_size=32, lr=3e-3, noise_end=0.05, flip=False),
    "fashion": dict(
        steps=4000, batch_size=32, lr=1e-2, optimizer="muon", noise_end=0.03, flip=False, data="fashion-mnist"),
    "cifar10": dict(steps=100_000, batch_size=128, warmup=1000, noise="uniform", holdout=500, data="cifar10"),
    "imagenet64": dict(steps=300_000, batch_size=256, lr=3e-4, warmup=2000, noise="uniform", data="imagenet/train",
                       enlarge=True),
    **{name: _paper for name in PRESETS if name.startswith("farmer-")},
}
