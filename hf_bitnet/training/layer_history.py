"""Which layer hurts, over the run: the figures of each layer at each logging step, in memory and as JSON lines. Own.

The file `quant_layers.jsonl` lies in the output folder; a line is a logging step: {"step", "layers": [names], and for each
figure a list in their order}. A resumed run continues it, without the lines behind its checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = "quant_layers.jsonl"


class LayerHistory:
    """Entries of a run.

    Attributes:
        entries: one dict a logging step, as the lines of the file.
    """

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self._file: Path | None = None

    def start(self, folder: str | Path, step: int, writes: bool) -> None:
        """Before a run that begins after `step` steps. `writes`: whether this process writes the file."""
        path = Path(folder) / FILE
        self.entries = [entry for entry in _read(path) if entry["step"] <= step] if step else []
        self._file = path if writes else None
        if writes and path.exists():
            path.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries), encoding="utf-8")

    def add(self, step: int, layers: list[str], figures: dict[str, list[float]]) -> None:
        """`figures`: name -> one number a layer."""
        entry = {"step": step, "layers": layers, **{name: [_short(x) for x in row] for name, row in figures.items()}}
        self.entries.append(entry)
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def worst(self, figure: str = "sqnr_db") -> list[tuple[str, float]]:
        """(layer, figure) at the last logging step, lowest first. Raises ValueError when nothing was logged."""
        if not self.entries:
            raise ValueError("nothing was logged yet; train with quant_logging=True and a logging_steps that is reached")
        last = self.entries[-1]
        if figure not in last or figure in ("step", "layers"):
            legal = ", ".join(repr(key) for key in last if key not in ("step", "layers"))
            raise ValueError(f"unknown figure {figure!r}; legal: {legal}")
        return sorted(zip(last["layers"], last[figure], strict=True), key=lambda pair: pair[1])

    def plot(self, path: str | Path, figure: str = "sqnr_db") -> None:
        """Draws a figure of all layers over the steps. Needs matplotlib (ImportError says so)."""
        names = [name for name, _ in reversed(self.worst(figure))]
        try:
            from matplotlib import pyplot  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError("plot needs matplotlib: pip install matplotlib") from error
        rows = [[entry[figure][entry["layers"].index(name)] for entry in self.entries] for name in names]
        canvas, axes = pyplot.subplots(figsize=(8, 1 + 0.2 * len(names)), layout="constrained")
        steps = [entry["step"] for entry in self.entries]
        drawn = axes.imshow(rows, aspect="auto", extent=(steps[0], max(steps[-1], steps[0] + 1), len(names) - 0.5, -0.5))
        axes.set_yticks(range(len(names)), names, fontsize=6)
        axes.set_xlabel("step")
        canvas.colorbar(drawn, label=figure)
        canvas.savefig(path)
        pyplot.close(canvas)


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _read(path: Path) -> list[dict[str, Any]]:
    entries = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            entries.append(json.loads(line))
    except (OSError, ValueError):  # none, or cut short by a killed process: what came before counts
        pass
    return entries
