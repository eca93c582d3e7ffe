"""Maps on another grid: averaged along axes that get smaller, linear along axes that grow."""

from typing import List

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["resize", "shrink"]


def shrink(x: Tensor, size: List[int]) -> Tensor:
    """Average (B, C, *S) along the axes on which ``size`` is smaller."""
    smaller = [min(a, b) for a, b in zip(x.shape[2:], size)]
    if smaller == list(x.shape[2:]):
        return x
    step = [a // b for a, b in zip(x.shape[2:], smaller)]
    if [s * n for s, n in zip(step, smaller)] == list(x.shape[2:]):  # the same, and ONNX has it in 3D
        y = x.to(torch.promote_types(x.dtype, torch.float32))  # a CPU pools no half precision in 3D
        return (F.avg_pool2d(y, step) if x.ndim == 4 else F.avg_pool3d(y, step)).to(x.dtype)
    return F.interpolate(x, smaller, mode="area")


def resize(x: Tensor, size: List[int]) -> Tensor:
    """Resize (B, C, *S) to ``size``: averaging along the axes that get smaller, then linear (``align_corners=False``)."""
    x = shrink(x, size)
    if list(x.shape[2:]) == size:
        return x
    return F.interpolate(x, size, mode="bilinear" if len(size) == 2 else "trilinear", align_corners=False)
