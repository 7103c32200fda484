"""Whether the operands of an operation belong together: compiled kernels read memory by sizes that they are told. Own.

Every function raises ValueError with the shapes that came; none waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import PackedWeight

_MOST_TERMS = 1 << 17  # of -128 times 127, and one more would still fit


def check_codes(a: Tensor, b: Tensor) -> None:
    """int8 (M, K) and int8 (N, K)."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or a.dtype != torch.int8 or b.dtype != torch.int8:
        found = f"{a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
        raise ValueError(f"an integer product takes int8 (M, K) and int8 (N, K), not {found}")
    _check_terms(a.shape[1])


def _check_terms(k: int) -> None:
    """So many products of two int8 are summed in int32."""
    if k > _MOST_TERMS:
        raise ValueError(
            f"an integer product of 8 bits sums {_MOST_TERMS:,} terms at most, not {k:,}; their int32 sum may overflow"
        )


def check_input(x_codes: Tensor, x_scale: Tensor, x_zero: Tensor | None) -> None:
    """int8 (M, K), with a scale and perhaps a zero point of each row."""
    m = x_codes.shape[0]
    if x_codes.dim() != 2 or x_codes.dtype != torch.int8 or any(t is not None and t.numel() != m for t in (x_scale, x_zero)):
        raise ValueError("the input of an integer product is int8 (M, K), with a scale (and zero point) float32 (M, 1)")


def check_device(x: Tensor, *others: Tensor | None) -> None:
    """All on the device of x: a kernel is launched there, and reads the others' addresses as its own."""
    for other in others:
        if other is not None and other.device != x.device:
            raise ValueError(f"all tensors of a kernel have to be on one device, not on {x.device} and {other.device}")


def check_matrix(x: Tensor) -> None:
    """A matrix of rows."""
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, a matrix (rows, inputs) is needed")


def check_weight(weight: Tensor, scale: Tensor, bias: Tensor | None, k: int, width: int) -> None:
    """uint8 (N, width) for k inputs, or int8 codes (N, k); scale (1, 1), (N, 1) or (N, G), bias (N,) or None."""
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(f"a weight of shape {tuple(weight.shape)}; {k} inputs need (outputs, {width})")
    if weight.dtype not in (torch.uint8, torch.int8):
        raise ValueError(f"a weight of {weight.dtype}; packed ones are torch.uint8, codes torch.int8")
    n = weight.shape[0]
    if width == k:
        _check_terms(k)
    check_scale(scale, n, k)
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"a bias of shape {tuple(bias.shape)} fits no weight of {n} outputs")


def check_places(x: Tensor, index: Tensor) -> None:
    """float (T, K), and int64 (T, k): which experts each row chose."""
    check_matrix(x)
    if index.dim() != 2 or index.dtype != torch.int64 or index.shape[0] != x.shape[0]:
        raise ValueError(
            f"experts are chosen by int64 (rows, choices); {index.dtype} {tuple(index.shape)} fits no x {tuple(x.shape)}"
        )


def check_counts(maps: Sequence[Sequence[PackedWeight]]) -> None:
    """For each map one weight of every expert."""
    if not maps or not maps[0] or any(len(experts) != len(maps[0]) for experts in maps):
        raise ValueError(f"every map needs a weight of each expert; there are {[len(experts) for experts in maps]}")


def check_alike(maps: Sequence[Sequence[PackedWeight]]) -> None:
    """`check_counts`, and the weights of a map have as many outputs each."""
    check_counts(maps)
    for experts in maps:
        if len(outputs := {weight[0].shape[0] for weight in experts}) > 1:
            raise ValueError(f"the experts' weights of one map are not alike: they have {sorted(outputs)} outputs")


def kinds_of(weights: Sequence[PackedWeight]) -> set[tuple[object, ...]]:
    """What a kernel takes to be the same of all weights when it is told of the first: one kind, where they lie alike."""
    return {(_kind(packed), _kind(scale), _kind_of_bias(bias)) for packed, scale, bias in weights}


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _kind_of_bias(bias: Tensor | None) -> tuple[object, ...]:
    return () if bias is None else (bias.shape, bias.dtype, bias.device)  # one with gaps is copied


def check_experts(experts: Sequence[PackedWeight], k: int, width: int) -> None:
    """Weights of one map that lie alike, for kernels that are told the sizes of the first."""
    check_weight(*experts[0], k, width)
    if len(kinds := kinds_of(experts)) > 1:
        raise ValueError(f"the experts' weights of one map are not alike: {sorted(map(str, kinds))}")


def check_scale(scale: Tensor, n: int, k: int) -> None:
    """(1, 1), (N, 1) or (N, G) of a weight (N, K)."""
    if scale.dim() != 2 or scale.shape[0] not in (1, n) or scale.shape[1] < 1 or k % scale.shape[1]:
        raise ValueError(f"a scale of shape {tuple(scale.shape)} fits no weight of {n} outputs and {k} inputs")


def check_gain(gain: Tensor, k: int) -> None:
    """The gain (K,) of a norm."""
    if gain.shape != (k,):
        raise ValueError(f"a norm of shape {tuple(gain.shape)} fits no rows of {k}")


def check_levels(a: Tensor, a_scale: Tensor | None, codes: Tensor) -> None:
    """float (M, K) and int8 (K, N), a_scale of K elements or None."""
    k = a.shape[1]
    if codes.dtype != torch.int8 or codes.dim() != 2 or codes.shape[0] != k:
        raise ValueError(f"codes of {codes.dtype} {tuple(codes.shape)} fit no left operand of shape {tuple(a.shape)}")
    if a_scale is not None and a_scale.numel() != k:
        raise ValueError(f"scales of shape {tuple(a_scale.shape)} fit no left operand of shape {tuple(a.shape)}: {k}, one each")
