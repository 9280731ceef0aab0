#!/usr/bin/env bash
# Guess: safetensors.numpy.save_file of a transposed array (weights (in, out) turned to (out, in),
# or images from HWC to CHW) stores its values, or raises an error as safetensors.torch does.
# What happens: 0.8.0 copies the memory as it lies and writes the transposed shape. The file loads
# without a word, with the right shape and values in the wrong places. 0.7.0 was right.
# safetensors==0.8.0 and 0.7.0, numpy==2.4.6, 2026-12-01.
# Why it matters: converting weights between JAX and PyTorch transposes every matrix; such a file
# loads strictly and only the samples show it. np.ascontiguousarray before saving helps.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile safetensors==0.8.0 numpy==2.4.6
venv/bin/pip install -qq --no-compile --no-deps --target old safetensors==0.7.0
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'END'
import subprocess
import sys

import numpy as np

TRY = """
import sys
sys.path[:0] = sys.argv[1:]
import numpy as np, safetensors
from safetensors.numpy import load_file, save_file
weight = np.arange(12, dtype=np.float32).reshape(3, 4)
images = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)
arrays = {"weight": weight.T, "images": images.transpose(0, 3, 1, 2)}
save_file(arrays, "a.safetensors")
loaded = load_file("a.safetensors")
shapes = all(loaded[name].shape == arrays[name].shape for name in arrays)
wrong = sum(int((loaded[name] != arrays[name]).sum()) for name in arrays)
save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, "b.safetensors")
loaded = load_file("b.safetensors")
fine = all(np.array_equal(loaded[name], arrays[name]) for name in arrays)
print(safetensors.__version__, shapes, wrong, fine)
"""
new = subprocess.check_output([sys.executable, "-c", TRY], text=True).split()
old = subprocess.check_output([sys.executable, "-c", TRY, "old"], text=True).split()
print(f"values in the wrong place, of 60: {new[2]} with {new[0]}, {old[2]} with {old[0]}; "
      f"right after ascontiguousarray: {new[3]}")
assert new[:2] == ["0.8.0", "True"] and int(new[2]) > 40 and new[3] == "True"
assert old == ["0.7.0", "True", "0", "True"]
END
