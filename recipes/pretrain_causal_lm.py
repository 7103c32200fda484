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
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, LlamaConfig, set_seed

from hf_bitnet import (
    TRAINING_PRESETS,
    BitNetQuantizationConfig,
    MeasuredRun,
    QATArguments,
    QATTrainer,
    TokenWindows,
    command_line_defaults,
    coverage,
    keep_freed_memory,
    quantize_model,
    read_windows,
    set_norm_blend,
)

PRESET = "scratch_b158"


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
    run = MeasuredRun(training, overwrite=models.overwrite)
    set_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(models.tokenizer_name_or_path)
    most = None if data.max_train_tokens is None else -(-data.max_train_tokens // data.block_size)
    train, text = read_windows(
        tokenizer,
        data.train_file,
        data.dataset_name,
        data.dataset_config,
        split=data.train_split,
        column=data.text_column,
        length=data.block_size,
        max_windows=most,
    )
    valid, valid_text = read_windows(tokenizer, data.validation_file, length=data.block_size)
    valid = valid[: data.max_validation_windows]
    run.limit_tokens(train, data.max_train_tokens, repeat=True)
    model = new_model(models, tokenizer, data.block_size)
    parameters = model.num_parameters()
    quantize_model(model, config)
    set_norm_blend(model, 1.0)  # plain norms: there is no function yet that they could disturb
    run.say(str(coverage(model)))

    run.clear()
    trainer = QATTrainer(model=model, args=run.args, train_dataset=TokenWindows(train), processing_class=tokenizer)
    run.train(trainer)
    packed = run.pack_measured(AutoModelForCausalLM, trainer, valid)
    texts = {
        "train": text,
        "train_windows": len(train),
        "validation": valid_text,
        "validation_windows": len(valid),
        "window_tokens": data.block_size,
    }
    return run.finish(
        trainer,
        packed,
        config,
        base_model=None,
        data=texts,
        training={"teacher": "none"},
        recipe="pretrain_causal_lm",
        parameters=parameters,
    )


if __name__ == "__main__":
    keep_freed_memory()  # on a CPU a fifth less time
    main()
