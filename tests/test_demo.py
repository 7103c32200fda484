"""The demo: where its text comes from and how it is split, what its page says, and one quick run end to end."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hf_bitnet.demo import chart, corpus, run_demo
from hf_bitnet.demo.page import Results, render_page, table_rows, text_table
from hf_bitnet.demo.run import perplexity

# ---- the text ----


@pytest.fixture(scope="module")
def documents() -> corpus.Corpus:
    return corpus.collect_corpus(max_modules=30)


def _paragraphs(texts: list[str]) -> list[str]:
    return [" ".join(re.sub(r"^(def|class) .*:\n", "", part).split()) for text in texts for part in text.split("\n\n")]


def test_no_paragraph_of_the_validation_side_is_trained_on(documents: corpus.Corpus) -> None:
    train, validation = _paragraphs(documents.train), _paragraphs(documents.validation)
    assert validation
    assert set(train).isdisjoint(validation)
    assert len(train) == len(set(train))


def test_the_text_is_the_same_every_time(documents: corpus.Corpus) -> None:
    assert corpus.collect_corpus(max_modules=30) == documents


def test_definitions_are_shown_with_their_signature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filler = "Words that make the document long enough to be kept. " * 6
    source = f'"""A module. {filler}"""\nclass A(dict):\n    """Doc of A."""\n    def f(self, x=1):\n        """Doc of f."""\n'
    (tmp_path / "a.py").write_text(source + "    def g(self): ...\n")
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "b.py").write_text(f'"""Never read. {filler}"""')
    monkeypatch.setattr(corpus, "_library_folder", lambda: tmp_path)
    found = [text for name, text in corpus._module_docstrings(None)]
    assert len(found) == 1
    assert found[0].endswith("class A(dict):\n    Doc of A.\n\ndef f(self, x=1):\n    Doc of f.")


def test_an_installation_without_sources_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_library_folder", lambda: tmp_path)
    monkeypatch.setattr(corpus, "_reference_topics", lambda: iter(()))
    with pytest.raises(ValueError, match=r"found 0 training and 0 validation documents in .* installation that has them"):
        corpus.collect_corpus()


def test_windows_hold_the_documents_in_order(documents: corpus.Corpus) -> None:
    tokenizer = corpus.train_tokenizer(documents.train, 400)
    texts = ["def f(x):\n    Étude → 5.", "second document"]
    windows = corpus.token_windows(tokenizer, texts, 4)
    assert windows.dtype == torch.int64 and windows.shape[1] == 4
    whole = corpus.END.join([*texts, ""])
    decoded = tokenizer.decode(windows.flatten())
    assert whole.startswith(decoded)
    tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
    assert windows.numel() == tokens // 4 * 4


# ---- what it measures ----


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary() -> None:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, torch.randint(0, 50, (5, 8)), batch=2) == pytest.approx(50, rel=1e-5)


# ---- the chart and the page ----


def test_ticks_are_round_and_inside() -> None:
    assert chart.ticks(0, 2100, 8) == [0, 500, 1000, 1500, 2000]
    assert chart.ticks(3.62, 7.9) == [4, 5, 6, 7]
    assert chart.ticks(0.113, 0.127) == [0.115, 0.12, 0.125]
    assert chart.ticks(-1, 1, 4) == [-1, -0.5, 0, 0.5, 1]


@pytest.mark.parametrize("low, high", [(1.0, 1.0), (2.0, 1.0), (0.0, math.inf), (math.nan, 1.0)])
def test_ticks_refuse_an_empty_range(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=r"needs finite low < high, for example ticks_within\(0.0, 10.0\)"):
        chart.ticks(low, high)


def test_points_lie_where_their_values_are() -> None:
    line = chart.Series("one", "fp", [(0, 4.0), (10, 2.0), (20, 3.0)], marks=True)
    svg = chart.line_chart([line], x_label="x", y_label="y", rule=(2.5, "rule"), divider=(10, "left", "right"))
    dots = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]
    (x0, y0), (x1, y1), (x2, y2) = dots
    assert x0 == chart.LEFT and x2 == chart.WIDTH - chart.RIGHT
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1)
    assert chart.TOP < y0 < y1 < chart.HEIGHT - chart.BOTTOM  # a high loss is drawn high


def _results(**changes: Any) -> Results:
    """A made-up result, for the layout alone."""
    results: dict[str, Any] = {
        "quick": False,
        "environment": {"Python": "3.x"},
        "corpus": {"train_documents": 9, "validation_documents": 1, "train_tokens": 900, "validation_tokens": 100},
        "model": {"parameters": 1000, "layers": 1, "hidden_size": 8, "vocabulary": 300},
        "training": {"full_precision_steps": 4, "further_steps": 2, "tokens_per_step": 8},
        "full_precision": {
            "perplexity": 10.0,
            "linear_weight_bytes": 3200,
            "file_bytes": 4000,
            "tokens_per_second": 100.0,
        },
        "ternary": {"perplexity": 11.0, "linear_weight_bytes": 200, "file_bytes": 1000, "tokens_per_second": 50.0},
        "perplexity_before_rounding": 20.0,
        "perplexity_after_rounding": 2000.0,
        "perplexity_before_packing": 11.0,
        "curves": {
            "full_precision_training": [(1, 5.0), (2, 4.0)],
            "full_precision_validation": [(0, 5.5), (4, 3.0), (6, 2.3)],
            "ternary_validation": [(4, 7.6), (6, 2.4)],
        },
        "samples": [{"prompt": "<b>", "full_precision": "a & b", "ternary": "</pre><script>alert(1)</script>"}],
        "seconds": {"total": 1.0},
    }
    return results | changes  # type: ignore[return-value]


def test_the_table_compares_like_with_like() -> None:
    rows = {row[0]: row[1:] for row in table_rows(_results())}
    assert rows["Perplexity right after rounding"] == ("20.0", "2,000", "100.0 times as high")
    assert rows["Perplexity when both have trained on"] == ("10.0", "11.0", "+10.0%")
    assert rows["Weights of the linear layers"] == ("3.2 kB", "0.2 kB", "16.0 times smaller")
    assert rows["File on disk"] == ("4.0 kB", "1.0 kB", "4.0 times smaller")
    assert rows["Generated tokens per second"] == ("100", "50", "0.50 times the speed")
    lines = text_table(_results()).splitlines()
    assert len(lines) == 6 and lines[2].split()[-3:] == ["10.0", "11.0", "+10.0%"]


class _Page(HTMLParser):
    """Checks that tags are closed in order, and notes what the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [f"{name}={value}" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_nothing_else() -> None:
    text = render_page(_results())
    page = _Page(text)
    assert page.open == []
    assert page.loads == [] and page.tags.isdisjoint({"script", "link", "img", "iframe"})
    assert "url(" not in text and "@import" not in text and "://" not in text
    assert "a &amp; b" in text and "&lt;script&gt;" in text
    assert "prefers-color-scheme: dark" in text
    assert "quick run" not in text and "quick run" in render_page(_results(quick=True))


# ---- the whole ----


def test_output_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(ValueError, match=r"is a file; give a folder: run_demo\(Path\('hf_bitnet_demo'\)\)"):
        run_demo(path, quick=True)


def test_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verbosity = transformers.utils.logging.get_verbosity()
    state = torch.get_rng_state()
    try:
        results = run_demo(tmp_path / "out", quick=True)
    finally:
        torch.set_rng_state(state)
    assert transformers.utils.logging.get_verbosity() == verbosity

    out = capsys.readouterr().out
    assert [line[:5] for line in out.splitlines() if line.startswith("[")] == [f"[{stage}/7]" for stage in range(1, 8)]
    assert text_table(results) in out

    full, ternary = results["full_precision"], results["ternary"]
    assert ternary["perplexity"] == pytest.approx(results["perplexity_before_packing"], rel=1e-4)
    assert full["perplexity"] < results["perplexity_before_rounding"] < 512
    assert ternary["perplexity"] < results["perplexity_after_rounding"]
    # 2 bits for 32; the scales are why it is not quite 16
    assert 15.8 < full["linear_weight_bytes"] / ternary["linear_weight_bytes"] <= 16
    assert ternary["file_bytes"] < full["file_bytes"]
    # the curves meet where the one model became two, and end at the figures of the table
    at = results["training"]["full_precision_steps"]
    assert dict(results["curves"]["ternary_validation"])[at] == pytest.approx(
        math.log(results["perplexity_after_rounding"]), rel=0.01
    )
    assert results["curves"]["ternary_validation"][-1][1] == pytest.approx(math.log(ternary["perplexity"]), rel=0.01)
    assert results["curves"]["full_precision_validation"][-1][1] == pytest.approx(math.log(full["perplexity"]), rel=0.01)

    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert _Page((tmp_path / "out" / "index.html").read_text()).open == []
    for folder in ("full-precision", "ternary"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / folder)
        assert model(**tokenizer("def", return_tensors="pt")).logits.shape[-1] == len(tokenizer)
