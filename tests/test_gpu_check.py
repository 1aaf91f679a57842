"""The check of a GPU, of which a CPU can run the plan and the bookkeeping."""

import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu_check(benchmark_script):
    return benchmark_script("gpu_check")


@pytest.fixture
def plan(gpu_check, tmp_path):
    return gpu_check.parts(tmp_path, "9.0")


def test_every_part_ends_within_nine_minutes(gpu_check, plan):
    assert gpu_check.PART_SECONDS <= 9 * 60
    for part, steps in plan.items():
        assert sum(step.seconds for step in steps) <= gpu_check.PART_SECONDS, part


def test_first_part_is_correctness(plan):
    assert next(iter(plan)) == "first"
    build, tests, one_step = plan["first"]
    assert build.environment == {"CZM_FUSED_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "9.0"}
    assert {"tests/gpu", "tests/ops"} <= set(tests.command)
    assert all((BENCHMARKS.parent / folder).is_dir() for folder in ("tests/gpu", "tests/ops"))
    # Every model in every dtype, checked and its launches counted, and nothing timed.
    arguments = list(one_step.command)
    assert arguments[arguments.index("--seconds") + 1] == "0"
    assert {"resnet110", "resnet50", "vgg16", "float32", "bfloat16"} <= set(arguments)
    assert "--backend" not in arguments


def test_every_step_has_files_of_its_own(plan, tmp_path):
    steps = [step for steps in plan.values() for step in steps]
    assert len({step.name for step in steps}) == len(steps)
    files = [word for step in steps for word in step.command if word.startswith(str(tmp_path))]
    assert len(set(files)) == len(files)
    for step in steps:
        assert all(Path(file).stem == step.name for file in step.command if file in files)


def test_every_command_is_one_that_its_script_takes(benchmark_script, plan, monkeypatch):
    tyro = benchmark_script("tyro")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    scripts = 0
    for step in (step for steps in plan.values() for step in steps):
        if not step.command[1].startswith("benchmarks/"):
            continue
        scripts += 1
        module = benchmark_script(Path(step.command[1]).stem)
        options = [
            kind
            for kind in vars(module).values()
            if isinstance(kind, type) and kind.__module__ == module.__name__
            and kind.__name__.endswith("Options")
        ]  # fmt: skip
        tyro.cli(options[0], args=list(step.command[2:])).check()
    assert scripts >= 15


def test_run_part_reports_every_step_and_goes_on_after_a_failure(
    benchmark_script, gpu_check, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(gpu_check, "PART_SECONDS", 30)
    rows = benchmark_script("common.rows")
    report = tmp_path / "gpu_check.jsonl"
    results = rows.Results("gpu_check", torch.device("cpu"), report, resume=True)
    python = [sys.executable, "-c"]
    kept = "import pathlib; print('said', len(pathlib.Path({!r}).read_text().splitlines()))"
    steps = [
        gpu_check.Step("fails", [*python, "print('why'); raise SystemExit(3)"], 20),
        gpu_check.Step("missing", ["/no/such/program"], 20),
        gpu_check.Step("hangs", [*python, "import time; time.sleep(60)"], 1),
        gpu_check.Step("works", [*python, kept.format(str(report))], 20),
    ]
    begin = time.monotonic()
    assert gpu_check.run_part("part", steps, results, tmp_path) == ["fails", "missing", "hangs"]
    assert time.monotonic() - begin < 30
    found = rows.read(report)
    assert [row.provider for row in found] == ["fails", "missing", "hangs", "works"]
    problems = [row.config["problem"] for row in found]
    assert problems[0] == "exit code 3" and problems[2] == "not done after 1 s"
    assert "no/such/program" in problems[1] and problems[3] is None
    # The rows of the steps before were there while the last step ran.
    assert "said 3" in (tmp_path / "works.log").read_text()
    for step in steps:
        heading = (tmp_path / f"{step.name}.log").read_text().splitlines()[0]
        assert results.machine.processor in heading
    assert "why" in capsys.readouterr().out


def test_gpu_check_needs_a_gpu(gpu_check, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
