#!/usr/bin/env bash
# Guess:    asking for an optimizer's state, in order to save a checkpoint before the first step,
#           does not change the training that follows.
# Seen:     torch.distributed.checkpoint's get_optimizer_state_dict fills an empty state by a step
#           with zero gradients and lr 0, and leaves it there. AdamW then counts its first real
#           step as the second: with zero moments, the bias corrections make it 0.74 times as
#           long, and training takes another path. SOAP, whose first step only makes a
#           preconditioner, makes it from zeros, and goes elsewhere. Muon, whose state is a
#           momentum alone, is not affected.
# Versions: torch==2.13.0 pytorch_optimizer==4.1.0 numpy==2.4.6
# Date:     2026-12-01
# Matters:  a checkpoint at step 0 ("see that saving works before the long run") makes another run
#           than the same command without it, so seeds and ablations no longer compare.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile --disable-pip-version-check torch==2.13.0 \
    pytorch_optimizer==4.1.0 numpy==2.4.6
cat > check.py <<'END'
import pytorch_optimizer
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

torch.set_num_threads(1)
OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
    "SOAP": lambda params: pytorch_optimizer.SOAP(params, lr=0.01),
    "Muon": lambda params: torch.optim.Muon([p for p in params if p.dim() == 2], lr=0.01),
}


def trained(name, steps, ask_first):
    """How far the weights have moved after these steps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
    before = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    x = torch.randn(8, 16)
    optimizer = OPTIMIZERS[name](list(net.parameters()))
    if ask_first:
        get_optimizer_state_dict(net, optimizer)
        asked = nn.utils.parameters_to_vector(net.parameters()).detach()
        assert torch.equal(asked, before), "asking itself moved the weights"
    for _ in range(steps):
        net(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return nn.utils.parameters_to_vector(net.parameters()).detach() - before


first = trained("AdamW", 1, True).norm() / trained("AdamW", 1, False).norm()
assert 0.73 < first < 0.76, first
changed = {}
for name in OPTIMIZERS:
    a = trained(name, 5, False)
    b = trained(name, 5, True)
    changed[name] = float((a - b).norm() / a.norm())
assert changed["AdamW"] > 0.05, changed
assert changed["SOAP"] > 0.3, changed
assert changed["Muon"] == 0, changed
text = ", ".join(f"{name} {value:.2f}" for name, value in changed.items())
print(f"AdamW's first step is {first:.3f} times as long; after 5 steps weights differ by {text} "
      "of the way moved")
END
venv/bin/python check.py
