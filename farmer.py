"""FARMER: Flow AutoRegressive Transformer over Pixels (arXiv 2510.23588v2, CVPR 2026).

One file that reads like the paper: patches (3.2), Gaussian mixtures (Eq. 11), the Transformer, the
autoregressive flow or AF (Eq. 8-10), the AR prior with its channel split (Eq. 12, 14), guidance by
resampling (3.4), the one-step student (3.5), and the whole model with its loss (Eq. 13, with the
split Eq. 14). What can be configured, and the presets, come last. Section, equation, algorithm and
table numbers are those of arXiv v2. The word "open" marks what the paper does not specify.

    B  batch              d    channels of a token = C p^2   X    tokens of an image (B, N, d)
    C  image channels     d_I  informative channels          Z    F(X) = [Z_I, Z_R]  (B, N, d)
    p  patch size         d_R  redundant channels = d - d_I  h    hidden features    (B, T, W)
    N  tokens             K    components of a mixture       mu   shift of the flow
    M  class tokens       S    candidates of one draw        a    its log scale, z = (x - mu) e^a
    T  sequence length    W    width of a Transformer        w    guidance weight
    n  flow blocks        D    values of an image = N d      c    class, or null for none

Images are (B, C, H, W). Z_t are the tokens after flow block t, and Z_0 is X, whitened if so set.
T_pi, T_sigma and the like are the temperatures of Table 6, pi_t the order of the tokens in block t.

Random numbers come from torch.Generator objects, so that a seed determines every image.
Log-probabilities and log-determinants are in nats.
"""
from __future__ import annotations

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

# Bounds (open). Without the first, on a, training diverges and samples overflow. The second, on the
# log sigma of a mixture, is far beyond what training reaches and keeps exp finite.
FLOW_LOG_SCALE_BOUND = 3.0
MIXTURE_LOG_SCALE_BOUND = 7.0

# One generator for each image, or one for the whole batch, where None is torch's global one.
Generators = list[torch.Generator] | torch.Generator | None


# ----------------------------------------------------------------------------- patches
def patchify(images: Tensor, p: int) -> Tensor:
    """Cuts images (B, C, H, W) into tokens (B, N, d) in raster order.

    d runs over (row, column, channel) in a patch.
    """
    B, C, height, width = images.shape
    X = images.reshape(B, C, height // p, p, width // p, p)
    X = X.permute(0, 2, 4, 3, 5, 1)  # (B, H/p, W/p, p, p, C)
    return X.reshape(B, (height // p) * (width // p), p * p * C)


def unpatchify(X: Tensor, p: int, channels: int) -> Tensor:
    """Puts tokens (B, N, d) together into square images (B, C, H, W): undoes `patchify`."""
    B, N, _ = X.shape
    side = math.isqrt(N)
    images = X.reshape(B, side, side, p, p, channels)
    images = images.permute(0, 5, 1, 3, 2, 4)  # (B, C, H/p, p, W/p, p)
    return images.reshape(B, channels, side * p, side * p)


# ----------------------------------------------------------------------------- random numbers
def random(law: Callable, B: int, shape: tuple, generators: Generators, like: Tensor) -> Tensor:
    """Draws random numbers (B, *shape) with the dtype and on the device of `like`.

    law is torch.randn or torch.rand. With a list of generators, one for each image, the numbers of
    an image do not depend on the rest of its batch.
    """
    if isinstance(generators, list):
        if len(generators) != B:
            raise ValueError(f"generators: got {len(generators)}, expected one for each of {B} "
                             "images")
        rows = [law(shape, generator=g, device=g.device, dtype=like.dtype) for g in generators]
        return torch.stack(rows).to(like.device)
    device = getattr(generators, "device", like.device)
    numbers = law((B, *shape), generator=generators, device=device, dtype=like.dtype)
    return numbers.to(like.device)


class Noise(NamedTuple):
    """The random numbers of draws from mixtures, all made in advance: so a seed fixes the draws."""

    u: Tensor  # (B, ..., S) uniform in [0, 1): picks the component of each candidate
    eps: Tensor  # (B, ..., S, d) standard normal: places each candidate within its component
    pick: Tensor  # (B, ..., draws) uniform in [0, 1): picks candidates, for resampling alone

    def token(self, i: int) -> Noise:
        """The random numbers of token i; the second axis counts tokens."""
        return Noise(*(part[:, i] for part in self))


def new_noise(B: int, candidates: tuple, d: int, picks: tuple, generators: Generators,
              like: Tensor) -> Noise:
    """Makes u (B, *candidates), eps (B, *candidates, d) and pick (B, *picks): both are shapes.

    like gives the dtype and the device.
    """
    u = random(torch.rand, B, candidates, generators, like)
    eps = random(torch.randn, B, (*candidates, d), generators, like)
    pick = random(torch.rand, B, picks, generators, like)
    return Noise(u, eps, pick)


def categorical(logits: Tensor, u: Tensor) -> Tensor:
    """Draws indices from softmax(logits) by the inverse CDF.

    logits (..., K), u (..., S) uniform in [0, 1) -> int64 (..., S).
    """
    cdf = logits.double().softmax(-1).cumsum(-1)  # float32 loses accuracy over many candidates
    index = torch.searchsorted(cdf, u * cdf[..., -1:], right=True)
    return index.clamp(max=logits.shape[-1] - 1)  # NaN logits: the image is left out later


# ----------------------------------------------------------------------------- mixtures
def full_precision(x: Tensor):
    """Context that turns autocast off: scales, determinants and mixtures are never in bf16."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def soft_bound(a: Tensor, bound: float) -> Tensor:
    """Limits a smoothly: bound * tanh(a / bound), close to a near 0, with a gradient everywhere."""
    return bound * torch.tanh(a / bound)


class GMM(NamedTuple):
    """A batch of diagonal Gaussian mixtures (Eq. 11).

    To model tokens with another distribution, a fork overrides log_prob, shared_log_prob, sample.
    """

    logits: Tensor  # (..., K)
    mu: Tensor  # (..., K, d)
    log_sigma: Tensor  # (..., K, d)

    def log_prob(self, z: Tensor) -> Tensor:
        """log sum_k pi_k N(z; mu_k, diag sigma_k^2): z (..., d) -> (...) in nats."""
        standard = (z.unsqueeze(-2) - self.mu) * torch.exp(-self.log_sigma)  # (..., K, d)
        constant = 0.5 * z.shape[-1] * math.log(2 * math.pi)
        log_normal = -(0.5 * standard.square() + self.log_sigma).sum(-1) - constant  # (..., K)
        return torch.logsumexp(log_normal + self.logits.log_softmax(-1), -1)

    def shared_log_prob(self, z: Tensor) -> Tensor:
        """log_prob of S vectors under one mixture: z (B, S, d), mixtures (B, ...) -> (B, S), nats.

        The S vectors are the Z_R of an image, or the candidates for one draw. Expanding the square
        replaces a (B, S, K, d) tensor by matrix products. Where |mu| >> sigma these nearly cancel,
        so they are computed in float64.
        """
        logits, mu, log_sigma = (part.double() for part in self)
        z64 = z.double()
        precision = torch.exp(-2 * log_sigma)  # (B, K, d)
        mu_term = (mu.square() * precision).sum(-1).unsqueeze(1)  # (B, 1, K)
        square = z64.square() @ precision.mT - 2 * z64 @ (mu * precision).mT + mu_term  # (B, S, K)
        constant = 0.5 * z.shape[-1] * math.log(2 * math.pi)
        log_pi = logits.log_softmax(-1) - log_sigma.sum(-1) - constant  # (B, K)
        return torch.logsumexp(-0.5 * square + log_pi.unsqueeze(1), -1).to(z.dtype)

    def sample(self, u: Tensor, eps: Tensor) -> Tensor:
        """Draws S vectors from each mixture -> z (..., S, d).

        u (..., S), uniform, picks the components; eps (..., S, d) is standard normal.
        """
        component = categorical(self.logits, u)  # (..., S)
        component = component.unsqueeze(-1).expand(eps.shape)  # (..., S, d)
        return self.mu.gather(-2, component) + self.log_sigma.gather(-2, component).exp() * eps

    def tempered(self, T_pi: float, T_sigma: float) -> GMM:
        """The mixture with logits times T_pi and stds times T_sigma (Table 6).

        T_sigma = 0 leaves only the means.
        """
        if T_pi == T_sigma == 1:
            return self
        log_T_sigma = math.log(max(T_sigma, 1e-38))
        return self._replace(logits=self.logits * T_pi, log_sigma=self.log_sigma + log_T_sigma)

    def halves(self) -> tuple[GMM, GMM]:
        """Splits a doubled batch (2B, ...) into p(z|c) and p(z), each (B, ...)."""
        B = len(self.logits) // 2
        return self._make(part[:B] for part in self), self._make(part[B:] for part in self)


# ----------------------------------------------------------------------------- Transformer
def lean(module: nn.Module) -> nn.Module | Callable | list:
    """A twin of a module that computes the same with less overhead, for one token at a time.

    In the twin, parts are plain attributes and a ModuleList is a list. Linear and LayerNorm become
    plain functions, unless they have hooks or a `forward` of their own. The weights of a Linear are
    copied column by column, which makes products with few rows faster, and under autocast also in
    its dtype. So make a new twin whenever the weights may have changed.
    """
    if isinstance(module, nn.ModuleList):
        return [lean(part) for part in module]
    changed = "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
    if type(module) is nn.LayerNorm and not changed:
        norm = functools.partial(
            torch.layer_norm, normalized_shape=module.normalized_shape, weight=module.weight,
            bias=module.bias, eps=module.eps)
        norm.weight, norm.bias = module.weight, module.bias
        return norm
    if type(module) is nn.Linear and not changed:
        return lean_linear(module)
    twin = copy.copy(module)
    # Not named_children(), which leaves out the second use of a shared part.
    parts = {name: lean(part) for name, part in module._modules.items() if part is not None}
    vars(twin).update(module._parameters | module._buffers | parts)
    if isinstance(module, nn.Sequential):  # whose forward loops over `_modules`
        twin._modules = parts
    return twin


def lean_linear(module: nn.Linear) -> Callable:
    """What `lean` makes of a Linear: a function with the attributes `weight` and `bias`.

    Under autocast the weights are cast once, here, and not anew for each token. Where
    `full_precision` turns autocast off again, the original weights are used.
    """
    kind = module.weight.device.type
    weight = module.weight.mT.contiguous().mT  # the same matrix (out, in), stored by columns
    if torch.is_autocast_enabled(kind):
        low = weight.to(torch.get_autocast_dtype(kind))

        def linear(h: Tensor) -> Tensor:
            now = low if torch.is_autocast_enabled(kind) else weight
            return F.linear(h, now, module.bias)
    else:
        linear = functools.partial(F.linear, weight=weight, bias=module.bias)
    linear.weight, linear.bias = weight, module.bias  # a forward may read their dtype
    return linear


class KVCache:
    """Keys and values of one layer for up to T tokens; the first `length` of them are filled."""

    def __init__(self, T: int):
        self.T = T
        self.length = 0
        self.k: Tensor | None = None  # (B, heads, T, head_dim), allocated at the first append
        self.v: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends k, v (B, heads, new, head_dim) -> all so far, (B, heads, length, head_dim)."""
        B, heads, new, head_dim = k.shape
        if self.k is None:
            self.k = k.new_empty(B, heads, self.T, head_dim)
            self.v = torch.empty_like(self.k)
        past = self.length
        self.length = past + new
        self.k[:, :, past:self.length] = k
        self.v[:, :, past:self.length] = v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, of queries, keys, values (B, heads, T, head_dim).

    Without `causal`, there may be fewer queries than keys.
    """
    T = q.shape[2]
    on_cpu = q.device.type == "cpu"
    if q.dtype == torch.bfloat16 and on_cpu and q.requires_grad and T < 192:
        # Here the fused kernel's forward and backward pass take up to six times as long.
        scores = (q * q.shape[3] ** -0.5) @ k.mT
        if causal:
            scores = scores + torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
        return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


class Layer(nn.Module):
    """Pre-norm Transformer layer: attention, then a GELU MLP of width 4W."""

    def __init__(self, W: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.norm_attention = nn.LayerNorm(W)
        self.norm_mlp = nn.LayerNorm(W)
        self.qkv = nn.Linear(W, 3 * W, bias=False)
        self.out = nn.Linear(W, W, bias=False)
        self.up = nn.Linear(W, 4 * W)
        self.down = nn.Linear(4 * W, W)

    def forward(self, h: Tensor, cache: KVCache | None = None, causal: bool = True) -> Tensor:
        """h (B, T, W) -> (B, T, W).

        With a cache, the first call passes the whole prefix and each later call one token.
        """
        B, T, W = h.shape
        qkv = self.qkv(self.norm_attention(h)).view(B, T, 3, W // self.head_dim, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, head_dim)
        if cache is not None:
            k, v = cache.append(k, v)
        if T == 1:  # one new token sees the whole cache; `causal and T > 1` would break compiling
            causal = False
        read = attention(q, k, v, causal)
        h = h + self.out(read.transpose(1, 2).reshape(B, T, W))
        return h + self.mlp(self.norm_mlp(h))

    def mlp(self, h: Tensor) -> Tensor:
        """h (B, T, W) -> (B, T, W), for each token by itself."""
        return self.down(F.gelu(self.up(h)))


class Transformer(nn.Module):
    """A stack of layers and a final norm."""

    def __init__(self, W: int, layers: int, head_dim: int):
        super().__init__()
        self.layers = nn.ModuleList(Layer(W, head_dim) for _ in range(layers))
        self.norm = nn.LayerNorm(W)
        for name, weight in self.named_parameters():
            if weight.dim() != 2:
                continue
            std = 0.5 * W**-0.5
            if name.endswith(("out.weight", "down.weight")):  # these write to the residual stream
                std = std / math.sqrt(2 * layers)
            nn.init.normal_(weight, std=std)

    def new_cache(self, T: int) -> list[KVCache]:
        """Empty caches for sequences of up to T tokens, one per layer."""
        return [KVCache(T) for _ in self.layers]

    def forward(self, h: Tensor, cache: list[KVCache] | None = None, causal: bool = True) -> Tensor:
        """h (B, T, W) -> (B, T, W)."""
        for i, layer in enumerate(self.layers):
            h = layer(h, None if cache is None else cache[i], causal)
        return self.norm(h)


def find_layers(module: nn.Module) -> list[nn.Module]:
    """The repeated layers in a module: what any of its parts holds in a ModuleList `layers`."""
    stacks = [getattr(part, "layers", None) for part in module.modules()]
    return [layer for stack in stacks if isinstance(stack, nn.ModuleList) for layer in stack]


class Positions(nn.Module):
    """Learned embedding of a token's row plus that of its column -> (N, W), in raster order."""

    def __init__(self, num_tokens: int, W: int):
        super().__init__()
        side = math.isqrt(num_tokens)
        self.row = nn.Parameter(0.5 * torch.randn(side, W))
        self.column = nn.Parameter(0.5 * torch.randn(side, W))

    def forward(self) -> Tensor:
        return (self.row[:, None] + self.column[None]).flatten(0, 1)


# ----------------------------------------------------------------------------- autoregressive flow
def affine(x: Tensor, mu: Tensor, a: Tensor) -> Tensor:
    """z = (x - mu) exp(a) (Eq. 8), whose log|det dz/dx| = sum a (Eq. 10)."""
    return (x - mu) * torch.exp(a)


def affine_inverse(z: Tensor, mu: Tensor, a: Tensor) -> Tensor:
    """x = z exp(-a) + mu (Eq. 9)."""
    return z * torch.exp(-a) + mu


class FlowBlock(nn.Module):
    """f_t of Eq. 8: shifts and scales token i by what a causal Transformer reads in earlier ones.

    The first token is left unchanged. Labels (B,) are unused, since the paper's flow ignores the
    class; they are passed on everywhere so that a fork can use them, in `context`.
    """

    def __init__(self, config: Config, flip: bool):
        super().__init__()
        W = config.flow_width
        self.flip = flip  # whether this block reads the tokens in reverse
        self.embed = nn.Linear(config.token_dim, W)
        self.pos = Positions(config.num_tokens, W)
        self.transformer = Transformer(W, config.flow_layers, config.head_dim)
        self.to_mu_a = nn.Linear(W, 2 * config.token_dim)
        nn.init.zeros_(self.to_mu_a.weight)  # the flow starts as the identity
        nn.init.zeros_(self.to_mu_a.bias)

    def order(self, x: Tensor) -> Tensor:
        """pi_t: puts tokens (B, N, ...) from raster order into the order that this block reads."""
        return x.flip(1) if self.flip else x

    def unorder(self, x: Tensor) -> Tensor:
        """Undoes `order`. A fork whose order is not its own inverse overrides both."""
        return self.order(x)

    def context(self, labels: Tensor | None) -> Tensor:
        """What is added to the embeddings: here the positions, (1, N, W) in this block's order."""
        return self.order(self.pos().unsqueeze(0))

    def hidden(self, x: Tensor, context: Tensor, cache: list[KVCache] | None = None,
               causal: bool = True) -> Tensor:
        """The Transformer's output for tokens x (B, T, d), context (..., T, W) -> h (B, T, W)."""
        return self.transformer(self.embed(x) + context, cache, causal)

    def mu_a(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h (B, T, W) of tokens -> mu and a of the tokens that follow them, each (B, T, d)."""
        with full_precision(h):
            mu, a = self.to_mu_a(h.to(self.to_mu_a.weight.dtype)).chunk(2, dim=-1)
            return mu, soft_bound(a, FLOW_LOG_SCALE_BOUND)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, N, d) -> z (B, N, d) and each token's part of logdet (B, N), nats (Eq. 8, 10)."""
        x = self.order(x)
        h = self.hidden(x[:, :-1], self.context(labels)[:, :-1])
        mu, a = self.mu_a(h)
        z = torch.cat([x[:, :1], affine(x[:, 1:], mu, a)], 1)
        logdet = F.pad(a.sum(2), (1, 0))  # 0 for the first token
        return self.unorder(z), self.unorder(logdet)

    def inverse(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """z (B, N, d) -> x (B, N, d) (Eq. 9), one token after another with a KV cache."""
        first, *others = self.order(z).split(1, 1)
        context = self.context(labels).split(1, 1)
        cache = self.transformer.new_cache(len(context))
        block = lean(self)
        x = [first]  # unchanged
        for z_i, context_i in zip(others, context, strict=False):
            mu, a = block.mu_a(block.hidden(x[-1], context_i, cache))
            x.append(affine_inverse(z_i, mu, a))
        return self.unorder(torch.cat(x, 1))

    def one_step(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """The student's inverse (Algorithm 2): z (B, N, d) -> x (B, N, d), all tokens at once.

        This is Eq. 9 with mu and a computed from z instead of x, by attention in both directions.
        The paper's student applies Eq. 8 with the copied weights; Eq. 9 starts closer to the
        inverse.
        """
        z = self.order(z)
        h = self.hidden(z, self.context(labels), causal=False)
        mu, a = self.mu_a(h[:, :-1])
        x = torch.cat([z[:, :1], affine_inverse(z[:, 1:], mu, a)], 1)
        return self.unorder(x)


class Flow(nn.Module):
    """F = f_n o ... o f_1 (Eq. 8-10), between a fixed map of the channels and the final flip.

    The blocks alternate between raster and reverse order, as in TarFlow. Which order the last one
    has is open: here it is raster order, so that with the final flip the AR reads against it. The
    map is not in the paper, and off in its presets.
    """

    def __init__(self, config: Config):
        super().__init__()
        n = config.flow_blocks
        d = config.token_dim
        self.final_flip = config.final_flip
        self.whiten = config.whiten
        self.blocks = nn.ModuleList(
            FlowBlock(config, flip=(n - 1 - t) % 2 == 1) for t in range(n))
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("map", torch.eye(d))  # with `whiten`, Z_0 = (X - mean) map
        self.register_buffer("inverse_map", torch.eye(d))
        self.register_buffer("map_logdet", torch.zeros(()))  # log|det map| of one token, nats

    @torch.no_grad()
    def fit(self, X: Tensor) -> None:
        """With `whiten`, sets the fixed map of the channels from patches X (B, N, d).

        It is their PCA, largest variance first, scaled to unit variance: Z^I starts as the leading
        components. Training leaves it as it is, so the model remains an exact flow; the
        log-determinant includes that of the map.
        """
        if not self.whiten:
            return
        X = X.flatten(0, 1).double()
        covariance = torch.atleast_2d(torch.cov(X.T))  # of one channel, torch's is a number
        variance, axes = torch.linalg.eigh(covariance)
        variance = variance.flip(0).clamp(min=1e-8)
        axes = axes.flip(1)
        scale = variance.rsqrt()
        self.mean.copy_(X.mean(0))
        self.map.copy_(axes * scale)
        self.inverse_map.copy_((axes / scale).T)
        self.map_logdet.copy_(scale.log().sum())

    def whitened(self, X: Tensor) -> Tensor:
        """Applies the fixed map: X (B, N, d) -> Z_0 (B, N, d)."""
        if not self.whiten:
            return X
        with full_precision(X):
            return (X - self.mean) @ self.map

    def unwhitened(self, z: Tensor) -> Tensor:
        """Undoes it: Z_0 (B, N, d) -> X (B, N, d)."""
        if not self.whiten:
            return z
        with full_precision(z):
            return z @ self.inverse_map + self.mean

    def flipped(self, z: Tensor) -> Tensor:
        """Raster order to the order that the AR reads, and back: (B, N, ...) -> the same shape."""
        return z.flip(1) if self.final_flip else z

    def states(self, X: Tensor, labels: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """X (B, N, d) -> Z_0 ... Z_n of Algorithm 2, each (B, N, d), and logdet (B, N) in nats.

        All are in raster order; logdet is each token's part.
        """
        z = self.whitened(X)
        states = [z]
        logdet = X.new_zeros(X.shape[:2]) + self.map_logdet
        for block in self.blocks:
            z, logdet_t = block(z, labels)
            states.append(z)
            logdet = logdet + logdet_t
        return states, logdet

    def forward(self, X: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """X (B, N, d) -> Z (B, N, d) in the order that the AR reads, logdet (B,) in nats."""
        states, logdet = self.states(X, labels)
        return self.flipped(states[-1]), logdet.sum(1)

    @torch.no_grad()
    def inverse(self, Z: Tensor, method: str = "exact", student: nn.ModuleList | None = None,
                labels: Tensor | None = None) -> Tensor:
        """Z (B, N, d) -> X (B, N, d) (Eq. 9).

        method "exact" goes token by token; "student" approximates it in one pass per block.
        """
        if method not in ("exact", "student"):
            raise ValueError(f"inverse: got {method!r}, expected exact or student")
        if method == "student" and student is None:
            raise ValueError("inverse: this model has no student; distil one with "
                             "python train.py --distill DIR, or use --inverse exact")
        with torch.inference_mode():  # 5 to 10% faster than no_grad for small kernels
            z = self.flipped(Z)
            for block in reversed(self.blocks if method == "exact" else student):
                z = block.inverse(z, labels) if method == "exact" else block.one_step(z, labels)
        return self.unwhitened(z.clone())  # unlike z, a copy may take part in autograd


# ----------------------------------------------------------------------------- AR prior
class MixtureHead(nn.Module):
    """Predicts a mixture of K components over R^d from h (..., W) (Eq. 11).

    `mixture` is the class of the mixtures; a fork may assign another one.
    """

    def __init__(self, W: int, K: int, d: int):
        super().__init__()
        self.K = K
        self.d = d
        self.mixture = GMM
        self.linear = nn.Linear(W, K * (1 + 2 * d))
        nn.init.normal_(self.linear.weight, std=0.1 * W**-0.5)
        nn.init.zeros_(self.linear.bias)
        if K > 1:  # of the means: components that start out equal would separate slowly
            nn.init.normal_(self.linear.bias[K:K + K * d], std=0.5)

    def log_sigma(self, raw: Tensor) -> Tensor:
        """The log sigmas that the raw outputs stand for; of the same shape."""
        return soft_bound(raw, MIXTURE_LOG_SCALE_BOUND)

    def forward(self, h: Tensor) -> GMM:
        K = self.K
        d = self.d
        with full_precision(h):
            output = self.linear(h.to(self.linear.weight.dtype))
            logits, mu, raw = output.split([K, K * d, K * d], -1)
            return self.mixture(
                logits, mu.unflatten(-1, (K, d)), self.log_sigma(raw).unflatten(-1, (K, d)))


class Prior(nn.Module):
    """P(Z|c) = prod_i P(Z^I_i | Z^I_<i, c) prod_i P(Z^R_i | Z^I, c) (Eq. 14).

    Z^I is the first d_I channels of every token and Z^R the others; it is the loss that teaches
    the flow to put the information into Z^I (3.3). A Transformer reads [c x M, Z^I_1 ... Z^I_N].
    Its output at the last class token gives the mixture of Z^I_1, its output at Z^I_i that of
    Z^I_{i+1}, and its output at Z^I_N the one mixture that the Z^R of all tokens share. Without a
    split, Z^I is all of Z (Eq. 11, 12).
    """

    def __init__(self, config: Config):
        super().__init__()
        W = config.ar_width
        self.null = config.num_classes
        self.N = config.num_tokens
        self.M = config.class_tokens
        self.d_I = config.informative_dim
        self.d_R = config.redundant_dim
        self.class_embed = nn.Embedding(self.null + 1, W)  # the last row is the null class
        nn.init.normal_(self.class_embed.weight, std=0.5)
        self.class_pos = nn.Parameter(0.1 * torch.randn(self.M, W))
        self.embed = nn.Linear(self.d_I, W)
        self.pos = Positions(self.N, W)  # learned: the AR's reading order makes no difference
        self.transformer = Transformer(W, config.ar_layers, config.head_dim)
        self.informative = MixtureHead(W, config.informative_mixtures, self.d_I)
        self.redundant: MixtureHead | None = None  # None: N(0, I), over no channels without a split
        if self.d_R and config.redundant_mixtures:
            self.redundant = MixtureHead(W, config.redundant_mixtures, self.d_R)

    def class_tokens(self, labels: Tensor) -> Tensor:
        """The class embedding M times, each with its position (open): labels (B,) -> (B, M, W)."""
        return self.class_embed(labels).unsqueeze(1) + self.class_pos

    def null_labels(self, labels: Tensor) -> Tensor:
        """The null class for each of the labels (B,): what guidance leads away from."""
        if self.null == 0:  # no classes
            raise ValueError("guidance: got more than 0, expected 0 for a model without classes")
        return torch.full_like(labels, self.null)

    def shared(self, h: Tensor) -> GMM:
        """h (B, W) at the last informative token -> the mixture of all Z^R, (B, K_R, ...)."""
        if self.redundant is None:  # N(0, I), as in JetFormer (4.3)
            zeros = h.new_zeros(len(h), 1, self.d_R)
            return GMM(h.new_zeros(len(h), 1), zeros, zeros)
        return self.redundant(h)

    def forward(self, Z_I: Tensor, labels: Tensor) -> tuple[GMM, GMM]:
        """Predicts the mixtures from Z_I (B, N, d_I) and labels (B,).

        Returns those of Z_I, (B, N, K_I, ...), and the one of Z_R, (B, K_R, ...). Without a split,
        Z_R has no channels, and the density 1.
        """
        h = torch.cat([self.class_tokens(labels), self.embed(Z_I) + self.pos()], 1)
        h = self.transformer(h)[:, self.M - 1:]  # (B, N + 1, W)
        return self.informative(h[:, :-1]), self.shared(h[:, -1])

    def draw(self, p: GMM, options: Sampling, noise: Noise, scale: float = 1.0) -> Tensor:
        """Draws from one mixture per image, (B, K, ...), or with guidance from pairs (2B, K, ...).

        With resampling, noise.pick (B, draws) picks among the candidates -> (B, draws, d). Else
        every candidate is a draw -> (B, S, d). scale is an extra factor on the stds (Fig. 7). A
        fork overrides this for its own kind of guidance.
        """
        if options.guidance == 0:
            return p.tempered(options.T_pi, options.T_sigma * scale).sample(noise.u, noise.eps)
        if options.guidance_method == "naive":
            return naive_cfg(p, options, noise, scale)
        return resample_cfg(p, options, noise, scale)

    @torch.no_grad()
    def sample(self, labels: Tensor, options: Sampling, generators: Generators = None) -> Tensor:
        """labels (B,) -> Z (B, N, d) drawn from the prior, guided where options.guidance > 0.

        All N vectors of Z_R are draws from the one shared mixture. With resampling, they are picked
        with replacement from one pool of N S candidates. Where class and null differ in many
        channels, the weights are very uneven, and many tokens share a vector. The size of the pool,
        and whether Table 6 applies to Z^R, are open.
        """
        B = len(labels)
        candidates = (self.N, options.candidates)
        noise = new_noise(B, candidates, self.d_I, (self.N, 1), generators, self.class_pos)
        Z_I, h = self.sample_informative(labels, options, noise)
        if not self.d_R:
            return Z_I
        if self.redundant is None:  # N(0, I): no guidance or temperature, only redundant_scale
            h = h[:B]
            options = dataclasses.replace(options, guidance=0.0, T_sigma=1.0)
        pool = self.N * options.candidates
        noise = new_noise(B, (pool,), self.d_R, (self.N,), generators, self.class_pos)
        Z_R = self.draw(self.shared(h), options, noise, options.redundant_scale)
        return torch.cat([Z_I, Z_R], -1)

    def sample_informative(self, labels: Tensor, options: Sampling,
                           noise: Noise) -> tuple[Tensor, Tensor]:
        """labels (B,) -> Z_I (B, N, d_I) and h (B, W), one token after another.

        h is the Transformer's output at the last token, for Z_R; without a split nothing reads it.
        With guidance, the passes for the class and for the null class run as one doubled batch, and
        h is (2B, W).
        """
        guided = options.guidance > 0
        if guided:
            labels = torch.cat([labels, self.null_labels(labels)])
        pos = self.pos()
        with torch.inference_mode():
            prior = lean(self)  # for its parts; all else is the same in both
            cache = self.transformer.new_cache(self.M + self.N)
            h = prior.transformer(self.class_tokens(labels), cache)[:, -1]  # (B or 2B, W)
            Z_I = []
            for i in range(self.N):
                Z_I.append(self.draw(prior.informative(h), options, noise.token(i)))  # (B, 1, d_I)
                if i + 1 == self.N and not self.d_R:
                    break  # nothing follows that would read the last token
                token = prior.embed(Z_I[-1]) + pos[i]  # (B, 1, W)
                if guided:
                    token = torch.cat([token, token])
                h = prior.transformer(token, cache)[:, -1]
            Z_I = torch.cat(Z_I, 1)
        return Z_I.clone(), h.clone()


# ----------------------------------------------------------------------------- guidance
def resample_cfg(p: GMM, options: Sampling, noise: Noise, scale: float = 1.0) -> Tensor:
    """Guidance by resampling: draws roughly from p_c(z)^{1+w} p_u(z)^{-w} (Eq. 15, Algorithm 1).

    p is a doubled batch [p_c, p_u], (2B, K, ...). Of the S candidates, S_c are drawn from p_c and
    get the weight (p_c/p_u)^w; the others are drawn from p_u and get (p_c/p_u)^{w+1}. Among these,
    noise.pick (B, draws) picks with replacement -> (B, draws, d). scale is an extra factor on the
    stds when drawing candidates (Fig. 7).

    With all temperatures 1, the distribution of a draw tends to the target as S grows; with 5 + 5
    candidates its Kolmogorov-Smirnov distance to it is still .04 to .12, measured in one dimension.
    With the temperatures of Table 6 even the limit is not exactly the target. The weights are those
    of Algorithm 1; Appendix A.2 gives all candidates the first one.
    """
    w = options.guidance
    S = noise.u.shape[1]
    S_c = S * options.s_c // (options.s_c + options.s_u)
    p_c, p_u = p.tempered(options.T_pi, options.T_sigma * scale).halves()
    z_c = p_c.sample(noise.u[:, :S_c], noise.eps[:, :S_c])
    z_u = p_u.sample(noise.u[:, S_c:], noise.eps[:, S_c:])
    z = torch.cat([z_c, z_u], 1)  # (B, S, d)
    p_v = p.tempered(options.T_pi_v, options.T_sigma_v)
    log_p_c, log_p_u = p_v.shared_log_prob(z.repeat(2, 1, 1)).chunk(2)  # each (B, S)
    delta = log_p_c - log_p_u
    log_weight = torch.cat([w * delta[:, :S_c], (w + 1) * delta[:, S_c:]], 1)
    chosen = categorical(options.T_s * log_weight, noise.pick)  # (B, draws)
    return z.gather(1, chosen.unsqueeze(-1).expand(-1, -1, z.shape[2]))


def naive_cfg(p: GMM, options: Sampling, noise: Noise, scale: float = 1.0) -> Tensor:
    """Naive CFG, the ablation of Table 3: p (2B, K, ...) -> one draw per candidate, (B, S, d).

    As in GIVT and JetFormer, a component is drawn with the weights of p_c; then N_c^{1+w} N_u^{-w}
    of this component in p_c and in p_u takes its place. They draw from that by rejection; here it
    is computed, channel by channel, as the Gaussian that it is. In channels where sigma_u^2 is
    below sigma_c^2 w / (1 + w) it cannot be normalised, and N_c is used unguided.
    """
    if type(p) is not GMM:
        raise ValueError("guidance_method: got naive, but this model's mixtures are not Gaussian; "
                         "expected resample")
    w = options.guidance
    p_c, p_u = p.tempered(options.T_pi, options.T_sigma * scale).halves()
    ratio = torch.exp(2 * (p_c.log_sigma - p_u.log_sigma))  # sigma_c^2 / sigma_u^2
    precision = 1 + w - w * ratio  # of the product, times sigma_c^2
    proper = precision > 0
    precision = precision.where(proper, torch.ones_like(precision))
    mu = ((1 + w) * p_c.mu - w * ratio * p_u.mu) / precision
    mu = mu.where(proper, p_c.mu)
    return GMM(p_c.logits, mu, p_c.log_sigma - 0.5 * precision.log()).sample(noise.u, noise.eps)


# ----------------------------------------------------------------------------- one-step student
class Distiller(nn.Module):
    """The student's loss (Algorithm 2), as a module that is called like the model.

    student: copies of the flow's blocks, which invert it by `one_step`; the only parameters here.
    teacher: images (B, C, H, W), labels -> Z_0 ... Z_n, each (B, N, d), and the labels (B,).
    noise: the largest std of the noise on the student's input.
    """

    def __init__(self, student: nn.ModuleList, teacher: Callable, noise: float):
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.noise = noise

    def forward(self, x: Tensor, labels: Tensor | None = None,
                generators: Generators = None) -> dict[str, Tensor]:
        """Real images x (B, C, H, W) -> {"loss": (B,)}, the mean of MSE(Z~_{t-1}, Z_{t-1}) over t.

        Z~_{t-1} is the output of student block t. The first one, t = n, receives Z_n + s eps with
        s ~ U[0, noise], and each later one the output of the one before. Algorithm 2 draws one s
        per iteration; whether for all images is open, here each has its own.
        """
        states, labels = self.teacher(x, labels)  # Z_0 ... Z_n
        last = states[-1]
        s = self.noise * random(torch.rand, len(x), (1, 1), generators, x)
        z = last + s * random(torch.randn, len(x), tuple(last.shape[1:]), generators, x)
        losses = []
        for block, target in zip(reversed(self.student), reversed(states[:-1]), strict=True):
            z = block.one_step(z, labels)
            losses.append((z - target).square().mean((1, 2)))
        return {"loss": torch.stack(losses).mean(0)}

    def layers(self) -> list[nn.Module]:
        """The layers of the student's Transformers."""
        return find_layers(self.student)


# ----------------------------------------------------------------------------- the model
class LogProb(NamedTuple):
    """log p(x|c), total = informative + redundant + logdet, in nats: (B,), or (B, N) by token."""

    total: Tensor
    informative: Tensor
    redundant: Tensor
    logdet: Tensor


class Farmer(nn.Module):
    """The model: `flow` maps patches to latents, `prior` models them.

    Labels are (B,) int64 with num_classes as the null label. A fork builds it by
    super().__init__(config) and then assigns other parts: `flow.blocks[t]`, the `transformer` of a
    block or of the prior, `prior.informative.mixture`, or `flow` and `prior` themselves.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.flow = Flow(config)
        self.prior = Prior(config)
        self.student: nn.ModuleList | None = None  # one-step copies of the flow's blocks (3.5)

    def forward(self, x: Tensor, labels: Tensor,
                generators: Generators = None) -> dict[str, Tensor]:
        """The loss (Eq. 13, 14) and its parts, each (B,) in nats per dimension.

        informative and redundant are negative log-likelihoods, so
        loss = informative + redundant - logdet. Nothing here is random: `generators` is there
        for modules that need it, such as the Distiller.
        """
        D = x[0].numel()
        log_p = self.log_prob(x, labels)
        loss = -log_p.total / D
        return dict(
            loss=loss,
            nats_per_dim=loss,  # under the name that the log shows
            informative=-log_p.informative / D,
            redundant=-log_p.redundant / D,
            logdet=log_p.logdet / D,
        )

    def log_prob(self, images: Tensor, labels: Tensor | None = None) -> LogProb:
        """log p(images|labels) of dequantised images (B, C, H, W), pixels in about [-1, 1].

        labels (B,), or None for the null class; the parts are (B,). Raises ValueError for images of
        another size and for wrong labels, see `check_labels`.
        """
        return LogProb(*(part.sum(1) for part in self.token_log_prob(images, labels)))

    def token_log_prob(self, images: Tensor, labels: Tensor | None = None) -> LogProb:
        """The terms of `log_prob` by token: each part is (B, N) in raster order, in nats.

        Only their sum over the tokens is a log-probability: the flow mixes tokens, so that one term
        is not that of one patch.
        """
        labels = self.check_labels(labels, len(images))
        states, logdet = self.flow.states(self.patches(images), labels)
        Z = self.flow.flipped(states[-1])
        Z_I, Z_R = Z.split([self.config.informative_dim, self.config.redundant_dim], -1)
        p_I, p_R = self.prior(Z_I, labels)
        informative = self.flow.flipped(p_I.log_prob(Z_I))
        redundant = self.flow.flipped(p_R.shared_log_prob(Z_R))
        return LogProb(informative + redundant + logdet, informative, redundant, logdet)

    @torch.no_grad()
    def sample(self, labels: Tensor, options: Sampling | None = None,
               generators: Generators = None) -> Tensor:
        """Draws images: labels (B,) -> (B, C, H, W) float32, not clamped.

        options None: those of the config. With a list of generators, one for each image, an image
        depends on the rest of its batch by rounding at most.
        """
        options = options or self.config.sampling
        Z = self.sample_latents(labels, options, generators)
        images = self.decode(Z, options, labels)
        if options.denoise > 0:
            images = self.denoise(images, labels, options.denoise)
        return images

    @torch.no_grad()
    def sample_latents(self, labels: Tensor, options: Sampling,
                       generators: Generators = None) -> Tensor:
        """labels (B,) -> Z (B, N, d) drawn from the prior, guided where options.guidance > 0."""
        labels = self.check_labels(labels, len(labels))
        bf16 = options.precision == "bfloat16"
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=bf16):
            return self.prior.sample(labels, options, generators)

    @torch.no_grad()
    def decode(self, Z: Tensor, options: Sampling, labels: Tensor | None = None) -> Tensor:
        """Z (B, N, d) -> images (B, C, H, W), by the inverse that options.inverse names."""
        method = options.inverse
        if method == "auto":
            method = "student" if self.student is not None else "exact"
        labels = self.check_labels(labels, len(Z))
        bf16 = options.precision == "bfloat16" and method == "student"
        with torch.autocast(Z.device.type, torch.bfloat16, enabled=bf16):
            X = self.flow.inverse(Z, method, self.student, labels)
        return self.images(X)

    def denoise(self, images: Tensor, labels: Tensor, sigma: float) -> Tensor:
        """Removes noise of std sigma: the expected clean image is x + sigma^2 grad_x log p(x|c).

        images (B, C, H, W) -> the same shape. This is Tweedie's formula with the model's own exact
        density, as in TarFlow; sigma has to be the std of the Gaussian noise that training ended
        with. It is not in the paper.
        """
        parts = []
        for part, y in zip(images.split(16), labels.split(16), strict=True):  # limits the memory
            with torch.enable_grad():
                x = part.detach().requires_grad_()
                (score,) = torch.autograd.grad(self.log_prob(x, y).total.sum(), x)
            parts.append(part + sigma**2 * score)
        return torch.cat(parts)

    def fit(self, images: Tensor) -> None:
        """Fits the flow's fixed map of the channels to dequantised images (B, C, H, W)."""
        self.flow.fit(self.patches(images))

    def patches(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) of the model's size -> their tokens X (B, N, d)."""
        config = self.config
        size = (config.channels, config.image_size, config.image_size)
        if images.dim() != 4 or images.shape[1:] != size:
            raise ValueError(f"images: got {tuple(images.shape)}, expected a batch of {size}")
        return patchify(images, config.patch_size)

    def images(self, X: Tensor) -> Tensor:
        """Tokens X (B, N, d) -> images (B, C, H, W): undoes `patches`."""
        return unpatchify(X, self.config.patch_size, self.config.channels)

    def check_labels(self, labels: Tensor | None, B: int) -> Tensor:
        """Checks labels (B,) and puts them on the model's device as int64.

        Without labels, or in a model without classes, all are null and nothing is checked. Else
        raises ValueError for a wrong shape, for labels that are not integers and, unless they are
        on a GPU, for values outside 0 to num_classes.
        """
        device = next(self.parameters()).device
        null = self.config.num_classes
        if labels is None or null == 0:
            return torch.full((B,), null, device=device)
        integers = not labels.is_floating_point() and labels.dtype is not torch.bool
        wrong = labels.shape != (B,) or not integers
        if not wrong and not labels.is_cuda:  # reading the values would make a GPU wait
            wrong = bool(((labels < 0) | (labels > null)).any())
        if wrong:
            raise ValueError(f"labels: got {str(labels.tolist())[:40]}, expected {B} integers "
                             f"from 0 to {null} (null)")
        return labels.to(device, torch.int64)

    def new_student(self) -> nn.ModuleList:
        """Attaches a student that starts as a copy of the flow's blocks (3.5)."""
        self.student = copy.deepcopy(self.flow.blocks).requires_grad_(True)
        return self.student

    @torch.no_grad()
    def teach(self, images: Tensor,
              labels: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """What a student learns from: images (B, C, H, W) -> Z_0 ... Z_n and the checked labels."""
        labels = self.check_labels(labels, len(images))
        states, _ = self.flow.states(self.patches(images), labels)
        return states, labels

    def distiller(self, noise: float = 0.3) -> Distiller:
        """The module that trains this model's student; attaches a student if there is none.

        Freezes the model itself. noise is the largest std of the noise on the student's input, 0.3
        in Algorithm 2.
        """
        if not self.flow.blocks:
            raise ValueError("flow_blocks: got 0, expected at least 1, as a student inverts them")
        if self.student is None:
            self.new_student()
        self.requires_grad_(False)
        self.student.requires_grad_(True)
        return Distiller(self.student, self.teach, noise)

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False):
        """torch's load_state_dict; first attaches a student if the weights include one."""
        if self.student is None and any(name.startswith("student.") for name in state_dict):
            self.new_student()
        return super().load_state_dict(state_dict, strict, assign)

    def layers(self) -> list[nn.Module]:
        """The layers of all Transformers, which training compiles, recomputes or gives to Muon."""
        return find_layers(self)

    def replayable(self) -> list[tuple[nn.Module, str]]:
        """The token loops that a GPU may record and replay, as (part, name of its method).

        Listed are those that a fork has not overridden. What runs inside must not wait for the GPU
        (no .item(), no branch on a tensor's values) nor read anything that changes but arguments
        and weights. Of the parts that a fork assigns this is not checked: it overrides this method
        to leave such a loop out, or to add one of its own.
        """
        loops = [(block, "inverse") for block in self.flow.blocks
                 if type(block).inverse is FlowBlock.inverse]
        kind = type(self.prior)
        if kind.draw is Prior.draw and kind.sample_informative is Prior.sample_informative:
            loops.append((self.prior, "sample_informative"))
        return loops


Model = Farmer  # what the scripts look for in a model's file


# ----------------------------------------------------------------------------- configuration
def setting(default, help: str, least: float = -math.inf, below: float = math.inf,
            choices: tuple = ()):
    """A field of a configuration: its default, its help text and the values that it accepts.

    These are values of the default's type; numbers are finite, at least `least` and below `below`.
    """
    limits = dict(help=help, least=least, below=below, choices=choices)
    return field(default=default, metadata=limits)


def check_settings(config) -> None:
    """Checks the fields that `setting` made, and stores their values as plain data.

    Raises a ValueError that names the first wrong one. Numbers of NumPy become Python's, and an
    integer where a float belongs becomes a float, so that a checkpoint can hold them.
    """
    kinds = {bool: "True or False", str: "text", int: "an integer", float: "a finite number"}
    for f in dataclasses.fields(config):
        if "choices" not in f.metadata:  # not made by `setting`
            continue
        kind = type(f.default)
        value = getattr(config, f.name)
        if getattr(value, "ndim", None) == 0:
            value = value.item()
        if kind is float and type(value) is int:
            value = float(value)
        object.__setattr__(config, f.name, value)  # the dataclass is frozen
        least, below, choices = (f.metadata[name] for name in ("least", "below", "choices"))
        fits = type(value) is kind
        expected = kinds[kind]
        if choices:
            fits = fits and value in choices
            expected = " or ".join(str(choice) for choice in choices)
        elif kind in (int, float):
            fits = fits and math.isfinite(value) and least <= value < below
        if least > -math.inf:
            expected += f" of at least {least}"
        if below < math.inf:
            expected += f" and below {below}"
        if not fits:
            raise ValueError(f"{f.name}: got {value!r}, expected {expected}")


def check_multiple(config, name: str, of: str) -> None:
    """Raises a ValueError unless the field `name` is a multiple of the field `of`."""
    value = getattr(config, name)
    unit = getattr(config, of)
    if value % unit:
        raise ValueError(f"{name}: got {value}, expected a multiple of {of} {unit}")


@dataclass(frozen=True)
class Sampling:
    """How to sample: guidance (the columns of Table 6), the redundant part and the inverse.

    The temperatures of Table 6 are factors: above 1, T_pi and T_s sharpen and T_sigma widens.
    """

    guidance: float = setting(
        0.0, "CFG weight w of Eq. 15: higher gives clearer, less varied images; 0 = off", 0)
    guidance_method: str = setting(
        "resample", "Algorithm 1, or naive CFG as in JetFormer", choices=("resample", "naive"))
    s_c: int = setting(5, "candidates drawn from p(z|c)", 1)
    s_u: int = setting(5, "candidates drawn from p(z) (the null class)", 0)
    T_pi: float = setting(1.0, "multiplies the mixture logits when drawing candidates", 0)
    T_sigma: float = setting(1.0, "multiplies the component stds when drawing candidates", 0)
    T_pi_v: float = setting(1.0, "multiplies the mixture logits when weighting candidates", 0)
    T_sigma_v: float = setting(
        1.0, "multiplies the component stds when weighting candidates", 1e-6)
    T_s: float = setting(1.0, "multiplies the log-weights before the softmax", 0)
    redundant_scale: float = setting(
        1.0, "an extra factor on the stds of the redundant mixture (Fig. 7)", 0)
    inverse: str = setting(
        "auto", "how to invert the flow; auto = the student if there is one, else exact",
        choices=("auto", "exact", "student"))
    precision: str = setting(
        "float32", "precision of the prior and the student in sampling",
        choices=("float32", "bfloat16"))
    denoise: float = setting(
        0.0, "std of the noise to remove by one step along the model's score, for pixels in "
        "[-1, 1]; 0 = off", 0)

    def __post_init__(self):
        check_settings(self)

    @property
    def candidates(self) -> int:
        """S, the candidates for one draw: more than one only for guidance by resampling."""
        if self.guidance > 0 and self.guidance_method == "resample":
            return self.s_c + self.s_u
        return 1


@dataclass(frozen=True)
class Config:
    """Every hyperparameter of the model. Sizes are in pixels, tokens or channels."""

    image_size: int = setting(16, "height and width of an image in pixels", 1)
    channels: int = setting(3, "1 (grey) or 3 (RGB)", choices=(1, 3))
    patch_size: int = setting(4, "p; a token is a patch of p x p pixels", 1)
    num_classes: int = setting(10, "0 = unconditional; label num_classes is the null class", 0)
    flow_blocks: int = setting(4, "n, blocks of the autoregressive flow", 0)
    flow_layers: int = setting(1, "Transformer layers in each flow block", 1)
    flow_width: int = setting(128, "Transformer width in the flow", 1)
    ar_layers: int = setting(2, "layers of the AR Transformer", 1)
    ar_width: int = setting(128, "width of the AR Transformer", 1)
    head_dim: int = setting(64, "channels of an attention head; divides both widths", 1)
    informative_dim: int = setting(
        48, "d_I, channels of Z that the AR models token by token; d = no split", 1)
    informative_mixtures: int = setting(16, "K_I, components of a token's mixture", 1)
    redundant_mixtures: int = setting(
        1, "K_R, components of the one mixture that all redundant parts share; 0 = N(0, I), as in "
        "JetFormer", 0)
    class_tokens: int = setting(4, "M, how many times the class embedding is repeated", 1)
    final_flip: bool = setting(True, "reverse the tokens before the AR reads them")
    whiten: bool = setting(
        False, "whiten the patch channels before the flow by a fixed PCA, fitted on the data")
    sampling: Sampling = Sampling()

    def __post_init__(self):
        check_settings(self)
        check_multiple(self, "image_size", of="patch_size")
        check_multiple(self, "flow_width", of="head_dim")
        check_multiple(self, "ar_width", of="head_dim")
        if self.informative_dim > self.token_dim:
            raise ValueError(f"informative_dim: got {self.informative_dim}, expected 1 to "
                             f"token_dim = {self.token_dim}")

    @property
    def num_tokens(self) -> int:
        """N, the number of tokens."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def token_dim(self) -> int:
        """d, the channels of a token."""
        return self.channels * self.patch_size**2

    @property
    def redundant_dim(self) -> int:
        """d_R, the redundant channels of a token."""
        return self.token_dim - self.informative_dim


# ----------------------------------------------------------------------------- presets
# Table 6. Whether T_sigma multiplies stds or variances, and T_pi logits or weights, is open; here
# stds and logits.
_table6 = functools.partial(
    Sampling, T_pi=1.0, T_sigma=0.9, s_c=5, s_u=5, T_pi_v=0.2, T_sigma_v=0.9, T_s=1.1)
_p16 = dict(
    image_size=256, patch_size=16, num_classes=1000, informative_dim=128, informative_mixtures=64,
    class_tokens=64)
# d_I, K_I and K_R of p8 are open. With this d_I an image has as many informative values as in p16.
# These presets have 946M and 1,729M parameters. No small d_I reaches the 1.1B and 1.9B of Table 1.
_p8 = dict(_p16, patch_size=8, informative_dim=32)
_1b = dict(
    flow_blocks=28, flow_layers=4, flow_width=768, ar_layers=12, ar_width=768,
    redundant_mixtures=200)
# Section 4.1 gives K_R = 200 here too, but the AR's 498M parameters in Table 1 allow only 136.
_2b = dict(
    flow_blocks=32, flow_layers=6, flow_width=768, ar_layers=24, ar_width=1024,
    redundant_mixtures=136)
PRESETS = {
    "tiny": Config(
        whiten=True, informative_dim=24, redundant_mixtures=0, final_flip=False,
        sampling=Sampling(guidance=2.0, denoise=0.05)),
    "fashion": Config(  # these choices and their reasons: results/README.md
        whiten=True, image_size=28, channels=1, flow_layers=2, ar_layers=4, informative_dim=8,
        informative_mixtures=32, redundant_mixtures=0, final_flip=False,
        sampling=Sampling(guidance=1.0, denoise=0.06)),
    "cifar10": Config(  # no split: meant for likelihood
        whiten=True, image_size=32, flow_blocks=8, flow_layers=4, flow_width=256, ar_layers=8,
        ar_width=256, class_tokens=8, sampling=Sampling(guidance=1.0)),
    "imagenet64": Config(
        whiten=True, image_size=64, num_classes=1000, flow_blocks=12, flow_layers=4,
        flow_width=512, ar_layers=12, ar_width=512, informative_dim=24, informative_mixtures=32,
        class_tokens=16, sampling=Sampling(guidance=1.0)),
    "farmer-1.1b-p16": Config(**_p16, **_1b, sampling=_table6(guidance=2.5)),
    "farmer-1.1b-p8": Config(**_p8, **_1b, sampling=_table6(guidance=2.0, T_sigma=1.0)),
    "farmer-1.9b-p16": Config(**_p16, **_2b, sampling=_table6(guidance=3.5)),
    "farmer-1.9b-p8": Config(
        **_p8, **_2b,
        sampling=_table6(guidance=1.5, T_sigma=1.0, T_pi_v=0.1, T_sigma_v=1.0)),
}

# Settings of train.py that differ from its defaults; `flip` mirrors images. 200,200 steps of 2,048
# images are the paper's 320 epochs of ImageNet; the batch size is open.
_paper = dict(
    steps=200_200, batch_size=2048, lr=1e-4, warmup=5000, data="imagenet/train", enlarge=True)
TRAINING = {
    "tiny": dict(steps=1200, batch_size=32, lr=3e-3, noise_end=0.05, flip=False),
    "fashion": dict(
        steps=4000, batch_size=32, lr=1e-2, optimizer="muon", noise_end=0.06, flip=False,
        data="fashion-mnist"),
    "cifar10": dict(
        steps=100_000, batch_size=128, warmup=1000, noise="uniform", holdout=500, data="cifar10"),
    "imagenet64": dict(
        steps=300_000, batch_size=256, lr=3e-4, warmup=2000, noise="uniform",
        data="imagenet/train", enlarge=True),
    "farmer-1.1b-p16": _paper,
    "farmer-1.1b-p8": _paper,
    "farmer-1.9b-p16": _paper,
    "farmer-1.9b-p8": _paper,
}
