"""Check and measure everything that needs a GPU, and write what came out as files.

`make gpu-check` runs it. Exits with 1 if anything failed, and says what; a step that fails does not
stop the others.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
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

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("resnet110", "resnet50", "vgg16", "vgg16_features")
DTYPES = ("float32", "bfloat16")
# Compilation of one network takes as long as all measurements of those that need none.
TRAINED = {
    "eager": (),
    "compiled": (
        *("--options", "float32", "channels_last+bfloat16+compile"),
        *("channels_last+bfloat16+compile+cuda_graph", "tf32+compile+cuda_graph"),
        *("--workers", "2"),
    ),
}
# Small cases in which every layout and dtype runs, and every way to share a filter among threads.
SANITIZED = ("tests/gpu/test_step_cuda.py", "-k", "every_kind_of_filter")


@dataclass(frozen=True)
class Step:
    """One command, and for how many seconds it may run.

    Attributes:
        name: of the step, and of the log it leaves.
        command: what to run, from the root of the repository.
        seconds: after how long it has failed.
        environment: variables it gets beside the present ones.
    """

    name: str
    command: Sequence[str]
    seconds: int
    environment: dict[str, str] = field(default_factory=dict)


def steps(results: Path) -> list[Step]:
    """Return what is to be done, in order."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q"]
    major, minor = torch.cuda.get_device_capability()
    build = {"CZM_FUSED_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    install = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
    plan = [
        Step("build", [python, *install], 240, build),
        Step("tests", [*pytest, *_spread(), "tests/gpu", "tests/ops"], 540),
    ]
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "compute-sanitizer")
    sanitizer = shutil.which("compute-sanitizer") or str(toolkit)
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
        if tool == "memcheck":
            # Libraries that probe the driver make calls that fail, and mean no harm.
            command += ["--report-api-errors", "no"]
        # torch's caching allocator hides what lies beyond a tensor.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        plan.append(Step(tool, [*command, *pytest, *SANITIZED], 300, environment))
    for backend in ("cuda", "triton"):
        out = str(results / f"digits_{backend}")
        train = ["-m", "czm_fused.training", "--device", "cuda", "--backend", backend]
        where = ["--epochs", "4", "--out", out, "--overwrite"]
        plan.append(Step(f"digits_{backend}", [python, *train, *where], 120))
    for model, dtype in itertools.product(MODELS, DTYPES):
        stem = f"step_throughput_{model}_{dtype}"
        files = [
            *("--json", str(results / f"{stem}.json")),
            *("--details", str(results / f"{stem}_details.json")),
            *("--plot", str(results / f"{stem}.png")),
        ]
        benchmark = ["benchmarks/step_throughput.py", "--device", "cuda", "--model", model]
        seconds = ["--seconds", "8", "--dtype", dtype]
        plan.append(Step(stem, [python, *benchmark, *seconds, *files], 90))
    for name, options in TRAINED.items():
        stem = f"training_throughput_{name}"
        files = [
            *("--json", str(results / f"{stem}.json")),
            *("--details", str(results / f"{stem}_details.json")),
        ]
        benchmark = ["benchmarks/training_throughput.py", "--device", "cuda", "--depth", "110"]
        plan.append(Step(stem, [python, *benchmark, *options, "--seconds", "90", *files], 550))
    for model, batch, size in (("resnet110", "128", "32"), ("resnet50", "256", "224")):
        benchmark = ["benchmarks/batchnorm_cost.py", "--device", "cuda", "--model", model]
        for cast in ((), ("--autocast", "bfloat16")):
            stem = f"batchnorm_cost_{model}_{cast[-1] if cast else 'float32'}"
            files = [
                *("--json", str(results / f"{stem}.json")),
                *("--plot", str(results / f"{stem}.png")),
            ]
            what = ["--batch", batch, "--image-size", size, *cast]
            how = ["--channels-last", "--compile", "--seconds", "30"]
            plan.append(Step(stem, [python, *benchmark, *what, *how, *files], 550))
        stem = f"largest_batch_{model}"
        most = ["--image-size", size, "--channels-last", "--seconds", "0", "--memory", "24"]
        files = ["--json", str(results / f"{stem}.json")]
        plan.append(Step(stem, [python, *benchmark, *most, *files], 300))
    return plan


def _spread() -> list[str]:
    """Return what runs tests in several processes, where pytest-xdist is installed."""
    return ["-n", "8"] if importlib.util.find_spec("xdist") else []


def run(step: Step, results: Path) -> dict[str, object]:
    """Run one step, its output in a log and, if it failed, its end on the terminal."""
    log = results / f"{step.name}.log"
    begin = time.monotonic()
    print(f"{step.name} ...", flush=True)
    with log.open("w") as output:
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env={**os.environ, **step.environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            code = process.wait(step.seconds)
            problem = f"exit code {code}" if code else None
        except subprocess.TimeoutExpired:
            # With all that it started: what goes on would disturb the steps to come.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            problem = f"not done after {step.seconds} s"
        except FileNotFoundError as error:
            problem = str(error)
    seconds = round(time.monotonic() - begin, 1)
    print(f"{step.name}: {problem or 'passed'}, {seconds} s", flush=True)
    if problem:
        print(log.read_text(errors="replace")[-3000:], flush=True)
    return {"step": step.name, "problem": problem, "seconds": seconds}


def machine() -> dict[str, str]:
    """Return what the results depend on: GPU, driver, torch, Triton and commit."""
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": _output_of(driver),
        "torch": torch.__version__,
        "triton": _version_of("triton"),
        "python": sys.version.split()[0],
        "commit": _output_of(["git", "describe", "--always", "--dirty"]),
    }


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _output_of(command: Sequence[str]) -> str:
    try:
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return finished.stdout.strip()


def main() -> int:
    """Run every step; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<gpu name>")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="run these steps alone")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: torch finds no CUDA device on this machine", file=sys.stderr)
        return 2
    facts = machine()
    folder = facts["gpu"].lower().replace(" ", "-")
    results = (arguments.out or ROOT / "benchmarks" / "results" / folder).resolve()
    results.mkdir(parents=True, exist_ok=True)
    plan = steps(results)
    if arguments.only:
        unknown = set(arguments.only) - {step.name for step in plan}
        if unknown:
            parser.error(f"no step is named {', '.join(sorted(unknown))}")
        plan = [step for step in plan if step.name in arguments.only]
    report_file = results / "gpu_check.json"
    outcomes = [{**run(step, results), **facts} for step in plan]
    earlier = json.loads(report_file.read_text()) if report_file.exists() else []
    done = {outcome["step"] for outcome in outcomes}
    report = [outcome for outcome in earlier if outcome["step"] not in done] + outcomes
    report_file.write_text(json.dumps(report, indent=2) + "\n")
    failed = [str(outcome["step"]) for outcome in outcomes if outcome["problem"]]
    print(f"gpu_check: {'failed: ' + ', '.join(failed) if failed else 'all passed'}; see {results}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
