"""What the Hub refuses in the metadata block of a model card, by its documentation of model cards. Own.

The Hub's own validator is not public; this one parses the block and checks each key that cards of this library have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

# as in huggingface_hub, which keeps it the same as the Hub's
_BLOCK = re.compile(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))")
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_RELATIONS = ("adapter", "merge", "quantized", "finetune")
_STRINGS = ("license", "license_name", "license_link", "library_name", "pipeline_tag", "base_model_relation")
_STRING_LISTS = ("tags", "datasets", "metrics", "language", "base_model")


def metadata_errors(card: str) -> list[str]:
    """Everything that is wrong with a card's metadata; empty where the Hub would take it. No block at all is legal."""
    block = _BLOCK.search(card)
    if block is None:
        return []
    try:
        data = yaml.safe_load(block[2])
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"]
    return list(_errors(data))


def _errors(data: dict[str, Any]) -> Iterator[str]:
    for key in _STRINGS:
        if key in data and not (isinstance(data[key], str) and data[key]):
            yield f"{key} must be a string"
    for key in _STRING_LISTS:
        values = [data[key]] if isinstance(data.get(key), str) else data.get(key, [])
        if not isinstance(values, list) or not all(isinstance(each, str) and each for each in values):
            yield f"{key} must be a list of strings"
        elif len(set(values)) < len(values):
            yield f"{key} holds a value twice"
        elif key in ("base_model", "datasets") and not all(_ID.fullmatch(each) for each in values):
            yield f"{key} must name repositories of the Hub"
    if data.get("base_model_relation", "quantized") not in _RELATIONS:
        yield f"base_model_relation must be one of {', '.join(_RELATIONS)}"
    if "model-index" in data:
        yield from _index_errors(data["model-index"])


def _index_errors(index: Any) -> Iterator[str]:
    if not (isinstance(index, list) and index and all(isinstance(each, dict) for each in index)):
        yield "model-index must be a list of models"
        return
    for model in index:
        if not (isinstance(model.get("name"), str) and isinstance(model.get("results"), list)):
            yield "each model of model-index needs a name and results"
            continue
        for result in model["results"]:
            if not (result.get("task") or {}).get("type"):
                yield "each result needs task.type"
            dataset = result.get("dataset") or {}
            if not (isinstance(dataset.get("type"), str) and isinstance(dataset.get("name"), str)):
                yield "each result needs dataset.type and dataset.name"
            for metric in result.get("metrics") or [{}]:
                if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), int | float | str):
                    yield "each metric needs type and value"
