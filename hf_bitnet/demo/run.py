"""The demo: from text to a 1.58-bit model on any computer, without a network and in a few minutes.

It trains a small Llama in full precision on Python's own documentation and quantizes a copy (BitNet b1.58, arXiv
2402.17764). Then both train on for the same number of steps, the ternary one with the full-precision model as its teacher,
so that the comparison is fair. The ternary model is packed and reloaded. What remains is a table on the screen, and
`results.json`, `index.html` and both models in the output folder.

Steps, not seconds, bound the training, and everything is seeded. All of it runs on the CPU; training uses bfloat16 products
where the processor has units for them (AMX) and float32 elsewhere, so last digits differ between kinds of processors.
Measurements are in float32. Leaves out: the text (`corpus.py`), what the trainings share (`training.py`), the page (`page.py`).
"""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from .. import (
    BitNetQuantizationConfig,
    QATArguments,
    QATTrainer,
    __version__,
    coverage,
    optimize_for_generation,
    pack_model,
    quantize_model,
)
from .chart import Curve
from .corpus import END, Text, collect_corpus, tokenize
from .page import Measured, Results, Sample, render_page, text_table
from .training import arguments, later, train

FULL_PRECISION, TERNARY = "full-precision", "ternary"
"""Folders of the two models in the output folder."""
# three blanks: the tokenizer gives the fourth to the word that follows
PROMPTS = ("def read(self, size=-1):\n   ", 'The "for" statement is used to', "class Queue(object):\n   ")
SEED = 0
# Packed and trained forms have the same codes and scales; their float32 products are summed in another order.
RELOAD_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Settings:
    """Sizes and lengths of a run. The learning rate was chosen for these sizes, on the validation text.

    `seconds` are for the headings: full precision, ternary, full precision continued; on two cores, in float32.
    """

    vocabulary: int = 2048
    hidden_size: int = 256
    layers: int = 2
    heads: int = 4
    intermediate_size: int = 768
    window: int = 128
    batch: int = 4
    steps: int = 700
    learning_rate: float = 2e-3
    further_steps: int = 300
    evaluations: int = 4
    new_tokens: int = 80
    max_modules: int | None = None
    max_validation_windows: int | None = None
    seconds: tuple[int, int, int] | None = (50, 30, 25)


QUICK = Settings(
    vocabulary=512,
    hidden_size=64,
    layers=1,
    heads=2,
    intermediate_size=128,
    window=64,
    steps=20,
    further_steps=20,
    evaluations=2,
    new_tokens=12,
    max_modules=40,
    max_validation_windows=16,
    seconds=None,
)


def run_demo(output_dir: Path, *, quick: bool = False) -> Results:
    """Run the whole demo and return what was measured (also written to ``output_dir/results.json``).

    Args:
        output_dir: folder for the page, the results and both models; made if need be, files of an earlier run are replaced.
        quick: a few steps of a tiny model, to see in seconds that everything works. Its figures mean nothing.

    Raises ValueError when ``output_dir`` is a file, or the standard library's .py files cannot be found; RuntimeError when
    the reloaded model does not equal the trained one.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir={str(output_dir)!r} is a file; give a folder: run_demo(Path('hf_bitnet_demo'))")
    output_dir.mkdir(parents=True, exist_ok=True)
    with _quiet(), tempfile.TemporaryDirectory() as scratch:
        results = _Demo(QUICK if quick else Settings(), quick, output_dir, Path(scratch)).run()
    (output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (output_dir / "index.html").write_text(render_page(results), encoding="utf-8")
    print(f"\n{text_table(results)}\n\nOpen {(output_dir / 'index.html').resolve()} for the curves and the samples.")
    return results


class _Demo:
    """One run: the seven stages in order. ``scratch`` takes what the trainers write."""

    def __init__(self, settings: Settings, quick: bool, output_dir: Path, scratch: Path) -> None:
        self.settings, self.quick, self.output_dir, self.scratch = settings, quick, output_dir, scratch
        self.seconds: dict[str, float] = {}

    def run(self) -> Results:
        settings, started = self.settings, time.perf_counter()
        set_seed(SEED)
        with self.stage(1, "reading Python's documentation, training a tokenizer"):
            text = self.read()
        with self.stage(2, f"training the full-precision model{self.about(0)}"):
            full, full_curves = self.train_full_precision(text)
        with self.stage(3, "quantizing to 1.58 bits"):
            ternary = quantize_model(copy.deepcopy(full), BitNetQuantizationConfig.bitnet_b158(), progress=False)
            start, rounded = perplexity(full, text.validation), perplexity(ternary, text.validation)
            print(f"      perplexity {start:,.1f} -> {rounded:,.1f} by rounding alone")
        with self.stage(4, f"training the ternary model, its full-precision self as the teacher{self.about(1)}"):
            ternary_curves = self.train_ternary(ternary, text)
        with self.stage(5, f"training the full-precision model for as long, to compare{self.about(2)}"):
            more_curves = self.continue_full_precision(full, text)
        with self.stage(6, "packing and reloading the ternary model, writing text with both, measuring"):
            unpacked = perplexity(ternary, text.validation)
            packed = self.pack_and_reload(ternary, text, unpacked)
            samples = [self.sample(prompt, full, packed, text.tokenizer) for prompt in PROMPTS]
            measured = self.measure(full, packed, text)
        self.seconds["total"] = time.perf_counter() - started
        print(f"[7/7] writing the page ({self.seconds['total']:.0f} s so far)")
        return {
            "quick": self.quick,
            "environment": _environment(),
            "corpus": text.facts(),
            "model": _model_facts(full),
            "training": {
                "full_precision_steps": settings.steps,
                "further_steps": settings.further_steps,
                "tokens_per_step": settings.batch * settings.window,
            },
            "full_precision": measured[0],
            "ternary": measured[1],
            "perplexity_before_rounding": start,
            "perplexity_after_rounding": rounded,
            "perplexity_before_packing": unpacked,
            "curves": {
                "full_precision_training": full_curves["loss"],
                "full_precision_validation": full_curves["eval_loss"] + later(more_curves["eval_loss"], settings.steps),
                "ternary_validation": later(ternary_curves["eval_loss"], settings.steps),
            },
            "samples": samples,
            "seconds": {name: round(seconds, 1) for name, seconds in self.seconds.items()},
        }

    @contextmanager
    def stage(self, number: int, title: str) -> Iterator[None]:
        print(f"[{number}/7] {title}", flush=True)
        started = time.perf_counter()
        yield
        self.seconds[f"stage {number}"] = time.perf_counter() - started

    def about(self, index: int) -> str:
        if self.settings.seconds is None:
            return ""
        return f" (about {self.settings.seconds[index]} s on two cores)"

    def read(self) -> Text:
        settings = self.settings
        corpus = collect_corpus(max_modules=settings.max_modules)
        return tokenize(corpus, settings.vocabulary, settings.window, settings.max_validation_windows)

    def train_full_precision(self, text: Text) -> tuple[LlamaForCausalLM, dict[str, Curve]]:
        settings, end = self.settings, text.tokenizer.get_vocab()[END]
        config = LlamaConfig(
            vocab_size=len(text.tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            max_position_embeddings=512,
            initializer_range=0.05,  # a larger start than the usual 0.02, which pays in a run this short
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
        )
        model = LlamaForCausalLM(config)
        args = TrainingArguments(**self.shared(settings.steps))
        return model, train(Trainer(model=model, args=args, **text.datasets()), "full precision")

    def continue_full_precision(self, model: LlamaForCausalLM, text: Text) -> dict[str, Curve]:
        shared = self.shared(self.settings.further_steps)
        shared["eval_on_start"] = False  # where the first training ended
        curves = train(Trainer(model=model, args=TrainingArguments(**shared), **text.datasets()), "full precision")
        self.save(model, text.tokenizer, FULL_PRECISION)
        return curves

    def train_ternary(self, model: LlamaForCausalLM, text: Text) -> dict[str, Curve]:
        settings = self.settings
        args = QATArguments(
            **self.shared(settings.further_steps),
            distillation={"alpha": 0.5},
            quant_logging=False,
        )
        return train(QATTrainer(model=model, args=args, teacher="self", **text.datasets()), "ternary")

    def shared(self, steps: int) -> dict[str, Any]:
        settings = self.settings
        return arguments(
            self.scratch, steps, settings.learning_rate, batch=settings.batch, evaluations=settings.evaluations, seed=SEED
        )

    def save(self, model: Any, tokenizer: PreTrainedTokenizerFast, folder: str) -> Path:
        path = self.output_dir / folder
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    def pack_and_reload(self, ternary: LlamaForCausalLM, text: Text, expected: float) -> nn.Module:
        """Packs in place, saves, and returns what `from_pretrained` makes of the files. Raises RuntimeError if it differs."""
        path = self.save(pack_model(ternary, progress=False), text.tokenizer, TERNARY)
        reloaded = AutoModelForCausalLM.from_pretrained(path)
        found = perplexity(reloaded, text.validation)
        if not math.isclose(found, expected, rel_tol=RELOAD_TOLERANCE):
            raise RuntimeError(
                f"the reloaded packed model has perplexity {found}, the trained one had {expected}; please report"
            )
        print(f"      perplexity {expected:.3f} as trained, {found:.3f} packed and reloaded")
        return reloaded

    def sample(self, prompt: str, full: Any, packed: Any, tokenizer: PreTrainedTokenizerFast) -> Sample:
        def write(model: Any) -> str:
            set_seed(SEED)
            tokens = tokenizer(prompt, return_tensors="pt")
            length = self.settings.new_tokens
            out = model.generate(**tokens, max_new_tokens=length, do_sample=True, temperature=0.7, top_k=40)
            return str(tokenizer.decode(out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True))

        return {"prompt": prompt, "full_precision": write(full), "ternary": write(packed)}

    def measure(self, full: Any, packed: Any, text: Text) -> tuple[Measured, Measured]:
        names = {row.name for row in coverage(packed).rows if row.status == "quantized"}
        fast = [optimize_for_generation(model) for model in (full, packed)]  # as `hf-bitnet chat` does
        speeds = _tokens_per_second(fast, text.validation[:1, :16], self.settings.new_tokens)
        models = ((full, FULL_PRECISION), (packed, TERNARY))
        first, second = (
            Measured(
                perplexity=perplexity(model, text.validation),
                linear_weight_bytes=_bytes_of(model, names),
                file_bytes=sum(path.stat().st_size for path in (self.output_dir / folder).glob("*.safetensors")),
                tokens_per_second=speed,
            )
            for (model, folder), speed in zip(models, speeds, strict=True)
        )
        return first, second


@torch.no_grad()
def perplexity(model: Any, windows: Tensor, batch: int = 16) -> float:
    """exp of the mean cross entropy per token over int64 windows [count, length]; each window is read on its own."""
    model.eval()
    total = sum(float(model(input_ids=part, labels=part).loss) * len(part) for part in windows.split(batch))
    return math.exp(total / len(windows))


@torch.no_grad()
def _tokens_per_second(models: list[Any], prompt: Tensor, new_tokens: int, rounds: int = 3) -> list[float]:
    """Best of `rounds` greedy generations for each model. The models take turns, so that both meet the same load."""
    best = [0.0] * len(models)
    for _ in range(rounds):
        for index, model in enumerate(models):
            started = time.perf_counter()
            model.generate(prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
            best[index] = max(best[index], new_tokens / (time.perf_counter() - started))
    return best


def _bytes_of(model: nn.Module, names: set[str]) -> int:
    """Bytes that the weights `names` really occupy in `model`, with their scales."""
    wanted = names | {f"{name}_scale" for name in names}
    return sum(tensor.nbytes for name, tensor in model.state_dict().items() if name in wanted)


def _environment() -> dict[str, str]:
    return {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_bitnet": __version__,
        "on": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def _model_facts(model: LlamaForCausalLM) -> dict[str, int]:
    config = model.config
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocabulary": config.vocab_size,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' notes and bars and Python's warnings inside; the settings of before come back after."""
    logs = transformers.utils.logging
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()
