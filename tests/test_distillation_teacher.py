"""The teacher: what it shares with the student, its dtype, its device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from hf_bitnet import DistillationConfig, set_strength
from hf_bitnet.surgery import full_precision_copy, trained_layers
from hf_bitnet.training.distillation.teacher import make_teacher, prepare_teacher
from tests.qat import assert_same, losses, make_trainer, quantized, weights
from tests.tiny import tiny


def _storages(model: nn.Module) -> dict[str, int]:
    return {name: parameter.untyped_storage().data_ptr() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bert"])
def test_frozen_parameters_are_shared(name: str, tmp_path: Path) -> None:
    """Frozen embeddings, norms and half of the quantized layers cost nothing a second time; the teacher stays as it was."""
    model = quantized(name)
    trained = {f"{path}.weight" for path, _ in trained_layers(model)[::2]}
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(path in trained)
    trainer = make_trainer(tmp_path, model, name, teacher="self", distillation={"hidden": {}})
    assert trainer._distiller is not None
    teacher: Any = trainer._distiller.teacher
    before = weights(teacher)
    ours, theirs = _storages(model), _storages(teacher)
    assert {path for path in theirs if theirs[path] not in ours.values()} == trained
    trainer.train()
    assert_same(weights(teacher), before)
    assert losses(trainer)[-1]["distill/kl"] > 0
    assert all(parameter.grad is None for parameter in teacher.parameters() if parameter not in set(model.parameters()))


def test_what_is_shared_must_stay_frozen(tmp_path: Path) -> None:
    model = quantized()
    layer = trained_layers(model)[0][1]
    for frozen in (layer.weight, model.model.embed_tokens.weight):
        frozen.requires_grad_(False)
        trainer = make_trainer(tmp_path, model, teacher="self")
        frozen.requires_grad_(True)
        with pytest.raises(ValueError, match="shares parameters with it"):
            trainer.train()


def test_a_copy_shares_nothing_unless_asked() -> None:
    model = quantized().requires_grad_(False)
    assert not set(_storages(full_precision_copy(model)).values()) & set(_storages(model).values())
    assert set(_storages(full_precision_copy(model, share_frozen=True)).values()) <= set(_storages(model).values())


def test_bfloat16_teacher(tmp_path: Path) -> None:
    """Half of the bytes, of the trained and of the frozen; the student's own weights stay float32."""
    model = quantized()
    model.model.embed_tokens.weight.requires_grad_(False)
    trainer = make_trainer(tmp_path, model, teacher="self", distillation={"teacher_dtype": "bfloat16"})
    assert trainer._distiller is not None
    teacher: Any = trainer._distiller.teacher
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    set_strength(model, 0.0)
    model.train()
    batch = tiny("llama", labels=True)[1]
    result = trainer._distiller(model, model, dict(batch))
    assert 0 < result.main[1] / result.tokens < 0.01  # rounding
    trainer.train()


def test_bfloat16_teacher_of_images_and_of_a_path(tmp_path: Path) -> None:
    """Float inputs are cast; a saved model is loaded in the dtype."""
    model, batch = quantized("vit"), tiny("vit", labels=True)[1]
    trainer = make_trainer(tmp_path, model, teacher="self", distillation={"teacher_dtype": "bfloat16"})
    assert trainer._distiller is not None
    assert trainer._distiller(model.train(), model, dict(batch)).main.isfinite().all()
    tiny("llama", seed=1)[0].save_pretrained(tmp_path / "saved")
    trainer = make_trainer(tmp_path, quantized(), teacher=str(tmp_path / "saved"), distillation={"teacher_dtype": "bfloat16"})
    assert trainer._distiller is not None and trainer._distiller.teacher is not None
    assert next(trainer._distiller.teacher.parameters()).dtype == torch.bfloat16


def test_a_teacher_on_another_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs are moved to it, its rows and inner states back. Both devices are one here: the moves are what is tested."""
    moves: list[tuple[torch.device, torch.device]] = []
    stock = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        target = next((each for each in args if isinstance(each, torch.device)), None)
        if target is not None:
            moves.append((self.device, target))
        return stock(self, *args, **kwargs)

    model = quantized()
    teacher = tiny("llama", seed=1)[0]
    settings = {"teacher_device": "cpu", "hidden": {}, "relations": {}}
    trainer = make_trainer(tmp_path, model, teacher=teacher, distillation=settings)
    plain = make_trainer(tmp_path, model, teacher=teacher, distillation={"hidden": {}, "relations": {}})
    batch = tiny("llama", labels=True)[1]
    model.train()
    assert trainer._distiller is not None and plain._distiller is not None
    monkeypatch.setattr(torch.Tensor, "to", to)
    result = trainer._distiller(model, model, dict(batch))
    # input_ids and attention_mask to the teacher; rows, 2 hidden states and 3 relations back
    assert len(moves) >= 2 + 1 + 2 + 3
    monkeypatch.undo()
    torch.testing.assert_close(result.main, plain._distiller(model, model, dict(batch)).main)


def test_a_device_of_its_own_shares_nothing() -> None:
    model: Any = quantized().requires_grad_(False)

    class One:
        distributed_type = DistributedType.NO

    class Sharded:
        distributed_type = DistributedType.FSDP

    plain, elsewhere = DistillationConfig(), DistillationConfig(teacher_device="cpu")
    ours = set(_storages(model).values())
    accelerator: Any = One()
    assert set(_storages(make_teacher("self", model, plain, accelerator)).values()) <= ours
    assert not set(_storages(make_teacher("self", model, elsewhere, accelerator)).values()) & ours
    accelerator = Sharded()
    assert not set(_storages(make_teacher("self", model, plain, accelerator)).values()) & ours
    with pytest.raises(ValueError, match=r"under FSDP and DeepSpeed the teacher is sharded.*leave teacher_device out"):
        prepare_teacher(model, accelerator, elsewhere)
