#!/usr/bin/env bash
# Guess: decoders of JPEG differ by a few levels at most; it does not matter which one reads a set.
# What happens: Pillow, OpenCV, simplejpeg and imagecodecs agree to the bit, on subsampled and
# progressive files too. PyAV (FFmpeg, as video loaders use it) repeats the halved colour planes
# instead of interpolating them: on ordinary 4:2:0 files it is off by up to 133 levels at coloured
# edges, by about 5 on average, here. With 4:4:4 files it is within 3.
# av==18.1.0, pillow==13.0.0, opencv-python-headless==5.0.0.93, simplejpeg==1.9.0,
# imagecodecs==2026.3.6, 2026-12-01.
# Why it matters: FID compares features of pixels. Samples or references that were read through
# FFmpeg (frames, video sets) differ from those read by Pillow before any model comes in.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile av==18.1.0 pillow==13.0.0 \
    opencv-python-headless==5.0.0.93 simplejpeg==1.9.0 imagecodecs==2026.3.6 numpy==2.4.6
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'END'
import io

import av
import cv2
import imagecodecs
import numpy as np
import simplejpeg
from PIL import Image

y, x = np.mgrid[:256, :320]
waves = np.stack([np.sin(x / 7 + y / 31), np.sin(x / 9), np.cos(y / 5)], -1)
pixels = (127 + 120 * waves).astype(np.uint8)
pixels[60:120, 60:140] = 255, 0, 0
pixels[100:160, 120:200] = 0, 0, 255


def by_pyav(data):
    with av.open(io.BytesIO(data), format="jpeg_pipe") as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def by_cv2(data):
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


def differences(**options):
    """The largest and the mean difference from Pillow, per decoder."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90, **options)
    data = file.getvalue()
    reference = np.asarray(Image.open(file)).astype(int)
    found = {}
    for decode in (by_pyav, by_cv2, simplejpeg.decode_jpeg, imagecodecs.jpeg_decode):
        error = np.abs(decode(data).astype(int) - reference)
        found[decode.__name__] = int(error.max()), round(float(error.mean()), 2)
    return list(found.values())


halved = differences()
progressive = differences(progressive=True)
full = differences(subsampling=0)
print(f"off from Pillow (max, mean): PyAV {halved[0]}, progressive {progressive[0]}, 4:4:4 "
      f"{full[0]}; cv2, simplejpeg and imagecodecs {halved[1:]}")
assert halved[0] == progressive[0] and halved[0][0] > 80 and halved[0][1] > 3 and full[0][0] <= 3
for others in (halved, progressive, full):
    assert all(error == (0, 0.0) for error in others[1:])
END
