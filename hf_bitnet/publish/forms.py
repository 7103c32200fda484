"""The forms in which a model is pushed: found in a folder, or made for the push. Own.

"train" has the float weights behind the codes, "packed" is what is deployed, and each export format is a form.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from ..config import FORMS, BitNetQuantizationConfig
from ..export import EXPORT_FORMATS
from ..hub import card_data, descent, library_versions, model_card, without_bars, write_card
from ..surgery import config_of, config_place, independent_copy, pack_model
from .contents import form_of
from .exporting import export_model
from .opening import open_model, open_tokenizer

TRAIN, PACKED = FORMS


def gather(source: Any, forms: Sequence[str] | None, work: Path, about: Mapping[str, Any]) -> dict[str, Path]:
    """Form -> folder, in the order of `forms`; None takes the form that `source` has.

    Args:
        source: a model, a folder with a model or with several, or {form: folder}.
        work: an empty folder, for those that have to be made.
        about: tokenizer, base_model and name, for them.

    Raises ValueError or TypeError where there is no such form and it cannot be made.
    """
    _check(forms)
    if isinstance(source, PreTrainedModel):
        return _of_model(source, forms, work, about)
    if isinstance(source, Mapping):
        if not source:
            raise ValueError("push_to_hub got an empty mapping; give {form: folder}, for example {'packed': 'out/packed'}")
        found = {form: Path(folder) for form, folder in source.items()}
        for form, folder in found.items():
            if not folder.is_dir() or form_of(folder) != form:
                raise ValueError(f"{str(folder)!r} holds no model in form {form!r}")
    elif isinstance(source, str | os.PathLike):
        found = found_forms(Path(source), forms)
    else:
        raise TypeError(f"push_to_hub takes a model, a folder or {{form: folder}}, got {type(source).__name__}")
    first = next(iter(found))
    run = not isinstance(source, Mapping) and found[first] != Path(source)  # a folder of models, and none itself
    wanted = list(found) if isinstance(source, Mapping) else [PACKED if run and PACKED in found else first]
    return {form: found[form] if form in found else _made(form, found, work, about) for form in forms or wanted}


def _check(forms: Sequence[str] | None) -> None:
    if forms is None:
        return
    if isinstance(forms, str) or not forms or len(set(forms)) < len(forms):
        raise ValueError(f"forms={forms!r}; give each form once, for example forms=('packed', 'gguf')")
    legal = (*FORMS, *EXPORT_FORMATS.names())
    for form in forms:
        if form not in legal:
            raise ValueError(f"unknown form {form!r}; legal: {', '.join(legal)}")


def found_forms(folder: Path, wanted: Sequence[str] | None = None) -> dict[str, Path]:
    """Form -> folder of the models in a folder: its own first, and those in the folders directly in it, as a run leaves them
    (train and packed) and as several forms lie in one repository.

    Raises ValueError when there is none, or two in one form; beside one of the folder's own only where they are `wanted`.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}")
    own = form_of(folder)
    found: dict[str, Path] = {} if own is None else {own: folder}
    for path in sorted(folder.iterdir()):
        form = form_of(path) if path.is_dir() and not path.name.startswith((".", "checkpoint-")) else None
        if form is None or form == own:
            continue
        if form not in found:
            found[form] = path
        elif own is None or form in (wanted or ()):
            raise ValueError(
                f"{found[form].name!r} and {path.name!r} in {str(folder)!r} are both in form {form!r}; push one of them"
            )
    if not found:
        raise ValueError(
            f"{str(folder)!r} holds no model of hf_bitnet; push a folder that save_pretrained, export_model or MeasuredRun "
            "wrote (for other models: huggingface_hub.upload_folder)"
        )
    return found


def _made(form: str, found: Mapping[str, Path], work: Path, about: Mapping[str, Any]) -> Path:
    """A form that is not there, made of one that is."""
    start = next((found[each] for each in (PACKED, TRAIN) if each in found), None)
    if start is None or form == TRAIN:
        raise ValueError(
            f"form {form!r} is not there, and cannot be made of {', '.join(map(repr, found))}; save the model in it"
        )
    if form != PACKED:
        export_model(start, work / form, format=form, progress=False, **about)
        return work / form
    with without_bars():
        tokenizer = about["tokenizer"] or open_tokenizer(start)
        return _saved(pack_model(open_model(start)), work / form, {**about, "tokenizer": tokenizer}, card_data(start))


def _of_model(model: PreTrainedModel, forms: Sequence[str] | None, work: Path, about: Mapping[str, Any]) -> dict[str, Path]:
    if not isinstance(getattr(*config_place(model), None), BitNetQuantizationConfig):
        raise ValueError("push_to_hub: the model is not quantized; call quantize_model(model, config) first")
    own, made = config_of(model).form, {}
    for form in forms or (own,):
        if form == own:
            made[form] = _saved(model, work / form, about)
        elif form == PACKED:
            made[form] = _saved(pack_model(independent_copy(model)), work / form, about)
        elif form == TRAIN:
            raise ValueError("form 'train' cannot be made of a packed model, whose float weights are gone; push 'packed'")
        else:
            export_model(model, work / form, format=form, progress=False, **about)
            made[form] = work / form
    return made


def _saved(model: PreTrainedModel, folder: Path, about: Mapping[str, Any], known: ModelCardData | None = None) -> Path:
    """`known`: metadata of the card of the checkpoint that the model is from."""
    with without_bars():
        model.save_pretrained(folder)
    if about["tokenizer"] is not None:
        about["tokenizer"].save_pretrained(folder)
    origin = descent(known)
    origin["base_model"] = about["base_model"] or origin["base_model"]
    write_card(folder, model_card(model, name=about["name"], versions=library_versions(), **origin))
    return folder
