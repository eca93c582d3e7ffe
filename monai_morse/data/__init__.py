"""Scans at run time: data lists and folds, checks of files before work starts, reading, writing, the scan's own grid."""

from .cases import msd_cases, msd_class_names
from .checks import check_split, raise_if_left_out, usable_cases
from .dicom import dicom_scans
from .dicom_seg import SaveDicomSegd
from .files import AtomicNibabelWriter, SaveMapd, atomic_write, case_name, case_names, check_writable, scan_name, scans_in
from .grids import MatchGridd, ToScanGridd
from .orientation import ThroughPlaneLastd
from .scans import LoadScand, ScanReader, read_scan

__all__ = [
    "MatchGridd",
    "ThroughPlaneLastd",
    "ToScanGridd",
    "AtomicNibabelWriter",
    "LoadScand",
    "SaveDicomSegd",
    "SaveMapd",
    "ScanReader",
    "case_name",
    "case_names",
    "check_split",
    "check_writable",
    "dicom_scans",
    "msd_cases",
    "msd_class_names",
    "raise_if_left_out",
    "read_scan",
    "scan_name",
    "scans_in",
    "usable_cases",
    "atomic_write",
]
