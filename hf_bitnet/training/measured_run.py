"""One run that ends in a packed model: what is measured on the way, and what it leaves in its folder. Own.

`convert` (`pipeline.py`) and the recipes say in which order. It works alike in one process and in many: windows are shared
out between the processes, files are written by the main one, and every folder and file gets its name when it is complete.
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from ..analysis import perplexity
from ..config import BitNetQuantizationConfig
from ..files import put_in_place, write_json
from ..hub import hub_id, library_versions, without_bars, write_card
from ..surgery import coverage, pack_model
from .amounts import amounts, limited
from .arguments import QATArguments
from .curve import write_curve
from .options import plain
from .run_folder import PACKED_FOLDER, RESULTS_FILE, TRAIN_FOLDER, clear, refuse_earlier, resumes_from
from .run_results import METRICS, PACKED, STEPS, TRAINED, ratios, run_card, run_settings, told
from .trainer import QATMixin

# of the reloaded packed model to the trained one: the same codes, summed in another order
AGREEMENT = 1e-3
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class MeasuredRun:
    """Measures models, takes times, writes files.

    Args:
        args: of the run, as QATArguments; its `output_dir` is the folder of the run.
        overwrite: what an earlier run left there is removed by `clear`, in place of an error.
        metric: what is measured, "perplexity" (lower is better) or "accuracy" (a share, 0..1).
        also: names of what this kind of run writes there beside train, packed, results.json and checkpoint-*.
        say: gets lines for the user, on the main process.

    Attributes:
        args: a copy, which `limit_tokens` changes; it is for the trainer. folder: of the run.
        resumes: whether it goes on from a checkpoint.
        measured: the metric's values, by step. seconds: by step.

    The steps are "full_precision", "before_training", "trained" and "packed"; those that a run does not have are left out.

    Raises ValueError when the folder holds an earlier run that would be lost, and on an unknown metric; TypeError when `args`
    is something else.
    """

    def __init__(
        self,
        args: QATArguments,
        *,
        overwrite: bool = False,
        metric: str = "perplexity",
        also: Sequence[str] = (),
        say: Callable[[str], None] = print,
    ) -> None:
        if metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r}; legal: {', '.join(METRICS)}; MeasuredRun(args, metric='accuracy')")
        if not isinstance(args, QATArguments):
            raise TypeError(f"MeasuredRun takes QATArguments, got {args!r}; MeasuredRun(QATArguments(output_dir='out'))")
        assert args.output_dir is not None
        self.args, self.metric, self.folder = copy.copy(args), metric, Path(args.output_dir)
        self._overwrite, self._also, self._say = overwrite, also, say
        self.resumes = resumes_from(args) is not None
        self.is_main = args.process_index == 0
        self.measured: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        refuse_earlier(self.folder, args, also, overwrite=overwrite)

    def clear(self) -> None:
        """With `overwrite`, removes what an earlier run left: to be called when all arguments are known to fit."""
        if self._overwrite and self.is_main:
            clear(self.folder, self._also)

    def say(self, text: str) -> None:
        if self.is_main:
            self._say(text)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Adds the time inside to `seconds[step]`."""
        start = time.perf_counter()
        yield
        self.seconds[step] = round(self.seconds.get(step, 0.0) + time.perf_counter() - start, 3)

    # ---- training ----

    def limit_tokens(self, windows: Tensor, max_tokens: int | None, *, repeat: bool = False) -> None:
        """Ends the training at so many tokens; with `repeat` it goes over the windows (count, length) until then.

        Raises ValueError when they are less than one step's.
        """
        self.args = limited(self.args, windows, max_tokens, repeat=repeat)

    def train(self, trainer: Trainer) -> None:
        """Trains, from the checkpoint that `args.resume_from_checkpoint` names ("true": the last one) or from the start."""
        with self.timed("train"), without_bars():
            trainer.train(resume_from_checkpoint=resumes_from(self.args))

    # ---- measuring ----

    def note(self, step: str, value: float) -> None:
        """Keeps a measured value, and tells it. Raises ValueError on a step that there is not."""
        if step not in STEPS:
            raise ValueError(f"unknown step {step!r} of a run; legal: {', '.join(STEPS)}")
        self.measured[step] = value
        self.say(told(self.metric, self.measured, step))

    def measure(self, step: str, model: PreTrainedModel, windows: Tensor) -> None:
        """Perplexity under the mixed precision of the run, each process on its share of the windows (count, length)."""
        if self.args.disable_tqdm:  # there is no bar to look at
            self.say(f"measuring ({step.replace('_', ' ')}): {len(windows)} windows of {windows.shape[1]} tokens")
        with self.timed("evaluate"):
            # all processes run as many forwards, which models that are shared out between them need
            rank, world = self.args.process_index, self.args.world_size
            even = len(windows) // world * world
            parts = gather_object([self._loss_sum(model, windows[rank:even:world])])
            loss = (sum(parts) + self._loss_sum(model, windows[even:])) / len(windows)
        self.note(step, math.exp(loss) if loss < 700 else math.inf)

    def _loss_sum(self, model: PreTrainedModel, windows: Tensor) -> float:
        if not len(windows):
            return 0.0
        device, mixed = self.args.device, _AUTOCAST.get(self.args.mixed_precision)
        progress = False if self.args.disable_tqdm or not self.is_main else None
        with torch.autocast(device.type, mixed, enabled=mixed is not None):
            value = perplexity(model, windows, self.args.per_device_eval_batch_size, progress=progress)
        return math.log(value) * len(windows)

    @staticmethod
    def trained_model(trainer: Trainer) -> Any:
        """What was trained, without the wrappers of distributed training and mixed precision; FSDP's shards stay."""
        return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)

    # ---- files ----

    def save(self, trainer: Trainer, name: str = TRAIN_FOLDER) -> None:
        """Gathers the float weights and saves them in the folder `name`, with the tokenizer."""
        with self.timed("save"), without_bars():
            temporary = self._fresh(name, trainer)
            if trainer.is_fsdp_enabled:  # else Trainer saves nothing here
                plugin: Any = trainer.accelerator.state.fsdp_plugin
                plugin.set_state_dict_type("FULL_STATE_DICT")
            trainer.save_model(str(temporary))
            trainer.accelerator.wait_for_everyone()
            if self.is_main:
                put_in_place(temporary, self.folder / name)
            trainer.accelerator.wait_for_everyone()

    def pack(self, kind: Any, trainer: Trainer) -> Any:
        """Packs what was saved; returns it reloaded, on the device of the run. It has no name yet: `finish` gives it one.

        Args:
            kind: what loads it: the model's class, or an AutoModel class.
        """
        temporary = self._fresh(PACKED_FOLDER, trainer)
        with self.timed("save"), without_bars():
            if self.is_main:
                pack_model(kind.from_pretrained(self.folder / TRAIN_FOLDER)).save_pretrained(temporary)
                if trainer.processing_class is not None:
                    trainer.processing_class.save_pretrained(temporary)  # type: ignore[union-attr]
            trainer.accelerator.wait_for_everyone()
            return kind.from_pretrained(temporary).to(self.args.device)

    def pack_measured(self, kind: Any, trainer: Trainer, windows: Tensor) -> Any:
        """Perplexity of the trained model; `save`, `pack`; perplexity of the packed one, which is returned.

        Raises RuntimeError when the training diverged, or the reloaded model is not the trained one.
        """
        self.measure(TRAINED, self.trained_model(trainer), windows)
        trained = self.measured[TRAINED]
        if not math.isfinite(trained):
            raise RuntimeError(
                f"the training diverged: the trained model's perplexity is {trained}; nothing was packed. "
                f"Try a lower learning rate than learning_rate={self.args.learning_rate}, or a longer warmup_steps"
            )
        self.save(trainer)
        packed = self.pack(kind, trainer)
        self.measure(PACKED, packed, windows)
        reloaded = self.measured[PACKED]
        if not abs(reloaded - trained) <= AGREEMENT * trained:
            raise RuntimeError(
                f"the packed model, reloaded, has perplexity {reloaded:.6g}, the trained one {trained:.6g}: they should "
                f"agree to {AGREEMENT:g}. It is left in {self._temporary(PACKED_FOLDER)} for inspection, the trained weights "
                f"are in {self.folder / TRAIN_FOLDER}; please report this"
            )
        return packed

    def finish(
        self,
        trainer: QATMixin,
        packed: nn.Module,
        config: BitNetQuantizationConfig,
        *,
        base_model: str | None,
        data: Mapping[str, Any],
        training: Mapping[str, Any],
        **more: Any,
    ) -> dict[str, Any]:
        """Writes the card, with the training curve, and results.json; only now is there a folder `packed`.

        Args:
            trainer, packed, config: of the run; `packed` from `pack`.
            base_model: Hub id or path of what was quantized; None where there is nothing to name.
            data: names of the texts, "train" and "validation", and how much they hold. With "train_windows" and
                "window_tokens" the steps and tokens of the training are counted.
            training: what is to be known beside that and the settings of `args`, for example the teacher.
            more: further entries of results.json, which come first.

        Returns:
            What results.json holds.
        """
        counted: dict[str, int] = {}
        if "train_windows" in data:
            counted = amounts(trainer, data["train_windows"], data["window_tokens"])  # type: ignore[arg-type]
        settings = {**counted, **training, **run_settings(self.args), "distillation": plain(trainer.distillation)}
        results = {
            **more,
            "base_model": None if base_model is None else hub_id(base_model) or Path(base_model).name,
            "class": type(packed).__name__,
            "quantization": {key: value for key, value in config.fields().items() if value is not None},
            "coverage": {key: value for key, value in coverage(packed).to_dict().items() if key != "parameters"},
            "data": dict(data),
            "training": settings,
            self.metric: self.measured,
            **ratios(self.metric, self.measured),
            "seconds": self.seconds,
            **self._speed(counted.get("tokens")),
            "versions": library_versions(),
            "history": trainer.state.log_history,  # type: ignore[attr-defined]
        }
        if self.is_main:
            temporary = self._temporary(PACKED_FOLDER)
            curve = write_curve(temporary, results["history"])
            write_card(temporary, run_card(packed, results, self.metric, self.folder.resolve().name, base_model, curve))
            put_in_place(temporary, self.folder / PACKED_FOLDER)
            write_json(self.folder / RESULTS_FILE, results)
            self.say(f"saved {self.folder / PACKED_FOLDER}, {self.folder / TRAIN_FOLDER} and {self.folder / RESULTS_FILE}")
        return results

    def _speed(self, tokens: int | None) -> dict[str, float | None]:
        if tokens is None:
            return {}
        # the seconds of a resumed run are those of its last part
        return {"train_tokens_per_second": None if self.resumes else round(tokens / max(self.seconds["train"], 1e-9), 1)}

    def _temporary(self, name: str) -> Path:
        # the same name in every process
        return self.folder / f".{name}.incomplete"

    def _fresh(self, name: str, trainer: Trainer) -> Path:
        temporary = self._temporary(name)
        if self.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        trainer.accelerator.wait_for_everyone()
        return temporary
