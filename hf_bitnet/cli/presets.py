"""`hf-bitnet presets`: the published ways to train, as a table or one as a whole."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import Any

from .. import TRAINING_PRESETS
from .common import quietly, table

_WIDTH = 110


@quietly
def run(arguments: argparse.Namespace) -> Any:
    """Prints a table, or all of the one that is named. Returns the same as data. Raises ValueError on an unknown name."""
    if arguments.name is not None:
        found = TRAINING_PRESETS.get(arguments.name).to_dict()
        if not arguments.json:
            print(_whole(found))
        return found
    every = [TRAINING_PRESETS.get(name).to_dict() for name in TRAINING_PRESETS]
    if not arguments.json:
        print(_table(every))
    return every


def _table(every: list[dict[str, Any]]) -> str:
    rows = [("preset", "weights", "learning rate", "teacher", "what for")]
    rows += [
        (
            each["name"],
            each["quantization"]["weight"],
            f"{each['arguments']['learning_rate']:g}",
            each["teacher"] or "none",
            each["purpose"],
        )
        for each in every
    ]
    return f"{table(rows)}\n\nsources, all values and the code to use one: hf-bitnet presets NAME"


def _whole(preset: dict[str, Any]) -> str:
    parts = [f"{preset['name']}: {preset['purpose']}", ""]
    texts = {key: preset[key] for key in ("source", "url", "tokens", "measured", "notes")}
    for name, text in texts.items():
        parts.append(textwrap.fill(text, _WIDTH, initial_indent=f"{name + ':':<10}", subsequent_indent=" " * 10, **_UNBROKEN))
    for name in ("arguments", "quantization"):
        parts += ["", f"{name}:", *(f"  {key} = {json.dumps(value)}" for key, value in preset[name].items())]
    return "\n".join([*parts, "", "code:", textwrap.indent(preset["code"], "  ")])


# a URL stays whole, so that it can be clicked
_UNBROKEN: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
