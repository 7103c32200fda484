"""One distillation step: run the teacher, run the student, loss over the tokens that count. Own.

Where logits are a plain `hidden @ W.T + b`, the teacher stops at its hidden states and the student's head is replaced, for
the length of its forward, by the chunked loss. It so runs inside the model's own forward: with DDP's and FSDP's hooks,
gathered weights, and autocast. Any other model goes the general way, over its full logits.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...surgery import output_head
from ..sharding import on_any_rank
from .alignment import (
    IGNORED,
    labels_are_next,
    logits_are_plain,
    logits_of,
    one_sequence,
    rows_of,
    token_weights,
    without_labels,
)
from .cached import CachedBatch, cached_rows, without_cached
from .config import DistillationConfig
from .head import HeadRows, forward_replaced, identity
from .inner import InnerStates, InnerTerms
from .logits import TeacherRows, distill_from_hidden, distill_from_logits
from .teacher import refuse_shared, whole_head
from .token_noise import TokenNoise, check_draws, noisy_tokens


class Result(NamedTuple):
    """main: float32 (3,), weighted loss, divergence and CE; inner: the terms of `DistillationConfig.inner_terms`, 0-dim each;
    all summed over tokens. tokens: how many. outputs: of the student."""

    main: Tensor
    inner: list[Tensor]
    tokens: int
    outputs: Any


class Distiller:
    """Computes the losses of a student against one teacher.

    Args:
        config: what is learned.
        teacher: in eval mode, as it is wrapped for the devices; None where its logits come with the batch.
        inner: the same, unwrapped.
        compiled: whether the student is wrapped in torch.compile.
        seed: of the token noise.
    """

    def __init__(
        self, config: DistillationConfig, teacher: nn.Module | None, inner: nn.Module | None, compiled: bool, seed: int = 0
    ) -> None:
        self.teacher, self._inner = teacher, inner
        self._config, self._compiled, self._seed = config, compiled, seed
        self._head_loss = _HeadLoss(compiled)
        self._arguments = {} if inner is None else inspect.signature(type(inner).forward).parameters
        # found out on the first batch
        self._by_hidden: bool | None = None
        self._shift: bool | None = None
        self._terms: InnerTerms | None = None

    def reset(self, student: nn.Module) -> None:
        """For a new student: looks again at how it makes its logits, aligns its labels, and where its layers are.

        Raises ValueError when a layer of the settings does not exist, or when the student trains what the teacher shares.
        """
        self._by_hidden = self._shift = self._terms = None
        if self._inner is not None:
            refuse_shared(self._inner, student)
            if isinstance(self._config.token_noise, TokenNoise) and self._config.token_noise.source == "teacher":
                check_draws(self._inner)
            self._inner_terms(student)

    def __call__(self, model: nn.Module, student: nn.Module, inputs: dict[str, Any], step: int = 0) -> Result:
        """Runs both models on one batch.

        Args:
            model: the student as it is wrapped for training. student: the same, unwrapped.
            inputs: the batch, with `labels`; -100 masks a token. Without labels (alpha 1 only) the attention mask counts.
            step: optimizer steps done, for the token noise.
        """
        inputs, cached = without_cached(inputs)
        inputs, labels = without_labels(student, inputs, self._labels_are_next(student, inputs))
        if labels is not None and cached is not None and self._inner is None and cached.known.shape == labels.shape:
            # padding on the left predicts a first token, of which the teacher, who saw no padding, said nothing
            labels = labels.masked_fill(~cached.known, IGNORED)
        tokens = self._tokens(labels, inputs)
        if self._by_hidden is None:
            self._by_hidden = self._logits_are_plain(student, inputs, labels)
        inputs = self._with_noise(inputs, step)
        inner = self._inner_terms(student)
        with _kept(inner and inner.teacher) as theirs:
            teacher = self._teacher_rows(inputs, tokens, cached)
        with _kept(inner and inner.student) as ours:
            main, outputs = self._main(model, student, inputs, tokens, teacher)
        terms = [] if inner is None else inner(ours, theirs, *token_weights(labels, inputs, next(iter(ours.values()))))
        return Result(main, terms, tokens.rows.numel(), outputs)

    def _main(
        self,
        model: nn.Module,
        student: nn.Module,
        inputs: dict[str, Any],
        tokens: _Tokens,
        teacher: TeacherRows | None,
    ) -> tuple[Tensor, Any]:
        """Runs the student. The loss (3,) and its output."""
        targets = None if self._config.alpha == 1.0 else tokens.picked
        head = output_head(student) if self._by_hidden else None
        if head is None:
            outputs = model(**inputs)
            logits = rows_of(logits_of(outputs), tokens.rows, tokens.labels)
            return distill_from_logits(logits, teacher, targets, self._config), outputs
        self._head_loss.set(head, tokens, teacher, targets, self._config)
        try:
            with forward_replaced(head, self._head_loss.forward):
                outputs = model(**inputs)
        finally:
            self._head_loss.set()
        return logits_of(outputs), outputs

    def _with_noise(self, inputs: dict[str, Any], step: int) -> dict[str, Any]:
        noise = self._config.token_noise
        if not isinstance(noise, TokenNoise):
            return inputs

        def logits_of(rows: Tensor) -> HeadRows:
            made = self._teacher_rows(inputs, _Tokens(rows, None, None), None)
            assert isinstance(made, HeadRows)
            return made

        return noisy_tokens(inputs, noise, self._seed, step, logits_of)

    def _inner_terms(self, student: nn.Module) -> InnerTerms | None:
        if self._terms is None and self._inner is not None and self._config.inner_terms:
            self._terms = InnerTerms(self._config, student, self._inner, self._compiled)
        return self._terms

    def _labels_are_next(self, student: nn.Module, inputs: dict[str, Any]) -> bool:
        labels = inputs.get("labels")
        if self._shift is None and labels is not None and "shift_labels" not in inputs:
            if not isinstance(labels, Tensor) or labels.is_floating_point():
                raise ValueError(
                    f"the labels are {labels.dtype if isinstance(labels, Tensor) else type(labels).__name__}; distillation is "
                    "for classes (an int64 tensor), not for regression or several labels at once; leave `teacher` out"
                )
            labelled = bool(labels.ne(IGNORED).any())
            if not on_any_rank(labelled, labels.device):
                return False  # nothing to align in this batch
            # the forward of a sharded model is one of all ranks, also of those that learn nothing from it
            found = labels_are_next(student, one_sequence(inputs, labels))
            self._shift = on_any_rank(labelled and found, labels.device)
        return bool(self._shift)

    def _logits_are_plain(self, student: nn.Module, inputs: dict[str, Any], labels: Tensor | None) -> bool:
        if "labels" in inputs:  # the model will compute its own loss from the logits, so it needs them
            return False
        one = one_sequence(inputs, labels)
        if not logits_are_plain(student, one):
            return False
        inner = self._inner
        return inner is None or whole_head(inner) is None or logits_are_plain(inner, self._accepted(one))

    def _tokens(self, labels: Tensor | None, inputs: dict[str, Any]) -> _Tokens:
        if labels is not None:
            flat = labels.reshape(-1)
            # before the forwards are queued, because reading the count waits for the device
            rows = flat.ne(IGNORED).nonzero().squeeze(1)
            return _Tokens(rows, flat[rows], labels)
        if self._config.alpha < 1.0:
            raise ValueError(
                f"the batch has no `labels` (only {', '.join(inputs)}), which the cross entropy needs; add labels in the "
                "data collator, or train on the teacher alone: distillation={'alpha': 1.0}"
            )
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(next(value for value in inputs.values() if isinstance(value, Tensor)))
        return _Tokens(mask.reshape(-1).nonzero().squeeze(1), None, None)

    def _teacher_rows(self, inputs: dict[str, Any], tokens: _Tokens, cached: CachedBatch | None) -> TeacherRows | None:
        """Runs the teacher; the result gives its logits for a slice of the tokens that count."""
        if self._inner is None:
            return cached_rows(cached, tokens.rows, tokens.labels)
        assert self.teacher is not None
        head = whole_head(self._inner) if self._by_hidden else None
        replaced = contextlib.nullcontext() if head is None else forward_replaced(head, identity)
        accepted = self._accepted(inputs)
        with torch.no_grad(), replaced:
            outputs = self.teacher(**accepted)
        values = logits_of(outputs)
        values = rows_of(values, tokens.rows.to(values.device), tokens.labels)
        return HeadRows(values, head, tokens.rows.device)

    def _accepted(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The part of the batch that the teacher's forward takes, where it computes, and no cache."""
        assert self._inner is not None
        parameters, weight = self._arguments, next(self._inner.parameters())
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        accepted = {key: moved(value, weight) for key, value in inputs.items() if takes_all or key in parameters}
        return accepted | ({"use_cache": False} if "use_cache" in parameters else {})


class _Tokens(NamedTuple):
    """rows: positions that count in the flattened batch (N,). picked: their labels (N,). labels: all, aligned, or None."""

    rows: Tensor
    picked: Tensor | None
    labels: Tensor | None


def moved(value: Any, like: Tensor) -> Any:
    """A tensor of the batch on the device of `like`; a float one in its dtype too."""
    if not isinstance(value, Tensor):
        return value
    return value.to(like.device, like.dtype) if value.is_floating_point() else value.to(like.device)


@contextlib.contextmanager
def _kept(states: InnerStates | None) -> Iterator[dict[str, Tensor]]:
    if states is None:
        yield {}
        return
    with states.kept() as found:
        yield found


class _HeadLoss:
    """Stands in for a head's forward: hidden states in, the loss out. One callable for all steps, so that a compiled model
    that calls it is not compiled again at every step."""

    def __init__(self, compiled: bool) -> None:
        # importing the compiler takes seconds, so only where it is used anyway
        self.forward: Any = torch.compiler.disable(self._run) if compiled else self._run
        self._step: tuple[Any, ...] = ()

    def set(self, *step: Any) -> None:
        self._step = step

    def _run(self, hidden: Tensor) -> Tensor:
        head, tokens, teacher, targets, config = self._step
        hidden = rows_of(hidden, tokens.rows, tokens.labels)
        return distill_from_hidden(hidden, head.weight, head.bias, teacher, targets, config)
