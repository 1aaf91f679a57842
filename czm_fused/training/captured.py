"""A training step as one CUDA graph: one launch in the place of some hundreds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Step = Callable[[Tensor], Tensor]

# Libraries choose their algorithms, and the optimizer makes its plan, in steps before the capture.
EAGER_STEPS = 3


class CapturedStep:
    """Runs a step on batches of one size by replaying a graph, and on other batches as it is.

    The first `EAGER_STEPS` batches of that size run as they are too; nothing runs twice. What the
    step reads and writes beside its batch, the indices of images, must keep its address. Every
    replay draws anew from torch's default generator and from `generators`.
    """

    def __init__(self, step: Step, size: int, generators: Sequence[torch.Generator] = ()) -> None:
        self._step, self._size, self._generators = step, size, generators
        self._eager_steps = 0
        self._replay: Callable[[], object] | None = None

    def __call__(self, indices: Tensor) -> Tensor:
        """Run the step; the tensor that it returns is the caller's."""
        if len(indices) != self._size:
            return self._step(indices)
        if self._replay is None:
            if self._eager_steps < EAGER_STEPS:
                self._eager_steps += 1
                return self._step(indices)
            self._indices = indices.clone()
            self._replay, self._result = capture(
                lambda: self._step(self._indices), self._generators
            )
        self._indices.copy_(indices)
        self._replay()
        return self._result.clone()


def capture(
    function: Callable[[], Tensor], generators: Sequence[torch.Generator]
) -> tuple[Callable[[], object], Tensor]:
    """Capture `function` on the current stream; return what replays it, and its result."""
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        result = function()
    return graph.replay, result
