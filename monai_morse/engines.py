"""Calling the network from MONAI's trainers: the points that the loss needs, and where in its scan a window lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor, decollate_batch
from monai.engines import default_prepare_batch
from nibabel.orientations import io_orientation
from torch import Tensor

from monai_morse.config import check_choice, typed_arguments
from monai_morse.errors import InputError

__all__ = ["prepare_batch_with_points", "window_to_scan"]

COORDINATES = ("window", "volume")


@typed_arguments
def prepare_batch_with_points(
    batchdata: Any,
    device: Any = None,
    non_blocking: bool = False,
    coordinates: str = "window",
    prepare: Callable = default_prepare_batch,
    **kwargs: Any,
) -> tuple:
    """``prepare_batch`` of ``SupervisedTrainer``: calls the network with ``return_points=True``.

    Points are drawn from the voxels of the label's grid, which may be finer than the image's.

    Args:
        coordinates: what the renderer encodes: the place in the ``"window"`` (default) or in the whole ``"volume"``, see
            :func:`window_to_scan`. In a config: ``{_target_: .., _mode_: callable, coordinates: volume}``.
        prepare: another ``prepare_batch`` that makes image and label of the batch; default MONAI's.

    >>> x = {"image": torch.rand(1, 1, 4, 4), "label": torch.rand(1, 1, 4, 4)}
    >>> image, label, args, kwargs = prepare_batch_with_points(x, "cpu")
    >>> args, kwargs
    ((), {'return_points': True, 'grid': [4, 4], 'window_affine': None})
    """
    check_choice("coordinates", coordinates, COORDINATES)
    image, label, *more = prepare(batchdata, device, non_blocking, **kwargs)
    args, options = more or ((), {})
    if not isinstance(label, Tensor):
        raise InputError("training needs batches with a label: {'image': .., 'label': ..}")
    window_affine = window_to_scan(image) if coordinates == "volume" else None
    options = {**options, "return_points": True, "grid": list(label.shape[2:]), "window_affine": window_affine}
    # plain: around a MetaTensor's prediction a compiled trainer would put the image's metadata, and here that is three tensors
    return image.as_tensor() if isinstance(image, MetaTensor) else image, label, args, options


def window_to_scan(image: Tensor) -> Tensor:
    """Where images lie in the scans that they come from, as the network's ``window_affine``.

    A scan's box, as it was stored, has coordinates -1 to 1 along its axes, ordered and directed as close to R, A, S as they
    can be. Found from the affine that MONAI's spatial transforms keep up to date: crops, flips, rotations and resampling in
    between do not matter.

    Args:
        image: (B, C, *S), a ``MetaTensor`` that ``LoadImage`` made; S may be a crop of the scan.

    Returns:
        (B, len(S), len(S) + 1): the affine map from the image's coordinates (-1 to 1) to the scan's.

    Raises:
        InputError: when the image has no such history.

    >>> from monai.data import list_data_collate
    >>> meta = {"original_affine": torch.eye(4), "spatial_shape": (10, 10, 10), "affine": torch.eye(4)}
    >>> lower_half = MetaTensor(torch.rand(1, 5, 10, 10), meta=meta)
    >>> window_to_scan(list_data_collate([lower_half]))
    tensor([[[ 0.5000,  0.0000,  0.0000, -0.5000],
             [ 0.0000,  1.0000,  0.0000,  0.0000],
             [ 0.0000,  0.0000,  1.0000,  0.0000]]])
    """
    items = decollate_batch(image) if isinstance(image, MetaTensor) else [image]
    return torch.stack([_placement(item) for item in items]).to(image.device)


def _placement(image: Any) -> Tensor:
    size = image.shape[1:]
    dims = len(size)
    meta = getattr(image, "meta", {})
    if "original_affine" not in meta or len(np.atleast_1d(meta.get("spatial_shape", ()))) != dims:
        raise InputError(
            "coordinates='volume' needs images that LoadImage read and that kept their affine: MetaTensors of as many axes "
            "as the scan; use coordinates='window' for others"
        )
    current, original = (_spatial(a, dims) for a in (image.affine, meta["original_affine"]))
    # image coordinates -> image voxels -> world -> scan voxels -> scan coordinates
    window_affine = _to_coordinates(meta["spatial_shape"]) @ np.linalg.inv(original) @ current
    window_affine = window_affine @ np.linalg.inv(_to_coordinates(size))
    order = np.zeros((dims, dims))
    for axis, (world_axis, direction) in enumerate(io_orientation(original)):
        order[int(world_axis), axis] = direction
    return torch.from_numpy(order @ window_affine[:dims]).float()


def _spatial(affine: Any, dims: int) -> np.ndarray:
    full = np.asarray(affine, dtype=float)
    square = np.eye(dims + 1)
    square[:dims, :dims], square[:dims, -1] = full[:dims, :dims], full[:dims, -1]
    return square


def _to_coordinates(size: Sequence[int]) -> np.ndarray:
    """The affine map from voxel indices to coordinates, ``2 (i + 0.5) / H - 1``."""
    lengths = np.asarray(size, dtype=float)
    matrix = np.diag([*(2 / lengths), 1.0])
    matrix[:-1, -1] = 1 / lengths - 1
    return matrix
