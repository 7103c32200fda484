"""`hf-bitnet bench`: how fast models read a prompt and write, one sequence at a time, on this machine.

Models that are compared take turns in each round, so that both meet the same load. Figures are medians over rounds, after
one that is not counted. Leaves out: batches, several processes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from tqdm import tqdm

from .. import kernels
from .common import device_of, quietly, say, table
from .generation import Clock, open_causal, positions_of
from .options import UsageError


@quietly
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.new_tokens < 2:
        raise UsageError("--new-tokens must be at least 2: the first one comes with the prompt")
    device = device_of(arguments.device)
    with _threads(arguments.threads):
        models, rows = {}, {}
        for path in dict.fromkeys([arguments.model, *arguments.against]):
            start = time.perf_counter()
            models[path] = open_causal(arguments, path, device)
            _check_positions(arguments, path, models[path])
            seconds = round(time.perf_counter() - start, 3)
            rows[path] = {"model": path, "load_seconds": seconds, "weight_bytes": _weight_bytes(models[path])}
        for path, clocks in _rounds(arguments, models).items():
            rows[path] |= _medians(arguments, clocks)
        result = {
            "prompt_tokens": arguments.prompt_tokens,
            "new_tokens": arguments.new_tokens,
            "repeats": arguments.repeats,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "kernels": kernels.explain(device.type).splitlines()[-1],
            "peak_memory_bytes": _peak_memory(device),
            "models": list(rows.values()),
        }
    say(arguments, _shown(result))
    return result


def _check_positions(arguments: argparse.Namespace, path: str, model: Any) -> None:
    most, asked = positions_of(model), arguments.prompt_tokens + arguments.new_tokens
    if most is not None and asked > most:
        raise UsageError(
            f"{path!r} has positions for {most} tokens, --prompt-tokens and --new-tokens ask for {asked}; for example "
            f"--prompt-tokens {most - most // 4} --new-tokens {most // 4}"
        )


def _rounds(arguments: argparse.Namespace, models: dict[str, Any]) -> dict[str, list[Clock]]:
    found: dict[str, list[Clock]] = {path: [] for path in models}
    hidden = not sys.stderr.isatty()
    with tqdm(total=(arguments.repeats + 1) * len(models), desc="bench", leave=False, disable=hidden) as bar:
        for number in range(arguments.repeats + 1):
            for path, model in models.items():
                clock = _timed(arguments, model)
                if number:
                    found[path].append(clock)
                bar.update()
    return found


def _timed(arguments: argparse.Namespace, model: Any) -> Clock:
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (1, arguments.prompt_tokens), generator=generator, device="cpu").to(model.device)
    clock, count = Clock(), arguments.new_tokens
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        num_beams=1,  # whatever the model's own settings say
        num_return_sequences=1,
        pad_token_id=0,
        streamer=clock,
    )
    return clock


def _medians(arguments: argparse.Namespace, clocks: list[Clock]) -> dict[str, Any]:
    rounds = {
        "prompt_tokens_per_second": [arguments.prompt_tokens / max(clock.first, 1e-9) for clock in clocks],
        "new_tokens_per_second": [clock.rate for clock in clocks],
    }
    medians = {name: round(statistics.median(values), 2) for name, values in rounds.items()}
    return {**medians, "rounds": {name: [round(value, 2) for value in values] for name, values in rounds.items()}}


def _weight_bytes(model: Any) -> int:
    return sum(tensor.nbytes for tensor in {id(each): each for each in [*model.parameters(), *model.buffers()]}.values())


def _peak_memory(device: torch.device) -> int | None:
    """Of the GPU, or of this process: resident, at its highest. None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        resource: Any = importlib.import_module("resource")
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _shown(result: dict[str, Any]) -> str:
    first = result["models"][0]
    rows = [("model", "prompt tokens/s", "new tokens/s", "weights", "loaded in", "")]
    for each in result["models"]:
        ratio = first["new_tokens_per_second"] / max(each["new_tokens_per_second"], 1e-9)
        rows.append(
            (
                each["model"],
                f"{each['prompt_tokens_per_second']:,.1f}",
                f"{each['new_tokens_per_second']:,.1f}",
                f"{each['weight_bytes'] / 1e6:,.1f} MB",
                f"{each['load_seconds']:.1f} s",
                "" if each is first else f"the first writes {ratio:.2f} times as fast",
            )
        )
    peak = result["peak_memory_bytes"]
    return "\n".join(
        [
            table(rows),
            "",
            f"a prompt of {result['prompt_tokens']} tokens, {result['new_tokens']} new ones, medians of {result['repeats']}; "
            f"{result['device']}, {result['threads']} threads",
            result["kernels"],
            *([] if peak is None else [f"memory at its peak, of everything here: {peak / 1e6:,.0f} MB"]),
        ]
    )
