"""Floor 5: the transformers quantizer `hf_bitnet`. Importing this registers it."""

from .native import HUB_ARGUMENTS, load_native
from .quantizer import BitNetQuantizer
from .registration import loading_native

__all__ = ["HUB_ARGUMENTS", "BitNetQuantizer", "load_native", "loading_native"]
