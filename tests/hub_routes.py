"""The requests that the loopback Hub (`tests/hub_server.py`) answers. Own.

Each function takes (request, body, what the path names) and returns (status, body, headers), or raises Refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import yaml

from tests.hub_metadata import metadata_errors

if TYPE_CHECKING:
    from tests.hub_server import File, Request

MAIN, USER = "main", "tester"
# what the Hub takes as large files only
_LARGE = 10_000_000
_LARGE_SUFFIXES = (".safetensors", ".gguf", ".onnx", ".bin", ".pt", ".pth", ".npz", ".onnx_data")


class Refused(Exception):
    """An answer that is an error, with the code by which the client tells errors apart."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


Answer = tuple[int, Any, dict[str, str]]


def _whoami(h: Request, body: bytes) -> Answer:
    h.may_write()
    return 200, {"name": USER, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}, {}


def _create(h: Request, body: bytes) -> Answer:
    h.may_write()
    asked = json.loads(body)
    repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
    new = h.hub.create(repo_id, asked.get("visibility") == "private" or bool(asked.get("private")))
    return (200 if new else 409), {"url": f"{h.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}, {}


def _delete(h: Request, body: bytes) -> Answer:
    h.may_write()
    asked = json.loads(body)
    repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
    h.repository(repo_id)
    del h.hub.repositories[repo_id]
    return 200, {}, {}


def _validate(h: Request, body: bytes) -> Answer:
    errors = metadata_errors(json.loads(body)["content"])
    return (400 if errors else 200), {"errors": [{"message": error} for error in errors], "warnings": []}, {}


def _preupload(h: Request, body: bytes, repo_id: str, revision: str) -> Answer:
    h.may_write()
    files, answers = h.revision(repo_id, revision).files, []
    for each in json.loads(body)["files"]:
        path, large = each["path"], each["path"].endswith(_LARGE_SUFFIXES) or each["size"] > _LARGE
        answers.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
        if path in files:
            answers[-1]["oid"] = files[path].sha256 if files[path].large else _git_oid(h.hub.blobs[files[path].sha256])
    return 200, {"files": answers}, {}


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _batch(h: Request, body: bytes, repo_id: str) -> Answer:
    h.may_write()
    h.repository(repo_id)
    asked = json.loads(body)
    if asked["operation"] != "upload" or asked["hash_algo"] != "sha256":
        raise Refused(422, "BadRequest", "this Hub takes uploads by sha256")
    objects = []
    for each in asked["objects"]:
        upload = {"href": f"{h.hub.url}/upload/{each['oid']}/{each['size']}"}
        actions = {"upload": upload, "verify": {"href": f"{h.hub.url}/verify/{repo_id}"}}
        objects.append({**each, **({} if each["oid"] in h.hub.blobs else {"actions": actions})})
    return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}


def _upload(h: Request, body: bytes, sha256: str, size: str) -> Answer:
    if len(body) != int(size) or hashlib.sha256(body).hexdigest() != sha256:
        raise Refused(400, "BadRequest", "these are not the bytes that were announced")
    h.hub.blobs[sha256] = body
    return 200, b"", {}


def _verify(h: Request, body: bytes, repo_id: str) -> Answer:
    h.may_write()
    asked = json.loads(body)
    if len(h.hub.blobs.get(asked["oid"], b"")) != asked["size"]:
        raise Refused(404, "EntryNotFound", "that object was not uploaded")
    return 200, {}, {}


def _commit(h: Request, body: bytes, repo_id: str, revision: str) -> Answer:
    h.may_write()
    h.repository(repo_id)
    made = h.hub.commit(repo_id, revision, [json.loads(line) for line in body.splitlines() if line.strip()])
    url = f"{h.hub.url}/{repo_id}/commit/{made.oid}"
    return 200, {"success": True, "commitUrl": url, "commitOid": made.oid, "pullRequestUrl": None}, {}


def _branch(h: Request, body: bytes, repo_id: str, branch: str) -> Answer:
    h.may_write()
    branches = h.repository(repo_id).branches
    if branch in branches:
        raise Refused(409, "Conflict", "Reference already exists")
    branches[branch] = branches[MAIN][:1]
    return 200, {}, {}


def _info(h: Request, body: bytes, repo_id: str, revision: str = MAIN) -> Answer:
    found = h.revision(repo_id, revision)
    card = h.hub.blobs[found.files["README.md"].sha256].decode() if "README.md" in found.files else ""
    answer = {"id": repo_id, "modelId": repo_id, "sha": found.oid, "private": h.repository(repo_id).private, "downloads": 0}
    answer |= {"cardData": _metadata(card), "tags": _metadata(card).get("tags", [])}
    return 200, answer | {"siblings": [{"rfilename": path} for path in sorted(found.files)]}, {}


def _metadata(card: str) -> dict[str, Any]:
    block = re.match(r"---\n(.*?)\n---", card, flags=re.DOTALL)
    return (yaml.safe_load(block[1]) or {}) if block else {}


def _tree(h: Request, body: bytes, repo_id: str, revision: str, folder: str = "") -> Answer:
    found, entries = h.revision(repo_id, revision).files, []
    for path, file in sorted(found.items()):
        if folder and not path.startswith(f"{folder}/"):
            continue
        entries.append(_entry(h.hub.blobs[file.sha256], path, file))
    if folder and not entries:
        raise Refused(404, "EntryNotFound", f"{folder} does not exist")
    return 200, entries, {}


def _entry(content: bytes, path: str, file: File) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
    return entry | ({"lfs": {"oid": file.sha256, "size": len(content), "pointerSize": 130}} if file.large else {})


def _references(h: Request, body: bytes, repo_id: str) -> Answer:
    branches = h.repository(repo_id).branches
    listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": made[-1].oid} for name, made in branches.items()]
    return 200, {"branches": listed, "tags": [], "converts": []}, {}


def _resolve(h: Request, body: bytes, repo_id: str, revision: str, path: str) -> Answer:
    found = h.revision(repo_id, revision)
    about = {"X-Repo-Commit": found.oid}
    if path not in found.files:
        raise Refused(404, "EntryNotFound", "Entry not found", **about)
    file = found.files[path]
    content = h.hub.blobs[file.sha256]
    etag = file.sha256 if file.large else _git_oid(content)
    about |= {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
    if file.large:
        about |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
    if part := re.fullmatch(r"bytes=(\d+)-(\d*)", h.headers.get("Range") or ""):
        first, last = int(part[1]), int(part[2] or len(content) - 1)
        return 206, content[first : last + 1], about | {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
    return 200, content, about


_ID = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", "/api/whoami-v2", _whoami),
    ("POST", "/api/repos/create", _create),
    ("DELETE", "/api/repos/delete", _delete),
    ("POST", "/api/validate-yaml", _validate),
    ("POST", rf"/api/models/{_ID}/preupload/(.+)", _preupload),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _batch),
    ("PUT", r"/upload/([0-9a-f]{64})/(\d+)", _upload),
    ("POST", rf"/verify/{_ID}", _verify),
    ("POST", rf"/api/models/{_ID}/commit/(.+)", _commit),
    ("POST", rf"/api/models/{_ID}/branch/(.+)", _branch),
    ("GET", rf"/api/models/{_ID}/tree/([^/]+)/?(.*)", _tree),
    ("GET", rf"/api/models/{_ID}/refs", _references),
    ("GET", rf"/api/models/{_ID}/revision/(.+)", _info),
    ("GET", rf"/api/models/{_ID}", _info),
    ("GET HEAD", rf"/{_ID}/resolve/([^/]+)/(.+)", _resolve),
]
