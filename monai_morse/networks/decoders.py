"""Decoder features D_1..D_N of a backbone, coarse to fine, beside its logits.

The backbone stays as it is. Its ``forward`` is traced once with ``torch.fx``, stepping only into the modules that contain a
decoder feature; everything else stays a module call. The traced function returns the features as plain outputs, so there are
no hooks and no hidden state: it scripts, traces, exports, copies and pickles, and is safe for threads sharing one network.
"""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, List, Tuple

import torch
from monai.networks.nets import BasicUNet, DynUNet, UNet
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from monai_morse.errors import InputError

__all__ = ["DecoderFeatures", "FeatureInfo", "check_window", "decoder_names"]


@dataclass(frozen=True)
class FeatureInfo:
    """One decoder feature: the submodule that makes it, its channels, and how many times smaller than the input it is."""

    name: str
    channels: int
    reduction: Tuple[float, ...]


def _unet_names(backbone: UNet) -> List[str]:
    names: List[str] = []
    path: str = "model"
    block: Any = backbone.model
    while isinstance(block, nn.Sequential) and len(block) == 3 and hasattr(block[1], "submodule"):
        names.append(f"{path}.2")
        path, block = f"{path}.1.submodule", block[1].submodule
    return [path, *reversed(names)]


def decoder_names(backbone: nn.Module) -> List[str]:
    """Names of a MONAI backbone's decoder features, coarse to fine, the bottleneck first.

    Args:
        backbone: ``UNet``, ``BasicUNet`` or ``DynUNet``, 2D or 3D.

    Raises:
        InputError: for any other class, whose features the caller must name.

    >>> decoder_names(BasicUNet(features=(4, 4, 4, 4, 4, 4)))
    ['down_4', 'upcat_4', 'upcat_3', 'upcat_2', 'upcat_1']
    """
    if isinstance(backbone, UNet):
        return _unet_names(backbone)
    if isinstance(backbone, BasicUNet):
        return ["down_4", "upcat_4", "upcat_3", "upcat_2", "upcat_1"]
    if isinstance(backbone, DynUNet):
        return ["bottleneck", *(f"upsamples.{i}" for i in range(len(backbone.upsamples)))]
    raise InputError(
        f"the decoder features of {type(backbone).__name__} are not known: give decoder=[names of the submodules whose "
        "outputs they are, coarse to fine]; network.named_modules() lists the names"
    )


def _fake_run(network: nn.Module, shape: Sequence[int]) -> Any:
    """What ``network`` returns for an input of this shape, as fake tensors: shapes without memory or arithmetic."""
    device = next(network.parameters()).device
    log = logging.getLogger("torch._subclasses.fake_tensor")  # it prints a traceback of what does not fit
    was_disabled, log.disabled = log.disabled, True
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            return network(torch.empty(list(shape), device=device))
    finally:
        log.disabled = was_disabled


def check_window(network: nn.Module, size: Sequence[int], in_channels: int = 1) -> None:
    """See that a network takes windows of a size, before work starts.

    Args:
        network: (B, C, *S) -> logits.
        size: *S, e.g. a bundle's ``patch_size``.
        in_channels: C, default 1.

    Raises:
        InputError: when it does not, naming a size close by that it takes, if there is one.

    >>> check_window(BasicUNet(features=(4, 4, 4, 4, 4, 4)), [32, 48, 16])
    """
    if not isinstance(size, Sequence) or not all(isinstance(s, int) and s > 0 for s in size):
        raise InputError(f"patch_size must be a list of positive numbers of voxels, e.g. [32, 32, 32], got {size!r}")
    error: Exception | None = None
    twin = copy.deepcopy(network).eval()  # the run leaves no trace in the network itself
    for multiple in (1, 2, 4, 8, 16, 32, 64):
        fitting = [-(-s // multiple) * multiple for s in size]
        try:
            logits = _fake_run(twin, [1, in_channels, *fitting])
        except Exception as e:
            error = e
            continue
        if list(logits.shape[2:]) != fitting:
            continue
        if fitting != list(size):
            raise InputError(f"the network does not take windows of {list(size)} voxels; give --patch_size '{fitting}'")
        return
    raise InputError(f"the network does not take {in_channels} channel(s) of {list(size)} voxels: {error}") from error


class _Tracer(fx.Tracer):
    """Steps into the modules above a feature, and into nothing else."""

    def __init__(self, entered: set[nn.Module]) -> None:
        super().__init__()
        self.entered = entered

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.entered


class DecoderFeatures(nn.Module):
    """A backbone that returns its decoder features beside its logits.

    Args:
        backbone: any segmentation network, (B, C, *S) -> (B, K, *S).
        names: submodules whose outputs are the decoder features, coarse to fine; default: :func:`decoder_names`. An empty
            sequence asks for none, and ``forward`` is the backbone's own.

    Raises:
        InputError: when a name does not exist or is not used by ``forward``, or ``forward`` cannot be traced.

    Attributes:
        info: a :class:`FeatureInfo` for each feature.
        num_classes: K, found with the features (0 where none are asked for).

    >>> features = DecoderFeatures(BasicUNet(2, 1, 3, features=(4, 4, 8, 16, 32, 4)), ["upcat_2", "upcat_1"])
    >>> [(f.channels, f.reduction) for f in features.info]
    [(4, (2.0, 2.0)), (4, (1.0, 1.0))]
    >>> logits, maps = features(torch.rand(1, 1, 32, 48))
    >>> logits.shape, [tuple(m.shape) for m in maps]
    (torch.Size([1, 3, 32, 48]), [(1, 4, 16, 24), (1, 4, 32, 48)])
    """

    def __init__(self, backbone: nn.Module, names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.names = tuple(decoder_names(backbone) if names is None else names)
        self.info: Tuple[FeatureInfo, ...] = ()
        self.num_classes = 0
        if self.names:
            # a class of its own, so that ``forward`` is ordinary source code to torch.jit, torch.export and torch.compile
            modes = {m: m.training for m in backbone.modules()}
            backbone.eval()  # plain logits, whatever the backbone returns in training
            try:
                forward = self._traced_forward()
                self.__class__ = type(type(self).__name__, (type(self),), {"forward": forward, "__module__": __name__})
                self.info, self.num_classes = self._dry_run()
            finally:
                for module, mode in modes.items():
                    module.training = mode

    def forward(self, x: Tensor) -> Tuple[Tensor, List[Tensor]]:
        """(B, C, *S) -> logits (B, K, *S) and the features, coarse to fine, each (B, C_i, *S_i)."""
        features: List[Tensor] = []
        return self.backbone(x), features

    def __reduce__(self) -> Any:
        return DecoderFeatures, (self.backbone, self.names), {"training": self.training}

    def __setstate__(self, state: dict) -> None:
        self.training = state["training"]

    def extra_repr(self) -> str:
        return "\n".join(f"({f.name}): channels={f.channels}, reduction={f.reduction}" for f in self.info)

    def _traced_forward(self) -> Any:
        modules = dict(self.named_modules(remove_duplicate=False))
        taps: List[nn.Module] = []
        for name in self.names:
            if f"backbone.{name}" not in modules:
                known = [n.removeprefix("backbone.") for n in modules if n.startswith("backbone.")]
                near = difflib.get_close_matches(name, known, 5, 0.3) or known[:5]
                raise InputError(f"{type(self.backbone).__name__} has no submodule '{name}'; near names: {', '.join(near)}")
            taps.append(modules[f"backbone.{name}"])
        entered = {m for m in modules.values() if any(t is not m and t in set(m.modules()) for t in taps)}

        try:
            graph = _Tracer(entered).trace(self)
        except Exception as error:
            raise InputError(
                f"the forward of {type(self.backbone).__name__} cannot be traced ({error}); name submodules that are called "
                "directly by its forward"
            ) from error

        made_by = {modules[n.target]: n for n in graph.nodes if n.op == "call_module"}
        unused = [name for name, tap in zip(self.names, taps) if tap not in made_by]
        if unused:
            raise InputError(f"submodules {unused} are not called by the forward of {type(self.backbone).__name__}")
        output = next(n for n in graph.nodes if n.op == "output")
        output.args = ((output.args[0][0], [made_by[tap] for tap in taps]),)
        for node in graph.nodes:
            node.type = None  # annotations that the generated source could not name
        graph.lint()
        return type(fx.GraphModule(self, graph)).forward

    def _dry_run(self) -> Tuple[Tuple[FeatureInfo, ...], int]:
        """Channels, reductions and classes, from a run on fake tensors: no memory, no arithmetic."""
        conv = next((m for m in self.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), None)
        if conv is None:
            raise InputError(f"{type(self.backbone).__name__} has no 2D or 3D convolution: cannot tell its input's shape")
        error: Exception | None = None
        for length in (32, 64, 96, 128, 224):
            try:
                logits, features = _fake_run(self, [1, conv.in_channels, *[length] * (conv.weight.ndim - 2)])
            except Exception as e:  # the backbone wants a larger window
                error = e
                continue
            info = [FeatureInfo(n, f.shape[1], tuple(length / s for s in f.shape[2:])) for n, f in zip(self.names, features)]
            return tuple(info), logits.shape[1]
        raise InputError(f"{type(self.backbone).__name__} fails on a test input: {error}") from error
