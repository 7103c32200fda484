"""A tiny Llama that has learned something, for tests where a random model would not do. About two seconds, once a process."""

from __future__ import annotations

import copy
from functools import lru_cache

import torch
import transformers as tf
from torch import Tensor

from tests.tiny import VOCABULARY, tiny

_STEPS = 200


def sequences(number: int, length: int = 16, seed: int = 0) -> Tensor:
    """Token ids (number, length) of a walk: each next token is a fixed function of the last two."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (number, length), generator=generator)
    for i in range(2, length):
        ids[:, i] = 3 + (5 * ids[:, i - 1] + 7 * (ids[:, i - 2] % 3)) % (VOCABULARY - 3)
    return ids


def batch(number: int = 32, seed: int = 1) -> dict[str, Tensor]:
    ids = sequences(number, seed=seed)
    return {"input_ids": ids, "labels": ids.clone()}


def trained_llama() -> tf.PreTrainedModel:
    """A fresh copy of the trained model, float32, in eval mode; its loss on `batch()` is far below log(VOCABULARY)."""
    return copy.deepcopy(_trained())


@lru_cache(maxsize=1)
def _trained() -> tf.PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, _ = tiny("llama")
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        for step in range(_STEPS):
            loss = model(**batch(64, seed=100 + step)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model.eval()
