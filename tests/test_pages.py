"""Pages of mapped files are given back, and nothing is lost by it; memory of tensors is kept."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import hf_bitnet
from hf_bitnet import pages
from hf_bitnet.cli import common, main
from hf_bitnet.pages import release_mapped

_MB = 2**20
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems say nothing of their pages")


def mapped(folder: Path) -> Tensor:
    """uint8 (32, 1 MB) in a file, with rows of 0, 1, 2, ..."""
    rows = torch.arange(32, dtype=torch.uint8)[:, None].expand(-1, _MB)
    save_file({"rows": rows.contiguous()}, folder / "rows.safetensors")
    with safe_open(folder / "rows.safetensors", "pt") as file:
        return file.get_tensor("rows")


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * pages.mmap.PAGESIZE


def holds_its_rows(tensor: Tensor) -> bool:
    return bool((tensor.amin(1) == torch.arange(32)).all() and (tensor.amax(1) == torch.arange(32)).all())


@on_linux
def test_what_was_read_is_given_back_and_can_be_read_again(tmp_path: Path) -> None:
    tensor = mapped(tmp_path)
    assert holds_its_rows(tensor)
    before = resident()
    released = release_mapped(tensor)
    if not released:
        pytest.skip("this container hides what kind its pages are of")
    assert 31 * _MB < released <= 32 * _MB and before - resident() > 30 * _MB
    assert holds_its_rows(tensor)


@on_linux
def test_what_was_changed_is_kept(tmp_path: Path) -> None:
    tensor = mapped(tmp_path)
    assert holds_its_rows(tensor)
    tensor[7] = 99
    assert release_mapped(tensor) == 0  # as a whole it is not the file's any more
    assert release_mapped(tensor[7]) == 0 and bool((tensor[7] == 99).all())
    release_mapped(tensor[8:])
    assert bool((tensor[7] == 99).all() and (tensor[8] == 8).all())


def test_memory_of_its_own_is_left_alone() -> None:
    written, untouched = torch.ones(_MB), torch.zeros(_MB)
    strided = torch.ones(64, _MB // 16).T
    assert [release_mapped(each) for each in (written, untouched, strided, torch.empty(0), torch.tensor(1.0))] == [0] * 5
    assert bool((written == 1).all() and (untouched == 0).all())
    assert release_mapped(torch.empty(_MB, device="meta")) == 0


def test_other_systems_and_containers_keep_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = mapped(tmp_path)
    assert holds_its_rows(tensor)
    monkeypatch.setattr(pages, "_madvise", lambda: None)
    assert release_mapped(tensor) == 0
    monkeypatch.undo()

    def hidden(*_: object) -> bytes:
        raise PermissionError

    monkeypatch.setattr(pages.os, "pread", hidden)
    assert release_mapped(tensor) == 0 and holds_its_rows(tensor)


_STEPS = """
import resource, torch, hf_bitnet
kept = hf_bitnet.keep_freed_memory() if {keep} else None
head, x, y = torch.nn.Linear(64, 16384), torch.randn(640, 64), torch.randint(0, 16384, (640,))
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.nn.functional.cross_entropy(head(x), y).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(kept, sum([faults() for _ in range(12)][4:]))
"""


@on_linux
def test_freed_memory_is_kept() -> None:
    """Of a step with large logits: most of its memory is that of the steps before, where all of it was new each time."""
    found = {}
    for keep in (False, True):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", _STEPS.format(keep=keep)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        kept, found[keep] = done.stdout.split()
        if keep and kept == "False":
            pytest.skip("another C library than glibc")
    assert int(found[True]) < 0.6 * int(found[False]), found


def test_without_such_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert hf_bitnet.keep_freed_memory() is False


def test_commands_keep_memory_in_their_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(common, "keep_freed_memory", lambda: calls.append(1))
    for own in (False, True):
        common.keep_memory(argparse.Namespace(own_process=own))
    assert calls == [1]
    seen = []
    monkeypatch.setattr("hf_bitnet.cli._run", lambda arguments: seen.append(arguments.own_process) or 0)
    monkeypatch.setattr(sys, "argv", ["hf-bitnet", "presets"])
    assert main() == 0 and main(["presets"]) == 0
    assert seen == [True, False]
