"""Files in and out: scans of a folder, and whatever is written, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.data import NibabelWriter

from monai_morse.errors import InputError

from .dicom import dicom_scans

__all__ = ["AtomicNibabelWriter", "check_writable", "scan_name", "scans_in", "atomic_write"]


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A place beside ``path`` to write to, moved onto ``path`` at the end, so that a kill leaves the old file or the new one.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_write(Path(folder) / "table.csv") as partial:
    ...         _ = partial.write_text("whole")
    ...     (Path(folder) / "table.csv").read_text()
    'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def scans_in(path: str | Path) -> list[dict[str, str]]:
    """Cases ``{"image": path}`` for inference: one NIfTI file, or all scans of a folder.

    These are its NIfTI files, or else those of its ``imagesTs``, and the DICOM series in it and its subfolders, see
    :func:`monai_morse.data.dicom_scans`.

    Raises:
        InputError: when there is none, or two would have one name for their label maps.
    """
    path = Path(path)
    for place in (path, path / "imagesTs"):
        files = [place] if place.is_file() else sorted(place.iterdir()) if place.is_dir() else []
        found = [str(f) for f in files if f.name.endswith((".nii", ".nii.gz")) and not f.name.startswith(".")]
        if found:
            break
    found += dicom_scans(path).values()
    if not found:
        raise InputError(
            f"no NIfTI files (.nii, .nii.gz) at {path} or in its imagesTs, and no DICOM series in it; give a scan or a folder "
            "of scans"
        )
    stems = [scan_name(f) for f in found]
    twice = sorted({s for s in stems if stems.count(s) > 1})
    if twice:
        raise InputError(f"{path} has two scans named {', '.join(twice[:5])}; remove one, their label maps would collide")
    return [{"image": f} for f in found]


def scan_name(path: str | Path) -> str:
    """File name without ``.nii``, ``.nii.gz`` or, of a DICOM series, ``.dicom``.

    >>> scan_name("scans/a.b.nii.gz")
    'a.b'
    """
    return Path(path).name.removesuffix(".gz").removesuffix(".nii").removesuffix(".dicom")


def check_writable(*folders: str | Path) -> None:
    """Make the folders if need be and write to each.

    Raises:
        InputError: when that fails.
    """
    for folder in folders:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise InputError(f"cannot write to {folder} ({error.strerror}); give another --ckpt_dir or --output_dir") from error


class AtomicNibabelWriter(NibabelWriter):
    """``NibabelWriter`` of maps on a scan's own grid: with the scan's axes, also those of length 1, and its affine.

    It leaves no torn file when it is killed, see :func:`atomic_write`. Use it as ``SaveImaged(writer=AtomicNibabelWriter)``.
    """

    oriented = True

    def set_data_array(
        self, data_array: Any, channel_dim: int | None = 0, squeeze_end_dims: bool = True, **kwargs: Any
    ) -> None:
        super().set_data_array(data_array, channel_dim, squeeze_end_dims=False, **kwargs)
        if squeeze_end_dims and self.data_obj.shape[-1] == 1:  # the channel, not an axis of one slice
            self.data_obj = self.data_obj[..., 0]

    def set_metadata(self, meta_dict: Mapping | None, resample: bool = True, **options: Any) -> None:
        super().set_metadata(meta_dict, resample, **options)
        meta = meta_dict or {}
        rank, *shape = (int(n) for n in meta.get("dim", [0]))
        if tuple(shape[:3]) == self.data_obj.shape and set(shape[3:rank]) == {1}:
            self.data_obj = self.data_obj.reshape(shape[:rank])
        self.oriented = any(int(meta.get(code, 1)) for code in ("sform_code", "qform_code"))

    def write(self, filename: Any, verbose: bool = False, **obj_kwargs: Any) -> None:
        image = self.create_backend_obj(self.data_obj, affine=self.affine, dtype=self.output_dtype, **obj_kwargs)
        affine = image.affine
        image.set_sform(affine, code=1)
        image.set_qform(affine, code=1)
        if not np.allclose(image.get_qform(), affine, atol=1e-4):  # sheared: the sform alone can tell
            image.set_qform(None, code=0)
        if not self.oriented and np.allclose(image.header.get_base_affine(), affine, atol=1e-4):
            # as the scan: whatever a viewer makes of that, it makes of both
            image.set_sform(None, code=0)
            image.set_qform(None, code=0)
        with atomic_write(filename) as partial:
            nib.save(image, partial)
