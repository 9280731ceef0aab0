"""Everything that torchrun changes: device, joining and leaving, sharing work and gathering it, DDP and FSDP2.

And what is done to a model's layers before that, compiling and activation checkpointing, since the order matters.
"""
import contextlib
import datetime
import os
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from support.cli import UserError

TIMEOUT = datetime.timedelta(hours=6)  # of one exchange: rank 0 may decode or save for long while the others wait
CHUNK = 2**26  # bytes of one message in `gather`


# ------------------------------------------------------------------------------------------ processes
def pick_device(name: str) -> torch.device:
    """auto = a CUDA GPU when there is one; under torchrun each process takes its own.

    No MPS: float64, which exact mixtures and determinants use, does not exist there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: got cuda, but this PyTorch sees no CUDA GPU; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cuda.matmul.allow_tf32 = False  # exact means exact
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def join(device: torch.device) -> tuple[int, int]:
    """(rank, processes); joins the process group when torchrun started this process."""
    if "RANK" in os.environ and not dist.is_initialized():
        missing = [n for n in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
        if missing:
            raise UserError(f"RANK is set but {', '.join(missing)} is not: start with torchrun, or unset RANK")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return rank_and_world()


def rank_and_world() -> tuple[int, int]:
    """(0, 1) outside torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def leave() -> None:
    """Ends the process group when there is one. A process that just exits while another still talks to it may abort."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def share(num: int) -> range:
    """This process's part of 0 ... num - 1: a run of neighbours, so that parts in the order of ranks are in order."""
    rank, world = rank_and_world()
    return range(rank * num // world, (rank + 1) * num // world)


def gather(array: np.ndarray, device: torch.device) -> Iterator[np.ndarray]:
    """Every process's array (n, ...), in the order of ranks, on rank 0; nothing elsewhere. Arrays may differ in n.

    They travel one after another in messages of 64 MiB, through the GPU under NCCL: 50,000 images fit in no single one.
    """
    rank, world = rank_and_world()
    if rank == 0:
        yield array
    for sender in range(1, world):
        if rank == sender:
            send(array, device)
        elif rank == 0:
            yield receive(sender, array, device)


def send(array: np.ndarray, device: torch.device) -> None:
    dist.send(torch.tensor([len(array)], device=device), 0)
    data = torch.from_numpy(np.ascontiguousarray(array)).flatten().view(torch.uint8)
    for part in data.split(CHUNK):
        dist.send(part.to(device), 0)


def receive(sender: int, like: np.ndarray, device: torch.device) -> np.ndarray:
    n = torch.zeros(1, dtype=torch.long, device=device)
    dist.recv(n, sender)
    array = np.empty((int(n), *like.shape[1:]), like.dtype)
    data = torch.from_numpy(array).flatten().view(torch.uint8)
    for part in data.split(CHUNK):
        message = torch.empty_like(part, device=device)
        dist.recv(message, sender)
        part.copy_(message)
    return array


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of every process's tensor, on every process (in place)."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def mean_over_processes(values: Tensor) -> Tensor:
    return sum_over_processes(values) / rank_and_world()[1]


def max_over_processes(values: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def bf16_is_fast(device: torch.device) -> bool:
    """GPUs from Ampere on, and CPUs with AMX or AVX512-BF16; elsewhere bf16 is emulated, up to 100 times slower."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # private: they may go
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def pick_precision(name: str, device: torch.device) -> str:
    """auto -> bfloat16 where that is fast, else float32. A name that is given is kept."""
    if name != "auto":
        return name
    return "bfloat16" if bf16_is_fast(device) else "float32"


@contextlib.contextmanager
def training_precision(device: torch.device, precision: str):
    """A training pass, forward and backward: autocast where precision is bfloat16.

    What autocast leaves in float32 (the flow's and the mixtures' heads) may then use a GPU's TF32; evaluation, inverse
    and sampling, outside, never do.
    """
    bf16 = precision == "bfloat16"
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = bf16
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def resumed_precision(name: str, trained: str, device: torch.device) -> str:
    """The precision that a run goes on in: the one it was trained in, unless another is given.

    Raises UserError where that is bfloat16, this machine is slow in it, and nobody asked for it.
    """
    if name == "auto" and trained == "bfloat16" and not bf16_is_fast(device):
        raise UserError("--resume: this run was trained in bfloat16, which is slow on this machine; pass "
                        "--precision float32, or --precision bfloat16 to stay with it")
    return trained if name == "auto" else name


# ------------------------------------------------------------------------------------------ layers
def layers_of(module: nn.Module) -> list[nn.Module]:
    """The repeated layers that a model names, or none: the unit of compiling, checkpointing and sharding."""
    return list(module.layers()) if hasattr(module, "layers") else []


def prepare_layers(module: nn.Module, compiling: bool, checkpointing: bool, apart: bool = False, **options) -> None:
    """Compiles each layer (one graph serves all that are alike) and recomputes activations instead of keeping them.

    Compiled inside the checkpoint: the other way round, checkpoint would switch the compiler off around the layer.
    apart: a graph that calls a layer does not take it in.
    """
    if compiling:  # the limit counts graphs per code object, shared by all layers of a class, widths and modes
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for layer in layers_of(module):
        if "forward" in vars(layer):  # prepared already
            continue
        if compiling:
            layer.forward = torch.compile(layer.forward, **options)
        if checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if apart:  # the partial keeps disable from unwrapping what is compiled
            layer.forward = torch.compiler.disable(partial(layer.forward))


def prepare_training(model: nn.Module, net: nn.Module, compiling: bool, checkpointing: bool) -> None:
    """The same for training `net`, the model or its student, and what lies between the layers compiled too.

    On a CPU the whole pass is one graph: as fast at least, and small models compile in a minute or two. Elsewhere the
    layers' graphs stay apart: within one graph, each layer would be compiled anew.
    """
    whole = compiling and not checkpointing and not next(net.parameters()).is_cuda
    for part in {model, net} if not whole else ():
        prepare_layers(part, compiling, checkpointing, apart=compiling, dynamic=False)  # lengths are known
    if compiling:
        net.forward = torch.compile(net.forward, dynamic=False)


# ------------------------------------------------------------------------------------------ training on several devices
def parallel(module: nn.Module, device: torch.device, fsdp: bool) -> nn.Module:
    """What the loop calls: the module itself, or under torchrun a DDP wrapper; with fsdp it is sharded in place."""
    world = rank_and_world()[1]
    if world == 1:
        return module
    for tensor in [*module.parameters(), *module.buffers()]:  # the start is rank 0's, whatever each rank has computed
        dist.broadcast(tensor.detach(), 0)
    if not fsdp:
        devices = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)
    for layer in layers_of(module):
        fully_shard(layer)
    return fully_shard(module)


@contextlib.contextmanager
def accumulating(module: nn.Module, more: bool):
    """While more passes follow in this step, gradients accumulate without being exchanged."""
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(not more)
    with module.no_sync() if more and isinstance(module, DistributedDataParallel) else contextlib.nullcontext():
        yield


def full_weights(model: nn.Module, everywhere: bool = False) -> dict[str, Tensor]:
    """All weights, gathered from the processes that they are sharded over.

    Complete on rank 0, on its CPU; everywhere: on every rank, on its device.
    """
    return get_model_state_dict(model, options=gathered(offload=not everywhere))


def set_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Puts `full_weights` back, whatever the number of processes."""
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))


def full_optimizer(module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict:
    """The optimizers' state under parameter names, gathered likewise."""
    return get_optimizer_state_dict(module, optimizers, options=gathered())


def set_optimizer(module: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict) -> None:
    """Puts `full_optimizer`'s state back, whatever the number of processes."""
    set_optimizer_state_dict(module, optimizers, state, options=StateDictOptions(full_state_dict=True))


def gathered(offload: bool = True) -> StateDictOptions:
    several = dist.is_initialized()
    return StateDictOptions(full_state_dict=several, cpu_offload=several and offload)
