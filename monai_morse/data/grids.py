"""Where voxels lie: what a scan's grid may be, whether two are one, and back from the network's grid to the scan's.

A grid is a shape and an affine, voxel indices to mm in RAS coordinates, (4, 4).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, SpatialResample

from monai_morse.config import parse_number, typed_arguments
from monai_morse.errors import InputError

__all__ = ["Limits", "MatchGridd", "ToScanGridd", "affine_fault", "grid_misfit", "grid_shift", "voxel_size"]

FARTHEST = 1e5  # mm from the origin; beyond, an affine in float32 no longer tells neighbouring voxels apart


@typed_arguments
@dataclass(frozen=True)
class Limits:
    """What a plausible scan is; others are refused before they take the machine's memory or hours.

    Args:
        spacing: smallest and largest voxel size in mm; default (0.05, 15).
        voxels: most voxels, as stored and as resampled; default 2 ** 28, four CTs of 512 x 512 x 256.
        resampled_to: voxel size in mm that scans are resampled to; default: they are not.
        hounsfield: whether its values are to be in HU, else a warning is logged; default False.

    >>> Limits().fault((512, 512, 200), np.diag([781.0, 781.0, 5000.0, 1.0]))
    'its voxels measure 781 x 781 x 5000 mm, plausible are 0.05 to 15; write its affine in mm, or set --limits#spacing'
    >>> Limits(resampled_to=(1.0, 1.0, 2.0)).fault((512, 512, 200), np.diag([0.8, 0.8, 5.0, 1.0]))
    """

    spacing: Sequence[float] = (0.05, 15.0)
    voxels: float = 2**28
    resampled_to: Sequence[float] | None = None
    hounsfield: bool = False

    def __post_init__(self) -> None:
        pair = isinstance(self.spacing, (list, tuple)) and len(self.spacing) == 2
        if not pair or not 0 <= self.spacing[0] < self.spacing[1]:
            raise InputError(f"limits: spacing must be the smallest and the largest voxel size in mm, got {self.spacing!r}")
        parse_number(self.voxels, "limits: voxels", within="[1, inf)")
        for size in self.resampled_to or ():
            parse_number(size, "limits: resampled_to (spacing)", within=f"[{self.spacing[0]}, {self.spacing[1]}]")

    def fault(self, shape: Sequence[int], affine: np.ndarray) -> str | None:
        """Why a scan's grid (X, Y, Z) is beyond the limits; None where it is not."""
        size = voxel_size(affine)
        if size.min() < self.spacing[0] or size.max() > self.spacing[1]:
            return (
                f"its voxels measure {_times(size)} mm, plausible are {self.spacing[0]:g} to {self.spacing[1]:g}; write its "
                "affine in mm, or set --limits#spacing"
            )
        grids = {"it has": np.array(shape[:3], float)}
        if self.resampled_to is not None:
            grids[f"resampled to {_times(self.resampled_to)} mm it has"] = np.ceil(shape[:3] * size / self.resampled_to)
        for what, count in grids.items():
            if np.prod(count) > self.voxels:
                return f"{what} {_times(count)} voxels, more than {self.voxels:.3g}; crop it, or set --limits#voxels"
        return None


def _times(numbers: Any) -> str:
    return " x ".join(f"{n:.3g}" if n < 1000 or n != round(n) else f"{n:.0f}" for n in numbers)


def voxel_size(affine: np.ndarray) -> np.ndarray:
    """Lengths of a voxel's edges in mm, (3,)."""
    return np.linalg.norm(np.asarray(affine, float)[:3, :3], axis=0)


def affine_fault(affine: np.ndarray) -> str | None:
    """Why an affine places no voxels in space; None where it does.

    >>> affine_fault(np.diag([1.0, 1.0, 0.0, 1.0]))
    'its affine is not invertible (voxels of 1 x 1 x 0 mm); write it with the affine of its source'
    """
    remedy = "write it with the affine of its source"
    if not np.isfinite(affine).all():
        return f"its affine holds NaN or infinity; {remedy}"
    size = voxel_size(affine)
    if not size.all() or abs(np.linalg.det(affine[:3, :3] / size)) < 0.05:  # axes within 3 degrees of a plane
        return f"its affine is not invertible (voxels of {_times(size)} mm); {remedy}"
    far = np.abs(affine[:3, 3]).max()
    return f"its first voxel lies {far:.3g} mm from the origin; {remedy}" if far > FARTHEST else None


def grid_shift(shape: Sequence[int], affine: np.ndarray, other: np.ndarray) -> float:
    """How far apart, in mm at most, two affines put the voxels of a grid of this shape (X, Y, Z)."""
    corners = np.array(np.meshgrid(*[[0, n - 1] for n in shape])).reshape(3, -1)
    difference = np.asarray(affine, float) - np.asarray(other, float)
    return float(np.linalg.norm(difference[:3, :3] @ corners + difference[:3, 3:], axis=0).max())


def grid_misfit(shape: Sequence[int], affine: np.ndarray, to_shape: Sequence[int], to_affine: np.ndarray) -> str | None:
    """How voxels do not lie on those of another grid, up to a twentieth of a voxel; None where they do."""
    if tuple(shape) != tuple(to_shape):
        return f"shape {tuple(shape)} differs from its image's {tuple(to_shape)}"
    shift = grid_shift(shape, affine, to_affine)
    if shift <= 0.05 * voxel_size(to_affine).min():
        return None
    return f"its affine puts it up to {shift:.3g} mm away from its image"


class MatchGridd(MapTransform):
    """Give labels, which lie on their image's grid up to rounding, that grid to the last digit.

    The transforms that follow then treat both alike; a voxel size of 5.002 mm beside 5 is one slice more otherwise.

    Args:
        keys: labels, ``MetaTensor`` (1, *S) as ``LoadImage`` makes them.
        key_dst: the image; default "image".

    Raises:
        InputError: when a label does not lie on its image's grid.

    >>> image, label = MetaTensor(torch.rand(1, 4, 4, 4)), MetaTensor(torch.rand(1, 4, 4, 4), affine=1.001 * torch.eye(4))
    >>> MatchGridd("label")({"image": image, "label": label})["label"].affine[0, 0]
    tensor(1., dtype=torch.float64)
    """

    def __init__(self, keys: KeysCollection, key_dst: str = "image") -> None:
        super().__init__(keys)
        self.key_dst = key_dst

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        image = d[self.key_dst]
        for key in self.key_iterator(d):
            label = d[key]
            misfit = grid_misfit(label.shape[1:], label.affine.numpy(), image.shape[1:], image.affine.numpy())
            if misfit:
                raise InputError(f"{label.meta.get('filename_or_obj', key)}: {misfit}; resample the label to the image")
            d[key] = label.clone()
            d[key].affine = image.affine.clone()
            for name in {"original_affine", "pixdim"} & image.meta.keys():
                d[key].meta[name] = image.meta[name]
        return d


class ToScanGridd(MapTransform):
    """Resample predictions to the grid of the scan as it was stored, in one linear interpolation.

    Goes by the affine alone, so it undoes orientation, spacing, crops and pads in whatever order they came, for predictions
    on the image's grid (as ``Invertd`` does) and on a finer one (:class:`monai_morse.inferers.FineGridInferer`).

    Args:
        keys: predictions, ``MetaTensor`` (C, *S) with the image's meta data, e.g. probabilities of ``"pred"``.
        allow_missing_keys: default False.

    Raises:
        InputError: when a prediction does not know its scan's grid.

    >>> meta = {"original_affine": torch.eye(4), "spatial_shape": (8, 6, 4), "affine": torch.diag(torch.tensor([2.0, 2, 2, 1]))}
    >>> ToScanGridd("pred")({"pred": MetaTensor(torch.rand(3, 4, 3, 2), meta=meta)})["pred"].shape
    torch.Size([3, 8, 6, 4])
    """

    @typed_arguments
    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.resample = SpatialResample(mode="bilinear", padding_mode="border", align_corners=False)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            prediction = d[key]
            if not isinstance(prediction, MetaTensor) or "original_affine" not in prediction.meta:
                raise InputError(f"{key!r} does not know its scan's grid: it must be a MetaTensor with LoadImage's meta data")
            size = [int(n) for n in prediction.meta["spatial_shape"]]
            affine = torch.as_tensor(prediction.meta["original_affine"])
            d[key] = self.resample(prediction, dst_affine=affine, spatial_size=size)
            d[key].affine = affine  # where nothing is resampled, MONAI keeps an affine that is equal up to 1e-3
        return d
