"""Rendering heads: class logits of points from their features and coordinates. No geometry here, see ``points``.

Each is called as ``head(features, coordinates, coarse, context)`` and returns logits (B, K, P):

- features (B, C, P): x_out, or the decoder features side by side, at the points
- coordinates (B, P, len(S)) in [-1, 1]
- coarse (B, K, P): coarse logits at the points
- context (B, C'): the mean of every decoder feature over its map; nothing, (B, 0), for a head whose ``reads_context`` is false
"""

from __future__ import annotations

import math
from typing import List

import torch
from torch import Tensor, nn

from monai_morse.config import typed_arguments
from monai_morse.errors import InputError

from .experts import PointwiseMLP

__all__ = ["AnatomicalHead", "FourierEncoding", "ImplicitPointRendHead", "PointRendHead"]


class FourierEncoding(nn.Module):
    """Equation 3: ``[sin 2 pi (w_1 y + v_1 x), .., sin 2 pi (w_L y + v_L x), cos .., ..]`` with trainable frequencies.

    Always computed in float32: at half precision the phases of high frequencies are lost.

    Args:
        spatial_dims: coordinates per point; 3D has one more frequency per row.
        num_frequencies: L, default 128; 0 encodes nothing.

    >>> FourierEncoding(3, 8)(torch.zeros(2, 5, 3)).shape
    torch.Size([2, 16, 5])
    """

    @typed_arguments
    def __init__(self, spatial_dims: int, num_frequencies: int = 128) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(num_frequencies, spatial_dims))

    def forward(self, coordinates: Tensor) -> Tensor:
        """Coordinates (B, P, len(S)) in [-1, 1] -> encoding (B, 2L, P), all sines, then all cosines."""
        phase = self.phase(coordinates)
        return torch.cat([phase.sin(), phase.cos()], dim=1)

    def phase(self, coordinates: Tensor) -> Tensor:
        """The angles alone, (B, L, P)."""
        # sums of products, not a matrix product, which autocast would run in half precision
        dtype = torch.promote_types(self.frequencies.dtype, torch.float32)
        turns = (2 * math.pi * coordinates.to(dtype)).unsqueeze(1)
        frequencies = self.frequencies.to(dtype).unsqueeze(2).unbind(1)
        phase = frequencies[0] * turns[:, :, :, 0]
        for axis in range(1, len(frequencies)):
            phase = torch.addcmul(phase, frequencies[axis], turns[:, :, :, axis])
        return phase


class AnatomicalHead(nn.Module):
    """IAR: a 3-layer MLP on the encoded coordinates and the feature of each point.

    Args:
        in_channels: C of the points' features. num_classes: K. spatial_dims: 2 or 3.
        context_channels: not used.
        width: hidden channels, default 256.
        num_frequencies: L of the encoding, default 128.
        residual: add the MLP's output to the point's coarse logits and start it at zero (default), so that a renderer that
            has seen no training changes nothing; under eq. 4 that is every renderer until T/2. ``False`` is the paper's:
            the MLP's output replaces the coarse logits.

    >>> head = AnatomicalHead(16, num_classes=3, spatial_dims=3, width=32, num_frequencies=8)
    >>> head(torch.rand(2, 16, 10), torch.rand(2, 10, 3), torch.rand(2, 3, 10), torch.rand(2, 0)).shape
    torch.Size([2, 3, 10])
    """

    reads_context = False

    @typed_arguments
    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        spatial_dims: int,
        context_channels: int = 0,
        width: int = 256,
        num_frequencies: int = 128,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.encoding = FourierEncoding(spatial_dims, num_frequencies)
        widths = [width, width, num_classes]
        self.mlp = PointwiseMLP(2 * num_frequencies + in_channels, widths, last_activation=False, last_zero=residual)

    def forward(self, features: Tensor, coordinates: Tensor, coarse: Tensor, context: Tensor) -> Tensor:
        phase, dtype = self.encoding.phase(coordinates), features.dtype
        rendered = self.mlp(torch.cat([phase.sin().to(dtype), phase.cos().to(dtype), features], dim=1))
        return coarse + rendered if self.residual else rendered


class PointRendHead(nn.Module):
    """PointRend: an MLP of 3 hidden layers on the feature of each point, its coarse logits beside every layer's input.

    Args:
        in_channels, num_classes: as for :class:`AnatomicalHead`.
        spatial_dims, context_channels, num_frequencies: not used; PointRend knows no coordinates.
        width: hidden channels, default 256.
        residual: as for :class:`AnatomicalHead`; ``False`` is the original, whose last layer starts with a deviation of 0.001.

    Source: Kirillov et al., PointRend: Image Segmentation as Rendering, CVPR 2020.

    >>> head = PointRendHead(16, num_classes=3, spatial_dims=3, width=32)
    >>> head(torch.rand(2, 16, 10), torch.rand(2, 10, 3), torch.rand(2, 3, 10), torch.rand(2, 0)).shape
    torch.Size([2, 3, 10])
    """

    reads_context = False

    @typed_arguments
    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        spatial_dims: int,
        context_channels: int = 0,
        width: int = 256,
        num_frequencies: int = 0,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.residual = residual
        inputs = [in_channels, width, width]
        self.hidden = nn.ModuleList([PointwiseMLP(c + num_classes, [width]) for c in inputs])
        self.predictor = PointwiseMLP(width + num_classes, [num_classes], last_activation=False, last_zero=residual)
        if not residual:
            nn.init.normal_(next(self.predictor.parameters()), std=1e-3)

    def forward(self, features: Tensor, coordinates: Tensor, coarse: Tensor, context: Tensor) -> Tensor:
        logits = coarse.to(features.dtype)
        for layer in self.hidden:
            features = layer(torch.cat([features, logits], dim=1))
        rendered = self.predictor(torch.cat([features, logits], dim=1))
        return coarse + rendered if self.residual else rendered


class ImplicitPointRendHead(nn.Module):
    """Implicit PointRend: the weights of a 4-layer point MLP are generated for each image, from what is seen in all of it.

    The generated MLP takes the encoded coordinates and the feature of each point. The generator, an MLP on ``context``, starts
    with the same He-initialised weights for every image.

    Args:
        in_channels, num_classes, spatial_dims: as for :class:`AnatomicalHead`.
        context_channels: C', what the generator reads.
        width: hidden channels of both MLPs, default 256. The generator's last layer has about width^3 weights.
        num_frequencies: L, default 128; fixed here, not trained, as in the original.
        residual: as for :class:`AnatomicalHead`; ``False`` is the original.

    Source: Cheng et al., Pointly-Supervised Instance Segmentation, CVPR 2022; there an object's parameters, here a window's.
    What else differs from their code, docs/paper.md says.

    >>> head = ImplicitPointRendHead(16, num_classes=3, spatial_dims=3, context_channels=5, width=8, num_frequencies=4)
    >>> head(torch.rand(2, 16, 10), torch.rand(2, 10, 3), torch.rand(2, 3, 10), torch.rand(2, 5)).shape
    torch.Size([2, 3, 10])
    """

    reads_context = True

    @typed_arguments
    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        spatial_dims: int,
        context_channels: int,
        width: int = 256,
        num_frequencies: int = 128,
        residual: bool = True,
    ) -> None:
        super().__init__()
        if context_channels < 1:
            raise InputError("head: an implicit_pointrend head needs context_channels >= 1, what its generator reads")
        self.residual = residual
        self.encoding = FourierEncoding(spatial_dims, num_frequencies)
        self.encoding.frequencies.requires_grad_(False)
        self.widths: List[int] = [2 * num_frequencies + in_channels, width, width, width, num_classes]
        start = PointwiseMLP(self.widths[0], self.widths[1:], last_activation=False, last_zero=residual)
        weights = torch.cat([p.detach().flatten() for p in start.parameters()])
        self.hidden = PointwiseMLP(context_channels, [width, width])
        self.generator = nn.Linear(width, len(weights))
        nn.init.normal_(self.generator.weight, std=1e-3)
        if residual:  # no image's last layer differs from zero at the start
            nn.init.zeros_(self.generator.weight[-(width + 1) * num_classes :])
        self.generator.bias = nn.Parameter(weights)

    def forward(self, features: Tensor, coordinates: Tensor, coarse: Tensor, context: Tensor) -> Tensor:
        generated = self.generator(self.hidden(context.unsqueeze(2)).squeeze(2)).to(features.dtype)
        x = torch.cat([self.encoding(coordinates).to(features.dtype), features], dim=1)
        start = 0
        for i in range(len(self.widths) - 1):
            c_in, c_out = self.widths[i], self.widths[i + 1]
            weight = generated[:, start : start + c_in * c_out].reshape(-1, c_out, c_in)
            bias = generated[:, start + c_in * c_out : start + (c_in + 1) * c_out]
            start += (c_in + 1) * c_out
            x = torch.baddbmm(bias.unsqueeze(2), weight, x)
            if i + 2 < len(self.widths):
                x = x.relu()
        return coarse + x if self.residual else x
