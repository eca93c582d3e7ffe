"""Morse: backbone + mixture + renderer, the only place that knows all three."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Dict, List, NamedTuple, Optional, Union

import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from monai_morse.config import typed_arguments
from monai_morse.errors import InputError

from .backbones import decoder_names
from .decoders import DecoderFeatures
from .experts import Mixture, PointwiseMLP
from .options import EXPERTS, PRESETS, RENDERERS, resolve_options
from .points import (
    apply_affine,
    gather_patch,
    gather_points,
    point_coordinates,
    sample_grid,
    sample_linear,
    sample_patch,
    select_oversampled_points,
    select_rendered_points,
    select_uncertain_points,
    standardize_patch,
    uncertainty,
    write_points,
)
from .renderers import AnatomicalHead, ImplicitPointRendHead, PointRendHead
from .resampling import resize, shrink

__all__ = ["EXPERTS", "PRESETS", "RENDERERS", "Morse", "MorseOutput"]

HEADS = {"pointrend": PointRendHead, "implicit_pointrend": ImplicitPointRendHead, "anatomical": AnatomicalHead}


class _Maps(NamedTuple):
    """The image (B, C, *S) and coarse logits (B, K, *S), the decoder features (B, C_i, *S_i), and of a mixture what its
    experts count (B, N); the gate's logits where the coarse ones needed them."""

    image: Tensor
    coarse: Tensor
    features: List[Tensor]
    counts: Tensor
    gate_logits: Optional[Tensor]


class MorseOutput(NamedTuple):
    """What the loss needs: the coarse logits everywhere and the rendered logits at the selected points."""

    coarse: Tensor
    """(B, K, *S); without experts and renderer, what the backbone returns, which with deep supervision is a list or a stack"""
    point_logits: Tensor
    """(B, K, P)"""
    point_index: Tensor
    """flat indices of the points in the grid they were drawn from, (B, P)"""

    def __getattr__(self, name: str) -> Any:  # of another loss or metric, which would take it for a tensor
        raise AttributeError(
            f"a MorseOutput has no {name!r}: a network called with return_points=True needs MorseLoss as its loss, around "
            "another one if need be, MorseLoss(loss=..); its coarse logits are .coarse"
        )


class Morse(nn.Module):
    """A segmentation network with a mixture of experts over its decoder features and re-rendered uncertain voxels.

    Two words choose the system: ``experts`` and ``renderer``. With both ``"none"`` it is the backbone, bit for bit. A plain
    call returns plain logits (B, K, *S) in training and in eval mode: the coarse logits with the logits of the ``num_eval``
    least certain voxels re-rendered.

    Args:
        backbone: network (B, C, *S) -> logits (B, K, *S), 2D or 3D: one of MONAI's whose decoder features are known, one made
            known by :func:`monai_morse.networks.register_backbone`, or a :class:`DecoderFeatures` around any other, which names
            them.
        experts: ``"none"``, ``"dense"`` (MoE) or ``"stochastic"`` (SMoE: expert dropout in training).
        renderer: ``"none"``, ``"pointrend"``, ``"implicit_pointrend"`` or ``"anatomical"`` (IAR).
        num_experts: N, the finest decoder features that become experts, or are read where there are none; default 3, or all of
            a :class:`DecoderFeatures`.
        dropout: expert dropout alpha of ``"stochastic"``; default 0.7.
        preset: where options not given come from. ``"light"`` (default) costs next to nothing: narrow experts, the gate at a
            quarter of the resolution, the backbone's own coarse logits, and what was found to help (docs/results.md).
            ``"paper"`` is the paper to the letter, many times the cost of most backbones. See ``PRESETS`` for the values.
        stride: the backbone sees the image averaged over blocks of this many voxels, a number or one for each axis, default 1,
            the image itself. Its logits are upsampled to the image's grid, on which points are chosen, read and rendered: for
            scans that are too large, or a machine too small, for their own resolution.
        mixture: options of the mixture: those of :class:`Mixture` (width, gate_stride, gate_norm, min_active, renormalize), and
            ``coarse``: the coarse logits are the ``"backbone"``'s own or a linear map of x_out, the ``"experts"``'. Without
            experts they are always the backbone's, without a renderer the experts'.
        head: options of the renderer: those of its head, e.g. :class:`AnatomicalHead` (width, num_frequencies, residual), and
            what it reads at a point: ``read_features``, with experts the decoder features beside x_out (without experts it
            always does); ``image_patch``, the image's own voxels around it, an odd number along each axis or one for all, 0 for
            none, default in ``"light"`` 3, or along an axis with a stride 5 in 3D and 7 in 2D; ``patch_norm``, those
            standardised, beside their mean and deviation (:func:`monai_morse.networks.points.standardize_patch`).
        points: options of :class:`PointSelection`: num_train, num_eval, oversample, importance_ratio, multilabel.

    Raises:
        InputError: for an unknown word or option, more experts than decoder features, or a backbone that cannot be traced.

    Attributes:
        options: all of these, resolved (:class:`monai_morse.networks.options.MorseOptions`); prints as a line an option.

    Source: You et al., Implicit Anatomical Rendering for Medical Image Segmentation with Stochastic Experts, MICCAI 2023.

    >>> from monai.networks.nets import BasicUNet
    >>> backbone = BasicUNet(spatial_dims=2, out_channels=3, features=(4, 4, 8, 16, 32, 4))
    >>> net = Morse(backbone, mixture={"width": 8, "gate_stride": 4}, head={"width": 8, "num_frequencies": 4})
    >>> net(torch.rand(1, 1, 32, 48)).shape
    torch.Size([1, 3, 32, 48])
    >>> net(torch.rand(1, 1, 32, 48), return_points=True).point_logits.shape
    torch.Size([1, 3, 1536])
    """

    @typed_arguments
    def __init__(
        self,
        backbone: nn.Module,
        experts: str = "stochastic",
        renderer: str = "anatomical",
        num_experts: int | None = None,
        dropout: float = 0.7,
        preset: str = "light",
        stride: int | Sequence[int] = 1,
        mixture: Mapping[str, Any] | None = None,
        head: Mapping[str, Any] | None = None,
        points: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        spatial_dims = _spatial_dims(backbone)
        number = _num_features(backbone) if num_experts is None else num_experts
        options = resolve_options(spatial_dims, experts, renderer, number, dropout, preset, stride, mixture, head, points)
        self.options = options
        self.points = options.points
        # as plain numbers, which torch.jit.script can read
        self.num_train, self.num_eval = self.points.num_train, self.points.num_eval
        self.oversample = float(self.points.oversample or 0)
        self.importance_ratio = float(self.points.importance_ratio)
        self.multilabel = self.points.multilabel
        self.stride: List[int] = options.stride
        self.image_patch: List[int] = options.head["image_patch"]
        self.reads_patch = min(self.image_patch) > 0
        self.patch_norm: bool = options.head["patch_norm"]
        self.read_features: bool = options.head["read_features"] or experts == "none"
        self.frozen = False

        used = experts != "none" or renderer != "none"
        self.decoder = _with_features(backbone, options.num_experts) if used else DecoderFeatures(_network(backbone), ())
        channels = [f.channels for f in self.decoder.info]
        read = sum(channels) if self.read_features else 0
        self.mixture: Mixture | None = None
        self.classifier: PointwiseMLP | None = None
        self.renderer: nn.Module | None = None
        if experts != "none":
            drop_prob = options.dropout if experts == "stochastic" else 0.0
            of_mixture = {k: v for k, v in options.mixture.items() if k != "coarse"}
            self.mixture = Mixture(channels, spatial_dims, drop_prob=drop_prob, **of_mixture)
            read += self.mixture.out_channels
            if options.mixture["coarse"] == "experts":
                self.classifier = PointwiseMLP(self.mixture.out_channels, [self.decoder.num_classes], last_activation=False)
        if renderer != "none":
            if self.reads_patch:
                read += self.decoder.in_channels * (math.prod(self.image_patch) + 2 * self.patch_norm)
            of_head = {k: options.head[k] for k in ("width", "num_frequencies", "residual")}
            self.renderer = HEADS[renderer](read, self.decoder.num_classes, spatial_dims, sum(channels), **of_head)
        self.reads_context = self.renderer is not None and bool(self.renderer.reads_context)

    @torch.jit.unused
    def freeze_backbone(self) -> "Morse":
        """Train the mixture and the renderer alone: the backbone gets no gradient and stays in eval mode, so that its
        normalisation statistics rest too. :func:`monai_morse.load_matching` does so with what it loaded of the backbone."""
        self.decoder.requires_grad_(False)
        self.frozen = True
        return self.train(self.training)

    @torch.jit.unused
    def train(self, mode: bool = True) -> "Morse":
        nn.Module.train(self, mode)  # not super(), which a scripted twin, that calls this too, is no instance of
        if self.frozen:
            self.decoder.eval()
        return self

    def forward(
        self,
        x: Tensor,
        return_points: bool = False,
        grid: Optional[List[int]] = None,
        window_affine: Optional[Tensor] = None,
    ) -> Union[Tensor, MorseOutput]:
        """Logits (B, K, *S); with ``return_points``, what the loss needs to train the renderer: :class:`MorseOutput`.

        Args:
            x: (B, C, *S).
            return_points: draw ``num_train`` points and render those; without a renderer, P = 0.
            grid: spatial size of another grid over the same window, e.g. a finer one, default *S. Logits are returned on it:
                the coarse ones upsampled linearly and the least certain voxels rendered at their own places (as many as fill
                the space that ``num_eval`` voxels of *S do). Training points are drawn from its voxels.
            window_affine: where the window lies in a larger volume, (B, len(S), len(S) + 1), an affine map of coordinates
                (:func:`monai_morse.networks.points.apply_affine`); the renderer then encodes the places there
                (:mod:`monai_morse.engines` knows how to find it).
        """
        if not torch.jit.is_scripting():
            if isinstance(x, MetaTensor):  # its bookkeeping belongs to the result, not to every operation on the way
                out = self.forward(x.as_tensor(), return_points, grid, window_affine)
                return MetaTensor(out).copy_meta_from(x) if isinstance(out, Tensor) and grid is None else out
        maps = self._maps(x)
        if return_points and self.renderer is None:
            none = torch.zeros([x.shape[0], 0], dtype=torch.long, device=x.device)
            return MorseOutput(maps.coarse, x.new_zeros([x.shape[0], self.decoder.num_classes, 0]), none)
        size = list(x.shape[2:]) if grid is None else grid
        coarse = maps.coarse if grid is None else resize(maps.coarse, size)
        if self.renderer is None:
            return coarse
        index = self._training_points(coarse, x) if return_points else self._uncertain_points(coarse, x)
        rendered = self._render_voxels(maps, index, coarse, window_affine)
        if return_points:
            return MorseOutput(maps.coarse, rendered, index)
        return write_points(coarse, index, rendered)

    @torch.jit.unused
    def render_at(self, x: Tensor, coordinates: Tensor, window_affine: Optional[Tensor] = None) -> Tensor:
        """Class logits at any places of the window, between voxels too.

        Args:
            x: (B, C, *S).
            coordinates: (B, P, len(S)) in [-1, 1], ordered like the tensor's axes; -1 and 1 are the window's outer faces.
            window_affine: as for ``forward``.

        Returns:
            (B, K, P). Without a renderer, the coarse logits interpolated linearly.
        """
        maps = self._maps(x)
        return self._render(maps, coordinates, sample_linear(maps.coarse, coordinates), window_affine)

    @torch.jit.unused
    def inspect(self, x: Tensor, grid: Optional[List[int]] = None, window_affine: Optional[Tensor] = None) -> Dict[str, Tensor]:
        """All that is to be seen of one call, as maps that an inferer can put together: arguments as ``forward``'s.

        Returns:
            ``logits`` (B, K, *S), what ``forward`` returns; ``coarse`` (B, K, *S), before any voxel was re-rendered;
            ``rendered`` (B, 1, *S), 1 where one was; ``uncertainty`` (B, 1, *S), by how much the second largest of the logits
            falls short of the largest, <= 0; with experts ``expert_weights`` (B, N, *S), W of equation 1, which sum to 1.

        >>> from monai.networks.nets import BasicUNet
        >>> net = Morse(BasicUNet(spatial_dims=2, out_channels=3, features=(4, 4, 8, 16, 32, 4)), points={"num_eval": 7}).eval()
        >>> seen = net.inspect(torch.rand(1, 1, 32, 48))
        >>> {name: tuple(found.shape[1:]) for name, found in seen.items()}  # doctest: +NORMALIZE_WHITESPACE
        {'logits': (3, 32, 48), 'coarse': (3, 32, 48), 'rendered': (1, 32, 48), 'uncertainty': (1, 32, 48),
         'expert_weights': (3, 32, 48)}
        >>> int(seen["rendered"].sum())
        7
        """
        x = x.as_tensor() if isinstance(x, MetaTensor) else x
        maps = self._maps(x)
        size = list(x.shape[2:]) if grid is None else grid
        logits = coarse = resize(maps.coarse, size)
        rendered = torch.zeros_like(coarse[:, :1])
        if self.renderer is not None:
            index = self._uncertain_points(coarse, x)
            at_points = self._render_voxels(maps, index, coarse, window_affine)
            logits = write_points(coarse, index, at_points)
            rendered = write_points(rendered, index, torch.ones_like(index[:, None], dtype=rendered.dtype))
        seen = {"logits": logits, "coarse": coarse, "rendered": rendered}
        seen["uncertainty"] = uncertainty(logits, self.multilabel).reshape(rendered.shape)
        if self.mixture is not None:
            gate_logits = maps.gate_logits
            if gate_logits is None:
                gate_logits = self.mixture.gate_logits(maps.features, maps.counts, self._seen_size(x))
            seen["expert_weights"] = resize(gate_logits, size).softmax(dim=1)
        return seen

    def _maps(self, x: Tensor) -> _Maps:
        size = self._seen_size(x)
        logits, features = self.decoder(shrink(x, size))
        counts, gate_logits = x[:0], torch.jit.annotate(Optional[Tensor], None)
        if self.mixture is not None:
            counts = self.mixture.dropout(x.shape[0])
            if self.classifier is not None:
                gate_logits = self.mixture.gate_logits(features, counts, size)
                logits = self._classify(features, counts, gate_logits, size)
        if max(self.stride) > 1 and logits.ndim == x.ndim:  # not a stack of deep supervision, which the loss knows
            logits = resize(logits, list(x.shape[2:]))
        return _Maps(x, logits, features, counts, gate_logits)

    def _seen_size(self, x: Tensor) -> List[int]:
        """The size of what the backbone sees."""
        return [-(-s // k) for s, k in zip(x.shape[2:], self.stride)]

    def _classify(self, features: List[Tensor], counts: Tensor, gate_logits: Tensor, size: List[int]) -> Tensor:
        """Coarse logits (B, K, *S), a linear map of x_out."""
        assert self.mixture is not None and self.classifier is not None
        if not torch.jit.is_scripting():
            return self.mixture.classify(self.classifier, features, counts, gate_logits, size)
        return self.classifier(self.mixture.everywhere(features, counts, gate_logits, size))

    def _uncertain_points(self, coarse: Tensor, x: Tensor) -> Tensor:
        score = uncertainty(coarse, self.multilabel)
        return select_uncertain_points(score, self._num_rendered(score, x))

    def _training_points(self, coarse: Tensor, x: Tensor) -> Tensor:
        score = uncertainty(coarse.detach(), self.multilabel)
        if self.oversample > 0:
            return select_oversampled_points(score, self.num_train, self.oversample, self.importance_ratio)
        return select_rendered_points(score, self.num_train, self._num_rendered(score, x), self.importance_ratio)

    def _num_rendered(self, score: Tensor, x: Tensor) -> int:
        """How many voxels of the score's grid fill the space of ``num_eval`` voxels of the image."""
        return -(-self.num_eval * score.shape[1] // x[0, 0].numel())

    def _render_voxels(self, maps: _Maps, index: Tensor, coarse: Tensor, window_affine: Optional[Tensor]) -> Tensor:
        """Logits (B, K, P) at voxels (B, P) of the grid of the coarse logits."""
        patch = torch.jit.annotate(Optional[Tensor], None)
        if self.reads_patch and coarse.shape[2:] == maps.image.shape[2:]:
            patch = gather_patch(maps.image, index, self.image_patch)
        coordinates = point_coordinates(index, list(coarse.shape[2:]))
        return self._render(maps, coordinates, gather_points(coarse, index), window_affine, patch)

    def _render(
        self,
        maps: _Maps,
        coordinates: Tensor,
        logits: Tensor,
        window_affine: Optional[Tensor],
        patch: Optional[Tensor] = None,
    ) -> Tensor:
        """Logits (B, K, P) at coordinates (B, P, len(S)), where the coarse ones are ``logits`` (B, K, P) and ``patch`` lies."""
        if self.renderer is None or coordinates.shape[1] == 0:
            return logits
        read: List[Tensor] = []
        if self.mixture is None:
            grid = coordinates.flip(2)
            read = [sample_grid(feature, grid) for feature in maps.features]
        else:
            size = self._seen_size(maps.image)
            x_out, features = self.mixture.at_points(maps.features, maps.counts, coordinates, size, maps.gate_logits)
            read = [x_out] + features if self.read_features else [x_out]
        if self.reads_patch:
            if patch is None:
                patch = sample_patch(maps.image, coordinates, self.image_patch)
            if self.patch_norm:
                patch = standardize_patch(patch, maps.image.shape[1])
            read.append(patch.to(read[0].dtype))
        context = logits[:, :0, 0]
        if self.reads_context:
            context = torch.cat([feature.flatten(2).mean(2) for feature in maps.features], dim=1)
        if window_affine is not None:
            coordinates = apply_affine(coordinates, window_affine)
        return self.renderer(torch.cat(read, dim=1), coordinates, logits, context)


def _spatial_dims(backbone: nn.Module) -> int:
    conv = next((m for m in backbone.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), None)
    return 3 if conv is None else conv.weight.ndim - 2


def _num_features(backbone: nn.Module) -> int:
    return len(backbone.info) if isinstance(backbone, DecoderFeatures) else 3


def _network(backbone: nn.Module) -> nn.Module:
    return backbone.backbone if isinstance(backbone, DecoderFeatures) else backbone


def _with_features(backbone: nn.Module, number: int) -> DecoderFeatures:
    """The backbone with its ``number`` finest decoder features beside its logits."""
    network = _network(backbone)
    names = backbone.names if isinstance(backbone, DecoderFeatures) else decoder_names(backbone)
    if isinstance(backbone, DecoderFeatures) and callable(names):
        if number != len(backbone.info):
            raise InputError(f"num_experts must be {len(backbone.info)}, as many as the function returns, got {number}")
        return backbone
    assert not callable(names)
    if not 1 <= number <= len(names):
        kind = type(network).__name__
        raise InputError(f"num_experts must be 1 to {len(names)}, the decoder features of {kind}, got {number}")
    return DecoderFeatures(network, names[-number:])
