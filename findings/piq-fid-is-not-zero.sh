#!/usr/bin/env bash
# Guess: piq.FID of features equals the Fréchet distance to a few digits; of a set against itself it
# is 0.
# What happens: its matrix root stops iterating once the relative error of the whole matrix is 1e-5.
# The many small eigenvalues, as features of images have, are not there yet, and each adds to the
# distance. 512 features with a spectrum that falls as 1/i: .3 for a set against itself, and 2.5
# instead of 2.2 for two sets; with 2,048 features 8.5 and 16.4 instead of 0 and 11.7.
# piq==0.8.0, torch==2.13.0, scipy==1.17.1, 2026-12-01.
# Why it matters: the bias depends on the spectrum, so it moves rankings, and such numbers can stand
# in no table beside those of other tools.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile torch==2.13.0 numpy==2.4.6 pillow==13.0.0 scipy==1.17.1
venv/bin/pip install -qq --no-compile --no-deps torchvision==0.28.0
venv/bin/pip install -qq --no-compile --no-deps piq==0.8.0
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'END'
import torch

# PyPI's torchvision is built for CUDA; its compiled operators, none of them used here, do not
# load beside a CPU build of torch, so their registration is skipped.
torch.library.register_fake = lambda *args, **kwargs: lambda function: function

import numpy as np
import piq
import scipy.linalg

D = 512
generator = torch.Generator().manual_seed(0)
rotation = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
spread = torch.arange(1, D + 1) ** -0.5
spread = 0.3 * D**0.5 * spread / spread.norm()


def features(scale, shift):
    noise = torch.randn(2000, D, generator=generator)
    return (scale * noise * spread @ rotation + shift).relu()


def frechet(x, y):
    x = x.double().numpy()
    y = y.double().numpy()
    a, b = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(a @ b).real
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root)


x = features(1, 0.3)
y = features(1.03, 0.31)
by_piq = [piq.FID()(x, x).item(), piq.FID()(x, y).item()]
true = [frechet(x, x), frechet(x, y)]
print(f"a set against itself: piq {by_piq[0]:.3f}, SciPy {true[0]:.5f}; two sets: piq "
      f"{by_piq[1]:.3f}, SciPy {true[1]:.3f}")
assert abs(true[0]) < 1e-3 and 0.2 < by_piq[0] < 0.5
assert 0.2 < by_piq[1] - true[1] < 0.5
END
