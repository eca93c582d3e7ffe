"""Pictures for people who would rather look than read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from monai_morse.data import atomic_write

__all__ = ["boundary_picture"]


def boundary_picture(
    path: str | Path,
    image: np.ndarray,
    truth: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    points: np.ndarray,
    title: str = "",
    slices: int = 1,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> Path:
    """Slices of a case: contours of the truth and of each prediction, and the voxels that the renderer re-rendered.

    The slices lie across the last axis: the one with most foreground in the truth, or, of each of ``slices`` equal parts of the
    structures' extent, the one with most.

    Args:
        path: PNG to write. image, truth, points: (H, W, D). predictions: label maps (H, W, D) by system.
        title: e.g. the case's name.
        slices: how many, a row each; default 1.
        spacing: of the voxels, in mm, for the pictures' proportions; default equal.

    Returns:
        the path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # heavy to import, and of no use to training
    from matplotlib.figure import Figure

    foreground = (truth > 0).sum((0, 1))
    extent = np.flatnonzero(foreground) if foreground.any() else np.array([truth.shape[2] // 2])
    parts = np.array_split(np.arange(extent[0], extent[-1] + 1), slices)
    chosen = [int(part[np.argmax(foreground[part])]) for part in parts if part.size]

    panels = ["image and truth", *predictions, "re-rendered voxels"]
    aspect = spacing[1] / spacing[0]
    limits = []  # of the structures in these slices, and some voxels around them
    for across in (1, 0):
        inside = np.flatnonzero((truth[:, :, chosen] > 0).any((across, 2)))
        limits.append((inside[0] - 6, inside[-1] + 6) if inside.size else (0, truth.shape[1 - across] - 1))
    height = 4 * aspect * np.ptp(limits[1]) / np.ptp(limits[0]) + 0.4
    figure = Figure(figsize=(4 * len(panels), height * len(chosen) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, k in zip(figure.subplots(len(chosen), len(panels), squeeze=False), chosen):
        low, high = np.percentile(image[:, :, k], (1, 99.5))
        for axis, name in zip(axes, panels):
            axis.imshow(image[:, :, k].T, cmap="gray", origin="lower", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect)
            for label in range(1, int(truth.max()) + 1):
                axis.contour((truth[:, :, k] == label).T.astype(float), [0.5], colors="lime", linewidths=1)
                if name in predictions:
                    axis.contour((predictions[name][:, :, k] == label).T.astype(float), [0.5], colors="red", linewidths=1)
            if name == panels[-1]:
                y, x = np.nonzero(points[:, :, k])
                axis.scatter(y, x, s=3, c="gold", linewidths=0)
            axis.set_xlim(limits[0])
            axis.set_ylim(limits[1])
            axis.set_title(f"{name} (red), truth (green)" if name in predictions else name, fontsize=10)
            axis.axis("off")
        axes[0].set_title(f"image and truth, slice {k}", fontsize=10)
    figure.suptitle(title)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    return Path(path)
