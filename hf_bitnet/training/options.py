"""Fields of QATArguments that hold an object: written as the object, a dict, JSON text or the path of a JSON file. Own.

A feature with knobs of its own is one frozen dataclass `Options` and one field `dict | str | None` of QATArguments, which
keeps `HfArgumentParser(QATArguments)` working (`--weight_noise '{"kind": "subset"}'`), and JSON-serialisable. The dataclass
checks its own values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

Options = TypeVar("Options")


def read_options(kind: type[Options], field: str, value: Any) -> Options | None:
    """What the user wrote in `field` as a `kind`; None stays None.

    Raises TypeError or ValueError when it is none of the legal forms, when a key is unknown, or when a key that has no
    default is missing.
    """
    if value is None or isinstance(value, kind):
        return value
    given = read_mapping(field, value, f"a {kind.__name__}")
    legal = [each.name for each in fields(kind)]  # type: ignore[arg-type]
    for key in given:
        if key not in legal:
            close = get_close_matches(str(key), legal, n=1)
            hint = f". Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{field} has no key {key!r}; legal: {', '.join(map(repr, legal))}{hint}")
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{field}: {error}") from None


def read_mapping(field: str, value: Any, also: str = "") -> dict[str, Any]:
    """A dict, JSON text or the path of a JSON file as a dict. `also` names a further legal form, for the errors."""
    forms = f"{f'{also}, ' if also else ''}a dict, JSON text ('{{...}}') or the path of a JSON file"
    if isinstance(value, Mapping):
        return dict(value)
    if not isinstance(value, str):
        raise TypeError(f"{field} must be {forms}, got {type(value).__name__} {value!r}")
    text = value
    if not value.lstrip().startswith(("{", "[")):
        try:
            text = Path(value).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"{field}={value!r} is no file that can be read ({error.strerror}); legal: {forms}") from None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{field}={value!r} is not valid JSON ({error}); legal: {forms}") from None
    if not isinstance(found, dict):
        raise TypeError(f"{field}={value!r} holds a {type(found).__name__}; legal: {forms}")
    return found


def plain(value: Any) -> Any:
    """Options as what their JSON text reads back as: dicts, and lists in place of tuples. Anything else as it is."""
    return _listed(asdict(value)) if is_dataclass(value) and not isinstance(value, type) else value


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(each) for key, each in value.items()}
    return [_listed(each) for each in value] if isinstance(value, list | tuple) else value


def number(name: str, value: Any, lowest: float, highest: float = float("inf"), hint: str = "") -> float:
    """Raises TypeError or ValueError unless `value` is a finite number from `lowest` to `highest`."""
    legal = f"at least {lowest:g}" if highest == float("inf") else f"from {lowest:g} to {highest:g}"
    hint = f"; {hint}" if hint else ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number {legal}, got {value!r}{hint}")
    if not lowest <= value <= highest or value == float("inf"):
        raise ValueError(f"{name}={value!r} is out of range; legal: {legal}{hint}")
    return float(value)


def whole(name: str, value: Any, lowest: int = 1) -> None:
    """Raises ValueError unless `value` is a whole number of at least `lowest`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ValueError(f"{name} must be a whole number of at least {lowest}, got {value!r}; for example {name}=4")
