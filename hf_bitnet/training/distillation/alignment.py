"""How a model's logits come about and which label each of them is for: tried on one sequence, not guessed from names. Own.

Leaves out: the loss, the teacher.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from ...surgery import output_head, probing

logger = logging.getLogger(__name__)
IGNORED = -100
# own loss and cross entropy agree to float rounding, unless the model adds something else
_AGREES = 0.05


def logits_of(outputs: Any) -> Tensor:
    """The logits of a model's output. Raises ValueError when it has none."""
    logits = outputs.get("logits") if isinstance(outputs, dict) else outputs[0]
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"distillation needs a model that returns `logits`, this one returns {', '.join(outputs)}; leave `teacher` out"
        )
    return logits


def logits_are_plain(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether the model returns exactly what its output head returns: no soft-capping, no scaling afterwards."""
    head = output_head(model)
    if head is None:
        return False
    seen: list[Any] = []
    hook = head.register_forward_hook(lambda _, args, output: seen.append(output))
    try:
        with probing(model):
            logits = logits_of(model(**inputs))
    finally:
        hook.remove()
    return len(seen) == 1 and torch.equal(logits, seen[0].to(logits.dtype))


def labels_are_next(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether logits at a position are for the next label (causal) or for the one at that position.

    The model's own loss decides: which of the two cross entropies is it?
    """
    labels = inputs["labels"]
    with probing(model):
        outputs = model(**inputs)
        logits = logits_of(outputs).float()
        loss = outputs.get("loss") if isinstance(outputs, dict) else None
        if labels.dim() < 2 or logits.shape[:-1] != labels.shape or loss is None:
            return False
        if outputs.get("aux_loss") is not None:
            loss = loss - auxiliary_weight(model) * outputs["aux_loss"]
        here = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        following = nn.functional.cross_entropy(logits[..., :-1, :].flatten(0, -2), labels[..., 1:].flatten())
        own, here, following = torch.stack((loss.float(), here, following)).tolist()
    if math.isnan(own):  # no label at all
        return False
    if not min(abs(own - here), abs(own - following)) <= _AGREES * abs(own):
        logger.warning(
            "the model's own loss is %.4g; the cross entropy of its logits is %.4g, and %.4g against the next labels. "
            "Distillation takes the nearer of the two and leaves out what else the model adds to its loss.",
            *(own, here, following),
        )
    return abs(own - following) < abs(own - here)


def one_sequence(inputs: dict[str, Any], labels: Tensor | None) -> dict[str, Any]:
    """The sequence of the batch with the most labels, as a batch of one."""
    tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 0]
    batch = tensors[0].shape[0]
    which = 0
    if labels is not None and labels.dim() > 0 and labels.shape[0] == batch:
        which = int(labels.ne(IGNORED).reshape(batch, -1).sum(dim=1).argmax())
    return {
        key: value[which : which + 1] if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch else value
        for key, value in inputs.items()
    }


def without_labels(student: nn.Module, inputs: dict[str, Any], shift: bool) -> tuple[dict[str, Any], Tensor | None]:
    """The batch without labels (so that no second loss is computed), and labels aligned with the logits.

    An encoder-decoder gets the decoder's input that its forward would have made of the labels. Where only its forward can
    make it, the labels stay in the batch.
    """
    inputs = dict(inputs)
    labels, aligned = inputs.pop("labels", None), inputs.pop("shift_labels", None)
    if aligned is not None:
        return inputs, aligned
    if labels is not None and shift:
        return inputs, nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    encoder_decoder = getattr(getattr(student, "config", None), "is_encoder_decoder", False)
    if labels is not None and encoder_decoder and "decoder_input_ids" not in inputs:
        make = getattr(student, "prepare_decoder_input_ids_from_labels", None)
        inputs |= {"labels": labels} if make is None else {"decoder_input_ids": make(labels=labels)}
    return inputs, labels


def auxiliary_weight(model: nn.Module) -> float:
    """Weight of the load-balancing loss of a mixture of experts."""
    config = getattr(model, "config", None)
    return float(getattr(model, "router_aux_loss_coef", getattr(config, "router_aux_loss_coef", 0.0)))


def rows_of(values: Tensor, rows: Tensor, labels: Tensor | None) -> Tensor:
    """(..., C) -> (N, C), the rows that count."""
    flat = values.reshape(-1, values.shape[-1])
    if labels is not None and flat.shape[0] != labels.numel():
        raise ValueError(
            f"logits of shape {tuple(values.shape)} do not match labels of shape {tuple(labels.shape)}: distillation needs one "
            "label for each row of logits, classes last; leave `teacher` out for this model"
        )
    return flat if rows.numel() == flat.shape[0] else flat[rows]


def token_weights(labels: Tensor | None, inputs: dict[str, Any], state: Tensor) -> tuple[Tensor, Tensor | None]:
    """How much each token of an inner state counts, and which tokens exist.

    A token counts 1 where its label counts. Where a whole sequence has one label, its tokens share its 1.

    Args:
        labels: aligned with the logits; None counts all tokens. state: (B, S, F).

    Returns:
        float32 (B, S), and bool (B, S) or None where all exist.
    """
    shape = state.shape[:2]
    decoder = "decoder_input_ids" in inputs
    mask = inputs.get("decoder_attention_mask" if decoder else "attention_mask")
    if mask is None and decoder and labels is not None:
        mask = labels.ne(IGNORED)  # targets are masked where they are padded
    exists = mask.bool() if isinstance(mask, Tensor) and mask.shape == shape else None
    if labels is not None and labels.shape == shape:
        return labels.ne(IGNORED).float(), exists
    each = torch.ones(shape, device=state.device) if exists is None else exists.float()
    if labels is not None and labels.shape == shape[:1]:
        each = each * (labels.ne(IGNORED) / each.sum(dim=1).clamp_min(1.0)).unsqueeze(1)
    elif labels is not None:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not match inner states of {tuple(shape)} tokens; leave `hidden` and "
            "`relations` out for this model"
        )
    return each, exists
