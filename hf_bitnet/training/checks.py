"""What has to be true before training, and what a model's own loss does with gradient accumulation. Own."""

from __future__ import annotations

import enum
import inspect
import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.trainer_utils import unwrap_peft_model

from ..surgery import quantized_layers, trained_layers
from .arguments import QATArguments
from .distillation import DistillationConfig

logger = logging.getLogger(__name__)

_OF_WEIGHTS = ("regularizers", "grid_pull", "oscillation_freezing")


def check_arguments(args: Any, kind: type[QATArguments], trainer: str, has_teacher: bool, named: dict[str, Any]) -> None:
    """Raises TypeError or ValueError on arguments that are not of the `kind` that `trainer` takes or do not belong together."""
    if not isinstance(args, kind):
        raise TypeError(
            f"{trainer} takes {kind.__name__}, got {type(args).__name__}; it has all fields of {kind.__mro__[1].__name__}: "
            f"args={kind.__name__}(output_dir='out', ...)"
        )
    if isinstance(args.distillation, DistillationConfig) and args.distillation.needs_teacher and not has_teacher:
        raise ValueError(
            "distillation needs a teacher and none was given; write QATTrainer(model=model, args=args, teacher='self') for the "
            "model's own full-precision weights, teacher='cached' for a data set of cache_teacher_logits, or leave "
            "distillation out"
        )
    if has_teacher and args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} with a teacher: the teacher's distribution takes its place; "
            "write label_smoothing_factor=0"
        )
    if has_teacher and named.get("compute_loss_func") is not None:
        raise ValueError("compute_loss_func and teacher both define the loss; give one of them")
    if args.load_best_model_at_end and args.quantization_schedule is not None and not args.eval_at_full_strength:
        raise ValueError(
            "load_best_model_at_end would compare evaluations at different strengths, and choose a soft model, which is not "
            "the quantized one that is left; leave eval_at_full_strength=False out, or load_best_model_at_end"
        )
    if args.regularizers and args.deepspeed:
        raise ValueError(
            "regularizers add to the gradients after backward, and DeepSpeed keeps these to itself; leave regularizers out, or "
            "shard with FSDP 2 instead"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, for which Trainer would take nn.DataParallel; its replicas cannot "
            f"hold the state of quantized layers. Start one process a GPU: torchrun --nproc_per_node {args.n_gpu} script.py, "
            "or show it one: CUDA_VISIBLE_DEVICES=0"
        )


def check_model(model: nn.Module) -> None:
    """Raises ValueError when the model has no layer in train form."""
    if trained_layers(model):
        return
    if any(True for _ in quantized_layers(model)):
        raise ValueError(
            "the model is packed, and packed weights are frozen; turn it back with hf_bitnet.unpack_model(model) to train the "
            "weights. (To train adapters on packed weights use transformers' own Trainer.)"
        )
    raise ValueError(
        f"{type(model).__name__} has no quantized layer; quantize it first: "
        "quantize_model(model, BitNetQuantizationConfig.bitnet_b158())"
    )


def check_trainable(model: nn.Module, args: QATArguments) -> None:
    """As `check_model`; raises ValueError when nothing would be trained, or none of the weights that `args` mean."""
    check_model(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"every parameter of {type(model).__name__} is frozen, so there is nothing to train; "
            "model.requires_grad_(True), or leave those open that are to be trained"
        )
    idle = [name for name in _OF_WEIGHTS if getattr(args, name)]
    if idle and not any(layer.weight.requires_grad for _, layer in trained_layers(model)):
        raise ValueError(
            f"{idle[0]} changes quantized weights, and all of them are frozen, as behind adapters; leave it out, or train them"
        )


def check_parallelism(accelerator: Any, has_teacher: bool) -> None:
    """Raises ValueError where tensors or sequences are split between processes in a way that is not supported."""
    config = getattr(accelerator, "parallelism_config", None)
    if config is None:
        return
    if config.tp_enabled:
        raise ValueError(
            f"tp_size={config.tp_size}: with tensor parallelism each process would compute the scale of its own part of a "
            "weight; use data parallelism (torchrun) or FSDP2, with tp_size=1"
        )
    if has_teacher and (config.cp_enabled or config.sp_enabled):
        raise ValueError(
            "distillation with context or sequence parallelism is not supported: the loss needs whole sequences; leave "
            "`teacher` out, or set cp_size=1 and sp_size=1"
        )


def warn_half_precision(model: nn.Module) -> None:
    """Says once when float weights behind quantized ones are trained in 16 bits."""
    half = [layer for _, layer in trained_layers(model) if layer.weight.requires_grad and layer.weight.itemsize < 4]
    if half:
        logger.warning(
            "%d quantized layers train %s weights: 85 to 96 %% of small steps are lost in rounding. "
            "Load the model in float32, from_pretrained(..., dtype=torch.float32), and use QATArguments(bf16=True) for speed.",
            len(half),
            str(half[0].weight.dtype).removeprefix("torch."),
        )


def warn_without_labels(inputs: Any) -> None:
    """Says that nothing of a batch is to be learned: every label is -100. Some trainers' batches are lists."""
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    if isinstance(labels, Tensor) and labels.numel() and not labels.is_floating_point() and bool((labels == -100).all()):
        logger.warning(
            "every label of the first batch is -100, so there is nothing to learn from it: the loss is 0 or NaN. Labels are "
            "token ids, for example copies of input_ids, and -100 only where a token is not to be learned"
        )


class LossStyle(enum.Enum):
    """What a model's forward makes of `num_items_in_batch`."""

    SUM = "divides the sum by it"
    MEAN = "ignores it and returns the mean over the labels"
    OTHER = "ignores it"


def loss_style(model: nn.Module) -> LossStyle:
    """Read from the source of the model's forward: only `self.loss_function` takes the number of items, where it is handed on.

    (126 model files of transformers 5.23 make a CrossEntropyLoss of their own, yet take **kwargs; some 40, among them the
    classifiers on decoders, call `self.loss_function` without them.)
    """
    for kind in type(unwrap_peft_model(model)).__mro__:
        if "forward" not in vars(kind):
            continue
        try:
            source = inspect.getsource(inspect.unwrap(vars(kind)["forward"]))
        except (OSError, TypeError):  # defined at a prompt: nothing to read
            return LossStyle.OTHER
        if calls := _calls(source, "self.loss_function("):
            handed_on = all("**" in call or "num_items_in_batch" in call for call in calls)
            return LossStyle.SUM if handed_on else LossStyle.MEAN
        if "CrossEntropyLoss(" in source:
            return LossStyle.MEAN
        if "super().forward(" not in source:
            break
    return LossStyle.OTHER


def _calls(source: str, opening: str) -> list[str]:
    """What stands in the brackets of each call in a source."""
    found, start = [], source.find(opening)
    while start >= 0:
        end = start = start + len(opening)
        depth = 1
        while depth and end < len(source):
            depth += {"(": 1, ")": -1}.get(source[end], 0)
            end += 1
        found.append(source[start : end - 1])
        start = source.find(opening, end)
    return found
