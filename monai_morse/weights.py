"""Reading checkpoints, and starting a network from weights that fit a part of it."""

from __future__ import annotations

import codecs
import functools
import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.networks.utils import copy_model_state
from torch import Tensor, nn

from monai_morse.config import typed_arguments
from monai_morse.errors import InputError
from monai_morse.networks import Morse, TransUNet

__all__ = ["LoadedWeights", "load_matching", "load_vit", "read_checkpoint"]

logger = logging.getLogger(__name__)
REFUSED = re.compile(r"Unsupported global: GLOBAL ([\w.]+)|but got <class '([\w.]+)'>")
ANOTHER = "take another checkpoint, e.g. one that a fresh start kept as model_last.previous.pt, or train anew"
COMPILED = "is a compiled network (TorchScript), not a checkpoint; give the .pt file with its weights"
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


def read_checkpoint(path: str | Path, device: torch.device | str = "cpu", name: str | Path | None = None) -> Any:
    """What ``torch.save`` wrote: tensors, plain values and numpy's numbers and arrays, nothing that could run.

    Args:
        path: the file; its checksums are compared, which torch does not do.
        device: where tensors go; default the CPU.
        name: what errors call it; default ``path``.

    Raises:
        InputError: when it is missing, empty, truncated, damaged or no checkpoint, or holds an object of another kind.
    """
    name = name or path
    if os.path.isdir(path):
        raise InputError(f"{name} is a folder, not a checkpoint; give a file in it, e.g. {os.path.join(name, 'model.pt')}")
    if not os.path.isfile(path):
        raise InputError(f"no checkpoint at {name}; train first, or give the path of one")
    try:
        with open(path, "rb") as file:
            head = file.read(4)
        if not head:
            raise InputError(f"{name} is empty, 0 bytes; {ANOTHER}")
        if not head.startswith((b"PK", b"\x80")):  # a zip archive, or before torch 1.6 a pickle
            raise InputError(f"{name} is no checkpoint: torch.save did not write it; give the file that it wrote")
        if head.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise zipfile.BadZipFile
        with _allowed(_numpys()):
            content = torch.load(path, map_location=device, weights_only=True)
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(f"{name} {_fault(error)}") from error
    if isinstance(content, torch.jit.ScriptModule):  # before torch 2.6
        raise InputError(f"{name} {COMPILED}")
    return content


def _fault(error: Exception) -> str:
    """What is wrong with a file that ``torch.load`` failed on, and the remedy."""
    refused = REFUSED.search(str(error))
    if refused:
        return (
            f"holds a {refused[1] or refused[2]}, which is not read, for it could run code; if you trust its source, load it "
            "with torch.load(.., weights_only=False) and torch.save its state dict alone"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror}); see to its disk and permissions"
    return COMPILED if "TorchScript" in str(error) else f"is truncated or damaged; copy it again, or {ANOTHER}"


@contextmanager
def _allowed(kinds: list[Any]) -> Iterator[None]:
    """``torch.serialization.safe_globals``, which torch before 2.5 lacks."""
    before = list(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals(kinds)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _numpys() -> list[Any]:
    """What pickled numbers and arrays are made of, under the names that numpy 1 and 2 give it."""

    def under(module: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def alias(*args: Any) -> Any:
            return function(*args)

        alias.__module__, alias.__name__, alias.__qualname__ = module, function.__name__, function.__name__
        return alias

    core = np.core if np.__version__.startswith("1.") else np._core  # type: ignore[attr-defined]
    functions = core.multiarray.scalar, core.multiarray._reconstruct
    aliases = [under(m, f) for f in functions for m in ("numpy.core.multiarray", "numpy._core.multiarray")]
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFDGSUmM"}  # not O, of any object
    return [*aliases, np.dtype, np.ndarray, *kinds, codecs.encode]  # encode: of their bytes, as torch.save pickles them


@typed_arguments
def load_matching(network: nn.Module, source: str | Path | Mapping[str, Any], freeze_backbone: bool = False) -> LoadedWeights:
    """Fill what fits by name and shape: a bare backbone's weights into any cell around it, one cell's into another.

    Args:
        network: e.g. a :class:`Morse`.
        source: a state dict or the path of a checkpoint: a state dict, or a dictionary with one as ``"model"`` or
            ``"state_dict"``; names may start with ``module.`` or ``_orig_mod.``, as DistributedDataParallel and
            torch.compile write them.
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
    state = source if isinstance(source, Mapping) else read_checkpoint(source)
    for key in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise InputError(f"{name} holds no state dict but a {type(state).__name__}")
    state = {re.sub(r"^(module\.|_orig_mod\.)*", "", k): v for k, v in state.items() if isinstance(v, Tensor)}
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
    if freeze_backbone:
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
