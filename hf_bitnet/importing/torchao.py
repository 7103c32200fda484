"""Checkpoints that transformers saved of a model quantized by torchao (`quant_method` "torchao"). Read without torchao. Own.

A quantized parameter `<layer>.weight` is stored in parts, `<layer>._weight_qdata`, `..._scale`, `..._zero_point`; the notes of
the safetensors files say of each parameter its class, its attributes and its parts (torchao 0.18,
prototype/safetensors). `value = (qdata - zero_point) * scale`, with scales for blocks of `block_size`. Two classes keep whole
numbers in plain sight and are read: Int8Tensor and IntxUnpackedToInt8Tensor. Others hold floats, or bytes in the order of a GPU
kernel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .assembly import Wanted
from .codes import Found, Levels, Misfit, fit
from .folder import Folder

_NAMES, _PLAIN = "tensor_names", "Tensor"
_READ = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
# parts that change what goes in, or come from calibration
_OF_INPUT = ("act_pre_scale", "act_quant_scale", "act_quant_zero_point")


class TorchAO:
    """`Contents` of such a folder. Raises ValueError when the notes of its files are not torchao's."""

    def __init__(self, folder: Folder, outside: str, any_activation: bool) -> None:
        """`any_activation`: the caller says how inputs are quantized, so the checkpoint need not say what we have."""
        self.folder, self.outside, self.any_activation = folder, outside, any_activation
        self.config, self.source = folder.config(), str(folder.path)
        self.notes = self._notes()

    def tensors(self, wanted: Wanted) -> Iterator[tuple[str, Tensor | Found | Misfit]]:
        parts: set[str] = set()
        for name, note in sorted(self.notes.items()):  # notes come in no order
            if note.get("_type") != _PLAIN:
                mine = {each: _part(name, each) for each in note.get("_tensor_data_names", ())}
                parts |= set(mine.values())
                yield name, wanted.transposed(name.removesuffix(".weight")) or self._layer(note, mine)
        for name in self.folder.names:
            if name not in parts:
                yield name, self.folder.tensor(name)

    def advice(self) -> str:
        return "none of its layers that could be is one of torchao's tensors"

    def _layer(self, note: dict[str, Any], parts: Mapping[str, str]) -> Found | Misfit:
        kind, about = note.get("_type"), note.get("_data")
        if kind not in _READ or not isinstance(about, dict):
            return Misfit(f"it is a torchao {kind}; read are {' and '.join(_READ)} (Int8..., IntxWeightOnlyConfig and others)")
        given = [each for each in _OF_INPUT if each in parts]
        if given and not (given == ["act_quant_scale"] and self.any_activation):
            return Misfit(f"its input is changed by {given[0]}, for which a layer here has no place; save it without")
        activation = _activation(about)
        if activation is None and not self.any_activation:
            return Misfit(
                "its input is quantized in a way that no scheme here computes; name the nearest one, for example activation="
                "'int8' (per token) or activation='none'"
            )
        got = self._weight(about, {each: self.folder.tensor(name) for each, name in parts.items() if each not in _OF_INPUT})
        return got if isinstance(got, Misfit) else got._replace(activation=activation or "none")

    def _weight(self, about: dict[str, Any], parts: dict[str, Tensor]) -> Found | Misfit:
        codes, scale, zero = parts.get("qdata"), parts.get("scale"), parts.get("zero_point")
        if codes is None or scale is None:
            return Misfit("its parts qdata or scale are missing")
        if codes.dtype != torch.int8 or codes.dim() != 2 or not codes.numel():
            return Misfit(f"its qdata is {codes.dtype} of shape {tuple(codes.shape)}; legal is int8 (N, K)")
        if not scale.is_floating_point() or not scale.numel():
            return Misfit(f"its scale is {scale.dtype} of shape {tuple(scale.shape)}; legal are floats, one a row or group")
        rows, columns = codes.shape
        scale = scale.reshape(scale.shape[0] if scale.dim() else 1, -1)
        if scale.shape[0] not in (1, rows) or (scale.shape[0] == 1 < rows and scale.shape[1] > 1) or columns % scale.shape[1]:
            return Misfit(
                f"its scales have shape {tuple(scale.shape)}; legal is one for the tensor, a row, or a group of a row"
            )
        levels = codes.to(torch.int16)
        if zero is not None and bool(zero.any()):
            if not torch.equal(zero, zero.round()) or zero.numel() != scale.numel():
                return Misfit("its zero points are not whole numbers, one beside each scale")
            lowest, highest = (float(each) for each in torch.aminmax(zero))
            if lowest < -128 or highest > 127:
                return Misfit(f"its zero points go from {lowest:g} to {highest:g}; legal are those of int8, -128 to 127")
            wide = zero.reshape(scale.shape).to(torch.int16).repeat_interleave(columns // scale.shape[1], dim=1)
            levels = levels - wide
        return fit(Levels(levels, scale.float(), _bits(about)), self.outside)

    def _notes(self) -> dict[str, dict[str, Any]]:
        try:
            names = json.loads(self.folder.metadata[_NAMES])
            # every file of a sharded checkpoint has the notes of its own tensors; their lists of names replace each other
            named = (
                {name: text for name, text in self.folder.metadata.items() if "." in name} if isinstance(names, list) else {}
            )
            notes = {name: json.loads(text) for name, text in named.items()}
        except (KeyError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{self.folder.path} is of the method 'torchao', but the notes of its safetensors files are not torchao's "
                f"({error!r}); save it again with save_pretrained"
            ) from None
        return {name: note for name, note in notes.items() if isinstance(note, dict) and "_type" in note}


def _part(name: str, part: Any) -> str:
    module, _, parameter = name.rpartition(".")
    return f"{module}._{parameter}_{part}"


def _bits(about: dict[str, Any]) -> int:
    """Of a level: "int4" in target_dtype, else 8."""
    target = about.get("target_dtype")
    said = str(target.get("_data", "")) if isinstance(target, dict) else ""
    return int(said[3:]) if said[:3] == "int" and said[3:].isdigit() else 8


def _activation(about: dict[str, Any]) -> str | None:
    """The scheme for what a weight says of its input, or None where there is none.

    Their symmetric scale is max|x| / 127.5, ours max|x| / 127: the same scheme, other roundings.
    """
    said = about.get("act_quant_kwargs", about.get("activation_quantization"))
    if said is None:
        return "none"
    if said == "int8_asym_per_token":
        return "int8_asymmetric"
    settings = said.get("_data") if isinstance(said, dict) else None
    if not isinstance(settings, dict) or settings.get("reduce_range"):  # the latter leaves 7 bits
        return None
    granularity, mapping = settings.get("granularity"), settings.get("mapping_type")
    if not isinstance(granularity, dict) or granularity.get("_type") != "PerRow":
        return None
    return "int8_asymmetric" if isinstance(mapping, dict) and mapping.get("_data") == "ASYMMETRIC" else "int8"
