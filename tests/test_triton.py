"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter; and compiled for GPUs that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from hf_bitnet import BitNetQuantizationConfig, kernels, pack_model, quantize_model
from hf_bitnet.kernels import Layout, RowQuantization, cases, dispatch, parity, reference
from hf_bitnet.kernels.triton import support
from hf_bitnet.kernels.triton.operators import OPERATIONS
from hf_bitnet.modules import functional
from hf_bitnet.modules.functional import Latent
from hf_bitnet.quantizers import make_weight_quantizer
from hf_bitnet.ste import ESTIMATORS
from tests.test_kernels import _assert_equal

pytest.importorskip("triton", reason="the GPU kernels are written in Triton, which is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REPOSITORY = Path(__file__).resolve().parents[1]
INT8 = RowQuantization(-128, 127, 1e-5)
# the interpreter takes a second for some cases: of these a part in the fast suite, all in the slow one
EVERY = {"packed_linear": 9, "packed_linears": 5, "packed_int_linear": 4, "quantize_pack": 4, "norm_quantize_rows": 4}


def _moved(value: Any, device: str = DEVICE) -> Any:
    return parity.moved(value, device)


def _check(operation: str, every: int, seed: int = 0) -> None:
    for case, args in islice(cases.CASES[operation](seed), seed % every, None, every):
        found = OPERATIONS[operation](*_moved(args))
        _assert_equal(_moved(found, "cpu"), getattr(reference, operation)(*args), case, operation)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernel_equals_reference(operation: str) -> None:
    _check(operation, EVERY.get(operation, 1))


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("seed", [1, 2])
def test_kernel_equals_reference_in_every_case(operation: str, seed: int) -> None:
    _check(operation, 1, seed)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_fresh_memory_is_never_read(operation: str) -> None:
    """With new tensors filled by NaN or huge integers, a kernel that reads what it did not write gives itself away."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # this is what makes torch fill new memory
    try:
        _check(operation, 3 * EVERY.get(operation, 3), seed=1)
    finally:
        torch.use_deterministic_algorithms(False)


# ---- what the cases do not hold ----


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 16, 17, 300])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packed_product_in_each_of_its_forms(rows: int, bits: int) -> None:
    """Row-vector form, tiles, unpacked first; scales for the tensor and for groups of whole words."""
    lowest, step = (-1, 2) if bits == 1 else (-(2 ** (bits - 1)), 1)
    layout = Layout(bits, lowest, step, -0.5 if bits == 2 else 0.0)
    n, k = 21, 256
    packed = torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8)
    x, bias = torch.randn(rows, k), torch.randn(n)
    for scale in (torch.rand(1, 1), torch.rand(n, 1), torch.rand(n, 4)):
        args = x, packed, scale, bias, layout, INT8, torch.float32
        found = OPERATIONS["packed_linear"](*_moved(args))
        _assert_equal(found.cpu(), reference.packed_linear(*args), f"{rows} rows, scale {tuple(scale.shape)}")


@pytest.mark.parametrize("zero", [0.0, -0.5])
@pytest.mark.parametrize("shape", [(1, 1), (21, 1)])
def test_products_equal_the_torch_bodies_bit_for_bit(shape: tuple[int, int], zero: float) -> None:
    n, k, layout = 21, 256, Layout(2, -2, 1, zero)
    packed, scale, bias = torch.randint(0, 256, (n, k // 4), dtype=torch.uint8), torch.rand(shape), torch.randn(n)
    by_torch = next(body for body in dispatch.bodies("packed_linear") if body.name == "float32").function
    for rows in (1, 7, 300):
        args = torch.randn(rows, k), packed, scale, bias, layout, INT8, torch.float32
        assert torch.equal(OPERATIONS["packed_linear"](*_moved(args)).cpu(), by_torch(*args)), rows


def test_rows_longer_than_a_program_keeps_are_read_in_parts() -> None:
    x = torch.randn(2, 20_001)
    x[1, 20_000] = 50.0
    for found, expected in zip(OPERATIONS["quantize_rows"](_moved(x), *INT8), reference.quantize_rows(x, *INT8), strict=True):
        assert torch.equal(found.cpu(), expected)
    weight = torch.rand(20_001)
    args = x, weight, 1e-6, *INT8
    _assert_equal(_moved(OPERATIONS["norm_quantize_rows"](*_moved(args)), "cpu"), reference.norm_quantize_rows(*args), "long")


def test_columns_quantized_where_they_lie() -> None:
    """The rows of a transposed matrix, as the backward wants them."""
    x = torch.randn(70, 45).t()
    for found, expected in zip(OPERATIONS["quantize_rows"](_moved(x), *INT8), reference.quantize_rows(x, *INT8), strict=True):
        assert torch.equal(found.cpu(), expected)


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow):RuntimeWarning")
def test_nan_reaches_the_output() -> None:
    x = torch.ones(3, 8)
    x[1, 5] = torch.nan
    _, scale = OPERATIONS["quantize_rows"](_moved(x), *INT8)
    assert scale.isnan().flatten().tolist() == [False, True, False]
    packed = torch.full((4, 2), 0b10101010, dtype=torch.uint8)
    y = OPERATIONS["packed_linear"](*_moved((x, packed, torch.ones(1, 1), None, Layout(2, -1), INT8, torch.float32)))
    assert y.isnan().all(dim=1).tolist() == [False, True, False] and not y[0].isnan().any()


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow):RuntimeWarning")  # numpy's, in the interpreter
def test_what_is_no_number_gets_the_codes_of_the_definition() -> None:
    """NaN, infinities, and 0 / 0: code 0, or NaN where a float can say it."""
    x = torch.tensor([[torch.nan, 1.0, -2.0, 0.0], [torch.inf, 1.0, -2.0, 0.0], [-torch.inf, torch.nan, 5.0, 0.0]])
    scale, none = torch.tensor([[1.0], [0.5], [2.0]]), torch.zeros(3, 1)
    for args in ((x, scale, 0.0, -1, 1), (x, none, 0.0, -1, 1), (x, scale, -0.5, -2, 1)):
        assert torch.equal(OPERATIONS["quantize_weight"](*_moved(args), torch.int8).cpu(), reference.quantize_weight(*args))
        found = OPERATIONS["quantize_weight"](*_moved(args), torch.float32).cpu()
        torch.testing.assert_close(found, reference.quantize_weight(*args, torch.float32), equal_nan=True, rtol=0, atol=0)
    args = x, scale, -1, 1, Layout(2, -1)
    assert torch.equal(OPERATIONS["quantize_pack"](*_moved(args)).cpu(), reference.quantize_pack(*args))
    for found, expected in zip(OPERATIONS["quantize_rows"](_moved(x), *INT8), reference.quantize_rows(x, *INT8), strict=True):
        torch.testing.assert_close(found.cpu(), expected, equal_nan=True, rtol=0, atol=0)


_CODES, _ONE, _FLOAT = torch.ones(3, 16, dtype=torch.int8), torch.ones(1, 1), torch.float32
_PACKED, _EACH, _TERNARY = torch.zeros(5, 4, dtype=torch.uint8), torch.ones(3, 1), Layout(2, -1)
MISFITS: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "inputs": ("int_matmul", (_CODES, _CODES[:, :8]), r"int8 \(M, K\) and int8 \(N, K\)"),
    "scale of x": ("int_linear", (_CODES, _ONE, None, _CODES, _ONE, 0.0, None, _FLOAT), "with a scale"),
    "groups": ("int_linear", (_CODES, _EACH, None, _CODES, torch.ones(3, 3), 0.0, None, _FLOAT), r"scale of shape \(3, 3\)"),
    "bias": ("int_linear", (_CODES, _EACH, None, _CODES, _ONE, 0.0, torch.ones(1), _FLOAT), "bias of shape"),
    "bytes": ("packed_linear", (torch.ones(2, 32), _PACKED, _ONE, None, _TERNARY, INT8, _FLOAT), r"\(outputs, 8\)"),
    "bytes of codes": (
        "packed_int_linear",
        (_CODES, _EACH, None, _PACKED[:, :3], _ONE, None, _TERNARY, _FLOAT),
        r"\(outputs, 4\)",
    ),
    "unpacked": ("unpack", (_PACKED, 2, -1, 1, 17), "4 bytes hold no 17 codes"),
    "scales to pack": ("quantize_pack", (torch.ones(3, 8), torch.ones(2, 1), -1, 1, _TERNARY), r"scale of shape \(2, 1\)"),
    "thresholds to pack": ("sign_pack", (torch.ones(3, 8), torch.ones(3, 3)), r"scale of shape \(3, 3\)"),
    "gain": ("norm_quantize_rows", (torch.ones(2, 8), torch.ones(4), 1e-6, *INT8), r"norm of shape \(4,\)"),
    "gradient": ("fixed_matmul", (torch.ones(2, 3), torch.ones(2), _CODES, 0.0, None, _FLOAT), "fit no left operand"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_operands_that_do_not_fit_are_refused(misfit: str) -> None:
    """They would be read beyond their ends."""
    operation, args, said = MISFITS[misfit]
    with pytest.raises(ValueError, match=said):
        OPERATIONS[operation](*_moved(args))


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


def test_mean_of_a_long_row_is_summed_in_parts() -> None:
    x = torch.randn(1, 100_003)
    found = OPERATIONS["mean_magnitudes"](_moved(x)).cpu()
    assert torch.equal(found, reference.mean_magnitudes(x))


def test_largest_codes_do_not_overflow() -> None:
    x, w = torch.full((2, 4096), -128, dtype=torch.int8), torch.full((3, 4096), -128, dtype=torch.int8)
    assert (OPERATIONS["int_matmul"](*_moved((x, w))).cpu() == 2**14 * 4096).all()


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
    assert set(OPERATIONS) <= set(dispatch._BODIES)


def test_every_operator_has_a_body_for_gpus() -> None:
    for name in kernels.graph.OPERATORS:
        for key in ("CUDA", "XPU"):
            has = torch._C._dispatch_has_kernel_for_dispatch_key(f"hf_bitnet::{name}", key)
            assert has == (name not in ("pack_trits", "unpack_trits")), (name, key)


def test_numbers_of_rows_share_their_configuration() -> None:
    assert [support.bucket(rows) for rows in (1, 5, 8, 4095, 4096, 4097, 10**6)] == [1, 8, 8, 4096, 4096, 8192, 16384]


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


def _fake_model(packed: bool) -> Any:
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4)
        )
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


def test_a_processor_with_amx_decides_nothing_for_a_gpu(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_FLOAT_BFLOAT16", True)
    with FakeTensorMode(), torch.no_grad(), _Recorder() as recorder:
        a, codes = torch.empty(8, 24, device="cuda", dtype=torch.bfloat16), torch.empty(24, 16, device="cuda", dtype=torch.int8)
        kernels.fixed_matmul(a, None, codes, 0.0, None, a.dtype)
    assert recorder.seen == {"fixed_matmul"}


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
    assert len(found) == 14
    assert found["_product_kernel"]["wgmma.mma_async"] and found["_grouped_kernel"]["wgmma.mma_async"]
    assert found["_tiles_kernel"]["mma.sync"] and found["_tiles_kernel"]["cp.async.cg"]
    assert found["_rows_kernel"]["dp4a"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:80", "cuda:89", "cuda:100", "hip:gfx942", "hip:gfx1100"])
def test_compiles_for_other_gpus(target: str) -> None:
    assert len(_compiled(target)) >= 13  # without dp4a there is no row-vector form


@pytest.mark.slow
def test_every_configuration_compiles() -> None:
    assert len(_compiled("cuda:90", "all")) == 14


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
