"""Is a latent action model any good on this data?"""

from .ceiling import Ceiling, train_ceiling
from .kernel import fit_kernels
from .motion import Estimate, Motion, measure_motion
from .report import examine
from .verdicts import HealthReport, Thresholds

__all__ = [
    "Ceiling",
    "Estimate",
    "HealthReport",
    "Motion",
    "Thresholds",
    "examine",
    "fit_kernels",
    "measure_motion",
    "train_ceiling",
]
