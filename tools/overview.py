"""``python -m tools.overview``: the first table of docs/results.md as a picture, docs/results/overview.png.

A row of the table is a line of the picture: MORSE's difference to its bare backbone in Dice points with its 95 % confidence
interval, the lowest and the highest single training in grey, and the difference in average surface distance in %.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from monai_morse.data import atomic_write

DOCS = Path(__file__).resolve().parents[1] / "docs"
NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:\.\d+)?")


class Line(NamedTuple):
    """A row of the table; ``interval`` is mean, low, high, ``runs`` empty for a single training."""

    setting: str
    name: str
    interval: list[float]
    runs: list[float]
    asd: float


def lines_of(page: str) -> list[Line]:
    """The rows of a page's first table.

    >>> lines_of("| at | of | DSC | runs | 95HD | ASD | step |\\n| --- | --- | --- | --- | --- | --- | --- |\\n"
    ...          "| 3 mm | UNet | +2.16 [+1.84, +2.47] | - | -8 % | (-15 %) | 1.67 |\\n\\n")
    [Line(setting='3 mm', name='UNet', interval=[2.16, 1.84, 2.47], runs=[], asd=-15.0)]
    """
    rows = re.search(r"^\|.*\n\| ---.*\n((?:\|.*\n)+)", page, re.MULTILINE)[1].splitlines()
    lines: list[Line] = []
    for row in rows:
        setting, name, dice, runs, _, asd = (cell.strip() for cell in row.strip("|").split("|")[:6])
        numbers = [[float(n) for n in NUMBER.findall(cell)] for cell in (dice, runs, asd)]
        lines.append(Line(setting or lines[-1].setting, name, numbers[0], numbers[1], numbers[2][0]))
    return lines


def draw(lines: list[Line], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = list(dict.fromkeys(line.setting for line in lines))
    figure = Figure(figsize=(10, 0.32 * len(lines) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    dice, asd = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    for y, line in enumerate(lines):
        color = f"C{settings.index(line.setting)}"
        mean, low, high = line.interval
        if line.runs:
            dice.plot(line.runs, [y, y], "|", color="grey", markersize=11)
        dice.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color=color, capsize=3)
        asd.plot([0, line.asd], [y, y], color=color)
        asd.plot(line.asd, y, "o", color=color)
    for axis, words in ((dice, "Dice points (right is better)"), (asd, "ASD, % (left is better)")):
        axis.axvline(0, color="grey", linewidth=1)
        axis.set_xlabel(words, fontsize=9)
    dice.set_yticks(range(len(lines)), [f"{line.setting}: {line.name}" for line in lines], fontsize=8)
    dice.invert_yaxis()
    dice.set_title("MORSE - bare backbone", fontsize=9, loc="left")
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


if __name__ == "__main__":
    draw(lines_of((DOCS / "results.md").read_text()), DOCS / "results" / "overview.png")
