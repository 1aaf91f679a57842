"""Integers that kernels read from device memory, sent again only when they have changed."""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from czm_fused.ops import backends

# A replay of a CUDA graph reads and writes the memory that it was captured with, and nothing tells
# when the graph is gone.
_KEPT_FOR_REPLAYS: list[object] = []


def keep_for_replays(*objects: object) -> None:
    """Keep what a captured kernel reads or writes for as long as the process lives."""
    _KEPT_FOR_REPLAYS.append(objects)


class _Native(Protocol):
    def keep_on_device(self, device: int, data: bytes) -> int: ...
    def stream_of(self, device: int) -> tuple[int, bool]: ...


class _Sent(NamedTuple):
    words: np.ndarray
    data: bytes
    tensor: Tensor

    def holds(self, words: np.ndarray) -> bool:
        return self.words is words or self.data == words.tobytes()


class DeviceTable:
    """A table of int64 on a device, for one plan.

    A table that was sent is never written again, so a kernel that still reads it is not disturbed.
    Each stream has a table of its own, whose memory no other stream waits for or reuses.

    Args:
        size: the number of integers.
        device: where kernels read them.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._size = size
        self._device = device
        self._by_stream: dict[int, _Sent] = {}
        # Complete whatever the stream, and never freed.
        self._kept: _Sent | None = None
        # Pinned memory cannot be allocated during a capture.
        self._reserved: Tensor | None = self._pinned()
        self._captured: tuple[bytes, Tensor] | None = None

    def send(self, words: np.ndarray) -> Tensor:
        """Return a tensor on the device that holds `words` when the current stream reads it.

        Args:
            words: int64, never changed afterwards.
        """
        if self._kept is not None and self._kept.holds(words):
            return self._kept.tensor
        stream, is_capturing = self._stream()
        if is_capturing:
            return self._send_in_capture(words)
        sent = self._by_stream.get(stream)
        if sent is None or not sent.holds(words):
            data = words.tobytes()
            host = self._pinned()
            host.numpy()[:] = words.ravel()
            sent = _Sent(words, data, host.to(self._device, non_blocking=True))
            # What other streams were sent before is of no use to them any more.
            self._by_stream = {
                key: other for key, other in self._by_stream.items() if other.data == data
            }
            self._by_stream[stream] = sent
        return sent.tensor

    def _send_in_capture(self, words: np.ndarray) -> Tensor:
        data = words.tobytes()
        native = _native(self._device)
        if native is not None:
            memory = _DeviceMemory(native.keep_on_device(self._device.index, data), self._size)
            tensor = torch.as_tensor(memory, device=self._device)
            self._kept = _Sent(words, data, tensor)
            return tensor
        # The copy is part of the graph: it runs with each replay, and no other step uses its table.
        if self._captured is None or self._captured[0] != data:
            host = self._pinned() if self._reserved is None else self._reserved
            self._reserved = None
            host.numpy()[:] = words.ravel()
            self._captured = (data, host)
        host = self._captured[1]
        tensor = host.to(self._device, non_blocking=True)
        keep_for_replays(host, tensor)
        return tensor

    def _pinned(self) -> Tensor:
        is_pinned = self._device.type != "cpu"
        return torch.empty(self._size, dtype=torch.int64, device="cpu", pin_memory=is_pinned)

    def _stream(self) -> tuple[int, bool]:
        """Return the current stream, and True if it is being captured."""
        if self._device.type == "cpu":
            return 0, False
        native = _native(self._device)
        if native is not None:
            return native.stream_of(self._device.index)
        is_capturing = False
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                is_capturing = torch.cuda.is_current_stream_capturing()
        return torch.accelerator.current_stream(self._device).stream_id, is_capturing


class _DeviceMemory:
    """Memory of `size` int64 at an address, for `torch.as_tensor`."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "<i8",
            "data": (address, False),
            "version": 2,
        }


@functools.cache
def _native(device: torch.device) -> _Native | None:
    if device.type != "cuda" or backends.problem("cuda", "cuda") is not None:
        return None
    from czm_fused import _C_cuda  # type: ignore[attr-defined]

    native: _Native = _C_cuda
    return native
