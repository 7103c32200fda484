"""Distillation from disk: what a teacher says is computed once, then a model is trained to 1.58 bit without it in memory.

    # both steps in one process
    python recipes/distill_offline.py \\
        --model_name_or_path ../shared/models/novels-llama-small --teacher ../shared/models/novels-llama-small \\
        --train_file ../shared/data/novels/train.txt --validation_file ../shared/data/novels/valid.txt \\
        --learning_rate 2e-3 --max_train_windows 4000 --output_dir out

    # the teacher on one large GPU, the training later, on other ones, as often as you like
    accelerate launch --config_file recipes/accelerate/single_gpu.yaml recipes/distill_offline.py --step cache \\
        --model_name_or_path org/small --teacher org/large --train_file ... --validation_file ... --output_dir out
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/distill_offline.py --step train \\
        --model_name_or_path org/small --train_file ... --validation_file ... --output_dir out

The k likeliest tokens at each position are kept, and the probability of all others together: 6k + 2 bytes a token (4k + 2 for
vocabularies up to 65,536). A teacher must have the tokenizer of the student. An interrupted cache continues where it stopped.
out/teacher is the cache, out/packed the model to deploy, out/results.json has every figure.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed

from hf_bitnet import (
    BitNetQuantizationConfig,
    DistillationConfig,
    MeasuredRun,
    QATArguments,
    QATTrainer,
    cache_teacher_logits,
    command_line_defaults,
    coverage,
    keep_freed_memory,
    quantize_model,
    read_windows,
)

STEPS = ("all", "cache", "train")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


@dataclass
class ModelArguments:
    _argument_group_name: ClassVar[str] = "model"
    model_name_or_path: str = field(metadata={"help": "Full-precision model to be quantized: Hub name or folder."})
    teacher: str | None = field(
        default=None, metadata={"help": "Model to learn from, with the same tokenizer. Default: the model itself."}
    )
    step: str = field(default="all", metadata={"help": "What to do: the cache, the training, or both.", "choices": list(STEPS)})
    cache: str | None = field(default=None, metadata={"help": "Folder of the cache. Default: output_dir/teacher."})
    k: int = field(default=64, metadata={"help": "Tokens kept at each position."})
    cache_batch_size: int = field(default=8, metadata={"help": "Windows in a forward of the teacher."})
    teacher_dtype: str = field(
        default="auto", metadata={"help": "Of its weights.", "choices": ["auto", "float32", "bfloat16", "float16"]}
    )
    preset: str = field(
        default="bitnet_b158",
        metadata={"help": "How weights are quantized.", "choices": ["bitnet_b158", "w1a8", "w2a8", "w4a8", "w8a8"]},
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an earlier run's results; the cache stays."})


@dataclass
class DataArguments:
    _argument_group_name: ClassVar[str] = "text"
    train_file: list[str] = field(metadata={"help": "UTF-8 text file(s) to train on."})
    validation_file: list[str] = field(metadata={"help": "UTF-8 text file(s) to measure on."})
    block_size: int = field(default=256, metadata={"help": "Tokens in a window."})
    max_train_windows: int | None = field(default=None, metadata={"help": "Train on the first so many windows."})
    max_validation_windows: int | None = field(default=None, metadata={"help": "Measure on so many windows; default all."})


def make_cache(models: ModelArguments, training: QATArguments, windows: Tensor, folder: Path) -> None:
    """Writes the teacher's outputs. Raises ValueError in a run of several processes, which would all write."""
    if training.world_size > 1:
        raise ValueError("the cache is written by one process; run --step cache with one, and then --step train with many")
    name = models.teacher or models.model_name_or_path
    teacher: Any = AutoModelForCausalLM.from_pretrained(name, dtype=models.teacher_dtype)
    teacher.to(training.device)
    rows = windows.tolist()
    texts = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
    temperature = distillation(training).temperature
    progress = not training.disable_tqdm
    options: dict[str, Any] = {"k": models.k, "temperature": temperature, "batch_size": models.cache_batch_size}
    cache_teacher_logits(teacher, texts, path=folder, progress=progress, **options)


def distillation(training: QATArguments) -> DistillationConfig:
    return training.distillation if isinstance(training.distillation, DistillationConfig) else DistillationConfig()


def train(models: ModelArguments, data: DataArguments, run: MeasuredRun, tokenizer: Any, cached: Any) -> dict[str, Any]:
    """Trains on the cache, packs, measures; what results.json holds."""
    valid, valid_text = read_windows(tokenizer, data.validation_file, length=data.block_size)
    valid = valid[: data.max_validation_windows]
    # float32 weights: in 16 bits most small steps of training would be lost in rounding
    model: Any = AutoModelForCausalLM.from_pretrained(models.model_name_or_path, dtype=torch.float32)
    model.to(run.args.device)
    run.measure("full_precision", model, valid)
    run.clear()
    config = getattr(BitNetQuantizationConfig, models.preset)()
    quantize_model(model, config)
    run.say(str(coverage(model)))
    run.measure("before_training", model, valid)
    trainer = QATTrainer(model=model, args=run.args, train_dataset=cached, processing_class=tokenizer, teacher="cached")
    run.train(trainer)
    packed = run.pack_measured(AutoModelForCausalLM, trainer, valid)
    texts = {
        "train": ", ".join(Path(file).name for file in data.train_file),
        "train_windows": len(cached),
        "validation": valid_text,
        "validation_windows": len(valid),
        "window_tokens": data.block_size,
    }
    teacher = Path(models.teacher or models.model_name_or_path).name
    return run.finish(
        trainer,
        packed,
        config,
        base_model=models.model_name_or_path,
        data=texts,
        training={"teacher": f"cached: {teacher}", "k": models.k},
        recipe="distill_offline",
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    usage = "distill_offline.py --model_name_or_path MODEL --train_file F --validation_file F --output_dir FOLDER [options]"
    groups = (ModelArguments, DataArguments, QATArguments)
    parser = HfArgumentParser(groups, usage=usage, description=__doc__, formatter_class=HelpFormatter)  # type: ignore[arg-type]
    parser.set_defaults(**command_line_defaults(argv))
    models, data, training = parser.parse_args_into_dataclasses(args=argv)
    cache = Path(models.cache or Path(training.output_dir) / "teacher")
    if models.step == "train" and not cache.exists():
        raise ValueError(f"there is no cache {str(cache)!r}; make it first: --step cache, or name another one: --cache FOLDER")
    run = None if models.step == "cache" else MeasuredRun(training, overwrite=models.overwrite)
    set_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(models.model_name_or_path)
    start = time.perf_counter()
    if models.step != "train":
        windows, _ = read_windows(tokenizer, data.train_file, length=data.block_size)
        make_cache(models, training, windows[: data.max_train_windows], cache)
    if run is None:
        return {"recipe": "distill_offline", "cache": str(cache), "seconds": round(time.perf_counter() - start, 1)}
    return train(models, data, run, tokenizer, datasets.load_from_disk(str(cache)))


if __name__ == "__main__":
    keep_freed_memory()  # on a CPU a fifth less time
    main()
