"""DICOM series as scans, read by ITK through MONAI's ``ITKReader``.

A scan is a path. A DICOM series is many files, and a folder may hold several, so a series goes by an address:
``FOLDER/SERIES/NAME.dicom``, the folder of its files, ITK's identifier of it there, and the name for what is made of it. No
such file exists; :class:`ScanReader` reads it.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.data import ITKReader, NibabelReader
from monai.utils import ensure_tuple, optional_import
from nibabel.orientations import io_orientation, ornt_transform

from monai_morse.errors import InputError

itk, _ = optional_import("itk")

__all__ = ["ScanReader", "dicom_scans", "is_dicom_scan", "read_scan", "reoriented", "series_files"]

logger = logging.getLogger(__name__)

SUFFIX = ".dicom"
NO_IMAGES = ("SEG", "RTSTRUCT", "RTPLAN", "RTDOSE", "SR", "PR", "KO", "DOC")  # modalities of objects that are no scans


def is_dicom_scan(path: str | Path) -> bool:
    """Whether a scan's path is the address of a DICOM series.

    >>> is_dicom_scan("p1/art/1.2.840/p1_art.dicom"), is_dicom_scan("p1/art.nii.gz")
    (True, False)
    """
    return str(path).endswith(SUFFIX)


def _is_dicom_file(path: Path) -> bool:
    """By the mark that part 10 of the standard puts at byte 128; names say nothing."""
    if path.name.startswith(".") or path.name.endswith((".nii", ".nii.gz")) or not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def _names(folder: Path) -> Any:
    # the settings of MONAI's ITKReader, which then finds the same series by the same identifiers
    names = itk.GDCMSeriesFileNames.New()
    names.SetUseSeriesDetails(True)
    names.AddSeriesRestriction("0008|0021")
    names.SetDirectory(str(folder))
    return names


def _tag(file: str, tag: str) -> str:
    header = itk.GDCMImageIO.New()
    header.SetFileName(file)
    header.ReadImageInformation()
    content = header.GetMetaDataDictionary()
    return str(content[tag]).strip() if content.HasKey(tag) else ""


def _series_in(folder: Path, files: set[str]) -> list[tuple[str, str]]:
    """The series of files right in a folder: identifier, and number and description where there are several."""
    names, unread = _names(folder), set(files)
    found: list[tuple[str, str, str]] = []
    for series in names.GetSeriesUIDs():
        first, *more = names.GetFileNames(series)
        unread -= {first, *more}
        try:
            modality, number, text = (_tag(first, tag) for tag in ("0008|0060", "0020|0011", "0008|103e"))
        except RuntimeError:  # a scan all the same: read_scan says what is wrong with it
            modality, number, text = "", "", ""
        if modality not in NO_IMAGES:
            found.append((number.zfill(8), re.sub(r"\W+", "_", f"{number}_{text}").strip("_"), series))
    if unread:  # which ITK leaves out in silence
        name = Path(min(unread)).name
        logger.warning("%s: %d DICOM file(s) without a readable image are left out, such as %s", folder, len(unread), name)
    if len(found) == 1:
        return [(found[0][2], "")]
    found.sort()
    titles = [title for _, title, _ in found]
    return [(s, t if t and titles.count(t) == 1 else f"{t}_{i}".strip("_")) for i, (_, t, s) in enumerate(found, start=1)]


def dicom_scans(root: str | Path) -> dict[str, str]:
    """All DICOM series in a folder and the folders in it: their addresses by where they lie.

    That is the folder of their files, ``p1/art``, and where it holds several series, number and description as if they were
    folders, ``p1/5_t1_vibe_art``. The address ends in the same with underscores: ``../p1_art.dicom``. Files need no extension;
    objects that are no images (segmentations, structure sets, reports) are left out.

    Args:
        root: the folder.
    """
    root = Path(root).resolve()
    scans: dict[str, str] = {}
    for place, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        folder = Path(place)
        present = {str(folder / f) for f in files if f != "DICOMDIR" and _is_dicom_file(folder / f)}
        if not present:
            continue
        for series, title in _series_in(folder, present):
            parts = [*folder.relative_to(root).parts, *([title] if title else [])] or [root.name]
            scans["/".join(parts)] = str(folder / series / f"{'_'.join(parts)}{SUFFIX}")
    return scans


def series_files(address: str | Path) -> list[str]:
    """Files of a series, in the order of its slices.

    Raises:
        InputError: when there are none.
    """
    path = Path(address)
    files = list(_names(path.parents[1]).GetFileNames(path.parent.name)) if path.parents[1].is_dir() else []
    if not files:
        raise InputError(f"no DICOM series {path.parent.name} in {path.parents[1]}; restore its files")
    return files


def read_scan(path: str | Path) -> nib.Nifti1Image:
    """A scan as NIfTI, in RAS world coordinates: a NIfTI file, or the DICOM series of an address.

    A series' voxels keep their order, rescaled to its own units (float32).

    Args:
        path: NIfTI file or address.

    Raises:
        InputError: for a series that is no regular stack of slices, such as one with a slice missing, or localisers.
    """
    if not is_dicom_scan(path):
        return nib.load(path)
    files = series_files(path)
    folder, series = Path(path).parents[1], Path(path).parent.name
    reader = ITKReader(series_name=series, pixel_type=itk.F)  # not the first slice's type: slices may be scaled differently
    image = reader.read(folder)
    uneven = image.GetMetaDataDictionary()
    if uneven.HasKey("ITK_non_uniform_sampling_deviation"):
        gap, spacing = float(uneven["ITK_non_uniform_sampling_deviation"]), float(image.GetSpacing()[2])
        if gap > 0.1 * spacing:
            raise InputError(
                f"its {len(files)} slices are not evenly spaced (off by up to {gap:.3g} mm): one is missing or there "
                "twice, or several phases share one series; complete or split it"
            )
    voxels, meta = reader.get_data(image)
    return nib.Nifti1Image(np.asarray(voxels, np.float32), meta["affine"])


def reoriented(image: Any, like: Any) -> Any:
    """An image with its axes flipped and swapped to point as those of another; voxels keep their places in the world."""
    turn = ornt_transform(io_orientation(image.affine), io_orientation(like.affine))
    return image.as_reoriented(turn)


class ScanReader(NibabelReader):
    """Reader of ``LoadImage`` for scans as :func:`scans_in` lists them: NIfTI files and DICOM series.

    Use it as ``LoadImaged(keys="image", reader=ScanReader)``.
    """

    def verify_suffix(self, filename: Any) -> bool:
        return all(is_dicom_scan(f) or super(ScanReader, self).verify_suffix(f) for f in ensure_tuple(filename))

    def read(self, data: Any, **kwargs: Any) -> Any:
        paths = ensure_tuple(data)
        if not any(is_dicom_scan(p) for p in paths):
            return super().read(data, **kwargs)
        self.filenames = paths
        images = [read_scan(p) for p in paths]
        return images if len(images) > 1 else images[0]
