"""hf_bitnet: BitNet quantization-aware training and inference for Hugging Face models.

Importing it costs next to nothing: names are loaded when they are first used, and the transformers plug-in registers
itself when transformers loads its quantizers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._register import extend_what_loads

if TYPE_CHECKING:
    from .analysis import (
        dataset_texts,
        layer_report,
        output_report,
        perplexity,
        read_windows,
        sensitivity,
        suggest_overrides,
        text_windows,
    )
    from .calibration import calibrate, fit_weights
    from .config import BitNetQuantizationConfig
    from .modules import BitConv1D, BitEmbedding, BitLinear, PackedBitLinear, PackedEmbedding
    from .pages import keep_freed_memory
    from .plugin import load_native
    from .publish import export_model, import_model, import_tokenizer, open_model, push_to_hub
    from .quantizers import Quantized
    from .surgery import (
        Coverage,
        convert_native,
        coverage,
        dequantize_model,
        harden,
        kept_codes,
        optimize_for_generation,
        pack_model,
        quantize_model,
        set_norm_blend,
        set_strength,
        unpack_model,
    )
    from .training import (
        CONVERSION_DEFAULTS,
        TRAINING_PRESETS,
        DistillationConfig,
        MeasuredRun,
        QATArguments,
        QATMixin,
        QATSeq2SeqArguments,
        QATSeq2SeqTrainer,
        QATTrainer,
        QuantizationSchedule,
        TokenWindows,
        cache_teacher_logits,
        command_line_defaults,
        convert,
        drawn_windows,
        hub_checkpoint,
    )

__version__ = "0.1.0"

_HOME = {
    "BitNetQuantizationConfig": "config",
    "BitConv1D": "modules",
    "BitEmbedding": "modules",
    "BitLinear": "modules",
    "PackedBitLinear": "modules",
    "PackedEmbedding": "modules",
    "Quantized": "quantizers",
    "calibrate": "calibration",
    "fit_weights": "calibration",
    "Coverage": "surgery",
    "convert_native": "surgery",
    "coverage": "surgery",
    "dequantize_model": "surgery",
    "export_model": "publish",
    "import_model": "publish",
    "import_tokenizer": "publish",
    "open_model": "publish",
    "push_to_hub": "publish",
    "harden": "surgery",
    "keep_freed_memory": "pages",
    "kept_codes": "surgery",
    "optimize_for_generation": "surgery",
    "layer_report": "analysis",
    "load_native": "plugin",
    "output_report": "analysis",
    "sensitivity": "analysis",
    "dataset_texts": "analysis",
    "perplexity": "analysis",
    "read_windows": "analysis",
    "suggest_overrides": "analysis",
    "text_windows": "analysis",
    "pack_model": "surgery",
    "quantize_model": "surgery",
    "set_norm_blend": "surgery",
    "set_strength": "surgery",
    "unpack_model": "surgery",
    "CONVERSION_DEFAULTS": "training",
    "TRAINING_PRESETS": "training",
    "DistillationConfig": "training",
    "MeasuredRun": "training",
    "TokenWindows": "training",
    "cache_teacher_logits": "training",
    "drawn_windows": "training",
    "hub_checkpoint": "training",
    "QATArguments": "training",
    "QATMixin": "training",
    "QATSeq2SeqArguments": "training",
    "QATSeq2SeqTrainer": "training",
    "QATTrainer": "training",
    "command_line_defaults": "training",
    "QuantizationSchedule": "training",
    "convert": "training",
}

__all__ = [
    "CONVERSION_DEFAULTS",
    "TRAINING_PRESETS",
    "BitConv1D",
    "BitEmbedding",
    "BitLinear",
    "BitNetQuantizationConfig",
    "Coverage",
    "DistillationConfig",
    "MeasuredRun",
    "PackedBitLinear",
    "PackedEmbedding",
    "QATArguments",
    "QATMixin",
    "QATSeq2SeqArguments",
    "QATSeq2SeqTrainer",
    "QATTrainer",
    "QuantizationSchedule",
    "Quantized",
    "TokenWindows",
    "cache_teacher_logits",
    "calibrate",
    "command_line_defaults",
    "convert",
    "convert_native",
    "coverage",
    "dataset_texts",
    "dequantize_model",
    "drawn_windows",
    "export_model",
    "fit_weights",
    "harden",
    "hub_checkpoint",
    "import_model",
    "import_tokenizer",
    "keep_freed_memory",
    "kept_codes",
    "layer_report",
    "load_native",
    "open_model",
    "optimize_for_generation",
    "output_report",
    "pack_model",
    "perplexity",
    "push_to_hub",
    "quantize_model",
    "read_windows",
    "sensitivity",
    "set_norm_blend",
    "set_strength",
    "suggest_overrides",
    "text_windows",
    "unpack_model",
]

extend_what_loads()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
