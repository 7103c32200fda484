"""The cards in model_cards/ are what its data says, and ones that the Hub takes."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from huggingface_hub import ModelCard

from tests.hub_metadata import metadata_errors
from tests.hub_server import LoopbackHub

CARDS = Path(__file__).resolve().parents[1] / "model_cards"


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_cards", CARDS / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cards_are_what_their_data_says(make: ModuleType) -> None:
    assert make.main(["--check"]) == 0, "run: python model_cards/make.py"
    generated = set(make.cards())
    there = {path.relative_to(CARDS).as_posix() for path in CARDS.rglob("*") if path.suffix in (".md", ".svg")}
    assert there == generated and any(name.endswith(".svg") for name in generated)


def test_a_figure_that_changes_is_noticed(make: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(CARDS, tmp_path / "cards")
    data = folder / "data" / "novels-llama-small-b158" / "results.json"
    results = json.loads(data.read_text())
    results["perplexity"]["packed"] *= 2
    data.write_text(json.dumps(results))
    assert make.main(["--check"], folder) == 1 and "novels-llama-small-b158/README.md" in capsys.readouterr().err
    assert make.main([], folder) == 0 and make.main(["--check"], folder) == 0


def test_cards_are_ones_that_the_hub_takes(hub: LoopbackHub) -> None:
    for path in sorted(CARDS.glob("*/README.md")):
        assert not metadata_errors(path.read_text(encoding="utf-8"))
        card = ModelCard.load(path)
        card.validate()  # huggingface_hub's own, which asks the Hub
        pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", card.text)
        assert all((path.parent / name).is_file() for name in pictures)
        assert {"hf_bitnet", "quantized"} <= set(card.data.tags)
