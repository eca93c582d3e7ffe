"""Data lists, checks of their files before work starts, files in and out, preparation of data sets, synthetic phantoms."""

from .cases import check_split, msd_cases, msd_class_names, raise_if_skipped, usable_cases
from .dicom import ScanReader, dicom_scans, read_scan
from .dicom_seg import SaveDicomSegd
from .files import AtomicNibabelWriter, check_writable, scan_name, scans_in, written_whole
from .grids import ToScanGridd
from .mpmri import phantom_mpmri, prepare_mpmri
from .phantom import write_phantom
from .phantom_ct import write_ct_phantom
from .synapse import prepare_synapse, synapse_phantom

__all__ = [
    "ToScanGridd",
    "AtomicNibabelWriter",
    "SaveDicomSegd",
    "ScanReader",
    "check_split",
    "check_writable",
    "dicom_scans",
    "msd_cases",
    "msd_class_names",
    "phantom_mpmri",
    "prepare_mpmri",
    "prepare_synapse",
    "raise_if_skipped",
    "read_scan",
    "scan_name",
    "scans_in",
    "synapse_phantom",
    "usable_cases",
    "write_ct_phantom",
    "write_phantom",
    "written_whole",
]
