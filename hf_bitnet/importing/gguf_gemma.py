"""Attention and caps of Gemma 2 and 3 as llama.cpp computes them, as fields of a transformers config. Own.

transformers' own reader of GGUF leaves out which layers have a window, what logits are capped by, and the scale of attention,
which is in no key: llama.cpp takes it from the sizes, and whoever writes a file scales the queries to it.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from ..gguf_file import GGUFFile, Length
from .gguf_positions import number, said, undescribed

# every so many layers one sees everything
_PERIOD = {"gemma2": 2, "gemma3": 6}
# models of so many layers (the 27B) scale attention by hidden size / heads, others by the head's size
_LARGE = {"gemma2": 46, "gemma3": 62}
_WINDOW, _PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
_CAPS = ("final_logit_softcapping", "attn_logit_softcapping")


def set_attention(file: GGUFFile, config: PreTrainedConfig) -> None:
    """Writes windows, scale and caps into the config. Raises ValueError where the file contradicts itself."""
    if file.architecture not in _PERIOD:
        return
    set_scale(file, config)
    for cap in _CAPS:
        if said(file, cap) is not None:
            setattr(config, cap, float(number(file, cap, 1.0)) if said(file, cap) else None)
    config.layer_types = ["sliding_attention" if each else "full_attention" for each in _windows(file, config)]


def set_scale(file: GGUFFile, config: PreTrainedConfig) -> None:
    """Also into a config that the user gives: the weights in the file are for this scale."""
    if file.architecture in _PERIOD and hasattr(config, "query_pre_attn_scalar"):
        large = config.num_hidden_layers == _LARGE[file.architecture]
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if large else config.head_dim


def _windows(file: GGUFFile, config: PreTrainedConfig) -> list[bool]:
    """Which layers have a window."""
    layers, pattern = config.num_hidden_layers, said(file, _PATTERN)
    if file.architecture == "gemma3" and not said(file, _WINDOW):
        return [False] * layers
    if isinstance(pattern, list):
        if len(pattern) != layers:
            undescribed(file, f"says {_PATTERN} of {len(pattern)} layers, and has {layers}")
        return [bool(each) for each in pattern]
    period = _PERIOD[file.architecture] if pattern is None else pattern
    if not isinstance(period, int) or isinstance(period, Length) or period < 0:
        undescribed(file, f"says {_PATTERN}={period!r} where a list of {layers} or a whole number is legal")
    return [period == 0 or bool((layer + 1) % period) for layer in range(layers)]
