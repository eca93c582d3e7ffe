"""The paper's four figures, as its released evaluation computes them with medpy, and errors by distance to a boundary.

The figures differ from MONAI's (:class:`monai_morse.handlers.CaseReport` has both) in three ways. Distances are in voxels. 95HD
is the 95th percentile of both directions' surface distances *together*; MONAI's is the larger of the two directions'
percentiles. ASD is directed, the mean distance of the prediction's surface to the truth's; MONAI's here is symmetric.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects
from scipy.spatial import KDTree

from monai_morse.errors import InputError

__all__ = ["PaperFigures", "boundary_distance", "boundary_errors", "paper_figures"]


class PaperFigures(NamedTuple):
    """Of one structure in one scan."""

    dice: float
    jaccard: float
    hd95: float
    asd: float


def paper_figures(pred: np.ndarray, truth: np.ndarray, spacing: float | Sequence[float] = 1.0) -> PaperFigures:
    """Dice, Jaccard, 95HD and ASD of two masks.

    The rule for empty masks is the released evaluation's (``calculate_metric_percase``; TransUNet's has the first and third of
    its figures): where the structure is absent and something is predicted, Dice and Jaccard are 1 and the distances 0; where
    nothing is predicted, all four are 0, whether or not the structure is there. A structure missed altogether thus
    *lowers* the mean distances.

    Args:
        pred: mask (*S), nonzero inside.
        truth: the same of the true structure.
        spacing: size of a voxel along each axis; default 1: distances in voxels, as the paper's.

    Raises:
        InputError: when the masks' shapes differ.

    >>> pred, truth = np.zeros((8, 8)), np.zeros((8, 8))
    >>> truth[2:6, 2:6] = pred[2:6, 3:7] = 1
    >>> paper_figures(pred, truth)
    PaperFigures(dice=0.75, jaccard=0.6, hd95=1.0, asd=0.5)
    """
    pred, truth = np.asarray(pred) != 0, np.asarray(truth) != 0
    if pred.shape != truth.shape:
        raise InputError(f"prediction and truth must have one shape, got {pred.shape} and {truth.shape}")
    if not pred.any():
        return PaperFigures(0.0, 0.0, 0.0, 0.0)
    if not truth.any():
        return PaperFigures(1.0, 1.0, 0.0, 0.0)
    # in the box around both alone: no surface lies outside it, and beyond its faces all counts as empty, as beyond the scan's
    box = find_objects((pred | truth).astype(np.uint8))[0]
    pred, truth = pred[box], truth[box]
    both, either = int(np.count_nonzero(pred & truth)), int(np.count_nonzero(pred | truth))
    surfaces = [np.argwhere(mask & ~binary_erosion(mask)) * np.asarray(spacing, dtype=float) for mask in (pred, truth)]
    # medpy reads these from distance maps of the whole scan; nearest neighbours are the same distances in less time
    to_truth, to_pred = KDTree(surfaces[1]).query(surfaces[0])[0], KDTree(surfaces[0]).query(surfaces[1])[0]
    hd95 = np.percentile(np.hstack((to_truth, to_pred)), 95)
    return PaperFigures(2 * both / (both + either), both / either, float(hd95), float(to_truth.mean()))


def boundary_distance(labels: np.ndarray, spacing: float | Sequence[float] = 1.0) -> np.ndarray:
    """Distance of every voxel to the nearest one of another label, centre to centre; infinite where there is one label alone.

    Args:
        labels: label map (*S). spacing: size of a voxel along each axis; default 1: distances in voxels.

    >>> boundary_distance(np.array([0, 0, 0, 1, 1, 2]), 2.0)
    array([6., 4., 2., 2., 2., 2.])
    """
    labels = np.asarray(labels)
    found = np.full(labels.shape, np.inf)
    for label in np.unique(labels):
        inside = labels == label
        if not inside.all():
            found[inside] = distance_transform_edt(inside, spacing)[inside]
    return found


def boundary_errors(
    counts: Iterable[tuple[float, float, int, int, int]],
) -> dict[tuple[float, float], tuple[float, float, float]]:
    """Error rates by distance to the true boundary, all voxels alike.

    Args:
        counts: as :class:`monai_morse.handlers.BoundaryErrors` writes them: from, to (mm), voxels, wrong ones of the coarse
            map, wrong ones of the rendered map; a bin of distances may come more than once, as of several cases.

    Returns:
        by bin, (from, to], without the empty ones: the share of all voxels, and the error rates of the coarse and of the
        rendered map there, in %.

    >>> boundary_errors([(0, 1, 100, 40, 30), (0, 1, 100, 20, 10), (1, np.inf, 600, 6, 3)])
    {(0, 1): (25.0, 30.0, 20.0), (1, inf): (75.0, 1.0, 0.5)}
    """
    found: dict[tuple[float, float], np.ndarray] = defaultdict(lambda: np.zeros(3))
    for low, high, *numbers in counts:
        found[low, high] += numbers
    total = sum(c[0] for c in found.values())
    return {
        edges: (100 * float(n / total), 100 * float(coarse / n), 100 * float(rendered / n))
        for edges, (n, coarse, rendered) in sorted(found.items())
        if n
    }
