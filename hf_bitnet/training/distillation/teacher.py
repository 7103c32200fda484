"""Who the teacher is: checked, loaded, made ready for one or many devices. Own.

Leaves out: the loss (`distillation.py`) and how teacher and student are run (`distiller.py`).
"""

from __future__ import annotations

import copy
import hashlib
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ...surgery import full_precision_copy, output_head, trained_layers
from ...surgery.adapters import own_modules, own_names
from ..sharding import is_sharded
from .config import DistillationConfig

Teacher = nn.Module | str | os.PathLike[str]
SELF, CACHED = "self", "cached"
# left unset, transformers asks on standard input whether to run a checkpoint's code
_SAFE: dict[str, Any] = {"trust_remote_code": False}
# enough of each tensor to tell two models apart, cheap for any size
_FINGERPRINTED = 256
_ROUNDING = 0.01  # of 16 bits, and more


def make_teacher(teacher: Teacher, student: nn.Module, config: DistillationConfig, accelerator: Accelerator) -> nn.Module:
    """The teacher module, in eval mode.

    Args:
        teacher: a module (used as it is; it is put into eval mode and onto its device), the path or Hub name of a saved model,
            or "self": the student's present full-precision weights. Of these, what is frozen is shared with the student, so
            that only trained parameters cost memory a second time; nothing is shared where models are sharded, or where the
            teacher has another device, or (for a tensor) another dtype.
        config: says the teacher's dtype and device.

    Raises:
        TypeError: none of these.
        ValueError: the teacher is the student or shares trained parameters with it; the outputs have different sizes.
    """
    if isinstance(teacher, nn.Module):
        refuse_shared(teacher, student)
        made = teacher if config.dtype is None else teacher.to(config.dtype)
    elif isinstance(teacher, str | os.PathLike):
        if teacher == SELF:
            share = config.teacher_device is None and not _shards(accelerator)
            made = full_precision_copy(student, share_frozen=share, dtype=config.dtype)
        else:
            made = _load(teacher, student, config.dtype)
        made.requires_grad_(False)
    else:
        raise TypeError(
            f"teacher must be a model, a path, 'self' or 'cached', got {type(teacher).__name__}; for example "
            "QATTrainer(model=model, args=args, teacher='self')"
        )
    _check_sizes(made, student)
    return made.eval()


def _shards(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def _load(path: str | os.PathLike[str], student: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    kind = teacher_class(path, type(student).__name__)
    return kind.from_pretrained(path, **_SAFE) if dtype is None else kind.from_pretrained(path, dtype=dtype, **_SAFE)


def teacher_class(path: str | os.PathLike[str], default: str) -> Any:
    """The class of a saved teacher; only its config is read.

    Args:
        default: name of the class, where the config names none.

    Raises ValueError (OSError from the Hub) where there is no such model, or none that transformers has.
    """
    close = get_close_matches(str(path), (SELF, CACHED), n=1, cutoff=0.8)
    if close and not Path(path).exists():
        raise ValueError(f"teacher={str(path)!r} is neither a folder nor 'self' nor 'cached'; did you mean {close[0]!r}?")
    try:
        config = transformers.AutoConfig.from_pretrained(path, **_SAFE)
    except OSError as error:
        raise OSError(f"teacher={str(path)!r} is no model that can be loaded: {error}") from error
    names = getattr(config, "architectures", None) or [default]
    kind = getattr(transformers, names[0], None)
    if kind is None:
        raise ValueError(
            f"the teacher {str(path)!r} is a {names[0]}, which transformers does not have; load it and pass the model: "
            "teacher=MyModel.from_pretrained(...)"
        )
    return kind


def refuse_shared(teacher: nn.Module, student: nn.Module) -> None:
    """Raises ValueError when the student trains a parameter of its teacher."""
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    # a quantized weight and its plain twin are two parameters over one storage
    ids, storages = set(map(id, trained)), set(map(_storage, trained)) - {0}
    if teacher is student or any(id(each) in ids or _storage(each) in storages for each in teacher.parameters()):
        raise ValueError(
            "the teacher is the model that is trained, or shares parameters with it, so it would change at every step; "
            "write teacher='self' for a copy of its present full-precision weights, or load the teacher separately"
        )


def _storage(parameter: Tensor) -> int:
    """Where its numbers lie; 0 where sharding has taken them away."""
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # type: ignore[operator]
    return local.untyped_storage().data_ptr() if local.numel() else 0


def _check_sizes(teacher: nn.Module, student: nn.Module) -> None:
    ours, theirs = classes_of(student), classes_of(teacher)
    if ours is not None and theirs is not None and ours != theirs:
        raise ValueError(
            f"the teacher tells {theirs} classes (tokens) apart, the student {ours}; distillation compares them one by one. "
            "Choose a teacher with the same tokenizer, or, where one vocabulary is only padded, resize it: "
            f"student.resize_token_embeddings({theirs})"
        )
    if ours == 1:
        raise ValueError(
            "the student has a single output (a regression), which has no distribution to distil; leave `teacher` out"
        )


def classes_of(model: nn.Module) -> int | None:
    """Size of the vocabulary of a model with output embeddings, number of labels of a classifier, None if unknown."""
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    if head is not None and hasattr(head, "weight"):
        return getattr(head, "out_features", head.weight.shape[0])
    return getattr(getattr(model, "config", None), "num_labels", None)


def prepare_teacher(teacher: nn.Module, accelerator: Accelerator, config: DistillationConfig) -> nn.Module:
    """Places (and under FSDP2 or DeepSpeed shards) a teacher as the student will be, or on its own device.

    Raises ValueError under FSDP 1, and for a device of its own where models are sharded.
    """
    if config.teacher_device is not None:
        if _shards(accelerator):
            raise ValueError(
                f"teacher_device={config.teacher_device!r}: under FSDP and DeepSpeed the teacher is sharded over the devices "
                "of the student; leave teacher_device out"
            )
        return teacher.to(config.teacher_device)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _prepare_deepspeed(teacher, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise ValueError(
                "a teacher is sharded by FSDP version 2 only, this run uses version 1; set fsdp_config={'version': 2} "
                "(or fsdp_version: 2 in the accelerate config)"
            )
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, teacher).eval()
    registered = len(accelerator._models)
    prepared = accelerator.prepare_model(teacher, evaluation_mode=True)
    # Trainer takes a registered model for the student and would then leave the student unprepared in evaluate()
    del accelerator._models[registered:]
    return prepared


def _prepare_deepspeed(teacher: nn.Module, accelerator: Accelerator) -> nn.Module:
    import deepspeed  # pyright: ignore[reportMissingImports]

    plugin: Any = accelerator.state.deepspeed_plugin
    config = copy.deepcopy(plugin.deepspeed_config)
    for block in ("optimizer", "scheduler"):
        config.pop(block, None)
    # only stage 3 shards weights; the lower stages shard what a teacher does not have
    if config.get("zero_optimization", {}).get("stage") != 3:
        config["zero_optimization"] = {"stage": 0}
    engine = deepspeed.initialize(model=teacher, config=config)[0]
    engine.eval()  # returns None
    return engine


def whole_head(teacher: nn.Module) -> nn.Linear | None:
    """The teacher's output head where its weight lies whole on this device, else None."""
    head = output_head(teacher)
    return None if head is None or is_sharded(head.weight) else head


@torch.no_grad()
def starts_as(teacher: nn.Module, student: nn.Module) -> bool:
    """Whether the student has the teacher's weights, up to rounding; told by the first quantized layer that both have.

    Adapters of either do not count: they start at nothing.
    """
    theirs, names = dict(own_modules(teacher)), own_names(student)
    for name, layer in trained_layers(student):
        weight, other = layer.weight.detach(), getattr(theirs.get(names.get(id(layer), name)), "weight", None)
        if isinstance(other, Tensor) and not is_sharded(weight) and other.shape == weight.shape:
            other = other.detach().to(weight)
            return bool(torch.dist(other, weight) <= _ROUNDING * weight.norm())
    return False


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Tells two teachers apart: a hash of some elements of each parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _FINGERPRINTED)]
        digest.update(name.encode())
        digest.update(some.double().cpu().numpy().tobytes() if some.numel() else b"")
    return digest.hexdigest()[:32]
