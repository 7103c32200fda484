"""What a trainer puts on the Hub: the card of the run, and checkpoints that another machine goes on from. All through the
unmodified client and Trainer's own pushing."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from transformers import TrainerCallback

import hf_bitnet as hb
from hf_bitnet.reports import Line, line_chart
from hf_bitnet.training.curve import CURVE, training_curve, write_curve
from tests.hub_metadata import metadata_errors
from tests.hub_server import LoopbackHub
from tests.qat import ONE_LAYER, assert_same, make_trainer, quantized, weights

REPO = "org/run"
PUSHES: dict[str, Any] = {"push_to_hub": True, "hub_model_id": REPO, "hub_always_push": True}


class Waits(TrainerCallback):
    """Trainer pushes beside the training, which here would be over first."""

    trainer: Any = None

    def on_save(self, *unused: Any, **named: Any) -> None:
        self.trainer._finish_current_push()


def run(folder: Path, **fields: Any) -> hb.QATTrainer:
    model: Any = quantized(model=ONE_LAYER)
    trainer = make_trainer(folder, model, **(PUSHES | fields))
    waits = Waits()
    waits.trainer = trainer
    trainer.add_callback(waits)
    return trainer


def card_of(hub: LoopbackHub) -> ModelCard:
    text = hub.files(REPO)["README.md"].decode()
    assert not metadata_errors(text)
    return ModelCard(text)


def test_every_save_pushes_model_and_card(hub: LoopbackHub, tmp_path: Path) -> None:
    trainer = run(
        tmp_path,
        hub_strategy="every_save",
        hub_private_repo=True,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        warmup_steps=1,
    )
    trainer.model.config._name_or_path = "org/base"  # as of a model from there
    trainer.train()
    files = hub.files(REPO)
    assert hub.commits(REPO) == ["Training in progress, step 2", "Training in progress, step 4"]
    assert hub.repositories[REPO].private
    assert not any("checkpoint" in name for name in files)
    card = card_of(hub)
    assert {"hf_bitnet", "bitnet", "quantized", "ternary"} <= set(card.data.tags)
    assert (card.data.base_model, card.data.base_model_relation) == ("org/base", "quantized")
    assert "# run\n\n`org/base` with ternary weights" in card.text
    assert str(hb.coverage(trainer.model)) in card.text
    assert "| step | 4 |" in card.text and "| learning_rate | 0.001 |" in card.text and "| warmup_steps | 1 |" in card.text
    assert f"]({CURVE})" in card.text
    ElementTree.fromstring(files[CURVE])
    logged = next(log["eval_loss"] for log in reversed(trainer.state.log_history) if "eval_loss" in log)
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.task_type) == ("loss", logged, "text-generation")
    loaded = type(trainer.model).from_pretrained(REPO)
    assert_same(weights(loaded), weights(trainer.model))


def test_end_pushes_once(hub: LoopbackHub, tmp_path: Path) -> None:
    trainer = run(tmp_path, hub_strategy="end", save_strategy="steps", save_steps=2)
    trainer.train()
    assert hub.commits(REPO) == []
    pushed = trainer.push_to_hub(license="mit", tags="mine", dataset="wikitext", dataset_tags="org/wikitext", language="en")
    assert hub.commits(REPO) == ["End of training"] and pushed.oid
    data = card_of(hub).data
    assert (data.license, data.language, data.datasets) == ("mit", "en", ["org/wikitext"])
    assert "mine" in data.tags and data.base_model is None
    assert "A model with ternary weights" in card_of(hub).text


def test_run_goes_on_from_the_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    """Bit for bit as if it had not stopped; on a machine that has nothing but the id."""
    schedule = hb.QuantizationSchedule(ramp="linear", end=4)
    fields = {"quantization_schedule": schedule, "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = run(tmp_path / "whole", **(fields | {"push_to_hub": False}))
    whole.train()
    stopped = run(tmp_path / "stopped", hub_strategy="checkpoint", **fields)
    stopped.train()
    # the state at step 3, which the last push has replaced
    first = next(commit for commit in hub.repositories[REPO].branches["main"] if "checkpoint" in commit.title)
    assert "last-checkpoint/optimizer.pt" in first.files
    resumed = run(tmp_path / "resumed", **(fields | {"push_to_hub": False}))
    resumed.train(resume_from_checkpoint=hb.hub_checkpoint(REPO, revision=first.oid))
    assert resumed.state.global_step == 6
    assert_same(weights(resumed.model), weights(whole.model))
    folder = Path(hb.hub_checkpoint(REPO))
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 6


def test_checkpoint_of_two_steps_is_noticed(hub: LoopbackHub, tmp_path: Path) -> None:
    trainer = run(tmp_path, hub_strategy="all_checkpoints", save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    folder = Path(hb.hub_checkpoint(REPO, checkpoint="checkpoint-2"))
    listed = json.loads((folder / "hf_bitnet_files.json").read_text())
    assert listed["optimizer.pt"] == hashlib.sha256((folder / "optimizer.pt").read_bytes()).hexdigest()
    with pytest.raises(
        ValueError, match=r"holds no checkpoint in 'last-checkpoint'; a trainer pushes one with push_to_hub=True"
    ):
        hb.hub_checkpoint(REPO)
    later = [CommitOperationAdd("checkpoint-2/scheduler.pt", b"of a later step")]
    HfApi().create_commit(REPO, later, commit_message="cut short")
    with pytest.raises(ValueError, match=r"scheduler\.pt of org/run is not of the same step .* Take an earlier commit"):
        hb.hub_checkpoint(REPO, checkpoint="checkpoint-2")
    HfApi().upload_file(path_or_fileobj=b"{", path_in_repo="checkpoint-2/hf_bitnet_files.json", repo_id=REPO)
    with pytest.raises(
        ValueError, match=r"hf_bitnet_files\.json is damaged or incomplete .*; take an earlier commit of org/run"
    ):
        hb.hub_checkpoint(REPO, checkpoint="checkpoint-2")
    # what another trainer pushed has no list, and is taken as it is
    HfApi().delete_file("checkpoint-2/hf_bitnet_files.json", REPO)
    assert Path(hb.hub_checkpoint(REPO, checkpoint="checkpoint-2")).is_dir()


def test_card_of_adapters_takes_what_the_other_trainer_takes(tmp_path: Path) -> None:
    import peft

    model = peft.get_peft_model(quantized(model=ONE_LAYER), peft.LoraConfig(target_modules=["q_proj"]))
    trainer = make_trainer(tmp_path, model)
    trainer.train()
    trainer.create_model_card(dataset_name="org/data")  # TRL's word, which Trainer does not take
    assert "on the org/data dataset" in (tmp_path / "README.md").read_text()
    data = {"dataset_tags": "org/data", "dataset_args": "small", "tasks": "text-generation"}
    trainer.create_model_card(dataset="stories", model_name="mine", **data)
    card = ModelCard.load(tmp_path / "README.md")
    assert "on the stories dataset" in card.text and card.data.datasets == ["org/data"]


def test_curve(tmp_path: Path) -> None:
    history = [{"loss": 4.0 - 0.1 * step, "step": step} for step in range(1, 11)]
    assert training_curve(history[:1]) is None and training_curve([{"eval_loss": 1.0, "step": 1}]) is None
    drawn = training_curve([*history, {"eval_loss": 3.5, "step": 5}, {"eval_loss": 3.25, "step": 10}])
    assert drawn is not None
    ElementTree.fromstring(drawn)
    assert "step 10: training loss 3, evaluation loss 3.25" in drawn
    curves = re.findall(r'<polyline class="([a-z ]+)" points="([^"]+)"><title>', drawn)
    assert [kind for kind, _ in curves] == ["curve", "curve other"]
    xs, ys = zip(*(map(float, point.split(",")) for point in curves[0][1].split()), strict=True)
    assert list(xs) == sorted(xs) and list(ys) == sorted(ys)  # a lower loss is drawn lower: y grows downwards
    broken = training_curve([{"loss": value, "step": i} for i, value in enumerate([3.0, 2.0, float("nan"), 1.0, 2.0])])
    assert broken is not None and broken.count("<title>training loss</title>") == 2
    with pytest.raises(ValueError, match=r"has 2 colours, got 3 lines; draw two charts"):
        line_chart("x", "y", [Line("one", [(0, 1)])] * 3, "step")
    assert write_curve(tmp_path, [{"loss": float("nan"), "step": i} for i in range(3)]) is None and not any(tmp_path.iterdir())
    long = training_curve([{"loss": 1.0 + i % 2, "step": i} for i in range(5000)])
    assert long is not None and len(long) < 20_000
