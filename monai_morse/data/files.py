"""Files in and out: scans of a folder, label maps written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from monai.data import NibabelWriter

from monai_morse.errors import InputError

__all__ = ["AtomicNibabelWriter", "scans_in"]


def scans_in(path: str | Path) -> list[dict[str, str]]:
    """Cases ``{"image": path}`` for inference: one NIfTI file, the NIfTI files of a folder, or those of its ``imagesTs``.

    Raises:
        InputError: when there is none.
    """
    path = Path(path)
    folders = [path, path / "imagesTs"]
    files = [path] if path.is_file() else [f for d in folders if d.is_dir() for f in sorted(d.iterdir())]
    found = [{"image": str(f)} for f in files if f.name.endswith((".nii", ".nii.gz")) and not f.name.startswith(".")]
    if not found:
        raise InputError(f"no NIfTI files (.nii, .nii.gz) at {path} or in its imagesTs; give a scan or a folder of scans")
    return found


class AtomicNibabelWriter(NibabelWriter):
    """``NibabelWriter`` that writes beside the file's place and moves it there, so that a kill leaves no torn label map.

    Use it as ``SaveImaged(writer=AtomicNibabelWriter)``.
    """

    def write(self, filename: Any, verbose: bool = False, **obj_kwargs: Any) -> None:
        path = Path(filename)
        partial = path.with_name(f".partial-{path.name}")
        super().write(partial, verbose=verbose, **obj_kwargs)
        os.replace(partial, path)
