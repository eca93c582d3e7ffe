"""Options of :class:`Morse`: what is given over what a preset has, checked, as plain data."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from monai_morse.config import check_choice, parse_bool, parse_number
from monai_morse.errors import InputError

from .points import PointSelection

__all__ = ["COARSE", "EXPERTS", "PRESETS", "RENDERERS", "MorseOptions", "per_axis", "resolve_options"]

EXPERTS = ("none", "dense", "stochastic")
RENDERERS = ("none", "pointrend", "implicit_pointrend", "anatomical")
COARSE = ("experts", "backbone")
GROUPS: dict[str, dict[str, Any]] = {
    "mixture": {
        "coarse": COARSE,
        "width": int,
        "gate_stride": "axes",
        "gate_norm": bool,
        "min_active": int,
        "renormalize": bool,
    },
    "head": {
        "width": int,
        "num_frequencies": int,
        "residual": bool,
        "read_features": bool,
        "image_patch": "axes",
        "patch_norm": bool,
    },
    "points": {"num_train": int, "num_eval": int, "oversample": float, "importance_ratio": float, "multilabel": bool},
}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "light": {
        "mixture": {
            "coarse": "backbone",
            "width": 32,
            "gate_stride": 4,
            "gate_norm": True,
            "min_active": 1,
            "renormalize": True,
        },
        "head": {
            "width": 64,
            "num_frequencies": 32,
            "residual": True,
            "read_features": True,
            "image_patch": None,  # by the stride
            "patch_norm": True,
        },
        "points": {},
    },
    "paper": {
        "mixture": {
            "coarse": "experts",
            "width": 256,
            "gate_stride": 1,
            "gate_norm": False,
            "min_active": 0,
            "renormalize": False,
        },
        "head": {
            "width": 256,
            "num_frequencies": 128,
            "residual": False,
            "read_features": False,
            "image_patch": 0,
            "patch_norm": False,
        },
        "points": {"oversample": 3.0},
    },
}


@dataclass(frozen=True)
class MorseOptions:
    """All that a :class:`Morse` was built from beside its backbone; prints as a line an option."""

    experts: str
    renderer: str
    num_experts: int
    dropout: float
    preset: str
    stride: list[int]
    mixture: dict[str, Any]
    head: dict[str, Any]
    points: PointSelection

    def __str__(self) -> str:
        return "\n".join(f"{f.name}: {getattr(self, f.name)}" for f in fields(self))


def per_axis(name: str, value: Any, spatial_dims: int) -> list[int]:
    """A whole number for each axis: one for all, or as many as there are axes.

    >>> per_axis("stride", 2, 3), per_axis("stride", [2, 2, 1], 3)
    ([2, 2, 2], [2, 2, 1])
    """
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * spatial_dims
    if len(values) != spatial_dims:
        raise InputError(f"{name} must be a whole number or {spatial_dims} of them, one for each axis, got {value!r}")
    return [parse_number(v, name, int) for v in values]


def _group(name: str, preset: str, given: Any, spatial_dims: int) -> dict[str, Any]:
    """A group's options: the preset's, and over them those that are given and not ``None``."""
    known = GROUPS[name]
    if given is not None and not isinstance(given, Mapping):
        raise InputError(f"{name} must be a mapping of {', '.join(known)}, got {given!r}")
    options = dict(PRESETS[preset][name])
    for key, value in (given or {}).items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"{name}: unknown option {key!r}, must be one of {', '.join(known)}{hint}")
        if value is None or value == "null":  # the latter is what a command line makes of a config's null
            continue
        kind, full_name = known[key], f"{name}: {key}"
        if isinstance(kind, tuple):
            check_choice(full_name, value, kind)
        elif kind is bool:
            value = parse_bool(value, full_name)
        elif isinstance(kind, type) and issubclass(kind, numbers.Number):
            value = parse_number(value, full_name, kind)
        options[key] = value
    for key, kind in known.items():
        if kind == "axes" and options.get(key) is not None:
            options[key] = per_axis(f"{name}: {key}", options[key], spatial_dims)
    return options


def resolve_options(
    spatial_dims: int,
    experts: str = "stochastic",
    renderer: str = "anatomical",
    num_experts: int = 3,
    dropout: float = 0.7,
    preset: str = "light",
    stride: int | Sequence[int] = 1,
    mixture: Mapping[str, Any] | None = None,
    head: Mapping[str, Any] | None = None,
    points: Mapping[str, Any] | None = None,
) -> MorseOptions:
    """Every option of :class:`Morse`, see there, checked and complete.

    Args:
        spatial_dims: 2 or 3; an option that is a number for each axis may be given as one for all.

    Raises:
        InputError: for an unknown word or option, or a value out of its range.

    >>> print(resolve_options(3, stride=[2, 2, 1], mixture={"width": 16}).head["image_patch"])
    [5, 5, 3]
    """
    check_choice("experts", experts, EXPERTS)
    check_choice("renderer", renderer, RENDERERS)
    check_choice("preset", preset, PRESETS)
    given = {"mixture": mixture, "head": head, "points": points}
    groups = {name: _group(name, preset, given[name], spatial_dims) for name in GROUPS}
    strides = per_axis("stride", stride, spatial_dims)
    if min(strides) < 1:
        raise InputError(f"stride must be whole numbers from 1 on, got {stride}")
    if experts != "none" and renderer == "none":
        if (mixture or {}).get("coarse") == "backbone":
            raise InputError("experts without a renderer need coarse='experts': nothing else would use them")
        groups["mixture"]["coarse"] = "experts"
    if preset == "paper" and renderer == "implicit_pointrend" and (points or {}).get("importance_ratio") is None:
        groups["points"]["importance_ratio"] = 0.0  # its source draws all training points uniformly
    if groups["head"]["image_patch"] is None:
        # the coarser the backbone sees the image, the more there is to read, see docs/results.md
        groups["head"]["image_patch"] = [3 if s == 1 else 7 if spatial_dims == 2 else 5 for s in strides]
    patch = groups["head"]["image_patch"]
    if any(p < 0 or (p > 0 and p % 2 == 0) for p in patch) or (min(patch, default=0) == 0 and max(patch, default=0) > 0):
        raise InputError(f"head: image_patch must be 0 or odd numbers of voxels, got {patch}")
    return MorseOptions(
        experts,
        renderer,
        parse_number(num_experts, "num_experts", int),
        parse_number(dropout, "dropout (alpha)", within="[0, 1)"),
        preset,
        strides,
        groups["mixture"],
        groups["head"],
        PointSelection(**groups["points"]),
    )
