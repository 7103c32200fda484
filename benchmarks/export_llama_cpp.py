"""A packed model and its GGUF file in llama.cpp: perplexity, and whether both write the same text.

    python -m benchmarks.export_llama_cpp out/packed                     # of novels-llama, say, trained by hf-bitnet train
    python -m benchmarks.export_llama_cpp out/packed --kind Q2_0 --windows 8

Texts: windows of ../shared/data/novels/valid.txt. Greedy text: 64 tokens after the first 32 of other windows. llama.cpp gets
prompt and our text token by token; where its likeliest next token is ours at every place, it would have written the same.
At the first place where it is not, "gap" is how much less likely than its own it thinks our token, and "ours" the same of
us, both in standard deviations of the logits: near 0, the models agree and a rounding decides. "same by itself" says how
often rounding decides in llama.cpp alone: in how many texts it chooses the same tokens whether it reads them one by one or
all at once, which changes nothing but the order of float32 sums. Needs gguf and llama-cpp-python.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor
from torch.nn import functional as F

import hf_bitnet as hb
from benchmarks import common
from hf_bitnet.export.gguf import llama_cpp

PROMPT, NEW = 32, 64


@torch.inference_mode()
def measure(model: Any, file: Path, windows: Tensor, prompts: Tensor, new: int = NEW) -> dict[str, Any]:
    """Both models on windows and prompts of token ids, int64 (count, length)."""
    ours, theirs = model(input_ids=windows).logits.float(), llama_cpp.logits(file, windows)
    losses = [float(F.cross_entropy(each[:, :-1].flatten(0, 1), windows[:, 1:].flatten())) for each in (ours, theirs)]
    agreement = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **options)
    written, read = (llama_cpp.logits(file, texts, at_once=count)[:, prompts.shape[1] - 1 : -1] for count in (1, None))
    found = [_first_difference(model, text, each, prompts.shape[1]) for text, each in zip(texts, written, strict=True)]
    return {
        "perplexity": float(torch.tensor(losses[0]).exp()),
        "ratio": float(torch.tensor(losses[1] - losses[0]).exp()),
        "top-1 agreement": agreement,
        "same text": sum(each is None for each in found),
        "same by itself": int((written.argmax(-1) == read.argmax(-1)).all(-1).sum()),
        "error by itself": float((written - read).pow(2).mean().sqrt() / read.std()),
        "prompts": len(found),
        "differences": [each for each in found if each is not None],
    }


def _first_difference(model: Any, text: Tensor, theirs: Tensor, prompt: int) -> dict[str, float] | None:
    """Of the logits `theirs` (new tokens, vocabulary) from a text of ours (prompt and new tokens)."""
    other = (theirs.argmax(-1) != text[prompt:]).nonzero()
    if not len(other):
        return None
    token = int(other[0])
    mine, chosen = int(text[prompt + token]), int(theirs[token].argmax())
    ours = model(input_ids=text[None]).logits[0, prompt + token - 1].float()
    gaps = {"ours": float((ours[mine] - ours[chosen]) / ours.std())}
    gaps["gap"] = float((theirs[token, chosen] - theirs[token, mine]) / theirs[token].std())
    return {"token": token, **gaps}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a packed model with its tokenizer")
    parser.add_argument("--kind", default="TQ2_0")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--smoke", action="store_true", help="writes no results")
    args = parser.parse_args(argv)
    model = hb.open_model(args.model, dtype="float32").eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(args.model)
    text = common.SHARED / "data" / "novels" / "valid.txt"
    windows = hb.text_windows(tokenizer, text, max_windows=args.windows + args.prompts)
    with tempfile.TemporaryDirectory() as place:
        report = hb.export_model(model, f"{place}/gguf", format="gguf", kind=args.kind, tokenizer=tokenizer, verify="codes")
        result = measure(model, Path(f"{place}/gguf/model.gguf"), windows[: args.windows], windows[args.windows :, :PROMPT])
    print(report)
    print(common.table([{key: value for key, value in result.items() if key != "differences"}]))
    if result["differences"]:
        print(common.table(result["differences"]))
    if not args.smoke:
        common.write_results("export_llama_cpp", {"kind": args.kind, **result})


if __name__ == "__main__":
    main()
