"""diagnose and watch: numbers against literal loops, and a network that is left as it was."""

from __future__ import annotations

import math
import statistics
import sys

import pytest
import torch
from torch import nn

from czm_fused import FusedCZMSGD, czm_init_, czm_param_groups, exp_scale
from czm_fused.diagnostics import diagnose, watch
from czm_fused.models import cifar_resnet

EPS = torch.finfo(torch.float64).eps
# What every number here is computed by: sums of fewer than a thousand terms.
CLOSE = 1e3 * EPS


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(),
        nn.Conv2d(4, 5, 3, stride=2, bias=False),
    )


def trained(model: nn.Module, images: torch.Tensor) -> FusedCZMSGD:
    optimizer = FusedCZMSGD(
        czm_param_groups(model, overrides={"stem": {"lr": 0.05}}), lr=0.1, backend="reference"
    )
    for _ in range(3):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    return optimizer


def spread_of(values):
    return statistics.median(values), min(values), max(values)


def seen(spread):
    return spread.median, spread.min, spread.max


def test_diagnose_against_literal_loops():
    model, images = network(), torch.randn(4, 3, 7, 7)
    optimizer = trained(model, images)
    report = diagnose(model, images, optimizer)
    for layer, index, lr in zip(report.layers, (0, 4), (0.05, 0.1), strict=True):
        weight = model[index].weight
        scales = optimizer.state[weight]["log_scale"].exp().tolist()
        norms, distances, shifts = [], [], []
        for kernel, scale in zip(weight.tolist(), scales, strict=True):
            slices = [sum(rows, []) for rows in kernel]
            power = sum(w * w for taps in slices for w in taps)
            norms.append(math.sqrt(power) / scale)
            means = [sum(taps) / 9 for taps in slices]
            distances.append(math.sqrt(sum(9 * mean * mean for mean in means) / power))
            shifts.append(sum(sum(taps) ** 2 for taps in slices))
        assert (layer.name, layer.filters) == (str(index), len(scales))
        assert seen(layer.direction_norm) == pytest.approx(spread_of(norms), rel=CLOSE)
        assert seen(layer.scale) == pytest.approx(spread_of(scales), rel=CLOSE)
        assert seen(layer.isocline_distance) == pytest.approx(spread_of(distances), rel=CLOSE)
        assert layer.shift_gain == pytest.approx(math.sqrt(statistics.mean(shifts)), rel=CLOSE)
        rates = [lr / norm**2 for norm in norms]
        assert seen(layer.effective_lr) == pytest.approx(spread_of(rates), rel=CLOSE)
        decibels = 20 * math.log10(layer.signal_gain / layer.shift_gain)
        assert layer.rejection_db == pytest.approx(decibels, abs=100 * EPS)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize("groups", [1, 2])
def test_gains_are_what_the_layer_does(padding_mode, groups):
    layer = nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=groups, padding_mode=padding_mode)
    images = 3 + torch.randn(5, 4, 9, 8)
    measured = diagnose(layer, images).layers[0]

    signal = torch.stack([torch.stack([c - c.mean() for c in image]) for image in images])
    with torch.no_grad():
        response = layer(signal) - layer.bias.view(-1, 1, 1)
        gain = math.sqrt(response.square().mean() / signal.square().mean())
        assert measured.signal_gain == pytest.approx(gain, rel=CLOSE)

        # One channel at a time is shifted by 1; the centre does not see the border.
        power = 0.0
        for channel in range(4):
            shift = torch.zeros(1, 4, 9, 9)
            shift[:, channel] = 1
            centre = (layer(shift) - layer.bias.view(-1, 1, 1))[0, :, 4, 4]
            power += centre.square().mean().item()
    assert measured.shift_gain == pytest.approx(math.sqrt(power), rel=CLOSE)


def test_signal_gain_of_a_shared_layer_is_that_of_all_its_inputs():
    layer = nn.Conv1d(2, 2, 3, padding=1, bias=False)
    x = torch.randn(3, 2, 6)
    twice = diagnose(nn.Sequential(layer, layer), x).layers[0].signal_gain
    with torch.no_grad():
        inputs = [x, layer(x)]
        signals = [each - each.mean(dim=2, keepdim=True) for each in inputs]
        given = sum(each.square().mean() for each in signals)
        returned = sum(layer(each).square().mean() for each in signals)
    assert twice == pytest.approx(math.sqrt(returned / given), rel=CLOSE)


def test_zero_mean_filters_reject_what_others_pass():
    images = torch.rand(8, 3, 8, 8)
    czm = diagnose(cifar_resnet(8), images).layers
    for layer in czm[1:]:
        assert layer.isocline_distance.max < 100 * EPS
        assert layer.rejection_db > 200
    # The stem keeps its means, and random filters do not reject.
    for layer in (czm[0], *diagnose(cifar_resnet(8, norm="bn"), images).layers):
        assert 0.1 < layer.isocline_distance.median < 0.6
        assert abs(layer.rejection_db) < 6


def test_pointwise_filters_are_all_mean():
    layer = diagnose(nn.Conv2d(3, 4, 1), torch.randn(2, 3, 5, 5)).layers[0]
    assert seen(layer.isocline_distance) == pytest.approx((1, 1, 1), rel=CLOSE)


def test_exp_scale_has_its_own_direction_and_scale():
    torch.manual_seed(0)
    layer = exp_scale(nn.Conv2d(3, 4, 3))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    stored = layer.parametrizations.weight
    with torch.no_grad():
        stored.original0 *= 2
    measured = diagnose(layer, torch.randn(2, 3, 5, 5), optimizer).layers[0]
    assert seen(measured.direction_norm) == pytest.approx((2, 2, 2), rel=CLOSE)
    assert seen(measured.scale) == pytest.approx(
        spread_of(stored.original1.exp().tolist()), rel=CLOSE
    )
    assert seen(measured.effective_lr) == pytest.approx((0.025,) * 3, rel=CLOSE)


def test_what_cannot_be_known_is_left_out():
    model = nn.ModuleDict({"ran": nn.Conv2d(1, 2, 3), "idle": nn.Conv2d(1, 2, 3)})
    model.forward = lambda x: model["ran"](x)
    report = diagnose(model, torch.ones(2, 1, 4, 4))
    # The input varies nowhere, and nobody trains.
    for layer in report.layers:
        assert layer.signal_gain is layer.rejection_db is layer.effective_lr is None
    assert set(report.as_dict()) == {
        f"{layer}/{quantity}"
        for layer in ("ran", "idle")
        for quantity in (
            *(f"{q}{of}" for q in ("direction_norm", "scale") for of in ("", "_min", "_max")),
            *(f"{q}{of}" for q in ("isocline_distance", "gain") for of in ("", "_min", "_max")),
            "shift_gain",
        )
    } | {"ran/output_spread", "output_spread"}
    assert " -" in str(report)


def test_before_the_first_step_is_what_the_first_step_starts_from():
    model, images = czm_init_(network()), torch.randn(4, 3, 7, 7)
    optimizer = FusedCZMSGD(
        czm_param_groups(model, overrides={"stem": {"lr": 0.05}}), lr=0.1, backend="reference"
    )
    before = diagnose(model, images, optimizer)
    for layer, lr in zip(before.layers, (0.05, 0.1), strict=True):
        assert seen(layer.direction_norm) == pytest.approx((1, 1, 1), rel=CLOSE)
        assert seen(layer.scale) == pytest.approx((0.8,) * 3, rel=CLOSE)
        assert seen(layer.effective_lr) == pytest.approx((lr,) * 3, rel=CLOSE)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    model(images).sum().backward()
    optimizer.step()
    for layer, now in zip(before.layers, diagnose(model, images, optimizer).layers, strict=True):
        assert seen(now.scale) == pytest.approx(seen(layer.scale), rel=CLOSE)


def test_before_the_first_step_without_exp_scale_the_direction_is_the_weight():
    model, images = czm_init_(network()), torch.randn(4, 3, 7, 7)
    for optimizer in (
        FusedCZMSGD(model.parameters(), lr=0.1, exp_scale=False),
        torch.optim.SGD(model.parameters(), lr=0.1),
    ):
        layer = diagnose(model, images, optimizer).layers[0]
        assert seen(layer.direction_norm) == pytest.approx((0.8,) * 3, rel=CLOSE)
        assert seen(layer.scale) == (1, 1, 1)


def test_a_group_that_scales_no_more_has_scale_one():
    model, images = czm_init_(network()), torch.randn(4, 3, 7, 7)
    optimizer = FusedCZMSGD(model.parameters(), lr=0.1)
    model(images).square().mean().backward()
    optimizer.step()
    optimizer.param_groups[0]["exp_scale"] = False
    assert seen(diagnose(model, images, optimizer).layers[0].scale) == (1, 1, 1)


class Backwards(nn.Module):
    """Registers its convolutions in the opposite order of their execution."""

    def __init__(self):
        super().__init__()
        self.idle = nn.Conv2d(3, 3, 3)
        self.second = nn.Conv2d(4, 5, 3)
        self.first = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.second(self.first(x))


def test_layers_are_in_the_order_of_execution():
    report = diagnose(Backwards(), torch.randn(4, 3, 7, 7))
    assert [(e.name, e.depth) for e in report.layers] == [("first", 0), ("second", 1), ("idle", 2)]
    images = torch.randn(4, 3, 8, 8)
    czm, bn = (diagnose(cifar_resnet(8, norm=norm), images).layers for norm in ("czm", "bn"))
    assert {layer.name for layer in czm}.isdisjoint(layer.name for layer in bn)
    assert [layer.depth for layer in czm] == [layer.depth for layer in bn] == list(range(7))


def test_spreads_are_those_of_the_outputs():
    model, images = Backwards(), torch.randn(4, 3, 7, 7)
    report = diagnose(model, images)
    with torch.no_grad():
        outputs = model.first(images), model(images)
    spreads = [
        math.sqrt(statistics.mean(statistics.pvariance(c.flatten().tolist()) for c in each))
        for each in (output.transpose(0, 1) for output in outputs)
    ]
    assert [e.output_spread for e in report.layers[:2]] == pytest.approx(spreads, rel=CLOSE)
    assert report.layers[2].output_spread is None
    assert report.output_spread == pytest.approx(spreads[1], rel=CLOSE)
    norms = [w.square().sum().sqrt().item() for w in model.first.weight]
    assert seen(report.layers[0].gain) == pytest.approx(spread_of(norms), rel=CLOSE)
    assert report.notes == ()


@pytest.mark.parametrize(
    ("gain", "message"),
    [
        (1e-4, "outputs of 2, 4 are dead, .*czm_init_\\(model, example_input=images\\)"),
        (1e2, "outputs of 4 are exploding, .*lower the learning rate"),
    ],
)
def test_dead_and_exploding_layers_are_warned_about_by_name(gain, message):
    convolutions = [nn.Conv2d(3, 3, 3, bias=False) for _ in range(3)]
    model = nn.Sequential(
        convolutions[0], nn.Identity(), convolutions[1], nn.Identity(), convolutions[2]
    )
    images = torch.randn(8, 3, 9, 9)
    czm_init_(model, gain=1.0)
    with torch.no_grad():
        for convolution in convolutions[1:]:
            convolution.weight *= gain
    with pytest.warns(UserWarning, match=message):
        report = diagnose(model, images)
    assert any(note in str(report) for note in report.notes)


@pytest.mark.filterwarnings("error")
def test_spreads_before_a_normalisation_are_not_warned_about():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-20))
    czm_init_(model, gain=1e-6)
    diagnose(model.train(), torch.randn(4, 3, 8, 8))
    with torch.no_grad():
        model[1].running_var *= 1e-12
    diagnose(model, torch.randn(4, 3, 8, 8))


class Wrapper(torch.optim.Optimizer):
    """Holds an optimizer as Accelerate's does, without the hooks of its own base class."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def step(self, closure=None):
        return self.optimizer.step(closure)


def test_watch_looks_through_wrappers_of_the_optimizer():
    model, images = network(), torch.randn(4, 3, 7, 7)
    optimizer = trained(model, images)
    wrapped = Wrapper(Wrapper(optimizer))
    logged = []
    with watch(model, wrapped, images, log=lambda d, n: logged.append((n, d)), every=1):
        wrapped.step()
    assert logged == [(1, diagnose(model, images, optimizer).as_dict())]
    assert diagnose(model, images, wrapped) == diagnose(model, images, optimizer)


def test_filters_of_zeros():
    layer = nn.Conv2d(2, 3, 3)
    nn.init.zeros_(layer.weight)
    measured = diagnose(layer, torch.randn(2, 2, 5, 5)).layers[0]
    assert seen(measured.isocline_distance) == (0, 0, 0)
    assert math.isnan(measured.rejection_db)
    nn.init.zeros_(layer.weight[1:])
    with torch.no_grad():
        layer.weight[0] = torch.tensor([[-1.0, 0, 1], [-1, 0, 1], [-1, 0, 1]])
    assert diagnose(layer, torch.randn(2, 2, 5, 5)).layers[0].rejection_db == math.inf


@pytest.mark.parametrize("training", [False, True])
def test_network_is_left_as_it_was(training):
    model, images = network().train(training), torch.randn(4, 3, 7, 7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    diagnose(model, images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(module.training == training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hooks_go_when_the_forward_pass_fails():
    model = network()
    with pytest.raises(RuntimeError):
        diagnose(model, torch.randn(4, 2, 7, 7))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_half_precision_under_autocast():
    torch.set_default_dtype(torch.float32)
    layer = nn.Conv2d(3, 4, 3)
    images = torch.randn(8, 3, 8, 8)
    exact = diagnose(layer, images).layers[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = diagnose(layer, images).layers[0]
    # Each of the 27 products and the result may be off by bfloat16's 2^-8, and most errors cancel.
    assert rounded.signal_gain == pytest.approx(exact.signal_gain, rel=2**-8)
    halved = diagnose(layer.bfloat16(), images.bfloat16()).layers[0]
    assert halved.signal_gain == pytest.approx(exact.signal_gain, rel=2**-7)


def test_compiled_and_wrapped_models(fully_shard):
    model, images = network().eval(), torch.randn(4, 3, 7, 7)
    expected = diagnose(model, images).as_dict()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    compiled(images)
    parts = nn.Sequential(model)
    model.compile(backend=backend)
    parts(images)
    compiled_before = len(graphs)
    assert diagnose(compiled, images).as_dict() == expected
    measured = diagnose(parts, images).as_dict()
    assert measured == {
        name if name == "output_spread" else f"0.{name}": number
        for name, number in expected.items()
    }
    # Nothing is compiled for the sake of a report.
    assert len(graphs) == compiled_before > 0

    wrapped = nn.parallel.DistributedDataParallel(model)
    assert diagnose(wrapped, images).as_dict() == expected
    sharded = fully_shard(network())
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
    first = diagnose(sharded, images, optimizer)
    assert all(layer.effective_lr for layer in first.layers)
    # A pass without backward leaves other parameters in place, were they not put back.
    assert [*sharded.parameters()] == optimizer.param_groups[0]["params"]
    sharded.eval()(images)
    assert diagnose(sharded, images, optimizer) == first


def test_watch_logs_every_so_many_steps():
    model, images = network(), torch.randn(4, 3, 7, 7)
    logged: list[tuple[int, dict[str, float]]] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = watch(model, optimizer, images, log=lambda d, n: logged.append((n, d)), every=2)

    def steps(number: int) -> None:
        for _ in range(number):
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()

    steps(5)
    assert [step for step, _ in logged] == [2, 4]
    steps(1)
    assert logged[-1][1] == diagnose(model, images, optimizer).as_dict()
    handle.remove()
    steps(2)
    assert [step for step, _ in logged] == [2, 4, 6]
    with watch(model, optimizer, images, log=lambda d, n: logged.append((n, d)), every=1):
        steps(1)
    steps(1)
    assert len(logged) == 4


def test_table_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    model, images = network(), torch.randn(4, 3, 7, 7)
    report = diagnose(model, images, trained(model, images))
    lines = str(report).splitlines()
    assert len(lines) == 4 and all(word in lines[0] for word in ("‖V‖", "exp(g)", "effective lr"))
    assert f"{report.layers[1].rejection_db:.1f} dB" in lines[2]
    panels = report.plot().axes
    assert [axes.lines[0].get_xdata().tolist() for axes in panels] == [[0, 1]] * 6
    # Without an optimizer, nothing is known of the effective learning rate: no empty panel.
    assert len(diagnose(model, images).plot().axes) == 5
    html = report._repr_html_()
    assert html.startswith("<table>") and len(html) < 2000
    assert report.plot()._repr_png_().startswith(b"\x89PNG")
    for suffix, start in (("svg", b"<?xml"), ("pdf", b"%PDF")):
        path = tmp_path / f"layers.{suffix}"
        report.plot().savefig(path)
        assert path.read_bytes().startswith(start)


@pytest.mark.parametrize("columns", [80, 40])
def test_table_on_a_narrow_terminal(columns, monkeypatch):
    """Columns are left out, and named; the table of a file is whole."""
    model, images = network(), torch.randn(4, 3, 7, 7)
    report = diagnose(model, images, trained(model, images))
    whole = str(report)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = str(report).splitlines()
    assert all(len(line) <= columns for line in lines[:-1])
    assert lines[0] == whole.splitlines()[0][: len(lines[0])]
    assert lines[-1].startswith("(too narrow for: ") and lines[-1].endswith(", effective lr)")


def test_unknown_numbers_of_a_dead_layer_are_dashes():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3))
    nn.init.zeros_(model[1].weight)
    with pytest.warns(UserWarning, match="are dead"):
        report = diagnose(model, torch.randn(4, 3, 8, 8))
    assert "nan" not in str(report)


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"czm-fused\[train\]"):
        diagnose(nn.Conv2d(1, 1, 3), torch.randn(1, 1, 4, 4)).plot()


def test_bad_input():
    model, images = czm_init_(network()), torch.randn(4, 3, 7, 7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    foreign = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)

    def log(*_):
        pass

    with pytest.raises(TypeError, match="model must be a torch.nn.Module, but was function"):
        diagnose(log, images)
    with pytest.raises(ValueError, match="must have a convolution"):
        diagnose(nn.Linear(1, 1), images)
    with pytest.raises(ValueError, match="images must reach a convolution"):
        diagnose(_Idle(), images)
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer or None"):
        diagnose(model, images, 0.1)
    with pytest.raises(ValueError, match="holds none of its parameters"):
        diagnose(model, images, foreign)
    with pytest.raises(ValueError, match="holds none of its parameters"):
        watch(model, foreign, images, log=log)
    with pytest.raises(TypeError, match="log must be a function"):
        watch(model, optimizer, images, log=None)
    for every in (0, 1.5):
        with pytest.raises(ValueError, match="every must be a positive whole number"):
            watch(model, optimizer, images, log=log, every=every)


class _Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return x
