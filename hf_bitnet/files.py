"""Floor 0: files and folders that are either complete or not there. Own.

Everything is written under a name that nobody uses, beside the one it is for, and renamed when it is whole: a rename within
one folder is one step of the file system, and on Linux so is the exchange of two folders. The name tells which process of
which machine writes there, so that what a killed one left behind is removed by the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_CONFIG, _REPORT = "config.json", "export.json"
# what says that a folder was written by this library, or holds a model
_MARKS = (_CONFIG, _REPORT)
# what huggingface_hub leaves beside what it downloads; and what Trainer needs to go on
_CACHES = (".cache",)
_OF_TRAINING = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "trainer_state.json")
# what save_pretrained of models, tokenizers and processors writes, what exporters write, and what repositories bring along
_OF_MODELS = (
    *("*.json", "model*.safetensors", "pytorch_model*.bin", "*.gguf", "*.onnx", "*.onnx_data", "*.onnx.data"),
    *(
        "*.model",
        "*.spm",
        "*.tiktoken",
        "*.jinja",
        "merges.txt",
        "vocab.txt",
        "vocab.*",
        "bpe.codes",
        "dict.txt",
        "*.tokenizer",
    ),
    *("README.md", "training_args.bin", "LICENSE*", "NOTICE*", "USE_POLICY*", ".gitattributes", ".gitignore", "*.svg"),
)


def beside(path: Path) -> Path:
    """A name that nobody uses, in the same folder."""
    return path.with_name(f".{path.name}.{_machine()}.{os.getpid()}.{uuid.uuid4().hex[:8]}")


@functools.cache
def _machine() -> str:
    """Of the running system and of the container: only there a process number means one process."""
    known = [platform.node()]
    with contextlib.suppress(OSError):  # not on Linux
        known += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:12]


def remove_leftovers(path: Path) -> None:
    """Removes what processes of this machine that are gone were writing for `path`."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{_machine()}\.(\d+)\.[0-9a-f]{{8}}")
    for found in path.parent.glob(f".{glob.escape(path.name)}.*"):
        match = pattern.fullmatch(found.name)
        if match is None or _is_running(int(match[1])):
            continue
        if found.is_dir() and not found.is_symlink():
            shutil.rmtree(found, ignore_errors=True)
        else:
            found.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def write_text(path: Path, text: str) -> Path:
    """Writes a UTF-8 file, whole or not at all."""
    temporary = beside(path)
    try:
        with open(temporary, "x", encoding="utf-8", newline="") as file:
            file.write(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: str | os.PathLike[str], values: Mapping[str, Any]) -> Path:
    """Writes a JSON file, whole or not at all."""
    return write_text(Path(path), json.dumps(values, indent=1) + "\n")


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError that ends in `advice` when it is damaged, or holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}); {advice}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object but {type(values).__name__}; {advice}")
    return values


def refuse_existing(folder: str | os.PathLike[str], *, overwrite: bool, advice: str = "overwrite=True") -> None:
    """Raises ValueError when a folder holds something, and may not be or should not be replaced.

    Args:
        overwrite: allows to replace a folder that holds a model (a config.json or export.json), and nothing that is no part
            of one: no other folders (.git, runs), no adapter, no code, no notes, no state of a training run.
        advice: how the caller's user allows it.
    """
    path = Path(folder)
    if not os.fspath(folder) or path.resolve() == Path.cwd():
        raise ValueError(f"{os.fspath(folder)!r} is the folder that this process is in, which is not replaced; name another")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; give a folder")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"the folder {str(folder)!r} is not empty; choose another one, or replace it: {advice}")
    if not any((path / mark).is_file() for mark in _MARKS):
        raise ValueError(f"the folder {str(folder)!r} holds no model (no {_CONFIG}), so it is not replaced; choose another one")
    if (strange := _no_part_of_a_model(path)) is not None:
        raise ValueError(
            f"the folder {str(folder)!r} holds {strange!r} beside a model, so it is not replaced; move that, or choose another"
        )


def _no_part_of_a_model(folder: Path) -> str | None:
    """The name of something in a folder with a model that would be lost with it."""
    written: set[str] = set()
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        written = {Path(name).parts[0] for name in json.loads((folder / _REPORT).read_text(encoding="utf-8")).get("files", ())}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            known = entry.name in _CACHES
        else:
            known = any(map(entry.match, _OF_MODELS)) and entry.name not in _OF_TRAINING
        if entry.name not in written and not known:
            return entry.name
    return None


def refuse_overlap(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Raises ValueError when the folder to write and the folder that is read (or a name on the Hub) lie in one another."""
    if not os.path.isdir(source):
        return
    one, other = Path(source).resolve(), Path(target).resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ValueError(f"{os.fspath(target)!r} and the checkpoint {os.fspath(source)!r} overlap; choose another folder")


@contextmanager
def new_folder(folder: str | os.PathLike[str], *, overwrite: bool = False, advice: str = "overwrite=True") -> Iterator[Path]:
    """Yields an empty folder that becomes `folder` at the end, and disappears after an error.

    Raises ValueError as `refuse_existing` does, at once and again at the end: others may write there meanwhile.
    """
    refuse_existing(folder, overwrite=overwrite, advice=advice)
    path = Path(os.path.realpath(folder))  # of a link, what it leads to is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary = beside(path)
    temporary.mkdir()
    try:
        yield temporary
        refuse_existing(path, overwrite=overwrite, advice=advice)
        put_in_place(temporary, path, overwrite=overwrite)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(temporary: Path, path: Path, *, overwrite: bool = True) -> None:
    """Renames a complete folder to `path`; what was there is removed when the new one is in its place.

    Without `overwrite` only an empty folder is, else OSError is raised.

    On Linux the two are exchanged in one step: whenever the process is killed, the old or the new folder is at `path`.
    Elsewhere there are two renames, and between them the old folder is beside it.
    """
    if not overwrite or not path.exists():
        if os.name == "nt" and path.is_dir():
            path.rmdir()  # elsewhere a rename replaces an empty folder, and fails where it is not empty
        os.replace(temporary, path)
        return
    if _exchange(temporary, path):
        shutil.rmtree(temporary, ignore_errors=True)
        return
    old = beside(path)
    os.replace(path, old)
    try:
        os.replace(temporary, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Whether the two names were exchanged; some systems and file systems cannot."""
    call = _renameat2()
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
    return call is not None and call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


@functools.cache
def _renameat2() -> Any:
    if os.name != "posix":
        return None
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
        call.restype = ctypes.c_int
    return call
