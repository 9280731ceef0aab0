#!/usr/bin/env bash
# Guess:    all_reduce with MAX or MIN gives NaN wherever one process has NaN, as torch.maximum
#           does.
# Seen:     with the gloo backend a NaN survives or vanishes, depending on which process has it
#           and on where in the tensor it stands; all processes then agree on the wrong value.
#           Four equal values on each of two processes give [nan, nan, 2, 2]; of one value per
#           process, a NaN on any but the first is lost. SUM is right.
# Versions: torch==2.13.0 numpy==2.4.6
# Date:     2026-12-01
# Matters:  "is the loss or the gradient norm of any process not finite?" must be asked with SUM,
#           or with MAX of a 0/1 flag. MAX of the values lets a diverged process pass on CPUs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > check.py <<'END'
import datetime
import math
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def worker(rank, world, file, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=60))
    for size in (1, 4):
        for broken in range(world):
            for name in ("MAX", "MIN", "SUM"):
                value = math.nan if rank == broken else float(rank + 1)
                x = torch.full((size,), value)
                dist.all_reduce(x, getattr(dist.ReduceOp, name))
                if rank == 0:
                    results.put((world, size, broken, name, int(x.isnan().sum())))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    context = mp.get_context("spawn")
    found = {}
    for world in (2, 3):
        results = context.Queue()
        mp.spawn(worker, (world, f"{sys.argv[1]}/join{world}", results), nprocs=world)
        for _ in range(2 * world * 3):
            world_, size, broken, name, count = results.get(timeout=30)
            found[world_, size, broken, name] = count
    for (world, size, broken, name), count in found.items():
        if name == "SUM":
            assert count == size, (world, size, broken, count)
    lost = {key: count for key, count in found.items() if key[3] != "SUM" and count < key[1]}
    asked = [key for key in found if key[3] != "SUM"]
    assert found[2, 4, 0, "MAX"] == 2 and found[2, 4, 1, "MAX"] == 2, found
    assert any(count == 0 for count in lost.values()), found
    gone = sum(count == 0 for count in lost.values())
    print(f"of {len(asked)} reductions by MAX or MIN with a NaN on one process, {len(lost)} lost "
          f"some of it and {gone} all of it; by SUM none")
END
venv/bin/python check.py "$folder"
