"""Presets of a training run, with their sources: published hyper-parameters as data. Own choices are called so.

`QATArguments.from_preset(name, **overrides)` takes the arguments, `TRAINING_PRESETS.get(name).config(**overrides)` makes the
quantization that belongs to them, `hf-bitnet presets` prints all. Names of layers are those of Llama and its like.

Leaves out: what a preset starts from (the model), and how long to train: `tokens` says what the source took.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..config import BitNetQuantizationConfig
from ..registry import Registry

_SUB_NORMS = ["o_proj", "down_proj"]


@dataclass(frozen=True)
class TrainingPreset:
    """One way to train, as data.

    Attributes:
        name: of the preset. purpose: what it is for, one line.
        source: paper or document. url: where it is.
        arguments: fields of QATArguments. quantization: fields of BitNetQuantizationConfig.
        teacher: what to give QATTrainer as `teacher`; None for none.
        before: what the model needs between `quantize_model` and the training, as code; None for nothing.
        tokens: what the source trained on, or where it has no figure, a hint.
        notes: what of these values is the source's, what is own, what differs.
        measured: what these values gave here.
    """

    name: str
    purpose: str
    source: str
    url: str
    arguments: Mapping[str, Any]
    quantization: Mapping[str, Any]
    tokens: str
    notes: str
    teacher: str | None = None
    before: str | None = None
    measured: str = field(default="not measured here")

    def config(self, **overrides: Any) -> BitNetQuantizationConfig:
        """The quantization that belongs to it, with fields of BitNetQuantizationConfig overridden."""
        return BitNetQuantizationConfig(**{**copy.deepcopy(dict(self.quantization)), **overrides})

    def training(self) -> dict[str, Any]:
        """The fields of QATArguments, a deep copy: defaults of a parser, or arguments of the constructor."""
        return {**copy.deepcopy(dict(self.arguments)), "training_preset": self.name}

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {**asdict(self), "code": self.code()}

    def code(self) -> str:
        """Python that trains `model` on `train_dataset` by this preset."""
        before = [] if self.before is None else [self.before]
        names = [
            "TRAINING_PRESETS",
            "QATArguments",
            "QATTrainer",
            *(line.partition("(")[0] for line in before),
            "quantize_model",
        ]
        teacher = "" if self.teacher is None else f", teacher={self.teacher!r}"
        lines = [
            f"from hf_bitnet import {', '.join(names)}",
            "",
            f"quantize_model(model, TRAINING_PRESETS.get({self.name!r}).config())",
            *before,
            f"args = QATArguments.from_preset({self.name!r}, output_dir='out')",
            f"QATTrainer(model=model, args=args, train_dataset=train_dataset{teacher}).train()",
        ]
        return "\n".join(lines)


TRAINING_PRESETS: Registry[TrainingPreset] = Registry("training preset")


def _add(**fields: Any) -> None:
    TRAINING_PRESETS.register(fields["name"])(TrainingPreset(**fields))


_add(
    name="scratch_b158",
    purpose="pretraining of a 1.58-bit model from random weights",
    source="The Era of 1-bit LLMs: Training Tips, Code and FAQ (Microsoft, 2024), 700 M parameters",
    url="https://github.com/microsoft/unilm/blob/master/bitnet/The-Era-of-1-bit-LLMs__Training_Tips_Code_FAQ.pdf",
    arguments={
        "learning_rate": 1.5e-3,
        "two_stage": {"at": 0.5, "drop": 2 / 3, "decay": "linear"},
        "weight_decay": 0.1,
        "warmup_steps": 375,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
    },
    quantization={"weight": "ternary", "weight_scale": "absmean", "granularity": "tensor", "sub_norm": _SUB_NORMS},
    before="set_norm_blend(model, 1.0)",
    tokens="100 G tokens, 1 M a step, sequences of 2048",
    notes="Rates, decay, betas and warm-up are the source's; for 1.3 B parameters and more it takes learning_rate=1.2e-3. The "
    "norms in front of o_proj and down_proj join those that Llama has, so that every quantized layer reads normed values (the "
    "source moves all norms into the layers). The source reports full precision's perplexity at 3 B parameters, not below.",
)
_add(
    name="convert_b158",
    purpose="a pretrained causal language model becomes ternary",
    source="Fine-tuning LLMs to 1.58bit: extreme quantization made easy (Hugging Face, 2024); teacher and norms: own choice",
    url="https://huggingface.co/blog/1_58_llm_extreme_quantization",
    arguments={
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.0,
        "adam_beta2": 0.95,
        "quantization_schedule": {"ramp": "linear", "end": 0.2},
        "distillation": {"alpha": 0.5, "temperature": 2.0},
    },
    quantization={"weight": "ternary", "weight_scale": "absmean", "granularity": "tensor", "sub_norm": _SUB_NORMS},
    teacher="self",
    before="calibrate(model, batches)",
    tokens="10 G tokens, 2 M a step (Llama-3-8B, WikiText perplexity 12.2); 1 G shows the way",
    notes="The source's: learning rate, linear strength (the first 1000 of its 5000 steps, here a fifth of any run). Own: "
    "the teacher, calibrated norms, the cosine, no weight decay. The source found that the strength schedule gives nothing on "
    "a model of 135 M parameters. Small models want higher rates: 2e-3 was the best here for one of 2.4 M parameters.",
)
_add(
    name="task_bitdistill",
    purpose="a fine-tuned model becomes ternary on the data of its task",
    source="BitNet Distillation (arXiv 2510.13998), the third stage for classification; balance of the terms: own choice",
    url="https://arxiv.org/abs/2510.13998",
    arguments={
        "learning_rate": 5e-5,
        "weight_decay": 0.01,
        "warmup_steps": 0.05,
        "num_train_epochs": 3.0,
        # alpha T^2 : 1 - alpha is the paper's 10 : 1 of KL to cross entropy
        "distillation": {"alpha": 2 / 7, "temperature": 5.0, "relations": {"weight": 1.0}},
    },
    quantization={"weight": "ternary", "weight_scale": "absmean", "granularity": "tensor", "sub_norm": _SUB_NORMS},
    teacher="self",
    before="calibrate(model, batches)",
    tokens="2 to 3 epochs of the task, after 10 G tokens of convert_b158; batches of 32, sequences of 512",
    notes="The rate is for models of up to 1 B parameters; the paper searches it, larger ones take 5e-6 to 2e-5. The weight of "
    "the relations is balanced by running means in place of the paper's 1e5, with which an independent reproduction saw that "
    "term a thousand times as large as the cross entropy. Without the 10 G tokens before, the paper reports 88.04 in place of "
    "88.17 on MNLI, but that reproduction lost 31 points to full precision. Layers of other families than Llama's have other "
    "names: config(sub_norm=None) leaves the norms out, and then there is nothing to calibrate.",
)
_add(
    name="task_encoder",
    purpose="a fine-tuned encoder (BERT and its like) becomes ternary on the data of its task",
    source="own, after TernaryBERT (arXiv 2009.12812): outputs and every layer's states from the full-precision model",
    url="https://arxiv.org/abs/2009.12812",
    arguments={
        "learning_rate": 5e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.0,
        "num_train_epochs": 6.0,
        "distillation": {"alpha": 1.0, "hidden": {"weight": 2.0}, "balance": False},
    },
    quantization={"weight": "ternary", "weight_scale": "absmean", "granularity": "tensor"},
    teacher="self",
    tokens="6 epochs of 6,920 sentences, batches of 32",
    notes="The source compares states, attention scores and outputs by mean squares, and has 20 times the data by replacing "
    "words. Here: cosines of the states, no scores, the data as they are (cut and replaced words did not help). Dropout made "
    "no difference; the recipe trains without. The rate is for some 20 M parameters; larger models want lower ones.",
    measured="all-MiniLM-L6-v2 on SST-2, accuracy on the test file, mean of three seeds: full precision 88.65 %, ternary "
    "87.46 %; trained with cross entropy alone 81.55 %",
)
_add(
    name="pareto_w2",
    purpose="2-bit weights with learned scales",
    source="ParetoQ (arXiv 2502.02631) and its training script",
    url="https://arxiv.org/abs/2502.02631",
    arguments={"learning_rate": 2e-5, "lr_scheduler_type": "cosine", "warmup_steps": 0, "weight_decay": 0.0},
    quantization={"weight": "int2_seq", "weight_scale": "learned", "granularity": "channel"},
    tokens="about 30 G tokens, sequences of 2048; 0.1 G wins back about a third of the loss",
    notes="Rate, cosine, no warm-up, no decay, the symmetric grid and the learned scale a channel are the source's; it leaves "
    "activations in 16 bits: config(activation='none'). A teacher is an option: teacher='self'.",
)
_add(
    name="w4a8",
    purpose="4-bit weights with learned scales, little training",
    source="ParetoQ (arXiv 2502.02631), 4 bits",
    url="https://arxiv.org/abs/2502.02631",
    arguments={"learning_rate": 1e-5, "lr_scheduler_type": "cosine", "warmup_steps": 0, "weight_decay": 0.0},
    quantization={"weight": "int4", "weight_scale": "learned", "granularity": "channel"},
    tokens="about 10 G tokens; fewer help too",
    notes="Rate, cosine, no warm-up, no decay and the learned scale a channel are the source's; it leaves activations in 16 "
    "bits: config(activation='none'). A teacher is an option: teacher='self'.",
)
_add(
    name="w8a8",
    purpose="8-bit weights and activations, where rounding alone is not enough",
    source="own choice, after the rate that NVIDIA's ModelOpt takes for quantization-aware training",
    url="https://github.com/NVIDIA/TensorRT-Model-Optimizer",
    arguments={"learning_rate": 1e-5, "lr_scheduler_type": "cosine", "warmup_steps": 0, "weight_decay": 0.0},
    quantization={"weight": "int8", "granularity": "channel"},
    tokens="none to 50 M tokens",
    notes="Usually no training is needed: measure the model of `hf-bitnet quantize MODEL OUT --preset w8a8` first.",
)
_add(
    name="falcon_sft",
    purpose="supervised fine-tuning of a model that was trained in 1.58 bit",
    source="onebitllms, the example of supervised fine-tuning (TII, Falcon-Edge)",
    url="https://github.com/tiiuae/onebitllms",
    arguments={"learning_rate": 1e-4, "lr_scheduler_type": "cosine", "weight_decay": 0.0},
    quantization={"weight": "ternary", "weight_scale": "absmean", "granularity": "tensor"},
    tokens="the size of the task's data",
    notes="The rate is the source's; cosine and decay are own choice. Start from the float weights behind the codes (of "
    "Falcon-Edge: revision='prequantized'), not from ones that were rounded already.",
)
