"""ARFlow (arXiv 2501.16085) and SiT (arXiv 2401.08740) in pixels: flow matching, which has no likelihood.

    python train.py --model baselines.arflow --preset digits            # ARFlow, items of S = 5 images
    python train.py --model baselines.arflow --preset arflow1-digits    # the same network on single images: the control
    python train.py --model baselines.arflow --preset sit-digits        # SiT

x_t = t x + (1 - t) eps goes from noise (t = 0) to an image (t = 1); a Transformer predicts its velocity x - eps. ARFlow
trains on items: S images of one class with times t_1 <= ... <= t_S. Each image attends to itself by softmax and to the
images before it, which have more noise, by linear attention with a state M of constant size. Sampling makes one image:
its earlier steps take the place of the images before it, and M is carried from step to step.

    I  items of a batch     C  channels              H  attention heads, W / e    h  hidden features, (I, S, N, W)
    S  images of an item    p  patch size            e  head size                 c  time and class, (I, S, W)
    N  tokens of an image   d  C p^2, of a patch     W  Transformer width         M  state, (I, H, e, e)

Where it differs from the papers: pixels instead of an autoencoder's latents; all channels are guided (theirs: 3 of 4);
the norm of the gradient is clipped, not its values (the loop's business); the Euler sampler of the ODE is ours.
"""
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farmer import Generators, check_settings, full_precision, patchify, random, setting, unpatchify

EPS = 1e-6  # of every norm
LAST_STEP = 0.04  # the SDE's score is singular at t = 1: it ends by one step without noise from t = 0.96
DECAY = 16  # divides W_gt's log-sigmoid, so that M starts as a memory of about 24 images

State = list[Tensor | None]  # M of every layer, None without images before


# ------------------------------------------------------------------------------------------------------ configuration
@dataclass(frozen=True)
class Sampling:
    """How to sample. The ARFlow authors' settings: sampler sde, steps 250, guidance 0.5 (their s = 1 + w = 1.5)."""
    guidance: float = setting(0.0, "w of (1 + w) conditional - w unconditional velocity; 0 = off", 0, 1000)
    sampler: str = setting("ode", "Euler steps of the ODE or Euler-Maruyama steps of the SDE", choices=("ode", "sde"))
    steps: int = setting(50, "network calls for an image; guided, each is a doubled batch", 2, 100_000)
    carry_state: bool = setting(True, "give a step the state of those before; off, to see what it is worth")

    def __post_init__(self):
        check_settings(self)

@dataclass(frozen=True)
class Config:
    """Every hyperparameter of the model."""
    image_size: int = setting(16, "height and width of an image in pixels", 1, 4096)
    channels: int = setting(3, "1 (grey) or 3 (RGB); the papers' latents have 4", 1, 64)
    patch_size: int = setting(4, "p; a token is a p x p patch", 1, 256)
    num_classes: int = setting(10, "0 = unconditional; label num_classes is the null class", 0, 1_000_000)
    attention: str = setting("arflow", "the attention layer, which makes the model", choices=("arflow", "sit"))
    images_per_item: int = setting(5, "S, images of one class seen one after another; 1 = no state", 1, 1024)
    layers: int = setting(6, "Transformer layers", 1, 512)
    width: int = setting(128, "W, Transformer width, a multiple of 4", 4, 16384)
    head_dim: int = setting(32, "e, channels of an attention head; divides the width", 1, 1024)
    sampling: Sampling = Sampling()

    def __post_init__(self):
        check_settings(self)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size: got {self.image_size}, expected a multiple of patch_size {self.patch_size}")
        if self.width % self.head_dim or self.width % 4:
            raise ValueError(f"width: got {self.width}, expected a multiple of head_dim {self.head_dim} and of 4")
        if self.attention == "sit" and self.images_per_item > 1:
            raise ValueError(f"images_per_item: got {self.images_per_item}, expected 1: attention sit has no state")
        if self.num_classes == 0 and self.sampling.guidance:  # there is nothing to guide towards
            object.__setattr__(self, "sampling", dataclasses.replace(self.sampling, guidance=0.0))

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def token_dim(self) -> int:
        return self.channels * self.patch_size**2


# ----------------------------------------------------------------------------------------------------------- functions
def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))

def rms_norm(x: Tensor) -> Tensor:
    """x over the root of the mean square of its last axis, computed in float32."""
    y = at_least_float32(x)
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)

def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights, then the image's scale and shift: h (..., N, W), shift and scale (..., 1, W)."""
    return F.layer_norm(h, h.shape[-1:], eps=EPS) * (1 + scale) + shift

def within_images(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v, each image attending to all of itself and nothing else: q, k, v (I, S, H, N, e) -> the same."""
    if q.is_cuda:
        out = F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, k, v)), scale=1.0)
        return out.unflatten(0, q.shape[:2])
    weights = at_least_float32(q @ k.mT).softmax(-1)  # on a CPU the fused kernel is six times slower in bf16
    return weights.to(v.dtype) @ v

def across_images(q: Tensor, k: Tensor, v: Tensor, a: Tensor, M: Tensor | None) -> tuple[Tensor, Tensor]:
    """Linear attention to the images before: q, k, v (I, S, H, N, e), log-decays a (I, S, H, N), M None at the start.

    Token n of image s reads exp(a_1 + ... + a_n) q_n M_s; M_{s+1} = exp(mean_n a_n) M_s + sum_n k_n v_n^T.
    Returns what is read (I, S, H, N, e) and M after the last image, in float32: M sums over hundreds of steps.
    """
    with full_precision(q):
        q, k, v, a = (at_least_float32(x) for x in (q, k, v, a))
        gamma = a.mean(-1).exp()[..., None, None]  # (I, S, H, 1, 1)
        kv = k.mT @ v  # (I, S, H, e, e)
        M = torch.zeros_like(kv[:, 0]) if M is None else M
        before = []
        for s in range(q.shape[1]):
            before.append(M)
            M = gamma[:, s] * M + kv[:, s]
        return a.cumsum(-1).exp().unsqueeze(-1) * (q @ torch.stack(before, 1)), M

def time_features(t: Tensor, size: int = 256) -> Tensor:
    """Cosines and sines of t (...) in [0, 1], not scaled up, at size/2 frequencies from 1 to 1/10000 -> (..., size)."""
    frequency = 10000.0 ** (-torch.arange(size // 2, device=t.device, dtype=t.dtype) / (size // 2))
    angle = t.unsqueeze(-1) * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)

def positions(side: int, W: int) -> Tensor:
    """Sines and cosines of a token's column and row -> (side^2, W), tokens in raster order."""
    frequency = 10000.0 ** (-torch.arange(W // 4, dtype=torch.float64) / (W // 4))
    angle = torch.arange(side).unsqueeze(-1) * frequency  # (side, W/4)
    line = torch.cat([angle.sin(), angle.cos()], -1).float()  # (side, W/2)
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, 0)], -1)


# ------------------------------------------------------------------------------------------------------------ samplers
# velocity(x, t, state) -> v, state: one call of the network at time t, a number. The state goes from call to call.
Velocity = Callable[[Tensor, float, State | None], tuple[Tensor, State | None]]

def euler(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """dx = v dt from t = 0 to 1: x (B, ...) noise -> images."""
    state = None
    for i in range(steps):
        v, state = velocity(x, i / steps, state)
        x = x + v / steps
    return x

def euler_maruyama(velocity: Velocity, x: Tensor, steps: int, generators: Generators = None) -> Tensor:
    """The SDE with the same marginals, diffusion 1 - t and score (t v - x) / (1 - t): x (B, ...) noise -> images.

    dx = [(1 + t) v - x] dt + sqrt(2 (1 - t)) dW in steps - 1 equal steps to t = 0.96, then one without the noise.
    """
    state, dt = None, (1 - LAST_STEP) / (steps - 1)
    for i in range(steps - 1):
        t = i * dt
        v, state = velocity(x, t, state)
        eps = random(torch.randn, len(x), x.shape[1:], generators, x)
        x = x + ((1 + t) * v - x) * dt + math.sqrt(2 * (1 - t) * dt) * eps
    t = 1 - LAST_STEP
    v, _ = velocity(x, t, state)
    return x + ((1 + t) * v - x) * LAST_STEP


# --------------------------------------------------------------------------------------------------------- Transformer
class ARFlowAttention(nn.Module):
    """Softmax attention in an image plus linear attention to the images before it (with_state), normed and gated."""

    def __init__(self, W: int, head_dim: int, with_state: bool):
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v, self.gate, self.out = (nn.Linear(W, W, bias=False) for _ in range(5))
        # W_gt: on single images nothing depends on it, so they have none.
        self.decay = nn.Linear(W, W // head_dim, bias=False) if with_state else None

    def forward(self, x: Tensor, c: Tensor, M: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x (I, S, N, W), c (I, S, W), M (I, H, e, e) or None -> out (I, S, N, W), M after the last image."""
        q, k, v = (rms_norm(linear(x)) for linear in (self.q, self.k, self.v))  # over W, before the heads part
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2) for y in (q, k, v))  # (I, S, H, N, e)
        k = k * self.head_dim**-0.5
        out = within_images(q, k, v)
        if self.decay is not None:
            a = F.logsigmoid(at_least_float32(self.decay(x + c.unsqueeze(-2)))).mT / DECAY  # (I, S, H, N)
            read, M = across_images(q, k, v, a, M)
            out = out + read
        out = rms_norm(out).transpose(-3, -2).flatten(-2)  # over e, then (I, S, N, W)
        return self.out(F.silu(self.gate(x)) * out), M

class SiTAttention(nn.Module):
    """Plain softmax attention in an image, with biases; the arguments of ARFlow's, but no state."""

    def __init__(self, W: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.qkv, self.out = nn.Linear(W, 3 * W), nn.Linear(W, W)

    def forward(self, x: Tensor, c: Tensor, M: None) -> tuple[Tensor, None]:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2) for y in (q, k, v))  # (I, S, H, N, e)
        out = within_images(q, k * self.head_dim**-0.5, v)
        return self.out(out.transpose(-3, -2).flatten(-2)), None

class Block(nn.Module):
    """Attention and MLP, each with shift, scale and gate from the image's time and class (adaLN-zero)."""

    def __init__(self, config: Config):
        super().__init__()
        W, e = config.width, config.head_dim
        sit = config.attention == "sit"
        self.attention = SiTAttention(W, e) if sit else ARFlowAttention(W, e, config.images_per_item > 1)
        self.up, self.down = nn.Linear(W, 4 * W), nn.Linear(4 * W, W)
        self.modulation = nn.Linear(W, 6 * W)

    def forward(self, h: Tensor, c: Tensor, M: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """h (I, S, N, W), c (I, S, W), M (I, H, e, e) or None -> h, and M after these images."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(F.silu(c)).unsqueeze(-2).chunk(6, -1)
        out, M = self.attention(modulate(h, shift_1, scale_1), c, M)
        h = h + gate_1 * out
        hidden = F.gelu(self.up(modulate(h, shift_2, scale_2)), approximate="tanh")
        return h + gate_2 * self.down(hidden), M


# ----------------------------------------------------------------------------------------------------------- the model
class ARFlow(nn.Module):
    """The velocity network with its training loss and its sampler; SiT where config.attention says so."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, W = config, config.width
        self.embed = nn.Linear(config.token_dim, W)
        self.time = nn.Sequential(nn.Linear(256, W), nn.SiLU(), nn.Linear(W, W))
        self.classes = nn.Embedding(config.num_classes + 1, W)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.modulation, self.to_velocity = nn.Linear(W, 2 * W), nn.Linear(W, config.token_dim)
        self.register_buffer("pos", positions(config.image_size // config.patch_size, W))
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for table in (self.time[0], self.time[2], self.classes):
            nn.init.normal_(table.weight, std=0.02)
        for linear in (self.modulation, self.to_velocity, *(block.modulation for block in self.blocks)):
            nn.init.zeros_(linear.weight)  # every block starts as the identity, the velocity as 0

    def velocity(self, x: Tensor, t: Tensor, labels: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """v(x, t, y) of images that follow one another: x (I, S, C, height, width), t and labels (I, S).

        state: what this returned after the images before these, None at an item's start. Returns v like x, and state.
        """
        p, c = self.config.patch_size, self.time(time_features(t)) + self.classes(labels)  # c (I, S, W)
        h = self.embed(patchify(x.flatten(0, 1), p).unflatten(0, x.shape[:2])) + self.pos  # (I, S, N, W)
        after = []
        for block, M in zip(self.blocks, state or [None] * len(self.blocks), strict=True):
            h, M = block(h, c, M)
            after.append(M)
        shift, scale = self.modulation(F.silu(c)).unsqueeze(-2).chunk(2, -1)
        v = self.to_velocity(modulate(h, shift, scale)).to(x.dtype)
        return unpatchify(v.flatten(0, 1), p, x.shape[2]).view_as(x), after

    def guided(self, x: Tensor, t: float, labels: Tensor, w: float, state: State | None) -> tuple[Tensor, State]:
        """(1 + w) v(x, t, y) - w v(x, t, null), each with its own M, of images x (B, C, height, width), labels (B,)."""
        parts = [labels, torch.full_like(labels, self.config.num_classes)] if w else [labels]
        labels = torch.cat(parts).unsqueeze(1)
        x = x.unsqueeze(1).repeat(len(parts), 1, 1, 1, 1)  # an item is one image: (B or 2B, 1, C, height, width)
        v, state = self.velocity(x, x.new_full(labels.shape, t), labels, state)
        v = v.squeeze(1).chunk(len(parts))
        return (1 + w) * v[0] - w * v[-1], state

    def forward(self, x: Tensor, labels: Tensor, generators: list[torch.Generator]) -> dict[str, Tensor]:
        """{"loss": (B,)}, the mean square error of each image's velocity.

        x (B, C, height, width), an item's S images consecutive, labels (B,), null = num_classes, one generator per
        image: its time and noise come from it alone, then the times of an item are sorted.
        """
        B, S = len(x), self.config.images_per_item
        if B % S:
            raise ValueError(f"batch: got {B} images, expected a multiple of images_per_item {S}")
        t = random(torch.rand, B, (), generators, x).view(-1, S).sort(1).values
        eps = random(torch.randn, B, x.shape[1:], generators, x)
        x, eps, labels = (y.unflatten(0, (-1, S)) for y in (x, eps, labels))  # (I, S, ...)
        part = t[..., None, None, None]
        v, _ = self.velocity(part * x + (1 - part) * eps, t, labels)
        return {"loss": (v - (x - eps)).square().mean((2, 3, 4)).flatten()}

    @torch.no_grad()
    def sample(self, labels: Tensor, options: Sampling | None = None, generators: Generators = None) -> Tensor:
        """Images (B, C, image_size, image_size) float32, not clamped, of labels (B,); generators as in `random`."""
        c, options = self.config, options or self.config.sampling
        if options.guidance and not c.num_classes:
            raise ValueError(f"guidance: got {options.guidance}, expected 0 for a model without classes")
        x = random(torch.randn, len(labels), (c.channels, c.image_size, c.image_size), generators, self.pos)

        def velocity(x, t, state):
            return self.guided(x, t, labels, options.guidance, state if options.carry_state else None)

        if options.sampler == "ode":
            return euler(velocity, x, options.steps).float()
        return euler_maruyama(velocity, x, options.steps, generators).float()

    def layers(self) -> list[nn.Module]:
        return list(self.blocks)

    def flops(self) -> float:
        """Floating point operations of one image's forward pass: 2 per weight and token, 4 (N + e) W for attention."""
        c, N, W = self.config, self.config.num_tokens, self.config.width
        matrices, state = (12, 0) if c.attention == "sit" else (13, c.head_dim * (c.images_per_item > 1))
        token = 2 * matrices * W**2 + 4 * (N + state) * W
        return c.layers * (N * token + 12 * W**2) + 4 * N * c.token_dim * W + 6 * W**2 + 512 * W

    def activations(self) -> float:
        """Bytes that the forward pass of one image keeps for the backward pass, in float32."""
        c = self.config
        numbers = 22 if c.attention == "sit" else 28 + 6 * (c.images_per_item > 1)  # counted, of W each
        return 4 * c.layers * c.num_tokens * c.width * (numbers + c.num_tokens / c.head_dim)

    def stages(self, labels: Tensor, options: Sampling | None = None, generators: Generators = None) -> dict:
        """What a benchmark times beside sampling as a whole: one of its calls of the network, which gives no image."""
        c, w = self.config, (options or self.config.sampling).guidance
        x = self.pos.new_zeros(len(labels), c.channels, c.image_size, c.image_size)
        return {"network call": torch.no_grad()(lambda: self.guided(x, 0.5, labels, w, None)[1])}


Model = ARFlow


# ------------------------------------------------------------------------------------------------------------- presets
def rows(name: str, sit: dict | None = None, **sizes) -> dict[str, Config]:
    """The three rows of one size: ARFlow with S = 5, ARFlow on single images, and SiT with its own sizes."""
    single = {**sizes, "images_per_item": 1}
    return {name: Config(**sizes), f"arflow1-{name}": Config(**single),
            f"sit-{name}": Config(**{**single, **(sit or {})}, attention="sit")}


# 256 tokens, as the papers' latents of 256 x 256 images have
_paper = dict(image_size=32, patch_size=2, num_classes=1000, head_dim=64, sampling=Sampling(0.5, "sde", 250))
PRESETS = {
    **rows("digits", sampling=Sampling(guidance=0.5)),
    **rows("fashion", image_size=28, channels=1, sampling=Sampling(guidance=1.0)),
    **rows("cifar10", image_size=32, layers=8, width=256, head_dim=64, sampling=Sampling(guidance=1.0)),
    **rows("S", **_paper, layers=12, width=384),
    **rows("B", **_paper, layers=12, width=768),
    **rows("L", **_paper, layers=24, width=1024),
    **rows("XL", {"head_dim": 72}, **_paper, layers=28, width=1152),  # 18 heads in ARFlow, 16 in SiT
}
_small = dict(noise="none", ema=0.9999, optimizer="muon", lr=1e-2, batch_size=40, steps=2000, flip=False)
_arflow = dict(noise="none", ema=0.9999, lr=1e-4, lr_end=1.0, warmup=0, weight_decay=0.02, clip=3.0, batch_size=40,
               data="imagenet/train", enlarge=True, steps=400_000)  # 40: eight items, their script's default
_sit = {**_arflow, "weight_decay": 0.0, "clip": 0.0, "batch_size": 256}
_runs = dict(digits=_small, fashion={**_small, "data": "fashion-mnist", "steps": 3500},
             cifar10={**_small, "data": "cifar10", "steps": 20_000, "flip": True})
TRAINING = {name: _runs.get(name.split("-")[-1], _sit if name.startswith("sit") else _arflow) for name in PRESETS}
