"""Some input tokens are replaced, so that the teacher is asked about text that it did not learn by heart. Own.

On its own training text a teacher that is full repeats what it memorized, which a student of fewer bits has no room for and
which says little about other text. A replaced token makes the rest of the window new to it. Student and teacher read the same
tokens; labels stay, so that a cross entropy beside the divergence asks for the true next token.

Random numbers are hashes of (seed, step, tokens of the batch, place): a resumed run draws the same, and torch's random state is
untouched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...noise import make_key, mix, uniform


def noisy_tokens(inputs: dict[str, Any], rate: float, seed: int, step: int) -> dict[str, Any]:
    """The batch with about `rate` of its tokens replaced by others of the same batch; padding neither goes nor comes.

    Args:
        inputs: with `input_ids`, int64 (batch, tokens); it is not changed.

    Raises ValueError when the batch has no token ids.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        raise ValueError(
            f"token_noise replaces tokens of `input_ids`, and the batch has {', '.join(inputs)}; leave token_noise out of the "
            "distillation"
        )
    places = torch.arange(ids.numel(), device=ids.device).reshape(ids.shape)
    content = mix(mix(places) ^ ids.long()).sum()
    key = (content + make_key(seed, step, 0)) & 0xFFFFFFFF
    source = uniform(tuple(ids.shape), key, stream=1).mul(ids.numel()).long().clamp_max(ids.numel() - 1)
    chosen = uniform(tuple(ids.shape), key) < rate
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        counts = mask.bool()
        chosen = chosen & counts & counts.reshape(-1)[source]
    return {**inputs, "input_ids": torch.where(chosen, ids.reshape(-1)[source], ids)}
