"""What a report shows beside its tables: learning curves, and where in the volume voxels are wrong."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from monai_morse.data import atomic_write

__all__ = ["boundary_errors", "draw_curves", "read_curve", "write_curve"]


def write_curve(folder: Path) -> Path | None:
    """Write a training's ``curve.csv`` from its TensorBoard events: iteration, train_loss, val_mean_dice; a row an epoch.

    The loss is the epoch's mean; Dice is blank where the epoch was not validated.

    Args:
        folder: with the events of one training, of all its parts where it was resumed.

    Returns:
        the file, or ``None`` where the events lack the loss or a validation.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    if not {"train_loss", "val_mean_dice"} <= set(events.Tags()["scalars"]):
        return None
    losses = {e.step: e.value for e in events.Scalars("train_loss")}
    dice = {e.step: e.value for e in events.Scalars("val_mean_dice")}
    length = max(losses) // max(dice)  # the last epoch is always validated
    by_epoch = defaultdict(list)
    for iteration, loss in losses.items():
        by_epoch[-(-iteration // length)].append(loss)
    with atomic_write(folder / "curve.csv") as partial, open(partial, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["iteration", "train_loss", "val_mean_dice"])
        for epoch, values in sorted(by_epoch.items()):
            value = dice.get(epoch)
            writer.writerow([epoch * length, f"{np.mean(values):.6f}", "" if value is None else f"{value:.6f}"])
    return folder / "curve.csv"


def read_curve(folder: Path) -> list[tuple[int, float]]:
    """(iteration, validation Dice) of a run's ``curve.csv``; nothing where it has none."""
    path = folder / "curve.csv"
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return [(int(r["iteration"]), float(r["val_mean_dice"])) for r in csv.DictReader(file) if r["val_mean_dice"]]


def draw_curves(path: Path, parts: Mapping[str, Mapping[str, Sequence[Path]]]) -> None:
    """Validation Dice over iterations: a panel a part, a colour a row, a thin line a run and a thick one their mean.

    Args:
        path: PNG to write; removed where no run has a curve.
        parts: folders of the runs by row by part.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # heavy to import
    from matplotlib.figure import Figure

    curves = {
        title: {row: [c for c in map(read_curve, folders) if len(c) > 1] for row, folders in rows.items()}
        for title, rows in parts.items()
    }
    curves = {title: {row: c for row, c in rows.items() if c} for title, rows in curves.items()}
    curves = {title: rows for title, rows in curves.items() if rows}
    if not curves:
        path.unlink(missing_ok=True)
        return
    figure = Figure(figsize=(8, 4.5 * len(curves)), layout="constrained")
    FigureCanvasAgg(figure)
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
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def boundary_errors(folders: Sequence[Path]) -> dict[tuple[float, float], tuple[float, float, float]]:
    """Errors of runs by distance to the true boundary, of their ``boundary.csv``, all voxels of all cases counted alike.

    Returns:
        by bin, (from, to] in mm: share of all voxels in %, and the error rate there in % of the coarse and the rendered map.
    """
    counts: dict[tuple[float, float], np.ndarray] = defaultdict(lambda: np.zeros(3))
    for folder in folders:
        path = folder / "boundary.csv"
        if path.is_file():
            with open(path, newline="") as file:
                for r in csv.DictReader(file):
                    values = [int(r[n]) for n in ("voxels", "coarse_wrong", "rendered_wrong")]
                    counts[float(r["from_mm"]), float(r["to_mm"])] += values
    total = sum(c[0] for c in counts.values())
    return {
        edges: (100 * float(n / total), 100 * float(coarse / n), 100 * float(rendered / n))
        for edges, (n, coarse, rendered) in sorted(counts.items())
        if n
    }
