"""One distillation step: run the teacher, run the student, loss over the tokens that count. Own.

Where logits are a plain `hidden @ W.T + b` (checked on the first batch, so soft-capped or scaled logits are noticed), the
teacher stops at its hidden states and the student's head is replaced, for the length of its forward, by the chunked loss.
It so runs inside the model's own forward: with DDP's and FSDP's hooks, gathered weights, and autocast. Any other model
goes the general way, over its full logits.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..surgery import output_head, probing
from .distillation import CE, KL, TOTAL, distill_from_hidden, distill_from_logits
from .teacher import whole_head

_IGNORED = -100


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
        self._by_hidden: bool | None = None

    def reset(self) -> None:
        """For a new student: looks again at how it makes its logits."""
        self._by_hidden = None

    def __call__(
        self, model: nn.Module, student: nn.Module, inputs: dict[str, Any], shift_labels: bool
    ) -> tuple[Tensor, int, Any]:
        """Runs both models on one batch.

        Args:
            model: the student as it is wrapped for training. student: the same, unwrapped.
            inputs: the batch, with `labels`; -100 masks a token. Without labels (alpha 1 only) the attention mask counts.
            shift_labels: whether logits at a position predict the next label.

        Returns:
            float32 (3,) weighted loss, KL and CE, summed over tokens; the number of tokens; the student's output.
        """
        inputs, labels = _without_labels(student, inputs, shift_labels)
        rows, picked = self._tokens(labels, inputs)
        if self._by_hidden is None:
            self._by_hidden = self._logits_are_plain(student, inputs)
        teacher = self._teacher_rows(inputs, rows)
        targets = None if self._alpha == 1.0 else picked
        count = rows.numel()
        if self._by_hidden:
            head = output_head(student)
            assert head is not None
            self._head_loss.set(head, rows, labels, teacher, targets, self.settings)
            try:
                with _forward_replaced(head, self._head_loss.forward):
                    outputs = model(**inputs)
            finally:
                self._head_loss.clear()
            return _logits(outputs), count, outputs
        outputs = model(**inputs)
        logits = _rows_of(_logits(outputs), rows, labels)
        return distill_from_logits(logits, teacher, targets, *self.settings), count, outputs

    def _tokens(self, labels: Tensor | None, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Positions that count in the flattened batch (N,) and their labels (N,)."""
        if labels is None:
            if self._alpha < 1.0:
                raise ValueError(
                    f"the batch has no `labels` (only {', '.join(inputs)}), which the cross entropy needs; add labels in the "
                    "data collator, or train on the teacher alone: distill_alpha=1.0"
                )
            mask = inputs.get("attention_mask")
            if mask is None:
                mask = torch.ones_like(next(value for value in inputs.values() if isinstance(value, Tensor)))
            return mask.reshape(-1).nonzero().squeeze(1), None
        if labels.is_floating_point():
            raise ValueError(
                f"the labels have dtype {labels.dtype}; distillation is for classes (int64 labels), not for regression or "
                "multi-label targets; leave `teacher` out"
            )
        flat = labels.reshape(-1)
        rows = flat.ne(_IGNORED).nonzero().squeeze(1)  # before the forwards are queued: reading the count waits for the device
        return rows, flat[rows]

    def _teacher_rows(self, inputs: dict[str, Any], rows: Tensor) -> Callable[[slice], Tensor]:
        """Runs the teacher; the result gives its logits for a slice of the tokens that count."""
        head = whole_head(self._inner) if self._by_hidden else None
        replaced = contextlib.nullcontext() if head is None else _forward_replaced(head, _identity)
        with torch.no_grad(), replaced:
            outputs = self.teacher(**self._accepted(inputs))
        values = _rows_of(_logits(outputs), rows, None)
        return values.__getitem__ if head is None else _Head(head, values)

    def _accepted(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The part of the batch that the teacher's forward takes, and no cache."""
        parameters = self._arguments
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        accepted = {key: value for key, value in inputs.items() if takes_all or key in parameters}
        return accepted | ({"use_cache": False} if "use_cache" in parameters else {})

    def _logits_are_plain(self, student: nn.Module, inputs: dict[str, Any]) -> bool:
        """Whether both models return exactly head(hidden), tried on the first sequence of the batch."""
        if output_head(student) is None:
            return False
        one = _first_sequence(inputs)
        return _is_plain(student, one) and (whole_head(self._inner) is None or _is_plain(self._inner, self._accepted(one)))


class _HeadLoss:
    """Stands in for a head's forward: hidden states in, the loss out. One callable for all steps, so that a compiled model
    that calls it is not compiled again at every step."""

    def __init__(self, compiled: bool) -> None:
        # importing the compiler takes seconds, so only where it is used anyway
        self.forward: Any = torch.compiler.disable(self._run) if compiled else self._run
        self._step: tuple[Any, ...] = ()

    def set(self, *step: Any) -> None:
        self._step = step

    def clear(self) -> None:
        self._step = ()

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


@torch.no_grad()
def _is_plain(model: nn.Module, inputs: dict[str, Any]) -> bool:
    head = output_head(model)
    if head is None:
        return False
    seen: list[Any] = []
    hook = head.register_forward_hook(lambda _, args, output: seen.append(output))
    try:
        with probing(model):
            logits = _logits(model(**inputs))
    finally:
        hook.remove()
    # exactly one use, and what comes out of the model is what came out of the head
    return len(seen) == 1 and torch.equal(logits, seen[0].to(logits.dtype))


def _without_labels(student: nn.Module, inputs: dict[str, Any], shift: bool) -> tuple[dict[str, Any], Tensor | None]:
    """The batch without labels (so that no second loss is computed), and labels aligned with the logits."""
    inputs = dict(inputs)
    labels, aligned = inputs.pop("labels", None), inputs.pop("shift_labels", None)
    if aligned is not None:
        return inputs, aligned
    if labels is not None and shift:
        return inputs, nn.functional.pad(labels, (0, 1), value=_IGNORED)[..., 1:]
    encoder_decoder = getattr(getattr(student, "config", None), "is_encoder_decoder", False)
    if labels is not None and encoder_decoder and "decoder_input_ids" not in inputs:
        make = getattr(student, "prepare_decoder_input_ids_from_labels", None)
        if make is None:
            inputs["labels"] = labels  # its forward makes the decoder's input of them
        else:
            inputs["decoder_input_ids"] = make(labels=labels)
    return inputs, labels


def _first_sequence(inputs: dict[str, Any]) -> dict[str, Any]:
    tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 0]
    batch = tensors[0].shape[0]
    return {
        key: value[:1] if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch else value
        for key, value in inputs.items()
    }


def _logits(outputs: Any) -> Tensor:
    logits = outputs.get("logits") if isinstance(outputs, dict) else outputs[0]
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"distillation needs a model that returns `logits`, this one returns {', '.join(outputs)}; leave `teacher` out"
        )
    return logits


def _rows_of(values: Tensor, rows: Tensor, labels: Tensor | None) -> Tensor:
    """(..., C) -> (N, C), the rows that count."""
    flat = values.reshape(-1, values.shape[-1])
    if labels is not None and flat.shape[0] != labels.numel():
        raise ValueError(
            f"logits of shape {tuple(values.shape)} do not match labels of shape {tuple(labels.shape)}: distillation needs one "
            "label for each row of logits, classes last; leave `teacher` out for this model"
        )
    return flat if rows.numel() == flat.shape[0] else flat[rows]


__all__ = ["CE", "KL", "TOTAL", "Distiller"]
