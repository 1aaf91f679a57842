"""The code of the README and of docs/ runs as it stands there, and the options in it exist."""

import re
from pathlib import Path

import pytest
import torch

import czm_fused
from czm_fused.ops.step import reference

ROOT = Path(__file__).parent.parent
PAGES = [page for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))) if page.exists()]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.S | re.M)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text())]

needs_pages = pytest.mark.skipif(not PAGES, reason="README and docs are not beside the tests")


@needs_pages
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_blocks(page, tmp_path, monkeypatch):
    text = page.read_text()
    if "torchvision" in text:
        pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    # A page is read from top to bottom: its blocks share their names.
    names: dict = {}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start()) + 1
        # Padded, so that a traceback has the page's own line numbers.
        exec(compile("\n" * line + block[1], str(page), "exec"), names)


@needs_pages
def test_options_of_czm_train_exist(capsys):
    from czm_fused.training.__main__ import COMMANDS, main

    known = set()
    for command in ([], *([name] for name in COMMANDS)):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        known |= set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))
    for page in PAGES:
        if page.name not in ("training.md", "fidelity.md"):
            continue
        # torchrun's own options stand before the module's name.
        text = re.sub(r"torchrun .* -m", "", page.read_text())
        named = set(re.findall(r"(?<![-\w])--[a-z][a-z0-9-]*", text))
        assert named and named <= known, f"{page.name}: {sorted(named - known)}"


@needs_pages
def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        assert page.name == "README.md" or f": {page.name}\n" in navigation, page.name


@needs_pages
def test_every_public_name_is_in_the_reference():
    text = (ROOT / "docs" / "api.md").read_text()
    missing = [name for name in czm_fused.__all__ if not re.search(rf"\b{name}\b", text)]
    assert missing == ["__version__"]


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
