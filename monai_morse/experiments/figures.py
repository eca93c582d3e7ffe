"""Figures of rows: their differences to the baseline, and their learning curves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np

from monai_morse.data import atomic_write

from .runs import FIGURES
from .statistics import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # heavy to import

__all__ = ["curves_figure", "differences_figure", "empty_figure", "save_figure"]

Parts = Mapping[str, Sequence[Row]]  # rows by the title of their table


def differences_figure(parts: Parts, against: str) -> Figure | None:
    """Each row's difference to ``against`` with its interval, and in dots those of its runs, DSC and 95HD; a panel a part.

    Returns:
        ``None`` where no row has a difference.
    """
    shown = {title: [r for r in rows if r.difference(0) is not None] for title, rows in parts.items()}
    shown = {title: rows for title, rows in shown.items() if rows}
    if not shown:
        return None
    heights = [len(rows) + 2 for rows in shown.values()]
    figure = empty_figure(10, 0.4 * sum(heights) + 0.6)
    grid = figure.subplots(len(shown), 2, squeeze=False, sharey="row", height_ratios=heights)
    for axes, (title, rows) in zip(grid, shown.items()):
        for axis, i, better in zip(axes, (0, 2), ("right is better", "left is better")):
            for y, row in enumerate(reversed(rows)):
                d = row.difference(i)
                if d is not None:
                    axis.plot(d.runs, [y] * len(d.runs), ".", color="grey")
                    axis.errorbar(d.mean, y, xerr=[[d.mean - d.low], [d.high - d.mean]], fmt="o", color="C0", capsize=3)
            axis.axvline(0, color="grey", linewidth=1)
            axis.set_yticks(range(len(rows)), [fill(row.name, 40) for row in reversed(rows)], fontsize=9)
            axis.set_ylim(-0.5, len(rows) - 0.5)
            axis.set_xlabel(f"{FIGURES[i]} - {against}'s ({better})", fontsize=9)
        axes[0].set_title(title, fontsize=9, loc="left")
    return figure


def curves_figure(parts: Parts) -> Figure | None:
    """Validation Dice over iterations: a panel a part, a colour a row, a thin line a run and a thick one their mean.

    Returns:
        ``None`` where no run has a curve.
    """
    curves = {
        title: {row.name: [run.curve for run in row.runs if len(run.curve) > 1] for row in rows}
        for title, rows in parts.items()
    }
    curves = {title: {row: c for row, c in rows.items() if c} for title, rows in curves.items()}
    curves = {title: rows for title, rows in curves.items() if rows}
    if not curves:
        return None
    figure = empty_figure(8, 4.5 * len(curves))
    for axis, (title, rows) in zip(figure.subplots(len(curves), squeeze=False)[:, 0], curves.items()):
        for i, (row, found) in enumerate(rows.items()):
            values = defaultdict(list)
            for curve in found:
                axis.plot(*zip(*curve), color=f"C{i}", linewidth=0.5, alpha=0.6)
                for iteration, dice in curve:
                    values[iteration].append(dice)
            everywhere = sorted(i for i, v in values.items() if len(v) == len(found))
            axis.plot(everywhere, [np.mean(values[i]) for i in everywhere], color=f"C{i}", linewidth=2, label=row)
        axis.set_ylim(np.percentile([d for found in rows.values() for c in found for _, d in c], 15) - 0.02, None)
        axis.set(title=f"{title}: learning curves", xlabel="iteration", ylabel="validation Dice")
        axis.legend(loc="lower right")
    return figure


def empty_figure(width: float, height: float) -> Figure:
    """A figure, in inches, that needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure | None, path: Path) -> None:
    """Write a PNG, or remove it where there is no figure."""
    if figure is None:
        path.unlink(missing_ok=True)
        return
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
