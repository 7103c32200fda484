"""What a trainer of quantized models puts on the Hub: its card, and checkpoints that another machine can go on from. Own.

Trainer pushes a checkpoint file by file, and where it takes long in several commits: one that was interrupted may leave
files of two steps in one folder. A list with the hashes of the files goes with each, so that it is noticed. Leaves out:
pushing itself, which is Trainer's.
"""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from ..config import BitNetQuantizationConfig
from ..files import read_object, write_json
from ..hub import Measurement, library_versions, model_card, task_of, write_card
from ..surgery import config_place
from .arguments import QATArguments
from .curve import write_curve
from .run_results import run_settings

# it comes before any Trainer, and is no base of it
_Base = Trainer if TYPE_CHECKING else object
LAST_CHECKPOINT = "last-checkpoint"
_LIST = "hf_bitnet_files.json"
# of an evaluation, but no figures of the model
_NO_RESULTS = ("runtime", "per_second", "strength", "preparation_time")


class Published(_Base):
    """Base of QATMixin: `push_to_hub=True` with any hub_strategy pushes our card, and checkpoints that can be trusted."""

    args: QATArguments

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        dataset_name: str | None = None,
    ) -> None:
        """Writes README.md and the training curve into the output folder, from the run as it is now.

        Args:
            model_name: None takes the folder's. finetuned_from: Hub id of the base model; None takes what the model was
                loaded from. dataset, dataset_tags: names and Hub ids of the data; dataset_name is TRL's word for it.
            tasks: in the Hub's words; None asks the model's class. dataset_args: not used.
        """
        if not self.is_world_process_zero():
            return
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        config = getattr(*config_place(model), None)
        if not isinstance(config, BitNetQuantizationConfig) or getattr(model, "peft_config", None):
            # adapters get the card of the trainer beside this one: Trainer, or one of TRL, which has other arguments
            given = {"language": language, "license": license, "tags": tags, "model_name": model_name, "tasks": tasks}
            given |= {"finetuned_from": finetuned_from, "dataset_tags": dataset_tags, "dataset_args": dataset_args}
            given |= {"dataset": dataset or dataset_name, "dataset_name": dataset_name or dataset}
            taken = inspect.signature(super().create_model_card).parameters
            super().create_model_card(**{key: each for key, each in given.items() if each is not None and key in taken})
            return
        folder = Path(str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        task = (_listed(tasks) or [task_of(model)])[0]
        data = _listed(dataset) or _listed(dataset_name) or _listed(dataset_tags)
        curve = write_curve(folder, self.state.log_history)
        card = model_card(
            model,
            name=model_name or folder.resolve().name,
            base_model=finetuned_from or getattr(getattr(model, "config", None), "_name_or_path", None) or None,
            license=license,
            measurements=_measurements(self.state.log_history, data[0] if data else "evaluation set", task),
            training={"step": self.state.global_step, "of": self.state.max_steps, **run_settings(self.args)},
            curve=curve,
            versions=library_versions(),
            tags=[*_listed(getattr(model, "model_tags", None)), *_listed(getattr(self, "_tag_names", None)), *_listed(tags)],
            metadata={"language": language, "datasets": _listed(dataset_tags) or None, "pipeline_tag": task},
        )
        write_card(folder, card)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            self.create_model_card(model_name=str(self.hub_model_id).rpartition("/")[2])
            if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                _write_list(Path(checkpoint_folder))
        super()._push_from_checkpoint(checkpoint_folder)


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _measurements(history: list[dict[str, Any]], data: str, task: str | None) -> list[Measurement]:
    """The figures of the last evaluation; results of the model where it was measured at full strength."""
    last = next((log for log in reversed(history) if any(key.startswith("eval_") for key in log)), {})
    together = [log for log in history if log.get("step") == last.get("step")]  # several evaluation sets have a log each
    figures = {key: value for log in together for key, value in log.items() if key.startswith("eval_")}
    kind = "result" if all(value == 1.0 for key, value in figures.items() if key.endswith("_strength")) else "step"
    return [
        Measurement(f"step {last['step']}", value, data, key.removeprefix("eval_"), kind, task or "other")
        for key, value in figures.items()
        if isinstance(value, int | float) and not key.endswith(_NO_RESULTS)
    ]


# ---- checkpoints on the Hub ----


def _write_list(folder: Path) -> None:
    """Names and hashes of what the checkpoint holds now."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != _LIST]
    write_json(folder / _LIST, {path.relative_to(folder).as_posix(): _sha256(path) for path in files})


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def hub_checkpoint(
    repo_id: str, *, checkpoint: str = LAST_CHECKPOINT, revision: str | None = None, token: str | bool | None = None
) -> str:
    """Downloads a checkpoint that a trainer with hub_strategy="checkpoint" pushed; the run goes on from it.

        trainer.train(resume_from_checkpoint=hub_checkpoint("org/name"))

    Args:
        checkpoint: its folder in the repository; "checkpoint-500", say, where hub_strategy was "all_checkpoints".
        revision: branch or commit. token: None takes the stored one.

    Returns the folder on this machine.

    Raises ValueError where there is no such checkpoint, or it is not whole because its push was interrupted.
    """
    # one commit for all files, also while a run pushes the next one
    at = {"revision": HfApi().model_info(repo_id, revision=revision, token=token).sha, "token": token}
    files = _listed_files(repo_id, checkpoint, at)
    patterns = [f"{checkpoint}/*"] if files is None else [f"{checkpoint}/{name}" for name in (*files, _LIST)]
    folder = Path(snapshot_download(repo_id, allow_patterns=patterns, **at)) / checkpoint
    if not (folder / "trainer_state.json").is_file():
        raise ValueError(
            f"{repo_id} holds no checkpoint in {checkpoint!r}; a trainer pushes one with push_to_hub=True, "
            "hub_strategy='checkpoint'"
        )
    for name, sha256 in (files or {}).items():
        if not (folder / name).is_file() or _sha256(folder / name) != sha256:
            raise ValueError(
                f"{checkpoint}/{name} of {repo_id} is not of the same step as the rest of the checkpoint: its push was "
                f"interrupted. Take an earlier commit: hub_checkpoint({repo_id!r}, revision='...')"
            )
    return str(folder)


def _listed_files(repo_id: str, checkpoint: str, at: dict[str, Any]) -> dict[str, str] | None:
    """Name -> sha256 of the checkpoint's files, or None where another trainer pushed it."""
    try:
        path = Path(hf_hub_download(repo_id, f"{checkpoint}/{_LIST}", **at))
    except EntryNotFoundError:
        return None
    return read_object(path, f"take an earlier commit of {repo_id}: hub_checkpoint({repo_id!r}, revision='...')")
