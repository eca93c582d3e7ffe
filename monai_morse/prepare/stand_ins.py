"""Phantoms as data sets to run a bundle on until there is another."""

from __future__ import annotations

from pathlib import Path

from .mpmri import prepare_mpmri
from .phantom import phantom_at, write_phantom
from .phantom_ct import write_ct_phantom
from .synapse import prepare_synapse

__all__ = ["phantom_mpmri", "synapse_phantom"]


def phantom_mpmri(out: str | Path, patients: int = 20) -> str:
    """The phantom with its liver alone, as a data set to run on until there is another; written if it is not there.

    Args:
        out: its folder. patients: default 20, as many as the paper has, three scans each.

    Returns:
        the folder.
    """

    def make(scratch: Path) -> Path:
        prepare_mpmri(write_phantom(scratch / "all", patients), scratch / "liver", label_values=[1])
        return scratch / "liver"

    return phantom_at(out, make)


def synapse_phantom(out: str | Path, patients: int = 5, spacing: tuple[float, float, float] = (3.0, 3.0, 5.0)) -> str:
    """The folder of a prepared CT phantom, written if it is not there: something to run a bundle on at once.

    Args:
        out: folder.
        patients: default 5, of whom two are to test on.
        spacing: voxel size in mm, default (3, 3, 5).

    Returns:
        ``out``.
    """

    def make(scratch: Path) -> Path:
        raw = write_ct_phantom(scratch / "raw", patients, 0, spacing)
        prepare_synapse(raw, scratch / "prepared", "Synapse CT phantom")
        return scratch / "prepared"

    return phantom_at(out, make)
