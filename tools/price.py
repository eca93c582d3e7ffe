"""``python -m tools.price``: accuracy against price, ratios to the bare network at full resolution; a table and a picture.

Accuracy is that of trainings in results/; price is measured now, of the very networks that they trained: a training step, the
inference of a whole scan, and the peak memory of both. Each network and the bare one at full resolution run in two processes,
in turn, so that other work on the machine counts for both. Writes results/price.csv and docs/figures/price.png.

    python -m tools.price                       # on one core: taskset -c 0
    python -m tools.price --draw                # the picture alone, from results/price.csv
"""

from __future__ import annotations

import argparse
import csv
import functools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from tqdm import tqdm

from monai_morse.data import atomic_write
from monai_morse.errors import InputError
from monai_morse.experiments.figures import empty_figure, save_figure
from monai_morse.experiments.runs import Run, finite_mean, read_runs
from monai_morse.experiments.statistics import paired_difference
from tools.cost import Worker

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
TABLE, PICTURE = ROOT / "results" / "price.csv", ROOT / "docs" / "figures" / "price.png"
BARE, IAR, MORSE = ("none", "none"), ("none", "anatomical"), ("stochastic", "anatomical")
WORDS = (
    "stride",
    "patch_size",
    "batch_size",
    "image_patch",
    "patch_norm",
    "width",
    "spacing",
    "class_names",
    "experts",
    "renderer",
)


class Point(NamedTuple):
    """Trainings of one network: those of a table of results/ whose settings have these values, ``None``: do not have any."""

    view: str
    name: str
    table: str
    system: tuple[str, str]
    settings: Mapping[str, Any] = {}


class Set(NamedTuple):
    """Networks on one data set, the bare one at full resolution first; scans have so many voxels."""

    bundle: str
    scan: Sequence[int]
    points: Sequence[Point]


TRAINED = {"max_epochs": 25, "points#num_train": None, "backbones#dynunet#filters": None}
SETS = {
    "hippocampus": Set(
        "hippocampus_mri_morse",
        (35, 50, 36),
        [
            Point("1 mm", "bare", "hippocampus_1mm", BARE),
            Point("2 mm", "bare", "hippocampus_2mm_systems", BARE, {**TRAINED, "stride": 2}),
            Point("2 mm", "bare, wider", "hippocampus_2mm", BARE, {"backbones#dynunet#filters": [20, 40, 80, 160]}),
            Point("2 mm", "IAR", "hippocampus_2mm_systems", IAR, TRAINED),
            Point("2 mm", "MORSE", "hippocampus_2mm_systems", MORSE, TRAINED),
            Point("3 mm", "bare", "hippocampus_3mm", BARE, {**TRAINED, "stride": 3}),
            Point("3 mm", "bare, wider", "hippocampus_3mm", BARE, {"backbones#dynunet#filters": [24, 48, 96, 192]}),
            Point("3 mm", "IAR", "hippocampus_3mm", IAR, TRAINED),
            Point("3 mm", "MORSE", "hippocampus_3mm", MORSE, {**TRAINED, "coordinates": "window"}),
        ],
    ),
}
PRICES = ("training step", "inference", "memory, training", "memory, inference")
COLUMNS = ("set", "view", "network", "runs", "dice", "dice_to_full", "low", "high", "asd", *PRICES)


_runs = functools.cache(read_runs)  # points share tables


def find_runs(point: Point) -> list[Run]:
    """The trainings of a point.

    Raises:
        InputError: when there are none.
    """
    runs, _ = _runs(ROOT / "results" / f"{point.table}.csv.gz")
    dynunet = [r for r in runs if r.settings["backbone"] == "dynunet" and r.system == point.system]
    found = [r for r in dynunet if all(r.settings.get(n) == value for n, value in point.settings.items())]
    if not found:
        raise InputError(f"results/{point.table}.csv.gz has no run of {point.view}, {point.name}: {dict(point.settings)}")
    return found


def row_of(run: Run) -> str:
    """What :mod:`tools.cost` builds the network by that a run trained."""
    options = {
        n: v for n, v in run.settings.items() if v is not None and (n in WORDS or n.startswith(("backbone", "network_def#")))
    }
    written = (f"{n}={yaml.safe_dump(v, default_flow_style=True, width=10_000).split(chr(10))[0]}" for n, v in options.items())
    return " ".join(["bare", *written])


def measure(bundle: Path, row: str, base: str, scan: Sequence[int], repeats: int) -> dict[str, float]:
    """Each price of a row as its ratio to the base: the median over the repeats, of a training step the ratio of the sums."""
    workers = [Worker(str(bundle), name, True, False, False, False, ()) for name in (base, row)]
    found: dict[str, float] = {}
    try:
        for worker in workers:
            worker("see", list(scan))
        for figure, name in (("sliding window", "inference"), ("training step", "training step")):  # the larger peak last
            for worker in workers:
                worker("run", figure)  # warms up
            pairs = [[worker("run", figure) for worker in workers] for _ in range(repeats)]
            sums = [sum(times) for times in zip(*pairs)]
            found[name] = sums[1] / sums[0] if figure == "training step" else statistics.median(b / a for a, b in pairs)
            base_memory, own_memory = (worker("memory") for worker in workers)
            found["memory, " + ("training" if figure == "training step" else "inference")] = own_memory / base_memory
    finally:
        for worker in workers:
            worker.stop()
    return found


def accuracy(point: Point, full: Point) -> dict[str, Any]:
    """The columns of a point that its trainings tell; differences to ``full`` are paired, with a 95 % interval over cases."""
    runs = find_runs(point)
    figures = finite_mean([run.average() for run in runs])
    row = {
        "view": point.view,
        "network": point.name,
        "runs": len(runs),
        "dice": f"{figures[0]:.2f}",
        "asd": f"{figures[3]:.3f}",
    }
    difference = paired_difference(runs, find_runs(full), 0) if point != full else None
    if difference is not None:
        row |= {"dice_to_full": f"{difference.mean:.2f}", "low": f"{difference.low:.2f}", "high": f"{difference.high:.2f}"}
    return row


def rows_of_set(name: str, repeats: int) -> list[dict[str, Any]]:
    """The table's rows of one set; the first is the bare network at full resolution."""
    bundle, scan, points = SETS[name]
    full, rows = points[0], []
    for point in tqdm(points, desc=name, disable=None):
        price = dict.fromkeys(PRICES, 1.0)
        if point != full:
            built = [row_of(find_runs(p)[0]) for p in (point, full)]
            price = measure(ROOT / "bundles" / bundle, *built, scan, repeats)
        rows.append({"set": name, **accuracy(point, full), **{n: f"{value:.3f}" for n, value in price.items()}})
    return rows


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """The table of docs/results.md."""
    head = ["seen at", "network", "Dice points to full resolution", "ASD, mm", "training step", "inference", "memory, training"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for row in rows:
        numbers = [float(row.get(n) or 0) for n in ("dice_to_full", "low", "high")]
        cells = [row["view"], row["network"], "{:+.2f} [{:+.2f}, {:+.2f}]".format(*numbers) if any(numbers) else "0"]
        cells += [f"{float(row[n]):.2f}" for n in ("asd", *PRICES[:3])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: Sequence[Mapping[str, str]]) -> Figure:
    """A panel a set: Dice to the bare network at full resolution over the price of a training step, with intervals."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    figure = empty_figure(5 * len(sets), 3.6)
    views = list(dict.fromkeys(row["view"] for row in rows))
    marks = {"bare": "o", "bare, wider": "s", "IAR": "^", "MORSE": "*"}
    for axis, name in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets):
        for row in (row for row in rows if row["set"] == name):
            mean, low, high = (float(row.get(n) or 0) for n in ("dice_to_full", "low", "high"))
            color, size = f"C{views.index(row['view'])}", 13 if row["network"] == "MORSE" else 7
            step = float(row["training step"])
            axis.errorbar(step, mean, yerr=[[mean - low], [high - mean]], color=color, capsize=2, linewidth=1)
            label = f"{row['view']}, {row['network']}"
            axis.plot(step, mean, marks[row["network"]], color=color, markersize=size, label=label)
        axis.axhline(0, color="grey", linewidth=1)
        axis.set_xlim(0, None)
        axis.set_title(name, fontsize=9, loc="left")
        axis.set_xlabel("training step, of the bare network's at full resolution", fontsize=9)
        axis.legend(fontsize=7)
    figure.axes[0].set_ylabel("Dice points to the same", fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.price", description=__doc__.split("\n")[0])
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--draw", action="store_true", help="the picture alone, from results/price.csv")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = list(csv.DictReader(TABLE.open())) if TABLE.is_file() else []
    if not args.draw:
        measured = {name: rows_of_set(name, args.repeats) for name in args.sets}
        kept = {name: [row for row in rows if row["set"] == name] for name in SETS}
        rows = [row for name in SETS for row in measured.get(name, kept[name])]
        with atomic_write(TABLE) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print(markdown(rows))
    save_figure(draw(rows), PICTURE)


if __name__ == "__main__":
    main()
