"""DistillationConfig: which of the teacher's outputs and inner states the student learns, and how. Own.

Leaves out: who the teacher is (`teacher=` of QATTrainer).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..options import number, read_options, whole
from .divergences import DIVERGENCES
from .hidden import HIDDEN_LOSSES
from .token_noise import TokenNoise

STATES = ("query", "key", "value")
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class HiddenStates:
    """Outputs of decoder (encoder) layers are drawn to the teacher's, a token at a time.

    Args:
        weight: of the term; see `DistillationConfig.balance`.
        loss: "cosine", 1 - cos; "mse", the mean over features of the squared difference; "huber".
        delta: where Huber's loss turns from a parabola into a line.
        layers: {layer of the student: layer of the teacher}, counted from 0, negative from the end. Default: every layer of
            the student, each with the teacher's at the same fraction of the depth.
    """

    weight: float = 1.0
    loss: str = "cosine"
    delta: float = 1.0
    layers: dict[int, int] | None = None

    def __post_init__(self) -> None:
        _positive("weight", self.weight, "1.0")
        HIDDEN_LOSSES.get(self.loss)
        _positive("delta", self.delta, "1.0")
        if self.layers is not None:
            object.__setattr__(self, "layers", _layer_map(self.layers))


@dataclass(frozen=True)
class Relations:
    """How alike the tokens of a sequence are to each other: attention relations of MiniLMv2 (arXiv 2012.15828), BitDistill
    (arXiv 2510.13998).

    For the queries, and alike for keys and values, split into `heads` parts: the softmax over tokens of x_i . x_j, whose KL
    divergence from the teacher's is the loss. Widths of student and teacher may differ.

    Args:
        weight: of the term; see `DistillationConfig.balance`.
        states: which of "query", "key", "value", as the projections make them (before norms and rotary embedding).
        heads: parts each state is split into. Default: the student's attention heads, or the greatest number below that
            divides every width.
        layer: of the student, counted from 0, negative from the end. Default: int(0.8 * layers), a late one, as BitDistill.
        teacher_layer: of the teacher. Default: at the same fraction of the depth.
        normalize: True compares vectors of length 1 (BitDistill); False divides by the root of their width (MiniLM).
        temperature: of the softmax.
        chunk_rows: rows of relations that exist at a time, over all heads; fewer take less memory.
    """

    weight: float = 1.0
    states: tuple[str, ...] = STATES
    heads: int | None = None
    layer: int | None = None
    teacher_layer: int | None = None
    normalize: bool = True
    temperature: float = 1.0
    chunk_rows: int = 1024

    def __post_init__(self) -> None:
        _positive("weight", self.weight, "1.0")
        states = (self.states,) if isinstance(self.states, str) else tuple(self.states)
        unknown = [state for state in states if state not in STATES]
        if unknown or not states or len(set(states)) != len(states):
            raise ValueError(f"states={self.states!r}; legal: some of {', '.join(map(repr, STATES))}, each once")
        object.__setattr__(self, "states", states)
        if self.heads is not None:
            whole("heads", self.heads)
        for name in ("layer", "teacher_layer"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name))
        _boolean("normalize", self.normalize)
        _positive("temperature", self.temperature, "1.0")
        whole("chunk_rows", self.chunk_rows)


@dataclass(frozen=True)
class DistillationConfig:
    """What is learned from the teacher.

    loss = alpha T^2 D(teacher, student) + (1 - alpha) CE  +  w_h hidden + w_r relations

    D is the divergence of the output distributions at temperature T, CE the cross entropy against the labels; all terms are
    means over the tokens whose label is not -100.

    Args:
        alpha: 1 learns outputs from the teacher alone, 0 from the labels alone.
        divergence: "forward", KL(teacher || student); "reverse", KL(student || teacher); "jsd", the generalised
            Jensen-Shannon divergence of GKD (arXiv 2306.13649).
        beta: share of the teacher in the mixture of "jsd", between 0 and 1; not used by the others.
        temperature: T of both distributions.
        token_noise: a `TokenNoise`, or a dict of its fields: some input tokens are replaced, for teacher and student alike.
            Useful on the text that the teacher was trained on. None leaves all as they are.
        chunk_tokens: rows of logits that exist at a time, of student and teacher together; fewer take less memory.
        hidden: a `HiddenStates`, or a dict of its fields; None leaves the term out.
        relations: a `Relations`, or a dict of its fields; None leaves the term out.
        balance: True measures `weight` of hidden and relations relative to the first two terms: 1 makes a term as large as
            both, by running means of all losses. False takes the weights as they are.
        balance_decay: of the running means, per optimizer step.
        teacher_dtype: "bfloat16", "float16" or "float32" casts the teacher's weights (in place, where you
            pass a model); None leaves them as they are.
        teacher_device: where the teacher computes, for example "cuda:1" or "cpu"; None is the student's device.

    Raises:
        ValueError, TypeError: that say what came, what is legal and the corrected call.
    """

    alpha: float = 0.5
    divergence: str = "forward"
    beta: float = 0.5
    temperature: float = 1.0
    token_noise: TokenNoise | dict[str, Any] | None = None
    chunk_tokens: int = 1024
    hidden: HiddenStates | dict[str, Any] | None = None
    relations: Relations | dict[str, Any] | None = None
    balance: bool = True
    balance_decay: float = 0.99
    teacher_dtype: str | None = None
    teacher_device: str | None = None

    def __post_init__(self) -> None:
        number("alpha", self.alpha, 0.0, 1.0, hint="1 learns from the teacher alone, 0 from the labels alone")
        DIVERGENCES.get(self.divergence)
        if not 0.0 < number("beta", self.beta, 0.0, 1.0) < 1.0:
            raise ValueError(
                f"beta={self.beta!r}: it must lie between 0 and 1; the ends are divergence='forward' and divergence='reverse'"
            )
        _positive("temperature", self.temperature, "1.0")
        object.__setattr__(self, "token_noise", read_options(TokenNoise, "token_noise", self.token_noise))
        whole("chunk_tokens", self.chunk_tokens)
        object.__setattr__(self, "hidden", read_options(HiddenStates, "hidden", self.hidden))
        object.__setattr__(self, "relations", read_options(Relations, "relations", self.relations))
        _boolean("balance", self.balance)
        if number("balance_decay", self.balance_decay, 0.0, 1.0) == 1.0:
            raise ValueError("balance_decay=1 would never measure anything; for example balance_decay=0.99")
        if self.teacher_dtype is not None and self.teacher_dtype not in _DTYPES:
            raise ValueError(f"teacher_dtype={self.teacher_dtype!r}; legal: {', '.join(map(repr, _DTYPES))} or None")
        if self.teacher_device is not None:
            object.__setattr__(self, "teacher_device", _device(self.teacher_device))

    @property
    def inner_terms(self) -> dict[str, float]:
        """Names and weights of the terms that look inside the teacher."""
        parts = {"hidden": self.hidden, "relations": self.relations}
        return {name: part.weight for name, part in parts.items() if isinstance(part, HiddenStates | Relations)}

    @property
    def needs_teacher(self) -> bool:
        return self.alpha > 0.0 or bool(self.inner_terms)

    @property
    def dtype(self) -> torch.dtype | None:
        """`teacher_dtype` as torch's."""
        return None if self.teacher_dtype is None else getattr(torch, self.teacher_dtype)


def _positive(name: str, value: Any, example: str) -> None:
    if number(name, value, 0.0) == 0.0:
        raise ValueError(f"{name} must be above 0, got {value!r}; for example {name}={example}")


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}; for example {name}=-1 for the last layer")


def _device(value: Any) -> str:
    try:
        return str(torch.device(value))
    except (RuntimeError, TypeError) as error:
        words = str(error).splitlines()[0]
        raise ValueError(f"teacher_device={value!r} is no device ({words}); for example teacher_device='cuda:1'") from None


def _layer_map(value: Any) -> dict[int, int]:
    hint = "write {layer of the student: layer of the teacher}, for example layers={0: 0, 5: 11}"
    if not isinstance(value, Mapping) or not value:
        raise TypeError(f"layers must be a dict, got {value!r}; {hint}")
    try:  # JSON has no integer keys
        found = {int(key) if isinstance(key, str) else key: item for key, item in value.items()}
    except ValueError:
        raise ValueError(f"layers={value!r} has a key that is no whole number; {hint}") from None
    for pair in found.items():
        for each in pair:
            _integer("each layer", each)
    return found
