"""What the test files share: small runs, scripts as users start them, what an error looks like.

Files outside support/ import the fixtures by name.
"""
import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from support.cli import run_script
from support.data import open_images

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL_FLAGS = [
    "--flow-blocks", "2", "--flow-width", "32", "--ar-layers", "1", "--ar-width", "32",
    "--head-dim", "16", "--informative-mixtures", "2", "--batch-size", "8",
    "--precision", "float32", "--log-every", "5", "--sample-every", "0", "--val-every", "0",
    "--device", "cpu",
]


# ----------------------------------------------------------------------------- scripts
def fails(capsys, script, argv: list, *words) -> str:
    """The script ends with exit code 2 and, warnings aside, one line on stderr that has all words.

    Lines that say what was read or is being drawn do not count. Returns the line.
    """
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_script(script.main, [str(a) for a in argv])
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines
             if ": warning: " not in line and not line.startswith(("data: ", "drawing "))]
    assert ended.value.code == 2 and len(lines) == 1, lines
    assert "error" in lines[0] and all(str(word) in lines[0] for word in words), lines[0]
    return lines[0]


SERVER = multiprocessing.get_context("forkserver")  # its processes have imported the scripts
SERVER.set_forkserver_preload(["train", "sample", "torch._dynamo"])


class Started:
    """A script in one process or in several that work together, as torchrun starts them."""

    def __init__(self, folder: Path, *argv, ranks: int = 1, before: Callable | None = None):
        """before(rank) is called in each process first: a function of a test file, so pickled."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder.mkdir(exist_ok=True)
        self.processes = []
        self.outputs = []
        for rank in range(ranks):
            env = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank),
                       LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks)) if ranks > 1 else {}
            self.outputs.append(folder / f"output{rank}.txt")
            args = ([str(a) for a in argv], env, self.outputs[rank], before, rank)
            self.processes.append(SERVER.Process(target=in_process, args=args, daemon=True))
            self.processes[rank].start()

    def end(self, *codes: int, seconds: float = 60) -> list[str]:
        """Waits until all have ended, with these exit codes (default: 0) -> what each printed."""
        for process in self.processes:
            process.join(seconds)
        found = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        printed = [output.read_text() for output in self.outputs]
        assert found == list(codes or [0] * len(found)), (found, printed)
        return printed


def in_process(argv: list[str], env: dict, output: Path, before: Callable | None, rank: int):
    os.environ.update(env)
    torch.set_num_threads(1)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = argv
    if before is not None:
        before(rank)
    code = 0
    try:
        run_script(importlib.import_module(Path(argv[0]).stem).main, argv[1:])
    except SystemExit as ended:
        code = ended.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not by way of threads that the server had when it was forked


# ----------------------------------------------------------------------------- runs
def run(script, *argv) -> None:
    """Runs a script in this process."""
    script.main([str(a) for a in argv])


def checkpoint(path: Path | str) -> dict:
    """What the checkpoint of a run, or a file, holds."""
    path = Path(path)
    return torch.load(path / "ckpt.pt" if path.is_dir() else path, weights_only=True)


def weights(path: Path | str) -> dict:
    return checkpoint(path)["weights"]


def extra(path: Path | str) -> dict:
    """What train.py saves beside the model."""
    return checkpoint(path)["extra"]


def logged(path: Path | str, key: str) -> list:
    """The values that a run logged under a name."""
    lines = Path(path, "log.jsonl").read_text().splitlines()
    values = [json.loads(line) for line in lines]
    return [value[key] for value in values if key in value]


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """60 digits as an .npz: quicker to open than the built-in set is to draw."""
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    digits, _ = open_images("digits:test", 16)
    np.savez(path, images=digits.array[:60], labels=digits.labels[:60])
    return path


@pytest.fixture(scope="session")
def flags(tiny_data) -> list:
    """A very small model of these digits, as train.py's flags."""
    return [*SMALL_FLAGS, "--data", tiny_data]


@pytest.fixture(scope="session")
def small_run(tmp_path_factory, tiny_data) -> Path:
    """12 steps of a very small model: for what needs a run and does not look at its pictures."""
    out = tmp_path_factory.mktemp("runs") / "small"
    run(train, *SMALL_FLAGS, "--data", tiny_data, "--out", out, "--steps", 12, "--save-every", 6)
    return out
