"""What the metrics share: built from their class, not loaded by a name, and without files. Own.

`evaluate.load` asks the Hub, and a Metric makes folders and files in a cache even when it is built from its class. Here
everything is kept in memory, unless several processes have to put their predictions together.
"""

from __future__ import annotations

import os
from typing import Any

import evaluate


class OfflineMetric(evaluate.Metric):
    """An `evaluate.Metric` that is used as any other: `compute`, `add`, `add_batch`, `evaluate.combine`.

    Args:
        keep_in_memory: None keeps predictions in memory where this is the only process.
        options: of `evaluate.Metric`: num_process, process_id, experiment_id, cache_dir, seed, ...
    """

    def __init__(self, config_name: str | None = None, *, keep_in_memory: bool | None = None, **options: Any) -> None:
        alone = options.get("num_process", 1) == 1
        super().__init__(config_name, keep_in_memory=alone if keep_in_memory is None else keep_in_memory, **options)

    def _build_data_dir(self) -> str:
        if not self.keep_in_memory:
            return super()._build_data_dir()
        # the same path, which nobody makes
        return os.path.join(self._data_dir_root, self.name, self.config_name)

    def _infer_feature_from_batch(self, batch: dict[str, Any]) -> Any:
        # the first batch; evaluate would look at its first example without asking
        if any(len(column) == 0 for column in batch.values() if column is not None):
            raise self._empty()
        return super()._infer_feature_from_batch(batch)

    def _finalize(self) -> None:
        if self.keep_in_memory and self.writer is None:
            raise self._empty()
        super()._finalize()

    def _empty(self) -> ValueError:
        names = ", ".join(f"{name}=..." for name in self._feature_names())
        return ValueError(f"{type(self).__name__}: there is nothing to measure; give at least one example: compute({names})")
