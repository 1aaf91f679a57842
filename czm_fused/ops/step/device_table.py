"""Integers that kernels read from device memory, sent again only when they have changed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# A replay of a CUDA graph reads the tables that it was captured with, and nothing tells when the
# graph is gone.
_CAPTURED: list[tuple[Tensor, ...]] = []


class DeviceTable:
    """A table of int64 on a device, for one plan.

    A table that was sent is never written again, so a kernel that still reads it is not disturbed.

    Args:
        size: the number of integers.
        device: where kernels read them.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._size = size
        self._device = device
        self._last: tuple[bytes, int, Tensor] | None = None
        # Pinned memory cannot be allocated during a capture.
        self._reserved: Tensor | None = self._pinned()

    def send(self, words: np.ndarray) -> Tensor:
        """Return a tensor on the device that holds `words` when this stream reads it."""
        data = words.tobytes()
        stream = self._stream()
        is_capturing = self._is_capturing()
        if self._last is not None and self._last[:2] == (data, stream):
            tensor = self._last[2]
            if is_capturing:
                _CAPTURED.append((tensor,))
            return tensor
        host = self._pinned() if self._reserved is None or not is_capturing else self._reserved
        host.numpy()[:] = words.ravel()
        tensor = host.to(self._device, non_blocking=True)
        if is_capturing:
            # The copy runs with each replay, not before, so no eager step may use this table.
            self._reserved = None
            _CAPTURED.append((host, tensor))
        else:
            self._last = (data, stream, tensor)
        return tensor

    def _pinned(self) -> Tensor:
        is_pinned = self._device.type != "cpu"
        return torch.empty(self._size, dtype=torch.int64, device="cpu", pin_memory=is_pinned)

    def _stream(self) -> int:
        if self._device.type == "cpu":
            return 0
        return torch.accelerator.current_stream(self._device).stream_id

    def _is_capturing(self) -> bool:
        if self._device.type != "cuda":
            return False
        with torch.cuda.device(self._device):
            return torch.cuda.is_current_stream_capturing()
