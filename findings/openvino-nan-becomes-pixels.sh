#!/usr/bin/env bash
# Guess:    a NaN in an exported model stays NaN up to its output, as in PyTorch and onnxruntime.
# Seen:     in OpenVINO on CPUs relu, clamp and maximum turn NaN into a number: relu(NaN) is 0,
#           NaN clamped to [-1, 1] is -1, maximum(NaN, 1) is 1. A second surprise: softplus is
#           slightly *negative* (-1.9e-6) or 0 between -30 and -17.7, so that the log of a scale
#           made by it is NaN.
# Versions: openvino==2026.4.1 onnxruntime==1.32.0 torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2
#           numpy==2.4.6
# Date:     2026-12-01
# Matters:  samplers end with clamp(-1, 1). There a broken sample is a black image, a valid
#           picture that scores count, instead of NaN, which a check would find: look for NaN
#           before the clamp.
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


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def exported(function, x):
    """The function's values in onnxruntime and in OpenVINO, both in float32."""
    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(Function(function).eval(), (x,), dynamo=True)
    program.save("model.onnx")
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    ort = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    ov = openvino.Core().compile_model("model.onnx", "CPU", options)([x.numpy()])[0]
    return ort, np.array(ov)


x = torch.tensor([-4.0, 0.25] * 16)  # the root of a negative number is NaN
FUNCTIONS = {
    "relu": lambda x: F.relu(torch.sqrt(x)),
    "clamp": lambda x: torch.sqrt(x).clamp(-1, 1),
    "maximum with 1": lambda x: torch.maximum(torch.sqrt(x), torch.ones_like(x)),
}
values = {}
for name, function in FUNCTIONS.items():
    ort, ov = exported(function, x)
    assert function(x)[::2].isnan().all(), name
    assert np.isnan(ort[::2]).all(), (name, ort)
    assert np.isfinite(ov).all(), (name, ov)
    assert np.allclose(ov[1::2], function(x)[1::2]), (name, ov)
    values[name] = float(ov[0])
assert values == {"relu": 0, "clamp": -1, "maximum with 1": 1}, values
x = torch.linspace(-30, 0, 301)
ort, ov = exported(F.softplus, x)
assert ort.min() > 0 and F.softplus(x).min() > 0
assert -1e-5 < ov.min() < 0, ov.min()
negative = int((ov < 0).sum())
zero = int((ov == 0).sum())
zero = int((ov == 0).sum())
print(f"OpenVINO's NaN: {', '.join(f'{name} {value:.0f}' for name, value in values.items())}; "
      f"softplus is negative at {negative} and 0 at {zero} of 301 points in [-30, 0]")
END
venv/bin/python check.py
