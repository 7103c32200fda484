"""The loopback Hub is as strict as the Hub, so that what passes here may be believed. Every request is the client's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub_server import LoopbackHub, Refused

WEIGHTS = bytes(range(256)) * 40


def add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


def pushed(hub: LoopbackHub, repo_id: str = "org/model", private: bool = False) -> HfApi:
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    operations = [add("config.json", b"{}"), add("model.safetensors", WEIGHTS), add("sub/x.txt", b"x")]
    api.create_commit(repo_id, operations, commit_message="all")
    return api


def test_what_is_pushed_comes_back(hub: LoopbackHub) -> None:
    api = pushed(hub)
    folder = Path(snapshot_download("org/model"))
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS and (folder / "sub" / "x.txt").read_bytes() == b"x"
    assert hub.commits("org/model") == ["all"]
    first = api.model_info("org/model").sha
    api.create_commit(
        "org/model",
        [CommitOperationDelete("sub/"), add("config.json", b"[]"), add("model.safetensors", WEIGHTS)],
        commit_message="2",
    )
    assert set(hub.files("org/model")) == {".gitattributes", "config.json", "model.safetensors"}
    # the old state stays under its name
    assert Path(hf_hub_download("org/model", "config.json", revision=first)).read_bytes() == b"{}"
    assert Path(hf_hub_download("org/model", "config.json")).read_bytes() == b"[]"
    assert len([method for method, _ in hub.requests if method == "PUT"]) == 1  # the same bytes are not sent twice


def test_private_repositories_and_tokens(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    api = pushed(hub, private=True)
    assert api.model_info("org/model").private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("org/model", "config.json", token=False)
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token="hf_another").create_repo("org/other")
    hub.repositories["org/model"].private = False
    assert hf_hub_download("org/model", "config.json", token=False)
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token=False).create_commit("org/model", [add("config.json", b"{1}")], commit_message="no")
    assert hub.commits("org/model") == ["all"]


def test_what_is_not_there(hub: LoopbackHub) -> None:
    api = pushed(hub)
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("org/model", "adapter_config.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("org/model", "config.json", revision="nowhere")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/another")
    assert not api.file_exists("org/model", "README.md") and api.file_exists("org/model", "config.json")


def test_bad_commits_leave_everything_as_it_was(hub: LoopbackHub) -> None:
    api = pushed(hub)
    before, head = hub.files("org/model"), str(api.model_info("org/model").sha)
    with pytest.raises(HfHubHTTPError, match="A file with this name doesn't exist"):
        api.create_commit("org/model", [add("a.txt", b"a"), CommitOperationDelete("b.txt")], commit_message="no")
    with pytest.raises(ValueError, match="base_model_relation must be one of"):
        card = b"---\nbase_model_relation: derived\n---\n"
        api.create_commit("org/model", [add("README.md", card)], commit_message="no")
    assert hub.files("org/model") == before
    api.create_commit("org/model", [add("a.txt", b"a")], commit_message="yes", parent_commit=head)
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("org/model", [add("a.txt", b"b")], commit_message="no", parent_commit=head)
    with pytest.raises(Refused, match="never uploaded"):
        line = {"key": "lfsFile", "value": {"path": "x.gguf", "oid": "0" * 64, "size": 3}}
        hub.commit("org/model", "main", [{"key": "header", "value": {"summary": "no"}}, line])


def test_branches(hub: LoopbackHub) -> None:
    api = pushed(hub)
    api.create_branch("org/model", branch="v2")
    api.create_branch("org/model", branch="v2", exist_ok=True)
    api.create_commit("org/model", [add("a.txt", b"a")], commit_message="there", revision="v2")
    assert "a.txt" not in hub.files("org/model") and hub.files("org/model", "v2")["a.txt"] == b"a"
    assert {branch.name for branch in api.list_repo_refs("org/model").branches} == {"main", "v2"}
    api.delete_repo("org/model")
    assert not hub.repositories


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ("tags: [a, 1]", "tags must be a list of strings"),
        ("tags: [a, a]", "tags holds a value twice"),
        ("license: [", "not YAML"),
        ("- a", "must be a dict|must be a mapping"),
        ("base_model: a folder", "base_model must name repositories"),
        ("license: 3", "license must be a string"),
        ("model-index: [{name: x}]", "needs a name and results"),
        ("model-index: [{name: x, results: [{task: {}, dataset: {}, metrics: [{}]}]}]", "each metric needs type and value"),
        ("model-index: {}", "model-index must be a list"),
    ],
)
def test_metadata_that_the_hub_refuses(hub: LoopbackHub, block: str, words: str) -> None:
    api = pushed(hub)
    with pytest.raises(ValueError, match=words):
        api.create_commit("org/model", [add("README.md", f"---\n{block}\n---\n# x\n".encode())], commit_message="no")
    ModelCard("---\nlicense: mit\ntags: [a, b]\n---\n").validate()


def test_requests_that_break(hub: LoopbackHub) -> None:
    api = pushed(hub)

    def refuse(number: int, method: str, path: str) -> None:
        if "/commit/" in path:
            raise Refused(403, "Forbidden", "not now")

    hub.before = refuse
    with pytest.raises(HfHubHTTPError, match="not now"):
        api.create_commit("org/model", [add("a.txt", b"a")], commit_message="no")
    assert hub.commits("org/model") == ["all"]
