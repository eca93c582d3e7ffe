"""Data lists, checks of their files before work starts, files in and out, and the synthetic phantom."""

from .cases import msd_cases, msd_class_names, raise_if_skipped, usable_cases
from .files import AtomicNibabelWriter, scans_in, written_whole
from .phantom import write_phantom

__all__ = [
    "AtomicNibabelWriter",
    "msd_cases",
    "msd_class_names",
    "raise_if_skipped",
    "scans_in",
    "usable_cases",
    "write_phantom",
    "written_whole",
]
