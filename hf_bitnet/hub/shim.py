"""A file of Python beside a checkpoint, for users of transformers who have not imported this library. Own.

With `trust_remote_code=True` transformers runs it: it imports hf_bitnet, which then loads the checkpoint as it should be, or
says what has to be installed. Without that argument nothing of it is run, and transformers loads what it can compute the
same, or stops at the settings in config.json (`config/quantization.py`), as without this file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.models.auto import modeling_auto

SHIM = "modeling_hf_bitnet_shim.py"
_HEAD = '''"""Loads this checkpoint with hf_bitnet. Written by hf_bitnet; there is no code of the model in it."""

import transformers

try:
    import hf_bitnet  # noqa: F401  # it adds itself to transformers
except ImportError as error:
    raise ImportError("this checkpoint is quantized by hf_bitnet and needs it: pip install hf_bitnet") from error
'''
_CLASS = '''

class {name}(transformers.{name}):
    """As transformers has it."""
'''


def shim_files(config_file: Path) -> dict[str, bytes]:
    """Name -> content of the two files: config.json with an `auto_map`, and the code that it names.

    Raises ValueError when the config.json is not one of a model that an Auto class loads.
    """
    config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    architectures, kind = config.get("architectures") or [], str(config.get("model_type"))
    found = {auto: name for auto, name in _auto_classes(kind).items() if name in architectures}
    if not found:
        raise ValueError(
            f"remote_code=True: no Auto class of transformers loads {architectures or 'what'} {str(config_file)!r} names; push "
            "without it"
        )
    base = _auto_classes(kind).get("AutoModel")
    found |= {"AutoModel": base} if base else {}
    given = config.get("auto_map")
    config["auto_map"] = {
        **(given if isinstance(given, dict) else {}),
        **{auto: f"{Path(SHIM).stem}.{name}" for auto, name in found.items()},
    }
    code = _HEAD + "".join(_CLASS.format(name=name) for name in dict.fromkeys(found.values()))
    return {SHIM: code.encode(), "config.json": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}


def _auto_classes(model_type: str) -> dict[str, str]:
    """Auto class -> the class that it loads for a type of model."""
    found = {}
    for name, auto in vars(modeling_auto).items():
        names = getattr(getattr(auto, "_model_mapping", None), "_model_mapping", {}) if name.startswith("AutoModel") else {}
        if isinstance(names.get(model_type), str):
            found[name] = names[model_type]
    return found
