"""The demo's text: documentation that every Python installation carries, so that no network is needed.

Two sources: the language reference in ``pydoc_data.topics`` (one document per topic), and the signatures and
docstrings of the standard library (one document per module). The modules are parsed with ``ast``, never imported.

Whole documents go to the training or to the validation side, and a paragraph that occurs a second time anywhere is
dropped (the reference repeats itself across topics, and so do docstrings across modules). What the model is
measured on is therefore text it has not read. The text, and with it every figure of the demo, depends on the
version of Python.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import textwrap
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..training import TokenWindows

END = "<|end|>"
# Folders under the standard library that hold tests, third-party packages, or tables instead of prose.
SKIPPED_FOLDERS = frozenset(
    [
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "idlelib",
        "turtledemo",
        "ensurepip",
        "encodings",
        "__pycache__",
    ]
)


@dataclass(frozen=True)
class Corpus:
    """Documents as text, split without overlap. Each entry is one whole document."""

    train: list[str]
    validation: list[str]


@dataclass(frozen=True)
class Text:
    """The tokenized documents: int64 windows [count, length], and how many documents each side has."""

    tokenizer: PreTrainedTokenizerFast
    train: Tensor
    validation: Tensor
    train_documents: int
    validation_documents: int

    def facts(self) -> dict[str, int]:
        """Documents and tokens of each side."""
        return {
            "train_documents": self.train_documents,
            "validation_documents": self.validation_documents,
            "train_tokens": self.train.numel(),
            "validation_tokens": self.validation.numel(),
        }

    def datasets(self) -> dict[str, Any]:
        """Both sides under the names of Trainer's arguments."""
        return {"train_dataset": TokenWindows(self.train), "eval_dataset": TokenWindows(self.validation)}


def collect_corpus(*, max_modules: int | None = None, validation_share: int = 16) -> Corpus:
    """Collect, clean, deduplicate and split the documents; one of ``validation_share`` is held out.

    ``max_modules`` bounds how many standard-library files are parsed (the smoke test's way to be quick). The split
    depends on the document's name alone: the same installation always gives the same split.
    """
    seen: set[str] = set()
    train: list[str] = []
    validation: list[str] = []
    for name, text in [*_reference_topics(), *_module_docstrings(max_modules)]:
        text = _drop_repeated_paragraphs(_clean(text), seen)
        if len(text) < 200:  # what is left of a document whose paragraphs were all seen before
            continue
        held_out = zlib.crc32(name.encode()) % validation_share == 0
        (validation if held_out else train).append(text)
    if not train or not validation:
        raise ValueError(
            f"found {len(train)} training and {len(validation)} validation documents in {_library_folder()}: the demo "
            "reads the .py files of the standard library. Run it with a Python installation that has them."
        )
    return Corpus(train, validation)


def tokenize(corpus: Corpus, vocabulary: int, length: int, max_validation_windows: int | None = None) -> Text:
    """Train a tokenizer on the training documents and cut both sides into windows of ``length`` tokens."""
    tokenizer = train_tokenizer(corpus.train, vocabulary)
    train, validation = (token_windows(tokenizer, side, length) for side in (corpus.train, corpus.validation))
    return Text(tokenizer, train, validation[:max_validation_windows], len(corpus.train), len(corpus.validation))


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (no unknown tokens: every byte has an entry) on the training documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def token_windows(tokenizer: PreTrainedTokenizerFast, documents: list[str], length: int) -> Tensor:
    """Encode the documents one after another, with ``END`` between them, and cut them: int64 ``[windows, length]``.

    The incomplete last window is dropped.
    """
    encoded = tokenizer(documents, add_special_tokens=False)["input_ids"]
    stream = [token for tokens in encoded for token in (*tokens, tokenizer.eos_token_id)]
    count = len(stream) // length
    return torch.tensor(stream[: count * length], dtype=torch.int64, device="cpu").view(count, length)


def _reference_topics() -> Iterator[tuple[str, str]]:
    """The language reference, as (name, text). An installation without ``pydoc_data`` (some packagers split it off)
    has the docstrings only."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name in sorted(topics):
        yield f"topic {name}", topics[name]


def _module_docstrings(max_modules: int | None) -> Iterator[tuple[str, str]]:
    folder = _library_folder()
    files = [
        path
        for path in sorted(folder.rglob("*.py"))
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(folder).parts) and path.name != "topics.py"
    ]
    for path in files[:max_modules]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old modules are not the reader's concern
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):  # templates that are not Python, unreadable files
            continue
        yield f"module {path.relative_to(folder).as_posix()}", "\n\n".join(_definitions(tree))


def _definitions(tree: ast.Module) -> Iterator[str]:
    """Each documented object as its first line and its docstring, the way ``help()`` shows it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is None:
                continue
            if isinstance(node, ast.ClassDef):
                bases = ", ".join(map(ast.unparse, node.bases))
                text = f"class {node.name}({bases}):\n" + textwrap.indent(text, "    ")
            elif not isinstance(node, ast.Module):
                text = f"def {node.name}({ast.unparse(node.args)}):\n" + textwrap.indent(text, "    ")
            yield text


def _clean(text: str) -> str:
    """Drop underlines and trailing blanks, and shorten runs of blanks and of empty lines."""
    lines = [line.rstrip() for line in text.expandtabs(4).splitlines()]
    lines = [line for line in lines if not re.fullmatch(r"\s*([*=\-~^+#_.])\1{3,}", line)]
    text = "\n".join(re.sub(r"(?<=\S) {3,}", "  ", line) for line in lines)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _drop_repeated_paragraphs(text: str, seen: set[str]) -> str:
    """Keep the paragraphs that are new; ``seen`` holds all paragraphs so far, without their signatures, and grows."""
    kept = []
    for paragraph in text.split("\n\n"):
        key = " ".join(re.sub(r"^(def|class) .*:\n", "", paragraph).split())
        if key not in seen:
            seen.add(key)
            kept.append(paragraph)
    return "\n\n".join(kept)


def _library_folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))
