#!/usr/bin/env bash
# Guess: torchvision turns floats in [0, 1] into 8 bits in one way; an 8-bit image that a model maps
# to [-1, 1] and back comes out unchanged.
# What happens: save_image and v2.ToDtype(torch.uint8, scale=True) round. ToPILImage and
# v2.functional.to_pil_image cut off, and so does webdataset's writer: 63 of the 256 levels come
# back one level darker after [-1, 1], and images of a model lose half a level on average.
# torchvision==0.28.0, torch==2.13.0, webdataset==1.0.2, 2026-12-01.
# Why it matters: half a level everywhere is a shift that FID's features see, and whether it is
# there depends on which of two functions of one package wrote the PNG.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile torch==2.13.0 numpy==2.4.6 pillow==13.0.0 webdataset==1.0.2
venv/bin/pip install -qq --no-compile --no-deps torchvision==0.28.0
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'END'
import torch

# PyPI's torchvision is built for CUDA; its compiled operators, none of them used here, do not
# load beside a CPU build of torch, so their registration is skipped.
torch.library.register_fake = lambda *args, **kwargs: lambda function: function

import io

import numpy as np
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import save_image
from webdataset.writer import imageencoder


def saved(x):
    file = io.BytesIO()
    save_image(x[None], file, format="PNG", padding=0)
    return np.asarray(Image.open(file))


def by_webdataset(x):
    return np.asarray(Image.open(io.BytesIO(imageencoder(x.permute(1, 2, 0).numpy(), "PNG"))))


WAYS = {
    "ToPILImage": lambda x: np.asarray(to_pil_image(x)),
    "v2.to_pil_image": lambda x: np.asarray(v2.functional.to_pil_image(x)),
    "webdataset": by_webdataset,
    "save_image": saved,
    "ToDtype": lambda x: v2.ToDtype(torch.uint8, scale=True)(x).permute(1, 2, 0).numpy(),
}
levels = torch.arange(256.0).view(16, 16).expand(3, 16, 16)
back = ((levels / 127.5 - 1) + 1) / 2
samples = torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(0))
changed = []
shift = []
for way in WAYS.values():
    changed.append(int((way(back)[..., 0] != levels[0].numpy()).sum()))
    shift.append(float((way(samples) - 255 * samples.permute(1, 2, 0).numpy()).mean()))
print("levels changed, mean shift:", ", ".join(
    f"{name} {c}, {s:+.2f}" for name, c, s in zip(WAYS, changed, shift, strict=True)))
assert changed[0] == changed[1] == changed[2] > 40 and changed[3] == changed[4] == 0
assert all(abs(s + 0.5) < 0.01 for s in shift[:3]) and all(abs(s) < 0.01 for s in shift[3:])
END
