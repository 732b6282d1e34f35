"""From the command line and YAML files to a typed ``Config``, and back.

Layers, each over the one before: the files of ``conf/``, an experiment, the file given with
``--config``, the overrides of the command line. Hydra composes the files; everything after that is
checked against the dataclasses of ``nemo_apo.config``, which are the schema. Whatever is wrong
with what a person wrote is a ``ConfigError`` with one message.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_apo.config import TAGGED_SECTIONS, Config, ConfigError, unread_sections
from nemo_apo.core.objectives import OBJECTIVES

EXPERIMENT = "experiment"
GROUPS = ("objective", "schedule", "tau", "anchor", "task", "model", "parallel", EXPERIMENT)
NAME = "name"
# Suggestions below this likeness (0 to 1) confuse more than they help.
_LIKENESS = 0.6
# Nor do those that much less like than the best.
_MARGIN = 0.1
_SUGGESTIONS = 3
_KINDS = {
    bool: "true or false (bool)",
    int: "a whole number (int)",
    float: "a number (float)",
    str: "text (str)",
}


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
    if config_dir is not None and not config_dir.is_dir():
        raise ConfigError(f"--config-dir {config_dir}: no such folder")
    options = group_options(config_dir)
    given = _from_command_line(overrides, options)
    written = _from_file(config_file, options) if config_file else _Settings()
    # An option chosen on the command line replaces the file's section, values and all.
    for group, option in given.options.items():
        if group in written.options and written.options[group] != option:
            written = written.without(group)
    tree = _compose_files({**written.options, **given.options}, config_dir)
    values = _resolved(tree, {**written.values, **given.values})
    by_hand = [*written.values, *given.values]
    experiment = given.options.get(EXPERIMENT) or written.options.get(EXPERIMENT)
    sections = {}
    for section in _sections():
        try:
            sections[section] = _typed_section(section, values.pop(section, {}))
        except ConfigError as error:
            touched = any(key.startswith(f"{section}.") for key in by_hand)
            origin = "" if touched or experiment is None else f" (in experiment={experiment})"
            raise ConfigError(f"{error}{origin}") from None
    if values:
        raise ConfigError(_unknown_key(next(iter(values)), "", _all_keys()))
    config = Config(**sections)
    _refuse_unread(config, given)
    return config


def to_yaml(config: Config) -> str:
    """The configuration as YAML, every key in a fixed order; ``compose`` reads it back equal."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def conf_dir() -> Path:
    """The folder of the shipped files: inside the installed package, else in the repository."""
    package = Path(__file__).resolve().parent
    places = (package / "conf", package.parent / "conf")
    for place in places:
        if (place / "config.yaml").is_file():
            return place
    raise ConfigError(f"the folder conf is missing; looked for {places[0]} and {places[1]}")


def group_options(config_dir: Path | None = None) -> dict[str, dict[str, str]]:
    """Every option of every group with one line about it, the first comment of its file."""
    options: dict[str, dict[str, str]] = {group: {} for group in GROUPS}
    for root in filter(None, (config_dir, conf_dir())):
        for group in GROUPS:
            for path in sorted((root / group).glob("*.yaml")):
                options[group][path.stem] = _first_comment(path)
    return options


def _first_comment(path: Path) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ")
    return ""


# --- the schema, read off the dataclasses ---------------------------------------------------------


def _sections() -> list[str]:
    return [field.name for field in dataclasses.fields(Config)]


def _defaults(section: str) -> dict[str, Any]:
    """The default value(s) of a section by name; one that is not tagged has a single one."""
    return TAGGED_SECTIONS.get(section) or {"": getattr(Config(), section)}


def _keys_of(section: str) -> list[str]:
    """Keys of a section, of all its classes together."""
    fields = (field for value in _defaults(section).values() for field in dataclasses.fields(value))
    return list(dict.fromkeys(field.name for field in fields))


def _all_keys() -> list[str]:
    """Every dotted key that some configuration has."""
    return [f"{section}.{key}" for section in _sections() for key in _keys_of(section)]


def nearest(wrong: str, choices: Collection[str]) -> list[str]:
    """The choices most like what was written, best first; a key's last part may stand alone."""

    def likeness(choice: str) -> float:
        whole = difflib.SequenceMatcher(None, wrong, choice).ratio()
        last = difflib.SequenceMatcher(None, wrong.split(".")[-1], choice.split(".")[-1]).ratio()
        # A match of the last part alone counts a little less than one of the whole key.
        return max(whole, 0.95 * last)

    ranked = sorted(((likeness(choice), choice) for choice in choices), key=lambda pair: -pair[0])
    least = max(_LIKENESS, ranked[0][0] - _MARGIN) if ranked else _LIKENESS
    return [choice for score, choice in ranked[:_SUGGESTIONS] if score >= least]


def _suggestion(wrong: str, choices: Collection[str]) -> str:
    close = nearest(wrong, choices)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _assigned(key: str, value: object) -> str:
    return f"{key}={_shown(value)}"


def _unknown_key(key: str, value: object, choices: Collection[str]) -> str:
    written = _assigned(key, value) if value != "" else key
    return f"{written}: there is no such key{_suggestion(key, choices)}"


def _typed_section(section: str, values: object) -> Any:
    """A section's dataclass from plain values; what they leave out keeps its default.

    Raises:
        ConfigError: for an unknown key, a wrong type, or a value that the class refuses.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{_assigned(section, values)}: is a section, set one of its keys")
    default = _section_default(section, values)
    hints = typing.get_type_hints(type(default))
    known = {field.name: hints[field.name] for field in dataclasses.fields(default)}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(_misplaced_key(section, key, value, default, known))
        _check_type(f"{section}.{key}", value, known[key])
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(default), values))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{section}: {_first_line(error)}") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _section_default(section: str, values: Mapping[str, Any]) -> Any:
    defaults = _defaults(section)
    if section not in TAGGED_SECTIONS:
        return defaults[""]
    name = values.get(NAME)
    if name not in defaults:
        key = f"{section}.{NAME}"
        rule = f"must be one of {', '.join(defaults)}{_suggestion(_shown(name), defaults)}"
        raise ConfigError(f"{_assigned(key, name)}: {rule}")
    return defaults[name]


def _misplaced_key(
    section: str, key: str, value: object, default: Any, known: Collection[str]
) -> str:
    """The message for a key that the section's chosen class does not have."""
    dotted = f"{section}.{key}"
    if key not in _keys_of(section):
        return _unknown_key(dotted, value, _all_keys())
    owners = [name for name, other in _defaults(section).items() if key in _field_names(other)]
    return (
        f"{_assigned(dotted, value)}: {section}={default.name} has no {key} "
        f"({', '.join(owners)} {'has' if len(owners) == 1 else 'have'}); "
        f"its keys are {', '.join(known)}"
    )


def _field_names(value: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(value)}


def _check_type(key: str, value: object, hint: Any) -> None:
    """Raise ``ConfigError`` unless the value is of the hint's type; an int may stand for a float."""
    optional = isinstance(hint, types.UnionType)
    kind = next(arg for arg in typing.get_args(hint) if arg is not type(None)) if optional else hint
    if value is None and optional:
        return
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or (isinstance(value, float) and math.isnan(value)):
        expected = _KINDS[kind] + (" or null" if optional else "")
        quote = f"; to write it as text: {key}=\"'{_shown(value)}'\"" if kind is str else ""
        raise ConfigError(f"{_assigned(key, value)}: must be {expected}{quote}")


# --- what a person wrote --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    """Chosen options by group, and values by dotted key, in the order they were written."""

    options: dict[str, str] = dataclasses.field(default_factory=dict)
    values: dict[str, Any] = dataclasses.field(default_factory=dict)

    def without(self, group: str) -> "_Settings":
        """The settings without what they say about a group."""
        return _Settings(
            {key: option for key, option in self.options.items() if key != group},
            {key: v for key, v in self.values.items() if not key.startswith(f"{group}.")},
        )

    def of_section(self, section: str) -> str | None:
        """The first setting of a section, as ``key=value``; None if there is none."""
        if section in self.options:
            return _assigned(section, self.options[section])
        for key, value in self.values.items():
            if key.startswith(f"{section}."):
                return _assigned(key, value)
        return None


def _from_command_line(overrides: Sequence[str], options: Mapping[str, Any]) -> _Settings:
    settings = _Settings()
    for text in overrides:
        key, value = _parsed(text)
        _settle(settings, key, value, options)
    return settings


def _parsed(text: str) -> tuple[str, Any]:
    """Key and value of one override."""
    if text[:1] in "+~":
        key = text.lstrip("+~").split("=")[0]
        known = key in _all_keys() or key in GROUPS
        hint = "" if known else _suggestion(key, [*_all_keys(), *GROUPS])
        raise ConfigError(f"{text}: keys can be neither added nor deleted, write key=value{hint}")
    if "=" not in text:
        choices = [*_all_keys(), *GROUPS]
        raise ConfigError(f"{text}: must be key=value or group=option{_suggestion(text, choices)}")
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


def _from_file(path: Path, options: Mapping[str, Any]) -> _Settings:
    """The settings of a ``--config`` file."""
    settings = _Settings()
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
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"--config: cannot be read as YAML: {_first_line(error)}") from None
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
    if section not in _sections():
        raise ConfigError(_unknown_key(section, "", [*_sections(), EXPERIMENT]))
    body = {str(key): value for key, value in body.items()}
    if NAME in body:
        yield f"{section}.{NAME}", body.pop(NAME)
    for key, value in body.items():
        yield f"{section}.{key}", value


def _settle(settings: _Settings, key: str, value: Any, options: Mapping[str, Any]) -> None:
    """Note one setting, after a check that its key exists."""
    section, _, leaf = key.partition(".")
    if key in GROUPS:
        _choose(settings, key, value, options)
    elif key in _sections():
        raise ConfigError(
            f"{_assigned(key, value)}: is a section, set one of its keys, such as "
            f"{key}.{_keys_of(key)[0]}"
        )
    elif key not in _all_keys():
        raise ConfigError(_unknown_key(key, value, [*_all_keys(), *GROUPS]))
    elif leaf == NAME and (section in TAGGED_SECTIONS or value in options.get(section, ())):
        _choose(settings, section, value, options)
    else:
        settings.values.pop(key, None)
        settings.values[key] = value


def _choose(settings: _Settings, group: str, option: Any, options: Mapping[str, Any]) -> None:
    if group == EXPERIMENT and option is None:
        settings.options[group] = "null"
        return
    if not isinstance(option, str) or option not in options[group]:
        rule = f"must be one of {', '.join(options[group])}"
        near = _suggestion(_shown(option), options[group])
        raise ConfigError(f"{_assigned(group, option)}: {rule}{near}")
    settings.options[group] = option


# --- composition ----------------------------------------------------------------------------------


def _compose_files(options: Mapping[str, str], config_dir: Path | None) -> dict[str, Any]:
    """What Hydra makes of ``config.yaml`` and the chosen options, not yet resolved."""
    chosen = [f"{group}={option}" for group, option in options.items()]
    if config_dir is not None:
        chosen.append(f"hydra.searchpath=['file://{config_dir.resolve()}']")
    try:
        with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
            tree = OmegaConf.to_container(hydra_compose("config", overrides=chosen))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{' '.join(chosen)}: {_first_line(error)}") from None
    assert isinstance(tree, dict)
    return {str(section): values for section, values in tree.items()}


def _resolved(tree: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with the values put in and interpolations resolved."""
    for key, value in values.items():
        section, leaf = key.split(".")
        if isinstance(tree.get(section), dict):
            tree[section][leaf] = value
    try:
        resolved = OmegaConf.to_container(
            OmegaConf.create(tree), resolve=True, throw_on_missing=True
        )
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {_first_line(error)}") from None
    assert isinstance(resolved, dict)
    return {str(section): content for section, content in resolved.items()}


def _refuse_unread(config: Config, given: _Settings) -> None:
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
            return _assigned(f"{section}.{key}", value)
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
