import json
from pathlib import Path

import pytest
from logged_runs import write_run
from matplotlib.figure import Figure

from czm_fused.training import TrainingError, figures, plots
from czm_fused.training.__main__ import main
from czm_fused.training.table1 import BATCHNORM, TABLE1

CZMIG = TABLE1[0]


@pytest.fixture
def drawn(monkeypatch):
    """Keep the figures that are drawn, by the name of their file."""
    kept = {}
    real = Figure.savefig

    def savefig(figure, file, **options):
        real(figure, file, **options)
        kept[Path(file.name).name.split(".")[0]] = figure

    monkeypatch.setattr(Figure, "savefig", savefig)
    return kept


def options(row, seed=0):
    values = {"method": row.method, "lr": row.lr, "noise": row.noise, "seed": seed}
    return {**values, **({"zmg": row.zmg} if row.method == "czmig" else {})}


def write_row(folder, row, *accuracies, more=({},)):
    for seed, values in enumerate(accuracies):
        write_run(folder / row.name / f"seed-{seed}", options(row, seed), values, more)


def lines(axes):
    return [list(line.get_ydata()) for line in axes.get_lines() if len(line.get_ydata())]


def names(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_curves_are_means_and_bands_are_one_deviation(tmp_path, drawn):
    write_row(tmp_path, CZMIG, [10.0, 20.0], [20.0, 40.0])
    figures.draw(tmp_path, tmp_path / "out")
    axes = drawn["figure1"].axes[1]
    assert lines(axes) == [[15.0, 30.0]]
    assert names(drawn["figure1"]) == [f"{CZMIG.title} (n = 2)"]
    assert "one standard deviation" in drawn["figure1"].legends[0].get_title().get_text()
    band = axes.collections[0].get_paths()[0].vertices
    heights = sorted(y for x, y in band if x == 2.0)
    assert (heights[0], heights[-1]) == pytest.approx((30 - 200**0.5, 30 + 200**0.5))


def test_files_are_those_with_rows(tmp_path):
    write_row(tmp_path, CZMIG, [10.0, 20.0])
    names = {path.name for path in figures.draw(tmp_path, tmp_path / "out", "svg")}
    assert names == {"figure1.svg", "figure4.svg", "figure5.svg", "filters.svg"}
    assert (tmp_path / "out" / "figure1.svg").read_text().startswith("<?xml")


def test_rows_have_colours_of_their_own(tmp_path, drawn):
    for row in TABLE1:
        write_row(tmp_path, row, [10.0, 20.0], more=[{"rejection_db": {"stem": 1.0}}])
    figures.draw(tmp_path, tmp_path / "out")
    of_rows = [line for line in drawn["rejection"].axes[0].get_lines() if len(line.get_ydata())]
    colours = [line.get_color() for line in of_rows]
    assert len(set(colours)) == len(TABLE1)


def test_axes_leave_out_the_climb_and_impossible_percentages(tmp_path, drawn):
    write_row(tmp_path, CZMIG, [1.0, 20.0, *[90.0] * 8], [10.0, 30.0, *[99.9] * 8])
    figures.draw(tmp_path, tmp_path / "out")
    low, high = drawn["figure1"].axes[1].get_ylim()
    assert low == pytest.approx(94.95 - 1)
    assert high <= 101
    assert drawn["figure5"].axes[1].get_ylim()[0] >= 0


def test_first_epochs_are_a_tenth(tmp_path, drawn):
    write_row(tmp_path, CZMIG, [float(epoch) for epoch in range(30)])
    figures.draw(tmp_path, tmp_path / "out")
    assert lines(drawn["figure5"].axes[1]) == [[0.0, 1.0, 2.0]]
    assert drawn["figure5"].legends[0].get_title().get_text() == ""


def test_one_epoch_has_one_tick(tmp_path, drawn):
    write_row(tmp_path, CZMIG, [10.0])
    figures.draw(tmp_path, tmp_path / "out")
    axes = drawn["figure1"].axes[0]
    assert list(axes.get_xticks()) == [1]
    assert axes.get_xlim() == (0.5, 1.5)


def test_filters_without_a_log_of_the_collapsed_have_one_panel(tmp_path, drawn):
    write_row(tmp_path, CZMIG, [10.0, 20.0])
    figures.draw(tmp_path, tmp_path / "out")
    assert len(drawn["filters"].axes) == 1
    write_row(tmp_path, BATCHNORM, [10.0, 20.0], more=[{}, {"collapsed_filters": 0.25}])
    figures.draw(tmp_path, tmp_path / "out")
    _, shares = drawn["filters"].axes
    assert [25.0] in [list(line.get_ydata()) for line in shares.get_lines()]


def test_layers_of_one_depth_share_a_place(tmp_path, drawn):
    """BatchNorm's convolutions have other names, and a layer that passes nothing has no ratio."""
    czm = [{"rejection_db": {"stem": 1.0, "a": None, "b": 40.0}}]
    write_row(tmp_path, CZMIG, [10.0], more=czm)
    write_row(
        tmp_path, BATCHNORM, [10.0], more=[{"rejection_db": {"stem.0": 2.0, "a.0": 3.0, "b.0": 4}}]
    )
    figures.draw(tmp_path, tmp_path / "out")
    places = {
        line.get_color(): dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in drawn["rejection"].axes[1].get_lines()
    }
    assert places["black"] == {1: 2.0, 2: 3.0, 3: 4.0}
    assert (places["C0"][1], places["C0"][3]) == (1.0, 40.0)


def test_legend_is_outside_the_panels(tmp_path, drawn):
    history = [{"epoch": 1, "train_accuracy": 99.0, "test_accuracy": 98.0}]
    plots.draw_run(tmp_path, "png", history, "t")
    figure = drawn["accuracy"]
    legend = figure.legends[0].get_window_extent()
    assert not any(legend.overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_figures_of_real_runs_finished_and_not(tmp_path, train):
    assert train("--method", "czmig", "--epochs", "1", out=tmp_path / "runs" / "a")[0] == 0
    assert train("--method", "bn", "--epochs", "1", out=tmp_path / "runs" / "b")[0] == 0
    (tmp_path / "runs" / "b" / "summary.json").unlink()
    status = main(["figures", str(tmp_path / "runs"), "--out", str(tmp_path / "pictures")])
    assert status == 0
    assert (tmp_path / "pictures" / "rejection.png").exists()
    assert not (tmp_path / "runs" / "figures").exists()


def test_empty_folder_name_is_the_working_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["figures", ""]) == 2
    assert "no run of a row of Table 1 under ." in capsys.readouterr().err


def test_runs_that_differ_are_not_compared(tmp_path):
    with pytest.raises(TrainingError, match="no run of a row of Table 1"):
        figures.draw(tmp_path / "nowhere", tmp_path)
    with pytest.raises(TrainingError, match="no run of a row of Table 1"):
        figures.draw(tmp_path, tmp_path)
    write_run(tmp_path / "a", {"method": "bn"}, [10.0])
    write_run(tmp_path / "b", {"method": "bn", "seed": 1, "batch_size": 7}, [10.0])
    with pytest.raises(TrainingError, match="--batch-size 50, not 7"):
        figures.draw(tmp_path, tmp_path / "out")


def test_options_are_of_the_runs_that_are_drawn(tmp_path):
    write_row(tmp_path, CZMIG, [10.0, 20.0])
    write_run(tmp_path / "zz", {"method": "plain", "depth": 14}, [1.0])
    _, found = figures.read_runs(tmp_path)
    assert (found["depth"], found["epochs"], found["method"]) == (8, 2, "czmig")


def test_networks_of_the_user_are_no_rows(tmp_path):
    write_row(tmp_path, CZMIG, [10.0, 20.0])
    write_row(tmp_path / "own", CZMIG, [1.0, 2.0])
    file = tmp_path / "own" / CZMIG.name / "seed-0" / "summary.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "network": "Sequential"}))
    frame, _ = figures.read_runs(tmp_path)
    assert list(frame["test_accuracy"]) == [10.0, 20.0]
