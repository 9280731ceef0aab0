#!/usr/bin/env bash
# Guess:    pytorch_optimizer's get_optimizer_parameters, and create_optimizer, which uses it,
#           keep weight decay away from biases and from the weights of norms.
# Seen:     it looks at the class LayerNorm and at names: RMSNorm, BatchNorm and the query and key
#           norms of attention are decayed, and so are one-dimensional parameters such as a learnt
#           scale or a LayerScale. In a model whose norms are RMSNorms every norm is decayed.
# Versions: pytorch_optimizer==4.1.0 torch==2.13.0 numpy==2.4.6
# Date:     2026-12-01
# Matters:  today's image Transformers use RMSNorm and query-key norms. With lr 1e-3 and decay 0.1
#           such a gain falls by a tenth in a thousand steps by decay alone, without a gradient.
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

torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.before = nn.LayerNorm(8)
        self.query_norm = nn.RMSNorm(4)
        self.after = nn.RMSNorm(8)
        self.batch = nn.BatchNorm1d(8)
        self.linear = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))


block = Block()
names = {id(p): name for name, p in block.named_parameters()}
EXPECTED = ["after.weight", "batch.weight", "linear.weight", "query_norm.weight", "scale"]
ways = {
    "get_optimizer_parameters": pytorch_optimizer.get_optimizer_parameters(block, 0.1),
    "create_optimizer": pytorch_optimizer.create_optimizer(
        block, "adamw", lr=1e-3, weight_decay=0.1).param_groups,
}
for way, groups in ways.items():
    decayed = sorted(names[id(p)] for g in groups if g["weight_decay"] for p in g["params"])
    assert decayed == EXPECTED, (way, decayed)
optimizer = torch.optim.AdamW(ways["get_optimizer_parameters"], lr=1e-3)
for p in block.parameters():
    p.grad = torch.zeros_like(p)
for _ in range(1000):
    optimizer.step()
kept = float(block.after.weight.detach().mean())
assert 0.89 < kept < 0.92, kept
assert float(block.before.weight.detach().mean()) == 1
print(f"decayed: {', '.join(decayed)}; an RMSNorm's gain after 1,000 steps of lr 1e-3, decay 0.1 "
      f"and zero gradients: {kept:.3f}, a LayerNorm's 1")
END
venv/bin/python check.py
