"""Floor 5: files that other programs read, one file a format."""

from . import dense, gguf, mlx, native, onnx, packed
from .format import EXPORT_FORMATS, ExportFormat, Progress, Source
from .report import Check, ExportReport, ParityError, WrittenTensor

__all__ = [
    "EXPORT_FORMATS",
    "Check",
    "ExportFormat",
    "ExportReport",
    "ParityError",
    "Progress",
    "Source",
    "WrittenTensor",
    "dense",
    "gguf",
    "mlx",
    "native",
    "onnx",
    "packed",
]
