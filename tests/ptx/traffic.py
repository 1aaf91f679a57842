"""Numbers that decide how fast a kernel is, counted as it is interpreted."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from ptx.execution import Block, Observer
from ptx.memory import WARP
from ptx.parsing import Address, Instruction, Operand, Register, Several

SECTOR_BYTES = 32
_LINE_BYTES = 128
WEIGHTS = ("param", "grad", "momentum_buffer", "param_remainder")


@dataclass
class Transfers:
    """The accesses of warps to the tensors of one name.

    Attributes:
        requests: instructions of one warp.
        sectors: 32 bytes, as often as a request touches them.
        bytes: that lanes asked for.
    """

    requests: int = 0
    sectors: int = 0
    bytes: int = 0


@dataclass
class BlockNumbers:
    """What one block does.

    Attributes:
        threads: of the block.
        threads_with_weights: that load a weight.
        loads_before_weight: global loads that wait for one another before the first weight is
            asked for, where instructions are issued in the order of the PTX. What is within a line
            of 128 bytes comes with the first load of it.
        weight_loads: of weights, gradients and momentum, by instruction.
        waits: how often an instruction needs one of these that is still under way; then all are
            there.
    """

    threads: int
    threads_with_weights: int = 0
    loads_before_weight: int | None = None
    weight_loads: int = 0
    waits: int = 0


@dataclass
class Traffic(Observer):
    """Counts transfers and waits.

    Attributes:
        loads: by the name of the tensor.
        stores: the same.
        blocks: in order.
    """

    loads: dict[str, Transfers] = field(default_factory=lambda: defaultdict(Transfers))
    stores: dict[str, Transfers] = field(default_factory=lambda: defaultdict(Transfers))
    blocks: list[BlockNumbers] = field(default_factory=list)

    def begin(self, block: Block) -> None:
        self.blocks.append(BlockNumbers(block.size))
        self._with_weights = np.zeros(block.size, bool)
        # How many loads, one after the other, a register's value waited for.
        self._depths: dict[str, int] = {}
        self._issue = 0
        self._targets: set[str] = set()
        self._under_way: set[str] = set()
        # Where a name was loaded from, and after how many loads, one after the other, it is here.
        self._arrivals: dict[str, list[tuple[int, int]]] = defaultdict(list)

    def execute(self, instruction: Instruction) -> None:
        read, written = _registers(instruction)
        numbers = self.blocks[-1]
        if self._under_way & read:
            numbers.waits += 1
            self._under_way.clear()
        # In order: an instruction waits for what it reads, and those after it wait as well.
        depths = (self._depths.get(name, 0) for name in read)
        self._issue = max(self._issue, *depths, 0)
        self._targets = written
        if instruction.base in ("ld", "ldu") and instruction.space in ("", "global"):
            return
        for name in written:
            self._depths[name] = self._issue

    def access(
        self, name: str, is_load: bool, lanes: np.ndarray, addresses: np.ndarray, size: int
    ) -> None:
        found = (self.loads if is_load else self.stores)[name]
        warps = lanes // WARP
        # Aligned to its size, an access stays within one sector.
        sectors = (addresses // np.uint64(SECTOR_BYTES)).astype(np.int64)
        found.requests += len(np.unique(warps))
        found.sectors += len(np.unique(np.stack([warps, sectors]), axis=1).T)
        found.bytes += len(lanes) * size
        if is_load and name not in WEIGHTS:
            arrival = max(self._issue, self._arrival(name, int(addresses[0])))
            for target in self._targets:
                self._depths[target] = arrival
        if not is_load or name not in WEIGHTS:
            return
        numbers = self.blocks[-1]
        numbers.weight_loads += 1
        self._under_way |= self._targets
        if name == "param":
            self._with_weights[lanes] = True
            numbers.threads_with_weights = int(self._with_weights.sum())
            if numbers.loads_before_weight is None:
                numbers.loads_before_weight = self._issue

    def _arrival(self, name: str, address: int) -> int:
        for other, arrival in self._arrivals[name]:
            if abs(address - other) < _LINE_BYTES:
                return arrival
        self._arrivals[name].append((address, self._issue + 1))
        return self._issue + 1

    def sectors(self, name: str, size: int) -> float:
        """Return the sectors that loads of a tensor of `size` bytes touched, over its own."""
        return self.loads[name].sectors * SECTOR_BYTES / size

    def loads_before_weight(self) -> int:
        """Return the most of all blocks."""
        return max(numbers.loads_before_weight or 0 for numbers in self.blocks)

    def loads_a_wait(self) -> float:
        """Return how many loads of weights, gradients and momentum are under way at a wait."""
        loads = sum(numbers.weight_loads for numbers in self.blocks)
        return loads / max(1, sum(numbers.waits for numbers in self.blocks))

    def share_under_half_full(self) -> float:
        """Return the share of blocks in which fewer than half of the threads load a weight."""
        half_empty = [2 * each.threads_with_weights < each.threads for each in self.blocks]
        return sum(half_empty) / len(half_empty)


def _registers(instruction: Instruction) -> tuple[set[str], set[str]]:
    """Return the registers that an instruction reads, and those that it writes."""
    cached = instruction.__dict__.get("_registers_of")
    if cached is None:
        first = 0 if instruction.base in ("st", "bra", "bar", "barrier", "ret", "exit") else 1
        written = {name for each in instruction.operands[:first] for name in _names(each)}
        read = {name for each in instruction.operands[first:] for name in _names(each)}
        if instruction.predicate is not None:
            read.add(instruction.predicate.name)
        cached = instruction.__dict__["_registers_of"] = read, written
    return cached


def _names(operand: Operand) -> list[str]:
    if isinstance(operand, Register):
        return [operand.name]
    if isinstance(operand, Address):
        return _names(operand.base)
    if isinstance(operand, Several):
        return [name for part in operand.parts for name in _names(part)]
    return []
