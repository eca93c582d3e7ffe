"""Morse: backbone + mixture + renderer, the only place that knows all three."""

from collections.abc import Mapping, Sequence
from typing import Any, List, NamedTuple, Tuple, Union

import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from monai_morse.errors import InputError

from . import points as P
from .decoders import DecoderFeatures, decoder_names
from .experts import Mixture, PointwiseMLP
from .renderers import AnatomicalHead

__all__ = ["Morse", "MorseOutput"]

EXPERTS = ("none", "dense", "stochastic")
RENDERERS = {"none": None, "anatomical": AnatomicalHead}
COARSE = ("experts", "backbone")


class MorseOutput(NamedTuple):
    """What the loss needs: the coarse logits everywhere and the rendered logits at the selected points."""

    coarse: Tensor
    """(B, K, *S)"""
    point_logits: Tensor
    """(B, K, P)"""
    point_index: Tensor
    """flat voxel indices of the points, (B, P)"""


def _one_of(name: str, word: str, words: Sequence[str]) -> str:
    if word not in words:
        raise InputError(f"{name} must be one of {tuple(words)}, got {word!r}")
    return word


def _build(name: str, kind: Any, *args: Any, **options: Any) -> Any:
    try:
        return kind(*args, **options)
    except TypeError as error:
        raise InputError(f"{name}: {error}; see monai_morse.networks.{kind.__name__} for its options") from error


class Morse(nn.Module):
    """A segmentation network with a mixture of experts over its decoder features and re-rendered uncertain voxels.

    Two words choose the system: ``experts`` and ``renderer``. With both ``"none"`` it is the backbone, bit for bit. A plain
    call returns plain logits (B, K, *S) in training and in eval mode: the coarse logits with the logits of the ``num_eval``
    least certain voxels re-rendered.

    Args:
        backbone: network (B, C, *S) -> logits (B, K, *S), 2D or 3D.
        experts: ``"none"``, ``"dense"`` (MoE) or ``"stochastic"`` (SMoE: expert dropout in training).
        renderer: ``"none"`` or ``"anatomical"`` (IAR).
        num_experts: N, the finest decoder features that become experts; default 3.
        dropout: expert dropout alpha of ``"stochastic"``; default 0.7.
        coarse: where the coarse logits come from: ``"experts"`` (default), a linear map of x_out, or ``"backbone"``, its own
            logits. Without experts they are always the backbone's.
        mixture: options of :class:`Mixture`: width, gate_stride, min_active.
        head: options of the renderer's head, e.g. of :class:`AnatomicalHead`: width, num_frequencies.
        points: options of :class:`PointSelection`: num_train, num_eval, oversample, importance_ratio.
        decoder: names of the submodules that make the decoder features, coarse to fine; default: found for MONAI's backbones.

    Raises:
        InputError: for an unknown word or option, more experts than decoder features, or a backbone that cannot be traced.

    Source: You et al., Implicit Anatomical Rendering for Medical Image Segmentation with Stochastic Experts, MICCAI 2023.

    >>> from monai.networks.nets import BasicUNet
    >>> backbone = BasicUNet(spatial_dims=2, out_channels=3, features=(4, 4, 8, 16, 32, 4))
    >>> net = Morse(backbone, mixture={"width": 8, "gate_stride": 4}, head={"width": 8, "num_frequencies": 4})
    >>> net(torch.rand(1, 1, 32, 48)).shape
    torch.Size([1, 3, 32, 48])
    >>> net(torch.rand(1, 1, 32, 48), return_points=True).point_logits.shape
    torch.Size([1, 3, 1536])
    """

    def __init__(
        self,
        backbone: nn.Module,
        experts: str = "stochastic",
        renderer: str = "anatomical",
        num_experts: int = 3,
        dropout: float = 0.7,
        coarse: str = "experts",
        mixture: Mapping[str, Any] | None = None,
        head: Mapping[str, Any] | None = None,
        points: Mapping[str, Any] | None = None,
        decoder: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        _one_of("experts", experts, EXPERTS)
        _one_of("renderer", renderer, tuple(RENDERERS))
        _one_of("coarse", coarse, COARSE)
        if experts != "none" and renderer == "none" and coarse == "backbone":
            raise InputError("experts without a renderer need coarse='experts': nothing else would use them")
        self.points = _build("points", P.PointSelection, **(points or {}))
        # as plain numbers, which torch.jit.script can read
        self.num_train, self.num_eval = self.points.num_train, self.points.num_eval

        names: Sequence[str] = ()
        if experts != "none" or renderer != "none":
            names = decoder_names(backbone) if decoder is None else decoder
            if not 1 <= num_experts <= len(names):
                raise InputError(
                    f"num_experts must be 1 to {len(names)}, the decoder features of {type(backbone).__name__}, "
                    f"got {num_experts}"
                )
            names = names[-num_experts:]
        self.decoder = DecoderFeatures(backbone, names)

        channels = [f.channels for f in self.decoder.info]
        num_classes = self.decoder.num_classes
        spatial_dims = len(self.decoder.info[0].reduction) if channels else 0
        self.mixture: Mixture | None = None
        self.classifier: PointwiseMLP | None = None
        self.renderer: nn.Module | None = None
        if experts != "none":
            drop_prob = dropout if experts == "stochastic" else 0.0
            self.mixture = _build("mixture", Mixture, channels, spatial_dims, drop_prob=drop_prob, **(mixture or {}))
            channels = [self.mixture.out_channels]
            if coarse == "experts":
                self.classifier = PointwiseMLP(channels[0], [num_classes], last_activation=False)
        if renderer != "none":
            self.renderer = _build("head", RENDERERS[renderer], sum(channels), num_classes, spatial_dims, **(head or {}))

    def forward(self, x: Tensor, return_points: bool = False) -> Union[Tensor, MorseOutput]:
        """Logits (B, K, *S); with ``return_points``, what the loss needs to train the renderer: :class:`MorseOutput`.

        Args:
            x: (B, C, *S). return_points: draw ``num_train`` points and render those; without a renderer, P = 0.
        """
        if not torch.jit.is_scripting():
            if isinstance(x, MetaTensor):  # its bookkeeping belongs to the result, not to every operation on the way
                out = self.forward(x.as_tensor(), return_points)
                return out if isinstance(out, tuple) else MetaTensor(out, meta=x.meta)
            if return_points:
                return self._training_points(x)
        coarse, features = self._coarse(x)
        if self.renderer is None:
            return coarse
        index = P.select_uncertain_points(P.uncertainty(coarse), self.num_eval)
        return P.write_points(coarse, index, self._render(coarse, features, index))

    @torch.jit.unused
    def rendered_voxels(self, x: Tensor) -> Tensor:
        """Which voxels ``forward(x)`` re-renders, to look at: (B, C, *S) -> (B, 1, *S), 1 where it does, 0 elsewhere."""
        coarse = self._coarse(x)[0]
        mask = torch.zeros_like(coarse[:, :1])
        if self.renderer is None:
            return mask
        index = P.select_uncertain_points(P.uncertainty(coarse), self.num_eval)
        return P.write_points(mask, index, torch.ones_like(index[:, None], dtype=mask.dtype))

    def _coarse(self, x: Tensor) -> Tuple[Tensor, List[Tensor]]:
        """Coarse logits (B, K, *S), and the maps to render from: x_out alone where it exists, else the decoder features."""
        logits, features = self.decoder(x)
        if self.mixture is not None and self.classifier is not None:
            features = [self.mixture(features, list(x.shape[2:]))]
            logits = self.classifier(features[0])
        return logits, features

    def _render(self, coarse: Tensor, features: List[Tensor], index: Tensor) -> Tensor:
        """Logits (B, K, P) of the voxels at ``index`` (B, P)."""
        logits = P.gather_points(coarse, index)
        if self.renderer is None:
            return logits
        size = list(coarse.shape[2:])
        coordinates = P.point_coordinates(index, size)
        if self.mixture is not None and self.classifier is None:
            sampled = self.mixture.at_points(features, coordinates, size)
        else:
            sampled = torch.cat([P.sample_linear(feature, coordinates) for feature in features], dim=1)
        return self.renderer(sampled, coordinates, logits)

    @torch.jit.unused
    def _training_points(self, x: Tensor) -> MorseOutput:
        coarse, features = self._coarse(x)
        if self.renderer is None:
            none = torch.zeros(coarse.shape[0], 0, dtype=torch.long, device=coarse.device)
            return MorseOutput(coarse, coarse.flatten(2)[:, :, :0], none)
        with torch.no_grad():
            score = P.uncertainty(coarse)
            index = P.select_training_points(score, self.points.num_train, self.points.oversample, self.points.importance_ratio)
        return MorseOutput(coarse, self._render(coarse, features, index), index)
