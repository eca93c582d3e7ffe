"""Any MONAI segmentation bundle as a MORSE bundle: ``python -m monai_morse wrap``."""

from .wrap import WrapReport, wrap_bundle

__all__ = ["WrapReport", "wrap_bundle"]
