"""What a person wrote, on the command line or in a ``--config`` file, as checked settings."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_apo.compose.files import EXPERIMENT, GROUPS
from nemo_apo.compose.schema import (
    NAME,
    all_keys,
    assigned,
    first_line,
    keys_of,
    sections,
    shown,
    suggestion,
    unknown_key,
)
from nemo_apo.config import TAGGED_SECTIONS, ConfigError

# The option of ``experiment`` that stands for none.
NONE = "null"


@dataclass(frozen=True)
class Settings:
    """Chosen options by group, and values by dotted key, in the order they were written."""

    options: dict[str, str] = dataclasses.field(default_factory=dict)
    values: dict[str, Any] = dataclasses.field(default_factory=dict)

    def without(self, group: str) -> "Settings":
        """The settings without what they say about a group."""
        return Settings(
            {key: option for key, option in self.options.items() if key != group},
            {key: v for key, v in self.values.items() if not key.startswith(f"{group}.")},
        )

    def overlaid(self, other: "Settings") -> "Settings":
        """Both together; the other one wins."""
        return Settings({**self.options, **other.options}, {**self.values, **other.values})

    def has_values_of(self, section: str) -> bool:
        """Whether a key of the section is set."""
        return any(key.startswith(f"{section}.") for key in self.values)

    def of_section(self, section: str) -> str | None:
        """The first setting of a section, as ``key=value``; None if there is none."""
        if section in self.options:
            return assigned(section, self.options[section])
        for key, value in self.values.items():
            if key.startswith(f"{section}."):
                return assigned(key, value)
        return None


def from_command_line(overrides: Sequence[str], options: Mapping[str, Any]) -> Settings:
    """The settings of ``key=value`` and ``group=option`` arguments."""
    settings = Settings()
    for text in overrides:
        key, value = _parsed(text)
        _settle(settings, key, value, options)
    return settings


def _parsed(text: str) -> tuple[str, Any]:
    """Key and value of one override."""
    if text.startswith(("+", "~")):
        key = text.lstrip("+~").split("=")[0]
        known = key in all_keys() or key in GROUPS
        hint = "" if known else suggestion(key, [*all_keys(), *GROUPS])
        raise ConfigError(f"{text}: keys can be neither added nor deleted, write key=value{hint}")
    if "=" not in text:
        choices = [*all_keys(), *GROUPS]
        raise ConfigError(
            f"{text or 'empty argument'}: must be key=value or group=option"
            f"{suggestion(text, choices)}"
        )
    override = _parse_override(text)
    if override.is_sweep_override():
        raise ConfigError(f"{text}: takes one value; to write commas, quote the value")
    if override.package is not None:
        raise ConfigError(f"{text}: '@' has no meaning here, write key=value or group=option")
    value = override.value()
    return override.key_or_group, "" if value is None and text.endswith("=") else value


def _parse_override(text: str) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        key, value = text.split("=", 1)
        raise ConfigError(
            f"{text}: cannot be read; a value with special characters needs quotes inside "
            f"quotes: {key}=\"'{value}'\""
        ) from None


def from_file(path: Path, options: Mapping[str, Any]) -> Settings:
    """The settings of a ``--config`` file."""
    settings = Settings()
    try:
        for section, body in _read_yaml(path).items():
            for key, value in _settings_of(str(section), body, options):
                _settle(settings, key, value, options)
    except ConfigError as error:
        raise ConfigError(f"{error} (in {path})") from None
    return settings


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        content = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError("--config: no such file") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"--config: not YAML, line {line}: {error.problem}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"--config: cannot be read: {first_line(error)}") from None
    tree = OmegaConf.to_container(content)
    if not isinstance(tree, dict):
        raise ConfigError("--config: must hold a mapping of sections")
    return tree


def _settings_of(
    section: str, body: object, options: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """The settings of one section of a file, the choice of its option first."""
    if "." in section:
        first, rest = section.split(".", 1)
        raise ConfigError(f"{section}: write it nested, {rest} inside {first}:")
    if not isinstance(body, dict):
        yield section, body
        return
    if section not in sections():
        raise ConfigError(unknown_key(section, "", [*sections(), EXPERIMENT]))
    body = {str(key): value for key, value in body.items()}
    if NAME in body:
        yield f"{section}.{NAME}", body.pop(NAME)
    for key, value in body.items():
        yield f"{section}.{key}", value


def _settle(settings: Settings, key: str, value: Any, options: Mapping[str, Any]) -> None:
    """Note one setting, after a check that its key exists."""
    section, _, leaf = key.partition(".")
    if key in GROUPS:
        _choose(settings, key, value, options)
    elif key in sections():
        raise ConfigError(
            f"{assigned(key, value)}: is a section, set one of its keys, such as "
            f"{key}.{keys_of(key)[0]}"
        )
    elif key not in all_keys():
        raise ConfigError(unknown_key(key, value, [*all_keys(), *GROUPS]))
    elif leaf == NAME and (section in TAGGED_SECTIONS or value in options.get(section, ())):
        _choose(settings, section, value, options)
    else:
        settings.values.pop(key, None)
        settings.values[key] = value


def _choose(settings: Settings, group: str, option: Any, options: Mapping[str, Any]) -> None:
    if group == EXPERIMENT and option is None:
        settings.options[group] = NONE
        return
    if not isinstance(option, str) or option not in options[group]:
        rule = f"must be one of {', '.join(options[group])}"
        near = suggestion(shown(option), options[group])
        raise ConfigError(f"{assigned(group, option)}: {rule}{near}")
    settings.options[group] = option
