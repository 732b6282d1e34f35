"""Rows of a benchmark as a table on the terminal and as a JSON file."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# How a column is written; what is not listed is written as it is.
_FORMATS = {
    "time_s": "{:.3f}",
    "gemm_ratio": "{:.3f}",
    "peak_mib": "{:.0f}",
    "sum_error_nats": "{:.1e}",
    "tokens_per_s": "{:,.0f}",
    "step_s": "{:.3f}",
    "train_s": "{:.3f}",
    "weigh_s": "{:.5f}",
    "refresh_s": "{:.3f}",
    "objective_share": "{:.2%}",
    "refresh_share": "{:.1%}",
    "model_tflops_per_s": "{:.3f}",
    "mfu": "{:.1%}",
}


def print_table(rows: Sequence[Any], title: str, notes: Sequence[str] = ()) -> None:
    """Print rows (instances of one dataclass), a title above them and notes below."""
    console = _wide_console()
    table = Table(title=title, title_justify="left")
    entries = [asdict(row) for row in rows]
    for name in entries[0] if entries else ():
        table.add_column(name, justify="left" if name == "variant" else "right")
    for entry in entries:
        table.add_row(*(_text(name, value) for name, value in entry.items()))
    console.print(table)
    for note in notes:
        console.print(note, markup=False)


def print_fields(row: Any, title: str) -> None:
    """Print one row (an instance of a dataclass), a field on each line."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in asdict(row).items():
        table.add_row(name, _text(name, value))
    _wide_console().print(table)


def write_json(
    path: Path,
    rows: Sequence[Any],
    machine: Mapping[str, Any],
    versions: Mapping[str, str],
    left_out: Mapping[str, str],
) -> None:
    """Write machine, versions and rows; a number that is not finite becomes null."""
    content = {
        "machine": dict(machine),
        "versions": dict(versions),
        "rows": [{name: _finite(value) for name, value in asdict(row).items()} for row in rows],
        "left_out": dict(left_out),
    }
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def _wide_console() -> Console:
    """A table cut to the width of a narrow terminal, or of a file, would hide figures."""
    console = Console()
    console.width = max(console.width, 140)
    return console


def _text(name: str, value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _FORMATS.get(name, "{}").format(value)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
