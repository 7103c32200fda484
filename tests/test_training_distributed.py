"""Two processes on one machine (gloo) train as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_bitnet.surgery import trained_layers
from hf_bitnet.training.cautious import make_cautious
from hf_bitnet.training.int8_backward import Int8BackwardCallback
from hf_bitnet.training.mars import correct_gradients
from tests.qat import BAD, ONE_LAYER, assert_same, losses, make_trainer, quantized, spoil, weights
from tests.tiny import tiny

REPOSITORY = Path(__file__).resolve().parents[1]


def run(folder: str, batch: int, name: str, teacher: str, **fields: Any) -> dict[str, Tensor]:
    """Two steps of plain gradient descent; the weights afterwards, and what was logged."""
    torch.set_num_threads(1)
    descent = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 2}
    made = {"none": None, "self": "self", "other": tiny(name, seed=1)[0]}[teacher]
    inner = {"distillation": {"hidden": {}, "relations": {}}} if teacher == "self" else {}
    trainer = make_trainer(
        folder,
        quantized(name),
        name,
        made,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=2,
        **descent,
        **inner,
        **fields,
    )
    trainer.train()
    trainer.evaluate()  # its loss is Trainer's own mean of means, which depends on the number of ranks
    logs = [log[key] for log in trainer.state.log_history if "loss" in log for key in ("loss", "quant/flip_rate")]
    assert trainer.model is not None
    return {**weights(trainer.model), "logs": torch.tensor(logs)}


_SCRIPT = """
import os, sys
from safetensors.torch import save_file
from tests.test_training_distributed import run
folder, name, teacher = sys.argv[1:]
result = run(folder, 2, name, teacher)
save_file(result, f"{folder}/result-{os.environ['RANK']}.safetensors")
"""


_OTHER_TEACHER = """
import json, os, pathlib, sys
from hf_bitnet.training.resume import check_teacher
from accelerate import PartialState
PartialState(cpu=True)
folder = pathlib.Path(sys.argv[1])
# of the sharded teacher, the first process alone holds what a fingerprint can be taken of
check_teacher(folder, "a" if os.environ["RANK"] == "0" else None)
try:
    check_teacher(folder, "b")
except ValueError as error:
    (folder / f"said-{os.environ['RANK']}").write_text(str(error))
PartialState().wait_for_everyone()
PartialState().destroy_process_group()
"""


def _launch(script: str, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no_python"]
    done = subprocess.run(
        [*command, sys.executable, "-c", script, *arguments], env=environment, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


_SHARDED = """
import os, sys
from safetensors.torch import save_file
from tests.test_training_distributed import run_sharded, take_processes_for_gpus
take_processes_for_gpus()
result = run_sharded(sys.argv[1])
if os.environ["RANK"] == "0":
    save_file(result, f"{sys.argv[1]}/result-sharded.safetensors")
"""
_RUN: dict[str, Any] = {
    "max_steps": 4,
    "gradient_accumulation_steps": 2,
    "teacher": "self",
    "distillation": {"hidden": {}, "relations": {}},
    "quantization_schedule": {"ramp": "linear", "end": 0.7},
    "regularizers": {"l2_to_grid": 0.05},
    "grid_pull": {"every": 2, "factor": 0.5},
}


def take_processes_for_gpus() -> None:
    """accelerate gives processes on CPUs DDP, whatever FSDP asks for; told that they are GPUs, it goes its real FSDP way."""
    original = AcceleratorState.__init__

    def told(self: AcceleratorState, *args: Any, **named: Any) -> None:
        shared = PartialState(cpu=True)._shared_state
        if shared["distributed_type"] == DistributedType.MULTI_CPU:
            shared["distributed_type"] = DistributedType.MULTI_GPU
        original(self, *args, **named)

    AcceleratorState.__init__ = told


def _small() -> Any:
    return quantized(sub_norm=["o_proj"], weight="int2_seq", weight_scale="learned")


def run_sharded(folder: str) -> dict[str, Tensor]:
    """A whole run under FSDP2, and one that is stopped and resumed; both have to be the same."""
    torch.set_num_threads(1)
    sharding = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": "FULL_STATE_DICT"}
    fields = {**_RUN, "fsdp": True, "fsdp_config": sharding, "per_device_train_batch_size": 2, "bf16": False}
    saving = {"save_strategy": "steps", "save_steps": 2}
    results = []
    for resumed in (False, True):
        if resumed:
            with pytest.raises(InterruptedError):
                make_trainer(f"{folder}/half", _small(), callbacks=[_StopAt(3)], **fields, **saving).train()
        trainer = make_trainer(f"{folder}/half" if resumed else f"{folder}/whole", _small(), **fields, **saving)
        trainer.train(resume_from_checkpoint=resumed)
        assert type(trainer.model).__name__ == "FSDPLlamaForCausalLM"
        state = {name: tensor.clone() for name, tensor in trainer.accelerator.get_state_dict(trainer.model).items()}
        results.append((losses(trainer), state))
    if trainer.accelerator.is_main_process:
        assert results[0][0] == results[1][0]
        assert_same(results[0][1], results[1][1])
    return {**results[0][1], "logs": _numbers(results[0][0])}


class _StopAt(tf.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise InterruptedError


_LOGGED = ("loss", "quant/flip_rate", "quant/sqnr_db", "distill/kl", "distill/hidden", "distill/relations_weight")


def _numbers(logs: list[dict[str, float]]) -> Tensor:
    return torch.tensor([log[key] for log in logs for key in _LOGGED])


@pytest.mark.slow
def test_sharded_with_a_sharded_teacher(tmp_path: Path) -> None:
    """FSDP2 on two ranks: resumes exactly, and trains as one process does (its gradients are summed in another order)."""
    _launch(_SHARDED, str(tmp_path))
    sharded = load_file(tmp_path / "result-sharded.safetensors")
    trainer = make_trainer(tmp_path / "one", _small(), **_RUN)
    trainer.train()
    torch.testing.assert_close(sharded["logs"], _numbers(losses(trainer)), rtol=1e-3, atol=1e-3)
    before, one = _small().state_dict(), weights(trainer.model)
    for key in one.keys() - {"logs"}:
        assert (sharded[key] - one[key]).float().norm() <= 0.05 * (one[key] - before[key]).float().norm() + 1e-6, key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "teacher"), [("llama", "none"), ("llama", "other"), ("t5", "none"), ("t5", "other"), ("llama", "self")]
)
def test_two_ranks_equal_one(name: str, teacher: str, tmp_path: Path) -> None:
    _launch(_SCRIPT, str(tmp_path), name, teacher)
    ranks = [load_file(tmp_path / f"result-{rank}.safetensors") for rank in (0, 1)]
    one = run(str(tmp_path), 4, name, teacher)
    before = quantized(name).state_dict()
    torch.testing.assert_close(ranks[0]["logs"], one["logs"], rtol=1e-4, atol=1e-4)
    for key in one.keys() - {"logs"}:
        assert torch.equal(ranks[0][key], ranks[1][key])
        moved = (one[key] - before[key]).float().norm()
        assert (ranks[0][key] - one[key]).float().norm() <= 2e-3 * moved + 1e-7, key


_CAUTIOUS = """
import sys, torch, torch.distributed as dist
from tests.test_training_distributed import cautious_weights
dist.init_process_group("gloo")
cautious = cautious_weights(False), cautious_weights(True)
corrected = cautious_weights(False, mars=0.1), cautious_weights(True, mars=0.1)
dist.destroy_process_group()
assert len(cautious[0]) == 4 and all(map(torch.equal, *cautious)), cautious
torch.testing.assert_close(*corrected, rtol=1e-5, atol=1e-6)  # norms are summed in another order
assert not any(map(torch.equal, cautious[0], corrected[0]))
"""


def cautious_weights(shard: bool, mars: float = 0.0) -> list[Tensor]:
    """The parameters after five cautious steps of AdamW, with MARS or without, gathered. The same batch on each rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 3))
    if shard:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    make_cautious(optimizer)
    if mars:
        correct_gradients(optimizer, mars)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        (model(torch.randn(4, 6, generator=generator)).square().sum() * torch.randn((), generator=generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [each.full_tensor() if shard else each.detach() for each in model.parameters()]  # type: ignore[operator]


@pytest.mark.slow
def test_cautious_updates_of_sharded_weights() -> None:
    """The share of weights that agree, and the norm that MARS divides by, are of the whole tensor, not of a rank's part."""
    _launch(_CAUTIOUS)


_INT8 = """
import json, os, sys
from safetensors.torch import save_file
from tests.test_training_distributed import run_int8
result, cosines = run_int8(sys.argv[1])
save_file(result, f"{sys.argv[1]}/result-{os.environ['RANK']}.safetensors")
open(f"{sys.argv[1]}/cosines-{os.environ['RANK']}.json", "w").write(json.dumps(cosines))
"""


def run_int8(folder: str) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """Four steps with int8 gradients, which on the second rank are bad in one layer."""
    torch.set_num_threads(1)
    model = spoil(quantized(model=ONE_LAYER), factor=1e5 if os.environ["RANK"] == "1" else 1.0)
    trainer = make_trainer(folder, model, int8_backward={}, max_steps=4)
    trainer.train()
    assert isinstance(model, nn.Module)
    (callback,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, Int8BackwardCallback)]
    return weights(model), callback.cosines


@pytest.mark.slow
def test_all_ranks_choose_the_same_int8_products(tmp_path: Path) -> None:
    _launch(_INT8, str(tmp_path))
    cosines = [json.loads((tmp_path / f"cosines-{rank}.json").read_text()) for rank in (0, 1)]
    assert cosines[0] == cosines[1] and cosines[0][BAD]["input"] < 0.99 < cosines[0][BAD]["weight"]
    assert_same(*(load_file(tmp_path / f"result-{rank}.safetensors") for rank in (0, 1)))


def test_every_process_hears_of_another_teacher(tmp_path: Path) -> None:
    """One that went on alone would wait for the others for ever."""
    (tmp_path / "qat_teacher.json").write_text(json.dumps({"fingerprint": "a"}))
    _launch(_OTHER_TEACHER, str(tmp_path))
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1] and "trained with another teacher" in said[0]


_BORDERS = """
import json, os, sys
from tests.test_training_distributed import run_at_borders, take_processes_for_gpus
take_processes_for_gpus()
found = run_at_borders(sys.argv[1], sys.argv[2])
open(f"{sys.argv[1]}/found-{os.environ['RANK']}.json", "w").write(json.dumps(found))
"""


def run_at_borders(folder: str, what: str) -> Any:
    """Three steps of a sharded model, on the first or the second rank with something that the other has not."""
    torch.set_num_threads(1)
    rank, shard = int(os.environ["RANK"]), {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    fields: dict[str, Any] = {"fsdp": True, "fsdp_config": shard, "max_steps": 3, "per_device_train_batch_size": 2}
    batches: list[Any] = []

    def collate(rows: list[Any]) -> dict[str, Any]:
        batches.append(tf.default_data_collator(rows))
        if what == "labels" and rank == 1 and len(batches) == 1:
            batches[0]["labels"].fill_(-100)
        return batches[-1]

    model = quantized(activation="int8_static" if what == "ranges" else "int8")
    if what == "nan" and rank == 0:
        spoilt = lambda module, args, output: output * float("nan") if trainer.state.global_step == 1 else output  # noqa: E731
        model.model.embed_tokens.register_forward_hook(spoilt)
    fields |= {"teacher": "self"} if what == "labels" else {}
    fields |= {"online_calibration": {"every": 2, "until": 1.0}} if what == "ranges" else {}
    trainer = make_trainer(folder, model, data_collator=collate, **fields)
    try:
        trainer.train()
    except RuntimeError as error:
        return str(error)
    if what == "ranges":
        return [float(layer.act_scale) for _, layer in trained_layers(model)]  # type: ignore[arg-type]
    return [log["loss"] for log in losses(trainer)]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["labels", "nan", "ranges"])
def test_sharded_ranks_decide_together(what: str, tmp_path: Path) -> None:
    """A forward of one rank alone would wait for the others for ever, and ranges of one rank alone quantize otherwise."""
    _launch(_BORDERS, str(tmp_path), what)
    found = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1)]
    if what == "nan":
        assert "the output of model.embed_tokens" in found[0] and "it comes from another process" in found[1]
    else:
        assert found[0] == found[1] and all(number > 0 for number in found[0])
