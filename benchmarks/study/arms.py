"""What is compared: an arm is one way to quantize and train, as data. Sources are named; "own" ones are not published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

# the linear layers, tokens and data order are the same for all arms; so is what follows, unless the arm says otherwise
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "weight_decay": 0.0,
    "adam_beta2": 0.95,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "max_grad_norm": 1.0,
}
_KL = {"alpha": 1.0, "chunk_tokens": 256}
_RATES = (1e-3, 2e-3, 4e-3)
# a quarter of the tokens a step: a quarter of the rates
_OFTEN = {"per_device_train_batch_size": 4}
OFTEN_RATES = (2.5e-4, 5e-4, 1e-3)
_FAST_NORMS = {"norm_rate_factor": 4.0}
_EARLY = {**_OFTEN, "cautious": True, "mars": 0.025}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        source: paper or document, "own", or "reference".
        quantization: fields of BitNetQuantizationConfig on top of the study's; None trains full precision.
        arguments: fields of QATArguments on top of `COMMON`.
        distillation: fields of DistillationConfig; None learns from the text alone.
        peer: in place of our layers, those of another library, see `peers.py`.
        fit: windows of 256 tokens that the start is fitted on (GPTQ); 0 starts from plain rounding.
        drawn: share of the windows that the teacher writes; the others are real text.
        calibrate: norms in front of layers (`sub_norm`) are calibrated before training.
        rates: learning rates that are tried.
    """

    source: str
    quantization: Mapping[str, Any] | None = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    distillation: Mapping[str, Any] | None = field(default_factory=lambda: _KL)
    peer: str | None = None
    fit: int = 0
    drawn: float = 0.0
    calibrate: bool = False
    rates: tuple[float, ...] = _RATES


def _ramp(**fields: Any) -> dict[str, Any]:
    return {"quantization_schedule": {"log_gap": False, **fields}}


ARMS: dict[str, Arm] = {
    "plain": Arm("straight-through, KL to the full-precision model"),
    "full-precision twin": Arm("reference", quantization=None, distillation=None, rates=(1e-4, 3e-4, 1e-3)),
    "labels only": Arm("BitNet b1.58 (arXiv 2402.17764): cross entropy, no teacher", distillation=None),
    "AutoBitLinear, ramp": Arm(
        "transformers' AutoBitLinear, linear ramp over a fifth (Hugging Face blog, 2024)", peer="autobit"
    ),
    "learned scale": Arm("ParetoQ (arXiv 2502.02631): LSQ, SEQ at 2 bits", {"weight_scale": "learned"}),
    "threshold scale": Arm("TWN (arXiv 1605.04711): threshold 0.7 mean", {"weight_scale": "threshold"}),
    "softmax relaxation": Arm(
        "Hestia (arXiv 2601.20745) without Hessian", {"relaxation": "softmax"}, _ramp(end=0.9), rates=(*_RATES, 8e-3)
    ),
    "annealed residual": Arm("Arenas: Sherry (arXiv 2601.07892)", {"relaxation": "residual"}, _ramp(end=0.9)),
    "tanh relay": Arm("CAT-Q (arXiv 2606.26650), the relaxation alone", {"relaxation": "relay"}, _ramp(end=0.5)),
    "linear ramp": Arm("Hugging Face blog, 2024", {}, _ramp(end=0.3)),
    "cosine ramp": Arm("own", {}, _ramp(ramp="cosine", end=0.3)),
    "stages 8-4-2": Arm(
        "Bit-by-Bit (arXiv 2604.07888)", {}, _ramp(ramp="none", stages={"int8": 0.1, "int4": 0.2, "int2": 0.3})
    ),
    "layer by layer": Arm("own", {}, _ramp(end=0.5, layers="forward")),
    "pull and noise": Arm(
        "WinQ (arXiv 2605.17471)",
        arguments={
            "weight_noise": {"kind": "gaussian", "sigma": 1e-3, "until": 0.9},
            "grid_pull": {"every": 60, "factor": 0.4},
        },
    ),
    "subset noise": Arm("Quant-Noise (arXiv 2004.07320)", arguments={"weight_noise": {"kind": "subset", "until": 0.9}}),
    "uniform noise": Arm("pseudo-noise", arguments={"weight_noise": {"kind": "uniform", "until": 0.9}}),
    "iterative freezing": Arm("arXiv 2203.11086", arguments={"oscillation_freezing": {}}),
    "damping": Arm("arXiv 2203.11086", arguments={"regularizers": {"oscillation_damping": 1e-4}}),
    "decay to 0 at half": Arm(
        "BitNet's two stages", arguments={"two_stage": {}, "weight_decay": 0.1, "lr_scheduler_type": "linear"}
    ),
    "GPTQ start": Arm("fit_weights", fit=64),
    "cautious": Arm("arXiv 2411.16085", arguments={"cautious": True}),
    "token noise": Arm("own", distillation={**_KL, "token_noise": {}}),
    "token noise, batch": Arm("own", distillation={**_KL, "token_noise": {"rate": 0.15, "source": "batch"}}),
    "cautious, token noise": Arm("own", arguments={"cautious": True}, distillation={**_KL, "token_noise": {}}),
    "small batches": Arm("plain, a quarter of the tokens a step", arguments=_OFTEN, rates=OFTEN_RATES),
    "MARS": Arm("arXiv 2411.10438", arguments={"mars": 0.025}),
    "drawn text": Arm("LLM-QAT (arXiv 2305.17888)", drawn=0.5),
    "fast norms": Arm("own", arguments=_FAST_NORMS),
    "early": Arm("own: small batches, cautious, MARS", arguments=_EARLY, rates=OFTEN_RATES),
    "all but TWN's scale": Arm(
        "own: early, fast norms, half of the text drawn",
        arguments={**_EARLY, **_FAST_NORMS},
        drawn=0.5,
        rates=OFTEN_RATES,
    ),
    "all": Arm(
        "own: the same, and TWN's scale, which is for ternary weights",
        {"weight_scale": "threshold"},
        arguments={**_EARLY, **_FAST_NORMS},
        drawn=0.5,
        rates=OFTEN_RATES,
    ),
    "more momentum": Arm("own", arguments={"adam_beta1": 0.97}),
    "hidden states": Arm("DistilBERT-like", distillation={**_KL, "hidden": {"weight": 0.3}}),
    "relations": Arm("BitDistill (arXiv 2510.13998)", distillation={**_KL, "relations": {"weight": 0.1}}),
    "reverse KL": Arm("MiniLLM-like", distillation={**_KL, "divergence": "reverse"}),
    "JSD": Arm("GKD (arXiv 2306.13649)", distillation={**_KL, "divergence": "jsd"}),
    "KL and labels": Arm("Hinton et al. (arXiv 1503.02531)", distillation={**_KL, "alpha": 0.5}),
    "temperature 2": Arm("Hinton et al. (arXiv 1503.02531)", distillation={**_KL, "temperature": 2.0}),
    "sub-norms": Arm("BitNet b1.58's norms", {"sub_norm": ["o_proj", "down_proj"]}, calibrate=True),
    "clipped STE": Arm("clipped", {"ste": "clipped"}),
    "tanh STE": Arm("soft", {"ste": "tanh"}),
    "learnable STE": Arm("own", {"ste": "learnable"}),
    "scale a channel": Arm("plain", {"granularity": "channel"}),
    "scale a group": Arm("plain", {"granularity": "group", "group_size": 64}),
}
ARMS["all, hidden states"] = replace(
    ARMS["all"], source="own: all, and DistilBERT-like", distillation={**_KL, "hidden": {"weight": 0.3}}
)
ARMS["all, ramp"] = replace(
    ARMS["all"], source="own: all, and a linear ramp over a fifth", arguments={**_EARLY, **_FAST_NORMS, **_ramp(end=0.2)}
)
ARMS["all, learned scale"] = replace(
    ARMS["all but TWN's scale"], source="own: the same, and ParetoQ's scale", quantization={"weight_scale": "learned"}
)
ARMS["all, softmax relaxation"] = Arm(
    "own: all but TWN's scale, and Hestia's relaxation",
    {"relaxation": "softmax"},
    arguments={**_EARLY, **_FAST_NORMS, **_ramp(end=0.9)},
    drawn=0.5,
    rates=(1e-3, 2e-3, 4e-3),
)
