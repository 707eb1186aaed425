"""What a compiled program sends between devices, read from its optimized HLO: no shape is assumed."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

__all__ = [
    "Collective",
    "collectives",
    "link_bytes",
]

KINDS = ("collective-permute", "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-broadcast")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.$-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.$-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,<= ]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.$-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}(,? ?device_ids=\([^)]*\))?")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d, ]*\},? ?)*)\}")


class Collective(NamedTuple):
    """One collective operation of a compiled program.

    Args:
      kind: its HLO name, for example "collective-permute".
      bytes: what one device puts into it, in bytes: the size of its operands.
      count: how often one call of the program executes it.
      groups: for a permute the (source, target) pairs, else the groups of participants; empty where HLO names none,
        which means all devices. Numbers are positions in the mesh's flat order.
    """

    kind: str
    bytes: int
    count: int
    groups: tuple[tuple[int, ...], ...]


def collectives(program: Any) -> tuple[Collective, ...]:
    """The collectives of a program after XLA's optimizations, with the trip counts of the loops around them.

    XLA merges, splits, hoists and removes collectives, so that what a program sends is known only afterwards. A
    conditional counts with all its branches. An asynchronous pair start/done is one operation.

    Args:
      program: `jax.stages.Compiled`, `Lowered` (which is then compiled), or the text of optimized HLO.

    Returns:
      One entry for each instruction that is executed at least once, in the order of the text.

    Raises:
      ValueError: if a collective stands in a loop whose trip count XLA does not know.
      TypeError: if the program is none of these.

    Example:
      >>> collectives(jax.jit(lambda x: x + 1).lower(1.0))  # one device sends nothing
      ()
    """
    if isinstance(program, jax.stages.Lowered):
        program = program.compile()
    if isinstance(program, jax.stages.Compiled):
        program = program.as_text()
    if not isinstance(program, str):
        raise TypeError(f"program must be compiled, lowered or HLO text, got {type(program).__name__}")
    return tuple(_Program(program).executed())


def link_bytes(program: Any) -> dict[tuple[int, int], int]:
    """Bytes that each pair (source, target) of devices exchanges by permutes in one call of the program.

    Args:
      program: as for `collectives`.

    Returns:
      (source, target) -> bytes; a device that sends to itself is left out, because nothing crosses a link.

    Raises:
      ValueError, TypeError: as `collectives`.

    Example:
      >>> hlo = '''
      ... ENTRY %main (x: bf16[2,128,768]) -> bf16[2,128,768] {
      ...   %x = bf16[2,128,768]{2,1,0} parameter(0)
      ...   ROOT %y = bf16[2,128,768]{2,1,0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,2}}
      ... }'''
      >>> link_bytes(hlo)
      {(0, 1): 393216, (1, 2): 393216}
    """
    total: dict[tuple[int, int], int] = {}
    for collective in collectives(program):
        if collective.kind == "collective-permute":
            for source, target in collective.groups:
                if source != target:
                    total[source, target] = total.get((source, target), 0) + collective.bytes * collective.count
    return total


class _Program:
    """Computations by name; instructions are (name, everything right of the equals sign)."""

    def __init__(self, text: str):
        self.computations: dict[str, list[tuple[str, str]]] = {}
        self.entry, lines = None, None
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                lines = self.computations.setdefault(header[2], [])
                self.entry = header[2] if header[1] else self.entry
            elif lines is not None and (instruction := _INSTRUCTION.match(line)):
                lines.append((instruction[1], instruction[2]))
        if self.entry is None:
            raise ValueError("the HLO text has no ENTRY computation; pass compiled.as_text() whole")

    def executed(self, name: str | None = None, times: int = 1) -> Iterator[Collective]:
        """The collectives of a computation that runs so many times, and of all that it calls."""
        sizes = {}
        for result, right in self.computations.get(name or self.entry, ()):
            kind, shape, operands, attributes = _parts(right)
            sizes[result] = _array_bytes(shape)
            if kind.removesuffix("-start") in KINDS:
                sent = sum(sizes[operand] for operand in re.findall(r"%([\w.$-]+)", operands))
                yield Collective(kind.removesuffix("-start"), sent, times, _groups(attributes))
                continue
            known = _TRIPS.search(attributes)
            trips = int(known[1]) if known else 1
            for called in () if kind.endswith(("-done", "-update")) else _called(attributes):
                inside = list(self.executed(called, times * trips))
                if inside and kind == "while" and not known:
                    raise ValueError(
                        f"the loop {result} of the program communicates and XLA does not know its trip count; "
                        "use lax.scan or lax.fori_loop with static bounds"
                    )
                yield from inside if trips else ()


def _parts(right: str) -> tuple[str, str, str, str]:
    """Opcode, result shape, operands and attributes of `shape opcode(operands), attributes`."""
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    shape, rest = right[:end], right[end:].lstrip()
    opcode, start = rest[: rest.index("(")], rest.index("(")
    close = _closing(rest, start)
    return opcode, shape, rest[start + 1 : close], rest[close + 1 :]


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"a parenthesis of the HLO text is not closed: {text[:80]}")


def _array_bytes(shape: str) -> int:
    total = 0
    for name, dims in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", shape)):
        if bits := _bits(name):
            total += math.ceil(bits * math.prod(int(d.lstrip("<= ")) for d in dims.split(",") if d) / 8)
    return total


def _bits(dtype: str) -> int:
    """Bits of an HLO element type; 0 for tokens and opaque values."""
    if dtype == "pred":
        return 8
    width = re.search(r"\d+", dtype)
    return int(width[0]) if width else 0


def _called(attributes: str) -> Iterator[str]:
    yield from _CALLED.findall(attributes)
    for branches in _BRANCHES.findall(attributes):
        yield from (name.strip().lstrip("%") for name in branches.split(","))


def _groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    if found := _MESH.search(attributes):
        sizes = {name.strip("' "): int(size) for name, size in (axis.split("=") for axis in found[1].split(","))}
        chosen = [name.strip("' ") for name in found[2].split(",")]
        if found[3]:
            raise ValueError(f"replica groups over a permuted mesh cannot be read: {found[0]}")
        places = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        axes = [list(sizes).index(name) for name in chosen]
        rows = np.moveaxis(places, axes, range(-len(axes), 0)).reshape(-1, math.prod(sizes[name] for name in chosen))
    elif found := _IOTA.search(attributes):
        shape, dims = ([int(n) for n in text.split(",")] for text in (found[1], found[2]))
        order = [int(n) for n in found[3].split(",")] if found[3] else range(len(dims))
        rows = np.arange(math.prod(dims)).reshape(dims).transpose(tuple(order)).reshape(shape)
    else:
        found = _LISTED.search(attributes)
        groups = re.findall(r"\{([\d, ]*)\}", found[1]) if found else ()
        rows = [[int(n) for n in group.split(",")] for group in groups]
    return tuple(tuple(map(int, row)) for row in rows)
