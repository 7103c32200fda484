"""The model card says what the model is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from torch import nn
from transformers import PreTrainedModel

import hf_bitnet as hb
from hf_bitnet.hub import (
    Measurement,
    hub_id,
    license_of,
    model_card,
    task_of,
    write_card,
)
from tests.tiny import tiny


def quantized(**fields: Any) -> PreTrainedModel:
    return hb.quantize_model(tiny("llama")[0], hb.BitNetQuantizationConfig(**fields))


MEASUREMENTS = [
    Measurement("full precision", 40.0, "valid.txt", kind="reference"),
    Measurement("quantized, not yet trained", 200.0, "valid.txt", kind="step"),
    Measurement("packed, as saved", 50.0, "valid.txt"),
    Measurement("packed, as saved", 30.0, "org/corpus"),
]

# ---- the card ----


def test_card_says_what_the_model_is() -> None:
    model = hb.pack_model(quantized(keep=[r"layers\.0\."]))
    card = model_card(model, name="small-b158", base_model="org/base", license="mit", measurements=MEASUREMENTS, training={})
    text = card.text
    assert "`org/base` with ternary weights (1.58 bits) and activations 'int8'" in text
    assert "without any training" in text
    assert str(hb.coverage(model)) in text
    assert f"{hb.coverage(model).fraction:.1%} of the weights" in text
    assert "LlamaForCausalLM.from_pretrained(path)" in text
    assert r"| keep | ['layers\\.0\\.'] |" in text
    assert "| packed, as saved | valid.txt | perplexity | 50 | x 1.250 |" in text
    assert "| quantized, not yet trained | valid.txt | perplexity | 200 | x 5.000 |" in text
    assert "| full precision | valid.txt | perplexity | 40 |  |" in text
    assert "| packed, as saved | org/corpus | perplexity | 30 |  |" in text  # another text: nothing to divide by
    assert "## Training" not in text


def test_metadata_is_what_the_hub_reads(tmp_path: Path) -> None:
    card = model_card(
        quantized(), name="small-b158", base_model="org/base", license="mit", measurements=MEASUREMENTS, training={"steps": 3}
    )
    write_card(tmp_path, card)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.base_model, data.library_name) == ("mit", "org/base", "transformers")
    assert (data.base_model_relation, data.pipeline_tag) == ("quantized", "text-generation")
    assert {"hf_bitnet", "bitnet", "ternary", "quantized"} <= set(data.tags)
    # only what was measured on this very model
    assert [(each.dataset_name, each.metric_type, each.metric_value) for each in data.eval_results] == [
        ("valid.txt", "perplexity", 50.0),
        ("org/corpus", "perplexity", 30.0),
    ]


def test_card_of_a_classifier_makes_no_claim_about_text() -> None:
    model = hb.quantize_model(tiny("bert")[0], hb.BitNetQuantizationConfig.w8a8())
    card = model_card(model, name="bert-w8")
    assert card.data.pipeline_tag == "text-classification" and card.data.license is None and card.data.eval_results is None
    assert "## Results" not in card.text
    assert "BertForSequenceClassification.from_pretrained(path)" in card.text
    assert "A model with int8 weights (8 bits)" in card.text


def test_settings_and_versions_become_tables() -> None:
    card = model_card(
        quantized(), name="x", training={"learning_rate": 1e-4, "tokens": 1500000, "text": "a|b"}, versions={"torch": "2.13"}
    )
    assert "| learning_rate | 0.0001 |\n| tokens | 1,500,000 |\n| text | a\\|b |" in card.text
    assert "| torch | 2.13 |" in card.text
    assert "with quantization-aware training" in card.text


def test_what_is_not_known_is_not_claimed() -> None:
    """An export knows nothing of how its model came about."""
    text = model_card(quantized(), name="x").text
    assert "A model with ternary weights (1.58 bits) and activations 'int8', made by hf_bitnet." in text
    assert "without any training" not in text and "quantization-aware training" not in text


def test_parts_that_others_give() -> None:
    card = model_card(
        quantized(),
        name="x",
        use="Open it with llama.cpp.",
        tags=["gguf", "ternary"],
        metadata={"library_name": "gguf", "language": "en", "datasets": ["org/corpus"]},
        curve="curve.svg",
        sections=["## Mine\n\ntext"],
    )
    assert "## Use\n\nOpen it with llama.cpp.\n\n## Quantization" in card.text and "from_pretrained" not in card.text
    assert "## Training\n\n![Losses by training step](curve.svg)\n\n## Mine" in card.text
    assert (card.data.library_name, card.data.language, card.data.datasets) == ("gguf", "en", ["org/corpus"])
    assert card.data.tags == ["hf_bitnet", "bitnet", "quantized", "ternary", "1.58-bit", "gguf"]
    assert "model_name" not in card.data.to_dict()  # there is no result that it would be the name of


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("llama", "text-generation"),
        ("gpt2", "text-generation"),
        ("bert", "text-classification"),
        ("t5", "text2text-generation"),
        ("vit", "image-classification"),
        ("whisper", "automatic-speech-recognition"),
    ],
)
def test_tasks(family: str, task: str) -> None:
    assert task_of(tiny(family)[0]) == task
    assert task_of(nn.Linear(1, 1)) is None


def test_native_checkpoints_are_said_to_be_native() -> None:
    assert "Plain transformers" in model_card(quantized(), name="x").text
    assert "Plain transformers" not in model_card(hb.pack_model(quantized()), name="x").text


def test_card_needs_a_quantized_model() -> None:
    with pytest.raises(ValueError, match="carries no BitNetQuantizationConfig"):
        model_card(tiny("llama")[0], name="x")


def test_no_path_of_this_machine_in_a_card(tmp_path: Path) -> None:
    base = tmp_path / "my-model"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# mine\n")
    card = model_card(quantized(), name="x", base_model=str(base))
    assert str(tmp_path) not in str(card)
    assert "`my-model` with ternary weights" in card.text
    assert card.data.base_model is None
    assert card.data.license == "apache-2.0"


def test_license_that_is_not_known(tmp_path: Path) -> None:
    assert license_of(str(tmp_path)) == {}  # no card
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert license_of(str(tmp_path)) == {}  # a broken one
    assert license_of("org/model") == {}  # no network
    assert license_of("not/an/id") == {}


def test_hub_ids(tmp_path: Path) -> None:
    assert hub_id("org/model-1.5") == "org/model-1.5"
    assert hub_id("gpt2") == "gpt2"
    assert hub_id("../model") is None and hub_id("a/b/c") is None and hub_id(None) is None and hub_id(str(tmp_path)) is None
