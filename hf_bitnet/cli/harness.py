"""Tasks of the lm-evaluation-harness (package lm-eval, which is not required), run on a model that is open already. Own.

Leaves out: its other backends, its logs of samples, chat templates. Tasks may be folders of YAML files; those may name
Python functions, so a folder of tasks is code.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .common import table
from .options import UsageError

_NAME = "lm_eval"
# task -> figure -> value
Figures = dict[str, dict[str, float]]


class Harness:
    """The tasks that were asked for.

    Raises:
        UsageError: no name. ImportError: lm-eval is not installed. ValueError: it has no such task.
    """

    def __init__(self, tasks: str, folder: str | None = None) -> None:
        self.names = [name.strip() for name in tasks.split(",") if name.strip()]
        if not self.names:
            raise UsageError(f"--tasks {tasks!r} names none; for example --tasks hellaswag,arc_easy")
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"there is no folder {folder!r} with tasks (--task-folder)")
        with _quiet():
            try:
                import lm_eval  # pyright: ignore[reportMissingImports]
                from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
            except ModuleNotFoundError as error:
                raise ImportError(
                    f"--tasks needs the lm-evaluation-harness ({error}): pip install lm-eval; for perplexity alone: --text FILE"
                ) from error
            self._evaluate: Any = lm_eval.simple_evaluate
            # reading its own tasks, of which there are many thousands, takes long
            self._manager: Any = None if folder is None else TaskManager(include_path=folder, include_defaults=False)
            if self._manager is None or not {*self.names} <= {*self._manager.all_tasks}:
                self._manager = TaskManager(include_path=folder)
        known = self._manager.all_tasks
        for name in self.names:
            if name not in known:
                close = ", ".join(difflib.get_close_matches(name, known, n=3))
                raise ValueError(
                    f"lm-eval has no task {name!r}{f'; near it: {close}' if close else ''}; `lm-eval ls tasks` lists"
                )

    def run(
        self, model: Any, tokenizer: Any, *, batch_size: int, limit: int | None, fewshot: int | None, bf16: bool
    ) -> tuple[Figures, dict[str, list[str]]]:
        """The figures of every task, with standard errors where there are any; and which of them should be high."""
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

        with _quiet():
            wrapped = HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                mixed_precision_dtype="bfloat16" if bf16 else None,
            )
            found = self._evaluate(
                model=wrapped,
                tasks=self.names,
                num_fewshot=fewshot,
                limit=limit,
                task_manager=self._manager,
                log_samples=False,
            )
        assert found is not None  # as it is on processes of a higher rank
        figures = {task: _figures(values) for task, values in found["results"].items()}
        high = {task: [name for name, wanted in each.items() if wanted] for task, each in found["higher_is_better"].items()}
        return figures, high


def _figures(values: dict[str, Any]) -> dict[str, float]:
    """'acc,none' is called acc, other filters keep their name: 'exact_match,strict'."""
    numbers = {key: value for key, value in values.items() if "," in key and isinstance(value, int | float)}
    return {key.removesuffix(",none"): float(value) for key, value in numbers.items()}


def retention(found: Figures, reference: Figures, high: dict[str, list[str]]) -> Figures:
    """Share of the reference's figure that was kept, for each figure that should be high and is not 0 there."""
    kept: Figures = {}
    for task, figures in found.items():
        for name, value in figures.items():
            before = reference.get(task, {}).get(name, 0.0)
            if name.split(",")[0] in high.get(task, []) and before:
                kept.setdefault(task, {})[name] = value / before
    return kept


def task_table(found: Figures, reference: Figures | None, kept: Figures) -> str:
    """For people."""
    rows = [("task", "figure", "value", *(() if reference is None else ("reference", "kept")))]
    for task, figures in found.items():
        for name, value in figures.items():
            if "_stderr" in name:
                continue
            metric, _, filtered = name.partition(",")
            error = figures.get(f"{metric}_stderr" + (f",{filtered}" if filtered else ""))
            row = (task, name, f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}"))
            if reference is not None:
                share = kept.get(task, {}).get(name)
                before = reference.get(task, {}).get(name)
                row += ("-" if before is None else f"{before:.4f}", "-" if share is None else f"{share:.1%}")
            rows.append(row)
    return table(rows)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Its log lines are for its developers; its bars are for terminals; nothing of it belongs on the standard output."""
    logger = logging.getLogger(_NAME)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.ExitStack() as stack:
            if not sys.stderr.isatty():
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            yield
    finally:
        logger.setLevel(level)
