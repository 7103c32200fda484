"""Forms that are mixed, replicas, heads that cannot be packed, folders that hold more than a model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import hf_bitnet as hb
from hf_bitnet.surgery import quantized_layers
from tests.tiny import tiny


@pytest.mark.parametrize("fields", [{"weight": "int8", "weight_scale": "learned"}, {"embeddings": "int8"}], ids=str)
def test_a_state_dict_of_the_other_form_is_refused(fields: dict[str, Any]) -> None:
    """Of int8 weights with learned scales, both forms have equal keys and shapes, and torch would cast."""
    model, _ = tiny("llama")
    packed = hb.pack_model(copy.deepcopy(hb.quantize_model(model, hb.BitNetQuantizationConfig(**fields))))
    for target, source, words in (
        (model, packed, r"weight holds torch\.uint8, so it is packed, and the model is not; call hf_bitnet\.pack_model"),
        (packed, model, r"weight holds torch\.float32, so it is in train form, and the model is not.*unpack_model"),
    ):
        before = {name: layer.quantized_weight().codes.clone() for name, layer in quantized_layers(target)}
        with pytest.raises(RuntimeError, match=words):
            target.load_state_dict(source.state_dict(), strict=bool(fields.get("weight")))
        assert all(layer.quantized_weight().codes.equal(before[name]) for name, layer in quantized_layers(target))
    model.load_state_dict(copy.deepcopy(model).state_dict())
    packed.load_state_dict(copy.deepcopy(packed).state_dict())


def _as_replica(module: nn.Module) -> nn.Module:
    """What torch.nn.parallel.replicate makes on each device: parameters are plain attributes."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else _as_replica(child)
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.detach())
    for name, buffer in module._buffers.items():
        replica._buffers[name] = buffer
    return replica


@torch.no_grad()
@pytest.mark.parametrize("optimized", [False, True])
def test_replicas_of_packed_models(optimized: bool) -> None:
    model, batch = tiny("llama")
    hb.pack_model(hb.quantize_model(model, hb.BitNetQuantizationConfig()))
    if optimized:
        hb.optimize_for_generation(model)
    torch.testing.assert_close(_as_replica(model)(**batch).logits, model(**batch).logits)


def test_heads_whose_weight_is_read_are_not_packed() -> None:
    """Mamba casts to `lm_head.weight.dtype`, which would be bytes."""
    model = tf.MambaForCausalLM(tf.MambaConfig(vocab_size=96, hidden_size=48, num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"the parent of the output head lm_head reads its raw weight.*leave that field out"):
        hb.quantize_model(model, hb.BitNetQuantizationConfig(embeddings="int8"))
    hb.pack_model(hb.quantize_model(model, hb.BitNetQuantizationConfig()))(torch.tensor([[1, 2, 3]]))


def test_a_kernel_that_a_checkpoint_names_is_not_fetched(tmp_path: Path) -> None:
    tiny("llama")[0].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_attn_implementation": "someone/kernel"}))
    assert hb.open_model(tmp_path).config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["wandb/log", "rows.npz", "tf_model.h5"])
def test_what_is_not_of_a_model_is_not_pushed(name: str, tmp_path: Path) -> None:
    hb.quantize_model(tiny("llama")[0], hb.BitNetQuantizationConfig(form="packed")).save_pretrained(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="is not pushed: it holds"):
        hb.push_to_hub(tmp_path, "me/model", dry_run=True)
