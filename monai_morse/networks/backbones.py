"""Which submodules of a backbone make its decoder features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, List, Tuple, Union

from monai.networks.nets import (
    UNETR,
    AttentionUnet,
    BasicUNet,
    DynUNet,
    FlexibleUNet,
    MedNeXt,
    SegResNet,
    SegResNetDS,
    SwinUNETR,
    UNet,
    VNet,
)
from torch import nn

from monai_morse.errors import InputError

__all__ = ["decoder_names", "register_backbone"]


def _unet(net: UNet) -> List[str]:
    names: List[str] = []
    path: str = "model"
    block: Any = net.model
    while isinstance(block, nn.Sequential) and len(block) == 3 and hasattr(block[1], "submodule"):
        names.append(f"{path}.2")
        path, block = f"{path}.1.submodule", block[1].submodule
    return [path, *reversed(names)]


def _attention_unet(net: AttentionUnet) -> List[str]:
    names = ["model.1"]
    block: Any = net.model[1].submodule
    while isinstance(block, nn.Sequential) and hasattr(block[-1], "submodule"):
        names.append(f"{names[-1]}.submodule.1")
        block = block[-1].submodule
    return [f"{names[-1]}.submodule", *reversed(names)]


def _each(pattern: str, blocks: Any) -> List[str]:
    return [pattern.format(i) for i in range(len(blocks))]


DecoderNames = Union[Sequence[str], Callable[[Any], List[str]]]

_REGISTERED: List[Tuple[type, DecoderNames]] = [  # the last that fits counts
    (UNet, _unet),
    (AttentionUnet, _attention_unet),
    (BasicUNet, ["down_4", "upcat_4", "upcat_3", "upcat_2", "upcat_1"]),
    (DynUNet, lambda net: ["bottleneck", *_each("upsamples.{}", net.upsamples)]),
    (SegResNet, lambda net: [f"down_layers.{len(net.down_layers) - 1}", *_each("up_layers.{}", net.up_layers)]),
    (
        SegResNetDS,
        lambda net: [f"encoder.layers.{len(net.encoder.layers) - 1}.blocks", *_each("up_layers.{}.blocks", net.up_layers)],
    ),
    (UNETR, ["decoder5", "decoder4", "decoder3", "decoder2"]),
    (SwinUNETR, ["encoder10", "decoder5", "decoder4", "decoder3", "decoder2", "decoder1"]),
    (VNet, ["down_tr256", "up_tr256", "up_tr128", "up_tr64", "up_tr32"]),
    (FlexibleUNet, lambda net: _each("decoder.blocks.{}", net.decoder.blocks)),
    (MedNeXt, lambda net: ["bottleneck", *_each("dec_stages.{}", net.dec_stages)]),
]


def register_backbone(kind: type, names: DecoderNames) -> None:
    """Make a class of networks known, so that :class:`Morse` finds the decoder features of its instances and subclasses.

    Args:
        kind: the network's class; registered again, the new names count.
        names: submodules whose outputs are the decoder features, coarse to fine, or a function from a network to them.

    Raises:
        InputError: for names that are one string.

    >>> class MyNet(nn.Module):
    ...     pass
    >>> register_backbone(MyNet, ["up1", "up2"])
    >>> decoder_names(MyNet())
    ['up1', 'up2']
    """
    if isinstance(names, str):
        raise InputError(f"decoder features of {kind.__name__} must be a list of names, got the string {names!r}")
    _REGISTERED.append((kind, names))


def decoder_names(backbone: nn.Module) -> List[str]:
    """Names of a backbone's decoder features, coarse to fine, the bottleneck first where it is one module's output.

    Args:
        backbone: a module with an attribute ``decoder_names``, of a registered class, or one of MONAI's ``UNet``,
            ``AttentionUnet``, ``BasicUNet``, ``DynUNet``, ``SegResNet``, ``SegResNetDS``, ``UNETR``, ``SwinUNETR``
            (``HyenaNDUNETR``), ``VNet``, ``FlexibleUNet``, ``MedNeXt``; 2D or 3D.

    Raises:
        InputError: for any other class, whose features the caller must name.

    >>> decoder_names(BasicUNet(features=(4, 4, 4, 4, 4, 4)))
    ['down_4', 'upcat_4', 'upcat_3', 'upcat_2', 'upcat_1']
    """
    own: Any = getattr(backbone, "decoder_names", None)
    if own is not None:
        return list(own)
    for kind, names in reversed(_REGISTERED):
        if isinstance(backbone, kind):
            return list(names(backbone) if callable(names) else names)
    raise InputError(
        f"the decoder features of {type(backbone).__name__} are not known: name the submodules whose outputs they are, coarse "
        "to fine, by register_backbone(its class, [names]) or DecoderFeatures(network, [names]); network.named_modules() lists "
        "the names"
    )
