"""What a compiled program moves, read from XLA's text of it. Loops count as often as they run.

XLA's own cost analysis counts the body of a loop once, and has no collectives.
The text is XLA's dump of the optimised module, `compiled.as_text()`.
It has one instruction per line and computations in braces. `ENTRY` marks the computation that runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
# Bits of the types whose name does not tell them; token and opaque have none.
BITS = {"pred": 8, "c64": 64, "c128": 128}
HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
LINE = re.compile(r"^\s+(ROOT )?%([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
# Instructions that move nothing: they name values, or run other instructions.
STILL = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota"),
    *("while", "conditional", "call", "async-start", "async-update", "after-all"),
    *("partition-id", "replica-id", "opt-barrier"),
}
STILL_TARGETS = {"ConcatBitcast", "AllocateBuffer", "AssumeGatherIndicesInBound"}
SLICES = ("dynamic-slice", "slice", "gather")


@dataclass(frozen=True)
class Instruction:
    """One line: `name = result opcode(operands), attributes`.

    rest: everything after the opening bracket.
    """

    name: str
    result: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """The names of the operands."""
        return re.findall(r"%([\w.-]+)", self.rest[: _closing(self.rest)])

    def attribute(self, name: str) -> str | None:
        """The computation or number of an attribute, or None without the attribute."""
        found = re.search(rf"\b{name}=%?([\w.-]+)", self.rest)
        return found.group(1) if found else None


@dataclass(frozen=True)
class Module:
    """A program: its computations with their instructions, by name.

    entry: the name of the computation that runs.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str


@dataclass
class Moved:
    """Collectives of one kind in one run: how many, and the bytes that each device sends."""

    count: int = 0
    bytes: float = 0.0


def parse(text: str) -> Module:
    """The module that XLA's text describes. Lines without an instruction are skipped."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", {}
    for line in text.splitlines():
        header = HEADER.match(line)
        if header:
            current = computations.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
            continue
        found = LINE.match(line)
        if found:
            _, name, result, opcode, rest = found.groups()
            current[name] = Instruction(name, result, opcode, rest)
    return Module(computations, entry)


def size(shape: str) -> int:
    """Bytes of a shape such as bf16[8,128]{1,0}, or of a tuple of shapes, without padding."""
    return sum(
        _bytes(kind, [int(d) for d in dims.split(",") if d])
        for kind, dims, _ in SHAPE.findall(shape)
    )


def occupied(shape: str, main_memory: bool = True) -> int:
    """Bytes of a shape, or of a tuple of shapes, with its padding.

    f32[64,64]{1,0:T(8,128)} is padded to tiles of 8 x 128.

    main_memory: leave out the memory on the chip, where layouts have S(1).
    """
    total = 0
    for kind, dims, layout in SHAPE.findall(shape):
        if main_memory and re.search(r"S\([1-9]", layout):
            continue
        lengths = [int(d) for d in dims.split(",") if d]
        order, _, tiles = layout.partition(":")
        minor_first = [lengths[int(axis)] for axis in order.split(",") if axis] or lengths[::-1]
        tile = re.match(r"T\(([\d,]+)\)", tiles)
        steps = [int(n) for n in tile.group(1).split(",")] if tile else []
        for position, step in enumerate(reversed(steps)):
            minor_first += [1] * (position >= len(minor_first))
            minor_first[position] = -(-minor_first[position] // step) * step
        total += _bytes(kind, minor_first)
    return total


def _bytes(kind: str, lengths: list[int]) -> int:
    named = re.match(r"[a-z]+(\d+)", kind)
    return math.prod(lengths) * BITS.get(kind, int(named.group(1)) if named else 0) // 8


def trips(module: Module, loop: Instruction, where: dict[str, Instruction]) -> int | None:
    """How often the body of a `while` runs, or None where the text does not tell.

    Some loops have a note by XLA.
    In others, such as those of `jax.lax.scan`, the condition compares a counter with a constant.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
    if known:
        return int(known.group(1))
    compared = _compared(module, module.computations.get(loop.attribute("condition") or "", {}))
    operands = compared[0] if len(compared) == 1 else []
    found = [b for b in map(_constant, operands) if b is not None]
    counter = next((i for i in operands if i.opcode == "get-tuple-element"), None)
    if len(found) != 1 or counter is None:
        return None
    return found[0] - _start(loop, where, counter)


def _compared(module: Module, condition: dict[str, Instruction]) -> list[list[Instruction]]:
    """The operands of every comparison by < in a loop's condition.

    A parameter of a fusion is replaced by the value that the fusion is given.
    """

    def outside(outer: Instruction, x: Instruction) -> Instruction:
        number = re.match(r"\d+", x.rest) if x.opcode == "parameter" else None
        return condition[outer.operands[int(number[0])]] if number else x

    found = []
    for outer in condition.values():
        inside = inside_of(module, outer)
        for i in inside.values() or (outer,):
            if i.opcode == "compare" and "direction=LT" in i.rest:
                given = [x for x in map((inside or condition).get, i.operands) if x]
                found.append([outside(outer, x) for x in given] if inside else given)
    return found


def inside_of(module: Module, instruction: Instruction) -> dict[str, Instruction]:
    """The instructions of a fusion; none of anything else."""
    called = instruction.attribute("calls") if instruction.opcode == "fusion" else None
    return module.computations.get(called or "", {})


def walk(
    module: Module, name: str | None = None, times: int = 1
) -> Iterator[tuple[dict[str, Instruction], Instruction, int]]:
    """(computation, instruction, how often it runs) of everything outside fusions.

    All branches of a conditional count. A loop of unknown length counts once.
    A computation that the text lacks does not count.
    """
    where = module.computations[module.entry] if name is None else module.computations.get(name, {})
    for instruction in where.values():
        yield where, instruction, times
        if instruction.opcode == "while":
            count = trips(module, instruction, where)
            rounds = times * (1 if count is None else count)
            yield from walk(module, instruction.attribute("body") or "", rounds)
        elif instruction.opcode in ("call", "async-start"):
            called = instruction.attribute("to_apply") or instruction.attribute("calls")
            yield from walk(module, called or "", times)
        elif instruction.opcode == "conditional":
            for branch in re.findall(r"%([\w.-]+)", re.sub(r"^.*?\), ", "", instruction.rest)):
                if branch in module.computations:
                    yield from walk(module, branch, times)


def collectives(module: Module, devices: int) -> dict[str, Moved]:
    """Kind -> count and bytes of the collectives of one run, as a ring sends them.

    A device that puts in x bytes, in a group of n, sends:

        all-reduce                  2 (n-1)/n x
        reduce-scatter, all-to-all  (n-1)/n x
        all-gather                  (n-1) x
        collective-permute          x

    On a TPU a reduce-scatter is a fusion of an all-reduce with a slice.
    An all-gather beside other work stands in several fusions of one chain, and is counted once.
    """
    moved: dict[str, Moved] = {}
    chains = set()
    for where, instruction, times in walk(module):
        fused = inside_of(module, instruction)
        for found in fused.values() or (instruction,):
            kind = found.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            chain = re.search(r'chain_id="(\d+)"', found.rest)
            if chain and fused:
                mark = (id(where), chain.group(1), found.attribute("channel_id"))
                if mark in chains:
                    continue
                chains.add(mark)
            called = instruction.attribute("calls") or ""
            if kind == "all-reduce" and called.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            given = sum(size((fused or where)[name].result) for name in found.operands)
            total = moved.setdefault(kind, Moved())
            total.count += times
            total.bytes += times * given * _share(kind, group(found.rest, devices))
    return dict(sorted(moved.items()))


def _share(kind: str, n: int) -> float:
    """Bytes that a device sends, over the bytes that it puts in, in a group of n."""
    whole = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1.0, "collective-permute": 1.0}
    return whole.get(kind, (n - 1) / n)


def traffic(module: Module, main_memory: bool = True) -> int:
    """Bytes that one run reads and writes: operands and results of every instruction that runs.

    Layouts count with their padding. Nothing counts between the parts of a fusion.
    Where a fusion only slices an array, the slices count.
    Where it only updates an array in place, the update counts.

    main_memory: leave out the memory on the chip.
    """
    return sum(times * _moved(module, where, i, main_memory) for where, i, times in walk(module))


def _moved(
    module: Module, where: dict[str, Instruction], found: Instruction, main_memory: bool
) -> int:
    """Bytes that one instruction reads and writes."""
    target = re.search(r'custom_call_target="(\w+)"', found.rest)
    still = found.opcode in STILL or found.opcode.endswith("-done")
    if still or (target and target.group(1) in STILL_TARGETS):
        return 0
    operands = [where.get(name) for name in found.operands]
    given = [0 if x is None else occupied(x.result, main_memory) for x in operands]
    made = occupied(found.result, main_memory)
    if found.opcode.endswith("-start"):  # its result is a tuple: operands, results, flags
        made -= sum(given)
        whole = sum(occupied(x.result, False) for x in operands if x is not None)
        given = [min(sum(given), occupied(found.result, False) - whole)]
    elif found.opcode in SLICES:
        given = [min(given[0], made)]
    elif found.opcode == "dynamic-update-slice":
        made = given[1]
        given = given[1:2]
    elif found.opcode == "fusion":
        inside = inside_of(module, found)
        for number, whole in enumerate(given):
            part, updated = _used(module, inside, number)
            given[number] = int(min(part, whole))
            made -= (whole - given[number]) * updated
    return sum(given) + max(made, 0)


def _used(module: Module, inside: dict[str, Instruction], number: int) -> tuple[float, bool]:
    """(bytes that a fusion uses of a parameter, whether it updates a part of it in place).

    The bytes are inf where it uses all of them.
    """
    names: set[str] = set()
    part, updated = 0.0, False
    for found in inside.values():
        if found.opcode == "parameter" and found.rest.startswith(f"{number})"):
            names.add(found.name)
            continue
        operands = found.operands
        if not names.intersection(operands):
            continue
        if found.opcode == "bitcast":
            names.add(found.name)
        elif found.opcode in SLICES and not names.intersection(operands[1:]):
            part += occupied(found.result, False)
        elif found.opcode == "dynamic-update-slice" and not names.intersection(operands[1:]):
            part, updated = part + occupied(inside[operands[1]].result, False), True
        elif found.opcode == "fusion":  # a fusion inside the fusion
            within = inside_of(module, found)
            for position, name in enumerate(operands):
                if name in names:
                    inner, changed = _used(module, within, position)
                    part, updated = part + inner, updated or changed
        else:
            return math.inf, False
    return (part, updated) if names else (math.inf, False)


def group(attributes: str, devices: int) -> int:
    """How many devices are in a group of a collective; all of them where it names no groups.

    XLA writes replica_groups in three ways.
    """
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return len(listed.group(1).split(","))
    folded = re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes)
    if folded:
        return int(folded.group(1))
    meshed = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes)
    if meshed:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", meshed.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", meshed.group(2)))
    return devices


def _closing(text: str) -> int:
    """Where the bracket closes that opened just before the text."""
    depth = 1
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return position
    return len(text)


def _constant(instruction: Instruction) -> int | None:
    found = re.match(r"(-?\d+)\)", instruction.rest) if instruction.opcode == "constant" else None
    return int(found.group(1)) if found else None


def _start(loop: Instruction, where: dict[str, Instruction], counter: Instruction) -> int:
    """The counter's first value: 0, or another constant that the loop is given."""
    given = where.get(loop.operands[0])
    if given is None or given.opcode != "tuple":
        return 0
    first = where.get(given.operands[int(counter.attribute("index") or 0)])
    while first is not None and first.opcode in ("copy", "bitcast"):
        first = where.get(first.operands[0])
    return (_constant(first) if first is not None else None) or 0
