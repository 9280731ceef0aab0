"""Plots of results, as PNG files that can be read on white and on dark pages.

    python results/figures.py curve runs/tiny --out curve.png
    python results/figures.py guidance --out guidance.png
    python results/figures.py fig6 --out fig6.png

`curve` draws the loss of runs, or their bits/dim, over minutes of training. The
others draw results of tables.py: `guidance` FD, precision and recall over the
guidance weight w; `fig6` FD over K_I, the mixture components of a token, and over
d_I, the informative channels. Needs matplotlib.
"""
# ruff: noqa: E402  (the repository's folder has to be found first)
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import json
import re
import statistics

from support.cli import (
    Parser,
    UserError,
    check_writable,
    expanded,
    reading,
    run_script,
    write_file,
)

GREY = "#808080"  # of text and axes, on a transparent ground
FD = "FD in the classifier's features"


# ----------------------------------------------------------------------------- data
def read_lines(file: Path) -> list[dict]:
    """The objects in a file of JSON lines, as train.py and tables.py write them."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def training_log(run: str) -> list[dict]:
    """The reports in the log.jsonl of a run, given as its folder or as that file."""
    file = expanded(run)
    if file.is_dir():
        file = file / "log.jsonl"
    with reading(run, "expected the folder of a run, or its log.jsonl"):
        reports = [line for line in read_lines(file) if "minutes" in line]
    if not reports:
        raise UserError(f"{run}: its log has no report of training; expected lines with minutes")
    return reports


def means(results: list[dict], name: str, field: str, each: str) -> dict[str, list[tuple]]:
    """Means over seeds of a field, over the number after "name = " in a result's row or sampling.

    There is a curve, a list of points, for each value of the result's field `each`.
    """
    values = {}
    for result in results:
        found = re.search(rf"{name} = ([0-9.]+)", f"{result['row']}, {result['sampling']}")
        if found:
            values.setdefault((result[each], float(found[1])), []).append(result[field])
    curves = {}
    for (curve, x), ys in sorted(values.items()):
        curves.setdefault(curve, []).append((x, statistics.mean(ys)))
    return curves


# ----------------------------------------------------------------------------- drawing
def draw(panels: list[tuple[str, str, dict]], out: Path) -> None:
    """A panel for each (name of x, name of y, curves), side by side."""
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need matplotlib: pip install matplotlib") from None
    for part in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
        rcParams[part] = GREY
    figure = Figure(figsize=(4.5 * len(panels), 3.2), layout="constrained")
    for place, (x, y, curves) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), place, xlabel=x, ylabel=y, facecolor="none")
        for name, points in curves.items():
            style = ".-" if len(points) < 50 else "-"
            axes.plot(*zip(*points, strict=True), style, markersize=4, label=name)
        axes.grid(alpha=0.3)
    names = axes.get_legend_handles_labels()
    figure.legend(*names, loc="outside upper center", ncols=len(panels) + 1, frameon=False)
    write_file(out, lambda f: figure.savefig(f, format="png", dpi=120, transparent=True))
    print(out)


# ----------------------------------------------------------------------------- command line
def main(argv: list[str] | None = None) -> None:
    """Draws the figure that the command line names."""
    parser = Parser(prog="figures.py", description=__doc__,
                    usage="python results/figures.py FIGURE [RUN ...] --out FILE")
    parser.add_argument("figure", choices=("curve", "guidance", "fig6"), metavar="FIGURE",
                        help="what to draw: curve, guidance or fig6")
    parser.add_argument("runs", nargs="*", metavar="RUN",
                        help="for curve: folders of runs, or their log.jsonl under any name; a "
                        "line of the plot each")
    parser.add_argument("--out", required=True, metavar="FILE", help="the picture to write (.png)")
    args = parser.parse_args(argv)
    if (args.figure == "curve") != bool(args.runs):
        parser.error("curve needs folders of runs, and the other figures take none")
    out = check_writable("--out", args.out)
    if args.figure == "curve":
        logs = {Path(run).stem: training_log(run) for run in args.runs}
        kinds = {"bits_per_dim" in report for log in logs.values() for report in log}
        if len(kinds) > 1:
            raise UserError("curve: some runs have bits/dim and others do not; plot them apart")
        bits = kinds == {True}
        field = "bits_per_dim" if bits else "loss"
        curves = {}
        for name, log in logs.items():
            curves[name] = [(report["minutes"], report[field]) for report in log]
        draw([("minutes of training", "bits/dim" if bits else "loss", curves)], out)
        return
    results = read_lines(REPOSITORY / "results" / f"{args.figure}.jsonl")
    panels = []
    if args.figure == "guidance":
        for field, y in (("fd", FD), ("precision", "precision"), ("recall", "recall")):
            panels.append(("guidance weight w", y, means(results, "w", field, "row")))
    else:
        for x in ("K_I", "d_I"):
            panels.append((x, FD, means(results, x, "fd", "sampling")))
    draw(panels, out)


if __name__ == "__main__":
    run_script(main)
