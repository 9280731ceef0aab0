"""The optimizers of training: AdamW, or Muon for the matrices of a model's layers and AdamW for the rest."""
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from support.cli import UserError
from support.distributed import bf16_is_fast, layers_of


def optimizers(net: nn.Module, name: str, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """`name` "adamw" or "muon". Weight decay on matrices, not on biases and norms.

    Raises UserError where muon is asked for and the model's layers have no matrices.
    """
    params = [p for p in net.parameters() if p.requires_grad]
    matrices = [p for p in params if p.dim() >= 2]
    inside = {p for layer in layers_of(net) for p in layer.parameters() if p.dim() == 2} if name == "muon" else set()
    if name == "muon" and not inside:
        raise UserError("--optimizer: muon is for the matrices of a model's layers(), and this model names none")
    how = dict(lr=lr, weight_decay=weight_decay)
    groups = [dict(params=[p for p in matrices if p not in inside]),
              dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
    found = [torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True, **how)]
    if inside:
        found.append(Muon([p for p in matrices if p in inside], adjust_lr_fn="match_rms_adamw", **how))
    return found


class Muon(torch.optim.Muon):
    """torch's, whose Newton-Schulz iterations are in bfloat16; in float32 where bfloat16 is emulated. On a CPU of AVX2
    that takes a twentieth of the time."""

    @torch.no_grad()
    def step(self, closure=None):
        if bf16_is_fast(self.param_groups[0]["params"][0].device):
            return super().step(closure)
        with _Float32():
            return super().step(closure)


class _Float32(TorchFunctionMode):
    """`tensor.bfloat16()` is a float32 copy in here."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.bfloat16:
            return args[0].float().clone()
        return func(*args, **(kwargs or {}))
