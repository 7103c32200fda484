"""Pretraining of a 1.58-bit causal language model from random weights, by the two-stage schedule of BitNet b1.58.

    python recipes/pretrain_causal_lm.py \\
        --tokenizer_name_or_path ../shared/models/novels-llama-small \\
        --hidden_size 256 --num_hidden_layers 4 --num_attention_heads 4 \\
        --train_file ../shared/data/novels/train.txt --validation_file ../shared/data/novels/valid.txt \\
        --warmup_steps 0.05 --per_device_train_batch_size 16 --max_train_tokens 4000000 --output_dir out

    accelerate launch --config_file recipes/accelerate/fsdp2.yaml recipes/pretrain_causal_lm.py \\
        --config_name_or_path meta-llama/Llama-3.2-1B --tokenizer_name_or_path meta-llama/Llama-3.2-1B \\
        --dataset_name HuggingFaceFW/fineweb-edu --dataset_config sample-10BT --max_train_tokens 10000000000 \\
        --learning_rate 1.2e-3 --block_size 2048 --gradient_accumulation_steps 8 --output_dir out

The way is the preset scratch_b158 (`hf-bitnet presets scratch_b158`): weights are ternary from the first step, norms stand in
front of o_proj and down_proj, the learning rate drops and weight decay ends at half of the run. Its 375 steps of warm-up are
for runs of many thousand steps. The order: make the model; train; perplexity; save; pack; reload; perplexity again, which
must be the same. out/packed is the model to deploy, out/results.json has every figure.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, LlamaConfig, set_seed

from hf_bitnet import (
    TRAINING_PRESETS,
    BitNetQuantizationConfig,
    QATArguments,
    QATTrainer,
    command_line_defaults,
    coverage,
    dataset_texts,
    pack_model,
    perplexity,
    quantize_model,
    set_norm_blend,
    text_windows,
)

PRESET = "scratch_b158"
_LEFT = ("results.json", "train", "packed")
# of the reloaded packed model to the trained one: the same codes, summed in another order
_AGREEMENT = 1e-3


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


@dataclass
class ModelArguments:
    _argument_group_name: ClassVar[str] = "model"
    tokenizer_name_or_path: str = field(metadata={"help": "Tokenizer: Hub name or folder."})
    config_name_or_path: str | None = field(
        default=None, metadata={"help": "Take the sizes of this model (Hub name or folder), in place of the following ones."}
    )
    hidden_size: int = field(default=256, metadata={"help": "Width, of a Llama."})
    intermediate_size: int | None = field(
        default=None, metadata={"help": "Of the feed-forward part. Default: 8/3 of hidden_size."}
    )
    num_hidden_layers: int = field(default=4, metadata={"help": "Layers."})
    num_attention_heads: int = field(default=4, metadata={"help": "Heads."})
    preset: str | None = field(
        default=None,
        metadata={
            "help": "How weights are quantized. Default: what belongs to the training preset.",
            "choices": ["bitnet_b158", "w1a8", "w2a8", "w4a8", "w8a8"],
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace what an earlier run left in output_dir."})


@dataclass
class DataArguments:
    _argument_group_name: ClassVar[str] = "text"
    train_file: list[str] | None = field(default=None, metadata={"help": "UTF-8 text file(s) to train on."})
    validation_file: list[str] | None = field(default=None, metadata={"help": "UTF-8 text file(s) to measure on."})
    dataset_name: str | None = field(default=None, metadata={"help": "Dataset on the Hub, in place of a training file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_split: str = field(default="train", metadata={"help": "Its split."})
    text_column: str = field(default="text", metadata={"help": "Its column with the text."})
    block_size: int = field(default=256, metadata={"help": "Tokens in a window."})
    max_train_tokens: int | None = field(default=None, metadata={"help": "End the training after so many tokens."})
    max_validation_windows: int | None = field(default=None, metadata={"help": "Measure on so many windows; default all."})


def new_model(arguments: ModelArguments, tokenizer: Any, block_size: int) -> Any:
    """A model with random float32 weights. Raises ValueError on sizes that do not fit."""
    if arguments.config_name_or_path is not None:
        config = AutoConfig.from_pretrained(arguments.config_name_or_path)
        if config.vocab_size < len(tokenizer):
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, {arguments.config_name_or_path!r} only {config.vocab_size}; give "
                "the tokenizer that belongs to it: --tokenizer_name_or_path"
            )
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    width, heads = arguments.hidden_size, arguments.num_attention_heads
    if width % (2 * heads):
        raise ValueError(
            f"--hidden_size {width} must be a multiple of twice --num_attention_heads {heads}; for example {64 * heads}"
        )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        # a multiple of 32, as fast products want it
        intermediate_size=arguments.intermediate_size or 32 * math.ceil(width / 12),
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=heads,
        max_position_embeddings=block_size,
        tie_word_embeddings=True,
        **{name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def read(tokenizer: Any, data: DataArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows (count, block_size) to train and to measure on."""
    if data.validation_file is None or (data.train_file is None and data.dataset_name is None):
        raise ValueError("which text? Give --validation_file, and --train_file or --dataset_name")
    valid = text_windows(tokenizer, [Path(file) for file in data.validation_file], data.block_size)
    if data.train_file is not None:
        train = text_windows(tokenizer, [Path(file) for file in data.train_file], data.block_size)
    else:
        most = None if data.max_train_tokens is None else -(-data.max_train_tokens // data.block_size)
        where: dict[str, Any] = {"split": data.train_split, "column": data.text_column, "streaming": most is not None}
        texts = dataset_texts(str(data.dataset_name), data.dataset_config, **where)
        train = text_windows(tokenizer, texts, data.block_size, max_windows=most)
    return train, valid[: data.max_validation_windows]


def limit(training: QATArguments, windows: torch.Tensor, max_tokens: int | None) -> None:
    """Sets `max_steps` so that the run ends at `max_tokens`; it may go over the text several times."""
    if max_tokens is None:
        return
    per_step = training.train_batch_size * training.world_size * training.gradient_accumulation_steps * windows.shape[1]
    if max_tokens < per_step:
        raise ValueError(
            f"--max_train_tokens {max_tokens} is less than one step of {per_step}; give more, or a smaller "
            "--per_device_train_batch_size"
        )
    training.max_steps = max_tokens // per_step


def check_folder(training: QATArguments, overwrite: bool) -> Path:
    folder = Path(str(training.output_dir))
    left = [name for name in _LEFT if (folder / name).exists()]
    if left and not overwrite:
        raise ValueError(
            f"{str(folder)!r} holds {', '.join(left)} of an earlier run; choose another --output_dir, or replace it "
            "(--overwrite)"
        )
    if training.process_index == 0:
        for name in left:
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    return folder


def pack(folder: Path, tokenizer: Any, training: QATArguments) -> Any:
    """Packs what was saved; the reloaded model, in every process."""
    if training.process_index == 0:
        pack_model(AutoModelForCausalLM.from_pretrained(folder / "train")).save_pretrained(folder / "packed")
        tokenizer.save_pretrained(folder / "packed")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return AutoModelForCausalLM.from_pretrained(folder / "packed").to(training.device)  # type: ignore[arg-type]


def train(model: Any, tokenizer: Any, training: QATArguments, windows: torch.Tensor, folder: Path) -> Any:
    rows = [{"input_ids": window, "labels": window} for window in windows]
    trainer = QATTrainer(model=model, args=training, train_dataset=rows, processing_class=tokenizer)
    resume = str(training.resume_from_checkpoint or "false")
    trainer.train(resume_from_checkpoint={"true": True, "false": None}.get(resume.lower(), resume))
    if trainer.is_fsdp_enabled:  # else shards would be saved
        plugin: Any = trainer.accelerator.state.fsdp_plugin
        plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder / "train"))
    trainer.accelerator.wait_for_everyone()
    return trainer


def results_of(
    trainer: Any, config: BitNetQuantizationConfig, data: DataArguments, sizes: tuple[int, int], measured: dict[str, float]
) -> dict[str, Any]:
    saved = trainer.args.to_dict()
    settings = (
        "training_preset",
        "learning_rate",
        "two_stage",
        "weight_decay",
        "warmup_steps",
        "adam_beta1",
        "adam_beta2",
        "seed",
    )
    per_step = trainer.args.train_batch_size * trainer.args.world_size * trainer.args.gradient_accumulation_steps
    return {
        "recipe": "pretrain_causal_lm",
        "base_model": None,
        "parameters": sizes[0],
        "data": {
            "train": data.dataset_name or ", ".join(Path(file).name for file in data.train_file or []),
            "train_windows": sizes[1],
            "validation": ", ".join(Path(file).name for file in data.validation_file or []),
            "window_tokens": data.block_size,
        },
        "quantization": {key: value for key, value in config.fields().items() if value},
        "training": {
            "steps": trainer.state.global_step,
            "windows_per_step": per_step,
            "teacher": "none",
            **{name: saved[name] for name in settings},
        },
        "perplexity": measured,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "accelerate")},
        "history": trainer.state.log_history,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    groups = (ModelArguments, DataArguments, QATArguments)
    usage = "pretrain_causal_lm.py --tokenizer_name_or_path T --train_file F --validation_file F --output_dir FOLDER [options]"
    parser = HfArgumentParser(groups, usage=usage, description=__doc__, formatter_class=HelpFormatter)  # type: ignore[arg-type]
    named = command_line_defaults(argv)
    parser.set_defaults(**named if "training_preset" in named else command_line_defaults(["--training_preset", PRESET]))
    models, data, training = parser.parse_args_into_dataclasses(args=argv)
    config = TRAINING_PRESETS.get(training.training_preset).config()
    if models.preset is not None:
        config = getattr(BitNetQuantizationConfig, models.preset)(sub_norm=config.sub_norm)
    folder = check_folder(training, models.overwrite)
    set_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(models.tokenizer_name_or_path)
    windows, valid = read(tokenizer, data)
    limit(training, windows, data.max_train_tokens)
    model = new_model(models, tokenizer, data.block_size)
    sizes = (model.num_parameters(), len(windows))
    quantize_model(model, config)
    set_norm_blend(model, 1.0)  # plain norms: there is no function yet that they could disturb
    say = print if training.process_index == 0 else lambda *words, **named: None
    say(coverage(model), flush=True)

    start = time.perf_counter()
    trainer = train(model, tokenizer, training, windows, folder)
    seconds = round(time.perf_counter() - start, 1)
    measured = {}
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    for step, found in (("trained", lambda: trained), ("packed", lambda: pack(folder, tokenizer, training))):
        measured[step] = perplexity(found(), valid, training.per_device_eval_batch_size, progress=False)
        say(f"{step + ':':<9} perplexity {measured[step]:.2f}", flush=True)
    if not abs(measured["packed"] - measured["trained"]) <= _AGREEMENT * measured["trained"]:
        raise RuntimeError(f"the packed model, reloaded, differs from the trained one: {measured}; please report this")
    results = {**results_of(trainer, config, data, sizes, measured), "seconds": {"train": seconds}}
    if training.process_index == 0:
        (folder / ".results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        os.replace(folder / ".results.json", folder / "results.json")
    return results


if __name__ == "__main__":
    main()
