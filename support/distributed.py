"""Several processes under torchrun: device, joining and leaving, DDP, sharing work, a gather.

Without torchrun, each function does the obvious thing for a single process.
"""
import contextlib
import datetime
import os
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from support.cli import UserError

# Limit for one exchange between processes; it is long, as some may wait while others draw or save.
TIMEOUT = datetime.timedelta(hours=6)
MESSAGE = 2**26  # bytes of one message in `gather`


# ----------------------------------------------------------------------------- devices
def pick_device(name: str) -> torch.device:
    """The device for --device; auto is a CUDA GPU if there is one, one per process under torchrun.

    MPS is not supported: it lacks float64, which mixtures and determinants use.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: got cuda, but this PyTorch sees no CUDA GPU; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cuda.matmul.allow_tf32 = False  # the inverse and the density are to be exact
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
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
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = bf16
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


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


def share(num: int) -> range:
    """This process's part of 0 ... num - 1: consecutive numbers, in the order of ranks."""
    rank, world = rank_and_world()
    return range(rank * num // world, (rank + 1) * num // world)


def parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """What the training loop calls: the module itself, or under torchrun a DDP wrapper.

    DDP starts every process from rank 0's weights.
    """
    if rank_and_world()[1] == 1:
        return module
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(
        module, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def accumulating(module: nn.Module, more: bool):
    """Context of a pass: gradients are not exchanged while `more` passes of this step follow."""
    if more and isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()


# ----------------------------------------------------------------------------- exchange
def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of every process's tensor, on every process (in place)."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of every process's tensor, on every process."""
    return sum_over_processes(values) / rank_and_world()[1]


def max_over_processes(values: Tensor) -> Tensor:
    """The elementwise maximum of every process's tensor, on every process (in place)."""
    if dist.is_initialized():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def gather(array: np.ndarray, device: torch.device) -> list[np.ndarray]:
    """Every process's array (n, ...), in the order of ranks, on rank 0; [] elsewhere.

    Arrays may differ in n. They are sent in messages of 64 MiB, with NCCL through the GPU, since
    50,000 images do not fit into a single one.
    """
    rank, world = rank_and_world()
    arrays = [array] if rank == 0 else []
    for sender in range(1, world):
        if rank == sender:
            send(array, device)
        elif rank == 0:
            arrays.append(receive(sender, array, device))
    return arrays


def send(array: np.ndarray, device: torch.device) -> None:
    dist.send(torch.tensor([len(array)], device=device), 0)
    data = torch.from_numpy(np.ascontiguousarray(array)).flatten().view(torch.uint8)
    for part in data.split(MESSAGE):
        dist.send(part.to(device), 0)


def receive(sender: int, like: np.ndarray, device: torch.device) -> np.ndarray:
    n = torch.zeros(1, dtype=torch.long, device=device)
    dist.recv(n, sender)
    array = np.empty((int(n), *like.shape[1:]), like.dtype)
    data = torch.from_numpy(array).flatten().view(torch.uint8)
    for part in data.split(MESSAGE):
        message = torch.empty_like(part, device=device)
        dist.recv(message, sender)
        part.copy_(message)
    return array
