"""From the grid that a network ran on to the scan's own."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, SpatialResample

from monai_morse.errors import InputError

__all__ = ["ToScanGridd"]


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
        return d
