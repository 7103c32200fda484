"""Format "bitnet": every kind of checkpoint of transformers' own method, read by transformers without us."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_bitnet import BitNetQuantizationConfig, export_model, load_native, quantize_model, set_norm_blend
from hf_bitnet.export import ExportReport, ParityError
from hf_bitnet.export import native as exporter
from hf_bitnet.export.stream import Planned, write_safetensors
from hf_bitnet.modules.native import unpack_rows
from hf_bitnet.surgery import quantized_layers
from tests.checkpoints import logits, read_config, run_plain_transformers
from tests.native import TRAINED, batch_of, close, quantized, write_native
from tests.streaming import Watched
from tests.tiny import tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native")


@pytest.fixture(scope="module")
def plain(folders: Path) -> dict[str, tuple[list[str] | str, Tensor | None]]:
    """{name of a folder: (class names or error, output)} of transformers without us."""
    jobs: dict[Path, dict[str, Tensor]] = {}
    for family in TRAINED:
        sub_norm = {"sub_norm": ["."], "sub_norm_eps": 1e-5} if family == "bitnet" else {}
        model, batch = quantized(family, form="packed" if family == "qwen3" else "train", **sub_norm)
        set_norm_blend(model, 1.0)
        export_model(model, folders / f"export-{family}", format="bitnet", verify="codes", progress=False)
        jobs[folders / f"export-{family}"] = batch
    for name, kind, norms in (("packed", "packed", False), ("online", "online", True)):
        model, batch = tiny("llama", attention_bias=True)
        write_native(model, folders / name, kind, norms)
        jobs[folders / name] = batch
    return {folder.name: result for folder, result in run_plain_transformers(jobs).items()}


@pytest.mark.parametrize("family", TRAINED)
def test_export(family: str, plain: dict[str, Any], folders: Path) -> None:
    name = f"export-{family}"
    classes, output = plain[name]
    sub_norm = {"sub_norm": ["."], "sub_norm_eps": 1e-5} if family == "bitnet" else {}
    model, batch = quantized(family, **sub_norm)
    set_norm_blend(model, 1.0)
    assert classes.count("BitLinear") == len(dict(quantized_layers(model)))
    assert close(logits(model, batch), output, 1e-4)
    back = load_native(folders / name)
    for mine, theirs in zip(quantized_layers(model), quantized_layers(back), strict=True):
        a, b = mine[1].quantized_weight(), theirs[1].quantized_weight()
        assert mine[0] == theirs[0] and torch.equal(a.codes, b.codes) and torch.allclose(a.scale, b.scale, rtol=1e-6)
    assert torch.equal(logits(back, batch), output)


# (family, its config, norms, dtype, kind, packed): every kind, biases, norms, both dtypes, rows that 4 does not divide
EXPORTED: list[tuple[str, dict[str, Any], bool, torch.dtype, str, bool]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True}, True, torch.bfloat16, "bitlinear", True),
    ("gemma3", {}, False, torch.float32, "autobitlinear", True),
    ("mistral", {"intermediate_size": 78, "tie_word_embeddings": True}, False, torch.float32, "autobitlinear", False),
    ("bitnet", {}, True, torch.float32, "online", True),
    ("qwen3", {"attention_bias": True}, False, torch.float32, "autobitlinear", True),
    ("llama", {"attention_bias": True}, False, torch.bfloat16, "online", True),
    ("mixtral", {}, False, torch.float32, "bitlinear", True),
    ("t5", {}, False, torch.float32, "bitlinear", True),
    ("vit", {}, False, torch.float32, "bitlinear", True),
]


def export(
    folder: Path,
    family: str,
    overrides: dict[str, Any],
    norms: bool,
    dtype: torch.dtype,
    kind: str,
    packed: bool,
    verify: bool | str = "codes",
) -> tuple[Any, ExportReport, dict[str, Tensor]]:
    model, batch = tiny(family, **overrides)
    config = BitNetQuantizationConfig(sub_norm=["."] if norms else [], keep=["experts"])
    model = quantize_model(model.to(dtype), config)
    set_norm_blend(model, 1.0)
    options = {"kind": kind, "packed": packed, "verify": verify}
    return model, export_model(model, folder, format="bitnet", progress=False, **options), batch


@pytest.mark.parametrize("case", EXPORTED, ids=lambda case: f"{case[0]}-{case[4]}")
def test_export_kinds(case: tuple[Any, ...], tmp_path: Path) -> None:
    """Codes read by transformers' own function; load_native finds the model again, by the layers of each kind."""
    model, report, batch = export(tmp_path / "out", *case)
    family, _, norms, dtype, kind, packed = case
    assert [check.passed for check in report.checks] == [True, True]
    settings = read_config(tmp_path / "out")
    linear_class = "bitlinear" if kind == "bitlinear" else "autobitlinear"
    assert (settings["linear_class"], settings["use_rms_norm"]) == (linear_class, norms)
    assert settings["quantization_mode"] == ("online" if kind == "online" else "offline")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {each.stored for each in report.tensors} == tensors.keys()
    stored = {each.name: tensors[each.stored] for each in report.tensors}
    name, layer = next(iter(quantized_layers(model)))
    quantized = layer.quantized_weight()
    if kind == "online":
        assert f"{name}.weight_scale" not in stored and torch.equal(stored[f"{name}.weight"], layer.weight)
    else:
        scale = stored[f"{name}.weight_scale"]
        assert torch.equal(scale, (1 / quantized.scale if kind == "bitlinear" else quantized.scale).reshape(1))
        found = unpack_rows(stored[f"{name}.weight"], layer.out_features) if packed else stored[f"{name}.weight"]
        assert torch.equal(found, quantized.codes.to(found.dtype))
    if family in ("vit", "t5", "mixtral"):
        return
    back = load_native(tmp_path / "out")
    assert close(logits(back, batch), logits(model, batch), 1e-4 if dtype == torch.float32 else 3e-2)
    bias = layer.plain_bias
    if bias is not None and kind == "autobitlinear":
        assert torch.equal(stored[f"{name}.bias"], bias / quantized.scale.reshape(()))


@pytest.mark.slow
@pytest.mark.parametrize("case", EXPORTED, ids=lambda case: f"{case[0]}-{case[4]}")
def test_export_kinds_in_plain_transformers(case: tuple[Any, ...], tmp_path: Path) -> None:
    """Logits of a process without hf_bitnet, bit for bit those of our layers of the same arithmetic."""
    _, report, _ = export(tmp_path / "out", *case, verify=True)
    assert [check.passed for check in report.checks] == [True, True, True]
    assert report.checks[2].detail.startswith("relative error 0,")


def test_export_in_plain_transformers(tmp_path: Path) -> None:
    """The same for one kind, with all that a layer can have."""
    _, report, _ = export(tmp_path / "out", *EXPORTED[0], verify=True)
    assert [check.passed for check in report.checks] == [True, True, True]
    assert report.checks[2].reader == "transformers without hf_bitnet"
    assert "it rounds the scales to bfloat16 when it loads them" in report.notes
    assert report.kinds()["2-bit"] == 14


def test_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = quantized("llama")
    watched = Watched(monkeypatch, exporter, model)
    export_model(model, tmp_path / "out", format="bitnet", verify=False, progress=False)
    assert len(watched.made) == 14 * 2


def test_inputs_that_nobody_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes are compared all the same."""
    model, _ = quantized("llama")
    monkeypatch.setattr(type(model), "main_input_name", "input_values")
    report = export_model(model, tmp_path / "out", format="bitnet", progress=False)
    assert [check.passed for check in report.checks] == [True, True, None]
    assert report.checks[2].detail == "nobody knows what to feed a model that reads input_values"


def test_wrong_files_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One code, one scale, one bias."""
    case = EXPORTED[0]

    def spoil(leaf: str, change: Any) -> None:
        def write(folder: Path, tensors: list[Planned], **options: Any) -> Any:
            index = next(i for i, each in enumerate(tensors) if each.name.endswith(leaf))
            made = tensors[index].make

            def spoiled() -> Tensor:
                value = made().detach().clone()
                value.view(-1)[0] = change(value.view(-1)[0])
                return value

            tensors[index] = tensors[index]._replace(make=spoiled)
            return write_safetensors(folder, tensors, **options)

        monkeypatch.setattr(exporter, "write_safetensors", write)

    for leaf, change, words in (
        ("q_proj.weight", lambda byte: byte ^ 1, "q_proj.weight has other codes"),
        ("q_proj.weight_scale", lambda scale: 1 / scale, "q_proj.weight_scale is another"),
        ("q_proj.bias", lambda bias: bias + 1, "q_proj.bias is another"),
    ):
        spoil(leaf, change)
        with pytest.raises(ParityError, match=words):
            export(tmp_path / "out", *case)
    assert not any(tmp_path.iterdir())


def test_export_of_a_loaded_native_model(plain: dict[str, Any], folders: Path, tmp_path: Path) -> None:
    """The stored bias of autobitlinear is not the bias of bitlinear."""
    batch = batch_of(folders / "packed")
    export_model(load_native(folders / "packed"), tmp_path / "out", format="bitnet", verify="codes", progress=False)
    assert close(logits(load_native(tmp_path / "out"), batch), plain["packed"][1], 1e-3)
    kind = {"kind": "online", "verify": "codes", "progress": False}
    export_model(load_native(folders / "online"), tmp_path / "online", format="bitnet", **kind)
    expected = plain["online"][1]
    assert torch.equal(logits(load_native(tmp_path / "online"), batch_of(folders / "online")), expected)


@pytest.mark.parametrize(
    ("family", "fields", "options", "words"),
    [
        ("llama", {"weight": "int4"}, {}, r"q_proj cannot be written.*it is int4 with one scale a channel"),
        ("llama", {"granularity": "channel"}, {}, r"it is ternary with one scale a channel.*'hf_bitnet' keeps every scheme"),
        ("llama", {"activation": "none"}, {}, r"its activations are NoActivation"),
        ("gpt2", {}, {}, r"it is a Conv1D"),
        ("llama", {"sub_norm": ["o_proj"]}, {}, r"a norm in front of every quantized layer or of none"),
        ("t5", {"overrides": {"wo": {"weight": "ternary"}}}, {}, r"wo cannot be written.*by its name"),
        (
            "llama",
            {"form": "packed"},
            {"kind": "online"},
            r"holds float weights, and this model is packed; .*unpack_model\(model\)",
        ),
        (
            "llama",
            {"weight_scale": "learned"},
            {"kind": "online"},
            r"computes its scale as mean\|w\|.* it is 'learned'; use kind",
        ),
        ("mixtral", {"keep": []}, {}, r"leaves experts in full precision.*keep them: keep=\[r'experts'\]"),
        ("llama", {"embeddings": "int8"}, {}, r"it has no packed embeddings, and model\.embed_tokens is quantized"),
    ],
)
def test_export_refuses(family: str, fields: dict[str, Any], options: dict[str, Any], words: str, tmp_path: Path) -> None:
    model, _ = quantized(family, **fields)
    set_norm_blend(model, 1.0)
    with pytest.raises(ValueError, match=rf"format 'bitnet' cannot hold this model: .*{words}"):
        export_model(model, tmp_path / "out", format="bitnet", **options)
    assert not list(tmp_path.iterdir())


def test_export_refuses_odd_rows_and_plain_models(tmp_path: Path) -> None:
    model, _ = tiny("llama", intermediate_size=78)
    with pytest.raises(ValueError, match=r"the model is not quantized; call quantize_model"):
        export_model(model, tmp_path / "out", format="bitnet")
    with pytest.raises(TypeError, match=r"takes a transformers model or the path of one, got Linear"):
        export_model(nn.Linear(2, 2), tmp_path / "out", format="bitnet")  # type: ignore[arg-type]
    words = r"its 78 output features are not a multiple of 4.*kind='autobitlinear', packed=False"
    with pytest.raises(ValueError, match=words):
        export_model(quantize_model(model, BitNetQuantizationConfig()), tmp_path / "out", format="bitnet")
    with pytest.raises(ValueError, match="kind='offline'; legal: bitlinear, autobitlinear, online"):
        export_model(model, tmp_path / "out", format="bitnet", kind="offline")
    with pytest.raises(ValueError, match="packed=False is for kind='autobitlinear', and kind is 'online'; leave packed out"):
        export_model(model, tmp_path / "out", format="bitnet", kind="online", packed=False)
    assert not list(tmp_path.iterdir())


def test_export_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = quantized("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    target, options = tmp_path / "deep" / "out", {"format": "bitnet", "verify": "codes", "progress": False}
    export_model(model, target, max_shard_size="30KB", **options)
    assert len(list(target.glob("*.safetensors"))) > 1
    assert os.stat(target).st_mode == os.stat(target.parent).st_mode  # not private, as temporary folders are
    with pytest.raises(ValueError, match=r"is not empty; choose another one, or replace it: overwrite=True"):
        export_model(model, target, **options)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(exporter, "write_configs", fails)
        with pytest.raises(OSError, match="disk full"):
            export_model(model, target, overwrite=True, **options)
        with pytest.raises(OSError, match="disk full"):
            export_model(model, tmp_path / "deep" / "other", **options)
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["out"]
    assert close(logits(load_native(target), batch), logits(model, batch), 1e-4)
    export_model(model, target, overwrite=True, **options)
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["out"] and (target / "model.safetensors").exists()
    # the model is as it was
    assert model.config.quantization_config.form == "train"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
