#!/usr/bin/env bash
# Guess:    onnxruntime's sigmoid is float32's, so the exported F.logsigmoid, log(sigmoid(x)), is
#           right down to -87, where sigmoid itself leaves float32's range.
# Seen:     on CPUs onnxruntime's Sigmoid knows only multiples of 3e-8 near 0, and is exactly 0
#           from -18 on; F.logsigmoid(-20) is therefore -inf instead of -20. PyTorch's is right to
#           -1e38.
# Versions: torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.4.6
# Date:     2026-12-01
# Matters:  flows take the log of a sigmoid as their log-scale, and discretised logistic mixtures
#           sum logsigmoids: one channel at -18 makes the whole image's exported log-density -inf,
#           and the inverse divides by zero. Export -softplus(-x), which is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile --disable-pip-version-check torch==2.13.0 onnx==1.23.2 \
    onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.4.6
cat > check.py <<'END'
import contextlib
import io
import logging
import warnings

import numpy as np
import onnxruntime
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
    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(Function(function).eval(), (x,), dynamo=True)
    program.save("model.onnx")
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


x = torch.linspace(-30, 0, 301)
sigmoid = exported(torch.sigmoid, x)
logsigmoid = exported(F.logsigmoid, x)
softplus = -exported(lambda x: F.softplus(-x), x)
right = F.logsigmoid(x).numpy()
assert torch.sigmoid(x).min() > 9e-14, "PyTorch's"
below = x.numpy() < -18.05
assert (sigmoid[below] == 0).all(), sigmoid[below].max()
assert (logsigmoid[below] == -np.inf).all(), logsigmoid[below].max()
assert np.allclose(softplus, right, rtol=1e-4), np.abs(softplus - right).max()
wrong = int((logsigmoid == -np.inf).sum())
error = np.abs(softplus / right - 1).max()
print(f"in onnxruntime sigmoid(-20) is {sigmoid[100]:.0f} and F.logsigmoid(-20) {logsigmoid[100]}, "
      f"as for {wrong} of 301 points in [-30, 0]; -softplus(-x) is right to {error:.0e}")
END
venv/bin/python check.py
