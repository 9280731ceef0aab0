"""Plots of results, as PNG files that can be read on white and on dark pages.

    python results/figures.py curve runs/cifar runs/tarflow --out curves.png  # over time
    python results/figures.py guidance --out guidance.png    # FD, precision and recall over w
    python results/figures.py fig6 --out fig6.png            # FD over K_I and d_I

`curve` reads the runs' log.jsonl; the others the results of tables.py. Needs matplotlib.
"""
# ruff: noqa: E402  (the repository's folder has to be found first)
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import json
import re
import statistics

from support.checkpoints import load_run
from support.cli import Parser, UserError, check_writable, expanded, reading, run_script, write_file

GREY = "#808080"  # of text and axes, on a transparent ground
Curves = dict[str, list[tuple[float, float]]]  # name -> points (x, y)


# ----------------------------------------------------------------------------- data
def read_lines(file: Path) -> list[dict]:
    with reading(file, "expected lines of JSON, as train.py and tables.py write them"):
        return [json.loads(line) for line in file.read_text().splitlines()]


def training_curve(run: str) -> tuple[str, list[tuple[float, float]]]:
    """What is measured, and its values over the minutes of training, pauses left out."""
    batch_size = load_run(run)[1].training["batch_size"]
    lines = [line for line in read_lines(expanded(run) / "log.jsonl") if "images_per_s" in line]
    name = "bits_per_dim" if lines and "bits_per_dim" in lines[-1] else "nats_per_dim"
    if not lines or name not in lines[-1]:
        raise UserError(f"{run}: its log.jsonl has no likelihood to plot")
    points = []
    seconds = 0.0
    step = 0
    for line in lines:
        seconds += (line["step"] - step) * batch_size / line["images_per_s"]
        step = line["step"]
        points.append((seconds / 60, line[name]))
    return name, points


def over(results: list[dict], pattern: str, field: str, where: str) -> Curves:
    """Means over seeds of a field, over the number that `pattern` finds in `where` of a result.

    A curve for each text of `where` without that number, and for each row or sampling.
    """
    values: dict[tuple, list[float]] = {}
    for result in results:
        found = re.search(pattern, result[where])
        if found and field in result:
            other = result["row"] if where == "sampling" else result["sampling"]
            values.setdefault((other, float(found[1])), []).append(result[field])
    curves: Curves = {}
    for (name, x), ys in sorted(values.items()):
        curves.setdefault(name, []).append((x, statistics.mean(ys)))
    return curves


# ----------------------------------------------------------------------------- drawing
def draw(panels: list[tuple[str, str, Curves]], out: Path) -> None:
    """A panel for each (name of x, name of y, curves), side by side."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    colours = {f"{part}.color": GREY for part in ("text", "xtick", "ytick", "grid")}
    colours |= {"axes.labelcolor": GREY, "axes.edgecolor": GREY, "axes.facecolor": "none"}
    with matplotlib.rc_context(colours | {"grid.alpha": 0.3, "axes.grid": True}):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.5 * len(panels), 3.2), layout="constrained")
        for axes, (x, y, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels,
                                        strict=True):
            for name, points in curves.items():
                axes.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else None,
                          label=name)
            axes.set(xlabel=x, ylabel=y)
            axes.legend(frameon=False)
        write_file(out, lambda f: figure.savefig(f, format="png", dpi=120, transparent=True))
    print(out)


# ----------------------------------------------------------------------------- command line
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="figures.py", description=__doc__)
    parser.add_argument("figure", choices=("curve", "guidance", "fig6"))
    parser.add_argument("runs", nargs="*", metavar="RUN", help="curve: folders of runs")
    parser.add_argument("--out", required=True, metavar="X.png")
    args = parser.parse_args(argv)
    if (args.figure == "curve") != bool(args.runs):
        parser.error("curve needs folders of runs, and the other figures take none")
    out = check_writable("--out", args.out)
    if args.figure == "curve":
        found = {run: training_curve(run) for run in args.runs}
        names = {name for name, _ in found.values()}
        if len(names) > 1:
            raise UserError("curve: some runs have bits/dim (uniform noise), others nats/dim; plot "
                            "them apart")
        y = names.pop().replace("_per_", "/")
        curves = {Path(run).name: points for run, (_, points) in found.items()}
        return draw([("minutes of training", y, curves)], out)
    results = read_lines(REPOSITORY / "results" / f"{args.figure}.jsonl")
    if args.figure == "guidance":
        panels = [("guidance weight w", name, over(results, r"^w = ([0-9.]+)$", field, "sampling"))
                  for field, name in (("fd", "FD"), ("precision", "precision"),
                                      ("recall", "recall"))]
    else:
        panels = [(name, "FD", over(results, rf"{name} = (\d+)", "fd", "row"))
                  for name in ("K_I", "d_I")]
    draw(panels, out)


if __name__ == "__main__":
    run_script(main)
