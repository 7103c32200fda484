"""BitNetQuantizer: from_pretrained and save_pretrained for both forms. Own.

Train form: BitLinear layers, filled by transformers' normal loading; nothing of the quantizer stays on the model, so it is
a plain PreTrainedModel for Trainer, FSDP and save_pretrained. Packed form: the quantizer stays, and lets Trainer train
adapters only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer

# as a module: transformers may import us in the middle of an import of surgery, which imports transformers
from .. import surgery
from ..config import STORAGES, BitNetQuantizationConfig, NativeBitNetConfig
from ..modules import PackedBitLinear, PackedEmbedding
from .checks import before_initialization, check_files, check_loaded, check_stored_dtype
from .operations import PackNativeRows, QuantizeOnLoad, UnpackTrits, layers_converter, without_our_converters


class BitNetQuantizer(HfQuantizer):
    """Loads float, train-form and packed checkpoints into quantized layers."""

    quantization_config: BitNetQuantizationConfig  # type: ignore[assignment]

    def __init__(self, quantization_config: BitNetQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.layers: set[str] = set()
        self.packed: set[str] = set()
        self.errors: list[Exception] = []
        self.new: set[str] = set()
        self.dropped: list[Any] = []
        self.in_trits = self.pre_quantized and quantization_config.storage != STORAGES[0]

    def _process_model_before_weight_loading(  # type: ignore[override]
        self, model: Any, checkpoint_files: list[str] | None = None, **unused: Any
    ) -> None:
        check_files(checkpoint_files, self.pre_quantized)
        part = self._part(model)
        self._prepare(part)
        # it attached a copy with the list of layers
        self.quantization_config = part.config.quantization_config
        layers = {**dict(surgery.quantized_layers(model)), **dict(surgery.quantized_tables(model))}
        self.layers = set(layers)
        self.packed = {name for name, layer in layers.items() if isinstance(layer, PackedBitLinear | PackedEmbedding)}
        before_initialization(model, self._after_tensors)

    def _part(self, model: Any) -> Any:
        """What the config is about: the model, or its language model where that alone was quantized."""
        config = model.config.get_text_config(decoder=True)
        # from_pretrained puts the language model's on the whole config as well
        if not self.pre_quantized or config is model.config or getattr(config, "quantization_config", None) is None:
            return model
        return next((module for module in model.modules() if getattr(module, "config", None) is config), model)

    def _prepare(self, model: Any) -> None:
        surgery.prepare_model(model, self.quantization_config, saved=self.pre_quantized)

    def _after_tensors(self, model: Any, info: Any) -> None:
        # what transformers will tie to a tensor that is there, in either direction, is not missing
        tied = [{target, source} for target, source in model.all_tied_weights_keys.items()]
        coming: set[str] = set()
        while found := [pair for pair in tied if pair - coming and pair - (info.missing_keys - coming)]:
            coming.update(*found)
        experts = surgery.layers_of_experts(model)
        check_loaded(info, self.layers, self.errors, self.quantization_config, self.pre_quantized, coming, experts)
        self.new = {name for name in self.layers if f"{name}.weight" in info.missing_keys - coming}
        for name in self.layers - self.new:
            # parameters that went to the disk are empty here, and would be given random values: of bytes, which fails
            for module in model.get_submodule(name).modules():
                module._is_hf_initialized = True  # type: ignore[assignment]

    def param_needs_quantization(self, model: Any, param_name: str, **unused: Any) -> bool:
        layer, _, leaf = param_name.rpartition(".")
        return not self.pre_quantized and leaf == "weight" and layer in self.layers

    def get_quantize_ops(self) -> ConversionOps:  # type: ignore[override]
        return QuantizeOnLoad(self.errors)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        conversions = super().update_weight_conversions(weight_conversions, model)
        if surgery.has_separate_experts(model):
            self.dropped = [each for each in conversions if surgery.fused_weight(each) is not None]
            conversions = [each for each in conversions if each not in self.dropped]
        if not self.packed or self.pre_quantized != self.in_trits:
            return conversions
        patterns = self.quantization_config.quantized_modules or []
        operation = UnpackTrits(self.errors) if self.in_trits else None
        return [*conversions, layers_converter(patterns, model.base_model_prefix, operation)]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Only for quantized checkpoints. The dtype of the empty layer is right, float32 scales in a bfloat16 model too."""
        new = super().get_new_dtype(converter, param, dtype)
        if self.in_trits and dtype == torch.uint8:  # the operation looks at what is stored
            return None
        layer, _, leaf = converter.target_patterns[0].rpartition(".")
        if leaf == "weight" and layer in self.layers:
            check_stored_dtype(f"{layer}.weight", new is not None, layer in self.packed)
        return new

    def _process_model_after_weight_loading(self, model: Any, **unused: Any) -> Any:  # type: ignore[override]
        # the dropped ones find nothing to do until `dequantize_model` has made the experts fused again
        model._weight_conversions = [*without_our_converters(model._weight_conversions), *self.dropped]
        surgery.start_from_weights(model, self.new)
        surgery.reset_state(model)
        if self.pre_quantized:
            surgery.check_scales(model)
        self._attach(model)
        for name in self.packed:
            # loading makes every float parameter trainable
            model.get_submodule(name).get_parameter("weight_scale").requires_grad_(False)
        return model

    def _attach(self, model: Any) -> None:
        """The config onto the whole model, and in train form nothing else."""
        surgery.attach(model, self.quantization_config)

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:  # type: ignore[override]
        return surgery.dequantize_model(model, dtype=dtype)

    def is_serializable(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_trainable(self) -> bool:  # type: ignore[override]
        """Adapters on packed layers train: the gradient passes through them."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Only float weights train, and a model with those carries no quantizer."""
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class NativeBitNetQuantizer(BitNetQuantizer):
    """Loads checkpoints of transformers' own method `bitnet` into layers of ours; used by `load_native` only."""

    quantization_config: NativeBitNetConfig  # type: ignore[assignment]

    def _part(self, model: Any) -> Any:
        return model  # transformers replaces layers everywhere

    def _prepare(self, model: Any) -> None:
        settings = self.quantization_config.native or {}
        skip = self.get_modules_to_not_convert(model, settings["modules_to_not_convert"], model._keep_in_fp32_modules)
        surgery.prepare_native(model, self.quantization_config, skip)

    def _attach(self, model: Any) -> None:
        surgery.attach_native(model, self.quantization_config)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        conversions = super().update_weight_conversions(weight_conversions, model)
        if self.quantization_config.divides or self.quantization_config.online:
            return conversions
        patterns = self.quantization_config.quantized_modules or []
        return [*conversions, layers_converter(patterns, model.base_model_prefix, PackNativeRows(self.errors))]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        # floats that are going to be packed must not be cast to bytes before
        return None if dtype == torch.uint8 else super().get_new_dtype(converter, param, dtype)
