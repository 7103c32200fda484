"""Floor 5: quantized checkpoints of other programs, read into packed models with equal codes and scales."""

from .codes import OUTSIDE, Found, Levels, Misfit, fit
from .folder import Folder
from .gguf_tokenizer import gguf_tokenizer
from .opening import import_checkpoint, refuse_exports
from .recognition import recognise

__all__ = [
    "OUTSIDE",
    "Folder",
    "Found",
    "Levels",
    "Misfit",
    "fit",
    "gguf_tokenizer",
    "import_checkpoint",
    "recognise",
    "refuse_exports",
]
