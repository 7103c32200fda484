"""QATTrainer on what users have: streams, classifiers with `evaluate`, images, generated text, trainers of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor

from hf_bitnet import QATArguments, QATMixin, QATSeq2SeqArguments, QATSeq2SeqTrainer, QuantizationSchedule
from tests.qat import arguments, assert_learned, assert_same, examples, losses, make_trainer, quantized, weights

RISING: dict[str, Any] = {"quantization_schedule": {"ramp": "linear", "end": 0.5}, "learning_rate": 3e-3}


# ---- data that is streamed ----


def _rows() -> Iterator[dict[str, list[int]]]:
    """Few tokens, so that a few steps learn something."""
    for example in examples(number=64):
        ids = (example["input_ids"] % 4).tolist()
        yield {"input_ids": ids, "labels": ids}


def _stream() -> datasets.IterableDataset:
    return datasets.IterableDataset.from_generator(_rows).shuffle(seed=1, buffer_size=8)


def test_stream_resumes_exactly(tmp_path: Path) -> None:
    run = {"train_dataset": _stream(), "max_steps": 6, "save_strategy": "steps", "save_steps": 3, **RISING}
    whole = make_trainer(tmp_path, quantized(), **run)
    whole.train()
    assert_learned(whole, tmp_path / "saved")
    again = make_trainer(tmp_path, quantized(seed=5), **run | {"train_dataset": _stream()})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(weights(whole.model), weights(again.model))
    assert [each["loss"] for each in losses(again)] == [each["loss"] for each in losses(whole)]


# ---- classifiers ----


class _Accuracy(evaluate.Metric):
    """As the Hub's "accuracy", which cannot be loaded without a network."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="share of equal labels", citation="", inputs_description="", features=features)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_classifier_with_evaluate(name: str, tmp_path: Path) -> None:
    metric = _Accuracy(cache_dir=str(tmp_path / "cache"))

    def compute_metrics(prediction: tf.EvalPrediction) -> dict[str, float]:
        found = metric.compute(predictions=np.argmax(prediction.predictions, axis=-1), references=prediction.label_ids)
        assert found is not None
        return found

    data = examples("bert") if name == "bert" else _images()
    trainer = make_trainer(
        tmp_path,
        quantized(name),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=compute_metrics,
        max_steps=15,
        eval_strategy="steps",
        eval_steps=5,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        **RISING,
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    measured = [log["eval_accuracy"] for log in trainer.state.log_history if "eval_accuracy" in log]
    assert len(measured) == 3 and measured[-1] > before
    assert_learned(trainer, tmp_path / "saved")


def _images() -> list[dict[str, Tensor]]:
    """Each class is a brightness."""
    made = []
    for index in range(32):
        pixels = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index))
        made.append({"pixel_values": pixels + index % 5, "labels": torch.tensor(index % 5)})
    return made


# ---- generated text ----


def test_seq2seq_generates_with_the_quantized_model(tmp_path: Path) -> None:
    lengths, strengths = [], []

    def compute_metrics(prediction: tf.EvalPrediction) -> dict[str, float]:
        generated = np.asarray(prediction.predictions)  # padded with 0 to the length of the model's own generation_config
        lengths.append(int((generated != 0).any(axis=0).sum()) + 1)  # it begins with a 0
        strengths.append(float(model.encoder.block[0].layer[0].SelfAttention.q.strength))
        return {"exact": float(np.mean(generated[:, 1:4] == np.asarray(prediction.label_ids)[:, :3]))}

    model = quantized("t5")
    own = {"predict_with_generate": True, "generation_max_length": 5, "eval_strategy": "steps", "eval_steps": 3}
    trainer = QATSeq2SeqTrainer(
        model=model,
        args=QATSeq2SeqArguments(**_fields(tmp_path, max_steps=9, **RISING, **own)),
        train_dataset=[{**each, "labels": torch.full((7,), 9)} for each in examples("t5")],
        eval_dataset=[{**each, "labels": torch.full((7,), 9)} for each in examples("t5", 8)],
        compute_metrics=compute_metrics,
        teacher="self",
    )
    trainer.train()
    assert_learned(trainer, tmp_path / "saved")
    assert lengths == [5, 5, 5] and strengths == [1.0, 1.0, 1.0]
    assert trainer.evaluate(max_length=4)["eval_exact"] == 1.0 and lengths[-1] == 4
    assert any("distill/kl" in log for log in losses(trainer))


def _fields(folder: Path, **fields: Any) -> dict[str, Any]:
    """What `arguments` gives, as fields of another class."""
    made = arguments(folder)
    base = ("output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "logging_steps", "save_strategy")
    rest = {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "report_to": "none"}
    return {key: getattr(made, key) for key in base} | rest | fields


def test_seq2seq_arguments_come_from_a_command_line(tmp_path: Path) -> None:
    line = ["--output_dir", str(tmp_path), "--predict_with_generate", "--quantization_schedule", "cosine", "--use_cpu"]
    (read,) = tf.HfArgumentParser(QATSeq2SeqArguments).parse_args_into_dataclasses(line)  # type: ignore[arg-type]
    assert read.predict_with_generate and read.quantization_schedule == QuantizationSchedule("cosine")
    assert read.to_dict()["generation_max_length"] is None


# ---- a trainer of one's own ----


@dataclass
class _Config(tf.TrainingArguments):
    learning_rate: float = 7e-3
    factor: float = 1.0


@dataclass
class _QATConfig(_Config, QATArguments):
    pass


class _Scaled(tf.Trainer):
    """A trainer with a loss and arguments of its own, whose loss is a mean over each micro-batch."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        outputs = model(**inputs)
        loss = outputs.loss * self.args.factor  # type: ignore[attr-defined]
        return (loss, outputs) if return_outputs else loss


class _QATScaled(QATMixin, _Scaled):
    arguments_class = _QATConfig


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_mixin_keeps_loss_and_defaults_of_another_trainer(name: str, tmp_path: Path) -> None:
    runs = []
    for kind, config, args in ((_Scaled, _Config, {}), (_QATScaled, _QATConfig, {"quant_logging": False})):
        fields = _fields(tmp_path, max_steps=3, gradient_accumulation_steps=2, factor=0.5, **args)
        made = config(**fields)
        assert made.learning_rate == 7e-3
        trainer = kind(model=quantized(name), args=made, train_dataset=examples(name))
        trainer.train()
        runs.append((trainer, [each["loss"] for each in losses(trainer)]))
    assert runs[0][1] == runs[1][1]
    assert_same(weights(runs[0][0].model), weights(runs[1][0].model))


def test_mixin_refuses_other_arguments(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"_QATScaled takes _QATConfig, got QATArguments.*args=_QATConfig\(output_dir='out'"):
        _QATScaled(model=quantized(), args=arguments(tmp_path))
    with pytest.raises(TypeError, match=r"takes QATSeq2SeqArguments, .* all fields of Seq2SeqTrainingArguments"):
        QATSeq2SeqTrainer(model=quantized("t5"), args=arguments(tmp_path))
