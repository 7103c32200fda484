"""What other libraries, or nobody, quantize: trained by plain `transformers.Trainer`. Own, but for the layers."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.bitnet import ActQuant, AutoBitLinear, WeightQuant


class RampedBitLinear(AutoBitLinear):
    """transformers' layer with the strength of the blog's recipe: x + strength (Q(x) - x), for weights and activations."""

    strength = 0.0

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight + self.strength * (WeightQuant.apply(self.weight) - self.weight).detach()
        value = input + self.strength * (ActQuant.apply(input) - input).detach()
        return F.linear(value, weight, self.bias)


class Ramp(tf.TrainerCallback):
    """Raises the strength of all layers over the first fifth of the steps."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for module in kwargs["model"].modules():
            if isinstance(module, RampedBitLinear):
                module.strength = min(1.0, state.global_step / (0.2 * state.max_steps))


class PlainTrainer(tf.Trainer):
    """Cross entropy, or the KL divergence to a teacher."""

    def __init__(self, *args: Any, teacher: nn.Module | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._teacher = None if teacher is None else teacher.to(self.args.device).eval()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self._teacher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(input_ids=inputs["input_ids"])
        with torch.no_grad():
            target = self._teacher(input_ids=inputs["input_ids"]).logits[:, :-1].flatten(0, 1)
        logits = outputs.logits[:, :-1].flatten(0, 1)
        loss = F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean")
        return (loss, outputs) if return_outputs else loss
