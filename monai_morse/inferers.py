"""Inferers around MONAI's: half precision, the place in the whole scan, finer grids; :class:`MorseInferer` has them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, List

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SimpleInferer, SliceInferer, SlidingWindowInferer
from monai.utils import fall_back_tuple
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from monai_morse.config import check_choice, typed_arguments
from monai_morse.engines import COORDINATES, window_to_scan
from monai_morse.errors import InputError

__all__ = ["AutocastInferer", "CoordinatesInferer", "FineGridInferer", "MorseInferer"]


class MorseInferer(Inferer):
    """One of MONAI's inferers for a network of this package: the three others of this module around it, each by one word.

    Args:
        inferer: e.g. a ``SlidingWindowInferer``; default ``SimpleInferer()``, all of the image at once.
        coordinates: ``"window"`` (default) or ``"volume"``, as trained: :class:`CoordinatesInferer`.
        scale: how many times finer the grid of the logits is; default 1, the image's own: :class:`FineGridInferer`.
        amp: whether to run in bfloat16; default False: :class:`AutocastInferer`.

    Raises:
        InputError: for an unknown word, or ``"volume"`` without windows of volumes.

    >>> inferer = MorseInferer(SlidingWindowInferer((8, 8, 8), overlap=0.5), amp=True)
    >>> inferer(torch.rand(1, 1, 12, 10, 8), torch.nn.Conv3d(1, 2, 1)).shape
    torch.Size([1, 2, 12, 10, 8])
    """

    @typed_arguments
    def __init__(
        self,
        inferer: Inferer | None = None,
        coordinates: str = "window",
        scale: int | Sequence[int] = 1,
        amp: bool = False,
    ) -> None:
        super().__init__()
        check_choice("coordinates", coordinates, COORDINATES)
        inferer = inferer or SimpleInferer()
        placed = CoordinatesInferer(inferer, coordinates) if coordinates == "volume" else inferer
        self.inferer = AutocastInferer(FineGridInferer(placed, scale), amp)

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        return self.inferer(inputs, network, *args, **kwargs)


class CoordinatesInferer(Inferer):
    """A sliding-window inferer whose network encodes places in the ``"window"`` or in the whole ``"volume"``, as trained.

    Args:
        inferer: a ``SlidingWindowInferer``.
        coordinates: ``"window"`` (default) changes nothing; for ``"volume"`` see :func:`window_to_scan`.

    Raises:
        InputError: for another word, an inferer without windows, or ``"volume"`` with one of slices.
    """

    def __init__(self, inferer: Inferer, coordinates: str = "window") -> None:
        super().__init__()
        check_choice("coordinates", coordinates, COORDINATES)
        if not isinstance(inferer, SlidingWindowInferer):
            raise InputError(f"CoordinatesInferer wraps a SlidingWindowInferer, got a {type(inferer).__name__}")
        if coordinates == "volume" and isinstance(inferer, SliceInferer):
            raise InputError("a slice does not know its place in the volume; use coordinates='window'")
        self.inferer = inferer
        self.coordinates = coordinates
        self.inferer.with_coord = coordinates == "volume"

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        if self.coordinates == "window":
            return self.inferer(inputs, network, *args, **kwargs)
        size = np.array(inputs.shape[2:])
        whole = window_to_scan(inputs)
        roi = np.array(fall_back_tuple(self.inferer.roi_size, tuple(size)))
        padding = np.maximum(roi - size, 0) // 2  # MONAI's own, before the first voxel; windows count from there

        def placed(windows: Tensor, slices: List[Any], *args: Any, **kwargs: Any) -> Any:
            lengths = np.array(windows.shape[2:])
            window_affines = []
            for place in slices:
                start = np.array([s.start for s in place[2:]]) - padding
                to_image = np.eye(len(size) + 1)
                to_image[:-1, :-1] = np.diag(lengths / size)
                to_image[:-1, -1] = (2 * start + lengths) / size - 1
                window_affines.append(whole[place[0].start] @ torch.from_numpy(to_image).to(whole))
            return network(windows, *args, window_affine=torch.stack(window_affines), **kwargs)

        return self.inferer(inputs, placed, *args, **kwargs)


class FineGridInferer(Inferer):
    """Logits on a grid that is finer than the images', boundaries rendered at its own voxels.

    The result's affine says where its voxels lie; :class:`monai_morse.data.ToScanGridd` takes it to the scan's grid.

    Args:
        inferer: e.g. a ``SlidingWindowInferer``.
        scale: how many times finer, an integer for all axes that the network sees (of a ``SliceInferer`` two) or one for each
            of the image's; 1 changes nothing.
    """

    @typed_arguments
    def __init__(self, inferer: Inferer, scale: int | Sequence[int] = 2) -> None:
        super().__init__()
        self.inferer = inferer
        self.scale = scale

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        dims = inputs.ndim - 2
        scale = list(self.scale) if isinstance(self.scale, Sequence) else [self.scale] * dims
        if len(scale) != dims or any(s < 1 for s in scale):
            raise InputError(f"scale must be a whole number from 1 on, or {dims} of them, got {self.scale!r}")
        if all(s == 1 for s in scale):
            return self.inferer(inputs, network, *args, **kwargs)

        def finer(windows: Tensor, *args: Any, **kwargs: Any) -> Any:
            return network(windows, *args, grid=[n * s for n, s in zip(windows.shape[2:], scale)], **kwargs)

        logits = self.inferer(inputs, finer, *args, **kwargs)
        if isinstance(logits, MetaTensor):
            step = torch.eye(logits.affine.shape[-1], dtype=logits.affine.dtype)
            for axis, (n, fine) in enumerate(zip(inputs.shape[2:], logits.shape[2:])):
                step[axis, axis], step[axis, -1] = n / fine, (n / fine - 1) / 2
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

    @typed_arguments
    def __init__(self, inferer: Inferer, enabled: bool = True) -> None:
        super().__init__()
        self.inferer = inferer
        self.enabled = enabled

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
    if isinstance(output, dict):
        return {name: _float(value) for name, value in output.items()}
    values = [_float(v) for v in output]
    return output._make(values) if hasattr(output, "_make") else values
