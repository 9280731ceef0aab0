#!/usr/bin/env bash
# Guess: a zuko flow whose log_prob fits the data well samples that data.
# What happens: the flows without a closed inverse (NAF here; SOSPF, UNAF and GF too) invert by
# bisection between -10 and 10. Their density is right beyond, and training sees nothing, but
# samples and inverses are clamped there without a word: with data of standard deviation 6 the
# likelihood is within 0.1 nats of the entropy, and three samples in ten lie on the rim.
# zuko==1.6.0, torch==2.13.0, 2026-12-01.
# Why it matters: likelihood, the usual check, is blind to it. Latents of autoencoders and pixel
# values from 0 to 255 reach far beyond 10: scale the data first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile torch==2.13.0 numpy==2.4.6 zuko==1.6.0
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'END'
import math

import torch
import zuko

torch.manual_seed(0)
data = 6 * torch.randn(4000, 2) + torch.tensor([4.0, -3.0])
flow = zuko.flows.NAF(2, transforms=1, hidden_features=(32, 32))
optimizer = torch.optim.Adam(flow.parameters(), 3e-3)
for _ in range(400):
    loss = -flow().log_prob(data[torch.randint(0, 4000, (256,))]).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
with torch.no_grad():
    nll = -flow().log_prob(data).mean().item()
    samples = flow().sample((4000,))
    transform = flow().transform
    back = transform.inv(transform(torch.tensor([[12.0, -14.0]]))).flatten().tolist()
entropy = 2 * (0.5 * math.log(2 * math.pi * math.e) + math.log(6))
beyond = (data.abs() > 10).any(1).double().mean().item()
rim = (samples.abs() > 9.99).any(1).double().mean().item()
print(f"nats {nll:.3f}, entropy {entropy:.3f}; std of data {data.std().item():.2f}, of samples "
      f"{samples.std().item():.2f}; beyond 10: data {beyond:.3f}, samples "
      f"{(samples.abs() > 10.001).any(1).double().mean().item():.3f}, on the rim {rim:.3f}; "
      f"(12, -14) there and back: ({back[0]:.2f}, {back[1]:.2f})")
assert nll - entropy < 0.2 and beyond > 0.2 and rim > 0.15 and samples.abs().max() < 10.001
assert abs(back[0] - 10) < 0.01 and abs(back[1] + 10) < 0.01
END
