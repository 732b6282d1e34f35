"""``nemo-apo report``: the HTML and PNG report of one run, or of several overlaid."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from nemo_apo.config import ConfigError
from nemo_apo.record import METRICS_FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder to write into (default: the run's own folder; for several runs, `report` "
        "in the folder that holds them all)",
    )


def main(arguments: argparse.Namespace) -> None:
    """Write the report and print where it is.

    Raises:
        ConfigError: for a folder that holds no readable run.
    """
    for run in arguments.runs:
        _require_run(run)
    try:
        from nemo_apo.report import write_report

        written = write_report(arguments.runs, arguments.out or default_folder(arguments.runs))
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"a report needs {error.name}, which is not installed: pip install 'nemo_apo[report]'"
        ) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for path in written:
        print(path)


def default_folder(runs: Sequence[Path]) -> Path:
    """Where the report goes unless told: into the run, or beside several."""
    if len(runs) == 1:
        return runs[0]
    common = os.path.commonpath([run.resolve().parent for run in runs])
    return Path(common) / "report"


def _require_run(run: Path) -> None:
    if not run.is_dir():
        raise ConfigError(f"{run}: there is no such run folder")
    if not (run / METRICS_FILE).is_file():
        raise ConfigError(f"{run}: is not a run folder, it holds no {METRICS_FILE}")
