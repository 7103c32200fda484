"""A run that was stopped or killed continues bit for bit; experts come back; broken checkpoints are passed over."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from hf_bitnet.training.resume import last_complete_checkpoint
from tests.qat import ONE_LAYER, assert_same, losses, make_trainer, quantized, said, weights
from tests.tiny import tiny

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS, SAVED = 8, 2
RUN: dict[str, Any] = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": SAVED,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "teacher": "self",
    "logging_steps": 1,
}
# stages end at saved steps and between them; layers become hard one by one
SCHEDULES: dict[str, Any] = {
    "together": {"ramp": "cosine", "end": 0.8},
    "progressive": {
        "ramp": "linear",
        "end": 7,
        "stages": {"int8": 2, "int4": 5},
        "layers": "backward",
        "layer_window": 0.5,
    },
}
DROPOUT = {**ONE_LAYER, "attention_dropout": 0.3}  # so that the random state matters too


class _StopAt(tf.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise InterruptedError


def _tied() -> tf.PreTrainedModel:
    return quantized("qwen3", model=DROPOUT, embeddings="int4")


def _run(schedule: str) -> dict[str, Any]:
    return {**RUN, "quantization_schedule": SCHEDULES[schedule]}


def _model() -> tf.PreTrainedModel:
    return quantized(model=DROPOUT, weight="int2_seq", weight_scale="learned", ste="learnable", sub_norm=["o_proj"])


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The same sums in this process and in the one that is killed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, schedule: str
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), _model(), **_run(schedule))
    trainer.train()
    return losses(trainer), weights(trainer.model)


each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, scope="module")


@each_schedule
@pytest.mark.parametrize("stop", [3, 5, 6])
def test_resume_equals_no_stop(stop: int, schedule: str, tmp_path: Path, uninterrupted: tuple) -> None:
    with pytest.raises(InterruptedError):
        make_trainer(tmp_path, _model(), callbacks=[_StopAt(stop)], **_run(schedule)).train()
    trainer = make_trainer(tmp_path, _model(), **_run(schedule))
    trainer.train(resume_from_checkpoint=True)
    assert losses(trainer) == uninterrupted[0]
    assert_same(weights(trainer.model), uninterrupted[1])


def test_resume_with_quantized_embeddings(tmp_path: Path) -> None:
    """A tied table and head, whose strength the schedule moves: weights equal those of a run that never stopped."""
    whole = make_trainer(tmp_path / "whole", _tied(), **_run("together"))
    whole.train()
    with pytest.raises(InterruptedError):
        make_trainer(tmp_path / "stopped", _tied(), callbacks=[_StopAt(3)], **_run("together")).train()
    trainer = make_trainer(tmp_path / "stopped", _tied(), **_run("together"))
    trainer.train(resume_from_checkpoint=True)
    assert losses(trainer) == losses(whole)
    assert_same(weights(trainer.model), weights(whole.model))
    for model in (whole.model, trainer.model):
        assert model.lm_head.weight is model.model.embed_tokens.weight and not model.model.embed_tokens.relaxed


_SCRIPT = """
import sys, time, torch
torch.set_num_threads(1)
from tests.qat import make_trainer
from tests.test_training_resume import _model, _run
import transformers as tf
class Report(tf.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print("step", state.global_step, flush=True)
        time.sleep(0.05)
    def on_substep_end(self, args, state, control, **kwargs):
        print("half", state.global_step, flush=True)
make_trainer(sys.argv[1], _model(), callbacks=[Report()], **_run(sys.argv[2])).train()
"""


@pytest.mark.parametrize(
    "schedule", ["progressive", pytest.param("together", marks=pytest.mark.slow)], scope="module"
)  # a process takes seconds to start
def test_resume_after_sigkill(schedule: str, tmp_path: Path, uninterrupted: tuple) -> None:
    """A real process, killed without warning at a random moment after the first checkpoint."""
    moment = random.Random().choice([f"{what} {step}" for step in range(SAVED + 1, STEPS - 1) for what in ("step", "half")])
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(tmp_path), schedule],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=REPOSITORY,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == moment:
            time.sleep(random.Random().random() * 0.05)
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL, moment
    trainer = make_trainer(tmp_path, _model(), **_run(schedule))
    trainer.train(resume_from_checkpoint=True)
    assert losses(trainer) == uninterrupted[0], moment
    assert_same(weights(trainer.model), uninterrupted[1])


@pytest.mark.parametrize("schedule", ["together"], scope="module")
def test_checkpoints_cut_short_are_passed_over(
    tmp_path: Path, schedule: str, uninterrupted: tuple, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InterruptedError):
        make_trainer(tmp_path, _model(), callbacks=[_StopAt(7)], **_run(schedule)).train()
    whole = last_complete_checkpoint(tmp_path, 1)
    assert whole is not None and whole.endswith("checkpoint-6")
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text('{"global_st')
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "checkpoint-5")
    trainer = make_trainer(tmp_path, _model(), **_run(schedule))
    trainer.train(resume_from_checkpoint=True)
    said = [record.getMessage() for record in caplog.records if "cut short" in record.getMessage()]
    assert len(said) == 2
    assert "checkpoint-6: no readable trainer_state.json" in said[0]
    assert "checkpoint-5: its state is of step 4" in said[1]
    assert losses(trainer) == uninterrupted[0]
    assert_same(weights(trainer.model), uninterrupted[1])


def test_random_states_of_all_ranks_are_needed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    for name in ("scheduler.pt", "rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"):
        torch.save({}, tmp_path / name)
    shutil.copy(tmp_path / "scheduler.pt", folder)
    assert last_complete_checkpoint(tmp_path, 2) is None  # no weights
    (folder / "mine").mkdir()
    (folder / "mine" / "adapter_model.safetensors").touch()
    assert last_complete_checkpoint(tmp_path, 2) == str(folder)  # save_only_model
    shutil.copy(tmp_path / "rng_state_0.pth", folder)
    assert last_complete_checkpoint(tmp_path, 2) is None
    shutil.copy(tmp_path / "rng_state_1.pth", folder)
    assert last_complete_checkpoint(tmp_path, 2) is None  # with random states, yet without an optimizer
    shutil.copy(tmp_path / "optimizer.pt", folder)
    assert last_complete_checkpoint(tmp_path, 2) == str(folder)
    assert last_complete_checkpoint(tmp_path / "nowhere", 1) is None


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_torn_files_are_named(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(tmp_path, _model(), **_run("together")).train()
    before, last = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))[-2:]
    data = (last / name).read_bytes()
    (last / name).write_bytes(data[: len(data) // 2])
    assert last_complete_checkpoint(tmp_path, 1) == str(before)
    assert f"{last.name}: {name} is cut short or damaged" in caplog.text
    with pytest.raises(ValueError, match=rf"{last.name} cannot be resumed from: {name} is cut short.*=True takes the last"):
        make_trainer(tmp_path, _model(), **_run("together")).train(resume_from_checkpoint=str(last))


def test_files_of_others_and_of_old_are_no_concern(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    (folder / "extra.pt").mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    (folder / "probe.bin").write_bytes(b"mine")
    torch.save({"a": torch.ones(3)}, folder / "optimizer.pt", _use_new_zipfile_serialization=False)
    torch.save({"a": torch.ones(3)}, folder / "pytorch_model.bin")
    assert last_complete_checkpoint(tmp_path, 1) == str(folder)
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    assert last_complete_checkpoint(tmp_path, 1) is None


def test_a_torn_note_of_the_schedule_is_none(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        make_trainer(tmp_path, _model(), callbacks=[_StopAt(7)], **_run("together")).train()
    (tmp_path / "checkpoint-6" / "qat_schedule.json").write_text('{"ra')
    make_trainer(tmp_path, _model(), **_run("together")).train(resume_from_checkpoint=True)


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No valid checkpoint"):
        make_trainer(tmp_path, quantized()).train(resume_from_checkpoint=True)


def test_another_teacher_is_noticed(tmp_path: Path) -> None:
    make_trainer(tmp_path, quantized(), teacher="self", max_steps=2, save_strategy="steps", save_steps=2).train()
    other = make_trainer(tmp_path, quantized(), teacher=tiny("llama", seed=1)[0], max_steps=4)
    with pytest.raises(ValueError, match=r"trained with another teacher.*from the model the run started from"):
        other.train(resume_from_checkpoint=True)
    trained = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2", dtype=torch.float32)
    with pytest.raises(ValueError, match="trained with another teacher"):
        make_trainer(tmp_path, trained, teacher="self", max_steps=4).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="trained with a teacher, and there is no teacher now"):
        make_trainer(tmp_path, quantized(), max_steps=4).train(resume_from_checkpoint=True)


def test_a_teacher_that_was_not_there_is_noticed(tmp_path: Path) -> None:
    make_trainer(tmp_path, quantized(), max_steps=2, save_strategy="steps", save_steps=2).train()
    with pytest.raises(ValueError, match="trained with no teacher, and there is a teacher now"):
        make_trainer(tmp_path, quantized(), teacher="self", max_steps=4).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("other", [{"weight": "int4"}, {"granularity": "channel"}, {"activation": "int4"}], ids=str)
def test_another_quantization_is_noticed(other: dict[str, Any], tmp_path: Path) -> None:
    make_trainer(tmp_path, quantized(), max_steps=2, save_strategy="steps", save_steps=2).train()
    words = r"another quantization of 14 layers.* was ternary, absmean scales a tensor, inputs \w+ and is "
    trainer = make_trainer(tmp_path, quantized(**other), max_steps=4)
    before = weights(trainer.model)
    with pytest.raises(ValueError, match=words):
        trainer.train(resume_from_checkpoint=True)
    assert_same(weights(trainer.model), before)  # nothing was loaded


def test_a_run_that_is_over_stays_over(tmp_path: Path) -> None:
    """Stock Trainer makes one more step, with the learning rate of nowhere."""
    run = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    trainer = make_trainer(tmp_path, quantized(), **run)
    trainer.train()
    again = make_trainer(tmp_path, quantized(), **run)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert_same(weights(again.model), weights(trainer.model))


def test_without_a_schedule_more_steps_are_nothing_to_warn_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, quantized(), max_steps=2, **run).train()
    make_trainer(tmp_path, quantized(), max_steps=3, **run).train(resume_from_checkpoint=True)
    assert not [record for record in caplog.records if "schedule" in record.getMessage()]


def test_another_schedule_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, quantized(), quantization_schedule={"end": 2, "layers": "forward"}, **run).train()
    kept = json.loads((tmp_path / "checkpoint-2" / "qat_schedule.json").read_text())
    assert (kept["end"], kept["max_steps"], len(kept["layers"])) == (2, 4, 14)
    shutil.rmtree(tmp_path / "checkpoint-4")
    for schedule, words in (({"end": 2, "layers": "forward"}, []), ({"end": 3, "layers": "backward"}, ["end, layers"])):
        caplog.clear()
        make_trainer(tmp_path, quantized(), quantization_schedule=schedule, max_steps=4).train(resume_from_checkpoint=True)
        said = [record.getMessage() for record in caplog.records if "another quantization schedule" in record.getMessage()]
        assert len(said) == len(words) and all(f"(different: {word})" in line for word, line in zip(words, said, strict=True))


@pytest.mark.parametrize("optimizer", [True, False], ids=["with its state", "weights only"])
def test_other_settings_are_told(optimizer: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3, "save_only_model": not optimizer}
    make_trainer(tmp_path, quantized(), max_steps=2, **run).train()
    kept = json.loads((tmp_path / "checkpoint-2" / "qat_arguments.json").read_text())
    assert (kept["learning_rate"], kept["cautious"], kept["regularizers"]) == (1e-3, False, None)
    make_trainer(tmp_path, quantized(), max_steps=3, **run).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not said(caplog)  # a longer run is as before
    other = {**run, "learning_rate": 2e-3, "cautious": True, "regularizers": {"sparsity": 1e-6}, "save_strategy": "no"}
    trainer = make_trainer(tmp_path, quantized(), max_steps=3, lr_scheduler_type="constant", **other)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    rate = "learning_rate was 0.001 and is 0.002"
    goes_on, *stays = said(caplog)
    assert "cautious was False and is True, " in goes_on and "regularizers was None and is {'sparsity': 1e-06}" in goes_on
    assert goes_on.endswith("; the run goes on with the new ones") and (rate in goes_on) == (not optimizer)
    assert [rate in line and line.endswith("part of the optimizer's state") for line in stays] == [True] * optimizer
    # which is the truth
    assert trainer.optimizer.param_groups[0]["lr"] == (1e-3 if optimizer else 2e-3)


# ---- mixtures of experts ----


def _experts(folder: Path, **fields: Any) -> Any:
    base = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    return make_trainer(folder, quantized("mixtral"), **(base | fields))


def test_experts_and_router_are_resumed(tmp_path: Path) -> None:
    whole = _experts(tmp_path / "whole")
    whole.train()
    with pytest.raises(InterruptedError):
        _experts(tmp_path / "half", callbacks=[_StopAt(3)]).train()
    resumed = _experts(tmp_path / "half")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert_same(weights(resumed.model), weights(whole.model))
    assert any("experts" in name for name in weights(whole.model))


def test_best_experts_are_loaded(tmp_path: Path) -> None:
    worst_last = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = _experts(tmp_path, metric_for_best_model="score", compute_metrics=_falling(), **worst_last)
    seen: list[dict[str, torch.Tensor]] = []

    class Keep(tf.TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(weights(kwargs["model"]))

    trainer.add_callback(Keep())
    trainer.train()
    assert_same(weights(trainer.model), seen[0])
    assert any(not torch.equal(seen[0][name], seen[1][name]) for name in seen[0] if "experts" in name)


def _falling() -> Any:
    scores = iter((1.0, 0.5))
    return lambda _: {"score": next(scores)}


def test_saved_experts_load_with_from_pretrained(tmp_path: Path) -> None:
    """Checkpoints keep the model's own layout, a final save_model the original one; both load."""
    trainer = _experts(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in ("checkpoint-4", "final"):
        loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
        assert_same(weights(loaded), weights(trainer.model))
