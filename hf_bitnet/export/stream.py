"""Safetensors files written tensor by tensor. Own; the format is safetensors' (8 bytes length, JSON header, data).

The library of that name wants all tensors of a file at once. Here each is made when its turn comes, written and dropped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from ..pages import release_mapped

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
}
_METADATA = {"format": "pt"}
# elements that are written or compared at once
_PART = 1 << 21


class Planned(NamedTuple):
    """A tensor that is going to be made.

    Attributes:
        name: in the file. dtype, shape: of what `make()` will return: the tensor, or its parts along dimension 0 in turn.
        weights: float weights it stands for, which the progress counts.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor | Iterator[Tensor]]
    weights: int

    def tensor(self) -> Tensor:
        """Made whole."""
        made = self.make()
        return made if isinstance(made, Tensor) else torch.cat(list(made))

    def parts(self) -> Iterator[Tensor]:
        """Its parts along dimension 0, on the CPU, a few MB each where it is not made whole; a scalar is one."""
        made = self.make()
        for part in [made] if isinstance(made, Tensor) else made:
            part = part.detach()
            rows = max(1, _PART * len(part) // max(1, part.numel())) if part.dim() else 1
            for each in part.split(rows) if part.dim() else [part]:
                yield each.cpu()
                release_mapped(each)

    @property
    def bytes(self) -> int:
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


def planned(name: str, tensor: Tensor, weights: int | None = None) -> Planned:
    """An existing tensor, written as it is. Conversions belong into `make`."""
    return Planned(name, tensor.dtype, tuple(tensor.shape), lambda: tensor, tensor.numel() if weights is None else weights)


def write_safetensors(
    folder: Path, tensors: Sequence[Planned], *, max_shard_size: int | str, progress: Callable[[int], object]
) -> list[Path]:
    """Writes model.safetensors, or shards with their index, as transformers names them. Returns the data files.

    Raises ValueError before the first byte where the format has no name for a dtype.
    """
    for each in tensors:
        if each.dtype not in _NAMES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _NAMES)
            raise ValueError(
                f"{each.name} is {str(each.dtype).removeprefix('torch.')}, which safetensors cannot hold; legal: {known}. "
                "Convert it first, or register the buffer with persistent=False"
            )
    by_name = {each.name: each for each in tensors}
    # empty stand-ins of the right sizes, so that the shards are cut where save_pretrained would cut them
    empty = {each.name: torch.empty(each.shape, dtype=each.dtype, device="meta") for each in tensors}
    split = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
    files = []
    for file, names in split.filename_to_tensors.items():
        _write_file(folder / file, [by_name[name] for name in names], progress)
        files.append(folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _write_file(path: Path, tensors: list[Planned], progress: Callable[[int], object]) -> None:
    # larger elements first keeps all of them aligned
    ordered = sorted(tensors, key=lambda each: (-each.dtype.itemsize, each.name))
    header: dict[str, object] = {"__metadata__": _METADATA}
    end = 0
    for each in ordered:
        header[each.name] = {"dtype": _NAMES[each.dtype], "shape": list(each.shape), "data_offsets": [end, end + each.bytes]}
        end += each.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for each in ordered:
            append(file, each)
            progress(each.weights)


def append(file: BinaryIO, each: Planned) -> None:
    """Makes a tensor and writes its bytes at the end of an open file, part by part."""
    before = file.tell()
    for part in each.parts():
        assert part.dtype == each.dtype and tuple(part.shape[1:]) == each.shape[1:], f"{each.name}: not as planned"
        # not tofile: it would write past what the file object holds back
        file.write(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    assert file.tell() - before == each.bytes, f"{each.name}: not as planned"
