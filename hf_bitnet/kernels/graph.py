"""The operators `torch.ops.hf_bitnet.*`: what a graph of torch.compile or torch.export holds in place of a kernel. Own.

An operator has a schema, a fake implementation and one body per device; the folders of the bodies register those. It is the
same operator on the CPU and on GPUs, so that a graph that was exported on one runs on the other. Eager calls go straight to the
body: an operator's way through torch's dispatcher would cost more than a decoded row's product. While calls are recorded or
transformed rather than computed, and for tensors that only pretend (FakeTensor and other subclasses), `served` takes the
operator.

Leaves out: gradients. The operators serve below the straight-through estimators, which have their own backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference import CODES_PER_BYTE, TRITS_PER_BYTE, Layout, PackedWeight, RowQuantization

NAMESPACE = "hf_bitnet"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_LAYOUT = "int bits, int lowest, int step, float zero_point"
_ROWS = "int qmin, int qmax, float eps"
# what schemas do not know: a tuple is a run of arguments there
_TUPLES = (Layout, RowQuantization)


class Operator(NamedTuple):
    """One operator.

    Attributes:
        call: the overload, which graphs call, with flat arguments.
        runs: runs of the schema's arguments that are one for the function in `reference.py`: its position there, how many
            they are, and what makes it of them.
    """

    call: Callable[..., Any]
    runs: tuple[tuple[int, int, Callable[..., Any]], ...]

    def gather(self, flat: Sequence[Any]) -> list[Any]:
        """The arguments of the function in `reference.py` from those of the schema."""
        args = list(flat)
        for position, count, make in self.runs:
            args[position : position + count] = [make(*args[position : position + count])]
        return args


OPERATORS: dict[str, Operator] = {}


# names of this module: behind a product whose weights came from memory, looking one up in torch's own large dictionaries
# costs a microsecond
_is_compiling = torch.compiler.is_dynamo_compiling  # whatever else compiles has a mode on the stack
_tracing_state = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_transforming = torch._C._are_functorch_transforms_active
_COMPUTED = (Tensor, torch.nn.Parameter)


def is_recording() -> bool:
    """Whether torch.compile, torch.jit.trace, a dispatch mode or a function transform watches the calls of this thread."""
    return _is_compiling() or _tracing_state() is not None or _dispatch_modes() > 0 or _is_transforming()


def is_traced(tensor: Tensor) -> bool:
    """Whether a call with `tensor` must go through torch's dispatcher."""
    return type(tensor) not in _COMPUTED or is_recording()


def implement(key: str, bodies: dict[str, Callable[..., Any]]) -> None:
    """Registers bodies, with the signatures of `reference.py`, for torch's dispatch key of a device ("CPU", "CUDA", ...)."""
    for name, body in bodies.items():
        gather = OPERATORS[name].gather
        LIBRARY.impl(name, lambda *flat, body=body, gather=gather: _without_gaps(body(*gather(flat))), key)


def _without_gaps(result: Any) -> Any:
    """As the fake implementations say; where a body leaves a case to the definition, that keeps the strides of what came."""
    return result.contiguous() if isinstance(result, Tensor) else type(result)(each.contiguous() for each in result)


def served(name: str, body: Callable[..., Any]) -> Callable[..., Any]:
    """`body` for tensors that are computed now, the operator `name` for those that are recorded."""
    operator = OPERATORS[name].call

    def call(*args: Any) -> Any:
        if not is_traced(args[0]):
            return body(*args)
        flat = [part for each in args for part in (each if isinstance(each, _TUPLES) else (each,))]
        return operator(*flat)

    return call


def served_linears(
    several: Callable[..., Any], one: Callable[..., Tensor], plain: Any
) -> tuple[Callable[..., list[Tensor]], Callable[..., Tensor]]:
    """`served` for `packed_linears` and `packed_linear`, which share an operator: schemas know no lists of tuples.

    Args:
        several, one: the bodies. plain: has both in plain torch, for TorchScript, which knows no lists of optional tensors.
    """
    operator = OPERATORS["packed_linears"].call

    def linears(
        x: Tensor, weights: Sequence[PackedWeight], layout: Layout, rows: RowQuantization, dtype: torch.dtype
    ) -> list[Tensor]:
        if not is_traced(x):
            return several(x, weights, layout, rows, dtype)
        if _tracing_state() is not None:
            return plain.packed_linears(x, weights, layout, rows, dtype)
        packed, scale, bias = ([weight[i] for weight in weights] for i in range(3))
        return list(operator(x, packed, scale, bias, *layout, *rows, dtype))

    def linear(
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        layout: Layout,
        rows: RowQuantization,
        dtype: torch.dtype,
    ) -> Tensor:
        if not is_traced(x):
            return one(x, packed, scale, bias, layout, rows, dtype)
        return linears(x, [(packed, scale, bias)], layout, rows, dtype)[0]

    return linears, linear


def served_experts(body: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """`served` for `packed_experts`, whose weights are lists of lists of tuples."""
    operator = OPERATORS["packed_experts"].call

    def experts(
        x: Tensor,
        index: Tensor,
        maps: Sequence[Sequence[PackedWeight]],
        layout: Layout,
        rows: RowQuantization,
        dtype: torch.dtype,
    ) -> list[Tensor]:
        if not is_traced(x):
            return body(x, index, maps, layout, rows, dtype)
        packed, scale, bias = ([weight[i] for of_one in maps for weight in of_one] for i in range(3))
        return list(operator(x, index, packed, scale, bias, len(maps), *layout, *rows, dtype))

    return experts


def _weights(packed: Sequence[Tensor], scale: Sequence[Tensor], bias: Sequence[Tensor | None]) -> list[PackedWeight]:
    return list(zip(packed, scale, bias, strict=True))


def _maps(
    packed: Sequence[Tensor], scale: Sequence[Tensor], bias: Sequence[Tensor | None], count: int
) -> list[list[PackedWeight]]:
    weights, experts = _weights(packed, scale, bias), len(packed) // count
    return [weights[i * experts : (i + 1) * experts] for i in range(count)]


def _define(schema: str, fake: Callable[..., Any], *runs: tuple[int, int, Callable[..., Any]]) -> None:
    """Makes an operator. `fake` has the signature of the function in `reference.py`, as every body."""
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    operator = Operator(getattr(getattr(torch.ops, NAMESPACE), name).default, runs)
    OPERATORS[name] = operator
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *flat: fake(*operator.gather(flat)), lib=LIBRARY)


def _bytes(k: Any, bits: int) -> Any:
    per_byte = CODES_PER_BYTE[bits]
    return (k + per_byte - 1) // per_byte


def _coded_rows(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


# ---- products ----

_define(
    "int_matmul(Tensor a, Tensor b) -> Tensor",
    lambda a, b: a.new_empty(a.shape[0], b.shape[0], dtype=torch.int32),
)
_define(
    "int_linear(Tensor x_codes, Tensor x_scale, Tensor? x_zero, Tensor w_codes, Tensor w_scale, float w_zero, Tensor? bias, "
    "ScalarType dtype) -> Tensor",
    lambda x, x_scale, x_zero, w, w_scale, w_zero, bias, dtype: x.new_empty(x.shape[0], w.shape[0], dtype=dtype),
)
_define(
    f"packed_linears(Tensor x, Tensor[] packed, Tensor[] scale, Tensor?[] bias, {_LAYOUT}, {_ROWS}, ScalarType dtype)"
    " -> Tensor[]",
    lambda x, weights, layout, rows, dtype: [x.new_empty(x.shape[0], packed.shape[0], dtype=dtype) for packed, _, _ in weights],
    (1, 3, _weights),
    (2, 4, Layout),
    (3, 3, RowQuantization),
)
_define(
    f"packed_experts(Tensor x, Tensor index, Tensor[] packed, Tensor[] scale, Tensor?[] bias, int maps, {_LAYOUT}, {_ROWS}, "
    "ScalarType dtype) -> Tensor[]",
    lambda x, index, maps, layout, rows, dtype: [
        x.new_empty(index.shape[0] * index.shape[1], experts[0][0].shape[0], dtype=dtype) for experts in maps
    ],
    (2, 4, _maps),
    (3, 4, Layout),
    (4, 3, RowQuantization),
)
_define(
    "packed_int_linear(Tensor x_codes, Tensor x_scale, Tensor? x_zero, Tensor packed, Tensor scale, Tensor? bias, "
    f"{_LAYOUT}, ScalarType dtype) -> Tensor",
    lambda x, x_scale, x_zero, packed, scale, bias, layout, dtype: x.new_empty(x.shape[0], packed.shape[0], dtype=dtype),
    (6, 4, Layout),
)
_define(
    "fixed_matmul(Tensor a, Tensor? a_scale, Tensor codes, float zero_point, Tensor? scale, ScalarType dtype) -> Tensor",
    lambda a, a_scale, codes, zero_point, scale, dtype: a.new_empty(a.shape[0], codes.shape[1], dtype=dtype),
)

# ---- rows ----

_define(f"quantize_rows(Tensor x, {_ROWS}) -> (Tensor, Tensor)", _coded_rows)
_define(f"norm_quantize_rows(Tensor x, Tensor norm_weight, float norm_eps, {_ROWS}) -> (Tensor, Tensor)", _coded_rows)
_define(
    f"quantize_columns(Tensor x, Tensor? factor, {_ROWS}) -> (Tensor, Tensor)",
    lambda x, *_: (
        x.new_empty(x.shape[1], x.shape[0], dtype=torch.int8),
        x.new_empty(x.shape[1], 1, dtype=torch.float32),
    ),
)
_define(
    "mean_magnitudes(Tensor rows) -> Tensor",
    lambda rows: rows.new_empty(rows.shape[0], 1, dtype=torch.float32),
)
_define(
    "quantize_weight(Tensor rows, Tensor scale, float zero_point, int qmin, int qmax, ScalarType dtype) -> Tensor",
    lambda rows, scale, zero_point, qmin, qmax, dtype: rows.new_empty(rows.shape, dtype=dtype),
)
_define(
    "quantize_sign(Tensor rows, Tensor threshold, ScalarType dtype) -> Tensor",
    lambda rows, threshold, dtype: rows.new_empty(rows.shape, dtype=dtype),
)
_define(
    "scale_rows(Tensor x, Tensor scale, ScalarType dtype) -> Tensor",
    lambda x, scale, dtype: x.new_empty(x.shape, dtype=dtype),
)

# ---- bytes ----

_define(
    f"quantize_pack(Tensor weight, Tensor scale, int qmin, int qmax, {_LAYOUT}) -> Tensor",
    lambda weight, scale, qmin, qmax, layout: weight.new_empty(
        weight.shape[0], _bytes(weight.shape[1], layout.bits), dtype=torch.uint8
    ),
    (4, 4, Layout),
)
_define(
    "sign_pack(Tensor weight, Tensor threshold) -> Tensor",
    lambda weight, threshold: weight.new_empty(weight.shape[0], _bytes(weight.shape[1], 1), dtype=torch.uint8),
)
_define(
    "pack(Tensor codes, int bits, int lowest, int step) -> Tensor",
    lambda codes, bits, lowest, step: codes.new_empty(*codes.shape[:-1], _bytes(codes.shape[-1], bits), dtype=torch.uint8),
)
_define(
    "unpack(Tensor packed, int bits, int lowest, int step, SymInt in_features) -> Tensor",
    lambda packed, bits, lowest, step, in_features: packed.new_empty(*packed.shape[:-1], in_features, dtype=torch.int8),
)
_define(
    "pack_trits(Tensor codes) -> Tensor",
    lambda codes: codes.new_empty(
        *codes.shape[:-1], (codes.shape[-1] + TRITS_PER_BYTE - 1) // TRITS_PER_BYTE, dtype=torch.uint8
    ),
)
_define(
    "unpack_trits(Tensor packed, SymInt in_features) -> Tensor",
    lambda packed, in_features: packed.new_empty(*packed.shape[:-1], in_features, dtype=torch.int8),
)
