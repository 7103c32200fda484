"""Does training converge, whatever the architecture? 20 tiny models x 3 seeds x {1, 1.58, 2, 4} bits, 60 steps of QATTrainer.

    python -m benchmarks.convergence
    python -m benchmarks.convergence --models gpt2 t5 --seeds 1 --try

A model converges when its mean loss over the last five steps is below half of the loss before training. Every model starts
from random weights; only quantized weights, norms and biases train, so that nothing can be learned around the quantized
layers. The task maps each token by a fixed permutation (T5: the one token that the encoder reads; BERT and its like: to a
class; ViT: one of four pictures under noise). "full precision" is the same training without quantization: where it fails too,
the task is to blame. Runs that failed are named, and kept in the JSON with their losses.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import tempfile
import time
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from torch.utils.data import Dataset

import hf_bitnet as hb
from benchmarks.common import table, write_results

VOCABULARY, CLASSES, LENGTH, BATCH, STEPS = 32, 8, 24, 16, 60
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_DECODER = {"vocab_size": VOCABULARY, **_SIZES, "max_position_embeddings": 64, **_IDS}
_GROUPED = {**_DECODER, "num_key_value_heads": 2, "head_dim": 16}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, **_IDS}
_T5 = {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
_ENCODER = {**_DECODER, "num_labels": CLASSES}
_IMAGE = {**_SIZES, "image_size": 16, "patch_size": 8, "num_channels": 1, "num_labels": 4}
_OPT = {"vocab_size": VOCABULARY, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "max_position_embeddings": 64}

_ALIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "smollm3", "granite")

# model type: its auto class and the fields of its config
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    **dict.fromkeys(_ALIKE, (tf.AutoModelForCausalLM, _GROUPED)),
    "cohere": (tf.AutoModelForCausalLM, {**_GROUPED, "logit_scale": 1.0}),
    "phi3": (tf.AutoModelForCausalLM, {**_DECODER, "num_key_value_heads": 2}),
    "bitnet": (tf.AutoModelForCausalLM, {**_DECODER, "num_key_value_heads": 2}),
    "stablelm": (tf.AutoModelForCausalLM, {**_DECODER, "num_key_value_heads": 2}),
    "gpt2": (tf.AutoModelForCausalLM, _GPT2),
    "gpt_neox": (tf.AutoModelForCausalLM, _DECODER),
    "opt": (tf.AutoModelForCausalLM, {**_OPT, "num_hidden_layers": 2, "num_attention_heads": 4, **_IDS}),
    "bert": (tf.AutoModelForTokenClassification, _ENCODER),
    "modernbert": (tf.AutoModelForTokenClassification, {**_ENCODER, "cls_token_id": 1, "sep_token_id": 2}),
    "t5": (tf.AutoModelForSeq2SeqLM, {**_T5, **_IDS, "decoder_start_token_id": 0, "tie_word_embeddings": False}),
    "vit": (tf.AutoModelForImageClassification, _IMAGE),
}
BITS: dict[str, dict[str, Any] | None] = {
    "full precision": None,
    "1": {"weight": "binary"},
    "1.58": {"weight": "ternary"},
    "2": {"weight": "int2_seq"},
    "4": {"weight": "int4"},
}


class Task(Dataset):
    """Rows of the task of a kind of model, drawn from `seed` and the row's number."""

    def __init__(self, auto: Any, seed: int) -> None:
        self._auto, self._seed = auto, seed
        fixed = torch.Generator().manual_seed(1)
        self._next = 3 + torch.randperm(VOCABULARY - 3, generator=fixed)  # the three special tokens stay out
        self._pictures = torch.randn(4, 1, 16, 16, generator=fixed)

    def __len__(self) -> int:
        return BATCH * STEPS

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self._seed * len(self) + row)
        if self._auto is tf.AutoModelForImageClassification:
            label = torch.randint(0, len(self._pictures), (), generator=generator)
            return {"pixel_values": self._pictures[label] + torch.randn(1, 16, 16, generator=generator), "labels": label}
        tokens = torch.randint(3, VOCABULARY, (LENGTH,), generator=generator)
        if self._auto is tf.AutoModelForSeq2SeqLM:
            tokens = tokens[:1].expand(LENGTH)
        if self._auto is tf.AutoModelForCausalLM:
            for place in range(1, LENGTH):
                tokens[place] = self._next[tokens[place - 1] - 3]
            return {"input_ids": tokens, "labels": tokens}
        mapped = self._next[tokens - 3]
        return {"input_ids": tokens, "labels": mapped % CLASSES if self._auto is tf.AutoModelForTokenClassification else mapped}


def build(name: str, bits: str, seed: int) -> nn.Module:
    """A random model of which only linear layers inside the blocks, norms and biases train."""
    auto, fields = MODELS[name]
    torch.manual_seed(seed)
    model = auto.from_config(tf.AutoConfig.for_model(name, **fields), dtype=torch.float32)
    config = BITS[bits]
    hb.quantize_model(model, hb.BitNetQuantizationConfig(**(config or {})))
    weights = {row.name for row in hb.coverage(model).rows if row.status == "quantized"}
    if config is None:  # without quantization, the same weights train
        hb.dequantize_model(model)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.dim() <= 1 or key in weights)
        if not parameter.requires_grad:  # at their usual 0.02, a head that does not train allows no sure answer
            parameter.data.normal_(std=0.25)
    return model


def run(name: str, bits: str, seed: int, rate: float) -> dict[str, Any]:
    """Trains one model; its losses before training and at the end."""
    model = build(name, bits, seed)
    with tempfile.TemporaryDirectory() as folder:
        plain = BITS[bits] is None
        kind: Any = tf.TrainingArguments if plain else functools.partial(hb.QATArguments, quant_logging=False)
        arguments = kind(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            warmup_steps=5,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
            dataloader_pin_memory=False,
        )
        trainer: Any = (tf.Trainer if plain else hb.QATTrainer)(model, arguments, train_dataset=Task(MODELS[name][0], seed))
        start = time.perf_counter()
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    first, last = losses[0], sum(losses[-5:]) / 5
    finite = all(map(math.isfinite, losses))
    return {
        "model": name,
        "bits": bits,
        "seed": seed,
        "first": first,
        "last": last,
        "finite": finite,
        "converged": finite and last < first / 2,
        "seconds": time.perf_counter() - start,
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each number of bits: how many runs converged, and the mean of last loss over first."""
    found = []
    for bits in BITS:
        runs = [row for row in rows if row["bits"] == bits]
        if runs:
            ratio = sum(row["last"] / row["first"] for row in runs) / len(runs)
            good = sum(row["converged"] for row in runs)
            found.append({"bits": bits, "runs": len(runs), "converged": good, "share": good / len(runs), "last / first": ratio})
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--bits", nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--try", dest="trial", action="store_true", help="print the table, do not write it")
    args = parser.parse_args(argv)
    rows = []
    for name, bits, seed in itertools.product(args.models, args.bits, range(args.seeds)):
        rows.append(run(name, bits, seed, args.lr))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(summary(rows)))
    failed = [row for row in rows if not row["converged"]]
    print("\n".join(["did not converge:", *(f"  {row['model']}, {row['bits']} bits, seed {row['seed']}" for row in failed)]))
    if not args.trial:
        print(write_results("convergence", {"lr": args.lr, "summary": summary(rows), "rows": rows}))


if __name__ == "__main__":
    main()
