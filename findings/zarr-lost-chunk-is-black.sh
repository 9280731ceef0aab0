#!/usr/bin/env bash
# Guess: a zarr array of images with a missing chunk file (a copy or upload that was cut short)
# raises an error when those images are read.
# What happens: a missing chunk is by definition full of the fill value 0. The images are black, of
# the right shape and type, and nothing warns; an array that was never written at all reads the
# same.
# zarr==3.1.6, numpy==2.4.6, 2026-12-01.
# Why it matters: a training set with black stretches trains; a reference for FID with them scores.
# Compare nchunks_initialized with nchunks, or count images that are all zero, after each copy.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile zarr==3.1.6 numpy==2.4.6
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'END'
import pathlib

import numpy as np
import zarr

images = np.random.default_rng(0).integers(1, 256, (100, 16, 16, 3), np.uint8)
array = zarr.create_array("a.zarr", shape=images.shape, dtype="uint8", chunks=(10, 16, 16, 3))
array[:] = images
files = sorted(path for path in pathlib.Path("a.zarr/c").rglob("*") if path.is_file())
files[3].unlink()
array = zarr.open_array("a.zarr", mode="r")
read = array[:]
black = int((read.reshape(100, -1).max(1) == 0).sum())
print(f"{black} of 100 images are black without an error; chunks present: "
      f"{array.nchunks_initialized} of {array.nchunks}")
assert black == 10 and read.shape == images.shape
assert array.nchunks_initialized == 9 and array.nchunks == 10
END
