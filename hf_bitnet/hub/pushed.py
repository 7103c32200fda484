"""transformers' own `model.push_to_hub` of a quantized model: with our card where the repository has none. Own.

`_register.py` calls `put_card` between the writing of a model's files and their upload. transformers would write a card that
says no more than that there is a model.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import PreTrainedModel
from transformers.utils.hub import hf_api

from ..config import BitNetQuantizationConfig
from ..surgery import config_place
from .about import CARD, library_versions
from .card import TAGS, model_card, write_card


def put_card(pushed: Any, folder: str | os.PathLike[str], repo_id: str, token: Any = None) -> None:
    """Writes the card of `pushed` into the folder that is going to be uploaded; a card that the repository has gets our tags.

    Args:
        pushed: a model, or a tokenizer or config, which transformers pushes in the same way and which are left alone.
    """
    if not isinstance(pushed, PreTrainedModel):
        return
    if not isinstance(getattr(*config_place(pushed), None), BitNetQuantizationConfig):
        return
    if hf_api().file_exists(repo_id, CARD, token=token):
        card = ModelCard.load(Path(folder) / CARD)
        card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), *TAGS]))
    else:
        base = str(getattr(pushed.config, "_name_or_path", None) or "")
        about = {"base_model": base if base not in ("", repo_id) else None, "tags": pushed.model_tags or []}
        card = model_card(pushed, name=repo_id.rpartition("/")[2], versions=library_versions(), **about)
    write_card(folder, card)
