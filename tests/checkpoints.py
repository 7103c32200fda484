"""What the tests of checkpoints share: comparing models, editing what lies on the disk, transformers without us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_bitnet.surgery import quantized_layers

# of the tiny llama: one layer and the head on the disk
DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "lm_head": "disk",
}


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


def assert_same_layers(model: nn.Module, other: nn.Module) -> None:
    """The same quantized layers with equal codes and equal scales."""
    mine, theirs = dict(quantized_layers(model)), dict(quantized_layers(other))
    assert mine.keys() == theirs.keys() and mine
    for name, layer in mine.items():
        a, b = layer.quantized_weight(), theirs[name].quantized_weight()
        assert torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale), name


def reloaded(model: Any, folder: Path, **kwargs: Any) -> Any:
    """The model after save_pretrained and from_pretrained. Every tensor must find its place."""
    model.save_pretrained(folder)
    return loaded(type(model), folder, **kwargs)


def loaded(kind: Any, folder: Path, **kwargs: Any) -> Any:
    """from_pretrained; every tensor must find its place."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """`quantization_config` of the folder's config.json."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the folder's config.json in place."""
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Changes the folder's model.safetensors in place."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


_PLAIN = """
import json, sys
import torch, transformers
from safetensors.torch import load_file, save_file

results = {}
for folder in sys.argv[1:]:
    try:
        kind = getattr(transformers, json.load(open(folder + "/config.json"))["architectures"][0])
        model = kind.from_pretrained(folder)
        with torch.no_grad():
            output = model(**load_file(folder + "/batch.safetensors"))
        tensor = output.logits if "logits" in output else output.last_hidden_state
        save_file({"output": tensor.contiguous()}, folder + "/plain.safetensors")
        results[folder] = [type(module).__name__ for module in model.modules()]
    except Exception as error:
        results[folder] = f"{type(error).__name__}: {error}"
assert not any(name.split(".")[0] == "hf_bitnet" for name in sys.modules)
print(json.dumps(results))
"""


def run_plain_transformers(jobs: dict[Path, dict[str, Tensor]]) -> dict[Path, tuple[list[str] | str, Tensor | None]]:
    """Loads folders in one process that never imports us: {folder: batch} -> {folder: (class names or error, output)}.

    Without torch.compile: what transformers compiles there is defined by its eager code.
    """
    for folder, batch in jobs.items():
        save_file({name: value.contiguous() for name, value in batch.items()}, folder / "batch.safetensors")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    completed = subprocess.run(
        [sys.executable, "-c", _PLAIN, *map(str, jobs)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment | {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"},
        cwd=Path(tf.__file__).parent,
    )
    assert completed.returncode == 0, completed.stderr
    results = json.loads(completed.stdout.splitlines()[-1])
    return {
        folder: (results[str(folder)], load_file(file)["output"] if (file := folder / "plain.safetensors").exists() else None)
        for folder in jobs
    }
