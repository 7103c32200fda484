"""Floor 6: metrics of the library `evaluate` that need no network: perplexity, kept accuracy, error of quantization."""

from .accuracy import AccuracyRetention
from .error import QuantizationError
from .perplexity import Perplexity

__all__ = ["AccuracyRetention", "Perplexity", "QuantizationError"]
