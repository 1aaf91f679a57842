"""The build's decisions, and what an installed package promises before its first operator."""

import re
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch

import czm_fused
from czm_fused.version import __version__

ROOT = Path(__file__).resolve().parents[1]


# In the path as the build frontends put it there.
sys.path.insert(0, str(ROOT / "build_backend"))

import czm_build_backend as backend  # noqa: E402
import czm_build_plan as plan  # noqa: E402

COMPLETE = plan.Surroundings(
    requested="auto",
    compiler="c++ 12.2.0",
    torch="2.11.0+cu130",
    torch_cuda="13.0",
    cuda_home=Path("/usr/local/cuda"),
    nvcc="13.1",
    cuda_sources=True,
)


def test_obstacles_none_where_everything_is_there():
    assert plan.obstacles(COMPLETE) == {"cpu": None, "cuda": None}
    assert plan.obstacles(replace(COMPLETE, requested="cuda")) == {"cpu": None, "cuda": None}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"requested": "none"}, "CZM_FUSED_BUILD=none"),
        ({"compiler": None}, "no C++ compiler"),
        ({"torch": None, "torch_cuda": None}, "torch cannot be imported"),
        ({"torch": "2.9.1"}, "torch 2.9.1 is older than 2.11"),
    ],
)
def test_obstacles_to_both_modules(change, reason):
    obstacles = plan.obstacles(replace(COMPLETE, **change))
    assert reason in obstacles["cpu"]
    assert obstacles["cuda"] == obstacles["cpu"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"requested": "cpu"}, "CZM_FUSED_BUILD=cpu"),
        ({"cuda_sources": False}, "csrc/cuda holds no kernels"),
        ({"torch": "2.13.0+cpu", "torch_cuda": None}, "torch 2.13.0+cpu is built without CUDA"),
        ({"cuda_home": None, "nvcc": None}, "no CUDA toolkit found"),
        ({"nvcc": "12.8"}, "nvcc in /usr/local/cuda is 12.8, but torch 2.11.0+cu130 needs CUDA 13"),
    ],
)
def test_obstacles_to_the_cuda_module_alone(change, reason):
    obstacles = plan.obstacles(replace(COMPLETE, **change))
    assert obstacles["cpu"] is None
    assert reason in obstacles["cuda"]


def test_requested_build_names_the_values(monkeypatch):
    monkeypatch.setenv("CZM_FUSED_BUILD", "gpu")
    with pytest.raises(SystemExit, match="must be one of auto, none, cpu, cuda, but was 'gpu'"):
        plan.requested_build()


def test_find_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert plan.find_compiler() is None
    monkeypatch.setenv("CXX", f"{sys.executable} -E")
    assert plan.find_compiler() == f"Python {sys.version.split()[0]}"


def toolkit(root, version, headers=True):
    """A folder that looks like a CUDA toolkit of this version."""
    (root / "bin").mkdir(parents=True)
    nvcc = root / "bin/nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
    nvcc.chmod(0o755)
    if headers:
        (root / "include").mkdir()
        (root / "include/cuda_runtime.h").touch()
    return root


def test_find_cuda_home_takes_a_whole_toolkit(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "whole", "13.0")))
    assert plan.find_cuda_home("13.0") == tmp_path / "whole"
    assert plan.nvcc_version(tmp_path / "whole") == "13.0"
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "compiler only", "13.0", headers=False)))
    assert plan.find_cuda_home("13.0") is None


def test_find_cuda_home_prefers_the_major_version_of_torch(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(plan, "INSTALLED_TOOLKITS", tmp_path)
    on_path = toolkit(tmp_path / "cuda-12.8", "12.8")
    monkeypatch.setenv("PATH", f"{on_path}/bin:/usr/bin:/bin")
    installed = toolkit(tmp_path / "cuda-13.0", "13.0")
    assert plan.find_cuda_home("12.6") == on_path
    assert plan.find_cuda_home("13.0") == installed
    assert plan.find_cuda_home("14.0") == on_path


def test_default_architectures_are_known_to_nvcc():
    assert plan.default_architectures("13.0") == "8.0;9.0;10.0;12.0+PTX"
    assert plan.default_architectures("12.6") == "8.0;9.0+PTX"


def test_no_flag_of_nvcc_has_a_comma():
    """Where it has one, nvcc takes what follows for another flag."""
    code = (
        "import os, runpy, setuptools\n"
        "os.environ['CZM_FUSED_BUILD'] = 'cuda'\n"
        "def setup(ext_modules, **options):\n"
        "    for each in ext_modules:\n"
        "        macros = [f'-D{name}={value}' for name, value in each.define_macros]\n"
        "        print(each.name, *each.extra_compile_args['nvcc'], *macros)\n"
        "setuptools.setup = setup\n"
        "runpy.run_path('setup.py')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    if "_C_cuda" not in run.stdout:
        pytest.skip("the CUDA module cannot be built here")
    assert "," not in run.stdout


def test_report_has_a_line_for_each_module():
    text = plan.report(COMPLETE, {"cuda": "the build failed"}, "9.0")
    assert text.splitlines() == [
        "czm-fused native modules (CZM_FUSED_BUILD=auto)",
        "  _C_cpu: built with c++ 12.2.0, torch 2.11.0+cu130",
        "  _C_cuda: not built: the build failed",
    ]


def test_runtime_torch_is_found_behind_the_isolation(monkeypatch, tmp_path):
    folder = Path(torch.__file__).parents[1]
    # As pip isolates a build: a start-up file that takes the environment's packages away.
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.path.remove({str(folder)!r})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    assert backend._runtime_torch() == folder
    monkeypatch.setattr(plan, "MINIMUM_TORCH", (99, 0))
    assert backend._runtime_torch() is None


def test_torch_is_required_for_the_build_only_where_there_is_none(monkeypatch):
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.delenv("CZM_FUSED_BUILD", raising=False)
    assert backend._torch_requirement() == []
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert backend._torch_requirement() == []
    monkeypatch.setattr(backend, "_runtime_torch", lambda: None)
    assert backend._torch_requirement() == ["torch>=2.11"]
    monkeypatch.setenv("CZM_FUSED_BUILD", "none")
    assert backend._torch_requirement() == []
    monkeypatch.delenv("CZM_FUSED_BUILD")
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert backend._torch_requirement() == []


def test_versions_agree():
    assert metadata.version("czm-fused") == __version__
    assert czm_fused.__version__ == __version__
    requirements = metadata.requires("czm-fused")
    assert f"torch>={'.'.join(map(str, plan.MINIMUM_TORCH))}" in requirements


def test_native_binary_is_named_for_the_stable_abi():
    binaries = list(Path(czm_fused.__file__).parent.glob("_C_*"))
    assert all(re.fullmatch(r"_C_(cpu|cuda)\.abi3\.(so|pyd)", path.name) for path in binaries)


def test_package_is_typed():
    assert (Path(czm_fused.__file__).parent / "py.typed").is_file()


def test_import_is_quiet_and_light():
    script = (
        "import sys, torch; before = set(sys.modules); import czm_fused; "
        "heavy = {'triton', 'torchvision', 'matplotlib', 'sklearn', 'tensorboard', 'tqdm'}; "
        "sys.exit(', '.join(sorted((set(sys.modules) - before) & heavy)) or 0)"
    )
    imported = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (imported.returncode, imported.stdout, imported.stderr) == (0, "", "")


def test_workflows_build_with_the_oldest_torch():
    workflow = ROOT / ".github/workflows/wheels.yml"
    if not workflow.exists():
        pytest.skip("no workflows beside the tests")
    oldest = re.search(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    text = workflow.read_text()
    assert re.findall(r"^  TORCH: \"(.*)\"$", text, re.MULTILINE) == [oldest]
    assert plan.version_tuple(oldest) == plan.MINIMUM_TORCH
    assert f'torch: ["{oldest}", ' in text
    # What they run is what can be run here.
    commands = set(re.findall(r"\.ci/wheel (\w+)", text))
    usage = subprocess.run([ROOT / ".ci/wheel"], capture_output=True, text=True).stderr
    assert commands and all(f".ci/wheel {command} " in usage for command in commands)
