"""The training loop and what it uses, with a model of three parameters.

- Every step of train.py equals a loop written by hand: data order, mirroring, annealed noise, label
  drops, learning rate, accumulation, clipping, AdamW and Muon, weight decay, averages.
- The start: fit() sees the data, denoising follows the noise, data.png shows the images.
- Pictures and held-out likelihood use the averages, at their steps, with the noise of the end.
- Each way to run does what it says: bfloat16, compiling, recomputing.
- Distillation starts with the teacher's last noise, and takes a fifth of its steps.
- Arrays of floats and vectors as labels go through training, resuming, likelihood and sampling.
- Signals, the log, Muon in float32.
"""
import json
import math
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import farmer
import sample
import train
from support import checkpoints, distributed
from support.conftest import checkpoint, extra, fails, logged, run, same_weights, weights

# The parameters: a table with a row per class, and a layer for Muon, whose bias does not decay. The
# loss reads pixels (noise), labels (drops) and the model's own random stream.
SMALL_MODEL = '''
from dataclasses import dataclass
from typing import NamedTuple
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

class LogProb(NamedTuple):
    total: torch.Tensor

class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.table = nn.Parameter(torch.linspace(-1, 1, 4 * 4).view(4, 4))
        self.layer = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(()))
        with torch.no_grad():
            self.layer.weight.copy_(torch.arange(16.0).view(4, 4).sin())
            self.layer.bias.copy_(torch.arange(4.0))

    def layers(self):
        return [self.layer]

    def fit(self, x):
        self.seen.copy_(x.mean())

    def rows(self, x, labels):
        return self.layer(x.flatten(1).view(len(x), 4, 4).mean(1)) - self.table[labels]

    def forward(self, x, labels, generators):
        u = torch.stack([torch.rand((), generator=g) for g in generators])
        e = self.rows(x + u.view(-1, 1, 1, 1), labels)
        half = torch.tensor(float(torch.is_autocast_enabled("cpu")))
        training = torch.tensor(float(self.training))
        nats = e.square().sum(1)
        return {"loss": nats, "nats_per_dim": nats, "half": half, "training": training}

    def log_prob(self, x, labels=None):
        return LogProb(-self.rows(x, labels).square().sum(1))

    def sample(self, labels, options=None, generators=None):
        return self.table[labels].view(-1, 1, 1, 4).expand(-1, 1, 4, 4)
'''
STEPS = 8
BATCH = 6
FLAGS = ["--model", "small_model", "--steps", "4", "--batch-size", "6", "--micro-batch", "2",
         "--log-every", "1", "--device", "cpu", "--precision", "float32", "--out", "run"]


@pytest.fixture
def small_model(tmp_path, monkeypatch):
    """Ten images of three classes and the model's file, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small_model.py").write_text(SMALL_MODEL)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (10, 4, 4, 1), dtype=np.uint8)
    labels = np.arange(10) % 3
    np.savez("data.npz", images=images, labels=labels)
    return torch.from_numpy(images).permute(0, 3, 1, 2).float(), torch.from_numpy(labels)


# ----------------------------------------------------------------------------- steps
def generator(seed: int, number: int) -> torch.Generator:
    """The stream of image `number`, apart for each seed."""
    state = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def by_hand(images, labels, optimizer: str, clip: float, flip: bool, seed: int):
    """Yields the parameters, their averages, lr and the gradient's norm after each step."""
    table = torch.linspace(-1, 1, 16).view(4, 4).requires_grad_()
    matrix = torch.arange(16.0).view(4, 4).sin().requires_grad_()
    bias = torch.arange(4.0).requires_grad_()
    params = [table, matrix, bias]
    averages = [p.detach().clone() for p in params]
    opts = [
        torch.optim.AdamW([table], lr=1.0, betas=(0.9, 0.95), weight_decay=0.1),
        torch.optim.AdamW([matrix], lr=1.0, betas=(0.9, 0.95), weight_decay=0.1),
        torch.optim.AdamW([bias], lr=1.0, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    if optimizer == "muon":
        opts[1] = train.Muon([matrix], lr=1.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(STEPS):
        warm = min(1, (step + 1) / 3)
        lr = 0.05 * warm * (0.1 + 0.9 * (1 + math.cos(math.pi * step / STEPS)) / 2)
        sigma = 0.02 + (0.5 - 0.02) * (1 + math.cos(math.pi * step / STEPS)) / 2
        total = 0
        for number in range(step * BATCH, (step + 1) * BATCH):
            epoch, place = divmod(number, 10)
            i = np.random.default_rng([seed, epoch]).permutation(10)[place]
            x = images[i]
            if flip and np.random.default_rng([seed, epoch, 1]).random(10)[place] < 0.5:
                x = x.flip(-1)
            x = (x + 0.5) / 128 - 1
            x = x + sigma * torch.randn(x.shape, generator=generator(seed, number))
            label = int(labels[i])
            if np.random.default_rng([seed, number, 2]).random() < 0.4:
                label = 3  # null
            u = torch.rand((), generator=generator(seed + 1, number))
            row = x.view(4, 4).mean(0) + u
            total = total + (matrix @ row + bias - table[label]).square().sum() / BATCH
        grads = torch.autograd.grad(total, params)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        assert norm > 0.5
        for p, g in zip(params, grads, strict=True):
            p.grad = g * min(1, clip / (norm + 1e-6)) if clip else g
        for opt in opts:
            opt.param_groups[0]["lr"] = lr
            opt.step()
        decay = min(0.5, (2 + step) / (11 + step))
        for average, p in zip(averages, params, strict=True):
            average.mul_(decay).add_(p.detach(), alpha=1 - decay)
        yield [p.detach().clone() for p in params], [a.clone() for a in averages], lr, norm


@pytest.mark.parametrize("optimizer, clip, flip", [
    ("adamw", 0.5, True), ("adamw", 0, False), ("muon", 0.5, True)])
def test_every_step_equals_a_loop_written_by_hand(
        small_model, monkeypatch, optimizer, clip, flip):
    real = train.save
    kept = {}

    def keep(path, model, **extra):
        real(path, model, **extra)
        kept[extra["step"]] = checkpoint(path)

    monkeypatch.setattr(train, "save", keep)
    run(train, *FLAGS, *(f"--steps {STEPS} --optimizer {optimizer} --clip {clip} --lr 0.05 "
                         "--lr-end 0.1 --warmup 3 --weight-decay 0.1 --noise-start 0.5 "
                         "--noise-end 0.02 --label-drop 0.4 --ema 0.5 --seed 3 --save-every 1 "
                         "--sample-every 0").split(), "--flip" if flip else "--no-flip")
    names = ("table", "layer.weight", "layer.bias")
    steps = by_hand(*small_model, optimizer, clip, flip, seed=3)
    for step, (params, averages, lr, norm) in enumerate(steps, 1):
        raw = kept[step]["extra"]["raw_weights"]
        for name, mine, average in zip(names, params, averages, strict=True):
            torch.testing.assert_close(raw[name], mine, rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(kept[step]["weights"][name], average, rtol=1e-4, atol=2e-5)
        assert logged("run", "lr")[step - 1] == pytest.approx(lr)
        assert logged("run", "grad_norm")[step - 1] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("cast", [
    torch.Tensor.bfloat16, lambda x: x.to(dtype=torch.bfloat16, copy=True)])
def test_muon_is_in_float32_where_bfloat16_is_emulated(fast, cast, monkeypatch):
    monkeypatch.setattr(train, "bf16_is_fast", lambda device: fast)
    layer = torch.nn.Linear(8, 8, bias=False)
    layer.layers = lambda: [layer]
    _, muon = train.optimizers(layer, "muon", lr=0.1, weight_decay=0.0)
    layer(torch.randn(4, 8)).square().sum().backward()
    seen = set()
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: seen.add(a.dtype) or matmul(a, b))
    muon.step()
    assert seen == {torch.bfloat16 if fast else torch.float32}
    with train.Float32():  # torch 2.13 casts in the first way, 2.15 in the second
        copy = cast(layer.weight)
    assert copy.dtype == torch.float32 and copy.data_ptr() != layer.weight.data_ptr()


# ----------------------------------------------------------------------------- start
def test_a_new_run_begins_with_its_data_where_its_preset_says(small_model):
    images, _ = small_model
    run(train, *FLAGS[:-2], "--steps", 1, "--noise", "uniform")
    out = Path("runs/small_model-default")
    noise = [torch.rand(1, 4, 4, generator=generator(0, i)) for i in range(10)]
    expected = ((images + torch.stack(noise)) / 128 - 1).mean()
    assert weights(out)["seen"] == pytest.approx(expected.item(), abs=1e-6)  # by fit()
    bits = logged(out, "loss")[0] / math.log(2) + 7
    assert logged(out, "bits_per_dim") == pytest.approx([bits])
    with Image.open(out / "data.png") as picture:
        assert picture.size == (8 + 7 + 4 * 50, 3 * 50)  # the class, and up to four images
        first_of_class_1 = np.array(picture.convert("L"))[50:98, 15:63][::12, ::12]
    assert np.array_equal(first_of_class_1, images[1, 0].numpy())
    assert extra(out)["training"]["data"] == str(Path("data.npz").resolve())


@pytest.mark.parametrize("flags, sigma", [
    ({}, 0.03), (dict(noise_end=0.07), 0.07), (dict(noise="uniform"), 0.0)])
def test_denoising_follows_the_noise_that_training_ends_with(flags, sigma):
    module = SimpleNamespace(
        Config=farmer.Config, TRAINING={"a": dict(noise_end=0.03)},
        PRESETS={"a": farmer.Config(sampling=farmer.Sampling(denoise=0.5))})
    config, run = train.new_run(SimpleNamespace(preset=None, **flags), module, "float32")
    assert config.sampling.denoise == sigma and run.preset == "a"
    assert run.training.noise == flags.get("noise", "gaussian")


# ----------------------------------------------------------------------------- while it runs
def test_pictures_and_likelihood_use_the_averages_at_their_steps(small_model, monkeypatch):
    calls = []
    steps = []

    def spy(name):
        real = getattr(train, name)

        def called(model, *args, **kwargs):
            assert not model.training
            calls.append((name, steps[-1], {k: w.clone() for k, w in model.state_dict().items()}))
            if name == "evaluate":
                assert args[1:] == ("gaussian", 0.03)
            return real(model, *args, **kwargs)

        monkeypatch.setattr(train, name, called)

    spy("evaluate")
    spy("sample_grid")
    monkeypatch.setattr(train, "lr_at", lambda settings, step: steps.append(step + 1) or 0.01)
    run(train, *FLAGS, *("--steps 7 --ema 0.9 --holdout 1 --val-every 3 --sample-every 2 "
                         "--noise-end 0.03 --log-every 100").split())
    assert [(name, step) for name, step, _ in calls] == [
        ("sample_grid", 2), ("evaluate", 3), ("sample_grid", 4), ("evaluate", 6),
        ("sample_grid", 6), ("evaluate", 7), ("sample_grid", 7)]
    assert same_weights(calls[-1][2], weights("run"))
    assert not same_weights(weights("run"), extra("run")["raw_weights"])
    assert logged("run", "step") == [1, 2, 3, 5, 6, 7, 7]
    assert set(logged("run", "training")) == {1.0}


def test_ways_to_run_reach_the_layers_and_the_pass(small_model, monkeypatch):
    prepared = []
    monkeypatch.setattr(train, "prepare_layers", lambda *args: prepared.append(args[1:]))
    run(train, *FLAGS, "--precision", "bfloat16", "--compile", "--checkpointing")
    assert prepared == [(True, True)] and set(logged("run", "half")) == {1.0}
    run(train, *FLAGS[:-1], "other", "--noise", "none", "--holdout", 1)
    assert prepared[1:] == [(False, False)] and set(logged("other", "half")) == {0.0}
    assert logged("other", "val_images") == []  # without noise there is no density


def test_tf32_is_for_training_in_bfloat16_on_a_gpu_alone():
    switch = torch.backends.cuda.matmul
    for device, inside in (("cpu", False), ("cuda", True)):
        with distributed.training_precision(torch.device(device), "bfloat16"):
            assert switch.allow_tf32 == inside
        assert not switch.allow_tf32


def test_what_a_model_cannot_do_is_refused(small_model, capsys):
    Path("bare.py").write_text(SMALL_MODEL.replace("def layers", "def no_layers"))
    argv = [*FLAGS, "--model", "bare"]
    fails(capsys, train, [*argv, "--optimizer", "muon"], "--optimizer", "layers()")
    fails(capsys, train, [*argv, "--checkpointing"], "--checkpointing", "layers()")
    assert not Path("run").exists()
    run(train, *FLAGS, "--steps", 1)
    fails(capsys, train, ["--distill", "run"], "small_model has no student")


def test_a_models_own_order_of_images_is_asked_for(small_model, capsys):
    Path("ordered.py").write_text(
        SMALL_MODEL + "\ndef epoch_order(labels, generator):\n"
        "    raise ValueError(f'an order of {len(labels)} images')\n")
    fails(capsys, train, [*FLAGS, "--model", "ordered"], "an order of 10 images")
    run(train, *FLAGS)  # into the same folder, as that run has made no step
    assert logged("run", "step") == [1, 2, 3, 4]


# ----------------------------------------------------------------------------- other beginnings
def test_a_longer_schedule_says_what_moves(small_model, capsys):
    run(train, *FLAGS, "--noise-end", 0.05)
    run(train, "--resume", "--out", "run", "--steps", 8, "--seed", 1, "--log-every", 1)
    warned = capsys.readouterr().err
    assert "seed was 0 and is 1" in warned and "steps was 4 and is 8 from step 4 on" in warned
    assert "lr goes from 5e-07 to 2.5" in warned and "noise from 0.05 to 0.075" in warned
    run(train, "--resume", "--out", "run")  # finished: nothing is left to do
    assert logged("run", "step") == [1, 2, 3, 4, 5, 6, 7, 8]
    assert "steps 8 to 8" in capsys.readouterr().out


def test_distillation_starts_with_the_teachers_last_noise(small_run, tmp_path, capsys):
    out = tmp_path / "student"
    run(train, "--distill", small_run, "--out", out, "--log-every", 1, "--sample-every", 0,
        "--device", "cpu", "--resume")  # there is nothing to resume yet, so it begins
    teacher, student = extra(small_run), extra(out)
    assert student["distill"]
    assert student["training"]["steps"] == teacher["training"]["steps"] // 5 == 2
    last = teacher["training"]["noise_end"]
    assert teacher["training"]["noise_start"] > last and logged(out, "sigma") == [last, last]
    before, after = weights(small_run), weights(out)
    assert same_weights(before, {name: after[name] for name in before})
    assert any(name.startswith("student.") for name in after)
    fails(capsys, train, ["--distill", out], "has a student already")
    fails(capsys, train, ["--distill", small_run, "--flow-width", "64", "--out", tmp_path / "x"],
          "flow_width is 32", "64 was asked for")


# ----------------------------------------------------------------------------- floats
FLOATS = SMALL_MODEL.replace("channels: int = 1", "channels: int = 4") + '''
from support.data import Images
import numpy as np

def open_images(source):
    rng = np.random.default_rng(1)
    latents = 50 * rng.standard_normal((20, 4, 4, 4)).astype(np.float32)
    vectors = rng.standard_normal((20, 2)).astype(np.float32)
    return Images(source, latents, vectors) if source == "latents" else None

class Model(Model):
    def drop_labels(self, labels, mask):
        return labels.masked_fill(mask[:, None], 0)

    def rows(self, x, labels):
        return self.layer(x.mean((1, 2))) - labels @ self.table[:2]

    def sample(self, labels, options=None, generators=None):
        return 100 * (labels @ self.table[:2]).view(-1, 1, 1, 4).expand(-1, 4, 4, 4)
'''


def test_floats_and_vectors_train_resume_are_scored_and_sampled_as_they_are(
        small_model, tmp_path, capsys, monkeypatch):
    (tmp_path / "floats.py").write_text(FLOATS)

    def keep(path, model, **extra):
        checkpoints.save(path, model, **extra)
        if path.parent.name == "run":
            Path(f"from{extra['step']}").mkdir()
            shutil.copy(path, f"from{extra['step']}")

    monkeypatch.setattr(train, "save", keep)
    argv = [*FLAGS, "--model", "floats", "--data", "latents", "--num-classes", "0", "--holdout",
            "5", "--label-drop", "0.4", "--save-every", "2", "--noise-end", "2"]
    run(train, *argv)
    for step in (0, 2):
        run(train, "--resume", "--out", f"from{step}", "--micro-batch", 2)
        assert same_weights(weights("run"), weights(f"from{step}"))
    assert not (tmp_path / "run/samples.png").exists() and logged("run", "val_images") == [5]
    capsys.readouterr()
    run(train, "--eval", "run")
    scored = json.loads(capsys.readouterr().out)["nats_per_dim"]
    assert [scored] == pytest.approx(logged("run", "val_nats_per_dim"))
    run(sample, "run", "--num", 20, "--out", "x.npz")
    with np.load("x.npz") as file:
        assert file["arr_0"].dtype == np.float32 and np.abs(file["arr_0"]).max() > 5
        vectors = file["arr_1"]
    assert vectors.shape == (20, 2) and len(np.unique(vectors, axis=0)) == 15
    fails(capsys, sample, ["run"], "4 channels", "X.npz")
    fails(capsys, sample, ["run", "--labels", "1", "--out", "x.npz"], "--labels", "no classes")
    (tmp_path / "floats.py").write_text(FLOATS.replace("def drop_labels", "def other"))
    sys.modules.pop("floats")
    fails(capsys, train, [*argv, "--out", "new"], "label_drop", "drop_labels(labels, mask)")


# ----------------------------------------------------------------------------- signals and log
def test_a_signal_ignored_at_the_start_stays_ignored_and_a_second_one_interrupts():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with train.stop_signals() as received:
            signal.raise_signal(signal.SIGHUP)
            assert received == []
            signal.raise_signal(signal.SIGTERM)
            assert received == [signal.SIGTERM]
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_log_drops_what_came_after_its_checkpoint_and_has_means(tmp_path, capsys):
    file = tmp_path / "log.jsonl"
    kept = '{"step": 1, "a": 2, "minutes": 7.0}\n'
    file.write_text(kept + '{"step": 5, "a": 3, "minutes": 8.0}\n{"step": 6, "a"')
    log = train.Log(tmp_path, step=4, steps=10)
    assert file.read_text() == kept
    log.add({"a": torch.tensor([1.0, 3.0])})
    log.add({"a": torch.tensor([4.0, 4.0])})
    log.write(6, log.means() | {"lr": 0.5}, "0:10 left")
    assert json.loads(file.read_text().splitlines()[1]) == {"step": 6, "a": 3.0, "lr": 0.5}
    assert capsys.readouterr().out == "step 6/10  a 3  lr 0.5  0:10 left\n"


def test_time_spent_on_saving_and_drawing_is_not_training(small_model, monkeypatch):
    now = [0.0]

    def takes(seconds, real):
        def slow(*args, **kwargs):
            now[0] += seconds
            return real(*args, **kwargs)
        return slow

    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(train, "lr_at", takes(3, train.lr_at))  # once a step
    monkeypatch.setattr(train, "save", takes(1000, train.save))
    monkeypatch.setattr(train, "sample_grid", takes(1000, train.sample_grid))
    run(train, *FLAGS, "--save-every", 1, "--sample-every", 1)
    assert logged("run", "images_per_s") == [2.0] * 4
    assert logged("run", "minutes") == pytest.approx([0.05, 0.1, 0.15, 0.2])
