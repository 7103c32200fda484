"""Quantization-aware training of a text classifier: fine-tuned in full precision, then ternary with itself as teacher.

    python recipes/qat_classification.py \\
        --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \\
        --train_file ../shared/data/sst2/train.tsv --validation_file ../shared/data/sst2/dev.tsv \\
        --output_dir out/seed1 --seed 1

    # the same start, without a teacher: what the teacher brings
    python recipes/qat_classification.py --fine_tuned out/seed1/full_precision --teacher none \\
        --train_file train.csv --validation_file dev.csv --text_column review --label_column stars --output_dir out/alone

    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/qat_classification.py ...
    # FSDP has to be told which layers of an encoder are its units: accelerate shards BERT's embeddings twice otherwise
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml --fsdp_transformer_layer_cls_to_wrap BertLayer \\
        recipes/qat_classification.py ...

Files are .tsv, .csv (two columns, text and label, without a header; or any columns with one) or folders of
`datasets.Dataset.save_to_disk`. What happens: fine-tune in full precision (unless --fine_tuned has it), accuracy; quantize,
accuracy; train (W1.58A8, see --preset; in the way of the training preset task_encoder), accuracy; save; pack; reload; accuracy
again. out/packed is the model to deploy, out/results.json has every figure. Nothing is chosen by looking at the validation
data: the last weights are those measured.
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_bitnet import (
    TRAINING_PRESETS,
    BitNetQuantizationConfig,
    MeasuredRun,
    QATArguments,
    QATTrainer,
    calibrate,
    command_line_defaults,
    coverage,
    keep_freed_memory,
    quantize_model,
)

# what has nothing to do with how the model learns
_ANY_RUN: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "save_strategy": "no",
    "logging_steps": 50,
}
_PRESET = "task_encoder"
_TEXT_COLUMNS, _LABEL_COLUMNS = ("text", "sentence"), ("label",)
_MAX_LABELS = 1000
_PACKED_AGREEMENT = 0.99
FULL_PRECISION = "full_precision"
# what the fine-tuning has in common with the quantized training
_SHARED = ("seed", "use_cpu", "bf16", "fp16", "disable_tqdm", "logging_steps", "gradient_accumulation_steps")
_SHARED += ("per_device_train_batch_size", "per_device_eval_batch_size")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


@dataclass
class ModelArguments:
    _argument_group_name: ClassVar[str] = "model"
    model_name_or_path: str | None = field(default=None, metadata={"help": "Pretrained encoder: Hub name or folder."})
    fine_tuned: str | None = field(
        default=None, metadata={"help": "Classifier that is fine-tuned already (out/full_precision of another run)."}
    )
    base_name: str | None = field(
        default=None, metadata={"help": "Its name in the results. Default: that of the Hub or folder."}
    )
    full_precision_epochs: float = field(default=3.0, metadata={"help": "Epochs of the fine-tuning in full precision."})
    full_precision_learning_rate: float = field(default=5e-5, metadata={"help": "Its learning rate."})
    teacher: str | None = field(
        default=None,
        metadata={"help": "'self' (the fine-tuned model), 'none', or another classifier. Default: the training preset's."},
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout rates of the model while it is trained quantized."})
    overwrite: bool = field(default=False, metadata={"help": "Replace what an earlier run left in output_dir."})


@dataclass
class DataArguments:
    _argument_group_name: ClassVar[str] = "text"
    train_file: str | None = field(default=None, metadata={"help": ".tsv, .csv or folder of a saved datasets.Dataset."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, to measure on."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the text. Default: text or sentence."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the label. Default: label."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a text; longer ones are cut."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Train on the first so many rows."})
    max_validation_rows: int | None = field(default=None, metadata={"help": "Measure on the first so many rows."})


@dataclass
class QuantizationArguments:
    _argument_group_name: ClassVar[str] = "quantization"
    preset: str = field(
        default="bitnet_b158",
        metadata={"help": "How weights are quantized.", "choices": ["bitnet_b158", "w1a8", "w2a8", "w4a8", "w8a8"]},
    )
    sub_norm: list[str] | None = field(
        default=None, metadata={"help": "Regular expressions of layers that get an RMS norm in front: output.dense"}
    )
    keep: list[str] | None = field(default=None, metadata={"help": "Regular expressions of layers to leave in full precision."})

    def config(self) -> BitNetQuantizationConfig:
        return getattr(BitNetQuantizationConfig, self.preset)(sub_norm=self.sub_norm, keep=self.keep)


# ---- data ----


def read_rows(path: str, text: str | None, label: str | None) -> list[tuple[str, str]]:
    """(text, label) of each row. Raises ValueError that says what the file holds and what to write."""
    where = Path(path)
    if not where.exists():
        raise ValueError(f"there is no file or folder {path!r}")
    if where.is_dir():
        return _dataset_rows(path, text, label)
    if where.suffix not in (".tsv", ".csv"):
        raise ValueError(f"{path!r} is no .tsv, no .csv and no folder of a saved datasets.Dataset")
    # quotes in a .tsv are part of the text
    style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if where.suffix == ".tsv" else {}
    with where.open(encoding="utf-8", newline="") as file:
        rows = [(number, row) for number, row in enumerate(csv.reader(file, **style), start=1) if row]
    if not rows:
        raise ValueError(f"{path!r} is empty")
    first = rows[0][1]
    has_header = text is not None or label is not None or (set(first) & {*_TEXT_COLUMNS} and set(first) & {*_LABEL_COLUMNS})
    if has_header:
        columns, rows = (_column(path, first, text, _TEXT_COLUMNS), _column(path, first, label, _LABEL_COLUMNS)), rows[1:]
    elif len(first) == 2:
        columns = (0, 1)
    else:
        raise ValueError(
            f"{path!r} has {len(first)} columns ({', '.join(first)[:80]}); name two of its header: --text_column ... "
            "--label_column ..."
        )
    for number, row in rows:
        if len(row) != len(first):
            raise ValueError(f"line {number} of {path!r} has {len(row)} columns, the first has {len(first)}")
    return [(row[columns[0]], row[columns[1]].strip()) for _, row in rows]


def _column(path: str, names: list[str], wanted: str | None, usual: tuple[str, ...]) -> int:
    found = next((name for name in ((wanted,) if wanted else usual) if name in names), None)
    if found is None:
        what = f"--{'text' if usual is _TEXT_COLUMNS else 'label'}_column"
        missing = repr(wanted) if wanted else " or ".join(map(repr, usual))
        raise ValueError(f"{path!r} has no column {missing}; its columns: {', '.join(names)[:200]}. Name one: {what} ...")
    return names.index(found)


def _dataset_rows(path: str, text: str | None, label: str | None) -> list[tuple[str, str]]:
    try:
        found: Any = datasets.load_from_disk(path)
    except FileNotFoundError as error:
        raise ValueError(f"the folder {path!r} holds no saved datasets.Dataset") from error
    if isinstance(found, dict):  # a DatasetDict
        raise ValueError(f"{path!r} holds the splits {', '.join(found)}; give one of them: {path}/{next(iter(found))}")
    names = found.column_names
    one, two = names[_column(path, names, text, _TEXT_COLUMNS)], names[_column(path, names, label, _LABEL_COLUMNS)]
    return [(row[one], str(row[two])) for row in found]


def label_names(rows: list[tuple[str, str]], path: str) -> list[str]:
    """The labels of a training file, numbers in their order. Raises ValueError when these can be no labels."""
    found = {label for _, label in rows}
    if not 2 <= len(found) <= min(_MAX_LABELS, max(2, len(rows) // 2)):
        raise ValueError(
            f"the label column of {path!r} has {len(found)} different values in {len(rows)} rows (such as "
            f"{sorted(found)[:3]}); a classifier needs some rows of at least 2. Is it the right one? --label_column ..."
        )
    return sorted(found, key=(lambda label: (int(label), label)) if all(map(_is_whole, found)) else None)


def _is_whole(label: str) -> bool:
    return label.removeprefix("-").isdecimal()


def encode(rows: list[tuple[str, str]], names: list[str], path: str, tokenizer: Any, length: int) -> list[dict[str, Any]]:
    """Tokens and label numbers. Raises ValueError on a label that the training file has not."""
    for number, (_, label) in enumerate(rows, start=1):
        if label not in names:
            raise ValueError(
                f"row {number} of {path!r} has the label {label!r}; those of the training file: {', '.join(names)}"
            )
    encoded = tokenizer([text for text, _ in rows], truncation=True, max_length=length)
    columns = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
    return [{**tokens, "labels": names.index(label)} for tokens, (_, label) in zip(columns, rows, strict=True)]


# ---- the run ----


class Classification:
    """What the steps of one run share: the rows, the figures and how a Trainer is made."""

    def __init__(self, run: MeasuredRun, tokenizer: Any, train: list[Any], valid: list[Any]) -> None:
        self.run, self.tokenizer, self.train, self.valid = run, tokenizer, train, valid
        self.collator = DataCollatorWithPadding(tokenizer)

    def measure(self, step: str, model: Any) -> Tensor:
        """Accuracy on the validation rows: the share of labels that the model finds. Returns what it finds."""
        args = self.run.args
        loader = DataLoader(self.valid, args.per_device_eval_batch_size, collate_fn=self.collator)  # type: ignore[arg-type]
        model.to(args.device).eval()
        found, right = [], []
        with self.run.timed("evaluate"), torch.no_grad():
            for batch in loader:  # every process measures all rows
                right.append(batch.pop("labels"))
                found.append(model(**batch.to(args.device)).logits.argmax(-1).cpu())
        predicted = torch.cat(found)
        self.run.note(step, float((predicted == torch.cat(right)).float().mean()))
        return predicted

    def fine_tune(self, model: Any, epochs: float, learning_rate: float) -> None:
        """In full precision, with a stock Trainer; saves the model."""
        settings = {name: getattr(self.run.args, name) for name in _SHARED}
        settings |= {"num_train_epochs": epochs, "learning_rate": learning_rate, "warmup_steps": 0.1}
        out = str(self.run.folder / FULL_PRECISION)
        args = TrainingArguments(output_dir=out, save_strategy="no", report_to="none", **settings)
        with self.run.timed("fine_tune"):
            trainer = Trainer(model=model, args=args, **self._rows())
            trainer.train()
        self.run.save(trainer, FULL_PRECISION)

    def quantize(self, model: Any, config: BitNetQuantizationConfig) -> None:
        quantize_model(model, config)
        if config.sub_norm:
            calibrate(model, [self.collator(self.train[:64])])
        self.run.say(str(coverage(model)))

    def train_and_pack(self, model: Any, teacher: str | None) -> tuple[QATTrainer, Any]:
        """Raises RuntimeError when the packed model, reloaded, is not what was trained."""
        trainer = QATTrainer(model=model, args=self.run.args, teacher=teacher, **self._rows())
        self.run.train(trainer)
        trained = self.measure("trained", self.run.trained_model(trainer))
        self.run.save(trainer)
        packed = self.run.pack(AutoModelForSequenceClassification, trainer)
        same = float((self.measure("packed", packed) == trained).float().mean())
        if same < _PACKED_AGREEMENT:  # only rounding may differ
            raise RuntimeError(
                f"the packed model agrees with the trained one on {same:.1%} of the rows only; please report this"
            )
        return trainer, packed

    def _rows(self) -> dict[str, Any]:
        return {"train_dataset": self.train, "data_collator": self.collator, "processing_class": self.tokenizer}


def read(data: DataArguments, tokenizer: Any) -> tuple[list[Any], list[Any], list[str]]:
    if data.train_file is None or data.validation_file is None:
        raise ValueError(
            "which rows? Give --train_file and --validation_file: .tsv, .csv or a folder of a saved datasets.Dataset"
        )
    train = read_rows(data.train_file, data.text_column, data.label_column)
    valid = read_rows(data.validation_file, data.text_column, data.label_column)[: data.max_validation_rows]
    names = label_names(train, data.train_file)
    train = train[: data.max_train_rows]
    pairs = ((train, data.train_file), (valid, data.validation_file))
    encoded = [encode(rows, names, path, tokenizer, data.max_length) for rows, path in pairs]
    return encoded[0], encoded[1], names


def full_precision(job: Classification, models: ModelArguments, names: list[str]) -> Any:
    """The fine-tuned classifier with float32 weights; it is made here unless --fine_tuned or a stopped run has it.

    Its dropout rates are those of the quantized training.
    """
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}
    load = partial(AutoModelForSequenceClassification.from_pretrained, dtype=torch.float32, **labels)
    if models.fine_tuned is not None:
        return load(models.fine_tuned, **dropout_rates(models.fine_tuned, models.dropout))
    own = job.run.folder / FULL_PRECISION
    if not (job.run.resumes and own.exists()):
        # the head of an encoder that knew other labels is made anew
        fresh = load(models.model_name_or_path, ignore_mismatched_sizes=True)
        job.fine_tune(fresh, models.full_precision_epochs, models.full_precision_learning_rate)
    # what is saved: what was trained may be in shards
    return load(own, **dropout_rates(own, models.dropout))


def dropout_rates(path: str | Path, rate: float) -> dict[str, float]:
    """Every number of the configuration that is named dropout or pdrop, as `rate`. Raises ValueError when it is no rate."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"--dropout {rate:g} is no rate; legal: 0 (none) up to, not including, 1")
    fields = AutoConfig.from_pretrained(path).to_dict()
    rates = [name for name, value in fields.items() if isinstance(value, float | int) and not isinstance(value, bool)]
    return {name: rate for name in rates if "dropout" in name or "pdrop" in name}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    groups = (ModelArguments, DataArguments, QuantizationArguments, QATArguments)
    usage = "qat_classification.py --model_name_or_path MODEL --train_file T --validation_file V --output_dir FOLDER [options]"
    parser = HfArgumentParser(groups, usage=usage, description=__doc__, formatter_class=HelpFormatter)  # type: ignore[arg-type]
    named = command_line_defaults(argv)
    chosen = named if "training_preset" in named else TRAINING_PRESETS.get(_PRESET).training()
    parser.set_defaults(**{**chosen, **_ANY_RUN})
    models, data, quantization, training = parser.parse_args_into_dataclasses(args=argv)
    base = models.fine_tuned or models.model_name_or_path
    if base is None:
        raise ValueError("which model? Give --model_name_or_path (to be fine-tuned) or --fine_tuned")
    config = quantization.config()
    teacher = models.teacher or TRAINING_PRESETS.get(training.training_preset).teacher or "none"
    if teacher == "none":
        words = sys.argv[1:] if argv is None else argv
        if training.distillation is not None and any(word.startswith("--distillation") for word in words):
            raise ValueError("--distillation learns from a teacher, and --teacher none has none; leave one of them out")
        training.distillation = None
    folder = Path(training.output_dir).resolve()
    if models.fine_tuned is not None and folder in Path(models.fine_tuned).resolve().parents:
        raise ValueError(
            f"--fine_tuned {models.fine_tuned} lies in the folder of this run, {training.output_dir!r}; choose another "
            "--output_dir"
        )
    run = MeasuredRun(training, overwrite=models.overwrite, metric="accuracy", also=(FULL_PRECISION,))
    set_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    train, valid, names = read(data, tokenizer)
    run.clear()
    job = Classification(run, tokenizer, train, valid)
    model = full_precision(job, models, names)
    job.measure("full_precision", model)
    job.quantize(model, config)
    job.measure("before_training", model)
    trainer, packed = job.train_and_pack(model, None if teacher == "none" else teacher)
    rows = {
        "train": Path(str(data.train_file)).name,
        "train_rows": len(train),
        "validation": Path(str(data.validation_file)).name,
        "validation_rows": len(valid),
    }
    fine_tuning = {
        "from": "fine_tuned" if models.fine_tuned else "model_name_or_path",
        "epochs": None if models.fine_tuned else models.full_precision_epochs,
        "learning_rate": None if models.fine_tuned else models.full_precision_learning_rate,
    }
    more = {"recipe": "qat_classification", "fine_tuning": fine_tuning}
    # these also where they are the defaults
    settings = {name: getattr(training, name) for name in ("training_preset", "num_train_epochs", "max_steps")}
    settings |= {"teacher": Path(teacher).name, "dropout": models.dropout}
    return run.finish(trainer, packed, config, base_model=models.base_name or base, data=rows, training=settings, **more)


if __name__ == "__main__":
    keep_freed_memory()  # on a CPU a fifth less time
    main()
