"""Find registers of a Hopper kernel that are used while a ``wgmma`` product still needs them, in its machine code.

``wgmma`` is asynchronous. Until a wait for it, nothing may write to the registers of its left operand, nor read or
write those of its sums; the hardware does not check this. Products form groups: ``HGMMA ..., gsb0`` ends one, and
``WARPGROUP.DEPBAR.LE gsb0, n`` waits until at most n groups run.

:func:`hazards` walks every path through a kernel with the products in flight as its state, including the first and
last step of loops and the exits. An unknown kind of branch is a ValueError. A predicated instruction is taken as
executed and as skipped.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

#: More than any kernel has; it ends the walk through a loop that starts products and never waits.
MOST_GROUPS = 64
#: Registers that hold the left operand of one product: 64 x 32 bytes over 128 threads.
LEFT = 4

_PREDICATE = re.compile(r"@(!?)(U?P(?:T|\d+)) ")
_PRODUCT = re.compile(r"[HQI]GMMA\.64x(\d+)x\d+\.(F32|F16|S32)\S* R(\d+), (?:R(\d+)\S*, )?(?:gdesc|\!?U?P)")

#: Instructions that read their first operand.
_READERS = re.compile(r"ST|\w?SETP|RED\b|BAR|SYNCS\.ARR|UTMA|UBLKCP|CCTL|R2UR|R2P|FCHK|NANOSLEEP|WARPSYNC")
#: Instructions that may branch, from CUDA's list for Hopper; kernels here have few of them.
_JUMPS = re.compile(r"(EXIT|KILL|RET|BRA|CALL|BSSY|BSYNC|BREAK|BRX|BRXU|JMP|JMX|JMXU|RPCMOV|RTT|BPT)\b")
_LABELS = (".L", "$")


@dataclass(frozen=True)
class _Running:
    """A product in flight: the registers of its sums, and those of its left operand, if any."""

    sums: range
    left: range


_Groups = tuple[tuple[_Running, ...], ...]


@dataclass(frozen=True)
class _State:
    """Where a path is, and what came before."""

    line: int
    groups: _Groups = ((),)  # oldest first, the last still open
    budget: int | None = None  # registers that it may use
    returns: tuple[int, ...] = ()  # lines that calls go back to, the innermost last
    joins: tuple[tuple[str, int], ...] = ()  # where threads that part here meet again, by barrier


def hazards(lines: Sequence[str]) -> list[str]:
    """What a kernel does wrong on some path.

    Args:
        lines: instructions and labels, as :func:`tests.sass.parsed` gives them.

    Returns:
        Lines ``"instruction: why"``, in the order of the code.

    Raises:
        ValueError: If control flow or a product cannot be analysed.
    """
    labels = {text: place for place, text in enumerate(lines) if text.startswith(_LABELS)}
    found: set[tuple[int, str]] = set()
    start = _State(0)
    seen, open_ = {start}, [start]
    while open_:
        state = open_.pop()
        if state.line >= len(lines):
            raise ValueError(f"a path runs past the last instruction, {lines[-1]!r}")
        text = lines[state.line]
        found |= {(state.line, why) for why in _wrong(text, state)}
        executed, skipped = _executed(text)
        groups = {_groups(text, state.groups)} if executed else set[_Groups]()
        groups |= {state.groups} if skipped else set()
        if any(len(some) > MOST_GROUPS for some in groups):
            raise ValueError(f"more than {MOST_GROUPS} groups of products in flight at {text!r}")
        budget = _budget(text, state.budget)
        joins = _joins(text, state.joins, labels)
        for (line, returns), some in itertools.product(_next(text, state, labels), groups):
            after = _State(line, some, budget, returns, joins)
            if after not in seen:
                seen.add(after)
                open_.append(after)
    return [f"{lines[line]}: {why}" for line, why in sorted(found)]


def products(lines: Sequence[str]) -> list[bool]:
    """For each product of a kernel, in order, whether its left operand is in registers."""
    return [bool(match[4]) for text in lines if (match := _PRODUCT.search(text))]


@functools.cache
def _product(text: str) -> _Running | None:
    if "GMMA" not in text:
        return None
    match = _PRODUCT.search(text)
    if match is None:
        raise ValueError(f"expected a product as wgmma's are written, got {text!r}")
    columns, kind, sums, left = int(match[1]), match[2], int(match[3]), match[4]
    count = columns // (4 if kind == "F16" else 2)
    return _Running(range(sums, sums + count), range(int(left), int(left) + LEFT) if left else range(0))


@functools.cache
def _executed(text: str) -> tuple[bool, bool]:
    """Whether an instruction may be executed, and whether it may be skipped."""
    guard = _PREDICATE.match(text)
    if guard is None:
        return True, False
    if guard[2].endswith("PT"):
        return guard[1] == "", guard[1] == "!"
    return True, True


def _groups(text: str, groups: _Groups) -> _Groups:
    """The groups in flight after an instruction."""
    if product := _product(text):
        groups = (*groups[:-1], (*groups[-1], product))
        return (*groups, ()) if "gsb0" in text else groups
    if wait := re.search(r"WARPGROUP\.DEPBAR\S* gsb0, (0x[0-9a-f]+)", text):
        *closed, last = groups
        return (*closed[max(0, len(closed) - int(wait[1], 16)) :], last)
    return groups


def _budget(text: str, budget: int | None) -> int | None:
    match = re.search(r"\bUSETMAXREG\.\S* (?:UP\d, )?(0x[0-9a-f]+)", text)
    return int(match[1], 16) if match else budget


def _joins(text: str, joins: tuple[tuple[str, int], ...], labels: dict[str, int]) -> tuple[tuple[str, int], ...]:
    match = re.search(r"\bBSSY(?:\.\S+)? (B\d+), `\((\.L_x_\d+)\)", text)
    return tuple(sorted((dict(joins) | {match[1]: labels[match[2]]}).items())) if match else joins


def _next(text: str, state: _State, labels: dict[str, int]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Where a path can continue, and where its calls then return."""
    guard = _PREDICATE.match(text)
    bare = text[guard.end() :] if guard else text
    executed, skipped = _executed(text)
    always = not skipped
    jump = _JUMPS.match(bare)
    if jump is None or not executed:
        yield state.line + 1, state.returns
        return
    name, targets = jump[1], [labels[t] for t in re.findall(r"`\(([^)]+)\)", bare) if t in labels]
    if name == "RET":
        if not state.returns:
            raise ValueError(f"a return without a call: {text!r}")
        yield state.returns[-1], state.returns[:-1]
    elif name in ("BRA", "CALL"):
        if len(targets) != 1:
            raise ValueError(f"expected one label of this kernel to branch to, got {text!r}")
        yield targets[0], (*state.returns, state.line + 1) if name == "CALL" else state.returns
        # besides its predicate a branch can ask the warp: BRA.DIV UR4, BRA.U UP0
        always = always and bool(re.fullmatch(r"(BRA|CALL\.REL\.NOINC) `\([^)]+\)", bare))
    elif name in ("BRX", "BRXU") and (listed := re.search(r"BRANCH_TARGETS ([^\"]+)", bare)):
        for target in listed[1].split(","):
            yield labels[target.strip()], state.returns
    elif name in ("BSSY", "BSYNC", "BREAK"):
        barrier = re.search(r"\bB\d+\b", bare)
        if name == "BSYNC" and barrier and (join := dict(state.joins).get(barrier[0])) is not None:
            yield join, state.returns
        always = False
    elif name != "EXIT":
        raise ValueError(f"control flow that is not known here: {text!r}")
    if not always:
        yield state.line + 1, state.returns


def _wrong(text: str, state: _State) -> Iterator[str]:
    """What an instruction does that the products in flight, or the register budget, forbid."""
    if text.startswith(_LABELS) or not _executed(text)[0]:
        return
    running = [product for group in state.groups for product in group]
    if state.budget is None and not running:
        return
    new = _product(text)
    written, read = (set(new.sums), set(new.left)) if new else (_written(text), _read(text))
    if state.budget is not None and (used := max(written | read, default=-1)) >= state.budget:
        yield f"R{used} is beyond the {state.budget} registers of this warpgroup"
    if not running:
        return
    if new:
        for old in running:
            if new.sums != old.sums and set(new.sums) & set(old.sums):
                yield "its sums are part of those of a product in flight"
            if set(new.sums) & set(old.left):
                yield "its sums are the left operand of a product in flight"
            if set(new.left) & set(old.sums):
                yield "its left operand is being written by a product in flight"
        return
    if re.match(r"EXIT\b", re.sub(_PREDICATE, "", text)):
        yield "ends while a product is in flight"
    for old in running:
        if written & set(old.left):
            yield "writes to the left operand of a product in flight"
        if written & set(old.sums):
            yield "writes to the sums of a product in flight"
        if read & set(old.sums):
            yield "reads the sums of a product in flight"


def _parts(text: str) -> tuple[str, list[str]]:
    """Opcode and operands, without the guard and without predicates that are results."""
    bare = re.sub(_PREDICATE, "", text)
    opcode, _, rest = bare.partition(" ")
    operands = [operand.strip() for operand in rest.split(",") if operand.strip()]
    while operands and re.fullmatch(r"U?P(T|\d+)", operands[0]):
        operands = operands[1:]
    return opcode, operands


def _width(opcode: str) -> int:
    """Number of registers of the value that an instruction moves or computes."""
    if re.search(r"\.256\b", opcode):
        return 8
    if re.search(r"\.128\b", opcode) or opcode.endswith(".4") or re.match(r"[HI]MMA\b", opcode):
        return 4
    if re.search(r"\.64\b|\.WIDE\b|\.F64\b", opcode) or opcode.endswith(".2"):
        return 2
    if re.match(r"D(ADD|MUL|FMA)\b|CS2R\b(?!\.32)", opcode):
        return 2
    return 1


@functools.cache
def _written(text: str) -> frozenset[int]:
    """General registers that an instruction writes."""
    opcode, operands = _parts(text)
    if not operands or _READERS.match(opcode):
        return frozenset()
    first = re.match(r"R(\d+)\b", operands[0])
    if first is None:
        return frozenset()
    return frozenset(range(int(first[1]), int(first[1]) + _width(opcode)))


@functools.cache
def _read(text: str) -> frozenset[int]:
    """General registers that an instruction reads, including all of wide values and 64-bit addresses."""
    opcode, operands = _parts(text)
    stores = _READERS.match(opcode)
    if operands and not stores and re.match(r"R\d+\b", operands[0]):
        operands = operands[1:]
    found: set[int] = set()
    for place, operand in enumerate(operands):
        data = _width(opcode) if stores else min(_width(opcode), 2)
        # of a wide product only the addend has two registers; an address has two if it says so
        if operand.startswith(("[", "desc")) or (".WIDE" in opcode and place < len(operands) - 1):
            data = 1
        for number, pair in re.findall(r"\bR(\d+)(?:\.reuse)?(\.64)?", operand):
            found |= set(range(int(number), int(number) + (2 if pair else data)))
    return frozenset(found)
