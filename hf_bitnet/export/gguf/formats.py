"""Formats "gguf" (llama.cpp and what is built on it) and "i2_s" (bitnet.cpp). Own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..format import EXPORT_FORMATS, ExportFormat, Progress, Source
from ..options import check_choices
from ..report import Check, WrittenTensor
from . import parity, planning
from .contents import Codes
from .kinds import KINDS, LEGAL, PREFERENCE, RECENT, stored_steps
from .planning import Plan
from .writing import tokenizer_notes, write_file

_FLOATS = {"f16": "F16", "bf16": "BF16", "f32": "F32"}


class _File(ExportFormat):
    """What the two formats share; the options are those of the subclasses."""

    library: ClassVar[str | None] = None
    program: ClassVar[str]
    command: ClassVar[str]
    other: str
    strict: bool
    file_name: str

    def _check_options(self, format: str, floats: Iterable[str] = _FLOATS) -> None:
        check_choices(format, self, {"other": floats, "strict": (True, False)})
        named = isinstance(self.file_name, str)
        if not named or Path(self.file_name).name != self.file_name or not self.file_name.endswith(".gguf"):
            raise ValueError(f"format {format!r}: file_name={self.file_name!r}; a name that ends in .gguf, without folders")

    def _chooser(self, source: Source) -> planning.Chooser:
        raise AssertionError("abstract")

    def _plan(self, source: Source) -> Plan:
        return planning.plan_of(source, self.program, self._chooser(source), KINDS[_FLOATS[self.other]])

    def refusals(self, source: Source) -> list[str]:
        found = planning.refusals(source, self.program)
        if found:
            return found
        plan = self._plan(source)
        entries = plan.entries
        found = self._unheld(entries)
        try:
            tokenizer_notes(source, plan)
        except ValueError as error:
            found = [*found, str(error)]
        if self.strict and not found:
            found = [f"{each.name} would be {each.kind.name}: {each.why} (strict=True)" for each in entries if each.why]
        return found

    def _unheld(self, entries: list[planning.Entry]) -> list[str]:
        """Why the format is not what the user wants, though it could hold the model."""
        return []

    def write(self, source: Source, folder: Path, progress: Progress) -> list[WrittenTensor]:
        return write_file(folder / self.file_name, source, self._plan(source), progress)

    def compare(self, source: Source, folder: Path, written: list[WrittenTensor], logits: bool) -> list[Check]:
        plan = self._plan(source)
        values = parity.compare_values(folder / self.file_name, plan)
        if not logits or not values.passed:
            return [values]
        return [values, *self._logits(folder / self.file_name, source, plan)]

    def _logits(self, path: Path, source: Source, plan: Plan) -> list[Check]:
        raise AssertionError("abstract")

    def notes(self, source: Source) -> list[str]:
        plan = self._plan(source)
        schemes = {layer.activation for layer in source.layers.values()}
        here = " or ".join(sorted(f"to {each.bits} bits" if each.quantizes else "not at all" for each in schemes))
        target = f"activations: {self.program} rounds them to 8 bits {self._activation_blocks}, this library {here}"
        return [target, *plan.metadata.notes, *self._kind_notes(plan), *tokenizer_notes(source, plan)]

    def use(self, source: Source, folder: Path) -> str:
        return f'```sh\n{self.command} -m {self.file_name} -p "Once upon a time"\n```\n\nRead by {self.readers}.'

    _activation_blocks: ClassVar[str]

    def _kind_notes(self, plan: Plan) -> list[str]:
        return []


@EXPORT_FORMATS.register("gguf")
@dataclass(frozen=True)
class Gguf(_File):
    """Args:
    kind: of the quantized tensors: "TQ2_0", "TQ1_0", "Q2_0", "Q1_0", "Q2_K", "Q4_0", "Q8_0", "F16" or "F32"; None takes the
        smallest that is fast. A tensor that it cannot hold exactly gets the next one that can, and the report says why.
    other: of float matrices (embeddings, a head): "f16", "bf16" or "f32". Vectors and norms are float32.
    strict: refuse instead of taking another kind for a tensor.
    file_name: of the one file.
    """

    summary: ClassVar[str] = "one GGUF file with ternary, 1-, 2-, 4- or 8-bit blocks"
    readers: ClassVar[str] = "llama.cpp and what is built on it"
    program: ClassVar[str] = "llama.cpp"
    command: ClassVar[str] = "llama-cli"
    _activation_blocks: ClassVar[str] = "with one scale for 32 or 256 of them"

    kind: str | None = None
    other: str = "f16"
    strict: bool = False
    file_name: str = "model.gguf"

    def __post_init__(self) -> None:
        self._check_options("gguf")
        check_choices("gguf", self, {"kind": (*LEGAL, None)})

    def _chooser(self, source: Source) -> planning.Chooser:
        return planning.choices(source, self.kind, PREFERENCE)

    def _unheld(self, entries: list[planning.Entry]) -> list[str]:
        codes = [(entry, each) for entry in entries if isinstance(each := entry.content, Codes)]
        if self.kind is None or any(entry.kind.name == self.kind for entry, _ in codes):
            return []
        first, content = codes[0]
        grid = content.layer.quantizer.grid
        legal = [name for name in LEGAL if stored_steps(KINDS[name], grid) is not None]
        return [
            f"kind={self.kind!r} can hold none of its tensors ({first.name}: {first.why}); choose one of "
            f"{', '.join(legal)}, or leave kind out"
        ]

    def _logits(self, path: Path, source: Source, plan: Plan) -> list[Check]:
        return parity.compare_logits(path, source, plan)

    def _kind_notes(self, plan: Plan) -> list[str]:
        used = {entry.kind.name for entry in plan.entries}
        notes = []
        if recent := sorted(used & RECENT):
            notes.append(f"{', '.join(recent)}: known to llama.cpp from the middle of 2026 on")
        if "Q2_0" in used:
            notes.append("Q2_0: fast on Nvidia, Apple, Vulkan and ARM; on x86 processors llama.cpp has no fast code for it")
        if used & {"TQ1_0", "TQ2_0"}:
            notes.append("TQ1_0, TQ2_0: fast on processors; llama.cpp has no CUDA code for them (kind='Q2_0' has)")
        return notes


@EXPORT_FORMATS.register("i2_s")
@dataclass(frozen=True)
class I2S(_File):
    """Args:
    other: of float matrices: "f16" or "f32". Vectors and norms are float32.
    strict: refuse instead of taking another kind for a tensor that is not ternary with one scale, or whose rows do not divide.
    file_name: of the one file.
    """

    summary: ClassVar[str] = "one GGUF file of bitnet.cpp: ternary, one scale a tensor, laid out for x86"
    readers: ClassVar[str] = "bitnet.cpp"
    program: ClassVar[str] = "bitnet.cpp"
    command: ClassVar[str] = "python run_inference.py"
    _activation_blocks: ClassVar[str] = "with one scale a token"

    other: str = "f16"
    strict: bool = False
    file_name: str = "model.gguf"

    def __post_init__(self) -> None:
        self._check_options("i2_s", ("f16", "f32"))

    def _chooser(self, source: Source) -> planning.Chooser:
        # what the llama.cpp of 2024 in it knows
        return planning.choices(source, "I2_S", ("Q4_0", "Q8_0", "F16", "F32"))

    def _unheld(self, entries: list[planning.Entry]) -> list[str]:
        blocks = [entry for entry in entries if isinstance(entry.content, Codes) and entry.stored.startswith("blk.")]
        if any(entry.kind.name == "I2_S" for entry in blocks):
            return []
        return [f"{blocks[0].name}: {blocks[0].why}; export with format='gguf'"] if blocks else ["no layer is quantized"]

    def _logits(self, path: Path, source: Source, plan: Plan) -> list[Check]:
        detail = "bitnet.cpp is no Python package; the bytes were read back by hf_bitnet's own reader only"
        return [Check("bitnet.cpp", "logits", None, detail)]

    def _kind_notes(self, plan: Plan) -> list[str]:
        return [
            "laid out as bitnet.cpp does on x86 (128 weights in 32 bytes); its ARM build has another layout under the same id",
            "llama.cpp itself refuses the file: it has given up this kind",
        ]
