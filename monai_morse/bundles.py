"""``monai-morse bundle``: the bundles that travel with the package, to be copied out and used without a clone."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from monai_morse.config import check_choice
from monai_morse.errors import InputError

__all__ = ["bundle_folder", "bundle_names", "copy_bundle"]

PARTS = ("LICENSE", "configs", "docs", "large_files.yml", "models/model.pt")  # and no data, runs or further weights


def bundle_folder() -> Path:
    """The folder of all bundles: the package's own, or in a clone the one beside it."""
    package = Path(__file__).resolve().parent
    return next((f for f in (package / "_bundles", package.parent / "bundles") if f.is_dir()), package / "_bundles")


def bundle_names() -> list[str]:
    """The bundles that are there.

    >>> "hippocampus_mri_morse" in bundle_names()
    True
    """
    return sorted(path.parents[1].name for path in bundle_folder().glob("*/configs/metadata.json"))


def copy_bundle(name: str, out: str | Path) -> str:
    """Copy a bundle to ``out/name``, with its weights where there are any; all of it, or nothing.

    Args:
        name: one of :func:`bundle_names`.
        out: folder to copy to; it is made where it is missing.

    Returns:
        What was written and what its weights are, to print.

    Raises:
        InputError: for another name, or where ``out/name`` exists.
    """
    check_choice("bundle", name, bundle_names())
    source, target = bundle_folder() / name, Path(out) / name
    if target.exists():
        raise InputError(f"{target} exists; remove it, or give another --out")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}.") as partial:
        for part in (source / part for part in PARTS):
            copy = Path(partial) / name / part.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if part.is_dir():
                shutil.copytree(part, copy, ignore=shutil.ignore_patterns("__pycache__"))
            elif part.is_file():
                shutil.copy2(part, copy)
        (Path(partial) / name).rename(target)
    if (target / "models" / "model.pt").is_file():
        return f"wrote {target}\nweights: models/model.pt, under the licence in docs/data_license.txt"
    return f"wrote {target}\nno weights come with it: docs/README.md says how to train"
