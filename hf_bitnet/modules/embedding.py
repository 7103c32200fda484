"""Quantized embedding tables: BitEmbedding trains, PackedEmbedding serves. Own; the quantizers are those of the linear layers.

A table (vocabulary, hidden) is laid out as the weight of an output head, so a head that is tied to it is a BitLinear over the
same float Parameter, or a PackedBitLinear over the same bytes and scales. Leaves out: which tables are quantized (`surgery/`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..quantizers import Quantized, WeightQuantizer
from ..relaxations import LINEAR, Relaxation
from ..ste import STE
from .base import QuantizedLayer, keep_float32, other_form
from .functional import FakeQuantizeWeight, Latent, Packed
from .relaxed import mixed_weight


@dataclass(frozen=True)
class EmbeddingSpec:
    """How one table is quantized, and what becomes of its rows.

    Attributes:
        weight: codes and scales; one scale a row ("channel") or a group of it, computed from the weights (not learned).
        ste: gradient estimator; one without a temperature.
        relaxation: what serves while the strength is below 1.
        kind: the class of the plain table, nn.Embedding or a scaled one of transformers.
        factor: what such a scaled table multiplies its rows with; None for nn.Embedding.
        rounds_factor: the factor is rounded to the dtype of the rows first (Gemma), or not (Bart).
    """

    weight: WeightQuantizer
    ste: STE
    relaxation: Relaxation = LINEAR
    kind: type[nn.Embedding] = nn.Embedding
    factor: float | None = None
    rounds_factor: bool = False

    def scaled(self, rows: Tensor) -> Tensor:
        """What the plain table returns for these rows; same shape and dtype."""
        if self.factor is None:
            return rows
        if not self.rounds_factor:
            return rows * self.factor
        return rows * rows.new_full((), self.factor, dtype=torch.float32).to(rows.dtype)


class QuantizedEmbedding(nn.Embedding):
    """A table whose rows are codes and scales.

    Attributes:
        num_embeddings, embedding_dim: sizes of the table. padding_idx: the row that gets no gradient, or None.
        spec: how it is quantized.
    """

    spec: EmbeddingSpec

    def _load_from_state_dict(self, *args: Any, **named: Any) -> None:
        state_dict, prefix, *_, errors = args  # torch calls it by position
        problem = other_form(self, state_dict, prefix)
        if problem is not None:
            errors.append(problem)  # which load_state_dict raises; nothing is copied
        else:
            super()._load_from_state_dict(*args, **named)

    def setup(self, like: nn.Embedding, spec: EmbeddingSpec) -> None:
        """Takes over everything of a table but its weight, without nn.Embedding's constructor, which would allocate one."""
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = like.num_embeddings, like.embedding_dim
        self.padding_idx, self.scale_grad_by_freq = like.padding_idx, like.scale_grad_by_freq
        # in-place changes of the table and sparse gradients are refused when a table is chosen
        self.max_norm, self.norm_type, self.sparse = None, like.norm_type, False
        self.spec = spec
        self.training = like.training

    @property
    def quantizer(self) -> WeightQuantizer:
        """What makes the codes of this table."""
        return self.spec.weight

    def quantized_weight(self) -> Quantized:
        """Codes int8 (num_embeddings, embedding_dim) and scale that forward uses."""
        raise AssertionError("abstract")

    def check_input(self, input: Tensor) -> None:
        """Raises TypeError on anything that is no index."""
        if input.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{type(self).__name__} takes token ids (int64 or int32), got {input.dtype}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """As nn.Module's, but scales and strength stay float32."""
        with keep_float32(self):
            return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        quantizer = self.quantizer
        group = f"/{quantizer.group_size}" if quantizer.group_size else ""
        return f"{super().extra_repr()}, weight={quantizer.scheme}/{quantizer.scale_rule}/{quantizer.granularity}{group}"


class BitEmbedding(QuantizedEmbedding):
    """nn.Embedding that returns quantized rows; the gradient reaches the float table through the estimator.

    Attributes:
        weight: float (num_embeddings, embedding_dim), the parameter of the table it replaced.
        strength: 0-dim float32 buffer, 0 full precision .. 1 quantized; read only while `relaxed`.
        relaxed, bypassed: as of `TrainedLayer`.
    """

    strength: Tensor
    source: Latent
    relaxed: bool
    bypassed: bool

    @classmethod
    def from_float(cls, table: nn.Embedding, spec: EmbeddingSpec) -> BitEmbedding:
        """Takes over the very weight of `table` (no copy). Raises ValueError when groups do not divide its rows."""
        layer = cls.__new__(cls)
        layer.setup(table, spec)
        layer.weight = table.weight
        spec.weight.scale_shape(layer.num_embeddings, layer.embedding_dim)
        layer.source = Latent(spec.weight, spec.ste, 0.5)
        layer.register_buffer("strength", torch.ones((), dtype=torch.float32, device=table.weight.device), persistent=False)
        layer.relaxed = layer.bypassed = False
        return layer

    def quantized_weight(self) -> Quantized:
        return self.quantizer.quantize(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """int64 or int32 (...) -> (..., embedding_dim) in the weight's dtype."""
        self.check_input(input)
        ids = input.reshape(-1)
        rows = nn.functional.embedding(ids, self.weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        if not self.bypassed:
            # of the whole table, though few rows are asked for: a mean over fewer rows may be summed in another order
            scale = self.quantizer.compute_scale(self.weight).index_select(0, ids)
            value = FakeQuantizeWeight.apply(rows, scale, None, self.source)
            if self.relaxed:
                value = mixed_weight(rows, value, scale, self.strength, self.source, self.spec.relaxation)
            rows = value
        return self.spec.scaled(rows).view(*input.shape, self.embedding_dim)


class PackedEmbedding(QuantizedEmbedding):
    """A table of packed codes; a lookup unpacks the rows that are asked for, and no others.

    It returns exactly the rows of the dequantized table: `quantized_weight().dequantize(dtype)[ids]`, where the dtype is that
    of the float table it replaced until `.to(...)`, `.half()` and the like change it. Autocast leaves it alone, as it leaves
    nn.Embedding alone.

    Attributes:
        like: a parameter of one number (1.0) in that dtype. It is cast with the model, is saved, and is what transformers'
            `model.dtype` finds in place of a float table; the float32 scales would tell it another one.
        weight: uint8 (num_embeddings, ceil(embedding_dim * bits / 8)), laid out as in PackedBitLinear.
        weight_scale: float32 (num_embeddings, 1) or (num_embeddings, groups); float32 even after `.to(bfloat16)`.
        bits: stored bits per weight: 1, 2, 4 or 8.
    """

    like: nn.Parameter
    weight_scale: nn.Parameter
    source: Packed
    bits: int

    @classmethod
    def from_trained(cls, table: BitEmbedding) -> PackedEmbedding:
        """Packs the codes that the table's forward uses."""
        layer = cls.__new__(cls)
        layer.setup(table, table.spec)
        quantizer, device = table.quantizer, table.weight.device
        layer.bits = quantizer.storage_bits
        layer.source = Packed(layer.bits, quantizer.grid, table.embedding_dim)
        layer.like = _frozen(torch.ones(1, dtype=table.weight.dtype, device=device))
        rows, columns = table.num_embeddings, table.embedding_dim
        if table.weight.is_meta:  # an empty table, which a checkpoint will fill
            packed = torch.empty(rows, -(-columns * layer.bits // 8), dtype=torch.uint8, device=device)
            scale = torch.empty(quantizer.scale_shape(rows, columns), dtype=torch.float32, device=device)
        else:
            packed, scale = quantizer.pack(table.weight)
        layer.weight, layer.weight_scale = _frozen(packed), _frozen(scale)
        return layer

    def quantized_weight(self) -> Quantized:
        return self.source.codes(self.weight, self.weight_scale)

    def forward(self, input: Tensor) -> Tensor:
        """int64 or int32 (...) -> (..., embedding_dim) in the dtype of `like`."""
        self.check_input(input)
        ids = input.reshape(-1)
        rows, scale = self.weight.index_select(0, ids), self.weight_scale.index_select(0, ids)
        value = self.source.codes(rows, scale).dequantize(self.like.dtype)
        return self.spec.scaled(value).view(*input.shape, self.embedding_dim)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:  # files hold one for each table, also where tables are one module, and share no memory there
            destination[f"{prefix}like"] = destination[f"{prefix}like"].clone()


def plain_embedding(table: QuantizedEmbedding, weight: Tensor) -> nn.Embedding:
    """The plain table that `table` stands for, over the parameter `weight` (num_embeddings, embedding_dim)."""
    spec = table.spec
    factor: dict[str, Any] = {} if spec.factor is None else {"embed_scale": spec.factor}
    with torch.device("meta"):
        plain = spec.kind(table.num_embeddings, table.embedding_dim, table.padding_idx, **factor)
    for name in plain._buffers:  # the factor
        plain._buffers[name] = torch.tensor(spec.factor, device=weight.device)
    plain.scale_grad_by_freq, plain.norm_type = table.scale_grad_by_freq, table.norm_type
    plain.register_parameter("weight", weight)  # type: ignore[arg-type]
    return plain.train(table.training)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def shape_of(layer: QuantizedLayer | QuantizedEmbedding) -> tuple[int, int]:
    """(out_features, in_features) of a layer, (num_embeddings, embedding_dim) of a table."""
    if isinstance(layer, QuantizedEmbedding):
        return layer.num_embeddings, layer.embedding_dim
    return layer.out_features, layer.in_features
