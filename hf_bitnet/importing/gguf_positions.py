"""How a GGUF file says that positions rotate, as `rope_parameters` of transformers. Own; the keys and defaults are llama.cpp's.

transformers' own reader of GGUF passes over all but the base of the angles. Here are linear, yarn and a part of each head;
anything else that the file says of its positions is refused, because a model that leaves it out is another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from transformers import PreTrainedConfig

from ..gguf_file import GGUFFile
from .gguf_types import floats

# of the rotary embedding, not of the model: they are in its config
ROTARY = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# Llama 3.1 and 3.2, beside the factor itself
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_SCALING = "rope.scaling."
# what is read below, and `finetuned`, which changes nothing
_READ = {
    *("rope.freq_base", "rope.freq_base_swa", "rope.dimension_count", "rope.scale_linear"),
    *(f"{_SCALING}{key}" for key in ("type", "factor", "original_context_length", "attn_factor", "finetuned")),
    *(f"{_SCALING}yarn_beta_{key}" for key in ("fast", "slow")),
}
_BASE = 10000.0


def said(file: GGUFFile, key: str) -> Any:
    """What the metadata says under the architecture's name, or None."""
    return file.metadata.get(f"{file.architecture}.{key}")


def number(file: GGUFFile, key: str, default: float) -> float:
    """Raises ValueError where it is no finite number above 0."""
    found = said(file, key)
    if found is None:
        return default
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found) or found <= 0:
        undescribed(file, f"says {key}={found!r} where a number above 0 is legal")
    return found


def undescribed(file: GGUFFile, what: str) -> NoReturn:
    raise ValueError(
        f"{file.path} {what}; give the config of the original: import_model(..., base=<folder or Hub name>)"
    ) from None


def set_positions(file: GGUFFile, config: PreTrainedConfig) -> None:
    """Writes what the file says of positions into the config. Raises ValueError where a config cannot say it."""
    mine = f"{file.architecture}."
    unread = [key for key in file.metadata if key.startswith(f"{mine}rope.") and key.removeprefix(mine) not in _READ]
    if unread:
        undescribed(file, f"says {unread[0]}={file.metadata[unread[0]]!r}, which no config here describes")
    rope: dict[str, Any] = {"rope_theta": float(number(file, "rope.freq_base", _BASE)), **_scaled(file, config)}
    kind, part = rope["rope_type"], _part(file, config)
    parted, layered = config.model_type == "phi3", config.model_type == "gemma3_text"
    if (parted and kind != "default") or (layered and kind == "yarn"):
        undescribed(file, f"says rope.scaling.type={kind!r}, which a {type(config).__name__} does not describe")
    if parted:
        rope["partial_rotary_factor"] = part
    elif part != 1.0:
        undescribed(file, f"rotates {part:g} of each head, which a {type(config).__name__} does not describe")
    if layered:  # layers with a window have positions of their own, never scaled
        theta = float(number(file, "rope.freq_base_swa", _BASE))
        config.rope_parameters = {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": theta},
        }
    else:
        config.rope_parameters = rope
    rotary = [name for name in ROTARY if name in file.tensors]
    if rotary and not (rotary == [ROTARY[0]] and _divided(file, config)):
        undescribed(file, f"holds {rotary[0]}, a change of its rotary embedding that its metadata does not describe")


def _scaled(file: GGUFFile, config: PreTrainedConfig) -> dict[str, Any]:
    """rope_type and its numbers. Without a type llama.cpp takes "linear", whose factor is 1 where there is none or 0."""
    kind = said(file, f"{_SCALING}type") or "linear"
    given = next((key for key in (f"{_SCALING}factor", "rope.scale_linear") if said(file, key)), f"{_SCALING}factor")
    factor = float(number(file, given, 1.0)) if said(file, given) else 1.0
    attention = number(file, f"{_SCALING}attn_factor", 1.0)
    if kind not in ("none", "linear", "yarn") or (kind == "yarn" and factor < 1):
        undescribed(file, f"says {_SCALING}type={kind!r} with the factor {factor:g}, which no config here describes")
    if kind != "yarn":
        if attention != 1:
            undescribed(file, f"says {_SCALING}attn_factor={attention!r}, which no config here describes for {kind!r}")
        return {"rope_type": "default"} if kind == "none" or factor == 1 else {"rope_type": "linear", "factor": factor}
    original = number(file, f"{_SCALING}original_context_length", config.max_position_embeddings)
    rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": int(original)}
    for which in ("fast", "slow"):
        if said(file, key := f"{_SCALING}yarn_beta_{which}") is not None:
            rope[f"beta_{which}"] = float(number(file, key, 1.0))
    if attention != 1:  # llama.cpp multiplies the usual factor, transformers takes another one for it
        rope["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return rope


def _part(file: GGUFFile, config: PreTrainedConfig) -> float:
    """How much of each head rotates."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    count = number(file, "rope.dimension_count", size)
    part = count / size
    if part > 1 or int(size * part) != count:
        undescribed(file, f"says rope.dimension_count={count!r}, of heads of {size}")
    return part


def _divided(file: GGUFFile, config: PreTrainedConfig) -> bool:
    """Writes what divides the frequencies into the config, where it is nothing or what Llama 3 does; else False."""
    divided_by = floats(file, file.tensors[ROTARY[0]]).float().flatten()
    if bool((divided_by == 1).all()):
        return True
    plain = dict(config.rope_parameters)
    theta, size = plain.get("rope_theta"), 2 * divided_by.numel()
    if theta is None or plain["rope_type"] != "default":  # in layers of two kinds, or scaled twice
        return False
    config.rope_parameters = {**plain, **_LLAMA3, "factor": float(divided_by.amax())}
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    compute: Callable[..., Any] = ROPE_INIT_FUNCTIONS[_LLAMA3["rope_type"]]
    frequencies = 1.0 / theta ** (torch.arange(0, size, 2, device="cpu").float() / size)
    found = compute(config, torch.device("cpu"))[0]
    return found.shape == frequencies.shape and torch.allclose(found, frequencies / divided_by, rtol=1e-4)
