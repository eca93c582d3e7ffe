"""Decoder features D_1..D_N of a backbone, coarse to fine, beside its logits.

The backbone stays as it is. Its ``forward`` is traced once with ``torch.fx``, stepping only into the modules that contain a
decoder feature; everything else stays a module call. The traced function returns the features as plain outputs, so there are
no hooks and no hidden state: it scripts, traces, exports, copies and pickles, and is safe for threads sharing one network.
Tracing and dry runs work on a copy, so that a backbone that keeps tensors of its last forward (DynUNet) keeps none of theirs.
"""

from __future__ import annotations

import copy
import difflib
import logging
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Dict, List, Tuple

import torch
from monai.networks.nets import UNETR
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from monai_morse.errors import InputError

from .backbones import decoder_names

DecoderFunction = Callable[[nn.Module, Tensor], Tuple[Tensor, List[Tensor]]]

__all__ = ["DecoderFeatures", "DecoderFunction", "FeatureInfo"]


@dataclass(frozen=True)
class FeatureInfo:
    """One decoder feature: the submodule that makes it, its channels, and how many times smaller than the input it is."""

    name: str
    channels: int
    reduction: Tuple[float, ...]


# methods of MONAI networks that look at the input's size and return nothing the forward needs; not while it is traced
_SIZE_CHECKS = ("_check_input_size", "is_valid_shape")


def _known_names(backbone: nn.Module) -> List[str]:
    try:
        return decoder_names(backbone)
    except InputError:
        return []


def copy_for_tracing(network: nn.Module) -> nn.Module:
    """A deep copy in eval mode, which may be traced and run without a trace in the network itself."""
    # DynUNet keeps feature maps of its last forward, which deepcopy refuses to copy
    kept = [t for m in network.modules() for t in getattr(m, "heads", None) or [] if isinstance(t, Tensor)]
    return copy.deepcopy(network, {id(t): t.detach() for t in kept}).eval()


def fake_run(network: nn.Module, shape: Sequence[int]) -> Any:
    """What ``network`` returns for an input of this shape, as fake tensors: shapes without memory or arithmetic."""
    like = next(network.parameters())
    log = logging.getLogger("torch._subclasses.fake_tensor")  # it prints a traceback of what does not fit
    was_disabled, log.disabled = log.disabled, True
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            return network(torch.empty(list(shape), device=like.device, dtype=like.dtype))
    finally:
        log.disabled = was_disabled


def fixed_sizes(network: nn.Module) -> List[List[int]]:
    """The one window size of a network with a position embedding for each place (UNETR)."""
    return [[f * p for f, p in zip(m.feat_size, m.patch_size)] for m in network.modules() if isinstance(m, UNETR)]


class _Tracer(fx.Tracer):
    """Steps into the modules above a feature, and into nothing else; knows what each module it met returned."""

    def __init__(self, entered: set[nn.Module]) -> None:
        super().__init__()
        self.entered = entered
        self.returned: Dict[nn.Module, Any] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.entered

    def call_module(self, m: nn.Module, forward: Callable, args: Any, kwargs: Any) -> Any:
        self.returned[m] = super().call_module(m, forward, args, kwargs)
        return self.returned[m]


class _Root(nn.Module):
    """What is traced: nothing but the backbone, under the name that it has in :class:`DecoderFeatures`."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Any:
        return self.backbone(x)


class DecoderFeatures(nn.Module):
    """A backbone that returns its decoder features beside its logits.

    Args:
        backbone: any segmentation network, (B, C, *S) -> (B, K, *S).
        names: submodules whose outputs are the decoder features, coarse to fine; default: :func:`decoder_names`. An empty
            sequence asks for none, and ``forward`` is the backbone's own. For a backbone that cannot be traced, a function
            ``(backbone, x) -> (logits, [features])``.

    Raises:
        InputError: when a name does not exist or is not used by ``forward``, or ``forward`` cannot be traced.

    Attributes:
        info: a :class:`FeatureInfo` for each feature.
        in_channels, num_classes: C and K, found with the features (0 where none are asked for).

    With features asked for, the logits are those of eval mode in training too: heads of deep supervision are not run.

    >>> from monai.networks.nets import BasicUNet
    >>> features = DecoderFeatures(BasicUNet(2, 1, 3, features=(4, 4, 8, 16, 32, 4)), ["upcat_2", "upcat_1"])
    >>> [(f.channels, f.reduction) for f in features.info]
    [(4, (2.0, 2.0)), (4, (1.0, 1.0))]
    >>> logits, maps = features(torch.rand(1, 1, 32, 48))
    >>> logits.shape, [tuple(m.shape) for m in maps]
    (torch.Size([1, 3, 32, 48]), [(1, 4, 16, 24), (1, 4, 32, 48)])
    """

    def __init__(self, backbone: nn.Module, names: Sequence[str] | DecoderFunction | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.names = decoder_names(backbone) if names is None else names
        self.info: Tuple[FeatureInfo, ...] = ()
        self.in_channels = self.num_classes = 0
        if not callable(self.names) and not self.names:
            return
        twin = _Root(copy_for_tracing(backbone))
        forward = _called_forward(self.names) if callable(self.names) else _traced_forward(twin, self.names)
        # a class of its own, so that ``forward`` is ordinary source code to torch.jit, torch.export and torch.compile
        self.__class__ = type(type(self).__name__, (type(self),), {"forward": forward, "__module__": __name__})
        twin.__class__ = type("_Root", (_Root,), {"forward": forward})
        sizes, self.in_channels, self.num_classes = _dry_run(twin)
        labels = [f"feature {i}" for i in range(len(sizes))] if callable(self.names) else self.names
        self.info = tuple(FeatureInfo(label, *size) for label, size in zip(labels, sizes))

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


def _called_forward(function: DecoderFunction) -> Any:
    def forward(self: nn.Module, x: Tensor) -> Tuple[Tensor, List[Tensor]]:
        return function(self.get_submodule("backbone"), x)

    return forward


def _reversed(features: List[Tensor]) -> List[Tensor]:
    return features[::-1]


def _traced_forward(root: _Root, names: Sequence[str]) -> Any:
    kind = type(root.backbone).__name__
    modules = dict(root.backbone.named_modules(remove_duplicate=False))
    taps: List[nn.Module] = []
    for name in names:
        if name not in modules or not name:
            near = difflib.get_close_matches(name, modules, 5, 0.3) or list(modules)[1:6]
            raise InputError(f"{kind} has no submodule '{name}'; near names: {', '.join(near)}")
        taps.append(modules[name])
    # above all known features, not only those asked for: MONAI's SegResNetDS cannot be traced around its encoder
    below = set(taps) | {modules[name] for name in _known_names(root.backbone)}
    entered = {m for m in root.modules() if any(t is not m and t in below for t in m.modules())}

    for check in _SIZE_CHECKS:
        if hasattr(root.backbone, check):
            setattr(root.backbone, check, lambda *args: True)
    tracer = _Tracer(entered)
    try:
        graph = tracer.trace(root)
    except Exception as error:
        raise InputError(
            f"the forward of {kind} cannot be traced ({error}); name submodules that are called directly by its forward, or "
            "use DecoderFeatures(network, a function (backbone, x) -> (logits, [features]))"
        ) from error

    if any(str(n.target).startswith("_tensor_constant") for n in graph.nodes):
        raise InputError(
            f"the forward of {kind} makes tensors of its own, which tracing would freeze; move that into a submodule, or use "
            "DecoderFeatures(network, a function (backbone, x) -> (logits, [features]))"
        )
    unused = [name for name, tap in zip(names, taps) if tap not in tracer.returned]
    if unused:
        raise InputError(f"submodules {unused} are not called by the forward of {kind}")
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = ((output.args[0], [tracer.returned[tap].node for tap in taps]),)
    for node in graph.nodes:
        node.type = None  # annotations that the generated source could not name
        if node.target is operator.getitem and node.args[1] == slice(None, None, -1):  # torch.jit misreads this slice
            node.target, node.args = _reversed, node.args[:1]
    module = fx.GraphModule(root, graph)
    module.graph.eliminate_dead_code()  # heads of deep supervision
    module.recompile()
    return type(module).forward


def _dry_run(root: _Root) -> Tuple[List[Tuple[int, Tuple[float, ...]]], int, int]:
    """Channels and reduction of each feature, C and K, from a run on fake tensors: no memory, no arithmetic."""
    kind = type(root.backbone).__name__
    conv = next((m for m in root.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), None)
    if conv is None:
        raise InputError(f"{kind} has no 2D or 3D convolution: cannot tell its input's shape")
    own = getattr(root.backbone, "in_channels", None)  # a network may change its input before its first convolution
    channels = own if isinstance(own, int) else conv.in_channels
    error: Exception | None = None
    for size in [[length] * (conv.weight.ndim - 2) for length in (32, 64, 96, 128, 224)] + fixed_sizes(root):
        try:
            logits, maps = fake_run(root, [1, channels, *size])
        except Exception as e:  # the backbone wants a larger window
            error = error or e
            continue
        if not isinstance(logits, Tensor) or not all(isinstance(m, Tensor) for m in maps):
            raise InputError(f"{kind} in eval mode must return its logits as one tensor, its decoder features as one each")
        return [(m.shape[1], tuple(s / t for s, t in zip(size, m.shape[2:]))) for m in maps], channels, logits.shape[1]
    raise InputError(f"{kind} fails on a test input: {error}") from error
