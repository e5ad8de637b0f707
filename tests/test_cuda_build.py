"""The build of the CUDA library: which nvcc, for which GPUs, and what a wheel holds with it and without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from efficientvit_kernels import _build
from tests.processes import python


@pytest.fixture(autouse=True)
def no_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_CUDA", "CUDA_HOME", "EFFICIENTVIT_KERNELS_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)


def toolkit(folder: Path, release: str) -> Path:
    """A CUDA_HOME whose nvcc says its release, and compiles nothing."""
    compiler = folder / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.99'\n")
    compiler.chmod(0o755)
    return folder


def without_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **rest: None if name == "nvcc" else which(name, **rest))


def test_nvcc_of_another_major_version_is_refused() -> None:
    with pytest.raises(
        RuntimeError, match=r"^nvcc must be of CUDA 13, as torch is, got 12\.8: set CUDA_HOME, or FORCE_CUDA=0 to build"
    ):
        _build.check_cuda_version("Cuda compilation tools, release 12.8, V12.8.93", "13.0")
    with pytest.raises(RuntimeError, match=r"^nvcc must be of CUDA 9, as torch is, got 13\.0"):
        _build.check_cuda_version("release 13.0", "9.2")


@pytest.mark.parametrize(
    ("release", "torch_cuda"), [("13.0", "13.0"), ("13.2", "13.0"), ("13.0", "13.1"), ("12.8", None)]
)
def test_nvcc_of_another_minor_version_will_do(release: str, torch_cuda: str | None) -> None:
    """CUDA keeps its ABI within a major version; a torch without CUDA has none to keep to."""
    _build.check_cuda_version(f"Cuda compilation tools, release {release}, V{release}.1", torch_cuda)


def test_nvcc_that_names_no_release_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"^nvcc --version must name its release, got 'command not found'$"):
        _build.check_cuda_version("command not found", "13.0")


def test_cuda_home_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path, "13.0")))
    assert _build.nvcc() == str(tmp_path / "bin" / "nvcc")
    monkeypatch.setenv("FORCE_CUDA", "0")
    assert _build.nvcc() is None


def test_forced_without_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    without_nvcc(monkeypatch)
    assert _build.nvcc() is None
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(RuntimeError, match=r"^FORCE_CUDA is 1, but nvcc was not found: set CUDA_HOME, or install the"):
        _build.libraries()


def test_other_values_of_force_cuda_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_CUDA", "yes")
    with pytest.raises(RuntimeError, match=r"^FORCE_CUDA must be 0 or 1, got 'yes'$"):
        _build.nvcc()


@pytest.mark.parametrize(
    ("wanted", "archs"),
    [
        (None, ["80", "90"]),
        ("", ["80", "90"]),
        ("90", ["90"]),
        (" 120, 80;86 80", ["80", "86", "120"]),
        ("all", ["80", "86", "89", "90", "100", "120"]),
    ],
)
def test_archs(monkeypatch: pytest.MonkeyPatch, wanted: str | None, archs: list[str]) -> None:
    """Ascending, whatever their order: the PTX is that of the last."""
    if wanted is not None:
        monkeypatch.setenv("EFFICIENTVIT_KERNELS_CUDA_ARCHS", wanted)
    assert _build.cuda_archs() == archs


@pytest.mark.parametrize("wanted", ["75", "8.0", "sm_90", "80;", "80;90a", "80 all", ";"])
def test_bad_archs_are_refused(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    monkeypatch.setenv("EFFICIENTVIT_KERNELS_CUDA_ARCHS", wanted)
    with pytest.raises(RuntimeError) as caught:
        _build.cuda_archs()
    assert str(caught.value) == (
        f"EFFICIENTVIT_KERNELS_CUDA_ARCHS must be all, or like '80;90', 80 or above, got {wanted!r}"
    )


def names(libraries: list[_build.Library]) -> list[str]:
    return [library.name for library in libraries]


def test_why_the_kernels_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of a build's output, and no CUDA library among its products."""
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path, "13.0")))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert _build.why_no_cuda() is None
    assert _build.CUDA_LIBRARY in names(_build.libraries())

    monkeypatch.setattr(torch.version, "cuda", None)
    assert _build.why_no_cuda() == f"torch {torch.__version__} has no CUDA (FORCE_CUDA=1 builds them all the same)"
    assert _build.CUDA_LIBRARY not in names(_build.libraries())
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert _build.why_no_cuda() is None
    assert _build.CUDA_LIBRARY in names(_build.libraries())

    monkeypatch.setenv("FORCE_CUDA", "0")
    assert _build.why_no_cuda() == "FORCE_CUDA is 0"
    assert _build.CUDA_LIBRARY not in names(_build.libraries())

    monkeypatch.delenv("FORCE_CUDA")
    without_nvcc(monkeypatch)
    assert _build.why_no_cuda() == "nvcc was not found (set CUDA_HOME, or install the CUDA toolkit)"
    assert _build.CUDA_LIBRARY not in names(_build.libraries())


def test_ninja_file_compiles_for_the_archs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda", "13.0")))
    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("EFFICIENTVIT_KERNELS_CUDA_ARCHS", "120;86")
    text = _build.write_ninja(tmp_path, tmp_path).read_text()
    codes = "-gencode=arch=compute_86,code=sm_86 -gencode=arch=compute_120,code=sm_120"
    # Machine code for both, PTX of the newest; each source and the linker alike.
    sources = len(list((_build.ROOT / "csrc" / "cuda").glob("*.cu")))
    assert text.count(f"{codes} -gencode=arch=compute_120,code=compute_120") == sources + 1
    assert "fast_math" not in text


# torch's version as it stands decides what is wrong: an nvcc of CUDA 1 never fits.
@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"FORCE_CUDA": "1", "release": "1.0"}, "nvcc must be of CUDA {cuda}, as torch is, got 1.0: set CUDA_HOME, or"),
        ({"FORCE_CUDA": "2"}, "FORCE_CUDA must be 0 or 1, got '2'"),
        (
            {"FORCE_CUDA": "1", "EFFICIENTVIT_KERNELS_CUDA_ARCHS": "70", "release": "{cuda}.0"},
            "EFFICIENTVIT_KERNELS_CUDA_ARCHS must be all, or like '80;90', 80 or above, got '70'",
        ),
    ],
)
def test_commands_say_what_is_wrong(tmp_path: Path, environment: dict[str, str], words: str) -> None:
    """The development build and setup.py, in one line and without a traceback; nothing is compiled before."""
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA that an nvcc could differ from")
    cuda = torch.version.cuda.split(".")[0]
    environment = {name: value.format(cuda=cuda) for name, value in environment.items()}
    if release := environment.pop("release", None):
        environment["CUDA_HOME"] = str(toolkit(tmp_path / "cuda", release))
    result = python("-m", "efficientvit_kernels._build", **environment)
    assert result.returncode == 1
    # torch may have had a word before.
    assert result.stderr.splitlines()[-1].startswith(f"efficientvit_kernels: {words.format(cuda=cuda)}"), result.stderr
    folders = ("--build-base", str(tmp_path / "base"), "--build-lib", str(tmp_path / "lib"))
    result = python("setup.py", "--quiet", "build", *folders, **environment)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: {words.format(cuda=cuda)}"), result.stderr
    assert "Traceback" not in result.stderr


# --- wheels -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what a wheel is built from; beside the sources lie libraries of some other build."""
    copy = tmp_path / "sources"
    for folder in ("efficientvit_kernels", "csrc"):
        shutil.copytree(_build.ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(_build.ROOT / name, copy)
    for name in (_build.CPU_LIBRARY, _build.CUDA_LIBRARY):
        (copy / "efficientvit_kernels" / name).write_bytes(b"of another build")
    return copy


def wheel(sources: Path, **environment: str) -> tuple[Path, str]:
    """The wheel, and what was said meanwhile."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(sources)]
    result = subprocess.run(
        command, env={**os.environ, **environment}, cwd=sources, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (path,) = (sources / "dist").glob("*.whl")
    return path, result.stdout


def info_of(path: Path, folder: Path) -> str:
    """What the command `info` says of a wheel's content."""
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    result = python("-m", "efficientvit_kernels", "info", path=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


def libraries_in(path: Path) -> dict[str, int]:
    with zipfile.ZipFile(path) as archive:
        return {Path(entry.filename).name: entry.file_size for entry in archive.infolist() if ".so" in entry.filename}


@pytest.mark.nightly
def test_a_wheel_with_both_libraries_and_one_without(sources: Path, tmp_path: Path) -> None:
    """One architecture, to be quicker; then, from the same folder, none."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    path, _ = wheel(sources, FORCE_CUDA="1", EFFICIENTVIT_KERNELS_CUDA_ARCHS="80")
    found = libraries_in(path)
    assert sorted(found) == sorted([_build.CPU_LIBRARY, _build.CUDA_LIBRARY, _build.INTROSPECTION_MODULE])
    assert min(found.values()) > 50_000
    said = info_of(path, tmp_path / "both")
    assert "relu_linear_attention on cpu: cpu" in said
    if torch.version.cuda is None:
        assert f"backend cuda cannot run: torch {torch.__version__} has no CUDA" in said
    elif not torch.cuda.is_available():
        assert "backend cuda cannot run: no CUDA device is available" in said

    path.unlink()
    path, words = wheel(sources, FORCE_CUDA="0")
    assert words.count("efficientvit_kernels: built without the CUDA kernels: FORCE_CUDA is 0") == 1
    found = libraries_in(path)
    assert sorted(found) == sorted([_build.CPU_LIBRARY, _build.INTROSPECTION_MODULE])
    assert min(found.values()) > 50_000
    said = info_of(path, tmp_path / "one")
    assert "relu_linear_attention on cpu: cpu" in said
    assert "backend cuda cannot run" in said
