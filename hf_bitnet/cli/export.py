"""`hf-bitnet export`: a quantized model in one or several formats for other programs, each read back and compared."""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
from pathlib import Path
from typing import Any

from .. import export_model
from ..export import EXPORT_FORMATS, ExportFormat, ExportReport, ParityError
from ..files import refuse_existing
from .common import quietly, say, table
from .options import DIFFERENT, Failed, UsageError, value_of

_VERIFY = {"full": True, "codes": "codes", "none": False}
_FILE_SUFFIXES = (".gguf", ".onnx", ".safetensors")
# what an export raises for its user: a refusal, a difference, no room, a package that is not installed
_REFUSED = (ValueError, TypeError, RuntimeError, OSError, ImportError)


@quietly
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.list:
        formats = {name: _described(EXPORT_FORMATS.get(name)) for name in EXPORT_FORMATS}
        say(arguments, _listed(formats))
        return formats
    names = _names(arguments)
    if Path(arguments.out).suffix in _FILE_SUFFIXES and not Path(arguments.out).is_dir():
        raise UsageError(f"OUT is a folder, and {arguments.out} has the name of a file; for example {Path(arguments.out).stem}")
    options = _options(names, arguments.set)
    # one format fills OUT itself, several a folder each
    targets = {name: Path(arguments.out) / name if len(names) > 1 else Path(arguments.out) for name in names}
    for target in targets.values():
        refuse_existing(target, overwrite=arguments.force, advice="--force")
    exports, failures = [], {}
    for name, target in targets.items():
        try:
            report = _exported(arguments, name, target, options[name])
        except _REFUSED as error:  # the other formats are still made
            failures[name] = error
            exports.append(_failure(arguments, name, error))
        else:
            exports.append(report.to_dict())
            say(arguments, report, *([] if report.checks else ["parity: not checked (--verify none)"]))
    result = {"model": arguments.model, "out": str(arguments.out), "exports": exports}
    if failures:
        different = any(isinstance(error, ParityError) for error in failures.values())
        message = "; ".join(str(error) for error in failures.values())
        raise Failed(message, DIFFERENT if different else 1, result) from next(iter(failures.values()))
    return result


def _exported(arguments: argparse.Namespace, name: str, target: Path, options: dict[str, Any]) -> ExportReport:
    return export_model(
        arguments.model,  # opened anew for each format, which costs little: weights are mapped from the file
        target,
        format=name,
        overwrite=arguments.force,
        verify=_VERIFY[arguments.verify],
        base_model=arguments.base_model,
        name=arguments.name or Path(arguments.out).resolve().name,
        **options,
    )


def _failure(arguments: argparse.Namespace, name: str, error: BaseException) -> dict[str, Any]:
    checks = error.checks if isinstance(error, ParityError) else []
    if checks:
        say(arguments, f"{name}: not written", *(f"parity: {check}" for check in checks))
    return {"format": name, "error": str(error), "checks": [dataclasses.asdict(check) for check in checks]}


def _names(arguments: argparse.Namespace) -> list[str]:
    if arguments.model is None or arguments.out is None or arguments.format is None:
        raise UsageError("which model, where to, in which format? hf-bitnet export MODEL OUT --format NAME (--list shows them)")
    for name in arguments.format:
        try:
            EXPORT_FORMATS.get(name)
        except ValueError as error:
            raise UsageError(f"--format: {error}") from error
    return list(dict.fromkeys(arguments.format))


def _options(names: list[str], settings: list[str]) -> dict[str, dict[str, Any]]:
    """format -> its options. Raises UsageError on one that no format has, or that a format refuses."""
    options: dict[str, dict[str, Any]] = {name: {} for name in names}
    for setting in settings:
        key, found, text = setting.partition("=")
        if not found:
            raise UsageError(f"--set {setting}: write NAME=VALUE, for example --set dtype=float16")
        wanted, dot, option = key.strip().rpartition(".")
        if dot and wanted not in names:
            raise UsageError(f"--set {setting}: --format does not name {wanted!r}; it names {', '.join(names)}")
        takers = [name for name in ([wanted] if dot else names) if option in _described(EXPORT_FORMATS.get(name))["options"]]
        if not takers:
            raise UsageError(f"--set {setting}: no option {option!r}; {_legal([wanted] if dot else names)}")
        for name in takers:
            options[name][option] = value_of(text.strip())
    for name, chosen in options.items():
        try:
            EXPORT_FORMATS.get(name)(**chosen)
        except (ValueError, TypeError) as error:
            raise UsageError(str(error)) from error
    return options


def _legal(names: list[str]) -> str:
    options = {name: list(_described(EXPORT_FORMATS.get(name))["options"]) for name in names}
    return "; ".join(f"format {name!r} has {', '.join(found) if found else 'none'}" for name, found in options.items())


def _described(kind: type[ExportFormat]) -> dict[str, Any]:
    defaults = {
        field.name: field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
        for field in dataclasses.fields(kind)  # type: ignore[arg-type]
    }
    return {"summary": kind.summary, "readers": kind.readers, "options": defaults}


def _listed(formats: dict[str, Any]) -> str:
    rows = [("format", "what it is", "read by")]
    rows += [(name, each["summary"], each["readers"]) for name, each in formats.items()]
    lines = [table(rows), "", "options and their defaults (--set NAME=VALUE):"]
    for name, each in formats.items():
        options = "  ".join(f"{option}={json.dumps(value, default=str)}" for option, value in each["options"].items())
        lines += textwrap.wrap(f"{name}: {options or 'none'}", 110, initial_indent="  ", subsequent_indent="      ")
    return "\n".join(lines)
