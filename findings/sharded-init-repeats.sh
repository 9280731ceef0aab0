#!/usr/bin/env bash
# Guess:    torch.nn.init on a parameter that fully_shard has split gives the numbers of the
#           unsplit parameter for the same seed, or at least other numbers on each process.
# Seen:     on CPUs, after the usual torch.manual_seed(seed) in every process, each process fills
#           its shard with the *same* numbers: a matrix on two processes consists of one half
#           twice, on four of one quarter four times, so its rank is a half or a quarter of what
#           it should be. The same holds for reset_parameters() after a start on the meta device,
#           the way that is recommended for models too large for one process. A warning says that
#           random operators "may not have complete support on cpu device mesh"; nothing says that
#           shards repeat.
# Versions: torch==2.13.0 numpy==2.4.6
# Date:     2026-12-01
# Matters:  neurons start as copies of each other in pairs or fours and differ later only by what
#           breaks the symmetry elsewhere; the loss still falls, so that nobody looks. Initialise
#           before sharding, or give each process its own seed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > check.py <<'END'
import datetime
import sys
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh


warnings.filterwarnings("ignore", message="DTensor random operators")


def rank_of(weight):
    return int(torch.linalg.matrix_rank(weight.full_tensor().detach()))


def worker(rank, world, file, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (world,))
    found = []
    for init in (nn.init.normal_, nn.init.xavier_uniform_, nn.init.kaiming_uniform_,
                 nn.init.trunc_normal_):
        layer = fully_shard(nn.Linear(16, 16, bias=False), mesh=mesh)
        torch.manual_seed(0)
        init(layer.weight)
        found.append(rank_of(layer.weight))
    with torch.device("meta"):
        layer = nn.Linear(16, 16, bias=False)
    fully_shard(layer, mesh=mesh)
    layer.to_empty(device="cpu")
    torch.manual_seed(0)
    layer.reset_parameters()
    found.append(rank_of(layer.weight))
    torch.manual_seed(0)
    before = nn.Linear(16, 16, bias=False)  # initialised first, sharded then
    found.append(rank_of(fully_shard(before, mesh=mesh).weight))
    if rank == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    context = mp.get_context("spawn")
    found = {}
    for world in (2, 4):
        results = context.Queue()
        mp.spawn(worker, (world, f"{sys.argv[1]}/join{world}", results), nprocs=world)
        found[world] = results.get(timeout=30)
        assert found[world][:-1] == [16 // world] * 5, found
        assert found[world][-1] == 16, found
    print(f"rank of a 16 x 16 matrix initialised after fully_shard: {found[2][0]} on two "
          f"processes, {found[4][0]} on four; initialised before it: {found[4][-1]}")
END
venv/bin/python check.py "$folder"
