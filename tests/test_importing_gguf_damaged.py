"""GGUF files that are refused: types, shapes, architectures, cut and damaged ones."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_bitnet import import_model
from hf_bitnet.surgery import quantized_layers
from tests import foreign
from tests.checkpoints import assert_same_layers
from tests.foreign import (
    F32,
    I2_S,
    Q2_K,
    Q4_0,
    Q8_0,
    TQ2_0,
    assert_values,
    model_to_gguf,
    onto_grid,
    wide,
)

gguf = pytest.importorskip("gguf", reason="pip install 'hf_bitnet[gguf]'")

TERNARY = [-1.0, 0.0, 1.0]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, _ = wide("llama", num_hidden_layers=1)
    onto_grid(model, TERNARY)
    return model_to_gguf(tmp_path_factory.mktemp("gguf") / "good.gguf", model, "llama", TQ2_0)


def other(
    tmp_path: Path, architecture: str = "llama", kind: int = TQ2_0, levels: list[float] = TERNARY, changes: Any = None
) -> Path:
    model, _ = wide("llama", num_hidden_layers=1)
    onto_grid(model, levels)
    return model_to_gguf(tmp_path / "model.gguf", model, architecture, kind, changes=changes)


def random_blocks(kind: int) -> bytes:
    shape = gguf.quant_shape_to_byte_shape((512, 256), gguf.GGMLQuantizationType(kind))
    return np.random.default_rng(0).integers(0, 60, shape, dtype=np.uint8).tobytes()


UP = "blk.0.ffn_up.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        (UP, ((512, 256), 12, None), r"up_proj.weight: it is stored as Q4_K, whose values.*legal: Q4_0, Q8_0, TQ1_0"),
        (UP, ((512, 256), 14, None), "it is stored as Q6_K"),
        (UP, ((512, 256), 99, bytes(10)), "it is stored as type 99"),
        (UP, ((512, 256), 38, bytes(10)), "it is stored as type 38"),
        (UP, ((512, 256), Q2_K, None), "up_proj.weight: its weights lie on no grid"),
        (UP, ((512, 256), TQ2_0, bytes([0] * 64) + b"\x00\x7e"), r"up_proj.weight: 512 of its scales are NaN"),
        (UP, ((512, 256), I2_S, b"\xff"), "its I2_S codes go up to 3"),
        (UP, ((256, 256), TQ2_0, bytes(2**15)), r"up_proj.weight has shape \(256, 256\), the model needs \(512, 256\)"),
        (UP, ((512, 256, 1), TQ2_0, bytes(2**16)), r"has shape \(512, 256, 1\), the model needs \(512, 256\)"),
        ("token_embd.weight", ((96, 256), 99, bytes(10)), "token_embd.weight of type 99 cannot be read"),
        ("output_norm.weight", ((3,), F32, bytes(12)), r"model.norm.weight has shape \(3,\), the model needs \(256,\)"),
        ("blk.0.attn_sinks.weight", ((3,), F32, bytes(12)), "for which LlamaForCausalLM has no place.*base="),
        ("blk.7.ffn_up.weight", ((512, 256), TQ2_0, bytes(2**16)), "holds the tensor blk.7.ffn_up.weight, for which"),
        ("blk.0.attn_q.weight", ((3, 256), TQ2_0, bytes(2**16)), r"q_proj.weight has shape \(3, 256\)"),
    ],
    ids=range(14),
)
def test_tensors_refused(name: str, tensor: tuple[tuple[int, ...], int, bytes | None], words: str, tmp_path: Path) -> None:
    shape, kind, data = tensor
    filled = random_blocks(kind) if data is None else data * (512 if len(data) < 100 and kind == TQ2_0 else 1)
    if kind == I2_S and len(filled) == 1:
        filled = filled * (512 * 64) + bytes(32)
    with pytest.raises(ValueError, match=words):
        import_model(other(tmp_path, changes={name: (shape, kind, filled)}))


def test_float_files_and_levels_outside(tmp_path: Path) -> None:
    model, _ = wide("llama", num_hidden_layers=1)
    with pytest.raises(ValueError, match="holds no quantized layer: its matrices are of F32; load it with transformers"):
        import_model(model_to_gguf(tmp_path / "a.gguf", model, "llama", F32))
    onto_grid(model, [-8.0, -1.0, 1.0, 7.0])
    path = model_to_gguf(tmp_path / "b.gguf", model, "llama", Q4_0)
    with pytest.raises(ValueError, match=r"4-bit levels go from -8 to 7.*outside='wider'.*and 4 more layers"):
        import_model(path)
    assert_values(import_model(path, outside="wider"), model)
    clipped = dict(quantized_layers(import_model(path, outside="clip")))
    assert all(
        layer.quantizer.storage_bits == 4 and int(layer.quantized_weight().codes.min()) == -7 for layer in clipped.values()
    )


@pytest.mark.parametrize(
    ("kind", "words"),
    [(TQ2_0, "TQ2_0 has blocks of 256, which do not divide its 192 inputs"), (I2_S, "I2_S has blocks of 128"), (Q8_0, "")],
)
def test_rows_that_are_no_blocks(kind: int, words: str, tmp_path: Path) -> None:
    model, _ = wide("llama", hidden_size=192, num_hidden_layers=1)
    onto_grid(model, TERNARY)
    good = {name: ((512, 192), kind, bytes(2**18)) for name in ("blk.0.ffn_up.weight", "blk.0.ffn_gate.weight")}
    path = model_to_gguf(tmp_path / "model.gguf", model, "llama", F32, changes=good)
    if words:
        with pytest.raises(ValueError, match=words):
            import_model(path)
    else:
        import_model(path)


def test_which_file(good: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(good.read_bytes())
    with pytest.raises(ValueError, match=r"holds several GGUF files; name one: .*/a.gguf, or in place of it b.gguf"):
        import_model(tmp_path)
    assert_same_layers(import_model(tmp_path, file="b.gguf"), import_model(good))
    with pytest.raises(ValueError, match=r"holds no file 'c.gguf'; it has: a.gguf, b.gguf"):
        import_model(tmp_path, file="c.gguf")
    (tmp_path / "model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="is no GGUF file: it does not begin with 'GGUF'"):
        import_model(tmp_path / "model.bin")


def test_architectures_refused(tmp_path: Path) -> None:
    for architecture, words in (("mamba", "is of the architecture 'mamba'; legal: llama, qwen2"), ("", "architecture ''")):
        with pytest.raises(ValueError, match=words):
            import_model(other(tmp_path, architecture=architecture))
    model, _ = wide("bitnet", num_hidden_layers=1)
    described = {"general.architecture": "bitnet", "bitnet.block_count": 1}
    tensors = {"token_embd.weight": ((4, 256), F32, bytes(4096))}
    with pytest.raises(ValueError, match="its metadata does not describe a BitNet model"):
        import_model(foreign.write_gguf(tmp_path / "bare.gguf", described, tensors))
    with pytest.raises(ValueError, match="says that it has None layers, in 1 tensors"):
        import_model(foreign.write_gguf(tmp_path / "bare.gguf", {"general.architecture": "llama"}, tensors))
    with pytest.raises(ValueError, match="does not say of which architecture it is"):
        import_model(foreign.write_gguf(tmp_path / "bare.gguf", {}, tensors))
    whole = foreign.described(model, "bitnet") | {"split.count": 3}
    with pytest.raises(ValueError, match="is one of 3 parts; join them first"):
        import_model(foreign.write_gguf(tmp_path / "part.gguf", whole, tensors))


def test_cut_anywhere(good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    path = tmp_path / "cut.gguf"
    header = len(data) - 200_000
    for length in [0, 3, 4, 7, 20, *range(24, 2000, 97), header, len(data) // 2, len(data) - 3000]:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut.gguf (is damaged or incomplete|is incomplete|is no GGUF file)"):
            import_model(path)


def head(tensors: int, pairs: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + rest


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


ARCHITECTURE = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")


def tensor_info(name: bytes = b"token_embd.weight", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (head(2**63, 1, bytes(100)), "should hold 1 keys and 9223372036854775808 tensors"),
        (head(1, 2**63, bytes(100)), "should hold 9223372036854775808 keys"),
        (head(0, 1, text(b"a", 2**62) + bytes(100)), "should hold a text of 4611686018427387904 bytes"),
        (head(0, 1, text(b"a") + struct.pack("<IIQ", 9, 4, 2**61) + bytes(100)), "should hold 2305843009213693952 numbers"),
        (head(0, 1, text(b"a") + struct.pack("<IIQ", 9, 8, 2**60) + bytes(100)), "should hold 1152921504606846976 texts"),
        (head(0, 1, text(b"a") + struct.pack("<IIQ", 9, 9, 1) + bytes(100)), "a list of the type 9"),
        (head(0, 1, text(b"a") + struct.pack("<I", 77) + bytes(100)), "a value of the unknown type 77"),
        (head(0, 1, text(b"\xff\xfe") + bytes(100)), "is damaged or incomplete .*utf-8"),
        (head(0, 2, ARCHITECTURE * 2 + bytes(100)), "the key 'general.architecture' is there twice"),
        (head(2, 1, ARCHITECTURE + tensor_info() * 2 + bytes(100)), "the tensor 'token_embd.weight' is there twice"),
        (head(1, 1, ARCHITECTURE + tensor_info(dims=(1,) * 5) + bytes(100)), "has 5 dimensions"),
        (head(1, 1, ARCHITECTURE + tensor_info(dims=()) + bytes(100)), "has 0 dimensions"),
        (head(1, 1, ARCHITECTURE + tensor_info(dims=(2**40, 2**40)) + bytes(100)), "has shape"),
        (head(1, 1, ARCHITECTURE + tensor_info(dims=(0, 4)) + bytes(100)), r"has shape \(4, 0\)"),
        (head(0, 1, text(b"general.alignment") + struct.pack("<II", 4, 24) + bytes(100)), "alignment is 24, which is no power"),
        (head(0, 1, text(b"general.alignment") + struct.pack("<II", 4, 0) + bytes(100)), "alignment is 0"),
        (
            head(0, 1, text(b"general.alignment") + struct.pack("<II", 4, 2**31) + bytes(100)),
            "is 2147483648, legal is up to 65",
        ),
        (head(0, 0, bytes(64), version=1), "is of GGUF version 1; legal: 2, 3"),
        (head(0, 0, bytes(64), version=3 << 24), "machines of the other byte order"),
    ],
    ids=range(19),
)
def test_headers(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=words):
        import_model(path)


def test_offsets_outside(good: Path, tmp_path: Path) -> None:
    data = bytearray(good.read_bytes())
    place = data.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 16 + 4
    struct.pack_into("<Q", data, place, 2**60)
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"is incomplete: the tensor blk.0.ffn_up.weight ends at byte"):
        import_model(path)


def test_random_damage(good: Path, tmp_path: Path) -> None:
    """Single bytes of the header changed: a clear error, or a model; nothing else."""
    data, generator = good.read_bytes(), np.random.default_rng(0)
    end = data.index(b"output_norm.weight") + 60
    path = tmp_path / "bad.gguf"
    for place in generator.integers(4, end, 60):
        changed = bytearray(data)
        changed[place] = int(generator.integers(256))
        path.write_bytes(changed)
        try:
            import_model(path)
        except ValueError as error:
            assert str(error)


def test_without_the_package(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_bitnet\[gguf\]'"):
        import_model(good)
