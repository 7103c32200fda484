"""What the tests of transformers' own method `bitnet` share: its checkpoints, written by its own functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.integrations.bitnet import pack_weights

from hf_bitnet import BitNetQuantizationConfig, quantize_model
from tests.checkpoints import edit_config, edit_tensors
from tests.tiny import tiny

KINDS = ("bitlinear", "packed", "unpacked", "online")
# (family, overrides, norms, dtype): BitNet itself; biases; norms with an eps of their own; both dtypes
VARIANTS = [
    ("bitnet", {}, False, torch.float32),
    ("llama", {"attention_bias": True, "mlp_bias": True}, False, torch.float32),
    ("llama", {"attention_bias": True}, True, torch.bfloat16),
]
NAMES = [f"{kind}-{index}" for kind in KINDS for index in range(len(VARIANTS))]
TRAINED = ("llama", "qwen3", "gemma3", "bert", "t5", "vit", "whisper", "mixtral", "bitnet")


def quantized(family: str, **fields: Any) -> tuple[Any, dict[str, Tensor]]:
    model, batch = tiny(family)
    if family == "mixtral":  # whose experts the method leaves alone
        fields.setdefault("keep", ["experts"])
    return quantize_model(model, BitNetQuantizationConfig(**fields)), batch


def write_native(model: Any, folder: Path, kind: str, norms: bool) -> None:
    """A native checkpoint of the float model."""
    model.save_pretrained(folder)
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and name != "lm_head"]

    def edit(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        for name in names:
            weight = tensors[f"{name}.weight"]
            scale = weight.float().abs().mean()
            codes = (weight.float() / scale).round().clamp(-1, 1)
            if kind != "online":
                tensors[f"{name}.weight"] = codes.to(weight.dtype) if kind == "unpacked" else pack_weights(codes)
                stored = 1 / scale if kind == "bitlinear" else scale
                tensors[f"{name}.weight_scale"] = stored.reshape(1).to(weight.dtype)
            if norms:
                gain = 1 + 0.1 * torch.randn(weight.shape[1], generator=generator)
                tensors[f"{name}.rms_norm.weight"] = gain.to(weight.dtype)

    edit_tensors(folder, edit)
    settings = {
        "quant_method": "bitnet",
        "linear_class": "bitlinear" if kind == "bitlinear" else "autobitlinear",
        "quantization_mode": "online" if kind == "online" else "offline",
        "modules_to_not_convert": ["lm_head"],
        "use_rms_norm": norms,
        "rms_norm_eps": 1e-5,
    }
    edit_config(folder, lambda config: config.update(quantization_config=settings))


def batch_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "batch.safetensors")


def close(a: Tensor, b: Tensor | None, limit: float) -> bool:
    """RMS of the difference against RMS."""
    assert b is not None
    return float((a - b).square().mean().sqrt()) <= limit * float(b.square().mean().sqrt())
