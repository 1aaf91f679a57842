"""train(): a network, and DataLoaders or a folder, of the user's own."""

import json

import pytest
import torch
from quick_runs import assert_same
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from czm_fused import czm_init_
from czm_fused.training import Config, DivergedError, TrainingError, checkpoint, train
from czm_fused.training.trainer import Trainer


def network(channels=1, classes=3):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)),
    )
    return czm_init_(model)


def loader(seed, images=60):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (images,), generator=generator)
    pixels = torch.randn(images, 1, 8, 8, generator=generator)
    pixels[:, 0, 2, 2:6] += 4 * (labels - 1)[:, None]
    return DataLoader(TensorDataset(pixels, labels), batch_size=20, shuffle=True)


def config(tmp_path, **given):
    values = {"epochs": 4, "lr": 0.1, "device": "cpu", "out": str(tmp_path / "run")}
    return Config(**{**values, **given})


@pytest.mark.parametrize("method", ["czmig", "plain"])
def test_train_learns_from_dataloaders(tmp_path, method, capsys):
    model = network()
    options = config(tmp_path, method=method, epochs=20)
    result = train(model, (loader(0), loader(1)), options)
    assert result.model is model
    assert result.folder == tmp_path / "run"
    assert len(result.history) == 20
    assert result.test_accuracy == result.history[-1]["test_accuracy"] > 60
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary["test_accuracy"] == result.test_accuracy
    assert {"accuracy.png", "filters.png"} <= {path.name for path in result.folder.iterdir()}
    assert "Sequential" in capsys.readouterr().out


def test_train_resumes_bit_for_bit(tmp_path, monkeypatch):
    whole = train(network(), (loader(0), loader(1)), config(tmp_path, out=str(tmp_path / "whole")))
    save = checkpoint.save
    calls = iter(range(100))

    def interrupted(path, state):
        save(path, state)
        if next(calls) == 2:  # once at the start, then once an epoch
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", interrupted)
        train(network(), (loader(0), loader(1)), config(tmp_path))
    resumed = train(network(), (loader(0), loader(1)), config(tmp_path), resume=True)
    assert len(resumed.history) == 4
    assert_same(resumed.model.state_dict(), whole.model.state_dict())


def test_train_resumes_for_more_epochs_at_the_checkpoints_milestones(tmp_path):
    data = loader(0)
    train(network(), data, config(tmp_path, epochs=2))
    for given, message in (
        ({"milestones": (3,)}, r"--milestones \[1, 2\], not \[3\]"),
        ({"schedule": "cosine"}, "--schedule steps, not cosine"),
    ):
        with pytest.raises(TrainingError, match=message):
            train(network(), data, config(tmp_path, **given), resume=True)
    result = train(network(), data, config(tmp_path, epochs=4), resume=True)
    assert (len(result.history), result.summary["milestones"]) == (4, [1, 2])
    rates = [record["lr"] for record in result.history]
    assert rates == pytest.approx([0.1, 0.01, 0.001, 0.001], rel=1e-12)


def test_train_without_test_images(tmp_path):
    result = train(network(), loader(0), config(tmp_path, epochs=1))
    assert result.test_accuracy is None
    assert "test_accuracy" not in result.history[0]


def test_train_on_an_image_folder(tmp_path, image_tree):
    options = config(tmp_path, epochs=1, cache_dir=str(tmp_path / "cache"))
    result = train(network(channels=3, classes=2), image_tree, options)
    assert 0 <= result.test_accuracy <= 100
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2


def test_train_on_signals_has_no_channels_last(tmp_path):
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    signals = TensorDataset(torch.randn(40, 1, 9), torch.arange(40) % 3)
    options = config(tmp_path, epochs=1, channels_last=True)
    result = train(czm_init_(model), DataLoader(signals, batch_size=20), options)
    assert list(result.history[0]["rejection_db"]) == ["0"]


def test_train_refuses_other_data(tmp_path):
    for data in (3, (loader(0),) * 3):
        with pytest.raises(TrainingError, match="data must be a folder, a DataLoader or a pair"):
            train(network(), data, config(tmp_path))
    with pytest.raises(TrainingError, match="must give pairs of tensors"):
        train(network(), [torch.zeros(3)], config(tmp_path))


def test_train_resumes_loaders_with_generators_of_their_own(tmp_path):
    def own(seed):
        images = loader(seed).dataset
        generator = torch.Generator().manual_seed(7)
        return DataLoader(images, batch_size=20, shuffle=True, generator=generator)

    whole = train(network(), own(0), config(tmp_path, milestones=(), out=str(tmp_path / "whole")))
    train(network(), own(0), config(tmp_path, milestones=(), epochs=2))
    resumed = train(network(), own(0), config(tmp_path, milestones=()), resume=True)
    assert_same(resumed.model.state_dict(), whole.model.state_dict())


def test_train_refuses_fewer_epochs_than_there_were(tmp_path):
    train(network(), loader(0), config(tmp_path, epochs=2))
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with pytest.raises(TrainingError, match="trained for 2 epochs, and --epochs is 1"):
        train(network(), loader(0), config(tmp_path, epochs=1, milestones=(1, 2)), resume=True)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_train_compiles_full_batches_of_a_loader(tmp_path, monkeypatch):
    sizes = []

    def compiled(network, **_):
        return lambda x: (sizes.append(len(x)), network(x))[1]

    monkeypatch.setattr(torch, "compile", compiled)
    train(network(), loader(0, images=50), config(tmp_path, epochs=1, compile=True))
    assert sizes == [20, 20]


def test_train_takes_networks_without_convolutions(tmp_path):
    class Embedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.place, self.head = nn.Parameter(torch.zeros(1, 8, 8)), nn.Linear(64, 3)

        def forward(self, x):
            return self.head((x[:, 0] + self.place).flatten(1))

    result = train(Embedding(), loader(0), config(tmp_path, epochs=1))
    assert "rejection_db" not in result.history[0]


def test_train_says_that_weights_diverged_in_the_last_step(tmp_path):
    images = TensorDataset(torch.randn(9, 1, 8, 8), torch.arange(9) % 3)
    options = config(tmp_path, lr=1e30, head_lr=1e30, epochs=1)
    with pytest.raises(DivergedError, match="the weights became infinite or NaN in epoch 1"):
        train(network(), DataLoader(images, batch_size=9), options)


def test_train_says_how_to_go_on(tmp_path, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"train\(..., resume=True\)"):
        train(network(), loader(0), config(tmp_path))


def test_train_on_a_folder_has_the_defaults_of_photographs(tmp_path, image_tree, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Trainer, "train_epoch", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(network(channels=3, classes=2), image_tree)
    saved = checkpoint.load(tmp_path / "runs" / "sequential")["config"]
    assert (saved["dataset"], saved["flip"], saved["batch_size"]) == ("imagefolder", True, 128)


@pytest.mark.parametrize(
    ("outputs", "labels"), [((6, 3, 8, 8), (6, 8, 8)), ((6, 3), (6, 3))], ids=["pixels", "one-hot"]
)
def test_train_refuses_what_is_no_classification(tmp_path, outputs, labels):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(outputs))

        def forward(self, x):
            return self.logits

    batch = torch.zeros(6, 1, 8, 8), torch.zeros(labels, dtype=torch.long)
    with pytest.raises(TrainingError, match=r"must return logits \(images, classes\)"):
        train(Fixed(), ([batch],), config(tmp_path))


def test_train_refuses_channels_last_for_volumes(tmp_path):
    model = nn.Sequential(nn.Conv3d(1, 3, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    with pytest.raises(TrainingError, match="--channels-last does not fit this network"):
        train(model, loader(0), config(tmp_path, channels_last=True))
