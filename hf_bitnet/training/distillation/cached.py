"""The teacher's logits from a data set in place of a teacher in memory: columns -> batch -> rows of the loss. Own.

For a text of S tokens `cache_teacher_logits` adds three columns: the k likeliest next tokens at each position (ids and log
probabilities, S * k numbers each, position after position), and the log probability of all other tokens together (S numbers).
The collator here takes them out of the examples, lets the user's collator make its batch, and puts them beside the tokens where
these came to lie.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .alignment import rows_of
from .config import DistillationConfig
from .logits import TeacherRows, TopRows

IDS, LOG_PROBS, REST = COLUMNS = ("teacher_ids", "teacher_log_probs", "teacher_rest")
# the line of a data set's description that says how its columns were made
NOTE = "hf_bitnet.cache_teacher_logits: "
# of a position without a teacher; the likeliest of V tokens is at least log 1/V
_NOTHING = -60.0


class CachedBatch(NamedTuple):
    """ids: int64 (B, S, k). log_probs: float (B, S, k + 1), the last for all other tokens."""

    ids: Tensor
    log_probs: Tensor

    @property
    def known(self) -> Tensor:
        """bool (B, S): False where the teacher saw nothing, as in padding."""
        return self.log_probs[..., 0] > _NOTHING


def without_cached(inputs: dict[str, Any]) -> tuple[dict[str, Any], CachedBatch | None]:
    """The batch without what `CachedCollator` put into it, and that."""
    if IDS not in inputs:
        return inputs, None
    kept = {key: value for key, value in inputs.items() if key not in COLUMNS}
    return kept, CachedBatch(inputs[IDS].long(), torch.cat((inputs[LOG_PROBS], inputs[REST].unsqueeze(-1)), dim=-1))


def cached_rows(cached: CachedBatch | None, rows: Tensor, labels: Tensor | None) -> TeacherRows:
    """What is known of the teacher's distribution for a slice of the tokens that count."""
    if cached is None:
        raise ValueError(
            f"teacher='cached', but the batch has no {', '.join(COLUMNS)}; train on the data set that cache_teacher_logits "
            "made: QATTrainer(..., train_dataset=datasets.load_from_disk(path), teacher='cached')"
        )
    ids, log_probs = (rows_of(values, rows, labels) for values in cached)
    return lambda some: TopRows(ids[some], log_probs[some])


class CachedCollator:
    """Wraps a data collator.

    Raises ValueError when the collator changes the tokens of an example (the teacher saw others), or drops some.
    """

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self.collator = collator
        self.tokenizer = getattr(collator, "tokenizer", None)  # Trainer saves it

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Any:
        if not all(column in example for example in examples for column in COLUMNS):
            return self.collator(list(examples))
        plain = [{key: value for key, value in example.items() if key not in COLUMNS} for example in examples]
        tokens = [np.asarray(example["input_ids"]).reshape(-1) for example in examples]
        batch = self.collator(plain)
        places = _places(tokens, batch["input_ids"])
        parts = [_arrays(example, len(ids)) for example, ids in zip(examples, tokens, strict=True)]
        for index, column in enumerate(COLUMNS):
            batch[column] = _laid_out([part[index] for part in parts], places, batch["input_ids"].shape)
        return batch


def _arrays(example: Mapping[str, Any], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids and log probabilities (S, k), rest (S,)."""
    ids, log_probs, rest = (np.asarray(example[column]) for column in COLUMNS)
    if len(rest) != length:
        raise ValueError(
            f"an example has {length} tokens, but teacher columns for {len(rest)}: its tokens were changed after "
            "cache_teacher_logits; cut and pack texts first, then call cache_teacher_logits"
        )
    return ids.reshape(length, -1).astype(np.int32), log_probs.reshape(length, -1), rest


def _places(tokens: list[np.ndarray], batch: Tensor) -> list[tuple[int, int]]:
    """(row, first column) where each example lies in `batch` (B, S)."""
    rows = batch.cpu().numpy()
    if len(rows) == len(tokens):
        return [(row, _start(ids, rows[row])) for row, ids in enumerate(tokens)]
    if len(rows) == 1 and rows.shape[1] == sum(map(len, tokens)) and (rows[0] == np.concatenate(tokens)).all():
        ends = np.cumsum([len(ids) for ids in tokens])
        return [(0, int(end) - len(ids)) for ids, end in zip(tokens, ends, strict=True)]  # laid end to end
    raise _moved(f"{len(tokens)} examples became a batch of shape {tuple(batch.shape)}")


def _start(ids: np.ndarray, row: np.ndarray) -> int:
    for start in (0, len(row) - len(ids)):  # padded on the right, on the left
        if start >= 0 and (row[start : start + len(ids)] == ids).all():
            return start
    raise _moved("tokens of a batch are not those of its examples")


def _moved(what: str) -> ValueError:
    return ValueError(
        f"teacher='cached': {what}. The data collator masks, cuts or joins tokens, for which the cached logits do not hold; "
        "use one that only pads (DataCollatorForLanguageModeling(tokenizer, mlm=False), DataCollatorWithPadding), and prepare "
        "texts before cache_teacher_logits"
    )


def _laid_out(parts: list[np.ndarray], places: list[tuple[int, int]], shape: tuple[int, ...]) -> Tensor:
    whole = np.full((*shape, *parts[0].shape[1:]), _NOTHING if parts[0].dtype.kind == "f" else 0, parts[0].dtype)
    for part, (row, start) in zip(parts, places, strict=True):
        whole[row, start : start + len(part)] = part
    # python lists became float64
    return torch.from_numpy(whole.astype(np.float32) if whole.dtype.kind == "f" else whole)


def cache_note(dataset: Any) -> dict[str, Any] | None:
    """How the teacher columns of a data set were made, where it says so."""
    description = getattr(getattr(dataset, "info", None), "description", None) or ""
    lines = [line for line in description.splitlines() if line.startswith(NOTE)]
    return json.loads(lines[-1].removeprefix(NOTE)) if lines else None


def check_cached(dataset: Any, config: DistillationConfig, classes: int | None) -> str:
    """The fingerprint of the cached teacher.

    Args:
        dataset: of the training. classes: size of the student's vocabulary, None if unknown.

    Raises:
        ValueError: it has no teacher columns; they were made at another temperature or for another vocabulary; inner states
            or token noise are asked for.
    """
    columns = getattr(dataset, "column_names", None)
    if columns is not None and not set(COLUMNS) <= set(columns):
        raise ValueError(
            f"teacher='cached', but the training data has the columns {', '.join(columns)}; make it with "
            "hf_bitnet.cache_teacher_logits(teacher, dataset, k=64, path='cache')"
        )
    if config.inner_terms:
        raise ValueError(
            f"teacher='cached' holds outputs only, and the distillation wants {', '.join(config.inner_terms)}; leave these "
            "out, or pass the teacher itself: teacher=model"
        )
    if config.token_noise is not None:
        raise ValueError(
            "teacher='cached' knows what the teacher said of the text as it is, not with token_noise; leave token_noise out, "
            "or pass the teacher itself: teacher=model"
        )
    note = cache_note(dataset)
    if note is None:
        return "cached"
    if note["temperature"] != config.temperature:
        raise ValueError(
            f"the teacher was cached at temperature {note['temperature']:g}, the distillation wants {config.temperature:g}; "
            f"write distillation={{'temperature': {note['temperature']:g}}}, or cache_teacher_logits(..., "
            f"temperature={config.temperature:g})"
        )
    if classes is not None and note["classes"] != classes:
        raise ValueError(
            f"the cached teacher tells {note['classes']} tokens apart, the student {classes}; choose a teacher with the same "
            f"tokenizer, or, where one vocabulary is only padded, resize it: student.resize_token_embeddings({note['classes']})"
        )
    return f"cached {note['teacher']} k={note['k']}"
