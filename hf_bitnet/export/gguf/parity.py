"""Compares a written file with the model: every value exactly, then logits by llama.cpp or by transformers' own reader. Own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...surgery import dequantize_model, independent_copy
from .. import plain
from ..format import Source
from ..plain import run_plain
from ..report import Check
from ..running import model_logits
from . import llama_cpp
from .architectures import head_size
from .kinds import RECENT, Kind
from .planning import Entry, Plan, probe_length
from .reading import Stored, decoded_by, read_head, rows_of

# of the standard deviation of the logits. Where a number of the input lies between two of its 8-bit steps, sums in another
# order round it to the other one, and the layers above carry that on: random models of 2 to 12 layers are off by up to 0.014, a
# trained one of 6 by 0.004, positions where no step differs by 1e-6. At worst the two roundings have nothing in common any more
LIMIT = 0.03
_OF_ROUNDING = 1.5
# weights that are decoded at once, to several arrays of floats
_AT_ONCE = 1 << 18
# architectures whose files transformers' own reader takes
_TRANSFORMERS = ("llama", "qwen2")


def compare_values(path: Path, plan: Plan) -> Check:
    """Every tensor, decoded, against codes times the rounded scale (or the rounded floats), bit for bit."""
    found, reader = read_head(path)
    what = "codes and scales"
    if extra := found.keys() - {entry.stored for entry in plan.entries}:
        return Check(reader, what, False, f"{min(extra)} is no tensor of the model")
    for entry in plan.entries:
        stored = found.get(entry.stored)
        if stored is None or (stored.kind, stored.shape) != (entry.kind.id, entry.shape):
            return Check(reader, what, False, f"{entry.stored} is missing or of another kind or shape")
    # not in threads: decoding is many small operations of numpy, which wait for each other
    different = next((entry for entry in plan.entries if not _equal(path, entry, found[entry.stored])), None)
    if different is not None:
        return Check(reader, what, False, f"{different.stored} is another")
    counted = Counter(f"{entry.kind.name} decoded by {decoded_by(entry.kind)}" for entry in plan.entries)
    return Check(reader, what, True, "bit for bit: " + ", ".join(f"{n} x {kind}" for kind, n in counted.items()))


def _equal(path: Path, entry: Entry, stored: Stored) -> bool:
    rows, start = rows_of(path, stored, entry.kind), 0
    for part in entry.content.parts(_AT_ONCE):
        wanted = part.values()
        found = rows(start, start + len(wanted))
        start += len(wanted)
        # of some MB, torch.equal takes four times as long
        if not np.array_equal(found.view(wanted.shape).numpy(), wanted.numpy()):
            return False
    return True


class References:
    """Logits float32 (1, length, vocabulary) of the probe, as the reader and this library compute them.

    Attributes:
        float_activations: of the stored weights, nothing else rounded.
        target: of the stored weights by ggml's rules on the CPU: a linear rounds its input to 8 bits, with one scale for 32
            or 256 numbers, or to half precision; GELU is a table of half-precision numbers.
        own: of the model itself.
    """

    def __init__(self, source: Source, plan: Plan) -> None:
        self.ids = source.probe(probe_length(plan))
        model = _stored_weights(source, plan)
        self.float_activations = _run(model, self.ids)
        if plan.architecture.rounds_activation:
            for index in range(source.model.config.num_hidden_layers):
                activation = model.get_submodule(f"model.layers.{index}.mlp.act_fn")
                activation.register_forward_pre_hook(lambda _, inputs: _table(inputs[0]))
                activation.register_forward_hook(lambda _, inputs, output: _table(output))
        for name, kind in _multiplied(plan):
            module = _linear(model, name)
            module.register_forward_pre_hook(_rounding(kind))
        self.target = _run(model, self.ids)
        self.own = _run(_in_float32(source.model), self.ids)


def _table(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 10, x.half().float(), x)


def _rounding(kind: Kind) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda _, inputs: (rounded_input(inputs[0], kind), *inputs[1:])


def rounded_input(x: Tensor, kind: Kind) -> Tensor:
    """float32 (..., K) as ggml's product with a weight of that kind takes it."""
    if kind.encode is None:
        return x.to(kind.dtype).float()
    blocks = x.unflatten(-1, (-1, 256 if kind.block == 256 else 32))
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    codes = (blocks * torch.where(largest > 0, 127 / largest, 0)).round()
    scale = largest / 127 if kind.block == 256 else (largest / 127).half().float()
    return (codes * scale).flatten(-2)


def _multiplied(plan: Plan) -> list[tuple[str, Kind]]:
    """Dotted names of the linear maps, and the kinds of their weights."""
    matrices = {entry.stored: entry for entry in plan.entries if len(entry.shape) > 1}
    table = matrices.pop("token_embd.weight")
    head = matrices.pop("output.weight", table)  # none of its own: tied
    linears = [(entry.name.removesuffix(".weight"), entry.kind) for entry in matrices.values()]
    return [*linears, ("lm_head", head.kind)]


@torch.no_grad()
def _stored_weights(source: Source, plan: Plan) -> Any:
    """A plain model in float32 with the values that are in the file."""
    shared = {id(each): each for each in source.model.parameters() if not each.is_floating_point()}
    model: Any = dequantize_model(independent_copy(source.model, shared), dtype=torch.float32).float()
    for entry in plan.entries:
        if len(entry.shape) > 1:
            weight, start = _linear(model, entry.name.removesuffix(".weight")).get_parameter("weight"), 0
            for part in replace(entry.content, order=None).parts():
                values = part.values()
                weight[start : start + len(values)] = values.to(weight.device)
                start += len(values)
    return model


def _linear(model: nn.Module, name: str) -> nn.Module:
    module = model.get_submodule(name)
    return module[-1] if isinstance(module, nn.Sequential) else module  # behind a norm


def _in_float32(model: Any) -> Any:
    if all(each.dtype == torch.float32 for each in model.parameters() if each.is_floating_point()):
        return model
    shared = {id(each): each for each in model.parameters() if not each.is_floating_point()}
    return independent_copy(model, shared).float()


def _run(model: Any, ids: Tensor) -> Tensor:
    return model_logits(model, {"input_ids": ids})


def compare_logits(path: Path, source: Source, plan: Plan) -> list[Check]:
    """By llama.cpp where it is installed, else by transformers' own reader of such files where that knows all of it."""
    if not llama_cpp.is_installed():
        missing = Check("llama.cpp", "logits", None, llama_cpp.INSTALL)
        return [missing, *_by_transformers(path, source, plan)]
    try:
        found = llama_cpp.logits(path, source.probe(probe_length(plan)))
    except llama_cpp.TooOldError as error:
        return [Check("llama.cpp", "logits", None, f"{llama_cpp.INSTALL} --upgrade ({error})")]
    except RuntimeError as error:
        return [Check("llama.cpp", "logits", False, str(error))]
    wanted = References(source, plan)
    error = relative_error(found, wanted.target)
    limit = max(LIMIT, _OF_ROUNDING * relative_error(wanted.target, wanted.float_activations))
    detail = (
        f"relative error {error:.2g} of its own rounding of activations, limit {limit:.2g}; "
        f"{relative_error(found, wanted.float_activations):.2g} of float activations, "
        f"{relative_error(found, wanted.own):.2g} of hf_bitnet's"
    )
    return [Check("llama.cpp", "logits", bool(error <= limit), detail)]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference over the standard deviation of the wanted logits; NaN where the shapes differ."""
    if found.shape != wanted.shape:
        return float("nan")
    return float((found - wanted).square().mean().sqrt() / wanted.std())


def _by_transformers(path: Path, source: Source, plan: Plan) -> list[Check]:
    if not _transformers_knows(source, plan):
        return []
    wanted = References(source, plan)
    reader = "transformers without hf_bitnet"
    try:
        inputs = {"input_ids": wanted.ids}
        found = run_plain(path.parent, "AutoModelForCausalLM", inputs, torch.float32, gguf_file=path.name)["logits"]
    except RuntimeError as error:
        return [Check(reader, "logits", None, str(error))]
    return [plain.compare_logits(reader, found, wanted.float_activations, plain.FLOAT32_LIMIT)]


def _transformers_knows(source: Source, plan: Plan) -> bool:
    """Its reader drops what a file says of scaled positions, of the size of heads, and of biases in a LLaMA."""
    config = source.model.config
    usual = head_size(config) * config.num_attention_heads == config.hidden_size
    biased = plan.architecture.name == "llama" and any(entry.stored.endswith(".bias") for entry in plan.entries)
    scaled = plan.metadata.words or plan.metadata.tensors
    known = plan.architecture.name in _TRANSFORMERS and not any(entry.kind.name in RECENT for entry in plan.entries)
    return known and usual and not biased and not scaled
