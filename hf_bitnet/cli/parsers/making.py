"""The options of the commands that make something: quantize, train, export, push, demo."""

from __future__ import annotations

from typing import Any

from ..options import GGUF_TOO, above_zero, add_model, add_quantization, between, command, positive, seed


def add_quantize(commands: Any) -> None:
    parser = command(
        commands,
        "quantize",
        "Quantize a full-precision model without training, and save it.",
        "  hf-bitnet quantize org/model out --preset w4a8\n"
        "  hf-bitnet quantize ./model out --form train            # float weights, to be trained\n"
        "  hf-bitnet quantize ./model out --weight int4 --override 'down_proj=weight:int8' --keep 'layers\\.0\\.'\n"
        "  hf-bitnet quantize org/model out --preset w2a8 --fit gptq --fit-file train.txt\n"
        "  hf-bitnet quantize org/model out --preset w8a8 --activation int8_static --fit-file train.txt\n"
        "  hf-bitnet quantize org/model --dry-run                 # what would be quantized; writes nothing",
    )
    add_model(parser)
    parser.add_argument("out", metavar="OUT", nargs="?", help="folder for the quantized model")
    parser.add_argument("--form", choices=("packed", "train"), default="packed", help="what to write (default: packed)")
    parser.add_argument(
        "--dtype", default="auto", help="of the weights that are not packed: auto (the model's own), float32, ..."
    )
    parser.add_argument(
        "--fit", metavar="METHOD", help="fit the weights instead of rounding them: gptq (needs --fit-file) or least_squares"
    )
    parser.add_argument(
        "--fit-file",
        nargs="+",
        metavar="FILE",
        help="UTF-8 text to fit on, and to find static activation ranges and the gains of sub-norms on; for language models",
    )
    parser.add_argument("--fit-windows", type=positive, default=128, metavar="N", help="of 256 tokens (default: 128)")
    parser.add_argument("--dry-run", action="store_true", help="only show what would be quantized, from the model's shapes")
    parser.add_argument("--force", action="store_true", help="replace a model in OUT")
    add_quantization(parser)


def add_train(commands: Any) -> None:
    parser = command(
        commands,
        "train",
        "Quantize a causal language model and train it back to quality: OUT/packed is the result, with OUT/results.json.",
        "  hf-bitnet train org/model out --train-file train.txt --validation-file valid.txt\n"
        "  hf-bitnet train ./model out --train-file a.txt b.txt --validation-file v.txt --preset w2a8 --bf16 \\\n"
        "      --learning-rate 2e-5 --batch-size 16 --max-train-tokens 100000000 --set gradient_accumulation_steps=4\n"
        "  hf-bitnet train org/model out --dataset Salesforce/wikitext --dataset-config wikitext-103-raw-v1\n"
        "  hf-bitnet train ./model out --train-file ... --validation-file ... --resume   # continue a run that was stopped\n\n"
        "On several GPUs: accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/qat_causal_lm.py --help",
    )
    add_model(parser)
    parser.add_argument("out", metavar="OUT", help="folder of the run")
    text = parser.add_argument_group("text")
    text.add_argument("--train-file", nargs="+", metavar="FILE", help="UTF-8 text to train on")
    text.add_argument("--validation-file", nargs="+", metavar="FILE", help="UTF-8 text to measure on")
    text.add_argument("--dataset", metavar="NAME", help="dataset on the Hub, in place of files")
    text.add_argument("--dataset-config", metavar="NAME")
    text.add_argument("--train-split", default="train", metavar="NAME", help="(default: train)")
    text.add_argument("--validation-split", default="validation", metavar="NAME", help="(default: validation)")
    text.add_argument("--text-column", default="text", metavar="NAME", help="(default: text)")
    text.add_argument("--length", type=positive, default=256, metavar="N", help="tokens in a window (default: 256)")
    text.add_argument("--max-validation-windows", type=positive, metavar="N", help="measure on so many windows (default: all)")
    training = parser.add_argument_group("training")
    training.add_argument("--max-train-tokens", type=positive, metavar="N", help="end the training after so many tokens")
    training.add_argument("--epochs", type=above_zero, metavar="X", help="(default: 1)")
    training.add_argument("--learning-rate", type=above_zero, metavar="X", help="(default: 1e-4, for pretrained models)")
    training.add_argument("--batch-size", type=positive, metavar="N", help="windows a step and device (default: 8)")
    training.add_argument(
        "--training-preset",
        metavar="NAME",
        help="start from a published way to train, with its quantization and teacher; `hf-bitnet presets` lists them",
    )
    training.add_argument("--teacher", help="self (the full-precision model; the default), none, or another model")
    training.add_argument(
        "--fit", metavar="METHOD", help="start from fitted weights, without a quantization schedule: gptq or least_squares"
    )
    training.add_argument(
        "--drawn-share",
        type=between(0, 1),
        default=0.0,
        metavar="X",
        help="share of the text that the full-precision model writes (0..1)",
    )
    training.add_argument("--bf16", action="store_true", help="compute in bfloat16 (weights stay float32)")
    training.add_argument("--seed", type=seed, metavar="N", help="(default: 42)")
    training.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any field of QATArguments or TrainingArguments; repeatable",
    )
    again = training.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue from the last checkpoint in OUT")
    again.add_argument("--force", action="store_true", help="replace what an earlier run left in OUT")
    add_quantization(parser)


def add_export(commands: Any) -> None:
    parser = command(
        commands,
        "export",
        "Write a quantized model for other programs, read it back and compare; a difference leaves nothing and is exit code 3.",
        "  hf-bitnet export --list                                # the formats, who reads them, their options\n"
        "  hf-bitnet export out/packed model-gguf --format gguf\n"
        "  hf-bitnet export out/packed exports --format gguf onnx # exports/gguf and exports/onnx\n"
        "  hf-bitnet export out/packed dense --format dense --set dtype=float16 --set max_shard_size=2GB\n"
        "  hf-bitnet export out/packed exports --format dense gguf --set dense.dtype=float32 --verify codes",
    )
    add_model(parser, optional=True, what=GGUF_TOO)
    parser.add_argument("out", metavar="OUT", nargs="?", help="folder to write; with several formats each gets one inside")
    parser.add_argument("--format", nargs="+", metavar="NAME", help="one or several of those that --list shows")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the format; FORMAT.NAME=VALUE sets it for one of several; repeatable",
    )
    parser.add_argument(
        "--verify",
        choices=("full", "codes", "none"),
        default="full",
        help="what to compare: codes and logits, the codes alone (the model is not run), or nothing (default: full)",
    )
    parser.add_argument("--base-model", metavar="ID", help="Hub id of the full-precision model, for the card")
    parser.add_argument("--name", help="of the model, for the card and the files' metadata (default: OUT's last part)")
    parser.add_argument("--force", action="store_true", help="replace a model in OUT")
    parser.add_argument("--list", action="store_true", help="show the formats and write nothing")


def add_push(commands: Any) -> None:
    parser = command(
        commands,
        "push",
        "Upload a model, in one form or several, with its card, to the Hugging Face Hub. Log in before: hf auth login",
        "  hf-bitnet push out me/my-model --dry-run                     # what would be uploaded; nobody is asked\n"
        "  hf-bitnet push out me/my-model --private --message 'First version'\n"
        "  hf-bitnet push out me/my-model --forms packed train gguf     # in one repository; what is not there is made\n"
        "  hf-bitnet push out 'me/my-model-{form}' --forms packed gguf  # in two",
    )
    parser.add_argument("folder", metavar="FOLDER", help="of a model, an export, or a run of `hf-bitnet train`")
    parser.add_argument(
        "repo_id", metavar="REPO_ID", help="made where it is not there; with {form} in it each form gets one of its own"
    )
    parser.add_argument(
        "--forms", nargs="+", metavar="FORM", help="packed, train, and formats of export (default: what the folder holds)"
    )
    parser.add_argument("--base-model", metavar="ID", help="Hub id of the full-precision model, where the card lacks it")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="push there (default: main)")
    parser.add_argument(
        "--remote-code",
        action="store_true",
        help="add a file that loads the model without `import hf_bitnet`, where it is trusted",
    )
    parser.add_argument("--no-card", action="store_true", help="leave the repository's README.md as it is")
    parser.add_argument("--dry-run", action="store_true", help="check everything and show the files; upload nothing")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")


def add_demo(commands: Any) -> None:
    parser = command(
        commands,
        "demo",
        "Train a small model, make it ternary, train it back, pack it; ends with a table and a page. No network needed.",
        "  hf-bitnet demo\n  hf-bitnet demo --quick --output demo-quick    # seconds; its figures mean nothing",
    )
    parser.add_argument("--output", default="demo-output", metavar="FOLDER", help="(default: demo-output)")
    parser.add_argument("--quick", action="store_true", help="a few steps of a tiny model, to see that everything works")
