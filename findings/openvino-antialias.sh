#!/usr/bin/env bash
# Guess:    F.interpolate(..., antialias=True) in an exported model gives the same pixels in
#           onnxruntime and OpenVINO as in PyTorch, or OpenVINO says that it cannot do it.
# Seen:     ONNX's Resize carries antialias=1 and onnxruntime obeys, to 1e-6. OpenVINO reads the
#           model without a word and resizes with no antialiasing: for bilinear exactly the pixels
#           of antialias=False. Enlarging bicubically, where nothing can alias, differs at the
#           border alone, where OpenVINO repeats the outermost pixels instead of leaving out what
#           lies beyond.
# Versions: openvino==2026.4.1 onnxruntime==1.32.0 torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2
#           numpy==2.4.6
# Date:     2026-12-01
# Matters:  networks that score images get them resized, and FID depends on the filter. A resize
#           inside an exported network must be compared with the original in the runtime that is
#           to run it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile --disable-pip-version-check torch==2.13.0 onnx==1.23.2 \
    onnxscript==0.7.2 onnxruntime==1.32.0 openvino==2026.4.1 numpy==2.4.6
cat > check.py <<'END'
import contextlib
import io
import logging
import warnings

import numpy as np
import onnxruntime
import openvino
import torch
import torch.nn.functional as F
from torch import nn

torch.set_num_threads(1)
logging.disable(logging.CRITICAL)
warnings.filterwarnings("ignore")


class Resize(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, x):
        return F.interpolate(x, **self.options)


def difference(a, b):
    return float(np.abs(a - b.numpy()).max())


torch.manual_seed(0)
x = torch.rand(1, 3, 64, 64)
found = {}
for mode in ("bilinear", "bicubic"):
    for size in (16, 128):
        options = dict(size=(size, size), mode=mode)
        resize = Resize(antialias=True, **options)
        with contextlib.redirect_stdout(io.StringIO()):
            program = torch.onnx.export(resize.eval(), (x,), dynamo=True)
        program.save("model.onnx")
        session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
        ort = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        precision = {"INFERENCE_PRECISION_HINT": "f32"}
        ov = openvino.Core().compile_model("model.onnx", "CPU", precision)([x.numpy()])[0]
        assert difference(ort, resize(x)) < 1e-5, (mode, size)
        plain = F.interpolate(x, antialias=False, **options)
        if mode == "bilinear":
            assert difference(ov, plain) < 1e-5, (mode, size)
        found[mode, size] = difference(ov, resize(x))
        if (mode, size) == ("bicubic", 128):
            inner = (..., slice(8, -8), slice(8, -8))
            assert difference(ov[inner], resize(x)[inner]) < 1e-5
assert found["bilinear", 16] > 0.1 and found["bicubic", 16] > 0.1, found
assert found["bilinear", 128] < 1e-5, found
assert 0.003 < found["bicubic", 128] < 0.2, found
print(f"OpenVINO against PyTorch, antialias=True, pixels in [0, 1]: 64 to 16 pixels bilinear "
      f"{found['bilinear', 16]:.2f}, bicubic {found['bicubic', 16]:.2f}; 64 to 128 bicubic "
      f"{found['bicubic', 128]:.3f}, at the border; onnxruntime below 1e-5")
END
venv/bin/python check.py
