"""The code of README, docs/ and the READMEs of operators runs when copied alone."""

import doctest
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import czm_fused
from czm_fused.ops.step import reference

ROOT = Path(__file__).parent.parent
PAGES = [
    page
    for page in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted(ROOT.glob("docs/**/*.md")),
        *sorted(ROOT.glob("czm_fused/ops/*/README.md")),
    )
    if page.exists() and "benchmarks" not in page.relative_to(ROOT).parts
]
needs_pages = pytest.mark.skipif(
    not (ROOT / "docs").exists(), reason="README and docs are not beside the tests"
)


class Block(NamedTuple):
    """A fenced block of code.

    Attributes:
        page: the file that has it.
        line: the number of its first line, without the fence, from 1.
        language: the word behind the opening fence.
        code: the text between the fences.
    """

    page: Path
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, match.start(3)) + 1, match[2], textwrap.dedent(match[3]))
        for match in re.finditer(r"^( *)```(\w+)\n(.*?)^\1```", text, re.S | re.M)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def skip_without_modules(code: str) -> None:
    for name in re.findall(r"(?:from|import) (torchvision|matplotlib)\b", code):
        pytest.importorskip(name)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=str)
def test_python_block(block, tmp_path, monkeypatch):
    skip_without_modules(block.code)
    monkeypatch.chdir(tmp_path)
    # Padded, so that a traceback has the page's own line numbers.
    code = compile("\n" * (block.line - 1) + block.code, str(block.page), "exec")
    exec(code, {"__name__": "__main__"})


def plain_network() -> nn.Module:
    """Eight convolutions with BatchNorm and no shortcut, for three channels and ten classes."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (16, 16, 16, 16, 32, 32, 32, 32):
        stride = 2 if width > channels > 3 else 1
        layers += [
            nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


@needs_pages
@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/converting.md"])
def test_conversion_block_learns(page):
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32).div(8).sub(1)
    images = images[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1)
    labels = torch.as_tensor(digits.target)
    code = next(b.code for b in BLOCKS if b.page == ROOT / page and "convert(" in b.code)
    for old, new in (("torch.randn(16, 3, 64, 64)", "batch"), ("resnet18()", "network")):
        assert code.count(old) == 1
        code = code.replace(old, new)
    torch.manual_seed(0)
    names: dict[str, Any] = {"batch": images[:64], "network": plain_network()}
    exec(code.replace("from torchvision.models import resnet18\n", ""), names)
    losses = []
    for _ in range(4):
        for batch in torch.randperm(1536).split(64):
            if len(losses) % 20 == 0:
                names["center_"](names["model"], images[batch])
            names["optimizer"].zero_grad()
            loss = nn.functional.cross_entropy(names["model"](images[batch]), labels[batch])
            loss.backward()
            nn.utils.clip_grad_norm_(names["model"].parameters(), 1.0)
            names["optimizer"].step()
            losses.append(loss.item())
    # Chance is ln(10) = 2.3, where a start with gain=0.8 stays.
    assert sum(losses[-10:]) / 10 < 0.5


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "pycon"], ids=str)
def test_pycon_block(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(
        block.code, {}, str(block), str(block.page), block.line - 1
    )
    assert test.examples
    report: list[str] = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert failed == 0, "".join(report)


@needs_pages
def test_languages_of_blocks():
    # A block without a language, or in another way of writing, would run nowhere.
    for page in PAGES:
        fences = re.findall(r"^ *(?:```+|~~~+)(.*)$", page.read_text(), re.M)
        languages = [block.language for block in blocks_of(page)]
        assert [fence for fence in fences if fence] == languages, page.name
        assert len(fences) == 2 * len(languages), page.name
        assert set(languages) <= {"python", "pycon", "sh", "text", "diff", "cpp"}, page.name


@needs_pages
def test_public_names_have_examples():
    examples: dict[str, str] = {}
    for page in sorted(ROOT.glob("docs/api/*.md")):
        for entry in re.split(r"^::: ", page.read_text(), flags=re.M)[1:]:
            examples[entry.split()[0]] = entry
    reached = "\n".join(entry for entry in examples.values() if ">>> " in entry)
    names = set(czm_fused.__all__) - {"__version__", "functional"}
    assert names == {name for name in names if re.search(rf"^>>> .*\b{name}\b", reached, re.M)}
    assert "czm_fused.functional.add_relu_noise" in examples


@needs_pages
def test_options_of_czm_train_exist():
    command = [sys.executable, "-m", "czm_fused.training"]
    known: set[str] = set()
    for sub in ([], ["table1"], ["tune"], ["figures"]):
        result = subprocess.run(
            [*command, *sub, "--help"],
            capture_output=True,
            text=True,
            env={**os.environ, "COLUMNS": "120"},
        )
        assert result.returncode == 0, result.stderr
        known |= set(re.findall(r"--[a-z][a-z0-9-]*", result.stdout))
    for name in ("training.md", "fidelity.md"):
        # torchrun's own options are before the module's name.
        text = re.sub(r"torchrun .* -m", "", (ROOT / "docs" / name).read_text())
        named = set(re.findall(r"(?<![-\w])--[a-z][a-z0-9-]*", text))
        assert named and named <= known, f"{name}: {sorted(named - known)}"


@needs_pages
def test_navigation_has_every_page():
    navigation = (ROOT / "mkdocs.yml").read_text()
    docs = ROOT / "docs"
    pages = {str(page.relative_to(docs)) for page in PAGES if docs in page.parents}
    assert pages == {page for page in pages if f": {page}\n" in navigation}


@needs_pages
def test_scripts_and_styles_are_files_of_docs():
    settings = (ROOT / "mkdocs.yml").read_text()
    extra = re.findall(r"^  - (\S+\.(?:js|css))$", settings, re.M)
    assert "katex/katex.min.js" in extra and "katex/katex.min.css" in extra
    assert [name for name in extra if not (ROOT / "docs" / name).is_file()] == []
    style = (ROOT / "docs" / "katex" / "katex.min.css").read_text()
    fonts = set(re.findall(r"url\(([^)]*)\)", style))
    assert fonts and all((ROOT / "docs" / "katex" / font).is_file() for font in fonts)


@needs_pages
def test_links_between_files_of_the_repository():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


@needs_pages
def test_readme_fits_its_length():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def median(file: str, **wanted: object) -> float:
    """Return the median of the one row of a committed result file that has these values."""
    lines = (ROOT / "benchmarks" / "results" / "cpu" / file).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    (row,) = [r for r in rows if all({**r, **r["config"]}[k] == v for k, v in wanted.items())]
    return row["p50"]


def accuracy(method: str) -> float:
    """Return the mean test accuracy of two seeds, 12 epochs of CIFAR-10, in percent."""
    runs = ROOT / "benchmarks" / "results" / "cpu" / "cifar10_resnet20"
    records = [(runs / f"{method}-s{seed}" / "metrics.jsonl").read_text() for seed in (0, 1)]
    last = [json.loads(record.splitlines()[-1]) for record in records]
    return sum(record["test_accuracy"] for record in last) / len(last)


@needs_pages
def test_headline_numbers_are_of_committed_files():
    saved = [
        median("batchnorm_cost_resnet110_counts.jsonl", provider=provider, metric="saved_bytes")
        for provider in ("czm_fused_noise", "batchnorm")
    ]
    times = [
        median("batchnorm_cost_resnet110.jsonl", provider=provider, metric="step")
        for provider in ("czm_fused_noise", "batchnorm")
    ]
    step = {"metric": "step", "dtype": "float32"}
    ratios = [
        median(file, **step, model=model, provider="czm_fused", backend="cpu")
        / median(file, **step, model=model, provider="sgd_fused")
        for file in (f"step_throughput{end}.jsonl" for end in ("", "_amd", "_granite_rapids"))
        for model in ("resnet110", "resnet50")
    ]
    apart = [
        median("without_statistics.jsonl", provider=provider, metric="accumulated")
        for provider in ("czm", "bn")
    ]
    rows = [
        f"| {saved[0] / 1e6:.0f} MB | BatchNorm {saved[1] / 1e6:,.0f} MB |",
        f"| {times[0] / 1e6:.2f} s | BatchNorm {times[1] / 1e6:.2f} s |",
        "| {:.2f} and {:.2f} of the time (AMD EPYC: {:.2f} and {:.2f}; "
        "newer Xeon: {:.2f} and {:.2f}) |".format(*ratios),
        f"| {apart[0]:.4%} | BatchNorm {apart[1]:.0%} |".replace("%", " %"),
        f"| {accuracy('czmig-noise'):.1f} % | BatchNorm {accuracy('bn'):.1f} % |",
    ]
    text = (ROOT / "README.md").read_text()
    assert [row for row in rows if row not in text] == []


@pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="no benchmarks beside the tests")
def test_results_that_are_named_are_there():
    results = ROOT / "benchmarks" / "results" / "cpu"
    first_cells = re.findall(r"^\| (.*?) \|", (results / "README.md").read_text(), re.MULTILINE)
    names = {name for cell in first_cells for name in re.findall(r"`([\w./*-]+)`", cell)}
    files = {name.rstrip("/") for name in names if re.search(r"/$|\.\w+$|\.\*$|-s\d$", name)}
    assert len(files) > 30
    places = (ROOT, ROOT / "benchmarks")
    assert [
        name
        for name in sorted(files)
        if not (any(results.rglob(name)) or any((place / name).exists() for place in places))
    ] == []


@needs_pages
def test_readme_is_included_nowhere():
    for page in ROOT.glob("docs/**/*.md"):
        assert not re.search(r'--8<-- "README|include-markdown', page.read_text()), page.name


def test_variant_of_2020_is_the_papers_at_another_rate():
    # docs/fidelity.md. LUMA, as a loss, is part of the gradient that the variant multiplies.
    torch.manual_seed(0)
    z, lr, momentum, luma = 0.9, 0.1, 0.9, 5e-2
    start = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    papers, buffer = start.clone(), torch.zeros_like(start)
    variant = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([variant], lr, momentum)
    for _ in range(20):
        reference.step_(
            papers,
            papers.cos(),
            buffer,
            lr=lr * (1 + z),
            momentum=momentum,
            zmg=z / (1 + z),
            luma=luma,
        )
        norms = variant.flatten(1).norm(dim=1)
        loss = variant.sin().sum() + luma * (norms - 1).square().sum()
        (gradient,) = torch.autograd.grad(loss, variant)
        variant.grad = (1 + z) * gradient - z * gradient.mean(dim=(2, 3), keepdim=True)
        optimizer.step()
    # Twenty steps of ten roundings each, of numbers below 10, which steps do not magnify a lot.
    torch.testing.assert_close(papers, variant.detach(), rtol=1e-12, atol=1e-12)
