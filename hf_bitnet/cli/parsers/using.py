"""The options of the commands that run a model: eval, analyze, chat, bench."""

from __future__ import annotations

import math
from typing import Any

from ..options import (
    GGUF_TOO,
    add_gguf_activation,
    add_model,
    add_placement,
    add_quantization,
    between,
    command,
    positive,
    seed,
    vocabulary,
)


def add_eval(commands: Any) -> None:
    parser = command(
        commands,
        "eval",
        "Perplexity of a causal language model, in full precision, train form or packed, on a text; tasks of lm-eval.",
        "  hf-bitnet eval out/packed --text valid.txt\n"
        "  hf-bitnet eval out/packed --text valid.txt --against org/model       # the ratio to full precision\n"
        "  hf-bitnet eval out/packed --tasks hellaswag,arc_easy --limit 200     # needs: pip install lm-eval\n"
        "  hf-bitnet eval org/model --text valid.txt --length 1024 --bf16 --json",
    )
    add_model(parser, what=GGUF_TOO)
    parser.add_argument("--text", nargs="+", metavar="FILE", help="UTF-8 text file(s), for perplexity")
    parser.add_argument("--length", type=positive, default=256, metavar="N", help="tokens in a window (default: 256)")
    parser.add_argument("--max-windows", type=positive, metavar="N", help="measure on so many windows (default: all)")
    parser.add_argument("--tasks", metavar="NAME,NAME", help="tasks of the lm-evaluation-harness, where it is installed")
    parser.add_argument("--limit", type=positive, metavar="N", help="so many questions of each task (default: all)")
    parser.add_argument("--fewshot", type=int, metavar="N", help="examples before a question (default: the task's own)")
    parser.add_argument("--task-folder", metavar="FOLDER", help="your own tasks, in the harness's YAML; these may run code")
    parser.add_argument("--against", metavar="MODEL", help="measure this reference too, and show ratios and what was kept")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="(default: 16)")
    add_placement(parser)
    add_gguf_activation(parser)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")


def add_analyze(commands: Any) -> None:
    parser = command(
        commands,
        "analyze",
        "Which layers quantization hurts, worst first, and what to override. MODEL is full precision, or in train form.",
        "  hf-bitnet analyze org/model --preset bitnet_b158                     # the weights alone\n"
        "  hf-bitnet analyze org/model --preset w2a8 --text train.txt --out report.html\n"
        "  hf-bitnet analyze ./train-form --text train.txt --worst 6 --to int4 --max-average-bits 2.5\n"
        "  hf-bitnet analyze org/model --weight int4 --text train.txt --skip-loss --json",
    )
    add_model(parser)
    parser.add_argument("--text", nargs="+", metavar="FILE", help="UTF-8 text: measure outputs and the loss on it, too")
    parser.add_argument("--length", type=positive, metavar="N", help="tokens in a window (default: 256, or the model's most)")
    parser.add_argument("--max-windows", type=positive, default=8, metavar="N", help="read so many (default: 8)")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="(default: 8)")
    parser.add_argument(
        "--skip-loss", action="store_true", help="not the loss with each layer alone quantized: a forward a layer and batch"
    )
    parser.add_argument("--out", metavar="FILE", help="page (.html), chart (.svg) or data (.json) to write")
    parser.add_argument("--force", action="store_true", help="replace --out")
    parser.add_argument("--top", type=positive, default=20, metavar="N", help="print so many layers (default: 20)")
    advice = parser.add_argument_group("overrides to suggest")
    advice.add_argument("--worst", type=positive, default=3, metavar="N", help="for at most so many layers (default: 3)")
    advice.add_argument(
        "--to",
        type=vocabulary,
        default="int8",
        metavar="CHANGE",
        help="what they become: a scheme, keep, or 'weight:int4,group_size:32' (default: int8)",
    )
    advice.add_argument("--max-average-bits", type=float, metavar="X", help="bits a weight that the whole must not exceed")
    add_placement(parser, "float32")
    add_quantization(parser)


def add_chat(commands: Any) -> None:
    parser = command(
        commands,
        "chat",
        "Talk to a causal language model, packed or not: by its chat template, else it continues the text.",
        "  hf-bitnet chat out/packed\n"
        "  hf-bitnet chat out/packed --prompt 'Why is the sky blue?' --max-new-tokens 100\n"
        "  hf-bitnet chat out/packed --temperature 0.7 --top-p 0.9 --seed 1 --system 'You answer in one sentence.'\n"
        "  echo 'Once upon a time' | hf-bitnet chat out/packed --raw",
    )
    add_model(parser, what=GGUF_TOO)
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and end (default: ask, again and again)")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first, where its chat template knows that")
    parser.add_argument("--raw", action="store_true", help="continue the text, without the chat template")
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="of one answer (default: 256)")
    parser.add_argument(
        "--temperature", type=between(0, math.inf), metavar="X", help="0 takes the likeliest token (default: the model's own)"
    )
    parser.add_argument(
        "--top-p", type=between(0, 1), metavar="X", help="sample from so much probability (default: the model's own)"
    )
    parser.add_argument("--seed", type=seed, metavar="N", help="the same answer each time")
    add_placement(parser)
    add_gguf_activation(parser)


def add_bench(commands: Any) -> None:
    parser = command(
        commands,
        "bench",
        "How fast a causal language model reads a prompt and writes on this machine: medians, kernels, memory.",
        "  hf-bitnet bench out/packed\n"
        "  hf-bitnet bench out/packed --against org/model               # the two take turns\n"
        "  hf-bitnet bench out/packed --prompt-tokens 512 --new-tokens 128 --repeats 9 --threads 4 --json",
    )
    add_model(parser, what=GGUF_TOO)
    parser.add_argument("--against", nargs="+", default=[], metavar="MODEL", help="measure these too, in turns")
    parser.add_argument("--prompt-tokens", type=positive, default=128, metavar="N", help="(default: 128)")
    parser.add_argument("--new-tokens", type=positive, default=64, metavar="N", help="(default: 64)")
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="rounds that count (default: 5)")
    parser.add_argument("--threads", type=positive, metavar="N", help="of the CPU (default: as torch has it)")
    add_placement(parser)
    add_gguf_activation(parser)
