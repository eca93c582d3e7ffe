"""Data lists in the Medical Segmentation Decathlon's (MSD) layout, and checks of their files before work starts."""

from .cases import msd_cases, msd_class_names, usable_cases

__all__ = ["msd_cases", "msd_class_names", "usable_cases"]
