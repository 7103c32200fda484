"""What every export format has in common: whole or not there, compared with what was written, refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import hf_bitnet as hb
from hf_bitnet.export import ExportReport, ParityError, Source, WrittenTensor, plain
from hf_bitnet.export.stream import planned, write_safetensors
from tests.tiny import tiny


def quantized(family: str = "llama", **fields: Any) -> Any:
    return hb.quantize_model(tiny(family)[0], hb.BitNetQuantizationConfig(**fields))


@pytest.mark.parametrize("form", ["train", pytest.param("packed", marks=pytest.mark.slow), "folder"])
def test_dense_export(tmp_path: Path, form: str) -> None:
    """Of a model in either form, or of a folder; read by plain transformers."""
    model: Any = quantized(weight="int4", embeddings="int8")
    weight = model.model.layers[1].mlp.down_proj.quantized_weight().dequantize()
    if form != "train":
        hb.pack_model(model)
    if form == "folder":
        model.save_pretrained(tmp_path / "packed")
        model = tmp_path / "packed"
    report = hb.export_model(model, tmp_path / "out", format="dense", dtype="float32", progress=False)
    assert [check.passed for check in report.checks] == [True, True]
    assert torch.equal(hb.open_model(tmp_path / "out").model.layers[1].mlp.down_proj.weight, weight)
    saved = json.loads((tmp_path / "out" / "export.json").read_text())
    assert saved["checks"][1]["reader"] == "transformers without hf_bitnet" and saved["format"] == "dense"
    assert "| safetensors | quantized values | equal |" in ModelCard.load(tmp_path / "out" / "README.md").text
    assert report.kinds() == {"float32": len(report.tensors)} and "float32" in str(report)


@pytest.mark.parametrize("family", ["vit", "t5", "mixtral"])
def test_names_on_disk(tmp_path: Path, family: str) -> None:
    """Of models whose checkpoints have other names than their modules, or other tensors."""
    report = hb.export_model(quantized(family), tmp_path / "out", format="dense", progress=False, verify="codes")
    assert [check.passed for check in report.checks] == [True]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert set(opened.keys()) == {each.stored for each in report.tensors}


@pytest.mark.parametrize("form", ["train", "packed"])
def test_a_tied_quantized_table_is_written_once(tmp_path: Path, form: str) -> None:
    """The reference is save_pretrained of the dequantized model; a head of its own stays."""
    for family, count in (("qwen3", 1), ("llama", 2)):
        head = {"output_head": "int8"} if count == 2 else {}
        model = quantized(family, embeddings="int8", **head)
        model = hb.pack_model(model) if form == "packed" else model
        path = tmp_path / family
        hb.export_model(model, path / "out", format="dense", dtype="float32", progress=False, verify="codes")
        hb.dequantize_model(model, dtype=torch.float32).save_pretrained(path / "saved")
        found, expected = (load_file(path / each / "model.safetensors") for each in ("out", "saved"))
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
        assert len(found.keys() & {"lm_head.weight", "model.embed_tokens.weight"}) == count


def test_export_refuses(tmp_path: Path) -> None:
    model = quantized()
    with pytest.raises(TypeError, match="takes a transformers model or the path of one, got Linear"):
        hb.export_model(nn.Linear(2, 2), tmp_path / "out", format="dense")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"not quantized; call quantize_model\(model, config\) first"):
        hb.export_model(tiny("llama")[0], tmp_path / "out", format="dense")
    with pytest.raises(ValueError, match="unknown export format 'gguff'"):
        hb.export_model(model, tmp_path / "out", format="gguff")
    with pytest.raises(TypeError, match="has no option 'dtyp'; its options are dtype, max_shard_size"):
        hb.export_model(model, tmp_path / "out", format="dense", dtyp="float32")
    with pytest.raises(ValueError, match="dtype='int8'; legal: bfloat16, float16, float32"):
        hb.export_model(model, tmp_path / "out", format="dense", dtype="int8")
    with pytest.raises(ValueError, match="verify='logits'; legal: True"):
        hb.export_model(model, tmp_path / "out", format="dense", verify="logits")
    with pytest.raises(ValueError, match="there is no folder"):
        hb.export_model("./nowhere", tmp_path / "out", format="dense")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    with pytest.raises(ValueError, match=r"is not empty; choose another one"):
        hb.export_model(model, tmp_path / "out", format="dense")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_difference_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def another(folder: Path, *unused: Any, **options: Any) -> dict[str, Tensor]:
        return {"logits": torch.zeros(1, 24, 96)}

    monkeypatch.setattr(plain, "run_plain", another)
    with pytest.raises(ParityError, match=r"not the model that was written .*relative error 1, limit 0\.0001") as caught:
        hb.export_model(quantized(), tmp_path / "out", format="dense", progress=False)
    assert [check.passed for check in caught.value.checks] == [True, False]
    assert not any(tmp_path.iterdir())
    report = hb.export_model(quantized(), tmp_path / "out", format="dense", progress=False, verify="codes")
    assert len(report.checks) == 1


def test_safetensors_written_in_a_stream(tmp_path: Path) -> None:
    """The bytes are those of any safetensors file, in shards as transformers would cut them."""
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.arange(5, dtype=torch.uint8),
        "d": torch.tensor(2.5),
        "e": torch.randn(4, 6).T,
    }
    counted: list[int] = []
    for size in ("5GB", 100):
        folder = tmp_path / str(size)
        folder.mkdir()
        files = write_safetensors(
            folder, [planned(k, v) for k, v in tensors.items()], max_shard_size=size, progress=counted.append
        )
        back = {key: value for file in files for key, value in load_file(file).items()}
        assert back.keys() == tensors.keys() and all(torch.equal(back[key], tensors[key]) for key in tensors)
    assert len(files) > 1 and (tmp_path / "100" / "model.safetensors.index.json").is_file()
    assert sum(counted) == 2 * sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize(
    "fields", [{}, {"weight": "int4", "group_size": 16}, {"weight": "binary"}, {"weight": "int8"}], ids=str
)
def test_blocks_of_rows(fields: dict[str, Any]) -> None:
    """A packed layer unpacked in parts is the layer."""
    model: Any = hb.pack_model(quantized(**fields, embeddings="int4"))
    for layer in (model.model.layers[0].mlp.down_proj, model.model.embed_tokens):
        whole, parts = layer.quantized_weight(), list(Source.blocks(layer, weights=300))
        assert len(parts) > 4
        assert torch.equal(torch.cat([part.codes for part in parts]), whole.codes)
        values = torch.cat([part.dequantize() for part in parts])
        assert torch.equal(values, whole.dequantize())


def test_fallbacks_of_one_reason_are_one_line() -> None:
    def written(name: str, kind: str, why: str = "") -> WrittenTensor:
        return WrittenTensor(name, name, kind, (2, 192), 24, why)

    tensors = [written("a", "Q2_0", "too narrow"), written("b", "Q2_0", "too narrow"), written("c", "Q8_0", "no grid")]
    report = ExportReport("gguf", "out", {}, [*tensors, written("d", "TQ2_0")], [], [], {}, 0.1, {})
    lines = [line for line in str(report).splitlines() if line.startswith("fallback")]
    assert lines == ["fallback: 2 tensors (a, ...) as Q2_0: too narrow", "fallback: c as Q8_0: no grid"]
