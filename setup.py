"""Python packages by setuptools, r1fast._C by CMake. Metadata is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build_dir = Path(self.build_temp).resolve()
        options = {
            "CMAKE_BUILD_TYPE": os.environ.get("CMAKE_BUILD_TYPE", "Release"),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output_dir,
            "PYBIND11_FINDPYTHON": "ON",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        flags = [f"-D{key}={value}" for key, value in options.items()]
        # cmake and ninja sit beside python in a virtual environment that need not be activated
        path = os.pathsep.join(
            [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        )
        env = {**os.environ, "PATH": path}
        subprocess.run(
            ["cmake", "-G", "Ninja", "-S", ROOT, "-B", build_dir, *flags], check=True, env=env
        )
        subprocess.run(["cmake", "--build", build_dir], check=True, env=env)


setup(
    # namespace packages, because r1fast/kernels is a link to kernels/, which must not have an __init__.py
    packages=find_namespace_packages(include=["r1fast", "r1fast.*"], exclude=["*__pycache__*"]),
    ext_modules=[Extension("r1fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
