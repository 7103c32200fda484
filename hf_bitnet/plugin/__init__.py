"""Floor 5: the transformers quantizer `hf_bitnet`. Importing this registers it."""

from . import registration
from .quantizer import BitNetQuantizer

__all__ = ["BitNetQuantizer", "registration"]
