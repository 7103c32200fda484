"""Windows of tokens and perplexity, as the data's README defines them. Own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase


def windows(tokenizer: PreTrainedTokenizerBase, path: Path, length: int = 256) -> torch.Tensor:
    """The whole file tokenized once and cut into windows without overlap: int64 (count, length)."""
    ids = tokenizer(path.read_text(encoding="utf-8"), return_attention_mask=False, verbose=False)["input_ids"]
    count = len(ids) // length
    return torch.tensor(ids[: count * length]).view(count, length)


@torch.no_grad()
def perplexity(model: nn.Module, tokens: torch.Tensor, batch: int = 16, bf16: bool = False) -> float:
    """exp of the mean next-token loss over all windows (count, length)."""
    was_training = model.training
    model.eval()
    total = count = 0.0
    for part in tokens.split(batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(input_ids=part).logits[:, :-1].float()
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
        count += part[:, 1:].numel()
    model.train(was_training)
    return float(torch.tensor(total / count).exp())
