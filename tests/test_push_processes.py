"""Pushes that are killed, and users who have only transformers: in processes of their own, which know the Hub by their
environment alone, as anybody's do."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from safetensors.torch import load_file, save_file

import hf_bitnet as hb
from tests.checkpoints import logits
from tests.hub_server import LoopbackHub
from tests.tiny import tiny

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[1]
REPO = "org/model"


def environment(hub: LoopbackHub, home: Path) -> dict[str, str]:
    return {**os.environ, **hub.environment, "HF_HOME": str(home), "PYTHONPATH": str(REPOSITORY)}


# ---- killed ----

# imports once; each line on its standard input is a folder, which a child of it pushes
_PUSHES = """
import os, sys
from hf_bitnet import push_to_hub
import hf_bitnet.publish.pushing
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        push_to_hub(line.strip(), "org/model", forms=("packed", "train"))
        os._exit(0)
    print(child, flush=True)
    status = os.waitpid(child, 0)[1]
    print(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True)
"""


class Pusher:
    """The process that pushes, and how its last push ended."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.stdin: IO[str] = process.stdin
        self.stdout: IO[str] = process.stdout
        self.child = 0
        assert self.stdout.readline() == "ready\n"

    def push(self, folder: Path) -> int:
        """The exit code; negative for a signal."""
        print(folder, file=self.stdin, flush=True)
        self.child = int(self.stdout.readline())
        return int(self.stdout.readline())

    def kill(self) -> None:
        while not self.child:
            pass
        os.kill(self.child, signal.SIGKILL)


@contextmanager
def pusher(hub: LoopbackHub, home: Path) -> Iterator[Pusher]:
    command = [sys.executable, "-c", _PUSHES]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(hub, home) | {"OMP_NUM_THREADS": "1"}, **streams) as process:
        try:
            yield Pusher(process)
        finally:
            process.kill()


def run_folder(path: Path, **fields: object) -> Path:
    model = hb.quantize_model(tiny("llama", seed=len(path.name))[0], hb.BitNetQuantizationConfig(**fields))  # type: ignore[arg-type]
    model.save_pretrained(path / "train")
    hb.pack_model(model).save_pretrained(path / "packed")
    return path


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_killed_push_leaves_the_old_state(hub: LoopbackHub, tmp_path: Path) -> None:
    old, new = run_folder(tmp_path / "old"), run_folder(tmp_path / "newer", weight="int4")
    draw = random.Random(0)
    with pusher(hub, tmp_path / "home") as processes:
        assert processes.push(old) == 0
        before, start = hub.files(REPO), len(hub.requests)
        branch = hub.repositories[REPO].branches["main"]
        assert processes.push(new) == 0
        complete, requests = hub.files(REPO), len(hub.requests) - start
        assert complete["model.safetensors"] == (new / "packed" / "model.safetensors").read_bytes()
        assert complete["train/model.safetensors"] == (new / "train" / "model.safetensors").read_bytes()
        old_states = 0
        for _ in range(10):
            branch.pop()
            hub.forget_uploads()
            assert hub.files(REPO) == before
            processes.child, last = 0, len(hub.requests) + draw.randint(1, requests)

            def kill(number: int, method: str, path: str, last: int = last) -> None:
                if number == last:
                    processes.kill()

            hub.before = kill
            assert processes.push(new) == -signal.SIGKILL
            hub.before = lambda number, method, path: None
            # a commit that was on its way when its sender died is still made: then all of it is there
            assert hub.files(REPO) in (before, complete)
            old_states += hub.files(REPO) == before
            if hub.files(REPO) == before:
                assert processes.push(new) == 0
            assert hub.files(REPO) == complete and len(branch) == 3
        assert old_states >= 5


# ---- only transformers ----

_LOADS = """
import json, sys
job = json.loads(sys.argv[1])
if not job["installed"]:
    sys.modules["hf_bitnet"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
assert sys.modules.get("hf_bitnet") is None
try:
    model = AutoModelForCausalLM.from_pretrained("org/model", trust_remote_code=job["trusts"])
    with torch.no_grad():
        save_file({"logits": model(**load_file(job["batch"])).logits}, job["out"])
    print(json.dumps([type(model).__name__, type(model).__module__, type(model.model.layers[0].mlp.up_proj).__name__]))
except Exception as error:
    print(json.dumps(f"{type(error).__name__}: {error}"))
"""


def load_elsewhere(hub: LoopbackHub, folder: Path, trusts: bool, installed: bool) -> list[str] | str:
    """(class, module, class of a layer) of the model that a process without `import hf_bitnet` loads, or its error."""
    job = {"trusts": trusts, "installed": installed, "batch": str(folder / "batch"), "out": str(folder / "out")}
    home = environment(hub, folder / "home") | {"TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _LOADS, json.dumps(job)], capture_output=True, text=True, timeout=300, env=home, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_remote_code_is_right_or_loud(hub: LoopbackHub, tmp_path: Path) -> None:
    model, batch = hb.quantize_model(tiny("llama")[0], hb.BitNetQuantizationConfig(weight="int4")), tiny("llama")[1]
    hb.pack_model(model)
    save_file(batch, tmp_path / "batch")
    hb.push_to_hub(model, REPO, remote_code=True)
    name, module, layer = load_elsewhere(hub, tmp_path, trusts=True, installed=True)
    assert (name, layer) == ("LlamaForCausalLM", "PackedBitLinear") and module.endswith("modeling_hf_bitnet_shim")
    assert load_file(tmp_path / "out")["logits"].equal(logits(model, batch))
    told = load_elsewhere(hub, tmp_path, trusts=True, installed=False)
    assert isinstance(told, str) and "ImportError" in told and "needs it: pip install hf_bitnet" in told
    told = load_elsewhere(hub, tmp_path, trusts=False, installed=False)
    assert isinstance(told, str) and "pip install hf_bitnet" in told
    shutil.rmtree(tmp_path / "home")
