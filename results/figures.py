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

from support.cli import Parser, UserError, expanded, reading, run_script, write_file

GREY = "#808080"  # of text and axes, on a transparent ground
FD = "FD in the classifier's features"


# ----------------------------------------------------------------------------- data
def read_lines(file: Path) -> list[dict]:
    """The objects in a file of JSON lines, as train.py and tables.py write them."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def curve(run: str, field: str) -> list[tuple]:
    """Minutes of training and a field of the log of a run, given as its folder or as that file."""
    file = expanded(run)
    if file.is_dir():
        file = file / "log.jsonl"
    with reading(run, f"expected a run's folder or its log.jsonl, with values of {field}"):
        points = [(line["minutes"], line[field]) for line in read_lines(file)
                  if {"minutes", field} <= line.keys()]
        if not points:
            raise ValueError("it has none")
        return points


def means(table: str, name: str, field: str, each: str) -> dict[str, list[tuple]]:
    """Means over seeds of a field, over the number after "name = " in a result's row or sampling.

    There is a curve, a list of points, for each value of the result's field `each`.
    """
    values = {}
    for result in read_lines(REPOSITORY / "results" / f"{table}.jsonl"):
        found = re.search(rf"{name} = ([0-9.]+)", f"{result['row']}, {result['sampling']}")
        if found:
            values.setdefault((result[each], float(found[1])), []).append(result[field])
    curves = {}
    for (curve, x), ys in sorted(values.items()):
        curves.setdefault(curve, []).append((x, statistics.mean(ys)))
    return curves


# ----------------------------------------------------------------------------- drawing
def draw(panels: list[tuple[str, str, dict]], out: str) -> None:
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
    parser.add_argument("--field", default="loss", metavar="NAME",
                        help="for curve: what to draw, such as bits_per_dim (default: loss)")
    parser.add_argument("--out", required=True, metavar="FILE", help="the picture to write (.png)")
    args = parser.parse_args(argv)
    if (args.figure == "curve") != bool(args.runs):
        parser.error("curve needs folders of runs, and the other figures take none")
    if args.figure == "curve":
        curves = {Path(run).stem: curve(run, args.field) for run in args.runs}
        panels = [("minutes of training", args.field.replace("_per_", "/"), curves)]
    elif args.figure == "guidance":
        panels = [("guidance weight w", name, means("guidance", "w", field, "row"))
                  for field, name in (("fd", FD), ("precision", "precision"), ("recall", "recall"))]
    else:
        panels = [(x, FD, means("fig6", x, "fd", "sampling")) for x in ("K_I", "d_I")]
    draw(panels, args.out)


if __name__ == "__main__":
    run_script(main)
