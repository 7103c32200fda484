"""Format "mlx": every scheme in mlx's affine layout, BitNet's own in rows; read by mlx-lm where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor
from transformers.integrations.bitnet import unpack_weights

import hf_bitnet as hb
from hf_bitnet.export import ExportReport, ParityError, mlx_check
from hf_bitnet.export import mlx as exporter
from hf_bitnet.export.stream import Planned, write_safetensors
from hf_bitnet.surgery import quantized_layers
from tests.streaming import Watched
from tests.tiny import tiny

SCHEMES = {"binary": 1, "ternary": 2, "int2": 2, "int2_seq": 2, "int4": 4, "int8": 8}
# of which 32 is the largest group of some, 64 of others
SIZES = {"hidden_size": 64, "intermediate_size": 160}


def made(family: str, fields: dict[str, Any], **overrides: Any) -> Any:
    sizes = {} if family in ("bitnet", "gpt2", "bert") else SIZES
    return hb.quantize_model(tiny(family, **{**sizes, **overrides})[0], hb.BitNetQuantizationConfig(**fields))


def export(model: Any, folder: Path, **options: Any) -> ExportReport:
    return hb.export_model(model, folder, format="mlx", progress=False, **options)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


@pytest.fixture
def without_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx_check, "is_installed", lambda: False)


def decoded(tensors: dict[str, Tensor], name: str, bits: int) -> np.ndarray[Any, Any]:
    """Values by the definition, word by word; independent of what wrote them."""
    stored = tensors[f"{name}.weight"].numpy()
    assert stored.dtype == np.uint32
    level = np.stack([(stored >> np.uint32(bits * i)) & np.uint32(2**bits - 1) for i in range(32 // bits)], axis=-1)
    level = level.reshape(len(stored), -1).astype(np.float32)
    scale, bias = (tensors[f"{name}.{part}"].float().numpy() for part in ("scales", "biases"))
    group = level.shape[1] // scale.shape[1]
    return level * scale.repeat(group, axis=1) + bias.repeat(group, axis=1)


@pytest.mark.usefixtures("without_mlx")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_values(scheme: str, dtype: str, tmp_path: Path) -> None:
    """Every code is there; in float32 every value too, bit for bit but for the roundings of the decoder's own product."""
    model, bits = made("llama", {"weight": scheme}, mlp_bias=True), SCHEMES[scheme]
    report = export(model, tmp_path / "out", dtype=dtype)
    assert [check.passed for check in report.checks] == [True, True, None]
    assert report.checks[2].detail == "not installed: pip install 'hf_bitnet[mlx]'" and not report.fallbacks
    config, tensors = read(tmp_path / "out")
    usual = {"group_size": 64, "bits": bits, "mode": "affine"}
    assert {key: config["quantization"][key] for key in usual} == usual and config["quantization"] == config[
        "quantization_config"
    ]
    assert config["quantization"]["model.layers.1.mlp.down_proj"] == usual | {"group_size": 32}
    layers = dict(quantized_layers(model))
    for name, layer in layers.items():
        found, quantized = torch.from_numpy(decoded(tensors, name, bits)), layer.quantized_weight()
        assert tensors[f"{name}.scales"].dtype == getattr(torch, dtype)
        value = quantized.dequantize()
        # the scale is rounded once; of the decoder's product of 8 bits and a scale, 255 ulps are left
        rounded, product = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}[dtype], 255 * 2**-24
        assert torch.allclose(found, value, rtol=rounded + 1e-6, atol=(2 * rounded + product) * float(quantized.scale.max()))
        assert not found[value == 0].any()  # 0 stays 0 where the grid has it
        assert len(found[0].unique()) == len(value[0].unique())
    assert tensors["model.layers.0.mlp.up_proj.bias"].dtype == getattr(torch, dtype)


@pytest.mark.usefixtures("without_mlx")
def test_groups_tables_and_kept_layers(tmp_path: Path) -> None:
    """Mixed bits; a table; a layer that is kept, one whose groups are too small, one whose groups are asked for larger."""
    overrides = {"q_proj": "keep", "o_proj": {"weight": "int8"}, "k_proj": {"weight": "int4", "group_size": 16}}
    model = made("qwen3", {"weight": "int4", "embeddings": "int8", "overrides": overrides})
    report = export(model, tmp_path / "out", group_size=64)
    config, tensors = read(tmp_path / "out")
    said = config["quantization"]
    assert {key: value for key, value in said.items() if not key.startswith("model.")} == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
    }
    assert said["model.embed_tokens"]["bits"] == said["model.layers.0.self_attn.o_proj"]["bits"] == 8
    assert said["model.layers.0.mlp.down_proj"]["group_size"] == 32
    assert not any("q_proj" in name or "k_proj" in name or "lm_head" in name for name in said)
    assert not any(name.startswith("lm_head") for name in tensors)  # tied
    whys = {each.name: (each.kind, each.why) for each in report.fallbacks}
    small = "32 does not divide the 16 inputs that share a scale"
    assert whys.pop("model.layers.0.mlp.down_proj.weight") == (
        "4-bit in groups of 32",
        "64 does not divide the 160 inputs that share a scale",
    )
    assert whys.pop("model.layers.0.self_attn.k_proj.weight") == ("bfloat16", small)
    assert {why for _, why in whys.values()} == {small, "64 does not divide the 160 inputs that share a scale"}
    value = model.model.layers[0].self_attn.k_proj.quantized_weight().dequantize(torch.bfloat16)
    assert torch.equal(tensors["model.layers.0.self_attn.k_proj.weight"], value)
    assert report.kinds()["8-bit in groups of 64"] == 3
    wide = export(made("llama", {"weight": "binary"}), tmp_path / "wide", min_bits=2)
    assert wide.kinds()["2-bit in groups of 64"] == 12
    assert not any("0.32" in note for note in wide.notes) and any("0.32" in note for note in _notes(tmp_path))


def _notes(folder: Path) -> list[str]:
    return export(made("llama", {"weight": "binary"}), folder / "one").notes


@pytest.mark.usefixtures("without_mlx")
def test_packed_and_folders(tmp_path: Path) -> None:
    """The same files from a packed model and from its folder, in shards."""
    model = made("mistral", {"weight": "int2"})
    export(model, tmp_path / "train")
    hb.pack_model(model).save_pretrained(tmp_path / "saved")
    export(tmp_path / "saved", tmp_path / "packed", max_shard_size="20KB")
    files = sorted((tmp_path / "packed").glob("model-*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = read(tmp_path / "train")[1]
    assert len(files) > 1 and found.keys() == expected.keys()
    assert all(torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in found)


@pytest.mark.parametrize("family", ["llama", "bitnet"])
def test_one_tensor_at_a_time(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(family, {})
    watched = Watched(monkeypatch, exporter, model)
    export(model, tmp_path / "out", verify=False, dtype="float32")
    assert len(watched.made) == 14 * (3 if family == "llama" else 2)


def test_plain_transformers_stops(tmp_path: Path) -> None:
    """It must not take mlx's words for floats."""
    model = made("llama", {})
    export(model, tmp_path / "out", verify=False)
    with pytest.raises(ValueError, match="quant_method"):
        type(model).from_pretrained(tmp_path / "out")


@pytest.mark.usefixtures("without_mlx")
@pytest.mark.parametrize("family", ["bitnet", "llama"])
def test_rows(family: str, tmp_path: Path) -> None:
    """Layout "bitnet": mlx-lm's BitNet multiplies by the scale, its other models divide, as config.json says."""
    model = made(family, {})
    report = export(model, tmp_path / "out", **({} if family == "bitnet" else {"layout": "bitnet"}))
    assert [check.passed for check in report.checks] == [True, True, None]
    config, tensors = read(tmp_path / "out")
    settings, name = config["quantization_config"], "model.layers.0.mlp.up_proj"
    assert "quantization" not in config and settings["quant_method"] == "bitnet"
    assert settings["linear_class"] == ("autobitlinear" if family == "bitnet" else "bitlinear")
    assert "lm_head" in settings["modules_to_not_convert"]
    quantized = dict(quantized_layers(model))[name].quantized_weight()
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(unpack_weights(tensors[f"{name}.weight"], torch.int8), quantized.codes)
    scale = quantized.scale if family == "bitnet" else 1 / quantized.scale
    assert torch.equal(tensors[f"{name}.weight_scale"], scale.reshape(1).bfloat16())
    assert "mlx-lm runs this layout on Apple GPUs only" in report.notes


def test_reader_settings(tmp_path: Path) -> None:
    """Where mlx-lm looks for what transformers 5 keeps under rope_parameters."""
    options = {"verify": False}
    llama3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 |= {"original_max_position_embeddings": 32}
    export(made("llama", {}, rope_parameters=llama3), tmp_path / "llama", **options)
    config, _ = read(tmp_path / "llama")
    assert (
        config["rope_theta"] == 5e5 and config["rope_scaling"]["type"] == "llama3" and config["rope_scaling"]["factor"] == 8.0
    )
    export(made("gemma3", {}), tmp_path / "gemma3", **options)
    config, _ = read(tmp_path / "gemma3")
    assert (config["rope_theta"], config["rope_local_base_freq"], config["sliding_window_pattern"]) == (1e6, 1e4, 2)
    report = export(made("mistral", {}, sliding_window=32), tmp_path / "mistral", **options)
    assert any("a window of 32 tokens: beyond it they differ" in note for note in report.notes)


@pytest.mark.parametrize(
    ("family", "overrides", "fields", "options", "words"),
    [
        ("gpt2", {}, {}, {}, r"not made for GPT2LMHeadModel \(gpt2\); export as 'dense' and try mlx_lm.convert"),
        ("bert", {}, {}, {}, r"not made for BertForSequenceClassification"),
        ("llama", {}, {"sub_norm": ["o_proj"]}, {}, r"o_proj has a norm in front \(sub_norm\), for which mlx-lm has no place"),
        ("llama", {"hidden_act": "gelu"}, {}, {}, r"mlx-lm's llama computes silu, and this model gelu"),
        ("qwen3", {"attention_bias": True}, {}, {}, r"mlx-lm's qwen3 has no bias in model\.layers\.0\.self_attn\.q_proj"),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention"]}, {}, {}, r"full attention in every n-th layer"),
        (
            "llama",
            {"hidden_size": 48, "head_dim": 12, "intermediate_size": 80},
            {},
            {},
            r"no weight has groups of 32 .*\[48, 80\]",
        ),
        ("bitnet", {}, {}, {"layout": "affine"}, r"mlx-lm's bitnet has layers of layout='bitnet' only"),
        ("bitnet", {}, {"weight": "int4"}, {}, r"q_proj cannot be written in the native 'bitnet' format: it is int4"),
        (
            "bitnet",
            {},
            {"keep": ["o_proj"]},
            {},
            r"layers\.0\.self_attn\.o_proj is kept, and mlx-lm's bitnet has no plain layer",
        ),
        ("llama", {}, {"embeddings": "int8"}, {"layout": "bitnet"}, r"no packed embeddings"),
    ],
)
def test_refused(
    family: str, overrides: dict[str, Any], fields: dict[str, Any], options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = made(family, fields, **overrides)
    hb.set_norm_blend(model, 1.0)
    with pytest.raises(ValueError, match=rf"format 'mlx' cannot hold this model: .*{words}"):
        export(model, tmp_path / "out", **options)
    assert not any(tmp_path.iterdir())


def test_wrong_options(tmp_path: Path) -> None:
    model = made("llama", {})
    for option, words in (
        ({"layout": "rows"}, "layout='rows'; legal: None, affine, bitnet"),
        ({"dtype": "int8"}, "dtype='int8'; legal: bfloat16, float16, float32"),
        ({"group_size": 16}, "group_size=16; legal: None, 128, 64, 32"),
        ({"min_bits": 3}, "min_bits=3; legal: 1, 2, 4, 8"),
    ):
        with pytest.raises(ValueError, match=words):
            export(model, tmp_path / "out", **option)


@pytest.mark.usefixtures("without_mlx")
def test_wrong_files_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for family, leaf, words in (
        ("llama", "up_proj.weight", "up_proj.weight has other levels"),
        ("llama", "up_proj.biases", "up_proj.biases is another"),
        ("bitnet", "up_proj.weight", "up_proj.weight has other codes"),
    ):

        def write(folder: Path, tensors: list[Planned], leaf: str = leaf, **options: Any) -> Any:
            index = next(i for i, each in enumerate(tensors) if each.name.endswith(leaf))
            plan = tensors[index]
            tensors[index] = tensors[index]._replace(make=lambda: plan.tensor().flip(0))
            return write_safetensors(folder, tensors, **options)

        monkeypatch.setattr(exporter, "write_safetensors", write)
        with pytest.raises(ParityError, match=words):
            export(made(family, {} if family == "bitnet" else {"weight": "int4"}), tmp_path / "out")
    assert not any(tmp_path.iterdir())


# ---- mlx-lm itself ----

mlx_lm = pytest.mark.skipif(not mlx_check.is_installed(), reason="mlx-lm is not installed: pip install 'hf_bitnet[mlx]'")


def assert_read(report: ExportReport) -> None:
    assert [check.passed for check in report.checks] == [True, True, True, True], str(report)
    assert [check.what for check in report.checks[2:]] == ["levels", "logits"]
    assert all(check.reader.startswith("mlx-lm ") for check in report.checks[2:])


@mlx_lm
def test_read_by_mlx(tmp_path: Path) -> None:
    """Biases, scaled rotary embedding, groups of two sizes, two schemes, a quantized table and head."""
    llama3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    overrides = {"attention_bias": True, "rope_parameters": llama3 | {"original_max_position_embeddings": 32}}
    fields = {"weight": "int4", "embeddings": "int8", "output_head": "int4", "overrides": {"v_proj": {"weight": "binary"}}}
    assert_read(export(made("llama", fields, **overrides), tmp_path / "out"))


@mlx_lm
@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral"])
def test_matrix(family: str, scheme: str, tmp_path: Path) -> None:
    """Logits within 1e-4 in float32, of scales in bfloat16."""
    overrides = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    tables = {"embeddings": "int8"} if family in ("qwen3", "gemma3") else {}
    assert_read(export(made(family, {"weight": scheme, **tables}, **overrides), tmp_path / "out"))


@mlx_lm
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "bitnet"])
def test_dtypes(family: str, dtype: str, tmp_path: Path) -> None:
    layout = {"layout": "bitnet"} if family == "llama" else {}
    report = export(made(family, {}), tmp_path / "out", dtype=dtype, **layout)
    assert_read(report)
    assert ("plain arithmetic for its GPU kernel" in report.checks[3].reader) == (family != "gemma3")


@mlx_lm
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Qwen2", "Phi3"])
def test_other_models(kind: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, **SIZES}
    rope = (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4, "partial_rotary_factor": 0.5}} if kind == "Phi3" else {}
    )
    config = getattr(tf, f"{kind}Config")(**sizes, **rope, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(tf, f"{kind}ForCausalLM")(config).float().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    assert_read(export(hb.quantize_model(model, hb.BitNetQuantizationConfig(weight="int2_seq")), tmp_path / "out"))


@mlx_lm
def test_mlx_sees_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that the files do not tell: without it mlx-lm computes another rotary embedding."""
    monkeypatch.setattr(exporter, "reader_settings", lambda *unused: {})
    model = made("llama", {}, rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    with pytest.raises(ParityError, match=r"mlx-lm .*, logits: relative error 0\.\d+, limit 0\.0001"):
        export(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())
