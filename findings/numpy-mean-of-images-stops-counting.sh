#!/usr/bin/env bash
# Guess: float32 images (50000, 32, 32, 3) in [0, 1] have the right mean and standard deviation per
# colour by .mean((0, 1, 2)) and .std((0, 1, 2)); NumPy sums pairwise.
# What happens: it does so only along the last axis in memory. Here each colour is added up one
# number at a time in float32, and stops growing at 2**24: the mean of each colour is exactly
# 0.32768 instead of 0.5. As (N, C, H, W) it is right. Plain uint8 arrays are right, with
# dtype=np.float32 wrong again. In float16 the standard deviation of 2,000 images is 0.03 instead of
# 0.29.
# numpy==2.4.6, 2026-12-01.
# Why it matters: these are the numbers that normalise a training set, and a set of CIFAR's size is
# enough. PyTorch and JAX are right to four digits.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile numpy==2.4.6
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'END'
import numpy as np

images = np.random.default_rng(0).integers(0, 256, (50000, 32, 32, 3), np.uint8)
true = images.mean((0, 1, 2)) / 255, images.std((0, 1, 2)) / 255
floats = images / np.float32(255)
last = floats.mean((0, 1, 2)), floats.std((0, 1, 2))
first = np.ascontiguousarray(floats.transpose(0, 3, 1, 2)).mean((0, 2, 3))
as_float32 = images.mean((0, 1, 2), dtype=np.float32) / 255
half = floats[:2000].astype(np.float16).std((0, 1, 2))
print(f"mean of the first colour: float64 {true[0][0]:.5f}, (N, H, W, C) {last[0][0]:.5f}, "
      f"(N, C, H, W) {first[0]:.5f}, uint8 with dtype=float32 {as_float32[0]:.5f}; deviation: "
      f"{true[1][0]:.5f}, {last[1][0]:.5f}, in float16 {half[0]:.5f}")
assert np.allclose(last[0], 2**24 / (50000 * 32 * 32), atol=1e-6)
assert np.allclose(true[0], 0.5, atol=1e-3)
assert (np.abs(last[1] - true[1]) > 0.02).all() and (np.abs(first - true[0]) < 1e-4).all()
assert (np.abs(as_float32 - true[0]) > 0.1).all() and (half < 0.05).all()
END
