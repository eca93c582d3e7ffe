"""Making data sets before training: CHAOS, LiverHccSeg, Synapse (BTCV), multi-phasic MRI of your own, synthetic phantoms."""

from .chaos import prepare_chaos
from .liverhccseg import prepare_liverhccseg
from .mpmri import prepare_mpmri
from .phantom import write_phantom
from .phantom_ct import write_ct_phantom
from .stand_ins import phantom_mpmri, synapse_phantom
from .synapse import prepare_synapse

__all__ = [
    "phantom_mpmri",
    "prepare_chaos",
    "prepare_liverhccseg",
    "prepare_mpmri",
    "prepare_synapse",
    "synapse_phantom",
    "write_ct_phantom",
    "write_phantom",
]
