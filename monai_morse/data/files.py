"""Files in and out: scans of a folder, and whatever is written, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from monai.data import NibabelWriter

from monai_morse.errors import InputError

__all__ = ["AtomicNibabelWriter", "scans_in", "written_whole"]


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A place beside ``path`` to write to, moved onto ``path`` at the end, so that a kill leaves the old file or the new one.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with written_whole(Path(folder) / "table.csv") as partial:
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
    """``NibabelWriter`` that leaves no torn label map when it is killed, see :func:`written_whole`.

    Use it as ``SaveImaged(writer=AtomicNibabelWriter)``.
    """

    def write(self, filename: Any, verbose: bool = False, **obj_kwargs: Any) -> None:
        with written_whole(filename) as partial:
            super().write(partial, verbose=verbose, **obj_kwargs)
