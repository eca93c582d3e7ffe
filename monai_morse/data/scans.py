"""Reading a scan, NIfTI file or DICOM series, in the one way in which all of this package reads it: with its own affine."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Hashable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.config import KeysCollection
from monai.data import NibabelReader
from monai.transforms import LoadImaged
from monai.utils import ensure_tuple
from nibabel.spatialimages import HeaderDataError

from monai_morse.errors import InputError

from .dicom import is_dicom_scan, read_series
from .grids import Limits, affine_fault, grid_shift, voxel_size

__all__ = ["LoadScand", "ScanReader", "read_scan"]

logger = logging.getLogger(__name__)


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def read_scan(path: str | Path, limits: Limits | None = None) -> nib.Nifti1Image:
    """A scan as NIfTI in memory, in RAS world coordinates: a NIfTI file, or the DICOM series of an address.

    Its affine is the file's own: the sform where there is one, else the qform; a warning is logged, once a file, where its
    header contradicts itself. Axes of length 1 behind the third are dropped. A series' voxels are rescaled to its own units
    (float32).

    Args:
        path: NIfTI file or address.
        limits: what a plausible scan is, asked before its voxels are read; default: any.

    Raises:
        InputError: naming the path, for a file that cannot be read whole or places no voxels in space, for a series that is no
            regular stack of slices, for a scan beyond the limits.
    """
    if not is_dicom_scan(path) and not Path(path).is_file():
        raise InputError(f"{path}: the file does not exist; restore it or remove the case from the list")
    try:
        return read_series(path, limits) if is_dicom_scan(path) else _read_nifti(Path(path), limits)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # nibabel, zlib, gzip, pydicom and ITK each have their own
        kind = "DICOM" if is_dicom_scan(path) else "NIfTI"
        remedy = "restore the file or remove the case from the list"
        raise InputError(
            f"{path}: cannot be read, truncated or not {kind} ({type(error).__name__}: {error}); {remedy}"
        ) from error


def _read_nifti(path: Path, limits: Limits | None) -> nib.Nifti1Image:
    with gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb") as file:
        first = file.read(4)  # the header's size
        form = nib.Nifti2Image if 540 in (int.from_bytes(first, "little"), int.from_bytes(first, "big")) else nib.Nifti1Image
        file.seek(0)
        stored = form.from_file_map({"image": nib.FileHolder(fileobj=file)})
        header, affine, shape = stored.header, stored.affine, stored.shape
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        fault = _header_fault(header, shape) or affine_fault(affine) or (limits and limits.fault(shape, affine))
        if fault:
            raise InputError(fault)
        voxels = np.asanyarray(stored.dataobj).reshape(shape)
        while file.read(1 << 20):  # to the end, where gzip has its checksum
            pass
    for remark in _contradictions(header, shape, affine):
        _warn_once(f"{path}: {remark}")
    voxels = voxels.astype(voxels.dtype.newbyteorder("="), copy=False)
    stated = {name: header[name].astype(int) for name in ("dim", "sform_code", "qform_code")}  # for maps on its grid
    return nib.Nifti1Image(voxels, affine, nib.Nifti1Header(), extra=stated)


def _header_fault(header: Any, shape: tuple[int, ...]) -> str | None:
    unit = header.get_xyzt_units()[0]
    if unit not in ("mm", "unknown"):
        return f"its header gives lengths in {unit}; write it in mm"
    if len(shape) < 3 or 0 in shape:
        return f"expected voxels along three axes, got shape {shape}; write a single slice with a third axis of length 1"
    return None


def _contradictions(header: Any, shape: tuple[int, ...], affine: np.ndarray) -> list[str]:
    """What a header says twice in different ways, or not at all, and what counts."""
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if not sform and not qform:
        axes = "".join(nib.aff2axcodes(affine))
        return [
            f"its header tells no orientation (sform_code and qform_code are 0); {axes} is taken, as nibabel does: check it"
        ]
    size, stated = voxel_size(affine), np.abs(header["pixdim"][1:4])
    if sform and qform:
        try:
            shift = grid_shift(shape[:3], header.get_qform(), affine)
        except HeaderDataError:  # no quaternion
            shift = np.inf
        if not shift <= 0.05 * size.min():
            return [f"its qform puts voxels up to {shift:.3g} mm from where its sform does; the sform counts"]
    elif not np.allclose(stated, size, rtol=0.01):
        return [f"its header says voxels of {stated} mm, its affine {size.round(4)}; the affine counts"]
    return []


class ScanReader(NibabelReader):
    """Reader of ``LoadImage`` for scans and label maps, NIfTI files and DICOM series, see :func:`read_scan`.

    MONAI's own corrects the affine by the header's voxel size. Use this one as ``LoadImaged(keys=.., reader=ScanReader)``.
    """

    def verify_suffix(self, filename: Any) -> bool:
        return all(is_dicom_scan(f) or super(ScanReader, self).verify_suffix(f) for f in ensure_tuple(filename))

    def read(self, data: Any, **kwargs: Any) -> Any:
        # where this raises, LoadImage takes another reader in silence; errors of get_data are final
        self.filenames = ensure_tuple(data)
        return self.filenames

    def get_data(self, img: Any) -> tuple[np.ndarray, dict]:
        return super().get_data([read_scan(path) for path in img])

    def _get_meta_dict(self, img: Any) -> dict:
        meta = super()._get_meta_dict(img)
        return {**meta, "dim": meta["dim"].astype(int), **img.extra}


class LoadScand(LoadImaged):
    """``LoadImaged`` of scans and label maps by :class:`ScanReader`, channel first.

    A case's ``"name"``, where its data list gives one, goes into the images' meta data: what is written of it has that name.

    Args:
        keys: of the paths.
    """

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys, reader=ScanReader, ensure_channel_first=True)

    def __call__(self, data: Mapping[Hashable, Any], reader: Any = None) -> dict[Hashable, Any]:
        d = super().__call__(data, reader)
        for key in self.key_iterator(d):
            if "name" in d:
                d[key].meta["name"] = d["name"]
        return d
