"""A schema, read off default dataclasses: keys, types, nearest matches.

The trainer's is ``TRAINER``, the dataclasses of ``nemo_apo.config``; another host may have its own.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_apo.config import TAGGED_SECTIONS, Config, ConfigError

# The field that says which class a tagged section has.
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
# Lists by what they hold, and the rule for a person.
_LISTS: dict[Any, tuple[type, str]] = {
    tuple[str, ...]: (str, "a list of names, such as [task,tau]"),
    tuple[int, ...]: (int, "a list of whole numbers, such as [3,4]"),
}


@dataclass(frozen=True)
class Schema:
    """The sections of a configuration.

    Attributes:
        defaults: for each section the default value by its ``name`` field; a section whose class
            does not depend on a name has one, under "".
        prefix: what a person writes before the section in a dotted key.
    """

    defaults: Mapping[str, Mapping[str, Any]]
    prefix: str = ""

    def keys_of(self, section: str) -> list[str]:
        """Keys of a section, of all its classes together."""
        values = self.defaults[section].values()
        fields = (field for value in values for field in dataclasses.fields(value))
        return list(dict.fromkeys(field.name for field in fields))

    def all_keys(self) -> list[str]:
        """Every dotted key that some configuration has, with the prefix."""
        return [
            f"{self.prefix}{section}.{key}"
            for section in self.defaults
            for key in self.keys_of(section)
        ]


TRAINER = Schema(
    {
        field.name: TAGGED_SECTIONS.get(field.name) or {"": getattr(Config(), field.name)}
        for field in dataclasses.fields(Config)
    }
)


def sections() -> list[str]:
    """The sections of the trainer's configuration, in order."""
    return list(TRAINER.defaults)


def keys_of(section: str) -> list[str]:
    """Keys of a section of the trainer, of all its classes together."""
    return TRAINER.keys_of(section)


def all_keys() -> list[str]:
    """Every dotted key that some configuration of the trainer has."""
    return TRAINER.all_keys()


def nearest(wrong: str, choices: Collection[str]) -> list[str]:
    """The choices most like what was written, best first; a key's last part may stand alone."""

    def likeness(choice: str) -> float:
        last = _alike(wrong.split(".")[-1], choice.split(".")[-1])
        # A match of the last part alone counts a little less than one of the whole key.
        return max(_alike(wrong, choice), _alike_by_parts(wrong, choice), 0.9 * last)

    ranked = sorted(((likeness(choice), choice) for choice in choices), key=lambda pair: -pair[0])
    least = max(_LIKENESS, ranked[0][0] - _MARGIN) if ranked else _LIKENESS
    return [choice for score, choice in ranked[:_SUGGESTIONS] if score >= least]


def _alike(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _alike_by_parts(wrong: str, choice: str) -> float:
    """Mean likeness of the parts between dots, so that a short section counts like a long key."""
    pairs = list(zip(wrong.split("."), choice.split("."), strict=False))
    if len(pairs) < 2:
        return 0.0
    return sum(_alike(one, other) for one, other in pairs) / len(pairs)


def suggestion(wrong: str, choices: Collection[str]) -> str:
    """The end of a message that names the nearest choices; empty if none is near."""
    close = nearest(wrong, choices)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def shown(value: object) -> str:
    """A value as a person writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return str(value)


def assigned(key: str, value: object) -> str:
    """``key=value`` as a person writes it."""
    return f"{key}={shown(value)}"


def unknown_key(key: str, value: object, choices: Collection[str]) -> str:
    """The message for a key that does not exist anywhere."""
    written = assigned(key, value) if value != "" else key
    return f"{written}: there is no such key{suggestion(key, choices)}"


def typed_section(section: str, values: object, schema: Schema = TRAINER) -> Any:
    """A section's dataclass from plain values; what they leave out keeps its default.

    Raises:
        ConfigError: for an unknown key, a wrong type, or a value that the class refuses.
    """
    dotted = f"{schema.prefix}{section}"
    if not isinstance(values, Mapping):
        raise ConfigError(f"{assigned(dotted, values)}: is a section, set one of its keys")
    default = _section_default(section, values, schema)
    hints = typing.get_type_hints(type(default))
    known = {field.name: hints[field.name] for field in dataclasses.fields(default)}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(_misplaced_key(section, key, value, default, schema))
        _check_type(f"{dotted}.{key}", value, known[key])
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(default), values))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{dotted}: {first_line(error)}") from None
    except ValueError as error:
        raise ConfigError(f"{schema.prefix}{error}") from None


def _section_default(section: str, values: Mapping[str, Any], schema: Schema) -> Any:
    defaults = schema.defaults[section]
    if "" in defaults:
        return defaults[""]
    name = values.get(NAME)
    if name not in defaults:
        key = f"{schema.prefix}{section}.{NAME}"
        rule = f"must be one of {', '.join(defaults)}{suggestion(shown(name), defaults)}"
        raise ConfigError(f"{assigned(key, name)}: {rule}")
    return defaults[name]


def _misplaced_key(section: str, key: str, value: object, default: Any, schema: Schema) -> str:
    """The message for a key that the section's chosen class does not have."""
    dotted = f"{schema.prefix}{section}.{key}"
    if key not in schema.keys_of(section):
        return unknown_key(dotted, value, schema.all_keys())
    named = schema.defaults[section].items()
    owners = [name for name, other in named if key in _field_names(other)]
    return (
        f"{assigned(dotted, value)}: {section}={default.name} has no {key} "
        f"({', '.join(owners)} {'has' if len(owners) == 1 else 'have'}); "
        f"its keys are {', '.join(_field_names(default))}"
    )


def _field_names(value: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(value)]


def _check_type(key: str, value: object, hint: Any) -> None:
    """Raise ``ConfigError`` unless the value has the hinted type; an int may stand for a float."""
    optional = isinstance(hint, types.UnionType)
    kind = next(arg for arg in typing.get_args(hint) if arg is not type(None)) if optional else hint
    if value is None and optional:
        return
    if kind in _LISTS:
        _check_list(key, value, kind)
        return
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or (isinstance(value, float) and math.isnan(value)):
        expected = _KINDS[kind] + (" or null" if optional else "")
        is_number = isinstance(value, (int, float)) and kind is str
        quote = f"; to write it as text: {key}=\"'{shown(value)}'\"" if is_number else ""
        raise ConfigError(f"{assigned(key, value)}: must be {expected}{quote}")


def _check_list(key: str, value: object, kind: Any) -> None:
    item, rule = _LISTS[kind]
    if not isinstance(value, list) or not all(type(element) is item for element in value):
        raise ConfigError(f"{assigned(key, value)}: must be {rule}")


def first_line(error: Exception) -> str:
    """The first line of an exception's message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
