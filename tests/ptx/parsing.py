"""PTX text as kernels, instructions and operands."""

from __future__ import annotations

import copy
import ctypes
import re
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import cached_property

from ptx.formats import BITS

_SPECIAL = ("tid", "ntid", "ctaid", "nctaid", "laneid", "warpid")


class Trap(Exception):
    """What a GPU would not do, or must not, at an instruction."""


@dataclass(frozen=True)
class Register:
    name: str
    is_negated: bool = False


@dataclass(frozen=True)
class Special:
    """A register that tells a thread its place, such as `%tid.x`."""

    name: str
    axis: str


@dataclass(frozen=True)
class Immediate:
    """A number; the bits of a float where `0f` or `0d` gives them."""

    value: int | float


@dataclass(frozen=True)
class Symbol:
    """The address of a variable or parameter, and bytes beyond it."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Address:
    base: Operand
    offset: int


@dataclass(frozen=True)
class Several:
    """`{a, b}`, the registers of a vector; or `p|q`, two results."""

    parts: tuple[Operand, ...]


Operand = Register | Special | Immediate | Symbol | Address | Several | None


def split_operands(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth, part = [], 0, ""
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += character
    return [*parts, part.strip()] if part.strip() else parts


class Instruction:
    """One instruction.

    Attributes:
        line: its text.
        base: its name, without modifiers.
        modifiers: what follows the name, in order.
        types: those of the modifiers that are types.
        operands: the results first.
        predicate: the register that decides which lanes execute it, or None.
    """

    def __init__(self, line: str, registers: Container[str]) -> None:
        self.line = line
        self.predicate: Register | None = None
        if line.startswith("@"):
            guard, line = line.split(None, 1)
            self.predicate = Register(guard.lstrip("@!"), guard[1] == "!")
        match = re.match(r"[\w.:]+", line)
        assert match is not None
        self.base, *modifiers = match.group(0).split(".")
        self.modifiers = tuple(modifiers)
        self.types = [modifier for modifier in modifiers if modifier in BITS]
        texts = split_operands(line[match.end() :])
        if self.base in ("bra", "call"):
            self.operands: list[Operand] = [Symbol(texts[-1])]
        else:
            self.operands = [_operand(text, registers) for text in texts]

    @cached_property
    def kind(self) -> str:
        """Its last type."""
        return self.types[-1]

    def one_of(self, names: object, default: str = "") -> str:
        """Return the first modifier that is among `names`."""
        return next((name for name in self.modifiers if name in names), default)  # type: ignore[operator]

    def __contains__(self, modifier: str) -> bool:
        return modifier in self.modifiers

    @cached_property
    def vector(self) -> int:
        """The number of elements that a load or a store moves."""
        match = re.search(r"\.v([248])\b", self.line)
        return int(match.group(1)) if match else 1

    @cached_property
    def space(self) -> str:
        """The state space of a load or store, or "" for generic addresses."""
        names = (modifier.partition("::")[0] for modifier in self.modifiers)
        return next((n for n in names if n in ("global", "shared", "param", "local", "const")), "")


def _operand(text: str, registers: Container[str]) -> Operand:
    text = text.strip()
    if text == "_":
        return None
    if text[0] == "{":
        return Several(tuple(_operand(part, registers) for part in split_operands(text[1:-1])))
    if "|" in text:
        return Several(tuple(_operand(part, registers) for part in text.split("|")))
    if text[0] == "[":
        match = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if match is None:
            raise Trap(f"address {text}")
        return Address(_operand(match.group(1), registers), int(match.group(2) or "0", 0))
    if text[0] == "!":
        return Register(text[1:], True)
    if text[0] == "%":
        name, _, axis = text[1:].partition(".")
        return Special(name, axis) if name in _SPECIAL else Register(text)
    if text in registers:
        return Register(text)
    if re.match(r"0[fFdD][0-9a-fA-F]+$", text):
        return Immediate(int(text[2:], 16))
    if re.match(r"[-+]?[\d.]", text):
        try:
            return Immediate(int(text.rstrip("U"), 0))
        except ValueError:
            return Immediate(float(text))
    match = re.fullmatch(r"([\w$]+)(?:\s*\+\s*(\d+))?", text)
    if match is None:
        raise Trap(f"operand {text}")
    return Symbol(match.group(1), int(match.group(2) or 0))


class Kernel:
    """One entry of a PTX module.

    Args:
        text: the module.
        entry: a part of the entry's name; the first entry by default.

    Attributes:
        name: of the entry.
        directives: what the entry asks of the device, such as `.maxntid 256`.
        params: offset and bytes of each parameter, by name.
        param_bytes: of all.
        instructions: in order.
        labels: the index of the instruction after each label.
        shared: offsets of the variables in shared memory; `shared_bytes` of all.
        local: offsets of the variables in a thread's stack; `local_bytes` of all.
        data: the module's global and constant variables.
    """

    def __init__(self, text: str, entry: str = "") -> None:
        text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
        text = re.sub(r"//[^\n]*", "", text)
        self.shared: dict[str, int] = {}
        self.shared_bytes = 0
        self.dynamic_shared: str | None = None
        self.local: dict[str, int] = {}
        self.local_bytes = 0
        self.data: dict[str, ctypes.Array[ctypes.c_ubyte]] = {}
        self._widths: dict[str, int] = {}
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self._module_variables(text)
        for match in re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", text, re.S):
            if entry in match.group(1):
                break
        else:
            raise Trap(f"no entry {entry}")
        self.name = match.group(1)
        self.directives = " ".join(match.group(3).split())
        self.params, self.param_bytes = _parameters(match.group(2))
        depth, end = 1, match.end()
        while depth:
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
        self._body(text[match.end() : end - 1])

    def with_lines(self, change: Callable[[int, str], str]) -> Kernel:
        """Return a kernel whose instructions have the text that `change` makes of theirs.

        Args:
            change: takes an instruction's index and text; one that it leaves empty does nothing.
        """
        result = copy.copy(self)
        result.instructions = []
        for index, instruction in enumerate(self.instructions):
            line = change(index, instruction.line)
            if line != instruction.line:
                instruction = Instruction(line or "fence", self._widths)
            result.instructions.append(instruction)
        return result

    @classmethod
    def names(cls, text: str) -> list[str]:
        """Return the entries of a module."""
        return re.findall(r"\.entry\s+([\w$]+)\s*\(", text)

    def width(self, register: str) -> int:
        """Return the bits of a register."""
        for name in (register, register.rstrip("0123456789")):
            if name in self._widths:
                return self._widths[name]
        raise Trap(f"register {register} is not declared")

    @cached_property
    def granule(self) -> int:
        """The bytes that every access to shared or global memory is a multiple of, and aligned to.

        Each access is aligned to its width, so memory can be watched in units of the least one.
        """
        widths = [
            BITS[each.kind] // 8 * each.vector
            for each in self.instructions
            if each.base in ("ld", "ldu", "st") and each.space in ("", "shared", "global")
        ]
        return min([*widths, 4])

    def _module_variables(self, text: str) -> None:
        # In the first column, as those of entries are not.
        pattern = (
            r"^(?:\.(?:visible|extern|weak)\s+)*\.(global|const|shared)\s+"
            r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?\s*(?:=\s*([^;]+))?;"
        )
        for match in re.finditer(pattern, text, re.M):
            space, align, kind, name, count, values = match.groups()
            if space == "shared" and count == "":
                self.dynamic_shared = name
            elif space == "shared":
                self._declare_shared(name, kind, count, align)
            else:
                self.data[name] = _initialised(kind, int(count or 1), values or "")

    def _declare_shared(self, name: str, kind: str, count: str | None, align: str | None) -> None:
        alignment = int(align or BITS[kind] // 8)
        self.shared[name] = -(-self.shared_bytes // alignment) * alignment
        self.shared_bytes = self.shared[name] + BITS[kind] // 8 * int(count or 1)

    def _body(self, body: str) -> None:
        pending = ""
        for raw in body.splitlines():
            line = " ".join(raw.split())
            while line:
                if not pending:
                    label = re.match(r"^([\w$]+):\s*", line)
                    if label and not line.startswith("."):
                        self.labels[label.group(1)] = len(self.instructions)
                        line = line[label.end() :]
                        continue
                    if line[0] in "{}":
                        line = line[1:].strip()
                        continue
                    if re.match(r"^\.(loc|file|pragma|section|branchtargets)\b", line):
                        line = line.partition(";")[2].strip()
                        continue
                statement, semicolon, line = line.partition(";")
                line = line.strip()
                pending += statement + " "
                if semicolon:
                    self._statement(pending.strip())
                    pending = ""

    def _statement(self, text: str) -> None:
        if not text.startswith("."):
            if text:
                self.instructions.append(Instruction(text, self._widths))
            return
        match = re.match(r"^\.reg\s+\.(\w+)\s+(.+)$", text)
        if match:
            for name in split_operands(match.group(2)):
                # `%r<8>` declares %r0 to %r7.
                self._widths[name.partition("<")[0]] = BITS[match.group(1)]
            return
        match = re.match(
            r"^\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?", text
        )
        if match is None:
            return
        space, align, kind, name, count = match.groups()
        if space == "shared":
            self._declare_shared(name, kind, count, align)
        else:
            alignment = int(align or 1)
            self.local[name] = -(-self.local_bytes // alignment) * alignment
            self.local_bytes = self.local[name] + BITS[kind] // 8 * int(count or 1)


def _parameters(text: str) -> tuple[dict[str, tuple[int, int]], int]:
    params, offset = {}, 0
    for declaration in split_operands(text):
        name = re.search(r"\.(?:\w+)(?:\s+\.ptr[^%]*?)?\s+([\w$]+)(?:\[(\d+)\])?$", declaration)
        kind = re.search(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)", declaration)
        align = re.search(r"\.align\s+(\d+)", declaration)
        assert name is not None and kind is not None
        element = BITS[kind.group(1)] // 8
        size = element * int(name.group(2) or 1)
        # `.ptr .align` is of what a pointer points to.
        step = int(align.group(1)) if align and name.group(2) else element
        offset = -(-offset // step) * step
        params[name.group(1)] = (offset, size)
        offset += size
    return params, offset


def _initialised(kind: str, count: int, text: str) -> ctypes.Array[ctypes.c_ubyte]:
    width = BITS[kind] // 8
    raw = bytearray(max(width * count, 1))
    for k, value in enumerate(re.findall(r"0[fFdD][0-9a-fA-F]+|-?0x[0-9a-fA-F]+|-?\d+", text)):
        number = int(value[2:], 16) if value[:2].lower() in ("0f", "0d") else int(value, 0)
        encoded = (number & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        raw[k * width : (k + 1) * width] = encoded
    return (ctypes.c_ubyte * len(raw)).from_buffer(raw)
