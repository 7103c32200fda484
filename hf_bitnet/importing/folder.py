"""A folder with a checkpoint of safetensors files, read one tensor at a time. Nothing in it is run or unpickled. Own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

_CONFIG, _ONE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth")
_LAYERS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    *("num_encoder_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"),
)
# a config.json is some kilobytes, the index of a very large model some megabytes
_LARGEST_JSON = 64 * 2**20


class Folder:
    """Attributes:
    path: the folder. base: another folder or Hub name, whose config.json describes the model instead.
    """

    def __init__(self, path: Path, base: str | None = None) -> None:
        self.path, self.base = path, base

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What config.json says; empty where there is none and `base` has one. Raises ValueError when it cannot be read."""
        if not (self.path / _CONFIG).is_file() and self.base is not None:
            return {}
        return self._json(_CONFIG)

    @property
    def method(self) -> str | None:
        """`quant_method` of config.json, or None where the checkpoint says nothing of quantization."""
        found = self.settings.get("quantization_config")
        if found is None:
            return None
        return str(found.get("quant_method")) if isinstance(found, dict) else repr(found)

    def config(self) -> PreTrainedConfig:
        """The model's config, without what it says of quantization."""
        if self.base is not None:
            return model_config(self.base)
        # a list as long as the layers is made with the config, and a model of them takes as long
        for key, said in _layers_said(self.settings):
            if said > len(self.names):
                raise ValueError(
                    f"{self.path / _CONFIG} says {key}={said}, but only {len(self.names)} tensors are stored; copy or download "
                    "it again, or give the config of the right model: import_model(..., base=<folder or Hub name>)"
                )
        return model_config(str(self.path))

    @cached_property
    def files(self) -> list[Path]:
        """The safetensors files. Raises ValueError where there are none, or other than the index says."""
        if (self.path / _ONE).is_file():  # where there are both, transformers takes this one
            return [self.path / _ONE]
        if (self.path / _INDEX).is_file():
            named = self._json(_INDEX).get("weight_map")
            if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
                raise ValueError(f"{self.path / _INDEX} has no weight_map of file names; copy or download it again")
            return [self._inside(name) for name in sorted(set(named.values()))]
        pickled = next((name for name in _PICKLED if (self.path / name).exists()), None)
        if pickled is not None:
            raise ValueError(
                f"{self.path} holds pickled weights ({pickled}), which could run code; nothing is unpickled. Save the model "
                "as safetensors where you trust it: model.save_pretrained(folder)"
            )
        raise ValueError(f"{self.path} holds neither {_ONE} nor {_INDEX} nor one .gguf file; give the folder of a checkpoint")

    @cached_property
    def _places(self) -> dict[str, Any]:
        """Name of a tensor -> open file."""
        places: dict[str, Any] = {}
        for path in self.files:
            opened = self._opened(path)
            for name in opened.keys():  # noqa: SIM118 - a safetensors file is no dict
                if name in places:
                    raise ValueError(f"{self.path}: two files hold the tensor {name}; copy or download the checkpoint again")
                places[name] = opened
        return places

    @property
    def names(self) -> list[str]:
        return list(self._places)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The notes of all files."""
        return {key: value for path in self.files for key, value in (self._opened(path).metadata() or {}).items()}

    def tensor(self, name: str) -> Tensor:
        """Raises ValueError where there is none of that name."""
        if name not in self._places:
            raise ValueError(f"{self.path} lacks the tensor {name}; copy or download it again")
        return self._places[name].get_tensor(name)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in self._places:
            yield name, self.tensor(name)

    def _opened(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt").__enter__()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or incomplete ({error}); copy or download it again") from None

    def _inside(self, name: str) -> Path:
        path = self.path / name
        if Path(name).name != name or not path.is_file():
            raise ValueError(f"{self.path / _INDEX} names the file {name!r}, which is not in that folder; download it again")
        return path

    def _json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            if path.stat().st_size > _LARGEST_JSON:
                raise ValueError(f"it has {path.stat().st_size} bytes")
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(
                f"{self.path} holds no {name}; give the folder of a checkpoint, or base=<folder or Hub name> of a model with "
                "the same architecture"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read ({error}); copy or download it again") from None
        if not isinstance(found, dict):
            raise ValueError(f"{path} should hold a JSON object; copy or download it again")
        return found


def model_config(name: str, **options: Any) -> PreTrainedConfig:
    """The config in a folder or of a Hub name, without quantization. Raises ValueError where transformers has no such model.

    Args:
        options: of AutoConfig.from_pretrained.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # whatever a config's own checks raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"transformers cannot make a model of the config of {name} ({said}). Code of a checkpoint is not run; if the "
            "model has the architecture of one that transformers knows, name that: import_model(..., base=<folder or Hub name>)"
        ) from error
    for each in (config, config.get_text_config(decoder=True)):
        if hasattr(each, "quantization_config"):
            delattr(each, "quantization_config")
    # they may name a kernel of the Hub, which would be run; this one sets those of all configs inside
    config._attn_implementation = None
    config._experts_implementation = None
    return config


def _layers_said(settings: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """How many layers config.json says that there are, and in which of its keys; also inside of it."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _layers_said(value)
        elif key in _LAYERS and isinstance(value, int):
            yield key, value


def model_class(config: PreTrainedConfig) -> Any:
    """The class that a config names, or else the one that predicts next tokens. Raises ValueError where there is none."""
    named = getattr(config, "architectures", None)
    name = named[0] if isinstance(named, list) and named else ""
    kind = getattr(transformers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        mapping = transformers.AutoModelForCausalLM._model_mapping
        if type(config) not in mapping:
            raise ValueError(f"transformers has no class {name!r}, and none that predicts tokens for {type(config).__name__}")
        kind = mapping[type(config)]
    return kind
