#!/usr/bin/env bash
# Guess: torch.autocast protects exp, log, softmax, log_softmax, logsumexp and cumsum of bf16
# tensors: they are computed in float32 on a CPU as on CUDA.
# What happens: on CUDA they are (seen here on tensors without data, no GPU is needed), on a CPU
# none of them is: the result is bf16, with a step of 0.0625 or more between log-likelihoods above
# 8.
# torch==2.13.0, 2026-12-01.
# Why it matters: the log-likelihood of a mixture under autocast has eight bits on a CPU, and the
# same code is exact on a GPU; tests that run on a CPU fail, or hide what the GPU does. Densities
# belong into a block with autocast switched off and into float32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile torch==2.13.0 numpy==2.4.6
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'END'
import torch
from torch._subclasses import FakeTensorMode

NAMES = ("exp", "log", "softmax", "log_softmax", "logsumexp", "cumsum")


def results(device):
    """The types under autocast of what these functions return for bf16 on this device."""
    h = torch.ones(4, 4, device=device, dtype=torch.bfloat16)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, torch.bfloat16)
    found = set()
    for name in NAMES:
        arguments = [] if name in ("exp", "log") else [1]
        found.add(str(getattr(torch, name)(h, *arguments).dtype))
    torch.set_autocast_enabled(device, False)
    return found


with FakeTensorMode():
    cuda = results("cuda")
cpu = results("cpu")
logits = 20 + torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
with torch.autocast("cpu", torch.bfloat16):
    low = logits.bfloat16().logsumexp(1)
error = (low.double() - logits.bfloat16().double().logsumexp(1)).abs().max().item()
print(f"{', '.join(NAMES)}: cuda {cuda}, cpu {cpu}; largest error of logsumexp {error:.3f} nats")
assert cuda == {"torch.float32"} and cpu == {"torch.bfloat16"} and error > 0.05
END
