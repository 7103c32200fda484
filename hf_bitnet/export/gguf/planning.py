"""Every tensor of the file before a byte is written: name, kind, bytes, and where its rows come from. Own."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...modules import QuantizedEmbedding, QuantizedLayer, shape_of
from ..format import Source
from . import architectures, metadata
from .architectures import Architecture
from .contents import Codes, Floats, shape
from .kinds import KINDS, Choice, Kind, choose
from .metadata import Metadata

F32 = KINDS["F32"]
# how a weight of that layer or table is stored
Chooser = Callable[[QuantizedLayer | QuantizedEmbedding], Choice]


@dataclass(frozen=True)
class Entry:
    """One tensor. name: in the model. stored: in the file. why: as of `WrittenTensor`."""

    name: str
    stored: str
    kind: Kind
    content: Codes | Floats
    why: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return shape(self.content)

    @property
    def bytes(self) -> int:
        return self.kind.size(self.shape)

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    architecture: Architecture
    metadata: Metadata
    entries: list[Entry]

    @property
    def main_kind(self) -> Kind:
        """Of most of the weights in the layers."""
        counted: Counter[str] = Counter()
        for entry in self.entries:
            if entry.stored.startswith("blk.") and len(entry.shape) > 1:
                counted[entry.kind.name] += entry.weights
        return KINDS[counted.most_common(1)[0][0]]


def refusals(source: Source, program: str) -> list[str]:
    """Why the program cannot compute the model; empty where it can."""
    found = architectures.architecture_of(source, program)
    if isinstance(found, str):
        return [found]
    problems = architectures.problems(source, found) + metadata.problems(source.model.config, found)
    return [f"{problem}; use format='dense'" for problem in problems] + architectures.norm_problems(source, found)


def plan_of(source: Source, program: str, choice_of: Chooser, other: Kind) -> Plan:
    """Of a model that has no `refusals`.

    Args:
        other: kind of float matrices; vectors and norms are F32 always.
    """
    architecture = architectures.architecture_of(source, program)
    assert isinstance(architecture, Architecture)
    config = source.model.config
    made = metadata.metadata_of(config, architecture)
    entries = _quantized(source, architecture, choice_of)
    for name, tensor in source.others.items():
        stored = architecture.stored(name)
        assert stored is not None
        order = architecture.row_order(stored, len(tensor), config)
        offset = architecture.norm_offset if stored.endswith("norm.weight") else 0.0
        factor = metadata.query_factor(config) if stored.endswith("attn_q_norm.weight") else 1.0
        kind = F32 if tensor.dim() == 1 else other
        entries.append(Entry(name, stored, kind, Floats(name, tensor, kind, order, offset, factor)))
    for name, (stored, gain) in architectures.sub_norms(source, architecture).items():
        entries.append(Entry(name, stored, F32, Floats(name, gain, F32)))
    for stored, tensor in made.tensors.items():
        entries.append(Entry("(positions)", stored, F32, Floats("(positions)", tensor, F32)))
    return Plan(architecture, made, sorted(entries, key=_place))


def _quantized(source: Source, architecture: Architecture, choice_of: Chooser) -> list[Entry]:
    config = source.model.config
    tied = architectures.tied_head(source)
    entries = []
    for name, layer in {**source.tables, **source.layers}.items():
        stored = architecture.stored(f"{name}.weight")
        assert stored is not None
        if layer is tied:
            continue  # a file without this tensor takes the table's
        choice = choice_of(layer)
        order = architecture.row_order(stored, shape_of(layer)[0], config)
        content = Codes(name, layer, choice.kind, choice.steps, order)
        entries.append(Entry(f"{name}.weight", stored, choice.kind, content, choice.why))
        bias = layer.plain_bias if isinstance(layer, QuantizedLayer) else None
        if bias is not None:
            stored = architecture.stored(f"{name}.bias")
            assert stored is not None
            entries.append(Entry(f"{name}.bias", stored, F32, Floats(f"{name}.bias", bias, F32, order)))
    return entries


def _place(entry: Entry) -> tuple[int, int, str]:
    """In the order in which a program needs them: embeddings, layers, head."""
    block = re.match(r"blk\.(\d+)\.", entry.stored)
    if block:
        return 1, int(block[1]), entry.stored
    return (2 if entry.stored.startswith("output") else 0), 0, entry.stored


def choices(source: Source, asked: str | None, legal: Sequence[str]) -> Chooser:
    """Kinds by `kinds.choose`."""

    def choice_of(layer: QuantizedLayer | QuantizedEmbedding) -> Choice:
        size = shape_of(layer)
        return choose(layer.quantizer.grid, size, layer.quantizer.scale_shape(*size), asked, legal)

    return choice_of


def probe_length(plan: Plan, length: int = 24) -> int:
    return min(length, plan.metadata.integers["context_length"])
