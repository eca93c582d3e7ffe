"""``python -m tools.overview``: what MORSE gains in each setting, as the first table of docs/results.md and as a picture.

The table is printed, the picture is docs/figures/overview.png. A line is MORSE's difference to its bare backbone: Dice points
with their 95 % confidence interval, the lowest and the highest single training in grey, and both distances in %.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from monai_morse.experiments.figures import empty_figure, save_figure
from monai_morse.experiments.runs import read_runs
from monai_morse.experiments.statistics import Difference, Row, rows_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
LINES = [  # setting, label, table in results/, backbone, row
    ("3 mm, volumes", "DynUNet, five folds", "hippocampus_3mm_folds", "dynunet", "+ MORSE"),
    ("3 mm, volumes", "SegResNet", "hippocampus_3mm", "segresnet", "+ MORSE"),
    ("2 mm, volumes", "DynUNet, five folds", "hippocampus_2mm_folds", "dynunet", "+ MORSE"),
    ("2 mm, slices", "DynUNet", "slices_2mm", "dynunet", "+ MORSE, patch_norm True"),
    ("2 mm, slices", "SegResNet", "slices_2mm", "segresnet", "+ MORSE, num_train not set, patch_norm True"),
    ("1 mm, volumes", "DynUNet", "hippocampus_1mm", "dynunet", "+ MORSE"),
    ("1 mm, slices", "DynUNet", "slices_1mm", "dynunet", "+ MORSE, image_patch 7, patch_norm True"),
    ("phantom's livers, half their resolution", "UNet3D", "liver_phantom", "unet3d", "+ MORSE"),
]


class Line(NamedTuple):
    """A line of the table and of the picture, with its differences in the four figures."""

    setting: str
    label: str
    differences: list[Difference]


@functools.cache
def _rows(table: str, backbone: str) -> dict[str, Row]:
    runs, _ = read_runs(ROOT / "results" / f"{table}.csv.gz")
    return {row.name: row for row in rows_of([run for run in runs if run.settings["backbone"] == backbone])[0]}


def read_lines() -> list[Line]:
    """The lines, from the tables in results/."""
    return [Line(s, label, [_rows(t, b)[row].difference(i) for i in range(4)]) for s, label, t, b, row in LINES]


def markdown(lines: Sequence[Line]) -> str:
    """The rows of the table. What has an interval over zero stands in brackets."""

    def cell(text: str, d: Difference) -> str:
        return text if d.low > 0 or d.high < 0 or d.low == d.high else f"({text})"

    rows = []
    for above, line in zip([None, *lines], lines):
        dice, _, hd95, asd = line.differences
        cells = ["" if above and above.setting == line.setting else line.setting, line.label]
        cells.append(cell(f"{dice.mean:+.2f} [{dice.low:+.2f}, {dice.high:+.2f}]", dice))
        cells.append(f"{min(dice.runs):+.2f} to {max(dice.runs):+.2f}" if len(dice.runs) > 1 else "-")
        cells += [cell(f"{round(percent(d))} %", d) for d in (hd95, asd)]
        rows.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    head = ["seen at", "network", "ΔDSC [95 % CI]", "of single runs", "95HD", "ASD"]
    return "\n".join([f"| {' | '.join(head)} |", "| --- " * len(head) + "|", *rows])


def percent(d: Difference) -> float:
    """A difference in % of the baseline's figure."""
    return 100 * d.mean / d.baseline


def draw(lines: Sequence[Line]) -> Figure:
    """The picture: Dice with intervals on the left, ASD in % on the right."""
    settings = list(dict.fromkeys(line.setting for line in lines))
    figure = empty_figure(10, 0.32 * len(lines) + 1)
    dice, asd = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    for y, line in enumerate(lines):
        color = f"C{settings.index(line.setting)}"
        d, change = line.differences[0], percent(line.differences[3])
        if len(d.runs) > 1:
            dice.plot([min(d.runs), max(d.runs)], [y, y], "|", color="grey", markersize=11)
        dice.errorbar(d.mean, y, xerr=[[d.mean - d.low], [d.high - d.mean]], fmt="o", color=color, capsize=3)
        asd.plot([0, change], [y, y], color=color)
        asd.plot(change, y, "o", color=color)
    for axis, words in ((dice, "Dice points (right is better)"), (asd, "ASD, % (left is better)")):
        axis.axvline(0, color="grey", linewidth=1)
        axis.set_xlabel(words, fontsize=9)
    dice.set_yticks(range(len(lines)), [f"{line.setting}: {line.label}" for line in lines], fontsize=8)
    dice.invert_yaxis()
    dice.set_title("MORSE - bare backbone", fontsize=9, loc="left")
    return figure


if __name__ == "__main__":
    found = read_lines()
    print(markdown(found))
    save_figure(draw(found), ROOT / "docs" / "figures" / "overview.png")
