"""GGUF files become packed models: every type and architecture against the model that was written, transformers' own reading
of the same file, and ggml's own decoders; damaged files are refused."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from hf_bitnet import coverage, import_model
from hf_bitnet.gguf_file import GGUFFile
from hf_bitnet.importing.codes import Found, Levels, fit
from hf_bitnet.importing.gguf_types import layer_weight
from hf_bitnet.surgery import quantized_layers
from tests import foreign
from tests.checkpoints import assert_same_layers, loaded, logits
from tests.foreign import (
    F16,
    F32,
    I2_S,
    Q1_0,
    Q2_0,
    Q2_K,
    Q4_0,
    Q8_0,
    TQ1_0,
    TQ2_0,
    assert_values,
    model_to_gguf,
    onto_grid,
    projections,
    values_of,
    wide,
)

gguf = pytest.importorskip("gguf", reason="pip install 'hf_bitnet[gguf]'")

TERNARY = [-1.0, 0.0, 1.0]
# type -> (levels, bits of a level, weights of a block)
TYPES: dict[int, tuple[list[float], int, int | None]] = {
    TQ1_0: (TERNARY, 2, 256),
    TQ2_0: (TERNARY, 2, 256),
    Q2_0: (TERNARY, 2, 64),
    Q1_0: ([-1.0, 1.0], 1, 128),
    Q4_0: ([-7.0, -1.0, 0.0, 1.0, 7.0], 4, 32),
    I2_S: (TERNARY, 2, None),
}
ARCHITECTURES = [
    ("llama", "llama"),
    ("llama", "mistral"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
    ("phi3", "phi3"),
    ("gemma3", "gemma3"),
    ("bitnet-b1.58", "bitnet"),
    ("bitnet-25", "bitnet"),
]
# every architecture with one type, every type with one architecture; the rest of the product is slow
FAST = [(architecture, family, TQ2_0) for architecture, family in ARCHITECTURES] + [("llama", "llama", kind) for kind in TYPES]
ALL = [(architecture, family, kind) for architecture, family in ARCHITECTURES for kind in TYPES]
MATRIX = [*FAST, *(pytest.param(*each, marks=pytest.mark.slow) for each in ALL if each not in FAST)]


# ---- what is read ----


@pytest.mark.parametrize(("architecture", "family", "kind"), MATRIX)
def test_matrix(architecture: str, family: str, kind: int, tmp_path: Path) -> None:
    levels, bits, _ = TYPES[kind]
    # 64 is the scale of attention that this architecture has by its sizes
    model, batch = wide(family, **({"query_pre_attn_scalar": 64} if family == "gemma3" else {"num_hidden_layers": 1}))
    onto_grid(model, levels)
    model.save_pretrained(tmp_path / "float")
    path = model_to_gguf(tmp_path / "model.gguf", model, architecture, kind)
    # the file as written here does not say which layers look how far back
    base = str(tmp_path / "float") if family == "gemma3" else None
    # of bitnet.cpp's own type it is known how inputs are quantized
    assert import_model(path, base=base).config.quantization_config.activation == ("int8" if kind == I2_S else "none")
    imported = import_model(path, base=base, activation="none")
    assert_values(imported, model)
    assert torch.allclose(logits(imported, batch), logits(model, batch), rtol=0, atol=5e-5)
    for _, layer in quantized_layers(imported):
        assert layer.quantizer.storage_bits == bits and layer.quantizer.granularity == "tensor"
    assert imported.config.quantization_config.activation == "none" and imported.dtype == torch.float32
    imported.save_pretrained(tmp_path / "again")
    again = loaded(type(imported), tmp_path / "again")
    assert_same_layers(again, imported)
    assert torch.equal(logits(again, batch), logits(imported, batch))


@pytest.mark.parametrize("kind", [TQ1_0, TQ2_0, Q8_0, Q4_0])
@pytest.mark.parametrize(("architecture", "family"), [("llama", "llama"), ("phi3", "phi3"), ("gemma3", "gemma3")])
def test_as_transformers_reads_it(architecture: str, family: str, kind: int, tmp_path: Path) -> None:
    """Every tensor, from the same file, by its own reader of GGUF."""
    # its reader leaves out the scale of attention, and takes 256
    changes = {"llama": {"hidden_act": "silu"}, "gemma3": {"head_dim": 256}}
    model, batch = wide(family, **changes.get(family, {}))
    onto_grid(model, TERNARY if kind != Q4_0 else TYPES[Q4_0][0], groups=None if kind != Q8_0 else 32)
    model_to_gguf(tmp_path / "model.gguf", model, architecture, kind, table=F16)
    theirs: Any = tf.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    imported = import_model(tmp_path)
    assert_values(imported, theirs)
    state = theirs.state_dict()
    floats = {name: tensor for name, tensor in imported.state_dict().items() if tensor.dtype == torch.float32}
    assert all(torch.equal(tensor, state[name]) for name, tensor in floats.items() if "weight_scale" not in name)
    assert torch.allclose(logits(imported, batch), logits(theirs, batch), rtol=0, atol=5e-5)


@pytest.mark.parametrize("kind", [kind for kind, (_, _, block) in TYPES.items() if block])
def test_scales_of_blocks(kind: int, tmp_path: Path) -> None:
    levels, _, block = TYPES[kind]
    model, batch = wide("llama", num_hidden_layers=1)
    onto_grid(model, [level for level in levels if level] if kind == Q2_0 else levels, groups=block)
    imported = import_model(model_to_gguf(tmp_path / "model.gguf", model, "llama", kind))
    assert_values(imported, model)
    assert torch.allclose(logits(imported, batch), logits(model, batch), rtol=0, atol=5e-5)
    down = dict(quantized_layers(imported))["model.layers.0.mlp.down_proj"]
    assert down.quantizer.group_size == block and down.quantized_weight().scale.shape == (256, 512 // (block or 1))


def test_ternary_weights_in_a_wide_type(tmp_path: Path) -> None:
    """Where 256 does not divide a row, converters fall back to Q8_0; the layer is still ternary, by the file's own numbers."""
    model, _ = wide("llama")
    onto_grid(model, TERNARY)
    imported = import_model(model_to_gguf(tmp_path / "model.gguf", model, "llama", Q8_0))
    for name, layer in quantized_layers(imported):
        assert layer.quantizer.scheme == "ternary" and layer.quantizer.granularity == "tensor", name
        stored = np.float32(np.float16(foreign.SCALE / 127)) * 127
        assert layer.quantized_weight().scale.item() == stored


@pytest.mark.parametrize("kind", [F16, Q8_0, TQ1_0, Q2_0, Q1_0])
def test_tables(kind: int, tmp_path: Path) -> None:
    """Embeddings and heads become floats, of any type."""
    model, _ = wide("llama", num_hidden_layers=1)
    onto_grid(model, TERNARY)
    for table in (model.model.embed_tokens, model.lm_head):
        table.weight.data = torch.where(torch.rand_like(table.weight) < 0.5, -foreign.SCALE, foreign.SCALE)
    path = model_to_gguf(tmp_path / "model.gguf", model, "llama", TQ2_0, table=kind)
    imported = import_model(path)
    assert_values(imported, model)
    limit = 1e-3 if kind == Q8_0 else 0.0  # whose scale is rounded
    assert torch.allclose(imported.lm_head.weight, model.lm_head.weight, rtol=limit, atol=0)
    assert torch.allclose(imported.model.embed_tokens.weight, model.model.embed_tokens.weight, rtol=limit, atol=0)


@pytest.mark.parametrize("kind", [F16, F32])
def test_floats_on_a_grid(kind: int, tmp_path: Path) -> None:
    model, _ = wide("llama", num_hidden_layers=1)
    onto_grid(model, TERNARY)
    model.model.layers[0].mlp.up_proj.weight.data.normal_()
    path = model_to_gguf(tmp_path / "model.gguf", model, "llama", kind)
    imported = import_model(path)
    names = {name for name, _ in quantized_layers(imported)}
    assert names == set(projections(model)) - {"model.layers.0.mlp.up_proj"}
    assert "kept by the config" in str(coverage(imported))


def test_q2_k_on_a_grid(tmp_path: Path) -> None:
    """What a Q2_K file holds is found by its values: here d = 1/4, scale 1, minimum 1: -1/4, 0, 1/4, 1/2."""
    model, _ = wide("llama", num_hidden_layers=1)
    name, shape = "blk.0.ffn_up.weight", (512, 256)
    fields = torch.randint(0, 3, (512, 64), dtype=torch.uint8)
    codes = fields | fields.roll(1, 0) << 2 | fields.roll(2, 0) << 4 | fields.roll(3, 0) << 6
    blocks = np.concatenate(
        [
            np.full((512, 16), 0x11, np.uint8),
            codes.numpy(),
            np.tile(np.array([0.25, 0.25], np.float16).view(np.uint8), (512, 1)),
        ],
        axis=1,
    )
    onto_grid(model, TERNARY)
    path = model_to_gguf(tmp_path / "model.gguf", model, "llama", TQ2_0, changes={name: (shape, Q2_K, blocks.tobytes())})
    layer = dict(quantized_layers(import_model(path)))["model.layers.0.mlp.up_proj"]
    assert layer.quantizer.scheme == "ternary" and layer.quantized_weight().scale.tolist() == [[0.25]]
    expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q2_K)
    assert torch.equal(layer.quantized_weight().dequantize(), torch.from_numpy(expected))


@pytest.mark.parametrize("form", ["packed", "train"])
def test_forms_and_options(form: str, tmp_path: Path) -> None:
    model, batch = wide("llama")
    onto_grid(model, TERNARY)
    model_to_gguf(tmp_path / "model.gguf", model, "llama", TQ2_0)
    imported = import_model(tmp_path, form=form, activation="int8")
    assert_values(imported, model)
    assert imported.config.quantization_config.activation == "int8"
    noise = (logits(imported, batch) - logits(model, batch)).std() / logits(model, batch).std()
    assert 0 < noise < 0.05
    assert import_model(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def beside(name: str, architecture: str, *values: float) -> dict[str, foreign.Stored]:
    """A further scale of a parameter, in a tensor by itself."""
    stored = foreign.gguf_name(f"{name}.weight", architecture).removesuffix("weight") + "scale"
    return {stored: ((len(values),), F32, np.float32(values).tobytes())}


@pytest.mark.parametrize("kind", [TQ2_0, I2_S, F16, F32])
def test_scale_beside_a_layer(kind: int, tmp_path: Path) -> None:
    """llama.cpp's own converter of BitNet keeps the scale in a tensor by itself."""
    model, _ = wide("bitnet", hidden_act="silu", tie_word_embeddings=True)
    onto_grid(model, TERNARY, scale=1.0)
    changes = {key: each for name in projections(model) for key, each in beside(name, "bitnet", 0.3).items()}
    imported = import_model(model_to_gguf(tmp_path / "model.gguf", model, "bitnet", kind, changes=changes))
    assert imported.config.hidden_act == "silu"
    for name, value in values_of(imported).items():
        assert torch.equal(value, projections(model)[name].weight * torch.tensor(0.3))


def test_scale_beside_floats(tmp_path: Path) -> None:
    """Of the output head, and of a layer that lies on no grid."""
    model, _ = wide("llama", num_hidden_layers=1)
    onto_grid(model, TERNARY)
    kept = "model.layers.0.mlp.up_proj"
    model.get_submodule(kept).weight.data.normal_()
    up = {"blk.0.ffn_up.weight": ((512, 256), F32, foreign.encoded(model.get_submodule(kept).weight, F32))}
    changes = {**beside("lm_head", "llama", 0.3), **beside(kept, "llama", 0.7), **up}
    imported = import_model(model_to_gguf(tmp_path / "model.gguf", model, "llama", TQ2_0, changes=changes))
    assert torch.equal(imported.lm_head.weight, model.lm_head.weight * torch.tensor(0.3))
    assert torch.equal(imported.get_submodule(kept).weight, model.get_submodule(kept).weight * torch.tensor(0.7))


@pytest.mark.parametrize("values", [(0.3, 0.3), (math.nan,), (math.inf,), (0.0,), (-1.0,)])
@pytest.mark.parametrize("kind", [TQ2_0, F32])
def test_scales_beside_that_are_none(kind: int, values: tuple[float, ...], tmp_path: Path) -> None:
    model, _ = wide("llama", num_hidden_layers=1)
    onto_grid(model, TERNARY)
    changes = beside("model.layers.0.mlp.up_proj", "llama", *values)
    path = model_to_gguf(tmp_path / "model.gguf", model, "llama", kind, changes=changes)
    with pytest.raises(ValueError, match=r"blk.0.ffn_up.scale has (shape|the value) .*; legal is one number above 0"):
        import_model(path)


def test_llama3_rotation(tmp_path: Path) -> None:
    rotation = {
        **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 8192,
    }
    model, batch = wide("llama", rope_parameters=rotation)
    onto_grid(model, TERNARY)
    plain = 1.0 / 500000.0 ** (torch.arange(0, 64, 2).float() / 64)
    factors = plain / model.model.rotary_emb.inv_freq
    assert float(factors.max()) == pytest.approx(8.0)
    table = {"rope_freqs.weight": ((32,), F32, factors.numpy().tobytes())}
    imported = import_model(model_to_gguf(tmp_path / "model.gguf", model, "llama", TQ2_0, changes=table))
    assert torch.allclose(imported.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq, rtol=1e-6)
    assert torch.allclose(logits(imported, batch), logits(model, batch), rtol=0, atol=5e-5)
    # another change of the rotation is in no metadata
    table = {"rope_freqs.weight": ((32,), F32, (factors * torch.linspace(1, 2, 32)).numpy().tobytes())}
    path = model_to_gguf(tmp_path / "other.gguf", model, "llama", TQ2_0, changes=table)
    with pytest.raises(ValueError, match=r"holds rope_freqs.weight, a change of its rotary embedding.*base="):
        import_model(path)
    model.save_pretrained(tmp_path / "base")
    assert torch.allclose(
        logits(import_model(path, base=str(tmp_path / "base")), batch), logits(model, batch), rtol=0, atol=5e-5
    )


def test_a_file_of_the_package_gguf(tmp_path: Path) -> None:
    """Written by its GGUFWriter, with a vocabulary."""
    model, batch = wide("llama", num_hidden_layers=1)
    onto_grid(model, TERNARY)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for key, value in foreign.described(model, "llama").items():
        if key != "general.architecture":
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"token{number}" for number in range(model.config.vocab_size)])
    writer.add_token_scores([0.0] * model.config.vocab_size)
    kind = gguf.GGMLQuantizationType.TQ1_0
    for name, tensor in model.state_dict().items():
        array = foreign._as_converted(name, tensor, model, "llama").numpy()
        if name.removesuffix(".weight") in projections(model):
            writer.add_tensor(
                foreign.gguf_name(name, "llama"), gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind
            )
        else:
            writer.add_tensor(foreign.gguf_name(name, "llama"), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    imported = import_model(tmp_path)
    assert_values(imported, model)
    assert torch.allclose(logits(imported, batch), logits(model, batch), rtol=0, atol=5e-5)


# ---- decoders against ggml ----


class _Traits(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
    )


@pytest.mark.parametrize("kind", [Q4_0, Q8_0, TQ1_0, TQ2_0, Q1_0, Q2_0])
def test_decoders_against_ggml(kind: int, tmp_path: Path) -> None:
    """Random weights, quantized and read back by ggml's C code: the same numbers, bit for bit."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    rows, columns = 6, 512
    weight = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    traits = library.ggml_get_type_traits(kind).contents
    data, read = np.zeros(rows * columns // traits.block * traits.size, np.uint8), np.zeros_like(weight)
    library.ggml_quantize_chunk(kind, weight.ctypes.data, data.ctypes.data, 0, rows, columns, None)
    to_float = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(traits.to_float)
    to_float(data.ctypes.data, read.ctypes.data, read.size)
    tensors = {"weight": ((rows, columns), kind, data.tobytes())}
    file = GGUFFile(foreign.write_gguf(tmp_path / "one.gguf", {"general.architecture": "llama"}, tensors))
    found = layer_weight(file, file.tensors["weight"])
    assert isinstance(found, Levels)
    got = found.levels.float().unflatten(1, (found.scale.shape[1], -1)) * found.scale.unsqueeze(-1)
    assert torch.equal(got.flatten(1), torch.from_numpy(read))
    fitted = fit(found, "wider")
    assert isinstance(fitted, Found) and torch.equal(fitted.quantized.dequantize(), torch.from_numpy(read))
