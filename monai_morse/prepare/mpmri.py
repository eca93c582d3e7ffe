"""``prepare mpmri``: multi-phasic MRI as groups have it, patients with phases and a liver mask, to the MSD layout.

A pattern says where the files are, relative to the source folder. ``{patient}`` and ``{phase}`` stand for what their names say,
``{label}`` for a word that masks are called by, ``*`` for anything within one name; extensions are left out. A series of a
folder with several goes by its number and description. ``{patient}/*{phase}*`` finds ``p01/t1_vibe_art.nii.gz``, a DICOM folder
``p01/ART``, and in a DICOM folder ``p01`` a series ``5_t1_vibe_art_tra``.
"""

from __future__ import annotations

import csv
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from tqdm import tqdm

from monai_morse.config import check_choice
from monai_morse.data.cases import claim_folder, write_listing
from monai_morse.data.checks import voxel_fault
from monai_morse.data.dicom import dicom_scans, reoriented
from monai_morse.data.files import atomic_write, scan_name
from monai_morse.data.grids import Limits, grid_misfit
from monai_morse.data.scans import read_scan
from monai_morse.errors import InputError

from .phantom import PHASES

__all__ = ["prepare_mpmri"]

NAME = "multi-phasic liver MRI, prepared by monai_morse"
PHASE_WORDS = {
    "pre": ("pre", "precontrast", "native", "nativ", "nc", "noncontrast", "plain", "unenhanced"),
    "arterial": ("arterial", "art"),
    "venous": ("venous", "ven", "portal", "portalvenous", "pv", "pvp"),
}
LABEL_WORDS = ("mask", "masks", "label", "labels", "labelstr", "seg", "segmentation", "segmentations", "gt", "roi")
PATTERNS = (
    "{patient}/{phase}",
    "{phase}/{patient}",
    "{patient}_{phase}",
    "*/{patient}_{phase}",
    "{patient}/*{phase}*",
    "{patient}/*{phase}*/*",
    "{patient}/*/*{phase}*",
)
LABEL_PATTERNS = (
    "{patient}/{label}",
    "{label}/{patient}",
    "{patient}_{label}",
    "{label}/{patient}_{label}",
    "{patient}/*{label}*",
    "{patient}/*{label}*/*",
    "{label}/{patient}_{phase}",
    "{label}/{phase}/{patient}",
    "{patient}_{phase}_{label}",
    "{patient}/{label}/*{phase}*",
    "{patient}/*{phase}*/*{label}*",
    "{patient}/*{phase}*{label}*",
    "{patient}/*{label}*{phase}*",
)
Files = dict[tuple[str, str], list[str]]  # where files lie, by patient and phase; a mask of all phases has the phase ""


class _Layout(NamedTuple):
    """Scans and masks as a pair of patterns finds them."""

    scans: Files
    masks: Files

    def mask(self, patient: str, phase: str) -> list[str]:
        return self.masks.get((patient, phase)) or self.masks.get((patient, ""), [])

    def complete(self) -> int:
        """Scans found once, with one mask."""
        return sum(len(files) == 1 == len(self.mask(*key)) for key, files in self.scans.items())


def _one_of(words: Sequence[str]) -> str:
    """A regular expression for one of the words, case aside, as a word of its own: ``art`` in ``t1_Art2``, not in ``part``."""
    spaced = {"portalvenous": "portal[ _-]*venous", "precontrast": "pre[ _-]*contrast", "noncontrast": "non[ _-]*contrast"}
    choices = "|".join(spaced.get(w, re.escape(w)) for w in sorted(words, key=len, reverse=True))
    return rf"(?<![^\W\d_])(?i:{choices})(?![^\W\d_])"


def _expression(pattern: str, phase_words: Sequence[str]) -> re.Pattern[str]:
    """What a pattern finds, as a regular expression with groups patient and phase.

    >>> _expression("{patient}/*{phase}*.nii.gz", ["art"]).fullmatch("p 01/t1_ART_2").group("patient", "phase")
    ('p 01', 'ART')
    """
    names = re.findall(r"{(.*?)}", pattern)
    if "patient" not in names or set(names) - {"patient", "phase", "label"}:
        raise InputError(f"a pattern needs {{patient}} and may have {{phase}}, {{label}} and *, got {pattern!r}")
    groups = {"patient": "[^/]+?", "phase": _one_of(phase_words), "label": _one_of([*LABEL_WORDS, "liver"])}
    expression = ""
    for part in re.split(r"({\w+}|\*)", pattern.strip("/").removesuffix(".gz").removesuffix(".nii")):
        name = part.strip("{}")
        if not part.startswith("{"):
            expression += "[^/]*?" if part == "*" else re.escape(part)
        elif f"(?P<{name}>" in expression:
            expression += f"(?P={name})"
        else:
            expression += f"(?P<{name}>{groups[name]})"
    return re.compile(expression)


def _found(pattern: str, files: Sequence[str], phases: Mapping[str, str]) -> Files:
    expression = _expression(pattern, list(phases))
    found: Files = {}
    for file in files:
        match = expression.fullmatch(file)
        if match:
            word = match.groupdict().get("phase") or ""
            key = match["patient"], phases[re.sub("[ _-]", "", word.lower())] if word else ""
            found.setdefault(key, []).append(file)
    return found


def _files(source: Path) -> dict[str, str]:
    """Paths of the NIfTI files, and addresses of the DICOM series, by where they lie in ``source``."""
    found: dict[str, str] = {}
    for place, folders, files in os.walk(source):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in sorted(files):
            if file.endswith((".nii", ".nii.gz")) and not file.startswith("."):
                found[(Path(place).relative_to(source) / scan_name(file)).as_posix()] = str(Path(place) / file)
    return found | dicom_scans(source)


def _is_mask(file: str, phase_words: Sequence[str]) -> bool:
    """By its name: a word for masks in it, or ``liver`` and no phase."""
    named_liver = re.search(_one_of(["liver"]), file) and not re.search(_one_of(phase_words), file)
    return bool(re.search(_one_of(LABEL_WORDS), file) or named_liver)


def _layout(files: Sequence[str], pattern: str | None, label_pattern: str | None, phases: Mapping[str, str]) -> _Layout:
    """The files as the patterns find them; of those not given, the usual ones that find the most complete scans."""
    if label_pattern:
        every_mask = set(itertools.chain(*_found(label_pattern, files, phases).values()))
    else:
        every_mask = {f for f in files if _is_mask(f, list(phases))}
    scans = [_found(p, [f for f in files if f not in every_mask], phases) for p in ([pattern] if pattern else PATTERNS)]
    masks = [_found(p, sorted(every_mask), phases) for p in ([label_pattern] if label_pattern else LABEL_PATTERNS)]
    layouts = [_Layout(s, m) for s, m in itertools.product(scans, masks)]
    return max(layouts, key=lambda y: (y.complete(), sum(len(files) == 1 for files in y.scans.values())))


def _scan(path: str) -> Any:
    """A scan as 16-bit integers where they hold it, else as float32."""
    image = read_scan(path, Limits())
    voxels = np.asanyarray(image.dataobj)
    fault = voxel_fault(voxels)
    if fault:
        raise InputError(f"{path}: {fault}")
    with np.errstate(invalid="ignore"):  # of numbers beyond 16 bits, which are then not equal
        whole = voxels.astype(np.int16)
    return nib.Nifti1Image(whole if np.array_equal(whole, voxels) else voxels.astype(np.float32), image.affine)


def _mask(path: str, scan: Any, values: Sequence[int] | None) -> Any:
    """The liver as 1 on the scan's grid, from a mask that may be stored in another orientation."""
    stored = read_scan(path, Limits())
    mask = reoriented(stored, scan) if stored.ndim == 3 else stored
    misfit = grid_misfit(mask.shape, mask.affine, scan.shape[:3], scan.affine)
    if misfit:
        raise InputError(f"{path}: {misfit}; resample the mask to the scan")
    classes = np.asanyarray(mask.dataobj)
    found = np.unique(classes[classes != 0]).tolist()
    if values is None and len(found) > 1:
        raise InputError(f"{path}: labels {found[:8]}; say which of them are liver, e.g. --label_values {found[0]:g}")
    liver = np.isin(classes, found if values is None else values)
    if not liver.any():
        raise InputError(f"{path}: no voxel of liver among its labels {found[:8]}")
    return nib.Nifti1Image(liver.astype(np.uint8), scan.affine)


def _channels(paths: Sequence[str]) -> Any:
    """The phases of a patient as the channels of one scan."""
    scans = [_scan(p) for p in paths]
    for i, path in enumerate(paths[1:], start=1):
        scans[i] = reoriented(scans[i], scans[0])
        misfit = grid_misfit(scans[i].shape, scans[i].affine, scans[0].shape, scans[0].affine)
        if misfit:
            raise InputError(f"{path}: {misfit}, {paths[0]}; register the phases, or take --phases separate")
    return nib.Nifti1Image(np.stack([np.asarray(s.dataobj) for s in scans], axis=-1), scans[0].affine)


def _save(image: Any, path: Path) -> None:
    with atomic_write(path) as partial:
        nib.save(image, partial)


def _once(kind: str, files: Sequence[str]) -> str:
    if not files:
        raise InputError(f"no {kind} found")
    if len(files) > 1:
        raise InputError(f"{len(files)} files for its {kind}: {', '.join(files[:4])}; give a pattern that fits one")
    return files[0]


def _check_out(source: Path, out: Path) -> None:
    if not source.is_dir():
        raise InputError(f"no folder at {source}; give the folder of the patients with --source")
    if out == source or source in out.parents or out in source.parents:
        raise InputError(f"{out} and {source} lie in one another; give another folder with --out")
    claim_folder(out, NAME, "prepared scans")


def _list_cases(out: Path, phases: str, training: list[dict]) -> None:
    channels = ["MRI"] if phases == "separate" else [f"MRI, {p}" for p in PHASES]
    content = {
        "name": NAME,
        "tensorImageSize": "3D" if phases == "separate" else "4D",
        "modality": {str(i): c for i, c in enumerate(channels)},
        "labels": {"0": "background", "1": "liver"},
        "numTraining": len(training),
        "training": training,
    }
    write_listing(out, content)


def prepare_mpmri(
    source: str | Path,
    out: str | Path,
    pattern: str | None = None,
    label_pattern: str | None = None,
    phases: str = "separate",
    label_values: Sequence[int] | None = None,
    phase_words: Mapping[str, str] | None = None,
) -> str:
    """Write the MSD layout from patients' phases and liver masks, NIfTI or DICOM; what cannot be used is left out and said.

    ``dataset.json`` lists each case with its patient, by whom folds are drawn, and its phase. Run again, it starts anew.

    Args:
        source: folder with the data, which stays as it is.
        out: folder to write: new, empty, or of an earlier preparation.
        pattern: where the scans are, e.g. ``"{patient}/{phase}.nii.gz"``, see the module; default: the usual layouts are tried.
        label_pattern: where the masks are, one a patient or, with ``{phase}``, one a scan; default: as for ``pattern``.
        phases: ``"separate"`` (default), a one-channel case each, or ``"channels"``, pre, arterial and venous of one case, for
            which a patient must have all three on one grid.
        label_values: voxels of the mask that are liver; default: all that are not 0, if they have one value.
        phase_words: further words for phases, e.g. ``{"ph1": "pre"}``.

    Returns:
        a table of the patients and, below it, what was left out and why, which ``out/skipped.csv`` has too.

    Raises:
        InputError: when nothing can be used, or for an unusable folder, pattern or word.
    """
    source, out = Path(source).resolve(), Path(out).resolve()
    check_choice("phases", phases, ("separate", "channels"))
    words = {word: phase for phase, group in PHASE_WORDS.items() for word in group}
    for word, phase in (phase_words or {}).items():
        check_choice("the phase of a word", phase, PHASES)
        words[re.sub("[ _-]", "", word.lower())] = phase
    if pattern and "{phase}" not in pattern:
        raise InputError(f"the pattern of scans needs {{phase}}, e.g. '{{patient}}/{{phase}}', got {pattern!r}")
    _check_out(source, out)
    files = _files(source)
    layout = _layout(list(files), pattern, label_pattern, words)
    patients = sorted({patient for patient, _ in layout.scans})
    if not patients:
        few = ", ".join(list(files)[:5]) or "no NIfTI file and no DICOM series"
        raise InputError(
            f"no patient with a phase found in {source}, which holds {few}. Say where scans and masks are, without extensions, "
            f"e.g. --pattern '{{patient}}/*{{phase}}*' --label_pattern '{{patient}}/mask'; phases are known by the words "
            f"{', '.join(words)}, more by --phase_words ph1=pre"
        )
    names = {p: re.sub(r"[^\w.-]+", "_", p) for p in patients}
    if len(set(names.values())) < len(names):
        raise InputError(f"patients {patients} would share file names; give them names of letters and digits")

    _list_cases(out, phases, [])
    for folder in ("imagesTr", "labelsTr"):
        (out / folder).mkdir(exist_ok=True)
        for file in (out / folder).glob("*.nii.gz"):  # an earlier preparation's
            file.unlink()
    training: list[dict] = []
    skipped: list[tuple[str, str, str]] = []
    table: list[str] = ["| patient | " + " | ".join(PHASES) + " |", "| --- " * (1 + len(PHASES)) + "|"]
    for patient in tqdm(patients, desc="patients", unit="patient", disable=None):
        done = dict.fromkeys(PHASES, "yes")
        for group in [PHASES] if phases == "channels" else [(p,) for p in PHASES]:
            case = names[patient] if phases == "channels" else f"{names[patient]}_{group[0]}"
            image, label = f"imagesTr/{case}.nii.gz", f"labelsTr/{case}.nii.gz"
            try:
                paths = [files[_once(f"{p} scan", layout.scans.get((patient, p), []))] for p in group]
                mask_path = files[_once("mask", layout.mask(patient, group[0]))]
                scan = _scan(paths[0]) if phases == "separate" else _channels(paths)
                mask = _mask(mask_path, scan, label_values)
                _save(mask, out / label)
                _save(scan, out / image)
            except Exception as error:  # whatever one patient's files do, the others are usable
                reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
                skipped.append((patient, " ".join(group), reason))
                done.update(dict.fromkeys(group, "-"))
                continue
            entry = {"image": f"./{image}", "label": f"./{label}", "patient": patient}
            training.append(entry | ({"phase": group[0]} if phases == "separate" else {}))
        table.append(f"| {patient} | " + " | ".join(done.values()) + " |")
    known = set(itertools.chain(*layout.scans.values(), *layout.masks.values()))
    skipped += [("", "", f"{file}: neither a scan nor a mask by the patterns") for file in files if file not in known]
    with atomic_write(out / "skipped.csv") as partial, open(partial, "w", newline="") as stream:
        csv.writer(stream).writerows([("patient", "phase", "reason"), *skipped])
    if not training:
        few = "; ".join(": ".join(s).strip(": ") for s in skipped[:5])
        raise InputError(f"no case can be used: {few}; {out / 'skipped.csv'} says of all why")
    _list_cases(out, phases, training)
    used = len({e["patient"] for e in training})
    table += ["", f"{len(training)} cases of {used} patients in {out}, {len(skipped)} left out (skipped.csv)"]
    return "\n".join(table + [f"- {' '.join(s[:2]).strip()}: {s[2]}".replace("- : ", "- ") for s in skipped[:30]])
