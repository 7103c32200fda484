"""Where the Triton kernels serve: reasons, tuning, graphs, compilation for GPUs that are not there, whole models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from hf_bitnet import BitNetQuantizationConfig, kernels, pack_model, quantize_model
from hf_bitnet.kernels import dispatch
from hf_bitnet.kernels.triton import support
from hf_bitnet.kernels.triton.operators import OPERATIONS
from hf_bitnet.modules import functional
from hf_bitnet.modules.functional import Latent
from hf_bitnet.quantizers import make_weight_quantizer
from hf_bitnet.ste import ESTIMATORS

pytest.importorskip("triton", reason="the GPU kernels are written in Triton, which is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REPOSITORY = Path(__file__).resolve().parents[1]


# ---- where they serve ----


def test_reasons_why_it_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    why = support.why_unavailable.__wrapped__
    assert "Triton compiles for GPUs; TRITON_INTERPRET=1" in why("cpu") and why("cpu", True) is None
    assert why("mps") == "Triton has no compiler for mps"
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: None)
    assert why("cuda") == "the package triton is not installed; pip install triton"
    assert support.describe() == "Triton is not installed"


@pytest.mark.parametrize(
    ("version", "served"), [("3.3.1", False), ("3.5.0", True), ("4.0.0+git1234", True), ("nightly", False)]
)
def test_old_versions_of_triton_are_told(version: str, served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support.metadata, "version", lambda name: version)
    why = support.why_unavailable.__wrapped__("cpu", True)
    assert why is None if served else (why or "").startswith(f"Triton {version} is older than 3.5; install a newer torch")


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_absent_devices_are_told(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.get_device_module(device), "is_available", lambda: False)
    assert support.why_unavailable.__wrapped__(device) == "torch sees no such device here"


def test_old_gpus_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    why = support.why_unavailable.__wrapped__
    assert why("cuda") == "this GPU has compute capability 7.0, its integer products need 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert why("cuda") is None


def test_the_table_names_them() -> None:
    table = kernels.explain("mps")
    assert "triton: Triton has no compiler for mps" in table
    assert table.splitlines()[-1] == "GPU kernels: none serve: Triton has no compiler for mps"
    assert set(OPERATIONS) <= set(dispatch._BODIES)


def test_every_operator_has_a_body_for_gpus() -> None:
    for name in kernels.graph.OPERATORS:
        for key in ("CUDA", "XPU"):
            has = torch._C._dispatch_has_kernel_for_dispatch_key(f"hf_bitnet::{name}", key)
            assert has == (name not in ("pack_trits", "unpack_trits")), (name, key)


def test_numbers_of_rows_share_their_configuration() -> None:
    assert [support.bucket(rows) for rows in (1, 5, 8, 4095, 4096, 4097, 10**6)] == [1, 8, 8, 4096, 4096, 8192, 16384]


# ---- tuning ----


class _Tuner:
    """What of Triton's tuner `_guarded` touches; it is in one call at a time, as that."""

    def __init__(self) -> None:
        self.cache: dict[str, str] = {}
        self.cache_results, self.nargs = True, None

    def _bench(self, config: str) -> float:
        return {"slow": 2.0, "fast": 1.0}[config]

    def run(self, key: str, wait: threading.Event | None = None) -> str:
        assert self.nargs is None, "another thread is in the middle of a call"
        self.nargs = key
        if wait is not None:
            wait.wait(0.05)
        if key not in self.cache:
            self.cache[key] = min(("slow", "fast"), key=lambda config: self._bench(config=config))
        self.nargs = None
        return self.cache[key]


def test_threads_tune_one_after_the_other() -> None:
    from hf_bitnet.kernels.triton import tuning

    tuner, found = tuning._guarded(_Tuner()), []
    threads = [threading.Thread(target=lambda: found.append(tuner.run("key", threading.Event()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["fast"] * 4


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_bitnet.kernels.triton import tuning

    tuner = tuning._guarded(_Tuner())
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_available", lambda: True)
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert tuner.run("new") == "slow"  # the first
    assert tuner.cache_results and tuner.run("new") == "fast"


# ---- graphs, on a GPU that only pretends: operators' fakes run, and code around them that asks for a number raises ----


class _Recorder(TorchDispatchMode):
    """Gathers the names of this library's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "hf_bitnet":
            self.seen.add(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dispatch table as on a machine with a GPU."""
    for operation, body in OPERATIONS.items():
        monkeypatch.setitem(dispatch._CHOSEN, (operation, "cuda"), body)


LLAMA = LlamaConfig(vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4)


def _fake_model(packed: bool, config: Any = LLAMA) -> Any:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    quantize_model(model, BitNetQuantizationConfig.bitnet_b158())
    model = pack_model(model) if packed else model
    for module in model.modules():  # not `to_empty`, which swaps tensors, and fake ones refuse
        for held in (module._parameters, module._buffers):
            held |= {name: _on_gpu(tensor) for name, tensor in held.items() if tensor is not None}
    return model


def _on_gpu(tensor: Tensor) -> Tensor:
    moved = torch.empty_like(tensor, device="cuda")
    return torch.nn.Parameter(moved, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else moved


@pytest.mark.parametrize("packed", [False, True])
def test_a_forward_is_made_of_operators_and_asks_for_no_number(gpu: None, packed: bool) -> None:
    with FakeTensorMode(), torch.no_grad():
        block = _fake_model(packed).model.layers[0].mlp
        with _Recorder() as recorder:
            y = block(torch.zeros(2, 8, 48, dtype=torch.bfloat16, device="cuda"))
        assert y.device.type == "cuda" and y.dtype == torch.bfloat16
    trained = {"quantize_rows", "mean_magnitudes", "quantize_weight", "int_linear"}
    assert recorder.seen == ({"packed_linears"} if packed else trained)


@pytest.mark.parametrize("tokens", [1, 8])
def test_packed_experts_ask_for_no_number(gpu: None, tokens: int) -> None:
    """Which experts were chosen stays on the device: two operators for all of them."""
    with FakeTensorMode(), torch.no_grad():
        block = _fake_model(True, MixtralConfig(**{**LLAMA.to_dict(), "model_type": "mixtral"})).model.layers[0].mlp
        with _Recorder() as recorder:
            y = block(torch.zeros(1, tokens, 48, dtype=torch.bfloat16, device="cuda"))
        assert y.device.type == "cuda" and y.dtype == torch.bfloat16
    assert recorder.seen == {"packed_experts"}


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_backward_is_made_of_operators_and_asks_for_no_number(gpu: None, granularity: str) -> None:
    quantizer = make_weight_quantizer("ternary", granularity=granularity)
    with FakeTensorMode(), torch.no_grad(), _Recorder() as recorder:
        weight, grad = torch.empty(24, 16, device="cuda"), torch.empty(8, 24, device="cuda", dtype=torch.bfloat16)
        x_codes, x_scale = torch.empty(8, 16, device="cuda", dtype=torch.int8), torch.empty(8, 1, device="cuda")
        w = Latent(quantizer, ESTIMATORS.get("identity"), 1.0).codes(weight, None)
        assert functional._input_gradient(grad, w, grad.dtype).shape == (8, 16)
        assert functional._value_gradient(grad, x_codes, x_scale, None, torch.float32).shape == weight.shape
    assert recorder.seen == {"mean_magnitudes", "quantize_weight", "fixed_matmul"}


# ---- in processes of their own ----


def _run(*command: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=REPOSITORY, env={**kept, **environment}, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _compiled(target: str, *how: str) -> dict[str, dict[str, int]]:
    return json.loads(_run("-m", "tests.triton_targets", target, *how).splitlines()[-1])


def test_compiles_for_a_gpu_that_is_not_there() -> None:
    found = _compiled("cuda:90")
    assert len(found) == 16
    assert found["_product_kernel"]["wgmma.mma_async"] and found["_grouped_kernel"]["wgmma.mma_async"]
    assert found["_tiles_kernel"]["mma.sync"] and found["_tiles_kernel"]["cp.async.cg"]
    assert found["_rows_kernel"]["dp4a"] and found["_places_kernel"]["dp4a"]
    assert found["_experts_kernel"]["mma.sync"] and found["_experts_kernel"]["cp.async.cg"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:80", "cuda:89", "cuda:100", "hip:gfx942", "hip:gfx1100"])
def test_compiles_for_other_gpus(target: str) -> None:
    assert len(_compiled(target)) >= 14  # without dp4a there are no row-vector forms


@pytest.mark.slow
def test_every_configuration_compiles() -> None:
    assert len(_compiled("cuda:90", "all")) == 16


TRAINING = """
import torch, transformers, hf_bitnet as hb, sys
device = sys.argv[1]
config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
for mixed in (False, True):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    hb.quantize_model(model, hb.BitNetQuantizationConfig.bitnet_b158())
    model.to(device)
    tokens = torch.arange(24).reshape(2, 12).to(device)
    with torch.autocast(device, torch.bfloat16, enabled=mixed):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    norms = [parameter.grad.float().norm().item() for parameter in model.parameters()]
    packed = hb.pack_model(model.eval())
    generated = packed.generate(tokens[:1, :4], max_new_tokens=4, do_sample=False)[0].tolist()
    print(loss.item(), *norms, *generated)
"""


def test_a_model_trains_and_generates_as_with_the_torch_bodies() -> None:
    """In float32, then under autocast to bfloat16."""
    found = []
    for body in ("triton", "reference"):
        out = _run("-c", TRAINING, DEVICE, HF_BITNET_KERNELS=body, TRITON_INTERPRET=str(int(DEVICE == "cpu")))
        found.append([[float(word) for word in line.split()] for line in out.splitlines()])
    for ours, theirs, tolerance in zip(*found, (1e-4, 2e-2), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=1e-6)


@pytest.mark.skipif(DEVICE != "cpu", reason="says what a machine without a GPU lacks")
def test_forced_without_the_interpreter_says_what_is_missing() -> None:
    with pytest.raises(AssertionError, match="triton: Triton compiles for GPUs; TRITON_INTERPRET=1"):
        _run("-c", "import hf_bitnet.kernels", HF_BITNET_KERNELS="triton")
