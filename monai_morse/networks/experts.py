"""SMoE: decoder features become experts, mixed voxel by voxel by a gate and dropped at random in training."""

from collections.abc import Sequence
from functools import partial
from typing import List, Optional, Tuple, Union

import torch
from monai.networks.layers.factories import Conv, Norm
from torch import Tensor, nn

from monai_morse.config import typed_arguments
from monai_morse.errors import InputError

from . import streaming
from .options import per_axis
from .points import corners, exporting, gather_points, sample_grid, weigh_corners
from .resampling import resize, shrink

__all__ = ["ExpertDropout", "Mixture", "PointwiseMLP"]


class _Linear(nn.Conv1d):
    """The same linear map at every position, as a matrix product: on a CPU, a convolution takes up to twice as long."""

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias
        assert bias is not None
        return torch.baddbmm(bias[:, None], self.weight.squeeze(2).expand(x.shape[0], -1, -1), x)


class PointwiseMLP(nn.Module):
    """The same MLP at every position: a linear map and ReLU per entry of ``channels``, the last ReLU only on demand.

    Args:
        in_channels: C of the input.
        channels: width of each layer, e.g. (256, 256).
        last_activation: whether the last layer is followed by a ReLU too; default True.
        last_zero: whether the last layer's weights start at zero; default False.

    >>> PointwiseMLP(3, [8, 4])(torch.rand(2, 3, 5, 6, 7)).shape
    torch.Size([2, 4, 5, 6, 7])
    """

    @typed_arguments
    def __init__(
        self, in_channels: int, channels: Sequence[int], last_activation: bool = True, last_zero: bool = False
    ) -> None:
        super().__init__()
        layers: List[nn.Module] = []
        for i, width in enumerate(channels):
            activated = last_activation or i + 1 < len(channels)
            linear = _Linear(in_channels, width, kernel_size=1)
            assert linear.bias is not None
            # torch's default shrinks the signal by a factor of about 2.4 per ReLU layer
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu" if activated else "linear")
            if last_zero and i + 1 == len(channels):
                nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU(inplace=True)] if activated else [linear]
            in_channels = width
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> (B, channels[-1], *S), for any number of spatial axes from one."""
        y = self.layers(x.flatten(2))
        return y.reshape(list(y.shape[:2]) + list(x.shape[2:]))


def _joined(maps: List[Tensor]) -> Tensor:
    """All positions of maps (B, C, ..) side by side, (B, C, M)."""
    return maps[0].flatten(2) if len(maps) == 1 else torch.cat([x.flatten(2) for x in maps], dim=2)


def _parted(y: Tensor, maps: List[Tensor]) -> List[Tensor]:
    """What a pointwise map makes of ``_joined(maps)``, (B, C', M), as maps (B, C', ..) again."""
    found: List[Tensor] = []
    for x, part in zip(maps, y.split([x.flatten(2).shape[2] for x in maps], dim=2)):
        found.append(part.reshape(list(part.shape[:2]) + list(x.shape[2:])))
    return found


def _chain(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    return second(first(x))


def _as_factor(counts: Tensor, x: Tensor) -> Tensor:
    """Counts (B, N) as a factor of ``x`` (B, N, ..)."""
    return counts.to(x.dtype).reshape(list(counts.shape) + [1] * (x.ndim - 2))


class ExpertDropout(nn.Module):
    """Which experts are active, per sample: each is dropped with probability alpha, in training.

    Masks with fewer than ``min_active`` survivors are redrawn, i.e. drawn from the conditional distribution; at N = 3 and
    alpha = 0.7 the paper's rule (``min_active=0``) leaves 34 % of the samples without any expert.

    Args:
        num_experts: N, at most 12.
        drop_prob: alpha in [0, 1).
        min_active: survivors at least; default 1.
        scale: survivors count 1 / (1 - alpha), as standard dropout has it; default False, they count 1.
    """

    masks: Tensor  # real types, not strings: torch.jit.script reads them, so this file defers no annotations
    chance: Tensor
    ones: Tensor

    @typed_arguments
    def __init__(self, num_experts: int, drop_prob: float = 0.7, min_active: int = 1, scale: bool = False) -> None:
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise InputError(f"dropout (alpha) must be in [0, 1), got {drop_prob}")
        if not 0 <= min_active <= num_experts <= 12:
            raise InputError(f"need 0 <= min_active <= num_experts <= 12, got {min_active} and {num_experts}")
        codes = torch.arange(2**num_experts).unsqueeze(1)
        masks = (torch.div(codes, 2 ** torch.arange(num_experts), rounding_mode="floor") % 2).float()
        active = masks.sum(1)
        chance = (1 - drop_prob) ** active * drop_prob ** (num_experts - active) * (active >= min_active)
        self.register_buffer("masks", masks / (1 - drop_prob) if scale else masks, persistent=False)
        self.register_buffer("chance", chance, persistent=False)
        self.register_buffer("ones", torch.ones(1, num_experts), persistent=False)

    def forward(self, batch: int) -> Tensor:
        """What the experts of ``batch`` samples count, (B, N): 0 where they are dropped; ones in eval mode."""
        if not self.training:
            return self.ones.expand(batch, -1)
        return self.masks[torch.multinomial(self.chance, batch, replacement=True)]


class Mixture(nn.Module):
    """Equations 1 and 2: ``W = softmax(gate([F_1..F_N]))``, ``x_out = MLP(sum_i W_i F_i)``.

    ``F_i`` is ``MLP_i(D_i)``, computed at D_i's own resolution and upsampled linearly to the input's. The gate is four
    3x3(x3) convolutions with ReLU between. A single expert needs no gate: its weight is 1. A dropped expert is zero to the
    gate and to the sum.

    Args:
        channels: C_i of the decoder features D_1..D_N.
        spatial_dims: 2 or 3.
        width: hidden and output channels of all MLPs and of the gate's convolutions; default 256, the paper's.
        gate_stride: the gate reads experts of features averaged to 1/gate_stride of the input's size, and its logits are
            upsampled; a number or one for each axis, default 1, the paper's full resolution.
        gate_norm: normalise what each of the gate's ReLUs gets of a sample (a group norm of one group); default False, as in
            the paper, whose gate may die: constant weights, whatever it reads.
        drop_prob: expert dropout alpha; default 0, a dense mixture.
        min_active: see :class:`ExpertDropout`.
        renormalize: in training, W is a softmax over the active experts alone, and survivors are not scaled (default); with
            ``False``, the paper's standard dropout, W is a softmax over all, and survivors are scaled by 1 / (1 - alpha).

    >>> mixture = Mixture([8, 4], spatial_dims=2, width=16, gate_stride=2)
    >>> mixture([torch.rand(1, 8, 6, 5), torch.rand(1, 4, 12, 10)], [12, 10]).shape
    torch.Size([1, 16, 12, 10])
    """

    @typed_arguments
    def __init__(
        self,
        channels: Sequence[int],
        spatial_dims: int,
        width: int = 256,
        gate_stride: Union[int, Sequence[int]] = 1,
        gate_norm: bool = False,
        drop_prob: float = 0.0,
        min_active: int = 1,
        renormalize: bool = True,
    ) -> None:
        super().__init__()
        self.gate_stride: List[int] = per_axis("gate_stride", gate_stride, spatial_dims)
        if gate_norm and width == 1 and len(channels) > 1:
            raise InputError("mixture: a width of 1 leaves gate_norm nothing to normalise by; give width 2 or gate_norm false")
        if not channels or width < 1 or min(self.gate_stride) < 1:
            raise InputError(f"mixture: need channels, width >= 1, gate_stride >= 1, got {channels}, {width}, {gate_stride}")
        self.gate_norm, self.renormalize = gate_norm, renormalize
        self.out_channels = width
        self.experts = nn.ModuleList([PointwiseMLP(c, [width, width]) for c in channels])
        self.dropout = ExpertDropout(len(channels), drop_prob, min_active, scale=not renormalize)
        self.gate: nn.Module | None = None
        if len(channels) > 1:
            conv = Conv["conv", spatial_dims]
            widths = [width * len(channels), width, width, width, len(channels)]
            layers: List[nn.Module] = []
            for i, (c_in, c_out) in enumerate(zip(widths[:-1], widths[1:])):
                layers.append(conv(c_in, c_out, kernel_size=3, padding=1))
                if i < 3:
                    if gate_norm:
                        layers.append(Norm["group", spatial_dims](num_groups=1, num_channels=c_out))
                    layers.append(nn.ReLU(inplace=True))
            self.gate = nn.Sequential(*layers)
        self.fuse = PointwiseMLP(width, [width, width])

    def forward(self, features: List[Tensor], size: List[int]) -> Tensor:
        """Decoder features (B, C_i, *S_i), coarse to fine, and the input's ``size`` *S -> x_out (B, width, *S)."""
        counts = self.dropout(features[0].shape[0])
        return self.everywhere(features, counts, self.gate_logits(features, counts, size), size)

    def gate_logits(self, features: List[Tensor], counts: Tensor, size: List[int]) -> Tensor:
        """Logits (B, N, *S / gate_stride) of equation 1: W is their softmax over the experts, after upsampling.

        Args:
            features: as for ``forward``; averaged where the gate's grid is coarser than theirs.
            counts: what each expert counts, (B, N).
            size: *S.
        """
        gate_size = self._gate_size(size)
        if self.gate is None:
            return torch.zeros([counts.shape[0], 1] + gate_size, dtype=features[0].dtype, device=features[0].device)
        if not torch.jit.is_scripting():
            if gate_size == size and not self.gate_norm and streaming.possible(features, size):
                return streaming.gate_logits(self.experts, self.gate, features, counts if self.training else None, size)
        seen: List[Tensor] = []
        for i, mlp in enumerate(self.experts):
            seen.append(mlp(shrink(features[i], gate_size)))
        return self._gate(seen, counts, gate_size)

    def _gate_size(self, size: List[int]) -> List[int]:
        return [-(-s // k) for s, k in zip(size, self.gate_stride)]

    def _gate(self, seen: List[Tensor], counts: Tensor, gate_size: List[int]) -> Tensor:
        """The gate's logits, of experts on its grid or on coarser ones."""
        assert self.gate is not None
        x = torch.cat([resize(expert, gate_size) for expert in seen], dim=1)
        if self.training:
            each = x.unflatten(1, [len(seen), -1])
            x = (each * _as_factor(counts, each)).flatten(1, 2)
        return self.gate(x)

    def weights(self, logits: Tensor, counts: Tensor) -> Tensor:
        """What F_i is multiplied with at the gate's ``logits`` (B, N, ..): W_i of equation 1, 0 for dropped experts."""
        if not self.training:
            return logits.softmax(dim=1)
        count = _as_factor(counts, logits)
        if self.renormalize:  # far below any logit, within half precision; the product is for a sample without any expert
            logits = torch.add(logits, count - 1, alpha=3e4)
        return logits.softmax(dim=1) * count

    def everywhere(self, features: List[Tensor], counts: Tensor, gate_logits: Tensor, size: List[int]) -> Tensor:
        """x_out (B, width, *S) as a map, given what the experts count (B, N) and ``gate_logits``."""
        weights = self.weights(resize(gate_logits, size), counts)
        mixed = torch.zeros_like(weights[:, :1])
        for i, mlp in enumerate(self.experts):
            mixed = mixed + weights[:, i : i + 1] * resize(mlp(features[i]), size)
        return self.fuse(mixed)

    @torch.jit.unused
    def classify(self, head: nn.Module, features: List[Tensor], counts: Tensor, gate_logits: Tensor, size: List[int]) -> Tensor:
        """``head(x_out)`` (B, K, *S), without a map of x_out where that can be (:mod:`monai_morse.networks.streaming`)."""
        if not streaming.possible(features, size):
            return head(self.everywhere(features, counts, gate_logits, size))
        known = counts if self.training else None
        chain = partial(_chain, self.fuse, head)
        return streaming.classify(
            self.experts, self.out_channels, chain, self.gate, self.weights, features, known, gate_logits, size
        )

    def at_points(
        self,
        features: List[Tensor],
        counts: Tensor,
        coordinates: Tensor,
        size: List[int],
        gate_logits: Optional[Tensor] = None,
    ) -> Tuple[Tensor, List[Tensor]]:
        """x_out (B, width, P) and the features (B, C_i, P) at ``coordinates`` (B, P, len(S)) alone, without maps of size *S.

        An expert is computed at the voxels that interpolation reads, or everywhere where those are not far fewer than its map
        has; in the same product, where ``gate_logits`` are not given, for the gate.
        """
        if gate_logits is None and (self.gate is None or max(self.gate_stride) == 1):
            gate_logits = self.gate_logits(features, counts, size)
        gate_size = self._gate_size(size)
        grid = coordinates.flip(2)
        for_gate: List[Tensor] = []
        experts: List[Tensor] = []
        read: List[Tensor] = []
        for i, mlp in enumerate(self.experts):
            feature = features[i]
            # finding them costs as well; and exported, the answer of one window size would become a condition on all
            few = exporting() or 1.5 * coordinates.shape[1] * 2 ** coordinates.shape[2] < feature[0, 0].numel()
            sources, weight = [feature], coordinates
            if few:
                index, weight = corners(coordinates, list(feature.shape[2:]))
                sources = [gather_points(feature, index)]
            if gate_logits is None:
                averaged = shrink(feature, gate_size)
                if averaged.shape != sources[0].shape:  # else it is the same map
                    sources.append(averaged)
            made = _parted(mlp(_joined(sources)), sources)
            for_gate.append(made[-1])
            if few:
                read.append(weigh_corners(sources[0], weight))
                experts.append(weigh_corners(made[0], weight))
            else:
                read.append(sample_grid(feature, grid))
                experts.append(sample_grid(made[0], grid))
        if gate_logits is None:
            gate_logits = self._gate(for_gate, counts, gate_size)
        weights = self.weights(sample_grid(gate_logits, grid), counts)
        return self.fuse((weights.unsqueeze(2) * torch.stack(experts, dim=1)).sum(1)), read
