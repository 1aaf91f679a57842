"""One short run of the benchmark of the step, and one with a provider that is wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHORT = ["--model", "resnet110", "--steps", "1"]

pytestmark = pytest.mark.skipif(
    not (BENCHMARKS / "step_throughput.py").exists(), reason="no benchmarks beside the tests"
)


@pytest.fixture
def step_throughput(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import step_throughput

    return step_throughput


def test_step_throughput_writes_rows(step_throughput, tmp_path, capsys):
    rows_file, details_file = tmp_path / "rows.json", tmp_path / "details.json"
    arguments = [*SHORT, "--json", str(rows_file), "--details", str(details_file)]
    assert step_throughput.main(arguments) == 0

    rows = json.loads(rows_file.read_text())
    for row in rows:
        assert list(row) == [
            "model", "provider", "backend", "dtype", "device", "p20_us", "p50_us", "p80_us",
            "bytes", "gbps", "ratio_to_sgd_fused",
        ]  # fmt: skip
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
    assert {row["provider"] for row in rows} == {
        "czm_fused", "czm_eager", "czm_foreach", "sgd_forloop", "sgd_foreach", "sgd_fused",
    }  # fmt: skip
    assert {row["model"] for row in rows} == {"resnet110"}
    assert "reference" in {row["backend"] for row in rows}

    details = json.loads(details_file.read_text())
    assert details["problems"] == []
    assert len(details["measurements"]) == len(rows)
    bare = {row["backend"] for row in details["measurements"] if row.get("bare_p50_us", 0) > 0}
    assert bare == {"torch"} | {row["backend"] for row in rows} - {"reference"}
    assert "sgd_fused" in capsys.readouterr().out


def test_step_throughput_plots(step_throughput, tmp_path):
    pytest.importorskip("matplotlib")
    from throughput import report

    row = dict.fromkeys(report.KEYS, 1.0)
    row |= {"model": "resnet110", "provider": "czm_fused", "backend": "cpu", "dtype": "float32"}
    path = tmp_path / "plot.png"
    report.plot([row], {"cpu": "a CPU", "threads": 1, "torch": "2", "commit": "0"}, path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", [{"zmg": 0.0}, {"luma": 0.0}, {"momentum": 0.91}])
def test_step_throughput_stops_at_a_wrong_provider(
    step_throughput, tmp_path, capsys, monkeypatch, wrong
):
    from throughput.providers import ForeachCZM

    configure = ForeachCZM.configure
    monkeypatch.setattr(
        ForeachCZM,
        "configure",
        lambda self, settings: configure(self, replace(settings, **wrong)),
    )
    rows_file = tmp_path / "rows.json"
    assert step_throughput.main([*SHORT, "--json", str(rows_file)]) == 1
    assert "czm_foreach (torch) is not the paper's step" in capsys.readouterr().err
    assert not rows_file.exists()


def test_step_throughput_counts_resnet110(step_throughput):
    from throughput.models import parameter_shapes

    shapes = parameter_shapes("resnet110")
    assert len(shapes) == 220
    assert sum(len(shape) == 4 for shape in shapes) == 109
    assert sum(shape[0] for shape in shapes if len(shape) == 4) == 4048
