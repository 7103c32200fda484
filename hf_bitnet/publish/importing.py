"""import_model, import_tokenizer: quantized checkpoints of other programs become models of this library. Own."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from ..config import FOREIGN_LINEAR_CLASS, NATIVE_METHOD, QUANT_METHOD, NativeBitNetConfig
from ..gguf_file import MAGIC
from ..importing import Folder, gguf_tokenizer, import_checkpoint
from ..plugin import load_native
from ..surgery import convert_native, pack_model, trained_layers, unpack_model

_FORMS = ("packed", "train")
_GGUF = ".gguf"
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".onnx", ".h5")
# what is fetched of a repository: nothing that could run
_FILES = ["*.json", "*.safetensors"]
_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def import_model(
    path: str | os.PathLike[str],
    *,
    file: str | None = None,
    form: str = "packed",
    base: str | None = None,
    activation: str | None = None,
    outside: str = "refuse",
    w_bits: float | None = None,
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> Any:
    """A checkpoint that another program quantized, as a model with the same codes and scales.

    What is read, found out from the files themselves:
    - transformers' method `bitnet`: BitNet 2B4T, Falcon3-1.58bit, Falcon-E, what onebitllms writes;
    - GGUF files: TQ1_0, TQ2_0, Q2_0, Q1_0, Q4_0, Q8_0, bitnet.cpp's I2_S; Q2_K and floats where they lie on a grid; of the
      architectures llama, qwen2, qwen3, phi3, gemma2, gemma3, bitnet, bitnet-b1.58 and bitnet-25;
    - torchao, saved as safetensors: Int8Tensor and IntxUnpackedToInt8Tensor;
    - learned scales of a row (ParetoQ);
    - float weights that lie on a grid (a dense export of a quantized model).
    Anything else is refused with the reason. Nothing of the checkpoint is run or unpickled. Each layer gets the narrowest
    scheme that holds its codes and the fewest scales that say the same; `coverage(model)` shows them, and what stayed in
    floats.

    Args:
        path: folder, GGUF file or Hub name, also "org/name/file.gguf".
        file: name of the GGUF file in that folder or repository, where there are several.
        form: "packed", or "train": float weights that give the same codes, with learned scales.
        base: folder or Hub name of a model with the same architecture, whose config.json describes this one; for checkpoints
            without a config that transformers knows, and for GGUF files, whose metadata says less than a config does.
        activation: scheme of the inputs of all quantized layers, for example "int8"; None takes what the checkpoint says,
            "none" where it says nothing: of GGUF files those of this library and those with I2_S (int8) do. Not for the
            method `bitnet`, which has int8.
        outside: what happens to codes that no scheme of as many bits has (-8 of 4 bits, -128 of 8): "refuse", "wider" (the
            layer is stored in more bits, value for value) or "clip" (to the nearest code; the only choice that changes values).
        w_bits: bits of learned scales (1, 1.58, 2, 3, 4), where config.json does not say it.
        dtype: of what is not quantized; None takes the checkpoint's, for GGUF files float32.
        options: of from_pretrained, and revision, token, cache_dir of the Hub.

    Returns the model, of the class that the checkpoint names, in eval mode.

    Raises ValueError (OSError from the Hub) where there is no such checkpoint, it is damaged, or it is of no kind that is read.
    """
    if form not in _FORMS:
        raise ValueError(f"form={form!r}; legal: {', '.join(map(repr, _FORMS))}")
    refused = [name for name in ("trust_remote_code", "quantization_config") if name in options]
    if refused:
        raise TypeError(f"import_model takes no {refused[0]}: nothing of a checkpoint is run, and it says how it is quantized")
    found, options = _fetched(os.fspath(path), file, options)
    gguf = _gguf(found, file)
    if gguf is None and Folder(found, base).method == NATIVE_METHOD:
        return _native(found, form, activation, {"dtype": dtype or "auto", **options})
    wanted = _dtype(dtype) or (None if gguf is None else torch.float32)
    about = {"gguf": gguf, "base": base, "activation": activation, "outside": outside, "w_bits": w_bits, "dtype": wanted}
    model = import_checkpoint(found, **about, **options)
    return model if form == "packed" else unpack_model(model, weight_scale="learned")


def import_tokenizer(
    path: str | os.PathLike[str], *, file: str | None = None, base: str | None = None, **options: Any
) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of what `import_model` reads: that of a GGUF file as llama.cpp understands it, else the one in the folder.

    Args:
        path, file: as of `import_model`.
        base: folder or Hub name of another checkpoint, whose tokenizer is taken instead.
        options: revision, token, cache_dir of the Hub.

    Raises ValueError (OSError from the Hub) where there is no such checkpoint; where a GGUF file has no tokenizer, or one of a
    kind that is not read (BPE over bytes and SentencePiece's BPE are); where transformers finds none in the folder.
    """
    if unknown := [name for name in options if name not in _HUB]:
        raise TypeError(f"import_tokenizer takes no {unknown[0]}; its options are {', '.join(_HUB)}")
    if base is not None:
        return folder_tokenizer(base, **options)
    if file is None and not os.path.exists(path) and not holds_gguf(path, **options):
        return folder_tokenizer(path, **options)  # of the Hub, without the weights beside it
    found, _ = _fetched(os.fspath(path), file, options)
    gguf = _gguf(found, file)
    return gguf_tokenizer(gguf) if gguf is not None else folder_tokenizer(found)


def folder_tokenizer(path: str | os.PathLike[str], **options: Any) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer that transformers finds in a folder or on the Hub; its code is never run.

    Args:
        options: of from_pretrained.

    Raises ValueError where a folder has none, OSError where there is no such folder or repository.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options)
    except (ValueError, KeyError, TypeError) as error:
        if not os.path.isdir(path):
            raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise _no_tokenizer(path, said) from error
    # without its files, transformers makes up a tokenizer of the kind that config.json names: special tokens, and maybe a space
    if os.path.isdir(path) and not {*tokenizer.get_vocab()} - {*tokenizer.all_special_tokens, "\u2581"}:
        raise _no_tokenizer(path, f"its {type(tokenizer).__name__} has no token but special ones")
    return tokenizer


def _no_tokenizer(path: str | os.PathLike[str], said: str) -> ValueError:
    return ValueError(
        f"{os.fspath(path)!r} holds no tokenizer that transformers reads ({said}); put it there: "
        "AutoTokenizer.from_pretrained(<the original model>).save_pretrained(folder)"
    )


def holds_gguf(path: str | os.PathLike[str], **options: Any) -> bool:
    """Whether a GGUF file lies there: it is one, or a folder or a repository of the Hub with one and no other weights.

    Args:
        options: subfolder, revision and token of the Hub, and others, which do not matter.
    """
    name = os.fspath(path)
    local = Path(name).expanduser()
    if local.is_dir():
        folder = local / (options.get("subfolder") or "")
        return _only_gguf(each.name for each in folder.glob("*"))
    if local.is_file():
        return local.suffix == _GGUF or _begins_as_gguf(local)
    if _in_repository(name) is not None:
        return True
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or options.get("subfolder"):
        return False
    import huggingface_hub

    at = _of_repository(options)
    try:
        return _only_gguf(huggingface_hub.HfApi().list_repo_files(name, **at))
    except Exception:  # of the network, by the release of huggingface_hub; what was fetched before may be there
        pass
    try:  # as `_fetched` asks
        found = Path(huggingface_hub.snapshot_download(name, allow_patterns=_FILES, local_files_only=True, **at))
        return _only_gguf(each.name for each in found.glob("*"))
    except Exception:  # not there
        return False


def _in_repository(path: str) -> tuple[str, str] | None:
    """The repository and the file that "org/name/file.gguf" means; None for other names."""
    parts = path.split("/", 2)
    named = len(parts) == 3 and path.endswith(_GGUF) and not path.startswith((".", "/", "~"))
    return ("/".join(parts[:2]), parts[2]) if named else None


def _begins_as_gguf(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _only_gguf(names: Iterable[str]) -> bool:
    names = list(names)
    return any(name.endswith(_GGUF) for name in names) and not any(name.endswith(_OTHER_WEIGHTS) for name in names)


def _native(path: Path, form: str, activation: str | None, options: dict[str, Any]) -> Any:
    settings = Folder(path).settings["quantization_config"]
    if QUANT_METHOD in settings or settings.get("linear_class") == FOREIGN_LINEAR_CLASS:
        raise ValueError(f"{path} is a checkpoint of this library already; load it with transformers' from_pretrained(path)")
    fixed = NativeBitNetConfig(settings).activation
    if activation not in (None, fixed):
        raise ValueError(f"activation={activation!r}: the method {NATIVE_METHOD!r} quantizes inputs as {fixed!r}; leave it out")
    model = convert_native(load_native(path, **options))
    if next(iter(trained_layers(model)), None) is not None:  # of the kind that trains
        return pack_model(model) if form == "packed" else model
    return model if form == "packed" else unpack_model(model, weight_scale="learned")


def _fetched(path: str, file: str | None, options: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """What is on this machine, fetched from the Hub where it has to be; and the options that are not the Hub's."""
    hub = {name: value for name, value in options.items() if name in _HUB}
    options = {name: value for name, value in options.items() if name not in _HUB}
    local = Path(path).expanduser()
    if local.exists():
        return local, options
    if (inside := _in_repository(path)) is not None:
        if file is not None:
            raise ValueError(f"{path!r} names a GGUF file already, and file={file!r} another one; give one of them")
        path, file = inside
    elif path.startswith((".", "/", "~")) or not 0 <= path.count("/") <= 1 or path.endswith(_GGUF):
        raise ValueError(f"there is no folder or file {path!r}")
    import huggingface_hub

    try:
        if file is not None:
            return Path(huggingface_hub.hf_hub_download(path, file, **hub)), options
        found = Path(huggingface_hub.snapshot_download(path, allow_patterns=_FILES, **hub))
        if any(found.glob("*.safetensors")) or hub.get("local_files_only"):
            return found, options
        names = _names_there(path, found, _of_repository(hub))
        if len(names) == 1:
            return Path(huggingface_hub.hf_hub_download(path, names[0], **hub)), options
    except (OSError, ValueError) as error:
        missing = f"folder {path!r}" if file is None else f"file '{path}/{file}'"
        raise OSError(f"there is no {missing}, and the Hub does not give it ({error})") from error
    if names:
        raise ValueError(_several(path, names))
    return found, options


def _of_repository(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("revision", "token") if name in options}


def _gguf(path: Path, file: str | None) -> Path | None:
    """The GGUF file that is meant, or None where safetensors are."""
    if path.is_file():
        return path
    if file is not None:
        if not (path / file).is_file() or not (path / file).resolve().is_relative_to(path.resolve()):
            raise ValueError(f"{path} holds no file {file!r}; it has: {', '.join(_names(path)) or 'no GGUF file'}")
        return path / file
    names = _names(path)
    if not names or any(path.glob("*.safetensors")):
        return None
    if len(names) > 1:
        raise ValueError(_several(path, names))
    return path / names[0]


def _several(path: str | Path, names: list[str]) -> str:
    return f"{path} holds several GGUF files; name one: {path}/{names[0]}, or in place of it {', '.join(names[1:])}"


def _names_there(repo_id: str, found: Path, at: dict[str, Any]) -> list[str]:
    """The GGUF files of a repository; without network those that were fetched of it before."""
    import huggingface_hub

    try:
        there = huggingface_hub.HfApi().list_repo_files(repo_id, **at)
    except OSError:
        if not (there := _names(found)):
            raise
    return sorted(name for name in there if name.endswith(_GGUF) and "/" not in name)


def _names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.glob(f"*{_GGUF}"))


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype in (None, "auto") or isinstance(dtype, torch.dtype):
        return None if dtype == "auto" else dtype  # type: ignore[return-value]
    found = getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype={dtype!r} is no dtype of torch; for example dtype=torch.bfloat16")
    return found
