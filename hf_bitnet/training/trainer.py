"""QATMixin: what a trainer of quantized models has beyond transformers' Trainer; QATTrainer: the two together. Own.

The mixin adds a quantization schedule, distillation, parameter groups and metrics, and mends what stock Trainer gets
wrong for such models: gradient accumulation where a model's loss ignores the number of items, checkpoints of mixtures of
experts, checkpoints cut short by a killed process. Leaves out: file formats, choosing layers.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..surgery import check_calibrated, probing, quantized_layers, trained_layers
from .add_ons import add_ons
from .arguments import QATArguments
from .callbacks import KeptCodesCallback, kept_where_whole, make_logs_readable
from .checks import LossStyle, check_arguments, check_model, check_parallelism, check_trainable, loss_style, warn_half_precision
from .distillation import DistillationConfig, Distiller, LossBalance
from .distillation.alignment import auxiliary_weight
from .distillation.cached import COLUMNS, CachedCollator, check_cached, without_cached
from .distillation.teacher import CACHED, SELF, Teacher, classes_of, fingerprint, make_teacher, prepare_teacher, starts_as
from .guarded import Guards
from .layer_history import LayerHistory
from .lean import rounds_stochastically, to_lean
from .metrics import TrainMetrics
from .monitor import QuantMonitor
from .optimizers import refuse_options, set_up
from .published import Published
from .resume import check_resumed, complete_checkpoint, write_teacher
from .sharding import keep_weights_float32
from .strength import StrengthCallback, schemes_of


class QATMixin(Guards, Published):
    """Makes a subclass of transformers' Trainer one for quantized models: `class Mine(QATMixin, SomeTrainer)`.

    A callback could only carry the schedule: evaluation at full strength, parameter groups, losses that are divided as they
    should be, metrics that reach the reporters, and checkpoints that can be resumed need methods of the trainer.

    Attributes:
        arguments_class: what `args` has to be. Beside a trainer with arguments of its own, a class that has both:
            `@dataclass class Arguments(SomeConfig, QATArguments)` (in this order, which keeps the defaults of SomeConfig).
        learns_from_teachers: whether the loss of a trainer that has a `compute_loss` of its own may be replaced by that of a
            teacher. Any other loss of its own is left as it is.

    Constructor: as of the trainer beside it, and `teacher` (see QATTrainer). A trainer whose second argument is not `args`
    takes them by name.
    """

    arguments_class: type[QATArguments] = QATArguments
    learns_from_teachers: bool = False
    args: QATArguments
    distillation: DistillationConfig | None = None
    """What is learned from the teacher; None without."""
    _distiller: Distiller | None = None
    _balance: LossBalance | None = None
    _fingerprint: str | None = None

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: QATArguments | None = None,
        *others: Any,
        teacher: Teacher | None = None,
        **named: Any,
    ) -> None:
        args = self.arguments_class(output_dir="tmp_trainer") if args is None else args
        check_arguments(args, self.arguments_class, type(self).__name__, teacher is not None, named)
        # a trainer that makes losses of its own knows how they are divided
        self._loss_is_the_model_s = getattr(super().compute_loss, "__func__", None) is Trainer.compute_loss
        if teacher is not None and not (self._loss_is_the_model_s or self.learns_from_teachers):
            raise ValueError(
                f"{type(self).__name__} has a loss of its own, which a teacher's would replace; leave `teacher` out"
            )
        if isinstance(model, nn.Module):  # before the trainer prepares anything; a trainer may take a path too
            check_model(model)
        elif model is not None and getattr(super().__init__, "__func__", None) is Trainer.__init__:
            raise TypeError(
                f"{type(self).__name__} takes a model, got {model!r}; load and quantize it first: quantize_model("
                "AutoModelForCausalLM.from_pretrained(...), BitNetQuantizationConfig.bitnet_b158())"
            )
        if others:
            super().__init__(model, args, *others, **named)
        else:
            super().__init__(model=model, args=args, **named)
        assert isinstance(self.model, nn.Module)
        if not isinstance(model, nn.Module):
            check_model(self.model)
        if args.lean:
            to_lean(self.model)
        if not rounds_stochastically(args):
            warn_half_precision(self.model)
        check_parallelism(self.accelerator, teacher is not None)
        self._autocast = keep_weights_float32(self.accelerator)
        self._loss_style = loss_style(self.model)
        if self._loss_is_the_model_s:
            # stock Trainer believes it of every model whose forward takes **kwargs
            self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs and self._loss_style is LossStyle.SUM
        self._scaled_for_accumulation = self.loss_is_scaled_for_ga  # what the trainer beside this one says of its loss
        self._made_optimizer = False
        self._setup_teacher(teacher)
        self._last_inputs: dict[str, Any] | None = None  # of a micro-batch, while the soft and the hard model differ
        monitor = QuantMonitor(args.quant_logging)
        self._strength, self._codes = StrengthCallback(on_new_stage=monitor.start), KeptCodesCallback()
        self.setup_guards(args)
        learned = [] if self._balance is None else self._balance.names
        self._qat_metrics = TrainMetrics(monitor, learned, args.device, self.regularization, args.spike_rollback is not None)
        self._add_ons = [*([self._balance] if self._balance else []), *add_ons(args)]
        for callback in (self._strength, self._codes, self._qat_metrics, *self._add_ons):
            self.add_callback(callback)
        make_logs_readable(self)

    def _setup_teacher(self, teacher: Teacher | None) -> None:
        # the arguments hold a DistillationConfig, whatever form it was written in
        config: Any = DistillationConfig() if self.args.distillation is None else self.args.distillation
        if teacher is None or not config.needs_teacher:
            return
        student = self.accelerator.unwrap_model(self.model)
        assert isinstance(student, nn.Module)
        self.distillation, self._balance = config, LossBalance(config, self.accelerator)
        made = wrapped = None
        if isinstance(teacher, str) and teacher == CACHED:
            self._fingerprint = check_cached(self.train_dataset, config, classes_of(student))
            self.data_collator = CachedCollator(self.data_collator)
        else:
            made = make_teacher(teacher, student, config, self.accelerator)
            self._fingerprint = fingerprint(made)
            self._balance.of_itself = teacher == SELF or starts_as(made, student)
            wrapped = prepare_teacher(made, self.accelerator, config)
        self._distiller = Distiller(config, wrapped, made, compiled=self.args.torch_compile, seed=self.args.seed)

    @property
    def quant_history(self) -> LayerHistory:
        """The figures of each layer at each logging step; `quant_history.worst()` says which layer hurts."""
        return self._qat_metrics.history

    # ---- training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *others: Any, **named: Any) -> Any:
        """As Trainer's. With True it continues from the last checkpoint that was written to its end."""
        assert isinstance(self.model, nn.Module)
        check_trainable(self.model, self.args)
        if self.args.online_calibration is None:
            for name, layer in quantized_layers(self.model):
                check_calibrated(name, layer)
        found = resume_from_checkpoint is True
        if found:
            resume_from_checkpoint = complete_checkpoint(str(self.args.output_dir), self.args.world_size)
        self.start_guards(str(self.args.output_dir) if found else resume_from_checkpoint)
        if self._distiller is not None and self.model_init is None:
            self._distiller.reset(self.accelerator.unwrap_model(self.model))
        if isinstance(resume_from_checkpoint, str):
            check_resumed(resume_from_checkpoint, schemes_of(self.model), self._fingerprint)
        return super().train(resume_from_checkpoint, *others, **named)

    def prepare_run(self, checkpoint: str | bool | None) -> None:
        """Before each start of the loop: schedule and balance of the losses go on from where the checkpoint left them."""
        resumed_from = checkpoint if isinstance(checkpoint, str) else None
        self._strength.resumed_from = resumed_from
        for each in self._add_ons:
            each.start(None if resumed_from is None else Path(resumed_from))

    def clean_up(self) -> None:
        """After `train`, however it ended: what was there for training only is gone."""
        assert isinstance(self.model, nn.Module)
        self._codes.close()
        self._strength.finish()
        self._last_inputs = None
        for each in self._add_ons:
            each.finish(self.model)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As Trainer's; with `lean` in bfloat16."""
        model = super().call_model_init(trial)
        if self.args.lean:
            to_lean(model)
        if self._distiller is not None:
            self._distiller.reset(model)
        return model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As Trainer's, with groups "rest", "latent" and "scale"."""
        if self.optimizer is not None:
            if not self._made_optimizer:
                refuse_options(self.args, "the optimizer was made outside of the trainer")
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        assert isinstance(self.model, nn.Module)
        set_up(optimizer, self.model if model is None else model, self.args)
        self._made_optimizer = True
        return optimizer

    # ---- loss ----

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Around each loss. Trainer leaves it to accelerate, which does not autocast under FSDP 2."""
        if self._autocast is None:
            return super().autocast_smart_context_manager(cache_enabled)
        return torch.autocast(str(self.args.device).partition(":")[0], self._autocast, cache_enabled=cache_enabled)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The distillation loss in training with a teacher, else the model's own; both divided over the whole batch."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._last_inputs = self._for_gap(inputs)
        if self._distiller is not None:
            loss, outputs = self._distill(self._distiller, model, inputs, num_items_in_batch)
        elif num_items_in_batch is None or not self._mends_loss(inputs.get("labels")):
            self.loss_is_scaled_for_ga = self._scaled_for_accumulation
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        else:
            loss, outputs = self._mean_loss(model, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _mends_loss(self, labels: Any) -> bool:
        """Whether the model's loss is a mean over the labels of a micro-batch, whatever it is told."""
        if not self._divides_by_items() or not isinstance(labels, Tensor):
            return False
        # transformers' losses for float labels (regression, several labels) are means
        return self._loss_style is LossStyle.MEAN or (self._loss_style is LossStyle.SUM and labels.is_floating_point())

    def _divides_by_items(self) -> bool:
        """Whether the loss is the model's own, which then is divided over all micro-batches."""
        return self._loss_is_the_model_s and self.compute_loss_func is None and self.label_smoother is None

    def _mean_loss(self, model: nn.Module, inputs: dict[str, Any], items: Tensor | int) -> tuple[Tensor, Any]:
        """A micro-batch counts for its share of the items, not for one of so many micro-batches."""
        accepts, self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs, False
        try:
            loss, outputs = super().compute_loss(model, inputs, True)
        finally:
            self.model_accepts_loss_kwargs = accepts
        self.loss_is_scaled_for_ga = True
        counted = inputs["labels"][..., int(self._loss_shifts_labels) :]  # as Trainer counts items
        return self._over_ranks(loss * (counted.ne(-100).sum() / items)), outputs

    def _distill(
        self, distiller: Distiller, model: nn.Module, inputs: dict[str, Any], items: Tensor | int | None
    ) -> tuple[Tensor, Any]:
        assert isinstance(self.model, nn.Module) and self._balance is not None
        micro_batches = getattr(self, "current_gradient_accumulation_steps", 1)
        result = distiller(model, self.model, inputs, self.state.global_step)
        sums = torch.cat((result.main, torch.stack(result.inner).to(result.main.dtype))) if result.inner else result.main
        means = sums / (max(result.tokens, 1) * micro_batches if items is None else max(items, 1))  # there may be no label
        means = self._over_ranks(means) if items is not None else means
        loss, *terms = self._balance.weigh(means, self._strength.strength)
        self._qat_metrics.add(*terms)
        auxiliary = result.outputs.get("aux_loss") if isinstance(result.outputs, dict) else None
        if auxiliary is not None:  # load balancing of experts, which models add to their own loss only
            loss = loss + auxiliary_weight(self.model) * auxiliary / micro_batches
        self.loss_is_scaled_for_ga = True
        return loss, result.outputs

    def _over_ranks(self, loss: Tensor) -> Tensor:
        """DDP averages gradients over ranks; a loss divided by the items of all ranks has to be summed."""
        if not self.args.average_tokens_across_devices:
            return loss
        return loss * (self.accelerator.num_processes // self.get_tp_size())

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        if not self._divides_by_items():
            return super()._get_num_items_in_batch(batch_samples, device)
        # counted also where the model does not take the number, because `compute_loss` divides in its place
        accepts, self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs, True
        try:
            return super()._get_num_items_in_batch(batch_samples, device)
        finally:
            self.model_accepts_loss_kwargs = accepts

    # ---- evaluation, logs, checkpoints ----

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *others: Any, **named: Any) -> Any:
        """As Trainer's, without what the teacher said."""
        return super().prediction_step(model, without_cached(inputs)[0], *others, **named)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As Trainer's, at full strength (see `eval_at_full_strength`); changes neither the strength nor the random state.

        The metric `eval_strength` is the strength that was measured.
        """
        assert isinstance(self.model, nn.Module)
        model = self.model
        full = self._strength.at_full_strength() if self.args.eval_at_full_strength else contextlib.nullcontext()
        random_state = torch.get_rng_state()  # a DataLoader draws a seed from it each time it is read
        try:
            with full, kept_where_whole(model):
                strength = self._strength.strength
                if strength is None:  # not in training: as the user left it
                    strength = float(trained_layers(model)[0][1].strength)
                output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        finally:
            torch.set_rng_state(random_state)
        assert output.metrics is not None
        output.metrics[f"{metric_key_prefix}_strength"] = strength
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's; training logs also get the `quant/...` and `distill/...` metrics."""
        if self.is_in_train and "loss" in logs:
            assert isinstance(self.model, nn.Module)
            schedule = self._strength.logs() | self._hard_gap()
            logs.update(self._qat_metrics.collect(self.model, self.state.global_step, schedule, self.accelerator))
            if self.args.quant_logging:
                for each in self._add_ons:
                    logs.update(each.figures())
        super().log(logs, start_time)

    def _for_gap(self, inputs: dict[str, Any]) -> dict[str, Any] | None:
        """What the model itself reads of a micro-batch, where the log may ask for its hard loss.

        Not of trainers with a loss of their own, which may count what they compute.
        """
        wanted = self._strength.logs_gap and self.args.quant_logging and self._loss_is_the_model_s
        if not wanted or not all(name in inputs for name in self.label_names):
            return None
        return without_cached(inputs)[0]

    def _hard_gap(self) -> dict[str, float]:
        """The quantized model's loss minus the present one's, on the last micro-batch, while the schedule holds them apart."""
        if self._last_inputs is None:
            return {}
        assert isinstance(self.model, nn.Module)
        losses = []
        for hard in (contextlib.nullcontext(), self._strength.at_full_strength()):
            with hard, probing(self.model, quantized=None), self.compute_loss_context_manager():
                losses.append(self.compute_loss(self.model, dict(self._last_inputs)).detach().float())
        gap = losses[1] - losses[0]
        mean = gap if self.accelerator.num_processes == 1 else self.accelerator.reduce(gap, "mean")
        return {"quant/hard_gap": float(mean)}  # type: ignore[arg-type]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # save_pretrained writes experts in their original layout, which resuming and load_best_model_at_end (a plain
        # load_state_dict) do not find again; a checkpoint is for them, and from_pretrained reads both layouts
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not self.is_in_train or not isinstance(model, PreTrainedModel):
            super()._save(output_dir, state_dict)
            return
        in_own_layout = functools.partial(type(model).save_pretrained, model, save_original_format=False)
        model.__dict__["save_pretrained"] = in_own_layout
        try:
            super()._save(output_dir, state_dict)
        finally:
            del model.__dict__["save_pretrained"]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._strength.refresh_scales()
        # first, because a checkpoint counts as complete with what Trainer writes last
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            self._strength.write(folder)
            write_teacher(folder, self._fingerprint)
            for each in self._add_ons:
                each.save(folder)
        super()._save_checkpoint(model, trial)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if isinstance(self.data_collator, CachedCollator):  # not arguments of the model's forward, yet used
            self._signature_columns = list({*self._signature_columns, *COLUMNS})


class QATTrainer(QATMixin, Trainer):
    """Trainer for a model in train form (`quantize_model`, or `from_pretrained` with a BitNetQuantizationConfig).

    Args:
        model: the quantized model.
        args: QATArguments; None takes the defaults.
        teacher: None; a model; the path or Hub name of one; or "self", a copy of the model's own full-precision weights as
            they are now (parameters that are trained cost memory a second time); or "cached", the columns that
            `cache_teacher_logits` added to the training data. What is learned from it is `QATArguments.distillation`, over the
            tokens whose label is not -100, divided like Trainer's own loss. Evaluation always measures the model's own loss.
        others: as Trainer's, by position or by name.

    A run that was stopped or killed continues with `train(resume_from_checkpoint=True)`, bit for bit: same losses, same
    weights. (Logged values are means since the last logged step, so let `save_steps` be a multiple of `logging_steps`.)

    Raises ValueError or TypeError with the corrected call when the model is not quantized, is packed, or the teacher does
    not fit.
    """
