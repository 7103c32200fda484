"""An export that is killed leaves nothing, or what was there before; the next one succeeds and clears up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import hf_bitnet as hb
from hf_bitnet.export import EXPORT_FORMATS
from tests.tiny import tiny

# One process imports everything once, and forks for each trial: the child exports, and is killed after a random part of the
# time that a whole export takes.
_PROGRAM = """
import hashlib, json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import hf_bitnet as hb
from hf_bitnet.hub import without_bars

place, format, trials = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
out = place / "out"

def state():
    if not out.exists():
        return None
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.name not in ("export.json", "README.md"):  # they hold the seconds it took
            found[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (out / "export.json").is_file() and (out / "README.md").is_file(), "half an export"
    return found

def export(model, overwrite):
    hb.export_model(place / model, out, format=format, overwrite=overwrite, verify="codes", progress=False)

random.seed(0)
export("old", False)
old = state()
start = time.perf_counter()
export("new", True)
whole = time.perf_counter() - start  # the first one imports on the way
new = state()
assert old != new
seen = {"killed": 0, "old": 0, "new": 0, "nothing": 0}
for trial in range(trials):
    fresh = trial % 2 == 0
    if fresh:
        import shutil; shutil.rmtree(out, ignore_errors=True)
    else:
        export("old", True)
    child = os.fork()
    if child == 0:
        try:
            export("new", not fresh)
        finally:
            os._exit(0)
    time.sleep(random.uniform(0, whole))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    seen["killed"] += os.WIFSIGNALED(status)
    found = state()
    assert found in ([None, new] if fresh else [old, new]), (trial, found)
    seen["nothing" if found is None else "old" if found == old else "new"] += 1
    export("new", True)
    assert state() == new
    left = [path.name for path in place.iterdir() if path.name not in ("out", "old", "new")]
    assert not left, left
print(json.dumps(seen))
"""


def interrupted(folder: Path, format: str, trials: int) -> dict[str, int]:
    for seed, name in enumerate(("old", "new")):
        model = tiny("llama", seed=seed, hidden_size=256, intermediate_size=512)[0]
        hb.pack_model(hb.quantize_model(model, hb.BitNetQuantizationConfig())).save_pretrained(folder / name)
    arguments = [sys.executable, "-c", _PROGRAM, str(folder), format, str(trials)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform == "win32", reason="forks, and kills with SIGKILL")
@pytest.mark.parametrize(
    ("format", "trials"),
    [("dense", 4), *(pytest.param(name, 20, marks=pytest.mark.slow) for name in EXPORT_FORMATS)],
)
def test_killed_export(format: str, trials: int, tmp_path: Path) -> None:
    seen = interrupted(tmp_path, format, trials)
    assert sum(seen.values()) - seen["killed"] == trials
    assert seen["killed"] > trials // 2  # else the kills came too late to mean anything
