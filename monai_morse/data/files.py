"""Files in and out: scans of a folder, and whatever is written, written whole or not at all."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import nibabel as nib
import numpy as np
from filelock import FileLock, Timeout
from monai.config import KeysCollection
from monai.data import NibabelWriter
from monai.transforms import SaveImaged

from monai_morse.config import typed_arguments
from monai_morse.errors import InputError

from .dicom import dicom_scans, is_dicom_scan

__all__ = [
    "AtomicNibabelWriter",
    "SaveMapd",
    "atomic_write",
    "case_name",
    "case_names",
    "check_writable",
    "is_nifti",
    "lock_folder",
    "scan_name",
    "scans_in",
]

logger = logging.getLogger(__name__)
PATIENCE = 8.0  # seconds for the processes of a run that was killed to end, as torch's do within five


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


def is_nifti(path: str | Path) -> bool:
    """Whether a file is NIfTI by its name, in any case of letters; hidden files are none.

    >>> is_nifti("a.nii"), is_nifti("b.NII.GZ"), is_nifti(".a.nii"), is_nifti("a.nrrd")
    (True, True, False, False)
    """
    return re.fullmatch(r"[^.].*\.nii(\.gz)?", Path(path).name, re.IGNORECASE) is not None


def scans_in(path: str | Path, output_dir: str | Path | None = None) -> list[dict[str, str]]:
    """Cases ``{"image": path, "name": name}`` for inference: one NIfTI file, or all scans of a folder.

    These are its NIfTI files, or else those of its ``imagesTs``, or else, but for data sets with a ``dataset.json``, those of
    its subfolders; and the DICOM series in it and its subfolders, see :func:`monai_morse.data.dicom_scans`. What it holds
    beside them is logged.

    Args:
        path: of the file or folder.
        output_dir: a folder to leave out if it lies in that one, as what is written there is no scan; default: none.

    Raises:
        InputError: when there is none, when two cannot have names of their own, see :func:`case_names`, or when
            ``output_dir`` is the folder of the scans themselves.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(_files_below(path, output_dir))
    places = [{path.parent if path.is_file() else path}, {path / "imagesTs"}]
    if not (path / "dataset.json").is_file():
        places.append({f.parent for f in files})
    found = next((n for n in ([f for f in files if is_nifti(f) and f.parent in p] for p in places) if n), [])
    series = list(dicom_scans(path).values())
    if not found and not series:
        raise InputError(
            f"no NIfTI files (.nii, .nii.gz) at {path} or in its imagesTs, and no DICOM series in it; give a scan or a folder "
            "of scans"
        )
    if output_dir and not path.is_file() and os.path.realpath(output_dir) in {os.path.realpath(f.parent) for f in found}:
        raise InputError(f"{output_dir} holds the scans; give another --output_dir, or label maps would be scans next time")
    of_series = {Path(s).parents[1] for s in series}
    unread = sorted(f for f in set(files) - set(found) if f.name not in ("dataset.json", "cohort.csv"))
    for what, left in (
        ("NIfTI file(s) in subfolders", [f for f in unread if is_nifti(f)]),
        ("file(s) that are no NIfTI", [f for f in unread if not is_nifti(f) and f.parent.resolve() not in of_series]),
    ):
        if left:
            names = ", ".join(str(f.relative_to(path)) for f in left[:5])
            logger.warning("%s: not read: %d %s: %s%s", path, len(left), what, names, ", .." if len(left) > 5 else "")
    scans = [*map(str, found), *series]
    return [{"image": scan, "name": name} for scan, name in zip(scans, case_names(scans))]


def _files_below(folder: Path, but: str | Path | None) -> Iterator[Path]:
    left_out = os.path.realpath(but) if but else None
    for place, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".") and os.path.realpath(os.path.join(place, f)) != left_out]
        yield from (Path(place, f) for f in files if not f.startswith("."))


def scan_name(path: str | Path) -> str:
    """File name without ``.nii``, ``.nii.gz`` or, of a DICOM series, ``.dicom``.

    >>> scan_name("scans/a.b.nii.gz"), scan_name("scans/c.NII.GZ")
    ('a.b', 'c')
    """
    return re.sub(r"((\.nii)?\.gz|\.nii|\.dicom)$", "", Path(path).name, flags=re.IGNORECASE)


def case_names(paths: Sequence[str | Path]) -> list[str]:
    """A name a scan, each its own: the files' names, or where some are alike, those with the folders in which paths differ.

    Where that is still ambiguous, six letters of a digest of the path follow.

    Args:
        paths: of the scans, all of the cohort or data set.

    Raises:
        InputError: for a scan that is listed twice, by whatever spelling, and for two files of one scan, ``a.nii`` beside
            ``a.nii.gz``.

    >>> case_names(["d/a.nii.gz", "d/b.nii.gz"])
    ['a', 'b']
    >>> case_names(["d/p0/scans/t1.nii.gz", "d/p1/scans/t1.nii.gz", "d/p1/scans/t2.nii.gz"])
    ['p0_t1', 'p1_t1', 'p1_t2']
    """
    seen: dict[str, str | Path] = {}
    for path in paths:
        real = os.path.realpath(Path(path).parent if is_dicom_scan(path) else path)
        if real in seen:
            spelled = "" if str(seen[real]) == str(path) else f", once as {seen[real]}"
            raise InputError(f"{path} is listed twice{spelled}; list each scan once")
        seen[real] = path
    names = [scan_name(p) for p in paths]
    if len(set(names)) == len(names):
        return names
    folders = [Path(os.path.abspath(p)).parts[:-1] for p in paths]
    for name, places in _grouped(names, zip(folders, paths)).items():
        beside = len({folder for folder, _ in places}) < len(places)
        if len(places) > 1 and (beside or any(is_dicom_scan(p) for _, p in places)):  # a series has its folders' names already
            two = " and ".join(str(p) for _, p in places[:2])
            raise InputError(f"two scans named {name}: {two}; remove or rename one")
    shared = set.intersection(*map(set, folders))
    longer = ["_".join([*(p for p in parts if p not in shared), name]) for parts, name in zip(folders, names)]
    count = Counter(longer)
    digests = [hashlib.sha256("/".join([*parts, name]).encode()).hexdigest()[:6] for parts, name in zip(folders, names)]
    return [name if count[name] == 1 else f"{name}_{digest}" for name, digest in zip(longer, digests)]


def _grouped(keys: Iterable[str], values: Iterable[Any]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = defaultdict(list)
    for key, value in zip(keys, values):
        groups[key].append(value)
    return groups


def case_name(meta: Mapping[str, Any]) -> str:
    """The name of the case that an image is of, from its meta data: as its data list has it, else its file's.

    >>> case_name({"filename_or_obj": "p0/t1.nii.gz", "name": "p0_t1"}), case_name({"filename_or_obj": "p0/t1.nii.gz"})
    ('p0_t1', 't1')
    """
    return str(meta.get("name") or scan_name(str(meta.get("filename_or_obj", ""))))


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


def lock_folder(folder: str | Path, what: str, option: str) -> FileLock | None:
    """Keep other runs of a kind out of a folder, until the lock is released or this process ends, however it does.

    Args:
        folder: is made if need be. what: the kind of run, e.g. "training". option: which names the folder, for the error.

    Returns:
        the lock; None, with a warning, where the file system has none.

    Raises:
        InputError: when another run has it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(folder) / f".{what}.lock", PATIENCE, is_singleton=True)
    try:
        lock.acquire()
        return lock
    except Timeout:
        words = f"wait for it or stop it, or give this one another {option}"
        raise InputError(f"another {what} is writing to {folder}; {words}") from None
    except (OSError, NotImplementedError) as error:
        logger.warning("%s cannot be locked (%s): see yourself that no second %s starts in it", folder, error, what)
        return None


class AtomicNibabelWriter(NibabelWriter):
    """``NibabelWriter`` of maps on a scan's own grid: with the scan's axes, also those of length 1, and its affine.

    It leaves no torn file when it is killed, see :func:`atomic_write`. Use it as ``SaveImaged(writer=AtomicNibabelWriter)``.
    """

    oriented = True
    error: ClassVar[Exception | None] = None  # of the last write: SaveImage swallows it

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
        try:
            AtomicNibabelWriter.error = None
            with atomic_write(filename) as partial:
                nib.save(image, partial)
        except Exception as error:
            AtomicNibabelWriter.error = error
            raise


class SaveMapd(SaveImaged):
    """``SaveImaged`` of maps on a scan's own grid: ``output_dir/NAME_POSTFIX.nii.gz``, by :class:`AtomicNibabelWriter`.

    NAME is the case's, see :func:`case_name`. The path is kept in the map's meta data, as ``"saved_to"``.

    Args:
        keys: maps (C, *S), ``MetaTensor`` with the meta data of ``LoadImage``.
        output_dir: folder to write to.
        output_postfix: what follows the name.
        output_dtype: of the voxels; default float32.
        allow_missing_keys: leave out keys that an item lacks; default False.
    """

    @typed_arguments
    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str | Path,
        output_postfix: str = "seg",
        output_dtype: Any = np.float32,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(
            keys,
            output_dir=output_dir,
            output_postfix=output_postfix,
            output_dtype=output_dtype,
            allow_missing_keys=allow_missing_keys,
            separate_folder=False,
            resample=False,
            print_log=False,
            writer=AtomicNibabelWriter,
            output_name_formatter=_with_suffix,
            savepath_in_metadict=True,
        )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        try:
            return super().__call__(data)
        except RuntimeError as error:  # MONAI's, which asks for libraries whatever has failed
            raise AtomicNibabelWriter.error or error from None


def _with_suffix(meta: Mapping[str, Any] | None, saver: Any) -> dict[str, Any]:
    return {"subject": f"{case_name(meta or {})}.nii", "idx": None}  # MONAI takes one suffix off
