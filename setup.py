"""Builds the package with its native libraries. What to compile, and how, stands in efficientvit_kernels/_build.py."""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

HERE = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("_build", HERE / "efficientvit_kernels" / "_build.py")
_build = importlib.util.module_from_spec(spec)
sys.modules["_build"] = _build
spec.loader.exec_module(_build)


class NinjaBuildExt(build_ext):
    """Hands everything to ninja; setuptools only learns where the results belong."""

    def run(self):
        # A wheel's objects have a folder of their own: it may be for other GPUs than the development build.
        folder = HERE / "build" / ("native" if self.inplace else "wheel")
        out_dir = HERE / "efficientvit_kernels" if self.inplace else Path(self.build_lib) / "efficientvit_kernels"
        out_dir.mkdir(parents=True, exist_ok=True)
        if not self.inplace:
            for library in out_dir.glob("*.so"):
                library.unlink()  # of an earlier wheel, whose CUDA library this one may not have
        try:
            _build.build(folder, out_dir.resolve())
        except RuntimeError as error:
            raise CompileError(str(error)) from None  # setuptools tells its words without a traceback

    def get_outputs(self):
        out_dir = Path(self.build_lib) / "efficientvit_kernels"
        return [str(out_dir / library.name) for library in _build.libraries()]

    def get_output_mapping(self):
        return {}


class BuildPyWithoutLibraries(build_py):
    """The package folder may hold the libraries of a development build, which are not those of a wheel."""

    def find_data_files(self, package, src_dir):
        return [name for name in super().find_data_files(package, src_dir) if not name.endswith(".so")]


if _build.compiler() is None:
    print("efficientvit_kernels: no C++ compiler found; building without native libraries (pure-torch path only)")
    native = {}
else:
    native = {
        "ext_modules": [Extension("efficientvit_kernels._C", sources=["csrc/module.cpp"])],
        "cmdclass": {"build_ext": NinjaBuildExt, "build_py": BuildPyWithoutLibraries},
    }

setup(**native)
