"""Perplexity: exp of a causal language model's mean next-token loss, by `hf_bitnet.perplexity`. Own.

Unlike the metric of that name on the Hub it takes a model that is open, full precision or quantized, and cuts texts into
windows of one length, so that two models are compared on the very same tokens. Leaves out: a value for each text.
"""

from __future__ import annotations

from typing import Any

import evaluate
import torch
from datasets import Features, List, Value

from ..analysis import perplexity, text_windows
from .base import OfflineMetric

_DESCRIPTION = "Perplexity of a causal language model, in full precision or quantized, on texts or windows of tokens."
_INPUTS = """
Args:
    predictions: texts (list of str; they follow one another in the windows), or windows of token ids, all of one length.
    model: a causal language model.
    tokenizer: of the model; needed for texts.
    length: tokens in a window of texts (default: 256).
    max_windows: read no further than these (default: all).
    batch_size: windows in a forward (default: 16).
Returns:
    perplexity; windows and tokens: how many were read.
Example:
    Perplexity().compute(predictions=["one text", "another"], model=model, tokenizer=tokenizer, length=64)
"""


class Perplexity(OfflineMetric):
    """What is measured is given to `compute`: the texts or windows as predictions, the model beside them."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=[Features({"predictions": Value("string")}), Features({"predictions": List(Value("int64"))})],
        )

    def _compute(  # type: ignore[override]
        self,
        *,
        predictions: list[Any],
        model: Any = None,
        tokenizer: Any = None,
        length: int = 256,
        max_windows: int | None = None,
        batch_size: int = 16,
    ) -> dict[str, float]:
        if model is None:
            raise ValueError("Perplexity: of which model? compute(predictions=texts, model=model, tokenizer=tokenizer)")
        windows = _windows(list(predictions), tokenizer, length, max_windows)
        value = perplexity(model, windows, batch_size, progress=False)
        return {"perplexity": value, "windows": windows.shape[0], "tokens": windows.numel()}


def _windows(predictions: list[Any], tokenizer: Any, length: int, max_windows: int | None) -> torch.Tensor:
    if isinstance(predictions[0], str):
        if tokenizer is None:
            raise ValueError("Perplexity: texts need the model's tokenizer: compute(..., tokenizer=tokenizer)")
        return text_windows(tokenizer, predictions, length, max_windows=max_windows)
    lengths = {len(row) for row in predictions}
    if len(lengths) != 1:
        raise ValueError(
            f"Perplexity: windows of {min(lengths)} to {max(lengths)} tokens; all must be as long, as those of text_windows are"
        )
    return torch.tensor(predictions[:max_windows], dtype=torch.int64, device="cpu")
