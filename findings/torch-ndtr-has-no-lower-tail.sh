#!/usr/bin/env bash
# Guess: torch.special.ndtr(-6) is 1e-9 in float32, as in SciPy and JAX: that is what the function
# is for, beside 0.5 * (1 + erf(x / sqrt 2)).
# What happens: it is that sum, so everything below about -5.6 is exactly 0, and -5 is off by 4
# percent; in float64 the tail ends at -8.3. Normal.cdf is the same. torch.special.ndtri and
# log_ndtr do have the tail, so ndtri(ndtr(-6)) is -inf, while Normal.icdf(1e-8) is -inf where ndtri
# is right. 0.5 * erfc(-x / sqrt 2) is right everywhere.
# torch==2.13.0, scipy==1.17.1, 2026-12-01.
# Why it matters: probabilities of pixel values as differences of a CDF (discretised Gaussians in
# diffusion and PixelCNN-like models), noise drawn by an inverse CDF, truncated normals: log 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile torch==2.13.0 numpy==2.4.6 scipy==1.17.1
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'END'
import math

import numpy as np
import scipy.special
import torch

x = torch.tensor([-5.0, -6.0, -8.0])
ndtr = torch.special.ndtr(x)
normal = torch.distributions.Normal(torch.tensor(0.0), torch.tensor(1.0))
erfc = 0.5 * torch.erfc(-x / math.sqrt(2))
true = scipy.special.ndtr(x.numpy())
double = torch.special.ndtr(torch.tensor(-9.0, dtype=torch.float64)).item()
u = torch.tensor(1e-8)
print(f"at -5, -6, -8: torch {ndtr.tolist()}, SciPy {true.tolist()}; float64 at -9: {double}; at "
      f"1e-8: Normal.icdf {normal.icdf(u).item()}, ndtri {torch.special.ndtri(u).item():.3f}")
assert ndtr[1:].eq(0).all() and normal.cdf(x)[1:].eq(0).all() and double == 0
assert abs(ndtr[0] / true[0] - 1) > 0.02 and (true > 0).all()
assert np.allclose(erfc, true, rtol=1e-4, atol=0)
assert normal.icdf(u).item() == -math.inf and abs(torch.special.ndtri(u).item() + 5.612) < 1e-3
assert torch.special.ndtri(ndtr[1]).item() == -math.inf
END
