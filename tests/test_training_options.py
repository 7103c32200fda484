"""Fields of QATArguments that hold an object: the four ways of writing one, and what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hf_bitnet.training.options import number, plain, read_mapping, read_options, whole


@dataclass(frozen=True)
class _Noise:
    rate: float
    kind: str = "subset"

    def __post_init__(self) -> None:
        number("rate", self.rate, 0.0, 1.0)


def test_four_ways_to_write_one(tmp_path: Path) -> None:
    file = tmp_path / "noise.json"
    file.write_text(json.dumps({"rate": 0.5}))
    for written in (_Noise(0.5), {"rate": 0.5}, '{"rate": 0.5}', str(file)):
        assert read_options(_Noise, "noise", written) == _Noise(0.5)
    assert read_options(_Noise, "noise", None) is None
    assert plain(_Noise(0.5)) == {"rate": 0.5, "kind": "subset"}
    assert plain(0.5) == 0.5


@pytest.mark.parametrize(
    ("written", "kind", "words"),
    [
        ({"rat": 0.5}, ValueError, r"noise has no key 'rat'; legal: 'rate', 'kind'. Did you mean 'rate'\?"),
        ({"rate": 2}, ValueError, "noise: rate=2 is out of range; legal: from 0 to 1"),
        ({"rate": "0.5"}, TypeError, "noise: rate must be a number from 0 to 1, got '0.5'"),
        ({}, TypeError, "noise: .*missing 1 required positional argument: 'rate'"),
        (0.5, TypeError, r"noise must be a _Noise, a dict, JSON text \('{...}'\) or the path of a JSON file, got float 0.5"),
        ("{rate: 0.5}", ValueError, "noise='{rate: 0.5}' is not valid JSON"),
        ("no-such-file.json", ValueError, "noise='no-such-file.json' is no file that can be read"),
        ("[0.5]", TypeError, "holds a list; legal: a _Noise"),
    ],
)
def test_what_is_refused(written: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        read_options(_Noise, "noise", written)


def test_a_mapping_is_copied() -> None:
    given = {"a": 1}
    read_mapping("field", given)["b"] = 2
    assert given == {"a": 1}


def test_whole_numbers() -> None:
    whole("every", 0, lowest=0)
    for wrong in (0, 1.0, True, "3"):
        with pytest.raises(ValueError, match="every must be a whole number of at least 1"):
            whole("every", wrong)
