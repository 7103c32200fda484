"""Format "onnx": packed matrices as onnxruntime multiplies them, whole graphs of the model families, refusals."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hf_bitnet as hb
from hf_bitnet.export import Source
from hf_bitnet.export.onnx import Onnx
from hf_bitnet.export.onnx.blocks import Blocks, plan
from hf_bitnet.export.onnx.readers import compare_codes, compare_runtime, runtime_logits
from hf_bitnet.quantizers import WEIGHT_SCHEMES, Grid, Quantized, make_weight_quantizer
from hf_bitnet.quantizers.weight import WeightScheme
from tests.test_export import quantized
from tests.tiny import tiny

onnx: Any = pytest.importorskip("onnx", reason="the format's files are read by onnx: pip install 'hf_bitnet[onnx]'")
onnxruntime: Any = pytest.importorskip("onnxruntime", reason="it runs the graphs: pip install 'hf_bitnet[onnx]'")
pytest.importorskip("onnxscript", reason="torch.onnx.export needs it: pip install 'hf_bitnet[onnx]'")

SCHEMES = ("binary", "ternary", "int2", "int2_seq", "int4", "int8")
FAMILIES = ("llama", "qwen3", "gemma3", "mistral", "bitnet")


# ---- matrices ----


def run_operator(operator: str, how: Blocks, quantized: Quantized, x: Tensor, accuracy_level: int = 0) -> Tensor:
    """One operator over packed codes, by onnxruntime."""
    shape = {"bits": how.bits, "block_size": how.block}
    tensors = {"packed": how.pack(quantized), "scales": how.scales(quantized, torch.float32)}
    if how.zero is not None:
        tensors["zeros"] = how.zeros(torch.float32)
    if operator == "MatMulNBits":
        inputs, shape = ["x", *tensors], {**shape, "K": how.columns, "N": how.rows, "accuracy_level": accuracy_level}
    else:
        inputs, shape = ["packed", "x", "scales"], {**shape, "gather_axis": 0, "quantize_axis": 1}
        tensors = {"packed": tensors["packed"].flatten(1), "scales": tensors["scales"].view(how.rows, -1)}
    helper, kind = onnx.helper, onnx.TensorProto
    node = helper.make_node(operator, inputs, ["y"], domain="com.microsoft", **shape)
    numbers = kind.FLOAT if x.is_floating_point() else kind.INT64
    ends = [
        [helper.make_tensor_value_info("x", numbers, [None] * x.dim())],
        [helper.make_tensor_value_info("y", kind.FLOAT, None)],
    ]
    held = [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors.items()]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "one", *ends, held), opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("whole", [False, True], ids=["float zeros", "whole zeros"])
@pytest.mark.parametrize(("granularity", "group", "columns"), [("tensor", None, 80), ("channel", None, 100), ("group", 48, 96)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_matrix_is_exact(scheme: str, granularity: str, group: int | None, columns: int, whole: bool) -> None:
    """A product with the identity is the matrix itself; so are the rows of a table."""
    quantizer = make_weight_quantizer(scheme, granularity=granularity, group_size=group)
    codes = quantizer.quantize(torch.randn(10, columns))
    how = plan(quantizer, 10, columns, min_bits=2, float_zero=not whole)
    assert how.bits == {"int4": 4, "int8": 8}.get(scheme, 4 if scheme == "int2_seq" and whole else 2)
    assert bool(how.why) == (scheme == "int2_seq" and whole)
    assert columns % how.block == 0 or group is None
    matrix = run_operator("MatMulNBits", how, codes, torch.eye(columns)).T
    # with a float zero onnxruntime subtracts two products, each rounded
    torch.testing.assert_close(matrix, codes.dequantize(), rtol=0 if how.zero is None else 1e-6, atol=0)
    if whole:
        rows = run_operator("GatherBlockQuantized", how, codes, torch.arange(10).view(2, 5))
        assert torch.equal(rows[..., :columns].reshape(10, columns), codes.dequantize())


def test_int8_activations_have_kernels_for_the_blocks() -> None:
    """Blocks of the sizes that are chosen are multiplied as int8: the result is off, by less than 1 %."""
    for scheme in SCHEMES:
        quantizer = make_weight_quantizer(scheme, granularity="channel")
        for columns in (48, 256):
            codes, x = quantizer.quantize(torch.randn(16, columns)), torch.randn(3, columns)
            how = plan(quantizer, 16, columns, min_bits=2, float_zero=False)
            exact = x @ codes.dequantize().T
            error = (run_operator("MatMulNBits", how, codes, x, 4) - exact).norm() / exact.norm()
            assert 1e-4 < error < 1e-2, (scheme, columns, error)


def test_blocks_make_short_rows() -> None:
    def block(columns: int, **fields: Any) -> int:
        return plan(make_weight_quantizer("ternary", **fields), 4, columns, min_bits=2, float_zero=True).block

    assert [block(columns) for columns in (4096, 896, 80, 48, 32)] == [128, 128, 128, 64, 32]
    assert [block(768, granularity="group", group_size=size) for size in (768, 256, 192, 96, 48, 16)] == [
        128,
        128,
        64,
        32,
        16,
        16,
    ]
    assert plan(make_weight_quantizer("binary"), 4, 64, min_bits=4, float_zero=True).bits == 4
    assert not plan(make_weight_quantizer("binary"), 4, 64, min_bits=8, float_zero=True).why


class Thirds(WeightScheme):
    grid = Grid(lowest=-1, highest=1, step=2, zero_point=1 / 3)


def test_levels_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WEIGHT_SCHEMES._members, "thirds", Thirds)
    quantizer = make_weight_quantizer("thirds", "absmean", "channel")
    with pytest.raises(ValueError, match=r"2 levels -1\.33333 \.\. 0\.666667 are no whole or half numbers of 8 bits; quantize"):
        plan(quantizer, 4, 32, min_bits=2, float_zero=False)


def test_scale_that_float16_does_not_hold() -> None:
    quantizer = make_weight_quantizer("int8")
    how = plan(quantizer, 4, 32, min_bits=2, float_zero=True)
    with pytest.raises(ValueError, match=r"a scale is outside of torch\.float16; export with dtype='float32'"):
        how.scales(quantizer.quantize(torch.randn(4, 32) * 1e9), torch.float16)


# ---- one graph, looked at from all sides ----

OVERRIDES = {
    "q_proj": {"weight": "binary"},
    "k_proj": {"weight": "ternary"},
    "v_proj": {"weight": "int2", "granularity": "group", "group_size": 16},
    "o_proj": {"weight": "int2_seq"},
    "gate_proj": {"weight": "int4"},
    "up_proj": {"weight": "int8", "granularity": "tensor"},
}


@pytest.fixture(scope="module")
def mixed() -> Any:
    """A layer of every scheme, biases, a norm in front of some layers, and a quantized table that is tied to the head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fields = {"num_hidden_layers": 1, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
        model = tiny("llama", **fields)[0]
        config = hb.BitNetQuantizationConfig(
            weight="int4", overrides=OVERRIDES, embeddings="int4", sub_norm=["o_proj", "down_proj"]
        )
        model = hb.quantize_model(model, config)
        hb.set_norm_blend(model, 0.75)
        for name, parameter in model.named_parameters():
            if "sub_norm" in name:
                parameter.data.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def exported(mixed: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("onnx") / "out"
    before = copy.deepcopy(mixed.config.to_dict()), {k: v.clone() for k, v in mixed.state_dict().items()}
    report = hb.export_model(mixed, folder, format="onnx", progress=False)
    assert before[0] == mixed.config.to_dict() and not mixed.training
    assert all(torch.equal(value, mixed.state_dict()[key]) for key, value in before[1].items())
    return folder, report


def test_graph_of_every_scheme(mixed: Any, exported: tuple[Path, Any]) -> None:
    folder, report = exported
    assert [(check.reader, check.passed) for check in report.checks] == [("onnx", True), ("onnxruntime", True)]
    assert sum(report.kinds().values()) == len(report.tensors)
    stored = {tensor.name: tensor for tensor in report.tensors}
    bits = {name.split(".")[-2]: tensor.kind[0] for name, tensor in stored.items() if " bits " in tensor.kind}
    twos, fours = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "down_proj", "lm_head", "embed_tokens")
    assert bits == {**dict.fromkeys(twos, "2"), **dict.fromkeys(fours, "4"), "up_proj": "8"}
    assert stored["lm_head.weight"].stored == stored["model.embed_tokens.weight"].stored
    assert not report.fallbacks and "weights only: activations are float32" in report.notes[0]
    # nothing is stored that does not belong to a layer, and nothing of what was traced where
    assert (folder / "model.onnx.data").stat().st_size < sum(tensor.bytes for tensor in report.tensors) + 64 * 40
    text = (folder / "model.onnx").read_bytes()
    assert b".py" not in text and len(text) < 60_000
    onnx.checker.check_model(folder / "model.onnx")
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and config["architectures"] == ["LlamaForCausalLM"]


def test_any_batch_and_length(mixed: Any, exported: tuple[Path, Any]) -> None:
    plain = hb.dequantize_model(copy.deepcopy(mixed))
    for shape in ((1, 1), (3, 5), (2, 40)):
        assert_same_logits(exported[0], plain, torch.randint(3, 96, shape))


def assert_same_logits(folder: Path, plain: Any, ids: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(runtime_logits(folder, ids), plain(ids).logits, rtol=1e-4, atol=1e-4)


def test_padding_is_masked(mixed: Any, exported: tuple[Path, Any]) -> None:
    plain = hb.dequantize_model(copy.deepcopy(mixed))
    ids, mask = torch.randint(3, 96, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    session = onnxruntime.InferenceSession(str(exported[0] / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    with torch.no_grad():
        expected = plain(ids, attention_mask=mask).logits
    torch.testing.assert_close(torch.from_numpy(found)[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["weight", "scales", "zero_points"])
def test_gate_sees_a_changed_byte(mixed: Any, exported: tuple[Path, Any], tmp_path: Path, part: str) -> None:
    folder = shutil.copytree(exported[0], tmp_path / "changed")
    source = Source(mixed, None, "changed")
    names = {tensor.name.removesuffix(".weight"): tensor.stored for tensor in exported[1].tensors}
    stored = {name: names[name] for name in (*source.layers, *source.tables)}
    assert compare_codes(source, folder, stored, torch.float32).passed
    tensors = {tensor.name: tensor for tensor in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer}
    layer = "model.layers.0.self_attn.o_proj"
    place = {entry.key: entry.value for entry in tensors[f"model.{layer}.{part}"].external_data}
    with open(folder / "model.onnx.data", "r+b") as file:
        file.seek(int(place["offset"]) + 3)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    check = compare_codes(source, folder, stored, torch.float32)
    assert (check.passed, check.detail) == (False, f"{layer} is another")


# ---- refusals ----


def test_onnx_options_are_checked() -> None:
    for option, value, legal in (
        ("dtype", "bfloat16", "float32, float16"),
        ("accuracy_level", 2, "0, 4"),
        ("min_bits", 3, "2, 4, 8"),
        ("kv_cache", 1, "False, True"),
        ("opset", 17, "18, 19, 20, 21, 22, 23"),
    ):
        with pytest.raises(ValueError, match=f"format 'onnx': {option}={value!r}; legal: {legal}"):
            Onnx(**{option: value})  # type: ignore[arg-type]


def test_onnx_refuses_models(tmp_path: Path) -> None:
    def refused(model: Any, **options: Any) -> str:
        with pytest.raises(ValueError, match="format 'onnx' cannot hold this model") as caught:
            hb.export_model(model, tmp_path / "out", format="onnx", **options)
        return str(caught.value)

    for family in ("t5", "vit", "whisper"):
        assert "is no map from input_ids to logits, which the graph is; choose format='dense'" in refused(quantized(family))
    assert "generates no text, so that it has no keys and values" in refused(quantized("bert"), kv_cache=True)
    grouped = quantized(weight="int4", group_size=24, keep=["o_proj", "down_proj"])
    assert "q_proj: its scales are for groups of 24 inputs, the operator's blocks have 16, 32, 64, 128; quantize" in refused(
        grouped
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_onnx_names_the_package_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(ImportError, match=rf"needs the package {missing}: pip install 'hf_bitnet\[onnx\]'"):
        hb.export_model(quantized(), tmp_path / "out", format="onnx")


def test_onnx_without_onnxruntime(mixed: Any, exported: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    checks = Onnx().compare(Source(mixed, None, "mixed"), exported[0], exported[1].tensors, logits=True)
    assert [check.passed for check in checks] == [True, None] and "pip install" in checks[1].detail


def test_onnxruntime_that_cannot_run_it(exported: tuple[Path, Any], tmp_path: Path) -> None:
    shutil.copy(exported[0] / "model.onnx", tmp_path)  # without its data
    check = compare_runtime(tmp_path, torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3, 96), 1.0)
    assert check.passed is False and f"version {onnxruntime.__version__} cannot run it: " in check.detail


class Guesses(nn.Module):
    """A forward that looks at what it computed."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) if float(x.sum()) > 0 else x


def test_first_cause_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        try:
            raise TypeError("what went wrong\nand a long story")
        except TypeError as error:
            raise RuntimeError("step 1 of 3 failed") from error

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(
        ValueError, match=r"cannot follow LlamaForCausalLM \(what went wrong\); choose kv_cache=False, or another"
    ):
        hb.export_model(quantized(), tmp_path / "out", format="onnx", kv_cache=True, progress=False)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_model_that_cannot_be_traced(tmp_path: Path) -> None:
    model = quantized(keep=["layers.1"])
    model.lm_head = Guesses(model.lm_head)
    with pytest.raises(
        ValueError, match=r"torch\.onnx\.export cannot follow LlamaForCausalLM \(.*\); choose another format, for"
    ):
        hb.export_model(model, tmp_path / "out", format="onnx", progress=False)
    assert not any(tmp_path.iterdir())


# ---- all models ----


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_of_families(tmp_path: Path, family: str, scheme: str) -> None:
    layers: dict[str, Any] = {"num_hidden_layers": 1, **({"layer_types": ["sliding_attention"]} if family == "gemma3" else {})}
    model = hb.quantize_model(tiny(family, **layers)[0], hb.BitNetQuantizationConfig(weight=scheme))
    report = hb.export_model(model, tmp_path / "out", format="onnx", progress=False)
    assert [check.passed for check in report.checks] == [True, True], report


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "mixtral"])
def test_onnx_with_keys_and_values(tmp_path: Path, family: str) -> None:
    """The gate feeds the last tokens one at a time; here a text longer than the sliding window, and two texts at once."""
    model = quantized(family, weight="int4")
    report = hb.export_model(model, tmp_path / "out", format="onnx", kv_cache=True, progress=False)
    assert [check.passed for check in report.checks] == [True, True], report
    assert_same_logits(tmp_path / "out", hb.dequantize_model(model), torch.randint(3, 96, (2, 13)))
    inputs = [each.name for each in onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.input]
    assert inputs[:4] == ["input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value"]


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache", [False, True])
def test_window_longer_than_the_text_that_was_traced(tmp_path: Path, kv_cache: bool) -> None:
    model = hb.quantize_model(tiny("mistral", sliding_window=30)[0], hb.BitNetQuantizationConfig(weight="int4"))
    hb.export_model(model, tmp_path / "out", format="onnx", kv_cache=kv_cache, progress=False)
    assert_same_logits(tmp_path / "out", hb.dequantize_model(model), torch.randint(3, 96, (2, 45)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options", "fields"),
    [
        ("gpt2", {}, {"weight": "int4"}),
        ("bert", {}, {"weight": "ternary"}),
        ("mixtral", {}, {"weight": "ternary"}),
        ("llama", {"dtype": "float16"}, {"weight": "int8"}),
        ("gemma3", {"dtype": "float16", "kv_cache": True}, {"weight": "ternary", "embeddings": "int8"}),
        ("qwen3", {"accuracy_level": 4}, {"weight": "int2_seq", "embeddings": "int2_seq"}),
        ("llama", {"accuracy_level": 4}, {"weight": "ternary", "output_head": "int8"}),
        ("llama", {"opset": 18}, {"weight": "int2", "group_size": 16}),
        ("llama", {"opset": 23, "min_bits": 4}, {"weight": "binary"}),
        ("qwen3", {}, {"weight": "int2_seq", "embeddings": "int2_seq"}),
    ],
)
def test_onnx_options(tmp_path: Path, family: str, options: dict[str, Any], fields: dict[str, Any]) -> None:
    report = hb.export_model(quantized(family, **fields), tmp_path / "out", format="onnx", progress=False, **options)
    assert all(check.passed for check in report.checks) and len(report.checks) == 2 + ("accuracy_level" in options), report
    halves = fields["weight"] == "int2_seq"
    # a table takes whole zeros only, and so do products with int8 activations
    assert len(report.fallbacks) == (0 if not halves else 16 if "accuracy_level" in options else 2)
    assert not halves or "half numbers, which this operator holds doubled" in report.fallbacks[0].why


@pytest.mark.slow
def test_onnx_of_a_packed_bfloat16_folder(tmp_path: Path) -> None:
    model = quantized("qwen3", weight="ternary", embeddings="int4").bfloat16()
    hb.pack_model(model).save_pretrained(tmp_path / "packed")
    report = hb.export_model(tmp_path / "packed", tmp_path / "out", format="onnx", progress=False)
    assert [check.passed for check in report.checks] == [True, True], report
    assert np.dtype(np.float32) == onnx_types(tmp_path / "out")["model.model.norm.weight"]


def onnx_types(folder: Path) -> dict[str, Any]:
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return {tensor.name: onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type) for tensor in graph.initializer}


@pytest.mark.slow
def test_what_the_forward_does_not_use(tmp_path: Path) -> None:
    model: Any = tiny("llama", num_hidden_layers=1)[0]
    model.unused = nn.Linear(48, 48)
    kept = hb.quantize_model(copy.deepcopy(model), hb.BitNetQuantizationConfig(weight="int4", keep=["unused"]))
    report = hb.export_model(kept, tmp_path / "kept", format="onnx", progress=False)
    assert [tensor.name for tensor in report.fallbacks] == ["unused.weight", "unused.bias"]
    assert report.fallbacks[0].kind == "left out" and report.fallbacks[0].why == "the graph does not read it"
    both = hb.quantize_model(model, hb.BitNetQuantizationConfig(weight="int4"))
    with pytest.raises(ValueError, match="format 'onnx': a forward of input_ids does not use unused; choose format='dense'"):
        hb.export_model(both, tmp_path / "both", format="onnx", progress=False)
