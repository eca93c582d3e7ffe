"""The network: a backbone, a mixture over its decoder features and a renderer for its least certain voxels.

Shape shorthand of all docstrings: ``B`` batch, ``C`` channels, ``K`` classes, ``N`` experts, ``P`` points, ``L`` frequencies,
``*S`` spatial size, (H, W) or (D, H, W), and ``V`` its product, the number of voxels.
"""

from .backbones import decoder_names, register_backbone
from .decoders import DecoderFeatures, FeatureInfo
from .experts import Mixture
from .morse import Morse, MorseOutput
from .plans import plan_unet, planned_dynunet, seen_by_backbone
from .points import PointSelection
from .renderers import AnatomicalHead, FourierEncoding, ImplicitPointRendHead, PointRendHead
from .transunet import TransUNet
from .unet3d import UNet3D
from .windows import check_window

__all__ = [
    "AnatomicalHead",
    "DecoderFeatures",
    "FeatureInfo",
    "FourierEncoding",
    "ImplicitPointRendHead",
    "Mixture",
    "Morse",
    "MorseOutput",
    "PointRendHead",
    "PointSelection",
    "TransUNet",
    "UNet3D",
    "check_window",
    "decoder_names",
    "plan_unet",
    "planned_dynunet",
    "register_backbone",
    "seen_by_backbone",
]
