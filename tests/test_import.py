"""`import hf_bitnet` is cheap and pulls in nothing the user did not ask for. Each case runs in a fresh interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 0.3
UNWANTED = ("triton", "peft", "matplotlib", "torchao")

# what was loaded before does not count: transformers brings in what it likes
_PROBE = """
import json, sys, time
{before}
loaded = set(sys.modules)
start = time.perf_counter()
import hf_bitnet
seconds = time.perf_counter() - start
new = {{name.split(".")[0] for name in set(sys.modules) - loaded}}
print(json.dumps({{"seconds": seconds, "new": sorted(new)}}))
"""


def _import_after(before: str) -> dict:
    """Seconds that `import hf_bitnet` takes after the statement `before`, and the packages it loads."""
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    completed = subprocess.run(
        [sys.executable, "-c", _PROBE.format(before=before)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout.splitlines()[-1])


def test_import_after_transformers_is_fast() -> None:
    # the best of three: a busy machine makes a run slower, never faster
    seconds = []
    for _ in range(3):
        seconds.append(_import_after("import transformers")["seconds"])
        if seconds[-1] < LIMIT_SECONDS:
            return
    pytest.fail(f"import hf_bitnet took {min(seconds):.2f} s at best, the limit is {LIMIT_SECONDS} s")


@pytest.mark.parametrize("before", ["import transformers", "pass"])
def test_import_loads_no_optional_package(before: str) -> None:
    assert not set(_import_after(before)["new"]) & set(UNWANTED)


def test_import_alone_does_not_load_torch() -> None:
    assert "torch" not in _import_after("pass")["new"]
