#!/usr/bin/env bash
# Guess: torchmetrics.PeakSignalNoiseRatio() and torchmetrics.image.PeakSignalNoiseRatio are the
# same class; without data_range they ask for it, or take it from the images as before.
# What happens: in 1.9.0 the one in torchmetrics.image demands data_range, the one at the top level
# (and torchmetrics.functional.peak_signal_noise_ratio) assumes data_range=3.0. Images in [0, 1]
# then score 20 log10(3) = 9.54 dB too much; the warning shown speaks of the import alone. SSIM
# still takes its range from the batch: the score of a dim picture depends on what else is in it.
# torchmetrics==1.9.0, torch==2.13.0, 2026-12-01.
# Why it matters: 26 dB read as 36 turns a poor reconstruction into an excellent one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile torch==2.13.0 numpy==2.4.6 torchmetrics==1.9.0
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'END'
import torch
import torchmetrics
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

generator = torch.Generator().manual_seed(0)
images = torch.rand(4, 3, 64, 64, generator=generator)
noisy = (images + 0.05 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
true = -10 * (images - noisy).square().mean().log10().item()
top = torchmetrics.PeakSignalNoiseRatio()(noisy, images).item()
function = torchmetrics.functional.peak_signal_noise_ratio(noisy, images).item()
try:
    torchmetrics.image.PeakSignalNoiseRatio()
    demands = False
except TypeError:
    demands = True
dim = torch.cat([0.2 * images[:1], images[1:]])
dim_noisy = dim + noisy - images
alone = ssim(dim_noisy[:1], dim[:1]).item()
in_batch = ssim(dim_noisy, dim, reduction="none")[0].item()
print(f"PSNR {true:.2f} dB; top level {top:.2f}, functional {function:.2f}; torchmetrics.image "
      f"demands data_range: {demands}; SSIM of one picture alone {alone:.3f}, in a batch "
      f"{in_batch:.3f}")
assert abs(top - true - 9.5424) < 1e-3 and abs(function - top) < 1e-4 and demands
assert in_batch - alone > 0.005
END
