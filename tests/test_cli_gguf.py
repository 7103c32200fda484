"""`hf-bitnet info` of GGUF files: written by the package gguf, or byte by byte; malformed ones are refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from hf_bitnet.cli.gguf_shown import GGUFTensor, read_gguf_header
from tests.command_line import Captured, run, save_base


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tensor(name: str, kind: int, offset: int, *shape: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf_file(path: Path, pairs: list[bytes], tensors: list[bytes], data: int = 64, version: int = 3) -> Path:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs) + b"".join(tensors)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + b"\1" * data)
    return path


NAME = text("general.architecture") + struct.pack("<I", 8) + text("llama")


def test_what_the_package_writes(tmp_path: Path, capsys: Captured) -> None:
    gguf = pytest.importorskip("gguf", reason="writes the file")
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Ada")
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "bb", "c"])
    writer.add_token_scores([0.0, 1.5, 2.0])
    writer.add_add_bos_token(True)
    writer.add_tensor("output_norm.weight", np.zeros(32, dtype=np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((4, 132), dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.TQ2_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf_header(path)
    assert header.version == 3 and header.bytes == path.stat().st_size
    assert header.metadata == {
        "general.architecture": "llama",
        "general.name": "Ada",
        "llama.context_length": 64,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "tokenizer.ggml.tokens": {"length": 3},
        "tokenizer.ggml.scores": {"length": 3},
        "tokenizer.ggml.add_bos_token": True,
    }
    assert header.tensors == [
        GGUFTensor("output_norm.weight", "F32", (32,), 128),
        GGUFTensor("blk.0.attn_q.weight", "TQ2_0", (4, 512), 4 * 132 + 16),  # and up to the next multiple of 32
    ]
    known = gguf.GGUFReader(path)
    assert [each.name for each in known.tensors] == [each.name for each in header.tensors]
    code, printed, err = run(capsys, "info", path)
    assert (code, err) == (0, "")
    assert "GGUF version 3" in printed and "1 x TQ2_0" in printed and "general.name = 'Ada'" in printed
    assert "tokenizer.ggml.tokens = [3 values]" in printed
    result = json.loads(run(capsys, "info", path, "--json")[1])
    assert result["gguf"][0]["types"]["F32"] == {"tensors": 1, "bytes": 128}


def test_types_that_the_package_does_not_know(tmp_path: Path) -> None:
    tensors = [tensor("a", 42, 0, 64, 2), tensor("b", 36, 64, 128), tensor("c", 99, 96, 1)]
    header = read_gguf_header(gguf_file(tmp_path / "a.gguf", [NAME], tensors, 128, version=2))
    assert [(each.type, each.shape, each.bytes) for each in header.tensors] == [
        ("Q2_0", (2, 64), 64),
        ("I2_S", (128,), 32),
        ("type 99", (1,), 32),
    ]


def test_folders(tmp_path: Path, capsys: Captured) -> None:
    folder = tmp_path / "only"
    folder.mkdir()
    gguf_file(folder / "a.gguf", [NAME], [])
    long = text("x") + struct.pack("<I", 8) + text("y" * 200)
    gguf_file(folder / "b.gguf", [NAME, long], [])
    code, printed, _ = run(capsys, "info", folder)
    assert code == 0 and printed.count("GGUF version 3") == 2 and "tensors: none" in printed
    assert "y" * 79 in printed and "y" * 80 not in printed and "(202 characters)" in printed
    save_base(folder)  # full precision beside it is told by its own name
    assert "a.gguf" in run(capsys, "info", folder)[1]


def test_keys_do_not_reach_the_terminal_as_they_are(tmp_path: Path, capsys: Captured) -> None:
    key = text("gen\x1b[31m") + struct.pack("<I", 8) + text("\x1b[32m")
    code, printed, _ = run(capsys, "info", gguf_file(tmp_path / "a.gguf", [NAME, key], []))
    assert code == 0 and "'gen\\x1b[31m' = '\\x1b[32m'" in printed and "\x1b" not in printed


@pytest.mark.parametrize(
    ("pairs", "tensors", "message"),
    [
        ([NAME, NAME], [], "the key 'general.architecture' is there twice"),
        ([text("a") + struct.pack("<I", 77)], [], "a value of the unknown type 77"),
        ([text("a") + struct.pack("<IIQ", 9, 9, 1)], [], "a list of the type 9"),
        ([text("a") + struct.pack("<IIQ", 9, 8, 2**63)], [], "it should hold 9223372036854775808 texts"),
        ([text("a") + struct.pack("<IIQ", 9, 6, 2**62)], [], "it should hold 4611686018427387904 numbers"),
        ([struct.pack("<Q", 2**64 - 1) + bytes(8)], [], "it should hold a text of 18446744073709551615 bytes"),
        ([], [text("t") + struct.pack("<I", 2**31) + bytes(20)], "the tensor 't' has 2147483648 dimensions"),
        ([], [tensor("t", 0, 10**6, 4)], "the tensor t ends at byte"),
        ([text("general.alignment") + struct.pack("<II", 4, 0)], [], "general.alignment is 0"),
    ],
)
def test_malformed(tmp_path: Path, capsys: Captured, pairs: list[bytes], tensors: list[bytes], message: str) -> None:
    path = gguf_file(tmp_path / "a.gguf", pairs, tensors)
    code, printed, err = run(capsys, "info", path)
    assert (code, printed) == (1, "") and err.count("\n") == 1
    assert "damaged or incomplete" in err or "is incomplete" in err
    assert "a.gguf" in err and message in err


def test_cut_short_anywhere(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "a.gguf", [NAME], [tensor("t", 0, 0, 4)], data=16)
    whole = path.read_bytes()
    assert read_gguf_header(path).tensors[0].bytes == 16
    for length in range(len(whole) - 16):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"incomplete|no GGUF file"):
            read_gguf_header(path)


def test_other_versions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is of GGUF version 1; legal: 2, 3"):
        read_gguf_header(gguf_file(tmp_path / "a.gguf", [], [], version=1))
