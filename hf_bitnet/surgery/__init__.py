"""Floor 4: the only code that walks a model."""

from .attached import attach, attach_native, config_of, detach, kept_for_native
from .copies import empty_packed_copy, native_copy, packed_copy
from .coverage import Coverage, check_finite, config_place, coverage
from .experts import (
    FusedExpertsError,
    fused_weight,
    has_separate_experts,
    layers_of_experts,
    separate_experts,
    separates_what_files_hold_fused,
)
from .full_precision import full_precision_copy, independent_copy, output_head
from .generation import optimize_for_generation
from .inputs import processor_of
from .intact import check_codes, check_scales
from .layers import attention_heads, attention_projections, transformer_layers
from .prepare import prepare_model, prepare_native, start_from_weights, state_from_float
from .probing import each_batch, probing, run
from .select import choose
from .swap import (
    check_calibrated,
    check_quantizable,
    convert_native,
    dequantize_model,
    make_spec,
    pack_model,
    quantize_model,
    unpack_model,
)
from .switches import harden, kept_codes, reset_state, set_norm_blend, set_strength, set_strengths
from .walk import quantized_layers, quantized_tables, trained_layers, trained_tables

__all__ = [
    "Coverage",
    "FusedExpertsError",
    "attach",
    "attach_native",
    "attention_heads",
    "attention_projections",
    "check_calibrated",
    "check_codes",
    "check_finite",
    "check_quantizable",
    "check_scales",
    "choose",
    "config_of",
    "config_place",
    "convert_native",
    "coverage",
    "dequantize_model",
    "detach",
    "each_batch",
    "empty_packed_copy",
    "full_precision_copy",
    "fused_weight",
    "harden",
    "has_separate_experts",
    "independent_copy",
    "kept_codes",
    "kept_for_native",
    "layers_of_experts",
    "make_spec",
    "native_copy",
    "optimize_for_generation",
    "output_head",
    "pack_model",
    "packed_copy",
    "prepare_model",
    "prepare_native",
    "probing",
    "processor_of",
    "quantize_model",
    "quantized_layers",
    "quantized_tables",
    "reset_state",
    "run",
    "separate_experts",
    "separates_what_files_hold_fused",
    "set_norm_blend",
    "set_strength",
    "set_strengths",
    "start_from_weights",
    "state_from_float",
    "trained_layers",
    "trained_tables",
    "transformer_layers",
    "unpack_model",
]
