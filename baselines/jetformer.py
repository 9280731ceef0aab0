"""JetFormer (arXiv 2411.19722), FARMER's closest baseline, on the Jet flow (2412.15129): --model baselines.jetformer

Written from public facts about both papers and their released configurations; where these differ, as the code does it.
The frame is FARMER's, which followed JetFormer: patches, flow, Z = [Z_I, Z_R], AR Transformer with a mixture head.
What stands here is what FARMER changed: coupling layers, N(0, I) for Z_R, a Transformer with one key-value head, class
tokens of M tables, noise on Z_I in training. Guidance is farmer.reject_cfg or its closed form. With prior = farmer
(presets table4*) Jet stands under FARMER's own prior, as in FARMER's Table 4.
Letters are farmer.py's; b and s are shift and raw scale of a coupling, x1 and x2 its halves.
"""
import dataclasses
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import farmer
from farmer import GMM, Farmer, Generators, KVCache, Noise, attention, full_precision, gaussian_guided, random, setting

FARMERS = ("redundant_mixtures", "redundant_prior", "look_above")  # what only FARMER's prior reads
FARMERS_SAMPLING = ("s_c", "s_u", "T_pi_v", "T_sigma_v", "T_s", "redundant_pool")
JETFORMERS = ("ar_head_dim", "latent_noise", "dropout")  # and only JetFormer's


# ------------------------------------------------------------------------------------------ configuration
def refuse(settings, names: tuple[str, ...]) -> None:
    """Raises a ValueError where a setting that nobody would read is not its default."""
    for name in names:
        if getattr(settings, name) != getattr(type(settings), name):
            raise ValueError(f"{name}: got {getattr(settings, name)!r}, but this prior does not read it; leave it out")


@dataclass(frozen=True)
class Sampling(farmer.Sampling):
    """FARMER's settings. Those of candidates are for prior = farmer alone."""
    guidance_method: str = setting("reject", "rejection sampling, the Gaussian that it aims at, or FARMER's resampling",
                                   choices=("reject", "closed", "resample"))
    inverse: str = setting("auto", "of the flow: exact, in one pass for each coupling", choices=("auto", "exact"))


@dataclass(frozen=True)
class Config(farmer.Config):
    """FARMER's fields, with couplings for flow_blocks, and JetFormer's own."""
    redundant_prior: str = setting("gaussian", "N(0, I), or FARMER's mixture", choices=("gaussian", "mixture"))
    final_flip: bool = setting(False, "the AR reads the tokens in reverse")
    prior: str = setting("jetformer", "of the latents; farmer: Jet under FARMER's", choices=("jetformer", "farmer"))
    spatial_every: int = setting(0, "one coupling in so many splits the tokens, the others the channels; 0 = none")
    ar_head_dim: int = setting(64, "channels of an attention head of JetFormer's AR Transformer", 2, 16_384)
    latent_noise: float = setting(0.3, "largest std of the noise on Z_I in training")
    dropout: float = setting(0.1, "part of an AR layer's outputs set to 0 in training", 0, 0.9)
    sampling: Sampling = Sampling()

    def __post_init__(self):
        super().__post_init__()
        refuse(self, FARMERS if self.prior == "jetformer" else JETFORMERS)
        if self.token_dim % 2:
            raise ValueError(f"patch_size: got {self.patch_size}, expected an even one: couplings halve the channels")
        if self.spatial_every and self.num_tokens % 2:
            raise ValueError(f"spatial_every: got {self.spatial_every}, expected 0: {self.num_tokens} tokens are odd")
        if self.ar_head_dim % 2 or self.ar_width % self.ar_head_dim:
            raise ValueError(f"ar_head_dim: got {self.ar_head_dim}, expected an even divisor of ar_width")


# ------------------------------------------------------------------------------------------ Jet: the flow
class JetLayer(farmer.Layer):
    """FARMER's layer with biases everywhere; couplings read it with full attention."""
    def __init__(self, W: int, head_dim: int):
        super().__init__(W, head_dim)
        self.norm_attention, self.norm_mlp = nn.LayerNorm(W, eps=1e-6), nn.LayerNorm(W, eps=1e-6)
        self.qkv, self.out = nn.Linear(W, 3 * W), nn.Linear(W, W)
        for linear in (self.qkv, self.out, self.up, self.down):
            packed = 2**0.5 if linear is self.qkv else 1  # three square matrices
            nn.init.xavier_uniform_(linear.weight, packed)
            nn.init.normal_(linear.bias, std=1e-6)


class Coupling(nn.Module):
    """A Transformer reads one half of the numbers and moves the other: y1 = x1, y2 = (x2 + b) 2 sigmoid(s)."""
    def __init__(self, config: Config, order: Tensor):
        super().__init__()
        N, half, W = config.num_tokens, config.token_dim // 2, config.flow_width
        self.register_buffer("order", order)  # (N d,): the numbers of an image, those of x1 first
        self.embed, self.pos = nn.Linear(half, W), nn.Parameter(W**-0.5 * torch.randn(N, W))
        self.layers = nn.ModuleList(JetLayer(W, config.head_dim) for _ in range(config.flow_layers))
        self.norm, self.to_b_s = nn.LayerNorm(W, eps=1e-6), nn.Linear(W, 2 * half)
        nn.init.kaiming_normal_(self.embed.weight, nonlinearity="linear")
        for zero in (self.embed.bias, self.to_b_s.weight, self.to_b_s.bias):
            nn.init.zeros_(zero)  # the flow starts as the identity

    def cut(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, N, d) -> x1, x2 (B, N, d/2)."""
        B, N, d = x.shape
        return x.flatten(1).index_select(1, self.order).view(B, 2, N, d // 2).unbind(1)

    def join(self, x1: Tensor, x2: Tensor) -> Tensor:
        """The inverse of `cut`."""
        x = torch.stack([x1, x2], 1).flatten(1)
        return torch.empty_like(x).index_copy(1, self.order, x).view(*x1.shape[:2], -1)

    def b_s(self, x1: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and raw scale, each (B, N, d/2), for both directions. In bf16 the round trip would be off by 0.025."""
        h = self.embed(x1) + self.pos
        for layer in self.layers:
            h = layer(h, causal=False)
        with full_precision(h):
            return self.to_b_s(self.norm(h.to(x1.dtype))).chunk(2, -1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, N, d) -> y (B, N, d), logdet (B,) in nats."""
        x1, x2 = self.cut(x)
        b, s = self.b_s(x1)
        y2 = (x2 + b) * 2 * torch.sigmoid(s)
        return self.join(x1, y2), (F.logsigmoid(s) + math.log(2)).sum((1, 2))

    def inverse(self, y: Tensor) -> Tensor:
        """y (B, N, d) -> x (B, N, d)."""
        x1, y2 = self.cut(y)
        b, s = self.b_s(x1)
        return self.join(x1, y2 / (2 * torch.sigmoid(s)) - b)


def order(config: Config, t: int) -> Tensor:
    """The numbers of an image in the order of coupling t, x1 before x2 -> (N d,).
    Channel kind: x1 is a random half of the channels, the same for each token. Spatial kind: half of the tokens, each
    cut in two; a checkerboard, columns, rows in turn, each followed by itself with the halves exchanged."""
    N, d, every = config.num_tokens, config.token_dim, config.spatial_every
    numbers = torch.arange(N * d).view(N, d)
    if every == 0 or t % every < every - 1:
        return torch.stack(numbers[:, torch.randperm(d)].chunk(2, 1)).flatten()
    row, column, kind = torch.arange(N) // math.isqrt(N), torch.arange(N) % math.isqrt(N), t // every
    group = (row + column, column, row)[kind // 2 % 3]
    return numbers[torch.argsort((group + kind) % 2, stable=True)].flatten()


class Jet(farmer.Flow):
    """Couplings in place of FARMER's autoregressive blocks; its linear map stays."""
    def __init__(self, config: Config):
        super().__init__(dataclasses.replace(config, flow_blocks=0))
        self.blocks.extend(Coupling(config, order(config, t)) for t in range(config.flow_blocks))


# ------------------------------------------------------------------------------------------ the AR prior
def rotate(x: Tensor, at: Tensor) -> Tensor:
    """Rotary positions over the whole head, pairs (j, j + half): x (B, heads, T, head_dim) at positions `at` (T,)."""
    half = x.shape[-1] // 2
    angle = at.unsqueeze(1) * 1e4 ** (-torch.arange(half, device=x.device) / half)  # (T, half)
    cos, sin = angle.cos(), angle.sin()
    x1, x2 = x.chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).to(x.dtype)


class ARLayer(farmer.Layer):
    """Gemma's layer: RMSNorm, causal attention with one key-value head and rotary positions, gated MLP; no biases."""
    def __init__(self, W: int, head_dim: int):
        nn.Module.__init__(self)  # nothing of FARMER's layer
        self.head_dim = head_dim
        self.norm_attention, self.norm_mlp = nn.RMSNorm(W, eps=1e-6), nn.RMSNorm(W, eps=1e-6)
        self.q, self.out = nn.Linear(W, W, bias=False), nn.Linear(W, W, bias=False)
        self.kv = nn.Linear(W, 2 * head_dim, bias=False)
        self.gate_up, self.down = nn.Linear(W, 8 * W, bias=False), nn.Linear(4 * W, W, bias=False)

    def forward(self, h: Tensor, at: Tensor, cache: KVCache | None = None, keep: Tensor | None = None) -> Tensor:
        """h (B, T, W) at positions `at` (T,) -> (B, T, W); keep (B, 2, T, W): dropout; a cache as in FARMER's layer."""
        B, T, W = h.shape
        x = self.norm_attention(h)
        q = rotate(self.q(x).view(B, T, -1, self.head_dim).transpose(1, 2), at)  # (B, heads, T, head_dim)
        k, v = self.kv(x).unsqueeze(1).chunk(2, -1)  # one head: (B, 1, T, head_dim)
        k, mask = rotate(k, at), None
        if cache is not None:
            k, v, mask = cache.append(k, v)
        read = attention(q, k.expand(-1, q.shape[1], -1, -1), v.expand(-1, q.shape[1], -1, -1), mask, causal=T > 1)
        x = self.out(read.transpose(1, 2).reshape(B, T, W))
        h = h + (x if keep is None else x * keep[:, 0])
        gate, up = self.gate_up(self.norm_mlp(h)).chunk(2, -1)
        x = self.down(F.gelu(gate, approximate="tanh") * up)
        return h + (x if keep is None else x * keep[:, 1])


class Head(farmer.MixtureHead):
    """h (..., W) -> a GMM, with sigma = (r + sqrt(r^2 + 4)) / 2 ("squareplus") of a raw r: 1 at the start."""
    def __init__(self, W: int, K: int, d: int):
        super().__init__(W, K, d)
        nn.init.zeros_(self.linear.weight)
        nn.init.normal_(self.linear.bias[K:K + K * d], std=0.02)  # components that start equal stay equal

    def forward(self, h: Tensor) -> GMM:
        K, d = self.K, self.d
        with full_precision(h):
            logits, mu, r = self.linear(h.to(self.linear.weight.dtype)).split([K, K * d, K * d], -1)
            log_sigma = torch.asinh(r / 2).clamp(min=math.log(1e-6))  # asinh(r / 2) = log squareplus(r)
            return GMM(logits, mu.unflatten(-1, (K, d)), log_sigma.unflatten(-1, (K, d)))


class Prior(farmer.Prior):
    """P(Z_I|c) by a causal Transformer over [BOS, y_1 ... y_M, BOI, Z_1 ... Z_{N-1}], Z_1's mixture at BOI; N(0, I).
    y_r is the label in the r-th of M tables. The rows of a table are the classes, the null class, BOS and BOI."""
    def __init__(self, config: Config):
        nn.Module.__init__(self)
        W, d_I = config.ar_width, config.informative_dim
        self.N, self.M, self.d_R = config.num_tokens, config.class_tokens, config.redundant_dim
        self.mixture, self.redundant = GMM, None
        self.rows, self.dropout = config.num_classes + 3, config.dropout
        self.class_pos = nn.Parameter(torch.randn(self.M * self.rows, W))  # the tables, one below the other
        self.embed = nn.Linear(d_I, W)
        nn.init.zeros_(self.embed.bias)
        self.layers = nn.ModuleList(ARLayer(W, config.ar_head_dim) for _ in range(config.ar_layers))
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.kaiming_normal_(linear.weight, nonlinearity="linear")
        self.norm, self.head = nn.RMSNorm(W, eps=1e-6), Head(W, config.informative_mixtures, d_I)

    def prefix(self, labels: Tensor) -> Tensor:
        """labels (B,) -> [BOS, y_1 ... y_M, BOI], (B, M + 2, W)."""
        y = labels.unsqueeze(1) + self.rows * torch.arange(self.M, device=labels.device)
        bos, boi = torch.full_like(y[:, :1], self.rows - 2), torch.full_like(y[:, :1], self.rows - 1)
        return F.embedding(torch.cat([bos, y, boi], 1), self.class_pos)

    def transformer(self, h: Tensor, start: int = 0, cache: list | None = None, keep: Tensor | None = None) -> Tensor:
        """h (B, T, W), its first token at position `start` -> (B, T, W); keep (B, layers, 2, T, W)."""
        at = torch.arange(start, start + h.shape[1], device=h.device)
        for i, layer in enumerate(self.layers):
            h = layer(h, at, cache and cache[i], keep if keep is None else keep[:, i])
        return self.norm(h)

    def forward(self, Z_I: Tensor, labels: Tensor, generators: Generators = None) -> tuple[GMM, GMM | None]:
        """Z_I (B, N, d_I), labels (B,) -> mixtures of Z_I (B, N, K, ...), that of Z_R or None. Generators: dropout."""
        h, keep = torch.cat([self.prefix(labels), self.embed(Z_I[:, :-1])], 1), None
        if generators and self.dropout:
            u = random(torch.rand, len(h), (len(self.layers), 2, *h.shape[1:]), generators, h)
            keep = (u >= self.dropout).to(h.dtype) / (1 - self.dropout)
        h = self.transformer(h, keep=keep)[:, self.M + 1:]  # (B, N, W)
        return self.head(h), self.shared(h[:, -1]) if self.d_R else None

    @torch.no_grad()
    def sample(self, labels: Tensor, null: int, options: Sampling, generators: Generators = None, *_) -> Tensor:
        """labels (B,) -> Z (B, N, d). With guidance both passes, c and null, run as one doubled batch."""
        B, copies, Z_I, start = len(labels), 1 + (options.guidance > 0), [], 0
        h = self.prefix(torch.cat([labels, torch.full_like(labels, null)]) if copies == 2 else labels)
        cache = [KVCache(len(h), 1, h.shape[1] + self.N, layer.head_dim, h, static=False) for layer in self.layers]
        for _ in range(self.N):
            last = self.transformer(h, start, cache)[:, -1]
            noise = Noise.new(B, (1,), self.head.d, (1,), generators, last)
            Z_I.append(draw(self.head(last), options, noise, generators))  # (B, 1, d_I)
            start += h.shape[1]
            h = self.embed(Z_I[-1]).to(self.class_pos).repeat(copies, 1, 1)
        Z_R = [self.sample_redundant(last, B, options, generators)] if self.d_R else []
        return torch.cat([torch.cat(Z_I, 1), *Z_R], -1)


def draw(p: GMM, options: Sampling, noise: Noise, generators: Generators) -> Tensor:
    """farmer.draw, and in closed form what rejection aims at: with pi_c and, component by component, the Gaussian
    N(mu_c, sigma_c)^{1+w} N(mu_u, sigma_u)^{-w} -> (B, 1, d)."""
    if options.guidance == 0 or options.guidance_method == "reject":
        return farmer.draw(p, options, noise, generators)
    p_c, p_u = p.tempered(options.T_pi, options.T_sigma).halves()
    sigma_c, sigma_u = (q.log_sigma.exp().clamp(min=1e-6) for q in (p_c, p_u))
    mu, sigma = gaussian_guided(p_c.mu, sigma_c, p_u.mu, sigma_u, options.guidance)
    return GMM(p_c.logits, mu, sigma.log()).sample(noise.u, noise.eps)


# ------------------------------------------------------------------------------------------ the models
class JetFarmer(Farmer):
    """FARMER with Jet for its flow."""
    def __init__(self, config: Config):
        super().__init__(dataclasses.replace(config, flow_blocks=0))
        self.config, self.flow = config, Jet(config)

    def sample_latents(self, labels: Tensor, options: Sampling | None = None, generators: Generators = None) -> Tensor:
        options, prior = options or self.config.sampling, self.config.prior
        if prior == "jetformer":
            refuse(options, FARMERS_SAMPLING)
        if options.guidance_method == ("resample" if prior == "jetformer" else "closed"):
            raise ValueError(f"guidance_method: got {options.guidance_method}, which prior {prior} does not have")
        return super().sample_latents(labels, options, generators)

    def distiller(self, *_):
        raise ValueError("--distill: Jet needs no student, its inverse takes one pass for each coupling")

    def flops(self) -> float:
        """Of one image's forward: as FARMER's, but a coupling reads and moves half of the channels."""
        c = self.config
        return super().flops() - 3 * c.flow_blocks * c.num_tokens * c.token_dim * c.flow_width

    def stages(self, labels: Tensor, options: Sampling | None = None, generators: Generators = None) -> dict:
        """FARMER's, with the one inverse that there is."""
        Z = self.sample_latents(labels, options, generators)
        return {"prior": partial(self.sample_latents, labels, options, generators), "exact": partial(self.decode, Z),
                "forward": torch.no_grad()(partial(self.flow, self.patches(self.decode(Z))))}


class JetFormer(JetFarmer):
    """The model of the paper: Jet, its own AR prior of Z_I, N(0, I) for Z_R."""
    def __init__(self, config: Config):
        nn.Module.__init__(self)  # without FARMER's parts
        self.config, self.flow, self.prior, self.student = config, Jet(config), Prior(config), None

    def forward(self, x: Tensor, labels: Tensor, generators: Generators = None) -> dict[str, Tensor]:
        """FARMER's loss and parts, but of Z_I + sigma eps, sigma ~ U[0, latent_noise] for each image: training's alone.
        The noised Z_I is the AR's input and target, and no gradient stops: the flow answers with a larger Z_I."""
        c, B = self.config, len(x)
        Z, logdet = self.flow(self.patches(x))
        Z_I, Z_R = Z.split([c.informative_dim, c.redundant_dim], -1)
        sigma = c.latent_noise * random(torch.rand, B, (1, 1), generators, Z)
        Z_I = Z_I + sigma * random(torch.randn, B, tuple(Z_I.shape[1:]), generators, Z)
        p_I, p_R = self.prior(Z_I, self.check_labels(labels, B), generators)
        log_p_R = p_R.shared_log_prob(Z_R).sum(1) if p_R else torch.zeros_like(logdet)
        parts = (p_I.log_prob(Z_I).sum(1), log_p_R, logdet)
        informative, redundant, logdet = (part / x[0].numel() for part in parts)
        loss = -informative - redundant - logdet
        return dict(loss=loss, nats_per_dim=loss, informative=-informative, redundant=-redundant, logdet=logdet)


def Model(config: Config) -> Farmer:
    """JetFormer, or with prior farmer Jet in FARMER."""
    return JetFarmer(config) if config.prior == "farmer" else JetFormer(config)


# ------------------------------------------------------------------------------------------ presets
def on_jet(preset: farmer.Config) -> Config:
    """A preset of FARMER's on Jet: as many couplings as blocks, of its layers and width, and the very same AR."""
    return Config(**{**vars(preset), "sampling": Sampling(**vars(preset.sampling))}, prior="farmer")


_small = dict(flow_blocks=16, linear_map="whiten")  # the map is not theirs
_imagenet = dict(image_size=256, patch_size=16, num_classes=1000, flow_blocks=32, flow_width=512, informative_dim=128,
                 informative_mixtures=1024, class_tokens=16)
PRESETS = {
    "digits": Config(**_small, ar_layers=3, informative_dim=24, sampling=Sampling(guidance=1.0)),
    "fashion": Config(**_small, image_size=28, channels=1, ar_layers=4, informative_dim=8,
                      sampling=Sampling(guidance=1.0)),
    "cifar10": Config(image_size=32, flow_blocks=32, flow_width=192, ar_layers=12, ar_width=384, informative_dim=8,
                      informative_mixtures=256, class_tokens=16, sampling=Sampling(guidance=2.0, T_sigma=0.7)),
    "imagenet256-350m": Config(**_imagenet, flow_layers=4, ar_layers=24, ar_width=1024,
                               sampling=Sampling(guidance=3.0, T_sigma=0.94)),
    "imagenet256-1.3b": Config(**_imagenet, flow_layers=6, ar_layers=48, ar_width=1536, ar_head_dim=96,
                               sampling=Sampling(guidance=2.0, T_sigma=0.93)),
    "table4": on_jet(farmer.PRESETS["fashion"]),
    "table4-1.1b": on_jet(farmer.PRESETS["farmer-1.1b-p16"]),
}

_rgb = dict(lr_end=0.0, weight_decay=0.1, guard=0.0, noise="rgb", noise_end=0.0)  # decay: theirs is not scaled by lr
_paper = dict(_rgb, steps=62_500, batch_size=2048, lr=1e-3, warmup=6250, noise_start=64.0, data="imagenet/train")
_small = dict(steps=1600, batch_size=32, lr=2e-3, flip=False, noise="rgb", noise_start=64.0, noise_end=6.0)
TRAINING = {
    "digits": _small, "fashion": dict(_small, steps=2400, optimizer="muon", lr=1e-2, data="fashion-mnist"),
    "cifar10": dict(_rgb, steps=39_000, batch_size=128, lr=3e-4, warmup=3900, noise_start=32.0, data="cifar10"),
    "imagenet256-350m": _paper | dict(enlarge=True), "imagenet256-1.3b": _paper | dict(enlarge=True),
    "table4": farmer.TRAINING["fashion"], "table4-1.1b": farmer.TRAINING["farmer-1.1b-p16"],
}
