"""What a check says, and the table of all of it."""

from collections.abc import Sequence
from dataclasses import dataclass

OK, WARNING, FAILURE = "ok", "warning", "FAILURE"
_SEVERITY = (OK, WARNING, FAILURE)


@dataclass(frozen=True)
class Finding:
    """One check on one node.

    Attributes:
        node: its name.
        check: what was looked at.
        level: ``OK``, ``WARNING`` or ``FAILURE``.
        told: what was seen.
        cure: what to do about it; "" where nothing is to be done.
    """

    node: str
    check: str
    level: str
    told: str
    cure: str = ""


def ok(node: str, check: str, told: str) -> Finding:
    """A finding that is as it should be."""
    return Finding(node, check, OK, told)


def warning(node: str, check: str, told: str, cure: str) -> Finding:
    """A finding that a run survives."""
    return Finding(node, check, WARNING, told, cure)


def failure(node: str, check: str, told: str, cure: str) -> Finding:
    """A finding that a run would fail of."""
    return Finding(node, check, FAILURE, told, cure)


def has_failure(findings: Sequence[Finding]) -> bool:
    """Whether any of them is a failure."""
    return any(finding.level == FAILURE for finding in findings)


def table(findings: Sequence[Finding]) -> str:
    """One line per finding, those of all nodes that say the same as one; the worst last."""
    nodes: dict[tuple[str, str, str, str], list[str]] = {}
    for finding in findings:
        key = (finding.check, finding.level, finding.told, finding.cure)
        names = nodes.setdefault(key, [])
        if finding.node not in names:
            names.append(finding.node)
    rows = sorted(nodes.items(), key=lambda row: _SEVERITY.index(row[0][1]))
    cells = [(level, check, _named(names), told) for (check, level, told, _), names in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(3)] if cells else []
    lines = []
    for row, ((_, _, _, cure), _) in zip(cells, rows, strict=True):
        start = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        lines.append(f"{start}  {row[3]}".rstrip())
        if cure:
            lines.append(f"{' ' * len(start)}  -> {cure}")
    return "\n".join(lines)


def _named(nodes: Sequence[str]) -> str:
    shown = ",".join(nodes[:4])
    return shown if len(nodes) <= 4 else f"{shown} and {len(nodes) - 4} more"
