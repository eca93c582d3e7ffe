"""DICOM series as scans: their slices placed by the slices' own tags, which pydicom reads, their voxels decoded by ITK.

A scan is a path. A DICOM series is many files, and a folder may hold several, so a series goes by an address:
``FOLDER/SERIES/NAME.dicom``, the folder of its files, its SeriesInstanceUID, and the name for what is made of it. No such file
exists; :class:`monai_morse.data.ScanReader` reads it.

CT, MR and PET are read, as a file a slice or as one multi-frame file with functional groups (``READ``).
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pydicom
from monai.data import ITKReader
from monai.utils import optional_import
from nibabel.orientations import io_orientation, ornt_transform
from pydicom.uid import UID

from monai_morse.errors import InputError

from .grids import Limits, affine_fault, grid_misfit

itk, _ = optional_import("itk")

__all__ = ["dicom_scans", "is_dicom_scan", "read_series", "reoriented", "series_planes"]

logger = logging.getLogger(__name__)

SUFFIX = ".dicom"
NO_IMAGES = ("SEG", "RTSTRUCT", "RTPLAN", "RTDOSE", "SR", "PR", "KO", "DOC")  # modalities of objects that are no scans
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
STORAGE = "1.2.840.10008.5.1.4.1.1."
SLICES = tuple(STORAGE + n for n in ("2", "4", "128"))
"""CT, MR and PET Image Storage"""
READ = SLICES + tuple(STORAGE + n for n in ("2.1", "4.1", "130", "2.2", "4.4", "128.1"))
"""SOP classes that are read: those, their enhanced and their legacy converted enhanced forms"""
TITLE = ("SeriesNumber", "SeriesDescription")
IDENTITY = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "Modality", *TITLE)
PIXELS = ("ImageType", "Rows", "Columns", "SamplesPerPixel", "NumberOfFrames", "FrameOfReferenceUID")
PLACE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SpacingBetweenSlices", "SliceThickness")
GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")


class Plane(NamedTuple):
    """A slice: its file, its frame of it, and where it lies, in mm in DICOM's LPS coordinates."""

    file: str
    frame: int
    kind: str  # what all slices of a scan have in common
    position: np.ndarray  # (3,) of the first voxel's centre
    along: np.ndarray  # (2, 3) directions in which columns and rows are counted
    spacing: np.ndarray  # (2,) between columns and between rows
    thickness: float  # to the next slice, where there is one; 0: not told


def is_dicom_scan(path: str | Path) -> bool:
    """Whether a scan's path is the address of a DICOM series.

    >>> is_dicom_scan("p1/art/1.2.840/p1_art.dicom"), is_dicom_scan("p1/art.nii.gz")
    (True, False)
    """
    return str(path).endswith(SUFFIX)


def _header(file: str | Path) -> pydicom.Dataset:
    return pydicom.dcmread(file, stop_before_pixels=True, specific_tags=[*IDENTITY, *PIXELS, *PLACE, *GROUPS])


def sop_class_of(header: pydicom.Dataset) -> UID:
    """By the file's meta data where anonymising has left it blank."""
    return UID(str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID", "")))


# --- which series there are


class _Identity(NamedTuple):
    """What a file is."""

    left_out: str  # why it belongs to no scan; "": it does
    series: str = ""
    instance: str = ""
    number: str = ""
    text: str = ""


SILENT, UNREAD, CAPTURE = "of no image", "without a readable image", "that are secondary captures"
Series = dict[str, dict[str, _Identity]]  # files by the series' identifier


@lru_cache(maxsize=2**16)
def _identity(file: str, *version: int) -> _Identity:
    with open(file, "rb") as stream:
        start = stream.read(132)
    # the mark of part 10 of the standard, or a first tag without it; names say nothing
    if start[128:] != b"DICM" and not (start[:2] in (b"\x02\0", b"\x08\0") and start[3:4] == b"\0"):
        return _Identity(SILENT)
    try:
        header = _header(file)
        instance, number, text = (str(header.get(tag) or "").strip() for tag in ("SOPInstanceUID", *TITLE))
        series = str(header.SeriesInstanceUID or f"series{number}")  # blanked: anonymised
    except Exception:  # pydicom has many
        return _Identity(UNREAD)
    if sop_class_of(header) == SECONDARY_CAPTURE:
        return _Identity(CAPTURE)
    if header.get("Modality") in NO_IMAGES or "Rows" not in header:
        return _Identity(SILENT)
    return _Identity("" if re.fullmatch(r"[\w.]+", series) else UNREAD, series, instance, number, text)


def _series_in(folder: Path) -> tuple[Series, dict[str, list[str]]]:
    """The images right in a folder, and the names of DICOM files left out, by why."""
    series: Series = {}
    left_out: dict[str, list[str]] = {SILENT: [], UNREAD: [], CAPTURE: []}
    for entry in sorted(os.scandir(folder), key=lambda e: e.name) if folder.is_dir() else []:
        no_scan = entry.name == "DICOMDIR" or entry.name.startswith(".") or entry.name.lower().endswith((".nii", ".nii.gz"))
        if no_scan or not entry.is_file():
            continue
        status = entry.stat()
        found = _identity(entry.path, status.st_mtime_ns, status.st_size)
        if found.left_out:
            left_out[found.left_out].append(entry.name)
        else:
            series.setdefault(found.series, {})[entry.path] = found
    del left_out[SILENT]
    return series, left_out


def _titles(series: Series) -> list[tuple[str, str]]:
    """The series of a folder: identifier, and number and description where there are several."""
    if len(series) == 1:
        return [(next(iter(series)), "")]
    found = []
    for uid, files in series.items():
        first = next(iter(files.values()))
        title = re.sub(r"\W+", "_", f"{first.number}_{first.text}").strip("_")
        found.append((first.number.zfill(8), title, uid))
    found.sort()
    titles = [title for _, title, _ in found]
    return [(s, t if t and titles.count(t) == 1 else f"{t}_{i}".strip("_")) for i, (_, t, s) in enumerate(found, start=1)]


def dicom_scans(root: str | Path) -> dict[str, str]:
    """All DICOM series in a folder and the folders in it: their addresses by where they lie.

    That is the folder of their files, ``p1/art``, and where it holds several series, number and description as if they were
    folders, ``p1/5_t1_vibe_art``. The address ends in the same with underscores: ``../p1_art.dicom``. Files need no extension;
    objects that are no images (segmentations, structure sets, reports) are left out, secondary captures with a warning.

    Args:
        root: the folder.
    """
    root = Path(root).resolve()
    scans: dict[str, str] = {}
    seen: dict[str, tuple[Path, set[str]]] = {}
    for place, folders, _ in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        folder = Path(place)
        series, left_out = _series_in(folder)
        for why, names in left_out.items():
            if names:  # not in silence
                logger.warning("%s: %d DICOM file(s) %s are left out, such as %s", folder, len(names), why, names[0])
        for uid, title in _titles(series) if series else []:
            parts = [*folder.relative_to(root).parts, *([title] if title else [])] or [root.name]
            scans["/".join(parts)] = str(folder / uid / f"{'_'.join(parts)}{SUFFIX}")
            slices = {found.instance for found in series[uid].values()}
            elsewhere, others = seen.setdefault(uid, (folder, slices))
            if elsewhere != folder and not slices & others:
                logger.warning(
                    "%s and %s hold parts of one series, each taken for a scan: put its files together", elsewhere, folder
                )
    return scans


# --- where its slices lie


def _numbers(header: pydicom.Dataset, tag: str, count: int, file: str) -> np.ndarray:
    try:
        numbers = np.array(header[tag].value, float).reshape(-1)
    except (KeyError, TypeError, ValueError):
        numbers = np.empty(0)
    if numbers.size != count or not np.isfinite(numbers).all():
        raise InputError(
            f"{Path(file).name} has no usable {tag}; geometry is never guessed: restore the tag or leave the scan out"
        )
    return numbers


def _plane(file: str, frame: int, kind: str, place: pydicom.Dataset) -> Plane:
    """A slice from a data set that has the tags of ``PLACE``."""
    position, directions = (
        _numbers(place, tag, n, file) for tag, n in (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6))
    )
    spacing = _numbers(place, "PixelSpacing", 2, file)[::-1]  # DICOM gives that between rows first
    along = directions.reshape(2, 3)
    lengths = np.linalg.norm(along, axis=1)
    if not np.allclose(lengths, 1, atol=1e-2) or abs(along[0] @ along[1]) > 1e-2:
        raise InputError(f"{Path(file).name}: ImageOrientationPatient {directions} are no directions at right angles")
    thickness = place.get("SpacingBetweenSlices") or place.get("SliceThickness") or 0
    return Plane(file, frame, kind, position, along / lengths[:, None], spacing, float(thickness))


def _planes_of(file: str, header: pydicom.Dataset) -> Iterator[Plane]:
    """The slices of a file."""
    name, frames = Path(file).name, int(header.get("NumberOfFrames") or 1)
    sop_class = sop_class_of(header)
    if sop_class not in READ:
        raise InputError(f"{name} is of {sop_class.name or 'no SOP class'}, which is not read; CT, MR and PET images are")
    if header.get("SamplesPerPixel", 1) != 1:
        raise InputError(f"{name} is in colour; a scan has one number a voxel")
    kind = f"{sop_class.name}, {header.get('Rows')} rows, {header.get('Columns')} columns, "
    kind += f"frame of reference {header.get('FrameOfReferenceUID') or 'not told'}, "
    if sop_class in SLICES and frames == 1:
        yield _plane(file, 0, kind + _image_type(header.get("ImageType")), header)
        return
    shared, each = (header.get(tag) or [] for tag in GROUPS)
    if len(shared) > 1 or len(each) != frames:
        raise InputError(
            f"{name} has {frames} frames and {len(each)} functional groups that place them; geometry is never guessed"
        )
    for number, own in enumerate(each):
        place, told = pydicom.Dataset(), list[str]()
        for group in [g for groups in (*shared, own) for g in groups if g.VR == "SQ" and g.value]:
            content = group.value[0]
            place.update({e.tag: e for e in content if e.keyword in PLACE})
            # of the kind, too: ITK rescales all frames as the first
            told += [f"{tag} {content[tag].value}" for tag in ("RescaleSlope", "RescaleIntercept") if tag in content]
            told += [_image_type(content.FrameType)] if "FrameType" in content else []
        yield _plane(file, number, kind + ", ".join(told), place)


def _image_type(value: Any) -> str:
    words = [value] if isinstance(value, str) else list(value or [])
    return "\\".join(words[:3]) or "no ImageType"  # those after are the maker's own


def series_planes(address: str | Path) -> list[Plane]:
    """The slices of a series from its first to its last along their normal, all of one kind, parallel and evenly spaced.

    Raises:
        InputError: when there are none, or they are not; naming a file where it is one's fault.
    """
    path = Path(address)
    folder, uid = path.parents[1], path.parent.name
    files = _series_in(folder)[0].get(uid, {})
    if not files:
        raise InputError(f"no DICOM series {uid} in {folder}; restore its files")
    planes = [plane for file in files for plane in _planes_of(file, _header(file))]
    if len(files) > 1 and len(planes) > len(files):
        raise InputError(f"{len(files)} files, some with several frames, are no one stack of slices; split the series")
    (common, count), *others = Counter(p.kind for p in planes).most_common()
    if others:
        odd = next(p for p in planes if p.kind != common)
        raise InputError(
            f"not all slices are of one kind: {Path(odd.file).name}{f', frame {odd.frame + 1},' if odd.frame else ''} is "
            f"{odd.kind}, {count} of {len(planes)} are {common}; leave it out or split the series"
        )
    first = planes[0]
    for plane in planes:
        for name, tag in (("along", "ImageOrientationPatient"), ("spacing", "PixelSpacing")):
            if not np.allclose(getattr(plane, name), getattr(first, name), rtol=1e-3, atol=1e-3):
                places = f"{Path(first.file).name} and {Path(plane.file).name}"
                raise InputError(f"{places} differ in {tag}; slices of a scan are parallel and alike: split the series")
    normal = np.cross(*first.along)
    planes.sort(key=lambda p: p.position @ normal)
    return planes


def _affine(planes: list[Plane]) -> np.ndarray:
    """Voxel indices (column, row, slice) to mm in RAS coordinates."""
    first, last = planes[0], planes[-1]
    normal = np.cross(*first.along)
    step = (last.position - first.position) @ normal / (len(planes) - 1) if len(planes) > 1 else first.thickness
    if step <= 0 and len(planes) == 1:
        raise InputError("one slice alone that tells no SliceThickness; geometry is never guessed: restore the tag")
    expected = first.position + np.arange(len(planes))[:, None] * step * normal
    off = np.array([p.position for p in planes]) - expected
    uneven = np.abs(off @ normal).max()
    if uneven > 0.1 * step or step <= 0:
        raise InputError(
            f"its {len(planes)} slices are not evenly spaced (off by up to {uneven:.3g} mm): one is missing or there "
            "twice, or several phases share one series; complete or split it"
        )
    aside = np.linalg.norm(off - np.outer(off @ normal, normal), axis=1).max()
    if aside > 0.1 * first.spacing.min():
        raise InputError(
            f"its slices do not lie on one line along their normal (off by up to {aside:.3g} mm), as with a tilted gantry; "
            "resample it to an upright volume"
        )
    affine = np.eye(4)
    affine[:3, :3] = np.stack([first.along[0] * first.spacing[0], first.along[1] * first.spacing[1], normal * step], axis=1)
    affine[:3, 3] = first.position
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


# --- its voxels


def read_series(address: str | Path, limits: Limits | None = None) -> nib.Nifti1Image:
    """The series of an address as NIfTI in RAS coordinates, its voxels rescaled to its own units (float32).

    Args:
        address: of the series.
        limits: what a plausible scan is, asked before its voxels are read; default: any.

    Raises:
        InputError: for a series that is no regular stack of slices of one kind, whose tags do not tell where they lie, whose
            voxels cannot be decoded or lie elsewhere by ITK, or that is beyond the limits.
    """
    planes = series_planes(address)
    affine = _affine(planes)
    files = list(dict.fromkeys(p.file for p in planes))
    header = _header(files[0])
    shape = (int(header.Columns), int(header.Rows), len(planes))
    fault = affine_fault(affine) or (limits and limits.fault(shape, affine))
    if fault:
        raise InputError(fault)
    try:  # in float32: not as the first slice, slices may be scaled differently
        voxels, meta = ITKReader().get_data(itk.imread(files if len(files) > 1 else files[0], pixel_type=itk.F))
    except Exception as error:  # ITK's, of many lines
        broken = next((Path(f).name for f in files if f in str(error)), "a file")
        raise InputError(f"{broken} of its {len(files)} files cannot be decoded, truncated or damaged; restore it") from error
    order = [p.frame for p in planes] if len(files) == 1 else list(range(len(planes)))
    misfit = grid_misfit(voxels.shape, meta["affine"], shape, affine) if order == sorted(order) else None
    if misfit or voxels.shape != shape:
        raise InputError(f"its voxels as ITK places them are not where the tags of its slices are ({misfit or voxels.shape})")
    return nib.Nifti1Image(np.asarray(voxels, np.float32)[..., order], affine, nib.Nifti1Header())


def reoriented(image: Any, like: Any) -> Any:
    """An image with its axes flipped and swapped to point as those of another; voxels keep their places in the world."""
    turn = ornt_transform(io_orientation(image.affine), io_orientation(like.affine))
    return image.as_reoriented(turn)
