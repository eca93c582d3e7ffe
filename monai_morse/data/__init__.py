"""Data lists, checks of their files before work starts, files in and out, and the synthetic phantom."""

from .cases import check_split, msd_cases, msd_class_names, raise_if_skipped, usable_cases
from .files import AtomicNibabelWriter, check_writable, scan_name, scans_in, written_whole
from .grids import ToScanGridd
from .phantom import write_phantom

__all__ = [
    "ToScanGridd",
    "AtomicNibabelWriter",
    "check_split",
    "check_writable",
    "msd_cases",
    "msd_class_names",
    "raise_if_skipped",
    "scan_name",
    "scans_in",
    "usable_cases",
    "write_phantom",
    "written_whole",
]
