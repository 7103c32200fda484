"""What the bytes of a GGUF tensor mean: levels and scales of the types that hold few levels. Own, from ggml's layouts.

`value = level * d`, one fp16 d a block (Q2_0, Q1_0, Q4_0, Q8_0: before the codes; TQ1_0, TQ2_0: after them); I2_S of bitnet.cpp
has one float32 scale for the tensor, behind its codes. The blocks lie in rows, along the input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..gguf_file import F32, I2_S, GGUFFile, Stored, type_name
from .codes import Levels, Misfit

_F16, _BF16 = 1, 30
_FLOATS = {F32: torch.float32, _F16: torch.float16, _BF16: torch.bfloat16}
# exact numbers, but found on a grid only where they were put there
_BY_VALUE = {10: "Q2_K"}
_I2_S_BLOCK = 128


class _Blocks(NamedTuple):
    """name: of the type. weights, bytes: of a block. bits: of a level. scale: where the fp16 is. decode: of the other bytes,
    uint8 (blocks, bytes - 2) -> levels int8 (blocks, weights).
    """

    name: str
    weights: int
    bytes: int
    bits: int
    scale: int
    decode: Callable[[Tensor], Tensor]


def _fields(codes: Tensor, bits: int, run: int) -> Tensor:
    """uint8 (B, n) -> int8 (B, n * 8 / bits): fields from the lowest on; those of one byte are `run` weights apart."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device).view(1, 1, -1, 1)
    parts = codes.reshape(codes.shape[0], -1, 1, run) >> shifts
    return parts.bitwise_and_(2**bits - 1).reshape(codes.shape[0], -1).view(torch.int8)


def _trits(codes: Tensor, weights: int) -> Tensor:
    """uint8 (B, n) -> int8 (B, weights): base 3, the most significant first, as a fraction of 256."""
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=codes.device).view(1, -1, 1)
    shifted = codes.unsqueeze(1) * powers  # modulo 256, as uint8 is
    digits = (shifted >= 86).view(torch.int8) + (shifted >= 171).view(torch.int8)  # thirds of 256
    return digits.reshape(codes.shape[0], -1)[:, :weights]


def _tq1_0(codes: Tensor) -> Tensor:
    return torch.cat([_trits(codes[:, :32], 160), _trits(codes[:, 32:48], 80), _trits(codes[:, 48:52], 16)], dim=1).sub_(1)


_TYPES = {
    2: _Blocks("Q4_0", 32, 18, 4, 0, lambda codes: _fields(codes, 4, 16).sub_(8)),
    8: _Blocks("Q8_0", 32, 34, 8, 0, lambda codes: codes.view(torch.int8)),
    34: _Blocks("TQ1_0", 256, 54, 2, 52, _tq1_0),
    35: _Blocks("TQ2_0", 256, 66, 2, 64, lambda codes: _fields(codes, 2, 32).sub_(1)),
    # a block without a scale is zeros, which need a second bit
    41: _Blocks("Q1_0", 128, 18, 2, 0, lambda codes: _fields(codes, 1, 1).mul_(2).sub_(1)),
    42: _Blocks("Q2_0", 64, 18, 2, 0, lambda codes: _fields(codes, 2, 1).sub_(1)),
}
LEGAL = (*(each.name for each in _TYPES.values()), "I2_S", *_BY_VALUE.values(), "F32", "F16", "BF16")


def is_float(tensor: Stored) -> bool:
    return tensor.kind in _FLOATS


def layer_weight(file: GGUFFile, tensor: Stored) -> Levels | Tensor | Misfit:
    """The weight of a linear map: its levels, or its floats, or why it can be neither.

    Returns int8 levels (N, K) and their scales; for types of floats and of values a float (N, K).
    """
    if len(tensor.shape) != 2:
        return Misfit(f"it has shape {tensor.shape}; legal is a matrix")
    if tensor.kind == I2_S:
        return _i2_s(file, tensor)
    if tensor.kind in _TYPES:
        return _blocks(file, tensor, _TYPES[tensor.kind])
    if tensor.kind in _FLOATS or tensor.kind in _BY_VALUE:
        return floats(file, tensor)
    return Misfit(
        f"it is stored as {type_name(tensor.kind)}, whose values lie on no grid of a scheme here; legal: {', '.join(LEGAL)}. "
        "Convert the float checkpoint itself: from_pretrained(path, quantization_config=...)"
    )


def floats(file: GGUFFile, tensor: Stored) -> Tensor:
    """The numbers of a tensor of a type above or one that the package gguf can read, in its own dtype or float32.

    Raises ValueError where it cannot.
    """
    if tensor.kind in _TYPES and len(tensor.shape) == 2:
        blocks = _blocks(file, tensor, _TYPES[tensor.kind])
        if isinstance(blocks, Misfit):
            raise ValueError(f"{file.path}: {tensor.name} cannot be read: {blocks.reason}")
        return (blocks.levels.unflatten(1, (blocks.scale.shape[1], -1)) * blocks.scale.unsqueeze(-1)).flatten(1)
    if tensor.kind in _FLOATS:
        dtype = _FLOATS[tensor.kind]
        return _raw(file, tensor, torch.Size(tensor.shape).numel() * dtype.itemsize).view(dtype).reshape(tensor.shape)
    import gguf  # pyright: ignore[reportMissingImports]

    try:
        kind = gguf.GGMLQuantizationType(tensor.kind)
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        if tensor.shape[-1] % weights:
            raise ValueError(f"rows of {tensor.shape[-1]} are no whole blocks of {weights}")
        rows = (*tensor.shape[:-1], tensor.shape[-1] // weights * size)
        raw = _raw(file, tensor, torch.Size(rows).numel())
        return torch.from_numpy(gguf.dequantize(raw.numpy().reshape(rows), kind).copy())
    except (ValueError, RuntimeError, KeyError) as error:  # kinds that the package does not decode raise a RuntimeError
        raise ValueError(f"{file.path}: {tensor.name} of {type_name(tensor.kind)} cannot be read ({error})") from error


def _raw(file: GGUFFile, tensor: Stored, count: int) -> Tensor:
    # a copy, so that nothing of the model depends on the file
    return torch.frombuffer(bytearray(file.bytes_of(tensor, count)), dtype=torch.uint8)


def _blocks(file: GGUFFile, tensor: Stored, kind: _Blocks) -> Levels | Misfit:
    rows, columns = tensor.shape
    if columns % kind.weights:
        return Misfit(f"{kind.name} has blocks of {kind.weights}, which do not divide its {columns} inputs")
    groups = columns // kind.weights
    blocks = _raw(file, tensor, rows * groups * kind.bytes).reshape(-1, kind.bytes)
    scale = blocks[:, kind.scale : kind.scale + 2].contiguous().view(torch.float16).float()
    codes = torch.cat([blocks[:, : kind.scale], blocks[:, kind.scale + 2 :]], dim=1)
    return Levels(kind.decode(codes).reshape(rows, columns), scale.reshape(rows, groups), kind.bits)


def _i2_s(file: GGUFFile, tensor: Stored) -> Levels | Misfit:
    rows, columns = tensor.shape
    if columns % _I2_S_BLOCK:
        return Misfit(f"I2_S has blocks of {_I2_S_BLOCK}, which do not divide its {columns} inputs")
    count = rows * columns // 4
    raw = _raw(file, tensor, count + 4)
    codes = _fields(raw[:count].reshape(-1, 32), 2, 32).reshape(-1, 4, 32).flip(1)  # the first weights in the highest bits
    if int(codes.amax()) > 2:
        return Misfit("its I2_S codes go up to 3, which x86 bitnet.cpp never writes; the file has another layout of that name")
    scale = raw[count : count + 4].view(torch.float32).reshape(1, 1)
    return Levels((codes - 1).reshape(rows, columns), scale, 2)
