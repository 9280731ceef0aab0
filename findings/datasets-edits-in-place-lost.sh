#!/usr/bin/env bash
# Guess: in datasets.map, an image that is edited in place (thumbnail, ImageDraw, paste) is stored
# as edited, like one that resize() or convert() returns.
# What happens: an image that was opened from a file is stored as the path of that file. So the edit
# is dropped without a word, and the mapped set holds the original pictures: map() with
# image.thumbnail((64, 64)) on an imagefolder still gives 320 x 256 pixels.
# datasets==5.2.0, pillow==13.0.0, 2026-12-01.
# Why it matters: thumbnail() is the usual way to shrink a set before training; masks and boxes are
# drawn in place too. The model then trains on pictures that were never shrunk or masked.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile datasets==5.2.0 pillow==13.0.0 numpy==2.4.6
HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'END'
import os

import datasets
import numpy as np
from PIL import Image, ImageDraw

datasets.disable_progress_bars()
os.mkdir("images")
pixels = np.random.default_rng(0).integers(0, 256, (256, 320, 3), np.uint8)
Image.fromarray(pixels).save("images/a.png")
images = datasets.load_dataset("imagefolder", data_dir="images", split="train")


def shrunk_in_place(row):
    row["image"].thumbnail((64, 64))
    return {"image": row["image"]}


def masked_in_place(row):
    ImageDraw.Draw(row["image"]).rectangle((0, 0, 200, 200), fill="black")
    return {"image": row["image"]}


def shrunk_copy(row):
    return {"image": row["image"].resize((64, 51))}


in_place = images.map(shrunk_in_place)[0]["image"].size
copied = images.map(shrunk_copy)[0]["image"].size
masked = np.asarray(images.map(masked_in_place)[0]["image"])
same = np.array_equal(masked, pixels)
print(f"thumbnail: {in_place}, resize: {copied}, masked picture equals the original: {same}")
assert in_place == (320, 256) and copied == (64, 51) and same
END
