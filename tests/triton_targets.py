"""Compiles Triton kernels for GPUs that are not there: what a body would launch is compiled for a target, and not run.

    python -m tests.triton_targets cuda:90 [all]        # "all": every configuration that tuning would try

prints one JSON object: kernel -> how many forms of it were compiled, and how often instructions of interest occur in them.
Runs in a process of its own, because the interpreter, which the other tests use, replaces the compiler for good.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction, mangle_type

from hf_bitnet.kernels import Layout, RowQuantization
from hf_bitnet.kernels.triton import experts, packed
from hf_bitnet.kernels.triton.operators import OPERATIONS

COUNTED = ("wgmma.mma_async", "mma.sync", "dp4a", "cp.async.cg")
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_WARP = {"cuda": 32, "hip": 64}
INT8 = RowQuantization(-128, 127, 1e-5)
LAYOUTS = (Layout(1, -1, 2), Layout(2, -1), Layout(4, -8), Layout(8, -128))


class Compiler:
    """Takes the place of the launches."""

    def __init__(self, target: GPUTarget, everything: bool) -> None:
        self.target, self.everything = target, everything
        self.seen: set[str] = set()
        self.found: dict[str, dict[str, int]] = {}

    def launch(self, function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        given = dict(zip(function.arg_names, args, strict=False))
        given |= {name: value for name, value in options.items() if name in function.arg_names}
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(function.params):
            value = given[parameter.name]
            if parameter.is_constexpr or (type(value) is int and value == 1):  # as the launcher specializes
                signature[parameter.name], constants[(i,)] = "constexpr", value
                continue
            signature[parameter.name] = mangle_type(value)
            if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[(i,)] = [["tt.divisibility", 16]]
        chosen = {name: value for name, value in options.items() if name in _OPTIONS}
        form = repr((function.__name__, signature, constants, attributes, chosen))
        if form in self.seen:
            return
        self.seen.add(form)
        made = triton.compile(ASTSource(function, signature, constants, attributes), target=self.target, options=chosen)
        counts = self.found.setdefault(function.__name__, dict.fromkeys(("forms", *COUNTED), 0))
        counts["forms"] += 1
        for name in COUNTED:
            counts[name] += str(made.asm.get("ptx", "")).count(name)

    def install(self) -> None:
        def launch(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            self.launch(function, args, options)

        def tune(tuner: Any, *args: Any, **options: Any) -> None:
            for config in tuner.configs if self.everything else tuner.configs[:1]:
                tuner.fn.run(*args, **options, **config.all_kwargs())

        JITFunction.run, Autotuner.run = launch, tune
        packed.has_dp4a = experts.has_dp4a = lambda tensor: self.target.backend == "cuda"


def call_everything() -> None:
    """Every body, in the forms that differ in what is compiled."""
    m, k, n, out = 512, 1024, 2048, torch.bfloat16
    x, w = torch.randn(m, k).to(out), torch.randn(n, k)
    codes, w_codes = torch.ones(m, k, dtype=torch.int8), torch.ones(n, k, dtype=torch.int8)
    x_scale, tensor, channel, group = torch.rand(m, 1), torch.rand(1, 1), torch.rand(n, 1), torch.rand(n, k // 128)
    wide = torch.randn(2, 20000)
    call = OPERATIONS
    for rows in (x, x.t(), wide):
        call["quantize_rows"](rows, *INT8)
    call["quantize_columns"](x, x_scale, *INT8)
    call["norm_quantize_rows"](x, torch.ones(k, dtype=out), 1e-6, *INT8)
    call["norm_quantize_rows"](wide, torch.ones(20000), 1e-6, *INT8)
    call["scale_rows"](codes, x_scale, out)
    for rows, scale in ((w.reshape(1, -1), tensor), (w, channel)):
        call["mean_magnitudes"](rows)
        call["quantize_weight"](rows, scale, -0.5, -2, 1, torch.int8)
        call["quantize_sign"](rows, scale, torch.int8)
    for layout in LAYOUTS:
        stored = call["pack"](w_codes, layout.bits, layout.lowest, layout.step)
        call["unpack"](stored, layout.bits, layout.lowest, layout.step, k)
        call["quantize_pack"](w, group, -1, 1, layout)
        for rows in (1, 4, 16):
            for scale in (tensor, group):
                call["packed_linear"](x[:rows], stored, scale, None, layout, INT8, out)
        for rows in (4, 64):
            for scale in (tensor, group):
                weights = [(stored, scale, torch.ones(n)), (stored.clone(), scale, torch.ones(n))]
                call["packed_experts"](x[:rows], torch.zeros(rows, 2, dtype=torch.int64), [weights], layout, INT8, out)
    one, codes_one = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.int8)  # arguments of 1 are constants to the compiler
    call["quantize_rows"](one, *INT8)
    call["quantize_columns"](one, one, *INT8)
    call["mean_magnitudes"](one)
    call["quantize_weight"](one, one, 0.0, -1, 1, torch.int8)
    call["quantize_pack"](one, one, -1, 1, LAYOUTS[1])
    call["int_linear"](codes_one, one, one, codes_one, one, -0.5, one[0], out)
    call["packed_linear"](one, codes_one.view(torch.uint8), one, None, LAYOUTS[1], INT8, out)
    alone = (codes_one.view(torch.uint8), one, None)
    call["packed_experts"](one, torch.zeros(1, 1, dtype=torch.int64), [[alone]], LAYOUTS[1], INT8, out)
    call["sign_pack"](w, tensor)
    call["packed_linear"](x, stored, tensor, None, layout, INT8, out)
    call["int_matmul"](codes, w_codes)
    call["int_linear"](codes, x_scale, None, w_codes, tensor, 0.0, None, out)
    call["int_linear"](codes, x_scale, x_scale, w_codes, channel, -0.5, torch.ones(n), out)
    call["int_linear"](codes, x_scale, None, w_codes, group, -0.5, None, out)
    call["fixed_matmul"](x, None, w_codes[:k], 0.0, tensor, out)


def main(target: str, everything: bool) -> None:
    backend, _, generation = target.partition(":")
    compiler = Compiler(GPUTarget(backend, int(generation) if generation.isdigit() else generation, _WARP[backend]), everything)
    compiler.install()
    call_everything()
    print(json.dumps(compiler.found))


if __name__ == "__main__":
    main(sys.argv[1], "all" in sys.argv)
