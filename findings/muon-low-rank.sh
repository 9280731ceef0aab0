#!/usr/bin/env bash
# Guess:    for a gradient of rank one, Muon's step has rank one too: the nearest semi-orthogonal
#           matrix within the gradient's own row and column space, with a singular value near 1.
# Seen:     torch.optim.Muon rounds the gradient to bfloat16 first, which leaves a little noise in
#           every direction, and its five Newton-Schulz iterations enlarge small singular values
#           about 480 times. Of the step for a rank-one 128 x 128 gradient about four fifths (in
#           Frobenius norm) lie outside the gradient's space; for rank 4 a half, for rank 16 a
#           third. A second surprise in the same step: "match_rms_adamw" aims at an RMS of 0.2 and
#           gives 0.17, because the iterations end at singular values between 0.7 and 1.2.
# Versions: torch==2.13.0 numpy==2.4.6
# Date:     2026-12-01
# Matters:  the matrix that turns the class or the time of diffusion into shifts and scales sees
#           only as many different inputs as there are classes or images in a batch, so its
#           gradient has a low rank: Muon moves it as far along rounding noise as along the
#           signal. Two machines that round differently, or the same gradient summed in another
#           order, then train differently.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > check.py <<'END'
import torch

torch.set_num_threads(1)
torch.manual_seed(0)


def step_of(gradient, **options):
    weight = torch.nn.Parameter(torch.zeros_like(gradient))
    optimizer = torch.optim.Muon(
        [weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, **options)
    weight.grad = gradient.clone()
    optimizer.step()
    return -weight.detach().double()


def outside(rank):
    gradient = torch.randn(128, rank) @ torch.randn(rank, 128) / 100
    step = step_of(gradient)
    U, _, V = torch.linalg.svd(gradient.double())
    inside = U[:, :rank] @ U[:, :rank].T @ step @ V[:rank].T @ V[:rank]
    return float((step - inside).norm() / step.norm())


shares = {rank: outside(rank) for rank in (1, 4, 16, 128)}
rms = float(step_of(torch.randn(128, 512), adjust_lr_fn="match_rms_adamw").square().mean().sqrt())
assert shares[1] > 0.6, shares
assert shares[4] > 0.35, shares
assert shares[16] > 0.2, shares
assert shares[128] < 1e-3, shares
assert 0.165 < rms < 0.182, rms
text = ", ".join(f"rank {rank}: {share:.2f}" for rank, share in shares.items())
print(f"share of Muon's step outside the gradient's space: {text}; RMS {rms:.3f} instead of 0.2")
END
venv/bin/python check.py
