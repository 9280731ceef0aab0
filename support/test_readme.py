"""The README tells the truth.

- Its commands run as written and in order, but for smaller numbers; not those that install,
  copy, or need several processes.
- Its Python runs, and its local links and pictures are there.
"""
import importlib
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"^```(python)?\n(.*?)^```", README, re.M | re.S)
SMALLER = {"--steps": "3", "--num": "40"}  # instead of the README's numbers
SMALL = ("--steps 2 --batch-size 4 --flow-blocks 1 --flow-width 64 --ar-layers 1 "
         "--ar-width 64").split()


def commands() -> list[list[str]]:
    """The README's commands that begin with python, [script, argument, ...], in order."""
    lines = [line for _, block in BLOCKS for line in block.splitlines()]
    lines = [line.partition(" #")[0] for line in lines if line.startswith("python ")]
    return [shlex.split(line)[1:] for line in lines]


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """A folder that looks like a clone, with images in path/to/images."""
    monkeypatch.chdir(tmp_path)
    os.symlink(REPOSITORY / "assets", "assets")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        folder = tmp_path / "path/to/images" / name
        folder.mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 256, (70, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path


def test_commands_run_as_written_and_in_order(clone, capsys):
    run = 0
    for script, *argv in [["train.py"], *commands()]:
        for flag, value in SMALLER.items():
            if flag in argv:
                argv[argv.index(flag) + 1] = value
        if script == "train.py" and not {"--eval", "--distill", "--resume"} & set(argv):
            argv += SMALL
        if "fit" in argv:
            argv += ["--steps", "3"]
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        module.main(argv)
        run += 1
    assert run > 12
    for file in ("runs/tiny/samples.png", "samples.png", "sweep.png", "bags.png", "samples.npz",
                 "runs/tiny-student/ckpt.pt", "runs/mine/ckpt.pt", "prepared/images.npy"):
        assert (clone / file).exists(), file


def test_python_runs(clone):
    (code,) = [block for language, block in BLOCKS if language]
    names = {}
    exec(code, names)
    assert names["images"].shape == (3, 1, 28, 28)
    assert names["Z"].shape == (3, 49, 16) and names["log_p"].total.shape == (3,)


def test_local_links_are_there():
    for page in (REPOSITORY / "README.md", REPOSITORY / "results" / "README.md"):
        text = page.read_text()
        headings = [re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
                    for line in text.splitlines() if line.startswith("#")]
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            file, _, anchor = link.partition("#")
            if not link.startswith("http") and file:
                assert (page.parent / file).exists(), link
            elif anchor and not file:
                assert anchor in headings, link
