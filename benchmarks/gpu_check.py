"""Check and measure everything that needs a GPU, and write what came out as files.

`make gpu-check` runs all parts in order, `make gpu-check PART=first` one of them. Each ends within
nine minutes. Exits with 1 if anything failed, and says what; a step that fails does not stop the
others, and what was measured before it is kept.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common.options import Options, parse
from common.rows import Results

ROOT = Path(__file__).resolve().parent.parent
PART_SECONDS = 540
MODELS = ("resnet110", "resnet50", "vgg16", "vgg16_features")
DTYPES = ("float32", "bfloat16")
# What runs a GPU's kernels on the CPU is for machines without one.
TESTS = ("tests/gpu", "tests/ops", "-m", "not simulated and not exhaustive")
# Small cases in which every layout and dtype runs, and every way to share a filter among threads.
SANITIZED = ("tests/gpu/test_step_cuda.py", "-k", "every_kind_of_filter")
# Compilation of one network takes as long as all measurements of those that need none.
COMPILED = (
    *("--options", "float32", "channels_last+bfloat16+compile"),
    *("channels_last+bfloat16+compile+cuda_graph", "tf32+compile+cuda_graph"),
    *("--workers", "2"),
)


@dataclass(kw_only=True)
class CheckOptions(Options):
    """Options of the check."""

    out: Path | None = None
    """Folder for the results; benchmarks/results/<name of the GPU> by default."""
    part: tuple[str, ...] = ()
    """Run these parts alone."""


@dataclass(frozen=True)
class Step:
    """One command, and for how many seconds it may run.

    Attributes:
        name: of the step, and of the files it leaves.
        command: what to run, from the root of the repository.
        seconds: after how long it has failed.
        environment: variables it gets beside the present ones.
    """

    name: str
    command: Sequence[str]
    seconds: int
    environment: dict[str, str] = field(default_factory=dict)


def parts(results: Path, capability: str) -> dict[str, list[Step]]:
    """Return what is to be done, by part, what matters most first.

    Args:
        results: the folder that files go into.
        capability: compute capability of the GPU, such as "9.0".
    """

    def benchmark(script: str, stem: str, seconds: int, *options: str, plot: bool = False) -> Step:
        command = [sys.executable, f"benchmarks/{script}.py", "--device", "cuda", *options]
        command += ["--json", str(results / f"{stem}.jsonl")]
        if plot:
            command += ["--plot", str(results / f"{stem}.png")]
        return Step(stem, command, seconds)

    def training(stem: str, *options: str) -> Step:
        what = ("--depth", "110", "--seconds", "90", *options)
        return benchmark("training_throughput", stem, 540, *what, plot=True)

    found = {
        "first": [
            _build(capability),
            Step("tests", [*_pytest(), *_spread(), *TESTS], 250),
            # Without timing: every provider is checked, and its launches are counted.
            benchmark(
                "step_throughput", "one_step", 110,
                "--seconds", "0", "--model", *MODELS, "--dtype", *DTYPES,
            ),
        ],
        "step": [
            benchmark(
                "step_throughput", f"step_throughput_{model}_{dtype}", 67,
                "--seconds", "6", "--model", model, "--dtype", dtype, plot=True,
            )
            for model in MODELS
            for dtype in DTYPES
        ],
        "sanitizers": [
            _sanitizer(tool) for tool in ("memcheck", "racecheck", "initcheck", "synccheck")
        ],
        "operators": [
            benchmark("test_ops", "test_ops", 150, "--seconds", "0.3", plot=True),
            benchmark("gradient_release", "gradient_release", 150),
            *(_digits(backend) for backend in ("cuda", "triton")),
        ],
        "training_eager": [training("training_throughput_eager")],
        "training_compiled": [training("training_throughput_compiled", *COMPILED)],
    }  # fmt: skip
    for model, batch, size in (("resnet110", "128", "32"), ("resnet50", "256", "224")):
        what = ("--model", model, "--image-size", size, "--channels-last")
        for dtype in DTYPES:
            stem = f"batchnorm_cost_{model}_{dtype}"
            how = ("--batch", batch, "--autocast", dtype, "--compile", "inductor")
            options = (*what, *how, "--seconds", "30")
            found[stem] = [benchmark("batchnorm_cost", stem, 540, *options, plot=True)]
        most = (*what, "--seconds", "0", "--memory", "24")
        step = benchmark("batchnorm_cost", f"largest_batch_{model}", 270, *most)
        found.setdefault("largest_batch", []).append(step)
    return found


def _pytest() -> list[str]:
    return [sys.executable, "-m", "pytest", "-q"]


def _spread() -> list[str]:
    """Return what runs tests in several processes, where pytest-xdist is installed."""
    return ["-n", "8"] if importlib.util.find_spec("xdist") else []


def _build(capability: str) -> Step:
    install = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
    environment = {"CZM_FUSED_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": capability}
    return Step("build", [sys.executable, *install], 180, environment)


def _sanitizer(tool: str) -> Step:
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "compute-sanitizer")
    sanitizer = shutil.which("compute-sanitizer") or str(toolkit)
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
    if tool == "memcheck":
        # Libraries that probe the driver make calls that fail, and mean no harm.
        command += ["--report-api-errors", "no"]
    # torch's caching allocator hides accesses beyond a tensor.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(tool, [*command, *_pytest(), *SANITIZED], 135, environment)


def _digits(backend: str) -> Step:
    # Its log is the result; the run's own files go where git does not look.
    train = ["-m", "czm_fused.training", "--device", "cuda", "--backend", backend]
    where = ["--epochs", "4", "--out", f"runs/gpu_check_{backend}", "--overwrite"]
    return Step(f"digits_{backend}", [sys.executable, *train, *where], 120)


def run(step: Step, log: Path, heading: str, seconds: float) -> str | None:
    """Run one step, its output in a log and, if it fails, the end of it on the terminal.

    Args:
        step: what to run.
        log: file for the output.
        heading: its first line, which names the machine.
        seconds: after how long the step has failed.

    Returns:
        What went wrong, or None.
    """
    print(f"{step.name} ...", flush=True)
    begin = time.monotonic()
    with log.open("w") as output:
        output.write(heading + "\n")
        output.flush()
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env={**os.environ, **step.environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            problem: str | None = str(error)
        else:
            try:
                code = process.wait(seconds)
                problem = f"exit code {code}" if code else None
            except subprocess.TimeoutExpired:
                # With all that it started: what goes on would disturb the steps to come.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                problem = f"not done after {seconds:.0f} s"
    print(f"{step.name}: {problem or 'passed'}, {time.monotonic() - begin:.0f} s", flush=True)
    if problem:
        print(log.read_text(errors="replace")[-3000:], flush=True)
    return problem


def run_part(part: str, steps: Sequence[Step], results: Results, folder: Path) -> list[str]:
    """Run the steps of a part, each with a row in the report as soon as it is done.

    Returns:
        The names of the steps that failed.
    """
    versions = {"driver": _driver(), "triton": _version_of("triton")}
    heading = f"{results.machine}, driver {versions['driver']}, Triton {versions['triton']}"
    begin = time.monotonic()
    failed = []
    for step in steps:
        started = time.monotonic()
        seconds = max(1.0, min(step.seconds, PART_SECONDS - (started - begin)))
        problem = run(step, folder / f"{step.name}.log", heading, seconds)
        took = time.monotonic() - started
        results.add(part, step.name, "seconds", "s", took, problem=problem, **versions)
        if problem:
            failed.append(step.name)
    return failed


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return finished.stdout.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; return the exit code."""
    options = parse(CheckOptions, arguments, "Check and measure everything that needs a GPU.")
    if not torch.cuda.is_available():
        print("gpu_check: torch finds no CUDA device on this machine", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device).lower().replace(" ", "-")
    folder = (options.out or ROOT / "benchmarks" / "results" / name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    major, minor = torch.cuda.get_device_capability(device)
    plan = parts(folder, f"{major}.{minor}")
    unknown = set(options.part) - plan.keys()
    if unknown:
        names = ", ".join(plan)
        print(f"--part has no {', '.join(sorted(unknown))}: choose from {names}", file=sys.stderr)
        return 2
    results = Results("gpu_check", device, folder / "gpu_check.jsonl", resume=True)
    failed = []
    for part in options.part or plan:
        failed += run_part(part, plan[part], results, folder)
    print(f"gpu_check: {'failed: ' + ', '.join(failed) if failed else 'all passed'}; see {folder}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
