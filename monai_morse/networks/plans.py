"""A U-Net that fits an anisotropic grid, by nnU-Net's rule, as plain data and as MONAI's ``DynUNet``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from monai.networks.nets import DynUNet

from monai_morse.config import typed_arguments
from monai_morse.errors import InputError

__all__ = ["UNetPlan", "plan_unet", "planned_dynunet", "seen_by_backbone"]

logger = logging.getLogger(__name__)

MIN_SIZE = 4  # voxels along an axis of the coarsest map


@dataclass(frozen=True)
class UNetPlan:
    """Kernels and strides of each level, fine to coarse; its fields are arguments of ``DynUNet``."""

    kernel_size: list[list[int]]
    strides: list[list[int]]
    filters: list[int]

    @property
    def multiple(self) -> list[int]:
        """What a window's size must be a multiple of, by axis."""
        found = [1] * len(self.strides[0])
        for stride in self.strides:
            found = [f * s for f, s in zip(found, stride)]
        return found

    def __str__(self) -> str:
        rows = zip(self.filters, self.kernel_size, self.strides)
        return "\n".join(f"level {i}: {f} channels, kernel {k}, stride {s}" for i, (f, k, s) in enumerate(rows))


@typed_arguments
def seen_by_backbone(size: Sequence[int], stride: int | Sequence[int] = 1) -> list[int]:
    """Spatial size of what a backbone sees of a window, with a ``stride`` of :class:`Morse`.

    >>> seen_by_backbone([96, 96, 32], [2, 2, 1])
    [48, 48, 32]
    """
    strides = [stride] * len(size) if isinstance(stride, int) else list(stride)
    return [-(-s // k) for s, k in zip(size, strides, strict=True)]


@typed_arguments
def plan_unet(
    spacing: Sequence[float], patch_size: Sequence[int], features: int = 32, max_features: int = 320, max_levels: int = 6
) -> UNetPlan:
    """Levels for a grid: an axis is pooled while its voxels are less than twice as long as the shortest ones.

    Until the others have caught up, a coarse axis has kernels of 1 and no pooling. An axis of fewer than 8 voxels is not pooled
    further. The coarsest level has kernels of 3 everywhere.

    Args:
        spacing: of a voxel, in mm, by axis.
        patch_size: of a window, in voxels.
        features: channels of the finest level, doubled at each further one; default 32.
        max_features: at most so many; default 320, nnU-Net's in 3D.
        max_levels: at most so many; default 6.

    Raises:
        InputError: for numbers that are no spacing or size.

    Source: Isensee et al., nnU-Net, Nature Methods 18 (2021).

    >>> print(plan_unet([1.25, 1.25, 7.7], [128, 128, 16], features=16))
    level 0: 16 channels, kernel [3, 3, 1], stride [1, 1, 1]
    level 1: 32 channels, kernel [3, 3, 1], stride [2, 2, 1]
    level 2: 64 channels, kernel [3, 3, 3], stride [2, 2, 1]
    level 3: 128 channels, kernel [3, 3, 3], stride [2, 2, 2]
    level 4: 256 channels, kernel [3, 3, 3], stride [2, 2, 2]
    level 5: 320 channels, kernel [3, 3, 3], stride [2, 2, 1]
    """
    if len(spacing) != len(patch_size) or not all(s > 0 for s in spacing) or not all(s >= 1 for s in patch_size):
        raise InputError(f"need a spacing above 0 and a size from 1 on for each axis, got {spacing} and {patch_size}")
    lengths, sizes = [float(s) for s in spacing], [int(s) for s in patch_size]
    kernel = [1] * len(sizes)
    kernels: list[list[int]] = []
    strides = [[1] * len(sizes)]
    while True:
        kernel = [3 if k == 3 or length < 2 * min(lengths) else 1 for k, length in zip(kernel, lengths)]
        can = [size >= 2 * MIN_SIZE for size in sizes]
        shortest = min((length for length, c in zip(lengths, can) if c), default=0.0)
        pooled = [c and length < 2 * shortest for length, c in zip(lengths, can)]
        too_short = sum(pooled) == 1 and max(s for s, p in zip(sizes, pooled) if p) < 3 * MIN_SIZE
        if not any(pooled) or too_short or len(strides) == max_levels:
            break
        kernels.append(kernel)
        stride = [2 if p else 1 for p in pooled]
        strides.append(stride)
        lengths = [length * s for length, s in zip(lengths, stride)]
        sizes = [-(-size // s) for size, s in zip(sizes, stride)]
    kernels.append([3] * len(sizes))
    return UNetPlan(kernels, strides, [min(features * 2**i, max_features) for i in range(len(strides))])


@typed_arguments
def planned_dynunet(
    in_channels: int,
    out_channels: int,
    spacing: Sequence[float],
    patch_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    features: int = 32,
    **options: Any,
) -> DynUNet:
    """MONAI's ``DynUNet`` with the levels of :func:`plan_unet`, which are logged.

    Args:
        in_channels: C.
        out_channels: K.
        spacing: of the image, mm by axis; the backbone's own is ``stride`` times as coarse.
        patch_size: of the image, voxels by axis.
        stride: that of :class:`Morse`; default 1.
        features: channels of the finest level; default 32.
        options: further ones of ``DynUNet``, such as ``filters``; the norm is an instance norm with weights if none is given.

    >>> net = planned_dynunet(1, 5, [1.25, 1.25, 7.7], [128, 128, 16], stride=[2, 2, 1], features=4)
    >>> net.kernel_size[0], net.strides[1]
    ([3, 3, 1], [2, 2, 1])
    """
    seen = seen_by_backbone(patch_size, stride)
    plan = plan_unet([s * n / m for s, n, m in zip(spacing, patch_size, seen)], seen, features)
    logger.info("the U-Net planned for voxels of %s mm and windows of %s, stride %s:\n%s", spacing, patch_size, stride, plan)
    options = {"norm_name": ("INSTANCE", {"affine": True}), "filters": plan.filters, **options}
    return DynUNet(len(seen), in_channels, out_channels, plan.kernel_size, plan.strides, plan.strides[1:], **options)
