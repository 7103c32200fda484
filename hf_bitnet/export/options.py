"""Checks of what a user may give a format, before anything is written. Own.

Each raises ValueError that says what came and what is legal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from .format import ExportFormat

# as huggingface_hub reads them
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*[KMGT]B\s*", re.IGNORECASE)


def check_choices(format: str, options: ExportFormat, legal: Mapping[str, Iterable[object]]) -> None:
    """Every option of `legal` is one of its values, and of that very type: 1 is not True, and a list is nothing."""
    for name, values in legal.items():
        given, values = getattr(options, name), tuple(values)
        if not any(type(given) is type(each) and given == each for each in values):
            raise ValueError(f"format {format!r}: {name}={given!r}; legal: {', '.join(map(str, values))}")


def check_shard_size(format: str, size: object) -> None:
    """Bytes, or words such as "5GB"."""
    number = isinstance(size, int) and not isinstance(size, bool) and size > 0
    said = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if not number and (said is None or float(said[1]) == 0.0):
        raise ValueError(
            f"format {format!r}: max_shard_size={size!r}; legal: '5GB', '200MB' and the like, or a number of bytes"
        )
