"""Metrics of `evaluate`: their figures, kept in memory, without a network."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch

import hf_bitnet as hb
from hf_bitnet.metrics import AccuracyRetention, Perplexity, QuantizationError
from tests import corpus
from tests.tiny import tiny


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `evaluate` would write."""
    folder = tmp_path / "cache"
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(folder))
    return folder


def test_perplexity_of_texts_and_windows(cache: Path) -> None:
    model: Any = hb.quantize_model(tiny("llama")[0], hb.BitNetQuantizationConfig(form="packed"))
    texts = [corpus.text(200, seed=1), corpus.text(100, seed=2)]
    windows = hb.text_windows(corpus.tokenizer(), texts, 16)
    expected = {"perplexity": hb.perplexity(model, windows), "windows": len(windows), "tokens": windows.numel()}
    metric = Perplexity()
    assert metric.compute(predictions=texts, model=model, tokenizer=corpus.tokenizer(), length=16) == expected
    assert metric.compute(predictions=windows, model=model) == expected
    metric.add_batch(predictions=windows[:5])
    metric.add_batch(predictions=windows[5:].tolist())
    assert metric.compute(model=model, batch_size=len(windows)) == pytest.approx(expected)
    found = metric.compute(predictions=texts, model=model, tokenizer=corpus.tokenizer(), length=16, max_windows=3)
    assert found == {"perplexity": pytest.approx(hb.perplexity(model, windows[:3])), "windows": 3, "tokens": 48}
    assert not cache.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictions": ["a b"]}, "of which model"),
        ({"predictions": ["a b"], "model": True}, "texts need the model's tokenizer"),
        ({"predictions": [[3, 4], [5]], "model": True}, "windows of 1 to 2 tokens; all must be as long"),
        ({"predictions": [], "model": True}, "Perplexity: there is nothing to measure"),
        ({"predictions": [["a"]], "model": True}, "don't match the expected format"),
    ],
)
def test_perplexity_refuses(options: dict[str, Any], message: str) -> None:
    if "model" in options:
        options = {**options, "model": tiny("llama")[0]}
    with pytest.raises(ValueError, match=message):
        Perplexity().compute(**options)


@pytest.mark.parametrize("kind", [int, str])
def test_accuracy_retention(kind: type, cache: Path) -> None:
    labels = {
        "references": [0, 1, 2, 3, 0, 1, 2, 3],
        "reference_predictions": [0, 1, 2, 3, 1, 1, 2, 3],
        "predictions": [0, 1, 2, 0, 1, 0, 2, 0],
    }
    given = {name: [kind(label) for label in values] for name, values in labels.items()}
    expected = {"accuracy": 0.5, "full_precision_accuracy": 7 / 8, "retention": 4 / 7, "agreement": 5 / 8}
    assert AccuracyRetention().compute(**given) == expected
    metric = AccuracyRetention()
    for i in range(8):
        part = {name: values[i] for name, values in given.items()}
        metric.add(
            prediction=part["predictions"], reference=part["references"], reference_predictions=part["reference_predictions"]
        )
    assert metric.compute() == expected
    assert not cache.exists()


def test_accuracy_retention_at_the_edges() -> None:
    never = AccuracyRetention().compute(predictions=[1], reference_predictions=[2], references=[1])
    assert never is not None and math.isnan(never["retention"]) and never["accuracy"] == 1
    with pytest.raises(ValueError, match="there is nothing to measure; give at least one example"):
        AccuracyRetention().compute(predictions=[], reference_predictions=[], references=[])
    with pytest.raises(ValueError, match="there is nothing to measure"):
        AccuracyRetention().compute()
    with pytest.raises(ValueError, match=r"inputs are missing: .'reference_predictions'"):
        AccuracyRetention().compute(predictions=[1], references=[1])
    with pytest.raises(ValueError, match="Mismatch in the number of"):
        AccuracyRetention().compute(predictions=[1, 2], reference_predictions=[2], references=[1])


@pytest.mark.parametrize("shape", [(60,), (6, 10)])
@pytest.mark.parametrize("make", [torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.clone])
def test_quantization_error(shape: tuple[int, ...], make: Any, cache: Path) -> None:
    x = torch.randn(shape)
    q = (x * 2).round() / 2
    found = QuantizationError().compute(predictions=make(q), references=make(x))
    assert found is not None
    difference = (x.double() - q.double()).norm()
    assert found["relative_error"] == pytest.approx(float(difference / x.double().norm()), rel=1e-12)
    assert found["sqnr_db"] == pytest.approx(-20 * math.log10(found["relative_error"]), rel=1e-12)
    assert found["cosine"] == pytest.approx(float(torch.cosine_similarity(x.flatten(), q.flatten(), dim=0)), rel=1e-5)
    assert found["max_error"] == float((x.double() - q.double()).abs().max())
    assert not cache.exists()


def test_quantization_error_is_that_of_the_layer_report() -> None:
    model: Any = hb.quantize_model(tiny("llama")[0], hb.BitNetQuantizationConfig.w4a8())
    layer, row = model.model.layers[0].mlp.up_proj, next(row for row in hb.layer_report(model) if "0.mlp.up_proj" in row.name)
    found = QuantizationError().compute(
        predictions=layer.quantized_weight().dequantize().detach(), references=layer.weight.detach()
    )
    assert found is not None and row.sqnr is not None and row.relative_mse is not None
    assert found["sqnr_db"] == pytest.approx(row.sqnr, rel=1e-5)
    assert found["relative_error"] ** 2 == pytest.approx(row.relative_mse, rel=1e-5)
    assert found["cosine"] == pytest.approx(row.cosine, rel=1e-5)


def test_quantization_error_at_the_edges() -> None:
    same = QuantizationError().compute(predictions=[1.0, 2.0], references=[1.0, 2.0])
    assert same == {"sqnr_db": math.inf, "relative_error": 0.0, "cosine": pytest.approx(1), "max_error": 0.0}
    zero = QuantizationError().compute(predictions=np.ones(3), references=np.zeros(3))
    assert zero is not None and all(math.isnan(zero[name]) for name in ("sqnr_db", "relative_error", "cosine"))
    with pytest.raises(ValueError, match="4 predictions for 3 references"):
        QuantizationError().compute(predictions=[[1.0, 2.0], [3.0, 4.0]], references=[[1.0, 2.0], [3.0]])
    with pytest.raises(ValueError, match="there is nothing to measure"):
        QuantizationError().compute(predictions=[], references=[])


def test_they_combine() -> None:
    both = evaluate.combine([AccuracyRetention(), QuantizationError()])
    both.add_batch(predictions=[1, 2], references=[1, 1], reference_predictions=[1, 1])
    both.add_batch(predictions=[1, 1], references=[1, 1], reference_predictions=[1, 1])
    found = both.compute()
    assert found["retention"] == 0.75 and found["relative_error"] == 0.5
    named = evaluate.combine({"a": QuantizationError(), "b": QuantizationError()}, force_prefix=True)
    assert named.compute(predictions=[1.0], references=[2.0])["a_relative_error"] == 0.5


def test_several_processes_meet_in_files(cache: Path) -> None:
    """As evaluate's own metrics do: what is kept in memory cannot be put together."""
    metric = QuantizationError(keep_in_memory=False)
    assert metric.compute(predictions=[1.0], references=[2.0]) is not None
    assert cache.is_dir()
    with pytest.raises(ValueError, match="not possible in distributed"):
        QuantizationError(keep_in_memory=True, num_process=2)
    assert not QuantizationError(num_process=2, experiment_id="x").keep_in_memory


def test_what_they_say_about_themselves() -> None:
    for metric in (Perplexity(), AccuracyRetention(), QuantizationError()):
        assert "Returns:" in metric.inputs_description and metric.description
    assert [each.name for each in (Perplexity(), AccuracyRetention())] == ["perplexity", "accuracy_retention"]


def test_labels_are_compared_as_they_are() -> None:
    def found(predictions: Any, references: Any) -> dict[str, float] | None:
        given = {"predictions": predictions, "references": references, "reference_predictions": references}
        return AccuracyRetention().compute(**given)

    for predictions, references, accuracy in (
        (["01"], ["1"], 0.0),
        (["1", "a"], ["1", "b"], 0.5),
        (torch.tensor([1, 0]), np.array([1, 1]), 0.5),
        ([True, False], [1, 1], 0.5),
    ):
        result = found(predictions, references)
        assert result is not None and result["accuracy"] == accuracy
    for predictions, references in (([0.9], [0]), (["0"], [0]), ([None], [0])):
        with pytest.raises(ValueError, match="labels are all int or all str"):
            found(predictions, references)
