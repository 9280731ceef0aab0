#!/usr/bin/env bash
# Guess: saving an image with quality=100 keeps its pixels to a few levels, whichever package saves.
# What happens: Pillow's JPEG, lossy WebP and AVIF, and OpenCV's and imagecodecs's JPEG, still halve
# the colour planes at quality 100: off by about 185 levels at coloured edges. Only simplejpeg's
# default does not (3 levels). For Pillow's JPEG subsampling=0 helps, for its AVIF
# subsampling="4:4:4".
# pillow==13.0.0, opencv-python-headless==5.0.0.93, simplejpeg==1.9.0, imagecodecs==2026.3.6,
# 2026-12-01.
# Why it matters: "quality 100" copies of samples or of a reference are not the images that a model
# made, and small images with saturated colours (digits, sprites, icons) suffer most.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile pillow==13.0.0 \
    opencv-python-headless==5.0.0.93 simplejpeg==1.9.0 imagecodecs==2026.3.6 numpy==2.4.6
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'END'
import io

import cv2
import imagecodecs
import numpy as np
import simplejpeg
from PIL import Image

pixels = np.zeros((64, 64, 3), np.uint8)
pixels[10:31, 10:41] = 255, 0, 0
pixels[25:50, 33:55] = 0, 0, 255


def by_pillow(format, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, quality=100, **options)
    return np.asarray(Image.open(file).convert("RGB"))


def by_cv2():
    _, data = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 100])
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]


results = {
    "Pillow JPEG": by_pillow("JPEG"),
    "WebP": by_pillow("WEBP"),
    "AVIF": by_pillow("AVIF"),
    "cv2": by_cv2(),
    "imagecodecs": imagecodecs.jpeg_decode(imagecodecs.jpeg_encode(pixels, level=100)),
    "simplejpeg": simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(pixels, quality=100)),
    "JPEG subsampling=0": by_pillow("JPEG", subsampling=0),
    "AVIF 4:4:4": by_pillow("AVIF", subsampling="4:4:4"),
}
errors = {name: int(np.abs(result.astype(int) - pixels).max()) for name, result in results.items()}
print("largest error in levels:", ", ".join(f"{name} {error}" for name, error in errors.items()))
errors = list(errors.values())
assert min(errors[:5]) > 80 and max(errors[5:]) <= 6
END
