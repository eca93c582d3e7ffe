"""Which windows a network takes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from monai_morse.config import typed_arguments
from monai_morse.errors import InputError

from .decoders import copy_for_tracing, fake_run, fixed_sizes

__all__ = ["check_window"]


@typed_arguments
def check_window(network: nn.Module, size: Sequence[int], in_channels: int = 1) -> None:
    """See that a network takes windows of a size, before work starts.

    Args:
        network: (B, C, *S) -> logits.
        size: *S, e.g. a bundle's ``patch_size``.
        in_channels: C, default 1.

    Raises:
        InputError: when it does not, naming a size close by that it takes, if there is one.

    >>> from monai.networks.nets import BasicUNet
    >>> check_window(BasicUNet(features=(4, 4, 4, 4, 4, 4)), [32, 48, 16])
    """
    if not isinstance(size, Sequence) or not all(isinstance(s, int) and s > 0 for s in size):
        raise InputError(f"patch_size must be a list of positive numbers of voxels, e.g. [32, 32, 32], got {size!r}")
    error: Exception | None = None
    twin = copy_for_tracing(network)
    sizes = [[-(-s // multiple) * multiple for s in size] for multiple in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)]
    for fitting in sizes + fixed_sizes(network):
        try:
            logits = fake_run(twin, [1, in_channels, *fitting])
        except Exception as e:
            error = error or e
            continue
        if list(logits.shape[2:]) != fitting:
            continue
        if fitting != list(size):
            raise InputError(f"the network does not take windows of {list(size)} voxels; give --patch_size '{fitting}'")
        return
    raise InputError(f"the network does not take {in_channels} channel(s) of {list(size)} voxels: {error}") from error
