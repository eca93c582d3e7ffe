"""Axes by role: the two in the plane of the slices first, the one through them last."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Orientation
from nibabel.affines import voxel_sizes
from nibabel.orientations import aff2axcodes

from monai_morse.config import typed_arguments
from monai_morse.errors import InputError

__all__ = ["ThroughPlaneLastd", "axes_by_role"]

logger = logging.getLogger(__name__)

WORLD = ("R", "A", "S")
OPPOSITE = {"L": "R", "P": "A", "I": "S"}


def _through_plane(spacing: Sequence[float], ratio: float) -> int | None:
    """The axis along which voxels are ``ratio`` times as long as along any other."""
    *_, second, longest = sorted(spacing)
    return list(spacing).index(longest) if longest >= ratio * second else None


def axes_by_role(affine: Any, ratio: float = 1.5) -> str:
    """Axis codes with the through-plane axis last: the others stay in the order R, A, S.

    Args:
        affine: (4, 4), voxels to mm in RAS.
        ratio: how many times longer than along the next longest axis voxels must be along the through-plane one; default 1.5.
            Where none is, the scan has no such axis, and the codes are ``"RAS"``.

    Raises:
        InputError: for an affine that does not say where the axes point.

    >>> axes_by_role(np.diag([1.0, 1.0, 5.0, 1.0])), axes_by_role(np.diag([-0.8, 6.0, 0.8, 1.0])), axes_by_role(np.eye(4))
    ('RAS', 'RSA', 'RAS')
    """
    affine = np.asarray(affine, dtype=float)
    codes = [OPPOSITE.get(code, code) for code in aff2axcodes(affine)]
    if sorted(map(str, codes)) != sorted(WORLD):
        raise InputError(f"the affine does not tell where the axes point:\n{affine}")
    axis = _through_plane(voxel_sizes(affine), ratio)
    if axis is None:
        return "".join(WORLD)
    return "".join([*(code for code in WORLD if code != codes[axis]), codes[axis]])


class ThroughPlaneLastd(MapTransform):
    """Turn 3D images so that their axes have roles: in-plane, in-plane, through-plane, each pointing to R, A or S.

    In place of ``Orientationd(axcodes="RAS")``, which it equals for axial and for isotropic scans. Strides, patches, planned
    networks and slices go by these roles, so that a coronal scan's slices are cut in its own plane. A warning says so: only a
    network trained on such slices knows them. Goes by the affine of the first key, so that an image and its labels are turned
    alike.

    Args:
        keys: ``MetaTensor`` (C, H, W, D).
        spacing: of the grid that the network sees, in mm. If its last axis is not ``ratio`` times as long as the others, that
            grid has no roles, and every scan is turned to RAS. Default: none, axes always have roles.
        ratio: see :func:`axes_by_role`; default 1.5.
        allow_missing_keys: default False.

    >>> scan = MetaTensor(torch.rand(1, 8, 4, 6), affine=torch.diag(torch.tensor([1.0, 5.0, 1.0, 1.0])))
    >>> ThroughPlaneLastd("image")({"image": scan})["image"].shape
    torch.Size([1, 8, 6, 4])
    """

    @typed_arguments
    def __init__(
        self,
        keys: KeysCollection,
        spacing: Sequence[float] | None = None,
        ratio: float = 1.5,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.ratio = ratio
        self.by_role = spacing is None or _through_plane(spacing, ratio) == 2

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        keys: Sequence[Hashable] = list(self.key_iterator(d))
        codes = axes_by_role(torch.as_tensor(d[keys[0]].affine).cpu().numpy(), self.ratio) if self.by_role else "".join(WORLD)
        if codes != "".join(WORLD):
            name = getattr(d[keys[0]], "meta", {}).get("filename_or_obj", "a scan")
            plane = {"R": "sagittal", "A": "coronal"}[codes[-1]]
            logger.warning(
                "%s: its slices are %s; the axis through them goes last (%s), as in training on such slices", name, plane, codes
            )
        turn = Orientation(axcodes=codes, labels=None)
        for key in keys:
            if not isinstance(d[key], MetaTensor):
                raise InputError(f"{key!r} must be a MetaTensor with LoadImage's meta data")
            d[key] = turn(d[key])
        return d
