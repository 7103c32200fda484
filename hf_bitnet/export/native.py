"""Format "bitnet": checkpoints of transformers' own method `bitnet`. Own; the format is transformers' integrations/bitnet.py.

    kind            weight                                      weight_scale (1,)   bias
    bitlinear       uint8 (N / 4, K): the rows' four quarters   1 / scale           b
    autobitlinear   the same, or codes as floats (N, K)         scale               b / scale
    online          the float weight that is trained            none                b

All kinds may have a norm in front of every layer. transformers, mlx-lm and others load them without this library. The scale is
cast to the model's dtype when it is loaded. Leaves out: packed embeddings, and scales of channels or groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import NATIVE_METHOD
from ..modules import NativeBitLinear, NativeOfflineLinear, NativeOnlineLinear, QuantizedLayer
from ..modules.native import pack_rows
from ..surgery import kept_for_native, native_copy
from .dense import config_problems, write_configs
from .format import EXPORT_FORMATS, ExportFormat, Progress, Source
from .names import origins, saved_names
from .native_check import compare_codes, compare_online_codes
from .native_problems import native_problems, norm_of
from .options import check_choices, check_shard_size
from .plain import compare_tensors, plain_logits
from .report import Check, WrittenTensor
from .rounding import rounded
from .running import as_loaded
from .scales import scale_of
from .stream import Planned, planned, write_safetensors

_KINDS = {"bitlinear": NativeBitLinear, "autobitlinear": NativeOfflineLinear, "online": NativeOnlineLinear}


@EXPORT_FORMATS.register("bitnet")
@dataclass(frozen=True)
class Native(ExportFormat):
    """Args:
    kind: "bitlinear", "autobitlinear" or "online" (float weights, for models in train form).
    packed: False stores codes as floats, which kind "autobitlinear" can; then any number of output features will do.
    max_shard_size: of one file.
    """

    summary: ClassVar[str] = "ternary weights in transformers' own method bitnet"
    readers: ClassVar[str] = "transformers, mlx-lm"

    kind: str = "bitlinear"
    packed: bool = True
    max_shard_size: str | int = "5GB"

    def __post_init__(self) -> None:
        check_choices("bitnet", self, {"kind": _KINDS, "packed": (True, False)})
        check_shard_size("bitnet", self.max_shard_size)
        if not self.packed and self.kind != "autobitlinear":
            raise ValueError(
                f"format 'bitnet': packed=False is for kind='autobitlinear', and kind is {self.kind!r}; leave packed out"
            )

    @property
    def online(self) -> bool:
        return self.kind == "online"

    def refusals(self, source: Source) -> list[str]:
        return config_problems(source) or native_problems(source, online=self.online, packed=self.packed)

    def notes(self, source: Source) -> list[str]:
        dtype = str(source.model.dtype).removeprefix("torch.")
        notes = [f"transformers quantizes activations in {dtype} and unpacks weights to it: it saves no memory when it runs"]
        if self.kind != "online" and source.model.dtype != torch.float32:
            notes.append(f"it rounds the scales to {dtype} when it loads them")
        return notes

    def write(self, source: Source, folder: Path, progress: Progress) -> list[WrittenTensor]:
        saved, names = self._saved(source)
        write_safetensors(folder, saved, max_shard_size=self.max_shard_size, progress=progress)
        write_configs(source, folder, self._settings(source), source.model.dtype)
        return [self._written(source, names[each.name], each) for each in saved]

    def _saved(self, source: Source) -> tuple[list[Planned], dict[str, str]]:
        """Every tensor of the file, and its name there -> its name in the model."""
        tensors = [each for name, layer in source.layers.items() for each in self._layer(name, layer, source.model.dtype)]
        tensors += [planned(name, tensor) for name, tensor in source.others.items()]
        saved = saved_names(source.model, tensors)
        return saved, origins(tensors, saved)

    def _written(self, source: Source, name: str, each: Planned) -> WrittenTensor:
        kind, shape = str(each.dtype).removeprefix("torch."), each.shape
        layer = source.layers.get(name.removesuffix(".weight"))
        if layer is not None and not self.online:
            kind = "2-bit" if self.packed else f"ternary as {kind}"
            shape = (layer.out_features, layer.in_features)
        return WrittenTensor(name, each.name, kind, shape, each.bytes)

    def _layer(self, name: str, layer: QuantizedLayer, dtype: torch.dtype) -> list[Planned]:
        rows, columns, float_dtype = layer.out_features, layer.in_features, dtype
        if self.online:
            weight: Tensor = layer.weight  # type: ignore[assignment]
            tensors = [planned(f"{name}.weight", weight)]
        else:
            dtype, shape = (torch.uint8, (rows // 4, columns)) if self.packed else (dtype, (rows, columns))
            tensors = [Planned(f"{name}.weight", dtype, shape, lambda: self._codes(layer, dtype), rows * columns)]
        if not self.online:
            tensors.append(
                Planned(f"{name}.weight_scale", torch.float32, (1,), lambda: self._checked_scale(name, layer, float_dtype), 0)
            )
        if (bias := layer.plain_bias) is not None:
            tensors.append(Planned(f"{name}.bias", bias.dtype, (rows,), lambda: self._bias(layer, bias), 0))
        if (norm := norm_of(layer)) is not None:
            tensors.append(planned(f"{name}.rms_norm.weight", norm.weight, 0))
        return tensors

    def _codes(self, layer: QuantizedLayer, dtype: torch.dtype) -> Tensor:
        quantized = layer.quantized_weight()
        return pack_rows(quantized.codes) if self.packed else quantized.levels(dtype)

    def _checked_scale(self, name: str, layer: QuantizedLayer, dtype: torch.dtype) -> Tensor:
        """Refused where the dtype that transformers casts it to cannot hold it."""
        way_out = "make the model float32 or bfloat16 first (model.bfloat16()), or export with format='hf_bitnet'"
        rounded(f"format 'bitnet': the scale of {name}", scale := self._scale(layer), dtype, way_out, is_scale=True)
        return scale

    def _scale(self, layer: QuantizedLayer) -> Tensor:
        scale = scale_of(layer).detach().float().reshape(1)
        return scale.reciprocal() if self.kind == "bitlinear" else scale.clone()

    def _bias(self, layer: QuantizedLayer, bias: Tensor) -> Tensor:
        if self.kind != "autobitlinear":
            return bias
        return (bias.detach().float() / self._scale(layer)).to(bias.dtype)  # the product with the scale comes after it

    def _settings(self, source: Source) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        norms = [norm for layer in source.layers.values() if (norm := norm_of(layer)) is not None]
        return {
            "quant_method": NATIVE_METHOD,
            "linear_class": "bitlinear" if self.kind == "bitlinear" else "autobitlinear",
            "quantization_mode": "online" if self.online else "offline",
            "modules_to_not_convert": kept_for_native(source.model),
            "use_rms_norm": bool(norms),
            "rms_norm_eps": norms[0].eps if norms else 1e-6,
        }

    def compare(self, source: Source, folder: Path, written: list[WrittenTensor], logits: bool) -> list[Check]:
        saved, names = self._saved(source)
        weights = {f"{name}.weight": layer for name, layer in source.layers.items()}
        layers = {file: weights[name] for file, name in names.items() if name in weights}
        others = {each.name: each for each in saved if self.online or each.name not in layers}
        same = compare_tensors(folder, others, "float tensors" if self.online else "scales, biases and what stays float")
        codes = compare_online_codes(layers, folder) if self.online else compare_codes(layers, folder)
        if not logits:
            return [codes, same]
        return [codes, same, plain_logits(source, folder, source.model.dtype, lambda: self._twin(source))]

    def _twin(self, source: Source) -> Any:
        """The model in transformers' own arithmetic, with layers that hold what the file should hold."""
        dtype = source.model.dtype
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, layer in source.layers.items():
            made = {each.name[len(name) + 1 :]: each.tensor().detach() for each in self._layer(name, layer, dtype)}
            if not self.online and not self.packed:
                made["weight"] = pack_rows(made["weight"].to(torch.int8))
            tensors[name] = made
        settings = self._settings(source)
        eps = settings["rms_norm_eps"] if settings["use_rms_norm"] else None
        twin = native_copy(source.model, _KINDS[self.kind], tensors, dtype, eps)
        return as_loaded(twin)
