"""Cases to the MSD layout: what can be used is written and listed with its patient, what cannot is left out and said."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from tqdm import tqdm

from monai_morse.data.cases import claim_folder, write_listing
from monai_morse.data.checks import voxel_fault
from monai_morse.data.dicom import reoriented
from monai_morse.data.files import atomic_write
from monai_morse.data.grids import Limits, grid_misfit
from monai_morse.data.scans import read_scan
from monai_morse.errors import InputError

__all__ = ["Case", "check_folders", "load_image", "load_mask", "stack_channels", "write_cases"]


class Case(NamedTuple):
    """A scan and its label map, to be read when it is their turn."""

    name: str  # of its files
    patient: str
    phases: tuple[str, ...]  # one, or those that are its channels
    read: Callable[[], tuple[Any, Any]]  # scan (X, Y, Z) or (X, Y, Z, C) and label map (X, Y, Z) as NIfTI images on one grid


def check_folders(source: Path, out: Path, name: str) -> None:
    """See that ``source`` is there and ``out`` can be written, apart from it, for the data set of this name.

    Raises:
        InputError: when not.
    """
    if not source.is_dir():
        raise InputError(f"no folder at {source}; give the folder of the patients with --source")
    if out == source or source in out.parents or out in source.parents:
        raise InputError(f"{out} and {source} lie in one another; give another folder with --out")
    claim_folder(out, name, "prepared scans")


def load_image(path: str | Path) -> Any:
    """A scan, NIfTI or DICOM series, as 16-bit integers where they hold it, else as float32.

    Raises:
        InputError: when it cannot be read or its voxels are no intensities.
    """
    image = read_scan(path, Limits())
    voxels = np.asanyarray(image.dataobj)
    fault = voxel_fault(voxels)
    if fault:
        raise InputError(f"{path}: {fault}")
    with np.errstate(invalid="ignore"):  # of numbers beyond 16 bits, which are then not equal
        whole = voxels.astype(np.int16)
    return nib.Nifti1Image(whole if np.array_equal(whole, voxels) else voxels.astype(np.float32), image.affine)


def load_mask(path: str | Path, scan: Any) -> np.ndarray:
    """The voxels (X, Y, Z) of a mask that lies on the scan's grid, though it may be stored in another orientation.

    Raises:
        InputError: when it cannot be read or lies elsewhere.
    """
    stored = read_scan(path, Limits())
    mask = reoriented(stored, scan) if stored.ndim == 3 else stored
    misfit = grid_misfit(mask.shape, mask.affine, scan.shape[:3], scan.affine)
    if misfit:
        raise InputError(f"{path}: {misfit}; resample the mask to the scan")
    return np.asanyarray(mask.dataobj)


def stack_channels(paths: Sequence[str | Path]) -> Any:
    """Scans on one grid as the channels of one (X, Y, Z, C), in their order; a single one stays (X, Y, Z).

    Raises:
        InputError: when one cannot be read or lies elsewhere than the first.
    """
    scans = [load_image(path) for path in paths]
    if len(scans) == 1:
        return scans[0]
    for i, path in enumerate(paths[1:], start=1):
        scans[i] = reoriented(scans[i], scans[0])
        misfit = grid_misfit(scans[i].shape, scans[i].affine, scans[0].shape, scans[0].affine)
        if misfit:
            raise InputError(f"{path}: {misfit}, {paths[0]}; register the phases, or take --phases separate")
    return nib.Nifti1Image(np.stack([np.asarray(s.dataobj) for s in scans], axis=-1), scans[0].affine)


def save(image: Any, path: Path) -> None:
    with atomic_write(path) as partial:
        nib.save(image, partial)


def _list_cases(out: Path, about: dict, channels: Sequence[str], classes: Sequence[str], training: list[dict]) -> None:
    content = {
        **about,
        "tensorImageSize": "3D" if len(channels) == 1 else "4D",
        "modality": {str(i): c for i, c in enumerate(channels)},
        "labels": {str(i): c for i, c in enumerate(("background", *classes))},
        "numTraining": len(training),
        "training": training,
    }
    write_listing(out, content)


def write_cases(
    out: Path,
    about: dict[str, str],
    channels: Sequence[str],
    classes: Sequence[str],
    cases: Sequence[Case],
    unused: Iterable[str] = (),
) -> str:
    """Write the cases and ``dataset.json``, which lists each with its patient, by whom folds are drawn, and its phase.

    No case is listed before all are written. Files of an earlier preparation go first.

    Args:
        out: folder that :func:`check_folders` has seen.
        about: ``"name"`` of the data set and what else ``dataset.json`` is to say of it, such as its licence.
        channels: their names.
        classes: names of the labels 1, 2, ..
        cases: to be read one by one; what one raises is why it is left out.
        unused: what else was found, one reason each.

    Returns:
        a table of patients and phases and, below it, what was left out and why, which ``out/skipped.csv`` has too.

    Raises:
        InputError: when no case can be used.
    """
    _list_cases(out, about, channels, classes, [])
    for folder in ("imagesTr", "labelsTr"):
        (out / folder).mkdir(exist_ok=True)
        for file in (out / folder).glob("*.nii.gz"):
            file.unlink()
    training: list[dict] = []
    skipped: list[tuple[str, str, str]] = []
    columns = list(dict.fromkeys(phase for case in cases for phase in case.phases))
    done: dict[str, dict[str, str]] = {case.patient: dict.fromkeys(columns, "-") for case in cases}
    for case in tqdm(cases, desc="preparing", unit="case", disable=None):
        image, label = f"imagesTr/{case.name}.nii.gz", f"labelsTr/{case.name}.nii.gz"
        try:
            scan, mask = case.read()
            save(mask, out / label)
            save(scan, out / image)
        except Exception as error:  # whatever one case's files do, the others are usable
            reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            skipped.append((case.patient, " ".join(case.phases), reason))
            (out / label).unlink(missing_ok=True)
            continue
        entry = {"image": f"./{image}", "label": f"./{label}", "patient": case.patient}
        training.append(entry | ({"phase": case.phases[0]} if len(case.phases) == 1 else {}))
        done[case.patient].update(dict.fromkeys(case.phases, "yes"))
    skipped += [("", "", reason) for reason in unused]
    with atomic_write(out / "skipped.csv") as partial, open(partial, "w", newline="") as stream:
        csv.writer(stream).writerows([("patient", "phase", "reason"), *skipped])
    if not training:
        few = "; ".join(": ".join(s).strip(": ") for s in skipped[:5])
        raise InputError(f"no case can be used: {few}; {out / 'skipped.csv'} says of all why")
    _list_cases(out, about, channels, classes, training)
    table = ["| patient | " + " | ".join(columns) + " |", "| --- " * (1 + len(columns)) + "|"]
    table += [f"| {patient} | " + " | ".join(found.values()) + " |" for patient, found in done.items()]
    used = len({e["patient"] for e in training})
    table += ["", f"{len(training)} cases of {used} patients in {out}, {len(skipped)} left out (skipped.csv)"]
    return "\n".join(table + [f"- {' '.join(s[:2]).strip()}: {s[2]}".replace("- : ", "- ") for s in skipped[:30]])
