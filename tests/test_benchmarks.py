"""The rows, check, timers, table and pictures of the benchmarks; short runs of some."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

KEYS = [
    "benchmark", "model", "provider", "metric", "unit", "p20", "p50", "p80", "n",
    "device", "processor", "threads", "torch", "commit", "config",
]  # fmt: skip
SHORT = ["--model", "resnet110", "--steps", "1", "--seconds", "1e-6"]

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def rows(benchmark_script):
    return benchmark_script("common.rows")


@pytest.fixture
def results(rows, tmp_path):
    return rows.Results("test", torch.device("cpu"), tmp_path / "rows.jsonl")


def test_results_write_every_row_at_once(rows, results):
    results.add("net", "a", "step", "us", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], batch=8)
    (line,) = results.path.read_text().splitlines()
    row = json.loads(line)
    assert list(row) == KEYS
    assert (row["p20"], row["p50"], row["p80"], row["n"]) == (2.0, 3.5, 5.0, 6)
    assert row["torch"] == torch.__version__ and row["processor"]
    assert row["config"] == {"batch": 8}
    results.add("net", "a", "loss", "nats", math.nan)
    assert [each.p50 for each in rows.read(results.path)] == [3.5, None]


def test_results_replace_a_file_or_resume_it(rows, results):
    results.add("net", "a", "step", "us", 1.0, batch=8)
    results.path.write_text(results.path.read_text() + '{"benchmark": "te')
    resumed = rows.Results("test", torch.device("cpu"), results.path, resume=True)
    assert resumed.has("net", "a", "step", batch=8)
    assert not resumed.has("net", "a", "step", batch=9)
    resumed.add("net", "b", "step", "us", 2.0, batch=8)
    assert [row.provider for row in rows.read(results.path)] == ["a", "b"]
    rows.Results("test", torch.device("cpu"), results.path).add("net", "c", "step", "us", 2.0)
    assert [row.provider for row in rows.read(results.path)] == ["c"]


def test_read_names_the_line_that_is_no_row(rows, tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match="other.jsonl, line 1: not a row of a benchmark"):
        rows.read(path)


def test_value_is_of_one_row(rows, results):
    results.add("net", "a", "step", "us", 1.0, batch=8)
    results.add("net", "a", "step", "us", 2.0, batch=16)
    assert rows.value(results.rows, provider="a", batch=16) == 2.0
    with pytest.raises(LookupError, match="2 rows"):
        rows.value(results.rows, provider="a")


@pytest.mark.parametrize("error", [1.1, math.nan, math.inf])
def test_require_refuses_what_rounding_does_not_explain(benchmark_script, error):
    agreement = benchmark_script("common.agreement")
    agreement.require("fused", "the step", 1.0, bound=1.0)
    with pytest.raises(agreement.DisagreementError, match="fused is not the step"):
        agreement.require("fused", "the step", error, bound=1.0)


def test_time_rounds_begin_with_another_call_each(benchmark_script):
    timing = benchmark_script("common.timing")
    order = []
    calls = [lambda name=name: order.append(name) for name in "abc"]
    ticks = iter(range(100))
    done, host = timing.time_rounds(
        calls, lambda call: (call() or float(next(ticks)), 0.5), rounds=2, seconds=60
    )
    # Two rounds of warm-up, whose times are dropped.
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert done.tolist() == [[7, 8, 6], [9, 10, 11]]
    assert (host == 0.5).all()


def test_event_timer_flushes_the_cache_before_the_first_event(benchmark_script, monkeypatch):
    timing = benchmark_script("common.timing")
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 0.25

    class Buffer:
        def zero_(self):
            log.append("flush")

    def empty(size, dtype, device):
        assert size >= 50_000_000 and dtype == torch.uint8
        return Buffer()

    properties = types.SimpleNamespace(L2_cache_size=50_000_000)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("busy"), raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch, "empty", empty)
    timers = timing.timers(torch.device("cuda"))
    for cache, before in (("warm", ["busy"]), ("cold", ["busy", "flush"])):
        log.clear()
        done, _ = timers[cache](lambda: log.append("step"))
        assert done == 250
        assert log == [*before, "record", "step", "record", "wait"]


def test_table_shows_shares_of_the_baseline(benchmark_script, rows, results):
    table = benchmark_script("common.table").table
    results.add("net", "sgd", "step", "us", [1900.0, 2000.0, 2100.0])
    results.add("net", "czm", "step", "us", [1000.0])
    results.add("net", "bn", "step", "us", None)
    text = table(rows.frame(results.rows), baseline="sgd", shares=("step",))
    lines = [line.split() for line in text.splitlines()[2:]]
    assert ["czm", "1", "0.5"] in lines
    assert ["sgd", "2", "(1.94-2.06)", "1"] in lines
    assert lines[-1][:2] == ["bn", "impossible"]


@pytest.fixture
def drawn(benchmark_script, monkeypatch):
    """Return the figures that are saved."""
    matplotlib = pytest.importorskip("matplotlib.figure")
    pytest.importorskip("seaborn")
    figures = []
    save = matplotlib.Figure.savefig

    def keep(figure, path, **options):
        save(figure, path, **options)
        figures.append(figure)

    monkeypatch.setattr(matplotlib.Figure, "savefig", keep)
    return figures


def test_compare_draws_what_the_rows_say(benchmark_script, rows, results, drawn, tmp_path):
    plot = benchmark_script("common.plot")
    for provider, step in (("sgd", 2000.0), ("czm", 1000.0)):
        results.add("net", provider, "step", "us", step)
        results.add("net", provider, "saved", "bytes", step * 1e6)
        results.add("net", provider, "wait", "us", step**2)
        results.add("other", provider, "wait", "us", step)
    results.add("net", "reference", "wait", "us", 1e9)
    results.add("net", "bn", "wait", "us", None)
    path = tmp_path / "plot.svg"
    plot.compare(rows.frame(results.rows), path, ["step", "saved", "wait", "absent"], "sgd")
    assert path.read_text().lstrip().startswith("<?xml")
    # No panel for what a model has not.
    near, saved, far, other = drawn[0].axes
    assert near.get_xlim()[0] == 0 and near.get_xscale() == "linear"
    assert [bar.get_width() for bar in near.patches] == [1.0, 2.0]
    assert [text.get_text() for text in near.texts] == ["0.50", "1.00"]
    assert [label.get_text() for label in near.get_yticklabels()] == ["czm", "sgd"]
    assert saved.get_xlabel() == "saved, MB"
    # No bars on a logarithmic axis, which has no origin.
    assert far.get_xscale() == other.get_xscale() == "log" and not far.patches
    assert [text.get_text() for text in far.texts] == ["250", "0.25", "1.00"]
    facts = drawn[0].get_suptitle()
    assert results.machine.processor in facts and results.machine.commit in facts


def test_tradeoff_keeps_its_legend_off_the_points(
    benchmark_script, rows, results, drawn, tmp_path
):
    plot = benchmark_script("common.plot")
    for number, provider in enumerate("abc"):
        results.add("net", provider, "step", "us", 1000.0 * number)
        results.add("net", provider, "accuracy", "%", [80.0 - number, 81.0 - number])
    results.add("net", "d", "step", "us", 1.0)
    plot.tradeoff(rows.frame(results.rows), tmp_path / "plot.png", "step", "accuracy")
    (axes,) = drawn[0].axes
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "c"]
    assert legend.get_window_extent().x0 > axes.get_window_extent().x1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], "--steps must be at least 1, but was 0"),
        (["--json", "/nowhere/rows.jsonl"], "the folder /nowhere does not exist"),
        (["--backend", "cuda"], "cuda"),
        (["--plot", "step.xyz"], "--plot must end in .png, .svg, .pdf, but was step.xyz"),
    ],
)
def test_options_that_cannot_be_used_end_with_one_line(
    benchmark_script, capsys, arguments, words
):
    script = benchmark_script("step_throughput")
    with pytest.raises(SystemExit) as error:
        script.main(arguments)
    assert error.value.code == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_step_throughput_writes_rows(benchmark_script, rows, tmp_path, capsys):
    script = benchmark_script("step_throughput")
    path = tmp_path / "rows.jsonl"
    assert script.main([*SHORT, "--json", str(path)]) == 0

    found = rows.read(path)
    assert {row.model for row in found} == {"resnet110"}
    steps = [row for row in found if row.metric == "step"]
    assert {row.provider for row in steps} == {
        "czm_fused", "czm_eager", "czm_foreach", "sgd_forloop", "sgd_foreach", "sgd_fused",
    }  # fmt: skip
    assert "reference" in {row.config["backend"] for row in steps}
    assert all(0 < row.p20 <= row.p50 <= row.p80 and row.n >= 1 for row in steps)
    bare = {row.config["backend"] for row in found if row.metric == "bare" and row.p50 > 0}
    assert bare == {"torch"} | {row.config["backend"] for row in steps} - {"reference"}
    # 1,723,914 weights at 20 bytes each, 4,048 filters at 16.
    moved = rows.value(found, provider="czm_fused", backend="reference", metric="bytes")
    plain = rows.value(found, provider="sgd_fused", metric="bytes")
    assert plain == 20 * 1_723_914 and moved == plain + 16 * 4048
    assert rows.value(found, provider="copy", metric="bandwidth") > 0
    assert "step / sgd_fused" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [{"zmg": 0.0}, {"luma": 0.0}, {"momentum": 0.91}])
def test_step_throughput_stops_at_a_wrong_provider(
    benchmark_script, tmp_path, capsys, monkeypatch, wrong
):
    provider = benchmark_script("common.steps").ForeachCZM
    configure = provider.configure
    monkeypatch.setattr(
        provider, "configure", lambda self, settings: configure(self, replace(settings, **wrong))
    )
    path = tmp_path / "rows.jsonl"
    assert benchmark_script("step_throughput").main([*SHORT, "--json", str(path)]) == 1
    assert "czm_foreach (torch) is not the paper's step" in capsys.readouterr().err
    assert not path.exists()


@pytest.fixture
def host_time(benchmark_script, monkeypatch):
    # torch looks for ninja on PATH alone.
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    if not (shutil.which("ninja") and shutil.which("c++")):
        pytest.skip("there is no ninja, or no C++ compiler")
    return benchmark_script("host_time")


def test_host_time_writes_rows(host_time, rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    assert host_time.main(["--rounds", "2", "--json", str(path)]) == 0
    found = rows.read(path)
    assert {(row.provider, row.config["rate"]) for row in found if row.metric == "host"} == {
        ("cuda", "constant"), ("cuda", "changes"), ("triton", "constant"), ("triton", "changes"),
        ("floor", "constant"), ("floor_without_state", "constant"),
    }  # fmt: skip
    # 220 parameters, gradients and momenta; of 109 convolutions two more.
    assert rows.value(found, metric="tensors") == 3 * 220 + 2 * 109


def test_host_time_stops_at_wrong_addresses(host_time, monkeypatch, tmp_path, capsys):
    step = host_time.UnlaunchedCudaStep
    run = step._run
    monkeypatch.setattr(
        step, "_run", lambda self, launch, given: run(self, launch, given._replace(grads=bytes(8)))
    )
    path = tmp_path / "rows.jsonl"
    assert host_time.main(["--rounds", "1", "--json", str(path)]) == 1
    assert "cuda was not given the addresses" in capsys.readouterr().err
    assert not path.exists()


def test_parameter_shapes_of_resnet110(benchmark_script):
    shapes = benchmark_script("common.tensors").parameter_shapes("resnet110")
    assert len(shapes) == 220
    assert sum(len(shape) == 4 for shape in shapes) == 109
    assert sum(shape[0] for shape in shapes if len(shape) == 4) == 4048


@pytest.mark.parametrize("wrong", ["step", "add_relu_noise"])
def test_test_ops_stops_at_a_wrong_operator(
    benchmark_script, tmp_path, capsys, monkeypatch, wrong
):
    script = benchmark_script("test_ops")
    monkeypatch.setattr(script, "LAYERS", [(4, 4, 3, 3)])
    monkeypatch.setattr(script, "ACTIVATIONS", [(2, 4, 5, 5)])
    path = tmp_path / "rows.jsonl"
    arguments = ["--seconds", "0.001", "--json", str(path)]
    assert script.main(arguments) == 0
    assert path.exists()
    path.unlink()
    if wrong == "step":
        if script.available_backends(torch.device("cpu")) == ["reference"]:
            pytest.skip("the native CPU module is not built")
        weights = script.FusedCZM.weights
        monkeypatch.setattr(
            script.FusedCZM,
            "weights",
            lambda self: [w * (1 + 1e-4 * (self.backend != "reference")) for w in weights(self)],
        )
    else:
        monkeypatch.setattr(script, "LAYERS", [])
        fused = script._add_relu_noise
        monkeypatch.setattr(script, "_add_relu_noise", lambda x, r: fused(x, r) * (1 + 1e-4))
    assert script.main(arguments) == 1
    assert wrong in capsys.readouterr().err
    assert not path.exists()


def test_gradient_release_counts(benchmark_script, rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    arguments = ["--model", "resnet110", "--batch", "1", "--json", str(path)]
    assert benchmark_script("gradient_release").main(arguments) == 0

    def nbytes(provider, metric):
        return rows.value(rows.read(path), provider=provider, metric=metric)

    assert nbytes("czm_kept", "gradient_bytes") == nbytes("czm_kept", "parameter_bytes")
    # The largest weight's, and its bias's where it has one.
    assert nbytes("czm_released", "gradient_bytes") == 64 * 64 * 9 * 4
    assert nbytes("czm_released", "allocated_bytes") < nbytes("czm_kept", "allocated_bytes")


def test_conversion_cost_counts_what_networks_save(benchmark_script, rows, tmp_path):
    pytest.importorskip("torchvision")
    path = tmp_path / "rows.jsonl"
    arguments = ["--model", "six_layers", "--batch", "16", "--seconds", "0.01", "--json", str(path)]
    assert benchmark_script("conversion_cost").main(arguments) == 0
    saved = {row.provider: row.p50 for row in rows.read(path) if row.metric == "saved_bytes"}
    # With ReLU, what is left is what the architecture keeps whatever replaces BatchNorm.
    assert saved["converted"] == saved["centred"] == saved["floor"]
    assert saved["floor"] < saved["noisy"] < saved["batchnorm"]
    timed = [row.provider for row in rows.read(path) if row.metric == "step"]
    assert timed == ["batchnorm", "floor", "converted", "noisy", "centred"]


def test_conversion_cost_stops_where_centring_changes_outputs(benchmark_script, monkeypatch):
    pytest.importorskip("torchvision")
    script = benchmark_script("conversion_cost")

    def wrong(model, images):
        nn.init.ones_(model[0].bias)

    monkeypatch.setattr(script, "center_", wrong)
    with pytest.raises(benchmark_script("common.agreement").DisagreementError, match="centred"):
        script.main(["--model", "six_layers", "--batch", "16", "--seconds", "0"])


def test_low_precision_shows_what_stalls(benchmark_script, rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    assert benchmark_script("low_precision").main(["--steps", "50", "--json", str(path)]) == 0
    apart = {row.provider: row.p50 for row in rows.read(path) if row.metric == "off_float32"}
    assert apart["float32"] == 0
    assert apart["bfloat16, master_weights"] < 0.05 < 0.5 < apart["bfloat16"]
    losses = [row for row in rows.read(path) if row.metric == "loss"]
    assert {row.config["step"] for row in losses} == {50}
    assert np.isfinite([row.p50 for row in losses]).all()


def test_committed_results_are_rows(rows):
    files = sorted((BENCHMARKS / "results" / "cpu").glob("*.jsonl"))
    # Lines of czm-train and of convert_networks.py, which are no rows.
    files = [file for file in files if file.stem not in ("digits", "convert_networks")]
    if not files:
        pytest.skip("no results beside the benchmarks")
    for file in files:
        question = re.split("_(?:resnet|vgg|amd|granite|cascade|bfloat16)", file.stem)[0]
        assert {row.benchmark for row in rows.read(file)} == {question}
