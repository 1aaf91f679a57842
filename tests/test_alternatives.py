"""The comparison of BatchNorm, its alternatives and CZM, on networks and images that are tiny."""

from __future__ import annotations

import pytest
import torch

TINY = [
    "--image-size", "8", "--batches", "2", "--seconds", "0", "--steps", "2", "--batch", "4",
    "--held-out", "4", "--width", "8", "--seeds", "1",
]  # fmt: skip
EAGER = [
    "batchnorm", "groupnorm", "groupnorm_ws", "frn_tlu", "evonorm_s0", "nf_agc", "dynamic_tanh",
    "plain", "czmi", "czmig", "czmig_noise", "czmig_centered", "czmig_normalised",
]  # fmt: skip


@pytest.fixture
def alternatives(benchmark_script):
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    return benchmark_script("alternatives")


@pytest.fixture
def folder(tmp_path):
    """Return a folder of images of two classes, one dark and one bright."""
    image = pytest.importorskip("PIL.Image")
    for part, count in (("train", 8), ("test", 2)):
        for name, grey in (("dark", 10), ("bright", 200)):
            where = tmp_path / part / name
            where.mkdir(parents=True)
            for number in range(count):
                image.new("RGB", (8, 8), (grey, grey, number)).save(where / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize("network", ["resnet20", "depthwise"])
def test_alternatives_measure_every_provider_once(
    benchmark_script, alternatives, folder, tmp_path, capsys, monkeypatch, network
):
    path = tmp_path / "rows.jsonl"
    arguments = ["--network", network, "--provider", *EAGER, *TINY]
    arguments += ["--data-dir", str(folder), "--json", str(path)]
    assert alternatives.main(arguments) == 0
    rows = benchmark_script("common.rows").read(path)
    measured = {row.provider for row in rows}
    assert measured == set(EAGER) - ({"czmig_noise"} if network == "depthwise" else set())
    for provider in measured:
        found = {row.metric for row in rows if row.provider == provider}
        assert found == {
            "saved_bytes", "inference_operators", "step", "inference", "held_out_accuracy",
            "test_accuracy", "accuracy_at_equal_steps", "accuracy_at_equal_time",
        }  # fmt: skip
    count = {(row.provider, row.metric): row.p50 for row in rows}
    assert count["czmig", "saved_bytes"] == count["plain", "saved_bytes"]
    assert count["plain", "saved_bytes"] < 0.55 * count["batchnorm", "saved_bytes"]
    # A folded BatchNorm costs nothing at inference.
    assert count["batchnorm", "inference_operators"] == count["plain", "inference_operators"]
    assert count["groupnorm", "inference_operators"] > count["plain", "inference_operators"]

    # What is there is not measured again; a row that is missing is.
    monkeypatch.setattr(alternatives, "train", None)
    before = path.read_text()
    assert alternatives.main(arguments) == 0
    assert path.read_text() == before
    path.write_text("".join(before.splitlines(keepends=True)[1:]))
    assert alternatives.main(arguments) == 0
    assert sorted(path.read_text().splitlines())[0] == sorted(before.splitlines())[0]
    assert "accuracy_at_equal_steps" in capsys.readouterr().out


def test_training_learns_what_can_be_told_apart(alternatives, folder):
    options = alternatives.AlternativesOptions(
        data_dir=folder, batch=4, held_out=4, width=8, image_size=8
    )
    data = alternatives.load(options)
    assert (len(data.train), len(data.chosen_on), len(data.test)) == (12, 4, 4)
    model = alternatives.train("resnet20", "czmig", data, 0.1, 0, 30, options)
    assert alternatives.accuracy(model, data.test) == 100


def test_larger_images_are_averaged(alternatives, tmp_path):
    image = pytest.importorskip("PIL.Image")
    stripes = image.new("RGB", (4, 4))
    stripes.paste((200, 200, 200), (0, 0, 4, 1))
    stripes.paste((200, 200, 200), (0, 2, 4, 3))
    pictures = {"black": image.new("RGB", (4, 4)), "grey": image.new("RGB", (4, 4), (100,) * 3)}
    for part in ("train", "test"):
        for name, picture in (pictures | {"striped": stripes}).items():
            where = tmp_path / part / name
            where.mkdir(parents=True)
            picture.save(where / "0.png")
    options = alternatives.AlternativesOptions(data_dir=tmp_path, batch=2, held_out=1, image_size=2)
    black, grey, striped = alternatives.load(options).test.pixels
    assert striped.shape == (3, 2, 2)
    assert torch.equal(striped, grey) and not torch.equal(black, grey)


def test_a_diverged_training_has_no_accuracy(alternatives, folder):
    options = alternatives.AlternativesOptions(data_dir=folder, batch=4, held_out=4, width=8)
    data = alternatives.load(options)
    assert alternatives.train("resnet20", "plain", data, 1e30, 0, 5, options) is None
    assert alternatives.accuracy(None, data.test) == 0


def test_adaptive_clipping_spares_the_classifier_alone(alternatives, benchmark_script, monkeypatch):
    normalisers = benchmark_script("common.normalisers")
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = normalisers.build("resnet20", "nf_agc", images, 0, width=8)
    clipped = []
    agc = pytest.importorskip("timm.utils.agc")
    monkeypatch.setattr(agc, "adaptive_clip_grad", lambda ps, clip_factor: clipped.extend(ps))
    optimizer = normalisers.make_optimizer(model, "nf_agc", 0.1)
    labels = torch.tensor([0, 1, 2, 3])
    alternatives.take_step(model, "nf_agc", optimizer, alternatives.Images(images, labels))
    spared = {name for name, p in model.named_parameters() if not any(p is c for c in clipped)}
    assert spared == {"10.2.weight", "10.2.bias"}


def test_dynamic_tanh(benchmark_script):
    layer = benchmark_script("common.normalisers").DynamicTanh(2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([2.0, 3.0]).view(2, 1, 1))
        layer.bias.copy_(torch.tensor([0.0, 1.0]).view(2, 1, 1))
    x = torch.tensor([0.6, -0.4], dtype=torch.float64).view(1, 2, 1, 1)
    expected = torch.tensor([2 * 0.29131261245159090, 1 - 3 * 0.19737532022490401])
    torch.testing.assert_close(layer(x).flatten(), expected.double(), rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--measure accuracy needs --data-dir"),
        (["--data-dir", "/nowhere"], "/nowhere has no folder train"),
        (["--measure", "counts", "--width", "10"], "--width must be a multiple of 4"),
    ],
)
def test_alternatives_refuse_what_cannot_run(alternatives, capsys, arguments, words):
    with pytest.raises(SystemExit):
        alternatives.main(arguments)
    assert words in capsys.readouterr().err
