"""``prepare liverhccseg``: LiverHccSeg as downloaded, multi-phasic MRI of patients with liver cancer, to the MSD layout.

``nifti_and_segms/PATIENT/DATE`` holds ``art.nii.gz`` and, registered to it, ``art_pre``, ``art_pv`` and ``art_del``; the masks
of two readers, ``rater1_liver``, and of each tumor, ``rater1_tumor1``. ``pre``, ``pv`` and ``del`` are the phases before they
were registered, on which the masks do not lie: they are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from monai_morse.config import check_choice
from monai_morse.errors import InputError

from .msd import Case, check_folders, load_mask, stack_channels, write_cases

__all__ = ["prepare_liverhccseg"]

ABOUT = {
    "name": "LiverHccSeg, prepared by monai_morse",
    "licence": "CC BY 4.0",
    "reference": "Gross et al., LiverHccSeg, Data in Brief 51 (2023); https://doi.org/10.5281/zenodo.8179129",
}
PHASES = {"pre": "art_pre", "arterial": "art", "venous": "art_pv", "delayed": "art_del"}


def _read(exam: Path, phases: Sequence[str], rater: int, classes: Sequence[str]) -> tuple[Any, Any]:
    paths = [exam / f"{PHASES[phase]}.nii.gz" for phase in phases]
    scan = stack_channels(paths)
    liver = load_mask(exam / f"rater{rater}_liver.nii.gz", scan) != 0
    if not liver.any():
        raise InputError(f"{exam}: no voxel of liver in the mask of rater {rater}")
    label = liver.astype(np.uint8)
    for tumor in sorted(exam.glob(f"rater{rater}_tumor*.nii.gz")):
        label[load_mask(tumor, scan) != 0] = len(classes)
    return scan, nib.Nifti1Image(label, scan.affine)


def prepare_liverhccseg(
    source: str | Path, out: str | Path, phases: str = "separate", rater: int = 1, tumor: bool = False
) -> str:
    """Write the MSD layout from LiverHccSeg's NIfTI archive as downloaded; what cannot be used is left out and said.

    ``dataset.json`` lists each case with its patient, by whom folds are drawn, and its phase: pre, arterial, venous, delayed.
    A phase whose grid is not the masks' is left out. Run again, it starts anew.

    Args:
        source: the folder that ``nifti_and_segms.zip`` was unpacked to, or one in it; it stays as it is.
        out: folder to write: new, empty, or of an earlier preparation.
        phases: ``"separate"`` (default), a one-channel case each, or ``"channels"``, the four phases as channels of one case.
        rater: whose masks, 1 (default) or 2.
        tumor: tumors as a class of their own, label 2; default False: they are liver.

    Returns:
        a table of the patients and, below it, what was left out and why, which ``out/skipped.csv`` has too.

    Raises:
        InputError: when nothing can be used, or for an unusable folder or word.
    """
    source, out = Path(source).resolve(), Path(out).resolve()
    check_choice("phases", phases, ("separate", "channels"))
    if rater not in (1, 2):
        raise InputError(f"rater must be 1 or 2, got {rater!r}")
    check_folders(source, out, ABOUT["name"])
    exams = sorted({p.parent for name in ("art.nii.gz", "rater?_liver.nii.gz") for p in source.rglob(name)})
    if not exams:
        raise InputError(f"no art.nii.gz and no rater1_liver.nii.gz in {source}; give the folder of nifti_and_segms.zip")
    patients = [exam.parent.name for exam in exams]
    classes = ["liver", "tumor"] if tumor else ["liver"]
    cases = []
    for exam, patient in zip(exams, patients):
        name = patient if patients.count(patient) == 1 else f"{patient}_{exam.name}"
        for group in [tuple(PHASES)] if phases == "channels" else [(p,) for p in PHASES]:
            case = name if phases == "channels" else f"{name}_{group[0]}"
            cases.append(Case(case, patient, group, partial(_read, exam, group, rater, classes)))
    channels = [f"MRI, {p}" for p in PHASES] if phases == "channels" else ["MRI"]
    return write_cases(out, ABOUT, channels, classes, cases)
