"""The demo's web page: one HTML file that needs nothing else, styles included.

`Results` is also what `results.json` holds; a page is a plain function of it. Leaves out: training, measuring, drawing
(`chart.py`).
"""

from __future__ import annotations

import html
import math
from typing import TypedDict

from .chart import Curve, Series, legend, line_chart


class Measured(TypedDict):
    """What is measured on both models. Bytes of the linear layers include their scales."""

    perplexity: float
    linear_weight_bytes: int
    file_bytes: int
    tokens_per_second: float


class Sample(TypedDict):
    prompt: str
    full_precision: str
    ternary: str


class Results(TypedDict):
    """Everything the demo found out. Perplexities are per token, on validation text."""

    quick: bool
    environment: dict[str, str]
    corpus: dict[str, int]
    model: dict[str, int]
    training: dict[str, int]
    full_precision: Measured
    ternary: Measured
    perplexity_before_rounding: float
    perplexity_after_rounding: float
    perplexity_before_packing: float
    curves: dict[str, Curve]
    samples: list[Sample]
    seconds: dict[str, float]


def table_rows(results: Results) -> list[tuple[str, str, str, str]]:
    """The comparison as text: (what, full precision, ternary, how they compare). Printed, and shown on the page."""
    full, ternary = results["full_precision"], results["ternary"]
    before, rounded = results["perplexity_before_rounding"], results["perplexity_after_rounding"]

    def smaller(large: int, small: int) -> tuple[str, str, str]:
        return _size(large), _size(small), f"{large / max(small, 1):.1f} times smaller"

    speed = ternary["tokens_per_second"] / max(full["tokens_per_second"], 1e-9)
    return [
        ("Perplexity right after rounding", _number(before), _number(rounded), _percent(rounded / before)),
        (
            "Perplexity when both have trained on",
            _number(full["perplexity"]),
            _number(ternary["perplexity"]),
            _percent(ternary["perplexity"] / full["perplexity"]),
        ),
        ("Weights of the linear layers", *smaller(full["linear_weight_bytes"], ternary["linear_weight_bytes"])),
        ("File on disk", *smaller(full["file_bytes"], ternary["file_bytes"])),
        (
            "Generated tokens per second",
            f"{full['tokens_per_second']:,.0f}",
            f"{ternary['tokens_per_second']:,.0f}",
            f"{speed:.2f} times the speed",
        ),
    ]


def text_table(results: Results) -> str:
    """`table_rows` with a heading, aligned for a terminal."""
    rows = [("", "full precision", "ternary", "compared"), *table_rows(results)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{what:<{widths[0]}}  {full:>{widths[1]}}  {ternary:>{widths[2]}}  {note}" for what, full, ternary, note in rows
    )


def render_page(results: Results) -> str:
    """The whole page as HTML text. It loads nothing from elsewhere and runs no script."""
    sections = [
        _header(results),
        _cards(results),
        _section("How it learned", _chart(results)),
        _section("What it costs and what it saves", _table(results)),
        _section("What the two models write", _samples(results)),
        _section("What was done", _setup(results)),
        _section("What to do next", NEXT),
    ]
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>hf_bitnet: a language model in 1.58 bits</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _header(results: Results) -> str:
    quick = (
        '<p class="warning">This was the quick run: a few steps of a tiny model, to see that everything works. '
        "Its figures mean nothing; <code>hf-bitnet demo</code> makes real ones.</p>"
        if results["quick"]
        else ""
    )
    return (
        '<header><p class="over">hf_bitnet demo</p><h1>A language model in 1.58&nbsp;bits, trained on this computer</h1>'
        f'<p class="lead">A small Llama of {results["model"]["parameters"] / 1e6:.1f} million parameters learned from the '
        "documentation that ships with Python. Then every weight of its attention and feed-forward layers was restricted to "
        "&minus;1, 0 or +1, and the model was trained on with its full-precision self as the teacher."
        f"</p>{quick}</header>"
    )


def _cards(results: Results) -> str:
    full, ternary = results["full_precision"], results["ternary"]
    ratio = full["linear_weight_bytes"] / max(ternary["linear_weight_bytes"], 1)
    cards = [
        (_number(results["perplexity_after_rounding"]), "perplexity when the weights are only rounded", "bad"),
        (_number(ternary["perplexity"]), "perplexity after ternary training", "qat"),
        (_number(full["perplexity"]), "in full precision, trained for as long", "fp"),
        (f"{ratio:.0f}&times;", "smaller weights of the linear layers", "qat"),
    ]
    items = "".join(f'<li><b class="{style}">{value}</b><span>{text}</span></li>' for value, text, style in cards)
    return f'<ul class="cards">{items}</ul>'


def _chart(results: Results) -> str:
    curves, steps = results["curves"], results["training"]
    start = steps["full_precision_steps"]
    first = start // 20  # the steep beginning would flatten everything after it
    shown = {name: [point for point in curve if point[0] >= first] for name, curve in curves.items()}
    series = [
        Series("full precision, training text", "train", shown["full_precision_training"]),
        Series("full precision, validation text", "fp", shown["full_precision_validation"], marks=True),
        Series("ternary, validation text", "qat", shown["ternary_validation"], marks=True),
    ]
    chart = line_chart(
        series,
        x_label="training step",
        y_label="loss (mean cross entropy in nats per token)",
        rule=(math.log(results["full_precision"]["perplexity"]), "full precision at its end"),
        divider=(start, "one model", "two: full precision and 1.58 bits"),
    )
    return (
        f'<figure>{legend(series)}<div class="wide">{chart}</div><figcaption>'
        "Lower is better; perplexity is <i>e</i> to the power of the loss. At the "
        "vertical line the model is copied and the copy&rsquo;s weights are rounded to three values, which raises its loss at "
        "once. Then both train on for as many steps (a learning rate that starts anew first raises the loss of both, then "
        "lowers it). "
        f"The first {first:,} steps, which began at a loss of {curves['full_precision_validation'][0][1]:.1f}, are left out. "
        "Hold the pointer over a dot for its figures.</figcaption></figure>"
    )


def _table(results: Results) -> str:
    body = "".join(
        f'<tr><th scope="row">{_text(what)}</th><td>{_text(full)}</td><td>{_text(ternary)}</td><td>{_text(note)}</td></tr>'
        for what, full, ternary, note in table_rows(results)
    )
    return (
        '<div class="scroll"><table><thead><tr><td></td><th scope="col">full precision</th><th scope="col">ternary</th>'
        f'<th scope="col">compared</th></tr></thead><tbody>{body}</tbody></table></div>'
        "<p>Perplexity is measured on documents that no training saw; lower is better. Both models share the "
        "first part of their training and have read equally much text. The file also holds the embeddings, which stay in full "
        "precision; in a model of normal size they are a small part. Speed depends on the kernels in use (<code>hf-bitnet "
        "info --kernels</code> lists them) and at this size says little about large models.</p>"
    )


def _samples(results: Results) -> str:
    rows = []
    for sample in results["samples"]:
        prompt = _text(sample["prompt"])
        rows.append(
            f'<div class="pair"><div><h3 class="fp">full precision</h3><pre><b>{prompt}</b>{_text(sample["full_precision"])}'
            f'</pre></div><div><h3 class="qat">ternary</h3><pre><b>{prompt}</b>{_text(sample["ternary"])}</pre></div></div>'
        )
    return (
        "<p>The prompt is in bold. A model this small that has trained for minutes learns the look of the documentation, "
        f"not its meaning.</p>{''.join(rows)}"
    )


def _setup(results: Results) -> str:
    corpus, model, training = results["corpus"], results["model"], results["training"]
    environment = ", ".join(f"{_text(name)} {_text(value)}" for name, value in results["environment"].items())
    facts = [
        (
            "Text",
            f"{corpus['train_documents']} documents ({corpus['train_tokens']:,} tokens) to train on, "
            f"{corpus['validation_documents']} others ({corpus['validation_tokens']:,} tokens) to measure on",
        ),
        (
            "Model",
            f"Llama, {model['layers']} layers of width {model['hidden_size']}, "
            f"{model['vocabulary']:,} byte-level BPE tokens, {model['parameters']:,} parameters",
        ),
        (
            "Training",
            f"{training['full_precision_steps']:,} steps in full precision, then {training['further_steps']:,} "
            f"for each of the two; {training['tokens_per_step']:,} tokens a step",
        ),
        ("Time", f"{results['seconds']['total']:.0f} seconds in all"),
        ("Made with", environment),
    ]
    items = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in facts)
    return f"<dl>{items}</dl>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def _text(value: str) -> str:
    return html.escape(value)


def _number(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _percent(ratio: float) -> str:
    return f"{ratio - 1:+.1%}" if ratio < 2 else f"{ratio:,.1f} times as high"


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


NEXT = """
<p>Use the model that was just made (run this in the folder of this page):</p>
<pre class="code">import hf_bitnet
from transformers import pipeline

write = pipeline("text-generation", model="ternary")
print(write("def read(self, size=-1):", max_new_tokens=40)[0]["generated_text"])</pre>
<p>Do the same with your own model and data:</p>
<pre class="code">from hf_bitnet import BitNetQuantizationConfig, QATArguments, QATTrainer, coverage, pack_model, quantize_model
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("your-model")
quantize_model(model, BitNetQuantizationConfig.bitnet_b158())
print(coverage(model))                       # what is quantized, and what is not and why
QATTrainer(model=model, args=QATArguments(output_dir="out"), train_dataset=your_data, teacher="self").train()
pack_model(model).save_pretrained("packed")  # two bits for each weight</pre>
<p>Every figure of this page is in <code>results.json</code>; the commands are listed by <code>hf-bitnet --help</code>.</p>
"""

STYLE = """
:root { color-scheme: light dark; --page: #faf9f7; --card: #fff; --ink: #1d1c1a; --soft: #65625c; --edge: #e4e1da;
  --fp: #2563c9; --qat: #c2410c; --train: #9db8e6; --bad: #77736b; --code: #f3f1ec; }
@media (prefers-color-scheme: dark) { :root { --page: #131518; --card: #1b1e23; --ink: #e9e7e2; --soft: #a09d96;
  --edge: #31353c; --fp: #7aa7f7; --qat: #fb923c; --train: #3d5687; --bad: #a8a49b; --code: #22262c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 2.1rem; line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 12px; text-wrap: balance; }
h2 { font-size: 1.25rem; margin: 0 0 12px; letter-spacing: -0.01em; }
h3 { font-size: 0.8rem; margin: 0 0 6px; font-weight: 600; }
p { margin: 0 0 12px; }
.over { color: var(--qat); font-weight: 600; font-size: 0.85rem; margin: 0 0 6px; }
.lead { color: var(--soft); font-size: 1.06rem; max-width: 46rem; margin: 0; }
.warning { margin: 14px 0 0; padding: 10px 14px; border-left: 4px solid var(--qat); background: var(--card); }
section { margin-top: 36px; }
section > p, figcaption { color: var(--soft); font-size: 0.94rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; list-style: none;
  padding: 0; margin: 26px 0 0; }
.cards li, figure, .scroll { background: var(--card); border: 1px solid var(--edge); border-radius: 12px; }
.cards li { padding: 14px 16px; display: flex; flex-direction: column; }
.cards b { font-size: 1.85rem; line-height: 1.2; letter-spacing: -0.02em; font-variant-numeric: tabular-nums; }
.cards span { color: var(--soft); font-size: 0.88rem; line-height: 1.4; }
b.fp, h3.fp { color: var(--fp); } b.qat, h3.qat { color: var(--qat); } b.bad { color: var(--bad); }
figure { margin: 0; padding: 16px 16px 14px; }
figcaption { margin-top: 8px; }
.wide { overflow-x: auto; }
svg { display: block; width: 100%; min-width: 640px; height: auto;
  font: 13.5px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
.grid { stroke: var(--edge); stroke-width: 1; } .axis { stroke: var(--soft); stroke-width: 1; }
.tick { fill: var(--soft); } .label { fill: var(--ink); }
.note { fill: var(--soft); paint-order: stroke; stroke: var(--card); stroke-width: 5px; }
.rule { stroke: var(--fp); stroke-width: 1.3; stroke-dasharray: 6 5; opacity: 0.75; }
.divider { stroke: var(--soft); stroke-width: 1.3; stroke-dasharray: 2 3; }
.line { fill: none; stroke-width: 2.4; stroke-linejoin: round; stroke-linecap: round; }
.line.fp { stroke: var(--fp); } .line.qat { stroke: var(--qat); } .line.train { stroke: var(--train); stroke-width: 1.6; }
.dot { stroke: var(--card); stroke-width: 1.4; } .dot.fp { fill: var(--fp); } .dot.qat { fill: var(--qat); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 22px; list-style: none; padding: 0; margin: 0 0 10px; font-size: 0.9rem; }
.key { display: inline-block; width: 22px; height: 4px; border-radius: 2px; margin-right: 8px; vertical-align: middle; }
.key.fp { background: var(--fp); } .key.qat { background: var(--qat); } .key.train { background: var(--train); }
.scroll { overflow-x: auto; margin-bottom: 12px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 10px 16px; text-align: right; border-bottom: 1px solid var(--edge); white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; }
th[scope=row], th[scope=col] { font-weight: 500; } th[scope=row] { text-align: left; white-space: normal; }
thead th, td:last-child { color: var(--soft); font-size: 0.9rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 12px; margin-top: 14px; }
.pair > div { min-width: 0; background: var(--card); border: 1px solid var(--edge); border-radius: 12px; padding: 12px 16px; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre.code { background: var(--code); border-radius: 10px; padding: 14px 16px; margin-bottom: 16px; white-space: pre;
  overflow-x: auto; }
code { background: var(--code); border-radius: 4px; padding: 1px 5px; font-size: 0.9em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 6px 20px; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; }
"""
