"""Writes the packed checkpoint of transformers' own method `bitnet`. Own; the format is transformers' integrations/bitnet.py.

Kind bitlinear: `weight` uint8 (out_features / 4, in_features), the four quarters of the rows in two bits each;
`weight_scale` (1,) = 1 / scale. transformers, mlx-lm and others load it without us. Trainable checkpoints need no exporter:
save_pretrained writes them natively wherever transformers can compute the same.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.quantizers.quantizers_utils import should_convert_module

from ..config import NATIVE_METHOD
from ..modules import BitConv1D, PackedBitLinear, QuantizedLayer
from ..modules.native import pack_rows
from ..quantizers import ACTIVATION_SCHEMES
from ..surgery import kept_for_native, quantized_layers, quantized_tables


def export_native(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
) -> Path:
    """Writes a quantized model as a native packed `bitnet` checkpoint. The model is left as it is.

    Everything is written into a temporary folder beside `path`, which takes its name at the end: there is never half a
    checkpoint under `path`.

    Args:
        model: in train or packed form; ternary with one scale for a tensor, int8 activations.
        tokenizer: saved into the same folder.
        overwrite: replace a folder that is there already.

    Returns the folder.

    Raises:
        TypeError: not a transformers model.
        ValueError: what the format cannot hold: another scheme, a Conv1D, a number of output features that 4 does not
            divide, norms in front of some layers only; weights that are offloaded.
        FileExistsError: `path` exists and `overwrite` is False.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"export_native takes a transformers model, got {type(model).__name__}; pass what from_pretrained returned"
        )
    layers = dict(quantized_layers(model))
    if not layers:
        raise ValueError("export_native: the model has no quantized layer; call quantize_model(model, config) first")
    tables = quantized_tables(model)
    if tables:
        raise ValueError(
            f"export_native: the native 'bitnet' format has no packed embeddings, and {tables[0][0]} is quantized; save with "
            "save_pretrained, or quantize without `embeddings`"
        )
    for name, layer in layers.items():
        _check(name, layer)
    target = Path(path)
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists already; choose another folder, or export_native(model, path, overwrite=True)")
    config = copy.deepcopy(model.config)
    config.quantization_config = _settings(model, layers)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    state = _state(model, layers)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        config.save_pretrained(folder)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        save_torch_state_dict(state, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
        _take_place(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return target


def _take_place(folder: Path, target: Path) -> None:
    folder.chmod(0o777 & ~_umask())  # mkdtemp makes it private
    if not target.exists():
        folder.rename(target)
        return
    # two renames: at every moment the old or the new folder is complete, under one of the two names
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(old / target.name)
    folder.rename(target)
    shutil.rmtree(old)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _check(name: str, layer: QuantizedLayer) -> None:
    quantizer = layer.quantizer
    what = f"{quantizer.scheme} with one scale a {quantizer.granularity}"
    problem = None
    if quantizer.grid.values != [-1.0, 0.0, 1.0] or quantizer.scale_shape(layer.out_features, layer.in_features) != (1, 1):
        problem = f"it is {what}, the format holds ternary weights with one scale for the tensor"
    elif layer.activation is not ACTIVATION_SCHEMES.get("int8"):
        problem = f"its activations are {layer.activation.__name__}, the format means int8 for each token"
    elif isinstance(layer, BitConv1D) or (isinstance(layer, PackedBitLinear) and layer.was_conv1d):
        problem = "it is a Conv1D, which transformers leaves alone there"
    elif layer.out_features % 4:
        problem = f"its {layer.out_features} output features are not a multiple of 4"
    elif any(tensor is not None and tensor.is_meta for tensor in (layer.weight, layer.bias)):
        problem = "its weight is offloaded; load the model without disk offload"
    if problem is not None:
        raise ValueError(
            f"{name} cannot be written in the native 'bitnet' format: {problem}. save_pretrained keeps every scheme; for this "
            "format quantize with BitNetQuantizationConfig.bitnet_b158() and keep=[...] such layers"
        )


def _settings(model: PreTrainedModel, layers: dict[str, QuantizedLayer]) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    norms = [norm for layer in layers.values() if (norm := layer.sub_norm) is not None and float(norm.blend) != 0.0]
    if norms and (len(norms) < len(layers) or any(float(norm.blend) != 1.0 or norm.eps != norms[0].eps for norm in norms)):
        raise ValueError(
            "the native 'bitnet' format has a norm in front of every quantized layer or of none, at full strength; save with "
            "save_pretrained instead, or quantize without sub_norm (after training: hf_bitnet.set_norm_blend(model, 1.0))"
        )
    kept = kept_for_native(model)
    clash = [name for name in layers if not should_convert_module(name, [*kept, *(model._keep_in_fp32_modules or ())])]
    if clash:
        raise ValueError(
            f"{clash[0]} cannot be written in the native 'bitnet' format: by its name transformers would take it for one of "
            f"the layers that are kept ({', '.join(kept[:6])}, ...); keep it too: keep=[r'{clash[0]}']"
        )
    return {
        "quant_method": NATIVE_METHOD,
        "linear_class": "bitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": kept,
        "use_rms_norm": bool(norms),
        "rms_norm_eps": norms[0].eps if norms else 1e-6,
    }


def _state(model: PreTrainedModel, layers: dict[str, QuantizedLayer]) -> dict[str, Tensor]:
    """Every tensor of the checkpoint under its name there."""
    ours = tuple(f"{name}." for name in layers)
    ignored = set(model._keys_to_ignore_on_save or ())
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(ours) and k not in ignored}
    for name, layer in layers.items():
        state |= {f"{name}.{key}": value for key, value in native_tensors(layer).items()}
    state = revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))
    # a part of a larger tensor (one expert of fused ones) would be refused, as it drags the whole with it
    return {k: v.contiguous() if v.untyped_storage().nbytes() == v.nbytes else v.clone() for k, v in state.items()}


def native_tensors(layer: QuantizedLayer) -> dict[str, Tensor]:
    """A layer's tensors in the kind bitlinear: weight, weight_scale, and bias and rms_norm.weight where it has them."""
    quantized = layer.quantized_weight()
    tensors = {
        "weight": pack_rows(quantized.codes),
        "weight_scale": quantized.scale.detach().float().reshape(1).reciprocal(),
        "bias": layer.plain_bias,
        "rms_norm.weight": None if (norm := layer.sub_norm) is None or float(norm.blend) == 0.0 else norm.weight,
    }
    return {key: value.detach() for key, value in tensors.items() if value is not None}
