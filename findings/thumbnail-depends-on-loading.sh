#!/usr/bin/env bash
# Guess: Image.thumbnail gives the same pixels whether or not the JPEG was decoded before, and the
# pixels of resize() to that size, as the filter is the same (bicubic).
# What happens: on a JPEG that is still closed, thumbnail() lets the decoder shrink it first (by
# DCT); on one that was loaded, converted or turned upright, it shrinks by a box filter first. The
# two differ by up to about ten levels, by more than one on average, and each differs from resize().
# pillow==13.0.0, 2026-12-01.
# Why it matters: two loaders that both call thumbnail((64, 64)) make different training sets; so
# does one call of load() or exif_transpose() more. A reference for FID must be made in one way
# only.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile pillow==13.0.0 numpy==2.4.6
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'END'
import io

import numpy as np
from PIL import Image

y, x = np.mgrid[:600, :800]
waves = np.stack([np.sin(x / 7 + y / 31), np.sin(x / 9), np.cos(y / 5)], -1)
noise = np.random.default_rng(0).normal(0, 6, (600, 800, 3))
pixels = (127 + 110 * waves + noise).clip(0, 255).astype(np.uint8)
pixels[100:300, 100:340] = 255, 0, 0
file = io.BytesIO()
Image.fromarray(pixels).save(file, "JPEG", quality=95)

closed = Image.open(file)
closed.thumbnail((64, 64))
loaded = Image.open(file)
loaded.load()
loaded.thumbnail((64, 64))
resized = Image.open(file).resize(closed.size, Image.Resampling.BICUBIC)
closed, loaded, resized = (np.asarray(image).astype(int) for image in (closed, loaded, resized))


def apart(a, b):
    return int(np.abs(a - b).max()), round(float(np.abs(a - b).mean()), 2)


print(f"levels apart (max, mean): closed and loaded {apart(closed, loaded)}, loaded and resize "
      f"{apart(loaded, resized)}, closed and resize {apart(closed, resized)}")
assert apart(closed, loaded)[0] >= 6 and apart(closed, loaded)[1] > 0.5
assert apart(loaded, resized)[0] >= 4 and apart(closed, resized)[0] >= 2
END
