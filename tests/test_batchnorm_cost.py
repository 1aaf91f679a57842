"""Short runs of the benchmark of a training, on a small network in the place of ResNet20."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

SIZE = 16
SMALL = ["--model", "resnet20", "--batch", "2", "--image-size", str(SIZE)]
EAGER = {
    "batchnorm", "batchnorm_fused_tail", "groupnorm",
    "czm_plain", "czm_naive_noise", "czm_fused_noise", "floor",
}  # fmt: skip


@pytest.fixture
def networks(benchmark_script, monkeypatch):
    """The networks of the benchmark, whose resnet20 has three units, one in each stage."""
    networks = benchmark_script("common.networks")
    small = networks.Network(SIZE, 2, 10, networks._cifar(8))
    monkeypatch.setitem(networks.NETWORKS, "resnet20", small)
    return networks


@pytest.fixture
def batchnorm_cost(benchmark_script, networks):
    return benchmark_script("batchnorm_cost")


@pytest.fixture
def values_of(benchmark_script):
    """Return what reads the medians of a file, by method and metric."""

    def read(path):
        rows = benchmark_script("common.rows").read(path)
        assert all(row.p50 > 0 for row in rows)
        return {(row.provider, row.metric): row.p50 for row in rows}

    return read


def floor(units):
    """Return the stem's output, two activations in each unit, and what the classifier takes."""
    return 4 * 2 * (16 * SIZE**2 * (1 + 2 * units + units + units / 2) + 64)


def test_batchnorm_cost_writes_rows_and_plots(batchnorm_cost, values_of, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    rows_file, chart = tmp_path / "rows.jsonl", tmp_path / "chart.png"
    output = ["--json", str(rows_file), "--plot", str(chart)]
    assert batchnorm_cost.main([*SMALL, "--seconds", "1e-6", *output]) == 0

    values = values_of(rows_file)
    sent = {"collectives", "collective_bytes"}
    metrics = sent | {
        "saved_bytes", "floor_bytes", "peak_bytes", "operators",
        "forward", "backward", "optimizer", "step", "inference",
    }  # fmt: skip
    everything = {(method, metric) for method in EAGER for metric in metrics}
    assert values.keys() == everything | {("sync_batchnorm", metric) for metric in sent}
    assert values["floor", "floor_bytes"] == values["floor", "saved_bytes"] == floor(1)
    assert values["czm_plain", "saved_bytes"] == floor(1)
    # u before each of the units; naive noise keeps their inputs twice.
    noise = 4 * 2 * (16 + 16 + 32)
    inputs = 4 * 2 * (16 * SIZE**2 * (1 + 1 + 1 / 2))
    assert values["czm_fused_noise", "saved_bytes"] == floor(1) + noise
    assert values["czm_naive_noise", "saved_bytes"] == floor(1) + noise + inputs
    assert values["czm_fused_noise", "operators"] < values["czm_naive_noise", "operators"]
    assert values["batchnorm_fused_tail", "operators"] < values["batchnorm", "operators"]
    assert values["batchnorm", "saved_bytes"] > 1.9 * values["czm_fused_noise", "saved_bytes"]
    assert "czm_fused_noise" in capsys.readouterr().out
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_collectives_of_a_step(benchmark_script, networks):
    parallel = benchmark_script("common.collectives")
    images = torch.zeros(2, 3, SIZE, SIZE)
    plain, with_norm = (
        networks.build("resnet20", method, SIZE) for method in ("czm_plain", "batchnorm")
    )
    # One bucket: 300 kB of gradients.
    nbytes = sum(p.nbytes for p in plain.parameters())
    assert parallel.collectives(plain, images) == (1, nbytes)
    # Running means, variances and numbers of batches: float32 and int64 cannot share a broadcast.
    nbytes = sum(p.nbytes for p in (*with_norm.parameters(), *with_norm.buffers()))
    assert parallel.collectives(with_norm, images) == (3, nbytes)
    channels = [16, 16, 16, 32, 32, 64, 64]
    assert parallel.synchronised_statistics(with_norm) == (
        14, sum(4 * (2 * each + 1) + 4 * 2 * each for each in channels),
    )  # fmt: skip


def test_peak_bytes_where_everything_is_allocated(benchmark_script, batchnorm_cost):
    options = batchnorm_cost.CostOptions(batch=64)
    training = batchnorm_cost.Training("resnet20", "floor", options)
    training.step()
    peak = benchmark_script("common.counting").peak_bytes(training.step, training.device)
    gradients = sum(p.nbytes for p in training.model.parameters())
    # At the end of the forward pass, all that backward needs is there, and no gradient yet.
    saved = 32 * floor(1)
    activation = 4 * 64 * 16 * SIZE**2
    assert saved < peak < saved + gradients + 4 * activation


def test_batchnorm_cost_under_autocast_and_channels_last(
    benchmark_script, batchnorm_cost, values_of, tmp_path
):
    rows_file = tmp_path / "rows.jsonl"
    options = ["--autocast", "bfloat16", "--channels-last", "--seconds", "0"]
    methods = ["--method", "batchnorm", "czm_naive_noise", "czm_fused_noise"]
    assert batchnorm_cost.main([*SMALL, *options, *methods, "--json", str(rows_file)]) == 0
    rows = benchmark_script("common.rows").read(rows_file)
    assert {row.config["dtype"] for row in rows} == {"bfloat16"}
    values = values_of(rows_file)
    assert (
        values["czm_fused_noise", "saved_bytes"] < 1.02 * values["czm_fused_noise", "floor_bytes"]
    )


def test_batchnorm_cost_compiled_keeps_no_more(batchnorm_cost, values_of, tmp_path):
    rows_file = tmp_path / "rows.jsonl"
    # Inductor's partition of forward and backward, without its kernels.
    options = ["--compile", "aot_eager_decomp_partition", "--seconds", "0"]
    methods = ["--method", "czm_fused_noise", "czm_compiled"]
    assert batchnorm_cost.main([*SMALL, *options, *methods, "--json", str(rows_file)]) == 0
    values = values_of(rows_file)
    assert values["czm_compiled", "saved_bytes"] <= values["czm_fused_noise", "saved_bytes"]


def test_batchnorm_cost_stops_at_a_method_that_computes_something_else(
    batchnorm_cost, networks, tmp_path, capsys, monkeypatch
):
    wrong = networks.Method("czm", noise=False, fused=True, same_as="czm_naive_noise")
    monkeypatch.setitem(networks.METHODS, "czm_fused_noise", wrong)
    rows_file = tmp_path / "rows.jsonl"
    arguments = [*SMALL, "--seconds", "0", "--json", str(rows_file)]
    assert batchnorm_cost.main([*arguments, "--method", "czm_fused_noise"]) == 1
    assert "is not czm_naive_noise by another name in its" in capsys.readouterr().err
    assert not rows_file.exists()


@pytest.mark.skipif(importlib.util.find_spec("inplace_abn") is not None, reason="it is installed")
def test_batchnorm_cost_says_what_inplace_abn_needs(batchnorm_cost, capsys):
    assert batchnorm_cost.main([*SMALL, "--method", "inplace_abn"]) == 1
    assert "pip install inplace-abn" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["resnet20", "resnet50", "vgg16"])
def test_inplace_abn_takes_the_place_of_every_batch_norm(networks, monkeypatch, model):
    if model != "resnet20":
        pytest.importorskip("torchvision")

    class InPlaceABN(nn.BatchNorm2d):
        def __init__(self, num_features, activation, activation_param):
            super().__init__(num_features)
            self.slope = {"leaky_relu": activation_param, "identity": 1.0}[activation]

        def forward(self, x):
            return F.leaky_relu(super().forward(x), self.slope)

    # A stand-in: the package needs a GPU's compiler.
    stub = types.ModuleType("inplace_abn")
    stub.InPlaceABN = InPlaceABN
    monkeypatch.setitem(sys.modules, "inplace_abn", stub)
    network = networks.build(model, "inplace_abn", 32)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(isinstance(module, InPlaceABN) for module in norms)
    # vgg16's linear layers keep their ReLUs; elsewhere a ReLU could not be inverted.
    convolutions = network.features if model == "vgg16" else network
    monkeypatch.setattr(F, "relu", None)
    convolutions(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad.isfinite().all() for p in convolutions.parameters())


def test_batchnorm_cost_refuses_what_needs_a_gpu(batchnorm_cost, capsys):
    with pytest.raises(SystemExit):
        batchnorm_cost.main([*SMALL, "--memory", "1"])
    assert "--memory needs --device cuda" in capsys.readouterr().err
