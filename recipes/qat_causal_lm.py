"""Quantization-aware training of a causal language model: from full precision to a packed low-bit model, all figures measured.

    python recipes/qat_causal_lm.py \\
        --model_name_or_path ../shared/models/novels-llama-small \\
        --train_file ../shared/data/novels/train.txt --validation_file ../shared/data/novels/valid.txt \\
        --preset bitnet_b158 --learning_rate 2e-3 --per_device_train_batch_size 16 --max_train_tokens 1500000 \\
        --output_dir out

    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/qat_causal_lm.py \\
        --model_name_or_path HuggingFaceTB/SmolLM2-135M \\
        --dataset_name Salesforce/wikitext --dataset_config wikitext-103-raw-v1 \\
        --block_size 1024 --output_dir out

What happens, in this order: perplexity in full precision; quantize (prints what is quantized, and what is not and why);
perplexity without training; train, with the full-precision model as teacher; perplexity; save; pack; reload; perplexity
again, which must be the same. out/packed is the model to deploy, with a model card; out/results.json has every figure.

`--training_preset NAME` starts from a published way to train, with its quantization and teacher; `hf-bitnet
presets` lists them.

The defaults are for pretrained models of 100 M parameters and more, where published conversions to 1.58 bit use a learning
rate of 1e-4 and billions of tokens. A few million tokens show the way, not the destination: see recipes/LOG.md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed

from hf_bitnet import (
    TRAINING_PRESETS,
    BitNetQuantizationConfig,
    QATArguments,
    command_line_defaults,
    convert,
    keep_freed_memory,
    read_windows,
)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


@dataclass
class ModelArguments:
    _argument_group_name: ClassVar[str] = "model"
    model_name_or_path: str = field(metadata={"help": "Full-precision model: Hub name or folder."})
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "'self' (the full-precision model), 'none', or the Hub name or folder of a larger one. Default: the "
            "training preset's, else 'self'."
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace what an earlier run left in output_dir."})


@dataclass
class DataArguments:
    _argument_group_name: ClassVar[str] = "text"
    train_file: list[str] | None = field(default=None, metadata={"help": "UTF-8 text file(s) to train on."})
    validation_file: list[str] | None = field(default=None, metadata={"help": "UTF-8 text file(s) to measure on."})
    dataset_name: str | None = field(default=None, metadata={"help": "Dataset on the Hub, in place of text files."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_split: str = field(default="train", metadata={"help": "Its split to train on."})
    validation_split: str = field(default="validation", metadata={"help": "Its split to measure on."})
    text_column: str = field(default="text", metadata={"help": "Its column with the text."})
    block_size: int = field(default=256, metadata={"help": "Tokens in a window."})
    drawn_share: float = field(default=0.0, metadata={"help": "Share of the text that the full-precision model writes, 0..1."})
    max_train_tokens: int | None = field(default=None, metadata={"help": "End the training after so many tokens."})
    max_validation_windows: int | None = field(default=None, metadata={"help": "Measure on so many windows; default all."})


@dataclass
class QuantizationArguments:
    _argument_group_name: ClassVar[str] = "quantization: the preset, and what differs from it"
    preset: str | None = field(
        default=None,
        metadata={
            "help": "Where to start from. Default: what belongs to the training preset, else ternary weights, as bitnet_b158.",
            "choices": ["bitnet_b158", "w1a8", "w2a8", "w4a8", "w8a8"],
        },
    )
    weight: str | None = field(default=None, metadata={"help": "binary, ternary, int2, int2_seq, int4 or int8."})
    weight_scale: str | None = field(default=None, metadata={"help": "absmean, absmax, threshold, least_squares or learned."})
    granularity: str | None = field(default=None, metadata={"help": "One scale per tensor, channel or group."})
    group_size: int | None = field(default=None, metadata={"help": "Inputs of a group."})
    activation: str | None = field(
        default=None, metadata={"help": "int8, int4, sign, int8_asymmetric, int8_static (calibrated here) or none."}
    )
    ste: str | None = field(default=None, metadata={"help": "identity, clipped, tanh, sigmoid or learnable."})
    sub_norm: list[str] | None = field(
        default=None, metadata={"help": "Regular expressions of layers that get an RMS norm in front: o_proj down_proj."}
    )
    keep: list[str] | None = field(default=None, metadata={"help": "Regular expressions of layers to leave in full precision."})
    overrides: str | None = field(
        default=None, metadata={"help": """JSON, layers that differ: '{"down_proj": {"weight": "int4"}, "k_proj": "keep"}'."""}
    )
    min_coverage: float | None = field(default=None, metadata={"help": "Stop when less of the linear weights is quantized."})

    def config(self, training_preset: str | None) -> BitNetQuantizationConfig:
        changed = {name: value for name, value in vars(self).items() if name != "preset" and value is not None}
        if "overrides" in changed:
            changed["overrides"] = json.loads(changed["overrides"])
        if self.preset is not None:
            return getattr(BitNetQuantizationConfig, self.preset)(**changed)
        start = BitNetQuantizationConfig if training_preset is None else TRAINING_PRESETS.get(training_preset).config
        return start(**changed)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    groups = (ModelArguments, DataArguments, QuantizationArguments, QATArguments)
    usage = "qat_causal_lm.py --model_name_or_path MODEL --train_file TEXT --validation_file TEXT --output_dir FOLDER [options]"
    parser = HfArgumentParser(groups, usage=usage, description=__doc__, formatter_class=HelpFormatter)  # type: ignore[arg-type]
    parser.set_defaults(**command_line_defaults(argv))
    models, data, quantization, training = parser.parse_args_into_dataclasses(args=argv)
    config = quantization.config(training.training_preset)  # mistakes are told before anything is loaded
    preset = training.training_preset
    teacher = models.teacher or ("self" if preset is None else TRAINING_PRESETS.get(preset).teacher or "none")
    set_seed(training.seed)

    tokenizer = AutoTokenizer.from_pretrained(models.model_name_or_path)
    most = None if data.max_train_tokens is None else -(-data.max_train_tokens // data.block_size)
    named: dict[str, Any] = {"dataset": data.dataset_name, "config": data.dataset_config}
    named |= {"column": data.text_column, "length": data.block_size}
    train, train_text = read_windows(tokenizer, data.train_file, split=data.train_split, max_windows=most, **named)
    most = data.max_validation_windows
    valid, valid_text = read_windows(tokenizer, data.validation_file, split=data.validation_split, max_windows=most, **named)
    # float32 weights: in 16 bits most small steps of training would be lost in rounding. --bf16 computes in bfloat16
    model = AutoModelForCausalLM.from_pretrained(models.model_name_or_path, dtype=torch.float32)

    return convert(
        model,
        tokenizer,
        config,
        training,
        train,
        valid[: data.max_validation_windows],
        teacher=None if teacher == "none" else teacher,
        drawn_share=data.drawn_share,
        max_train_tokens=data.max_train_tokens,
        base_model=models.model_name_or_path,
        train_text=train_text,
        valid_text=valid_text,
        overwrite=models.overwrite,
    )


if __name__ == "__main__":
    keep_freed_memory()  # on a CPU a fifth less time
    main()
