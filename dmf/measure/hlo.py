"""What a compiled program moves between devices, read from XLA's text of it, with loops counted as often as they run.

XLA's own cost analysis counts the body of a loop once, and says nothing of collectives. The text is XLA's dump of the optimised
module (`compiled.as_text()`): one instruction per line, computations in braces, `ENTRY` before the one that runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
BITS = {
    "pred": 8,
    "c64": 64,
    "c128": 128,
}  # of the types whose name does not say them; token and opaque have none
HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
LINE = re.compile(r"^\s+(ROOT )?%([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
# Instructions that move nothing themselves: names for what is there already, or for what other instructions do.
STILL = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
}
STILL_TARGETS = {"ConcatBitcast", "AllocateBuffer", "AssumeGatherIndicesInBound"}
STILL |= {"partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "iota"}


@dataclass(frozen=True)
class Instruction:
    """One line: `name = result opcode(operands), attributes`, of which `rest` is all that follows the opening bracket."""

    name: str
    result: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.-]+)", self.rest[: _closing(self.rest)])

    def attribute(self, name: str) -> str | None:
        """The computation or number that an attribute names, None where there is none."""
        found = re.search(rf"\b{name}=%?([\w.-]+)", self.rest)
        return found.group(1) if found else None


@dataclass(frozen=True)
class Module:
    """A program: its computations by name, each with its instructions by name, and the one that runs."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


@dataclass
class Moved:
    """Collectives of one kind in one run of the program: how many, and the bytes that each device sends."""

    count: int = 0
    bytes: float = 0.0


def parse(text: str) -> Module:
    """XLA's text of a module -> its computations. Lines that are no instruction are passed over."""
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
    """Bytes of a shape such as bf16[8,128]{1,0} or of a tuple of them, without what its layout pads."""
    return sum(
        _bytes(kind, [int(d) for d in dims.split(",") if d])
        for kind, dims, _ in SHAPE.findall(shape)
    )


def occupied(shape: str, main_memory: bool = True) -> int:
    """Bytes that a shape, or a tuple of them, takes: f32[64,64]{1,0:T(8,128)} is padded to tiles of 8 x 128.

    main_memory: only of what lies there; a layout with S(1) is in the memory on the chip.
    """
    total = 0
    for kind, dims, layout in SHAPE.findall(shape):
        if main_memory and re.search(r"S\([1-9]", layout):
            continue
        lengths = [int(d) for d in dims.split(",") if d]
        order, _, tiles = layout.partition(":")
        minor_first = [lengths[int(axis)] for axis in order.split(",") if axis] or lengths[::-1]
        tile = re.match(r"T\(([\d,]+)\)", tiles)
        for position, step in enumerate(
            reversed([int(n) for n in tile.group(1).split(",")] if tile else [])
        ):
            minor_first += [1] * (position >= len(minor_first))
            minor_first[position] = -(-minor_first[position] // step) * step
        total += _bytes(kind, minor_first)
    return total


def _bytes(kind: str, lengths: list[int]) -> int:
    named = re.match(r"[a-z]+(\d+)", kind)
    return math.prod(lengths) * BITS.get(kind, int(named.group(1)) if named else 0) // 8


def trips(module: Module, loop: Instruction, where: dict[str, Instruction]) -> int | None:
    """How often the body of a `while` runs, None where the text does not say.

    XLA notes it, or the condition compares a counter with the loop's only whole-number constant, as `jax.lax.scan` makes it.
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
    """What a loop's condition compares by <, of each such comparison; in a fusion a parameter is what the fusion is given."""
    found = []
    for outer in condition.values():
        inside = (
            module.computations.get(outer.attribute("calls") or "", {})
            if outer.opcode == "fusion"
            else {}
        )
        for i in inside.values() or (outer,):
            if i.opcode == "compare" and "direction=LT" in i.rest:
                given = [x for x in map((inside or condition).get, i.operands) if x]
                numbers = [
                    re.match(r"\d+", x.rest) if inside and x.opcode == "parameter" else None
                    for x in given
                ]
                found.append(
                    [
                        condition[outer.operands[int(n[0])]] if n else x
                        for x, n in zip(given, numbers, strict=True)
                    ]
                )
    return found


def walk(
    module: Module, name: str | None = None, times: int = 1
) -> Iterator[tuple[dict[str, Instruction], Instruction, int]]:
    """(computation, instruction, how often it runs) of all that runs by itself; what a fusion holds is not looked into.

    Both branches of a conditional are counted, a loop of unknown length once, and a computation that the text lacks not at all.
    """
    where = module.computations[module.entry] if name is None else module.computations.get(name, {})
    for instruction in where.values():
        yield where, instruction, times
        if instruction.opcode == "while":
            count = trips(module, instruction, where)
            yield from walk(
                module, instruction.attribute("body") or "", times * (1 if count is None else count)
            )
        elif instruction.opcode in ("call", "async-start"):
            yield from walk(
                module,
                instruction.attribute("to_apply") or instruction.attribute("calls") or "",
                times,
            )
        elif instruction.opcode == "conditional":
            for branch in re.findall(r"%([\w.-]+)", re.sub(r"^.*?\), ", "", instruction.rest)):
                if branch in module.computations:
                    yield from walk(module, branch, times)


def collectives(module: Module, devices: int) -> dict[str, Moved]:
    """Kind -> count and bytes of the collectives of one run, by ring: n devices of a group send

        all-reduce 2 (n-1)/n x,   reduce-scatter (n-1)/n x,   all-to-all (n-1)/n x,   all-gather (n-1) x,   permute x

    each, where x is what a device puts in. A TPU's reduce-scatter is a fusion of an all-reduce with a slice, and an all-gather
    that runs beside other work stands in several fusions of one chain: it is counted once.
    """
    moved: dict[str, Moved] = {}
    chains = set()
    for where, instruction, times in walk(module):
        fused = (
            module.computations.get(instruction.attribute("calls") or "", {})
            if instruction.opcode == "fusion"
            else {}
        )
        inside = fused or {instruction.name: instruction}
        for found in inside.values():
            kind = found.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            chain = re.search(r'chain_id="(\d+)"', found.rest)
            if chain and fused:
                mark = (id(where), chain.group(1), found.attribute("channel_id"))
                if mark in chains:
                    continue
                chains.add(mark)
            if kind == "all-reduce" and (instruction.attribute("calls") or "").startswith(
                "all-reduce-scatter"
            ):
                kind = "reduce-scatter"
            given = sum(size((fused or where)[name].result) for name in found.operands)
            n = group(found.rest, devices)
            share = {
                "all-reduce": 2 * (n - 1) / n,
                "all-gather": n - 1.0,
                "collective-permute": 1.0,
            }.get(kind, (n - 1) / n)
            total = moved.setdefault(kind, Moved())
            total.count += times
            total.bytes += times * given * share
    return dict(sorted(moved.items()))


def traffic(module: Module, main_memory: bool = True) -> int:
    """Bytes that one run reads and writes: of each instruction that runs, what it is given and what it makes,
    in the layout it has.

    Of an array that a fusion only slices, the slices count, and of one that it only updates in place, the update; what passes
    between the parts of a fusion is free. main_memory: leave out what lies in the memory on the chip.
    """
    return sum(
        times * _moved(module, where, found, main_memory) for where, found, times in walk(module)
    )


def _moved(
    module: Module, where: dict[str, Instruction], found: Instruction, main_memory: bool
) -> int:
    target = re.search(r'custom_call_target="(\w+)"', found.rest)
    if (
        found.opcode in STILL
        or found.opcode.endswith("-done")
        or (target and target.group(1) in STILL_TARGETS)
    ):
        return 0
    given = [
        occupied(where[name].result, main_memory) if name in where else 0 for name in found.operands
    ]
    made = occupied(found.result, main_memory)
    if found.opcode.endswith(
        "-start"
    ):  # makes a tuple of its operands, what it makes of them, and flags
        made -= sum(given)
        whole = sum(occupied(where[name].result, False) for name in found.operands if name in where)
        given = [min(sum(given), occupied(found.result, False) - whole)]
    elif found.opcode in ("dynamic-slice", "slice", "gather"):
        given = [min(given[0], made)]
    elif found.opcode == "dynamic-update-slice":
        made = given[1]
        given = given[1:2]
    elif found.opcode == "fusion":
        inside = module.computations.get(found.attribute("calls") or "", {})
        uses = [_used(module, inside, number) for number in range(len(given))]
        parts = [int(min(part, whole)) for (part, _), whole in zip(uses, given, strict=True)]
        made -= sum(
            whole - part
            for (_, updated), part, whole in zip(uses, parts, given, strict=True)
            if updated
        )
        given = parts
    return sum(given) + max(made, 0)


def _used(module: Module, inside: dict[str, Instruction], number: int) -> tuple[float, bool]:
    """(bytes that a fusion uses of its parameter, inf for all of them; whether it updates a part of it in place)."""
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
        elif found.opcode in ("dynamic-slice", "slice", "gather") and not names.intersection(
            operands[1:]
        ):
            part += occupied(found.result, False)
        elif found.opcode == "dynamic-update-slice" and not names.intersection(operands[1:]):
            part, updated = part + occupied(inside[operands[1]].result, False), True
        elif found.opcode == "fusion":  # one within the other
            within = module.computations.get(found.attribute("calls") or "", {})
            for position, name in enumerate(operands):
                if name in names:
                    inner, changed = _used(module, within, position)
                    part, updated = part + inner, updated or changed
        else:
            return math.inf, False
    return (part, updated) if names else (math.inf, False)


def group(attributes: str, devices: int) -> int:
    """Devices in each group of a collective, from any of the three ways XLA writes replica_groups; all where it names none."""
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
    """Where the bracket closes that was opened before `text`."""
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
    """The counter's first value: 0 but where the loop is given another constant."""
    given = where.get(loop.operands[0])
    if given is None or given.opcode != "tuple":
        return 0
    first = where.get(given.operands[int(counter.attribute("index") or 0)])
    while first is not None and first.opcode in ("copy", "bitcast"):
        first = where.get(first.operands[0])
    return (_constant(first) if first is not None else None) or 0
