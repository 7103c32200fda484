"""Writes a file: its head with the package `gguf`, its tensors some rows at a time. Own.

That package would want each tensor whole, and knows the ids of kinds only up to its own release; the head takes any id.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import numpy as np

from ...gguf_file import ACTIVATION_KEY
from ...quantizers import ACTIVATION_SCHEMES
from ..format import Progress, Source
from ..report import WrittenTensor
from .planning import Plan
from .tokenizer import add_tokenizer

INSTALL = "pip install 'hf_bitnet[gguf]'"


def gguf_package() -> Any:
    """The package `gguf`. Raises ImportError with how to get it."""
    try:
        import gguf  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"GGUF files need the package gguf: {INSTALL}") from error
    return gguf


def write_file(path: Path, source: Source, plan: Plan, progress: Progress) -> list[WrittenTensor]:
    """Writes `path`.

    Raises ValueError where a scale is no number of half precision.
    """
    _write_head(path, source, plan)
    alignment = gguf_package().GGUF_DEFAULT_ALIGNMENT
    with open(path, "ab") as file:
        _pad(file, alignment)
        for entry in plan.entries:
            before = file.tell()
            for part in entry.content.parts():
                # not tofile: it would write past what the file object holds back
                file.write(part.bytes().numpy().data)
            file.write(entry.content.tail().numpy().data)
            assert file.tell() - before == entry.bytes, f"{entry.stored}: not as planned"
            _pad(file, alignment)
            progress(entry.weights)
    return [WrittenTensor(each.name, each.stored, each.kind.name, each.shape, each.bytes, each.why) for each in plan.entries]


def tokenizer_notes(source: Source, plan: Plan) -> list[str]:
    """What there is to say about the tokenizer in the file."""
    return add_tokenizer(gguf_package().GGUFWriter(None, plan.architecture.name), source.tokenizer, source.model.config)


def _write_head(path: Path, source: Source, plan: Plan) -> None:
    gguf = gguf_package()
    writer = gguf.GGUFWriter(path, plan.architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(source.name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(plan.main_kind.file_type)
    plan.metadata.write(writer)
    schemes = {layer.activation for layer in source.layers.values()}
    if len(schemes) == 1 and not next(iter(schemes)).static:
        writer.add_string(ACTIVATION_KEY, next(name for name in ACTIVATION_SCHEMES if ACTIVATION_SCHEMES.get(name) in schemes))
    config = source.model.config
    add_tokenizer(writer, source.tokenizer, config)
    size = f"{plan.architecture.name}.vocab_size"
    if size not in writer.kv_data[0]:
        writer.add_uint32(size, config.vocab_size)
    for entry in plan.entries:
        # any dtype but uint8, which would mean a shape in bytes
        writer.add_tensor_info(entry.stored, entry.shape, np.dtype(np.int8), entry.bytes, raw_dtype=entry.kind.id)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _pad(file: IO[bytes], alignment: int) -> None:
    file.write(b"\0" * (-file.tell() % alignment))
