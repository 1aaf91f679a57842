"""A training step as one CUDA graph: one launch in the place of some hundreds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Step = Callable[[Tensor], tuple[Tensor, ...]]

# Libraries choose their algorithms, and the optimizer makes its plan, in steps before the capture.
EAGER_STEPS = 3


class CapturedStep:
    """Runs a step on batches of one size by replaying a graph, and on other batches as it is.

    The first `EAGER_STEPS` batches of that size run as they are too; nothing runs twice. What the
    step reads and writes beside its batch must stay where it was.

    Args:
        step: takes the indices of a batch, int64 `(images,)`, and returns tensors.
        size: of the batches that are replayed.
        generators: those the step draws from beside torch's default one; every replay draws anew.
    """

    def __init__(self, step: Step, size: int, generators: Sequence[torch.Generator] = ()) -> None:
        self._step = step
        self._size = size
        self._generators = generators
        self._eager_steps = 0
        self._replay: Callable[[], object] | None = None

    def __call__(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Run the step; the tensors that it returns are the caller's."""
        if len(indices) != self._size:
            return self._step(indices)
        if self._replay is None:
            if self._eager_steps < EAGER_STEPS:
                self._eager_steps += 1
                return self._step(indices)
            self._indices = indices.clone()
            self._replay, self._results = capture(
                lambda: self._step(self._indices), self._generators
            )
        self._indices.copy_(indices)
        self._replay()
        return tuple(result.clone() for result in self._results)


def capture(
    function: Callable[[], tuple[Tensor, ...]], generators: Sequence[torch.Generator]
) -> tuple[Callable[[], object], tuple[Tensor, ...]]:
    """Capture `function` on the current stream, which is not the default one, without running it.

    Args:
        function: of tensors that stay where they are.
        generators: those it draws from beside torch's default one.

    Returns:
        What runs it once more, and the tensors that then hold its results.
    """
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        results = function()
    return graph.replay, results
