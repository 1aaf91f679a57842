import statistics

import pytest
from logged_runs import write_run
from PIL import Image

from czm_fused.training.__main__ import main
from czm_fused.training.sweep import figures
from czm_fused.training.sweep.figures import COMPARISONS, draw, mean_curve
from czm_fused.training.sweep.results import all_results
from czm_fused.training.sweep.rows import BATCHNORM, TABLE1

CZMIG = TABLE1[0]


def options(row, seed):
    given = {"method": row.method, "lr": row.lr, "noise": row.noise, "seed": seed}
    return {**given, "zmg": row.zmg} if row.method == "czmig" else given


def write_row(folder, row, *curves, more=({},)):
    for seed, accuracies in enumerate(curves):
        write_run(folder / row.name / f"seed-{seed}", options(row, seed), accuracies, more)


@pytest.fixture
def drawn(monkeypatch):
    """Keep the figures that are drawn, by file name; return them."""
    kept = {}

    def keep(figure, path):
        kept[path.name] = figure
        path.touch()

    monkeypatch.setattr(figures, "save", keep)
    return kept


def lines(axes):
    return {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}


def band(axes, place):
    """Return the least and the greatest height of a shaded band at an epoch."""
    vertices = axes.collections[0].get_paths()[0].vertices
    heights = [y for x, y in vertices if x == place]
    return min(heights), max(heights)


def test_every_row_is_in_a_comparison():
    assert [comparison.name for comparison in COMPARISONS] == [f"figure{i}" for i in range(1, 6)]
    rows = [row for comparison in COMPARISONS for row in comparison.rows]
    assert set(rows) == set(TABLE1)


def test_figures_are_pictures_of_the_whole_sweep(tmp_path, capsys):
    for row in TABLE1:
        write_row(tmp_path, row, [10.0, 50.0, 60.0], [10.0, 52.0, 64.0])
    assert main(["figures", str(tmp_path)]) == 0
    names = [*(f"figure{i}.png" for i in range(1, 6)), "filters.png"]
    paths = [tmp_path / "figures" / name for name in names]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    for path in paths:
        with Image.open(path) as image:
            image.load()


def test_accuracy_figure_shows_mean_and_deviation(tmp_path, drawn):
    first, second, third = [10.0, 50.0, 60.0], [12.0, 52.0, 64.0], [14.0, 60.0, 62.0]
    write_row(tmp_path, CZMIG, first, second, third)
    write_row(tmp_path, BATCHNORM, [20.0, 30.0, 40.0])
    draw(tmp_path, tmp_path / "out")
    figure = drawn["figure1.png"]
    train, test = figure.axes
    means = [statistics.mean(values) for values in zip(first, second, third, strict=True)]
    expected = {"CZMIG, lr 0.4, zmg 0.85, noise 0.1 (n = 3)": means}
    expected["BatchNorm, lr 0.1 (n = 1)"] = [20.0, 30.0, 40.0]
    assert lines(test) == {name: pytest.approx(curve) for name, curve in expected.items()}
    assert lines(train) == {
        name: pytest.approx([value + 1 for value in curve]) for name, curve in expected.items()
    }
    assert "zero-mean gradients and noise" in figure.get_suptitle()
    sd = statistics.stdev([first[1], second[1], third[1]])
    test.collections[0].remove()  # BatchNorm's, of one seed
    assert band(test, 2.0) == pytest.approx((means[1] - sd, means[1] + sd))


def test_comparison_without_runs_is_not_drawn(tmp_path, drawn):
    row = next(row for row in TABLE1 if row.name == "czmi-lr0.1-noise0")
    write_row(tmp_path, row, [10.0, 20.0])
    assert [path.name for path in draw(tmp_path, tmp_path / "out")] == ["figure2.png"]
    write_row(tmp_path, BATCHNORM, [10.0, 20.0])
    names = [path.name for path in draw(tmp_path, tmp_path / "out")]
    assert names == ["figure2.png", "filters.png"]


def test_rows_have_colours_of_their_own(tmp_path, drawn):
    for row in TABLE1:
        write_row(tmp_path, row, [10.0, 20.0], more=[{"rejection_db": {"stem": 1.0}}])
    draw(tmp_path, tmp_path / "out")
    colours = [line.get_color() for line in drawn["rejection.png"].axes[0].get_lines()]
    assert len(set(colours)) == len(TABLE1)


def test_axes_begin_after_the_climb(tmp_path, drawn):
    write_row(tmp_path, CZMIG, [10.0, 20.0, *[90.0] * 8])
    draw(tmp_path, tmp_path / "out")
    assert drawn["figure1.png"].axes[1].get_ylim()[0] == 89.0
    assert drawn["figure5.png"].axes[1].get_ylim()[0] < 10.0


def test_first_epochs_are_a_tenth(tmp_path, drawn):
    write_row(tmp_path, CZMIG, [float(epoch) for epoch in range(30)])
    draw(tmp_path, tmp_path / "out")
    assert lines(drawn["figure5.png"].axes[1])[f"{CZMIG.title} (n = 1)"] == [0.0, 1.0, 2.0]


def test_runs_that_stop_early_count_where_they_got(tmp_path):
    write_row(tmp_path, CZMIG, [10.0, 20.0, 30.0], [20.0, 40.0, 50.0])
    results = all_results(tmp_path)
    results[1].history.pop()
    epochs, means, deviations, counts = mean_curve(results, lambda r: r["test_accuracy"])
    assert (epochs, means, counts) == ([1, 2, 3], [15.0, 30.0, 30.0], [2, 2, 1])
    assert deviations == pytest.approx([50**0.5, 200**0.5, 0.0])


def test_filters_figure_shows_magnitudes_and_the_collapsed(tmp_path, drawn):
    write_row(tmp_path, CZMIG, [10.0, 20.0], more=[{"collapsed_filters": 0.0}])
    write_row(tmp_path, BATCHNORM, [10.0, 20.0], more=[{}, {"collapsed_filters": 0.25}])
    draw(tmp_path, tmp_path / "out")
    magnitudes, shares = drawn["filters.png"].axes
    assert lines(magnitudes) == {row.title: [0.8, 0.8] for row in (CZMIG, BATCHNORM)}
    assert band(magnitudes, 1.0) == pytest.approx((0.6, 1.0))
    assert list(lines(shares).values()) == [[0.0, 0.0], [25.0]]


def test_rejection_figure_shows_every_layer(tmp_path, drawn):
    layers = [{"rejection_db": {"stem": 1.0, "a": 20.0, "b": 30.0}}, {}]
    more = [{"rejection_db": {"stem": 3.0, "a": 24.0, "b": 40.0}}, {}]
    write_row(tmp_path, CZMIG, [10.0, 20.0], more=layers)
    write_run(tmp_path / "other", options(CZMIG, 1), [10.0, 20.0], more=more)
    write_row(tmp_path, BATCHNORM, [10.0, 20.0])
    draw(tmp_path, tmp_path / "out")
    over_epochs, over_layers = drawn["rejection.png"].axes
    assert lines(over_epochs) == {f"{CZMIG.title} (n = 2)": [22.0]}
    (line,) = over_layers.get_lines()
    assert list(line.get_ydata()) == [2.0, 22.0, 35.0]


def test_rejection_figure_keeps_layers_in_their_places(tmp_path, drawn):
    """A layer that passes nothing has no ratio, and is not logged."""
    write_row(tmp_path, CZMIG, [10.0], more=[{"rejection_db": {"stem": 1.0, "a": 20.0, "b": 30.0}}])
    more = [{"rejection_db": {"stem": 3.0, "b": 40.0}}]
    write_run(tmp_path / "other", options(CZMIG, 1), [10.0], more=more)
    write_row(tmp_path, BATCHNORM, [10.0], more=more)
    draw(tmp_path, tmp_path / "out")
    czmig, batchnorm = drawn["rejection.png"].axes[1].get_lines()
    assert list(czmig.get_ydata()) == [2.0, 20.0, 35.0]
    assert list(batchnorm.get_xdata()) == [1, 3]


def test_figures_of_real_runs_finished_and_not(tmp_path, train):
    assert train("--method", "czmig", "--epochs", "2", out=tmp_path / "runs" / "a")[0] == 0
    assert train("--method", "bn", "--epochs", "2", out=tmp_path / "runs" / "b")[0] == 0
    (tmp_path / "runs" / "b" / "summary.json").unlink()
    status = main(["figures", str(tmp_path / "runs"), "--out", str(tmp_path / "pictures")])
    assert status == 0
    assert (tmp_path / "pictures" / "rejection.png").exists()
    assert not (tmp_path / "runs" / "figures").exists()


def test_bad_input_is_one_line(tmp_path, capsys):
    def fails(*arguments):
        assert main(["figures", *map(str, arguments)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("czm-train: error: ") and err.count("\n") == 1
        return err

    assert "there is no folder" in fails(tmp_path / "nowhere")
    assert "no run of a row of Table 1" in fails(tmp_path)
    write_run(tmp_path / "a", {"method": "bn"}, [10.0])
    (tmp_path / "file").touch()
    assert "cannot create --out" in fails(tmp_path, "--out", tmp_path / "file" / "figures")
    write_run(tmp_path / "b", {"method": "bn", "seed": 1, "batch_size": 7}, [10.0])
    assert "--batch-size was 50 and 7" in fails(tmp_path)
