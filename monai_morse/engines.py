"""Calling the network from MONAI's engines: points in training, half precision, whole-volume coordinates, finer grids.

Inferers wrap one another: ``AutocastInferer(FineGridInferer(CoordinatesInferer(SlidingWindowInferer(..))))``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, List

import numpy as np
import torch
from monai.data import MetaTensor, decollate_batch
from monai.engines import default_prepare_batch
from monai.inferers import Inferer, SlidingWindowInferer
from monai.utils import fall_back_tuple
from nibabel.orientations import io_orientation
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from monai_morse.errors import InputError, flag, one_of

__all__ = [
    "AutocastInferer",
    "FineGridInferer",
    "CoordinatesInferer",
    "prepare_batch_with_points",
    "volume_placement",
]

COORDINATES = ("window", "volume")


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
            :func:`volume_placement`. In a config: ``{_target_: .., _mode_: callable, coordinates: volume}``.
        prepare: another ``prepare_batch`` that makes image and label of the batch; default MONAI's.

    >>> x = {"image": torch.rand(1, 1, 4, 4), "label": torch.rand(1, 1, 4, 4)}
    >>> image, label, args, kwargs = prepare_batch_with_points(x, "cpu")
    >>> args, kwargs
    ((), {'return_points': True, 'grid': [4, 4], 'placement': None})
    """
    one_of("coordinates", coordinates, COORDINATES)
    image, label, *more = prepare(batchdata, device, non_blocking, **kwargs)
    args, options = more or ((), {})
    if not isinstance(label, Tensor):
        raise InputError("training needs batches with a label: {'image': .., 'label': ..}")
    placement = volume_placement(image) if coordinates == "volume" else None
    return image, label, args, {**options, "return_points": True, "grid": list(label.shape[2:]), "placement": placement}


def volume_placement(image: Tensor) -> Tensor:
    """Where images lie in the scans that they come from, as the network's ``placement``.

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
    >>> volume_placement(list_data_collate([lower_half]))
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
    placement = _to_coordinates(meta["spatial_shape"]) @ np.linalg.inv(original) @ current
    placement = placement @ np.linalg.inv(_to_coordinates(size))
    order = np.zeros((dims, dims))
    for axis, (world_axis, direction) in enumerate(io_orientation(original)):
        order[int(world_axis), axis] = direction
    return torch.from_numpy(order @ placement[:dims]).float()


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


class CoordinatesInferer(Inferer):
    """A sliding-window inferer whose network encodes places in the ``"window"`` or in the whole ``"volume"``, as trained.

    Args:
        inferer: a ``SlidingWindowInferer``.
        coordinates: ``"window"`` (default) changes nothing; for ``"volume"`` see :func:`volume_placement`.

    Raises:
        InputError: for another word, or an inferer without windows.
    """

    def __init__(self, inferer: Inferer, coordinates: str = "window") -> None:
        super().__init__()
        one_of("coordinates", coordinates, COORDINATES)
        if not isinstance(inferer, SlidingWindowInferer):
            raise InputError(f"CoordinatesInferer wraps a SlidingWindowInferer, got a {type(inferer).__name__}")
        self.inferer = inferer
        self.coordinates = coordinates
        self.inferer.with_coord = coordinates == "volume"

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        if self.coordinates == "window":
            return self.inferer(inputs, network, *args, **kwargs)
        size = np.array(inputs.shape[2:])
        whole = volume_placement(inputs)
        roi = np.array(fall_back_tuple(self.inferer.roi_size, tuple(size)))
        padding = np.maximum(roi - size, 0) // 2  # MONAI's own, before the first voxel; windows count from there

        def placed(windows: Tensor, slices: List[Any], *args: Any, **kwargs: Any) -> Any:
            lengths = np.array(windows.shape[2:])
            placements = []
            for place in slices:
                start = np.array([s.start for s in place[2:]]) - padding
                to_image = np.eye(len(size) + 1)
                to_image[:-1, :-1] = np.diag(lengths / size)
                to_image[:-1, -1] = (2 * start + lengths) / size - 1
                placements.append(whole[place[0].start] @ torch.from_numpy(to_image).to(whole))
            return network(windows, *args, placement=torch.stack(placements), **kwargs)

        return self.inferer(inputs, placed, *args, **kwargs)


class FineGridInferer(Inferer):
    """Logits on a grid that is finer than the images', boundaries rendered at its own voxels.

    The result's affine says where its voxels lie; :class:`monai_morse.data.ToScanGridd` takes it to the scan's grid.

    Args:
        inferer: e.g. a ``SlidingWindowInferer``.
        scale: how many times finer, an integer for all axes or one for each; 1 changes nothing.
    """

    def __init__(self, inferer: Inferer, scale: int | Sequence[int] = 2) -> None:
        super().__init__()
        self.inferer = inferer
        self.scale = scale

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        dims = inputs.ndim - 2
        scale = list(self.scale) if isinstance(self.scale, Sequence) else [self.scale] * dims
        if len(scale) != dims or any(not isinstance(s, int) or s < 1 for s in scale):
            raise InputError(f"scale must be a whole number from 1 on, or {dims} of them, got {self.scale!r}")
        if all(s == 1 for s in scale):
            return self.inferer(inputs, network, *args, **kwargs)

        def finer(windows: Tensor, *args: Any, **kwargs: Any) -> Any:
            return network(windows, *args, grid=[n * s for n, s in zip(windows.shape[2:], scale)], **kwargs)

        logits = self.inferer(inputs, finer, *args, **kwargs)
        if isinstance(logits, MetaTensor):
            step = torch.eye(logits.affine.shape[-1], dtype=logits.affine.dtype)
            for axis, s in enumerate(scale):
                step[axis, axis], step[axis, -1] = 1 / s, (1 / s - 1) / 2
            logits.affine = logits.affine @ step.to(logits.affine.device)
        return logits


class AutocastInferer(Inferer):
    """Another inferer under bfloat16 autocast, on CPU as on CUDA.

    The engines' own ``amp`` is float16 with a gradient scaler, on CUDA only. bfloat16 needs no scaler, so ``amp`` stays off.
    On a CPU, convolutions of maps that are less deep than their kernel stay in float32 in training (see ``_ShallowConv3d``).

    Args:
        inferer: the inferer to run, e.g. ``SimpleInferer``.
        enabled: whether to use autocast at all; default True.

    >>> from monai.inferers import SimpleInferer
    >>> AutocastInferer(SimpleInferer())(torch.rand(2, 3), torch.nn.Linear(3, 4)).dtype
    torch.float32
    """

    def __init__(self, inferer: Inferer, enabled: bool | str = True) -> None:
        super().__init__()
        self.inferer = inferer
        self.enabled = flag(enabled, "amp")

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        trained_on_cpu = self.enabled and inputs.device.type == "cpu" and torch.is_grad_enabled()
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=self.enabled):
            with _ShallowConv3d() if trained_on_cpu else nullcontext():
                output = self.inferer(inputs, network, *args, **kwargs)
        return _float(output)


class _ShallowConv3d(TorchFunctionMode):
    """3D convolutions of maps less deep than their kernel, in float32 under autocast.

    torch's bfloat16 gradient of their weights is wrong on CPUs with AVX512 (seen in 2.13: maps two deep under a 3 x 3 x 3
    kernel, relative error 1, now and then NaN).
    """

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.conv3d and len(args) > 1 and args[0].shape[-3] < args[1].shape[-3]:
            exact: List[Any] = [a.float() if isinstance(a, Tensor) else a for a in args]
            with torch.autocast("cpu", enabled=False):
                return func(*exact, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _float(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.float() if output.is_floating_point() else output
    values = [_float(v) for v in output]
    return output._make(values) if hasattr(output, "_make") else values
