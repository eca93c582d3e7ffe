"""MORSE for MONAI: stochastic mixtures of experts and implicit anatomical rendering around any segmentation network.

``import monai_morse`` is all that a MONAI config needs (``imports: ["$import monai_morse"]``) for ``_target_: Morse`` and the
other public names to resolve.
"""

from .config import lookup, parse_bool
from .errors import InputError, short_errors
from .losses import MorseLoss
from .networks import Morse
from .weights import load_matching

__version__ = "0.2.0"

__all__ = ["InputError", "Morse", "MorseLoss", "load_matching", "lookup", "parse_bool", "short_errors"]
