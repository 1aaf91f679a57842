"""The execution of a kernel: blocks one after the other, the lanes of a block as vectors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable

import numpy as np

from ptx import formats
from ptx.formats import UNSIGNED
from ptx.memory import LOCAL, PARAM, SHARED, WARP, Clock, Memory, Watch
from ptx.parsing import (
    Address,
    Immediate,
    Instruction,
    Kernel,
    Operand,
    Register,
    Several,
    Special,
    Symbol,
    Trap,
)

Handler = Callable[["Block", Instruction, np.ndarray], None]
INSTRUCTIONS: dict[str, Handler] = {}

_MOST_INSTRUCTIONS = 2_000_000
_SHARED_ALIGNMENT = 128
# What uninitialised shared memory holds.
_GARBAGE = 0xA5


class Launch:
    """A launch, run when it is made.

    Args:
        kernel: what to run.
        memory: what it may touch.
        params: the bytes of its parameters.
        threads: of a block.
        grid: the number of blocks.
        dynamic_shared: bytes of shared memory that the launch adds.
        blocks: the blocks to run; all by default.
        observer: is told of every access to global memory and of every instruction.
        approx_error: how much of their greatest error `approx` instructions have, 0 to 1; its sign
            is random.

    Attributes:
        is_whole: True if all blocks were run.
        watches: who touched what, for each span that was touched.
        reached: the indices of the instructions that some lane has executed.

    Raises:
        Trap: what the kernel must not do.
    """

    def __init__(
        self,
        kernel: Kernel,
        memory: Memory,
        params: bytes,
        threads: int,
        grid: int,
        *,
        dynamic_shared: int = 0,
        blocks: Iterable[int] | None = None,
        observer: Observer | None = None,
        approx_error: float = 0.0,
    ) -> None:
        self.kernel, self.memory, self.threads, self.grid = kernel, memory, threads, grid
        self.params = np.frombuffer(params.ljust(kernel.param_bytes, b"\0"), np.uint8)
        self.dynamic_at = -(-kernel.shared_bytes // _SHARED_ALIGNMENT) * _SHARED_ALIGNMENT
        self.shared_bytes = max(self.dynamic_at + dynamic_shared, 1)
        self.observer = observer
        self.is_whole = blocks is None
        self.approx_error = approx_error
        self.random = np.random.default_rng(0)
        self.watches: dict[int, Watch] = {}
        self.reached: set[int] = set()
        self.constants: dict[tuple[Operand, int], np.ndarray] = {}
        epoch = 0
        for number in range(grid) if blocks is None else blocks:
            block = Block(self, number, epoch)
            if observer is not None:
                observer.begin(block)
            try:
                with np.errstate(all="ignore"):
                    block.run()
            except Trap as error:
                raise Trap(f"block {number} of {kernel.name}: {error}") from None
            epoch = block.clock.epoch + 1

    def watch(self, span: int) -> Watch:
        """Return the watch of a span of memory."""
        if span not in self.watches:
            name, size = self.memory.spans[span].name, len(self.memory.bytes[span])
            self.watches[span] = Watch(name, size, self.kernel.granule)
        return self.watches[span]

    def writes_of(self, number: int) -> np.ndarray:
        """Return how often each granule of a span of memory was written."""
        span = self.memory.spans[number]
        first = (span.address - span.base) // self.kernel.granule
        return self.watch(number).writes[first:]


class Observer:
    """What a launch tells of itself; see `ptx.traffic`."""

    def begin(self, block: Block) -> None:
        """Called before each block."""

    def execute(self, instruction: Instruction) -> None:
        """Called before each instruction, also where its predicate holds for no lane."""

    def access(
        self, name: str, is_load: bool, lanes: np.ndarray, addresses: np.ndarray, size: int
    ) -> None:
        """Called at each access of global memory."""


class Block:
    """The threads of one block.

    Attributes:
        registers: the bits that every lane holds in each register.
        clock: what its barriers have ordered.
    """

    def __init__(self, launch: Launch, number: int, epoch: int) -> None:
        self.launch, self.kernel, self.number = launch, launch.kernel, number
        self.size = launch.threads
        self.lanes = np.arange(self.size)
        self.registers: dict[str, np.ndarray] = {}
        self.shared = np.full(launch.shared_bytes, _GARBAGE, np.uint8)
        self.local = np.full((self.size, max(self.kernel.local_bytes, 1)), _GARBAGE, np.uint8)
        self.clock = Clock(self.size, epoch)
        self.shared_watch = Watch("shared memory", launch.shared_bytes, self.kernel.granule)
        self._pc = np.zeros(self.size, np.int64)
        self._is_alive = np.ones(self.size, bool)
        # The lanes that wait at the instruction of their pc for others.
        self._waits = np.zeros(self.size, bool)

    # Operands

    def register(self, name: str) -> np.ndarray:
        """Return the bits of a register, a bool for predicates; 0 before it is written."""
        bits = self.registers.get(name)
        if bits is None:
            width = self.kernel.width(name)
            bits = np.zeros(self.size, bool if width == 1 else UNSIGNED[width])
            self.registers[name] = bits
        return bits

    def predicate(self, operand: Operand) -> np.ndarray:
        """Return what a predicate is for each lane."""
        if isinstance(operand, Immediate):
            return np.full(self.size, operand.value != 0)
        assert isinstance(operand, Register)
        value = self.register(operand.name)
        return ~value if operand.is_negated else value

    def bits(self, operand: Operand, width: int) -> np.ndarray:
        """Return the bits of an operand, as unsigned integers of `width`."""
        if isinstance(operand, Register):
            value = self.register(operand.name)
            return value if value.dtype == UNSIGNED[width] else value.astype(UNSIGNED[width])
        value = self.launch.constants.get((operand, width))
        if value is None:
            value = self._constant(operand, width)
            if not (isinstance(operand, Special) and operand.name == "ctaid"):
                self.launch.constants[operand, width] = value
        return value

    def numbers(self, operand: Operand, kind: str) -> np.ndarray:
        """Return an operand as numbers of type `kind`."""
        if isinstance(operand, Immediate) and isinstance(operand.value, float):
            return np.full(self.size, operand.value, formats.FLOAT[formats.BITS[kind]])
        return formats.from_bits(self.bits(operand, formats.BITS[kind]), kind)

    def addresses(self, operand: Operand) -> np.ndarray:
        """Return the address that each lane means."""
        assert isinstance(operand, Address)
        base = self.bits(operand.base, 64)
        return base + np.uint64(operand.offset % (1 << 64)) if operand.offset else base

    def set_bits(self, operand: Operand, bits: np.ndarray, mask: np.ndarray) -> None:
        """Write a register of the lanes in `mask`; a wider one is extended by zeros."""
        if operand is None:
            return
        assert isinstance(operand, Register)
        np.copyto(self.register(operand.name), bits, where=mask, casting="unsafe")

    def set_numbers(
        self, operand: Operand, numbers: np.ndarray, kind: str, mask: np.ndarray
    ) -> None:
        """Write numbers of type `kind`; a wider register of signed integers is sign-extended."""
        bits = formats.to_bits(np.asarray(numbers), kind)
        if kind[0] == "s" and isinstance(operand, Register):
            width = self.kernel.width(operand.name)
            if width > formats.BITS[kind]:
                signed = bits.view(formats.SIGNED[formats.BITS[kind]])
                bits = signed.astype(formats.SIGNED[width]).view(UNSIGNED[width])
        self.set_bits(operand, bits, mask)

    def _constant(self, operand: Operand, width: int) -> np.ndarray:
        if isinstance(operand, Special):
            return self._special(operand).astype(UNSIGNED[width])
        if isinstance(operand, Symbol):
            value = self._address_of(operand.name) + operand.offset
        else:
            assert isinstance(operand, Immediate) and isinstance(operand.value, int)
            value = operand.value
        return np.full(self.size, value % (1 << width), UNSIGNED[width])

    def _special(self, operand: Special) -> np.ndarray:
        if operand.name == "tid":
            return self.lanes if operand.axis == "x" else np.zeros_like(self.lanes)
        if operand.name == "laneid":
            return self.lanes % WARP
        if operand.name == "warpid":
            return self.lanes // WARP
        values = {"ntid": self.size, "ctaid": self.number, "nctaid": self.launch.grid}
        along_others = 0 if operand.name == "ctaid" else 1
        value = values[operand.name] if operand.axis == "x" else along_others
        return np.full(self.size, value)

    def _address_of(self, name: str) -> int:
        kernel = self.kernel
        if name in kernel.params:
            return PARAM + kernel.params[name][0]
        if name in kernel.shared:
            return kernel.shared[name]
        if name == kernel.dynamic_shared:
            return self.launch.dynamic_at
        if name in kernel.local:
            return LOCAL + kernel.local[name]
        if name in kernel.data:
            return ctypes.addressof(kernel.data[name])
        raise Trap(f"unknown symbol {name}")

    # Memory

    def access(self, instruction: Instruction, mask: np.ndarray, is_load: bool) -> None:
        """Load or store, in whatever space."""
        operands = instruction.operands if is_load else instruction.operands[::-1]
        target, address = operands[0], operands[1]
        parts = target.parts if isinstance(target, Several) else (target,)
        if len(parts) != instruction.vector:
            raise Trap("a vector of another width than its registers")
        width = formats.BITS[instruction.kind] // 8
        size = width * len(parts)
        lanes = np.flatnonzero(mask)
        addresses = self.addresses(address)[lanes]
        remainder = addresses % np.uint64(size)
        if remainder.any():
            wrong = int(addresses[np.flatnonzero(remainder)[0]])
            raise Trap(f"misaligned access of {size} bytes at {wrong:#x}")
        space, at = _resolve(instruction.space, addresses)
        if space == "global":
            spans = self.launch.memory.find(addresses, size)
            for span in np.unique(spans):
                here = spans == span
                where = self.launch.memory.spans[span]
                at = (addresses[here] - np.uint64(where.base)).astype(np.int64)
                watch = self.launch.watch(int(span))
                watch.check(self.clock, lanes[here], at, size, not is_load)
                if self.launch.observer is not None:
                    self.launch.observer.access(
                        where.name, is_load, lanes[here], addresses[here], size
                    )
                store = self.launch.memory.bytes[span]
                self._move(instruction, store, at, lanes[here], parts, width, is_load)
            return
        if space == "shared":
            if (at + size > len(self.shared)).any():
                raise Trap(f"access outside {len(self.shared)} bytes of shared memory")
            self.shared_watch.check(self.clock, lanes, at, size, not is_load)
            store = self.shared
        elif space == "local":
            store, at = self.local.reshape(-1), at + lanes * self.local.shape[1]
        else:
            if not is_load:
                raise Trap("a parameter is written")
            if (at + size > len(self.launch.params)).any():
                raise Trap(f"access outside {len(self.launch.params)} bytes of parameters")
            store = self.launch.params
        self._move(instruction, store, at, lanes, parts, width, is_load)

    def _move(
        self,
        instruction: Instruction,
        store: np.ndarray,
        at: np.ndarray,
        lanes: np.ndarray,
        parts: tuple[Operand, ...],
        width: int,
        is_load: bool,
    ) -> None:
        elements = store[: len(store) // width * width].view(UNSIGNED[8 * width])
        kind = instruction.kind
        for number, part in enumerate(parts):
            index = at // width + number
            if not is_load:
                elements[index] = self.bits(part, 8 * width)[lanes]
            elif part is not None:
                values = elements[index]
                full = np.zeros(self.size, values.dtype)
                full[lanes] = values
                mask = np.zeros(self.size, bool)
                mask[lanes] = True
                if kind[0] == "s":
                    self.set_numbers(part, full.view(formats.SIGNED[8 * width]), kind, mask)
                else:
                    self.set_bits(part, full, mask)

    # Control

    def run(self) -> None:
        """Run until all lanes have ended: always those that are furthest behind."""
        instructions = self.kernel.instructions
        count = 0
        while True:
            runnable = self._is_alive & ~self._waits
            if not runnable.any():
                if not self._is_alive.any():
                    return
                self._blame_the_waiting()
            current = int(self._pc[runnable].min())
            mask = runnable & (self._pc == current)
            ahead = self._pc[runnable & ~mask]
            until = int(ahead.min()) if len(ahead) else len(instructions)
            # Straight on as one, until the next branch or until others are reached.
            while True:
                if current >= len(instructions):
                    raise Trap("the end of the kernel is passed")
                count += 1
                if count > _MOST_INSTRUCTIONS:
                    raise Trap("the kernel does not end")
                if self._execute(instructions[current], current, mask):
                    break
                current += 1
                if current == until:
                    self._pc[mask] = current
                    break

    def _execute(self, instruction: Instruction, current: int, mask: np.ndarray) -> bool:
        """Execute one instruction, and return True if the lanes go on elsewhere."""
        if instruction.predicate is not None:
            acts = mask & self.predicate(instruction.predicate)
        else:
            acts = mask
        base = instruction.base
        if self.launch.observer is not None:
            self.launch.observer.execute(instruction)
        try:
            if acts.any():
                self.launch.reached.add(current)
                if base in ("bra", "ret", "exit", "bar", "barrier", "shfl", "vote"):
                    self._pc[mask] = current + 1
                    return self._control(instruction, current, acts)
                INSTRUCTIONS[base](self, instruction, acts)
        except Trap as error:
            raise Trap(f"{error}: {instruction.line}") from None
        except KeyError:
            raise Trap(f"unknown instruction {instruction.line}") from None
        return False

    def _control(self, instruction: Instruction, current: int, acts: np.ndarray) -> bool:
        base = instruction.base
        if base == "bra":
            target = instruction.operands[0]
            assert isinstance(target, Symbol)
            self._pc[acts] = self.kernel.labels[target.name]
        elif base in ("ret", "exit"):
            self._is_alive[acts] = False
        else:
            # All lanes that are named must be here before any goes on.
            self._pc[acts] = current
            self._waits |= acts
            if base in ("bar", "barrier") and "warp" not in instruction:
                if len(instruction.operands) == 2:
                    self._meet_named(instruction, current)
                else:
                    self._meet_block(current)
            else:
                self._meet_warps(instruction, current)
        return True

    def _meet_named(self, instruction: Instruction, current: int) -> None:
        """Let the threads of one barrier of the block go on once all that it is for are there."""
        barriers, threads = (self.bits(operand, 32) for operand in instruction.operands)
        here = self._waits & (self._pc == current)
        for barrier in np.unique(barriers[here]):
            group = np.flatnonzero(here & (barriers == barrier))
            if len(group) == threads[group[0]]:
                # This orders the whole block, more than the barrier does.
                self.clock.meet_block()
                self._pc[group] = current + 1
                self._waits[group] = False

    def _meet_block(self, current: int) -> None:
        if (self._waits & (self._pc == current) == self._is_alive).all():
            self.clock.meet_block()
            self._pc[self._is_alive] = current + 1
            self._waits[:] = False

    def _meet_warps(self, instruction: Instruction, current: int) -> None:
        here = self._waits & (self._pc == current)
        members = self.members(instruction)
        for warp in np.unique(np.flatnonzero(here) // WARP):
            lanes = np.flatnonzero(here[WARP * warp : WARP * (warp + 1)]) + WARP * warp
            for named in np.unique(members[lanes]):
                group = lanes[members[lanes] == named]
                present = np.bitwise_or.reduce(np.uint32(1) << (group % WARP).astype(np.uint32))
                if present & ~named:
                    raise Trap(f"a lane that {named:#x} does not name is among {present:#x}")
                if present == named:
                    self._release(instruction, current, group)

    def _release(self, instruction: Instruction, current: int, group: np.ndarray) -> None:
        mask = np.zeros(self.size, bool)
        mask[group] = True
        if instruction.base in ("bar", "barrier"):
            self.clock.meet(group)
        else:
            INSTRUCTIONS[instruction.base](self, instruction, mask)
        self._pc[group] = current + 1
        self._waits[group] = False

    def members(self, instruction: Instruction) -> np.ndarray:
        """Return the lanes that a shuffle, a vote or a barrier of a warp names, as a mask."""
        index = 0 if instruction.base in ("bar", "barrier") else -1
        return self.bits(instruction.operands[index], 32)

    def _blame_the_waiting(self) -> None:
        pcs = self._pc[self._waits]
        current = int(pcs.min())
        instruction = self.kernel.instructions[current]
        here = self._waits & (self._pc == current)
        if instruction.base in ("bar", "barrier") and "warp" not in instruction:
            wanted = int(self._is_alive.sum())
            raise Trap(f"met by {int(here.sum())} of {wanted} threads: {instruction.line}")
        lane = np.flatnonzero(here)[0]
        named = int(self.members(instruction)[lane])
        first = lane // WARP * WARP
        present = sum(1 << int(k) for k in np.flatnonzero(here[first : first + WARP]))
        raise Trap(
            f"warp {lane // WARP} names {named:#x}, met by {present:#x}: {instruction.line}"
        )


def _resolve(space: str, addresses: np.ndarray) -> tuple[str, np.ndarray]:
    """Return the space that addresses are in, and where in it; generic ones say it themselves."""
    begins = {"shared": SHARED, "param": PARAM, "local": LOCAL}
    if space == "":
        found = np.select(
            [addresses >= PARAM, addresses >= SHARED, addresses >= LOCAL], [3, 2, 1], 0
        )
        if (found != found[0]).any():
            raise Trap("generic addresses of several spaces")
        space = ("global", "local", "shared", "param")[found[0]]
    if space in ("global", "const"):
        return "global", addresses
    begin = np.uint64(begins[space])
    return space, np.where(addresses >= begin, addresses - begin, addresses).astype(np.int64)
