"""Builds the native modules; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

import czm_build_plan as plan  # noqa: E402

SOURCES = {
    "cpu": sorted(
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.cpp", "cpu/*.cpp")
        for path in (ROOT / "csrc").glob(pattern)
    ),
    "cuda": sorted(
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.cu", "*.cpp")
        for path in ROOT.glob(f"csrc/cuda/{pattern}")
    ),
}

# The oldest torch that the binary runs on, in the form the stable ABI's headers want it.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*plan.MINIMUM_TORCH)
CXX_FLAGS = [
    "-O3",
    # Every operation rounds once, whatever the compiler, so that backends agree.
    "-ffp-contract=off",
    # Python's own flags ask for debug information, four fifths of the binary.
    "-g0",
    # GCC takes the undefined registers of its own AVX intrinsics for mistakes (its bug 105593).
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    # -ffast-math or -Ofast in CXXFLAGS would change results and, when linking, add code that sets
    # flush-to-zero for the whole process.
    *plan.STRICT_MATH,
    STABLE_ABI,
]
NVCC_FLAGS = ["-O3", "-fmad=false", "-DUSE_CUDA", STABLE_ABI]
# A file's architectures at once: as many as processors (0), or as MAX_JOBS allows ninja.
NVCC_FLAGS += ["--threads", os.environ.get("MAX_JOBS") or "0"]
for flag in plan.STRICT_MATH:
    NVCC_FLAGS += ["-Xcompiler", flag]

# A free-threaded Python has no stable ABI of its own.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")


def look_around() -> plan.Surroundings:
    """Find what a build needs: the compiler, torch, and the CUDA toolkit that fits it."""
    try:
        import torch
    except (ImportError, OSError):
        torch = None
    requested = plan.requested_build()
    torch_cuda = torch and torch.version.cuda
    looks_for_cuda = torch_cuda and requested in ("auto", "cuda")
    cuda_home = plan.find_cuda_home(torch_cuda) if looks_for_cuda else None
    return plan.Surroundings(
        requested=requested,
        compiler=None if requested == "none" else plan.find_compiler(),
        torch=torch and str(torch.__version__),
        torch_cuda=torch_cuda,
        cuda_home=cuda_home,
        nvcc=plan.nvcc_version(cuda_home) if cuda_home else None,
        cuda_sources=any(source.endswith(".cu") for source in SOURCES["cuda"]),
    )


found = look_around()
unbuilt = {module: reason for module, reason in plan.obstacles(found).items() if reason}
extensions = []
base_build_ext = build_ext
MACROS: dict[str, list[str]] = {"cpu": [], "cuda": []}

if "cuda" not in unbuilt:
    # torch's build helper reads CUDA_HOME when it is imported, and looks for a GPU where no
    # architecture is named.
    os.environ["CUDA_HOME"] = str(found.cuda_home)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", plan.default_architectures(found.nvcc))
    architectures = plan.architecture_list(os.environ["TORCH_CUDA_ARCH_LIST"])
    # For csrc/cuda/module.cpp. nvcc would take what follows the comma for another macro.
    MACROS["cuda"] = [f"-DCZM_CUDA_ARCHITECTURES={architectures}"]

if "cpu" not in unbuilt:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    base_build_ext = BuildExtension
    extensions = [
        extension_class(
            f"czm_fused._C_{module}",
            SOURCES[module],
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": CXX_FLAGS + MACROS[module], "nvcc": NVCC_FLAGS},
            extra_link_args=["-O3", *plan.STRICT_MATH],
            py_limited_api=LIMITED_API,
        )
        for module, extension_class in (("cpu", CppExtension), ("cuda", CUDAExtension))
        if module not in unbuilt
    ]


class BuildNative(base_build_ext):
    """Builds each module on its own, so that one that fails leaves the other; then reports."""

    def run(self):
        self._remove_earlier_builds()
        planned, compiler, built = self.extensions, self.compiler, []
        for extension in planned:
            self.extensions, self.compiler = [extension], compiler
            try:
                super().run()
            except Exception as error:
                # Whatever stops a compiler or torch's build helper, the package works without.
                module = extension.name.removeprefix("czm_fused._C_")
                unbuilt[module] = f"the build failed, see above ({error})"
            else:
                built.append(extension)
        self.extensions = self.distribution.ext_modules = built
        print(plan.report(found, unbuilt, os.environ.get("TORCH_CUDA_ARCH_LIST")), flush=True)
        missing = [module for module in plan.REQUIRED[found.requested] if module in unbuilt]
        if missing:
            raise SystemExit(
                f"{plan.ENVIRONMENT_VARIABLE}={found.requested} asks for what was not built: "
                + "; ".join(f"{module}: {unbuilt[module]}" for module in missing)
            )

    def _remove_earlier_builds(self):
        # A module left over in a build folder or a source tree would pass for this build's.
        path = Path(self.get_ext_fullpath("czm_fused._C_cpu"))
        for binary in path.parent.glob(f"_C_*{path.suffix}"):
            binary.unlink()


class Build(build):
    # build_ext runs with nothing to build as well: to report, and to refuse what was asked for.
    sub_commands = [
        (name, None if name == "build_ext" else needed) for name, needed in build.sub_commands
    ]


class BuildWheel(bdist_wheel):
    def run(self):
        # The tag depends on what could be built.
        self.run_command("build")
        self.skip_build = True
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


setup(
    ext_modules=extensions,
    cmdclass={"build": Build, "build_ext": BuildNative, "bdist_wheel": BuildWheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions and LIMITED_API else {},
)
