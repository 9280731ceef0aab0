"""Several processes under torchrun: device, joining and leaving, agreeing, sharing work.

Without torchrun, each function does the obvious thing for a single process.
"""
import contextlib
import datetime
import os
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from support.cli import UserError

# Limit for one exchange between processes; it is long, as some may wait while others read data.
TIMEOUT = datetime.timedelta(hours=6)


# ----------------------------------------------------------------------------- devices
def pick_device(name: str) -> torch.device:
    """The device for --device; auto is a CUDA GPU if there is one, one per process under torchrun.

    MPS is not supported: it lacks float64, which mixtures and determinants use.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: got cuda, but this PyTorch sees no CUDA GPU; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", 0))
    if number >= torch.cuda.device_count():
        raise UserError(f"--nproc_per_node: got more processes than the {torch.cuda.device_count()}"
                        " GPUs of this machine; start one for each GPU")
    torch.backends.cuda.matmul.allow_tf32 = False  # the inverse and the density are to be exact
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device has native bf16: GPUs from Ampere on, CPUs with AMX or AVX512-BF16.

    Elsewhere it is emulated, slowly.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # private: they may disappear
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def pick_precision(name: str, device: torch.device) -> str:
    """auto -> bfloat16 where that is fast, else float32."""
    if name != "auto":
        return name
    return "bfloat16" if bf16_is_fast(device) else "float32"


@contextlib.contextmanager
def training_precision(device: torch.device, precision: str) -> Iterator[None]:
    """Context of a training pass, forward and backward: autocast if precision is bfloat16.

    What autocast leaves in float32 may then use a GPU's TF32. Evaluation and sampling never do.
    """
    bf16 = precision == "bfloat16"
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = bf16
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            yield
    finally:
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = False


# ----------------------------------------------------------------------------- processes
def join(device: torch.device) -> tuple[int, int]:
    """Joins the process group if torchrun started this process -> (rank, number of processes)."""
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    return rank_and_world()


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes: (0, 1) outside torchrun."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def leave() -> None:
    """Waits for the other processes and leaves the group.

    A process that exits while another is still talking to it may abort that one.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def agreeing(facts: dict) -> Iterator[None]:
    """Context of what each process finds out by itself before they work together.

    The body fills `facts`, which must come out as in process 0. If they differ, or the body
    raises an error that the user can fix in one process, all of them end, process 0 with a
    UserError and the others in silence.
    """
    error = None
    try:
        yield
    except (ValueError, OSError) as raised:
        error = raised
    rank, world = rank_and_world()
    if world == 1:
        if error is not None:
            raise error
        return
    everyone = [None] * world
    dist.all_gather_object(everyone, (None if error is None else str(error), facts))
    expected = everyone[0][1]
    for number, (message, found) in enumerate(everyone):
        if message is None:
            differing = [name for name in expected if found[name] != expected[name]]
            if not differing:
                continue
            name = differing[0]
            message = (f"{name} is {found[name]}, but {expected[name]} in process 0; all need the "
                       "same command and the same files, on a disk that they share")
        if rank > 0:
            sys.exit(2)
        raise UserError(f"process {number}: {message}") from error


def share(num: int) -> range:
    """This process's part of 0 ... num - 1: consecutive numbers, in the order of ranks."""
    rank, world = rank_and_world()
    return range(rank * num // world, (rank + 1) * num // world)


# ----------------------------------------------------------------------------- exchange
def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of every process's tensor, on every process (in place)."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of every process's tensor, on every process."""
    return sum_over_processes(values) / rank_and_world()[1]


def max_over_processes(value: int, device: torch.device) -> int:
    """The largest of every process's numbers, on every process."""
    if not dist.is_initialized():
        return value
    values = torch.tensor(value, device=device)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return int(values)


def gather(value) -> list:
    """Every process's value, in the order of ranks, on rank 0; [] elsewhere.

    Values are pickled and may differ in size. All processes must call this. Many images are sent
    batch by batch: a message has to fit into memory once for each process.
    """
    rank, world = rank_and_world()
    if world == 1:
        return [value]
    everyone = [None] * world if rank == 0 else None
    dist.gather_object(value, everyone)
    return everyone or []
