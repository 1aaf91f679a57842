"""python -m czm_fused.migrate: its diffs, what it refuses, and the example that it made."""

from __future__ import annotations

import difflib
import importlib.util
import textwrap
from pathlib import Path

import pytest
import torch

from czm_fused import FusedCZMSGD
from czm_fused.migrate import IMPORT, MigrationError, main, migrate

EXAMPLES = Path(__file__).parent.parent / "examples"
needs_examples = pytest.mark.skipif(not EXAMPLES.exists(), reason="no examples beside the tests")

SCRIPT = """\
import torch
from torchvision.models import resnet18

model = resnet18()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
"""
MIGRATED = f"""\
import torch
from torchvision.models import resnet18
{IMPORT}

model = resnet18()
convert(model)
optimizer = FusedCZMSGD(czm_param_groups(model), lr=0.1, momentum=0.9)
"""


def changed_lines(before: str, after: str) -> int:
    lines = difflib.ndiff(before.splitlines(), after.splitlines())
    return sum(line.startswith(("+ ", "- ")) for line in lines)


def inserted(source: str, **options) -> list[str]:
    """Return the lines that `migrate` adds, with their indentation."""
    source = textwrap.dedent(source)
    lines = difflib.ndiff(source.splitlines(), migrate(source, **options).splitlines())
    return [line[2:] for line in lines if line.startswith("+ ")]


def test_migrate_a_script():
    assert migrate(SCRIPT) == MIGRATED


@needs_examples
def test_example_is_migrated_in_ten_lines():
    before, after = ((EXAMPLES / f"imagenet_{n}.py").read_text() for n in ("bn", "czm"))
    assert after == migrate(before)
    assert changed_lines(before, after) <= 10


@needs_examples
@pytest.mark.parametrize("name", ["imagenet_bn", "imagenet_czm"])
def test_example_trains_and_goes_on(name, tmp_path, capsys):
    pytest.importorskip("torchvision")
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    def run(*options):
        torch.manual_seed(0)
        small = ["--fake-images", "6", "--batch-size", "4", "--crop-size", "32", "--lr", "0.01"]
        arguments = [*small, "--device", "cpu", "--output-dir", str(tmp_path), *options]
        return example.main(example.get_args_parser().parse_args(arguments))

    # What a user of SGD takes for granted: averaged weights, clipping, a checkpoint to go on from.
    run("--epochs", "1", "--model-ema", "--clip-grad-norm", "1")
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    has_batch_norm = any("running_mean" in key for key in checkpoint["model"])
    assert has_batch_norm == (name == "imagenet_bn")
    assert len(checkpoint["optimizer"]["param_groups"]) == (1 if has_batch_norm else 4)
    assert 0 <= run("--epochs", "2", "--resume", str(tmp_path / "checkpoint.pth")) <= 1
    assert "nan" not in capsys.readouterr().out


def test_migrated_script_makes_a_czm_optimizer():
    pytest.importorskip("torchvision")
    names: dict = {}
    exec(compile(migrate(SCRIPT), "script", "exec"), names)
    assert isinstance(names["optimizer"], FusedCZMSGD)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in names["model"].modules())


@pytest.mark.parametrize(
    ("statement", "call", "became"),
    [
        ("import torch.optim as o", "o.SGD({})", "FusedCZMSGD({})"),
        ("from torch import optim", "optim.SGD({})", "FusedCZMSGD({})"),
        ("from torch.optim import SGD", "SGD({})", "FusedCZMSGD({})"),
        ("from torch.optim import SGD as S", "S({})", "FusedCZMSGD({})"),
        ("import torch as t", "t.optim.SGD({})", "FusedCZMSGD({})"),
    ],
)
def test_every_import_of_sgd(statement, call, became):
    source = f"{statement}\nmodel = build()\nopt = {call.format('model.parameters(), 0.1')}\n"
    assert inserted(source) == [
        IMPORT,
        "convert(model)",
        f"opt = {became.format('czm_param_groups(model), 0.1')}",
    ]


@pytest.mark.parametrize(
    ("arguments", "became"),
    [
        ("params=net.parameters(), lr=x", "params=czm_param_groups(net), lr=x"),
        ("net.parameters(), 1, 0.9, 0, 5e-4", "czm_param_groups(net), 1, 0.9, 0, 0.0"),
        ("net.parameters(), weight_decay=1e-4, lr=1", "czm_param_groups(net), lr=1"),
        ("net.parameters(), lr=f(1, 2), weight_decay=g(3, 4)", "czm_param_groups(net), lr=f(1, 2)"),
        ("net.parameters(), foreach=None", "czm_param_groups(net), foreach=None"),
        ("net.parameters(), fused=True", "czm_param_groups(net), fused=True"),
        ("net.parameters(), weight_decay=1e-4,", "czm_param_groups(net), "),
        ("filter(lambda p: p.requires_grad, net.parameters()), 1", "czm_param_groups(net), 1"),
    ],
)  # fmt: skip
def test_every_way_to_write_the_arguments(arguments, became):
    source = f"from torch import optim\nnet = build()\nopt = optim.SGD({arguments})\n"
    assert inserted(source)[2] == f"opt = FusedCZMSGD({became})"


def test_everything_else_stays_as_it_is():
    source = SCRIPT.replace("18()", "18()  # größer wäre schöner").replace("\n", "\r\n")
    source += "weights = 'ß' ; x = 1\r\n\r\n\r\n# no newline at the end"
    after = migrate(source)
    assert after.count("\r\n") == after.count("\n")
    assert after.replace("\r\n", "\n").startswith(
        MIGRATED.replace("18()", "18()  # größer wäre schöner")
    )
    assert after.endswith("weights = 'ß' ; x = 1\r\n\r\n\r\n# no newline at the end")
    assert migrate("import torch\nm = f()\nx = torch.optim.SGD(m.parameters())").endswith(
        "x = FusedCZMSGD(czm_param_groups(m))"
    )


def test_convert_follows_whatever_makes_the_model():
    source = """
        import torch
        def main(args):
            if args.big:
                model = big()
            else:
                model = small()
            model = model.cuda()
            model = torch.nn.parallel.DistributedDataParallel(model)
            with torch.no_grad():
                pass
            def helper():
                model = other()
            optimizer = torch.optim.SGD(model.parameters(), lr=1)
    """
    assert inserted(source)[:2] == [IMPORT, "    convert(model)"]
    lines = migrate(textwrap.dedent(source)).splitlines()
    assert lines[lines.index("    convert(model)") - 1].strip() == "model = small()"
    nested = """
        import torch
        if __name__ == "__main__":
            with torch.device("cuda"):
                model = build()
            optimizer = torch.optim.SGD(model.parameters(), lr=1)
    """
    assert inserted(nested)[1] == "        convert(model)"


def test_groups_by_another_name():
    source = """
        import torch
        def main(args):
            model = torchvision.models.get_model(args.model, weights=args.weights)
            parameters = utils.set_weight_decay(model, args.weight_decay)
            optimizer = torch.optim.SGD(
                parameters,
                lr=args.lr,
                weight_decay=args.weight_decay,
                nesterov=True,
            )
    """
    with pytest.raises(MigrationError, match="line 7: .* name the network with --model"):
        inserted(source)
    with pytest.raises(MigrationError, match="line 4: .*--from-pretrained to keep them"):
        inserted(source, model="model")
    kept = inserted(source, model="model", from_pretrained=True)
    assert kept == [
        IMPORT,
        "    convert(model, from_pretrained=True)",
        "    optimizer = FusedCZMSGD(",
        "        czm_param_groups(model),",
    ]
    assert inserted(source, model="model", from_pretrained=False)[1] == "    convert(model)"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(:", "line 1: not Python"),
        ("import torch\n", "once, but has none"),
        (SCRIPT + SCRIPT, "once, but has 2, on lines 5, 10"),
        (SCRIPT.replace("lr=0.1", "**options"), r"without \* and \*\*"),
        (SCRIPT.replace("lr=0.1", "foreach=True"), "does not take foreach=True; remove it"),
        (SCRIPT.replace("lr=0.1", "fused=args.fused"), "does not take fused=args.fused"),
        (SCRIPT.replace("model.parameters(), ", ""), "called without parameters"),
        (SCRIPT.replace("model.parameters()", "[*a.parameters(), *b.parameters()]"), "of a, b;"),
        (SCRIPT.replace("model.parameters()", "[{'params': model.parameters()}]"), "groups"),
        (SCRIPT.replace("model.parameters()", "net.parameters()"), "makes no net"),
        (SCRIPT.replace("model = resnet18()", "model = net = net18"), "is net18 by another name"),
        (SCRIPT.replace("resnet18()", "DataParallel(resnet18())"), "wrapped in DataParallel"),
        (SCRIPT.replace("resnet18()", "resnet18(pretrained=True)"), "pretrained=True"),
        (SCRIPT.replace("resnet18()\n", "resnet18(); x = 1\n"), "several statements on a line"),
        (SCRIPT.replace("model = r", "if x: model = r"), "several statements on a line"),
        (SCRIPT.replace("model = r", "for _ in x:\n  model = r"), "made in a loop"),
        (
            "import torch\nif x:\n  m = f()\nelse:\n  m = g()\n  torch.optim.SGD(m.parameters())",
            "line 6: the optimizer is made among several m",
        ),
        (SCRIPT + "model = resnet18()\n", "line 6: model is made after its optimizer"),
        (SCRIPT + "def convert(): pass\n", "line 6: convert is a name of the script's own"),
        (MIGRATED.replace("FusedCZMSGD(", "torch.optim.SGD("), "imports czm_fused already"),
    ],
)
def test_refusals(source, message):
    with pytest.raises(MigrationError, match=message):
        migrate(source)


def test_command_line(tmp_path, capsys):
    script = tmp_path / "train.py"
    script.write_bytes(SCRIPT.encode())
    script.chmod(0o755)
    assert main([str(script)]) == 0
    out, err = capsys.readouterr()
    assert "+convert(model)" in out and "tune lr" in err
    assert script.read_text() == SCRIPT
    assert main([str(script), "--write"]) == 0
    assert script.read_text() == MIGRATED and script.stat().st_mode & 0o777 == 0o755
    capsys.readouterr()
    assert main([str(script)]) == 2
    assert "imports czm_fused already" in capsys.readouterr().err
    assert script.read_text() == MIGRATED
    assert main([str(tmp_path / "none.py")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]


def test_comments_among_arguments_are_not_lost():
    arguments = "model.parameters(),  # first, of all\n    weight_decay=1e-4"
    source = f"from torch import optim\nmodel = build()\nopt = optim.SGD({arguments})\n"
    with pytest.raises(MigrationError, match="line 3: comments stand among"):
        migrate(source)
