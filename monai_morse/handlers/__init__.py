"""Ignite handlers for MONAI's engines: lambda_t, repeatable epochs, checkpoints that survive a kill, per-case figures.

Each is attached by its place in ``train_handlers`` or ``val_handlers``; handlers of one event run in that order. In a
distributed run each process has its own, files are written by the first alone, and ``network`` may be wrapped for it.
"""

from .checkpoints import BestModel, LastModel, TrainingState, WeightsLoader
from .evaluation import BoundaryErrors, CasePictures, CaseReport, ClassMetrics
from .training import CoarsePrediction, EpochSeed, FiniteLoss, RenderSchedule, Validation

__all__ = [
    "BestModel",
    "BoundaryErrors",
    "CasePictures",
    "CaseReport",
    "ClassMetrics",
    "CoarsePrediction",
    "EpochSeed",
    "FiniteLoss",
    "LastModel",
    "RenderSchedule",
    "TrainingState",
    "Validation",
    "WeightsLoader",
]
