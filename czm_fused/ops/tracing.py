"""When an operator with a gradient is better left to plain torch."""

from __future__ import annotations

import torch

from czm_fused.ops.backends import choose


def runs_plain_torch(device: torch.device) -> bool:
    """Whether to state an operator in plain torch here rather than call it.

    True while torch.compile or torch.export traces (Inductor fuses plain torch with its
    neighbours), under torch.func's transforms (which know plain torch alone), and for the
    reference backend.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or choose(device) == "reference"
    )
