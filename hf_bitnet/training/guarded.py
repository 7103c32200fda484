"""What QATMixin does around a step and a run: regularizers, the two-stage schedule, guards against a lost run. Own.

Leaves out the decisions, which are in `regularizers.py`, `learning_rate.py`, `stability.py` and `rollback.py`.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer

from ..surgery import trained_layers
from .arguments import QATArguments
from .checks import warn_without_labels
from .learning_rate import TwoStage, TwoStageScheduler
from .regularizers import Regularization
from .resume import last_complete_checkpoint
from .rollback import RollbackOptions, Rollbacks, SpikeError, find_spike
from .sharding import on_any_rank
from .stability import StuckWatch, first_not_finite, patient

# it comes before any Trainer, and is no base of it
_Base = Trainer if TYPE_CHECKING else object


class Guards(_Base):
    """Base of QATMixin, which calls `setup_guards` at the end of its constructor and `start_guards` before `train`."""

    args: QATArguments
    _made_optimizer: bool

    def setup_guards(self, args: QATArguments) -> None:
        """Makes what the arguments ask for."""
        terms: Any = args.regularizers
        self.regularization = Regularization(terms, args.device) if terms else None
        options = args.spike_rollback
        self._rollbacks = Rollbacks(options, str(args.output_dir)) if isinstance(options, RollbackOptions) else None
        self._stuck = StuckWatch()
        self._step_batches: list[dict[str, Any]] = []  # of the present optimizer step
        self.callback_handler.callbacks = [patient(each) for each in self.callback_handler.callbacks]

    def start_guards(self, resumes_from: str | bool | None) -> None:
        """Before a run. `resumes_from`: the folder whose notes of rollbacks count."""
        if self._rollbacks is not None:
            self._rollbacks.start(resumes_from if isinstance(resumes_from, str) else None)

    def prepare_run(self, checkpoint: str | bool | None) -> None:
        """Before each start of the training loop: also before one that goes on from an earlier checkpoint after a spike."""

    def clean_up(self) -> None:
        """After `train`, however it ended."""

    def add_callback(self, callback: Any) -> None:
        """As Trainer's; early stopping waits for full strength."""
        super().add_callback(patient(callback))

    # ---- a run ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *others: Any, **named: Any) -> Any:
        """As Trainer's; after a loss spike it goes on from an earlier checkpoint."""
        while True:
            self.prepare_run(resume_from_checkpoint)
            try:
                return super().train(resume_from_checkpoint, *others, **named)
            except SpikeError as spike:
                resume_from_checkpoint = self._go_back(spike)
            finally:
                self._step_batches = []
                self.clean_up()

    def _go_back(self, spike: SpikeError) -> str | None:
        """The checkpoint to resume from after a spike."""
        assert self._rollbacks is not None
        checkpoint = last_complete_checkpoint(str(self.args.output_dir), self.args.world_size, spike.last_good)
        self._rollbacks.add(spike, checkpoint, self.args.should_save)
        self.accelerator.wait_for_everyone()
        if self.accelerator.distributed_type == DistributedType.FSDP:
            raise RuntimeError(
                f"step {spike.step}: {spike.why}; the rollback is noted, and a model that FSDP has sharded is loaded when a "
                "process starts: start the same command again with resume_from_checkpoint=True"
            )
        if self._made_optimizer:
            self.optimizer = None
        return checkpoint

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._rollbacks is not None and checkpoint is not None:
            self._rollbacks.slow_down(checkpoint, self.optimizer, self.lr_scheduler)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """As Trainer's, or the schedule of `two_stage`."""
        options = self.args.two_stage
        if options is not None and self.lr_scheduler is not None and not self._created_lr_scheduler:
            raise ValueError("two_stage cannot be used: a scheduler was passed in; leave one of them out")
        if isinstance(options, TwoStage) and self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            scheduled: Any = optimizer or self.optimizer
            self.lr_scheduler = TwoStageScheduler(scheduled, options, warmup, num_training_steps)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._rollbacks is not None and self._rollbacks.done and self.args.should_save:
            folder = Path(f"{self._get_output_dir(trial)}/checkpoint-{self.state.global_step}")
            folder.mkdir(parents=True, exist_ok=True)
            self._rollbacks.note(folder)  # before Trainer writes the file that says that all is there
        super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's; looks at what is logged."""
        super().log(logs, start_time)
        if self.is_in_train and "loss" in logs:
            assert isinstance(self.model, nn.Module)
            if any(layer.weight.requires_grad for _, layer in trained_layers(self.model)):  # else adapters are what is trained
                self._stuck.look(logs, self.state.global_step)
            spike = None if self._rollbacks is None else find_spike(self.state.log_history, self._rollbacks.options)
            if spike is not None:
                raise spike

    # ---- a step ----

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """As Trainer's; no batch for a run that was resumed behind its last step, where stock Trainer makes one more."""
        if 0 < self.state.max_steps <= self.state.global_step:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """As Trainer's; the last micro-batch of an optimizer step also brings the regularizers, in gradients and loss."""
        self._step_batches.append(inputs)
        if not self.state.global_step and len(self._step_batches) == 1:
            warn_without_labels(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.regularization is not None and self.accelerator.sync_gradients:
            assert isinstance(self.model, nn.Module)
            loss = loss + self.regularization.add_gradients(self.model, self.accelerator.scaler)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        batches, self._step_batches = self._step_batches, []
        # float16's loss scaling expects infinite gradients, and skips their step
        guarded = self.args.nan_guard and self.args.logging_nan_inf_filter and self.accelerator.scaler is None
        if guarded and norm is not None and not math.isfinite(norm):
            self._stop_at(float(norm), batches)
        return norm

    def _stop_at(self, norm: float, batches: list[dict[str, Any]]) -> NoReturn:
        """Names the layer, then raises RuntimeError, or goes the way of a loss spike where there is one."""
        assert isinstance(self.model, nn.Module)
        step, cause, anywhere = self.state.global_step + 1, None, False
        for batch in batches:
            cause = first_not_finite(self.model, functools.partial(self._loss_again, self.model, batch))
            anywhere = on_any_rank(cause is not None, self.args.device)  # ranks leave together
            if anywhere:
                break
        unknown = "the same batches are finite when they are run again (dropout, or an unstable kernel?)"
        why = f"the gradient norm is {norm}: {cause or ('it comes from another process' if anywhere else unknown)}"
        if self._rollbacks is not None:
            raise SpikeError(step, norm, self.state.global_step, why)
        raise RuntimeError(
            f"step {step}: the training diverged: {why}. Lower learning_rate or max_grad_norm, lengthen warmup_steps, or let "
            "the run go back to its last checkpoint: spike_rollback={}. (nan_guard=False goes on regardless.)"
        )

    def _loss_again(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        with self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, self._prepare_inputs(batch))
        return loss
