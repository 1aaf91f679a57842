"""The memory that a kernel may touch, and who touched it last."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from ptx.parsing import Trap

# Where generic addresses of each space begin; global ones are the host's, below all of them.
LOCAL, SHARED, PARAM = 1 << 59, 1 << 60, 1 << 61
WARP = 32
_WIDEST_ACCESS = 64
_NOBODY = -1


@dataclass(frozen=True)
class Span:
    """A tensor that a kernel may touch: its address, bytes and name."""

    address: int
    size: int
    name: str

    @property
    def base(self) -> int:
        """An address before it that is aligned to every access."""
        return self.address // _WIDEST_ACCESS * _WIDEST_ACCESS


def _bytes_of(span: Span) -> np.ndarray:
    size = span.address + span.size - span.base
    return np.frombuffer((ctypes.c_ubyte * size).from_address(span.base), dtype=np.uint8)


class Memory:
    """Host memory that a kernel may touch.

    Args:
        spans: what it consists of; where two agree, the first names it.

    Attributes:
        spans: the same, by address.
        bytes: of each span, from its base.
    """

    def __init__(self, spans: list[Span]) -> None:
        unique: dict[tuple[int, int], Span] = {}
        for span in spans:
            if span.address and span.size:
                unique.setdefault((span.address, span.size), span)
        self.spans = sorted(unique.values(), key=lambda span: span.address)
        self._begins = np.array([span.address for span in self.spans], dtype=np.uint64)
        self._ends = np.array([span.address + span.size for span in self.spans], dtype=np.uint64)
        self.bytes = [_bytes_of(span) for span in self.spans]

    def find(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Return the span of each access; where in its `bytes` it is, `Span.base` tells.

        Raises:
            Trap: one that is in none.
        """
        spans = np.searchsorted(self._begins, addresses, side="right") - 1
        ends = self._ends[np.maximum(spans, 0)]
        outside = np.flatnonzero((spans < 0) | (addresses + np.uint64(size) > ends))
        if len(outside):
            first = outside[0]
            nearest = self.spans[max(int(spans[first]), 0)]
            raise Trap(
                f"access of {size} bytes at {int(addresses[first]):#x} outside every tensor, the "
                f"nearest {nearest.name} at {nearest.address:#x} of {nearest.size} bytes"
            )
        return spans


class Clock:
    """What the barriers of one block have ordered.

    Attributes:
        epoch: how many barriers of blocks there were, in all blocks so far.
        first_epoch: the epoch in which this block began.
        own: how often each lane has met others of its warp.
        seen: `(lanes, 32)`, what each lane knows of `own` of the lanes of its warp.
    """

    def __init__(self, lanes: int, first_epoch: int) -> None:
        self.epoch = self.first_epoch = first_epoch
        self.own = np.ones(lanes, np.int32)
        self.seen = np.zeros((lanes, WARP), np.int32)

    def meet(self, lanes: np.ndarray) -> None:
        """Order all that `lanes`, of one warp, did before all that they do from now on."""
        self.seen[lanes, lanes % WARP] = self.own[lanes]
        self.seen[lanes] = self.seen[lanes].max(axis=0)
        self.own[lanes] = self.own[lanes].max() + 1

    def meet_block(self) -> None:
        """Order the whole block."""
        self.epoch += 1


class Watch:
    """Who wrote and who read each granule of a span, for races within a block and between blocks.

    Args:
        name: of the span.
        size: its bytes.
        granule: bytes that every access is a multiple of and aligned to.
    """

    def __init__(self, name: str, size: int, granule: int) -> None:
        self._name, self._granule = name, granule
        count = -(-size // granule)
        self._writer, self._reader = (np.full(count, _NOBODY, np.int32) for _ in range(2))
        self._write_epoch, self._read_epoch = (np.zeros(count, np.int32) for _ in range(2))
        self._write_own, self._read_own = (np.zeros(count, np.int32) for _ in range(2))
        # The lanes of the last reader's warp that have read since the last write.
        self._readers = np.zeros(count, np.uint32)
        self._has_other_warps = np.zeros(count, bool)
        self._has_other_blocks = np.zeros(count, bool)
        self.writes = np.zeros(count, np.int32)

    def check(
        self, clock: Clock, lanes: np.ndarray, at: np.ndarray, size: int, is_write: bool
    ) -> None:
        """Record an access of `size` bytes by each of `lanes`.

        Raises:
            Trap: it is not ordered after another lane's or block's.
        """
        count = size // self._granule
        index = at // self._granule
        if count > 1:
            index = (index[:, None] + np.arange(count)).reshape(-1)
            lanes = np.repeat(lanes, count)
        self._check_after_writer(clock, lanes, index, is_write)
        if is_write:
            self._check_after_readers(clock, lanes, index)
            self._record_write(clock, lanes, index)
        else:
            self._record_read(clock, lanes, index)

    def _check_after_writer(
        self, clock: Clock, lanes: np.ndarray, index: np.ndarray, is_write: bool
    ) -> None:
        writer = self._writer[index]
        if (writer == _NOBODY).all():
            return
        epoch = self._write_epoch[index]
        if ((writer != _NOBODY) & (epoch < clock.first_epoch)).any():
            raise Trap(f"blocks share a byte of {self._name}")
        suspect = np.flatnonzero((writer != _NOBODY) & (writer != lanes) & (epoch >= clock.epoch))
        if not len(suspect):
            return
        other, lane = writer[suspect], lanes[suspect]
        has_seen = clock.seen[lane, other % WARP] >= self._write_own[index[suspect]]
        is_ordered = (other // WARP == lane // WARP) & has_seen
        if not is_ordered.all():
            first = np.flatnonzero(~is_ordered)[0]
            self._race(index[suspect][first], lane[first], is_write, "write", other[first])

    def _check_after_readers(self, clock: Clock, lanes: np.ndarray, index: np.ndarray) -> None:
        reader = self._reader[index]
        if (reader == _NOBODY).all():
            return
        epoch = self._read_epoch[index]
        is_foreign = (reader != _NOBODY) & (epoch < clock.first_epoch)
        if (is_foreign | self._has_other_blocks[index]).any():
            raise Trap(f"blocks share a byte of {self._name}")
        suspect = np.flatnonzero((reader != _NOBODY) & (epoch >= clock.epoch))
        if not len(suspect):
            return
        at, other, lane = index[suspect], reader[suspect], lanes[suspect]
        bits = np.arange(WARP, dtype=np.uint32)
        has_read = (self._readers[at][:, None] >> bits & np.uint32(1)).astype(bool)
        is_itself = (other // WARP == lane // WARP)[:, None] & (bits == (lane % WARP)[:, None])
        has_seen = clock.seen[lane] >= self._read_own[at][:, None]
        is_ordered = (~has_read | is_itself | has_seen).all(axis=1)
        is_alone = ~has_read | is_itself
        is_ordered &= (other // WARP == lane // WARP) & ~self._has_other_warps[at]
        is_ordered |= is_alone.all(axis=1) & ~self._has_other_warps[at]
        if not is_ordered.all():
            first = np.flatnonzero(~is_ordered)[0]
            self._race(at[first], lane[first], True, "read", other[first])

    def _race(self, index: int, lane: int, is_write: bool, what: str, other: int) -> None:
        raise Trap(
            f"race on {self._name}+{index * self._granule}: lane {lane} "
            f"{'writes' if is_write else 'reads'} after an unordered {what} of lane {other}"
        )

    def _record_write(self, clock: Clock, lanes: np.ndarray, index: np.ndarray) -> None:
        self._writer[index] = lanes
        if (self._writer[index] != lanes).any():
            raise Trap(f"two lanes write the same byte of {self._name} at once")
        self._write_epoch[index], self._write_own[index] = clock.epoch, clock.own[lanes]
        self._reader[index] = _NOBODY
        self._readers[index] = 0
        self._has_other_warps[index] = False
        self.writes[index] += 1

    def _record_read(self, clock: Clock, lanes: np.ndarray, index: np.ndarray) -> None:
        reader, epoch = self._reader[index], self._read_epoch[index]
        is_stale = (reader == _NOBODY) | (epoch < clock.epoch)
        is_other_warp = ~is_stale & (reader // WARP != lanes // WARP)
        bits = np.uint32(1) << (lanes % WARP).astype(np.uint32)
        readers = self._readers[index]
        self._readers[index] = np.where(is_stale | is_other_warp, bits, readers | bits)
        self._has_other_warps[index] = ~is_stale & (self._has_other_warps[index] | is_other_warp)
        self._has_other_blocks[index] |= (reader != _NOBODY) & (epoch < clock.first_epoch)
        self._reader[index] = lanes
        if (self._reader[index] != lanes).any():
            # Several lanes read one byte in one instruction.
            np.bitwise_or.at(self._readers, index, bits)
            is_last = self._reader[index] // WARP == lanes // WARP
            self._has_other_warps[index[~is_last]] = True
        self._read_epoch[index], self._read_own[index] = clock.epoch, clock.own[lanes]
