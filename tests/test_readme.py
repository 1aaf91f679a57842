"""The code of the README runs as it stands there."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if README.exists() else []


@pytest.mark.skipif(not BLOCKS, reason="the README is not beside the tests")
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block(number):
    if "torchvision" in BLOCKS[number]:
        pytest.importorskip("torchvision")
    exec(compile(BLOCKS[number], f"README.md, block {number}", "exec"), {})
