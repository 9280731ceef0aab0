#!/usr/bin/env bash
# Guess:    torch.compile gives expm1, erf and atanh to float32's precision, as eager PyTorch
#           does; that is what expm1 exists for.
# Seen:     in the vectorised loops that Inductor writes for CPUs, expm1(x) is exp(x) - 1,
#           atanh(x) half the log of (1 + x) / (1 - x), and erf an approximation that is good to
#           1e-7 of 1, not of erf(x): all three are 0 at 1e-8, and off by 0.1% to 2% at 1e-5.
#           log(-expm1(-x)), a stable form on paper, becomes -inf. F.elu is affected too.
# Versions: torch==2.13.0 numpy==2.4.6, and a C++ compiler
# Date:     2026-12-01
# Matters:  discretised likelihoods (differences of two CDFs), inverse softplus, the logs of 1 -
#           e^-x in samplers and variance schedules: a density that is exact in eager mode is -inf
#           or wrong after torch.compile, on CPUs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
export TORCHINDUCTOR_CACHE_DIR="$folder/cache"
cat > check.py <<'END'
import torch

torch.set_num_threads(1)
x = torch.tensor([1e-8, 1e-5]).repeat(64)
FUNCTIONS = {
    "expm1": torch.expm1,
    "erf": torch.erf,
    "atanh": torch.atanh,
    "log(-expm1(-x))": lambda x: torch.log(-torch.expm1(-x)),
}
compiled = {}
for name, function in FUNCTIONS.items():
    exact = function(x.double())
    eager = function(x).double()
    compiled[name] = torch.compile(function)(x).double()[:2] / exact[:2]
    assert ((eager - exact) / exact).abs().max() < 1e-6, name
for name in ("expm1", "erf", "atanh"):
    assert compiled[name][0] == 0, (name, compiled[name])
    assert 5e-4 < abs(compiled[name][1] - 1) < 0.3, (name, compiled[name])
assert torch.isinf(compiled["log(-expm1(-x))"][0]), compiled
text = ", ".join(
    f"{name} {float(ratio[0]):.3g} and {float(ratio[1]):.4f}" for name, ratio in compiled.items())
print(f"compiled / exact at x = 1e-8 and 1e-5: {text}; eager: 1.000 for all")
END
venv/bin/python check.py
