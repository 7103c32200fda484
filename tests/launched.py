"""Recipes started by `accelerate launch` with a shipped configuration, on processes in place of GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = REPOSITORY / "recipes"
_SCRIPT = """
import importlib.util, os, sys
from tests.test_training_distributed import take_processes_for_gpus
if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    take_processes_for_gpus()
spec = importlib.util.spec_from_file_location("recipe", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["recipe"] = module
spec.loader.exec_module(module)
module.main(sys.argv[2:])
"""


def launch(recipe: str, config: str, words: list[str], folder: Path, *options: str) -> dict[str, Any]:
    """Runs `recipes/<recipe>.py` with `recipes/accelerate/<config>.yaml` and the command line `words`.

    `options` are accelerate's, beside the file.

    Returns what the run wrote to `folder`/out/results.json.
    """
    script = folder / "launched.py"
    script.write_text(_SCRIPT)
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(RECIPES / "accelerate" / f"{config}.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [*launcher, *options, str(script), str(RECIPES / f"{recipe}.py"), *words]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out" / "results.json").read_text())
