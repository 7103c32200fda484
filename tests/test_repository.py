"""What must not be in the repository: paths of one machine, unfinished marks, large files."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
MAX_BYTES = 1_000_000
# written so that this file does not match itself
MACHINE_PATH = re.compile(r"(?<![\w.])/(work|farm|root|home|Users|tm[p])/")
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the repository is not known")
    command = ["git", "ls-files", "-z"]
    output = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    files = [REPOSITORY / name for name in output.split("\0") if name]
    return [file for file in files if file.is_file()]


def _hits(files: list[Path], pattern: re.Pattern[str]) -> Iterator[str]:
    for file in files:
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1):
            if pattern.search(line):
                yield f"{file.relative_to(REPOSITORY)}:{number}: {line.strip()[:100]}"


def test_no_path_of_one_machine(tracked: list[Path]) -> None:
    assert not list(_hits(tracked, MACHINE_PATH))


def test_nothing_unfinished(tracked: list[Path]) -> None:
    package = [file for file in tracked if file.is_relative_to(REPOSITORY / "hf_bitnet")]
    assert not list(_hits(package, UNFINISHED))


def test_no_large_file(tracked: list[Path]) -> None:
    assert not {str(file): file.stat().st_size for file in tracked if file.stat().st_size > MAX_BYTES}


def test_patterns_see_what_they_are_for(tmp_path: Path) -> None:
    bad = "/".join(["", "root", "x.txt"])
    assert MACHINE_PATH.search(f'open("{bad}")')
    assert not MACHINE_PATH.search(f"https://example.org{bad}")
    assert UNFINISHED.search("# TO" + "DO: later")
