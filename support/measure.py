"""Times, memory and this machine's peak, as a benchmark needs them, and how its tables show a number."""
import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from support.distributed import bf16_is_fast


def timed(call: Callable, device: torch.device) -> float:
    """Seconds that a call takes, with the GPU's queue empty before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def medians(work: dict[object, Callable], repeats: int, device: torch.device) -> dict[object, float]:
    """Seconds of each call: the median over rounds in each of which all run once."""
    times = {key: [] for key in work}
    for _ in range(repeats):
        for key, call in work.items():
            times[key].append(timed(call, device))
    return {key: statistics.median(seconds) for key, seconds in times.items()}


def product_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of the fastest of ten large matrix products: what this machine reaches, not what its data sheet says."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device).to(getattr(torch, precision))
    return 2 * n**3 / min(timed(lambda: a @ b, device) for _ in range(10))


def peak_memory(device: torch.device, reset: bool = False) -> float:
    """GiB taken at most since the last reset: of the GPU, or on Linux by this process; 0 where nobody counts."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**30
    with contextlib.suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        words = Path("/proc/self/status").read_text().split()
        return int(words[words.index("VmHWM:") + 1]) / 2**20
    return 0.0


def machine(device: torch.device) -> dict:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    fast = ["float32", "bfloat16"] if bf16_is_fast(device) else ["float32"]
    peaks = {f"TFLOP/s in {precision}": product_peak(device, precision) / 1e12 for precision in fast}
    return {"machine": name, "torch": torch.__version__, **peaks}


def shown(value) -> str:
    """A cell of a table."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def in_words(row: dict) -> str:
    return ", ".join(f"{name} {shown(value)}" for name, value in row.items() if value is not None)
