"""Rendering heads: class logits of points from their features and coordinates. No geometry here, see ``points``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .experts import PointwiseMLP

__all__ = ["AnatomicalHead", "FourierEncoding"]


class FourierEncoding(nn.Module):
    """Equation 3: ``[sin 2 pi (w_1 y + v_1 x), .., sin 2 pi (w_L y + v_L x), cos .., ..]`` with trainable frequencies.

    Always computed in float32: at half precision the phases of high frequencies are lost.

    Args:
        spatial_dims: coordinates per point; 3D has one more frequency per row.
        num_frequencies: L, default 128.

    >>> FourierEncoding(3, 8)(torch.zeros(2, 5, 3)).shape
    torch.Size([2, 16, 5])
    """

    def __init__(self, spatial_dims: int, num_frequencies: int = 128) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(num_frequencies, spatial_dims))

    def forward(self, coordinates: Tensor) -> Tensor:
        """Coordinates (B, P, len(S)) in [-1, 1] -> encoding (B, 2L, P), all sines, then all cosines."""
        # sums of products, not a matrix product, which autocast would run in half precision
        dtype = torch.promote_types(self.frequencies.dtype, torch.float32)
        frequencies = self.frequencies.to(dtype)
        coordinates = coordinates.to(dtype)
        phase = frequencies[:, 0, None] * coordinates[:, None, :, 0]
        for axis in range(1, frequencies.shape[1]):
            phase = phase + frequencies[:, axis, None] * coordinates[:, None, :, axis]
        phase = 2 * math.pi * phase
        return torch.cat([phase.sin(), phase.cos()], dim=1)


class AnatomicalHead(nn.Module):
    """IAR: a 3-layer MLP on the encoded coordinates and the feature of each point.

    Args:
        in_channels: channels of the points' features (x_out, or the decoder features side by side).
        num_classes: K.
        spatial_dims: 2 or 3.
        width: hidden channels, default 256.
        num_frequencies: L of the encoding, default 128.
        residual: add the MLP's output to the point's coarse logits and start it at zero (default), so that a renderer that
            has seen no training changes nothing; under eq. 4 that is every renderer until T/2. ``False`` is the paper's:
            the MLP's output replaces the coarse logits.

    >>> head = AnatomicalHead(16, num_classes=3, spatial_dims=3, width=32, num_frequencies=8)
    >>> head(torch.rand(2, 16, 10), torch.rand(2, 10, 3), torch.rand(2, 3, 10)).shape
    torch.Size([2, 3, 10])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        spatial_dims: int,
        width: int = 256,
        num_frequencies: int = 128,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.encoding = FourierEncoding(spatial_dims, num_frequencies)
        self.mlp = PointwiseMLP(2 * num_frequencies + in_channels, [width, width, num_classes], last_activation=False)
        if residual:
            nn.init.zeros_(list(self.mlp.layers[-1].parameters())[0])

    def forward(self, features: Tensor, coordinates: Tensor, coarse: Tensor) -> Tensor:
        """Features (B, C, P), coordinates (B, P, len(S)) and coarse logits (B, K, P) of the points -> logits (B, K, P)."""
        encoded = self.encoding(coordinates).to(features.dtype)
        rendered = self.mlp(torch.cat([encoded, features], dim=1))
        return coarse + rendered if self.residual else rendered
