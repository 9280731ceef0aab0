"""Another layer in every Transformer: rotary positions in 2-D, norms on queries and keys, SwiGLU.

    python train.py --model examples.rope --out runs/rope

A part is changed by assigning another one after super().__init__. `Farmer.layers` finds whatever a
Transformer keeps in `layers`. The table of angles is a buffer that checkpoints leave out: loading
builds the model, and with it the table, anew.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

import farmer
from farmer import PRESETS, TRAINING, Config, Sampling  # noqa: F401  (the scripts look for them)


def angles(places, head_dim):
    """Rotations for tokens at places (T, 2), rows and columns -> (T, head_dim / 2)."""
    frequency = 20.0 ** -torch.linspace(0, 1, head_dim // 4)
    return (places.unsqueeze(2) * frequency).flatten(1)  # half of the pairs turn with the row


class RopeLayer(nn.Module):
    def __init__(self, W, head_dim, turns):
        super().__init__()
        self.head_dim = head_dim
        self.norm_attention = nn.RMSNorm(W)
        self.norm_mlp = nn.RMSNorm(W)
        self.norm_q = nn.RMSNorm(head_dim)
        self.norm_k = nn.RMSNorm(head_dim)
        self.qkv = nn.Linear(W, 3 * W, bias=False)
        self.out = nn.Linear(W, W, bias=False)
        self.gate_up = nn.Linear(W, 8 * W // 3 * 2, bias=False)
        self.down = nn.Linear(8 * W // 3, W, bias=False)
        self.register_buffer("turns", turns, persistent=False)  # (T, head_dim / 2), not saved

    def rotate(self, x, past):
        """x (B, heads, T, head_dim) of the tokens from `past` on -> the same shape."""
        turns = self.turns[past:past + x.shape[2]]
        x1, x2 = x.float().chunk(2, -1)
        cos, sin = turns.cos(), turns.sin()
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).to(x.dtype)

    def forward(self, h, cache=None, causal=True):
        """h (B, T, W) -> (B, T, W). With a cache, a call after the first passes one token."""
        B, T, W = h.shape
        past = 0 if cache is None else cache.length
        qkv = self.qkv(self.norm_attention(h)).view(B, T, 3, W // self.head_dim, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q = self.rotate(self.norm_q(q), past).to(v.dtype)
        k = self.rotate(self.norm_k(k), past).to(v.dtype)
        if cache is not None:
            k, v = cache.append(k, v)
        if T == 1:
            causal = False
        read = farmer.attention(q, k, v, causal)
        h = h + self.out(read.transpose(1, 2).reshape(B, T, W))
        gate, up = self.gate_up(self.norm_mlp(h)).chunk(2, -1)
        return h + self.down(F.silu(gate) * up)


class RopeTransformer(farmer.Transformer):
    def __init__(self, W, layers, head_dim, places):
        super().__init__(W, 0, head_dim)
        turns = angles(places, head_dim)
        self.layers.extend(RopeLayer(W, head_dim, turns) for _ in range(layers))
        self.norm = nn.RMSNorm(W)


class NoPositions(nn.Module):
    """In place of farmer.Positions: nothing is added to the tokens."""

    def __init__(self, num_tokens):
        super().__init__()
        self.register_buffer("zeros", torch.zeros(num_tokens, 1), persistent=False)

    def forward(self):
        return self.zeros


class Model(farmer.Farmer):
    def __init__(self, config):
        super().__init__(config)
        c = config
        side = math.isqrt(c.num_tokens)
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)) + 1.0
        for block in self.flow.blocks:  # in a flipped block, the angles between tokens are the same
            block.pos = NoPositions(c.num_tokens)
            block.transformer = RopeTransformer(c.flow_width, c.flow_layers, c.head_dim, places)
        places = torch.cat([torch.zeros(c.class_tokens, 2), places])
        self.prior.pos = NoPositions(c.num_tokens)
        self.prior.transformer = RopeTransformer(c.ar_width, c.ar_layers, c.head_dim, places)
