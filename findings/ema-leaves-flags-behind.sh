#!/usr/bin/env bash
# Guess:    the averaged copy of a model takes the buffers that are no floats, such as flags and
#           counts, from the model.
# Seen:     ema_pytorch averages float buffers and never touches the others: an ActNorm layer
#           whose first batch has set its flag "initialised" is averaged for 300 steps, and in the
#           average the flag is still false. The averaged model then initialises itself anew, from
#           the first batch that it is given: for one image the layer's output is 0, whatever the
#           image.
# Versions: ema_pytorch==0.8.3 torch==2.13.0 numpy==2.4.6
# Date:     2026-12-01
# Matters:  flows with ActNorm (Glow and its heirs) sample and score with the average. It is made
#           before the first batch, so its shifts are lost at the first call, which nothing
#           reports. torch's AveragedModel, which copies everything at its first update, keeps the
#           flag.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile --disable-pip-version-check torch==2.13.0 ema_pytorch==0.8.3 \
    numpy==2.4.6
cat > check.py <<'END'
import torch
from ema_pytorch import EMA
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

torch.set_num_threads(1)


class ActNorm(nn.Module):
    """Shifts its first batch to mean 0, and later inputs by the same, learnable amounts."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(4))
        self.register_buffer("initialised", torch.tensor(False))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        if not self.initialised:
            with torch.no_grad():
                self.shift.copy_(-x.mean(0))
            self.initialised.fill_(True)
        self.calls += 1
        return x + self.shift


def averaged(make, update, module):
    torch.manual_seed(0)
    model = ActNorm()
    average = make(model)
    for _ in range(300):
        model(torch.randn(8, 4) + 5)
        update(average, model)
    copy = module(average)
    flag, calls = bool(copy.initialised), int(copy.calls)
    image = torch.full((1, 4), 9.0)
    with torch.no_grad():
        return flag, calls, float(copy.eval()(image).mean()), float(model(image).mean())


ours = averaged(EMA, lambda ema, model: ema.update(), lambda ema: ema.ema_model)
torchs = averaged(
    lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99)),
    lambda average, model: average.update_parameters(model), lambda average: average.module)
assert torchs[0] is True and torchs[1] == 300, torchs
assert abs(torchs[2] - torchs[3]) < 1e-4 and 3 < torchs[3] < 5, torchs
assert ours[0] is False and ours[1] == 0, ours
assert ours[2] == 0 and 3 < ours[3] < 5, ours
print(f"after 300 steps the average's flag is {ours[0]} and its count {ours[1]}; its output "
      f"{ours[2]:.1f} where the model's is {ours[3]:.1f}; torch's AveragedModel {torchs[2]:.1f}")
END
venv/bin/python check.py
