#!/usr/bin/env bash
# Guess:    torch.logaddexp, log1p and expm1 stay what they are in an exported ONNX model, at
#           least as stable as logsumexp, which does.
# Seen:     ONNX has no such operators, and torch.onnx.export writes the textbook formulas:
#           logaddexp becomes log(exp(a) + exp(b)), which is inf from 89 on and -inf below -104 or
#           so, log1p(x) is log(1 + x), expm1(x) is exp(x) - 1, both 0 at 1e-8. The export warns
#           of nothing. The same sum of two densities written with logsumexp is right.
# Versions: torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.4.6
# Date:     2026-12-01
# Matters:  log-densities of images are sums over thousands of values and lie far beyond +-100: an
#           exported mixture, guidance or importance weight with logaddexp is infinite. Write
#           logsumexp over a stack.
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


x = torch.tensor([-200.0, -1.0, 1.0, 100.0])
added = exported(lambda x: torch.logaddexp(x, x - 1), x)
summed = exported(lambda x: torch.logsumexp(torch.stack([x, x - 1]), 0), x)
right = torch.logaddexp(x, x - 1).numpy()
assert np.allclose(summed, right), summed
assert np.allclose(added[1:3], right[1:3]), added
assert added[0] == -np.inf and added[3] == np.inf, added
small = torch.tensor([1e-8, 1e-5])
log1p = exported(torch.log1p, small)
expm1 = exported(torch.expm1, small)
assert np.allclose(torch.log1p(small), small, rtol=1e-4), "eager"
assert log1p[0] == 0 and expm1[0] == 0, (log1p, expm1)
print(f"logaddexp(x, x - 1) at -200 and 100: {added[0]} and {added[3]} after export, logsumexp "
      f"{summed[0]:.2f} and {summed[3]:.2f}; log1p(1e-8) {log1p[0]:.0f}, expm1 {expm1[0]:.0f}")
END
venv/bin/python check.py
