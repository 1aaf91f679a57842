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
_BITS = 64
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
    """What the barriers of one block have ordered: a vector clock for each lane.

    Attributes:
        epoch: how many barriers of whole blocks there were, in all blocks so far.
        first_epoch: the epoch in which this block began.
        own: how often each lane has met others.
        seen: `(lanes, lanes)`, up to which of `own` of the others each lane is ordered after them.
    """

    def __init__(self, lanes: int, first_epoch: int) -> None:
        self.epoch = self.first_epoch = first_epoch
        self.own = np.ones(lanes, np.int32)
        self.seen = np.zeros((lanes, lanes), np.int32)

    def meet(self, lanes: np.ndarray) -> None:
        """Order all that `lanes` did before all that they do from now on."""
        if len(lanes) == len(self.own):
            self.epoch += 1
            return
        now = self.own[lanes].max()
        known = self.seen[lanes].max(axis=0)
        known[lanes] = now
        self.seen[lanes] = known
        self.own[lanes] = now + 1


class Watch:
    """Who wrote and who read each granule of a span, for races within a block and between blocks.

    Args:
        name: of the span.
        size: its bytes.
        granule: bytes that every access is a multiple of and aligned to.
        lanes: of a block.
    """

    def __init__(self, name: str, size: int, granule: int, lanes: int) -> None:
        self._name, self._granule = name, granule
        count = -(-size // granule)
        self._writer, self._reader = (np.full(count, _NOBODY, np.int32) for _ in range(2))
        self._write_epoch, self._read_epoch = (np.zeros(count, np.int32) for _ in range(2))
        self._write_own, self._read_own = (np.zeros(count, np.int32) for _ in range(2))
        # The lanes whose reads no later read is ordered after, a bit each.
        self._readers = np.zeros((count, -(-lanes // _BITS)), np.uint64)
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
        is_ordered = clock.seen[lane, other] >= self._write_own[index[suspect]]
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
        at, lane = index[suspect], lanes[suspect]
        unordered = self._unordered_readers(clock, lane, at)
        if unordered.any():
            first, other = np.argwhere(unordered)[0]
            self._race(at[first], lane[first], True, "read", other)

    def _unordered_readers(self, clock: Clock, lane: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Return which lanes have read granules `at` without being ordered before `lane`."""
        bits = np.unpackbits(self._readers[at].view(np.uint8), axis=1, bitorder="little")
        unordered = bits[:, : len(clock.own)].astype(bool)
        unordered &= clock.seen[lane] < self._read_own[at][:, None]
        unordered[np.arange(len(lane)), lane] = False
        return unordered

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
        self.writes[index] += 1

    def _record_read(self, clock: Clock, lanes: np.ndarray, index: np.ndarray) -> None:
        reader, epoch = self._reader[index], self._read_epoch[index]
        own = clock.own[lanes]
        is_stale = (reader == _NOBODY) | (epoch < clock.epoch)
        again = np.flatnonzero(~is_stale & (own > self._read_own[index]))
        if len(again):
            # Reads that are ordered before this one need not be remembered beside it.
            unordered = self._unordered_readers(clock, lanes[again], index[again])
            is_stale[again] = ~unordered.any(axis=1)
        self._readers[index[is_stale]] = 0
        self._read_own[index[is_stale]] = 0
        self._has_other_blocks[index] |= (reader != _NOBODY) & (epoch < clock.first_epoch)
        word, bit = _bit_of(lanes)
        self._reader[index] = lanes
        if (self._reader[index] == lanes).all():
            self._readers[index, word] |= bit
        else:
            # Several lanes read one byte in one instruction.
            np.bitwise_or.at(self._readers, (index, word), bit)
        np.maximum.at(self._read_own, index, own)
        self._read_epoch[index] = clock.epoch


def _bit_of(lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the word of each lane in a set of lanes, and its bit."""
    return lanes // _BITS, np.uint64(1) << (lanes % _BITS).astype(np.uint64)
