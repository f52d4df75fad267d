"""What the machine code of a Gluon kernel shows: numbers of instructions, and the order of its waits.

Each warpgroup runs its own loop. A ``BAR.SYNC`` that names 128 threads is a warpgroup's barrier; any other is that of
the whole block. One thread of a warpgroup frees a stage, starts a store, or waits for a store. Only a barrier orders
that with what the other threads did or will do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_WARPGROUP = re.compile(r"\bBAR\.SYNC\S* (?:0x\w+|R\d+), 0x80$")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
_LABELS = (".L", "$")


@dataclass(frozen=True)
class Figures:
    """Counts for the slower of two warpgroups, in instructions of one warp.

    Attributes:
        step: instructions of the product's loop, without those that most steps skip.
        longest: all instructions of the loop.
        after: instructions from the wait for a tile's last product to the next tile.
        barriers: barriers of the warpgroup in a step, and after it.
        block_barriers: barriers of the whole block in a step.
    """

    step: int
    longest: int
    after: int
    barriers: tuple[int, int]
    block_barriers: int


def _loops(lines: Sequence[str]) -> list[tuple[int, int]]:
    """First and last line of each loop with products, short ones first, without jumps back into a loop from outside."""
    at = {text: place for place, text in enumerate(lines) if text.startswith(_LABELS)}
    ends = ((at.get(match[1], end + 1), end) for end, text in enumerate(lines) if (match := _BRANCH.search(text)))
    found: list[tuple[int, int]] = []
    for first, end in sorted((e for e in ends if e[0] <= e[1]), key=lambda e: e[1] - e[0]):
        apart = (end < a or b < first or (first <= a and b <= end) for a, b in found)
        if any("GMMA" in text for text in lines[first:end]) and all(apart):
            found.append((first, end))
    return found


def figures(lines: Sequence[str]) -> Figures:
    """Count the instructions of a kernel.

    Args:
        lines: instructions and labels, as :func:`tests.sass.parsed` gives them.

    Returns:
        The counts; ``after`` is 0 for a kernel that computes one tile in each block.

    Raises:
        ValueError: If there are not two loops, one of each warpgroup.
    """
    loops = _loops(lines)
    steps = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    if len(steps) != 2:
        raise ValueError(f"expected the loops of two warpgroups, got {len(steps)}")
    found = []
    for first, end in steps:
        step = _instructions(lines[first : end + 1])
        after = _instructions(_end(lines, end))
        bars = [text for text in step if "BAR.SYNC" in text]
        own = sum(bool(_WARPGROUP.search(text)) for text in bars)
        rest = sum("BAR.SYNC" in text for text in after)
        found.append((_least(lines, first, end), len(step), len(after), (own, rest), len(bars) - own))
    one, other = found
    return Figures(
        max(one[0], other[0]),
        max(one[1], other[1]),
        max(one[2], other[2]),
        (max(one[3][0], other[3][0]), max(one[3][1], other[3][1])),
        max(one[4], other[4]),
    )


def _least(lines: Sequence[str], first: int, end: int) -> int:
    """Instructions on the shortest path through a loop."""
    at = {lines[place]: place for place in range(first, end + 1) if lines[place].startswith(_LABELS)}
    cost = [0] * (end + 2)
    for place in range(end, first - 1, -1):
        branch = _BRANCH.search(lines[place])
        skips = branch is not None and at.get(branch[1], first) > place
        rest = min(cost[place + 1], cost[at[branch[1]]]) if branch and skips else cost[place + 1]
        cost[place] = rest + (not lines[place].startswith(_LABELS))
    return cost[first]


def _instructions(lines: Sequence[str]) -> list[str]:
    return [text for text in lines if not text.startswith(_LABELS)]


def _end(lines: Sequence[str], end: int) -> Sequence[str]:
    """The lines from the wait for a tile's last product to the branch to the next tile, if there is one.

    ``end`` is the last line of the loop before them.
    """
    store = next((n for n in range(end, len(lines)) if "UTMASTG" in lines[n]), None)
    if store is None:
        return ()
    wait = max(n for n in range(end, store) if "WARPGROUP.DEPBAR" in lines[n])
    back = next(n for n in range(store, len(lines)) if _BRANCH.search(lines[n]))
    return lines[wait + 1 : back + 1]


def disorder(lines: Sequence[str]) -> Iterator[str]:
    """Where one thread acts for its warpgroup and no barrier orders the other threads' work before or after that."""
    wait = ""
    written = fenced = False
    for text in lines:
        if text.startswith(_LABELS):
            continue
        if "BAR.SYNC" in text:
            wait = ""
            written = written and not fenced
        elif "WARPGROUP.DEPBAR" in text:
            wait = "product"
        elif re.search(r"(?<!\.)\bDEPBAR\.LE SB0", text):
            wait = "store"
        elif "SYNCS.ARRIVE" in text and wait == "product":
            yield f"{text}: frees a stage that another warp's product may still read"
        elif re.search(r"\bST[SM]", text):
            if wait == "store":
                yield f"{text}: writes to memory that a store may still read"
            written, fenced = True, False
        elif "FENCE.VIEW.ASYNC" in text:
            fenced = True
        elif "UTMASTG" in text and written:
            yield f"{text}: stores what another warp may not have written yet"
