"""What is known of a model beside its tensors: its id on the Hub, its license, the libraries it was made with. Own."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from torch import nn
from transformers.modelcard import TASK_MAPPING
from transformers.utils import logging as transformers_logging

CARD = "README.md"
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_SECONDS = 5.0
_asks_nobody: ContextVar[bool] = ContextVar("asks_nobody", default=False)
_PACKAGES = ("hf_bitnet", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors")


def class_name(model: nn.Module) -> str:
    """The model's class as its users know it: FSDP puts a subclass of its own in its place."""
    return type(model).__name__.removeprefix("FSDP")


def task_of(model: nn.Module) -> str | None:
    """What the model is for, in the Hub's words; None where its class does not say."""
    name = class_name(model)
    return next((task for task, kinds in TASK_MAPPING.items() if name in _names(kinds)), None)


def _names(kinds: Mapping[str, Any]) -> set[str]:
    return {name for found in kinds.values() for name in ([found] if isinstance(found, str) else found)}


def hub_id(name: str | None) -> str | None:
    """`name` where it is the id of a model on the Hub; None where it is a folder here, or cannot be an id."""
    if name is None or os.path.exists(name) or not _HUB_ID.fullmatch(name):
        return None
    return name


def license_of(name: str) -> dict[str, str]:
    """What the card of a model (Hub id, or folder with a README.md) says of its license; empty where it cannot be read."""
    return license_fields(card_data(name))


def license_fields(data: ModelCardData | None) -> dict[str, str]:
    """license, and the license_name and license_link that say which `other` is. What is no text is left out."""
    found = {} if data is None else {name: data.get(name) for name in ("license", "license_name", "license_link")}
    found = {name: value for name, value in found.items() if isinstance(value, str)}
    return found if "license" in found else {}


def descent(data: ModelCardData | None) -> dict[str, Any]:
    """What the card of a checkpoint says of where it is from, as arguments of `model_card`; others may have written it."""
    base = None if data is None else data.get("base_model")  # a list where several models were merged
    rest = license_fields(data)
    about = {"base_model": hub_id(base) if isinstance(base, str) else None, "license": rest.pop("license", None)}
    return {**about, "metadata": rest}


def card_data(name: str | os.PathLike[str]) -> ModelCardData | None:
    """The metadata of a model's card (Hub id, or folder with a README.md); None where it cannot be read."""
    name = os.fspath(name)
    try:
        if os.path.isdir(name):
            return ModelCard.load(Path(name) / CARD, ignore_metadata_errors=True).data  # type: ignore[return-value]
        known = None if _asks_nobody.get() else hub_id(name)
        # asked once: reading the card's file would be tried again for half a minute where there is no network
        return None if known is None else HfApi().model_info(known, timeout=_SECONDS).card_data
    except Exception:  # no network, no card, a broken card: it is not known, which must not fail a finished run
        return None


@contextmanager
def asking_nobody() -> Iterator[None]:
    """Inside, the Hub is not asked about a model, whose license then is not known."""
    token = _asks_nobody.set(True)
    try:
        yield
    finally:
        _asks_nobody.reset(token)


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
