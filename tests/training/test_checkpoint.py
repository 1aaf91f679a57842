import errno
import os

import pytest
import torch

from czm_fused.training import checkpoint
from czm_fused.training.errors import TrainingError


def test_save_then_load_returns_the_state(tmp_path):
    state = {"weights": torch.arange(3.0), "names": ["a"], "count": 2}
    checkpoint.save(tmp_path / "checkpoint.pt", state)
    for place in (tmp_path, tmp_path / "checkpoint.pt"):
        loaded = checkpoint.load(place)
        assert torch.equal(loaded["weights"], state["weights"])
        assert (loaded["names"], loaded["count"]) == (["a"], 2)
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch, failure):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"epoch": 1})

    def fail(_):
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((OSError, KeyboardInterrupt)) as caught:
        checkpoint.save(path, {"epoch": 2})
    if isinstance(failure, OSError):
        assert "No space left" in str(caught.value)
    assert checkpoint.load(path)["epoch"] == 1
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_load_refuses_a_missing_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match="no checkpoint at .*without --resume"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_load_refuses_a_truncated_checkpoint(tmp_path, kept):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"weights": torch.zeros(1000)})
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(TrainingError, match="truncated or damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize("other", [{"model": {}}, [1], torch.zeros(2)])
def test_load_refuses_other_files(tmp_path, other):
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(TrainingError, match="not a checkpoint"):
        checkpoint.load(tmp_path / "other.pt")


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload-ran",)


def test_load_runs_no_code_from_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.save(tmp_path / "evil.pt", {"payload": Payload()})
    with pytest.raises(TrainingError):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "payload-ran").exists()
