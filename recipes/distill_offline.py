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
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed

from hf_bitnet import (
    BitNetQuantizationConfig,
    DistillationConfig,
    QATArguments,
    QATTrainer,
    cache_teacher_logits,
    command_line_defaults,
    coverage,
    pack_model,
    perplexity,
    quantize_model,
    text_windows,
)

STEPS = ("all", "cache", "train")
_LEFT = ("results.json", "train", "packed")
# of the reloaded packed model to the trained one: the same codes, summed in another order
_AGREEMENT = 1e-3


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


def windows_of(tokenizer: Any, files: list[str], length: int, most: int | None) -> Tensor:
    return text_windows(tokenizer, [Path(file) for file in files], length, max_windows=most)


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


def check(models: ModelArguments, training: QATArguments, cache: Path) -> Path:
    """The folder of the run. Raises ValueError on what an earlier run left, and on a cache that is not there."""
    folder = Path(str(training.output_dir))
    if models.step == "train" and not cache.exists():
        raise ValueError(f"there is no cache {str(cache)!r}; make it first: --step cache, or name another one: --cache FOLDER")
    left = [name for name in _LEFT if (folder / name).exists()] if models.step != "cache" else []
    if left and not models.overwrite:
        raise ValueError(
            f"{str(folder)!r} holds {', '.join(left)} of an earlier run; choose another --output_dir, or replace it "
            "(--overwrite)"
        )
    if training.process_index == 0:
        for name in left:
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    return folder


class Measured:
    """Perplexities of the run, told as they are found."""

    def __init__(self, training: QATArguments, windows: Tensor) -> None:
        self.training, self.windows = training, windows
        self.perplexity: dict[str, float] = {}

    def add(self, step: str, model: Any) -> None:
        model.to(self.training.device)
        value = perplexity(model, self.windows, self.training.per_device_eval_batch_size, progress=False)
        self.perplexity[step] = value
        if self.training.process_index == 0:
            print(f"{step + ':':<16} perplexity {value:.2f}", flush=True)

    def check_packed(self) -> None:
        packed, trained = self.perplexity["packed"], self.perplexity["trained"]
        if not abs(packed - trained) <= _AGREEMENT * trained:
            raise RuntimeError(
                f"the packed model, reloaded, differs from the trained one: {self.perplexity}; please report this"
            )


def train(model: Any, tokenizer: Any, training: QATArguments, cached: Any, folder: Path) -> Any:
    trainer = QATTrainer(model=model, args=training, train_dataset=cached, processing_class=tokenizer, teacher="cached")
    resume = str(training.resume_from_checkpoint or "false")
    trainer.train(resume_from_checkpoint={"true": True, "false": None}.get(resume.lower(), resume))
    trainer.save_model(str(folder / "train"))
    trainer.accelerator.wait_for_everyone()
    return trainer


def pack(folder: Path, tokenizer: Any, training: QATArguments) -> Any:
    if training.process_index == 0:
        pack_model(AutoModelForCausalLM.from_pretrained(folder / "train")).save_pretrained(folder / "packed")
        tokenizer.save_pretrained(folder / "packed")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return AutoModelForCausalLM.from_pretrained(folder / "packed")


def results_of(models: ModelArguments, data: DataArguments, trainer: Any, cached: Any, measured: Measured) -> dict[str, Any]:
    saved = trainer.args.to_dict()
    names = (
        "training_preset",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "weight_decay",
        "num_train_epochs",
        "seed",
    )
    base, teacher = (Path(str(name)).name for name in (models.model_name_or_path, models.teacher or models.model_name_or_path))
    return {
        "recipe": "distill_offline",
        "base_model": base,
        "data": {
            "train": ", ".join(Path(file).name for file in data.train_file),
            "train_windows": len(cached),
            "validation": ", ".join(Path(file).name for file in data.validation_file),
            "window_tokens": data.block_size,
        },
        "quantization": {key: value for key, value in trainer.model.config.quantization_config.fields().items() if value},
        "training": {
            "steps": trainer.state.global_step,
            "teacher": f"cached: {teacher}",
            "k": models.k,
            **{name: saved[name] for name in names},
            "distillation": asdict(trainer.distillation),
        },
        "perplexity": measured.perplexity,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "accelerate", "datasets")},
        "history": trainer.state.log_history,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    usage = "distill_offline.py --model_name_or_path MODEL --train_file F --validation_file F --output_dir FOLDER [options]"
    groups = (ModelArguments, DataArguments, QATArguments)
    parser = HfArgumentParser(groups, usage=usage, description=__doc__, formatter_class=HelpFormatter)  # type: ignore[arg-type]
    parser.set_defaults(**command_line_defaults(argv))
    models, data, training = parser.parse_args_into_dataclasses(args=argv)
    cache = Path(models.cache or Path(str(training.output_dir)) / "teacher")
    folder = check(models, training, cache)
    set_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(models.model_name_or_path)
    if models.step != "train":
        start = time.perf_counter()
        make_cache(models, training, windows_of(tokenizer, data.train_file, data.block_size, data.max_train_windows), cache)
        if models.step == "cache":
            return {"recipe": "distill_offline", "cache": str(cache), "seconds": round(time.perf_counter() - start, 1)}
    cached = datasets.load_from_disk(str(cache))

    measured = Measured(training, windows_of(tokenizer, data.validation_file, data.block_size, data.max_validation_windows))
    model: Any = AutoModelForCausalLM.from_pretrained(models.model_name_or_path, dtype=torch.float32)
    measured.add("full_precision", model)
    quantize_model(model, getattr(BitNetQuantizationConfig, models.preset)())
    if training.process_index == 0:
        print(coverage(model), flush=True)
    measured.add("before_training", model)
    trainer = train(model, tokenizer, training, cached, folder)
    measured.add("trained", trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False))
    measured.add("packed", pack(folder, tokenizer, training))
    measured.check_packed()
    results = results_of(models, data, trainer, cached, measured)
    if training.process_index == 0:
        (folder / ".results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        os.replace(folder / ".results.json", folder / "results.json")
    return results


if __name__ == "__main__":
    main()
