#!/usr/bin/env bash
# Guess:    a checkpoint is a zip, so zipped again with compression it is loaded by torch.load as
#           before, with mmap=True too, or with a message that says that it is compressed.
# Seen:     torch.load reads it, with equal tensors and a fifth fewer bytes for bfloat16 weights.
#           With mmap=True the same file ends in "Trying to resize storage that is not resizable",
#           which says nothing of compression. torch.save writes uncompressed files alone.
# Versions: torch==2.13.0 numpy==2.4.6
# Date:     2026-12-01
# Matters:  weights for download can be a fifth smaller with no code at the reader's side, unless
#           the reader maps files to save memory, as loaders of large models do by default.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > check.py <<'END'
import os
import zipfile

import torch

torch.manual_seed(0)
weights = {"a": 0.02 * torch.randn(1000, 1000), "b": torch.randn(1000)}
weights = {name: tensor.bfloat16() for name, tensor in weights.items()}
torch.save(weights, "plain.pt")
with zipfile.ZipFile("plain.pt") as plain:
    assert not any(part.compress_type for part in plain.infolist())
    with zipfile.ZipFile("small.pt", "w", zipfile.ZIP_DEFLATED) as small:
        for part in plain.infolist():
            small.writestr(part.filename, plain.read(part))
ratio = os.path.getsize("small.pt") / os.path.getsize("plain.pt")
assert 0.7 < ratio < 0.9, ratio
loaded = torch.load("small.pt", weights_only=True)
assert all(torch.equal(loaded[name], weights[name]) for name in weights)
mapped = torch.load("plain.pt", weights_only=True, mmap=True)
assert all(torch.equal(mapped[name], weights[name]) for name in weights)
try:
    torch.load("small.pt", weights_only=True, mmap=True)
    error = "none"
except RuntimeError as raised:
    error = str(raised).splitlines()[0]
assert "resize storage" in error, error
print(f"compressed: {ratio:.2f} of the bytes, equal tensors; with mmap=True: {error}")
END
venv/bin/python check.py
