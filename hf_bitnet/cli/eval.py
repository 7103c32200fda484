"""`hf-bitnet eval`: perplexity of a causal language model on a text."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from .. import open_model, perplexity, text_windows
from .common import device_of, dtype_of, progress, quietly, say, texts, tokenizer_of


@quietly
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    files = texts(arguments.text)
    tokenizer = tokenizer_of(arguments.model)
    windows = text_windows(tokenizer, files, arguments.length, max_windows=arguments.max_windows)
    device = device_of(arguments.device)
    model = open_model(arguments.model, dtype=dtype_of(arguments.dtype)).to(device)
    start = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
        value = perplexity(model, windows, arguments.batch_size, progress=progress())
    seconds = time.perf_counter() - start
    tokens, text = windows.numel(), ", ".join(file.name for file in files)
    say(
        arguments,
        f"perplexity {value:.4f}   ({len(windows)} windows of {arguments.length} tokens of {text}, "
        f"{seconds:.1f} s, {tokens / seconds:,.0f} tokens/s)",
    )
    return {
        "model": arguments.model,
        "text": text,
        "perplexity": value,
        "windows": len(windows),
        "window_tokens": arguments.length,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "device": str(device),
    }
