#!/usr/bin/env bash
# Guess: PCA(whiten=True) leaves a pixel that never changes in the training set out of account, or
# at least keeps it finite and small: its output on the training set shows nothing unusual.
# What happens: its direction is divided by the root of what rounding leaves of its variance. The
# training set maps to 0 there; an image whose pixel is off by 0.01 maps to 80,000 in float32 and to
# more than 100,000 in float64.
# scikit-learn==1.9.1, numpy==2.4.6, 2026-12-01.
# Why it matters: the corners of MNIST are constant. Whitening fitted on clean images and applied to
# noised images, to samples or to a test set with one stray pixel gives features and distances that
# consist of that pixel. Fit it with the noise, or bound the variance from below.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile scikit-learn==1.9.1 numpy==2.4.6 scipy==1.17.1
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'END'
import numpy as np
from sklearn.decomposition import PCA

rng = np.random.default_rng(0)
images = rng.normal(size=(500, 16))
images[:, 3] = 0.25  # a corner that is always background
test = images.copy()
test[:, 3] = 0.26
found = []
for dtype in (np.float32, np.float64):
    pca = PCA(whiten=True).fit(images.astype(dtype))
    train = np.abs(pca.transform(images.astype(dtype))).max()
    new = np.abs(pca.transform(test.astype(dtype))).max()
    found += [float(train), float(new)]
print(f"largest whitened value, training set and images off by 0.01 in that pixel: float32 "
      f"{found[0]:.1f} and {found[1]:.0f}, float64 {found[2]:.1f} and {found[3]:.1e}")
assert found[0] < 10 and found[2] < 10 and found[1] > 1e4 and found[3] > 1e5
END
