"""The 3D U-Net as published, which MONAI lacks: its channels double before each pooling, not after."""

from typing import List

import torch
from monai.networks.blocks import Convolution
from monai.networks.layers.factories import Conv, Pool
from torch import Tensor, nn

from monai_morse.config import typed_arguments
from monai_morse.errors import InputError

__all__ = ["UNet3D", "check_sides"]


def check_sides(x: Tensor, multiple: int) -> None:
    """See that every side of ``x`` (B, C, *S) is a multiple of ``multiple``.

    Raises:
        InputError: when one is not, naming the nearest size that is.

    >>> check_sides(torch.rand(1, 1, 32, 48), 16)
    """
    size = list(x.shape[2:])
    if any(s % multiple for s in size):
        nearest = [max((s + multiple // 2) // multiple, 1) * multiple for s in size]
        raise InputError(f"each side of the input must be a multiple of {multiple}, got {size}; the nearest size is {nearest}")


def _two_convolutions(in_channels: int, mid_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        Convolution(3, in_channels, mid_channels, act="relu", norm="batch"),
        Convolution(3, mid_channels, out_channels, act="relu", norm="batch"),
    )


class _Encoder(nn.Module):
    """(B, C, *S) -> what the skip connections carry, coarse to fine: (B, 8F, *S/4), (B, 4F, *S/2), (B, 2F, *S)."""

    def __init__(self, in_channels: int, features: int) -> None:
        super().__init__()
        widths = [in_channels, 2 * features, 4 * features]
        self.levels = nn.ModuleList([_two_convolutions(w, features * m, 2 * features * m) for w, m in zip(widths, (1, 2, 4))])
        self.pool = Pool["max", 3](kernel_size=2)

    def forward(self, x: Tensor) -> List[Tensor]:
        if not torch.jit.is_scripting():
            if not torch.jit.is_tracing():
                check_sides(x, 8)
        skips: List[Tensor] = []
        for i, level in enumerate(self.levels):
            x = level(x if i == 0 else self.pool(x))
            skips.insert(0, x)
        return skips


class _UpBlock(nn.Module):
    """(B, C, *S) and a skip connection (B, C', *2S) -> (B, C', *2S)."""

    def __init__(self, in_channels: int, skip_channels: int) -> None:
        super().__init__()
        self.up = Conv["convtrans", 3](in_channels, in_channels, kernel_size=2, stride=2, bias=False)
        self.convolutions = _two_convolutions(in_channels + skip_channels, skip_channels, skip_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.convolutions(torch.cat([skip, self.up(x)], dim=1))


class UNet3D(nn.Module):
    """3D U-Net: four resolutions, 2 x (3x3x3 convolution, batch norm, ReLU) at each on the way down and up.

    Its convolutions are padded, so that logits come at the input's size; the original's shrink the image at each.

    Args:
        in_channels: C, default 1.
        out_channels: K, default 2.
        features: F, channels of the first convolution; default 32, the paper's. The levels have 2F, 4F, 8F and 16F.

    Raises:
        InputError: for an input with a side that is not a multiple of 8.

    Attributes:
        decoder_names: what makes its decoder features, coarse to fine: the bottleneck and three levels.

    The paper counts 19,069,955 parameters at C = K = 3. These are the convolutions': with biases in all but the
    up-convolutions. The scale and shift of the batch norms, which the paper has too, are 4,672 more.

    Source: Çiçek et al., 3D U-Net: Learning Dense Volumetric Segmentation from Sparse Annotation, MICCAI 2016.

    >>> UNet3D(in_channels=1, out_channels=3, features=4)(torch.rand(1, 1, 16, 24, 8)).shape
    torch.Size([1, 3, 16, 24, 8])
    """

    decoder_names = ("bottleneck", "decoder.0", "decoder.1", "decoder.2")

    @typed_arguments
    def __init__(self, in_channels: int = 1, out_channels: int = 2, features: int = 32) -> None:
        super().__init__()
        if features < 1:
            raise InputError(f"features must be at least 1, got {features}")
        self.encoder = _Encoder(in_channels, features)
        self.pool = Pool["max", 3](kernel_size=2)
        self.bottleneck = _two_convolutions(8 * features, 8 * features, 16 * features)
        self.decoder = nn.ModuleList([_UpBlock(2 * c * features, c * features) for c in (8, 4, 2)])
        self.head = Conv["conv", 3](2 * features, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> logits (B, K, *S)."""
        skips = self.encoder(x)
        x = self.bottleneck(self.pool(skips[0]))
        for i, block in enumerate(self.decoder):
            x = block(x, skips[i])
        return self.head(x)
