"""What is quantized of a model, what is kept and why, and what the report says. Round trips: test_surgery_forms.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from hf_bitnet import BitNetQuantizationConfig, coverage, pack_model, quantize_model
from hf_bitnet.modules import BitConv1D, BitLinear, PackedBitLinear
from hf_bitnet.surgery import choose, quantized_layers, separate_experts
from tests.layers import GROUP, SCHEMES
from tests.tiny import FAMILIES, tiny

# family: {reason: names of kept linear maps}; every other one is quantized
KEPT: dict[str, dict[str, list[str]]] = {
    "llama": {"output embeddings": ["lm_head"]},
    "qwen3": {"output embeddings": ["lm_head"]},
    "gemma3": {"output embeddings": ["lm_head"]},
    "mistral": {"output embeddings": ["lm_head"]},
    "mixtral": {"output embeddings": ["lm_head"]},
    "bitnet": {"output embeddings": ["lm_head"]},
    "gpt2": {"output embeddings": ["lm_head"]},
    "bert": {"task head": ["bert.pooler.dense", "classifier"]},
    "t5": {
        "output embeddings": ["lm_head"],
        "the model keeps it in float32": [
            f"{side}.block.{i}.layer.{j}.DenseReluDense.wo" for side, j in (("encoder", 1), ("decoder", 2)) for i in (0, 1)
        ],
    },
    "vit": {"task head": ["classifier"]},
    "whisper": {"output embeddings": ["proj_out"]},
}
QUANTIZED = {"mixtral": 32, "gpt2": 8, "bert": 12, "t5": 28, "vit": 12, "whisper": 32}  # the others have 14
CONFIG = BitNetQuantizationConfig()


class Plain(nn.Module):
    """No transformers model, no config."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


# ---- which layers ----


def test_defaults(family: str) -> None:
    model, _ = tiny(family)
    found: dict[str | None, list[str]] = {}
    with separate_experts(model):
        for choice in choose(model, CONFIG):
            found.setdefault(choice.kept, []).append(choice.name)
    quantized = found.pop(None)
    assert found == KEPT[family]
    assert len(quantized) == QUANTIZED.get(family, 14)
    quantize_model(model, CONFIG)
    assert [name for name, _ in quantized_layers(model)] == quantized
    kind = BitConv1D if family == "gpt2" else BitLinear
    assert all(type(layer) is kind for _, layer in quantized_layers(model))


def test_every_family_has_an_expectation() -> None:
    assert set(KEPT) == set(FAMILIES)


def test_the_very_parameters_are_taken_over(family: str) -> None:
    model, _ = tiny(family)
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    # experts that are fused have no parameters of their own yet
    quantize_model(model, BitNetQuantizationConfig(keep=["experts"]))
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("score", "task head"),
        ("qa_outputs", "task head"),
        ("cls.predictions", "task head"),
        ("block_sparse_moe.gate", "router"),
        ("mlp.router", "router"),
        ("mlp.gate_proj", None),
        ("mlp.fc_out", None),  # of GPT-J, CodeGen: not a head
        ("score_proj", None),
        ("classifier_dropout_proj", None),
    ],
)
def test_names_of_heads_and_routers(name: str, kept: str | None) -> None:
    model = nn.ModuleDict()
    parent: Any = model
    *path, last = name.split(".")
    for part in path:
        parent[part] = nn.ModuleDict()
        parent = parent[part]
    parent[last] = nn.Linear(4, 4)
    (choice,) = choose(model, CONFIG)
    assert (choice.name, choice.kept) == (name, kept)


class _ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.raw, self.called = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(x @ self.raw.weight)


class _OwnForward(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class _Inherits(_ReadsWeight):
    @property
    def norm(self) -> torch.Tensor:
        return torch.stack([row.abs().sum() for row in self.called.weight])


def test_layers_whose_weight_is_used_otherwise_are_kept() -> None:
    model = nn.ModuleList([_ReadsWeight(), _OwnForward(4, 4), nn.MultiheadAttention(4, 1), _Inherits()])
    reasons = {choice.name: choice.kept for choice in choose(model, CONFIG)}
    assert reasons == {
        "0.raw": "its parent reads the raw weight",
        "0.called": None,
        "1": "_OwnForward has a forward of its own",
        "2.out_proj": "NonDynamicallyQuantizableLinear has a forward of its own",
        "3.raw": "its parent reads the raw weight",
        "3.called": "its parent reads the raw weight",
    }


def test_tied_weights_are_kept_unless_forced() -> None:
    model = Plain()
    model.again = nn.Linear(32, 16, bias=False)
    model.again.weight = model.down.weight
    reasons = {choice.name: choice.kept for choice in choose(model, CONFIG)}
    tied = "weight tied to another module"
    assert reasons == {"up": None, "down": tied, "again": tied}
    quantize_model(model, BitNetQuantizationConfig(overrides={"again": {"weight": "int8"}}))
    assert type(model.down) is nn.Linear and isinstance(model.again, BitLinear)
    assert model.again.weight is model.down.weight


def test_tied_output_embeddings_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = tf.Qwen3ForCausalLM(tiny("qwen3")[0].config)
    kept = {choice.name: choice.kept for choice in choose(nn.ModuleDict({"wrapped": model}), CONFIG) if choice.kept}
    assert set(kept) == {"wrapped.lm_head"}


def test_keep_and_overrides() -> None:
    config = BitNetQuantizationConfig(
        keep=[r"layers\.0\."],
        overrides={r"down_proj": {"weight": "int4"}, r"lm_head": {"weight": "int8", "activation": "none"}, r"q_proj": "keep"},
    )
    model, batch = tiny("llama")
    quantize_model(model, config)
    schemes = {name: layer.quantizer.scheme for name, layer in quantized_layers(model)}
    assert schemes.pop("lm_head") == "int8" and model.lm_head.activation.bits == 32
    assert schemes.pop("model.layers.0.mlp.down_proj") == "int4"  # an override beats keep
    assert {name.removeprefix("model.layers.1.").split(".")[1]: scheme for name, scheme in schemes.items()} == {
        **dict.fromkeys(("k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), "ternary"),
        "down_proj": "int4",
    }
    assert model(**batch).logits.isfinite().all()


def test_mixed_precision_packs_to_mixed_bits() -> None:
    overrides = {
        rf"layers\.{i}\..*{name}": {"weight": scheme}
        for (i, name), scheme in zip(
            ((0, "q_proj"), (0, "k_proj"), (0, "v_proj"), (0, "o_proj"), (1, "q_proj"), (1, "k_proj")), SCHEMES, strict=True
        )
    }
    model, batch = tiny("llama")
    quantize_model(model, BitNetQuantizationConfig(weight="int8", overrides=overrides))
    before = model(**batch).logits
    pack_model(model)
    assert torch.equal(model(**batch).logits, before)
    assert {layer.bits for _, layer in quantized_layers(model)} == {1, 2, 4, 8}


def test_one_layer_in_two_places_is_replaced_at_both() -> None:
    model = Plain()
    model.again, model.list = model.up, nn.ModuleList([model.up, model.down])
    quantize_model(model, CONFIG)
    assert isinstance(model.up, BitLinear) and model.again is model.up is model.list[0] and model.list[1] is model.down
    assert len(list(quantized_layers(model))) == 2
    pack_model(model)
    assert isinstance(model.up, PackedBitLinear) and model.again is model.up is model.list[0]


@pytest.mark.parametrize("attribute", [None, {"hidden": 16}, "text"])
def test_plain_modules(attribute: Any) -> None:
    model = Plain()
    if attribute is not None:
        model.config = copy.deepcopy(attribute)
    quantize_model(model, BitNetQuantizationConfig(keep=["up"]))
    assert isinstance(model.down, BitLinear) and type(model.up) is nn.Linear
    assert "kept by the config" in str(coverage(model))
    pack_model(model)
    assert model(torch.randn(2, 16)).shape == (2, 16)
    assert getattr(model, "config", None) == attribute


def test_the_config_is_copied() -> None:
    config = BitNetQuantizationConfig()
    models = [quantize_model(tiny("llama")[0], config) for _ in range(2)]
    pack_model(models[0])
    assert config.form == "train" and config.quantized_modules is None
    assert [m.config.quantization_config.form for m in models] == ["packed", "train"]


# ---- the report ----


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def test_report_counts_every_parameter_and_byte(family: str) -> None:
    for scheme, dtype in (("ternary", torch.float32), ("int4", torch.bfloat16)):
        for fields in ({}, {"granularity": "group", "group_size": GROUP}, {"weight_scale": "learned"}):
            model, _ = tiny(family)
            model.to(dtype)
            count, size = sum(p.numel() for p in model.parameters()), _bytes(model)
            plain = coverage(model)
            assert plain.fraction == 0 and plain.bytes_float == plain.bytes_packed == size
            quantize_model(model, BitNetQuantizationConfig(weight=scheme, **fields))
            trained = coverage(model)
            pack_model(model)
            packed = coverage(model)
            for report in (trained, packed):
                assert sum(row.weights for row in report.rows) == count
                assert report.bytes_float == size and report.bytes_packed == _bytes(model)
                assert report.fraction == trained.fraction > 0
            assert {row.name for row in packed.rows} == {name for name, _ in model.named_parameters()}


def test_report_of_experts_and_routers() -> None:
    model, _ = tiny("mixtral")
    quantize_model(model, BitNetQuantizationConfig(keep=["experts"]))
    report = coverage(model)
    reasons = {row.name.removeprefix("model.layers.0."): row.reason for row in report.rows}
    assert reasons["mlp.experts.gate_up_proj"] == reasons["mlp.experts.down_proj"] == "fused experts, not quantized"
    assert reasons["mlp.gate.weight"] == "router"
    assert report.fraction < 0.2  # experts are linear maps, and most of them


def test_report_of_what_is_no_linear_map() -> None:
    model, _ = tiny("vit")
    quantize_model(model, CONFIG)
    rows = {row.name: row for row in coverage(model).rows}
    assert rows["vit.embeddings.cls_token"].reason == "cls_token of ViTEmbeddings"
    assert not rows["vit.embeddings.position_embeddings"].linear
    model, _ = tiny("whisper")
    quantize_model(model, CONFIG)
    report = coverage(model)
    assert report.fraction == 1.0  # the output embeddings are tied to the input's
    assert {row.reason for row in report.rows if "conv1.weight" in row.name} == {"weight of Conv1d"}


def test_report_as_text_and_data() -> None:
    model, _ = tiny("llama")
    assert "not quantized yet" in str(coverage(model))
    quantize_model(model, BitNetQuantizationConfig(overrides={"o_proj": {"weight": "int4", "group_size": 16}}))
    report = coverage(model)
    lines = str(report).splitlines()
    assert lines[0].split()[:4] == ["status", "what", "and", "why"]
    assert [line.split()[0] for line in lines[1:]] == ["quantized", "quantized", "kept", "kept", "kept", "total"]
    assert "int4, absmax per group of 16" in lines[1] and "ternary, absmean per tensor" in lines[2]
    assert "90.0% of the linear weights quantized" in lines[-1]
    assert len({len(line) for line in lines}) == 1  # columns stand under each other
    data = report.to_dict()
    assert data["fraction_of_linear_weights"] == pytest.approx(0.9)
    assert len(data["parameters"]) == len(list(model.parameters()))  # type: ignore[arg-type]


def test_min_coverage() -> None:
    quantize_model(tiny("llama")[0], BitNetQuantizationConfig(min_coverage=0.9))
    with pytest.raises(
        ValueError, match=r"only 90\.0% of the linear weights would be quantized.*lm_head \(output embeddings\)"
    ):
        quantize_model(tiny("llama")[0], BitNetQuantizationConfig(min_coverage=0.91))
    with pytest.raises(ValueError, match=r"only 16\.0%"):
        quantize_model(tiny("mixtral")[0], BitNetQuantizationConfig(min_coverage=0.5, keep=["experts"]))


# ---- errors, bars ----


@pytest.mark.parametrize("spoil", ["nan", "zero", "group", "coverage", "static"])
def test_a_model_is_unchanged_after_an_error(spoil: str) -> None:
    model, batch = tiny("llama")
    fields: dict[str, Any] = {}
    last = model.model.layers[-1].mlp.down_proj.weight
    if spoil in ("nan", "zero"):
        with torch.no_grad():
            last[3, 5] = float("nan")
            last.copy_(last if spoil == "nan" else torch.zeros_like(last))
    else:
        fields = {"group": {"overrides": {"down_proj": {"group_size": 64}}}, "coverage": {"min_coverage": 0.99}}.get(
            spoil, {"form": "packed", "activation": "int8_static"}
        )
    modules = [(name, id(module)) for name, module in model.named_modules()]
    output = model(**batch).logits
    with pytest.raises(ValueError, match=r"down_proj|min_coverage|static|calibrated"):
        quantize_model(model, BitNetQuantizationConfig(**fields))
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    assert not hasattr(model.config, "quantization_config")
    assert torch.equal(model(**batch).logits, output) or spoil == "nan"


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False), (None, False)])
def test_progress_bar(progress: bool | None, shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = tiny("llama")
    quantize_model(model, CONFIG, progress=progress)
    pack_model(model, progress=progress)
    text = capsys.readouterr().err
    assert all((what in text) is shown for what in ("checking", "quantizing", "packing"))


def test_progress_bar_on_many_layers(capsys: pytest.CaptureFixture[str]) -> None:
    quantize_model(nn.Sequential(*[nn.Linear(2, 2) for _ in range(64)]), CONFIG)
    assert "quantizing" in capsys.readouterr().err
