"""The arguments by which a command takes a configuration."""

import argparse
from pathlib import Path

from nemo_apo.compose import compose
from nemo_apo.config import Config

_OVERRIDES = "section.key=value, or group=option; see `nemo-apo config` and its --groups"


def add_config_arguments(
    parser: argparse.ArgumentParser, metavar: str = "OVERRIDE", before: str = ""
) -> None:
    """Add overrides, ``--config`` and ``--config-dir``.

    Args:
        parser: of the command.
        metavar: what the overrides are called in its help.
        before: what its help says may stand among them.
    """
    parser.add_argument("overrides", nargs="*", metavar=metavar, help=f"{before}{_OVERRIDES}")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML of differences from the defaults; a run's config.yaml repeats the run",
    )
    parser.add_argument(
        "--config-dir",
        type=Path,
        metavar="DIR",
        help="folder with options of your own, such as DIR/experiment/mine.yaml",
    )


def composed(arguments: argparse.Namespace) -> Config:
    """The configuration that the arguments describe.

    Raises:
        ConfigError: see ``nemo_apo.compose.compose``.
    """
    return compose(arguments.overrides, arguments.config, arguments.config_dir)
