"""The training loop and what it uses.

- Every step of train.py equals a loop written by hand: data order, mirroring, annealed noise, label
  drops, learning rate, accumulation, clipping, AdamW and Muon, weight decay, averages.
- Distillation starts with the teacher's last noise, and takes a fifth of its steps.
- Muon orthogonalises in float32 where bfloat16 is emulated.
- A signal that was ignored when the process started stays ignored.
- The log is one line of JSON a report, without lines after the checkpoint it goes on from.
"""
import json
import math
import signal

import numpy as np
import pytest
import torch

import train
from support import training
from support.checkpoints import load_run
from support.conftest import weights

# Two parameters: a table with a row per class, and the matrix of a layer for Muon. The loss reads
# pixels (noise), labels (drops) and the model's own random stream.
TWO_PARAMETERS = '''
from dataclasses import dataclass
import torch
from torch import nn

@dataclass(frozen=True)
class Sampling:
    nothing: int = 0

@dataclass(frozen=True)
class Config:
    image_size: int = 4
    channels: int = 1
    num_classes: int = 3
    sampling: Sampling = Sampling()

PRESETS = {"default": Config()}
TRAINING = {"default": dict(data="data.npz")}

class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.table = nn.Parameter(torch.linspace(-1, 1, 4 * 4).view(4, 4))
        self.layer = nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.arange(16.0).view(4, 4).sin())

    def layers(self):
        return [self.layer]

    def forward(self, x, labels, generators):
        u = torch.stack([torch.rand((), generator=g) for g in generators])
        rows = x.flatten(1).view(len(x), 4, 4).mean(1) + u.unsqueeze(1)
        e = self.layer(rows) - self.table[labels]
        return {"loss": e.square().sum(1)}

    def sample(self, labels, options=None, generators=None):
        return torch.zeros(len(labels), 1, 4, 4)
'''
STEPS = 8
BATCH = 6


@pytest.fixture
def two_parameters(tmp_path, monkeypatch):
    """Ten images of three classes and the model's file, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two_parameters.py").write_text(TWO_PARAMETERS)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (10, 4, 4, 1), dtype=np.uint8)
    labels = np.arange(10) % 3
    np.savez("data.npz", images=images, labels=labels)
    return torch.from_numpy(images).permute(0, 3, 1, 2).float(), torch.from_numpy(labels)


def generator(seed: int, number: int) -> torch.Generator:
    """The stream of image `number`, apart for each seed."""
    state = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def by_hand(images, labels, optimizer: str, seed: int):
    """Yields the parameters, their averages, lr and the gradient's norm after each step."""
    table = torch.linspace(-1, 1, 16).view(4, 4).requires_grad_()
    matrix = torch.arange(16.0).view(4, 4).sin().requires_grad_()
    params = [table, matrix]
    averages = [p.detach().clone() for p in params]
    if optimizer == "muon":
        opts = [
            torch.optim.AdamW([table], lr=1.0, betas=(0.9, 0.95), weight_decay=0.1),
            training.Muon([matrix], lr=1.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        ]
    else:
        opts = [torch.optim.AdamW(params, lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)]
    for step in range(STEPS):
        warm = min(1, (step + 1) / 3)
        lr = 0.05 * warm * (0.1 + 0.9 * (1 + math.cos(math.pi * step / STEPS)) / 2)
        sigma = 0.02 + (0.5 - 0.02) * (1 + math.cos(math.pi * step / STEPS)) / 2
        total = 0
        for number in range(step * BATCH, (step + 1) * BATCH):
            epoch, place = divmod(number, 10)
            i = np.random.default_rng([seed, epoch]).permutation(10)[place]
            x = images[i]
            if np.random.default_rng([seed, epoch, 1]).random(10)[place] < 0.5:
                x = x.flip(-1)
            x = (x + 0.5) / 128 - 1
            x = x + sigma * torch.randn(x.shape, generator=generator(seed, number))
            label = int(labels[i])
            if np.random.default_rng([seed, number, 2]).random() < 0.4:
                label = 3  # null
            u = torch.rand((), generator=generator(seed + 1, number))
            row = x.view(4, 4).mean(0) + u
            total = total + (matrix @ row - table[label]).square().sum() / BATCH
        grads = torch.autograd.grad(total, params)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        assert norm > 0.5  # clipping is on in every step
        for p, g in zip(params, grads, strict=True):
            p.grad = g * min(1, 0.5 / (norm + 1e-6))
        for opt in opts:
            opt.param_groups[0]["lr"] = lr
            opt.step()
        decay = min(0.5, (2 + step) / (11 + step))
        for average, p in zip(averages, params, strict=True):
            average.mul_(decay).add_(p.detach(), alpha=1 - decay)
        yield [p.detach().clone() for p in params], [a.clone() for a in averages], lr, norm


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_step_equals_a_loop_written_by_hand(two_parameters, tmp_path, optimizer):
    flags = (f"--model two_parameters --steps {STEPS} --batch-size {BATCH} --micro-batch 2 "
             f"--optimizer {optimizer} --lr 0.05 --lr-end 0.1 --warmup 3 --weight-decay 0.1 "
             "--clip 0.5 --noise-start 0.5 --noise-end 0.02 --label-drop 0.4 --ema 0.5 --seed 3 "
             "--save-every 1 --keep 99 --log-every 1 --sample-every 0 --workers 0 --device cpu "
             "--precision float32 --out run")
    train.main(flags.split())
    log = [json.loads(line) for line in open("run/log.jsonl")]
    steps = by_hand(*two_parameters, optimizer, seed=3)
    for step, (params, averages, lr, norm) in enumerate(steps, 1):
        content = torch.load(f"run/ckpt-{step}.pt", weights_only=True)
        raw = content["extra"]["raw_weights"]
        for value, mine in zip((raw["table"], raw["layer.weight"]), params, strict=True):
            torch.testing.assert_close(value, mine, rtol=1e-4, atol=2e-5)
        kept = content["weights"]
        for value, mine in zip((kept["table"], kept["layer.weight"]), averages, strict=True):
            torch.testing.assert_close(value, mine, rtol=1e-4, atol=2e-5)
        assert log[step - 1]["step"] == step
        assert log[step - 1]["lr"] == pytest.approx(lr)
        assert log[step - 1]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_distillation_starts_with_the_teachers_last_noise(small_run, tmp_path):
    out = tmp_path / "student"
    train.main(["--distill", str(small_run), "--out", str(out), "--log-every", "1",
                "--sample-every", "0", "--workers", "0", "--device", "cpu"])
    _, teacher = load_run(small_run)
    model, state = load_run(out)
    assert state.distill and model.student is not None
    assert state.training["steps"] == teacher.training["steps"] // 5 == 2
    last = teacher.training["noise_end"]
    assert teacher.training["noise_start"] > last
    sigmas = [json.loads(line)["sigma"] for line in open(out / "log.jsonl")]
    assert sigmas == [last, last]
    before = weights(small_run)
    assert all(torch.equal(w, before[name]) for name, w in weights(out).items() if name in before)
    assert any(name.startswith("student.") for name in weights(out))


@pytest.mark.parametrize("fast", [True, False])
def test_muon_is_in_float32_where_bfloat16_is_emulated(fast, monkeypatch):
    monkeypatch.setattr(training, "bf16_is_fast", lambda device: fast)
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 8, bias=False)
    layer.layers = lambda: [layer]
    _, muon = training.optimizers(layer, "muon", lr=0.1, weight_decay=0.0)
    before = layer.weight.detach().clone()
    layer(torch.randn(4, 8)).square().sum().backward()
    seen = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__",
                        lambda a, b: seen.append(a.dtype) or matmul(a, b))
    muon.step()
    update = before - layer.weight.detach()
    assert set(seen) == {torch.bfloat16 if fast else torch.float32}
    singular = torch.linalg.svdvals(update / (0.1 * 0.2 * math.sqrt(8)))
    assert singular[:4].sub(1).abs().max() < 0.4  # orthogonal where the gradient has a direction


def test_a_signal_ignored_at_the_start_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with training.StopSignals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.asked(torch.device("cpu"))
            signal.raise_signal(signal.SIGTERM)
            assert stop.asked(torch.device("cpu"))
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_log_drops_what_came_after_its_checkpoint(tmp_path, capsys):
    file = tmp_path / "log.jsonl"
    kept = '{"step": 1, "a": 2, "minutes": 7.0}\n'
    file.write_text(kept + '{"step": 5, "a": 3, "minutes": 8.0}\n{"step": 6, "a"')
    log = training.Log(tmp_path, start=4, steps=10, rank=0)
    log.add({"a": torch.tensor([1.0, 3.0])})
    log.add({"a": torch.tensor([4.0, 4.0])})
    log.report(6, batch_size=8, last={"lr": 0.5})
    first, second = [json.loads(line) for line in file.read_text().splitlines()]
    assert first == {"step": 1, "a": 2, "minutes": 7.0}
    assert second["step"] == 6 and second["a"] == 3 and second["lr"] == 0.5
    assert second["images_per_s"] > 0
    assert second["minutes"] == pytest.approx(7 + 2 * 8 / second["images_per_s"] / 60)
    assert capsys.readouterr().out.startswith("step 6/10  a 3  lr 0.5  images_per_s ")


