"""Checkpoints that can be trusted after the process was killed. Own.

Trainer writes `trainer_state.json` last, so a folder without it was being written when the process died.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
_TEACHER_FILE = "qat_teacher.json"


def last_complete_checkpoint(output_dir: str | Path, world_size: int, up_to: int | None = None) -> str | None:
    """The newest checkpoint folder (of step `up_to` at most) that was written to its end, or None. Says which are skipped."""
    folders = [(int(found[1]), path) for path in Path(output_dir).glob("checkpoint-*") if (found := _number(path))]
    for step, path in sorted(folders, reverse=True):
        if up_to is not None and step > up_to:
            continue
        missing = _missing(path, step, world_size)
        if missing is None:
            return str(path)
        logger.warning("skipping %s: %s; it was cut short while being written", path, missing)
    return None


def _number(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"checkpoint-(\d+)", path.name) if path.is_dir() else None


def _missing(folder: Path, step: int, world_size: int) -> str | None:
    try:
        state = json.loads((folder / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return "no readable trainer_state.json"
    if state.get("global_step") != step:
        return f"its state is of step {state.get('global_step')}"
    random_states = len(list(folder.glob("rng_state*.pth")))
    # other ranks may still be writing theirs when the main one is done; none at all is save_only_model
    if 0 < random_states < world_size:
        return f"{random_states} of {world_size} random states"
    return None


def write_teacher(folder: str | Path, fingerprint: str) -> None:
    """Notes beside a checkpoint which teacher it was trained with."""
    (Path(folder) / _TEACHER_FILE).write_text(json.dumps({"fingerprint": fingerprint}) + "\n")


def check_teacher(folder: str | Path, fingerprint: str) -> None:
    """Raises ValueError when the checkpoint was trained with another teacher; says nothing when it has no note."""
    try:
        note: Any = json.loads((Path(folder) / _TEACHER_FILE).read_text())
    except (OSError, ValueError):
        return
    if note.get("fingerprint") != fingerprint:
        raise ValueError(
            f"{folder} was trained with another teacher than the one given now, so resuming would not continue that run. "
            "With teacher='self' build the trainer from the model the run started from (not from the checkpoint), then call "
            "trainer.train(resume_from_checkpoint=True)"
        )
