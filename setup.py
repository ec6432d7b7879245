"""Builds emoe._C with one CMake call; everything else is in pyproject.toml and CMakeLists.txt."""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_OPTIONS = ("EMOE_CUDA_ARCHS", "EMOE_CUDA_KERNELS", "EMOE_CUDA_ROOT")  # cmake/cuda.cmake says what they mean


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DEMOE_CUDA={os.environ.get('EMOE_CUDA', 'auto')}",
            *(f"-D{name}={os.environ[name]}" for name in CUDA_OPTIONS if name in os.environ),
            f"-DEMOE_WERROR={os.environ.get('EMOE_WERROR', 'OFF')}",
            f"-DEMOE_OUTPUT_DIR={target}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *options], check=True)
        subprocess.run(["cmake", "--build", build, "--target", "_C"], check=True)


setup(ext_modules=[Extension("emoe._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
