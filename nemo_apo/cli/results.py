"""``nemo-apo results``: run the studies of ``nemo_apo.trainer.study`` and write their tables.

The tables go between ``<!-- table:NAME -->`` and ``<!-- end -->`` of a Markdown file; the text
around them is a person's.
"""

import argparse
import datetime
from pathlib import Path

from nemo_apo.config import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("overrides", nargs="*", help="configuration overrides for every run")
    parser.add_argument("--studies", nargs="+", default=["exact", "graded", "two_modes"])
    parser.add_argument("--root", type=Path, default=Path("runs/results"), help="folder of runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), help="file to fill in")
    parser.add_argument("--only-tables", action="store_true", help="run nothing, write tables")


def main(arguments: argparse.Namespace) -> None:
    """Run what is missing and write the tables.

    Raises:
        ConfigError: for an unknown study or a file without the places for its table.
    """
    from nemo_apo.trainer.study import STUDIES, results, run_study

    unknown = sorted(set(arguments.studies) - set(STUDIES))
    if unknown:
        raise ConfigError(f"--studies {' '.join(unknown)}: must be among {', '.join(STUDIES)}")
    for name in arguments.studies:
        _split(arguments.out, name)
    for name in arguments.studies:
        study = STUDIES[name]
        if not arguments.only_tables:
            run_study(study, arguments.root, arguments.overrides, arguments.jobs)
        before, after = _split(arguments.out, name)
        table = markdown_table(results(study, arguments.root, arguments.overrides))
        today = datetime.date.today().isoformat()
        arguments.out.write_text(f"{before}\n{today}\n\n{table}\n{after}")


def markdown_table(rows: list) -> str:
    """A Markdown table of ``RowResult`` rows; figures are mean and standard deviation."""
    lines = [
        "| | seeds | accuracy before | greedy accuracy | greedy reward | pass@k | last alpha |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        alpha = "" if row.alpha_last is None else f"{row.alpha_last:.2f}"
        figures = " | ".join(
            f"{mean:.3f} ± {std:.3f}"
            for mean, std in (row.start, row.accuracy, row.reward, row.pass_at_k)
        )
        lines.append(f"| {row.label} | {row.runs} | {figures} | {alpha} |")
    return "\n".join(lines) + "\n"


def _split(path: Path, name: str) -> tuple[str, str]:
    """The text up to and from the table's place, markers included."""
    start, end = f"<!-- table:{name} -->", "<!-- end -->"
    text = path.read_text() if path.exists() else ""
    if start not in text or end not in text.split(start, 1)[1]:
        raise ConfigError(f"--out {path}: the file needs the lines {start} and {end}")
    before, rest = text.split(start, 1)
    return before + start + "\n", end + rest.split(end, 1)[1]
