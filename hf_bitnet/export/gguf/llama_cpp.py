"""Logits of a GGUF file by llama.cpp, through the package llama-cpp-python in a process of its own. Own.

llama.cpp ends the process on what it does not like, and prints much.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

INSTALL = "pip install llama-cpp-python"
# keys and values in float32, no weights laid out anew: the plainest arithmetic that it has
_PROGRAM = """
import ctypes, json, sys
import numpy as np
import llama_cpp as ll
from safetensors.numpy import load_file, save_file
job = json.loads(sys.argv[1])
ids = load_file(job["inputs"])["ids"]
length = ids.shape[1]
ll.llama_backend_init()
model_params = ll.llama_model_default_params()
model_params.n_gpu_layers = 0
if hasattr(model_params, "use_extra_bufts"):
    model_params.use_extra_bufts = False
model = ll.llama_model_load_from_file(job["file"].encode(), model_params)
assert model, "llama.cpp did not load the file"
params = ll.llama_context_default_params()
params.n_ctx = params.n_batch = length
params.n_ubatch = job["at_once"] or length
params.n_threads = params.n_threads_batch = job["threads"]
params.type_k = params.type_v = 0
if hasattr(params, "flash_attn_type"):
    params.flash_attn_type = 0
context = ll.llama_init_from_model(model, params)
assert context, "llama.cpp made no context"
vocabulary = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
batch = ll.llama_batch_init(length, 0, 1)
logits = np.empty((*ids.shape, vocabulary), np.float32)
for row, tokens in enumerate(ids):
    ll.llama_memory_clear(ll.llama_get_memory(context), True)
    batch.n_tokens = length
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = int(token), i, 1, 0, 1
    assert ll.llama_decode(context, batch) == 0, "llama.cpp computed nothing"
    for i in range(length):
        found = ll.llama_get_logits_ith(context, i)
        logits[row, i] = np.ctypeslib.as_array(ctypes.cast(found, ctypes.POINTER(ctypes.c_float)), (vocabulary,))
save_file({"logits": logits}, job["outputs"])
"""


class TooOldError(RuntimeError):
    """The installed llama.cpp does not know a kind of tensor in the file."""


def is_installed() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def logits(file: Path, ids: Tensor, *, at_once: int | None = None) -> Tensor:
    """Logits float32 (B, L, vocabulary) of token ids int64 (B, L), each row by itself.

    Args:
        at_once: tokens that go through the layers together, 1 as when text is written; None for all of a row.

    Raises TooOldError, or RuntimeError with the end of what the process said, when it fails.
    """
    with tempfile.TemporaryDirectory() as place:
        save_file({"ids": ids.contiguous()}, f"{place}/in.safetensors")
        job = {"file": str(file), "inputs": f"{place}/in.safetensors", "outputs": f"{place}/out.safetensors"}
        command = [sys.executable, "-c", _PROGRAM, json.dumps(job | {"threads": torch.get_num_threads(), "at_once": at_once})]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            said = done.stderr.strip()[-600:] or "it said nothing"
            kind = TooOldError if "invalid ggml type" in done.stderr else RuntimeError
            raise kind(f"llama.cpp ended with code {done.returncode}: {said}")
        return load_file(f"{place}/out.safetensors")["logits"]
