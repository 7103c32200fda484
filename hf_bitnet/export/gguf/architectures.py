"""Which architecture of llama.cpp or bitnet.cpp computes a model, and what it cannot. Own; read in their sources.

A file names an architecture; the program then computes that one, whatever the tensors were trained for. So everything in
which a model may differ from it is compared here and refused: an activation, a bias, a norm, a tied head, sizes of heads.
What only changes numbers that the file carries (positions, windows, sizes) is in `metadata.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...modules import QuantizedLayer
from ..format import Source

_ATTENTION = ("attn_q", "attn_k", "attn_v")
# a module of a transformers layer -> its tensor
_MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
    "mlp.down_proj": "ffn_down",
}
_GEMMA_MODULES = _MODULES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_SUB_NORMS = {"attn_output": "attn_sub_norm", "ffn_down": "ffn_sub_norm"}
_SILU, _GELU, _SQUARED_RELU = ("silu", "swish"), ("gelu_pytorch_tanh",), ("relu2",)


@dataclass(frozen=True)
class Architecture:
    """One architecture of a program.

    Attributes:
        name: in the file. program: that computes it. activation: of its feed-forward part, in transformers' names.
        biases: tensors that may have one. ropes: kinds of positions that it knows.
        modules: see `_MODULES`.
        permuted: positions rotate neighbours in a head, where transformers rotates halves; rows of q and k are moved.
        square: heads together are as wide as the hidden states.
        tied: the output head is the table of embeddings.
        sub_norms: has norms in front of `attn_output` and `ffn_down`.
        norm_offset: what the model adds to the weights of its norms. windows: knows layers with a window.
        rounds_activation: on processors the activation is looked up in half precision.
    """

    name: str
    program: str = "llama.cpp"
    activation: tuple[str, ...] = _SILU
    biases: tuple[str, ...] = ()
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    modules: dict[str, str] = field(default_factory=lambda: _MODULES)
    permuted: bool = False
    square: bool = False
    tied: bool = False
    sub_norms: bool = False
    norm_offset: float = 0.0
    windows: bool = False
    rounds_activation: bool = False

    def stored(self, name: str) -> str | None:
        """Name of the tensor for a dotted name of the model, module or parameter; None where there is no place for it."""
        module, _, leaf = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
        inside = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
        found = self.modules.get(inside[2]) if inside else _OUTSIDE.get(module)
        if found is None or (leaf == "bias" and found not in self.biases):
            return None
        found = f"blk.{inside[1]}.{found}" if inside else found
        return f"{found}.{leaf}" if leaf else found

    def row_order(self, stored: str, rows: int, config: Any) -> Tensor | None:
        """int64 (rows,): the row of the model that stands in each row of the tensor; None where they stay."""
        kind = stored.split(".")[2] if stored.startswith("blk.") else ""
        if not self.permuted or kind not in ("attn_q", "attn_k"):
            return None
        heads = config.num_attention_heads if kind == "attn_q" else heads_of_keys(config)
        # halves of a head become neighbours
        return torch.arange(rows, device="cpu").view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


LLAMA = Architecture(
    "llama",
    biases=(*_ATTENTION, "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
    ropes=("default", "linear", "yarn", "llama3"),
    permuted=True,
)
BITNET = Architecture("bitnet", square=True, tied=True, sub_norms=True)
_BY_CLASS = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": Architecture("qwen2", biases=_ATTENTION, square=True),
    "Qwen3ForCausalLM": Architecture("qwen3", biases=_ATTENTION),
    "Gemma3ForCausalLM": Architecture(
        "gemma3",
        activation=_GELU,
        biases=_ATTENTION,
        ropes=("default", "linear"),
        modules=_GEMMA_MODULES,
        norm_offset=1.0,
        windows=True,
        rounds_activation=True,
    ),
    "Phi3ForCausalLM": Architecture("phi3", biases=("attn_qkv",), ropes=("default", "longrope"), square=True),
    "BitNetForCausalLM": BITNET,
}
# of bitnet.cpp; its others want a norm in front of every layer, or are not known to hold I2_S
_BITNET_CPP = {"llama": "llama", "bitnet": "bitnet"}


def architecture_of(source: Source, program: str) -> Architecture | str:
    """What computes the model in that program ("llama.cpp" or "bitnet.cpp"), or why nothing does."""
    kind = type(source.model).__name__
    found = _BY_CLASS.get(kind)
    if found is None:
        return f"{kind} is none of the models that are known here ({', '.join(_BY_CLASS)}); use format='dense'"
    if found is LLAMA and source.normed:
        found = BITNET  # LLaMA with two more norms
    if program == "llama.cpp":
        return found
    if found.name not in _BITNET_CPP:
        return f"bitnet.cpp has no architecture for a {kind} as it is; use format='gguf'"
    if found is BITNET and _activation(source.model) in _SQUARED_RELU:
        return replace(BITNET, name="bitnet-b1.58", program=program, activation=_SQUARED_RELU)
    return replace(found, program=program)


def problems(source: Source, architecture: Architecture) -> list[str]:
    """What the architecture cannot compute."""
    config, model = source.model.config, source.model
    where = f"{architecture.program}'s architecture {architecture.name!r}"
    found = []
    if (activation := _activation(model)) not in architecture.activation:
        way = "; format='i2_s' is for bitnet.cpp, which computes it" if activation in _SQUARED_RELU else ""
        found.append(f"the activation is {activation!r}, {where} computes {architecture.activation[0]!r}{way}")
    if architecture.square and head_size(config) * config.num_attention_heads != config.hidden_size:
        found.append(
            f"{config.num_attention_heads} heads of {head_size(config)} are not as wide as the hidden size "
            f"{config.hidden_size}, which {where} wants"
        )
    if architecture.tied and not heads_are_tied(model):
        found.append(f"the output head is not tied to the embeddings, which {where} wants")
    if getattr(config, "attn_logit_softcapping", None) or getattr(config, "use_bidirectional_attention", False):
        found.append(f"its attention is capped or looks ahead, which {where} does not")
    return found + _unplaced(source, architecture, where)


def _unplaced(source: Source, architecture: Architecture, where: str) -> list[str]:
    names = [*source.layers, *source.tables, *source.others]
    names += [f"{name}.bias" for name, layer in source.layers.items() if layer.plain_bias is not None]
    lost = [name for name in names if architecture.stored(name) is None]
    return [f"{where} has no place for {lost[0]}" + (f" and {len(lost) - 1} more" if len(lost) > 1 else "")] if lost else []


def norm_problems(source: Source, architecture: Architecture) -> list[str]:
    """Of norms that this library put in front of layers; those of the model itself are modules of it."""
    normed, config = source.normed, source.model.config
    if not normed:
        return []
    where = f"{architecture.program}'s architecture {architecture.name!r}"
    found = []
    for name in normed:
        norm = source.layers[name].sub_norm
        assert norm is not None
        kind = (architecture.stored(name) or "").split(".")[-1]
        if not architecture.sub_norms or kind not in _SUB_NORMS or type(source.model).__name__ not in _PLAIN_LLAMAS:
            found.append(f"{where} has no norm in front of {name}; for it quantize with sub_norm=['o_proj', 'down_proj']")
        elif float(norm.blend) != 1.0:
            found.append(
                f"the norm of {name} is blended in by {float(norm.blend):g}; call hf_bitnet.set_norm_blend(model, 1.0)"
            )
        elif norm.eps != config.rms_norm_eps:
            found.append(f"the norm of {name} has eps={norm.eps:g}, {where} has {config.rms_norm_eps:g} for all")
    wanted = [name for name in source.layers if (architecture.stored(name) or "").split(".")[-1] in _SUB_NORMS]
    missing = len(wanted) < 2 * config.num_hidden_layers or any(name not in normed for name in wanted)
    if not found and missing:
        found.append(f"{where} has a norm in front of every o_proj and down_proj, this model in front of some only")
    return found[:1]


_PLAIN_LLAMAS = tuple(name for name, architecture in _BY_CLASS.items() if architecture is LLAMA)


def sub_norms(source: Source, architecture: Architecture) -> dict[str, tuple[str, Tensor]]:
    """Name of the gain of each of our norms -> name of its tensor, the gain."""
    found = {}
    for name in source.normed:
        norm = source.layers[name].sub_norm
        block, _, kind = (architecture.stored(name) or "").rpartition(".")
        assert norm is not None
        found[f"{name}.sub_norm.weight"] = (f"{block}.{_SUB_NORMS[kind]}.weight", norm.weight)
    return found


def _normed(source: Source) -> list[str]:
    return [name for name, layer in source.layers.items() if (norm := layer.sub_norm) and float(norm.blend) != 0.0]


def _activation(model: PreTrainedModel) -> str:
    config = model.config
    return str(getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None))


def head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def heads_of_keys(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def heads_are_tied(model: PreTrainedModel) -> bool:
    """Whether the output head has the very weight of the table of embeddings."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is not None and head._parameters.get("weight") is table._parameters.get("weight")


def tied_head(source: Source) -> QuantizedLayer | None:
    """The quantized output head that shares the bytes of a table, so that the file has no tensor of its own for it."""
    head = source.model.get_output_embeddings()
    return head if isinstance(head, QuantizedLayer) and heads_are_tied(source.model) else None
