"""Is a latent action model any good on this data?"""

from .report import examine
from .verdicts import HealthReport, Thresholds

__all__ = ["HealthReport", "Thresholds", "examine"]
