"""The instructions that move data: between registers, lanes and memory."""

from __future__ import annotations

import numpy as np

from ptx import arithmetic
from ptx.arithmetic import instruction
from ptx.execution import Block
from ptx.formats import BITS, UNSIGNED
from ptx.memory import LOCAL, PARAM, SHARED, WARP
from ptx.parsing import Instruction, Several, Trap

__all__ = ["arithmetic"]


@instruction("ld", "ldu")
def _load(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    block.access(instruction, mask, is_load=True)


@instruction("st")
def _store(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    block.access(instruction, mask, is_load=False)


@instruction("membar", "fence", "nanosleep", "griddepcontrol", "prefetch", "prefetchu", "pragma")
def _nothing(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    return None


@instruction("mov")
def _move(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    target, source = instruction.operands
    if instruction.kind == "pred":
        block.set_bits(target, block.predicate(source), mask)
        return
    width = BITS[instruction.kind]
    if isinstance(target, Several):
        part_width = width // len(target.parts)
        bits = block.bits(source, width)
        for number, part in enumerate(target.parts):
            shifted = bits >> UNSIGNED[width](number * part_width)
            block.set_bits(part, shifted.astype(UNSIGNED[part_width]), mask)
    elif isinstance(source, Several):
        part_width = width // len(source.parts)
        bits = np.zeros(block.size, UNSIGNED[width])
        for number, part in enumerate(source.parts):
            own = block.bits(part, part_width).astype(UNSIGNED[width])
            bits |= own << UNSIGNED[width](number * part_width)
        block.set_bits(target, bits, mask)
    else:
        block.set_bits(target, block.bits(source, width), mask)


@instruction("cvta")
def _convert_address(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    target, source = instruction.operands
    addresses = block.bits(source, 64)
    if instruction.space == "shared":
        begin = np.uint64(SHARED)
        addresses = addresses - begin if "to" in instruction else addresses + begin
    elif instruction.space == "global" and "to" in instruction:
        if ((addresses >= LOCAL) & mask).any():
            raise Trap("an address that is not global is converted to global")
    block.set_bits(target, addresses, mask)


@instruction("isspacep")
def _is_in_space(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    addresses = block.bits(instruction.operands[1], 64)
    begins = {"global": 0, "local": LOCAL, "shared": SHARED, "param": PARAM}
    ends = {"global": LOCAL, "local": SHARED, "shared": PARAM, "param": 2**64 - 1}
    space = instruction.space
    result = (addresses >= np.uint64(begins[space])) & (addresses < np.uint64(ends[space]))
    block.set_bits(instruction.operands[0], result, mask)


@instruction("activemask")
def _active_mask(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    bits = np.where(mask, np.uint32(1) << (block.lanes % WARP).astype(np.uint32), np.uint32(0))
    warps = np.add.reduceat(bits, np.arange(0, block.size, WARP))
    block.set_bits(instruction.operands[0], np.repeat(warps, WARP)[: block.size], mask)


@instruction("shfl")
def _shuffle(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    """Exchange between lanes of a warp, all of which are here."""
    target, value, distance, limits, _ = instruction.operands
    bits = block.bits(value, 32)
    by = block.bits(distance, 32).astype(np.int64)
    limit = block.bits(limits, 32).astype(np.int64)
    lane = block.lanes % WARP
    segment, bound = (limit >> 8) & 31, limit & 31
    first = lane & segment
    last = first | (bound & ~segment)
    mode = instruction.one_of(("bfly", "up", "down", "idx"))
    if mode == "idx":
        source = first | (by & ~segment & 31)
    else:
        source = {"bfly": lane ^ by, "down": lane + by, "up": lane - by}[mode]
    is_inside = source >= last if mode == "up" else source <= last
    source = np.where(is_inside, source, lane) + block.lanes // WARP * WARP
    if not mask[source[mask]].all():
        raise Trap("a lane reads from one that is not named")
    targets = target.parts if isinstance(target, Several) else (target,)
    for part, result in zip(targets, (bits[source], is_inside), strict=False):
        block.set_bits(part, result, mask)


@instruction("vote")
def _vote(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    """Ask the lanes of one warp, all of which are here."""
    target, condition, _ = instruction.operands
    holds = block.predicate(condition)[mask]
    mode = instruction.one_of(("all", "any", "uni", "ballot"))
    if mode == "ballot":
        lanes = np.flatnonzero(mask)[holds] % WARP
        result = np.uint32(sum(1 << int(lane) for lane in lanes))
    else:
        result = {"all": holds.all(), "any": holds.any(), "uni": (holds == holds[0]).all()}[mode]
    block.set_bits(target, np.full(block.size, result), mask)


@instruction("ldmatrix", "stmatrix")
def _matrix(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    """Load or store matrices of 8 x 8 b16: lane 8 i + r has the address of row r of matrix i."""
    is_load = instruction.base == "ldmatrix"
    registers, where = instruction.operands if is_load else instruction.operands[::-1]
    assert isinstance(registers, Several)
    addresses = block.addresses(where).astype(np.int64)
    for warp in np.unique(np.flatnonzero(mask) // WARP):
        lanes = np.arange(WARP) + WARP * warp
        if not mask[lanes].all():
            raise Trap("a part of a warp moves a matrix")
        for number, register in enumerate(registers.parts):
            rows = addresses[lanes[8 * number : 8 * number + 8]]
            if (rows % 16).any() or (rows < 0).any() or (rows + 16 > len(block.shared)).any():
                raise Trap(f"matrix rows at {rows}")
            index = rows[:, None] + np.arange(16)
            own = np.zeros(block.size, bool)
            own[lanes] = True
            if is_load:
                tile = np.ascontiguousarray(block.shared[index]).view(np.uint16)
                tile = np.ascontiguousarray(tile.T if "trans" in instruction else tile)
                full = np.zeros(block.size, np.uint32)
                full[lanes] = tile.view(np.uint32).reshape(WARP)
                block.set_bits(register, full, own)
            else:
                bits = np.ascontiguousarray(block.bits(register, 32)[lanes])
                tile = bits.view(np.uint16).reshape(8, 8)
                tile = np.ascontiguousarray(tile.T if "trans" in instruction else tile)
                block.shared[index] = tile.view(np.uint8).reshape(8, 16)
            # Transposed, a lane touches two rows; the watch only tells warps apart there.
            block.shared_watch.check(block.clock, lanes, index[:, ::4].reshape(-1), 4, not is_load)
