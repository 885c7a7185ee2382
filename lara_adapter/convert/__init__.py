"""Between our latent action model and the authors' checkpoints: LARA's tokenizer and TencentARC/Moto's, there and back.

:func:`convert_checkpoint` (`lara convert`) works on files; the other functions on states and settings in memory.
"""

from .checkpoints import convert_checkpoint
from .report import ConversionReport
from .settings import config_from_official, config_to_official
from .state import official_shapes, state_from_official, state_to_official

__all__ = [
    "ConversionReport",
    "config_from_official",
    "config_to_official",
    "convert_checkpoint",
    "official_shapes",
    "state_from_official",
    "state_to_official",
]
