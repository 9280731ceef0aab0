#!/usr/bin/env bash
# Guess: WebDataset(..., shardshuffle=100) visits the shards in a new order in each epoch.
# What happens: the order is drawn once from Python's random, when the object is made, and repeats
# in every epoch, through a DataLoader with workers as well. seed=... fixes it, but does not change
# it per epoch. detshuffle=True counts epochs, but in the workers' copies, which start anew: it
# gives new orders only without workers or with persistent_workers=True.
# webdataset==1.0.2, torch==2.13.0, 2026-12-01.
# Why it matters: each epoch visits the same neighbours in the same order, so that batches are less
# varied than they seem: .shuffle() mixes within its buffer only.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile webdataset==1.0.2 torch==2.13.0 numpy==2.4.6
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'END'
import random

import torch
import webdataset

with webdataset.ShardWriter("s-%03d.tar", maxcount=2, verbose=0) as writer:
    for i in range(40):
        writer.write({"__key__": f"{i:03d}", "cls": i})


def orders(workers=0, persistent=False, **options):
    """How many different orders the labels of three epochs have."""
    random.seed(0)
    data = webdataset.WebDataset("s-{000..019}.tar", **options).decode().map(lambda row: row["cls"])
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=workers, persistent_workers=persistent)
    epochs = [tuple(loader) for _ in range(3)]
    assert list(epochs[0]) != sorted(epochs[0])
    return len(set(epochs))


plain = [orders(shardshuffle=100), orders(2, shardshuffle=100), orders(shardshuffle=100, seed=5)]
det = dict(shardshuffle=100, detshuffle=True)
det = [orders(**det), orders(2, **det), orders(2, True, **det)]
print(f"different orders in 3 epochs: {plain[0]}, with 2 workers {plain[1]}, with a seed {plain[2]}"
      f"; detshuffle {det[0]}, with 2 workers {det[1]}, with 2 persistent workers {det[2]}")
assert plain == [1, 1, 1] and det == [3, 1, 3]
END
