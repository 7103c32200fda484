"""Ways to damage a packed checkpoint, each with words that its error must say. Used by the tests of export and import."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Damage = Callable[[Path], object]
_DATA, _CONFIG, _INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
_LAYER = "model.layers.0.mlp.down_proj"


# ---- the data file ----


def truncated(keep: float) -> Damage:
    """Keeps a share of the bytes, or so many where it is above 1."""

    def damage(folder: Path) -> None:
        data = (folder / _DATA).read_bytes()
        (folder / _DATA).write_bytes(data[: int(keep * len(data)) if keep <= 1 else int(keep)])

    return damage


def header(edit: Callable[[dict[str, Any]], object]) -> Damage:
    """Changes the JSON header, and leaves the bytes behind it."""

    def damage(folder: Path) -> None:
        data = (folder / _DATA).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        fields = json.loads(data[8 : 8 + length])
        text = edit(fields)
        encoded = (text if isinstance(text, str) else json.dumps(fields)).encode()
        (folder / _DATA).write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])

    return damage


def header_length(length: int) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / _DATA).read_bytes()
        (folder / _DATA).write_bytes(struct.pack("<Q", length) + data[8:])

    return damage


def _entry(fields: dict[str, Any]) -> dict[str, Any]:
    return fields[f"{_LAYER}.weight"]


def _duplicate_key(fields: dict[str, Any]) -> str:
    text = json.dumps(fields)
    name = f"{_LAYER}.weight"
    return text[:-1] + f', "{name}": {json.dumps(fields[name])}' + "}"


def tensors(edit: Callable[[dict[str, Any]], object]) -> Damage:
    """Changes tensors and writes the file anew."""

    def damage(folder: Path) -> None:
        state = dict(load_file(folder / _DATA))
        edit(state)
        save_file(state, folder / _DATA, metadata={"format": "pt"})

    return damage


def change(name: str, made: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return tensors(lambda state: state.update({name: made(state[name]).contiguous()}))


# ---- the config ----


def config(**fields: Any) -> Damage:
    """Fields of config.json; None removes one."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / _CONFIG).read_text()) | fields
        (folder / _CONFIG).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return damage


def ours(**fields: Any) -> Damage:
    """Fields of this library's part of config.json."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / _CONFIG).read_text())
        values["quantization_config"]["hf_bitnet"].update(fields)
        (folder / _CONFIG).write_text(json.dumps(values))

    return damage


def written(name: str, text: str | bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


# ---- which files ----


def index(**weight_map: str) -> Damage:
    """An index in place of the one data file; names that are not given are said to be in it."""

    def damage(folder: Path) -> None:
        names = dict.fromkeys(load_file(folder / _DATA), "part.safetensors")
        (folder / _DATA).rename(folder / "part.safetensors")
        merged = names | {key.replace("__", "."): value for key, value in weight_map.items()}
        (folder / _INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": merged}))

    return damage


def _only_pickle(folder: Path) -> None:
    (folder / _DATA).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")


def _other_program(folder: Path) -> None:
    (folder / "modeling_other.py").write_text("open('executed', 'w')\n")
    config(auto_map={"AutoModelForCausalLM": "modeling_other.Model"}, model_type="other", architectures=["Model"])(folder)


_DAMAGED = "damaged or incomplete"
_WRONG = f"{_LAYER}.weight"
_SCALE = f"{_LAYER}.weight_scale"

DAMAGES: dict[str, tuple[Damage, str]] = {
    # cut off
    "empty file": (truncated(0.0), _DAMAGED),
    "4 bytes": (truncated(4), _DAMAGED),
    "8 bytes": (truncated(8), _DAMAGED),
    "half of the header": (truncated(200), _DAMAGED),
    "half of the file": (truncated(0.5), _DAMAGED),
    "last bytes missing": (truncated(0.99), _DAMAGED),
    "bytes too many": (lambda folder: (folder / _DATA).write_bytes((folder / _DATA).read_bytes() + b"12345678"), _DAMAGED),
    # the header
    "huge header": (header_length(2**62), _DAMAGED),
    "header of 200 MB": (header_length(200_000_000), _DAMAGED),
    "header of no length": (header_length(0), _DAMAGED),
    "header is no JSON": (header(lambda fields: "{nonsense"), _DAMAGED),
    "header is a list": (header(lambda fields: "[]"), _DAMAGED),
    "header is no UTF-8": (lambda f: (f / _DATA).write_bytes(struct.pack("<Q", 4) + b'{"\xff}'), _DAMAGED),
    "duplicate key": (header(_duplicate_key), _DAMAGED),
    "negative offset": (header(lambda fields: _entry(fields).update(data_offsets=[-8, 8])), _DAMAGED),
    "offset behind the end": (header(lambda fields: _entry(fields).update(data_offsets=[0, 10**9])), _DAMAGED),
    "offsets exchanged": (header(lambda fields: _entry(fields)["data_offsets"].reverse()), _DAMAGED),
    "overlapping tensors": (header(lambda fields: _entry(fields).update(data_offsets=[0, 4096])), _DAMAGED),
    "shape of other size": (header(lambda fields: _entry(fields).update(shape=[1, 1])), _DAMAGED),
    "huge shape": (header(lambda fields: _entry(fields).update(shape=[2**40, 2**40])), _DAMAGED),
    "negative shape": (header(lambda fields: _entry(fields).update(shape=[-1, 4])), _DAMAGED),
    "unknown dtype": (header(lambda fields: _entry(fields).update(dtype="Q3")), _DAMAGED),
    "no dtype": (header(lambda fields: _entry(fields).pop("dtype")), _DAMAGED),
    "offsets are text": (header(lambda fields: _entry(fields).update(data_offsets="0-8")), _DAMAGED),
    # tensors
    "weight missing": (tensors(lambda state: state.pop(_WRONG)), "down_proj"),
    "scale missing": (tensors(lambda state: state.pop(_SCALE)), "down_proj"),
    "all tensors missing": (tensors(dict.clear), "layers.0"),
    "float bytes": (change(_WRONG, torch.Tensor.float), "down_proj"),
    "weight of other rows": (change(_WRONG, lambda t: t[:-1]), "down_proj"),
    "weight of other columns": (change(_WRONG, lambda t: t[:, :-1]), "down_proj"),
    "flat weight": (change(_WRONG, torch.Tensor.flatten), "down_proj"),
    "scale of other shape": (change(_SCALE, lambda t: t.repeat(2, 1)), "down_proj"),
    "scale NaN": (change(_SCALE, lambda t: t * math.nan), "down_proj.*weight_scale"),
    "scale infinite": (change(_SCALE, lambda t: t * math.inf), "down_proj.*weight_scale"),
    "scale negative": (change(_SCALE, lambda t: -t), "down_proj.*weight_scale"),
    "scale zero": (change(_SCALE, lambda t: 0 * t), "down_proj.*weight_scale"),
    "scale of whole numbers": (change(_SCALE, lambda t: t.to(torch.int32)), "down_proj.*weight_scale"),
    "unused code": (change(_WRONG, lambda t: t | 0b11), "down_proj"),
    # config.json
    "config missing": (lambda folder: (folder / _CONFIG).unlink(), _CONFIG),
    "config empty": (written(_CONFIG, ""), _CONFIG),
    "config cut off": (lambda folder: written(_CONFIG, (folder / _CONFIG).read_text()[:100])(folder), _CONFIG),
    "config is a list": (written(_CONFIG, "[]"), _CONFIG),
    "config is binary": (written(_CONFIG, b"\xff\xfe\x00"), _CONFIG),
    "architecture unknown": (config(architectures=["OtherForCausalLM"]), "OtherForCausalLM"),
    "architectures a number": (config(architectures=7), "architectur"),
    "no architecture": (config(architectures=None), "architecture"),
    "a function for an architecture": (config(architectures=["set_seed"]), "set_seed"),
    "model_type unknown": (config(model_type="other"), "other"),
    "other sizes": (config(hidden_size=32), "shape|size"),
    "sizes as text": (config(hidden_size="wide"), "hidden_size.*wide"),
    "negative layers": (config(num_hidden_layers=-1), "layers"),
    "no quantization": (config(quantization_config=None), "quantiz"),
    "quantization a list": (config(quantization_config=[1]), "quantization_config"),
    "other method": (config(quantization_config={"quant_method": "gguf"}), "gguf"),
    "our part a list": (lambda f: config(quantization_config={"quant_method": "bitnet", "hf_bitnet": [1]})(f), "hf_bitnet"),
    "scheme unknown": (ours(weight="int3"), "int3"),
    "another scheme": (ours(weight="int8"), "layers"),
    "another granularity": (ours(granularity="channel"), "weight_scale"),
    "unknown key": (ours(colour="red"), "colour"),
    "newer version": (ours(version=99), "version"),
    "layers that are not there": (ours(quantized_modules=["model.layers.*.nothing"]), "nothing|layers"),
    # files
    "data missing": (lambda folder: (folder / _DATA).unlink(), _DATA),
    "only pickled weights": (_only_pickle, "safetensors"),
    "a program in the checkpoint": (_other_program, "trust_remote_code|other"),
    "data is a folder": (lambda f: ((f / _DATA).unlink(), (f / _DATA).mkdir()), _DATA),
    "index outside the folder": (index(**{_SCALE.replace(".", "__"): "../elsewhere.safetensors"}), "elsewhere"),
    "index absolute": (index(**{_SCALE.replace(".", "__"): "/etc/passwd"}), "passwd"),
    "index names a missing file": (index(**{_SCALE.replace(".", "__"): "nowhere.safetensors"}), "nowhere"),
    "index names a pickle": (index(**{_SCALE.replace(".", "__"): "part.bin"}), "part.bin"),
    "index is a list": (lambda folder: (index()(folder), written(_INDEX, "[]")(folder)), "index"),
    "index without names": (lambda folder: (index()(folder), written(_INDEX, '{"metadata": {}}')(folder)), "weight_map|index"),
    "index cut off": (lambda folder: (index()(folder), written(_INDEX, '{"weight_map": {')(folder)), "index"),
}
