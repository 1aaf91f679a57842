"""Several processes, one global batch: the same training as in one."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from quick_runs import assert_same, read_metrics
from torch import nn

from czm_fused.training import Config, checkpoint, data
from czm_fused.training.distributed import Ranks, joined
from czm_fused.training.errors import TrainingError
from czm_fused.training.run import check_options
from czm_fused.training.trainer import Trainer

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PROGRAM = Path(__file__).parent / "float64_training.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# 898 images: the last batch has one, and so none for the first of two processes.
RUN = ["--depth", "8", "--epochs", "1", "--device", "cpu", "--flip", "--noise", "0"]
RUN += ["--batch-size", "69", "--last-batch", "keep"]
RUN += ["--residual-bias", "--center-every", "5"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Train an epoch in one process and in two, at the same time; return the two folders."""
    folder = tmp_path_factory.mktemp("processes")
    # The loopback device is there without a network, too.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

    def train(launcher, name):
        command = [*launcher, str(PROGRAM), *RUN, "--out", str(folder / name)]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=600
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("epoch 1/1") == 1
        return folder / name

    with ThreadPoolExecutor() as pool:
        return list(pool.map(train, ([sys.executable], TORCHRUN), ("one", "two")))


def test_two_processes_train_the_weights_of_one(folders):
    one, two = (checkpoint.load(folder)["trainer"] for folder in folders)
    # The order of sums differs by some eps, 2e-16, of each gradient; an epoch of 14 steps at a
    # rate of 0.4 amplifies that to 4e4 eps, measured in float32.
    for name, weight in one["model"].items():
        assert weight.dtype == torch.float64
        bound = 1e-9 * float(weight.abs().max())
        torch.testing.assert_close(two["model"][name], weight, rtol=0, atol=bound)


def test_two_processes_leave_the_files_and_the_chance_of_one(folders):
    one, two = (checkpoint.load(folder)["trainer"] for folder in folders)
    assert_same(two["generators"]["data"], one["generators"]["data"])
    assert len(two["generators"]["default"]) == 2
    names = [{path.name for path in folder.iterdir()} for folder in folders]
    expected, actual = ({name for name in each if "events" not in name} for each in names)
    assert actual == expected
    (expected,), (actual,) = map(read_metrics, folders)
    for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
        assert actual[name] == pytest.approx(expected[name], rel=1e-9)


@pytest.mark.parametrize(("images", "size"), [(128, 2), (7, 3), (1, 4), (0, 2)])
def test_shares_are_even_and_cover_the_batch(images, size):
    batch = list(range(images))
    shares = [batch[Ranks(rank, size).share(images)] for rank in range(size)]
    assert sum(shares, []) == batch
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_batch_norm_in_several_processes_needs_gpus():
    config = Config(**{"depth": 8, "method": "bn"})
    with pytest.raises(TrainingError, match="--method bn in several processes needs --device cuda"):
        Trainer(config, data.digits(), torch.device("cpu"), Ranks(0, 2))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm3d])
def test_batch_norm_of_any_dimension_needs_gpus(norm):
    with pytest.raises(TrainingError, match="in several processes needs --device cuda"):
        Ranks(0, 2).wrap(nn.Sequential(norm(3)), torch.device("cpu"))


def test_cuda_graph_is_refused_under_torchrun(monkeypatch):
    for name in TORCHRUN_VARIABLES:
        monkeypatch.setenv(name, "0")
    with pytest.raises(TrainingError, match="--cuda-graph is for a single process"):
        check_options(Config(cuda_graph=True), torch.device("cuda", 0))


def test_partial_launch_environment_is_refused(monkeypatch):
    for name in TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with joined(torch.device("cpu")) as ranks:
        assert ranks == Ranks(0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(TrainingError, match="MASTER_ADDR expected.*start them with torchrun"),
        joined(torch.device("cpu")),
    ):
        pass


def test_ranks_draw_noise_of_their_own():
    config = Config(depth=8)
    drawn = []
    for ranks in (Ranks(), Ranks(0, 1), Ranks(1, 1)):
        Trainer(config, data.digits(), torch.device("cpu"), ranks)
        drawn.append(torch.rand(3))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
