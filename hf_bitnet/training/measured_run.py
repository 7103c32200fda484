"""One run's measurements and what it leaves in its folder; the order of things is in `pipeline.py`. Own.

Works alike in one process and in many: windows are shared out between the processes, files are written by the main one,
and every folder and file gets its name when it is complete.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel

from ..analysis import perplexity
from ..hub import Measurement, model_card, put_in_place, without_bars, write_card, write_json
from ..surgery import pack_model
from .arguments import QATArguments
from .trainer import QATTrainer

# of the reloaded packed model to the trained one: the same codes, summed in another order
AGREEMENT = 1e-3
FULL, BEFORE, TRAINED, PACKED = "full_precision", "before_training", "trained", "packed"
_LABELS = {
    FULL: ("full precision", "reference"),
    BEFORE: ("quantized, not yet trained", "step"),
    TRAINED: ("trained, before packing", "step"),
    PACKED: ("packed and reloaded", "result"),
}
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
TRAIN_FOLDER, PACKED_FOLDER, RESULTS_FILE = "train", "packed", "results.json"


class MeasuredRun:
    """Measures models, takes times, writes files.

    Args:
        args: of the run. say: gets a line for the user, on the main process.

    Attributes:
        folder: of the run. perplexities: what was measured, by step. seconds: by step.
    """

    def __init__(self, args: QATArguments, say: Callable[[str], None]) -> None:
        self.args, self._say = args, say
        assert args.output_dir is not None
        self.folder = Path(args.output_dir)
        self.is_main = args.process_index == 0
        self.perplexities: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    def say(self, text: str) -> None:
        if self.is_main:
            self._say(text)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Adds the time inside to `seconds[step]`."""
        start = time.perf_counter()
        yield
        self.seconds[step] = round(self.seconds.get(step, 0.0) + time.perf_counter() - start, 3)

    # ---- measuring ----

    def measure(self, step: str, model: PreTrainedModel, windows: Tensor) -> None:
        """Perplexity under the mixed precision of the run, each process on its share of the windows."""
        with self.timed("evaluate"):
            # all processes run as many forwards, which models that are shared out between them need
            rank, world = self.args.process_index, self.args.world_size
            even = len(windows) // world * world
            parts = gather_object([self._loss_sum(model, windows[rank:even:world])])
            loss = (sum(parts) + self._loss_sum(model, windows[even:])) / len(windows)
        self._note(step, loss)

    def _loss_sum(self, model: PreTrainedModel, windows: Tensor) -> float:
        if not len(windows):
            return 0.0
        device, mixed = self.args.device, _AUTOCAST.get(self.args.mixed_precision)
        with torch.autocast(device.type, mixed, enabled=mixed is not None):
            value = perplexity(model, windows, self.args.per_device_eval_batch_size, progress=self._shows_progress())
        return math.log(value) * len(windows)

    def measure_trained(self, trainer: QATTrainer, windows: Tensor) -> None:
        """As `measure`, of the trained model. Raises RuntimeError when the training diverged."""
        self.measure(TRAINED, trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False), windows)
        if not math.isfinite(self.perplexities[TRAINED]):
            raise RuntimeError(
                f"the training diverged: the trained model's perplexity is {self.perplexities[TRAINED]}; nothing was packed. "
                f"Try a lower learning rate than learning_rate={self.args.learning_rate}, or a longer warmup_steps"
            )

    def _note(self, step: str, loss: float) -> None:
        self.perplexities[step] = value = math.exp(loss) if loss < 700 else math.inf
        base = self.perplexities[FULL]
        times = "" if step == FULL else f"  (x {value / base:.3f} of full precision)"
        self.say(f"{_LABELS[step][0] + ':':<28} perplexity {value:.2f}{times}")

    def _shows_progress(self) -> bool | None:
        return False if self.args.disable_tqdm or not self.is_main else None

    # ---- files ----

    def save_trained(self, trainer: QATTrainer) -> None:
        """Gathers and saves the float weights."""
        with self.timed("save"), without_bars():
            temporary = self._fresh(TRAIN_FOLDER, trainer)
            if trainer.is_fsdp_enabled:  # else Trainer saves nothing here
                plugin: Any = trainer.accelerator.state.fsdp_plugin
                plugin.set_state_dict_type("FULL_STATE_DICT")
            trainer.save_model(str(temporary))
            trainer.accelerator.wait_for_everyone()
            if self.is_main:
                put_in_place(temporary, self.folder / TRAIN_FOLDER)
            trainer.accelerator.wait_for_everyone()

    def pack(self, kind: type[PreTrainedModel], trainer: QATTrainer, windows: Tensor) -> PreTrainedModel:
        """Packs what was saved, reloads it and measures it. It has no name yet: `finish` gives it one.

        Raises RuntimeError when the reloaded model is not the trained one.
        """
        temporary = self._fresh(PACKED_FOLDER, trainer)
        with self.timed("save"), without_bars():
            if self.is_main:
                packed = pack_model(kind.from_pretrained(self.folder / TRAIN_FOLDER))
                packed.save_pretrained(temporary)
                if trainer.processing_class is not None:
                    trainer.processing_class.save_pretrained(temporary)  # type: ignore[union-attr]
            trainer.accelerator.wait_for_everyone()
            packed = kind.from_pretrained(temporary).to(self.args.device)  # type: ignore[arg-type]
        self.measure(PACKED, packed, windows)
        trained, reloaded = self.perplexities[TRAINED], self.perplexities[PACKED]
        if not abs(reloaded - trained) <= AGREEMENT * trained:
            raise RuntimeError(
                f"the packed model, reloaded, has perplexity {reloaded:.6g}, the trained one {trained:.6g}: they should "
                f"agree to {AGREEMENT:g}. It is left in {temporary} for inspection, the trained weights are in "
                f"{self.folder / TRAIN_FOLDER}; please report this"
            )
        return packed

    def finish(self, packed: PreTrainedModel, results: dict[str, Any], base_model: str | None) -> None:
        """Writes card and results; only now is there a folder `packed`."""
        if not self.is_main:
            return
        text = results["data"]["validation"]
        card = model_card(
            packed,
            name=self.folder.resolve().name,
            base_model=base_model,
            measurements=[
                Measurement(label, self.perplexities[step], text, kind=kind) for step, (label, kind) in _LABELS.items()
            ],
            training={"text": results["data"]["train"], **results["training"]},
            versions=results["versions"],
        )
        write_card(self._temporary(PACKED_FOLDER), card)
        put_in_place(self._temporary(PACKED_FOLDER), self.folder / PACKED_FOLDER)
        write_json(self.folder / RESULTS_FILE, results)
        self.say(f"saved {self.folder / PACKED_FOLDER}, {self.folder / TRAIN_FOLDER} and {self.folder / RESULTS_FILE}")

    def figures(self, tokens: int | None) -> dict[str, Any]:
        """Perplexities, their ratios to full precision, seconds, and what that makes in tokens a second."""
        base = self.perplexities[FULL]
        return {
            "perplexity": self.perplexities,
            "perplexity_ratio": {step: value / base for step, value in self.perplexities.items()},
            "seconds": self.seconds,
            "train_tokens_per_second": None if tokens is None else round(tokens / max(self.seconds["train"], 1e-9), 1),
        }

    def _temporary(self, name: str) -> Path:
        # the same name in every process
        return self.folder / f".{name}.incomplete"

    def _fresh(self, name: str, trainer: QATTrainer) -> Path:
        temporary = self._temporary(name)
        if self.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        trainer.accelerator.wait_for_everyone()
        return temporary
