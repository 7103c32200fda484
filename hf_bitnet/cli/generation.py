"""A causal language model made ready to write, and the clock of what it writes."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer

from .. import optimize_for_generation
from .common import keep_memory, open_checkpoint


def open_causal(arguments: argparse.Namespace, path: str, device: torch.device) -> Any:
    """The model, with the faster forwards of the CPU where it is there. Raises ValueError when it writes no text."""
    model = open_checkpoint(arguments, path)
    if not hasattr(model, "can_generate") or not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(f"{path!r} holds a {type(model).__name__}, which is no causal language model and continues no text")
    model = model.to(device).eval()
    keep_memory(arguments)
    return optimize_for_generation(model) if device.type == "cpu" else model


def positions_of(model: Any) -> int | None:
    """How many tokens fit; None where the config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


class Clock(BaseStreamer):
    """Notes when the prompt was given and when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def tokens(self) -> int:
        """That came after the prompt."""
        return max(len(self.times) - 1, 0)

    @property
    def first(self) -> float:
        """Seconds from the prompt to the first token; 0 where none came."""
        return self.times[1] - self.times[0] if self.tokens else 0.0

    @property
    def rate(self) -> float:
        """Tokens a second after the first one; 0 where there are no two."""
        return (self.tokens - 1) / max(self.times[-1] - self.times[1], 1e-9) if self.tokens > 1 else 0.0


class Printer(TextStreamer):
    """Prints an answer as it grows, to `out` (None: nowhere), and keeps the time.

    Attributes:
        ids: of the answer.
    """

    def __init__(self, tokenizer: Any, out: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.out, self.clock = out, Clock()
        self.ids: list[int] = []

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.ids += value.reshape(-1).tolist()
        self.clock.put(value)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.out is not None:
            print(text, end="\n" if stream_end else "", file=self.out, flush=True)
