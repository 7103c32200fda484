"""A Hugging Face Hub on 127.0.0.1, in memory, that the unmodified huggingface_hub client works with. Own.

It speaks what pushing and loading models asks of the Hub: repositories, branches and commits, large files (the git-lfs
protocol, basic transfers), downloads with ranges, tokens, private repositories, and the check of a card's metadata. It is
strict where the Hub is: a commit of a large file that was never uploaded, bytes of another hash, a metadata block that the
Hub would refuse, a commit on a parent that is no longer the last one. Leaves out: Xet, pull requests, datasets and spaces.

    with LoopbackHub() as hub:
        subprocess.run(command, env={**os.environ, **hub.environment})
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

from tests.hub_metadata import metadata_errors
from tests.hub_routes import MAIN, ROUTES, Refused

TOKEN = "hf_of_the_loopback_hub"


class File(NamedTuple):
    """A file of a commit: sha256 of its bytes, and whether it was committed through LFS."""

    sha256: str
    large: bool


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    files: dict[str, File]


@dataclass
class Repository:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch's name or an oid (or its beginning) means."""
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = (commit for branch in self.branches.values() for commit in branch)
        return next((commit for commit in commits if len(revision) >= 7 and commit.oid.startswith(revision)), None)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    errors: list[BaseException]

    def handle_error(self, *unused: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):  # a client that was killed is no news
            self.errors.append(error)


class LoopbackHub:
    """A Hub of one user.

    Attributes:
        repositories: id -> Repository. blobs: sha256 -> bytes.
        requests: (method, path) of everything that was asked, in order.
        before: called with (number, method, path) before a request is looked at; may raise Refused, or kill somebody.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.before: Callable[[int, str, str], None] = lambda number, method, path: None
        self.lock = threading.RLock()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (Request,), {"hub": self}))
        self._server.errors = []
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """For a process that uses this Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *unused: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
        if self._server.errors:
            raise self._server.errors[0]

    # ---- for tests ----

    def files(self, repo_id: str, revision: str = MAIN) -> dict[str, bytes]:
        """Path -> bytes of everything that a repository holds."""
        commit = self.repositories[repo_id].find(revision)
        assert commit is not None
        return {path: self.blobs[file.sha256] for path, file in commit.files.items()}

    def commits(self, repo_id: str, branch: str = MAIN) -> list[str]:
        """Titles of the commits, the first one (which makes the repository) left out."""
        return [commit.title for commit in self.repositories[repo_id].branches[branch]][1:]

    def forget_uploads(self) -> None:
        """Removes what was uploaded and is in no commit."""
        kept = {
            file.sha256 for r in self.repositories.values() for b in r.branches.values() for c in b for file in c.files.values()
        }
        self.blobs = {key: content for key, content in self.blobs.items() if key in kept}

    # ---- what requests do ----

    def create(self, repo_id: str, private: bool) -> bool:
        """Whether the repository is new."""
        if repo_id in self.repositories:
            return False
        first = self._commit("initial commit", {".gitattributes": self._store(b"*.safetensors filter=lfs -text\n")}, repo_id)
        self.repositories[repo_id] = Repository(private, {MAIN: [first]})
        return True

    def _store(self, content: bytes, large: bool = False) -> File:
        key = hashlib.sha256(content).hexdigest()
        self.blobs[key] = content
        return File(key, large)

    def _commit(self, title: str, files: dict[str, File], salt: str) -> Commit:
        return Commit(hashlib.sha1(repr((salt, title, sorted(files.items()))).encode()).hexdigest(), title, files)

    def commit(self, repo_id: str, branch: str, lines: list[dict[str, Any]]) -> Commit:
        """All of the operations, or Refused and none of them."""
        history = self.repositories[repo_id].branches.get(branch)
        if history is None:
            raise Refused(404, "RevisionNotFound", f"no branch {branch}")
        files = dict(history[-1].files)
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, history[-1].oid):
            raise Refused(412, "PreconditionFailed", "the branch has moved since that parent commit")
        for line in lines:
            self._apply(files, line["key"], line["value"])
        if "README.md" in files:
            errors = metadata_errors(self.blobs[files["README.md"].sha256].decode())
            if errors:
                raise Refused(400, "BadRequest", f"invalid metadata: {errors}")
        made = self._commit(header["summary"], files, f"{history[-1].oid}")
        history.append(made)
        return made

    def _apply(self, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
        path = value.get("path", "").rstrip("/")
        if key != "header" and (not path or path.startswith("/") or ".." in path.split("/")):
            raise Refused(400, "BadRequest", f"illegal path {path!r}")
        if key == "file":
            files[path] = self._store(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if len(self.blobs.get(value["oid"], b"")) != value["size"]:
                raise Refused(400, "BadRequest", f"{path}: its content was never uploaded")
            files[path] = File(value["oid"], True)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [each for each in files if each == path or (key == "deletedFolder" and each.startswith(f"{path}/"))]
            if not gone:
                raise Refused(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
            for each in gone:
                del files[each]
        elif key != "header":
            raise Refused(400, "BadRequest", f"unknown operation {key!r}")


class Request(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *unused: Any) -> None:  # type: ignore[override]
        """Says nothing."""

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self._read: bytes | None = None
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            number = len(self.hub.requests)
        try:
            self.hub.before(number, self.command, path)
            content = self.content()
            for method, pattern, answer in ROUTES:
                found = re.fullmatch(pattern, path)
                if self.command in method.split() and found:
                    with self.hub.lock:
                        status, body, headers = answer(self, content, *found.groups())
                    break
            else:
                raise Refused(404, "EntryNotFound", f"this Hub has no {self.command} {path}")
        except Refused as error:
            self.content()  # what is left of it would be taken for the next request
            status, body = error.status, {"error": str(error)}
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error), **error.headers}
        self._send(status, body, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def content(self) -> bytes:
        """The body of the request."""
        if self._read is None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                self._read = b"".join(self._chunks())
            else:
                length = int(self.headers.get("Content-Length") or 0)
                self._read = self.rfile.read(length)
                if len(self._read) < length:
                    raise ConnectionAbortedError
        return self._read

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().strip() or b"0", 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, status: int, body: Any, headers: dict[str, str]) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # ---- who asks, and for what ----

    def may_write(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refused(401, "Unauthorized", "Invalid username or password.")

    def repository(self, repo_id: str) -> Repository:
        found = self.hub.repositories.get(repo_id)
        if found is None or (found.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            raise Refused(404, "RepoNotFound", "Repository not found")
        return found

    def revision(self, repo_id: str, revision: str) -> Commit:
        found = self.repository(repo_id).find(revision)
        if found is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found


@contextmanager
def loopback_hub(monkeypatch: pytest.MonkeyPatch, cache: Any) -> Iterator[LoopbackHub]:
    """A Hub that this very process uses, with an empty cache.

    The client reads where the Hub is when it is imported, so what it read is set; its code is as it is. `environment` does
    the same for another process.
    """
    import huggingface_hub
    import transformers.utils.hub
    from huggingface_hub import constants

    with LoopbackHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
