"""What results.json and the card of a measured run hold: steps, figures, settings. Own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from huggingface_hub import ModelCard
from torch import nn

from ..hub import Measurement, model_card
from .arguments import QATArguments

FULL, BEFORE, TRAINED, PACKED = "full_precision", "before_training", "trained", "packed"
# step -> how it is told, and which kind of measurement it is on a card
STEPS = {
    FULL: ("full precision", "reference"),
    BEFORE: ("quantized, not yet trained", "step"),
    TRAINED: ("trained, before packing", "step"),
    PACKED: ("packed and reloaded", "result"),
}
# metric -> task in the Hub's words, and how a value reads
METRICS = {"perplexity": ("text-generation", ".2f"), "accuracy": ("text-classification", ".2%")}
# even where they are Trainer's defaults
_ALWAYS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "adam_beta1", "adam_beta2"),
    *("max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"),
    *("quantization_schedule",),
)
# where things are, who may write there, and what is only looked at
_NEVER = ("output_dir", "run_name", "deepspeed", "fsdp", "push_to_hub", "resume_from_checkpoint", "report_to", "disable_tqdm")
_NEVER += (
    "max_steps",
    "bf16",
    "fp16",
    "project",
    "do_train",
    "do_eval",
    "do_predict",
    "use_cpu",
    "restore_callback_states_from_checkpoint",
)
_NEVER_PREFIXES = ("hub_", "log", "save_", "eval_", "dataloader_", "per_device_eval", "ddp_", "trackio", "accelerator_config")


def told(metric: str, measured: Mapping[str, float], step: str) -> str:
    """A line for the user; perplexities beside that of full precision, where it was measured."""
    value = measured[step]
    base = measured.get(FULL) if step != FULL and metric == "perplexity" else None
    times = "" if base is None else f"  (x {value / base:.3f} of full precision)"
    return f"{STEPS[step][0] + ':':<28} {metric} {value:{METRICS[metric][1]}}{times}"


def ratios(metric: str, measured: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """`perplexity_ratio`: over full precision, where it was measured; an accuracy has none."""
    if metric != "perplexity" or FULL not in measured:
        return {}
    return {"perplexity_ratio": {step: value / measured[FULL] for step, value in measured.items()}}


def run_card(
    packed: nn.Module, results: Mapping[str, Any], metric: str, name: str, base_model: str | None, curve: str | None = None
) -> ModelCard:
    """The card of a packed model, from what results.json holds. `curve`: name of a picture of the losses beside it."""
    data, measured, task = results["data"], results[metric], METRICS[metric][0]
    return model_card(
        packed,
        name=name,
        base_model=base_model,
        from_scratch=base_model is None and FULL not in measured,
        measurements=[
            Measurement(label, measured[step], data["validation"], metric=metric, kind=kind, task=task)
            for step, (label, kind) in STEPS.items()
            if step in measured
        ],
        training={"text": data["train"], **results["training"]},
        curve=curve,
        versions=results["versions"],
    )


def run_settings(args: QATArguments) -> dict[str, Any]:
    """The training settings that are not the defaults, and the most important ones; no paths, no tokens."""
    ours = {each.name for each in fields(QATArguments)}
    defaults = {each.name: each.default for each in fields(args)}
    found: dict[str, Any] = {"mixed_precision": args.mixed_precision}
    for name, value in args.to_dict().items():
        if name not in defaults or (name not in ours and not _is_plain(value)):
            continue
        changed = value != defaults[name] and (bool(value) or defaults[name] is True)
        if name in _ALWAYS or (changed and name not in _NEVER and not name.startswith(_NEVER_PREFIXES)):
            found[name] = value
    return found


def _is_plain(value: Any) -> bool:
    """Whether a field of another trainer's arguments can be shown: a number, or a word that is no path."""
    return isinstance(value, bool | int | float) or (isinstance(value, str) and value.isidentifier())
