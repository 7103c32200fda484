"""The C++ bodies as the dispatch table lists them: themselves in eager, `graph.py`'s operators while calls are recorded. Own.

Elementwise steps that a compiler fuses with their neighbours stay plain torch there, as they were. Rows and weights do not:
what inductor makes of a reduction and the rounding behind it takes 3 % of a compiled training step more than the kernel, for
each of the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import reference
from ..graph import implement, is_traced, served, served_experts, served_linears
from . import bodies, decode, experts, fixed, products


def _fusible(body: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """`body` for tensors that are computed now, the definition for those that are recorded."""

    def call(*args: Any) -> Any:
        return (plain if is_traced(args[0]) else body)(*args)

    return call


_ELEMENTWISE = ("quantize_columns", "scale_rows")
_ROUNDED = ("quantize_rows", "norm_quantize_rows", "quantize_weight", "quantize_sign", "mean_magnitudes")
_BYTES = ("quantize_pack", "sign_pack", "pack", "unpack", "pack_trits", "unpack_trits")
_BODIES: dict[str, Callable[..., Any]] = {
    **{name: getattr(products, name) for name in ("int_matmul", "int_linear", "packed_int_linear")},
    "fixed_matmul": fixed.fixed_matmul,
    **{name: getattr(bodies, name) for name in (*_ROUNDED, *_ELEMENTWISE, *_BYTES)},
}

implement("CPU", {**_BODIES, "packed_linears": products.packed_linears, "packed_experts": experts.packed_experts})

# operation -> body with the signature of `reference.py`
OPERATIONS: dict[str, Callable[..., Any]] = {
    **{name: served(name, body) for name, body in _BODIES.items()},
    **{name: _fusible(_BODIES[name], getattr(reference, name)) for name in _ELEMENTWISE},
    "rms_norm": decode.rms_norm,
    "rotate": decode.rotate,
    "packed_experts": served_experts(experts.packed_experts),
}
OPERATIONS["packed_linears"], OPERATIONS["packed_linear"] = served_linears(
    products.packed_linears, products.packed_linear, reference
)
