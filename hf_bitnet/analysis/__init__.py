"""Floor 5: what quantization did to a model, and which layers it hurts; perplexity."""

from ..reports import LayerRow, Report
from .layers import LayerReport, layer_report
from .losses import SensitivityReport, sensitivity
from .outputs import OutputReport, output_report
from .suggest import suggest_overrides
from .text import dataset_texts, perplexity, read_windows, text_windows

__all__ = [
    "LayerReport",
    "LayerRow",
    "OutputReport",
    "Report",
    "SensitivityReport",
    "dataset_texts",
    "layer_report",
    "output_report",
    "perplexity",
    "read_windows",
    "sensitivity",
    "suggest_overrides",
    "text_windows",
]
