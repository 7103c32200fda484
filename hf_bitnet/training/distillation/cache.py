"""cache_teacher_logits: what a teacher says about each token of a data set, on disk, for training without it in memory. Own.

Only the k likeliest tokens are kept, and the probability of all others together: renormalising over k tokens instead makes
students too sure wherever the teacher is not. Files are written shard by shard; a shard has its name when it is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...surgery import output_head, probing
from ..options import number, whole
from .alignment import logits_are_plain, logits_of
from .cached import COLUMNS, IDS, LOG_PROBS, NOTE, REST
from .head import HeadRows, forward_replaced, identity
from .teacher import fingerprint

SHARD_ROWS = 256
_TOKEN_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
# float16 reaches further, but a probability below e^-60 is as good as none
_LOWEST = -60.0
# texts that tell two data sets apart; tokens whose logits exist at a time
_FINGERPRINTED, _CHUNK = 256, 1024


@torch.no_grad()
def cache_teacher_logits(
    teacher: nn.Module,
    dataset: Any,
    *,
    path: str | os.PathLike[str],
    k: int = 64,
    temperature: float = 1.0,
    batch_size: int = 8,
    progress: bool = True,
) -> Any:
    """The data set with the teacher's outputs as three more columns, saved in `path`.

    In a distributed run one process calls it first (`with args.main_process_first():`), the others then only load.

    A token takes 4k + 2 bytes for vocabularies up to 65,536 tokens, else 6k + 2 (k = 64: 258 and 386 bytes). A call that was
    interrupted continues with the same arguments; one that was completed only loads.

    Args:
        teacher: a causal language model, or another with one row of logits for each token. It computes where it is.
        dataset: a `datasets.Dataset` of tokenized texts, with `input_ids` (and `attention_mask`, where texts are padded), cut
            to their final length.
        path: a folder; `datasets.load_from_disk(path)` reads it.
        k: tokens kept at each position.
        temperature: of the softmax, the same as `DistillationConfig.temperature` later.
        batch_size: texts in a forward.
        progress: shows a bar.

    Returns:
        The `datasets.Dataset`: columns of `dataset`, and teacher_ids (uint16 or int32, S * k), teacher_log_probs (float16,
        S * k), teacher_rest (float16, S) for a text of S tokens. Train on it with QATTrainer(..., teacher="cached").

    Raises:
        TypeError, ValueError: arguments that do not fit; `path` holds something else.
    """
    import datasets

    _check(dataset, k, batch_size)
    number("temperature", temperature, 1e-6)
    folder = Path(path)
    note = {
        "k": k,
        "temperature": float(temperature),
        "classes": _classes(teacher, dataset, k),
        "teacher": fingerprint(teacher),
        "data": _data_fingerprint(dataset),
    }
    if folder.exists():
        return _complete(folder, note)
    shards = _begun(folder, note)
    starts = range(0, len(dataset), SHARD_ROWS)
    for start in tqdm(starts, desc="cache_teacher_logits", unit="shard", disable=not progress):
        shard = shards / f"{start:012d}"
        if not shard.exists():
            rows = dataset.select(range(start, min(start + SHARD_ROWS, len(dataset))))
            columns = _columns(teacher, rows, note, batch_size)
            _save(datasets.Dataset.from_dict(columns, features=_features(note["classes"])), shard)
    parts: list[Any] = [datasets.load_from_disk(str(shards / f"{start:012d}")) for start in starts]
    whole_set = datasets.concatenate_datasets([dataset.with_format(None), datasets.concatenate_datasets(parts)], axis=1)
    whole_set.info.description = f"{whole_set.info.description or ''}\n{NOTE}{json.dumps(note)}".lstrip()
    # arrays for these columns, whatever the others are read as: python lists of so many numbers are slow
    _save(whole_set.with_format("numpy", columns=list(COLUMNS), output_all_columns=True), folder)
    shutil.rmtree(shards)
    return datasets.load_from_disk(str(folder))


def _check(dataset: Any, k: int, batch_size: int) -> None:
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"cache_teacher_logits takes a datasets.Dataset, got {type(dataset).__name__}; of a DatasetDict pass one split, "
            "dataset['train']; for a list of dicts write datasets.Dataset.from_list(examples)"
        )
    columns = dataset.column_names
    if "input_ids" not in columns:
        raise ValueError(
            f"the data set has the columns {', '.join(columns)} and no input_ids; tokenize it first: "
            "dataset.map(lambda row: tokenizer(row['text'], truncation=True), remove_columns=dataset.column_names)"
        )
    if set(COLUMNS) & set(columns):
        raise ValueError(
            f"the data set has teacher columns already; take them off first: dataset.remove_columns({list(COLUMNS)})"
        )
    if not len(dataset):
        raise ValueError("the data set is empty")
    whole("k", k)
    whole("batch_size", batch_size)


def _classes(teacher: nn.Module, dataset: Any, k: int) -> int:
    """Size of the vocabulary. Raises ValueError where logits are not one row a token."""
    batch = _padded(dataset.select([0]), ["input_ids"], next(teacher.parameters()).device)
    shape = tuple(_forward(teacher, batch).shape)
    tokens = tuple(batch["input_ids"].shape)
    if shape[:-1] != tokens:
        raise ValueError(
            f"{type(teacher).__name__} makes logits of shape {shape} of {tokens} tokens; cache_teacher_logits needs one row of "
            "logits a token (a causal language model); pass this teacher itself to QATTrainer: teacher=model"
        )
    if k > shape[-1]:
        raise ValueError(f"k={k}, but the teacher tells only {shape[-1]} tokens apart; legal: 1 to {shape[-1]}")
    return shape[-1]


def _data_fingerprint(dataset: Any) -> str:
    """Of some texts; that of `datasets` itself differs from run to run where a map() could not be hashed."""
    some = range(0, len(dataset), max(1, len(dataset) // _FINGERPRINTED))
    digest = hashlib.sha256(str(len(dataset)).encode())
    for ids in dataset.with_format(None).select(some)["input_ids"]:
        digest.update(np.asarray(ids, np.int64).tobytes() + b"|")
    return digest.hexdigest()[:32]


def _forward(teacher: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with probing(teacher):
        return logits_of(teacher(**batch))


def _complete(folder: Path, note: dict[str, Any]) -> Any:
    """What an earlier call has made. Raises ValueError when it was asked for something else."""
    import datasets

    from .cached import cache_note

    try:
        found = datasets.load_from_disk(str(folder))
    except FileNotFoundError:
        raise ValueError(f"{str(folder)!r} exists and is no data set; choose another path") from None
    made = cache_note(found)
    if made != note:
        raise ValueError(f"{str(folder)!r} holds {_difference(made, note)}; choose another path, or delete it")
    return found


def _begun(folder: Path, note: dict[str, Any]) -> Path:
    """The folder of shards beside `folder`. Raises ValueError when it belongs to another call."""
    shards = folder.with_name(f".{folder.name}.incomplete")
    shards.mkdir(parents=True, exist_ok=True)
    file = shards / "note.json"
    if file.exists():
        made = json.loads(file.read_text())
        if made != note:
            raise ValueError(
                f"{str(shards)!r} holds the beginning of {_difference(made, note)}; choose another path, or delete that folder"
            )
    else:
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(note))
        os.replace(temporary, file)
    return shards


def _difference(made: dict[str, Any] | None, wanted: dict[str, Any]) -> str:
    if made is None:
        return "a data set without teacher columns"
    what = {"teacher": "teacher", "data": "data set"}
    parts = [
        f"another {what[key]}" if key in what else f"{key}={made.get(key)} (now {key}={wanted[key]})"
        for key in wanted
        if made.get(key) != wanted[key]
    ]
    return f"logits made with {', '.join(parts)}"


def _save(dataset: Any, folder: Path) -> None:
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shown = not are_progress_bars_disabled()
    disable_progress_bars()  # there is one for the whole work
    try:
        dataset.save_to_disk(str(temporary))
    finally:
        if shown:
            enable_progress_bars()
    os.replace(temporary, folder)


def _features(classes: int) -> Any:
    from datasets import Features, List, Value

    id_type = "uint16" if classes <= 2**16 else "int32"
    return Features({IDS: List(Value(id_type)), LOG_PROBS: List(Value("float16")), REST: List(Value("float16"))})


def _columns(teacher: nn.Module, rows: Any, note: Mapping[str, Any], batch_size: int) -> dict[str, list[np.ndarray]]:
    names = [name for name in _TOKEN_COLUMNS if name in rows.column_names]
    device = next(teacher.parameters()).device
    plain = logits_are_plain(teacher, _padded(rows.select([0]), names, device))
    head = output_head(teacher) if plain else None
    columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    for start in range(0, len(rows), batch_size):
        some = rows.select(range(start, min(start + batch_size, len(rows))))
        batch = _padded(some, names, device)
        with contextlib.nullcontext() if head is None else forward_replaced(head, identity):
            values = _forward(teacher, batch)
        for row, length in enumerate(map(len, some["input_ids"])):
            logits = HeadRows(values[row, :length], head, device)
            for name, array in zip(COLUMNS, _top(logits, length, note), strict=True):
                columns[name].append(array)
    return columns


def _top(logits: HeadRows, length: int, note: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """ids (S * k), their log probabilities (S * k), the log probability of the rest (S,) of S tokens."""
    parts = [_top_rows(logits(slice(start, min(start + _CHUNK, length))), note) for start in range(0, length, _CHUNK)]
    ids, top, rest = (torch.cat(each).reshape(-1) for each in zip(*parts, strict=True))
    yield ids.cpu().numpy().astype(np.uint16 if note["classes"] <= 2**16 else np.int32)
    for values in (top, rest):
        yield values.clamp_min(_LOWEST).half().cpu().numpy()


def _top_rows(logits: Tensor, note: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(n, V) -> ids (n, k), their log probabilities (n, k), that of the rest (n,)."""
    log_probs = torch.log_softmax(logits.float() / note["temperature"], dim=-1)
    top, ids = log_probs.topk(note["k"], dim=-1)
    return ids, top, log_probs.scatter_(1, ids, -torch.inf).logsumexp(dim=-1)


def _padded(rows: Any, names: list[str], device: torch.device) -> dict[str, Tensor]:
    """The token columns of some texts, padded with 0 on the right, and which tokens are none."""
    columns = {name: [torch.as_tensor(np.asarray(value)) for value in rows.with_format(None)[name]] for name in names}
    columns.setdefault("attention_mask", [torch.ones_like(ids) for ids in columns["input_ids"]])
    return {name: nn.utils.rnn.pad_sequence(values, batch_first=True).to(device) for name, values in columns.items()}
