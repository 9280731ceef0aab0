#!/usr/bin/env bash
# Guess: a column declared as Array3D of uint8 comes back as uint8 with with_format("numpy") or
# with_format("torch"), as an Image column does; float16 and float64 keep their type too.
# What happens: the array of uint8 is int64 in both formats, eight times the memory; float16 and
# float64 become float32 in torch. Image columns stay uint8, but as (C, H, W) in torch and as (H, W,
# C) in numpy, while Array3D keeps the order it was stored in.
# datasets==5.2.0, torch==2.13.0, numpy==2.4.6, 2026-12-01.
# Why it matters: pixels or latents stored as arrays fill the memory of a loader eight times over,
# and code that tells pixels from floats by their type (as torchvision's and FID's do) takes another
# path.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile datasets==5.2.0 torch==2.13.0 numpy==2.4.6 pillow==13.0.0
HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'END'
import datasets
import numpy as np

pixels = np.zeros((8, 6, 3), np.uint8)
features = datasets.Features({
    "array": datasets.Array3D((8, 6, 3), "uint8"),
    "image": datasets.Image(),
    "half": datasets.Array2D((2, 3), "float16"),
    "double": datasets.Value("float64"),
})
row = {"array": pixels, "image": pixels, "half": np.ones((2, 3), np.float16), "double": 1 / 3}
data = datasets.Dataset.from_list([row], features)
in_numpy = data.with_format("numpy")[0]
in_torch = data.with_format("torch")[0]
for name in row:
    print(name, in_numpy[name].dtype, in_torch[name].dtype, tuple(in_torch[name].shape), end="; ")
print()
assert in_numpy["array"].dtype == np.int64 and str(in_torch["array"].dtype) == "torch.int64"
assert in_numpy["image"].dtype == np.uint8 and str(in_torch["image"].dtype) == "torch.uint8"
assert in_torch["array"].shape == (8, 6, 3) and in_torch["image"].shape == (3, 8, 6)
assert str(in_torch["half"].dtype) == str(in_torch["double"].dtype) == "torch.float32"
END
