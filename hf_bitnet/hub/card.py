"""The card of a model, written from the model, its config and what was measured. Own.

Every figure and setting comes from there; nothing is typed by hand, and what is not known is left out. There is no template
file: sections exist only where there is something to say, and each is written by the function that knows its figures.
Leaves out: uploading (`publish/pushing.py`, `push_to_hub`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from ..config import BitNetQuantizationConfig
from ..files import write_text
from ..surgery import config_of, coverage, processor_of
from .about import CARD, class_name, hub_id, license_of, task_of

# what every card of this library is found by
TAGS = ("hf_bitnet", "bitnet", "quantized")
# fields of the config that say nothing about this model to a reader
_BOOKKEEPING = {"version", "quant_method", "quantized_modules", "min_coverage", "sub_norm_eps"} | {
    *("ste_threshold", "ste_temperature", "relaxation")
}


@dataclass(frozen=True)
class Measurement:
    """One measured figure of a card.

    Attributes:
        what: the model that was measured, for example "packed, as saved".
        value: the figure.
        dataset: name of the text, a Hub id or a file's name.
        metric: name of the figure.
        kind: "result" is of the model that the card is for; "step" of what it was on the way; "reference" of the
            full-precision model, by which the others are divided.
        task: in the Hub's words.
    """

    what: str
    value: float
    dataset: str
    metric: str = "perplexity"
    kind: str = "result"
    task: str = "text-generation"


def model_card(
    model: nn.Module,
    *,
    name: str,
    base_model: str | None = None,
    from_scratch: bool = False,
    license: str | None = None,
    measurements: Sequence[Measurement] = (),
    training: Mapping[str, Any] | None = None,
    curve: str | None = None,
    versions: Mapping[str, str] | None = None,
    sections: Sequence[str] = (),
    use: str | None = None,
    tags: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
) -> ModelCard:
    """The card of a quantized model, in train form or packed.

    Args:
        model: carries its BitNetQuantizationConfig, from which the card is written. Its tensors are not read.
        name: of the model.
        base_model: Hub id or path of the model that was quantized. A path of this machine does not get into the card.
        from_scratch: it was trained from random weights; there is no base model.
        license: of the model; None takes the base model's, where it has a card that says so (`license_of`). Where it is
            "other", the metadata has license_name and license_link too.
        measurements: figures; the results among them also go into the metadata.
        training: settings and sizes of the training run; an empty mapping says that there was none, None that it is not known.
        curve: name of a picture beside the card, with the losses of the training.
        versions: of the libraries.
        sections: further ones, in Markdown, each with its heading; they come before the versions.
        use: Markdown that says how the files are loaded; None takes from_pretrained.
        tags: beside those of every card of this library, for example "gguf".
        metadata: further fields of the metadata, in the Hub's words: language, datasets, library_name, ...

    Raises ValueError when the model is not quantized.
    """
    config = config_of(model)
    results = [_eval_result(each) for each in measurements if each.kind == "result"]
    fields: dict[str, Any] = {
        "model_name": name if results else None,  # it names an entry of model-index, and is nothing by itself
        "license": license,
        **(license_of(base_model) if license is None and base_model is not None else {}),
        "library_name": "transformers",
        "pipeline_tag": task_of(model),
        "base_model": hub_id(base_model),
        "base_model_relation": "quantized" if hub_id(base_model) else None,
        "tags": list(dict.fromkeys([*TAGS, config.weight, f"{config.bits:g}-bit", *tags])),
        "eval_results": results or None,
    }
    data = ModelCardData(**{**fields, **(metadata or {})})
    parts = [
        _summary(model, config, name, _origin(base_model, from_scratch, training)),
        "## Use\n\n" + (_use(model, config) if use is None else use),
        _quantization(model, config),
    ]
    parts += [_results(measurements)] if measurements else []
    parts += [_training(training, curve)] if training or curve else []
    parts += sections
    parts += ["## Versions\n\n" + _table("package", "version", versions)] if versions else []
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _eval_result(each: Measurement) -> EvalResult:
    return EvalResult(
        task_type=each.task,
        # a Hub id where it is one; the format asks for some identifier
        dataset_type=each.dataset if "/" in each.dataset else "text",
        dataset_name=each.dataset,
        metric_type=each.metric,
        metric_name=f"{each.metric} ({each.what})",
        metric_value=each.value,
    )


def _summary(model: nn.Module, config: BitNetQuantizationConfig, name: str, origin: tuple[str, str]) -> str:
    covered, (what, how) = coverage(model), origin
    return (
        f"# {name}\n\n{what} with {config.weight} weights ({config.bits:g} bits) and activations {config.activation!r}, made "
        f"{how}by hf_bitnet. {covered.fraction:.1%} of the weights of its linear maps "
        f"are quantized. {covered.bytes_float / 1e6:.1f} MB in full precision are {covered.bytes_packed / 1e6:.1f} MB packed."
    )


def _origin(base_model: str | None, from_scratch: bool, training: Mapping[str, Any] | None) -> tuple[str, str]:
    """What was quantized, and how."""
    if from_scratch:
        return "A model", "with quantization-aware training from random weights "
    base = "A model" if base_model is None else f"`{_plain(hub_id(base_model) or Path(base_model).name)}`"
    if training is None:
        return base, ""
    return base, "with quantization-aware training " if training else "without any training "


def _plain(text: str) -> str:
    """Without what would end the code that it stands in: names may be of others."""
    return "".join(each for each in text if each.isprintable() and each != "`")


def _use(model: nn.Module, config: BitNetQuantizationConfig) -> str:
    kind, (reader, name) = class_name(model), processor_of(model)
    native = "" if config.native is None else "\nPlain transformers, without hf_bitnet, loads these files too.\n"
    return (
        f"```python\nimport hf_bitnet\nfrom transformers import {reader}, {kind}\n\n"
        'path = "..."  # of this repository or folder\n'
        f"{name} = {reader}.from_pretrained(path)\nmodel = {kind}.from_pretrained(path)\n```\n{native}".rstrip()
    )


def _quantization(model: nn.Module, config: BitNetQuantizationConfig) -> str:
    fields = {key: value for key, value in config.fields().items() if key not in _BOOKKEEPING and value not in (None, [], {})}
    return f"## Quantization\n\n{_table('field', 'value', fields)}\n\n```text\n{coverage(model)}\n```"


def _results(measurements: Sequence[Measurement]) -> str:
    lines = ["## Results", "", "| model | text | figure | value | to full precision |", "|---|---|---|---:|---:|"]
    for each in measurements:
        same = (each.metric, each.dataset)
        base = next((m.value for m in measurements if m.kind == "reference" and (m.metric, m.dataset) == same), None)
        ratio = f"x {each.value / base:.3f}" if base and each.kind != "reference" else ""
        lines.append(f"| {each.what} | {_cell(each.dataset)} | {each.metric} | {each.value:.4g} | {ratio} |")
    return "\n".join(lines)


def _training(training: Mapping[str, Any] | None, curve: str | None) -> str:
    parts = ["## Training", *([f"![Losses by training step]({curve})"] if curve else [])]
    return "\n\n".join([*parts, *([_table("setting", "value", training)] if training else [])])


def _table(left: str, right: str, rows: Mapping[str, Any]) -> str:
    return "\n".join([f"| {left} | {right} |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in rows.items())])


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def write_card(folder: str | os.PathLike[str], card: ModelCard) -> Path:
    """Writes the card as README.md of a folder, whole or not at all."""
    return write_text(Path(folder) / CARD, str(card))
