"""The options of the commands that run a model: eval."""

from __future__ import annotations

from typing import Any

from ..options import add_model, command, positive


def add_eval(commands: Any) -> None:
    parser = command(
        commands,
        "eval",
        "Perplexity of a causal language model, in full precision, train form or packed, on a text.",
        "  hf-bitnet eval out/packed --text valid.txt\n  hf-bitnet eval org/model --text valid.txt --length 1024 --bf16 --json",
    )
    add_model(parser)
    parser.add_argument("--text", required=True, nargs="+", metavar="FILE", help="UTF-8 text file(s)")
    parser.add_argument("--length", type=positive, default=256, metavar="N", help="tokens in a window (default: 256)")
    parser.add_argument("--max-windows", type=positive, metavar="N", help="measure on so many windows (default: all)")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="(default: 16)")
    parser.add_argument("--device", help="(default: the GPU where there is one)")
    parser.add_argument("--dtype", default="auto", help="of the weights: auto (the model's own), float32, bfloat16, ...")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
