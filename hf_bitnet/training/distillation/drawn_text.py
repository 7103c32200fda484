"""Text that the teacher writes, to distil on (LLM-QAT, arXiv 2305.17888, without its greedy first tokens).

On its own training text a teacher that is full repeats what it memorized, which a student of fewer bits has no room for and
which says little about other text. On text that it writes itself its answers are those that it would give on any text, and
no training text is needed but for how windows begin. Leaves out: sharded models, several processes (each would write the same).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel

from ...analysis.text import check_windows
from ...surgery import probing
from ..options import number, whole

# tokens of real text that a drawn window begins with; windows of a batch: their keys and values are in memory
_START, _AT_ONCE = 8, 64


def drawn_windows(
    model: PreTrainedModel,
    starts: Tensor,
    length: int = 256,
    *,
    temperature: float = 1.0,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """Windows that `model` writes: token after token drawn from all that it gives a chance, texts running on past their ends.

    Args:
        model: a causal language model, the teacher.
        starts: int64 (count, tokens): how the windows begin, for example `text_windows(tokenizer, "train.txt")[:, :8]`.
        length: tokens in a window, more than `starts` has.
        temperature: below 1 the text is likelier and less varied, above 1 the opposite.
        batch_size: windows written at once; the more, the faster.
        seed: the same seed, batch size and device write the same text. torch's random state is untouched.
        progress: show a progress bar.

    Returns:
        int64 (count, length), on the CPU: for `TokenWindows` or `convert`.

    Raises TypeError or ValueError when the model does not generate text, or the starts are none.
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate() or model.config.is_encoder_decoder:
        raise TypeError(
            f"drawn_windows takes a causal language model of transformers, got {type(model).__name__}; "
            "AutoModelForCausalLM.from_pretrained(...)"
        )
    whole("length", length, 2)
    whole("batch_size", batch_size)
    is_rows = isinstance(starts, Tensor) and starts.dim() == 2
    if is_rows and not 1 <= starts.shape[1] < length:
        raise ValueError(f"starts have {starts.shape[1]} tokens and windows length={length}; starts[:, :8] of longer windows")
    # as long as they will be: the model has to take that many
    check_windows(model, nn.functional.pad(starts, (0, length - starts.shape[1])) if is_rows else starts, "starts")
    number("temperature", temperature, 1e-3, hint="temperature=1.0 draws what the model gives")
    new = length - starts.shape[1]
    wanted = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=new, pad_token_id=0, use_cache=True
    )
    own, drawn = model.generation_config, []
    with probing(model, quantized=None):
        torch.manual_seed(seed)
        try:
            model.generation_config = wanted  # the model's own would fill in its end token and its top_k
            for part in tqdm(starts.split(batch_size), desc="drawn_windows", unit="batch", disable=not progress):
                begun = part.to(model.device)
                drawn.append(model.generate(begun, attention_mask=torch.ones_like(begun)).cpu())  # type: ignore[operator]
        finally:
            model.generation_config = own
    return torch.cat(drawn)


def with_drawn(model: PreTrainedModel, windows: Tensor, share: float, most: int, *, seed: int, progress: bool) -> Tensor:
    """At most `most` of the windows (count, length), taken from everywhere; a share of them goes on as `model` writes it."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed), device="cpu")[:most]
    count = round(share * len(order))
    starts = windows[order[:count], : min(_START, windows.shape[1] - 1)]
    if not count:
        return windows[order]
    drawn = drawn_windows(model, starts, windows.shape[1], batch_size=_AT_ONCE, seed=seed, progress=progress)
    return torch.cat([drawn, windows[order[count:]]])
