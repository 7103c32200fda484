"""A checkpoint opened for what it is: of this library, of transformers' own `bitnet` method, GGUF, or plain. Own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError

from ..config import FOREIGN_LINEAR_CLASS, NATIVE_METHOD
from ..files import read_object
from ..importing import refuse_exports
from ..plugin import HUB_ARGUMENTS, load_native
from .importing import folder_tokenizer, holds_gguf, import_model, import_tokenizer

_ADVICE = "copy or download it again"
# what a run leaves in its folder, the best to open first
_OF_A_RUN = ("packed", "train", "checkpoint-*")
# a folder with one of these may be wanted for itself
_OF_A_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def open_model(path: str | os.PathLike[str], **options: Any) -> Any:
    """The model in a folder or on the Hub, of the class its config.json names. Packed weights are mapped, not copied.

    A GGUF file, or a folder or repository that holds one in place of a config.json, goes to `import_model`.

    Args:
        options: of from_pretrained: dtype (default: as stored), device_map, revision, ... Code of the checkpoint is run with
            trust_remote_code=True only.

    Raises ValueError when there is no such folder or no such class, OSError when it cannot be loaded.
    """
    options["trust_remote_code"] = options.get("trust_remote_code") is True
    if os.path.exists(path) and holds_gguf(path, **options):
        return _imported(path, options)
    try:
        # the config of the version and folder that the weights are of
        kind, config = model_class(path, **{name: options[name] for name in HUB_ARGUMENTS if name in options})
    except (OSError, ValueError):
        if not os.path.exists(path) and holds_gguf(path, **options):
            return _imported(path, options)
        raise
    options.setdefault("dtype", "auto")
    if not options["trust_remote_code"] and "/" in str(getattr(config, "_attn_implementation", None)):
        options.setdefault("attn_implementation", "eager")  # the checkpoint names a kernel of the Hub, which would be run
    settings = getattr(config, "quantization_config", None)
    if not isinstance(settings, dict) or settings.get("quant_method") != NATIVE_METHOD:
        return kind.from_pretrained(path, **options)
    # the two words by which this library's own checkpoints of that method are known
    if "hf_bitnet" in settings or settings.get("linear_class") == FOREIGN_LINEAR_CLASS:
        return kind.from_pretrained(path, **options)
    return load_native(path, **options)


def _imported(path: str | os.PathLike[str], options: dict[str, Any]) -> Any:
    return import_model(path, **{name: value for name, value in options.items() if name != "trust_remote_code"})


def model_class(path: str | os.PathLike[str], *, trust_remote_code: bool = False, **hub: Any) -> tuple[Any, Any]:
    """The class that a checkpoint's config names, and the config. Raises as `open_model` does.

    Args:
        trust_remote_code: never None, with which transformers asks on standard input whether to run the checkpoint's code.
        hub: revision, subfolder, token and the like, of from_pretrained.
    """
    name = os.fspath(path)
    if not Path(name).exists() and name.startswith((".", "/", "~")):
        raise ValueError(f"there is no folder {name!r}")
    if os.path.exists(name) and holds_gguf(name, **hub):
        raise ValueError(
            f"{name!r} is a GGUF file or holds one, whose weights are quantized already; hf_bitnet.import_model opens it, "
            "this needs the model that it was made from"
        )
    if os.path.isdir(name):
        folder = Path(name) / (hub.get("subfolder") or "")
        _refuse_other_folders(folder)
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):  # else transformers reads them
            refuse_exports(folder)
        _check_config(folder)
        _check_index(folder)
    with naming(name):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **hub)
    names = getattr(config, "architectures", None) or []
    kind = getattr(transformers, names[0], None) if names else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        named = f"names {names[0]!r}, which is no model of transformers" if names else "names no architecture"
        raise ValueError(f"the config.json of {name!r} {named}; load the model in Python and call hf_bitnet.quantize_model")
    return kind, config


def _refuse_other_folders(folder: Path) -> None:
    """Folders that are no checkpoint, and of which the user may think that they are one."""
    if (folder / "config.json").is_file():
        return
    inside = [str(each.parent) for name in _OF_A_RUN for each in sorted(folder.glob(f"{name}/config.json"))]
    if inside:
        raise ValueError(f"{str(folder)!r} is the folder of a run; give one of the models in it: {', '.join(inside)}")
    has_tokenizer = any((folder / name).is_file() for name in _OF_A_TOKENIZER)
    others = [] if has_tokenizer else [str(each) for each in sorted(folder.glob("*/")) if _may_open(each)]
    if others:
        raise ValueError(f"{str(folder)!r} holds no model, but folders of models; give one of them: {', '.join(others)}")
    if (folder / "adapter_config.json").is_file():
        base = read_object(folder / "adapter_config.json", _ADVICE).get("base_model_name_or_path")
        raise ValueError(
            f"{str(folder)!r} holds an adapter of peft for {base!r} and no model; load that model, merge the adapter into it "
            f"(peft.PeftModel.from_pretrained(model, {str(folder)!r}).merge_and_unload()) and save that"
        )


def _may_open(folder: Path) -> bool:
    try:
        refuse_exports(folder)
        return (folder / "config.json").is_file() or any(folder.glob("*.gguf"))
    except (OSError, ValueError):  # what only others read, or nobody may
        return False


def _check_config(folder: Path) -> None:
    """What transformers would stumble over without a word about the file."""
    path = folder / "config.json"
    if not path.is_file():
        return  # transformers says that it is missing
    values = read_object(path, _ADVICE)
    names = values.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(each, str) for each in names)):
        raise ValueError(f"{path}: architectures={names!r}; it is a list of class names, for example ['LlamaForCausalLM']")
    if not isinstance(values.get("auto_map", {}), dict):
        raise ValueError(f"{path}: auto_map={values['auto_map']!r}; it is an object, {{'AutoModel': ...}}: remove it")
    settings = values.get("quantization_config")
    if settings is not None and not isinstance(settings, dict):
        raise ValueError(f"{path}: quantization_config={settings!r}; it is an object, {{'quant_method': ...}}")


def _check_index(folder: Path) -> None:
    """The files that an index names lie in its folder."""
    path = folder / "model.safetensors.index.json"
    if not path.is_file() or (folder / "model.safetensors").exists():
        return
    files = read_object(path, _ADVICE).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{path} has no weight_map from names of tensors to files; copy or download it again")
    outside = next((file for file in files.values() if not file or Path(file).name != file), None)
    if outside is not None:
        raise ValueError(f"{path} names {outside!r}, which is not in its folder; copy or download the checkpoint again")


@contextmanager
def naming(path: str) -> Iterator[None]:
    """transformers does not always say what it could not load."""
    try:
        yield
    except OSError as error:
        missing = "" if os.path.exists(path) else "there is no such folder here, and of the Hub: "
        raise OSError(f"cannot load {path!r}: {missing}{error}") from error
    except StrictDataclassError as error:  # a field of config.json has another type than the model's config
        raise ValueError(f"the config.json of {path!r} is not one of a model: {error}") from error


def tokenizer_at(path: str | os.PathLike[str]) -> Any:
    """The tokenizer that lies beside a model, or in a GGUF file; its code is never run. Raises as `open_model` does."""
    name = os.fspath(path)
    if os.path.exists(name) and holds_gguf(name):
        return import_tokenizer(name)
    if os.path.isdir(name):
        _refuse_other_folders(Path(name))
    try:
        with naming(name):
            return folder_tokenizer(name)
    except (OSError, ValueError):
        if not os.path.exists(name) and holds_gguf(name):
            return import_tokenizer(name)
        raise


def open_tokenizer(path: str | os.PathLike[str]) -> Any:
    """As `tokenizer_at`, or None where there is none."""
    try:
        return tokenizer_at(path)
    except (OSError, ValueError, KeyError):  # none saved, or none that transformers knows for this model
        return None
