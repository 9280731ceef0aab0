#!/usr/bin/env bash
# Guess: HDF5 and zarr, left to choose the chunks of an array of images (N, H, W, C), put whole
# images into a chunk, so that reading one image reads one chunk.
# What happens: both halve all axes in turn. CIFAR-10's shape gets chunks of 6250 x 4 x 4 x 1 (h5py)
# and 12500 x 8 x 8 x 2 (zarr): one image of 3 KB touches 192 chunks or 32, that is it decodes 19 or
# 51 MB, and colours lie in different chunks. h5py does so too as soon as compression or maxshape is
# given without chunks.
# h5py==3.16.0, zarr==3.1.6, numpy==2.4.6, 2026-12-01.
# Why it matters: training reads images one by one in random order; with chunks=(1, H, W, C) each
# read decodes nothing else.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile h5py==3.16.0 zarr==3.1.6 numpy==2.4.6
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'END'
import math

import h5py
import zarr

shape = (50000, 32, 32, 3)
with h5py.File("a.h5", "w") as file:
    hdf5 = file.create_dataset("chunks", shape, "u1", chunks=True).chunks
    packed = file.create_dataset("packed", shape, "u1", compression="gzip").chunks
auto = zarr.create_array(store="a.zarr", shape=shape, dtype="uint8", chunks="auto").chunks


def touched(chunk):
    """How many chunks hold one image, and how many bytes they decode to."""
    count = math.prod(-(-size // part) for size, part in zip(shape[1:], chunk[1:], strict=True))
    return count, count * math.prod(chunk)


print(f"one image of {math.prod(shape[1:])} bytes: h5py {hdf5} {touched(hdf5)}, "
      f"zarr {auto} {touched(auto)} (chunks, bytes)")
assert hdf5 == packed == (6250, 4, 4, 1) and touched(hdf5) == (192, 19200000)
assert auto == (12500, 8, 8, 2) and touched(auto) == (32, 51200000)
END
