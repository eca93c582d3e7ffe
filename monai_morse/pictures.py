"""Pictures for people who would rather look than read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from monai_morse.data import written_whole

__all__ = ["boundary_picture"]


def boundary_picture(
    path: str | Path,
    image: np.ndarray,
    truth: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    points: np.ndarray,
    title: str = "",
) -> Path:
    """One slice of a case: contours of the truth and of each prediction, and the voxels that the renderer re-rendered.

    The slice is the one across the last axis with most foreground in the truth.

    Args:
        path: PNG to write. image, truth, points: (H, W, D). predictions: label maps (H, W, D) by system.
        title: e.g. the case's name.

    Returns:
        the path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # heavy to import, and of no use to training
    from matplotlib.figure import Figure

    k = int(np.argmax((truth > 0).sum((0, 1))))
    low, high = np.percentile(image[:, :, k], (1, 99.5))
    panels = ["image and truth", *predictions, "re-rendered voxels"]
    figure = Figure(figsize=(4 * len(panels), 4.4 * image.shape[1] / image.shape[0] + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    rows = np.flatnonzero((truth[:, :, k] > 0).any(1))
    columns = np.flatnonzero((truth[:, :, k] > 0).any(0))
    for axis, name in zip(figure.subplots(1, len(panels)), panels):
        axis.imshow(image[:, :, k].T, cmap="gray", origin="lower", vmin=low, vmax=max(high, low + 1e-6))
        for label in range(1, int(truth.max()) + 1):
            axis.contour((truth[:, :, k] == label).T.astype(float), [0.5], colors="lime", linewidths=1)
            if name in predictions:
                axis.contour((predictions[name][:, :, k] == label).T.astype(float), [0.5], colors="red", linewidths=1)
        if name == panels[-1]:
            y, x = np.nonzero(points[:, :, k])
            axis.scatter(y, x, s=3, c="gold", linewidths=0)
        if rows.size and columns.size:
            axis.set_xlim(rows[0] - 6, rows[-1] + 6)
            axis.set_ylim(columns[0] - 6, columns[-1] + 6)
        axis.set_title(f"{name} (red), truth (green)" if name in predictions else name, fontsize=10)
        axis.axis("off")
    figure.suptitle(f"{title}, slice {k}")
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    return Path(path)
