"""The folder of a run: what an earlier run left there, and folders that get their names when they are complete. Own.

train/            the trained float weights (BitLinear), to train on or to convert to other formats
packed/           the packed model with tokenizer and card: what is deployed
results.json      all figures, settings, tokens, seconds and versions
checkpoint-*/     of Trainer
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from .arguments import QATArguments

TRAIN_FOLDER, PACKED_FOLDER, RESULTS_FILE = "train", "packed", "results.json"


def earlier_run(folder: str | os.PathLike[str], also: Sequence[str] = ()) -> list[str]:
    """Names of what a run left in a folder; `also` are names that a run writes beside the usual ones."""
    return sorted(path.name for path in _leavings(Path(folder), also))


def clear(folder: Path, also: Sequence[str] = ()) -> None:
    """Removes what a run writes, and nothing else."""
    for path in list(_leavings(folder, also)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _leavings(folder: Path, also: Sequence[str]) -> Iterator[Path]:
    for name in (TRAIN_FOLDER, PACKED_FOLDER, RESULTS_FILE, "checkpoint-*", *also):
        yield from folder.glob(name)


def resumes_from(args: QATArguments) -> str | bool | None:
    """What `Trainer.train` takes: True for the last checkpoint, a path, or None."""
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() in ("false", "none", ""):
        return None
    return True if str(wanted).lower() == "true" else str(wanted)


def refuse_earlier(folder: Path, args: QATArguments, also: Sequence[str], *, overwrite: bool) -> None:
    """Raises ValueError where an earlier run would be lost, or deleted before it could go on."""
    found = earlier_run(folder, also)
    if found and not overwrite and resumes_from(args) is None:
        raise ValueError(
            f"{str(folder)!r} holds {', '.join(found)} of an earlier run; choose another output_dir, continue that run "
            "(resume_from_checkpoint='true'), or replace it (overwrite=True)"
        )
    if overwrite and resumes_from(args) is not None:
        raise ValueError("overwrite=True would delete the checkpoint that resume_from_checkpoint asks for; give one of them")
