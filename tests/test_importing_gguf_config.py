"""What the metadata of a GGUF file says of positions and attention: the same logits, there and back, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_bitnet import export_model, import_model
from tests import foreign
from tests.checkpoints import logits
from tests.foreign import TQ2_0, model_to_gguf, onto_grid, wide
from tests.gguf_models import made

pytest.importorskip("gguf", reason="pip install 'hf_bitnet[gguf]'")

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
PART = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


def there_and_back(folder: Path, family: str, **overrides: Any) -> tuple[Any, Any]:
    model = made(family, {"weight": "ternary", "activation": "none"}, **overrides)
    export_model(model, folder / "out", format="gguf", other="f32", verify=False)
    return model, import_model(folder / "out" / "model.gguf")


def assert_equal_logits(imported: Any, model: Any) -> None:
    """To the rounding of the scales to half precision; long enough that every window and rotation matters."""
    batch = {"input_ids": torch.randint(3, 90, (1, 48), generator=torch.Generator().manual_seed(0))}
    expected = logits(model, batch)
    error = (logits(imported, batch) - expected).square().mean().sqrt() / expected.std()
    assert float(error) < 2e-3


# ---- positions ----


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        *[(family, LINEAR) for family in ("llama", "qwen2", "bitnet")],
        *[(family, YARN) for family in ("llama", "qwen3")],
        ("llama", YARN | {"attention_factor": 1.5}),
        ("phi3", PART),
    ],
)
def test_positions_come_back(family: str, rope: dict[str, Any], tmp_path: Path) -> None:
    more = {"vocab_size": 32064} if family == "phi3" else {}  # where its padding token is
    model, imported = there_and_back(tmp_path, family, rope_parameters=dict(rope), **more)
    assert {key: imported.config.rope_parameters[key] for key in rope} == pytest.approx(rope)
    assert_equal_logits(imported, model)


def with_metadata(path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], architecture: str = "llama") -> Path:
    """A file of a model of one layer, with other metadata beside its own."""
    model, _ = wide(architecture, num_hidden_layers=1)
    onto_grid(model, [-1.0, 0.0, 1.0])
    own = foreign.described(model, architecture)
    monkeypatch.setattr(foreign, "described", lambda *_: own | {f"{architecture}.{key}": each for key, each in more.items()})
    return model_to_gguf(path, model, architecture, TQ2_0)


@pytest.mark.parametrize(
    ("more", "rope"),
    [
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope_type": "default"}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.scaling.factor": 2.0, "rope.scaling.finetuned": 1}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.scaling.factor": 0.0}, {"rope_type": "default"}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.yarn_beta_fast": 16.0},
            {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16.0, "original_max_position_embeddings": 64},
        ),
    ],
    ids=range(5),
)
def test_positions_as_llama_cpp_reads_them(
    more: dict[str, Any], rope: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = import_model(with_metadata(tmp_path / "model.gguf", monkeypatch, more))
    assert imported.config.rope_parameters == {"rope_theta": 10000.0, **rope}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"rope.scaling.type": "longrope"}, r"says rope.scaling.type='longrope' with the factor 1"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 0.5}, "type='yarn' with the factor 0.5"),
        ({"rope.scaling.attn_factor": 2.0}, r"says rope.scaling.attn_factor=2.0, which no config here describes for 'linear'"),
        ({"rope.scaling.yarn_ext_factor": 1.0}, "says llama.rope.scaling.yarn_ext_factor=1.0, which no config"),
        ({"rope.scaling.factor": float("nan")}, "says rope.scaling.factor=nan where a number above 0 is legal"),
        ({"rope.freq_base": "fast"}, "says rope.freq_base='fast' where a number above 0 is legal"),
        ({"rope.dimension_count": 32}, "rotates 0.5 of each head, which a LlamaConfig does not describe"),
        ({"rope.dimension_count": 128}, "says rope.dimension_count=128, of heads of 64"),
    ],
    ids=range(8),
)
def test_positions_refused(more: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=words + r".*base=<folder or Hub name>"):
        import_model(with_metadata(tmp_path / "model.gguf", monkeypatch, more))


def test_positions_that_phi3_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = with_metadata(tmp_path / "model.gguf", monkeypatch, {"rope.scaling.factor": 4.0}, "phi3")
    with pytest.raises(ValueError, match=r"says rope.scaling.type='linear', which a Phi3Config does not describe"):
        import_model(path)
