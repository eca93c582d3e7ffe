"""``prepare mpmri``: multi-phasic MRI as groups have it, patients with phases and masks of organs, to the MSD layout.

A pattern says where the files are, relative to the source folder. ``{patient}`` and ``{phase}`` stand for what their names say,
``{label}`` for a word that masks are called by, ``*`` for anything within one name; extensions are left out. A series of a
folder with several goes by its number and description. ``{patient}/*{phase}*`` finds ``p01/t1_vibe_art.nii.gz``, a DICOM folder
``p01/ART``, and in a DICOM folder ``p01`` a series ``5_t1_vibe_art_tra``.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np

from monai_morse.config import check_choice
from monai_morse.data.dicom import dicom_scans
from monai_morse.data.files import is_nifti, scan_name
from monai_morse.errors import InputError

from .msd import Case, check_folders, load_mask, stack_channels, write_cases

__all__ = ["prepare_mpmri"]

NAME = "multi-phasic liver MRI, prepared by monai_morse"
PHASE_WORDS = {
    "pre": ("pre", "pre contrast", "native", "nativ", "nc", "non contrast", "plain", "unenhanced"),
    "arterial": ("arterial", "art"),
    "venous": ("venous", "ven", "portal", "portal venous", "pv", "pvp"),
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


def _plain(word: str) -> str:
    return re.sub("[ _-]", "", word.lower())


def _one_of(words: Iterable[str]) -> str:
    """A regular expression for one of the words, case and separators aside, as a word of its own.

    >>> [bool(re.search(_one_of(["art", "late ven", "ph1"]), n)) for n in ("t1_Art2", "part", "LATE_ven", "ph1", "ph12")]
    [True, False, True, True, False]
    """
    choices = []
    for word in sorted(words, key=len, reverse=True):
        spelled = "[ _-]*".join(re.escape(part) for part in re.split("[ _-]+", word) if part)
        before, after = (r"(?<!\d)" if word[:1].isdigit() else "", r"(?!\d)" if word[-1:].isdigit() else "")
        choices.append(f"{before}{spelled}{after}")
    return rf"(?<![^\W\d_])(?i:{'|'.join(choices)})(?![^\W\d_])"


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
    known = {_plain(word): phase for word, phase in phases.items()}
    found: Files = {}
    for file in files:
        match = expression.fullmatch(file)
        if match:
            word = match.groupdict().get("phase") or ""
            key = match["patient"], known[_plain(word)] if word else ""
            found.setdefault(key, []).append(file)
    return found


def _files(source: Path) -> dict[str, str]:
    """Paths of the NIfTI files, and addresses of the DICOM series, by where they lie in ``source``."""
    found: dict[str, str] = {}
    for place, folders, files in os.walk(source):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in sorted(files):
            if is_nifti(file):
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


def _classes(label_values: Mapping[str, Any] | Sequence[int | str] | None) -> dict[str, tuple[int, ...]]:
    """Values of a mask by the name of their class; none where they are not said.

    >>> _classes([5]), _classes(["liver=5", "kidneys=2,3"]), _classes(None)
    ({'liver': (5,)}, {'liver': (5,), 'kidneys': (2, 3)}, {'liver': ()})
    """
    if label_values is None:
        return {"liver": ()}
    if not isinstance(label_values, Mapping):
        words = [str(v) for v in label_values]
        if len({"=" in w for w in words}) != 1:
            raise InputError(f"--label_values takes values of the liver, 5 6, or named ones, liver=5 spleen=1, got {words}")
        label_values = dict(w.split("=", 1) for w in words) if "=" in words[0] else {"liver": words}
    try:
        classes = {n: tuple(int(w) for w in re.findall(r"[^\s,'()\[\]]+", str(v))) for n, v in label_values.items()}
    except ValueError as error:
        raise InputError(f"values of labels are whole numbers, as in liver=5 kidneys=2,3; got {label_values}") from error
    values = [v for c in classes.values() for v in c]
    if not all(classes) or not all(classes.values()) or len(set(values)) < len(values) or min(values) < 1:
        raise InputError(f"each class needs a name and values of its own, not 0, as in liver=5 kidneys=2,3; got {classes}")
    return classes


def _label(path: str, scan: Any, classes: Mapping[str, Sequence[int]]) -> Any:
    """The classes as 1, 2, .. on the scan's grid."""
    mask = load_mask(path, scan)
    found = np.unique(mask[mask != 0]).tolist()
    if len(found) > 1 and not all(classes.values()):
        example = f"--label_values {found[0]:g}, or name several, liver={found[0]:g} spleen={found[1]:g}"
        raise InputError(f"{path}: labels {found[:8]}; say which of them are liver, e.g. {example}")
    label = np.zeros(mask.shape, np.uint8)
    for number, values in enumerate(classes.values(), start=1):
        label[np.isin(mask, values or found)] = number
    if not label.any():
        raise InputError(f"{path}: no voxel of {' or '.join(classes)} among its labels {found[:8]}")
    return nib.Nifti1Image(label, scan.affine)


def _once(kind: str, files: Sequence[str]) -> str:
    if not files:
        raise InputError(f"no {kind} found")
    if len(files) > 1:
        raise InputError(f"{len(files)} files for its {kind}: {', '.join(files[:4])}; give a pattern that fits one")
    return files[0]


def _read(
    files: Mapping[str, str], layout: _Layout, classes: Mapping[str, Sequence[int]], patient: str, phases: Sequence[str]
) -> tuple[Any, Any]:
    paths = [files[_once(f"{p} scan", layout.scans.get((patient, p), []))] for p in phases]
    mask = files[_once("mask", layout.mask(patient, phases[0]))]
    scan = stack_channels(paths)
    return scan, _label(mask, scan, classes)


def _words(phase_words: Mapping[str, str] | None) -> dict[str, str]:
    """The words that phases are known by, those of the user last: their phases."""
    words = {word: phase for phase, group in PHASE_WORDS.items() for word in group}
    for word, phase in (phase_words or {}).items():
        if not _plain(word) or not re.fullmatch(r"[\w.-]+", phase):
            raise InputError(
                f"--phase_words takes a word of the files' names and the phase it means, del=delayed, got {word!r}={phase!r}"
            )
        words = {w: p for w, p in words.items() if _plain(w) != _plain(word)} | {word: phase}
    return words


def prepare_mpmri(
    source: str | Path,
    out: str | Path,
    pattern: str | None = None,
    label_pattern: str | None = None,
    phases: str = "separate",
    label_values: Mapping[str, Any] | Sequence[int | str] | None = None,
    phase_words: Mapping[str, str] | None = None,
) -> str:
    """Write the MSD layout from patients' phases, NIfTI or DICOM, and masks; what cannot be used is left out and said.

    ``dataset.json`` lists each case with its patient, by whom folds are drawn, and its phase. Run again, it starts anew.

    Args:
        source: folder with the data, which stays as it is.
        out: folder to write: new, empty, or of an earlier preparation.
        pattern: where the scans are, e.g. ``"{patient}/{phase}.nii.gz"``, see the module; default: the usual layouts are tried.
        label_pattern: where the masks are, one a patient or, with ``{phase}``, one a scan; default: as for ``pattern``.
        phases: ``"separate"`` (default), a one-channel case each, or ``"channels"``, all phases found as the channels of one
            case, for which a patient must have all on one grid.
        label_values: voxels of the mask that are liver, ``[5]``, or those of several classes by name, ``{"liver": 5,
            "kidneys": [2, 3]}`` or ``["liver=5", "kidneys=2,3"]``, which become labels 1, 2, ..; default: all that are not 0
            are liver, if they have one value.
        phase_words: further words for phases, of these or of any other name, e.g. ``{"ph1": "pre", "del": "delayed"}``;
            without them pre, arterial and venous are known.

    Returns:
        a table of the patients and, below it, what was left out and why, which ``out/skipped.csv`` has too.

    Raises:
        InputError: when nothing can be used, or for an unusable folder, pattern or word.
    """
    source, out = Path(source).resolve(), Path(out).resolve()
    check_choice("phases", phases, ("separate", "channels"))
    words, classes = _words(phase_words), _classes(label_values)
    if pattern and "{phase}" not in pattern:
        raise InputError(f"the pattern of scans needs {{phase}}, e.g. '{{patient}}/{{phase}}', got {pattern!r}")
    check_folders(source, out, NAME)
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
    found = [p for p in dict.fromkeys(words.values()) if any(phase == p for _, phase in layout.scans)]
    cases = [
        Case(names[patient] if phases == "channels" else f"{names[patient]}_{group[0]}", patient, group, read)
        for patient in patients
        for group in ([tuple(found)] if phases == "channels" else [(p,) for p in found])
        for read in [partial(_read, files, layout, classes, patient, group)]
    ]
    known = set(itertools.chain(*layout.scans.values(), *layout.masks.values()))
    unused = [f"{file}: neither a scan nor a mask by the patterns" for file in files if file not in known]
    channels = ["MRI"] if phases == "separate" else [f"MRI, {p}" for p in found]
    return write_cases(out, {"name": NAME}, channels, list(classes), cases, unused)
