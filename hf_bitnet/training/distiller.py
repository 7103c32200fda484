"""One distillation step: run the teacher, run the student, loss over the tokens that count. Own.

Where logits are a plain `hidden @ W.T + b`, the teacher stops at its hidden states and the student's head is replaced, for
the length of its forward, by the chunked loss. It so runs inside the model's own forward: with DDP's and FSDP's hooks,
gathered weights, and autocast. Any other model goes the general way, over its full logits.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..surgery import output_head
from .alignment import IGNORED, labels_are_next, logits_are_plain, logits_of, one_sequence, without_labels
from .distillation import distill_from_hidden, distill_from_logits
from .teacher import whole_head


class Distiller:
    """Computes the loss of a student against one teacher.

    Args:
        teacher: in eval mode, as it is wrapped for the devices. inner: the same, unwrapped.
        alpha, temperature, chunk_tokens: as in `QATArguments`.
        compiled: whether the student is wrapped in torch.compile.
    """

    def __init__(
        self, teacher: nn.Module, inner: nn.Module, alpha: float, temperature: float, chunk_tokens: int, compiled: bool
    ) -> None:
        self.teacher, self._inner = teacher, inner
        self.settings = (alpha, temperature, chunk_tokens)
        self._alpha = alpha
        self._head_loss = _HeadLoss(compiled)
        self._arguments = inspect.signature(type(inner).forward).parameters
        # found out on the first batch
        self._by_hidden: bool | None = None
        self._shift: bool | None = None

    def reset(self) -> None:
        """For a new student: looks again at how it makes its logits and aligns its labels."""
        self._by_hidden = self._shift = None

    def __call__(self, model: nn.Module, student: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, int, Any]:
        """Runs both models on one batch.

        Args:
            model: the student as it is wrapped for training. student: the same, unwrapped.
            inputs: the batch, with `labels`; -100 masks a token. Without labels (alpha 1 only) the attention mask counts.

        Returns:
            float32 (3,) weighted loss, KL and CE, summed over tokens; the number of tokens; the student's output.
        """
        inputs, labels = without_labels(student, inputs, self._labels_are_next(student, inputs))
        rows, picked = self._tokens(labels, inputs)
        if self._by_hidden is None:
            self._by_hidden = self._logits_are_plain(student, inputs, labels)
        teacher = self._teacher_rows(inputs, rows, labels)
        targets = None if self._alpha == 1.0 else picked
        head = output_head(student) if self._by_hidden else None
        if head is None:
            outputs = model(**inputs)
            logits = _rows_of(logits_of(outputs), rows, labels)
            return distill_from_logits(logits, teacher, targets, *self.settings), rows.numel(), outputs
        self._head_loss.set(head, rows, labels, teacher, targets, self.settings)
        try:
            with _forward_replaced(head, self._head_loss.forward):
                outputs = model(**inputs)
        finally:
            self._head_loss.set()
        return logits_of(outputs), rows.numel(), outputs

    def _labels_are_next(self, student: nn.Module, inputs: dict[str, Any]) -> bool:
        labels = inputs.get("labels")
        if self._shift is None and labels is not None and "shift_labels" not in inputs:
            if not isinstance(labels, Tensor) or labels.is_floating_point():
                raise ValueError(
                    f"the labels are {labels.dtype if isinstance(labels, Tensor) else type(labels).__name__}; distillation is "
                    "for classes (an int64 tensor), not for regression or several labels at once; leave `teacher` out"
                )
            if not labels.ne(IGNORED).any():
                return False  # nothing to align in this batch
            self._shift = labels_are_next(student, one_sequence(inputs, labels))
        return bool(self._shift)

    def _logits_are_plain(self, student: nn.Module, inputs: dict[str, Any], labels: Tensor | None) -> bool:
        if "labels" in inputs:  # the model will compute its own loss from the logits, so it needs them
            return False
        one = one_sequence(inputs, labels)
        if not logits_are_plain(student, one):
            return False
        return whole_head(self._inner) is None or logits_are_plain(self._inner, self._accepted(one))

    def _tokens(self, labels: Tensor | None, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Positions that count in the flattened batch (N,) and their labels (N,)."""
        if labels is not None:
            flat = labels.reshape(-1)
            # before the forwards are queued, because reading the count waits for the device
            rows = flat.ne(IGNORED).nonzero().squeeze(1)
            return rows, flat[rows]
        if self._alpha < 1.0:
            raise ValueError(
                f"the batch has no `labels` (only {', '.join(inputs)}), which the cross entropy needs; add labels in the "
                "data collator, or train on the teacher alone: distill_alpha=1.0"
            )
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(next(value for value in inputs.values() if isinstance(value, Tensor)))
        return mask.reshape(-1).nonzero().squeeze(1), None

    def _teacher_rows(self, inputs: dict[str, Any], rows: Tensor, labels: Tensor | None) -> Callable[[slice], Tensor]:
        """Runs the teacher; the result gives its logits for a slice of the tokens that count."""
        head = whole_head(self._inner) if self._by_hidden else None
        replaced = contextlib.nullcontext() if head is None else _forward_replaced(head, _identity)
        with torch.no_grad(), replaced:
            outputs = self.teacher(**self._accepted(inputs))
        values = _rows_of(logits_of(outputs), rows, labels)
        return values.__getitem__ if head is None else _Head(head, values)

    def _accepted(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The part of the batch that the teacher's forward takes, and no cache."""
        parameters = self._arguments
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        accepted = {key: value for key, value in inputs.items() if takes_all or key in parameters}
        return accepted | ({"use_cache": False} if "use_cache" in parameters else {})


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
        head, rows, labels, teacher, targets, settings = self._step
        hidden = _rows_of(hidden, rows, labels)
        return distill_from_hidden(hidden, head.weight, head.bias, teacher, targets, *settings)


class _Head:
    """The teacher's logits from its hidden states (N, H); the weight is cast once a step."""

    def __init__(self, head: nn.Linear, hidden: Tensor) -> None:
        self.head, self.hidden = head, hidden
        self._cast: tuple[Tensor, Tensor, Tensor | None] | None = None

    def __call__(self, rows: slice) -> Tensor:
        with torch.no_grad():
            if self._cast is None:
                dtype = kernels.autocast_dtype(self.head.weight)
                bias = None if self.head.bias is None else self.head.bias.to(dtype)
                self._cast = self.hidden.to(dtype), self.head.weight.to(dtype), bias
            hidden, weight, bias = self._cast
            return nn.functional.linear(hidden[rows], weight, bias)


def _identity(hidden: Tensor) -> Tensor:
    return hidden


@contextlib.contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    assert "forward" not in module.__dict__
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _rows_of(values: Tensor, rows: Tensor, labels: Tensor | None) -> Tensor:
    """(..., C) -> (N, C), the rows that count."""
    flat = values.reshape(-1, values.shape[-1])
    if labels is not None and flat.shape[0] != labels.numel():
        raise ValueError(
            f"logits of shape {tuple(values.shape)} do not match labels of shape {tuple(labels.shape)}: distillation needs one "
            "label for each row of logits, classes last; leave `teacher` out for this model"
        )
    return flat if rows.numel() == flat.shape[0] else flat[rows]
