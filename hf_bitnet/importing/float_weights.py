"""Checkpoints of plain float weights that were quantized before they were saved: their numbers lie on a grid. Own.

Such are the bfloat16 version of onebitllms and Falcon-E, and the format "dense" of `export_model`. A layer that lies on no grid
stays as it is; `coverage(model)` lists it.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from .assembly import Wanted
from .codes import Found, Misfit
from .folder import Folder
from .recognition import recognise


class FloatWeights:
    """`Contents` of such a folder."""

    def __init__(self, folder: Folder) -> None:
        self.folder, self.config, self.source = folder, folder.config(), str(folder.path)
        self._example: str | None = None

    def tensors(self, wanted: Wanted) -> Iterator[tuple[str, Tensor | Found | Misfit]]:
        for name, tensor in self.folder.tensors():
            place = wanted.places.get(name.removesuffix(".weight"))
            if place is None or not tensor.is_floating_point() or tensor.dim() != 2:
                yield name, tensor
                continue
            got = recognise(tensor.T if place.transposed else tensor)
            if isinstance(got, Misfit):
                self._example = self._example or f"{name}: {got.reason}"
            yield name, tensor if isinstance(got, Misfit) else got

    def advice(self) -> str:
        found = self._example or "it has no layer that could be"
        return (
            f"{found}. If its float weights were trained to be quantized (Falcon-E's revision 'prequantized', onebitllms, "
            "torchao's BitNetTrainingLinear: ternary by absmean, one scale a tensor), say so when loading it: from_pretrained("
            "path, quantization_config=BitNetQuantizationConfig.bitnet_b158())"
        )
