"""Geometry of points: which voxels are uncertain, where they lie, reading features there, writing logits back.

Pure functions of tensors; no parameters, no network. A point is the centre of a voxel and travels as a flat index into the
``V`` voxels of ``*S``. Coordinates are ordered like the tensor's axes, (y, x) or (z, y, x), never reversed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_morse.config import parse_number, typed_arguments

__all__ = [
    "PointSelection",
    "corners",
    "gather_patch",
    "gather_points",
    "apply_affine",
    "point_coordinates",
    "sample_grid",
    "sample_linear",
    "sample_patch",
    "select_oversampled_points",
    "select_rendered_points",
    "select_uncertain_points",
    "standardize_patch",
    "uncertainty",
    "uncertainty_map",
    "weigh_corners",
    "write_points",
]


@typed_arguments
@dataclass(frozen=True)
class PointSelection:
    """How many points are rendered and how they are chosen in training.

    Args:
        num_train: points per training window (the paper's N_p, 2048).
        num_eval: points per window at inference (the paper's N_p, 8192).
        oversample: candidates drawn per training point (k_p >= 1). The ``rho * N_p`` most uncertain of them are taken: with the
            paper's 3 they come from the upper quarter of the window, however little of it is boundary. Default ``None``: they
            are drawn from the ``num_eval`` most uncertain voxels instead, those that inference renders.
        importance_ratio: share of training points that are the candidates' most uncertain (rho in [0, 1], default 0.75).
        multilabel: classes do not exclude one another (a sigmoid each, such as nested tumour regions); default False.

    Raises:
        InputError: when a value is out of its range.

    >>> PointSelection(num_train=512)
    PointSelection(num_train=512, num_eval=8192, oversample=None, importance_ratio=0.75, multilabel=False)
    """

    num_train: int = 2048
    num_eval: int = 8192
    oversample: float | None = None
    importance_ratio: float = 0.75
    multilabel: bool = False

    def __post_init__(self) -> None:
        parse_number(self.num_train, "points: num_train (N_p)", int, "[1, inf)")
        parse_number(self.num_eval, "points: num_eval (N_p)", int, "[1, inf)")
        parse_number(1 if self.oversample is None else self.oversample, "points: oversample (k_p)", within="[1, inf)")
        parse_number(self.importance_ratio, "points: importance_ratio (rho)", within="[0, 1]")


def exporting() -> bool:
    """Whether the network is being exported: what it does then must hold for any window and in other runtimes."""
    if not torch.jit.is_scripting():
        return bool(getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()) or torch.onnx.is_in_onnx_export()
    return False


def uncertainty(logits: Tensor, multilabel: bool = False) -> Tensor:
    """Second largest minus largest logit of each voxel: at most 0, and 0 where two classes tie.

    A single channel is one class against a background whose logit is 0 (sigmoid), so its uncertainty is ``-|logit|``.

    Args:
        logits: (B, K, *S).
        multilabel: every channel is such a class of its own; a voxel is as uncertain as the least certain of them.

    Returns:
        (B, V).

    >>> uncertainty(torch.tensor([[[1.0, 0.0], [3.0, 0.5], [2.5, -1.0]]]))
    tensor([[-0.5000, -0.5000]])
    """
    flat = logits.flatten(2)
    if multilabel or flat.shape[1] == 1:
        return -flat.abs().amin(1)
    # running maxima: on a CPU some 40 times faster than topk over the strided class axis
    largest, second = torch.maximum(flat[:, 0], flat[:, 1]), torch.minimum(flat[:, 0], flat[:, 1])
    for k in range(2, flat.shape[1]):
        second = torch.maximum(second, torch.minimum(largest, flat[:, k]))
        largest = torch.maximum(largest, flat[:, k])
    return second - largest


def uncertainty_map(logits: Tensor) -> Tensor:
    """:func:`uncertainty` of one sample as a map, to be looked at or scored: (K, *S) -> (1, *S)."""
    return uncertainty(logits.unsqueeze(0)).reshape(logits[:1].shape)


def select_uncertain_points(score: Tensor, num_points: int) -> Tensor:
    """Indices of the ``min(num_points, V)`` most uncertain voxels: (B, V) -> (B, P)."""
    return score.topk(min(num_points, score.shape[1]), dim=1, sorted=False).indices


def select_oversampled_points(score: Tensor, num_points: int, oversample: float, importance_ratio: float) -> Tensor:
    """Draw the training points of each sample, all different, as PointRend does.

    ``k_p * N_p`` candidates are drawn uniformly from all voxels; the ``rho * N_p`` most uncertain of them are taken; the
    other ``(1 - rho) * N_p`` are drawn uniformly from all voxels not taken. A window with fewer voxels gives all of them.

    Args:
        score: uncertainty (B, V).
        num_points: N_p. oversample: k_p. importance_ratio: rho.

    Returns:
        flat voxel indices (B, P), P = min(N_p, V); the first ``round(rho * P)`` are the uncertain ones.
    """
    num_points = min(num_points, score.shape[1])
    num_candidates = min(int(oversample * num_points), score.shape[1])
    candidates = torch.rand(score.shape, device=score.device).topk(num_candidates, dim=1, sorted=False).indices
    most = score.gather(1, candidates).topk(int(round(importance_ratio * num_points)), dim=1, sorted=False).indices
    return _with_uniform_points(candidates.gather(1, most), score, num_points)


def select_rendered_points(score: Tensor, num_points: int, num_rendered: int, importance_ratio: float) -> Tensor:
    """Draw the training points of each sample, all different, from the voxels that inference renders.

    As :func:`select_oversampled_points`, but the ``rho * N_p`` uncertain points are drawn uniformly from the ``num_rendered``
    most uncertain voxels (from as many as are drawn, where that is more).
    """
    num_points = min(num_points, score.shape[1])
    num_uncertain = int(round(importance_ratio * num_points))
    candidates = select_uncertain_points(score, max(num_rendered, num_uncertain))
    # the largest of i.i.d. keys are a uniform draw without replacement
    drawn = torch.rand(candidates.shape, device=score.device).topk(num_uncertain, dim=1, sorted=False).indices
    return _with_uniform_points(candidates.gather(1, drawn), score, num_points)


def _with_uniform_points(uncertain: Tensor, score: Tensor, num_points: int) -> Tensor:
    """Indices (B, P), all different, and after them as many of the other voxels of (B, V) as make ``num_points``."""
    keys = torch.rand(score.shape, device=score.device).scatter(1, uncertain, -1.0)
    uniform = keys.topk(num_points - uncertain.shape[1], dim=1, sorted=False).indices
    return torch.cat([uncertain, uniform], dim=1)


def point_coordinates(index: Tensor, size: List[int]) -> Tensor:
    """Coordinates ``2 x / H - 1`` of voxel centres, ``x = i + 0.5``, each axis in (-1, 1).

    Args:
        index: flat voxel indices (B, P). size: *S.

    Returns:
        (B, P, len(S)), float32, axes ordered like ``size``.

    >>> point_coordinates(torch.tensor([[0, 5]]), [2, 3])
    tensor([[[-0.5000, -0.6667],
             [ 0.5000,  0.6667]]])
    """
    axes: List[Tensor] = []
    rest = index
    for axis in range(len(size) - 1, -1, -1):
        length, voxel = size[axis], rest
        if axis > 0:
            rest = torch.div(voxel, length, rounding_mode="floor")
            voxel = torch.sub(voxel, rest, alpha=length)  # ONNX takes no % by a free size
        axes.append(torch.rsub(voxel, 1 - length, alpha=-2) / length)
    return torch.stack(axes[::-1], dim=-1)


def apply_affine(coordinates: Tensor, affine: Tensor) -> Tensor:
    """Coordinates in the whole volume of points given by coordinates in a window of it.

    Args:
        coordinates: (B, P, len(S)). affine: (B, len(S), len(S) + 1), an affine map for each sample.

    Returns:
        (B, P, len(S)), float32 at least.

    >>> apply_affine(torch.tensor([[[-1.0], [1.0]]]), torch.tensor([[[0.5, 0.25]]]))  # half as long, a bit past the middle
    tensor([[[-0.2500],
             [ 0.7500]]])
    """
    dtype = torch.promote_types(coordinates.dtype, torch.float32)
    coordinates, affine = coordinates.to(dtype), affine.to(coordinates.device, dtype)
    # sums of products, not a matrix product, which autocast would run in half precision
    placed = affine[:, None, :, -1].expand_as(coordinates)
    for axis in range(coordinates.shape[2]):
        placed = placed + coordinates[:, :, axis, None] * affine[:, None, :, axis]
    return placed


def gather_points(x: Tensor, index: Tensor) -> Tensor:
    """Values of ``x`` (B, C, *S) at flat voxel indices (B, P): (B, C, P)."""
    return x.flatten(2).gather(2, index.unsqueeze(1).expand(-1, x.shape[1], -1))


def write_points(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """A copy of ``x`` (B, C, *S) with ``values`` (B, C, P) at flat voxel indices (B, P)."""
    index = index.unsqueeze(1).expand(-1, x.shape[1], -1)
    return x.flatten(2).scatter(2, index, values.to(x.dtype)).reshape(x.shape)


def sample_linear(x: Tensor, coordinates: Tensor) -> Tensor:
    """Linear interpolation of ``x`` at continuous coordinates, edge values held beyond the outermost voxel centres.

    At the voxel centres of a finer grid this equals ``interpolate(x, mode="bilinear"|"trilinear", align_corners=False)``
    there. An exported 3D network spells ``grid_sample`` out with ``gather``, for few runtimes have it in 3D.

    Args:
        x: (B, C, *S). coordinates: (B, P, len(S)) in [-1, 1], axes ordered like ``S``.

    Returns:
        (B, C, P).

    >>> sample_linear(torch.tensor([[[[0.0, 1.0, 2.0]]]]), torch.tensor([[[0.0, 0.0], [0.0, 1 / 3]]]))
    tensor([[[1.0000, 1.5000]]])
    """
    return sample_grid(x, coordinates.flip(2))


def sample_grid(x: Tensor, grid: Tensor) -> Tensor:
    """:func:`sample_linear` at coordinates that are ordered (x, y, z), as ``grid_sample`` takes them."""
    if x.ndim == 5 and exporting():
        index, weight = corners(grid.flip(2), list(x.shape[2:]))
        return weigh_corners(gather_points(x, index), weight)
    dtype = torch.promote_types(torch.promote_types(x.dtype, grid.dtype), torch.float32)
    places = grid.to(dtype).reshape([x.shape[0], -1] + [1] * (x.ndim - 3) + [x.ndim - 2])
    sampled = F.grid_sample(x.to(dtype), places, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.flatten(2).to(x.dtype)


def _blocks(coordinates: Tensor, size: List[int], sides: List[int]) -> Tuple[Tensor, Tensor]:
    """The voxels around each place, as many as interpolation reads at ``sides`` neighbours that lie voxels apart.

    Args:
        coordinates: (B, P, len(S)) in [-1, 1]. size: *S. sides: an odd number for each axis.

    Returns:
        flat voxel indices (B, n, P), n the product of ``sides`` + 1, the last axis's side by side, those beyond the edge on it;
        and by what part of a voxel a place lies beyond the first of each pair, (len(S), B, P).
    """
    coordinates = coordinates.to(torch.promote_types(coordinates.dtype, torch.float32))
    first: List[Tensor] = []
    for axis, length in enumerate(size):  # in one operation: coordinate * length / 2 + (length - 1) / 2 - half the side
        first.append(torch.rsub(coordinates[:, :, axis], (length - 1) / 2 - sides[axis] // 2, alpha=-length / 2))
    position = torch.stack(first)
    low = position.floor()
    fraction = position - low
    steps = torch.arange(max(sides) + 1, device=coordinates.device).unsqueeze(1)
    voxels = low.long().unsqueeze(2) + steps
    index = voxels[0, :, : sides[0] + 1].clamp(0, size[0] - 1)
    for axis in range(1, len(size)):
        along = voxels[axis, :, : sides[axis] + 1].clamp(0, size[axis] - 1)
        index = torch.add(along.unsqueeze(1), index.unsqueeze(2), alpha=size[axis]).flatten(1, 2)
    return index, fraction


def gather_patch(x: Tensor, index: Tensor, sides: List[int]) -> Tensor:
    """:func:`sample_patch` around voxels of ``x`` itself, where nothing has to be interpolated.

    Args:
        x: (B, C, *S). index: flat voxel indices (B, P). sides: an odd number for each axis.

    Returns:
        (B, C n, P), n the product of ``sides``, the last axis's neighbours side by side.

    >>> gather_patch(torch.arange(5.0).reshape(1, 1, 1, 5), torch.tensor([[0, 2]]), [1, 3])[0, :, 1]
    tensor([1., 2., 3.])
    """
    edges: List[int] = []
    for side in sides[::-1]:
        edges += [side // 2, side // 2]
    padded = F.pad(x, edges, mode="replicate")  # then a voxel's neighbours are at the same distance everywhere
    steps = torch.arange(max(sides), device=index.device)
    first, around, stride = index, steps[: sides[-1]], 1  # of a block, its first voxel; and how far the others lie from it
    rest = index
    for axis in range(len(sides) - 1, 0, -1):
        rest = torch.div(rest, x.shape[2 + axis], rounding_mode="floor")
        first = torch.add(first, rest, alpha=stride * (padded.shape[2 + axis] - x.shape[2 + axis]))
        stride *= padded.shape[2 + axis]
        around = torch.add(around, steps[: sides[axis - 1]].unsqueeze(1), alpha=stride).flatten()
    neighbours = (first.unsqueeze(1) + around.unsqueeze(1)).flatten(1)
    return gather_points(padded, neighbours).reshape(x.shape[0], -1, index.shape[1])


def sample_patch(x: Tensor, coordinates: Tensor, sides: List[int]) -> Tensor:
    """:func:`sample_linear` at the places around each point that lie voxels of ``x`` apart, ``sides`` of them along each axis.

    Args:
        x: (B, C, *S). coordinates: (B, P, len(S)) in [-1, 1]. sides: an odd number for each axis.

    Returns:
        (B, C n, P), n the product of ``sides``, the last axis's neighbours side by side.

    >>> sample_patch(torch.arange(5.0).reshape(1, 1, 1, 5), torch.tensor([[[0.0, 0.0]]]), [1, 3])[0, :, 0]
    tensor([1., 2., 3.])
    """
    index, fraction = _blocks(coordinates, list(x.shape[2:]), sides)
    block = gather_points(x, index.flatten(1))
    block = block.reshape([x.shape[0], x.shape[1]] + [side + 1 for side in sides] + [index.shape[2]])
    fraction = fraction.to(x.dtype).reshape([len(sides), x.shape[0]] + [1] * (len(sides) + 1) + [index.shape[2]])
    for axis, side in enumerate(sides):  # the interpolations share the block's voxels
        block = torch.lerp(block.narrow(2 + axis, 0, side), block.narrow(2 + axis, 1, side), fraction[axis])
    return block.reshape(x.shape[0], -1, coordinates.shape[1])


def standardize_patch(patch: Tensor, channels: int) -> Tensor:
    """What differs within a patch, side by side with what it has in common.

    The neighbours of a point resemble each other: as they are, an MLP sees little but their mean, many times over, and learns
    that first. A variance below 0.01 counts as noise: images are taken to have about unit variance.

    Args:
        patch: (B, C n, P), the n voxels of each channel side by side, as :func:`sample_patch` returns them. channels: C.

    Returns:
        (B, C (n + 2), P): every channel's voxels less their mean, divided by their standard deviation, that is
        the root of variance + 0.01, then these two.

    >>> standardize_patch(torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1), channels=1)[0, :, 0]
    tensor([-1.2157,  0.0000,  1.2157,  2.0000,  0.8226])
    """
    patch = patch.reshape(patch.shape[0], channels, -1, patch.shape[2])
    mean = patch.mean(2, keepdim=True)
    patch = patch - mean
    deviation = (patch.square().mean(2, keepdim=True) + 0.01).sqrt()
    return torch.cat([patch / deviation, mean, deviation], dim=2).flatten(1, 2)


def corners(coordinates: Tensor, size: List[int]) -> Tuple[Tensor, Tensor]:
    """The voxels that linear interpolation at each place reads, and their weights.

    Args:
        coordinates: (B, P, len(S)) in [-1, 1]. size: *S.

    Returns:
        flat voxel indices (B, M P), corner by corner, and weights (B, M, P) that sum to 1 over the M = 2^len(S) corners.
    """
    index, fraction = _blocks(coordinates, size, [1] * len(size))
    shares = torch.stack([1 - fraction, fraction], dim=2)
    weight = shares[0]
    for axis in range(1, len(size)):
        weight = (weight.unsqueeze(2) * shares[axis].unsqueeze(1)).flatten(1, 2)
    return index.flatten(1), weight


def weigh_corners(values: Tensor, weight: Tensor) -> Tensor:
    """Values (B, C, M P) at the corners of P places and their weights (B, M, P) -> interpolated values (B, C, P)."""
    values = values.reshape(values.shape[0], values.shape[1], weight.shape[1], weight.shape[2])
    return (values * weight.unsqueeze(1)).sum(2).to(values.dtype)
