"""Two processes on one machine (gloo) train as one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.qat import make_trainer, quantized, weights
from tests.tiny import tiny

REPOSITORY = Path(__file__).resolve().parents[1]


def run(folder: str, batch: int, name: str, teacher: str, **fields: Any) -> dict[str, Tensor]:
    """Two steps of plain gradient descent; the weights afterwards, and what was logged."""
    torch.set_num_threads(1)
    descent = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 2}
    made = {"none": None, "self": "self", "other": tiny(name, seed=1)[0]}[teacher]
    trainer = make_trainer(
        folder,
        quantized(name),
        name,
        made,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=2,
        **descent,
        **fields,
    )
    trainer.train()
    trainer.evaluate()  # its loss is Trainer's own mean of means, which depends on the number of ranks
    logs = [log[key] for log in trainer.state.log_history if "loss" in log for key in ("loss", "quant/flip_rate")]
    assert trainer.model is not None
    return {**weights(trainer.model), "logs": torch.tensor(logs)}


_SCRIPT = """
import os, sys
from safetensors.torch import save_file
from tests.test_training_distributed import run
folder, name, teacher = sys.argv[1:]
result = run(folder, 2, name, teacher)
save_file(result, f"{folder}/result-{os.environ['RANK']}.safetensors")
"""


def _launch(script: str, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no_python"]
    done = subprocess.run(
        [*command, sys.executable, "-c", script, *arguments], env=environment, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "teacher"), [("llama", "none"), ("llama", "other"), ("t5", "none"), ("t5", "other")])
def test_two_ranks_equal_one(name: str, teacher: str, tmp_path: Path) -> None:
    _launch(_SCRIPT, str(tmp_path), name, teacher)
    ranks = [load_file(tmp_path / f"result-{rank}.safetensors") for rank in (0, 1)]
    one = run(str(tmp_path), 4, name, teacher)
    before = quantized(name).state_dict()
    torch.testing.assert_close(ranks[0]["logs"], one["logs"], rtol=1e-4, atol=1e-4)
    for key in one.keys() - {"logs"}:
        assert torch.equal(ranks[0][key], ranks[1][key])
        moved = (one[key] - before[key]).float().norm()
        assert (ranks[0][key] - one[key]).float().norm() <= 2e-3 * moved + 1e-7, key
