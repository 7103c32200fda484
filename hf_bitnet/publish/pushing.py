"""push_to_hub: one commit a repository, with everything that belongs to a model, or nothing. Own.

`HfApi.upload_folder` cuts a long upload into several commits, between which a repository holds half a model; so this calls
`create_commit`. Large files go up first and are nobody's until the commit names them: a push that is interrupted leaves the
repository as it was. Leaves out: pull requests, datasets and spaces.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel

from ..hub import CARD, asking_nobody, shim_files
from .contents import CONFIG, REPORT, files_to_push, report_with
from .forms import gather
from .pushed_card import pushed_card

# the model of an earlier push, in whatever form: readers would take it for the new one, or for a part of it. Other files of
# the same kinds (adapter_model.safetensors) are not ours
_STALE = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|config\.json|export\.json|.*\.(gguf|onnx|onnx\.data)"
)
_FORM = "{form}"


@dataclass(frozen=True)
class PushedRepo:
    """What goes, or went, into one repository.

    Attributes:
        repo_id: of the repository. forms: which forms of the model.
        files: path there -> bytes. deleted: paths of an earlier push that are gone, of this form or another.
        left_out: file -> why it stays here. url: of the commit; None in a dry run.
    """

    repo_id: str
    forms: tuple[str, ...]
    files: dict[str, int]
    left_out: dict[str, str]
    deleted: list[str] = field(default_factory=list)
    url: str | None = None

    def __str__(self) -> str:
        size = sum(self.files.values())
        lines = [f"{self.repo_id}: {', '.join(self.forms)}; {len(self.files)} files, {size / 1e6:.2f} MB"]
        lines += [f"  {path}  {bytes / 1e6:.2f} MB" for path, bytes in self.files.items()]
        lines += [f"  deleted: {path}" for path in self.deleted]
        lines += [f"  left out: {path} ({why})" for path, why in self.left_out.items()]
        return "\n".join([*lines, "not pushed (dry run)" if self.url is None else self.url])


@dataclass(frozen=True)
class PushReport:
    """What `push_to_hub` did. `str()` prints it.

    Attributes:
        repos: one for each repository.
    """

    repos: list[PushedRepo]

    @property
    def files(self) -> dict[str, int]:
        """Path -> bytes; with several repositories their ids stand in front."""
        several = len(self.repos) > 1
        return {f"{r.repo_id}/{path}" if several else path: size for r in self.repos for path, size in r.files.items()}

    @property
    def urls(self) -> list[str]:
        """Of the commits; empty after a dry run."""
        return [repo.url for repo in self.repos if repo.url is not None]

    @property
    def url(self) -> str | None:
        """Of the first commit; None after a dry run."""
        return next(iter(self.urls), None)

    def __str__(self) -> str:
        return "\n".join(map(str, self.repos))


def push_to_hub(
    source: PreTrainedModel | str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    repo_id: str,
    *,
    forms: Sequence[str] | None = None,
    tokenizer: Any = None,
    base_model: str | None = None,
    card: bool = True,
    remote_code: bool = False,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    dry_run: bool = False,
) -> PushReport:
    """Pushes a quantized model, with its card, in one form or several; each repository gets one commit.

    In each folder that is pushed the model of an earlier push goes, also one in another form; foreign files stay.

        push_to_hub("out", "me/model")                                    # the packed model of a run
        push_to_hub("out", "me/model", forms=("packed", "train", "gguf"))   # in one repository
        push_to_hub("out", "me/model-{form}", forms=("packed", "gguf"))     # in two

    Args:
        source: a folder that save_pretrained, export_model or MeasuredRun wrote; or a model; or {form: folder}. Folders are
            not changed.
        repo_id: is made where it is not there. With "{form}" in it, each form gets a repository of its own; else the first
            lies at the root, and each other in a folder of its name: from_pretrained(repo_id, subfolder="train").
        forms: "train", "packed" and names of export formats. What `source` does not have is made of what it has. None: the
            form that the folder or model has, "packed" of a run, all of a mapping.
        tokenizer: for forms that are made; None takes the one beside the checkpoint.
        base_model: Hub id of the full-precision model, for a card that does not name it.
        card: False leaves the repository's README.md as it is.
        remote_code: adds a file with which `from_pretrained(..., trust_remote_code=True)` loads the form at the root without
            `import hf_bitnet`, or says what to install.
        private, token, revision: as of huggingface_hub; a branch `revision` is made where it is not there.
        commit_message: None names the forms.
        dry_run: check everything and say what would go; nothing is sent, nobody is asked.

    Raises:
        TypeError: `source` is no model, folder or mapping, `repo_id` no text.
        ValueError: there is no model in it; it did not pass its parity checks, or was changed since; it holds files that are
            not for others; a form cannot be made.
        ParityError: of a form that is made.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused; nothing in that repository is changed. With "{form}" others may
            have their commit already: a note of the error names them, and repositories that were made and are empty.
    """
    if not isinstance(repo_id, str):
        raise TypeError(f"push_to_hub takes the id of a repository, got {type(repo_id).__name__}; for example 'me/model'")
    validate_repo_id(repo_id.replace(_FORM, "form"))
    name = repo_id.replace(f"-{_FORM}", "").replace(_FORM, "").rpartition("/")[2] or "model"
    asking = asking_nobody() if dry_run else contextlib.nullcontext()
    with tempfile.TemporaryDirectory(prefix="hf_bitnet_push_") as work, asking:
        about = {"tokenizer": tokenizer, "base_model": base_model, "name": name}
        found = gather(source, forms, Path(work), about)
        parts = [{form: folder} for form, folder in found.items()] if _FORM in repo_id else [found]
        # every repository is complete here before the first one is touched
        plans = [_Plan(repo_id, part, base_model, card, remote_code) for part in parts]
        if dry_run:
            return PushReport([plan.repo() for plan in plans])
        api = HfApi(token=token, library_name="hf_bitnet")
        try:
            return PushReport([plan.push(api, private, revision, commit_message) for plan in plans])
        except BaseException as error:
            _say_what_is_there(error, plans)
            raise


def _say_what_is_there(error: BaseException, plans: Sequence[_Plan]) -> None:
    """Adds to an error what the Hub has of a push that failed in the middle."""
    lines = [f"pushed before this: {plan.url}" for plan in plans if plan.url is not None]
    lines += [f"made, and empty: {plan.repo_id}" for plan in plans if plan.empty]
    note = getattr(error, "add_note", None)  # not in Python 3.10
    if lines and note is not None:
        note("\n".join(lines))
    elif lines:
        warnings.warn("; ".join(lines), stacklevel=3)


class _Plan:
    """The commit of one repository."""

    def __init__(self, repo_id: str, forms: Mapping[str, Path], base_model: str | None, card: bool, remote_code: bool) -> None:
        self.forms = tuple(forms)
        self.repo_id = repo_id.replace(_FORM, self.forms[0])
        self.url: str | None = None
        self.empty = False  # whether the repository is there, with nothing in it
        self.files: dict[str, Path | bytes] = {}
        self.left_out: dict[str, str] = {}
        places = {"" if form == self.forms[0] else f"{form}/": form for form in forms}
        self.folders = {PurePosixPath(place) for place in places}
        brought: dict[str, int] = {}
        roots = {folder.resolve() for folder in forms.values()}
        for place, form in places.items():
            files, left_out = files_to_push(forms[form])
            self.files |= {place + path: file for path, file in files.items()}
            for path, why in left_out.items():
                if place + path not in places and (forms[form] / path).resolve() not in roots:  # else another place brings it
                    self.left_out[place + path] = why
            brought[place] = sum(file.stat().st_size for path, file in files.items() if place + path != CARD)
        if remote_code:
            shim = shim_files(forms[self.forms[0]] / CONFIG)
            self.files |= shim
            if REPORT in self.files:
                self.files[REPORT] = report_with(forms[self.forms[0]] / REPORT, shim)
        self.files.pop(CARD, None)
        if card:
            folders = {place: forms[form] for place, form in places.items()}
            made = pushed_card(folders, self.forms, brought, self.repo_id, base_model)
            self.files[CARD] = str(made).encode()

    def repo(self, deleted: Sequence[str] = ()) -> PushedRepo:
        sizes = {path: len(file) if isinstance(file, bytes) else file.stat().st_size for path, file in self.files.items()}
        return PushedRepo(self.repo_id, self.forms, dict(sorted(sizes.items())), self.left_out, list(deleted), self.url)

    def push(self, api: HfApi, private: bool | None, revision: str | None, message: str | None) -> PushedRepo:
        self.repo_id = repo_id = api.create_repo(self.repo_id, private=private, exist_ok=True).repo_id
        there = api.model_info(repo_id)
        self.empty = {each.rfilename for each in there.siblings or []} <= {".gitattributes"}
        if private and there.private is False:
            raise ValueError(
                f"private=True, but {repo_id} is there already and public, so nothing was pushed. Make it private first: "
                f"huggingface_hub.HfApi().update_repo_settings({repo_id!r}, private=True); or choose another repository"
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
            there = api.model_info(repo_id, revision=revision)
        stale = sorted(self._stale([each.rfilename for each in there.siblings or []]))
        operations: list[CommitOperationAdd | CommitOperationDelete] = [CommitOperationDelete(path) for path in stale]
        operations += [CommitOperationAdd(path, file) for path, file in sorted(self.files.items())]
        done = api.create_commit(
            repo_id,
            operations,
            commit_message=message or f"Upload {', '.join(self.forms)} with hf_bitnet",
            revision=revision,
            parent_commit=there.sha,  # nobody else's commit is lost
        )
        self.url, self.empty = str(done.commit_url), False
        return self.repo(stale)

    def _stale(self, there: Sequence[str]) -> list[str]:
        """The model of an earlier push that would lie beside the new one in the same folder."""
        parts = [(path, PurePosixPath(path)) for path in there if path not in self.files]
        return [path for path, part in parts if part.parent in self.folders and _STALE.fullmatch(part.name)]
