"""The latent action model: inverse dynamics, quantiser and forward dynamics over an image encoder.

Imports torch, numpy, safetensors and huggingface-hub only; transformers, lpips and vector-quantize-pytorch are
imported where a configuration asks for them.
"""

from .config import LatentActionConfig
from .model import LatentAction, LatentActionModel, LatentActionOutput
from .quantizer import VectorQuantizer

__all__ = ["LatentAction", "LatentActionConfig", "LatentActionModel", "LatentActionOutput", "VectorQuantizer"]
