"""The package as it is built and installed: with a compiler, and without one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
NEEDED = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", ".gitignore")
LIBRARY = ("libhf_bitnet_cpu.so", "libhf_bitnet_cpu.dylib", "hf_bitnet_cpu.dll")

pytestmark = pytest.mark.slow


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what a release is made of; without libraries that were built in place."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in NEEDED:
        shutil.copy(REPOSITORY / name, folder)
    shutil.copytree(REPOSITORY / "hf_bitnet", folder / "hf_bitnet", ignore=shutil.ignore_patterns(*LIBRARY, "__pycache__"))
    return folder


def pip(*words: object, **environment: str) -> str:
    """What pip says; its verbose output has what the build says."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *map(str, words)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def libraries(wheel: Path) -> list[str]:
    return [name for name in zipfile.ZipFile(wheel).namelist() if name.rsplit("/", 1)[-1] in LIBRARY]


def test_a_wheel_has_the_library_for_every_python_and_no_sources(sources: Path, tmp_path: Path) -> None:
    # a library that was built in place must not be taken for the new one
    (sources / "hf_bitnet/kernels/cpu/libhf_bitnet_cpu.so").write_text("stale")
    pip("wheel", "--no-deps", "-w", tmp_path / "wheels", sources)
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    (name,) = libraries(wheel)
    assert name.startswith("hf_bitnet/kernels/cpu/")
    archive = zipfile.ZipFile(wheel)
    assert archive.getinfo(name).file_size > 10_000
    assert not [name for name in archive.namelist() if name.endswith((".cpp", ".h", ".inc", "CMakeLists.txt"))]


def test_without_a_compiler_the_install_says_so_and_torch_serves(sources: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    said = pip("install", "--no-deps", "-v", "--target", target, sources, CXX="/bin/false", CC="/bin/false")
    assert "hf_bitnet was installed WITHOUT its CPU kernels: they could not be compiled" in said
    # an editable installation of the environment would be found first
    script = "import sys; sys.meta_path = [each for each in sys.meta_path if 'ScikitBuild' not in type(each).__name__]; "
    script += "import hf_bitnet; from hf_bitnet import kernels; print(hf_bitnet.__file__); print(kernels.explain())"
    environment = {**os.environ, "PYTHONPATH": str(target)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(target))
    assert "CPU kernels: none: " in done.stdout and "without a working C++ compiler" in done.stdout


def test_a_source_distribution_has_what_a_build_needs(sources: Path, tmp_path: Path) -> None:
    (sources / "hf_bitnet/kernels/cpu/libhf_bitnet_cpu.so").write_text("built in place")
    script = "import sys; from scikit_build_core.build import build_sdist; print(build_sdist(sys.argv[1]))"
    pip("install", "--target", tmp_path / "backend", "scikit-build-core")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "backend")}
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "hf_bitnet/kernels/cpu/CMakeLists.txt"} <= names
    assert {f"hf_bitnet/kernels/cpu/src/{file.name}" for file in (REPOSITORY / "hf_bitnet/kernels/cpu/src").iterdir()} <= names
    assert not [name for name in names if name.endswith(LIBRARY)]


def test_no_code_of_one_instruction_set_can_serve_another(sources: Path, tmp_path: Path) -> None:
    """An inline function that two files share is kept once, in the code of whichever file: it would crash older processors."""
    cmake, nm = shutil.which("cmake"), shutil.which("nm")
    if cmake is None or nm is None:
        pytest.skip("needs cmake and nm")
    build = tmp_path / "build"
    subprocess.run([cmake, "-S", sources / "hf_bitnet/kernels/cpu", "-B", build], check=True, capture_output=True)
    subprocess.run([cmake, "--build", build, "--parallel", "2"], check=True, capture_output=True, timeout=300)
    objects = sorted(build.rglob("*.o"))
    assert len(objects) > 5
    for file in objects:
        symbols = subprocess.run([nm, "-C", file], check=True, capture_output=True, text=True).stdout.splitlines()
        assert not [line for line in symbols if line[17:18] in ("W", "V", "u")], file.name
