"""Peak memory of the loss and its backward: cross entropy alone, and with the divergence from a teacher; of relations.

Counted as the greatest sum of bytes that torch's allocator has handed out at a time (its own record, so without the noise of a
process's size), on top of what is there before: hidden states, heads and their weights. The teacher's hidden states are among
those.

    python -m benchmarks.distillation_memory
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers.loss.loss_utils import ForCausalLMLoss

from benchmarks.common import table, write_results
from hf_bitnet import DistillationConfig
from hf_bitnet.training import distill_from_hidden, relation_loss


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that was allocated at a time while `call` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    found: list[Any] = recorded.profiler.kineto_results.events()
    events = [event for event in found if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def outputs(tokens: int, classes: int, width: int, chunks: list[int]) -> list[dict[str, Any]]:
    hidden = torch.randn(tokens, width, requires_grad=True)
    teacher_hidden = torch.randn(tokens, width)
    weight = (torch.randn(classes, width) * width**-0.5).requires_grad_()
    teacher_weight = torch.randn(classes, width) * width**-0.5
    labels = torch.randint(classes, (tokens,))

    def teacher(rows: slice) -> Tensor:
        return teacher_hidden[rows] @ teacher_weight.t()

    def stock(alpha: float) -> None:
        logits = hidden @ weight.t()
        loss = ForCausalLMLoss(logits[None], None, classes, shift_labels=labels[None])
        if alpha:
            q, p = teacher(slice(None)).log_softmax(-1), logits.log_softmax(-1)
            loss = loss + torch.nn.functional.kl_div(p, q, log_target=True, reduction="batchmean")
        loss.backward()

    def ours(alpha: float, chunk: int) -> None:
        config = DistillationConfig(alpha=alpha, chunk_tokens=chunk)
        distill_from_hidden(hidden, weight, None, teacher, labels, config)[0].backward()

    arms: dict[str, Callable[[], None]] = {
        "transformers: CE": lambda: stock(0.0),
        "transformers: CE + KL": lambda: stock(0.5),
    }
    for chunk in chunks:
        arms[f"chunks of {chunk}: CE"] = lambda chunk=chunk: ours(0.0, chunk)
        arms[f"chunks of {chunk}: CE + KL"] = lambda chunk=chunk: ours(0.5, chunk)
    return _rows(arms, [hidden, weight])


def relations(batch: int, length: int, heads: int, width: int) -> list[dict[str, Any]]:
    student, teacher = torch.randn(batch, length, width, requires_grad=True), torch.randn(batch, length, width)
    weights = torch.ones(batch, length)

    def whole() -> None:
        def relation(x: Tensor) -> Tensor:
            x = torch.nn.functional.normalize(x.unflatten(-1, (heads, -1)).transpose(1, 2), dim=-1)
            return (x @ x.mT).log_softmax(-1)

        p, q = relation(student), relation(teacher)
        torch.nn.functional.kl_div(p, q, log_target=True, reduction="sum").backward()

    arms: dict[str, Callable[[], None]] = {
        "relations: whole matrices": whole,
        "relations: 1024 rows": lambda: relation_loss(student, teacher, heads, weights).backward(),
    }
    return _rows(arms, [student])


def _rows(arms: dict[str, Callable[[], None]], trained: list[Tensor]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, call in arms.items():
        for tensor in trained:
            tensor.grad = None
        most = peak_bytes(call)
        first = rows[0]["peak MB"] if rows else most / 1e6
        rows.append({"arm": name, "peak MB": most / 1e6, "over the first": most / 1e6 / first})
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--classes", type=int, default=32_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1024, 400, 256])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing written")
    args = parser.parse_args(argv)
    sequence = {"batch": 1, "length": 2048, "heads": 8, "width": 512}
    if args.smoke:
        args.tokens, args.classes, args.width, args.chunks = 64, 300, 16, [16]
        sequence = {"batch": 1, "length": 64, "heads": 2, "width": 16}
    torch.manual_seed(0)
    rows = outputs(args.tokens, args.classes, args.width, args.chunks)
    print(table(rows))
    related = relations(**sequence)
    print(table(related))
    if not args.smoke:
        shape = {"tokens": args.tokens, "classes": args.classes, "width": args.width}
        print(
            write_results(
                "distillation_memory", {"shape": shape, "rows": rows, "relations": sequence, "relation rows": related}
            )
        )


if __name__ == "__main__":
    main()
