"""What the training loop uses: optimizers, faster layers, averages, signals, the log."""
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from support.cli import UserError, duration, write_file
from support.distributed import bf16_is_fast, max_over_processes, mean_over_processes


# ----------------------------------------------------------------------------- optimizers
def optimizers(net: nn.Module, name: str, lr: float,
               weight_decay: float) -> list[torch.optim.Optimizer]:
    """[AdamW], or for "muon" [AdamW, Muon] with Muon for the matrices of the model's layers.

    Weight decay is for matrices, tables of embeddings among them, not for biases and norms.
    """
    params = [p for p in net.parameters() if p.requires_grad]
    matrices = [p for p in params if p.dim() >= 2]
    others = [p for p in params if p.dim() < 2]
    inside = set()
    if name == "muon":
        inside = {p for layer in layers_of(net) for p in layer.parameters() if p.dim() == 2}
        if not inside:
            raise UserError("--optimizer: muon is for the matrices of a model's layers(), and this "
                            "model names none; use adamw")
    groups = [
        dict(params=[p for p in matrices if p not in inside], weight_decay=weight_decay),
        dict(params=others, weight_decay=0.0),
    ]
    found = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)]
    if inside:
        layer_matrices = [p for p in matrices if p in inside]
        found.append(Muon(layer_matrices, lr=lr, weight_decay=weight_decay,
                          adjust_lr_fn="match_rms_adamw"))
    return found


class Muon(torch.optim.Muon):
    """torch's Muon orthogonalises in bfloat16; this one in float32 where bfloat16 is emulated.

    On a CPU with AVX2 alone, that takes a twentieth of the time.
    """

    @torch.no_grad()
    def step(self, closure=None):
        if bf16_is_fast(self.param_groups[0]["params"][0].device):
            return super().step(closure)
        with Float32():
            return super().step(closure)


class Float32(TorchFunctionMode):
    """In here, tensor.bfloat16() is a float32 copy."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.bfloat16:
            return args[0].float().clone()
        return func(*args, **(kwargs or {}))


# ----------------------------------------------------------------------------- layers
def layers_of(model: nn.Module) -> list[nn.Module]:
    """The repeated layers that a model names, or none."""
    return model.layers() if hasattr(model, "layers") else []


def prepare_layers(model: nn.Module, compiling: bool, checkpointing: bool = False) -> None:
    """Compiles each of the model's layers, and recomputes activations instead of keeping them.

    The layer is compiled inside the checkpoint: outside it, the compiler would leave it alone.
    """
    if compiling:  # one graph serves all layers, but the limit counts their widths and modes
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for layer in layers_of(model):
        if compiling:
            layer.forward = torch.compile(layer.forward)
        if checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


# ----------------------------------------------------------------------------- averaged weights
class EMA:
    """Exponential moving average of parameters, with decay min(decay, (1 + n) / (10 + n)).

    n counts steps. The second term keeps a short run from being an average of its start.
    """

    def __init__(self, params: list[Tensor], decay: float):
        self.params = params
        self.decay = decay
        self.averages = [p.detach().clone() for p in params]

    @torch.no_grad()
    def update(self, n: int) -> None:
        """After step n, counted from 1."""
        decay = min(self.decay, (1 + n) / (10 + n))
        for average, p in zip(self.averages, self.params, strict=True):
            average.lerp_(p, 1 - decay)

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's state_dict with averages in the place of these parameters."""
        with self.applied():
            return {name: weight.clone() for name, weight in model.state_dict().items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the parameters hold the averages."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        for average, p in zip(self.averages, self.params, strict=True):
            trained = p.clone()
            p.copy_(average)
            average.copy_(trained)


# ----------------------------------------------------------------------------- signals
class StopSignals:
    """While it is entered, Ctrl-C, SIGTERM and SIGHUP ask the loop to stop after its step.

    A second one interrupts at once. A signal that the process was started with as ignored, as
    nohup does with SIGHUP, stays ignored.
    """

    def __init__(self):
        self.number = 0  # of the signal that came
        self.before = {}

    def __enter__(self) -> "StopSignals":
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, _) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number
        try:
            name = signal.Signals(number).name
            print(f"{name}: saving after this step; once more leaves at once", file=sys.stderr)
        except OSError:  # after SIGHUP there may be no terminal
            pass

    def asked(self, device: torch.device) -> bool:
        """Whether any process was asked to stop. All processes must call it."""
        number = torch.tensor(int(self.number), device=device)
        self.number = int(max_over_processes(number))
        return self.number > 0


# ----------------------------------------------------------------------------- the log
class Log:
    """log.jsonl and lines on stdout: means since the last report, speed, time left.

    Every process makes one, since means are over all of them; rank 0 writes. A resumed run first
    drops the lines after its checkpoint.
    """

    def __init__(self, out: Path, start: int, steps: int, rank: int, tensorboard: bool = False):
        self.file = out / "log.jsonl"
        self.start = start
        self.steps = steps
        self.rank = rank
        self.terms: dict[str, list[Tensor]] = {}  # since the last report
        self.last_step = start
        self.began = time.monotonic()
        self.last_time = self.began
        self.board = None
        if rank > 0:
            return
        lines = []
        if start and self.file.exists():
            lines = self.file.read_text().splitlines()
        kept = "".join(line + "\n" for line in lines if step_of(line) <= start)
        write_file(self.file, lambda f: f.write(kept.encode()))
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError("--tensorboard: it is not installed; pip install tensorboard, or "
                                "leave the flag out") from error
            self.board = SummaryWriter(str(out))

    def add(self, terms: dict[str, Tensor]) -> None:
        """Named values of a pass, tensors of any shape. Nothing here waits for a GPU."""
        for name, values in terms.items():
            self.terms.setdefault(name, []).append(values.detach().float().mean())

    def report(self, step: int, batch_size: int, last: dict) -> None:
        """One line: means since the last report, then the values of `last`. All must call it."""
        means = torch.stack([torch.stack(parts).mean() for parts in self.terms.values()])
        values = dict(zip(self.terms, mean_over_processes(means).tolist(), strict=True))
        now = time.monotonic()
        images = (step - self.last_step) * batch_size
        values |= last
        values["images_per_s"] = images / max(now - self.last_time, 1e-9)
        left = (now - self.began) / max(step - self.start, 1) * (self.steps - step)
        self.write(step, values, f"{duration(left)} left")
        self.terms = {}
        self.last_step = step
        self.last_time = now

    def write(self, step: int, values: dict, note: str = "") -> None:
        """One line of log.jsonl and of stdout."""
        if self.rank > 0:
            return
        with self.file.open("a") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")
        parts = [f"step {step}/{self.steps}"]
        for name, value in values.items():
            if name == "loss" and value == values.get("nats_per_dim"):
                continue  # the same number under its better name
            parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        print("  ".join([*parts, note]).rstrip(), flush=True)
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Saving and drawing in here do not count into images/s."""
        start = time.monotonic()
        yield
        self.last_time += time.monotonic() - start


def step_of(line: str) -> float:
    """The step of a line of log.jsonl; infinity for one that a kill tore apart."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf
