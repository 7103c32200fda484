"""The options of the commands that only show something: info, presets."""

from __future__ import annotations

from typing import Any

from ..options import add_model, command


def add_info(commands: Any) -> None:
    parser = command(
        commands,
        "info",
        "What of a model is quantized, and how; or about this installation.",
        "  hf-bitnet info out/packed\n  hf-bitnet info --kernels            # which body serves which operation here, and why",
    )
    add_model(parser, optional=True)
    parser.add_argument("--kernels", action="store_true", help="show the kernels")
    parser.add_argument("--device", default="cpu", help="of the kernels: cpu or cuda (default: cpu)")


def add_presets(commands: Any) -> None:
    parser = command(
        commands,
        "presets",
        "Published ways to train, with their sources: all of them as a table, or one with everything and the code to use it.",
        "  hf-bitnet presets\n  hf-bitnet presets convert_b158\n  hf-bitnet presets --json",
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="show all of this one")
