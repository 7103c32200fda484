"""Checkpoints that can be trusted after the process was killed. Own.

Trainer writes `trainer_state.json` last, so a folder without it was being written when the process died.
"""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)
_TEACHER_FILE, _SCHEMES_FILE = "qat_teacher.json", "qat_schemes.json"
# of Trainer, peft, FSDP and DeepSpeed
_WEIGHTS = ("*model*.safetensors*", "*model*.bin*", "*/adapter_model.*", "*model_fsdp*", "global_step*", "*.distcp")
_SAVED_BY_TORCH = ("optimizer.[bp]*", "scheduler.pt", "scaler.pt", "rng_state*.pth", "training_args.bin", "*model*.bin")
_OLD_FORMAT = b"\x80"
_OPTIMIZERS = ("optimizer*", "global_step*")


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


def complete_checkpoint(output_dir: str | Path, world_size: int) -> str | bool:
    """`last_complete_checkpoint`; raises ValueError where there are some, and none is complete. True where there is none,
    for which Trainer has an error.
    """
    found = last_complete_checkpoint(output_dir, world_size)
    broken = {} if found else {path: _number(path) for path in sorted(Path(output_dir).glob("checkpoint-*"))}
    said = [f"{path.name}: {_missing(path, int(step[1]), world_size)}" for path, step in broken.items() if step]
    if said:
        raise ValueError(
            f"{str(output_dir)!r} holds no complete checkpoint to resume from ({'; '.join(said)}); leave "
            "resume_from_checkpoint out to begin anew"
        )
    return found or True


def _number(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"checkpoint-(\d+)", path.name) if path.is_dir() else None


def _missing(folder: Path, step: int, world_size: int) -> str | None:
    try:
        state = json.loads((folder / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return "no readable trainer_state.json"
    if state.get("global_step") != step:
        return f"its state is of step {state.get('global_step')}"
    if not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
        return "no weights"
    if torn := _torn(folder):
        return torn
    random_states = len(list(folder.glob("rng_state*.pth")))
    if random_states and not has_optimizer(folder):
        return "no state of the optimizer"
    # other ranks may still be writing theirs when the main one is done; none at all is save_only_model
    if 0 < random_states < world_size:
        return f"{random_states} of {world_size} random states"
    return None


def has_optimizer(folder: Path) -> bool:
    """Whether a checkpoint has the state of the optimizer."""
    return any(next(folder.glob(pattern), None) for pattern in _OPTIMIZERS)


def _torn(folder: Path) -> str | None:
    """Which of Trainer's files was not written to its end. Their beginnings and ends are looked at, not what is between."""
    for path in sorted(path for path in folder.glob("*") if path.is_file()):
        if any(path.match(pattern) for pattern in _SAVED_BY_TORCH) and not _whole_by_torch(path):
            return f"{path.name} is cut short or damaged"
        if path.match("*model*.safetensors"):
            try:
                with safe_open(path, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                return f"{path.name} is cut short or damaged ({error})"
    return None


def _whole_by_torch(path: Path) -> bool:
    with open(path, "rb") as file:
        of_old = file.read(1) == _OLD_FORMAT  # which says nothing of its end
    return of_old or zipfile.is_zipfile(path)


def check_whole(folder: str | Path) -> None:
    """Raises ValueError that names the file, when a checkpoint to be resumed was not written to its end."""
    if torn := _torn(Path(folder)):
        raise ValueError(
            f"{folder} cannot be resumed from: {torn}; resume_from_checkpoint=True takes the last complete checkpoint"
        )


def check_resumed(folder: str | Path, schemes: Mapping[str, str], teacher: str | None) -> None:
    """Raises ValueError for a checkpoint that was cut short, or trained with another quantization or teacher."""
    check_whole(folder)
    check_schemes(folder, schemes)
    check_teacher(folder, teacher)


def write_teacher(folder: str | Path, fingerprint: str | None) -> None:
    """Notes beside a checkpoint which teacher it was trained with; None for none."""
    (Path(folder) / _TEACHER_FILE).write_text(json.dumps({"fingerprint": fingerprint}) + "\n")


def check_teacher(folder: str | Path, fingerprint: str | None) -> None:
    """Raises ValueError when the checkpoint was trained with another teacher; says nothing when it has no note.

    Of several processes the first one compares (others may hold an empty copy until sharding hands the weights out), and all
    raise: one that went on would wait for the others for ever.
    """
    different = [_other_teacher(folder, fingerprint) if PartialState().is_main_process else None]
    if said := broadcast_object_list(different)[0]:
        raise ValueError(said)


def _other_teacher(folder: str | Path, fingerprint: str | None) -> str | None:
    """What to say of a checkpoint that was trained with another teacher; None of others."""
    said = note(folder, _TEACHER_FILE)
    if said is None:
        return None
    before = said.get("fingerprint")
    if before == fingerprint:
        return None
    there, now = ("no teacher" if each is None else "a teacher" for each in (before, fingerprint))
    differs = "another teacher than the one given now" if before and fingerprint else f"{there}, and there is {now} now"
    return (
        f"{folder} was trained with {differs}, so resuming would not continue that run. Give the teacher that it had. "
        "With teacher='self' build the trainer from the model the run started from (not from the checkpoint), then call "
        "trainer.train(resume_from_checkpoint=True)"
    )


def write_schemes(folder: str | Path, schemes: Mapping[str, str]) -> None:
    """Notes beside a checkpoint how each layer is quantized: name -> words."""
    (Path(folder) / _SCHEMES_FILE).write_text(json.dumps(schemes, indent=1) + "\n")


def check_schemes(folder: str | Path, schemes: Mapping[str, str]) -> None:
    """Raises ValueError when the checkpoint was trained with another quantization; says nothing when it has no note."""
    before = note(folder, _SCHEMES_FILE)
    if before is None:
        return
    different = [name for name in sorted(before.keys() | schemes.keys()) if before.get(name) != schemes.get(name)]
    if different:
        name = different[0]
        was, now = (each.get(name, "not quantized") for each in (before, schemes))
        raise ValueError(
            f"{folder} was trained with another quantization of {len(different)} layers, so resuming would not continue that "
            f"run: {name} was {was} and is {now} now. Quantize the model as it was, or begin a new run from "
            "the weights of that checkpoint: from_pretrained(checkpoint)"
        )


def note(folder: str | Path, name: str) -> Any:
    """What stands in a file beside a checkpoint; None where there is none, or none that can be read."""
    try:
        return json.loads((Path(folder) / name).read_text())
    except (OSError, ValueError):
        return None
