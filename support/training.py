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
    """The optimizers: [AdamW], or for "muon" [AdamW, Muon], Muon for the matrices of the layers.

    Weight decay applies to matrices, including embeddings, but not to biases and norms.
    """
    params = [p for p in net.parameters() if p.requires_grad]
    matrices = [p for p in params if p.dim() >= 2]
    others = [p for p in params if p.dim() < 2]
    inside = set()
    if name == "muon":
        inside = {p for layer in layers_of(net) for p in layer.parameters() if p.dim() == 2}
        if not inside:
            raise UserError("--optimizer: got muon, which is for the matrices in a model's "
                            "layers(), but this model has none; use adamw")
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

    On a CPU that has only AVX2, this is 20 times as fast.
    """

    @torch.no_grad()
    def step(self, closure=None):
        if bf16_is_fast(self.param_groups[0]["params"][0].device):
            return super().step(closure)
        with Float32():
            return super().step(closure)


class Float32(TorchFunctionMode):
    """Context in which tensor.bfloat16() returns a float32 copy."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.bfloat16:
            return args[0].float().clone()
        return func(*args, **(kwargs or {}))


# ----------------------------------------------------------------------------- layers
def layers_of(model: nn.Module) -> list[nn.Module]:
    """The repeated layers that a model lists in layers(), or [] if it has no such method."""
    return model.layers() if hasattr(model, "layers") else []


def prepare_layers(model: nn.Module, compiling: bool, checkpointing: bool = False) -> None:
    """Makes a model's layers compile, recompute activations instead of keeping them, or both.

    The checkpoint wraps the compiled layer; the other way round, the compiler would leave it alone.
    """
    if compiling:  # layers share a graph, but each width and mode counts towards this limit
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for layer in layers_of(model):
        if compiling:
            layer.forward = torch.compile(layer.forward)
        if checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


# ----------------------------------------------------------------------------- averaged weights
class EMA:
    """Exponential moving average of parameters, with decay min(decay, (1 + n) / (10 + n)).

    n counts steps. The second term keeps the start of training from dominating a short run.
    """

    def __init__(self, params: list[Tensor], decay: float):
        self.params = params
        self.decay = decay
        self.averages = [p.detach().clone() for p in params]

    @torch.no_grad()
    def update(self, n: int) -> None:
        """Updates the averages after step n, counted from 1."""
        decay = min(self.decay, (1 + n) / (10 + n))
        for average, p in zip(self.averages, self.params, strict=True):
            average.lerp_(p, 1 - decay)

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's state_dict with the averages in place of these parameters."""
        with self.applied():
            return {name: weight.clone() for name, weight in model.state_dict().items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the parameters hold the averages."""
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
    """Context in which Ctrl-C, SIGTERM and SIGHUP ask the loop to stop after the current step.

    A second signal interrupts at once. A signal that was ignored when the process started, as
    SIGHUP is under nohup, stays ignored.
    """

    def __init__(self):
        self.number = 0  # of the signal received; 0: none
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
            print(f"{name}: saving after this step; send it again to quit now", file=sys.stderr)
        except OSError:  # after SIGHUP there may be no terminal
            pass

    def asked(self, device: torch.device) -> bool:
        """Whether any process was asked to stop. All processes must call this."""
        number = torch.tensor(int(self.number), device=device)
        self.number = int(max_over_processes(number))
        return self.number > 0


# ----------------------------------------------------------------------------- the log
class Log:
    """Writes log.jsonl and lines on stdout: means since the last report, speed, time left.

    Every process has one, since the means are over all processes, but only rank 0 writes. A resumed
    run first drops the lines after its checkpoint.
    """

    def __init__(self, out: Path, start: int, steps: int, rank: int, tensorboard: bool = False):
        self.file = out / "log.jsonl"
        self.start = start
        self.steps = steps
        self.rank = rank
        self.terms: dict[str, list[Tensor]] = {}  # since the last report
        self.last_step = start
        self.minutes = 0.0  # of training so far, without saving and drawing
        self.began = time.monotonic()
        self.last_time = self.began
        self.board = None
        if rank > 0:
            return
        lines = []
        if start and self.file.exists():
            lines = self.file.read_text().splitlines()
        kept = [line for line in lines if step_of(line) <= start]
        for line in kept:
            self.minutes = json.loads(line).get("minutes", self.minutes)
        text = "".join(line + "\n" for line in kept)
        write_file(self.file, lambda f: f.write(text.encode()))
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError("--tensorboard: it is not installed; pip install tensorboard, or "
                                "leave the flag out") from error
            self.board = SummaryWriter(str(out))

    def add(self, terms: dict[str, Tensor]) -> None:
        """Adds the named values of a pass, tensors of any shape, without waiting for a GPU."""
        for name, values in terms.items():
            self.terms.setdefault(name, []).append(values.detach().float().mean())

    def report(self, step: int, batch_size: int, last: dict) -> None:
        """Writes the means since the last report, then the values of `last`.

        All processes must call this.
        """
        means = torch.stack([torch.stack(parts).mean() for parts in self.terms.values()])
        values = dict(zip(self.terms, mean_over_processes(means).tolist(), strict=True))
        now = time.monotonic()
        images = (step - self.last_step) * batch_size
        values |= last
        seconds = max(now - self.last_time, 1e-9)
        self.minutes += seconds / 60
        values |= {"images_per_s": images / seconds, "minutes": self.minutes}
        left = (now - self.began) / max(step - self.start, 1) * (self.steps - step)
        self.write(step, values, f"{duration(left)} left")
        self.terms = {}
        self.last_step = step
        self.last_time = now

    def write(self, step: int, values: dict, note: str = "") -> None:
        """Writes one line to log.jsonl and to stdout."""
        if self.rank > 0:
            return
        with self.file.open("a") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")
        parts = [f"step {step}/{self.steps}"]
        for name, value in values.items():
            if name == "loss" and value == values.get("nats_per_dim"):
                continue  # the same number is printed as nats_per_dim
            parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        print("  ".join([*parts, note]).rstrip(), flush=True)
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context for saving and drawing, whose time counts neither in images/s nor in minutes."""
        start = time.monotonic()
        yield
        self.last_time += time.monotonic() - start


def step_of(line: str) -> float:
    """The step of a line of log.jsonl; infinity for a line cut short when the run was killed."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf
