"""`hf-bitnet eval`: perplexity of a causal language model on a text, and tasks of the lm-evaluation-harness.

With --against the same is measured of a reference model: perplexities are divided, accuracies too (what was kept). The two
are opened one after the other.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from torch import Tensor

from .. import perplexity, text_windows
from ..publish.opening import open_tokenizer, tokenizer_at
from .common import device_of, keep_memory, open_checkpoint, progress, quietly, say, texts
from .harness import Harness, retention, task_table
from .options import Failed, UsageError


@quietly
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    _check(arguments)
    harness = None if arguments.tasks is None else Harness(arguments.tasks, arguments.task_folder)
    tokenizer = tokenizer_at(arguments.model)
    windows = _windows(arguments, tokenizer)
    other = None
    if arguments.against is not None:  # before anything is measured
        other = open_tokenizer(arguments.against)
        _check_same_tokens(arguments, windows, other)
    result, high = _measured(arguments, arguments.model, tokenizer, windows, harness)
    reference = None
    if arguments.against is not None:
        reference, _ = _measured(arguments, arguments.against, other or tokenizer, windows, harness)
        result["against"] = reference
    _compare(arguments, result, reference, high)
    for path, measured in ((arguments.model, result), (arguments.against, reference or {})):
        if not math.isfinite(value := measured.get("perplexity", 0.0)):
            raise Failed(f"the perplexity of {path} is {value}: damaged weights, or training that went astray", 1, result)
    return result


def _check(arguments: argparse.Namespace) -> None:
    if arguments.text is None and arguments.tasks is None:
        raise UsageError("on what? Give --text valid.txt for perplexity, --tasks hellaswag,... for tasks of lm-eval, or both")
    if arguments.tasks is None:
        given = {"--limit": arguments.limit, "--fewshot": arguments.fewshot, "--task-folder": arguments.task_folder}
        for option, value in given.items():
            if value is not None:
                raise UsageError(f"{option} without --tasks; add --tasks NAME")


def _windows(arguments: argparse.Namespace, tokenizer: Any) -> Tensor | None:
    if arguments.text is None:
        return None
    return text_windows(tokenizer, texts(arguments.text), arguments.length, max_windows=arguments.max_windows)


def _check_same_tokens(arguments: argparse.Namespace, windows: Tensor | None, tokenizer: Any) -> None:
    if windows is None or tokenizer is None:
        return
    theirs = _windows(arguments, tokenizer)
    if theirs is None or not torch.equal(theirs, windows):
        raise ValueError(
            f"{arguments.against!r} has another tokenizer than {arguments.model!r}, and perplexities of other tokens do not "
            "compare; give the model that was quantized, or --tasks alone"
        )


def _measured(
    arguments: argparse.Namespace, path: str, tokenizer: Any, windows: Tensor | None, harness: Harness | None
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    device = device_of(arguments.device)
    model = open_checkpoint(arguments, path).to(device)
    keep_memory(arguments)
    result: dict[str, Any] = {"model": path, "device": str(device)}
    high: dict[str, list[str]] = {}
    if windows is not None:
        result |= _perplexity(arguments, path, model, device, windows)
    if harness is not None:
        start = time.perf_counter()
        options = {"batch_size": arguments.batch_size, "limit": arguments.limit, "fewshot": arguments.fewshot}
        result["tasks"], high = harness.run(model, tokenizer, **options, bf16=arguments.bf16)
        result["task_seconds"] = round(time.perf_counter() - start, 3)
    return result, high


def _perplexity(arguments: argparse.Namespace, path: str, model: Any, device: torch.device, windows: Tensor) -> dict[str, Any]:
    start = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
        value = perplexity(model, windows, arguments.batch_size, progress=progress())
    seconds = time.perf_counter() - start
    name = "" if arguments.against is None else f"{path}: "
    tokens, text = windows.numel(), ", ".join(file.name for file in texts(arguments.text))
    say(
        arguments,
        f"{name}perplexity {value:.4f}   ({len(windows)} windows of {arguments.length} tokens of {text}, "
        f"{seconds:.1f} s, {tokens / seconds:,.0f} tokens/s)",
    )
    return {
        "text": text,
        "perplexity": value,
        "windows": len(windows),
        "window_tokens": arguments.length,
        "tokens": tokens,
        "seconds": round(seconds, 3),
    }


def _compare(
    arguments: argparse.Namespace, result: dict[str, Any], reference: dict[str, Any] | None, high: dict[str, list[str]]
) -> None:
    """Says the tasks, and how the model compares; adds both to `result`."""
    if reference is not None and "perplexity" in result:
        result["perplexity_ratio"] = result["perplexity"] / reference["perplexity"]
        say(arguments, f"perplexity x {result['perplexity_ratio']:.4f} of {arguments.against}")
    if "tasks" in result:
        before = None if reference is None else reference["tasks"]
        kept = {} if before is None else retention(result["tasks"], before, high)
        say(arguments, task_table(result["tasks"], before, kept))
        if before is not None:
            result["retention"] = kept
