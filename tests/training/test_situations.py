"""Situations that other people's machines, folders and files have brought."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from quick_runs import QUICK

from czm_fused.training import TrainingError, checkpoint, data, metrics
from czm_fused.training.run import pick_device

PROGRAM = [sys.executable, "-m", "czm_fused.training", *QUICK, "--epochs", "1"]


@pytest.mark.parametrize("options", [[], ["--overwrite"], ["--resume"]])
def test_folder_of_the_users_files_is_left_alone(train, tmp_path, options):
    folder = tmp_path / "mine"
    folder.mkdir()
    files = ("events.mine", "summary.json", "metrics.jsonl")
    for name in files:
        (folder / name).write_text("mine")
    status, _, err = train(*options, out=folder)
    assert status == 2 and err.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == sorted(files)
    assert all((folder / name).read_text() == "mine" for name in files)


def test_overwrite_removes_only_the_files_of_the_run(train, tmp_path):
    assert train("--epochs", "1")[0] == 0
    mine = [tmp_path / "run" / name for name in ("events.out.tfevents.mine", "notes.txt")]
    for path in mine:
        path.write_text("mine")
    assert train("--epochs", "1", "--overwrite")[0] == 0
    assert [path.read_text() for path in mine] == ["mine"] * 2
    assert len(list((tmp_path / "run").glob("events.*"))) == 2


def test_folder_in_which_another_process_trains_is_refused(train, tmp_path):
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / "run.lock"):
        status, _, err = train()
    assert status == 2 and "another process trains in" in err


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9, 0.9999])
def test_flipped_bit_in_a_checkpoint_is_refused(tmp_path, place):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"weights": torch.arange(1000.0)})
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)
    with pytest.raises(TrainingError, match="damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("name", "value"), [("model", 3), ("optimizer", []), ("epoch", "x")]
)
def test_checkpoint_of_wrong_types_is_one_line(train, tmp_path, name, value):
    assert train("--epochs", "1")[0] == 0
    state = checkpoint.load(tmp_path / "run")
    state["trainer"][name] = value
    checkpoint.save(tmp_path / "run" / "checkpoint.pt", state)
    status, _, err = train("--resume", quick=[])
    assert status == 2 and err.count("\n") == 1 and "damaged" in err


def test_sixteen_bit_images_are_scaled(image_tree):
    values = (np.arange(30).reshape(5, 6) * 2000).astype(np.uint16)
    Image.fromarray(values).save(image_tree / "train" / "cat" / "0.png")
    pixels = data.image_folder(image_tree).train.pixels[0]
    assert np.array_equal(pixels[0].numpy(), values >> 8)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_images_without_a_range_are_refused(image_tree, dtype):
    Image.fromarray(np.zeros((5, 6), dtype)).save(image_tree / "train" / "cat" / "0.tif")
    with pytest.raises(TrainingError, match="0.tif .its pixels .mode [IF]. have no fixed range"):
        data.image_folder(image_tree)


def test_pipes_and_looping_links_do_not_hang(image_tree):
    (image_tree / "train" / "cat" / "again").symlink_to(image_tree / "train" / "cat")
    assert len(data.image_folder(image_tree).train) == 6
    os.mkfifo(image_tree / "train" / "cat" / "pipe.png")
    with pytest.raises(TrainingError, match="pipe.png must be a file"):
        data.image_folder(image_tree)


def test_val_stands_for_test(image_tree):
    (image_tree / "test").rename(image_tree / "val")
    assert len(data.image_folder(image_tree).test) == 4
    with pytest.raises(TrainingError, match=f"give {image_tree}$"):
        data.image_folder(image_tree / "train")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("name", ["mps", "gpu"])
def test_missing_device_names_the_remedy(name):
    with pytest.raises(TrainingError, match=f"--device {name} is not .*use --device cpu, or auto"):
        pick_device(name)


def test_long_name_is_one_line(train, tmp_path):
    status, _, err = train(out=tmp_path / ("a" * 300))
    assert status == 2 and err.count("\n") == 1


@pytest.mark.parametrize(
    "setting", [{"MPLBACKEND": "module://nowhere"}, {"PYTHONIOENCODING": "ascii"}]
)
def test_environment_loses_no_training(tmp_path, setting):
    out = tmp_path / "run"
    result = subprocess.run(
        [*PROGRAM, "--out", str(out)], env={**os.environ, **setting}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert (out / "accuracy.png").exists()


def test_reader_that_leaves_is_a_quiet_end(tmp_path):
    process = subprocess.Popen(
        [*PROGRAM, "--out", str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=600) == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_output_is_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [*PROGRAM, "--out", str(tmp_path / "run")], stdout=full, stderr=subprocess.PIPE
        )
    assert result.returncode == 2
    assert result.stderr.count(b"\n") == 1


def test_epoch_line_fits_a_terminal():
    record = {"epoch": 200, "lr": 0.00123456, "images_per_second": 123456.7}
    for part in ("train", "test"):
        record.update({f"{part}_loss": 0.000123456, f"{part}_accuracy": 100.0})
    assert len(metrics.describe(record, 200)) < 80


def test_config_file_sets_options_and_the_command_line_overrides(tmp_path, train):
    file = tmp_path / "options.yaml"
    file.write_text("lr: 0.2\nmethod: bn\nmilestones: [1]\n")
    assert train("--config", file, "--lr", "0.3", "--epochs", "1")[0] == 0
    saved = checkpoint.load(tmp_path / "run")["config"]
    assert (saved["lr"], saved["method"], saved["milestones"]) == (0.3, "bn", [1])
    assert saved["weight_decay"] == 5e-4
    # YAML reads this as False.
    file.write_text("autocast: off\nflip: off\n")
    assert train("--config", file, "--epochs", "1", out=tmp_path / "off")[0] == 0
    saved = checkpoint.load(tmp_path / "off")["config"]
    assert (saved["autocast"], saved["flip"]) == ("off", False)
    for text in ("learning: 3", "- 1", "lr: fast", "lr: [", "resume: run", "config: other.yaml"):
        file.write_text(text)
        status, _, err = train("--config", file, out=tmp_path / "other")
        assert status == 2 and err.count("\n") == 1
        assert not (tmp_path / "other").exists()


