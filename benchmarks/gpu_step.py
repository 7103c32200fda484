"""A QAT training step on the GPU against the same in bfloat16 nn.Linear: time, memory, host syncs, graph breaks. Own.

Eight decoder layers in the shape of Llama-3-8B without embeddings and head, bfloat16 parameters and activations; 4 x 2048
tokens; forward, then backward from a fixed random gradient of the output. No optimizer, which would be the same for all arms
and make their ratios look better. All arms have the same parameters, take turns, and are compared by the ratio of medians.

memory  what a step allocates over parameters and gradients that are there before: at its peak, and after forward ("kept").
saved   bytes that autograd saves for backward, each storage once, in the eager mode (`saved_memory.py` says how they count).
syncs   the step under torch.cuda.set_sync_debug_mode("error"): whether the host ever waits for the GPU.
graphs  ours and nn.Linear are compiled with fullgraph=True, so a graph break is an error and not a slow row.

    python -m benchmarks.gpu --only step
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import hf_bitnet as hb
import hf_bitnet.surgery as surgery
from benchmarks.gpu_common import Arms, NotTimedError, Row, Section, Settings, attempt, bfloat16, ratio, say, synchronize, timed
from benchmarks.gpu_parity import LOSSES
from benchmarks.saved_memory import SavedBytes
from hf_bitnet.modules.low_precision import Int8Backward

BASE, EXACT, INT8 = "bfloat16 nn.Linear", "hf_bitnet W1.58A8", "hf_bitnet W1.58A8, int8 backward"
ONEBITLLMS, TORCHAO = "onebitllms", "torchao BitNet weight"
OURS = (EXACT, INT8)
# what a step of ours computes with
OPERATIONS = ("int_linear", "fixed_matmul", "quantize_rows", "quantize_weight", "mean_magnitudes", "scale_rows", LOSSES)
# a peer is not compiled when less is left: it may take minutes
_PEER_SECONDS = 90.0
TIME_BARS, MEMORY_BAR = {EXACT: 1.0, INT8: 0.8}, 0.75


class Sizes(NamedTuple):
    """Attributes: ffn: inner width of the feed-forward layers. backend: of torch.compile."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    batch: int
    length: int
    rounds: int
    backend: str


FULL = Sizes(4096, 14336, 8, 32, 8, 4, 2048, 11, "inductor")
SMOKE = Sizes(64, 96, 2, 4, 2, 2, 16, 1, "aot_eager")


class Stack(nn.Module):
    """Decoder layers, one after another."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        assert config.num_hidden_layers is not None
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, T, hidden), cos and sin (1, T, head size) -> (B, T, hidden)."""
        for layer in self.layers:
            x = layer(x, position_embeddings=(cos, sin))
        return x


class Inputs(NamedTuple):
    """Attributes: grad: of the output, what backward starts from."""

    x: Tensor
    cos: Tensor
    sin: Tensor
    grad: Tensor


def make(sizes: Sizes, device: torch.device) -> tuple[Stack, Inputs]:
    generator = torch.Generator(device).manual_seed(0)
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": sizes.hidden, "intermediate_size": sizes.ffn, "num_hidden_layers": sizes.layers}
    config = LlamaConfig(num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads, **shape)
    config._attn_implementation = "sdpa"
    with torch.device(device):
        stack = Stack(config).bfloat16()
    x, grad = (bfloat16(generator, sizes.batch, sizes.length, sizes.hidden) for _ in range(2))
    rotary = LlamaRotaryEmbedding(config).to(device)
    cos, sin = rotary(x, torch.arange(sizes.length, device=device)[None])
    return stack, Inputs(x.requires_grad_(), cos, sin, grad)


# ---- arms ----


def exact_arm(stack: Stack) -> nn.Module:
    return hb.quantize_model(stack, hb.BitNetQuantizationConfig.bitnet_b158(), progress=False)


def int8_arm(stack: Stack) -> nn.Module:
    """Both products of backward with int8 gradients, as where `QATArguments.int8_backward` measured them close enough."""
    model = exact_arm(stack)
    for _, layer in surgery.quantized_layers(model):
        layer.int8_backward = Int8Backward()
    return model


def onebitllms_arm(stack: Stack) -> nn.Module:
    try:
        from onebitllms import BitNetLinear  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise NotTimedError("not installed") from None
    # not its replace_linear_with_bitnet_linear: that copies the weights and changes torch's default dtype
    for name, module in list(stack.named_modules()):
        if isinstance(module, nn.Linear):
            with torch.device("meta"):
                layer = BitNetLinear(module.in_features, module.out_features)
            layer.weight = module.weight
            stack.set_submodule(name, layer)
    return stack


def torchao_arm(stack: Stack) -> nn.Module:
    try:
        from torchao.prototype.quantized_training import bitnet_training  # pyright: ignore[reportMissingImports]
        from torchao.quantization import quantize_  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise NotTimedError("not installed") from None
    quantize_(stack, bitnet_training())
    return stack


ARMS: dict[str, Callable[[Stack], nn.Module]] = {
    BASE: lambda stack: stack,
    EXACT: exact_arm,
    INT8: int8_arm,
    TORCHAO: torchao_arm,
    ONEBITLLMS: onebitllms_arm,
}


class Made(NamedTuple):
    """Attributes: model: of an arm. run: the model, or what compiled it."""

    model: nn.Module
    run: Callable[..., Tensor]


def arm(name: str, stack: Stack, compiled: bool, sizes: Sizes, settings: Settings) -> Made:
    """The model of an arm, which shares the parameters of `stack`, and what runs it."""
    seconds = _PEER_SECONDS if compiled and name in (TORCHAO, ONEBITLLMS) else 0.0
    reason = settings.why_not(*(OPERATIONS if name in OURS else ()), seconds=seconds)
    if reason is None and compiled and name == ONEBITLLMS:
        reason = "not compiled: it turns the compiler off twice in every layer"
    if reason is not None:
        raise NotTimedError(reason)
    model = ARMS[name](copy.deepcopy(stack, {id(parameter): parameter for parameter in stack.parameters()}))
    model.train()
    if not compiled:
        return Made(model, model)
    return Made(model, torch.compile(model, fullgraph=name != TORCHAO, backend=sizes.backend))


def clear(model: nn.Module, inputs: Inputs) -> None:
    for tensor in (inputs.x, *model.parameters()):
        tensor.grad = None


def step_of(made: Made, inputs: Inputs) -> Callable[[], None]:
    """Forward and backward from no gradients."""

    def step() -> None:
        clear(made.model, inputs)
        made.run(inputs.x, inputs.cos, inputs.sin).backward(inputs.grad)

    return step


# ---- what is measured of an arm besides its time ----


def memory(made: Made, inputs: Inputs) -> Row:
    """GB over parameters and gradients, which are there before."""
    step_of(made, inputs)()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = made.run(inputs.x, inputs.cos, inputs.sin)
    kept = torch.cuda.memory_allocated() - before
    y.backward(inputs.grad)
    del y
    torch.cuda.synchronize()
    return {"peak GB": (torch.cuda.max_memory_allocated() - before) / 1e9, "kept GB": kept / 1e9}


def syncs(step: Callable[[], object]) -> str:
    """ "none", or what made the host wait."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error).splitlines()[0][:80]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def saved(model: nn.Module, inputs: Inputs) -> Row:
    """MB that autograd saves in one forward."""
    counter = SavedBytes(model)
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
        model(inputs.x, inputs.cos, inputs.sin)
    counts = counter.count()
    # a peer whose layers are no nn.Linear has no count of its own for them
    linears = counts["linears"] / 1e6 if counts["linears"] else "-"
    return {"linears MB": linears, "weights MB": counts["weights"] / 1e6, "all MB": counts["block"] / 1e6}


# ---- tables ----


def measure_mode(mode: str, stack: Stack, inputs: Inputs, sizes: Sizes, settings: Settings) -> list[Row]:
    """One row for each arm, eager or compiled."""
    made: dict[str, Made] = {}
    failed: dict[str, str] = {}
    torch._dynamo.reset()
    for name in ARMS:
        say(f"  step, {mode}: {name}")
        found, wrong = attempt(name, lambda name=name: arm(name, stack, mode == "compiled", sizes, settings), settings.device)
        if wrong is None:
            wrong = attempt(name, step_of(found, inputs), settings.device)[1]
        if wrong is None:
            made[name] = found
        else:
            failed[name] = wrong
    steps: Arms = {name: step_of(found, inputs) for name, found in made.items()}
    seconds, late = timed(steps, sizes.rounds, settings.device)
    failed |= late
    rows: list[Row] = []
    for name in ARMS:
        row: Row = {"mode": mode, "arm": name, "ms": failed.get(name, "-"), "ratio": "-"}
        if name in seconds:
            row |= {"ms": seconds[name] * 1e3, "ratio": ratio(seconds, name, BASE) or "-"}
        if name in seconds and settings.cuda:
            found, wrong = attempt(name, lambda name=name: memory(made[name], inputs), settings.device)
            row |= found or {"peak GB": wrong}
            row["host waits for"] = syncs(steps[name])
            synchronize(settings.device)
        rows.append(row)
    for model, _ in made.values():
        clear(model, inputs)
    _add_ratio(rows, "peak GB")
    return rows


def _add_ratio(rows: list[Row], column: str) -> None:
    """Each figure of the column over the first row's, beside it."""
    base = rows[0].get(column)
    for row in rows:
        both = isinstance(row.get(column), float) and isinstance(base, float)
        row[f"{column}, ratio"] = row[column] / base if both and base else "-"


def measure_saved(stack: Stack, inputs: Inputs, sizes: Sizes, settings: Settings) -> list[Row]:
    rows: list[Row] = []
    for name in ARMS:
        say(f"  bytes saved for backward: {name}")

        def count(name: str = name) -> Row:
            return saved(arm(name, stack, False, sizes, settings).model, inputs)

        found, wrong = attempt(name, count, settings.device)
        rows.append({"arm": name, **(found or {"linears MB": wrong, "weights MB": "-", "all MB": "-"})})
    _add_ratio(rows, "linears MB")
    _add_ratio(rows, "all MB")
    return rows


def measure(settings: Settings, sizes: Sizes | None = None) -> Section:
    sizes = sizes or (SMOKE if settings.smoke else FULL)
    section = Section()
    stack, inputs = make(sizes, settings.device)
    rows: list[Row] = []
    for mode in ("eager", "compiled"):
        rows += measure_mode(mode, stack, inputs, sizes, settings)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    section.tables["training step"] = [{key: row.get(key, "-") for key in columns} for row in rows]
    if not settings.cuda:
        say("  memory and host syncs of a step: skipped: needs CUDA")
    section.tables["bytes saved for backward, eager"] = measure_saved(stack, inputs, sizes, settings)
    for row in rows:
        if row["arm"] not in TIME_BARS:
            continue
        found = row["ratio"] if isinstance(row["ratio"], float) else None
        section.bar(f"step, {row['mode']}, {row['arm']}: time", found, TIME_BARS[row["arm"]], at_least=False)
        peak = row.get("peak GB, ratio")
        found = peak if isinstance(peak, float) else None
        section.bar(f"step, {row['mode']}, {row['arm']}: peak memory", found, MEMORY_BAR, at_least=False)
    return section
