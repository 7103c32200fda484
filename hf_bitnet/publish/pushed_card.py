"""The card of a repository: of the form at its root, and what lies in its folders. Own.

The card that an export or a run wrote is taken as it is; where a folder has none, it is written from the checkpoint's config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard

from ..config import FORMS
from ..export import EXPORT_FORMATS
from ..hub import CARD, TAGS, hub_id, license_of, model_card, without_bars
from .contents import report_of
from .opening import open_model

_FORM_SUMMARIES = dict(
    zip(FORMS, ("float weights behind the codes, to train on", "packed low-bit weights, to deploy"), strict=True)
)


def pushed_card(folders: Mapping[str, Path], forms: Sequence[str], repo_id: str, base_model: str | None) -> ModelCard:
    """The card of what is pushed.

    Args:
        folders: place in the repository ("" or "train/") -> folder here; the first is the root. forms: theirs.
        base_model: Hub id, where the root's card names none.
    """
    root = next(iter(folders.values()))
    card = ModelCard.load(root / CARD) if (root / CARD).is_file() else _new_card(root, repo_id, base_model)
    data = card.data
    if data.get("base_model") is None and hub_id(base_model):
        data["base_model"], data["base_model_relation"] = base_model, "quantized"
        if data.get("license") is None:
            for name, value in license_of(str(base_model)).items():
                data[name] = value
    exported = [form for form in forms if form not in FORMS]
    data["tags"] = list(dict.fromkeys([*(data.get("tags") or []), *TAGS, *exported]))
    if len(folders) == 1:
        return card
    sections = [_files(folders, forms, repo_id)]
    for place, folder in list(folders.items())[1:]:
        report = report_of(folder)
        if report is not None:
            sections.append(report.markdown().replace("## Export", f"## Export in `{place}`", 1))
    return ModelCard(str(card).rstrip() + "\n\n" + "\n\n".join(sections) + "\n")


def _new_card(folder: Path, repo_id: str, base_model: str | None) -> ModelCard:
    with without_bars():
        model = open_model(folder, device_map="meta")  # only the headers of the files are read
    return model_card(model, name=repo_id.rpartition("/")[2], base_model=base_model)


def _files(folders: Mapping[str, Path], forms: Sequence[str], repo_id: str) -> str:
    lines = ["## Files", "", "| folder | form | what it is | MB | how to load it |", "|---|---|---|---:|---|"]
    for (place, folder), form in zip(folders.items(), forms, strict=True):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
        if form in FORMS:
            how = f'`from_pretrained("{repo_id}"' + (f', subfolder="{place[:-1]}")`' if place else ")`")
            what = _FORM_SUMMARIES[form]
        else:
            what, how = EXPORT_FORMATS.get(form).summary, EXPORT_FORMATS.get(form).readers
        lines.append(f"| {f'`{place}`' if place else '(root)'} | {form} | {what} | {size:.2f} | {how} |")
    return "\n".join(lines)
