"""The transformers quantizer `hf_bitnet`: from_pretrained and save_pretrained for both forms. Own."""

from __future__ import annotations

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from .config import QUANT_METHOD, BitNetQuantizationConfig

register_quantization_config(QUANT_METHOD)(BitNetQuantizationConfig)


@register_quantizer(QUANT_METHOD)
class BitNetQuantizer(HfQuantizer):
    """Draft."""

    def is_serializable(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_trainable(self) -> bool:  # type: ignore[override]
        return True
