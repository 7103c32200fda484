"""Tiny random models, one for each family, built from transformers configs without any download.

Two layers, hidden size 48. Attention is 64 wide inside (where the family allows it) and the feed-forward 80, so that a
swapped `in_features` / `out_features` or a transposed weight cannot pass unseen. Biases and norm weights are random
too: at their usual initial values (0 and 1) a bias or a norm that got lost would change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor

VOCABULARY = 96
HIDDEN = 48
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **_IDS,
}
_WIDE_HEADS = {**_DECODER, "head_dim": 16}


def _llama(**overrides: Any) -> tf.PreTrainedModel:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**_WIDE_HEADS, **overrides}))


def _qwen3(**overrides: Any) -> tf.PreTrainedModel:
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**{**_WIDE_HEADS, "tie_word_embeddings": True, **overrides}))


def _gemma3(**overrides: Any) -> tf.PreTrainedModel:
    layers = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**{**_WIDE_HEADS, **layers, **overrides}))


def _mistral(**overrides: Any) -> tf.PreTrainedModel:
    return tf.MistralForCausalLM(tf.MistralConfig(**{**_WIDE_HEADS, "sliding_window": None, **overrides}))


def _mixtral(**overrides: Any) -> tf.PreTrainedModel:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return tf.MixtralForCausalLM(tf.MixtralConfig(**{**_WIDE_HEADS, **experts, **overrides}))


def _bitnet(**overrides: Any) -> tf.PreTrainedModel:
    return tf.BitNetForCausalLM(tf.BitNetConfig(**{**_DECODER, **overrides}))


def _gpt2(**overrides: Any) -> tf.PreTrainedModel:
    sizes = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_inner": 80, "n_positions": 64}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**{**sizes, **_IDS, **overrides}))


def _bert(**overrides: Any) -> tf.PreTrainedModel:
    sizes = {key: value for key, value in _DECODER.items() if key != "num_key_value_heads"}
    return tf.BertForSequenceClassification(tf.BertConfig(**{**sizes, "num_labels": 3, **overrides}))


def _t5(**overrides: Any) -> tf.PreTrainedModel:
    sizes = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 16, "d_ff": 80, "num_layers": 2, "num_heads": 4}
    return tf.T5ForConditionalGeneration(tf.T5Config(**{**sizes, **_IDS, "decoder_start_token_id": 0, **overrides}))


def _vit(**overrides: Any) -> tf.PreTrainedModel:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    image = {"image_size": 16, "patch_size": 8, "num_channels": 3, "num_labels": 5}
    return tf.ViTForImageClassification(tf.ViTConfig(**{**sizes, **image, **overrides}))


def _whisper(**overrides: Any) -> tf.PreTrainedModel:
    sizes = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "num_mel_bins": 8}
    positions = {"max_source_positions": 10, "max_target_positions": 32, "decoder_start_token_id": 1}
    stacks = {
        f"{side}_{what}": number
        for side in ("encoder", "decoder")
        for what, number in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 80))
    }
    config = tf.WhisperConfig(**{**sizes, **positions, **stacks, **_IDS, **overrides})
    return tf.WhisperForConditionalGeneration(config)


_BUILDERS: dict[str, Callable[..., tf.PreTrainedModel]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "bitnet": _bitnet,
    "gpt2": _gpt2,
    "bert": _bert,
    "t5": _t5,
    "vit": _vit,
    "whisper": _whisper,
}
FAMILIES = tuple(_BUILDERS)
CAUSAL = ("llama", "qwen3", "gemma3", "mistral", "mixtral", "bitnet", "gpt2")


def tiny(name: str, *, labels: bool = False, seed: int = 0, **overrides: Any) -> tuple[tf.PreTrainedModel, dict[str, Tensor]]:
    """A float32 model of the family `name` in eval mode, and a batch of two for its forward.

    The same `seed` gives the same weights and the same batch; the global random state is left as it was.

    Args:
        name: one of `FAMILIES`.
        labels: add `labels` to the batch, so that the forward returns a loss.
        seed: of the weights and of the batch.
        overrides: fields of the family's config, for example `num_hidden_layers=1`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _BUILDERS[name](**overrides).float().eval()
        _randomize(model)
        return model, _batch(name, model.config, labels)


@torch.no_grad()
def _randomize(model: torch.nn.Module) -> None:
    """Activations of order one everywhere, and no bias at 0 and no norm weight at 1."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue  # fixed sinusoids of Whisper
        if parameter.dim() <= 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        else:
            fan_in = parameter[0].numel() if parameter.dim() == 4 else parameter.shape[-1]
            parameter.normal_(std=fan_in**-0.5)


def _batch(name: str, config: Any, labels: bool) -> dict[str, Tensor]:
    if name == "vit":
        batch = {"pixel_values": torch.randn(2, 3, config.image_size, config.image_size)}
    elif name == "whisper":
        batch = {"input_features": torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions)}
    else:
        batch = {"input_ids": _tokens(2, 11), "attention_mask": torch.ones(2, 11, dtype=torch.long)}
    if name in ("t5", "whisper") and not labels:
        batch["decoder_input_ids"] = _tokens(2, 7)
    if labels:
        batch["labels"] = _labels(name, config, batch)
    return batch


def _labels(name: str, config: Any, batch: dict[str, Tensor]) -> Tensor:
    if name in ("bert", "vit"):
        return torch.randint(config.num_labels, (2,))
    return _tokens(2, 7) if name in ("t5", "whisper") else batch["input_ids"].clone()


def _tokens(*shape: int) -> Tensor:
    """Random token ids without the three special ones."""
    return torch.randint(3, VOCABULARY, shape)
