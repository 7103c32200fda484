"""Loading a packed checkpoint: the file stays where it is, mapped into memory, and is read by the kernels as it lies. Own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from benchmarks import generate
from hf_bitnet import PackedBitLinear, coverage
from hf_bitnet.surgery import quantized_layers

REPOSITORY = Path(__file__).resolve().parents[1]
# large enough that a copy of the weights is seen beside what an interpreter grows by anyway: 75 MB packed, 500 MB as float32
SHAPE = generate.SHAPE | {"num_hidden_layers": 2, "vocab_size": 4000}
mapped = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="memory maps are read from /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed")
    generate.build(path, SHAPE)
    return path


def _mappings(path: Path) -> list[range]:
    """Addresses at which this process has the file."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [each[0].split("-") for each in lines if len(each) == 6 and each[5] == str(path)]
    return [range(int(low, 16), int(high, 16)) for low, high in spans]


@mapped
def test_weights_are_the_file_itself(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    spans = _mappings((folder / "model.safetensors").resolve())
    layers = [layer for _, layer in quantized_layers(model)]
    assert len(layers) == 2 * 7 + 1 and all(isinstance(layer, PackedBitLinear) for layer in layers)
    for name, parameter in model.named_parameters():
        assert any(parameter.data_ptr() in span for span in spans), name
    assert model.dtype == torch.bfloat16


@pytest.mark.slow
@mapped
def test_memory_of_a_fresh_process(folder: Path) -> None:
    """Resident memory grows by less than the packed file, although nothing was touched but what loading touches."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.generate",
        "--worker",
        "--folder",
        str(folder),
        "--prompt",
        "8",
        "--tokens",
        "4",
    ]
    found = json.loads(
        subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    )
    grown = found["resident_loaded_mb"] - found["resident_before_mb"]
    assert grown < 0.9 * found["file_mb"], found


@torch.no_grad()
def test_tensors_at_odd_addresses(folder: Path, tmp_path: Path) -> None:
    """Nothing in a safetensors file has to lie at a multiple of anything: a name one byte longer moves all tensors."""
    model = LlamaForCausalLM.from_pretrained(folder)
    ids = torch.arange(6).reshape(1, 6)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shifted = tmp_path / "shifted"
    model.config.save_pretrained(shifted)
    data = _safetensors_with_header_of(state, tmp_path, 1)
    (shifted / "model.safetensors").write_bytes(data)
    other = LlamaForCausalLM.from_pretrained(shifted)
    assert other.lm_head.weight.data_ptr() % 8
    assert torch.equal(other(ids).logits, model(ids).logits)


def _safetensors_with_header_of(state: dict[str, torch.Tensor], folder: Path, extra: int) -> bytes:
    save_file(state, folder / "plain.safetensors", metadata={"format": "pt"})
    data = (folder / "plain.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    return (size + extra).to_bytes(8, "little") + data[8 : 8 + size] + b" " * extra + data[8 + size :]


def test_coverage_of_a_packed_head(folder: Path) -> None:
    found = coverage(LlamaForCausalLM.from_pretrained(folder))
    head = next(row for row in found.rows if row.name == "lm_head.weight")
    assert (head.status, head.bits, head.weights) == ("quantized", 8, 4000 * 2048)
    assert found.fraction == 1.0
