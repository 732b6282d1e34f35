"""``nemo-apo config``: print the resolved configuration, or the groups and their options."""

import argparse
from pathlib import Path

from nemo_apo.cli.overrides import add_config_arguments, composed
from nemo_apo.compose import group_options, to_yaml
from nemo_apo.config_rules import validate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_config_arguments(parser)
    parser.add_argument(
        "--groups", action="store_true", help="list the groups and the options of each"
    )


def main(arguments: argparse.Namespace) -> None:
    """Print.

    Raises:
        ConfigError: for a configuration that no number of ranks could run.
    """
    if arguments.groups:
        print(groups_text(arguments.config_dir))
        return
    config = composed(arguments)
    parallel = config.parallel
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    validate(config, max(1, ranks), reads_files=False)
    print(to_yaml(config), end="")


def groups_text(config_dir: Path | None) -> str:
    """Every group with its options, one line about each."""
    options = group_options(config_dir)
    width = max(len(name) for named in options.values() for name in named)
    blocks = []
    for group, named in options.items():
        lines = [f"  {name.ljust(width)}  {line}" for name, line in named.items()]
        blocks.append("\n".join([f"{group}=", *lines]))
    return "\n\n".join(blocks)
