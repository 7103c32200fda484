"""A model of ours from layers that were read, one after the other. Own.

What is read becomes the tensors of a packed checkpoint, and goes the way that a saved one goes: transformers loads it, the
plug-in makes the layers, and every check of a checkpoint holds. Memory: of the packed model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from ..config import BitNetQuantizationConfig
from ..modules import PackedBitLinear
from ..quantizers import ACTIVATION_SCHEMES
from ..surgery import choose, separate_experts
from .codes import Found, Misfit
from .folder import model_class

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
WRONG_MODEL = (
    "the model described is not the one that is stored. Give the config of the right one: import_model(..., base=<folder or "
    "Hub name>)"
)
# what transformers can make a model in
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# fields of a layer's config, in pairs, so that equal ones can be counted
Kind = tuple[tuple[str, Any], ...]


class Place(NamedTuple):
    """A linear map of the model: its module name, sizes, and whether its weight is stored (in_features, out_features)."""

    name: str
    out_features: int
    in_features: int
    transposed: bool


class Wanted(NamedTuple):
    """What a model needs.

    Attributes:
        places: name -> linear map that can be quantized, by the module's name and by that of checkpoints where they differ.
        shapes: name of a parameter or buffer -> its shape.
    """

    places: dict[str, Place]
    shapes: dict[str, tuple[int, ...]]

    def transposed(self, layer: str) -> Misfit | None:
        """Why a weight with scales of its rows is none for a layer that stores (in_features, out_features)."""
        if layer not in self.places or not self.places[layer].transposed:
            return None
        return Misfit(
            "it is stored (in_features, out_features), so that scales of its rows are those of inputs, as no layer has"
        )

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises ValueError when a tensor has another shape than the model's."""
        wanted = self.shapes.get(name, shape)
        if wanted != shape:
            raise ValueError(f"{name} has shape {shape}, the model needs {wanted}; {WRONG_MODEL}")


class Contents(Protocol):
    """A foreign checkpoint that was opened.

    Attributes:
        config: of the model, without quantization. source: what to call it in errors.
    """

    config: PreTrainedConfig
    source: str

    def tensors(self, wanted: Wanted) -> Iterator[tuple[str, Tensor | Found | Misfit]]:
        """(name of a parameter, what it is) of every tensor."""
        ...

    def advice(self) -> str:
        """What to do where no layer is quantized."""
        ...


def assemble(contents: Contents, *, activation: str | None, dtype: torch.dtype | None, **options: Any) -> Any:
    """The packed model of a foreign checkpoint.

    Args:
        activation: scheme of the inputs of all quantized layers; None takes what the checkpoint says.
        dtype: of what is not quantized; None takes the config's.
        options: of from_pretrained.

    Raises ValueError where a layer does not fit, none is quantized, or a tensor has no place or is missing.
    """
    kind = model_class(contents.config)
    said = getattr(contents.config, "dtype", None)
    said = said if isinstance(said, torch.dtype) else None
    _refuse_dtype(contents, dtype or said)
    wanted = wanted_by(kind, contents.config)
    places = wanted.places
    state: dict[str, Tensor] = {}
    kinds: dict[str, Kind] = {}
    misfits: list[str] = []
    for name, got in contents.tensors(wanted):
        layer = name.removesuffix(".weight")
        if isinstance(got, Misfit):
            misfits.append(f"{name}: {got.reason}")
        elif isinstance(got, Found) and layer in places:
            got = got if activation is None else got._replace(activation=activation)
            wanted.check(name, tuple(got.quantized.codes.shape)[:: -1 if places[layer].transposed else 1])
            state |= _packed(layer, got)
            kinds[places[layer].name] = _kind(got)
        else:  # where a layer cannot be quantized here (an output head), its values serve
            state[name] = got.quantized.dequantize() if isinstance(got, Found) else got
            wanted.check(name, tuple(state[name].shape))
    _refuse(contents, misfits, bool(kinds))
    config = contents.config
    kept = [name for name in dict.fromkeys(place.name for place in places.values()) if name not in kinds]
    config.quantization_config = quantization_config(kinds, kept, kind.base_model_prefix).to_dict()
    config.architectures = [kind.__name__]
    return _loaded(kind, state, contents, dtype or said or _dtype_of(state), options)


def wanted_by(kind: Any, config: PreTrainedConfig) -> Wanted:
    """What a model of this config needs. Raises ValueError where the config's values contradict each other."""
    try:
        with torch.device("meta"):
            model = kind(config)
    except Exception as error:  # whatever a model's constructor raises
        raise ValueError(f"no {kind.__name__} can be made of the config ({type(error).__name__}: {error})") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    places = {}
    with separate_experts(model):
        for choice in choose(model, BitNetQuantizationConfig()):
            if choice.kept is None:
                rows, columns = choice.module.get_parameter("weight").shape
                transposed = not hasattr(choice.module, "out_features")
                places[choice.name] = Place(choice.name, *((columns, rows) if transposed else (rows, columns)), transposed)
        on_disk = _stored_names(model, list(places))
    return Wanted(places | {on_disk[name]: place for name, place in places.items()}, shapes)


def _stored_names(model: Any, layers: list[str]) -> dict[str, str]:
    stands = {f"{layer}.weight": torch.empty(0, device="meta") for layer in layers}
    layer_of = {id(stand): layer for layer, stand in zip(layers, stands.values(), strict=True)}
    reverted = revert_weight_conversion(model, stands)
    return {layer_of[id(stand)]: name.removesuffix(".weight") for name, stand in reverted.items()}


def quantization_config(kinds: Mapping[str, Kind], kept: list[str], base_prefix: str) -> BitNetQuantizationConfig:
    """The config of a packed model with these layers: the commonest kind in the fields, others in overrides.

    Args:
        base_prefix: what the names begin with that they have not in the model without its head.
    """
    (common, _), *_ = Counter(kinds.values()).most_common(1)
    others: dict[Kind, list[str]] = {}
    for name, kind in kinds.items():
        if kind != common:
            others.setdefault(kind, []).append(name)
    overrides: dict[str, str | dict[str, Any]] = {}
    for kind, names in others.items():
        for pattern in _patterns(names, kinds.keys() - set(names), base_prefix):
            overrides[pattern] = dict(kind)
    fields: dict[str, Any] = dict(common)
    return BitNetQuantizationConfig(
        **fields,
        form="packed",
        overrides=overrides,
        keep=_patterns(kept, kinds.keys(), base_prefix),
        quantized_modules=list(kinds),
    )


def _kind(found: Found) -> Kind:
    quantizer = found.quantizer
    return (
        ("weight", quantizer.scheme),
        ("weight_scale", quantizer.scale_rule),
        ("granularity", quantizer.granularity),
        ("group_size", quantizer.group_size),
        ("activation", found.activation),
    )


def _patterns(names: list[str], others: Set[str], base_prefix: str) -> list[str]:
    """Regular expressions that find these modules and none of the others."""
    stars = {_NUMBER.sub("*", name) for name in others}
    patterns = []
    for name in names:
        any_number = _NUMBER.sub("*", name)
        one = (name if any_number in stars else any_number).removeprefix(f"{base_prefix}.")
        escaped = re.escape(one).replace(r"\*", r"\d+")
        patterns.append(rf"(^|\.){escaped}$")
    return list(dict.fromkeys(patterns))


def _packed(layer: str, found: Found) -> dict[str, Tensor]:
    rows, columns = found.quantized.codes.shape
    kind = ACTIVATION_SCHEMES.get(found.activation)
    packed = PackedBitLinear(columns, rows, False, quantizer=found.quantizer, activation=kind, device="meta")
    packed.store(found.quantized)
    return {f"{layer}.weight": packed.weight.data, f"{layer}.weight_scale": packed.weight_scale.data}


def _refuse(contents: Contents, misfits: list[str], any_found: bool) -> None:
    if misfits:
        more = f" (and {len(misfits) - 3} more layers)" if len(misfits) > 3 else ""
        raise ValueError(f"{contents.source} cannot be imported with equal values: {'; '.join(misfits[:3])}{more}")
    if not any_found:
        raise ValueError(f"{contents.source} holds no quantized layer: {contents.advice()}")


def _refuse_dtype(contents: Contents, dtype: torch.dtype | None) -> None:
    if dtype not in (None, *_DTYPES):
        legal = ", ".join(map(str, _DTYPES))
        raise ValueError(
            f"{contents.source} should be loaded in {dtype}, in which nothing is computed; legal: {legal}. Say which one: "
            "import_model(..., dtype='bfloat16')"
        )


def _dtype_of(state: Mapping[str, Tensor]) -> torch.dtype:
    """Of the first tensor that a model can be in."""
    found = (tensor.dtype for name, tensor in state.items() if not name.endswith("_scale"))
    return next((dtype for dtype in found if dtype in _DTYPES), torch.float32)


def _loaded(kind: Any, state: dict[str, Tensor], contents: Contents, dtype: torch.dtype, options: Any) -> Any:
    given = {**options, "config": contents.config, "state_dict": state, "dtype": dtype, "output_loading_info": True}
    try:
        model, info = kind.from_pretrained(None, **given)
    except RuntimeError as error:  # shapes that differ
        raise ValueError(f"{contents.source} does not fit into {kind.__name__} ({error}); {WRONG_MODEL}") from error
    for what, keys in (("lacks", info["missing_keys"]), ("has no place in the model for", info["unexpected_keys"])):
        if keys:
            named = ", ".join(sorted(keys)[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise ValueError(f"{contents.source} {what} {named}: {WRONG_MODEL}")
    model.name_or_path = model.config.name_or_path = contents.source
    return model
