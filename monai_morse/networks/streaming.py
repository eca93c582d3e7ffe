"""The mixture at full resolution without its full-resolution maps: the same numbers as :class:`Mixture`'s, for less.

- Linear maps commute with linear upsampling: the gate's first convolution is applied to a coarse expert at its own resolution.
- Experts that dropout drops are not computed; where it drops all, the gate is not either.
- The pointwise chain (weigh, sum, fuse, classify) runs in slabs, recomputed in the backward pass, so that no map of ``width``
  channels but the gate's own exists at the input's size.

Python decides here what to compute, so scripted, exported and compiled networks use the plain form in ``experts.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .resampling import resize

__all__ = ["classify", "conv_upsampled", "gate_logits", "possible"]

SLAB = 2**21  # values of a map, 8 MiB in float32: near what a cache holds, and some ten of them live at a time


def possible(features: list[Tensor], size: list[int]) -> bool:
    """Whether this is eager mode, where Python may decide by values and sizes, and no feature is finer than the input."""
    exporting = getattr(torch.compiler, "is_exporting", bool)()
    if exporting or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return all(a <= b for f in features for a, b in zip(f.shape[2:], size))


def upsampling_matrix(old: int, new: int, like: Tensor) -> Tensor:
    """Linear upsampling (``align_corners=False``) of an axis: (new, old)."""
    identity = torch.eye(old, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    return F.interpolate(identity.unsqueeze(0), new, mode="linear", align_corners=False)[0].T.to(like.dtype)


def _along(matrix: Tensor, x: Tensor, axis: int) -> Tensor:
    """Apply (new, old) along an axis of ``x``."""
    if axis == x.ndim - 1:
        return x @ matrix.T
    y = matrix.expand(*x.shape[:axis], *matrix.shape) @ x.flatten(axis + 1)
    return y.reshape(*x.shape[:axis], len(matrix), *x.shape[axis + 1 :])


def _taps(x: Tensor, weight: Tensor, matrices: list[Tensor], axis: int) -> Tensor:
    if axis == x.ndim:
        return (weight @ x.flatten(2)).reshape(len(x), len(weight), *x.shape[2:])
    shifted = [_taps(x, weight[:, :, tap], matrices, axis + 1) for tap in range(3)]
    return _along(matrices[axis - 2], torch.cat(shifted, dim=axis), axis)


def conv_upsampled(x: Tensor, weight: Tensor, size: list[int]) -> Tensor:
    """``conv(upsample(x, size), weight, padding=1)``, with ``weight`` applied before the upsampling.

    A tap of the kernel is a linear map of channels, which commutes with upsampling, and a shift at the new resolution. Shift,
    zero border and upsampling of all three taps of an axis are one small matrix, applied axis by axis.

    Args:
        x: (B, C, *s). weight: (D, C, 3, ..), one axis for each of ``size``. size: *S, no axis smaller than x's.

    Returns:
        (B, D, *S).

    >>> conv_upsampled(torch.rand(1, 8, 4, 3), torch.rand(5, 8, 3, 3), [8, 6]).shape
    torch.Size([1, 5, 8, 6])
    """
    old = list(x.shape[2:])
    conv = F.conv2d if len(size) == 2 else F.conv3d
    if old == size:
        return conv(x, weight, padding=1)
    if max(old) >= x.shape[1]:  # the matrices are dense: on long axes they would cost more than they save
        mode = "bilinear" if len(size) == 2 else "trilinear"
        return conv(F.interpolate(x, size, mode=mode, align_corners=False), weight, padding=1)
    matrices = []
    for a, b in zip(old, size):
        padded = F.pad(upsampling_matrix(a, b, x), (0, 0, 1, 1))
        matrices.append(torch.cat([padded[tap : tap + b] for tap in range(3)], dim=1))
    return _taps(x, weight, matrices, 2)


def _rows(count: int, counts: Tensor | None, num_experts: int) -> list[tuple[slice, list[float]]]:
    """Samples whose experts count the same, and what: all of them 1 where nothing is said."""
    rows = [[1.0] * num_experts] * count if counts is None else counts.tolist()  # a list waits for the device
    if all(r == rows[0] for r in rows):
        return [(slice(0, len(rows)), rows[0])]
    return [(slice(b, b + 1), r) for b, r in enumerate(rows)]


def gate_logits(
    experts: Iterable[nn.Module], gate: nn.Module, features: list[Tensor], counts: Tensor | None, size: list[int]
) -> Tensor:
    """The gate's logits (B, N, *S).

    Args:
        experts: N MLPs. gate: a sequence that starts with a convolution of the concatenated experts.
        features: (B, C_i, *S_i). counts: what each expert counts, (B, N), or ``None`` where nothing is trained.
        size: *S.
    """
    assert isinstance(gate, nn.Sequential)
    first: Any = gate[0]
    weights = first.weight.chunk(len(features), dim=1)
    parts = []
    for rows, row in _rows(len(features[0]), counts, len(features)):
        if not any(row):
            parts.append(features[0].new_zeros(1, len(features), *(1 for _ in size)).expand(rows.stop - rows.start, -1, *size))
            continue
        total: Tensor | None = None
        for mlp, feature, weight, value in zip(experts, features, weights, row):
            if value:
                expert = checkpoint(mlp, feature[rows], use_reentrant=False, preserve_rng_state=False)
                part = conv_upsampled(expert, weight if value == 1 else weight * value, size)
                total = part if total is None else total.add_(part)
        assert total is not None
        parts.append(gate[1:](total.add_(first.bias.reshape(-1, *(1 for _ in size)))))
    logits = torch.cat(parts)
    return logits if counts is None else logits + _nothing(experts, gate, features)


def _nothing(experts: Iterable[nn.Module], gate: nn.Module | None, features: list[Tensor]) -> Tensor:
    """Zero, that depends on all that dropped experts would depend on: their gradients are zero, not missing."""
    voxel = [f.flatten(2)[:1, :, :1].reshape([1, -1] + [1] * (f.ndim - 2)) for f in features]
    values = torch.cat([mlp(v) for mlp, v in zip(experts, voxel)], dim=1)
    return 0 * gate(values).sum() if gate is not None else 0 * values.sum()


def _slab(
    mlps: list[nn.Module | None], length: int, start: int, head: Callable[[Tensor], Tensor], weights: Tensor, *sources: Tensor
) -> Tensor:
    """``head(sum_i w_i F_i)`` in a slab along the first axis, which is ``length`` long in all.

    ``weights`` (B, N, *slab) are the slab's own. A source is whole: D_i where it comes with its MLP, else a coarser F_i.
    """
    count, mixed = weights.shape[2], None
    for mlp, source, weight in zip(mlps, sources, weights.split(1, dim=1)):
        if mlp is not None:
            expert = mlp(source[:, :, start : start + count])
        else:
            matrix = upsampling_matrix(source.shape[2], length, source)[start : start + count]
            expert = resize(_along(matrix, source, 2), list(weights.shape[2:]))
        mixed = weight * expert if mixed is None else torch.addcmul(mixed, weight, expert)
    assert mixed is not None
    return head(mixed)


def classify(
    experts: nn.ModuleList,
    width: int,
    head: Callable[[Tensor], Tensor],
    gate: nn.Module | None,
    weights_of: Callable[[Tensor, Tensor], Tensor],
    features: list[Tensor],
    counts: Tensor | None,
    logits: Tensor,
    size: list[int],
) -> Tensor:
    """``head`` of the weighted sum of experts (B, K, *S), slab by slab along the first axis.

    Args:
        width: channels of an expert. head: (B, width, *S) -> (B, K, *S), pointwise.
        weights_of: of the gate's logits (B, N, *S) and what experts count (B, N), the weights of the sum.
        logits: the gate's, on any grid. The others: as for :func:`gate_logits`.
    """
    out = []
    for rows, row in _rows(len(logits), counts, len(features)):
        samples, kept = rows.stop - rows.start, [i for i, value in enumerate(row) if value]
        if not kept:
            nowhere = features[0].new_zeros(1, width, *(1 for _ in size))
            out.append(head(nowhere).expand(samples, -1, *size))
            continue
        weights = weights_of(resize(logits[rows], size), logits.new_tensor([row] * samples))[:, kept]
        whole = [list(features[i].shape[2:]) == size for i in kept]
        sources = [features[i][rows] if w else experts[i](features[i][rows]) for i, w in zip(kept, whole)]
        mlps = [experts[i] if w else None for i, w in zip(kept, whole)]
        step = max(1, SLAB * size[0] // (samples * width * torch.Size(size).numel()))
        slabs = []
        for start in range(0, size[0], step):
            piece = weights[:, :, start : start + step]
            chain = partial(_slab, mlps, size[0], start, head)
            slabs.append(checkpoint(chain, piece, *sources, use_reentrant=False, preserve_rng_state=False))
        out.append(torch.cat(slabs, dim=2))
    logits = torch.cat(out)
    return logits if counts is None else logits + _nothing(experts, gate, features)
