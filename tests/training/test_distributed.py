"""Several processes, one global batch: the same training as in one."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from quick_runs import assert_same, read_metrics

from czm_fused.functional import draw_noise
from czm_fused.training import checkpoint, data
from czm_fused.training.distributed import Ranks, is_launched
from czm_fused.training.errors import TrainingError
from czm_fused.training.trainer import Trainer, reference_trainer
from czm_fused.training.run import check_options
from czm_fused.training import Config

PROGRAM = Path(__file__).parent / "float64_training.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# 898 images: the last batch has one, and so none for the first of two processes.
RUN = ["--depth", "8", "--epochs", "1", "--device", "cpu", "--flip", "--noise", "0.1"]
RUN += ["--batch-size", "69", "--last-batch", "keep"]


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
    assert_same(two["generators"], one["generators"])
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


def test_noise_of_the_shares_is_that_of_the_batch():
    def draw(ranks):
        torch.manual_seed(0)
        with ranks.draws_for(7):
            noise = draw_noise(torch.empty(7, 5, 2, 2)[ranks.share(7)], 0.3)
        return noise, torch.get_rng_state()

    expected, state = draw(Ranks())
    drawn = [draw(Ranks(rank, 3)) for rank in range(3)]
    assert torch.equal(torch.cat([noise for noise, _ in drawn]), expected)
    assert all(torch.equal(each, state) for _, each in drawn)


def test_batch_norm_in_several_processes_needs_gpus():
    config = Config(**{"depth": 8, "method": "bn"}).resolve()
    with pytest.raises(ValueError, match="--method bn in several processes needs --device cuda"):
        reference_trainer(config, data.digits(), torch.device("cpu"), Ranks(0, 2))


def test_options_of_a_single_process_are_refused_under_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(TrainingError, match="--parallel-seeds is for a single process"):
        check_options(resolve({"device": "cpu"}), torch.device("cpu"), runs=2)
    with pytest.raises(TrainingError, match="--cuda-graph is for a single process"):
        check_options(resolve({"cuda_graph": True}), torch.device("cuda", 0), runs=1)
