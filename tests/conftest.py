"""What every test shares: no network but a Hub of our own, a fixed seed, shared data, tiny models, levels of the kernels."""

from __future__ import annotations

import gc
import os

# before transformers and datasets are imported, which read these once: a test that asks the network fails at once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

# before anything imports Triton, which reads it once: its interpreter runs the kernels for GPUs where there is none
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from benchmarks import common
from hf_bitnet.kernels.cpu import library
from tests import corpus
from tests.cpu_kernels import LEVELS
from tests.hub_server import LoopbackHub, loopback_hub
from tests.tiny import FAMILIES, tiny

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers in every test, alone or in the whole suite, in any order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _light_garbage_collection() -> None:
    """What was imported and collected so far is never looked at again: each Trainer.train() collects garbage, which would
    take most of a tiny run where so many modules are loaded."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with text corpora and small trained models, beside the checkout."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder 'shared' (corpora and small trained models) beside the checkout")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """A Hub on this machine, empty, that everything in this process takes for the Hub."""
    with loopback_hub(monkeypatch, tmp_path_factory.mktemp("hub_cache")) as made:
        yield made


@pytest.fixture
def tiny_model() -> Callable[..., tuple]:
    """The factory `tests.tiny.tiny`: `model, batch = tiny_model("llama", labels=True)`."""
    return tiny


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """The name of each model family in turn."""
    return request.param


@pytest.fixture(params=LEVELS or (None,))
def level(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """Each instruction set of the C++ kernels in turn, chosen during the test; None where there are no such kernels."""
    if request.param is None:
        yield None
        return
    before = library.level()
    library.choose_level(request.param)
    yield request.param
    library.choose_level(before)


@pytest.fixture
def tiny_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model and a short text under the names of the real ones."""
    model = tmp_path / "models" / "novels-llama-small"
    tiny("llama", max_position_embeddings=512, hidden_size=64, intermediate_size=128)[0].save_pretrained(model)
    corpus.tokenizer().save_pretrained(model)
    (tmp_path / "data" / "novels").mkdir(parents=True)
    (tmp_path / "data" / "wikitext-2").mkdir()
    for folder, name in (("novels", "train.txt"), ("novels", "valid.txt"), ("wikitext-2", "valid.txt")):
        corpus.write(tmp_path / "data" / folder, name=name)
    monkeypatch.setattr(common, "SHARED", tmp_path)
