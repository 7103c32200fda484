"""What lies at a path: which kind of foreign checkpoint it is, and the reader for it. Own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from ..files import read_object
from .assembly import Contents, assemble
from .codes import OUTSIDE
from .float_weights import FloatWeights
from .folder import Folder
from .gguf_model import GGUFModel
from .gguf_tokenizer import ends
from .learned_scales import SCALE, LearnedScales
from .torchao import TorchAO

# quant_method -> reader. The method `bitnet` is transformers' own, which `load_native` reads
_METHODS: dict[str, Callable[..., Contents]] = {"torchao": TorchAO}
_REPORT = "export.json"


def import_checkpoint(
    path: Path,
    *,
    gguf: Path | None,
    base: str | None,
    activation: str | None,
    outside: str,
    w_bits: float | None,
    dtype: torch.dtype | None,
    **options: Any,
) -> Any:
    """The packed model of a checkpoint in a local folder, or of a GGUF file; see `hf_bitnet.import_model`.

    Args:
        gguf: the GGUF file, where it is one.

    Raises ValueError where it is of no kind that is read, is damaged, or has a layer that does not fit.
    """
    if outside not in OUTSIDE:
        raise ValueError(f"outside={outside!r}; legal: {', '.join(map(repr, OUTSIDE))}")
    if gguf is None:
        refuse_exports(path)
    # before the weights, which take longer
    generation = _generation(path) if gguf is None and (path / GENERATION_CONFIG_NAME).is_file() else None
    contents = (
        GGUFModel(gguf, outside, base, activation)
        if gguf is not None
        else _opened(Folder(path, base), activation, outside, w_bits)
    )
    model = assemble(contents, activation=activation, dtype=dtype, **options)
    if generation is not None and model.can_generate():
        model.generation_config = generation
    if isinstance(contents, GGUFModel) and model.can_generate():
        said = model.generation_config.eos_token_id if base is not None else None
        stops = list(dict.fromkeys([*([said] if isinstance(said, int) else said or []), *ends(contents.file)]))
        if stops:
            model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    return model


def refuse_exports(path: Path) -> None:
    """Of this library, in formats that only other programs read."""
    if not (path / _REPORT).is_file():
        return
    format = read_object(path / _REPORT, "export the model again").get("format")
    # mlx's other layout is transformers' own
    affine = (path / CONFIG_NAME).is_file() and "quantization" in read_object(path / CONFIG_NAME, "export the model again")
    if format == "onnx" or (format == "mlx" and affine):
        raise ValueError(
            f"{path} is an export in the format {format!r}, which this library does not read; load the packed checkpoint "
            "that it was made from: hf_bitnet.open_model(folder)"
        )


def _generation(path: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(path)
    except Exception as error:  # whatever its own checks raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path / GENERATION_CONFIG_NAME} cannot be read ({said}); copy or download it again, or remove it"
        ) from error


def _opened(folder: Folder, activation: str | None, outside: str, w_bits: float | None) -> Contents:
    method = folder.method
    if method is not None and method not in _METHODS:
        raise ValueError(
            f"{folder.path} is quantized by the method {method!r}; read are 'bitnet', {', '.join(map(repr, _METHODS))}, GGUF "
            "files, learned scales of a row (ParetoQ) and float weights that lie on a grid. Quantize the float model instead: "
            "from_pretrained(<its name>, quantization_config=...)"
        )
    if method is not None:
        return _METHODS[method](folder, outside, activation is not None)
    if any(name.endswith(SCALE) for name in folder.names):
        return LearnedScales(folder, outside, w_bits)
    return FloatWeights(folder)
