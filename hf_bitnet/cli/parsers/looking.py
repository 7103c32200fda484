"""The options of the commands that only show something: info, presets, completion."""

from __future__ import annotations

from typing import Any

from ..options import GGUF_TOO, add_model, command


def add_info(commands: Any) -> None:
    parser = command(
        commands,
        "info",
        "What of a model is quantized, and how; what an export or a GGUF file holds; or about this installation.",
        "  hf-bitnet info out/packed\n"
        "  hf-bitnet info exports/gguf           # what was written, and whether it was read back equal\n"
        "  hf-bitnet info model.gguf\n"
        "  hf-bitnet info --kernels              # which body serves which operation here, and why",
    )
    add_model(parser, optional=True, what=GGUF_TOO)
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


def add_completion(commands: Any) -> None:
    parser = command(
        commands,
        "completion",
        "Print a script that completes this command in a shell.",
        "  hf-bitnet completion fish > ~/.config/fish/completions/hf-bitnet.fish\n"
        '  eval "$(hf-bitnet completion bash)"                                  # in ~/.bashrc\n'
        '  eval "$(hf-bitnet completion zsh)"                                   # in ~/.zshrc, after compinit',
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="which shell")
