"""From the command line and YAML files to a typed ``Config``, and back.

Layers, each over the one before: the files of ``conf/``, an experiment, the file given with
``--config``, the overrides of the command line. Hydra composes the files; everything after that is
checked against the dataclasses of ``nemo_apo.config``, which are the schema. Whatever is wrong
with what a person wrote is a ``ConfigError`` with one message.
"""

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_apo.compose.files import EXPERIMENT, conf_dir, group_options
from nemo_apo.compose.hf_model import with_checkpoint_shapes
from nemo_apo.compose.schema import (
    all_keys,
    assigned,
    first_line,
    sections,
    typed_section,
    unknown_key,
)
from nemo_apo.compose.settings import NONE, Settings, from_command_line, from_file
from nemo_apo.config import Config, ConfigError, unread_sections
from nemo_apo.core.objectives import OBJECTIVES

__all__ = ["compose", "conf_dir", "group_options", "to_yaml"]


def compose(
    overrides: Sequence[str], config_file: Path | None = None, config_dir: Path | None = None
) -> Config:
    """The configuration that files and overrides describe.

    Args:
        overrides: ``key=value`` and ``group=option``, as on the command line; the last one wins.
        config_file: YAML of differences, nested like the configuration. A group's section may be
            the name of an option, and a mapping with a ``name`` selects that option.
        config_dir: folder with more options of the groups, laid out like ``conf/``.

    Raises:
        ConfigError: naming key, value and rule, and for an unknown key or option the nearest one.
    """
    options = group_options(config_dir)
    given = from_command_line(overrides, options)
    written = from_file(config_file, options) if config_file else Settings()
    # An option chosen on the command line replaces the file's section, values and all.
    for group, option in given.options.items():
        if written.options.get(group) != option:
            written = written.without(group)
    settings = written.overlaid(given)
    tree = _compose_files(settings.options, config_dir)
    config = _typed(_resolved(tree, settings.values), settings)
    _refuse_unread(config, given)
    return config


def to_yaml(config: Config) -> str:
    """The configuration as YAML, every key in a fixed order; ``compose`` reads it back equal."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def _compose_files(options: Mapping[str, str], config_dir: Path | None) -> dict[str, Any]:
    """What Hydra makes of ``config.yaml`` and the chosen options, not yet resolved."""
    chosen = tuple(f"{group}={option}" for group, option in options.items() if option != NONE)
    if config_dir is None:
        return copy.deepcopy(_compose_shipped(chosen))
    return _hydra_tree((*chosen, f"hydra.searchpath=['file://{config_dir.resolve()}']"))


# The shipped files do not change while a process runs, and a study composes hundreds of times.
@functools.cache
def _compose_shipped(chosen: tuple[str, ...]) -> dict[str, Any]:
    return _hydra_tree(chosen)


def _hydra_tree(chosen: tuple[str, ...]) -> dict[str, Any]:
    try:
        with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
            tree = OmegaConf.to_container(hydra_compose("config", overrides=list(chosen)))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{' '.join(chosen)}: {first_line(error)}") from None
    assert isinstance(tree, dict)
    return {str(section): values for section, values in tree.items()}


def _resolved(tree: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with the values, interpolations resolved and a checkpoint's shapes filled in."""
    for key, value in values.items():
        section, leaf = key.split(".")
        if isinstance(tree.get(section), dict):
            tree[section][leaf] = value
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {first_line(error)}") from None
    assert isinstance(resolved, dict)
    if isinstance(resolved.get("model"), dict):
        resolved["model"] = with_checkpoint_shapes(resolved["model"])
    return {str(section): content for section, content in resolved.items()}


def _typed(tree: dict[str, Any], settings: Settings) -> Config:
    """The tree as dataclasses; an error of an experiment's own values says so."""
    for section in tree:
        if section not in sections():
            raise ConfigError(unknown_key(section, "", all_keys()))
    typed = {}
    for section in sections():
        try:
            typed[section] = typed_section(section, tree.get(section, {}))
        except ConfigError as error:
            experiment = settings.options.get(EXPERIMENT, NONE)
            by_hand = experiment == NONE or settings.has_values_of(section)
            origin = "" if by_hand else f" (in experiment={experiment})"
            raise ConfigError(f"{error}{origin}") from None
    return Config(**typed)


def _refuse_unread(config: Config, given: Settings) -> None:
    """Raise ``ConfigError`` where something is set that the objective never reads."""
    objective = config.objective
    for section in sorted(unread_sections(objective)):
        setting = given.of_section(section) or _first_difference(section, config)
        if setting is not None:
            lacks = "alpha" if section == "schedule" else "anchor"
            readers = [
                name for name, other in OBJECTIVES.items() if section not in unread_sections(other)
            ]
            raise ConfigError(
                f"{setting}: {objective.name} has no {lacks}, so nothing would read {section}; "
                f"leave it out or choose another objective ({', '.join(readers)})"
            )


def _first_difference(section: str, config: Config) -> str | None:
    """The first value of a section that is not the default, as ``key=value``."""
    chosen = dataclasses.asdict(getattr(config, section))
    default = dataclasses.asdict(getattr(Config(), section))
    for key, value in chosen.items():
        if key not in default or value != default[key]:
            return assigned(f"{section}.{key}", value)
    return None
