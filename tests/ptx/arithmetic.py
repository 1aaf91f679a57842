"""The instructions that compute: integers, floats, comparisons and conversions."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ptx import formats
from ptx.execution import INSTRUCTIONS, Block
from ptx.formats import BITS, FLOAT, SIGNED, UNSIGNED
from ptx.parsing import Immediate, Instruction, Several, Trap

_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}  # fmt: skip
# True where a number is NaN.
_UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}
_NAN_TESTS = ("nan", "num")
_LOGIC = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
_BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_ROUNDING = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
# The error of float32 `approx` instructions, in units of 2^-23 of the result (PTX ISA 9.0).
_APPROX_ULPS = {"ex2": 2, "lg2": 2, "rcp": 1, "rsqrt": 2, "sqrt": 1, "div": 2, "sin": 4, "cos": 4,
                "tanh": 1024}  # fmt: skip

Compute = Callable[[Block, Instruction, np.ndarray], None]


def instruction(*names: str) -> Callable[[Compute], Compute]:
    """Register what executes the instructions of these names."""

    def register(function: Compute) -> Compute:
        for name in names:
            INSTRUCTIONS[name] = function
        return function

    return register


def _approximate(block: Block, name: str, values: np.ndarray) -> np.ndarray:
    """Return float32 `values` with as much of the documented error as the launch asks for."""
    signs = block.launch.random.choice([-1.0, 1.0], len(values))
    error = signs * block.launch.approx_error * _APPROX_ULPS[name] * 2.0**-23
    return (values.astype(np.float64) * (1 + error)).astype(np.float32)


@instruction("add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max")
def _arithmetic(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    kind = instruction.kind
    if kind in ("s16x2", "u16x2"):
        _packed_extremum(block, instruction, mask)
    elif formats.is_float(kind):
        _float_arithmetic(block, instruction, mask)
    else:
        _integer_arithmetic(block, instruction, mask)


def _packed_extremum(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    kind = np.int16 if instruction.kind[0] == "s" else np.uint16
    a, b = (block.bits(operand, 32).view(kind) for operand in instruction.operands[1:3])
    chosen = np.minimum(a, b) if instruction.base == "min" else np.maximum(a, b)
    block.set_bits(instruction.operands[0], chosen.view(np.uint32), mask)


def _float_arithmetic(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    base, kind = instruction.base, instruction.kind
    values = [block.numbers(operand, kind) for operand in instruction.operands[1:]]
    if "ftz" in instruction:
        values = [formats.flush_subnormals(value) for value in values]
    a, b = values[:2]
    if base in ("fma", "mad"):
        result = formats.fused_multiply_add(a, b, values[2])
        if "rm" in instruction and kind == "f32":
            exact = a.astype(np.longdouble) * b + values[2]
            below = np.nextafter(result, np.float32(-np.inf))
            result = np.where(result.astype(np.longdouble) > exact, below, result)
        elif {"rz", "rp", "rm"} & set(instruction.modifiers):
            raise Trap("unknown rounding")
    elif base == "div":
        result = a / b
        if kind == "f32" and ("full" in instruction or "approx" in instruction):
            result = _approximate(block, base, result)
    elif base in ("min", "max"):
        propagates = "NaN" in instruction
        if base == "min":
            result = np.minimum(a, b) if propagates else np.fmin(a, b)
        else:
            result = np.maximum(a, b) if propagates else np.fmax(a, b)
    else:
        result = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[base](a, b)
    if "ftz" in instruction:
        result = formats.flush_subnormals(result)
    block.set_numbers(instruction.operands[0], result, kind, mask)


def _integer_arithmetic(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    base, kind, operands = instruction.base, instruction.kind, instruction.operands
    a, b = (block.numbers(operand, kind) for operand in operands[1:3])
    width, is_signed = BITS[kind], kind[0] == "s"
    if base in ("mul", "mad"):
        if "wide" in instruction:
            kind = f"{kind[0]}{2 * width}"
            wide = (SIGNED if is_signed else UNSIGNED)[2 * width]
            result = a.astype(wide) * b.astype(wide)
        elif "hi" in instruction:
            product = a.astype(object) * b.astype(object)
            result = (product >> width) & ((1 << width) - 1)
            result = result.astype(UNSIGNED[width]).view(a.dtype)
        else:
            result = a * b
        if base == "mad":
            result = result + block.numbers(operands[3], kind)
    elif base in ("div", "rem"):
        divisor = np.where(b == 0, np.ones_like(b), b)
        quotient = a // divisor
        if is_signed:
            quotient += (a % divisor != 0) & ((a < 0) != (divisor < 0))
        result = quotient if base == "div" else a - quotient * divisor
    else:
        names = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}
        result = names[base](a, b)
    block.set_numbers(operands[0], result, kind, mask)


@instruction("neg", "abs", "sqrt", "rsqrt", "rcp", "ex2", "lg2", "not", "cnot")
def _of_one(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    base, kind = instruction.base, instruction.kind
    target, operand = instruction.operands
    if kind == "pred":
        block.set_bits(target, ~block.predicate(operand), mask)
        return
    width = BITS[kind]
    if base in ("not", "cnot"):
        bits = block.bits(operand, width)
        block.set_bits(target, ~bits if base == "not" else (bits == 0).astype(bits.dtype), mask)
        return
    values = block.numbers(operand, kind)
    if "ftz" in instruction:
        values = formats.flush_subnormals(values)
    if base == "neg" and formats.is_float(kind):
        # The sign of NaN as well.
        block.set_bits(target, block.bits(operand, width) ^ UNSIGNED[width](1 << width - 1), mask)
        return
    if base == "ex2":
        result = np.exp2(values.astype(np.float64)).astype(values.dtype)
    else:
        functions = {"neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "lg2": np.log2,
                     "rcp": np.reciprocal, "rsqrt": lambda x: 1 / np.sqrt(x)}  # fmt: skip
        result = functions[base](values)
    if "approx" in instruction:
        if kind == "f32":
            # 2^0 and the logarithm of 1 are exact.
            is_exact = (values == 0) if base == "ex2" else (result == 0)
            result = np.where(is_exact, result, _approximate(block, base, result))
        elif kind == "f64":
            # Some 20 bits, which Newton's steps double.
            result = (result.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)
    if "ftz" in instruction:
        result = formats.flush_subnormals(result)
    block.set_numbers(target, result, kind, mask)


@instruction("copysign")
def _copysign(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    sign, size = (block.numbers(each, instruction.kind) for each in instruction.operands[1:])
    block.set_numbers(instruction.operands[0], np.copysign(size, sign), instruction.kind, mask)


@instruction("and", "or", "xor")
def _bitwise(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    target, a, b = instruction.operands
    if instruction.kind == "pred":
        values = block.predicate(a), block.predicate(b)
    else:
        width = BITS[instruction.kind]
        values = block.bits(a, width), block.bits(b, width)
    block.set_bits(target, _BITWISE[instruction.base](*values), mask)


@instruction("shl", "shr")
def _shift(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    kind = instruction.kind
    width = BITS[kind]
    target, operand, distance = instruction.operands
    values, by = block.numbers(operand, kind), block.bits(distance, 32)
    near = np.minimum(by, width - 1).astype(values.dtype)
    if instruction.base == "shl":
        result = np.where(by < width, values << near, 0)
    else:
        result = np.where(by < width, values >> near, np.where(values < 0, -1, 0))
    block.set_numbers(target, result.astype(values.dtype), kind, mask)


@instruction("shf")
def _funnel_shift(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    target, low, high, distance = instruction.operands
    by = block.bits(distance, 32).astype(np.uint64)
    by = np.minimum(by, 32) if "clamp" in instruction else by & np.uint64(31)
    both = _pair(block.bits(low, 32), block.bits(high, 32))
    result = (both << by) >> np.uint64(32) if "l" in instruction else both >> by
    block.set_bits(target, result.astype(np.uint32), mask)


def _pair(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))


@instruction("prmt")
def _permute(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    target, low, high, selector = instruction.operands
    both = _pair(block.bits(low, 32), block.bits(high, 32))
    select = block.bits(selector, 32).astype(np.uint64)
    result = np.zeros(block.size, np.uint64)
    for number in range(4):
        choice = (select >> np.uint64(4 * number)) & np.uint64(0xF)
        byte = (both >> ((choice & np.uint64(7)) * np.uint64(8))) & np.uint64(0xFF)
        # The eighth bit asks for the sign of the byte, eight times.
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        byte = np.where(choice & np.uint64(8), sign, byte)
        result |= byte << np.uint64(8 * number)
    block.set_bits(target, result.astype(np.uint32), mask)


@instruction("lop3")
def _three_input_logic(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    target, *operands, table = instruction.operands
    assert isinstance(table, Immediate) and isinstance(table.value, int)
    a, b, c = (block.bits(operand, 32) for operand in operands)
    result = np.zeros(block.size, np.uint32)
    for row in range(8):
        if table.value >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    block.set_bits(target, result, mask)


@instruction("bfe")
def _extract_bits(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    target, operand, position, length = instruction.operands
    width = BITS[instruction.kind]
    columns = (
        block.bits(operand, width), block.bits(position, 32) & 0xFF, block.bits(length, 32) & 0xFF
    )  # fmt: skip
    result = []
    for bits, begin, count in zip(*(column.tolist() for column in columns), strict=True):
        begin, count = min(begin, width), min(count, width)
        value = bits >> begin & (1 << count) - 1
        if instruction.kind[0] == "s" and count and bits >> min(begin + count - 1, width - 1) & 1:
            value |= (1 << width) - (1 << count)
        result.append(value)
    block.set_bits(target, np.array(result, dtype=UNSIGNED[width]), mask)


@instruction("popc", "clz")
def _count_bits(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    width = BITS[instruction.kind]
    values = block.bits(instruction.operands[1], width).tolist()
    if instruction.base == "popc":
        counts = [value.bit_count() for value in values]
    else:
        counts = [width - value.bit_length() for value in values]
    block.set_bits(instruction.operands[0], np.array(counts, np.uint32), mask)


@instruction("setp", "set")
def _compare(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    kind, (target, *operands) = instruction.kind, instruction.operands
    comparison = instruction.one_of((*_COMPARE, *_UNORDERED, *_NAN_TESTS))
    targets = target.parts if isinstance(target, Several) else (target,)
    if kind in ("bf16x2", "f16x2"):
        for number, part in enumerate(targets):
            shift = np.uint32(16 * number)
            halves = [(block.bits(each, 32) >> shift).astype(np.uint16) for each in operands[:2]]
            a, b = (formats.from_bits(half, kind.removesuffix("x2")) for half in halves)
            block.set_bits(part, _compared(comparison, a, b, is_float=True), mask)
        return
    a, b = (block.numbers(operand, kind) for operand in operands[:2])
    if "ftz" in instruction:
        a, b = formats.flush_subnormals(a), formats.flush_subnormals(b)
    result = _compared(comparison, a, b, formats.is_float(kind))
    if instruction.base == "set":
        raise Trap("unknown instruction")
    logic = instruction.one_of(_LOGIC)
    for part, value in zip(targets, (result, ~result), strict=False):
        if logic:
            value = _LOGIC[logic](value, block.predicate(operands[2]))
        block.set_bits(part, value, mask)


def _compared(name: str, a: np.ndarray, b: np.ndarray, is_float: bool) -> np.ndarray:
    if not is_float:
        return _COMPARE[name](a, b)
    nan = np.isnan(a) | np.isnan(b)
    if name in _NAN_TESTS:
        return nan if name == "nan" else ~nan
    if name in _UNORDERED:
        return _COMPARE[_UNORDERED[name]](a, b) | nan
    return _COMPARE[name](a, b) & ~nan


@instruction("testp")
def _test(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    tests = {"infinite": np.isinf, "finite": np.isfinite, "notanumber": np.isnan}
    values = block.numbers(instruction.operands[1], instruction.kind)
    name = instruction.one_of((*tests, "number"))
    result = ~np.isnan(values) if name == "number" else tests[name](values)
    block.set_bits(instruction.operands[0], result, mask)


@instruction("selp")
def _select(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    target, a, b, condition = instruction.operands
    width = BITS[instruction.kind]
    chosen = np.where(block.predicate(condition), block.bits(a, width), block.bits(b, width))
    block.set_bits(target, chosen, mask)


@instruction("cvt")
def _convert(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    to, of = instruction.types[:2]
    target, *operands = instruction.operands
    if to in ("bf16x2", "f16x2"):
        half = to.removesuffix("x2")
        high, low = (
            formats.to_bits(_to_half(block.numbers(each, of), half), half) for each in operands
        )
        both = (high.astype(np.uint32) << np.uint32(16)) | low
        block.set_bits(target, both, mask)
        return
    values = block.numbers(operands[0], of)
    if "ftz" in instruction and formats.is_float(of):
        values = formats.flush_subnormals(values)
    rounding = _ROUNDING.get(instruction.one_of(_ROUNDING))
    if formats.is_float(of) and not formats.is_float(to):
        result = _to_integer((rounding or np.trunc)(values.astype(np.float64)), to)
    elif formats.is_float(to):
        result = _to_half(rounding(values) if rounding else values, to)
        if "sat" in instruction:
            result = np.clip(result, 0, 1)
        if "ftz" in instruction:
            result = formats.flush_subnormals(result)
    else:
        # Extended by the sign of the source.
        wide = values.astype(np.int64 if of[0] == "s" else np.uint64)
        result = wide.astype((SIGNED if to[0] == "s" else UNSIGNED)[BITS[to]])
    block.set_numbers(target, result, to, mask)


def _to_half(values: np.ndarray, kind: str) -> np.ndarray:
    # `to_bits` rounds float32 to bfloat16.
    return values.astype(np.float32 if kind == "bf16" else FLOAT[BITS[kind]])


def _to_integer(values: np.ndarray, kind: str) -> np.ndarray:
    """Return integral values as integers, saturated; 0 for NaN."""
    width, is_signed = BITS[kind], kind[0] == "s"
    low = -(1 << width - 1) if is_signed else 0
    high = (1 << width - is_signed) - 1
    clamped = [0 if math.isnan(x) else min(max(x, low), high) for x in values.tolist()]
    dtype = (SIGNED if is_signed else UNSIGNED)[width]
    return np.array([int(x) for x in clamped], dtype=object).astype(dtype)
