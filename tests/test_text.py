"""text_windows and perplexity: the same windows and figures as counted by hand, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import hf_bitnet as hb
from tests import corpus
from tests.tiny import VOCABULARY, tiny


@pytest.fixture
def windows() -> torch.Tensor:
    return hb.text_windows(corpus.tokenizer(), [corpus.text(300)], length=16)


# ---- windows ----


def test_file_and_text_give_the_same_windows_without_overlap(tmp_path: Path) -> None:
    path = corpus.write(tmp_path, words=100)
    ids = corpus.tokenizer()(corpus.text(100))["input_ids"]
    expected = torch.tensor(ids[:96]).view(6, 16)
    for source in (path, str(path), [path], [corpus.text(100)], iter([corpus.text(100)])):
        assert torch.equal(hb.text_windows(corpus.tokenizer(), source, length=16), expected)


def test_texts_follow_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [corpus.text(10, seed) for seed in range(7)]
    expected = torch.tensor([i for text in texts for i in corpus.tokenizer()(text)["input_ids"]][:64]).view(4, 16)
    assert torch.equal(hb.text_windows(corpus.tokenizer(), ["", *texts, ""], length=16), expected)
    # handed to the tokenizer a few at a time
    monkeypatch.setattr("hf_bitnet.analysis.text._AT_ONCE", 50)
    assert torch.equal(hb.text_windows(corpus.tokenizer(), texts, length=16), expected)


def test_max_windows_reads_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_bitnet.analysis.text._AT_ONCE", 50)
    read = []

    def texts():
        for seed in range(100):
            read.append(seed)
            yield corpus.text(20, seed)

    assert hb.text_windows(corpus.tokenizer(), texts(), length=16, max_windows=3).shape == (3, 16)
    assert len(read) < 10


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("no_such_file.txt", FileNotFoundError, "cannot read the text file 'no_such_file.txt'"),
        ("a text by mistake", FileNotFoundError, r"to pass a text instead of a path put it into a list: \['a text by"),
        ([], ValueError, "has 0 tokens, less than one window of length=16"),
        (
            ["ba be bi"],
            ValueError,
            "has 3 tokens, less than one window of length=16; give more text, or shorter windows: length=3",
        ),
        (3, TypeError, "takes the path of a text file or a list of texts, got int"),
        ([{"text": "ba"}], TypeError, r"text_windows\(tokenizer, dataset\['text'\]\)"),
    ],
)
def test_what_is_no_text(source: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        hb.text_windows(corpus.tokenizer(), source, length=16)  # type: ignore[arg-type]


def test_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"ba be \xff\xfe")
    with pytest.raises(ValueError, match=r"is not UTF-8 text .* at byte 6"):
        hb.text_windows(corpus.tokenizer(), tmp_path / "binary")


@pytest.mark.parametrize("length", [1, 0, True, 2.5])
def test_length_is_checked(length: object) -> None:
    with pytest.raises(ValueError, match="length must be a whole number of at least 2"):
        hb.text_windows(corpus.tokenizer(), ["ba"], length=length)  # type: ignore[arg-type]


# ---- perplexity ----


def by_hand(model: nn.Module, windows: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(input_ids=windows).logits[:, :-1].double()
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).exp())


def test_perplexity_is_exp_of_the_mean_loss(windows: torch.Tensor) -> None:
    model, _ = tiny("llama")
    for batch_size in (1, 5, 16):
        assert hb.perplexity(model, windows, batch_size) == pytest.approx(by_hand(model, windows), rel=1e-5)


def test_perplexity_of_a_uniform_model_is_the_vocabulary(windows: torch.Tensor) -> None:
    model, _ = tiny("llama")
    nn.init.zeros_(model.lm_head.weight)
    assert hb.perplexity(model, windows) == pytest.approx(VOCABULARY, rel=1e-5)


def test_train_form_and_packed_agree_and_nothing_is_left_behind(windows: torch.Tensor) -> None:
    model = hb.quantize_model(tiny("llama")[0], hb.BitNetQuantizationConfig())
    full = hb.perplexity(tiny("llama")[0], windows)
    model.train()
    model.model.layers[1].eval()
    trained = hb.perplexity(model, windows)
    assert model.training and not model.model.layers[1].training and model.model.layers[0].mlp.training
    assert not any(getattr(layer, "keep_codes", False) for layer in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert abs(trained / full - 1) > 1e-3  # it measures the quantized model
    hb.set_strength(model, 0.0)
    assert hb.perplexity(model, windows) == full
    hb.harden(model)
    assert hb.perplexity(hb.pack_model(model), windows) == pytest.approx(trained, rel=1e-6)


def test_modes_are_restored_after_an_error(windows: torch.Tensor) -> None:
    model, _ = tiny("llama")
    model.train()
    model.model.layers[1].mlp.forward = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        hb.perplexity(model, windows)
    assert model.training


def test_runs_under_autocast(windows: torch.Tensor) -> None:
    model, _ = tiny("llama")
    with torch.autocast("cpu", torch.bfloat16):
        half = hb.perplexity(model, windows)
    full = hb.perplexity(model, windows)
    assert half != full
    assert half == pytest.approx(full, rel=0.05)


def test_progress_bar_on_demand(windows: torch.Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = tiny("llama")
    hb.perplexity(model, windows)
    assert capsys.readouterr() == ("", "")
    hb.perplexity(model, windows, progress=True)
    assert "perplexity" in capsys.readouterr().err


def test_perplexity_refuses_what_it_cannot_measure(windows: torch.Tensor) -> None:
    model, _ = tiny("llama")
    with pytest.raises(TypeError, match=r"int64 \(count, length\), got torch.float32 \(18, 16\); make them with text_windows"):
        hb.perplexity(model, windows.float())
    with pytest.raises(TypeError, match="got str"):
        hb.perplexity(model, "text.txt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"windows of shape \(0, 16\) hold no token to predict"):
        hb.perplexity(model, windows[:0])
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, got 0"):
        hb.perplexity(model, windows, 0)
    with pytest.raises(ValueError, match="windows hold token 200, the model has embeddings for 96 tokens"):
        hb.perplexity(model, windows * 0 + 200)
    with pytest.raises(ValueError, match=r"for causal language models .* logits of shape \(18, 3\)"):
        hb.perplexity(tiny("bert")[0], windows, 18)
