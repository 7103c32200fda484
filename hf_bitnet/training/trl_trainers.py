"""TRL's trainers for quantized models. Own. Needs TRL: `pip install trl`.

SFT works with packing, masks of assistants and completions, streamed data sets, adapters and a teacher; DPO with a reference,
one that was computed before, and adapters. Another of TRL's trainers is made in the same way (`TRLMixin`).
Leaves out: all that holds for any trainer, which is in QATMixin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import nn

from ..surgery import independent_copy, pack_model, trained_layers
from .arguments import QATArguments
from .checks import check_model
from .distillation.teacher import CACHED, Teacher
from .trainer import QATMixin

try:
    # trl fills its module lazily, so a type checker sees neither the names nor that they are public
    from trl import (  # pyright: ignore[reportMissingImports]
        DPOConfig,  # pyright: ignore[reportPrivateImportUsage]
        DPOTrainer,  # pyright: ignore[reportPrivateImportUsage]
        SFTConfig,  # pyright: ignore[reportPrivateImportUsage]
        SFTTrainer,  # pyright: ignore[reportPrivateImportUsage]
    )
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ModuleNotFoundError(
        "hf_bitnet.training.trl_trainers needs TRL, which is not installed: pip install trl", name="trl"
    ) from None


class TRLMixin(QATMixin):
    """QATMixin beside a trainer of TRL: `class Mine(TRLMixin, RewardTrainer)`, with an `arguments_class` (see QATMixin).

    Raises ValueError, beside what QATTrainer raises, when the output head is quantized, and for teacher="cached".
    """

    def __init__(self, model: Any = None, args: Any = None, *others: Any, teacher: Teacher | None = None, **named: Any) -> None:
        if isinstance(teacher, str) and teacher == CACHED:
            raise ValueError(
                "teacher='cached': TRL cuts and packs the texts, and what the teacher said of each token would not follow; use "
                "teacher='self', a model or a path, or hf_bitnet.QATTrainer"
            )
        if isinstance(model, nn.Module):
            refuse_quantized_head(model)
        super().__init__(model, args, *others, teacher=teacher, **named)
        assert isinstance(self.model, nn.Module)
        refuse_quantized_head(self.model)

    # TRL's trainers take other arguments, in another order, than the Trainer that they extend
    def create_model_card(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes README.md and the training curve into the output folder: arguments as of TRL's trainers."""
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)


def refuse_quantized_head(model: nn.Module) -> None:
    """TRL multiplies by `lm_head.weight` itself, so it would train a quantized head as if it were a float one."""
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    if any(layer is head for _, layer in trained_layers(model)):
        raise ValueError(
            "the output head is quantized, and TRL's trainers multiply by its float weights instead of calling it: the model "
            "that is trained would not be the one that is saved. Leave output_head out of the BitNetQuantizationConfig (with "
            "tied embeddings also embeddings), or use hf_bitnet.QATTrainer"
        )


@dataclass
class QATSFTConfig(SFTConfig, QATArguments):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Everything of TRL's SFTConfig, with its defaults (bf16 autocast, gradient checkpointing, ...), and of QATArguments."""


class QATSFTTrainer(TRLMixin, SFTTrainer):
    """TRL's SFTTrainer for a model in train form: arguments as SFTTrainer's, and `teacher` as QATTrainer's.

    With a teacher the loss is that of `args.distillation` over the tokens that SFT trains on, in place of `loss_type`, and
    TRL's training metrics (entropy, token accuracy) are left out.
    """

    learns_from_teachers = True
    arguments_class = QATSFTConfig


@dataclass
class QATDPOConfig(DPOConfig, QATArguments):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Everything of TRL's DPOConfig, with its defaults (bf16 autocast, gradient checkpointing, ...), and of QATArguments."""


class QATDPOTrainer(TRLMixin, DPOTrainer):
    """TRL's DPOTrainer for a model in train form: arguments as DPOTrainer's.

    Args:
        ref_model: None takes the quantized model as it is now, packed: policy and reference start equal, and the reference
            takes 1/16 of the bytes at 2 bits. (TRL itself would load the path that the model once came from: full precision.)
    """

    arguments_class = QATDPOConfig

    def __init__(
        self,
        model: Any = None,
        ref_model: nn.Module | None = None,
        args: QATDPOConfig | None = None,
        **named: Any,
    ) -> None:
        adapted = isinstance(model, PeftModel) or named.get("peft_config") is not None  # TRL switches the adapters off
        computed = args is not None and args.precompute_ref_log_probs  # with the model as it is before training
        if ref_model is None and isinstance(model, nn.Module) and not adapted and not computed:
            check_model(model)
            ref_model = _reference(model, synchronized=args is not None and args.sync_ref_model)
        super().__init__(model, args, ref_model=ref_model, **named)


def _reference(model: nn.Module, *, synchronized: bool) -> nn.Module:
    """A frozen copy. Packed, unless it will follow the policy (`sync_ref_model`), for which it needs float weights."""
    copied = independent_copy(model)
    if not synchronized:
        pack_model(copied, progress=False)
    return copied.requires_grad_(False).eval()
