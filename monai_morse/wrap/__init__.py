"""Any MONAI segmentation bundle as a MORSE bundle: ``python -m monai_morse wrap``."""

from .report import WrapReport
from .wrap import wrap_bundle

__all__ = ["WrapReport", "wrap_bundle"]
