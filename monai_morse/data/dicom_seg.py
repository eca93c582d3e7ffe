"""Label maps of DICOM series out as DICOM segmentations, by ``highdicom``."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import optional_import

from monai_morse.errors import InputError, disk_is_full

from .dicom import is_dicom_scan, series_planes, sop_class_of
from .files import atomic_write, case_name

__all__ = ["SaveDicomSegd"]

logger = logging.getLogger(__name__)


class SaveDicomSegd(MapTransform):
    """Writes label maps of DICOM series as DICOM-SEG, ``NAME_seg.dcm``, a segment a class that was found.

    The path is kept in the map's meta data, as ``"dicom_seg"``. A label map of a scan that was NIfTI is left alone. Where there
    is nothing to write, as without any voxel of a class, or the series lacks what a segmentation must repeat of it (anonymised
    too far), an error is logged and kept there, as ``"remark"``, and the next scan follows.

    Args:
        keys: label maps (1, *S) on the scan's own grid, ``MetaTensor`` with the meta data of ``LoadImage``.
        output_dir: folder to write to.
        class_names: of label 1, 2, ...

    Raises:
        InputError: when ``highdicom`` is not installed.
    """

    def __init__(self, keys: KeysCollection, output_dir: str | Path, class_names: Sequence[str]) -> None:
        super().__init__(keys)
        self.output_dir = Path(output_dir)
        self.class_names = list(class_names)
        if not optional_import("highdicom")[1]:
            raise InputError("dicom_seg needs highdicom: pip install 'monai_morse[dicom]', or leave --dicom_seg false")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            scan = str(d[key].meta["filename_or_obj"])
            if not is_dicom_scan(scan):
                continue
            try:
                path = self.output_dir / f"{case_name(d[key].meta)}_seg.dcm"
                self._save(np.asarray(d[key][0]).astype(np.uint8), scan, path)
                d[key].meta["dicom_seg"] = str(path)
            except Exception as error:  # one scan's, highdicom has no class of its own
                if disk_is_full(error):
                    raise
                known = isinstance(error, InputError)
                reason = error if known else f"its files may lack what a segmentation must repeat: {error!r}"
                logger.error("no DICOM-SEG of %s: %s", Path(scan).parents[1], reason)
                d[key].meta["remark"] = f"no DICOM-SEG: {reason}"
        return d

    def _save(self, labels: np.ndarray, scan: str, path: Path) -> None:
        import highdicom as hd
        import pydicom
        from pydicom.sr.codedict import codes

        found = [k for k in range(1, len(self.class_names) + 1) if (labels == k).any()]
        if not found:
            raise InputError("the label map is empty, and a segmentation needs a frame")
        author = hd.AlgorithmIdentificationSequence(
            name="MORSE", version=version("monai_morse"), family=codes.DCM.ArtificialIntelligence
        )
        segments = [
            hd.seg.SegmentDescription(
                segment_number=i,
                segment_label=self.class_names[k - 1],
                segmented_property_category=codes.SCT.AnatomicalStructure,
                segmented_property_type=getattr(codes.SCT, self.class_names[k - 1].title(), codes.SCT.Organ),
                algorithm_type="AUTOMATIC",
                algorithm_identification=author,
            )
            for i, k in enumerate(found, start=1)
        ]
        planes = series_planes(scan)
        files = list(dict.fromkeys(p.file for p in planes))
        frames = np.stack([labels == k for k in found], axis=-1).transpose(2, 1, 0, 3)  # a frame a slice
        if len(files) == 1:  # in the order of its frames
            frames = frames[np.argsort([p.frame for p in planes])]
        sources = [pydicom.dcmread(f) for f in files]
        for source in sources:
            source.SOPClassUID = sop_class_of(source)
            source.SOPInstanceUID = source.get("SOPInstanceUID") or source.file_meta.get("MediaStorageSOPInstanceUID", "")
        if len({source.SOPInstanceUID for source in sources} - {""}) < len(sources):
            raise InputError("its files have no SOPInstanceUIDs of their own, which a segmentation refers to; restore them")
        segmentation = hd.seg.Segmentation(
            source_images=sources,
            pixel_array=frames.astype(np.uint8),
            segmentation_type="BINARY",
            segment_descriptions=segments,
            series_instance_uid=hd.UID(),
            series_number=100,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="monai_morse",
            manufacturer_model_name="MORSE",
            software_versions=version("monai_morse"),
            device_serial_number="0",
        )
        with atomic_write(path) as partial:
            segmentation.save_as(partial)
