"""export_model: writes a quantized model in a format, reads it back with programs of others, writes the card. Own."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..config import NATIVE_METHOD, QUANT_METHOD, BitNetQuantizationConfig
from ..export import EXPORT_FORMATS, Check, ExportFormat, ExportReport, ParityError, Source
from ..files import new_folder, refuse_existing, refuse_overlap, write_json
from ..hub import card_data, descent, library_versions, model_card, without_bars, write_card
from ..surgery import check_codes, check_scales, config_place
from .importing import holds_gguf
from .opening import model_class, open_model, open_tokenizer

REPORT = "export.json"


def export_model(
    model: PreTrainedModel | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str = "hf_bitnet",
    tokenizer: Any = None,
    overwrite: bool = False,
    verify: bool | str = True,
    base_model: str | None = None,
    name: str | None = None,
    progress: bool | None = None,
    **options: Any,
) -> ExportReport:
    """Writes a quantized model for other programs into a folder, and proves that they read the same model.

    Everything is written into a folder without a name, read back and compared; only then does it take the name `out`. After
    an error, a difference or a kill there is nothing there, or what was there before.

    Args:
        model: quantized, in train form or packed, or the folder or Hub name of such a checkpoint. It is not changed.
        out: folder to write.
        format: "hf_bitnet", "bitnet", "dense", "gguf", ...; all of `hf_bitnet.export.EXPORT_FORMATS`.
        tokenizer: saved with the model; None takes the one beside the checkpoint, where `model` is a path.
        overwrite: replace a model that is there already.
        verify: True compares codes and logits, "codes" no logits (which need the model to run), False nothing.
        base_model: Hub id of the full-precision model, for the card; None takes what the card of a checkpoint `model` says.
        name: of the model, for the card and the files' metadata; None takes the folder's.
        progress: a bar; None shows it on a terminal.
        options: of the format, for example dtype="float16".

    Returns what was written, and the comparisons. The folder also holds it, as export.json and in the card.

    Raises:
        TypeError: not a model, or an option that the format does not have.
        ValueError: the model is not quantized; the format cannot hold it; `out` holds something.
        ParityError: what was read back is another model.
    """
    kind = EXPORT_FORMATS.get(format)
    if not any(verify is each for each in (True, False)) and verify != "codes":  # 1 == True
        raise ValueError(f"verify={verify!r}; legal: True (codes and logits), 'codes', False")
    chosen = _with_options(kind, format, options)
    refuse_existing(out, overwrite=overwrite)
    if isinstance(model, str | os.PathLike):
        refuse_overlap(model, out)
    target = Path(os.path.abspath(out))
    known = card_data(model) if isinstance(model, str | os.PathLike) else None
    source = _source(model, tokenizer, name or target.name)
    refusals = chosen.refusals(source)
    if refusals:
        raise ValueError(f"format {format!r} cannot hold this model: " + "; ".join(refusals[:3]))
    start = time.perf_counter()
    with new_folder(out, overwrite=overwrite) as folder, without_bars():
        with tqdm(total=source.weights, unit="w", unit_scale=True, desc=format, disable=_hidden(progress)) as bar:
            written = chosen.write(source, folder, bar.update)
        checks = chosen.compare(source, folder, written, logits=verify is True) if verify else []
        _refuse_differences(format, checks)
        files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
        seconds = round(time.perf_counter() - start, 3)
        used = dataclasses.asdict(chosen)  # type: ignore[call-overload]
        notes = chosen.notes(source)
        report = ExportReport(format, str(out), used, written, checks, notes, files, seconds, library_versions())
        write_json(folder / REPORT, report.to_dict() | {"path": target.name})  # the file may go to others
        write_card(folder, export_card(chosen, source, folder, report, base_model, known))
    return report


def export_card(
    chosen: ExportFormat,
    source: Source,
    folder: Path,
    report: ExportReport,
    base_model: str | None,
    known: ModelCardData | None,
) -> ModelCard:
    """The card of an export. `known`: metadata of the card of the checkpoint that was exported."""
    about = descent(known)
    return model_card(
        source.model,
        name=source.name,
        base_model=base_model or about["base_model"],
        license=about["license"],
        versions=report.versions,
        sections=[report.markdown()],
        use=chosen.use(source, folder),
        tags=[report.format],
        metadata={"library_name": chosen.library, **about["metadata"]},
    )


def _with_options(kind: type[ExportFormat], format: str, options: dict[str, Any]) -> ExportFormat:
    legal = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    unknown = [option for option in options if option not in legal]
    if unknown:
        known = f"its options are {', '.join(legal)}" if legal else "it has no options"
        raise TypeError(f"format {format!r} has no option {unknown[0]!r}; {known}")
    return kind(**options)


def _source(model: Any, tokenizer: Any, name: str) -> Source:
    if isinstance(model, str | os.PathLike):
        with without_bars():
            _refuse_foreign(model)
            tokenizer = open_tokenizer(model) if tokenizer is None else tokenizer
            model = open_model(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"export_model takes a transformers model or the path of one, got {type(model).__name__}; pass what "
            "from_pretrained returned"
        )
    if not isinstance(getattr(*config_place(model), None), BitNetQuantizationConfig):
        raise ValueError("export_model: the model is not quantized; call quantize_model(model, config) first")
    offloaded = next((name for name, tensor in model.state_dict().items() if tensor.is_meta), None)
    if offloaded is not None:
        raise ValueError(f"export_model: {offloaded} is offloaded; load the model without disk offload")
    check_scales(model)
    check_codes(model)
    return Source(model, tokenizer, name)


def _refuse_foreign(path: str | os.PathLike[str]) -> None:
    """Before any weight is read: a checkpoint that is not quantized, or by another library."""
    if os.path.exists(path) and holds_gguf(path):
        return  # which says so itself
    try:
        _, config = model_class(path)
    except (OSError, ValueError):
        if not os.path.exists(path) and holds_gguf(path):
            return
        raise
    places = (config, config.get_text_config(decoder=True))
    settings = next((found for each in places if (found := getattr(each, "quantization_config", None)) is not None), None)
    if settings is None:
        raise ValueError(
            f"the checkpoint {os.fspath(path)!r} is not quantized; quantize it first: hf_bitnet.quantize_model(model, config), "
            "or hf-bitnet quantize MODEL OUT"
        )
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    if method not in (NATIVE_METHOD, QUANT_METHOD):
        raise ValueError(f"the checkpoint {os.fspath(path)!r} is quantized by {method!r}; export the full-precision one")


def _refuse_differences(format: str, checks: list[Check]) -> None:
    different = [check for check in checks if check.passed is False]
    if different:
        found = "; ".join(f"{check.reader}, {check.what}: {check.detail}" for check in different)
        raise ParityError(
            f"format {format!r}: what was read back is not the model that was written ({found}). Nothing was left; please "
            "report this, and meanwhile choose another format",
            checks,
        )


def _hidden(progress: bool | None) -> bool | None:
    return None if progress is None else not progress
