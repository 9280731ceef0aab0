#!/usr/bin/env bash
# Guess: datasets.map with a function that returns the image as it got it keeps the JPEG's bytes, or
# at least stores its pixels without loss, as it does for what resize() returns.
# What happens: pictures that came as bytes (Parquet, as on the Hub) are saved again as JPEG with
# Pillow's default quality 75, whatever the quality of the original. A converted copy becomes a PNG.
# So whether a set is degraded hangs on whether the function made a copy.
# datasets==5.2.0, pillow==13.0.0, 2026-12-01.
# Why it matters: a map() that only cleans labels but returns all columns bakes JPEG artefacts into
# the training images and into the reference statistics of FID.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile datasets==5.2.0 pillow==13.0.0 numpy==2.4.6
HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'END'
import io

import datasets
import numpy as np
from PIL import Image

datasets.disable_progress_bars()
y, x = np.mgrid[:256, :320]
waves = [np.sin(x / 17 + y / 31), np.sin(x / 9), np.cos(y / 13)]
noise = np.random.default_rng(0).normal(0, 6, (256, 320, 3))
pixels = (127 + 100 * np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8)
file = io.BytesIO()
Image.fromarray(pixels).save(file, "JPEG", quality=95)
features = datasets.Features({"image": datasets.Image()})
rows = {"image": [{"bytes": file.getvalue(), "path": None}]}
datasets.Dataset.from_dict(rows, features).to_parquet("set.parquet")
images = datasets.load_dataset("parquet", data_files="set.parquet", split="train")
before = np.asarray(images[0]["image"]).astype(int)


def stored(function):
    """The size in bytes, the format and the error of what map(function) stores."""
    mapped = images.map(function)
    data = mapped.cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"]
    error = np.abs(np.asarray(mapped[0]["image"]).astype(int) - before)
    return len(data), Image.open(io.BytesIO(data)).format, error.max(), error.mean()


same = stored(lambda row: {"image": row["image"]})
copy = stored(lambda row: {"image": row["image"].convert("RGB")})
size = len(file.getvalue())
print(f"original {size} bytes; returned as it was: {same[0]} bytes of {same[1]}, off by up to "
      f"{same[2]} levels, {same[3]:.1f} on average; convert('RGB'): {copy[1]}, off by {copy[2]}")
assert same[1] == "JPEG" and same[0] < size / 2 and same[2] > 10 and same[3] > 2
assert copy[1] == "PNG" and copy[2] == 0
END
