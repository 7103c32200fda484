"""Format "hf_bitnet": the files of pack_model and save_pretrained, without a packed model; five ternary weights a byte."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import hf_bitnet as hb
from hf_bitnet.export import ParityError
from hf_bitnet.export import packed as exporter
from hf_bitnet.export.stream import Planned, write_safetensors
from hf_bitnet.modules import PackedBitLinear
from hf_bitnet.surgery import quantized_layers, quantized_tables
from tests.checkpoints import DISK, assert_same_layers, edit_config, edit_tensors, loaded, logits, read_config, reloaded
from tests.native import write_native
from tests.streaming import Watched
from tests.tiny import tiny

SCHEMES = ("binary", "ternary", "int2", "int4", "int8")
FAMILIES = ("llama", "qwen3", "gemma3", "mistral", "bitnet")
# (family, its config, fields): tables, ties, heads, norms, static activations, learned scales, groups, other families
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{f"{family} {scheme}": (family, {}, {"weight": scheme}) for family in FAMILIES for scheme in SCHEMES},
    "tied tables": ("qwen3", {}, {"embeddings": "ternary"}),
    "tables and head": ("llama", {"attention_bias": True}, {"embeddings": "int4", "output_head": "int8"}),
    "scaled table": ("gemma3", {}, {"embeddings": "int8"}),
    "norms": ("llama", {"mlp_bias": True}, {"sub_norm": ["o_proj", "down_proj"]}),
    "static": ("llama", {}, {"activation": "int8_static", "weight": "int4", "group_size": 16}),
    "learned": ("mistral", {}, {"weight": "int2_seq", "weight_scale": "learned"}),
    "learned estimator": ("llama", {}, {"ste": "learnable"}),
    "conv1d": ("gpt2", {}, {"weight": "int2_seq"}),
    "experts": ("mixtral", {}, {}),
    "mixed": ("llama", {}, {"overrides": {"o_proj": {"weight": "int4"}, "layers.0.mlp": "keep"}}),
    "encoder and decoder": ("t5", {}, {}),
    "pictures": ("vit", {}, {}),
}


def made(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A model in train form."""
    family, overrides, fields = VARIANTS[name]
    model, batch = tiny(family, **overrides)
    hb.quantize_model(model, hb.BitNetQuantizationConfig(**fields))
    hb.set_norm_blend(model, 1.0)
    if fields.get("activation") == "int8_static":
        hb.calibrate(model, [batch])
    return model, batch


def export(model: Any, folder: Path, **options: Any) -> Any:
    return hb.export_model(model, folder, format="hf_bitnet", progress=False, **{"verify": "codes", **options})


@pytest.mark.parametrize("name", VARIANTS)
def test_files_of_save_pretrained(name: str, tmp_path: Path) -> None:
    """The reference is `pack_model(model).save_pretrained()`: tensors, config, generation config."""
    model, batch = made(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = export(model, tmp_path / "out")
    assert [check.passed for check in report.checks] == [True, True]
    assert model.config.quantization_config.form == "train" and model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    packed = hb.pack_model(copy.deepcopy(model))
    packed.save_pretrained(tmp_path / "saved")
    expected, found = (load_file(tmp_path / each / "model.safetensors") for each in ("saved", "out"))
    assert expected.keys() == found.keys() == {each.stored for each in report.tensors}
    assert all(expected[key].dtype == found[key].dtype and torch.equal(expected[key], found[key]) for key in expected)
    for file in ("config.json", "generation_config.json"):
        paths = [tmp_path / each / file for each in ("saved", "out")]
        assert [path.exists() for path in paths] in ([True, True], [False, False])
        assert not paths[0].exists() or json.loads(paths[0].read_text()) == json.loads(paths[1].read_text())
    again = loaded(type(model), tmp_path / "out")
    assert torch.equal(logits(again, batch), logits(packed, batch))
    # of a packed model, and of that folder, the same files
    export(packed, tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in load_file(tmp_path / "again" / "model.safetensors").items())


@pytest.mark.parametrize("name", [name for name in VARIANTS if "ternary" in name or name in ("tied tables", "mixed", "conv1d")])
def test_trits(name: str, tmp_path: Path) -> None:
    """Loading lays them out as ever: the layers, the config and what save_pretrained writes are those of storage 'bits'."""
    model, batch = made(name)
    if name == "conv1d":
        with pytest.raises(ValueError, match="storage='trits' is for ternary weights, and this model has none; leave it out"):
            export(model, tmp_path / "trits", storage="trits")
        return
    report, bits = export(model, tmp_path / "trits", storage="trits"), export(model, tmp_path / "bits")
    assert [check.passed for check in report.checks] == [True, True]
    ternary = [each for each in report.tensors if each.kind == "1.6-bit"]
    assert ternary and all(each.bytes == each.shape[0] * -(-each.shape[1] // 5) for each in ternary)
    assert [each.why for each in report.fallbacks] == (["it has 15 levels, a trit has three"] * 2 if name == "mixed" else [])
    assert read_config(tmp_path / "trits")["hf_bitnet"]["storage"] == "trits" and report.bytes < bits.bytes
    packed = hb.pack_model(copy.deepcopy(model))
    again = loaded(type(model), tmp_path / "trits")
    assert_same_layers(again, packed)
    assert torch.equal(logits(again, batch), logits(packed, batch))
    assert again.config.quantization_config.fields() == packed.config.quantization_config.fields()
    twice = reloaded(again, tmp_path / "saved")
    assert "storage" not in read_config(tmp_path / "saved")["hf_bitnet"]
    assert torch.equal(logits(twice, batch), logits(packed, batch))
    saved, expected = (load_file(tmp_path / each / "model.safetensors") for each in ("saved", "bits"))
    assert saved.keys() == expected.keys() and all(torch.equal(saved[key], expected[key]) for key in saved)


def test_logits_of_another_process(tmp_path: Path) -> None:
    """A model in bfloat16, whose rotary frequencies `.bfloat16()` has rounded, in train form: bit for bit."""
    model, _ = tiny("qwen3")
    hb.quantize_model(model.bfloat16(), hb.BitNetQuantizationConfig(embeddings="int8"))
    report = export(model, tmp_path / "out", storage="trits", verify=True, max_shard_size="5KB")
    assert [check.passed for check in report.checks] == [True, True, True]
    assert report.checks[2].reader == "transformers with hf_bitnet, in another process"
    assert report.checks[2].detail.startswith("relative error 0,")
    assert len([name for name in report.files if name.endswith(".safetensors")]) > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_of_every_variant(name: str, tmp_path: Path) -> None:
    model, _ = made(name)
    report = export(model, tmp_path / "out", verify=True)
    assert [check.passed for check in report.checks] == [True, True, True], str(report)


def test_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no packed layer is ever made with its bytes."""
    model, _ = tiny("llama", num_hidden_layers=4)
    hb.quantize_model(model, hb.BitNetQuantizationConfig(weight="int4", embeddings="int8"))
    make_layer = PackedBitLinear.__init__

    def empty(self: Any, *args: Any, **kwargs: Any) -> None:
        assert kwargs["device"] == "meta", "a packed layer was made"
        make_layer(self, *args, **kwargs)

    monkeypatch.setattr(PackedBitLinear, "__init__", empty)
    watched = Watched(monkeypatch, exporter, model)
    export(model, tmp_path / "out", verify=False)
    assert len(watched.made) == 4 * 7 * 2 + 3


def test_loaded_native_models(tmp_path: Path) -> None:
    """Of transformers' own method: as `convert_native` and save_pretrained would write them."""
    for kind in ("packed", "online"):
        model, batch = tiny("llama", attention_bias=True)
        write_native(model, tmp_path / kind, kind, norms=True)
        native = hb.load_native(tmp_path / kind)
        report = export(native, tmp_path / f"{kind}-out")
        assert [check.passed for check in report.checks] == [True, True]
        expected = hb.convert_native(hb.load_native(tmp_path / kind))
        expected = hb.pack_model(expected) if kind == "online" else expected
        again = loaded(type(model), tmp_path / f"{kind}-out")
        assert_same_layers(again, expected)
        assert torch.equal(logits(again, batch), logits(expected, batch))


def test_refused(tmp_path: Path) -> None:
    model, _ = tiny("llama")
    hb.quantize_model(model, hb.BitNetQuantizationConfig(activation="int8_static"))
    with pytest.raises(ValueError, match=r"cannot hold this model: .*q_proj has a static activation range that was never"):
        export(model, tmp_path / "out")
    with pytest.raises(ValueError, match="storage='trit'; legal: bits, trits"):
        export(model, tmp_path / "out", storage="trit")
    model, _ = made("llama ternary")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"the weight of model\.layers\.1\.mlp\.up_proj holds 1 NaN"):
        export(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_wrong_codes_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for storage in ("bits", "trits"):
        model, _ = made("llama ternary")

        def write(folder: Path, tensors: list[Planned], **options: Any) -> Any:
            index = next(i for i, each in enumerate(tensors) if each.name.endswith("up_proj.weight"))
            make = tensors[index].make
            tensors[index] = tensors[index]._replace(make=lambda: torch.where(make() == 0, 1, 0).to(torch.uint8))
            return write_safetensors(folder, tensors, **options)

        monkeypatch.setattr(exporter, "write_safetensors", write)
        with pytest.raises(ParityError, match=r"up_proj\.weight has other codes"):
            export(model, tmp_path / "out", storage=storage)
    assert not any(tmp_path.iterdir())


def test_damaged_trits(tmp_path: Path) -> None:
    model, _ = made("llama ternary")
    name = "model.layers.0.mlp.up_proj.weight"
    kind = type(model)

    def folder(number: int) -> Path:
        export(model, tmp_path / str(number), storage="trits")
        return tmp_path / str(number)

    edit_tensors(folder(0), lambda tensors: tensors[name].view(-1)[7:8].fill_(250))
    with pytest.raises(ValueError, match=rf"{name} holds the byte 250, and five ternary weights make 242 at most"):
        kind.from_pretrained(tmp_path / "0")
    edit_tensors(folder(1), lambda tensors: tensors.update({name: tensors[name][:, 1:]}))
    words = rf"{name} has shape \(80, 9\) in the checkpoint, but \(80, 10\) by storage='trits' of its config.json"
    with pytest.raises(ValueError, match=words):
        kind.from_pretrained(tmp_path / "1")
    edit_tensors(folder(2), lambda tensors: tensors.update({name: tensors[name].float()}))
    with pytest.raises(ValueError, match=rf"{name} holds float numbers, but the checkpoint's config.json says form='packed'"):
        kind.from_pretrained(tmp_path / "2")
    path = folder(3) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is damaged or incomplete"):
        kind.from_pretrained(tmp_path / "3")
    edit_tensors(folder(4), lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"the checkpoint lacks {name}"):
        kind.from_pretrained(tmp_path / "4")
    # the config says another thing than the files
    edit_config(folder(5), lambda config: config["quantization_config"]["hf_bitnet"].pop("storage"))
    with pytest.raises(ValueError, match=r"has shape \(48, 16\) in the checkpoint, but \(48, 20\) by its config.json"):
        kind.from_pretrained(tmp_path / "5")
    edit_config(folder(6), lambda config: config["quantization_config"]["hf_bitnet"].update(storage="nibbles"))
    with pytest.raises(ValueError, match="says storage='nibbles', form='packed'; legal: 'bits' or 'trits'"):
        kind.from_pretrained(tmp_path / "6")
    edit_config(folder(7), lambda config: config["quantization_config"]["hf_bitnet"].update(form="train"))
    with pytest.raises(ValueError, match="says storage='trits', form='train'"):
        kind.from_pretrained(tmp_path / "7")


def test_trits_load_as_other_checkpoints_do(tmp_path: Path) -> None:
    """In part on the disk, as a base model, as a folder to export again, with a config given."""
    model, batch = made("llama ternary")
    export(model, tmp_path / "out", storage="trits")
    expected = logits(hb.pack_model(copy.deepcopy(model)), batch)
    mapped = type(model).from_pretrained(tmp_path / "out", device_map=DISK, offload_folder=tmp_path / "off")
    assert torch.equal(logits(mapped, batch), expected)
    base = type(model.model).from_pretrained(tmp_path / "out")
    assert len(list(quantized_layers(base))) == 14 and not quantized_tables(base)
    with torch.no_grad():
        assert torch.equal(model.lm_head(base(**batch).last_hidden_state), expected)
    export(tmp_path / "out", tmp_path / "again", storage="trits")
    one, other = (load_file(tmp_path / each / "model.safetensors") for each in ("out", "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert hb.BitNetQuantizationConfig.from_dict(read_config(tmp_path / "out")).to_dict() == read_config(tmp_path / "out")
    with pytest.raises(ValueError, match="has no field 'storage'"):
        hb.BitNetQuantizationConfig(storage="trits")  # type: ignore[call-arg]
