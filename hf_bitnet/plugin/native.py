"""Loads checkpoints of transformers' own `bitnet` method into layers of ours. Own."""

from __future__ import annotations

import os
from typing import Any

from ..config import FOREIGN_LINEAR_CLASS, NATIVE_METHOD
from .registration import loading_native

# what says where a checkpoint is, and which of its versions
HUB_ARGUMENTS = (
    *("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token", "trust_remote_code"),
)


def load_native(path: str | os.PathLike[str], *, model_class: Any = None, **kwargs: Any) -> Any:
    """Loads a native `bitnet` checkpoint (BitNet 2B4T, Falcon3-1.58bit, Falcon-E, ...); logits equal transformers' bit for bit.

    All kinds load: bitlinear, autobitlinear offline (packed or not) and online, which is trainable. `coverage`,
    `dequantize_model` and `unpack_model` work on the result, `convert_native` turns it into our ordinary, faster layers, and
    `save_pretrained` writes it as the native checkpoint it was.

    Args:
        path: folder or name on the Hub.
        model_class: for example AutoModelForSequenceClassification; None takes the class that the checkpoint names.
        kwargs: of `from_pretrained`: dtype, device_map, revision, ... Code of the checkpoint is run with
            trust_remote_code=True only.

    Raises:
        ValueError: the checkpoint is not a native one, is damaged, or lacks tensors.
        TypeError: a quantization_config is given; the checkpoint brings its own.
    """
    import transformers

    if "quantization_config" in kwargs:
        raise TypeError("load_native takes no quantization_config, the checkpoint brings its own: hf_bitnet.load_native(path)")
    # left unset, transformers asks on standard input, and whoever pipes "y" there would run the code of a checkpoint
    kwargs["trust_remote_code"] = kwargs.get("trust_remote_code") is True
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    config = transformers.AutoConfig.from_pretrained(path, **hub)
    settings = getattr(config, "quantization_config", None) or {}
    method = settings.get("quant_method")
    if method != NATIVE_METHOD or settings.get("linear_class") == FOREIGN_LINEAR_CLASS:
        found = "no quantization_config" if method is None else f"quant_method {method!r}"
        if method == NATIVE_METHOD:
            found = "a form of hf_bitnet's own"
        raise ValueError(
            f"{os.fspath(path)} is not a native {NATIVE_METHOD!r} checkpoint, its config.json has {found}; load it with "
            "transformers' from_pretrained(path)"
        )
    if model_class is None:
        architecture = (config.architectures or [""])[0]
        model_class = getattr(transformers, architecture, transformers.AutoModelForCausalLM)
    token = loading_native.set(True)
    try:
        return model_class.from_pretrained(path, **kwargs)
    finally:
        loading_native.reset(token)
