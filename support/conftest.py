"""What the test files share: small runs, scripts as users start them, what an error looks like.

Files outside support/ import the fixtures by name.
"""
import os
import subprocess
import sys
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


def fails(capsys, script, argv: list, *words) -> str:
    """The script ends with exit code 2 and, warnings aside, one line on stderr that has all words.

    Lines that say which data were read do not count. Returns the line.
    """
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_script(script.main, [str(a) for a in argv])
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if ": warning: " not in line and not line.startswith("data: ")]
    assert ended.value.code == 2 and len(lines) == 1, lines
    assert "error" in lines[0] and all(str(word) in lines[0] for word in words), lines[0]
    return lines[0]


def command(*argv, **env) -> subprocess.Popen:
    """A script in a process of its own, with one thread; what it prints is in its stdout."""
    return subprocess.Popen(
        [sys.executable, *map(str, argv)], cwd=REPOSITORY, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | env)


def torchrun(*argv, **env) -> subprocess.Popen:
    """The same in two processes."""
    return command(
        "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0", *argv, **env)


def succeeds(process: subprocess.Popen) -> str:
    """What a process has printed, once it has ended well; one that hangs is ended."""
    try:
        output = process.communicate(timeout=300)[0]
    finally:
        process.terminate()  # torchrun takes its processes along
    assert process.returncode == 0, output
    return output


def weights(path: Path) -> dict:
    """The weights of a run or of a checkpoint file."""
    file = path / "ckpt.pt" if path.is_dir() else path
    return torch.load(file, weights_only=True)["weights"]


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory) -> Path:
    """A short run of the default preset on the digits."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    train.main(["--out", str(out), "--steps", "120", "--warmup", "10", "--flow-blocks", "2",
                "--batch-size", "32", "--noise-end", "0.1", "--log-every", "20",
                "--save-every", "60", "--sample-every", "0", "--val-every", "0",
                "--precision", "float32", "--device", "cpu"])
    return out


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """60 digits as an .npz: quicker to open than the built-in set is to draw."""
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    digits, _ = open_images("digits:test", 16)
    np.savez(path, images=digits.array[:60], labels=digits.labels[:60])
    return path


@pytest.fixture(scope="session")
def small_run(tmp_path_factory, tiny_data) -> Path:
    """12 steps of a very small model: for what needs a run and does not look at its pictures."""
    out = tmp_path_factory.mktemp("runs") / "small"
    train.main(["--out", str(out), "--steps", "12", "--data", str(tiny_data), "--save-every", "6",
                *SMALL_FLAGS])
    return out
