#!/usr/bin/env bash
# Guess: precision, recall, density and coverage of a set against itself are all 1.
# What happens: if each image occurs more than k times (k = 5: six copies), all four are exactly 0.
# A ball reaches to the k-th neighbour, here another copy at distance 0, and prdc counts what lies
# strictly inside (with real-valued features rounding decides, copy by copy). Kynkäänniemi's
# definition counts the rim too and gives 1. With a fifth of the reference repeated, the score of a
# perfect model falls as well.
# prdc==0.2, scikit-learn==1.9.1, 2026-12-01.
# Why it matters: icons, digits, blank pages and oversampled classes come in many equal copies; so
# do sets that were padded to a full batch. The scores then speak of the copies.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile prdc==0.2 numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'END'
import contextlib
import importlib.util
import io
import sysconfig

import numpy as np

# The package's __init__ asks for torchvision; its scores need NumPy and scikit-learn alone.
path = sysconfig.get_path("purelib") + "/prdc/prdc.py"
spec = importlib.util.spec_from_file_location("prdc_scores", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

rng = np.random.default_rng(0)
features = rng.integers(0, 256, (600, 64)).astype(np.float32)  # pixels: sums are exact
copies = np.concatenate([features[:100]] * 6)
partly = np.concatenate([features[:480], *[features[:20]] * 6])  # 20 of them seven times


def scores(real, fake):
    with contextlib.redirect_stdout(io.StringIO()):
        return [round(float(score), 3) for score in module.compute_prdc(real, fake, 5).values()]


def with_rim(real, fake, k=5):
    """Precision whose balls include their rim."""
    def distances(a, b):
        return (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    radii = np.sort(distances(real, real), 1)[:, k]
    return float((distances(fake, real) <= radii).any(1).mean())


plain = scores(features, features)
all_copies = scores(copies, copies)
some_copies = scores(partly, partly)
print(f"a set against itself (precision, recall, density, coverage): {plain}, each image six times "
      f"{all_copies} (with the rim: precision {with_rim(copies, copies)}), some {some_copies}")
assert plain == [1, 1, 1, 1] and all_copies == [0, 0, 0, 0] and with_rim(copies, copies) == 1
assert some_copies[0] == some_copies[1] < 0.9 and some_copies[3] < 0.9
END
