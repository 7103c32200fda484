"""What a checkpoint of transformers' own method `bitnet` cannot hold, and why. Own."""

from __future__ import annotations

from transformers.quantizers.quantizers_utils import should_convert_module

from ..modules import BitLinear, QuantizedLayer, SubNorm
from ..quantizers import ACTIVATION_SCHEMES, make_weight_quantizer
from ..surgery import has_separate_experts, kept_for_native
from .dense import is_conv1d
from .format import Source

_ONLINE_WEIGHT = make_weight_quantizer("ternary", "absmean", "tensor")
_OTHERWISE = "format 'hf_bitnet' keeps every scheme"
_ADVICE = f"{_OTHERWISE}; for this one quantize with BitNetQuantizationConfig.bitnet_b158() and keep=[...] such layers"


def native_problems(source: Source, *, online: bool, packed: bool) -> list[str]:
    """Why the method cannot hold the model; empty where it can.

    Args:
        online: float weights are written. packed: codes are written as bytes.
    """
    found = [
        f"it has no packed embeddings, and {name} is quantized; {_OTHERWISE}, or quantize without `embeddings`"
        for name in source.tables
    ]
    for name, layer in source.layers.items():
        problem = _problem(layer) or (_online_problem(layer) if online else None)
        if problem is None and packed and not online and layer.out_features % 4:
            problem = (
                f"its {layer.out_features} output features are not a multiple of 4, which packed weights need; export with "
                "kind='autobitlinear', packed=False"
            )
        if problem is not None:
            found.append(f"{name} cannot be written in the native 'bitnet' format: {problem}")
    return found or [*_expert_problems(source), *_norm_problems(source), *_name_problems(source)]


def _problem(layer: QuantizedLayer) -> str | None:
    quantizer = layer.quantizer
    if quantizer.grid.values != [-1.0, 0.0, 1.0] or quantizer.scale_shape(layer.out_features, layer.in_features) != (1, 1):
        what = f"it is {quantizer.scheme} with one scale a {quantizer.granularity}"
        return f"{what}, the format holds ternary weights with one scale for the tensor. {_ADVICE}"
    if layer.activation is not ACTIVATION_SCHEMES.get("int8"):
        return f"its activations are {layer.activation.__name__}, the format means int8 for each token. {_ADVICE}"
    return f"it is a Conv1D, which transformers leaves alone there. {_ADVICE}" if is_conv1d(layer) else None


def norm_of(layer: QuantizedLayer) -> SubNorm | None:
    """The norm in front of a layer, unless it is still the identity."""
    return norm if (norm := layer.sub_norm) is not None and float(norm.blend) != 0.0 else None


def _online_problem(layer: QuantizedLayer) -> str | None:
    if not isinstance(layer, BitLinear):
        return (
            "kind 'online' holds float weights, and this model is packed; choose kind='bitlinear', or unpack it first with "
            "hf_bitnet.unpack_model(model)"
        )
    if layer.quantizer != _ONLINE_WEIGHT:
        return (
            f"transformers computes its scale as mean|w| in every forward, and here it is {layer.quantizer.scale_rule!r}; use "
            "kind='bitlinear'"
        )
    return None


def _expert_problems(source: Source) -> list[str]:
    if not has_separate_experts(source.model):
        return []
    return [
        "transformers' method 'bitnet' leaves experts in full precision, and here they are quantized; use format 'hf_bitnet', "
        "or keep them: keep=[r'experts']"
    ]


def _norm_problems(source: Source) -> list[str]:
    norms = [norm for layer in source.layers.values() if (norm := norm_of(layer)) is not None]
    partial = len(norms) < len(source.layers) or any(float(norm.blend) != 1.0 or norm.eps != norms[0].eps for norm in norms)
    if not norms or not partial:
        return []
    return [
        "it has a norm in front of every quantized layer or of none, at full strength; use format 'hf_bitnet' instead, or "
        "quantize without sub_norm (after training: hf_bitnet.set_norm_blend(model, 1.0))"
    ]


def _name_problems(source: Source) -> list[str]:
    kept, float32 = kept_for_native(source.model), source.model._keep_in_fp32_modules or ()
    return [
        f"{name} cannot be written in the native 'bitnet' format: by its name transformers would take it for one of the layers "
        f"that are kept ({', '.join(kept[:6])}, ...); keep it too: keep=[r'{name}']"
        for name in source.layers
        if not should_convert_module(name, [*kept, *float32])
    ]
