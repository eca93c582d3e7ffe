"""TransUNet, which MONAI lacks: a ResNet, a transformer on its coarsest map, and a cascade of upsampling blocks."""

import logging
import math
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Dict, List, Optional, Union

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.blocks import Convolution, MLPBlock, SABlock
from torch import Tensor, nn

from monai_morse.config import typed_arguments
from monai_morse.errors import InputError

from .unet3d import check_sides

__all__ = ["TransUNet"]

logger = logging.getLogger(__name__)

REDUCTION = 16  # of the map that the transformer sees
# modules of a transformer block and their names in the public file
BLOCK_KEYS = {
    "norm1": "LayerNorm_0",
    "attn.to_q": "MultiHeadDotProductAttention_1/query",
    "attn.to_k": "MultiHeadDotProductAttention_1/key",
    "attn.to_v": "MultiHeadDotProductAttention_1/value",
    "attn.out_proj": "MultiHeadDotProductAttention_1/out",
    "norm2": "LayerNorm_2",
    "mlp.linear1": "MlpBlock_3/Dense_0",
    "mlp.linear2": "MlpBlock_3/Dense_1",
}


class _StandardizedConv2d(nn.Conv2d):
    """A convolution whose kernels are brought to mean 0 and variance 1 before use."""

    def forward(self, input: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        return self._conv_forward(input, (self.weight - mean) / torch.sqrt(variance + 1e-5), self.bias)


class _GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` that also takes groups of one value, as the last stage has on a 16 x 16 image."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    return _StandardizedConv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


def _norm(channels: int) -> nn.GroupNorm:
    return _GroupNorm(math.gcd(32, channels), channels, eps=1e-6)  # 32 groups but in networks too narrow for them


class _ResidualUnit(nn.Module):
    """1x1, 3x3 and 1x1 convolution beside a shortcut: (B, C, H, W) -> (B, 4 mid_channels, H / stride, W / stride).

    The names of its modules are those of the public file.
    """

    def __init__(self, in_channels: int, mid_channels: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = 4 * mid_channels
        self.conv1, self.gn1 = _conv(in_channels, mid_channels, 1), _norm(mid_channels)
        self.conv2, self.gn2 = _conv(mid_channels, mid_channels, 3, stride), _norm(mid_channels)
        self.conv3, self.gn3 = _conv(mid_channels, out_channels, 1), _norm(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            projection = _conv(in_channels, out_channels, 1, stride)
            norm = _GroupNorm(out_channels, out_channels)  # a group a channel and torch's eps, as published
            self.shortcut = nn.Sequential(OrderedDict(conv_proj=projection, gn_proj=norm))

    def forward(self, x: Tensor) -> Tensor:
        y = self.gn1(self.conv1(x)).relu()
        y = self.gn2(self.conv2(y)).relu()
        return (self.shortcut(x) + self.gn3(self.conv3(y))).relu()


class _Encoder(nn.Module):
    """ResNet v2 with GroupNorm and weight standardisation, without its last stage.

    (B, C, H, W) -> maps of 16 W_0, 8 W_0, 4 W_0 and W_0 channels, 16, 8, 4 and 2 times smaller, W_0 being ``width``.
    """

    def __init__(self, in_channels: int, width: int, units: Sequence[int]) -> None:
        super().__init__()
        self.colours = 3 if in_channels in (1, 3) else in_channels
        self.root = nn.Sequential(OrderedDict(conv=_conv(self.colours, width, 7, stride=2), gn=_norm(width), relu=nn.ReLU()))
        self.pool = nn.MaxPool2d(kernel_size=3, stride=2)
        # the pooling has no padding and its map lacks a row and a column, which a skip connection needs
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        stages: List[nn.Module] = []
        channels = width
        for i, count in enumerate(units):
            mid_channels = width << i
            first = _ResidualUnit(channels, mid_channels, stride=1 if i == 0 else 2)
            channels = 4 * mid_channels
            stages.append(nn.Sequential(first, *[_ResidualUnit(channels, mid_channels) for _ in range(count - 1)]))
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> List[Tensor]:
        if not torch.jit.is_scripting():
            if not torch.jit.is_tracing():
                check_sides(x, REDUCTION)
        if self.colours == 3:
            x = x.expand(-1, 3, -1, -1)  # grey to colour; colour stays
        x = self.root(x)
        maps = [x]
        x = self.pool(x)
        for i, stage in enumerate(self.stages):
            x = stage(x)
            maps.insert(0, self.pad(x) if i == 0 else x)
        return maps


class _TransformerBlock(nn.Module):
    """Attention and MLP, each on the normalised input and added to it: (B, H * W, C) -> (B, H * W, C).

    MONAI's own block has another LayerNorm epsilon, drops attention too, and carries a norm for cross attention.
    """

    def __init__(self, hidden_size: int, mlp_dim: int, num_heads: int, dropout_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = SABlock(hidden_size, num_heads, qkv_bias=True, use_combined_linear=False, use_flash_attention=True)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = MLPBlock(hidden_size, mlp_dim, dropout_rate)
        for linear in (self.mlp.linear1, self.mlp.linear2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _resampled(positions: Tensor, size: List[int]) -> Tensor:
    """Position embeddings (1, C, *S) for another grid, corner upon corner, the rule of ViT's authors."""
    return F.interpolate(positions, size, mode="bilinear", align_corners=True)


class _Transformer(nn.Module):
    """ViT in which every voxel of a map is a token: (B, C, H, W) -> (B, hidden_size, H, W)."""

    def __init__(
        self,
        in_channels: int,
        grid: Sequence[int],
        hidden_size: int,
        mlp_dim: int,
        num_layers: int,
        num_heads: int,
        dropout_rate: float,
    ) -> None:
        super().__init__()
        self.embedding = nn.Conv2d(in_channels, hidden_size, kernel_size=1)
        self.positions = nn.Parameter(torch.zeros(1, hidden_size, *grid))
        self.dropout = nn.Dropout(dropout_rate)
        blocks = [_TransformerBlock(hidden_size, mlp_dim, num_heads, dropout_rate) for _ in range(num_layers)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        x = self.dropout(x + _resampled(self.positions, list(x.shape[2:])))
        tokens = self.norm(self.blocks(x.flatten(2).transpose(1, 2)))
        return tokens.transpose(1, 2).reshape(x.shape)


class _UpBlock(nn.Module):
    """(B, C, H, W) and maybe a skip connection of twice the size -> (B, out_channels, 2H, 2W)."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.convolutions = nn.Sequential(
            Convolution(2, in_channels + skip_channels, out_channels, act="relu", norm="batch", bias=False),
            Convolution(2, out_channels, out_channels, act="relu", norm="batch", bias=False),
        )

    def forward(self, x: Tensor, skip: Optional[Tensor] = None) -> Tensor:
        x = self.up(x)
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        return self.convolutions(x)


class TransUNet(nn.Module):
    """TransUNet on ResNet-50 and ViT-B/16: the defaults are the published network, for any image sides in multiples of 16.

    Args:
        in_channels: C, default 1. A grey image is repeated to three colours, as published, so that 1 and 3 are the same
            network and ImageNet's weights fit both; other counts get a first convolution of their own.
        out_channels: K, default 2.
        img_size: height and width, or both in one number, for which position embeddings are made; default 224. For an image
            of another size they are interpolated.
        hidden_size: channels of the transformer, default 768.
        num_layers: its blocks, default 12.
        num_heads: attention heads of each, default 12.
        mlp_dim: hidden channels of its MLPs, default 3072.
        resnet_units: residual units of the ResNet's three stages, default (3, 4, 9).
        width_factor: its width in multiples of 64 channels, default 1.
        decoder_channels: of the four upsampling blocks, default (256, 128, 64, 16).
        num_skips: how many of them, the coarsest first, are given a map of the ResNet; default 3, all there are.
        dropout_rate: of position-embedded tokens and the MLPs, default 0.1.

    Raises:
        InputError: for a size that cannot be, and for an input with a side that is not a multiple of 16.

    Attributes:
        decoder_names: what makes its decoder features, coarse to fine: the four upsampling blocks.

    Source: Chen et al., TransUNet: Transformers Make Strong Encoders for Medical Image Segmentation, arXiv:2102.04306.

    >>> small = {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "mlp_dim": 32, "resnet_units": (1, 1, 1)}
    >>> net = TransUNet(1, 3, img_size=64, width_factor=0.125, decoder_channels=(16, 8, 8, 4), **small)
    >>> net(torch.rand(1, 1, 32, 48)).shape
    torch.Size([1, 3, 32, 48])
    """

    decoder_names = ("decoder.0", "decoder.1", "decoder.2", "decoder.3")

    @typed_arguments
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 2,
        img_size: Union[int, Sequence[int]] = 224,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        mlp_dim: int = 3072,
        resnet_units: Sequence[int] = (3, 4, 9),
        width_factor: float = 1.0,
        decoder_channels: Sequence[int] = (256, 128, 64, 16),
        num_skips: int = 3,
        dropout_rate: float = 0.1,
    ) -> None:
        super().__init__()
        size = [img_size, img_size] if isinstance(img_size, int) else list(img_size)
        if len(size) != 2 or any(s < 1 or s % REDUCTION for s in size):
            raise InputError(f"img_size must be one or two positive multiples of {REDUCTION}, got {img_size}")
        if hidden_size % num_heads:
            raise InputError(f"hidden_size must be a multiple of num_heads, got {hidden_size} and {num_heads}")
        if len(resnet_units) != 3 or min(resnet_units) < 1:
            raise InputError(f"resnet_units must be three positive numbers, got {resnet_units}")
        if len(decoder_channels) != 4 or min(decoder_channels) < 1:
            raise InputError(f"decoder_channels must be four positive numbers, got {decoder_channels}")
        if not 0 <= num_skips <= 3:
            raise InputError(f"num_skips must be 0 to 3, got {num_skips}")
        width = int(64 * width_factor)
        if width < 1:
            raise InputError(f"width_factor must be at least 1/64, got {width_factor}")
        self.num_skips, self.num_heads = num_skips, num_heads
        self.in_channels = in_channels
        self.encoder = _Encoder(in_channels, width, resnet_units)
        grid = [s // REDUCTION for s in size]
        self.transformer = _Transformer(16 * width, grid, hidden_size, mlp_dim, num_layers, num_heads, dropout_rate)
        widths = [2 * decoder_channels[0], *decoder_channels]
        self.bottleneck = Convolution(2, hidden_size, widths[0], act="relu", norm="batch", bias=False)
        skips = [c * width if i < num_skips else 0 for i, c in enumerate((8, 4, 1, 0))]
        self.decoder = nn.ModuleList([_UpBlock(*sizes) for sizes in zip(widths, skips, decoder_channels)])
        self.head = nn.Conv2d(widths[-1], out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K, H, W)."""
        maps = self.encoder(x)
        x = self.bottleneck(self.transformer(maps[0]))
        for i, block in enumerate(self.decoder):
            x = block(x, maps[i + 1]) if i < self.num_skips else block(x)
        return self.head(x)

    def load_imagenet21k(self, path: Union[str, Path]) -> Dict[str, str]:
        """Start from the public ``R50+ViT-B_16.npz`` (ImageNet-21k): all weights of the ResNet and the transformer, or none.

        Position embeddings are interpolated to this network's grid, bilinearly and corner upon corner, as published; the
        class token's is left out, and so is the classifier. The decoder keeps its weights.

        Args:
            path: the file, to be had from https://storage.googleapis.com/vit_models/imagenet21k/R50+ViT-B_16.npz

        Returns:
            The names of the parameters that were set, each with its name in the file.

        Raises:
            InputError: when it is no such file, or one for a network of other sizes.
        """
        keys = self._imagenet_keys()
        arrays = _read_arrays(path, list(keys.values()))
        values = {name: _converted(arrays[key], self.get_parameter(name)) for name, key in keys.items()}
        for name, value in values.items():
            shape, expected = arrays[keys[name]].shape, self.get_parameter(name).shape
            heads_differ = "attn.to_q.bias" in name and shape[0] != self.num_heads
            if value.shape != expected or heads_differ:
                raise InputError(
                    f"{path}: {keys[name]} of shape {shape} does not fit {name} of shape {tuple(expected)} in a network of "
                    f"{self.num_heads} heads; build it with the sizes of the file"
                )
        with torch.no_grad():
            for name, value in values.items():
                self.get_parameter(name).copy_(value)
        logger.info(f"{len(keys)} of {len(list(self.parameters()))} parameters set from {path}; the others are the decoder's")
        return keys

    def _imagenet_keys(self) -> Dict[str, str]:
        """The public file's name of each parameter of the ResNet and the transformer."""
        keys = {"transformer.positions": "Transformer/posembed_input/pos_embedding"}
        modules = {
            "encoder.root.conv": "conv_root",
            "encoder.root.gn": "gn_root",
            "transformer.embedding": "embedding",
            "transformer.norm": "Transformer/encoder_norm",
        }
        for name, module in self.named_modules():
            parts = name.split(".")
            if name.startswith("encoder.stages.") and isinstance(module, (nn.Conv2d, nn.GroupNorm)):
                modules[name] = f"block{int(parts[2]) + 1}/unit{int(parts[3]) + 1}/{parts[-1]}"
            elif name.startswith("transformer.blocks.") and isinstance(module, (nn.Linear, nn.LayerNorm)):
                modules[name] = f"Transformer/encoderblock_{parts[2]}/{BLOCK_KEYS['.'.join(parts[3:])]}"
        for name, key in modules.items():
            for part, parameter in self.get_submodule(name).named_parameters():
                kind = "bias" if part == "bias" else "scale" if parameter.ndim == 1 else "kernel"
                keys[f"{name}.{part}"] = f"{key}/{kind}"
        return keys


def _read_arrays(path: Union[str, Path], keys: Sequence[str]) -> Dict[str, np.ndarray]:
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with file:
            arrays = {key: file[key] for key in keys if key in file.files}
    except (EOFError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot read {path} as an .npz file: {error}") from error
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise InputError(
            f"{path} has no '{missing[0]}' ({len(missing)} of {len(keys)} names missing); expected the public "
            "R50+ViT-B_16.npz and a network of no more units and layers than R50-ViT-B/16's"
        )
    return arrays


def _converted(array: np.ndarray, parameter: Tensor) -> Tensor:
    """An array of the public file in torch's order of axes, the parameter's shape where it fits."""
    value, shape = torch.from_numpy(array), parameter.shape
    if value.ndim == 3 and parameter.ndim == 4:  # position embeddings (1, 1 + side * side, C), the class token's first
        side = math.isqrt(value.shape[1] - 1)
        if value.shape[1] == 1 + side * side:
            return _resampled(value[:, 1:].transpose(1, 2).unflatten(2, [side, side]), list(shape[2:]))
    if value.ndim == parameter.ndim == 4:  # height, width, in, out
        return value.permute(3, 2, 0, 1)
    if value.ndim > 1 and parameter.ndim == 2 and value.numel() == parameter.numel():  # heads have an axis of their own
        return value.reshape(shape[1], shape[0]).T
    return value.flatten() if parameter.ndim == 1 else value
