"""Windows of tokens from text, and a model's perplexity on them. Own.

Texts are tokenized whole and cut into windows without overlap, so that two models (or one before and after
quantization) are compared on the very same tokens. Perplexity is exp of the mean next-token loss over all windows.
Leaves out: padding, sliding windows, encoder models.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..surgery import each_batch, kept_codes

_AT_ONCE = 1_000_000
Source = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def text_windows(tokenizer: Any, source: Source, length: int = 256, *, max_windows: int | None = None) -> Tensor:
    """Tokenizes text and cuts it into windows without overlap; a last one that is not full is dropped.

    Args:
        tokenizer: of the model, with whatever special tokens it adds to a text.
        source: the path of a UTF-8 text file (`str` or `Path`), or several texts: a list or any iterable of `str` (the
            texts themselves) or `Path` (files). Texts follow one another in the windows.
        length: tokens in a window.
        max_windows: read no further than these.

    Returns:
        int64 (count, length).

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: not such a source; a file that is not UTF-8 text; less text than one window.
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise ValueError(f"length must be a whole number of at least 2 tokens, got {length!r}; for example length=256")
    if max_windows is not None and (isinstance(max_windows, bool) or not isinstance(max_windows, int) or max_windows < 1):
        raise ValueError(f"max_windows must be a whole number of at least 1 or None, got {max_windows!r}")
    wanted = math.inf if max_windows is None else max_windows * length
    found, parts = 0, [torch.empty(0, dtype=torch.int64, device="cpu")]
    for texts in _handfuls(_texts(source)):
        # whole texts are meant, whatever length the model takes: no warning about that
        for ids in tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]:
            parts.append(torch.tensor(ids, dtype=torch.int64, device="cpu"))
            found += len(ids)
        if found >= wanted:
            break
    count = found // length if max_windows is None else min(found // length, max_windows)
    if count == 0:
        shorter = f", or shorter windows: length={found}" if found >= 2 else ""
        raise ValueError(
            f"{_called(source)} has {found} tokens, less than one window of length={length}; give more text{shorter}"
        )
    return torch.cat(parts)[: count * length].view(count, length)


def dataset_texts(
    name: str, config: str | None = None, *, split: str = "train", column: str = "text", streaming: bool = False
) -> Iterator[str]:
    """The texts of a dataset on the Hub (or of a folder that `datasets.load_dataset` reads), for `text_windows`.

    Args:
        name: for example "Salesforce/wikitext". config: its configuration, for example "wikitext-2-raw-v1".
        split, column: where the texts are.
        streaming: reads no more than is asked for, instead of downloading all of it first.

    Raises ValueError when there is no such dataset, configuration, split or column.
    """
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        rows: Any = datasets.load_dataset(name, config, split=split, streaming=streaming)
    except DatasetNotFoundError:
        raise ValueError(f"the Hub has no dataset {name!r} (or it needs a login); for text files use their paths") from None
    for row in rows:
        if column not in row:
            raise ValueError(f"the dataset {name!r} has no column {column!r}; its columns: {', '.join(row)}")
        yield row[column]


def read_windows(
    tokenizer: Any,
    files: Sequence[str | os.PathLike[str]] | None,
    dataset: str | None = None,
    config: str | None = None,
    *,
    split: str = "train",
    column: str = "text",
    length: int = 256,
    max_windows: int | None = None,
) -> tuple[Tensor, str]:
    """What `--train_file` and `--dataset_name` of a command line mean: windows, int64 (count, length), and the text's name.

    Args:
        files: of text; all of them is read, whatever `max_windows` says: a run that ends earlier takes windows from everywhere.
        dataset, config, split, column: as in `dataset_texts`, where there are no files.
        max_windows: of a dataset, reads no further than these.

    Raises ValueError when there are neither files nor a dataset, and as `text_windows` and `dataset_texts` do.
    """
    if files is not None:
        return text_windows(tokenizer, [Path(file) for file in files], length), ", ".join(Path(file).name for file in files)
    if dataset is None:
        raise ValueError("which text? Give text files, or the name of a dataset: read_windows(tokenizer, ['train.txt'])")
    texts = dataset_texts(dataset, config, split=split, column=column, streaming=max_windows is not None)
    return text_windows(tokenizer, texts, length, max_windows=max_windows), dataset


def _handfuls(texts: Iterator[str]) -> Iterator[list[str]]:
    """Texts that are not empty, about `_AT_ONCE` characters at a time: tokenizers are fast on many, memory is not endless."""
    handful, size = [], 0
    for text in texts:
        if text:
            handful.append(text)
            size += len(text)
        if size >= _AT_ONCE:
            yield handful
            handful, size = [], 0
    if handful:
        yield handful


def _texts(source: Source) -> Iterator[str]:
    if isinstance(source, str | os.PathLike):
        yield _read(source)
        return
    if not isinstance(source, Iterable):
        raise TypeError(
            f"text_windows takes the path of a text file or a list of texts, got {type(source).__name__}; for example "
            "text_windows(tokenizer, 'valid.txt') or text_windows(tokenizer, ['a text', 'another'])"
        )
    for each in source:
        if not isinstance(each, str | os.PathLike):
            raise TypeError(
                f"a list of texts holds str (texts) or Path (files), this one a {type(each).__name__}; for a datasets.Dataset "
                "name the column: text_windows(tokenizer, dataset['text'])"
            )
        yield each if isinstance(each, str) else _read(each)


def _read(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it to UTF-8") from None
    except OSError as error:
        # also the name of a file that is too long to be one: somebody passed the text itself
        name = str(path) if len(str(path)) < 200 else f"{str(path)[:80]}..."
        advice = f"; to pass a text instead of a path put it into a list: [{name[:20]!r}]" if " " in name else ""
        raise FileNotFoundError(f"cannot read the text file {name!r}: {error.strerror}{advice}") from None


def _called(source: Source) -> str:
    return f"the text file {os.fspath(source)!r}" if isinstance(source, str | os.PathLike) else "the list of texts"


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor, batch_size: int = 16, progress: bool | None = None) -> float:
    """exp of the mean next-token loss over all windows, of the model as it is: full precision, train form or packed.

    Modes (train, eval) are as before afterwards. Runs under the caller's autocast, on the model's device. Besides the logits
    of one batch, which the model makes, memory is needed for those of one window.

    Args:
        model: a causal language model: its output has `logits` (batch, length, vocabulary).
        windows: int64 (count, length), for example of `text_windows`.
        batch_size: windows in a forward; the result does not depend on it but for rounding.
        progress: show a progress bar; None shows one on long work.

    Raises:
        TypeError, ValueError: not such windows; token ids that the model has no embedding for; no logits.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
    check_windows(model, windows, "windows")
    modes = [(module, module.training) for module in model.modules()]
    # a cache of keys and values would be filled for nothing
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    total: Tensor | None = None
    try:
        for module, _ in modes:  # model.eval() would run overridden train() methods, some of which merge weights
            module.training = False
        with kept_codes(model):
            for batch in each_batch(model, windows.split(batch_size), "perplexity", progress=progress):
                part = _loss_sum(model(input_ids=batch, **options), batch)
                total = part if total is None else total + part
    finally:
        for module, training in modes:
            module.training = training
    assert total is not None
    return float((total / (windows.shape[0] * (windows.shape[1] - 1))).exp())


def _loss_sum(output: Any, batch: Tensor) -> Tensor:
    """float64 scalar: the loss summed over all predicted tokens of a batch (windows, length)."""
    logits = getattr(output, "logits", None)
    if logits is None or logits.dim() != 3 or logits.shape[:2] != batch.shape:
        shape = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
        raise ValueError(
            f"perplexity is for causal language models with logits (batch, length, vocabulary); this model returns {shape} "
            f"for windows of shape {tuple(batch.shape)}"
        )
    # window by window: a float32 copy of all logits could take more memory than the model
    losses = [
        nn.functional.cross_entropy(rows[:-1].float(), ids[1:], reduction="sum")
        for rows, ids in zip(logits, batch, strict=True)
    ]
    return torch.stack(losses).double().sum()


def check_windows(model: nn.Module, windows: Tensor, name: str) -> None:
    """Raises TypeError or ValueError when `windows` (called `name`) are not token windows that the model can read."""
    if not isinstance(windows, Tensor) or windows.dim() != 2 or windows.dtype != torch.int64:
        got = f"{windows.dtype} {tuple(windows.shape)}" if isinstance(windows, Tensor) else type(windows).__name__
        raise TypeError(
            f"{name} must be token windows, int64 (count, length), got {got}; make them with text_windows(tokenizer, path)"
        )
    if windows.shape[0] == 0 or windows.shape[1] < 2:
        raise ValueError(f"{name} of shape {tuple(windows.shape)} hold no token to predict; give at least one of 2 tokens")
    find = getattr(model, "get_input_embeddings", None)
    known = getattr(None if find is None else find(), "num_embeddings", None)
    if known is not None and int(windows.max()) >= known:
        raise ValueError(
            f"{name} hold token {int(windows.max())}, the model has embeddings for {known} tokens (0 to {known - 1}); "
            "tokenize with the model's own tokenizer"
        )
    config: Any = getattr(model, "config", None)
    longest = getattr(
        config.get_text_config() if hasattr(config, "get_text_config") else config, "max_position_embeddings", None
    )
    if longest is not None and windows.shape[1] > longest:
        raise ValueError(
            f"{name} have {windows.shape[1]} tokens, {type(model).__name__} has positions for {longest}; make shorter ones: "
            f"text_windows(tokenizer, text, length={longest})"
        )
