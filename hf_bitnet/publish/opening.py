"""A checkpoint opened for what it is: of this library, of transformers' own `bitnet` method, or plain. Own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

from ..config import FOREIGN_LINEAR_CLASS, NATIVE_METHOD
from ..plugin import load_native


def open_model(path: str | os.PathLike[str], **options: Any) -> Any:
    """The model in a folder or on the Hub, of the class its config.json names. Packed weights are mapped, not copied.

    Args:
        options: of from_pretrained: dtype (default: as stored), device_map, revision, ...

    Raises ValueError when there is no such folder or no such class, OSError when it cannot be loaded.
    """
    kind, config = model_class(path)
    options.setdefault("dtype", "auto")
    settings = getattr(config, "quantization_config", None)
    if not isinstance(settings, dict) or settings.get("quant_method") != NATIVE_METHOD:
        return kind.from_pretrained(path, **options)
    # the two words by which this library's own checkpoints of that method are known
    if "hf_bitnet" in settings or settings.get("linear_class") == FOREIGN_LINEAR_CLASS:
        return kind.from_pretrained(path, **options)
    return load_native(path, **options)


def model_class(path: str | os.PathLike[str]) -> tuple[Any, Any]:
    """The class that a checkpoint's config names, and the config. Raises as `open_model` does."""
    name = os.fspath(path)
    if not Path(name).exists() and name.startswith((".", "/", "~")):
        raise ValueError(f"there is no folder {name!r}")
    with naming(name):
        config = transformers.AutoConfig.from_pretrained(name)
    names = getattr(config, "architectures", None) or []
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        named = f"names {names[0]!r}, which transformers does not have" if names else "names no architecture"
        raise ValueError(f"the config.json of {name!r} {named}; load the model in Python and call hf_bitnet.quantize_model")
    return kind, config


@contextmanager
def naming(path: str) -> Iterator[None]:
    """transformers does not always say what it could not load."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot load {path!r}: {error}") from error


def open_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer that lies beside a model, or None where there is none."""
    try:
        return transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError):  # none saved, or none that transformers knows for this model
        return None
