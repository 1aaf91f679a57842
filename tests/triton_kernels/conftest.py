"""Triton reads TRITON_INTERPRET when it decorates a kernel, so each setting has its own process.

`interpreted` is collected in the process that `test_interpreter.py` starts, and only there.
"""

import sys
from pathlib import Path

from czm_fused.ops.backends import interpreting_triton

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))

collect_ignore = [] if interpreting_triton() else ["interpreted"]
