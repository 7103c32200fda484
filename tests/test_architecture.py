"""The map of the package, held with plain `ast`: who may import whom, and which words belong to which room.

A room is a folder or a file directly under `hf_bitnet/`. It imports from rooms of lower floors and from itself.
Imports inside functions and under TYPE_CHECKING count too. The rooms of the top floor are one front door: they may use
each other.
"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = "hf_bitnet"
TOP_FLOOR = 7
FLOORS = {
    "registry": 0,
    "files": 0,
    "pages": 0,
    "gguf_file": 0,
    "gguf_pre_tokenizers": 0,
    "kernels": 1,
    "quantizers": 2,
    "ste": 2,
    "relaxations": 2,
    "noise": 2,
    "modules": 3,
    "config": 3,
    "surgery": 4,
    "reports": 4,
    "calibration": 5,
    "analysis": 5,
    "export": 5,
    "importing": 5,
    "adapters": 5,
    "hub": 5,
    "plugin": 5,
    "training": 6,
    "metrics": 6,
    "publish": 6,
    "cli": TOP_FLOOR,
    "demo": TOP_FLOOR,
    "__init__": TOP_FLOOR,
    "_register": TOP_FLOOR,  # the part of __init__ that waits for transformers, then imports the plug-in
}
TOP_LEVEL = {
    "pyproject.toml",
    "hf_bitnet",
    "recipes",
    "tests",
    "benchmarks",
    "model_cards",
    "README.md",
    "LICENSE",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "Makefile",
}
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
MAX_LINES = 400


# ---- the checker: (path inside the package, source) -> violations ----


def violations(path: str, source: str) -> list[str]:
    """Every broken rule in one file; `path` is relative to the package, for example "modules/linear.py"."""
    tree = ast.parse(source, filename=path)
    found = [*_import_violations(path, tree), *_word_violations(path, tree)]
    return [f"{PACKAGE}/{path}:{line}: {text}" for line, text in sorted(found)]


def _room(path: str) -> str:
    return Path(path).parts[0].removesuffix(".py")


def _import_violations(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    room = _room(path)
    if room not in FLOORS:
        yield 1, f"{room!r} is not on the map; its floor has to be decided first (FLOORS in this test)"
        return
    for line, target in _package_imports(path, tree):
        if target not in FLOORS:
            yield line, f"imports {target!r}, which is not on the map"
        elif target == room or FLOORS[target] < FLOORS[room] or FLOORS[target] == FLOORS[room] == TOP_FLOOR:
            continue
        elif FLOORS[target] == FLOORS[room]:
            yield line, f"{room} imports its sibling {target} (both on floor {FLOORS[room]})"
        else:
            yield line, f"{room} (floor {FLOORS[room]}) imports {target} (floor {FLOORS[target]})"


def _package_imports(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, room) of everything a file imports from this package."""
    # the folders a relative import starts from: one dot is the folder of the file
    folder = (PACKAGE, *Path(path).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and _dotted(node.func).endswith("import_module") and node.args:
            argument = node.args[0]
            names = [argument.value] if isinstance(argument, ast.Constant) and isinstance(argument.value, str) else []
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == PACKAGE:
                # `from hf_bitnet import quantize_model` takes a public name: that is the front door, __init__
                is_room = len(parts) > 1 and parts[1] in _rooms()
                yield node.lineno, parts[1] if is_room else "__init__"


def _rooms() -> set[str]:
    entries = (REPOSITORY / PACKAGE).iterdir()
    return {*FLOORS, *(entry.stem for entry in entries if entry.suffix == ".py" or entry.is_dir())}


def _word_violations(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    room = _room(path)
    reads_environment = path == "kernels/dispatch.py" or room in ("cli", "demo")
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 1)
        if room not in ("quantizers", "config") and (scheme := _compared_scheme(node)):
            yield line, f"compares with the scheme name {scheme!r}; ask the quantizer object instead"
        if room != "surgery" and _tests_for_linear(node):
            yield line, "asks whether a module is an nn.Linear; only surgery/ selects modules"
        if room != "kernels" and isinstance(node, ast.Attribute) and _dotted(node).endswith(".device.type"):
            yield line, "reads .device.type; only kernels/ chooses by device"
        if not reads_environment and _reads_environment(node):
            yield line, "reads the environment; only kernels/dispatch.py (and cli, demo) may"
        if _unpickles(node):
            yield line, "loads or uses pickle (arbitrary code); use safetensors or json"


@lru_cache(maxsize=1)
def _schemes() -> frozenset[str]:
    """What quantizers/ registers in WEIGHT_SCHEMES and ACTIVATION_SCHEMES, so that a new scheme is covered at once."""
    names = set()
    for file in (REPOSITORY / PACKAGE / "quantizers").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and _dotted(node.func).endswith("_SCHEMES.register"):
                names |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    # "none" is also the name of other things (a strength schedule)
    return frozenset(names - {"none"})


def _compared_scheme(node: ast.AST) -> str | None:
    if isinstance(node, ast.Compare):
        operands: list[ast.AST] = [node.left, *node.comparators]
    elif isinstance(node, ast.MatchValue):
        operands = [node.value]
    else:
        return None
    for operand in operands:
        values = operand.elts if isinstance(operand, ast.Tuple | ast.List | ast.Set) else [operand]
        for value in values:
            if isinstance(value, ast.Constant) and value.value in _schemes():
                return str(value.value)
    return None


def _tests_for_linear(node: ast.AST) -> bool:
    """isinstance(m, nn.Linear), also inside a tuple or a union, and `type(m) is nn.Linear`."""
    if isinstance(node, ast.Call) and _dotted(node.func) == "isinstance" and len(node.args) == 2:
        candidates = list(ast.walk(node.args[1]))
    elif isinstance(node, ast.Compare):
        candidates = [node.left, *node.comparators]
    else:
        return False
    return any(_dotted(candidate) in ("Linear", "nn.Linear", "torch.nn.Linear") for candidate in candidates)


def _reads_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.module == "os" and any(alias.name in ("environ", "getenv") for alias in node.names)
    return isinstance(node, ast.Attribute) and _dotted(node) in ("os.environ", "os.getenv")


def _unpickles(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] in PICKLES for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        module = node.module or ""
        names = {alias.name for alias in node.names}
        return module.split(".")[0] in PICKLES or (module in ("torch", "torch.serialization") and "load" in names)
    return isinstance(node, ast.Attribute) and _dotted(node) in ("torch.load", "torch.serialization.load")


def _dotted(node: ast.AST) -> str:
    """`a.b.c` of an expression of names and attributes; what is neither becomes "?"."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


# ---- the tree ----


def _tracked() -> list[str]:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the repository is not known")
    output = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    return output.splitlines()


def test_every_file_of_the_package_keeps_to_its_room() -> None:
    package = REPOSITORY / PACKAGE
    files = sorted(package.rglob("*.py"))
    assert files, f"no Python file under {PACKAGE}/"
    found = [v for file in files for v in violations(file.relative_to(package).as_posix(), file.read_text())]
    assert not found, "\n" + "\n".join(found)


def test_no_long_file() -> None:
    lengths = {
        name: len((REPOSITORY / name).read_text().splitlines())
        for name in _tracked()
        if name.endswith((".py", ".cpp", ".h", ".inc", ".cu")) and (REPOSITORY / name).is_file()
    }
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}


def test_top_level_is_fixed() -> None:
    entries = {name.split("/")[0] for name in _tracked()}
    assert {entry for entry in entries if not entry.startswith(".")} <= TOP_LEVEL


# ---- the checker itself ----


@pytest.mark.parametrize(
    ("path", "source", "words"),
    [
        ("kernels/dispatch.py", "from hf_bitnet.quantizers import ternary", "floor 1) imports quantizers (floor 2)"),
        ("kernels/dispatch.py", "from ..quantizers import ternary", "floor 1) imports quantizers (floor 2)"),
        ("kernels/cpu/build.py", "from ... import modules", "floor 1) imports modules (floor 3)"),
        ("config.py", "from .modules import BitLinear", "config imports its sibling modules"),
        ("modules/linear.py", "def f():\n    import hf_bitnet.surgery", ":2: modules (floor 3) imports surgery"),
        ("export/gguf.py", "from ..hub import push", "export imports its sibling hub"),
        ("plugin.py", "from hf_bitnet import adapters", "plugin imports its sibling adapters"),
        ("surgery/swap.py", "from hf_bitnet import quantize_model", "imports __init__ (floor 7)"),
        ("surgery/swap.py", "import hf_bitnet", "imports __init__ (floor 7)"),
        ("training/trainer.py", "importlib.import_module('hf_bitnet.cli')", "imports cli (floor 7)"),
        ("helpers.py", "", "'helpers' is not on the map"),
        ("modules/linear.py", "from .. import utils_of_nobody", "imports __init__ (floor 7)"),
        ("modules/linear.py", "if scheme == 'ternary': pass", "scheme name 'ternary'"),
        ("export/gguf.py", "if scheme in ('int4', 'int8'): pass", "scheme name 'int4'"),
        ("export/gguf.py", "match s:\n    case 'binary': pass", ":2: compares with the scheme name 'binary'"),
        ("modules/linear.py", "isinstance(m, nn.Linear)", "nn.Linear"),
        ("export/gguf.py", "isinstance(m, (torch.nn.Linear, Conv1D))", "nn.Linear"),
        ("export/gguf.py", "isinstance(m, Linear | Conv1D)", "nn.Linear"),
        ("export/gguf.py", "type(m) is nn.Linear", "nn.Linear"),
        ("modules/linear.py", "x.weight.device.type == 'cuda'", ".device.type"),
        ("modules/linear.py", "f(x).device.type", ".device.type"),
        ("quantizers/base.py", "os.environ['A']", "environment"),
        ("kernels/reference.py", "os.getenv('A')", "environment"),
        ("kernels/cpu/library.py", "os.environ.get('A')", "environment"),
        ("training/trainer.py", "from os import environ", "environment"),
        ("training/trainer.py", "torch.load('x')", "pickle"),
        ("cli.py", "from torch import load", "pickle"),
        ("hub.py", "import pickle", "pickle"),
    ],
)
def test_checker_sees_what_is_wrong(path: str, source: str, words: str) -> None:
    found = violations(path, source)
    assert len(found) == 1, found
    assert words in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "modules/linear.py",
            "from ..kernels import dispatch\nfrom . import packed\nfrom .packed import PackedBitLinear",
        ),
        ("modules/linear.py", "from hf_bitnet.registry import Registry\nimport torch\nfrom torch import nn"),
        ("quantizers/__init__.py", "from . import ternary\nfrom .ternary import Ternary"),
        ("cli.py", "from hf_bitnet import quantize_model\nfrom .demo import run\nimport os\nos.environ['A']"),
        ("config.py", "if weight == 'ternary': pass"),
        ("surgery/select.py", "isinstance(m, nn.Linear)\nisinstance(m, nn.Embedding)"),
        ("kernels/dispatch.py", "x.device.type\nos.environ.get('A')"),
        ("training/trainer.py", "load_file('x')\nmodel.load_state_dict(s)\nschedule == 'none'\nx.device"),
    ],
)
def test_checker_leaves_alone_what_is_right(path: str, source: str) -> None:
    assert violations(path, source) == []
