"""Writes RESULTS.md from results/*.json, which the recipes made. No figure is typed.

cp out/results.json recipes/results/qat_classification-sst2-seed1.json
python recipes/table.py            # writes recipes/RESULTS.md
python recipes/table.py --check    # exit code 1 where it is not what the files say
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).resolve().parent
_KINDS = {
    "accuracy": ("Accuracy, per cent", ("full_precision", "before_training", "trained", "packed"), 100.0),
    "perplexity": ("Perplexity", ("full_precision", "before_training", "trained", "packed"), 1.0),
}
_SETTING = ("recipe", "model", "trained on", "measured on", "weights", "teacher", "dropout", "learning rate", "steps or epochs")
_HEAD = "# Results of the recipes\n\nWritten by `python recipes/table.py` from `recipes/results/*.json`. Means over seeds.\n"


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: one table for each kind of figure, one row for each setting, seeds together."""
    parts = [_HEAD]
    for kind, (title, steps, factor) in _KINDS.items():
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
        for result in results:
            if kind in result:
                groups[_setting(result)].append(result)
        if not groups:
            continue
        names = (*_SETTING, "seeds", *steps)
        parts += [f"## {title}\n", _line(names), _line(["---"] * len(names))]
        for setting, found in sorted(groups.items()):
            seeds = ", ".join(str(seed) for seed in sorted(result["training"]["seed"] for result in found))
            figures = [[result[kind][step] for result in found if step in result[kind]] for step in steps]
            cells = [f"{factor * mean(values):.2f}" if values else "" for values in figures]
            parts.append(_line([*setting, seeds, *cells]))
        parts.append("")
    return "\n".join(parts)


def _setting(result: dict[str, Any]) -> tuple[str, ...]:
    data, training = result["data"], result["training"]
    amount = f"{data['train_rows']:,} rows" if "train_rows" in data else f"{data['train_windows']:,} windows"
    length = str(training["steps"]) if "steps" in training else f"{training['num_train_epochs']:g} epochs"
    quantization = result["quantization"]
    weights = f"{quantization['weight']}, {quantization.get('granularity') or 'default'}"
    model = str(result["base_model"] or "from scratch")
    rate = f"{training['learning_rate']:g}"
    dropout = f"{training['dropout']:g}" if "dropout" in training else "the model's"
    recipe = result.get("recipe", "qat_causal_lm")  # what `convert` writes does not name it
    return (recipe, model, f"{data['train']}, {amount}", data["validation"], weights, _teacher(training), dropout, rate, length)


def _teacher(training: dict[str, Any]) -> str:
    """Who it is, and what beside its outputs is learned from it."""
    terms = training.get("distillation") or {}
    inner = [f"{what} {terms[what]['weight']:g}" for what in ("hidden", "relations") if terms.get(what)]
    return ", ".join([training["teacher"], *inner]) if training["teacher"] != "none" else "none"


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None, folder: Path = HERE) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(argv).check
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((folder / "results").glob("*.json"))]
    text, file = table(results), folder / "RESULTS.md"
    if check:
        same = file.exists() and file.read_text(encoding="utf-8") == text
        if not same:
            print(f"{file.name} is not what results/*.json say; run: python recipes/table.py", file=sys.stderr)
        return 0 if same else 1
    file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
