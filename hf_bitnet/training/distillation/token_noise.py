"""Some input tokens are replaced, so that the teacher is asked about text that it did not learn by heart. Own.

On its own training text a teacher that is full repeats what it memorized, which a student of fewer bits has no room for and
which says little about other text. A replaced token makes the rest of the window new to it. Student and teacher read the same
tokens; labels stay, so that a cross entropy beside the divergence asks for the true next token.

teacher   a causal teacher draws the token for its place, by what it says after the tokens in front (one more forward of it)
batch     any other token of the batch: for teachers that are no language models

Random numbers are hashes of (seed, step, tokens of the batch, place): a resumed run draws the same, and torch's random state is
untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...noise import make_key, mix, uniform
from ..options import number

SOURCES = ("teacher", "batch")


@dataclass(frozen=True)
class TokenNoise:
    """Which input tokens are replaced, and by what.

    Args:
        rate: share of the tokens, 0..1.
        source: "teacher" or "batch", see above.
    """

    rate: float = 0.3
    source: str = "teacher"

    def __post_init__(self) -> None:
        number("rate", self.rate, 0.0, 1.0, hint="it is a share of the tokens: rate=0.3")
        if self.source not in SOURCES:
            raise ValueError(f"source={self.source!r}; legal: {', '.join(map(repr, SOURCES))}")


def noisy_tokens(
    inputs: dict[str, Any], noise: TokenNoise, seed: int, step: int, logits_of: Callable[[Tensor], Callable[[slice], Tensor]]
) -> dict[str, Any]:
    """The batch with some of its tokens replaced; padding neither goes nor comes.

    Args:
        inputs: with `input_ids`, int64 (batch, tokens); it is not changed.
        logits_of: flat places of the batch (n,) -> a slice of them -> what the teacher says there, (rows, V).

    Raises ValueError when the batch has no token ids.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        raise ValueError(
            f"token_noise replaces tokens of `input_ids`, and the batch has {', '.join(inputs)}; leave token_noise out of the "
            "distillation"
        )
    key = _key(ids, seed, step)
    mask = inputs.get("attention_mask")
    exists = mask.bool() if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids, dtype=torch.bool)
    chosen = (uniform(tuple(ids.shape), key) < noise.rate) & exists
    numbers = uniform(tuple(ids.shape), key, stream=1)
    if noise.source == "batch":
        source = numbers.mul(ids.numel()).long().clamp_max(ids.numel() - 1)
        made = torch.where(chosen & exists.reshape(-1)[source], ids.reshape(-1)[source], ids)
    else:
        chosen[:, 0] = False  # nothing stands in front
        chosen[:, 1:] &= exists[:, :-1]
        places = chosen.reshape(-1).nonzero().squeeze(1)
        made = ids.reshape(-1).clone()
        made[places] = _drawn(logits_of(places - 1), numbers.reshape(-1)[places]).to(made.dtype)
        made = made.reshape(ids.shape)
    return {**inputs, "input_ids": made}


def check_draws(teacher: nn.Module) -> None:
    """Raises ValueError when the teacher cannot say what token comes next."""
    causal = getattr(teacher, "can_generate", lambda: False)() and not teacher.config.is_encoder_decoder  # type: ignore[union-attr]
    if not causal:
        raise ValueError(
            f"token_noise draws tokens from a causal language model, and the teacher is a {type(teacher).__name__}; write "
            "token_noise={'rate': 0.15, 'source': 'batch'}"
        )


def _key(ids: Tensor, seed: int, step: int) -> Tensor:
    """int64, 0-dim. Other tokens give another: micro-batches of a step, and ranks, draw for themselves."""
    places = torch.arange(ids.numel(), device=ids.device).reshape(ids.shape)
    return (mix(mix(places) ^ ids.long()).sum() + make_key(seed, step, 0)) & 0xFFFFFFFF


def _drawn(logits: Callable[[slice], Tensor], numbers: Tensor, rows: int = 256) -> Tensor:
    """Tokens (n,) from their distributions, by numbers (n,) in (0, 1); so many rows of logits exist at a time."""
    drawn = []
    for start in range(0, len(numbers), rows):
        part = slice(start, start + rows)
        sums = logits(part).float().softmax(dim=-1).cumsum(dim=-1)
        wanted = numbers[part].to(sums.device).unsqueeze(1) * sums[:, -1:]
        drawn.append(torch.searchsorted(sums, wanted).squeeze(1).clamp_max(sums.shape[1] - 1).to(numbers.device))
    return torch.cat(drawn) if drawn else numbers.long()
