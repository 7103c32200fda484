"""Which files of a folder go to the Hub, and when none does. Own.

A folder is pushed when it holds one whole model of this library, and nothing that was not meant for others: no state of a
training run, no pickle, nothing hidden, nothing half written, no link to elsewhere.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..config import NATIVE_METHOD, QUANT_METHOD
from ..export import ExportReport
from ..files import read_object
from ..hub import CARD

CONFIG, REPORT, INDEX, WEIGHTS = "config.json", "export.json", "model.safetensors.index.json", "model.safetensors"
# what Trainer puts beside every model that it saves
_LEFT_OUT = {"training_args.bin": "a pickle of the training arguments, which may hold a token"}
_REFUSED = {
    "checkpoint-*": "a checkpoint of a training run",
    "*.tmp": "half written",
    "*.incomplete": "half written",
    "*.part": "half written",
    "*.lock": "half written",
    "optimizer*": "state of a training run",
    "scheduler.pt": "state of a training run",
    "scaler.pt": "state of a training run",
    "rng_state*": "state of a training run",
    "trainer_state.json": "state of a training run",
    "events.out.tfevents*": "a log of a training run",
    "wandb": "logs of training runs",
    "mlruns": "logs of training runs",
    "runs": "logs of training runs",
    "*.npz": "arrays, which no format of models needs",
    "*.npy": "arrays, which no format of models needs",
    "*.h5": "weights that this library did not write",
    "*.bin": "a pickle, which runs code when it is opened",
    "*.pt": "a pickle, which runs code when it is opened",
    "*.pth": "a pickle, which runs code when it is opened",
    "*.pkl": "a pickle, which runs code when it is opened",
    "*.pickle": "a pickle, which runs code when it is opened",
    "*.joblib": "a pickle, which runs code when it is opened",
    "*.ckpt": "a pickle, which runs code when it is opened",
}
_HIDDEN_BUT_LEGAL = (".gitattributes",)
# first bytes of files that hold a whole model by themselves
_MAGIC = {".gguf": b"GGUF", ".onnx": b""}


def form_of(folder: Path) -> str | None:
    """What a folder holds: "train", "packed", the name of an export format, or None where it is no model of this library.

    Raises ValueError when its config.json or export.json is damaged.
    """
    settings = read_json(folder / CONFIG).get("quantization_config")
    ours = settings.get(QUANT_METHOD) if isinstance(settings, dict) else None
    if isinstance(ours, dict):
        return str(ours.get("form"))
    exported = read_json(folder / REPORT).get("format")
    if exported is not None:
        return str(exported)
    return NATIVE_METHOD if isinstance(settings, dict) and settings.get("quant_method") == NATIVE_METHOD else None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    return read_object(path, "write the folder again before it is pushed") if path.is_file() else {}


def report_of(folder: Path) -> ExportReport | None:
    """What its export.json says; None where there is none. Raises ValueError when it is none of ours."""
    values = read_json(folder / REPORT)
    try:
        report = ExportReport.from_dict(values) if values else None
        if report is not None:
            report.markdown()  # reads the rest of it
            sum(report.files.values())
        return report
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / REPORT} was not written by export_model ({error!r}); export the model again") from None


def report_with(path: Path, changed: Mapping[str, bytes]) -> bytes:
    """An export.json as it says of files that go in another content than the folder has."""
    values = read_json(path)
    values["files"] = {name: len(changed[name]) if name in changed else size for name, size in values["files"].items()}
    values["bytes"] = sum(values["files"].values())
    return (json.dumps(values, indent=1) + "\n").encode()


def files_to_push(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """(name -> file of everything that goes, name -> why of what does not). Raises ValueError where nothing may go."""
    files, left_out = _sorted_out(folder)
    _check_model(folder, files)
    _check_report(folder, files)
    return files, left_out


def _sorted_out(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    files: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    waiting = [folder]
    while waiting:
        for path in sorted(waiting.pop().iterdir()):
            name = path.relative_to(folder).as_posix()
            if path.name in _LEFT_OUT:
                left_out[name] = _LEFT_OUT[path.name]
                continue
            _refuse(path, name, folder)
            if path.is_file():
                files[name] = path
            elif form_of(path) is not None:
                left_out[f"{name}/"] = f"a model of its own, in form {form_of(path)!r}"
            else:
                waiting.append(path)
    return files, left_out


def _refuse(path: Path, name: str, folder: Path) -> None:
    # whoever opens a pickle does not look at the case of its name
    why = next((why for pattern, why in _REFUSED.items() if fnmatch.fnmatchcase(path.name.lower(), pattern)), None)
    if path.name.startswith(".") and path.name not in _HIDDEN_BUT_LEGAL:
        why = "hidden"
    elif path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        why = "a link to a file elsewhere"
    elif path.is_symlink() and path.is_dir():
        why = "a link to a folder"  # which may hold the link again
    elif not (path.is_file() or path.is_dir()):
        why = "no file"
    if why is not None:
        raise ValueError(
            f"{str(folder)!r} is not pushed: it holds {name!r} ({why}). Remove it, or push a folder that holds the model only, "
            "as save_pretrained, export_model and MeasuredRun write it"
        )


def _check_model(folder: Path, files: dict[str, Path]) -> None:
    """Whether there is a model, and all of its tensors."""
    whole = [path for name, path in files.items() if Path(name).suffix in _MAGIC]
    for path in whole:
        with open(path, "rb") as file:
            start = file.read(4)
        if not start or not start.startswith(_MAGIC[path.suffix]):
            raise ValueError(f"{path} is no {path.suffix[1:].upper()} file; export the model again")
    needed = [WEIGHTS] if WEIGHTS in files else []
    if not needed and INDEX in files:
        shards = read_json(files[INDEX]).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
            raise ValueError(f"{files[INDEX]} has no weight_map from names of tensors to files; save the model again")
        needed = sorted(set(shards.values()))
    if not whole and not (needed and CONFIG in files):
        raise ValueError(f"{str(folder)!r} holds no model: neither {CONFIG} and {WEIGHTS}, nor a file .gguf or .onnx")
    for name in needed:
        if name not in files:
            raise ValueError(f"{str(folder)!r} lacks {name}, which {INDEX} names; save the model again")
    for name in sorted(name for name in files if name.endswith(".safetensors")):
        try:
            with safe_open(files[name], framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{files[name]} is damaged or incomplete ({error}); save the model again") from None


def _check_report(folder: Path, files: dict[str, Path]) -> None:
    report = report_of(folder)
    if report is None:
        return
    failed = [check for check in report.checks if check.passed is False]
    if failed:
        raise ValueError(
            f"{str(folder)!r} is not pushed: its export.json says that it did not pass its parity checks ({failed[0].reader}, "
            f"{failed[0].what}: {failed[0].detail}); export the model again"
        )
    for name, size in report.files.items():
        found = files[name].stat().st_size if name in files else None
        if found != size and name != CARD:
            state = "is not there" if found is None else f"has {found:,} bytes"
            raise ValueError(
                f"{str(folder)!r} is not what was exported: {name} {state}, by export.json it has {size:,}; export it again"
            )
