"""What the metadata of a GGUF file says of positions and attention: the same logits, there and back, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

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


# ---- gemma ----

SLIDING, FULL = "sliding_attention", "full_attention"
ROPES = {FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, SLIDING: {"rope_type": "default", "rope_theta": 5e3}}
LARGE = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "num_key_value_heads": 1, "num_hidden_layers": 62}


@pytest.mark.parametrize(
    "overrides",
    [
        {"query_pre_attn_scalar": 17},
        {"sliding_window": 8, "num_hidden_layers": 6, "layer_types": None},
        {"layer_types": [FULL, SLIDING]},
        {"layer_types": [FULL, FULL]},
        {"final_logit_softcapping": 2.0},
        {"rope_parameters": ROPES},
        {**LARGE, "layer_types": [FULL] * 62, "query_pre_attn_scalar": 40},
    ],
    ids=["scale", "usual windows", "other windows", "no windows", "cap", "positions", "27B"],
)
def test_gemma3_comes_back(overrides: dict[str, Any], tmp_path: Path) -> None:
    model, imported = there_and_back(tmp_path, "gemma3", **overrides)
    assert imported.config.layer_types == model.config.layer_types
    assert_equal_logits(imported, model)
    # the weights are for the scale of the architecture, whatever the given config says
    model.config.quantization_config = None
    model.config.save_pretrained(tmp_path / "base")
    del model
    again = import_model(tmp_path / "out" / "model.gguf", base=str(tmp_path / "base"))
    assert again.config.query_pre_attn_scalar == imported.config.query_pre_attn_scalar


def gemma2(folder: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], **overrides: Any) -> tuple[Any, Path]:
    """A model, and a file of it with this metadata beside the sizes."""
    sizes = {"vocab_size": 96, "head_dim": 64, "max_position_embeddings": 64, **foreign.WIDE, **overrides}
    torch.manual_seed(0)
    model = tf.Gemma2ForCausalLM(tf.Gemma2Config(**sizes)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    onto_grid(model, [-1.0, 0.0, 1.0])
    own = foreign.described(model, "gemma2")
    monkeypatch.setattr(foreign, "described", lambda *_: own | {f"gemma2.{key}": each for key, each in more.items()})
    return model, model_to_gguf(folder / "model.gguf", model, "gemma2", TQ2_0)


@pytest.mark.parametrize(
    ("more", "overrides"),
    [
        ({}, {"query_pre_attn_scalar": 64}),
        ({"final_logit_softcapping": 2.0}, {"query_pre_attn_scalar": 64, "final_logit_softcapping": 2.0}),
        ({"attn_logit_softcapping": 0.5}, {"query_pre_attn_scalar": 64, "attn_logit_softcapping": 0.5}),
        ({"attention.sliding_window_pattern": 1}, {"query_pre_attn_scalar": 64, "layer_types": [FULL] * 2}),
    ],
    ids=["usual", "cap", "cap of attention", "windows"],
)
def test_gemma2(more: dict[str, Any], overrides: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = gemma2(tmp_path, monkeypatch, more, num_hidden_layers=2, sliding_window=8, **overrides)
    imported = import_model(path)
    for field in ("query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping", "layer_types"):
        assert getattr(imported.config, field) == getattr(model.config, field)
    assert_equal_logits(imported, model)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"attention.sliding_window_pattern": "often"}, "pattern='often' where a list of 1 or a whole number is legal"),
        ({"attention.sliding_window_pattern": ["a", "b"]}, "pattern=2 where a list of 1"),
        ({"final_logit_softcapping": "much"}, "says final_logit_softcapping='much' where a number above 0 is legal"),
        ({"attn_logit_softcapping": -1.0}, r"says attn_logit_softcapping=-1.0 where a number above 0 is legal"),
    ],
    ids=range(4),
)
def test_gemma2_refused(more: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = gemma2(tmp_path, monkeypatch, more, num_hidden_layers=1)
    with pytest.raises(ValueError, match=words + r".*base=<folder or Hub name>"):
        import_model(path)


@pytest.mark.parametrize("size", ["wide", float("nan"), ["a", "b"]])
def test_sizes_of_heads_that_are_none(size: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = with_metadata(tmp_path / "model.gguf", monkeypatch, {"attention.key_length": size})
    with pytest.raises(ValueError, match=r"does not describe a LlamaConfig|of heads of 2"):
        import_model(path)
