"""What a checkpoint must hold, checked where transformers would warn, or load something else. Own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Set
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .. import surgery
from ..config import BitNetQuantizationConfig


def check_files(files: Iterable[str] | None, saved: bool) -> None:
    """Raises ValueError when a file cannot be read (cut off, or no safetensors), lies elsewhere, or would be packed again.

    Args:
        saved: by its config.json the checkpoint is quantized.
    """
    files = list(files or ())
    for file in files:
        if Path(file).parent != Path(files[0]).parent or ".." in Path(file).parts[-2:]:
            raise ValueError(f"the checkpoint's index names {file}, which is not in its folder; download the checkpoint again")
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"{file} is not a safetensors file; hf_bitnet reads no pickled weights. Save it as safetensors")
        try:
            with safe_open(file, framework="pt") as tensors:
                packed = None if saved else _packed_weight(tensors)
                scale = _whole_scale(tensors) if saved else None
            _refuse_twice(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or incomplete ({error}); copy or download it again") from None
        if packed is not None:
            raise ValueError(
                f"the checkpoint holds {packed} as bytes: it is packed already, but its config.json has no "
                "quantization_config; restore that file, and load it without a quantization_config"
            )
        if scale is not None:
            raise ValueError(
                f"{file} holds {scale} as whole numbers; a scale is a float number. The file is not ours, or damaged"
            )


def _whole_scale(tensors: Any) -> str | None:
    """A scale of an open safetensors file that is no float number, or None."""
    scales = (name for name in tensors.keys() if name.endswith(".weight_scale"))  # noqa: SIM118
    return next((name for name in scales if "F" not in tensors.get_slice(name).get_dtype()), None)


def _refuse_twice(file: str) -> None:
    """Raises ValueError when the header names a tensor twice: readers do not agree on which of them they take."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            double = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{file} is damaged or incomplete (it names {double!r} twice); copy or download it again")
        return fields

    with open(file, "rb") as opened:
        json.loads(opened.read(int.from_bytes(opened.read(8), "little")), object_pairs_hook=unique)


def _packed_weight(tensors: Any) -> str | None:
    """A tensor of an open safetensors file that is stored as bytes beside its scale, or None."""
    names = set(tensors.keys())
    weights = (name.removesuffix("_scale") for name in sorted(names) if name.endswith(".weight_scale"))
    return next((name for name in weights if name in names and tensors.get_slice(name).get_dtype() == "U8"), None)


def check_stored_dtype(name: str, stored_is_float: bool, expects_packed: bool) -> None:
    """Raises ValueError when packed bytes would be loaded as float weights, or the other way round."""
    if stored_is_float == expects_packed:
        stored, expected = ("float numbers", "packed") if stored_is_float else ("packed bytes", "train")
        raise ValueError(
            f"{name} holds {stored}, but the checkpoint's config.json says form={expected!r}; config.json and weights are not "
            "of the same checkpoint. Save the model again with save_pretrained, which writes both"
        )


def before_initialization(model: Any, check: Callable[[Any, Any], None]) -> None:
    """Calls `check(model, loading_info)` after the tensors are loaded and before transformers initialises the missing ones.

    There is no hook for that in a quantizer. The first method that transformers calls on the model then is wrapped, in
    this one instance and for one call.
    """
    name = "mark_tied_weights_as_initialized"

    def checked(loading_info: Any) -> Any:
        delattr(model, name)
        check(model, loading_info)
        return getattr(model, name)(loading_info)

    setattr(model, name, checked)


def check_loaded(
    info: Any,
    layers: set[str],
    errors: list[Exception],
    config: BitNetQuantizationConfig,
    saved: bool,
    coming: Set[str] = frozenset(),
    experts: Set[str] = frozenset(),
) -> None:
    """Raises on anything that would leave a quantized layer with other numbers than the checkpoint's.

    Args:
        info: transformers' `LoadStateDictInfo`. layers: dotted names of the quantized layers.
        errors: what was raised while quantizing. saved: the checkpoint was quantized already.
        coming: names of tensors that are going to be tied to others.
        experts: of `layers`, those that are parts of experts.
    """
    problem = errors[0] if errors else _problem(info, layers, config, saved, coming, experts)
    if problem is not None:
        # transformers reports from a `finally`, and would raise its own error over ours
        for collected in (info.missing_keys, info.unexpected_keys, info.mismatched_keys, info.error_msgs):
            collected.clear()
        info.conversion_errors.clear()
        raise problem


def _problem(
    info: Any, layers: set[str], config: BitNetQuantizationConfig, saved: bool, coming: Set[str], experts: Set[str]
) -> ValueError | None:
    for key, stored, expected in sorted(info.mismatched_keys):
        if _owner(key, layers):
            return ValueError(
                f"{key} has shape {tuple(stored)} in the checkpoint, but {tuple(expected)} by its config.json "
                f"(weight={config.weight!r}, form={config.form!r}); they are not of the same checkpoint, or one was edited"
            )
    missing = sorted(key for key in info.missing_keys - coming if _owner(key, layers))
    of_experts = not saved and [key for key in missing if _owner(key, experts)]
    if of_experts or (missing and (saved or config.form == "packed")):
        advice = "copy or save it again" if saved else "keep these layers (`keep`), or load with form='train'"
        if of_experts:  # never drawn anew: the file may hold them in another form
            missing = of_experts
            advice = "if it holds all of them in one tensor, load it without a quantization_config, then quantize_model(model)"
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        kind = surgery.FusedExpertsError if of_experts else ValueError
        return kind(f"the checkpoint lacks {', '.join(missing[:5])}{more}, which its quantized layers need; {advice}")
    return None


def _owner(key: str, layers: Set[str]) -> str | None:
    """The layer of `layers` that tensor `key` belongs to (also as part of its sub-norm), or None."""
    parent = key.rpartition(".")[0]
    return next((name for name in (parent, parent.rpartition(".")[0]) if name in layers), None)
