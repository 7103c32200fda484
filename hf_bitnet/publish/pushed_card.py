"""The card of a repository: of the form at its root, and what lies in its folders. Own.

The card that an export or a run wrote is taken as it is; where a folder has none, it is written from the checkpoint's config.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..config import FORMS
from ..export import EXPORT_FORMATS
from ..hub import CARD, TAGS, hub_id, license_of, model_card, without_bars
from .contents import report_of
from .opening import open_model

_FORM_SUMMARIES = dict(
    zip(FORMS, ("float weights behind the codes, to train on", "packed low-bit weights, to deploy"), strict=True)
)

_HEADER = "| folder | form | what it is | MB | how to load it |"
# the sections that a card has because of several forms, each up to the next heading of its level
_OF_SEVERAL = re.compile(rf"(?sm)\n*^(?:## Files\n\n{re.escape(_HEADER)}|## Export in `[^`\n]+`)\n.*?(?=\n## |\Z)")


def pushed_card(
    folders: Mapping[str, Path], forms: Sequence[str], sizes: Mapping[str, int], repo_id: str, base_model: str | None
) -> ModelCard:
    """The card of what is pushed.

    Args:
        folders: place in the repository ("" or "train/") -> folder here; the first is the root. forms: theirs.
        sizes: place -> bytes that are pushed there. base_model: Hub id, where the root's card names none.
    """
    root = next(iter(folders.values()))
    card = _read(root / CARD) if (root / CARD).is_file() else _new_card(root, forms[0], repo_id, base_model)
    data = card.data
    if data.get("base_model") is None and hub_id(base_model):
        data["base_model"], data["base_model_relation"] = base_model, "quantized"
        if data.get("license") is None:
            for name, value in license_of(str(base_model)).items():
                data[name] = value
    exported = [form for form in forms if form not in FORMS]
    data["tags"] = list(dict.fromkeys([*(data.get("tags") or []), *TAGS, *exported]))
    card.text = _OF_SEVERAL.sub("", card.text)  # of an earlier push, where the folder is a repository as it was fetched
    if len(folders) == 1:
        return card
    sections = [_files(sizes, forms, repo_id)]
    for place, folder in list(folders.items())[1:]:
        report = report_of(folder)
        if report is not None:
            sections.append(report.markdown().replace("## Export", f"## Export in `{place}`", 1))
    return ModelCard(str(card).rstrip() + "\n\n" + "\n\n".join(sections) + "\n")


def _read(path: Path) -> ModelCard:
    try:
        return ModelCard.load(path)
    except Exception as error:  # of yaml, of the encoding, of huggingface_hub: each has its own, none names the file
        cause = " ".join(str(error).split())
        raise ValueError(
            f"{path} is no card that the Hub reads ({cause}); correct or remove it, or keep the repository's: card=False"
        ) from error


def _new_card(folder: Path, form: str, repo_id: str, base_model: str | None) -> ModelCard:
    name, report = repo_id.rpartition("/")[2], report_of(folder)
    if report is not None and form not in FORMS:  # of a model that cannot be opened here, or says nothing of this library
        data = ModelCardData(library_name=EXPORT_FORMATS.get(form).library)
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{report.markdown()}\n")
    with without_bars():
        model = open_model(folder, device_map="meta")  # only the headers of the files are read
    return model_card(model, name=name, base_model=base_model)


def _files(sizes: Mapping[str, int], forms: Sequence[str], repo_id: str) -> str:
    lines = ["## Files", "", _HEADER, "|---|---|---|---:|---|"]
    for (place, size), form in zip(sizes.items(), forms, strict=True):
        if form in FORMS:
            how = f'`from_pretrained("{repo_id}"' + (f', subfolder="{place[:-1]}")`' if place else ")`")
            what = _FORM_SUMMARIES[form]
        else:
            what, how = EXPORT_FORMATS.get(form).summary, EXPORT_FORMATS.get(form).readers
        lines.append(f"| {f'`{place}`' if place else '(root)'} | {form} | {what} | {size / 1e6:.2f} | {how} |")
    return "\n".join(lines)
