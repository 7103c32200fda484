"""Casts to the dtype of a file, which refuse what float16 cannot hold. Own."""

from __future__ import annotations

import torch
from torch import Tensor

OTHER_DTYPES = "export with dtype='float32' or 'bfloat16'"


def rounded(what: str, exact: Tensor, dtype: torch.dtype, way_out: str = OTHER_DTYPES, *, is_scale: bool = False) -> Tensor:
    """`exact` in `dtype`; other dtypes than float16 hold all that a model computes with.

    Raises ValueError, which begins with `what`, where a finite number becomes infinite, or a scale that is not 0 becomes 0.
    """
    cast = exact.to(dtype)
    if dtype != torch.float16 or exact.dtype == dtype:
        return cast
    if not is_scale and cast.numel() and bool(torch.stack(torch.aminmax(cast)).isfinite().all()):
        return cast  # as nearly always; a NaN would be one of the two
    lost = exact.isfinite() & ~cast.isfinite()
    if is_scale:
        lost |= (cast == 0) & (exact != 0)
    if bool(lost.any()):
        raise ValueError(
            f"{what}: {float(exact[lost].flatten()[0]):.3g} is no number of float16, which ends at 65504 and is 0 below 3e-8; "
            f"{way_out}"
        )
    return cast
