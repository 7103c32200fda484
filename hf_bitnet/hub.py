"""What goes with a model's files: its card, its license, the versions of the libraries. Own.

Every figure and setting of a card comes from the model, from its config, or from what was measured; nothing is typed by
hand, and what is not known is left out. Leaves out: uploading, which `push_to_hub` and `ModelCard.push_to_hub` do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from torch import nn
from transformers.utils import logging as transformers_logging

from .config import BitNetQuantizationConfig
from .files import write_text
from .surgery import config_of, coverage

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_CARD = "README.md"
_SECONDS = 5.0
_PACKAGES = ("hf_bitnet", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors")
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
    versions: Mapping[str, str] | None = None,
    sections: Sequence[str] = (),
) -> ModelCard:
    """The card of a quantized model, in train form or packed.

    Args:
        model: carries its BitNetQuantizationConfig, from which the card is written.
        name: of the model.
        base_model: Hub id or path of the model that was quantized. A path of this machine does not get into the card.
        from_scratch: it was trained from random weights; there is no base model.
        license: of the model; None takes the base model's, where it has a card that says so (`license_of`).
        measurements: figures; the results among them also go into the metadata.
        training: settings and sizes of the training run; None for a model that was not trained.
        versions: of the libraries.
        sections: further ones, in Markdown, each with its heading; they come before the versions.

    Raises ValueError when the model is not quantized.
    """
    config = config_of(model)
    data = ModelCardData(
        model_name=name,
        license=license or (None if base_model is None else license_of(base_model)),
        library_name="transformers",
        pipeline_tag="text-generation" if hasattr(model, "can_generate") and model.can_generate() else None,  # type: ignore[operator]
        base_model=hub_id(base_model),
        base_model_relation="quantized" if hub_id(base_model) else None,
        tags=["hf_bitnet", "bitnet", "quantized", config.weight, f"{config.bits:g}-bit"],
        eval_results=[_eval_result(each) for each in measurements if each.kind == "result"] or None,
    )
    parts = [
        _summary(model, config, name, _origin(base_model, from_scratch, training)),
        _use(model, config),
        _quantization(model, config),
    ]
    parts += [_results(measurements)] if measurements else []
    parts += ["## Training\n\n" + _table("setting", "value", training)] if training else []
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
        f"{how} by hf_bitnet. {covered.fraction:.1%} of the weights of its linear maps "
        f"are quantized. {covered.bytes_float / 1e6:.1f} MB in full precision are {covered.bytes_packed / 1e6:.1f} MB packed."
    )


def _origin(base_model: str | None, from_scratch: bool, training: Mapping[str, Any] | None) -> tuple[str, str]:
    """What was quantized, and how."""
    if from_scratch:
        return "a model", "with quantization-aware training from random weights"
    base = "a full-precision model" if base_model is None else f"`{hub_id(base_model) or Path(base_model).name}`"
    return base, "with quantization-aware training" if training else "without any training"


def _use(model: nn.Module, config: BitNetQuantizationConfig) -> str:
    kind = type(model).__name__
    native = "" if config.native is None else "\nPlain transformers, without hf_bitnet, loads these files too.\n"
    return (
        f"## Use\n\n```python\nimport hf_bitnet\nfrom transformers import AutoTokenizer, {kind}\n\n"
        'path = "..."  # of this repository or folder\n'
        f"tokenizer = AutoTokenizer.from_pretrained(path)\nmodel = {kind}.from_pretrained(path)\n```\n{native}".rstrip()
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


def _table(left: str, right: str, rows: Mapping[str, Any]) -> str:
    return "\n".join([f"| {left} | {right} |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in rows.items())])


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def hub_id(name: str | None) -> str | None:
    """`name` where it is the id of a model on the Hub; None where it is a folder here, or cannot be an id."""
    if name is None or os.path.exists(name) or not _HUB_ID.fullmatch(name):
        return None
    return name


def license_of(name: str) -> str | None:
    """The license that the card of a model (Hub id, or folder with a README.md) names; None where it cannot be read."""
    try:
        if os.path.isdir(name):
            return ModelCard.load(Path(name) / _CARD, ignore_metadata_errors=True).data.get("license")
        known = hub_id(name)
        # asked once: reading the card's file would be tried again for half a minute where there is no network
        card = None if known is None else HfApi().model_info(known, timeout=_SECONDS).card_data
        return None if card is None else card.get("license")
    except Exception:  # no network, no card, a broken card: the license is not known, which must not fail a finished run
        return None


def library_versions() -> dict[str, str]:
    """Of the packages that figures may depend on, as far as they are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a checkout
            continue
    return found


@contextmanager
def without_bars() -> Iterator[None]:
    """Inside, transformers shows no progress of reading and writing weights; afterwards it does as before."""
    shown = transformers_logging.is_progress_bar_enabled()
    hub_shown = not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # also those of huggingface_hub
    if hub_shown:
        enable_progress_bars()  # a download is worth watching
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
            if not hub_shown:
                disable_progress_bars()


def write_card(folder: str | os.PathLike[str], card: ModelCard) -> Path:
    """Writes the card as README.md of a folder, whole or not at all."""
    return write_text(Path(folder) / _CARD, str(card))
