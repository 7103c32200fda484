"""Makes transformers find us: by our own method, and by our key in a config of its own method `bitnet`. Own.

Two lookups of transformers are extended; what is not ours passes through them unchanged:
- the config class of `bitnet`: settings that carry the key "hf_bitnet" become a BitNetQuantizationConfig;
- the merge of a checkpoint's config with the one given to from_pretrained, which else ignores what was given.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AutoHfQuantizer,
    AutoQuantizationConfig,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import BitNetQuantConfig

from ..config import NATIVE_LOADING, NATIVE_METHOD, QUANT_METHOD, BitNetQuantizationConfig, NativeBitNetConfig
from .quantizer import BitNetQuantizer, NativeBitNetQuantizer

# set while load_native runs: `bitnet` checkpoints then become models of ours, whatever key their config carries
loading_native: ContextVar[bool] = ContextVar("loading_native", default=False)


class _NativeOrOurs(BitNetQuantConfig):
    """What transformers asks for the config of a `bitnet` checkpoint."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        target: Any = BitNetQuantizationConfig if QUANT_METHOD in config_dict else BitNetQuantConfig
        if loading_native.get():
            target = NativeBitNetConfig
        return target.from_dict(config_dict, return_unused_kwargs, **kwargs)


_original_merge = AutoHfQuantizer.merge_quantization_configs


def _merge(saved: Any, given: Any) -> Any:
    """Config of the checkpoint (dict or object), config given to from_pretrained or None -> the one to load with."""
    if isinstance(given, dict) and (given.get("quant_method") == QUANT_METHOD or QUANT_METHOD in given):
        given = BitNetQuantizationConfig.from_dict(given)
    if not isinstance(given, BitNetQuantizationConfig):
        return _original_merge(saved, given)  # type: ignore[arg-type]
    if isinstance(saved, dict):
        saved = AutoQuantizationConfig.from_dict(saved)
    if not isinstance(saved, BitNetQuantizationConfig):
        method = getattr(saved.quant_method, "value", saved.quant_method)
        advice = "load it with hf_bitnet.load_native(path)" if method == NATIVE_METHOD else "quantize the original checkpoint"
        raise ValueError(f"the checkpoint is quantized already, by {method!r}; {advice}")
    _check_agreement(saved, given)
    return saved


def _check_agreement(saved: BitNetQuantizationConfig, given: BitNetQuantizationConfig) -> None:
    if saved.form != given.form:
        convert = "pack_model" if given.form == "packed" else "unpack_model"
        raise ValueError(
            f"the checkpoint is in form {saved.form!r}, the quantization_config given asks for form={given.form!r}; load it "
            f"as it is and convert it: model = AutoModel.from_pretrained(path); hf_bitnet.{convert}(model)"
        )
    ours, theirs = given.fields(), saved.fields()
    for name in ours.keys() - {"quantized_modules", "min_coverage"}:
        if ours[name] != theirs[name]:
            raise ValueError(
                f"the checkpoint is quantized already, with {name}={theirs[name]!r}; the quantization_config given says "
                f"{name}={ours[name]!r}. Load it without: from_pretrained(path), or quantize the original float checkpoint"
            )


register_quantization_config(QUANT_METHOD)(BitNetQuantizationConfig)
register_quantizer(QUANT_METHOD)(BitNetQuantizer)
register_quantization_config(NATIVE_LOADING)(NativeBitNetConfig)
register_quantizer(NATIVE_LOADING)(NativeBitNetQuantizer)
AUTO_QUANTIZATION_CONFIG_MAPPING[NATIVE_METHOD] = _NativeOrOurs
AutoHfQuantizer.merge_quantization_configs = staticmethod(_merge)  # type: ignore[method-assign, assignment]
