"""model.push_to_hub, transformers' own: both forms come back, with our card where the repository has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import PreTrainedModel

import hf_bitnet as hb
from tests import corpus
from tests.checkpoints import loaded, logits
from tests.hub_metadata import metadata_errors
from tests.hub_server import LoopbackHub
from tests.tiny import tiny

REPO = "org/model"


def quantized(form: str = "train", **fields: Any) -> PreTrainedModel:
    model = hb.quantize_model(tiny("llama")[0], hb.BitNetQuantizationConfig(**fields))
    return model if form == "train" else hb.pack_model(model)


def card_of(hub: LoopbackHub) -> ModelCard:
    text = hub.files(REPO)["README.md"].decode()
    assert not metadata_errors(text)
    return ModelCard(text)


@pytest.mark.parametrize("form", ["train", "packed"])
def test_model_and_card_come_back(hub: LoopbackHub, tmp_path: Path, form: str) -> None:
    model, batch = quantized(form), tiny("llama")[1]
    model.config._name_or_path = "org/base"
    model.push_to_hub(REPO, tags=["mine"])
    assert hub.commits(REPO) == ["Upload LlamaForCausalLM"]
    model.save_pretrained(tmp_path)
    files = hub.files(REPO)
    for path in tmp_path.iterdir():
        assert files[path.name] == path.read_bytes()
    again = loaded(type(model), Path(REPO))
    assert torch.equal(logits(again, batch), logits(model, batch))
    card = card_of(hub)
    assert {"hf_bitnet", "bitnet", "quantized", "ternary"} <= set(card.data.tags)
    assert (card.data.base_model, card.data.base_model_relation) == ("org/base", "quantized")
    assert str(hb.coverage(model)) in card.text and "# model\n" in card.text
    card.validate()


def test_tags_of_the_model_are_kept(hub: LoopbackHub) -> None:
    model = quantized()
    model.add_model_tags(["mine"])
    model.push_to_hub(REPO, private=True)
    assert hub.repositories[REPO].private
    assert card_of(hub).data.tags[-1] == "mine" and card_of(hub).data.base_model is None


def test_a_card_that_is_there_stays(hub: LoopbackHub) -> None:
    tiny("llama")[0].push_to_hub(REPO)  # of a model that is not ours, which passes through
    assert "hf_bitnet" not in str(card_of(hub))
    ModelCard("---\nlicense: mit\ntags: [mine]\n---\n# By hand\n").push_to_hub(REPO)
    quantized().push_to_hub(REPO)
    card = card_of(hub)
    assert card.text.strip() == "# By hand" and card.data.license == "mit"
    assert card.data.tags == ["mine", "hf_bitnet", "bitnet", "quantized"]


def test_tokenizers_pass_through(hub: LoopbackHub) -> None:
    corpus.tokenizer().push_to_hub(REPO)
    assert "README.md" in hub.files(REPO) and "hf_bitnet" not in str(card_of(hub))


def test_save_pretrained_that_pushes(hub: LoopbackHub, tmp_path: Path) -> None:
    quantized("packed").save_pretrained(tmp_path / "model", push_to_hub=True, repo_id=REPO)
    assert "hf_bitnet" in card_of(hub).data.tags
    assert (tmp_path / "model" / "README.md").read_bytes() == hub.files(REPO)["README.md"]
