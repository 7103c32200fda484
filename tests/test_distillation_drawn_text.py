"""Text that a teacher writes: what it is drawn from, repeatability, what is left as it was, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_bitnet import drawn_windows
from tests.qat import plain


def test_starts_are_kept_and_tokens_are_the_models_own() -> None:
    """A model that gives all its chance to the next number counts on, whatever its own settings say."""
    model = plain()
    vocabulary = model.config.vocab_size
    model.generation_config.eos_token_id = 5  # texts run on past their ends
    model.generation_config.top_k = 1

    class Counting(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot((model.seen + 1) % vocabulary, vocabulary).mul(1e4)[:, -hidden.shape[1] :]

    model.lm_head = Counting()
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: setattr(model, "seen", inputs[0]))
    starts = torch.tensor([[1, 2], [7, 8], [4, 5]])
    found = drawn_windows(model, starts, 9, batch_size=2, progress=False)
    assert torch.equal(found, starts[:, :1] + torch.arange(9))
    assert model.generation_config.eos_token_id == 5 and model.generation_config.top_k == 1


def test_draws_by_chance() -> None:
    """Each token as often as its probability says: 4000 draws of the first token, within five standard errors."""
    model = plain()
    starts = torch.tensor([[3]]).repeat(4000, 1)
    found = drawn_windows(model, starts, 2, batch_size=4000, progress=False)[:, 1]
    with torch.no_grad():
        chance = model(starts[:1]).logits[0, 0].softmax(-1)
    counts = torch.bincount(found, minlength=len(chance)) / 4000
    assert ((counts - chance).abs() <= 5 * (chance * (1 - chance) / 4000).sqrt() + 1e-3).all()


def test_repeats_and_leaves_all_as_it_was() -> None:
    model = plain().train()
    starts = torch.randint(0, model.config.vocab_size, (5, 3))
    state = torch.random.get_rng_state()
    first, second, other = (drawn_windows(model, starts, 12, seed=seed, progress=False) for seed in (1, 1, 2))
    assert first.shape == (5, 12) and first.dtype == torch.int64
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state) and model.training


@pytest.mark.parametrize(
    ("starts", "options", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.int64), {"length": 8}, r"starts have 8 tokens and windows length=8; starts\[:, :8\]"),
        (torch.zeros(2, 8), {}, "starts must be token windows, int64"),
        ([[1, 2]], {}, "starts must be token windows, int64"),
        (torch.full((1, 2), 10**6), {}, "the model has embeddings for"),
        (torch.zeros(2, 2, dtype=torch.int64), {"length": 10**6}, "position"),
        (torch.zeros(2, 2, dtype=torch.int64), {"temperature": 0}, "temperature=1.0 draws what the model gives"),
        (torch.zeros(2, 2, dtype=torch.int64), {"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
    ],
)
def test_refused(starts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        drawn_windows(plain(), starts, **{"length": 16, **options})


def test_model_that_writes_nothing() -> None:
    with pytest.raises(TypeError, match="takes a causal language model of transformers, got Linear"):
        drawn_windows(torch.nn.Linear(2, 2), torch.zeros(2, 2, dtype=torch.int64))  # type: ignore[arg-type]
