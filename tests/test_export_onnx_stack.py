"""Format "onnx" of deep models: layers that are alike are traced three times, all others as often as there are some."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hf_bitnet as hb
from hf_bitnet.export import Source
from hf_bitnet.export.onnx import graph as graphs
from hf_bitnet.export.onnx.readers import runtime_logits
from hf_bitnet.export.onnx.stack import Stack, find_stack, repeat, shortened
from hf_bitnet.export.onnx.traced import Wanted, traced_view
from tests.tiny import tiny

onnx: Any = pytest.importorskip("onnx", reason="the format's files are read by onnx: pip install 'hf_bitnet[onnx]'")
pytest.importorskip("onnxruntime", reason="it runs the graphs: pip install 'hf_bitnet[onnx]'")
pytest.importorskip("onnxscript", reason="torch.onnx.export needs it: pip install 'hf_bitnet[onnx]'")

DEEP = 6


def deep(family: str = "llama", **fields: Any) -> Any:
    overrides = fields.pop("overrides", {})
    quantization = hb.BitNetQuantizationConfig(weight="int4", overrides=overrides)
    return hb.quantize_model(tiny(family, num_hidden_layers=DEEP, **fields)[0], quantization)


def view_of(model: Any) -> Any:
    return traced_view(Source(model, None, "deep"), Wanted(torch.float32, 0, 2))[0]


def graph_of(view: Any) -> Any:
    names = [name for name, _ in view.named_parameters(remove_duplicate=False)]
    return graphs._simplified(graphs._trace(view, kv_cache=False, opset=20), names).graph


class Traces:
    """How many layers each trace had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layers: list[int] = []
        trace = graphs._trace

        def counted(model: Any, **options: Any) -> Any:
            self.layers.append(max(len(each) for each in model.modules() if isinstance(each, nn.ModuleList)))
            return trace(model, **options)

        monkeypatch.setattr(graphs, "_trace", counted)


def nodes_of(folder: Path) -> list[str]:
    return sorted(node.op_type for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        pytest.param("qwen3", {"kv_cache": True}, marks=pytest.mark.slow),
        pytest.param("mistral", {"kv_cache": True, "dtype": "float16"}, marks=pytest.mark.slow),
        pytest.param("bitnet", {"opset": 18}, marks=pytest.mark.slow),
        pytest.param("gpt2", {"kv_cache": True}, marks=pytest.mark.slow),
        pytest.param("bert", {}, marks=pytest.mark.slow),
    ],
)
def test_copies_compute_what_traced_layers_do(
    family: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied layers against a graph of layers that were all traced: the same operators, the same logits, bit for bit."""
    model, traces = deep(family), Traces(monkeypatch)
    report = hb.export_model(model, tmp_path / "copied", format="onnx", progress=False, **options)
    assert all(check.passed for check in report.checks) and len(report.checks) == 2, report
    assert traces.layers == [3]
    monkeypatch.setattr(graphs, "find_stack", lambda _: None)
    whole = hb.export_model(model, tmp_path / "traced", format="onnx", progress=False, verify=False, **options)
    assert traces.layers == [3, DEEP]
    assert [tensor.name for tensor in report.tensors] == [tensor.name for tensor in whole.tensors]
    assert nodes_of(tmp_path / "copied") == nodes_of(tmp_path / "traced")
    ends = [onnx.load(tmp_path / name / "model.onnx", load_external_data=False).graph for name in ("copied", "traced")]
    for of in ("input", "output"):
        assert [each.name for each in getattr(ends[0], of)] == [each.name for each in getattr(ends[1], of)]
    ids = torch.randint(3, 96, (2, 13))
    assert torch.equal(runtime_logits(tmp_path / "copied", ids), runtime_logits(tmp_path / "traced", ids))


def test_stack_is_what_is_alike() -> None:
    assert find_stack(view_of(deep())) == Stack("model.layers", DEEP)
    assert find_stack(view_of(deep("qwen3"))) == Stack("model.layers", DEEP)
    assert find_stack(view_of(deep(overrides={"layers.0.": {"weight": "int8"}}))) is not None  # the first one may differ
    assert find_stack(view_of(hb.quantize_model(tiny("llama")[0], hb.BitNetQuantizationConfig()))) is None  # no gain


def _other_setting(layer: Any) -> None:
    layer.self_attn.scaling = 0.5


def _other_module(layer: Any) -> None:
    layer.mlp.act_fn = nn.GELU()


def _one_more(layer: Any) -> None:
    layer.extra = nn.Identity()


def _other_buffer(layer: Any) -> None:
    layer.register_buffer("shift", torch.ones(3))


def _hooked(layer: Any) -> None:
    layer.mlp.register_forward_hook(lambda module, args, output: 2 * output)


@pytest.mark.parametrize("change", [_other_setting, _other_module, _one_more, _other_buffer, _hooked])
@pytest.mark.parametrize("index", [1, 4])
def test_one_layer_that_differs_is_no_stack(change: Any, index: int) -> None:
    view = view_of(deep())
    change(view.model.layers[index])
    assert find_stack(view) is None


@pytest.mark.parametrize(
    "model",
    [
        lambda: deep("gemma3", layer_types=["sliding_attention", "full_attention"] * (DEEP // 2)),
        lambda: deep(overrides={"layers.4.": {"weight": "int8"}}),
        lambda: deep(overrides={"layers.4.self_attn": {"granularity": "group", "group_size": 16}}),
    ],
    ids=["windows", "bits", "groups"],
)
def test_layers_of_several_kinds_are_no_stack(model: Any) -> None:
    assert find_stack(view_of(model())) is None


def test_buffers_with_other_numbers_are_no_stack() -> None:
    view = view_of(deep())
    for index, layer in enumerate(view.model.layers):
        layer.register_buffer("shift", torch.full((3,), float(index == 3)))
    assert find_stack(view) is None


@pytest.mark.parametrize(
    ("name", "value", "stack"),
    [
        ("rope_scaling_layers", [3, 5], False),
        ("layer_types", ["full_attention"] * 4 + ["sliding_attention"] * 2, False),
        ("layer_types", ["sliding_attention"] + ["full_attention"] * 5, True),
        ("dense_at", (0, 5), False),
        ("eos_token_id", [2, 3], True),
        ("sizes", [48, 80], True),
    ],
)
def test_config_that_tells_layers_apart(name: str, value: Any, stack: bool) -> None:
    view = view_of(deep("qwen3"))
    setattr(view.config, name, value)
    assert (find_stack(view) is not None) == stack


@pytest.mark.parametrize("kinds", [["a"] * 3 + ["b"] * 3, {0, 5}, {5: "b"}])
def test_model_that_may_tell_layers_apart(kinds: Any) -> None:
    """A forward that looks something up for each layer, as Molmo2's does."""
    view = view_of(deep())
    view.model.kinds = kinds
    assert find_stack(view) is None


@pytest.mark.parametrize("make", [lambda: torch.ones(2), lambda: [torch.ones(2)], lambda: np.ones(2), lambda: float("nan")])
def test_settings_that_cannot_be_compared(make: Callable[[], Any]) -> None:
    view = view_of(deep())
    for layer in view.model.layers:
        layer.mlp.setting = make()
    assert find_stack(view) is None


def test_model_is_as_it_was_after_tracing() -> None:
    view = view_of(deep("qwen3"))
    stack, layers, config = find_stack(view), view.model.layers, view.config.to_dict()
    assert stack is not None
    with pytest.raises(KeyError, match="interrupted"), shortened(view, stack):
        assert len(view.model.layers) == 3 and view.config.to_dict() == config
        raise KeyError("interrupted")
    assert view.model.layers is layers


class CountsLayers(nn.Module):
    """An output head that computes with the number of layers, or looks for all of them."""

    def __init__(self, head: nn.Module, model: Any, looks: bool) -> None:
        super().__init__()
        self.head, self._model, self._looks = head, [model], looks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self._model[0]
        if self._looks:
            assert inner.layers[DEEP - 1] is not None
        return self.head(x) / inner.config.num_hidden_layers**0.5


@pytest.mark.slow
@pytest.mark.parametrize(("looks", "layers"), [(False, [3]), (True, [3, DEEP])])
def test_forward_that_counts_layers(looks: bool, layers: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view, traces = view_of(deep()), Traces(monkeypatch)
    view.lm_head = CountsLayers(view.lm_head, view.model, looks)
    names = [name for name, _ in view.named_parameters(remove_duplicate=False)]
    copied = graphs.trace(view, names, kv_cache=False, opset=20).graph
    assert traces.layers == layers
    monkeypatch.setattr(graphs, "find_stack", lambda _: None)
    traced = graphs.trace(view, names, kv_cache=False, opset=20).graph
    numbers = [
        sorted(float(each.const_value.numpy()) for each in graph.initializers.values() if each.const_value and not each.shape)
        for graph in (copied, traced)
    ]
    assert numbers[0] == numbers[1] and any(abs(each - DEEP**0.5) < 1e-5 for each in numbers[0])


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_as_before(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    during = []
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: during.append(gc.isenabled()))
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(AssertionError):  # nothing was exported
            graphs._trace(view_of(deep()), kv_cache=False, opset=20)
        assert during == [False] and gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.slow
@pytest.mark.parametrize(("scaling", "copied"), [([0.5] * DEEP, True), ([0.5, 0.5, 0.25, 0.25, 0.25, 0.25], False)])
def test_numbers_of_a_layer_are_compared(scaling: list[float], copied: bool) -> None:
    """Also by their nodes, should nothing in the modules tell."""
    view = view_of(deep())
    stack = find_stack(view)
    assert stack is not None
    for layer, value in zip(view.model.layers, scaling, strict=True):
        layer.self_attn.scaling = value
    with shortened(view, stack):
        traced = graph_of(view)
    before = len(traced)
    assert repeat(traced, stack, "model.", ()) == copied
    assert (len(traced) > before) == copied


class ReadsBoth(nn.Module):
    """A norm at the end that also reads what the layer before the last one made."""

    def __init__(self, norm: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        layer.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self.kept = output[0] if isinstance(output, tuple) else output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) + self.kept


@pytest.mark.slow
def test_stack_that_others_look_into_is_left_alone() -> None:
    view = view_of(deep())
    stack = find_stack(view)
    assert stack is not None
    with shortened(view, stack):
        view.model.norm = ReadsBoth(view.model.norm, view.model.layers[1])
        traced = graph_of(view)
    before = [node.name for node in traced]
    assert not repeat(traced, stack, "model.", ())
    assert [node.name for node in traced] == before
