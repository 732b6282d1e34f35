"""``nemo-apo doctor``: is every node fit for a run? A table with a cure for each finding."""

import argparse
import sys
from pathlib import Path

from nemo_apo.config import ConfigError
from nemo_apo.doctor.findings import has_failure, table
from nemo_apo.doctor.machine import Wanted
from nemo_apo.doctor.place import find_place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--gpus", type=int, default=0, metavar="N", help="GPUs that a node must have"
    )
    parser.add_argument(
        "--shared",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder that all nodes must see (the run's); may be given again",
    )
    parser.add_argument(
        "--readable",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="file or folder that must be readable, such as a mount",
    )
    parser.add_argument(
        "--token",
        action="append",
        default=[],
        metavar="NAME",
        help="environment variable that must be set; its value is never shown",
    )
    parser.add_argument(
        "--seconds", type=float, default=120.0, metavar="S", help="longest time for everything"
    )


def main(arguments: argparse.Namespace) -> None:
    """Check; print the table on the first rank.

    Raises:
        ConfigError: for a wrong option or an incomplete environment.
        SystemExit: with status 1 if a finding is a failure, on every rank.
    """
    if arguments.seconds <= 0:
        raise ConfigError(f"--seconds {arguments.seconds}: must be > 0")
    place = find_place()
    from nemo_apo.doctor.visit import visit

    wanted = Wanted(
        gpus=arguments.gpus,
        shared=tuple(path.absolute() for path in arguments.shared),
        readable=tuple(arguments.readable),
        tokens=tuple(arguments.token),
    )
    findings, met = visit(place, wanted, arguments.seconds)
    # The first rank speaks for all; one that could not meet the others, for itself.
    if place.rank == 0 or not met:
        print(table(findings), flush=True)
    if has_failure(findings):
        sys.exit(1)
