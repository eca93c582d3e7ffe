"""Whether the files of cases can be used, asked before any work starts."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from monai_morse.config import check_choice, parse_bool, typed_arguments
from monai_morse.errors import InputError

from .grids import Limits, grid_misfit
from .scans import read_scan

__all__ = ["check_classes", "check_split", "find_problem", "no_hounsfield", "raise_if_left_out", "usable_cases", "voxel_fault"]

logger = logging.getLogger(__name__)


def voxel_fault(voxels: np.ndarray, in_channels: int = 1) -> str | None:
    """Why these can be no scan's voxels; None where they can.

    Args:
        voxels: (X, Y, Z), or (X, Y, Z, C) for more than one channel.
        in_channels: C, default 1.

    >>> voxel_fault(np.full((4, 4, 4), 1e200))
    'values up to 1e+200 are beyond single precision; write the scan in its own units'
    """
    expected = 3 if in_channels == 1 else 4
    if voxels.ndim != expected or (in_channels > 1 and voxels.shape[-1] != in_channels):
        wanted = f"a {expected}D image with {in_channels} channel(s)"
        return f"expected {wanted}, got shape {voxels.shape}; split or stack its channels"
    if voxels.dtype.kind not in "biuf":
        return f"voxels of type {voxels.dtype} are no intensities; convert the scan to one number a voxel"
    with np.errstate(over="ignore"):
        single = torch.from_numpy(voxels.T.astype(np.float32, order="C"))  # NIfTI's first axis varies fastest
    if not math.isfinite(float(single.sum())):
        count = int(voxels.size - np.isfinite(voxels).sum())
        if count:
            return f"{count} voxels are NaN or infinite; repair or remove the scan"
        if not torch.isfinite(single).all():
            return f"values up to {np.abs(voxels).max():.3g} are beyond single precision; write the scan in its own units"
    for channel in [single] if in_channels == 1 else single:
        low, high = float(channel.min()), float(channel.max())
        if low == high:
            return f"every voxel is {low:.6g}, so there is nothing to see; give the scan as it was taken"
        # what NormalizeIntensity does, in its precision
        std, mean = torch.std_mean(channel, correction=0)
        normalised = (channel - mean) / std
        if not abs(float(normalised.std(correction=0)) - 1) < 0.01:
            return f"values from {low:.6g} to {high:.6g} cannot be normalised in single precision; rescale the scan"
        sample = normalised.reshape(-1)[:: max(1, normalised.numel() // 1_000_000)]
        if float(torch.quantile(sample, 0.995) - torch.quantile(sample, 0.005)) < 1e-3:
            remedy = "clip the few that lie apart, or crop the scan to them"
            return f"values from {low:.6g} to {high:.6g}, yet nearly all are alike; {remedy}"
    return None


HOUNSFIELD = {  # HU from, to, and the least share of what is no air
    "fat": (-150, -30, 0.03),
    "soft tissue": (0, 150, 0.05),
    "bone or contrast": (150, math.inf, 0.005),
    "of a body": (-200, 300, 0.7),
}


def no_hounsfield(voxels: np.ndarray, tissues: Iterable[str] = tuple(HOUNSFIELD)) -> str | None:
    """What a CT's values lack that Hounsfield units have: the usual shares of a body's tissues; None where they have them.

    Values moved by 200, rescaled or windowed to 8 bits have too few where fat, soft tissue or bone would be, or too many
    where nothing of a body is.

    Args:
        voxels: of any shape.
        tissues: that are looked for; default all of ``HOUNSFIELD``.

    >>> body = np.repeat([-1000, -100, 50, 400], [50, 20, 25, 5])
    >>> no_hounsfield(body)
    >>> no_hounsfield(body + 1000)
    'values from 0 to 1.4e+03; of those above -500, 0.0 % are fat (-150 to -30 HU) and 50.0 % of a body (-200 to 300 HU)'
    """
    inside = voxels[voxels > -500]
    shares = {n: float(((inside >= a) & (inside < b)).mean()) if inside.size else 0.0 for n, (a, b, _) in HOUNSFIELD.items()}
    lacking = [name for name in tissues if shares[name] < HOUNSFIELD[name][2]]
    if not lacking:
        return None
    told = [f"{100 * shares[n]:.1f} % {n} ({HOUNSFIELD[n][0]} to {HOUNSFIELD[n][1]} HU)" for n in lacking]
    return f"values from {voxels.min():.3g} to {voxels.max():.3g}; of those above -500, {' and '.join(told)}".replace(
        "%", "% are", 1
    )


def find_problem(
    case: Mapping[str, str],
    num_classes: int,
    in_channels: int = 1,
    limits: Limits | None = None,
    classes: set[int] | None = None,
) -> str | None:
    """What makes a case unusable, naming the file and the remedy; None if nothing does.

    Args:
        case: paths by ``"image"`` and, optionally, ``"label"``.
        num_classes: labels must be integers in [0, num_classes - 1].
        in_channels: 1 wants a 3D image; more want a 4D image with that many along its last axis.
        limits: what a plausible scan is; default ``Limits()``.
        classes: takes the labels that are found.
    """
    limits = limits or Limits()
    path = case["image"]
    try:
        image = read_scan(path, limits)
        voxels = np.asanyarray(image.dataobj)
        fault = voxel_fault(voxels, in_channels)
        if fault:
            return f"{path}: {fault}"
        lacking = no_hounsfield(voxels) if limits.hounsfield else None
        if lacking:
            logger.warning("%s: these look like no Hounsfield units: %s; organs may be missed", path, lacking)
        if "label" not in case:
            return None
        path = case["label"]
        label = read_scan(path, limits)
    except InputError as error:
        return str(error)
    misfit = grid_misfit(label.shape, label.affine, image.shape[:3], image.affine)
    if misfit:
        return f"{path}: {misfit}; resample the label to the image"
    found = np.unique(np.asanyarray(label.dataobj))
    if found.dtype.kind not in "biuf":
        return f"{path}: voxels of type {found.dtype} are no labels; write it with one whole number a voxel"
    wrong = found[(found != np.round(found)) | (found < 0) | (found >= num_classes)]
    if wrong.size:
        return (
            f"{path}: labels {[float(w) for w in wrong[:5]]} are outside 0 to {num_classes - 1}; map them or name every "
            "class in --class_names"
        )
    if classes is not None:
        classes.update(int(value) for value in found)
    return None


def limits_of(words: Mapping[str, Any] | None) -> Limits:
    """The limits that a config's words give.

    Raises:
        InputError: for a word that there is not, or what it cannot be.
    """
    if not isinstance(words or {}, Mapping):
        raise InputError(f"limits must be a mapping of {', '.join(field.name for field in fields(Limits))}, got {words!r}")
    for name in words or {}:
        check_choice("a word of limits", name, [field.name for field in fields(Limits)])
    return Limits(**(words or {}))


@typed_arguments
def usable_cases(
    cases: Sequence[Mapping[str, str]],
    num_classes: int,
    in_channels: int = 1,
    limits: Mapping[str, Any] | None = None,
    check: bool | str = True,
    train: Sequence[Mapping[str, str]] | None = None,
    class_names: Sequence[str] = (),
) -> list[dict[str, str]]:
    """The cases, when all of their files can be used; every file is read and checked once.

    Args:
        cases: paths by ``"image"`` and ``"label"``.
        num_classes, in_channels: see :func:`find_problem`.
        limits: arguments of :class:`monai_morse.data.grids.Limits`.
        check: false takes all cases as they are; default True.
        train: those of the cases that are trained on, the others are validated on; see :func:`check_classes`.
        class_names: of labels 1, 2, ..

    Raises:
        InputError: with up to ten problems, when one case or more cannot be used; when there is no case.
    """
    _enough_for_processes(cases, "use")
    if not parse_bool(check, "check_data"):
        return [dict(case) for case in cases]
    good: list[dict[str, str]] = []
    classes: list[set[int]] = []
    problems: list[str] = []
    bounds = limits_of(limits)
    for case in tqdm(cases, desc="checking scans", unit="scan", disable=len(cases) < 20, leave=False):
        try:
            found: set[int] = set()
            problem = find_problem(case, num_classes, in_channels, bounds, found)
        except Exception as error:  # whatever else one file does, it is named
            cause = f"{type(error).__name__}: {error}"
            problem = f"{case.get('image', case)}: cannot be checked ({cause}); one readable file a case is needed"
        if problem is None:
            good.append(dict(case))
            classes.append(found)
        else:
            problems.append(problem)
    if problems:
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise InputError(f"{len(problems)} of {len(cases)} cases cannot be used:\n  " + "\n  ".join(problems[:10]) + more)
    if not good:
        raise InputError("the list of cases is empty; give a case at least")
    if train is not None:
        sides = [[c for case, c in zip(good, classes) if (case in train) == wanted] for wanted in (True, False)]
        check_classes(sides[0], sides[1], class_names)
    return good


def check_classes(train: Sequence[set[int]], validation: Sequence[set[int]], class_names: Sequence[str]) -> None:
    """See that labels have something to learn and to validate; a class that all lack is named in a warning.

    Args:
        train: the labels found in each case to train on.
        validation: likewise; no case is no error.
        class_names: of labels 1, 2, ..

    Raises:
        InputError: when all labels of a side are background.

    >>> check_classes([{0, 1}], [{0}], ["liver"])
    Traceback (most recent call last):
    monai_morse.errors.InputError: every label to validate on is empty; give cases with liver, or another fold
    """
    for cases, what in ((train, "train"), (validation, "validate")):
        found = set().union(*cases)
        lacking = [name for label, name in enumerate(class_names, 1) if cases and label not in found]
        if lacking and len(lacking) == len(class_names):
            remedy = f"give cases with {' or '.join(lacking)}, or another fold"
            raise InputError(f"every label to {what} on is empty; {remedy}")
        if lacking:
            end = "it cannot be learned" if what == "train" else "its figures will be missing"
            logger.warning("no label to %s on has %s: %s", what, ", ".join(lacking), end)


def _enough_for_processes(cases: Sequence[Any], what: str) -> None:
    """See that each of several processes has a case: an evaluator without any fails, and the others wait for it."""
    processes = int(os.environ.get("WORLD_SIZE", 1))  # of torchrun; the processes have not met yet
    if cases and len(cases) < processes:
        words = f"start {len(cases)} at most (torchrun --nproc_per_node={len(cases)})"
        raise InputError(f"{len(cases)} case(s) to {what} are too few for {processes} processes; {words}, or give more cases")


def check_split(train: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]] | None) -> None:
    """See that there is something to train on and something else to validate on, of several processes for each.

    Args:
        train: cases.
        validation: likewise, or None for a training that keeps its last weights, not its best.

    Raises:
        InputError: when one is empty, as without validation no weights would ever be the best, and none be kept; when an image
            is in both, by whatever spelling.

    >>> check_split([{"image": "a.nii.gz"}], [])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    monai_morse.errors.InputError: no case to validate on: of 1 case(s) at least one each is needed ...
    """
    for cases, what in ((train, "train"), (validation, "validate")):
        if cases is not None and not cases:
            raise InputError(
                f"no case to {what} on: of {len(train) + len(validation or [])} case(s) at least one each is needed to train "
                "and to validate; give more, or another split (MONAI Label: val_split)"
            )
    trained_on = {os.path.realpath(case["image"]) for case in train}
    common = [case["image"] for case in validation or [] if os.path.realpath(case["image"]) in trained_on]
    if common:
        raise InputError(f"{len(common)} image(s) to train and to validate on at once, such as {common[0]}; list each once")
    _enough_for_processes(validation or [], "validate on")


def raise_if_left_out(cases: Iterable[Mapping[str, str]], used: Iterable[Mapping[str, str]]) -> None:
    """At the end of a cohort: raise an :class:`InputError` naming the cases that were refused or failed, if any."""
    done = {c["image"] for c in used}
    others = [c["image"] for c in cases if c["image"] not in done]
    if others:
        told = "the others are done; see the log for why"
        raise InputError(f"{len(others)} case(s) refused or failed, {told}: {', '.join(others)}")
