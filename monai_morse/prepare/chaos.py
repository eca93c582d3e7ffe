"""``prepare chaos``: the CHAOS challenge's training data as downloaded, to the MSD layout.

``MR/ID/T2SPIR``, ``MR/ID/T1DUAL`` and ``CT/ID`` have slices in ``DICOM_anon``, of T1DUAL in its ``InPhase`` and ``OutPhase``.
Their masks are in ``Ground``, a PNG a slice, whose grey values are organs. In MR a mask has the name of its slice, in T1DUAL of
the in-phase one. In CT masks have numbers of their own, in the order of the slices' names. That order may run against the
slices' places, so each mask is matched to its slice by name and put where that lies.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from skimage.io import imread

from monai_morse.config import check_choice
from monai_morse.data.dicom import dicom_scans, reoriented, series_planes
from monai_morse.data.grids import grid_misfit
from monai_morse.errors import InputError

from .msd import Case, check_folders, load_image, stack_channels, write_cases

__all__ = ["prepare_chaos"]

logger = logging.getLogger(__name__)

ABOUT = {
    "name": "CHAOS, prepared by monai_morse",
    "licence": "CC BY-NC-SA 4.0",
    "reference": "Kavur et al., CHAOS Challenge, Medical Image Analysis 69 (2021) 101950",
}
MR_GREYS = {"liver": (55, 70), "right_kidney": (110, 135), "left_kidney": (175, 200), "spleen": (240, 255)}
CT_GREYS = {"liver": (255, 255)}
SEQUENCES = {
    "t2spir": ("T2SPIR", ""),
    "t1in": ("T1DUAL", "InPhase"),
    "t1out": ("T1DUAL", "OutPhase"),
    "ct": ("CT", ""),
}
STRAY = 20  # voxels of a scan's masks that may have another grey value

Folder = tuple[Path, Path]  # of the slices, and of their masks


# --- what lies where


def _find_folders(source: Path) -> tuple[dict[tuple[str, str], Folder], list[str]]:
    """Folders by patient and sequence, and what is said of those that are not used."""
    found: dict[tuple[str, str], Folder] = {}
    unused, unlabelled = [], 0
    for place in sorted(source.rglob("DICOM_anon")):
        sequence, patient = place.parent.name, place.parent.parent.name
        within = place.relative_to(source).parts
        if "__MACOSX" in within:
            continue
        if "Test_Sets" in within:
            unlabelled += 1
            continue
        if sequence in ("T2SPIR", "T1DUAL"):
            keys = [(f"mr{patient:0>2}", word) for word, (name, _) in SEQUENCES.items() if name == sequence]
        elif patient == "CT":
            keys = [(f"ct{sequence:0>2}", "ct")]
        else:
            unused.append(f"{place}: lies neither in MR/ID/T2SPIR, MR/ID/T1DUAL nor in CT/ID")
            continue
        for key in keys:
            if key in found:
                raise InputError(f"{found[key][0]} and {place} are both of {' '.join(key)}; give one copy with --source")
            found[key] = place, place.parent / "Ground"
    if unlabelled:
        unused.append(f"{unlabelled} series in Test_Sets, whose masks are not public")
    return found, unused


def _series(folder: Path) -> tuple[str, list[str]]:
    """The address of the one series in a folder and the files of its slices, in the order of the volume."""
    if not folder.is_dir():
        raise InputError(f"no folder {folder}")
    addresses = list(dicom_scans(folder).values())
    if len(addresses) != 1:
        raise InputError(f"{folder}: {len(addresses)} DICOM series, 1 expected")
    return addresses[0], [plane.file for plane in series_planes(addresses[0])]


# --- which mask belongs to which slice


def _by_number(names: Sequence[str], what: str) -> list[str]:
    """Names in the order of the one number in which they differ, which must run without a gap.

    >>> _by_number(["i0002,0000b", "i0010,0000b", "i0006,0000b"], "slices")
    ['i0002,0000b', 'i0006,0000b', 'i0010,0000b']
    """
    parts = [re.split(r"(\d+)", name) for name in names]
    differ = [i for i, column in enumerate(zip(*parts)) if len(set(column)) > 1]
    if len(names) > 1 and (len({len(p) for p in parts}) > 1 or len(differ) != 1 or differ[0] % 2 == 0):
        raise InputError(f"{what} such as {names[0]} and {names[-1]} differ not in one number alone: no order to go by")
    ordered = sorted((int(p[i]), name) for p, name in zip(parts, names) for i in differ) or [(0, names[0])]
    steps = np.diff([number for number, _ in ordered])
    if len(set(steps.tolist())) > 1 or 0 in steps:
        before, after = ordered[int(np.argmax(steps)) :][:2]
        raise InputError(
            f"{len(names)} {what} are not numbered evenly: {after[1]} follows {before[1]}; restore what is missing"
        )
    return [name for _, name in ordered]


def _match(slices: Sequence[str], masks: Sequence[str]) -> dict[str, str]:
    """The mask of each slice, both by their names without extension: the one of its name, or its like in order.

    >>> _match(["IMG-0004-00003", "IMG-0004-00001"], ["IMG-0004-00001", "IMG-0004-00003"])["IMG-0004-00003"]
    'IMG-0004-00003'
    >>> _match(["i0001,0000b", "i0000,0000b"], ["liver_GT_000", "liver_GT_001"])["i0001,0000b"]
    'liver_GT_001'
    """
    alone = [sorted(set(a) - set(b)) for a, b in ((slices, masks), (masks, slices))]
    named_alike = len(alone[0]) < len(slices)
    if len(slices) != len(masks) or (named_alike and any(alone)):
        told = [
            f"no {what} for {', '.join(names[:3])}" for what, names in zip(("mask", "slice"), alone) if names and named_alike
        ]
        raise InputError(", ".join([f"{len(slices)} slices and {len(masks)} masks", *told]))
    if named_alike:
        return {name: name for name in slices}
    return dict(zip(_by_number(sorted(slices), "slices"), _by_number(sorted(masks), "masks")))


# --- masks to labels


def _read_mask(path: Path) -> np.ndarray:
    """Grey values (columns, rows), 0 to 255."""
    try:
        grey = imread(path)
    except Exception as error:  # of several libraries
        raise InputError(f"{path}: cannot be read as PNG ({type(error).__name__}: {error}); restore it") from error
    if grey.ndim != 2 or grey.dtype not in (bool, np.uint8):
        raise InputError(f"{path}: {grey.dtype} of shape {grey.shape} is no grey picture of 8 bits or 1; restore it")
    return (grey * np.uint8(255) if grey.dtype == bool else grey).T


def _spread(scan: Any, label: np.ndarray) -> float:
    """How far the voxels of organs lie from their organ's median, on average."""
    voxels = np.asarray(scan.dataobj, np.float32)
    apart = [np.abs(v - np.median(v)) for v in (voxels[label == k] for k in range(1, label.max() + 1)) if v.size]
    return float(np.concatenate(apart).mean())


def _label(scan: Any, files: Sequence[str], ground: Path, greys: Mapping[str, tuple[int, int]], organs: Sequence[str]) -> Any:
    """The masks as labels 1, 2, .. of the organs on the scan, each where its slice lies."""
    masks = {p.stem: p for p in sorted(ground.glob("*.png")) if not p.name.startswith(".")} if ground.is_dir() else {}
    if not masks:
        raise InputError(f"no PNG masks in {ground}")
    try:
        match = _match([Path(file).stem for file in files], list(masks))
    except InputError as error:
        raise InputError(f"{ground}: {error}") from error
    values = np.zeros(scan.shape, np.uint8)
    for k, file in enumerate(files):
        path = masks[match[Path(file).stem]]
        grey = _read_mask(path)
        if grey.shape != scan.shape[:2]:
            sizes = [f"{columns} x {rows}" for columns, rows in (grey.shape, scan.shape[:2])]
            raise InputError(f"{path}: {sizes[0]} pixels, its slice has {sizes[1]}")
        values[..., k] = grey
    found = np.zeros(scan.shape, np.uint8)
    for number, (low, high) in enumerate(greys.values(), start=1):
        found[(values >= low) & (values <= high)] = number
    stray = values[(values > 0) & (found == 0)]
    if stray.size > STRAY:
        told = ", ".join(f"{g} ({c} voxels)" for g, c in zip(*(a[:5] for a in np.unique(stray, return_counts=True))))
        ranges = ", ".join(f"{organ} {low} to {high}" for organ, (low, high) in greys.items())
        raise InputError(f"{ground}: grey values {told} are of no organ: {ranges}")
    if stray.size:
        logger.warning("%s: %d voxel(s) of grey values that are no organ's become background", ground, stray.size)
    label = np.array([0, *(organs.index(o) + 1 if o in organs else 0 for o in greys)], np.uint8)[found]
    if not label.any():
        raise InputError(f"{ground}: no voxel of {' or '.join(organs)} in its masks")
    spread, in_reverse = _spread(scan, found), _spread(scan, found[..., ::-1])
    if in_reverse < 0.9 * spread:
        raise InputError(
            f"{ground}: the masks fit their slices better in reverse, the organs' voxels then lie {in_reverse:.4g} from their "
            f"medians instead of {spread:.4g}; the order of the names is not that of the slices"
        )
    return nib.Nifti1Image(label, scan.affine)


# --- cases


def _read(folder: Folder | None, words: Sequence[str], organs: Sequence[str]) -> tuple[Any, Any]:
    """The scan of these sequences, which are its channels, and its labels."""
    name = SEQUENCES[words[0]][0]
    if folder is None:
        raise InputError(f"no folder {name}/DICOM_anon")
    slices, ground = folder
    wanted = [slices / SEQUENCES[w][1] for w in words]
    # T1DUAL's masks are of the in-phase slices, and of the out-phase ones if these lie on them
    own = slices / "InPhase" if list(words) == ["t1out"] and (slices / "InPhase").is_dir() else wanted[0]
    address, files = _series(own)
    image = load_image(address)
    label = _label(image, files, ground, CT_GREYS if name == "CT" else MR_GREYS, organs)
    if wanted != [own]:
        image = reoriented(stack_channels([_series(path)[0] for path in wanted]), image)
        misfit = grid_misfit(label.shape, label.affine, image.shape[:3], image.affine)
        if misfit:
            raise InputError(f"{own}, whose masks these are: {misfit}, {wanted[0]}")
    return image, nib.Nifti1Image(np.asarray(label.dataobj), image.affine)


def prepare_chaos(
    source: str | Path,
    out: str | Path,
    modality: str | Sequence[str] = "t2spir",
    organs: Sequence[str] | None = None,
    phases: str = "separate",
) -> str:
    """Write the MSD layout from CHAOS's ``Train_Sets`` as downloaded; what cannot be used is left out and said.

    ``dataset.json`` lists each case with its patient, by whom folds are drawn, and its sequence. Patients of MR and CT are not
    the same people. Run again, it starts anew. The data's licence, CC BY-NC-SA 4.0, goes with all that is made of it.

    Args:
        source: the folder that the archive was unpacked to, or one in it; it stays as it is.
        out: folder to write: new, empty, or of an earlier preparation.
        modality: one or several of ``"t2spir"`` (default), ``"t1in"``, ``"t1out"`` and ``"ct"``, or ``"all"`` of them.
        organs: of liver, right_kidney, left_kidney and spleen; they become labels 1, 2, .. in this order. Default: all that
            the masks have, four in MR, and the liver with ``"ct"``.
        phases: ``"separate"`` (default), a one-channel case a sequence, or ``"channels"``, T1's in- and out-phase as the
            channels of one case.

    Returns:
        a table of the patients and, below it, what was left out and why, which ``out/skipped.csv`` has too.

    Raises:
        InputError: when nothing can be used, or for an unusable folder or word.
    """
    source, out = Path(source).resolve(), Path(out).resolve()
    words = list(dict.fromkeys([modality] if isinstance(modality, str) else modality))
    for word in words:
        check_choice("modality", word, [*SEQUENCES, "all"])
    words = list(SEQUENCES) if "all" in words else words
    check_choice("phases", phases, ("separate", "channels"))
    if phases == "channels" and set(words) != {"t1in", "t1out"}:
        raise InputError(f"channels of one case are T1's phases, --modality t1in t1out; got {' '.join(words)}")
    masked = CT_GREYS if "ct" in words else MR_GREYS
    for organ in organs or []:
        check_choice("an organ of CT" if "ct" in words else "an organ", organ, masked)
    classes = [organ for organ in masked if organs is None or organ in organs]
    check_folders(source, out, ABOUT["name"])
    folders, unused = _find_folders(source)
    kinds = {"ct" if word == "ct" else "mr" for word in words}
    patients = sorted({patient for patient, _ in folders if patient[:2] in kinds}, key=lambda p: (p[:2] == "ct", p))
    if not patients:
        there = f"holds {len(folders)} series of other modalities" if folders else "holds no folder DICOM_anon of a patient"
        raise InputError(f"{source} {there}; give the folder that CHAOS_Train_Sets was unpacked to, or another --modality")
    cases = []
    for patient in patients:
        own = [w for w in words if (w == "ct") == (patient[:2] == "ct")]
        for group in [tuple(own)] if phases == "channels" else [(w,) for w in own]:
            name = f"{patient}_t1" if phases == "channels" else patient if group == ("ct",) else f"{patient}_{group[0]}"
            cases.append(Case(name, patient, group, partial(_read, folders.get((patient, group[0])), group, classes)))
    kind = " or ".join(sorted(k.upper() for k in kinds)).replace("MR", "MRI")
    return write_cases(out, ABOUT, [f"MRI, {w}" for w in words] if phases == "channels" else [kind], classes, cases, unused)
