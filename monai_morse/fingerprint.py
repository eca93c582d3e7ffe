"""Digests that tell whether two results were made alike: of what objects are set to, and of a file."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

__all__ = ["file_digest", "fingerprint"]

# attributes of transforms, inferers and networks that leave a scan's result as it is
NO_MATTER = {"training", "output_dir", "data_root_dir", "sw_batch_size", "progress", "device", "sw_device", "cpu_thresh"}
NO_MATTER |= {"buffer_steps", "buffer_dim", "writer_obj", "filenames", "_data_index"}


def fingerprint(*objects: Any) -> str:
    """Twelve letters that are the same for objects of the same classes and settings, in every process.

    Weights do not count, shapes do; where something is written and how many windows are computed at a time do not either.

    >>> one, two = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    >>> fingerprint(one) == fingerprint(two), fingerprint(one) == fingerprint(torch.nn.Linear(2, 4))
    (True, False)
    """
    return hashlib.sha256(repr(_plain(objects, frozenset())).encode()).hexdigest()[:12]


def _plain(value: Any, above: frozenset[int]) -> Any:
    """A value as nested lists of text."""
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return repr(value)
    if isinstance(value, (np.ndarray, np.generic)):
        return repr(value.tolist())
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    if isinstance(value, (torch.dtype, np.dtype, Path, ModuleType, logging.Logger)):
        return str(value)
    if isinstance(value, torch.device):
        return value.type
    if id(value) in above:
        return "above"
    above |= {id(value)}
    if isinstance(value, Mapping):
        return [[str(k), _plain(v, above)] for k, v in value.items() if k not in NO_MATTER]
    if isinstance(value, (list, tuple)):
        return [_plain(v, above) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(_plain(v, above)) for v in value)
    if isinstance(value, partial):
        return _plain([value.func, value.args, value.keywords], above)
    if hasattr(value, "__qualname__"):  # a class or a function
        return f"{value.__module__}.{value.__qualname__}"
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return [kind, _plain(dict(sorted(getattr(value, "__dict__", {}).items())), above)]


def file_digest(path: str | Path) -> str:
    """Twelve letters of a file's SHA-256; none where there is no file."""
    if not Path(path).is_file():
        return ""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()[:12]
