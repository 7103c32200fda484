"""What an export wrote, and what became of reading it back. Own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class WrittenTensor:
    """One tensor of the target.

    Attributes:
        name: in the model. stored: in the file.
        kind: how it is stored there, in the format's own words, for example "TQ2_0" or "bfloat16".
        shape: of the values it stands for. bytes: in the file.
        why: why it is not stored in the kind that was asked for; empty where it is.
    """

    name: str
    stored: str
    kind: str
    shape: tuple[int, ...]
    bytes: int
    why: str = ""


@dataclass(frozen=True)
class Check:
    """One comparison of what was read back with the model.

    Attributes:
        reader: the program or library that read the files. what: was compared.
        passed: None where the reader is not there, or nobody can run the model; `detail` then says why.
        detail: figure and limit, or the first difference.
    """

    reader: str
    what: str
    passed: bool | None
    detail: str = ""

    def __str__(self) -> str:
        return f"{_WORDS[self.passed]:8} {self.reader}: {self.what}" + (f" ({self.detail})" if self.detail else "")


def _cell(text: str) -> str:
    """Of a Markdown table: one line, without its separator."""
    return text.strip().partition("\n")[0].replace("\\", "\\\\").replace("|", "\\|")


_WORDS = {True: "equal", False: "DIFFERS", None: "not run"}


class ParityError(RuntimeError):
    """What was read back is not the model that was written; nothing was left under the target's name.

    Attributes:
        checks: all that were made.
    """

    def __init__(self, message: str, checks: Sequence[Check]) -> None:
        super().__init__(message)
        self.checks = list(checks)


@dataclass(frozen=True)
class ExportReport:
    """What `export_model` did. `str()` prints it.

    Attributes:
        format: name of the format. path: of the folder. options: of the format, as they were used.
        tensors: every tensor that was written. checks: every comparison that was made.
        notes: what the target does differently from hf_bitnet, for example with activations.
        files: name -> bytes. seconds: writing and reading back. versions: of the libraries.
    """

    format: str
    path: str
    options: dict[str, Any]
    tensors: list[WrittenTensor] = field(repr=False)
    checks: list[Check]
    notes: list[str]
    files: dict[str, int]
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    @property
    def fallbacks(self) -> list[WrittenTensor]:
        """Tensors that are stored in another kind than was asked for."""
        return [tensor for tensor in self.tensors if tensor.why]

    def kinds(self) -> dict[str, int]:
        """Number of tensors of each kind, the most frequent first."""
        return dict(Counter(tensor.kind for tensor in self.tensors).most_common())

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self) | {"bytes": self.bytes}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ExportReport:
        """What `to_dict` gave, or an export.json. Raises KeyError or TypeError where it is none."""
        tensors = [WrittenTensor(**{**each, "shape": tuple(each["shape"])}) for each in values["tensors"]]
        checks = [Check(**each) for each in values["checks"]]
        rest = {each.name: values[each.name] for each in fields(cls) if each.name not in ("tensors", "checks")}
        return cls(tensors=tensors, checks=checks, **rest)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in self.kinds().items())
        lines = [f"{self.format}: {self.path}, {self.bytes / 1e6:.2f} MB in {self.seconds:.1f} s", f"tensors: {kinds}"]
        alike: dict[tuple[str, str], list[str]] = {}
        for each in self.fallbacks:
            alike.setdefault((each.kind, each.why), []).append(each.stored)
        for (kind, why), names in alike.items():
            which = names[0] if len(names) == 1 else f"{len(names)} tensors ({names[0]}, ...)"
            lines.append(f"fallback: {which} as {kind}: {why}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, *(f"parity: {check}" for check in self.checks)])

    def markdown(self) -> str:
        """A section of a model card."""
        rows = [f"| {check.reader} | {check.what} | {_WORDS[check.passed]} | {_cell(check.detail)} |" for check in self.checks]
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds().items())
        parts = [f"Format `{self.format}`, {self.bytes / 1e6:.2f} MB. Tensors: {kinds}."]
        parts += [f"- {note}" for note in self.notes]
        parts += [f"- `{each.stored}` is stored as {each.kind}: {each.why}" for each in self.fallbacks[:8]]
        if len(self.fallbacks) > 8:
            parts.append(f"- and {len(self.fallbacks) - 8} more tensors")
        table = ["| read by | compared | result | |", "|---|---|---|---|", *rows] if rows else ["It was not read back."]
        return "\n".join(["## Export", "", *parts, "", *table])
