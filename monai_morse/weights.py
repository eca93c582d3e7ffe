"""Reading checkpoints, and starting a network from weights that fit a part of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from monai.networks.utils import copy_model_state
from torch import Tensor, nn

from monai_morse.config import parse_bool
from monai_morse.errors import InputError
from monai_morse.networks import Morse, TransUNet

__all__ = ["LoadedWeights", "load_matching", "load_vit", "read_checkpoint"]

logger = logging.getLogger(__name__)
BACKBONE = "decoder.backbone."  # where a Morse keeps its backbone


@dataclass(frozen=True)
class LoadedWeights:
    """Which entries of a network's state a checkpoint filled: ``matched``, and ``new`` ones that keep their start values.

    ``reshaped`` are those of the new ones that the checkpoint has in another shape; ``unused`` are entries of the checkpoint
    that the network lacks.
    """

    matched: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def in_backbone(self, named: tuple[str, Tensor]) -> bool:
        """Whether a (name, parameter) is of the backbone and was loaded; a filter for MONAI's ``generate_param_groups``."""
        return named[0].startswith(BACKBONE) and named[0] in self.matched

    def __str__(self) -> str:
        counts = [("new", self.new), ("of another shape", self.reshaped), ("of the checkpoint not used", self.unused)]
        parts = [f"{len(names)} {what} ({_modules(names)})" for what, names in counts if names]
        return "; ".join([f"{len(self.matched)} of {len(self.matched) + len(self.new)} entries loaded", *parts])


def _modules(names: list[str]) -> str:
    """The outermost modules that entries belong to."""
    found = dict.fromkeys(n.removeprefix(BACKBONE).split(".")[0] for n in names)
    return ", ".join([*list(found)[:4], *(["..."] if len(found) > 4 else [])])


def read_checkpoint(path: str | Path, device: torch.device | None = None) -> Any:
    """What ``torch.save`` wrote, with ``weights_only=True``: tensors and plain values, nothing that could run.

    Raises:
        InputError: when the file is missing or unreadable.
    """
    if not os.path.isfile(path):
        raise InputError(f"no checkpoint at {path}; train first, or give the path of one")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise InputError(f"{path} cannot be read as a checkpoint of weights only: {str(error).splitlines()[0]}") from error


def load_matching(
    network: nn.Module, source: str | Path | Mapping[str, Any], freeze_backbone: bool | str = False
) -> LoadedWeights:
    """Fill what fits by name and shape: a bare backbone's weights into any cell around it, one cell's into another.

    Args:
        network: e.g. a :class:`Morse`.
        source: a state dict or the path of a checkpoint: a state dict, or a dictionary with one as ``"model"`` or
            ``"state_dict"``; names may start with ``module.``, as DistributedDataParallel writes them.
        freeze_backbone: train the rest alone, the mixture, the renderer and what the checkpoint lacks
            (:meth:`Morse.freeze_backbone`); default False. With the backbone's own coarse logits the rendering loss is then the
            only one that trains anything: give it a weight from the start (``schedule: scratch``).

    Returns:
        what was matched and what is new, which is logged, too.

    Raises:
        InputError: when nothing matches, or the file cannot be read.

    >>> from monai.networks.nets import BasicUNet
    >>> from monai_morse import Morse
    >>> bare = BasicUNet(2, 1, 3, features=(4, 4, 8, 16, 32, 4))
    >>> net = Morse(BasicUNet(2, 1, 3, features=(4, 4, 8, 16, 32, 4)), mixture={"width": 4}, head={"width": 4})
    >>> print(load_matching(net, bare.state_dict()))
    82 of 119 entries loaded; 37 new (mixture, renderer)
    """
    name = "the checkpoint" if isinstance(source, Mapping) else str(source)
    state = source if isinstance(source, Mapping) else read_checkpoint(source, torch.device("cpu"))
    for key in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise InputError(f"{name} holds no state dict but a {type(state).__name__}")
    state = {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    wanted = network.state_dict()

    def fits(key: str, value: Tensor) -> bool:
        return key in wanted and wanted[key].shape == value.shape

    # as it stands, from a bare backbone, into a bare backbone: whatever matches most
    renamed = [state, {BACKBONE + k: v for k, v in state.items()}]
    renamed.append({k.removeprefix(BACKBONE): v for k, v in state.items()})
    best = max(renamed, key=lambda s: sum(fits(k, v) for k, v in s.items()))
    matched = [k for k, v in best.items() if fits(k, v)]
    if not matched:
        raise InputError(
            f"nothing in {name} matches the network: it has {len(state)} entries, e.g. {', '.join(list(state)[:3])}; the "
            f"network has e.g. {', '.join(list(wanted)[:3])}"
        )
    copy_model_state(network, {k: best[k] for k in matched})
    new = [k for k in wanted if k not in matched]
    if parse_bool(freeze_backbone, "freeze_backbone"):
        if not isinstance(network, Morse):
            raise InputError(f"freeze_backbone needs a Morse, this is a {type(network).__name__}")
        network.freeze_backbone()
        for key, parameter in network.named_parameters():
            if key in new:
                parameter.requires_grad_(True)
    loaded = LoadedWeights(
        matched=matched,
        new=new,
        reshaped=[k for k in best if k in wanted and k not in matched],
        unused=[k for k in best if k not in wanted],
    )
    logger.info("%s: %s", name, loaded)
    return loaded


def load_vit(network: nn.Module, path: str | Path) -> None:
    """Start a :class:`Morse` around a :class:`TransUNet` from ImageNet-21k, see :meth:`TransUNet.load_imagenet21k`.

    Raises:
        InputError: when the backbone is another, or the file is not the public ``R50+ViT-B_16.npz``.
    """
    backbone = network.get_submodule(BACKBONE.rstrip("."))
    if not isinstance(backbone, TransUNet):
        kind = type(backbone).__name__
        raise InputError(f"{path} is for a TransUNet and the backbone is a {kind}; leave it out or give --backbone transunet")
    backbone.load_imagenet21k(path)
