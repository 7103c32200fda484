"""`hf-bitnet completion`: scripts made from the parser; bash's is run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_bitnet.cli import completion
from hf_bitnet.cli.options import PRESETS
from tests.command_line import Captured, run

REPOSITORY = Path(__file__).resolve().parents[1]
SHELLS = ("bash", "zsh", "fish")


def completed(capsys: Captured, tmp_path: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    script = tmp_path / "completion.bash"
    script.write_text(run(capsys, "completion", "bash")[1])
    program = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _hf_bitnet; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "-u", "-c", program, "bash", str(script), "hf-bitnet", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not here")
def test_bash(capsys: Captured, tmp_path: Path) -> None:
    assert completed(capsys, tmp_path, "ex") == ["export"]
    assert {"quantize", "chat", "--version"} <= {*completed(capsys, tmp_path, "")}
    assert completed(capsys, tmp_path, "export", "m", "--fo") == ["--format", "--force"]
    assert completed(capsys, tmp_path, "export", "m", "--format", "gg") == ["gguf"]
    assert completed(capsys, tmp_path, "quantize", "m", "--preset", "") == [*PRESETS]
    assert completed(capsys, tmp_path, "completion", "") == [*SHELLS]
    assert "--debug" in completed(capsys, tmp_path, "completion", "-")
    # left to the shell, which completes files
    for words in (["quantize", "m"], ["eval", "m", "--text", "va"], ["eval", "m", "--text", ""], ["nonsense", ""]):
        assert completed(capsys, tmp_path, *words) == []


@pytest.mark.parametrize("shell", SHELLS)
def test_every_word_is_in_the_script(capsys: Captured, shell: str) -> None:
    code, script, err = run(capsys, "completion", shell)
    assert (code, err) == (0, "")
    for command in completion._commands(completion.build_parser("hf-bitnet", "1")):
        assert command.name in script
        for flag in (flag for option in command.options for flag in option.flags if flag.startswith("--")):
            assert (f"-l {flag[2:]}" if shell == "fish" else flag) in script
    assert json.loads(run(capsys, "completion", shell, "--json")[1]) == {"shell": shell, "script": script.rstrip("\n")}


@pytest.mark.parametrize("shell", SHELLS)
def test_shells_can_read_their_script(capsys: Captured, tmp_path: Path, shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not here")
    script = tmp_path / "script"
    script.write_text(run(capsys, "completion", shell)[1])
    done = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_quotes_of_the_shells() -> None:
    option = completion._Option(("-x", "--example"), "it's a [test]: 'a\\b'", ("one", "two"), True, False)
    command = completion._Command("make", "Don't.", (option,), ())
    fish = completion._fish([command])
    assert r"-s x -l example -x -a 'one two' -d 'it\'s a [test]: \'a\\b\''" in fish and r"-d 'Don\'t.'" in fish
    zsh = completion._zsh([command])
    # quoted once for zsh itself, inside that for _arguments
    assert r"""'*--example[it'"'"'s a \[test\]\: '"'"'a\\b'"'"']:value:(one two)'""" in zsh


def test_it_loads_nothing_heavy() -> None:
    script = "import sys; from hf_bitnet.cli import main; main(['completion', 'bash']); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
