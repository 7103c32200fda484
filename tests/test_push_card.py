"""What the card of a checkpoint says reaches the cards that are made from it, and nothing that a stranger put there harms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import hf_bitnet as hb
from hf_bitnet.hub import model_card
from tests.command_line import save_quantized
from tests.hub_metadata import metadata_errors
from tests.hub_server import LoopbackHub
from tests.tiny import tiny

REPO = "org/model"
OTHER = {"license": "other", "license_name": "gemma", "license_link": "https://example.org/terms"}


def with_card(folder: Path, **metadata: Any) -> Path:
    """A packed model whose card says so."""
    card = ModelCard("---\n{}\n---\n# mine\n")
    for name, value in metadata.items():
        card.data[name] = value
    (save_quantized(folder) / "README.md").write_text(str(card))
    return folder


def exported(folder: Path) -> ModelCard:
    hb.export_model(folder, f"{folder}-export", verify=False, progress=False)
    text = Path(f"{folder}-export", "README.md").read_text()
    assert not metadata_errors(text)
    return ModelCard(text)


def test_a_strangers_card_puts_no_markdown_into_ours(tmp_path: Path) -> None:
    card = exported(
        with_card(tmp_path / "a", base_model="evil`\n\n# Injected [click](http://evil)\n`x", license=["mit", {"a": 1}])
    )
    assert "Injected" not in str(card) and "evil" not in str(card)
    assert card.data.base_model is None and card.data.license is None
    assert (
        exported(with_card(tmp_path / "b", base_model=5, license_name="x")).data.to_dict().keys() == card.data.to_dict().keys()
    )
    model = hb.open_model(tmp_path / "a")
    text = model_card(model, name="x", base_model="/models/evil`\n\n# Injected `x").text
    assert "\n# Injected" not in text and "`evil# Injected x` with ternary" in text


def test_which_other_license_it_is_comes_along(hub: LoopbackHub, tmp_path: Path) -> None:
    card = exported(with_card(tmp_path / "a", **OTHER))
    assert {name: card.data.get(name) for name in OTHER} == OTHER
    hb.push_to_hub(tmp_path / "a", "org/base")
    (tmp_path / "a" / "README.md").write_text("# mine\n")
    hb.push_to_hub(tmp_path / "a", REPO, base_model="org/base")
    pushed = ModelCard(hub.files(REPO)["README.md"].decode())
    assert {name: pushed.data.get(name) for name in OTHER} == OTHER and pushed.data.base_model == "org/base"
    made = model_card(hb.open_model(tmp_path / "a"), name="x", base_model="org/base")
    assert {name: made.data.get(name) for name in OTHER} == OTHER


def test_a_packed_form_that_is_made_keeps_base_model_and_license(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = save_quantized(tmp_path / "train", "train")
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: org/base\n---\n# mine\n")
    hb.push_to_hub(folder, REPO, forms=("packed",))
    pushed = ModelCard(hub.files(REPO)["README.md"].decode())
    assert (pushed.data.base_model, pushed.data.license) == ("org/base", "mit")
    assert "`org/base` with ternary weights" in pushed.text


@pytest.mark.parametrize(
    ("family", "lines"),
    [
        ("llama", ("import AutoTokenizer, LlamaForCausalLM", "tokenizer = AutoTokenizer.from_pretrained(path)")),
        ("vit", ("import AutoImageProcessor, ViTFor", "processor = AutoImageProcessor.from_pretrained(path)")),
        ("whisper", ("import AutoProcessor, WhisperFor", "processor = AutoProcessor.from_pretrained(path)")),
    ],
)
def test_a_card_says_what_makes_the_models_inputs(tmp_path: Path, family: str, lines: tuple[str, str]) -> None:
    model = hb.quantize_model(tiny(family)[0], hb.BitNetQuantizationConfig())
    cards = [str(model_card(model, name="x"))]
    for format in ("hf_bitnet", "dense"):
        hb.export_model(model, tmp_path / format, format=format, verify=False, progress=False)
        cards.append((tmp_path / format / "README.md").read_text())
    for card in cards:
        assert all(line in card for line in lines) and ("AutoTokenizer" in card) == (family == "llama")
