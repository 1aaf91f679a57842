"""What the tests of the training share: a quick net's options, and how to look at what it left."""

import io
import json

import numpy as np
import torch
from PIL import Image

from czm_fused.training import checkpoint

QUICK = ["--depth", "8", "--epochs", "4", "--device", "cpu", "--batch-size", "200"]


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, format="png")
    return file.getvalue()


def read_metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_times(records):
    return [
        {key: record[key] for key in record.keys() - {"seconds", "images_per_second"}}
        for record in records
    ]


def assert_same(actual, expected):
    """Assert that two nested structures of tensors and values are equal to the bit."""
    assert type(actual) is type(expected)
    if isinstance(actual, torch.Tensor):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    elif isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        for key in actual:
            assert_same(actual[key], expected[key])
    elif isinstance(actual, (list, tuple)):
        assert len(actual) == len(expected)
        for pair in zip(actual, expected, strict=True):
            assert_same(*pair)
    else:
        assert actual == expected


def trained_state(folder):
    """Return what a run's checkpoint holds but for times, which differ between equal runs."""
    state = checkpoint.load(folder)
    for group in state["trainer"]["optimizer"]["param_groups"]:
        # torch adds this to the defaults of an optimizer that was loaded.
        group.pop("differentiable", None)
    return {"trainer": state["trainer"], "history": without_times(state["history"])}
