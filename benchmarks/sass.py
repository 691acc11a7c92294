"""Machine code of a Mosaic GPU kernel, as `nvdisasm` lists it: what its loops of tensor-core products hold."""

import dataclasses
import re

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(.*)")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")


@dataclasses.dataclass(frozen=True)
class Loop:
    """An innermost loop that multiplies: how often each instruction stands in it."""

    counts: dict[str, int]

    @property
    def products(self) -> int:
        return self.counts.get("HGMMA", 0)

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return self.counts.get("LDL", 0) + self.counts.get("STL", 0)


def product_loops(listing: str) -> list[Loop]:
    """The innermost loops with wgmma (HGMMA) in a listing of one kernel."""
    operations: list[tuple[str, str]] = []
    place: dict[str, int] = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            place[label[1]] = len(operations)
        elif found := _INSTRUCTION.search(line):
            operations.append((found[2].split(".")[0], found[3]))
    spans = []
    for end, (operation, operands) in enumerate(operations):
        target = re.search(r"\.L_x_\d+", operands) if operation == "BRA" else None
        if target and place.get(target[0], end + 1) <= end:
            begin = place[target[0]]
            if any(name == "HGMMA" for name, _ in operations[begin:end]):
                spans.append((begin, end))
    loops = [Loop(_counts(operations[a:b])) for a, b in _innermost(spans)]
    # What ends a work item multiplies once more.
    most = max((loop.products for loop in loops), default=0)
    return [loop for loop in loops if loop.products == most]


def _innermost(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those that hold no other, and no part of one: waits that lie apart from a loop branch back into it."""
    found: list[tuple[int, int]] = []
    for a, b in sorted(spans, key=lambda span: span[1] - span[0]):
        if all(b < c or d < a for c, d in found):
            found.append((a, b))
    return sorted(found)


def _counts(operations: list[tuple[str, str]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, _ in operations:
        counts[name] = counts.get(name, 0) + 1
    return counts
