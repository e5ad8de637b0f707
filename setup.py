"""Builds the package with its native libraries. What to compile, and how, stands in efficientvit_kernels/_build.py."""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("_build", HERE / "efficientvit_kernels" / "_build.py")
_build = importlib.util.module_from_spec(spec)
sys.modules["_build"] = _build
spec.loader.exec_module(_build)


class NinjaBuildExt(build_ext):
    """Hands everything to ninja; setuptools only learns where the results belong."""

    def run(self):
        out_dir = HERE / "efficientvit_kernels" if self.inplace else Path(self.build_lib) / "efficientvit_kernels"
        out_dir.mkdir(parents=True, exist_ok=True)
        _build.build(HERE / "build" / "native", out_dir.resolve())

    def get_outputs(self):
        out_dir = Path(self.build_lib) / "efficientvit_kernels"
        return [str(out_dir / library.name) for library in _build.libraries()]

    def get_output_mapping(self):
        return {}


if _build.compiler() is None:
    print("efficientvit_kernels: no C++ compiler found; building without native libraries (pure-torch path only)")
    native = {}
else:
    native = {
        "ext_modules": [Extension("efficientvit_kernels._C", sources=["csrc/module.cpp"])],
        "cmdclass": {"build_ext": NinjaBuildExt},
    }

setup(**native)
