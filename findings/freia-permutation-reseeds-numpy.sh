#!/usr/bin/env bash
# Guess: FrEIA's PermuteRandom with seed=3 uses that seed for its permutation alone.
# What happens: it seeds NumPy's global generator with 3 and leaves it so. Whatever seed a run had
# set, after building the model it goes on with the numbers that follow seed 3: the same data order
# and the same augmentations for every seed.
# FrEIA==0.2, torch==2.13.0, numpy==2.4.6, 2026-12-01.
# Why it matters: several seeds of a run share what they draw from NumPy, so that the spread that is
# reported over seeds is too small. Set the seed after building the model, or use a Generator.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile torch==2.13.0 numpy==2.4.6 scipy==1.17.1 FrEIA==0.2
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'END'
import FrEIA.framework
import FrEIA.modules
import numpy as np


def order(run, **options):
    """The data order that a run with this seed draws after it has built its model."""
    np.random.seed(run)
    flow = FrEIA.framework.SequenceINN(8)
    flow.append(FrEIA.modules.PermuteRandom, **options)
    return np.random.permutation(1000).tolist()


seeded = [order(run, seed=3) for run in range(4)]
unseeded = [order(run) for run in range(4)]
different = [len({tuple(order) for order in orders}) for orders in (seeded, unseeded)]
print(f"different data orders in 4 runs: {different[0]} with PermuteRandom(seed=3), {different[1]} "
      "without its seed")
assert different == [1, 4]
END
