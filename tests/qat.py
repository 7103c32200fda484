"""What the tests of training share: a tiny data set, and a trainer built in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from hf_bitnet import BitNetQuantizationConfig, QATArguments, QATTrainer, quantize_model
from hf_bitnet.surgery import trained_layers
from tests.tiny import VOCABULARY, tiny

# fields of a config, for tests that train many times and do not care how deep a model is: seven linear layers are left
ONE_LAYER: dict[str, Any] = {"num_hidden_layers": 1}


def examples(name: str = "llama", number: int = 32, seed: int = 0) -> list[dict[str, Tensor]]:
    """Examples of one length; a different number of masked labels in each, so that a mean of means is not the mean."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(number):
        ids = torch.randint(3, VOCABULARY, (10,), generator=generator)
        example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if name == "bert":
            example["labels"] = ids[0] % 3
        else:
            example["labels"] = torch.randint(3, VOCABULARY, (7,), generator=generator) if name == "t5" else ids.clone()
            example["labels"][: index % 6] = -100
        made.append(example)
    return made


def quantized(name: str = "llama", seed: int = 0, model: dict[str, Any] | None = None, **fields: Any) -> tf.PreTrainedModel:
    """A tiny quantized model; `fields` are of its quantization config, `model` of its own config."""
    return quantize_model(plain(name, seed, model), BitNetQuantizationConfig(**fields))


def plain(name: str = "llama", seed: int = 0, model: dict[str, Any] | None = None) -> tf.PreTrainedModel:
    """A tiny model without dropout (unless its config `model` asks for it)."""
    made = tiny(name, seed=seed, **(model or {}))[0]
    if model and "attention_dropout" in model:
        return made
    for module in made.modules():
        # losses of different batches could not be compared; a number is where T5's attention keeps it
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return made


def arguments(folder: Path | str, **fields: Any) -> QATArguments:
    base = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return QATArguments(**(base | fields))


def make_trainer(
    folder: Path | str, model: nn.Module | None, name: str = "llama", teacher: Any = None, **fields: Any
) -> QATTrainer:
    """A trainer on `examples(name)`; what is not a field of QATArguments goes to the trainer."""
    legal = set(QATArguments.__dataclass_fields__)
    named = {key: fields.pop(key) for key in list(fields) if key not in legal}
    data = {"train_dataset": examples(name), "eval_dataset": examples(name, 8, seed=1)}
    return QATTrainer(model=model, args=arguments(folder, **fields), teacher=teacher, **(data | named))


BAD = "model.layers.0.self_attn.o_proj"


def spoil(model: nn.Module, factor: float = 1e5) -> nn.Module:
    """Makes the int8 gradient of a Llama's layer `BAD` bad: one huge element for each token, whose own weights are zero."""
    layer = model.get_submodule(BAD)
    assert isinstance(layer.weight, Tensor)
    with torch.no_grad():
        layer.weight[0] *= 1e-3
    factors = torch.ones(layer.weight.shape[0])
    factors[0] = factor

    def enlarge(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda grad: grad * factors)

    layer.register_forward_hook(enlarge)
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything a checkpoint holds."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def codes(model: nn.Module) -> dict[str, Tensor]:
    """The codes of each layer in train form."""
    return {name: layer.quantized_weight().codes for name, layer in trained_layers(model)}


def assert_learned(trainer: Any, folder: Path) -> None:
    """The run of any trainer: the loss fell, the strength arrived, metrics were logged, and what was saved has equal codes."""
    logs = losses(trainer)
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert logs[-1]["quant/strength"] == 1.0
    assert logs[0]["quant/flip_rate"] > 0 and logs[0]["quant/sqnr_db"] > 0
    trainer.save_model(str(folder))
    loaded = type(trainer.model).from_pretrained(folder)
    assert_same(codes(trainer.model), codes(loaded))
    assert_same(weights(trainer.model), weights(loaded))


def losses(trainer: QATTrainer) -> list[dict[str, float]]:
    """The training logs, without times."""
    return [log for log in trainer.state.log_history if "loss" in log]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What this package logged; transformers has warnings of its own."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("hf_bitnet")]
