"""Morse: backbone + mixture + renderer, the only place that knows all three."""

from collections.abc import Mapping, Sequence
from typing import Any, Dict, List, NamedTuple, Optional, Union

import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from monai_morse.config import check_choice, parse_bool
from monai_morse.errors import InputError

from . import points as P
from . import streaming
from .backbones import decoder_names
from .decoders import DecoderFeatures, DecoderFunction
from .experts import Mixture, PointwiseMLP
from .renderers import AnatomicalHead, ImplicitPointRendHead, PointRendHead
from .resampling import resize, shrink

__all__ = ["Morse", "MorseOutput"]

EXPERTS = ("none", "dense", "stochastic")
RENDERERS = {
    "none": None,
    "pointrend": PointRendHead,
    "implicit_pointrend": ImplicitPointRendHead,
    "anatomical": AnatomicalHead,
}
COARSE = ("experts", "backbone")
PRESETS: Dict[str, Dict[str, Any]] = {
    "light": {
        "coarse": "backbone",
        "mixture": {"width": 32, "gate_stride": 4, "gate_norm": True},
        "head": {"width": 64, "num_frequencies": 32},
        "points": {},
        "read_features": True,
        "image_patch": None,  # by the stride
        "patch_norm": True,
    },
    "paper": {
        "coarse": "experts",
        "mixture": {"width": 256, "gate_stride": 1, "min_active": 0},
        "head": {"width": 256, "num_frequencies": 128, "residual": False},
        "points": {"oversample": 3},
        "read_features": False,
        "image_patch": 0,
        "patch_norm": False,
    },
}


class _Maps(NamedTuple):
    """The image (B, C, *S) and coarse logits (B, K, *S), the decoder features, and of a mixture which experts are active
    and gate logits, else nothing."""

    image: Tensor
    coarse: Tensor
    features: List[Tensor]
    mixing: List[Tensor]


class MorseOutput(NamedTuple):
    """What the loss needs: the coarse logits everywhere and the rendered logits at the selected points."""

    coarse: Tensor
    """(B, K, *S); without experts and renderer, what the backbone returns, which with deep supervision is a list or a stack"""
    point_logits: Tensor
    """(B, K, P)"""
    point_index: Tensor
    """flat indices of the points in the grid they were drawn from, (B, P)"""


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
        renderer: ``"none"``, ``"pointrend"``, ``"implicit_pointrend"`` or ``"anatomical"`` (IAR).
        num_experts: N, the finest decoder features that become experts; default 3.
        dropout: expert dropout alpha of ``"stochastic"``; default 0.7.
        preset: where options not given come from. ``"light"`` (default) costs next to nothing: narrow experts, the gate at a
            quarter of the resolution, ``coarse="backbone"``, and what was found to help (docs/results.md). ``"paper"`` is the
            paper to the letter, many times the cost of most backbones. See ``PRESETS`` for the values.
        coarse: where the coarse logits come from: ``"experts"``, a linear map of x_out, or ``"backbone"``, its own logits.
            Without experts they are always the backbone's, without a renderer the experts'.
        mixture: options of :class:`Mixture`: width, gate_stride, gate_norm, min_active.
        head: options of the renderer's head, e.g. of :class:`AnatomicalHead`: width, num_frequencies, residual.
        points: options of :class:`PointSelection`: num_train, num_eval, oversample, importance_ratio, multilabel.
        decoder: names of the submodules that make the decoder features, coarse to fine; default: found for MONAI's backbones.
            For a backbone that cannot be traced, a function ``(backbone, x) -> (logits, [features])``, which decides N.
        stride: the backbone sees the image averaged over blocks of this many voxels along each axis, default 1, the image
            itself. Its logits are upsampled to the image's grid, on which points are chosen, read and rendered: for scans that
            are too large, or a machine too small, for their own resolution.
        read_features: with experts, the renderer reads the decoder features at the point beside x_out; default: ``"light"``
            does, ``"paper"`` reads x_out alone. Without experts the features are what it reads in any case.
        image_patch: the renderer also reads the image's own voxels around each point, a cube of this odd side; 0: none. Default
            in ``"light"`` 3, or with a ``stride`` 5 in 3D and 7 in 2D, in ``"paper"`` 0.
        patch_norm: the renderer reads that cube standardised, beside its mean and standard deviation, see
            :func:`monai_morse.networks.points.standardize_patch`; default: ``"light"`` does.
        freeze_backbone: train the mixture and the renderer alone: the backbone's weights have no gradient and it stays in eval
            mode, so that its normalisation statistics rest too; default False. With ``coarse="backbone"`` the rendering loss
            is then the only one that trains anything: give it a weight from the start (``schedule: scratch``).
            :func:`monai_morse.load_matching` thaws what a checkpoint does not fill.

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
        preset: str = "light",
        coarse: str | None = None,
        mixture: Mapping[str, Any] | None = None,
        head: Mapping[str, Any] | None = None,
        points: Mapping[str, Any] | None = None,
        decoder: Sequence[str] | DecoderFunction | None = None,
        read_features: bool | str | None = None,
        stride: int = 1,
        image_patch: int | None = None,
        patch_norm: bool | str | None = None,
        freeze_backbone: bool | str = False,
    ) -> None:
        super().__init__()
        check_choice("experts", experts, EXPERTS)
        check_choice("renderer", renderer, RENDERERS)
        check_choice("preset", preset, PRESETS)
        if coarse is None:
            coarse = "experts" if renderer == "none" else PRESETS[preset]["coarse"]
        check_choice("coarse", coarse, COARSE)
        mixture, head = {**PRESETS[preset]["mixture"], **(mixture or {})}, {**PRESETS[preset]["head"], **(head or {})}
        points = {**PRESETS[preset]["points"], **(points or {})}
        read_features = (
            PRESETS[preset]["read_features"] if read_features is None else parse_bool(read_features, "read_features")
        )
        if experts != "none" and renderer == "none" and coarse == "backbone":
            raise InputError("experts without a renderer need coarse='experts': nothing else would use them")
        self.points = _build("points", P.PointSelection, **points)
        # as plain numbers, which torch.jit.script can read
        self.num_train, self.num_eval = self.points.num_train, self.points.num_eval
        self.oversample = float(self.points.oversample or 0)
        self.importance_ratio = float(self.points.importance_ratio)
        self.multilabel = self.points.multilabel

        names: Sequence[str] | DecoderFunction = ()
        if experts != "none" or renderer != "none":
            names = decoder_names(backbone) if decoder is None else decoder
            if not callable(names):
                if not 1 <= num_experts <= len(names):
                    kind = type(backbone).__name__
                    raise InputError(
                        f"num_experts must be 1 to {len(names)}, the decoder features of {kind}, got {num_experts}"
                    )
                names = names[-num_experts:]
        self.decoder = DecoderFeatures(backbone, names)
        if stride < 1:
            raise InputError(f"stride must be a whole number from 1 on, got {stride}")
        channels = [f.channels for f in self.decoder.info]
        num_classes = self.decoder.num_classes
        spatial_dims = len(self.decoder.info[0].reduction) if channels else 0
        image_patch = PRESETS[preset]["image_patch"] if image_patch is None else image_patch
        if image_patch is None:
            # the coarser the backbone sees the image, the more there is to read, see docs/results.md
            image_patch = 3 if stride == 1 else 7 if spatial_dims == 2 else 5
        if image_patch < 0 or (image_patch > 0 and image_patch % 2 == 0):
            raise InputError(f"image_patch must be 0 or an odd number of voxels, got {image_patch}")
        self.stride, self.image_patch = stride, image_patch
        self.patch_norm = PRESETS[preset]["patch_norm"] if patch_norm is None else parse_bool(patch_norm, "patch_norm")

        self.mixture: Mixture | None = None
        self.classifier: PointwiseMLP | None = None
        self.renderer: nn.Module | None = None
        self.read_features = read_features or experts == "none"
        read = sum(channels) if self.read_features else 0
        if experts != "none":
            drop_prob = dropout if experts == "stochastic" else 0.0
            self.mixture = _build("mixture", Mixture, channels, spatial_dims, drop_prob=drop_prob, **mixture)
            read += self.mixture.out_channels
            if coarse == "experts":
                self.classifier = PointwiseMLP(self.mixture.out_channels, [num_classes], last_activation=False)
        if renderer != "none":
            context = sum(f.channels for f in self.decoder.info)
            patch = image_patch**spatial_dims + 2 * self.patch_norm if image_patch > 0 else 0
            sizes = read + self.decoder.in_channels * patch, num_classes, spatial_dims, context
            self.renderer = _build("head", RENDERERS[renderer], *sizes, **head)
        self.reads_context = self.renderer is not None and bool(self.renderer.reads_context)
        self.freeze_backbone = parse_bool(freeze_backbone, "freeze_backbone")
        if self.freeze_backbone:
            backbone.requires_grad_(False)
            self.train()

    @torch.jit.unused
    def train(self, mode: bool = True) -> "Morse":
        super().train(mode)
        if self.freeze_backbone:
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
            window_affine: where the window lies, (B, len(S), len(S) + 1), see :func:`monai_morse.networks.points.place`; the
                renderer then encodes the places in that larger volume (:mod:`monai_morse.engines` knows how to find it).
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
        if return_points:
            score = P.uncertainty(coarse.detach(), self.multilabel)
            pool = self._num_rendered(score, x)
            index = P.select_training_points(score, self.num_train, self.oversample, self.importance_ratio, pool)
        else:
            index = self._uncertain_index(coarse, x)
        rendered = self._render(maps, P.point_coordinates(index, size), P.gather_points(coarse, index), window_affine)
        if return_points:
            return MorseOutput(maps.coarse, rendered, index)
        return P.write_points(coarse, index, rendered)

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
        return self._render(maps, coordinates, P.sample_linear(maps.coarse, coordinates), window_affine)

    @torch.jit.unused
    def uncertainty(self, x: Tensor) -> Tensor:
        """By how much the second largest of a voxel's logits falls short of the largest: (B, C, *S) -> (B, 1, *S), <= 0."""
        logits = self.forward(x)
        assert isinstance(logits, Tensor)
        return P.uncertainty(logits, self.multilabel).reshape(logits[:, :1].shape)

    @torch.jit.unused
    def coarse(self, x: Tensor, grid: Optional[List[int]] = None, window_affine: Optional[Tensor] = None) -> Tensor:
        """The logits before any is re-rendered, to look at: (B, C, *S) -> (B, K, *S), on another ``grid`` as ``forward``'s.

        ``window_affine`` changes nothing; it is taken so that inferers can call this in the network's place.
        """
        coarse = self._maps(x.as_tensor() if isinstance(x, MetaTensor) else x).coarse
        return coarse if grid is None else resize(coarse, grid)

    @torch.jit.unused
    def rendered_voxels(self, x: Tensor, grid: Optional[List[int]] = None, window_affine: Optional[Tensor] = None) -> Tensor:
        """Which voxels ``forward(x)`` re-renders, to look at: (B, C, *S) -> (B, 1, *S), 1 where it does, 0 elsewhere.

        ``grid`` and ``window_affine`` as for :meth:`coarse`.
        """
        coarse = self.coarse(x, grid)
        mask = torch.zeros_like(coarse[:, :1])
        if self.renderer is None:
            return mask
        index = self._uncertain_index(coarse, x)
        return P.write_points(mask, index, torch.ones_like(index[:, None], dtype=mask.dtype))

    @torch.jit.unused
    def expert_weights(self, x: Tensor, grid: Optional[List[int]] = None, window_affine: Optional[Tensor] = None) -> Tensor:
        """The gate's weights of equation 1, to look at: (B, C, *S) -> (B, N, *S), which sum to 1 at every voxel.

        ``grid`` and ``window_affine`` as for :meth:`coarse`.

        Raises:
            InputError: without experts.
        """
        if self.mixture is None:
            raise InputError("experts='none' has no gate to look at")
        maps = self._maps(x.as_tensor() if isinstance(x, MetaTensor) else x)
        return resize(maps.mixing[1], list(x.shape[2:]) if grid is None else grid).softmax(dim=1)

    def _maps(self, x: Tensor) -> _Maps:
        size = [-(-s // self.stride) for s in x.shape[2:]]
        logits, features = self.decoder(shrink(x, size))
        mixing: List[Tensor] = []
        if self.mixture is not None:
            keep = self.mixture.dropout(x.shape[0])
            gate_logits = self.mixture.gate_logits(features, keep, size)
            mixing = [keep, gate_logits]
            if self.classifier is not None:
                logits = self._classify(features, keep, gate_logits, size)
        if self.stride > 1 and logits.ndim == x.ndim:  # not a stack of deep supervision, which the loss knows
            logits = resize(logits, list(x.shape[2:]))
        return _Maps(x, logits, features, mixing)

    def _classify(self, features: List[Tensor], keep: Tensor, gate_logits: Tensor, size: List[int]) -> Tensor:
        """Coarse logits (B, K, *S), a linear map of x_out."""
        assert self.mixture is not None and self.classifier is not None
        if not torch.jit.is_scripting():
            if streaming.possible(features, size):
                return streaming.classify(self.mixture, self.classifier, features, keep, gate_logits, size)
        return self.classifier(self.mixture.everywhere(features, keep, gate_logits, size))

    def _uncertain_index(self, coarse: Tensor, x: Tensor) -> Tensor:
        score = P.uncertainty(coarse, self.multilabel)
        return P.select_uncertain_points(score, self._num_rendered(score, x))

    def _num_rendered(self, score: Tensor, x: Tensor) -> int:
        """How many voxels of the score's grid fill the space of ``num_eval`` voxels of the image."""
        return -(-self.num_eval * score.shape[1] // x[0, 0].numel())

    def _render(self, maps: _Maps, coordinates: Tensor, logits: Tensor, window_affine: Optional[Tensor]) -> Tensor:
        """Logits (B, K, P) at coordinates (B, P, len(S)), where the coarse ones are ``logits`` (B, K, P)."""
        if self.renderer is None or coordinates.shape[1] == 0:
            return logits
        read: List[Tensor] = []
        if self.mixture is not None:
            read.append(self.mixture.at_points(maps.features, maps.mixing[0], maps.mixing[1], coordinates))
        if self.read_features:
            read += [P.sample_linear(feature, coordinates) for feature in maps.features]
        if self.image_patch > 0:
            patch = P.sample_patch(maps.image, coordinates, self.image_patch)
            if self.patch_norm:
                patch = P.standardize_patch(patch, maps.image.shape[1])
            read.append(patch.to(read[0].dtype))
        context = logits[:, :0, 0]
        if self.reads_context:
            context = torch.cat([feature.flatten(2).mean(2) for feature in maps.features], dim=1)
        if window_affine is not None:
            coordinates = P.place(coordinates, window_affine)
        return self.renderer(torch.cat(read, dim=1), coordinates, logits, context)
