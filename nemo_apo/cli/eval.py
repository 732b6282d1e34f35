"""``nemo-apo eval``: evaluate a checkpoint of a run, or the weights of a configuration."""

import argparse
from pathlib import Path

from nemo_apo.cli.output_files import require_writable
from nemo_apo.cli.overrides import add_config_arguments
from nemo_apo.cli.train import (
    ended_by_status,
    ignore_fallback_warnings,
    require_grader,
    require_packages,
    require_transformer_impl,
    world_size,
)
from nemo_apo.compose import compose
from nemo_apo.config import Config, ConfigError, require
from nemo_apo.config_rules import check_task_data, validate
from nemo_apo.record import CHECKPOINT_DIR, CONFIG_FILE
from nemo_apo.trainer.durable_files import replace_text
from nemo_apo.trainer.sealed_folder import MANIFEST_FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--checkpoint",
        metavar="STEP",
        help="of a run folder: an RL step, latest (the default), or best by run.keep_best_metric",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument(
        "--samples", type=Path, metavar="FILE", help="write every completion there, as JSON lines"
    )
    add_config_arguments(
        parser, "FOLDER|OVERRIDE", "a run folder or a checkpoint folder, and overrides: "
    )


def main(arguments: argparse.Namespace) -> None:
    """Evaluate and print.

    Raises:
        ConfigError: for a mistake, before any process group; and on all ranks for a checkpoint
            that is damaged or of another model.
        SystemExit: as in ``nemo_apo.cli.train``.
    """
    for option in ("json", "samples"):
        require_writable(f"--{option}", getattr(arguments, option))
    folder, overrides = _split(arguments.overrides)
    config = compose(overrides, _config_file(arguments.config, folder), arguments.config_dir)
    validate(config, world_size())
    check_task_data(config)
    require_packages({"megatron": "trainer"})
    require_transformer_impl(config)
    ignore_fallback_warnings()
    weights = _weights(config, folder, arguments.checkpoint)
    require_grader(config)
    from nemo_apo.cli.eval_output import as_json, sample_lines, table
    from nemo_apo.trainer.evaluated_weights import evaluate_weights

    with ended_by_status("nothing was written"):
        evaluated = evaluate_weights(config, weights)
    if evaluated.layout.rank != 0:
        return
    if arguments.json is not None:
        _write(arguments.json, as_json(config, evaluated))
    if arguments.samples is not None:
        _write(arguments.samples, "".join(sample_lines(config, evaluated.seen)))
    print(table(config, evaluated))


def _split(words: list[str]) -> tuple[Path | None, list[str]]:
    """The folder, the one word that is no override, and the overrides."""
    overrides = [word for word in words if "=" in word or word.startswith(("+", "~"))]
    folders = [word for word in words if word not in overrides]
    if len(folders) > 1:
        raise ConfigError(f"{folders[1]}: one folder is evaluated at a time, beside {folders[0]}")
    return Path(folders[0]) if folders else None, overrides


def _config_file(given: Path | None, folder: Path | None) -> Path | None:
    """The configuration that overrides are laid over: the given one, else that of the run."""
    if given is not None or folder is None:
        return given
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such run folder or checkpoint folder")
    run_folder = folder.resolve().parent.parent if _is_checkpoint(folder) else folder
    file = run_folder / CONFIG_FILE
    if file.is_file():
        return file
    if _is_checkpoint(folder):
        raise ConfigError(f"{folder}: there is no {CONFIG_FILE} of its run above; give --config")
    raise ConfigError(
        f"{folder}: is neither a run folder, which holds {CONFIG_FILE}, nor a checkpoint folder, "
        f"which holds {MANIFEST_FILE}"
    )


def _weights(config: Config, folder: Path | None, which: str | None) -> Path | None:
    """The checkpoint folder to evaluate, or None for the weights that the configuration names."""
    if folder is None:
        require(which is None, "--checkpoint", which, "is of a run folder, and none is given")
        _require_weights(config)
        return None
    if _is_checkpoint(folder):
        require(which is None, "--checkpoint", which, f"{folder} is a checkpoint itself")
        return folder
    from nemo_apo.trainer.evaluated_weights import LATEST, chosen_checkpoint

    return chosen_checkpoint(folder, which or LATEST, config.run.keep_best_metric)


def _require_weights(config: Config) -> None:
    load = config.warm_start.load
    if load is not None:
        require(Path(load).is_dir(), "warm_start.load", load, "there is no such folder")
    elif config.model.path is None:
        raise ConfigError(
            "there is nothing to evaluate: give a run folder, a checkpoint folder, or the "
            "configuration of weights (model.path, warm_start.load)"
        )


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder is meant as a checkpoint, a damaged one perhaps, rather than as a run."""
    return (folder / MANIFEST_FILE).exists() or folder.resolve().parent.name == CHECKPOINT_DIR


def _write(path: Path, text: str) -> None:
    try:
        replace_text(path, text)
    except OSError as error:
        raise SystemExit(f"nemo-apo: {path} cannot be written: {error}") from None
