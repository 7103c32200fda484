"""The README's Python snippets run, in their order, on a tiny model."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import hf_bitnet as hb
from tests.chats import chats, tokenizer
from tests.tiny import tiny

README = Path(__file__).resolve().parent.parent / "README.md"


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # TRL (1.16) still uses the old name
def test_snippets_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, batch = tiny("llama")
    model.save_pretrained("model")
    tiny("mixtral")[0].save_pretrained("mixture")
    tokens = batch["input_ids"]
    names: dict[str, Any] = {
        "texts": Dataset.from_list([{"input_ids": row, "labels": row} for row in tokens.repeat(2, 1).tolist()]),
        "train_dataset": [{"input_ids": row, "labels": row} for row in tokens.repeat(4, 1)],
        "chats": chats(),
        "tokenizer": tokenizer(),
        "windows": tokens,
        "batches": [{"input_ids": tokens, "labels": tokens}],
    }
    found = snippets()
    assert len(found) >= 4
    if find_spec("trl") is None:
        found = [snippet for snippet in found if "hf_bitnet.training.trl_trainers" not in snippet]
    for snippet in found:
        # a run of the test suite shows no progress bars and needs no accelerator
        snippet = snippet.replace("path/or/hub-name", "model").replace("path/or/name-of-a-mixture", "mixture")
        snippet = re.sub(
            r"\b(QATArguments|QATSFTConfig|TrainingArguments)\(", r"\1(use_cpu=True, disable_tqdm=True, ", snippet, count=1
        )
        exec(compile(snippet, "README.md", "exec"), names)
    assert torch.isfinite(names["model"](input_ids=tokens).logits).all()
    assert names["config"].bits == 1.58 and hb.coverage(names["mixture"]).fraction > 0.9
