"""The terms that look inside student and teacher: hidden states and attention relations. Own.

Hooks keep the outputs of the layers that are compared, and only while a forward of a training step runs. The losses
themselves are in `hidden.py` and `relations.py`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...surgery import attention_heads, attention_projections, transformer_layers
from .config import DistillationConfig, HiddenStates, Relations
from .hidden import hidden_loss
from .relations import relation_loss

# what is kept of a module's output
Take = Callable[[Tensor], Tensor]
Places = dict[str, tuple[nn.Module, Take]]


class InnerStates:
    """Keeps states of one model by name while it runs.

    Args:
        places: name -> module and what to take of its output.
        compiled: whether the model is wrapped in torch.compile; the hooks are then left out of its graph.
        learns: whether it is trained by what is kept.
    """

    def __init__(self, places: Places, compiled: bool, *, learns: bool = False) -> None:
        self._places, self._learns, self._needs_grad = places, learns, False
        self._found: dict[str, Tensor] | None = None
        self._hooks = {name: self._hook(name, take, compiled) for name, (_, take) in places.items()}

    def _hook(self, name: str, take: Take, compiled: bool) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if self._found is None:  # a compiled model does not notice that its hooks are gone
                return
            if self._needs_grad and not torch.is_grad_enabled():
                raise ValueError(
                    f"{name} is computed without a gradient, as activation checkpointing with use_reentrant=True does; write "
                    "activation_checkpointing_kwargs={'use_reentrant': False}"
                )
            self._found[name] = take(output[0] if isinstance(output, tuple | list) else output)

        return torch.compiler.disable(keep) if compiled else keep

    @contextlib.contextmanager
    def kept(self) -> Iterator[dict[str, Tensor]]:
        """The states of a forward inside, by name. Hooks are gone afterwards: recomputed layers would call them again."""
        self._found, self._needs_grad = (found := {}), self._learns and torch.is_grad_enabled()
        handles = [module.register_forward_hook(self._hooks[name]) for name, (module, _) in self._places.items()]
        try:
            yield found
        finally:
            self._found = None
            for handle in handles:
                handle.remove()


class InnerTerms:
    """The losses between inner states.

    Args:
        student, teacher: unwrapped models.

    Raises:
        ValueError: a layer that does not exist, or a kind of model whose layers are not found.
    """

    def __init__(self, config: DistillationConfig, student: nn.Module, teacher: nn.Module, compiled: bool) -> None:
        self._hidden = config.hidden if isinstance(config.hidden, HiddenStates) else None
        self._relations = config.relations if isinstance(config.relations, Relations) else None
        ours, theirs = transformer_layers(student), transformer_layers(teacher)
        student_places: Places = {}
        teacher_places: Places = {}
        self._pairs = 0
        if self._hidden is not None:
            pairs = layer_pairs(self._hidden.layers, len(ours), len(theirs))
            self._pairs = len(pairs)
            for index, (mine, other) in enumerate(pairs):
                student_places[f"hidden.{index}"] = ours[mine][1], _whole
                teacher_places[f"hidden.{index}"] = theirs[other][1], _whole
        if self._relations is not None:
            self._heads = (attention_heads(student)[0], self._relations.heads)
            mine, other = relation_layers(self._relations, len(ours), len(theirs))
            student_places |= _projections(self._relations, student, *ours[mine])
            teacher_places |= _projections(self._relations, teacher, *theirs[other])
        self.student = InnerStates(student_places, compiled, learns=True)
        self.teacher = InnerStates(teacher_places, False)

    def __call__(
        self, student: dict[str, Tensor], teacher: dict[str, Tensor], weights: Tensor, exists: Tensor | None
    ) -> list[Tensor]:
        """The terms, summed over tokens, in the order of `DistillationConfig.inner_terms`.

        Args:
            student, teacher: states by name, (B, S, F) each.
            weights: of the tokens, (B, S). exists: bool (B, S), False for padding; None when there is none.
        """
        for name, state in student.items():
            if state.shape[:-1] != weights.shape or teacher[name].shape[:-1] != weights.shape:
                raise ValueError(
                    f"inner states of shape {tuple(state.shape)} (student) and {tuple(teacher[name].shape)} (teacher) do not "
                    f"match {tuple(weights.shape)} tokens; leave `hidden` and `relations` out for these models"
                )
        terms = []
        if self._hidden is not None:
            terms.append(self._hidden_term(self._hidden, student, teacher, weights))
        if self._relations is not None:
            terms.append(self._relation_term(self._relations, student, teacher, weights, exists))
        return terms

    def _hidden_term(
        self, settings: HiddenStates, student: dict[str, Tensor], teacher: dict[str, Tensor], weights: Tensor
    ) -> Tensor:
        names = [f"hidden.{index}" for index in range(self._pairs)]
        parts = [
            hidden_loss(student[name], teacher[name].to(weights.device), weights, settings.loss, settings.delta)
            for name in names
        ]
        return torch.stack(parts).mean()

    def _relation_term(
        self,
        settings: Relations,
        student: dict[str, Tensor],
        teacher: dict[str, Tensor],
        weights: Tensor,
        exists: Tensor | None,
    ) -> Tensor:
        ours, chosen = self._heads
        widths = [states[state].shape[-1] for states in (student, teacher) for state in settings.states]
        parts = [
            relation_loss(
                student[state],
                teacher[state].to(weights.device),
                chosen or math.gcd(ours, *widths),
                weights,
                exists,
                normalize=settings.normalize,
                temperature=settings.temperature,
                chunk_rows=settings.chunk_rows,
            )
            for state in settings.states
        ]
        return torch.stack(parts).mean()


def _whole(output: Tensor) -> Tensor:
    return output


def _projections(settings: Relations, model: nn.Module, name: str, layer: nn.Module) -> Places:
    found = attention_projections(name, layer, attention_heads(model))
    return {state: (found[state].module, found[state].take) for state in settings.states}


def layer_pairs(wanted: dict[int, int] | None, ours: int, theirs: int) -> list[tuple[int, int]]:
    """(layer of the student, layer of the teacher), counted from 0. Raises ValueError for a layer that does not exist."""
    if wanted is None:
        return [(index, same_depth(index, ours, theirs)) for index in range(ours)]
    return [
        (_existing("student", mine, ours, "hidden"), _existing("teacher", other, theirs, "hidden"))
        for mine, other in wanted.items()
    ]


def relation_layers(settings: Relations, ours: int, theirs: int) -> tuple[int, int]:
    """The layers of student and teacher whose relations are compared. Raises ValueError for one that does not exist."""
    mine = int(0.8 * ours) if settings.layer is None else _existing("student", settings.layer, ours, "relations")
    if settings.teacher_layer is None:
        return mine, same_depth(mine, ours, theirs)
    return mine, _existing("teacher", settings.teacher_layer, theirs, "relations")


def same_depth(index: int, ours: int, theirs: int) -> int:
    """The teacher's layer at whose end the same fraction of the depth is reached."""
    return max(0, math.ceil((index + 1) * theirs / ours) - 1)


def _existing(whose: str, index: int, count: int, what: str) -> int:
    if not -count <= index < count:
        raise ValueError(f"{what}: the {whose} has no layer {index}; it has {count}: legal are {-count} to {count - 1}")
    return index % count
